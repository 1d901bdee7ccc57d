//! Clients before their login: which algorithms they are offered, how often they may try, how many
//! may connect.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use futures_util::future::join_all;
use russh::MethodKind;
use sftpd::server::{Algorithms, ServerBuilder};
use sftpd::store::memory::MemoryStore;
use sftpd::users::{Access, Attempt, Auth, Login};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::server::{account, has_password};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// The identification string of the server.
const SERVER_NAME: &str = concat!("SSH-2.0-sftpd_", env!("CARGO_PKG_VERSION"), "\r\n");

/// Reads the lists of algorithms that the server sends next.
async fn read_algorithms(stream: &mut TcpStream) -> Vec<u8> {
    let mut heard = Vec::new();
    // The last of the ten lists that is not empty; those of languages follow.
    while !String::from_utf8_lossy(&heard).contains("none\0\0\0\x04none") {
        let read = within("the algorithms", stream.read_buf(&mut heard)).await;
        let text = String::from_utf8_lossy(&heard);
        assert!(read.unwrap() > 0, "{text:?}");
    }
    heard
}

/// The lists of algorithms that the server sends to a client with this identification string, which
/// the client sends after the server's.
async fn offered_algorithms(server: &Server, name: &str) -> String {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let mut greeting = vec![0; SERVER_NAME.len()];
    let greeted = within("the greeting", stream.read_exact(&mut greeting)).await;
    greeted.unwrap();
    assert_eq!(greeting, SERVER_NAME.as_bytes());
    stream
        .write_all(format!("{name}\r\n").as_bytes())
        .await
        .unwrap();
    let heard = read_algorithms(&mut stream).await;
    let text = String::from_utf8_lossy(&heard).into_owned();
    // KEXINIT, and not the identification string once more.
    assert_eq!(heard[5], 20, "{text:?}");
    text
}

