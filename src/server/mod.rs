//! The SSH server: accepts, limits, and ends connections.
//!
//! Called by `main` and by whoever embeds it; with its submodules the only one that names `russh`.
//! A slow or hostile client costs its own connection only: each has a task, a deadline to log in, and a way to be cut.

mod admission;
mod connection;
mod host_keys;
mod penalties;
mod proxy;
mod ssh;
mod transport;

pub use host_keys::{HostKey, generate, load, load_or_create, temporary};
pub use ssh::{Algorithms, UnknownAlgorithms};

use crate::metrics::{BUFFER_MEMORY, BUFFER_MEMORY_LIMIT, MAX_SESSIONS, REFUSED_CONNECTIONS};
use crate::path::{Home, Path};
use crate::store::Store;
use crate::transfer::{BufferPool, PartSizes, Transfers, UserLimits};
use crate::users::Auth;
use crate::vfs::Overlay;
use admission::{Admission, Refusal};
use ipnet::IpNet;
use metrics::{counter, gauge};
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
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle, task::TaskTracker};

/// After an accept that failed, as it does when the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Shortest time between two lines about accepts that failed: without descriptors five a second fail.
const FAILED_ACCEPTS_INTERVAL: Duration = Duration::from_secs(60);
/// For aborts of multipart uploads, once every session has ended.
const ABORT_TIME: Duration = Duration::from_secs(20);
/// A line before the version string is for people to read ([RFC 4253 §4.2](https://www.rfc-editor.org/rfc/rfc4253#section-4.2)).
const GOODBYE: &[u8] = b"This server takes no connection from you now: try again later.\r\n";
const FULL: Refusal = Refusal {
    label: "full",
    why: "all sessions are open (--max-sessions)",
};
/// A load balancer has its header ready.
const PROXY_TIME: Duration = Duration::from_secs(5);
/// How often figures are brought up to date that nobody notes when they change, and the users looked after.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// How often abandoned uploads are looked for, the first time at the start.
const SWEEP_INTERVAL: Duration = Duration::from_secs(3600);

/// All that a server needs. Numbers have the defaults of `sftpd serve`.
pub struct Config {
    /// Where files live.
    pub store: Arc<dyn Store>,
    /// Put before every key: a folder of the bucket, or nothing.
    pub prefix: String,
    /// Who may log in.
    pub auth: Arc<dyn Auth>,
    /// At least one; see [`load_or_create`].
    pub host_keys: Vec<HostKey>,
    /// Part and read-ahead buffers of all sessions together, in bytes.
    pub buffer_memory: u64,
    /// How uploads are cut.
    pub part_sizes: PartSizes,
    /// Connections at once.
    pub max_sessions: usize,
    /// Files open for writing at once; one user may have three quarters of them.
    pub max_uploads: usize,
    /// From connect to logged in.
    pub login_timeout: Duration,
    /// Without any SFTP request or answer.
    pub idle_timeout: Duration,
    /// For transfers to finish once the server stops.
    pub drain_timeout: Duration,
    /// Multipart uploads of servers that died are aborted once nothing was added to them for so long.
    pub abandoned_after: Duration,
    /// Offered to clients.
    pub algorithms: Algorithms,
    /// Directories are objects (`dir/`), not only known to this process.
    pub dir_markers: bool,
    /// Load balancers, of which every connection begins with a header of the PROXY protocol.
    pub proxies: Vec<IpNet>,
}

impl Config {
    /// With defaults for everything that has one.
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
        }
    }
}

/// How a server is told to stop.
#[derive(Clone, Default)]
pub struct Shutdown {
    /// Accept nobody, let open transfers finish until the drain timeout.
    pub drain: CancellationToken,
    /// Cut everything now. Uploads are still aborted.
    pub stop: CancellationToken,
}

/// What all connections share.
struct Shared {
    config: Config,
    admission: Arc<Admission>,
    penalties: Arc<Penalties>,
    transfers: Arc<Transfers>,
    overlay: Arc<Overlay>,
    /// Places for files that are open for writing.
    uploads: Arc<Semaphore>,
    /// By name, those who have a session.
    users: Mutex<HashMap<String, Weak<UserLimits>>>,
    shutdown: Shutdown,
}

