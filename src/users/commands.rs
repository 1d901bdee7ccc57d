//! `sftpd users add|remove|list`.

use super::{Access, UsersFile, check_name, hash, parse_key};
use anyhow::{Context, anyhow, bail, ensure};
use serde_json::{Value, json};
use ssh_key::HashAlg::Sha256;
use std::{io::IsTerminal, io::stdin, path::Path, path::PathBuf};

/// A mistake in what was typed, not in the world: exit status 2.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Usage(#[from] pub anyhow::Error);

/// What to do to the users file.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Add a user, or give one that exists another key, a password, a home or an access.
    Add {
        /// Name to log in with; also the home, unless --home says otherwise.
        name: String,
        /// Public keys: each one line of a .pub file, in quotes.
        keys: Vec<String>,
        /// Keys of an authorized_keys file, as sshd reads it.
        #[arg(long, value_name = "FILE")]
        keys_file: Option<PathBuf>,
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
        match self {
            Command::Add { name, keys, keys_file, password, home, access } => {
                check_name(&name).map_err(Usage)?;
                let imported = keys_file.as_deref().map(authorized_keys).transpose()?.unwrap_or_default();
                let way_in = !keys.is_empty() || !imported.is_empty() || password;
                let given = way_in || home.is_some() || access.is_some();
                let add = |UsersFile { users }: &mut UsersFile, hash: Option<String>| {
                    let known = users.contains_key(&name);
                    ensure!(way_in || known, Usage(anyhow!("a new user needs a KEY or --password")));
                    ensure!(given, Usage(anyhow!("user {name} exists already, and nothing was given to change")));
                    let user = users.entry(name.clone()).or_default();
                    for (n, line) in keys.iter().chain(&imported).enumerate() {
                        let key = parse_key(line).map_err(Usage)?;
                        let known = user.parsed_keys().any(|other| other.key_data() == key.key_data());
                        if known && n >= keys.len() {
                            continue;
                        }
                        ensure!(!known, Usage(anyhow!("user {name} has the key {} already", key.fingerprint(Sha256))));
                        user.keys.push(line.trim().to_owned());
                    }
                    user.password = hash.or(user.password.take());
                    user.home = home.clone().or(user.home.take());
                    user.access = access.unwrap_or(user.access);
                    Ok(format!("user {name} is in {}\n", path.display()))
                };
                // First on a copy: nobody shall type a password in vain.
                add(&mut UsersFile::read_or_empty(path)?, password.then(String::new))?;
                let hash = if password { Some(hash(&ask_password()?)?) } else { None };
                UsersFile::change(path, |file| add(file, hash))
            }
            Command::Remove { name, key } => UsersFile::change(path, |file| {
                let unknown = || Usage(anyhow!("there is no user {name:?}: `sftpd users list` shows all"));
                let user = file.users.get_mut(&name).ok_or_else(unknown)?;
                let Some(print) = key else {
                    file.users.remove(&name);
                    return Ok(format!("user {name} is removed; its files stay in the store\n"));
                };
                let before = user.keys.len();
                user.keys.retain(|line| parse_key(line).is_ok_and(|key| key.fingerprint(Sha256).to_string() != print));
                let missing = || anyhow!("user {name} has no key {print}: `sftpd users list` shows them");
                ensure!(user.keys.len() < before, Usage(missing()));
                let last = || anyhow!("that is the only way in for {name}: add another first, or remove the user");
                ensure!(!user.keys.is_empty() || user.password.is_some(), Usage(last()));
                Ok(format!("key {print} of user {name} is removed\n"))
            }),
            Command::List { json } => Ok(list(&UsersFile::read_or_empty(path)?, json)),
        }
    }
}

/// The keys of a file as sshd reads it, each as a line of a .pub file. Options that take away what there is none of here
/// are left out; to leave out any other would give its key more than it had.
fn authorized_keys(file: &Path) -> anyhow::Result<Vec<String>> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("can't read {}", file.display())).map_err(Usage)?;
    let lines = (1..).zip(text.lines().map(str::trim)).filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let keys = lines.map(|(number, line)| {
        let place = format!("{}, line {number}", file.display());
        let mut quoted = false;
        let space = line.find(|c| {
            quoted ^= c == '"';
            c == ' ' && !quoted
        });
        let (options, key) = match line.split_at(space.unwrap_or(line.len())) {
            (kind, _) if ["ssh-", "ecdsa-", "sk-"].iter().any(|start| kind.starts_with(start)) => ("", line),
            (options, key) => (options, key.trim()),
        };
        let idle = |option: &&str| {
            matches!(*option, "" | "restrict" | r#"command="internal-sftp""#) || option.starts_with("no-")
        };
        if let Some(option) = options.split(',').find(|option| !idle(option)) {
            bail!("{place}: sftpd has no option {option}: remove it there, or leave the key out");
        }
        parse_key(key).context(place)?;
        Ok(key.to_owned())
    });
    let keys: Vec<_> = keys.collect::<anyhow::Result<_>>().map_err(Usage)?;
    ensure!(!keys.is_empty(), Usage(anyhow!("{} holds no key", file.display())));
    Ok(keys)
}

/// Never from an argument: those are in the shell's history and in `ps`.
fn ask_password() -> anyhow::Result<String> {
    let terminal = stdin().is_terminal();
    let ask = |prompt| rpassword::prompt_password(prompt).context("can't read the password");
    let line = || stdin().lines().next().transpose().context("can't read the password from standard input");
    let password = if terminal { ask("Password: ")? } else { line()?.unwrap_or_default() };
    let same = !terminal || ask("Once more: ")? == password;
    ensure!(same, Usage(anyhow!("the passwords differ: nothing was changed")));
    ensure!(!password.is_empty(), Usage(anyhow!("an empty password is no password: nothing was changed")));
    ensure!(password.len() <= 1024, Usage(anyhow!("the password is longer than 1024 bytes: nothing was changed")));
    Ok(password)
}

fn list(file: &UsersFile, as_json: bool) -> String {
    let (mut table, mut all) = (String::new(), Vec::new());
    for (name, user) in &file.users {
        let (home, access, password) = (user.account(name).home, json!(user.access), user.password.is_some());
        let mut ways: Vec<_> = user.parsed_keys().map(|key| key.fingerprint(Sha256).to_string()).collect();
        all.push(json!({"name": name, "home": home, "access": access, "password": password, "keys": ways}));
        ways.extend(password.then(|| "password".to_owned()));
        let (access, ways) = (access.as_str().unwrap_or_default(), ways.join(" "));
        table += &format!("{name:<16} {access:<10} /{home:<20} {ways}\n");
    }
    match as_json {
        true => format!("{}\n", Value::from(all)),
        false if all.is_empty() => "no users yet: `sftpd users add NAME \"KEY\"`\n".to_owned(),
        false => table,
    }
}
