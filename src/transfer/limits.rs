//! Limits on what one user and one session may pile up.
//!
//! Made by `server`, one [`UserLimits`] for all sessions of a user, and by `sftp`, one
//! [`SessionLimits`] a session; asked by `sftp` and by downloads.

use super::{BufferPool, Reservation, Share};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Limit on the open files and directories of one user in all sessions: four sessions' worth.
pub const MAX_USER_HANDLES: usize = 1024;
/// Limit on the READs that wait in one session, after runs of consecutive ones are folded.
pub const MAX_WAITING_READS: usize = 8192;
/// Memory of a session's own, in KiB, for blocks that READs need while the pool has none.
const OWN_BLOCKS: usize = 1024;
/// Semaphores count KiB: one request for permits is at most `u32::MAX`.
const UNIT: u64 = 1024;

/// Connections that one user may have at least, if half of all are not fewer: as many transfers as
/// common clients run side by side.
const MIN_USER_CONNECTIONS: usize = 10;

/// Limits that the sessions of one user share.
pub struct UserLimits {
    max_connections: usize,
    connections: Arc<Semaphore>,
    handles: Arc<Semaphore>,
    /// Places of [`UploadPlaces`] that the user holds. Changed under its lock only.
    uploads: AtomicUsize,
    read_ahead: Arc<Semaphore>,
    /// How much the SSH windows of the user's sessions may grow, in KiB. All users together have as
    /// much as the pool, but not of the pool: it is no memory of ours.
    pub windows: Arc<Semaphore>,
}

impl UserLimits {
    /// One user may take a quarter of the server's connections, and three quarters of its
    /// read-ahead, and of what SSH windows may grow by.
    pub fn new(max_sessions: usize, pool: &BufferPool) -> UserLimits {
        let share = |all: usize| Arc::new(Semaphore::new((all - all.div_ceil(4)).max(1)));
        let in_units = |bytes: u64| usize::try_from(bytes / UNIT).unwrap_or(Semaphore::MAX_PERMITS);
        let max_connections = max_user_connections(max_sessions);
        UserLimits {
            max_connections,
            connections: Arc::new(Semaphore::new(max_connections)),
            handles: Arc::new(Semaphore::new(MAX_USER_HANDLES)),
            uploads: AtomicUsize::new(0),
            read_ahead: share(in_units(pool.size_of(Share::ReadAhead))),
            windows: share(in_units(pool.size())),
        }
    }

    /// Limit on the connections of the user.
    pub fn max_connections(&self) -> usize {
        self.max_connections
    }

    /// A place for a connection; `None` if the user has none left.
    pub fn open_connection(&self) -> Option<OwnedSemaphorePermit> {
        self.connections.clone().try_acquire_owned().ok()
    }

    /// A place for an open file or directory; `None` if the user has none left.
    pub fn open_handle(&self) -> Option<OwnedSemaphorePermit> {
        self.handles.clone().try_acquire_owned().ok()
    }

    /// A place for a file that is open for writing.
    pub fn open_upload(
        self: &Arc<Self>,
        places: &Arc<UploadPlaces>,
    ) -> Result<UploadPlace, NoUploadPlace> {
        let mut free = places.free();
        let held = self.uploads.load(Ordering::Relaxed);
        match *free {
            0 => Err(NoUploadPlace::Server),
            free if held >= free => Err(NoUploadPlace::User),
            _ => {
                *free -= 1;
                self.uploads.store(held + 1, Ordering::Relaxed);
                drop(free);
                Ok(UploadPlace {
                    places: places.clone(),
                    user: self.clone(),
                })
            }
        }
    }
}

/// Places for files that are open for writing, for the whole server. A user who holds as many as
/// are free gets no more: half of all if alone. So a newcomer finds a place, whatever the others
/// want, until as many users compete as halve the last one.
pub struct UploadPlaces {
    /// A std lock: never held across an await.
    free: Mutex<usize>,
}

impl UploadPlaces {
    /// This many places.
    pub fn new(count: usize) -> UploadPlaces {
        UploadPlaces {
            free: Mutex::new(count),
        }
    }

    fn free(&self) -> MutexGuard<'_, usize> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why there is no place for a file to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoUploadPlace {
    /// All are taken.
    Server,
    /// The user holds as many as are free.
    User,
}

/// A place for a file that is open for writing, given back when dropped.
pub struct UploadPlace {
    places: Arc<UploadPlaces>,
    user: Arc<UserLimits>,
}

