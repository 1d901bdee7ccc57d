//! Clients whose logins are unusual: old ones, and ones with several credentials.
//!
//! A test whose client isn't installed is skipped and says so; `SFTPD_TEST_ALL_CLIENTS=1` makes
//! that a failure.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use std::fs;
use std::path::PathBuf;
use support::commands::Running;
use support::gateway::{Content, Gateway, HOST, script};
use support::wait::wait_until;
use support::{PASSWORD, noise};

/// Several packets, in bytes.
const SIZE: usize = 300_000;

/// Runs a client that puts a file and gets it back. Its arguments: `before`, the port, known_hosts,
/// the credential, and the names of the files.
fn put_and_get(gateway: &Gateway, program: &str, before: &[&str], credential: &[&str], name: &str) {
    let bytes = noise(SIZE, 1);
    gateway.write("file", &bytes);
    let mut client = gateway.command(program);
    client
        .args(before)
        .arg(gateway.port.to_string())
        .arg(gateway.known_hosts())
        .args(credential);
    gateway.run(client.args(["file", name, "back"]));
    gateway.expect_object(name, &bytes);
    assert_eq!(gateway.read("back"), Content(bytes));
    fs::remove_file(gateway.path("back")).unwrap();
}

// OpenSSH's client offers each key that it has.

#[test]
fn refused_keys_leave_a_line_with_their_fingerprints_and_the_reason() {
    let Some(gateway) = Gateway::start(&["ssh", "ssh-keygen"]) else {
        return;
    };
    let (home, _) = home_with_unknown_key(&gateway, false);
    let key = home.join(".ssh/id_ed25519");
    let mut show = gateway.command("ssh-keygen");
    let shown = gateway.run(show.arg("-lf").arg(&key));
    let fingerprint = shown.split(' ').nth(1).unwrap();
    for (user, reason) in [
        ("alice", "the user has no such key or password"),
        ("nobody", "there is no such user"),
    ] {
        let known_hosts = format!("UserKnownHostsFile={}", gateway.known_hosts().display());
        let mut ssh = gateway.command("ssh");
        ssh.args([
            "-F",
            "none",
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "BatchMode=yes",
        ]);
        ssh.arg("-o").arg(known_hosts).arg("-i").arg(&key);
        ssh.args(["-p", &gateway.port.to_string()]);
        ssh.args(["-s", &format!("{user}@127.0.0.1"), "sftp"]);
        gateway.refused(&mut ssh);
        let line = format!("no login: user \"{user}\", key {fingerprint}");
        wait_until("the line", || gateway.said(&line).is_some());
        let said = gateway.said(&line).unwrap();
        assert!(said.contains(reason), "{said}");
        assert!(said.contains("(SSH-2.0-OpenSSH_"), "{said}");
    }
}

#[test]
fn a_client_without_a_common_key_exchange_leaves_a_line_that_names_the_flag() {
    let Some(gateway) = Gateway::start(&["ssh"]) else {
        return;
    };
    let mut ssh = gateway.command("ssh");
    ssh.arg("-F").arg(gateway.ssh_config());
    ssh.args(["-o", "KexAlgorithms=diffie-hellman-group14-sha256"]);
    gateway.refused(ssh.args(["-s", HOST, "sftp"]));
    wait_until("the line", || {
        gateway
            .said("no common key exchange: SSH-2.0-OpenSSH_")
            .is_some()
    });
    let said = gateway.said("no common key exchange: ").unwrap();
    assert!(
        said.ends_with("offers diffie-hellman-group14-sha256: --algorithms legacy has one of them"),
        "{said}"
    );
}

// Ruby's Net::SSH has no X25519; with OpenSSL 3 it reads no private keys in OpenSSH's format but
// ed25519.

#[test]
fn net_sftp_logs_in() {
    let Some(gateway) = Gateway::start(&["ruby:net/sftp"]) else {
        return;
    };
    let source = script("net_sftp.rb");
    let key = gateway.add_key("rsa", &["-t", "rsa", "-b", "3072", "-m", "PEM"]);
    let client = [source.to_str().unwrap()];
    put_and_get(&gateway, "ruby", &client, &["password", PASSWORD], "one");
    put_and_get(
        &gateway,
        "ruby",
        &client,
        &["key", key.to_str().unwrap()],
        "two",
    );
}

// JSch 0.1 has no ed25519 host keys, and reads no private keys in OpenSSH's format.

#[test]
fn jsch_logs_in() {
    const JAR: &str = "/usr/share/java/jsch.jar";
    // A runtime alone runs no source.
    let Some(gateway) = Gateway::start(&["java", "javac", JAR]) else {
        return;
    };
    let source = script("Jsch.java");
    let key = gateway.add_key("ecdsa", &["-t", "ecdsa", "-m", "PEM"]);
    let client = ["-cp", JAR, source.to_str().unwrap()];
    put_and_get(&gateway, "java", &client, &["password", PASSWORD], "one");
    put_and_get(
        &gateway,
        "java",
        &client,
        &["key", key.to_str().unwrap()],
        "two",
    );
}

// libssh decides how to sign with an RSA key before its first request.

