//! The server around the sessions: logins, limits, how sessions end, and clients that break the
//! rules.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use russh::client::Msg;
use russh::{Channel, ChannelMsg};
use russh_sftp::protocol::{FileAttributes, OpenFlags, StatusCode};
use sftpd::sftp::End;
use sftpd::store::memory::MemoryStore;
use sftpd::users::{Account, Attempt, Auth, Login};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use support::s3::{FakeS3, Fault, When};
use support::server::has_password;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

async fn server_with_memory_store() -> Server {
    Server::start(Arc::new(MemoryStore::default())).await
}

#[tokio::test]
async fn logins_with_a_wrong_name_or_password_are_refused() {
    let server = server_with_memory_store().await;
    for (user, password) in [
        ("alice", "wrong"),
        ("nobody", PASSWORD),
        ("alice", ""),
        ("", PASSWORD),
    ] {
        assert!(
            Client::login(server.address, user, password)
                .await
                .is_none(),
            "{user:?}"
        );
    }
    let mut ssh = SshClient::connect(server.address).await;
    assert!(!ssh.login("alice", "wrong").await);
    assert!(
        ssh.login("alice", PASSWORD).await,
        "a second try may succeed"
    );
}

/// Accepts every user with the right password, each with a home of the same name.
struct AnyUser;

#[async_trait::async_trait]
impl Auth for AnyUser {
    async fn login(&self, attempt: Attempt) -> Login {
        if has_password(&attempt) {
            Login::Accept(Account::new(attempt.user))
        } else {
            Login::Refuse
        }
    }
}

/// A path with long names, so that a limit in bytes is reached soon.
fn long_directory(n: usize) -> String {
    let part = "x".repeat(240);
    format!("/{part}/{part}/{part}/{n:06}")
}

#[tokio::test]
async fn virtual_directories_are_limited_for_each_user() {
    let server = Server::with_auth(Arc::new(MemoryStore::default()), AnyUser).await;
    let (alice, bob) = (server.client().await, server.client_as("bob").await);
    let mut made = 0;
    while alice.mkdir(&long_directory(made)).await.is_ok() {
        made += 1;
        assert!(made < 100_000, "there is no limit");
    }
    assert!(made > 10_000, "{made}");
    bob.mkdir("/d").await.unwrap();
    // Directories that are in S3 need no memory here, and clients see no difference.
    alice
        .put(&format!("{}/f", long_directory(0)), b"x")
        .await
        .unwrap();
    alice.mkdir(&long_directory(made)).await.unwrap();
    assert!(alice.is_dir(&long_directory(0)).await.unwrap());
    assert!(alice.mkdir(&long_directory(made + 1)).await.is_err());
    // A directory whose last file was removed may be forgotten, but not one that was made.
    alice
        .sftp
        .remove(format!("{}/f", long_directory(0)))
        .await
        .unwrap();
    assert!(alice.is_dir(&long_directory(1)).await.unwrap());
}

#[tokio::test]
async fn several_sessions_share_a_connection() {
    let server = server_with_memory_store().await;
    let mut ssh = SshClient::connect(server.address).await;
    assert!(ssh.login("alice", PASSWORD).await);
    let mut sessions = Vec::new();
    for n in 0..10 {
        let sftp = ssh.sftp().await;
        sftp.mkdir(format!("/{n}"), FileAttributes::empty())
            .await
            .unwrap();
        sessions.push(sftp);
    }
    assert!(ssh.channel().await.is_err(), "ten is the limit");
    assert!(sessions[0].stat("/9").await.unwrap().attrs.is_dir());
}

