//! Users that the program itself lists.

use super::password::{PasswordCheck, hash_password};
use super::{Account, Attempt, Auth, Login, Proof, PublicKey, Refusal};
use async_trait::async_trait;
use std::collections::HashMap;
use std::fmt::{self, Debug, Formatter};

/// A list of users, by the names of their accounts. Passwords are kept as argon2id hashes.
///
/// ```
/// use sftpd::users::{Access, Account, UserList};
///
/// # fn main() -> anyhow::Result<()> {
/// let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB9dG4kjRhQTtWTVzd2t27+t0DEHBPW7iOD23TUiYLio";
/// let users = UserList::default()
///     .with_password(Account::new("guest").access(Access::ReadOnly), "guest")?
///     .with_key(Account::new("alice"), key.parse()?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Default)]
pub struct UserList {
    users: HashMap<String, ListedUser>,
    passwords: PasswordCheck,
}

struct ListedUser {
    account: Account,
    keys: Vec<PublicKey>,
    /// argon2id hash.
    password: Option<String>,
}

/// Without the hash.
impl Debug for ListedUser {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("ListedUser")
            .field("account", &self.account)
            .field("keys", &self.keys)
            .field("has_password", &self.password.is_some())
            .finish()
    }
}

impl UserList {
    /// Lists a user with a password, or gives one that is listed this account and password. Takes
    /// the time of a login, for the hash.
    pub fn with_password(mut self, account: Account, password: &str) -> anyhow::Result<UserList> {
        let hash = hash_password(password)?;
        self.list(account).password = Some(hash);
        Ok(self)
    }

    /// Lists a user with a key, or gives one that is listed this account and one more key.
    #[must_use]
    pub fn with_key(mut self, account: Account, key: PublicKey) -> UserList {
        self.list(account).keys.push(key);
        self
    }

    fn list(&mut self, account: Account) -> &mut ListedUser {
        let user = self
            .users
            .entry(account.name.clone())
            .or_insert_with(|| ListedUser {
                account: account.clone(),
                keys: Vec::new(),
                password: None,
            });
        user.account = account;
        user
    }

    fn find_key_owner(&self, user: &str, key: &PublicKey) -> Login {
        match self.users.get(user) {
            Some(listed) if listed.keys.contains(key) => Login::Accept(listed.account.clone()),
            Some(_) => Login::Refuse,
            None => Login::RefuseBecause(Refusal::UnknownUser),
        }
    }

    async fn check_password(&self, user: &str, password: &str) -> Login {
        let found = self.users.get(user);
        // A user that isn't listed has no password either, and takes as long.
        let known = match found {
            Some(listed) => listed.password.clone(),
            None => None,
        };
        let is_right = self.passwords.is_right(known, password).await;
        match found {
            Some(listed) if is_right => Login::Accept(listed.account.clone()),
            Some(_) => Login::Refuse,
            None => Login::RefuseBecause(Refusal::UnknownUser),
        }
    }
}

#[async_trait]
impl Auth for UserList {
    async fn login(&self, attempt: Attempt) -> Login {
        match attempt.proof {
            Proof::Password(password) => self.check_password(&attempt.user, &password).await,
            Proof::OfferedKey(key) | Proof::ProvedKey(key) => {
                self.find_key_owner(&attempt.user, &key)
            }
            // A list has no authority.
            Proof::Certificate(_) => Login::Refuse,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, SocketAddr};

    const KEY: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB9dG4kjRhQTtWTVzd2t27+t0DEHBPW7iOD23TUiYLio";
    const OTHER: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE8scEn2htm9vSRE8JJEEkiQdb9kYinuVZ49Ka/qEnZI";

    async fn may_log_in(users: &UserList, user: &str, proof: Proof) -> bool {
        let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, 22));
        let login = users.login(Attempt::new(user, peer, proof)).await;
        match login {
            Login::Accept(account) => {
                assert_eq!(account.name, user);
                true
            }
            Login::Refuse | Login::RefuseBecause(_) => false,
            Login::Disconnect => panic!("disconnected"),
        }
    }

    #[tokio::test]
    async fn listed_users_log_in_with_what_they_have() {
        let users = UserList::default()
            .with_key(Account::new("alice"), KEY.parse().unwrap())
            .with_password(Account::new("alice").home("a"), "right")
            .unwrap()
            .with_key(Account::new("bob"), OTHER.parse().unwrap());
        let home = users.users["alice"].account.home_prefix();
        assert_eq!(home.as_deref(), Some("a/"));
        let password = |password: &str| Proof::Password(password.to_owned());
        assert!(may_log_in(&users, "alice", password("right")).await);
        assert!(!may_log_in(&users, "alice", password("wrong")).await);
        assert!(!may_log_in(&users, "bob", password("right")).await);
        assert!(!may_log_in(&users, "bob", password("")).await);
        assert!(!may_log_in(&users, "carol", password("")).await);
        let proofs = [Proof::OfferedKey, Proof::ProvedKey];
        for proof in proofs {
            assert!(may_log_in(&users, "alice", proof(KEY.parse().unwrap())).await);
            assert!(!may_log_in(&users, "alice", proof(OTHER.parse().unwrap())).await);
            assert!(!may_log_in(&users, "carol", proof(KEY.parse().unwrap())).await);
        }
    }
}
