//! The SFTP libraries that programs are written with, against the real binary over a real S3 wire.
//!
//! Each runs the same errand, a script in `tests/clients`: it logs in with a password and with a
//! key, puts the directory `tree` to `up` and gets it back as `down`, lists and stats what it has
//! put, and then renames, removes, appends, resumes an upload, and checks the status codes and
//! messages of refused requests. The test looks into the bucket.
//!
//! Scripts get the arguments PORT KNOWN_HOSTS KEY PASSWORD. A test whose library isn't installed is
//! skipped and says so; `SFTPD_TEST_ALL_CLIENTS=1` makes that a failure. `.ci/run` installs all of
//! them.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use support::gateway::{Content, Deviation, Files, Gateway, LARGE, script};
use support::{MIB, PASSWORD, noise};

/// Bytes of `tree/large.bin` in `begun`, with which an upload begins that is resumed later.
const BEGUN: usize = 7_000_000;
/// Names that shells, URLs and S3 treat specially.
const ODD_NAMES: [&str; 22] = [
    "two words",
    " leading",
    "trailing ",
    "grüße 日本 🦀",
    "a+b",
    "100%20",
    "%",
    "c#d",
    "q?x=1&y",
    "it's \"quoted\"",
    "[ab]*",
    "~tilde",
    "-dash",
    "semi;colon",
    ".hidden",
    "$HOME",
    "`x`",
    "<&>",
    "a|b",
    "tab\there",
    "e\u{301}",
    "é",
];

/// The files that every errand puts and gets.
fn errand_files(gateway: &Gateway) -> Files {
    let mut files = Files::new();
    files.insert("hello.txt".to_owned(), "hello".into());
    files.insert("empty".to_owned(), "".into());
    files.insert("large.bin".to_owned(), Content(noise(LARGE, 1)));
    files.insert("sub/one".to_owned(), Content(noise(70_000, 2)));
    files.insert("sub/20000".to_owned(), Content(noise(20_000, 3)));
    files.insert("sub/deeper/two".to_owned(), Content(noise(5 * MIB, 4)));
    for name in ODD_NAMES {
        files.insert(format!("odd/{name}"), name.into());
    }
    if !gateway.has(Deviation::NoLongNames) {
        let longest = "n".repeat(255);
        files.insert(format!("odd/{longest}"), longest.as_str().into());
    }
    files
}

/// The files that every errand leaves in the bucket.
fn left_by_errand(files: &Files) -> Files {
    let mut left = files.clone();
    let renamed = left.remove("hello.txt").expect("was put");
    left.insert("renamed".to_owned(), renamed);
    left.remove("sub/one");
    left.insert("notes".to_owned(), "one\ntwo\n".into());
    left.insert("resumed".to_owned(), files["large.bin"].clone());
    left
}

/// Adds the arguments that every script gets.
fn add_login<'a>(gateway: &Gateway, command: &'a mut Command, key: &Path) -> &'a mut Command {
    command
        .arg(gateway.port.to_string())
        .arg(gateway.known_hosts())
        .arg(key)
        .arg(PASSWORD)
}

/// Runs an errand, and compares what it got and what is in the bucket with what it put.
fn run_errand(gateway: &Gateway, mut command: Command, key: &Path) {
    command.current_dir(gateway.path(""));
    let files = errand_files(gateway);
    gateway.write_all("tree", &files);
    gateway.write("begun", &files["large.bin"].0[..BEGUN]);
    gateway.run(add_login(gateway, &mut command, key));
    assert_eq!(gateway.read_all("down"), files);
    assert_eq!(gateway.objects("up/"), left_by_errand(&files));
}

/// Adds a key in the PEM format, which libraries read that are older than OpenSSH's own format.
fn add_pem_key(gateway: &Gateway, name: &str, kind: &[&str]) -> PathBuf {
    gateway.add_key(name, &[kind, &["-m", "PEM"]].concat())
}

// Node: ssh2

fn node(gateway: &Gateway, name: &str) -> Command {
    let mut command = gateway.command("node");
    command.arg(script(name));
    command
}

#[test]
fn ssh2_runs_the_errand() {
    let Some(gateway) = Gateway::start(&["node:ssh2"]) else {
        return;
    };
    run_errand(&gateway, node(&gateway, "ssh2/errand.js"), &gateway.key());
}

