//! Rename: S3 has none, so copy, look, then delete. Invariants: no source goes before its copy is there; what goes is the
//! version that was copied; and what is taken back is a copy of our own.
//!
//! Runs in a task of its own, which the end of a session does not stop half-way. The end of the server does: then copies
//! are taken back, as after a failure.

use super::*;
use crate::store::change::Copied;
use crate::transfer::{COPY_PART_SIZE, Reservation, Share, abort};
use tokio::task::JoinSet;

/// Keys that one rename of a directory moves at most: each is three requests, and the client waits.
const MAX_KEYS: usize = 100_000;
/// What a key takes in memory beside its name, in bytes: its version, and that of its copy.
const KEY_OVERHEAD: u64 = 256;
/// Copies or deletes in flight.
const AT_ONCE: usize = 16;
/// How often a copy is made that is not there afterwards. A store that orders writes by its clock (Garage, to the
/// millisecond) may drop a copy that it has confirmed, if the target was written in the same instant.
const COPY_TRIES: usize = 2;
/// How often a file is copied that others replace meanwhile.
const SOURCE_TRIES: usize = 5;

const STOPPED: VfsError = VfsError::Refused("the server is shutting down");

impl Vfs {
    /// A file: HEAD, Copy, HEAD and Delete, and a stat of the target before them, or a HEAD if it may be replaced
    /// (posix-rename). A directory: a list, then Copy, HEAD and Delete of every key in it.
    pub async fn rename(&self, from: &Path, to: &Path, replace: bool) -> Result<()> {
        let (source, target) = (self.home.keys(from)?, self.home.keys(to)?);
        let names = vec![
            LockedName::with_subtree(&source.file),
            LockedName::with_subtree(&target.file),
        ];
        let lock = self.transfers.locks.enqueue(names);
        let (tree, from, to) = (self.clone(), from.clone(), to.clone());
        let renaming = self.transfers.tasks.spawn(async move {
            lock.wait().await;
            tree.rename_locked(&from, &to, replace).await
        });
        match renaming.await {
            Ok(renamed) => renamed,
            Err(_panicked) => Err(VfsError::Refused(
                "internal server error, see the server's log",
            )),
        }
    }

    async fn rename_locked(&self, from: &Path, to: &Path, replace: bool) -> Result<()> {
        let (source, target) = (self.home.keys(from)?, self.home.keys(to)?);
        if !replace {
            self.must_be_free(to).await?;
        }
        fail_if(self.overlay.upload(&source.file).is_some(), BUSY)?;
        if source == target {
            return self.stat(from).await.map(drop);
        }
        fail_if(self.overlay.is_made(&target.directory), EXISTS)?;
        let version = match self.overlay.is_made(&source.directory) {
            true => Err(VfsError::NotFound),
            false => self.object(&source.file).await,
        };
        match version {
            Ok(version) => {
                move_file(
                    &self.transfers,
                    &source.file,
                    version,
                    &target.file,
                    replace,
                )
                .await?
            }
            Err(VfsError::NotFound) => {
                self.rename_directory(&source.directory, &target.directory, to)
                    .await?
            }
            Err(error) => return Err(error),
        }
        self.keep_parent(from).await;
        Ok(())
    }

    async fn rename_directory(&self, source: &Key, target: &Key, to: &Path) -> Result<()> {
        let Moves { list, _memory } = self.list_moves(source, target).await?;
        fail_if(
            list.is_empty() && !self.overlay.is_directory(source),
            VfsError::NotFound,
        )?;
        let inside = target.as_str().starts_with(source.as_str());
        fail_if(
            inside,
            VfsError::Refused("a directory can't be moved into itself"),
        )?;
        fail_if(
            self.overlay.any(source, |_, known| known.upload.is_some()),
            BUSY,
        )?;
        self.must_be_free(to).await?;
        let indices = 0..list.len();
        let (made, result) = run_all(indices, |index| {
            copy_key(&self.transfers, source, target, &list, index)
        })
        .await;
        if result.is_err() {
            // A second try must find the name free. What others put there stays.
            let (_done, _never_fails) = run_all(made.into_iter(), |made| {
                take_back_key(&self.transfers, target, &list, made)
            })
            .await;
            return result;
        }
        run_all(made.into_iter(), |made| {
            delete_key(&self.transfers, source, target, &list, made)
        })
        .await
        .1?;
        self.overlay.rename_directories(source, target);
        Ok(())
    }

