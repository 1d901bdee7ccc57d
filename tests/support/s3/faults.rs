//! Faults that a test sets: which requests they strike, and what each of them does.

use super::FakeS3;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// Which requests of an operation a fault strikes, counted from 1 since the fault was set.
#[derive(Clone, Copy, Debug)]
pub enum When {
    Every,
    Nth(usize),
    From(usize),
}

impl When {
    fn includes(self, number: usize) -> bool {
        match self {
            When::Every => true,
            When::Nth(nth) => number == nth,
            When::From(first) => number >= first,
        }
    }
}

#[derive(Clone, Debug)]
pub enum Fault {
    /// An error with that HTTP status and S3 code, and nothing is done.
    Status(u16, &'static str),
    /// The connection is closed without an answer, and nothing is done.
    ResetBefore,
    /// The connection is closed half-way through the request's body, and nothing is done.
    ResetMidRequest,
    /// The connection is closed half-way through the answer's body.
    ResetMidBody,
    /// The operation is carried out, then the connection is closed without an answer.
    LostAnswer,
    /// No answer comes, and nothing is done.
    Hang,
    /// The operation is carried out, but no answer comes.
    HangAfter,
    /// The answer stops half-way through its body, and the connection stays open.
    HangMidBody,
    /// The answer pauses that long half-way through its body, then goes on.
    PauseMidBody(Duration),
    /// HTTP 200 with an error for a body, as `CompleteMultipartUpload` may answer; nothing is done.
    ErrorBody,
    /// HTTP 200 without a body; nothing is done. Like the next two, no answer of S3's but of a
    /// proxy before it.
    Empty,
    /// HTTP 200 with a page for people; nothing is done.
    Html,
    /// That HTTP status with a page for people; nothing is done.
    HtmlStatus(u16),
    /// The operation is carried out and answered, and nothing is changed by it: as Garage does,
    /// which drops a copy that comes in the same millisecond as a put to its target.
    WithoutEffect,
    /// The operation is carried out, and the answer has no ETag.
    WithoutETag,
    /// The operation is carried out, and the answer ends in the middle of its XML, as if that was
    /// all.
    TruncatedXml,
    /// The operation waits that long, then goes on.
    Stall(Duration),
    /// The operation waits to be notified, then goes on. `notify_one` may come first.
    Hold(Arc<Notify>),
}

/// The faults that were set, and what they have done.
#[derive(Default)]
pub struct Faults {
    set: Vec<SetFault>,
    /// By operation, how many requests were struck.
    struck: BTreeMap<String, usize>,
    /// How many requests have begun to hang.
    hanging: watch::Sender<usize>,
}

struct SetFault {
    op: String,
    when: When,
    fault: Fault,
    /// Requests of the operation since the fault was set.
    seen: usize,
}

impl Faults {
    /// The fault that strikes a request of an operation: of several, the one that was set first.
    pub fn strike(&mut self, op: &str) -> Option<Fault> {
        let mut struck = None;
        for set in &mut self.set {
            if set.op != op {
                continue;
            }
            set.seen += 1;
            if struck.is_none() && set.when.includes(set.seen) {
                struck = Some(set.fault.clone());
            }
        }
        if struck.is_some() {
            *self.struck.entry(op.to_owned()).or_default() += 1;
        }
        struck
    }

    pub fn announce_hanging(&self) {
        self.hanging.send_modify(|count| *count += 1);
    }
}

impl FakeS3 {
    /// Sets a fault. Of several that would strike one request, the one set first does.
    pub fn fault(&self, op: &str, when: When, fault: Fault) {
        self.store.lock().faults.set.push(SetFault {
            op: op.to_owned(),
            when,
            fault,
            seen: 0,
        });
    }

    pub fn clear_faults(&self) {
        self.store.lock().faults.set.clear();
    }

    /// How many requests have begun to hang so far.
    pub fn hanging(&self) -> watch::Receiver<usize> {
        self.store.lock().faults.hanging.subscribe()
    }

    /// How many requests of an operation faults have struck so far.
    pub fn struck(&self, op: &str) -> usize {
        let state = self.store.lock();
        state.faults.struck.get(op).copied().unwrap_or(0)
    }
}
