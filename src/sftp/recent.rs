//! What listings said a moment ago. Many clients ask for the attributes of each name that they have
//! just listed, which would be a request to the store for each.
//!
//! Invariant: nothing here is older than [`KEEP_TIME`], or than the beginning or the end of any
//! change through this server, and nothing was listed while one was under way.

use crate::path::Path;
use crate::vfs::{Item, Stat};
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// Other gateways and programs may change a file. The attributes that a listing shows to a client
/// are older than this too.
const KEEP_TIME: Duration = Duration::from_secs(3);
/// Limit on the memory of what is remembered in one session, in bytes.
const MAX_BYTES: usize = 256 * 1024;
/// Memory of an entry beside its path, in bytes.
const ENTRY_BYTES: usize = 128;

/// When a directory was opened: its listing is no older.
#[derive(Clone, Copy)]
pub struct ListingAge {
    opened: Instant,
    /// `None` if a change was under way, which may show at any time.
    changes: Option<u64>,
}

impl ListingAge {
    /// Now, after this many changes; `None` while one is under way. To be taken before the store is
    /// asked.
    pub fn start(changes: Option<u64>) -> ListingAge {
        ListingAge {
            opened: Instant::now(),
            changes,
        }
    }
}

/// See the module; one in each session.
#[derive(Default)]
pub struct RecentStats {
    entries: HashMap<String, Entry>,
    bytes: usize,
    /// How many changes there had been when the first entry was recorded.
    changes: u64,
}

struct Entry {
    stat: Stat,
    listed: Instant,
}

impl RecentStats {
    /// Records what a listing of this directory says, unless there were changes since it began.
    pub fn record(&mut self, directory: &Path, items: &[Item], age: ListingAge, changes: u64) {
        self.forget_if_changed(changes);
        if age.changes != Some(changes) {
            return;
        }
        let listed = age.opened;
        for Item { name, stat } in items {
            let path = format!("{}/{name}", directory.as_str().trim_end_matches('/'));
            let bytes = path.len() + ENTRY_BYTES;
            if self.bytes + bytes > MAX_BYTES {
                self.clear();
            }
            let stat = stat.clone();
            if self.entries.insert(path, Entry { stat, listed }).is_none() {
                self.bytes += bytes;
            }
        }
    }

    /// What was listed of this path, unless that may be out of date.
    pub fn find(&mut self, path: &Path, changes: u64) -> Option<Stat> {
        self.forget_if_changed(changes);
        let entry = self.entries.get(path.as_str())?;
        if entry.listed.elapsed() > KEEP_TIME {
            return None;
        }
        Some(entry.stat.clone())
    }

    fn forget_if_changed(&mut self, changes: u64) {
        if self.changes != changes {
            self.clear();
            self.changes = changes;
        }
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(name: &str) -> Item {
        Item {
            name: name.to_owned(),
            stat: Stat::Directory,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_old_or_changed_is_not_told() {
        let path = |text| Path::parse(text).unwrap();
        let mut recent = RecentStats::default();
        let age = ListingAge::start(Some(1));
        recent.record(&path("/"), &[item("a")], age, 1);
        recent.record(&path("/d"), &[item("b")], age, 1);
        assert_eq!(recent.find(&path("/a"), 1), Some(Stat::Directory));
        assert_eq!(recent.find(&path("/d/b"), 1), Some(Stat::Directory));
        assert_eq!(recent.find(&path("/b"), 1), None);
        tokio::time::advance(KEEP_TIME + Duration::from_millis(1)).await;
        assert_eq!(recent.find(&path("/a"), 1), None);
        recent.record(&path("/"), &[item("a")], age, 1);
        assert_eq!(recent.find(&path("/a"), 1), None);
        recent.record(&path("/"), &[item("a")], ListingAge::start(Some(1)), 1);
        assert_eq!(recent.find(&path("/a"), 1), Some(Stat::Directory));
        assert_eq!(recent.find(&path("/a"), 2), None);
        recent.record(&path("/"), &[item("a")], ListingAge::start(Some(1)), 2);
        assert_eq!(recent.find(&path("/a"), 2), None);
        assert_eq!(recent.bytes, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_remembered_is_bounded() {
        let root = Path::parse("/").unwrap();
        let mut recent = RecentStats::default();
        for n in 0..100_000 {
            recent.record(
                &root,
                &[item(&format!("{n:06}"))],
                ListingAge::start(Some(0)),
                0,
            );
            assert!(recent.bytes <= MAX_BYTES && recent.entries.len() <= MAX_BYTES / ENTRY_BYTES);
        }
    }
}
