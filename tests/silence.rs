//! Requests to S3 that are not answered: sent again on another connection, and what they have done
//! is found out before the server's timeouts end. A request that moves is never silent, however slow
//! the link is.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use bytes::Bytes;
use futures_util::future::join_all;
use sftpd::store::s3::S3Store;
use sftpd::store::{
    Attributes, Condition, CopySource, Key, ListRequest, Object, Part, PartSource, PatientStore,
    Store, StoreError, Timeouts,
};
use std::sync::Arc;
use std::time::Duration;
use support::process::Process;
use support::s3::{BUCKET, FakeS3, Fault, When};
use support::*;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};

/// Of the server; a twentieth of the defaults, so that the tests are quick.
const TIMEOUT: Duration = Duration::from_millis(1500);
const OLD: &[u8] = b"old content";
const NEW: Bytes = Bytes::from_static(b"new content");

/// S3 with an object `old`, as the server uses it.
async fn start() -> (FakeS3, PatientStore) {
    let s3 = FakeS3::start().await;
    s3.put("old", OLD);
    s3.set_min_part(1);
    let timeouts = Timeouts {
        open: TIMEOUT,
        close: TIMEOUT,
    };
    let store = PatientStore::new(s3_store(&s3), timeouts);
    (s3, store)
}

fn key(name: &str) -> Key {
    Key::new(name).unwrap()
}

async fn put(store: &dyn Store, name: &str) -> Result<Object, StoreError> {
    let attributes = Attributes::default();
    store
        .put(&key(name), NEW, &attributes, &Condition::None)
        .await
}

async fn copy(store: &dyn Store, condition: &Condition) -> Result<(), StoreError> {
    let version = store.head(&key("old")).await.unwrap();
    let from = CopySource {
        key: &key("old"),
        version: &version,
    };
    store.copy(from, &key("new"), condition).await?;
    Ok(())
}

/// Begins an upload of this many parts to `new`.
async fn upload(store: &dyn Store, count: u32) -> (String, Vec<Part>) {
    let attributes = Attributes::default();
    let id = store.create_upload(&key("new"), &attributes).await.unwrap();
    let mut parts = Vec::new();
    for number in 1..=count {
        let part = store.upload_part(&key("new"), &id, number, NEW).await;
        parts.push(part.unwrap());
    }
    (id, parts)
}

async fn complete(store: &dyn Store, count: u32) -> Result<Object, StoreError> {
    let (id, parts) = upload(store, count).await;
    store
        .complete(&key("new"), &id, &parts, &Condition::None)
        .await
}

/// S3 has done what it was asked for, but each answer is lost without a sign. Here and in the next
/// three.
#[tokio::test]
async fn a_put_without_an_answer_is_found_out() {
    let (s3, store) = start().await;
    s3.fault("PutObject", When::Every, Fault::HangAfter);
    let made = put(&store, "new").await.unwrap();
    assert_eq!(made.size, NEW.len() as u64);
    assert_eq!(s3.objects(), ["new", "old"]);
}

#[tokio::test]
async fn a_copy_without_an_answer_is_found_out() {
    let (s3, store) = start().await;
    s3.fault("CopyObject", When::Every, Fault::HangAfter);
    copy(&store, &Condition::Absent).await.unwrap();
    assert_eq!(s3.objects(), ["new", "old"]);
}

#[tokio::test]
async fn a_complete_without_an_answer_is_found_out() {
    let (s3, store) = start().await;
    s3.fault("CompleteMultipartUpload", When::Every, Fault::HangAfter);
    let made = complete(&store, 2).await.unwrap();
    assert_eq!(made.size, 2 * NEW.len() as u64);
    assert_eq!(s3.objects(), ["new", "old"]);
    s3.assert_no_uploads();
}

#[tokio::test]
async fn a_delete_without_an_answer_is_found_out() {
    let (s3, store) = start().await;
    let made = put(&store, "new").await.unwrap();
    s3.fault("DeleteObject", When::Every, Fault::HangAfter);
    let new = key("new");
    let condition = Condition::Unchanged(made.etag);
    let old = key("old");
    let (version, any) = tokio::join!(
        store.delete(&new, &condition),
        store.delete(&old, &Condition::None)
    );
    version.unwrap();
    any.unwrap();
    assert_eq!(s3.objects(), [""; 0]);
}

