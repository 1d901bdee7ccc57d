//! The SSH server: accepts, limits, and ends connections.
//!
//! Called by `cli` and by applications that embed it; this room is the only one that names `russh`.
//! A slow or hostile client affects only its own connection: each has a task, a deadline to log in,
//! and a token that closes it.

mod accept;
mod admission;
mod builder;
mod connection;
mod host_keys;
mod mounts;
mod penalties;
mod ssh;
mod transport;
mod tries;
mod window;

pub use builder::{BuildError, ServerBuilder};
pub use host_keys::{HostKey, InvalidHostKey, generate, load, load_or_create, temporary};
pub use ipnet::IpNet;
pub use ssh::{Algorithms, UnknownAlgorithms};

use crate::events::{Event, Plural, Teller};
use crate::metrics::{BUFFER_MEMORY, BUFFER_MEMORY_LIMIT, MAX_SESSIONS};
use crate::store::Store;
use crate::transfer::{UploadPlaces, UserLimits};
use crate::users::Auth;
use admission::Admission;
use builder::Settings;
use metrics::gauge;
use mounts::Mounts;
use penalties::Penalties;
use std::collections::HashMap;
use std::fmt::{self, Debug, Formatter};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, Once, PoisonError, Weak};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{OnceCell, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use window::WindowBudget;

/// For transfers to end once every session has ended, besides the `open_timeout` that the store has
/// for aborting a multipart upload: 10 s for parts under way, 5 s for renames, and some to spare.
const LAST_REQUESTS_TIME: Duration = Duration::from_secs(15);
/// How often gauges that are not updated on change are refreshed, and unused stores dropped.
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(1);

/// What all connections share.
struct Shared {
    settings: Arc<Settings>,
    auth: Arc<dyn Auth>,
    admission: Arc<Admission>,
    penalties: Arc<Penalties>,
    mounts: Mounts,
    /// A permit for each connection.
    places: Arc<Semaphore>,
    /// For files that are open for writing.
    uploads: Arc<UploadPlaces>,
    /// How much SSH windows may grow.
    windows: WindowBudget,
    /// Limits of the users that have a connection, by name.
    users: Mutex<HashMap<String, Weak<UserLimits>>>,
    /// Tells what the server does by itself.
    events: Teller,
    /// The tasks of connections.
    connections: TaskTracker,
    /// Cancelled to accept no more connections, and let open transfers finish until the drain
    /// timeout.
    drain: CancellationToken,
    /// Cancelled to end every session now. Uploads are still aborted.
    stop: CancellationToken,
}

impl Shared {
    fn new(store: Arc<dyn Store>, auth: Arc<dyn Auth>, settings: Settings) -> Shared {
        let settings = Arc::new(settings);
        let events = Teller::new(settings.listeners.clone());
        let mounts = Mounts::new(store, settings.clone(), events.clone());
        Shared {
            auth,
            admission: Arc::new(Admission::new(settings.max_sessions)),
            penalties: Arc::default(),
            places: Arc::new(Semaphore::new(settings.max_sessions)),
            uploads: Arc::new(UploadPlaces::new(settings.max_uploads)),
            windows: WindowBudget::new(mounts.pool.size()),
            users: Mutex::default(),
            events,
            connections: TaskTracker::new(),
            drain: CancellationToken::new(),
            stop: CancellationToken::new(),
            mounts,
            settings,
        }
    }

    /// The limits that all sessions of this user share.
    fn user_limits(&self, name: &str) -> Arc<UserLimits> {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(limits) = users.get(name).and_then(Weak::upgrade) {
            return limits;
        }
        users.retain(|_, limits| limits.strong_count() > 0);
        let limits = Arc::new(UserLimits::new(
            self.settings.max_sessions,
            &self.mounts.pool,
        ));
        users.insert(name.to_owned(), Arc::downgrade(&limits));
        limits
    }

    /// Ends every session and all other work now. Uploads are still aborted.
    fn stop_all(&self) {
        self.drain.cancel();
        self.stop.cancel();
        self.mounts.stop.cancel();
    }
}

/// An SFTP server.
///
/// Its clones are the same server. Keep one while it serves: dropping the last one ends every
/// session, and aborts the uploads. Several servers in one process share nothing, except that the
/// facades `log` and `metrics` are global: their counters add up, and the gauges that show limits
/// and memory are those of the server that has set them last.
///
/// ```no_run
/// use sftpd::server::Server;
/// use sftpd::store::memory::MemoryStore;
/// use sftpd::users::{Account, UserList};
/// use std::sync::Arc;
///
/// # async fn serve() -> anyhow::Result<()> {
/// let users = UserList::default().with_password(Account::new("guest"), "guest")?;
/// let server = Server::builder(Arc::new(MemoryStore::default()), users).build()?;
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:2222").await?;
/// server.serve(listener, std::future::pending()).await;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Server(Arc<Handle>);

/// Shows its host keys, and whether it is shutting down.
impl Debug for Server {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("host_keys", &self.host_keys())
            .field("connections", &self.0.shared.connections.len())
            .field("is_draining", &self.0.shared.drain.is_cancelled())
            .finish_non_exhaustive()
    }
}

