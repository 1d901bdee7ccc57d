//! READs of a file that is open for writing too, where more came than there is room for: they wait here for the client,
//! so that the session need not.

use super::{Failure, Replies};
use crate::transfer::SessionLimits;
use crate::transfer::{Read, ReadQueue};
use crate::transfer::{Reader, Upload};
use russh_sftp::protocol::StatusCode;
use std::sync::Arc;
use tokio::sync::oneshot;

/// A queue and the task that empties it. Dropped, what still waits is answered with an error.
pub struct QueuedReads(Arc<ReadQueue>);

impl QueuedReads {
    /// Starts the task.
    pub fn start(upload: &Upload, replies: Replies, limits: &SessionLimits) -> QueuedReads {
        let queue = Arc::new(ReadQueue::new(limits.waiting_reads()));
        tokio::spawn(answer_reads(queue.clone(), upload.reader(), replies));
        QueuedReads(queue)
    }

    /// Queues a READ; false when too many wait.
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
        let Some(room) = replies.upload_room(read.len).await else {
            return;
        };
        let (sender, receiver) = oneshot::channel();
        let reply = Box::new(move |result| drop(sender.send(result)));
        reader.read(read.offset, read.len as usize, reply).await;
        match receiver.await {
            Ok(Ok(data)) => {
                replies.data(read.id, vec![data], room);
            }
            Ok(Err(error)) => replies.reply(read.id, Err(error.into())),
            Err(_dropped) => {
                let closed = Failure::new(
                    StatusCode::Failure,
                    "the file was closed before its data came",
                );
                replies.reply(read.id, Err(closed));
            }
        }
    }
}
