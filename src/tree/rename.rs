//! Rename: S3 has none, so copy, then delete. Invariant: no source goes before every copy is there.

use super::*;
use tokio::task::JoinSet;

/// Keys that one rename of a directory moves at most: each is two requests, and the client waits.
const MAX_KEYS: usize = 100_000;
/// Copies or deletes in flight.
const AT_ONCE: usize = 16;
/// Objects over 5 GiB are copied in pieces of this size.
const PIECE: u64 = 1024 * 1024 * 1024;
/// How often a copy is made that is not there afterwards. A store that orders writes by its clock (Garage, to the
/// millisecond) may drop a copy that it has confirmed, if the target was written in the same instant.
const COPY_TRIES: usize = 2;

impl Tree {
    /// A file: Copy, HEAD and Delete, and a stat of the target before them unless it may be replaced
    /// (posix-rename). A directory: a list, then Copy, HEAD and Delete of every key in it.
    pub async fn rename(&self, from: &Path, to: &Path, replace: bool) -> Result<()> {
        let (source, target) = (self.settled(from).await?, self.settled(to).await?);
        if !replace {
            self.must_be_free(to).await?;
        }
        fail_if(self.local.upload(&source.file).is_some(), BUSY)?;
        if source == target {
            return self.stat(from).await.map(drop);
        }
        fail_if(self.local.is_made(&target.directory), EXISTS)?;
        let copied = match self.local.is_made(&source.directory) {
            true => Err(TreeError::NotFound),
            false => copy(self.context.store.clone(), source.file.clone(), target.file, !replace).await,
        };
        match copied {
            Ok(_) => self.context.store.delete(&source.file).await?,
            Err(TreeError::NotFound) => self.rename_directory(&source.directory, &target.directory, to).await?,
            Err(error) => return Err(error),
        }
        self.keep_parent(from).await;
        Ok(())
    }

    async fn rename_directory(&self, source: &Key, target: &Key, to: &Path) -> Result<()> {
        // Every key in it, and what it will be called.
        let (mut moves, mut next) = (Vec::new(), Some(None));
        while let Some(after) = next {
            let page = self.list(source, after, MAX_PAGE).await?;
            for Entry::Object(old, _) | Entry::Prefix(old) in page.entries {
                let new = old.strip_prefix(source.as_str()).and_then(|name| Key::new(format!("{target}{name}")));
                let pair = Key::new(old).zip(new);
                moves.push(pair.ok_or(TreeError::NameTooLong)?);
            }
            let many = moves.len() > MAX_KEYS;
            fail_if(many, TreeError::Refused("the directory holds more than 100,000 files: too many to copy"))?;
            next = page.next.map(Some);
        }
        fail_if(moves.is_empty() && !self.local.is_directory(source), TreeError::NotFound)?;
        let inside = target.as_str().starts_with(source.as_str());
        fail_if(inside, TreeError::Refused("a directory can't be moved into itself"))?;
        fail_if(self.local.any(source, |_, known| known.upload.is_some()), BUSY)?;
        self.must_be_free(to).await?;
        let store = &self.context.store;
        let copies = moves.iter().cloned().map(|(old, new)| copy(store.clone(), old, new, true));
        let (made, copied) = all(copies).await;
        if copied.is_err() {
            // A second try must find the name free. What others put there meanwhile stays.
            let _ = all(made.into_iter().map(|new| delete(store.clone(), new))).await;
            return copied;
        }
        all(moves.into_iter().map(|(old, _)| delete(store.clone(), old))).await.1?;
        self.local.rename_directories(source, target);
        Ok(())
    }

    /// Only a clear "not found" will do: a store in trouble must not cost the target its content.
    async fn must_be_free(&self, path: &Path) -> Result<()> {
        match self.stat(path).await {
            Err(TreeError::NotFound) => Ok(()),
            stat => stat.and(Err(EXISTS)),
        }
    }
}

/// Runs the work a few at a time and waits for all that was begun, whatever fails. What was done; the first error.
async fn all<T: Send + 'static>(
    mut work: impl Iterator<Item = impl Future<Output = Result<T>> + Send + 'static>,
) -> (Vec<T>, Result<()>) {
    let (mut running, mut done, mut result) = (JoinSet::new(), Vec::new(), Ok(()));
    loop {
        let room = if result.is_ok() { AT_ONCE - running.len() } else { 0 };
        work.by_ref().take(room).for_each(|one| drop(running.spawn(one)));
        let Some(joined) = running.join_next().await else { return (done, result) };
        match joined.unwrap_or_else(|error| Err(StoreError::Other(error.to_string()).into())) {
            Ok(one) => done.push(one),
            Err(error) => result = result.and(Err(error)),
        }
    }
}

async fn delete(store: Arc<dyn Store>, key: Key) -> Result<()> {
    Ok(store.delete(&key).await?)
}

/// Copies until the target is the copy, and says which key was made. Only then may the source go: a store may confirm a
/// copy that changed nothing.
async fn copy(store: Arc<dyn Store>, from: Key, to: Key, free: bool) -> Result<Key> {
    for _ in 0..COPY_TRIES {
        let etag = copy_once(store.as_ref(), &from, &to, free).await?;
        match store.head(&to).await {
            Ok(object) if object.etag == etag => return Ok(to),
            Ok(_) | Err(StoreError::NotFound) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(TreeError::Refused("the store confirmed a copy that is not there: the source stays"))
}

/// CopyObject; an object too large for it piece by piece. Returns the copy's ETag. A lost answer is decided by what is
/// there now: the same ETag is a copy; if only the size is the same, it is taken back where the name was `free`, since
/// the copy of an object made of parts has another ETag.
async fn copy_once(store: &dyn Store, from: &Key, to: &Key, free: bool) -> Result<String> {
    let copied = match store.copy(from, to).await {
        Err(StoreError::NotFound) => return Err(TreeError::NotFound),
        Err(StoreError::TooLarge) => copy_in_parts(store, from, to).await,
        copied => copied,
    };
    if matches!(copied, Err(StoreError::Unknown(_)))
        && let (Ok(old), Ok(new)) = (store.head(from).await, store.head(to).await)
        && old.size == new.size
    {
        if old.etag == new.etag {
            return Ok(new.etag);
        }
        if free {
            let _ = store.delete(to).await;
        }
    }
    Ok(copied?)
}

/// UploadPartCopy of the whole object. Returns the copy's ETag.
async fn copy_in_parts(store: &dyn Store, from: &Key, to: &Key) -> crate::store::Result<String> {
    let object = store.head(from).await?;
    let id = store.create_upload(to).await?;
    let pieces = async {
        let mut parts = Vec::new();
        for (number, start) in (1..).zip((0..object.size).step_by(PIECE as usize)) {
            let range = start..object.size.min(start + PIECE);
            parts.push(store.copy_part(to, &id, number, PartSource { key: from, etag: &object.etag, range }).await?);
        }
        let made = store.complete(to, &id, &parts, Condition::None).await;
        settle(store, to, made, object.size, || etag_of_parts(&parts)).await
    };
    let copied = pieces.await;
    if copied.is_err() {
        upload::abort(store, to, &id).await;
    }
    copied
}
