//! Passwords and their argon2id hashes.
//!
//! Invariant: a [`PasswordCheck`] takes the memory of [`MAX_CHECKS`] buffers at most, which are kept
//! and wiped after each use. (Buffers of this size that were freed would leave gaps in the heap,
//! which are never returned to the system.)

use anyhow::{Context, ensure};
use argon2::{Algorithm, Argon2, Block, Params, PasswordHash, PasswordHasher, Version};
use rand::distr::{Alphanumeric, SampleString};
use std::fmt::{self, Debug, Formatter};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Semaphore;

/// Passwords that one [`PasswordCheck`] checks at once. Others wait.
const MAX_CHECKS: usize = 2;
/// Limit on the memory of a hash in users.json, in KiB: the default of other programs. Each buffer
/// may keep this much.
const MAX_HASH_MEMORY: u32 = 64 * 1024;
/// Limit on the work of a hash, in KiB times passes: about a second, for which other checks may
/// wait.
const MAX_HASH_WORK: u64 = 10 * MAX_HASH_MEMORY as u64;

/// Of the settings that
/// [OWASP](https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html)
/// considers equally strong, the one with the least memory: 7 MiB, five passes, one lane.
fn argon2() -> Argon2<'static> {
    let params = Params::new(7168, 5, 1, None).unwrap_or_default();
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// Makes a password that is easy to paste: 20 letters and digits, 119 bits.
pub fn random_password() -> String {
    Alphanumeric.sample_string(&mut rand::rng(), 20)
}

/// Hashes a password with argon2id and a new salt. The hash is in PHC string format.
pub fn hash_password(password: &str) -> anyhow::Result<String> {
    let hash = argon2()
        .hash_password(password.as_bytes())
        .context("argon2")?;
    Ok(hash.to_string())
}

/// Fails unless the text is an argon2id hash in PHC string format and within the limits.
pub(super) fn check_hash(text: &str) -> anyhow::Result<()> {
    parse_hash(text)?;
    Ok(())
}

/// Parses a hash as [`check_hash`] accepts it.
fn parse_hash(text: &str) -> anyhow::Result<KnownHash> {
    const NO_HASH: &str = "the password is not an argon2id hash";
    ensure!(text.starts_with("$argon2id$"), NO_HASH);
    let hash = KnownHash::parse(text).context(NO_HASH)?;
    let params = hash.argon2.params();
    let work = u64::from(params.m_cost()) * u64::from(params.t_cost());
    ensure!(
        params.m_cost() <= MAX_HASH_MEMORY && work <= MAX_HASH_WORK,
        "the password's hash asks for too much memory or work (m={}, t={}): m can be {MAX_HASH_MEMORY} at most, m times t \
         {MAX_HASH_WORK}; set the password anew with `sftpd users add NAME --password`",
        params.m_cost(),
        params.t_cost()
    );
    Ok(hash)
}

/// A parsed hash.
struct KnownHash {
    argon2: Argon2<'static>,
    salt: Vec<u8>,
    output: Vec<u8>,
}

impl KnownHash {
    /// Parses a text in PHC string format.
    fn parse(text: &str) -> anyhow::Result<KnownHash> {
        let hash = PasswordHash::new(text)?;
        let algorithm = Algorithm::try_from(hash.algorithm.as_str())?;
        let version = match hash.version {
            Some(version) => Version::try_from(version)?,
            None => Version::default(),
        };
        let params = Params::try_from(&hash)?;
        let salt = hash.salt.context("it has no salt")?;
        let output = hash.hash.context("it ends before the hash")?;
        let argon2 = Argon2::new(algorithm, version, params);
        Ok(KnownHash {
            argon2,
            salt: salt.to_vec(),
            output: output.as_bytes().to_vec(),
        })
    }

    /// A hash that no password matches, and that takes as much work as those that [`hash_password`]
    /// makes.
    fn of_nobody() -> KnownHash {
        KnownHash {
            argon2: argon2(),
            salt: vec![0; argon2::RECOMMENDED_SALT_LEN],
            output: Vec::new(),
        }
    }

    /// Whether this is the hash of the password. The work is done in this buffer, which grows to
    /// what the hash needs.
    fn matches(&self, password: &str, buffer: &mut Vec<Block>) -> bool {
        let params = self.argon2.params();
        let length = params.output_len().unwrap_or(Params::DEFAULT_OUTPUT_LEN);
        let mut output = vec![0; length];
        grow(buffer, params.block_count());
        let hashed = self.argon2.hash_password_into_with_memory(
            password.as_bytes(),
            &self.salt,
            &mut output,
            &mut *buffer,
        );
        buffer.fill(Block::new());
        hashed.is_ok() && is_equal(&output, &self.output)
    }
}

/// Makes room for this many blocks.
fn grow(buffer: &mut Vec<Block>, blocks: usize) {
    if buffer.len() < blocks {
        // The old memory is freed before the new one is allocated.
        *buffer = Vec::new();
        buffer.resize(blocks, Block::new());
    }
}

/// Compares in a time that does not depend on the content.
fn is_equal(one: &[u8], other: &[u8]) -> bool {
    let mut difference = 0;
    for (a, b) in one.iter().zip(other) {
        difference |= a ^ b;
    }
    one.len() == other.len() && std::hint::black_box(difference) == 0
}

