//! Wrong passwords cost time: which ones are not looked at, as OpenSSH's PerSourcePenalties.
//!
//! Called by `connection` around every check of a password. Invariants: an attempt is charged when it begins and given
//! back when it succeeds, so that attempts side by side are no cheaper than attempts in a row; a success clears only what
//! its own user name owes; keys are never refused here.

use super::source_of;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// What the first wrong password for a user name costs its address; each further one costs twice what is still owed.
const FIRST_USER_DEBT: Duration = Duration::from_secs(1);
/// What a user name may owe before its passwords are not looked at: the seventh wrong one in a row is too much.
const MAX_USER_DEBT: Duration = Duration::from_secs(60);
/// What a wrong password costs its address, whatever the user name: two a minute in the long run.
const ADDRESS_CHARGE: Duration = Duration::from_secs(30);
/// What an address may owe: 20 wrong passwords, or a network of people behind one address who mistype theirs now and then.
const MAX_ADDRESS_DEBT: Duration = Duration::from_secs(600);
/// How long an address may ask for a user name that has logged in from there, whatever else it owes.
const TRUST_TIME: Duration = Duration::from_secs(24 * 60 * 60);
/// Entries of each of the two tables, of some 100 bytes. Whoever guesses from more addresses is not stopped by remembering
/// addresses.
const MAX_ENTRIES: usize = 10_000;

/// Why a password is not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unheard {
    /// Too many wrong ones for this user name from this address.
    User,
    /// Too many wrong ones from this address.
    Address,
}

impl Unheard {
    /// For the log.
    pub fn text(self) -> &'static str {
        match self {
            Unheard::User => "too many failed logins of this user from this address",
            Unheard::Address => "too many failed logins from this address",
        }
    }
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
    /// By address and a hash of the user name, which comes from the client and may be long.
    users: HashMap<(IpAddr, u64), Record>,
    hasher: RandomState,
}

/// What is known of an address, or of a user name at an address.
#[derive(Clone, Copy)]
struct Record {
    /// When all that is owed will be paid.
    paid: Instant,
    /// Until when a login from here that succeeded counts.
    trusted: Instant,
    /// Attempts whose outcome is not known yet.
    pending: u32,
}

/// An attempt that is being looked at. Dropped, it has failed.
pub struct Attempt {
    penalties: Arc<Penalties>,
    address: IpAddr,
    user: (IpAddr, u64),
    has_succeeded: bool,
}

