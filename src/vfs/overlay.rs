//! What only this process knows: directories that S3 does not have, and uploads that are not
//! objects yet.
//!
//! Both have full keys, so users whose homes overlap see the same directories. An upload is shown
//! to its own session only: everyone else sees what was stored last, because that is what their
//! OPEN would start from. It lives in memory: a restart forgets it. Invariants: the lock is held
//! for a bounded number of names, and the bytes that directories take are bounded, for each user
//! and for all together; an upload that something newer at its key has overtaken has no entry.

use super::listing::ListingPages;
use super::{Result, Stat, VfsError};
use crate::path::{Home, Key, ObjectKeys};
use crate::transfer::Progress;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Limit on the directories of one user (one home), in bytes as [`cost`] counts them: 100,000 with
/// keys of 85 bytes.
pub const MAX_USER_BYTES: usize = 32 * 1024 * 1024;
/// Limit on the directories of all users, in bytes.
pub const MAX_BYTES: usize = 64 * 1024 * 1024;
/// Bytes that a user can have even if other users have taken all: about 1,000 directories.
pub const GRANTED_BYTES: usize = 256 * 1024;
/// What a directory takes beside its key, in bytes: its entries in two maps.
const ENTRY_BYTES: usize = 160;

/// See the module.
#[derive(Default)]
pub struct Overlay {
    // A std lock: never held across an await.
    tables: Mutex<Tables>,
    /// How many uploads have lost their entry.
    ended_uploads: AtomicU64,
    /// Notified when that grows.
    upload_ended: Notify,
    /// Pages of directories that are being read.
    pub(super) pages: ListingPages,
}

#[derive(Default)]
struct Tables {
    /// By key, which ends with `/`.
    directories: BTreeMap<String, Directory>,
    uploads: BTreeMap<UploadId, Upload>,
    /// By home.
    owners: HashMap<Arc<str>, Usage>,
    /// What all directories take.
    bytes: usize,
    last_age: u64,
    last_upload: u64,
    last_session: u64,
}

/// Identifies an upload. A file can have several at a time, of which the newest is shown.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct UploadId {
    /// The file's key.
    key: String,
    /// Grows with each upload.
    number: u64,
}

impl UploadId {
    /// The least id of the uploads to this key, or to one after it.
    fn first(key: &str) -> UploadId {
        UploadId {
            key: key.to_owned(),
            number: 0,
        }
    }
}

/// An upload in progress.
struct Upload {
    progress: Arc<Progress>,
    session: SessionId,
}

/// Identifies a session among those that share an overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionId(u64);

#[derive(Clone)]
struct Directory {
    /// mkdir made it, after a look that nothing else had the name. Other directories are kept when
    /// their last entry is removed: a file of the same name may exist, so the store must be asked
    /// first.
    is_made: bool,
    /// An upload below it was stored, so S3 knows it too.
    is_stored: bool,
    /// The home of the user who made or emptied it.
    owner: Arc<str>,
    /// Grows with each directory.
    age: u64,
}

impl Directory {
    /// Whether it may be forgotten to make room.
    fn is_spare(&self) -> bool {
        !self.is_made || self.is_stored
    }
}

/// What the directories of a user take.
#[derive(Default)]
struct Usage {
    bytes: usize,
    /// The directories that may be forgotten, by age.
    spare: BTreeMap<u64, String>,
}

/// What a directory of this key takes, in bytes. The key may be in two maps.
fn cost(key: &str) -> usize {
    2 * key.len() + ENTRY_BYTES
}

/// Some of the names in a directory.
pub struct Names {
    /// Names of directories end with `/`.
    pub entries: BTreeMap<String, Stat>,
    /// Whether no name comes after these.
    pub are_all: bool,
}

impl Overlay {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a directory of the user with this home; `is_made` if by mkdir. Makes room by forgetting
    /// directories that S3 knows, or that no mkdir made.
    pub fn add_directory(&self, home: &Home, directory: &Key, is_made: bool) -> Result<()> {
        let owner = Arc::from(home.as_str());
        self.tables().add(owner, directory.as_str(), is_made)
    }

    /// Forgets a directory, but nothing inside it.
    pub fn remove_directory(&self, directory: &Key) {
        self.tables().forget(directory.as_str());
    }

