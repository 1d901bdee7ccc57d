//! The command line: what `sftpd` adds to the library.
//!
//! Called by `main`. Only this room reads flags and variables, prints, prompts, and serves
//! `/metrics`; the library does not name it.

pub mod arguments;
mod demo;
mod descriptors;
mod doctor;
mod exporter;
mod listen;
mod log_queue;
pub mod logging;
mod manual;
mod memory;
mod serve;
mod signals;
mod systemd;
pub mod users;
mod waiting;

use anyhow::Context;
use clap::{ArgMatches, CommandFactory, Parser};
use listen::ListenAddress;
use logging::LogFormat;
use serve::ServeArgs;
use std::io::{Write, stdout};
use std::path::PathBuf;

/// A usage error, on the command line or in a setting: exit status 2.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Usage(#[from] pub anyhow::Error);

const AFTER_HELP: &str = "Try it without a bucket: sftpd demo\nLog: RUST_LOG=sftpd=debug shows more lines, RUST_LOG=sftpd=warn fewer.";

/// An SFTP server that streams uploads straight into S3.
///
/// Nothing a client sends is written to a disk, nothing half-sent appears in the bucket, and CLOSE
/// says OK only after S3 did.
#[derive(Parser)]
#[command(version, after_help = AFTER_HELP, max_term_width = 100)]
pub enum Command {
    /// Serve a bucket. S3 credentials, region and endpoint come from the usual AWS settings
    /// (AWS_* variables, profiles, roles); AWS_ENDPOINT_URL names another S3 server.
    Serve(Box<ServeArgs>),
    /// Try everything that `serve` with these settings needs, and say what is wrong and what to do.
    /// Puts objects named .sftpd-doctor-… and .sftpd-probe-…, removes them, and names those that stay.
    Doctor {
        #[command(flatten)]
        settings: Box<ServeArgs>,
        /// Print one JSON object instead.
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
        /// What the log looks like.
        #[arg(
            long,
            env = "SFTPD_LOG_FORMAT",
            default_value = "text",
            value_name = "FORMAT"
        )]
        log_format: LogFormat,
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
        command: users::Command,
    },
    /// Print completions for a shell: `source <(sftpd completions bash)`.
    Completions {
        /// The shell that they are for.
        shell: clap_complete::Shell,
    },
    /// Print the manual page: `sftpd man | man -l -`.
    Man,
}

impl Command {
    /// What the log looks like.
    pub fn log_format(&self) -> LogFormat {
        match self {
            Command::Serve(settings) => settings.log_format,
            Command::Doctor { settings, .. } => settings.log_format,
            Command::Demo { log_format, .. } => *log_format,
            Command::Users { .. } | Command::Completions { .. } | Command::Man => LogFormat::Text,
        }
    }
}

/// Runs a command to its end.
pub async fn run(command: Command, matches: &ArgMatches) -> anyhow::Result<()> {
    match command {
        Command::Serve(settings) => {
            let changed = changed_settings(matches);
            serve::run(&settings, &changed).await
        }
        Command::Doctor { settings, json } => doctor::run(&settings, json).await,
        Command::Demo { listen, log_format } => demo::run(&listen, log_format).await,
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

/// The settings of `serve` that differ from their defaults, except those that the log line about
/// its start names anyway.
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
