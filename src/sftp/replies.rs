//! Replies on their way to the client: a queue and the task that empties it.
//!
//! Invariant: the session's loop never waits here, because the client may be waiting for it. File
//! data waits for room; everything else is small, and a client that never reads it is disconnected.

use super::failure::ok_status;
use super::session::Clock;
use super::{Failure, SmallReply};
use crate::INTERNAL_ERROR;
use crate::store;
use crate::transfer::ReadSink;
use crate::vfs::VfsError;
use bytes::{BufMut, Bytes, BytesMut};
use russh_sftp::protocol::{Packet, StatusCode};
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;

/// Limit on file data in the queue, in bytes: a few replies of 255 KiB.
const MAX_DATA_QUEUED: usize = 1024 * 1024;
/// The same for files that are being written. Their READs wait in a queue of the file once there is
/// no room.
const MAX_UPLOAD_DATA_QUEUED: usize = 1024 * 1024;
/// Limit on other replies in the queue, in bytes. paramiko leaves those to a long series of WRITEs
/// unread for a while.
const MAX_UNREAD: usize = 2 * 1024 * 1024;
/// Memory of a reply in the queue beside its bytes, in bytes.
const REPLY_OVERHEAD: usize = 192;
/// Small replies are sent together up to this many bytes.
const MAX_BATCH: usize = 32 * 1024;
/// Data up to this many bytes goes with its header; more is not copied.
const MAX_COPIED_DATA: usize = 8 * 1024;
const DATA: u8 = 103;

/// Where a session's bytes go, in order.
pub trait Sink: Send + 'static {
    /// Waits until the client takes them. Returns false if the client is gone.
    fn send(&mut self, bytes: Bytes) -> impl Future<Output = bool> + Send;
}

/// A reply in the queue.
struct QueuedReply {
    packet: BytesMut,
    /// Follows `packet`, and is part of it.
    data: Vec<Bytes>,
    /// Its memory until it is sent.
    room: OwnedSemaphorePermit,
}

/// See the module. The queue ends when the last clone is dropped.
#[derive(Clone)]
pub struct Replies {
    queue: mpsc::UnboundedSender<QueuedReply>,
    /// For file data.
    data_room: Arc<Semaphore>,
    /// For data of files that are being written.
    upload_data_room: Arc<Semaphore>,
    /// For all other replies; closed once there was none.
    small_room: Arc<Semaphore>,
}

impl Replies {
    /// Returns the queue, and the task that empties it, to be spawned. `last` is set whenever the
    /// client has taken something.
    pub fn new(sink: impl Sink, last: Clock) -> (Replies, impl Future<Output = ()> + Send) {
        let (queue, outgoing) = mpsc::unbounded_channel();
        let replies = Replies {
            queue,
            data_room: Arc::new(Semaphore::new(MAX_DATA_QUEUED)),
            upload_data_room: Arc::new(Semaphore::new(MAX_UPLOAD_DATA_QUEUED)),
            small_room: Arc::new(Semaphore::new(MAX_UNREAD)),
        };
        (replies, send_all(outgoing, sink, last))
    }

    /// Queues the reply to a request.
    pub fn reply(&self, id: u32, result: SmallReply) {
        let packet = encode(id, result);
        let cost = packet.len() + REPLY_OVERHEAD;
        match try_acquire(&self.small_room, cost) {
            Some(room) => {
                // The queue is closed if the client is gone.
                let _ = self.queue.send(QueuedReply {
                    packet,
                    data: Vec::new(),
                    room,
                });
            }
            None => self.small_room.close(),
        }
    }

    /// A reply that another task sends.
    pub fn reply_later(&self, id: u32) -> PendingReply {
        PendingReply {
            id,
            replies: Some(self.clone()),
        }
    }

    /// Has the client sent request after request without reading the replies?
    pub fn are_ignored(&self) -> bool {
        self.small_room.is_closed()
    }

    /// Is a request still to be answered by another task?
    pub fn are_owed(&self) -> bool {
        self.queue.strong_count() > 1
    }

    /// Room for the data of a file that is being written.
    pub fn try_room(&self, len: u32) -> Option<OwnedSemaphorePermit> {
        try_acquire(&self.upload_data_room, len as usize + REPLY_OVERHEAD)
    }

    /// As [`Replies::try_room`], but waits for it. `None` if the client is gone.
    pub async fn wait_for_room(&self, len: u32) -> Option<OwnedSemaphorePermit> {
        let permits = len + REPLY_OVERHEAD as u32;
        let room = self.upload_data_room.clone();
        let room = room.acquire_many_owned(permits).await.ok()?;
        match self.queue.is_closed() {
            true => None,
            false => Some(room),
        }
    }

    /// Queues file data for which there is room; no bytes are the end of the file. Returns false if
    /// the client is gone.
    fn queue_data(&self, id: u32, mut data: Vec<Bytes>, room: OwnedSemaphorePermit) -> bool {
        let len = length_of(&data);
        let mut packet = match len {
            0 => encode(id, Err(Failure::bare(StatusCode::Eof))),
            _ => encode_data_header(id, len),
        };
        if len <= MAX_COPIED_DATA {
            for piece in data.drain(..) {
                packet.extend_from_slice(&piece);
            }
        }
        let reply = QueuedReply { packet, data, room };
        self.queue.send(reply).is_ok()
    }
}

