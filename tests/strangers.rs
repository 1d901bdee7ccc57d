//! Those who don't belong: what they are offered, how often they may try, and how much room they take.

// A panic is how a test fails.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod support;

use russh::MethodKind;
use sftpd::server::{Algorithms, Config};
use sftpd::store::memory::MemoryStore;
use std::sync::Arc;
use std::time::Duration;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The lists of algorithms that the server sends to a client of this name, which it says once it has the server's.
async fn offers(server: &Server, name: &str) -> String {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let mut heard = Vec::new();
    while !heard.ends_with(b"\r\n") {
        heard.push(stream.read_u8().await.unwrap());
    }
    assert_eq!(heard, concat!("SSH-2.0-sftpd_", env!("CARGO_PKG_VERSION"), "\r\n").as_bytes());
    stream.write_all(format!("{name}\r\n").as_bytes()).await.unwrap();
    heard.clear();
    // The last of the ten lists but those of languages, which are empty.
    while !String::from_utf8_lossy(&heard).contains("none\0\0\0\x04none") {
        assert!(stream.read_buf(&mut heard).await.unwrap() > 0, "{:?}", String::from_utf8_lossy(&heard));
    }
    // KEXINIT, and not the identification string once more.
    assert_eq!(heard[5], 20, "{:?}", String::from_utf8_lossy(&heard));
    String::from_utf8_lossy(&heard).into_owned()
}

#[tokio::test]
async fn weak_algorithms_are_for_those_who_know_nothing_better() {
    let kinds = [Algorithms::PostQuantum, Algorithms::Modern, Algorithms::Legacy];
    let names = ["SSH-2.0-OpenSSH_9.9", "SSH-2.0-libssh2_1.10.0", "SSH-2.0-JSCH-0.1.54"];
    let mut found = Vec::new();
    for kind in kinds {
        let server = Server::with(Arc::new(MemoryStore::default()), |config| config.algorithms = kind).await;
        for name in names {
            let lists = offers(&server, name).await;
            for always in ["mlkem768x25519-sha256", "kex-strict-s-v00@openssh.com", "hmac-sha2-256-etm@", "aes128-gcm@"]
            {
                assert!(lists.contains(always), "{kind:?} {name}: no {always}");
            }
            for never in ["sha1", "md5", "cbc", "zlib", "3des", "ssh-rsa", "ssh-dss"] {
                assert!(!lists.contains(never), "{kind:?} {name}: {never}");
            }
            let weak = ["curve25519-sha256", "ecdh-sha2-nistp256", "diffie-hellman", "hmac-sha2-512,"];
            found.push(weak.map(|weak| u8::from(lists.contains(weak))));
        }
    }
    let (none, modern, all) = ([0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]);
    assert_eq!(found, [none, none, none, modern, all, all, all, all, all]);
}

/// The algorithms depend on its name, so the server waits for it as long as a login may take.
#[tokio::test]
async fn a_client_may_say_its_name_late_and_in_pieces() {
    let server = Server::start(Arc::new(MemoryStore::default())).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    for piece in ["SSH-", "2.0-JSCH-0.1", ".54\r\n"] {
        // How slow the client is, not how fast the server.
        tokio::time::sleep(Duration::from_millis(150)).await;
        stream.write_all(piece.as_bytes()).await.unwrap();
    }
    let mut heard = Vec::new();
    while !String::from_utf8_lossy(&heard).contains("none\0\0\0\x04none") {
        assert!(stream.read_buf(&mut heard).await.unwrap() > 0, "{:?}", String::from_utf8_lossy(&heard));
    }
    assert!(String::from_utf8_lossy(&heard).contains("diffie-hellman-group14-sha256"));
}

/// What the server says to a client that says this, and nothing after it.
async fn hear(server: &Server, said: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(said).await.unwrap();
    let mut heard = Vec::new();
    // A reset is an end too: not all that was said may have been read.
    let _ = within("the end", stream.read_to_end(&mut heard)).await;
    heard
}