#[tokio::test]
async fn users_do_what_their_access_allows() {
    let s3 = FakeS3::start().await;
    let server = Server::start(s3_store(&s3)).await;
    s3.put("alice/f", "secret");
    let reader = server.client_as("reader").await;
    assert_eq!(reader.get("/f").await.unwrap(), b"secret");
    let size = FileAttributes {
        size: Some(0),
        ..Default::default()
    };
    let denied = [
        code(reader.put("/g", b"").await),
        code(reader.open("/f", OpenFlags::READ | OpenFlags::WRITE).await),
        code(reader.open("/f", OpenFlags::APPEND).await),
        code(reader.sftp.remove("/f").await),
        code(reader.sftp.rename("/f", "/g").await),
        code(reader.posix_rename("/f", "/g").await),
        code(reader.mkdir("/d").await),
        code(reader.sftp.rmdir("/d").await),
        code(reader.sftp.setstat("/f", size).await),
    ];
    assert_eq!(denied, [StatusCode::PermissionDenied; 9]);
    let writer = server.client_as("writer").await;
    writer.put("/g", b"given").await.unwrap();
    assert_eq!(code(writer.get("/f").await), StatusCode::PermissionDenied);
    let handle = writer
        .open("/f", OpenFlags::READ | OpenFlags::WRITE)
        .await
        .unwrap();
    assert_eq!(
        code(writer.sftp.read(&handle, 0, 10).await),
        StatusCode::PermissionDenied
    );
    writer.close(&handle).await.unwrap();
    assert_eq!(writer.list("/").await.unwrap(), ["f 6", "g 5"]);
    assert_eq!(s3.object("alice/f").unwrap(), "secret");
    assert_eq!(s3.objects(), ["alice/f", "alice/g"]);
}

/// Everything that arrives on a channel until it is closed: data, standard error, exit status.
async fn read_channel(mut channel: Channel<Msg>) -> (Vec<u8>, String, Option<u32>) {
    let (mut data, mut errors, mut status) = (Vec::new(), String::new(), None);
    while let Some(message) = channel.wait().await {
        match message {
            ChannelMsg::Data { data: more } => data.extend(more),
            ChannelMsg::ExtendedData { data: more, .. } => {
                errors += &String::from_utf8_lossy(&more)
            }
            ChannelMsg::ExitStatus { exit_status } => status = Some(exit_status),
            _ => {}
        }
    }
    (data, errors, status)
}

#[tokio::test]
async fn shell_and_exec_requests_are_refused_with_a_message() {
    let server = server_with_memory_store().await;
    let mut ssh = SshClient::connect(server.address).await;
    assert!(ssh.login("alice", PASSWORD).await);
    for shell in [true, false] {
        let channel = ssh.channel().await.unwrap();
        channel.set_env(true, "LANG", "C").await.unwrap();
        channel
            .request_pty(true, "xterm", 80, 24, 0, 0, &[])
            .await
            .unwrap();
        if shell {
            channel.request_shell(true).await
        } else {
            channel.exec(true, "scp -t .").await
        }
        .unwrap();
        let (data, errors, status) = within("the refusal", read_channel(channel)).await;
        assert_eq!((data.len(), status), (0, Some(1)));
        assert!(errors.contains("SFTP only"), "{errors}");
    }
}

#[tokio::test]
async fn a_second_subsystem_request_does_not_disturb_the_session() {
    let server = server_with_memory_store().await;
    let mut ssh = SshClient::connect(server.address).await;
    assert!(ssh.login("alice", PASSWORD).await);
    let channel = ssh.channel().await.unwrap();
    for name in ["sftp", "sftp", "netconf"] {
        channel.request_subsystem(true, name).await.unwrap();
    }
    channel.data(&packet(1, 3, &[])[..]).await.unwrap();
    channel.eof().await.unwrap();
    let (data, _, status) = within("the session", read_channel(channel)).await;
    assert_eq!((data[4], status), (2, Some(0)), "VERSION, and a good end");
}

/// A reply: its type, its id, and the rest.
type RawReply = (u8, u32, Vec<u8>);

/// Sends raw bytes after INIT and ends the stream. Returns the replies after VERSION and the exit
/// status.
async fn send_raw(server: &Server, bytes: Vec<u8>) -> (Vec<RawReply>, Option<u32>) {
    let mut ssh = SshClient::connect(server.address).await;
    assert!(ssh.login("alice", PASSWORD).await);
    let channel = ssh.sftp_channel().await;
    channel
        .data(&[packet(1, 3, &[]), bytes].concat()[..])
        .await
        .unwrap();
    let _ = channel.eof().await;
    let (data, _, status) = within("the session", read_channel(channel)).await;
    let mut replies = split_replies(&data);
    replies.remove(0);
    (replies, status)
}

