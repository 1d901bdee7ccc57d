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
        let (Ok(source), Ok(target)) = (self.home.file(from), self.home.file(to)) else {
            return Err(TreeError::Refused("the home directory can't be renamed or replaced"));
        };
        let directories = (self.home.directory(from)?, self.home.directory(to)?);
        for key in [&source, &target, &directories.0, &directories.1] {
            self.settle(key).await;
        }
        if !replace {
            self.must_be_free(to).await?;
        }
        if self.local.upload(&source).is_some() {
            return Err(TreeError::Busy);
        }
        if self.local.directory(&directories.1) == Some(Origin::Made) && source != target {
            return Err(TreeError::Exists);
        }
        let known = self.local.directory(&directories.0) == Some(Origin::Made);
        let copied = match known {
            _ if source == target => return self.stat(from).await.map(drop),
            true => Err(TreeError::NotFound),
            false => copy_object(self.context.store.clone(), source.clone(), target).await,
        };
        match copied {
            Ok(()) => {
                self.store().delete(&source).await?;
                self.keep_parent(from);
                Ok(())
            }
            Err(TreeError::NotFound) => self.rename_directory(from, to, directories).await,
            Err(error) => Err(error),
        }
    }

    async fn rename_directory(&self, from: &Path, to: &Path, (source, target): (Key, Key)) -> Result<()> {
        if !self.is_directory(from).await? {
            return Err(TreeError::NotFound);
        }
        if target.as_str().starts_with(source.as_str()) {
            return Err(TreeError::Refused("a directory can't be moved into itself"));
        }
        if self.local.has_uploads(&source) {
            return Err(TreeError::Busy);
        }
        self.must_be_free(to).await?;
        let moves = self.moves(&source, &target).await?;
        let store = self.context.store.clone();
        let copies = moves.clone().into_iter().map(|(old, new)| copy_object(store.clone(), old, new));
        if let Err(error) = all(copies).await {
            // The target did not exist, so all that is there now is ours; a second try must find the name free.
            let _ = all(moves.into_iter().map(|(_, new)| delete(store.clone(), new))).await;
            return Err(error);
        }
        all(moves.into_iter().map(|(old, _)| delete(store.clone(), old))).await?;
        self.local.rename_directories(&source, &target);
        self.keep_parent(from);
        Ok(())
    }

    /// Only a clear "not found" will do: a store in trouble must not cost the target its content.
    async fn must_be_free(&self, path: &Path) -> Result<()> {
        match self.stat(path).await {
            Ok(_) => Err(TreeError::Exists),
            Err(TreeError::NotFound) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Every key below `source`, and what it will be called.
    async fn moves(&self, source: &Key, target: &Key) -> Result<Vec<(Key, Key)>> {
        let mut moves = Vec::new();
        let mut after = None;
        loop {
            let request = ListRequest { prefix: source, folded: false, after, limit: MAX_PAGE };
            let page = self.store().list(request).await?;
            for entry in page.entries {
                let (Entry::Object(old, _) | Entry::Prefix(old)) = entry;
                let new = old.strip_prefix(source.as_str()).and_then(|rest| Key::new(format!("{target}{rest}")));
                let (Some(old), Some(new)) = (Key::new(old), new) else {
                    return Err(TreeError::BadPath("a key in it would be longer than 1,024 bytes"));
                };
                moves.push((old, new));
            }
            if moves.len() > MAX_KEYS {
                return Err(TreeError::Refused("the directory holds more than 100,000 files: too many to copy"));
            }
            after = page.next;
            if after.is_none() {
                return Ok(moves);
            }
        }
    }
}

/// Runs the work a few at a time and waits for all that was begun, whatever fails; the first error counts.
async fn all<F>(work: impl Iterator<Item = F>) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let mut running = JoinSet::new();
    let mut result = Ok(());
    for one in work {
        running.spawn(one);
        if running.len() == AT_ONCE
            && let Some(joined) = running.join_next().await
        {
            result = result.and(flat(joined));
        }
        if result.is_err() {
            break;
        }
    }
    while let Some(joined) = running.join_next().await {
        result = result.and(flat(joined));
    }
    result
}

fn flat(joined: std::result::Result<Result<()>, tokio::task::JoinError>) -> Result<()> {
    joined.unwrap_or_else(|error| Err(StoreError::Other(error.to_string()).into()))
}

async fn delete(store: Arc<dyn Store>, key: Key) -> Result<()> {
    Ok(store.delete(&key).await?)
}

/// CopyObject; an object too large for it piece by piece.
async fn copy_object(store: Arc<dyn Store>, from: Key, to: Key) -> Result<()> {
    match store.copy(&from, &to).await {
        Ok(()) => Ok(()),
        Err(StoreError::NotFound) => Err(TreeError::NotFound),
        Err(StoreError::TooLarge) => copy_in_pieces(store, from, to).await,
        Err(error) => Err(error.into()),
    }
}

async fn copy_in_pieces(store: Arc<dyn Store>, from: Key, to: Key) -> Result<()> {
    let object = store.head(&from).await?;
    let id = store.create_upload(&to).await?;
    let copied = async {
        let mut parts = Vec::new();
        for (number, start) in (1..).zip((0..object.size).step_by(PIECE as usize)) {
            let range = start..object.size.min(start + PIECE);
            parts.push(store.copy_part(&to, &id, number, PartSource { key: &from, etag: &object.etag, range }).await?);
        }
        store.complete(&to, &id, &parts, Condition::None).await
    };
    if let Err(error) = copied.await {
        if let Err(abort) = store.abort(&to, &id).await {
            log::warn!("multipart upload {id} of {:?} could not be aborted and stays: {abort}", to.as_str());
        }
        return Err(error.into());
    }
    Ok(())
}
