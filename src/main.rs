//! The `sftpd` command: arguments, log, wiring, exit status.

use anyhow::{Context, bail, ensure};
use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};
use sftpd::server::{self, Config, HostKey, Shutdown};
use sftpd::store::memory::MemoryStore;
use sftpd::store::s3::S3Store;
use sftpd::store::{MIN_PART, Store};
use sftpd::upload::PartSizes;
use sftpd::users::commands::Usage;
use sftpd::users::{Auth, FileAuth, SingleUser, commands};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// An SFTP server that streams uploads straight into S3.
///
/// Nothing a client sends is written to a disk, nothing half-sent appears in the bucket, and CLOSE says OK
/// only after S3 did.
#[derive(Parser)]
#[command(
    version,
    after_help = "Try it without a bucket: sftpd demo\nLog: RUST_LOG=debug shows more, RUST_LOG=warn less."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
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
}

/// The operator has to change something before another try: exit status 2.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // The S3 SDK and russh tell at `info` what only their authors need.
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("error,sftpd=info")).init();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sftpd: {error:#}");
            ExitCode::from(if error.is::<Usage>() { USAGE } else { 1 })
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Users { users, command } => {
            print!("{}", command.run(&users)?);
            Ok(())
        }
        Command::Serve(args) => runtime()?.block_on(serve(args)),
        Command::Demo { listen } => runtime()?.block_on(demo(listen)),
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("can't start")
}

async fn serve(args: Serve) -> anyhow::Result<()> {
    let auth: Arc<dyn Auth> = Arc::new(FileAuth::open(args.users.clone()).map_err(Usage::from)?);
    let part_sizes = args.part_sizes().map_err(Usage::from)?;
    let host_keys = server::load_or_create(&args.host_keys)?;
    let (store, prefix) = open_store(&args.store).await?;
    let config = Config {
        prefix,
        buffer_memory: args.buffer_memory.as_u64(),
        part_sizes,
        max_sessions: args.max_sessions,
        login_timeout: args.login_timeout,
        idle_timeout: args.idle_timeout,
        drain_timeout: args.drain_timeout,
        ..Config::new(store, auth, host_keys)
    };
    listen(args.listen, config, |_| {}).await
}

impl Serve {
    fn part_sizes(&self) -> anyhow::Result<PartSizes> {
        let (first, memory) = (self.part_size.as_u64(), self.buffer_memory.as_u64());
        ensure!(first >= MIN_PART, "--part-size {} is below S3's minimum of 5MiB", self.part_size);
        ensure!(
            first <= memory / 4,
            "--buffer-memory {} is less than four parts of {}",
            self.buffer_memory,
            self.part_size
        );
        let cap = PartSizes::default().cap.min(memory / 4);
        let double_every = if self.equal_parts { 0 } else { PartSizes::default().double_every };
        Ok(PartSizes { first, cap, double_every })
    }
}

async fn open_store(url: &str) -> anyhow::Result<(Arc<dyn Store>, String)> {
    if url == "memory:" {
        return Ok((Arc::new(MemoryStore::default()), String::new()));
    }
    match url.strip_prefix("s3://").map(|rest| rest.split_once('/').unwrap_or((rest, ""))) {
        Some((bucket, prefix)) if !bucket.is_empty() => {
            Ok((Arc::new(S3Store::connect(bucket).await?), prefix.to_owned()))
        }
        _ => bail!(Usage(format!("--store {url:?} is neither s3://BUCKET, s3://BUCKET/PREFIX nor memory:"))),
    }
}

async fn demo(address: SocketAddr) -> anyhow::Result<()> {
    let password = sftpd::users::random();
    let auth = Arc::new(SingleUser::new("demo", &password)?);
    let key: HostKey = server::temporary()?;
    let config = Config::new(Arc::new(MemoryStore::default()), auth, vec![key]);
    listen(address, config, |address| {
        println!("Files live in memory and are gone at the end (Ctrl-C). In another terminal:\n");
        println!(
            "  sftp -P {} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null demo@{}\n",
            address.port(),
            address.ip()
        );
        println!("Password: {password}");
    })
    .await
}

async fn listen(address: SocketAddr, config: Config, ready: impl FnOnce(SocketAddr)) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("can't listen on {address}"))?;
    let address = listener.local_addr().context("no address")?;
    let shutdown = Shutdown::default();
    tokio::spawn(watch_signals(shutdown.clone()));
    log::info!("host key {}", config.host_keys.iter().map(HostKey::fingerprint).collect::<Vec<_>>().join(", "));
    log::info!("listening on {address}");
    ready(address);
    server::run(listener, config, shutdown).await;
    Ok(())
}

/// The first SIGTERM or SIGINT drains, the second cuts.
async fn watch_signals(shutdown: Shutdown) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return log::error!("signals can't be caught: the server can only be killed");
    };
    for token in [&shutdown.drain, &shutdown.stop] {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        token.cancel();
    }
}
