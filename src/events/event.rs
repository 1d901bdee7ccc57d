//! The events and their fields. Serialized, they are the fields of a line in JSON; as text, the
//! line of the log behind "who". docs/events.md has them as a table.

use log::Level;
use serde::{Serialize, Serializer};
use std::fmt::{self, Display, Formatter};
use std::net::SocketAddr;
use std::time::Duration;

/// What happened. Sizes are in bytes. Paths begin at the user's home, and texts that clients send
/// are cut after 1,024 characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// The server accepts connections. Told for each listener; a server that is only given streams
    /// tells it before the first one.
    #[non_exhaustive]
    ServerStarted {
        /// Where it listens, with the real port; `None` for streams.
        address: Option<SocketAddr>,
    },
    /// The server has shut down: every session has ended, and no transfer is left, unless a store
    /// does not answer. The log then says how many are.
    ServerStopped,
    /// A client has connected, and was admitted.
    ConnectionOpened,
    /// A connection was closed before it could log in.
    #[non_exhaustive]
    ConnectionRefused {
        /// Why.
        reason: ConnectionRefusal,
        /// What is wrong with a PROXY header.
        error: Option<String>,
    },
    /// A connection that was admitted has ended.
    #[non_exhaustive]
    ConnectionEnded {
        /// Who ended it, and why.
        reason: ConnectionEnd,
        /// Time since it was admitted.
        #[serde(serialize_with = "as_seconds")]
        duration: Duration,
    },
    /// A client has logged in.
    #[non_exhaustive]
    LoginAccepted {
        /// With what.
        #[serde(flatten)]
        credential: Credential,
    },
    /// A client has not logged in with this credential. A key that is only offered has no event.
    #[non_exhaustive]
    LoginRefused {
        /// The name that the client gave. It may be anything.
        name: String,
        /// With what.
        #[serde(flatten)]
        credential: Credential,
        /// Why.
        reason: LoginRefusal,
    },
    /// A connection ends whose client has not logged in. Not told if the server has ended it for
    /// a reason of its own, such as [`ConnectionEnd::Evicted`]: `ConnectionEnded` says that.
    NoLogin(NoLogin),
    /// Client and server have no algorithm of some kind in common, and the connection ends.
    NoCommonAlgorithm(NoCommonAlgorithm),
    /// An SFTP session has begun. A connection may have several.
    SessionStarted,
    /// An SFTP session has ended.
    #[non_exhaustive]
    SessionEnded {
        /// Why.
        reason: SessionEnd,
        /// The reason in words.
        text: String,
        /// Time since its start.
        #[serde(serialize_with = "as_seconds")]
        duration: Duration,
    },
    /// A client asked for more than SFTP.
    #[non_exhaustive]
    CommandRefused {
        /// The beginning of the command; `None` for a shell.
        command: Option<String>,
    },
    /// A file was opened. `Read` or `Written` follows at its end.
    #[non_exhaustive]
    Opened {
        /// Path of the file.
        path: String,
        /// The flag READ.
        read: bool,
        /// One of WRITE, APPEND, CREATE and TRUNC: the file is an upload, and `Written` follows.
        write: bool,
        /// The flag APPEND.
        append: bool,
        /// The flag CREATE.
        create: bool,
        /// The flag TRUNC.
        truncate: bool,
        /// The flag EXCL.
        exclusive: bool,
        /// The size in the attributes of OPEN, which few clients send.
        declared_size: Option<u64>,
    },
    /// A file that was open for reading is closed.
    Read(Read),
    /// A file that was open for writing is closed, or its client is gone. Then it may be told after
    /// `ConnectionEnded`: the upload is aborted first.
    Written(Written),
    /// A directory was listed to its end.
    #[non_exhaustive]
    Listed {
        /// Path of the directory.
        path: String,
        /// Names in it, without `.` and `..`.
        entries: u64,
    },
    /// A file was removed.
    #[non_exhaustive]
    Removed {
        /// Path of the file.
        path: String,
        /// Key of its object.
        key: String,
    },
    /// A file or a directory was renamed.
    #[non_exhaustive]
    Renamed {
        /// Path that it had.
        from: String,
        /// Path that it has now.
        to: String,
        /// Key of the object of that path. The keys in a directory begin with it and a slash.
        from_key: String,
        /// Key of the object now.
        to_key: String,
        /// Whether a file of that path was replaced (`posix-rename@openssh.com`).
        replaced: bool,
    },
    /// A directory was made.
    #[non_exhaustive]
    DirectoryMade {
        /// Path of the directory.
        path: String,
    },
    /// A directory was removed.
    #[non_exhaustive]
    DirectoryRemoved {
        /// Path of the directory.
        path: String,
    },
    /// The size of a file was set that was not open (SETSTAT).
    #[non_exhaustive]
    SizeSet {
        /// Path of the file.
        path: String,
        /// Key of its object.
        key: String,
        /// Its size now.
        size: u64,
    },
    /// A request that names a file or a directory failed. A `stat` of a missing name has no event,
    /// because clients send many of them, and a failed READ or WRITE is in the event of its
    /// transfer.
    RequestFailed(FailedRequest),
    /// A multipart upload was given up, and the store has removed its parts.
    #[non_exhaustive]
    UploadAborted {
        /// Key of the object that it would have become.
        key: String,
        /// As the store calls it.
        upload_id: String,
    },
    /// A multipart upload was given up, but could not be aborted: its parts stay in the store and
    /// are billed.
    #[non_exhaustive]
    UploadLeft {
        /// Key of the object that it would have become.
        key: String,
        /// As the store calls it.
        upload_id: String,
        /// Why not.
        error: String,
    },
    /// A multipart upload that an earlier server left behind was aborted.
    #[non_exhaustive]
    AbandonedUploadAborted {
        /// Key of the object that it would have become.
        key: String,
        /// As the store calls it.
        upload_id: String,
        /// Parts that it had.
        parts: usize,
    },
}