    /// Every key in a directory, after a look that all of them fit below the target.
    async fn list_moves(&self, source: &Key, target: &Key) -> Result<Moves> {
        let mut moves = Moves {
            list: Vec::new(),
            _memory: Vec::new(),
        };
        let mut next = Some(None);
        while let Some(after) = next {
            let page = self.list(source, after, MAX_PAGE).await?;
            let mut bytes = 0;
            for Entry::Object(key, _) | Entry::Prefix(key) in &page.entries {
                let name = key.strip_prefix(source.as_str()).unwrap_or_default();
                bytes += name.len() as u64 + KEY_OVERHEAD;
            }
            let full = VfsError::Refused(
                "the server has no memory left for the names in it: try again later",
            );
            moves._memory.push(
                self.transfers
                    .pool
                    .try_take_share(Share::Renames, bytes)
                    .ok_or(full)?,
            );
            for entry in page.entries {
                // Not folded: there are no prefixes.
                let Entry::Object(key, version) = entry else {
                    continue;
                };
                let name = key.strip_prefix(source.as_str()).unwrap_or_default();
                join(target, name)?;
                moves.list.push(MovedKey {
                    name: name.into(),
                    etag: version.etag.into(),
                    size: version.size,
                    storage_class: version.storage_class.map(String::into_boxed_str),
                });
            }
            let many = moves.list.len() > MAX_KEYS;
            fail_if(
                many,
                VfsError::Refused("the directory holds more than 100,000 files: too many to copy"),
            )?;
            next = page.next.map(Some);
        }
        Ok(moves)
    }

    /// Only a clear "not found" will do: a store in trouble must not cost the target its content.
    async fn must_be_free(&self, path: &Path) -> Result<()> {
        match self.stat(path).await {
            Err(VfsError::NotFound) => Ok(()),
            stat => stat.and(Err(EXISTS)),
        }
    }
}

/// What the rename of a directory moves, and the memory that this takes.
struct Moves {
    list: Vec<MovedKey>,
    _memory: Vec<Reservation>,
}

/// One key of a directory that is renamed.
struct MovedKey {
    /// Behind the directory's prefix.
    name: Box<str>,
    etag: Box<str>,
    size: u64,
    storage_class: Option<Box<str>>,
}

impl MovedKey {
    fn version(&self) -> Object {
        Object {
            size: self.size,
            etag: self.etag.to_string(),
            modified: SystemTime::UNIX_EPOCH,
            storage_class: self.storage_class.as_ref().map(ToString::to_string),
            attributes: None,
        }
    }
}

/// A copy of the key with this index.
struct MadeCopy {
    index: usize,
    copied: Copied,
}

fn join(directory: &Key, name: &str) -> Result<Key> {
    Key::new(format!("{directory}{name}")).ok_or(VfsError::Path(PathError::TooLong))
}

/// Works on each item, a few at a time, and waits for all that was begun, whatever fails. What was done; the first error.
async fn run_all<I, T: Send + 'static, F: Future<Output = Result<T>> + Send + 'static>(
    mut items: impl Iterator<Item = I>,
    work: impl Fn(I) -> F,
) -> (Vec<T>, Result<()>) {
    let mut running = JoinSet::new();
    let mut done = Vec::new();
    let mut result = Ok(());
    loop {
        while result.is_ok() && running.len() < AT_ONCE {
            let Some(item) = items.next() else { break };
            running.spawn(work(item));
        }
        let Some(joined) = running.join_next().await else {
            return (done, result);
        };
        match joined.unwrap_or_else(|error| Err(StoreError::Other(error.to_string()).into())) {
            Ok(one) => done.push(one),
            Err(error) => result = result.and(Err(error)),
        }
    }
}

/// Copies one key of a directory.
fn copy_key(
    transfers: &Arc<Transfers>,
    source: &Key,
    target: &Key,
    list: &[MovedKey],
    index: usize,
) -> impl Future<Output = Result<MadeCopy>> + Send + 'static {
    let key = list.get(index).ok_or(VfsError::NotFound);
    let wanted = key.and_then(|key| {
        Ok((
            join(source, &key.name)?,
            join(target, &key.name)?,
            key.version(),
        ))
    });
    let transfers = transfers.clone();
    async move {
        let (from, to, version) = wanted?;
        fail_if(transfers.stop.is_cancelled(), STOPPED)?;
        let copying = copy(&transfers, &from, &version, &to, None);
        let copied = transfers
            .run_until_stopped(copying)
            .await
            .ok_or(STOPPED)??;
        Ok(MadeCopy { index, copied })
    }
}

