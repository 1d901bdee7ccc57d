//! What one client can do to others: every limit on what a client can accumulate is attacked, and
//! every wait must end.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use bytes::Bytes;
use russh_sftp::protocol::{OpenFlags, StatusCode};
use sftpd::events::Teller;
use sftpd::store::memory::MemoryStore;
use sftpd::store::{Attributes, Condition, Key, Limits, Store, Timeouts};
use sftpd::transfer::{BufferPool, PartSizes, Share, Target, Transfers, Upload, UploadError};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::process::Process;
use support::s3::{FakeS3, Fault, When};
use support::stores::Hooked;
use support::*;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinSet;

/// A server with parts of 16 MiB, four of which fill the pool.
async fn server_with_large_parts(s3: &FakeS3, equal: bool) -> Server {
    Server::with(s3_store(s3), |builder| {
        builder
            .buffer_memory(64 << 20)
            .part_size(16 << 20)
            .equal_parts(equal)
    })
    .await
}

/// More uploads than the pool has parts, in one session, turn by turn: the bytes that fill the
/// first part of one come after the bytes for which the others have to wait.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_of_one_session_never_wait_for_each_other() {
    let s3 = FakeS3::start().await;
    let server = server_with_large_parts(&s3, false).await;
    let client = server.client().await;
    let data = noise(20 * MIB, 1);
    let mut handles = Vec::new();
    for n in 0..6 {
        handles.push(client.open(&format!("/{n}"), PUT).await.unwrap());
    }
    within("all of them", async {
        for at in (0..data.len()).step_by(2 * MIB) {
            for handle in &handles {
                client
                    .write(handle, at as u64, &data[at..at + 2 * MIB])
                    .await
                    .unwrap();
            }
        }
        for handle in &handles {
            client.close(handle).await.unwrap();
        }
    })
    .await;
    (0..6).for_each(|n| assert!(s3.object(&format!("alice/{n}")).unwrap() == data, "{n}"));
    s3.assert_no_uploads();
}

/// Each has begun a part that is larger than its own memory, and then sends nothing more.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_stop_leave_the_memory_to_others() {
    let s3 = FakeS3::start().await;
    let server = server_with_large_parts(&s3, false).await;
    let mut stopped = Vec::new();
    for n in 0..8 {
        let client = server.client().await;
        let handle = client.open(&format!("/stopped{n}"), PUT).await.unwrap();
        client
            .write(&handle, 0, &noise(5 * MIB + 32 * 1024, n))
            .await
            .unwrap();
        stopped.push((client, handle));
    }
    let other = server.client().await;
    let data = noise(40 * MIB, 99);
    within("another one's upload", other.put("/other", &data))
        .await
        .unwrap();
    assert!(s3.object("alice/other").unwrap() == data);
    for (n, (client, handle)) in stopped.into_iter().enumerate() {
        client.close(&handle).await.unwrap();
        assert!(
            s3.object(&format!("alice/stopped{n}")).unwrap()
                == noise(5 * MIB + 32 * 1024, n as u64)
        );
    }
    s3.assert_no_uploads();
}

async fn write(upload: &Upload, offset: u64, len: usize) -> Result<(), UploadError> {
    let (answer, answered) = oneshot::channel();
    let reply = Box::new(move |result| drop(answer.send(result)));
    upload.write(Some(offset), vec![noise(len, 1)], reply).await;
    answered.await.unwrap()
}

/// Uploads without a server.
fn transfers(store: Arc<MemoryStore>, pool: u64, first: u64, double_every: u32) -> Arc<Transfers> {
    let sizes = PartSizes {
        first,
        cap: first,
        double_every,
        ..PartSizes::default()
    };
    let timeouts = Timeouts::default();
    Arc::new(Transfers::new(
        store,
        timeouts,
        BufferPool::new(pool),
        sizes,
    ))
}

fn open(transfers: &Arc<Transfers>, name: &str) -> Upload {
    let target = Target {
        key: Key::new(name).unwrap(),
        base: None,
        condition: Condition::None,
        events: Teller::default(),
        on_end: Box::new(drop),
    };
    Upload::open(transfers.clone(), target)
}

