//! The line of the log for a request that names a file or a directory: who did what, and how it
//! ended. Transfers have a line of their own once they are over.

use super::codec::{ExtendedRequest, Request};
use super::failure::{Answer, Failure, Outcome};
use crate::path::MAX_KEY;
use russh_sftp::protocol::StatusCode;

/// The line of a request; `None` if it has none, or its transfer has.
pub struct RequestLine(Option<Description>);

struct Description {
    text: String,
    lines: Lines,
}

/// Which outcomes have a line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lines {
    /// The request changes something: successes too.
    All,
    Failures,
    /// Clients ask all the time whether a name is free.
    FailuresButMissing,
}

impl Description {
    fn new(verb: &str, path: &str, lines: Lines) -> Description {
        Description {
            text: format!("{verb} {}", quote(path)),
            lines,
        }
    }

    fn rename(from: &str, to: &str) -> Description {
        Description {
            text: format!("rename {} to {}", quote(from), quote(to)),
            lines: Lines::All,
        }
    }

    /// `find_directory` returns the path of an open directory.
    fn of<'a>(
        request: &Request,
        find_directory: impl FnOnce(&str) -> Option<&'a str>,
    ) -> Option<Description> {
        let (verb, path, lines) = match request {
            Request::Remove(remove) => ("remove", &remove.filename, Lines::All),
            Request::MkDir(mk_dir) => ("mkdir", &mk_dir.path, Lines::All),
            Request::RmDir(rm_dir) => ("rmdir", &rm_dir.path, Lines::All),
            Request::Open(open) => ("open", &open.filename, Lines::Failures),
            Request::OpenDir(open_dir) => ("list", &open_dir.path, Lines::Failures),
            Request::Lstat(lstat) => ("stat", &lstat.path, Lines::FailuresButMissing),
            Request::Stat(stat) => ("stat", &stat.path, Lines::FailuresButMissing),
            Request::SetStat(set_stat) => {
                let path = &set_stat.path;
                return Some(match set_stat.attrs.size {
                    Some(size) => {
                        Description::new(&format!("set size {size} of"), path, Lines::All)
                    }
                    None => Description::new("setstat", path, Lines::Failures),
                });
            }
            Request::Rename(rename) => {
                return Some(Description::rename(&rename.oldpath, &rename.newpath));
            }
            Request::Extended(ExtendedRequest::PosixRename { from, to }) => {
                return Some(Description::rename(from, to));
            }
            Request::ReadDir(read_dir) => {
                let path = find_directory(&read_dir.handle)?;
                return Some(Description::new("list", path, Lines::Failures));
            }
            // A failure on a handle is in the line of its transfer.
            Request::Close(_)
            | Request::Read(_)
            | Request::Write { .. }
            | Request::Fstat(_)
            | Request::FSetStat(_) => return None,
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
            | Request::Malformed => return None,
        };
        Some(Description::new(verb, path, lines))
    }
}

impl RequestLine {
    /// Describes a request before it is carried out. `find_directory` returns the path of an open
    /// directory.
    pub fn of<'a>(
        request: &Request,
        find_directory: impl FnOnce(&str) -> Option<&'a str>,
    ) -> RequestLine {
        RequestLine(Description::of(request, find_directory))
    }

    /// Describes a rename.
    pub fn of_rename(from: &str, to: &str) -> RequestLine {
        RequestLine(Some(Description::rename(from, to)))
    }

    /// Logs the request with its outcome, as far as that is known.
    pub fn log(&self, who: &str, outcome: &Outcome) {
        let RequestLine(Some(Description { text, lines })) = self else {
            return;
        };
        match outcome {
            Ok(Answer::Now(_)) if *lines == Lines::All => log::info!("{who}: {text}"),
            Ok(Answer::Now(_) | Answer::Later) => {}
            Err(failure) => log_failure(who, text, *lines, failure),
        }
    }
}

fn log_failure(who: &str, text: &str, lines: Lines, failure: &Failure) {
    match failure.code {
        StatusCode::Eof => {}
        StatusCode::NoSuchFile if lines == Lines::FailuresButMissing => {}
        // A name that is missing is the client's own affair, and no reason for an operator to look.
        StatusCode::NoSuchFile => log::info!("{who}: {text} failed: {}", failure.text()),
        _ => log::warn!("{who}: {text} failed: {}", failure.text()),
    }
}

/// A path in quotes, cut at the longest key: a client may send one of 256 KiB.
fn quote(path: &str) -> String {
    let start: String = path.chars().take(MAX_KEY).collect();
    format!("{start:?}")
}
