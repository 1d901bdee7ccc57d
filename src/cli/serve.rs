//! `sftpd serve`: its flags, which are those of `sftpd doctor` too, and what they mean.

use super::listen::ListenAddress;
use super::logging::{BINARY_TARGET, LogFormat};
use super::memory::uploads_beside;
use super::signals::watch_signals;
use super::systemd::{notify_systemd, tell_systemd};
use super::waiting::with_notices;
use super::{Usage, descriptors, exporter};
use anyhow::{Context, anyhow, bail};
use bytesize::ByteSize;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args};
use ipnet::IpNet;
use sd_notify::NotifyState;
use sftpd::path::{Home, top_key};
use sftpd::server::{self, Algorithms, BuildError, HostKey, Server, ServerBuilder};
use sftpd::store::s3::{Listing, S3Store, StartError};
use sftpd::store::{KeptConditions, Key, Limits, Store, memory::MemoryStore};
use sftpd::users::{FileAuth, UserList, UsersFile};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Longest time of a flag. Far longer ones would exceed the range of the clock.
const MAX_TIME: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// The settings of a server. Every flag has a variable, so that systemd's EnvironmentFile is the
/// only file to edit.
#[derive(Args)]
pub struct ServeArgs {
    /// Where files are kept: s3://BUCKET, s3://BUCKET/PREFIX, or memory: (lost at the end).
    #[arg(long, env = "SFTPD_STORE", value_parser = parse_store, value_name = "URL")]
    pub store: String,
    /// Where to listen: an address or a name, and a port; port 0 takes any free one. :2222 is port
    /// 2222 of all addresses, IPv6 included.
    #[arg(
        long,
        env = "SFTPD_LISTEN",
        default_value = "0.0.0.0:2222",
        value_name = "HOST:PORT"
    )]
    pub listen: ListenAddress,
    /// Who may log in; see `sftpd users`.
    #[arg(
        long,
        env = "SFTPD_USERS",
        default_value = "users.json",
        value_name = "FILE"
    )]
    pub users: PathBuf,
    /// Private keys of this host in OpenSSH's format; if there is none, an ed25519, an ECDSA and an
    /// RSA key are made.
    #[arg(
        long,
        env = "SFTPD_HOST_KEYS",
        default_value = "host_keys",
        value_name = "DIR"
    )]
    pub host_keys: PathBuf,
    /// All part and read-ahead buffers together, at least four parts.
    #[arg(long, env = "SFTPD_BUFFER_MEMORY", default_value = "256MiB", value_parser = parse_size, value_name = "SIZE")]
    buffer_memory: ByteSize,
    /// First part size: 5MiB to 5GiB. Doubles every 1,000 parts, up to 64MiB or a quarter of the
    /// buffer memory, whichever is less.
    #[arg(long, env = "SFTPD_PART_SIZE", default_value = "5MiB", value_parser = parse_part_size, value_name = "SIZE")]
    part_size: ByteSize,
    /// All parts but the last have --part-size, as Cloudflare R2 demands.
    #[arg(long, env = "SFTPD_EQUAL_PARTS", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value = "off", default_missing_value = "on", value_parser = parse_switch, value_name = "on|off")]
    pub equal_parts: bool,
    /// Directories that clients make are stored, as empty objects `dir/`: other gateways and the
    /// next start see them.
    #[arg(long, env = "SFTPD_DIR_MARKERS", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value = "off", default_missing_value = "on", value_parser = parse_switch, value_name = "on|off")]
    dir_markers: bool,
    /// Connections at once, of which one user may have a quarter; more are refused.
    #[arg(long, env = "SFTPD_MAX_SESSIONS", default_value = "1000", value_parser = parse_session_limit, value_name = "N")]
    pub max_sessions: usize,
    /// Files open for writing at once. A user who holds as many as are free gets no more. The default
    /// is what fits into this machine's memory, or into the unit's MemoryMax.
    #[arg(long, env = "SFTPD_MAX_UPLOADS", value_parser = parse_upload_limit, value_name = "N")]
    max_uploads: Option<usize>,
    /// For a client to log in after it has connected.
    #[arg(long, env = "SFTPD_LOGIN_TIMEOUT", default_value = "30s", value_parser = parse_time_above_zero, value_name = "TIME")]
    login_timeout: Duration,
    /// A session ends after this time without a request or an answer.
    #[arg(long, env = "SFTPD_IDLE_TIMEOUT", default_value = "30m", value_parser = parse_time_above_zero, value_name = "TIME")]
    idle_timeout: Duration,
    /// The store may be silent for this time over a request that opens, looks, reads, lists or
    /// deletes.
    #[arg(long, env = "SFTPD_OPEN_TIMEOUT", default_value = "30s", value_parser = parse_store_timeout, value_name = "TIME")]
    open_timeout: Duration,
    /// The store may be silent for this time over a request that sends content, copies it or makes
    /// a file of it. A long one that shows signs of life is not cut.
    #[arg(long, env = "SFTPD_CLOSE_TIMEOUT", default_value = "30s", value_parser = parse_store_timeout, value_name = "TIME")]
    close_timeout: Duration,
    /// Open transfers may finish for this time after SIGTERM, SIGINT or SIGHUP; a second signal
    /// ends them.
    #[arg(long, env = "SFTPD_DRAIN_TIMEOUT", default_value = "60s", value_parser = parse_time, value_name = "TIME")]
    drain_timeout: Duration,
    /// Incomplete multipart uploads of a server that died are aborted after this time, at least 1h.
    #[arg(long, env = "SFTPD_ABANDONED_AFTER", default_value = "24h", value_parser = parse_time, value_name = "TIME")]
    abandoned_after: Duration,
    /// Which algorithms SSH offers.
    #[arg(
        long,
        env = "SFTPD_ALGORITHMS",
        default_value = "modern",
        value_parser = algorithms_parser(),
        value_name = "KIND"
    )]
    algorithms: Algorithms,
    /// Addresses and networks (10.0.0.0/8) of load balancers, which begin each connection with a
    /// PROXY protocol header.
    #[arg(long, env = "SFTPD_PROXY_PROTOCOL", value_delimiter = ',', value_parser = parse_network, value_name = "NET,NET")]
    proxy_protocol: Vec<IpNet>,
    /// Where to serve /metrics (for Prometheus) and /healthz. There is no password: use a loopback
    /// or internal address.
    #[arg(long, env = "SFTPD_METRICS", value_name = "HOST:PORT")]
    pub metrics: Option<ListenAddress>,
    /// What the log looks like: docs/events.md has the fields of the JSON lines.
    #[arg(
        long,
        env = "SFTPD_LOG_FORMAT",
        default_value = "text",
        value_name = "FORMAT"
    )]
    pub log_format: LogFormat,
}