impl Penalties {
    /// Charges an attempt, or says why it must not be looked at. Waits for the outcome of others where that decides.
    pub async fn begin(self: &Arc<Self>, peer: IpAddr, user: &str) -> Result<Attempt, Unheard> {
        let address = source_of(peer);
        loop {
            let ended = self.attempt_ended.notified();
            tokio::pin!(ended);
            // From here on no end of an attempt is missed.
            ended.as_mut().enable();
            match self.try_begin(address, user) {
                Verdict::Heard(attempt) => return Ok(attempt),
                Verdict::Unheard(why) => return Err(why),
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
        if user_record.owed_by_user(now) > MAX_USER_DEBT {
            return Verdict::of(Unheard::User, user_record);
        }
        let is_trusted = user_record.trusted > now;
        if !is_trusted && address_record.owed_by_address(now) > MAX_ADDRESS_DEBT {
            return Verdict::of(Unheard::Address, address_record);
        }
        record_of(&mut tables.users, user, now).pending += 1;
        record_of(&mut tables.addresses, address, now).pending += 1;
        Verdict::Heard(Attempt {
            penalties: self.clone(),
            address,
            user,
            has_succeeded: false,
        })
    }

    /// A login without a password has succeeded: the user owes nothing here.
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
    Heard(Attempt),
    Unheard(Unheard),
    /// It depends on attempts that are being looked at.
    Undecided,
}

impl Verdict {
    fn of(why: Unheard, record: Record) -> Verdict {
        if record.pending > 0 {
            Verdict::Undecided
        } else {
            Verdict::Unheard(why)
        }
    }
}

impl Record {
    fn new(now: Instant) -> Record {
        Record {
            paid: now,
            trusted: now,
            pending: 0,
        }
    }

    fn owed(&self, now: Instant) -> Duration {
        self.paid.saturating_duration_since(now)
    }

    /// What the user owes if every attempt that is being looked at fails.
    fn owed_by_user(&self, now: Instant) -> Duration {
        let failures = 0..self.pending.min(u64::BITS);
        failures.fold(self.owed(now), |owed, _| next_user_debt(owed))
    }

    /// What the address owes if every attempt that is being looked at fails.
    fn owed_by_address(&self, now: Instant) -> Duration {
        self.owed(now) + ADDRESS_CHARGE.saturating_mul(self.pending.saturating_add(1))
    }

    /// Lets the user begin anew, and trusts the address with this user name.
    fn forgive(&mut self, now: Instant) {
        self.paid = now;
        self.trusted = now + TRUST_TIME;
    }

    /// Whether forgetting it makes no difference.
    fn is_void(&self, now: Instant) -> bool {
        self.pending == 0 && self.paid <= now && self.trusted <= now
    }
}

/// What a user owes after one more wrong password.
fn next_user_debt(owed: Duration) -> Duration {
    owed.saturating_mul(2)
        .clamp(FIRST_USER_DEBT, 2 * MAX_USER_DEBT)
}

/// The record of this key, a new one if there is none. A full table loses the one that matters least.
fn record_of<K: Copy + Eq + Hash>(
    table: &mut HashMap<K, Record>,
    key: K,
    now: Instant,
) -> &mut Record {
    if table.len() >= MAX_ENTRIES && !table.contains_key(&key) {
        table.retain(|_, record| !record.is_void(now));
    }
    if table.len() >= MAX_ENTRIES && !table.contains_key(&key) {
        // There are fewer attempts at once than entries, so one is found.
        let after_pending_closes = table.iter().filter(|(_, record)| record.pending == 0);
        let least =
            after_pending_closes.min_by_key(|(_, record)| (record.paid.max(now), record.trusted));
        if let Some(least) = least.map(|(key, _)| *key) {
            table.remove(&least);
        }
    }
    table.entry(key).or_insert(Record::new(now))
}

impl Attempt {
    /// The password was right: what was charged is given back, and what the user name owed is forgotten.
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
        match self.has_succeeded {
            true => user.forgive(now),
            false => user.paid = now + next_user_debt(user.owed(now)),
        }
        let address = record_of(&mut tables.addresses, self.address, now);
        address.pending = address.pending.saturating_sub(1);
        if !self.has_succeeded {
            let owed = address.owed(now) + ADDRESS_CHARGE;
            address.paid = now + owed.min(MAX_ADDRESS_DEBT + ADDRESS_CHARGE);
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
    async fn who_guesses_waits_longer_and_longer() {
        let penalties = Arc::new(Penalties::default());
        let mut waits = Vec::new();
        for _ in 0..12 {
            let asked = Instant::now();
            let attempt = loop {
                match penalties.begin(PEER, "alice").await {
                    Ok(attempt) => break attempt,
                    Err(why) => assert_eq!(why, Unheard::User),
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
    async fn many_names_from_one_address_are_heard_twice_a_minute() {
        let penalties = Arc::new(Penalties::default());
        penalties.begin(PEER, "alice").await.unwrap().succeed();
        let mut heard = 0;
        for n in 0..600 {
            heard += u32::from(penalties.begin(PEER, &format!("user{n}")).await.is_ok());
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert!((38..=41).contains(&heard), "{heard}");
        assert!(
            penalties.begin(PEER, "alice").await.is_ok(),
            "she has logged in from there"
        );
        let next_door: IpAddr = "2001:db8::1".parse().unwrap();
        assert!(penalties.begin(next_door, "bob").await.is_ok());
    }

    #[tokio::test]
    async fn attempts_side_by_side_are_charged_at_once_and_given_back() {
        let penalties = Arc::new(Penalties::default());
        let mut pending = Vec::new();
        while let Verdict::Heard(attempt) = penalties.try_begin(PEER, "alice") {
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
