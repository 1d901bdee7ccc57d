//! Penalties for wrong passwords, as OpenSSH's PerSourcePenalties: which passwords are not checked.
//!
//! Called by `connection` around every check of a password. Invariants: an attempt is charged when
//! it begins and given back when it succeeds, so that attempts in parallel cost as much as attempts
//! in a row; a success clears only the penalty of its own user name; keys are never refused here.

use super::source_of;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Penalty for the first wrong password of a user name from an address. Each further one doubles
/// what is left of it.
const FIRST_USER_PENALTY: Duration = Duration::from_secs(1);
/// Passwords of a user name are not checked while its penalty is larger: the seventh wrong one in a
/// row is too much.
const MAX_USER_PENALTY: Duration = Duration::from_secs(60);
/// Penalty of an address for each wrong password, whatever the user name: two a minute in the long
/// run.
const ADDRESS_PENALTY: Duration = Duration::from_secs(30);
/// Passwords from an address are not checked while its penalty is larger. 20 wrong passwords are
/// allowed at once, as many people can share an address and mistype now and then.
const MAX_ADDRESS_PENALTY: Duration = Duration::from_secs(600);
/// How long a user name that has logged in from an address is exempt from the address's penalty.
const TRUST_TIME: Duration = Duration::from_secs(24 * 60 * 60);
/// Entries of each of the two tables, of about 100 bytes. An attack from more addresses than that
/// can't be stopped by remembering addresses.
const MAX_ENTRIES: usize = 10_000;

/// Why a password is not checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Penalized {
    /// Too many wrong ones for this user name from this address.
    User,
    /// Too many wrong ones from this address.
    Address,
}

/// See the module.
#[derive(Default)]
pub struct Penalties {
    /// A std lock: never held across an await.
    tables: Mutex<Tables>,
    /// Notified whenever an attempt ends.
    attempt_ended: Notify,
}

#[derive(Default)]
struct Tables {
    addresses: HashMap<IpAddr, Record>,
    /// By address and a hash of the user name, which the client chooses and which may be long.
    users: HashMap<(IpAddr, u64), Record>,
    hasher: RandomState,
}

/// The penalty of an address, or of a user name at an address.
#[derive(Clone, Copy)]
struct Record {
    /// When the penalty ends.
    penalty_end: Instant,
    /// The user name is exempt from the address's penalty until then.
    trusted_until: Instant,
    /// Attempts that are being checked.
    pending: u32,
}

/// An attempt that is being checked. It has failed if it is dropped without [`Attempt::succeed`].
pub struct Attempt {
    penalties: Arc<Penalties>,
    address: IpAddr,
    user: (IpAddr, u64),
    has_succeeded: bool,
}

impl Penalties {
    /// Charges an attempt, or says why the password must not be checked. Waits for the outcome of
    /// other attempts if that decides.
    pub async fn begin(self: &Arc<Self>, peer: IpAddr, user: &str) -> Result<Attempt, Penalized> {
        let address = source_of(peer);
        loop {
            let ended = self.attempt_ended.notified();
            tokio::pin!(ended);
            // An attempt that ends from here on wakes this one.
            ended.as_mut().enable();
            match self.try_begin(address, user) {
                Verdict::Check(attempt) => return Ok(attempt),
                Verdict::Refuse(why) => return Err(why),
                Verdict::Undecided => ended.await,
            }
        }
    }

    fn try_begin(self: &Arc<Self>, address: IpAddr, user: &str) -> Verdict {
        let now = Instant::now();
        let mut tables = self.tables();
        let user = (address, tables.hasher.hash_one(user));
        let user_record = tables.users.get(&user).copied().unwrap_or(Record::new(now));
        let address_record = tables
            .addresses
            .get(&address)
            .copied()
            .unwrap_or(Record::new(now));
        if user_record.worst_user_penalty(now) > MAX_USER_PENALTY {
            return Verdict::of(Penalized::User, user_record);
        }
        let is_trusted = user_record.trusted_until > now;
        if !is_trusted && address_record.worst_address_penalty(now) > MAX_ADDRESS_PENALTY {
            return Verdict::of(Penalized::Address, address_record);
        }
        record_of(&mut tables.users, user, now).pending += 1;
        record_of(&mut tables.addresses, address, now).pending += 1;
        Verdict::Check(Attempt {
            penalties: self.clone(),
            address,
            user,
            has_succeeded: false,
        })
    }

