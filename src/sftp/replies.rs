//! Replies on their way to the client: a queue and the task that empties it.
//!
//! Invariant: the session's reader never waits here, because the client may be waiting for the reader.
//! File data waits for room; everything else is small, and a client that never fetches it is cut off.

use super::{Clock, Failure, Outcome};
use crate::store::StoreError;
use crate::transfer::ReadSink;
use crate::vfs::VfsError;
use bytes::{BufMut, Bytes, BytesMut};
use russh_sftp::protocol::{Packet, StatusCode};
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;

/// File data in the queue, in bytes: a few replies of 255 KiB.
const DATA_ROOM: usize = 1024 * 1024;
/// The same for files that are being written. Their READs wait in a queue of the file's once there is no room.
const UPLOAD_DATA_ROOM: usize = 1024 * 1024;
/// Other replies in the queue, in bytes. paramiko leaves those to a long series of WRITEs unread for a while.
const UNREAD_LIMIT: usize = 2 * 1024 * 1024;
/// What a reply takes in the queue beside its bytes.
const REPLY_OVERHEAD: usize = 192;
/// Small replies are sent together up to this many bytes.
const BATCH: usize = 32 * 1024;
/// Data up to this many bytes goes with its header; more is not copied.
const SMALL_DATA: usize = 8 * 1024;
const DATA: u8 = 103;

/// Where a session's bytes go, in order.
pub trait Sink: Send + 'static {
    /// Waits until the client takes them; false when it is gone.
    fn send(&mut self, bytes: Bytes) -> impl Future<Output = bool> + Send;
}

/// A reply.
struct Queued {
    packet: BytesMut,
    /// Comes after `packet`, and is part of it.
    data: Vec<Bytes>,
    /// What it takes until it is sent.
    room: OwnedSemaphorePermit,
}

/// See the module. The queue ends when the last clone is dropped.
#[derive(Clone)]
pub struct Replies {
    queue: mpsc::UnboundedSender<Queued>,
    /// For file data.
    room: Arc<Semaphore>,
    /// For data of files that are being written.
    upload_room: Arc<Semaphore>,
    /// For all other replies; closed once there was none.
    small_room: Arc<Semaphore>,
}

impl Replies {
    /// The queue, and the task that empties it, to be spawned. `last` is set whenever the client took something.
    pub fn new(sink: impl Sink, last: Clock) -> (Replies, impl Future<Output = ()> + Send) {
        let (queue, outgoing) = mpsc::unbounded_channel();
        let [room, upload_room, small_room] = [DATA_ROOM, UPLOAD_DATA_ROOM, UNREAD_LIMIT]
            .map(|bytes| Arc::new(Semaphore::new(bytes)));
        (
            Replies {
                queue,
                room,
                upload_room,
                small_room,
            },
            send_all(outgoing, sink, last),
        )
    }

    /// Queues the reply to a request, unless another task has it.
    pub fn reply(&self, id: u32, answer: Outcome) {
        let Some(result) = answer.transpose() else {
            return;
        };
        let packet = encode(id, result);
        match self
            .small_room
            .clone()
            .try_acquire_many_owned((packet.len() + REPLY_OVERHEAD) as u32)
        {
            Ok(room) => drop(self.queue.send(Queued {
                packet,
                data: Vec::new(),
                room,
            })),
            Err(_) => self.small_room.close(),
        }
    }

    /// True when the client asks and asks and never listens.
    pub fn are_ignored(&self) -> bool {
        self.small_room.is_closed()
    }

    /// Room for the data of a file that is being written, to be passed to [`Replies::data`].
    pub fn try_room(&self, len: u32) -> Option<OwnedSemaphorePermit> {
        self.upload_room
            .clone()
            .try_acquire_many_owned(len + REPLY_OVERHEAD as u32)
            .ok()
    }

    /// As [`Replies::try_room`], but waits for it. `None` when the client is gone.
    pub async fn upload_room(&self, len: u32) -> Option<OwnedSemaphorePermit> {
        let room = self
            .upload_room
            .clone()
            .acquire_many_owned(len + REPLY_OVERHEAD as u32)
            .await
            .ok();
        room.filter(|_| !self.queue.is_closed())
    }

    /// Queues file data for which there is room; none is the end of the file. False when the client is gone.
    pub fn data(&self, id: u32, mut data: Vec<Bytes>, room: OwnedSemaphorePermit) -> bool {
        let length: usize = data.iter().map(Bytes::len).sum();
        let mut packet = match length {
            0 => encode(id, Err(Failure::bare(StatusCode::Eof))),
            _ => data_header(id, length),
        };
        if length <= SMALL_DATA {
            data.drain(..)
                .for_each(|piece| packet.extend_from_slice(&piece));
        }
        self.queue.send(Queued { packet, data, room }).is_ok()
    }
}

impl ReadSink for Replies {
    async fn answer(&self, id: u32, result: Result<Vec<Bytes>, StoreError>) -> bool {
        match result {
            Ok(data) => {
                let length = data.iter().map(Bytes::len).sum::<usize>();
                let cost = (length + REPLY_OVERHEAD).min(DATA_ROOM);
                let room = self.room.clone().acquire_many_owned(cost as u32).await;
                room.is_ok_and(|room| self.data(id, data, room))
            }
            Err(error) => {
                self.reply(id, Err(VfsError::Store(error).into()));
                !self.queue.is_closed()
            }
        }
    }
}

/// SSH_FXP_DATA: length, type, id, length of the data.
fn data_header(id: u32, length: usize) -> BytesMut {
    let mut header = BytesMut::with_capacity(13);
    header.put_u32(length as u32 + 9);
    header.put_u8(DATA);
    header.put_u32(id);
    header.put_u32(length as u32);
    header
}

fn encode(id: u32, result: Result<Packet, Failure>) -> BytesMut {
    let packet =
        result.unwrap_or_else(|failure| Packet::status(id, failure.code, &failure.text(), "en"));
    let bytes = Bytes::try_from(packet)
        .inspect_err(|error| log::error!("a reply can't be encoded: {error}"));
    bytes.unwrap_or_default().into()
}

/// Ends with the queue or with the client. Whoever waits for room then gets it, and sees that the queue is gone.
async fn send_all(mut outgoing: mpsc::UnboundedReceiver<Queued>, mut sink: impl Sink, last: Clock) {
    let mut next = outgoing.recv().await;
    while let Some(Queued {
        mut packet,
        mut data,
        room,
    }) = next
    {
        let mut rooms = vec![room];
        next = outgoing.try_recv().ok();
        while let Some(more) =
            next.take_if(|next| data.is_empty() && packet.len() + next.packet.len() <= BATCH)
        {
            packet.extend_from_slice(&more.packet);
            data = more.data;
            rooms.push(more.room);
            next = outgoing.try_recv().ok();
        }
        for bytes in std::iter::once(packet.freeze()).chain(data) {
            if !sink.send(bytes).await {
                return;
            }
        }
        drop(rooms);
        last.send_replace(Instant::now());
        if next.is_none() {
            next = outgoing.recv().await;
        }
    }
}
