//! Files opened for writing: in any order, over an old object, at its end, in its middle, and what
//! can go wrong.
//!
//! Each test ends with the same check: the object's bytes are exact, and no multipart upload is in
//! progress.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use futures_util::{StreamExt, stream::FuturesUnordered};
use russh_sftp::protocol::{FileAttributes, OpenFlags, StatusCode};
use sftpd::transfer::{ANSWERED_AHEAD, MAX_EARLY, MAX_HOLES, PartSizes, REORDER_WINDOW};
use std::time::Duration;
use support::s3::{FakeS3, Fault, When};
use support::*;

const EDIT: OpenFlags = OpenFlags::READ.union(OpenFlags::WRITE);
/// As scp opens its target: without TRUNC.
const OVERWRITE: OpenFlags = OpenFlags::WRITE.union(OpenFlags::CREATE);

async fn world() -> (FakeS3, Server, Client) {
    let s3 = FakeS3::start().await;
    let server = Server::start(s3_store(&s3)).await;
    let client = server.client().await;
    (s3, server, client)
}

fn size(size: u64) -> FileAttributes {
    FileAttributes {
        size: Some(size),
        ..Default::default()
    }
}

fn assert_object(s3: &FakeS3, key: &str, want: &[u8]) {
    s3.assert_no_uploads();
    let body = s3.object(key).expect("the object exists");
    let differs = body.iter().zip(want).position(|(a, b)| a != b);
    assert!(
        body == want,
        "{key}: {} bytes for {}, first difference at {differs:?}",
        body.len(),
        want.len()
    );
}

#[tokio::test]
async fn blocks_may_come_in_any_order_within_the_window() {
    let (s3, _server, client) = world().await;
    let data = noise(11 * MIB, 1);
    let handle = client.open("/f", PUT).await.unwrap();
    let mut blocks: Vec<(usize, &[u8])> = data.chunks(100_000).enumerate().collect();
    // Neighbours swapped, and runs of eight reversed.
    blocks.chunks_mut(8).for_each(<[_]>::reverse);
    for (n, block) in blocks {
        client
            .write(&handle, n as u64 * 100_000, block)
            .await
            .unwrap();
    }
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/f", &data);
}

/// As Node's `ssh2` does: several blocks of 32 KiB are under way, in the order in which its reads
/// of the local file end, and one of these reads may take long. The client stops only when all
/// other blocks wait for their answers.
#[tokio::test]
async fn a_block_that_comes_after_all_others_closes_the_gap() {
    const BLOCK: usize = 32 * 1024;
    let (s3, _server, client) = world().await;
    for (under_way, first) in [(64, 0), (128, 0), (64, 150), (128, 159)] {
        let data = noise(14 * MIB + 77, 1);
        let handle = client.open("/f", PUT).await.unwrap();
        let write = |n: usize| {
            let block = data[n * BLOCK..data.len().min((n + 1) * BLOCK)].to_vec();
            client.sftp.write(&handle, (n * BLOCK) as u64, block)
        };
        let blocks = data.len().div_ceil(BLOCK);
        for n in 0..first {
            write(n).await.unwrap();
        }
        let mut next = first + 1;
        let mut answers = FuturesUnordered::new();
        // Each answer lets another block be sent, until no more answers come.
        while answers.len() < under_way - 1 {
            answers.push(write(next));
            next += 1;
            while let Ok(Some(answer)) =
                tokio::time::timeout(Duration::from_millis(20), answers.next()).await
            {
                answer.unwrap();
            }
        }
        assert!(
            next > first + under_way,
            "only {} blocks came early",
            next - first
        );
        answers.push(write(first));
        for n in next..blocks {
            answers.next().await.unwrap().unwrap();
            answers.push(write(n));
        }
        while let Some(answer) = answers.next().await {
            answer.unwrap();
        }
        client.close(&handle).await.unwrap();
        assert_object(&s3, "alice/f", &data);
    }
}

