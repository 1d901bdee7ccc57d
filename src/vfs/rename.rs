//! Rename. A store that can do it is asked to. S3 can't: so copy, check, then delete. Invariants: no
//! source is deleted before its copy is there; the version that is deleted is the one that was
//! copied; and only copies that this rename made are taken back.
//!
//! A rename runs in its own task, so that the end of a session does not stop it half-way. The end
//! of the server does: then copies are taken back, as after a failure.

use super::{BUSY, EXISTS, Result, Vfs, VfsError};
use crate::INTERNAL_ERROR;
use crate::path::{Key, Path, PathError};
use crate::store::{
    self, Attributes, Condition, CopySource, Entry, MAX_PAGE, Object, Part, PartSource, Store,
    StoreError, change,
};
use crate::transfer::{COPY_PART_SIZE, LockedName, MultipartUpload, Reservation, Share, Transfers};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Limit on the keys that the rename of a directory moves: each takes three requests, and the
/// client waits.
const MAX_KEYS: usize = 100_000;
/// What a key takes in memory beside its name, in bytes: its version, and that of its copy.
const KEY_OVERHEAD: u64 = 256;
/// Limit on copies or deletes of one rename in flight.
const MAX_IN_FLIGHT: usize = 16;
/// How often a copy is tried that is not there afterwards. A store that orders writes by its clock
/// (Garage, to the millisecond) may drop a copy that it has confirmed, if the target was written in
/// the same instant.
const COPY_TRIES: usize = 2;
/// What is copied at a time through this process, in bytes, for a store that can't copy.
const LOADED_COPY_SIZE: u64 = 5 * 1024 * 1024;
/// How often a file is copied anew because another client replaced it meanwhile.
const SOURCE_TRIES: usize = 5;

/// How long the rename of a directory waits for the memory that other renames hold.
const MAX_MEMORY_WAIT: Duration = Duration::from_secs(60);

const NO_MEMORY: VfsError = VfsError::Refused(
    "the server has no memory left for the names in the directory: try again later",
);
const STOPPED: VfsError = VfsError::Refused("the server is shutting down");

impl Vfs {
    /// A file: HEAD, Copy, HEAD and Delete; before them a stat of the target, or with `replace`
    /// (posix-rename) a HEAD of it. A directory: a list, then Copy, HEAD and Delete of every key in
    /// it. Returns whether a file was replaced.
    pub async fn rename(&self, from: &Path, to: &Path, replace: bool) -> Result<bool> {
        let source = self.home.keys(from)?;
        let target = self.home.keys(to)?;
        let names = vec![
            LockedName::with_subtree(&source.file),
            LockedName::with_subtree(&target.file),
        ];
        let lock = self.transfers.locks.enqueue(names);
        let vfs = self.clone();
        let from = from.clone();
        let to = to.clone();
        let renaming = self.transfers.tasks.spawn(async move {
            lock.wait().await;
            vfs.rename_locked(&from, &to, replace).await
        });
        match renaming.await {
            Ok(renamed) => renamed,
            Err(_panicked) => Err(VfsError::Refused(INTERNAL_ERROR)),
        }
    }

    async fn rename_locked(&self, from: &Path, to: &Path, replace: bool) -> Result<bool> {
        let source = self.home.keys(from)?;
        let target = self.home.keys(to)?;
        if !replace {
            self.must_be_free(to).await?;
        }
        if self.overlay.has_upload(&source.file) {
            return Err(BUSY);
        }
        if source == target {
            self.stat(from).await?;
            return Ok(false);
        }
        if self.overlay.is_made(&target.directory) {
            return Err(EXISTS);
        }
        let object = if self.overlay.is_made(&source.directory) {
            None
        } else {
            self.find_object(&source.file).await?
        };
        let has_replaced = match object {
            Some(version) => {
                let transfers = &self.transfers;
                let replaced =
                    move_file(transfers, &source.file, version, &target.file, replace).await?;
                self.overlay.supersede_uploads(&source.file);
                self.overlay.supersede_uploads(&target.file);
                replaced
            }
            None => {
                self.rename_directory(&source.directory, &target.directory, to)
                    .await?;
                false
            }
        };
        self.keep_parent(from).await;
        Ok(has_replaced)
    }

