//! One conformance suite for every store: the promises of `sftpd::store::Store`, on the memory
//! store and on S3.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use aws_credential_types::provider::{ProvideCredentials, future};
use aws_sdk_s3::config::Credentials;
use bytes::Bytes;
use sftpd::store::memory::MemoryStore;
use sftpd::store::{
    Attributes, Condition, CopySource, Entry, Key, ListRequest, Object, Page, Part, PartSource,
};
use sftpd::store::{Store, StoreError};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::s3::{self, FakeS3, Fault, When};
use support::{MIB, noise, s3_store, s3_store_with};

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

/// Puts an object without attributes and conditions; its ETag.
async fn put(store: &Arc<dyn Store>, name: &str, body: impl Into<Bytes>) -> String {
    let plain = Attributes::default();
    let put = store
        .put(&key(name), body.into(), &plain, &Condition::None)
        .await;
    put.unwrap()
}

/// Begins an upload without attributes; its id.
async fn create_upload(store: &Arc<dyn Store>, name: &str) -> String {
    let plain = Attributes::default();
    store.create_upload(&key(name), &plain).await.unwrap()
}

/// A range of an object.
async fn read(store: &Arc<dyn Store>, name: &str, range: Range<u64>, etag: &str) -> Vec<u8> {
    store.get(&key(name), range, etag).await.unwrap().concat()
}

/// Makes a test of each check for each store.
macro_rules! on_every_store {
    ($($check:ident)*) => {
        mod memory_store {
            $(#[tokio::test]
            async fn $check() {
                super::$check(std::sync::Arc::new(super::MemoryStore::default())).await;
            })*
        }
        mod s3_store {
            $(#[tokio::test]
            async fn $check() {
                let s3 = super::FakeS3::start().await;
                super::$check(super::s3_store(&s3)).await;
                assert_eq!(s3.uploads(), 0);
            })*
        }
    };
}

on_every_store! {
    objects_are_read_as_written
    missing_objects_are_not_found
    gets_are_pinned_to_a_version
    conditions_are_honoured
    changes_can_require_a_version
    attributes_are_kept
    copies_have_the_whole_content
    listings_are_complete_and_in_order
    uploads_appear_when_complete
    invalid_uploads_fail
    parts_can_be_copied
}

async fn objects_are_read_as_written(store: Arc<dyn Store>) {
    for name in [
        "a",
        "a/b",
        "a b+c%20d#e?f&g=h",
        "ü/☃",
        "back\\slash",
        "dir/",
        "quote'\"<>",
        &"x".repeat(1024),
    ] {
        for body in [Bytes::new(), Bytes::from_static(b"abc"), noise(300_000, 1)] {
            put(&store, name, body.clone()).await;
            let object = store.head(&key(name)).await.unwrap();
            assert_eq!(object.size, body.len() as u64, "{name}");
            for most in [1, 1000, 1 << 20] {
                let (opened, first) = store.open(&key(name), most).await.unwrap();
                // An open need not return the attributes.
                let opened = Object {
                    attributes: object.attributes.clone(),
                    ..opened
                };
                assert_eq!(
                    (&opened, &first[..]),
                    (&object, &body[..body.len().min(most as usize)]),
                    "{name} {most}"
                );
            }
            assert!(
                object
                    .modified
                    .elapsed()
                    .is_ok_and(|age| age.as_secs() < 60),
                "{name}"
            );
            if !body.is_empty() {
                assert_eq!(
                    read(&store, name, 0..object.size, &object.etag).await,
                    body,
                    "{name}"
                );
                assert_eq!(
                    read(&store, name, 1..2, &object.etag).await,
                    body[1..2],
                    "{name}"
                );
            }
        }
        store.delete(&key(name), &Condition::None).await.unwrap();
        assert_eq!(
            store.head(&key(name)).await,
            Err(StoreError::NotFound),
            "{name}"
        );
    }
}

