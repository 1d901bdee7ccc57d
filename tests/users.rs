//! `sftpd users …`, `manage-users` and the server's view of users.json, with the real binary.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use serde_json::{Value, json};
use sftpd::users::{
    Account, Attempt, Auth, FileAuth, Login, MAX_USERS_FILE_SIZE, Proof, PublicKey,
};
use std::fs::Permissions;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};
use support::commands::are_installed;
use support::process::Process;
use support::process::sftpd;
use support::s3::FakeS3;
use support::wait::PATIENCE;
use support::{Client, eventually, http_get, within};

const ED25519: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB9dG4kjRhQTtWTVzd2t27+t0DEHBPW7iOD23TUiYLio alice@example.com";
const OTHER: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE8scEn2htm9vSRE8JJEEkiQdb9kYinuVZ49Ka/qEnZI";
const FIDO: &str = "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAAIEFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBAAAABHNzaDo=";

fn key(line: &str) -> PublicKey {
    line.parse().unwrap()
}

fn fingerprint(line: &str) -> String {
    key(line).fingerprint()
}

/// The account of a user who shows this.
async fn log_in(auth: &FileAuth, user: &str, proof: Proof) -> Option<Account> {
    let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, 22));
    match auth.login(Attempt::new(user, peer, proof)).await {
        Login::Accept(account) => Some(account),
        _ => None,
    }
}

/// The account of a user who has this key, if the offer and the proof have the same answer.
async fn log_in_with_key(auth: &FileAuth, user: &str, key: &PublicKey) -> Option<Account> {
    let offered = log_in(auth, user, Proof::OfferedKey(key.clone())).await;
    let proved = log_in(auth, user, Proof::ProvedKey(key.clone())).await;
    assert_eq!(offered.is_some(), proved.is_some());
    proved
}

async fn log_in_with_password(auth: &FileAuth, user: &str, password: &str) -> Option<Account> {
    log_in(auth, user, Proof::Password(password.to_owned())).await
}

/// `sftpd users` on this file.
fn users_command(file: &Path, args: &[&str]) -> Command {
    let mut command = sftpd(file.parent().unwrap());
    command.arg("users").arg("--users").arg(file).args(args);
    command
}

/// A folder with a users.json, or with room for one.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("users.json")
    }

    fn text(&self) -> String {
        std::fs::read_to_string(self.file()).unwrap()
    }

    /// Writes the file with the mode that `sftpd users` gives it.
    fn write(&self, text: &str) {
        std::fs::write(self.file(), text).unwrap();
        self.set_mode(0o600);
    }

    fn mode(&self) -> u32 {
        std::fs::metadata(self.file()).unwrap().permissions().mode() & 0o7777
    }

    fn set_mode(&self, mode: u32) {
        std::fs::set_permissions(self.file(), Permissions::from_mode(mode)).unwrap();
    }

    /// Overwrites the file so that inode, size and time of the last modification stay the same.
    fn overwrite_unseen(&self, text: &str) {
        let before = std::fs::metadata(self.file()).unwrap();
        let padded = format!("{text:width$}", width = before.size() as usize);
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .open(self.file())
            .unwrap();
        file.write_all(padded.as_bytes()).unwrap();
        file.set_modified(before.modified().unwrap()).unwrap();
        let after = std::fs::metadata(self.file()).unwrap();
        let visible =
            |found: &std::fs::Metadata| (found.ino(), found.size(), found.modified().unwrap());
        assert_eq!(visible(&after), visible(&before));
    }

    fn command(&self, args: &[&str]) -> Command {
        users_command(&self.file(), args)
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The command fails with this status and one line on standard error, and leaves the file
    /// unchanged.
    fn refuses(&self, status: i32, sentence: &str, args: &[&str]) {
        let before = std::fs::read(self.file()).ok();
        let output = self.run(args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
        assert!(
            said.contains(sentence) && said.trim_end().lines().count() == 1,
            "{args:?}: {said}"
        );
        assert_eq!(std::fs::read(self.file()).ok(), before, "{args:?}");
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    fn with_password(&self, args: &[&str], password: &str) -> Output {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(password.as_bytes())
            .unwrap();
        child.wait_with_output().unwrap()
    }
}

#[test]
fn users_are_added_listed_and_removed() {
    let folder = Folder::new();
    folder.ok(&["add", "alice", ED25519]);
    assert_eq!(folder.mode(), 0o600);
    folder.ok(&[
        "add",
        "alice",
        OTHER,
        "--access",
        "write-only",
        "--home",
        "in/alice",
    ]);
    folder.ok(&["add", "bob", OTHER]);
    let (first, second) = (fingerprint(ED25519), fingerprint(OTHER));
    let alice = json!({
        "name": "alice", "home": "in/alice/", "access": "write-only", "disabled": false, "password": false,
        "keys": [first, second], "public_keys": [ED25519, OTHER],
    });
    let list = folder.json(&["list", "--json"]);
    assert_eq!(list[0], alice);
    assert_eq!(
        (&list[1]["name"], &list[1]["home"]),
        (&json!("bob"), &json!("bob/"))
    );
    assert_eq!(folder.json(&["show", "alice", "--json"]), alice);
    assert_eq!(
        folder.ok(&["list"]),
        format!(
            "NAME   STATUS   ACCESS      HOME       LOGIN\n\
             alice  enabled  write-only  in/alice/  {first} alice@example.com, {second}\n\
             bob    enabled  read-write  bob/       {second}\n"
        )
    );
    assert_eq!(
        folder.ok(&["show", "alice"]),
        format!(
            "name      alice\nstatus    enabled\naccess    write-only\nhome      in/alice/\n\
             login     {first} alice@example.com\nlogin     {second}\n"
        )
    );
    folder.refuses(2, "there is no user \"carol\"", &["show", "carol"]);
    assert_eq!(
        folder.ok(&["remove", "alice", "--key", &second]),
        format!("removed the key {second} of alice\n")
    );
    assert!(folder.text().contains(ED25519));
    folder.ok(&["remove", "alice"]);
    assert!(!folder.text().contains("alice") && folder.text().contains("bob"));
    folder.ok(&["remove", "bob"]);
    assert!(folder.ok(&["list"]).contains("no users yet"));
}

/// A mistyped path, or the wrong folder: the service of a host reads another file.
#[test]
fn only_add_makes_a_missing_file_and_says_where() {
    let folder = Folder::new();
    let full = folder.file().display().to_string();
    for args in [
        &["list"][..],
        &["list", "--json"],
        &["show", "alice"],
        &["show", "alice", "--json"],
        &["remove", "alice"],
        &["remove", "alice", "--key", "SHA256:x"],
        &["remove", "alice", "--password"],
        &["disable", "alice"],
        &["enable", "alice"],
    ] {
        folder.refuses(2, &format!("no users file at {full}"), args);
        // The default is relative.
        let mut here = sftpd(folder.0.path());
        let output = here.arg("users").args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() == Some(2) && said.contains(&full) && said.contains("--users"),
            "{args:?}: {said}"
        );
    }
    assert_eq!(std::fs::read_dir(folder.0.path()).unwrap().count(), 0);
    let mut here = sftpd(folder.0.path());
    let output = here
        .args(["users", "add", "alice", ED25519])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.starts_with(&format!("made {full}\n")), "{output:?}");
    assert!(!folder.ok(&["add", "bob", OTHER]).contains("made"));
}

