//! Where files live: the [`Store`] trait, its errors and its plain types.
//!
//! Called by `transfer` and `vfs`. Nothing here knows of users, paths or SFTP, and nothing of the
//! S3 SDK shows in a signature, so an application can plug in a store of its own. One conformance
//! suite (`tests/store.rs`) runs against every store.

pub mod change;
pub mod memory;
pub mod s3;

pub use crate::path::{Key, MAX_KEY};

use async_trait::async_trait;
use bytes::Bytes;
use md5::{Digest, Md5};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::{ops::Range, time::SystemTime};

/// Smallest part S3 takes, the last one aside ([S3: multipart
/// limits](https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html)).
pub const MIN_PART: u64 = 5 * 1024 * 1024;
/// Most parts one upload can have (same page).
pub const MAX_PARTS: u32 = 10_000;
/// Largest object one CopyObject, and largest range one UploadPartCopy, can copy (same page).
pub const MAX_COPY: u64 = 5 * 1024 * 1024 * 1024;
/// Most entries in one answer to a list request (ListObjectsV2).
pub const MAX_PAGE: usize = 1000;

/// What a store tells of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Size in bytes.
    pub size: u64,
    /// Identifies this version of the content, quotes included.
    pub etag: String,
    /// When it was stored, to the second.
    pub modified: SystemTime,
    /// As `x-amz-storage-class` names it; `None` is the standard class.
    pub storage_class: Option<String>,
    /// What is stored beside the bytes. `None` in a listing, which does not tell.
    pub attributes: Option<Arc<Attributes>>,
}

impl Object {
    /// The id of the write that made it, if that was one of ours or a copy of such an object.
    pub fn write_id(&self) -> Option<&str> {
        let metadata = &self.attributes.as_ref()?.metadata;
        metadata.get(WRITE_ID).map(String::as_str)
    }
}

/// The key of user metadata (`x-amz-meta-…`) that holds the random id of a write. It decides
/// whether a write whose answer was lost took place. A copy carries the id of its source.
pub const WRITE_ID: &str = "sftpd-write-id";

/// Attributes that are stored with an object ([S3: object
/// metadata](https://docs.aws.amazon.com/AmazonS3/latest/userguide/UsingMetadata.html)). Tags and
/// access lists are not among it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// `Content-Type`.
    pub content_type: Option<String>,
    /// `Cache-Control`.
    pub cache_control: Option<String>,
    /// `Content-Disposition`.
    pub content_disposition: Option<String>,
    /// `Content-Encoding`.
    pub content_encoding: Option<String>,
    /// `Content-Language`.
    pub content_language: Option<String>,
    /// The storage class to write to, as [`Object::storage_class`].
    pub storage_class: Option<String>,
    /// User metadata, without `x-amz-meta-` before the names.
    pub metadata: BTreeMap<String, String>,
}

impl Attributes {
    /// The same with a fresh write id, which is returned too.
    pub fn with_new_write_id(&self) -> (Attributes, WriteId) {
        let id = WriteId(format!("{:032x}", rand::random::<u128>()));
        let mut attributes = self.clone();
        attributes
            .metadata
            .insert(WRITE_ID.to_owned(), id.0.clone());
        (attributes, id)
    }
}

/// Tells one write from all others: 128 random bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteId(String);

/// What must hold for a change of a key to take place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing: the last writer wins, as everywhere in S3.
    None,
    /// No object has this key yet (`If-None-Match: *`).
    Absent,
    /// The object at this key has this ETag (`If-Match`).
    Unchanged(String),
}

/// Which conditions a store keeps. A store that doesn't know a condition may ignore it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptConditions {
    /// [`Condition::Absent`] on PutObject.
    pub put_absent: bool,
    /// [`Condition::Unchanged`] on PutObject.
    pub put_unchanged: bool,
    /// [`Condition::Absent`] on CompleteMultipartUpload.
    pub complete_absent: bool,
    /// [`Condition::Unchanged`] on CompleteMultipartUpload.
    pub complete_unchanged: bool,
    /// [`Condition::Absent`] on CopyObject.
    pub copy_absent: bool,
    /// The version of a CopyObject's source (`x-amz-copy-source-if-match`).
    pub copy_source: bool,
    /// [`Condition::Unchanged`] on DeleteObject.
    pub delete_unchanged: bool,
}

