//! The SSH window of a channel, which grows as long as it is what the client waits for.
//!
//! A window is how many bytes a client may send before it is allowed more
//! ([RFC 4254 §5.2](https://www.rfc-editor.org/rfc/rfc4254#section-5.2)), so a client moves at most
//! one window in a round trip: half a window, as russh allows more only when less than half is
//! left.
//!
//! The rule: the window grows when the client has used up exactly what it was allowed, and russh
//! then waited for bytes for a good part of the time since it had allowed more. A client with a slow
//! network does not use up its window, a client near by does not let russh wait, and while the store
//! is the slowest of all it is russh that lets the client wait.
//!
//! What lies in a window is in no memory of ours: it is under way, or in the kernel's socket buffer,
//! until the session has room for it. Grown windows are still counted, by [`WindowBudget`], so that
//! the kernel's memory has a limit too.
//!
//! russh has one target for all channels of a connection. So only the window of a channel that is
//! alone on its connection grows, and it is the first size again while there are several. rclone
//! opens a second one for a moment, to ask for a shell.

use crate::transfer::UserLimits;
use russh::ChannelId;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// Size of a new window in bytes.
pub const FIRST_SIZE: u32 = 2 * 1024 * 1024;
/// Size of the largest window in bytes: twice what OpenSSH's client sends without an answer, 64
/// WRITEs of 255 KiB, because only half of a window is under way in a round trip.
const MAX_SIZE: u32 = 32 * 1024 * 1024;
/// A window grows by this factor, or less.
const GROWTH: u32 = 4;
/// Growing by less than this many bytes is not worth it.
const MIN_GROWTH: u32 = 256 * 1024;
/// A window grows by at most this part of what others have left, so that there is always something
/// left.
const MAX_PART: usize = 4;
/// Shorter waits for the client are those of a busy machine.
const MIN_WAIT: Duration = Duration::from_millis(2);
/// A window is too small if russh waited for more than this part of the time.
const WAIT_PART: u32 = 8;
/// Semaphores count KiB.
const UNIT: u32 = 1024;

/// How much all windows of the server together may grow.
#[derive(Clone)]
pub struct WindowBudget(Arc<Semaphore>);

impl WindowBudget {
    /// A budget of this many bytes.
    pub fn new(bytes: u64) -> WindowBudget {
        let units = usize::try_from(bytes / u64::from(UNIT)).unwrap_or(Semaphore::MAX_PERMITS);
        WindowBudget(Arc::new(Semaphore::new(units)))
    }

    /// Takes the bytes for a window to grow by, at most `wanted`: fewer if there is little left for
    /// the user or for all. `None` if it is not worth it.
    fn take(&self, wanted: u32, user: &UserLimits) -> Option<(u32, [OwnedSemaphorePermit; 2])> {
        let of_user = user.windows.available_permits();
        let left = self.0.available_permits().min(of_user);
        let most = u32::try_from(left / MAX_PART).unwrap_or(u32::MAX);
        let units = most.min(wanted / UNIT);
        let bytes = units * UNIT;
        if bytes < MIN_GROWTH.min(wanted) {
            return None;
        }
        let of_all = self.0.clone().try_acquire_many_owned(units).ok()?;
        let of_user = user.windows.clone().try_acquire_many_owned(units).ok()?;
        Some((bytes, [of_all, of_user]))
    }
}

/// The window of a connection's channels.
pub struct Window {
    budget: WindowBudget,
    /// What russh makes of a window when it allows more, in bytes.
    target: u32,
    /// Those that are open.
    channels: HashMap<ChannelId, Usage>,
    /// Of the user who has logged in, once a channel was opened. Kept while the connection lasts:
    /// what its window has grown by counts for the user's next sessions.
    user: Option<Arc<UserLimits>>,
    /// What the window has grown by at most, in bytes, and its memory. Held until the connection
    /// ends, because what was allowed can't be taken back.
    counted: u32,
    grown: Vec<[OwnedSemaphorePermit; 2]>,
}

impl Window {
    /// For a new connection.
    pub fn new(budget: WindowBudget) -> Window {
        Window {
            budget,
            target: FIRST_SIZE,
            channels: HashMap::new(),
            user: None,
            counted: 0,
            grown: Vec::new(),
        }
    }

    /// Called when a channel is opened.
    pub fn open(&mut self, channel: ChannelId, user: Arc<UserLimits>) {
        self.user = Some(user);
        self.channels.insert(channel, Usage::new());
        if self.channels.len() > 1 {
            // russh hears of it only when it has made one more window as large as the last.
            self.target = FIRST_SIZE;
        }
    }

    /// Called when a channel is of no more use.
    pub fn close(&mut self, channel: ChannelId) {
        self.channels.remove(&channel);
    }

    /// Called when russh has made the window of a channel `size` bytes again. Returns the size for
    /// the next time.
    pub fn adjust(&mut self, channel: ChannelId, size: u32) -> u32 {
        if let Some(usage) = self.channels.get_mut(&channel) {
            usage.adjusted_to = Some(size);
        }
        self.target
    }

    /// Records a packet from the client. `waited` is how long russh has waited for the client so
    /// far. Returns the new size if the window is going to grow.
    pub fn record(&mut self, channel: ChannelId, len: usize, waited: Duration) -> Option<u32> {
        let is_alone = self.channels.len() == 1;
        let is_too_small = self.channels.get_mut(&channel)?.record(len, waited);
        if !is_too_small || !is_alone || self.target >= MAX_SIZE {
            return None;
        }
        let target = self.target.saturating_mul(GROWTH).min(MAX_SIZE);
        let missing = (target - FIRST_SIZE).saturating_sub(self.counted);
        if missing > 0 {
            let (bytes, permits) = self.budget.take(missing, self.user.as_deref()?)?;
            self.counted += bytes;
            self.grown.push(permits);
        }
        self.target = target.min(FIRST_SIZE + self.counted);
        Some(self.target)
    }
}