/// As of a source checkout: the link is tracked, and what it leads to is not.
#[test]
fn a_link_to_a_missing_file_stays_and_add_makes_the_file() {
    let folder = Folder::new();
    std::os::unix::fs::symlink("local.json", folder.file()).unwrap();
    let target = folder.0.path().join("local.json");
    let missing = format!("no users file at {}", target.display());
    folder.refuses(2, &missing, &["list"]);
    folder.refuses(2, &missing, &["disable", "alice"]);
    let said = folder.ok(&["add", "alice", ED25519]);
    assert!(
        said.contains(&format!("made {}\n", target.display())),
        "{said}"
    );
    assert!(folder.file().is_symlink() && folder.text().contains(ED25519));
    assert_eq!(folder.mode(), 0o600);
    assert!(target.is_file() && !target.is_symlink());
}

/// The users of somebody who tries sftpd in a clone are not one commit from publication.
#[test]
fn adding_a_user_in_a_checkout_leaves_git_status_clean() {
    if !are_installed(&["git"]) {
        return;
    }
    let folder = Folder::new();
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let run = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        let output = command.args(args).current_dir(folder.0.path()).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{program} {args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for name in [".gitignore", "users.json"] {
        let file = top.join(name).display().to_string();
        run("cp", &["-P", &file, "."]);
    }
    run("git", &["init", "--quiet"]);
    run("git", &["add", "--all"]);
    assert!(run("git", &["ls-files"]).contains("users.json"));
    let identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"];
    run(
        "git",
        &[&identity[..], &["commit", "--quiet", "-m", "x"]].concat(),
    );
    let output = folder.run(&["add", "alice", ED25519]);
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    assert_eq!(run("git", &["status", "--porcelain"]), "");
    let auth = FileAuth::open(folder.file());
    assert!(auth.is_ok(), "{auth:?}");
}

#[test]
fn a_password_can_be_dropped_while_the_keys_stay() {
    let folder = Folder::new();
    folder.ok(&["add", "alice", ED25519]);
    folder.with_password(&["add", "alice", "--password"], "open sesame\n");
    folder.with_password(&["add", "bob", "--password"], "open sesame\n");
    assert_eq!(
        folder.ok(&["remove", "alice", "--password"]),
        "removed the password of alice\n"
    );
    let alice = folder.json(&["show", "alice", "--json"]);
    assert_eq!(
        (&alice["password"], &alice["public_keys"]),
        (&json!(false), &json!([ED25519]))
    );
    folder.refuses(2, "has no password", &["remove", "alice", "--password"]);
    folder.refuses(2, "has no key", &["remove", "bob", "--password"]);
    folder.refuses(2, "there is no user", &["remove", "carol", "--password"]);
}

#[test]
fn short_passwords_are_refused() {
    let folder = Folder::new();
    for (password, good) in [("a", false), ("seven77", false), ("eight888", true)] {
        let output = folder.with_password(&["add", "alice", "--password"], password);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), good, "{password}: {said}");
        assert_eq!(said.contains("at least 8"), !good, "{password}: {said}");
    }
}

