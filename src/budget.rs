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
    units: usize,
    all: Arc<Semaphore>,
    read_ahead: Arc<Semaphore>,
}

/// Bytes taken from the pool, given back when dropped.
pub type Taken = (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>);

impl Budget {
    /// A pool of so many bytes.
    pub fn new(total: u64) -> Budget {
        let units = (total / UNIT) as usize;
        Budget { units, all: Arc::new(Semaphore::new(units)), read_ahead: Arc::new(Semaphore::new(units / 2)) }
    }

    /// Waits its turn for the bytes of one part. `None` when it asks for more than the pool holds.
    pub async fn take(&self, bytes: u64) -> Option<Taken> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).ok().filter(|units| *units as usize <= self.units)?;
        Some((self.all.clone().acquire_many_owned(units).await.ok()?, None))
    }

    /// Takes the bytes of a read-ahead block if they are free now.
    pub fn try_read_ahead(&self, bytes: u64) -> Option<Taken> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).ok()?;
        let share = self.read_ahead.clone().try_acquire_many_owned(units).ok()?;
        Some((self.all.clone().try_acquire_many_owned(units).ok()?, Some(share)))
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
    async fn more_than_the_pool_is_refused_at_once() {
        assert!(Budget::new(UNIT).take(UNIT + 1).await.is_none());
    }
}