async fn close(upload: Upload) -> Result<(), UploadError> {
    let (answer, answered) = oneshot::channel();
    upload
        .close(Box::new(move |result| drop(answer.send(result))))
        .await;
    answered.await.unwrap()
}

fn store_with_min_part(min_part: u64) -> Arc<MemoryStore> {
    let mut limits = Limits::default();
    limits.min_part = min_part;
    Arc::new(MemoryStore::with_limits(limits))
}

/// If parts can't be sent before they are full, an upload that gets no memory fails instead of
/// hanging: if all parts must be equal, and if the smallest one is larger than an upload's own
/// memory.
#[tokio::test(start_paused = true)]
async fn parts_that_cannot_leave_early_fail_without_memory_in_the_end() {
    let equal = Arc::new(MemoryStore::default());
    for (store, double_every) in [(equal, 0), (store_with_min_part(16 << 20), 1000)] {
        let transfers = transfers(store.clone(), 64 << 20, 16 << 20, double_every);
        let first = open(&transfers, "first");
        write(&first, 0, 6 * MIB).await.unwrap();
        let second = open(&transfers, "second");
        let refused = write(&second, 0, 6 * MIB).await;
        assert!(
            matches!(refused, Err(UploadError::NoMemory { .. })),
            "{refused:?}"
        );
        // The upload that has the memory goes on, part by part.
        for at in (6..50).step_by(2) {
            write(&first, at << 20, 2 * MIB).await.unwrap();
        }
        let third = open(&transfers, "third");
        drop(second);
        close(first).await.unwrap();
        write(&third, 0, 20 * MIB).await.unwrap();
        drop(third);
        transfers.tasks.close();
        transfers.tasks.wait().await;
        assert_eq!((store.uploads(), transfers.pool.used()), (0, 0));
    }
}

/// What an upload holds beyond its own 5 MiB is counted, also while others wait for memory. A part
/// that could be larger is sent at the smallest size then.
#[tokio::test(start_paused = true)]
async fn parts_that_are_large_at_least_are_counted() {
    let store = store_with_min_part(16 << 20);
    let transfers = transfers(store.clone(), 128 << 20, 32 << 20, 1000);
    let first = open(&transfers, "first");
    write(&first, 0, 6 * MIB).await.unwrap();
    assert_eq!(transfers.pool.used(), 32 << 20);
    let others = tokio::spawn({
        let pool = transfers.pool.clone();
        async move { pool.take(128 << 20).await.map(drop) }
    });
    for at in (6..16).step_by(2) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!others.is_finished(), "{at} MiB are still held");
        write(&first, at << 20, 2 * MIB).await.unwrap();
    }
    within("the others' turn", others).await.unwrap().unwrap();
    write(&first, 16 << 20, 30 * MIB).await.unwrap();
    close(first).await.unwrap();
    let object = store.head(&Key::new("first").unwrap()).await.unwrap();
    assert_eq!(object.size, 46 << 20);

    // The share for such parts holds one of 32 MiB, and then one of 16.
    let uploads = [open(&transfers, "a"), open(&transfers, "b")];
    let held = transfers.pool.try_take_share(Share::GrownParts, 16 << 20);
    write(&uploads[0], 0, 6 * MIB).await.unwrap();
    assert_eq!(transfers.pool.used(), 32 << 20);
    write(&uploads[0], 6 << 20, 20 * MIB).await.unwrap();
    drop(held);
    write(&uploads[1], 0, 6 * MIB).await.unwrap();
    for upload in uploads {
        close(upload).await.unwrap();
    }
    assert_eq!((store.uploads(), transfers.pool.used()), (0, 0));
}