#[test]
fn a_command_says_that_it_waits_for_another_one() {
    let folder = Folder::new();
    folder.ok(&["add", "alice", ED25519]);
    let lock = std::fs::File::open(folder.0.path().join("users.json.lock")).unwrap();
    lock.lock().unwrap();
    let mut command = folder.command(&["disable", "alice"]);
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let (sender, first_line) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(lines.next().unwrap().unwrap()));
    let said = first_line.recv_timeout(PATIENCE).unwrap();
    assert!(
        said.contains("waiting") && said.contains("users.json.lock"),
        "{said}"
    );
    lock.unlock().unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(folder.json(&["show", "alice", "--json"])["disabled"], true);
}

#[test]
fn a_file_of_another_shape_is_told_what_is_expected() {
    let folder = Folder::new();
    for text in ["[]", "\"users\"", "null"] {
        folder.write(text);
        folder.refuses(2, r#"expected {"users": {"#, &["list"]);
    }
    folder.write(r#"{"users": {"a": {"keys": ["nonsense"]}}}"#);
    let said = folder.run(&["list"]).stderr;
    let said = String::from_utf8(said).unwrap();
    assert!(
        said.contains("\"nonsense\" is not a public key") && !said.contains("quotes"),
        "{said}"
    );
    folder.refuses(2, "in quotes", &["add", "bob", "nonsense"]);
}

#[test]
fn add_is_idempotent_and_says_what_it_changed() {
    let folder = Folder::new();
    let (file, first, second) = (
        folder.file().display().to_string(),
        fingerprint(ED25519),
        fingerprint(OTHER),
    );
    let added = format!("made {file}\nadded alice to {file}\nadded a key {first} for alice\n");
    assert_eq!(folder.ok(&["add", "alice", ED25519]), added);
    let before = std::fs::metadata(folder.file()).unwrap().ino();
    for args in [
        &["add", "alice", ED25519][..],
        &["add", "alice"],
        &["add", "alice", "--home", "/alice"],
    ] {
        assert_eq!(folder.ok(args), "alice: nothing to change\n", "{args:?}");
    }
    assert_eq!(
        std::fs::metadata(folder.file()).unwrap().ino(),
        before,
        "it was not written"
    );
    // A key that is already there does not prevent the other changes.
    let args = [
        "add",
        "alice",
        ED25519,
        OTHER,
        OTHER,
        "--home",
        "inbox//alice",
        "--access",
        "write-only",
    ];
    let changed = format!(
        "added a key {second} for alice\nalice's home is now inbox/alice/\nalice's access is now write-only\n"
    );
    assert_eq!(folder.ok(&args), changed);
    assert_eq!(folder.ok(&args), "alice: nothing to change\n");
    assert_eq!(
        folder.ok(&["add", "alice", "--home", ""]),
        "alice's home is now the whole store\n"
    );
    assert!(folder.ok(&["show", "alice"]).contains("home      \"\"\n"));
    for said in [
        "set a password for alice\n",
        "changed the password of alice\n",
    ] {
        let output = folder.with_password(&["add", "alice", "--password"], "open sesame\n");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), said);
    }
    assert!(folder.ok(&["list"]).trim_end().ends_with("password"));
}

#[test]
fn a_private_key_is_refused_and_never_printed() {
    let folder = Folder::new();
    // The forms in which people paste keys; the bodies are made up.
    let openssh = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAASECRET\n-----END OPENSSH PRIVATE KEY-----";
    let rsa = "-----BEGIN RSA PRIVATE KEY-----\nMIIESECRET==\n-----END RSA PRIVATE KEY-----\n";
    let putty = "PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none\nSECRET";
    let check = |args: &[&str]| {
        folder.refuses(2, "private key", args);
        let said = String::from_utf8(folder.run(args).stderr).unwrap();
        assert!(
            !said.contains("SECRET") && !said.contains("BEGIN") && said.contains(".pub"),
            "{said}"
        );
    };
    for private in [openssh, rsa, putty, "b3BlbnNzaC1rZXktdjEAAAAASECRET"] {
        check(&["add", "alice", private]);
        check(&["add", "alice", ED25519, private]);
        // Without quotes the shell splits it into words.
        let words: Vec<&str> = ["add", "alice"]
            .into_iter()
            .chain(private.split_whitespace())
            .collect();
        check(&words);
        let file = folder.0.path().join("id");
        std::fs::write(&file, private).unwrap();
        check(&["add", "alice", "--keys-file", file.to_str().unwrap()]);
        folder.write(&json!({"users": {"alice": {"keys": [private]}}}).to_string());
        check(&["list"]);
        std::fs::remove_file(folder.file()).unwrap();
    }
}

