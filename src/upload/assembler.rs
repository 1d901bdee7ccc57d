//! Writes at offsets become parts in order: the pure half of an upload, without clock, task or store.
//!
//! Invariants: the parts cut so far are exactly the bytes `0..start`; `buffer` holds what came from
//! `start` on; a byte that was cut is never changed. Every refused write leaves the state as it was.

use crate::store::{MAX_PARTS, MIN_PART};
use bytes::Bytes;
use std::collections::BTreeMap;

/// How far beyond the contiguous end a write may begin. No client that was watched writes out of order;
/// those that could (parallel writers) stay within their window of requests.
pub const REORDER_WINDOW: u64 = 1024 * 1024;
/// The buffer grows in steps from here, so that a small file costs little.
const FIRST_ALLOCATION: usize = 64 * 1024;

/// How large each part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartSizes {
    /// Size of the first parts in bytes, at least [`MIN_PART`].
    pub first: u64,
    /// No part is larger, in bytes.
    pub cap: u64,
    /// The size doubles after every so many parts; 0 keeps all parts equal, as Cloudflare R2 demands.
    pub double_every: u32,
}

impl Default for PartSizes {
    /// 5 MiB, doubled every 1,000 parts up to 64 MiB: 10,000 parts hold 448 GiB.
    fn default() -> Self {
        PartSizes { first: MIN_PART, cap: 64 * 1024 * 1024, double_every: 1000 }
    }
}

impl PartSizes {
    /// Size in bytes of the part with this number, counted from 1.
    pub fn of(&self, number: u32) -> u64 {
        let doublings = (number.saturating_sub(1)).checked_div(self.double_every).unwrap_or(0).min(32);
        (self.first << doublings).min(self.cap.max(self.first))
    }

    /// Largest object in bytes that [`MAX_PARTS`] parts hold.
    pub fn reach(&self) -> u64 {
        (1..=MAX_PARTS).map(|number| self.of(number)).sum()
    }
}

/// Why a write is refused. The offsets tell the operator what the client did.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The bytes left RAM already.
    #[error(
        "offset {offset} was already sent to the store, which has everything up to {start}: it can't be changed now"
    )]
    Sent {
        /// Of the write.
        offset: u64,
        /// First offset that can still be written.
        start: u64,
    },
    /// Too far ahead of what is there.
    #[error("offset {offset} leaves a gap after {end} that is more than {REORDER_WINDOW} bytes long")]
    Ahead {
        /// Of the write.
        offset: u64,
        /// The contiguous end.
        end: u64,
    },
}

/// See the module.
pub struct Assembler {
    sizes: PartSizes,
    /// Number of the part that `buffer` will become.
    number: u32,
    start: u64,
    buffer: Vec<u8>,
    /// Contiguous bytes in `buffer`, counted from its beginning.
    ready: usize,
    /// Ranges in `buffer` that came early, beyond `ready`: from → to. Never adjacent to `ready`.
    early: BTreeMap<usize, usize>,
}

impl Assembler {
    /// For a new object.
    pub fn new(sizes: PartSizes) -> Assembler {
        Assembler { sizes, number: 1, start: 0, buffer: Vec::new(), ready: 0, early: BTreeMap::new() }
    }

    /// First offset still in RAM: everything below is cut into parts.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Every byte below this offset is here or in a part.
    pub fn end(&self) -> u64 {
        self.start + self.ready as u64
    }

    /// The furthest byte that was written, gaps included.
    pub fn high(&self) -> u64 {
        self.start + self.buffer.len() as u64
    }

    /// Is a byte missing between the contiguous end and what came early?
    pub fn has_gap(&self) -> bool {
        !self.early.is_empty()
    }

    /// Number of the next part to be cut, from 1.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Size in bytes of the part being filled.
    pub fn part_size(&self) -> u64 {
        self.sizes.of(self.number)
    }

    /// True when the part is complete: [`Assembler::cut`] before more is written.
    pub fn is_full(&self) -> bool {
        self.ready as u64 >= self.part_size()
    }

    /// True when more than one part is buffered, as after bytes that came early.
    pub fn is_overfull(&self) -> bool {
        self.ready as u64 > self.part_size()
    }

    /// May a write at this offset come now? Says why not.
    pub fn check(&self, offset: u64) -> Result<(), Refused> {
        if offset < self.start {
            return Err(Refused::Sent { offset, start: self.start });
        }
        if offset > self.end() + REORDER_WINDOW {
            return Err(Refused::Ahead { offset, end: self.end() });
        }
        Ok(())
    }

