//! Every store keeps the rules of `sftpd::store::Store`, and a store that breaks one is told which.
//!
//! With `SFTPD_TEST_S3` set to an endpoint (and `SFTPD_TEST_S3_KEY`, `SFTPD_TEST_S3_SECRET`), the
//! store on S3 is tried on a new bucket of that server.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use async_trait::async_trait;
use bytes::Bytes;
use sftpd::store::memory::MemoryStore;
use sftpd::store::s3::S3Store;
use sftpd::store::{
    Attributes, Condition, Copied, CopySource, KeptConditions, Key, Limits, ListRequest, Object,
    Page, Part, PartSource, Result, Store, StoreError,
};
use sftpd::testing::{Rule, store_conformance};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;
use support::gateway::new_bucket;
use support::s3::{FakeS3, S3Access};
use support::s3_store;
use support::stores::{Hooked, NineMethods};

#[tokio::test]
async fn the_memory_store_conforms() {
    let store = Arc::new(MemoryStore::default());
    store_conformance(store.clone()).await.unwrap();
    assert_eq!(store.uploads(), 0);
    // The server never asks for it.
    let key = Key::new("f").unwrap();
    let plain = Attributes::default();
    let put = store
        .put(&key, Bytes::new(), &plain, &Condition::None)
        .await;
    put.unwrap();
    let deleted = store.delete(&key, &Condition::Absent).await;
    assert_eq!(deleted, Err(StoreError::Precondition));
    store.head(&key).await.unwrap();
}

#[tokio::test]
async fn the_store_on_s3_conforms() {
    match std::env::var("SFTPD_TEST_S3") {
        Ok(endpoint) => {
            let access = S3Access::from_variables(endpoint);
            let client = aws_sdk_s3::Client::from_conf(access.sdk_config().build());
            let bucket = new_bucket(&client).await;
            let store = S3Store::new(client, &bucket);
            let top = Key::new("").unwrap();
            let kept = store.find_conditions(&top).await.unwrap();
            let store = store.with_conditions(kept);
            store_conformance(Arc::new(store)).await.unwrap();
        }
        Err(_) => {
            let s3 = FakeS3::start().await;
            store_conformance(s3_store(&s3)).await.unwrap();
            assert_eq!((s3.objects(), s3.uploads()), (Vec::new(), 0));
        }
    }
}

/// ETags are no MD5s.
#[tokio::test]
async fn the_store_on_encrypted_s3_conforms() {
    let s3 = FakeS3::start().await;
    s3.encrypt();
    store_conformance(s3_store(&s3)).await.unwrap();
}

#[tokio::test]
async fn the_defaults_conform() {
    let store = NineMethods::<MemoryStore>::default();
    store_conformance(Arc::new(store)).await.unwrap();
}

/// The limits say that the store copies, and it has no method for that.
#[tokio::test]
async fn the_defaults_take_no_memory_that_the_server_does_not_count() {
    let mut store = NineMethods::of(MemoryStore::default());
    store.limits.copies_itself = true;
    let (from, to) = (Key::new("from").unwrap(), Key::new("to").unwrap());
    let plain = Attributes::default();
    let body = Bytes::from_static(b"content");
    let put = store.put(&from, body, &plain, &Condition::None).await;
    let version = &put.unwrap();
    let source = CopySource {
        key: &from,
        version,
    };
    let copied = store.copy(source, &to, &Condition::None).await;
    assert_eq!(copied, Err(StoreError::Unsupported));
    let id = store.create_upload(&to, &plain).await.unwrap();
    let source = PartSource {
        key: &from,
        etag: &version.etag,
        range: 0..7,
    };
    let copied = store.copy_part(&to, &id, 1, source).await;
    assert_eq!(copied, Err(StoreError::Unsupported));
    let violation = store_conformance(Arc::new(store)).await.unwrap_err();
    assert_eq!(violation.rule, Rule::MissingObjectsAreNotFound);
}

