//! An upload: the task that turns writes into S3 parts, and the handle a session holds on it.
//!
//! Called by `tree` (which opens) and `sftp` (which writes and closes). The task owns everything: when
//! every [`Upload`] is dropped without [`Upload::close`], it lets the parts in flight end and aborts, so that
//! disconnect and shutdown need no code of their own; a panic is one more way for a request to fail. Nothing appears
//! in the store before CLOSE.

use super::{
    ANSWERED_AHEAD, LockedName, NameLock, NameLocks, PartBuffer, REORDER_WINDOW, Reservation,
    Share, Transfers, abort,
};
use crate::catch_panic;
use crate::metrics::{GaugeGuard, OPEN_UPLOADS};
use crate::path::Key;
use crate::store::{
    self, Attributes, Condition, MIN_PART, Object, Part, PartSource, StoreError, WriteId, change,
};
use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

/// Parts of one upload in flight: enough to fill a link to a distant S3, little enough for one session's memory.
const PARTS_IN_FLIGHT: u64 = 8;
/// The same in bytes, once parts have grown; two are always allowed.
const BYTES_IN_FLIGHT: u64 = 40 * 1024 * 1024;
/// Old bytes are copied inside the store in pieces of this size, side by side.
const COPY_PIECE: u64 = 512 * 1024 * 1024;
/// ReadSink to early writes that are held back at once; beyond it the oldest is given. A client keeps at most a few hundred
/// requests under way.
const MAX_HELD: usize = 1024;
/// A client that sends nothing for so long, while answers are held back, may be waiting for them before it goes on.
const HOLD_TIME: Duration = Duration::from_secs(5);
/// Bytes that a client may leave out of a file altogether, as for a sparse one: they are stored as zeros, part by part.
pub const MAX_HOLES: u64 = 1024 * 1024 * 1024;
/// Zeros are written in pieces of this size, in bytes.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
/// Up to this part number a part may leave before it has grown to its size. The later ones of the 10,000 are needed as
/// large as they can be.
const MAX_SHORT_PARTS: u32 = 8000;
/// How long a part that can't leave early waits for memory that other such parts hold, before its upload fails.
const GROWN_PART_WAIT: Duration = Duration::from_secs(30);
/// For parts in flight to arrive before their upload is aborted. What arrives afterwards could stay in the store.
const LAST_PARTS_TIME: Duration = Duration::from_secs(10);

