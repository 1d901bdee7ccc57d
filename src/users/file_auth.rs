//! The server's view of users.json.

use super::file_watch::{FileWatch, Poll};
use super::password::PasswordCheck;
use super::{Attempt, Auth, Login, Proof, PublicKey, Refusal, User};
use async_trait::async_trait;
use std::fmt::{self, Debug, Formatter};
use std::path::PathBuf;
use std::sync::Arc;

/// Lets in the users of users.json, as the file is at that moment.
pub struct FileAuth {
    watch: Arc<FileWatch>,
    passwords: PasswordCheck,
    /// So that the log tells of a broken file at once, not when someone logs in.
    _poll: Poll,
}

impl Debug for FileAuth {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileAuth").finish_non_exhaustive()
    }
}

impl FileAuth {
    /// Reads the file once, so that the operator learns of a mistake at the start. From then on a
    /// thread looks at it every second, until the value is dropped.
    pub fn open(path: PathBuf) -> anyhow::Result<FileAuth> {
        let watch = FileWatch::open(path)?;
        let poll = Poll::start(&watch)?;
        Ok(FileAuth {
            watch,
            passwords: PasswordCheck::default(),
            _poll: poll,
        })
    }

    async fn find_key_owner(&self, name: &str, key: &PublicKey) -> Login {
        match self.watch.user(name).await {
            Some(user) if user.has_key(key) => admit(name, &user),
            Some(_) => Login::Refuse,
            None => Login::RefuseBecause(Refusal::UnknownUser),
        }
    }

    async fn check_password(&self, name: &str, password: &str) -> Login {
        let user = self.watch.user(name).await;
        // Checked for unknown and disabled users too, so that they take as long as a wrong password.
        let hash = user.as_ref().and_then(|user| user.password.clone());
        let is_right = self.passwords.is_right(hash, password).await;
        match user {
            Some(user) if is_right => admit(name, &user),
            Some(_) => Login::Refuse,
            None => Login::RefuseBecause(Refusal::UnknownUser),
        }
    }
}

#[async_trait]
impl Auth for FileAuth {
    async fn login(&self, attempt: Attempt) -> Login {
        match attempt.proof {
            Proof::Password(password) => self.check_password(&attempt.user, &password).await,
            Proof::OfferedKey(key) | Proof::ProvedKey(key) => {
                self.find_key_owner(&attempt.user, &key).await
            }
            // users.json has no authorities.
            Proof::Certificate(_) => Login::Refuse,
        }
    }
}

/// Accepts a user whose key or password is right, unless the user is disabled.
fn admit(name: &str, user: &User) -> Login {
    match user.disabled {
        true => Login::RefuseBecause(Refusal::Disabled),
        false => Login::Accept(user.account(name)),
    }
}
