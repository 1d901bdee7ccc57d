//! What happened, in the order in which it happened: there is one thread, so there is one order.

use super::plan::{Action, BreakKind, brief};
use super::remote::RequestName;
use bytes::Bytes;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::time::Instant;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Virtual milliseconds since the start.
    pub at: u64,
    pub what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A client began an action.
    Began { id: usize, who: Who, action: Action },
    /// The STAT of an action was answered: with this size, or that there is no such file.
    Shown { id: usize, size: Option<u64> },
    /// A file is open for writing.
    Opened { id: usize },
    /// A client sends the CLOSE that makes its file.
    Closing { id: usize },
    /// The client knows how it went, or will never know.
    Ended { id: usize, outcome: Outcome },
    /// A client left a session.
    Left { who: Who, kind: BreakKind },
    /// The client waited in vain for an answer.
    Hung { id: usize },
    /// An object in the bucket is another one now.
    Changed {
        key: String,
        before: Option<Bytes>,
        after: Option<Bytes>,
        cause: Cause,
    },
    /// The store did something to a request about this key, after which its outcome may be unclear.
    Fault {
        key: String,
        request: RequestName,
        fault: Fault,
    },
}

/// A session of a client. A client has one after the other, and may leave some of them open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    pub client: usize,
    pub gateway: usize,
    pub session: usize,
}

/// How an action went, as far as the client knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The server said OK.
    Done(Found),
    /// The server said NO_SUCH_FILE.
    Missing,
    /// The server said anything else.
    Refused(String),
    /// The connection ended after the request that decides was sent.
    Unanswered,
    /// The connection ended before the request that decides was sent.
    CutOff,
}

/// What an action returns beside OK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Nothing,
    Content(Bytes),
    /// In bytes.
    Size(u64),
    /// Names of files, without the directory, and their sizes.
    Names(Vec<(String, u64)>),
}

/// Why an object changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A request whose answer somebody waits for.
    Request,
    /// The store carried a request out after the answer, or after nobody waited any more.
    Late,
    /// The files of the start.
    Setup,
}

/// What the store does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// An error, and it is certain that nothing was done.
    Failure,
    /// Nothing was done, but the error does not say so.
    UnclearFailure,
    /// Done, but the answer was lost.
    LostAnswer,
    /// Done twice before the answer, which is the second attempt's.
    Repeated,
    /// The answer was lost, and it is done later.
    LateEffect,
    /// Done once more after the answer.
    LateDuplicate,
    /// A copy is confirmed that was not made.
    EmptyPromise,
}

/// What is left after all clients are gone and everything had a day to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Keys of multipart uploads that are still in progress, though nothing stopped their abort.
    pub uploads: Vec<String>,
    /// Bytes that the gateways' pools count as used.
    pub memory: u64,
    /// Sessions that have not ended.
    pub sessions: usize,
    /// Transfers that have not ended.
    pub transfers: usize,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    pub events: Vec<Event>,
    pub leftovers: Leftovers,
}

impl History {
    /// How many faults of this kind there were.
    pub fn count_faults(&self, kinds: &[Fault]) -> usize {
        let is_one = |event: &&Event| matches!(&event.what, What::Fault { fault, .. } if kinds.contains(fault));
        self.events.iter().filter(is_one).count()
    }
}

/// Where everything that happens is written down. Clones write into one.
#[derive(Clone)]
pub struct Journal {
    start: Instant,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Journal {
    /// Starts the clock.
    pub fn begin() -> Journal {
        Journal {
            start: Instant::now(),
            events: Arc::default(),
        }
    }

    pub fn note(&self, what: What) {
        let at = self.start.elapsed().as_millis() as u64;
        self.events().push(Event { at, what });
    }

    /// All that was noted so far.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.events())
    }

    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().expect("no panic while it is held")
    }
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for event in &self.events {
            writeln!(f, "{event}")?;
        }
        let none = Leftovers::default();
        if self.leftovers != none {
            writeln!(f, "   at the end  {:?}", self.leftovers)
        } else {
            Ok(())
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>9} ms  ", self.at)?;
        match &self.what {
            What::Began { id, who, action } => write!(f, "{who} begins #{id}: {action}"),
            What::Shown {
                id,
                size: Some(size),
            } => write!(f, "#{id} is shown {size} bytes"),
            What::Shown { id, size: None } => write!(f, "#{id} is shown no such file"),
            What::Opened { id } => write!(f, "#{id} has opened its file"),
            What::Closing { id } => write!(f, "#{id} sends CLOSE"),
            What::Left {
                who,
                kind: BreakKind::HangsUp,
            } => write!(f, "{who} hangs up"),
            What::Left {
                who,
                kind: BreakKind::FallsSilent,
            } => write!(f, "{who} falls silent"),
            What::Ended { id, outcome } => write!(f, "#{id} ends: {outcome}"),
            What::Hung { id } => write!(f, "#{id} hangs: no answer"),
            What::Changed {
                key,
                before,
                after,
                cause,
            } => {
                let cause = match cause {
                    Cause::Request => "",
                    Cause::Late => ", late",
                    Cause::Setup => ", at the start",
                };
                write!(
                    f,
                    "        store: {key} was {}, is {}{cause}",
                    object(before),
                    object(after)
                )
            }
            What::Fault { request, fault, .. } => {
                write!(f, "        store: {fault:?} of {request}")
            }
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Who {
            client,
            gateway,
            session,
        } = self;
        write!(f, "client {client} at gateway {gateway}, session {session}")
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Done(Found::Nothing) => write!(f, "OK"),
            Outcome::Done(Found::Content(content)) => {
                write!(f, "OK, {}", brief(&String::from_utf8_lossy(content)))
            }
            Outcome::Done(Found::Size(size)) => write!(f, "OK, {size} bytes"),
            Outcome::Done(Found::Names(names)) => write!(f, "OK, {names:?}"),
            Outcome::Missing => write!(f, "no such file"),
            Outcome::Refused(why) => write!(f, "refused: {why}"),
            Outcome::Unanswered => write!(f, "disconnected, outcome unknown"),
            Outcome::CutOff => write!(f, "disconnected before it was asked for"),
        }
    }
}

/// An object's content for people.
pub fn object(content: &Option<Bytes>) -> String {
    match content {
        Some(content) => brief(&String::from_utf8_lossy(content)),
        None => "absent".to_owned(),
    }
}
