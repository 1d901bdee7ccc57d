//! What a client has tried before its login: the log tells it once, if none comes.
//!
//! Filled by `connection`. Bounded: a client sends what it likes.

use crate::events::{ConnectionEnd, Credential, LoginRefusal, NoLogin, shorten};

/// Limit on the fingerprints that are kept. A connection has six tries.
const MAX_KEYS: usize = 8;

/// See the module.
#[derive(Default)]
pub struct Tries {
    /// The client's identification string.
    client: Option<String>,
    name: Option<String>,
    keys: Vec<String>,
    passwords: u32,
    reason: Option<LoginRefusal>,
}

impl Tries {
    /// Notes the client's software.
    pub fn set_client(&mut self, identification: &[u8]) {
        let text = String::from_utf8_lossy(identification);
        self.client = Some(shorten(text.trim_end()));
    }

    /// The client's identification string, once it has come.
    pub fn client(&self) -> Option<String> {
        self.client.clone()
    }

    /// Notes the user name that the client gives.
    pub fn set_name(&mut self, name: &str) {
        self.name = Some(shorten(name));
    }

    /// Notes a credential that was refused.
    pub fn add(&mut self, name: &str, credential: &Credential, reason: LoginRefusal) {
        self.set_name(name);
        match &credential.fingerprint {
            Some(key) if self.keys.contains(key) || self.keys.len() >= MAX_KEYS => {}
            Some(key) => self.keys.push(key.clone()),
            None => self.passwords += 1,
        }
        // Of several, the one that says more: clients offer every key that they have.
        match (self.reason, reason) {
            (Some(_), LoginRefusal::Wrong) => {}
            (_, reason) => self.reason = Some(reason),
        }
    }

    /// What there is to tell of a connection that ends so before a login.
    pub fn no_login(&self, end: ConnectionEnd) -> Option<NoLogin> {
        let without_any = match end {
            ConnectionEnd::Closed | ConnectionEnd::SecondCredential => LoginRefusal::NothingOffered,
            ConnectionEnd::LoginTimeout => LoginRefusal::LoginTimeout,
            // They have a reason of their own.
            ConnectionEnd::NoSession
            | ConnectionEnd::NoSsh
            | ConnectionEnd::NoCommonAlgorithm
            | ConnectionEnd::Evicted
            | ConnectionEnd::Dropped
            | ConnectionEnd::Rejected
            | ConnectionEnd::ManyChannels
            | ConnectionEnd::UserLimit
            | ConnectionEnd::Unused
            | ConnectionEnd::Shutdown => return None,
        };
        Some(NoLogin {
            name: self.name.clone(),
            keys: self.keys.clone(),
            passwords: self.passwords,
            reason: self.reason.unwrap_or(without_any),
            client: self.client.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::LoginMethod;

    #[test]
    fn keys_are_told_once_and_are_bounded() {
        let mut tries = Tries::default();
        tries.set_client(b"SSH-2.0-test\r");
        for n in 0..100 {
            let credential = Credential {
                method: LoginMethod::Key,
                fingerprint: Some(format!("SHA256:{}", n / 2)),
                key_id: None,
            };
            let reason = match n {
                3 => LoginRefusal::Disabled,
                _ => LoginRefusal::Wrong,
            };
            tries.add("bob", &credential, reason);
        }
        let told = tries.no_login(ConnectionEnd::Closed).unwrap();
        assert_eq!(told.keys.len(), MAX_KEYS);
        assert_eq!((told.reason, told.passwords), (LoginRefusal::Disabled, 0));
        assert!(told.to_string().ends_with(" (SSH-2.0-test)"), "{told}");
        assert_eq!(tries.no_login(ConnectionEnd::Shutdown), None);
    }
}