/// Why a WRITE or CLOSE fails. The first one is remembered: every later request on the handle says the same.
#[derive(Clone, Debug, thiserror::Error)]
pub enum UploadError {
    /// See [`StoreError`].
    #[error("the upload failed: {0}")]
    Store(#[from] StoreError),
    /// A size that can't be set. The only failure that is not remembered.
    #[error("{0}")]
    Unsupported(String),
    /// Everything else: what the client did, or what the server lacks.
    #[error("{0}")]
    Refused(String),
}

use UploadError::Refused;

type Result<T> = std::result::Result<T, UploadError>;

/// Called once with the outcome of a request.
pub type Reply<T> = Box<dyn FnOnce(Result<T>) + Send>;

/// How an upload ended.
#[derive(Debug)]
pub struct UploadSummary {
    /// Bytes received.
    pub bytes: u64,
    /// S3 parts; 0 for a single PutObject.
    pub parts: u32,
    /// From OPEN on.
    pub took: Duration,
    /// `None` when the client went away before CLOSE.
    pub result: Option<Result<()>>,
}

/// What to open.
pub struct Target {
    /// The key that will appear at CLOSE.
    pub key: Key,
    /// The object that stays underneath where nothing is written (an open without TRUNC).
    pub base: Option<Object>,
    /// What must be at the key when the file is closed.
    pub condition: Condition,
    /// Told once how it ended, before CLOSE is answered.
    pub on_end: Box<dyn FnOnce(UploadSummary) + Send>,
}

enum Command {
    Write(Option<u64>, Vec<Bytes>),
    Read(u64, usize),
    Truncate(u64),
    /// With the file's place among the changes of its name.
    Close(Arc<NameLock>),
}

/// Where bytes of a file that is being written are.
enum Location {
    Ram,
    /// In the object that is being changed, up to `end`.
    OldObject {
        etag: String,
        end: u64,
    },
    /// On their way to the store, or not there yet.
    Unreadable,
}

/// What decides when a request is answered.
enum Kind {
    Write { offset: u64 },
    Close(Arc<NameLock>),
    Other,
}

impl Kind {
    /// `end` is where a write without an offset goes.
    fn of(command: &Command, end: u64) -> Kind {
        match command {
            Command::Write(_, data) if data.iter().all(Bytes::is_empty) => Kind::Other,
            Command::Write(offset, _) => Kind::Write {
                offset: offset.unwrap_or(end),
            },
            Command::Close(lock) => Kind::Close(lock.clone()),
            Command::Read(..) | Command::Truncate(_) => Kind::Other,
        }
    }
}

/// A file open for writing.
pub struct Upload {
    // One command waits while one is carried out: more would be memory without a bound in the promise.
    commands: mpsc::Sender<(Command, Reply<Bytes>)>,
    progress: Arc<Progress>,
    locks: NameLocks,
    name: LockedName,
}

/// What others see of an upload.
pub struct Progress {
    /// Bytes that the file has after the requests that were carried out.
    size: AtomicU64,
    /// Bytes that the file has after all requests that came, unless one of them fails.
    announced: AtomicU64,
    /// Requests that came and are not carried out yet, READs left out.
    waiting: AtomicU64,
    /// When it was opened.
    pub started: SystemTime,
    ended: CancellationToken,
}

impl Progress {
    /// Bytes that the file has after every request that came before this call, whether it is carried out yet or waits
    /// for the store.
    pub fn size(&self) -> u64 {
        match self.waiting.load(Ordering::Acquire) {
            0 => self.size.load(Ordering::Relaxed),
            _ => self.announced.load(Ordering::Relaxed),
        }
    }

    /// Notes a request that may change the size. Those of one upload come from one task.
    fn announce(&self, change: impl FnOnce(u64) -> u64) {
        self.announced.store(change(self.size()), Ordering::Relaxed);
        self.waiting.fetch_add(1, Ordering::Release);
    }

    /// Notes that the oldest request was carried out, and the size since then.
    fn carried_out(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
        self.waiting.fetch_sub(1, Ordering::Release);
    }

    /// Comes back once there is an object, or there will be none.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }
}

impl Upload {
    /// Starts the task. No request is sent before there is something to send.
    pub fn open(transfers: Arc<Transfers>, target: Target) -> Upload {
        let (commands, inbox) = mpsc::channel(1);
        let limit = target.base.as_ref().map_or(0, |base| base.size);
        let progress = Arc::new(Progress {
            size: limit.into(),
            announced: limit.into(),
            waiting: 0.into(),
            started: SystemTime::now(),
            ended: CancellationToken::new(),
        });
        let (locks, name) = (transfers.locks.clone(), LockedName::alone(&target.key));
        let work = UploadTask {
            target,
            limit,
            extended: 0,
            holes: 0,
            buffer: PartBuffer::new(transfers.sizes, transfers.pool.clone()),
            memory: None,
            multipart: None,
            in_flight: JoinSet::new(),
            done: Vec::new(),
            held: VecDeque::new(),
            writes_on: false,
            received: 0,
            failed: None,
            progress: progress.clone(),
            transfers: transfers.clone(),
        };
        transfers.tasks.spawn(work.run(inbox));
        Upload {
            commands,
            progress,
            locks,
            name,
        }
    }

