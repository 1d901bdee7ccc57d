//! A bucket as S3 has them: objects, multipart uploads, ETags and conditions, without clock or
//! network. Every change of an object is written into the journal.

use super::history::{Cause, Journal, What};
use super::plan::StoreKind;
use bytes::Bytes;
use md5::{Digest, Md5};
use sftpd::store::Attributes;
use std::collections::{BTreeMap, BTreeSet};

/// Entries in one answer to a list request: few, so that most lists have several pages.
const PAGE: usize = 2;

/// Why S3 does not do what it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    NotFound,
    Precondition,
    NoSuchUpload,
    InvalidPart,
}

pub type Result<T> = std::result::Result<T, Refusal>;

/// What must be at a key for a request to be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expectation {
    Anything,
    /// `If-None-Match: *`.
    Absent,
    /// `If-Match` with this ETag.
    Version(String),
}

/// An object.
#[derive(Clone, Debug)]
pub struct Version {
    pub content: Bytes,
    pub etag: String,
    pub attributes: Attributes,
}

/// A multipart upload in progress.
struct Parts {
    key: String,
    attributes: Attributes,
    parts: BTreeMap<u32, (Bytes, String)>,
}

/// One entry of a list.
pub enum Listed {
    Object(String, Box<Version>),
    Prefix(String),
}

pub struct Bucket {
    kind: StoreKind,
    /// `None` in a scratch copy, whose changes are not part of the history.
    journal: Option<Journal>,
    objects: BTreeMap<String, Version>,
    uploads: BTreeMap<String, Parts>,
    /// Uploads that can't be ended by the one who began them: the id was lost, or the abort failed.
    abandoned: BTreeSet<String>,
    /// Uploads that were aborted, and their keys.
    aborted: BTreeMap<String, String>,
    /// Keys of parts that arrived after the abort of their upload: they stay, invisible and billed.
    orphans: Vec<String>,
    last_id: u64,
}

impl Bucket {
    pub fn new(kind: StoreKind, journal: Journal) -> Bucket {
        Bucket {
            kind,
            journal: Some(journal),
            objects: BTreeMap::new(),
            uploads: BTreeMap::new(),
            abandoned: BTreeSet::new(),
            aborted: BTreeMap::new(),
            orphans: Vec::new(),
            last_id: 0,
        }
    }

    /// A copy of the objects in which a request can be tried without effect.
    pub fn scratch(&self) -> Bucket {
        Bucket {
            kind: self.kind,
            journal: None,
            objects: self.objects.clone(),
            uploads: BTreeMap::new(),
            abandoned: BTreeSet::new(),
            aborted: BTreeMap::new(),
            orphans: Vec::new(),
            // ETags of what was never stored are nobody else's.
            last_id: self.last_id + (1 << 32),
        }
    }

    pub fn keeps_conditions(&self) -> bool {
        self.kind.keeps_conditions
    }

    pub fn head(&self, key: &str) -> Result<Version> {
        self.objects.get(key).cloned().ok_or(Refusal::NotFound)
    }

    /// Stores refuse a GET whose `If-Match` does not hold, even those that ignore conditions of
    /// writes.
    pub fn get(&self, key: &str, etag: &str) -> Result<Version> {
        let version = self.head(key)?;
        if version.etag == etag {
            Ok(version)
        } else {
            Err(Refusal::Precondition)
        }
    }

    pub fn put(
        &mut self,
        key: &str,
        version: NewVersion,
        expectation: &Expectation,
        cause: Cause,
    ) -> Result<String> {
        self.check(key, expectation)?;
        let etag = match &version.etag {
            Some(etag) if self.kind.has_md5_etags => etag.clone(),
            _ => format!("\"{}\"", self.fresh_id()),
        };
        let NewVersion {
            content,
            attributes,
            ..
        } = version;
        self.replace(
            key,
            Some(Version {
                content,
                etag: etag.clone(),
                attributes,
            }),
            cause,
        );
        Ok(etag)
    }

    /// Without a condition, a missing object is no error.
    pub fn delete(&mut self, key: &str, expectation: &Expectation, cause: Cause) -> Result<()> {
        self.check(key, expectation)?;
        self.replace(key, None, cause);
        Ok(())
    }

    /// `source_etag` is `x-amz-copy-source-if-match`. The copy has the attributes of its source.
    pub fn copy(&mut self, copy: &Copy, cause: Cause) -> Result<String> {
        let source = match &copy.source_etag {
            Some(etag) => self.get(&copy.from, etag)?,
            None => self.head(&copy.from)?,
        };
        let version = NewVersion {
            attributes: source.attributes,
            ..NewVersion::of(source.content)
        };
        self.put(&copy.to, version, &copy.expectation, cause)
    }

    pub fn create_upload(&mut self, key: &str, attributes: Attributes) -> String {
        let id = format!("upload{}", self.fresh_id());
        self.uploads.insert(
            id.clone(),
            Parts {
                key: key.to_owned(),
                attributes,
                parts: BTreeMap::new(),
            },
        );
        id
    }

