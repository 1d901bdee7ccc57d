//! Writes at offsets become parts in order: the pure half of an upload, without clock, task or store.
//!
//! Invariants: the parts cut so far are exactly the bytes `0..start`; `buffer` holds what came from
//! `start` on; a byte that was cut is never changed. Every refused write leaves the state as it was.

use crate::budget::{Budget, Buffer};
use crate::store::{MAX_PARTS, MIN_PART};
use bytes::Bytes;
use std::collections::BTreeMap;

/// How far beyond the contiguous end a write may begin. No client that was watched writes out of order;
/// those that could (parallel writers) stay within their window of requests.
pub const REORDER_WINDOW: u64 = 1024 * 1024;
/// A part up to this size, in bytes, leaves as a copy: who keeps it for long shall not keep pages for a whole part.
const SMALL: usize = 64 * 1024;

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
}

/// See the module.
pub struct Assembler {
    sizes: PartSizes,
    /// Parts cut so far.
    parts: u32,
    /// First offset still in RAM: everything below is cut into parts.
    start: u64,
    budget: Budget,
    /// Room for the part being filled, and for what may come early.
    buffer: Option<Buffer>,
    /// Where the furthest byte in `buffer` ends.
    len: usize,
    /// Ranges of `buffer` that were written, from → to. No two touch, and the last one ends at `len`.
    written: BTreeMap<usize, usize>,
}

impl Assembler {
    /// For a new object.
    pub fn new(sizes: PartSizes, budget: Budget) -> Assembler {
        Assembler { sizes, parts: 0, start: 0, budget, buffer: None, len: 0, written: BTreeMap::new() }
    }

    /// Contiguous bytes in RAM, counted from the beginning of the part being filled.
    pub fn ready(&self) -> u64 {
        self.written.get(&0).map_or(0, |to| *to as u64)
    }

    /// First offset still in RAM: everything below is cut into parts.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Every byte below this offset is here or in a part.
    pub fn end(&self) -> u64 {
        self.start + self.ready()
    }

    /// The furthest byte that was written, gaps included: beyond [`Assembler::end`] when bytes came early.
    pub fn high(&self) -> u64 {
        self.start + self.len as u64
    }

    /// Parts cut so far.
    pub fn parts(&self) -> u32 {
        self.parts
    }

    /// Number of the part being filled, from 1; says why when there is none left.
    pub fn number(&self) -> Result<u32, String> {
        if self.parts == MAX_PARTS {
            let most = format!("{} bytes, the most that {MAX_PARTS} parts hold", self.start);
            return Err(format!("larger than {most}: the server's --part-size must be raised"));
        }
        Ok(self.parts + 1)
    }

    /// Size in bytes of the part being filled.
    pub fn part_size(&self) -> u64 {
        self.sizes.of(self.parts + 1)
    }

    /// True when the part is complete: [`Assembler::cut`] before more is written.
    pub fn is_full(&self) -> bool {
        self.ready() >= self.part_size()
    }

