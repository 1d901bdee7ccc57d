//! The log for people: a line an event.

use super::event::TOO_MANY_OF_USER;
use super::{
    ConnectionEnd, ConnectionRefusal, Credential, Event, Events, FailedRequest, LoginRefusal, Read,
    RequestKind, SessionEnd, TransferResult, Who, Written,
};
use std::fmt::{self, Display, Formatter, Write};
use std::net::SocketAddr;
use std::time::Duration;

/// The target of the log's lines about events.
const LOG_TARGET: &str = "sftpd::events";

/// Logs each event as a line of text, through the logger that the process has installed. Control
/// characters are escaped: those of a store's error, for example, can't forge a line.
#[derive(Clone, Copy, Debug, Default)]
pub struct TextLog;

impl Events for TextLog {
    fn event(&self, who: &Who, event: &Event) {
        let level = event.level();
        match who.connection {
            0 => log::log!(target: LOG_TARGET, level, "{}", Escaped(event)),
            _ => log::log!(target: LOG_TARGET, level, "{}: {}", Escaped(who), Escaped(event)),
        }
    }
}

/// Shows a text with its control characters escaped. Escaped twice it is the same.
pub struct Escaped<T>(pub T);

impl<T: Display> Display for Escaped<T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(EscapeControls(f), "{}", self.0)
    }
}

/// Escapes what is written through it.
struct EscapeControls<'a, 'b>(&'a mut Formatter<'b>);

impl Write for EscapeControls<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            self.write_char(c)?;
        }
        Ok(())
    }

    fn write_char(&mut self, c: char) -> fmt::Result {
        if c.is_control() {
            write!(self.0, "{}", c.escape_default())
        } else {
            self.0.write_char(c)
        }
    }
}

/// The line of the log, without who.
impl Display for Event {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Event::ServerStarted { address } => write_start(f, *address),
            Event::ServerStopped => write!(f, "stopped"),
            Event::ConnectionOpened => write!(f, "connected"),
            Event::ConnectionRefused { reason, error } => write_refusal(f, *reason, error),
            Event::ConnectionEnded { reason, .. } => write_connection_end(f, *reason),
            Event::LoginAccepted { credential } => write!(f, "logged in with {credential}"),
            Event::LoginRefused {
                name,
                credential,
                reason,
            } => write_login_refusal(f, name, credential, *reason),
            Event::SessionStarted => write!(f, "session started"),
            Event::SessionEnded {
                reason,
                text,
                duration,
            } => write_session_end(f, *reason, text, *duration),
            Event::CommandRefused { command } => write_command(f, command),
            Event::Opened { path, write, .. } => write_opened(f, path, *write),
            Event::Read(read) => write!(f, "{read}"),
            Event::Written(written) => write!(f, "{written}"),
            Event::Listed { path, entries } => write!(f, "list {path:?} {entries} entries"),
            Event::Removed { path, .. } => write!(f, "remove {path:?}"),
            Event::Renamed { from, to, .. } => write!(f, "rename {from:?} to {to:?}"),
            Event::DirectoryMade { path } => write!(f, "mkdir {path:?}"),
            Event::DirectoryRemoved { path } => write!(f, "rmdir {path:?}"),
            Event::SizeSet { path, size, .. } => write!(f, "set size {size} of {path:?}"),
            Event::RequestFailed(failed) => write!(f, "{failed}"),
            Event::UploadAborted { key, upload_id } => {
                write!(f, "aborted the multipart upload {upload_id} of {key:?}")
            }
            Event::UploadLeft {
                key,
                upload_id,
                error,
            } => write_left(f, key, upload_id, error),
            Event::AbandonedUploadAborted {
                key,
                upload_id,
                parts,
            } => write_abandoned(f, key, upload_id, *parts),
        }
    }
}

fn write_start(f: &mut Formatter<'_>, address: Option<SocketAddr>) -> fmt::Result {
    match address {
        Some(address) => write!(f, "listening on {address}"),
        None => write!(f, "listening"),
    }
}

fn write_refusal(
    f: &mut Formatter<'_>,
    reason: ConnectionRefusal,
    error: &Option<String>,
) -> fmt::Result {
    match error {
        Some(error) => write!(f, "refused: {reason}: {error}"),
        None => write!(f, "refused: {reason}"),
    }
}

fn write_connection_end(f: &mut Formatter<'_>, reason: ConnectionEnd) -> fmt::Result {
    match reason {
        ConnectionEnd::Closed | ConnectionEnd::NoSsh => write!(f, "connection ended: {reason}"),
        ConnectionEnd::LoginTimeout
        | ConnectionEnd::Evicted
        | ConnectionEnd::Dropped
        | ConnectionEnd::Rejected
        | ConnectionEnd::SecondCredential
        | ConnectionEnd::ManyChannels
        | ConnectionEnd::UserLimit
        | ConnectionEnd::Unused
        | ConnectionEnd::Shutdown => write!(f, "disconnected: {reason}"),
    }
}

impl Display for Credential {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let method = self.method.as_str();
        match (&self.fingerprint, &self.key_id) {
            (Some(key), Some(id)) => write!(f, "{method} {id:?} of key {key}"),
            (Some(key), None) => write!(f, "{method} {key}"),
            (None, _) => write!(f, "{method}"),
        }
    }
}

