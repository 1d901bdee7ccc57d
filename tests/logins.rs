//! Clients that log in in ways of their own: old ones, and ones with several credentials.
//!
//! A client that isn't installed is skipped, with a word; `SFTPD_TEST_ALL_CLIENTS=1` makes that a failure.

// A panic is how a test fails, in its helpers too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "support/process.rs"]
mod process;
#[path = "support/s3.rs"]
mod s3;

use process::*;
use std::fs;
use std::path::{Path, PathBuf};

/// Several packets, and no more.
const SIZE: usize = 300_000;

/// The source of a client.
fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(name)
}

/// Runs a client that puts a file and gets it back; what it is called with begins with the port and known_hosts.
fn put_and_get(gateway: &Gateway, program: &str, before: &[&str], credential: &[&str], name: &str) {
    let bytes = noise(SIZE, 1);
    gateway.write("file", &bytes);
    let mut client = gateway.command(program);
    client.args(before).arg(gateway.port.to_string()).arg(gateway.known_hosts()).args(credential);
    gateway.run(client.args(["file", name, "back"]));
    gateway.expect_object(name, &bytes);
    assert_eq!(gateway.read("back"), Content(bytes));
    fs::remove_file(gateway.path("back")).unwrap();
}

// Net::SSH of Ruby has no X25519; with OpenSSL 3 it reads no private keys in OpenSSH's format but ed25519.

#[test]
fn net_sftp_logs_in() {
    let Some(gateway) = Gateway::start(&["ruby:net/sftp"]) else { return };
    let source = source("net_sftp.rb");
    let key = gateway.add_key("rsa", &["-t", "rsa", "-b", "3072", "-m", "PEM"]);
    let client = [source.to_str().unwrap()];
    put_and_get(&gateway, "ruby", &client, &["password", PASSWORD], "one");
    put_and_get(&gateway, "ruby", &client, &["key", key.to_str().unwrap()], "two");
}

// JSch 0.1 has no ed25519 host keys, and reads no private keys in OpenSSH's format.

#[test]
fn jsch_logs_in() {
    const JAR: &str = "/usr/share/java/jsch.jar";
    let Some(gateway) = Gateway::start(&["java", JAR]) else { return };
    let source = source("Jsch.java");
    let key = gateway.add_key("ecdsa", &["-t", "ecdsa", "-m", "PEM"]);
    let client = ["-cp", JAR, source.to_str().unwrap()];
    put_and_get(&gateway, "java", &client, &["password", PASSWORD], "one");
    put_and_get(&gateway, "java", &client, &["key", key.to_str().unwrap()], "two");
}

// libssh decides how to sign with an RSA key before its first request.

#[test]
fn libssh_logs_in_with_any_key_at_once() {
    let Some(gateway) = Gateway::start(&["cc", "/usr/include/libssh/sftp.h"]) else { return };
    gateway.run(
        gateway
            .command("cc")
            .args(["-Wall", "-Wextra", "-Werror", "-o", "client"])
            .arg(source("libssh.c"))
            .arg("-lssh"),
    );
    let client = gateway.path("client");
    let keys = [
        gateway.add_key("rsa", &["-t", "rsa", "-b", "3072"]),
        gateway.add_key("ecdsa", &["-t", "ecdsa"]),
        gateway.key(),
    ];
    for (key, name) in keys.iter().zip(["rsa", "ecdsa", "ed25519"]) {
        put_and_get(&gateway, client.to_str().unwrap(), &[], &[key.to_str().unwrap()], name);
    }
}
