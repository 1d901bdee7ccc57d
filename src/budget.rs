//! The memory promise: one pool of bytes for the whole server, `--buffer-memory`.
//!
//! Invariants: uploads may wait, because what they wait for (parts in flight) ends by itself; downloads
//! never wait and never hold more than half, because their blocks stay until a client fetches them.
//! So no number of slow clients can stop an upload, and nobody waits in a circle.

use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Permits are counted in KiB: a semaphore hands out at most `u32::MAX` at once.
const UNIT: u64 = 1024;

/// See the module.
pub struct Budget {
    total: u64,
    all: Arc<Semaphore>,
    read_ahead: Arc<Semaphore>,
}

/// Bytes taken from the pool, given back when dropped.
pub struct Taken {
    _permits: (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>),
}

impl Budget {
    /// A pool of so many bytes.
    pub fn new(total: u64) -> Budget {
        let units = (total / UNIT) as usize;
        Budget { total, all: Arc::new(Semaphore::new(units)), read_ahead: Arc::new(Semaphore::new(units / 2)) }
    }

    /// Size of the pool in bytes.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes now free.
    pub fn free(&self) -> u64 {
        self.all.available_permits() as u64 * UNIT
    }

    /// Waits its turn for the bytes of one part. `None` when it asks for more than the pool holds.
    pub async fn take(&self, bytes: u64) -> Option<Taken> {
        let units = units(bytes).filter(|units| u64::from(*units) * UNIT <= self.total)?;
        let permit = self.all.clone().acquire_many_owned(units).await.ok()?;
        Some(Taken { _permits: (permit, None) })
    }

    /// Takes the bytes of a read-ahead block if they are free now.
    pub fn try_read_ahead(&self, bytes: u64) -> Option<Taken> {
        let units = units(bytes)?;
        let share = self.read_ahead.clone().try_acquire_many_owned(units).ok()?;
        let permit = self.all.clone().try_acquire_many_owned(units).ok()?;
        Some(Taken { _permits: (permit, Some(share)) })
    }
}

fn units(bytes: u64) -> Option<u32> {
    u32::try_from(bytes.div_ceil(UNIT)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn downloads_leave_half_to_uploads() {
        let budget = Budget::new(64 * UNIT);
        let held: Vec<_> = std::iter::from_fn(|| budget.try_read_ahead(10 * UNIT)).collect();
        assert_eq!(held.len(), 3);
        assert_eq!(budget.free(), 34 * UNIT);
        let upload = budget.take(34 * UNIT).await.unwrap();
        assert_eq!(budget.free(), 0);
        drop((held, upload));
        assert_eq!(budget.free(), 64 * UNIT);
    }

    #[tokio::test]
    async fn more_than_the_pool_is_refused_at_once() {
        assert!(Budget::new(UNIT).take(UNIT + 1).await.is_none());
    }
}
