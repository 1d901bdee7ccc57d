//! Plays a plan on one thread with a paused clock: the same plan gives the same history.

use super::adaptor::Gateway;
use super::bucket::{Expectation, NewVersion};
use super::client::Client;
use super::history::{Cause, History, Journal, Leftovers};
use super::plan::Plan;
use super::remote::Remote;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// After the last client is gone, everything has this long to end.
const QUIET_TIME: Duration = Duration::from_secs(86_400);

/// What came of a plan.
pub struct Outcome {
    pub history: History,
    /// Requests to the store that were held up for long.
    pub delayed: usize,
}

/// Plays it.
pub fn run(plan: &Plan) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    runtime.expect("a runtime").block_on(play(plan))
}

async fn play(plan: &Plan) -> Outcome {
    let journal = Journal::begin();
    let remote = Remote::new(plan, journal.clone());
    set_up(plan, &remote);
    let has_markers = plan.gateways > 1;
    let gateways: Vec<Arc<Gateway>> = (0..plan.gateways)
        .map(|_| Arc::new(Gateway::start(remote.clone(), plan.memory, has_markers)))
        .collect();
    let sessions: Arc<Mutex<Vec<JoinHandle<()>>>> = Arc::default();
    let mut clients = Vec::new();
    for client in &plan.clients {
        let client = Client {
            plan: client.clone(),
            gateway: gateways[client.gateway].clone(),
            journal: journal.clone(),
            sessions: sessions.clone(),
        };
        clients.push(tokio::spawn(client.run()));
    }
    for client in clients {
        client.await.expect("a client does not panic");
    }
    sleep(QUIET_TIME).await;
    remote.settle().await;
    let sessions = std::mem::take(&mut *sessions.lock().expect("no panic while it is held"));
    let leftovers = Leftovers {
        uploads: remote.bucket().uploads(),
        memory: gateways.iter().map(|gateway| gateway.memory_used()).sum(),
        sessions: sessions
            .iter()
            .filter(|session| !session.is_finished())
            .count(),
        transfers: gateways.iter().map(|gateway| gateway.transfers()).sum(),
    };
    Outcome {
        history: History {
            events: journal.take(),
            leftovers,
        },
        delayed: remote.delayed(),
    }
}

fn set_up(plan: &Plan, remote: &Remote) {
    for (key, content) in &plan.setup {
        let version = NewVersion::of(content.clone().into());
        let put = remote
            .bucket()
            .put(key, version, &Expectation::Anything, Cause::Setup);
        put.expect("nothing stands in the way");
    }
}
