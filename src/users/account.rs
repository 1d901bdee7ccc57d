//! What a user may do, and where.

use super::normalize_home;
use crate::store::Store;
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::fmt::{self, Debug, Formatter};
use std::str::FromStr;
use std::sync::Arc;

/// What a user may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Access {
    /// Everything.
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

/// An authenticated user. `Debug` shows neither the store nor the session data.
///
/// ```
/// use sftpd::users::{Access, Account};
///
/// let account = Account::new("alice").home("customers/42").access(Access::ReadOnly);
/// assert_eq!(account.home_prefix().as_deref(), Some("customers/42/"));
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct Account {
    /// Names the user in logs and listings. Sessions with the same name share the limits of one
    /// user, whatever their stores: give the users of different tenants different names. Empty names
    /// and control characters are refused at the login.
    pub name: String,
    /// Prefix below the server's, `/` at its end; empty for the whole store. `None` for the
    /// directory of the account's name: a login with a name that can't be one is refused.
    pub home: Option<String>,
    /// What the user may do.
    pub access: Access,
    /// Where the files are kept, if not in the server's own store.
    ///
    /// Use the same `Arc` for the same bucket: locks of names and directories that were made hold
    /// for one `Arc`, and two of them for one bucket don't know of each other. The server drops it
    /// with the last session that uses it.
    pub store: Option<Arc<dyn Store>>,
    /// Data of the application's own; see [`Account::session_as`].
    pub session: Option<Arc<dyn Any + Send + Sync>>,
}

impl Account {
    /// An account that may do everything in the home `NAME/`.
    ///
    /// A name like `..` or `bob/x`, which users may choose for themselves, is no home: without
    /// [`home`](Self::home) the login is refused.
    pub fn new(name: impl Into<String>) -> Account {
        Account {
            name: name.into(),
            home: None,
            access: Access::ReadWrite,
            store: None,
            session: None,
        }
    }

    /// Sets the home, with or without slashes around it; empty for the whole store.
    #[must_use]
    pub fn home(mut self, home: impl AsRef<str>) -> Account {
        self.home = Some(normalize_home(home.as_ref()));
        self
    }

    /// Sets what the user may do.
    #[must_use]
    pub fn access(mut self, access: Access) -> Account {
        self.access = access;
        self
    }

    /// Gives the account a store of its own.
    #[must_use]
    pub fn store(mut self, store: Arc<dyn Store>) -> Account {
        self.store = Some(store);
        self
    }

    /// Gives the account data of the application's own.
    #[must_use]
    pub fn session(mut self, data: impl Any + Send + Sync) -> Account {
        self.session = Some(Arc::new(data));
        self
    }

    /// The session data; `None` if there are none or they are of another type. It must be the very
    /// type that was given: after `session(Arc::new(customer))` ask for `Arc<Customer>`.
    pub fn session_as<T: Any>(&self) -> Option<&T> {
        self.session.as_deref()?.downcast_ref()
    }

    /// The prefix of the account's files below that of the server; `None` if it would be the name,
    /// and the name can't be one directory.
    pub fn home_prefix(&self) -> Option<String> {
        match &self.home {
            Some(home) => Some(home.clone()),
            None if is_directory_name(&self.name) => Some(format!("{}/", self.name)),
            None => None,
        }
    }

    /// Whether log lines can show the name.
    pub(crate) fn has_valid_name(&self) -> bool {
        !self.name.is_empty() && !self.name.contains(char::is_control)
    }
}

fn is_directory_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\0'])
}

impl Debug for Account {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account")
            .field("name", &self.name)
            .field("home", &self.home_prefix())
            .field("access", &self.access)
            .field("has_store", &self.store.is_some())
            .field("has_session", &self.session.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_data_have_their_type() {
        let account = Account::new("alice").session(42_u32);
        assert_eq!(account.session_as::<u32>(), Some(&42));
        assert_eq!(account.session_as::<u64>(), None);
        assert_eq!(Account::new("alice").session_as::<u32>(), None);
    }

    #[test]
    fn only_a_name_that_is_one_directory_is_a_home() {
        for name in ["alice", "...", ".bob", "a b", "DOMAIN\\alice", "Zoë"] {
            let home = Account::new(name).home_prefix();
            assert_eq!(home, Some(format!("{name}/")));
        }
        for name in [
            "", ".", "..", "/", "//", "bob/x", "/bob", "bob/", "../bob", "a\0b",
        ] {
            assert_eq!(Account::new(name).home_prefix(), None, "{name:?}");
            for (home, prefix) in [("", ""), ("/", ""), ("/a//b/", "a/b/")] {
                let home = Account::new(name).home(home).home_prefix();
                assert_eq!(home.as_deref(), Some(prefix), "{name:?}");
            }
        }
    }

    #[test]
    fn names_that_logs_cannot_show_are_invalid() {
        for name in ["alice", "DOMAIN\\alice", "alice@example.com", "Zoë"] {
            assert!(Account::new(name).has_valid_name(), "{name:?}");
        }
        for name in ["", "a\nb", "\u{1b}[2J", "\u{9b}2J"] {
            assert!(!Account::new(name).has_valid_name(), "{name:?}");
        }
    }
}