fn split_replies(mut data: &[u8]) -> Vec<RawReply> {
    let mut replies = Vec::new();
    while let Some((length, more)) = data.split_first_chunk::<4>() {
        let (reply, more) = more.split_at(u32::from_be_bytes(*length) as usize);
        let id = u32::from_be_bytes(reply[1..5].try_into().unwrap());
        replies.push((reply[0], id, reply[5..].to_vec()));
        data = more;
    }
    replies
}

#[tokio::test]
async fn every_request_is_answered_once_with_its_id() {
    let server = server_with_memory_store().await;
    let requests = [
        packet(16, 1, &[&text("/a")]),
        packet(99, 2, &[b"unknown type"]),
        packet(101, 3, &[b"a reply"]),
        packet(4, 4, &[&text("no such handle")]),
        packet(4, 5, &[b"malformed"]),
        packet(17, 6, &[&[0, 0, 0, 2, 0xFF, 0xFE]]),
        packet(200, 7, &[&text("unknown@example.com")]),
        packet(200, 8, &[&text("posix-rename@openssh.com"), &[0, 0, 0, 9]]),
        packet(6, 9, &[&text("1"), &[0; 8], &[0, 0, 0, 100]]),
        packet(5, 10, &[&text("1"), &[0; 8], &[0, 0, 0, 100]]),
        packet(20, 11, &[&text("a"), &text("b")]),
        packet(12, 12, &[&text("1")]),
        packet(17, 13, &[&text("/with\0nul")]),
        packet(17, 14, &[&text(&"x".repeat(2000))]),
        packet(3, 15, &[&text("/"), &[0, 0, 0, 26], &[0; 4]]),
    ];
    let (replies, status) = send_raw(&server, requests.concat()).await;
    let codes: Vec<_> = replies
        .iter()
        .map(|(kind, id, rest)| (*kind, *id, rest[3]))
        .collect();
    let want = [8, 8, 4, 5, 2, 8, 5, 5, 4, 8, 4, 2, 4, 4]
        .into_iter()
        .zip(2..)
        .map(|(code, id)| (101, id, code));
    assert_eq!(codes[0].0, 104);
    assert_eq!(codes[1..], want.collect::<Vec<_>>());
    assert_eq!(status, Some(0));
}

/// The status of a request that must fail.
fn failure<T>(result: Result<T, impl Into<Failed>>) -> Failed {
    match result {
        Ok(_) => panic!("it is answered OK"),
        Err(failed) => failed.into(),
    }
}

/// Programs search for the messages of OpenSSH's server.
#[tokio::test]
async fn status_messages_begin_with_those_of_openssh() {
    let server = server_with_memory_store().await;
    let client = server.client().await;
    client.put("/f", b"0123456789").await.unwrap();
    let handle = client.open("/f", OpenFlags::READ).await.unwrap();
    let reader = server.client_as("reader").await;
    let long = format!("/{}", "x".repeat(2000));
    let statuses = [
        failure(client.get("/none").await),
        failure(client.sftp.read(&handle, 10, 1).await),
        failure(reader.put("/f", b"").await),
        failure(client.mkdir("/f").await),
        failure(client.sftp.readlink("/f").await),
        failure(client.sftp.stat("/a\0b").await),
        failure(client.sftp.stat(long).await),
    ];
    let messages = [
        (StatusCode::NoSuchFile, "No such file"),
        (StatusCode::Eof, "End of file"),
        (
            StatusCode::PermissionDenied,
            "Permission denied: this user may only read",
        ),
        (StatusCode::Failure, "Failure: already exists"),
        (
            StatusCode::OpUnsupported,
            "Operation unsupported: S3 has no links",
        ),
        (
            StatusCode::NoSuchFile,
            "No such file: the path is not valid UTF-8 or holds a NUL",
        ),
        (
            StatusCode::Failure,
            "Failure: File name too long: path, home and prefix together have 1,024 bytes at most",
        ),
    ];
    assert_eq!(
        statuses,
        messages.map(|(code, text)| Failed(code, text.to_owned()))
    );
}