/// A client that waits for each answer gets it.
#[tokio::test]
async fn a_write_far_ahead_is_answered_in_the_end() {
    let (s3, _server, client) = world().await;
    let handle = client.open("/f", PUT).await.unwrap();
    let data = noise(3 * MIB, 1);
    client
        .sftp
        .write(&handle, 2 << 20, data[2 * MIB..2 * MIB + 1000].to_vec())
        .await
        .unwrap();
    client.write(&handle, 0, &data).await.unwrap();
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/f", &data);
}

/// The memory for what is written out of order is bounded.
#[tokio::test]
async fn writes_ahead_of_a_gap_are_bounded() {
    let (s3, _server, client) = world().await;
    // The same block again and again, in a part that has not begun.
    let handle = client.open("/f", PUT).await.unwrap();
    let block = vec![7; 200_000];
    let most = MAX_EARLY as usize / block.len();
    let mut writes: FuturesUnordered<_> = (0..most + 2)
        .map(|_| client.sftp.write(&handle, 6 << 20, block.clone()))
        .collect();
    let mut refused = 0;
    while let Some(answer) = writes.next().await {
        refused += usize::from(answer.is_err());
    }
    assert!(refused > 0, "{most} blocks were kept");
    assert_eq!(code(client.close(&handle).await), StatusCode::Failure);
    assert_eq!(s3.objects(), [""; 0]);
    s3.assert_no_uploads();
}

#[tokio::test]
async fn bytes_in_ram_can_be_rewritten() {
    let (s3, _server, client) = world().await;
    let handle = client.open("/f", PUT).await.unwrap();
    client.write(&handle, 0, b"hello world").await.unwrap();
    client.write(&handle, 6, b"there").await.unwrap();
    client.write(&handle, 0, b"J").await.unwrap();
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/f", b"Jello there");
}

#[tokio::test]
async fn a_rewrite_of_bytes_already_sent_fails_the_upload() {
    let (s3, _server, client) = world().await;
    s3.put("alice/f", "old");
    let handle = client.open("/f", PUT).await.unwrap();
    let data = noise(6 * MIB, 1);
    client.write(&handle, 0, &data).await.unwrap();
    let refused = client.write(&handle, 10, b"x").await.unwrap_err();
    assert_eq!(refused.0, StatusCode::Failure);
    assert_eq!(numbers_in(&refused.1), [10, 5 << 20], "{}", refused.1);
    let later = client
        .write(&handle, data.len() as u64, b"x")
        .await
        .unwrap_err();
    assert_eq!(later, refused, "the failure sticks");
    assert_eq!(client.close(&handle).await.unwrap_err(), refused);
    assert_object(&s3, "alice/f", b"old");
}

/// A sparse file, as asyncssh and `cp --sparse` send it.
#[tokio::test]
async fn holes_are_filled_with_zeros() {
    let (s3, _server, client) = world().await;
    let block = noise(1000, 1);
    for offsets in [
        vec![0, 5000],
        vec![3],
        vec![0, 12 << 20],
        vec![20 << 20, 40 << 20],
        vec![0, REORDER_WINDOW + 1001],
    ] {
        let handle = client.open("/f", PUT).await.unwrap();
        let mut want = Vec::new();
        for offset in offsets {
            client.write(&handle, offset, &block).await.unwrap();
            want.resize(offset as usize, 0);
            want.extend(&block);
        }
        client.close(&handle).await.unwrap();
        assert_object(&s3, "alice/f", &want);
    }
    // What is behind the end of the old object is a hole, its bytes are not.
    s3.put("alice/f", "0123456789");
    let handle = client.open("/f", EDIT).await.unwrap();
    client.write(&handle, 12, b"x").await.unwrap();
    client.sftp.fsetstat(&handle, size(15)).await.unwrap();
    assert_eq!(
        client.sftp.fstat(&handle).await.unwrap().attrs.size,
        Some(15)
    );
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/f", b"0123456789\0\0x\0\0");
    s3.assert_no_uploads();
}