impl Shared {
    /// What all sessions of this user share.
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

/// Serves until told to stop, and returns once every session has ended and every unfinished upload is aborted.
pub async fn run(listener: TcpListener, config: Config, shutdown: Shutdown) {
    let (store, pool) = (config.store.clone(), BufferPool::new(config.buffer_memory));
    let transfers = Arc::new(Transfers::new(store, pool, config.part_sizes));
    let admission = Arc::new(Admission::new(config.max_sessions));
    let uploads = Arc::new(Semaphore::new(
        config.max_uploads.min(Semaphore::MAX_PERMITS),
    ));
    let (penalties, overlay, users) = (Arc::default(), Arc::default(), Mutex::default());
    let shared = Arc::new(Shared {
        config,
        admission,
        penalties,
        transfers,
        overlay,
        uploads,
        users,
        shutdown,
    });
    let (connections, tasks) = (TaskTracker::new(), &shared.transfers.tasks);
    let Shutdown { drain, stop } = &shared.shutdown;
    let _sweeping = AbortOnDropHandle::new(tokio::spawn(sweep(shared.clone())));
    let _sampling = AbortOnDropHandle::new(tokio::spawn(sample(shared.clone())));
    stop.run_until_cancelled(accept(listener, &shared, &connections))
        .await;
    // Whoever cancels only `stop` means both.
    drain.cancel();
    connections.close();
    let patience = shared.config.drain_timeout;
    log::info!(
        "shutting down: {} sessions may finish within {patience:?}",
        connections.len()
    );
    let _ = timeout(patience, stop.run_until_cancelled(connections.wait())).await;
    if !connections.is_empty() {
        log::warn!("{} sessions are cut off", connections.len());
    }
    stop.cancel();
    shared.transfers.stop.cancel();
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
}

async fn accept(listener: TcpListener, shared: &Arc<Shared>, connections: &TaskTracker) {
    let mut failed = FailedAccepts::default();
    while let Some(accepted) = shared
        .shutdown
        .drain
        .run_until_cancelled(listener.accept())
        .await
    {
        match accepted {
            Ok((stream, peer)) if connections.len() >= shared.config.max_sessions => {
                refuse(&stream, show_ipv4(peer), &FULL);
            }
            Ok((stream, peer)) => {
                drop(connections.spawn(admit(stream, show_ipv4(peer), shared.clone())))
            }
            Err(error) => {
                failed.note(&error);
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Accepts that failed and what the log knows of them. The connection that could not be accepted waits in the kernel's
/// queue for the next try.
#[derive(Default)]
struct FailedAccepts {
    /// When the last line about them was written.
    logged: Option<Instant>,
    /// How many there were since then.
    unlogged: u64,
}

impl FailedAccepts {
    /// Counts a failed accept, and logs it unless a line about others is less than a minute old.
    fn note(&mut self, error: &io::Error) {
        let advice = match Errno::from_io_error(error) {
            Some(Errno::MFILE | Errno::NFILE) => {
                counter!(REFUSED_CONNECTIONS, "reason" => "descriptors").increment(1);
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

/// To a socket for all addresses an IPv4 client is `::ffff:192.0.2.7`. Log and limits know it by `192.0.2.7`.
fn show_ipv4(peer: SocketAddr) -> SocketAddr {
    match peer.ip().to_canonical() {
        IpAddr::V4(address) => SocketAddr::from((address, peer.port())),
        // As it is, with the interface that it came by.
        IpAddr::V6(_) => peer,
    }
}

/// Lets the client in, if it may: the one that a load balancer names, where there is one.
async fn admit(mut stream: TcpStream, mut peer: SocketAddr, shared: Arc<Shared>) {
    if shared
        .config
        .proxies
        .iter()
        .any(|network| network.contains(&peer.ip().to_canonical()))
    {
        match timeout(PROXY_TIME, proxy::client(&mut stream))
            .await
            .map_err(io::Error::from)
            .flatten()
        {
            Ok(client) => peer = client.unwrap_or(peer),
            // As a health check does that only connects.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return,
            Err(error) => return log::warn!("{peer}: refused: a proxy, but {error}"),
        }
    }
    match shared.admission.admit(peer) {
        Ok(slot) => connection::serve(stream, peer, shared, slot).await,
        Err(refusal) => refuse(&stream, peer, &refusal),
    }
}

/// What limits know a client by. Someone with one IPv6 address has 2^64 of them.
fn source_of(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (!0 << 64)).into(),
        IpAddr::V4(address) => address.into(),
    }
}

fn refuse(stream: &TcpStream, peer: SocketAddr, Refusal { label, why }: &Refusal) {
    counter!(REFUSED_CONNECTIONS, "reason" => *label).increment(1);
    log::warn!("{peer}: refused: {why}");
    // A new socket has room for one line: nobody waits.
    let _ = stream.try_write(GOODBYE);
}

/// Aborts what servers of this store left behind, now and then, for ever.
async fn sweep(shared: Arc<Shared>) {
    let top =
        Home::new(&shared.config.prefix, "").and_then(|home| home.directory(&Path::parse("/")?));
    while let Ok(top) = &top {
        shared
            .transfers
            .sweep(top, shared.config.abandoned_after)
            .await;
        sleep(SWEEP_INTERVAL).await;
    }
}

async fn sample(shared: Arc<Shared>) {
    gauge!(MAX_SESSIONS).set(shared.config.max_sessions as f64);
    gauge!(BUFFER_MEMORY_LIMIT).set(shared.config.buffer_memory as f64);
    loop {
        gauge!(BUFFER_MEMORY).set(shared.transfers.pool.used() as f64);
        sleep(SAMPLE_INTERVAL).await;
    }
}
