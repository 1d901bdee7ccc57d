//! The real binary under load, and how it ends: many sessions, limits reached, no descriptors left,
//! signals.
//!
//! The long run, with its figures:
//! `cargo test --release --locked --test load -- --ignored --nocapture two_hundred`

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use bytes::Bytes;
use russh::ChannelMsg;
use russh_sftp::client::error::Error as SftpError;
use russh_sftp::protocol::{FileAttributes, OpenFlags};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{ChildStderr, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::commands::Running;
use support::process::{Process, add_user, sftpd_on};
use support::proxy::{Fate, Proxy};
use support::s3::{FakeS3, Fault, When};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const BLOCK: usize = 128 * 1024;

/// Like [`Client::put`], for a server that may end in the middle of it: other errors than a status
/// are returned.
async fn put(client: &Client, path: &str, data: &[u8]) -> Result<(), SftpError> {
    let handle = client
        .sftp
        .open(path, PUT, FileAttributes::empty())
        .await?
        .handle;
    for (n, block) in data.chunks(BLOCK).enumerate() {
        client
            .sftp
            .write(&handle, (n * BLOCK) as u64, block.to_vec())
            .await?;
    }
    client.sftp.close(&handle).await.map(drop)
}

async fn get(client: &Client, path: &str, size: usize) -> Result<Vec<u8>, SftpError> {
    let handle = client
        .sftp
        .open(path, OpenFlags::READ, FileAttributes::empty())
        .await?
        .handle;
    let mut all = Vec::with_capacity(size);
    while all.len() < size {
        all.extend(
            client
                .sftp
                .read(&handle, all.len() as u64, BLOCK as u32)
                .await?
                .data,
        );
    }
    client.sftp.close(&handle).await?;
    Ok(all)
}

// Many sessions

/// Runs sessions at once, each of which puts and gets files of 1 byte to `largest`. Every byte is
/// compared, in the bucket and after the download.
async fn run_sessions(count: usize, files: usize, largest: usize, pool: usize) {
    let s3 = Arc::new(FakeS3::start().await);
    let process = Process::start(&s3, &["--buffer-memory", &format!("{pool}MiB")]);
    let began = Instant::now();
    let mut clients = JoinSet::new();
    for n in 0..count {
        let (s3, address) = (s3.clone(), process.address);
        clients.spawn(async move {
            let client = Client::connect(address).await;
            let mut dice = Dice::new(n as u64 + 1);
            let mut bytes = 0;
            let mut errors = 0;
            for file in 0..files {
                // Small files as often as large ones.
                let most = 2 << dice.below(u64::from(largest.ilog2()) + 1);
                let size = match (n, file) {
                    (0, 0) => 1,
                    (0, 1) => largest,
                    _ => dice.size_below(most).clamp(1, largest),
                };
                let path = format!("/{n}-{file}");
                let data = noise(size, (n * files + file) as u64);
                let outcome = async {
                    put(&client, &path, &data).await?;
                    assert!(
                        s3.object(&format!("alice{path}")).as_ref() == Some(&data),
                        "{path} in the bucket"
                    );
                    assert!(
                        get(&client, &path, size).await? == data,
                        "{path}, downloaded"
                    );
                    client.sftp.remove(&path).await
                };
                match outcome.await {
                    Ok(_) => bytes += 2 * size,
                    Err(error) => {
                        eprintln!("{path}: {error}");
                        errors += 1;
                    }
                }
            }
            (bytes, errors)
        });
    }
    let outcomes = clients.join_all().await;
    let bytes: usize = outcomes.iter().map(|(bytes, _)| bytes).sum();
    let errors: usize = outcomes.iter().map(|(_, errors)| errors).sum();
    let peak = process.peak();
    let took = began.elapsed().as_secs_f64();
    let cpu = process.ticks() as f64 / 100.0;
    println!(
        "{count} sessions, {} files put and got, {} MiB in both directions together, {errors} errors, {took:.1} s, \
         {cpu:.1} s of the server's processor time, peak RSS {peak} MiB",
        count * files,
        bytes / MIB
    );
    assert_eq!((errors, s3.objects()), (0, Vec::new()));
    // 40 for the process and two password checks, the pool, and a share for each upload and
    // session.
    let promise = 40 + pool + count * 41 / 4;
    assert!(peak <= promise, "{peak} MiB, of {promise}");
    s3.assert_no_uploads();
}

#[tokio::test(flavor = "multi_thread")]
async fn many_sessions_at_once_lose_nothing() {
    run_sessions(24, 4, 6 * MIB, 32).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a minute, in a release build"]
async fn two_hundred_sessions_at_once_lose_nothing() {
    run_sessions(200, 12, 20 * MIB, 256).await;
}

// A log that is not read

/// A server that logs much, and the end of the pipe that it logs to, read up to the line about its
/// start, with what it has said until then.
fn start_with_unread_log(s3: &FakeS3, folder: &Path) -> (Running, BufReader<ChildStderr>, String) {
    add_user(folder, "alice", &[], Some(PASSWORD));
    let mut command = sftpd_on(s3, folder);
    command
        .args(["serve", "--listen", "127.0.0.1:0"])
        .args(["--metrics", "127.0.0.1:0"])
        .env("RUST_LOG", "sftpd=debug")
        .stderr(Stdio::piped());
    let mut server = Running::spawn(&mut command);
    let mut log = BufReader::new(server.0.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("listening on") {
        assert!(log.read_line(&mut said).unwrap() > 0, "{said}");
    }
    (server, log, said)
}

fn address_behind(text: &str, said: &str) -> String {
    let (_, rest) = said.split_once(text).unwrap();
    rest.lines().next().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_not_read_stops_nothing() {
    let s3 = FakeS3::start().await;
    let folder = tempfile::tempdir().unwrap();
    let (mut server, log, said) = start_with_unread_log(&s3, folder.path());
    let address = address_behind("listening on ", &said).parse().unwrap();
    let metrics = address_behind("metrics on ", &said);
    let client = Client::connect(address).await;
    // More than the pipe and the queue hold.
    let name = "x".repeat(900);
    for _ in 0..2000 {
        within("a put", client.put(&format!("/{name}"), b"x"))
            .await
            .unwrap();
    }
    let another = within("a login", Client::connect(address)).await;
    assert_eq!(
        within("a get", another.get(&format!("/{name}")))
            .await
            .unwrap(),
        b"x"
    );
    assert_eq!(http_get(&metrics, "/healthz").1, "ok\n");
    let text = http_get(&metrics, "/metrics").1;
    let dropped = text
        .lines()
        .find_map(|line| line.strip_prefix("sftpd_dropped_log_lines_total "));
    assert!(dropped.unwrap().parse::<u64>().unwrap() > 0, "{text}");

    // Once it is read, it says what is missing, and goes on.
    let reading =
        tokio::task::spawn_blocking(move || log.lines().map_while(Result::ok).collect::<Vec<_>>());
    drop(another);
    let pid = server.0.id().to_string();
    let killed = std::process::Command::new("kill").arg(&pid).status();
    assert!(killed.unwrap().success());
    let lines = within("the end of the log", reading).await.unwrap();
    assert!(server.0.wait().unwrap().success());
    let told = lines
        .iter()
        .filter(|line| line.contains(" lines of the log were dropped"));
    assert!(told.count() > 0, "{} lines", lines.len());
    assert!(
        lines.last().unwrap().ends_with("stopped"),
        "{:?}",
        lines.last()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_never_read_does_not_keep_the_server_from_ending() {
    let s3 = FakeS3::start().await;
    let folder = tempfile::tempdir().unwrap();
    let (mut server, _log, said) = start_with_unread_log(&s3, folder.path());
    let address = address_behind("listening on ", &said).parse().unwrap();
    let client = Client::connect(address).await;
    let name = "x".repeat(900);
    for _ in 0..200 {
        client.put(&format!("/{name}"), b"x").await.unwrap();
    }
    drop(client);
    let pid = server.0.id().to_string();
    let killed = std::process::Command::new("kill").arg(&pid).status();
    assert!(killed.unwrap().success());
    let ended = tokio::task::spawn_blocking(move || server.0.wait());
    assert!(within("the end", ended).await.unwrap().unwrap().success());
}

// Limits

#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_limit_are_refused_and_disturb_no_transfer() {
    const PLACES: usize = 8;
    let s3 = FakeS3::start().await;
    let process = Process::start(&s3, &["--max-sessions", &PLACES.to_string()]);
    // Each has half of the places.
    let users = ["alice", "bob"];
    add_user(
        process.folder(),
        "bob",
        &["--home", "alice"],
        Some(PASSWORD),
    );
    let data = noise(6 * MIB, 1);
    let mut transfers = Vec::new();
    for n in 0..PLACES {
        let client = Client::login(process.address, users[n % 2], PASSWORD).await;
        let client = client.unwrap();
        let handle = client.open(&format!("/{n}"), PUT).await.unwrap();
        client.write(&handle, 0, &data[..MIB]).await.unwrap();
        transfers.push((client, handle));
    }
    let mut crowd = JoinSet::new();
    for _ in 0..100 {
        let address = process.address;
        crowd.spawn(async move {
            let mut heard = String::new();
            let mut stream = TcpStream::connect(address).await.unwrap();
            within("the refusal", stream.read_to_string(&mut heard))
                .await
                .unwrap();
            heard
        });
    }
    for (client, handle) in &transfers {
        client
            .write(handle, MIB as u64, &data[MIB..])
            .await
            .unwrap();
        client.close(handle).await.unwrap();
    }
    assert!(
        crowd
            .join_all()
            .await
            .iter()
            .all(|heard| heard.contains("try again later"))
    );
    assert!((0..PLACES).all(|n| s3.object(&format!("alice/{n}")).as_ref() == Some(&data)));
    drop(transfers.swap_remove(0));
    within("a place is free", async {
        while Client::try_connect(process.address).await.is_none() {}
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_descriptors_close_still_tells_the_truth() {
    let s3 = FakeS3::start().await;
    let process = Process::start_after("ulimit -n 64", &s3, &[]);
    s3.put("alice/old", noise(3 * MIB, 9));
    let data = noise(17 * MIB, 1);
    let mut transfers = Vec::new();
    for n in 0..4 {
        let client = process.client().await;
        let handle = client.open(&format!("/{n}"), PUT).await.unwrap();
        // Two of them have begun to send parts to the store.
        client
            .write(&handle, 0, &data[..[1000, 6 * MIB][n % 2]])
            .await
            .unwrap();
        transfers.push((client, handle));
    }
    let mut crowd = Vec::new();
    for _ in 0..100 {
        crowd.push(TcpStream::connect(process.address).await.unwrap());
    }
    eventually("no descriptor is left", || {
        process.logged("can't accept") > 0
    })
    .await;
    let began = Instant::now();
    let lines_before = process.logged("");
    let ticks_before = process.ticks();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let lines = process.logged("") - lines_before;
    let ticks = process.ticks() - ticks_before;
    let took = began.elapsed();
    assert!(
        lines <= took.as_millis() as usize / 200 + 1,
        "{lines} lines of log in {took:?}"
    );
    assert!(ticks < 50, "{ticks} ticks of processor time in {took:?}");
    let mut stored = 0;
    for (n, (client, handle)) in transfers.iter().enumerate() {
        let from = [1000, 6 * MIB][n % 2];
        let outcome = within("a put", async {
            for (block, rest) in data[from..].chunks(BLOCK).enumerate() {
                client
                    .sftp
                    .write(handle, (from + block * BLOCK) as u64, rest.to_vec())
                    .await?;
            }
            client.sftp.close(handle).await
        });
        let (outcome, object) = (outcome.await, s3.object(&format!("alice/{n}")));
        match &outcome {
            Ok(_) => assert!(object.as_ref() == Some(&data), "{n}: CLOSE said OK"),
            Err(error) => assert_eq!(object, None, "{n}: {error}"),
        }
        stored += usize::from(outcome.is_ok());
        let got = within("a get", client.sftp.stat("/old")).await;
        println!(
            "put {n}: {:?}, stat: {:?}",
            outcome.map(drop),
            got.map(drop)
        );
    }
    println!(
        "{stored} of {} puts were stored without a descriptor to spare",
        transfers.len()
    );
    drop(crowd);
    let client = within("a place is free", async { process.client().await }).await;
    within("a put", client.put("/new", &data)).await.unwrap();
    assert!(s3.object("alice/new").unwrap() == data);
    for (client, _) in &transfers {
        assert!(within("a get", client.get("/old")).await.unwrap() == noise(3 * MIB, 9));
    }
    eventually("no upload is in progress", || s3.uploads() == 0).await;
}

// Clients that only take up memory

#[tokio::test(flavor = "multi_thread")]
async fn connections_without_a_login_take_little_memory_and_are_closed() {
    const COUNT: usize = 200;
    let s3 = FakeS3::start().await;
    let process = Process::start(&s3, &["--login-timeout", "3s"]);
    let mut crowd = JoinSet::new();
    for _ in 0..COUNT {
        let mut stream = TcpStream::connect(process.address).await.unwrap();
        crowd.spawn(async move {
            // All but the end of a packet of 32 KiB that would begin the key exchange.
            let packet = [&b"SSH-2.0-test\r\n\0\0\x80\0\x04\x14"[..], &[b'x'; 32_000]].concat();
            stream.write_all(&packet).await.unwrap();
            let _ = within("the end", stream.read_to_end(&mut Vec::new())).await;
        });
    }
    crowd.join_all().await;
    within("a place is free", async {
        while Client::try_connect(process.address).await.is_none() {}
    })
    .await;
    let peak = process.peak();
    println!("{COUNT} connections before login: peak RSS {peak} MiB");
    // 20 for the process, 20 for the password check at the end.
    assert!(peak < 40 + COUNT / 4, "{peak} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_never_read_replies_take_little_memory_and_are_closed() {
    const COUNT: usize = 10;
    let s3 = FakeS3::start().await;
    s3.put("alice/f", noise(40 * MIB, 1));
    let process = Process::start(&s3, &["--idle-timeout", "3s", "--buffer-memory", "32MiB"]);
    let mut deaf = Vec::new();
    for _ in 0..COUNT {
        let proxy = Proxy::start(process.address, usize::MAX, Fate::Deaf).await;
        let mut ssh = SshClient::connect(proxy.address).await;
        assert!(ssh.login("alice", PASSWORD).await);
        let mut channel = ssh.sftp_channel().await;
        channel.data(&packet(1, 3, &[])[..]).await.unwrap();
        while !matches!(channel.wait().await.unwrap(), ChannelMsg::Data { .. }) {}
        proxy.break_now();
        let mut requests = packet(3, 0, &[&text("/f"), &[0, 0, 0, 1], &[0; 4]]);
        for n in 0..1280u32 {
            requests.extend(packet(
                5,
                n,
                &[
                    &text("1"),
                    &(u64::from(n) * 32768).to_be_bytes(),
                    &32768u32.to_be_bytes(),
                ],
            ));
        }
        channel.data(&requests[..]).await.unwrap();
        deaf.push((proxy, ssh, channel));
    }
    eventually("every session ends", || {
        process.logged("session ended") == COUNT
    })
    .await;
    let peak = process.peak();
    println!("{COUNT} clients that never read: peak RSS {peak} MiB");
    let promise = 60 + 32 + COUNT * 4;
    assert!(peak <= promise, "{peak} MiB, of {promise}");
    assert_eq!(
        process.client().await.size("/f").await.unwrap(),
        40 * MIB as u64
    );
}

// A server that ends

/// What clients have sent, by key, and what they were told.
#[derive(Default)]
struct Told {
    sent: BTreeMap<String, Bytes>,
    /// The keys whose CLOSE was answered OK.
    stored: Vec<String>,
}

/// Starts clients that put one file after another until that fails.
async fn start_busy_clients(
    process: &Process,
    count: usize,
    seed: u64,
) -> (Arc<Mutex<Told>>, JoinSet<()>) {
    let told = Arc::new(Mutex::new(Told::default()));
    let mut clients = JoinSet::new();
    for n in 0..count {
        let (client, told) = (process.client().await, told.clone());
        let mut dice = Dice::new(seed * 100 + n as u64);
        clients.spawn(async move {
            for file in 0.. {
                let size = *dice.pick(&[1, 100_000, 5 * MIB, 6 * MIB]);
                let data = noise(size, dice.below(1000));
                let path = format!("{n}-{file}");
                told.lock()
                    .unwrap()
                    .sent
                    .insert(format!("alice/{path}"), data.clone());
                if put(&client, &path, &data).await.is_err() {
                    return;
                }
                told.lock().unwrap().stored.push(format!("alice/{path}"));
            }
        });
    }
    (told, clients)
}

/// Every object is whole, and every object is there whose CLOSE was answered OK.
fn check(s3: &FakeS3, told: &Told) {
    for key in s3.objects() {
        assert!(
            s3.object(&key) == told.sent.get(&key).cloned(),
            "{key} is not what was sent"
        );
    }
    let lost: Vec<_> = told
        .stored
        .iter()
        .filter(|key| s3.object(key).is_none())
        .collect();
    assert!(lost.is_empty(), "{lost:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_under_load_drains_and_a_second_one_aborts() {
    for patience in ["2s", "1h"] {
        let s3 = FakeS3::start().await;
        let mut process = Process::start(&s3, &["--drain-timeout", patience]);
        let stuck = process.client().await;
        let handle = stuck.open("/stuck", PUT).await.unwrap();
        stuck.write(&handle, 0, &noise(6 * MIB, 1)).await.unwrap();
        let (told, clients) = start_busy_clients(&process, 4, 1).await;
        eventually("files are stored", || told.lock().unwrap().stored.len() > 4).await;
        process.signal("TERM");
        if patience == "1h" {
            // Each finishes its file, and is refused the next.
            within("the transfers", clients.join_all()).await;
            assert!(
                process.child.try_wait().unwrap().is_none(),
                "one is still open"
            );
            let told = told.lock().unwrap();
            assert_eq!(
                told.sent.len(),
                told.stored.len() + 4,
                "only what had not begun was refused"
            );
            process.signal("TERM");
        }
        assert_eq!(within("the end", process.ended()).await.code(), Some(0));
        s3.assert_no_uploads();
        assert_eq!(s3.object("alice/stuck"), None);
        check(&s3, &told.lock().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_leaves_whole_objects_only() {
    let mut dice = Dice::new(5);
    for round in 0..6 {
        let s3 = FakeS3::start().await;
        for op in ["PutObject", "UploadPart", "CompleteMultipartUpload"] {
            s3.fault(op, When::Every, Fault::Stall(Duration::from_millis(2)));
        }
        let mut process = Process::start(&s3, &[]);
        let (told, clients) = start_busy_clients(&process, 3, round).await;
        let requests = 1 + dice.size_below(40);
        eventually("requests have been sent", || {
            s3.requests().len() >= requests
        })
        .await;
        process.child.kill().unwrap();
        process.ended().await;
        within("the clients' end", clients.join_all()).await;
        check(&s3, &told.lock().unwrap());
    }
}
