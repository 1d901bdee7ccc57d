//! What this process alone knows: directories that S3 does not have, and uploads that are not objects yet.
//!
//! Both are keyed by full key, so users whose homes overlap see the same. PooledBytes in RAM: a restart forgets it. Invariant: the
//! lock is held for a bounded number of names, and what directories take is bounded in bytes, per user and in all.

use super::listing::ListingPages;
use super::{Result, Stat, VfsError};
use crate::path::{Home, Key};
use crate::transfer::Progress;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the directories of one user (one home) may take, in bytes as [`cost`] counts them: 100,000 with keys of 85 bytes.
pub const MAX_USER_BYTES: usize = 32 * 1024 * 1024;
/// What the directories of all users may take, in bytes.
pub const MAX_BYTES: usize = 64 * 1024 * 1024;
/// What a user may take even if others have taken all: some 1,000 directories.
pub const GRANTED_BYTES: usize = 256 * 1024;
/// What a directory takes beside its key, in bytes: its place in two maps.
const ENTRY_BYTES: usize = 160;
/// The number of every directory's slot.
pub const DIRECTORY: u64 = 0;

/// A full key, and a number that tells uploads to it apart. Directories end with `/` and have the number 0.
pub type Slot = (String, u64);

/// What is in a slot.
pub struct Known {
    /// `None` for directories.
    pub upload: Option<Arc<Progress>>,
}

/// See the module.
#[derive(Default)]
pub struct Overlay {
    // A std lock: never held across an await.
    tables: Mutex<Tables>,
    last_upload: AtomicU64,
    /// Pages of directories that are being read.
    pub(super) pages: ListingPages,
}

#[derive(Default)]
struct Tables {
    directories: BTreeMap<String, Directory>,
    uploads: BTreeMap<Slot, Arc<Progress>>,
    /// By home.
    owners: HashMap<Arc<str>, Usage>,
    /// What all directories take.
    bytes: usize,
    last_age: u64,
}

#[derive(Clone)]
struct Directory {
    /// By mkdir, after a look that nothing else has the name. Others are left over as their last entry went: a file of the
    /// same name may exist, so the store has to be asked first.
    is_made: bool,
    /// An upload below it was stored, so S3 knows it too.
    is_stored: bool,
    /// The home of the user who made or left it.
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
    /// Those that may be forgotten, by age.
    spare: BTreeMap<u64, String>,
}

/// What a directory of this key takes, in bytes. The key may be in two maps.
fn cost(key: &str) -> usize {
    2 * key.len() + ENTRY_BYTES
}

/// Some of the names in a directory.
pub struct Names {
    /// With `/` at the end of directories.
    pub entries: BTreeMap<String, Stat>,
    /// Whether there are no more behind them.
    pub are_all: bool,
}

impl Overlay {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a directory of the user with this home. Others that S3 knows, or that are only left over, make room.
    pub fn add_directory(&self, home: &Home, prefix: &Key, made: bool) -> Result<()> {
        self.tables()
            .add(home.as_str().into(), prefix.as_str(), made)
    }

    /// A file was stored: S3 knows the directories above it from now on.
    pub fn stored(&self, file: &Key) {
        let mut tables = self.tables();
        for (slash, _) in file.as_str().match_indices('/') {
            if let Some(key) = file.as_str().get(..=slash) {
                tables.change(key, |directory| directory.is_stored = true);
            }
        }
    }

    /// Moves every directory at or below `from` to `to`. What finds no room there is forgotten.
    pub fn rename_directories(&self, from: &Key, to: &Key) {
        let mut tables = self.tables();
        let below = tables.directories.range(from.to_string()..);
        let names: Vec<String> = below
            .map_while(|(key, _)| key.strip_prefix(from.as_str()))
            .map(str::to_owned)
            .collect();
        for name in names {
            if let Some(directory) = tables.forget(&format!("{from}{name}")) {
                // There is nobody to tell, and it takes more than most of all names that a user may have.
                let _ = tables.add(directory.owner, &format!("{to}{name}"), directory.is_made);
            }
        }
    }

    /// Is this a directory by mkdir?
    pub fn is_made(&self, prefix: &Key) -> bool {
        self.tables()
            .directories
            .get(prefix.as_str())
            .is_some_and(|directory| directory.is_made)
    }