fn write_login_refusal(
    f: &mut Formatter<'_>,
    name: &str,
    credential: &Credential,
    reason: LoginRefusal,
) -> fmt::Result {
    let (what, why) = match reason {
        LoginRefusal::Wrong => return write!(f, "login failed: user {name:?}, {credential}"),
        LoginRefusal::UserPenalty => (
            "login not looked at",
            "too many failed logins of this user from this address",
        ),
        LoginRefusal::AddressPenalty => (
            "login not looked at",
            "too many failed logins from this address",
        ),
        LoginRefusal::UserLimit => ("login refused", TOO_MANY_OF_USER),
        LoginRefusal::Disconnected => ("login failed", "no login is wanted of this client"),
        LoginRefusal::InvalidAccount => ("login failed", "the account can't be used"),
        LoginRefusal::Panicked => ("login failed", "the application's login panicked"),
    };
    write!(f, "{what}: user {name:?}, {credential}: {why}")
}

fn write_session_end(
    f: &mut Formatter<'_>,
    reason: SessionEnd,
    text: &str,
    duration: Duration,
) -> fmt::Result {
    let seconds = duration.as_secs_f64();
    match reason {
        SessionEnd::CutOff => write!(f, "session cut off after {seconds:.1} s: {text}"),
        SessionEnd::Closed
        | SessionEnd::Idle
        | SessionEnd::Shutdown
        | SessionEnd::Protocol
        | SessionEnd::Ignored => write!(f, "session ended after {seconds:.1} s: {text}"),
    }
}

fn write_command(f: &mut Formatter<'_>, command: &Option<String>) -> fmt::Result {
    match command {
        Some(command) => write!(f, "refused the command {command:?}"),
        None => write!(f, "refused a shell"),
    }
}

fn write_opened(f: &mut Formatter<'_>, path: &str, is_upload: bool) -> fmt::Result {
    match is_upload {
        true => write!(f, "opened {path:?} for writing"),
        false => write!(f, "opened {path:?} for reading"),
    }
}

impl Display for Read {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let path = &self.path;
        let bytes = self.bytes;
        let requests = self.requests;
        let seconds = self.duration.as_secs_f64();
        match &self.error {
            None => write!(
                f,
                "get {path:?} {bytes} bytes {requests} requests {seconds:.3} s"
            ),
            Some(error) => write!(
                f,
                "get {path:?} failed after {bytes} bytes {seconds:.3} s: {error}"
            ),
        }
    }
}

impl Display for Written {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let path = &self.path;
        let bytes = self.bytes;
        let parts = self.parts;
        let seconds = self.duration.as_secs_f64();
        match self.result {
            TransferResult::Ok => {
                write!(f, "put {path:?} {bytes} bytes {parts} parts {seconds:.3} s")
            }
            TransferResult::Failed => {
                let error = self.error.as_deref().unwrap_or_default();
                write!(
                    f,
                    "put {path:?} failed after {bytes} bytes {seconds:.3} s: {error}"
                )
            }
            TransferResult::CutOff => write!(
                f,
                "put {path:?} forced to end after {bytes} bytes {seconds:.3} s: nothing was stored"
            ),
        }
    }
}

impl Display for FailedRequest {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let path = &self.path;
        match (&self.to, self.size) {
            (Some(to), _) => write!(f, "rename {path:?} to {to:?}")?,
            (None, Some(size)) => write!(f, "set size {size} of {path:?}")?,
            (None, None) => write!(f, "{} {path:?}", request_name(self.request))?,
        }
        write!(f, " failed: {}", self.error)
    }
}

fn request_name(request: RequestKind) -> &'static str {
    match request {
        RequestKind::Open => "open",
        RequestKind::List => "list",
        RequestKind::Stat => "stat",
        RequestKind::Setstat => "setstat",
        RequestKind::SetSize => "set size of",
        RequestKind::Remove => "remove",
        RequestKind::Rename => "rename",
        RequestKind::Mkdir => "mkdir",
        RequestKind::Rmdir => "rmdir",
    }
}

fn write_left(f: &mut Formatter<'_>, key: &str, upload_id: &str, error: &str) -> fmt::Result {
    write!(
        f,
        "multipart upload {upload_id} of {key:?} could not be aborted and stays: {error}"
    )
}

fn write_abandoned(f: &mut Formatter<'_>, key: &str, upload_id: &str, parts: usize) -> fmt::Result {
    write!(
        f,
        "aborted the abandoned multipart upload {upload_id} of {key:?}, {parts} parts"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Teller;
    use std::sync::{Arc, Mutex};

    /// Keeps the lines about events.
    static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

    struct KeepLines;

    impl log::Log for KeepLines {
        fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
            metadata.target() == LOG_TARGET
        }

        fn log(&self, record: &log::Record<'_>) {
            if self.enabled(record.metadata()) {
                LINES.lock().unwrap().push(record.args().to_string());
            }
        }

        fn flush(&self) {}
    }

    #[test]
    fn control_characters_are_escaped() {
        let escaped = "a\\nb\\u{1b}[31m\\u{85}é";
        assert_eq!(Escaped("a\nb\u{1b}[31m\u{85}é").to_string(), escaped);
        assert_eq!(Escaped(escaped).to_string(), escaped);
    }

    #[test]
    fn an_error_of_a_store_is_one_line_for_every_logger() {
        log::set_logger(&KeepLines).unwrap();
        log::set_max_level(log::LevelFilter::Trace);
        let events = Teller::new(vec![Arc::new(TextLog)]);
        events.tell(Event::UploadLeft {
            key: "alice/f".to_owned(),
            upload_id: "7\r".to_owned(),
            error: "gone\n[INFO] alice: logged in".to_owned(),
        });
        let lines = LINES.lock().unwrap();
        let expected = "multipart upload 7\\r of \"alice/f\" could not be aborted and stays: \
            gone\\n[INFO] alice: logged in";
        assert_eq!(*lines, [expected]);
    }
}
