//! OpenSSH certificates of users
//! ([PROTOCOL.certkeys](https://cvsweb.openbsd.org/src/usr.bin/ssh/PROTOCOL.certkeys)).
//!
//! Made by `server` once russh has checked the client's signature, and asked by an
//! [`Auth`](super::Auth). Invariant: [`Certificate::is_valid_for`] repeats every check of the
//! certificate itself, and refuses what it does not know.

use super::PublicKey;
use ssh_key::Algorithm;
use ssh_key::certificate::CertType;
use std::fmt::{self, Debug, Formatter};
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

/// How many characters of a key ID the log shows.
const MAX_SHOWN_CHARS: usize = 64;

/// A certificate with which a certification authority vouches for a user's key. `Debug` shows what
/// identifies it.
///
/// Anyone can make a certificate: it means something only once [`Certificate::is_valid_for`] has
/// returned true.
#[derive(Clone)]
pub struct Certificate(ssh_key::Certificate);

/// Why a certificate is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Invalid {
    #[error("it is not one of a user")]
    NotOfUser,
    #[error("it is signed by {0}, which is no authority here")]
    UnknownAuthority(String),
    #[error("it is signed with SHA-1")]
    WeakSignature,
    #[error("the authority's signature is wrong")]
    WrongSignature,
    #[error("{0}")]
    WeakKey(#[from] super::InvalidKey),
    #[error("it is valid from {valid_after} to {valid_before} (Unix time), and now is {now}")]
    OutOfTime {
        valid_after: u64,
        valid_before: u64,
        now: u64,
    },
    #[error("the user is none of its principals")]
    OtherPrincipal,
    #[error("its critical option {0:?} is not supported")]
    CriticalOption(String),
}

/// A text that is not a certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a certificate: give the line of a -cert.pub file: {0}")]
pub struct InvalidCertificate(String);

impl Certificate {
    pub(crate) fn from_client(certificate: ssh_key::Certificate) -> Certificate {
        Certificate(certificate)
    }

    /// The user's key. The client has proved that it has the private one.
    pub fn key(&self) -> PublicKey {
        PublicKey::from_client(self.0.public_key().clone().into())
    }

    /// The key that signed the certificate.
    pub fn authority(&self) -> PublicKey {
        PublicKey::from_client(self.0.signature_key().clone().into())
    }

    /// The name that the authority gave it, for logs (`ssh-keygen -I`). It may hold any characters.
    pub fn key_id(&self) -> &str {
        self.0.key_id()
    }

    /// The number that the authority gave it (`ssh-keygen -z`).
    pub fn serial(&self) -> u64 {
        self.0.serial()
    }

    /// The user names that it is for.
    pub fn principals(&self) -> &[String] {
        self.0.valid_principals()
    }

    /// From when on it is valid, in seconds of Unix time.
    pub fn valid_after(&self) -> u64 {
        self.0.valid_after()
    }

    /// Until when it is valid, in seconds of Unix time; `u64::MAX` if for ever.
    pub fn valid_before(&self) -> u64 {
        self.0.valid_before()
    }

    /// Whether one of these authorities says that the key is this user's, now.
    ///
    /// Returns false, and logs why, if the certificate is a host's, names no principals or others,
    /// is not valid now, is signed with SHA-1, or has a critical option, such as `source-address`
    /// or `force-command`: the server enforces none.
    #[must_use]
    pub fn is_valid_for(&self, user: &str, authorities: &[PublicKey]) -> bool {
        let now = match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(now) => now.as_secs(),
            // A clock that is wrong by decades: a certificate is not valid yet.
            Err(_) => 0,
        };
        match self.check(user, authorities, now) {
            Ok(()) => true,
            Err(why) => {
                log::warn!("{} is refused for user {user:?}: {why}", self.describe());
                false
            }
        }
    }

    /// What identifies it in the log: its key ID and the key's fingerprint.
    fn describe(&self) -> String {
        let id: String = self.key_id().chars().take(MAX_SHOWN_CHARS).collect();
        format!("certificate {id:?} of key {}", self.key().fingerprint())
    }

    fn check(&self, user: &str, authorities: &[PublicKey], now: u64) -> Result<(), Invalid> {
        if self.0.cert_type() != CertType::User {
            return Err(Invalid::NotOfUser);
        }
        let authority = self.authority();
        if !authorities.contains(&authority) {
            return Err(Invalid::UnknownAuthority(authority.fingerprint()));
        }
        if self.0.signature().algorithm() == (Algorithm::Rsa { hash: None }) {
            return Err(Invalid::WeakSignature);
        }
        if self.0.verify_signature().is_err() {
            return Err(Invalid::WrongSignature);
        }
        authority.check_strength()?;
        self.key().check_strength()?;
        let valid_after = self.valid_after();
        let valid_before = self.valid_before();
        if now < valid_after || now >= valid_before {
            return Err(Invalid::OutOfTime {
                valid_after,
                valid_before,
                now,
            });
        }
        // One without principals would be for every user.
        if !self.principals().iter().any(|principal| principal == user) {
            return Err(Invalid::OtherPrincipal);
        }
        match self.0.critical_options().keys().next() {
            Some(option) => Err(Invalid::CriticalOption(option.clone())),
            None => Ok(()),
        }
    }
}