    /// Is this a directory, as far as is known here? One above a known directory, or above an upload, is one too.
    pub fn is_directory(&self, prefix: &Key) -> bool {
        self.any(prefix, |_, _| true)
    }

    /// Does `test` hold for anything at or below this directory? It is given names relative to it.
    pub fn any(&self, prefix: &Key, test: impl Fn(&str, &Known) -> bool) -> bool {
        let tables = self.tables();
        let directories = tables.directories.range(prefix.to_string()..);
        let mut directories = directories.map_while(|(key, _)| key.strip_prefix(prefix.as_str()));
        let mut uploads = uploads_below(&tables, prefix);
        directories.any(|name| test(name, &Known { upload: None }))
            || uploads.any(|(name, upload)| {
                test(
                    name,
                    &Known {
                        upload: Some(upload.clone()),
                    },
                )
            })
    }

    /// The first names directly inside a directory, behind this one: subdirectories, and the newest upload of each file.
    pub fn names_after(&self, prefix: &Key, after: Option<&str>, limit: usize) -> Names {
        let tables = self.tables();
        let mut names = Names {
            entries: BTreeMap::new(),
            are_all: true,
        };
        let mut from = start_behind(prefix, after);
        while let Some((name, stat)) = tables.first_name(prefix, &from) {
            if names.entries.len() == limit {
                names.are_all = false;
                break;
            }
            from = start_behind(prefix, Some(&name));
            names.entries.insert(name, stat);
        }
        names
    }

    /// A fresh slot for an upload.
    pub fn upload_slot(&self, file: &Key) -> Slot {
        (
            file.to_string(),
            self.last_upload.fetch_add(1, Ordering::Relaxed) + 1,
        )
    }

    /// Shows an upload until its slot is removed.
    pub fn add_upload(&self, slot: Slot, upload: Arc<Progress>) {
        self.tables().uploads.insert(slot, upload);
    }

    /// Forgets a directory, but nothing inside it; or an upload, which is an object now, or nothing.
    pub fn remove(&self, slot: &Slot) {
        let mut tables = self.tables();
        match slot {
            (key, DIRECTORY) => drop(tables.forget(key)),
            upload => drop(tables.uploads.remove(upload)),
        }
    }

    /// The newest upload in progress to this key.
    pub fn upload(&self, file: &Key) -> Option<Arc<Progress>> {
        self.tables().newest_upload(file.as_str()).cloned()
    }
}

/// Uploads to keys that start with `prefix`: the rest of the key, and what is known of it.
fn uploads_below<'a>(
    tables: &'a Tables,
    prefix: &'a Key,
) -> impl Iterator<Item = (&'a str, &'a Arc<Progress>)> {
    let after = tables.uploads.range((prefix.to_string(), 0)..);
    after.map_while(|((key, _), upload)| Some((key.strip_prefix(prefix.as_str())?, upload)))
}

/// The least key whose name in the directory is behind this one.
fn start_behind(prefix: &Key, name: Option<&str>) -> String {
    let name = name.unwrap_or_default();
    match name.strip_suffix('/') {
        // `0` follows `/`: the least string behind every key in that directory.
        Some(directory) => format!("{prefix}{directory}0"),
        None => format!("{prefix}{name}\0"),
    }
}

/// The name of the entry that this key is, or is in: with `/` at the end of a directory.
fn entry_name(rest: &str) -> &str {
    match rest.find('/') {
        Some(slash) => rest.get(..=slash).unwrap_or(rest),
        None => rest,
    }
}

impl Tables {
    fn add(&mut self, owner: Arc<str>, key: &str, made: bool) -> Result<()> {
        if self.directories.contains_key(key) {
            // S3 may have lost what it had below it.
            self.change(key, |directory| {
                directory.is_made |= made;
                directory.is_stored = false;
            });
            return Ok(());
        }
        self.make_room(&owner, cost(key))?;
        self.last_age += 1;
        let directory = Directory {
            is_made: made,
            is_stored: false,
            owner,
            age: self.last_age,
        };
        self.insert(key.to_owned(), directory);
        Ok(())
    }

