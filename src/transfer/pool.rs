//! The memory promise: one pool of bytes for the whole server, `--buffer-memory`.
//!
//! Invariants: whoever waits for the pool waits for what ends by itself, parts in flight. What can last as long as a
//! client likes, such as blocks that it has not read, has a [`Share`], and all of these leave a quarter of the pool, which
//! no part is larger than.
//! A part that grows beyond its upload's own 5 MiB takes memory only if it is free, and leaves early
//! ([`BufferPool::wait_for_pressure`]) when another upload waits. So no number of slow clients can stop an upload, and
//! nobody waits in a circle.
//!
//! Parts lie in pages of their own, straight from the system: an allocator that is given back 5 MiB here and there, and
//! asked for 32 KiB in between, ends up with twice the memory in holes. Pages that were used once are kept, inside
//! the pool, as long as any upload is open: fresh ones cost as much as the encryption of what is written there.

use memmap2::MmapMut;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// Permits are counted in KiB: a semaphore hands out at most `u32::MAX` at once.
const UNIT: u64 = 1024;

/// Uses of the pool that are bounded for themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// Blocks of files that were fetched and not sent yet: three eighths of the pool.
    ReadAhead,
    /// Requests that came and are not carried out yet: an eighth.
    Requests,
    /// Parts beyond their upload's own 5 MiB that can't leave early, as a store demands equal parts: a quarter.
    GrownParts,
    /// Names in directories that are being renamed: an eighth. Only the store is waited for with these.
    Renames,
}

/// See the module. Clones share one pool.
#[derive(Clone)]
pub struct BufferPool {
    units: usize,
    all: Arc<Semaphore>,
    read_ahead: Arc<Semaphore>,
    requests: Arc<Semaphore>,
    grown_parts: Arc<Semaphore>,
    renames: Arc<Semaphore>,
    /// Takes that wait.
    waiting: watch::Sender<usize>,
    // A std lock: never held across an await.
    buffers: Arc<Mutex<Buffers>>,
}

#[derive(Default)]
struct Buffers {
    in_use: usize,
    spare: Vec<(MmapMut, OwnedSemaphorePermit)>,
}

/// Bytes taken from the pool, given back when dropped.
#[derive(Debug)]
pub struct Reservation {
    all: OwnedSemaphorePermit,
    share: Option<OwnedSemaphorePermit>,
}

impl Reservation {
    /// Gives back what is above this many bytes, and the share: from now on only the store is waited for.
    pub fn reduce_to(&mut self, bytes: u64) {
        self.share = None;
        let needed = usize::try_from(bytes.div_ceil(UNIT)).unwrap_or(usize::MAX);
        let excess = self.all.num_permits().saturating_sub(needed);
        drop(self.all.split(excess));
    }
}

impl BufferPool {
    /// A pool of so many bytes.
    pub fn new(total: u64) -> BufferPool {
        let units = (total / UNIT) as usize;
        let semaphore = |units| Arc::new(Semaphore::new(units));
        BufferPool {
            units,
            all: semaphore(units),
            read_ahead: semaphore(units * 3 / 8),
            requests: semaphore(units / 8),
            grown_parts: semaphore(units / 4),
            renames: semaphore(units / 8),
            waiting: watch::Sender::new(0),
            buffers: Arc::default(),
        }
    }

    /// Waits its turn for the bytes of one part, which must go to the store at once. `None` when it asks for more than
    /// the pool holds.
    pub async fn take(&self, bytes: u64) -> Option<Reservation> {
        let units = u32::try_from(bytes.div_ceil(UNIT))
            .ok()
            .filter(|units| *units as usize <= self.units)?;
        if let Some(taken) = self.try_take(bytes) {
            return Some(taken);
        }
        // From here on no buffer is kept for later, and uploads that can do with less are told.
        let _waiting = Waiting::begin(self);
        self.buffers().spare.clear();
        let all = self.all.clone().acquire_many_owned(units).await.ok()?;
        Some(Reservation { all, share: None })
    }

    /// Takes the bytes if they are free, or only kept for later.
    pub fn try_take(&self, bytes: u64) -> Option<Reservation> {
        let all = self.claim(bytes)?;
        Some(Reservation { all, share: None })
    }