    /// Takes bytes at an offset, up to the end of the part where they are in order, or says why not. Returns how
    /// many were taken; when fewer than given, the part [`is_full`](Assembler::is_full), or the rest is early.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<usize, String> {
        let (start, end) = (self.start, self.end());
        if offset < start {
            let why = format!("was already sent to the store, which has everything up to {start}");
            return Err(format!("offset {offset} {why}: it can't be changed now"));
        }
        if offset > end + REORDER_WINDOW {
            return Err(format!(
                "offset {offset} leaves a gap after {end} that is more than {REORDER_WINDOW} bytes long"
            ));
        }
        self.number()?;
        let at = (offset - start) as usize;
        let limit = (self.part_size() + if offset > end { 2 * REORDER_WINDOW } else { 0 }) as usize;
        let taken = data.get(..limit.saturating_sub(at)).unwrap_or(data);
        let to = at + taken.len();
        if let Some(room) = self.room()?.get_mut(at..to) {
            room.copy_from_slice(taken);
        }
        self.len = self.len.max(to);
        self.note(at, to);
        Ok(taken.len())
    }

    /// The buffer, large enough for the part being filled.
    fn room(&mut self) -> Result<&mut Buffer, String> {
        let size = (self.part_size() + 2 * REORDER_WINDOW) as usize;
        match self.buffer.take().filter(|buffer| buffer.len() >= size) {
            Some(buffer) => Ok(self.buffer.insert(buffer)),
            None => {
                let fresh = self.budget.buffer(size).map_err(|error| format!("the server has no memory: {error}"))?;
                Ok(self.buffer.insert(fresh))
            }
        }
    }

    /// `from..to` was written: one range with those that it touches.
    fn note(&mut self, mut from: usize, mut to: usize) {
        while let Some((&first, &last)) = self.written.range(..=to).next_back().filter(|(_, last)| **last >= from) {
            self.written.remove(&first);
            (from, to) = (from.min(first), to.max(last));
        }
        self.written.insert(from, to);
    }

    /// Takes the next part out: so many bytes, all that are ready at most. Where nothing is buffered they are passed
    /// over: bytes that the store copies never come through RAM.
    pub fn cut(&mut self, size: u64) -> Result<Bytes, String> {
        self.start += size;
        self.parts += 1;
        let (old, size, end) = (self.buffer.take(), self.len.min(size as usize), self.len);
        let written = std::mem::take(&mut self.written).into_iter();
        self.written = written.map(|(from, to)| (from.saturating_sub(size), to.saturating_sub(size))).collect();
        self.len -= size;
        let Some(old) = old else { return Ok(Bytes::new()) };
        let (body, early) = old.get(..end).unwrap_or_default().split_at(size);
        if let Some(early) = Some(early).filter(|early| !early.is_empty())
            && let Some(room) = self.room()?.get_mut(..early.len())
        {
            room.copy_from_slice(early);
        }
        Ok(if size <= SMALL { Bytes::copy_from_slice(body) } else { Bytes::from_owner(old).slice(..size) })
    }

    /// Drops what lies beyond `size`. False, and nothing done, when that was cut already or never came.
    pub fn truncate(&mut self, size: u64) -> bool {
        let kept = (self.start..=self.end()).contains(&size);
        if kept {
            self.len = (size - self.start) as usize;
            self.written = BTreeMap::from([(0, self.len)]);
        }
        kept
    }

    /// The contiguous bytes in RAM from this offset on, at most `len`; `None` for offsets that aren't in RAM.
    pub fn peek(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let (at, ready) = (usize::try_from(offset.checked_sub(self.start)?).ok()?, self.ready() as usize);
        self.buffer.as_ref()?.get(at..ready.min(at.saturating_add(len))).filter(|_| at < ready)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: PartSizes = PartSizes { first: 1000, cap: 4000, double_every: 3 };

    fn tiny() -> Assembler {
        Assembler::new(TINY, Budget::new(0))
    }

    /// Every part that is complete.
    fn cut_all(assembler: &mut Assembler, parts: &mut Vec<Bytes>) {
        while assembler.is_full() {
            assert_eq!(assembler.number(), Ok(parts.len() as u32 + 1));
            let size = assembler.part_size();
            parts.push(assembler.cut(size).unwrap());
            assert_eq!(parts.last().map(|body| body.len() as u64), Some(size));
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
            let mut assembler = tiny();
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
            assert_eq!(assembler.end(), assembler.high(), "seed {seed}");
            cut_all(&mut assembler, &mut parts);
            parts.push(assembler.cut(assembler.ready()).unwrap());
            assert!(parts.concat() == file, "seed {seed}");
        }
    }

    #[test]
    fn refused_writes_change_nothing() {
        let mut assembler = tiny();
        let mut parts = Vec::new();
        write_all(&mut assembler, 0, &[7; 2500], &mut parts);
        assert_eq!((assembler.start(), assembler.end()), (2000, 2500));
        let sent = assembler.write(1999, b"x").unwrap_err();
        assert!(sent.contains("offset 1999 ") && sent.contains("up to 2000:"), "{sent}");
        let far = 2501 + REORDER_WINDOW;
        let ahead = assembler.write(far, b"x").unwrap_err();
        assert!(ahead.contains(&format!("offset {far} ")) && ahead.contains("after 2500 "), "{ahead}");
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
        let reach: u64 = (1..=MAX_PARTS).map(|number| PartSizes::default().of(number)).sum();
        assert_eq!(reach >> 30, 448);
    }

    #[test]
    fn a_part_leaves_with_its_pages() {
        let budget = Budget::new(64 << 20);
        let mut assembler = Assembler::new(PartSizes::default(), budget.clone());
        for block in 0..160u64 {
            assert_eq!(assembler.write(block * 32768, &[1; 32768]), Ok(32768));
        }
        assert!(assembler.is_full() && assembler.ready() == MIN_PART);
        let at = assembler.peek(0, 1).map(<[u8]>::as_ptr);
        let body = assembler.cut(MIN_PART).unwrap();
        assert_eq!((body.len() as u64, Some(body.as_ptr())), (MIN_PART, at));
        assert_eq!(assembler.write(MIN_PART, b"x"), Ok(1));
        assert_eq!(&body[..2], [1, 1]);
    }

    #[test]
    fn truncating_forgets_what_came_early() {
        let mut assembler = tiny();
        assembler.write(0, &[1; 100]).unwrap();
        assembler.write(200, &[1; 100]).unwrap();
        assert_eq!((assembler.end(), assembler.high()), (100, 300));
        assert!(!assembler.truncate(150));
        assert!(assembler.truncate(50));
        assert_eq!((assembler.end(), assembler.high()), (50, 50));
        assert_eq!(assembler.peek(40, 100), Some(&[1; 10][..]));
        assert_eq!(assembler.peek(50, 1), None);
    }
}