impl Drop for UploadPlace {
    fn drop(&mut self) {
        let mut free = self.places.free();
        *free += 1;
        self.user.uploads.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Limit on the connections of one user, of this many in all: a quarter, so that no user keeps the
/// others out. With few connections up to half of them, for clients that open several.
fn max_user_connections(max_sessions: usize) -> usize {
    let most = (max_sessions / 2).max(1);
    (max_sessions / 4).max(MIN_USER_CONNECTIONS).min(most)
}

/// Limits that the files of one session share. Clones share them.
#[derive(Clone)]
pub struct SessionLimits {
    pool: BufferPool,
    user_read_ahead: Arc<Semaphore>,
    own_blocks: Arc<Semaphore>,
    waiting_reads: Arc<Semaphore>,
}

/// Memory of a block; given back when dropped.
pub struct BlockMemory {
    _permit: OwnedSemaphorePermit,
    /// `None` if it is the session's own.
    _pool: Option<Reservation>,
}

impl SessionLimits {
    /// For a session of this user.
    pub fn new(pool: BufferPool, user: &UserLimits) -> SessionLimits {
        SessionLimits {
            pool,
            user_read_ahead: user.read_ahead.clone(),
            own_blocks: Arc::new(Semaphore::new(OWN_BLOCKS)),
            waiting_reads: Arc::new(Semaphore::new(MAX_WAITING_READS)),
        }
    }

    /// Memory of the pool for a block that is fetched ahead, if it is free and within the user's
    /// share.
    pub fn try_read_ahead(&self, bytes: u64) -> Option<BlockMemory> {
        let permit = try_acquire(&self.user_read_ahead, bytes)?;
        let pool = self.pool.try_take_share(Share::ReadAhead, bytes)?;
        Some(BlockMemory {
            _permit: permit,
            _pool: Some(pool),
        })
    }

    /// How much memory for blocks that are fetched ahead is left to the user, in bytes.
    pub fn read_ahead_left(&self) -> u64 {
        let of_user = self.user_read_ahead.available_permits() as u64 * UNIT;
        of_user.min(self.pool.left_of(Share::ReadAhead))
    }

    /// Memory of the session's own for a block that a READ needs, if it is free.
    pub fn try_own(&self, bytes: u64) -> Option<BlockMemory> {
        let permit = try_acquire(&self.own_blocks, bytes)?;
        Some(BlockMemory {
            _permit: permit,
            _pool: None,
        })
    }

    /// Places for READs that wait.
    pub fn waiting_reads(&self) -> Arc<Semaphore> {
        self.waiting_reads.clone()
    }
}

fn try_acquire(semaphore: &Arc<Semaphore>, bytes: u64) -> Option<OwnedSemaphorePermit> {
    let permits = u32::try_from(bytes.div_ceil(UNIT)).ok()?;
    semaphore.clone().try_acquire_many_owned(permits).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_user_leaves_others_as_many_places_as_it_holds() {
        let pool = BufferPool::new(1 << 20);
        let places = Arc::new(UploadPlaces::new(16));
        let mut held = Vec::new();
        let mut counts = Vec::new();
        for _ in 0..6 {
            let user = Arc::new(UserLimits::new(1000, &pool));
            let before = held.len();
            while let Ok(place) = user.open_upload(&places) {
                held.push(place);
            }
            counts.push(held.len() - before);
        }
        assert_eq!(counts, [8, 4, 2, 1, 1, 0]);
        let newcomer = Arc::new(UserLimits::new(1000, &pool));
        let refused = newcomer.open_upload(&places).err();
        assert_eq!(refused, Some(NoUploadPlace::Server));
        held.truncate(4);
        let refused = (0..20).find_map(|_| match newcomer.open_upload(&places) {
            Ok(place) => {
                held.push(place);
                None
            }
            Err(refused) => Some(refused),
        });
        assert_eq!((refused, held.len()), (Some(NoUploadPlace::User), 10));
        held.clear();
        assert_eq!(*places.free(), 16);
    }

    #[test]
    fn a_user_has_a_quarter_of_the_connections_and_with_few_up_to_half() {
        let limits = [1, 2, 3, 8, 20, 40, 80, 1000].map(max_user_connections);
        assert_eq!(limits, [1, 1, 1, 4, 10, 10, 20, 250]);
    }
}
