//! The log for people: a line an event.

use super::event::TOO_MANY_OF_USER;
use super::{
    AlgorithmKind, ConnectionEnd, ConnectionRefusal, Credential, Event, Events, FailedRequest,
    LoginRefusal, NoCommonAlgorithm, NoLogin, Read, RequestKind, SessionEnd, TransferResult, Who,
    Written,
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

/// A number of things: what one of them is called, and several.
pub struct Plural(pub u64, pub &'static str, pub &'static str);

impl Display for Plural {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Plural(count, one, several) = self;
        match count {
            1 => write!(f, "1 {one}"),
            _ => write!(f, "{count} {several}"),
        }
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
            Event::NoLogin(no_login) => write!(f, "{no_login}"),
            Event::NoCommonAlgorithm(found) => write!(f, "{found}"),
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
            Event::Listed { path, entries } => {
                write!(f, "list {path:?} {}", Plural(*entries, "entry", "entries"))
            }
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
        ConnectionEnd::Closed
        | ConnectionEnd::NoSession
        | ConnectionEnd::NoSsh
        | ConnectionEnd::NoCommonAlgorithm => write!(f, "connection ended: {reason}"),
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
    let what = match reason {
        LoginRefusal::Wrong => return write!(f, "login failed: user {name:?}, {credential}"),
        LoginRefusal::UserPenalty | LoginRefusal::AddressPenalty => "login not looked at",
        LoginRefusal::UserLimit => "login refused",
        LoginRefusal::UnknownUser
        | LoginRefusal::Disabled
        | LoginRefusal::Sha1Signature
        | LoginRefusal::NothingOffered
        | LoginRefusal::LoginTimeout
        | LoginRefusal::Disconnected
        | LoginRefusal::InvalidAccount
        | LoginRefusal::Panicked => "login failed",
    };
    write!(
        f,
        "{what}: user {name:?}, {credential}: {}",
        explain(reason)
    )
}

fn explain(reason: LoginRefusal) -> &'static str {
    match reason {
        LoginRefusal::Wrong => "the user has no such key or password",
        LoginRefusal::UnknownUser => "there is no such user",
        LoginRefusal::Disabled => "the user is disabled (`sftpd users enable` ends that)",
        LoginRefusal::Sha1Signature => {
            "the client signs with SHA-1 (ssh-rsa): use a newer client, or an ed25519 key"
        }
        LoginRefusal::NothingOffered => "it offered neither a key nor a password",
        LoginRefusal::LoginTimeout => "no login in time",
        LoginRefusal::UserPenalty => "too many failed logins of this user from this address",
        LoginRefusal::AddressPenalty => "too many failed logins from this address",
        LoginRefusal::UserLimit => TOO_MANY_OF_USER,
        LoginRefusal::Disconnected => "no login is wanted of this client",
        LoginRefusal::InvalidAccount => "the account can't be used",
        LoginRefusal::Panicked => "the application's login panicked",
    }
}

impl Display for NoLogin {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "no login: ")?;
        match &self.name {
            Some(name) => write!(f, "user {name:?}")?,
            None => write!(f, "no user name")?,
        }
        for key in &self.keys {
            write!(f, ", key {key}")?;
        }
        if self.passwords > 0 {
            let passwords = Plural(self.passwords.into(), "password", "passwords");
            write!(f, ", {passwords}")?;
        }
        write!(f, ": {}", explain(self.reason))?;
        match &self.client {
            Some(client) => write!(f, " ({client})"),
            None => Ok(()),
        }
    }
}

impl Display for NoCommonAlgorithm {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            AlgorithmKind::KeyExchange => "key exchange",
            AlgorithmKind::HostKey => "type of host key",
            AlgorithmKind::Cipher => "cipher",
            AlgorithmKind::Mac => "MAC",
            AlgorithmKind::Compression => "compression",
        };
        let client = self.client.as_deref().unwrap_or("the client");
        let offered = self.offered.join(",");
        write!(f, "no common {kind}: {client} offers {offered}")?;
        match (&self.algorithms, self.kind) {
            (Some(algorithms), _) => write!(f, ": --algorithms {algorithms} has one of them"),
            (None, AlgorithmKind::HostKey) => {
                write!(
                    f,
                    ": use a newer client, or add a key of such a type to --host-keys"
                )
            }
            (None, _) => write!(f, ": use a newer client"),
        }
    }
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
        let requests = Plural(self.requests, "request", "requests");
        let seconds = self.duration.as_secs_f64();
        match &self.error {
            None => write!(f, "get {path:?} {bytes} bytes {requests} {seconds:.3} s"),
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
        let parts = Plural(self.parts.into(), "part", "parts");
        let seconds = self.duration.as_secs_f64();
        match self.result {
            TransferResult::Ok => {
                write!(f, "put {path:?} {bytes} bytes {parts} {seconds:.3} s")
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
    let parts = Plural(parts as u64, "part", "parts");
    write!(
        f,
        "aborted the abandoned multipart upload {upload_id} of {key:?}, {parts}"
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
