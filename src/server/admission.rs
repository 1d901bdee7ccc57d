//! Who may connect: a limit on connections on which nobody has logged in yet, as OpenSSH's MaxStartups and
//! PerSourceMaxStartups.
//!
//! Called by `server` for every connection. Invariant: they never hold more than half of the sessions. When there are
//! that many, a new one takes the place of another: of the address that holds the most, and there of a random one of the
//! older half, so that connections that only wait can't keep out those that log in.

use super::source_of;
use crate::metrics::REFUSED_CONNECTIONS;
use metrics::counter;
use rand::RngExt;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Connections that one address may have without a login, if there are as many for all: a few clients that connect
/// together, or one with several transfers.
const MIN_PER_ADDRESS: usize = 10;
/// Until then a connection does not lose its place to one of an address that holds as many: a login takes less.
const MIN_TIME: Duration = Duration::from_secs(5);

/// Why a connection is turned away: for the figures, and for the log.
#[derive(Debug)]
pub struct Refusal {
    /// Of the metric.
    pub label: &'static str,
    /// For the log.
    pub why: &'static str,
}

const TOO_MANY: Refusal = Refusal {
    label: "strangers",
    why: "too many connections that have not logged in",
};

/// See the module.
pub struct Admission {
    /// Most connections without a login.
    limit: usize,
    /// Most of them from one address.
    limit_per_address: usize,
    /// A std lock: never held across an await.
    waiting: Mutex<Waiting>,
}

/// Connections on which nobody has logged in, the oldest first.
#[derive(Default)]
struct Waiting {
    slots: BTreeMap<u64, Slot>,
    last_slot: u64,
}

struct Slot {
    peer: SocketAddr,
    since: Instant,
    evicted: CancellationToken,
}

/// The place of a connection without a login; free again when dropped.
pub struct PreAuthSlot {
    admission: Arc<Admission>,
    number: u64,
    /// Cancelled when the connection has to make room for another one.
    pub evicted: CancellationToken,
}

impl Admission {
    /// For a server with this limit on connections.
    pub fn new(max_sessions: usize) -> Admission {
        let limit = (max_sessions / 2).max(1);
        let limit_per_address = (limit / 2).max(MIN_PER_ADDRESS).min(limit);
        Admission {
            limit,
            limit_per_address,
            waiting: Mutex::default(),
        }
    }

