//! Writes at offsets become parts in order: the pure half of an upload, without clock, task or
//! store.
//!
//! Invariants: the parts taken so far are exactly the bytes `0..start`; `buffer` holds the part
//! that begins at `start`, `early` the bytes that arrived for later parts; a byte that left in a
//! part is never changed. A refused write leaves the state as it was.

use super::{Buffer, BufferPool, OWN_BYTES};
use crate::store::Limits;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::io;

/// How far beyond the contiguous end a write may begin, in bytes. Node's `ssh2` sends its blocks in
/// the order in which it has read them, 64 of 32 KiB at once by default and 128 if it is told so:
/// 4 MiB beyond the first gap, and [`ANSWERED_AHEAD`] on top of it. The rest is room for larger
/// blocks.
pub const REORDER_WINDOW: u64 = 8 * 1024 * 1024;
/// A write that begins further beyond the contiguous end than this, in bytes, is answered only once
/// the gap is nearer. A client whose unanswered writes are bounded then stops by itself before it
/// reaches the end of the window.
pub const ANSWERED_AHEAD: u64 = 1024 * 1024;
/// Limit on the memory of early writes, in bytes: the window, one write that begins at its end, and
/// what thousands of small ones take beside their bytes.
pub const MAX_EARLY: u64 = REORDER_WINDOW + 1024 * 1024;
/// Memory of a write for a later part beside its bytes, in bytes.
const EARLY_OVERHEAD: u64 = 128;
/// Limit on gaps in one part. A client has at most one for each write that it has under way.
const MAX_GAPS: usize = 4096;
/// A part up to this size, in bytes, leaves as a copy, so that it does not pin the pages of a whole
/// part.
const MAX_COPIED_PART: usize = 64 * 1024;

/// How large each part is, and how many there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartSizes {
    /// Size of the first parts in bytes, at least [`Limits::min_part`].
    pub first: u64,
    /// Limit on the size of a part, in bytes.
    pub cap: u64,
    /// The size doubles after this many parts; 0 keeps all parts equal, as Cloudflare R2 demands.
    pub double_every: u32,
    /// Limit on the parts of one upload.
    pub max_parts: u32,
}

impl Default for PartSizes {
    /// 5 MiB, doubled every 1,000 parts up to 64 MiB: 10,000 parts hold 448 GiB.
    fn default() -> Self {
        PartSizes {
            first: OWN_BYTES,
            cap: 64 * 1024 * 1024,
            double_every: 1000,
            max_parts: Limits::default().max_parts,
        }
    }
}

impl PartSizes {
    /// These sizes, raised to what a store demands.
    pub fn raised_to(self, min_part: u64) -> PartSizes {
        PartSizes {
            first: self.first.max(min_part),
            ..self
        }
    }

    /// These sizes as far as a store allows them. The smallest size is checked when the server is
    /// built; [`PartSizes::raised_to`] is for the stores of accounts.
    pub fn within(self, limits: &Limits) -> PartSizes {
        let double_every = match limits.equal_parts {
            true => 0,
            false => self.double_every,
        };
        PartSizes {
            first: self.first.min(limits.max_part).max(1),
            cap: self.cap.min(limits.max_part),
            double_every,
            max_parts: limits.max_parts,
        }
    }

    /// Size in bytes of the part with this number, counted from 1.
    pub fn of(&self, number: u32) -> u64 {
        if self.are_equal() {
            return self.first;
        }
        let doublings = (number.saturating_sub(1) / self.double_every).min(32);
        (self.first << doublings).min(self.cap.max(self.first))
    }

    /// Does the store demand equal parts?
    pub fn are_equal(&self) -> bool {
        self.double_every == 0
    }
}

/// Why a write is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartBufferError {
    /// It would change a byte that left in a part.
    #[error(
        "offset {offset} was already sent to the store, which has everything up to {sent}: it can't be changed now"
    )]
    AlreadySent {
        /// Where the write begins.
        offset: u64,
        /// First offset that is still in RAM.
        sent: u64,
    },
    /// It begins beyond the window.
    #[error(
        "offset {offset} leaves a gap after {end} that is more than {REORDER_WINDOW} bytes long"
    )]
    GapTooLong {
        /// Where the write begins.
        offset: u64,
        /// Where the contiguous bytes end.
        end: u64,
    },
    /// Too many bytes wait for earlier ones.
    #[error(
        "more than {MAX_EARLY} bytes came out of order: the bytes from offset {end} on are missing"
    )]
    TooMuchEarly {
        /// Where the contiguous bytes end.
        end: u64,
    },
    /// Too many gaps wait to be closed.
    #[error("more than {MAX_GAPS} gaps after offset {end}")]
    TooManyGaps {
        /// Where the contiguous bytes end.
        end: u64,
    },
    /// The file needs more parts than the store takes.
    #[error(
        "larger than {size} bytes, the most that {parts} parts hold: the server's --part-size must be raised"
    )]
    TooManyParts {
        /// Bytes in the parts so far.
        size: u64,
        /// How many these are.
        parts: u32,
    },
    /// The operating system has no memory for a part.
    #[error("the server has no memory: {0}")]
    NoMemory(io::ErrorKind),
}

