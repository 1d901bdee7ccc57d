//! The server's own keys: an existing server's can be moved in, so that clients see the same host as before.

use anyhow::{Context, bail};
use russh::keys::ssh_key::private::RsaKeypair;
use russh::keys::ssh_key::{HashAlg, LineEnding};
use russh::keys::{Algorithm, EcdsaCurve, PrivateKey, decode_secret_key};
use std::fmt::{self, Display, Formatter};
use std::fs::{self, DirBuilder, DirEntry, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::{io::ErrorKind, io::Write, path::Path};

/// Size of a new RSA key in bits, as OpenSSH's `ssh-keygen -A` makes it.
const RSA_BITS: usize = 3072;

/// A private key that names this host. `Display` is its type and fingerprint, as `ssh` shows them: `ED25519 SHA256:…`.
#[derive(Clone)]
pub struct HostKey(pub(super) PrivateKey);

impl Display for HostKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.type_name(), self.fingerprint())
    }
}

impl HostKey {
    /// As in `ssh_host_ed25519_key`, in capitals.
    fn type_name(&self) -> &'static str {
        match self.0.algorithm() {
            Algorithm::Ed25519 => "ED25519",
            Algorithm::Ecdsa { .. } => "ECDSA",
            Algorithm::Rsa { .. } => "RSA",
            // None of these is ever loaded or made.
            _ => "UNKNOWN",
        }
    }

    /// What clients show their users: `SHA256:…`.
    pub fn fingerprint(&self) -> String {
        self.0.fingerprint(HashAlg::Sha256).to_string()
    }
}

/// Makes an ed25519 key, for a server that ends with the process.
pub fn temporary() -> anyhow::Result<HostKey> {
    Ok(HostKey(
        PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519)
            .context("can't make a host key")?,
    ))
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

/// Loads every private key in the directory (`*.pub` files are passed over). If there is none, makes one of each type
/// that [`generate`] makes, named as OpenSSH's are (`ssh_host_ed25519_key`) and readable by their owner only.
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
    for key in &keys {
        write(directory, key).with_context(context)?;
    }
    Ok(keys)
}

/// Loads every private key in the directory. None where there is no such directory.
pub fn load(directory: &Path) -> anyhow::Result<Vec<HostKey>> {
    let context = || format!("can't read the host keys in {}", directory.display());
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries
            .with_context(context)?
            .collect::<Result<Vec<_>, _>>()
            .with_context(context)?,
    };
    let mut files: Vec<_> = entries.iter().map(DirEntry::path).collect();
    files.retain(|file| file.is_file() && file.extension().is_none_or(|end| end != "pub"));
    files.sort();
    files.iter().map(|file| read(file)).collect()
}

fn read(file: &Path) -> anyhow::Result<HostKey> {
    let shown = file.display();
    let text =
        fs::read_to_string(file).with_context(|| format!("can't read the host key {shown}"))?;
    match decode_secret_key(&text, None) {
        Ok(key)
            if matches!(
                key.algorithm(),
                Algorithm::Ed25519 | Algorithm::Ecdsa { .. } | Algorithm::Rsa { .. }
            ) =>
        {
            Ok(HostKey(key))
        }
        Ok(key) => bail!(
            "{shown}: host keys of type {} are not supported",
            key.algorithm()
        ),
        Err(error) => {
            bail!("{shown} is no private key without a passphrase ({error}): move it elsewhere")
        }
    }
}

fn write(directory: &Path, key: &HostKey) -> anyhow::Result<()> {
    let private = directory.join(format!("ssh_host_{}_key", key.type_name().to_lowercase()));
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
    log::info!("made the host key {} ({key})", private.display());
    Ok(())
}