async fn missing_objects_are_not_found(store: Arc<dyn Store>) {
    assert_eq!(store.head(&key("none")).await, Err(StoreError::NotFound));
    assert_eq!(
        store.open(&key("none"), 10).await,
        Err(StoreError::NotFound)
    );
    let none = key("none");
    let etag = "\"etag\"";
    let source = CopySource {
        key: &none,
        etag,
        storage_class: None,
    };
    assert_eq!(
        store.copy(source, &key("x"), &Condition::None).await,
        Err(StoreError::NotFound)
    );
    let unchanged = Condition::Unchanged(etag.to_owned());
    assert_eq!(
        store.delete(&none, &unchanged).await,
        Err(StoreError::NotFound)
    );
    store.delete(&key("none"), &Condition::None).await.unwrap();
    assert!(store.get(&key("none"), 0..1, "\"etag\"").await.is_err());
}

async fn gets_are_pinned_to_a_version(store: Arc<dyn Store>) {
    put(&store, "f", "old").await;
    let old = store.head(&key("f")).await.unwrap();
    put(&store, "f", "new").await;
    assert_eq!(
        store.get(&key("f"), 0..3, &old.etag).await,
        Err(StoreError::Precondition)
    );
}

async fn conditions_are_honoured(store: Arc<dyn Store>) {
    store
        .put(
            &key("f"),
            "first".into(),
            &Attributes::default(),
            &Condition::Absent,
        )
        .await
        .unwrap();
    assert_eq!(
        store
            .put(
                &key("f"),
                "second".into(),
                &Attributes::default(),
                &Condition::Absent
            )
            .await,
        Err(StoreError::Precondition)
    );
    let id = create_upload(&store, "f").await;
    let part = store
        .upload_part(&key("f"), &id, 1, "third".into())
        .await
        .unwrap();
    assert_eq!(
        store
            .complete(&key("f"), &id, &[part], &Condition::Absent)
            .await,
        Err(StoreError::Precondition)
    );
    store.abort(&key("f"), &id).await.unwrap();
    assert_eq!(store.head(&key("f")).await.unwrap().size, 5);
}

async fn changes_can_require_a_version(store: Arc<dyn Store>) {
    let (file, other) = (key("f"), key("other"));
    let plain = Attributes::default();
    let old = store
        .put(&file, "old".into(), &plain, &Condition::None)
        .await
        .unwrap();
    let was_old = Condition::Unchanged(old.clone());
    let new = store
        .put(&file, "new".into(), &plain, &was_old)
        .await
        .unwrap();
    assert_eq!(
        store.put(&file, "late".into(), &plain, &was_old).await,
        Err(StoreError::Precondition)
    );
    assert_eq!(
        store.put(&other, "late".into(), &plain, &was_old).await,
        Err(StoreError::Precondition)
    );
    let id = store.create_upload(&file, &plain).await.unwrap();
    let part = store
        .upload_part(&file, &id, 1, "late".into())
        .await
        .unwrap();
    assert_eq!(
        store.complete(&file, &id, &[part], &was_old).await,
        Err(StoreError::Precondition)
    );
    store.abort(&file, &id).await.unwrap();
    let source = |etag| CopySource {
        key: &FILE,
        etag,
        storage_class: None,
    };
    static FILE: std::sync::LazyLock<Key> = std::sync::LazyLock::new(|| key("f"));
    assert_eq!(
        store.copy(source(&old), &other, &Condition::None).await,
        Err(StoreError::Precondition)
    );
    store
        .copy(source(&new), &other, &Condition::Absent)
        .await
        .unwrap();
    assert_eq!(
        store.copy(source(&new), &other, &Condition::Absent).await,
        Err(StoreError::Precondition)
    );
    assert_eq!(
        store.delete(&file, &was_old).await,
        Err(StoreError::Precondition)
    );
    store
        .delete(&file, &Condition::Unchanged(new))
        .await
        .unwrap();
    assert_eq!(store.head(&file).await, Err(StoreError::NotFound));
    assert_eq!(store.head(&other).await.unwrap().size, 3);
}