type Result<T> = std::result::Result<T, PartBufferError>;

/// Bytes that arrived before the part to which they belong was begun.
struct EarlyWrite {
    offset: u64,
    data: Bytes,
}

/// See the module.
pub struct PartBuffer {
    sizes: PartSizes,
    /// Parts taken so far.
    parts: u32,
    /// First offset still in RAM: everything below left in parts.
    start: u64,
    /// Size in bytes of the part being filled.
    part_size: u64,
    pool: BufferPool,
    /// Memory of the part being filled; `None` until something is written to it.
    buffer: Option<Buffer>,
    /// Ranges of `buffer` that were written, from → to. No two touch.
    written: BTreeMap<usize, usize>,
    /// Writes for later parts, in the order in which they came: of two that overlap, the later one
    /// holds.
    early: Vec<EarlyWrite>,
    /// Memory of `early`, in bytes.
    early_memory: u64,
    /// Where the furthest byte that was written ends.
    written_end: u64,
}

impl PartBuffer {
    /// For a new object.
    pub fn new(sizes: PartSizes, pool: BufferPool) -> PartBuffer {
        PartBuffer {
            sizes,
            parts: 0,
            start: 0,
            part_size: sizes.of(1),
            pool,
            buffer: None,
            written: BTreeMap::new(),
            early: Vec::new(),
            early_memory: 0,
            written_end: 0,
        }
    }

    /// Contiguous bytes of the part being filled, counted from its beginning.
    pub fn contiguous_len(&self) -> u64 {
        match self.written.get(&0) {
            Some(to) => *to as u64,
            None => 0,
        }
    }

    /// First offset still in RAM: everything below left in parts.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Every byte below this offset is here or left in a part.
    pub fn end(&self) -> u64 {
        self.start + self.contiguous_len()
    }

    /// Where the furthest byte that was written ends: beyond [`PartBuffer::end`] if there is a gap.
    pub fn written_end(&self) -> u64 {
        self.written_end
    }

    /// Contiguous bytes of the part being filled once `offset..offset + len` is written too.
    pub fn contiguous_len_with(&self, offset: u64, len: usize) -> u64 {
        if offset > self.end() {
            return self.contiguous_len();
        }
        let added = offset.saturating_add(len as u64).saturating_sub(self.start);
        self.contiguous_len().max(added).min(self.part_size)
    }

    /// Where the first gap ends: the next offset behind [`PartBuffer::end`] that was written.
    /// `None` if there is no gap.
    pub fn gap_end(&self) -> Option<u64> {
        let end = self.end();
        if self.written_end <= end {
            return None;
        }
        let next_part = self.start + self.part_size;
        let mut gap_end = self.written_end;
        for from in self.written.keys() {
            let from = self.start + *from as u64;
            if from > end {
                gap_end = gap_end.min(from);
            }
        }
        for write in &self.early {
            gap_end = gap_end.min(write.offset.max(next_part));
        }
        Some(gap_end)
    }

    /// Parts taken so far.
    pub fn parts(&self) -> u32 {
        self.parts
    }

    /// Number of the part being filled, counted from 1.
    pub fn number(&self) -> Result<u32> {
        if self.parts == self.sizes.max_parts {
            return Err(PartBufferError::TooManyParts {
                size: self.start,
                parts: self.parts,
            });
        }
        Ok(self.parts + 1)
    }

    /// Size in bytes of the part being filled.
    pub fn part_size(&self) -> u64 {
        self.part_size
    }

    /// Makes the part being filled smaller, so that it can leave now. What it holds behind that
    /// belongs to the next part.
    pub fn shrink_part(&mut self, size: u64) {
        if size >= self.part_size {
            return;
        }
        self.part_size = size;
        let behind = self.split_written(size as usize);
        // Later writes hold: these come first.
        let later = std::mem::take(&mut self.early);
        for (from, to) in behind {
            let data = match &self.buffer {
                Some(buffer) => Bytes::copy_from_slice(buffer.get(from..to).unwrap_or_default()),
                None => Bytes::new(),
            };
            self.keep_early(self.start + from as u64, data);
        }
        self.early.extend(later);
    }

