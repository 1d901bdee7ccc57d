//! Where files live: the [`Store`] trait, its errors and its plain types.
//!
//! Called by `vfs` and `transfer`. Nothing here knows of users, paths or SFTP, and no signature
//! names the S3 SDK, so an application can bring its own store: nine methods, whose rules
//! `sftpd::testing::store_conformance` (feature `testing`) checks as far as they can be seen.

#[doc(hidden)]
pub mod change;
mod limits;
pub mod memory;
mod patience;
#[cfg(feature = "s3")]
pub mod s3;
mod shared;

pub use limits::{KeptConditions, Limits};
pub use patience::SignsOfLife;
#[doc(hidden)]
pub use patience::{PatientStore, Timeouts};

pub use crate::path::{Key, MAX_KEY};

use async_trait::async_trait;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

/// Maximum number of entries in one answer to a list request (ListObjectsV2).
pub const MAX_PAGE: usize = 1000;
/// How often the default [`Store::open`] looks for a version that it can read.
const OPEN_TRIES: u32 = 3;

/// The description of one version of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Object {
    /// Size in bytes.
    pub size: u64,
    /// Identifies this version of the content; with its quotes.
    pub etag: String,
    /// When it was stored, to the second.
    pub modified: SystemTime,
    /// In the words of `x-amz-storage-class`; `None` is the standard class.
    pub storage_class: Option<String>,
    /// Identifies the write that made the content, for a store whose ETags don't: equal content
    /// that was written twice has two. What [`Store::copy`] makes inside the store has the id of
    /// its source; a copy in parts, or by the default, is a write of its own. `None` if the store
    /// has no such ids, and in listings.
    pub write_id: Option<String>,
    /// What is stored beside the bytes; `None` if this is from a listing, which does not say.
    pub attributes: Option<Arc<Attributes>>,
}

impl Object {
    /// An object of the standard class, without a write id and attributes.
    pub fn new(size: u64, etag: impl Into<String>, modified: SystemTime) -> Object {
        Object {
            size,
            etag: etag.into(),
            modified,
            storage_class: None,
            write_id: None,
            attributes: None,
        }
    }

    /// Whether it has the content of this version of another object, as far as can be seen without
    /// reading it.
    pub fn is_copy_of(&self, version: &Object) -> bool {
        if self.size != version.size {
            return false;
        }
        match (&self.write_id, &version.write_id) {
            (Some(id), Some(copied)) => id == copied,
            (Some(_), None) | (None, Some(_)) => false,
            (None, None) => self.etag == version.etag,
        }
    }
}

/// What is stored with an object beside its bytes, except tags and access lists
/// ([S3: object metadata](https://docs.aws.amazon.com/AmazonS3/latest/userguide/UsingMetadata.html)).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
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

/// A part that the store has confirmed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Part {
    /// 1 to [`Limits::max_parts`].
    pub number: u32,
    /// Size in bytes, as sent.
    pub size: u64,
    /// From the store's answer.
    pub etag: String,
    /// From the store's answer, if a checksum was sent (base64 of the CRC-32).
    pub checksum: Option<String>,
}

impl Part {
    /// A part without a checksum.
    pub fn new(number: u32, size: u64, etag: impl Into<String>) -> Part {
        Part {
            number,
            size,
            etag: etag.into(),
            checksum: None,
        }
    }
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
    /// In any order. But if [`ListRequest::folded`] is set, no page has a name that comes before
    /// one of an earlier page, in byte order: with the `/` of prefixes as in S3, or without as in a
    /// file system.
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
#[non_exhaustive]
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
    /// The source is larger than [`Limits::max_copy`].
    #[error("too large to copy in one request")]
    TooLarge,
    /// The store has no such request: the server does the same with others.
    #[error("the store has no such request")]
    Unsupported,
    /// The request may have taken effect: its answer was lost, or was not clear.
    #[error("the store did not say clearly whether this was done: {0}")]
    Unknown(String),
    /// Anything else, in the store's words.
    #[error("{0}")]
    Other(String),
}

/// Result of a store's request.
pub type Result<T> = std::result::Result<T, StoreError>;

