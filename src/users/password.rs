//! Passwords and their argon2id hashes.

use anyhow::Context;
use argon2::{Algorithm, Argon2, Params, PasswordHash, PasswordHasher, PasswordVerifier, Version};
use rand::{RngExt, distr::Alphanumeric};
use std::sync::LazyLock;
use tokio::runtime::{Builder, Runtime};

/// argon2id runs off the server's threads, and always on the same two: each keeps the memory of its last check, and a pool
/// that grows would end up with many times that.
static CHECKERS: LazyLock<Option<Runtime>> =
    LazyLock::new(|| Builder::new_current_thread().max_blocking_threads(2).build().ok());

/// Of the settings that [OWASP](https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html) takes
/// for equally strong, the one with the least memory: 7 MiB, five passes, one lane.
fn argon2() -> Argon2<'static> {
    let params = Params::new(7168, 5, 1, None).unwrap_or_default();
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// A fresh password that is easy to paste: 20 letters and digits, 119 bits.
pub fn random() -> String {
    rand::rng().sample_iter(Alphanumeric).take(20).map(char::from).collect()
}

/// The argon2id hash of a password, in PHC string format, with a salt of its own.
pub fn hash(password: &str) -> anyhow::Result<String> {
    let hash = argon2().hash_password(password.as_bytes()).context("argon2")?;
    Ok(hash.to_string())
}

/// True for an argon2id hash in PHC string format.
pub(super) fn is_hash(text: &str) -> bool {
    text.starts_with("$argon2id$") && PasswordHash::new(text).is_ok()
}

/// True only for the right password to a hash. Takes its time in every case.
pub(super) async fn is_password(known: Option<String>, password: &str) -> bool {
    let password = password.to_owned();
    let verify = move || match known {
        Some(known) => argon2().verify_password(password.as_bytes(), known.as_str()).is_ok(),
        None => {
            // A user that doesn't exist or has no password costs the same work.
            let _ = hash(&password);
            false
        }
    };
    match CHECKERS.as_ref() {
        Some(checkers) => checkers.spawn_blocking(verify).await.unwrap_or(false),
        None => false,
    }
}