/// What a client logs in with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Credential {
    /// Its kind.
    pub method: LoginMethod,
    /// Of the key: `SHA256:…`.
    pub fingerprint: Option<String>,
    /// Key ID of the certificate.
    pub key_id: Option<String>,
}

/// A client that has not logged in, and what it has tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct NoLogin {
    /// The last user name that the client gave. It may be anything.
    pub name: Option<String>,
    /// Fingerprints of the keys that it offered, the first eight: `SHA256:…`.
    pub keys: Vec<String>,
    /// Passwords that it tried.
    pub passwords: u32,
    /// Why it has not logged in.
    pub reason: LoginRefusal,
    /// The client's software: its identification string.
    pub client: Option<String>,
}

/// An offer of a client of which the server has nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct NoCommonAlgorithm {
    /// What was to be agreed on.
    pub kind: AlgorithmKind,
    /// The client's software: its identification string.
    pub client: Option<String>,
    /// What it offers, the first twenty names.
    pub offered: Vec<String>,
    /// The [`Algorithms`](crate::server::Algorithms) that would have something in common with
    /// it, as `--algorithms` names them.
    pub algorithms: Option<String>,
}

/// What client and server have to agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AlgorithmKind {
    /// Key exchange.
    KeyExchange,
    /// Type of the host key, and its signature.
    HostKey,
    /// Cipher.
    Cipher,
    /// Message authentication code.
    Mac,
    /// Compression.
    Compression,
}

/// A file that was read, from OPEN to CLOSE.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Read {
    /// Path of the file.
    pub path: String,
    /// Key of its object.
    pub key: String,
    /// Bytes sent. A client may stop in the middle of a file.
    pub bytes: u64,
    /// Size of the file.
    pub size: u64,
    /// GET requests to the store.
    pub requests: u64,
    /// Time since OPEN.
    #[serde(serialize_with = "as_seconds")]
    pub duration: Duration,
    /// `Ok` or `Failed`.
    pub result: TransferResult,
    /// The last failure.
    pub error: Option<String>,
    /// ETag of the version that was read.
    pub etag: String,
}