impl FromStr for Certificate {
    type Err = InvalidCertificate;

    /// Parses a line of a -cert.pub file. Checks nothing else.
    fn from_str(line: &str) -> Result<Certificate, InvalidCertificate> {
        match ssh_key::Certificate::from_openssh(line) {
            Ok(certificate) => Ok(Certificate(certificate)),
            Err(error) => Err(InvalidCertificate(error.to_string())),
        }
    }
}

impl Debug for Certificate {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("key_id", &self.key_id())
            .field("key", &self.key())
            .field("authority", &self.authority())
            .field("principals", &self.principals())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ssh_key::PrivateKey;
    use ssh_key::certificate::Builder;

    const NOW: u64 = 1_800_000_000;

    fn new_key() -> PrivateKey {
        PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).unwrap()
    }

    fn public(key: &PrivateKey) -> PublicKey {
        PublicKey::from_client(key.public_key().clone())
    }

    /// A user's certificate, valid for an hour around now.
    fn certificate(authority: &PrivateKey, change: impl FnOnce(&mut Builder)) -> Certificate {
        certificate_of(CertType::User, authority, change)
    }

    fn certificate_of(
        cert_type: CertType,
        authority: &PrivateKey,
        change: impl FnOnce(&mut Builder),
    ) -> Certificate {
        let key = new_key();
        let nonce = [7; 16];
        let mut builder = Builder::new(nonce, key.public_key(), NOW - 1800, NOW + 1800).unwrap();
        builder.cert_type(cert_type).unwrap();
        change(&mut builder);
        Certificate(builder.sign(authority).unwrap())
    }

    fn name_principals(builder: &mut Builder) {
        builder.valid_principal("alice").unwrap();
        builder.valid_principal("bob").unwrap();
    }

    #[test]
    fn one_of_a_known_authority_is_valid_for_its_principals_and_in_its_time() {
        let authority = new_key();
        let known = [public(&new_key()), public(&authority)];
        let certificate = certificate(&authority, name_principals);
        let check = |user: &str, now: u64| certificate.check(user, &known, now);
        assert_eq!(check("alice", NOW), Ok(()));
        assert_eq!(check("bob", NOW - 1800), Ok(()));
        assert_eq!(check("carol", NOW), Err(Invalid::OtherPrincipal));
        assert_eq!(check("", NOW), Err(Invalid::OtherPrincipal));
        for now in [0, NOW - 1801, NOW + 1800, u64::MAX] {
            let checked = check("alice", now);
            assert!(
                matches!(checked, Err(Invalid::OutOfTime { .. })),
                "{checked:?}"
            );
        }
    }

    #[test]
    fn what_is_in_doubt_is_refused() {
        let authority = new_key();
        let known = [public(&authority)];
        let check = |certificate: Certificate, known: &[PublicKey]| {
            certificate.check("alice", known, NOW).unwrap_err()
        };
        let good = certificate(&authority, name_principals);
        assert!(matches!(
            check(good.clone(), &[]),
            Invalid::UnknownAuthority(_)
        ));
        let other = certificate(&new_key(), name_principals);
        assert!(matches!(check(other, &known), Invalid::UnknownAuthority(_)));
        let of_everyone = certificate(&authority, |builder| {
            builder.all_principals_valid().unwrap();
        });
        assert_eq!(check(of_everyone, &known), Invalid::OtherPrincipal);
        let of_host = certificate_of(CertType::Host, &authority, name_principals);
        assert_eq!(check(of_host, &known), Invalid::NotOfUser);
        for option in ["force-command", "source-address", "verify-required"] {
            let restricted = certificate(&authority, |builder| {
                name_principals(builder);
                builder.critical_option(option, "10.0.0.0/8").unwrap();
            });
            let refused = Invalid::CriticalOption(option.to_owned());
            assert_eq!(check(restricted, &known), refused);
        }
    }

    #[test]
    fn a_certificate_that_was_changed_is_refused() {
        let authority = new_key();
        let known = [public(&authority)];
        let good = certificate(&authority, name_principals);
        let mut bytes = good.0.to_bytes().unwrap();
        let name = bytes.windows(5).position(|part| part == b"alice").unwrap();
        bytes[name..name + 5].copy_from_slice(b"carol");
        let changed = Certificate(ssh_key::Certificate::from_bytes(&bytes).unwrap());
        let refused = changed.check("carol", &known, NOW);
        assert_eq!(refused, Err(Invalid::WrongSignature));
    }

    #[test]
    fn a_line_is_parsed_and_others_are_refused() {
        let authority = new_key();
        let certificate = certificate(&authority, name_principals);
        let line = certificate.0.to_openssh().unwrap();
        let parsed: Certificate = line.parse().unwrap();
        assert_eq!(parsed.principals(), ["alice", "bob"]);
        assert_eq!(parsed.key(), certificate.key());
        let key = public(&authority).to_string();
        assert!(key.parse::<Certificate>().is_err());
        assert!("".parse::<Certificate>().is_err());
    }
}