/// A hole is stored: every 5 MiB of zeros are a part.
#[tokio::test]
async fn the_size_of_holes_is_limited() {
    let (s3, _server, client) = world().await;
    let handle = client.open("/f", PUT).await.unwrap();
    let beyond = client.sftp.fsetstat(&handle, size(MAX_HOLES + 1)).await;
    assert_eq!(code(beyond), StatusCode::OpUnsupported);
    let far = MAX_HOLES + ANSWERED_AHEAD + 1;
    assert_eq!(
        code(client.write(&handle, far, b"x").await),
        StatusCode::Failure
    );
    assert_eq!(code(client.close(&handle).await), StatusCode::Failure);
    assert_eq!(s3.objects(), [""; 0]);
    s3.assert_no_uploads();
}

#[tokio::test]
async fn an_overwrite_like_that_of_scp_transfers_no_old_byte() {
    let (s3, _server, client) = world().await;
    for (old, new) in [
        (100, 40),
        (40, 100),
        (12 * MIB, 7 * MIB),
        (7 * MIB, 12 * MIB),
        (12 * MIB, 100),
        (3, 0),
    ] {
        s3.put("alice/f", noise(old, 1));
        s3.reset();
        let data = noise(new, 2);
        let handle = client.open("/f", OVERWRITE).await.unwrap();
        client.write(&handle, 0, &data).await.unwrap();
        client
            .sftp
            .fsetstat(&handle, size(new as u64))
            .await
            .unwrap();
        client.close(&handle).await.unwrap();
        assert_object(&s3, "alice/f", &data);
        assert_eq!(
            s3.count("GetObject") + s3.count("UploadPartCopy"),
            0,
            "{old} → {new}"
        );
        assert_eq!(s3.count("HeadObject"), 1);
    }
}

#[tokio::test]
async fn bytes_that_are_not_overwritten_are_kept() {
    let (s3, _server, client) = world().await;
    for (old, at, new) in [
        (100, 0, 40),
        (100, 50, 10),
        (100, 95, 10),
        (5 * MIB, 1000, 10),
        (12 * MIB, 0, 10),
        (12 * MIB, 0, 6 * MIB),
        (12 * MIB, 11 * MIB, 10),
        (12 * MIB, 6 * MIB, 8 * MIB),
        (20 * MIB, 7 * MIB, 6 * MIB),
    ] {
        let before = noise(old, 1);
        s3.put("alice/f", before.clone());
        let data = noise(new, 2);
        let handle = client.open("/f", EDIT).await.unwrap();
        client.write(&handle, at as u64, &data).await.unwrap();
        client.close(&handle).await.unwrap();
        let mut want = before.to_vec();
        want.resize(want.len().max(at + new), 0);
        want[at..at + new].copy_from_slice(&data);
        assert_object(&s3, "alice/f", &want);
    }
}

#[tokio::test]
async fn appends_copy_inside_the_store() {
    let (s3, _server, client) = world().await;
    for old in [0, 10, 5 * MIB - 1, 5 * MIB, 5 * MIB + 1, 12 * MIB] {
        for flags in [OpenFlags::WRITE, OpenFlags::WRITE | OpenFlags::APPEND] {
            let before = noise(old, 1);
            s3.put("alice/f", before.clone());
            s3.reset();
            let handle = client.open("/f", flags).await.unwrap();
            // With APPEND the offset does not matter.
            let at = if flags.contains(OpenFlags::APPEND) {
                3
            } else {
                old
            };
            client.write(&handle, at as u64, b"the end").await.unwrap();
            client.close(&handle).await.unwrap();
            assert_object(&s3, "alice/f", &[&before[..], b"the end"].concat());
            let copies = s3.count("UploadPartCopy");
            assert_eq!(copies, usize::from(old > 5 * MIB), "{old}");
        }
    }
}