    /// Takes the ranges behind `size`, or the parts of them that lie there, out of those that were
    /// written.
    fn split_written(&mut self, size: usize) -> Vec<(usize, usize)> {
        let mut behind: Vec<_> = self.written.split_off(&size).into_iter().collect();
        if let Some(mut last) = self.written.last_entry() {
            let end = *last.get();
            if end > size {
                behind.insert(0, (size, end));
                last.insert(size);
            }
        }
        behind
    }

    /// Is the part complete? Then it must be taken before more is written.
    pub fn is_full(&self) -> bool {
        self.contiguous_len() >= self.part_size()
    }

    /// Is the part complete, with early bytes behind it, so that nothing is gained by waiting?
    pub fn is_overdue(&self) -> bool {
        self.is_full() && self.written_end > self.end()
    }

    /// Takes bytes at an offset. Returns how many were taken: of bytes in order those up to the end
    /// of the part, after which it [`is_full`](PartBuffer::is_full); of early bytes all.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<usize> {
        self.check_offset(offset)?;
        self.number()?;
        let is_early = offset > self.end();
        if is_early {
            self.check_memory(data.len())?;
        }
        let (inside, behind) = data.split_at(self.len_inside(offset, data.len()));
        self.fill(offset, inside)?;
        if !is_early {
            return Ok(inside.len());
        }
        self.keep_early(offset + inside.len() as u64, Bytes::copy_from_slice(behind));
        Ok(data.len())
    }

    /// How many of `len` bytes at this offset belong to the part being filled. The others lie
    /// behind it.
    fn len_inside(&self, offset: u64, len: usize) -> usize {
        let room = (self.start + self.part_size).saturating_sub(offset);
        len.min(usize::try_from(room).unwrap_or(usize::MAX))
    }

    fn check_offset(&self, offset: u64) -> Result<()> {
        let sent = self.start;
        let end = self.end();
        if offset < sent {
            return Err(PartBufferError::AlreadySent { offset, sent });
        }
        if offset > end + REORDER_WINDOW {
            return Err(PartBufferError::GapTooLong { offset, end });
        }
        Ok(())
    }

    /// Is there memory for one more early write of this many bytes?
    fn check_memory(&self, len: usize) -> Result<()> {
        let end = self.end();
        let early = self.early_memory + self.early_in_part();
        if early + len as u64 + EARLY_OVERHEAD > MAX_EARLY {
            return Err(PartBufferError::TooMuchEarly { end });
        }
        if self.written.len() >= MAX_GAPS {
            return Err(PartBufferError::TooManyGaps { end });
        }
        Ok(())
    }

    /// Bytes of the part being filled that lie behind a gap.
    fn early_in_part(&self) -> u64 {
        let written: usize = self.written.iter().map(|(from, to)| to - from).sum();
        (written as u64).saturating_sub(self.contiguous_len())
    }

    /// Copies bytes into the part being filled.
    fn fill(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let from = (offset - self.start) as usize;
        let to = from + data.len();
        if let Some(room) = self.buffer_mut()?.get_mut(from..to) {
            room.copy_from_slice(data);
        }
        self.mark_written(from, to);
        self.written_end = self.written_end.max(offset + data.len() as u64);
        Ok(())
    }

    /// Keeps bytes for a later part.
    fn keep_early(&mut self, offset: u64, data: Bytes) {
        if data.is_empty() {
            return;
        }
        self.written_end = self.written_end.max(offset + data.len() as u64);
        self.early_memory += data.len() as u64 + EARLY_OVERHEAD;
        self.early.push(EarlyWrite { offset, data });
    }

    /// The memory of the part being filled.
    fn buffer_mut(&mut self) -> Result<&mut Buffer> {
        let buffer = match self.buffer.take() {
            Some(buffer) => buffer,
            None => {
                let size = self.sizes.of(self.parts + 1) as usize;
                match self.pool.buffer(size) {
                    Ok(buffer) => buffer,
                    Err(error) => return Err(PartBufferError::NoMemory(error.kind())),
                }
            }
        };
        Ok(self.buffer.insert(buffer))
    }

    /// Records that `from..to` was written, as one range with those that it touches.
    fn mark_written(&mut self, mut from: usize, mut to: usize) {
        while let Some((&first, &last)) = self.written.range(..=to).next_back() {
            if last < from {
                break;
            }
            self.written.remove(&first);
            from = from.min(first);
            to = to.max(last);
        }
        self.written.insert(from, to);
    }

    /// Takes the contiguous bytes of the part being filled, which is the next one then. Only the
    /// last part may be taken before it is full: what the buffer holds behind a gap is dropped.
    pub fn take_part(&mut self) -> Result<Bytes> {
        let len = self.contiguous_len();
        let buffer = self.buffer.take();
        self.start_next_part(len)?;
        let len = len as usize;
        match buffer {
            None => Ok(Bytes::new()),
            Some(buffer) if len <= MAX_COPIED_PART => Ok(Bytes::copy_from_slice(
                buffer.get(..len).unwrap_or_default(),
            )),
            Some(buffer) => Ok(Bytes::from_owner(buffer).slice(..len)),
        }
    }

    /// Passes over a part of this many bytes that the store copies, and that never come through
    /// RAM. Nothing may be buffered at its beginning.
    pub fn skip_part(&mut self, len: u64) -> Result<()> {
        self.buffer = None;
        self.start_next_part(len)
    }

    /// Counts a part of this many bytes, and moves early bytes that belong to the next one into it.
    fn start_next_part(&mut self, len: u64) -> Result<()> {
        self.written.clear();
        self.start += len;
        self.written_end = self.written_end.max(self.start);
        self.parts += 1;
        self.part_size = self.sizes.of(self.parts + 1);
        self.early_memory = 0;
        for EarlyWrite { offset, data } in std::mem::take(&mut self.early) {
            let inside = self.len_inside(offset, data.len());
            self.fill(offset, data.get(..inside).unwrap_or_default())?;
            self.keep_early(offset + inside as u64, data.slice(inside..));
        }
        Ok(())
    }

    /// Drops what lies beyond `size`. Returns false, and does nothing, if that left in a part or
    /// was never written.
    pub fn truncate(&mut self, size: u64) -> bool {
        if !(self.start..=self.end()).contains(&size) {
            return false;
        }
        self.written_end = size;
        self.written = BTreeMap::from([(0, (size - self.start) as usize)]);
        self.early.clear();
        self.early_memory = 0;
        true
    }

    /// Copies the bytes in RAM from this offset on into `room`, and leaves the rest of it as it is:
    /// what lies in gaps, or left in parts.
    pub fn copy_to(&self, offset: u64, room: &mut [u8]) {
        if let Some(buffer) = &self.buffer {
            for (from, to) in &self.written {
                let bytes = buffer.get(*from..*to).unwrap_or_default();
                copy_overlap(self.start + *from as u64, bytes, offset, room);
            }
        }
        for write in &self.early {
            copy_overlap(write.offset, &write.data, offset, room);
        }
    }
}