/// Takes the names of sets of algorithms, with a description of each for `--help`.
fn algorithms_parser() -> impl TypedValueParser<Value = Algorithms> {
    PossibleValuesParser::new([
        PossibleValue::new(Algorithms::PostQuantum.as_str())
            .help("Key exchange with ML-KEM and X25519 only: OpenSSH 9.9 and later, and little else as yet"),
        PossibleValue::new(Algorithms::Modern.as_str()).help(
            "X25519 and the NIST curves too; and what legacy offers to clients that are known to support \
             nothing better",
        ),
        PossibleValue::new(Algorithms::Legacy.as_str())
            .help("Finite-field Diffie-Hellman and encrypt-and-MAC to everyone"),
    ])
    .try_map(|name| name.parse::<Algorithms>())
}

/// A parsed `--store`.
pub enum StoreUrl<'a> {
    /// memory:
    Memory,
    /// s3://BUCKET/PREFIX
    Bucket(&'a str, &'a str),
}

impl StoreUrl<'_> {
    fn parse(store: &str) -> anyhow::Result<StoreUrl<'_>> {
        let name = store.strip_prefix("s3://").unwrap_or_default();
        let (bucket, prefix) = name.split_once('/').unwrap_or((name, ""));
        Home::new(prefix, "")
            .map_err(|error| Usage(anyhow!("the prefix {prefix:?} can't be used: {error}")))?;
        match bucket {
            "" if store == "memory:" => Ok(StoreUrl::Memory),
            "" => bail!(Usage(anyhow!(
                "neither s3://BUCKET, s3://BUCKET/PREFIX nor memory:"
            ))),
            bucket => Ok(StoreUrl::Bucket(bucket, prefix)),
        }
    }
}

