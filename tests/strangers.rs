//! Those who don't belong: what they are offered, how often they may try, and how much room they take.

// A panic is how a test fails.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use futures_util::future::join_all;
use russh::MethodKind;
use sftpd::server::{Algorithms, Config};
use sftpd::store::memory::MemoryStore;
use sftpd::users::{Access, Account, Auth};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// The lists of algorithms that the server sends to a client of this name, which it says once it has the server's.
async fn offers(server: &Server, name: &str) -> String {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let mut heard = Vec::new();
    while !heard.ends_with(b"\r\n") {
        heard.push(stream.read_u8().await.unwrap());
    }
    assert_eq!(
        heard,
        concat!("SSH-2.0-sftpd_", env!("CARGO_PKG_VERSION"), "\r\n").as_bytes()
    );
    stream
        .write_all(format!("{name}\r\n").as_bytes())
        .await
        .unwrap();
    heard.clear();
    // The last of the ten lists but those of languages, which are empty.
    while !String::from_utf8_lossy(&heard).contains("none\0\0\0\x04none") {
        assert!(
            stream.read_buf(&mut heard).await.unwrap() > 0,
            "{:?}",
            String::from_utf8_lossy(&heard)
        );
    }
    // KEXINIT, and not the identification string once more.
    assert_eq!(heard[5], 20, "{:?}", String::from_utf8_lossy(&heard));
    String::from_utf8_lossy(&heard).into_owned()
}

#[tokio::test]
async fn weak_algorithms_are_for_those_who_know_nothing_better() {
    let kinds = [
        Algorithms::PostQuantum,
        Algorithms::Modern,
        Algorithms::Legacy,
    ];
    let names = [
        "SSH-2.0-OpenSSH_9.9",
        "SSH-2.0-libssh2_1.10.0",
        "SSH-2.0-JSCH-0.1.54",
    ];
    let mut found = Vec::new();
    for kind in kinds {
        let server = Server::with(Arc::new(MemoryStore::default()), |config| {
            config.algorithms = kind
        })
        .await;
        for name in names {
            let lists = offers(&server, name).await;
            for always in [
                "mlkem768x25519-sha256",
                "kex-strict-s-v00@openssh.com",
                "hmac-sha2-256-etm@",
                "aes128-gcm@",
            ] {
                assert!(lists.contains(always), "{kind:?} {name}: no {always}");
            }
            for never in ["sha1", "md5", "cbc", "zlib", "3des", "ssh-rsa", "ssh-dss"] {
                assert!(!lists.contains(never), "{kind:?} {name}: {never}");
            }
            let weak = [
                "curve25519-sha256",
                "ecdh-sha2-nistp256",
                "diffie-hellman",
                "hmac-sha2-512,",
            ];
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
        assert!(
            stream.read_buf(&mut heard).await.unwrap() > 0,
            "{:?}",
            String::from_utf8_lossy(&heard)
        );
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
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"\r\n",
        b"SSH-1.5-old\r\n",
        &[b'x'; 255],
        &[b'\n'; 300],
        &[0; 4096],
    ] {
        let heard = hear(&server, garbage).await;
        assert!(
            ours.starts_with(&heard),
            "{:?}",
            String::from_utf8_lossy(&heard)
        );
    }
    server.client().await;
}

#[tokio::test]
async fn an_address_that_guesses_is_not_heard_for_a_while() {
    let server = Server::start(Arc::new(MemoryStore::default())).await;
    let (client, mut waiting) = (server.client().await, SshClient::connect(&server).await);
    // 20 at once would do; the time that they take is paid off meanwhile.
    for n in 0..12 {
        let mut ssh = SshClient::connect(&server).await;
        for m in 0..5 {
            assert!(!ssh.login(&format!("user{n}{m}"), "guess").await);
        }
    }
    assert!(
        Client::login(&server, "writer", PASSWORD).await.is_none(),
        "a new connection"
    );
    assert!(
        !waiting.login("reader", PASSWORD).await,
        "one that was there before"
    );
    assert!(
        Client::login_or_refused(&server).await.is_some(),
        "alice has logged in from there before"
    );
    client.put("/f", b"who is in stays in").await.unwrap();
}

/// Counts the passwords that are looked at, of which each takes a while.
#[derive(Default)]
struct CountingAuth(AtomicUsize);

#[async_trait::async_trait]
impl Auth for CountingAuth {
    async fn public_key(&self, _user: &str, _key: &ssh_key::PublicKey) -> Option<Account> {
        None
    }

    async fn password(&self, user: &str, password: &str) -> Option<Account> {
        self.0.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(20)).await;
        let account = Account {
            name: user.to_owned(),
            home: "alice/".to_owned(),
            access: Access::ReadWrite,
        };
        if password == PASSWORD {
            Some(account)
        } else {
            None
        }
    }
}