/// How a channel makes use of its window.
struct Usage {
    /// Bytes received so far.
    received: u64,
    /// How many the client may send in all.
    allowed: u64,
    /// The same before more was allowed for the last time, and when that was.
    allowed_before: u64,
    allowed_at: Instant,
    /// What russh made of the window with the packet that comes next to [`Usage::record`].
    adjusted_to: Option<u32>,
    /// [`Signals::waited`](super::transport::Signals::waited) at the last packet.
    waited: Duration,
}

impl Usage {
    fn new() -> Usage {
        Usage {
            received: 0,
            allowed: u64::from(FIRST_SIZE),
            allowed_before: u64::from(FIRST_SIZE),
            allowed_at: Instant::now(),
            adjusted_to: None,
            waited: Duration::ZERO,
        }
    }

    /// Returns true if the window has held the client up.
    fn record(&mut self, len: usize, waited: Duration) -> bool {
        let start = self.received;
        self.received += len as u64;
        let wait = waited.saturating_sub(self.waited);
        self.waited = waited;
        // A client can send this packet only since it was allowed more, and had to wait for that.
        let is_first = start == self.allowed_before;
        let is_long = wait >= MIN_WAIT && wait * WAIT_PART >= self.allowed_at.elapsed();
        if let Some(size) = self.adjusted_to.take() {
            self.allowed_before = self.allowed;
            self.allowed = self.received + u64::from(size);
            self.allowed_at = Instant::now();
        }
        is_first && is_long
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::BufferPool;

    const PACKET: u32 = 32 * 1024;
    const MIB: u64 = 1024 * 1024;

    /// russh and its client, on paused time.
    struct Play {
        usage: Usage,
        /// What is left of the window, as russh counts.
        left: u32,
        waited: Duration,
        /// Bytes that the client has sent, and that it knows it may send.
        sent: u64,
        known: u64,
    }

    impl Play {
        fn new() -> Play {
            Play {
                usage: Usage::new(),
                left: FIRST_SIZE,
                waited: Duration::ZERO,
                sent: 0,
                known: u64::from(FIRST_SIZE),
            }
        }

        /// A packet for which russh waits, and which the session then takes its time for.
        async fn packet(&mut self, len: u32, wait: Duration, work: Duration) -> bool {
            tokio::time::advance(wait).await;
            self.waited += wait;
            self.left -= len;
            if self.left < FIRST_SIZE / 2 {
                self.usage.adjusted_to = Some(FIRST_SIZE);
                self.left = FIRST_SIZE;
            }
            tokio::time::advance(work).await;
            self.sent += u64::from(len);
            self.usage.record(len as usize, self.waited)
        }

        /// Sends 16 MiB, as much as the client may at a time. It hears that it may send more after
        /// the time `wait`. Returns how often the window has held it up.
        async fn stream(&mut self, wait: Duration, work: Duration) -> u32 {
            let mut late = 0;
            while self.sent < 16 * MIB {
                let is_used_up = self.sent == self.known;
                let is_late = match is_used_up {
                    true => self.packet(PACKET, wait, work).await,
                    false => self.packet(PACKET, Duration::ZERO, work).await,
                };
                if is_used_up {
                    self.known = self.usage.allowed;
                }
                late += u32::from(is_late);
            }
            late
        }
    }

    const ROUND_TRIP: Duration = Duration::from_millis(100);
    const QUICK: Duration = Duration::from_micros(100);

    #[tokio::test(start_paused = true)]
    async fn a_distant_client_that_uses_its_window_up_is_held_up() {
        let mut play = Play::new();
        let late = play.stream(ROUND_TRIP, QUICK).await;
        assert!(late >= 5, "{late}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_near_by_is_not() {
        let mut play = Play::new();
        let wait = Duration::from_micros(50);
        assert_eq!(play.stream(wait, QUICK).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn nor_is_one_whose_store_is_slower_than_the_way() {
        let mut play = Play::new();
        // A MiB takes 1.6 s.
        let work = Duration::from_millis(50);
        let late = play.stream(ROUND_TRIP, work).await;
        assert_eq!(late, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn nor_is_one_with_a_slow_network() {
        let mut play = Play::new();
        for _ in 0..1000 {
            // Of a size that does not end where the window does.
            let is_late = play.packet(PACKET - 100, ROUND_TRIP, QUICK).await;
            assert!(!is_late);
        }
    }

    #[tokio::test]
    async fn the_budget_is_shared_and_never_exceeded() {
        let pool = BufferPool::new(256 * MIB);
        let budget = WindowBudget::new(pool.size());
        let one = UserLimits::new(1, &pool);
        let mut held = Vec::new();
        while let Some(taken) = budget.take(MAX_SIZE - FIRST_SIZE, &one) {
            held.push(taken);
        }
        assert_eq!(held[0].0, MAX_SIZE - FIRST_SIZE);
        let of_one: u64 = held.iter().map(|(bytes, _)| u64::from(*bytes)).sum();
        assert!(of_one <= 192 * MIB, "{of_one}");
        let another = UserLimits::new(1, &pool);
        let (bytes, permits) = budget.take(MAX_SIZE - FIRST_SIZE, &another).unwrap();
        assert!(u64::from(bytes) >= 16 * MIB, "{bytes}");
        drop((held, permits));
        assert_eq!(budget.0.available_permits() as u64 * 1024, 256 * MIB);
    }
}