/// As OpenSSH's server answers, at every offset.
#[tokio::test]
async fn a_read_of_no_bytes_is_answered_with_no_bytes() {
    let server = server_with_memory_store().await;
    let client = server.client().await;
    client.put("/f", b"0123456789").await.unwrap();
    for flags in [OpenFlags::READ, OpenFlags::READ | OpenFlags::WRITE] {
        let handle = client.open("/f", flags).await.unwrap();
        for offset in [0, 5, 10, 20] {
            assert_eq!(
                client.sftp.read(&handle, offset, 0).await.unwrap().data,
                b""
            );
        }
        client.close(&handle).await.unwrap();
    }
}

#[tokio::test]
async fn a_directory_has_the_same_time_in_each_session() {
    let server = server_with_memory_store().await;
    let client = server.client().await;
    client.put("/d/f", b"").await.unwrap();
    let time = client.sftp.stat("/d").await.unwrap().attrs.mtime;
    assert_eq!(time, Some(0));
    assert_eq!(
        server
            .client()
            .await
            .sftp
            .stat("/d")
            .await
            .unwrap()
            .attrs
            .mtime,
        time
    );
}

/// A client may ask for the size before it has the answer to a WRITE.
#[tokio::test]
async fn sizes_include_the_writes_requested_before() {
    let server = server_with_memory_store().await;
    for append in [0, 4] {
        // OPEN for writing, with CREATE and TRUNCATE or APPEND.
        let open = packet(
            3,
            1,
            &[
                &text("/f"),
                &[0, 0, 0, 0x1A - append / 4 * 0x10 + append],
                &[0; 4],
            ],
        );
        let write = |id, at: u64| {
            packet(
                6,
                id,
                &[&text("1"), &at.to_be_bytes(), &[0, 0, 3, 0xE8], &[7; 1000]],
            )
        };
        let fstat = |id| packet(8, id, &[&text("1")]);
        let truncate = packet(10, 9, &[&text("1"), &[0, 0, 0, 1], &1500u64.to_be_bytes()]);
        let requests = [
            open,
            write(2, 0),
            fstat(3),
            packet(7, 4, &[&text("/f")]),
            write(5, 1000),
            fstat(6),
            packet(17, 7, &[&text("/f")]),
            truncate,
            fstat(10),
            packet(4, 11, &[&text("1")]),
        ];
        let (replies, _) = send_raw(&server, requests.concat()).await;
        let size = |id: u32| {
            let attrs = replies
                .iter()
                .find(|(kind, of, _)| *kind == 105 && *of == id);
            attrs.map(|(_, _, rest)| u64::from_be_bytes(rest[4..12].try_into().unwrap()))
        };
        let sizes = [3, 4, 6, 7, 10].map(size);
        assert_eq!(
            sizes,
            [1000, 1000, 2000, 2000, 1500].map(Some),
            "append: {append}"
        );
        server.client().await.sftp.remove("/f").await.unwrap();
    }
}

#[tokio::test]
async fn packets_of_an_impossible_length_end_the_session() {
    let server = server_with_memory_store().await;
    for bytes in [
        (256 * 1024 + 1u32).to_be_bytes().to_vec(),
        vec![0, 0, 0, 0],
        vec![0, 0, 0, 4, 4, 0, 0, 0],
        [
            u32::MAX.to_be_bytes().to_vec(),
            packet(13, 1, &[&text("/f")]),
        ]
        .concat(),
    ] {
        let (replies, status) = send_raw(&server, bytes).await;
        assert_eq!(
            (replies.len(), status),
            (0, Some(1)),
            "no part of it is taken for a request"
        );
    }
    server.client().await;
}

