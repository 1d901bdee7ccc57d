//! What listeners are told: every event once, after the fact, with whom it is about.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use russh::keys::Algorithm;
use russh::{Preferred, cipher, kex, mac};
use russh_sftp::protocol::FileAttributes;
use sftpd::events::{Event, Events, TransferResult, Who};
use sftpd::store::memory::MemoryStore;
use sftpd::users::{Account, Attempt, Login, Proof, Refusal};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::server::has_password;
use support::{Client, MIB, PASSWORD, PUT, Server, SshClient, eventually};

/// Keeps all that it is told.
#[derive(Default)]
struct Recorder(Mutex<Vec<(Who, Event)>>);

impl Events for Recorder {
    fn event(&self, who: &Who, event: &Event) {
        self.0.lock().unwrap().push((who.clone(), event.clone()));
    }
}

impl Recorder {
    fn told(&self) -> Vec<(Who, Event)> {
        self.0.lock().unwrap().clone()
    }

    /// The events so far, without what differs from run to run.
    fn texts(&self) -> Vec<String> {
        self.told().iter().map(|(_, event)| text(event)).collect()
    }

    async fn wait_for(&self, expected: &str) {
        eventually(expected, || {
            self.texts().iter().any(|text| text == expected)
        })
        .await;
    }
}

fn text(event: &Event) -> String {
    match event {
        Event::ServerStarted { address, .. } => format!("started {}", address.is_some()),
        Event::ConnectionEnded { reason, .. } => format!("connection ended: {reason:?}"),
        Event::SessionEnded { reason, .. } => format!("session ended: {reason:?}"),
        Event::Opened {
            path,
            read,
            write,
            truncate,
            declared_size,
            ..
        } => format!("opened {path} {read} {write} {truncate} {declared_size:?}"),
        Event::Read(read) => {
            let (bytes, size, requests) = (read.bytes, read.size, read.requests);
            assert!(!read.etag.is_empty());
            format!(
                "read {} {bytes}/{size} {requests} {:?}",
                read.path, read.result
            )
        }
        Event::Written(written) => {
            let (bytes, parts, result) = (written.bytes, written.parts, written.result);
            assert_eq!(written.etag.is_some(), result == TransferResult::Ok);
            let declared = written.declared_size;
            format!(
                "written {} {bytes} {parts} {result:?} {declared:?}",
                written.path
            )
        }
        Event::NoLogin(told) => {
            let (name, keys, passwords) = (&told.name, told.keys.len(), told.passwords);
            assert!(told.keys.iter().all(|key| key.starts_with("SHA256:")));
            format!("no login {name:?} {keys} {passwords} {:?}", told.reason)
        }
        Event::NoCommonAlgorithm(told) => {
            assert!(told.client.as_ref().unwrap().starts_with("SSH-2.0-russh"));
            format!(
                "no common {:?} {:?} {:?}",
                told.kind, told.offered, told.algorithms
            )
        }
        Event::Renamed {
            from, to, replaced, ..
        } => format!("renamed {from} to {to} {replaced}"),
        other => other.to_string(),
    }
}

async fn start(listeners: Vec<Arc<dyn Events>>) -> Server {
    let store = Arc::new(MemoryStore::default());
    Server::with(store, |builder| builder.listeners(listeners)).await
}

