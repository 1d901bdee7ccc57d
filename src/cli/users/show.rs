//! `sftpd users list` and `show`, for people and as JSON.

use super::{find_user, printable};
use serde::Serialize;
use sftpd::users::{PublicKey, User, UsersFile};
use std::path::Path;

/// A user in the output of `--json`. The field names are documented and must not change.
#[derive(Serialize)]
struct JsonUser<'a> {
    name: &'a str,
    home: String,
    access: &'static str,
    disabled: bool,
    /// Whether the user has a password.
    password: bool,
    /// Fingerprints, as `remove --key` takes them.
    keys: Vec<String>,
    /// The same keys in the same order, as users.json has them.
    public_keys: &'a [String],
}

/// A row of the table.
type Row = [String; 5];

/// The users as a table, one a line.
pub(super) fn list_users(path: &Path) -> anyhow::Result<String> {
    let file = UsersFile::read(path)?;
    if file.users.is_empty() {
        return Ok("no users yet: `sftpd users add NAME \"KEY\"`\n".to_owned());
    }
    let mut rows = vec![["NAME", "STATUS", "ACCESS", "HOME", "LOGIN"].map(str::to_owned)];
    for (name, user) in &file.users {
        let access = user.access.as_str().to_owned();
        rows.push([
            name.clone(),
            status(user).to_owned(),
            access,
            shown_home(name, user),
            ways_in(user).join(", "),
        ]);
    }
    Ok(format_table(&rows))
}

/// The users as one JSON array.
pub(super) fn list_users_as_json(path: &Path) -> anyhow::Result<String> {
    let file = UsersFile::read(path)?;
    let users: Vec<JsonUser> = file
        .users
        .iter()
        .map(|(name, user)| json_user(name, user))
        .collect();
    Ok(serde_json::to_string(&users)? + "\n")
}

/// One user, a property a line.
pub(super) fn show_user(name: &str, path: &Path) -> anyhow::Result<String> {
    let mut file = UsersFile::read(path)?;
    let user = find_user(&mut file, name)?;
    let mut text = format!("name      {name}\n");
    text += &format!("status    {}\n", status(user));
    text += &format!("access    {}\n", user.access.as_str());
    text += &format!("home      {}\n", shown_home(name, user));
    for way in ways_in(user) {
        text += &format!("login     {way}\n");
    }
    Ok(text)
}

/// One user as a JSON object.
pub(super) fn show_user_as_json(name: &str, path: &Path) -> anyhow::Result<String> {
    let mut file = UsersFile::read(path)?;
    let user = find_user(&mut file, name)?;
    Ok(serde_json::to_string(&json_user(name, user))? + "\n")
}

fn json_user<'a>(name: &'a str, user: &'a User) -> JsonUser<'a> {
    JsonUser {
        name,
        home: home_of(name, user),
        access: user.access.as_str(),
        disabled: user.disabled,
        password: user.password.is_some(),
        keys: user.parsed_keys().map(|key| key.fingerprint()).collect(),
        public_keys: &user.keys,
    }
}

fn status(user: &User) -> &'static str {
    if user.disabled { "disabled" } else { "enabled" }
}

fn home_of(name: &str, user: &User) -> String {
    // Every name that the file can have is a directory.
    user.account(name).home_prefix().unwrap_or_default()
}

/// The home in one word: `""` for the whole store, as for `--home`.
fn shown_home(name: &str, user: &User) -> String {
    match home_of(name, user).as_str() {
        "" => "\"\"".to_owned(),
        home => printable(home),
    }
}

/// The user's keys and password, described.
fn ways_in(user: &User) -> Vec<String> {
    let mut ways: Vec<String> = user.parsed_keys().map(|key| describe_key(&key)).collect();
    if user.password.is_some() {
        ways.push("password".to_owned());
    }
    ways
}

/// Fingerprint and comment.
fn describe_key(key: &PublicKey) -> String {
    let fingerprint = key.fingerprint();
    match key.comment() {
        "" => fingerprint,
        comment => format!("{fingerprint} {}", printable(comment)),
    }
}

/// Pads all columns but the last to their widest cell, with two spaces between columns.
fn format_table(rows: &[Row]) -> String {
    let mut widths = [0; 5];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let [name_width, status_width, access_width, home_width, _] = widths;
    let mut table = String::new();
    for [name, status, access, home, login] in rows {
        let padded = format!(
            "{name:name_width$}  {status:status_width$}  {access:access_width$}  {home:home_width$}"
        );
        table += &format!("{padded}  {login}\n");
    }
    table
}
