//! The one driver of multipart uploads: for files that clients send, and for copies by parts.

use crate::catch_panic;
use crate::events::{Event, Teller};
use crate::path::Key;
use crate::store::{
    self, Attributes, Condition, Object, Part, PartSource, Store, StoreError, change,
};
use bytes::Bytes;
use std::sync::Arc;

/// Size of the parts, in bytes, by which large objects are copied inside the store.
pub const COPY_PART_SIZE: u64 = 1024 * 1024 * 1024;

/// A multipart upload that was created, and is neither completed nor aborted. Clones stand for the
/// same one, so that several parts can be on their way at once.
#[derive(Clone)]
pub struct MultipartUpload {
    store: Arc<dyn Store>,
    key: Key,
    upload_id: String,
}

impl MultipartUpload {
    /// CreateMultipartUpload: the object will have these attributes.
    pub async fn create(
        store: Arc<dyn Store>,
        key: &Key,
        attributes: &Attributes,
    ) -> store::Result<MultipartUpload> {
        let upload_id = store.create_upload(key, attributes).await?;
        Ok(MultipartUpload {
            store,
            key: key.clone(),
            upload_id,
        })
    }

    /// UploadPart.
    pub async fn upload_part(&self, number: u32, body: Bytes) -> store::Result<Part> {
        let store = &self.store;
        store
            .upload_part(&self.key, &self.upload_id, number, body)
            .await
    }

    /// UploadPartCopy.
    pub async fn copy_part(&self, number: u32, source: PartSource<'_>) -> store::Result<Part> {
        let store = &self.store;
        store
            .copy_part(&self.key, &self.upload_id, number, source)
            .await
    }

    /// CompleteMultipartUpload, if the condition holds. After an error the upload is still there, to
    /// be aborted.
    pub async fn complete(&self, parts: &[Part], condition: &Condition) -> store::Result<Object> {
        let store = self.store.as_ref();
        change::complete(store, &self.key, &self.upload_id, parts, condition).await
    }

    /// AbortMultipartUpload. If that fails the upload stays in the store, and its event says so.
    pub async fn abort(self, events: &Teller) {
        match abort(self.store.as_ref(), &self.key, &self.upload_id).await {
            Ok(()) => events.tell(Event::UploadAborted {
                key: self.key.to_string(),
                upload_id: self.upload_id,
            }),
            Err(error) => events.tell(Event::UploadLeft {
                key: self.key.to_string(),
                upload_id: self.upload_id,
                error: error.to_string(),
            }),
        }
    }
}

/// AbortMultipartUpload.
pub(super) async fn abort(store: &dyn Store, key: &Key, upload_id: &str) -> store::Result<()> {
    match catch_panic(store.abort(key, upload_id)).await {
        Ok(result) => result,
        Err(panicked) => Err(StoreError::Other(panicked.to_string())),
    }
}
