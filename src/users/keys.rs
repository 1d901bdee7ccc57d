//! Public keys, as clients prove them and as lines of a .pub file.

use ssh_key::public::KeyData;
use ssh_key::{Algorithm, HashAlg};
use std::fmt::{self, Debug, Display, Formatter};
use std::hash::{Hash, Hasher};
use std::str::FromStr;

/// Smallest RSA key that is accepted, in bits, as for OpenSSH's RequiredRSASize in most
/// distributions.
const MIN_RSA_BITS: u32 = 2048;
/// How many characters of an invalid key an error shows.
const MAX_SHOWN_CHARS: usize = 40;
/// Texts that occur only in private keys: the end of a PEM header, that of ssh.com's format,
/// PuTTY's first line, and the beginning of OpenSSH's format in base64.
const PRIVATE_KEY_MARKS: [&str; 4] = [
    "PRIVATE KEY-----",
    "PRIVATE KEY ----",
    "PuTTY-User-Key-File-",
    "b3BlbnNzaC1rZXktdjE",
];
/// The error for a private key. It never shows the key.
pub const PRIVATE_KEY: &str = "this is a private key, which must stay with its owner (the shell's history may hold it now): \
     give the public key, the one line of its .pub file or of `ssh-keygen -y -f FILE`, in quotes";

/// Why a text is not a key that the server can check signatures by.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidKey {
    /// It is a private key.
    #[error("{PRIVATE_KEY}")]
    Private,
    /// It can't be parsed.
    #[error("{shown:?} is not a public key, the one line of a .pub file: {why}")]
    Malformed {
        /// The beginning of the text.
        shown: String,
        /// What the parser says.
        why: String,
    },
    /// An RSA key that is too easy to break.
    #[error("an RSA key of {bits} bits is too short: 2,048 at least")]
    ShortRsa {
        /// Its size.
        bits: u32,
    },
    /// A key of a type that the server doesn't support.
    #[error("keys of type {algorithm} are not supported: use ssh-ed25519, ecdsa-sha2 or ssh-rsa")]
    Unsupported {
        /// Its type, as in the line.
        algorithm: String,
    },
}

/// A public key.
///
/// Parsed from a line of a .pub file, and `Display` is that line. Two keys are equal whatever their
/// comments.
#[derive(Clone)]
pub struct PublicKey(ssh_key::PublicKey);

impl PublicKey {
    /// A key that a client sent, which may be of a type that [`PublicKey::from_str`] refuses.
    pub(crate) fn from_client(key: ssh_key::PublicKey) -> PublicKey {
        PublicKey(key)
    }

    /// What clients and `ssh-keygen -l` show: `SHA256:…`.
    pub fn fingerprint(&self) -> String {
        self.0.fingerprint(HashAlg::Sha256).to_string()
    }

    /// Its type, the first word of its line: `ssh-ed25519`.
    pub fn algorithm(&self) -> String {
        self.0.algorithm().to_string()
    }

    /// The comment at the end of its line; often empty, and never from a client. It may hold
    /// control characters.
    pub fn comment(&self) -> &str {
        self.0.comment().as_str_lossy()
    }

    pub(super) fn data(&self) -> &KeyData {
        self.0.key_data()
    }

    /// Fails unless the server can check signatures by this key.
    pub(super) fn check_strength(&self) -> Result<(), InvalidKey> {
        match self.0.algorithm() {
            Algorithm::Ed25519 | Algorithm::Ecdsa { .. } => Ok(()),
            Algorithm::Rsa { .. } => {
                let bits = self.data().rsa().map_or(0, |rsa| rsa.key_size());
                if bits < MIN_RSA_BITS {
                    return Err(InvalidKey::ShortRsa { bits });
                }
                Ok(())
            }
            other => Err(InvalidKey::Unsupported {
                algorithm: other.to_string(),
            }),
        }
    }
}

impl FromStr for PublicKey {
    type Err = InvalidKey;

    /// Parses a line of a .pub file.
    fn from_str(line: &str) -> Result<PublicKey, InvalidKey> {
        if is_private_key(line) {
            return Err(InvalidKey::Private);
        }
        let key = match ssh_key::PublicKey::from_openssh(line) {
            Ok(key) => PublicKey(key),
            Err(error) => {
                return Err(InvalidKey::Malformed {
                    shown: line.chars().take(MAX_SHOWN_CHARS).collect(),
                    why: error.to_string(),
                });
            }
        };
        key.check_strength()?;
        Ok(key)
    }
}

impl PartialEq for PublicKey {
    fn eq(&self, other: &PublicKey) -> bool {
        self.data() == other.data()
    }
}

impl Eq for PublicKey {}

impl Hash for PublicKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.data().hash(state);
    }
}

impl Display for PublicKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.0.to_openssh() {
            Ok(line) => f.write_str(&line),
            // Every key that could be read can be written.
            Err(_) => write!(f, "{} {}", self.algorithm(), self.fingerprint()),
        }
    }
}

impl Debug for PublicKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({} {})", self.algorithm(), self.fingerprint())
    }
}

/// Whether a text contains a private key, or the beginning of one.
pub fn is_private_key(text: &str) -> bool {
    PRIVATE_KEY_MARKS.iter().any(|mark| text.contains(mark))
}
