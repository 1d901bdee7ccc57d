//! Replies on their way to the client: a queue and the task that empties it.
//!
//! Invariant: the session's reader never waits here, because the client may be waiting for the reader.
//! File data waits for room; everything else is small, and a client that never fetches it is cut off.

use super::{Answer, Clock, Failure};
use crate::{download::Answers, store::StoreError, tree::TreeError};
use bytes::{BufMut, Bytes, BytesMut};
use russh_sftp::protocol::{Packet, StatusCode};
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;

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

/// A reply, and the room it takes until it is sent.
type Queued = (BytesMut, OwnedSemaphorePermit);

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
        let [room, upload_room, small_room] =
            [DATA_ROOM, UPLOAD_DATA_ROOM, UNREAD_LIMIT].map(|bytes| Arc::new(Semaphore::new(bytes)));
        (Replies { queue, room, upload_room, small_room }, send_all(outgoing, sink, last))
    }

    /// Queues the reply to a request, unless another task has it.
    pub fn reply(&self, id: u32, answer: Answer) {
        let Some(result) = answer.transpose() else { return };
        let bytes = encode(id, result);
        match self.small_room.clone().try_acquire_many_owned(bytes.len() as u32) {
            Ok(room) => drop(self.queue.send((bytes, room))),
            Err(_) => self.small_room.close(),
        }
    }

    /// True when the client asks and asks and never listens.
    pub fn are_ignored(&self) -> bool {
        self.small_room.is_closed()
    }

    /// Room for the data of a file that is being written, to be passed to [`Replies::data`].
    pub fn try_room(&self, len: u32) -> Option<OwnedSemaphorePermit> {
        self.upload_room.clone().try_acquire_many_owned(len).ok()
    }

    /// Queues file data for which there is room.
    pub fn data(&self, id: u32, data: &[u8], room: OwnedSemaphorePermit) {
        let mut packet = self.buffer(data.len());
        packet.extend_from_slice(data);
        let _ = self.queue.send((data_reply(id, packet), room));
    }
}

impl Answers for Replies {
    fn buffer(&self, len: usize) -> BytesMut {
        let mut buffer = BytesMut::with_capacity(DATA_HEADER + len);
        buffer.put_bytes(0, DATA_HEADER);
        buffer
    }

    async fn answer(&self, id: u32, result: Result<BytesMut, StoreError>) -> bool {
        let bytes = match result {
            Ok(packet) => data_reply(id, packet),
            Err(error) => encode(id, Err(TreeError::Store(error).into())),
        };
        let room = self.room.clone().acquire_many_owned(bytes.len().min(DATA_ROOM) as u32).await;
        room.is_ok_and(|room| self.queue.send((bytes, room)).is_ok())
    }
}

/// Fills in the header for which [`Answers::buffer`] left room. No data is the end of the file.
fn data_reply(id: u32, mut packet: BytesMut) -> BytesMut {
    if packet.len() <= DATA_HEADER {
        return encode(id, Err(Failure(StatusCode::Eof, "end of file".to_owned())));
    }
    let length = packet.len() as u32;
    let mut header = packet.get_mut(..DATA_HEADER).unwrap_or_default();
    header.put_u32(length - 4);
    header.put_u8(DATA);
    header.put_u32(id);
    header.put_u32(length - DATA_HEADER as u32);
    packet
}

fn encode(id: u32, result: Result<Packet, Failure>) -> BytesMut {
    let packet = result.unwrap_or_else(|Failure(code, why)| Packet::status(id, code, &why, "en"));
    let bytes = Bytes::try_from(packet).inspect_err(|error| log::error!("a reply can't be encoded: {error}"));
    bytes.unwrap_or_default().into()
}

/// Ends with the queue or with the client. Whoever waits for room then gets it, and sees that the queue is gone.
async fn send_all(mut outgoing: mpsc::UnboundedReceiver<Queued>, mut sink: impl Sink, last: Clock) {
    let mut next = outgoing.recv().await;
    while let Some((mut bytes, room)) = next {
        let mut rooms = vec![room];
        next = outgoing.try_recv().ok();
        while let Some((more, room)) = next.take_if(|(more, _)| bytes.len() + more.len() <= BATCH) {
            bytes.extend_from_slice(&more);
            rooms.push(room);
            next = outgoing.try_recv().ok();
        }
        if !sink.send(bytes.freeze()).await {
            return;
        }
        drop(rooms);
        last.send_replace(Instant::now());
        if next.is_none() {
            next = outgoing.recv().await;
        }
    }
}
