//! The SSH server: accepts, limits, and ends connections.
//!
//! Called by `main` and by whoever embeds it; with its submodules the only one that names `russh`.
//! A slow or hostile client costs its own connection only: each has a task, a deadline to log in, and a way to be cut.

mod connection;
mod host_keys;
mod socket;

pub use host_keys::{HostKey, load_or_create, temporary};

use crate::budget::Budget;
use crate::store::Store;
use crate::tree::Local;
use crate::upload::{Context, PartSizes};
use crate::users::Auth;
use russh::cipher::{AES_128_CTR, AES_128_GCM, AES_192_CTR, AES_256_CTR, AES_256_GCM, CHACHA20_POLY1305};
use russh::{MethodKind, MethodSet, Preferred, SshId, compression, keys::Algorithm};
use std::{borrow::Cow, io::Write, sync::Arc, time::Duration};
use tokio::{net::TcpListener, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// After an accept that failed, as it does when the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// For aborts of multipart uploads, once every session has ended.
const ABORT_TIME: Duration = Duration::from_secs(20);
/// A line before the version string is for people to read ([RFC 4253 §4.2](https://www.rfc-editor.org/rfc/rfc4253#section-4.2)).
const FULL: &[u8] = b"This server has as many sessions as it can take: try again later.\r\n";

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
    config: Config,
    ssh: Arc<russh::server::Config>,
    context: Arc<Context>,
    local: Arc<Local>,
    shutdown: Shutdown,
}

/// Serves until told to stop, and returns once every session has ended and every unfinished upload is aborted.
pub async fn run(listener: TcpListener, config: Config, shutdown: Shutdown) {
    let (store, budget) = (config.store.clone(), Budget::new(config.buffer_memory));
    let context = Arc::new(Context { store, budget, sizes: config.part_sizes, tasks: TaskTracker::new() });
    let ssh = Arc::new(ssh_config(&config));
    let shared = Arc::new(Shared { config, ssh, context, local: Arc::default(), shutdown });
    let (connections, tasks) = (TaskTracker::new(), &shared.context.tasks);
    let Shutdown { drain, stop } = &shared.shutdown;
    stop.run_until_cancelled(accept(listener, &shared, &connections)).await;
    // Whoever cancels only `stop` means both.
    drain.cancel();
    connections.close();
    let patience = shared.config.drain_timeout;
    log::info!("shutting down: {} sessions may finish within {patience:?}", connections.len());
    let _ = timeout(patience, stop.run_until_cancelled(connections.wait())).await;
    if !connections.is_empty() {
        log::warn!("{} sessions are cut off", connections.len());
    }
    stop.cancel();
    tasks.close();
    let ended = async {
        connections.wait().await;
        tasks.wait().await;
    };
    if timeout(ABORT_TIME, ended).await.is_err() {
        log::error!("{} transfers did not end: multipart uploads may be left in the bucket", tasks.len());
    }
}

async fn accept(listener: TcpListener, shared: &Arc<Shared>, connections: &TaskTracker) {
    let most = shared.config.max_sessions;
    while let Some(accepted) = shared.shutdown.drain.run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((stream, peer)) if connections.len() < most => {
                connections.spawn(connection::serve(stream, peer, shared.clone()));
            }
            Ok((stream, peer)) => {
                log::warn!("{peer}: refused: {most} sessions are open (--max-sessions)");
                // A new socket has room for one line: nobody waits.
                let _ = stream.into_std().and_then(|mut stream| stream.write_all(FULL));
            }
            Err(error) => {
                log::error!("can't accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn ssh_config(config: &Config) -> russh::server::Config {
    russh::server::Config {
        server_id: SshId::Standard(Cow::Borrowed(concat!("SSH-2.0-sftpd_", env!("CARGO_PKG_VERSION")))),
        methods: MethodSet::from(&[MethodKind::PublicKey, MethodKind::Password][..]),
        // Every refusal takes so long, whatever it was that did not fit.
        auth_rejection_time: Duration::from_millis(100),
        // The first "none" request only asks which methods there are.
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: config.host_keys.iter().map(|key| key.0.clone()).collect(),
        // Messages of at most 32 KiB that russh holds for us before it stops reading from the socket.
        channel_buffer_size: 32,
        // Our messages that russh takes before we wait.
        event_buffer_size: 32,
        // russh's own safe list, Ed25519 first, without SHA-1 signatures, with AES-GCM of both sizes in front (half the
        // CPU of the others where the CPU has AES), and without compression, which would let a few bytes become many
        // in memory.
        preferred: Preferred {
            key: Preferred::DEFAULT.key.iter().filter(|key| **key != Algorithm::Rsa { hash: None }).cloned().collect(),
            cipher: Cow::Borrowed(&[
                AES_128_GCM,
                AES_256_GCM,
                CHACHA20_POLY1305,
                AES_128_CTR,
                AES_192_CTR,
                AES_256_CTR,
            ]),
            compression: Cow::Borrowed(&[compression::NONE]),
            ..Preferred::DEFAULT
        },
        // Failed logins on one connection, as OpenSSH's MaxAuthTries.
        max_auth_attempts: 6,
        // Also ends a connection whose client takes nothing off the socket any more.
        inactivity_timeout: Some(config.idle_timeout),
        // Keep-alives every so often, of which so many may go unanswered, find a connection whose other end is gone
        // without a word.
        keepalive_interval: Some(Duration::from_secs(30)),
        keepalive_max: 3,
        ..Default::default()
    }
}
