//! What a user sees: a file system made of keys, of directories that S3 does not have, and of
//! uploads in progress.
//!
//! Called by `sftp`, one [`Vfs`] a session. The rules of docs/requests.md about names live here,
//! those about bytes in `transfer`. Each function says which S3 requests it sends.

mod listing;
mod open;
mod overlay;
mod rename;

pub use listing::{Item, Listing};
pub use open::{FileToRead, FileToWrite, WriteMode};
pub use overlay::Overlay;
use overlay::SessionId;

use crate::path::{Home, Key, ObjectKeys, Path, PathError};
use crate::store::{
    Attributes, Condition, Entry, ListRequest, MAX_PAGE, Object, Page, StoreError, change,
};
use crate::transfer::{LockedName, NameLock, Progress, Transfers};
use bytes::Bytes;
use std::sync::Arc;
use std::time::SystemTime;

/// Why a request about names fails.
#[derive(Clone, Debug, thiserror::Error)]
pub enum VfsError {
    /// Nothing has this name.
    #[error("no such file or directory")]
    NotFound,
    /// The path has no key.
    #[error(transparent)]
    Path(#[from] PathError),
    /// S3 has no operation for this.
    #[error("{0}")]
    Unsupported(&'static str),
    /// Not allowed, with the reason.
    #[error("{0}")]
    Refused(&'static str),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Something has the name already.
const EXISTS: VfsError = VfsError::Refused("already exists");
/// The request is for files only.
const IS_DIRECTORY: VfsError = VfsError::Refused("is a directory");
/// rmdir never deletes files.
const NOT_EMPTY: VfsError = VfsError::Refused("the directory is not empty");
/// An upload to the file, or to one in the directory, is in progress.
const BUSY: VfsError = VfsError::Refused("an upload to it is in progress");

type Result<T> = std::result::Result<T, VfsError>;

/// What `stat` returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stat {
    /// An object, or an upload in progress.
    File {
        /// In bytes.
        size: u64,
        /// When the object was stored, or when the upload began.
        modified: SystemTime,
    },
    /// A prefix, a marker object, or a directory of the overlay.
    Directory,
}

impl From<&Object> for Stat {
    fn from(object: &Object) -> Stat {
        Stat::File {
            size: object.size,
            modified: object.modified,
        }
    }
}

impl From<&Arc<Progress>> for Stat {
    fn from(progress: &Arc<Progress>) -> Stat {
        Stat::File {
            size: progress.size(),
            modified: progress.started,
        }
    }
}

/// What has a name.
enum Found {
    /// An upload of the session; no object has the name yet.
    Pending(Arc<Progress>),
    /// An object.
    File(Object),
    /// Keys below the name, or a directory of the overlay.
    Directory,
    Nothing,
}

impl Found {
    /// The object; an error if something else has the name, or nothing.
    fn into_object(self) -> Result<Object> {
        match self {
            Found::File(object) => Ok(object),
            Found::Pending(_) => Err(BUSY),
            Found::Directory => Err(IS_DIRECTORY),
            Found::Nothing => Err(VfsError::NotFound),
        }
    }
}

/// The files and directories of one user. Cheap to make.
#[derive(Clone)]
pub struct Vfs {
    transfers: Arc<Transfers>,
    overlay: Arc<Overlay>,
    /// Whose uploads are seen before they are stored.
    session: SessionId,
    home: Home,
    /// Whether mkdir stores `dir/` objects, so that other gateways and the next start of this one
    /// see the directories.
    markers: bool,
}

impl Vfs {
    /// The view of a new session. All users of a server share its `overlay`.
    pub fn new(transfers: Arc<Transfers>, overlay: Arc<Overlay>, home: Home, markers: bool) -> Vfs {
        Vfs {
            transfers,
            session: overlay.add_session(),
            overlay,
            home,
            markers,
        }
    }

    /// What transfers of the files that are opened here need.
    pub fn transfers(&self) -> &Arc<Transfers> {
        &self.transfers
    }

    /// Locks a name against other changes, but not what is inside a directory of this name.
    async fn lock(&self, keys: &ObjectKeys) -> NameLock {
        let name = LockedName::alone(&keys.file);
        self.transfers.locks.lock(vec![name]).await
    }

    /// The number of changes that have begun or ended so far, through this server, and of uploads
    /// that have ended. It never falls.
    pub fn changes(&self) -> u64 {
        self.transfers.locks.count() + self.overlay.ended_uploads()
    }

    /// As [`Vfs::changes`]; `None` while a change is under way.
    pub fn changes_when_idle(&self) -> Option<u64> {
        let changes = self.transfers.locks.count_when_idle()?;
        Some(changes + self.overlay.ended_uploads())
    }

    /// Resolves, with the number of uploads that have ended, once it is not `seen` any more.
    pub async fn wait_for_ended_upload(&self, seen: u64) -> u64 {
        self.overlay.wait_for_ended_upload(seen).await
    }

    /// The key of a file of this path. The keys in a directory begin with it and a slash.
    pub fn file_key(&self, path: &Path) -> Result<Key> {
        Ok(self.home.keys(path)?.file)
    }

    /// Is an upload of this session to this path in progress?
    pub fn is_being_uploaded(&self, path: &Path) -> bool {
        match self.home.keys(path) {
            Ok(keys) => self.find_upload(&keys).is_some(),
            Err(_) => false,
        }
    }

    /// The uploads in progress of other sessions to this path and, with its `subtree`, to those
    /// below it.
    pub fn foreign_uploads(&self, path: &Path, subtree: bool) -> Vec<Arc<Progress>> {
        match self.home.keys(path) {
            Ok(keys) => self.overlay.foreign_uploads(&keys, subtree, self.session),
            Err(_) => Vec::new(),
        }
    }

    /// Shows the session's uploads to this path no longer: they were given up.
    pub fn drop_uploads(&self, path: &Path) {
        if let Ok(keys) = self.home.keys(path) {
            self.overlay.drop_uploads_of(&keys.file, self.session);
        }
    }

    /// The session's newest upload in progress to this file.
    fn find_upload(&self, keys: &ObjectKeys) -> Option<Arc<Progress>> {
        self.overlay.upload_of(&keys.file, self.session)
    }

    /// Fails if the session has changed the file and not closed it yet: what is stored is not what
    /// the session was shown.
    fn check_closed(&self, keys: &ObjectKeys) -> Result<()> {
        match self.find_upload(keys) {
            Some(progress) if progress.is_changed() => Err(BUSY),
            Some(_) | None => Ok(()),
        }
    }

    /// No request for what the overlay has; otherwise HEAD, then a list of one.
    pub async fn stat(&self, path: &Path) -> Result<Stat> {
        if path.is_root() || self.overlay.is_made(&self.home.directory(path)?) {
            return Ok(Stat::Directory);
        }
        let keys = self.home.keys(path)?;
        if let Some(progress) = self.find_upload(&keys) {
            return Ok(Stat::from(&progress));
        }
        match self.lookup(&keys).await? {
            // It has begun meanwhile.
            Found::Pending(progress) => Ok(Stat::from(&progress)),
            Found::File(object) => Ok(Stat::from(&object)),
            Found::Directory => Ok(Stat::Directory),
            Found::Nothing => Err(VfsError::NotFound),
        }
    }

    /// What has this name: HEAD, and if there is no object, a list of one.
    async fn lookup(&self, keys: &ObjectKeys) -> Result<Found> {
        match self.find_object(&keys.file).await? {
            Some(object) => Ok(Found::File(object)),
            None => self.lookup_without_object(keys).await,
        }
    }

    /// What has this name, given that no object does: a list of one, unless the overlay has it.
    async fn lookup_without_object(&self, keys: &ObjectKeys) -> Result<Found> {
        if let Some(progress) = self.find_upload(keys) {
            return Ok(Found::Pending(progress));
        }
        if self.is_directory(&keys.directory).await? {
            return Ok(Found::Directory);
        }
        match self.find_upload(keys) {
            Some(progress) => Ok(Found::Pending(progress)),
            None => Ok(Found::Nothing),
        }
    }

    /// HEAD; if that is refused, as to credentials that can only put and list, a list of one.
    async fn find_object(&self, file: &Key) -> Result<Option<Object>> {
        match self.transfers.store.head(file).await {
            Ok(object) => Ok(Some(object)),
            Err(StoreError::NotFound) => Ok(None),
            Err(StoreError::Forbidden(_)) => match self.first_entries(file, 1).await?.pop() {
                Some(Entry::Object(key, object)) if key == file.as_str() => Ok(Some(object)),
                Some(_) | None => Ok(None),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// No request for what the overlay has; otherwise a list of one.
    async fn is_directory(&self, prefix: &Key) -> Result<bool> {
        if self.overlay.is_directory(prefix) {
            return Ok(true);
        }
        let entries = self.first_entries(prefix, 1).await?;
        Ok(!entries.is_empty())
    }

    /// The first entries below a prefix, at most `limit`. S3 may send fewer than were asked for,
    /// even none, and have more.
    async fn first_entries(&self, prefix: &Key, limit: usize) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let mut after = None;
        loop {
            let page = self.list(prefix, after, limit - entries.len()).await?;
            entries.extend(page.entries);
            match page.next {
                Some(next) if entries.len() < limit => after = Some(next),
                Some(_) | None => return Ok(entries),
            }
        }
    }

    /// One page of all keys that start with a prefix.
    async fn list(&self, prefix: &Key, after: Option<String>, limit: usize) -> Result<Page> {
        let request = ListRequest {
            prefix,
            folded: false,
            after,
            limit,
        };
        Ok(self.transfers.store.list(request).await?)
    }

    /// One list request, to see that the name is free. The directory is kept in the overlay, or put
    /// as a marker.
    pub async fn make_directory(&self, path: &Path) -> Result<()> {
        let keys = self.home.keys(path)?;
        let _lock = self.lock(&keys).await;
        let is_pending = self.overlay.has_upload(&keys.file);
        if is_pending || self.overlay.is_directory(&keys.directory) {
            return Err(EXISTS);
        }
        if self.is_taken(&keys).await? {
            return Err(EXISTS);
        }
        if self.markers {
            self.put_empty(&keys.directory).await
        } else {
            let overlay = &self.overlay;
            overlay.add_directory(&self.home, &keys.directory, true)
        }
    }

    /// Whether the store has a file or directory of this name. One list request shows both, as the
    /// first names that start like this one; a second one is sent if a page is full of such names.
    async fn is_taken(&self, keys: &ObjectKeys) -> Result<bool> {
        let request = ListRequest {
            prefix: &keys.file,
            folded: true,
            after: None,
            limit: MAX_PAGE,
        };
        let page = match self.transfers.store.list(request).await {
            Ok(page) => page,
            // Credentials that can only put can still make directories to put into.
            Err(StoreError::Forbidden(_)) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        for entry in &page.entries {
            let (Entry::Object(key, _) | Entry::Prefix(key)) = entry;
            if key.trim_end_matches('/') == keys.file.as_str() {
                return Ok(true);
            }
        }
        match page.next {
            Some(_) => self.is_directory(&keys.directory).await,
            None => Ok(false),
        }
    }

    /// One list request, and a DELETE if there is a `dir/` marker.
    pub async fn remove_directory(&self, path: &Path) -> Result<()> {
        let keys = self.home.keys(path)?;
        let directory = &keys.directory;
        let name = LockedName::with_subtree(&keys.file);
        let _lock = self.transfers.locks.lock(vec![name]).await;
        if self.overlay.has_entries(directory) {
            return Err(NOT_EMPTY);
        }
        match self.first_entries(directory, 2).await?.as_slice() {
            [] if self.overlay.is_directory(directory) => {}
            [] => return Err(VfsError::NotFound),
            // Other programs may have put content under a name that ends with a slash.
            [Entry::Object(marker, Object { size: 0, .. })] if marker == directory.as_str() => {
                let store = &self.transfers.store;
                store.delete(directory, &Condition::None).await?;
            }
            _ => return Err(NOT_EMPTY),
        }
        self.overlay.remove_directory(directory);
        self.keep_parent(path).await;
        Ok(())
    }

    /// HEAD and DELETE.
    pub async fn remove(&self, path: &Path) -> Result<()> {
        let keys = self.home.keys(path)?;
        let _lock = self.lock(&keys).await;
        let object = self.lookup(&keys).await?.into_object()?;
        let store = &self.transfers.store;
        store
            .delete(&keys.file, &Condition::Unchanged(object.etag))
            .await?;
        self.overlay.supersede_uploads(&keys.file);
        self.keep_parent(path).await;
        Ok(())
    }

    /// Keeps the directory that a path was in: to S3 it vanishes with its last entry. With markers
    /// a list, and a put if nothing is left.
    async fn keep_parent(&self, path: &Path) {
        let Some(parent) = path.parent() else {
            return;
        };
        // The home needs no keeping.
        let Ok(keys) = self.home.keys(&parent) else {
            return;
        };
        let directory = &keys.directory;
        let kept = if self.markers {
            self.put_marker_if_empty(directory).await
        } else {
            self.overlay.add_directory(&self.home, directory, false)
        };
        // What was asked for is done, so a failure here is not one of the request.
        if let Err(error) = kept {
            let directory = directory.as_str();
            log::debug!("can't keep the emptied directory {directory:?}: {error}");
        }
    }

    async fn put_marker_if_empty(&self, directory: &Key) -> Result<()> {
        let entries = self.first_entries(directory, 1).await?;
        if entries.is_empty() {
            self.put_empty(directory).await?;
        }
        Ok(())
    }

    /// Puts an object without content over whatever is there.
    async fn put_empty(&self, key: &Key) -> Result<()> {
        let store = self.transfers.store.as_ref();
        let attributes = Attributes::default();
        change::put(store, key, Bytes::new(), &attributes, &Condition::None).await?;
        Ok(())
    }

    /// SETSTAT with a size: 0 empties the file (HEAD and PUT), which keeps its attributes; any other
    /// must be the size that the file has (requests as for stat).
    pub async fn set_size(&self, path: &Path, size: u64) -> Result<()> {
        let keys = self.home.keys(path)?;
        let _lock = self.lock(&keys).await;
        self.check_closed(&keys)?;
        let object = self.lookup(&keys).await?.into_object()?;
        if object.size == size {
            return Ok(());
        }
        if size != 0 {
            let why = "S3 can't change the size of a stored file";
            return Err(VfsError::Unsupported(why));
        }
        let store = self.transfers.store.as_ref();
        let attributes = object.attributes.as_deref().cloned().unwrap_or_default();
        let condition = Condition::Unchanged(object.etag);
        change::put(store, &keys.file, Bytes::new(), &attributes, &condition).await?;
        self.overlay.supersede_uploads(&keys.file);
        Ok(())
    }
}
