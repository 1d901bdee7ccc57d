//! The memory promise: one pool of bytes for the whole server, `--buffer-memory`.
//!
//! Invariants: what waits for the pool waits for something that ends by itself, parts in flight.
//! Uses that can last as long as a client likes, such as blocks that it has not read, have a
//! [`Share`], and these shares leave a quarter of the pool; nothing larger is waited for. A part
//! that grows beyond its upload's own 5 MiB takes memory only if it is free, and leaves early
//! ([`BufferPool::wait_for_pressure`]) when another upload waits. So slow clients can't stop an
//! upload, however many they are, and no two uploads wait for each other.
//!
//! Parts lie in pages of their own, straight from the system: an allocator that is given back 5 MiB
//! here and there, and asked for 32 KiB in between, ends up with twice the memory in holes. Used
//! pages are kept, inside the pool, as long as any upload is open: fresh ones cost as much as the
//! encryption of what is written to them.

use memmap2::MmapMut;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, watch};

/// Permits are counted in KiB: a semaphore hands out at most `u32::MAX` at once.
const UNIT: u64 = 1024;

/// Uses of the pool that have a limit of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// Blocks of files that were fetched and not sent yet: three eighths of the pool.
    ReadAhead,
    /// Requests that arrived and are not carried out yet: an eighth.
    Requests,
    /// Parts beyond their upload's own 5 MiB that can't leave early, because the store demands
    /// equal parts or larger ones: a quarter.
    GrownParts,
    /// Names in directories that are being renamed: an eighth. A rename waits for the store only,
    /// so this share ends by itself.
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
    /// See [`BufferPool::take_rename_turn`].
    rename_turn: Arc<tokio::sync::Mutex<()>>,
    /// Reservations that are waited for.
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
    /// Gives back what is above this many bytes, and the share: from now on it waits for the store
    /// only.
    pub fn reduce_to(&mut self, bytes: u64) {
        self.share = None;
        let needed = usize::try_from(bytes.div_ceil(UNIT)).unwrap_or(usize::MAX);
        let excess = self.all.num_permits().saturating_sub(needed);
        drop(self.all.split(excess));
    }
}

impl BufferPool {
    /// A pool of this many bytes.
    pub fn new(total: u64) -> BufferPool {
        let units = (total / UNIT) as usize;
        let share = |share| Arc::new(Semaphore::new(units_of(share, units)));
        BufferPool {
            units,
            all: Arc::new(Semaphore::new(units)),
            read_ahead: share(Share::ReadAhead),
            requests: share(Share::Requests),
            grown_parts: share(Share::GrownParts),
            renames: share(Share::Renames),
            rename_turn: Arc::default(),
            waiting: watch::Sender::new(0),
            buffers: Arc::default(),
        }
    }

    /// Reserves the bytes of one part, which must go to the store at once; waits its turn. `None`
    /// if they are more than the pool holds.
    pub async fn take(&self, bytes: u64) -> Option<Reservation> {
        let units = to_units(bytes)?;
        if units as usize > self.units {
            return None;
        }
        if let Some(reservation) = self.try_take(bytes) {
            return Some(reservation);
        }
        // From here on no buffer is kept for later, and uploads that can do with less are told.
        let _waiting = Waiting::begin(self);
        self.buffers().spare.clear();
        let all = self.all.clone().acquire_many_owned(units).await.ok()?;
        Some(Reservation { all, share: None })
    }

    /// Reserves the bytes if they are free, or only kept for later.
    pub fn try_take(&self, bytes: u64) -> Option<Reservation> {
        let all = self.claim(bytes)?;
        Some(Reservation { all, share: None })
    }

    /// As [`BufferPool::try_take`], within a share.
    pub fn try_take_share(&self, share: Share, bytes: u64) -> Option<Reservation> {
        let semaphore = self.semaphore(share).clone();
        let share = semaphore.try_acquire_many_owned(to_units(bytes)?).ok()?;
        Some(Reservation {
            all: self.claim(bytes)?,
            share: Some(share),
        })
    }

