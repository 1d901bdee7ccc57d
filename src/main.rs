//! The `sftpd` command: arguments, log, wiring, exit status.

mod arguments;
mod descriptors;
mod doctor;
mod listen;
mod logging;
mod manual;
mod memory;
mod settings;

use anyhow::Context;
use clap::{ArgMatches, CommandFactory, Parser};
use listen::ListenAddress;
use sd_notify::NotifyState;
use settings::Settings;
use sftpd::metrics;
use sftpd::server::{self, Config, HostKey, Shutdown};
use sftpd::store::memory::MemoryStore;
use sftpd::users::{FileAuth, UsersFile, commands, commands::Usage, random};
use std::net::SocketAddr;
use std::{fs, io, io::Write, io::stdout, path::PathBuf, process::ExitCode, sync::Arc};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::{net::TcpListener, time::sleep};

const AFTER_HELP: &str = "Try it without a bucket: sftpd demo\nLog: RUST_LOG=sftpd=debug shows more lines, RUST_LOG=sftpd=warn fewer.";

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
        /// Where to listen: an address or a name, and a port; port 0 takes any free one.
        #[arg(
            long,
            env = "SFTPD_LISTEN",
            default_value = "127.0.0.1:2222",
            value_name = "HOST:PORT"
        )]
        listen: ListenAddress,
    },
    /// Add, change, remove and list users. A running server sees the change at the next login.
    Users {
        /// The users file.
        #[arg(
            long,
            env = "SFTPD_USERS",
            default_value = "users.json",
            value_name = "FILE",
            global = true
        )]
        users: PathBuf,
        #[command(subcommand)]
        command: commands::Command,
    },
    /// Print completions for a shell: `source <(sftpd completions bash)`.
    Completions {
        /// The shell that they are for.
        shell: clap_complete::Shell,
    },
    /// Print the manual page: `sftpd man | man -l -`.
    Man,
}

#[tokio::main]
async fn main() -> ExitCode {
    if let Err(error) = commands::check_command_line(std::env::args_os()) {
        logging::print_error(&format!("sftpd: {error}"));
        return ExitCode::from(2);
    }
    let (command, matches) = arguments::parse::<Command>();
    logging::start();
    let Err(error) = run(command, &matches).await else {
        return ExitCode::SUCCESS;
    };
    logging::print_error(&format!("sftpd: {error:#}"));
    // 2 says that the operator has to change something before another try.
    ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
}

async fn run(command: Command, matches: &ArgMatches) -> anyhow::Result<()> {
    match command {
        Command::Serve(settings) => {
            let changed = changed_settings(matches);
            serve(&settings, &changed).await
        }
        Command::Doctor { settings, json } => doctor::run(&settings, json).await,
        Command::Demo { listen } => demo(&listen).await,
        Command::Users { users, command } => print(command.run(&users)?.as_bytes()),
        Command::Completions { shell } => print(&manual::completions(Command::command(), shell)),
        Command::Man => print(&manual::page(Command::command())?),
    }
}

fn print(text: &[u8]) -> anyhow::Result<()> {
    stdout()
        .write_all(text)
        .context("can't write to standard output")
}

/// The settings of `serve` that are not named in the line about its start and differ from their defaults.
fn changed_settings(matches: &ArgMatches) -> Vec<String> {
    let command = Command::command();
    let Some((name, matches)) = matches.subcommand() else {
        return Vec::new();
    };
    let Some(subcommand) = command.find_subcommand(name) else {
        return Vec::new();
    };
    arguments::changed_settings(subcommand, matches, &["store", "listen", "users"])
}

async fn serve(settings: &Settings, changed: &[String]) -> anyhow::Result<()> {
    log_start(settings, changed);
    descriptors::provide(settings.max_sessions);
    // Before anything is counted.
    let metrics = match &settings.metrics {
        Some(address) => Some((address.bind().await?, metrics::install()?)),
        None => None,
    };
    let config = settings.config().await?;
    let listener = settings.listen.bind().await?;
    let shutdown = Shutdown::default();
    watch_signals(shutdown.clone()).context("can't catch signals")?;
    if let Some((listener, handle)) = metrics {
        log::info!(
            "metrics on {}",
            listener.local_addr().context("no address")?
        );
        tokio::spawn(metrics::serve(listener, handle, shutdown.drain.clone()));
    }
    announce(&listener, &config, &shutdown)?;
    server::run(listener, config, shutdown).await;
    // A server without sessions ends before the task that tells systemd so has run.
    notify_systemd(NotifyState::Stopping);
    Ok(())
}

