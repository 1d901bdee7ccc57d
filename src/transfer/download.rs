//! A download: the task that answers READs from ranges fetched ahead, all of one version of the
//! object.
//!
//! Called by `vfs` (which opens) and `sftp` (which queues READs). The task waits for the store and
//! for the client's window, so the session never has to. Read-ahead takes memory only when it is
//! free; the range that a READ needs right now is fetched without asking, so no download waits for
//! another.

use super::{BlockMemory, FIRST_BLOCK, Read, ReadAhead, ReadQueue, SessionLimits, Transfers};
use crate::path::Key;
use crate::store::{self, Object, StoreError, slice_pieces};
use bytes::Bytes;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::task::AbortOnDropHandle;

/// paramiko's `get` asks for a whole file from one thread and, if the answers ever catch up with
/// its questions, takes the file for finished and goes on READ by READ, at a tenth of the speed. So
/// the first answer waits until this many more READs are there …
const HEAD_START: u32 = 8;
/// … but no longer than this, counted from the question: S3 takes most of that time, or all,
/// anyway.
const HEAD_START_TIME: Duration = Duration::from_millis(5);

/// A range is fetched for a READ in no less than this many bytes, as long as there is memory.
const MIN_FETCH: u64 = FIRST_BLOCK;
/// Fetched blocks are dropped after this time without a READ, so that others can use the memory.
const KEEP_TIME: Duration = Duration::from_secs(5);

/// Where the data of READs goes.
pub trait ReadSink: Send + Sync + 'static {
    /// Sends the bytes that a READ asked for, in pieces, or its failure; an empty answer is the end
    /// of the file. Waits until the client takes them. Returns false if the client is gone.
    fn answer(
        &self,
        id: u32,
        result: store::Result<Vec<Bytes>>,
    ) -> impl Future<Output = bool> + Send;
}

/// How a download went.
#[derive(Debug)]
pub struct DownloadSummary {
    /// Bytes sent to the client.
    pub bytes: u64,
    /// GET requests.
    pub requests: u64,
    /// Time since OPEN.
    pub took: Duration,
    /// The last failure.
    pub error: Option<StoreError>,
}

/// The version of an object to read, and the bytes that the opening GET has already returned.
pub struct OpenedObject {
    object: Object,
    first: Option<Block>,
}

impl From<Object> for OpenedObject {
    fn from(object: Object) -> OpenedObject {
        OpenedObject {
            object,
            first: None,
        }
    }
}

impl OpenedObject {
    /// Its description.
    pub fn object(&self) -> &Object {
        &self.object
    }

    /// Sends one GET, which is all that a small file needs; or a HEAD if there is no memory for
    /// more.
    pub async fn ask(
        transfers: &Transfers,
        key: &Key,
        limits: &SessionLimits,
    ) -> store::Result<OpenedObject> {
        let Some(memory) = limits.try_read_ahead(FIRST_BLOCK) else {
            return Ok(transfers.store.head(key).await?.into());
        };
        let (object, bytes) = transfers.store.open(key, FIRST_BLOCK).await?;
        let first = Block {
            range: 0..bytes.len() as u64,
            fetch: None,
            pieces: pool_pieces(vec![bytes], Some(memory)),
            memory: None,
            is_counted: true,
        };
        Ok(OpenedObject {
            object,
            first: Some(first),
        })
    }
}

/// A file open for reading. Dropped, it answers the READs that wait, but without data.
pub struct Download {
    queue: Arc<ReadQueue>,
    object: Object,
}

impl Download {
    /// Starts the task. Nothing more is fetched before the first READ. `on_end` is called with how
    /// it went.
    pub fn open(
        transfers: Arc<Transfers>,
        key: Key,
        opened: OpenedObject,
        limits: SessionLimits,
        sink: impl ReadSink,
        on_end: impl FnOnce(DownloadSummary) + Send + 'static,
    ) -> Download {
        let OpenedObject { object, first } = opened;
        let queue = Arc::new(ReadQueue::new(limits.waiting_reads()));
        let tasks = transfers.tasks.clone();
        let mut task = DownloadTask {
            transfers,
            key,
            object: object.clone(),
            limits,
            read_ahead: ReadAhead::new(object.size, 0),
            blocks: VecDeque::new(),
            requests: 0,
        };
        if let Some(first) = first {
            task.take_first_block(first);
        }
        tasks.spawn(task.run(queue.clone(), sink, on_end));
        Download { queue, object }
    }

    /// Size, ETag and time of the version being read.
    pub fn object(&self) -> &Object {
        &self.object
    }