    /// Takes bytes at an offset, up to the end of the part where they are in order. Returns how many were
    /// taken; when fewer than given, the part [`is_full`](Assembler::is_full), or the rest is early: cut or check.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<usize, Refused> {
        self.check(offset)?;
        let at = (offset - self.start) as usize;
        let in_order = at <= self.ready;
        let limit = if in_order { self.part_size() } else { self.part_size() + 2 * REORDER_WINDOW };
        let room = (limit as usize).saturating_sub(at);
        let taken = data.get(..room).unwrap_or(data);
        let to = at + taken.len();
        self.reserve(to, limit as usize);
        if at == self.buffer.len() {
            self.buffer.extend_from_slice(taken);
        } else {
            if to > self.buffer.len() {
                self.buffer.resize(to, 0);
            }
            if let Some(place) = self.buffer.get_mut(at..to) {
                place.copy_from_slice(taken);
            }
        }
        if in_order {
            self.ready = self.ready.max(to);
            self.absorb();
        } else if !taken.is_empty() {
            self.remember_early(at, to);
        }
        Ok(taken.len())
    }

    /// Takes the finished part out: its number and its bytes.
    pub fn cut(&mut self) -> (u32, Bytes) {
        let size = (self.part_size() as usize).min(self.ready);
        let rest = self.buffer.split_off(size);
        let part = std::mem::replace(&mut self.buffer, rest);
        self.start += size as u64;
        self.ready -= size;
        self.early = std::mem::take(&mut self.early).into_iter().map(|(from, to)| (from - size, to - size)).collect();
        let number = self.number;
        self.number += 1;
        (number, part.into())
    }

    /// Passes over bytes that become a part without coming through RAM, copied in the store: the part's number.
    /// Only where nothing is buffered.
    pub fn skip(&mut self, bytes: u64) -> u32 {
        debug_assert!(self.buffer.is_empty());
        self.start += bytes;
        let number = self.number;
        self.number += 1;
        number
    }

    /// Drops what lies beyond `size`. False, and nothing done, when that was cut already or never came.
    pub fn truncate(&mut self, size: u64) -> bool {
        if size < self.start || size > self.end() {
            return false;
        }
        self.ready = (size - self.start) as usize;
        self.buffer.truncate(self.ready);
        self.early.clear();
        true
    }

    /// The contiguous bytes in RAM from this offset on, at most `len`; `None` for offsets that aren't in RAM.
    pub fn peek(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let at = usize::try_from(offset.checked_sub(self.start)?).ok().filter(|at| *at < self.ready)?;
        self.buffer.get(at..self.ready.min(at.saturating_add(len)))
    }

    /// Room up to `to`: doubling, but never beyond `limit`, so that a full part wastes nothing.
    fn reserve(&mut self, to: usize, limit: usize) {
        if to > self.buffer.capacity() {
            let wanted = to.max(2 * self.buffer.capacity()).max(FIRST_ALLOCATION).min(limit.max(to));
            self.buffer.reserve_exact(wanted - self.buffer.len());
        }
    }

    /// Early ranges that the contiguous bytes have reached are part of them.
    fn absorb(&mut self) {
        while let Some(first) = self.early.first_entry().filter(|first| *first.key() <= self.ready) {
            self.ready = self.ready.max(first.remove());
        }
    }

    fn remember_early(&mut self, mut from: usize, mut to: usize) {
        let touching: Vec<usize> = self.early.range(..=to).filter(|(_, end)| **end >= from).map(|(k, _)| *k).collect();
        for key in touching {
            from = from.min(key);
            to = to.max(self.early.remove(&key).unwrap_or(to));
        }
        self.early.insert(from, to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: PartSizes = PartSizes { first: 1000, cap: 4000, double_every: 3 };

    /// Every part that is complete.
    fn cut_all(assembler: &mut Assembler, parts: &mut Vec<Bytes>) {
        while assembler.is_full() {
            let (number, body) = assembler.cut();
            assert_eq!(number as usize, parts.len() + 1);
            assert_eq!(body.len() as u64, TINY.of(number));
            parts.push(body);
        }
    }

    fn write_all(assembler: &mut Assembler, mut offset: u64, mut data: &[u8], parts: &mut Vec<Bytes>) {
        while !data.is_empty() {
            cut_all(assembler, parts);
            let taken = assembler.write(offset, data).unwrap();
            assert!(taken > 0 || assembler.is_full());
            offset += taken as u64;
            data = &data[taken..];
        }
    }

    /// Random pieces of a file, shuffled within the window, against the file itself.
    #[test]
    fn whatever_the_order_the_parts_are_the_file() {
        use rand::{RngExt, SeedableRng, seq::SliceRandom};
        for seed in 0..300 {
            let mut random = rand::rngs::StdRng::seed_from_u64(seed);
            let file: Vec<u8> = (0..random.random_range(0..40_000u32)).map(|_| random.random()).collect();
            let mut pieces = Vec::new();
            let mut at = 0;
            while at < file.len() {
                let len = random.random_range(1..1500).min(file.len() - at);
                pieces.push(at..at + len);
                at += len;
            }
            pieces.chunks_mut(random.random_range(1..9)).for_each(|near| near.shuffle(&mut random));
            let mut assembler = Assembler::new(TINY);
            let mut parts = Vec::new();
            for piece in pieces {
                // Sometimes the bytes come twice, the first time wrong: what is in RAM may change.
                let (mut at, mut data) = (piece.start as u64, &file[piece]);
                if random.random_bool(0.2) && !assembler.is_full() {
                    let taken = assembler.write(at, &vec![0; data.len()]).unwrap();
                    assert_eq!(assembler.write(at, data), Ok(taken));
                    (at, data) = (at + taken as u64, &data[taken..]);
                }
                write_all(&mut assembler, at, data, &mut parts);
            }
            assert!(!assembler.has_gap(), "seed {seed}");
            assert_eq!(assembler.end(), assembler.high());
            cut_all(&mut assembler, &mut parts);
            parts.push(assembler.cut().1);
            assert!(parts.concat() == file, "seed {seed}");
        }
    }

    #[test]
    fn refused_writes_change_nothing() {
        let mut assembler = Assembler::new(TINY);
        let mut parts = Vec::new();
        write_all(&mut assembler, 0, &[7; 2500], &mut parts);
        assert_eq!((assembler.start(), assembler.end()), (2000, 2500));
        assert_eq!(assembler.write(1999, b"x"), Err(Refused::Sent { offset: 1999, start: 2000 }));
        let far = 2501 + REORDER_WINDOW;
        assert_eq!(assembler.write(far, b"x"), Err(Refused::Ahead { offset: far, end: 2500 }));
        assert_eq!((assembler.end(), assembler.high()), (2500, 2500));
    }

    #[test]
    fn sizes_double_up_to_the_cap() {
        let sizes: Vec<u64> = (1..=9).map(|number| TINY.of(number)).collect();
        assert_eq!(sizes, [1000, 1000, 1000, 2000, 2000, 2000, 4000, 4000, 4000]);
        assert_eq!(TINY.of(10_000), 4000);
        let equal = PartSizes { double_every: 0, ..TINY };
        assert_eq!(equal.of(10_000), 1000);
        assert_eq!(PartSizes::default().of(u32::MAX), 64 << 20);
        assert_eq!(PartSizes::default().reach() >> 30, 448);
    }

    #[test]
    fn the_buffer_never_outgrows_the_part() {
        let mut assembler = Assembler::new(PartSizes::default());
        for block in 0..160u64 {
            assert_eq!(assembler.write(block * 32768, &[1; 32768]), Ok(32768));
            assert!(assembler.buffer.capacity() as u64 <= MIN_PART);
        }
        assert!(assembler.is_full() && !assembler.is_overfull());
        let (_, body) = assembler.cut();
        assert_eq!((body.len() as u64, assembler.buffer.capacity()), (MIN_PART, 0));
    }

    #[test]
    fn truncating_forgets_what_came_early() {
        let mut assembler = Assembler::new(TINY);
        assembler.write(0, &[1; 100]).unwrap();
        assembler.write(200, &[1; 100]).unwrap();
        assert!(assembler.has_gap() && !assembler.truncate(150));
        assert!(assembler.truncate(50));
        assert!(!assembler.has_gap());
        assert_eq!((assembler.end(), assembler.high()), (50, 50));
        assert_eq!(assembler.peek(40, 100), Some(&[1; 10][..]));
        assert_eq!(assembler.peek(50, 1), None);
    }
}
