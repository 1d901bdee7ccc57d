//! `sftpd users add|remove|list`.

use super::file::{Access, User, UsersFile, check_name, parse_key};
use super::password;
use anyhow::Context;
use serde_json::json;
use ssh_key::HashAlg;
use std::io::{BufRead, IsTerminal};
use std::path::Path;

/// In bytes.
const MAX_PASSWORD: usize = 1024;

/// A mistake in what was typed, not in the world: exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

impl From<anyhow::Error> for Usage {
    fn from(error: anyhow::Error) -> Usage {
        Usage(format!("{error:#}"))
    }
}

fn usage(message: impl Into<String>) -> anyhow::Error {
    Usage(message.into()).into()
}

/// What to do to the users file.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Add a user, or give one that exists another key, a password, a home or an access.
    Add {
        /// Name to log in with; also the home, unless --home says otherwise.
        name: String,
        /// Public keys: each one line of a .pub file, in quotes.
        keys: Vec<String>,
        /// Ask for a password (twice on a terminal; one line of standard input otherwise).
        #[arg(long)]
        password: bool,
        /// Prefix in the store that the user sees as `/` ["" is the whole store; default: NAME/].
        #[arg(long, value_name = "PREFIX")]
        home: Option<String>,
        /// What the user may do [default: read-write].
        #[arg(long)]
        access: Option<Access>,
    },
    /// Remove a user, or one of its keys. Sessions that are open stay open.
    Remove {
        /// Who.
        name: String,
        /// Remove only the key with this fingerprint (SHA256:…, as `list` shows it).
        #[arg(long, value_name = "FINGERPRINT")]
        key: Option<String>,
    },
    /// Show the users, their homes, access and keys' fingerprints.
    List {
        /// For programs.
        #[arg(long)]
        json: bool,
    },
}

impl Command {
    /// Carries it out; what is returned goes to standard output.
    pub fn run(self, path: &Path) -> anyhow::Result<String> {
        let file = UsersFile::new(path);
        match self {
            Command::Add { name, keys, password, home, access } => {
                check_name(&name).map_err(Usage::from)?;
                for key in &keys {
                    parse_key(key).map_err(Usage::from)?;
                }
                let given = !keys.is_empty() || password || home.is_some() || access.is_some();
                file.read_or_empty()
                    .and_then(|users| may_add(users.users.get(&name), &name, &keys, password, given))?;
                let password =
                    password.then(ask_password).transpose()?.map(|text| password::hash(&text)).transpose()?;
                file.change(|users| {
                    may_add(users.users.get(&name), &name, &keys, password.is_some(), given)?;
                    let user = users.users.entry(name.clone()).or_default();
                    user.keys.extend(keys.iter().map(|key| key.trim().to_owned()));
                    user.password = password.or(user.password.take());
                    user.home = home.or(user.home.take());
                    user.access = access.unwrap_or(user.access);
                    Ok(format!("user {name} is in {}\n", path.display()))
                })
            }
            Command::Remove { name, key } => file.change(|users| {
                let Some(user) = users.users.get_mut(&name) else { return Err(unknown(&name)) };
                if let Some(fingerprint) = key {
                    remove_key(&name, user, &fingerprint)?;
                    return Ok(format!("key {fingerprint} of user {name} is removed\n"));
                }
                users.users.remove(&name);
                Ok(format!("user {name} is removed; its files stay in the store\n"))
            }),
            Command::List { json } => Ok(list(&file.read_or_empty()?.users, json)),
        }
    }
}

fn unknown(name: &str) -> anyhow::Error {
    usage(format!("there is no user {name:?}: `sftpd users list` shows all"))
}

fn may_add(old: Option<&User>, name: &str, keys: &[String], password: bool, given: bool) -> anyhow::Result<()> {
    match old {
        None if keys.is_empty() && !password => Err(usage("a new user needs a KEY or --password")),
        Some(_) if !given => Err(usage(format!("user {name} exists already, and nothing was given to change"))),
        old => {
            let mut known: Vec<_> = old.iter().flat_map(|user| user.parsed_keys()).collect();
            for line in keys {
                let key = parse_key(line)?;
                if known.iter().any(|other| other.key_data() == key.key_data()) {
                    let fingerprint = key.fingerprint(HashAlg::Sha256);
                    return Err(usage(format!("user {name} has the key {fingerprint} already")));
                }
                known.push(key);
            }
            Ok(())
        }
    }
}

fn remove_key(name: &str, user: &mut User, fingerprint: &str) -> anyhow::Result<()> {
    let before = user.keys.len();
    user.keys
        .retain(|line| parse_key(line).is_ok_and(|key| key.fingerprint(HashAlg::Sha256).to_string() != fingerprint));
    if user.keys.len() == before {
        return Err(usage(format!("user {name} has no key {fingerprint}: `sftpd users list` shows them")));
    }
    if user.keys.is_empty() && user.password.is_none() {
        return Err(usage(format!("that is the only way in for {name}: add another first, or remove the user")));
    }
    Ok(())
}

/// Never from an argument: those are in the shell's history and in `ps`.
fn ask_password() -> anyhow::Result<String> {
    let password = if std::io::stdin().is_terminal() {
        let first = rpassword::prompt_password("Password: ").context("can't read the password")?;
        if rpassword::prompt_password("Once more: ").context("can't read the password")? != first {
            return Err(usage("the passwords differ: nothing was changed"));
        }
        first
    } else {
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line).context("can't read the password from standard input")?;
        line.trim_end_matches(['\r', '\n']).to_owned()
    };
    if password.is_empty() {
        return Err(usage("an empty password is no password: nothing was changed"));
    }
    if password.len() > MAX_PASSWORD {
        return Err(usage(format!("the password is longer than {MAX_PASSWORD} bytes: nothing was changed")));
    }
    Ok(password)
}

fn list(users: &std::collections::BTreeMap<String, User>, json: bool) -> String {
    let prints = |user: &User| -> Vec<String> {
        user.parsed_keys().map(|key| key.fingerprint(HashAlg::Sha256).to_string()).collect()
    };
    if json {
        let all = users.iter().map(|(name, user)| {
            json!({"name": name, "home": user.home(name), "access": user.access,
                   "password": user.password.is_some(), "keys": prints(user)})
        });
        return format!("{}\n", serde_json::Value::from_iter(all));
    }
    if users.is_empty() {
        return "no users yet: `sftpd users add NAME \"KEY\"`\n".to_owned();
    }
    let mut out = String::new();
    for (name, user) in users {
        let access = json!(user.access);
        let ways = prints(user).into_iter().chain(user.password.is_some().then(|| "password".to_owned()));
        let ways: Vec<_> = ways.collect();
        out += &format!(
            "{name:<16} {:<10} /{:<20} {}\n",
            access.as_str().unwrap_or_default(),
            user.home(name),
            ways.join(" ")
        );
    }
    out
}
