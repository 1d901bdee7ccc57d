//! Who may knock: a limit on connections on which nobody has logged in yet, and a pause for addresses that guess.
//!
//! Invariant: strangers never hold more than half of the sessions, and one address no more than half of that, so that
//! whoever knocks without end leaves room for those who can log in.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Below this, limits would only get in the way of a few clients that connect together.
const FEWEST: usize = 10;
/// An address pays for its first failed login in so much time, for each further one twice what it owes by then …
const FIRST_DEBT: Duration = Duration::from_secs(1);
/// … is not heard while it owes more than this, so from the seventh in a row …
const CREDIT: Duration = Duration::from_secs(60);
/// … and never owes more than this.
const MOST_DEBT: Duration = Duration::from_secs(600);
/// Addresses remembered. Whoever has more of them is not stopped by remembering addresses.
const MOST_DEBTORS: usize = 10_000;

/// Why a connection is turned away: for the figures, and for the log.
#[derive(Debug)]
pub struct Refusal {
    pub label: &'static str,
    pub why: &'static str,
}

/// See the module.
pub struct Door {
    strangers: usize,
    // A std lock: never held across an await.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    knocking: HashMap<IpAddr, usize>,
    /// When each address will have paid.
    debts: HashMap<IpAddr, Instant>,
}

/// A stranger's place; free again when dropped.
pub struct Knock(Arc<Door>, IpAddr);

impl Door {
    /// For so many sessions at most.
    pub fn new(sessions: usize) -> Door {
        Door { strangers: (sessions / 2).max(FEWEST), state: Mutex::default() }
    }

    /// Takes a place for a new connection, or says why it gets none.
    pub fn knock(self: &Arc<Self>, peer: IpAddr) -> Result<Knock, Refusal> {
        let (peer, mut state) = (source(peer), self.state());
        if state.debt(peer) > CREDIT {
            return Err(Refusal { label: "guessing", why: "too many failed logins from this address" });
        }
        let here = state.knocking.get(&peer).copied().unwrap_or(0);
        let all: usize = state.knocking.values().sum();
        if all >= self.strangers || here >= (self.strangers / 2).max(FEWEST) {
            return Err(Refusal { label: "strangers", why: "too many connections that have not logged in" });
        }
        state.knocking.insert(peer, here + 1);
        Ok(Knock(self.clone(), peer))
    }

    /// Has this address failed so often that no login is even looked at?
    pub fn is_closed_to(&self, peer: IpAddr) -> bool {
        self.state().debt(source(peer)) > CREDIT
    }

    /// A login failed, or succeeded: that clears the address, which others may share.
    pub fn note_login(&self, peer: IpAddr, succeeded: bool) {
        let (peer, mut state) = (source(peer), self.state());
        let debt = (2 * state.debt(peer)).clamp(FIRST_DEBT, MOST_DEBT);
        state.debts.remove(&peer);
        if succeeded {
            return;
        }
        let now = Instant::now();
        if state.debts.len() >= MOST_DEBTORS {
            state.debts.retain(|_, paid| *paid > now + FIRST_DEBT);
        }
        if state.debts.len() < MOST_DEBTORS {
            state.debts.insert(peer, now + debt);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn debt(&self, peer: IpAddr) -> Duration {
        self.debts.get(&peer).map_or(Duration::ZERO, |paid| paid.saturating_duration_since(Instant::now()))
    }
}

impl Drop for Knock {
    fn drop(&mut self) {
        let mut state = self.0.state();
        if let Some(count) = state.knocking.get_mut(&self.1) {
            *count -= 1;
        }
        state.knocking.retain(|_, count| *count > 0);
    }
}

/// Whoever has one IPv6 address has 2^64 of them.
fn source(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (!0 << 64)).into(),
        four => four,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[tokio::test(start_paused = true)]
    async fn who_guesses_waits_longer_and_longer() {
        let door = Arc::new(Door::new(1000));
        let mut waits = Vec::new();
        for _ in 0..12 {
            let asked = Instant::now();
            while door.is_closed_to(PEER) {
                assert!(door.knock(PEER).is_err());
                tokio::time::advance(Duration::from_secs(1)).await;
            }
            waits.push(asked.elapsed().as_secs());
            door.note_login(PEER, false);
        }
        assert_eq!(waits, [0, 0, 0, 0, 0, 0, 0, 4, 60, 60, 60, 60]);
        assert!(door.knock("192.0.2.1".parse().unwrap()).is_ok());
        door.note_login(PEER, true);
        assert!(door.knock(PEER).is_ok());
    }

    #[tokio::test]
    async fn strangers_leave_room() {
        let door = Arc::new(Door::new(100));
        let knock = |n: u128| door.knock(Ipv6Addr::from_bits(n).into());
        let one: Vec<_> = (0..100).map_while(|n| knock(n).ok()).collect();
        assert_eq!(one.len(), 25);
        let others: Vec<_> = (1..100).map_while(|n| knock(n << 64).ok()).collect();
        assert_eq!(others.len(), 25);
        drop(one);
        assert!(knock(0).is_ok());
        drop(others);
        assert!(door.state().knocking.is_empty());
    }

    #[test]
    fn the_table_of_debtors_is_bounded() {
        let door = Door::new(10);
        (0..2 * MOST_DEBTORS as u32).for_each(|n| door.note_login(std::net::Ipv4Addr::from_bits(n).into(), false));
        assert_eq!(door.state().debts.len(), MOST_DEBTORS);
    }
}
