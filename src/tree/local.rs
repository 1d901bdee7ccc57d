//! What this process alone knows: directories that S3 does not have, and uploads that are not objects yet.
//!
//! Both are keyed by full key, so users whose homes overlap see the same. Held in RAM: a restart forgets it.

use super::{Result, Stat, TreeError, fail_if};
use crate::{store::Key, upload::Progress};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most names remembered before no more directories are, so that a client's mkdir loop can't take the memory.
pub const MAX_NAMES: usize = 100_000;
/// The number of every directory's slot.
pub const DIRECTORY: u64 = 0;

/// A full key, and a number that tells uploads to it apart. Directories end with `/` and have the number 0.
pub type Slot = (String, u64);

/// What is in a slot.
#[derive(Clone, Default)]
pub struct Known {
    /// A directory by mkdir, after a look that nothing else has the name. Others are left over as their last entry
    /// went: a file of the same name may exist, so the store has to be asked first.
    pub made: bool,
    /// `None` for directories.
    pub upload: Option<Arc<Progress>>,
}

/// See the module.
#[derive(Default)]
pub struct Local {
    // A std lock: never held across an await.
    slots: Mutex<BTreeMap<Slot, Known>>,
    last_upload: AtomicU64,
}

impl Local {
    fn slots(&self) -> MutexGuard<'_, BTreeMap<Slot, Known>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a directory, unless there are too many.
    pub fn add_directory(&self, prefix: &Key, made: bool) -> Result<()> {
        let mut slots = self.slots();
        let full = TreeError::Refused("too many empty directories: they live in the server's memory");
        fail_if(slots.len() >= MAX_NAMES, full)?;
        slots.entry((prefix.to_string(), DIRECTORY)).or_default().made |= made;
        Ok(())
    }

    /// Moves every directory at or below `from` to `to`.
    pub fn rename_directories(&self, from: &Key, to: &Key) {
        let mut slots = self.slots();
        let names: Vec<String> = below(&slots, from).map(|(name, _)| name.to_owned()).collect();
        for name in names {
            if let Some(known) = slots.remove(&(format!("{from}{name}"), DIRECTORY)) {
                slots.insert((format!("{to}{name}"), DIRECTORY), known);
            }
        }
    }

    /// Is this a directory by mkdir?
    pub fn is_made(&self, prefix: &Key) -> bool {
        self.slots().get(&(prefix.to_string(), DIRECTORY)).is_some_and(|known| known.made)
    }

    /// Is this a directory, as far as is known here? One above a known directory, or above an upload, is one too.
    pub fn is_directory(&self, prefix: &Key) -> bool {
        self.any(prefix, |_, _| true)
    }

    /// Does `test` hold for anything at or below this directory? It is given names relative to it.
    pub fn any(&self, prefix: &Key, test: impl Fn(&str, &Known) -> bool) -> bool {
        below(&self.slots(), prefix).any(|(name, known)| test(name, known))
    }

    /// Entries directly inside a directory: name (`/` at the end for directories), and the newest upload as a file.
    pub fn entries(&self, prefix: &Key) -> BTreeMap<String, Stat> {
        let slots = self.slots();
        let inside = below(&slots, prefix).filter(|(name, _)| !name.is_empty());
        let entry = |(name, known): (&str, &Known)| match name.split_once('/') {
            Some((first, _)) => (format!("{first}/"), Stat::Directory),
            None => (name.to_owned(), known.upload.as_ref().map_or(Stat::Directory, Stat::from)),
        };
        inside.map(entry).collect()
    }

    /// A fresh slot for an upload.
    pub fn upload_slot(&self, file: &Key) -> Slot {
        (file.to_string(), self.last_upload.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Shows an upload until its slot is removed.
    pub fn add_upload(&self, slot: Slot, upload: Arc<Progress>) {
        self.slots().insert(slot, Known { made: false, upload: Some(upload) });
    }

    /// Forgets a directory, but nothing inside it; or an upload, which is an object now, or nothing.
    pub fn remove(&self, slot: &Slot) {
        self.slots().remove(slot);
    }

    /// The newest upload in progress to this key.
    pub fn upload(&self, file: &Key) -> Option<Arc<Progress>> {
        let all = (file.to_string(), 0)..=(file.to_string(), u64::MAX);
        self.slots().range(all).next_back().and_then(|(_, known)| known.upload.clone())
    }
}

/// Whatever starts with `prefix`, itself included: the rest of the name, and what is known of it.
fn below<'a>(slots: &'a BTreeMap<Slot, Known>, prefix: &'a Key) -> impl Iterator<Item = (&'a str, &'a Known)> {
    let after = slots.range((prefix.to_string(), 0)..);
    after.map_while(|((name, _), known)| Some((name.strip_prefix(prefix.as_str())?, known)))
}
