//! The SSH server: accepts, limits, and ends connections.
//!
//! Called by `cli` and by applications that embed it; this room is the only one that names `russh`.
//! A slow or hostile client affects only its own connection: each has a task, a deadline to log in,
//! and a token that closes it.

mod admission;
mod connection;
mod host_keys;
mod penalties;
mod ssh;
mod transport;
mod window;

pub use host_keys::{HostKey, generate, load, load_or_create, temporary};
pub use ssh::{Algorithms, UnknownAlgorithms};

use crate::events::{ConnectionRefusal, Event, Events, Metrics, Teller, TextLog};
use crate::metrics::{BUFFER_MEMORY, BUFFER_MEMORY_LIMIT, MAX_SESSIONS};
use crate::path::{Home, Key, Path, PathError};
use crate::store::{Store, Timeouts};
use crate::transfer::{BufferPool, PartSizes, Transfers, UserLimits};
use crate::users::Auth;
use crate::vfs::Overlay;
use admission::Admission;
use ipnet::IpNet;
use metrics::gauge;
use penalties::Penalties;
use rustix::io::Errno;
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use transport::read_proxy_header;
use window::WindowBudget;

/// Pause after `accept` fails, for example when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Shortest time between two log lines about failed accepts: without descriptors five a second
/// fail.
const FAILED_ACCEPTS_INTERVAL: Duration = Duration::from_secs(60);
/// For multipart uploads to be aborted, once every session has ended.
const ABORT_TIME: Duration = Duration::from_secs(20);
/// A line before the version string is for people to read
/// ([RFC 4253 §4.2](https://www.rfc-editor.org/rfc/rfc4253#section-4.2)).
const GOODBYE: &[u8] = b"This server takes no connection from you now: try again later.\r\n";
/// For the PROXY header to arrive. A load balancer sends it at once.
const PROXY_TIME: Duration = Duration::from_secs(5);
/// How often gauges that are not updated on change are refreshed.
const GAUGE_INTERVAL: Duration = Duration::from_secs(1);
/// How often incomplete uploads are looked for, the first time at the start.
const REAPER_INTERVAL: Duration = Duration::from_secs(3600);

/// Everything that a server needs. The defaults are those of `sftpd serve`.
pub struct Config {
    /// Where files are kept.
    pub store: Arc<dyn Store>,
    /// Prefix of every key: a folder of the bucket, or empty.
    pub prefix: String,
    /// Who may log in.
    pub auth: Arc<dyn Auth>,
    /// At least one; see [`load_or_create`].
    pub host_keys: Vec<HostKey>,
    /// Size in bytes of the pool for the part and read-ahead buffers of all sessions.
    pub buffer_memory: u64,
    /// Sizes of the parts of uploads.
    pub part_sizes: PartSizes,
    /// Limit on connections.
    pub max_sessions: usize,
    /// Limit on files that are open for writing; one user may have three quarters of it.
    pub max_uploads: usize,
    /// From the connection to the login.
    pub login_timeout: Duration,
    /// A session ends after this time without a request or an answer.
    pub idle_timeout: Duration,
    /// For transfers to finish once the server drains.
    pub drain_timeout: Duration,
    /// Incomplete uploads of earlier servers are aborted when nothing was added to them for this
    /// time.
    pub abandoned_after: Duration,
    /// Which algorithms clients are offered.
    pub algorithms: Algorithms,
    /// Directories that clients make are stored as empty objects (`dir/`), not only remembered by
    /// this process.
    pub dir_markers: bool,
    /// Load balancers, whose connections begin with a header of the PROXY protocol.
    pub proxies: Vec<IpNet>,
    /// Who is told what happens: at first the log and the metrics.
    pub events: Vec<Arc<dyn Events>>,
}

impl Config {
    /// A configuration with the default of everything that has one.
    pub fn new(store: Arc<dyn Store>, auth: Arc<dyn Auth>, host_keys: Vec<HostKey>) -> Config {
        Config {
            store,
            prefix: String::new(),
            auth,
            host_keys,
            buffer_memory: 256 * 1024 * 1024,
            part_sizes: PartSizes::default(),
            max_sessions: 1000,
            max_uploads: 256,
            login_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(30 * 60),
            drain_timeout: Duration::from_secs(60),
            abandoned_after: Duration::from_secs(24 * 60 * 60),
            algorithms: Algorithms::Modern,
            dir_markers: false,
            proxies: Vec::new(),
            events: vec![Arc::new(TextLog), Arc::new(Metrics)],
        }
    }
}