#[tokio::test]
async fn every_event_is_told_once_and_in_order() {
    let recorder = Arc::new(Recorder::default());
    let server = start(vec![recorder.clone()]).await;
    assert!(
        Client::login(server.address, "alice", "wrong")
            .await
            .is_none()
    );
    recorder.wait_for("connection ended: Closed").await;
    let client = server.client().await;
    client.mkdir("/d").await.unwrap();
    client.put("/d/f", b"hello").await.unwrap();
    client.get("/d/f").await.unwrap();
    recorder.wait_for("read /d/f 5/5 1 Ok").await;
    assert_eq!(client.list("/d").await.unwrap().len(), 1);
    client.sftp.rename("/d/f", "/g").await.unwrap();
    client.put("/h", b"").await.unwrap();
    client.posix_rename("/g", "/h").await.unwrap();
    client.sftp.rmdir("/d").await.unwrap();
    client.sftp.remove("/h").await.unwrap();
    assert!(client.sftp.remove("/h").await.is_err());
    assert!(client.sftp.stat("/h").await.is_err());
    let handle = client.open("/cut", PUT).await.unwrap();
    client.write(&handle, 0, &[7; 10]).await.unwrap();
    drop(client);
    recorder.wait_for("connection ended: Closed").await;
    eventually("both connections end", || {
        recorder
            .texts()
            .iter()
            .filter(|text| text.starts_with("connection ended"))
            .count()
            == 2
    })
    .await;
    eventually("the upload ends", || {
        recorder
            .texts()
            .iter()
            .any(|text| text.starts_with("written /cut"))
    })
    .await;
    server.drain.cancel();
    recorder.wait_for("stopped").await;
    let mut texts = recorder.texts();
    // The upload's own task tells how it ended, and the session's how that did.
    let end = texts.len() - 4;
    texts[end..].sort();
    assert_eq!(
        texts,
        [
            "started true",
            "connected",
            "login failed: user \"alice\", password",
            "no login Some(\"alice\") 0 1 Wrong",
            "connection ended: Closed",
            "connected",
            "logged in with password",
            "session started",
            "mkdir \"/d\"",
            "opened /d/f false true true None",
            "written /d/f 5 0 Ok None",
            "opened /d/f true false false None",
            "read /d/f 5/5 1 Ok",
            "list \"/d\" 1 entry",
            "renamed /d/f to /g false",
            "opened /h false true true None",
            "written /h 0 0 Ok None",
            "renamed /g to /h true",
            "rmdir \"/d\"",
            "remove \"/h\"",
            "remove \"/h\" failed: No such file",
            "opened /cut false true true None",
            "connection ended: Closed",
            "session ended: Closed",
            "stopped",
            "written /cut 10 0 CutOff None",
        ]
    );
}

#[tokio::test]
async fn who_tells_connections_apart_and_sequence_numbers_grow() {
    let recorder = Arc::new(Recorder::default());
    let server = start(vec![recorder.clone()]).await;
    let alice = server.client().await;
    let reader = server.client_as("reader").await;
    alice.put("/a", b"a").await.unwrap();
    reader.get("/a").await.unwrap();
    alice.sftp.remove("/a").await.unwrap();
    recorder.wait_for("read /a 1/1 1 Ok").await;
    let told = recorder.told();
    let sequences: Vec<u64> = told.iter().map(|(who, _)| who.sequence).collect();
    let distinct: BTreeSet<u64> = sequences.iter().copied().collect();
    assert_eq!(distinct, (1..=told.len() as u64).collect());
    let mut peers = BTreeSet::new();
    for (who, event) in &told {
        let user = who.account.as_ref().map(|account| account.name.as_str());
        let expected = match event {
            Event::ServerStarted { .. } => (0, None),
            Event::ConnectionOpened => (who.connection, None),
            Event::Written(_) | Event::Removed { .. } => (1, Some("alice")),
            Event::Read(_) => (2, Some("reader")),
            _ if who.connection == 1 => (1, Some("alice")),
            _ => (2, Some("reader")),
        };
        assert_eq!((who.connection, user), expected, "{event}");
        assert_eq!(who.peer.is_some(), who.connection != 0, "{event}");
        peers.insert((who.connection, who.peer));
    }
    assert_eq!(peers.len(), 3, "{peers:?}");
}

#[tokio::test]
async fn events_of_parts_have_the_account_too() {
    let recorder = Arc::new(Recorder::default());
    let server = start(vec![recorder.clone()]).await;
    let client = server.client().await;
    client.put("/large", &vec![1; 12 * MIB]).await.unwrap();
    let handle = client.open("/left", PUT).await.unwrap();
    client.write(&handle, 0, &vec![1; 6 * MIB]).await.unwrap();
    drop(client);
    eventually("the upload is aborted", || {
        recorder
            .told()
            .iter()
            .any(|(_, event)| matches!(event, Event::UploadAborted { .. }))
    })
    .await;
    assert!(
        recorder
            .texts()
            .contains(&"written /large 12582912 3 Ok None".to_owned())
    );
    for (who, event) in recorder.told() {
        if let Event::UploadAborted { key, .. } = event {
            assert_eq!(key, "alice/left");
            assert_eq!(who.account.unwrap().name, "alice");
        }
    }
}

#[tokio::test]
async fn a_path_is_cut_and_a_command_is_told() {
    let recorder = Arc::new(Recorder::default());
    let server = start(vec![recorder.clone()]).await;
    let client = server.client().await;
    let long = "x".repeat(100_000);
    assert!(client.open(&long, PUT).await.is_err());
    let channel = client.ssh.channel().await.unwrap();
    channel.exec(true, "scp -t .").await.unwrap();
    recorder.wait_for("refused the command \"scp -t .\"").await;
    let told = recorder.told();
    let failed = told.iter().find_map(|(_, event)| match event {
        Event::RequestFailed(failed) => Some(failed.clone()),
        _ => None,
    });
    assert_eq!(failed.unwrap().path, "x".repeat(1024));
}

