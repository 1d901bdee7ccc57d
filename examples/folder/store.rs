//! The store: objects are files below a directory, and uploads in progress are directories below
//! [`UPLOADS`] in it.
//!
//! A file appears by a rename of a temporary one that is on the disk already, so readers see the old
//! or the new one, also after a loss of power. No path leads out of the directory, neither by `..`
//! nor by a link: cap-std asks the kernel for that (`openat2` with `RESOLVE_BENEATH`).
//!
//! As in S3, a directory exists as long as something is in it, or as the object `directory/` that
//! stands for an empty one. A file and a directory can't have the same name.

use async_trait::async_trait;
use bytes::Bytes;
use cap_std::ambient_authority;
use cap_std::fs::{Dir, File, Metadata, MetadataExt};
use sftpd::store::{
    Attributes, Condition, Entry, IncompleteUpload, KeptConditions, Key, Limits, ListRequest,
    Object, Page, Part, Result, SignsOfLife, Store, StoreError,
};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write};
use std::ops::{Bound, Range};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// Uploads in progress lie here; nothing else may.
const UPLOADS: &str = ".sftpd-uploads";
/// In the directory of an upload: the key of the object to be.
const KEY: &str = "key";
/// ETag of the object that stands for a directory.
const DIRECTORY_ETAG: &str = "\"directory\"";

/// See the module. A clone is the same store.
#[derive(Clone)]
pub struct FolderStore(Arc<Folder>);

struct Folder {
    root: Dir,
    /// Held while a condition is checked and the change is made. Other programs don't know it.
    changes: Mutex<()>,
}

impl FolderStore {
    /// Opens a directory, which is made if it does not exist.
    pub fn open(directory: &Path) -> io::Result<FolderStore> {
        Dir::create_ambient_dir_all(directory, ambient_authority())?;
        let root = Dir::open_ambient_dir(directory, ambient_authority())?;
        root.create_dir_all(UPLOADS)?;
        // Of a server that died: no other one may use the directory.
        for entry in root.read_dir(UPLOADS)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                entry.remove_file()?;
            }
        }
        Ok(FolderStore(Arc::new(Folder {
            root,
            changes: Mutex::new(()),
        })))
    }

    /// Runs work that waits for the disk on a thread that may wait.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Folder) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let folder = self.0.clone();
        match tokio::task::spawn_blocking(move || work(&folder)).await {
            Ok(done) => done,
            Err(panicked) => Err(StoreError::Other(panicked.to_string())),
        }
    }
}

/// The path of a key, below the root. `None` for keys that no file can have.
fn path_of(key: &str) -> Option<&str> {
    let path = key.strip_suffix('/').unwrap_or(key);
    for name in path.split('/') {
        if matches!(name, "" | "." | ".." | UPLOADS) || name.contains('\0') {
            return None;
        }
    }
    Some(path)
}

fn find_path(key: &Key) -> Result<&str> {
    let why = || StoreError::Other(format!("no file can be named {:?}", key.as_str()));
    path_of(key.as_str()).ok_or_else(why)
}

fn is_directory_key(key: &Key) -> bool {
    key.as_str().ends_with('/')
}

fn failed(error: io::Error) -> StoreError {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => StoreError::NotFound,
        // Also of a path that leads out of the root.
        ErrorKind::PermissionDenied => StoreError::Forbidden(error.to_string()),
        _ => StoreError::Other(error.to_string()),
    }
}

/// As [`failed`], of the parts of an upload.
fn failed_upload(error: io::Error) -> StoreError {
    match error.kind() {
        ErrorKind::NotFound => StoreError::Other("there is no such upload or part".to_owned()),
        _ => failed(error),
    }
}

/// A file that was replaced has another inode, and an inode that is used again another time.
fn etag_of(found: &Metadata) -> String {
    let (seconds, nanoseconds) = (found.mtime(), found.mtime_nsec());
    format!("\"{:x}-{seconds:x}-{nanoseconds:x}\"", found.ino())
}

