//! Locks on names, in one process: what makes looking at a key and then changing it one step.
//!
//! Called by `vfs` and by uploads. A CLOSE, remove, rename, mkdir, rmdir or exclusive OPEN holds
//! its names while it works. Invariants: the queue is first come, first served, so no operation
//! starves; all names of one operation are asked for at once, so no two operations wait for each
//! other; and an operation that holds a lock waits for the store only, never for a client.

use crate::store::Key;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio_util::sync::CancellationToken;

/// A name that one operation needs for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockedName {
    /// The key with a slash at its end, as a file and a directory share one name.
    path: String,
    /// Is everything below it included?
    subtree: bool,
}

impl LockedName {
    /// The file or directory of this name, but nothing inside it.
    pub fn alone(key: &Key) -> LockedName {
        LockedName {
            path: with_slash(key),
            subtree: false,
        }
    }

    /// The file or directory of this name, and all that is inside it.
    pub fn with_subtree(key: &Key) -> LockedName {
        LockedName {
            path: with_slash(key),
            subtree: true,
        }
    }
}

fn with_slash(key: &Key) -> String {
    format!("{}/", key.as_str().trim_end_matches('/'))
}

/// See the module. Clones share the locks.
#[derive(Clone, Default)]
pub struct NameLocks {
    // A std lock: never held across an await.
    queue: Arc<Mutex<Queue>>,
}

/// All operations that hold or wait for a name.
#[derive(Default)]
struct Queue {
    next_number: u64,
    ended: u64,
    /// By path and by the number of the operation; numbers rise with time.
    entries: BTreeMap<(String, u64), Entry>,
}

#[derive(Clone)]
struct Entry {
    subtree: bool,
    ended: CancellationToken,
}

/// A place in the queue for some names. Dropped, it lets the next operation go on.
pub struct NameLock {
    locks: NameLocks,
    names: Vec<LockedName>,
    number: u64,
    ended: CancellationToken,
}

impl NameLocks {
    /// Takes a place in the queue: operations that ask from now on wait for this one.
    /// [`NameLock::wait`] resolves when it is its turn.
    pub fn enqueue(&self, names: Vec<LockedName>) -> NameLock {
        let ended = CancellationToken::new();
        let mut queue = self.queue();
        let number = queue.next_number;
        queue.next_number += 1;
        for LockedName { path, subtree } in &names {
            let entry = queue.entries.entry((path.clone(), number));
            let entry = entry.or_insert(Entry {
                subtree: false,
                ended: ended.clone(),
            });
            entry.subtree |= subtree;
        }
        drop(queue);
        NameLock {
            locks: self.clone(),
            names,
            number,
            ended,
        }
    }

    /// Waits for the names.
    pub async fn lock(&self, names: Vec<LockedName>) -> NameLock {
        let lock = self.enqueue(names);
        lock.wait().await;
        lock
    }

    /// How many operations have begun and ended so far. No operation has changed anything between
    /// two calls that return the same count.
    pub fn count(&self) -> u64 {
        let queue = self.queue();
        queue.next_number + queue.ended
    }

    /// As [`NameLocks::count`]; `None` while an operation holds or waits for a name.
    pub fn count_when_idle(&self) -> Option<u64> {
        let queue = self.queue();
        match queue.entries.is_empty() {
            true => Some(queue.next_number + queue.ended),
            false => None,
        }
    }

    /// Waits for the operations on this name that began before this call, and takes nothing.
    pub async fn wait_for_earlier(&self, name: &LockedName) {
        let number = self.queue().next_number;
        self.wait(std::slice::from_ref(name), number).await;
    }

    async fn wait(&self, names: &[LockedName], number: u64) {
        loop {
            let Some(entry) = self.find_earlier(names, number) else {
                return;
            };
            entry.ended.cancelled().await;
        }
    }

    fn find_earlier(&self, names: &[LockedName], number: u64) -> Option<Entry> {
        let queue = self.queue();
        for name in names {
            if let Some(entry) = queue.find_earlier(name, number) {
                return Some(entry.clone());
            }
        }
        None
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// An operation before this number that does not go together with this name.
    fn find_earlier(&self, name: &LockedName, number: u64) -> Option<&Entry> {
        let path = name.path.as_str();
        for (at, _) in path.match_indices('/') {
            let (above, _) = path.split_at(at + 1);
            let mut here = self
                .entries
                .range((above.to_owned(), 0)..(above.to_owned(), number));
            let conflict = here.find(|(_, entry)| entry.subtree || above.len() == path.len());
            if let Some((_, entry)) = conflict {
                return Some(entry);
            }
        }
        if !name.subtree {
            return None;
        }
        let from = self.entries.range((path.to_owned(), 0)..);
        let mut inside = from.take_while(|((other, _), _)| other.starts_with(path));
        inside
            .find(|((_, other), _)| *other < number)
            .map(|(_, entry)| entry)
    }
}

impl NameLock {
    /// Waits until all operations on these names that came before have ended.
    pub async fn wait(&self) {
        self.locks.wait(&self.names, self.number).await;
    }
}

impl Drop for NameLock {
    fn drop(&mut self) {
        let mut queue = self.locks.queue();
        queue.ended += 1;
        for name in &self.names {
            queue.entries.remove(&(name.path.clone(), self.number));
        }
        drop(queue);
        self.ended.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn alone(name: &str) -> LockedName {
        LockedName::alone(&Key::new(name).unwrap())
    }

    fn tree(name: &str) -> LockedName {
        LockedName::with_subtree(&Key::new(name).unwrap())
    }

    fn is_first(lock: &NameLock) -> bool {
        lock.wait().now_or_never().is_some()
    }

    #[test]
    fn names_conflict_with_themselves_and_with_subtrees_around_them() {
        let pairs = [
            (alone("a"), alone("a"), true),
            (alone("a"), alone("a/"), true),
            (alone("a"), alone("b"), false),
            (alone("a"), alone("a/b"), false),
            (tree("a/"), alone("a/b"), true),
            (tree("a/"), alone("a/b/c"), true),
            (tree("a/"), alone("ab"), false),
            (tree("a/b"), tree("a/"), true),
            (tree("a/b"), tree("a/c"), false),
        ];
        for (one, other, conflict) in pairs {
            for (first, second) in [(&one, &other), (&other, &one)] {
                let locks = NameLocks::default();
                let first_lock = locks.enqueue(vec![first.clone()]);
                let second_lock = locks.enqueue(vec![second.clone()]);
                assert!(is_first(&first_lock));
                assert_eq!(is_first(&second_lock), !conflict, "{first:?} {second:?}");
                drop(first_lock);
                assert!(is_first(&second_lock));
                drop(second_lock);
                assert!(locks.queue().entries.is_empty());
            }
        }
    }

    #[test]
    fn the_first_to_ask_is_the_first_to_get() {
        let locks = NameLocks::default();
        let file = locks.enqueue(vec![alone("d/f")]);
        let directory = locks.enqueue(vec![tree("d"), tree("e")]);
        let later = locks.enqueue(vec![alone("d/g")]);
        assert!(is_first(&file) && !is_first(&directory) && !is_first(&later));
        drop(file);
        assert!(is_first(&directory) && !is_first(&later));
        let elsewhere = locks.wait_for_earlier(&alone("x")).now_or_never();
        assert!(elsewhere.is_some());
        drop(directory);
        assert!(is_first(&later));
    }
}
