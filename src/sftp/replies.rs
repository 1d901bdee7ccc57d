//! Replies on their way to the client: a queue and the task that empties it.
//!
//! Invariant: the session's reader never waits here, because the client may be waiting for the reader.
//! File data waits for room; everything else is small, and a client that never fetches it is cut off.

use crate::download::Answers;
use crate::store::StoreError;
use bytes::{BufMut, Bytes, BytesMut};
use russh_sftp::protocol::{Packet, StatusCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// File data in the queue, in bytes: a few replies of 255 KiB.
const DATA_ROOM: usize = 1024 * 1024;
/// The same for files that are being written. Their READs can't wait, so what finds no room is refused.
const UPLOAD_DATA_ROOM: usize = 4 * 1024 * 1024;
/// Other replies in the queue, in bytes. paramiko leaves those to a long series of WRITEs unread for a while.
const UNREAD_LIMIT: usize = 4 * 1024 * 1024;
/// Small replies are sent together up to this many bytes.
const BATCH: usize = 32 * 1024;
/// SSH_FXP_DATA: length, type, id, length of the data.
const DATA_HEADER: usize = 13;
const DATA: u8 = 103;

/// Where a session's bytes go, in order.
pub trait Sink: Send + 'static {
    /// Waits until the client takes them; false when it is gone.
    fn send(&mut self, bytes: Bytes) -> impl Future<Output = bool> + Send;
}

/// See the module. The queue ends when the last clone is dropped.
#[derive(Clone)]
pub struct Replies {
    queue: mpsc::UnboundedSender<(Bytes, Option<OwnedSemaphorePermit>)>,
    unread: Arc<AtomicUsize>,
    room: Arc<Semaphore>,
    upload_room: Arc<Semaphore>,
}

impl Replies {
    /// The queue, and the task that empties it, to be spawned.
    pub fn new(sink: impl Sink, activity: impl Fn() + Send + 'static) -> (Replies, impl Future<Output = ()> + Send) {
        let (queue, mut outgoing) = mpsc::unbounded_channel();
        let room = |bytes| Arc::new(Semaphore::new(bytes));
        let (room, upload_room) = (room(DATA_ROOM), room(UPLOAD_DATA_ROOM));
        let replies = Replies { queue, unread: Arc::default(), room, upload_room };
        let (unread, room) = (replies.unread.clone(), replies.room.clone());
        let task = async move {
            send_all(&mut outgoing, sink, &unread, activity).await;
            // Whoever waits for room waits no more: the client is gone.
            room.close();
        };
        (replies, task)
    }

    /// Queues a reply.
    pub fn send(&self, packet: Packet) {
        match Bytes::try_from(packet) {
            Ok(bytes) => {
                self.unread.fetch_add(bytes.len(), Ordering::Relaxed);
                let _ = self.queue.send((bytes, None));
            }
            Err(error) => log::error!("a reply can't be encoded: {error}"),
        }
    }

    /// Queues a status with a sentence for the user.
    pub fn status(&self, id: u32, code: StatusCode, message: &str) {
        self.send(status_packet(id, code, message));
    }

    /// Room for the data of a file that is being written, to be passed to [`Replies::data`].
    pub fn try_room(&self, len: u32) -> Option<OwnedSemaphorePermit> {
        self.upload_room.clone().try_acquire_many_owned(len).ok()
    }

    /// Queues file data for which there is room.
    pub fn data(&self, id: u32, data: &[u8], room: OwnedSemaphorePermit) {
        let mut packet = self.buffer(data.len());
        packet.extend_from_slice(data);
        let _ = self.queue.send((data_packet(id, packet), Some(room)));
    }

    /// True when the client asks and asks and never listens.
    pub fn are_ignored(&self) -> bool {
        self.unread.load(Ordering::Relaxed) > UNREAD_LIMIT
    }

    /// Queues a reply once there is room: for those who may wait. False when the client is gone.
    async fn paced(&self, bytes: Bytes) -> bool {
        let weight = bytes.len().min(DATA_ROOM) as u32;
        match self.room.clone().acquire_many_owned(weight).await {
            Ok(permit) => self.queue.send((bytes, Some(permit))).is_ok(),
            Err(_) => false,
        }
    }
}

/// Fills in the header for which [`Answers::buffer`] left room.
fn data_packet(id: u32, mut packet: BytesMut) -> Bytes {
    let length = packet.len() as u32;
    let mut header = packet.get_mut(..DATA_HEADER).unwrap_or_default();
    header.put_u32(length - 4);
    header.put_u8(DATA);
    header.put_u32(id);
    header.put_u32(length - DATA_HEADER as u32);
    packet.freeze()
}

fn status_packet(id: u32, code: StatusCode, message: &str) -> Packet {
    Packet::status(id, code, message, "en")
}

impl Answers for Replies {
    fn buffer(&self, len: usize) -> BytesMut {
        let mut buffer = BytesMut::with_capacity(DATA_HEADER + len);
        buffer.put_bytes(0, DATA_HEADER);
        buffer
    }

    async fn answer(&self, id: u32, result: Result<BytesMut, StoreError>) -> bool {
        let status = match result {
            Ok(packet) if packet.len() > DATA_HEADER => return self.paced(data_packet(id, packet)).await,
            Ok(_) => status_packet(id, StatusCode::Eof, "end of file"),
            Err(error) => status_packet(id, super::status_of_store(&error), &error.to_string()),
        };
        match Bytes::try_from(status) {
            Ok(bytes) => self.paced(bytes).await,
            Err(_) => false,
        }
    }
}

async fn send_all(
    outgoing: &mut mpsc::UnboundedReceiver<(Bytes, Option<OwnedSemaphorePermit>)>,
    mut sink: impl Sink,
    unread: &AtomicUsize,
    activity: impl Fn(),
) {
    let mut held = None;
    loop {
        let (mut bytes, permit) = match held.take() {
            Some(next) => next,
            None => match outgoing.recv().await {
                Some(next) => next,
                None => return,
            },
        };
        if permit.is_none() {
            let mut batch = BytesMut::new();
            while let Ok(next) = outgoing.try_recv() {
                if next.1.is_some() || bytes.len() + batch.len() + next.0.len() > BATCH {
                    held = Some(next);
                    break;
                }
                if batch.is_empty() {
                    batch.extend_from_slice(&bytes);
                    bytes = Bytes::new();
                }
                batch.extend_from_slice(&next.0);
            }
            bytes = if batch.is_empty() { bytes } else { batch.freeze() };
            unread.fetch_sub(bytes.len(), Ordering::Relaxed);
        }
        if !sink.send(bytes).await {
            return;
        }
        drop(permit);
        activity();
    }
}
