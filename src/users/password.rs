//! argon2id, off the runtime's threads, and equally slow for users that don't exist.

use anyhow::anyhow;
use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use rand::RngExt;
use tokio::sync::Semaphore;

/// Each check takes 19 MiB (argon2's default) and a core: more at once would only take memory.
const AT_ONCE: usize = 2;

/// A fresh password that is easy to paste: 20 letters and digits, 119 bits.
pub fn random() -> String {
    rand::rng().sample_iter(rand::distr::Alphanumeric).take(20).map(char::from).collect()
}

/// The argon2id hash of a password, in PHC string format, with a salt of its own.
pub fn hash(password: &str) -> anyhow::Result<String> {
    let hash = Argon2::default().hash_password(password.as_bytes()).map_err(|error| anyhow!("argon2: {error}"))?;
    Ok(hash.to_string())
}

/// Is this text a hash that [`Checker`] understands?
pub fn is_hash(text: &str) -> bool {
    text.starts_with("$argon2id$") && PasswordHash::new(text).is_ok()
}

/// Checks passwords.
pub struct Checker {
    places: Semaphore,
    /// Stands in for users that don't exist or have no password.
    nobody: String,
}

impl Checker {
    /// Hashes once, for nobody.
    pub fn new() -> anyhow::Result<Checker> {
        Ok(Checker { places: Semaphore::new(AT_ONCE), nobody: hash(&random())? })
    }

    /// True only for the right password to a hash; takes its time in every case.
    pub async fn check(&self, hash: Option<String>, password: String) -> bool {
        let Ok(_place) = self.places.acquire().await else { return false };
        let known = hash.is_some();
        let hash = hash.unwrap_or_else(|| self.nobody.clone());
        let verify = move || {
            let hash = PasswordHash::new(&hash).ok()?;
            Argon2::default().verify_password(password.as_bytes(), &hash).ok()
        };
        let right = tokio::task::spawn_blocking(verify).await;
        known && matches!(right, Ok(Some(())))
    }
}