    /// Ends the penalty of a user name that has logged in with a key.
    pub fn forgive(&self, peer: IpAddr, user: &str) {
        let now = Instant::now();
        let address = source_of(peer);
        let mut tables = self.tables();
        let user = (address, tables.hasher.hash_one(user));
        record_of(&mut tables.users, user, now).forgive(now);
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Verdict {
    Check(Attempt),
    Refuse(Penalized),
    /// It depends on attempts that are being checked.
    Undecided,
}

impl Verdict {
    fn of(why: Penalized, record: Record) -> Verdict {
        if record.pending > 0 {
            Verdict::Undecided
        } else {
            Verdict::Refuse(why)
        }
    }
}

impl Record {
    fn new(now: Instant) -> Record {
        Record {
            penalty_end: now,
            trusted_until: now,
            pending: 0,
        }
    }

    fn remaining(&self, now: Instant) -> Duration {
        self.penalty_end.saturating_duration_since(now)
    }

    /// The penalty of a user name if every attempt that is being checked fails.
    fn worst_user_penalty(&self, now: Instant) -> Duration {
        let mut penalty = self.remaining(now);
        // It reaches its maximum long before that many.
        for _ in 0..self.pending.min(u64::BITS) {
            penalty = next_user_penalty(penalty);
        }
        penalty
    }

    /// The penalty of an address if this attempt and every one that is being checked fail.
    fn worst_address_penalty(&self, now: Instant) -> Duration {
        let attempts = self.pending.saturating_add(1);
        self.remaining(now) + ADDRESS_PENALTY.saturating_mul(attempts)
    }

    /// Ends the penalty of the user name, and exempts it from that of the address.
    fn forgive(&mut self, now: Instant) {
        self.penalty_end = now;
        self.trusted_until = now + TRUST_TIME;
    }

    /// The lighter of two records is forgotten first.
    fn weight(&self, now: Instant) -> (Instant, Instant) {
        (self.penalty_end.max(now), self.trusted_until)
    }

    /// Whether a new record would be the same.
    fn is_blank(&self, now: Instant) -> bool {
        self.pending == 0 && self.penalty_end <= now && self.trusted_until <= now
    }
}

/// The penalty of a user name after one more wrong password.
fn next_user_penalty(penalty: Duration) -> Duration {
    penalty
        .saturating_mul(2)
        .clamp(FIRST_USER_PENALTY, 2 * MAX_USER_PENALTY)
}

/// The record of this key, a new one if there is none. In a full table the new one replaces the one
/// that matters least.
fn record_of<K: Copy + Eq + Hash>(
    table: &mut HashMap<K, Record>,
    key: K,
    now: Instant,
) -> &mut Record {
    if table.len() >= MAX_ENTRIES && !table.contains_key(&key) {
        table.retain(|_, record| !record.is_blank(now));
    }
    if table.len() >= MAX_ENTRIES && !table.contains_key(&key) {
        // There are fewer attempts at once than entries, so one is found.
        let idle = table.iter().filter(|(_, record)| record.pending == 0);
        let least = idle.min_by_key(|(_, record)| record.weight(now));
        if let Some((&least, _)) = least {
            table.remove(&least);
        }
    }
    table.entry(key).or_insert(Record::new(now))
}

impl Attempt {
    /// The password was right: takes the charge back and ends the penalty of the user name.
    pub fn succeed(mut self) {
        self.has_succeeded = true;
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut tables = self.penalties.tables();
        let user = record_of(&mut tables.users, self.user, now);
        user.pending = user.pending.saturating_sub(1);
        if self.has_succeeded {
            user.forgive(now);
        } else {
            user.penalty_end = now + next_user_penalty(user.remaining(now));
        }
        let address = record_of(&mut tables.addresses, self.address, now);
        address.pending = address.pending.saturating_sub(1);
        if !self.has_succeeded {
            let penalty = address.remaining(now) + ADDRESS_PENALTY;
            address.penalty_end = now + penalty.min(MAX_ADDRESS_PENALTY + ADDRESS_PENALTY);
        }
        drop(tables);
        self.penalties.attempt_ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const PEER: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[tokio::test(start_paused = true)]
    async fn each_wrong_password_of_a_user_doubles_the_wait() {
        let penalties = Arc::new(Penalties::default());
        let mut waits = Vec::new();
        for _ in 0..12 {
            let asked = Instant::now();
            let attempt = loop {
                match penalties.begin(PEER, "alice").await {
                    Ok(attempt) => break attempt,
                    Err(why) => assert_eq!(why, Penalized::User),
                }
                tokio::time::advance(Duration::from_secs(1)).await;
            };
            waits.push(asked.elapsed().as_secs());
            drop(attempt);
        }
        assert_eq!(waits, [0, 0, 0, 0, 0, 0, 0, 4, 60, 60, 60, 60]);
        assert!(
            penalties
                .begin("192.0.2.1".parse().unwrap(), "alice")
                .await
                .is_ok()
        );
        assert!(penalties.begin(PEER, "bob").await.is_ok());
        penalties.forgive(PEER, "alice");
        assert!(penalties.begin(PEER, "alice").await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_tries_many_names_has_two_passwords_a_minute_checked() {
        let penalties = Arc::new(Penalties::default());
        penalties.begin(PEER, "alice").await.unwrap().succeed();
        let mut checked = 0;
        for n in 0..600 {
            checked += u32::from(penalties.begin(PEER, &format!("user{n}")).await.is_ok());
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert!((38..=41).contains(&checked), "{checked}");
        assert!(
            penalties.begin(PEER, "alice").await.is_ok(),
            "she has logged in from there"
        );
        let next_door: IpAddr = "2001:db8::1".parse().unwrap();
        assert!(penalties.begin(next_door, "bob").await.is_ok());
    }

    #[tokio::test]
    async fn parallel_attempts_are_charged_at_once_and_given_back() {
        let penalties = Arc::new(Penalties::default());
        let mut pending = Vec::new();
        while let Verdict::Check(attempt) = penalties.try_begin(PEER, "alice") {
            pending.push(attempt);
        }
        assert_eq!(pending.len(), 7);
        let (eighth, ()) = tokio::join!(penalties.begin(PEER, "alice"), async {
            pending.drain(..).for_each(Attempt::succeed);
        });
        assert!(eighth.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_tables_are_bounded() {
        let penalties = Arc::new(Penalties::default());
        for n in 0..MAX_ENTRIES as u32 + 500 {
            drop(
                penalties
                    .begin(Ipv4Addr::from_bits(n).into(), "alice")
                    .await,
            );
        }
        let tables = penalties.tables();
        assert_eq!(
            (tables.users.len(), tables.addresses.len()),
            (MAX_ENTRIES, MAX_ENTRIES)
        );
    }
}