#[test]
fn a_duplicate_name_is_an_error_with_its_line() {
    let folder = Folder::new();
    let entry = format!("\"alice\": {{\"keys\": [\"{ED25519}\"]}}");
    folder.write(&format!("{{\"users\": {{\n  {entry},\n  {entry}\n}}}}\n"));
    folder.refuses(
        2,
        "user alice occurs twice: keep one of them at line 3",
        &["list"],
    );
    folder.refuses(2, "line 3", &["add", "bob", OTHER]);
    assert!(FileAuth::open(folder.file()).is_err());
}

#[test]
fn a_file_that_is_too_large_is_neither_read_nor_written() {
    let folder = Folder::new();
    let with_comment = |len: usize| json!({"users": {"alice": {"keys": [format!("{OTHER} {}", "x".repeat(len))]}}});
    let most = MAX_USERS_FILE_SIZE as usize;
    let rest = with_comment(0).to_string().len();
    folder.write(&with_comment(most - rest).to_string());
    assert_eq!(
        std::fs::metadata(folder.file()).unwrap().len(),
        MAX_USERS_FILE_SIZE
    );
    assert_eq!(
        folder.json(&["show", "alice", "--json"])["keys"][0],
        fingerprint(OTHER)
    );
    folder.refuses(2, "can't be larger than 32 MiB", &["add", "bob", ED25519]);
    folder.write(&with_comment(most - rest + 1).to_string());
    folder.refuses(2, "can't be larger than 32 MiB", &["list"]);
    assert!(FileAuth::open(folder.file()).is_err());
}

#[test]
fn a_change_keeps_the_files_mode_and_group() {
    let folder = Folder::new();
    folder.ok(&["add", "alice", ED25519]);
    let root = std::fs::metadata(folder.file()).unwrap().uid() == 0;
    for (mode, want) in [
        (0o640, 0o640),
        (0o660, 0o660),
        (0o600, 0o600),
        (0o644, 0o644),
        (0o4777, 0o664),
    ] {
        for args in [
            &["add", "bob", OTHER][..],
            &["disable", "bob"],
            &["remove", "bob"],
        ] {
            // Only root can give files away.
            if root {
                chown(folder.file(), Some(65534), Some(1234)).unwrap();
            }
            folder.set_mode(mode);
            folder.ok(args);
            assert_eq!(folder.mode(), want, "{args:?} at {mode:o}");
            let found = std::fs::metadata(folder.file()).unwrap();
            assert!(!root || (found.uid(), found.gid()) == (65534, 1234));
        }
    }
}

#[test]
fn a_file_that_everyone_can_read_causes_a_warning() {
    let folder = Folder::new();
    folder.ok(&["add", "alice", ED25519]);
    let commands = [
        &["list"][..],
        &["show", "alice"],
        &["add", "bob", OTHER],
        &["disable", "bob"],
        &["enable", "bob"],
        &["remove", "bob"],
    ];
    for (mode, warned) in [(0o600, false), (0o640, false), (0o644, true), (0o666, true)] {
        for args in commands {
            folder.set_mode(mode);
            let output = folder.run(args);
            assert!(output.status.success(), "{output:?}");
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(
                said.contains("chmod o-rwx"),
                warned,
                "{args:?} at {mode:o}: {said}"
            );
        }
    }
}

#[test]
fn an_authorized_keys_file_is_imported() {
    let folder = Folder::new();
    let file = folder.0.path().join("authorized_keys");
    let import = |name: &str, text: &str| {
        std::fs::write(&file, text).unwrap();
        [
            "add".to_owned(),
            name.to_owned(),
            "--keys-file".to_owned(),
            file.display().to_string(),
        ]
    };
    let all = format!(
        "# ours\n\n{ED25519}\n  restrict,command=\"internal-sftp\",no-pty {OTHER} bob's laptop\n{OTHER}\n"
    );
    let args = import("alice", &all);
    folder.ok(&args.each_ref().map(String::as_str));
    let list = folder.json(&["list", "--json"]);
    assert_eq!(list[0]["keys"].as_array().unwrap().len(), 2);
    assert!(folder.text().contains("alice@example.com") && !folder.text().contains("restrict"));
    // Again, with one more line.
    folder.ok(&args.each_ref().map(String::as_str));
    for (text, sentence) in [
        (
            format!("{ED25519}\nfrom=\"10.0.0.0/8\" {OTHER}\n"),
            "line 2: sftpd has no option from=",
        ),
        (
            format!("command=\"internal-sftp -R\" {OTHER}\n"),
            "no option command=",
        ),
        (format!("{ED25519}\n{FIDO}\n"), "line 2"),
        ("ssh-ed25519 AAAA\n".to_owned(), "line 1"),
        ("# nobody\n".to_owned(), "holds no key"),
    ] {
        folder.refuses(
            2,
            sentence,
            &import("carol", &text).each_ref().map(String::as_str),
        );
    }
    folder.refuses(2, "can't read", &["add", "carol", "--keys-file", "nowhere"]);
}

