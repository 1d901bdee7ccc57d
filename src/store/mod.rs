//! Where files live: the [`Store`] trait, its errors and its plain types.
//!
//! Called by `vfs` and `transfer`. Nothing here knows of users, paths or SFTP, and no signature
//! names the S3 SDK, so an application can bring its own store. One conformance suite
//! (`tests/store.rs`) runs against every store.

pub mod change;
pub mod memory;
pub mod s3;

pub use crate::path::{Key, MAX_KEY};

use async_trait::async_trait;
use bytes::Bytes;
use md5::{Digest, Md5};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

/// Minimum size of a part, except the last one, in bytes
/// ([S3: multipart limits](https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html)).
pub const MIN_PART: u64 = 5 * 1024 * 1024;
/// Maximum number of parts of one upload (same page).
pub const MAX_PARTS: u32 = 10_000;
/// Maximum size of an object for CopyObject, and of a range for UploadPartCopy, in bytes (same
/// page).
pub const MAX_COPY: u64 = 5 * 1024 * 1024 * 1024;
/// Maximum number of entries in one answer to a list request (ListObjectsV2).
pub const MAX_PAGE: usize = 1000;

/// The description of one version of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Size in bytes.
    pub size: u64,
    /// Identifies this version of the content; with its quotes.
    pub etag: String,
    /// When it was stored, to the second.
    pub modified: SystemTime,
    /// In the words of `x-amz-storage-class`; `None` is the standard class.
    pub storage_class: Option<String>,
    /// What is stored beside the bytes; `None` if this is from a listing, which does not say.
    pub attributes: Option<Arc<Attributes>>,
}

impl Object {
    /// The id of the write that made the object, if sftpd made it. A copy has the id of its source.
    pub fn write_id(&self) -> Option<&str> {
        let attributes = self.attributes.as_ref()?;
        let id = attributes.metadata.get(WRITE_ID)?;
        Some(id)
    }
}

/// The name of the user metadata (`x-amz-meta-…`) that holds the random id of a write. If the
/// answer to a write is lost, it shows whether the write took place.
pub const WRITE_ID: &str = "sftpd-write-id";

/// What is stored with an object beside its bytes, except tags and access lists
/// ([S3: object metadata](https://docs.aws.amazon.com/AmazonS3/latest/userguide/UsingMetadata.html)).
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
    /// The storage class to write to; see [`Object::storage_class`].
    pub storage_class: Option<String>,
    /// User metadata, without `x-amz-meta-` before the names.
    pub metadata: BTreeMap<String, String>,
}

impl Attributes {
    /// A copy with a new write id, which is returned too.
    pub fn with_new_write_id(&self) -> (Attributes, WriteId) {
        let id = WriteId(format!("{:032x}", rand::random::<u128>()));
        let mut attributes = self.clone();
        attributes
            .metadata
            .insert(WRITE_ID.to_owned(), id.0.clone());
        (attributes, id)
    }
}

/// Identifies one write: 128 random bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteId(String);

/// What must be true of a key for a change to take place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing: the last write wins, as usual in S3.
    None,
    /// No object has this key yet (`If-None-Match: *`).
    Absent,
    /// The object at this key has this ETag (`If-Match`).
    Unchanged(String),
}

/// The conditions that a store keeps. A store may ignore a condition that it does not know.
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
    /// The version of the source on CopyObject (`x-amz-copy-source-if-match`).
    pub copy_source: bool,
    /// [`Condition::Unchanged`] on DeleteObject.
    pub delete_unchanged: bool,
}

impl KeptConditions {
    /// S3
    /// ([S3: conditional requests](https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html)).
    pub const ALL: KeptConditions = KeptConditions::same(true);
    /// A store that ignores all conditions.
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
    /// From the store's answer.
    pub etag: String,
    /// From the store's answer, if a checksum was sent (base64 of the CRC-32).
    pub checksum: Option<String>,
}

/// One entry of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// An object with this full key.
    Object(String, Object),
    /// One or more keys that start with this prefix, which ends with `/`.
    Prefix(String),
}

/// One answer to a list request.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// In the byte order of their keys.
    pub entries: Vec<Entry>,
    /// For the next [`ListRequest::after`]; `None` if this is the last page.
    pub next: Option<String>,
}

/// What to list.
#[derive(Clone, Debug)]
pub struct ListRequest<'a> {
    /// Only keys that start with this.
    pub prefix: &'a Key,
    /// Fold keys at the first `/` after the prefix into [`Entry::Prefix`], as a directory shows
    /// them.
    pub folded: bool,
    /// [`Page::next`] of the page before.
    pub after: Option<String>,
    /// Maximum number of entries, 1 to [`MAX_PAGE`].
    pub limit: usize,
}

/// Why a request to a store fails.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No such object (404 NoSuchKey). A missing upload is `Other`.
    #[error("no such object")]
    NotFound,
    /// No such bucket (404 NoSuchBucket).
    #[error("NoSuchBucket: there is no such bucket")]
    NoSuchBucket,
    /// The credentials don't allow this (403).
    #[error("the store refused access: {0}")]
    Forbidden(String),
    /// A [`Condition`] is not true, or the object has another version than was asked for (412, or
    /// 409 for two changes at once).
    #[error("the object was changed or made by someone else meanwhile")]
    Precondition,
    /// The source is larger than [`MAX_COPY`].
    #[error("too large to copy in one request")]
    TooLarge,
    /// The request may have taken effect: its answer was lost, or was not clear.
    #[error("the store did not say clearly whether this was done: {0}")]
    Unknown(String),
    /// Anything else, in the store's words.
    #[error("{0}")]
    Other(String),
}

