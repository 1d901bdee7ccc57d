//! The log of the binary: which lines are written, and what a line looks like.
//!
//! Systemd's journal keeps the time by itself and reads a line's priority from its first characters
//! ([sd-daemon(3)](https://www.freedesktop.org/software/systemd/man/latest/sd-daemon.html)); everyone else gets the time in the line.

use env_logger::fmt::Formatter;
use log::{Level, LevelFilter, Record};
use rustix::fs::fstat;
use std::io::{Write, stderr};
use std::{env, io};

/// Without RUST_LOG. The S3 SDK and russh log at `info` what only their authors need.
const DEFAULT_FILTER: &str = "error,sftpd=info";
/// What to write instead of a RUST_LOG that does not do what it seems to say.
const FILTER_ADVICE: &str =
    "use RUST_LOG=sftpd=debug for more lines, RUST_LOG=sftpd=warn for fewer";

/// What standard error is connected to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Destination {
    Journal,
    Other,
}

/// What `RUST_LOG` comes to.
#[derive(Debug, PartialEq, Eq)]
struct Filter {
    /// As env_logger takes them.
    directives: String,
    /// What is wrong with `RUST_LOG`.
    warning: Option<String>,
}

/// Starts the log. A `RUST_LOG` that can't be used is reported there and does not keep a server from starting: the
/// variable belongs to all programs of an environment, and which lines are logged is no reason to serve nobody.
pub fn start() {
    let asked = env::var_os("RUST_LOG").unwrap_or_default();
    let filter = choose_filter(&asked.to_string_lossy());
    let destination = find_destination();
    let write =
        move |out: &mut Formatter, record: &Record<'_>| write_line(out, record, destination);
    env_logger::Builder::new()
        .parse_filters(&filter.directives)
        .format(write)
        .init();
    if let Some(warning) = filter.warning {
        log::warn!("{warning}");
    }
}

/// Writes what made the program end to standard error, for the journal with the priority of an error.
pub fn print_error(text: &str) {
    match find_destination() {
        Destination::Other => eprintln!("{}", text.trim_end()),
        Destination::Journal => {
            for line in text.lines().filter(|line| !line.is_empty()) {
                eprintln!("{}{line}", journal_priority(Level::Error));
            }
        }
    }
}

/// Reports whether systemd's journal reads standard error.
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

/// Whether one of the directives is a level for everything or names a module of sftpd. A word that is no level, a mistyped
/// one too, is a module's name to env_logger.
fn covers_sftpd(directives: &str) -> bool {
    let names = directives
        .split(',')
        .filter_map(|directive| directive.split(['=', '/']).next());
    names
        .map(str::trim)
        .any(|name| name.starts_with("sftpd") || name.parse::<LevelFilter>().is_ok())
}

/// Systemd says in `JOURNAL_STREAM` which device and inode its journal reads
/// ([systemd.exec(5)](https://www.freedesktop.org/software/systemd/man/latest/systemd.exec.html)). The variable is inherited
/// by programs whose standard error goes elsewhere.
fn find_destination() -> Destination {
    let announced = env::var("JOURNAL_STREAM").unwrap_or_default();
    match fstat(stderr()) {
        Ok(found) if announced == format!("{}:{}", found.st_dev, found.st_ino) => {
            Destination::Journal
        }
        _ => Destination::Other,
    }
}

/// Writes one line, whatever is in it: clients choose names and S3's answers repeat them, and neither may make lines of
/// their own.
fn write_line(
    out: &mut Formatter,
    record: &Record<'_>,
    destination: Destination,
) -> io::Result<()> {
    let level = record.level();
    let module = record.target();
    let text = escape_controls(&record.args().to_string());
    match destination {
        Destination::Journal => writeln!(
            out,
            "{}[{level:<5} {module}] {text}",
            journal_priority(level)
        ),
        Destination::Other => {
            let time = out.timestamp();
            writeln!(out, "[{time} {level:<5} {module}] {text}")
        }
    }
}

fn escape_controls(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() {
            true => escaped.extend(c.escape_default()),
            false => escaped.push(c),
        }
    }
    escaped
}

/// The priority of syslog ([RFC 5424 §6.2.1](https://www.rfc-editor.org/rfc/rfc5424#section-6.2.1)) as sd-daemon(3) writes it.
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

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(
            escape_controls("a\nb\u{1b}[31m\u{85}é"),
            "a\\nb\\u{1b}[31m\\u{85}é"
        );
    }
}
