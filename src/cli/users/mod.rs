//! `sftpd users add|remove|disable|enable|list|show`.
//!
//! Called by `cli::run`. Invariant: each command either does what it says on standard output, or
//! fails with one sentence and leaves the file as it was.

mod add;
mod keys;
mod show;

use super::Usage;
use anyhow::{anyhow, ensure};
use keys::refuse_private_key;
use sftpd::users::{PublicKey, User, UsersFile, UsersFileError, exposure};
use std::ffi::OsString;
use std::path::Path;

/// The users file of a service that deploy.sh installed.
const DEPLOYED_FILE: &str = "/etc/sftpd/users.json";

/// What to do to the users file.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Add a user, or give one that exists another key, a password, a home or an access. What is
    /// there already stays.
    Add(add::AddArgs),
    /// Remove a user, or one of its keys, or its password. Open sessions stay open.
    Remove {
        /// Name of the user.
        name: String,
        /// Remove only the key with this fingerprint (SHA256:…, as `show` has it).
        #[arg(long, value_name = "FINGERPRINT")]
        key: Option<String>,
        /// Remove only the password.
        #[arg(long, conflicts_with = "key")]
        password: bool,
    },
    /// Keep a user from logging in, by key or password. Keys, password and files stay; open
    /// sessions stay open.
    Disable {
        /// Name of the user.
        name: String,
    },
    /// Let a disabled user log in again.
    Enable {
        /// Name of the user.
        name: String,
    },
    /// List the users: status, access, home and ways to log in.
    List {
        /// One JSON array instead, of objects with name, home, access, disabled, password, keys and
        /// public_keys.
        #[arg(long)]
        json: bool,
    },
    /// Show one user.
    Show {
        /// Name of the user.
        name: String,
        /// One JSON object instead, as in `list --json`.
        #[arg(long)]
        json: bool,
    },
}

impl Command {
    /// Executes the command; the text returned goes to standard output.
    pub fn run(self, path: &Path) -> anyhow::Result<String> {
        warn_if_exposed(path);
        let outcome = match self {
            Command::Add(args) => add::add_user(args, path),
            Command::Remove {
                name,
                key: None,
                password: false,
            } => remove_user(&name, path),
            Command::Remove {
                name,
                key: None,
                password: true,
            } => remove_password(&name, path),
            Command::Remove {
                name,
                key: Some(fingerprint),
                ..
            } => remove_key(&name, &fingerprint, path),
            Command::Disable { name } => disable_user(&name, path),
            Command::Enable { name } => enable_user(&name, path),
            Command::List { json: false } => show::list_users(path),
            Command::List { json: true } => show::list_users_as_json(path),
            Command::Show { name, json: false } => show::show_user(&name, path),
            Command::Show { name, json: true } => show::show_user_as_json(&name, path),
        };
        outcome.map_err(mark_usage)
    }
}

/// Fails if a private key was typed somewhere in the command line. Called before the line is
/// parsed, because the parser would show the key in its own message.
pub fn check_command_line(words: impl Iterator<Item = OsString>) -> Result<(), Usage> {
    let words: Vec<String> = words
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    Ok(refuse_private_key(&words)?)
}

/// A mistake in the users file is a usage error, as a wrong argument is, and so is a wrong path.
fn mark_usage(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref() {
        Some(UsersFileError::Missing { path }) => Usage(anyhow!(
            "no users file at {}: --users FILE names another one ({DEPLOYED_FILE} where deploy.sh installed sftpd); \
             `sftpd users add NAME \"KEY\"` makes one",
            path.display()
        ))
        .into(),
        Some(UsersFileError::Invalid { .. } | UsersFileError::TooLarge { .. }) => {
            Usage(error).into()
        }
        // The system's errors.
        Some(_) | None => error,
    }
}

fn warn_if_exposed(path: &Path) {
    let Ok(found) = path.metadata() else { return };
    if let Some(warning) = exposure(path, &found) {
        eprintln!("sftpd: warning: {warning}");
    }
}

fn remove_user(name: &str, path: &Path) -> anyhow::Result<String> {
    UsersFile::change(path, |file| {
        find_user(file, name)?;
        file.users.remove(name);
        let file = path.display();
        Ok(format!(
            "removed {name} from {file}: the user's files stay in the store, open sessions stay open\n"
        ))
    })
}

fn remove_key(name: &str, fingerprint: &str, path: &Path) -> anyhow::Result<String> {
    UsersFile::change(path, |file| {
        let user = find_user(file, name)?;
        let before = user.keys.len();
        user.keys.retain(|line| !has_fingerprint(line, fingerprint));
        ensure!(
            user.keys.len() < before,
            Usage(anyhow!(
                "{name} has no key {fingerprint}: `sftpd users show {name}` has the fingerprints"
            ))
        );
        ensure!(
            !user.keys.is_empty() || user.password.is_some(),
            Usage(anyhow!(
                "{name} has no other key and no password: add one first, or remove or disable the user"
            ))
        );
        Ok(format!("removed the key {fingerprint} of {name}\n"))
    })
}

fn remove_password(name: &str, path: &Path) -> anyhow::Result<String> {
    UsersFile::change(path, |file| {
        let user = find_user(file, name)?;
        ensure!(
            user.password.is_some(),
            Usage(anyhow!("{name} has no password"))
        );
        ensure!(
            !user.keys.is_empty(),
            Usage(anyhow!(
                "{name} has no key: add one first, or remove or disable the user"
            ))
        );
        user.password = None;
        Ok(format!("removed the password of {name}\n"))
    })
}

fn has_fingerprint(line: &str, fingerprint: &str) -> bool {
    match line.parse::<PublicKey>() {
        Ok(key) => key.fingerprint() == fingerprint,
        Err(_) => false,
    }
}

fn disable_user(name: &str, path: &Path) -> anyhow::Result<String> {
    UsersFile::change(path, |file| {
        let user = find_user(file, name)?;
        if user.disabled {
            return Ok(format!(
                "{name}: nothing to change, the user is disabled already\n"
            ));
        }
        user.disabled = true;
        Ok(format!(
            "disabled {name}: no more logins, by key or password; open sessions stay open\n"
        ))
    })
}

fn enable_user(name: &str, path: &Path) -> anyhow::Result<String> {
    UsersFile::change(path, |file| {
        let user = find_user(file, name)?;
        if !user.disabled {
            return Ok(format!(
                "{name}: nothing to change, the user is enabled already\n"
            ));
        }
        user.disabled = false;
        Ok(format!("enabled {name}\n"))
    })
}

/// The user of this name, or a usage error.
fn find_user<'a>(file: &'a mut UsersFile, name: &str) -> Result<&'a mut User, Usage> {
    match file.users.get_mut(name) {
        Some(user) => Ok(user),
        None => Err(Usage(anyhow!(
            "there is no user {name:?}: `sftpd users list` shows all"
        ))),
    }
}

/// Escapes control characters: users write the comments of keys, which must not control the
/// operator's terminal.
fn printable(text: &str) -> String {
    let mut printable = String::new();
    for character in text.chars() {
        if character.is_control() {
            printable.extend(character.escape_default());
        } else {
            printable.push(character);
        }
    }
    printable
}
