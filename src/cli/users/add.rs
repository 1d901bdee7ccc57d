//! `sftpd users add`: checks what was typed, asks for the password, then applies it.

use super::keys::{check_typed_key, read_authorized_keys, refuse_private_key};
use super::{DEPLOYED_FILE, Usage, printable};
use anyhow::{Context, anyhow, ensure};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use sftpd::path::Home;
use sftpd::users::{
    Access, PublicKey, User, UsersFile, check_name, follow_link, hash_password, normalize_home,
};
use std::io::{IsTerminal, stdin};
use std::path::{Path, PathBuf};

/// Shortest password, in characters, as [NIST SP 800-63B](https://pages.nist.gov/800-63-3/sp800-63b.html)
/// has it for passwords that people choose.
const MIN_PASSWORD_CHARS: usize = 8;
/// Longest password, in bytes. argon2 allows far more, and people type less.
const MAX_PASSWORD_LEN: usize = 1024;

/// The arguments of `sftpd users add`.
#[derive(Debug, clap::Args)]
pub struct AddArgs {
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
    #[arg(long, value_parser = access_parser())]
    access: Option<Access>,
}

/// Takes the names of accesses, with a description of each for `--help`.
fn access_parser() -> impl TypedValueParser<Value = Access> {
    PossibleValuesParser::new([
        PossibleValue::new(Access::ReadWrite.as_str()).help("Everything"),
        PossibleValue::new(Access::ReadOnly.as_str()).help("List and download"),
        PossibleValue::new(Access::WriteOnly.as_str())
            .help("Upload, list, rename and remove, but not download"),
    ])
    .try_map(|name| name.parse::<Access>())
}

/// What to give a user, checked as far as possible without the users file.
struct Additions {
    name: String,
    keys: Vec<TypedKey>,
    /// Normalised.
    home: Option<String>,
    access: Option<Access>,
}

/// A public key, as it was typed and as it is parsed.
struct TypedKey {
    /// What users.json keeps.
    line: String,
    parsed: PublicKey,
}

/// Adds a user or changes one. Returns a line for each change.
pub(super) fn add_user(args: AddArgs, path: &Path) -> anyhow::Result<String> {
    let ask = args.password;
    let additions = check_arguments(args).map_err(Usage)?;
    // First on a draft, so that the password is asked for only if the rest is valid.
    let mut draft = UsersFile::read_or_empty(path)?;
    additions.check_credentials(&draft, ask)?;
    let password = if ask {
        Some(hash_password(&ask_password()?)?)
    } else {
        None
    };
    let planned = additions.apply(&mut draft, password.as_ref(), path);
    let name = &additions.name;
    if planned.is_empty() {
        return Ok(format!("{name}: nothing to change\n"));
    }
    let is_new = !path.exists();
    let (changes, disabled) = UsersFile::change_or_make(path, |file| {
        additions.check_credentials(file, ask)?;
        let changes = additions.apply(file, password.as_ref(), path);
        let disabled = file.users.get(name).is_some_and(|user| user.disabled);
        Ok((changes, disabled))
    })?;
    if disabled {
        eprintln!("sftpd: warning: {name} is disabled: no login until `sftpd users enable {name}`");
    }
    if is_new {
        warn_of_other_file(path);
    }
    Ok(changes.into_iter().map(|change| change + "\n").collect())
}

/// Warns if the service of this host reads another file than the one that was just made.
fn warn_of_other_file(path: &Path) {
    let deployed = Path::new(DEPLOYED_FILE);
    // Its folder, as not everyone may look into it.
    let is_deployed = deployed.parent().is_some_and(Path::is_dir);
    if is_deployed && follow_link(path) != deployed {
        eprintln!(
            "sftpd: warning: this host's service reads another file: use --users {DEPLOYED_FILE} for its users"
        );
    }
}

