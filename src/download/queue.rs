//! READ requests that wait for their data. paramiko asks for a whole file at once, 32 KiB at a time:
//! consecutive requests become one entry, so that 10 GiB of them still cost a few bytes.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Entries a client can have waiting, after folding; one more READ is refused.
const MAX_RUNS: usize = 4096;

/// One READ request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// SFTP request id.
    pub id: u32,
    /// First byte wanted.
    pub offset: u64,
    /// How many, at most.
    pub len: u32,
}

/// `count` READs with rising ids and adjoining ranges.
struct Run {
    first: Read,
    count: u32,
}

impl Run {
    fn next(&self) -> Read {
        let offset = self.first.offset.saturating_add(u64::from(self.count) * u64::from(self.first.len));
        Read { id: self.first.id.wrapping_add(self.count), offset, len: self.first.len }
    }
}

/// Filled by the session, emptied by the download's task.
#[derive(Default)]
pub struct ReadQueue {
    // A std lock: held for a few instructions, never across an await.
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    runs: VecDeque<Run>,
    closed: bool,
    cancelled: bool,
}

impl ReadQueue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False when too many wait already.
    pub fn push(&self, read: Read) -> bool {
        let mut state = self.state();
        if let Some(run) = state.runs.back_mut().filter(|run| run.next() == read) {
            run.count += 1;
        } else if state.runs.len() < MAX_RUNS {
            state.runs.push_back(Run { first: read, count: 1 });
        } else {
            return false;
        }
        drop(state);
        self.changed.notify_one();
        true
    }

    /// What is queued is still handed out, then comes the end.
    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify_one();
    }

    /// As [`ReadQueue::close`], and nobody wants the data any more.
    pub fn cancel(&self) {
        self.state().cancelled = true;
        self.close();
    }

    /// See [`ReadQueue::cancel`].
    pub fn is_cancelled(&self) -> bool {
        self.state().cancelled
    }

    /// Waits until so many READs wait, or the file is closed.
    pub async fn fill(&self, count: u32) {
        loop {
            let notified = self.changed.notified();
            {
                let state = self.state();
                if state.closed || state.runs.iter().map(|run| run.count).sum::<u32>() >= count {
                    return;
                }
            }
            notified.await;
        }
    }

    /// Waits for the next READ; `None` after [`ReadQueue::close`].
    pub async fn pop(&self) -> Option<Read> {
        loop {
            let notified = self.changed.notified();
            {
                let mut state = self.state();
                if let Some(run) = state.runs.front_mut() {
                    let read = run.first;
                    *run = Run { first: Run { first: read, count: 1 }.next(), count: run.count - 1 };
                    if run.count == 0 {
                        state.runs.pop_front();
                    }
                    return Some(read);
                }
                if state.closed {
                    return None;
                }
            }
            notified.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn consecutive_reads_fold_and_come_out_as_they_went_in() {
        let queue = ReadQueue::default();
        let reads: Vec<Read> = (0..6400u32)
            .map(|n| Read { id: n.wrapping_sub(3), offset: u64::from(n) * 32768, len: 32768 })
            .chain([Read { id: 9, offset: 5, len: 10 }, Read { id: 10, offset: 15, len: 7 }])
            .collect();
        assert!(reads.iter().all(|read| queue.push(*read)));
        assert_eq!(queue.state().runs.len(), 3);
        queue.close();
        let mut out = Vec::new();
        while let Some(read) = queue.pop().await {
            out.push(read);
        }
        assert_eq!(out, reads);
    }

    #[tokio::test]
    async fn scattered_reads_are_bounded() {
        let queue = ReadQueue::default();
        let accepted = (0..10_000u32).filter(|n| queue.push(Read { id: *n, offset: u64::from(n % 2), len: 1 })).count();
        assert!(accepted < 2 * MAX_RUNS + 2, "{accepted}");
    }
}