/// What the clones of a [`Server`] share. Connections do not, so that it is dropped with the last
/// clone, and ends them then.
struct Handle {
    shared: Arc<Shared>,
    /// Starts the tasks beside the connections.
    started: Once,
    /// Set once the server has shut down.
    ended: OnceCell<()>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.stop_all();
    }
}

impl Server {
    /// Sets up a server with this store, for the users that log in by `auth`.
    pub fn builder(store: Arc<dyn Store>, auth: impl Auth) -> ServerBuilder {
        ServerBuilder::new(store, Arc::new(auth))
    }

    fn new(store: Arc<dyn Store>, auth: Arc<dyn Auth>, settings: Settings) -> Server {
        Server(Arc::new(Handle {
            shared: Arc::new(Shared::new(store, auth, settings)),
            started: Once::new(),
            ended: OnceCell::new(),
        }))
    }

    /// The keys by which clients know the server. `Display` shows type and fingerprint.
    pub fn host_keys(&self) -> &[HostKey] {
        &self.0.shared.settings.host_keys
    }

    /// Accepts connections until `shutdown` resolves, then does what [`shut_down`](Self::shut_down)
    /// does: it shuts down the whole server, not only this listener. Must be called in a tokio
    /// runtime with I/O and time.
    ///
    /// Returns as `shut_down` does, at once if the server has ended before. Dropped before, it
    /// accepts no more connections, and those that it has accepted go on.
    pub async fn serve(&self, listener: TcpListener, shutdown: impl Future<Output = ()>) {
        self.start(listener.local_addr().ok());
        tokio::select! {
            () = accept::accept_all(listener, &self.0.shared) => {}
            () = shutdown => {}
        }
        self.shut_down().await;
    }

    /// Serves a connection that was accepted elsewhere, such as one of a Unix socket or inside TLS.
    /// All limits hold for it, and if `peer` is a load balancer of the server's, it begins with a
    /// PROXY header.
    ///
    /// Limits and penalties count by `peer`. For a stream without an address, such as one of a Unix
    /// socket, an invented one does, but clients with the same one share what one address may have:
    /// 20 wrong passwords, and before the login a quarter of `max_sessions`.
    ///
    /// Returns when the connection has ended, at once if the server is shutting down. Dropped
    /// before, it ends the connection.
    pub async fn serve_stream(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: SocketAddr,
    ) {
        self.start(None);
        let shared = &self.0.shared;
        let closed = CancellationToken::new();
        let _guard = closed.clone().drop_guard();
        let serving = accept::admit(Box::new(stream), peer, shared.clone(), closed);
        // A task of its own, so that uploads are aborted when this future is dropped.
        let serving = shared.connections.spawn(serving);
        if let Err(error) = serving.await {
            log::error!("{peer}: the connection ended with a panic: {error}");
        }
    }

