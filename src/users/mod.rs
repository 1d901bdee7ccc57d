//! Who may log in: the [`Auth`] trait, and users.json behind it.
//!
//! Called by `server` at every login and by `sftpd users …`. Invariants: the file is replaced, never
//! rewritten in place; a file that can't be read whole changes nothing for those who could log in before.

pub mod commands;

use crate::metrics::USERS_FILE_OK;
use crate::tree::Home;
use anyhow::{Context, bail, ensure};
use argon2::{Algorithm, Argon2, Params, PasswordHash, PasswordHasher, PasswordVerifier, Version};
use async_trait::async_trait;
use metrics::gauge;
use rand::{RngExt, distr::Alphanumeric};
use serde::{Deserialize, Serialize};
use ssh_key::PublicKey;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::{
    collections::BTreeMap, fs, io::ErrorKind, io::Write, path::Path, path::PathBuf, sync::LazyLock, sync::Mutex,
    sync::MutexGuard,
};
use tokio::runtime::{Builder, Runtime};

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

/// A user who has proved it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// As logged in.
    pub name: String,
    /// Prefix below the store's, `/` at its end; may be empty.
    pub home: String,
    /// What the user may do.
    pub access: Access,
}

/// Decides who may log in. An application that embeds the server can bring its own.
#[async_trait]
pub trait Auth: Send + Sync + 'static {
    /// May this user log in with this key? Asked before and after the signature is checked.
    async fn public_key(&self, user: &str, key: &PublicKey) -> Option<Account>;
    /// May this user log in with this password? Must take as long for users that don't exist.
    async fn password(&self, user: &str, password: &str) -> Option<Account>;
    /// Called about every second, for whoever has something to keep an eye on. Must not take long.
    fn look(&self) {}
}

/// users.json as the server sees it: read again whenever it has changed.
pub struct FileAuth {
    /// `None` where the users are no file's.
    path: Option<PathBuf>,
    /// The last good file. A std lock: held while the small file is read, never across an await.
    loaded: Mutex<(Option<Stamp>, UsersFile)>,
}

/// Changes whenever the file does: a rename brings another inode, an edit another time.
type Stamp = (u64, u64, i64, i64);

impl FileAuth {
    /// Reads the file once, so that the operator learns of a mistake at the start.
    pub fn open(path: PathBuf) -> anyhow::Result<FileAuth> {
        let missing = || format!("no users file at {}: make one with `sftpd users add NAME \"KEY\"`", path.display());
        path.metadata().with_context(missing)?;
        let file = UsersFile::read(&path)?;
        gauge!(USERS_FILE_OK).set(1);
        Ok(FileAuth { loaded: Mutex::new((None, file)), path: Some(path) })
    }

    /// One user with a password and no file, for `sftpd demo` and tests.
    pub fn single(name: &str, password: &str) -> anyhow::Result<FileAuth> {
        let user = User { password: Some(hash(password)?), ..User::default() };
        let users = UsersFile { users: BTreeMap::from([(name.to_owned(), user)]) };
        Ok(FileAuth { path: None, loaded: Mutex::new((None, users)) })
    }

    /// The users as the file has them now, or as it last had them.
    fn current(&self) -> MutexGuard<'_, (Option<Stamp>, UsersFile)> {
        let mut loaded = self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let stamp = |found: fs::Metadata| (found.ino(), found.size(), found.mtime(), found.mtime_nsec());
        let stamp = self.path.as_ref().and_then(|path| path.metadata().ok()).map(stamp);
        if let Some(path) = self.path.as_ref().filter(|_| loaded.0 != stamp) {
            loaded.0 = stamp;
            let read = UsersFile::read(path);
            gauge!(USERS_FILE_OK).set(if read.is_ok() { 1 } else { 0 });
            match read {
                Ok(file) => loaded.1 = file,
                Err(error) => log::error!("the users of the last good file stay in force: {error:#}"),
            }
        }
        loaded
    }

    fn user(&self, name: &str) -> Option<User> {
        self.current().1.users.get(name).cloned()
    }
}

#[async_trait]
impl Auth for FileAuth {
    async fn public_key(&self, user: &str, key: &PublicKey) -> Option<Account> {
        let found = self.user(user)?;
        found.parsed_keys().any(|known| known.key_data() == key.key_data()).then(|| found.account(user))
    }

    async fn password(&self, user: &str, password: &str) -> Option<Account> {
        // Nobody has no password either.
        let found = self.user(user).unwrap_or_default();
        is_password(found.password.clone(), password).await.then(|| found.account(user))
    }

    /// So that the log tells of a broken file at once, not when somebody logs in.
    fn look(&self) {
        drop(self.current());
    }
}

/// argon2id runs off the server's threads, and always on the same two: each keeps the memory of its last check, and a pool
/// that grows would end up with many times that.
static CHECKERS: LazyLock<Option<Runtime>> =
    LazyLock::new(|| Builder::new_current_thread().max_blocking_threads(2).build().ok());

/// Of what [OWASP](https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html) takes for equally
/// strong, that with the least memory: 7 MiB, five passes, one lane.
fn argon2() -> Argon2<'static> {
    let params = Params::new(7168, 5, 1, None).unwrap_or_default();
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// A fresh password that is easy to paste: 20 letters and digits, 119 bits.
pub fn random() -> String {
    rand::rng().sample_iter(Alphanumeric).take(20).map(char::from).collect()
}

/// The argon2id hash of a password, in PHC string format, with a salt of its own.
pub fn hash(password: &str) -> anyhow::Result<String> {
    Ok(argon2().hash_password(password.as_bytes()).context("argon2")?.to_string())
}