#[tokio::test]
async fn a_file_whose_reads_are_all_sent_at_once_arrives() {
    let server = server_with_memory_store().await;
    let data = noise(40 * MIB, 1);
    server.client().await.put("/f", &data).await.unwrap();
    let mut ssh = SshClient::connect(server.address).await;
    assert!(ssh.login("alice", PASSWORD).await);
    let channel = ssh.sftp_channel().await;
    let mut requests = [
        packet(1, 3, &[]),
        packet(3, 0, &[&text("/f"), &[0, 0, 0, 1], &[0; 4]]),
    ]
    .concat();
    // The first handle of a session is called 1. Every READ is sent before a reply is read.
    for n in 0..1280u32 {
        let offset = (u64::from(n) * 32768).to_be_bytes();
        requests.extend(packet(
            5,
            n,
            &[&text("1"), &offset, &32768u32.to_be_bytes()],
        ));
    }
    channel.data(&requests[..]).await.unwrap();
    channel.eof().await.unwrap();
    let (replies, _, status) = within("the download", read_channel(channel)).await;
    let mut got = Vec::new();
    for (kind, _, rest) in split_replies(&replies) {
        if kind == 103 {
            got.extend(&rest[4..]);
        }
    }
    assert!(got == data, "{} of {} bytes", got.len(), data.len());
    assert_eq!(status, Some(0));
}

#[tokio::test]
async fn reads_are_answered_although_close_follows() {
    let s3 = FakeS3::start().await;
    s3.put("alice/f", noise(2 * MIB, 1));
    let server = Server::start(s3_store(&s3)).await;
    let open = packet(3, 1, &[&text("/f"), &[0, 0, 0, 1], &[0; 4]]);
    let reads = (2..40).map(|n| {
        packet(
            5,
            n,
            &[
                &text("1"),
                &(u64::from(n) * 999).to_be_bytes(),
                &[0, 0, 0x7F, 0],
            ],
        )
    });
    let requests = [
        vec![open],
        reads.collect(),
        vec![packet(4, 40, &[&text("1")])],
    ]
    .concat()
    .concat();
    let (replies, _) = send_raw(&server, requests).await;
    let mut ids: Vec<_> = replies.iter().map(|(_, id, _)| *id).collect();
    ids.sort();
    assert_eq!(ids, (1..=40).collect::<Vec<_>>());
}

#[tokio::test]
async fn open_handles_are_limited() {
    let server = Server::with(Arc::new(MemoryStore::default()), |builder| {
        builder.max_uploads(1000)
    })
    .await;
    let client = server.client().await;
    for n in 0..256 {
        client.open(&format!("/{n}"), PUT).await.unwrap();
    }
    let Failed(status, message) = client.open("/one-more", PUT).await.unwrap_err();
    assert_eq!(status, StatusCode::Failure, "{message}");
    assert_eq!(numbers_in(&message), [256], "{message}");
    client.close("1").await.unwrap();
    client.open("/one-more", PUT).await.unwrap();
}

#[tokio::test]
async fn requests_after_close_see_its_outcome() {
    let s3 = FakeS3::start().await;
    let server = Server::start(s3_store(&s3)).await;
    let hold = Arc::new(tokio::sync::Notify::new());
    s3.fault("PutObject", When::Nth(1), Fault::Hold(hold.clone()));
    // OPEN, WRITE, CLOSE and RENAME without waiting for replies, as sshfs sends them; and another
    // file.
    let write = |handle: &str, id| packet(6, id, &[&text(handle), &[0; 8], &text("data")]);
    let open = |path: &str, id| packet(3, id, &[&text(path), &[0, 0, 0, 26], &[0; 4]]);
    let requests = [
        open("/tmp", 1),
        write("1", 2),
        packet(4, 3, &[&text("1")]),
        open("/other", 4),
        write("2", 5),
        packet(4, 6, &[&text("2")]),
        packet(18, 7, &[&text("/tmp"), &text("/final")]),
    ];
    let session = tokio::spawn(async move { send_raw(&server, requests.concat()).await });
    eventually("the second upload overtakes the first", || {
        s3.object("alice/other").is_some()
    })
    .await;
    assert_eq!(s3.count("CopyObject"), 0, "the rename waits");
    hold.notify_one();
    let (replies, _) = session.await.unwrap();
    assert!(
        replies
            .iter()
            .all(|(kind, _, rest)| *kind == 102 || rest[3] == 0),
        "{replies:?}"
    );
    assert_eq!(s3.objects(), ["alice/final", "alice/other"]);
}

