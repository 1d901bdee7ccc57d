//! A store behind an [`Arc`], so that a store that wraps another can be generic and hold one that
//! others hold too.

use super::{
    Attributes, Condition, Copied, CopySource, IncompleteUpload, Key, Limits, ListRequest, Object,
    Page, Part, PartSource, Result, Store,
};
use async_trait::async_trait;
use bytes::Bytes;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

#[async_trait]
impl<S: Store + ?Sized> Store for Arc<S> {
    fn limits(&self) -> Limits {
        (**self).limits()
    }

    async fn head(&self, key: &Key) -> Result<Object> {
        (**self).head(key).await
    }

    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>> {
        (**self).get(key, range, etag).await
    }

    async fn list(&self, request: ListRequest<'_>) -> Result<Page> {
        (**self).list(request).await
    }

    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()> {
        (**self).delete(key, condition).await
    }

    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<Object> {
        (**self).put(key, body, attributes, condition).await
    }

    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String> {
        (**self).create_upload(key, attributes).await
    }

    async fn upload_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        body: Bytes,
    ) -> Result<Part> {
        (**self).upload_part(key, upload_id, number, body).await
    }

    async fn complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Object> {
        (**self).complete(key, upload_id, parts, condition).await
    }

    async fn abort(&self, key: &Key, upload_id: &str) -> Result<()> {
        (**self).abort(key, upload_id).await
    }

    async fn open(&self, key: &Key, limit: u64) -> Result<(Object, Bytes)> {
        (**self).open(key, limit).await
    }

    async fn copy(&self, from: CopySource<'_>, to: &Key, condition: &Condition) -> Result<Copied> {
        (**self).copy(from, to, condition).await
    }

    async fn copy_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        from: PartSource<'_>,
    ) -> Result<Part> {
        (**self).copy_part(key, upload_id, number, from).await
    }

    async fn rename(
        &self,
        from: &Key,
        version: &Object,
        to: &Key,
        condition: &Condition,
    ) -> Result<Object> {
        (**self).rename(from, version, to, condition).await
    }

    async fn incomplete_uploads(
        &self,
        prefix: &Key,
        before: SystemTime,
    ) -> Result<Vec<IncompleteUpload>> {
        (**self).incomplete_uploads(prefix, before).await
    }
}