/// Old bytes that are loaded are counted: in the pool, or as the one WRITE that an upload may hold.
#[tokio::test]
async fn old_bytes_that_are_loaded_are_counted() {
    const POOL: u64 = 64 << 20;
    const MIB_OF_POOL: u64 = 1 << 20;
    for (held_by_others, first_part, size, expected_gets) in [
        (0, 5 << 20, 5 * MIB - 1, Some(1)),
        (POOL, 5 << 20, 5 * MIB - 1, Some(20)),
        // Parts become as small as what they hold.
        (POOL - 6 * MIB_OF_POOL, 10 << 20, 12 * MIB, None),
    ] {
        let pool = BufferPool::new(POOL);
        let others = pool.try_take(held_by_others).unwrap();
        let gets = Arc::new(AtomicUsize::new(0));
        let mut store = Hooked::new({
            let (gets, pool) = (gets.clone(), pool.clone());
            move |method| {
                if method == "get" {
                    let number = gets.fetch_add(1, Ordering::Relaxed);
                    assert!(number > 0 || pool.used() >= size.min(5 * MIB) as u64);
                }
                Box::pin(async { Ok(()) })
            }
        });
        // It does not copy.
        store.store = MemoryStore::with_limits(Limits::default());
        let store = Arc::new(store);
        let key = Key::new("f").unwrap();
        let old = noise(size, 1);
        let plain = Attributes::default();
        let put = store.put(&key, old.clone(), &plain, &Condition::None).await;
        let sizes = PartSizes {
            first: first_part,
            ..PartSizes::default()
        };
        let transfers = Transfers::new(store.clone(), Timeouts::default(), pool, sizes);
        let target = Target {
            key: key.clone(),
            base: Some(put.unwrap()),
            condition: Condition::None,
            events: Teller::default(),
            on_end: Box::new(drop),
        };
        let upload = Upload::open(Arc::new(transfers), target);
        within("the append", write(&upload, size as u64, 1))
            .await
            .unwrap();
        close(upload).await.unwrap();
        if let Some(expected) = expected_gets {
            assert_eq!(gets.load(Ordering::Relaxed), expected);
        }
        let now = store.head(&key).await.unwrap();
        let content = store.store.get(&key, 0..now.size, &now.etag).await;
        assert!(content.unwrap().concat() == [&old[..], &noise(1, 1)[..]].concat());
        drop(others);
    }
}

/// Parts that never arrive do not keep the upload or its memory for ever.
#[tokio::test]
async fn an_upload_whose_parts_hang_is_aborted_after_a_disconnect() {
    let s3 = FakeS3::start().await;
    s3.fault("UploadPart", When::Every, Fault::Hang);
    let mut server = Server::start(s3_store(&s3)).await;
    let client = server.client().await;
    let handle = client.open("/f", PUT).await.unwrap();
    client.write(&handle, 0, &noise(12 * MIB, 1)).await.unwrap();
    eventually("parts are on their way", || s3.count("UploadPart") == 2).await;
    drop(client);
    eventually("the upload is aborted", || s3.uploads() == 0).await;
    server.drain.cancel();
    within("the server's end", &mut server.task).await.unwrap();
}

/// The second signal ends a rename of a directory, or one that copies by parts, or both: nothing
/// half-done is left.
#[tokio::test]
async fn a_rename_that_is_aborted_leaves_nothing_behind() {
    for (source, target, operation) in [
        ("/large", "/moved", "UploadPartCopy"),
        ("/d", "/e", "CopyObject"),
        ("/videos", "/films", "UploadPartCopy"),
    ] {
        let s3 = FakeS3::start().await;
        s3.put("alice/large", noise(7 * MIB, 1));
        s3.put("alice/videos/large", noise(7 * MIB, 2));
        (0..40).for_each(|n| s3.put(&format!("alice/d/{n:02}"), "x"));
        let before = s3.objects();
        let mut server = Server::start(s3_store(&s3)).await;
        let client = server.client().await;
        if operation == "UploadPartCopy" {
            s3.set_copy_limit(MIB as u64);
            s3.fault(operation, When::Every, Fault::Hang);
        } else {
            s3.fault(operation, When::From(20), Fault::Hang);
        }
        let renaming =
            tokio::spawn(async move { client.sftp.rename(source, target).await.is_ok() });
        let count = if operation == "UploadPartCopy" { 1 } else { 20 };
        eventually("it is under way", || s3.count(operation) >= count).await;
        server.drain.cancel();
        server.server.stop();
        within("the server's end", &mut server.task).await.unwrap();
        renaming.abort();
        assert_eq!(s3.objects(), before, "{source}");
        s3.assert_no_uploads();
    }
}

