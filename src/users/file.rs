//! users.json: reading, checking and replacing it.
//!
//! Called by [`FileAuth`](super::FileAuth) and by `sftpd users …`. Invariants: a file that was read
//! was checked as a whole; the file is replaced, never rewritten in place; a change opens it to no
//! other user of the machine.

use super::password::check_hash;
use super::{Access, Account, PublicKey};
use crate::path::Home;
use anyhow::{Context, ensure};
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::fmt::{self, Debug, Formatter};
use std::fs::{File, Metadata, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Largest users.json, in bytes: 100,000 users with two ed25519 keys each take 30 MB. Bounds the
/// memory that reading a wrong file takes.
pub const MAX_USERS_FILE_SIZE: u64 = 32 * 1024 * 1024;
/// Longest user name, in bytes. Names become prefixes of keys and parts of log lines.
const MAX_NAME_LEN: usize = 64;
/// The mode bits of users.json that a change keeps: those for reading, and for writing by its owner
/// and group.
const KEPT_MODE: u32 = 0o664;
/// The mode bits for every user of the machine.
const OTHERS_MODE: u32 = 0o007;
/// The mode bits for the file's group.
const GROUP_MODE: u32 = 0o070;

/// Why users.json can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UsersFileError {
    /// There is none.
    #[error("there is no users file at {}", path.display())]
    Missing {
        /// Where it was looked for, in full.
        path: PathBuf,
    },
    /// The system refuses to read it.
    #[error("can't read {}", path.display())]
    Unreadable {
        /// The users file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Reading it takes too long.
    #[error("can't read {} within {} seconds: check that its file system responds", path.display(), limit.as_secs())]
    TooSlow {
        /// The users file.
        path: PathBuf,
        /// How long a read may take.
        limit: Duration,
    },
    /// The system refuses to replace it.
    #[error("can't write {}", path.display())]
    Unwritable {
        /// The users file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// It has, or would have, more than [`MAX_USERS_FILE_SIZE`] bytes.
    #[error(
        "{}: a users file can't be larger than 32 MiB: check that it is the right file, and remove users and keys that are \
         no longer needed",
        path.display()
    )]
    TooLarge {
        /// The users file.
        path: PathBuf,
    },
    /// It can't be parsed, or an entry in it is wrong.
    #[error("{} is not a valid users file", path.display())]
    Invalid {
        /// The users file.
        path: PathBuf,
        /// What is wrong, and where.
        source: anyhow::Error,
    },
}

/// One entry of users.json. `Debug` shows no password's hash.
#[derive(Clone, Serialize, Deserialize)]
// An unknown field is a typo, and "acess" must not mean full access.
#[serde(
    default,
    deny_unknown_fields,
    expecting = r#"a user like {"keys": ["ssh-ed25519 AAAA…"]}"#
)]
#[non_exhaustive]
pub struct User {
    /// Public keys as in OpenSSH's authorized_keys, without options.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// argon2id hash.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// Prefix below the store's; `NAME/` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub home: Option<String>,
    /// Full access if absent.
    pub access: Access,
    /// A disabled user keeps everything but can't log in. Absent when false.
    #[serde(skip_serializing_if = "is_false")]
    pub disabled: bool,
}

/// serde needs a function that takes a reference.
fn is_false(value: &bool) -> bool {
    !value
}

/// An entry as one without any field: no key and no password, and full access.
impl Default for User {
    fn default() -> User {
        User {
            keys: Vec::new(),
            password: None,
            home: None,
            access: Access::ReadWrite,
            disabled: false,
        }
    }
}

impl Debug for User {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("User")
            .field("keys", &self.keys)
            .field("has_password", &self.password.is_some())
            .field("home", &self.home)
            .field("access", &self.access)
            .field("disabled", &self.disabled)
            .finish()
    }
}

impl User {
    /// The keys, parsed. Skips invalid ones, which [`UsersFile::read`] refuses.
    pub fn parsed_keys(&self) -> impl Iterator<Item = PublicKey> {
        self.keys.iter().filter_map(|line| line.parse().ok())
    }

    /// Whether this is one of the user's keys, whatever its comment.
    pub fn has_key(&self, key: &PublicKey) -> bool {
        self.parsed_keys().any(|known| known == *key)
    }

    /// The user's account, with the default home if there is no other.
    pub fn account(&self, name: &str) -> Account {
        let account = Account::new(name).access(self.access);
        match &self.home {
            Some(home) => account.home(home),
            None => account,
        }
    }
}