/// An object store.
///
/// Nine methods are to be written. The others have defaults that are right, if slow. The rules that
/// hold for all of them:
///
/// - An error is final: the store retries transient failures itself.
/// - The store settles its own doubts. `put`, `complete`, `copy`, `delete` and `rename` find out
///   what a lost answer meant, in whatever way the store allows. They return
///   [`StoreError::Unknown`] only if that is impossible, and never say that something was done that
///   was not.
/// - A future that is dropped may or may not have taken effect.
/// - A request that gives no sign of life ([`SignsOfLife`]) for the server's `open_timeout` or
///   `close_timeout` is dropped.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// What the store demands and allows: always the same. Asked for before the first request, and
    /// before changes.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// HeadObject. Errors: `NotFound`; `Forbidden`, which S3 also returns for a missing object if
    /// the credentials don't allow to list.
    async fn head(&self, key: &Key) -> Result<Object>;

    /// GetObject of a non-empty range inside the version `etag` of an object: exactly its bytes, in
    /// pieces. Errors: `Precondition` if the object has another version.
    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>>;

    /// ListObjectsV2.
    async fn list(&self, request: ListRequest<'_>) -> Result<Page>;

    /// DeleteObject. Without a condition a missing object is no error. Errors under
    /// [`Condition::Unchanged`]: `Precondition`, and `NotFound` or `Precondition` if there is no
    /// object. Under [`Condition::Absent`], which the server never asks for, nothing is deleted.
    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()>;

    /// PutObject. Returns the object, whose time of change may be an estimate. Errors:
    /// `Precondition`.
    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<Object>;

    /// CreateMultipartUpload. Returns the upload id. Nothing appears at the key before
    /// [`Store::complete`].
    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String>;

    /// UploadPart, several of an upload at once and in any order.
    async fn upload_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        body: Bytes,
    ) -> Result<Part>;

    /// CompleteMultipartUpload: these parts, in this order, become the object at once. Returns it,
    /// as [`Store::put`] does. After an error the upload is still there, to be aborted. Errors:
    /// `Precondition`.
    async fn complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Object>;

    /// AbortMultipartUpload. A missing upload is no error.
    async fn abort(&self, key: &Key, upload_id: &str) -> Result<()>;

    /// GetObject of the first bytes, at most `limit`, which is at least 1, of the version that is
    /// there. Returns its description, and as many of these bytes as arrived. Errors: see
    /// [`Store::head`]. The default sends a HEAD and a GET, and begins anew if the object is
    /// replaced in between.
    async fn open(&self, key: &Key, limit: u64) -> Result<(Object, Bytes)> {
        let signs = SignsOfLife::current();
        let mut tries_left = OPEN_TRIES;
        loop {
            tries_left -= 1;
            let object = self.head(key).await?;
            signs.give();
            let first = 0..object.size.min(limit);
            if first.is_empty() {
                return Ok((object, Bytes::new()));
            }
            match self.get(key, first, &object.etag).await {
                Ok(pieces) => return Ok((object, pieces.concat().into())),
                Err(StoreError::Precondition | StoreError::NotFound) if tries_left > 0 => {}
                Err(error) => return Err(error),
            }
            signs.give();
        }
    }

    /// CopyObject of at most [`Limits::max_copy`] bytes, with the attributes. Errors: `NotFound`,
    /// `Precondition` (for the source's version or the target), `TooLarge`. The default reads the
    /// object into memory and puts it, unless [`Limits::copies_itself`] says that it does not: then
    /// it is `Unsupported`.
    async fn copy(&self, from: CopySource<'_>, to: &Key, condition: &Condition) -> Result<Copied> {
        if self.limits().copies_itself {
            return Err(StoreError::Unsupported);
        }
        let signs = SignsOfLife::current();
        let source = self.head(from.key).await?;
        signs.give();
        if source.etag != from.version.etag {
            return Err(StoreError::Precondition);
        }
        let mut attributes = source.attributes.as_deref().cloned().unwrap_or_default();
        attributes.storage_class = source.storage_class;
        let body = match source.size {
            0 => Bytes::new(),
            size => self
                .get(from.key, 0..size, &source.etag)
                .await?
                .concat()
                .into(),
        };
        signs.give();
        let copy = self.put(to, body, &attributes, condition).await?;
        Ok(Copied {
            etag: copy.etag,
            is_ours: true,
        })
    }

    /// UploadPartCopy of at most [`Limits::max_copy`] bytes. The default reads them into memory and
    /// uploads them, unless [`Limits::copies_itself`] says that it does not.
    async fn copy_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        from: PartSource<'_>,
    ) -> Result<Part> {
        if self.limits().copies_itself {
            return Err(StoreError::Unsupported);
        }
        let signs = SignsOfLife::current();
        let pieces = self.get(from.key, from.range, from.etag).await?;
        signs.give();
        let body = pieces.concat().into();
        self.upload_part(key, upload_id, number, body).await
    }

    /// Moves this version of an object at once, with its attributes: at no time are there two, or
    /// none. Returns the object at its new key. Errors: `NotFound`, `Precondition` (for the
    /// source's version or the target). The default is `Unsupported`, as S3 has no such request:
    /// the server copies, looks whether the copy is there, and deletes the source.
    async fn rename(
        &self,
        _from: &Key,
        _version: &Object,
        _to: &Key,
        _condition: &Condition,
    ) -> Result<Object> {
        Err(StoreError::Unsupported)
    }

    /// ListMultipartUploads and ListParts: multipart uploads to keys below `prefix` that were begun
    /// by this server or an earlier one, and to which nothing was added since `before`. The default
    /// is none, which is right for a store whose uploads end with the process.
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
#[non_exhaustive]
pub struct IncompleteUpload {
    /// The key of the object that it would become.
    pub key: Key,
    /// The id that [`Store::create_upload`] returned.
    pub id: String,
    /// The parts that were sent, by number.
    pub parts: Vec<Part>,
}

impl IncompleteUpload {
    /// An upload to this key.
    pub fn new(key: Key, id: impl Into<String>, parts: Vec<Part>) -> IncompleteUpload {
        IncompleteUpload {
            key,
            id: id.into(),
            parts,
        }
    }
}

/// The version of an object that CopyObject copies. The copy gets the storage class of the source.
#[derive(Clone, Copy, Debug)]
pub struct CopySource<'a> {
    /// The object.
    pub key: &'a Key,
    /// Its version, which may be from a listing.
    pub version: &'a Object,
}

/// A copy that [`Store::copy`] made or found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copied {
    /// The ETag of the object at the target.
    pub etag: String,
    /// Whether this request certainly made it. Otherwise the target is a copy of the same version,
    /// but someone else may have made it.
    pub is_ours: bool,
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
#[cfg(feature = "s3")]
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