async fn counting_server() -> (Server, Arc<CountingAuth>) {
    let auth = Arc::new(CountingAuth::default());
    let config_auth = auth.clone();
    let server = Server::with(Arc::new(MemoryStore::default()), |config| {
        config.auth = config_auth
    })
    .await;
    (server, auth)
}

/// How many of these logins, all at once, succeed.
async fn log_in_at_once(server: &Server, logins: Vec<(String, String)>) -> usize {
    let mut clients = Vec::new();
    for _ in &logins {
        clients.push(SshClient::connect(server).await);
    }
    let attempts = clients
        .iter_mut()
        .zip(&logins)
        .map(|(client, (user, password))| client.login(user, password));
    within("logins", join_all(attempts))
        .await
        .into_iter()
        .filter(|succeeded| *succeeded)
        .count()
}

#[tokio::test]
async fn guesses_side_by_side_are_no_cheaper_than_guesses_in_a_row() {
    let (server, auth) = counting_server().await;
    let guesses = (0..100)
        .map(|n| ("alice".to_owned(), format!("guess{n}")))
        .collect();
    assert_eq!(log_in_at_once(&server, guesses).await, 0);
    let checked = auth.0.load(Ordering::Relaxed);
    assert!((7..=8).contains(&checked), "{checked}");
    let names = (0..100)
        .map(|n| (format!("user{n}"), "guess".to_owned()))
        .collect();
    assert_eq!(log_in_at_once(&server, names).await, 0);
    let checked = auth.0.load(Ordering::Relaxed);
    assert!((20..=22).contains(&checked), "{checked}");
}

#[tokio::test]
async fn right_passwords_side_by_side_are_all_heard() {
    let (server, _) = counting_server().await;
    let logins = vec![("alice".to_owned(), PASSWORD.to_owned()); 60];
    assert_eq!(log_in_at_once(&server, logins).await, 60);
}

#[tokio::test]
async fn a_success_pays_only_for_its_own_user() {
    let (server, auth) = counting_server().await;
    let mut guessed = 0;
    for n in 0..100 {
        if n % 5 == 0 {
            assert!(Client::login(&server, "alice", PASSWORD).await.is_some());
            guessed -= 1;
        }
        assert!(
            Client::login(&server, "bob", &format!("guess{n}"))
                .await
                .is_none()
        );
    }
    guessed += auth.0.load(Ordering::Relaxed) as i32;
    // About one more for each minute that this takes.
    assert!((7..=10).contains(&guessed), "{guessed}");
}

/// OpenSSH's client asks again only for what the server says can go on.
#[tokio::test]
async fn a_typing_error_is_not_the_end() {
    let server = Server::start(Arc::new(MemoryStore::default())).await;
    let mut ssh = SshClient::connect(&server).await;
    for _ in 0..2 {
        let left = ssh.methods_left("alice", "guess").await;
        assert!(
            left.contains(&MethodKind::Password) && left.contains(&MethodKind::PublicKey),
            "{left:?}"
        );
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

/// A connection from this address of the loopback network, once the server has said its name or refused it.
async fn connect_from(server: &Server, last_byte: u8) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket
        .bind((Ipv4Addr::new(127, 0, 0, last_byte), 0).into())
        .unwrap();
    let mut stream = socket.connect(server.address).await.unwrap();
    within("a word of the server", stream.read_u8())
        .await
        .unwrap();
    stream
}

#[tokio::test]
async fn idle_connections_from_two_addresses_keep_nobody_out() {
    let server = Server::with(Arc::new(MemoryStore::default()), |config| {
        config.max_sessions = 40
    })
    .await;
    let mut idle = Vec::new();
    for n in 0..40 {
        idle.push(connect_from(&server, 2 + n % 2).await);
    }
    let mut inside = Vec::new();
    for n in 0..15 {
        inside.push(
            Client::login_or_refused(&server)
                .await
                .unwrap_or_else(|| panic!("{n}: no place")),
        );
    }
    inside[0].put("/f", b"x").await.unwrap();
}

#[tokio::test]
async fn strangers_hold_half_of_few_places() {
    let server = Server::with(Arc::new(MemoryStore::default()), |config| {
        config.max_sessions = 10
    })
    .await;
    let mut idle = Vec::new();
    for n in 0..10 {
        idle.push(connect_from(&server, 2 + n % 2).await);
    }
    let mut inside = Vec::new();
    for n in 0..5 {
        inside.push(
            Client::login_or_refused(&server)
                .await
                .unwrap_or_else(|| panic!("{n}: no place")),
        );
    }
    inside[0].put("/f", b"x").await.unwrap();
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
