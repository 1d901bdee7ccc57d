//! `sftpd users …`, `manage-users` and the server's view of users.json, with the real binary.

// A panic is how a test fails.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use sftpd::users::{Auth, FileAuth};
use ssh_key::PublicKey;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

const ED25519: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB9dG4kjRhQTtWTVzd2t27+t0DEHBPW7iOD23TUiYLio alice@example.com";
const OTHER: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE8scEn2htm9vSRE8JJEEkiQdb9kYinuVZ49Ka/qEnZI";
const FIDO: &str = "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAAIEFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBAAAABHNzaDo=";

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

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sftpd"));
        command.arg("users").arg("--users").arg(self.file()).args(args).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// One sentence on standard error, this status, and the file as it was.
    fn refuses(&self, status: i32, sentence: &str, args: &[&str]) {
        let before = std::fs::read(self.file()).ok();
        let output = self.run(args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
        assert!(said.contains(sentence) && said.trim_end().lines().count() == 1, "{args:?}: {said}");
        assert_eq!(std::fs::read(self.file()).ok(), before, "{args:?}");
    }

    fn with_password(&self, args: &[&str], password: &str) -> Output {
        let mut child =
            self.command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(password.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }
}

#[test]
fn users_are_added_listed_and_removed() {
    let folder = Folder::new();
    assert!(folder.ok(&["list"]).contains("no users yet"));
    folder.ok(&["add", "alice", ED25519]);
    folder.ok(&["add", "alice", OTHER, "--access", "write-only", "--home", "in/alice"]);
    folder.ok(&["add", "bob", OTHER]);
    let mode = std::fs::metadata(folder.file()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let list: serde_json::Value = serde_json::from_str(&folder.ok(&["list", "--json"])).unwrap();
    let fingerprint = PublicKey::from_openssh(OTHER).unwrap().fingerprint(ssh_key::HashAlg::Sha256).to_string();
    assert_eq!(list[0]["access"], "write-only");
    assert_eq!(list[0]["home"], "in/alice");
    assert_eq!(list[0]["keys"][1], fingerprint);
    assert_eq!(list[1]["home"], "bob/");
    assert!(folder.ok(&["list"]).contains(&fingerprint));
    folder.ok(&["remove", "alice", "--key", &fingerprint]);
    assert!(folder.text().contains(ED25519));
    folder.ok(&["remove", "alice"]);
    assert!(!folder.text().contains("alice") && folder.text().contains("bob"));
}

#[test]
fn an_authorized_keys_file_is_taken_over() {
    let folder = Folder::new();
    let file = folder.0.path().join("authorized_keys");
    let import = |name: &str, text: &str| {
        std::fs::write(&file, text).unwrap();
        ["add".to_owned(), name.to_owned(), "--keys-file".to_owned(), file.display().to_string()]
    };
    let all =
        format!("# ours\n\n{ED25519}\n  restrict,command=\"internal-sftp\",no-pty {OTHER} bob's laptop\n{OTHER}\n");
    let args = import("alice", &all);
    folder.ok(&args.each_ref().map(String::as_str));
    let list: serde_json::Value = serde_json::from_str(&folder.ok(&["list", "--json"])).unwrap();
    assert_eq!(list[0]["keys"].as_array().unwrap().len(), 2);
    assert!(folder.text().contains("alice@example.com") && !folder.text().contains("restrict"));
    // Again, with one more line.
    folder.ok(&args.each_ref().map(String::as_str));
    for (text, sentence) in [
        (format!("{ED25519}\nfrom=\"10.0.0.0/8\" {OTHER}\n"), "line 2: sftpd has no option from="),
        (format!("command=\"internal-sftp -R\" {OTHER}\n"), "no option command="),
        (format!("{ED25519}\n{FIDO}\n"), "line 2"),
        ("ssh-ed25519 AAAA\n".to_owned(), "line 1"),
        ("# nobody\n".to_owned(), "holds no key"),
    ] {
        folder.refuses(2, sentence, &import("carol", &text).each_ref().map(String::as_str));
    }
    folder.refuses(2, "can't read", &["add", "carol", "--keys-file", "nowhere"]);
}

#[test]
fn mistakes_change_nothing() {
    let folder = Folder::new();
    folder.refuses(2, "needs a KEY or --password", &["add", "alice"]);
    folder.ok(&["add", "alice", ED25519]);
    for name in ["", "a/b", "..", ".hidden", "a b", "tab\there", "new\nline"] {
        folder.refuses(2, "can't be a user name", &["add", name, ED25519]);
    }
    folder.refuses(2, "can't be a user name", &["add", "--", "-x", ED25519]);
    folder.refuses(2, "is not a public key", &["add", "bob", "ssh-ed25519 AAAA"]);
    folder.refuses(2, "is not a public key", &["add", "bob", "id.pub"]);
    folder.refuses(2, "not supported", &["add", "bob", FIDO]);
    folder.refuses(2, "has the key SHA256:", &["add", "alice", ED25519]);
    folder.refuses(2, "has the key SHA256:", &["add", "bob", OTHER, OTHER]);
    folder.refuses(2, "exists already", &["add", "alice"]);
    folder.refuses(2, "there is no user", &["remove", "bob"]);
    folder.refuses(2, "has no key", &["remove", "alice", "--key", "SHA256:x"]);
    let only = PublicKey::from_openssh(ED25519).unwrap().fingerprint(ssh_key::HashAlg::Sha256).to_string();
    folder.refuses(2, "the only way in", &["remove", "alice", "--key", &only]);
    folder.refuses(1, "`.`, `..` or NUL", &["add", "alice", "--home", "../bob"]);
}

#[test]
fn a_broken_or_unwritable_file_is_left_alone() {
    let folder = Folder::new();
    let broken = [
        "{",
        r#"{"users": {"a": {"keys": ["nonsense"]}}}"#,
        r#"{"users": {"a": {"keys": [], "acess": "read-only"}}}"#,
        r#"{"users": {"a": {"password": "in clear"}}}"#,
        r#"{"users": {"../a": {"password": "x"}}}"#,
        r#"{"users": {"a": {}}}"#,
    ];
    for text in broken {
        std::fs::write(folder.file(), text).unwrap();
        folder.refuses(1, "is not a valid users file", &["add", "bob", ED25519]);
        folder.refuses(1, "is not a valid users file", &["list"]);
    }
    std::fs::remove_file(folder.file()).unwrap();
    std::fs::create_dir(folder.file()).unwrap();
    folder.refuses(1, "can't read", &["add", "bob", ED25519]);
    let output = Command::new(env!("CARGO_BIN_EXE_sftpd"))
        .args(["users", "--users", "/nonexistent/folder/users.json", "add", "bob", ED25519])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("can't write /nonexistent"), "{output:?}");
}

#[test]
fn many_commands_at_once_lose_nothing() {
    let folder = Folder::new();
    let children: Vec<_> =
        (0..12).map(|n| folder.command(&["add", &format!("user{n}"), ED25519]).spawn().unwrap()).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let list: serde_json::Value = serde_json::from_str(&folder.ok(&["list", "--json"])).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 12);
}