#[tokio::test]
async fn a_connection_without_a_login_in_time_is_closed() {
    let brief = Duration::from_millis(300);
    let server = Server::with(Arc::new(MemoryStore::default()), |builder| {
        builder.login_timeout(brief)
    })
    .await;
    // Silent from the start, silent after the version, and after the key exchange.
    for greeting in ["", "SSH-2.0-test\r\n"] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(greeting.as_bytes()).await.unwrap();
        let mut heard = Vec::new();
        let _ = within("the end", stream.read_to_end(&mut heard)).await;
        assert!(heard.starts_with(b"SSH-2.0-sftpd"));
    }
    let ssh = SshClient::connect(server.address).await;
    assert!(within("the end", ssh.channel()).await.is_err());
}

#[tokio::test]
async fn an_idle_session_ends_and_a_busy_one_does_not() {
    let data = noise(6 * MIB, 1);
    let s3 = FakeS3::start().await;
    let server = Server::with(s3_store(&s3), |builder| {
        builder.idle_timeout(Duration::from_secs(2))
    })
    .await;
    let busy = server.client().await;
    let idle = server.client().await;
    let handle = idle.open("/f", PUT).await.unwrap();
    idle.write(&handle, 0, &data).await.unwrap();
    within("the idle session's end", async {
        while !idle.ssh.is_closed() && s3.uploads() > 0 {
            busy.size("/").await.unwrap();
        }
    })
    .await;
    eventually("the idle session's upload is aborted", || s3.uploads() == 0).await;
    assert_eq!(s3.objects(), [""; 0]);
    busy.put("/g", b"still here").await.unwrap();
}

/// Logs in over a stream of this process, so that the clock can be paused. The task ends with the
/// connection.
async fn connect_in_memory(server: &sftpd::server::Server) -> (SshClient, JoinHandle<()>) {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let server = server.clone();
    let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, 22));
    let serving = tokio::spawn(async move { server.serve_stream(theirs, peer).await });
    let connected = SshClient::over(ours, russh::client::Config::default()).await;
    let mut ssh = connected.unwrap();
    assert!(ssh.login("alice", PASSWORD).await);
    (ssh, serving)
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_a_channel_ends_after_a_minute() {
    let minute = Duration::from_secs(60);
    let store = Arc::new(MemoryStore::default());
    let server = sftpd::server::Server::builder(store, AnyUser);
    let server = server.build().unwrap();
    let (ssh, serving) = connect_in_memory(&server).await;
    let began = Instant::now();
    serving.await.unwrap();
    let lasted = began.elapsed();
    assert!(lasted >= minute && lasted < 2 * minute, "{lasted:?}");
    assert!(ssh.last_words().await.contains("no session for too long"));

    // A minute from the end of the last session on, however long that was.
    let (ssh, serving) = connect_in_memory(&server).await;
    for _ in 0..3 {
        let sftp = ssh.sftp().await;
        sleep(minute + minute / 2).await;
        sftp.close_session().unwrap();
        sleep(minute - Duration::from_secs(1)).await;
        assert!(!serving.is_finished());
    }
    // One that asks for nothing.
    let _channel = ssh.channel().await.unwrap();
    let began = Instant::now();
    serving.await.unwrap();
    assert!(began.elapsed() < 3 * minute);
}

#[tokio::test]
async fn a_connection_beyond_the_limit_is_refused_with_a_message() {
    let server = Server::with(Arc::new(MemoryStore::default()), |builder| {
        builder.max_sessions(2)
    })
    .await;
    let (first, _second) = (server.client().await, server.client_as("writer").await);
    let mut heard = String::new();
    let mut third = TcpStream::connect(server.address).await.unwrap();
    within("the refusal", third.read_to_string(&mut heard))
        .await
        .unwrap();
    assert!(heard.contains("try again later"), "{heard}");
    first.put("/f", b"untouched").await.unwrap();
    drop(first);
    // The place is free once the server has seen the end.
    within("the place is free", async {
        while Client::try_connect(server.address).await.is_none() {}
    })
    .await;
}

