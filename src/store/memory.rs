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
    /// Bytes as they came, part by part: a GiB sent in parts is never copied together.
    objects: BTreeMap<String, (Vec<Bytes>, Object)>,
    uploads: HashMap<String, HashMap<u32, Bytes>>,
    next_upload: u64,
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
    fn insert(&mut self, key: &Key, content: Vec<Bytes>, etag: String, condition: Condition) -> Result<String> {
        if condition == Condition::Absent && self.objects.contains_key(key.as_str()) {
            return Err(StoreError::Precondition);
        }
        let size = content.iter().map(|piece| piece.len() as u64).sum();
        let object = Object { size, etag: etag.clone(), modified: SystemTime::now() };
        self.objects.insert(key.as_str().to_owned(), (content, object));
        Ok(etag)
    }

    fn find(&self, key: &Key) -> Result<&(Vec<Bytes>, Object)> {
        self.objects.get(key.as_str()).ok_or(StoreError::NotFound)
    }
}

/// Any value that names the bytes will do here; hashing every part would make the demo slow.
fn part_etag(upload_id: &str, number: u32, body: &Bytes) -> String {
    format!("\"{upload_id}-{number}-{}\"", body.len())
}

fn no_such_upload() -> StoreError {
    StoreError::Other("NoSuchUpload: there is no such multipart upload".to_owned())
}

#[async_trait]
impl Store for MemoryStore {
    async fn head(&self, key: &Key) -> Result<Object> {
        self.state().find(key).map(|(_, object)| object.clone())
    }

    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>> {
        let state = self.state();
        match state.find(key)? {
            (_, object) if object.etag != etag => Err(StoreError::Precondition),
            (_, object) if object.size < range.end => Err(StoreError::Other("range beyond the object".into())),
            (content, _) => Ok(cut(content, range).collect()),
        }
    }

    async fn put(&self, key: &Key, body: Bytes, condition: Condition) -> Result<String> {
        let etag = etag_of(&body);
        self.state().insert(key, vec![body], etag, condition)
    }

    async fn delete(&self, key: &Key) -> Result<()> {
        self.state().objects.remove(key.as_str());
        Ok(())
    }

    async fn copy(&self, from: &Key, to: &Key) -> Result<String> {
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
        state.uploads.insert(id.clone(), HashMap::new());
        Ok(id)
    }

    async fn upload_part(&self, _key: &Key, upload_id: &str, number: u32, body: Bytes) -> Result<Part> {
        let etag = part_etag(upload_id, number, &body);
        let part = Part { number, size: body.len() as u64, etag, checksum: None };
        let mut state = self.state();
        state.uploads.get_mut(upload_id).ok_or_else(no_such_upload)?.insert(number, body);
        Ok(part)
    }

    async fn copy_part(&self, key: &Key, upload_id: &str, number: u32, from: PartSource<'_>) -> Result<Part> {
        let body = self.get(from.key, from.range, from.etag).await?;
        self.upload_part(key, upload_id, number, body.concat().into()).await
    }

    async fn complete(&self, key: &Key, upload_id: &str, parts: &[Part], condition: Condition) -> Result<String> {
        let mut state = self.state();
        let sent = state.uploads.get(upload_id).ok_or_else(no_such_upload)?;
        let mut pieces = Vec::with_capacity(parts.len());
        let mut before = None;
        for part in parts {
            let rules_hold = before.is_none_or(|p: &Part| p.number < part.number && p.size >= MIN_PART);
            match sent
                .get(&part.number)
                .filter(|body| rules_hold && part.etag == part_etag(upload_id, part.number, body))
            {
                Some(body) => pieces.push(body.clone()),
                None => return Err(StoreError::Other(format!("part {} is invalid", part.number))),
            }
            before = Some(part);
        }
        let etag = state.insert(key, pieces, format!("\"{upload_id}-{}\"", parts.len()), condition)?;
        state.uploads.remove(upload_id);
        Ok(etag)
    }

    async fn abort(&self, _key: &Key, upload_id: &str) -> Result<()> {
        self.state().uploads.remove(upload_id);
        Ok(())
    }
}