fn describe(found: &Metadata) -> Object {
    let modified = match found.modified() {
        Ok(time) => time.into_std(),
        Err(_unsupported) => SystemTime::UNIX_EPOCH,
    };
    match found.is_dir() {
        true => Object::new(0, DIRECTORY_ETAG, modified),
        false => Object::new(found.len(), etag_of(found), modified),
    }
}

impl Folder {
    fn head(&self, key: &Key) -> Result<Object> {
        let Some(path) = path_of(key.as_str()) else {
            return Err(StoreError::NotFound);
        };
        let found = self.root.metadata(path).map_err(failed)?;
        match found.is_dir() == is_directory_key(key) {
            true => Ok(describe(&found)),
            false => Err(StoreError::NotFound),
        }
    }

    fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Bytes> {
        let file = self.root.open(find_path(key)?).map_err(failed)?;
        // Of the open file: it stays the same even if another one is renamed over it now.
        if etag_of(&file.metadata().map_err(failed)?) != etag {
            return Err(StoreError::Precondition);
        }
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.into_std()
            .read_exact_at(&mut bytes, range.start)
            .map_err(failed)?;
        Ok(bytes.into())
    }

    /// A new file among the uploads, and its path.
    fn create_temporary(&self) -> Result<(File, String)> {
        let path = format!("{UPLOADS}/{:032x}", rand::random::<u128>());
        let file = self.root.create(&path).map_err(failed)?;
        Ok((file, path))
    }

    /// Makes a temporary file the object, if the condition holds. Otherwise the file is removed.
    fn publish(
        &self,
        file: File,
        temporary: &str,
        key: &Key,
        condition: &Condition,
    ) -> Result<Object> {
        let published = self.try_publish(file, temporary, key, condition);
        if published.is_err() {
            let _ = self.root.remove_file(temporary);
        }
        published
    }

    fn try_publish(
        &self,
        file: File,
        temporary: &str,
        key: &Key,
        condition: &Condition,
    ) -> Result<Object> {
        let path = find_path(key)?;
        file.sync_all().map_err(failed)?;
        let object = describe(&file.metadata().map_err(failed)?);
        let _changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        self.check(key, condition)?;
        self.make_parent(path)?;
        self.root
            .rename(temporary, &self.root, path)
            .map_err(failed)?;
        self.sync_parent(path)?;
        Ok(object)
    }

    fn check(&self, key: &Key, condition: &Condition) -> Result<()> {
        let found = match self.head(key) {
            Ok(object) => Some(object),
            Err(StoreError::NotFound) => None,
            Err(error) => return Err(error),
        };
        match (condition, found) {
            (Condition::None, _) | (Condition::Absent, None) => Ok(()),
            (Condition::Unchanged(etag), Some(object)) if object.etag == *etag => Ok(()),
            (Condition::Absent, Some(_)) | (Condition::Unchanged(_), _) => {
                Err(StoreError::Precondition)
            }
        }
    }

    fn make_parent(&self, path: &str) -> Result<()> {
        match path.rsplit_once('/') {
            Some((parent, _)) => self.root.create_dir_all(parent).map_err(failed),
            None => Ok(()),
        }
    }

    /// A rename is on the disk once its directory is.
    fn sync_parent(&self, path: &str) -> Result<()> {
        let directory = match path.rsplit_once('/') {
            Some((parent, _)) => parent,
            None => ".",
        };
        let directory = self.root.open(directory).map_err(failed)?;
        directory.sync_all().map_err(failed)
    }

    /// Removes the directories in which nothing is left.
    fn remove_empty_parents(&self, path: &str) {
        let mut rest = path;
        while let Some((parent, _)) = rest.rsplit_once('/') {
            if self.root.remove_dir(parent).is_err() {
                return;
            }
            rest = parent;
        }
    }