#[tokio::test]
async fn a_drain_lets_transfers_finish() {
    let s3 = FakeS3::start().await;
    let mut server = Server::start(s3_store(&s3)).await;
    let (busy, idle) = (server.client().await, server.client().await);
    let data = noise(7 * MIB, 1);
    let handle = busy.open("/f", PUT).await.unwrap();
    busy.write(&handle, 0, &data[..6 * MIB]).await.unwrap();
    server.drain.cancel();
    within("the idle session's end", async {
        while !idle.ssh.is_closed() {
            tokio::task::yield_now().await
        }
    })
    .await;
    assert!(
        TcpStream::connect(server.address).await.is_err(),
        "no new connection"
    );
    assert_eq!(code(busy.open("/g", PUT).await), StatusCode::Failure);
    busy.write(&handle, 6 << 20, &data[6 * MIB..])
        .await
        .unwrap();
    busy.close(&handle).await.unwrap();
    // What clients do after their last CLOSE.
    let attributes = FileAttributes::empty();
    busy.sftp.setstat("/f", attributes).await.unwrap();
    busy.posix_rename("/f", "/g").await.unwrap();
    within("the server's end", &mut server.task).await.unwrap();
    assert_eq!(s3.object("alice/g").unwrap(), data);
    s3.assert_no_uploads();
}

/// The client keeps its connection, and goes on with its requests.
#[tokio::test(start_paused = true)]
async fn a_drain_ends_whatever_clients_do() {
    let store = Arc::new(MemoryStore::default());
    let server = sftpd::server::Server::builder(store, AnyUser);
    let server = server.build().unwrap();
    let (silent, _) = connect_in_memory(&server).await;
    let silent = silent.sftp().await;
    let (busy, _) = connect_in_memory(&server).await;
    let busy = busy.sftp().await;
    let opened = busy.open("/f", PUT, FileAttributes::empty()).await;
    let handle = opened.unwrap().handle;
    let asking = tokio::spawn(async move {
        while silent.stat("/").await.is_ok() {
            sleep(Duration::from_secs(1)).await;
        }
    });
    let writing = tokio::spawn(async move {
        sleep(Duration::from_secs(5)).await;
        busy.close(handle).await.unwrap();
        sleep(Duration::from_secs(1)).await;
        busy.stat("/f").await.unwrap();
        busy
    });
    let began = Instant::now();
    server.shut_down().await;
    let took = began.elapsed();
    assert!(took < Duration::from_secs(15), "{took:?}");
    asking.await.unwrap();
    writing.await.unwrap();
}

#[tokio::test]
async fn uploads_that_outlast_the_drain_are_aborted() {
    for second_signal in [false, true] {
        let s3 = FakeS3::start().await;
        let patience = Duration::from_millis(if second_signal { 60_000 } else { 300 });
        let mut server =
            Server::with(s3_store(&s3), |builder| builder.drain_timeout(patience)).await;
        let client = server.client().await;
        let handle = client.open("/f", PUT).await.unwrap();
        client.write(&handle, 0, &noise(6 * MIB, 1)).await.unwrap();
        server.drain.cancel();
        if second_signal {
            server.server.stop();
        }
        within("the server's end", &mut server.task).await.unwrap();
        s3.assert_no_uploads();
        assert_eq!(s3.objects(), [""; 0]);
    }
}

/// Sends requests for ever.
struct Flood(bytes::Bytes);

impl sftpd::sftp::Source for Flood {
    async fn next(&mut self) -> sftpd::sftp::Received {
        tokio::task::yield_now().await;
        sftpd::sftp::Received::Data(self.0.clone())
    }
}

/// Never reads a reply.
struct Deaf;