#[test]
fn invalid_arguments_change_nothing() {
    let folder = Folder::new();
    folder.refuses(
        2,
        "needs a KEY, --keys-file or --password",
        &["add", "alice"],
    );
    folder.ok(&["add", "alice", ED25519]);
    for name in ["", "a/b", "..", ".hidden", "a b", "tab\there", "new\nline"] {
        folder.refuses(2, "can't be a user name", &["add", name, ED25519]);
    }
    folder.refuses(2, "can't be a user name", &["add", "--", "-x", ED25519]);
    folder.refuses(
        2,
        "is not a public key",
        &["add", "bob", "ssh-ed25519 AAAA"],
    );
    folder.refuses(2, "not supported", &["add", "bob", FIDO]);
    folder.refuses(2, "there is no user", &["remove", "bob"]);
    folder.refuses(2, "there is no user", &["disable", "bob"]);
    folder.refuses(2, "there is no user", &["enable", "bob"]);
    folder.refuses(2, "has no key", &["remove", "alice", "--key", "SHA256:x"]);
    folder.refuses(
        2,
        "no other key and no password",
        &["remove", "alice", "--key", &fingerprint(ED25519)],
    );
    for home in ["../bob", "a/./b", &"x".repeat(600)] {
        folder.refuses(2, "--home", &["add", "alice", "--home", home]);
        folder.refuses(2, "--home", &["add", "bob", OTHER, "--home", home]);
    }
    // The key is not added either.
    folder.refuses(2, "--home", &["add", "alice", OTHER, "--home", ".."]);
}

#[test]
fn a_path_or_an_unquoted_key_gets_a_hint() {
    let folder = Folder::new();
    let existing = folder.0.path().join("keys of alice");
    std::fs::write(&existing, ED25519).unwrap();
    for path in ["id.pub", "/home/alice/key", "~/.ssh/id", "./key"] {
        folder.refuses(2, "use --keys-file", &["add", "bob", path]);
    }
    std::fs::rename(&existing, folder.0.path().join("alice_keys")).unwrap();
    folder.refuses(
        2,
        "use --keys-file",
        &[
            "add",
            "bob",
            folder.0.path().join("alice_keys").to_str().unwrap(),
        ],
    );
    let words: Vec<&str> = ["add", "bob"]
        .into_iter()
        .chain(ED25519.split(' '))
        .collect();
    folder.refuses(2, "in quotes", &words);
    folder.refuses(
        2,
        "several lines",
        &["add", "bob", &format!("{ED25519}\n{OTHER}\n")],
    );
    folder.ok(&["add", "bob", &format!("{ED25519}\n")]);
}

#[test]
fn a_broken_or_unwritable_file_is_not_changed() {
    let folder = Folder::new();
    let broken = [
        "{",
        r#"{"users": {"a": {"keys": ["nonsense"]}}}"#,
        r#"{"users": {"a": {"keys": [], "acess": "read-only"}}}"#,
        r#"{"users": {"a": {"password": "in clear"}}}"#,
        r#"{"users": {"../a": {"password": "x"}}}"#,
        r#"{"users": {"a": {}}}"#,
        r#"{"users": {"a": {"disabled": "yes"}}}"#,
    ];
    for text in broken {
        folder.write(text);
        for args in [
            &["add", "bob", ED25519][..],
            &["remove", "a"],
            &["remove", "a", "--key", "SHA256:x"],
            &["disable", "a"],
            &["enable", "a"],
            &["list"],
            &["list", "--json"],
            &["show", "a"],
            &["show", "a", "--json"],
        ] {
            folder.refuses(2, "is not a valid users file", args);
        }
    }
    std::fs::remove_file(folder.file()).unwrap();
    std::fs::create_dir(folder.file()).unwrap();
    folder.set_mode(0o700);
    folder.refuses(1, "can't read", &["add", "bob", ED25519]);
    let mut command = sftpd(folder.0.path());
    let output = command
        .args(["users", "--users", "/nonexistent/folder/users.json"])
        .args(["add", "bob", ED25519])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("can't write /nonexistent"),
        "{output:?}"
    );
}