/// Normalises a home to a prefix: one slash between its parts and one at its end; empty for the
/// whole store.
pub fn normalize_home(home: &str) -> String {
    let parts = home.split('/').filter(|part| !part.is_empty());
    parts.flat_map(|part| [part, "/"]).collect()
}

/// Fails unless the name can be a prefix, a log field and an argument: no slash, no control
/// character, nothing that looks like an option.
pub fn check_name(name: &str) -> anyhow::Result<()> {
    let odd = |c: char| c == '/' || c == '\\' || c.is_whitespace() || c.is_control();
    let ok = (1..=MAX_NAME_LEN).contains(&name.len())
        && !name.starts_with(['-', '.'])
        && !name.contains(odd);
    ensure!(
        ok,
        "{name:?} can't be a user name: 1 to 64 characters, no spaces or slashes, no `-` or `.` at the start"
    );
    Ok(())
}

/// All of users.json.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = r#"{"users": {"NAME": {"keys": ["ssh-ed25519 AAAA…"]}}}"#
)]
#[non_exhaustive]
pub struct UsersFile {
    /// By name.
    #[serde(deserialize_with = "unique_users")]
    pub users: BTreeMap<String, User>,
}

/// Reads the users, and refuses a name that occurs twice: the entry that was just corrected could
/// be the one that is ignored.
fn unique_users<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, User>, D::Error> {
    struct UniqueUsers;

    impl<'de> Visitor<'de> for UniqueUsers {
        type Value = BTreeMap<String, User>;

        fn expecting(&self, out: &mut Formatter) -> fmt::Result {
            out.write_str("users by name")
        }

        fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
            let mut users = BTreeMap::new();
            while let Some(name) = map.next_key::<String>()? {
                if users.contains_key(&name) {
                    return Err(M::Error::custom(format_args!(
                        "user {name} occurs twice: keep one of them"
                    )));
                }
                let user: User = map.next_value()?;
                users.insert(name, user);
            }
            Ok(users)
        }
    }

    deserializer.deserialize_map(UniqueUsers)
}

impl UsersFile {
    /// Reads and checks the file.
    pub fn read(path: &Path) -> anyhow::Result<UsersFile> {
        let file = open(path)?;
        UsersFile::read_from(file, path)
    }

    /// As [`UsersFile::read`], from the opened file.
    pub(super) fn read_from(file: impl Read, path: &Path) -> anyhow::Result<UsersFile> {
        let path = path.to_owned();
        let mut content = Vec::new();
        // One byte more than the limit, to tell a larger file from one of that size.
        let read = file.take(MAX_USERS_FILE_SIZE + 1).read_to_end(&mut content);
        if let Err(source) = read {
            return Err(UsersFileError::Unreadable { path, source }.into());
        }
        if content.len() as u64 > MAX_USERS_FILE_SIZE {
            return Err(UsersFileError::TooLarge { path }.into());
        }
        let users: UsersFile = match serde_json::from_slice(&content) {
            Ok(users) => users,
            Err(error) => {
                return Err(UsersFileError::Invalid {
                    path,
                    source: error.into(),
                }
                .into());
            }
        };
        drop(content);
        match users.check() {
            Ok(()) => Ok(users),
            Err(source) => Err(UsersFileError::Invalid { path, source }.into()),
        }
    }

    /// As [`UsersFile::read`], but a missing file has no users.
    pub fn read_or_empty(path: &Path) -> anyhow::Result<UsersFile> {
        match open(path) {
            Ok(file) => UsersFile::read_from(file, path),
            Err(UsersFileError::Missing { .. }) => Ok(UsersFile::default()),
            Err(error) => Err(error.into()),
        }
    }

    /// Fails if an entry is invalid.
    fn check(&self) -> anyhow::Result<()> {
        for (name, user) in &self.users {
            check_name(name)?;
            check_user(name, user).with_context(|| format!("user {name}"))?;
        }
        Ok(())
    }

    /// Locks, reads, changes, checks and replaces the file. After an error it is as before. Fails
    /// if there is none.
    pub fn change<T>(
        path: &Path,
        change: impl FnOnce(&mut UsersFile) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        // Before the lock, which is a file beside it.
        open(path)?;
        UsersFile::change_or_make(path, change)
    }

