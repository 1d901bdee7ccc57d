//! The log in JSON: one object a line, for programs.

use super::{Event, Events, Who};
use serde::Serialize;
use std::net::SocketAddr;
use std::time::SystemTime;

/// The target of these lines. No module has this name, so all that is logged with it is JSON.
pub const JSON_TARGET: &str = "sftpd::events::json";

/// Logs each event as one JSON object, with the target [`JSON_TARGET`], by which the process's
/// logger knows that it must write the message as it is. Takes the place of
/// [`TextLog`](super::TextLog).
#[derive(Clone, Copy, Debug, Default)]
pub struct JsonLog;

/// See docs/events.md.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    level: &'static str,
    sequence: u64,
    connection: u64,
    peer: Option<SocketAddr>,
    user: Option<&'a str>,
    #[serde(flatten)]
    event: &'a Event,
}

impl Events for JsonLog {
    fn event(&self, who: &Who, event: &Event) {
        let level = event.level();
        if !log::log_enabled!(target: JSON_TARGET, level) {
            return;
        }
        let line = Line {
            time: now(),
            level: level_name(level),
            sequence: who.sequence,
            connection: who.connection,
            peer: who.peer,
            user: who.account.as_ref().map(|account| account.name.as_str()),
            event,
        };
        match serde_json::to_string(&line) {
            Ok(json) => log::log!(target: JSON_TARGET, level, "{json}"),
            Err(error) => log::error!("an event can't be written as JSON: {error}: {event}"),
        }
    }
}

/// A log record that is no event, as a line in JSON.
pub fn record_as_json(record: &log::Record<'_>) -> String {
    #[derive(Serialize)]
    struct Line<'a> {
        time: String,
        level: &'static str,
        event: &'static str,
        target: &'a str,
        message: String,
    }
    let line = Line {
        time: now(),
        level: level_name(record.level()),
        event: "log",
        target: record.target(),
        message: record.args().to_string(),
    };
    // Strings alone can't fail.
    serde_json::to_string(&line).unwrap_or_default()
}

/// RFC 3339 with milliseconds.
fn now() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}

fn level_name(level: log::Level) -> &'static str {
    match level {
        log::Level::Error => "error",
        log::Level::Warn => "warn",
        log::Level::Info => "info",
        log::Level::Debug => "debug",
        log::Level::Trace => "trace",
    }
}