    /// Queues a READ. Returns false if too many wait.
    pub fn read(&self, read: Read) -> bool {
        self.queue.push(read)
    }

    /// Lets the READs that wait have their data.
    pub fn finish(self) {
        self.queue.close();
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        self.queue.cancel();
    }
}

/// A range of the object, here or on its way.
struct Block {
    range: Range<u64>,
    /// `None` once it was awaited. Dropped, it cancels the request.
    fetch: Option<AbortOnDropHandle<store::Result<Vec<Bytes>>>>,
    pieces: Vec<Bytes>,
    /// Memory that was set aside for the block, until the pieces hold it.
    memory: Option<BlockMemory>,
    /// Was memory set aside for it? If not, it is dropped as soon as its READ is answered.
    is_counted: bool,
}

impl Block {
    /// Waits until the bytes are here.
    async fn load(&mut self) -> store::Result<()> {
        let Some(fetch) = self.fetch.take() else {
            return Ok(());
        };
        let pieces = match fetch.await {
            Ok(fetched) => fetched?,
            Err(error) => return Err(StoreError::Other(error.to_string())),
        };
        let len: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        if len != self.range.end - self.range.start {
            let why = "the store gave other bytes than were asked for";
            return Err(StoreError::Other(why.into()));
        }
        self.pieces = pool_pieces(pieces, self.memory.take());
        Ok(())
    }
}

/// Bytes fetched ahead, and the memory that they take as long as any answer needs them.
struct PooledBytes {
    bytes: Bytes,
    _memory: Arc<Option<BlockMemory>>,
}

impl AsRef<[u8]> for PooledBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Ties the memory to the pieces: it is given back with the last of them.
fn pool_pieces(pieces: Vec<Bytes>, memory: Option<BlockMemory>) -> Vec<Bytes> {
    let memory = Arc::new(memory);
    let mut pooled = Vec::with_capacity(pieces.len());
    for bytes in pieces {
        pooled.push(Bytes::from_owner(PooledBytes {
            bytes,
            _memory: memory.clone(),
        }));
    }
    pooled
}

struct DownloadTask {
    transfers: Arc<Transfers>,
    key: Key,
    object: Object,
    limits: SessionLimits,
    read_ahead: ReadAhead,
    /// In the order of the object; together they are what `read_ahead` has as fetched.
    blocks: VecDeque<Block>,
    /// GETs sent so far.
    requests: u64,
}

impl DownloadTask {
    fn take_first_block(&mut self, first: Block) {
        self.requests = 1;
        self.read_ahead = ReadAhead::new(self.object.size, first.range.end);
        if !first.range.is_empty() {
            self.blocks.push_back(first);
        }
    }

    /// Answers READs until the file is closed or the client is gone.
    async fn run(
        mut self,
        queue: Arc<ReadQueue>,
        sink: impl ReadSink,
        on_end: impl FnOnce(DownloadSummary) + Send,
    ) {
        let opened = Instant::now();
        let size = self.object.size;
        let mut bytes = 0;
        let mut last_error = None;
        while let Some(read) = self.next_read(&queue).await {
            let asked = Instant::now();
            let end = read.offset.saturating_add(u64::from(read.len)).min(size);
            let result = self.answer(read.offset..end, &queue).await;
            if bytes == 0 && end < size {
                // Elapsed or not, the READ is answered now.
                let _ = timeout_at(asked + HEAD_START_TIME, queue.wait_for(HEAD_START)).await;
            }
            match &result {
                Ok(_) => bytes += end.saturating_sub(read.offset),
                Err(_) if queue.is_cancelled() => {}
                Err(error) => {
                    // The next READ tries again, from nothing.
                    self.read_ahead = ReadAhead::new(size, 0);
                    self.blocks.clear();
                    last_error = Some(error.clone());
                }
            }
            if !sink.answer(read.id, result).await {
                break;
            }
        }
        on_end(DownloadSummary {
            bytes,
            requests: self.requests,
            took: opened.elapsed(),
            error: last_error,
        });
    }

    /// Waits for the next READ. Blocks that lie here meanwhile are kept for a while.
    async fn next_read(&mut self, queue: &ReadQueue) -> Option<Read> {
        if self.blocks.is_empty() {
            return queue.pop().await;
        }
        match timeout(KEEP_TIME, queue.pop()).await {
            Ok(next) => next,
            Err(_elapsed) => {
                self.drop_blocks();
                queue.pop().await
            }
        }
    }

    /// Drops everything fetched. A READ that goes on in sequence still counts as sequential.
    fn drop_blocks(&mut self) {
        self.blocks.clear();
        self.read_ahead.forget();
    }

