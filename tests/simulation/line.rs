//! The client's end of a session: requests are sent at once, and their answers come in any order.

use super::plan::IDLE_TIMEOUT;
use bytes::{Buf, Bytes, BytesMut};
use russh_sftp::protocol::{Init, Packet, StatusCode};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// A request without an answer for this long, in virtual time, gets none: no fault takes more than
/// seconds. It is less than the idle timeout, which would end the session and hide that.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(IDLE_TIMEOUT / 2);
/// What VERSION is kept under, which has no id.
const NO_ID: u32 = 0;

/// Why an action ends without OK.
pub enum Stop {
    Status(StatusCode, String),
    /// The connection has ended.
    Disconnected,
    Hung,
}

pub type Answer<T> = Result<T, Stop>;

/// See the module.
pub struct Line {
    state: Mutex<State>,
    /// Nothing is sent or received any more.
    over: CancellationToken,
}

struct State {
    /// `None` once the client has hung up.
    requests: Option<mpsc::UnboundedSender<Bytes>>,
    /// By request. In order, so that all that wait at the end always learn of it in the same one.
    waiting: BTreeMap<u32, oneshot::Sender<Packet>>,
    last_id: u32,
}

/// The answer to a request that was sent.
pub struct Pending(oneshot::Receiver<Packet>);

impl Line {
    pub fn new(requests: mpsc::UnboundedSender<Bytes>) -> Line {
        let state = State {
            requests: Some(requests),
            waiting: BTreeMap::new(),
            last_id: NO_ID,
        };
        Line {
            state: Mutex::new(state),
            over: CancellationToken::new(),
        }
    }

    /// Deals out the answers, until the server ends the session.
    pub async fn receive(self: Arc<Line>, mut replies: mpsc::UnboundedReceiver<Bytes>) {
        let mut received = BytesMut::new();
        while let Some(bytes) = replies.recv().await {
            received.extend_from_slice(&bytes);
            while let Some(packet) = take_packet(&mut received) {
                let id = id_of(&packet);
                // What a client does not wait for any more is lost.
                if let Some(waiting) = self.state().waiting.remove(&id) {
                    let _lost = waiting.send(packet);
                }
            }
        }
        self.fall_silent();
    }

    pub async fn init(&self, init: Init) -> Answer<Packet> {
        let pending = self.send_with_id(NO_ID, init.into())?;
        pending.answer().await
    }

    /// Sends a request.
    pub fn send(&self, request: impl FnOnce(u32) -> Packet) -> Answer<Pending> {
        let id = {
            let mut state = self.state();
            state.last_id += 1;
            state.last_id
        };
        self.send_with_id(id, request(id))
    }

    fn send_with_id(&self, id: u32, packet: Packet) -> Answer<Pending> {
        if self.over.is_cancelled() {
            return Err(Stop::Disconnected);
        }
        let bytes = Bytes::try_from(packet).expect("a packet that can be encoded");
        let (answer, pending) = oneshot::channel();
        let mut state = self.state();
        let Some(requests) = &state.requests else {
            return Err(Stop::Disconnected);
        };
        requests.send(bytes).map_err(|_| Stop::Disconnected)?;
        state.waiting.insert(id, answer);
        Ok(Pending(pending))
    }

    /// The server sees nothing of it.
    pub fn fall_silent(&self) {
        self.over.cancel();
        self.state().waiting.clear();
    }

    pub fn hang_up(&self) {
        self.fall_silent();
        self.state().requests = None;
    }

    /// Resolves when nothing is sent or received any more.
    pub async fn over(&self) {
        self.over.cancelled().await;
    }

    /// Waits for something, or for the end.
    pub async fn unless_over(self: Arc<Line>, something: impl Future<Output = ()>) -> Answer<()> {
        tokio::select! {
            biased;
            () = self.over() => Err(Stop::Disconnected),
            () = something => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while it is held")
    }
}

impl Pending {
    /// Waits for it; a status other than OK is an error.
    pub async fn answer(self) -> Answer<Packet> {
        match timeout(ANSWER_TIMEOUT, self.0).await {
            Ok(Ok(Packet::Status(status))) if status.status_code != StatusCode::Ok => {
                Err(Stop::Status(status.status_code, status.error_message))
            }
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_over)) => Err(Stop::Disconnected),
            Err(_elapsed) => Err(Stop::Hung),
        }
    }
}

fn id_of(reply: &Packet) -> u32 {
    match reply {
        Packet::Version(_) => NO_ID,
        Packet::Status(status) => status.id,
        Packet::Handle(handle) => handle.id,
        Packet::Data(data) => data.id,
        Packet::Name(name) => name.id,
        Packet::Attrs(attrs) => attrs.id,
        Packet::ExtendedReply(reply) => reply.id,
        other => panic!("no reply: {other:?}"),
    }
}

fn take_packet(received: &mut BytesMut) -> Option<Packet> {
    let length = received.get(..4)?.get_u32() as usize;
    if received.len() < 4 + length {
        return None;
    }
    received.advance(4);
    let mut packet = received.split_to(length).freeze();
    Some(Packet::try_from(&mut packet).expect("a reply that can be decoded"))
}

pub fn unexpected(answer: Answer<Packet>) -> Stop {
    match answer {
        Ok(packet) => panic!("an answer to another question: {packet:?}"),
        Err(stop) => stop,
    }
}