    /// The object that stands for a directory.
    fn put_directory(&self, key: &Key, body: &[u8], condition: &Condition) -> Result<Object> {
        if !body.is_empty() {
            let why = "a directory has no content";
            return Err(StoreError::Other(why.to_owned()));
        }
        let _changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        self.check(key, condition)?;
        self.root.create_dir_all(find_path(key)?).map_err(failed)?;
        self.head(key)
    }

    fn delete(&self, key: &Key, condition: &Condition) -> Result<()> {
        let _changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        if *condition != Condition::None {
            self.head(key)?;
            self.check(key, condition)?;
        }
        let path = find_path(key)?;
        let removed = match is_directory_key(key) {
            true => self.root.remove_dir(path),
            false => self.root.remove_file(path),
        };
        match removed {
            Ok(()) => self.remove_empty_parents(path),
            Err(error) if failed_as_missing(&error) => {}
            Err(error) => return Err(failed(error)),
        }
        Ok(())
    }

    fn rename(
        &self,
        from: &Key,
        version: &Object,
        to: &Key,
        condition: &Condition,
    ) -> Result<Object> {
        let (source, target) = (find_path(from)?, find_path(to)?);
        let _changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let object = self.head(from)?;
        if object.etag != version.etag {
            return Err(StoreError::Precondition);
        }
        self.check(to, condition)?;
        self.make_parent(target)?;
        match is_directory_key(from) {
            // The one that stands for an empty directory: what was in it is moved by itself.
            true => {
                self.root.create_dir_all(target).map_err(failed)?;
                self.root.remove_dir(source).map_err(failed)?;
            }
            false => self
                .root
                .rename(source, &self.root, target)
                .map_err(failed)?,
        }
        self.sync_parent(target)?;
        self.remove_empty_parents(source);
        Ok(object)
    }

    /// Walks the whole directory for each page: a store for many files would keep an index.
    fn list(
        &self,
        prefix: &str,
        folded: bool,
        after: Option<String>,
        limit: usize,
    ) -> Result<Page> {
        let directory = match prefix.rsplit_once('/') {
            Some((directory, _)) => directory,
            None => "",
        };
        let mut found = BTreeMap::new();
        self.collect(directory, prefix, folded, &mut found)?;
        let start = match after {
            Some(after) => Bound::Excluded(after),
            None => Bound::Unbounded,
        };
        let mut page = Page::default();
        let mut last = None;
        for (key, entry) in found.range((start, Bound::Unbounded)) {
            if page.entries.len() == limit {
                page.next = last;
                break;
            }
            page.entries.push(entry.clone());
            last = Some(key.clone());
        }
        Ok(page)
    }

    /// Adds what is in a directory and has this prefix.
    fn collect(
        &self,
        directory: &str,
        prefix: &str,
        folded: bool,
        found: &mut BTreeMap<String, Entry>,
    ) -> Result<()> {
        let listed = match directory {
            "" => self.root.entries(),
            directory => self.root.read_dir(directory),
        };
        let listed = match listed {
            Err(error) if failed_as_missing(&error) => return Ok(()),
            listed => listed.map_err(failed)?,
        };
        let mut is_empty = true;
        for entry in listed {
            is_empty = false;
            // Names that are no text have no key.
            let Ok(name) = entry.map_err(failed)?.file_name().into_string() else {
                continue;
            };
            let path = match directory {
                "" => name,
                directory => format!("{directory}/{name}"),
            };
            // Neither what is gone meanwhile, nor links that lead out.
            let (Some(_), Ok(metadata)) = (path_of(&path), self.root.metadata(&path)) else {
                continue;
            };
            if metadata.is_dir() {
                let key = format!("{path}/");
                if folded && key.len() > prefix.len() && key.starts_with(prefix) {
                    found.insert(key.clone(), Entry::Prefix(key));
                } else if key.starts_with(prefix) || prefix.starts_with(&key) {
                    self.collect(&path, prefix, folded, found)?;
                }
            } else if path.starts_with(prefix) {
                found.insert(path.clone(), Entry::Object(path, describe(&metadata)));
            }
        }
        let own_key = format!("{directory}/");
        if is_empty && !directory.is_empty() && own_key.starts_with(prefix) {
            let stands_for = Object::new(0, DIRECTORY_ETAG, SystemTime::UNIX_EPOCH);
            found.insert(own_key.clone(), Entry::Object(own_key, stands_for));
        }
        Ok(())
    }

