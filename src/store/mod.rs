//! Where files live: the [`Store`] trait, its errors and its plain types.
//!
//! Called by `tree`, `upload` and `download`. Nothing here knows of users, paths or SFTP, and nothing
//! of the S3 SDK shows in a signature, so an application can plug in a store of its own.
//! One conformance suite (`tests/store.rs`) runs against every store.

pub mod memory;
pub mod s3;

use async_trait::async_trait;
use bytes::Bytes;
use md5::{Digest, Md5};
use std::{fmt, ops::Range, time::SystemTime};

/// Longest key in bytes of UTF-8 ([S3: object keys](https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html)).
pub const MAX_KEY: usize = 1024;
/// Smallest part S3 takes, the last one aside ([S3: multipart limits](https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html)).
pub const MIN_PART: u64 = 5 * 1024 * 1024;
/// Most parts one upload can have (same page).
pub const MAX_PARTS: u32 = 10_000;
/// Largest object one CopyObject, and largest range one UploadPartCopy, can copy (same page).
pub const MAX_COPY: u64 = 5 * 1024 * 1024 * 1024;
/// Most entries in one answer to a list request (ListObjectsV2).
pub const MAX_PAGE: usize = 1000;

/// The key of an object or, empty or ending with `/`, the prefix that all keys of a directory share.
///
/// Made from client input in `tree::path` only, so that no unchecked string reaches a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// Checks length ([`MAX_KEY`], and the slash of a prefix) and refuses NUL; `None` when the text can't be a key.
    pub fn new(text: impl Into<String>) -> Option<Key> {
        let text = text.into();
        let longest = MAX_KEY + usize::from(text.ends_with('/'));
        (text.len() <= longest && !text.contains('\0')).then_some(Key(text))
    }

    /// The key as S3 sees it, not URL-encoded.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a store tells of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Size in bytes.
    pub size: u64,
    /// Identifies this version of the content, quotes included.
    pub etag: String,
    /// When it was stored, to the second.
    pub modified: SystemTime,
}

/// What must hold for a put, complete or copy to take place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing: the last writer wins, as everywhere in S3.
    None,
    /// No object has this key yet (`If-None-Match: *`).
    Absent,
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
    /// To be passed to the next [`Store::list`]; `None` when this was the last page.
    pub next: Option<String>,
}

/// What to list.
#[derive(Clone, Debug)]
pub struct ListRequest<'a> {
    /// Only keys that start so.
    pub prefix: &'a Key,
    /// Fold keys at the first `/` after the prefix, as a directory shows them.
    pub folded: bool,
    /// [`Page::next`] of the page before.
    pub after: Option<String>,
    /// At most so many entries, 1 to [`MAX_PAGE`].
    pub limit: usize,
}

/// Why a store said no.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No such object (404 NoSuchKey). Other things that can be missing, a bucket or an upload, are `Other`.
    #[error("no such object")]
    NotFound,
    /// No such bucket (404 NoSuchBucket).
    #[error("NoSuchBucket: there is no such bucket")]
    NoSuchBucket,
    /// The credentials don't allow this (403).
    #[error("the store refused access: {0}")]
    Forbidden(String),
    /// `If-Match` or [`Condition::Absent`] did not hold (412, or 409 for two at once).
    #[error("the object was changed or made by someone else meanwhile")]
    Precondition,
    /// The source is larger than [`MAX_COPY`].
    #[error("too large to copy in one request")]
    TooLarge,
    /// It can't be known whether the request took effect: the answer was lost, or said so.
    #[error("the store did not say clearly whether this was done: {0}")]
    Unknown(String),
    /// Everything else, in the store's words.
    #[error("{0}")]
    Other(String),
}

/// Result of a store's request.
pub type Result<T> = std::result::Result<T, StoreError>;

