//! The way to the bucket and back: delays in virtual time, and everything that can go wrong between
//! a request and its answer. What happens to a request depends on the seed and on the request's
//! name only, so that a history without one of its operations is much the same.

use super::bucket::{self, Bucket, Refusal};
use super::dice::Dice;
use super::history::{Cause, Fault, Journal, What};
use super::plan::{Faults, Plan};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::sleep;
use tokio_util::task::TaskTracker;

/// The n-th request of its kind about a key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestName {
    pub kind: Kind,
    pub key: String,
    pub number: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Head,
    Get,
    List,
    Put,
    Delete,
    Copy,
    CreateUpload,
    UploadPart,
    Complete,
    Abort,
}

/// Why there is no good answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// S3 says no.
    Refused(Refusal),
    /// S3 says that it is broken, and that nothing was done.
    Broken,
    /// Nobody knows whether it was done.
    Unclear,
}

/// What becomes of one request, in milliseconds.
struct Fate {
    before: u64,
    after: u64,
    /// Between two attempts, or from an answer that is too early to the effect.
    later: u64,
    fault: Option<Fault>,
}

/// The bucket with the network before it. Clones share it.
#[derive(Clone)]
pub struct Remote {
    shared: Arc<Shared>,
}

struct Shared {
    bucket: Mutex<Bucket>,
    journal: Journal,
    seed: u64,
    faults: Faults,
    spared: BTreeSet<RequestName>,
    /// How many requests of each kind there were about each key.
    counts: Mutex<BTreeMap<(Kind, String), u32>>,
    /// Requests that were held up for long.
    delayed: AtomicUsize,
    /// Requests on their way, whether somebody waits for them or not.
    under_way: TaskTracker,
}

impl Remote {
    pub fn new(plan: &Plan, journal: Journal) -> Remote {
        let shared = Shared {
            bucket: Mutex::new(Bucket::new(plan.store, journal.clone())),
            journal,
            seed: plan.fate_seed,
            faults: plan.faults,
            spared: plan.spared.clone(),
            counts: Mutex::default(),
            delayed: AtomicUsize::new(0),
            under_way: TaskTracker::new(),
        };
        Remote {
            shared: Arc::new(shared),
        }
    }

    /// The bucket as it is, without delay or fault.
    pub fn bucket(&self) -> MutexGuard<'_, Bucket> {
        self.shared
            .bucket
            .lock()
            .expect("no panic while it is held")
    }

    /// Waits until everything that was sent has arrived.
    pub async fn settle(&self) {
        self.shared.under_way.close();
        self.shared.under_way.wait().await;
    }

    /// Sends a request, and waits for its answer. A request that nobody waits for any more arrives
    /// all the same.
    pub async fn request<T, E>(&self, kind: Kind, key: &str, effect: E) -> Result<T, Trouble>
    where
        T: Send + 'static,
        E: Fn(&mut Bucket, Cause) -> bucket::Result<T> + Send + 'static,
    {
        let name = self.name(kind, key);
        let (answer, answered) = oneshot::channel();
        let delivery = Delivery {
            remote: self.clone(),
            name,
            effect,
            answer: Some(answer),
        };
        self.shared.under_way.spawn(delivery.deliver());
        answered.await.unwrap_or(Err(Trouble::Unclear))
    }

    /// How many requests were held up for long.
    pub fn delayed(&self) -> usize {
        self.shared.delayed.load(Ordering::Relaxed)
    }

    fn name(&self, kind: Kind, key: &str) -> RequestName {
        let mut counts = self
            .shared
            .counts
            .lock()
            .expect("no panic while it is held");
        let count = counts.entry((kind, key.to_owned())).or_default();
        *count += 1;
        RequestName {
            kind,
            key: key.to_owned(),
            number: *count,
        }
    }

    fn fate(&self, name: &RequestName) -> Fate {
        let mut dice = Dice::for_name(self.shared.seed, &name.to_string());
        // Copies take their time, and much can happen meanwhile.
        let often_long = if name.kind == Kind::Copy { 400 } else { 150 };
        let before = draw_delay(&mut dice, often_long);
        let after = draw_delay(&mut dice, often_long);
        let later = 1 + dice.below(3000);
        let breaks_promises = !self.bucket().keeps_conditions();
        let fault = match self.shared.faults {
            Faults::None => None,
            Faults::Usual => draw_fault(&mut dice, name.kind, USUAL_FAULTS, breaks_promises),
            Faults::Late => draw_fault(&mut dice, name.kind, ALL_FAULTS, breaks_promises),
        };
        if before.max(after) > USUAL_DELAY {
            self.shared.delayed.fetch_add(1, Ordering::Relaxed);
        }
        let is_spared = self.shared.spared.contains(name);
        Fate {
            before,
            after,
            later,
            fault: fault.filter(|_| !is_spared),
        }
    }
}

