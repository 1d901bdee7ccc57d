//! What a lost answer meant, and whether a refusal is the echo of this process's own earlier try:
//! what is there decides.
//!
//! A write carries a random id in its metadata. ETags can't decide: equal content of another client
//! has the same one, and under SSE-KMS and SSE-C equal content has different ones ([S3: object
//! integrity](https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html)).
//! A copy has the id of its source. If the source has none, because another program put it, the
//! ETags decide or else the checksums, which S3 has for every object.

use super::super::{
    Attributes, Condition, Copied, CopySource, Key, Object, Part, Result, StoreError,
};
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// The name of the user metadata (`x-amz-meta-…`) that holds the id of a write.
pub const WRITE_ID: &str = "sftpd-write-id";

/// The requests that doubts are about, and that settle them. Errors: `Unknown` if the answer was
/// lost, or if it leaves open what was done.
pub trait Requests: Sync {
    /// HeadObject.
    fn send_head(&self, key: &Key) -> impl Future<Output = Result<Object>> + Send;

    /// PutObject. Returns the ETag.
    fn send_put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> impl Future<Output = Result<String>> + Send;

    /// CreateMultipartUpload. Returns the upload id.
    fn send_create_upload(
        &self,
        key: &Key,
        attributes: &Attributes,
    ) -> impl Future<Output = Result<String>> + Send;

    /// CompleteMultipartUpload. Returns the ETag.
    fn send_complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> impl Future<Output = Result<String>> + Send;

    /// CopyObject. Returns the ETag of the copy.
    fn send_copy(
        &self,
        from: CopySource<'_>,
        to: &Key,
        condition: &Condition,
    ) -> impl Future<Output = Result<String>> + Send;

    /// Whether a checksum of the whole object shows that both have the same content. `versions` are
    /// their ETags.
    fn have_equal_checksums(
        &self,
        keys: [&Key; 2],
        versions: [&str; 2],
    ) -> impl Future<Output = bool> + Send;
}

/// Makes the requests, and settles what they leave open.
#[derive(Default)]
pub struct Doubts {
    /// Write ids of the multipart uploads in progress, by upload id.
    // A std lock: never held across an await.
    write_ids: Mutex<HashMap<String, String>>,
}

impl Doubts {
    /// PutObject.
    pub async fn put(
        &self,
        requests: &impl Requests,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<Object> {
        let size = body.len() as u64;
        let (attributes, write_id) = with_new_write_id(attributes);
        let made = requests.send_put(key, body, &attributes, condition).await;
        settle_write(requests, key, made, size, Some(write_id)).await
    }

    /// CreateMultipartUpload. Returns the upload id.
    pub async fn create_upload(
        &self,
        requests: &impl Requests,
        key: &Key,
        attributes: &Attributes,
    ) -> Result<String> {
        let (attributes, write_id) = with_new_write_id(attributes);
        let upload_id = requests.send_create_upload(key, &attributes).await?;
        self.write_ids().insert(upload_id.clone(), write_id);
        Ok(upload_id)
    }

    /// CompleteMultipartUpload.
    pub async fn complete(
        &self,
        requests: &impl Requests,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Object> {
        let size = parts.iter().map(|part| part.size).sum();
        let write_id = self.write_ids().get(upload_id).cloned();
        let made = requests
            .send_complete(key, upload_id, parts, condition)
            .await;
        let settled = settle_write(requests, key, made, size, write_id).await;
        if settled.is_ok() {
            self.forget(upload_id);
        }
        settled
    }

    /// To be called when an upload is aborted.
    pub fn forget(&self, upload_id: &str) {
        self.write_ids().remove(upload_id);
    }

    /// CopyObject.
    pub async fn copy(
        &self,
        requests: &impl Requests,
        from: CopySource<'_>,
        to: &Key,
        condition: &Condition,
    ) -> Result<Copied> {
        let doubt = match requests.send_copy(from, to, condition).await {
            Ok(etag) => {
                return Ok(Copied {
                    etag,
                    is_ours: true,
                });
            }
            Err(doubt @ (StoreError::Unknown(_) | StoreError::Precondition)) => doubt,
            Err(error) => return Err(error),
        };
        match find_copy(requests, from, to).await {
            Some(found) => Ok(Copied {
                etag: found.etag,
                is_ours: false,
            }),
            None => Err(doubt),
        }
    }

    fn write_ids(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.write_ids
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The attributes with a new write id, 128 random bits, which is returned too.
fn with_new_write_id(attributes: &Attributes) -> (Attributes, String) {
    let write_id = format!("{:032x}", rand::random::<u128>());
    let mut attributes = attributes.clone();
    attributes
        .metadata
        .insert(WRITE_ID.to_owned(), write_id.clone());
    (attributes, write_id)
}

/// Decides a write without a clear answer, by the id of the object that is there.
async fn settle_write(
    requests: &impl Requests,
    key: &Key,
    made: Result<String>,
    size: u64,
    write_id: Option<String>,
) -> Result<Object> {
    let doubt = match made {
        Ok(etag) => {
            let mut object = Object::new(size, etag, SystemTime::now());
            object.write_id = write_id;
            return Ok(object);
        }
        Err(doubt @ (StoreError::Unknown(_) | StoreError::Precondition)) => doubt,
        Err(error) => return Err(error),
    };
    match requests.send_head(key).await {
        Ok(object) if write_id.is_some() && object.write_id == write_id => Ok(object),
        Ok(_) | Err(_) => Err(doubt),
    }
}

/// The object at `to`, if it is a copy of this version.
async fn find_copy(requests: &impl Requests, from: CopySource<'_>, to: &Key) -> Option<Object> {
    let found = requests.send_head(to).await.ok()?;
    let version = match &from.version.attributes {
        Some(_) => from.version.clone(),
        // From a listing, which has no write id.
        None => requests.send_head(from.key).await.ok()?,
    };
    if version.etag != from.version.etag {
        return None;
    }
    let has_ids = found.write_id.is_some() || version.write_id.is_some();
    let is_copy = if found.is_copy_of(&version) {
        true
    } else if has_ids || found.size != version.size {
        false
    } else {
        let versions = [version.etag.as_str(), found.etag.as_str()];
        requests
            .have_equal_checksums([from.key, to], versions)
            .await
    };
    is_copy.then_some(found)
}