/// Tells a server to stop.
#[derive(Clone, Default)]
pub struct Shutdown {
    /// Accept no more connections, and let open transfers finish until the drain timeout.
    pub drain: CancellationToken,
    /// End every session now. Uploads are still aborted.
    pub stop: CancellationToken,
}

/// What all connections share.
struct Shared {
    config: Config,
    admission: Arc<Admission>,
    penalties: Arc<Penalties>,
    transfers: Arc<Transfers>,
    overlay: Arc<Overlay>,
    /// A permit for each file that is open for writing.
    uploads: Arc<Semaphore>,
    /// How much SSH windows may grow.
    windows: WindowBudget,
    /// Limits of the users that have a session, by name.
    users: Mutex<HashMap<String, Weak<UserLimits>>>,
    shutdown: Shutdown,
    /// Tells what the server does by itself.
    events: Teller,
}

impl Shared {
    fn new(config: Config, shutdown: Shutdown) -> Shared {
        let events = Teller::new(config.events.clone());
        let pool = BufferPool::new(config.buffer_memory);
        let windows = WindowBudget::new(pool.size());
        let transfers = Transfers {
            events: events.clone(),
            ..Transfers::new(
                config.store.clone(),
                Timeouts::default(),
                pool,
                config.part_sizes,
            )
        };
        let max_uploads = config.max_uploads.min(Semaphore::MAX_PERMITS);
        Shared {
            admission: Arc::new(Admission::new(config.max_sessions)),
            penalties: Arc::default(),
            transfers: Arc::new(transfers),
            overlay: Arc::default(),
            uploads: Arc::new(Semaphore::new(max_uploads)),
            windows,
            users: Mutex::default(),
            shutdown,
            events,
            config,
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
            self.config.max_uploads,
            &self.transfers.pool,
        ));
        users.insert(name.to_owned(), Arc::downgrade(&limits));
        limits
    }
}

/// Serves until told to stop. Returns once every session has ended and every unfinished upload is
/// aborted.
pub async fn run(listener: TcpListener, config: Config, shutdown: Shutdown) {
    let shared = Arc::new(Shared::new(config, shutdown));
    let connections = TaskTracker::new();
    let Shutdown { drain, stop } = &shared.shutdown;
    shared.events.tell(Event::ServerStarted {
        address: listener.local_addr().ok(),
    });
    let _reaper = AbortOnDropHandle::new(tokio::spawn(run_reaper(shared.clone())));
    let _gauges = AbortOnDropHandle::new(tokio::spawn(refresh_gauges(shared.clone())));
    tokio::select! {
        () = accept_all(listener, &shared, &connections) => {}
        () = stop.cancelled() => {}
    }
    // An application may cancel only `stop`.
    drain.cancel();
    connections.close();
    drain_connections(&shared, &connections).await;
    stop.cancel();
    shared.transfers.stop.cancel();
    let tasks = &shared.transfers.tasks;
    tasks.close();
    let ended = async {
        connections.wait().await;
        tasks.wait().await;
    };
    if timeout(ABORT_TIME, ended).await.is_err() {
        log::error!(
            "{} transfers did not end: multipart uploads may be left in the bucket",
            tasks.len()
        );
    }
    shared.events.tell(Event::ServerStopped);
}

/// Lets open transfers finish for the drain timeout.
async fn drain_connections(shared: &Shared, connections: &TaskTracker) {
    let drain_timeout = shared.config.drain_timeout;
    log::info!(
        "shutting down: {} sessions may finish within {drain_timeout:?}",
        connections.len()
    );
    tokio::select! {
        () = connections.wait() => {}
        () = shared.shutdown.stop.cancelled() => {}
        () = sleep(drain_timeout) => {}
    }
    if !connections.is_empty() {
        log::warn!("{} sessions are cut off", connections.len());
    }
}