    /// Forgets spare directories, the oldest first, until this much more fits: the user's own, or those of the user who
    /// takes most.
    fn make_room(&mut self, owner: &Arc<str>, more: usize) -> Result<()> {
        loop {
            let own = self.owners.get(owner).map_or(0, |usage| usage.bytes) + more;
            let victim = if own > MAX_USER_BYTES {
                self.oldest_spare_of(owner)
            } else if own > GRANTED_BYTES && self.bytes + more > MAX_BYTES {
                self.oldest_spare_of(owner).or_else(|| self.oldest_spare())
            } else {
                return Ok(());
            };
            match victim {
                Some(key) => drop(self.forget(&key)),
                None => {
                    return Err(VfsError::Refused(
                        "too many empty directories: they live in the server's memory",
                    ));
                }
            }
        }
    }

    fn oldest_spare_of(&self, owner: &Arc<str>) -> Option<String> {
        let (_, key) = self.owners.get(owner)?.spare.first_key_value()?;
        Some(key.clone())
    }

    /// Of the user who takes most, among those who have any.
    fn oldest_spare(&self) -> Option<String> {
        let owners = self.owners.values().filter(|usage| !usage.spare.is_empty());
        let largest = owners.max_by_key(|usage| usage.bytes)?;
        let (_, key) = largest.spare.first_key_value()?;
        Some(key.clone())
    }

    fn change(&mut self, key: &str, change: impl FnOnce(&mut Directory)) {
        if let Some(mut directory) = self.forget(key) {
            change(&mut directory);
            self.insert(key.to_owned(), directory);
        }
    }

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

    /// The first name directly inside a directory among keys from this one on.
    fn first_name(&self, prefix: &Key, from: &str) -> Option<(String, Stat)> {
        let directory = self
            .directories
            .range(from.to_owned()..)
            .next()
            .map(|(key, _)| key);
        let upload = self
            .uploads
            .range((from.to_owned(), 0)..)
            .next()
            .map(|((key, _), _)| key);
        let inside = |key: &String| {
            key.strip_prefix(prefix.as_str())
                .map(|rest| entry_name(rest).to_owned())
        };
        let directory = directory.and_then(inside);
        let upload = upload.and_then(inside);
        let name = match (directory, upload) {
            (Some(directory), Some(upload)) => directory.min(upload),
            (Some(name), None) | (None, Some(name)) => name,
            (None, None) => return None,
        };
        let stat = match self.newest_upload(&format!("{prefix}{name}")) {
            Some(progress) if !name.ends_with('/') => Stat::from(progress),
            Some(_) | None => Stat::Directory,
        };
        Some((name, stat))
    }

    fn newest_upload(&self, file: &str) -> Option<&Arc<Progress>> {
        let all = (file.to_owned(), 0)..=(file.to_owned(), u64::MAX);
        self.uploads
            .range(all)
            .next_back()
            .map(|(_, upload)| upload)
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

    /// Names of 500 bytes, so that a limit is reached soon.
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
        (0..1000).for_each(|n| overlay.remove(&(long("alice", n).to_string(), DIRECTORY)));
        assert!(
            overlay
                .add_directory(&home("alice"), &long("alice", 7), true)
                .is_ok()
        );
        for user in ["alice", "bobby", "carol", "david"] {
            (0..each).for_each(|n| overlay.remove(&(long(user, n).to_string(), DIRECTORY)));
        }
        let tables = overlay.tables();
        assert!(tables.bytes == 0 && tables.owners.is_empty());
    }

    #[test]
    fn what_s3_knows_and_what_is_left_over_makes_room_oldest_first() {
        let overlay = Overlay::default();
        let alice = home("alice");
        overlay
            .add_directory(&alice, &long("alice", 999_999), false)
            .unwrap();
        let most = fill(&overlay, "alice", true);
        assert!(
            !overlay.is_directory(&long("alice", 999_999)),
            "left over: it went first"
        );
        for n in 0..most {
            overlay.stored(&key(&format!("{}f", long("alice", n))));
        }
        assert!(overlay.is_made(&long("alice", 0)));
        // The last file in it went: S3 doesn't know it any more.
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
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let names = overlay.names_after(&key("a/"), after.as_deref(), 1);
            after = names.entries.keys().next().cloned();
            found.extend(after.clone());
            if names.are_all {
                break;
            }
        }
        assert_eq!(found, ["d-e/", "d/", "d0/"]);
        overlay.rename_directories(&key("a/d/"), &key("a/q/"));
        let names = overlay.names_after(&key("a/"), None, 10);
        assert!(names.are_all && names.entries.keys().eq(["d-e/", "d0/", "q/"]));
    }
}