impl KeptConditions {
    /// As S3 documents them ([S3: conditional
    /// requests](https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html)).
    pub const ALL: KeptConditions = KeptConditions::same(true);
    /// A store that ignores them.
    pub const NONE: KeptConditions = KeptConditions::same(false);

    const fn same(kept: bool) -> KeptConditions {
        KeptConditions {
            put_absent: kept,
            put_unchanged: kept,
            complete_absent: kept,
            complete_unchanged: kept,
            copy_absent: kept,
            copy_source: kept,
            delete_unchanged: kept,
        }
    }
}

/// A part that the store has confirmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// 1 to [`MAX_PARTS`].
    pub number: u32,
    /// Size in bytes, as sent.
    pub size: u64,
    /// As the store answered.
    pub etag: String,
    /// As the store answered, where it was sent a checksum (base64 of the CRC-32).
    pub checksum: Option<String>,
}

/// One entry of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// An object with this full key.
    Object(String, Object),
    /// Keys that go on after this prefix, which ends with `/`.
    Prefix(String),
}

/// One answer to a list request.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// In the byte order of their keys.
    pub entries: Vec<Entry>,
    /// To be passed to the next [`Store::list`]; `None` if this was the last page.
    pub next: Option<String>,
}

/// What to list.
#[derive(Clone, Debug)]
pub struct ListRequest<'a> {
    /// Only keys that start with it.
    pub prefix: &'a Key,
    /// Fold keys at the first `/` after the prefix, as a directory shows them.
    pub folded: bool,
    /// [`Page::next`] of the page before.
    pub after: Option<String>,
    /// Limit on the entries, 1 to [`MAX_PAGE`].
    pub limit: usize,
}

/// Why a request to a store failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No such object (404 NoSuchKey). Other things that can be missing, a bucket or an upload, are
    /// `Other`.
    #[error("no such object")]
    NotFound,
    /// No such bucket (404 NoSuchBucket).
    #[error("NoSuchBucket: there is no such bucket")]
    NoSuchBucket,
    /// The credentials don't allow this (403).
    #[error("the store refused access: {0}")]
    Forbidden(String),
    /// A [`Condition`] or the version asked for did not hold (412, or 409 for two at once).
    #[error("the object was changed or made by someone else meanwhile")]
    Precondition,
    /// The source is larger than [`MAX_COPY`].
    #[error("too large to copy in one request")]
    TooLarge,
    /// It can't be known whether the request took effect: the answer was lost, or said so.
    #[error("the store did not say clearly whether this was done: {0}")]
    Unknown(String),
    /// Any other failure, in the store's words.
    #[error("{0}")]
    Other(String),
}

/// Result of a store's request.
pub type Result<T> = std::result::Result<T, StoreError>;

