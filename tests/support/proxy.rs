//! A connection that breaks, between a client and the server, after a number of bytes.

use super::client::Client;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::SetOnce;
use tokio::task::JoinHandle;

/// What happens to the connection once its bytes have passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Both sides see a reset.
    Reset,
    /// Nothing more passes; the server sees the end when the client is gone.
    Hold,
    /// Nothing more passes, in either direction, and neither side is told.
    Vanish,
    /// Nothing more passes to the client, as if it never read.
    Deaf,
}

/// Forwards one connection, until it is dropped.
pub struct Proxy {
    /// Where the client connects to.
    pub address: SocketAddr,
    wire: Arc<Wire>,
    task: JoinHandle<()>,
}

struct Wire {
    /// Bytes so far, in both directions together.
    passed: AtomicUsize,
    /// Bytes after which the connection breaks.
    limit: AtomicUsize,
    fate: Fate,
    broken: SetOnce<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A connection that the server has admitted, and the first bytes that it has sent. Tries until
/// there is one.
pub async fn connect_when_admitted(server: SocketAddr, hello: &[u8]) -> (TcpStream, [u8; 8]) {
    loop {
        let mut stream = TcpStream::connect(server).await.unwrap();
        let mut greeting = [0; 8];
        let _ = stream.write_all(hello).await;
        match stream.read_exact(&mut greeting).await {
            Ok(_) if greeting == *b"SSH-2.0-" => return (stream, greeting),
            _ => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

impl Proxy {
    pub async fn start(server: SocketAddr, limit: usize, fate: Fate) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let wire = Wire {
            passed: 0.into(),
            limit: limit.into(),
            fate,
            broken: SetOnce::new(),
        };
        let wire = Arc::new(wire);
        let shared = wire.clone();
        let task = tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut hello = vec![0; 256];
            let length = client.read(&mut hello).await.unwrap();
            let (server, greeting) = connect_when_admitted(server, &hello[..length]).await;
            client.write_all(&greeting).await.unwrap();
            shared.carry(client, server).await;
        });
        Proxy {
            address,
            wire,
            task,
        }
    }

    /// A client behind the proxy that is logged in as alice.
    pub async fn client(&self) -> Client {
        Client::connect(self.address).await
    }

    /// Bytes so far, in both directions together.
    pub fn passed(&self) -> usize {
        self.wire.passed.load(Ordering::Relaxed)
    }

    /// Breaks the connection at the next byte.
    pub fn break_now(&self) {
        self.wire.limit.store(0, Ordering::Relaxed);
    }

    /// Resolves once the connection is broken.
    pub async fn broken(&self) {
        self.wire.broken.wait().await;
    }
}

impl Wire {
    async fn carry(&self, mut client: TcpStream, mut server: TcpStream) {
        for side in [&client, &server] {
            side.set_nodelay(true).unwrap();
        }
        let (mut from_client, mut to_client) = client.split();
        let (mut from_server, mut to_server) = server.split();
        let down = self.copy(&mut from_server, &mut to_client, true);
        let up = self.copy(&mut from_client, &mut to_server, self.fate != Fate::Deaf);
        if self.fate == Fate::Deaf {
            tokio::join!(up, async {
                if down.await {
                    std::future::pending().await
                }
            });
            return;
        }
        if !tokio::select! { broken = up => broken, broken = down => broken } {
            return;
        }
        match self.fate {
            Fate::Reset => {
                client.set_zero_linger().unwrap();
                server.set_zero_linger().unwrap();
            }
            Fate::Hold => {
                while client
                    .read(&mut [0; 4096])
                    .await
                    .is_ok_and(|count| count > 0)
                {}
            }
            Fate::Vanish | Fate::Deaf => std::future::pending().await,
        }
    }

    /// True if the limit is reached, false at the end of the stream.
    async fn copy(
        &self,
        from: &mut (impl AsyncReadExt + Unpin),
        to: &mut (impl AsyncWriteExt + Unpin),
        limited: bool,
    ) -> bool {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let Ok(count @ 1..) = from.read(&mut buffer).await else {
                return false;
            };
            let limit = if limited {
                self.limit.load(Ordering::Relaxed)
            } else {
                usize::MAX
            };
            let before = self.passed.fetch_add(count, Ordering::Relaxed);
            if to
                .write_all(&buffer[..count.min(limit.saturating_sub(before))])
                .await
                .is_err()
            {
                return false;
            }
            if before + count >= limit {
                let _ = self.broken.set(());
                return true;
            }
        }
    }
}
