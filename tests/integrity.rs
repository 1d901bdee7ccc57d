//! S3 checks what it receives, and uploads of a server that was killed are aborted.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use aws_sdk_s3::config::RequestChecksumCalculation;
use sftpd::store::{Attributes, Condition, Key, Store};
use std::time::Duration;
use support::process::Process;
use support::s3::{FakeS3, Fault, When};
use support::*;

/// As with AWS, and wherever the settings ask for it. The S3 of the tests refuses a checksum that
/// is wrong, that was not announced at the beginning, or that is missing at the end.
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
    s3.assert_no_uploads();
}

#[tokio::test]
async fn complete_with_a_wrong_size_is_refused_by_the_store() {
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

/// Begins an upload to this key and leaves it incomplete; its id.
async fn leave_upload(store: &dyn Store, key: &str, parts: &[(u32, usize)]) -> String {
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
async fn only_old_uploads_of_our_own_are_aborted() {
    let s3 = FakeS3::start().await;
    let store = s3_store(&s3);
    leave_upload(store.as_ref(), "inbox/alice/a", &[(1, 5 * MIB), (3, MIB)]).await;
    leave_upload(
        store.as_ref(),
        "inbox/alice/other-sizes",
        &[(1, 6 * MIB), (2, MIB)],
    )
    .await;
    leave_upload(store.as_ref(), "inbox/alice/no-part", &[]).await;
    leave_upload(store.as_ref(), "outbox/elsewhere", &[(1, 5 * MIB)]).await;
    // From a server that ended while it looked up its own name.
    leave_upload(store.as_ref(), "inbox/.sftpd-probe-0123456789abcdef", &[]).await;
    s3.give_away(&leave_upload(store.as_ref(), "inbox/alice/theirs", &[(1, 5 * MIB)]).await);
    let young = Server::with(store.clone(), |builder| builder.prefix("inbox")).await;
    young
        .client()
        .await
        .put("/f", &noise(6 * MIB, 1))
        .await
        .unwrap();
    eventually("the first look", || s3.count("ListMultipartUploads") > 0).await;
    assert_eq!((s3.uploads(), s3.count("AbortMultipartUpload")), (6, 0));
    let _old = Server::with(store, |builder| {
        builder.prefix("inbox").abandoned_after_any(Duration::ZERO)
    })
    .await;
    // One of them is the upload from which it learns its own name.
    eventually("the aborts", || s3.count("AbortMultipartUpload") == 3).await;
    eventually("the end of the look", || s3.uploads() == 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_of_a_killed_server_are_aborted_by_the_next_one() {
    let s3 = FakeS3::start().await;
    let mut killed = Process::start(&s3, &[]);
    let client = killed.client().await;
    let handle = client.open("/big", PUT).await.unwrap();
    client.write(&handle, 0, &noise(17 * MIB, 1)).await.unwrap();
    // A part that arrives after the kill would make the upload young again.
    eventually("all full parts are stored", || s3.parts() == 3).await;
    killed.child.kill().unwrap();
    killed.child.wait().unwrap();
    assert_eq!((s3.uploads(), s3.objects().len()), (1, 0));
    s3.age_uploads(Duration::from_secs(25 * 60 * 60));
    let next = Process::start(&s3, &[]);
    eventually("the abort", || s3.uploads() == 0).await;
    next.client().await.put("/small", b"x").await.unwrap();
    assert_eq!(s3.objects(), ["alice/small"]);
}

/// Clients choose names, and log readers take each line for an entry.
#[tokio::test(flavor = "multi_thread")]
async fn names_chosen_by_clients_cannot_forge_log_lines() {
    let s3 = FakeS3::start().await;
    let process = Process::start(&s3, &[]);
    let evil = "x\n[2026-01-01T00:00:00Z INFO  sftpd] alice: logged in\u{1b}[2J";
    assert!(
        Client::login(process.address, evil, "guess")
            .await
            .is_none()
    );
    let client = process.client().await;
    // The error of S3 is logged too.
    s3.fault("PutObject", When::Every, Fault::Status(403, "AccessDenied"));
    client.put(&format!("/{evil}"), b"x").await.unwrap_err();
    eventually("the lines", || {
        let lines = ["login failed", "no login", "failed after 1 bytes"];
        lines.iter().all(|line| process.logged(line) == 1)
    })
    .await;
    assert_eq!(
        (process.logged("\u{1b}"), process.logged("[2026-01-01")),
        (0, 3)
    );
    assert_eq!(process.logged("x\\n[2026-01-01"), 3);
}