#[test]
fn concurrent_commands_lose_no_change() {
    let folder = Folder::new();
    let add = |n| {
        folder
            .command(&["add", &format!("user{n}"), ED25519])
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let children: Vec<_> = (0..12).map(add).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let list = folder.json(&["list", "--json"]);
    assert_eq!(list.as_array().unwrap().len(), 12);
}

#[tokio::test]
async fn passwords_are_hashed_and_checked() {
    let folder = Folder::new();
    let output = folder.with_password(&["add", "alice", "--password"], "open sesame\n");
    assert!(output.status.success(), "{output:?}");
    assert!(folder.text().contains("$argon2id$") && !folder.text().contains("sesame"));
    assert_eq!(
        folder
            .with_password(&["add", "bob", "--password"], "\n")
            .status
            .code(),
        Some(2)
    );
    let auth = FileAuth::open(folder.file()).unwrap();
    assert!(
        log_in_with_password(&auth, "alice", "open sesame")
            .await
            .is_some()
    );
    for (user, password) in [
        ("alice", "open"),
        ("alice", ""),
        ("bob", "open sesame"),
        ("", ""),
    ] {
        assert!(
            log_in_with_password(&auth, user, password).await.is_none(),
            "{user:?} {password:?}"
        );
    }
}

#[tokio::test]
async fn a_change_applies_to_the_next_login_and_a_broken_file_locks_no_user_out() {
    let folder = Folder::new();
    folder.ok(&["add", "alice", ED25519]);
    let (first, second) = (key(ED25519), key(OTHER));
    let auth = FileAuth::open(folder.file()).unwrap();
    let account = log_in_with_key(&auth, "alice", &first).await.unwrap();
    assert_eq!(account.home_prefix().as_deref(), Some("alice/"));
    assert!(log_in_with_key(&auth, "alice", &second).await.is_none());
    folder.ok(&["add", "alice", OTHER]);
    assert!(log_in_with_key(&auth, "alice", &second).await.is_some());
    let good = folder.text();
    std::fs::write(folder.file(), "{ broken").unwrap();
    assert!(log_in_with_key(&auth, "alice", &second).await.is_some());
    std::fs::remove_file(folder.file()).unwrap();
    assert!(log_in_with_key(&auth, "alice", &first).await.is_some());
    std::fs::write(folder.file(), good.replace(OTHER, ED25519)).unwrap();
    assert!(log_in_with_key(&auth, "alice", &second).await.is_none());
    folder.ok(&["remove", "alice"]);
    assert!(log_in_with_key(&auth, "alice", &first).await.is_none());
}

/// A users file with alice and bob, and what it is without bob.
fn with_and_without_bob(folder: &Folder) -> (String, String) {
    folder.ok(&["add", "alice", ED25519]);
    let without = folder.text();
    folder.ok(&["add", "bob", OTHER]);
    (folder.text(), without)
}

#[tokio::test]
async fn a_failed_read_is_retried_although_the_metadata_are_the_same() {
    let folder = Folder::new();
    let (_, without_bob) = with_and_without_bob(&folder);
    let auth = FileAuth::open(folder.file()).unwrap();
    folder.overwrite_unseen("{ broken");
    assert!(
        log_in_with_key(&auth, "bob", &key(OTHER)).await.is_some(),
        "the last good file is in force"
    );
    folder.overwrite_unseen(&without_bob);
    assert!(
        log_in_with_key(&auth, "bob", &key(OTHER)).await.is_none(),
        "bob is no longer in the file"
    );
    assert!(
        log_in_with_key(&auth, "alice", &key(ED25519))
            .await
            .is_some()
    );
}

#[tokio::test]
async fn a_change_that_only_ctime_shows_is_seen() {
    let folder = Folder::new();
    let (with_bob, without_bob) = with_and_without_bob(&folder);
    let auth = FileAuth::open(folder.file()).unwrap();
    // Once at once, once when the file has not been changed for a while.
    for age in [Duration::ZERO, Duration::from_millis(200)] {
        folder.overwrite_unseen(&with_bob);
        eventually("the file is of this age", || {
            time_since_change(&folder.file()) >= age
        })
        .await;
        assert!(log_in_with_key(&auth, "bob", &key(OTHER)).await.is_some());
        folder.overwrite_unseen(&without_bob);
        assert!(log_in_with_key(&auth, "bob", &key(OTHER)).await.is_none());
    }
}

/// The time since the last change of a file (ctime).
fn time_since_change(file: &Path) -> Duration {
    let found = std::fs::metadata(file).unwrap();
    let changed = Duration::new(found.ctime() as u64, found.ctime_nsec() as u32);
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH + changed)
        .unwrap_or_default()
}

#[tokio::test]
async fn a_disabled_user_keeps_all_settings_and_cannot_log_in() {
    let folder = Folder::new();
    folder.ok(&["add", "alice", ED25519]);
    folder.with_password(&["add", "alice", "--password"], "open sesame\n");
    let enabled = folder.text();
    assert!(!enabled.contains("disabled"));
    let auth = FileAuth::open(folder.file()).unwrap();
    assert!(
        folder
            .ok(&["disable", "alice"])
            .starts_with("disabled alice")
    );
    assert!(folder.text().contains("\"disabled\": true"));
    assert!(
        log_in_with_key(&auth, "alice", &key(ED25519))
            .await
            .is_none()
    );
    assert!(
        log_in_with_password(&auth, "alice", "open sesame")
            .await
            .is_none()
    );
    assert!(
        folder
            .ok(&["disable", "alice"])
            .contains("nothing to change")
    );
    assert!(folder.ok(&["list"]).contains("alice  disabled  "));
    assert!(
        folder
            .ok(&["show", "alice"])
            .contains("status    disabled\n")
    );
    assert_eq!(folder.json(&["show", "alice", "--json"])["disabled"], true);
    // Adding a key does not enable the user, and says so.
    let output = folder.run(&["add", "alice", OTHER]);
    assert!(
        output.status.success()
            && String::from_utf8_lossy(&output.stderr).contains("alice is disabled")
    );
    assert!(log_in_with_key(&auth, "alice", &key(OTHER)).await.is_none());
    folder.ok(&["remove", "alice", "--key", &fingerprint(OTHER)]);
    assert_eq!(folder.ok(&["enable", "alice"]), "enabled alice\n");
    assert_eq!(folder.text(), enabled);
    assert!(
        log_in_with_key(&auth, "alice", &key(ED25519))
            .await
            .is_some()
    );
    assert!(
        log_in_with_password(&auth, "alice", "open sesame")
            .await
            .is_some()
    );
    assert!(
        folder
            .ok(&["enable", "alice"])
            .contains("nothing to change")
    );
}