impl ReadSink for Replies {
    async fn answer(&self, id: u32, result: store::Result<Vec<Bytes>>) -> bool {
        match result {
            Ok(data) => {
                let cost = (length_of(&data) + REPLY_OVERHEAD).min(MAX_DATA_QUEUED);
                let room = self.data_room.clone();
                match room.acquire_many_owned(cost as u32).await {
                    Ok(room) => self.queue_data(id, data, room),
                    Err(_closed) => false,
                }
            }
            Err(error) => {
                self.reply(id, Err(VfsError::Store(error).into()));
                !self.queue.is_closed()
            }
        }
    }
}

/// A reply that another task sends. Dropped without having been sent it reports an internal error,
/// so that every request is answered exactly once.
pub struct PendingReply {
    id: u32,
    /// `None` once it was sent.
    replies: Option<Replies>,
}

impl PendingReply {
    /// Sends a packet, or a failure.
    pub fn send(mut self, result: SmallReply) {
        if let Some(replies) = self.replies.take() {
            replies.reply(self.id, result);
        }
    }

    /// Sends OK, or a failure.
    pub fn send_status<E: Into<Failure>>(self, result: Result<(), E>) {
        let id = self.id;
        match result {
            Ok(()) => self.send(Ok(ok_status(id))),
            Err(error) => self.send(Err(error.into())),
        }
    }

    /// Sends data for which there is room; no bytes are the end of the file.
    pub fn send_data(mut self, data: Bytes, room: OwnedSemaphorePermit) {
        if let Some(replies) = self.replies.take() {
            replies.queue_data(self.id, vec![data], room);
        }
    }
}

impl Drop for PendingReply {
    fn drop(&mut self) {
        if let Some(replies) = self.replies.take() {
            let failure = Failure::new(StatusCode::Failure, INTERNAL_ERROR);
            replies.reply(self.id, Err(failure));
        }
    }
}

fn try_acquire(room: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
    let permits = u32::try_from(bytes).ok()?;
    room.clone().try_acquire_many_owned(permits).ok()
}

fn length_of(data: &[Bytes]) -> usize {
    data.iter().map(Bytes::len).sum()
}

/// SSH_FXP_DATA without its data: length, type, id, length of the data.
fn encode_data_header(id: u32, len: usize) -> BytesMut {
    let mut header = BytesMut::with_capacity(13);
    header.put_u32(len as u32 + 9);
    header.put_u8(DATA);
    header.put_u32(id);
    header.put_u32(len as u32);
    header
}

fn encode(id: u32, result: SmallReply) -> BytesMut {
    let packet = match result {
        Ok(packet) => packet,
        Err(failure) => Packet::status(id, failure.code, &failure.text(), "en"),
    };
    match Bytes::try_from(packet) {
        Ok(bytes) => bytes.into(),
        Err(error) => {
            log::error!("a reply can't be encoded: {error}");
            BytesMut::new()
        }
    }
}

/// Sends the replies until the queue ends or the client is gone. A task that waits for room gets it
/// then, and sees that the queue is closed.
async fn send_all(
    mut outgoing: mpsc::UnboundedReceiver<QueuedReply>,
    mut sink: impl Sink,
    last: Clock,
) {
    let mut next = outgoing.recv().await;
    while let Some(first) = next {
        let mut batch = Batch::new(first);
        next = outgoing.try_recv().ok();
        while let Some(reply) = next.take_if(|reply| batch.fits(reply)) {
            batch.add(reply);
            next = outgoing.try_recv().ok();
        }
        if !batch.send(&mut sink).await {
            return;
        }
        last.send_replace(Instant::now());
        if next.is_none() {
            next = outgoing.recv().await;
        }
    }
}

/// Replies that are sent together. Only the last one may have data that is not copied.
struct Batch {
    packets: BytesMut,
    data: Vec<Bytes>,
    rooms: Vec<OwnedSemaphorePermit>,
}

impl Batch {
    fn new(first: QueuedReply) -> Batch {
        Batch {
            packets: first.packet,
            data: first.data,
            rooms: vec![first.room],
        }
    }

    fn fits(&self, reply: &QueuedReply) -> bool {
        self.data.is_empty() && self.packets.len() + reply.packet.len() <= MAX_BATCH
    }

    fn add(&mut self, reply: QueuedReply) {
        self.packets.extend_from_slice(&reply.packet);
        self.data = reply.data;
        self.rooms.push(reply.room);
    }

    /// Returns false if the client is gone. The room is given back once everything is sent.
    async fn send(self, sink: &mut impl Sink) -> bool {
        if !sink.send(self.packets.freeze()).await {
            return false;
        }
        for bytes in self.data {
            if !sink.send(bytes).await {
                return false;
            }
        }
        drop(self.rooms);
        true
    }
}
