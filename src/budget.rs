//! The memory promise: one pool of bytes for the whole server, `--buffer-memory`.
//!
//! Invariants: uploads may wait, because what they wait for (parts in flight) ends by itself; downloads
//! never wait and never hold more than half, because their blocks stay until a client fetches them.
//! So no number of slow clients can stop an upload, and nobody waits in a circle.
//!
//! Parts lie in pages of their own, straight from the system: an allocator that is given back 5 MiB here and there, and
//! asked for 32 KiB in between, ends up with twice the memory in holes. Pages that were used once are kept, inside
//! the pool, as long as any upload is open: fresh ones cost as much as the encryption of what is written there.

use memmap2::MmapMut;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Permits are counted in KiB: a semaphore hands out at most `u32::MAX` at once.
const UNIT: u64 = 1024;

/// See the module. Clones share one pool.
#[derive(Clone)]
pub struct Budget {
    units: usize,
    all: Arc<Semaphore>,
    read_ahead: Arc<Semaphore>,
    // A std lock: never held across an await.
    buffers: Arc<Mutex<Buffers>>,
}

#[derive(Default)]
struct Buffers {
    in_use: usize,
    spare: Vec<(MmapMut, OwnedSemaphorePermit)>,
}

/// Bytes taken from the pool, given back when dropped.
pub type Taken = (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>);

impl Budget {
    /// A pool of so many bytes.
    pub fn new(total: u64) -> Budget {
        let units = (total / UNIT) as usize;
        let [all, read_ahead] = [units, units / 2].map(|units| Arc::new(Semaphore::new(units)));
        Budget { units, all, read_ahead, buffers: Arc::default() }
    }

    /// Waits its turn for the bytes of one part. `None` when it asks for more than the pool holds.
    pub async fn take(&self, bytes: u64) -> Option<Taken> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).ok().filter(|units| *units as usize <= self.units)?;
        if let Some(taken) = self.claim(bytes) {
            return Some((taken, None));
        }
        Some((self.all.clone().acquire_many_owned(units).await.ok()?, None))
    }

    /// Takes them if they are free, or only kept for later.
    fn claim(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        self.try_take(bytes).or_else(|| {
            self.buffers().spare.clear();
            self.try_take(bytes)
        })
    }

    fn try_take(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).ok()?;
        self.all.clone().try_acquire_many_owned(units).ok()
    }

    /// Takes the bytes of a read-ahead block if they are free now.
    pub fn try_read_ahead(&self, bytes: u64) -> Option<Taken> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).ok()?;
        let share = self.read_ahead.clone().try_acquire_many_owned(units).ok()?;
        Some((self.claim(bytes)?, Some(share)))
    }

    /// Memory for a part, which is the caller's to account for. What it holds at first is anything.
    pub fn buffer(&self, size: usize) -> std::io::Result<Buffer> {
        let mut buffers = self.buffers();
        let fitting = buffers.spare.iter().position(|(pages, _)| pages.len() == size);
        let spare = fitting.map(|at| Ok(buffers.spare.swap_remove(at).0));
        let pages = spare.unwrap_or_else(|| MmapMut::map_anon(size))?;
        buffers.in_use += 1;
        Ok(Buffer { pages: Some(pages), home: self.clone() })
    }

    /// Bytes that somebody holds.
    pub fn used(&self) -> u64 {
        let spare: usize = self.buffers().spare.iter().map(|(_, room)| room.num_permits()).sum();
        (self.units - self.all.available_permits()).saturating_sub(spare) as u64 * UNIT
    }

    fn buffers(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pages from [`Budget::buffer`]. They take memory once they are written to.
pub struct Buffer {
    /// `None` only while being dropped.
    pages: Option<MmapMut>,
    home: Budget,
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.pages.as_deref().unwrap_or_default()
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.pages.as_deref_mut().unwrap_or_default()
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut buffers = self.home.buffers();
        buffers.in_use -= 1;
        let room = self.home.try_take(self.len() as u64);
        buffers.spare.extend(self.pages.take().zip(room));
        if buffers.in_use == 0 {
            buffers.spare.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn downloads_leave_half_to_uploads() {
        let budget = Budget::new(64 * UNIT);
        let held: Vec<_> = std::iter::from_fn(|| budget.try_read_ahead(10 * UNIT)).collect();
        assert_eq!(held.len(), 3);
        assert_eq!(budget.all.available_permits(), 34);
        let upload = budget.take(34 * UNIT).await.unwrap();
        assert_eq!(budget.all.available_permits(), 0);
        drop((held, upload));
        assert_eq!(budget.all.available_permits(), 64);
    }

    #[tokio::test]
    async fn used_pages_are_kept_inside_the_pool_while_others_are_in_use() {
        let budget = Budget::new(64 * UNIT);
        let size = 20 * UNIT as usize;
        let state = || (budget.buffers().spare.len(), budget.all.available_permits());
        let mut buffers: Vec<_> = (0..5).map(|_| budget.buffer(size).unwrap()).collect();
        buffers[4][0] = 7;
        buffers.truncate(1);
        assert_eq!(state(), (3, 4));
        buffers.push(budget.buffer(size).unwrap());
        assert_eq!(state(), (2, 24));
        let _part = budget.take(60 * UNIT).await.unwrap();
        assert_eq!(state(), (0, 4));
        drop(_part);
        buffers.extend((0..3).map(|_| budget.buffer(size).unwrap()));
        buffers.truncate(2);
        assert_eq!(state(), (3, 4));
        assert!(budget.try_read_ahead(10 * UNIT).is_some(), "what is only kept stands in nobody's way");
        assert_eq!(budget.used(), 0);
        buffers.clear();
        assert_eq!(state(), (0, 64));
    }

    #[tokio::test]
    async fn more_than_the_pool_is_refused_at_once() {
        assert!(Budget::new(UNIT).take(UNIT + 1).await.is_none());
    }
}
