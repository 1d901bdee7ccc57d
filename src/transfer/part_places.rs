//! How many parts of one upload may be in flight: as many as arrive fast.
//!
//! On a fast link the number grows to its limit with the first parts. On a slow one further parts
//! make nothing faster, and only take longer side by side; and if a connection breaks, more is sent
//! again. No clock, task or store: the upload task says how long a part took.

use std::time::Duration;

/// How many an upload begins with, and always has: one leaves while the other waits for its answer.
const MIN_PARTS: usize = 2;
/// Limit on the parts in flight: enough to fill a link to a distant S3, little enough for one
/// session's memory.
const MAX_PARTS: usize = 8;
/// Limit on their bytes, once parts have grown; [`MIN_PARTS`] are always allowed.
const MAX_BYTES: u64 = 40 * 1024 * 1024;
/// How many more may be in flight after a part that was fast.
const STEP: usize = 2;
/// A part is fast if it takes at most this time: one of 5 MiB then has 260 kB/s for itself.
const FAST: Duration = Duration::from_secs(20);

/// See the module.
pub struct PartPlaces {
    places: usize,
}

impl Default for PartPlaces {
    fn default() -> PartPlaces {
        PartPlaces { places: MIN_PARTS }
    }
}

impl PartPlaces {
    /// How many parts of this size, in bytes, may be in flight.
    pub fn limit(&self, size: u64) -> usize {
        let fitting = (MAX_BYTES / size) as usize;
        self.places.min(fitting).max(MIN_PARTS)
    }

    /// Notes how long a part took.
    pub fn note_part(&mut self, took: Duration) {
        self.places = match took <= FAST {
            true => (self.places + STEP).min(MAX_PARTS),
            false => (self.places - 1).max(MIN_PARTS),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    /// Sends parts of 5 MiB over a link of this many bytes a second, whose round trip takes this
    /// time, until as many are done. Returns how many may be in flight then.
    fn send(parts: usize, bytes_per_second: u64, round_trip: Duration) -> usize {
        let mut places = PartPlaces::default();
        for _ in 0..parts {
            let side_by_side = places.limit(5 * MIB) as u64;
            let share = Duration::from_secs(5 * MIB * side_by_side) / bytes_per_second as u32;
            places.note_part(share.max(round_trip * 10));
        }
        places.limit(5 * MIB)
    }

    #[test]
    fn a_fast_link_has_eight_parts_soon_and_a_slow_one_two() {
        let near = Duration::from_millis(1);
        let distant = Duration::from_millis(100);
        for round_trip in [near, distant] {
            assert_eq!(send(0, 100_000_000, round_trip), 2);
            assert_eq!(send(1, 100_000_000, round_trip), 4);
            assert_eq!(send(3, 100_000_000, round_trip), 8);
            assert_eq!(send(100, 3_000_000, round_trip), 8);
            assert_eq!(send(100, 60_000, round_trip), 2);
        }
    }

    #[test]
    fn a_link_that_becomes_slow_has_fewer_and_then_more_again() {
        let mut places = PartPlaces::default();
        for (took, limit) in [
            (1, 4),
            (1, 6),
            (21, 5),
            (60, 4),
            (60, 3),
            (60, 2),
            (60, 2),
            (20, 4),
        ] {
            places.note_part(Duration::from_secs(took));
            assert_eq!(places.limit(5 * MIB), limit);
        }
    }

    #[test]
    fn large_parts_are_fewer() {
        let mut places = PartPlaces::default();
        for _ in 0..10 {
            places.note_part(Duration::ZERO);
        }
        let limits = [1, 5 * MIB, 10 * MIB, 20 * MIB, 64 * MIB, 5 << 30];
        let limits = limits.map(|size| places.limit(size));
        assert_eq!(limits, [8, 8, 4, 2, 2, 2]);
    }
}
