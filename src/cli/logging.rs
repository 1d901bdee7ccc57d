//! The log of the binary: which lines are written, and what a line looks like.
//!
//! Systemd's journal adds the time by itself and reads a line's priority from its first characters
//! ([sd-daemon(3)](https://www.freedesktop.org/software/systemd/man/latest/sd-daemon.html)).
//! Anywhere else a line begins with the time. Lines leave through a [`LogQueue`], so that the server
//! never waits for who reads them.

use super::log_queue::{LogQueue, QueueWriter};
use clap::ValueEnum;
use env_logger::Target;
use log::{Level, LevelFilter, Record};
use rustix::fs::fstat;
use sftpd::events::{Escaped, Events, JSON_TARGET, JsonLog, Metrics, TextLog, record_as_json};
use std::io::{Write, stderr};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;
use std::{env, io, panic};

/// Used without RUST_LOG. At `info`, the S3 SDK and russh log what only their authors need.
const DEFAULT_FILTER: &str = "error,sftpd=info";
/// The next step after a RUST_LOG that does not do what it seems to say.
const FILTER_ADVICE: &str =
    "use RUST_LOG=sftpd=debug for more lines, RUST_LOG=sftpd=warn for fewer";

/// The target of lines that no module of the library logs.
pub const BINARY_TARGET: &str = "sftpd";

/// Where the log goes, once it is started.
static QUEUE: OnceLock<Arc<LogQueue>> = OnceLock::new();

/// What a line looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line for people
    #[default]
    Text,
    /// A JSON object a line, for programs
    Json,
}

impl LogFormat {
    /// The listeners of a server in the process.
    pub fn listeners(self) -> Vec<Arc<dyn Events>> {
        let log: Arc<dyn Events> = match self {
            LogFormat::Text => Arc::new(TextLog),
            LogFormat::Json => Arc::new(JsonLog),
        };
        vec![log, Arc::new(Metrics)]
    }
}

/// Where standard error goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Destination {
    Journal,
    Other,
}

/// The meaning of `RUST_LOG`.
#[derive(Debug, PartialEq, Eq)]
struct Filter {
    /// In env_logger's syntax.
    directives: String,
    /// Says what is wrong with `RUST_LOG`.
    warning: Option<String>,
}

/// Starts the log. An invalid `RUST_LOG` is only a warning there: the variable is for all programs
/// of an environment, and must not keep a server from starting.
pub fn start(format: LogFormat) {
    let asked = env::var_os("RUST_LOG").unwrap_or_default();
    let filter = choose_filter(&asked.to_string_lossy());
    let destination = find_destination();
    let mut builder = env_logger::Builder::new();
    builder
        .parse_filters(&filter.directives)
        .format(move |out, record| write_record(out, record, format, destination));
    match LogQueue::start(stderr(), move |dropped| {
        tell_dropped(dropped, format, destination)
    }) {
        Ok(queue) => {
            let queue = QUEUE.get_or_init(|| queue).clone();
            builder.target(Target::Pipe(Box::new(QueueWriter(queue))));
        }
        Err(error) => print_error(&format!("sftpd: the log has no thread of its own: {error}")),
    }
    builder.init();
    if format == LogFormat::Json {
        panic::set_hook(Box::new(|panic| {
            log::error!(target: BINARY_TARGET, "{panic}");
        }));
    }
    if let Some(warning) = filter.warning {
        log::warn!("{warning}");
    }
}

/// Waits, for a bounded time, until the log is written.
pub fn finish() {
    if let Some(queue) = QUEUE.get() {
        queue.flush();
    }
}

/// Reports the error that ends the program, in the format of the log.
pub fn report_error(text: &str, format: LogFormat) {
    match format {
        LogFormat::Text => print_error(text),
        LogFormat::Json => log::error!(target: BINARY_TARGET, "{text}"),
    }
}

/// Writes the error that ends the program to standard error, for the journal with its priority.
pub fn print_error(text: &str) {
    match find_destination() {
        Destination::Other => print_line(text.trim_end()),
        Destination::Journal => {
            for line in text.lines().filter(|line| !line.is_empty()) {
                print_line(&format!("{}{line}", journal_priority(Level::Error)));
            }
        }
    }
}

/// Writes to standard error, behind the lines of the log.
fn print_line(line: &str) {
    match QUEUE.get() {
        Some(queue) => queue.push(format!("{line}\n").as_bytes()),
        None => eprintln!("{line}"),
    }
}

/// Whether systemd's journal reads standard error.
pub fn is_for_journal() -> bool {
    find_destination() == Destination::Journal
}