/// Result of a store's request.
pub type Result<T> = std::result::Result<T, StoreError>;

/// An object store. It retries transient failures itself: an error is final.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// HeadObject. Errors: `NotFound`; `Forbidden`, which S3 also returns for a missing object if
    /// the credentials don't allow to list.
    async fn head(&self, key: &Key) -> Result<Object>;

    /// GetObject of a non-empty range inside the version `etag` of an object: exactly its bytes, in
    /// pieces. Errors: `Precondition` if the object has another version.
    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>>;

    /// GetObject of the first bytes, at most `limit`, of the version that is there. Returns its
    /// description, and as many of these bytes as arrived. Errors: see [`Store::head`].
    async fn open(&self, key: &Key, limit: u64) -> Result<(Object, Bytes)> {
        let object = self.head(key).await?;
        let first = 0..object.size.min(limit);
        if first.is_empty() {
            return Ok((object, Bytes::new()));
        }
        let pieces = self.get(key, first, &object.etag).await?;
        Ok((object, pieces.concat().into()))
    }

    /// The conditions that the store keeps. The others [`change`] checks before a request.
    fn conditions(&self) -> KeptConditions {
        KeptConditions::ALL
    }

    /// PutObject. Returns the object's ETag. Errors: `Unknown` if the answer was lost, which
    /// [`change::put`] decides.
    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<String>;

    /// DeleteObject. Without a condition a missing object is no error, even if the answer was lost.
    /// Errors under [`Condition::Unchanged`]: `NotFound`, `Precondition`.
    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()>;

    /// CopyObject of at most [`MAX_COPY`] bytes, with the attributes. Returns the copy's ETag.
    /// Errors: `NotFound`, `Precondition` (for the source's version or the target), `TooLarge`,
    /// `Unknown`.
    async fn copy(&self, from: CopySource<'_>, to: &Key, condition: &Condition) -> Result<String>;

    /// ListObjectsV2.
    async fn list(&self, request: ListRequest<'_>) -> Result<Page>;

    /// CreateMultipartUpload. Returns the upload id.
    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String>;

    /// UploadPart.
    async fn upload_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        body: Bytes,
    ) -> Result<Part>;

    /// UploadPartCopy of at most [`MAX_COPY`] bytes.
    async fn copy_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        from: PartSource<'_>,
    ) -> Result<Part>;

    /// CompleteMultipartUpload. Returns the object's ETag. Errors: `Unknown`, see [`Store::put`].
    async fn complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<String>;

    /// AbortMultipartUpload. A missing upload is no error.
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

/// A multipart upload that was neither completed nor aborted.
#[derive(Clone, Debug)]
pub struct IncompleteUpload {
    /// The key of the object that it would become.
    pub key: Key,
    /// The id that [`Store::create_upload`] returned.
    pub id: String,
    /// The parts that were sent, by number.
    pub parts: Vec<Part>,
}

/// The version of an object that CopyObject copies.
#[derive(Clone, Copy, Debug)]
pub struct CopySource<'a> {
    /// The object.
    pub key: &'a Key,
    /// Its version.
    pub etag: &'a str,
    /// The storage class that the copy gets; `None` is the standard class.
    pub storage_class: Option<&'a str>,
}

/// Bytes of an existing object that become a part.
#[derive(Clone, Debug)]
pub struct PartSource<'a> {
    /// The object.
    pub key: &'a Key,
    /// Its version.
    pub etag: &'a str,
    /// The bytes of it, at least one.
    pub range: Range<u64>,
}

/// The start of the names of objects that only serve to try out a store.
const PROBE_NAME: &str = ".sftpd-probe-";

/// A random key below this prefix, to try out the store with.
pub(crate) fn probe_key(prefix: &Key) -> Result<Key> {
    let id: u64 = rand::random();
    Key::new(format!("{prefix}{PROBE_NAME}{id:016x}")).ok_or(StoreError::NotFound)
}

/// Is this key from [`probe_key`]?
pub(crate) fn is_probe(key: &Key) -> bool {
    let name = match key.as_str().rsplit_once('/') {
        Some((_, name)) => name,
        None => key.as_str(),
    };
    match name.strip_prefix(PROBE_NAME) {
        Some(id) => id.len() == 16 && id.bytes().all(|digit| digit.is_ascii_hexdigit()),
        None => false,
    }
}

/// The bytes of a range of consecutive pieces, without copying them.
pub fn slice_pieces(pieces: &[Bytes], range: Range<u64>) -> Vec<Bytes> {
    let mut found = Vec::new();
    let mut skip = range.start as usize;
    let mut missing = (range.end - range.start) as usize;
    for piece in pieces {
        let from = skip.min(piece.len());
        let to = piece.len().min(from + missing);
        skip -= from;
        missing -= to - from;
        if from < to {
            found.push(piece.slice(from..to));
        }
    }
    found
}

/// The ETag that S3 gives an object sent in one piece: the quoted MD5 of its bytes
/// ([S3: object integrity](https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html)).
/// Under SSE-KMS and SSE-C it is another one.
pub fn etag_of(body: &[u8]) -> String {
    let mut hex = String::new();
    for byte in Md5::digest(body) {
        hex += &format!("{byte:02x}");
    }
    format!("\"{hex}\"")
}
