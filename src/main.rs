//! The `sftpd` command: arguments, log, wiring, exit status.

mod doctor;
mod settings;

use anyhow::Context;
use clap::Parser;
use env_logger::fmt::Formatter;
use sd_notify::NotifyState;
use settings::Settings;
use sftpd::metrics;
use sftpd::server::{self, Config, HostKey, Shutdown};
use sftpd::store::memory::MemoryStore;
use sftpd::users::{FileAuth, commands, commands::Usage, random};
use std::{io::Write, io::stdout, net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc};
use tokio::signal::unix::{SignalKind, signal};
use tokio::{net::TcpListener, time::sleep};

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
    Serve(Box<Settings>),
    /// Try everything that `serve` with these settings needs, and say what is wrong and what to do. Puts objects named
    /// .sftpd-doctor-… and removes them.
    Doctor {
        #[command(flatten)]
        settings: Box<Settings>,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
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

#[tokio::main]
async fn main() -> ExitCode {
    if let Err(error) = commands::check_command_line(std::env::args_os()) {
        eprintln!("sftpd: {error}");
        return ExitCode::from(2);
    }
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
    let (address, config, metrics, password) = match command {
        Command::Users { users, command } => return Ok(stdout().write_all(command.run(&users)?.as_bytes())?),
        Command::Doctor { settings, json } => return doctor::run(&settings, json).await,
        Command::Serve(settings) => {
            let metrics = match settings.metrics {
                // First of all, or figures would be lost.
                Some(address) => Some((bind(address).await?, metrics::install()?)),
                None => None,
            };
            (settings.listen, settings.config().await?, metrics, None)
        }
        Command::Demo { listen } => {
            let password = random();
            let (store, auth) = (MemoryStore::default(), FileAuth::single("demo", &password)?);
            let config = Config::new(Arc::new(store), Arc::new(auth), server::generate()?);
            (listen, config, None, Some(password))
        }
    };
    let listener = bind(address).await?;
    let address = listener.local_addr().context("no address")?;
    let shutdown = Shutdown::default();
    watch_signals(shutdown.clone()).context("can't catch signals")?;
    if let Some((listener, handle)) = metrics {
        log::info!("metrics on {}", listener.local_addr().context("no address")?);
        tokio::spawn(metrics::serve(listener, handle, shutdown.drain.clone()));
    }
    log::info!("host key {}", config.host_keys.iter().map(HostKey::to_string).collect::<Vec<_>>().join(", "));
    log::info!("listening on {address}");
    tokio::spawn(tell_systemd(shutdown.clone()));
    if let Some(password) = password {
        println!("Files live in memory and are gone at the end (Ctrl-C). In another terminal:\n");
        let (ip, port) = (address.ip(), address.port());
        println!("  sftp -P {port} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null demo@{ip}\n");
        println!("Password: {password}");
    }
    server::run(listener, config, shutdown).await;
    Ok(())
}

async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("can't listen on {address}"))
}

/// Ready, alive, stopping: nothing where systemd did not start this.
async fn tell_systemd(shutdown: Shutdown) {
    // Without a socket to tell it to, nobody asked.
    let tell = |state| drop(sd_notify::notify(&[state]));
    tell(NotifyState::Ready);
    let alive = async {
        while let Some(patience) = sd_notify::watchdog_enabled() {
            tell(NotifyState::Watchdog);
            sleep(patience / 3).await;
        }
    };
    let stopping = async {
        shutdown.drain.cancelled().await;
        tell(NotifyState::Stopping);
    };
    tokio::join!(alive, stopping);
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