async fn attributes_are_kept(store: Arc<dyn Store>) {
    let metadata = [("owner".to_owned(), "alice".to_owned())].into();
    let content_type = Some("text/csv".to_owned());
    let attributes = Attributes {
        content_type,
        metadata,
        ..Attributes::default()
    };
    let etag = store
        .put(&key("f"), "x".into(), &attributes, &Condition::None)
        .await
        .unwrap();
    let found = |object: Object| {
        let attributes = object.attributes.unwrap();
        (attributes.content_type.clone(), attributes.metadata.clone())
    };
    let expected = (attributes.content_type.clone(), attributes.metadata.clone());
    assert_eq!(found(store.head(&key("f")).await.unwrap()), expected);
    let (from, to) = (key("f"), key("copy"));
    let source = CopySource {
        key: &from,
        etag: &etag,
        storage_class: None,
    };
    store.copy(source, &to, &Condition::None).await.unwrap();
    assert_eq!(found(store.head(&to).await.unwrap()), expected);
    let id = store
        .create_upload(&key("large"), &attributes)
        .await
        .unwrap();
    let part = store
        .upload_part(&key("large"), &id, 1, "x".into())
        .await
        .unwrap();
    store
        .complete(&key("large"), &id, &[part], &Condition::None)
        .await
        .unwrap();
    assert_eq!(found(store.head(&key("large")).await.unwrap()), expected);
}

async fn copies_have_the_whole_content(store: Arc<dyn Store>) {
    let body = noise(200_000, 1);
    put(&store, "from + ü", body.clone()).await;
    put(&store, "to", "old").await;
    let from = key("from + ü");
    let etag = store.head(&from).await.unwrap().etag;
    let source = CopySource {
        key: &from,
        etag: &etag,
        storage_class: None,
    };
    store
        .copy(source, &key("to"), &Condition::None)
        .await
        .unwrap();
    let object = store.head(&key("to")).await.unwrap();
    assert_eq!(read(&store, "to", 0..object.size, &object.etag).await, body);
}

async fn list_all(store: &Arc<dyn Store>, prefix: &str, folded: bool, limit: usize) -> Vec<String> {
    let (prefix, mut after, mut all) = (key(prefix), None, Vec::new());
    loop {
        let page: Page = store
            .list(ListRequest {
                prefix: &prefix,
                folded,
                after,
                limit,
            })
            .await
            .unwrap();
        assert!(page.entries.len() <= limit);
        all.extend(page.entries.into_iter().map(|entry| match entry {
            Entry::Object(key, object) => format!("{key} {}", object.size),
            Entry::Prefix(prefix) => prefix,
        }));
        after = page.next;
        if after.is_none() {
            return all;
        }
    }
}

async fn listings_are_complete_and_in_order(store: Arc<dyn Store>) {
    let names = [
        "d", "d/", "d/a", "d/a/x", "d/a/y", "d/a0", "d/a-b", "d/b/c/d", "d/b0", "d/ü", "d0", "e",
    ];
    for name in names {
        put(&store, name, name).await;
    }
    let below = |prefix: &str| {
        let mut found: Vec<&str> = names
            .into_iter()
            .filter(|name| name.starts_with(prefix))
            .collect();
        found.sort();
        found
            .into_iter()
            .map(|name| format!("{name} {}", name.len()))
            .collect::<Vec<_>>()
    };
    for limit in [1, 2, 3, 1000] {
        for prefix in ["", "d", "d/", "d/a", "none"] {
            assert_eq!(
                list_all(&store, prefix, false, limit).await,
                below(prefix),
                "{prefix:?} by {limit}"
            );
        }
        // Objects and prefixes may come in two runs a page: each must be there once.
        let folded = list_all(&store, "d/", true, limit).await;
        let want = [
            "d/ 2", "d/a 3", "d/a-b 5", "d/a/", "d/a0 4", "d/b/", "d/b0 4", "d/ü 4",
        ];
        let set: BTreeSet<_> = folded.iter().map(String::as_str).collect();
        assert_eq!(
            (set, folded.len()),
            (want.into_iter().collect(), want.len()),
            "by {limit}"
        );
    }
}

