//! READ requests that wait for their data. paramiko asks for a whole file at once, 32 KiB at a time:
//! consecutive requests become one entry, so that 10 GiB of them still cost a few bytes.

use std::collections::VecDeque;
use tokio::sync::watch;

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

impl Read {
    /// The n-th of those that may follow, with rising ids and adjoining ranges.
    fn after(self, n: u32) -> Read {
        let offset = self.offset.saturating_add(u64::from(n) * u64::from(self.len));
        Read { id: self.id.wrapping_add(n), offset, len: self.len }
    }
}

#[derive(Default)]
struct State {
    /// The first of some READs that follow each other, and how many they are.
    runs: VecDeque<(Read, u32)>,
    closed: bool,
    cancelled: bool,
}

/// Filled by the session, emptied by the download's task.
#[derive(Default)]
pub struct ReadQueue(watch::Sender<State>);

impl ReadQueue {
    /// False when too many wait already.
    pub fn push(&self, read: Read) -> bool {
        self.0.send_if_modified(|state| {
            let has_room = state.runs.len() < MAX_RUNS;
            match state.runs.back_mut() {
                Some((first, count)) if first.after(*count) == read => *count += 1,
                _ if has_room => state.runs.push_back((read, 1)),
                _ => return false,
            }
            true
        })
    }

    /// What is queued is still handed out, then comes the end.
    pub fn close(&self) {
        self.0.send_modify(|state| state.closed = true);
    }

    /// As [`ReadQueue::close`], unless that came before, and nobody wants the data any more.
    pub fn cancel(&self) {
        self.0.send_modify(|state| (state.cancelled, state.closed) = (!state.closed || state.cancelled, true));
    }

    /// See [`ReadQueue::cancel`].
    pub fn is_cancelled(&self) -> bool {
        self.0.borrow().cancelled
    }

    /// Waits until so many READs wait, or the file is closed.
    pub async fn fill(&self, count: u32) {
        let waiting = |state: &State| state.runs.iter().map(|(_, count)| *count).fold(0, u32::saturating_add);
        let _ = self.0.subscribe().wait_for(|state| state.closed || waiting(state) >= count).await;
    }

    /// Waits for the next READ; `None` after [`ReadQueue::close`].
    pub async fn pop(&self) -> Option<Read> {
        self.fill(1).await;
        let mut next = None;
        self.0.send_if_modified(|state| {
            if let Some((first, count)) = state.runs.front_mut() {
                next = Some(*first);
                (*first, *count) = (first.after(1), *count - 1);
            }
            state.runs.pop_front_if(|(_, count)| *count == 0);
            false
        });
        next
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
        assert_eq!(queue.0.borrow().runs.len(), 3);
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