/// An object store. Transient failures are retried inside; an error is final.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// HeadObject. Errors: `NotFound`, `Forbidden` (also for a missing object, where listing is not
    /// allowed).
    async fn head(&self, key: &Key) -> Result<Object>;
    /// GetObject of a non-empty range inside the object: exactly these bytes, in pieces as they
    /// arrived, of the version `etag` only (`Precondition` once there is another).
    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>>;
    /// GetObject of the first bytes, at most `max`, of whatever version there is. Returns the
    /// object, and as many of these bytes as arrived. Errors as for [`Store::head`].
    async fn open(&self, key: &Key, max: u64) -> Result<(Object, Bytes)> {
        let object = self.head(key).await?;
        let first = 0..object.size.min(max);
        let bytes = if first.is_empty() {
            Vec::new()
        } else {
            self.get(key, first, &object.etag).await?
        };
        Ok((object, bytes.concat().into()))
    }
    /// Which conditions hold in this store. Those that don't are looked at before the request by
    /// [`change`].
    fn conditions(&self) -> KeptConditions {
        KeptConditions::ALL
    }
    /// PutObject: the object's ETag. `Unknown` when the answer was lost: [`change::put`] finds out.
    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<String>;
    /// DeleteObject. Without a condition a missing object is no error, whatever became of the
    /// answer. Under [`Condition::Unchanged`] the errors are `NotFound` and `Precondition`.
    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()>;
    /// CopyObject of at most [`MAX_COPY`] bytes with its attributes: the copy's ETag. Errors:
    /// `NotFound`, `Precondition` (of the source's version or of the target), `TooLarge`,
    /// `Unknown`.
    async fn copy(&self, from: CopySource<'_>, to: &Key, condition: &Condition) -> Result<String>;
    /// ListObjectsV2.
    async fn list(&self, request: ListRequest<'_>) -> Result<Page>;
    /// CreateMultipartUpload: the upload id.
    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String>;
    /// UploadPart.
    async fn upload_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        body: Bytes,
    ) -> Result<Part>;
    /// UploadPartCopy of a range of at most [`MAX_COPY`] bytes of the version `etag` of `from`.
    async fn copy_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        from: PartSource<'_>,
    ) -> Result<Part>;
    /// CompleteMultipartUpload: the object's ETag. `Unknown` as for [`Store::put`].
    async fn complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<String>;
    /// AbortMultipartUpload; an upload that is gone is no error.
    async fn abort(&self, key: &Key, upload_id: &str) -> Result<()>;
    /// ListMultipartUploads and ListParts: multipart uploads to keys below `prefix` that were begun
    /// with the credentials in use, and to which nothing was added since `before`. A store that
    /// ends with the process has none.
    async fn incomplete_uploads(
        &self,
        _prefix: &Key,
        _before: SystemTime,
    ) -> Result<Vec<IncompleteUpload>> {
        Ok(Vec::new())
    }
}

/// A multipart upload that no client seems to go on with.
#[derive(Clone, Debug)]
pub struct IncompleteUpload {
    /// The key that it would become.
    pub key: Key,
    /// As [`Store::create_upload`] answered.
    pub id: String,
    /// What was sent, by number.
    pub parts: Vec<Part>,
}

/// The version of an object that is copied.
#[derive(Clone, Copy, Debug)]
pub struct CopySource<'a> {
    /// The object.
    pub key: &'a Key,
    /// Its version.
    pub etag: &'a str,
    /// The storage class that the copy gets: without it, the standard one.
    pub storage_class: Option<&'a str>,
}

/// Bytes of an existing object that become a part.
#[derive(Clone, Debug)]
pub struct PartSource<'a> {
    /// The object.
    pub key: &'a Key,
    /// Its version.
    pub etag: &'a str,
    /// Which bytes of it.
    pub range: Range<u64>,
}

/// Prefix of the names of keys that only serve to try out what a store can do.
const PROBE_NAME: &str = ".sftpd-probe-";

/// A random key below this prefix, to try something out.
pub(crate) fn probe_key(prefix: &Key) -> Result<Key> {
    let id: u64 = rand::random();
    Key::new(format!("{prefix}{PROBE_NAME}{id:016x}")).ok_or(StoreError::NotFound)
}

/// Is this one of [`probe_key`]'s?
pub(crate) fn is_probe(key: &Key) -> bool {
    let name = key.as_str().rsplit('/').next().unwrap_or_default();
    match name.strip_prefix(PROBE_NAME) {
        Some(id) => id.len() == 16 && id.bytes().all(|digit| digit.is_ascii_hexdigit()),
        None => false,
    }
}

/// The bytes of a range, without a copy.
pub fn slice_pieces(pieces: &[Bytes], range: Range<u64>) -> Vec<Bytes> {
    let mut skip = range.start as usize;
    let mut left = (range.end - range.start) as usize;
    let mut slices = Vec::new();
    for piece in pieces {
        let from = skip.min(piece.len());
        let to = piece.len().min(from + left);
        skip -= from;
        left -= to - from;
        if from < to {
            slices.push(piece.slice(from..to));
        }
    }
    slices
}

/// ETag that S3 gives an object sent in one piece: the quoted MD5 of its bytes ([S3: object
/// integrity](https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html)).
/// Not so under SSE-KMS or SSE-C.
pub fn etag_of(body: &[u8]) -> String {
    format!("\"{}\"", hex(&Md5::digest(body)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