    /// Returns the part's ETag.
    pub fn upload_part(&mut self, id: &str, number: u32, body: Bytes) -> Result<String> {
        let etag = md5_of(&body);
        self.orphans.extend(self.aborted.get(id).cloned());
        let upload = self.uploads.get_mut(id).ok_or(Refusal::NoSuchUpload)?;
        upload.parts.insert(number, (body, etag.clone()));
        Ok(etag)
    }

    /// All parts but the last have at least `least` bytes, and their numbers rise.
    pub fn complete(&mut self, complete: &Complete, least: u64, cause: Cause) -> Result<String> {
        let upload = self
            .uploads
            .get(&complete.id)
            .ok_or(Refusal::NoSuchUpload)?;
        let mut bodies = Vec::new();
        for (number, etag) in &complete.parts {
            let (body, known) = upload.parts.get(number).ok_or(Refusal::InvalidPart)?;
            let is_too_small = bodies
                .last()
                .is_some_and(|before: &Bytes| (before.len() as u64) < least);
            if known != etag || is_too_small {
                return Err(Refusal::InvalidPart);
            }
            bodies.push(body.clone());
        }
        if !complete
            .parts
            .is_sorted_by(|(before, _), (after, _)| before < after)
        {
            return Err(Refusal::InvalidPart);
        }
        let digests: Vec<u8> = bodies
            .iter()
            .flat_map(|body| Md5::digest(body).to_vec())
            .collect();
        let etag = format!(
            "\"{}-{}\"",
            md5_of(&digests).trim_matches('"'),
            bodies.len()
        );
        let (key, attributes) = (upload.key.clone(), upload.attributes.clone());
        let version = NewVersion {
            content: bodies.concat().into(),
            etag: Some(etag),
            attributes,
        };
        let etag = self.put(&key, version, &complete.expectation, cause)?;
        self.uploads.remove(&complete.id);
        Ok(etag)
    }

    pub fn abort(&mut self, id: &str) {
        if let Some(upload) = self.uploads.remove(id) {
            self.aborted.insert(id.to_owned(), upload.key);
        }
    }

    /// From now on nobody is to blame if this upload stays.
    pub fn abandon(&mut self, id: &str) {
        self.abandoned.insert(id.to_owned());
    }

    /// Keys of uploads in progress that somebody should have ended, and of parts that belong to
    /// none.
    pub fn uploads(&self) -> Vec<String> {
        let left = self
            .uploads
            .iter()
            .filter(|(id, _)| !self.abandoned.contains(*id));
        let left = left.map(|(_, upload)| upload.key.clone());
        left.chain(self.orphans.iter().cloned()).collect()
    }

    /// One page: its entries, and where the next one begins.
    pub fn list(
        &self,
        prefix: &str,
        is_folded: bool,
        after: Option<String>,
        limit: usize,
    ) -> (Vec<Listed>, Option<String>) {
        let mut entries = Vec::new();
        let mut from = after.unwrap_or_else(|| prefix.to_owned());
        while let Some((key, version)) = self.objects.range(from.clone()..).next() {
            let Some(rest) = key.strip_prefix(prefix) else {
                break;
            };
            if entries.len() == limit.min(PAGE) {
                return (entries, Some(from));
            }
            match rest.split_once('/') {
                Some((name, _)) if is_folded => {
                    // `0` follows `/`: the least text above every key in that directory.
                    from = format!("{prefix}{name}0");
                    entries.push(Listed::Prefix(format!("{prefix}{name}/")));
                }
                _ => {
                    from = format!("{key}\0");
                    entries.push(Listed::Object(key.clone(), Box::new(version.clone())));
                }
            }
        }
        (entries, None)
    }

    fn check(&self, key: &str, expectation: &Expectation) -> Result<()> {
        if !self.kind.keeps_conditions {
            return Ok(());
        }
        match (expectation, self.objects.get(key)) {
            (Expectation::Anything, _) | (Expectation::Absent, None) => Ok(()),
            (Expectation::Absent, Some(_)) => Err(Refusal::Precondition),
            (Expectation::Version(etag), Some(version)) if version.etag == *etag => Ok(()),
            (Expectation::Version(_), Some(_)) => Err(Refusal::Precondition),
            (Expectation::Version(_), None) => Err(Refusal::NotFound),
        }
    }

    fn replace(&mut self, key: &str, version: Option<Version>, cause: Cause) {
        let after = version.as_ref().map(|version| version.content.clone());
        let before = match version {
            Some(version) => self.objects.insert(key.to_owned(), version),
            None => self.objects.remove(key),
        };
        let before = before.map(|version| version.content);
        if let Some(journal) = &self.journal
            && before != after
        {
            journal.note(What::Changed {
                key: key.to_owned(),
                before,
                after,
                cause,
            });
        }
    }