/// A file that was written, from OPEN to CLOSE.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Written {
    /// Path of the file.
    pub path: String,
    /// Key of its object.
    pub key: String,
    /// Bytes received.
    pub bytes: u64,
    /// Parts of a multipart upload; 0 for a file that was stored with one request.
    pub parts: u32,
    /// Time since OPEN.
    #[serde(serialize_with = "as_seconds")]
    pub duration: Duration,
    /// After `Ok` the file is stored. After another one it is not, unless the error says that the
    /// store did not say clearly.
    pub result: TransferResult,
    /// Why it failed.
    pub error: Option<String>,
    /// ETag of the object that was stored.
    pub etag: Option<String>,
    /// The size in the attributes of OPEN, which few clients send.
    pub declared_size: Option<u64>,
}

/// A request that failed, and what it named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct FailedRequest {
    /// Which request.
    pub request: RequestKind,
    /// The path as the client sent it.
    pub path: String,
    /// The other path of a rename.
    pub to: Option<String>,
    /// The size to be set.
    pub size: Option<u64>,
    /// The code that the client got.
    pub status: Status,
    /// The text that the client got.
    pub error: String,
}

/// Why a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ConnectionRefusal {
    /// The limit on connections is reached.
    Full,
    /// Too many connections have not logged in.
    Unauthenticated,
    /// The process has no file descriptor for a connection that waits. Told for each try, five a
    /// second.
    Descriptors,
    /// A load balancer sent no valid PROXY header.
    ProxyHeader,
}

impl Display for ConnectionRefusal {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ConnectionRefusal::Full => "all sessions are open (--max-sessions)",
            ConnectionRefusal::Unauthenticated => TOO_MANY_UNAUTHENTICATED,
            ConnectionRefusal::Descriptors => "no file descriptor is left",
            ConnectionRefusal::ProxyHeader => "invalid PROXY header",
        })
    }
}

const TOO_MANY_UNAUTHENTICATED: &str = "too many connections that have not logged in";
/// For the client too.
pub(super) const TOO_MANY_OF_USER: &str =
    "too many connections of this user: close some, or try again later";
const SHUTTING_DOWN: &str = "the server is shutting down";

/// Why a connection has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ConnectionEnd {
    /// The client, or the network between, has ended it.
    Closed,
    /// The same, of a client that has logged in and had no session.
    NoSession,
    /// The client does not speak SSH, or not in time.
    NoSsh,
    /// Client and server have no algorithms in common.
    NoCommonAlgorithm,
    /// The client did not log in in time.
    LoginTimeout,
    /// It has made room for another one: too many have not logged in.
    Evicted,
    /// The application has dropped the future of `serve_stream`.
    Dropped,
    /// The application's `Auth` wants no login of the client.
    Rejected,
    /// paramiko tries another credential, which it would wait for in vain.
    SecondCredential,
    /// Its client has opened too many channels, one after the other.
    ManyChannels,
    /// Its user has too many connections.
    UserLimit,
    /// It had no session for too long.
    Unused,
    /// The server shuts down.
    Shutdown,
}

/// As the client reads it, if it does.
impl Display for ConnectionEnd {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ConnectionEnd::Closed => "closed by the client",
            ConnectionEnd::NoSession => "closed by the client, without a session",
            ConnectionEnd::NoSsh => "no SSH",
            ConnectionEnd::NoCommonAlgorithm => "no algorithms in common",
            ConnectionEnd::LoginTimeout => "no login in time",
            ConnectionEnd::Evicted => TOO_MANY_UNAUTHENTICATED,
            ConnectionEnd::Dropped => "dropped by the application",
            ConnectionEnd::Rejected => "this server takes no login from you",
            ConnectionEnd::SecondCredential => {
                "this server checks one credential a connection for paramiko: connect with look_for_keys=False and \
                 allow_agent=False, or only the right key"
            }
            ConnectionEnd::ManyChannels => {
                "too many channels were opened on this connection: connect again"
            }
            ConnectionEnd::UserLimit => TOO_MANY_OF_USER,
            ConnectionEnd::Unused => "no session for too long",
            ConnectionEnd::Shutdown => SHUTTING_DOWN,
        })
    }
}

