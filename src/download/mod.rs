//! A download: the task that answers READs from ranges fetched ahead, all of one version of the object.
//!
//! Called by `tree` (which opens) and `sftp` (which queues READs). The task waits for the store and for the
//! client's window, so the session never has to. Read-ahead takes memory only when it is free; the
//! range a READ needs right now is fetched without asking, so no download waits for another.

mod queue;
mod window;

pub use queue::{Read, ReadQueue};
pub use window::Window;

use crate::budget::Taken;
use crate::store::{Key, Object, StoreError};
use crate::upload::Context;
use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// paramiko's `get` asks for a whole file from one thread and, if the answers ever catch up with its questions,
/// takes the file for finished and goes on READ by READ, at a tenth of the speed. So the first answer waits
/// until this many more READs are there …
const HEAD_START: u32 = 8;
/// … but no longer than this, counted from the question: most of it, or all, S3 takes anyway.
const HEAD_START_TIME: Duration = Duration::from_millis(5);

/// Where the answers go.
pub trait Answers: Send + Sync + 'static {
    /// Sends the bytes that a READ asked for, or its failure; an empty answer is the end of the file.
    /// Waits until the client takes them; false when it is gone.
    fn answer(&self, id: u32, result: Result<BytesMut, StoreError>) -> impl Future<Output = bool> + Send;
    /// An empty buffer with room for an answer of so many bytes, which it begins with a header of its own.
    fn buffer(&self, len: usize) -> BytesMut;
}

/// How a download went.
#[derive(Debug)]
pub struct Summary {
    /// Bytes sent to the client.
    pub bytes: u64,
    /// GET requests.
    pub requests: u64,
    /// From OPEN on.
    pub took: Duration,
    /// The last failure.
    pub error: Option<StoreError>,
}

/// A file open for reading. Dropped, it still answers the READs that wait, but without data.
pub struct Download {
    queue: Arc<ReadQueue>,
    object: Object,
    finishes: bool,
}

impl Download {
    /// Starts the task. Nothing is fetched before the first READ. `on_end` is told how it went.
    pub fn open(
        context: Arc<Context>,
        key: Key,
        object: Object,
        answers: impl Answers,
        on_end: impl FnOnce(Summary) + Send + 'static,
    ) -> Download {
        let queue = Arc::new(ReadQueue::default());
        let fetcher = Fetcher {
            window: Window::new(object.size),
            context: context.clone(),
            key,
            etag: object.etag.clone(),
            blocks: VecDeque::new(),
            requests: 0,
        };
        context.tasks.spawn(run(fetcher, object.size, queue.clone(), answers, on_end));
        Download { queue, object, finishes: false }
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
    pub fn finish(mut self) {
        self.finishes = true;
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if self.finishes { self.queue.close() } else { self.queue.cancel() }
    }
}

async fn run(
    mut fetcher: Fetcher,
    size: u64,
    queue: Arc<ReadQueue>,
    answers: impl Answers,
    on_end: impl FnOnce(Summary) + Send,
) {
    let opened = Instant::now();
    let mut bytes = 0;
    let mut error = None;
    let mut first = true;
    while let Some(read) = queue.pop().await {
        let asked = Instant::now();
        let end = read.offset.saturating_add(u64::from(read.len)).min(size);
        let mut out = answers.buffer(end.saturating_sub(read.offset) as usize);
        let result = if queue.is_cancelled() {
            Err(StoreError::Other("the file was closed before its data came".into()))
        } else if read.offset >= size {
            // rclone, libssh2 and psftp always ask past the end: the store need not be troubled.
            Ok(())
        } else {
            fetcher.read(read.offset..end, &mut out).await
        };
        if std::mem::take(&mut first) && end < size {
            let _ = tokio::time::timeout_at(asked + HEAD_START_TIME, queue.fill(HEAD_START)).await;
        }
        match &result {
            Ok(()) => bytes += end.saturating_sub(read.offset),
            Err(_) if queue.is_cancelled() => {}
            Err(failure) => error = Some(failure.clone()),
        }
        if !answers.answer(read.id, result.map(|()| out)).await {
            break;
        }
    }
    on_end(Summary { bytes, requests: fetcher.requests, took: opened.elapsed(), error });
}

/// A range of the object, here or on its way.
struct Block {
    range: Range<u64>,
    state: State,
    _memory: Option<Taken>,
}

enum State {
    // Dropped, the request ends.
    Coming(AbortOnDropHandle<Result<Bytes, StoreError>>),
    Here(Bytes),
}

struct Fetcher {
    context: Arc<Context>,
    key: Key,
    etag: String,
    window: Window,
    blocks: VecDeque<Block>,
    requests: u64,
}

impl Fetcher {
    /// Appends the bytes of `range`, which lies inside the object, to `out`.
    async fn read(&mut self, range: Range<u64>, out: &mut BytesMut) -> Result<(), StoreError> {
        if self.window.seek(&range) {
            self.blocks.clear();
        }
        self.drop_passed();
        while let Some(wanted) = self.window.wanted(range.end) {
            if !self.fetch(wanted, range.end) {
                break;
            }
        }
        let result = self.copy(&range, out).await;
        if result.is_err() {
            // The next READ tries again, from nothing.
            self.blocks.clear();
            self.window = Window::new(self.window.size());
        }
        result
    }

    fn drop_passed(&mut self) {
        let keep_from = self.window.keep_from();
        while let Some(block) = self.blocks.pop_front_if(|block| block.range.end <= keep_from) {
            self.window.dropped(block.range.end);
        }
    }

    /// Starts a request. Ahead of need only with memory from the pool; what a READ needs comes anyway, but then
    /// no more than that.
    fn fetch(&mut self, mut range: Range<u64>, needed: u64) -> bool {
        let memory = self.context.budget.try_read_ahead(range.end - range.start);
        if memory.is_none() {
            if range.start >= needed {
                return false;
            }
            range.end = range.end.min(needed);
        }
        self.window.fetching(&range);
        let (context, key, etag) = (self.context.clone(), self.key.clone(), self.etag.clone());
        let wanted = range.clone();
        let task = tokio::spawn(async move { context.store.get(&key, wanted, &etag).await });
        self.requests += 1;
        self.blocks.push_back(Block { range, state: State::Coming(AbortOnDropHandle::new(task)), _memory: memory });
        true
    }

    async fn copy(&mut self, range: &Range<u64>, out: &mut BytesMut) -> Result<(), StoreError> {
        let mut at = range.start;
        for block in
            self.blocks.iter_mut().filter(|block| block.range.end > range.start && block.range.start < range.end)
        {
            if let State::Coming(task) = &mut block.state {
                let bytes = task.await.map_err(|error| StoreError::Other(error.to_string()))??;
                block.state = State::Here(bytes);
            }
            let State::Here(bytes) = &block.state else { continue };
            let from = (at - block.range.start) as usize;
            let to = (range.end.min(block.range.end) - block.range.start) as usize;
            out.extend_from_slice(bytes.get(from..to).unwrap_or_default());
            at = range.end.min(block.range.end);
        }
        if at == range.end { Ok(()) } else { Err(StoreError::Other("a block is missing".into())) }
    }
}
