//! The log's line for a request that names a file or a directory: who did what, and how it ended. Transfers have a line of
//! their own once they are over.

use super::codec::string;
use super::requests::POSIX_RENAME;
use super::{Failure, Outcome};
use crate::store::MAX_KEY;
use bytes::Bytes;
use russh_sftp::protocol::{Packet, StatusCode};

/// The line of a request; `None` if it has none, or if that is its transfer's.
pub struct RequestLine(Option<Description>);

struct Description {
    text: String,
    lines: Lines,
}

/// Which outcomes have a line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lines {
    /// Something changes: success too.
    All,
    Failures,
    /// Clients ask all the time whether a name is free.
    FailuresButMissing,
}

impl RequestLine {
    /// Describes a request that is not carried out yet. `directory` tells the path of an open directory.
    pub fn of<'a>(packet: &Packet, directory: impl FnOnce(&str) -> Option<&'a str>) -> RequestLine {
        let named = |verb: &str, path: &str, lines| {
            Some(Description {
                text: format!("{verb} {}", shown(path)),
                lines,
            })
        };
        RequestLine(match packet {
            Packet::Remove(remove) => named("remove", &remove.filename, Lines::All),
            Packet::MkDir(mkdir) => named("mkdir", &mkdir.path, Lines::All),
            Packet::RmDir(rmdir) => named("rmdir", &rmdir.path, Lines::All),
            Packet::Rename(rename) => renaming(&rename.oldpath, &rename.newpath),
            Packet::Extended(extended) if extended.request == POSIX_RENAME => {
                let mut data = Bytes::copy_from_slice(&extended.data);
                let from = string(&mut data).unwrap_or_default();
                let to = string(&mut data).unwrap_or_default();
                renaming(&from, &to)
            }
            Packet::SetStat(set) => match set.attrs.size {
                Some(size) => named(&format!("set size {size} of"), &set.path, Lines::All),
                None => named("setstat", &set.path, Lines::Failures),
            },
            Packet::Open(open) => named("open", &open.filename, Lines::Failures),
            Packet::OpenDir(open) => named("list", &open.path, Lines::Failures),
            Packet::Lstat(stat) => named("stat", &stat.path, Lines::FailuresButMissing),
            Packet::Stat(stat) => named("stat", &stat.path, Lines::FailuresButMissing),
            Packet::Symlink(_)
            | Packet::ReadLink(_)
            | Packet::RealPath(_)
            | Packet::Extended(_) => None,
            Packet::ReadDir(read) => {
                directory(&read.handle).and_then(|path| named("list", path, Lines::Failures))
            }
            // What fails on a handle, its transfer's line tells.
            Packet::Close(_)
            | Packet::Read(_)
            | Packet::Write(_)
            | Packet::Fstat(_)
            | Packet::FSetStat(_) => None,
            Packet::Init(_)
            | Packet::Version(_)
            | Packet::Status(_)
            | Packet::Handle(_)
            | Packet::Data(_)
            | Packet::Name(_)
            | Packet::Attrs(_)
            | Packet::ExtendedReply(_) => None,
        })
    }

    /// Describes a rename.
    pub fn of_rename(from: &str, to: &str) -> RequestLine {
        RequestLine(renaming(from, to))
    }

    /// Logs the request with its outcome.
    pub fn log(&self, who: &str, answer: &Outcome) {
        let RequestLine(Some(Description { text, lines })) = self else {
            return;
        };
        match answer {
            Ok(Some(_)) if *lines == Lines::All => log::info!("{who}: {text}"),
            // Nothing to say, or nothing known yet.
            Ok(_) => {}
            Err(Failure {
                code: StatusCode::Eof,
                ..
            }) => {}
            Err(Failure {
                code: StatusCode::NoSuchFile,
                ..
            }) if *lines == Lines::FailuresButMissing => {}
            // The client's own affair, and no reason for an operator to look.
            Err(
                failure @ Failure {
                    code: StatusCode::NoSuchFile,
                    ..
                },
            ) => {
                log::info!("{who}: {text} failed: {}", failure.text());
            }
            Err(failure) => log::warn!("{who}: {text} failed: {}", failure.text()),
        }
    }
}

fn renaming(from: &str, to: &str) -> Option<Description> {
    Some(Description {
        text: format!("rename {} to {}", shown(from), shown(to)),
        lines: Lines::All,
    })
}

/// A path in quotes, cut where no key could go on: a client may send one of 256 KiB.
fn shown(path: &str) -> String {
    let start: String = path.chars().take(MAX_KEY).collect();
    format!("{start:?}")
}
