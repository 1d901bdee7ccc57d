//! Users' public keys: lines of a .pub file, and keys of OpenSSH's authorized_keys.

use anyhow::{Context, bail, ensure};
use ssh_key::{Algorithm, PublicKey};
use std::path::Path;

/// Smallest RSA key that is accepted, in bits, as for OpenSSH's RequiredRSASize in most distributions.
const MIN_RSA_BITS: u32 = 2048;
/// Characters of a line that is no key that an error repeats.
const MAX_SHOWN_CHARS: usize = 40;
/// What private keys hold and nothing else does: the end of a PEM header, that of ssh.com's format, PuTTY's first line,
/// and the beginning of OpenSSH's format in base64.
const PRIVATE_KEY_MARKS: [&str; 4] = [
    "PRIVATE KEY-----",
    "PRIVATE KEY ----",
    "PuTTY-User-Key-File-",
    "b3BlbnNzaC1rZXktdjE",
];
/// How the types of public keys begin.
const KEY_TYPES: [&str; 3] = ["ssh-", "ecdsa-", "sk-"];
/// Says what to give in the place of a private key. The key itself is never repeated.
const PRIVATE_KEY: &str = "this is a private key, which must stay with its owner (the shell's history may hold it now): \
     give the public key, the one line of its .pub file or of `ssh-keygen -y -f FILE`, in quotes";

/// A key of a kind that the server can check.
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

/// Whether a private key, or the beginning of one, is in a text.
pub(super) fn is_private_key(text: &str) -> bool {
    PRIVATE_KEY_MARKS.iter().any(|mark| text.contains(mark))
}

/// Fails with a sentence about private keys if one of the words of a command, or all of them together, hold one.
pub(super) fn refuse_private_key(words: &[impl AsRef<str>]) -> anyhow::Result<()> {
    // Without quotes the shell makes several words of a key.
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    ensure!(!is_private_key(&words.join(" ")), PRIVATE_KEY);
    Ok(())
}

/// Checks a key as it was typed, with a hint for the usual mistakes.
pub(super) fn check_typed_key(typed: &str) -> anyhow::Result<PublicKey> {
    let typed = typed.trim();
    ensure!(
        typed.lines().count() <= 1,
        "these are several lines: give each key as an argument of its own, or use --keys-file"
    );
    let error = match parse_key(typed) {
        Ok(key) => return Ok(key),
        Err(error) => error,
    };
    if looks_like_path(typed) {
        bail!(
            "{typed:?} is not a public key but looks like a file: use --keys-file {typed}, or \"$(cat {typed})\" in quotes"
        );
    }
    if KEY_TYPES.iter().any(|kind| typed.starts_with(kind)) && !typed.contains(' ') {
        bail!("{typed:?} is not a public key but its first word: put the whole line in quotes");
    }
    Err(error)
}

/// Whether a word is the name of a file rather than a key.
fn looks_like_path(word: &str) -> bool {
    let one_word = !word.is_empty() && !word.contains(char::is_whitespace);
    one_word
        && (word.starts_with(['/', '.', '~']) || word.ends_with(".pub") || Path::new(word).exists())
}

/// The keys of an authorized_keys file as sshd reads it, each as a line of a .pub file.
pub(super) fn read_authorized_keys(file: &Path) -> anyhow::Result<Vec<String>> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("can't read {}", file.display()))?;
    ensure!(!is_private_key(&text), "{}: {PRIVATE_KEY}", file.display());
    let mut keys = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let key = parse_authorized_key(line)
            .with_context(|| format!("{}, line {number}", file.display()))?;
        keys.push(key);
    }
    ensure!(!keys.is_empty(), "{} holds no key", file.display());
    Ok(keys)
}

/// The key of a line of authorized_keys. Options that take away what sftpd doesn't offer are left out; leaving out any
/// other would give the key more than it had.
fn parse_authorized_key(line: &str) -> anyhow::Result<String> {
    let (options, key) = split_options(line);
    for option in options.split(',') {
        let idle = matches!(option, "" | "restrict" | r#"command="internal-sftp""#)
            || option.starts_with("no-");
        ensure!(
            idle,
            "sftpd has no option {option}: remove it there, or leave the key out"
        );
    }
    parse_key(key)?;
    Ok(key.to_owned())
}

/// Splits a line of authorized_keys into its options, which may hold spaces in quotes, and the key.
fn split_options(line: &str) -> (&str, &str) {
    if KEY_TYPES.iter().any(|kind| line.starts_with(kind)) {
        return ("", line);
    }
    let mut quoted = false;
    for (at, character) in line.char_indices() {
        match character {
            '"' => quoted = !quoted,
            ' ' if !quoted => {
                let (options, key) = line.split_at(at);
                return (options, key.trim());
            }
            _ => {}
        }
    }
    (line, "")
}