/// One connection is dead, as after a firewall has forgotten it.
#[tokio::test]
async fn a_connection_that_is_silent_costs_one_try() {
    let (s3, store) = start().await;
    let hang = |op: &str| s3.fault(op, When::Nth(1), Fault::Hang);
    let old = store.head(&key("old")).await.unwrap();
    hang("ListObjectsV2");
    let request = ListRequest {
        prefix: &key("o"),
        folded: false,
        after: None,
        limit: 10,
    };
    assert_eq!(store.list(request).await.unwrap().entries.len(), 1);
    hang("PutObject");
    put(&store, "put").await.unwrap();
    hang("CopyObject");
    copy(&store, &Condition::None).await.unwrap();
    hang("UploadPart");
    hang("CompleteMultipartUpload");
    complete(&store, 2).await.unwrap();
    let (id, _) = upload(&store, 1).await;
    hang("UploadPartCopy");
    let from = PartSource {
        key: &key("old"),
        etag: &old.etag,
        range: 0..3,
    };
    s3.set_min_part(0);
    store.copy_part(&key("new"), &id, 2, from).await.unwrap();
    store.abort(&key("new"), &id).await.unwrap();
    hang("DeleteObject");
    store.delete(&key("put"), &Condition::None).await.unwrap();
    hang("DeleteObject");
    let condition = Condition::Unchanged(old.etag);
    store.delete(&key("old"), &condition).await.unwrap();
    assert_eq!(s3.objects(), ["new"]);
    s3.assert_no_uploads();
}

/// S3 is given time for each part of a Complete. It must not be taken from the next try.
#[tokio::test]
async fn a_complete_of_many_parts_has_its_time_in_each_try() {
    let (s3, store) = start().await;
    // Four seconds in advance.
    let (id, parts) = upload(&store, 200).await;
    s3.fault("CompleteMultipartUpload", When::Nth(1), Fault::Hang);
    let slow = Fault::Stall(Duration::from_secs(5));
    s3.fault("CompleteMultipartUpload", When::Nth(2), slow);
    store
        .complete(&key("new"), &id, &parts, &Condition::None)
        .await
        .unwrap();
    s3.assert_no_uploads();
}

#[tokio::test]
async fn a_store_that_never_answers_leaves_it_open() {
    let (s3, store) = start().await;
    s3.fault("PutObject", When::Every, Fault::Hang);
    s3.fault("DeleteObject", When::Every, Fault::Hang);
    let kept = put(&store, "old").await;
    assert!(matches!(kept, Err(StoreError::Unknown(_))), "{kept:?}");
    let kept = store.delete(&key("old"), &Condition::None).await;
    assert!(matches!(kept, Err(StoreError::Unknown(_))), "{kept:?}");
    assert_eq!(s3.object("old").unwrap(), OLD);
}

/// The refusal may be due to the first try, which S3 has carried out or still does.
#[tokio::test]
async fn a_refusal_after_a_silent_try_is_no_clear_answer() {
    let (s3, store) = start().await;
    s3.fault("PutObject", When::Nth(1), Fault::HangAfter);
    let conflict = Fault::Status(409, "OperationAborted");
    s3.fault("PutObject", When::From(2), conflict);
    put(&store, "new").await.unwrap();
    assert_eq!(s3.object("new").unwrap(), NEW);
}

/// The binary with its own settings, except that its store may be silent for two seconds, and so one
/// try for 1.3: a fifteenth of the default. Its link to S3 carries this much a second.
fn start_on_narrow_link(s3: &FakeS3, bytes_per_second: u32) -> (Link, Process) {
    let address = s3.endpoint.strip_prefix("http://").unwrap();
    let link = Link::narrow(address.parse().unwrap(), bytes_per_second);
    let setting = format!("export AWS_ENDPOINT_URL=http://{}", link.address);
    let server = Process::start_after(&setting, s3, &["--close-timeout", "2s"]);
    // What it has found out at its start.
    s3.reset();
    (link, server)
}

/// As slow for its timeout as 100 kB/s are with the default, which four uploads share.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_share_a_slow_link_are_not_cut() {
    let s3 = FakeS3::start().await;
    let (_link, server) = start_on_narrow_link(&s3, 1_500_000);
    // A part, and what goes at CLOSE.
    let content = noise(5 * MIB + 1, 1);
    let uploads = (0..4).map(|number| {
        let (server, content) = (&server, &content);
        async move {
            let client = server.client().await;
            client.put(&format!("/{number}"), content).await
        }
    });
    for uploaded in join_all(uploads).await {
        uploaded.unwrap();
    }
    for number in 0..4 {
        let stored = s3.object(&format!("alice/{number}")).unwrap();
        assert!(stored == content);
    }
    assert_eq!(s3.count("UploadPart"), 8, "each part is sent once");
}

/// As slow for its timeout as 20 kB/s are with the default.
#[tokio::test(flavor = "multi_thread")]
async fn one_upload_over_a_very_slow_link_is_not_cut() {
    let s3 = FakeS3::start().await;
    let (_link, server) = start_on_narrow_link(&s3, 300_000);
    let content = noise(4 * MIB, 1);
    server.client().await.put("/f", &content).await.unwrap();
    assert!(s3.object("alice/f").unwrap() == content);
    assert_eq!(s3.count("PutObject"), 1, "it is sent once");
}

/// The SDK of itself ends a body that pauses for 6 seconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_download_whose_bodies_pause_is_not_cut() {
    let s3 = FakeS3::start().await;
    let content = noise(300 * 1024, 1);
    s3.put("alice/f", content.clone());
    let server = Process::start(&s3, &[]);
    let pause = Fault::PauseMidBody(Duration::from_secs(8));
    s3.fault("GetObject", When::Every, pause);
    let read = server.client().await.get("/f").await.unwrap();
    assert!(read == content);
}