    /// Size and start, for those who ask meanwhile.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// WRITE of these bytes, one after the other, at an offset or at the end (`None`). Waits while parts in flight
    /// fill the memory: that is the client's back-pressure. The reply to a write that lies far beyond a gap comes once
    /// the gap is nearer.
    pub async fn write(&self, offset: Option<u64>, data: Vec<Bytes>, reply: Reply<()>) {
        let len: u64 = data.iter().map(|piece| piece.len() as u64).sum();
        self.progress.announce(|size| match offset {
            Some(_) if len == 0 => size,
            Some(offset) => size.max(offset.saturating_add(len)),
            None => size.saturating_add(len),
        });
        self.send(Command::Write(offset, data), |result| {
            reply(result.map(drop))
        })
        .await;
    }

    /// READ of a file that is being written; an empty answer means end of file.
    pub async fn read(&self, offset: u64, len: usize, reply: Reply<Bytes>) {
        self.reader().read(offset, len, reply).await;
    }

    /// A way to read the file that does not keep it open.
    pub fn reader(&self) -> Reader {
        Reader {
            commands: self.commands.downgrade(),
        }
    }

    /// FSETSTAT with a size.
    pub async fn truncate(&self, size: u64, reply: Reply<()>) {
        self.progress.announce(|_| size);
        self.send(Command::Truncate(size), |result| reply(result.map(drop)))
            .await;
    }

    /// CLOSE: the reply comes after the store has said whether the object is there. Changes of this name that are asked
    /// for after this call come after it.
    pub async fn close(self, reply: Reply<()>) {
        let lock = self.locks.enqueue(vec![self.name.clone()]);
        self.progress.announce(|size| size);
        self.send(Command::Close(Arc::new(lock)), |result| {
            reply(result.map(drop))
        })
        .await;
    }

    async fn send(&self, command: Command, reply: impl FnOnce(Result<Bytes>) + Send + 'static) {
        send(&self.commands, command, Box::new(reply)).await;
    }
}

/// Reads a file that is open for writing. Once that is closed or dropped, every READ fails.
pub struct Reader {
    commands: mpsc::WeakSender<(Command, Reply<Bytes>)>,
}

impl Reader {
    /// READ; an empty answer means end of file.
    pub async fn read(&self, offset: u64, len: usize, reply: Reply<Bytes>) {
        let Some(commands) = self.commands.upgrade() else {
            return reply(Err(cut_off()));
        };
        send(&commands, Command::Read(offset, len), reply).await;
    }
}

async fn send(
    commands: &mpsc::Sender<(Command, Reply<Bytes>)>,
    command: Command,
    reply: Reply<Bytes>,
) {
    if let Err(mpsc::error::SendError((_, reply))) = commands.send((command, reply)).await {
        reply(Err(cut_off()));
    }
}

fn cut_off() -> UploadError {
    Refused("the upload was cut off".to_owned())
}

struct UploadTask {
    transfers: Arc<Transfers>,
    target: Target,
    /// So many first bytes of the old object stay where nothing is written; 0 without one.
    limit: u64,
    /// The client has asked for at least this size in bytes: what is missing at the end are zeros.
    extended: u64,
    /// Bytes that the client has left out so far and that were stored as zeros.
    holes: u64,
    buffer: PartBuffer,
    /// For the part being filled, taken from the pool: once it is to be sent, or outgrows the first [`MIN_PART`]
    /// bytes, which every upload has for itself.
    memory: Option<Reservation>,
    multipart: Option<Multipart>,
    in_flight: JoinSet<store::Result<Part>>,
    done: Vec<Part>,
    /// ReadSink to writes far beyond a gap, with the offsets of these, in the order in which they came.
    held: VecDeque<(u64, Reply<Bytes>)>,
    /// The client goes on behind a gap although its answers were held back: no more are, until the gap is closed.
    writes_on: bool,
    /// Bytes that came in WRITEs.
    received: u64,
    failed: Option<UploadError>,
    progress: Arc<Progress>,
}

/// A multipart upload that was created.
#[derive(Clone)]
struct Multipart {
    id: String,
    write_id: WriteId,
}

impl UploadTask {
    async fn run(mut self, mut inbox: mpsc::Receiver<(Command, Reply<Bytes>)>) {
        let opened = Instant::now();
        let _open = GaugeGuard::of(OPEN_UPLOADS);
        let mut closed = None;
        while let Some((command, reply)) = self.next(&mut inbox).await {
            let end_before = self.len();
            let kind = Kind::of(&command, end_before);
            let result = self.execute(command).await;
            match (kind, result) {
                // Nothing comes after CLOSE: it takes the handle. The name stays locked until the upload is no longer shown,
                // or what comes next would find it busy.
                (Kind::Close(lock), result) => closed = Some((result, reply, lock)),
                (Kind::Write { offset }, Ok(_)) if self.is_far_ahead(offset) => {
                    self.hold(offset, reply)
                }
                (_, result) => reply(result),
            }
            self.release();
        }
        if closed.is_none() {
            self.failed.get_or_insert_with(cut_off);
        }
        self.release_all();
        let (bytes, parts) = (self.received, self.done.len() as u32);
        self.reset().await;
        let result = closed.as_ref().map(|(result, ..)| result.clone().map(drop));
        (self.target.on_end)(UploadSummary {
            bytes,
            parts,
            took: opened.elapsed(),
            result,
        });
        self.progress.ended.cancel();
        if let Some((result, reply, lock)) = closed {
            drop(lock);
            reply(result);
        }
    }

