//! What this process alone knows: directories that S3 does not have, and uploads that are not objects yet.
//!
//! Both are keyed by full key, so users whose homes overlap see the same. Held in RAM: a restart forgets it.

use crate::store::Key;
use crate::upload::Progress;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most empty directories remembered, so that a client's mkdir loop can't take the memory.
pub const MAX_DIRECTORIES: usize = 100_000;

/// Where a virtual directory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Its last entry went. A file of the same name may exist: the store has to be asked first.
    LeftOver,
    /// By mkdir, after a look that nothing else has the name.
    Made,
}

/// See the module.
#[derive(Default)]
pub struct Local {
    // A std lock: never held across an await.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By prefix, `/` at the end.
    directories: BTreeMap<String, Origin>,
    uploads: BTreeMap<String, Vec<(u64, Arc<Progress>)>>,
    next_id: u64,
}

impl Local {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a directory; false when there are too many.
    pub fn add_directory(&self, prefix: &Key, origin: Origin) -> bool {
        let mut state = self.state();
        if state.directories.len() >= MAX_DIRECTORIES && !state.directories.contains_key(prefix.as_str()) {
            return false;
        }
        let known = state.directories.entry(prefix.as_str().to_owned()).or_insert(origin);
        *known = origin.max(*known);
        true
    }

    /// Forgets one directory; false when it was not known.
    pub fn remove_directory(&self, prefix: &Key) -> bool {
        self.state().directories.remove(prefix.as_str()).is_some()
    }

    /// Moves every directory at or below `from` to `to`.
    pub fn rename_directories(&self, from: &Key, to: &Key) {
        let mut state = self.state();
        for old in keys_below(&state.directories, from.as_str()) {
            if let (Some(origin), Some(rest)) = (state.directories.remove(&old), old.strip_prefix(from.as_str())) {
                state.directories.insert(format!("{}{rest}", to.as_str()), origin);
            }
        }
    }

    /// How is this directory known, if at all? One above a known directory, or above an upload, exists too.
    pub fn directory(&self, prefix: &Key) -> Option<Origin> {
        let state = self.state();
        let own = state.directories.get(prefix.as_str()).copied();
        own.or_else(|| state.has_entries(prefix.as_str()).then_some(Origin::LeftOver))
    }

    /// Is anything known inside this directory?
    pub fn has_entries(&self, prefix: &Key) -> bool {
        self.state().has_entries(prefix.as_str())
    }

    /// Is an upload in progress at or below this directory?
    pub fn has_uploads(&self, prefix: &Key) -> bool {
        is_above(&self.state().uploads, prefix.as_str())
    }

    /// Entries directly inside a directory: name (`/` at the end for directories), and the upload behind a file.
    pub fn entries(&self, prefix: &Key) -> BTreeMap<String, Option<Arc<Progress>>> {
        let state = self.state();
        let mut found = BTreeMap::new();
        let prefix = prefix.as_str();
        for key in keys_below(&state.directories, prefix).into_iter().chain(keys_below(&state.uploads, prefix)) {
            match key.strip_prefix(prefix).map(|rest| rest.split_once('/').ok_or(rest)) {
                Some(Ok((name, _))) => drop(found.insert(format!("{name}/"), None)),
                Some(Err("")) | None => {}
                Some(Err(name)) => {
                    let newest = state.uploads.get(&key).and_then(|all| all.last());
                    found.insert(name.to_owned(), newest.map(|(_, progress)| progress.clone()));
                }
            }
        }
        found
    }

    /// Shows an upload until [`Local::remove_upload`].
    pub fn add_upload(&self, key: &Key, id: u64, progress: Arc<Progress>) {
        self.state().uploads.entry(key.as_str().to_owned()).or_default().push((id, progress));
    }

    /// A fresh name for an upload.
    pub fn upload_id(&self) -> u64 {
        let mut state = self.state();
        state.next_id += 1;
        state.next_id
    }

    /// The upload is an object now, or nothing.
    pub fn remove_upload(&self, key: &Key, id: u64) {
        let mut state = self.state();
        if let Some(all) = state.uploads.get_mut(key.as_str()) {
            all.retain(|(other, _)| *other != id);
            if all.is_empty() {
                state.uploads.remove(key.as_str());
            }
        }
    }

    /// An upload at this key, or below this prefix, that is being closed.
    pub fn closing(&self, key: &Key) -> Option<Arc<Progress>> {
        let state = self.state();
        let all = state.uploads.range::<str, _>((Bound::Included(key.as_str()), Bound::Unbounded));
        let below = key.as_str().ends_with('/');
        let mut all =
            all.take_while(|(found, _)| if below { found.starts_with(key.as_str()) } else { *found == key.as_str() });
        all.find_map(|(_, uploads)| uploads.iter().find(|(_, upload)| upload.is_closing()))
            .map(|(_, upload)| upload.clone())
    }

    /// The newest upload in progress to this key.
    pub fn upload(&self, key: &Key) -> Option<Arc<Progress>> {
        self.state().uploads.get(key.as_str()).and_then(|all| all.last()).map(|(_, progress)| progress.clone())
    }
}

impl State {
    fn has_entries(&self, prefix: &str) -> bool {
        is_above(&self.directories, prefix) || is_above(&self.uploads, prefix)
    }
}

/// Does a longer key start with `prefix`?
fn is_above<V>(map: &BTreeMap<String, V>, prefix: &str) -> bool {
    let mut after = map.range::<str, _>((Bound::Excluded(prefix), Bound::Unbounded));
    after.next().is_some_and(|(key, _)| key.starts_with(prefix))
}

/// Keys that start with `prefix`, itself included.
fn keys_below<V>(map: &BTreeMap<String, V>, prefix: &str) -> Vec<String> {
    map.range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
        .map(|(key, _)| key)
        .take_while(|key| key.starts_with(prefix))
        .cloned()
        .collect()
}
