//! Each example, started and driven by a real `sftp`.
//!
//! `cargo test` builds the examples before it runs this. With `--test examples` alone they are those
//! of the last `cargo build --examples`.

// A panic is how a test fails.
#![allow(clippy::restriction)]

#[path = "support/commands.rs"]
#[allow(dead_code)]
mod commands;
#[path = "../examples/folder/store.rs"]
mod folder_store;
#[cfg(all(feature = "s3", feature = "cli"))]
#[path = "support/s3/mod.rs"]
#[allow(dead_code, unused_imports, unused_macros)]
mod s3;
#[path = "support/wait.rs"]
#[allow(dead_code)]
mod wait;

use commands::{Ran, Running, are_installed};
use folder_store::FolderStore;
use sftpd::store::{Key, Store};
use sftpd::testing::store_conformance;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;
use wait::wait_until;

/// An example that listens.
struct Example {
    port: u16,
    printed: Arc<Mutex<Vec<String>>>,
    /// Killed when dropped.
    #[allow(dead_code)]
    running: Running,
    /// Where `sftp` runs.
    dir: TempDir,
}

fn example(name: &str) -> Command {
    let this = std::env::current_exe().unwrap();
    let program = this.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(
        program.exists(),
        "{program:?} is missing: run `cargo test` as a whole, or `cargo build --examples`"
    );
    let mut command = Command::new(program);
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("AWS_") {
            command.env_remove(variable);
        }
    }
    command
}

impl Example {
    /// `None` if `sftp` is not installed. The address is the last argument.
    fn start(mut command: Command) -> Option<Example> {
        if !are_installed(&["sftp"]) {
            return None;
        }
        command.arg("127.0.0.1:0").stdin(Stdio::null());
        let mut running = Running::spawn(command.stdout(Stdio::piped()));
        let stdout = running.0.stdout.take().unwrap();
        let printed: Arc<Mutex<Vec<String>>> = Arc::default();
        let lines = printed.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                lines.lock().unwrap().push(line.unwrap());
            }
        });
        let mut example = Example {
            port: 0,
            printed,
            running,
            dir: tempfile::tempdir().unwrap(),
        };
        wait_until("the example listens", || {
            example.line("listening on").is_some()
        });
        let line = example.line("listening on").unwrap();
        let (_, port) = line.rsplit_once(':').unwrap();
        example.port = port.parse().unwrap();
        Some(example)
    }

    /// The first line that holds this.
    fn line(&self, text: &str) -> Option<String> {
        let printed = self.printed.lock().unwrap();
        printed.iter().find(|line| line.contains(text)).cloned()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `sftp` as this user.
    fn sftp(&self, user: &str, password: &str, commands: &str) -> Ran {
        let askpass = self.path("askpass");
        fs::write(&askpass, format!("#!/bin/sh\necho '{password}'\n")).unwrap();
        fs::set_permissions(&askpass, PermissionsExt::from_mode(0o700)).unwrap();
        fs::write(self.path("batch"), commands).unwrap();
        let mut sftp = Command::new("sftp");
        sftp.current_dir(self.dir.path())
            .env("SSH_ASKPASS", &askpass)
            .env("SSH_ASKPASS_REQUIRE", "force")
            .args(["-F", "/dev/null", "-P", &self.port.to_string()])
            .args(["-o", "StrictHostKeyChecking=no"])
            .args(["-o", "UserKnownHostsFile=/dev/null"])
            .args(["-o", "PreferredAuthentications=password"])
            .args(["-o", "NumberOfPasswordPrompts=1"])
            .args(["-o", "BatchMode=no", "-b", "batch"])
            .arg(format!("{user}@127.0.0.1"));
        Ran::new(&mut sftp, "")
    }

    /// As [`Example::sftp`], which must succeed.
    fn do_sftp(&self, user: &str, password: &str, commands: &str) -> String {
        let ran = self.sftp(user, password, commands);
        assert!(ran.succeeded(), "{ran}");
        ran.stdout
    }

    /// Puts a file of this size, gets it back, and compares.
    fn put_and_get(&self, user: &str, password: &str, size: usize) {
        let content: Vec<u8> = (0..size).map(|at| (at * 7 % 251) as u8).collect();
        fs::write(self.path("up"), &content).unwrap();
        self.do_sftp(
            user,
            password,
            "put up file\nget file down\nrename file moved\nls -l",
        );
        assert!(fs::read(self.path("down")).unwrap() == content);
    }
}

const MIB: usize = 1024 * 1024;

#[test]
fn memory() {
    let Some(example) = Example::start(example("memory")) else {
        return;
    };
    example.put_and_get("guest", "guest", 12 * MIB);
    assert!(example.sftp("guest", "wrong", "ls").failed());
}

#[test]
fn folder() {
    let files = tempfile::tempdir().unwrap();
    let mut command = example("folder");
    command.arg(files.path());
    let Some(example) = Example::start(command) else {
        return;
    };
    example.put_and_get("guest", "guest", 12 * MIB);
    let moved = files.path().join("guest/moved");
    assert!(fs::read(&moved).unwrap() == fs::read(example.path("up")).unwrap());
    example.do_sftp(
        "guest",
        "guest",
        "mkdir d\nput up d/one\nrename d e\nrm moved\nls e",
    );
    assert!(files.path().join("guest/e/one").is_file() && !moved.exists());
    assert!(!files.path().join("guest/d").exists());
    example.do_sftp("guest", "guest", "rm e/one\nrmdir e\nmkdir empty\nls");
    assert!(files.path().join("guest/empty").is_dir());
    // Neither by the name nor by a link.
    fs::write(files.path().join("secret"), "of another user").unwrap();
    fs::write(example.path("outside"), "of the machine").unwrap();
    symlink(example.path("outside"), files.path().join("guest/link")).unwrap();
    symlink(example.dir.path(), files.path().join("guest/way-out")).unwrap();
    for leads_out in [
        "get ../secret",
        "get link",
        "get way-out/outside",
        "put up link/x",
        "put up way-out/x",
        "ls way-out",
        "rename way-out/outside inside",
        "rm way-out/outside",
    ] {
        assert!(
            example.sftp("guest", "guest", leads_out).failed(),
            "{leads_out}"
        );
    }
    assert!(!example.path("x").exists());
    assert_eq!(
        fs::read(example.path("outside")).unwrap(),
        b"of the machine"
    );
    let uploads = fs::read_dir(files.path().join(".sftpd-uploads")).unwrap();
    assert_eq!(uploads.count(), 0);
}