/// Copies what `bytes` and `room` have in common, which begin at these offsets of the file.
pub(super) fn copy_overlap(bytes_at: u64, bytes: &[u8], room_at: u64, room: &mut [u8]) {
    let start = bytes_at.max(room_at);
    let end = (bytes_at + bytes.len() as u64).min(room_at + room.len() as u64);
    if start >= end {
        return;
    }
    let from = bytes.get((start - bytes_at) as usize..(end - bytes_at) as usize);
    let to = room.get_mut((start - room_at) as usize..(end - room_at) as usize);
    if let (Some(from), Some(to)) = (from, to) {
        to.copy_from_slice(from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: PartSizes = PartSizes {
        first: 1000,
        cap: 4000,
        double_every: 3,
        max_parts: 10_000,
    };

    fn tiny() -> PartBuffer {
        PartBuffer::new(TINY, BufferPool::new(0))
    }

    /// Every part that is complete.
    fn take_full_parts(buffer: &mut PartBuffer, parts: &mut Vec<Bytes>) {
        while buffer.is_full() {
            assert_eq!(buffer.number(), Ok(parts.len() as u32 + 1));
            let size = buffer.part_size();
            parts.push(buffer.take_part().unwrap());
            assert_eq!(parts.last().map(|body| body.len() as u64), Some(size));
        }
    }

    fn write_all(
        buffer: &mut PartBuffer,
        mut offset: u64,
        mut data: &[u8],
        parts: &mut Vec<Bytes>,
    ) {
        while !data.is_empty() {
            take_full_parts(buffer, parts);
            let taken = buffer.write(offset, data).unwrap();
            assert!(taken > 0 || buffer.is_full());
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
            let file: Vec<u8> = (0..random.random_range(0..40_000u32))
                .map(|_| random.random())
                .collect();
            let mut pieces = Vec::new();
            let mut at = 0;
            while at < file.len() {
                let len = random.random_range(1..1500).min(file.len() - at);
                pieces.push(at..at + len);
                at += len;
            }
            pieces
                .chunks_mut(random.random_range(1..9))
                .for_each(|near| near.shuffle(&mut random));
            let mut buffer = tiny();
            let mut parts = Vec::new();
            for piece in pieces {
                // Sometimes the bytes come twice, the first time wrong: what is in RAM may change.
                let (mut at, mut data) = (piece.start as u64, &file[piece]);
                if random.random_bool(0.2) && !buffer.is_full() {
                    let taken = buffer.write(at, &vec![0; data.len()]).unwrap();
                    assert_eq!(buffer.write(at, data), Ok(taken));
                    (at, data) = (at + taken as u64, &data[taken..]);
                }
                write_all(&mut buffer, at, data, &mut parts);
            }
            take_full_parts(&mut buffer, &mut parts);
            assert_eq!(buffer.end(), buffer.written_end(), "seed {seed}");
            parts.push(buffer.take_part().unwrap());
            assert!(parts.concat() == file, "seed {seed}");
        }
    }

    #[test]
    fn refused_writes_change_nothing() {
        let mut buffer = tiny();
        let mut parts = Vec::new();
        write_all(&mut buffer, 0, &[7; 2500], &mut parts);
        assert_eq!((buffer.start(), buffer.end()), (2000, 2500));
        assert_eq!(
            buffer.write(1999, b"x"),
            Err(PartBufferError::AlreadySent {
                offset: 1999,
                sent: 2000
            })
        );
        let offset = 2501 + REORDER_WINDOW;
        assert_eq!(
            buffer.write(offset, b"x"),
            Err(PartBufferError::GapTooLong { offset, end: 2500 })
        );
        assert_eq!((buffer.end(), buffer.written_end()), (2500, 2500));
    }

    #[test]
    fn sizes_double_up_to_the_cap() {
        let sizes: Vec<u64> = (1..=9).map(|number| TINY.of(number)).collect();
        assert_eq!(
            sizes,
            [1000, 1000, 1000, 2000, 2000, 2000, 4000, 4000, 4000]
        );
        assert_eq!(TINY.of(10_000), 4000);
        let equal = PartSizes {
            double_every: 0,
            ..TINY
        };
        assert_eq!(equal.of(10_000), 1000);
        assert_eq!(PartSizes::default().of(u32::MAX), 64 << 20);
        let reach: u64 = (1..=PartSizes::default().max_parts)
            .map(|number| PartSizes::default().of(number))
            .sum();
        assert_eq!(reach >> 30, 448);
    }

    #[test]
    fn a_part_leaves_with_its_pages() {
        let pool = BufferPool::new(64 << 20);
        let mut buffer = PartBuffer::new(PartSizes::default(), pool.clone());
        for block in 0..160u64 {
            assert_eq!(buffer.write(block * 32768, &[1; 32768]), Ok(32768));
        }
        assert!(buffer.is_full() && buffer.contiguous_len() == OWN_BYTES);
        let at = buffer.buffer.as_ref().unwrap().as_ptr();
        let body = buffer.take_part().unwrap();
        assert_eq!((body.len() as u64, body.as_ptr()), (OWN_BYTES, at));
        assert_eq!(buffer.write(OWN_BYTES, b"x"), Ok(1));
        assert_eq!(&body[..2], [1, 1]);
    }

    #[test]
    fn gaps_are_bounded() {
        let mut buffer = PartBuffer::new(PartSizes::default(), BufferPool::new(0));
        let taken = (0..2 * MAX_GAPS as u64)
            .take_while(|n| buffer.write(1 + 2 * n, b"x").is_ok())
            .count();
        assert_eq!((taken, buffer.written.len()), (MAX_GAPS, MAX_GAPS));
    }

    #[test]
    fn truncating_forgets_what_came_early() {
        let mut buffer = tiny();
        buffer.write(0, &[1; 100]).unwrap();
        buffer.write(200, &[1; 100]).unwrap();
        assert_eq!((buffer.end(), buffer.written_end()), (100, 300));
        assert!(!buffer.truncate(150));
        assert!(buffer.truncate(50));
        assert_eq!((buffer.end(), buffer.written_end()), (50, 50));
        let mut found = [7; 100];
        buffer.copy_to(40, &mut found);
        assert_eq!((&found[..10], &found[10..]), (&[1; 10][..], &[7; 90][..]));
    }
}
