//! Which ranges of an object to fetch for the READs that arrive: the pure half of a download.
//!
//! The rule: how far ahead to fetch is how much was read in sequence since the last jump, so that a
//! stream gets megabytes ahead while a READ of 4 KiB somewhere fetches 4 KiB. What a READ needs is
//! always fetched; ahead of need only whole blocks are, each half as long as the distance ahead.
//!
//! A READ at the very beginning is taken for the start of a stream: its blocks are eight times as
//! long as what was read, so that a file of 3 MB takes three requests. Where a jump came before,
//! such blocks would be a waste, because more jumps are likely.
//!
//! Invariant: `fetched` is here or on its way, without a hole.

use std::ops::Range;

/// A READ at the very beginning is taken for the start of a stream of at least this length in
/// bytes.
pub const FIRST_BLOCK: u64 = 256 * 1024;
/// Smallest range worth a request of its own once reading is sequential, in bytes.
const MIN_BLOCK: u64 = 64 * 1024;
/// Largest range in bytes. S3 gives some 90 MB/s a connection.
const MAX_BLOCK: u64 = 8 * 1024 * 1024;
/// Limit on the distance ahead, in bytes. The last block of a stream may begin there, so that up to
/// five ranges are in flight.
const MAX_AHEAD: u64 = 32 * 1024 * 1024;
/// A block of a stream is this many times as long as what was read of it before.
const STREAM_GROWTH: u64 = 8;
/// Kept behind the last READ, in bytes: the kernel of an sshfs client asks a little out of order.
const BEHIND: u64 = 256 * 1024;

/// See the module.
pub struct ReadAhead {
    /// Of the object, in bytes.
    size: u64,
    /// What is here or on its way. The caller moves the end when it fetches
    /// [`next_fetch`](ReadAhead::next_fetch), or less, and the start when it drops what is no
    /// longer [`covered`](ReadAhead::covers).
    pub fetched: Range<u64>,
    /// Bytes read in sequence since the last jump.
    sequential: u64,
    /// Where the sequence goes on.
    next: u64,
    /// Did the sequence begin at the beginning of the object?
    is_stream: bool,
}

impl ReadAhead {
    /// For an object of this size in bytes, of which this much of its beginning was fetched
    /// already.
    pub fn new(size: u64, fetched: u64) -> ReadAhead {
        ReadAhead {
            size,
            fetched: 0..fetched,
            sequential: 0,
            next: 0,
            is_stream: true,
        }
    }

    /// Records that everything fetched was dropped. Where the sequence goes on stays known.
    pub fn forget(&mut self) {
        self.fetched = self.next..self.next;
    }

    /// Records a READ of `range`, which lies inside the object. After a jump everything fetched is
    /// void.
    pub fn record_read(&mut self, range: &Range<u64>) {
        let is_jump = range.start < self.fetched.start || range.start > self.fetched.end;
        if is_jump {
            self.fetched = range.start..range.start;
            self.sequential = 0;
            self.next = range.end;
            self.is_stream = range.start == 0;
        } else if range.end > self.next {
            self.sequential += range.end - self.next.max(range.start);
            self.next = range.end;
        }
    }

    /// The next range to fetch for a READ that ends at `needed`, or ahead of it; `None` if enough
    /// is under way.
    pub fn next_fetch(&self, needed: u64) -> Option<Range<u64>> {
        let start = self.fetched.end;
        if start >= self.size {
            return None;
        }
        let block_end = start.saturating_add(self.block_len());
        let end = block_end.max(needed).min(self.size);
        let target = needed.saturating_add(self.distance_ahead()).min(self.size);
        let is_needed = start < needed;
        let is_in_reach = start < target;
        let is_whole = end <= target || target == self.size;
        if is_needed || (is_in_reach && (is_whole || self.is_stream)) {
            Some(start..end)
        } else {
            None
        }
    }

    /// How far ahead of need to fetch, in bytes.
    fn distance_ahead(&self) -> u64 {
        self.sequential.min(MAX_AHEAD)
    }

    /// Length of the next block, in bytes.
    fn block_len(&self) -> u64 {
        match (self.is_stream, self.sequential) {
            (true, sequential) => (sequential * STREAM_GROWTH).clamp(FIRST_BLOCK, MAX_BLOCK),
            (false, 0) => 0,
            (false, sequential) => (sequential / 2).clamp(MIN_BLOCK, MAX_BLOCK),
        }
    }

    /// Is what was fetched as `range` still of use?
    pub fn covers(&self, range: &Range<u64>) -> bool {
        let is_fetched = self.fetched.start <= range.start && range.end <= self.fetched.end;
        is_fetched && range.end + BEHIND > self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    /// Plays READs and returns what was fetched, checking that each READ was covered.
    fn play(size: u64, reads: impl IntoIterator<Item = Range<u64>>) -> Vec<Range<u64>> {
        let mut read_ahead = ReadAhead::new(size, 0);
        let mut fetched = Vec::new();
        for read in reads {
            read_ahead.record_read(&read);
            while let Some(range) = read_ahead.next_fetch(read.end) {
                assert!(range.start < range.end && range.end <= size, "{range:?}");
                read_ahead.fetched.end = range.end;
                fetched.push(range);
            }
            assert!(
                read_ahead.fetched.start <= read.start && read.end <= read_ahead.fetched.end,
                "{read:?} is not covered"
            );
            assert!(read_ahead.fetched.end - read.end <= MAX_AHEAD + MAX_BLOCK);
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
        assert!(fetched.len() <= 150, "{} requests", fetched.len());
        assert_eq!(fetched[0], 0..FIRST_BLOCK);
    }

    #[test]
    fn a_file_of_3_mb_is_three_requests() {
        for step in [4096, 32768, 261_120] {
            let fetched = play(3_000_000, sequence(0, 3_000_000, step));
            assert!(fetched.len() <= 3, "READs of {step} bytes: {fetched:?}");
        }
    }

    #[test]
    fn a_look_at_the_beginning_fetches_the_first_block_alone() {
        let fetched = play(1024 * MIB, sequence(0, 128 * 1024, 4096));
        assert_eq!(fetched.len(), 1);
        assert_eq!(fetched[0], 0..FIRST_BLOCK);
    }

    #[test]
    fn a_megabyte_after_a_jump_costs_no_more_than_two() {
        let fetched = play(1024 * MIB, sequence(500 * MIB, 501 * MIB, 32768));
        let total: u64 = fetched.iter().map(|range| range.end - range.start).sum();
        assert!(total <= 2 * MIB, "{total}");
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
