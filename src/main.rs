//! The `sftpd` command: arguments, log, wiring, exit status.

use anyhow::{Context, anyhow, bail, ensure};
use bytesize::ByteSize;
use clap::{Args, Parser};
use env_logger::fmt::Formatter;
use sftpd::server::{self, Algorithms, Config, HostKey, Shutdown};
use sftpd::store::{MIN_PART, Store, memory::MemoryStore, s3::S3Store};
use sftpd::tree::Home;
use sftpd::upload::PartSizes;
use sftpd::users::{FileAuth, commands, commands::Usage, random};
use std::{io::Write, io::stdout, net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

const AFTER_HELP: &str = "Try it without a bucket: sftpd demo\nLog: RUST_LOG=debug shows more, RUST_LOG=warn less.";

/// An SFTP server that streams uploads straight into S3.
///
/// Nothing a client sends is written to a disk, nothing half-sent appears in the bucket, and CLOSE says OK
/// only after S3 did.
#[derive(Parser)]
#[command(version, after_help = AFTER_HELP)]
enum Command {
    /// Serve a bucket. S3 credentials, region and endpoint come from the usual AWS settings
    /// (AWS_* variables, profiles, roles); AWS_ENDPOINT_URL names another S3 server.
    Serve(Serve),
    /// Serve from memory on this machine, for one user with a fresh password: to try things out.
    Demo {
        /// Where to listen; port 0 takes any free one.
        #[arg(long, env = "SFTPD_LISTEN", default_value = "127.0.0.1:2222", value_name = "ADDR:PORT")]
        listen: SocketAddr,
    },
    /// Add, remove and list users. A running server sees the change at the next login.
    Users {
        /// The users file.
        #[arg(long, env = "SFTPD_USERS", default_value = "users.json", value_name = "FILE", global = true)]
        users: PathBuf,
        #[command(subcommand)]
        command: commands::Command,
    },
}

#[derive(Args)]
struct Serve {
    /// Where files live: s3://BUCKET, s3://BUCKET/PREFIX, or memory: (lost at the end).
    #[arg(long, env = "SFTPD_STORE", value_name = "URL")]
    store: String,
    /// Where to listen; port 0 takes any free one.
    #[arg(long, env = "SFTPD_LISTEN", default_value = "0.0.0.0:2222", value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// Who may log in; see `sftpd users`.
    #[arg(long, env = "SFTPD_USERS", default_value = "users.json", value_name = "FILE")]
    users: PathBuf,
    /// Private keys of this host in OpenSSH's format; an ed25519 one is made if there is none.
    #[arg(long, env = "SFTPD_HOST_KEYS", default_value = "host_keys", value_name = "DIR")]
    host_keys: PathBuf,
    /// All part and read-ahead buffers together, at least four parts.
    #[arg(long, env = "SFTPD_BUFFER_MEMORY", default_value = "256MiB", value_name = "SIZE")]
    buffer_memory: ByteSize,
    /// First part size: 5MiB to 5GiB. Doubles every 1,000 parts, up to a quarter of the buffer memory.
    #[arg(long, env = "SFTPD_PART_SIZE", default_value = "5MiB", value_name = "SIZE")]
    part_size: ByteSize,
    /// All parts but the last have --part-size, as Cloudflare R2 demands.
    #[arg(long, env = "SFTPD_EQUAL_PARTS")]
    equal_parts: bool,
    /// Connections at once; more are refused.
    #[arg(long, env = "SFTPD_MAX_SESSIONS", default_value_t = 1000, value_name = "N")]
    max_sessions: usize,
    /// From connect to logged in.
    #[arg(long, env = "SFTPD_LOGIN_TIMEOUT", default_value = "30s", value_parser = humantime::parse_duration, value_name = "TIME")]
    login_timeout: Duration,
    /// A session ends after so long without a request or an answer.
    #[arg(long, env = "SFTPD_IDLE_TIMEOUT", default_value = "30m", value_parser = humantime::parse_duration, value_name = "TIME")]
    idle_timeout: Duration,
    /// Open transfers may finish for so long after SIGTERM; a second signal cuts them.
    #[arg(long, env = "SFTPD_DRAIN_TIMEOUT", default_value = "60s", value_parser = humantime::parse_duration, value_name = "TIME")]
    drain_timeout: Duration,
    /// Multipart uploads that a server which died left in the store are aborted after so long.
    #[arg(long, env = "SFTPD_ABANDONED_AFTER", default_value = "24h", value_parser = humantime::parse_duration, value_name = "TIME")]
    abandoned_after: Duration,
    /// What SSH offers.
    #[arg(long, env = "SFTPD_ALGORITHMS", default_value = "modern", value_name = "KIND")]
    algorithms: Algorithms,
}

#[tokio::main]
async fn main() -> ExitCode {
    let command = Command::parse();
    // The S3 SDK and russh tell at `info` what only their authors need.
    let level = env_logger::Env::default().default_filter_or("error,sftpd=info");
    env_logger::Builder::from_env(level).format(write_line).init();
    let Err(error) = run(command).await else { return ExitCode::SUCCESS };
    eprintln!("sftpd: {error:#}");
    // 2 says that the operator has to change something before another try.
    ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
}

/// One line, whatever is in it: clients choose names, S3's answers repeat them, and nobody shall write lines of their own.
fn write_line(out: &mut Formatter, record: &log::Record) -> std::io::Result<()> {
    let text = record.args().to_string();
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    let (time, level, module, text) = (out.timestamp(), record.level(), record.target(), text.chars().map(escape));
    writeln!(out, "[{time} {level:<5} {module}] {}", text.collect::<String>())
}

async fn run(command: Command) -> anyhow::Result<()> {
    let (address, config, password) = match command {
        Command::Users { users, command } => return Ok(stdout().write_all(command.run(&users)?.as_bytes())?),
        Command::Serve(args) => (args.listen, config(args).await?, None),
        Command::Demo { listen } => {
            let password = random();
            let (store, auth) = (MemoryStore::default(), FileAuth::single("demo", &password)?);
            (listen, Config::new(Arc::new(store), Arc::new(auth), vec![server::temporary()?]), Some(password))
        }
    };
    let listener = TcpListener::bind(address).await.with_context(|| format!("can't listen on {address}"))?;
    let address = listener.local_addr().context("no address")?;
    let shutdown = Shutdown::default();
    watch_signals(shutdown.clone()).context("can't catch signals")?;
    log::info!("host key {}", config.host_keys.iter().map(HostKey::fingerprint).collect::<Vec<_>>().join(", "));
    log::info!("listening on {address}");
    if let Some(password) = password {
        println!("Files live in memory and are gone at the end (Ctrl-C). In another terminal:\n");
        let (ip, port) = (address.ip(), address.port());
        println!("  sftp -P {port} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null demo@{ip}\n");
        println!("Password: {password}");
    }
    server::run(listener, config, shutdown).await;
    Ok(())
}

async fn config(args: Serve) -> anyhow::Result<Config> {
    let auth = FileAuth::open(args.users).map_err(Usage)?;
    let Serve { store, part_size, buffer_memory, max_sessions, login_timeout, idle_timeout, drain_timeout, .. } = args;
    let Serve { abandoned_after, algorithms, .. } = args;
    let (first, memory) = (part_size.as_u64(), buffer_memory.as_u64());
    ensure!(first >= MIN_PART, Usage(anyhow!("--part-size {part_size} is below S3's minimum of 5MiB")));
    let most = memory / 4;
    ensure!(first <= most, Usage(anyhow!("--buffer-memory {buffer_memory} is less than four parts of {part_size}")));
    let PartSizes { cap, double_every, .. } = PartSizes::default();
    let double_every = if args.equal_parts { 0 } else { double_every };
    let part_sizes = PartSizes { first, cap: cap.min(most), double_every };
    let host_keys = server::load_or_create(&args.host_keys)?;
    let place = store.strip_prefix("s3://").unwrap_or_default();
    let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
    Home::new(prefix, "").map_err(|error| Usage(anyhow!("--store {store:?}: {error}")))?;
    let files: Arc<dyn Store> = match bucket {
        "" if store == "memory:" => Arc::new(MemoryStore::default()),
        "" => bail!(Usage(anyhow!("--store {store:?} is neither s3://BUCKET, s3://BUCKET/PREFIX nor memory:"))),
        bucket => Arc::new(S3Store::connect(bucket).await?),
    };
    let base = Config { prefix: prefix.to_owned(), part_sizes, ..Config::new(files, Arc::new(auth), host_keys) };
    let base = Config { abandoned_after, algorithms, ..base };
    Ok(Config { buffer_memory: memory, max_sessions, login_timeout, idle_timeout, drain_timeout, ..base })
}

/// The first SIGTERM or SIGINT drains, the second cuts. They are caught from here on, before anyone is told that the
/// server is ready.
fn watch_signals(shutdown: Shutdown) -> std::io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        for token in [shutdown.drain, shutdown.stop] {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            token.cancel();
        }
    });
    Ok(())
}