impl ServeArgs {
    /// Where files are kept.
    pub fn store_url(&self) -> anyhow::Result<StoreUrl<'_>> {
        StoreUrl::parse(&self.store)
    }

    /// Fails if settings don't go together, before anything is opened.
    pub fn check(&self) -> anyhow::Result<()> {
        let builder = Server::builder(Arc::new(MemoryStore::default()), UserList::default());
        match self.apply(builder).check() {
            Ok(()) => Ok(()),
            Err(error) => Err(name_flags(error).into()),
        }
    }

    /// The server with these settings. Makes host keys if there are none, and tests the bucket.
    pub async fn server(&self) -> anyhow::Result<Server> {
        let auth = FileAuth::open(self.users.clone()).map_err(Usage)?;
        let store_url = self.store_url()?;
        self.check()?;
        let host_keys = server::load_or_create(&self.host_keys).map_err(Usage)?;
        let store: Arc<dyn Store> = match store_url {
            StoreUrl::Memory => Arc::new(MemoryStore::default()),
            StoreUrl::Bucket(bucket, prefix) => {
                Arc::new(self.open_bucket(bucket, &top_key(prefix)?).await?)
            }
        };
        let prefix = match store_url {
            StoreUrl::Memory => "",
            StoreUrl::Bucket(_, prefix) => prefix,
        };
        let builder = Server::builder(store, auth)
            .prefix(prefix)
            .host_keys(host_keys);
        match self.apply(builder).build() {
            Ok(server) => Ok(server),
            Err(error) => Err(name_flags(error).into()),
        }
    }

    /// Opens the bucket and tests it.
    async fn open_bucket(&self, bucket: &str, top: &Key) -> anyhow::Result<S3Store> {
        let cant_serve = |place: &str| format!("can't serve {place}");
        let opened = with_notices("the AWS credentials", S3Store::open(bucket)).await;
        let store = opened
            .map_err(exit_status)
            .with_context(|| cant_serve(&self.store))?;
        let place = self.place(&store);
        match with_notices(&place, self.try_bucket(&store, top)).await {
            Ok(Listing::Allowed) => {}
            // Credentials that may only put objects are valid.
            Ok(Listing::Refused(why)) => log::warn!("clients will see no directories: {why}"),
            Err(error) => return Err(exit_status(error).context(cant_serve(&place))),
        }
        Ok(with_notices(&place, find_conditions(store, top)).await)
    }

    /// Sends the first request to the bucket. The store may be silent for `--open-timeout`.
    pub async fn try_bucket(&self, store: &S3Store, top: &Key) -> Result<Listing, StartError> {
        let limit = self.open_timeout;
        match timeout(limit, store.check(top)).await {
            Ok(answer) => answer,
            Err(_elapsed) => Err(StartError::Unreachable {
                why: format!("no answer within {}", humantime::format_duration(limit)),
            }),
        }
    }

    /// The store in sentences for the operator.
    pub fn place(&self, store: &S3Store) -> String {
        match store.endpoint() {
            Some(url) => format!("{} at {url}", self.store),
            None => self.store.clone(),
        }
    }

    /// Applies the flags that are settings of the library.
    fn apply(&self, builder: ServerBuilder) -> ServerBuilder {
        let buffer_memory = self.buffer_memory.as_u64();
        let max_uploads = match self.max_uploads {
            Some(limit) => limit,
            None => uploads_beside(buffer_memory),
        };
        builder
            .buffer_memory(buffer_memory)
            .part_size(self.part_size.as_u64())
            .equal_parts(self.equal_parts)
            .dir_markers(self.dir_markers)
            .max_sessions(self.max_sessions)
            .max_uploads(max_uploads)
            .login_timeout(self.login_timeout)
            .idle_timeout(self.idle_timeout)
            .drain_timeout(self.drain_timeout)
            .abandoned_after(self.abandoned_after)
            .algorithms(self.algorithms)
            .proxies(self.proxy_protocol.clone())
            .open_timeout(self.open_timeout)
            .close_timeout(self.close_timeout)
            .listeners(self.log_format.listeners())
    }
}