#[tokio::test]
async fn the_folder_conforms() {
    let files = tempfile::tempdir().unwrap();
    let store = FolderStore::open(files.path()).unwrap();
    store_conformance(Arc::new(store)).await.unwrap();
    let left = fs::read_dir(files.path().join(".sftpd-uploads")).unwrap();
    assert_eq!(left.count(), 0);
}

#[tokio::test]
async fn keys_of_the_folder_do_not_lead_out() {
    let files = tempfile::tempdir().unwrap();
    let root = files.path().join("root");
    let store = FolderStore::open(&root).unwrap();
    fs::write(files.path().join("outside"), "secret").unwrap();
    symlink(files.path(), root.join("link")).unwrap();
    for key in [
        "../outside",
        "a/../../outside",
        "link/outside",
        "./outside",
        "/outside",
    ] {
        if let Some(key) = Key::new(key) {
            assert!(store.head(&key).await.is_err(), "{key}");
        }
    }
}

#[test]
fn queue() {
    let Some(example) = Example::start(example("queue")) else {
        return;
    };
    fs::write(example.path("up"), "content").unwrap();
    fs::write(example.path("large"), vec![1; 12 * MIB]).unwrap();
    example.do_sftp(
        "guest",
        "guest",
        "put up first/a\nput large first/b\nput up c\nput up later/d\n\
         put up first/e.partial\nrename first/e.partial first/e\n\
         put up later/f.partial\nrename later/f.partial later/f",
    );
    // Queued before `sftp` had its answers, and printed by another task.
    let expected = [
        "job: guest/first/a",
        "job: guest/first/b",
        "job: /later/d",
        "job: guest/first/e",
        "job: /later/f",
    ];
    for job in expected {
        wait_until(job, || example.line(job).is_some());
    }
    let printed = example.printed.lock().unwrap();
    let jobs = printed.iter().filter(|line| line.starts_with("job: "));
    assert_eq!(jobs.collect::<Vec<_>>(), expected);
}

#[test]
fn database_auth() {
    let dir = tempfile::tempdir().unwrap();
    let database = dir.path().join("users.db");
    for user in [
        ["alice", "secret", "127.0.0.0/8"],
        ["bob", "secret", "192.0.2.0/24"],
    ] {
        let mut command = example("database_auth");
        let added = Ran::new(command.arg(&database).arg("add").args(user), "");
        assert!(added.succeeded(), "{added}");
    }
    let mut command = example("database_auth");
    command.arg(&database);
    let Some(example) = Example::start(command) else {
        return;
    };
    example.put_and_get("alice", "secret", 1000);
    for (user, password) in [("alice", "wrong"), ("bob", "secret"), ("eve", "secret")] {
        assert!(example.sftp(user, password, "ls").failed(), "{user}");
    }
}

#[cfg(feature = "cli")]
#[test]
fn metrics() {
    let Some(mut example) = Example::start(example("metrics")) else {
        return;
    };
    fs::write(example.path("up"), "content").unwrap();
    example.do_sftp("guest", "guest", "put up a.csv\nput up b.csv\nput up c.pdf");
    let id = example.running.0.id().to_string();
    assert!(Ran::new(Command::new("kill").args(["-INT", &id]), "").succeeded());
    assert!(example.running.0.wait().unwrap().success());
    for line in [
        "sftpd_transfers_total{direction=\"upload\",result=\"ok\"} 3",
        "sftpd_transferred_bytes_total{direction=\"upload\",result=\"ok\"} 21",
        "myapp_files_total{ending=\"csv\"} 2",
        "myapp_files_total{ending=\"other\"} 1",
    ] {
        wait_until(line, || example.line(line).is_some());
    }
}

/// The bucket of one tenant is on the S3 of the tests.
#[cfg(all(feature = "s3", feature = "cli"))]
#[test]
fn tenants() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let bucket = runtime.block_on(s3::FakeS3::start());
    let mut command = example("tenants");
    command.envs(bucket.access().variables()).arg(s3::BUCKET);
    let Some(example) = Example::start(command) else {
        return;
    };
    for (name, number) in [("acme", 1), ("globex", 2), ("initech", 3)] {
        fs::write(example.path("up"), name).unwrap();
        example.do_sftp(name, name, "put up file");
        let line = format!("tenant {number}: /file, {} bytes", name.len());
        wait_until(&line, || example.line(&line).is_some());
    }
    for name in ["acme", "globex", "initech"] {
        let listed = example.do_sftp(name, name, "get file down\nls -1");
        assert_eq!(fs::read_to_string(example.path("down")).unwrap(), name);
        assert!(listed.lines().any(|line| line.trim() == "file"), "{listed}");
        assert!(example.sftp(name, "other", "ls").failed());
    }
    assert_eq!(bucket.objects(), ["tenants/1/file"]);
}