    /// A session that sees no upload yet.
    pub fn add_session(&self) -> SessionId {
        let mut tables = self.tables();
        tables.last_session += 1;
        SessionId(tables.last_session)
    }

    /// How many uploads have lost their entry.
    pub fn ended_uploads(&self) -> u64 {
        self.ended_uploads.load(Ordering::Acquire)
    }

    /// Resolves to their number once there are more than `seen`.
    pub async fn wait_for_ended_upload(&self, seen: u64) -> u64 {
        let ended = self.upload_ended.notified();
        tokio::pin!(ended);
        ended.as_mut().enable();
        if self.ended_uploads() == seen {
            ended.await;
        }
        self.ended_uploads()
    }

    /// Drops the entries of the uploads to a file that was stored, moved or removed meanwhile. They
    /// go on, and count again once they are closed.
    pub fn supersede_uploads(&self, file: &Key) {
        self.drop_uploads(file.as_str(), |_, _| true);
    }

    /// Drops the entries of a session's uploads to a file.
    pub fn drop_uploads_of(&self, file: &Key, session: SessionId) {
        self.drop_uploads(file.as_str(), |_, upload| upload.session == session);
    }

    fn drop_uploads(&self, key: &str, is_dropped: impl Fn(&UploadId, &Upload) -> bool) {
        let mut tables = self.tables();
        let mut dropped = Vec::new();
        for (id, upload) in tables.uploads_to(key) {
            if is_dropped(id, upload) {
                dropped.push(id.clone());
            }
        }
        for id in &dropped {
            tables.uploads.remove(id);
        }
        drop(tables);
        if !dropped.is_empty() {
            self.ended_uploads.fetch_add(1, Ordering::Release);
            self.upload_ended.notify_waiters();
        }
    }

    /// Notes that a file was stored: S3 knows the directories above it from now on.
    fn note_stored(&self, file: &str) {
        let mut tables = self.tables();
        for (slash, _) in file.match_indices('/') {
            if let Some(key) = file.get(..=slash)
                && let Some(mut directory) = tables.forget(key)
            {
                directory.is_stored = true;
                tables.insert(key.to_owned(), directory);
            }
        }
    }

    /// Moves every directory at or below `from` to `to`. Those for which there is no room are
    /// forgotten.
    pub fn rename_directories(&self, from: &Key, to: &Key) {
        let mut tables = self.tables();
        let mut names = Vec::new();
        for (key, _) in tables.directories.range(from.to_string()..) {
            match key.strip_prefix(from.as_str()) {
                Some(name) => names.push(name.to_owned()),
                None => break,
            }
        }
        for name in names {
            if let Some(directory) = tables.forget(&format!("{from}{name}")) {
                // The rename is done, so this is no failure of it.
                let _ = tables.add(directory.owner, &format!("{to}{name}"), directory.is_made);
            }
        }
    }

    /// Is this a directory that mkdir made?
    pub fn is_made(&self, directory: &Key) -> bool {
        match self.tables().directories.get(directory.as_str()) {
            Some(directory) => directory.is_made,
            None => false,
        }
    }

    /// Is this a directory of the overlay, or is one below it, or an upload?
    pub fn is_directory(&self, directory: &Key) -> bool {
        let tables = self.tables();
        tables.first_below(directory, "").is_some() || tables.has_upload_in(directory)
    }

    /// Does this directory hold another one of the overlay, or an upload?
    pub fn has_entries(&self, directory: &Key) -> bool {
        let tables = self.tables();
        tables.first_below(directory, "\0").is_some() || tables.has_upload_in(directory)
    }

    /// Is an upload to a file in this directory in progress, or in one below it?
    pub fn has_upload_in(&self, directory: &Key) -> bool {
        self.tables().has_upload_in(directory)
    }

    /// The first names directly inside a directory that come after `after`, at most `limit`:
    /// subdirectories, and the session's newest upload of each file.
    pub fn names_after(
        &self,
        directory: &Key,
        after: Option<&str>,
        limit: usize,
        session: SessionId,
    ) -> Names {
        let tables = self.tables();
        let mut names = Names {
            entries: BTreeMap::new(),
            are_all: true,
        };
        let mut from = match after {
            Some(name) => first_key_after(directory, name),
            None => first_key_after(directory, ""),
        };
        while let Some((name, stat)) = tables.first_name(directory, &from, session) {
            if names.entries.len() == limit {
                names.are_all = false;
                break;
            }
            from = first_key_after(directory, &name);
            names.entries.insert(name, stat);
        }
        names
    }