    async fn rename_directory(&self, source: &Key, target: &Key, to: &Path) -> Result<()> {
        let moves = Arc::new(self.list_moves(source, target).await?);
        if moves.keys.is_empty() && !self.overlay.is_directory(source) {
            return Err(VfsError::NotFound);
        }
        if target.as_str().starts_with(source.as_str()) {
            return Err(VfsError::Refused("a directory can't be moved into itself"));
        }
        if self.overlay.has_upload_in(source) {
            return Err(BUSY);
        }
        self.must_be_free(to).await?;
        let indices = 0..moves.keys.len();
        let copies = run_all(indices, |index| moves.clone().copy_key(index)).await;
        if copies.result.is_err() {
            // The next try must find the name free. What other clients stored there stays.
            let made = copies.done.into_iter();
            run_all(made, |copy| moves.clone().take_back_key(copy)).await;
            return copies.result;
        }
        let made = copies.done.into_iter();
        let deletes = run_all(made, |copy| moves.clone().delete_key(copy)).await;
        deletes.result?;
        self.overlay.rename_directories(source, target);
        Ok(())
    }

    /// Lists every key in a directory. Fails if one of them does not fit below the target. If other
    /// renames hold the memory for the names, waits until they have ended.
    async fn list_moves(&self, source: &Key, target: &Key) -> Result<DirectoryMove> {
        if let Some(moves) = self.try_list_moves(source, target, Memory::Free).await? {
            return Ok(moves);
        }
        let listing = async {
            let _turn = self.transfers.pool.take_rename_turn().await;
            self.try_list_moves(source, target, Memory::Awaited).await
        };
        let listing = timeout(MAX_MEMORY_WAIT, listing);
        match self.transfers.stop.run_until_cancelled(listing).await {
            Some(Ok(listed)) => listed?.ok_or(NO_MEMORY),
            Some(Err(_elapsed)) => Err(NO_MEMORY),
            None => Err(STOPPED),
        }
    }

