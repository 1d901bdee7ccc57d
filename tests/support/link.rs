//! A long or a narrow way between clients and a server. Long: every byte arrives after the same
//! time, and up to 64 MiB are under way in each direction of a connection. Narrow: what clients send
//! has a rate that all connections share.

use bytes::{Bytes, BytesMut};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// Bytes under way in one direction before the sender has to wait.
const UNDER_WAY: usize = 64 * 1024 * 1024;
/// Longest read in bytes.
const CHUNK: usize = 256 * 1024;
/// The same on a narrow way, so that its connections take turns.
const NARROW_CHUNK: usize = 4 * 1024;
/// Bytes under way on a connection of a narrow way, and the size of its socket's buffer.
const NARROW_UNDER_WAY: usize = 32 * 1024;

/// Forwards connections until it is dropped.
pub struct Link {
    /// Where clients connect to.
    pub address: SocketAddr,
    /// Are the server's bytes left unread?
    is_deaf: watch::Sender<bool>,
    /// Bytes of clients that the server's sockets have taken.
    delivered: Arc<AtomicUsize>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

/// What clients may send on all connections together.
#[derive(Clone)]
struct Pace {
    bytes_per_second: u32,
    /// When everything that was let through has passed.
    free_at: Arc<Mutex<Instant>>,
}

impl Pace {
    async fn let_through(&self, bytes: usize) {
        let takes = Duration::from_secs(1) * bytes as u32 / self.bytes_per_second;
        let passed = {
            let mut free_at = self.free_at.lock().unwrap();
            *free_at = Instant::now().max(*free_at) + takes;
            *free_at
        };
        sleep_until(passed).await;
    }
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
        Link::run(listener, server, delay, None)
    }

    /// Starts a link over which clients send this much altogether.
    pub fn narrow(server: SocketAddr, bytes_per_second: u32) -> Link {
        let socket = TcpSocket::new_v4().unwrap();
        socket
            .set_recv_buffer_size(NARROW_UNDER_WAY as u32)
            .unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1024).unwrap().into_std().unwrap();
        let pace = Pace {
            bytes_per_second,
            free_at: Arc::new(Mutex::new(Instant::now())),
        };
        Link::run(listener, server, Duration::ZERO, Some(pace))
    }

    fn run(
        listener: std::net::TcpListener,
        server: SocketAddr,
        delay: Duration,
        pace: Option<Pace>,
    ) -> Link {
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let is_deaf = watch::Sender::new(false);
        let stop = CancellationToken::new();
        // Of its own, so that tests without a runtime have it too, and busy ones don't delay it.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let delivered = Arc::new(AtomicUsize::new(0));
        let hears = is_deaf.subscribe();
        let forwarding = forward(listener, server, delay, pace, hears, delivered.clone());
        let stopping = stop.clone();
        let thread = std::thread::spawn(move || {
            runtime.block_on(stopping.run_until_cancelled(forwarding));
        });
        Link {
            address,
            is_deaf,
            delivered,
            stop,
            thread: Some(thread),
        }
    }

    /// Bytes of clients that the server's sockets have taken so far.
    pub fn delivered(&self) -> usize {
        self.delivered.load(Ordering::Relaxed)
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
    pace: Option<Pace>,
    is_deaf: watch::Receiver<bool>,
    delivered: Arc<AtomicUsize>,
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
        start_direction(
            from_client,
            to_server,
            delay,
            pace.clone(),
            hears.subscribe(),
            delivered.clone(),
        );
        start_direction(
            from_server,
            to_client,
            delay,
            None,
            is_deaf.clone(),
            Arc::default(),
        );
    }
}

fn start_direction(
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    delay: Duration,
    pace: Option<Pace>,
    is_deaf: watch::Receiver<bool>,
    delivered: Arc<AtomicUsize>,
) {
    let (queue, under_way) = mpsc::unbounded_channel();
    tokio::spawn(take(from, queue, delay, pace.is_some(), is_deaf));
    tokio::spawn(deliver(under_way, pace, to, delivered));
}

/// Reads until the end.
async fn take(
    mut from: OwnedReadHalf,
    queue: mpsc::UnboundedSender<Chunk>,
    delay: Duration,
    is_narrow: bool,
    mut is_deaf: watch::Receiver<bool>,
) {
    let (chunk, under_way) = match is_narrow {
        true => (NARROW_CHUNK, NARROW_UNDER_WAY),
        false => (CHUNK, UNDER_WAY),
    };
    let places = Arc::new(Semaphore::new(under_way));
    let mut buffer = BytesMut::new();
    loop {
        let _ = is_deaf.wait_for(|is_deaf| !is_deaf).await;
        buffer.reserve(chunk);
        let Ok(count @ 1..) = (&mut from).take(chunk as u64).read_buf(&mut buffer).await else {
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
async fn deliver(
    mut under_way: mpsc::UnboundedReceiver<Chunk>,
    pace: Option<Pace>,
    mut to: OwnedWriteHalf,
    delivered: Arc<AtomicUsize>,
) {
    while let Some(chunk) = under_way.recv().await {
        sleep_until(chunk.due).await;
        if let Some(pace) = &pace {
            pace.let_through(chunk.bytes.len()).await;
        }
        if to.write_all(&chunk.bytes).await.is_err() {
            return;
        }
        delivered.fetch_add(chunk.bytes.len(), Ordering::Relaxed);
    }
}
