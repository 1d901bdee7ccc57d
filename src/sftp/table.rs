//! The table of requests: the name of each, what it needs, and whether it has an effect of its own.
//!
//! The gate that every request passes, the VERSION reply and the decoder of extensions come from
//! here. The match has no catch-all: a new kind of request does not compile without its row.

use super::codec::{ExtendedRequest, Request};
use crate::users::Access;
use russh_sftp::extensions::{EXPAND_PATH, LIMITS, STATVFS};
use russh_sftp::protocol::OpenFlags;

/// Flags of OPEN that make or change a file; paramiko's mode `x` has no WRITE among them.
pub const CHANGES: OpenFlags = OpenFlags::WRITE
    .union(OpenFlags::APPEND)
    .union(OpenFlags::CREATE)
    .union(OpenFlags::TRUNCATE);

/// What a request needs of the user's access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Names, sizes, and handles that are open already.
    Nothing,
    /// The content of files.
    Read,
    /// A change of a file, a directory or a name.
    Write,
}

impl Need {
    /// Does this access allow it?
    pub fn is_met_by(self, access: Access) -> bool {
        match (self, access) {
            (Need::Nothing, Access::ReadWrite | Access::ReadOnly | Access::WriteOnly) => true,
            (Need::Read, Access::ReadWrite | Access::ReadOnly) => true,
            (Need::Read, Access::WriteOnly) => false,
            (Need::Write, Access::ReadWrite | Access::WriteOnly) => true,
            (Need::Write, Access::ReadOnly) => false,
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// As the draft or the extension names it.
    pub name: &'static str,
    pub need: Need,
    /// Does it change anything by itself, if nothing comes after it and its answer is never read?
    pub has_effect: bool,
}

impl Row {
    const fn new(name: &'static str, need: Need, has_effect: bool) -> Row {
        Row {
            name,
            need,
            has_effect,
        }
    }
}

/// The row of a request. What is unknown needs the most.
pub fn find_row(request: &Request) -> Row {
    match request {
        Request::Init => Row::new("INIT", Need::Nothing, false),
        Request::Open(open) if open.pflags.intersects(CHANGES) => {
            Row::new("OPEN", Need::Write, false)
        }
        Request::Open(_) => Row::new("OPEN", Need::Read, false),
        Request::Close(_) => Row::new("CLOSE", Need::Nothing, true),
        Request::Read(_) => Row::new("READ", Need::Read, false),
        Request::Write { .. } => Row::new("WRITE", Need::Write, false),
        Request::Lstat(_) => Row::new("LSTAT", Need::Nothing, false),
        Request::Fstat(_) => Row::new("FSTAT", Need::Nothing, false),
        Request::SetStat(_) => Row::new("SETSTAT", Need::Write, true),
        Request::FSetStat(_) => Row::new("FSETSTAT", Need::Write, false),
        Request::OpenDir(_) => Row::new("OPENDIR", Need::Nothing, false),
        Request::ReadDir(_) => Row::new("READDIR", Need::Nothing, false),
        Request::Remove(_) => Row::new("REMOVE", Need::Write, true),
        Request::MkDir(_) => Row::new("MKDIR", Need::Write, true),
        Request::RmDir(_) => Row::new("RMDIR", Need::Write, true),
        Request::RealPath(_) => Row::new("REALPATH", Need::Nothing, false),
        Request::Stat(_) => Row::new("STAT", Need::Nothing, false),
        Request::Rename(_) => Row::new("RENAME", Need::Write, true),
        Request::ReadLink => Row::new("READLINK", Need::Nothing, false),
        Request::Symlink => Row::new("SYMLINK", Need::Write, false),
        Request::Extended(request) => match request {
            ExtendedRequest::Limits => Row::new(LIMITS, Need::Nothing, false),
            ExtendedRequest::PosixRename { .. } => Row::new(POSIX_RENAME, Need::Write, true),
            ExtendedRequest::Statvfs => Row::new(STATVFS, Need::Nothing, false),
            ExtendedRequest::Fstatvfs { .. } => Row::new(FSTATVFS, Need::Nothing, false),
            ExtendedRequest::ExpandPath { .. } => Row::new(EXPAND_PATH, Need::Nothing, false),
        },
        Request::UnknownExtension => Row::new("unknown extension", Need::Write, false),
        Request::UnknownType(_) => Row::new("unknown type", Need::Nothing, false),
        Request::Malformed => Row::new("malformed request", Need::Nothing, false),
    }
}

/// Extensions that work here, as
/// [OpenSSH's PROTOCOL](https://github.com/openssh/openssh-portable/blob/master/PROTOCOL) describes
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    Limits,
    PosixRename,
    Statvfs,
    Fstatvfs,
    ExpandPath,
}

/// An extension as VERSION announces it.
#[derive(Clone, Copy, Debug)]
pub struct ExtensionRow {
    pub extension: Extension,
    pub name: &'static str,
    pub version: &'static str,
}

impl ExtensionRow {
    const fn new(extension: Extension, name: &'static str, version: &'static str) -> ExtensionRow {
        ExtensionRow {
            extension,
            name,
            version,
        }
    }
}

/// Every extension that is announced and decoded.
pub const EXTENSIONS: [ExtensionRow; 5] = [
    ExtensionRow::new(Extension::Limits, LIMITS, "1"),
    ExtensionRow::new(Extension::PosixRename, POSIX_RENAME, "1"),
    ExtensionRow::new(Extension::Statvfs, STATVFS, "2"),
    ExtensionRow::new(Extension::Fstatvfs, FSTATVFS, "2"),
    ExtensionRow::new(Extension::ExpandPath, EXPAND_PATH, "1"),
];

const POSIX_RENAME: &str = "posix-rename@openssh.com";
const FSTATVFS: &str = "fstatvfs@openssh.com";