impl sftpd::sftp::Sink for Deaf {
    async fn send(&mut self, _bytes: bytes::Bytes) -> bool {
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_reads_replies_is_disconnected() {
    let many = (0..100).map(|id| packet(16, id, &[&text(&"deep/".repeat(150))]));
    let requests = [packet(1, 3, &[])]
        .into_iter()
        .chain(many)
        .collect::<Vec<_>>()
        .concat();
    let (mut settings, _tasks) =
        session::settings(Arc::new(MemoryStore::default()), "alice", 64 << 20);
    settings.idle_timeout = Duration::from_secs(2);
    let end = sftpd::sftp::serve(Flood(requests.into()), Deaf, settings).await;
    assert!(matches!(end, End::Ignored), "{end}");
}

#[tokio::test]
async fn an_open_after_close_waits_for_it_in_every_session() {
    let s3 = FakeS3::start().await;
    let server = Server::start(s3_store(&s3)).await;
    let (first, second) = (server.client().await, server.client().await);
    s3.put("alice/log", "one\n");
    let hold = Arc::new(tokio::sync::Notify::new());
    s3.fault("PutObject", When::Nth(1), Fault::Hold(hold.clone()));
    let append = OpenFlags::WRITE | OpenFlags::CREATE | OpenFlags::APPEND;
    let handle = first.open("/log", append).await.unwrap();
    first.write(&handle, 0, b"two\n").await.unwrap();
    let closing = tokio::spawn(async move { first.close(&handle).await });
    eventually("the first append is on its way", || {
        s3.count("PutObject") == 1
    })
    .await;
    let appended = tokio::spawn(async move {
        let handle = second.open("/log", append).await?;
        second.write(&handle, 0, b"three\n").await?;
        second.close(&handle).await
    });
    hold.notify_one();
    closing.await.unwrap().unwrap();
    appended.await.unwrap().unwrap();
    assert_eq!(s3.object("alice/log").unwrap(), "one\ntwo\nthree\n");
}

#[tokio::test]
async fn excl_without_write_does_not_open_for_reading() {
    let s3 = FakeS3::start().await;
    let server = Server::start(s3_store(&s3)).await;
    s3.put("alice/f", "old");
    let excl = OpenFlags::CREATE | OpenFlags::EXCLUDE;
    assert_eq!(
        code(server.client().await.open("/f", excl).await),
        StatusCode::Failure
    );
    assert_eq!(
        code(server.client_as("reader").await.open("/f", excl).await),
        StatusCode::PermissionDenied
    );
}

#[test]
fn host_keys_are_generated_once_and_existing_ones_are_used() {
    use russh::keys::ssh_key::LineEnding;
    use russh::keys::{Algorithm, PrivateKey};
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("host_keys");
    let mode = |name: &str| {
        std::fs::metadata(keys.join(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    let load = || {
        let mut loaded: Vec<_> = sftpd::server::load_or_create(&keys)
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect();
        loaded.sort();
        loaded
    };
    let made = load();
    let types: Vec<_> = made
        .iter()
        .map(|key| key.split_once(" SHA256:").unwrap().0)
        .collect();
    assert_eq!(types, ["ECDSA", "ED25519", "RSA"]);
    assert_eq!(mode(""), 0o700);
    for (kind, algorithm) in [
        ("ed25519", "ssh-ed25519"),
        ("ecdsa", "ecdsa-sha2-nistp256"),
        ("rsa", "ssh-rsa"),
    ] {
        assert_eq!(mode(&format!("ssh_host_{kind}_key")), 0o600);
        let public =
            std::fs::read_to_string(keys.join(format!("ssh_host_{kind}_key.pub"))).unwrap();
        assert!(public.starts_with(&format!("{algorithm} AAAA")), "{public}");
    }
    assert_eq!(load(), made);
    // Into a directory with a key no other key is generated.
    for name in ["ssh_host_ed25519_key", "ssh_host_ecdsa_key"] {
        std::fs::remove_file(keys.join(name)).unwrap();
    }
    assert_eq!(load(), made[2..]);
    let ed25519 = PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).unwrap();
    std::fs::write(
        keys.join("moved_in"),
        ed25519.to_openssh(LineEnding::LF).unwrap(),
    )
    .unwrap();
    assert_eq!(load().len(), 2);
    std::fs::write(keys.join("notes.txt"), "not a key").unwrap();
    let error = sftpd::server::load_or_create(&keys).err().unwrap();
    assert!(
        format!("{error:#}").contains("notes.txt is not an unencrypted private key"),
        "{error:#}"
    );
}