/// A condition that is named and ignored is found. Without a name the server looks by itself.
#[tokio::test]
async fn a_condition_that_is_claimed_and_ignored_is_found() {
    let none = KeptConditions::NONE;
    let claims = |change: fn(&mut KeptConditions)| {
        let mut claimed = none;
        change(&mut claimed);
        claimed
    };
    for (claimed, broken) in [
        (none, None),
        (claims(|of| of.put_absent = true), Some(Rule::AbsentIsKept)),
        (
            claims(|of| of.complete_absent = true),
            Some(Rule::AbsentIsKept),
        ),
        (claims(|of| of.copy_absent = true), Some(Rule::AbsentIsKept)),
        (
            claims(|of| of.put_unchanged = true),
            Some(Rule::UnchangedIsKept),
        ),
        (
            claims(|of| of.complete_unchanged = true),
            Some(Rule::UnchangedIsKept),
        ),
        (
            claims(|of| of.delete_unchanged = true),
            Some(Rule::UnchangedIsKept),
        ),
    ] {
        let mut store = NineMethods::of(MemoryStore::default());
        store.ignores_conditions = true;
        store.limits.conditions = claimed;
        let violation = store_conformance(Arc::new(store)).await.err();
        assert_eq!(
            violation.map(|violation| violation.rule),
            broken,
            "{claimed:?}"
        );
    }
}

/// No method of a store behind an `Arc` is the trait's default.
#[tokio::test]
async fn a_store_behind_an_arc_is_asked_for_everything() {
    let asked: Arc<Mutex<BTreeSet<&str>>> = Arc::default();
    let methods = asked.clone();
    let store: Arc<dyn Store> = Arc::new(Hooked::new(move |method| {
        methods.lock().unwrap().insert(method);
        Box::pin(async { Ok(()) })
    }));
    assert_eq!(Store::limits(&store), MemoryStore::default().limits());
    store_conformance(Arc::new(store.clone())).await.unwrap();
    let top = Key::new("").unwrap();
    Store::incomplete_uploads(&store, &top, SystemTime::now())
        .await
        .unwrap();
    let expected = [
        "abort",
        "complete",
        "copy",
        "copy_part",
        "create_upload",
        "delete",
        "get",
        "head",
        "incomplete_uploads",
        "list",
        "open",
        "put",
        "rename",
        "upload_part",
    ];
    assert_eq!(*asked.lock().unwrap(), expected.into());
}

/// A store that breaks one rule.
struct Broken {
    store: MemoryStore,
    rule: Rule,
}

#[tokio::test]
async fn a_broken_store_is_told_which_rule_it_breaks() {
    for &rule in Rule::ALL {
        let store = Broken {
            store: MemoryStore::default(),
            rule,
        };
        let violation = store_conformance(Arc::new(store)).await.unwrap_err();
        assert_eq!(violation.rule, rule, "{violation}");
        assert!(violation.to_string().starts_with(&rule.to_string()));
        println!("{violation}");
    }
}

impl Broken {
    /// The last names come first.
    async fn list_backwards(&self, request: ListRequest<'_>) -> Result<Page> {
        let begin = match &request.after {
            Some(after) => after.parse().unwrap(),
            None => 0,
        };
        let limit = request.limit;
        let everything = ListRequest {
            after: None,
            limit: 1000,
            ..request
        };
        let mut entries = self.store.list(everything).await?.entries;
        entries.reverse();
        let end = entries.len().min(begin + limit);
        let is_last = end == entries.len();
        Ok(Page {
            entries: entries[begin..end].to_vec(),
            next: if is_last { None } else { Some(end.to_string()) },
        })
    }
}

#[async_trait]
impl Store for Broken {
    fn limits(&self) -> Limits {
        self.store.limits()
    }

    async fn head(&self, key: &Key) -> Result<Object> {
        match self.store.head(key).await {
            Err(_) if self.rule == Rule::MissingObjectsAreNotFound => {
                Err(StoreError::Other("it is not here".to_owned()))
            }
            found => found,
        }
    }

    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>> {
        match self.rule {
            Rule::ObjectsAreReadAsWritten => {
                let len = range.end - range.start;
                Ok(vec![vec![b'?'; len as usize].into()])
            }
            Rule::GetsArePinnedToAVersion => {
                let now = self.store.head(key).await?;
                self.store.get(key, range, &now.etag).await
            }
            _ => self.store.get(key, range, etag).await,
        }
    }

