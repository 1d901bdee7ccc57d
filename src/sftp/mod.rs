//! One SFTP session: requests in, replies out, files open in between.
//!
//! Called by `server` with a channel of bytes; the only module that names `russh_sftp`. Requests are carried
//! out in the order in which they come, as OpenSSH's server does, but for two that may take long and that a client
//! has many of: READs are answered by the file's own task, and the end of an upload is awaited beside others.
//!
//! The rule that keeps every client moving: the loop here waits for the store, never for the client. Beside it, one task
//! drains the channel and one sends the replies.

mod attributes;
mod early_renames;
mod inbound;
mod reads;
mod recent;
mod replies;
mod request_log;
mod requests;
mod wire;

pub use replies::Sink;

use crate::budget::Budget;
use crate::limits::{SessionLimits, UserLimits};
use crate::tree::{Listing, Path, Tree, TreeError};
use crate::upload::{Upload, UploadError};
use crate::{download::Download, store::StoreError, users::Access};
use attributes::View;
use bytes::Bytes;
use early_renames::EarlyRenames;
use inbound::{Next, RequestQueue, has_effect};
use recent::{ListingAge, RecentStats};
use replies::Replies;
use russh_sftp::protocol::{Packet, StatusCode};
use std::time::Duration;
use std::{collections::HashMap, convert::Infallible, sync::Arc};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// Files and directories one session can have open at once; told to clients by `limits@openssh.com`.
pub const MAX_HANDLES: usize = 256;

/// Uploads of one session that can be on their way from CLOSE to its reply; the next CLOSE waits.
const MAX_CLOSING: usize = 16;

/// What comes from the client.
#[derive(Debug)]
pub enum Received {
    /// Bytes of the stream, cut anywhere.
    Data(Bytes),
    /// The client sends nothing more, and still reads.
    Eof,
    /// The channel is closed or the connection gone: nobody reads any more.
    Closed,
}

/// Where a session's bytes come from.
pub trait Source: Send + 'static {
    /// Waits for what comes next. Not called again after [`Received::Closed`].
    fn next(&mut self) -> impl Future<Output = Received> + Send;
}

/// What a session is told of its surroundings.
pub struct Settings {
    /// The server's memory.
    pub budget: Budget,
    /// What all sessions of the user may have together.
    pub limits: Arc<UserLimits>,
    /// Places for files that are open for writing, for the whole server.
    pub uploads: Arc<Semaphore>,
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

/// A file or directory that is open, and its place among those of the user.
struct OpenHandle {
    handle: Handle,
    _place: OwnedSemaphorePermit,
}

/// What is open.
enum Handle {
    Directory {
        listing: Listing,
        path: Path,
        age: ListingAge,
    },
    Reader(Download),
    Writer {
        upload: Upload,
        path: Path,
        append: bool,
        place: UploadPlace,
        /// READs that found no room at once; `None` before there was one.
        queued_reads: Option<reads::QueuedReads>,
    },
}

/// A place for a file that is open for writing; it lasts until its CLOSE is answered.
struct UploadPlace {
    _server: OwnedSemaphorePermit,
    _user: OwnedSemaphorePermit,
}

struct Session {
    view: View,
    settings: Settings,
    replies: Replies,
    handles: HashMap<String, OpenHandle>,
    next_handle: u64,
    /// What the files of this session may have together.
    limits: SessionLimits,
    recent: RecentStats,
    early_renames: EarlyRenames,
    /// Places for uploads whose CLOSE is not answered yet: they still hold memory.
    closing: Arc<Semaphore>,
    version_settled: bool,
}

/// Serves one session until it ends; every reply is sent, or given up with the client, before this returns.
pub async fn serve(source: impl Source, sink: impl Sink, settings: Settings) -> End {
    let last = Clock::new(watch::Sender::new(Instant::now()));
    let (replies, sending) = Replies::new(sink, last.clone());
    let sending = AbortOnDropHandle::new(tokio::spawn(sending));
    let requests = Arc::new(RequestQueue::new(settings.budget.clone()));
    let queue = requests.clone();
    let _receiving = AbortOnDropHandle::new(tokio::spawn(async move { queue.fill(source).await }));
    let idle_timeout = settings.idle_timeout;
    let session = Session {
        view: View {
            user: settings.user.clone(),
            access: settings.access,
        },
        recent: RecentStats::default(),
        early_renames: EarlyRenames::default(),
        limits: SessionLimits::new(settings.budget.clone(), &settings.limits),
        settings,
        replies,
        handles: HashMap::new(),
        next_handle: 0,
        closing: Arc::new(Semaphore::new(MAX_CLOSING)),
        version_settled: false,
    };
    let Err(end) = session.run(&requests, &last).await;
    if matches!(end, End::Ignored) {
        return end;
    }
    tokio::select! {
        biased;
        _ = sending => end,
        // Nobody reads the replies that are left. Uploads that are being closed are, all the same.
        () = requests.closed() => end,
        () = idle(&last, idle_timeout) => End::Idle(idle_timeout),
    }
}

impl Session {
    async fn run(mut self, requests: &RequestQueue, last: &Clock) -> Result<Infallible, End> {
        let (idle_timeout, drain) = (self.settings.idle_timeout, self.settings.drain.clone());
        loop {
            if drain.is_cancelled() && self.handles.is_empty() {
                return Err(End::Drained);
            }
            let next = tokio::select! {
                biased;
                next = requests.next() => next,
                () = idle(last, idle_timeout) => return Err(End::Idle(idle_timeout)),
                () = drain.cancelled(), if !drain.is_cancelled() => continue,
                () = self.early_renames.first_deadline() => {
                    self.finish_early_renames().await;
                    continue;
                }
            };
            let incoming = match next {
                Next::Request(incoming) => incoming,
                Next::Eof => break,
                Next::Closed => return Err(End::Closed),
                Next::Fatal(fatal) => return Err(End::Protocol(fatal)),
            };
            if has_effect(&incoming.request) {
                self.handle(incoming).await?;
            } else {
                tokio::select! {
                    biased;
                    handled = self.handle(incoming) => handled?,
                    () = requests.abandoned() => return Err(End::Closed),
                }
            }
            // Only now: a packet that trickles in is no sign of life, and the store's time is not the client's.
            last.send_replace(Instant::now());
        }
        // A client that sends all its requests at once and then the end of the stream still gets its files.
        for (_, open) in std::mem::take(&mut self.handles) {
            if let Handle::Reader(download) = open.handle {
                download.finish();
            }
        }
        self.finish_early_renames().await;
        Err(End::Closed)
    }
}

/// When something last happened, for the reader and the sender.
type Clock = Arc<watch::Sender<Instant>>;

/// Comes back once nothing has happened for so long.
async fn idle(last: &Clock, timeout: Duration) {
    while last.borrow().elapsed() < timeout {
        let deadline = *last.borrow() + timeout;
        sleep_until(deadline).await;
    }
}

/// What the session answers to a request; `None` where another task does.
type Answer = Result<Option<Packet>, Failure>;

/// A failed request.
struct Failure {
    code: StatusCode,
    /// What the client is told behind the words of the code; may be empty.
    reason: String,
}

impl Failure {
    fn new(code: StatusCode, reason: impl Into<String>) -> Failure {
        Failure {
            code,
            reason: reason.into(),
        }
    }

