//! READ requests that wait for their data. paramiko asks for a whole file at once, 32 KiB at a time:
//! consecutive requests become one entry, so that 10 GiB of them still cost a few bytes.

use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

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
        let offset = self
            .offset
            .saturating_add(u64::from(n) * u64::from(self.len));
        Read {
            id: self.id.wrapping_add(n),
            offset,
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

#[derive(Default)]
struct State {
    runs: VecDeque<Run>,
    closed: bool,
    cancelled: bool,
}

/// Filled by the session, emptied by the download's task.
pub struct ReadQueue {
    state: watch::Sender<State>,
    /// For the runs of all files of a session.
    places: Arc<Semaphore>,
}

impl ReadQueue {
    /// Each run of READs takes one of these places.
    pub fn new(places: Arc<Semaphore>) -> ReadQueue {
        ReadQueue {
            state: watch::Sender::default(),
            places,
        }
    }

    /// False when too many wait already.
    pub fn push(&self, read: Read) -> bool {
        self.state.send_if_modified(|state| {
            if let Some(last) = state.runs.back_mut()
                && last.first.after(last.count) == read
            {
                last.count += 1;
                return true;
            }
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
            true
        })
    }

    /// What is queued is still handed out, then comes the end.
    pub fn close(&self) {
        self.state.send_modify(|state| state.closed = true);
    }

    /// As [`ReadQueue::close`], unless that came before, and nobody wants the data any more.
    pub fn cancel(&self) {
        self.state.send_modify(|state| {
            (state.cancelled, state.closed) = (!state.closed || state.cancelled, true)
        });
    }

    /// See [`ReadQueue::cancel`].
    pub fn is_cancelled(&self) -> bool {
        self.state.borrow().cancelled
    }

    /// Waits until so many READs wait, or the file is closed.
    pub async fn fill(&self, count: u32) {
        let waiting = |state: &State| {
            state
                .runs
                .iter()
                .map(|run| run.count)
                .fold(0, u32::saturating_add)
        };
        let _ = self
            .state
            .subscribe()
            .wait_for(|state| state.closed || waiting(state) >= count)
            .await;
    }

    /// Waits for the next READ; `None` after [`ReadQueue::close`].
    pub async fn pop(&self) -> Option<Read> {
        self.fill(1).await;
        let mut next = None;
        self.state.send_if_modified(|state| {
            if let Some(run) = state.runs.front_mut() {
                next = Some(run.first);
                run.first = run.first.after(1);
                run.count -= 1;
            }
            state.runs.pop_front_if(|run| run.count == 0);
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
        assert_eq!(queue.state.borrow().runs.len(), 3);
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