/// Uploads one file several times with `fastPut`, one after the other, and compares each object.
///
/// `fastPut` has 64 WRITEs under way, or `concurrency`, in the order in which its reads of the file
/// end.
fn fast_put(gateway: &Gateway, size: usize, count: usize, concurrency: usize) {
    let content = Content(noise(size, (size + concurrency) as u64));
    gateway.write("local", &content.0);
    let mut command = node(gateway, "ssh2/fast_put.js");
    add_login(gateway, &mut command, &gateway.key());
    command.args([
        "local",
        "remote",
        &count.to_string(),
        &concurrency.to_string(),
    ]);
    let failed = gateway.run(&mut command);
    assert_eq!(
        failed, "",
        "of {count} uploads of {size} bytes, concurrency {concurrency}"
    );
    for number in 0..count {
        let name = format!("remote{number}");
        assert_eq!(gateway.object(&name).as_ref(), Some(&content), "{name}");
        gateway.remove_object(&name);
    }
}

/// The default concurrency of `fastPut`.
const DEFAULT: usize = 64;

#[test]
fn ssh2_fast_puts_a_hundred_files_of_several_parts() {
    let Some(gateway) = Gateway::start(&["node:ssh2"]) else {
        return;
    };
    for _ in 0..4 {
        fast_put(&gateway, 6_000_000, 25, DEFAULT);
    }
}

#[test]
fn ssh2_fast_puts_large_files() {
    let Some(gateway) = Gateway::start(&["node:ssh2"]) else {
        return;
    };
    for _ in 0..5 {
        fast_put(&gateway, 100_000_000, 4, DEFAULT);
    }
}

#[test]
fn ssh2_fast_puts_with_other_concurrencies() {
    let Some(gateway) = Gateway::start(&["node:ssh2"]) else {
        return;
    };
    for concurrency in [16, 32, 128] {
        fast_put(&gateway, 7_000_000, 10, concurrency);
    }
    fast_put(&gateway, 100_000_000, 2, 128);
}

#[test]
fn ssh2_sftp_client_puts_and_gets() {
    let Some(gateway) = Gateway::start(&["node:ssh2-sftp-client"]) else {
        return;
    };
    let files = errand_files(&gateway);
    gateway.write_all("tree", &files);
    let mut command = node(&gateway, "ssh2/sftp_client.js");
    gateway.run(add_login(&gateway, &mut command, &gateway.key()));
    assert_eq!(gateway.read_all("down"), files);
    assert_eq!(gateway.objects("up/"), files);
    let large = &files["large.bin"];
    for local in ["stream", "file", "fast"] {
        assert_eq!(&gateway.read(local), large, "{local}");
    }
    let appended = Content::from([&large.0[..], b"end"].concat());
    let left = [("copied", large), ("file", &appended), ("stream", large)];
    assert_eq!(
        gateway.objects("put/"),
        left.map(|(name, content)| (name.to_owned(), content.clone()))
            .into()
    );
}

// Ruby: net-sftp

#[test]
fn net_sftp_runs_the_errand() {
    let Some(gateway) = Gateway::start(&["ruby:net/sftp"]) else {
        return;
    };
    let mut command = gateway.command("ruby");
    command.arg(script("net_sftp_errand.rb"));
    // For ed25519 keys net-ssh needs two more packages.
    let key = add_pem_key(&gateway, "id_ecdsa", &["-t", "ecdsa"]);
    run_errand(&gateway, command, &key);
}

// Go: pkg/sftp

/// Where Debian has the sources of Go's libraries.
const GO_PATH: &str = "/usr/share/gocode";

#[test]
fn pkg_sftp_runs_the_errand() {
    let source = format!("{GO_PATH}/src/github.com/pkg/sftp/client.go");
    let Some(gateway) = Gateway::start(&["go", &source]) else {
        return;
    };
    let program = gateway.path("errand");
    let mut build = gateway.command("go");
    // Without modules, which would be fetched.
    build
        .env("GO111MODULE", "off")
        .env("GOPATH", GO_PATH)
        .env("GOFLAGS", "");
    gateway.run(
        build
            .args(["build", "-o"])
            .arg(&program)
            .arg(script("pkg_sftp_errand.go")),
    );
    run_errand(&gateway, Command::new(&program), &gateway.key());
}