#[test]
fn libssh_logs_in_with_rsa_ecdsa_and_ed25519_keys() {
    let Some(gateway) = Gateway::start(&["cc", "/usr/include/libssh/sftp.h"]) else {
        return;
    };
    gateway.run(
        gateway
            .command("cc")
            .args(["-Wall", "-Wextra", "-Werror", "-o", "client"])
            .arg(script("libssh.c"))
            .arg("-lssh"),
    );
    let client = gateway.path("client");
    let keys = [
        gateway.add_key("rsa", &["-t", "rsa", "-b", "3072"]),
        gateway.add_key("ecdsa", &["-t", "ecdsa"]),
        gateway.key(),
    ];
    for (key, name) in keys.iter().zip(["rsa", "ecdsa", "ed25519"]) {
        put_and_get(
            &gateway,
            client.to_str().unwrap(),
            &[],
            &[key.to_str().unwrap()],
            name,
        );
    }
}

// paramiko repeats SERVICE_REQUEST before each credential.

/// `sys.argv[4]` is a password, and below `sys.argv[5]` paramiko looks for other credentials. It
/// waits for an answer longer than a test may take.
const PARAMIKO: &str = r#"
import logging, os, sys, paramiko
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
port, known_hosts, key, how, home = sys.argv[1:6]
os.environ["HOME"] = home
os.environ["SSH_AUTH_SOCK"] = os.path.join(home, "agent")
def connect(**options):
    client = paramiko.SSHClient()
    client.load_host_keys(known_hosts)
    client.connect("127.0.0.1", int(port), "alice", auth_timeout=600, **options)
    sftp = client.open_sftp()
    with sftp.open("file", "w") as file: file.write("hello")
    client.close()
def connect_refused(**options):
    try: connect(**options)
    except paramiko.AuthenticationException as error: print("refused:", error)
    else: raise AssertionError("logged in")
"#;

/// Makes a home directory with a key that no user has, in `.ssh` or in an agent, which ends when
/// dropped.
fn home_with_unknown_key(gateway: &Gateway, in_agent: bool) -> (PathBuf, Option<Running>) {
    let home = gateway.path(if in_agent { "with-agent" } else { "with-key" });
    fs::create_dir_all(home.join(".ssh")).unwrap();
    let key = home.join(if in_agent { "key" } else { ".ssh/id_ed25519" });
    gateway.run(
        gateway
            .command("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(&key),
    );
    if !in_agent {
        return (home, None);
    }
    let socket = home.join("agent");
    let mut agent = gateway.command("ssh-agent");
    let running = Running::spawn_quietly(agent.arg("-D").arg("-a").arg(&socket));
    wait_until("the agent listens", || socket.exists());
    gateway.run(
        gateway
            .command("ssh-add")
            .arg("-q")
            .arg(&key)
            .env("SSH_AUTH_SOCK", &socket),
    );
    (home, Some(running))
}

#[test]
fn paramiko_is_told_that_it_has_one_credential_a_connection() {
    let Some(gateway) = Gateway::start(&["python3:paramiko", "ssh-agent", "ssh-add"]) else {
        return;
    };
    for in_agent in [false, true] {
        let (home, _agent) = home_with_unknown_key(&gateway, in_agent);
        let before = gateway.log().matches("one credential a connection").count();
        // More often than an address may try passwords.
        let script = format!(
            "{PARAMIKO}for _ in range(20): connect_refused(password=how)\n\
             connect(password=how, look_for_keys=False, allow_agent=False)\n\
             connect(key_filename=key, look_for_keys=False, allow_agent=False)\n"
        );
        let said = gateway.run(&mut gateway.python(&script, &[PASSWORD, home.to_str().unwrap()]));
        assert!(
            said.contains("look_for_keys=False and allow_agent=False"),
            "{said}"
        );
        let told = gateway.log().matches("one credential a connection").count() - before;
        assert_eq!(told, 20, "{}", gateway.log());
    }
    gateway.expect_object("file", "hello");
}

/// The transport of paramiko that requests the service once can go on, like every other client.
#[test]
fn paramiko_that_requests_the_service_once_may_try_several_credentials() {
    let Some(gateway) = Gateway::start(&["python3:paramiko"]) else {
        return;
    };
    let (home, _) = home_with_unknown_key(&gateway, false);
    let script = format!(
        r#"{PARAMIKO}
from paramiko.transport import ServiceRequestingTransport
stranger = paramiko.Ed25519Key.from_private_key_file(os.path.join(home, ".ssh", "id_ed25519"))
transport = ServiceRequestingTransport(("127.0.0.1", int(port)))
transport.start_client()
for refused in (lambda: transport.auth_publickey("alice", stranger), lambda: transport.auth_password("alice", "wrong")):
    try: refused()
    except paramiko.AuthenticationException: pass
    else: raise AssertionError("logged in")
transport.auth_password("alice", how)
assert transport.open_sftp_client().listdir(".") == []
transport.close()
"#
    );
    gateway.run(&mut gateway.python(&script, &[PASSWORD, home.to_str().unwrap()]));
}

#[test]
fn paramiko_is_refused_after_several_wrong_passwords() {
    let Some(gateway) = Gateway::start(&["python3:paramiko"]) else {
        return;
    };
    let script = format!(
        r#"{PARAMIKO}
for n in range(12):
    try: connect(password=how + str(n), look_for_keys=False, allow_agent=False)
    except paramiko.SSHException as error: print("refused:", error)
"#
    );
    let said =
        gateway.run(&mut gateway.python(&script, &["guess", gateway.path("").to_str().unwrap()]));
    assert_eq!(said.matches("refused: ").count(), 12, "{said}");
    let log = gateway.log();
    assert!(
        log.contains(
            "login not looked at: user \"alice\", password: too many failed logins of this user"
        ),
        "{log}"
    );
}
