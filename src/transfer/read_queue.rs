//! READ requests that wait for their data. paramiko asks for a whole file at once, 32 KiB at a
//! time: consecutive requests become one entry, so that 10 GiB of them cost a few bytes.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Limit on the entries of one file, after folding; one more READ is refused.
const MAX_RUNS: usize = 4096;

/// One READ request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// SFTP request id.
    pub id: u32,
    /// First byte wanted.
    pub offset: u64,
    /// Limit on the bytes in the answer.
    pub len: u32,
}

impl Read {
    /// The n-th of those that may follow, with rising ids and adjoining ranges.
    fn after(self, n: u32) -> Read {
        let skipped = u64::from(n) * u64::from(self.len);
        Read {
            id: self.id.wrapping_add(n),
            offset: self.offset.saturating_add(skipped),
            len: self.len,
        }
    }
}

/// READs that follow each other.
struct Run {
    first: Read,
    count: u32,
    _place: OwnedSemaphorePermit,
}

/// Whether the file is still open.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// No READ comes any more; those that wait get their data.
    Closed,
    /// The data is no longer wanted.
    Cancelled,
}

struct State {
    runs: VecDeque<Run>,
    phase: Phase,
}

impl State {
    /// READs that wait.
    fn waiting(&self) -> u32 {
        let counts = self.runs.iter().map(|run| run.count);
        counts.fold(0, u32::saturating_add)
    }

    fn take_first(&mut self) -> Option<Read> {
        let run = self.runs.front_mut()?;
        let read = run.first;
        if run.count > 1 {
            run.first = read.after(1);
            run.count -= 1;
        } else {
            self.runs.pop_front();
        }
        Some(read)
    }
}

/// Filled by the session, emptied by the download's task.
pub struct ReadQueue {
    // A std lock: never held across an await.
    state: Mutex<State>,
    /// Notified on every change, for the one task that waits.
    changed: Notify,
    /// For the runs of all files of a session.
    places: Arc<Semaphore>,
}

impl ReadQueue {
    /// Each run of READs takes one of these places.
    pub fn new(places: Arc<Semaphore>) -> ReadQueue {
        let state = State {
            runs: VecDeque::new(),
            phase: Phase::Open,
        };
        ReadQueue {
            state: Mutex::new(state),
            changed: Notify::new(),
            places,
        }
    }

    /// Returns false if too many READs wait already.
    pub fn push(&self, read: Read) -> bool {
        let mut state = self.state();
        match state.runs.back_mut() {
            Some(last) if last.first.after(last.count) == read => last.count += 1,
            Some(_) | None => {
                if state.runs.len() >= MAX_RUNS {
                    return false;
                }
                let Ok(place) = self.places.clone().try_acquire_owned() else {
                    return false;
                };
                state.runs.push_back(Run {
                    first: read,
                    count: 1,
                    _place: place,
                });
            }
        }
        drop(state);
        self.changed.notify_one();
        true
    }

    /// The READs that wait are still handed out, then comes the end.
    pub fn close(&self) {
        self.end(Phase::Closed);
    }

    /// As [`ReadQueue::close`], and the data is no longer wanted. Changes nothing after that
    /// call.
    pub fn cancel(&self) {
        self.end(Phase::Cancelled);
    }

    fn end(&self, phase: Phase) {
        let mut state = self.state();
        if state.phase == Phase::Open {
            state.phase = phase;
        }
        drop(state);
        self.changed.notify_one();
    }

    /// See [`ReadQueue::cancel`].
    pub fn is_cancelled(&self) -> bool {
        self.state().phase == Phase::Cancelled
    }

    /// Waits until this many READs wait, or the file is closed.
    pub async fn wait_for(&self, count: u32) {
        loop {
            {
                let state = self.state();
                if state.phase != Phase::Open || state.waiting() >= count {
                    return;
                }
            }
            self.changed.notified().await;
        }
    }

    /// Waits for the next READ; `None` once the file is closed and no READ waits.
    pub async fn pop(&self) -> Option<Read> {
        self.wait_for(1).await;
        self.state().take_first()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn consecutive_reads_fold_and_come_out_as_they_went_in() {
        let queue = ReadQueue::new(Arc::new(Semaphore::new(10_000)));
        let reads: Vec<Read> = (0..6400u32)
            .map(|n| Read {
                id: n.wrapping_sub(3),
                offset: u64::from(n) * 32768,
                len: 32768,
            })
            .chain([
                Read {
                    id: 9,
                    offset: 5,
                    len: 10,
                },
                Read {
                    id: 10,
                    offset: 15,
                    len: 7,
                },
            ])
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
        let queue = ReadQueue::new(Arc::new(Semaphore::new(10_000)));
        let accepted = (0..10_000u32)
            .filter(|n| {
                queue.push(Read {
                    id: *n,
                    offset: u64::from(n % 2),
                    len: 1,
                })
            })
            .count();
        assert!(accepted < 2 * MAX_RUNS + 2, "{accepted}");
    }

    #[tokio::test]
    async fn scattered_reads_of_all_files_are_bounded() {
        let places = Arc::new(Semaphore::new(3));
        let queues = [
            ReadQueue::new(places.clone()),
            ReadQueue::new(places.clone()),
        ];
        let read = |n: u32| Read {
            id: n,
            offset: 0,
            len: 1,
        };
        assert!(queues[0].push(read(1)) && queues[1].push(read(1)) && queues[1].push(read(5)));
        assert!(!queues[0].push(read(9)));
        assert_eq!(queues[1].pop().await, Some(read(1)));
        assert!(queues[0].push(read(9)));
        drop(queues);
        assert_eq!(places.available_permits(), 3);
    }
}
