//! The server's own keys. Those of an existing server can be used, so that clients see the same
//! host as before.

use anyhow::{Context, bail};
use russh::keys::ssh_key::private::RsaKeypair;
use russh::keys::ssh_key::{HashAlg, LineEnding};
use russh::keys::{Algorithm, EcdsaCurve, PrivateKey, decode_secret_key};
use std::fmt::{self, Debug, Display, Formatter};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Size of a new RSA key in bits, as OpenSSH's `ssh-keygen -A` makes it.
const RSA_BITS: usize = 3072;

/// A private key of this host. `Display` is its type and fingerprint, as `ssh` shows them:
/// `ED25519 SHA256:…`. `Debug` does not show the key either.
#[derive(Clone)]
pub struct HostKey(pub(super) PrivateKey);

impl Display for HostKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.type_name(), self.fingerprint())
    }
}

impl Debug for HostKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "HostKey({self})")
    }
}

/// Why a text is no host key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidHostKey {
    /// It can't be parsed, or is encrypted.
    #[error("not an unencrypted private key ({why})")]
    #[non_exhaustive]
    Malformed {
        /// What the parser says.
        why: String,
    },
    /// A key of a type that the server doesn't support.
    #[error("host keys of type {algorithm} are not supported")]
    #[non_exhaustive]
    Unsupported {
        /// Its type.
        algorithm: String,
    },
}

impl HostKey {
    /// Reads a private key, for example from a vault: the text of a file that `ssh-keygen` writes,
    /// not encrypted.
    ///
    /// ```
    /// use sftpd::server::{self, HostKey};
    ///
    /// # fn main() -> anyhow::Result<()> {
    /// let secret = server::temporary()?.to_openssh()?;
    /// let key = HostKey::from_openssh(&secret)?;
    /// # assert_eq!(*key.to_openssh()?, secret);
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_openssh(secret: &str) -> Result<HostKey, InvalidHostKey> {
        let key = match decode_secret_key(secret, None) {
            Ok(key) => key,
            Err(error) => {
                return Err(InvalidHostKey::Malformed {
                    why: error.to_string(),
                });
            }
        };
        match key.algorithm() {
            Algorithm::Ed25519 | Algorithm::Ecdsa { .. } | Algorithm::Rsa { .. } => {
                Ok(HostKey(key))
            }
            other => Err(InvalidHostKey::Unsupported {
                algorithm: other.to_string(),
            }),
        }
    }

    /// The private key as a text that must be kept secret, for [`from_openssh`](Self::from_openssh)
    /// or a file.
    pub fn to_openssh(&self) -> anyhow::Result<String> {
        let text = self.0.to_openssh(LineEnding::LF)?;
        Ok(text.to_string())
    }

    /// The type, as in the file name `ssh_host_ed25519_key` but in capitals.
    fn type_name(&self) -> &'static str {
        match self.0.algorithm() {
            Algorithm::Ed25519 => "ED25519",
            Algorithm::Ecdsa { .. } => "ECDSA",
            Algorithm::Rsa { .. } => "RSA",
            // No others are loaded or made.
            _ => "UNKNOWN",
        }
    }

    /// What clients show their users: `SHA256:…`.
    pub fn fingerprint(&self) -> String {
        self.0.fingerprint(HashAlg::Sha256).to_string()
    }
}

/// Makes an ed25519 key, for a server whose key need not outlive the process.
pub fn temporary() -> anyhow::Result<HostKey> {
    let key = PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519)
        .context("can't make a host key")?;
    Ok(HostKey(key))
}

/// Makes a key of each type that clients in use know: ed25519, ECDSA on P-256, and RSA.
pub fn generate() -> anyhow::Result<Vec<HostKey>> {
    let p256 = Algorithm::Ecdsa {
        curve: EcdsaCurve::NistP256,
    };
    let ecdsa =
        PrivateKey::random(&mut rand::rng(), p256).context("can't make an ECDSA host key")?;
    let rsa =
        RsaKeypair::random(&mut rand::rng(), RSA_BITS).context("can't make an RSA host key")?;
    Ok(vec![temporary()?, HostKey(ecdsa), HostKey(rsa.into())])
}

/// Loads every private key in the directory, which is every file but `*.pub`. If there is none,
/// makes one of each type that [`generate`] makes, named as OpenSSH's are (`ssh_host_ed25519_key`)
/// and readable by their owner only.
pub fn load_or_create(directory: &Path) -> anyhow::Result<Vec<HostKey>> {
    let context = || format!("can't make the host keys in {}", directory.display());
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(context)?;
    let keys = load(directory)?;
    if !keys.is_empty() {
        return Ok(keys);
    }
    let keys = generate()?;
    write_all(directory, &keys).with_context(context)?;
    Ok(keys)
}

/// Loads every private key in the directory. Returns no keys if there is no such directory.
pub fn load(directory: &Path) -> anyhow::Result<Vec<HostKey>> {
    let context = || format!("can't read the host keys in {}", directory.display());
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(context)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let file = entry.with_context(context)?.path();
        let is_public = file.extension().is_some_and(|extension| extension == "pub");
        if file.is_file() && !is_public {
            files.push(file);
        }
    }
    files.sort();
    files.iter().map(|file| read(file)).collect()
}

fn read(file: &Path) -> anyhow::Result<HostKey> {
    let shown = file.display();
    let text =
        fs::read_to_string(file).with_context(|| format!("can't read the host key {shown}"))?;
    match HostKey::from_openssh(&text) {
        Ok(key) => Ok(key),
        Err(error @ InvalidHostKey::Malformed { .. }) => {
            bail!("{shown} is {error}: move it out of this directory")
        }
        Err(error @ InvalidHostKey::Unsupported { .. }) => bail!("{shown}: {error}"),
    }
}

/// Writes all keys or, if that fails, none: the next start would take a part of them for all. They
/// are written to a temporary directory in this one, and moved from there.
fn write_all(directory: &Path, keys: &[HostKey]) -> anyhow::Result<()> {
    let temporary = tempfile::tempdir_in(directory)?;
    for key in keys {
        write(temporary.path(), key)?;
    }
    for entry in temporary.path().read_dir()? {
        let entry = entry?;
        fs::rename(entry.path(), directory.join(entry.file_name()))?;
    }
    for key in keys {
        log::info!(
            "made the host key {} ({key})",
            directory.join(file_name(key)).display()
        );
    }
    Ok(())
}

/// As OpenSSH names it.
fn file_name(key: &HostKey) -> String {
    format!("ssh_host_{}_key", key.type_name().to_lowercase())
}

fn write(directory: &Path, key: &HostKey) -> anyhow::Result<()> {
    let private = directory.join(file_name(key));
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&private)?;
    file.write_all(key.0.to_openssh(LineEnding::LF)?.as_bytes())?;
    file.sync_all()?;
    fs::write(
        private.with_extension("pub"),
        format!("{}\n", key.0.public_key().to_openssh()?),
    )?;
    Ok(())
}