/// An object store. Transient failures are retried inside; an error is final.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// HeadObject. Errors: `NotFound`, `Forbidden` (also for a missing object, where listing is not allowed).
    async fn head(&self, key: &Key) -> Result<Object>;
    /// GetObject of a non-empty range inside the object, exactly so many bytes, in pieces as they came, of the version
    /// `etag` only (`Precondition` once there is another).
    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>>;
    /// GetObject of the first bytes, `most` at most, of whatever version there is: what the store tells of it, and as many
    /// of these bytes as came. Errors as for [`Store::head`].
    async fn open(&self, key: &Key, most: u64) -> Result<(Object, Bytes)> {
        let object = self.head(key).await?;
        let first = 0..object.size.min(most);
        let bytes = if first.is_empty() { Vec::new() } else { self.get(key, first, &object.etag).await? };
        Ok((object, bytes.concat().into()))
    }
    /// PutObject: the object's ETag. `Unknown` when the answer was lost: the caller decides by [`settle`].
    async fn put(&self, key: &Key, body: Bytes, condition: Condition) -> Result<String>;
    /// DeleteObject; a missing object is no error, whatever became of the answer.
    async fn delete(&self, key: &Key) -> Result<()>;
    /// CopyObject of at most [`MAX_COPY`] bytes, replacing the target: the copy's ETag. Errors: `NotFound`, `TooLarge`,
    /// `Unknown`.
    async fn copy(&self, from: &Key, to: &Key) -> Result<String>;
    /// ListObjectsV2.
    async fn list(&self, request: ListRequest<'_>) -> Result<Page>;
    /// CreateMultipartUpload: the upload id.
    async fn create_upload(&self, key: &Key) -> Result<String>;
    /// UploadPart.
    async fn upload_part(&self, key: &Key, upload_id: &str, number: u32, body: Bytes) -> Result<Part>;
    /// UploadPartCopy of a range of at most [`MAX_COPY`] bytes of the version `etag` of `from`.
    async fn copy_part(&self, key: &Key, upload_id: &str, number: u32, from: PartSource<'_>) -> Result<Part>;
    /// CompleteMultipartUpload: the object's ETag. `Unknown` as for [`Store::put`].
    async fn complete(&self, key: &Key, upload_id: &str, parts: &[Part], condition: Condition) -> Result<String>;
    /// AbortMultipartUpload; an upload that is gone is no error.
    async fn abort(&self, key: &Key, upload_id: &str) -> Result<()>;
    /// ListMultipartUploads and ListParts: multipart uploads to keys below `prefix` that were begun with the
    /// credentials in use, and to which nothing was added since `before`. A store that ends with the process has none.
    async fn stale_uploads(&self, _prefix: &Key, _before: SystemTime) -> Result<Vec<StaleUpload>> {
        Ok(Vec::new())
    }
}

/// A multipart upload that nobody seems to go on with.
#[derive(Clone, Debug)]
pub struct StaleUpload {
    /// The key that it would become.
    pub key: Key,
    /// As [`Store::create_upload`] answered.
    pub id: String,
    /// What was sent, by number.
    pub parts: Vec<Part>,
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

/// The bytes of a range, without a copy.
pub fn cut(pieces: &[Bytes], range: Range<u64>) -> impl Iterator<Item = Bytes> {
    let (mut skip, mut left) = (range.start as usize, (range.end - range.start) as usize);
    let cut = pieces.iter().map(move |piece| {
        let from = skip.min(piece.len());
        let to = piece.len().min(from + left);
        (skip, left) = (skip - from, left - (to - from));
        piece.slice(from..to)
    });
    cut.filter(|piece| !piece.is_empty())
}

/// Decides a lost answer to [`Store::put`] or [`Store::complete`], or a refusal that may be the echo of our own success,
/// by what is there now. Returns the object's ETag.
pub async fn settle(
    store: &dyn Store,
    key: &Key,
    made: Result<String>,
    size: u64,
    expected_etag: impl FnOnce() -> Option<String>,
) -> Result<String> {
    let Err(doubt @ (StoreError::Unknown(_) | StoreError::Precondition)) = made else { return made };
    match store.head(key).await {
        Ok(object) if object.size == size && expected_etag().as_ref() == Some(&object.etag) => Ok(object.etag),
        Ok(_) | Err(_) => Err(doubt),
    }
}

/// ETag that S3 gives an object sent in one piece: the quoted MD5 of its bytes
/// ([S3: object integrity](https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html)).
/// Not so under SSE-KMS or SSE-C.
pub fn etag_of(body: &[u8]) -> String {
    format!("\"{}\"", hex(&Md5::digest(body)))
}

/// ETag that S3 gives an object made of these parts: MD5 over the parts' binary MD5s, and their number.
/// `None` when a part's ETag is no MD5.
pub fn etag_of_parts(parts: &[Part]) -> Option<String> {
    let mut all = Md5::new();
    for part in parts {
        let digits = part.etag.trim_matches('"');
        let md5 = (digits.len() == 32).then(|| u128::from_str_radix(digits, 16).ok()).flatten()?;
        all.update(md5.to_be_bytes());
    }
    Some(format!("\"{}-{}\"", hex(&all.finalize()), parts.len()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
