//! What S3 knows of a file, in the words of SFTP: attributes, and the line that `ls -l` shows.

use crate::tree::{Item, Stat};
use crate::users::Access;
use chrono::{DateTime, TimeDelta, Utc};
use russh_sftp::protocol::{File, FileAttributes};
use std::time::{SystemTime, UNIX_EPOCH};

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;

/// How a session shows files.
pub struct View<'a> {
    /// Owner and group.
    pub user: &'a str,
    /// Decides the permission bits.
    pub access: Access,
    /// Time of directories.
    pub started: SystemTime,
}

impl View<'_> {
    /// SFTP attributes.
    pub fn attributes(&self, stat: &Stat) -> FileAttributes {
        let (kind, size, modified) = match stat {
            Stat::File { size, modified } => (REGULAR, *size, *modified),
            Stat::Directory => (DIRECTORY | 0o111, 0, self.started),
        };
        let bits = match self.access {
            Access::ReadWrite => 0o644,
            Access::ReadOnly => 0o444,
            Access::WriteOnly => 0o200,
        };
        let seconds = modified.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let seconds = u32::try_from(seconds).unwrap_or(u32::MAX);
        FileAttributes {
            size: Some(size),
            uid: Some(0),
            gid: Some(0),
            permissions: Some(kind | bits),
            atime: Some(seconds),
            mtime: Some(seconds),
            user: None,
            group: None,
        }
    }

    /// An entry of a NAME reply.
    pub fn file(&self, item: Item) -> File {
        let attrs = self.attributes(&item.stat);
        let longname = self.line(&item.name, &attrs);
        File { filename: item.name, longname, attrs }
    }

    /// As `ls -l` prints it, and as OpenSSH's server does: some clients have nothing else to parse.
    fn line(&self, name: &str, attrs: &FileAttributes) -> String {
        let kind = if attrs.permissions.is_some_and(|mode| mode & DIRECTORY != 0) { 'd' } else { '-' };
        let modified = DateTime::<Utc>::from_timestamp(i64::from(attrs.mtime.unwrap_or(0)), 0).unwrap_or_default();
        let age = Utc::now() - modified;
        let recent = age < TimeDelta::days(182) && age > TimeDelta::days(-1);
        let date = modified.format(if recent { "%b %e %H:%M" } else { "%b %e  %Y" });
        let (mode, size) = (attrs.permissions(), attrs.size.unwrap_or(0));
        format!("{kind}{mode}    1 {user:<8} {user:<8} {size:>8} {date} {name}", user = self.user)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_long_line_is_like_that_of_ls() {
        let view = View { user: "alice", access: Access::ReadWrite, started: UNIX_EPOCH };
        let stat = Stat::File { size: 1234, modified: UNIX_EPOCH + Duration::from_secs(86_400 * 365) };
        let line = view.file(Item { name: "a b".into(), stat }).longname;
        assert_eq!(line, "-rw-r--r--    1 alice    alice        1234 Jan  1  1971 a b");
        let line = view.file(Item { name: "d".into(), stat: Stat::Directory }).longname;
        assert!(line.starts_with("drwxr-xr-x    1 alice"), "{line}");
    }
}