#[tokio::test]
async fn events_carry_the_session_data_of_the_account() {
    let recorder = Arc::new(Recorder::default());
    let listener = recorder.clone();
    let store = Arc::new(MemoryStore::default());
    let login = async |attempt: Attempt| {
        Login::Accept(Account::new(&attempt.user).session(format!("tenant of {}", attempt.user)))
    };
    let builder = sftpd::server::Server::builder(store, login);
    let server = Server::run(builder.listeners(vec![listener])).await;

    let client = server.client_as("bob").await;
    client.put("/f", b"hello").await.unwrap();
    drop(client);
    recorder.wait_for("connection ended: Closed").await;
    let mut count = 0;
    for (who, event) in recorder.told() {
        match &who.account {
            Some(account) => {
                let data: Option<&String> = account.session_as();
                assert_eq!(data.unwrap(), "tenant of bob", "{event}");
                count += 1;
            }
            None => assert!(
                matches!(event, Event::ServerStarted { .. } | Event::ConnectionOpened),
                "{event}"
            ),
        }
    }
    assert!(count >= 5, "{:?}", recorder.texts());
}

#[tokio::test]
async fn a_listener_that_panics_hurts_nobody() {
    let panicking = |_: &Who, _: &Event| panic!("by intention");
    let recorder = Arc::new(Recorder::default());
    let server = start(vec![Arc::new(panicking), recorder.clone()]).await;
    let client = server.client().await;
    client.put("/f", b"hello").await.unwrap();
    assert_eq!(client.get("/f").await.unwrap(), b"hello");
    assert!(
        recorder
            .texts()
            .contains(&"written /f 5 0 Ok None".to_owned())
    );
    assert!(
        SshClient::connect(server.address)
            .await
            .login("alice", PASSWORD)
            .await
    );
}

/// The listener knows the objects by their keys, wherever the home is.
#[tokio::test]
async fn events_have_the_keys_of_objects() {
    let recorder = Arc::new(Recorder::default());
    let auth = async |_: Attempt| Login::Accept(Account::new("alice").home("customers/42"));
    let builder = sftpd::server::Server::builder(Arc::new(MemoryStore::default()), auth);
    let builder = builder
        .prefix("files")
        .listeners(vec![recorder.clone() as Arc<dyn Events>]);
    let server = Server::run(builder).await;
    let client = server.client().await;
    client.mkdir("/d").await.unwrap();
    client.put("/d/f", b"hello").await.unwrap();
    client.get("/d/f").await.unwrap();
    client.sftp.rename("/d", "/e").await.unwrap();
    let attributes = FileAttributes {
        size: Some(0),
        ..FileAttributes::empty()
    };
    client.sftp.setstat("/e/f", attributes).await.unwrap();
    client.sftp.remove("/e/f").await.unwrap();
    let mut keys = Vec::new();
    for (_, event) in recorder.told() {
        match event {
            Event::Written(written) => keys.push(written.key),
            Event::Read(read) => keys.push(read.key),
            Event::Removed { key, .. } | Event::SizeSet { key, .. } => keys.push(key),
            Event::Renamed {
                from_key, to_key, ..
            } => keys.extend([from_key, to_key]),
            _ => {}
        }
    }
    let expected = [
        "files/customers/42/d/f",
        "files/customers/42/d/f",
        "files/customers/42/d",
        "files/customers/42/e",
        "files/customers/42/e/f",
        "files/customers/42/e/f",
    ];
    assert_eq!(keys, expected);
}

/// The users alice, with a password, and bob, who is disabled.
async fn alice_or_bob(attempt: Attempt) -> Login {
    match (attempt.user.as_str(), &attempt.proof) {
        ("alice", Proof::Password(_)) if has_password(&attempt) => {
            Login::Accept(Account::new("alice"))
        }
        ("alice", _) => Login::Refuse,
        ("bob", _) => Login::RefuseBecause(Refusal::Disabled),
        _ => Login::RefuseBecause(Refusal::UnknownUser),
    }
}