/// What a client logs in with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum LoginMethod {
    /// A password.
    Password,
    /// A key, and a signature with it.
    Key,
    /// A certificate for a key, and a signature with that.
    Certificate,
}

impl LoginMethod {
    /// As log, metrics and JSON name it.
    pub fn as_str(self) -> &'static str {
        match self {
            LoginMethod::Password => "password",
            LoginMethod::Key => "key",
            LoginMethod::Certificate => "certificate",
        }
    }

    fn refusal_level(self) -> Level {
        match self {
            LoginMethod::Password | LoginMethod::Key => Level::Warn,
            // Many clients have one, and log in with the key alone next.
            LoginMethod::Certificate => Level::Info,
        }
    }
}

/// Why a login is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum LoginRefusal {
    /// The credential is not one of this user.
    Wrong,
    /// There is no such user. An application's `Auth` may say [`Wrong`](Self::Wrong) instead.
    UnknownUser,
    /// The credential is right, and the user is disabled.
    Disabled,
    /// The client signs with SHA-1, as old ones do with RSA keys.
    Sha1Signature,
    /// The client has offered neither a key nor a password.
    NothingOffered,
    /// The client has offered neither in time.
    LoginTimeout,
    /// The password was not checked: too many failed logins of this user from this address.
    UserPenalty,
    /// The password was not checked: too many failed logins from this address.
    AddressPenalty,
    /// The credential is right, but the user has too many connections.
    UserLimit,
    /// The application's `Auth` wants no login of the client, and the connection ends.
    Disconnected,
    /// The application's `Auth` has accepted it with an account that can't be used. The log says
    /// why.
    InvalidAccount,
    /// The application's `Auth` panicked.
    Panicked,
}

impl LoginRefusal {
    /// As metrics and JSON name it.
    pub fn as_str(self) -> &'static str {
        match self {
            LoginRefusal::Wrong => "wrong",
            LoginRefusal::UnknownUser => "unknown_user",
            LoginRefusal::Disabled => "disabled",
            LoginRefusal::Sha1Signature => "sha1_signature",
            LoginRefusal::NothingOffered => "nothing_offered",
            LoginRefusal::LoginTimeout => "login_timeout",
            LoginRefusal::UserPenalty => "user_penalty",
            LoginRefusal::AddressPenalty => "address_penalty",
            LoginRefusal::UserLimit => "user_limit",
            LoginRefusal::Disconnected => "disconnected",
            LoginRefusal::InvalidAccount => "invalid_account",
            LoginRefusal::Panicked => "panicked",
        }
    }
}

/// Why a session has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SessionEnd {
    /// The client has closed it, or is gone.
    Closed,
    /// No request and no reply for too long.
    Idle,
    /// The server shuts down, and nothing was open any more.
    Shutdown,
    /// The server shuts down, and transfers were still open.
    CutOff,
    /// The client sent what is not SFTP.
    Protocol,
    /// The client does not read its replies.
    Ignored,
}

/// How a transfer has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TransferResult {
    /// Without a failure.
    Ok,
    /// The client got an error.
    Failed,
    /// The client was gone before CLOSE, or the server shut down, and nothing is stored.
    CutOff,
}

impl TransferResult {
    /// As metrics and JSON name it.
    pub fn as_str(self) -> &'static str {
        match self {
            TransferResult::Ok => "ok",
            TransferResult::Failed => "failed",
            TransferResult::CutOff => "cut_off",
        }
    }
}

/// Which request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RequestKind {
    /// OPEN.
    Open,
    /// OPENDIR or READDIR.
    List,
    /// STAT or LSTAT.
    Stat,
    /// SETSTAT without a size.
    Setstat,
    /// SETSTAT with a size.
    SetSize,
    /// REMOVE.
    Remove,
    /// RENAME or `posix-rename@openssh.com`.
    Rename,
    /// MKDIR.
    Mkdir,
    /// RMDIR.
    Rmdir,
}