/// Accepts connections until the server drains.
async fn accept_all(listener: TcpListener, shared: &Arc<Shared>, connections: &TaskTracker) {
    let mut failed = FailedAccepts::default();
    loop {
        let accepted = tokio::select! {
            biased;
            () = shared.shutdown.drain.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok((stream, peer)) => (stream, show_ipv4(peer)),
            Err(error) => {
                failed.note(&error, &shared.events);
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if connections.len() >= shared.config.max_sessions {
            let events = shared.events.connection(peer);
            refuse(&stream, &events, ConnectionRefusal::Full);
        } else {
            connections.spawn(admit(stream, peer, shared.clone()));
        }
    }
}

/// Failed accepts, and which of them the log knows of. The connection stays in the kernel's queue
/// for the next try.
#[derive(Default)]
struct FailedAccepts {
    /// When the last line about them was written.
    logged: Option<Instant>,
    /// How many failed since then.
    unlogged: u64,
}

impl FailedAccepts {
    /// Tells of a failed accept. Logs it unless the last line is less than a minute old.
    fn note(&mut self, error: &io::Error, events: &Teller) {
        let advice = match Errno::from_io_error(error) {
            Some(Errno::MFILE | Errno::NFILE) => {
                events.tell(Event::ConnectionRefused {
                    reason: ConnectionRefusal::Descriptors,
                    error: None,
                });
                "; raise the limit on file descriptors (LimitNOFILE=) or lower --max-sessions"
            }
            _ => "",
        };
        if self
            .logged
            .is_some_and(|logged| logged.elapsed() < FAILED_ACCEPTS_INTERVAL)
        {
            self.unlogged += 1;
            return;
        }
        let unlogged = self.unlogged;
        log::error!(
            "can't accept a connection: {error} ({unlogged} more since the last such line){advice}"
        );
        *self = FailedAccepts {
            logged: Some(Instant::now()),
            unlogged: 0,
        };
    }
}

/// A socket for all addresses shows an IPv4 client as `::ffff:192.0.2.7`. Log and limits use
/// `192.0.2.7`.
fn show_ipv4(peer: SocketAddr) -> SocketAddr {
    match peer.ip().to_canonical() {
        IpAddr::V4(address) => SocketAddr::from((address, peer.port())),
        // Unchanged, with the interface that it came by.
        IpAddr::V6(_) => peer,
    }
}

/// Admits a connection if the limits allow, and serves it. Behind a load balancer the PROXY header
/// names the client.
async fn admit(mut stream: TcpStream, peer: SocketAddr, shared: Arc<Shared>) {
    let client = match find_client(&mut stream, peer, &shared.config.proxies).await {
        Ok(client) => client,
        // A health check that only connects.
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return,
        Err(error) => {
            shared
                .events
                .connection(peer)
                .tell(Event::ConnectionRefused {
                    reason: ConnectionRefusal::ProxyHeader,
                    error: Some(error.to_string()),
                });
            return;
        }
    };
    let events = shared.events.connection(client);
    match shared.admission.admit(client) {
        Ok(slot) => connection::serve(stream, client, events, shared, slot).await,
        Err(reason) => refuse(&stream, &events, reason),
    }
}

/// The client's address: the one in the PROXY header if the connection is a load balancer's.
async fn find_client(
    stream: &mut TcpStream,
    peer: SocketAddr,
    proxies: &[IpNet],
) -> io::Result<SocketAddr> {
    let address = peer.ip().to_canonical();
    if !proxies.iter().any(|network| network.contains(&address)) {
        return Ok(peer);
    }
    let named = timeout(PROXY_TIME, read_proxy_header(stream)).await??;
    Ok(named.unwrap_or(peer))
}

/// The address that limits count a client by. For IPv6 the network, as its owner has 2^64
/// addresses.
fn source_of(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (!0 << 64)).into(),
        IpAddr::V4(address) => address.into(),
    }
}

fn refuse(stream: &TcpStream, events: &Teller, reason: ConnectionRefusal) {
    events.tell(Event::ConnectionRefused {
        reason,
        error: None,
    });
    // The send buffer of a new socket has room for one line, so this need not wait.
    let _ = stream.try_write(GOODBYE);
}

/// Periodically aborts the incomplete uploads of earlier servers.
async fn run_reaper(shared: Arc<Shared>) {
    let Config {
        prefix,
        abandoned_after,
        ..
    } = &shared.config;
    let top = match top_key(prefix) {
        Ok(top) => top,
        Err(error) => {
            log::error!("can't look for incomplete uploads: prefix {prefix:?}: {error}");
            return;
        }
    };
    loop {
        shared.transfers.sweep(&top, *abandoned_after).await;
        sleep(REAPER_INTERVAL).await;
    }
}

/// What all keys below a prefix begin with.
fn top_key(prefix: &str) -> Result<Key, PathError> {
    Home::new(prefix, "")?.directory(&Path::parse("/")?)
}

/// Sets the gauges that are not updated on change.
async fn refresh_gauges(shared: Arc<Shared>) {
    gauge!(MAX_SESSIONS).set(shared.config.max_sessions as f64);
    gauge!(BUFFER_MEMORY_LIMIT).set(shared.config.buffer_memory as f64);
    loop {
        gauge!(BUFFER_MEMORY).set(shared.transfers.pool.used() as f64);
        sleep(GAUGE_INTERVAL).await;
    }
}
