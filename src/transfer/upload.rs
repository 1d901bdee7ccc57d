//! A file that is open for writing: the handle that a session holds, and what others see of it.
//!
//! Called by `vfs` (which opens) and `sftp` (which writes and closes). The work is done by a task
//! of its own ([`UploadTask`]), which gets one command at a time. Nothing appears in the store
//! before CLOSE, and when every [`Upload`] is dropped without one the task aborts.

use super::upload_task::UploadTask;
use super::{LockedName, NameLock, NameLocks, PartBufferError, Transfers};
use crate::Panicked;
use crate::events::Teller;
use crate::path::Key;
use crate::store::{Condition, Object, StoreError};
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

/// Bytes that a client may leave out of a file altogether, as for a sparse one. They are stored as
/// zeros, part by part.
pub const MAX_HOLES: u64 = 1024 * 1024 * 1024;

/// Why a WRITE, a READ or a CLOSE fails. The first failure to change the file is remembered: every
/// later request on the handle fails with it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum UploadError {
    /// See [`StoreError`].
    #[error("the upload failed: {0}")]
    Store(#[from] StoreError),
    /// See [`PartBufferError`].
    #[error(transparent)]
    Buffer(#[from] PartBufferError),
    /// A size that can't be set, because bytes behind it are in the store. Not remembered.
    #[error("can't set the size to {size} bytes while {written} were written")]
    SizeTooSmall {
        /// The size asked for.
        size: u64,
        /// The size of the file.
        written: u64,
    },
    /// A size that leaves out too much. Not remembered.
    #[error("more than {MAX_HOLES} bytes of the file would be left out")]
    SizeTooLarge,
    /// The client has left out more bytes than may be stored as zeros.
    #[error("more than {MAX_HOLES} bytes of the file were left out")]
    HolesTooLarge,
    /// A READ of bytes that were sent.
    #[error(
        "offset {offset} is on its way to the store and can't be read before the file is closed"
    )]
    OnItsWay {
        /// Where the READ begins.
        offset: u64,
    },
    /// The memory of the server is too small for a part.
    #[error("the server's --buffer-memory is smaller than one part of {size} bytes")]
    PartTooLarge {
        /// Size of the part in bytes.
        size: u64,
    },
    /// The memory of the server is in use.
    #[error(
        "other uploads hold the server's memory for parts of {size} bytes: try again later, or raise --buffer-memory"
    )]
    NoMemory {
        /// Size of the part in bytes.
        size: u64,
    },
    /// The parts that the store has confirmed are not all that was sent.
    #[error("the upload failed: {stored} bytes in {parts} parts, {received} received")]
    PartsMissing {
        /// Bytes in the parts that were confirmed.
        stored: u64,
        /// How many these are.
        parts: usize,
        /// Bytes received.
        received: u64,
    },
    /// The upload ended before this request was carried out.
    #[error("the upload was cut off")]
    CutOff,
    /// The session has removed the file.
    #[error("the file was removed before it was closed")]
    Removed,
    /// See [`Panicked`].
    #[error(transparent)]
    Panicked(Panicked),
}

/// The result of a request on an open file.
pub type Result<T> = std::result::Result<T, UploadError>;

/// Called once with the result of a request.
pub type Reply<T> = Box<dyn FnOnce(Result<T>) + Send>;

/// How an upload ended.
#[derive(Debug)]
pub struct UploadSummary {
    /// Bytes received.
    pub bytes: u64,
    /// S3 parts; 0 for a single PutObject.
    pub parts: u32,
    /// The ETag of the object that was made.
    pub etag: Option<String>,
    /// Time since OPEN.
    pub took: Duration,
    /// `None` if the client went away before CLOSE.
    pub result: Option<Result<()>>,
}

/// What to open.
pub struct Target {
    /// The key that will appear at CLOSE.
    pub key: Key,
    /// The object whose bytes stay where nothing is written (an open without TRUNC).
    pub base: Option<Object>,
    /// What must be at the key when the file is closed.
    pub condition: Condition,
    /// Tells whose upload was aborted.
    pub events: Teller,
    /// Called once with how it ended, before CLOSE is answered.
    pub on_end: Box<dyn FnOnce(UploadSummary) + Send>,
}

/// A request for the task.
pub(super) enum Command {
    Read {
        offset: u64,
        len: usize,
        reply: Reply<Bytes>,
    },
    Write {
        /// `None` appends.
        offset: Option<u64>,
        data: Vec<Bytes>,
        reply: Reply<()>,
    },
    Truncate {
        size: u64,
        reply: Reply<()>,
    },
    Discard,
    Close {
        /// The file's place among the changes of its name.
        lock: NameLock,
        reply: Reply<()>,
    },
}

impl Command {
    /// Answers a request that can no longer be carried out.
    fn refuse(self) {
        match self {
            Command::Read { reply, .. } => reply(Err(UploadError::CutOff)),
            Command::Discard => {}
            Command::Write { reply, .. }
            | Command::Truncate { reply, .. }
            | Command::Close { reply, .. } => reply(Err(UploadError::CutOff)),
        }
    }
}

/// A file open for writing.
pub struct Upload {
    // One command waits while one is carried out: more would be memory that nothing counts.
    commands: mpsc::Sender<Command>,
    progress: Arc<Progress>,
    locks: NameLocks,
    name: LockedName,
}