    /// The bytes of a READ. rclone, libssh2 and psftp always ask past the end of the file: that
    /// needs no request.
    async fn answer(&mut self, range: Range<u64>, queue: &ReadQueue) -> store::Result<Vec<Bytes>> {
        if queue.is_cancelled() {
            let why = "the file was closed before its data came";
            return Err(StoreError::Other(why.into()));
        }
        if range.is_empty() {
            return Ok(Vec::new());
        }
        self.read(range).await
    }

    /// The bytes of `range`, which lies inside the object.
    async fn read(&mut self, range: Range<u64>) -> store::Result<Vec<Bytes>> {
        self.read_ahead.record_read(&range);
        let read_ahead = &self.read_ahead;
        self.blocks.retain(|block| read_ahead.covers(&block.range));
        self.read_ahead.fetched.start = match self.blocks.front() {
            Some(first) => first.range.start,
            None => self.read_ahead.fetched.end,
        };
        self.fetch(range.end);
        let found = self.collect(&range).await?;
        // An uncounted block is the last one.
        if let Some(Block {
            is_counted: false, ..
        }) = self.blocks.back()
        {
            self.drop_blocks();
        }
        Ok(found)
    }

    /// Waits for the blocks of `range`, and takes its bytes out of them.
    async fn collect(&mut self, range: &Range<u64>) -> store::Result<Vec<Bytes>> {
        let mut found = Vec::new();
        let mut missing = range.end - range.start;
        for block in &mut self.blocks {
            let start = range.start.max(block.range.start);
            let end = range.end.min(block.range.end);
            if start >= end {
                continue;
            }
            block.load().await?;
            missing -= end - start;
            let inside = start - block.range.start..end - block.range.start;
            found.extend(slice_pieces(&block.pieces, inside));
        }
        match missing {
            0 => Ok(found),
            _ => Err(StoreError::Other("a block is missing".into())),
        }
    }

    /// Starts the requests for a READ that ends at `needed`. Ahead of need only with memory from
    /// the pool; what a READ needs is fetched anyway, but then little more than that.
    fn fetch(&mut self, needed: u64) {
        while let Some(wanted) = self.read_ahead.next_fetch(needed) {
            let (range, memory) = match self.reserve(&wanted, needed) {
                Reserved::Memory(range, memory) => (range, Some(memory)),
                Reserved::Uncounted(range) => (range, None),
                Reserved::Nothing => return,
            };
            let is_counted = memory.is_some();
            self.read_ahead.fetched.end = range.end;
            let fetch = self.start_get(range.clone());
            self.blocks.push_back(Block {
                range,
                fetch: Some(fetch),
                pieces: Vec::new(),
                memory,
                is_counted,
            });
            if !is_counted {
                return;
            }
        }
    }

    fn start_get(&mut self, range: Range<u64>) -> AbortOnDropHandle<store::Result<Vec<Bytes>>> {
        self.requests += 1;
        let transfers = self.transfers.clone();
        let key = self.key.clone();
        let etag = self.object.etag.clone();
        let get = async move { transfers.store.get(&key, range, &etag).await };
        AbortOnDropHandle::new(tokio::spawn(get))
    }

    /// Sets memory aside for the beginning of `wanted`: at most half of what is left, so that a
    /// small pool still has several blocks, and at least what a READ needs.
    fn reserve(&self, wanted: &Range<u64>, needed: u64) -> Reserved {
        let start = wanted.start;
        let needed_len = needed.min(wanted.end).saturating_sub(start);
        let wanted_len = wanted.end - start;
        let min_len = needed_len.max(MIN_FETCH.min(wanted_len));
        let mut len = wanted_len
            .min(self.limits.read_ahead_left() / 2)
            .max(min_len);
        loop {
            if let Some(memory) = self.limits.try_read_ahead(len) {
                return Reserved::Memory(start..start + len, memory);
            }
            if len == min_len {
                break;
            }
            len = (len / 2).max(min_len);
        }
        if needed_len == 0 {
            return Reserved::Nothing;
        }
        match self.limits.try_own(min_len) {
            Some(memory) => Reserved::Memory(start..start + min_len, memory),
            None => Reserved::Uncounted(start..start + needed_len),
        }
    }
}

/// What may be fetched.
enum Reserved {
    /// This range, for which memory was set aside.
    Memory(Range<u64>, BlockMemory),
    /// This range, which a READ needs although there is no memory.
    Uncounted(Range<u64>),
    /// Nothing: there is no memory, and nothing is needed.
    Nothing,
}