#[test]
fn key_comments_cannot_control_the_terminal() {
    let folder = Folder::new();
    let comment = "\u{1b}[2Jalice";
    folder.write(
        &json!({"users": {"alice": {"keys": [format!("{OTHER} {comment}")], "home": comment}}})
            .to_string(),
    );
    for args in [
        &["list"][..],
        &["show", "alice"],
        &["add", "alice", "--home", "\u{1b}]x"],
    ] {
        let said = folder.ok(args);
        assert!(
            !said.contains('\u{1b}') && said.contains("\\u{1b}"),
            "{args:?}: {said}"
        );
    }
}

/// A running server with the user alice, and its metrics.
struct Gateway {
    process: Process,
    _s3: FakeS3,
}

impl Gateway {
    async fn start() -> Gateway {
        let s3 = FakeS3::start().await;
        Gateway {
            process: Process::start(&s3, &["--metrics", "127.0.0.1:0"]),
            _s3: s3,
        }
    }

    fn file(&self) -> PathBuf {
        self.process.folder().join("users.json")
    }

    /// Replaces the users file atomically, so that the server never sees half of it.
    fn replace(&self, content: &[u8]) {
        let mut file = tempfile::NamedTempFile::new_in(self.process.folder()).unwrap();
        file.write_all(content).unwrap();
        file.persist(self.file()).unwrap();
    }