/// Deletes one key of a directory that has been copied. One that has changed since is moved anew.
fn delete_key(
    transfers: &Arc<Transfers>,
    source: &Key,
    target: &Key,
    list: &[MovedKey],
    MadeCopy { index, copied }: MadeCopy,
) -> impl Future<Output = Result<()>> + Send + 'static {
    let key = list.get(index).ok_or(VfsError::NotFound);
    let wanted = key.and_then(|key| {
        Ok((
            join(source, &key.name)?,
            join(target, &key.name)?,
            key.etag.clone(),
        ))
    });
    let transfers = transfers.clone();
    async move {
        let (from, to, etag) = wanted?;
        let store = transfers.store.as_ref();
        match change::delete_version(store, &from, &etag).await {
            Ok(()) => Ok(()),
            // Another gateway has taken it away: it was not in the directory any more.
            Err(StoreError::NotFound) => {
                take_back(store, &to, &copied).await;
                Ok(())
            }
            Err(StoreError::Precondition) => {
                take_back(store, &to, &copied).await;
                move_again(&transfers, &from, &to).await
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Moves a file of a directory that was replaced since it was copied. One that is gone is not in the directory any more.
async fn move_again(transfers: &Transfers, from: &Key, to: &Key) -> Result<()> {
    let version = match transfers.store.head(from).await {
        Err(StoreError::NotFound) => return Ok(()),
        version => version?,
    };
    match move_file(transfers, from, version, to, false).await {
        Err(VfsError::NotFound) => Ok(()),
        moved => moved,
    }
}

fn take_back_key(
    transfers: &Arc<Transfers>,
    target: &Key,
    list: &[MovedKey],
    MadeCopy { index, copied }: MadeCopy,
) -> impl Future<Output = Result<()>> + Send + 'static {
    let key = list
        .get(index)
        .ok_or(VfsError::NotFound)
        .and_then(|key| join(target, &key.name));
    let transfers = transfers.clone();
    async move {
        take_back(transfers.store.as_ref(), &key?, &copied).await;
        Ok(())
    }
}

/// Deletes a copy of our own. In doubt, and where somebody else has stored something meanwhile, it stays.
async fn take_back(store: &dyn Store, key: &Key, copied: &Copied) {
    if !copied.is_ours {
        return;
    }
    let removed = match store.head(key).await {
        Ok(found) if found.write_id() == copied.write_id.as_deref() => {
            change::delete_version(store, key, &copied.etag).await
        }
        // Others' equal content has the same ETag.
        Ok(_) => return,
        Err(error) => Err(error),
    };
    if let Err(error) = removed {
        log::warn!(
            "the copy {:?} of a rename that failed may stay: {error}",
            key.as_str()
        );
    }
}

/// Moves a file: copies the version that is there, and deletes that one. What others store meanwhile is moved too, as if
/// it had come before.
async fn move_file(
    transfers: &Transfers,
    from: &Key,
    mut version: Object,
    to: &Key,
    replace: bool,
) -> Result<()> {
    let store = transfers.store.as_ref();
    // What the target held before can't be brought back: from then on the rename counts as done.
    let mut has_replaced = false;
    for _ in 0..SOURCE_TRIES {
        let over = if replace {
            find_target(store, to).await?
        } else {
            None
        };
        match copy(transfers, from, &version, to, over.as_ref()).await {
            Ok(copied) => {
                has_replaced |= over.is_some_and(|over| !change::is_copy(&over, &version));
                let deleted = change::delete_version(store, from, &version.etag).await;
                match deleted {
                    Ok(()) => return Ok(()),
                    Err(StoreError::NotFound | StoreError::Precondition) if has_replaced => {}
                    Err(StoreError::NotFound | StoreError::Precondition) => {
                        take_back(store, to, &copied).await
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            Err(VfsError::NotFound | VfsError::Store(StoreError::Precondition)) => {}
            Err(error) => return Err(error),
        }
        match store.head(from).await {
            // It is the target that is not as it was.
            Ok(now) if now.etag == version.etag && !replace => return Err(EXISTS),
            Ok(now) => version = now,
            // Another gateway has taken it away, after this one had moved what it found.
            Err(StoreError::NotFound) if has_replaced => return Ok(()),
            Err(StoreError::NotFound) => return Err(VfsError::NotFound),
            Err(error) => return Err(error.into()),
        }
    }
    Err(StoreError::Precondition.into())
}

/// What a posix-rename is going to replace.
async fn find_target(store: &dyn Store, to: &Key) -> Result<Option<Object>> {
    match store.head(to).await {
        Ok(object) => Ok(Some(object)),
        Err(StoreError::NotFound | StoreError::Forbidden(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Copies until the target is the copy. Only then may the source go: a store may confirm a copy that changed nothing.
/// `over` is the object that may be replaced; without one the name must be free, so that the copy is nobody else's.
async fn copy(
    transfers: &Transfers,
    from: &Key,
    version: &Object,
    to: &Key,
    over: Option<&Object>,
) -> Result<Copied> {
    let store = transfers.store.as_ref();
    let condition = if over.is_some() {
        Condition::None
    } else {
        Condition::Absent
    };
    for _ in 0..COPY_TRIES {
        let copied = match change::copy(store, from, version, to, &condition).await {
            Err(StoreError::NotFound) => return Err(VfsError::NotFound),
            Err(StoreError::TooLarge) => {
                copy_in_parts(transfers, from, version, to, &condition).await?
            }
            copied => copied?,
        };
        if !copied.is_ours {
            return Ok(copied);
        }
        match store.head(to).await {
            Ok(object) if *object.etag == *copied.etag => {
                let write_id = object.write_id().map(Box::from);
                // Over a copy of the same version by another gateway it is that one's too.
                return Ok(Copied {
                    write_id,
                    is_ours: over.is_none(),
                    ..copied
                });
            }
            Ok(object) if was_replaced(store, over, Some(&object)) => {
                return Ok(Copied {
                    is_ours: false,
                    ..copied
                });
            }
            Err(StoreError::NotFound) if was_replaced(store, over, None) => {
                return Ok(Copied {
                    is_ours: false,
                    ..copied
                });
            }
            Ok(_) | Err(StoreError::NotFound) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(VfsError::Refused(
        "the store confirmed a copy that is not there: the source stays",
    ))
}

/// Whether another gateway has replaced or removed a copy that was confirmed: there is neither the copy nor what it
/// replaced. Where conditions are ignored, other gateways are not reckoned with, and the copy was never made.
fn was_replaced(store: &dyn Store, over: Option<&Object>, now: Option<&Object>) -> bool {
    match (over, now) {
        (None, None) => false,
        (None, Some(_)) => store.conditions().copy_absent,
        (Some(_), None) => true,
        (Some(over), Some(now)) => over.etag != now.etag,
    }
}

/// UploadPartCopy of the whole object, with its attributes.
async fn copy_in_parts(
    transfers: &Transfers,
    from: &Key,
    version: &Object,
    to: &Key,
    condition: &Condition,
) -> Result<Copied> {
    let store = transfers.store.as_ref();
    let (attributes, write_id) = version
        .attributes
        .as_deref()
        .cloned()
        .unwrap_or_default()
        .with_new_write_id();
    let id = store.create_upload(to, &attributes).await?;
    let pieces = async {
        let mut parts = Vec::new();
        for (number, start) in (1..).zip((0..version.size).step_by(COPY_PART_SIZE as usize)) {
            fail_if(transfers.stop.is_cancelled(), STOPPED)?;
            let range = start..version.size.min(start + COPY_PART_SIZE);
            let source = PartSource {
                key: from,
                etag: &version.etag,
                range,
            };
            let copying = store.copy_part(to, &id, number, source);
            parts.push(
                transfers
                    .run_until_stopped(copying)
                    .await
                    .ok_or(STOPPED)??,
            );
        }
        let etag = change::complete(store, to, &id, &parts, &write_id, condition).await?;
        Ok(Copied {
            etag: etag.into(),
            write_id: None,
            is_ours: true,
        })
    };
    let copied = pieces.await;
    if copied.is_err() {
        abort(store, to, &id).await;
    }
    copied
}
