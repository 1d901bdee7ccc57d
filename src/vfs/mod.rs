//! What a user sees: a file system made of keys, of directories that S3 lacks, and of uploads in progress.
//!
//! Called by `sftp`, one [`Vfs`] a session. Every rule of docs/requests.md that is not about
//! bytes lives here; each function says which S3 requests it sends.

mod listing;
mod overlay;
mod rename;

pub use listing::{Item, Listing};
pub use overlay::Overlay;

use crate::path::{Home, Key, ObjectKeys, Path, PathError};
use crate::store::*;
use crate::transfer::{
    Download, DownloadSummary, LockedName, NameLock, OpenedObject, Progress, ReadSink,
    SessionLimits, Target, Transfers, Upload, UploadSummary,
};
use bytes::Bytes;
use overlay::DIRECTORY;
use std::{sync::Arc, time::SystemTime};

/// Why a request on the tree fails.
#[derive(Clone, Debug, thiserror::Error)]
pub enum VfsError {
    /// Nothing has this name.
    #[error("no such file or directory")]
    NotFound,
    /// A path that no key can stand for.
    #[error(transparent)]
    Path(#[from] PathError),
    /// S3 can't do that.
    #[error("{0}")]
    Unsupported(&'static str),
    /// Against the rules, with the reason.
    #[error("{0}")]
    Refused(&'static str),
    /// See [`StoreError`].
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The name is taken.
const EXISTS: VfsError = VfsError::Refused("already exists");
/// A file was wanted.
const IS_DIRECTORY: VfsError = VfsError::Refused("is a directory");
/// rmdir never deletes files.
const NOT_EMPTY: VfsError = VfsError::Refused("the directory is not empty");
/// An upload to it, or inside it, is in progress.
const BUSY: VfsError = VfsError::Refused("an upload to it is in progress");

type Result<T> = std::result::Result<T, VfsError>;

fn fail_if(wrong: bool, error: VfsError) -> Result<()> {
    if wrong { Err(error) } else { Ok(()) }
}

/// What stat tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stat {
    /// An object, or an upload in progress.
    File {
        /// In bytes.
        size: u64,
        /// When it was stored, or the upload began.
        modified: SystemTime,
    },
    /// A prefix, a marker object, or a directory in RAM.
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

/// How a file is opened for writing.
#[derive(Clone, Copy, Debug, Default)]
pub struct WriteMode {
    /// Make it if it isn't there.
    pub create: bool,
    /// Start empty.
    pub truncate: bool,
    /// It must not be there (EXCL).
    pub exclusive: bool,
}

/// One user's view. Cheap to make.
#[derive(Clone)]
pub struct Vfs {
    transfers: Arc<Transfers>,
    overlay: Arc<Overlay>,
    home: Home,
    /// Directories are `dir/` objects, so that other gateways and the next start see them.
    markers: bool,
}

impl Vfs {
    /// `overlay` is shared by all trees of a server.
    pub fn new(transfers: Arc<Transfers>, overlay: Arc<Overlay>, home: Home, markers: bool) -> Vfs {
        Vfs {
            transfers,
            overlay,
            home,
            markers,
        }
    }

    /// The keys of a path, after all changes to or below it that were asked for before, in whatever session. What is
    /// asked after a CLOSE must see its outcome, even if nobody waited for the reply (sshfs doesn't).
    async fn after_pending_closes(&self, path: &Path) -> Result<ObjectKeys> {
        let place = self.home.keys(path)?;
        self.transfers
            .locks
            .wait_for_earlier(&LockedName::with_subtree(&place.file))
            .await;
        Ok(place)
    }

    /// The keys of a path, which nobody else changes until the lock is dropped; what is inside of it, everybody may.
    async fn lock(&self, path: &Path) -> Result<(ObjectKeys, NameLock)> {
        let place = self.home.keys(path)?;
        let lock = self
            .transfers
            .locks
            .lock(vec![LockedName::alone(&place.file)])
            .await;
        Ok((place, lock))
    }

    /// How many changes have begun and ended so far, through this server.
    pub fn changes(&self) -> u64 {
        self.transfers.locks.count()
    }

    /// Is an upload to this path in progress?
    pub fn is_being_uploaded(&self, path: &Path) -> bool {
        match self.home.keys(path) {
            Ok(place) => self.overlay.upload(&place.file).is_some(),
            Err(_) => false,
        }
    }

    /// Nothing if known here, else HEAD, else a list of one.
    pub async fn stat(&self, path: &Path) -> Result<Stat> {
        if path.is_root() || self.overlay.is_made(&self.home.directory(path)?) {
            return Ok(Stat::Directory);
        }
        let place = self.home.keys(path)?;
        let upload = || self.overlay.upload(&place.file).as_ref().map(Stat::from);
        if let Some(stat) = upload() {
            return Ok(stat);
        }
        let found = self
            .look(&place)
            .await
            .map(|object| object.as_ref().map_or(Stat::Directory, Stat::from));
        // An upload may have begun meanwhile.
        found.or_else(|error| upload().ok_or(error))
    }

    /// Fails if a file, a directory or an upload has this name. HEAD, then a list of one.
    async fn must_be_unused(&self, place: &ObjectKeys) -> Result<()> {
        match self.object(&place.file).await {
            Ok(_) => return Err(EXISTS),
            Err(VfsError::NotFound) => {}
            Err(error) => return Err(error),
        }
        let is_directory = match self.is_directory(&place.directory).await {
            // Credentials that can only put can still make new files.
            Err(VfsError::Store(StoreError::Forbidden(_))) => false,
            found => found?,
        };
        fail_if(
            is_directory || self.overlay.upload(&place.file).is_some(),
            EXISTS,
        )
    }

    /// HEAD; where that is refused, as to write-only credentials, a list of one.
    async fn object(&self, file: &Key) -> Result<Object> {
        match self.transfers.store.head(file).await {
            Err(StoreError::NotFound) => Err(VfsError::NotFound),
            Err(StoreError::Forbidden(_)) => match self.first_entries(file, 1).await?.pop() {
                Some(Entry::Object(key, object)) if key == file.as_str() => Ok(object),
                _ => Err(VfsError::NotFound),
            },
            object => Ok(object?),
        }
    }

    /// The object of this name, or `None` where only a directory has it. HEAD, then a list of one.
    async fn look(&self, place: &ObjectKeys) -> Result<Option<Object>> {
        self.or_directory(place, self.object(&place.file).await)
            .await
    }

    async fn or_directory<T>(&self, place: &ObjectKeys, object: Result<T>) -> Result<Option<T>> {
        match object {
            Err(VfsError::NotFound) if self.overlay.upload(&place.file).is_some() => Err(BUSY),
            Err(VfsError::NotFound) if self.is_directory(&place.directory).await? => Ok(None),
            object => object.map(Some),
        }
    }

    /// Known here, or a list of one.
    async fn is_directory(&self, prefix: &Key) -> Result<bool> {
        Ok(self.overlay.is_directory(prefix) || !self.first_entries(prefix, 1).await?.is_empty())
    }

    /// The first entries below a prefix, so many at most. S3 may send fewer than it was asked for, even none, and have more.
    async fn first_entries(&self, prefix: &Key, limit: usize) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let mut next = Some(None);
        while let Some(after) = next
            && entries.len() < limit
        {
            let page = self.list(prefix, after, limit - entries.len()).await?;
            entries.extend(page.entries);
            next = page.next.map(Some);
        }
        Ok(entries)
    }

    async fn list(&self, prefix: &Key, after: Option<String>, limit: usize) -> Result<Page> {
        Ok(self
            .transfers
            .store
            .list(ListRequest {
                prefix,
                folded: false,
                after,
                limit,
            })
            .await?)
    }

    /// One list request, to see that the name is free. The directory itself is kept in RAM, or put as a marker.
    pub async fn make_directory(&self, path: &Path) -> Result<()> {
        let (ObjectKeys { file, directory }, _lock) = self.lock(path).await?;
        fail_if(
            self.overlay.upload(&file).is_some() || self.overlay.is_directory(&directory),
            EXISTS,
        )?;
        let request = ListRequest {
            prefix: &file,
            folded: true,
            after: None,
            limit: MAX_PAGE,
        };
        let page = match self.transfers.store.list(request).await {
            // Credentials that can only put can still make directories to put into.
            Err(StoreError::Forbidden(_)) => Page::default(),
            page => page?,
        };
        let is_it = |(Entry::Object(key, _) | Entry::Prefix(key)): &Entry| {
            key.trim_end_matches('/') == file.as_str()
        };
        // A thousand names begin like this one: ask for it alone.
        let taken = page.entries.iter().any(is_it)
            || (page.next.is_some() && self.is_directory(&directory).await?);
        fail_if(taken, EXISTS)?;
        if self.markers {
            self.put_empty(&directory).await
        } else {
            self.overlay.add_directory(&self.home, &directory, true)
        }
    }

    /// One list request, and a DELETE if there is a `dir/` marker.
    pub async fn remove_directory(&self, path: &Path) -> Result<()> {
        let ObjectKeys { file, directory } = self.home.keys(path)?;
        let _lock = self
            .transfers
            .locks
            .lock(vec![LockedName::with_subtree(&file)])
            .await;
        fail_if(
            self.overlay.any(&directory, |name, _| !name.is_empty()),
            NOT_EMPTY,
        )?;
        match self.first_entries(&directory, 2).await?.as_slice() {
            [] => fail_if(!self.overlay.is_directory(&directory), VfsError::NotFound)?,
            // Other programs may have put content under a name that ends with a slash.
            [Entry::Object(marker, Object { size: 0, .. })] if marker == directory.as_str() => {
                self.transfers
                    .store
                    .delete(&directory, &Condition::None)
                    .await?;
            }
            _ => return Err(NOT_EMPTY),
        }
        self.overlay.remove(&(directory.to_string(), DIRECTORY));
        self.keep_parent(path).await;
        Ok(())
    }

    /// HEAD and DELETE.
    pub async fn remove(&self, path: &Path) -> Result<()> {
        let (place, _lock) = self.lock(path).await?;
        self.look(&place).await?.ok_or(IS_DIRECTORY)?;
        self.transfers
            .store
            .delete(&place.file, &Condition::None)
            .await?;
        self.keep_parent(path).await;
        Ok(())
    }

    /// A directory does not vanish with its last entry, though S3 thinks so. With markers a list, and a put where
    /// nothing else is left.
    async fn keep_parent(&self, path: &Path) {
        let parent = Path::parse(&format!("{}/..", path.as_str()))
            .and_then(|parent| self.home.keys(&parent));
        // Nothing to keep above the top.
        let Ok(ObjectKeys { directory, .. }) = parent else {
            return;
        };
        // If there are too many, or the store is in trouble, this one goes: what was asked for is done.
        let _ = match self.markers {
            false => self.overlay.add_directory(&self.home, &directory, false),
            true => match self.first_entries(&directory, 1).await {
                Ok(entries) if entries.is_empty() => self.put_empty(&directory).await,
                listed => listed.map(drop),
            },
        };
    }

    /// An object without content, whatever was there before.
    async fn put_empty(&self, key: &Key) -> Result<()> {
        let store = self.transfers.store.as_ref();
        change::put(
            store,
            key,
            Bytes::new(),
            &Attributes::default(),
            &Condition::None,
        )
        .await?;
        Ok(())
    }

    /// SETSTAT with a size: 0 empties the file (HEAD and PUT), any other must be what it is (as stat).
    pub async fn set_size(&self, path: &Path, size: u64) -> Result<()> {
        let (ObjectKeys { file, .. }, _lock) = self.lock(path).await?;
        match self.stat(path).await? {
            Stat::Directory => Err(IS_DIRECTORY),
            Stat::File { size: now, .. } if now == size => Ok(()),
            Stat::File { .. } if self.overlay.upload(&file).is_some() => Err(BUSY),
            Stat::File { .. } if size == 0 => self.put_empty(&file).await,
            Stat::File { .. } => Err(VfsError::Unsupported(
                "S3 can't change the size of a stored file",
            )),
        }
    }

    /// One GET of the first bytes; for anything that is no file, a list of one.
    pub async fn open_read<F>(
        &self,
        path: &Path,
        limits: SessionLimits,
        answers: impl ReadSink,
        on_end: F,
    ) -> Result<Download>
    where
        F: FnOnce(DownloadSummary) + Send + 'static,
    {
        let place = self.after_pending_closes(path).await?;
        let beginning = match OpenedObject::ask(&self.transfers, &place.file, &limits).await {
            Err(StoreError::NotFound) => Err(VfsError::NotFound),
            // Where keys that aren't there are refused too, only a list tells.
            Err(StoreError::Forbidden(_)) => self.object(&place.file).await.map(OpenedObject::from),
            beginning => Ok(beginning?),
        };
        let beginning = self
            .or_directory(&place, beginning)
            .await?
            .ok_or(IS_DIRECTORY)?;
        Ok(Download::open(
            self.transfers.clone(),
            place.file,
            beginning,
            limits,
            answers,
            on_end,
        ))
    }

    /// Nothing for a plain put (create and truncate); HEAD where the old object matters, and a list of one under EXCL,
    /// where a directory has the name too.
    pub async fn open_write<F>(&self, path: &Path, mode: WriteMode, on_end: F) -> Result<Upload>
    where
        F: FnOnce(UploadSummary) + Send + 'static,
    {
        let place = self.home.keys(path)?;
        let name = LockedName::alone(&place.file);
        // Of two that create it exclusively the second one must see the first one's upload.
        let _lock = match mode.exclusive {
            true => Some(self.transfers.locks.lock(vec![name]).await),
            false => {
                self.transfers.locks.wait_for_earlier(&name).await;
                None
            }
        };
        fail_if(self.overlay.is_made(&place.directory), IS_DIRECTORY)?;
        let old = match mode {
            // Not even asked for.
            WriteMode {
                create: true,
                truncate: true,
                exclusive: false,
            } => None,
            WriteMode {
                create: true,
                exclusive: true,
                ..
            } => {
                self.must_be_unused(&place).await?;
                None
            }
            WriteMode {
                create: true,
                truncate: false,
                exclusive: false,
            } => match self.object(&place.file).await {
                Err(VfsError::NotFound) => None,
                object => Some(object?),
            },
            WriteMode { create: false, .. } => Some(self.look(&place).await?.ok_or(IS_DIRECTORY)?),
        };
        let base = old.filter(|_| !mode.truncate);
        let condition = match (&base, mode) {
            (
                _,
                WriteMode {
                    exclusive: true, ..
                },
            ) => Condition::Absent,
            // What is changed must be what was there when it was opened, or changes of others get lost.
            (Some(base), _) => Condition::Unchanged(base.etag.clone()),
            // What is to be continued was not there: if that is not so any more, the tail must not replace it.
            (
                None,
                WriteMode {
                    truncate: false, ..
                },
            ) => Condition::Absent,
            (None, WriteMode { truncate: true, .. }) => Condition::None,
        };
        let (overlay, slot) = (self.overlay.clone(), self.overlay.upload_slot(&place.file));
        let (shown, stored) = (slot.clone(), place.file.clone());
        let on_end = Box::new(move |summary: UploadSummary| {
            if let Some(Ok(())) = summary.result {
                overlay.stored(&stored);
            }
            overlay.remove(&shown);
            on_end(summary);
        });
        let upload = Upload::open(
            self.transfers.clone(),
            Target {
                key: place.file,
                base,
                condition,
                on_end,
            },
        );
        self.overlay.add_upload(slot, upload.progress().clone());
        Ok(upload)
    }
}
