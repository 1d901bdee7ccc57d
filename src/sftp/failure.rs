//! What a request comes to: a reply, or a status with a sentence for the client.

use crate::Panicked;
use crate::path::PathError;
use crate::store::StoreError;
use crate::transfer::UploadError;
use crate::vfs::VfsError;
use russh_sftp::protocol::{Packet, StatusCode};

/// A reply that carries no file data.
pub(super) type SmallReply = Result<Packet, Failure>;

/// What a request comes to.
pub(super) type Outcome = Result<Answer, Failure>;

/// The answer to a request that did not fail.
pub(super) enum Answer {
    Now(Packet),
    /// Another task answers.
    Later,
}

impl Answer {
    pub fn now(packet: impl Into<Packet>) -> Answer {
        Answer::Now(packet.into())
    }

    /// The status OK.
    pub fn ok(id: u32) -> Answer {
        Answer::Now(ok_status(id))
    }
}

/// SSH_FXP_STATUS with the code OK.
pub(super) fn ok_status(id: u32) -> Packet {
    Packet::status(id, StatusCode::Ok, status_words(StatusCode::Ok), "en")
}

/// A failed request.
pub(super) struct Failure {
    pub code: StatusCode,
    /// What the client is told behind the words of the code; may be empty.
    pub reason: String,
}

impl Failure {
    pub fn new(code: StatusCode, reason: impl Into<String>) -> Failure {
        Failure {
            code,
            reason: reason.into(),
        }
    }

    /// A failure whose code says it all.
    pub fn bare(code: StatusCode) -> Failure {
        Failure::new(code, "")
    }

    /// What the user's access, or the way the file was opened, does not allow.
    pub fn denied(why: &str) -> Failure {
        Failure::new(StatusCode::PermissionDenied, why)
    }

    /// A handle that is not open, or of the wrong kind.
    pub fn bad_handle() -> Failure {
        Failure::new(StatusCode::Failure, "no such handle is open")
    }

    /// A path that can't name anything new.
    pub fn of_new_name(error: PathError) -> Failure {
        Failure::new(StatusCode::Failure, error.to_string())
    }

    /// What the client reads: first the words of OpenSSH's `sftp-server.c`, which programs look
    /// for, then the reason.
    pub fn text(&self) -> String {
        let words = status_words(self.code);
        match self.reason.as_str() {
            "" => words.to_owned(),
            reason => format!("{words}: {reason}"),
        }
    }
}

/// The words of a status, as OpenSSH's server has them.
fn status_words(code: StatusCode) -> &'static str {
    match code {
        StatusCode::Ok => "Success",
        StatusCode::Eof => "End of file",
        StatusCode::NoSuchFile => "No such file",
        StatusCode::PermissionDenied => "Permission denied",
        StatusCode::Failure => "Failure",
        StatusCode::BadMessage => "Bad message",
        StatusCode::NoConnection => "No connection",
        StatusCode::ConnectionLost => "Connection lost",
        StatusCode::OpUnsupported => "Operation unsupported",
    }
}

impl From<VfsError> for Failure {
    fn from(error: VfsError) -> Failure {
        match &error {
            VfsError::NotFound => Failure::bare(StatusCode::NoSuchFile),
            VfsError::Path(error) => Failure::from(*error),
            VfsError::Refused(why) => Failure::new(StatusCode::Failure, *why),
            VfsError::Unsupported(why) => Failure::new(StatusCode::OpUnsupported, *why),
            VfsError::Store(StoreError::NotFound) => Failure::bare(StatusCode::NoSuchFile),
            VfsError::Store(error) => Failure::new(status_of_store(error), error.to_string()),
        }
    }
}

impl From<Panicked> for Failure {
    fn from(panicked: Panicked) -> Failure {
        Failure::new(StatusCode::Failure, panicked.to_string())
    }
}

impl From<PathError> for Failure {
    fn from(error: PathError) -> Failure {
        let code = match error {
            // Nothing has such a name.
            PathError::NotText => StatusCode::NoSuchFile,
            PathError::TooLong | PathError::IsHome | PathError::BadHome | PathError::LongHome => {
                StatusCode::Failure
            }
        };
        Failure::new(code, error.to_string())
    }
}

impl From<UploadError> for Failure {
    fn from(error: UploadError) -> Failure {
        let code = match &error {
            UploadError::Store(error) => status_of_store(error),
            UploadError::SizeTooSmall { .. } | UploadError::SizeTooLarge => {
                StatusCode::OpUnsupported
            }
            UploadError::Buffer(_)
            | UploadError::HolesTooLarge
            | UploadError::OnItsWay { .. }
            | UploadError::PartTooLarge { .. }
            | UploadError::NoMemory { .. }
            | UploadError::PartsMissing { .. }
            | UploadError::CutOff
            | UploadError::Removed
            | UploadError::Panicked(_) => StatusCode::Failure,
        };
        Failure::new(code, error.to_string())
    }
}

/// The code for a failure of the store in the middle of an operation. The client did not ask for
/// the key that may be missing there.
fn status_of_store(error: &StoreError) -> StatusCode {
    match error {
        StoreError::Forbidden(_) => StatusCode::PermissionDenied,
        StoreError::NotFound
        | StoreError::NoSuchBucket
        | StoreError::Precondition
        | StoreError::TooLarge
        | StoreError::Unsupported
        | StoreError::Unknown(_)
        | StoreError::Other(_) => StatusCode::Failure,
    }
}