#[tokio::test]
async fn edits_that_cannot_be_completed_leave_the_old_object() {
    let (s3, _server, client) = world().await;
    let before = noise(20 * MIB, 1);
    s3.put("alice/f", before.clone());
    let handle = client.open("/f", EDIT).await.unwrap();
    client.write(&handle, 15 << 20, b"late").await.unwrap();
    assert_eq!(
        code(client.write(&handle, 1 << 20, b"early").await),
        StatusCode::Failure
    );
    assert_eq!(code(client.close(&handle).await), StatusCode::Failure);
    assert_object(&s3, "alice/f", &before);
}

#[tokio::test]
async fn a_file_closed_without_a_write_is_kept_or_created_empty() {
    let (s3, _server, client) = world().await;
    s3.put("alice/f", "old");
    let handle = client.open("/f", EDIT).await.unwrap();
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/f", b"old");
    assert_eq!(s3.count("PutObject"), 0);
    let handle = client.open("/new", OVERWRITE).await.unwrap();
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/new", b"");
    assert_eq!(
        code(client.open("/none", EDIT).await),
        StatusCode::NoSuchFile
    );
}

#[tokio::test]
async fn a_file_being_edited_can_be_read() {
    let (s3, _server, client) = world().await;
    s3.put("alice/f", "0123456789");
    let handle = client.open("/f", EDIT).await.unwrap();
    assert_eq!(client.read_to_end(&handle).await.unwrap(), b"0123456789");
    client.write(&handle, 2, b"xy").await.unwrap();
    assert_eq!(client.read_to_end(&handle).await.unwrap(), b"01xy456789");
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/f", b"01xy456789");
}

/// A short read would be taken for the end of the file.
#[tokio::test]
async fn a_read_of_a_file_being_edited_goes_on_into_the_old_object() {
    let (s3, _server, client) = world().await;
    let mut want = noise(100_000, 1).to_vec();
    s3.put("alice/f", want.clone());
    let handle = client.open("/f", EDIT).await.unwrap();
    client.write(&handle, 50_000, b"0123456789").await.unwrap();
    want[50_000..50_010].copy_from_slice(b"0123456789");
    for (offset, len) in [
        (40_000, 32_768),
        (50_005, 100),
        (0, 90_000),
        (70_000, 200_000),
        (99_999, 1),
    ] {
        let read = client
            .sftp
            .read(&handle, offset as u64, len as u32)
            .await
            .unwrap();
        assert!(
            read.data == want[offset..want.len().min(offset + len)],
            "{len} bytes at {offset}"
        );
    }
    assert_eq!(
        code(client.sftp.read(&handle, 100_000, 1).await),
        StatusCode::Eof
    );
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/f", &want);
}

/// As paramiko's `open("r+b").prefetch()` does: all READs at once, far more than fit into memory.
#[tokio::test]
async fn many_reads_at_once_of_a_file_being_edited_are_all_answered() {
    let (s3, _server, client) = world().await;
    let data = noise(20 * MIB, 1);
    s3.put("alice/f", data.clone());
    let handle = client.open("/f", EDIT).await.unwrap();
    let reads = (0..data.len())
        .step_by(32 * 1024)
        .map(|at| client.sftp.read(&handle, at as u64, 32 * 1024));
    let all: Vec<_> = futures_util::future::join_all(reads).await;
    let got: Vec<u8> = all
        .into_iter()
        .flat_map(|read| read.unwrap().data)
        .collect();
    assert!(got == data);
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/f", &data);
}

