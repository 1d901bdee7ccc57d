//! Who may log in: the [`Auth`] trait, and users.json behind it.
//!
//! Called by `server` at every login and by `sftpd users …`. Invariants: the file is replaced, never
//! rewritten in place; a file that can't be read whole changes nothing for those who could log in before.

pub mod commands;
mod file;
mod password;

pub use file::{Access, User, UsersFile};
pub use password::{hash, random};

use anyhow::Context;
use async_trait::async_trait;
use file::Users;
use ssh_key::PublicKey;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

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
}

/// users.json as the server sees it: read again whenever it has changed.
pub struct FileAuth {
    path: PathBuf,
    // A std lock: held while the small file is read, never across an await.
    loaded: Mutex<Loaded>,
    passwords: password::Checker,
}

struct Loaded {
    stamp: Option<Stamp>,
    users: Arc<Users>,
}

/// Changes whenever the file does: a rename brings another inode, an edit another time.
#[derive(PartialEq, Eq)]
struct Stamp(u64, u64, i64, i64);

impl From<Metadata> for Stamp {
    fn from(found: Metadata) -> Stamp {
        Stamp(found.ino(), found.size(), found.mtime(), found.mtime_nsec())
    }
}

impl FileAuth {
    /// Reads the file once, so that the operator learns of a mistake at the start.
    pub fn open(path: PathBuf) -> anyhow::Result<FileAuth> {
        let stamp = std::fs::metadata(&path).with_context(|| {
            format!("no users file at {}: make one with `sftpd users add NAME \"KEY\"`", path.display())
        })?;
        let users = Arc::new(UsersFile::new(&path).read()?);
        let loaded = Mutex::new(Loaded { stamp: Some(stamp.into()), users });
        Ok(FileAuth { path, loaded, passwords: password::Checker::new()? })
    }

    /// The users as the file has them now, or as it last had them.
    fn users(&self) -> Arc<Users> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = std::fs::metadata(&self.path).ok().map(Stamp::from);
        if loaded.stamp != stamp {
            match UsersFile::new(&self.path).read() {
                Ok(users) => loaded.users = Arc::new(users),
                Err(error) => log::error!("the users of the last good file stay in force: {error:#}"),
            }
            loaded.stamp = stamp;
        }
        loaded.users.clone()
    }
}

#[async_trait]
impl Auth for FileAuth {
    async fn public_key(&self, user: &str, key: &PublicKey) -> Option<Account> {
        let users = self.users();
        let found = users.users.get(user)?;
        found.parsed_keys().any(|known| known.key_data() == key.key_data()).then(|| found.account(user))
    }

    async fn password(&self, user: &str, password: &str) -> Option<Account> {
        let users = self.users();
        let found = users.users.get(user);
        let hash = found.and_then(|found| found.password.clone());
        let right = self.passwords.check(hash, password.to_owned()).await;
        found.filter(|_| right).map(|found| found.account(user))
    }
}

/// One user with a password, for `sftpd demo` and tests.
pub struct SingleUser {
    account: Account,
    hash: String,
    passwords: password::Checker,
}

impl SingleUser {
    /// With everything allowed below `NAME/`.
    pub fn new(name: &str, password: &str) -> anyhow::Result<SingleUser> {
        let account = Account { name: name.to_owned(), home: format!("{name}/"), access: Access::ReadWrite };
        Ok(SingleUser { account, hash: hash(password)?, passwords: password::Checker::new()? })
    }
}

#[async_trait]
impl Auth for SingleUser {
    async fn public_key(&self, _user: &str, _key: &PublicKey) -> Option<Account> {
        None
    }

    async fn password(&self, user: &str, password: &str) -> Option<Account> {
        let hash = (user == self.account.name).then(|| self.hash.clone());
        self.passwords.check(hash, password.to_owned()).await.then(|| self.account.clone())
    }
}