async fn send_parts(store: &Arc<dyn Store>, id: &str, sizes: &[usize]) -> (Vec<Part>, Vec<u8>) {
    let (mut parts, mut all) = (Vec::new(), Vec::new());
    for (number, size) in (1..).zip(sizes) {
        let body = noise(*size, number.into());
        all.extend(&body);
        parts.push(
            store
                .upload_part(&key("f"), id, number, body)
                .await
                .unwrap(),
        );
    }
    (parts, all)
}

async fn uploads_appear_when_complete(store: Arc<dyn Store>) {
    put(&store, "f", "old").await;
    let id = create_upload(&store, "f").await;
    let (parts, all) = send_parts(&store, &id, &[5 * MIB, 6 * MIB, 100]).await;
    assert_eq!(store.head(&key("f")).await.unwrap().size, 3);
    store
        .complete(&key("f"), &id, &parts, &Condition::None)
        .await
        .unwrap();
    let object = store.head(&key("f")).await.unwrap();
    assert_eq!(object.size, all.len() as u64);
    let across = 5 * MIB - 10..5 * MIB + 10;
    let got = read(
        &store,
        "f",
        across.start as u64..across.end as u64,
        &object.etag,
    )
    .await;
    assert_eq!(got, all[across]);
}

async fn invalid_uploads_fail(store: Arc<dyn Store>) {
    let id = create_upload(&store, "f").await;
    let (parts, _) = send_parts(&store, &id, &[5 * MIB, 100, 100]).await;
    let wrong = Part {
        etag: "\"0123456789abcdef0123456789abcdef\"".into(),
        ..parts[1].clone()
    };
    for bad in [
        vec![parts[1].clone(), parts[0].clone()],
        vec![parts[0].clone(), wrong],
        parts.clone(),
        vec![Part {
            number: 9,
            ..parts[0].clone()
        }],
    ] {
        assert!(
            store
                .complete(&key("f"), &id, &bad, &Condition::None)
                .await
                .is_err(),
            "{bad:?}"
        );
    }
    assert_eq!(store.head(&key("f")).await, Err(StoreError::NotFound));
    store.abort(&key("f"), &id).await.unwrap();
    store.abort(&key("f"), &id).await.unwrap();
    assert!(
        store
            .upload_part(&key("f"), &id, 1, "late".into())
            .await
            .is_err()
    );
}

async fn parts_can_be_copied(store: Arc<dyn Store>) {
    let body = noise(7 * MIB, 1);
    put(&store, "source + ü", body.clone()).await;
    let etag = store.head(&key("source + ü")).await.unwrap().etag;
    let id = create_upload(&store, "f").await;
    let from = |etag| PartSource {
        key: &SOURCE,
        etag,
        range: 1..6 * MIB as u64,
    };
    static SOURCE: std::sync::LazyLock<Key> = std::sync::LazyLock::new(|| key("source + ü"));
    assert_eq!(
        store.copy_part(&key("f"), &id, 1, from("\"other\"")).await,
        Err(StoreError::Precondition)
    );
    let copied = store
        .copy_part(&key("f"), &id, 1, from(&etag))
        .await
        .unwrap();
    let sent = store
        .upload_part(&key("f"), &id, 2, "end".into())
        .await
        .unwrap();
    store
        .complete(&key("f"), &id, &[copied, sent], &Condition::None)
        .await
        .unwrap();
    let object = store.head(&key("f")).await.unwrap();
    let got = read(&store, "f", 0..object.size, &object.etag).await;
    assert_eq!(got, [&body[1..6 * MIB], b"end"].concat());
}

