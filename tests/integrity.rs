//! That S3 checks what it was sent, and that nothing of a server that died stays.

// A panic is how a test fails.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use aws_sdk_s3::config::RequestChecksumCalculation;
use sftpd::store::{Attributes, Condition, Key, Store};
use std::time::Duration;
use support::binary::Process;
use support::s3::{FakeS3, Fault, When};
use support::*;

/// As with AWS, and wherever the settings ask for it. The S3 of the tests refuses a checksum that is wrong, that it was
/// not told of at the beginning, or that is missing at the end.
#[tokio::test]
async fn parts_carry_checksums_and_complete_repeats_them() {
    let s3 = FakeS3::start().await;
    let always = RequestChecksumCalculation::WhenSupported;
    let server = Server::start(s3_store_with(&s3, |config| {
        config.request_checksum_calculation(always)
    }))
    .await;
    let client = server.client().await;
    for size in [1000, 12 * MIB] {
        let data = noise(size, 1);
        client.put("/f", &data).await.unwrap();
        assert!(client.get("/f").await.unwrap() == data);
    }
    assert_eq!(s3.count("UploadPart"), 3);
    assert_clean(&s3);
}

#[tokio::test]
async fn an_object_of_another_size_is_refused_by_the_store() {
    let s3 = FakeS3::start().await;
    let (store, key) = (s3_store(&s3), Key::new("k").unwrap());
    let id = store
        .create_upload(&key, &Attributes::default())
        .await
        .unwrap();
    let mut part = store
        .upload_part(&key, &id, 1, noise(1000, 1))
        .await
        .unwrap();
    part.size += 1;
    store
        .complete(&key, &id, &[part], &Condition::None)
        .await
        .unwrap_err();
    assert_eq!(s3.objects(), [""; 0]);
}

/// An upload to this key that was begun and never ended.
async fn left(store: &dyn Store, key: &str, parts: &[(u32, usize)]) -> String {
    let key = Key::new(key).unwrap();
    let id = store
        .create_upload(&key, &Attributes::default())
        .await
        .unwrap();
    for (number, size) in parts {
        store
            .upload_part(&key, &id, *number, noise(*size, 1))
            .await
            .unwrap();
    }
    id
}

#[tokio::test]
async fn only_our_own_old_uploads_are_aborted() {
    let s3 = FakeS3::start().await;
    let store = s3_store(&s3);
    left(store.as_ref(), "inbox/alice/a", &[(1, 5 * MIB), (3, MIB)]).await;
    left(
        store.as_ref(),
        "inbox/alice/other-sizes",
        &[(1, 6 * MIB), (2, MIB)],
    )
    .await;
    left(store.as_ref(), "inbox/alice/no-part", &[]).await;
    left(store.as_ref(), "outbox/elsewhere", &[(1, 5 * MIB)]).await;
    // Of a server that ended while it asked for its own name.
    left(store.as_ref(), "inbox/.sftpd-probe-0123456789abcdef", &[]).await;
    s3.give_away(&left(store.as_ref(), "inbox/alice/theirs", &[(1, 5 * MIB)]).await);
    let young = Server::with(store.clone(), |config| config.prefix = "inbox".to_owned()).await;
    young
        .client()
        .await
        .put("/f", &noise(6 * MIB, 1))
        .await
        .unwrap();
    eventually("the first look", || s3.count("ListMultipartUploads") > 0).await;
    assert_eq!((s3.uploads(), s3.count("AbortMultipartUpload")), (6, 0));
    let _old = Server::with(store, |config| {
        (config.prefix, config.abandoned_after) = ("inbox".to_owned(), Duration::ZERO);
    })
    .await;
    // One is what it learned its own name from.
    eventually("the aborts", || s3.count("AbortMultipartUpload") == 3).await;
    eventually("the end of the look", || s3.uploads() == 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_server_leaves_the_next_one_aborts() {
    let s3 = FakeS3::start().await;
    let mut killed = Process::start(&s3, &[]);
    let client = killed.server.client().await;
    let handle = client.open("/big", PUT).await.unwrap();
    client.write(&handle, 0, &noise(17 * MIB, 1)).await.unwrap();
    eventually("parts that are stored", || s3.count("UploadPart") >= 2).await;
    killed.child.kill().unwrap();
    killed.child.wait().unwrap();
    assert_eq!((s3.uploads(), s3.objects().len()), (1, 0));
    s3.age_uploads(Duration::from_secs(25 * 60 * 60));
    let next = Process::start(&s3, &[]);
    eventually("the abort", || s3.uploads() == 0).await;
    next.server
        .client()
        .await
        .put("/small", b"x")
        .await
        .unwrap();
    assert_eq!(s3.objects(), ["alice/small"]);
}

/// Clients choose names, and a log is read line by line.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_writes_lines_of_their_own_into_the_log() {
    let s3 = FakeS3::start().await;
    let process = Process::start(&s3, &[]);
    let evil = "x\n[2026-01-01T00:00:00Z INFO  sftpd] alice: logged in\u{1b}[2J";
    assert!(
        Client::login(&process.server, evil, "guess")
            .await
            .is_none()
    );
    let client = process.server.client().await;
    // What S3 says of it is logged too.
    s3.fault("PutObject", When::Every, Fault::Status(403, "AccessDenied"));
    client.put(&format!("/{evil}"), b"x").await.unwrap_err();
    eventually("the lines", || {
        process.logged("login failed") == 1 && process.logged("failed after 1 bytes") == 1
    })
    .await;
    assert_eq!(
        (process.logged("\u{1b}"), process.logged("[2026-01-01")),
        (0, 2)
    );
    assert_eq!(process.logged("x\\n[2026-01-01"), 2);
}
