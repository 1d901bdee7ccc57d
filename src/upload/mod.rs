//! An upload: the task that turns writes into S3 parts, and the handle a session holds on it.
//!
//! Called by `tree` (which opens) and `sftp` (which writes and closes). The task owns everything: when
//! every [`Upload`] is dropped without [`Upload::close`], it lets the parts in flight end and aborts, so that
//! disconnect, panic and shutdown need no code of their own. Nothing appears in the store before CLOSE.

mod assembler;

pub use assembler::{Assembler, PartSizes, REORDER_WINDOW, Refused};

use crate::budget::{Budget, Taken};
use crate::store::*;
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Parts of one upload in flight: enough to fill a link to a distant S3, little enough for one session's memory.
const PARTS_IN_FLIGHT: u64 = 8;
/// The same in bytes, once parts have grown; two are always allowed.
const BYTES_IN_FLIGHT: u64 = 40 * 1024 * 1024;
/// Old bytes are copied inside the store in pieces of this size, side by side.
const COPY_PIECE: u64 = 512 * 1024 * 1024;

/// What every transfer needs of the server.
pub struct Context {
    /// Where the bytes go.
    pub store: Arc<dyn Store>,
    /// The memory promise.
    pub budget: Budget,
    /// How large parts are.
    pub sizes: PartSizes,
    /// Uploads that the server waits for before it ends.
    pub tasks: TaskTracker,
}