/// Checks what was typed.
fn check_arguments(args: AddArgs) -> anyhow::Result<Additions> {
    refuse_private_key(&args.keys)?;
    check_name(&args.name)?;
    let mut keys = Vec::new();
    for line in &args.keys {
        let parsed = check_typed_key(line)?;
        keys.push(TypedKey {
            line: line.trim().to_owned(),
            parsed,
        });
    }
    if let Some(file) = &args.keys_file {
        for line in read_authorized_keys(file)? {
            let parsed = line.parse()?;
            keys.push(TypedKey { line, parsed });
        }
    }
    if let Some(home) = &args.home {
        Home::new("", home).with_context(|| format!("--home {home:?}"))?;
    }
    let home = args.home.as_deref().map(normalize_home);
    Ok(Additions {
        name: args.name,
        keys,
        home,
        access: args.access,
    })
}

impl Additions {
    /// Fails for a new user without a key or a password.
    fn check_credentials(&self, file: &UsersFile, password: bool) -> Result<(), Usage> {
        let has_credential = password || !self.keys.is_empty();
        if has_credential || file.users.contains_key(&self.name) {
            return Ok(());
        }
        Err(Usage(anyhow!(
            "{} is a new user, who needs a KEY, --keys-file or --password",
            self.name
        )))
    }

    /// Gives the user what is missing. Returns a sentence for each change.
    fn apply(&self, file: &mut UsersFile, password: Option<&String>, path: &Path) -> Vec<String> {
        let name = &self.name;
        let mut changes = Vec::new();
        if !path.exists() {
            changes.push(format!("made {}", follow_link(path).display()));
        }
        if !file.users.contains_key(name) {
            changes.push(format!("added {name} to {}", path.display()));
        }
        let user = file.users.entry(name.clone()).or_default();
        self.apply_keys(user, &mut changes);
        if let Some(password) = password {
            changes.push(match user.password {
                Some(_) => format!("changed the password of {name}"),
                None => format!("set a password for {name}"),
            });
            user.password = Some(password.clone());
        }
        self.apply_rights(user, &mut changes);
        changes
    }

    fn apply_keys(&self, user: &mut User, changes: &mut Vec<String>) {
        for key in &self.keys {
            if !user.has_key(&key.parsed) {
                changes.push(format!(
                    "added a key {} for {}",
                    key.parsed.fingerprint(),
                    self.name
                ));
                user.keys.push(key.line.clone());
            }
        }
    }

    fn apply_rights(&self, user: &mut User, changes: &mut Vec<String>) {
        let name = &self.name;
        let now = user.account(name);
        if let Some(home) = &self.home
            && now.home_prefix().as_ref() != Some(home)
        {
            changes.push(match home.as_str() {
                "" => format!("{name}'s home is now the whole store"),
                home => format!("{name}'s home is now {}", printable(home)),
            });
            user.home = Some(home.clone());
        }
        if let Some(access) = self.access
            && access != now.access
        {
            changes.push(format!("{name}'s access is now {}", access.as_str()));
            user.access = access;
        }
    }
}

/// Asks on the terminal, or reads a line of standard input. A password is never an argument, as the
/// shell's history and `ps` show those.
fn ask_password() -> anyhow::Result<String> {
    let password = if stdin().is_terminal() {
        prompt_twice()?
    } else {
        read_line()?
    };
    ensure!(
        !password.is_empty(),
        Usage(anyhow!("the password is empty: nothing was changed"))
    );
    ensure!(
        password.chars().count() >= MIN_PASSWORD_CHARS,
        Usage(anyhow!(
            "the password is too short: use at least {MIN_PASSWORD_CHARS} characters; nothing was changed"
        ))
    );
    ensure!(
        password.len() <= MAX_PASSWORD_LEN,
        Usage(anyhow!(
            "the password is longer than {MAX_PASSWORD_LEN} bytes: nothing was changed"
        ))
    );
    Ok(password)
}

fn prompt_twice() -> anyhow::Result<String> {
    let password = rpassword::prompt_password("Password: ").context("can't read the password")?;
    let repeated =
        rpassword::prompt_password("Repeat password: ").context("can't read the password")?;
    ensure!(
        password == repeated,
        Usage(anyhow!("the passwords differ: nothing was changed"))
    );
    Ok(password)
}

fn read_line() -> anyhow::Result<String> {
    let line = stdin()
        .lines()
        .next()
        .transpose()
        .context("can't read the password from standard input")?;
    Ok(line.unwrap_or_default())
}
