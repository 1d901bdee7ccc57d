//! S3 and compatible stores, through the AWS SDK: the only room that names it.
//!
//! Credentials, region and endpoint are left to the SDK (`AWS_*` variables, profiles, roles). Here
//! each method of the trait calls its request, which is in the file of its concern.

mod answers;
mod client;
mod conditions;
mod deletes;
#[doc(hidden)]
pub mod doubts;
mod errors;
mod fields;
mod http;
mod identity;
mod incomplete;
mod inspect;
mod listing;
mod metrics;
mod multipart;
mod objects;
mod ranges;
mod resend;
mod signs;
mod start;
mod tries;

#[doc(hidden)]
pub use client::{ANSWER_TIMEOUT, AnswerTimeouts, LIST_TIMEOUT};
pub use conditions::TriedConditions;
pub use start::{Listing, StartError};

use super::patience::{SignsOfLife, TIME_PER_PART, copy_time};
use super::{
    Attributes, Condition, Copied, CopySource, IncompleteUpload, KeptConditions, Key, Limits,
    ListRequest, Object, Page, Part, PartSource, Result, Store, StoreError,
};
use async_trait::async_trait;
use aws_sdk_s3::Client;
use bytes::Bytes;
use doubts::Doubts;
use resend::{change_until_answered, look_until_answered};
use std::fmt::{self, Debug, Formatter};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// One bucket.
pub struct S3Store {
    client: Client,
    bucket: String,
    /// Over TLS the connection protects the body: its SHA-256 need not be in the signature.
    unsigned_payload: bool,
    /// Whether this is AWS itself: no other endpoint is set.
    is_aws: bool,
    /// Conditions that the store is known to keep. Others are not sent.
    conditions: KeptConditions,
    /// The server's URL, if the settings name one: it is in sentences for the operator.
    endpoint: Option<String>,
    doubts: Arc<Doubts>,
}

impl Debug for S3Store {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Store")
            .field("bucket", &self.bucket)
            .field("conditions", &self.conditions)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for S3Store {
    fn limits(&self) -> Limits {
        Limits {
            copies_itself: true,
            conditions: self.conditions,
            ..Limits::default()
        }
    }

    async fn head(&self, key: &Key) -> Result<Object> {
        self.head_object(key).await
    }

    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>> {
        self.get_range(key, range, etag).await
    }

    async fn open(&self, key: &Key, limit: u64) -> Result<(Object, Bytes)> {
        self.get_beginning(key, limit).await
    }

    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<Object> {
        self.doubts
            .put(self, key, body, attributes, condition)
            .await
    }

    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()> {
        match condition {
            Condition::None => self.delete_any(key).await,
            // Nothing is there that could be deleted.
            Condition::Absent => Err(StoreError::Precondition),
            Condition::Unchanged(etag) => self.delete_version(key, etag).await,
        }
    }

    async fn copy(&self, from: CopySource<'_>, to: &Key, condition: &Condition) -> Result<Copied> {
        self.doubts.copy(self, from, to, condition).await
    }

    async fn list(&self, request: ListRequest<'_>) -> Result<Page> {
        look_until_answered("ListObjectsV2", || self.list_objects(request.clone())).await
    }

    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String> {
        self.doubts.create_upload(self, key, attributes).await
    }

    async fn upload_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        body: Bytes,
    ) -> Result<Part> {
        let send = || self.send_part(key, upload_id, number, body.clone());
        change_until_answered("UploadPart", Duration::ZERO, send).await
    }

    async fn copy_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        from: PartSource<'_>,
    ) -> Result<Part> {
        let in_advance = copy_time(from.range.end - from.range.start);
        let send = || self.upload_part_copy(key, upload_id, number, from.clone());
        change_until_answered("UploadPartCopy", in_advance, send).await
    }

    async fn complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Object> {
        self.doubts
            .complete(self, key, upload_id, parts, condition)
            .await
    }

    async fn abort(&self, key: &Key, upload_id: &str) -> Result<()> {
        self.doubts.forget(upload_id);
        self.abort_multipart_upload(key, upload_id).await
    }

    async fn incomplete_uploads(
        &self,
        prefix: &Key,
        before: SystemTime,
    ) -> Result<Vec<IncompleteUpload>> {
        self.find_incomplete_uploads(prefix, before).await
    }
}

impl doubts::Requests for S3Store {
    async fn send_head(&self, key: &Key) -> Result<Object> {
        // It has its own time, after that of the request in doubt.
        SignsOfLife::current().give();
        self.head_object(key).await
    }

    async fn send_put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<String> {
        self.put_until_answered(key, body, attributes, condition)
            .await
    }

    async fn send_create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String> {
        self.create_multipart_upload(key, attributes).await
    }

    async fn send_complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<String> {
        let send = || self.complete_multipart_upload(key, upload_id, parts, condition);
        let in_advance = TIME_PER_PART * parts.len() as u32;
        change_until_answered("CompleteMultipartUpload", in_advance, send).await
    }

    async fn send_copy(
        &self,
        from: CopySource<'_>,
        to: &Key,
        condition: &Condition,
    ) -> Result<String> {
        let send = || self.copy_object(from, to, condition);
        change_until_answered("CopyObject", copy_time(from.version.size), send).await
    }

    async fn have_equal_checksums(&self, keys: [&Key; 2], versions: [&str; 2]) -> bool {
        self.compare_checksums(keys, versions).await
    }
}
