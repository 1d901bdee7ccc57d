//! The server's view of who may log in.

use super::file_watch::{FileWatch, Poll};
use super::password::{hash, is_password};
use super::{Account, Auth, User};
use async_trait::async_trait;
use ssh_key::PublicKey;
use std::path::PathBuf;
use std::sync::Arc;

/// Lets in the users of users.json, as the file is at that moment.
pub struct FileAuth(Users);

/// Where users come from.
enum Users {
    File {
        watch: Arc<FileWatch>,
        /// So that the log tells of a broken file at once, not when someone logs in.
        _poll: Poll,
    },
    /// One user, and no file.
    Single { name: String, user: User },
}

impl FileAuth {
    /// Reads the file once, so that the operator learns of a mistake at the start. From then on a
    /// thread looks at it every second, until the value is dropped.
    pub fn open(path: PathBuf) -> anyhow::Result<FileAuth> {
        let watch = FileWatch::open(path)?;
        let poll = Poll::start(&watch)?;
        Ok(FileAuth(Users::File { watch, _poll: poll }))
    }

    /// One user with a password and no file, for `sftpd demo` and tests.
    pub fn single(name: &str, password: &str) -> anyhow::Result<FileAuth> {
        let user = User {
            password: Some(hash(password)?),
            ..User::default()
        };
        Ok(FileAuth(Users::Single {
            name: name.to_owned(),
            user,
        }))
    }

    /// The user of this name, as the file is now if it can be read in time, or as it last could be
    /// read.
    async fn user(&self, wanted: &str) -> Option<User> {
        match &self.0 {
            Users::File { watch, .. } => watch.user(wanted).await,
            Users::Single { name, user } if name == wanted => Some(user.clone()),
            Users::Single { .. } => None,
        }
    }
}

#[async_trait]
impl Auth for FileAuth {
    async fn public_key(&self, user: &str, key: &PublicKey) -> Option<Account> {
        let found = self.user(user).await?;
        if found.has_key(key) {
            admit(user, &found)
        } else {
            None
        }
    }

    async fn password(&self, user: &str, password: &str) -> Option<Account> {
        // A user that doesn't exist has no password either.
        let found = self.user(user).await.unwrap_or_default();
        // Checked for disabled users too, so that they take as long as a wrong password.
        let right = is_password(found.password.clone(), password).await;
        if right { admit(user, &found) } else { None }
    }
}

/// The account of a user whose key or password is right, unless the user is disabled.
fn admit(name: &str, user: &User) -> Option<Account> {
    if user.disabled {
        log::info!("user {name} is disabled: `sftpd users enable {name}` ends that");
        return None;
    }
    Some(user.account(name))
}