    /// Is any session's upload to this key in progress?
    pub fn has_upload(&self, file: &Key) -> bool {
        self.tables().uploads_to(file.as_str()).next().is_some()
    }

    /// The session's newest upload in progress to this key.
    pub fn upload_of(&self, file: &Key, session: SessionId) -> Option<Arc<Progress>> {
        self.tables().newest_upload(file.as_str(), session)
    }

    /// The uploads of other sessions to this file and, with its `subtree`, to those in a directory
    /// of this name.
    pub fn foreign_uploads(
        &self,
        keys: &ObjectKeys,
        subtree: bool,
        session: SessionId,
    ) -> Vec<Arc<Progress>> {
        let tables = self.tables();
        let to_file = tables.uploads_to(keys.file.as_str());
        let inside = tables.uploads_in(keys.directory.as_str());
        let mut found = Vec::new();
        for (_, upload) in to_file.chain(inside.filter(|_| subtree)) {
            if upload.session != session {
                found.push(upload.progress.clone());
            }
        }
        found
    }
}

/// The entry of one upload in the overlay; dropped, the upload is no longer shown.
pub struct UploadEntry {
    overlay: Arc<Overlay>,
    id: UploadId,
    session: SessionId,
}

impl UploadEntry {
    /// An entry that shows nothing yet.
    pub fn new(overlay: Arc<Overlay>, file: &Key, session: SessionId) -> UploadEntry {
        let mut tables = overlay.tables();
        tables.last_upload += 1;
        let id = UploadId {
            key: file.to_string(),
            number: tables.last_upload,
        };
        drop(tables);
        UploadEntry {
            overlay,
            id,
            session,
        }
    }

    /// Shows the upload.
    pub fn show(&self, progress: Arc<Progress>) {
        let mut tables = self.overlay.tables();
        let session = self.session;
        let upload = Upload { progress, session };
        tables.uploads.insert(self.id.clone(), upload);
    }

    /// Notes that the upload has become an object, which overtakes the older uploads to its key.
    pub fn note_stored(&self) {
        self.overlay.note_stored(&self.id.key);
        let own = self.id.number;
        self.overlay
            .drop_uploads(&self.id.key, |id, _| id.number < own);
    }
}

impl Drop for UploadEntry {
    fn drop(&mut self) {
        let own = self.id.number;
        self.overlay
            .drop_uploads(&self.id.key, |id, _| id.number == own);
    }
}

/// The least key in a directory whose name comes after this one.
fn first_key_after(directory: &Key, name: &str) -> String {
    match name.strip_suffix('/') {
        // `0` follows `/`: the least string after every key in that directory.
        Some(inner) => format!("{directory}{inner}0"),
        None => format!("{directory}{name}\0"),
    }
}

/// The first component of a path below a directory: with `/` at its end if more follows.
fn entry_name(rest: &str) -> &str {
    match rest.split_inclusive('/').next() {
        Some(name) => name,
        None => rest,
    }
}

impl Tables {
    fn add(&mut self, owner: Arc<str>, key: &str, is_made: bool) -> Result<()> {
        if let Some(mut directory) = self.forget(key) {
            directory.is_made |= is_made;
            // S3 may have lost what it had below it.
            directory.is_stored = false;
            self.insert(key.to_owned(), directory);
            return Ok(());
        }
        self.make_room(&owner, cost(key))?;
        self.last_age += 1;
        let directory = Directory {
            is_made,
            is_stored: false,
            owner,
            age: self.last_age,
        };
        self.insert(key.to_owned(), directory);
        Ok(())
    }

