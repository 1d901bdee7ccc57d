//! Which ranges of an object to fetch for the READs that come: the pure half of a download.
//!
//! Invariant: `have` is fetched or being fetched, without a hole. The window grows with what was
//! read in sequence and falls back to nothing on a seek, so that a stream gets megabytes ahead while a
//! READ of 4 KiB somewhere fetches 4 KiB.

use std::ops::Range;

/// A READ at the very beginning is taken for the start of a stream of at least this length in bytes.
pub const FIRST_BLOCK: u64 = 256 * 1024;
/// Smallest range worth a request of its own once reading is sequential, in bytes.
const MIN_BLOCK: u64 = 64 * 1024;
/// Largest range in bytes: at 90 MB/s a connection, as S3 gives, long enough to hide the round trip.
const MAX_BLOCK: u64 = 4 * 1024 * 1024;
/// The window never reaches further ahead, in bytes: eight ranges in flight.
const MAX_AHEAD: u64 = 32 * 1024 * 1024;
/// Kept behind the last READ, in bytes: the kernel of an sshfs client asks a little out of order.
const BEHIND: u64 = 256 * 1024;

/// See the module.
pub struct ReadAhead {
    size: u64,
    /// What is fetched or being fetched. The caller moves the end when it fetches what is
    /// [`wanted`](ReadAhead::wanted), or less, and the start when it drops what the window no more
    /// [`keeps`](ReadAhead::keeps).
    pub have: Range<u64>,
    /// Bytes read in sequence since the last seek.
    run: u64,
    /// Where the sequence goes on.
    next: u64,
}

impl ReadAhead {
    /// For an object of this size in bytes.
    pub fn new(size: u64) -> ReadAhead {
        ReadAhead {
            size,
            have: 0..0,
            run: 0,
            next: 0,
        }
    }

    /// Nothing that was fetched is there any more. Where the sequence goes on stays known.
    pub fn forget(&mut self) {
        self.have = self.next..self.next;
    }

    /// Notes a READ of `range`, which lies inside the object. After a jump all that was fetched is void.
    pub fn seek(&mut self, range: &Range<u64>) {
        if range.start < self.have.start || range.start > self.have.end {
            *self = ReadAhead {
                size: self.size,
                have: range.start..range.start,
                run: 0,
                next: range.end,
            };
        } else if range.end > self.next {
            self.run += range.end - self.next.max(range.start);
            self.next = range.end;
        }
    }

    /// The next range to fetch for a READ that ends at `end`, or ahead of it; `None` when enough is under way.
    pub fn wanted(&self, end: u64) -> Option<Range<u64>> {
        let least = if self.have.start == 0 { FIRST_BLOCK } else { 0 };
        let ahead = self.run.max(least).min(MAX_AHEAD);
        let block = if ahead == 0 {
            0
        } else {
            (ahead / 2).max(least).clamp(MIN_BLOCK, MAX_BLOCK)
        };
        let from = self.have.end;
        let target = end.saturating_add(ahead).min(self.size);
        let to = from.saturating_add(block).max(end).min(self.size);
        let worth_it = from < target && (to <= target || target == self.size);
        (from < self.size && (from < end || worth_it)).then_some(from..to)
    }

    /// Is what was fetched as `range` still of use?
    pub fn keeps(&self, range: &Range<u64>) -> bool {
        self.have.start <= range.start
            && range.end <= self.have.end
            && range.end + BEHIND > self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    /// Plays READs and returns what was fetched, checking that each READ was covered.
    fn play(size: u64, reads: impl IntoIterator<Item = Range<u64>>) -> Vec<Range<u64>> {
        let mut window = ReadAhead::new(size);
        let mut fetched = Vec::new();
        for read in reads {
            window.seek(&read);
            while let Some(range) = window.wanted(read.end) {
                assert!(range.start < range.end && range.end <= size, "{range:?}");
                window.have.end = range.end;
                fetched.push(range);
            }
            assert!(
                window.have.start <= read.start && read.end <= window.have.end,
                "{read:?} is not covered"
            );
            assert!(window.have.end - read.end <= MAX_AHEAD + MAX_BLOCK);
        }
        fetched
    }

    fn sequence(from: u64, to: u64, step: u64) -> impl Iterator<Item = Range<u64>> {
        (from..to)
            .step_by(step as usize)
            .map(move |at| at..(at + step).min(to))
    }

    #[test]
    fn a_stream_is_fetched_once_in_growing_ranges() {
        let fetched = play(1024 * MIB, sequence(0, 1024 * MIB, 32768));
        let total: u64 = fetched.iter().map(|range| range.end - range.start).sum();
        assert_eq!(total, 1024 * MIB);
        assert!(fetched.len() < 290, "{} requests", fetched.len());
        assert_eq!(fetched[0], 0..FIRST_BLOCK);
    }

    #[test]
    fn a_small_file_is_one_request() {
        assert_eq!(
            play(10_000, sequence(0, 10_000, 4096)).first(),
            Some(&(0..10_000))
        );
        assert_eq!(play(10_000, sequence(0, 10_000, 4096)).len(), 1);
    }

    #[test]
    fn random_reads_fetch_what_they_ask_for() {
        let reads: Vec<_> = (1..100u64)
            .map(|n| (n * 7919 * 4096) % MIB.pow(2))
            .map(|at| at..at + 4096)
            .collect();
        assert_eq!(play(MIB.pow(2), reads.clone()), reads);
    }

    #[test]
    fn the_end_of_the_file_alone_costs_its_own_bytes() {
        let end = || std::iter::once(100 * MIB - 100..100 * MIB);
        assert!(play(100 * MIB, end()).into_iter().eq(end()));
    }

    #[test]
    fn four_readers_of_quarters_each_ramp_up() {
        for quarter in 0..4u64 {
            let (from, to) = (quarter * 64 * MIB, (quarter + 1) * 64 * MIB);
            let fetched = play(256 * MIB, sequence(from, to, 32768));
            let total: u64 = fetched.iter().map(|range| range.end - range.start).sum();
            assert!(total <= 64 * MIB + MAX_AHEAD + MAX_BLOCK, "{total}");
            assert!(fetched.len() < 60, "{} requests", fetched.len());
        }
    }
}
