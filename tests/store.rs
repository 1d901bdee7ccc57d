//! What S3 allows and demands beyond the rules of `sftpd::store::Store` (tests/conformance.rs), on
//! the memory store and on S3; and how the store on S3 meets failures.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use aws_credential_types::provider::{ProvideCredentials, future};
use aws_sdk_s3::config::Credentials;
use bytes::Bytes;
use sftpd::store::memory::MemoryStore;
use sftpd::store::{Attributes, Condition, Entry, Key, ListRequest, Object, Page, Part};
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

/// Puts an object without attributes and conditions.
async fn put(store: &Arc<dyn Store>, name: &str, body: impl Into<Bytes>) -> Object {
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
    any_key_is_an_object
    listings_are_complete_and_in_order
    invalid_uploads_fail
}

async fn any_key_is_an_object(store: Arc<dyn Store>) {
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
                assert_eq!(
                    (opened.size, &opened.etag, &first[..]),
                    (
                        object.size,
                        &object.etag,
                        &body[..body.len().min(most as usize)]
                    ),
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

async fn invalid_uploads_fail(store: Arc<dyn Store>) {
    let id = create_upload(&store, "f").await;
    let (parts, _) = send_parts(&store, &id, &[5 * MIB, 100, 100]).await;
    let other = "\"0123456789abcdef0123456789abcdef\"";
    let wrong = Part::new(2, parts[1].size, other);
    for bad in [
        vec![parts[1].clone(), parts[0].clone()],
        vec![parts[0].clone(), wrong],
        parts.clone(),
        vec![Part::new(9, parts[0].size, parts[0].etag.clone())],
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