    /// Forgets spare directories, the oldest first, until `more` bytes fit: the user's own, or else
    /// those of the user whose directories take most.
    fn make_room(&mut self, owner: &Arc<str>, more: usize) -> Result<()> {
        loop {
            let own = match self.owners.get(owner) {
                Some(usage) => usage.bytes + more,
                None => more,
            };
            let exceeds_own_limit = own > MAX_USER_BYTES;
            let exceeds_common_limit = own > GRANTED_BYTES && self.bytes + more > MAX_BYTES;
            if !exceeds_own_limit && !exceeds_common_limit {
                return Ok(());
            }
            let mut victim = self.oldest_spare_of(owner);
            if victim.is_none() && !exceeds_own_limit {
                victim = self.oldest_spare();
            }
            let Some(key) = victim else {
                return Err(VfsError::Refused(
                    "too many empty directories: they live in the server's memory",
                ));
            };
            self.forget(&key);
        }
    }

    fn oldest_spare_of(&self, owner: &Arc<str>) -> Option<String> {
        let (_, key) = self.owners.get(owner)?.spare.first_key_value()?;
        Some(key.clone())
    }

    /// The oldest spare directory of the user whose directories take most, among those who have
    /// any.
    fn oldest_spare(&self) -> Option<String> {
        let mut largest: Option<&Usage> = None;
        for usage in self.owners.values() {
            let bytes = largest.map_or(0, |largest| largest.bytes);
            if !usage.spare.is_empty() && usage.bytes >= bytes {
                largest = Some(usage);
            }
        }
        let (_, key) = largest?.spare.first_key_value()?;
        Some(key.clone())
    }

    /// Adds a directory that is not there, and counts it.
    fn insert(&mut self, key: String, directory: Directory) {
        self.bytes += cost(&key);
        let usage = self.owners.entry(directory.owner.clone()).or_default();
        usage.bytes += cost(&key);
        if directory.is_spare() {
            usage.spare.insert(directory.age, key.clone());
        }
        self.directories.insert(key, directory);
    }

    fn forget(&mut self, key: &str) -> Option<Directory> {
        let directory = self.directories.remove(key)?;
        self.bytes = self.bytes.saturating_sub(cost(key));
        if let Some(usage) = self.owners.get_mut(&directory.owner) {
            usage.bytes = usage.bytes.saturating_sub(cost(key));
            usage.spare.remove(&directory.age);
            if usage.bytes == 0 {
                self.owners.remove(&directory.owner);
            }
        }
        Some(directory)
    }

    /// The first directory at or below this one whose path relative to it is at least `from`.
    fn first_below(&self, directory: &Key, from: &str) -> Option<&str> {
        let (key, _) = self
            .directories
            .range(format!("{directory}{from}")..)
            .next()?;
        key.strip_prefix(directory.as_str())
    }

    fn has_upload_in(&self, directory: &Key) -> bool {
        self.uploads_in(directory.as_str()).next().is_some()
    }

    /// The uploads to this key, the oldest first.
    fn uploads_to(&self, key: &str) -> impl DoubleEndedIterator<Item = (&UploadId, &Upload)> {
        let last = UploadId {
            key: key.to_owned(),
            number: u64::MAX,
        };
        self.uploads.range(UploadId::first(key)..=last)
    }

    /// The uploads to keys with this prefix.
    fn uploads_in(&self, prefix: &str) -> impl Iterator<Item = (&UploadId, &Upload)> {
        let from = self.uploads.range(UploadId::first(prefix)..);
        from.take_while(move |(id, _)| id.key.starts_with(prefix))
    }

    /// The first name directly inside a directory among keys from this one on.
    fn first_name(
        &self,
        directory: &Key,
        from: &str,
        session: SessionId,
    ) -> Option<(String, Stat)> {
        let mut name: Option<&str> = None;
        let first_directory = self.directories.range(from.to_owned()..).next();
        if let Some((key, _)) = first_directory
            && let Some(rest) = key.strip_prefix(directory.as_str())
        {
            name = Some(entry_name(rest));
        }
        if let Some(other) = self.first_upload_name(directory, from, session) {
            name = Some(name.map_or(other, |name| name.min(other)));
        }
        let name = name?;
        let stat = match self.newest_upload(&format!("{directory}{name}"), session) {
            Some(progress) if !name.ends_with('/') => Stat::from(&progress),
            Some(_) | None => Stat::Directory,
        };
        Some((name.to_owned(), stat))
    }

