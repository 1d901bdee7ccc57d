//! A store in RAM, for `sftpd demo`, tests and embedders: gone when the process ends.
//!
//! Keeps the rules of S3 that a caller may rely on: minimum part size, order of parts, ETags,
//! conditions.

use super::{
    Attributes, Condition, Copied, CopySource, Entry, KeptConditions, Key, Limits, ListRequest,
    Object, Page, Part, PartSource, Result, Store, StoreError, slice_pieces,
};
use async_trait::async_trait;
use bytes::Bytes;
use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Debug, Formatter};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// See the module.
pub struct MemoryStore {
    limits: Limits,
    // A std lock: never held across an await.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The pieces of the content are the parts as they arrived, never joined.
    objects: BTreeMap<String, (Vec<Bytes>, Object)>,
    uploads: HashMap<String, Upload>,
    last_id: u64,
}

struct Upload {
    attributes: Arc<Attributes>,
    /// The content of each part, in pieces.
    parts: HashMap<u32, Vec<Bytes>>,
}

/// Without the content.
impl Debug for MemoryStore {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore")
            .field("objects", &self.state().objects.len())
            .finish_non_exhaustive()
    }
}

impl Default for MemoryStore {
    fn default() -> MemoryStore {
        MemoryStore::with_limits(Limits {
            copies_itself: true,
            conditions: KeptConditions::ALL,
            ..Limits::default()
        })
    }
}

