//! The event of a request that names a file or a directory and fails. What succeeds is told where
//! it is carried out.

use super::codec::{ExtendedRequest, Request};
use super::failure::Failure;
use crate::events::{Event, FailedRequest, RequestKind, Status, Teller, shorten};
use russh_sftp::protocol::StatusCode;

/// What a request asks for, kept for its event.
pub struct Asked {
    request: RequestKind,
    path: String,
    /// The other path of a rename.
    to: Option<String>,
    /// The size to be set.
    size: Option<u64>,
}

impl Asked {
    fn new(request: RequestKind, path: &str) -> Asked {
        Asked {
            request,
            path: shorten(path),
            to: None,
            size: None,
        }
    }

    fn rename(from: &str, to: &str) -> Asked {
        Asked {
            to: Some(shorten(to)),
            ..Asked::new(RequestKind::Rename, from)
        }
    }

    fn set_size(path: &str, size: u64) -> Asked {
        Asked {
            size: Some(size),
            ..Asked::new(RequestKind::SetSize, path)
        }
    }

    /// Describes a request before it is carried out; `None` if its failure has no event.
    /// `find_directory` returns the path of an open directory.
    pub fn of<'a>(
        request: &Request,
        find_directory: impl FnOnce(&str) -> Option<&'a str>,
    ) -> Option<Asked> {
        match request {
            Request::Remove(remove) => Some(Asked::new(RequestKind::Remove, &remove.filename)),
            Request::MkDir(mk_dir) => Some(Asked::new(RequestKind::Mkdir, &mk_dir.path)),
            Request::RmDir(rm_dir) => Some(Asked::new(RequestKind::Rmdir, &rm_dir.path)),
            Request::Open(open) => Some(Asked::new(RequestKind::Open, &open.filename)),
            Request::OpenDir(open_dir) => Some(Asked::new(RequestKind::List, &open_dir.path)),
            Request::Lstat(lstat) => Some(Asked::new(RequestKind::Stat, &lstat.path)),
            Request::Stat(stat) => Some(Asked::new(RequestKind::Stat, &stat.path)),
            Request::SetStat(set_stat) => match set_stat.attrs.size {
                Some(size) => Some(Asked::set_size(&set_stat.path, size)),
                None => Some(Asked::new(RequestKind::Setstat, &set_stat.path)),
            },
            Request::Rename(rename) => Some(Asked::rename(&rename.oldpath, &rename.newpath)),
            Request::Extended(ExtendedRequest::PosixRename { from, to }) => {
                Some(Asked::rename(from, to))
            }
            Request::ReadDir(read_dir) => {
                let path = find_directory(&read_dir.handle)?;
                Some(Asked::new(RequestKind::List, path))
            }
            // A failure on a handle is in the event of its transfer.
            Request::Close(_)
            | Request::Read(_)
            | Request::Write { .. }
            | Request::Fstat(_)
            | Request::FSetStat(_) => None,
            Request::Init
            | Request::RealPath(_)
            | Request::ReadLink
            | Request::Symlink
            | Request::Extended(
                ExtendedRequest::Limits
                | ExtendedRequest::Statvfs
                | ExtendedRequest::Fstatvfs { .. }
                | ExtendedRequest::ExpandPath { .. },
            )
            | Request::UnknownExtension
            | Request::UnknownType(_)
            | Request::Malformed => None,
        }
    }

    /// Tells that it failed.
    pub fn tell_failure(self, events: &Teller, failure: &Failure) {
        let status = match failure.code {
            // The end of a listing.
            StatusCode::Eof => return,
            // Clients ask all the time whether a name is free.
            StatusCode::NoSuchFile if self.request == RequestKind::Stat => return,
            StatusCode::NoSuchFile => Status::NoSuchFile,
            StatusCode::PermissionDenied => Status::PermissionDenied,
            StatusCode::BadMessage => Status::BadMessage,
            StatusCode::OpUnsupported => Status::OpUnsupported,
            StatusCode::Ok
            | StatusCode::Failure
            | StatusCode::NoConnection
            | StatusCode::ConnectionLost => Status::Failure,
        };
        events.tell(Event::RequestFailed(FailedRequest {
            request: self.request,
            path: self.path,
            to: self.to,
            size: self.size,
            status,
            error: failure.text(),
        }));
    }
}