/// What others see of an upload.
pub struct Progress {
    /// Size of the file after the requests that were carried out, in bytes.
    size: AtomicU64,
    /// Size of the file after all requests that arrived, unless one of them fails, in bytes.
    announced_size: AtomicU64,
    /// Requests that arrived and are not carried out yet, READs left out.
    waiting: AtomicU64,
    /// Whether the file may differ from the object that it was opened on.
    is_changed: AtomicBool,
    /// Whether another session has waited for its CLOSE in vain.
    is_kept_open: AtomicBool,
    /// When it was opened.
    pub started: SystemTime,
}

impl Progress {
    /// For a file that begins as this object; empty without one.
    fn new(base: Option<&Object>) -> Progress {
        let size = base.map_or(0, |base| base.size);
        Progress {
            size: size.into(),
            announced_size: size.into(),
            waiting: 0.into(),
            is_changed: base.is_none().into(),
            is_kept_open: false.into(),
            started: SystemTime::now(),
        }
    }

    /// Size of the file in bytes, after every request that arrived before this call.
    pub fn size(&self) -> u64 {
        match self.waiting.load(Ordering::Acquire) {
            0 => self.size.load(Ordering::Relaxed),
            _ => self.announced_size.load(Ordering::Relaxed),
        }
    }

    /// Whether the file may differ from the object that it was opened on.
    pub fn is_changed(&self) -> bool {
        self.is_changed.load(Ordering::Relaxed)
    }

    /// Whether another session has waited for its CLOSE in vain.
    pub fn is_kept_open(&self) -> bool {
        self.is_kept_open.load(Ordering::Relaxed)
    }

    /// Notes that another session has waited for its CLOSE in vain.
    pub fn note_kept_open(&self) {
        self.is_kept_open.store(true, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    /// Records a request, and the size that the file will have after it. The requests of one upload
    /// come from one task.
    fn announce(&self, size: u64) {
        self.is_changed.store(true, Ordering::Relaxed);
        self.announced_size.store(size, Ordering::Relaxed);
        self.waiting.fetch_add(1, Ordering::Release);
    }

    /// Records that the oldest request was carried out, and the size since then.
    pub(super) fn record_done(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
        self.waiting.fetch_sub(1, Ordering::Release);
    }
}

impl Upload {
    /// Starts the task. No request is sent to the store before there is something to send.
    pub fn open(transfers: Arc<Transfers>, target: Target) -> Upload {
        let (commands, inbox) = mpsc::channel(1);
        let progress = Arc::new(Progress::new(target.base.as_ref()));
        let locks = transfers.locks.clone();
        let name = LockedName::alone(&target.key);
        let task = UploadTask::new(transfers.clone(), target, progress.clone());
        transfers.tasks.spawn(task.run(inbox));
        Upload {
            commands,
            progress,
            locks,
            name,
        }
    }

    /// Size and start, for others to see.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// WRITE of these bytes, one after the other, at an offset or at the end (`None`). Waits while
    /// parts in flight fill the memory, which is the client's back-pressure. A write that lies far
    /// beyond a gap is answered once the gap is nearer.
    pub async fn write(&self, offset: Option<u64>, data: Vec<Bytes>, reply: Reply<()>) {
        let len: u64 = data.iter().map(|piece| piece.len() as u64).sum();
        let size = self.progress.size();
        let new_size = match offset {
            Some(_) if len == 0 => size,
            Some(offset) => size.max(offset.saturating_add(len)),
            None => size.saturating_add(len),
        };
        self.progress.announce(new_size);
        let write = Command::Write {
            offset,
            data,
            reply,
        };
        send(&self.commands, write).await;
    }

    /// READ of a file that is being written; an empty answer means end of file.
    pub async fn read(&self, offset: u64, len: usize, reply: Reply<Bytes>) {
        self.reader().read(offset, len, reply).await;
    }

    /// A way to read the file that does not keep it open.
    pub fn reader(&self) -> Reader {
        Reader {
            commands: self.commands.downgrade(),
        }
    }

    /// FSETSTAT with a size.
    pub async fn truncate(&self, size: u64, reply: Reply<()>) {
        self.progress.announce(size);
        send(&self.commands, Command::Truncate { size, reply }).await;
    }

    /// Gives the file up, as its name was removed: later changes have no effect, and CLOSE fails.
    pub async fn discard(&self) {
        send(&self.commands, Command::Discard).await;
    }

    /// CLOSE: the reply comes after the store has said whether the object is there. Changes of this
    /// name that are asked for after this call come after it.
    pub async fn close(self, reply: Reply<()>) {
        let lock = self.locks.enqueue(vec![self.name.clone()]);
        self.progress.announce(self.progress.size());
        send(&self.commands, Command::Close { lock, reply }).await;
    }
}

/// Reads a file that is open for writing. Once that is closed or dropped, every READ fails.
pub struct Reader {
    commands: mpsc::WeakSender<Command>,
}

impl Reader {
    /// READ; an empty answer means end of file.
    pub async fn read(&self, offset: u64, len: usize, reply: Reply<Bytes>) {
        match self.commands.upgrade() {
            Some(commands) => send(&commands, Command::Read { offset, len, reply }).await,
            None => reply(Err(UploadError::CutOff)),
        }
    }
}

async fn send(commands: &mpsc::Sender<Command>, command: Command) {
    if let Err(mpsc::error::SendError(command)) = commands.send(command).await {
        command.refuse();
    }
}