/// Why a WRITE or CLOSE fails. The first one is remembered: every later request on the handle says the same.
#[derive(Clone, Debug, thiserror::Error)]
pub enum UploadError {
    /// See [`Refused`].
    #[error(transparent)]
    Refused(#[from] Refused),
    /// See [`StoreError`].
    #[error("the upload failed: {0}")]
    Store(#[from] StoreError),
    /// Bytes were left out.
    #[error("the bytes from offset {0} on never came, though later ones did")]
    Gap(u64),
    /// No part number is left.
    #[error("larger than {0} bytes, the most that {MAX_PARTS} parts hold: the server's --part-size must be raised")]
    TooLong(u64),
    /// A size that can't be set.
    #[error("can't set the size to {size} bytes while {end} were written")]
    Truncate {
        /// As asked for.
        size: u64,
        /// As it is.
        end: u64,
    },
    /// READ of what has left RAM.
    #[error("offset {0} is on its way to the store and can't be read before the file is closed")]
    Unreadable(u64),
    /// The pool is smaller than one part.
    #[error("the server's --buffer-memory is smaller than one part of {0} bytes")]
    Memory(u64),
    /// The task is gone.
    #[error("the upload was cut off")]
    Lost,
}

type Result<T> = std::result::Result<T, UploadError>;

/// Called once with the outcome of a request.
pub type Reply<T> = Box<dyn FnOnce(Result<T>) + Send>;

/// How an upload ended.
#[derive(Debug)]
pub struct Summary {
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
    /// [`Condition::Absent`] under EXCL.
    pub condition: Condition,
    /// Told once how it ended, before CLOSE is answered.
    pub on_end: Box<dyn FnOnce(Summary) + Send>,
}

enum Command {
    Write(Option<u64>, Vec<Bytes>, Reply<()>),
    Read(u64, usize, Reply<Bytes>),
    Truncate(u64, Reply<()>),
    Close(Reply<()>),
}

/// A file open for writing.
pub struct Upload {
    // One command waits while one is carried out: more would be memory without a bound in the promise.
    commands: mpsc::Sender<Command>,
    progress: Arc<Progress>,
}

/// What others see of an upload.
pub struct Progress {
    size: AtomicU64,
    /// When it was opened.
    pub started: SystemTime,
    closing: AtomicBool,
    ended: CancellationToken,
}

impl Progress {
    /// Bytes that the file would have if it was closed now.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// CLOSE has come: the outcome is only a matter of the store.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// Comes back once there is an object, or there will be none.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }
}

impl Upload {
    /// Starts the task. No request is sent before there is something to send.
    pub fn open(context: Arc<Context>, target: Target) -> Upload {
        let (commands, inbox) = mpsc::channel(1);
        let size = AtomicU64::new(target.base.as_ref().map_or(0, |base| base.size));
        let progress = Arc::new(Progress {
            size,
            started: SystemTime::now(),
            closing: AtomicBool::new(false),
            ended: CancellationToken::new(),
        });
        let base = target.base.map(|object| Base { size: object.size, limit: object.size, etag: object.etag });
        let work = Work {
            assembler: Assembler::new(context.sizes),
            key: target.key,
            base,
            condition: target.condition,
            upload_id: None,
            in_flight: JoinSet::new(),
            done: Vec::new(),
            grown: None,
            changed: false,
            failed: None,
            received: 0,
            progress: progress.clone(),
            context: context.clone(),
        };
        context.tasks.spawn(work.run(inbox, target.on_end));
        Upload { commands, progress }
    }

    /// Size and start, for those who ask meanwhile.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// WRITE at an offset, or at the end (`None`). Waits while parts in flight fill the memory: that is the
    /// client's back-pressure.
    pub async fn write(&self, offset: Option<u64>, data: Vec<Bytes>, reply: Reply<()>) {
        self.send(Command::Write(offset, data, reply)).await;
    }

    /// READ of a file that is being written; an empty answer means end of file.
    pub async fn read(&self, offset: u64, len: usize, reply: Reply<Bytes>) {
        self.send(Command::Read(offset, len, reply)).await;
    }

    /// FSETSTAT with a size.
    pub async fn truncate(&self, size: u64, reply: Reply<()>) {
        self.send(Command::Truncate(size, reply)).await;
    }

    /// CLOSE: the reply comes after the store has said whether the object is there.
    pub async fn close(self, reply: Reply<()>) {
        self.progress.closing.store(true, Ordering::Relaxed);
        self.send(Command::Close(reply)).await;
    }

    async fn send(&self, command: Command) {
        if let Err(mpsc::error::SendError(command)) = self.commands.send(command).await {
            match command {
                Command::Write(_, _, reply) | Command::Truncate(_, reply) | Command::Close(reply) => {
                    reply(Err(UploadError::Lost));
                }
                Command::Read(_, _, reply) => reply(Err(UploadError::Lost)),
            }
        }
    }
}

/// The old object under an upload: its first `limit` bytes stay where nothing is written.
struct Base {
    size: u64,
    limit: u64,
    etag: String,
}

struct Work {
    context: Arc<Context>,
    key: Key,
    base: Option<Base>,
    condition: Condition,
    assembler: Assembler,
    upload_id: Option<String>,
    in_flight: JoinSet<std::result::Result<Part, StoreError>>,
    done: Vec<Part>,
    /// Memory of a part that outgrew the first [`MIN_PART`] bytes, which every upload has for itself.
    grown: Option<Taken>,
    /// Is there anything to store at CLOSE?
    changed: bool,
    failed: Option<UploadError>,
    /// Bytes that came in WRITEs.
    received: u64,
    progress: Arc<Progress>,
}

impl Work {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>, on_end: Box<dyn FnOnce(Summary) + Send>) {
        let opened = tokio::time::Instant::now();
        let mut closing = None;
        while let Some(command) = inbox.recv().await {
            match command {
                Command::Write(offset, data, reply) => {
                    let result = self.write(offset, data).await;
                    reply(self.remember(result).await);
                }
                Command::Truncate(size, reply) => {
                    let result = self.truncate(size).await;
                    reply(self.remember(result).await);
                }
                Command::Read(offset, len, reply) => reply(self.read(offset, len).await),
                Command::Close(reply) => {
                    let result = self.close().await;
                    closing = Some((self.remember(result).await, reply));
                    break;
                }
            }
        }
        self.abort().await;
        let parts = self.done.len() as u32;
        let (result, reply) = closing.unzip();
        on_end(Summary { bytes: self.received, parts, took: opened.elapsed(), result: result.clone() });
        self.progress.ended.cancel();
        if let (Some(result), Some(reply)) = (result, reply) {
            reply(result);
        }
    }

    /// Makes the first failure stick, and gives back at once what it held.
    async fn remember(&mut self, result: Result<()>) -> Result<()> {
        if let Err(error) = &result
            && self.failed.is_none()
            && !matches!(error, UploadError::Truncate { .. })
        {
            self.failed = Some(error.clone());
            self.assembler = Assembler::new(self.context.sizes);
            self.grown = None;
            self.abort().await;
        }
        self.progress.size.store(self.len(), Ordering::Relaxed);
        result
    }

    /// Joins the parts before it aborts: a part that arrives after the abort would stay, invisible and billed.
    async fn abort(&mut self) {
        while self.in_flight.join_next().await.is_some() {}
        if let Some(id) = self.upload_id.take()
            && let Err(error) = self.context.store.abort(&self.key, &id).await
        {
            log::warn!("multipart upload {id} of {:?} could not be aborted and stays: {error}", self.key.as_str());
        }
    }

    /// Length of the file as it would be if it was closed now.
    fn len(&self) -> u64 {
        self.assembler.high().max(self.base.as_ref().map_or(0, |base| base.limit))
    }

    fn check_failed(&self) -> Result<()> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    async fn write(&mut self, offset: Option<u64>, data: Vec<Bytes>) -> Result<()> {
        self.check_failed()?;
        while let Some(joined) = self.in_flight.try_join_next() {
            self.record(joined)?;
        }
        let mut offset = offset.unwrap_or_else(|| self.len());
        self.fill_from_base(offset).await?;
        self.assembler.check(offset)?;
        self.changed = true;
        for piece in data {
            self.append(offset, &piece).await?;
            offset += piece.len() as u64;
            self.received += piece.len() as u64;
        }
        Ok(())
    }

    async fn append(&mut self, mut offset: u64, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            if self.assembler.is_full() {
                self.send_part().await?;
            }
            if self.assembler.number() > MAX_PARTS {
                return Err(UploadError::TooLong(self.assembler.start()));
            }
            self.claim_growth(data.len()).await?;
            let taken = self.assembler.write(offset, data)?;
            offset += taken as u64;
            data = data.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    /// Beyond its own 5 MiB a part takes all its memory at once: it never waits for more while it holds some.
    async fn claim_growth(&mut self, more: usize) -> Result<()> {
        let buffered = self.assembler.high() - self.assembler.start();
        let size = self.assembler.part_size();
        if size > MIN_PART && buffered + more as u64 > MIN_PART && self.grown.is_none() {
            self.grown = Some(self.context.budget.take(size).await.ok_or(UploadError::Memory(size))?);
        }
        Ok(())
    }

    /// The buffered part goes to the store in the background, as soon as there is memory for it.
    async fn send_part(&mut self) -> Result<()> {
        let size = self.assembler.part_size();
        let memory = match self.grown.take() {
            Some(taken) => taken,
            None => self.context.budget.take(size).await.ok_or(UploadError::Memory(size))?,
        };
        let (id, number) = self.next_part().await?;
        let (_, body) = self.assembler.cut();
        let (context, key) = (self.context.clone(), self.key.clone());
        self.in_flight.spawn(async move {
            let part = context.store.upload_part(&key, &id, number, body).await;
            drop(memory);
            part
        });
        Ok(())
    }

    /// A place among the parts in flight: the upload id and the next number.
    async fn next_part(&mut self) -> Result<(String, u32)> {
        let number = self.assembler.number();
        if number > MAX_PARTS {
            return Err(UploadError::TooLong(self.assembler.start()));
        }
        let most = (BYTES_IN_FLIGHT / self.assembler.part_size()).clamp(2, PARTS_IN_FLIGHT) as usize;
        while self.in_flight.len() >= most
            && let Some(joined) = self.in_flight.join_next().await
        {
            self.record(joined)?;
        }
        let id = match self.upload_id.clone() {
            Some(id) => id,
            None => self.context.store.create_upload(&self.key).await?,
        };
        self.upload_id = Some(id.clone());
        Ok((id, number))
    }

    fn record(
        &mut self,
        joined: std::result::Result<std::result::Result<Part, StoreError>, tokio::task::JoinError>,
    ) -> Result<()> {
        self.done.push(joined.map_err(|_| UploadError::Lost)??);
        Ok(())
    }

    /// Brings in the old object's bytes from the contiguous end up to `to`: whole parts are copied inside the
    /// store, what is too short for a part, or must be joined with buffered bytes, is loaded.
    async fn fill_from_base(&mut self, to: u64) -> Result<()> {
        let Some(Base { size, limit, etag }) = &self.base else { return Ok(()) };
        // S3 copies ranges of objects longer than 5 MiB only.
        let (to, copyable, etag) = (to.min(*limit), *size > MIN_PART, etag.clone());
        while self.assembler.end() < to {
            if self.assembler.is_full() {
                self.send_part().await?;
            }
            let at = self.assembler.end();
            let missing = to - at;
            let piece = self.copy_piece(missing);
            if copyable && at == self.assembler.start() && missing >= piece {
                self.copy_part(at..at + piece, etag.clone()).await?;
            } else {
                let room = MIN_PART.min(self.assembler.part_size() - (at - self.assembler.start()));
                let old = self.context.store.get(&self.key, at..at + missing.min(room), &etag).await?;
                self.append(at, &old).await?;
            }
        }
        Ok(())
    }

    /// How many of the missing bytes to copy at once. No remainder is left that is too short to be a part.
    fn copy_piece(&self, missing: u64) -> u64 {
        match self.context.sizes.double_every {
            0 => self.assembler.part_size(),
            _ if missing >= COPY_PIECE + MIN_PART => COPY_PIECE,
            _ => missing.max(MIN_PART),
        }
    }

    async fn copy_part(&mut self, range: std::ops::Range<u64>, etag: String) -> Result<()> {
        let (id, number) = self.next_part().await?;
        self.assembler.skip(range.end - range.start);
        let (context, key) = (self.context.clone(), self.key.clone());
        self.in_flight.spawn(async move {
            let from = PartSource { key: &key, etag: &etag, range };
            context.store.copy_part(&key, &id, number, from).await
        });
        Ok(())
    }

    async fn read(&mut self, offset: u64, len: usize) -> Result<Bytes> {
        self.check_failed()?;
        if let Some(bytes) = self.assembler.peek(offset, len) {
            return Ok(Bytes::copy_from_slice(bytes));
        }
        match &self.base {
            Some(base) if (self.assembler.end()..base.limit).contains(&offset) && len > 0 => {
                let end = base.limit.min(offset + len as u64);
                Ok(self.context.store.get(&self.key, offset..end, &base.etag).await?)
            }
            _ if offset >= self.len() => Ok(Bytes::new()),
            _ => Err(UploadError::Unreadable(offset)),
        }
    }

    async fn truncate(&mut self, size: u64) -> Result<()> {
        self.check_failed()?;
        let end = self.len();
        if size > end {
            return Err(UploadError::Truncate { size, end });
        }
        if size == 0 && self.assembler.start() > 0 {
            self.abort().await;
            self.done.clear();
            self.assembler = Assembler::new(self.context.sizes);
        } else if size < self.assembler.high() && !self.assembler.truncate(size) {
            return Err(UploadError::Truncate { size, end });
        }
        if let Some(base) = self.base.as_mut() {
            base.limit = base.limit.min(size);
        }
        self.changed |= size < end;
        Ok(())
    }

    async fn close(&mut self) -> Result<()> {
        self.check_failed()?;
        if !self.changed && self.base.is_some() {
            return Ok(());
        }
        if self.assembler.has_gap() {
            return Err(UploadError::Gap(self.assembler.end()));
        }
        self.fill_from_base(u64::MAX).await?;
        while self.assembler.is_overfull() {
            self.send_part().await?;
        }
        let size = self.assembler.end();
        if self.upload_id.is_none() {
            let (_, body) = self.assembler.cut();
            let put = self.context.store.put(&self.key, body.clone(), self.condition).await;
            return self.settle(put, size, || Some(etag_of(&body))).await;
        }
        if size > self.assembler.start() {
            self.send_last_part().await?;
        }
        while let Some(joined) = self.in_flight.join_next().await {
            self.record(joined)?;
        }
        self.complete(size).await
    }

    /// Its memory is this upload's own, so it needs no more to leave.
    async fn send_last_part(&mut self) -> Result<()> {
        let (id, number) = self.next_part().await?;
        let (_, body) = self.assembler.cut();
        let part = self.context.store.upload_part(&self.key, &id, number, body).await?;
        self.done.push(part);
        Ok(())
    }

    async fn complete(&mut self, size: u64) -> Result<()> {
        self.done.sort_by_key(|part| part.number);
        let sent: u64 = self.done.iter().map(|part| part.size).sum();
        let Some(id) = self.upload_id.clone().filter(|_| sent == size) else {
            let why = format!("{sent} bytes in parts, {size} received");
            return Err(StoreError::Other(why).into());
        };
        let completed = self.context.store.complete(&self.key, &id, &self.done, self.condition).await;
        self.settle(completed, size, || etag_of_parts(&self.done)).await?;
        self.upload_id = None;
        Ok(())
    }

    /// A lost answer, or a refusal that may be the echo of our own success, is decided by what is there now.
    async fn settle(
        &self,
        result: std::result::Result<(), StoreError>,
        size: u64,
        etag: impl FnOnce() -> Option<String>,
    ) -> Result<()> {
        let doubt = match result {
            Err(doubt @ (StoreError::Unknown(_) | StoreError::Precondition)) => doubt,
            settled => return Ok(settled?),
        };
        match self.context.store.head(&self.key).await {
            Ok(object) if object.size == size && Some(&object.etag) == etag().as_ref() => Ok(()),
            _ => Err(doubt.into()),
        }
    }
}