// PHP: phpseclib

#[test]
fn phpseclib_runs_the_errand() {
    let Some(gateway) = Gateway::start(&["php", "/usr/share/php/phpseclib/autoload.php"]) else {
        return;
    };
    let mut command = gateway.command("php");
    command.arg(script("phpseclib_errand.php"));
    // This version reads RSA keys only.
    let key = add_pem_key(&gateway, "id_rsa", &["-t", "rsa", "-b", "3072"]);
    run_errand(&gateway, command, &key);
}

// Java: JSch

const JSCH: &str = "/usr/share/java/jsch.jar";

#[test]
fn jsch_runs_the_errand() {
    let Some(gateway) = Gateway::start(&["javac", JSCH]) else {
        return;
    };
    let mut command = gateway.command("java");
    command.args(["-cp", JSCH]).arg(script("JschErrand.java"));
    // This version signs with RSA keys by SHA-1 only.
    let key = add_pem_key(&gateway, "id_ecdsa", &["-t", "ecdsa"]);
    run_errand(&gateway, command, &key);
}

// C: libssh

#[test]
fn libssh_runs_the_errand() {
    let Some(gateway) = Gateway::start(&["cc", "/usr/include/libssh/sftp.h"]) else {
        return;
    };
    let program = gateway.path("errand");
    let mut build = gateway.command("cc");
    gateway.run(
        build
            .arg("-o")
            .arg(&program)
            .arg(script("libssh_errand.c"))
            .arg("-lssh"),
    );
    run_errand(&gateway, Command::new(&program), &gateway.key());
}

// What docs/clients.md says of tools that compare times

/// Gives the object of a local file other content of the same size, and runs a command: if that
/// content is still there, the file was not sent again.
fn assert_sends_again(gateway: &Gateway, command: &mut Command, expected: bool) {
    gateway.put_object("up/file", "other");
    gateway.run(command);
    let content = if expected { "hello" } else { "other" };
    assert_eq!(
        gateway.object("up/file"),
        Some(content.into()),
        "{command:?}"
    );
}

/// Writes a file that is older than any upload of it.
fn write_old_file(gateway: &Gateway) {
    gateway.write("tree/file", "hello");
    gateway.run(
        gateway
            .command("touch")
            .args(["-d", "2020-01-01", "tree/file"]),
    );
}

#[test]
fn rclone_sends_nothing_twice_with_update_or_size_only() {
    let Some(gateway) = Gateway::start(&["rclone"]) else {
        return;
    };
    let rclone = |args: &[&str]| {
        let mut command = gateway.rclone();
        command.args(args);
        command
    };
    write_old_file(&gateway);
    gateway.run(&mut rclone(&["sync", "tree", ":sftp:up"]));
    gateway.expect_object("up/file", "hello");
    assert_sends_again(
        &gateway,
        &mut rclone(&["sync", "--update", "tree", ":sftp:up"]),
        false,
    );
    assert_sends_again(
        &gateway,
        &mut rclone(&["sync", "--size-only", "tree", ":sftp:up"]),
        false,
    );
    assert_sends_again(
        &gateway,
        &mut rclone(&["sync", "--sftp-set-modtime=false", "tree", ":sftp:up"]),
        true,
    );
    assert_sends_again(&gateway, &mut rclone(&["sync", "tree", ":sftp:up"]), true);
    let bisync = ["bisync", "--size-only", "tree", ":sftp:up"];
    gateway.run(&mut rclone(&[&bisync[..], &["--resync"]].concat()));
    gateway.write("tree/new", "new");
    gateway.put_object("up/theirs", "theirs");
    gateway.run(&mut rclone(&bisync));
    gateway.expect_object("up/new", "new");
    assert_eq!(gateway.read("tree/theirs"), "theirs".into());
}

#[test]
fn lftp_mirror_sends_nothing_twice() {
    let Some(gateway) = Gateway::start(&["lftp"]) else {
        return;
    };
    let mirror = || gateway.lftp("mirror -R --overwrite tree up");
    write_old_file(&gateway);
    gateway.run(&mut mirror());
    gateway.expect_object("up/file", "hello");
    assert_sends_again(&gateway, &mut mirror(), false);
    gateway.write("tree/file", "longer");
    gateway.run(&mut mirror());
    gateway.expect_object("up/file", "longer");
}
