//! What a user sees: a file system made of keys, of directories that S3 lacks, and of uploads in progress.
//!
//! Called by `sftp`, one [`Tree`] a session. Every rule of the README's request table that is not about
//! bytes lives here; each function says which S3 requests it sends.

mod listing;
mod local;
mod path;
mod rename;

pub use listing::{Item, Listing};
pub use local::Local;
pub use path::{Home, Path};

use crate::download::{self, Answers, Download};
use crate::store::*;
use crate::upload::{self, Context, Target, Upload};
use local::Origin;
use std::sync::Arc;
use std::time::SystemTime;

/// Why a request on the tree fails.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TreeError {
    /// Nothing has this name.
    #[error("no such file or directory")]
    NotFound,
    /// A file was wanted.
    #[error("is a directory")]
    IsDirectory,
    /// The name is taken.
    #[error("already exists")]
    Exists,
    /// rmdir never deletes files.
    #[error("the directory is not empty")]
    NotEmpty,
    /// An upload to it, or inside it, is in progress.
    #[error("an upload to it is in progress")]
    Busy,
    /// A path that no key can stand for.
    #[error("{0}")]
    BadPath(&'static str),
    /// Against the rules, with the reason.
    #[error("{0}")]
    Refused(&'static str),
    /// S3 can't do that.
    #[error("{0}")]
    Unsupported(&'static str),
    /// See [`StoreError`].
    #[error(transparent)]
    Store(#[from] StoreError),
}

type Result<T> = std::result::Result<T, TreeError>;

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
        Stat::File { size: object.size, modified: object.modified }
    }
}

impl From<&Arc<upload::Progress>> for Stat {
    fn from(progress: &Arc<upload::Progress>) -> Stat {
        Stat::File { size: progress.size(), modified: progress.started }
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
pub struct Tree {
    context: Arc<Context>,
    local: Arc<Local>,
    home: Home,
}

impl Tree {
    /// `local` is shared by all trees of a server.
    pub fn new(context: Arc<Context>, local: Arc<Local>, home: Home) -> Tree {
        Tree { context, local, home }
    }

    fn store(&self) -> &dyn Store {
        self.context.store.as_ref()
    }

    /// Waits for uploads to this key, or below this prefix, that are being closed, in whatever session. What is asked
    /// after a CLOSE must see its outcome, even if nobody waited for the reply (sshfs doesn't).
    async fn settle(&self, key: &Key) {
        while let Some(upload) = self.local.closing(key) {
            upload.ended().await;
        }
    }

    /// Nothing if known here, else HEAD, else a list of one.
    pub async fn stat(&self, path: &Path) -> Result<Stat> {
        if path.is_root() {
            return Ok(Stat::Directory);
        }
        let key = self.home.file(path)?;
        if let Some(progress) = self.local.upload(&key) {
            return Ok(Stat::from(&progress));
        }
        if self.local.directory(&self.home.directory(path)?) == Some(Origin::Made) {
            return Ok(Stat::Directory);
        }
        match self.object(&key).await {
            Ok(object) => Ok(Stat::from(&object)),
            Err(TreeError::NotFound) if self.is_directory(path).await? => Ok(Stat::Directory),
            Err(error) => Err(error),
        }
    }

    /// HEAD; where that is refused, as to write-only credentials, a list of one.
    async fn object(&self, key: &Key) -> Result<Object> {
        match self.store().head(key).await {
            Ok(object) => Ok(object),
            Err(StoreError::NotFound) => Err(TreeError::NotFound),
            Err(StoreError::Forbidden(_)) => {
                let page = self.list_some(key, false, 1).await?;
                match page.entries.into_iter().next() {
                    Some(Entry::Object(found, object)) if found == key.as_str() => Ok(object),
                    _ => Err(TreeError::NotFound),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Known here, or a list of one.
    async fn is_directory(&self, path: &Path) -> Result<bool> {
        let prefix = self.home.directory(path)?;
        if path.is_root() || self.local.directory(&prefix).is_some() {
            return Ok(true);
        }
        Ok(!self.list_some(&prefix, false, 1).await?.entries.is_empty())
    }

    async fn list_some(&self, prefix: &Key, folded: bool, limit: usize) -> Result<Page> {
        Ok(self.store().list(ListRequest { prefix, folded, after: None, limit }).await?)
    }

    /// One list request; more as the listing is read.
    pub async fn open_directory(&self, path: &Path) -> Result<Listing> {
        let prefix = self.home.directory(path)?;
        let exists = path.is_root() || self.local.directory(&prefix).is_some();
        let entries = self.local.entries(&prefix);
        let listing = Listing::open(self.context.store.clone(), prefix, entries).await?;
        if listing.is_void() && !exists { Err(TreeError::NotFound) } else { Ok(listing) }
    }

    /// One list request, to see that the name is free. The directory itself is kept in RAM.
    pub async fn make_directory(&self, path: &Path) -> Result<()> {
        let prefix = self.home.directory(path)?;
        let Ok(key) = self.home.file(path) else { return Err(TreeError::Exists) };
        if self.local.upload(&key).is_some() || self.local.directory(&prefix).is_some() {
            return Err(TreeError::Exists);
        }
        match self.list_some(&key, true, MAX_PAGE).await {
            Ok(page) => {
                let taken = page.entries.iter().any(|entry| match entry {
                    Entry::Object(found, _) => found == key.as_str(),
                    Entry::Prefix(found) => found == prefix.as_str(),
                });
                // A thousand names begin like this one: ask for it alone.
                if taken || (page.next.is_some() && self.is_directory(path).await?) {
                    return Err(TreeError::Exists);
                }
            }
            // Credentials that can only put can still make directories to put into.
            Err(TreeError::Store(StoreError::Forbidden(_))) => {}
            Err(error) => return Err(error),
        }
        if self.local.add_directory(&prefix, Origin::Made) {
            Ok(())
        } else {
            Err(TreeError::Refused("too many empty directories: they live in the server's memory"))
        }
    }

    /// One list request, and a DELETE if there is a `dir/` marker.
    pub async fn remove_directory(&self, path: &Path) -> Result<()> {
        if path.is_root() {
            return Err(TreeError::Refused("the home directory can't be removed"));
        }
        let prefix = self.home.directory(path)?;
        if self.local.has_entries(&prefix) {
            return Err(TreeError::NotEmpty);
        }
        let page = self.list_some(&prefix, false, 2).await?;
        let is_marker = |entry: &Entry| matches!(entry, Entry::Object(key, _) if key == prefix.as_str());
        if !page.entries.iter().all(is_marker) {
            return Err(TreeError::NotEmpty);
        }
        if !page.entries.is_empty() {
            self.store().delete(&prefix).await?;
        }
        if !self.local.remove_directory(&prefix) && page.entries.is_empty() {
            return Err(TreeError::NotFound);
        }
        self.keep_parent(path);
        Ok(())
    }

    /// HEAD and DELETE.
    pub async fn remove(&self, path: &Path) -> Result<()> {
        let key = self.home.file(path)?;
        self.settle(&key).await;
        match self.object(&key).await {
            Ok(_) => self.store().delete(&key).await?,
            Err(error) => return Err(self.why_no_file(path, &key, error).await),
        }
        self.keep_parent(path);
        Ok(())
    }

    /// A directory does not vanish with its last entry, though S3 thinks so.
    fn keep_parent(&self, path: &Path) {
        let parent = Path::parse(&format!("{}/..", path.as_str()));
        if let Ok(parent) = parent
            && !parent.is_root()
            && let Ok(prefix) = self.home.directory(&parent)
        {
            self.local.add_directory(&prefix, Origin::LeftOver);
        }
    }

    /// "Not found" in more fitting words.
    async fn why_no_file(&self, path: &Path, key: &Key, error: TreeError) -> TreeError {
        match error {
            TreeError::NotFound if self.local.upload(key).is_some() => TreeError::Busy,
            TreeError::NotFound if self.is_directory(path).await.unwrap_or(false) => TreeError::IsDirectory,
            error => error,
        }
    }

    /// SETSTAT with a size: 0 empties the file (HEAD and PUT), any other must be what it is (as stat).
    pub async fn set_size(&self, path: &Path, size: u64) -> Result<()> {
        let key = self.home.file(path)?;
        self.settle(&key).await;
        match self.stat(path).await? {
            Stat::Directory => Err(TreeError::IsDirectory),
            Stat::File { size: now, .. } if now == size => Ok(()),
            Stat::File { .. } if self.local.upload(&key).is_some() => Err(TreeError::Busy),
            Stat::File { .. } if size == 0 => Ok(self.store().put(&key, bytes::Bytes::new(), Condition::None).await?),
            Stat::File { .. } => Err(TreeError::Unsupported("S3 can't change the size of a stored file")),
        }
    }

    /// One HEAD.
    pub async fn open_read(
        &self,
        path: &Path,
        answers: impl Answers,
        on_end: impl FnOnce(download::Summary) + Send + 'static,
    ) -> Result<Download> {
        let key = self.home.file(path)?;
        self.settle(&key).await;
        match self.object(&key).await {
            Ok(object) => Ok(Download::open(self.context.clone(), key, object, answers, on_end)),
            Err(error) => Err(self.why_no_file(path, &key, error).await),
        }
    }

    /// Nothing for a plain put (create and truncate); HEAD where the old object matters.
    pub async fn open_write(
        &self,
        path: &Path,
        mode: WriteMode,
        on_end: impl FnOnce(upload::Summary) + Send + 'static,
    ) -> Result<Upload> {
        let key = self.home.file(path)?;
        self.settle(&key).await;
        if self.local.directory(&self.home.directory(path)?) == Some(Origin::Made) {
            return Err(TreeError::IsDirectory);
        }
        let asks = mode.exclusive || !mode.truncate || !mode.create;
        let old = match asks {
            true => Some(self.object(&key).await),
            false => None,
        };
        let base = match old {
            Some(Ok(_)) if mode.exclusive => return Err(TreeError::Exists),
            Some(Ok(object)) => Some(object).filter(|_| !mode.truncate),
            Some(Err(TreeError::NotFound)) if mode.exclusive && self.local.upload(&key).is_some() => {
                return Err(TreeError::Exists);
            }
            Some(Err(TreeError::NotFound)) if mode.create => None,
            Some(Err(error)) => return Err(self.why_no_file(path, &key, error).await),
            None => None,
        };
        let condition = if mode.exclusive { Condition::Absent } else { Condition::None };
        let id = self.local.upload_id();
        let (local, shown) = (self.local.clone(), key.clone());
        let on_end = Box::new(move |summary| {
            local.remove_upload(&shown, id);
            on_end(summary);
        });
        let upload = Upload::open(self.context.clone(), Target { key: key.clone(), base, condition, on_end });
        self.local.add_upload(&key, id, upload.progress().clone());
        Ok(upload)
    }
}
