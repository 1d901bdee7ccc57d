//! The task behind an open file: turns writes into S3 parts, and CLOSE into an object.
//!
//! Started by [`Upload::open`](super::Upload::open). It owns everything: once every handle is
//! dropped without CLOSE it lets the parts in flight end and aborts, so that disconnect and
//! shutdown need no code of their own. A panic is one more way for a request to fail.

use super::part_buffer::copy_overlap;
use super::part_places::PartPlaces;
use super::upload::{Command, Result};
use super::{
    ANSWERED_AHEAD, MAX_HOLES, MultipartUpload, NameLock, OWN_BYTES, PartBuffer, Progress,
    REORDER_WINDOW, Reply, Reservation, Share, Target, Transfers, UploadError, UploadSummary,
};
use crate::catch_panic;
use crate::store::{self, Attributes, Limits, Object, Part, PartSource, StoreError, change};
use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};

/// Old bytes are copied inside the store in ranges of this size in bytes, side by side.
const COPY_RANGE: u64 = 512 * 1024 * 1024;
/// Limit on old bytes that are loaded at once, in bytes.
const MAX_LOAD: u64 = 5 * 1024 * 1024;
/// The same if the pool has no memory for them: as much as one WRITE, which every upload may hold.
const OWN_LOAD: u64 = 256 * 1024;
/// Limit on held replies to early writes; beyond it the oldest is sent. A client keeps at most a
/// few hundred requests under way.
const MAX_HELD: usize = 1024;
/// A client that has sent nothing for this long, while replies are held, may be waiting for them
/// before it goes on.
const HOLD_TIME: Duration = Duration::from_secs(5);
/// Zeros are written in pieces of this size, in bytes.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
/// Up to this part number a part may leave before it has grown to its size. The later ones of the
/// 10,000 are needed as large as they can be.
const MAX_SHORT_PARTS: u32 = 8000;
/// How long a part that can't leave early waits for memory that other such parts hold, before its
/// upload fails.
const GROWN_PART_WAIT: Duration = Duration::from_secs(30);
/// Time for parts in flight to arrive before their upload is aborted. Parts that arrive after the
/// abort could stay in the store.
const LAST_PARTS_TIME: Duration = Duration::from_secs(10);

/// See the module.
pub(super) struct UploadTask {
    transfers: Arc<Transfers>,
    target: Target,
    progress: Arc<Progress>,
    /// Bytes at the beginning of the old object that stay where nothing is written; 0 without one.
    base_len: u64,
    /// The client has asked for at least this size in bytes: what is missing at the end is zeros.
    extended_to: u64,
    /// Bytes that the client has left out so far, and that were stored as zeros.
    zeros_stored: u64,
    /// Bytes received in WRITEs.
    received: u64,
    buffer: PartBuffer,
    /// Memory for the part being filled, taken from the pool once the part outgrows the first
    /// [`OWN_BYTES`], which every upload has for itself.
    part_memory: Option<Reservation>,
    /// Created with the first part.
    multipart: Option<MultipartUpload>,
    parts_in_flight: JoinSet<store::Result<SentPart>>,
    places: PartPlaces,
    parts_done: Vec<Part>,
    /// Of the object that was made.
    etag: Option<String>,
    held_replies: VecDeque<HeldReply>,
    /// The client has gone on behind a gap although its replies were held: none are, until the gap
    /// is closed.
    holds_nothing: bool,
    /// The first failure to change the file.
    failed: Option<UploadError>,
}

/// The reply to a write far beyond a gap, which is sent once the gap is nearer.
struct HeldReply {
    /// Where the write began.
    offset: u64,
    reply: Reply<()>,
}

/// A part that has arrived in the store.
struct SentPart {
    part: Part,
    /// How long its bytes were under way, unless the store has copied them.
    took: Option<Duration>,
}

/// A request that changes the file.
enum Change<'a> {
    Write {
        offset: Option<u64>,
        data: Vec<Bytes>,
    },
    Truncate {
        size: u64,
    },
    Close {
        lock: &'a NameLock,
    },
}