    /// The next request. While the client is waited for, answers that are held back are given once it has been silent for
    /// [`HOLD_TIME`], and a part that has grown leaves as soon as others need its memory.
    async fn next(
        &mut self,
        inbox: &mut mpsc::Receiver<(Command, Reply<Bytes>)>,
    ) -> Option<(Command, Reply<Bytes>)> {
        let silence = Instant::now() + HOLD_TIME;
        loop {
            let pool = self.transfers.pool.clone();
            tokio::select! {
                biased;
                next = inbox.recv() => return next,
                () = pool.wait_for_pressure(), if self.memory.is_some() && self.may_send_early() => {
                    if let Err(error) = self.send_early().await {
                        self.fail(error).await;
                    }
                }
                () = sleep_until(silence), if !self.held.is_empty() => {
                    self.writes_on = true;
                    self.release_all();
                }
            }
        }
    }

    fn is_far_ahead(&self, offset: u64) -> bool {
        !self.writes_on && offset > self.buffer.end() + ANSWERED_AHEAD
    }

    /// Holds the answer to a write back, until [`UploadTask::release`] gives it.
    fn hold(&mut self, offset: u64, reply: Reply<Bytes>) {
        if self.held.len() >= MAX_HELD
            && let Some((_, oldest)) = self.held.pop_front()
        {
            oldest(Ok(Bytes::new()));
        }
        self.held.push_back((offset, reply));
    }

    /// Gives the answers to writes that no longer lie far beyond a gap; all of them once the upload has failed.
    fn release(&mut self) {
        for (offset, reply) in std::mem::take(&mut self.held) {
            if self.failed.is_none() && self.is_far_ahead(offset) {
                self.held.push_back((offset, reply));
            } else {
                self.answer_write(reply);
            }
        }
    }

    /// Gives all answers, whatever gap is open.
    fn release_all(&mut self) {
        for (_, reply) in std::mem::take(&mut self.held) {
            self.answer_write(reply);
        }
    }

    fn answer_write(&self, reply: Reply<Bytes>) {
        match &self.failed {
            Some(error) => reply(Err(error.clone())),
            None => reply(Ok(Bytes::new())),
        }
    }

    /// One request. The first failure to change the file sticks, and gives back at once what was held.
    async fn execute(&mut self, command: Command) -> Result<Bytes> {
        if matches!(command, Command::Read(..)) {
            return self.try_out(command).await;
        }
        let result = self.try_out(command).await;
        if let Err(error @ (UploadError::Store(_) | Refused(_))) = &result {
            self.fail(error.clone()).await;
        }
        if self.buffer.end() == self.buffer.written_end() {
            self.writes_on = false;
        }
        self.progress.carried_out(self.len());
        result
    }