    /// Gives a new connection a place, if need be that of another one, or says why it gets none.
    pub fn admit(self: &Arc<Self>, peer: SocketAddr) -> Result<PreAuthSlot, Refusal> {
        let mut waiting = self.waiting();
        let counts = waiting.count_by_address();
        let own = counts.get(&source_of(peer.ip())).copied().unwrap_or(0);
        if own >= self.limit_per_address {
            waiting.evict(Candidates::Own(peer.ip()))?;
        } else if waiting.slots.len() >= self.limit {
            let most = counts.values().copied().max().unwrap_or(0);
            let candidates = match most > own + 1 {
                true => Candidates::Holding(most),
                false => Candidates::Slow,
            };
            waiting.evict(candidates)?;
        }
        waiting.last_slot += 1;
        let number = waiting.last_slot;
        let evicted = CancellationToken::new();
        waiting.slots.insert(
            number,
            Slot {
                peer,
                since: Instant::now(),
                evicted: evicted.clone(),
            },
        );
        Ok(PreAuthSlot {
            admission: self.clone(),
            number,
            evicted,
        })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which connections may lose their place.
#[derive(Clone, Copy)]
enum Candidates {
    /// Those of the addresses that hold this many.
    Holding(usize),
    /// Those of this address that have had their time.
    Own(IpAddr),
    /// All that have had their time: no address holds many more than another.
    Slow,
}

impl Waiting {
    fn count_by_address(&self) -> HashMap<IpAddr, usize> {
        let mut counts = HashMap::new();
        for slot in self.slots.values() {
            *counts.entry(source_of(slot.peer.ip())).or_default() += 1;
        }
        counts
    }

    /// Ends a random one of the older half of the candidates.
    fn evict(&mut self, candidates: Candidates) -> Result<(), Refusal> {
        let counts = self.count_by_address();
        let is_candidate = |slot: &Slot| {
            let address = source_of(slot.peer.ip());
            match candidates {
                Candidates::Holding(count) => counts.get(&address) == Some(&count),
                Candidates::Own(own) => {
                    address == source_of(own) && slot.since.elapsed() >= MIN_TIME
                }
                Candidates::Slow => slot.since.elapsed() >= MIN_TIME,
            }
        };
        let found: Vec<u64> = self
            .slots
            .iter()
            .filter(|(_, slot)| is_candidate(slot))
            .map(|(number, _)| *number)
            .collect();
        let older_half = found.len().div_ceil(2);
        if older_half == 0 {
            return Err(TOO_MANY);
        }
        let chosen = rand::rng().random_range(0..older_half);
        if let Some(slot) = found
            .get(chosen)
            .and_then(|number| self.slots.remove(number))
        {
            counter!(REFUSED_CONNECTIONS, "reason" => TOO_MANY.label).increment(1);
            log::warn!("{}: disconnected: {}", slot.peer, TOO_MANY.why);
            slot.evicted.cancel();
        }
        Ok(())
    }
}

impl Drop for PreAuthSlot {
    fn drop(&mut self) {
        self.admission.waiting().slots.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv6Addr;

    /// Clients of this many addresses in turns, in networks of their own.
    fn peer(n: u128, addresses: u128) -> SocketAddr {
        (Ipv6Addr::from_bits((n % addresses) << 64 | n), 22).into()
    }

    #[tokio::test(start_paused = true)]
    async fn one_address_has_half_of_the_places_and_replaces_only_its_own() {
        let admission = Arc::new(Admission::new(100));
        let one: Vec<_> = (0..100)
            .map_while(|n| admission.admit(peer(n, 1)).ok())
            .collect();
        assert_eq!(one.len(), 25);
        let other = admission
            .admit((Ipv6Addr::from_bits(1 << 64), 22).into())
            .unwrap();
        tokio::time::advance(MIN_TIME).await;
        assert!(admission.admit(peer(0, 1)).is_ok(), "they had their time");
        assert_eq!(
            one.iter()
                .filter(|slot| slot.evicted.is_cancelled())
                .count(),
            1
        );
        assert!(!other.evicted.is_cancelled());
        drop((one, other));
        assert!(admission.waiting().slots.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_address_that_holds_the_most_pays_with_its_older_half() {
        let admission = Arc::new(Admission::new(100));
        let many: Vec<_> = (0..50)
            .map(|n| admission.admit(peer(n, 2)).unwrap())
            .collect();
        let few: Vec<_> = (0..10)
            .map(|n| admission.admit(peer(100 + n, 110)).unwrap())
            .collect();
        assert_eq!(admission.waiting().slots.len(), 50);
        assert!(few.iter().all(|slot| !slot.evicted.is_cancelled()));
        let evicted: Vec<_> = (0..50)
            .filter(|n| many[*n].evicted.is_cancelled())
            .collect();
        assert!(
            evicted.len() == 10 && evicted.iter().all(|n| *n < 40),
            "{evicted:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn from_many_addresses_those_go_that_had_their_time() {
        for sessions in [1, 2, 10, 1000] {
            let admission = Arc::new(Admission::new(sessions));
            let most = (sessions / 2).max(1);
            let all: Vec<_> = (0..1000)
                .map_while(|n| admission.admit(peer(n, 1000)).ok())
                .collect();
            assert_eq!(all.len(), most);
            tokio::time::advance(MIN_TIME).await;
            assert!(admission.admit(peer(5000, 6000)).is_ok());
            assert_eq!(
                all.iter()
                    .filter(|slot| slot.evicted.is_cancelled())
                    .count(),
                1
            );
        }
    }
}
