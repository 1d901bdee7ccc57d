//! Users' public keys, as lines of a .pub file.

use anyhow::{bail, ensure};
use ssh_key::{Algorithm, PublicKey};

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

/// Parses a key. Fails if the server can't check signatures by it.
pub fn parse_key(line: &str) -> anyhow::Result<PublicKey> {
    ensure!(!is_private_key(line), PRIVATE_KEY);
    let key = match PublicKey::from_openssh(line) {
        Ok(key) => key,
        Err(error) => {
            let shown: String = line.chars().take(MAX_SHOWN_CHARS).collect();
            bail!("{shown:?} is not a public key: give one line of a .pub file, in quotes: {error}")
        }
    };
    match key.algorithm() {
        Algorithm::Ed25519 | Algorithm::Ecdsa { .. } => Ok(key),
        Algorithm::Rsa { .. } => {
            let bits = key.key_data().rsa().map_or(0, |rsa| rsa.key_size());
            ensure!(
                bits >= MIN_RSA_BITS,
                "an RSA key of {bits} bits is too short: 2,048 at least"
            );
            Ok(key)
        }
        other => {
            bail!("keys of type {other} are not supported: use ssh-ed25519, ecdsa-sha2 or ssh-rsa")
        }
    }
}

/// Whether a text contains a private key, or the beginning of one.
pub fn is_private_key(text: &str) -> bool {
    PRIVATE_KEY_MARKS.iter().any(|mark| text.contains(mark))
}