/// The same error in the words of the command line.
fn name_flags(error: BuildError) -> Usage {
    match error {
        BuildError::BufferMemory {
            buffer_memory,
            part_size,
            ..
        } => Usage(anyhow!(
            "--buffer-memory {} is less than four parts of {}: raise --buffer-memory (SFTPD_BUFFER_MEMORY) or lower \
             --part-size (SFTPD_PART_SIZE)",
            ByteSize(buffer_memory),
            ByteSize(part_size)
        )),
        BuildError::AbandonedAfter { given, least, .. } => Usage(anyhow!(
            "--abandoned-after {} is below {}: it must exceed the time that a client takes to send one part, or uploads \
             in progress are aborted",
            humantime::format_duration(given),
            humantime::format_duration(least)
        )),
        other => Usage(other.into()),
    }
}

/// The URL as it is, if it is valid.
fn parse_store(text: &str) -> Result<String, anyhow::Error> {
    StoreUrl::parse(text)?;
    Ok(text.to_owned())
}

/// Accepts the usual words for yes and no.
fn parse_switch(text: &str) -> Result<bool, &'static str> {
    match text.to_ascii_lowercase().as_str() {
        "on" | "true" | "yes" | "1" => Ok(true),
        "off" | "false" | "no" | "0" => Ok(false),
        _ => Err("use on or off (or true and false, yes and no, 1 and 0)"),
    }
}

fn parse_session_limit(text: &str) -> Result<usize, &'static str> {
    match text.parse() {
        Ok(0) => Err("nobody could connect: use a number from 1"),
        Ok(limit) => Ok(limit),
        Err(_) => Err("use a number like 1000"),
    }
}

fn parse_upload_limit(text: &str) -> Result<usize, &'static str> {
    match text.parse() {
        Ok(0) => Err("nobody could put a file: use a number from 1"),
        Ok(limit) => Ok(limit),
        Err(_) => Err("use a number like 100"),
    }
}

fn parse_size(text: &str) -> Result<ByteSize, &'static str> {
    text.parse().map_err(|_| "use a size like 256MiB")
}

fn parse_part_size(text: &str) -> Result<ByteSize, &'static str> {
    let s3 = Limits::default();
    match text.parse::<ByteSize>() {
        Ok(size) if size.as_u64() < s3.min_part => Err("below S3's minimum of 5MiB"),
        Ok(size) if size.as_u64() > s3.max_part => Err("above S3's maximum of 5GiB"),
        Ok(size) => Ok(size),
        Err(_) => Err("use a size like 64MiB"),
    }
}

fn parse_time(text: &str) -> Result<Duration, &'static str> {
    match humantime::parse_duration(text) {
        Ok(time) if time > MAX_TIME => {
            Err("longer than 100 years: use a time like 30s, 5m or 1h 30m")
        }
        Ok(time) => Ok(time),
        Err(_) => Err("use a time like 30s, 5m or 1h 30m"),
    }
}

fn parse_time_above_zero(text: &str) -> Result<Duration, &'static str> {
    match parse_time(text) {
        Ok(time) if time.is_zero() => {
            Err("every session would end at once: use a time like 30s, 5m or 1h 30m")
        }
        parsed => parsed,
    }
}

fn parse_store_timeout(text: &str) -> Result<Duration, &'static str> {
    match parse_time(text) {
        Ok(time) if time.is_zero() => {
            Err("every request would fail at once: use a time like 30s, 5m or 1h 30m")
        }
        parsed => parsed,
    }
}

/// Finds out which conditional requests the store honours, and logs which it doesn't.
async fn find_conditions(store: S3Store, top: &Key) -> S3Store {
    match store.find_conditions(top).await {
        Ok(kept) => {
            if let Some(missing) = describe_missing(&kept) {
                log::info!(
                    "the store does not keep {missing}: serve its keys from one gateway only"
                );
            }
            store.with_conditions(kept)
        }
        // Credentials that may only read, for example.
        Err(error) => {
            log::warn!(
                "can't find out which conditions the store keeps, so none is relied on: {error}"
            );
            store.with_conditions(KeptConditions::NONE)
        }
    }
}