    /// A failure whose code says it all.
    fn bare(code: StatusCode) -> Failure {
        Failure::new(code, "")
    }

    /// What the client reads: first the words of OpenSSH's `sftp-server.c`, which programs look for, then the reason.
    fn text(&self) -> String {
        let words = status_words(self.code);
        match self.reason.as_str() {
            "" => words.to_owned(),
            reason => format!("{words}: {reason}"),
        }
    }
}

/// The words of a status, as OpenSSH's server has them.
fn status_words(code: StatusCode) -> &'static str {
    match code {
        StatusCode::Ok => "Success",
        StatusCode::Eof => "End of file",
        StatusCode::NoSuchFile => "No such file",
        StatusCode::PermissionDenied => "Permission denied",
        StatusCode::Failure => "Failure",
        StatusCode::BadMessage => "Bad message",
        StatusCode::NoConnection => "No connection",
        StatusCode::ConnectionLost => "Connection lost",
        StatusCode::OpUnsupported => "Operation unsupported",
    }
}

impl From<TreeError> for Failure {
    fn from(error: TreeError) -> Failure {
        match &error {
            TreeError::NotFound => Failure::bare(StatusCode::NoSuchFile),
            TreeError::BadPath(why) => Failure::new(StatusCode::BadMessage, *why),
            TreeError::NameTooLong | TreeError::Refused(_) => {
                Failure::new(StatusCode::Failure, error.to_string())
            }
            TreeError::Unsupported(why) => Failure::new(StatusCode::OpUnsupported, *why),
            TreeError::Store(StoreError::NotFound) => Failure::bare(StatusCode::NoSuchFile),
            TreeError::Store(error) => Failure::new(status_of_store(error), error.to_string()),
        }
    }
}

impl From<UploadError> for Failure {
    fn from(error: UploadError) -> Failure {
        let code = match &error {
            UploadError::Store(error) => status_of_store(error),
            UploadError::Unsupported(_) => StatusCode::OpUnsupported,
            UploadError::Refused(_) => StatusCode::Failure,
        };
        Failure::new(code, error.to_string())
    }
}

/// The code for a store's failure in the middle of something: that a key is missing is not what the client asked.
fn status_of_store(error: &StoreError) -> StatusCode {
    match error {
        StoreError::Forbidden(_) => StatusCode::PermissionDenied,
        StoreError::NotFound
        | StoreError::NoSuchBucket
        | StoreError::Precondition
        | StoreError::TooLarge
        | StoreError::Unknown(_)
        | StoreError::Other(_) => StatusCode::Failure,
    }
}
