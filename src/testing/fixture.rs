//! What the rules use of a store: short ways to its methods, with errors in words.

use crate::store::{
    self, Attributes, Condition, CopySource, Entry, Key, ListRequest, Object, Part, Store,
    StoreError,
};
use bytes::Bytes;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

/// What a check returns: what the store did instead of what the rule says.
pub type Checked<T> = Result<T, String>;

/// A store, and a place in it.
pub struct Fixture {
    pub store: Arc<dyn Store>,
    /// Below it lies everything that a check makes.
    prefix: String,
}

impl Fixture {
    pub fn new(store: Arc<dyn Store>) -> Fixture {
        let id: u64 = rand::random();
        Fixture {
            store,
            prefix: format!("sftpd-conformance-{id:016x}/"),
        }
    }

    /// The key of this name.
    pub fn key(&self, name: &str) -> Checked<Key> {
        let key = Key::new(format!("{}{name}", self.prefix));
        key.ok_or_else(|| format!("{name:?} makes no key"))
    }

    pub async fn put(&self, name: &str, body: impl Into<Bytes>) -> Checked<Object> {
        self.put_if(name, body, &Condition::None)
            .await
            .or_say("put fails")
    }

    pub async fn put_if(
        &self,
        name: &str,
        body: impl Into<Bytes>,
        condition: &Condition,
    ) -> store::Result<Object> {
        let key = self.key(name).map_err(StoreError::Other)?;
        let plain = Attributes::default();
        self.store.put(&key, body.into(), &plain, condition).await
    }

    pub async fn head(&self, name: &str) -> Checked<Object> {
        self.store.head(&self.key(name)?).await.or_say("head fails")
    }

    /// A range of a version.
    pub async fn get(&self, name: &str, range: Range<u64>, etag: &str) -> Checked<Vec<u8>> {
        let key = self.key(name)?;
        let pieces = self
            .store
            .get(&key, range, etag)
            .await
            .or_say("get fails")?;
        Ok(pieces.concat())
    }

    /// Fails unless the object has this content.
    pub async fn must_hold(&self, name: &str, body: &[u8]) -> Checked<()> {
        let object = self.head(name).await?;
        must_be("the size that head shows", object.size, body.len() as u64)?;
        if !body.is_empty() {
            let got = self.get(name, 0..object.size, &object.etag).await?;
            must(got == body, "get returns other bytes than were written")?;
        }
        Ok(())
    }

    pub async fn must_be_missing(&self, name: &str) -> Checked<()> {
        let found = self.store.head(&self.key(name)?).await;
        must_be("head", found, Err(StoreError::NotFound))
    }

    pub async fn copy(
        &self,
        from: &str,
        version: &Object,
        to: &str,
        condition: &Condition,
    ) -> store::Result<store::Copied> {
        let key = self.key(from).map_err(StoreError::Other)?;
        let to = self.key(to).map_err(StoreError::Other)?;
        let source = CopySource { key: &key, version };
        self.store.copy(source, &to, condition).await
    }

    /// Begins an upload, and sends a part.
    pub async fn begin(&self, name: &str, body: impl Into<Bytes>) -> Checked<(String, Part)> {
        let key = self.key(name)?;
        let plain = Attributes::default();
        let id = self.store.create_upload(&key, &plain).await;
        let id = id.or_say("create_upload fails")?;
        let part = self.send(name, &id, 1, body).await?;
        Ok((id, part))
    }

    pub async fn send(
        &self,
        name: &str,
        id: &str,
        number: u32,
        body: impl Into<Bytes>,
    ) -> Checked<Part> {
        let key = self.key(name)?;
        let body = body.into();
        let size = body.len() as u64;
        let part = self.store.upload_part(&key, id, number, body).await;
        let part = part.or_say("upload_part fails")?;
        must_be("the number of a part", part.number, number)?;
        must_be("the size of a part", part.size, size)?;
        Ok(part)
    }

    pub async fn complete(
        &self,
        name: &str,
        id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> store::Result<Object> {
        let key = self.key(name).map_err(StoreError::Other)?;
        self.store.complete(&key, id, parts, condition).await
    }

    pub async fn abort(&self, name: &str, id: &str) -> Checked<()> {
        self.store
            .abort(&self.key(name)?, id)
            .await
            .or_say("abort fails")
    }

    /// All entries below a name: keys without the place, with the size of objects.
    pub async fn list(&self, below: &str, folded: bool, limit: usize) -> Checked<Vec<String>> {
        Ok(self.list_pages(below, folded, limit).await?.concat())
    }

    /// As [`Fixture::list`], page by page of at most `limit` entries.
    pub async fn list_pages(
        &self,
        below: &str,
        folded: bool,
        limit: usize,
    ) -> Checked<Vec<Vec<String>>> {
        let prefix = self.key(below)?;
        let mut pages = Vec::new();
        let mut after = None;
        loop {
            let request = ListRequest {
                prefix: &prefix,
                folded,
                after,
                limit,
            };
            let page = self.store.list(request).await.or_say("list fails")?;
            must(page.entries.len() <= limit, "a page has too many entries")?;
            let mut names = Vec::with_capacity(page.entries.len());
            for entry in page.entries {
                names.push(match entry {
                    Entry::Object(key, object) => {
                        format!("{} {}", self.name_of(&key)?, object.size)
                    }
                    Entry::Prefix(prefix) => self.name_of(&prefix)?.to_owned(),
                });
            }
            pages.push(names);
            after = page.next;
            if after.is_none() {
                return Ok(pages);
            }
        }
    }

    fn name_of<'a>(&self, key: &'a str) -> Checked<&'a str> {
        let name = key.strip_prefix(&self.prefix);
        name.ok_or_else(|| format!("a listing has {key:?}, which lies elsewhere"))
    }

    /// Removes everything, so that the next check finds nothing.
    pub async fn clear(&self) -> Checked<()> {
        for listed in self.list("", false, 1000).await? {
            let (name, _) = listed.rsplit_once(' ').unwrap_or((&listed, ""));
            let key = self.key(name)?;
            let deleted = self.store.delete(&key, &Condition::None).await;
            deleted.or_say("delete fails")?;
        }
        Ok(())
    }
}

/// Puts an error that no rule allows into words.
pub trait OrSay<T> {
    /// `what` is a sentence, which the error follows.
    fn or_say(self, what: &str) -> Checked<T>;
}

impl<T> OrSay<T> for store::Result<T> {
    fn or_say(self, what: &str) -> Checked<T> {
        self.map_err(|error| format!("{what}: {error}"))
    }
}

pub fn must(holds: bool, otherwise: &str) -> Checked<()> {
    match holds {
        true => Ok(()),
        false => Err(otherwise.to_owned()),
    }
}

pub fn must_be<T: PartialEq + Debug>(what: &str, found: T, expected: T) -> Checked<()> {
    match found == expected {
        true => Ok(()),
        false => Err(format!("{what} is {found:?}, not {expected:?}")),
    }
}

/// Fails unless a condition was found untrue.
pub fn must_be_refused<T: Debug>(what: &str, result: store::Result<T>) -> Checked<()> {
    match result {
        Err(StoreError::Precondition) => Ok(()),
        other => Err(format!("{what} is {other:?}, not Err(Precondition)")),
    }
}

/// Bytes that differ from block to block, and from seed to seed.
pub fn noise(len: u64, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len as usize + 8);
    while (bytes.len() as u64) < len {
        // xorshift64: https://www.jstatsoft.org/article/view/v008i14
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes.into()
}