    /// As [`BufferPool::try_take_share`], but waits until others give the bytes back.
    pub async fn take_share(&self, share: Share, bytes: u64) -> Option<Reservation> {
        let semaphore = self.semaphore(share).clone();
        let share = semaphore.acquire_many_owned(to_units(bytes)?).await.ok()?;
        let mut reservation = self.take(bytes).await?;
        reservation.share = Some(share);
        Some(reservation)
    }

    /// The turn of one rename, which then waits for memory while it holds some. The others give
    /// theirs back before they wait.
    pub async fn take_rename_turn(&self) -> OwnedMutexGuard<()> {
        self.rename_turn.clone().lock_owned().await
    }

    /// Size of a share in bytes.
    pub fn size_of(&self, share: Share) -> u64 {
        units_of(share, self.units) as u64 * UNIT
    }

    /// What is left of a share, in bytes.
    pub fn left_of(&self, share: Share) -> u64 {
        self.semaphore(share).available_permits() as u64 * UNIT
    }

    /// Size of the pool in bytes.
    pub fn size(&self) -> u64 {
        self.units as u64 * UNIT
    }

    fn semaphore(&self, share: Share) -> &Arc<Semaphore> {
        match share {
            Share::ReadAhead => &self.read_ahead,
            Share::Requests => &self.requests,
            Share::GrownParts => &self.grown_parts,
            Share::Renames => &self.renames,
        }
    }

    /// Resolves as soon as another upload waits for the pool.
    pub async fn wait_for_pressure(&self) {
        // The sender is here, so this can't fail.
        let _ = self
            .waiting
            .subscribe()
            .wait_for(|waiting| *waiting > 0)
            .await;
    }

    fn claim(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let units = to_units(bytes)?;
        if let Ok(permits) = self.all.clone().try_acquire_many_owned(units) {
            return Some(permits);
        }
        self.buffers().spare.clear();
        self.all.clone().try_acquire_many_owned(units).ok()
    }

    /// A buffer for one part; its contents are unspecified. The caller must hold a reservation for
    /// it.
    pub fn buffer(&self, size: usize) -> std::io::Result<Buffer> {
        let mut buffers = self.buffers();
        let spare = buffers.spare.iter();
        let pages = match spare
            .enumerate()
            .find(|(_, (pages, _))| pages.len() == size)
        {
            Some((index, _)) => buffers.spare.swap_remove(index).0,
            None => MmapMut::map_anon(size)?,
        };
        buffers.in_use += 1;
        Ok(Buffer {
            pages: Some(pages),
            home: self.clone(),
        })
    }

    /// Bytes that are reserved, without those that are only kept for later.
    pub fn used(&self) -> u64 {
        let buffers = self.buffers();
        let spare: usize = buffers
            .spare
            .iter()
            .map(|(_, kept)| kept.num_permits())
            .sum();
        drop(buffers);
        let taken = self.units - self.all.available_permits();
        taken.saturating_sub(spare) as u64 * UNIT
    }

    fn buffers(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Permits for this many bytes; `None` if no semaphore has that many.
fn to_units(bytes: u64) -> Option<u32> {
    u32::try_from(bytes.div_ceil(UNIT)).ok()
}

/// The part of all permits that a share has.
fn units_of(share: Share, all: usize) -> usize {
    match share {
        Share::ReadAhead => all * 3 / 8,
        Share::Requests | Share::Renames => all / 8,
        Share::GrownParts => all / 4,
    }
}

/// A reservation that is waited for.
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

    /// Without the share of renames, which wait for the store only.
    #[tokio::test]
    async fn the_shares_of_clients_together_leave_a_part() {
        let pool = BufferPool::new(64 * UNIT);
        let mut held = Vec::new();
        for share in [Share::ReadAhead, Share::Requests, Share::GrownParts] {
            held.extend(std::iter::from_fn(|| pool.try_take_share(share, UNIT)));
        }
        assert_eq!(pool.all.available_permits(), 16);
        held.extend(std::iter::from_fn(|| {
            pool.try_take_share(Share::Renames, UNIT)
        }));
        assert_eq!(pool.all.available_permits(), 8);
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