/// Eight times half of what is missing.
#[tokio::test]
async fn a_get_that_has_brought_bytes_is_no_failed_try() {
    let (s3, store) = start().await;
    let content = noise(8 * MIB, 1);
    s3.put("f", content.clone());
    let version = store.head(&key("f")).await.unwrap();
    for number in 1..=8 {
        s3.fault("GetObject", When::Nth(number), Fault::ResetMidBody);
    }
    let read = store.get(&key("f"), 0..version.size, &version.etag).await;
    assert!(read.unwrap().concat() == content);
}

/// A body that stops is asked for again on another connection, as long as the server waits.
#[tokio::test]
async fn a_get_whose_body_stops_costs_one_try() {
    let (s3, store) = start().await;
    let content = noise(64 * 1024, 1);
    s3.put("f", content.clone());
    let version = store.head(&key("f")).await.unwrap();
    s3.fault("GetObject", When::Nth(1), Fault::HangMidBody);
    let read = store.get(&key("f"), 0..version.size, &version.etag).await;
    assert!(read.unwrap().concat() == content);
}

/// A proxy may pass on later what a silent try has sent. So the next one, after a look, replaces
/// only what was there.
#[tokio::test]
async fn a_silent_put_is_repeated_under_the_condition_of_what_is_there() {
    let (s3, store) = start().await;
    for name in ["new", "old"] {
        s3.fault("PutObject", When::Nth(1), Fault::Hang);
        put(&store, name).await.unwrap();
        assert_eq!(s3.object(name).unwrap(), NEW);
        s3.clear_faults();
    }
    let conditions = s3.put_conditions();
    assert_eq!(conditions, ["", "if-none-match", "", "if-match"]);
}

/// A queue before the store holds the second try. It is passed on after the third was answered, and
/// another gateway has replaced the object.
#[tokio::test]
async fn a_repeated_put_that_arrives_late_replaces_no_newer_version() {
    let (s3, store) = start().await;
    let held = Arc::new(Notify::new());
    s3.fault("PutObject", When::Nth(1), Fault::Hang);
    s3.fault("PutObject", When::Nth(2), Fault::Hold(held.clone()));
    put(&store, "old").await.unwrap();
    assert_eq!(s3.object("old").unwrap(), NEW);
    s3.put("old", "newer");
    pass_on(&s3, held).await;
    assert_eq!(s3.object("old").unwrap(), "newer");
}

/// Lets a held request go on, and waits until it is carried out or refused.
async fn pass_on(s3: &FakeS3, held: Arc<Notify>) {
    s3.clear_faults();
    held.notify_one();
    eventually("the request is carried out", || {
        Arc::strong_count(&held) == 1
    })
    .await;
}

/// A queue before the store holds the first DELETE, which is given up; it is passed on after the
/// second was answered and the name has a new object.
#[tokio::test]
async fn a_delete_that_arrives_late_deletes_no_newer_version() {
    let (s3, store) = start().await;
    let server = Server::start(Arc::new(store)).await;
    let client = server.client().await;
    client.put("/g", b"first").await.unwrap();
    let held = Arc::new(Notify::new());
    s3.fault("DeleteObject", When::Nth(1), Fault::Hold(held.clone()));
    client.sftp.remove("/g").await.unwrap();
    client.put("/g", b"second").await.unwrap();
    pass_on(&s3, held).await;
    assert_eq!(s3.object("alice/g").unwrap(), &b"second"[..]);
}

/// A store that takes requests and never answers. It says which connection got a request, and which
/// was closed.
#[tokio::test]
async fn the_connection_of_a_silent_try_is_closed_before_the_next_try() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut access = FakeS3::start().await.access();
    access.endpoint = format!("http://{}", listener.local_addr().unwrap());
    let client = aws_sdk_s3::Client::from_conf(access.sdk_config().build());
    let store = PatientStore::new(
        Arc::new(S3Store::new(client, BUCKET)),
        Timeouts {
            open: TIMEOUT,
            close: TIMEOUT,
        },
    );
    let (events, mut happened) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        for number in 1.. {
            let (mut stream, _) = listener.accept().await.unwrap();
            let events = events.clone();
            tokio::spawn(async move {
                let mut bytes = [0; 64 * 1024];
                assert!(stream.read(&mut bytes).await.unwrap() > 0);
                events.send((number, "request")).unwrap();
                while matches!(stream.read(&mut bytes).await, Ok(1..)) {}
                events.send((number, "closed")).unwrap();
            });
        }
    });
    let put = put(&store, "new").await;
    assert!(matches!(put, Err(StoreError::Unknown(_))), "{put:?}");
    drop(store);
    let mut seen = Vec::new();
    while let Ok(event) = happened.try_recv() {
        seen.push(event);
    }
    assert_eq!(seen[..3], [(1, "request"), (1, "closed"), (2, "request")]);
}
