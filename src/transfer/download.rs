//! A download: the task that answers READs from ranges fetched ahead, all of one version of the object.
//!
//! Called by `tree` (which opens) and `sftp` (which queues READs). The task waits for the store and for the
//! client's window, so the session never has to. Read-ahead takes memory only when it is free; the
//! range a READ needs right now is fetched without asking, so no download waits for another.

use super::{BlockMemory, FIRST_BLOCK, Read, ReadAhead, ReadQueue, SessionLimits, Transfers};
use crate::store::{Key, Object, StoreError, cut};
use bytes::Bytes;
use std::{collections::VecDeque, ops::Range, sync::Arc, time::Duration};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// paramiko's `get` asks for a whole file from one thread and, if the answers ever catch up with its questions,
/// takes the file for finished and goes on READ by READ, at a tenth of the speed. So the first answer waits
/// until this many more READs are there …
const HEAD_START: u32 = 8;
/// … but no longer than this, counted from the question: most of it, or all, S3 takes anyway.
const HEAD_START_TIME: Duration = Duration::from_millis(5);

/// A range is fetched for a READ in no less than this many bytes, as long as there is any memory.
const LEAST_BLOCK: u64 = FIRST_BLOCK;
/// What was fetched and not asked for is let go after this time without a READ: others can use the memory.
const KEEP_TIME: Duration = Duration::from_secs(5);

/// Where the answers go.
pub trait ReadSink: Send + Sync + 'static {
    /// Sends the bytes that a READ asked for, in pieces, or its failure; an empty answer is the end of the file.
    /// Waits until the client takes them; false when it is gone.
    fn answer(
        &self,
        id: u32,
        result: Result<Vec<Bytes>, StoreError>,
    ) -> impl Future<Output = bool> + Send;
}

/// How a download went.
#[derive(Debug)]
pub struct DownloadSummary {
    /// Bytes sent to the client.
    pub bytes: u64,
    /// GET requests.
    pub requests: u64,
    /// From OPEN on.
    pub took: Duration,
    /// The last failure.
    pub error: Option<StoreError>,
}

/// The version that will be read, and what came of it with the question which it is.
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
    /// One GET, which is all that a small file needs; or a HEAD where there is no memory for more.
    pub async fn ask(
        transfers: &Transfers,
        key: &Key,
        limits: &SessionLimits,
    ) -> Result<OpenedObject, StoreError> {
        let Some(memory) = limits.try_read_ahead(FIRST_BLOCK) else {
            return Ok(transfers.store.head(key).await?.into());
        };
        let (object, bytes) = transfers.store.open(key, FIRST_BLOCK).await?;
        let range = 0..bytes.len() as u64;
        let pieces = hold(vec![bytes], Some(memory));
        Ok(OpenedObject {
            object,
            first: Some(Block {
                range,
                coming: None,
                pieces,
                memory: None,
                is_counted: true,
            }),
        })
    }
}

/// A file open for reading. Dropped, it still answers the READs that wait, but without data.
pub struct Download {
    queue: Arc<ReadQueue>,
    object: Object,
}

impl Download {
    /// Starts the task. Nothing more is fetched before the first READ. `on_end` is told how it went.
    pub fn open(
        transfers: Arc<Transfers>,
        key: Key,
        OpenedObject { object, first }: OpenedObject,
        limits: SessionLimits,
        answers: impl ReadSink,
        on_end: impl FnOnce(DownloadSummary) + Send + 'static,
    ) -> Download {
        let (queue, tasks) = (
            Arc::new(ReadQueue::new(limits.waiting_reads())),
            transfers.tasks.clone(),
        );
        let (mut window, requests) = (ReadAhead::new(object.size), u64::from(first.is_some()));
        window.have = first.as_ref().map_or(0..0, |block| block.range.clone());
        let blocks = first
            .into_iter()
            .filter(|block| !block.range.is_empty())
            .collect();
        let fetcher = Fetcher {
            transfers,
            key,
            object: object.clone(),
            limits,
            window,
            blocks,
            requests,
        };
        tasks.spawn(fetcher.run(queue.clone(), answers, on_end));
        Download { queue, object }
    }

    /// Size, ETag and time of the version being read.
    pub fn object(&self) -> &Object {
        &self.object
    }

    /// Queues a READ; false when too many wait.
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
    // Dropped, the request ends.
    coming: Option<AbortOnDropHandle<Result<Vec<Bytes>, StoreError>>>,
    pieces: Vec<Bytes>,
    memory: Option<BlockMemory>,
    /// It takes memory that was set aside for it. Without, it goes as soon as its READ is answered.
    is_counted: bool,
}

/// What was fetched ahead, and the memory that it takes as long as any answer needs it.
struct PooledBytes {
    bytes: Bytes,
    _memory: Arc<Option<BlockMemory>>,
}

fn hold(pieces: Vec<Bytes>, memory: Option<BlockMemory>) -> Vec<Bytes> {
    let memory = Arc::new(memory);
    pieces
        .into_iter()
        .map(|bytes| {
            Bytes::from_owner(PooledBytes {
                bytes,
                _memory: memory.clone(),
            })
        })
        .collect()
}

impl AsRef<[u8]> for PooledBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

struct Fetcher {
    transfers: Arc<Transfers>,
    key: Key,
    object: Object,
    limits: SessionLimits,
    window: ReadAhead,
    blocks: VecDeque<Block>,
    requests: u64,
}

