//! SFTP attributes of a file, and the line that `ls -l` shows.

use crate::users::Access;
use crate::vfs::{Item, Stat};
use chrono::{DateTime, Utc};
use russh_sftp::protocol::{File, FileAttributes};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;

/// How a session shows files.
pub struct View {
    /// Owner and group.
    pub user: Arc<str>,
    /// Decides the permission bits.
    pub access: Access,
}

/// Time of every directory, which has none in S3. It is the same in each session, or tools that
/// compare would see changes.
const DIRECTORY_TIME: SystemTime = UNIX_EPOCH;

impl View {
    /// SFTP attributes.
    pub fn attributes(&self, stat: &Stat) -> FileAttributes {
        let (kind, size, modified) = match stat {
            Stat::File { size, modified } => (REGULAR, *size, *modified),
            Stat::Directory => (DIRECTORY | 0o111, 0, DIRECTORY_TIME),
        };
        let bits = match self.access {
            Access::ReadWrite => 0o644,
            Access::ReadOnly => 0o444,
            Access::WriteOnly => 0o200,
        };
        let seconds = match modified.duration_since(UNIX_EPOCH) {
            Ok(since) => since.as_secs(),
            Err(_before_1970) => 0,
        };
        let mtime = Some(u32::try_from(seconds).unwrap_or(u32::MAX));
        // The rest, owner and group, is 0.
        FileAttributes {
            size: Some(size),
            permissions: Some(kind | bits),
            atime: mtime,
            mtime,
            ..FileAttributes::dummy()
        }
    }

    /// An entry of a NAME reply. Its long name is a line of `ls -l`, as OpenSSH's server sends it:
    /// some clients parse nothing else.
    pub fn file(&self, Item { name, stat }: Item) -> File {
        let attrs = self.attributes(&stat);
        let kind = if attrs.is_dir() { 'd' } else { '-' };
        let modified = DateTime::<Utc>::from(attrs.modified().unwrap_or(UNIX_EPOCH));
        let recent = (0..182).contains(&(Utc::now() - modified).num_days());
        let date = modified.format(if recent { "%b %e %H:%M" } else { "%b %e  %Y" });
        let mode = attrs.permissions();
        let size = attrs.len();
        let user = &self.user;
        let longname = format!("{kind}{mode}    1 {user:<8} {user:<8} {size:>8} {date} {name}");
        File {
            filename: name,
            longname,
            attrs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_long_line_is_like_that_of_ls() {
        let view = View {
            user: "alice".into(),
            access: Access::ReadWrite,
        };
        let stat = Stat::File {
            size: 1234,
            modified: UNIX_EPOCH + Duration::from_secs(86_400 * 365),
        };
        let line = view
            .file(Item {
                name: "a b".into(),
                stat,
            })
            .longname;
        assert_eq!(
            line,
            "-rw-r--r--    1 alice    alice        1234 Jan  1  1971 a b"
        );
        let line = view
            .file(Item {
                name: "d".into(),
                stat: Stat::Directory,
            })
            .longname;
        assert!(line.starts_with("drwxr-xr-x    1 alice"), "{line}");
    }
}
