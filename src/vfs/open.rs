//! Opening files: which object is read, and what an upload starts from.
//!
//! [`Vfs::open_read`] and [`Vfs::open_write`] decide and describe; `sftp` starts the transfer.

use super::overlay::UploadEntry;
use super::{EXISTS, Found, IS_DIRECTORY, Result, Vfs, VfsError};
use crate::events::Teller;
use crate::path::{Key, ObjectKeys, Path};
use crate::store::{Condition, Object, StoreError};
use crate::transfer::{
    LockedName, NameLock, OpenedObject, SessionLimits, Target, Transfers, Upload, UploadSummary,
};
use std::sync::Arc;

/// How a file is opened for writing.
#[derive(Clone, Copy, Debug, Default)]
pub struct WriteMode {
    /// Make the file if it does not exist.
    pub create: bool,
    /// Start empty.
    pub truncate: bool,
    /// The file must not exist yet (EXCL). Only with `create`.
    pub exclusive: bool,
}

/// A file that was opened for reading.
pub struct FileToRead {
    /// Its object's key.
    pub key: Key,
    /// The version to read.
    pub object: OpenedObject,
}

/// What an upload starts from.
enum Base {
    /// Nothing: the upload replaces whatever is at the key.
    NotNeeded,
    /// Nothing, and at CLOSE nothing must be at the key.
    Missing,
    /// This object, which must still be at the key at CLOSE.
    Is(Object),
}

impl Base {
    /// What must be at the key at CLOSE, so that no change of another client gets lost.
    fn condition(&self) -> Condition {
        match self {
            Base::NotNeeded => Condition::None,
            Base::Missing => Condition::Absent,
            Base::Is(object) => Condition::Unchanged(object.etag.clone()),
        }
    }
}

/// A file that was opened for writing. If that was exclusive, its name stays locked until the
/// upload is started.
pub struct FileToWrite {
    key: Key,
    base: Base,
    entry: UploadEntry,
    _lock: Option<NameLock>,
}

impl FileToWrite {
    /// Starts the upload, and shows it in the overlay until it has ended. `on_end` is called then,
    /// before CLOSE is answered.
    pub fn start(
        self,
        transfers: Arc<Transfers>,
        events: Teller,
        on_end: impl FnOnce(UploadSummary) + Send + 'static,
    ) -> Upload {
        let condition = self.base.condition();
        let base = match self.base {
            Base::Is(object) => Some(object),
            Base::NotNeeded | Base::Missing => None,
        };
        let entry = Arc::new(self.entry);
        // Dropped with the upload's task, should that panic.
        let shown = entry.clone();
        let on_end = Box::new(move |summary: UploadSummary| {
            if let Some(Ok(())) = summary.result {
                shown.note_stored();
            }
            drop(shown);
            on_end(summary);
        });
        let target = Target {
            key: self.key,
            base,
            condition,
            events,
            on_end,
        };
        let upload = Upload::open(transfers, target);
        entry.show(upload.progress().clone());
        upload
    }
}

impl Vfs {
    /// One GET of the first bytes; if there is no such object, a list of one.
    pub async fn open_read(&self, path: &Path, limits: &SessionLimits) -> Result<FileToRead> {
        let keys = self.home.keys(path)?;
        // What is asked after a CLOSE must see its outcome, even if the client did not wait for the
        // reply (sshfs doesn't).
        let name = LockedName::with_subtree(&keys.file);
        self.transfers.locks.wait_for_earlier(&name).await;
        self.check_closed(&keys)?;
        let found = match OpenedObject::ask(&self.transfers, &keys.file, limits).await {
            Ok(object) => {
                return Ok(FileToRead {
                    key: keys.file,
                    object,
                });
            }
            Err(StoreError::NotFound) => self.lookup_without_object(&keys).await?,
            // S3 may refuse a GET also because there is no such key.
            Err(StoreError::Forbidden(_)) => self.lookup(&keys).await?,
            Err(error) => return Err(error.into()),
        };
        let object = found.into_object()?;
        Ok(FileToRead {
            key: keys.file,
            object: OpenedObject::from(object),
        })
    }

    /// No request for a plain put (create and truncate). HEAD if the object matters, and a list of
    /// one if a directory of this name does.
    pub async fn open_write(&self, path: &Path, mode: WriteMode) -> Result<FileToWrite> {
        let keys = self.home.keys(path)?;
        let lock = if mode.exclusive {
            // If two clients create the file exclusively, the second must see the first one's
            // upload.
            Some(self.lock(&keys).await)
        } else {
            let name = LockedName::alone(&keys.file);
            self.transfers.locks.wait_for_earlier(&name).await;
            None
        };
        if self.overlay.is_made(&keys.directory) {
            return Err(IS_DIRECTORY);
        }
        if !mode.truncate {
            self.check_closed(&keys)?;
        }
        let base = self.find_base(&keys, mode).await?;
        let entry = UploadEntry::new(self.overlay.clone(), &keys.file, self.session);
        Ok(FileToWrite {
            key: keys.file,
            base,
            entry,
            _lock: lock,
        })
    }

    async fn find_base(&self, keys: &ObjectKeys, mode: WriteMode) -> Result<Base> {
        if !mode.create {
            let object = self.lookup(keys).await?.into_object()?;
            return Ok(if mode.truncate {
                Base::NotNeeded
            } else {
                Base::Is(object)
            });
        }
        if mode.exclusive {
            self.must_be_unused(keys).await?;
            return Ok(Base::Missing);
        }
        if mode.truncate {
            return Ok(Base::NotNeeded);
        }
        match self.find_object(&keys.file).await? {
            Some(object) => Ok(Base::Is(object)),
            None => Ok(Base::Missing),
        }
    }

    /// Fails if a file, a directory or an upload has this name: HEAD, then a list of one.
    async fn must_be_unused(&self, keys: &ObjectKeys) -> Result<()> {
        if self.overlay.has_upload(&keys.file) || self.find_object(&keys.file).await?.is_some() {
            return Err(EXISTS);
        }
        match self.lookup_without_object(keys).await {
            Ok(Found::Nothing) => Ok(()),
            Ok(Found::Pending(_) | Found::File(_) | Found::Directory) => Err(EXISTS),
            // Credentials that can only put can still make new files.
            Err(VfsError::Store(StoreError::Forbidden(_))) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