    /// Remembers the first failure, and gives back what is held.
    async fn fail(&mut self, error: UploadError) {
        if self.failed.is_none() {
            self.failed = Some(error);
            self.reset().await;
        }
    }

    /// One request, unless an earlier one has failed.
    async fn try_out(&mut self, command: Command) -> Result<Bytes> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match catch_panic(self.dispatch(command)).await {
            Ok(result) => result,
            Err(panicked) => Err(Refused(panicked.to_string())),
        }
    }

    async fn dispatch(&mut self, command: Command) -> Result<Bytes> {
        match command {
            Command::Read(offset, len) => return self.read(offset, len).await,
            Command::Write(offset, data) => self.write(offset, data).await?,
            Command::Truncate(size) => self.truncate(size).await?,
            Command::Close(lock) => self.close(&lock).await?,
        }
        Ok(Bytes::new())
    }

    /// Back to an empty file. Waits for the parts in flight before it aborts: a part that arrives after the abort would
    /// stay, invisible and billed.
    async fn reset(&mut self) {
        self.buffer = PartBuffer::new(self.transfers.sizes, self.transfers.pool.clone());
        self.memory = None;
        let parts = async { while self.in_flight.join_next().await.is_some() {} };
        if timeout(LAST_PARTS_TIME, parts).await.is_err() {
            // Their requests end in the middle of the body, or without anybody to hear the answer.
            self.in_flight.shutdown().await;
        }
        self.done.clear();
        if let Some(Multipart { id, .. }) = self.multipart.take() {
            abort(self.transfers.store.as_ref(), &self.target.key, &id).await;
        }
    }

    /// Length of the file as it would be if it was closed now.
    fn len(&self) -> u64 {
        self.buffer.written_end().max(self.limit).max(self.extended)
    }

    async fn write(&mut self, offset: Option<u64>, data: Vec<Bytes>) -> Result<()> {
        self.collect_parts(usize::MAX).await?;
        let mut offset = offset.unwrap_or_else(|| self.len());
        if data.iter().all(Bytes::is_empty) {
            return Ok(());
        }
        self.fill_from_base(offset).await?;
        if offset > self.buffer.end().saturating_add(REORDER_WINDOW) {
            // What is still missing that far back does not come any more.
            self.fill_holes(offset - ANSWERED_AHEAD).await?;
        }
        // Of what comes early, the beginning decides whether it comes too early.
        let is_early = offset > self.buffer.end();
        for piece in if is_early {
            vec![data.concat().into()]
        } else {
            data
        } {
            self.append(offset, &piece).await?;
            offset += piece.len() as u64;
            self.received += piece.len() as u64;
        }
        Ok(())
    }