#[tokio::test]
async fn a_client_without_a_name_is_cut() {
    let quick = |config: &mut Config| config.login_timeout = Duration::from_millis(200);
    let server = Server::with(Arc::new(MemoryStore::default()), quick).await;
    let ours = concat!("SSH-2.0-sftpd_", env!("CARGO_PKG_VERSION"), "\r\n").as_bytes();
    for silent in [&b""[..], b"S", b"SSH-2.0-OpenSSH_9.9"] {
        assert_eq!(hear(&server, silent).await, ours);
    }
    let server = Server::start(Arc::new(MemoryStore::default())).await;
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\r\n", b"SSH-1.5-old\r\n", &[b'x'; 255], &[b'\n'; 300], &[0; 4096]]
    {
        let heard = hear(&server, garbage).await;
        assert!(ours.starts_with(&heard), "{:?}", String::from_utf8_lossy(&heard));
    }
    server.client().await;
}

#[tokio::test]
async fn an_address_that_guesses_is_not_heard_for_a_while() {
    let server = Server::start(Arc::new(MemoryStore::default())).await;
    let (client, mut waiting) = (server.client().await, SshClient::connect(&server).await);
    // Seven at once would do; the time that they take is paid off meanwhile.
    for n in 0..12 {
        let Some(mut ssh) = SshClient::try_connect(&server).await else { break };
        for m in 0..5 {
            assert!(!ssh.login(&format!("user{n}{m}"), "guess").await);
        }
    }
    assert!(Client::login_or_refused(&server).await.is_none(), "a new connection");
    assert!(!waiting.login("alice", PASSWORD).await, "one that was there before");
    client.put("/f", b"who is in stays in").await.unwrap();
}

/// OpenSSH's client asks again only for what the server says can go on.
#[tokio::test]
async fn a_typing_error_is_not_the_end() {
    let server = Server::start(Arc::new(MemoryStore::default())).await;
    let mut ssh = SshClient::connect(&server).await;
    for _ in 0..2 {
        let left = ssh.methods_left("alice", "guess").await;
        assert!(left.contains(&MethodKind::Password) && left.contains(&MethodKind::PublicKey), "{left:?}");
    }
    assert!(ssh.login("alice", PASSWORD).await);
}

#[tokio::test]
async fn a_login_that_succeeds_clears_the_address() {
    let server = Server::start(Arc::new(MemoryStore::default())).await;
    for n in 0..20 {
        assert!(Client::login(&server, "alice", "guess").await.is_none());
        if n % 5 == 0 {
            server.client().await;
        }
    }
}

#[tokio::test]
async fn strangers_leave_room_for_those_who_log_in() {
    let server = Server::with(Arc::new(MemoryStore::default()), |config| config.max_sessions = 24).await;
    let inside = [server.client().await, server.client().await];
    let mut strangers = Vec::new();
    for _ in 0..10 {
        strangers.push(TcpStream::connect(server.address).await.unwrap());
    }
    let mut refused = TcpStream::connect(server.address).await.unwrap();
    let mut line = String::new();
    refused.read_to_string(&mut line).await.unwrap();
    assert!(line.contains("try again later"), "{line}");
    inside[0].put("/f", b"x").await.unwrap();
    drop(strangers.pop());
    // The server has yet to hear of it.
    while Client::login_or_refused(&server).await.is_none() {}
    for n in 0..12 {
        assert!(Client::login_or_refused(&server).await.is_some(), "{n}: whoever is in is no stranger");
    }
}

/// Clients try out every key that they have, and paramiko signs with each.
#[tokio::test]
async fn keys_that_fit_nobody_are_no_guesses() {
    let server = Server::start(Arc::new(MemoryStore::default())).await;
    for _ in 0..10 {
        let mut ssh = SshClient::connect(&server).await;
        for _ in 0..3 {
            assert!(!ssh.login_with_new_key("alice").await);
        }
    }
    assert!(Client::login_or_refused(&server).await.is_some());
}