    fn fresh_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

/// What becomes an object.
#[derive(Clone)]
pub struct NewVersion {
    pub content: Bytes,
    /// The ETag, if this store makes them of MD5 sums.
    pub etag: Option<String>,
    pub attributes: Attributes,
}

impl NewVersion {
    /// An object sent in one piece, without attributes.
    pub fn of(content: Bytes) -> NewVersion {
        NewVersion {
            etag: Some(md5_of(&content)),
            content,
            attributes: Attributes::default(),
        }
    }
}

/// A CopyObject.
#[derive(Clone)]
pub struct Copy {
    pub from: String,
    pub to: String,
    pub source_etag: Option<String>,
    pub expectation: Expectation,
}

/// A CompleteMultipartUpload; parts by number and ETag.
#[derive(Clone)]
pub struct Complete {
    pub id: String,
    pub parts: Vec<(u32, String)>,
    pub expectation: Expectation,
}

fn md5_of(body: &[u8]) -> String {
    let digits: String = Md5::digest(body)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("\"{digits}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEPS: StoreKind = StoreKind {
        keeps_conditions: true,
        has_md5_etags: true,
    };

    fn put(
        bucket: &mut Bucket,
        key: &str,
        text: &'static str,
        expectation: &Expectation,
    ) -> Result<String> {
        bucket.put(
            key,
            NewVersion::of(Bytes::from_static(text.as_bytes())),
            expectation,
            Cause::Request,
        )
    }

    fn texts(bucket: &Bucket, prefix: &str, is_folded: bool) -> Vec<String> {
        let mut texts = Vec::new();
        let mut next = Some(None);
        while let Some(after) = next {
            let (entries, more) = bucket.list(prefix, is_folded, after, 1000);
            assert!(entries.len() <= PAGE);
            for entry in entries {
                texts.push(match entry {
                    Listed::Object(key, _) | Listed::Prefix(key) => key,
                });
            }
            next = more.map(Some);
        }
        texts
    }

    #[tokio::test(start_paused = true)]
    async fn conditions_hold_where_they_are_kept() {
        for keeps_conditions in [true, false] {
            let refused = |result: &Result<String>| {
                (*result == Err(Refusal::Precondition)) == keeps_conditions
            };
            let mut bucket = Bucket::new(
                StoreKind {
                    keeps_conditions,
                    ..KEEPS
                },
                Journal::begin(),
            );
            let first = put(&mut bucket, "a", "one", &Expectation::Absent).unwrap();
            assert!(refused(&put(&mut bucket, "a", "two", &Expectation::Absent)));
            put(&mut bucket, "a", "three", &Expectation::Anything).unwrap();
            let stale = Expectation::Version(first.clone());
            assert!(refused(&put(&mut bucket, "a", "four", &stale)));
            let copy = Copy {
                from: "a".to_owned(),
                to: "b".to_owned(),
                source_etag: Some(first),
                expectation: stale,
            };
            assert_eq!(
                bucket.copy(&copy, Cause::Request),
                Err(Refusal::Precondition),
                "of the source, in every store"
            );
            let removed = bucket.delete("a", &copy.expectation, Cause::Request);
            assert_eq!(removed.is_err(), keeps_conditions);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn uploads_become_objects_of_their_parts() {
        let mut bucket = Bucket::new(KEEPS, Journal::begin());
        let id = bucket.create_upload("a", Attributes::default());
        assert_eq!(bucket.uploads(), ["a"]);
        let first = bucket
            .upload_part(&id, 1, Bytes::from_static(b"12345"))
            .unwrap();
        let second = bucket
            .upload_part(&id, 2, Bytes::from_static(b"6"))
            .unwrap();
        let parts = vec![(1, first), (2, second)];
        let complete = Complete {
            id,
            parts,
            expectation: Expectation::Absent,
        };
        assert_eq!(
            bucket.complete(&complete, 6, Cause::Request),
            Err(Refusal::InvalidPart)
        );
        let etag = bucket.complete(&complete, 5, Cause::Request).unwrap();
        assert!(etag.ends_with("-2\""), "{etag}");
        assert_eq!(bucket.head("a").unwrap().content, "123456");
        assert_eq!(
            bucket.complete(&complete, 5, Cause::Request),
            Err(Refusal::NoSuchUpload)
        );
        assert!(bucket.uploads().is_empty());
        let id = bucket.create_upload("b", Attributes::default());
        bucket.abort(&id);
        assert!(bucket.uploads().is_empty());
        assert_eq!(
            bucket.upload_part(&id, 1, Bytes::new()),
            Err(Refusal::NoSuchUpload)
        );
        assert_eq!(bucket.uploads(), ["b"], "a part after the abort stays");
    }

    #[tokio::test(start_paused = true)]
    async fn lists_come_in_pages() {
        let mut bucket = Bucket::new(KEEPS, Journal::begin());
        for key in ["d/", "d/a", "d/b", "d/c/1", "d/c/2", "d/e", "da"] {
            put(&mut bucket, key, "", &Expectation::Anything).unwrap();
        }
        assert_eq!(
            texts(&bucket, "d/", true),
            ["d/", "d/a", "d/b", "d/c/", "d/e"]
        );
        assert_eq!(texts(&bucket, "d/c", false), ["d/c/1", "d/c/2"]);
        assert_eq!(texts(&bucket, "", true), ["d/", "da"]);
    }
}