/// The conditions that a store does not honour, in S3's words; `None` if it honours all.
pub fn describe_missing(kept: &KeptConditions) -> Option<String> {
    let all = [
        (kept.put_absent, "If-None-Match on PutObject"),
        (kept.put_unchanged, "If-Match on PutObject"),
        (
            kept.complete_absent,
            "If-None-Match on CompleteMultipartUpload",
        ),
        (
            kept.complete_unchanged,
            "If-Match on CompleteMultipartUpload",
        ),
        (kept.copy_absent, "If-None-Match on CopyObject"),
        (kept.copy_source, "x-amz-copy-source-if-match on CopyObject"),
        (kept.delete_unchanged, "If-Match on DeleteObject"),
    ];
    let mut missing = Vec::new();
    for (is_kept, name) in all {
        if !is_kept {
            missing.push(name);
        }
    }
    if missing.is_empty() {
        None
    } else {
        Some(missing.join(", "))
    }
}

/// Marks errors after which the operator must change something before another try.
fn exit_status(error: StartError) -> anyhow::Error {
    if error.needs_operator() {
        Usage(error.into()).into()
    } else {
        error.into()
    }
}

/// A network, or one address.
fn parse_network(text: &str) -> Result<IpNet, &'static str> {
    let network = match text.parse::<IpAddr>() {
        Ok(address) => Ok(IpNet::from(address)),
        Err(_) => text.parse::<IpNet>(),
    };
    match network {
        Ok(network) if network.prefix_len() == 0 => Err(
            "every client could claim any address: name the load balancers' own addresses or networks",
        ),
        Ok(network) => Ok(network),
        Err(_) => Err("use an address or a network like 10.0.0.0/8"),
    }
}

/// Serves until a signal ends it.
pub async fn run(settings: &ServeArgs, changed: &[String]) -> anyhow::Result<()> {
    log_start(settings, changed);
    descriptors::provide(settings.max_sessions);
    // Before anything is recorded.
    let metrics = match &settings.metrics {
        Some(address) => Some((address.bind("--metrics").await?, exporter::install()?)),
        None => None,
    };
    let server = settings.server().await?;
    let listener = settings.listen.bind("--listen").await?;
    let drain = watch_signals(&server).context("can't catch signals")?;
    if let Some((listener, handle)) = metrics {
        let address = listener.local_addr().context("no address")?;
        log::info!(target: BINARY_TARGET, "metrics on {address}");
        tokio::spawn(exporter::serve(listener, handle, drain.clone()));
    }
    announce(&listener, &server, &drain)?;
    server.serve(listener, drain.cancelled_owned()).await;
    // A server without sessions can end before the task that notifies systemd has run.
    notify_systemd(NotifyState::Stopping);
    Ok(())
}

/// Logs the settings in one line, before anything can fail.
fn log_start(settings: &ServeArgs, changed: &[String]) {
    let version = env!("CARGO_PKG_VERSION");
    let ServeArgs {
        store,
        listen,
        users,
        ..
    } = settings;
    let file = users.display();
    let users = match UsersFile::read(users) {
        Ok(UsersFile { users, .. }) => format!("{} in {file}", users.len()),
        Err(_) => format!("unknown in {file}"),
    };
    let changed = match changed {
        [] => "defaults".to_owned(),
        changed => changed.join(" "),
    };
    log::info!(
        target: BINARY_TARGET,
        "sftpd {version}: store {store}, address {listen}, users {users}, settings {changed}"
    );
}

/// Logs the host keys, as the last line before the server says where it listens, and notifies
/// systemd. Returns the address with the real port.
pub fn announce(
    listener: &TcpListener,
    server: &Server,
    drain: &CancellationToken,
) -> anyhow::Result<SocketAddr> {
    let address = listener.local_addr().context("no address")?;
    let fingerprints: Vec<_> = server.host_keys().iter().map(HostKey::to_string).collect();
    log::info!(target: BINARY_TARGET, "host key {}", fingerprints.join(", "));
    tokio::spawn(tell_systemd(drain.clone()));
    Ok(address)
}