#[tokio::test]
async fn passwords_are_hashed_and_checked() {
    let folder = Folder::new();
    let output = folder.with_password(&["add", "alice", "--password"], "open sesame\n");
    assert!(output.status.success(), "{output:?}");
    assert!(folder.text().contains("$argon2id$") && !folder.text().contains("sesame"));
    assert_eq!(folder.with_password(&["add", "bob", "--password"], "\n").status.code(), Some(2));
    let auth = FileAuth::open(folder.file()).unwrap();
    assert!(auth.password("alice", "open sesame").await.is_some());
    for (user, password) in [("alice", "open"), ("alice", ""), ("bob", "open sesame"), ("", "")] {
        assert!(auth.password(user, password).await.is_none(), "{user:?} {password:?}");
    }
}

#[tokio::test]
async fn a_change_counts_from_the_next_login_and_a_broken_file_locks_nobody_out() {
    let folder = Folder::new();
    folder.ok(&["add", "alice", ED25519]);
    let (first, second) = (PublicKey::from_openssh(ED25519).unwrap(), PublicKey::from_openssh(OTHER).unwrap());
    let auth = FileAuth::open(folder.file()).unwrap();
    let account = auth.public_key("alice", &first).await.unwrap();
    assert_eq!(account.home, "alice/");
    assert!(auth.public_key("alice", &second).await.is_none());
    folder.ok(&["add", "alice", OTHER]);
    assert!(auth.public_key("alice", &second).await.is_some());
    let good = folder.text();
    std::fs::write(folder.file(), "{ broken").unwrap();
    assert!(auth.public_key("alice", &second).await.is_some());
    std::fs::remove_file(folder.file()).unwrap();
    assert!(auth.public_key("alice", &first).await.is_some());
    std::fs::write(folder.file(), good.replace(OTHER, ED25519)).unwrap();
    assert!(auth.public_key("alice", &second).await.is_none());
    folder.ok(&["remove", "alice"]);
    assert!(auth.public_key("alice", &first).await.is_none());
}

#[test]
fn manage_users_runs_the_command() {
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

#[test]
fn serving_without_what_it_takes_says_what_to_do() {
    let folder = Folder::new();
    let serve = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_sftpd"))
            .current_dir(folder.0.path())
            .arg("serve")
            .args(args)
            .env_remove("SFTPD_STORE")
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (status, said) = serve(&["--store", "memory:"]);
    assert_eq!(status, Some(2));
    assert!(said.contains("sftpd users add"), "{said}");
    folder.ok(&["add", "alice", ED25519]);
    for (args, want) in [
        (&["--store", "ftp://x"][..], "neither s3://BUCKET"),
        (&["--store", "s3:///prefix"], "neither s3://BUCKET"),
        (&["--store", "memory:", "--part-size", "1MiB"], "minimum of 5MiB"),
        (&["--store", "memory:", "--buffer-memory", "8MiB"], "less than four parts"),
        (&["--store", "memory:", "--idle-timeout", "soon"], "idle-timeout"),
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