    /// Accepts no more connections, lets open transfers finish for the drain timeout, and ends all
    /// sessions. It can't be undone.
    ///
    /// Returns once every session has ended and every unfinished upload is aborted. A store that
    /// does not answer is waited for until 15 seconds and the `open_timeout` after the end of the
    /// sessions: then the log says how many transfers are left.
    pub async fn shut_down(&self) {
        let shared = &self.0.shared;
        self.0.ended.get_or_init(|| shut_down(shared)).await;
    }

    /// Ends every session now: cuts the drain timeout short if the server is shutting down, and
    /// shuts it down otherwise. It does not wait: [`serve`](Self::serve) returns once every
    /// unfinished upload is aborted, and so does [`shut_down`](Self::shut_down), which a server
    /// that is only given streams has to call.
    pub fn stop(&self) {
        self.0.shared.stop_all();
    }

    /// Tells of a listener, or of the first stream, and starts the tasks beside the connections,
    /// unless they were started. A server that is shutting down starts nothing any more.
    fn start(&self, address: Option<SocketAddr>) {
        let shared = &self.0.shared;
        if shared.drain.is_cancelled() {
            return;
        }
        let mut is_first = false;
        self.0.started.call_once(|| is_first = true);
        if is_first || address.is_some() {
            shared.events.tell(Event::ServerStarted { address });
        }
        if is_first {
            shared.mounts.start_reaper();
            let housekeeping = keep_house(shared.clone());
            let stop = shared.mounts.stop.clone();
            tokio::spawn(stop.run_until_cancelled_owned(housekeeping));
        }
    }
}

/// See [`Server::shut_down`].
async fn shut_down(shared: &Shared) {
    shared.drain.cancel();
    shared.connections.close();
    drain_connections(shared).await;
    shared.stop_all();
    let tasks = &shared.mounts.tasks;
    tasks.close();
    let ended = async {
        shared.connections.wait().await;
        tasks.wait().await;
    };
    let limit = LAST_REQUESTS_TIME + shared.settings.timeouts.open;
    if timeout(limit, ended).await.is_err() {
        log::error!(
            "{} connections and {} transfers did not end within {limit:?}: multipart uploads may be left in the bucket",
            shared.connections.len(),
            tasks.len()
        );
    }
    shared.events.tell(Event::ServerStopped);
}

/// Lets open transfers finish for the drain timeout.
async fn drain_connections(shared: &Shared) {
    let drain_timeout = shared.settings.drain_timeout;
    let connections = &shared.connections;
    let sessions = Plural(connections.len() as u64, "session", "sessions");
    log::info!("shutting down: {sessions} may finish within {drain_timeout:?}");
    tokio::select! {
        () = connections.wait() => {}
        () = shared.stop.cancelled() => {}
        () = sleep(drain_timeout) => {}
    }
    if !connections.is_empty() {
        let count = connections.len() as u64;
        log::warn!("{} cut off", Plural(count, "session is", "sessions are"));
    }
}

/// The address that limits count a client by. For IPv6 the network, as its owner has 2^64
/// addresses.
fn source_of(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (!0 << 64)).into(),
        IpAddr::V4(address) => address.into(),
    }
}

/// Sets the gauges that are not updated on change, and drops the stores that are no longer used.
async fn keep_house(shared: Arc<Shared>) {
    gauge!(MAX_SESSIONS).set(shared.settings.max_sessions as f64);
    gauge!(BUFFER_MEMORY_LIMIT).set(shared.settings.buffer_memory as f64);
    loop {
        gauge!(BUFFER_MEMORY).set(shared.mounts.pool.used() as f64);
        shared.mounts.drop_unused();
        sleep(HOUSEKEEPING_INTERVAL).await;
    }
}