/// The status of a failed request, as SFTP has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Status {
    /// SSH_FX_NO_SUCH_FILE.
    NoSuchFile,
    /// SSH_FX_PERMISSION_DENIED.
    PermissionDenied,
    /// SSH_FX_FAILURE.
    Failure,
    /// SSH_FX_BAD_MESSAGE.
    BadMessage,
    /// SSH_FX_OP_UNSUPPORTED.
    OpUnsupported,
}

fn as_seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    // More digits than microseconds mean nothing.
    let micros = duration.as_micros() as f64;
    serializer.serialize_f64(micros / 1e6)
}

impl Event {
    /// How much it matters to an operator: warnings need a look, and debug is for what happens all
    /// the time.
    pub fn level(&self) -> Level {
        match self {
            Event::ServerStarted { .. }
            | Event::ServerStopped
            | Event::LoginAccepted { .. }
            | Event::NoLogin(_)
            | Event::NoCommonAlgorithm(_)
            | Event::Removed { .. }
            | Event::Renamed { .. }
            | Event::DirectoryMade { .. }
            | Event::DirectoryRemoved { .. }
            | Event::SizeSet { .. }
            | Event::AbandonedUploadAborted { .. } => Level::Info,
            Event::ConnectionOpened
            | Event::SessionStarted
            | Event::Opened { .. }
            | Event::Listed { .. }
            | Event::UploadAborted { .. } => Level::Debug,
            Event::CommandRefused { .. } | Event::UploadLeft { .. } => Level::Warn,
            Event::LoginRefused { credential, .. } => credential.method.refusal_level(),
            Event::ConnectionRefused { reason, .. } => reason.level(),
            Event::ConnectionEnded { reason, .. } => reason.level(),
            Event::SessionEnded { reason, .. } => reason.level(),
            Event::Read(read) => read.result.level(),
            Event::Written(written) => written.result.level(),
            Event::RequestFailed(failed) => failed.status.level(),
        }
    }
}

impl ConnectionRefusal {
    fn level(self) -> Level {
        match self {
            // The server logs a line a minute about it.
            ConnectionRefusal::Descriptors => Level::Debug,
            ConnectionRefusal::Full
            | ConnectionRefusal::Unauthenticated
            | ConnectionRefusal::ProxyHeader => Level::Warn,
        }
    }
}

impl ConnectionEnd {
    fn level(self) -> Level {
        match self {
            ConnectionEnd::Closed | ConnectionEnd::NoSsh => Level::Debug,
            // The login, or the attempt, has a line already.
            ConnectionEnd::LoginTimeout
            | ConnectionEnd::NoCommonAlgorithm
            | ConnectionEnd::UserLimit => Level::Debug,
            ConnectionEnd::NoSession
            | ConnectionEnd::Dropped
            | ConnectionEnd::ManyChannels
            | ConnectionEnd::Unused
            | ConnectionEnd::Shutdown => Level::Info,
            ConnectionEnd::Rejected | ConnectionEnd::SecondCredential | ConnectionEnd::Evicted => {
                Level::Warn
            }
        }
    }
}

impl SessionEnd {
    fn level(self) -> Level {
        match self {
            SessionEnd::CutOff => Level::Warn,
            SessionEnd::Closed
            | SessionEnd::Idle
            | SessionEnd::Shutdown
            | SessionEnd::Protocol
            | SessionEnd::Ignored => Level::Info,
        }
    }
}

impl TransferResult {
    fn level(self) -> Level {
        match self {
            TransferResult::Ok => Level::Info,
            TransferResult::Failed | TransferResult::CutOff => Level::Warn,
        }
    }
}

impl Status {
    fn level(self) -> Level {
        match self {
            // A missing name is the client's own affair.
            Status::NoSuchFile => Level::Info,
            Status::PermissionDenied
            | Status::Failure
            | Status::BadMessage
            | Status::OpUnsupported => Level::Warn,
        }
    }
}