#[tokio::test]
async fn truncations_apply_to_bytes_in_ram_and_to_the_old_object() {
    let (s3, _server, client) = world().await;
    let handle = client.open("/f", PUT).await.unwrap();
    client.write(&handle, 0, &noise(6 * MIB, 1)).await.unwrap();
    assert_eq!(
        code(client.sftp.fsetstat(&handle, size(10)).await),
        StatusCode::OpUnsupported,
        "bytes that were sent can't be truncated"
    );
    client.sftp.fsetstat(&handle, size(6 << 20)).await.unwrap();
    client.sftp.fsetstat(&handle, size(0)).await.unwrap();
    client.write(&handle, 0, b"short").await.unwrap();
    client.sftp.fsetstat(&handle, size(2)).await.unwrap();
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/f", b"sh");

    s3.put("alice/f", "0123456789");
    let handle = client.open("/f", EDIT).await.unwrap();
    client.sftp.fsetstat(&handle, size(4)).await.unwrap();
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/f", b"0123");
}

#[tokio::test]
async fn parts_grow_and_their_number_is_limited() {
    let s3 = FakeS3::start().await;
    s3.set_min_part(1);
    let small = PartSizes {
        first: 1000,
        cap: 4000,
        double_every: 3,
        ..PartSizes::default()
    };
    let server = Server::with(s3_store(&s3), |builder| builder.part_sizes(small)).await;
    let client = server.client().await;
    let data = noise(50_000, 1);
    client.put("/f", &data).await.unwrap();
    assert_object(&s3, "alice/f", &data);
    // 3 of 1,000, 3 of 2,000, then 4,000 each.
    assert_eq!(s3.count("UploadPart"), 17);

    let tiny = PartSizes {
        first: 1,
        cap: 1,
        double_every: 0,
        ..PartSizes::default()
    };
    let server = Server::with(s3_store(&s3), |builder| builder.part_sizes(tiny)).await;
    let client = server.client().await;
    let handle = client.open("/g", PUT).await.unwrap();
    let Failed(status, message) = client.write(&handle, 0, &data[..10_001]).await.unwrap_err();
    assert_eq!(status, StatusCode::Failure, "{message}");
    assert!(message.contains("10000 bytes"), "{message}");
    assert_eq!(code(client.close(&handle).await), StatusCode::Failure);
    s3.assert_no_uploads();
    assert_eq!(s3.objects(), ["alice/f"]);
}

#[tokio::test]
async fn a_failed_part_fails_the_upload() {
    let (s3, _server, client) = world().await;
    s3.put("alice/f", "old");
    s3.fault(
        "UploadPart",
        When::Nth(1),
        Fault::Status(403, "AccessDenied"),
    );
    let handle = client.open("/f", PUT).await.unwrap();
    let written = client.write(&handle, 0, &noise(12 * MIB, 1)).await;
    let closed = client.close(&handle).await;
    assert_eq!(
        code(closed),
        StatusCode::PermissionDenied,
        "after {written:?}"
    );
    assert_object(&s3, "alice/f", b"old");
}

#[tokio::test]
async fn transient_faults_are_retried() {
    let (s3, _server, client) = world().await;
    let data = noise(12 * MIB, 1);
    for op in [
        "PutObject",
        "CreateMultipartUpload",
        "UploadPart",
        "CompleteMultipartUpload",
    ] {
        for fault in [
            Fault::Status(500, "InternalError"),
            Fault::Status(503, "SlowDown"),
            Fault::ResetBefore,
        ] {
            s3.fault(op, When::Nth(1), fault);
            let data = if op == "PutObject" {
                &data[..100]
            } else {
                &data[..]
            };
            client
                .put("/f", data)
                .await
                .unwrap_or_else(|failed| panic!("{op}: {failed:?}"));
            assert_object(&s3, "alice/f", data);
            s3.clear_faults();
        }
    }
}