    /// As [`BufferPool::try_take`], within a share.
    pub fn try_take_share(&self, share: Share, bytes: u64) -> Option<Reservation> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).ok()?;
        let share = self
            .semaphore(share)
            .clone()
            .try_acquire_many_owned(units)
            .ok()?;
        Some(Reservation {
            all: self.claim(bytes)?,
            share: Some(share),
        })
    }

    /// As [`BufferPool::try_take_share`], but waits for others to give the bytes back.
    pub async fn take_share(&self, share: Share, bytes: u64) -> Option<Reservation> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).ok()?;
        let share = self
            .semaphore(share)
            .clone()
            .acquire_many_owned(units)
            .await
            .ok()?;
        let Reservation { all, .. } = self.take(bytes).await?;
        Some(Reservation {
            all,
            share: Some(share),
        })
    }

    /// The most that a share can hold, in bytes.
    pub fn size_of(&self, share: Share) -> u64 {
        self.units_of(share) as u64 * UNIT
    }

    fn units_of(&self, share: Share) -> usize {
        match share {
            Share::ReadAhead => self.units * 3 / 8,
            Share::Requests | Share::Renames => self.units / 8,
            Share::GrownParts => self.units / 4,
        }
    }

    fn semaphore(&self, share: Share) -> &Arc<Semaphore> {
        match share {
            Share::ReadAhead => &self.read_ahead,
            Share::Requests => &self.requests,
            Share::GrownParts => &self.grown_parts,
            Share::Renames => &self.renames,
        }
    }

    /// Resolves while somebody waits for the pool.
    pub async fn wait_for_pressure(&self) {
        // The sender is here, so this can't fail.
        let _ = self
            .waiting
            .subscribe()
            .wait_for(|waiting| *waiting > 0)
            .await;
    }

    fn claim(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).ok()?;
        if let Ok(all) = self.all.clone().try_acquire_many_owned(units) {
            return Some(all);
        }
        self.buffers().spare.clear();
        self.all.clone().try_acquire_many_owned(units).ok()
    }

    /// Memory for a part, which is the caller's to account for. What it holds at first is anything.
    pub fn buffer(&self, size: usize) -> std::io::Result<Buffer> {
        let mut buffers = self.buffers();
        let fitting = buffers
            .spare
            .iter()
            .position(|(pages, _)| pages.len() == size);
        let spare = fitting.map(|at| Ok(buffers.spare.swap_remove(at).0));
        let pages = spare.unwrap_or_else(|| MmapMut::map_anon(size))?;
        buffers.in_use += 1;
        Ok(Buffer {
            pages: Some(pages),
            home: self.clone(),
        })
    }

    /// Bytes that somebody holds.
    pub fn used(&self) -> u64 {
        let spare: usize = self
            .buffers()
            .spare
            .iter()
            .map(|(_, room)| room.num_permits())
            .sum();
        (self.units - self.all.available_permits()).saturating_sub(spare) as u64 * UNIT
    }

    fn buffers(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A take that waits.
struct Waiting<'a>(&'a watch::Sender<usize>);

impl Waiting<'_> {
    fn begin(pool: &BufferPool) -> Waiting<'_> {
        pool.waiting.send_modify(|waiting| *waiting += 1);
        Waiting(&pool.waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|waiting| *waiting -= 1);
    }
}

/// Pages from [`BufferPool::buffer`]. They take memory once they are written to.
pub struct Buffer {
    /// `None` only while being dropped.
    pages: Option<MmapMut>,
    home: BufferPool,
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
        let is_wanted = *self.home.waiting.borrow() > 0;
        let units = u32::try_from((self.len() as u64).div_ceil(UNIT)).unwrap_or(u32::MAX);
        let room = if is_wanted {
            None
        } else {
            self.home.all.clone().try_acquire_many_owned(units).ok()
        };
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
    async fn downloads_leave_more_than_half_to_uploads() {
        let pool = BufferPool::new(64 * UNIT);
        let held: Vec<_> =
            std::iter::from_fn(|| pool.try_take_share(Share::ReadAhead, 10 * UNIT)).collect();
        assert_eq!(held.len(), 2);
        assert_eq!(pool.all.available_permits(), 44);
        let upload = pool.take(44 * UNIT).await.unwrap();
        assert_eq!(pool.all.available_permits(), 0);
        drop((held, upload));
        assert_eq!(pool.all.available_permits(), 64);
    }

    #[tokio::test]
    async fn used_pages_are_kept_inside_the_pool_while_others_are_in_use() {
        let pool = BufferPool::new(64 * UNIT);
        let size = 20 * UNIT as usize;
        let state = || (pool.buffers().spare.len(), pool.all.available_permits());
        let mut buffers: Vec<_> = (0..5).map(|_| pool.buffer(size).unwrap()).collect();
        buffers[4][0] = 7;
        buffers.truncate(1);
        assert_eq!(state(), (3, 4));
        buffers.push(pool.buffer(size).unwrap());
        assert_eq!(state(), (2, 24));
        let _part = pool.take(60 * UNIT).await.unwrap();
        assert_eq!(state(), (0, 4));
        drop(_part);
        buffers.extend((0..3).map(|_| pool.buffer(size).unwrap()));
        buffers.truncate(2);
        assert_eq!(state(), (3, 4));
        let ahead = pool.try_take_share(Share::ReadAhead, 10 * UNIT);
        assert!(ahead.is_some(), "what is only kept stands in nobody's way");
        drop(ahead);
        assert_eq!(pool.used(), 0);
        buffers.clear();
        assert_eq!(state(), (0, 64));
    }

    #[tokio::test]
    async fn the_shares_together_leave_a_part() {
        let pool = BufferPool::new(64 * UNIT);
        let mut held = Vec::new();
        for share in [Share::ReadAhead, Share::Requests, Share::GrownParts] {
            held.extend(std::iter::from_fn(|| pool.try_take_share(share, UNIT)));
        }
        assert_eq!(pool.all.available_permits(), 16);
    }

    #[tokio::test]
    async fn who_waits_makes_pressure() {
        let pool = BufferPool::new(64 * UNIT);
        let grown = pool.try_take(40 * UNIT).unwrap();
        let waiter = tokio::spawn({
            let pool = pool.clone();
            async move { pool.take(30 * UNIT).await.is_some() }
        });
        pool.wait_for_pressure().await;
        drop(grown);
        assert!(waiter.await.unwrap());
        let mut part = pool.try_take_share(Share::GrownParts, 16 * UNIT).unwrap();
        assert!(pool.try_take_share(Share::GrownParts, UNIT).is_none());
        part.reduce_to(5 * UNIT);
        assert_eq!(pool.all.available_permits(), 59);
        assert!(pool.try_take_share(Share::GrownParts, 16 * UNIT).is_some());
        assert_eq!(*pool.waiting.borrow(), 0);
    }

    #[tokio::test]
    async fn more_than_the_pool_is_refused_at_once() {
        assert!(BufferPool::new(UNIT).take(UNIT + 1).await.is_none());
    }
}
