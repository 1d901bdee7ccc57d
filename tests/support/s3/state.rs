//! What the bucket holds, and the conditions on it.

use super::BUCKET;
use super::encoding::{md5, now};
use super::faults::Faults;
use super::requests::RequestLog;
use bytes::Bytes;
use s3s::dto::{ContentType, CopySource, ETag, ETagCondition, Metadata, Timestamp};
use s3s::{S3Result, s3_error};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// The state, shared by the server and the test.
#[derive(Clone)]
pub struct Store(Arc<Mutex<State>>);

impl Default for Store {
    fn default() -> Store {
        Store(Arc::new(Mutex::new(State {
            min_part: 5 << 20,
            copy_limit: 5 << 30,
            ..State::default()
        })))
    }
}

impl Store {
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

#[derive(Default)]
pub struct State {
    pub objects: BTreeMap<String, Object>,
    /// Multipart uploads in progress, by their ids.
    pub uploads: BTreeMap<String, Upload>,
    /// Multipart uploads since the start.
    pub uploads_ever: usize,
    pub log: RequestLog,
    pub faults: Faults,
    /// In bytes.
    pub min_part: usize,
    /// In bytes.
    pub copy_limit: u64,
    pub ignores_if_match: bool,
    pub ignores_conditions: bool,
    pub begins_lists_empty: bool,
    pub has_random_etags: bool,
}

/// An object, or a part of one to be.
#[derive(Clone)]
pub struct Object {
    pub body: Bytes,
    pub etag: String,
    pub modified: Timestamp,
    pub about: About,
}

/// What a client says about an object.
#[derive(Clone, Default)]
pub struct About {
    pub content_type: Option<ContentType>,
    pub metadata: Option<Metadata>,
}

/// A multipart upload.
pub struct Upload {
    pub key: String,
    pub started: Timestamp,
    pub about: About,
    pub parts: BTreeMap<i32, Object>,
    /// The CRC-32 of each part, if the upload was begun to have them.
    pub checksums: Option<BTreeMap<i32, String>>,
    pub initiator: String,
}

type Condition<'a> = Option<&'a ETagCondition>;

impl Object {
    pub fn new(body: Bytes, about: About) -> Object {
        Object {
            etag: md5(&body),
            body,
            modified: now(),
            about,
        }
    }

    pub fn e_tag(&self) -> ETag {
        ETag::Strong(self.etag.clone())
    }

    /// Whether `If-Match` and `If-None-Match` let the object be used.
    pub fn check(&self, like: Condition, unlike: Condition) -> S3Result {
        let is = |condition: &ETagCondition| {
            let etag = condition.as_etag();
            etag.is_none_or(|etag| etag.value() == self.etag)
        };
        match (like, unlike) {
            (Some(like), _) if !is(like) => Err(s3_error!(PreconditionFailed)),
            (_, Some(unlike)) if is(unlike) => Err(s3_error!(NotModified)),
            _ => Ok(()),
        }
    }
}

impl State {
    pub fn insert(&mut self, key: String, mut object: Object) -> ETag {
        if self.has_random_etags {
            object.etag = format!("{:032x}", rand::random::<u128>());
        }
        let etag = object.e_tag();
        self.objects.insert(key, object);
        etag
    }

    pub fn object(&self, key: &str) -> S3Result<&Object> {
        self.objects.get(key).ok_or(s3_error!(NoSuchKey))
    }

    pub fn upload(&mut self, id: &str, key: &str) -> S3Result<&mut Upload> {
        let upload = self.uploads.get_mut(id).filter(|upload| upload.key == key);
        upload.ok_or(s3_error!(NoSuchUpload))
    }

    /// The parts of an upload, to which one of that number may be added.
    pub fn parts(
        &mut self,
        id: &str,
        key: &str,
        number: i32,
    ) -> S3Result<&mut BTreeMap<i32, Object>> {
        refuse!(InvalidArgument if !(1..=10_000).contains(&number));
        Ok(&mut self.upload(id, key)?.parts)
    }

    /// The object that `x-amz-copy-source` names.
    pub fn source(&self, from: &CopySource, like: Condition) -> S3Result<Object> {
        match from {
            CopySource::Bucket { bucket, key, .. } if **bucket == *BUCKET => {
                let source = self.object(key)?;
                source.check(like.filter(|_| !self.ignores_conditions), None)?;
                Ok(source.clone())
            }
            _ => Err(s3_error!(NoSuchBucket)),
        }
    }

    /// Whether `If-Match` and `If-None-Match` let the key be written.
    pub fn may_write(&self, key: &str, like: Condition, unlike: Condition) -> S3Result {
        match (like, unlike) {
            _ if self.ignores_conditions => Ok(()),
            (_, Some(ETagCondition::ETag(_))) => Err(s3_error!(NotImplemented)),
            (_, Some(_)) if self.objects.contains_key(key) => Err(s3_error!(PreconditionFailed)),
            (Some(_), _) => self.object(key)?.check(like, None),
            _ => Ok(()),
        }
    }
}