    fn create_upload(&self, key: &Key) -> Result<String> {
        find_path(key)?;
        let id = format!("{:032x}", rand::random::<u128>());
        let directory = format!("{UPLOADS}/{id}");
        self.root.create_dir(&directory).map_err(failed)?;
        let file = format!("{directory}/{KEY}");
        self.root.write(file, key.as_str()).map_err(failed)?;
        Ok(id)
    }

    fn upload_part(&self, id: &str, number: u32, body: &[u8]) -> Result<Part> {
        let (mut file, temporary) = self.create_temporary()?;
        let arrived = file
            .write_all(body)
            .and_then(|()| file.sync_all())
            .and_then(|()| {
                let part = part_path(id, number)?;
                self.root.rename(&temporary, &self.root, part)
            })
            .and_then(|()| file.metadata());
        match arrived {
            Ok(metadata) => Ok(Part::new(number, metadata.len(), etag_of(&metadata))),
            Err(error) => {
                let _ = self.root.remove_file(&temporary);
                Err(failed_upload(error))
            }
        }
    }

    fn complete(
        &self,
        key: &Key,
        id: &str,
        parts: &[Part],
        condition: &Condition,
        signs: &SignsOfLife,
    ) -> Result<Object> {
        let (file, temporary) = self.create_temporary()?;
        let joined = self.join_parts(&file, id, parts, signs);
        if let Err(error) = joined {
            let _ = self.root.remove_file(&temporary);
            return Err(error);
        }
        let object = self.publish(file, &temporary, key, condition)?;
        // The object is there: what stays of the upload would only take room.
        let _ = self.abort(id);
        Ok(object)
    }

    fn join_parts(
        &self,
        mut file: &File,
        id: &str,
        parts: &[Part],
        signs: &SignsOfLife,
    ) -> Result<()> {
        for part in parts {
            let path = part_path(id, part.number).map_err(failed_upload)?;
            let mut sent = self.root.open(path).map_err(failed_upload)?;
            if etag_of(&sent.metadata().map_err(failed)?) != part.etag {
                return Err(StoreError::Other(format!(
                    "part {} is another",
                    part.number
                )));
            }
            io::copy(&mut sent, &mut file).map_err(failed)?;
            signs.give();
        }
        Ok(())
    }

    fn abort(&self, id: &str) -> Result<()> {
        let directory = upload_path(id).map_err(failed_upload)?;
        match self.root.remove_dir_all(directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(failed),
        }
    }

    fn incomplete_uploads(
        &self,
        prefix: &str,
        before: SystemTime,
    ) -> Result<Vec<IncompleteUpload>> {
        let mut incomplete = Vec::new();
        for entry in self.root.read_dir(UPLOADS).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let (Ok(id), Ok(metadata)) = (entry.file_name().into_string(), entry.metadata()) else {
                continue;
            };
            // A directory changes with each part that arrives.
            let is_old = matches!(metadata.modified(), Ok(time) if time.into_std() < before);
            let Ok(text) = self.root.read_to_string(format!("{UPLOADS}/{id}/{KEY}")) else {
                continue;
            };
            let (true, true, Some(key)) = (is_old, text.starts_with(prefix), Key::new(text)) else {
                continue;
            };
            let parts = self.list_parts(&id)?;
            incomplete.push(IncompleteUpload::new(key, id, parts));
        }
        Ok(incomplete)
    }

    fn list_parts(&self, id: &str) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        for entry in self
            .root
            .read_dir(format!("{UPLOADS}/{id}"))
            .map_err(failed)?
        {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().into_string().unwrap_or_default();
            if let Ok(number) = name.parse() {
                let metadata = entry.metadata().map_err(failed)?;
                parts.push(Part::new(number, metadata.len(), etag_of(&metadata)));
            }
        }
        parts.sort_by_key(|part| part.number);
        Ok(parts)
    }
}

