//! users.json: its form, what is checked when it is read, and how it is replaced.

use super::{Account, password};
use crate::tree::Home;
use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use ssh_key::{Algorithm, PublicKey};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// What a user may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Everything.
    #[default]
    ReadWrite,
    /// Look and fetch.
    ReadOnly,
    /// Put, list, rename and remove, but fetch nothing back.
    WriteOnly,
}

/// One entry of users.json.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
// An unknown field is a typing error, and "acess" must not mean full access.
#[serde(deny_unknown_fields)]
pub struct User {
    /// Public keys as in OpenSSH's authorized_keys, without options.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<String>,
    /// argon2id hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// Prefix below the store's; `NAME/` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<String>,
    /// Full access if absent.
    #[serde(default)]
    pub access: Access,
}

/// All of users.json.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Users {
    /// By name.
    pub users: BTreeMap<String, User>,
}

impl User {
    /// The keys, parsed; those that can't be are left out, as [`Users::check`] has refused them before.
    pub fn parsed_keys(&self) -> impl Iterator<Item = PublicKey> {
        self.keys.iter().filter_map(|line| PublicKey::from_openssh(line).ok())
    }

    /// The home, with its default.
    pub fn home(&self, name: &str) -> String {
        self.home.clone().unwrap_or_else(|| format!("{name}/"))
    }

    pub(super) fn account(&self, name: &str) -> Account {
        Account { name: name.to_owned(), home: self.home(name), access: self.access }
    }
}

impl Users {
    /// Everything that can be wrong with an entry.
    pub fn check(&self) -> anyhow::Result<()> {
        for (name, user) in &self.users {
            check_name(name)?;
            let of = || format!("user {name}");
            ensure!(!user.keys.is_empty() || user.password.is_some(), "user {name} has neither a key nor a password");
            user.keys.iter().try_for_each(|line| parse_key(line).map(drop)).with_context(of)?;
            Home::new("", &user.home(name)).with_context(of)?;
            let hash = user.password.as_deref();
            ensure!(hash.is_none_or(password::is_hash), "user {name}: the password is not an argon2id hash");
        }
        Ok(())
    }
}

/// Names become prefixes, log fields and arguments: no slash, no control character, nothing that looks like an option.
pub fn check_name(name: &str) -> anyhow::Result<()> {
    let bad = name.is_empty()
        || name.len() > 64
        || name.starts_with(['-', '.'])
        || name.contains(|c: char| c == '/' || c == '\\' || c.is_whitespace() || c.is_control());
    if bad {
        bail!("{name:?} can't be a user name: 1 to 64 characters, no spaces or slashes, no `-` or `.` at the start");
    }
    Ok(())
}

/// A key of a kind that the server can check.
pub fn parse_key(line: &str) -> anyhow::Result<PublicKey> {
    let shown: String = line.chars().take(40).collect();
    let key = PublicKey::from_openssh(line)
        .with_context(|| format!("{shown:?} is not a public key: give one line of a .pub file, in quotes"))?;
    match key.algorithm() {
        Algorithm::Ed25519 | Algorithm::Ecdsa { .. } => Ok(key),
        Algorithm::Rsa { .. } => {
            let bits = key.key_data().rsa().map_or(0, |rsa| rsa.key_size());
            ensure!(bits >= 2048, "an RSA key of {bits} bits is too short: 2,048 at least");
            Ok(key)
        }
        other => bail!("keys of type {other} are not supported: use ssh-ed25519, ecdsa-sha2 or ssh-rsa"),
    }
}

/// Where users.json is.
pub struct UsersFile<'a> {
    path: &'a Path,
}

impl<'a> UsersFile<'a> {
    /// Nothing is read yet.
    pub fn new(path: &'a Path) -> UsersFile<'a> {
        UsersFile { path }
    }

    /// Reads and checks it all.
    pub fn read(&self) -> anyhow::Result<Users> {
        let shown = self.path.display();
        let text = std::fs::read_to_string(self.path).with_context(|| format!("can't read {shown}"))?;
        let users: Users = serde_json::from_str(&text).with_context(|| format!("{shown} is not a valid users file"))?;
        users.check().with_context(|| format!("{shown} is not a valid users file"))?;
        Ok(users)
    }

    /// As [`UsersFile::read`]; a missing file holds nobody.
    pub fn read_or_empty(&self) -> anyhow::Result<Users> {
        match self.path.symlink_metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Users::default()),
            _ => self.read(),
        }
    }

    /// Locks, reads, changes, checks and replaces. On any error the file is as it was.
    pub fn change<T>(&self, change: impl FnOnce(&mut Users) -> anyhow::Result<T>) -> anyhow::Result<T> {
        // A link stays a link: what it points to is replaced.
        let path = self.path.canonicalize().unwrap_or_else(|_| self.path.to_owned());
        let unwritable = || format!("can't write {}", path.display());
        let _lock = lock(&path).with_context(unwritable)?;
        let file = UsersFile::new(&path);
        let mut users = file.read_or_empty()?;
        let outcome = change(&mut users)?;
        users.check()?;
        let mut text = serde_json::to_string_pretty(&users)?;
        text.push('\n');
        replace(&path, text.as_bytes()).with_context(unwritable)?;
        Ok(outcome)
    }
}

/// A file beside it, as the file itself is replaced and a lock on it would be on the old one.
fn lock(path: &Path) -> std::io::Result<File> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(PathBuf::from(name))?;
    lock.lock()?;
    Ok(lock)
}

/// Temporary file, fsync, rename, fsync of the folder: after a power cut either the old file is there or the new.
fn replace(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temporary = tempfile::NamedTempFile::new_in(folder)?;
    temporary.write_all(content)?;
    temporary.as_file().sync_all()?;
    if let Ok(old) = std::fs::metadata(path) {
        // A server that runs as another user must be able to read it as before; only root can do that.
        use std::os::unix::fs::MetadataExt;
        let _ = std::os::unix::fs::fchown(temporary.as_file(), Some(old.uid()), Some(old.gid()));
    }
    temporary.persist(path)?;
    File::open(folder)?.sync_all()?;
    Ok(())
}