impl Fetcher {
    async fn run(
        mut self,
        queue: Arc<ReadQueue>,
        answers: impl ReadSink,
        on_end: impl FnOnce(DownloadSummary) + Send,
    ) {
        let (opened, size) = (Instant::now(), self.object.size);
        let (mut bytes, mut error) = (0, None);
        while let Some(read) = self.next(&queue).await {
            let asked = Instant::now();
            let end = read.offset.saturating_add(u64::from(read.len)).min(size);
            let len = end.saturating_sub(read.offset);
            let result = match queue.is_cancelled() {
                true => Err(StoreError::Other(
                    "the file was closed before its data came".into(),
                )),
                // rclone, libssh2 and psftp always ask past the end: the store need not be troubled.
                false if len == 0 => Ok(Vec::new()),
                false => self.read(read.offset..end).await,
            };
            if bytes == 0 && end < size {
                let _ =
                    tokio::time::timeout_at(asked + HEAD_START_TIME, queue.fill(HEAD_START)).await;
            }
            match &result {
                Ok(_) => bytes += len,
                Err(_) if queue.is_cancelled() => {}
                Err(failure) => {
                    // The next READ tries again, from nothing.
                    self.window = ReadAhead::new(size);
                    self.blocks.clear();
                    error = Some(failure.clone());
                }
            }
            if !answers.answer(read.id, result).await {
                break;
            }
        }
        on_end(DownloadSummary {
            bytes,
            requests: self.requests,
            took: opened.elapsed(),
            error,
        });
    }

    /// The next READ. What lies here meanwhile is kept for a while.
    async fn next(&mut self, queue: &ReadQueue) -> Option<Read> {
        if self.blocks.is_empty() {
            return queue.pop().await;
        }
        match tokio::time::timeout(KEEP_TIME, queue.pop()).await {
            Ok(next) => next,
            Err(_elapsed) => {
                self.forget();
                queue.pop().await
            }
        }
    }

    /// Lets go of all that was fetched. A READ that goes on in sequence still counts as one.
    fn forget(&mut self) {
        self.blocks.clear();
        self.window.forget();
    }

    /// The bytes of `range`, which lies inside the object.
    async fn read(&mut self, range: Range<u64>) -> Result<Vec<Bytes>, StoreError> {
        self.window.seek(&range);
        self.blocks.retain(|block| self.window.keeps(&block.range));
        self.window.have.start = self
            .blocks
            .front()
            .map_or(self.window.have.end, |block| block.range.start);
        self.fetch(range.end);
        let (mut found, mut missing) = (Vec::new(), range.end - range.start);
        for block in &mut self.blocks {
            let (from, to) = (
                range.start.max(block.range.start),
                range.end.min(block.range.end),
            );
            if from >= to {
                continue;
            }
            if let Some(task) = block.coming.take() {
                let pieces = task
                    .await
                    .map_err(|error| StoreError::Other(error.to_string()))??;
                if pieces.iter().map(|piece| piece.len() as u64).sum::<u64>()
                    != block.range.end - block.range.start
                {
                    return Err(StoreError::Other(
                        "the store gave other bytes than were asked for".into(),
                    ));
                }
                block.pieces = hold(pieces, block.memory.take());
            }
            missing -= to - from;
            found.extend(cut(
                &block.pieces,
                from - block.range.start..to - block.range.start,
            ));
        }
        // Such a block is the last one.
        if self.blocks.back().is_some_and(|block| !block.is_counted) {
            self.forget();
        }
        if missing == 0 {
            Ok(found)
        } else {
            Err(StoreError::Other("a block is missing".into()))
        }
    }

    /// Starts the requests for a READ that ends at `needed`. Ahead of need only with memory from the pool; what a
    /// READ needs comes anyway, but then little more than that.
    fn fetch(&mut self, needed: u64) {
        while let Some(mut range) = self.window.wanted(needed) {
            let memory = self.take_memory(&mut range, needed);
            if range.is_empty() {
                break;
            }
            let is_counted = memory.is_some();
            self.requests += 1;
            self.window.have.end = range.end;
            let (transfers, key, etag) = (
                self.transfers.clone(),
                self.key.clone(),
                self.object.etag.clone(),
            );
            let wanted = range.clone();
            let task = tokio::spawn(async move { transfers.store.get(&key, wanted, &etag).await });
            let coming = Some(AbortOnDropHandle::new(task));
            self.blocks.push_back(Block {
                range,
                coming,
                pieces: Vec::new(),
                memory,
                is_counted,
            });
            if !is_counted {
                break;
            }
        }
    }

    /// Memory for a range, which is made smaller where there is little: empty, where nothing of it is needed at once.
    fn take_memory(&self, range: &mut Range<u64>, needed: u64) -> Option<BlockMemory> {
        let mut len = range.end - range.start;
        let needed_len = needed.min(range.end).saturating_sub(range.start);
        let least = needed_len.max(LEAST_BLOCK.min(len));
        loop {
            let memory = self.limits.try_read_ahead(len);
            if memory.is_some() {
                range.end = range.start + len;
                return memory;
            }
            if len == least {
                break;
            }
            len = (len / 2).max(least);
        }
        if needed_len == 0 {
            range.end = range.start;
            return None;
        }
        if let Some(memory) = self.limits.try_own(least) {
            range.end = range.start + least;
            return Some(memory);
        }
        range.end = range.start + needed_len;
        None
    }
}