#[tokio::test]
async fn after_a_lost_answer_the_stored_object_decides() {
    let (s3, _server, client) = world().await;
    for (op, len) in [("PutObject", 100), ("CompleteMultipartUpload", 12 * MIB)] {
        s3.put("alice/f", "old");
        let data = noise(len, 1);
        // Executed, and the answer lost: the retry finds no upload.
        s3.fault(op, When::Nth(1), Fault::LostAnswer);
        client
            .put("/f", &data)
            .await
            .unwrap_or_else(|failed| panic!("{op}: {failed:?}"));
        assert_object(&s3, "alice/f", &data);
        s3.clear_faults();
        // Never executed: what is there is another client's.
        s3.put("alice/f", noise(len, 2));
        s3.fault(op, When::Every, Fault::ResetBefore);
        assert_eq!(
            code(client.put("/f", &data).await),
            StatusCode::Failure,
            "{op}"
        );
        s3.clear_faults();
        assert_object(&s3, "alice/f", &noise(len, 2));
    }
    s3.fault("CompleteMultipartUpload", When::Every, Fault::ErrorBody);
    assert_eq!(
        code(client.put("/f", &noise(12 * MIB, 3)).await),
        StatusCode::Failure
    );
    assert_object(&s3, "alice/f", &noise(12 * MIB, 2));
}

#[tokio::test]
async fn an_excl_put_whose_answer_was_lost_succeeds() {
    let (s3, _server, client) = world().await;
    s3.fault("PutObject", When::Nth(1), Fault::LostAnswer);
    let handle = client
        .open("/f", OVERWRITE | OpenFlags::EXCLUDE)
        .await
        .unwrap();
    client.write(&handle, 0, b"mine").await.unwrap();
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/f", b"mine");
}

#[tokio::test]
async fn a_disconnect_while_parts_are_in_flight_leaves_nothing() {
    let (s3, server, client) = world().await;
    let hold = std::sync::Arc::new(tokio::sync::Notify::new());
    s3.fault("UploadPart", When::Every, Fault::Hold(hold.clone()));
    let handle = client.open("/f", PUT).await.unwrap();
    client.write(&handle, 0, &noise(11 * MIB, 1)).await.unwrap();
    eventually("two parts are in flight", || s3.count("UploadPart") == 2).await;
    drop(client);
    // An abort now would leave parts that arrive after it.
    assert_eq!(s3.count("AbortMultipartUpload"), 0);
    hold.notify_one();
    hold.notify_one();
    eventually("the upload is aborted", || {
        s3.count("AbortMultipartUpload") == 1
    })
    .await;
    eventually("no upload is in progress", || s3.uploads() == 0).await;
    assert_eq!(s3.objects(), [""; 0]);
    drop(server);
}

#[tokio::test]
async fn more_uploads_than_the_pool_holds_all_arrive() {
    let s3 = FakeS3::start().await;
    let server = Server::with(s3_store(&s3), |builder| builder.buffer_memory(20 << 20)).await;
    let mut puts = tokio::task::JoinSet::new();
    for n in 0..12 {
        let client = server.client().await;
        puts.spawn(async move {
            let data = noise(11 * MIB, n);
            client.put(&format!("/{n}"), &data).await.unwrap();
            (format!("alice/{n}"), data)
        });
    }
    while let Some(put) = puts.join_next().await {
        let (key, data) = put.unwrap();
        assert_eq!(s3.object(&key).unwrap(), data);
    }
    s3.assert_no_uploads();
}

#[tokio::test]
async fn slow_downloads_do_not_starve_an_upload() {
    let s3 = FakeS3::start().await;
    let server = Server::with(s3_store(&s3), |builder| builder.buffer_memory(20 << 20)).await;
    s3.put("alice/big", noise(40 * MIB, 1));
    let mut readers = Vec::new();
    for _ in 0..6 {
        let client = server.client().await;
        let handle = client.open("/big", OpenFlags::READ).await.unwrap();
        for at in 0..100 {
            client.sftp.read(&handle, at * 32768, 32768).await.unwrap();
        }
        readers.push((client, handle));
    }
    let data = noise(22 * MIB, 2);
    let client = server.client().await;
    let put = tokio::time::timeout(Duration::from_secs(60), client.put("/f", &data)).await;
    put.expect("the upload gets its memory").unwrap();
    assert_object(&s3, "alice/f", &data);
    for (client, handle) in readers {
        client.sftp.read(&handle, 100 * 32768, 32768).await.unwrap();
    }
}
