//! Requests that arrived and are not carried out yet: a queue and the task that fills it.
//!
//! Invariant: the channel is drained while the session waits for the store, so that SSH stays
//! alive: keep-alives are answered, other channels go on, and the end of the channel is seen. The
//! memory of drained requests is counted, first in the session's own room and then in the pool.
//! Once neither has any left, the channel is read no further. Clients limit what they send without
//! an answer: OpenSSH 64 WRITEs of 255 KiB, most others 64 of 32 KiB.

use super::codec::{Fatal, Framed, PacketDecoder, Request};
use super::table::find_row;
use super::{Received, Source};
use crate::transfer::{BufferPool, Reservation, Share};
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Limit on the waiting requests of a session without the pool, in bytes.
const OWN_ROOM: usize = 1024 * 1024;
/// The same in the pool, in bytes: what OpenSSH sends without an answer, and the packets' headers.
const POOL_ROOM: usize = 17 * 1024 * 1024;
/// Memory of a request beside its bytes, in bytes.
const REQUEST_OVERHEAD: usize = 256;

/// A request, and its memory until it is carried out.
pub struct Incoming {
    /// SFTP request id.
    pub id: u32,
    pub request: Request,
    pub memory: RequestMemory,
}

/// Given back when dropped.
pub struct RequestMemory {
    _room: OwnedSemaphorePermit,
    /// `None` within the session's own room.
    _pool: Option<Reservation>,
}

impl RequestMemory {
    /// Ties the memory to the bytes, until they are part of the upload. The answer may come later.
    pub fn hold(self, mut data: Vec<Bytes>) -> Vec<Bytes> {
        if let Some(last) = data.pop() {
            data.push(Bytes::from_owner(HeldBytes {
                bytes: last,
                _memory: self,
            }));
        }
        data
    }
}

struct HeldBytes {
    bytes: Bytes,
    _memory: RequestMemory,
}

impl AsRef<[u8]> for HeldBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The next event of the stream.
pub enum Next {
    Request(Incoming),
    /// The client sends nothing more, and may still read.
    Eof,
    /// The channel is closed, or the connection gone.
    Closed,
    /// The stream can't be followed any further.
    Fatal(Fatal),
}

/// See the module.
pub struct RequestQueue {
    // A std lock: never held across an await.
    state: Mutex<State>,
    /// Notified when the state changes.
    changed: Notify,
    pool: BufferPool,
    own_room: Arc<Semaphore>,
    pool_room: Arc<Semaphore>,
}

#[derive(Default)]
struct State {
    requests: VecDeque<Incoming>,
    end: Option<Ending>,
}

/// How the stream of requests has ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Eof,
    Closed,
    Fatal(Fatal),
}

impl RequestQueue {
    pub fn new(pool: BufferPool) -> RequestQueue {
        RequestQueue {
            state: Mutex::default(),
            changed: Notify::new(),
            pool,
            own_room: Arc::new(Semaphore::new(OWN_ROOM)),
            pool_room: Arc::new(Semaphore::new(POOL_ROOM)),
        }
    }

    /// Drains the channel until it is closed.
    pub async fn fill(&self, mut source: impl Source) {
        let mut decoder = PacketDecoder::default();
        loop {
            match source.next().await {
                Received::Data(_) if self.is_over() => {}
                Received::Data(bytes) => {
                    decoder.push(bytes);
                    if let Err(fatal) = self.take_requests(&mut decoder).await {
                        self.end(Ending::Fatal(fatal));
                    }
                }
                Received::Eof => self.end(Ending::Eof),
                Received::Closed => return self.close(),
            }
        }
    }

    async fn take_requests(&self, decoder: &mut PacketDecoder) -> Result<(), Fatal> {
        while let Some(Framed { id, request, len }) = decoder.next()? {
            let memory = self.reserve(len + REQUEST_OVERHEAD).await;
            let Some(memory) = memory else { return Ok(()) };
            self.state().requests.push_back(Incoming {
                id,
                request,
                memory,
            });
            self.changed.notify_waiters();
        }
        Ok(())
    }

