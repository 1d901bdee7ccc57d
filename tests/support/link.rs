//! A long way between clients and a server: every byte arrives after the same time, and up to 64
//! MiB are under way in each direction of a connection.

use bytes::{Bytes, BytesMut};
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// Bytes under way in one direction before the sender has to wait.
const UNDER_WAY: usize = 64 * 1024 * 1024;
/// Longest read in bytes.
const CHUNK: usize = 256 * 1024;

/// Forwards connections until it is dropped.
pub struct Link {
    /// Where clients connect to.
    pub address: SocketAddr,
    /// Are the server's bytes left unread?
    is_deaf: watch::Sender<bool>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

/// Bytes under way.
struct Chunk {
    bytes: Bytes,
    due: Instant,
    _place: OwnedSemaphorePermit,
}

impl Link {
    /// Starts a link whose bytes take the time `delay` in each direction.
    pub fn start(server: SocketAddr, delay: Duration) -> Link {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let is_deaf = watch::Sender::new(false);
        let stop = CancellationToken::new();
        // Of its own, so that tests without a runtime have it too, and busy ones don't delay it.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let forwarding = forward(listener, server, delay, is_deaf.subscribe());
        let stopping = stop.clone();
        let thread = std::thread::spawn(move || {
            runtime.block_on(stopping.run_until_cancelled(forwarding));
        });
        Link {
            address,
            is_deaf,
            stop,
            thread: Some(thread),
        }
    }

    /// From now on no client reads what the server sends, or all do again.
    pub fn set_deaf(&self, is_deaf: bool) {
        self.is_deaf.send_replace(is_deaf);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

async fn forward(
    listener: std::net::TcpListener,
    server: SocketAddr,
    delay: Duration,
    is_deaf: watch::Receiver<bool>,
) {
    let listener = TcpListener::from_std(listener).unwrap();
    // Never written to: what clients send is always read.
    let hears = watch::Sender::new(false);
    loop {
        let (client, _) = listener.accept().await.unwrap();
        let Ok(server) = TcpStream::connect(server).await else {
            continue;
        };
        for side in [&client, &server] {
            side.set_nodelay(true).unwrap();
        }
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        start_direction(from_client, to_server, delay, hears.subscribe());
        start_direction(from_server, to_client, delay, is_deaf.clone());
    }
}

fn start_direction(
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    delay: Duration,
    is_deaf: watch::Receiver<bool>,
) {
    let (queue, under_way) = mpsc::unbounded_channel();
    tokio::spawn(take(from, queue, delay, is_deaf));
    tokio::spawn(deliver(under_way, to));
}

/// Reads until the end.
async fn take(
    mut from: OwnedReadHalf,
    queue: mpsc::UnboundedSender<Chunk>,
    delay: Duration,
    mut is_deaf: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(UNDER_WAY));
    let mut buffer = BytesMut::new();
    loop {
        let _ = is_deaf.wait_for(|is_deaf| !is_deaf).await;
        buffer.reserve(CHUNK);
        let Ok(count @ 1..) = from.read_buf(&mut buffer).await else {
            return;
        };
        let place = places.clone().acquire_many_owned(count as u32).await;
        let chunk = Chunk {
            bytes: buffer.split().freeze(),
            due: Instant::now() + delay,
            _place: place.unwrap(),
        };
        if queue.send(chunk).is_err() {
            return;
        }
    }
}

/// Writes until the end, each chunk when it is due.
async fn deliver(mut under_way: mpsc::UnboundedReceiver<Chunk>, mut to: OwnedWriteHalf) {
    while let Some(chunk) = under_way.recv().await {
        sleep_until(chunk.due).await;
        if to.write_all(&chunk.bytes).await.is_err() {
            return;
        }
    }
}
