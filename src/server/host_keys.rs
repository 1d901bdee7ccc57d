//! The server's own keys: an existing server's can be moved in, so that clients see the same host as before.

use anyhow::{Context, bail};
use russh::keys::ssh_key::{HashAlg, LineEnding};
use russh::keys::{Algorithm, PrivateKey, decode_secret_key};
use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// A private key that names this host.
#[derive(Clone)]
pub struct HostKey(pub(super) PrivateKey);

impl HostKey {
    /// What clients show their users: `SHA256:…`.
    pub fn fingerprint(&self) -> String {
        self.0.fingerprint(HashAlg::Sha256).to_string()
    }

    /// The line for known_hosts, without the host's name.
    pub fn public_line(&self) -> anyhow::Result<String> {
        Ok(self.0.public_key().to_openssh()?)
    }
}

/// A key for a server that ends with the process.
pub fn temporary() -> anyhow::Result<HostKey> {
    let key = PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).context("can't make a host key")?;
    Ok(HostKey(key))
}

/// Loads every private key in the directory (`*.pub` files are passed over); where there is none, makes an
/// ed25519 one, `ssh_host_ed25519_key`, readable by its owner only.
pub fn load_or_create(directory: &Path) -> anyhow::Result<Vec<HostKey>> {
    let shown = directory.display();
    let mut keys = Vec::new();
    if directory.exists() {
        let mut files: Vec<_> = std::fs::read_dir(directory)
            .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
            .with_context(|| format!("can't read the host keys in {shown}"))?;
        files.sort();
        for file in files.iter().filter(|file| file.is_file() && file.extension().is_none_or(|end| end != "pub")) {
            keys.push(load(file)?);
        }
    }
    if keys.is_empty() {
        keys.push(create(directory).with_context(|| format!("can't make a host key in {shown}"))?);
    }
    Ok(keys)
}

fn load(file: &Path) -> anyhow::Result<HostKey> {
    let shown = file.display();
    let text = std::fs::read_to_string(file).with_context(|| format!("can't read the host key {shown}"))?;
    let key = decode_secret_key(&text, None).with_context(|| {
        format!("{shown} is not a private key without a passphrase: move it out of the host key directory")
    })?;
    if !matches!(key.algorithm(), Algorithm::Ed25519 | Algorithm::Ecdsa { .. } | Algorithm::Rsa { .. }) {
        bail!("{shown}: host keys of type {} are not supported", key.algorithm());
    }
    Ok(HostKey(key))
}

fn create(directory: &Path) -> anyhow::Result<HostKey> {
    let key = temporary()?;
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let private = directory.join("ssh_host_ed25519_key");
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&private)?;
    file.write_all(key.0.to_openssh(LineEnding::LF)?.as_bytes())?;
    file.sync_all()?;
    std::fs::write(private.with_extension("pub"), format!("{}\n", key.public_line()?))?;
    log::info!("made the host key {} ({})", private.display(), key.fingerprint());
    Ok(key)
}