fn choose_filter(asked: &str) -> Filter {
    let default = DEFAULT_FILTER.to_owned();
    if asked.is_empty() {
        return Filter {
            directives: default,
            warning: None,
        };
    }
    if env_filter::Builder::new().try_parse(asked).is_err() {
        let warning =
            format!("RUST_LOG={asked} can't be understood and is ignored: {FILTER_ADVICE}");
        return Filter {
            directives: default,
            warning: Some(warning),
        };
    }
    if covers_sftpd(asked) {
        return Filter {
            directives: asked.to_owned(),
            warning: None,
        };
    }
    let warning =
        format!("RUST_LOG={asked} sets no level for sftpd, which stays at info: {FILTER_ADVICE}");
    Filter {
        directives: format!("{default},{asked}"),
        warning: Some(warning),
    }
}

/// Whether one of the directives is a level for everything or names a module of sftpd. env_logger
/// takes a word that is no level, also a mistyped one, for the name of a module.
fn covers_sftpd(directives: &str) -> bool {
    for directive in directives.split(',') {
        let name = directive.split(['=', '/']).next().unwrap_or_default();
        let name = name.trim();
        if name.starts_with("sftpd") || name.parse::<LevelFilter>().is_ok() {
            return true;
        }
    }
    false
}

/// `JOURNAL_STREAM` is the device and inode that systemd's journal reads
/// ([systemd.exec(5)](https://www.freedesktop.org/software/systemd/man/latest/systemd.exec.html)).
/// Programs whose standard error goes elsewhere inherit the variable.
fn find_destination() -> Destination {
    let announced = env::var("JOURNAL_STREAM").unwrap_or_default();
    match fstat(stderr()) {
        Ok(found) if announced == format!("{}:{}", found.st_dev, found.st_ino) => {
            Destination::Journal
        }
        _ => Destination::Other,
    }
}

/// The line about lines that were dropped.
fn tell_dropped(dropped: u64, format: LogFormat, destination: Destination) -> Vec<u8> {
    let mut line = Vec::new();
    let written = write_record(
        &mut line,
        &Record::builder()
            .level(Level::Warn)
            .target(BINARY_TARGET)
            .args(format_args!(
                "{dropped} lines of the log were dropped: it was not read"
            ))
            .build(),
        format,
        destination,
    );
    // Memory takes everything.
    debug_assert!(written.is_ok());
    line
}

fn write_record(
    out: &mut impl Write,
    record: &Record<'_>,
    format: LogFormat,
    destination: Destination,
) -> io::Result<()> {
    match format {
        LogFormat::Text => write_line(out, record, destination),
        LogFormat::Json => write_json(out, record, destination),
    }
}

/// Writes one line. Control characters are escaped, so that names that clients choose and S3's
/// responses can't forge log lines.
fn write_line(
    out: &mut impl Write,
    record: &Record<'_>,
    destination: Destination,
) -> io::Result<()> {
    let level = record.level();
    let module = record.target();
    let text = Escaped(record.args());
    match destination {
        Destination::Journal => writeln!(
            out,
            "{}[{level:<5} {module}] {text}",
            journal_priority(level)
        ),
        Destination::Other => {
            let time = humantime::format_rfc3339_seconds(SystemTime::now());
            writeln!(out, "[{time} {level:<5} {module}] {text}")
        }
    }
}

/// Writes one line of JSON. Events are JSON already.
fn write_json(
    out: &mut impl Write,
    record: &Record<'_>,
    destination: Destination,
) -> io::Result<()> {
    if destination == Destination::Journal {
        write!(out, "{}", journal_priority(record.level()))?;
    }
    match record.target() {
        JSON_TARGET => writeln!(out, "{}", record.args()),
        _ => writeln!(out, "{}", record_as_json(record)),
    }
}

/// The priority of syslog ([RFC 5424 §6.2.1](https://www.rfc-editor.org/rfc/rfc5424#section-6.2.1))
/// in the syntax of sd-daemon(3).
fn journal_priority(level: Level) -> &'static str {
    match level {
        Level::Error => "<3>",
        Level::Warn => "<4>",
        Level::Info => "<6>",
        Level::Debug | Level::Trace => "<7>",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_leaves_sftpd_out_keeps_its_lines() {
        for asked in [
            "debug",
            "OFF",
            "sftpd=warn",
            "russh=debug,sftpd=debug",
            "sftpd::server=trace",
            "error,russh=info",
        ] {
            assert_eq!(
                choose_filter(asked),
                Filter {
                    directives: asked.to_owned(),
                    warning: None
                }
            );
        }
        assert_eq!(choose_filter("").directives, DEFAULT_FILTER);
        for asked in ["bogus", "russh=debug", "inof"] {
            let filter = choose_filter(asked);
            assert_eq!(filter.directives, format!("{DEFAULT_FILTER},{asked}"));
            assert!(filter.warning.is_some());
        }
        for asked in ["sftpd=bogus", "a=b=c", "sftpd=debug/a/b"] {
            let filter = choose_filter(asked);
            assert_eq!(filter.directives, DEFAULT_FILTER);
            assert!(filter.warning.is_some());
        }
    }
}