    /// As [`UsersFile::change`], but a missing file is made: it has no users before the change.
    pub fn change_or_make<T>(
        path: &Path,
        change: impl FnOnce(&mut UsersFile) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        // A symbolic link stays: its target is replaced.
        let path = follow_link(path);
        let _lock = match lock(&path) {
            Ok(lock) => lock,
            Err(source) => return Err(UsersFileError::Unwritable { path, source }.into()),
        };
        let mut file = UsersFile::read_or_empty(&path)?;
        let outcome = change(&mut file)?;
        if let Err(source) = file.check() {
            return Err(UsersFileError::Invalid { path, source }.into());
        }
        let mut content = serde_json::to_vec_pretty(&file)?;
        content.push(b'\n');
        if content.len() as u64 > MAX_USERS_FILE_SIZE {
            return Err(UsersFileError::TooLarge { path }.into());
        }
        match replace(&path, &content) {
            Ok(()) => Ok(outcome),
            Err(source) => Err(UsersFileError::Unwritable { path, source }.into()),
        }
    }
}

/// Fails if an entry is invalid, except for its name.
fn check_user(name: &str, user: &User) -> anyhow::Result<()> {
    ensure!(
        !user.keys.is_empty() || user.password.is_some(),
        "neither a key nor a password"
    );
    for line in &user.keys {
        line.parse::<PublicKey>()?;
    }
    let home = user.account(name).home_prefix();
    let home = home.context("the name can't be a directory: set a home")?;
    Home::new("", &home)?;
    if let Some(password) = &user.password {
        check_hash(password)?;
    }
    Ok(())
}

/// Opens the users file for reading.
pub(super) fn open(path: &Path) -> Result<File, UsersFileError> {
    match File::open(path) {
        Ok(file) => Ok(file),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(UsersFileError::Missing {
            path: follow_link(path),
        }),
        Err(source) => Err(UsersFileError::Unreadable {
            path: path.to_owned(),
            source,
        }),
    }
}

/// The full path of the file that a change replaces: that to which a symbolic link leads, also
/// before there is one.
pub fn follow_link(path: &Path) -> PathBuf {
    if let Ok(found) = path.canonicalize() {
        return found;
    }
    let target = match (path.read_link(), path.parent()) {
        (Ok(target), Some(folder)) => folder.join(target),
        (_, _) => path.to_owned(),
    };
    std::path::absolute(&target).unwrap_or(target)
}

/// A warning for the operator if every user of the machine may read or write the users file.
pub fn exposure(path: &Path, found: &Metadata) -> Option<String> {
    let mode = found.mode() & 0o777;
    if mode & OTHERS_MODE == 0 {
        return None;
    }
    let path = path.display();
    Some(format!(
        "{path} is open to every user of this machine (mode {mode:04o}): run `chmod o-rwx {path}`"
    ))
}

/// Locks the users file against other commands until dropped. The lock is on a file beside it,
/// because the file itself is replaced.
fn lock(path: &Path) -> io::Result<File> {
    let beside = path.with_added_extension("lock");
    let lock = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&beside)?;
    match lock.try_lock() {
        Ok(()) => return Ok(lock),
        Err(TryLockError::WouldBlock) => {
            let beside = beside.display();
            log::warn!("waiting for another command, which has locked {beside}");
        }
        Err(TryLockError::Error(error)) => return Err(error),
    }
    lock.lock()?;
    Ok(lock)
}

/// Writes a temporary file, syncs it, renames it and syncs the folder, so that after a power cut
/// there is either the old file or the new one.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        Some(_) | None => Path::new("."),
    };
    // Its mode is 0600.
    let mut temporary = tempfile::NamedTempFile::new_in(folder)?;
    temporary.write_all(content)?;
    if let Ok(old) = path.metadata() {
        take_over_access(path, &old, temporary.as_file())?;
    }
    temporary.as_file().sync_all()?;
    temporary.persist(path)?;
    File::open(folder)?.sync_all()
}

/// Gives the new file the owner, group and mode of the old one, so that a server that runs as
/// another user can still read it.
fn take_over_access(path: &Path, old: &Metadata, new: &File) -> io::Result<()> {
    // Only root can change the owner. Others can change the group to one of their own.
    if fchown(new, Some(old.uid()), Some(old.gid())).is_err() {
        let _ = fchown(new, None, Some(old.gid()));
    }
    let now = new.metadata()?;
    let mut mode = old.mode() & KEPT_MODE;
    if now.gid() != old.gid() {
        // The rights of the old group are not for another one.
        mode &= !GROUP_MODE;
    }
    if (now.uid(), now.gid()) != (old.uid(), old.gid()) {
        let (path, uid, gid) = (path.display(), old.uid(), old.gid());
        log::warn!(
            "{path} no longer belongs to {uid}:{gid}: run `chown {uid}:{gid} {path}`, or the server may be unable to read it"
        );
    }
    new.set_permissions(Permissions::from_mode(mode))
}