async fn demo(listen: &ListenAddress) -> anyhow::Result<()> {
    let password = random();
    let store = MemoryStore::default();
    let auth = FileAuth::single("demo", &password)?;
    let config = Config::new(Arc::new(store), Arc::new(auth), server::generate()?);
    let listener = listen.bind().await?;
    let shutdown = Shutdown::default();
    watch_signals(shutdown.clone()).context("can't catch signals")?;
    let address = announce(&listener, &config, &shutdown)?;
    let port = address.port();
    let host = match address {
        SocketAddr::V4(ipv4) if !ipv4.ip().is_unspecified() => ipv4.ip().to_string(),
        SocketAddr::V6(ipv6) if !ipv6.ip().is_unspecified() => format!("[{}]", ipv6.ip()),
        _ => "127.0.0.1".to_owned(),
    };
    println!("Files live in memory and are gone at the end (Ctrl-C). In another terminal:\n");
    println!(
        "  sftp -P {port} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null demo@{host}\n"
    );
    println!("Password: {password}");
    server::run(listener, config, shutdown).await;
    Ok(())
}

/// One line about what was asked for, before anything of it is tried.
fn log_start(settings: &Settings, changed: &[String]) {
    let version = env!("CARGO_PKG_VERSION");
    let Settings {
        store,
        listen,
        users,
        ..
    } = settings;
    let file = users.display();
    let users = match UsersFile::read(users) {
        Ok(UsersFile { users }) => format!("{} in {file}", users.len()),
        Err(_) => format!("unknown in {file}"),
    };
    let changed = match changed {
        [] => "defaults".to_owned(),
        changed => changed.join(" "),
    };
    log::info!(
        "sftpd {version}: store {store}, address {listen}, users {users}, settings {changed}"
    );
}

/// Logs that the server is ready, as the last line before it serves, and tells systemd. Returns the real address.
fn announce(
    listener: &TcpListener,
    config: &Config,
    shutdown: &Shutdown,
) -> anyhow::Result<SocketAddr> {
    let address = listener.local_addr().context("no address")?;
    let fingerprints: Vec<_> = config.host_keys.iter().map(HostKey::to_string).collect();
    log::info!("host key {}", fingerprints.join(", "));
    log::info!("listening on {address}");
    tokio::spawn(tell_systemd(shutdown.clone()));
    Ok(address)
}

/// Ready, alive, stopping: nothing where systemd did not start this.
async fn tell_systemd(shutdown: Shutdown) {
    notify_systemd(NotifyState::Ready);
    let alive = async {
        while let Some(patience) = sd_notify::watchdog_enabled() {
            notify_systemd(NotifyState::Watchdog);
            sleep(patience / 3).await;
        }
    };
    let stopping = async {
        shutdown.drain.cancelled().await;
        notify_systemd(NotifyState::Stopping);
    };
    tokio::join!(alive, stopping);
}

fn notify_systemd(state: NotifyState<'_>) {
    // Without a socket to tell it to, nobody asked.
    let _ = sd_notify::notify(&[state]);
}

/// The first SIGTERM, SIGINT or SIGHUP drains, the second cuts. They are caught from here on, before anyone is told that
/// the server is ready.
fn watch_signals(shutdown: Shutdown) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = watch_hangup()?;
    tokio::spawn(async move {
        for token in [shutdown.drain, shutdown.stop] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                Some(_) = receive(&mut hangup) => {}
            }
            token.cancel();
        }
    });
    Ok(())
}

/// `None` if SIGHUP is ignored, as in a program that `nohup` starts to outlive its terminal.
fn watch_hangup() -> io::Result<Option<Signal>> {
    match ignores_hangup(&fs::read_to_string("/proc/self/status").unwrap_or_default()) {
        true => Ok(None),
        false => signal(SignalKind::hangup()).map(Some),
    }
}

/// Reads the mask of ignored signals ([proc(5)](https://man7.org/linux/man-pages/man5/proc_pid_status.5.html)), in which
/// SIGHUP, number 1, is the lowest bit.
fn ignores_hangup(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    match mask.map(|mask| u64::from_str_radix(mask.trim(), 16)) {
        Some(Ok(mask)) => mask & 1 != 0,
        _ => false,
    }
}

/// Resolves to `None` at once if the signal is not watched.
async fn receive(signal: &mut Option<Signal>) -> Option<()> {
    match signal {
        Some(signal) => signal.recv().await,
        None => None,
    }
}