    fn users(&self, args: &[&str]) {
        let output = users_command(&self.file(), args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    async fn admits_alice(&self) -> bool {
        Client::try_connect(self.process.address).await.is_some()
    }

    /// Replaces the users file by a pipe that is never written to: reading it blocks, as on a dead
    /// network mount.
    fn block(&self) {
        let pipe = self.process.folder().join("pipe");
        assert!(
            Command::new("mkfifo")
                .arg(&pipe)
                .status()
                .unwrap()
                .success()
        );
        std::fs::rename(pipe, self.file()).unwrap();
    }

    /// The body of the answer to a GET on its metrics address.
    fn http_get(&self, path: &str) -> String {
        http_get(&self.process.said("metrics on ").unwrap(), path).1
    }

    fn users_file_ok(&self) -> bool {
        self.http_get("/metrics")
            .lines()
            .any(|line| line == "sftpd_users_file_ok 1")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_server_follows_disable_enable_and_remove() {
    let gateway = Gateway::start().await;
    assert!(gateway.admits_alice().await);
    gateway.users(&["disable", "alice"]);
    assert!(!gateway.admits_alice().await);
    eventually("the log tells why", || {
        gateway.process.logged("the user is disabled") > 0
    })
    .await;
    gateway.users(&["enable", "alice"]);
    assert!(gateway.admits_alice().await);
    gateway.users(&["remove", "alice"]);
    assert!(!gateway.admits_alice().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_server_logs_a_broken_file_once_and_recovers() {
    let gateway = Gateway::start().await;
    assert!(gateway.users_file_ok());
    let good = std::fs::read(gateway.file()).unwrap();
    gateway.replace(b"{ broken");
    eventually("the gauge says so", || !gateway.users_file_ok()).await;
    for _ in 0..3 {
        assert!(
            gateway.admits_alice().await,
            "the last good file is in force"
        );
    }
    assert_eq!(
        gateway
            .process
            .logged("the users of the last good file stay in force"),
        1
    );
    gateway.replace(&good);
    eventually("the gauge says so", || gateway.users_file_ok()).await;
    eventually("the log says so", || {
        gateway.process.logged("can be read again") == 1
    })
    .await;
    std::fs::set_permissions(gateway.file(), Permissions::from_mode(0o644)).unwrap();
    eventually("the server warns", || {
        gateway
            .process
            .logged("is open to every user of this machine")
            == 1
    })
    .await;
}

/// A file that was gone for a moment, and that `users add` made anew, locks everybody else out.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_server_warns_when_none_of_its_users_is_left() {
    const GONE: &str = "all users so far are gone";
    let gateway = Gateway::start().await;
    let counts = |users: u32| {
        let line = format!("sftpd_users {users}");
        gateway
            .http_get("/metrics")
            .lines()
            .any(|found| found == line)
    };
    eventually("alice is counted", || counts(1)).await;
    gateway.users(&["add", "bob", ED25519]);
    eventually("bob is counted", || counts(2)).await;
    gateway.users(&["remove", "alice"]);
    eventually("alice is gone", || counts(1)).await;
    assert_eq!(gateway.process.logged(GONE), 0, "bob is left");
    std::fs::remove_file(gateway.file()).unwrap();
    eventually("the file is missed", || !gateway.users_file_ok()).await;
    assert!(counts(1), "the last good file is in force");
    gateway.users(&["add", "carol", ED25519]);
    gateway.users(&["add", "dave", OTHER]);
    eventually("the new users are counted", || counts(2)).await;
    eventually("the log warns", || gateway.process.logged(GONE) == 1).await;
    let warning = gateway.process.line(GONE).unwrap();
    assert!(
        warning.contains("WARN") && warning.contains("only new ones"),
        "{warning}"
    );
    gateway.users(&["remove", "carol"]);
    gateway.users(&["remove", "dave"]);
    eventually("no user is counted", || counts(0)).await;
    eventually("the log says so", || {
        gateway.process.logged("nobody can log in") == 1
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_users_file_that_blocks_does_not_stop_the_server() {
    let mut gateway = Gateway::start().await;
    let client = gateway.process.client().await;
    client.put("/f", b"x").await.unwrap();
    let good = std::fs::read(gateway.file()).unwrap();
    gateway.block();
    // Several times, so that each thread of the server could be waiting for the file.
    for _ in 0..4 {
        assert!(
            within("a login", gateway.admits_alice()).await,
            "the last good file is in force"
        );
        assert_eq!(within("a stat", client.size("/f")).await, Ok(1));
    }
    eventually("the gauge says so", || !gateway.users_file_ok()).await;
    assert_eq!(gateway.process.logged("users.json within 5 seconds"), 1);
    assert_eq!(gateway.http_get("/healthz"), "ok\n");
    // The read that hangs does not prevent another one that sees the new file.
    gateway.replace(&good);
    eventually("the gauge says so", || gateway.users_file_ok()).await;
    gateway.users(&["disable", "alice"]);
    assert!(
        !gateway.admits_alice().await,
        "a change applies to the next login"
    );
    gateway.block();
    assert!(!within("a login", gateway.admits_alice()).await);
    gateway.process.signal("TERM");
    drop(client);
    assert!(gateway.process.ended().await.success());
}

#[test]
fn manage_users_runs_the_binary() {
    let folder = Folder::new();
    let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/manage-users"))
        .env("SFTPD", env!("CARGO_BIN_EXE_sftpd"))
        .env("SFTPD_USERS", folder.file())
        .args(["add", "alice", ED25519])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(folder.text().contains(ED25519));
}

/// No other binary runs instead.
#[test]
fn a_binary_that_is_named_and_missing_is_an_error() {
    let top = env!("CARGO_MANIFEST_DIR");
    for (script, args) in [
        ("manage-users", &["list"][..]),
        ("deploy.sh", &["--dry-run", "host"]),
        ("deploy.sh", &["host"]),
    ] {
        let output = Command::new(format!("{top}/{script}"))
            .args(args)
            .env("SFTPD", "/nonexistent")
            // Nothing may get this far.
            .env("SFTPD_SSH", "false")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{script}: {said}");
        assert!(said.contains("SFTPD=/nonexistent"), "{script}: {said}");
    }
    let extra = Command::new(format!("{top}/deploy.sh"))
        .args(["--unit", "extra"])
        .output()
        .unwrap();
    assert_eq!(extra.status.code(), Some(2), "{extra:?}");
}

#[test]
fn serve_with_missing_or_wrong_settings_says_what_to_do() {
    let folder = Folder::new();
    let serve = |args: &[&str]| {
        let mut command = sftpd(folder.0.path());
        let output = command.arg("serve").args(args).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (status, said) = serve(&["--store", "memory:"]);
    assert_eq!(status, Some(2));
    assert!(said.contains("sftpd users add"), "{said}");
    folder.ok(&["add", "alice", ED25519]);
    for (args, want) in [
        (&["--store", "ftp://x"][..], "neither s3://BUCKET"),
        (&["--store", "s3:///prefix"], "neither s3://BUCKET"),
        (
            &["--store", "memory:", "--part-size", "1MiB"],
            "minimum of 5MiB",
        ),
        (
            &["--store", "memory:", "--buffer-memory", "8MiB"],
            "less than four parts",
        ),
        (
            &["--store", "memory:", "--idle-timeout", "soon"],
            "idle-timeout",
        ),
        (&[], "--store"),
    ] {
        let (status, said) = serve(args);
        assert_eq!(status, Some(2), "{args:?}: {said}");
        assert!(said.contains(want), "{args:?}: {said}");
    }
    let (status, said) = serve(&["--store", "memory:", "--listen", "192.0.2.1:1"]);
    assert_eq!(status, Some(1));
    assert!(said.contains("can't listen on 192.0.2.1:1"), "{said}");
}
