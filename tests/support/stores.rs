//! Stores that are not S3.

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use sftpd::store::memory::MemoryStore;
use sftpd::store::{
    Attributes, Condition, Copied, CopySource, IncompleteUpload, Key, Limits, ListRequest, Object,
    Page, Part, PartSource, Result, Store,
};
use std::ops::Range;
use std::time::SystemTime;

/// A store by the nine methods that have no default.
#[derive(Default)]
pub struct NineMethods<S = MemoryStore> {
    pub store: S,
    pub limits: Limits,
    pub ignores_conditions: bool,
}

impl<S> NineMethods<S> {
    pub fn of(store: S) -> NineMethods<S> {
        NineMethods {
            store,
            limits: Limits::default(),
            ignores_conditions: false,
        }
    }

    /// The condition that is kept.
    fn kept<'a>(&self, condition: &'a Condition) -> &'a Condition {
        match self.ignores_conditions {
            true => &Condition::None,
            false => condition,
        }
    }
}

type Hook = dyn Fn(&'static str) -> BoxFuture<'static, Result<()>> + Send + Sync;

/// The memory store, with something that happens before each request.
pub struct Hooked {
    pub store: MemoryStore,
    hook: Box<Hook>,
    /// Happens after a rename, which fails as this does.
    after_rename: Box<Hook>,
}

impl Hooked {
    /// `hook` gets the name of the method.
    pub fn new(
        hook: impl Fn(&'static str) -> BoxFuture<'static, Result<()>> + Send + Sync + 'static,
    ) -> Hooked {
        Hooked {
            store: MemoryStore::default(),
            hook: Box::new(hook),
            after_rename: Box::new(|_method| Box::pin(async { Ok(()) })),
        }
    }

    /// `hook` gets the name of the method, once a rename is done.
    pub fn after_rename(
        mut self,
        hook: impl Fn(&'static str) -> BoxFuture<'static, Result<()>> + Send + Sync + 'static,
    ) -> Hooked {
        self.after_rename = Box::new(hook);
        self
    }

    async fn before(&self, method: &'static str) -> Result<&MemoryStore> {
        (self.hook)(method).await?;
        Ok(&self.store)
    }
}

#[async_trait]
impl<S: Store> Store for NineMethods<S> {
    fn limits(&self) -> Limits {
        self.limits
    }
    async fn head(&self, key: &Key) -> Result<Object> {
        self.store.head(key).await
    }
    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>> {
        self.store.get(key, range, etag).await
    }
    async fn list(&self, request: ListRequest<'_>) -> Result<Page> {
        self.store.list(request).await
    }
    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()> {
        self.store.delete(key, self.kept(condition)).await
    }
    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<Object> {
        let condition = self.kept(condition);
        self.store.put(key, body, attributes, condition).await
    }
    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String> {
        self.store.create_upload(key, attributes).await
    }
    async fn upload_part(&self, key: &Key, id: &str, number: u32, body: Bytes) -> Result<Part> {
        self.store.upload_part(key, id, number, body).await
    }
    async fn complete(
        &self,
        key: &Key,
        id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Object> {
        let condition = self.kept(condition);
        self.store.complete(key, id, parts, condition).await
    }
    async fn abort(&self, key: &Key, id: &str) -> Result<()> {
        self.store.abort(key, id).await
    }
}

#[async_trait]
impl Store for Hooked {
    fn limits(&self) -> Limits {
        self.store.limits()
    }
    async fn head(&self, key: &Key) -> Result<Object> {
        self.before("head").await?.head(key).await
    }
    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>> {
        self.before("get").await?.get(key, range, etag).await
    }
    async fn open(&self, key: &Key, limit: u64) -> Result<(Object, Bytes)> {
        self.before("open").await?.open(key, limit).await
    }
    async fn list(&self, request: ListRequest<'_>) -> Result<Page> {
        self.before("list").await?.list(request).await
    }
    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()> {
        self.before("delete").await?.delete(key, condition).await
    }
    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<Object> {
        let store = self.before("put").await?;
        store.put(key, body, attributes, condition).await
    }
    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String> {
        let store = self.before("create_upload").await?;
        store.create_upload(key, attributes).await
    }
    async fn upload_part(&self, key: &Key, id: &str, number: u32, body: Bytes) -> Result<Part> {
        let store = self.before("upload_part").await?;
        store.upload_part(key, id, number, body).await
    }
    async fn complete(
        &self,
        key: &Key,
        id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Object> {
        let store = self.before("complete").await?;
        store.complete(key, id, parts, condition).await
    }
    async fn abort(&self, key: &Key, id: &str) -> Result<()> {
        self.before("abort").await?.abort(key, id).await
    }
    async fn copy(&self, from: CopySource<'_>, to: &Key, condition: &Condition) -> Result<Copied> {
        self.before("copy").await?.copy(from, to, condition).await
    }
    async fn copy_part(
        &self,
        key: &Key,
        id: &str,
        number: u32,
        from: PartSource<'_>,
    ) -> Result<Part> {
        let store = self.before("copy_part").await?;
        store.copy_part(key, id, number, from).await
    }
    async fn rename(
        &self,
        from: &Key,
        version: &Object,
        to: &Key,
        condition: &Condition,
    ) -> Result<Object> {
        let store = self.before("rename").await?;
        let moved = store.rename(from, version, to, condition).await?;
        (self.after_rename)("rename").await?;
        Ok(moved)
    }
    async fn incomplete_uploads(
        &self,
        prefix: &Key,
        before: SystemTime,
    ) -> Result<Vec<IncompleteUpload>> {
        let store = self.before("incomplete_uploads").await?;
        store.incomplete_uploads(prefix, before).await
    }
}
