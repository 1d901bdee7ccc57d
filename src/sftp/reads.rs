//! READs of a file that is open for writing too, of which more arrived than there is room for: they
//! wait here for the client, so that the session need not.

use super::{Failure, Replies};
use crate::transfer::{Read, ReadQueue, Reader, SessionLimits, Upload};
use russh_sftp::protocol::StatusCode;
use std::sync::Arc;
use tokio::sync::oneshot;

/// A queue and the task that empties it. Dropped, it answers READs that still wait with an error.
pub struct QueuedReads(Arc<ReadQueue>);

impl QueuedReads {
    /// Starts the task.
    pub fn start(upload: &Upload, replies: Replies, limits: &SessionLimits) -> QueuedReads {
        let queue = Arc::new(ReadQueue::new(limits.waiting_reads()));
        tokio::spawn(answer_reads(queue.clone(), upload.reader(), replies));
        QueuedReads(queue)
    }

    /// Queues a READ. Returns false if too many wait.
    pub fn push(&self, read: Read) -> bool {
        self.0.push(read)
    }
}

impl Drop for QueuedReads {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Answers one READ after the other, each once there is room for its data.
async fn answer_reads(queue: Arc<ReadQueue>, reader: Reader, replies: Replies) {
    while let Some(read) = queue.pop().await {
        let Some(room) = replies.wait_for_room(read.len).await else {
            return;
        };
        let pending = replies.reply_later(read.id);
        let (sender, receiver) = oneshot::channel();
        let reply = Box::new(move |result| drop(sender.send(result)));
        reader.read(read.offset, read.len as usize, reply).await;
        match receiver.await {
            Ok(Ok(data)) => pending.send_data(data, room),
            Ok(Err(error)) => pending.send(Err(error.into())),
            Err(_dropped) => {
                let why = "the file was closed before its data came";
                pending.send(Err(Failure::new(StatusCode::Failure, why)));
            }
        }
    }
}