fn failed_as_missing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn upload_path(id: &str) -> io::Result<String> {
    // It was made here, and comes back from the server: all the same it is no path.
    match id.bytes().all(|byte| byte.is_ascii_hexdigit()) && !id.is_empty() {
        true => Ok(format!("{UPLOADS}/{id}")),
        false => Err(ErrorKind::NotFound.into()),
    }
}

fn part_path(id: &str, number: u32) -> io::Result<String> {
    Ok(format!("{}/{number:05}", upload_path(id)?))
}

#[async_trait]
impl Store for FolderStore {
    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        limits.min_part = 1;
        limits.keeps_attributes = false;
        limits.conditions = KeptConditions::ALL;
        limits
    }

    async fn head(&self, key: &Key) -> Result<Object> {
        let key = key.clone();
        self.run(move |folder| folder.head(&key)).await
    }

    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>> {
        let (key, etag) = (key.clone(), etag.to_owned());
        let bytes = self.run(move |folder| folder.get(&key, range, &etag));
        Ok(vec![bytes.await?])
    }

    async fn list(&self, request: ListRequest<'_>) -> Result<Page> {
        let prefix = request.prefix.to_string();
        let ListRequest {
            folded,
            after,
            limit,
            ..
        } = request;
        self.run(move |folder| folder.list(&prefix, folded, after, limit))
            .await
    }

    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()> {
        let (key, condition) = (key.clone(), condition.clone());
        self.run(move |folder| folder.delete(&key, &condition))
            .await
    }

    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        _attributes: &Attributes,
        condition: &Condition,
    ) -> Result<Object> {
        let (key, condition) = (key.clone(), condition.clone());
        self.run(move |folder| {
            if is_directory_key(&key) {
                return folder.put_directory(&key, &body, &condition);
            }
            let (mut file, temporary) = folder.create_temporary()?;
            if let Err(error) = file.write_all(&body) {
                let _ = folder.root.remove_file(&temporary);
                return Err(failed(error));
            }
            folder.publish(file, &temporary, &key, &condition)
        })
        .await
    }

    async fn create_upload(&self, key: &Key, _attributes: &Attributes) -> Result<String> {
        let key = key.clone();
        self.run(move |folder| folder.create_upload(&key)).await
    }

    async fn upload_part(
        &self,
        _key: &Key,
        upload_id: &str,
        number: u32,
        body: Bytes,
    ) -> Result<Part> {
        let id = upload_id.to_owned();
        self.run(move |folder| folder.upload_part(&id, number, &body))
            .await
    }

    async fn complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Object> {
        let (key, id, condition) = (key.clone(), upload_id.to_owned(), condition.clone());
        let parts = parts.to_vec();
        // Joining large parts takes longer than the server waits for a silent store.
        let signs = SignsOfLife::current();
        self.run(move |folder| folder.complete(&key, &id, &parts, &condition, &signs))
            .await
    }

    async fn abort(&self, _key: &Key, upload_id: &str) -> Result<()> {
        let id = upload_id.to_owned();
        self.run(move |folder| folder.abort(&id)).await
    }

    async fn rename(
        &self,
        from: &Key,
        version: &Object,
        to: &Key,
        condition: &Condition,
    ) -> Result<Object> {
        let (from, version) = (from.clone(), version.clone());
        let (to, condition) = (to.clone(), condition.clone());
        self.run(move |folder| folder.rename(&from, &version, &to, &condition))
            .await
    }

    async fn incomplete_uploads(
        &self,
        prefix: &Key,
        before: SystemTime,
    ) -> Result<Vec<IncompleteUpload>> {
        let prefix = prefix.to_string();
        self.run(move |folder| folder.incomplete_uploads(&prefix, before))
            .await
    }
}