    async fn list(&self, request: ListRequest<'_>) -> Result<Page> {
        if self.rule == Rule::PagesAreInOrder && request.folded {
            return self.list_backwards(request).await;
        }
        let mut page = self.store.list(request).await?;
        if self.rule == Rule::ListingsAreComplete && page.next.is_some() {
            page.entries.pop();
        }
        Ok(page)
    }

    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()> {
        match self.rule {
            Rule::DeletedObjectsAreGone => {
                self.store.head(key).await?;
                self.store.delete(key, condition).await
            }
            Rule::UnchangedIsKept => self.store.delete(key, &Condition::None).await,
            _ => self.store.delete(key, condition).await,
        }
    }

    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<Object> {
        let plain = Attributes::default();
        match (self.rule, condition) {
            (Rule::WritesReturnTheObject, _) => {
                let mut object = self.store.put(key, body, attributes, condition).await?;
                object.etag = "\"another\"".to_owned();
                Ok(object)
            }
            (Rule::AbsentIsKept, Condition::Absent) => {
                let always = &Condition::None;
                self.store.put(key, body, attributes, always).await
            }
            // Looks, and writes later.
            (Rule::OnlyOneWriterWins, Condition::Absent) => {
                if self.store.head(key).await.is_ok() {
                    return Err(StoreError::Precondition);
                }
                tokio::task::yield_now().await;
                let always = &Condition::None;
                self.store.put(key, body, attributes, always).await
            }
            (Rule::AttributesAreKept, _) => self.store.put(key, body, &plain, condition).await,
            (_, _) => self.store.put(key, body, attributes, condition).await,
        }
    }

    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String> {
        self.store.create_upload(key, attributes).await
    }

    async fn upload_part(&self, key: &Key, id: &str, number: u32, body: Bytes) -> Result<Part> {
        if self.rule == Rule::UploadsAppearWhenComplete && body.len() > 1000 {
            let plain = Attributes::default();
            let early = body.slice(..1000);
            let always = &Condition::None;
            self.store.put(key, early, &plain, always).await?;
        }
        self.store.upload_part(key, id, number, body).await
    }

    async fn complete(
        &self,
        key: &Key,
        id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Object> {
        let completed = self.store.complete(key, id, parts, condition).await;
        match (self.rule, completed) {
            (Rule::MissingPartsAreRefused, Err(StoreError::Other(_))) => {
                self.store.complete(key, id, &parts[..1], condition).await
            }
            (_, completed) => completed,
        }
    }

    async fn abort(&self, key: &Key, id: &str) -> Result<()> {
        match self.rule {
            Rule::AbortedUploadsLeaveNothing => Ok(()),
            _ => self.store.abort(key, id).await,
        }
    }

    async fn copy(&self, from: CopySource<'_>, to: &Key, condition: &Condition) -> Result<Copied> {
        let copied = self.store.copy(from, to, condition).await?;
        if self.rule == Rule::CopiesAreWhole {
            self.store.delete(from.key, &Condition::None).await?;
        }
        Ok(copied)
    }

    async fn copy_part(
        &self,
        key: &Key,
        id: &str,
        number: u32,
        mut from: PartSource<'_>,
    ) -> Result<Part> {
        if self.rule == Rule::PartsCanBeCopied {
            from.range = 0..from.range.end;
        }
        self.store.copy_part(key, id, number, from).await
    }

    async fn rename(
        &self,
        from: &Key,
        version: &Object,
        to: &Key,
        condition: &Condition,
    ) -> Result<Object> {
        match self.rule {
            Rule::RenamesMoveAVersion => {
                let now = self.store.head(from).await?;
                self.store.rename(from, &now, to, condition).await
            }
            _ => self.store.rename(from, version, to, condition).await,
        }
    }
}