/// What can happen to a request that makes, replaces or removes an object.
const ALL_FAULTS: &[Fault] = &[
    Fault::Failure,
    Fault::UnclearFailure,
    Fault::LostAnswer,
    Fault::Repeated,
    Fault::LateEffect,
    Fault::LateDuplicate,
];
const USUAL_FAULTS: &[Fault] = ALL_FAULTS.split_at(4).0;

/// Most requests take no longer each way, in milliseconds.
const USUAL_DELAY: u64 = 30;

/// Long delays are so many of a thousand.
fn draw_delay(dice: &mut Dice, often_long: u64) -> u64 {
    if dice.happens(often_long) {
        1 + dice.below(2000)
    } else {
        1 + dice.below(USUAL_DELAY)
    }
}

/// Only a store that ignores conditions, as Garage, is known to confirm copies that it has not
/// made. With several gateways on it nothing could be told apart any more.
fn draw_fault(
    dice: &mut Dice,
    kind: Kind,
    of_changes: &[Fault],
    breaks_promises: bool,
) -> Option<Fault> {
    match kind {
        Kind::Head | Kind::Get | Kind::List | Kind::UploadPart => {
            dice.happens(10).then_some(Fault::Failure)
        }
        Kind::Put | Kind::Delete | Kind::Complete => {
            dice.happens(70).then(|| *dice.pick(of_changes))
        }
        Kind::Copy if dice.happens(20) && breaks_promises => Some(Fault::EmptyPromise),
        Kind::Copy => dice.happens(250).then(|| *dice.pick(of_changes)),
        Kind::CreateUpload => dice
            .happens(20)
            .then(|| *dice.pick(&[Fault::Failure, Fault::LostAnswer])),
        Kind::Abort => dice.happens(20).then_some(Fault::Failure),
    }
}

/// A request on its way.
struct Delivery<T, E> {
    remote: Remote,
    name: RequestName,
    effect: E,
    /// `None` once it was answered.
    answer: Option<oneshot::Sender<Result<T, Trouble>>>,
}

impl<T, E: Fn(&mut Bucket, Cause) -> bucket::Result<T>> Delivery<T, E> {
    async fn deliver(mut self) {
        let fate = self.remote.fate(&self.name);
        pause(fate.before).await;
        if let Some(fault) = fate.fault {
            let key = self.name.key.clone();
            let request = self.name.clone();
            self.remote.shared.journal.note(What::Fault {
                key,
                request,
                fault,
            });
        }
        match fate.fault {
            None => self.apply_and_answer(fate.after).await,
            // It is tried several times before it is given up.
            Some(Fault::Failure) => self.answer(fate.later, Err(Trouble::Broken)).await,
            Some(Fault::UnclearFailure) => self.answer(fate.later, Err(Trouble::Unclear)).await,
            Some(Fault::LostAnswer) => {
                let _lost = self.apply();
                self.answer(fate.after, Err(Trouble::Unclear)).await;
            }
            Some(Fault::Repeated) => {
                let _lost = self.apply();
                pause(fate.later).await;
                self.apply_and_answer(fate.after).await;
            }
            Some(Fault::LateEffect) => {
                self.answer(fate.after, Err(Trouble::Unclear)).await;
                pause(fate.later).await;
                let _late = self.apply();
            }
            Some(Fault::LateDuplicate) => {
                self.apply_and_answer(fate.after).await;
                pause(fate.later).await;
                let _duplicate = self.apply();
            }
            Some(Fault::EmptyPromise) => {
                let promise = self.apply_to_nothing();
                self.answer(fate.after, promise).await;
            }
        }
    }

    /// Carries the request out.
    fn apply(&self) -> Result<T, Trouble> {
        let is_awaited = self
            .answer
            .as_ref()
            .is_some_and(|answer| !answer.is_closed());
        let cause = if is_awaited {
            Cause::Request
        } else {
            Cause::Late
        };
        (self.effect)(&mut self.remote.bucket(), cause).map_err(Trouble::Refused)
    }

    /// What carrying the request out would return; the bucket stays as it is.
    fn apply_to_nothing(&self) -> Result<T, Trouble> {
        let mut scratch = self.remote.bucket().scratch();
        (self.effect)(&mut scratch, Cause::Request).map_err(Trouble::Refused)
    }

    async fn apply_and_answer(&mut self, after: u64) {
        let result = self.apply();
        self.answer(after, result).await;
    }

    async fn answer(&mut self, after: u64, result: Result<T, Trouble>) {
        pause(after).await;
        if let Some(answer) = self.answer.take() {
            let _nobody_waits = answer.send(result);
        }
    }
}

async fn pause(milliseconds: u64) {
    sleep(Duration::from_millis(milliseconds)).await;
}

impl fmt::Display for RequestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} {}", self.kind, self.key, self.number)
    }
}
