//! What happens in a server, told to listeners after the fact.
//!
//! `server`, `sftp` and `transfer` tell each [`Event`] in the place where its outcome is known. The
//! log, the metrics and the log in JSON are listeners like those of an application. Nothing here
//! waits, and no listener can hold up another connection's task for longer than its own call.

mod event;
mod json_log;
mod metrics;
mod text_log;

pub use event::{
    AlgorithmKind, ConnectionEnd, ConnectionRefusal, Credential, Event, FailedRequest, LoginMethod,
    LoginRefusal, NoCommonAlgorithm, NoLogin, Read, RequestKind, SessionEnd, Status,
    TransferResult, Written,
};
#[doc(hidden)]
pub use json_log::record_as_json;
pub use json_log::{JSON_TARGET, JsonLog};
/// What [`Event::level`] returns.
#[doc(inline)]
pub use log::Level;
pub use metrics::Metrics;
#[doc(hidden)]
pub use text_log::Escaped;
pub(crate) use text_log::Plural;
pub use text_log::TextLog;

use crate::path::MAX_KEY;
use crate::users::Account;
use std::fmt::{self, Display, Formatter};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Hears what happens. Every closure that takes these two references does:
///
/// ```
/// use sftpd::events::{Event, Who};
/// # use sftpd::{server::Server, store::memory::MemoryStore, users::UserList};
/// # use std::sync::Arc;
///
/// # fn main() -> anyhow::Result<()> {
/// let server = Server::builder(Arc::new(MemoryStore::default()), UserList::default())
///     .events(|who: &Who, event: &Event| println!("{who}: {event}"))
///     .build()?;
/// # Ok(())
/// # }
/// ```
pub trait Events: Send + Sync + 'static {
    /// Called once for each event, after the fact, in the task of the connection or the transfer
    /// that it is about. That task waits until this returns, so long work belongs into a queue. A
    /// panic is logged and has no other effect.
    fn event(&self, who: &Who, event: &Event);
}

impl<F: Fn(&Who, &Event) + Send + Sync + 'static> Events for F {
    fn event(&self, who: &Who, event: &Event) {
        self(who, event);
    }
}

impl<E: Events + ?Sized> Events for Arc<E> {
    fn event(&self, who: &Who, event: &Event) {
        self.as_ref().event(who, event);
    }
}

/// Whom an event is about.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Who {
    /// Numbers the connections of a server, from 1. 0 is the server itself.
    pub connection: u64,
    /// Numbers the events of a server, from 1. A listener may hear two events of different tasks
    /// in another order if they happen at the same time.
    pub sequence: u64,
    /// The client's address; behind a load balancer the one in the PROXY header.
    pub peer: Option<SocketAddr>,
    /// The account, once the client has logged in.
    pub account: Option<Arc<Account>>,
}

/// `USER@ADDRESS:PORT`, or as much of it as is known.
impl Display for Who {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match (&self.account, self.peer) {
            (Some(account), Some(peer)) => write!(f, "{}@{peer}", account.name),
            (Some(account), None) => write!(f, "{}", account.name),
            (None, Some(peer)) => write!(f, "{peer}"),
            (None, None) => write!(f, "the server"),
        }
    }
}

/// The listeners of one server, and what it counts for them.
#[derive(Default)]
struct Listeners {
    listeners: Vec<Arc<dyn Events>>,
    last_sequence: AtomicU64,
    last_connection: AtomicU64,
}

/// Tells the listeners what happens in the server or on one connection. A cheap clone. Not for
/// applications, which listen.
#[doc(hidden)]
#[derive(Clone)]
pub struct Teller {
    listeners: Arc<Listeners>,
    who: Who,
}

/// Nobody listens.
impl Default for Teller {
    fn default() -> Teller {
        Teller::new(Vec::new())
    }
}

impl Teller {
    /// Of a server with these listeners.
    pub fn new(listeners: Vec<Arc<dyn Events>>) -> Teller {
        Teller {
            listeners: Arc::new(Listeners {
                listeners,
                ..Listeners::default()
            }),
            who: Who {
                connection: 0,
                sequence: 0,
                peer: None,
                account: None,
            },
        }
    }

    /// Of a new connection of the same server.
    pub fn connection(&self, peer: SocketAddr) -> Teller {
        let last = &self.listeners.last_connection;
        let mut teller = self.clone();
        teller.who.connection = last.fetch_add(1, Ordering::Relaxed) + 1;
        teller.who.peer = Some(peer);
        teller
    }

    /// Of the same connection, once it has logged in.
    pub fn logged_in(&self, account: Arc<Account>) -> Teller {
        let mut teller = self.clone();
        teller.who.account = Some(account);
        teller
    }

    /// Whom the events are about; without a sequence number.
    pub fn who(&self) -> &Who {
        &self.who
    }

    /// Tells every listener, one after the other.
    pub fn tell(&self, event: Event) {
        let Listeners {
            listeners,
            last_sequence,
            ..
        } = self.listeners.as_ref();
        if listeners.is_empty() {
            return;
        }
        let mut who = self.who.clone();
        who.sequence = last_sequence.fetch_add(1, Ordering::Relaxed) + 1;
        for listener in listeners {
            let told = catch_unwind(AssertUnwindSafe(|| listener.event(&who, &event)));
            if told.is_err() {
                log::error!("{who}: a listener panicked over the event: {event}");
            }
        }
    }
}

/// The start of a text that a client sent, at most as long as a key: it may send one of 256 KiB.
pub(crate) fn shorten(text: &str) -> String {
    text.chars().take(MAX_KEY).collect()
}