impl MemoryStore {
    /// A store with these limits, for tests: `min_part` is kept, and every condition, whatever they
    /// say.
    pub fn with_limits(limits: Limits) -> MemoryStore {
        MemoryStore {
            limits,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere can't leave the maps half-changed: every change is one insert or
        // remove.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of multipart uploads in progress.
    pub fn uploads(&self) -> usize {
        self.state().uploads.len()
    }
}

impl State {
    fn insert(&mut self, key: &Key, content: Vec<Bytes>, attributes: Arc<Attributes>) -> Object {
        let size = size_of(&content);
        let id = self.new_id();
        let mut object = Object::new(size, format!("\"{id}\""), SystemTime::now());
        object.storage_class = attributes.storage_class.clone();
        object.attributes = Some(attributes);
        self.objects
            .insert(key.as_str().to_owned(), (content, object.clone()));
        object
    }

    fn new_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn check(&self, key: &Key, condition: &Condition) -> Result<()> {
        match (condition, self.objects.get(key.as_str())) {
            (Condition::None, _) | (Condition::Absent, None) => Ok(()),
            (Condition::Unchanged(etag), Some((_, object))) if object.etag == *etag => Ok(()),
            (Condition::Absent, Some(_)) | (Condition::Unchanged(_), _) => {
                Err(StoreError::Precondition)
            }
        }
    }

    fn insert_part(&mut self, upload_id: &str, number: u32, pieces: Vec<Bytes>) -> Result<Part> {
        let size = size_of(&pieces);
        let part = Part::new(number, size, part_etag(upload_id, number, size));
        match self.uploads.get_mut(upload_id) {
            Some(upload) => {
                upload.parts.insert(number, pieces);
                Ok(part)
            }
            None => Err(no_such_upload()),
        }
    }

    fn find(&self, key: &Key) -> Result<&(Vec<Bytes>, Object)> {
        self.objects.get(key.as_str()).ok_or(StoreError::NotFound)
    }
}

/// Any value that identifies the bytes will do; hashes of parts would make the demo slow.
fn part_etag(upload_id: &str, number: u32, size: u64) -> String {
    format!("\"{upload_id}-{number}-{size}\"")
}

fn size_of(pieces: &[Bytes]) -> u64 {
    pieces.iter().map(|piece| piece.len() as u64).sum()
}

fn no_such_upload() -> StoreError {
    StoreError::Other("NoSuchUpload: there is no such multipart upload".to_owned())
}

#[async_trait]
impl Store for MemoryStore {
    fn limits(&self) -> Limits {
        self.limits
    }

    async fn head(&self, key: &Key) -> Result<Object> {
        self.state().find(key).map(|(_, object)| object.clone())
    }

    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>> {
        let state = self.state();
        match state.find(key)? {
            (_, object) if object.etag != etag => Err(StoreError::Precondition),
            (_, object) if object.size < range.end => {
                Err(StoreError::Other("range beyond the object".into()))
            }
            (content, _) => Ok(slice_pieces(content, range)),
        }
    }

    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<Object> {
        let mut state = self.state();
        state.check(key, condition)?;
        Ok(state.insert(key, vec![body], Arc::new(attributes.clone())))
    }

    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()> {
        let mut state = self.state();
        if *condition != Condition::None {
            state.find(key)?;
        }
        state.check(key, condition)?;
        state.objects.remove(key.as_str());
        Ok(())
    }

    async fn copy(&self, from: CopySource<'_>, to: &Key, condition: &Condition) -> Result<Copied> {
        let mut state = self.state();
        let (content, object) = state.find(from.key)?.clone();
        if object.etag != from.version.etag {
            return Err(StoreError::Precondition);
        }
        state.check(to, condition)?;
        let attributes = object.attributes.unwrap_or_default();
        let copy = state.insert(to, content, attributes);
        Ok(Copied {
            etag: copy.etag,
            is_ours: true,
        })
    }

    async fn rename(
        &self,
        from: &Key,
        version: &Object,
        to: &Key,
        condition: &Condition,
    ) -> Result<Object> {
        let mut state = self.state();
        let (content, object) = state.find(from)?.clone();
        if object.etag != version.etag {
            return Err(StoreError::Precondition);
        }
        state.check(to, condition)?;
        state.objects.remove(from.as_str());
        let entry = (content, object.clone());
        state.objects.insert(to.as_str().to_owned(), entry);
        Ok(object)
    }

    async fn list(&self, request: ListRequest<'_>) -> Result<Page> {
        let prefix = request.prefix.as_str();
        let mut page = Page::default();
        let state = self.state();
        let mut from = request.after.unwrap_or_else(|| prefix.to_owned());
        while let Some((key, (_, object))) = state.objects.range(from..).next() {
            let Some(rest) = key.strip_prefix(prefix) else {
                break;
            };
            if page.entries.len() == request.limit {
                page.next = Some(key.clone());
                break;
            }
            match rest.split_once('/').filter(|_| request.folded) {
                Some((name, _)) => {
                    // `0` follows `/`: the least string above every key in that directory.
                    from = format!("{prefix}{name}0");
                    page.entries.push(Entry::Prefix(format!("{prefix}{name}/")));
                }
                None => {
                    from = format!("{key}\0");
                    let listed = Object {
                        attributes: None,
                        ..object.clone()
                    };
                    page.entries.push(Entry::Object(key.clone(), listed));
                }
            }
        }
        Ok(page)
    }

    async fn create_upload(&self, _key: &Key, attributes: &Attributes) -> Result<String> {
        let mut state = self.state();
        let id = state.new_id().to_string();
        let upload = Upload {
            attributes: Arc::new(attributes.clone()),
            parts: HashMap::new(),
        };
        state.uploads.insert(id.clone(), upload);
        Ok(id)
    }

    async fn upload_part(
        &self,
        _key: &Key,
        upload_id: &str,
        number: u32,
        body: Bytes,
    ) -> Result<Part> {
        self.state().insert_part(upload_id, number, vec![body])
    }

    async fn copy_part(
        &self,
        _key: &Key,
        upload_id: &str,
        number: u32,
        from: PartSource<'_>,
    ) -> Result<Part> {
        let pieces = self.get(from.key, from.range, from.etag).await?;
        self.state().insert_part(upload_id, number, pieces)
    }

    async fn complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Object> {
        let min_part = self.limits.min_part;
        let mut state = self.state();
        let upload = state.uploads.get(upload_id).ok_or_else(no_such_upload)?;
        let attributes = upload.attributes.clone();
        let mut pieces = Vec::with_capacity(parts.len());
        let mut before: Option<&Part> = None;
        for part in parts {
            let in_order =
                before.is_none_or(|before| before.number < part.number && before.size >= min_part);
            let etag_of = |content: &[Bytes]| part_etag(upload_id, part.number, size_of(content));
            match upload.parts.get(&part.number) {
                Some(content) if in_order && part.etag == etag_of(content) => {
                    pieces.extend_from_slice(content);
                }
                Some(_) | None => {
                    return Err(StoreError::Other(format!(
                        "part {} is invalid",
                        part.number
                    )));
                }
            }
            before = Some(part);
        }
        state.check(key, condition)?;
        let object = state.insert(key, pieces, attributes);
        state.uploads.remove(upload_id);
        Ok(object)
    }

    async fn abort(&self, _key: &Key, upload_id: &str) -> Result<()> {
        self.state().uploads.remove(upload_id);
        Ok(())
    }
}