#[tokio::test]
async fn a_get_goes_on_where_its_body_broke_off() {
    let s3 = FakeS3::start().await;
    let store = s3_store(&s3);
    let body = noise(MIB, 1);
    s3.put("f", body.clone());
    let etag = store.head(&key("f")).await.unwrap().etag;
    s3.fault("GetObject", When::Nth(1), Fault::ResetMidBody);
    assert_eq!(
        store
            .get(&key("f"), 0..MIB as u64, &etag)
            .await
            .unwrap()
            .concat(),
        body
    );
    let second = s3.requests().pop().unwrap().range.unwrap();
    assert_ne!(
        second,
        format!("bytes=0-{}", MIB - 1),
        "what has arrived is not fetched again"
    );
    s3.fault("GetObject", When::Nth(1), Fault::ResetMidBody);
    let (object, first) = store.open(&key("f"), MIB as u64).await.unwrap();
    assert!(
        object.size == MIB as u64 && first.len() < MIB && body.starts_with(&first),
        "{}",
        first.len()
    );
    s3.fault("GetObject", When::Every, Fault::ResetMidBody);
    assert!(store.get(&key("f"), 0..MIB as u64, &etag).await.is_err());
}

#[tokio::test]
async fn refusals_and_lost_answers_are_distinguished() {
    let s3 = FakeS3::start().await;
    let store = s3_store(&s3);
    s3.fault("PutObject", When::Every, Fault::Status(403, "AccessDenied"));
    let put = store
        .put(
            &key("f"),
            "x".into(),
            &Attributes::default(),
            &Condition::None,
        )
        .await;
    assert!(
        matches!(&put, Err(StoreError::Forbidden(why)) if why.contains("AccessDenied")),
        "{put:?}"
    );
    s3.clear_faults();
    s3.fault("PutObject", When::Every, Fault::ResetBefore);
    let put = store
        .put(
            &key("f"),
            "x".into(),
            &Attributes::default(),
            &Condition::None,
        )
        .await;
    assert!(
        matches!(&put, Err(StoreError::Unknown(why)) if !why.contains("DispatchFailure(")),
        "{put:?}"
    );
    assert_eq!(s3.objects(), [""; 0]);
}

/// A source of credentials that counts how often it is asked.
#[derive(Clone, Debug, Default)]
struct CountingProvider(Arc<AtomicUsize>);

impl ProvideCredentials for CountingProvider {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        self.0.fetch_add(1, Ordering::Relaxed);
        future::ProvideCredentials::ready(Ok(Credentials::new(
            s3::ACCESS_KEY,
            s3::SECRET_KEY,
            None,
            None,
            "test",
        )))
    }
}

#[tokio::test]
async fn expired_credentials_are_renewed() {
    let s3 = FakeS3::start().await;
    let source = CountingProvider::default();
    let store = s3_store_with(&s3, |config| config.credentials_provider(source.clone()));
    put(&store, "a", "x").await;
    put(&store, "b", "x").await;
    assert_eq!(source.0.load(Ordering::Relaxed), 1);
    s3.fault(
        "PutObject",
        When::Nth(1),
        Fault::Status(400, "ExpiredToken"),
    );
    put(&store, "c", "x").await;
    assert_eq!(source.0.load(Ordering::Relaxed), 2);
    s3.clear_faults();
    // If the new ones have expired too, the error is that of the store.
    s3.fault("PutObject", When::Every, Fault::Status(400, "ExpiredToken"));
    let put = store
        .put(
            &key("d"),
            "x".into(),
            &Attributes::default(),
            &Condition::None,
        )
        .await;
    assert!(
        matches!(&put, Err(StoreError::Other(why)) if why.starts_with("ExpiredToken: ")),
        "{put:?}"
    );
    assert_eq!(s3.objects(), ["a", "b", "c"]);
}