/// True only for the right password to a hash; takes its time in every case.
async fn is_password(known: Option<String>, password: &str) -> bool {
    let password = password.to_owned();
    let verify = move || match known {
        Some(known) => argon2().verify_password(password.as_bytes(), known.as_str()).is_ok(),
        // For a user that doesn't exist or has no password: the same work, for nothing.
        None => hash(&password).is_ok_and(|_| false),
    };
    match CHECKERS.as_ref() {
        Some(checkers) => checkers.spawn_blocking(verify).await.unwrap_or(false),
        None => false,
    }
}

/// One entry of users.json.
#[derive(Clone, Default, Serialize, Deserialize)]
// An unknown field is a typing error, and "acess" must not mean full access.
#[serde(default, deny_unknown_fields)]
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
}

impl User {
    /// The keys, parsed; those that can't be are left out, as [`UsersFile::read`] has refused them before.
    pub fn parsed_keys(&self) -> impl Iterator<Item = PublicKey> {
        self.keys.iter().filter_map(|line| PublicKey::from_openssh(line).ok())
    }

    /// What the user of this name gets: the home has its default here.
    pub fn account(&self, name: &str) -> Account {
        let home = self.home.clone().unwrap_or_else(|| format!("{name}/"));
        Account { name: name.to_owned(), home, access: self.access }
    }
}

/// Names become prefixes, log fields and arguments: no slash, no control character, nothing that looks like an option.
pub fn check_name(name: &str) -> anyhow::Result<()> {
    let odd = |c: char| c == '/' || c == '\\' || c.is_whitespace() || c.is_control();
    let ok = (1..=64).contains(&name.len()) && !name.starts_with(['-', '.']) && !name.contains(odd);
    ensure!(ok, "{name:?} can't be a user name: 1 to 64 characters, no spaces or slashes, no `-` or `.` at the start");
    Ok(())
}

/// A key of a kind that the server can check.
pub fn parse_key(line: &str) -> anyhow::Result<PublicKey> {
    let shown: String = line.chars().take(40).collect();
    let key = PublicKey::from_openssh(line)
        .with_context(|| format!("{shown:?} is not a public key: give one line of a .pub file, in quotes"))?;
    match (key.algorithm(), key.key_data().rsa().map_or(0, |rsa| rsa.key_size())) {
        (ssh_key::Algorithm::Rsa { .. }, bits @ ..2048) => {
            bail!("an RSA key of {bits} bits is too short: 2,048 at least")
        }
        (ssh_key::Algorithm::Ed25519 | ssh_key::Algorithm::Ecdsa { .. } | ssh_key::Algorithm::Rsa { .. }, _) => Ok(key),
        (other, _) => bail!("keys of type {other} are not supported: use ssh-ed25519, ecdsa-sha2 or ssh-rsa"),
    }
}

/// All of users.json.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UsersFile {
    /// By name.
    pub users: BTreeMap<String, User>,
}

impl UsersFile {
    /// Reads and checks it all.
    pub fn read(path: &Path) -> anyhow::Result<UsersFile> {
        let invalid = || format!("{} is not a valid users file", path.display());
        let text = fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
        let file: UsersFile = serde_json::from_str(&text).with_context(invalid)?;
        file.check().with_context(invalid)?;
        Ok(file)
    }

    /// As [`UsersFile::read`]; a missing file holds nobody.
    pub fn read_or_empty(path: &Path) -> anyhow::Result<UsersFile> {
        let missing = path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound);
        if missing { Ok(UsersFile::default()) } else { UsersFile::read(path) }
    }

    /// Everything that can be wrong with an entry.
    fn check(&self) -> anyhow::Result<()> {
        for (name, user) in &self.users {
            check_name(name)?;
            let of = || format!("user {name}");
            let is_hash = |text: &String| text.starts_with("$argon2id$") && PasswordHash::new(text).is_ok();
            ensure!(!user.keys.is_empty() || user.password.is_some(), "user {name} has neither a key nor a password");
            user.keys.iter().try_for_each(|line| parse_key(line).map(drop)).with_context(of)?;
            Home::new("", &user.account(name).home).with_context(of)?;
            ensure!(user.password.as_ref().is_none_or(is_hash), "user {name}: the password is not an argon2id hash");
        }
        Ok(())
    }

    /// Locks, reads, changes, checks and replaces. On any error the file is as it was.
    pub fn change<T>(path: &Path, change: impl FnOnce(&mut UsersFile) -> anyhow::Result<T>) -> anyhow::Result<T> {
        // A link stays a link: what it points to is replaced.
        let path = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let unwritable = || format!("can't write {}", path.display());
        // A file beside it, as the file itself is replaced and a lock on it would be on the old one.
        let lock = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path.with_added_extension("lock"));
        let lock = lock.with_context(unwritable)?;
        lock.lock().with_context(unwritable)?;
        let mut file = UsersFile::read_or_empty(path)?;
        let outcome = change(&mut file)?;
        file.check()?;
        replace(path, &(serde_json::to_string_pretty(&file)? + "\n")).with_context(unwritable)?;
        Ok(outcome)
    }
}

/// Temporary file, fsync, rename, fsync of the folder: after a power cut either the old file is there or the new.
fn replace(path: &Path, content: &str) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temporary = tempfile::NamedTempFile::new_in(folder)?;
    temporary.write_all(content.as_bytes())?;
    temporary.as_file().sync_all()?;
    // A server that runs as another user must be able to read it as before; only root can do that.
    let _ = path.metadata().and_then(|old| fchown(temporary.as_file(), Some(old.uid()), Some(old.gid())));
    temporary.persist(path)?;
    Ok(fs::File::open(folder)?.sync_all()?)
}
