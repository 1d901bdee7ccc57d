//! The SSH server: accepts, limits, and ends connections.
//!
//! Called by `main` and by whoever embeds it; with its submodules the only one that names `russh`.
//! A slow or hostile client costs its own connection only: each has a task, a deadline to log in, and a way to be cut.

mod channel;
mod connection;
mod host_keys;
mod socket;

pub use host_keys::{HostKey, load_or_create, temporary};

use crate::budget::Budget;
use crate::store::Store;
use crate::tree::{Home, Local, Tree};
use crate::upload::{Context, PartSizes};
use crate::users::{Account, Auth};
use russh::keys::Algorithm;
use russh::keys::ssh_key::HashAlg;
use russh::{MethodKind, MethodSet, Preferred, SshId, cipher, compression};
use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// After an accept that failed, as it does when the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// For aborts of multipart uploads, once every session has ended.
const ABORT_TIME: Duration = Duration::from_secs(20);
/// Channel messages of at most 32 KiB that russh holds for us before it stops reading from the socket.
const CHANNEL_MESSAGES: usize = 32;
/// Our messages that russh takes before we wait.
const EVENTS: usize = 32;
/// Keep-alives every so often find a connection whose other end is gone without a word …
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// … after so many without an answer.
const KEEPALIVE_MAX: usize = 3;
/// Failed logins on one connection, as OpenSSH's MaxAuthTries.
const MAX_AUTH_ATTEMPTS: usize = 6;
/// Every refusal takes so long, whatever it was that did not fit.
const REJECTION_TIME: Duration = Duration::from_millis(100);

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
    /// From connect to logged in.
    pub login_timeout: Duration,
    /// Without any SFTP request or answer.
    pub idle_timeout: Duration,
    /// For transfers to finish once the server stops.
    pub drain_timeout: Duration,
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
            login_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(30 * 60),
            drain_timeout: Duration::from_secs(60),
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
    auth: Arc<dyn Auth>,
    context: Arc<Context>,
    local: Arc<Local>,
    prefix: String,
    ssh: Arc<russh::server::Config>,
    login_timeout: Duration,
    idle_timeout: Duration,
    shutdown: Shutdown,
}

impl Shared {
    fn tree(&self, account: &Account) -> Result<Tree, crate::tree::TreeError> {
        Ok(Tree::new(self.context.clone(), self.local.clone(), Home::new(&self.prefix, &account.home)?))
    }
}

/// Serves until told to stop, and returns once every session has ended and every unfinished upload is aborted.
pub async fn run(listener: TcpListener, config: Config, shutdown: Shutdown) {
    let ssh = Arc::new(ssh_config(&config));
    let context = Arc::new(Context {
        store: config.store,
        budget: Budget::new(config.buffer_memory),
        sizes: config.part_sizes,
        tasks: TaskTracker::new(),
    });
    let shared = Arc::new(Shared {
        auth: config.auth,
        context: context.clone(),
        local: Arc::default(),
        prefix: config.prefix,
        ssh,
        login_timeout: config.login_timeout,
        idle_timeout: config.idle_timeout,
        shutdown: shutdown.clone(),
    });
    let connections = TaskTracker::new();
    accept(&listener, &shared, &connections, config.max_sessions).await;
    drop(listener);
    connections.close();
    log::info!("shutting down: {} sessions may finish within {:?}", connections.len(), config.drain_timeout);
    tokio::select! {
        () = connections.wait() => {}
        () = tokio::time::sleep(config.drain_timeout) => log::warn!("{} sessions are cut off", connections.len()),
        () = shutdown.stop.cancelled() => log::warn!("{} sessions are cut off", connections.len()),
    }
    shutdown.stop.cancel();
    context.tasks.close();
    let ended = async {
        connections.wait().await;
        context.tasks.wait().await;
    };
    if tokio::time::timeout(ABORT_TIME, ended).await.is_err() {
        log::error!("{} transfers did not end: multipart uploads may be left in the bucket", context.tasks.len());
    }
}

async fn accept(listener: &TcpListener, shared: &Arc<Shared>, connections: &TaskTracker, max_sessions: usize) {
    let places = Arc::new(Semaphore::new(max_sessions));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.shutdown.drain.cancelled() => return,
            () = shared.shutdown.stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, peer)) => match places.clone().try_acquire_owned() {
                Ok(place) => drop(connections.spawn(serve(stream, peer, shared.clone(), place))),
                Err(_) => {
                    log::warn!("{peer}: refused: {max_sessions} sessions are open (--max-sessions)");
                    connections.spawn(refuse(stream));
                }
            },
            Err(error) => {
                log::error!("can't accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, peer: SocketAddr, shared: Arc<Shared>, place: OwnedSemaphorePermit) {
    connection::serve(stream, peer, shared).await;
    drop(place);
}

/// A line before the version string is for people to read ([RFC 4253 §4.2](https://www.rfc-editor.org/rfc/rfc4253#section-4.2)).
async fn refuse(mut stream: TcpStream) {
    let line = b"This server has as many sessions as it can take: try again later.\r\n";
    let _ = tokio::time::timeout(Duration::from_secs(1), stream.write_all(line)).await;
}

fn ssh_config(config: &Config) -> russh::server::Config {
    let mut ssh = russh::server::Config {
        server_id: SshId::Standard(Cow::Borrowed(concat!("SSH-2.0-sftpd_", env!("CARGO_PKG_VERSION")))),
        methods: MethodSet::from(&[MethodKind::PublicKey, MethodKind::Password][..]),
        auth_rejection_time: REJECTION_TIME,
        // The first "none" request only asks which methods there are.
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: config.host_keys.iter().map(|key| key.0.clone()).collect(),
        channel_buffer_size: CHANNEL_MESSAGES,
        event_buffer_size: EVENTS,
        preferred: preferred(),
        max_auth_attempts: MAX_AUTH_ATTEMPTS,
        // Also ends a connection whose client takes nothing off the socket any more.
        inactivity_timeout: Some(config.idle_timeout),
        keepalive_interval: Some(KEEPALIVE_INTERVAL),
        keepalive_max: KEEPALIVE_MAX,
        nodelay: true,
        ..Default::default()
    };
    // Ed25519 first: what clients without a known host key will pin.
    ssh.keys.sort_by_key(|key| key.algorithm() != Algorithm::Ed25519);
    ssh
}

/// russh's own safe list, with AES-GCM of both sizes in front (half the CPU of the others where the CPU has
/// AES), without SHA-1 signatures and without compression, which would let a few bytes become many in memory.
fn preferred() -> Preferred {
    let all = Preferred::DEFAULT;
    let key: Vec<Algorithm> = all.key.iter().filter(|key| **key != Algorithm::Rsa { hash: None }).cloned().collect();
    debug_assert!(key.contains(&Algorithm::Rsa { hash: Some(HashAlg::Sha512) }));
    Preferred {
        key: Cow::Owned(key),
        cipher: Cow::Borrowed(&[
            cipher::AES_128_GCM,
            cipher::AES_256_GCM,
            cipher::CHACHA20_POLY1305,
            cipher::AES_128_CTR,
            cipher::AES_192_CTR,
            cipher::AES_256_CTR,
        ]),
        compression: Cow::Borrowed(&[compression::NONE]),
        ..all
    }
}
