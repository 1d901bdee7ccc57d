//! Rename: S3 has none, so copy, then delete. Invariant: no source goes before every copy is there.

use super::*;
use tokio::task::JoinSet;

/// Keys that one rename of a directory moves at most: each is two requests, and the client waits.
const MAX_KEYS: usize = 100_000;
/// Copies or deletes in flight.
const AT_ONCE: usize = 16;
/// Objects over 5 GiB are copied in pieces of this size.
const PIECE: u64 = 1024 * 1024 * 1024;

impl Tree {
    /// A file: Copy and Delete, and a stat of the target before them unless it may be replaced
    /// (posix-rename). A directory: a list, then Copy and Delete of every key in it.
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
            false => copy(self.context.store.clone(), source.file.clone(), target.file).await,
        };
        match copied {
            Ok(()) => self.context.store.delete(&source.file).await?,
            Err(TreeError::NotFound) => self.rename_directory(&source.directory, &target.directory, to).await?,
            Err(error) => return Err(error),
        }
        self.keep_parent(from);
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
                moves.push(pair.ok_or(TreeError::BadPath("a key in it would be longer than 1,024 bytes"))?);
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
        if let Err(error) = all(moves.iter().cloned().map(|(old, new)| copy(store.clone(), old, new))).await {
            // The target did not exist, so all that is there now is ours; a second try must find the name free.
            let _ = all(moves.into_iter().map(|(_, new)| delete(store.clone(), new))).await;
            return Err(error);
        }
        all(moves.into_iter().map(|(old, _)| delete(store.clone(), old))).await?;
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

/// Runs the work a few at a time and waits for all that was begun, whatever fails; the first error counts.
async fn all<F: Future<Output = Result<()>> + Send + 'static>(mut work: impl Iterator<Item = F>) -> Result<()> {
    let (mut running, mut result) = (JoinSet::new(), Ok(()));
    loop {
        let room = if result.is_ok() { AT_ONCE - running.len() } else { 0 };
        work.by_ref().take(room).for_each(|one| drop(running.spawn(one)));
        let Some(joined) = running.join_next().await else { return result };
        result = result.and(joined.unwrap_or_else(|error| Err(StoreError::Other(error.to_string()).into())));
    }
}

async fn delete(store: Arc<dyn Store>, key: Key) -> Result<()> {
    Ok(store.delete(&key).await?)
}

/// CopyObject; an object too large for it piece by piece.
async fn copy(store: Arc<dyn Store>, from: Key, to: Key) -> Result<()> {
    match store.copy(&from, &to).await {
        Err(StoreError::NotFound) => return Err(TreeError::NotFound),
        Err(StoreError::TooLarge) => {}
        copied => return Ok(copied?),
    }
    let object = store.head(&from).await?;
    let id = store.create_upload(&to).await?;
    let pieces = async {
        let mut parts = Vec::new();
        for (number, start) in (1..).zip((0..object.size).step_by(PIECE as usize)) {
            let range = start..object.size.min(start + PIECE);
            parts.push(store.copy_part(&to, &id, number, PartSource { key: &from, etag: &object.etag, range }).await?);
        }
        store.complete(&to, &id, &parts, Condition::None).await
    };
    let copied = pieces.await;
    if copied.is_err()
        && let Err(error) = store.abort(&to, &id).await
    {
        log::warn!("multipart upload {id} of {:?} could not be aborted and stays: {error}", to.as_str());
    }
    Ok(copied?)
}