/// Checks passwords against argon2id hashes, two at once, and on threads that may block. Others
/// wait.
///
/// A hash of [`hash_password`] takes 7 MiB to check; those of other programs may ask for 64 MiB and
/// about a second. The memory is kept for the next check.
///
/// ```
/// use sftpd::users::{PasswordCheck, hash_password};
///
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let hash = hash_password("open sesame").unwrap();
/// let check = PasswordCheck::default();
/// assert!(check.is_right(Some(hash.clone()), "open sesame").await);
/// assert!(!check.is_right(Some(hash), "guess").await);
/// // A user that does not exist takes as long.
/// assert!(!check.is_right(None, "guess").await);
/// # });
/// ```
pub struct PasswordCheck {
    free: Arc<Semaphore>,
    buffers: Arc<IdleBuffers>,
}

/// Buffers that no check is using.
#[derive(Default)]
struct IdleBuffers(Mutex<Vec<Vec<Block>>>);

impl Default for PasswordCheck {
    fn default() -> PasswordCheck {
        PasswordCheck {
            free: Arc::new(Semaphore::new(MAX_CHECKS)),
            buffers: Arc::default(),
        }
    }
}

impl PasswordCheck {
    /// Whether the password matches the hash, a text in PHC string format. Without a hash, as for a
    /// user that doesn't exist, it does the work of one that [`hash_password`] makes, and returns
    /// false.
    ///
    /// A text that is no argon2id hash, or asks for more memory or work than allowed, matches no
    /// password; the log says so.
    pub async fn is_right(&self, hash: Option<String>, password: &str) -> bool {
        let Ok(permit) = Arc::clone(&self.free).acquire_owned().await else {
            return false;
        };
        let buffers = Arc::clone(&self.buffers);
        let password = password.to_owned();
        let check = move || {
            // A check goes on when the login is given up, and counts until its end.
            let _permit = permit;
            let mut buffer = buffers.take();
            let is_right = matches(hash, &password, &mut buffer);
            buffers.put_back(buffer);
            is_right
        };
        tokio::task::spawn_blocking(check).await.unwrap_or(false)
    }
}

impl Debug for PasswordCheck {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("PasswordCheck").finish_non_exhaustive()
    }
}

fn matches(hash: Option<String>, password: &str, buffer: &mut Vec<Block>) -> bool {
    let known = match &hash {
        Some(hash) => parse_hash(hash),
        None => Ok(KnownHash::of_nobody()),
    };
    match known {
        Ok(known) => known.matches(password, buffer),
        Err(error) => {
            log::error!("a password can't be checked: {error:#}");
            false
        }
    }
}

impl IdleBuffers {
    fn take(&self) -> Vec<Block> {
        self.lock().pop().unwrap_or_default()
    }

    fn put_back(&self, buffer: Vec<Block>) {
        self.lock().push(buffer);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<Block>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn hashes_of_other_settings_are_checked_with_their_own() {
        let check = PasswordCheck::default();
        for (memory, passes, lanes, length) in [
            (32, 3, 4, 16),
            (7168, 5, 1, 32),
            (16 * 1024, 1, 2, 64),
            (64, 2, 1, 32),
        ] {
            let params = Params::new(memory, passes, lanes, Some(length)).unwrap();
            let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
            let hash = argon2.hash_password(b"right").unwrap().to_string();
            check_hash(&hash).unwrap();
            assert!(check.is_right(Some(hash.clone()), "right").await, "{hash}");
            assert!(!check.is_right(Some(hash.clone()), "wrong").await, "{hash}");
        }
        // From the tests of argon2's reference implementation.
        let known = "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc";
        assert!(check.is_right(Some(known.to_owned()), "password").await);
        assert!(!check.is_right(None, "").await);
    }

    #[tokio::test]
    async fn a_text_that_is_no_hash_within_the_limits_matches_no_password() {
        let check = PasswordCheck::default();
        for hash in [
            "",
            "open sesame",
            "$argon2i$v=19$m=8,t=1,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
            "$argon2id$v=19$m=4294967295,t=1,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
        ] {
            assert!(!check.is_right(Some(hash.to_owned()), "open sesame").await);
        }
    }

    #[test]
    fn hashes_that_ask_for_too_much_are_refused() {
        let with = |params: &str| {
            format!(
                "$argon2id$v=19${params}$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc"
            )
        };
        for params in ["m=65536,t=10,p=1", "m=65536,t=4,p=4", "m=7168,t=91,p=1"] {
            assert!(check_hash(&with(params)).is_ok(), "{params}");
        }
        for params in [
            "m=65537,t=1,p=1",
            "m=4294967295,t=1,p=1",
            "m=65536,t=11,p=1",
            "m=8,t=4294967295,p=1",
            "m=7168",
        ] {
            assert_eq!(
                check_hash(&with(params)).is_ok(),
                params == "m=7168",
                "{params}"
            );
        }
        for text in [
            "$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHQ",
            "$argon2id$v=19$m=8,t=1,p=1",
            "$argon2i$v=19$m=8,t=1,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
            "secret",
        ] {
            assert!(check_hash(text).is_err(), "{text}");
        }
    }
}