    /// The first name that uploads have directly inside a directory, among keys from this one on:
    /// a file of the session, or a directory, which every session sees.
    fn first_upload_name(&self, directory: &Key, from: &str, session: SessionId) -> Option<&str> {
        for (id, upload) in self.uploads.range(UploadId::first(from)..) {
            let name = entry_name(id.key.strip_prefix(directory.as_str())?);
            if name.ends_with('/') || upload.session == session {
                return Some(name);
            }
        }
        None
    }

    fn newest_upload(&self, file: &str, session: SessionId) -> Option<Arc<Progress>> {
        let mut newest_first = self.uploads_to(file).rev();
        let (_, newest) = newest_first.find(|(_, upload)| upload.session == session)?;
        Some(newest.progress.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home(name: &str) -> Home {
        Home::new("", name).unwrap()
    }

    fn key(text: &str) -> Key {
        Key::new(text.to_owned()).unwrap()
    }

    /// A key of more than 500 bytes, so that a limit is reached soon.
    fn long(user: &str, n: usize) -> Key {
        key(&format!("{user}/{}{n:06}/", "x".repeat(500)))
    }

    fn fill(overlay: &Overlay, user: &str, made: bool) -> usize {
        (0..200_000)
            .take_while(|n| {
                overlay
                    .add_directory(&home(user), &long(user, *n), made)
                    .is_ok()
            })
            .count()
    }

    #[test]
    fn one_user_is_bounded_and_leaves_room_for_the_others() {
        let overlay = Overlay::default();
        let each = fill(&overlay, "alice", true);
        assert_eq!(each, MAX_USER_BYTES / cost(long("alice", 0).as_str()));
        for user in ["bobby", "carol"] {
            fill(&overlay, user, true);
        }
        assert!(overlay.tables().bytes <= MAX_BYTES + GRANTED_BYTES);
        let granted = fill(&overlay, "david", true);
        assert_eq!(granted, GRANTED_BYTES / cost(long("david", 0).as_str()));
        for n in 0..1000 {
            overlay.remove_directory(&long("alice", n));
        }
        assert!(
            overlay
                .add_directory(&home("alice"), &long("alice", 7), true)
                .is_ok()
        );
        for user in ["alice", "bobby", "carol", "david"] {
            for n in 0..each {
                overlay.remove_directory(&long(user, n));
            }
        }
        let tables = overlay.tables();
        assert!(tables.bytes == 0 && tables.owners.is_empty());
    }

    #[test]
    fn spare_directories_make_room_oldest_first() {
        let overlay = Overlay::default();
        let alice = home("alice");
        overlay
            .add_directory(&alice, &long("alice", 999_999), false)
            .unwrap();
        let most = fill(&overlay, "alice", true);
        assert!(
            !overlay.is_directory(&long("alice", 999_999)),
            "no mkdir made it: it is forgotten first"
        );
        for n in 0..most {
            overlay.note_stored(&format!("{}f", long("alice", n)));
        }
        assert!(overlay.is_made(&long("alice", 0)));
        // The last file in it was removed: S3 no longer knows it.
        overlay
            .add_directory(&alice, &long("alice", 0), false)
            .unwrap();
        for n in most..2 * most - 1 {
            overlay
                .add_directory(&alice, &long("alice", n), true)
                .unwrap();
        }
        assert!(
            overlay.is_made(&long("alice", 0)) && !overlay.is_directory(&long("alice", most - 1))
        );
        assert!(
            overlay
                .add_directory(&alice, &long("alice", 2 * most), true)
                .is_err()
        );
    }

    #[test]
    fn names_come_in_order_and_once() {
        let overlay = Overlay::default();
        for text in ["a/d/", "a/d/x/", "a/d/y/", "a/d-e/", "a/d0/z/", "b/", "a/"] {
            overlay.add_directory(&home("a"), &key(text), true).unwrap();
        }
        let session = overlay.add_session();
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let names = overlay.names_after(&key("a/"), after.as_deref(), 1, session);
            after = names.entries.keys().next().cloned();
            found.extend(after.clone());
            if names.are_all {
                break;
            }
        }
        assert_eq!(found, ["d-e/", "d/", "d0/"]);
        overlay.rename_directories(&key("a/d/"), &key("a/q/"));
        let names = overlay.names_after(&key("a/"), None, 10, session);
        assert!(names.are_all && names.entries.keys().eq(["d-e/", "d0/", "q/"]));
    }
}
