//! The loop of a session, and the handles that are open in it.

use super::Sink;
use super::attrs::View;
use super::inbound::{Next, RequestQueue};
use super::reads::QueuedReads;
use super::recent::{ListingAge, RecentStats};
use super::replies::Replies;
use super::table::find_row;
use super::waiting::WaitingRequests;
use crate::events::{SessionEnd, Teller};
use crate::path::Path;
use crate::transfer::{
    BufferPool, Download, SessionLimits, Upload, UploadPlace, UploadPlaces, UserLimits,
};
use crate::users::Access;
use crate::vfs::{Listing, Vfs};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Limit on the open files and directories of one session, which `limits@openssh.com` reports.
pub const MAX_HANDLES: usize = 256;

/// Limit on the uploads of one session between CLOSE and its reply; the next CLOSE waits.
const MAX_CLOSING: usize = 16;

/// While the server drains, a session with nothing open ends after this time without a request:
/// clients set times and rename after their last CLOSE.
const QUIET_TIME: Duration = Duration::from_millis(1500);
/// The same for one whose client sends more requests.
const MAX_LAST_REQUESTS_TIME: Duration = Duration::from_secs(10);

/// What comes from the client.
#[derive(Debug)]
pub enum Received {
    /// Bytes of the stream, cut anywhere.
    Data(Bytes),
    /// The client sends nothing more, and still reads.
    Eof,
    /// The channel is closed or the connection gone: replies are no longer read.
    Closed,
}

/// Where a session's bytes come from.
pub trait Source: Send + 'static {
    /// Waits for what comes next. Not called again after [`Received::Closed`].
    fn next(&mut self) -> impl Future<Output = Received> + Send;
}

/// What a session gets from the server.
pub struct SessionParams {
    /// The server's memory.
    pub pool: BufferPool,
    /// Limits on all sessions of the user together.
    pub limits: Arc<UserLimits>,
    /// Places for files that are open for writing, for the whole server.
    pub uploads: Arc<UploadPlaces>,
    /// The user's view of the store.
    pub vfs: Vfs,
    /// What the user may do.
    pub access: Access,
    /// Tells what happens in the session.
    pub events: Teller,
    /// The owner that listings show.
    pub user: Arc<str>,
    /// The session ends after this time without a request or a reply.
    pub idle_timeout: Duration,
    /// Once cancelled: finish what is open, then end.
    pub drain: CancellationToken,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The client closed the channel or the connection.
    #[error("closed by the client")]
    Closed,
    /// No request and no reply for too long.
    #[error("idle for {}", humantime::format_duration(*.0))]
    Idle(Duration),
    /// The server stops.
    #[error("the server is shutting down")]
    Drained,
    /// The client sends what can't be SFTP.
    #[error("not SFTP: {0}")]
    Protocol(#[from] super::codec::Fatal),
    /// Requests arrived before INIT.
    #[error("not SFTP: a request before INIT")]
    NoInit,
    /// The client did not read megabytes of replies.
    #[error("the client does not read its replies")]
    Ignored,
}

impl End {
    /// The reason without its words.
    pub fn reason(&self) -> SessionEnd {
        match self {
            End::Closed => SessionEnd::Closed,
            End::Idle(_) => SessionEnd::Idle,
            End::Drained => SessionEnd::Shutdown,
            End::Protocol(_) | End::NoInit => SessionEnd::Protocol,
            End::Ignored => SessionEnd::Ignored,
        }
    }
}

/// A file or directory that is open, and its place among those of the user.
pub(super) struct OpenHandle {
    pub handle: Handle,
    pub _place: OwnedSemaphorePermit,
}

/// What is open.
pub(super) enum Handle {
    Directory {
        listing: Listing,
        path: Path,
        age: ListingAge,
        /// Entries that the client has got; `None` once the event is told.
        entries: Option<u64>,
    },
    Reader(Download),
    Writer {
        upload: Upload,
        path: Path,
        append: bool,
        /// Lasts until the CLOSE is answered.
        place: UploadPlace,
        /// Whether a request has waited for its CLOSE in vain, and nothing was written since.
        is_kept_open: bool,
        /// READs that found no room at once; `None` until there is one.
        queued_reads: Option<QueuedReads>,
    },
}

pub(super) struct Session {
    pub view: View,
    pub settings: SessionParams,
    pub replies: Replies,
    pub handles: BTreeMap<String, OpenHandle>,
    pub next_handle: u64,
    /// Limits on the files of this session together.
    pub limits: SessionLimits,
    pub recent: RecentStats,
    pub waiting: WaitingRequests,
    /// Places for uploads whose CLOSE is not answered yet: they still hold memory.
    pub closing: Arc<Semaphore>,
    pub initialized: bool,
}

/// Serves one session until it ends. Every reply is sent, or dropped with the client, before this
/// returns.
pub async fn serve(source: impl Source, sink: impl Sink, settings: SessionParams) -> End {
    let last = Clock::new(watch::Sender::new(Instant::now()));
    let (replies, sending) = Replies::new(sink, last.clone());
    let sending = AbortOnDropHandle::new(tokio::spawn(sending));
    let requests = Arc::new(RequestQueue::new(settings.pool.clone()));
    let queue = requests.clone();
    let _receiving = AbortOnDropHandle::new(tokio::spawn(async move { queue.fill(source).await }));
    let idle_timeout = settings.idle_timeout;
    let session = Session {
        view: View {
            user: settings.user.clone(),
            access: settings.access,
        },
        recent: RecentStats::default(),
        waiting: WaitingRequests::default(),
        limits: SessionLimits::new(settings.pool.clone(), &settings.limits),
        settings,
        replies,
        handles: BTreeMap::new(),
        next_handle: 0,
        closing: Arc::new(Semaphore::new(MAX_CLOSING)),
        initialized: false,
    };
    let end = session.run(&requests, &last).await;
    if matches!(end, End::Ignored) {
        return end;
    }
    tokio::select! {
        biased;
        _ = sending => end,
        // The replies that are left are not read. Uploads that are being closed go on all the same.
        () = requests.closed() => end,
        () = wait_until_idle(&last, idle_timeout) => End::Idle(idle_timeout),
    }
}

impl Session {
    /// Carries out requests until the session ends, and refuses those that still wait then.
    async fn run(mut self, requests: &RequestQueue, last: &Clock) -> End {
        let served = self.serve_requests(requests, last).await;
        let handles = std::mem::take(&mut self.handles);
        let end = match served {
            // A client that sends all its requests at once and then the end of the stream still
            // gets its files.
            Ok(()) => {
                for (_, open) in handles {
                    if let Handle::Reader(download) = open.handle {
                        download.finish();
                    }
                }
                End::Closed
            }
            Err(end) => {
                drop(handles);
                end
            }
        };
        self.refuse_waiting();
        end
    }