/// READs whose replies are not read, as of a `get` that is killed: the session ends with the
/// channel.
#[tokio::test]
async fn closing_a_channel_during_a_download_ends_its_session() {
    let s3 = FakeS3::start().await;
    s3.put("alice/f", noise(20 * MIB, 1));
    let server = Server::start(s3_store(&s3)).await;
    let client = server.client().await;
    let init = 3_u32.to_be_bytes();
    for _ in 0..30 {
        let channel = within("a place", async {
            loop {
                match client.ssh.channel().await {
                    Ok(channel) => return channel,
                    // The channel before has not ended yet.
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        })
        .await;
        channel.request_subsystem(true, "sftp").await.unwrap();
        let mut requests = packet(1, 0, &[])[..5].to_vec();
        requests[3] = 5;
        requests.extend(init);
        requests.extend(packet(3, 1, &[&text("/f"), &1_u32.to_be_bytes(), &[0; 4]]));
        for n in 0..600_u32 {
            let offset = u64::from(n) * 32 * 1024;
            requests.extend(packet(
                5,
                2 + n,
                &[&text("1"), &offset.to_be_bytes(), &32_768_u32.to_be_bytes()],
            ));
        }
        channel.data(&requests[..]).await.unwrap();
        // Some replies are under way, and more than the window takes are not.
        eventually("it is read", || s3.count("GetObject") > 1).await;
        s3.reset();
        channel.close().await.unwrap();
    }
    server.drain.cancel();
    drop(client);
    let mut server = server;
    within("the end of all sessions", &mut server.task)
        .await
        .unwrap();
}

/// A client sends CLOSE and does not wait for the answer: the file is stored all the same. Without
/// a CLOSE, the upload is aborted at once.
#[tokio::test]
async fn requests_before_the_end_of_the_channel_are_executed() {
    let s3 = FakeS3::start().await;
    let server = Server::start(s3_store(&s3)).await;
    let client = server.client().await;
    let hold = Arc::new(Notify::new());
    s3.fault("PutObject", When::Nth(1), Fault::Hold(hold.clone()));
    for (path, closes) in [("/whole", true), ("/cut", false)] {
        let channel = client.ssh.sftp_channel().await;
        let mut requests = vec![0, 0, 0, 5, 1, 0, 0, 0, 3];
        requests.extend(packet(3, 1, &[&text(path), &[0, 0, 0, 26], &[0; 4]]));
        requests.extend(packet(6, 2, &[&text("1"), &[0; 8], &text("data")]));
        if closes {
            requests.extend(packet(4, 3, &[&text("1")]));
        }
        channel.data(&requests[..]).await.unwrap();
        channel.close().await.unwrap();
    }
    eventually("the file is on its way", || s3.count("PutObject") == 1).await;
    hold.notify_one();
    eventually("it is stored", || s3.objects() == ["alice/whole"]).await;
    s3.assert_no_uploads();
}

/// As many unanswered bytes as OpenSSH sends, while the store takes none: other channels of the
/// connection go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_stalls_does_not_stop_other_channels() {
    let s3 = FakeS3::start().await;
    let hold = Arc::new(Notify::new());
    s3.fault("UploadPart", When::Every, Fault::Hold(hold.clone()));
    s3.put("alice/f", "content");
    let server = Server::start(s3_store(&s3)).await;
    let client = Arc::new(server.client().await);
    let handle = client.open("/large", PUT).await.unwrap();
    let block = 255 * 1024;
    let data = noise(60 * MIB, 1);
    let writes: Vec<_> = data.chunks(block).map(<[u8]>::to_vec).enumerate().collect();
    let (sender, window) = (client.clone(), Arc::new(tokio::sync::Semaphore::new(64)));
    let writing = tokio::spawn(async move {
        let mut under_way = JoinSet::new();
        for (n, bytes) in writes {
            let place = window.clone().acquire_owned().await.unwrap();
            let (sender, handle) = (sender.clone(), handle.clone());
            under_way.spawn(async move {
                let written = sender.sftp.write(&handle, (n * block) as u64, bytes).await;
                drop(place);
                written.unwrap();
            });
            // In order.
            tokio::task::yield_now().await;
        }
        while let Some(written) = under_way.join_next().await {
            written.unwrap();
        }
        code(sender.close(&handle).await)
    });
    eventually("the parts are held", || s3.count("UploadPart") == 2).await;
    let other = within("another channel", client.ssh.sftp()).await;
    let stat = within("a request on it", other.stat("/f")).await.unwrap();
    assert_eq!(stat.attrs.size, Some(7));
    s3.clear_faults();
    let releasing = tokio::spawn(async move {
        loop {
            hold.notify_waiters();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert_eq!(within("the upload", writing).await.unwrap(), StatusCode::Ok);
    releasing.abort();
    assert!(s3.object("alice/large").unwrap() == data);
    s3.assert_no_uploads();
}

#[tokio::test]
async fn open_files_are_limited_by_user_and_uploads_by_memory() {
    let s3 = FakeS3::start().await;
    s3.put("alice/f", "content");
    let server = Server::with(s3_store(&s3), |builder| builder.max_uploads(8)).await;
    let mut clients = Vec::new();
    let mut opened = 0;
    for _ in 0..5 {
        let client = server.client().await;
        let mut here = 0;
        while client.open("/f", OpenFlags::READ).await.is_ok() {
            here += 1;
        }
        opened += here;
        clients.push(client);
    }
    assert_eq!(opened, sftpd::transfer::MAX_USER_HANDLES);
    // Another user is not affected.
    let other = server.client_as("reader").await;
    assert_eq!(other.get("/f").await.unwrap(), b"content");
    drop(clients);
    let client = within("a place", async {
        loop {
            let client = server.client().await;
            if let Ok(handle) = client.open("/f", OpenFlags::READ).await {
                client.close(&handle).await.unwrap();
                return client;
            }
        }
    })
    .await;
    let mut handles = Vec::new();
    for n in 0..4 {
        handles.push(client.open(&format!("/{n}"), PUT).await.unwrap());
    }
    assert_eq!(
        code(client.open("/more", PUT).await),
        StatusCode::Failure,
        "as many as are free are a user's"
    );
    let writer = server.client_as("writer").await;
    let theirs = [
        writer.open("/a", PUT).await.unwrap(),
        writer.open("/b", PUT).await.unwrap(),
    ];
    assert_eq!(
        code(writer.open("/c", PUT).await),
        StatusCode::Failure,
        "two are left for others"
    );
    client.close(&handles[0]).await.unwrap();
    let third = writer.open("/c", PUT).await.unwrap();
    for handle in theirs.iter().chain([&third]) {
        writer.close(handle).await.unwrap();
    }
}

/// Files that one user has opened and does not read take no read-ahead from another user's
/// download.
#[tokio::test(flavor = "multi_thread")]
async fn open_files_that_are_not_read_do_not_slow_down_other_users() {
    let s3 = FakeS3::start().await;
    let data = noise(16 * MIB, 1);
    s3.put("alice/large", data.clone());
    s3.put("alice/f", noise(300_000, 2));
    let server = Server::with(s3_store(&s3), |builder| builder.buffer_memory(128 << 20)).await;
    let reader = server.client_as("reader").await;
    let mut idle = Vec::new();
    for _ in 0..3 {
        let client = server.client().await;
        for _ in 0..200 {
            client.open("/f", OpenFlags::READ).await.unwrap();
        }
        idle.push(client);
    }
    s3.reset();
    assert!(reader.get("/large").await.unwrap() == data);
    let requests = s3.count("GetObject");
    assert!(requests <= 16, "{requests} requests for 16 MiB");
}

/// One READ, answered and read, of each of as many files as a user may have open.
#[tokio::test(flavor = "multi_thread")]
async fn open_files_that_were_read_stay_inside_the_formula() {
    let s3 = FakeS3::start().await;
    s3.put("alice/f", noise(300_000, 1));
    let process = Process::start(&s3, &["--buffer-memory", "32MiB"]);
    let mut open = Vec::new();
    for _ in 0..4 {
        let client = process.client().await;
        for _ in 0..256 {
            let handle = client.open("/f", OpenFlags::READ).await.unwrap();
            let read = client.sftp.read(&handle, 1000, 255 * 1024).await.unwrap();
            assert_eq!(read.data.len(), 255 * 1024);
        }
        open.push(client);
    }
    let (peak, promise) = (process.peak(), 34 + 32 + 4 * 4);
    assert!(peak <= promise, "{peak} MiB, of {promise}");
}

/// Requests whose replies are not read, until each session is closed.
#[tokio::test(flavor = "multi_thread")]
async fn replies_that_are_not_read_stay_inside_the_formula() {
    let s3 = FakeS3::start().await;
    s3.put("alice/f", "");
    let process = Process::start(&s3, &["--buffer-memory", "32MiB"]);
    // One of ten channels is that of the client itself. All are open before the first floods its
    // connection.
    let clients = [process.client().await, process.client().await];
    let mut channels = Vec::new();
    for n in 0..12 {
        let channel = clients[n / 9].ssh.sftp_channel().await;
        let mut begin = vec![0, 0, 0, 5, 1, 0, 0, 0, 3];
        begin.extend(packet(3, 1, &[&text("/f"), &1_u32.to_be_bytes(), &[0; 4]]));
        channel.data(&begin[..]).await.unwrap();
        channels.push(channel);
    }
    let mut asking = JoinSet::new();
    for (kind, channel) in channels.into_iter().enumerate() {
        asking.spawn(async move {
            let mut requests = Vec::new();
            for id in 0..1000 {
                // FSTAT of no handle, READ behind the end, READ of nothing.
                requests.extend(match kind % 3 {
                    0 => packet(8, id, &[&text("none")]),
                    1 => packet(5, id, &[&text("1"), &[1; 8], &[0, 0, 1, 0]]),
                    _ => packet(5, id, &[&text("1"), &[0; 8], &[0; 4]]),
                });
            }
            for _ in 0..400 {
                if channel.data(&requests[..]).await.is_err() {
                    break;
                }
            }
        });
    }
    let _ = tokio::time::timeout(Duration::from_secs(20), asking.join_all()).await;
    let (peak, promise) = (process.peak(), 34 + 32 + 12 * 4);
    assert!(peak <= promise, "{peak} MiB, of {promise}");
}

/// Channels that are opened and given up, one after the other. russh keeps something of each that
/// the server closes first.
#[tokio::test(flavor = "multi_thread")]
async fn channels_that_the_server_has_closed_stay_inside_the_formula() {
    let s3 = FakeS3::start().await;
    let process = Process::start(&s3, &["--buffer-memory", "32MiB"]);
    let mut client = SshClient::connect(process.address).await;
    assert!(client.login("alice", PASSWORD).await);
    let before = process.resident();
    let mut opened = 0;
    while opened < 20_000 && !client.is_closed() {
        // Refused while ten are open.
        if let Ok(channel) = client.channel().await {
            channel.eof().await.unwrap();
            opened += 1;
        }
    }
    let grown = process.resident() - before;
    assert!(grown <= 6, "{grown} MiB for {opened} channels");
    assert_eq!(opened, 1000);
    eventually("the line of its end", || {
        process.logged("disconnected: too many channels") == 1
    })
    .await;
}

/// Nothing is kept of channels that the client closes: a connection may have any number of them.
#[tokio::test(flavor = "multi_thread")]
async fn channels_that_the_client_has_closed_are_not_counted() {
    let s3 = FakeS3::start().await;
    let server = Server::start(s3_store(&s3)).await;
    let client = server.client().await;
    let mut opened = 0;
    while opened < 3000 {
        if let Ok(channel) = client.ssh.channel().await {
            channel.close().await.unwrap();
            opened += 1;
        }
    }
    client.put("/f", b"content").await.unwrap();
}

/// The memory for the names in a directory that is renamed comes out of the pool.
#[tokio::test]
async fn a_rename_of_more_names_than_the_pool_holds_fails() {
    let s3 = FakeS3::start().await;
    let name = "x".repeat(200);
    (0..3000).for_each(|n| s3.put(&format!("alice/d/{name}{n}"), ""));
    let server = Server::with(s3_store(&s3), |builder| {
        // Unchecked: less than four parts.
        builder
            .part_sizes(PartSizes::default())
            .buffer_memory(8 << 20)
    })
    .await;
    let client = server.client().await;
    assert_eq!(
        code(client.sftp.rename("/d", "/e").await),
        StatusCode::Failure
    );
    assert_eq!((s3.objects().len(), s3.count("CopyObject")), (3000, 0));
}

#[tokio::test]
async fn one_user_does_not_take_every_connection() {
    let store = Arc::new(MemoryStore::default());
    let server = Server::with(store, |builder| builder.max_sessions(40)).await;
    let mut held = Vec::new();
    let refused = loop {
        assert!(held.len() < 40, "alice has every place");
        let mut ssh = SshClient::connect(server.address).await;
        match ssh.login("alice", PASSWORD).await {
            true => held.push(ssh),
            false => break ssh,
        }
    };
    assert_eq!(held.len(), 10);
    let said = refused.last_words().await;
    assert!(said.contains("too many connections of this user"), "{said}");
    // The password was right: no penalty.
    for _ in 0..20 {
        let mut ssh = SshClient::connect(server.address).await;
        assert!(!ssh.login("alice", PASSWORD).await);
    }
    let other = server.client_as("writer").await;
    other.put("/f", b"x").await.unwrap();
    drop(held.pop());
    within("a place is free", async {
        while Client::try_connect(server.address).await.is_none() {}
    })
    .await;
}

/// The names of both directories together are more than the share of the pool for them.
#[tokio::test]
async fn the_rename_of_a_large_directory_waits_for_another_one() {
    let (released, hold) = watch::channel(false);
    let (renames, lists) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut store = Hooked::new({
        let (renames, lists) = (renames.clone(), lists.clone());
        move |method| {
            let counted = match method {
                "rename" => Some(&renames),
                "list" => Some(&lists),
                _ => None,
            };
            if let Some(count) = counted {
                count.fetch_add(1, Ordering::Relaxed);
            }
            let mut hold = hold.clone();
            Box::pin(async move {
                if method == "rename" {
                    hold.wait_for(|released| *released).await.unwrap();
                }
                Ok(())
            })
        }
    });
    store.store = MemoryStore::default();
    let long = "x".repeat(200);
    for n in 0..4000 {
        for directory in ["a", "b"] {
            let key = Key::new(format!("alice/{directory}/{long}{n}")).unwrap();
            let (attributes, free) = (Attributes::default(), Condition::None);
            store
                .store
                .put(&key, Bytes::new(), &attributes, &free)
                .await
                .unwrap();
        }
    }
    let server = Server::with(Arc::new(store), |builder| builder.buffer_memory(20 << 20)).await;
    let (first, second) = (server.client().await, server.client().await);
    let first = tokio::spawn(async move { first.posix_rename("/a", "/c").await });
    eventually("the names of the first are listed", || {
        renames.load(Ordering::Relaxed) > 0
    })
    .await;
    let before = lists.load(Ordering::Relaxed);
    let second = tokio::spawn(async move { second.posix_rename("/b", "/d").await });
    eventually("the memory is used up", || {
        lists.load(Ordering::Relaxed) > before + 3
    })
    .await;
    released.send_replace(true);
    within("the first", first).await.unwrap().unwrap();
    within("the second", second).await.unwrap().unwrap();
    assert_eq!(server.client().await.list("/d").await.unwrap().len(), 4000);
}
