//! A store in RAM, for `sftpd demo`, tests and embedders: gone when the process ends.
//!
//! Keeps S3's rules where a caller could come to rely on them: minimum part, part order, ETags, conditions.

use super::*;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// See the module.
#[derive(Default)]
pub struct MemoryStore {
    // A std lock: never held across an await.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, (Content, Object)>,
    uploads: HashMap<String, BTreeMap<u32, (Bytes, String)>>,
    next_upload: u64,
}

/// An object's bytes as they came, part by part: a GiB sent in parts is never copied together.
#[derive(Clone)]
struct Content(Vec<Bytes>);

impl Content {
    fn size(&self) -> u64 {
        self.0.iter().map(|piece| piece.len() as u64).sum()
    }

    fn range(&self, range: &Range<u64>) -> Bytes {
        let mut out = Vec::new();
        let mut at = 0u64;
        for piece in &self.0 {
            let end = at + piece.len() as u64;
            let from = range.start.max(at);
            let to = range.end.min(end);
            if from < to {
                let slice = piece.slice((from - at) as usize..(to - at) as usize);
                if to - from == range.end - range.start {
                    return slice;
                }
                out.extend_from_slice(&slice);
            }
            at = end;
        }
        out.into()
    }
}

impl MemoryStore {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere can't leave the maps half-changed: every change is one insert or remove.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many multipart uploads are in progress.
    pub fn uploads(&self) -> usize {
        self.state().uploads.len()
    }
}

impl State {
    fn insert(&mut self, key: &Key, content: Content, etag: String, condition: Condition) -> Result<()> {
        if condition == Condition::Absent && self.objects.contains_key(key.as_str()) {
            return Err(StoreError::Precondition);
        }
        let object = Object { size: content.size(), etag, modified: SystemTime::now() };
        self.objects.insert(key.as_str().to_owned(), (content, object));
        Ok(())
    }

    fn find(&self, key: &Key) -> Result<&(Content, Object)> {
        self.objects.get(key.as_str()).ok_or(StoreError::NotFound)
    }

    fn version(&self, key: &Key, etag: &str) -> Result<&Content> {
        let (content, object) = self.find(key)?;
        if object.etag == etag { Ok(content) } else { Err(StoreError::Precondition) }
    }

    fn upload(&mut self, upload_id: &str) -> Result<&mut BTreeMap<u32, (Bytes, String)>> {
        self.uploads.get_mut(upload_id).ok_or_else(|| StoreError::Other("no such upload".into()))
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn head(&self, key: &Key) -> Result<Object> {
        self.state().find(key).map(|(_, object)| object.clone())
    }

    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Bytes> {
        let state = self.state();
        let content = state.version(key, etag)?;
        let bytes = content.range(&range);
        if bytes.len() as u64 != range.end - range.start {
            return Err(StoreError::Other("range beyond the object".into()));
        }
        Ok(bytes)
    }

    async fn put(&self, key: &Key, body: Bytes, condition: Condition) -> Result<()> {
        let etag = etag_of(&body);
        self.state().insert(key, Content(vec![body]), etag, condition)
    }

    async fn delete(&self, key: &Key) -> Result<()> {
        self.state().objects.remove(key.as_str());
        Ok(())
    }

    async fn copy(&self, from: &Key, to: &Key) -> Result<()> {
        let mut state = self.state();
        let (content, object) = state.find(from)?.clone();
        if object.size > MAX_COPY {
            return Err(StoreError::TooLarge);
        }
        state.insert(to, content, object.etag, Condition::None)
    }

    async fn list(&self, request: ListRequest<'_>) -> Result<Page> {
        let prefix = request.prefix.as_str();
        let mut page = Page::default();
        let state = self.state();
        let mut from = request.after.unwrap_or_else(|| prefix.to_owned());
        while let Some((key, (_, object))) = state.objects.range(from..).next() {
            let Some(rest) = key.strip_prefix(prefix) else { break };
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
                    page.entries.push(Entry::Object(key.clone(), object.clone()));
                }
            }
        }
        Ok(page)
    }

    async fn create_upload(&self, _key: &Key) -> Result<String> {
        let mut state = self.state();
        state.next_upload += 1;
        let id = state.next_upload.to_string();
        state.uploads.insert(id.clone(), BTreeMap::new());
        Ok(id)
    }

    async fn upload_part(&self, _key: &Key, upload_id: &str, number: u32, body: Bytes) -> Result<Part> {
        // Any value that names the bytes will do here; hashing every part would make the demo slow.
        let etag = format!("\"{upload_id}-{number}-{}\"", body.len());
        let size = body.len() as u64;
        self.state().upload(upload_id)?.insert(number, (body, etag.clone()));
        Ok(Part { number, size, etag })
    }

    async fn copy_part(&self, key: &Key, upload_id: &str, number: u32, from: PartSource<'_>) -> Result<Part> {
        let body = self.get(from.key, from.range, from.etag).await?;
        self.upload_part(key, upload_id, number, body).await
    }

    async fn complete(&self, key: &Key, upload_id: &str, parts: &[Part], condition: Condition) -> Result<()> {
        let mut state = self.state();
        let sent = state.upload(upload_id)?;
        let mut pieces = Vec::with_capacity(parts.len());
        let mut before = None;
        for part in parts {
            let rules_hold = before.is_none_or(|p: &Part| p.number < part.number && p.size >= MIN_PART);
            match sent.get(&part.number) {
                Some((body, etag)) if rules_hold && *etag == part.etag => pieces.push(body.clone()),
                _ => return Err(StoreError::Other(format!("part {} is invalid", part.number))),
            }
            before = Some(part);
        }
        let etag = format!("\"{upload_id}-{}\"", parts.len());
        state.insert(key, Content(pieces), etag, condition)?;
        state.uploads.remove(upload_id);
        Ok(())
    }

    async fn abort(&self, _key: &Key, upload_id: &str) -> Result<()> {
        self.state().uploads.remove(upload_id);
        Ok(())
    }
}
