//! Keys as operators give them: words of the command line, and files of OpenSSH's authorized_keys.

use anyhow::{Context, bail, ensure};
use sftpd::users::{InvalidKey, PRIVATE_KEY, PublicKey, is_private_key};
use std::path::Path;

/// How the types of public keys begin.
const KEY_TYPES: [&str; 3] = ["ssh-", "ecdsa-", "sk-"];

/// Fails if one of the words of a command, or all of them together, are a private key.
pub fn refuse_private_key(words: &[impl AsRef<str>]) -> anyhow::Result<()> {
    // Without quotes the shell splits a key into several words.
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    ensure!(!is_private_key(&words.join(" ")), PRIVATE_KEY);
    Ok(())
}

/// Parses a key as it was typed. The error has a hint for the usual mistakes.
pub fn check_typed_key(typed: &str) -> anyhow::Result<PublicKey> {
    let typed = typed.trim();
    ensure!(
        typed.lines().count() <= 1,
        "these are several lines: give each key as an argument of its own, or use --keys-file"
    );
    let error = match typed.parse() {
        Ok(key) => return Ok(key),
        Err(error @ InvalidKey::Malformed { .. }) => error,
        Err(error) => return Err(error.into()),
    };
    if looks_like_path(typed) {
        bail!(
            "{typed:?} is not a public key but looks like a file: use --keys-file {typed}, or \"$(cat {typed})\" in quotes"
        );
    }
    if KEY_TYPES.iter().any(|kind| typed.starts_with(kind)) && !typed.contains(' ') {
        bail!("{typed:?} is not a public key but its first word: put the whole line in quotes");
    }
    bail!("{error}; give it as one argument, in quotes")
}

/// Whether a word is the name of a file rather than a key.
fn looks_like_path(word: &str) -> bool {
    let one_word = !word.is_empty() && !word.contains(char::is_whitespace);
    one_word
        && (word.starts_with(['/', '.', '~']) || word.ends_with(".pub") || Path::new(word).exists())
}

/// The keys of an authorized_keys file as sshd reads it, each as a line of a .pub file.
pub fn read_authorized_keys(file: &Path) -> anyhow::Result<Vec<String>> {
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

/// The key of a line of authorized_keys. Options that only disable features that sftpd lacks are
/// dropped; any other is an error, as ignoring it would widen the key's rights.
fn parse_authorized_key(line: &str) -> anyhow::Result<String> {
    let (options, key) = split_options(line);
    for option in options.split(',') {
        let is_harmless = matches!(option, "" | "restrict" | r#"command="internal-sftp""#)
            || option.starts_with("no-");
        ensure!(
            is_harmless,
            "sftpd has no option {option}: remove it there, or leave the key out"
        );
    }
    key.parse::<PublicKey>()?;
    Ok(key.to_owned())
}

/// Splits a line of authorized_keys into its options, which may contain quoted spaces, and the key.
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
