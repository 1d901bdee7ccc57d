//! The server's own keys: an existing server's can be moved in, so that clients see the same host as before.

use anyhow::{Context, bail};
use russh::keys::ssh_key::{HashAlg, LineEnding};
use russh::keys::{Algorithm, PrivateKey, decode_secret_key};
use std::fs::{self, DirBuilder, DirEntry, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::{io::ErrorKind, io::Write, path::Path};

/// A private key that names this host.
#[derive(Clone)]
pub struct HostKey(pub(super) PrivateKey);

impl HostKey {
    /// What clients show their users: `SHA256:…`.
    pub fn fingerprint(&self) -> String {
        self.0.fingerprint(HashAlg::Sha256).to_string()
    }
}

/// A key for a server that ends with the process.
pub fn temporary() -> anyhow::Result<HostKey> {
    Ok(HostKey(PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).context("can't make a host key")?))
}

/// Loads every private key in the directory (`*.pub` files are passed over); where there is none, makes an
/// ed25519 one, `ssh_host_ed25519_key`, readable by its owner only.
pub fn load_or_create(directory: &Path) -> anyhow::Result<Vec<HostKey>> {
    let context = || format!("can't make the host key in {}", directory.display());
    DirBuilder::new().recursive(true).mode(0o700).create(directory).with_context(context)?;
    let keys = load(directory)?;
    if keys.is_empty() { Ok(vec![create(directory).with_context(context)?]) } else { Ok(keys) }
}

/// Loads every private key in the directory. None where there is no such directory.
pub fn load(directory: &Path) -> anyhow::Result<Vec<HostKey>> {
    let context = || format!("can't read the host keys in {}", directory.display());
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(context)?.collect::<Result<Vec<_>, _>>().with_context(context)?,
    };
    let mut files: Vec<_> = entries.iter().map(DirEntry::path).collect();
    files.retain(|file| file.is_file() && file.extension().is_none_or(|end| end != "pub"));
    files.sort();
    files.iter().map(|file| read(file)).collect()
}

fn read(file: &Path) -> anyhow::Result<HostKey> {
    let shown = file.display();
    let text = fs::read_to_string(file).with_context(|| format!("can't read the host key {shown}"))?;
    match decode_secret_key(&text, None) {
        Ok(key) if matches!(key.algorithm(), Algorithm::Ed25519 | Algorithm::Ecdsa { .. } | Algorithm::Rsa { .. }) => {
            Ok(HostKey(key))
        }
        Ok(key) => bail!("{shown}: host keys of type {} are not supported", key.algorithm()),
        Err(error) => bail!("{shown} is no private key without a passphrase ({error}): move it elsewhere"),
    }
}

fn create(directory: &Path) -> anyhow::Result<HostKey> {
    let key = temporary()?;
    let private = directory.join("ssh_host_ed25519_key");
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&private)?;
    file.write_all(key.0.to_openssh(LineEnding::LF)?.as_bytes())?;
    file.sync_all()?;
    fs::write(private.with_extension("pub"), format!("{}\n", key.0.public_key().to_openssh()?))?;
    log::info!("made the host key {} ({})", private.display(), key.fingerprint());
    Ok(key)
}