    /// Waits for room if there is none. Never `None`, because the semaphores are never closed.
    async fn reserve(&self, bytes: usize) -> Option<RequestMemory> {
        let permits = u32::try_from(bytes).ok()?;
        if let Ok(room) = self.own_room.clone().try_acquire_many_owned(permits) {
            return Some(RequestMemory {
                _room: room,
                _pool: None,
            });
        }
        if let Ok(room) = self.pool_room.clone().try_acquire_many_owned(permits)
            && let Some(pool) = self.pool.try_take_share(Share::Requests, bytes as u64)
        {
            return Some(RequestMemory {
                _room: room,
                _pool: Some(pool),
            });
        }
        let room = self
            .own_room
            .clone()
            .acquire_many_owned(permits)
            .await
            .ok()?;
        Some(RequestMemory {
            _room: room,
            _pool: None,
        })
    }

    /// The next request, or how the stream has ended.
    pub async fn next(&self) -> Next {
        self.wait_for(|state| {
            if let Some(incoming) = state.requests.pop_front() {
                return Some(Next::Request(incoming));
            }
            match state.end? {
                Ending::Eof => Some(Next::Eof),
                Ending::Closed => Some(Next::Closed),
                Ending::Fatal(fatal) => Some(Next::Fatal(fatal)),
            }
        })
        .await
    }

    /// Resolves once the channel is closed.
    pub async fn closed(&self) {
        self.wait_for(|state| match state.end {
            Some(Ending::Closed) => Some(()),
            Some(Ending::Eof | Ending::Fatal(_)) | None => None,
        })
        .await;
    }

    /// Resolves once the channel is closed, and no request waits that still has an effect.
    pub async fn abandoned(&self) {
        self.wait_for(|state| match state.end {
            Some(Ending::Closed) if state.requests.is_empty() => Some(()),
            Some(Ending::Closed | Ending::Eof | Ending::Fatal(_)) | None => None,
        })
        .await;
    }

    async fn wait_for<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let found = look(&mut self.state());
            match found {
                Some(found) => return found,
                None => changed.await,
            }
        }
    }

    fn is_over(&self) -> bool {
        self.state().end.is_some()
    }

    fn end(&self, ending: Ending) {
        self.state().end.get_or_insert(ending);
        self.changed.notify_waiters();
    }

    /// Requests that arrived before are still carried out, as clients need not wait for the
    /// answers. WRITEs of a file that is not closed behind them, and requests that only make sense
    /// with their answer, are dropped.
    fn close(&self) {
        let mut state = self.state();
        while let Some(last) = state.requests.back() {
            if find_row(&last.request).has_effect {
                break;
            }
            state.requests.pop_back();
        }
        state.end = Some(Ending::Closed);
        drop(state);
        self.changed.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// WRITEs without end, and how many bytes of them were taken.
    struct Endless(Arc<AtomicUsize>);

    impl Source for Endless {
        async fn next(&mut self) -> Received {
            let mut packet = Vec::new();
            packet.extend((5 + 4 + 1 + 8 + 4 + 30_000_u32).to_be_bytes());
            packet.extend([6, 0, 0, 0, 1, 0, 0, 0, 1, b'h']);
            packet.extend(0_u64.to_be_bytes());
            packet.extend(30_000_u32.to_be_bytes());
            packet.resize(packet.len() + 30_000, 0);
            self.0.fetch_add(packet.len(), Ordering::Relaxed);
            tokio::task::yield_now().await;
            Received::Data(Bytes::from(packet))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_is_bounded_with_and_without_the_pool() {
        for (pool, most) in [
            (0, OWN_ROOM),
            (8 << 20, OWN_ROOM + (1 << 20)),
            (1 << 30, OWN_ROOM + POOL_ROOM),
        ] {
            let taken = Arc::new(AtomicUsize::new(0));
            let pool = BufferPool::new(pool);
            let queue = RequestQueue::new(pool.clone());
            let filling = queue.fill(Endless(taken.clone()));
            assert!(
                tokio::time::timeout(std::time::Duration::from_secs(60), filling)
                    .await
                    .is_err()
            );
            let taken = taken.load(Ordering::Relaxed);
            // Less what a packet does not fill, and the overhead of each.
            assert!(
                (most - 300_000..=most + 31_000).contains(&taken),
                "{taken} of {most}"
            );
            drop(queue);
            assert_eq!(pool.used(), 0);
        }
    }
}