/// A server for alice and bob.
async fn start_for_two(recorder: &Arc<Recorder>) -> Server {
    let store = Arc::new(MemoryStore::default());
    let listener: Arc<dyn Events> = recorder.clone();
    let builder = sftpd::server::Server::builder(store, alice_or_bob);
    Server::run(builder.listeners(vec![listener])).await
}

#[tokio::test]
async fn a_connection_without_a_login_is_told_once_with_its_reason() {
    let recorder = Arc::new(Recorder::default());
    let server = start_for_two(&recorder).await;
    let expected = [
        "no login None 0 0 NothingOffered",
        "no login Some(\"alice\") 2 0 Wrong",
        "no login Some(\"alice\") 1 1 Wrong",
        "no login Some(\"bob\") 1 0 Disabled",
        "no login Some(\"carol\") 1 0 UnknownUser",
    ];
    for (n, expected) in expected.into_iter().enumerate() {
        let mut ssh = SshClient::connect(server.address).await;
        let tries: &[&str] = match n {
            0 => &[],
            1 => &["alice", "alice"],
            2 => &["alice"],
            3 => &["bob"],
            _ => &["carol"],
        };
        for user in tries {
            assert!(!ssh.login_with_new_key(user).await);
        }
        if n == 2 {
            assert!(!ssh.login("alice", "wrong").await);
        }
        drop(ssh);
        recorder.wait_for(expected).await;
    }
    let told = recorder.texts();
    let ended = told.iter().filter(|text| text.starts_with("no login"));
    assert_eq!(ended.count(), expected.len());
    // Offers are not told one by one.
    let refused = told.iter().filter(|text| text.starts_with("login failed"));
    assert_eq!(refused.count(), 1, "{told:?}");
}

#[tokio::test]
async fn refused_keys_before_a_login_are_not_told() {
    let recorder = Arc::new(Recorder::default());
    let server = start_for_two(&recorder).await;
    let mut ssh = SshClient::connect(server.address).await;
    assert!(!ssh.login_with_new_key("alice").await);
    assert!(ssh.login("alice", PASSWORD).await);
    drop(ssh);
    recorder.wait_for("connection ended: NoSession").await;
    let expected = [
        "started true",
        "connected",
        "logged in with password",
        "connection ended: NoSession",
    ];
    assert_eq!(recorder.texts(), expected);
}

#[tokio::test]
async fn a_login_that_comes_too_late_is_told() {
    let recorder = Arc::new(Recorder::default());
    let listener: Arc<dyn Events> = recorder.clone();
    let server = Server::with(Arc::new(MemoryStore::default()), |builder| {
        builder
            .login_timeout(Duration::from_millis(300))
            .listeners(vec![listener])
    })
    .await;
    let _silent = tokio::net::TcpStream::connect(server.address).await;
    recorder.wait_for("no login None 0 0 LoginTimeout").await;
}

#[tokio::test]
async fn what_client_and_server_can_not_agree_on_is_told() {
    let ours = || Preferred {
        cipher: Cow::Borrowed(&[cipher::AES_256_CTR]),
        ..Preferred::DEFAULT
    };
    let cases = [
        (
            Preferred {
                kex: Cow::Borrowed(&[kex::DH_G14_SHA256]),
                ..ours()
            },
            "no common KeyExchange [\"diffie-hellman-group14-sha256\"] Some(\"legacy\")",
        ),
        (
            Preferred {
                mac: Cow::Borrowed(&[mac::HMAC_SHA256]),
                ..ours()
            },
            "no common Mac [\"hmac-sha2-256\"] Some(\"legacy\")",
        ),
        (
            Preferred {
                cipher: Cow::Borrowed(&[cipher::AES_256_CBC]),
                ..ours()
            },
            "no common Cipher [\"aes256-cbc\"] None",
        ),
        (
            Preferred {
                key: Cow::Borrowed(&[Algorithm::Rsa { hash: None }]),
                ..ours()
            },
            "no common HostKey [\"ssh-rsa\"] None",
        ),
    ];
    for (preferred, expected) in cases {
        let recorder = Arc::new(Recorder::default());
        let server = start(vec![recorder.clone()]).await;
        let config = russh::client::Config {
            preferred,
            ..russh::client::Config::default()
        };
        let stream = tokio::net::TcpStream::connect(server.address).await;
        let connected = SshClient::over(stream.unwrap(), config).await;
        assert!(connected.is_err());
        recorder
            .wait_for("connection ended: NoCommonAlgorithm")
            .await;
        let told = recorder.texts();
        assert_eq!(told[2], expected);
        assert_eq!(told.len(), 4, "{told:?}");
    }
}