/// A CLOSE that was carried out and is not answered yet.
struct Closed {
    result: Result<()>,
    reply: Reply<()>,
    lock: NameLock,
}

impl UploadTask {
    pub(super) fn new(
        transfers: Arc<Transfers>,
        target: Target,
        progress: Arc<Progress>,
    ) -> UploadTask {
        let base_len = target.base.as_ref().map_or(0, |base| base.size);
        UploadTask {
            buffer: PartBuffer::new(transfers.sizes, transfers.pool.clone()),
            transfers,
            target,
            progress,
            base_len,
            extended_to: 0,
            zeros_stored: 0,
            received: 0,
            part_memory: None,
            multipart: None,
            parts_in_flight: JoinSet::new(),
            places: PartPlaces::default(),
            parts_done: Vec::new(),
            etag: None,
            held_replies: VecDeque::new(),
            holds_nothing: false,
            failed: None,
        }
    }

    /// Carries out commands until every handle is gone, and cleans up.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let opened = Instant::now();
        let closed = self.serve_commands(&mut commands).await;
        if closed.is_none() {
            self.failed.get_or_insert(UploadError::CutOff);
        }
        self.send_all_held();
        let summary = UploadSummary {
            bytes: self.received,
            parts: self.parts_done.len() as u32,
            etag: self.etag.take(),
            took: opened.elapsed(),
            result: closed.as_ref().map(|closed| closed.result.clone()),
        };
        self.reset().await;
        (self.target.on_end)(summary);
        if let Some(Closed {
            result,
            reply,
            lock,
        }) = closed
        {
            // The name stays locked until here, when the upload is no longer shown: otherwise the
            // next request would find it busy.
            drop(lock);
            reply(result);
        }
    }

    /// Carries out commands until every handle is gone. Returns the CLOSE, if there was one.
    async fn serve_commands(&mut self, commands: &mut mpsc::Receiver<Command>) -> Option<Closed> {
        let mut closed = None;
        while let Some(command) = self.next_command(commands).await {
            match command {
                Command::Read { offset, len, reply } => reply(self.try_read(offset, len).await),
                Command::Write {
                    offset,
                    data,
                    reply,
                } => {
                    let start = offset.unwrap_or_else(|| self.len());
                    let is_empty = data.iter().all(Bytes::is_empty);
                    match self.execute(Change::Write { offset, data }).await {
                        Ok(()) if !is_empty && self.is_far_ahead(start) => self.hold(start, reply),
                        result => reply(result),
                    }
                }
                Command::Truncate { size, reply } => {
                    reply(self.execute(Change::Truncate { size }).await);
                }
                Command::Discard => self.fail(UploadError::Removed).await,
                Command::Close { lock, reply } => {
                    let result = self.execute(Change::Close { lock: &lock }).await;
                    closed = Some(Closed {
                        result,
                        reply,
                        lock,
                    });
                }
            }
            self.send_held();
        }
        closed
    }

    /// Waits for the next command. While the client is awaited, held replies are sent once it has
    /// been silent for [`HOLD_TIME`], and a part that has grown leaves as soon as others need its
    /// memory.
    async fn next_command(&mut self, commands: &mut mpsc::Receiver<Command>) -> Option<Command> {
        let silent_until = Instant::now() + HOLD_TIME;
        loop {
            let pool = self.transfers.pool.clone();
            let has_grown = self.part_memory.is_some() && self.can_send_early();
            tokio::select! {
                biased;
                next = commands.recv() => return next,
                () = pool.wait_for_pressure(), if has_grown => {
                    if let Err(error) = self.send_early().await {
                        self.fail(error).await;
                    }
                }
                () = sleep_until(silent_until), if !self.held_replies.is_empty() => {
                    self.holds_nothing = true;
                    self.send_all_held();
                }
            }
        }
    }

    fn is_far_ahead(&self, offset: u64) -> bool {
        !self.holds_nothing && offset > self.buffer.end() + ANSWERED_AHEAD
    }

    /// Holds the reply to a write that was carried out.
    fn hold(&mut self, offset: u64, reply: Reply<()>) {
        if self.held_replies.len() >= MAX_HELD
            && let Some(oldest) = self.held_replies.pop_front()
        {
            (oldest.reply)(Ok(()));
        }
        self.held_replies.push_back(HeldReply { offset, reply });
    }

    /// Sends the replies to writes that no longer lie far beyond a gap; all of them once the upload
    /// has failed.
    fn send_held(&mut self) {
        for held in std::mem::take(&mut self.held_replies) {
            if self.failed.is_none() && self.is_far_ahead(held.offset) {
                self.held_replies.push_back(held);
            } else {
                (held.reply)(self.check_failed());
            }
        }
    }

    /// Sends all held replies, whatever gap is open.
    fn send_all_held(&mut self) {
        for held in std::mem::take(&mut self.held_replies) {
            (held.reply)(self.check_failed());
        }
    }

    /// Returns the first failure, if there was one.
    fn check_failed(&self) -> Result<()> {
        match &self.failed {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Carries out a change. The first one that fails is remembered, and what was held for the file
    /// is given back at once; a size that can't be set is no failure of the file. What changes a file
    /// that was removed has no effect.
    async fn execute(&mut self, change: Change<'_>) -> Result<()> {
        let result = match (&change, &self.failed) {
            (Change::Write { .. } | Change::Truncate { .. }, Some(UploadError::Removed)) => Ok(()),
            _ => self.try_change(change).await,
        };
        match &result {
            Ok(()) => {}
            Err(UploadError::SizeTooSmall { .. } | UploadError::SizeTooLarge) => {}
            Err(error) => self.fail(error.clone()).await,
        }
        if self.buffer.end() == self.buffer.written_end() {
            self.holds_nothing = false;
        }
        self.progress.record_done(self.len());
        result
    }

    async fn try_change(&mut self, change: Change<'_>) -> Result<()> {
        self.check_failed()?;
        match catch_panic(self.dispatch(change)).await {
            Ok(result) => result,
            Err(panicked) => Err(UploadError::Panicked(panicked)),
        }
    }

    async fn dispatch(&mut self, change: Change<'_>) -> Result<()> {
        match change {
            Change::Write { offset, data } => self.write(offset, data).await,
            Change::Truncate { size } => self.truncate(size).await,
            Change::Close { lock } => self.close(lock).await,
        }
    }

    async fn try_read(&mut self, offset: u64, len: usize) -> Result<Bytes> {
        self.check_failed()?;
        match catch_panic(self.read(offset, len)).await {
            Ok(result) => result,
            Err(panicked) => Err(UploadError::Panicked(panicked)),
        }
    }

    /// Remembers the first failure, and gives back what was held for the file.
    async fn fail(&mut self, error: UploadError) {
        if self.failed.is_none() {
            self.failed = Some(error);
            self.reset().await;
        }
    }

    /// Goes back to an empty file. Parts in flight end before the abort: a part that arrives after
    /// it would stay in the store, invisible and billed.
    async fn reset(&mut self) {
        self.buffer = PartBuffer::new(self.transfers.sizes, self.transfers.pool.clone());
        self.part_memory = None;
        let last_parts = async { while self.parts_in_flight.join_next().await.is_some() {} };
        if timeout(LAST_PARTS_TIME, last_parts).await.is_err() {
            // Their requests are cancelled in the middle of the body, or of the wait for an answer.
            self.parts_in_flight.shutdown().await;
        }
        self.parts_done.clear();
        if let Some(multipart) = self.multipart.take() {
            multipart.abort(&self.target.events).await;
        }
    }

    /// Size of the file in bytes if it were closed now.
    fn len(&self) -> u64 {
        let written_end = self.buffer.written_end();
        written_end.max(self.base_len).max(self.extended_to)
    }

    async fn write(&mut self, offset: Option<u64>, data: Vec<Bytes>) -> Result<()> {
        self.collect_done_parts()?;
        if data.iter().all(Bytes::is_empty) {
            return Ok(());
        }
        let mut offset = offset.unwrap_or_else(|| self.len());
        self.fill_from_base(offset).await?;
        if offset > self.buffer.end().saturating_add(REORDER_WINDOW) {
            // The bytes that are missing so far back will not arrive any more.
            self.fill_holes(offset - ANSWERED_AHEAD).await?;
        }
        let is_early = offset > self.buffer.end();
        // The beginning of an early write decides whether it is too early, so it stays in one
        // piece.
        let pieces = if is_early {
            vec![data.concat().into()]
        } else {
            data
        };
        for piece in pieces {
            self.append(offset, &piece).await?;
            offset += piece.len() as u64;
            self.received += piece.len() as u64;
        }
        Ok(())
    }

    /// Puts bytes into the buffer, and sends the parts that they fill.
    async fn append(&mut self, mut offset: u64, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            if self.buffer.is_full() {
                self.send_part().await?;
            }
            let contiguous_len = self.buffer.contiguous_len_with(offset, data.len());
            self.reserve_part(contiguous_len).await?;
            let taken = self.buffer.write(offset, data)?;
            // The write may have closed a gap.
            self.reserve_part(self.buffer.contiguous_len()).await?;
            offset += taken as u64;
            data = data.get(taken..).unwrap_or_default();
        }
        self.send_overdue().await
    }

    /// Sends the parts that are complete and have early bytes behind them.
    async fn send_overdue(&mut self) -> Result<()> {
        while self.buffer.is_overdue() {
            self.send_part().await?;
        }
        Ok(())
    }

    /// Stores zeros where the client has left bytes out, up to `to`.
    async fn fill_holes(&mut self, to: u64) -> Result<()> {
        let missing = to.saturating_sub(self.buffer.end());
        if missing > MAX_HOLES - self.zeros_stored {
            return Err(UploadError::HolesTooLarge);
        }
        while self.buffer.end() < to {
            if self.buffer.is_full() {
                self.send_part().await?;
            }
            let start = self.buffer.end();
            let gap_end = match self.buffer.gap_end() {
                Some(gap_end) => gap_end.min(to),
                None => to,
            };
            let len = (gap_end - start).min(self.room()).min(ZEROS.len() as u64);
            let zeros = ZEROS.get(..len as usize).unwrap_or_default();
            self.zeros_stored += len;
            self.append(start, zeros).await?;
        }
        Ok(())
    }

    /// May a part leave before it is full? Not if the store demands equal parts, or most of the
    /// part numbers are used up.
    fn may_send_early(&self) -> bool {
        !self.transfers.sizes.are_equal() && self.buffer.parts() < MAX_SHORT_PARTS
    }

    /// Can the part leave, or do without its reservation, right now?
    fn can_send_early(&self) -> bool {
        let contiguous_len = self.buffer.contiguous_len();
        let has_short_part = contiguous_len >= self.transfers.short_part_unit();
        self.may_send_early() && (has_short_part || contiguous_len <= OWN_BYTES)
    }

    /// Reserves memory for the whole part before it holds more than [`OWN_BYTES`].
    /// Nothing waits for a client with a reservation that others need: without memory, or when
    /// others ask for it, the part leaves as it is. Where it can't, because all parts must be equal
    /// or the smallest one is larger than an upload's own memory, reservations have a share.
    async fn reserve_part(&mut self, contiguous_len: u64) -> Result<()> {
        let size = self.buffer.part_size();
        if self.part_memory.is_some() || contiguous_len <= OWN_BYTES || size <= OWN_BYTES {
            return Ok(());
        }
        let pool = &self.transfers.pool;
        if !self.may_send_early() {
            return self.wait_for_share().await;
        }
        let short = self.short_part_size(self.buffer.contiguous_len());
        if self.transfers.short_part_unit() > OWN_BYTES {
            self.part_memory = pool.try_take_share(Share::GrownParts, size);
            if self.part_memory.is_none() {
                self.buffer.shrink_part(short);
                return self.wait_for_share().await;
            }
            return Ok(());
        }
        self.part_memory = pool.try_take(size);
        if self.part_memory.is_none() {
            self.buffer.shrink_part(short);
        }
        Ok(())
    }

    /// Waits for memory that other parts hold which can't leave early.
    async fn wait_for_share(&mut self) -> Result<()> {
        let size = self.buffer.part_size();
        let taking = self.transfers.pool.take_share(Share::GrownParts, size);
        match timeout(GROWN_PART_WAIT, taking).await {
            Ok(Some(memory)) => {
                self.part_memory = Some(memory);
                Ok(())
            }
            Ok(None) => Err(UploadError::PartTooLarge { size }),
            Err(_elapsed) => Err(UploadError::NoMemory { size }),
        }
    }

    /// Size in bytes of a part that leaves early.
    fn short_part_size(&self, contiguous_len: u64) -> u64 {
        let unit = self.transfers.short_part_unit();
        (contiguous_len / unit).max(1) * unit
    }

    /// Sends the part as it is, so that others can have its memory.
    async fn send_early(&mut self) -> Result<()> {
        let contiguous_len = self.buffer.contiguous_len();
        if contiguous_len < self.transfers.short_part_unit() {
            // What is left of it is within the upload's own memory.
            self.part_memory = None;
            return Ok(());
        }
        let short = self.short_part_size(contiguous_len);
        self.buffer.shrink_part(short);
        self.send_part().await
    }

    /// Sends the part being filled in the background. Waits for a place among the parts in flight
    /// and, unless this is the last part, for memory: the last one has this upload's own.
    async fn send_part(&mut self) -> Result<()> {
        let number = self.wait_for_place().await?;
        let memory = self.take_part_memory().await?;
        let multipart = self.create_multipart().await?;
        let body = self.buffer.take_part()?;
        self.parts_in_flight.spawn(async move {
            let _memory = memory;
            let began = Instant::now();
            let part = multipart.upload_part(number, body).await?;
            Ok(SentPart {
                part,
                took: Some(began.elapsed()),
            })
        });
        Ok(())
    }

    /// Has the store copy bytes of the old object as the next part, in the background.
    async fn copy_part(&mut self, range: Range<u64>, etag: &str) -> Result<()> {
        let number = self.wait_for_place().await?;
        let multipart = self.create_multipart().await?;
        self.part_memory = None;
        self.buffer.skip_part(range.end - range.start)?;
        let key = self.target.key.clone();
        let etag = etag.to_owned();
        self.parts_in_flight.spawn(async move {
            let source = PartSource {
                key: &key,
                etag: &etag,
                range,
            };
            let part = multipart.copy_part(number, source).await?;
            Ok(SentPart { part, took: None })
        });
        Ok(())
    }

    /// Waits until one more part may be in flight. Returns its number.
    async fn wait_for_place(&mut self) -> Result<u32> {
        let number = self.buffer.number()?;
        let size = self.buffer.part_size();
        self.collect_done_parts()?;
        while self.parts_in_flight.len() >= self.places.limit(size) {
            self.collect_next_part().await?;
        }
        Ok(number)
    }

    /// The memory that the part being filled keeps until it is sent.
    async fn take_part_memory(&mut self) -> Result<Option<Reservation>> {
        let size = self.buffer.part_size();
        if let Some(mut memory) = self.part_memory.take() {
            memory.reduce_to(size);
            return Ok(Some(memory));
        }
        if !self.buffer.is_full() {
            return Ok(None);
        }
        match self.transfers.pool.take(size).await {
            Some(memory) => Ok(Some(memory)),
            None => Err(UploadError::PartTooLarge { size }),
        }
    }

    /// The multipart upload, which is created with its first part.
    async fn create_multipart(&mut self) -> Result<MultipartUpload> {
        if let Some(multipart) = &self.multipart {
            return Ok(multipart.clone());
        }
        let store = self.transfers.store.clone();
        let attributes = self.attributes();
        let multipart = MultipartUpload::create(store, &self.target.key, &attributes).await?;
        Ok(self.multipart.insert(multipart).clone())
    }

    /// Those of the object that is being changed.
    fn attributes(&self) -> Attributes {
        match &self.target.base {
            Some(Object {
                attributes: Some(attributes),
                ..
            }) => attributes.as_ref().clone(),
            Some(_) | None => Attributes::default(),
        }
    }

    /// Waits for one of the parts in flight, and collects it.
    async fn collect_next_part(&mut self) -> Result<()> {
        match self.parts_in_flight.join_next().await {
            Some(joined) => self.collect_part(joined),
            None => Ok(()),
        }
    }

    /// Collects the parts that are done, without waiting.
    fn collect_done_parts(&mut self) -> Result<()> {
        while let Some(joined) = self.parts_in_flight.try_join_next() {
            self.collect_part(joined)?;
        }
        Ok(())
    }

    fn collect_part(
        &mut self,
        joined: std::result::Result<store::Result<SentPart>, JoinError>,
    ) -> Result<()> {
        match joined {
            Ok(sent) => {
                let SentPart { part, took } = sent?;
                if let Some(took) = took {
                    self.places.note_part(took);
                }
                self.parts_done.push(part);
                Ok(())
            }
            Err(_panicked_or_cancelled) => Err(UploadError::CutOff),
        }
    }

    /// Brings in the old object's bytes from the contiguous end up to `to`. Whole parts are copied
    /// inside the store; bytes that are too few for a part, or must be joined with buffered ones,
    /// are loaded.
    async fn fill_from_base(&mut self, to: u64) -> Result<()> {
        let Some(Object { size, etag, .. }) = self.target.base.clone() else {
            return Ok(());
        };
        let to = to.min(self.base_len);
        while self.buffer.end() < to {
            if self.buffer.is_full() {
                self.send_part().await?;
            }
            let start = self.buffer.end();
            let missing = to - start;
            let copied_len = match self.buffer.contiguous_len() {
                0 => self.copied_len(size, missing),
                _ => None,
            };
            if let Some(copied_len) = copied_len {
                self.copy_part(start..start + copied_len, &etag).await?;
            } else {
                self.load_into_part(missing, &etag).await?;
            }
        }
        Ok(())
    }

    /// Length of the next part that the store copies from an object of `size` bytes, of which
    /// `missing` are to be brought in. `None` if it can't.
    fn copied_len(&self, size: u64, missing: u64) -> Option<u64> {
        let limits = &self.transfers.limits;
        // S3 copies ranges only of objects that are longer than the smallest part.
        if !limits.copies_itself || size <= limits.min_part {
            return None;
        }
        if self.transfers.sizes.are_equal() {
            let part_size = self.buffer.part_size();
            let is_copied = part_size <= missing && part_size <= limits.max_copy;
            return if is_copied { Some(part_size) } else { None };
        }
        copied_len(limits, missing)
    }

    /// Loads the next bytes of the old object into the part being filled: as many of `missing` as
    /// it has room and the server has memory for.
    async fn load_into_part(&mut self, missing: u64, etag: &str) -> Result<()> {
        // This may wait, so it comes before the memory below, and may make the part smaller.
        let wanted = missing.min(self.room()).min(MAX_LOAD);
        self.reserve_part(self.buffer.contiguous_len() + wanted)
            .await?;
        let wanted = wanted.min(self.room());
        if wanted == 0 {
            // The part is now as small as what it holds, and is sent first.
            return Ok(());
        }
        let memory = self.transfers.pool.try_take(wanted);
        let len = match &memory {
            Some(_) => wanted,
            None => wanted.min(OWN_LOAD),
        };
        let start = self.buffer.end();
        let pieces = self.load_base(start..start + len, etag).await?;
        let mut offset = start;
        for piece in pieces {
            offset += self.buffer.write(offset, &piece)? as u64;
        }
        drop(memory);
        if offset != start + len {
            let error = format!("the store returned {} of {len} bytes", offset - start);
            return Err(StoreError::Other(error).into());
        }
        // The bytes may have closed a gap.
        self.reserve_part(self.buffer.contiguous_len()).await?;
        self.send_overdue().await
    }

    /// How many more bytes the part being filled takes.
    fn room(&self) -> u64 {
        self.buffer.part_size() - self.buffer.contiguous_len()
    }

    /// Bytes of the old object, in pieces.
    async fn load_base(&mut self, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>> {
        let store = &self.transfers.store;
        Ok(store.get(&self.target.key, range, etag).await?)
    }

    /// The bytes of the file as it would be if it were closed now, at most `len`: those in RAM, then
    /// those of the old object, and zeros where there are neither. Fails for bytes that left in a
    /// part.
    async fn read(&mut self, offset: u64, len: usize) -> Result<Bytes> {
        let end = offset.saturating_add(len as u64).min(self.len());
        if offset >= end {
            return Ok(Bytes::new());
        }
        if offset < self.buffer.start() {
            return Err(UploadError::OnItsWay { offset });
        }
        let mut found = BytesMut::zeroed((end - offset) as usize);
        if let Some(Object { etag, .. }) = self.target.base.clone() {
            let old_start = offset.max(self.buffer.end());
            let old_end = end.min(self.base_len);
            if old_start < old_end {
                let mut at = old_start;
                for piece in self.load_base(old_start..old_end, &etag).await? {
                    copy_overlap(at, &piece, offset, &mut found);
                    at += piece.len() as u64;
                }
            }
        }
        self.buffer.copy_to(offset, &mut found);
        Ok(found.freeze())
    }

    async fn truncate(&mut self, size: u64) -> Result<()> {
        let written = self.len();
        if size > written.saturating_add(MAX_HOLES) {
            return Err(UploadError::SizeTooLarge);
        }
        if size == 0 && self.multipart.is_some() {
            self.reset().await;
        } else if size < self.buffer.written_end() && !self.buffer.truncate(size) {
            return Err(UploadError::SizeTooSmall { size, written });
        }
        self.base_len = self.base_len.min(size);
        self.extended_to = size;
        Ok(())
    }

    async fn close(&mut self, lock: &NameLock) -> Result<()> {
        if self.is_unchanged() {
            self.etag = self.target.base.as_ref().map(|base| base.etag.clone());
            return Ok(());
        }
        // What the old object does not have, and the client has not sent, is zeros.
        self.fill_from_base(u64::MAX).await?;
        self.fill_holes(self.len()).await?;
        let stored = match self.multipart.clone() {
            Some(multipart) => self.complete(multipart, lock).await?,
            None => self.put(lock).await?,
        };
        self.multipart = None;
        self.etag = Some(stored.etag);
        Ok(())
    }

    /// Was the old object opened and not touched?
    fn is_unchanged(&self) -> bool {
        match &self.target.base {
            Some(base) => {
                let is_whole = base.size == self.base_len && base.size == self.len();
                is_whole && self.buffer.written_end() == 0
            }
            None => false,
        }
    }

    /// Makes the object from its parts, once all of them are there and it is this file's turn.
    async fn complete(&mut self, multipart: MultipartUpload, lock: &NameLock) -> Result<Object> {
        let received = self.buffer.end();
        if self.buffer.contiguous_len() > 0 {
            self.send_part().await?;
        }
        while !self.parts_in_flight.is_empty() {
            self.collect_next_part().await?;
        }
        self.check_parts(received)?;
        lock.wait().await;
        let condition = &self.target.condition;
        Ok(multipart.complete(&self.parts_done, condition).await?)
    }

    /// Sorts the parts, and fails unless they are the whole file.
    fn check_parts(&mut self, received: u64) -> Result<()> {
        self.parts_done.sort_by_key(|part| part.number);
        let stored = self.parts_done.iter().map(|part| part.size).sum();
        let numbers = self.parts_done.iter().map(|part| part.number);
        let is_complete = numbers.eq(1..self.buffer.parts() + 1);
        if stored == received && is_complete {
            return Ok(());
        }
        Err(UploadError::PartsMissing {
            stored,
            parts: self.parts_done.len(),
            received,
        })
    }

    /// Makes the object from the buffer alone, once it is this file's turn.
    async fn put(&mut self, lock: &NameLock) -> Result<Object> {
        lock.wait().await;
        let store = self.transfers.store.as_ref();
        let body = self.buffer.take_part()?;
        let attributes = self.attributes();
        let condition = &self.target.condition;
        Ok(change::put(store, &self.target.key, body, &attributes, condition).await?)
    }
}

/// Length in bytes of the next of the parts of any size that a store copies, of `missing` bytes.
/// As far as possible no remainder is left that is too short to be a part. `None` if they are too
/// few for a part.
fn copied_len(limits: &Limits, missing: u64) -> Option<u64> {
    let min_part = limits.min_part;
    let range = COPY_RANGE.min(limits.max_copy).min(limits.max_part);
    if missing < min_part || range < min_part {
        return None;
    }
    if missing <= range {
        return Some(missing);
    }
    // The rest is one smallest part, or more.
    let shorter = range.min(missing - min_part);
    if shorter < min_part {
        return Some(range);
    }
    Some(shorter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Teller;
    use crate::path::Key;
    use crate::store::Condition;
    use crate::store::Timeouts;
    use crate::store::memory::MemoryStore;
    use crate::transfer::{BufferPool, PartSizes, Upload};
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn copied_parts_keep_the_limits_of_the_store() {
        const MIB: u64 = 1024 * 1024;
        let defaults = Limits::default();
        for (max_copy, max_part) in [
            (5 * 1024 * MIB, 5 * 1024 * MIB),
            (100 * MIB, 5 * 1024 * MIB),
            (5 * 1024 * MIB, 100 * MIB),
            (7 * MIB, 7 * MIB),
            (5 * MIB, 5 * MIB),
            (4 * MIB, 5 * MIB),
        ] {
            let limits = Limits {
                max_copy,
                max_part,
                ..defaults
            };
            let range = COPY_RANGE.min(max_copy).min(max_part);
            let bounds = [limits.min_part, range, range + limits.min_part, 3 * range];
            for bound in bounds {
                for missing in bound - 1..=bound + 1 {
                    let Some(len) = copied_len(&limits, missing) else {
                        assert!(missing.min(range) < limits.min_part, "{missing}");
                        continue;
                    };
                    let is_part = limits.min_part <= len && len <= range.min(missing);
                    assert!(is_part, "{len} of {missing}, at most {range}");
                    let rest = missing - len;
                    let is_last = rest == 0 || rest >= limits.min_part;
                    assert!(is_last || range < 2 * limits.min_part, "{rest} are left");
                }
            }
        }
    }

    /// The clock stands still as long as there is something to do, so no reply is sent because of
    /// the time.
    #[tokio::test(start_paused = true)]
    async fn held_replies_are_bounded() {
        let store = Arc::new(MemoryStore::default());
        let pool = BufferPool::new(64 << 20);
        let timeouts = Timeouts::default();
        let transfers = Transfers::new(store, timeouts, pool, PartSizes::default());
        let transfers = Arc::new(transfers);
        let target = Target {
            key: Key::new("f").unwrap(),
            base: None,
            condition: Condition::None,
            events: Teller::default(),
            on_end: Box::new(drop),
        };
        let upload = Upload::open(transfers, target);
        let answered = Arc::new(AtomicUsize::new(0));
        for _ in 0..MAX_HELD + 10 {
            let answered = answered.clone();
            let reply = Box::new(move |result: Result<()>| {
                assert!(result.is_ok());
                answered.fetch_add(1, Ordering::Relaxed);
            });
            let data = vec![Bytes::from_static(b"x")];
            upload.write(Some(ANSWERED_AHEAD + 1), data, reply).await;
        }
        while upload.progress().is_waiting() {
            tokio::task::yield_now().await;
        }
        // The reply to the last one is held after it is counted.
        tokio::task::yield_now().await;
        assert_eq!(answered.load(Ordering::Relaxed), 10);
    }
}