    async fn append(&mut self, mut offset: u64, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            if self.buffer.is_full() {
                self.send_part(None).await?;
            }
            self.grow_to(self.buffer.contiguous_len_with(offset, data.len()))
                .await?;
            let taken = self.buffer.write(offset, data).map_err(Refused)?;
            // It may have closed a gap.
            self.grow_to(self.buffer.contiguous_len()).await?;
            offset += taken as u64;
            data = data.get(taken..).unwrap_or_default();
        }
        while self.buffer.is_overdue() {
            self.send_part(None).await?;
        }
        Ok(())
    }

    /// Stores zeros where the client has left bytes out, up to `to`.
    async fn fill_holes(&mut self, to: u64) -> Result<()> {
        if to.saturating_sub(self.buffer.end()) > MAX_HOLES - self.holes {
            return Err(Refused(format!(
                "more than {MAX_HOLES} bytes of the file were left out"
            )));
        }
        while self.buffer.end() < to {
            if self.buffer.is_full() {
                self.send_part(None).await?;
            }
            let at = self.buffer.end();
            let hole = self.buffer.gap_end().unwrap_or(to).min(to) - at;
            let room = self.buffer.part_size() - self.buffer.contiguous_len();
            let len = hole.min(room).min(ZEROS.len() as u64);
            self.holes += len;
            self.append(at, ZEROS.get(..len as usize).unwrap_or_default())
                .await?;
        }
        Ok(())
    }

    /// May a part leave before it is full? Not where the store demands equal ones, or most of the parts are used up.
    fn may_send_early(&self) -> bool {
        self.transfers.sizes.double_every != 0 && self.buffer.parts() < MAX_SHORT_PARTS
    }

    /// Takes the memory of the whole part once more than [`MIN_PART`] contiguous bytes of it are to be held. No client is
    /// waited for with it that could not be: without memory, or when others need it, the part leaves as it is.
    async fn grow_to(&mut self, ready: u64) -> Result<()> {
        let size = self.buffer.part_size();
        if self.memory.is_some() || ready <= MIN_PART || size <= MIN_PART {
            return Ok(());
        }
        if self.may_send_early() {
            self.memory = self.transfers.pool.try_take(size);
            if self.memory.is_none() {
                self.buffer
                    .shrink_part(short_part(self.buffer.contiguous_len()));
            }
            return Ok(());
        }
        let taking = self.transfers.pool.take_share(Share::GrownParts, size);
        match timeout(GROWN_PART_WAIT, taking).await {
            Ok(Some(memory)) => self.memory = Some(memory),
            Ok(None) => return Err(too_small(size)),
            Err(_elapsed) => {
                let why =
                    format!("other uploads hold the server's memory for parts of {size} bytes");
                return Err(Refused(format!(
                    "{why}: try again later, or raise --buffer-memory"
                )));
            }
        }
        Ok(())
    }

    /// Sends the part as it is, so that others can have its memory.
    async fn send_early(&mut self) -> Result<()> {
        let ready = self.buffer.contiguous_len();
        if ready < MIN_PART {
            self.memory = None;
            return Ok(());
        }
        self.buffer.shrink_part(short_part(ready));
        self.send_part(None).await
    }

    /// The next part goes to the store in the background: what is buffered or, of the version with this ETag, bytes
    /// that the store copies. Waits for a place among the parts in flight and, in mid-file, for memory; the last
    /// part has this upload's own.
    async fn send_part(&mut self, copied: Option<(Range<u64>, String)>) -> Result<()> {
        let size = self.buffer.part_size();
        let number = self.buffer.number().map_err(Refused)?;
        let most = (BYTES_IN_FLIGHT / size).clamp(2, PARTS_IN_FLIGHT) as usize;
        self.collect_parts(most - 1).await?;
        let mut memory = self.memory.take();
        match &mut memory {
            Some(memory) => memory.reduce_to(size),
            None if self.buffer.is_full() => {
                memory = Some(
                    self.transfers
                        .pool
                        .take(size)
                        .await
                        .ok_or_else(|| too_small(size))?,
                );
            }
            None => {}
        }
        let Multipart { id, .. } = self.begin_multipart().await?;
        let (transfers, key) = (self.transfers.clone(), self.target.key.clone());
        let size = copied
            .as_ref()
            .map_or(size.min(self.buffer.contiguous_len()), |(range, _)| {
                range.end - range.start
            });
        let body = self.buffer.take_part(size).map_err(Refused)?;
        self.in_flight.spawn(async move {
            let _memory = memory;
            let Some((range, etag)) = copied else {
                return transfers.store.upload_part(&key, &id, number, body).await;
            };
            transfers
                .store
                .copy_part(
                    &key,
                    &id,
                    number,
                    PartSource {
                        key: &key,
                        etag: &etag,
                        range,
                    },
                )
                .await
        });
        Ok(())
    }

    /// The multipart upload, which is created with its first part.
    async fn begin_multipart(&mut self) -> Result<Multipart> {
        if let Some(multipart) = &self.multipart {
            return Ok(multipart.clone());
        }
        let (attributes, write_id) = self.attributes().with_new_write_id();
        let id = self
            .transfers
            .store
            .create_upload(&self.target.key, &attributes)
            .await?;
        Ok(self.multipart.insert(Multipart { id, write_id }).clone())
    }

    /// Those of the object that is being changed.
    fn attributes(&self) -> Attributes {
        let old = self
            .target
            .base
            .as_ref()
            .and_then(|base| base.attributes.as_deref());
        old.cloned().unwrap_or_default()
    }

    /// Notes the parts that are done, and waits while more than `most` are in flight.
    async fn collect_parts(&mut self, most: usize) -> Result<()> {
        loop {
            let wait = self.in_flight.len() > most;
            let joined = if wait {
                self.in_flight.join_next().await
            } else {
                self.in_flight.try_join_next()
            };
            match joined {
                Some(part) => self.done.push(part.map_err(|_| cut_off())??),
                None => return Ok(()),
            }
        }
    }

    /// Brings in the old object's bytes from the contiguous end up to `to`: whole parts are copied inside the
    /// store, what is too short for a part, or must be joined with buffered bytes, is loaded.
    async fn fill_from_base(&mut self, to: u64) -> Result<()> {
        let Some(Object { size, etag, .. }) = self.target.base.clone() else {
            return Ok(());
        };
        let to = to.min(self.limit);
        while self.buffer.end() < to {
            if self.buffer.is_full() {
                self.send_part(None).await?;
            }
            let at = self.buffer.end();
            let (missing, room) = (
                to - at,
                self.buffer.part_size() - self.buffer.contiguous_len(),
            );
            // No remainder is left that is too short to be a part.
            let piece = match self.transfers.sizes.double_every {
                0 => self.buffer.part_size(),
                _ if missing >= COPY_PIECE + MIN_PART => COPY_PIECE,
                _ => missing.max(MIN_PART),
            };
            // S3 copies ranges of objects longer than 5 MiB only.
            if size > MIN_PART && self.buffer.contiguous_len() == 0 && missing >= piece {
                self.send_part(Some((at..at + piece, etag.clone()))).await?;
            } else {
                let range = at..at + missing.min(room).min(MIN_PART);
                let old = self
                    .transfers
                    .store
                    .get(&self.target.key, range, &etag)
                    .await?;
                self.append(at, &old.concat()).await?;
            }
        }
        Ok(())
    }

    /// Bytes from RAM, then from the old object, until there are `len` of them or the file ends. Nothing is read behind
    /// bytes that are on their way to the store, or never came.
    async fn read(&mut self, offset: u64, len: usize) -> Result<Bytes> {
        let wanted_end = offset.saturating_add(len as u64).min(self.len());
        let mut found = BytesMut::new();
        let mut at = offset;
        while at < wanted_end {
            let missing = (wanted_end - at) as usize;
            let piece = match self.locate(at) {
                Location::Ram => {
                    Bytes::copy_from_slice(self.buffer.peek(at, missing).unwrap_or_default())
                }
                Location::OldObject { etag, end } => {
                    let range = at..end.min(wanted_end);
                    self.transfers
                        .store
                        .get(&self.target.key, range, &etag)
                        .await?
                        .concat()
                        .into()
                }
                Location::Unreadable if at == offset => {
                    let why =
                        "is on its way to the store and can't be read before the file is closed";
                    return Err(Refused(format!("offset {offset} {why}")));
                }
                Location::Unreadable => break,
            };
            at += piece.len() as u64;
            found.extend_from_slice(&piece);
        }
        Ok(found.freeze())
    }

    /// Where the byte at this offset can be read.
    fn locate(&self, offset: u64) -> Location {
        let in_ram = self
            .buffer
            .peek(offset, 1)
            .is_some_and(|byte| !byte.is_empty());
        match &self.target.base {
            _ if in_ram => Location::Ram,
            Some(base) if (self.buffer.end()..self.limit).contains(&offset) => {
                Location::OldObject {
                    etag: base.etag.clone(),
                    end: self.limit,
                }
            }
            _ => Location::Unreadable,
        }
    }

    async fn truncate(&mut self, size: u64) -> Result<()> {
        let end = self.len();
        if size > end.saturating_add(MAX_HOLES) {
            return Err(UploadError::Unsupported(format!(
                "more than {MAX_HOLES} bytes of the file would be left out"
            )));
        }
        if size == 0 && self.multipart.is_some() {
            self.reset().await;
        } else if size < self.buffer.written_end() && !self.buffer.truncate(size) {
            let why = format!("can't set the size to {size} bytes while {end} were written");
            return Err(UploadError::Unsupported(why));
        }
        self.limit = self.limit.min(size);
        self.extended = size;
        Ok(())
    }

    async fn close(&mut self, lock: &NameLock) -> Result<()> {
        let unchanged = |base: &Object| {
            base.size == self.len() && base.size == self.limit && self.buffer.written_end() == 0
        };
        if self.target.base.as_ref().is_some_and(unchanged) {
            return Ok(());
        }
        // What the old object does not have, and the client has not sent, are zeros.
        self.fill_from_base(u64::MAX).await?;
        self.fill_holes(self.len()).await?;
        let size = self.buffer.end();
        if self.multipart.is_some() {
            if self.buffer.contiguous_len() > 0 {
                self.send_part(None).await?;
            }
            self.collect_parts(0).await?;
            self.done.sort_by_key(|part| part.number);
            let sent: u64 = self.done.iter().map(|part| part.size).sum();
            let complete = self
                .done
                .iter()
                .map(|part| part.number)
                .eq(1..self.buffer.parts() + 1);
            if sent != size || !complete {
                let parts = self.done.len();
                return Err(StoreError::Other(format!(
                    "{sent} bytes in {parts} parts, {size} received"
                ))
                .into());
            }
        }
        lock.wait().await;
        self.store().await
    }

    /// Makes the object from the parts, or from the buffer alone.
    async fn store(&mut self) -> Result<()> {
        let (store, key, condition) = (
            self.transfers.store.as_ref(),
            &self.target.key,
            &self.target.condition,
        );
        let body = self
            .buffer
            .take_part(self.buffer.contiguous_len())
            .map_err(Refused)?;
        match &self.multipart {
            Some(Multipart { id, write_id }) => {
                change::complete(store, key, id, &self.done, write_id, condition).await?;
            }
            None => {
                change::put(store, key, body, &self.attributes(), condition).await?;
            }
        }
        self.multipart = None;
        Ok(())
    }
}

