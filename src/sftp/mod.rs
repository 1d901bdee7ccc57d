//! One SFTP session: requests in, replies out, files open in between.
//!
//! Called by `server` with a channel of bytes; the only module that names `russh_sftp`. Requests are carried
//! out in the order in which they come, as OpenSSH's server does, but for two that may take long and that a client
//! has many of: READs are answered by the file's own task, and the end of an upload is awaited beside others.
//!
//! The rule that keeps every client moving: the loop here waits for the store, never for the client.

mod attributes;
mod replies;
mod requests;
mod wire;

pub use replies::Sink;

use crate::download::Download;
use crate::store::StoreError;
use crate::tree::{Listing, Tree, TreeError};
use crate::upload::{Upload, UploadError};
use crate::users::Access;
use bytes::Bytes;
use replies::Replies;
use russh_sftp::protocol::StatusCode;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use wire::Inbox;

/// Files and directories one session can have open at once; told to clients by `limits@openssh.com`.
pub const MAX_HANDLES: usize = 256;

/// Uploads of one session that can be on their way from CLOSE to its reply; the next CLOSE waits.
const MAX_CLOSING: usize = 16;

/// Where a session's bytes come from.
pub trait Source: Send + 'static {
    /// The next bytes; `None` when the client is done or gone.
    fn next(&mut self) -> impl Future<Output = Option<Bytes>> + Send;
}

/// What a session is told of its surroundings.
pub struct Settings {
    /// The user's view of the store.
    pub tree: Tree,
    /// What the user may do.
    pub access: Access,
    /// `user@address`, for the log; holds no control characters.
    pub who: Arc<str>,
    /// The owner that listings show.
    pub user: Arc<str>,
    /// The session ends after so long without a request or an answer.
    pub idle_timeout: Duration,
    /// Once cancelled: finish what is open, then end.
    pub drain: CancellationToken,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The client said so, or hung up.
    #[error("closed by the client")]
    Closed,
    /// Nothing happened for too long.
    #[error("idle for {}", humantime::format_duration(*.0))]
    Idle(Duration),
    /// The server stops.
    #[error("the server is shutting down")]
    Drained,
    /// The client sends what can't be SFTP.
    #[error("not SFTP: {0}")]
    Protocol(#[from] wire::Fatal),
    /// Requests came before the version was settled.
    #[error("not SFTP: a request before INIT")]
    NoInit,
    /// Megabytes of replies were never read.
    #[error("the client does not read its replies")]
    Ignored,
}

/// A file or directory that is open.
enum Handle {
    Directory(Listing),
    Reader(Download),
    Writer { upload: Upload, append: bool },
}

struct Session {
    settings: Settings,
    replies: Replies,
    handles: HashMap<String, Handle>,
    next_handle: u64,
    /// Places for uploads whose CLOSE is not answered yet: they still hold memory.
    closing: Arc<Semaphore>,
    /// Shown as the time of directories, which have none in S3.
    started: SystemTime,
    version_settled: bool,
}

/// Serves one session until it ends; every reply is sent, or given up with the client, before this returns.
pub async fn serve(mut source: impl Source, sink: impl Sink, settings: Settings) -> End {
    let clock = Arc::new(Clock { origin: Instant::now(), last: AtomicU64::new(0) });
    let sent = clock.clone();
    let (replies, sending) = Replies::new(sink, move || sent.touch());
    let sending = tokio::spawn(sending);
    let mut session = Session {
        settings,
        replies,
        handles: HashMap::new(),
        next_handle: 0,
        closing: Arc::new(Semaphore::new(MAX_CLOSING)),
        started: SystemTime::now(),
        version_settled: false,
    };
    let idle_timeout = session.settings.idle_timeout;
    let end = session.run(&mut source, &clock).await;
    if matches!(end, End::Closed) {
        session.finish_reads();
    }
    drop(session);
    let sending = AbortOnDropHandle::new(sending);
    if matches!(end, End::Ignored) {
        return end;
    }
    tokio::select! {
        _ = sending => end,
        () = clock.idle(idle_timeout) => End::Idle(idle_timeout),
    }
}

impl Session {
    async fn run(&mut self, source: &mut impl Source, clock: &Clock) -> End {
        let mut inbox = Inbox::default();
        let (idle_timeout, drain) = (self.settings.idle_timeout, self.settings.drain.clone());
        loop {
            if drain.is_cancelled() && self.handles.is_empty() {
                return End::Drained;
            }
            let chunk = tokio::select! {
                chunk = source.next() => chunk,
                () = clock.idle(idle_timeout) => return End::Idle(idle_timeout),
                () = drain.cancelled(), if !drain.is_cancelled() => continue,
            };
            let Some(chunk) = chunk else { return End::Closed };
            clock.touch();
            inbox.push(chunk);
            loop {
                match inbox.next() {
                    Ok(None) => break,
                    Err(fatal) => return fatal.into(),
                    Ok(Some(request)) => match self.handle(request).await {
                        Ok(()) if self.replies.are_ignored() => return End::Ignored,
                        Ok(()) => {}
                        Err(end) => return end,
                    },
                }
            }
        }
    }

    /// A client that sends all its requests at once and then the end of the stream still gets its files.
    fn finish_reads(&mut self) {
        for (_, handle) in self.handles.drain() {
            if let Handle::Reader(download) = handle {
                download.finish();
            }
        }
    }
}

/// When something last happened, for the reader and the sender.
struct Clock {
    origin: Instant,
    /// Milliseconds since `origin`.
    last: AtomicU64,
}

impl Clock {
    fn touch(&self) {
        self.last.store(self.origin.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Comes back once nothing has happened for so long.
    async fn idle(&self, timeout: Duration) {
        loop {
            let deadline = self.origin + Duration::from_millis(self.last.load(Ordering::Relaxed)) + timeout;
            if Instant::now() >= deadline {
                return;
            }
            tokio::time::sleep_until(deadline).await;
        }
    }
}

/// A failed request: what the client is told.
struct Failure(StatusCode, String);

impl From<TreeError> for Failure {
    fn from(error: TreeError) -> Failure {
        let code = match &error {
            TreeError::NotFound => StatusCode::NoSuchFile,
            TreeError::BadPath(_) => StatusCode::BadMessage,
            TreeError::Unsupported(_) => StatusCode::OpUnsupported,
            TreeError::Store(error) => status_of_store(error),
            TreeError::IsDirectory
            | TreeError::Exists
            | TreeError::NotEmpty
            | TreeError::Busy
            | TreeError::Refused(_) => StatusCode::Failure,
        };
        Failure(code, error.to_string())
    }
}

impl From<UploadError> for Failure {
    fn from(error: UploadError) -> Failure {
        let code = match &error {
            UploadError::Store(error) => status_of_store(error),
            UploadError::Truncate { .. } => StatusCode::OpUnsupported,
            _ => StatusCode::Failure,
        };
        Failure(code, error.to_string())
    }
}

fn status_of_store(error: &StoreError) -> StatusCode {
    match error {
        StoreError::NotFound => StatusCode::NoSuchFile,
        StoreError::Forbidden(_) => StatusCode::PermissionDenied,
        StoreError::Precondition | StoreError::TooLarge | StoreError::Unknown(_) | StoreError::Other(_) => {
            StatusCode::Failure
        }
    }
}