#[tokio::test]
async fn weak_algorithms_are_offered_only_to_clients_that_need_them() {
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
        let server = Server::with(Arc::new(MemoryStore::default()), |builder| {
            builder.algorithms(kind)
        })
        .await;
        for name in names {
            let lists = offered_algorithms(&server, name).await;
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

/// The algorithms depend on the client's identification string, so the server waits for it up to
/// the login timeout.
#[tokio::test]
async fn the_identification_string_may_come_late_and_in_pieces() {
    let server = Server::start(Arc::new(MemoryStore::default())).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    for piece in ["SSH-", "2.0-JSCH-0.1", ".54\r\n"] {
        // This is how slow the client is; the server may take any time.
        tokio::time::sleep(Duration::from_millis(150)).await;
        stream.write_all(piece.as_bytes()).await.unwrap();
    }
    let heard = read_algorithms(&mut stream).await;
    assert!(String::from_utf8_lossy(&heard).contains("diffie-hellman-group14-sha256"));
}

/// Everything that the server sends to a client that sends this and nothing else.
async fn hear(server: &Server, said: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(said).await.unwrap();
    let mut heard = Vec::new();
    // The end may be a reset: the server need not have read all that was sent.
    let _ = within("the end", stream.read_to_end(&mut heard)).await;
    heard
}

#[tokio::test]
async fn a_client_without_an_identification_string_is_disconnected() {
    let quick = |builder: ServerBuilder| builder.login_timeout(Duration::from_millis(200));
    let server = Server::with(Arc::new(MemoryStore::default()), quick).await;
    let ours = SERVER_NAME.as_bytes();
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
async fn an_address_with_many_failed_logins_is_refused_for_a_while() {
    let server = Server::start(Arc::new(MemoryStore::default())).await;
    let (client, mut waiting) = (
        server.client().await,
        SshClient::connect(server.address).await,
    );
    // 20 at once would be enough, but the penalty shrinks while they run.
    for n in 0..12 {
        let mut ssh = SshClient::connect(server.address).await;
        for m in 0..5 {
            assert!(!ssh.login(&format!("user{n}{m}"), "guess").await);
        }
    }
    assert!(
        Client::login(server.address, "writer", PASSWORD)
            .await
            .is_none(),
        "a new connection"
    );
    assert!(
        !waiting.login("reader", PASSWORD).await,
        "one that was there before"
    );
    assert!(
        Client::try_connect(server.address).await.is_some(),
        "alice has logged in from there before"
    );
    client.put("/f", b"sessions go on").await.unwrap();
}

/// Counts the passwords that are checked; each check takes a while.
#[derive(Default)]
struct CountingAuth(AtomicUsize);

#[async_trait::async_trait]
impl Auth for CountingAuth {
    async fn login(&self, attempt: Attempt) -> Login {
        self.0.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(20)).await;
        if has_password(&attempt) {
            Login::Accept(account(&attempt.user, "alice", Access::ReadWrite))
        } else {
            Login::Refuse
        }
    }
}

async fn counting_server() -> (Server, Arc<CountingAuth>) {
    let auth = Arc::new(CountingAuth::default());
    let store = Arc::new(MemoryStore::default());
    let server = Server::with_auth(store, auth.clone()).await;
    (server, auth)
}

/// Tries these logins all at once; how many succeed.
async fn log_in_at_once(server: &Server, logins: Vec<(String, String)>) -> usize {
    let mut clients = Vec::new();
    for _ in &logins {
        clients.push(SshClient::connect(server.address).await);
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
async fn concurrent_password_guesses_are_limited_like_successive_ones() {
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
async fn concurrent_logins_with_the_right_password_all_succeed() {
    let (server, _) = counting_server().await;
    let logins = vec![("alice".to_owned(), PASSWORD.to_owned()); 60];
    assert_eq!(log_in_at_once(&server, logins).await, 60);
}

#[tokio::test]
async fn a_login_clears_the_penalties_of_its_own_user_only() {
    let (server, auth) = counting_server().await;
    let mut guessed = 0;
    for n in 0..100 {
        if n % 5 == 0 {
            assert!(
                Client::login(server.address, "alice", PASSWORD)
                    .await
                    .is_some()
            );
            guessed -= 1;
        }
        assert!(
            Client::login(server.address, "bob", &format!("guess{n}"))
                .await
                .is_none()
        );
    }
    guessed += auth.0.load(Ordering::Relaxed) as i32;
    // About one more for each minute that this takes.
    assert!((7..=10).contains(&guessed), "{guessed}");
}

/// OpenSSH's client tries only the methods again that the server says can continue.
#[tokio::test]
async fn a_mistyped_password_can_be_tried_again() {
    let server = Server::start(Arc::new(MemoryStore::default())).await;
    let mut ssh = SshClient::connect(server.address).await;
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
async fn a_login_clears_the_penalties_of_its_address() {
    let server = Server::start(Arc::new(MemoryStore::default())).await;
    for n in 0..20 {
        assert!(
            Client::login(server.address, "alice", "guess")
                .await
                .is_none()
        );
        if n % 5 == 0 {
            server.client().await;
        }
    }
}

/// A connection from this address of the loopback network, once the server has greeted or refused
/// it.
async fn connect_from(server: &Server, last_byte: u8) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket
        .bind((Ipv4Addr::new(127, 0, 0, last_byte), 0).into())
        .unwrap();
    let mut stream = socket.connect(server.address).await.unwrap();
    within("the greeting", stream.read_u8()).await.unwrap();
    stream
}

/// Fills all places with connections that never log in, from two addresses, and then logs in from
/// another one this many times.
async fn log_in_beside_idle_connections(places: usize, logins: usize) {
    let server = Server::with(Arc::new(MemoryStore::default()), |builder| {
        builder.max_sessions(places)
    })
    .await;
    let mut idle = Vec::new();
    for last_byte in [2, 3].into_iter().cycle().take(places) {
        idle.push(connect_from(&server, last_byte).await);
    }
    let mut clients = Vec::new();
    for user in ["alice", "writer", "reader"]
        .into_iter()
        .cycle()
        .take(logins)
    {
        clients.push(server.client_as(user).await);
    }
    clients[0].put("/f", b"x").await.unwrap();
}

#[tokio::test]
async fn idle_connections_from_two_addresses_do_not_block_other_addresses() {
    log_in_beside_idle_connections(40, 15).await;
}

#[tokio::test]
async fn connections_without_a_login_take_at_most_half_of_few_places() {
    log_in_beside_idle_connections(10, 5).await;
}

/// Clients try every key that they have, and paramiko signs with each.
#[tokio::test]
async fn unknown_keys_do_not_count_as_failed_logins() {
    let server = Server::start(Arc::new(MemoryStore::default())).await;
    for _ in 0..10 {
        let mut ssh = SshClient::connect(server.address).await;
        for _ in 0..3 {
            assert!(!ssh.login_with_new_key("alice").await);
        }
    }
    assert!(Client::try_connect(server.address).await.is_some());
}