fn too_small(size: u64) -> UploadError {
    Refused(format!(
        "the server's --buffer-memory is smaller than one part of {size} bytes"
    ))
}

/// Size of a part that leaves early: whole multiples of [`MIN_PART`], by which the parts of this server are known.
fn short_part(ready: u64) -> u64 {
    (ready / MIN_PART).max(1) * MIN_PART
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;
    use crate::transfer::{BufferPool, PartSizes};
    use std::sync::atomic::AtomicUsize;

    /// The clock stands still as long as there is something to do, so nothing is answered because of the time.
    #[tokio::test(start_paused = true)]
    async fn answers_that_are_held_back_are_bounded() {
        let store = Arc::new(MemoryStore::default());
        let transfers = Arc::new(Transfers::new(
            store,
            BufferPool::new(64 << 20),
            PartSizes::default(),
        ));
        let key = Key::new("f").unwrap();
        let target = Target {
            key,
            base: None,
            condition: Condition::None,
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
            upload
                .write(
                    Some(ANSWERED_AHEAD + 1),
                    vec![Bytes::from_static(b"x")],
                    reply,
                )
                .await;
        }
        while upload.progress.waiting.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
        // The answer to the last one is held after it is counted.
        tokio::task::yield_now().await;
        assert_eq!(answered.load(Ordering::Relaxed), 10);
    }
}
