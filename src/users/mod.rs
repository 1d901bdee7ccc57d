//! Who may log in: the [`Auth`] trait, and users.json behind it.
//!
//! Called by `server` at every login and by `sftpd users …`. Invariants: the file is replaced,
//! never rewritten in place; a file that can't be read as a whole leaves the users of the last good
//! file in force.

mod file;
mod file_auth;
mod file_watch;
mod keys;
mod password;

pub use file::{MAX_USERS_FILE_SIZE, User, UsersFile, UsersFileError, check_name};
#[doc(hidden)]
pub use file::{exposure, normalize_home};
pub use file_auth::FileAuth;
pub use keys::parse_key;
#[doc(hidden)]
pub use keys::{PRIVATE_KEY, is_private_key};
pub use password::{hash, random};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use ssh_key::PublicKey;
use std::str::FromStr;

/// What a user may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Everything.
    #[default]
    ReadWrite,
    /// List and download.
    ReadOnly,
    /// Upload, list, rename and remove, but not download.
    WriteOnly,
}

impl Access {
    /// Its name in users.json and for `--access`.
    pub fn as_str(self) -> &'static str {
        match self {
            Access::ReadWrite => "read-write",
            Access::ReadOnly => "read-only",
            Access::WriteOnly => "write-only",
        }
    }
}

impl FromStr for Access {
    type Err = UnknownAccess;

    fn from_str(word: &str) -> Result<Access, UnknownAccess> {
        match word {
            "read-write" => Ok(Access::ReadWrite),
            "read-only" => Ok(Access::ReadOnly),
            "write-only" => Ok(Access::WriteOnly),
            other => Err(UnknownAccess(other.to_owned())),
        }
    }
}

/// A word that is not the name of an [`Access`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no access: use read-write, read-only or write-only")]
pub struct UnknownAccess(pub String);

/// An authenticated user.
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
    /// The account of this user, if the key is one of the user's. Called before and after the
    /// signature is checked.
    async fn public_key(&self, user: &str, key: &PublicKey) -> Option<Account>;
    /// The account of this user, if the password is right. Must take as long for users that don't
    /// exist.
    async fn password(&self, user: &str, password: &str) -> Option<Account>;
}