    /// [`Vfs::list_moves`]; `None` if there is not enough memory.
    async fn try_list_moves(
        &self,
        source: &Key,
        target: &Key,
        memory: Memory,
    ) -> Result<Option<DirectoryMove>> {
        let mut moves = DirectoryMove {
            transfers: self.transfers.clone(),
            source: source.clone(),
            target: target.clone(),
            keys: Vec::new(),
            memory: Vec::new(),
            memory_size: 0,
        };
        let mut after = None;
        loop {
            let page = self.list(source, after, MAX_PAGE).await?;
            if !moves.add(page.entries, memory).await? {
                return Ok(None);
            }
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok(Some(moves)),
            }
        }
    }

    /// Fails unless the store says clearly "not found": while it is in trouble, a target must not
    /// lose its content.
    async fn must_be_free(&self, path: &Path) -> Result<()> {
        if self.overlay.has_upload(&self.home.keys(path)?.file) {
            return Err(EXISTS);
        }
        match self.stat(path).await {
            Ok(_) => Err(EXISTS),
            Err(VfsError::NotFound) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Which memory the names of a directory may take.
#[derive(Clone, Copy)]
enum Memory {
    /// What is free.
    Free,
    /// What others have to give back first, too.
    Awaited,
}

/// The rename of a directory.
struct DirectoryMove {
    transfers: Arc<Transfers>,
    /// The prefix that the keys have.
    source: Key,
    /// The prefix that they get.
    target: Key,
    keys: Vec<MovedKey>,
    /// Taken from the pool for `keys`.
    memory: Vec<Reservation>,
    /// How much that is, in bytes.
    memory_size: u64,
}

/// One key of a directory that is renamed.
struct MovedKey {
    /// What follows the directory's prefix.
    name: Box<str>,
    etag: Box<str>,
    size: u64,
    storage_class: Option<Box<str>>,
}

impl MovedKey {
    fn version(&self) -> Object {
        let mut version = Object::new(self.size, &*self.etag, SystemTime::UNIX_EPOCH);
        version.storage_class = self.storage_class.as_ref().map(ToString::to_string);
        version
    }
}

/// What was done with the key with this index.
struct MadeCopy {
    index: usize,
    made: Made,
}

/// How a key got its new name.
enum Made {
    /// There is a copy; the source is to be deleted.
    Copy(CheckedCopy),
    /// The store has moved it, and this is its ETag now.
    Move(Box<str>),
}

/// A copy that is there.
#[derive(Clone, Debug)]
struct CheckedCopy {
    /// Of the object at the target.
    etag: Box<str>,
    /// Of the object at the target; `None` also if it was not looked at.
    write_id: Option<Box<str>>,
    /// Whether this rename certainly made it: see [`store::Copied::is_ours`].
    is_ours: bool,
}

impl DirectoryMove {
    /// Adds a page of entries, within the limits on memory and keys. Returns false if there is not
    /// enough memory.
    async fn add(&mut self, entries: Vec<Entry>, memory: Memory) -> Result<bool> {
        let mut objects = Vec::with_capacity(entries.len());
        let mut bytes = 0;
        for entry in entries {
            // The list is not folded: it has no prefixes.
            let Entry::Object(key, version) = entry else {
                continue;
            };
            let Some(name) = key.strip_prefix(self.source.as_str()) else {
                continue;
            };
            bytes += name.len() as u64 + KEY_OVERHEAD;
            objects.push((Box::from(name), version));
        }
        let Some(reservation) = self.take_memory(bytes, memory).await else {
            return Ok(false);
        };
        self.memory.push(reservation);
        self.memory_size += bytes;
        for (name, version) in objects {
            join(&self.target, &name)?;
            self.keys.push(MovedKey {
                name,
                etag: version.etag.into(),
                size: version.size,
                storage_class: version.storage_class.map(String::into_boxed_str),
            });
        }
        if self.keys.len() > MAX_KEYS {
            return Err(VfsError::Refused(
                "the directory holds more than 100,000 files: too many to copy",
            ));
        }
        Ok(true)
    }

    /// Memory for some keys more; `None` if it is not free, or more than all renames have.
    async fn take_memory(&self, bytes: u64, memory: Memory) -> Option<Reservation> {
        let pool = &self.transfers.pool;
        if self.memory_size + bytes > pool.size_of(Share::Renames) {
            return None;
        }
        match memory {
            Memory::Free => pool.try_take_share(Share::Renames, bytes),
            Memory::Awaited => pool.take_share(Share::Renames, bytes).await,
        }
    }

    fn key(&self, index: usize) -> Result<&MovedKey> {
        self.keys.get(index).ok_or(VfsError::NotFound)
    }

    async fn copy_key(self: Arc<Self>, index: usize) -> Result<MadeCopy> {
        let key = self.key(index)?;
        let from = join(&self.source, &key.name)?;
        let to = join(&self.target, &key.name)?;
        let version = key.version();
        if self.transfers.stop.is_cancelled() {
            return Err(STOPPED);
        }
        let store = self.transfers.store.as_ref();
        let made = match store.rename(&from, &version, &to, &Condition::Absent).await {
            Ok(moved) => Made::Move(moved.etag.into()),
            Err(StoreError::Unsupported) => {
                Made::Copy(copy(&self.transfers, &from, &version, &to, None).await?)
            }
            Err(StoreError::NotFound) => return Err(VfsError::NotFound),
            Err(doubt @ StoreError::Unknown(_)) => {
                let moved = find_moved(store, &from, &version, &to, doubt).await?;
                Made::Move(moved.etag.into())
            }
            Err(error) => return Err(error.into()),
        };
        Ok(MadeCopy { index, made })
    }

    /// Deletes a key that has been copied. If it has changed since, it is moved anew.
    async fn delete_key(self: Arc<Self>, copy: MadeCopy) -> Result<()> {
        let copied = match &copy.made {
            Made::Copy(copied) => copied,
            Made::Move(_) => return Ok(()),
        };
        let key = self.key(copy.index)?;
        let from = join(&self.source, &key.name)?;
        let to = join(&self.target, &key.name)?;
        let store = self.transfers.store.as_ref();
        match change::delete_version(store, &from, &key.etag).await {
            Ok(()) => Ok(()),
            // Another gateway has removed it: it was no longer in the directory.
            Err(StoreError::NotFound) => {
                take_back(store, &to, copied).await;
                Ok(())
            }
            Err(StoreError::Precondition) => {
                take_back(store, &to, copied).await;
                move_again(&self.transfers, &from, &to).await
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn take_back_key(self: Arc<Self>, copy: MadeCopy) -> Result<()> {
        let key = self.key(copy.index)?;
        let to = join(&self.target, &key.name)?;
        let store = self.transfers.store.as_ref();
        match &copy.made {
            Made::Copy(copied) => take_back(store, &to, copied).await,
            Made::Move(etag) => {
                let from = join(&self.source, &key.name)?;
                let moved = Object::new(key.size, &**etag, SystemTime::UNIX_EPOCH);
                move_back(store, &to, &moved, &from).await;
            }
        }
        Ok(())
    }
}

fn join(directory: &Key, name: &str) -> Result<Key> {
    match Key::new(format!("{directory}{name}")) {
        Some(key) => Ok(key),
        None => Err(VfsError::Path(PathError::TooLong)),
    }
}

/// What [`run_all`] returns.
struct Ran<T> {
    /// Of the items whose work succeeded.
    done: Vec<T>,
    /// The first error.
    result: Result<()>,
}

/// Works on each item, several at a time. After an error no further item is begun, and those in
/// flight are waited for.
async fn run_all<I, T: Send + 'static, F: Future<Output = Result<T>> + Send + 'static>(
    mut items: impl Iterator<Item = I>,
    work: impl Fn(I) -> F,
) -> Ran<T> {
    let mut running = JoinSet::new();
    let mut done = Vec::new();
    let mut result = Ok(());
    loop {
        while result.is_ok() && running.len() < MAX_IN_FLIGHT {
            let Some(item) = items.next() else { break };
            running.spawn(work(item));
        }
        let Some(joined) = running.join_next().await else {
            return Ran { done, result };
        };
        let outcome = match joined {
            Ok(outcome) => outcome,
            Err(panicked) => Err(StoreError::Other(panicked.to_string()).into()),
        };
        match outcome {
            Ok(one) => done.push(one),
            Err(error) if result.is_ok() => result = Err(error),
            Err(_) => {}
        }
    }
}

/// Moves a file of a directory that was replaced since it was copied. A file that is gone is no
/// longer in the directory.
async fn move_again(transfers: &Transfers, from: &Key, to: &Key) -> Result<()> {
    let version = match transfers.store.head(from).await {
        Ok(version) => version,
        Err(StoreError::NotFound) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    match move_file(transfers, from, version, to, false).await {
        Ok(_) | Err(VfsError::NotFound) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The object that a rename has moved whose answer is not clear. Fails, with that answer, unless
/// the source is gone and the target, which was free, is there: otherwise the key may be forgotten
/// at its new name when the others of its directory get their old ones.
async fn find_moved(
    store: &dyn Store,
    from: &Key,
    version: &Object,
    to: &Key,
    doubt: StoreError,
) -> Result<Object> {
    if store.head(from).await != Err(StoreError::NotFound) {
        return Err(doubt.into());
    }
    match store.head(to).await {
        Ok(moved) if moved.size == version.size => Ok(moved),
        Ok(_) | Err(_) => Err(doubt.into()),
    }
}

/// Gives a key that the store has moved its old name.
async fn move_back(store: &dyn Store, to: &Key, moved: &Object, from: &Key) {
    if let Err(error) = store.rename(to, moved, from, &Condition::Absent).await {
        let key = to.as_str();
        log::warn!("{key:?} of a rename that failed may keep its new name: {error}");
    }
}

/// Deletes a copy that this rename made. It stays in doubt, or if another client has stored
/// something meanwhile.
async fn take_back(store: &dyn Store, key: &Key, copied: &CheckedCopy) {
    if !copied.is_ours {
        return;
    }
    let removed = match store.head(key).await {
        Ok(found) if found.write_id.as_deref() == copied.write_id.as_deref() => {
            change::delete_version(store, key, &copied.etag).await
        }
        // The ETag can't tell: equal content of another client has the same one.
        Ok(_) => return,
        Err(error) => Err(error),
    };
    if let Err(error) = removed {
        let key = key.as_str();
        log::warn!("the copy {key:?} of a rename that failed may stay: {error}");
    }
}

/// Moves a file: copies the version that is there, and deletes that one. A version that another
/// client stores meanwhile is moved too, as if it had been stored before. Returns whether a file was
/// replaced.
async fn move_file(
    transfers: &Transfers,
    from: &Key,
    mut version: Object,
    to: &Key,
    replace: bool,
) -> Result<bool> {
    let store = transfers.store.as_ref();
    let condition = match replace {
        true => Condition::None,
        false => Condition::Absent,
    };
    // What the target held can't be brought back: from then on the rename counts as done.
    let mut has_replaced = false;
    for _ in 0..SOURCE_TRIES {
        let over = if replace {
            find_target(store, to).await?
        } else {
            None
        };
        match store.rename(from, &version, to, &condition).await {
            Ok(_moved) => return Ok(over.is_some()),
            Err(StoreError::Unsupported) => {}
            // The source or the target has changed.
            Err(StoreError::NotFound | StoreError::Precondition) => {
                version = look_again(store, from, &version, replace).await?;
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        match copy(transfers, from, &version, to, over.as_ref()).await {
            Ok(copied) => {
                if let Some(over) = &over
                    && !over.is_copy_of(&version)
                {
                    has_replaced = true;
                }
                match change::delete_version(store, from, &version.etag).await {
                    Ok(()) => return Ok(has_replaced || over.is_some()),
                    Err(StoreError::NotFound | StoreError::Precondition) if has_replaced => {}
                    Err(StoreError::NotFound | StoreError::Precondition) => {
                        take_back(store, to, &copied).await;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            // The source or the target has changed.
            Err(VfsError::NotFound | VfsError::Store(StoreError::Precondition)) => {}
            Err(error) => return Err(error),
        }
        version = match look_again(store, from, &version, replace).await {
            Ok(now) => now,
            // Another gateway has removed it, after this one had moved what it found.
            Err(VfsError::NotFound) if has_replaced => return Ok(true),
            Err(error) => return Err(error),
        };
    }
    Err(StoreError::Precondition.into())
}

/// The version of the source that is there now, after a try to move another one or onto a name that
/// was not free.
async fn look_again(
    store: &dyn Store,
    from: &Key,
    tried: &Object,
    replace: bool,
) -> Result<Object> {
    match store.head(from).await {
        // It was the target.
        Ok(now) if now.etag == tried.etag && !replace => Err(EXISTS),
        Ok(now) => Ok(now),
        Err(StoreError::NotFound) => Err(VfsError::NotFound),
        Err(error) => Err(error.into()),
    }
}

/// What a posix-rename is going to replace.
async fn find_target(store: &dyn Store, to: &Key) -> Result<Option<Object>> {
    match store.head(to).await {
        Ok(object) => Ok(Some(object)),
        Err(StoreError::NotFound | StoreError::Forbidden(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Copies until the target is the copy. Only then may the source be deleted: a store may confirm a
/// copy that changed nothing. `over` is the object that may be replaced; without one the name must
/// be free, so that the copy is certainly this rename's.
async fn copy(
    transfers: &Transfers,
    from: &Key,
    version: &Object,
    to: &Key,
    over: Option<&Object>,
) -> Result<CheckedCopy> {
    let store = transfers.store.as_ref();
    let condition = match over {
        Some(_) => Condition::None,
        None => Condition::Absent,
    };
    for _ in 0..COPY_TRIES {
        let mut copied = copy_once(transfers, from, version, to, &condition).await?;
        if !copied.is_ours {
            return Ok(copied);
        }
        let now = match store.head(to).await {
            Ok(object) => Some(object),
            Err(StoreError::NotFound) => None,
            Err(error) => return Err(error.into()),
        };
        if let Some(object) = &now
            && *object.etag == *copied.etag
        {
            copied.write_id = object.write_id.as_deref().map(Box::from);
            // It may replace a copy of the same version by another gateway, which then has it too.
            copied.is_ours = over.is_none();
            return Ok(copied);
        }
        if was_replaced(store, over, now.as_ref()) {
            copied.is_ours = false;
            return Ok(copied);
        }
    }
    Err(VfsError::Refused(
        "the store confirmed a copy that is not there: the source stays",
    ))
}

/// Copies in one request, or in parts if the object is too large for that.
async fn copy_once(
    transfers: &Transfers,
    from: &Key,
    version: &Object,
    to: &Key,
    condition: &Condition,
) -> Result<CheckedCopy> {
    if version.size > largest_copy(transfers) {
        return copy_in_parts(transfers, from, version, to, condition).await;
    }
    let _memory = take_copy_memory(transfers, version.size).await?;
    let source = CopySource { key: from, version };
    let copying = change::copy(transfers.store.as_ref(), source, to, condition);
    match transfers.run_until_stopped(copying).await {
        Some(Ok(store::Copied { etag, is_ours })) => Ok(CheckedCopy {
            etag: etag.into(),
            write_id: None,
            is_ours,
        }),
        Some(Err(StoreError::NotFound)) => Err(VfsError::NotFound),
        Some(Err(StoreError::TooLarge)) => {
            copy_in_parts(transfers, from, version, to, condition).await
        }
        Some(Err(error)) => Err(error.into()),
        None => Err(STOPPED),
    }
}

/// The largest object that is copied in one request, in bytes.
fn largest_copy(transfers: &Transfers) -> u64 {
    let limits = &transfers.limits;
    match limits.copies_itself {
        true => limits.max_copy,
        false => limits.max_copy.min(LOADED_COPY_SIZE),
    }
}

/// Size in bytes of the parts by which an object is copied.
fn copy_part_size(transfers: &Transfers, object_size: u64) -> u64 {
    let limits = &transfers.limits;
    let wanted = match limits.copies_itself {
        true => COPY_PART_SIZE,
        false => {
            let least = object_size.div_ceil(limits.max_parts.max(1).into());
            least.max(LOADED_COPY_SIZE).max(limits.min_part)
        }
    };
    wanted.min(limits.max_copy).min(limits.max_part)
}

/// Memory for bytes that are copied through this process. More than a quarter of the pool is not
/// waited for: clients may hold the other three as long as they like, and all uploads would wait
/// behind it.
async fn take_copy_memory(transfers: &Transfers, bytes: u64) -> Result<Option<Reservation>> {
    if transfers.limits.copies_itself {
        return Ok(None);
    }
    let pool = &transfers.pool;
    // In pieces as they arrived, and joined.
    let needed = 2 * bytes;
    let memory = match needed <= pool.size() / 4 {
        true => pool.take(needed).await,
        false => pool.try_take(needed),
    };
    match memory {
        Some(memory) => Ok(Some(memory)),
        None => Err(VfsError::Refused(
            "the server's --buffer-memory is too small to copy a file of this size, or in use",
        )),
    }
}

/// Whether another gateway has replaced or removed a copy that was confirmed: neither the copy nor
/// what it replaced is there. If the store ignores conditions, there is only one gateway, and the
/// copy was never made.
fn was_replaced(store: &dyn Store, over: Option<&Object>, now: Option<&Object>) -> bool {
    match (over, now) {
        (None, None) => false,
        (None, Some(_)) => store.limits().conditions.copy_absent,
        (Some(_), None) => true,
        (Some(over), Some(now)) => over.etag != now.etag,
    }
}

/// Copies an object that is too large for one request, with its attributes.
async fn copy_in_parts(
    transfers: &Transfers,
    from: &Key,
    version: &Object,
    to: &Key,
    condition: &Condition,
) -> Result<CheckedCopy> {
    let attributes = find_attributes(transfers.store.as_ref(), from, version).await?;
    let upload = MultipartUpload::create(transfers.store.clone(), to, &attributes).await?;
    let completed = match copy_parts(transfers, &upload, from, version).await {
        Ok(parts) => match upload.complete(&parts, condition).await {
            Ok(copy) => Ok(copy.etag),
            Err(error) => Err(error.into()),
        },
        Err(error) => Err(error),
    };
    match completed {
        Ok(etag) => Ok(CheckedCopy {
            etag: etag.into(),
            write_id: None,
            is_ours: true,
        }),
        Err(error) => {
            upload.abort(&transfers.events).await;
            Err(error)
        }
    }
}

/// The attributes of this version of an object. A listing does not have them.
async fn find_attributes(store: &dyn Store, key: &Key, version: &Object) -> Result<Attributes> {
    let object = match &version.attributes {
        Some(_) => version.clone(),
        None => match store.head(key).await {
            Ok(object) if object.etag == version.etag => object,
            Ok(_replaced) => return Err(StoreError::Precondition.into()),
            Err(StoreError::NotFound) => return Err(VfsError::NotFound),
            Err(error) => return Err(error.into()),
        },
    };
    let mut attributes = match &object.attributes {
        Some(attributes) => attributes.as_ref().clone(),
        None => Attributes::default(),
    };
    attributes.storage_class = object.storage_class;
    Ok(attributes)
}

/// UploadPartCopy of the whole object.
async fn copy_parts(
    transfers: &Transfers,
    upload: &MultipartUpload,
    from: &Key,
    version: &Object,
) -> Result<Vec<Part>> {
    let part_size = copy_part_size(transfers, version.size);
    let mut parts = Vec::new();
    let mut start = 0;
    let mut number = 1;
    while start < version.size {
        if transfers.stop.is_cancelled() {
            return Err(STOPPED);
        }
        let end = version.size.min(start + part_size);
        let source = PartSource {
            key: from,
            etag: &version.etag,
            range: start..end,
        };
        let _memory = take_copy_memory(transfers, end - start).await?;
        let copying = upload.copy_part(number, source);
        match transfers.run_until_stopped(copying).await {
            Some(part) => parts.push(part?),
            None => return Err(STOPPED),
        }
        start = end;
        number += 1;
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;
    use crate::store::{Limits, Timeouts};
    use crate::transfer::{BufferPool, PartSizes};

    const MIB: u64 = 1024 * 1024;

    /// Clients hold three quarters of the pool, for as long as they like.
    #[tokio::test(start_paused = true)]
    async fn a_copy_does_not_stand_before_all_uploads() {
        let pool = BufferPool::new(20 * MIB);
        let clients = pool.try_take(15 * MIB).unwrap();
        let store = Arc::new(MemoryStore::with_limits(Limits::default()));
        let timeouts = Timeouts::default();
        let sizes = PartSizes::default();
        let transfers = Arc::new(Transfers::new(store, timeouts, pool.clone(), sizes));
        let copying = tokio::spawn({
            let transfers = transfers.clone();
            async move { take_copy_memory(&transfers, 5 * MIB).await.map(drop) }
        });
        tokio::task::yield_now().await;
        let part = tokio::time::timeout(std::time::Duration::from_secs(60), pool.take(5 * MIB));
        assert!(part.await.is_ok());
        assert!(copying.await.unwrap().is_err());
        drop(clients);
        assert!(take_copy_memory(&transfers, 5 * MIB).await.is_ok());
    }
}
