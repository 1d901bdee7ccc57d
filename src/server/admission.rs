//! Admission control: limits unauthenticated connections, as OpenSSH's MaxStartups and
//! PerSourceMaxStartups.
//!
//! Called by `server` for every connection. Invariant: unauthenticated connections never hold more
//! than half of the sessions. At the limit a new one evicts another: of the address that holds the
//! most, a random one of the older half, so that connections that only wait can't keep out those
//! that log in.

use super::source_of;
use crate::events::ConnectionRefusal;
use rand::RngExt;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Unauthenticated connections that one address may have at least, if the limit for all is not
/// lower: some clients that connect together, or one with several transfers.
const MIN_PER_ADDRESS: usize = 10;
/// A younger connection is not evicted for one of an address that holds as many: a login takes less
/// time than this.
const MIN_TIME: Duration = Duration::from_secs(5);

/// See the module.
pub struct Admission {
    /// Limit on unauthenticated connections.
    limit: usize,
    /// Limit on those of one address.
    limit_per_address: usize,
    /// A std lock: never held across an await.
    unauthenticated: Mutex<Unauthenticated>,
}

/// Connections without a login, the oldest first.
#[derive(Default)]
struct Unauthenticated {
    slots: BTreeMap<u64, Slot>,
    last_slot: u64,
}

struct Slot {
    peer: SocketAddr,
    since: Instant,
    evicted: CancellationToken,
}

/// The slot of an unauthenticated connection, freed when dropped.
pub struct PreAuthSlot {
    admission: Arc<Admission>,
    number: u64,
    /// Cancelled when the connection must make room for another one.
    pub evicted: CancellationToken,
}

impl Admission {
    /// For a server with this limit on all connections.
    pub fn new(max_sessions: usize) -> Admission {
        let limit = (max_sessions / 2).max(1);
        let limit_per_address = (limit / 2).max(MIN_PER_ADDRESS).min(limit);
        Admission {
            limit,
            limit_per_address,
            unauthenticated: Mutex::default(),
        }
    }

    /// Gives a new connection a slot, if need be that of another one, or says why not. The token
    /// becomes [`PreAuthSlot::evicted`].
    pub fn admit(
        self: &Arc<Self>,
        peer: SocketAddr,
        evicted: CancellationToken,
    ) -> Result<PreAuthSlot, ConnectionRefusal> {
        let mut unauthenticated = self.unauthenticated();
        let counts = unauthenticated.count_by_address();
        let own = counts.get(&source_of(peer.ip())).copied().unwrap_or(0);
        if own >= self.limit_per_address {
            unauthenticated.evict(Candidates::Own(peer.ip()))?;
        } else if unauthenticated.slots.len() >= self.limit {
            let most = counts.values().copied().max().unwrap_or(0);
            let candidates = if most > own + 1 {
                Candidates::Holding(most)
            } else {
                Candidates::Slow
            };
            unauthenticated.evict(candidates)?;
        }
        unauthenticated.last_slot += 1;
        let number = unauthenticated.last_slot;
        unauthenticated.slots.insert(
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

    fn unauthenticated(&self) -> MutexGuard<'_, Unauthenticated> {
        self.unauthenticated
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which connections may be evicted.
#[derive(Clone, Copy)]
enum Candidates {
    /// Those of the addresses that hold this many.
    Holding(usize),
    /// Those of this address that are older than [`MIN_TIME`].
    Own(IpAddr),
    /// All that are older than [`MIN_TIME`]: no address holds many more than another.
    Slow,
}

impl Unauthenticated {
    fn count_by_address(&self) -> HashMap<IpAddr, usize> {
        let mut counts = HashMap::new();
        for slot in self.slots.values() {
            *counts.entry(source_of(slot.peer.ip())).or_default() += 1;
        }
        counts
    }

    /// Evicts a random one of the older half of the candidates.
    fn evict(&mut self, candidates: Candidates) -> Result<(), ConnectionRefusal> {
        let counts = self.count_by_address();
        let mut found = Vec::new();
        for (number, slot) in &self.slots {
            let address = source_of(slot.peer.ip());
            let is_slow = slot.since.elapsed() >= MIN_TIME;
            let is_candidate = match candidates {
                Candidates::Holding(count) => counts.get(&address) == Some(&count),
                Candidates::Own(own) => address == source_of(own) && is_slow,
                Candidates::Slow => is_slow,
            };
            if is_candidate {
                found.push(*number);
            }
        }
        let older_half = found.len().div_ceil(2);
        if older_half == 0 {
            return Err(ConnectionRefusal::Unauthenticated);
        }
        let chosen = rand::rng().random_range(0..older_half);
        if let Some(number) = found.get(chosen)
            && let Some(slot) = self.slots.remove(number)
        {
            slot.evicted.cancel();
        }
        Ok(())
    }
}

impl Drop for PreAuthSlot {
    fn drop(&mut self) {
        self.admission.unauthenticated().slots.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv6Addr;

    /// A client; clients take turns among this many addresses, each in another network.
    fn peer(n: u128, addresses: u128) -> SocketAddr {
        (Ipv6Addr::from_bits((n % addresses) << 64 | n), 22).into()
    }

    #[tokio::test(start_paused = true)]
    async fn one_address_has_half_of_the_slots_and_evicts_only_its_own() {
        let admission = Arc::new(Admission::new(100));
        let one: Vec<_> = (0..100)
            .map_while(|n| admission.admit(peer(n, 1), CancellationToken::new()).ok())
            .collect();
        assert_eq!(one.len(), 25);
        let other = admission
            .admit(
                (Ipv6Addr::from_bits(1 << 64), 22).into(),
                CancellationToken::new(),
            )
            .unwrap();
        tokio::time::advance(MIN_TIME).await;
        assert!(
            admission
                .admit(peer(0, 1), CancellationToken::new())
                .is_ok(),
            "they had their time"
        );
        assert_eq!(
            one.iter()
                .filter(|slot| slot.evicted.is_cancelled())
                .count(),
            1
        );
        assert!(!other.evicted.is_cancelled());
        drop((one, other));
        assert!(admission.unauthenticated().slots.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_address_that_holds_the_most_loses_some_of_its_older_half() {
        let admission = Arc::new(Admission::new(100));
        let many: Vec<_> = (0..50)
            .map(|n| {
                admission
                    .admit(peer(n, 2), CancellationToken::new())
                    .unwrap()
            })
            .collect();
        let few: Vec<_> = (0..10)
            .map(|n| {
                admission
                    .admit(peer(100 + n, 110), CancellationToken::new())
                    .unwrap()
            })
            .collect();
        assert_eq!(admission.unauthenticated().slots.len(), 50);
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
    async fn among_many_addresses_a_slow_connection_is_evicted() {
        for sessions in [1, 2, 10, 1000] {
            let admission = Arc::new(Admission::new(sessions));
            let most = (sessions / 2).max(1);
            let all: Vec<_> = (0..1000)
                .map_while(|n| {
                    admission
                        .admit(peer(n, 1000), CancellationToken::new())
                        .ok()
                })
                .collect();
            assert_eq!(all.len(), most);
            tokio::time::advance(MIN_TIME).await;
            assert!(
                admission
                    .admit(peer(5000, 6000), CancellationToken::new())
                    .is_ok()
            );
            assert_eq!(
                all.iter()
                    .filter(|slot| slot.evicted.is_cancelled())
                    .count(),
                1
            );
        }
    }
}