    /// Returns at the end of the client's stream, or with another reason to end the session.
    async fn serve_requests(&mut self, requests: &RequestQueue, last: &Clock) -> Result<(), End> {
        let idle_timeout = self.settings.idle_timeout;
        let drain = self.settings.drain.clone();
        let mut last_requests_end = None;
        loop {
            let is_through =
                drain.is_cancelled() && self.handles.is_empty() && self.waiting.is_empty();
            if is_through && !self.replies.are_owed() {
                let now = Instant::now();
                if *last_requests_end.get_or_insert(now + MAX_LAST_REQUESTS_TIME) <= now {
                    return Err(End::Drained);
                }
            }
            let next = tokio::select! {
                biased;
                () = self.waiting.wake(&self.settings.vfs) => {
                    self.carry_out_due().await?;
                    continue;
                }
                next = requests.next() => next,
                () = wait_until_idle(last, idle_timeout) => return Err(End::Idle(idle_timeout)),
                () = drain.cancelled(), if !drain.is_cancelled() => continue,
                () = wait_until_quiet(&self.replies, last), if is_through => return Err(End::Drained),
            };
            let incoming = match next {
                Next::Request(incoming) => incoming,
                Next::Eof => return Ok(()),
                Next::Closed => return Err(End::Closed),
                Next::Fatal(fatal) => return Err(End::Protocol(fatal)),
            };
            if find_row(&incoming.request).has_effect {
                self.handle(incoming).await?;
            } else {
                tokio::select! {
                    biased;
                    handled = self.handle(incoming) => handled?,
                    () = requests.abandoned() => return Err(End::Closed),
                }
            }
            // Only now: a packet that trickles in is no sign of life, and the store's time is not
            // the client's.
            last.send_replace(Instant::now());
        }
    }
}

/// Resolves once every request is answered, and nothing has happened for [`QUIET_TIME`].
async fn wait_until_quiet(replies: &Replies, last: &Clock) {
    wait_until_idle(last, QUIET_TIME).await;
    while replies.are_owed() {
        sleep(QUIET_TIME).await;
        wait_until_idle(last, QUIET_TIME).await;
    }
}

/// When the client last sent a request or took a reply.
pub(super) type Clock = Arc<watch::Sender<Instant>>;

/// Resolves once nothing has happened for this long.
async fn wait_until_idle(last: &Clock, timeout: Duration) {
    while last.borrow().elapsed() < timeout {
        let deadline = *last.borrow() + timeout;
        sleep_until(deadline).await;
    }
}
