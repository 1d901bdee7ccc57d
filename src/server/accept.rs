//! Accepts connections, and admits or refuses them.
//!
//! Called by [`Server`](super::Server). Every connection holds one of the server's places, from
//! before its PROXY header is read until it has ended.

use super::transport::{Stream, read_proxy_header};
use super::{Shared, connection};
use crate::events::{ConnectionRefusal, Event, Teller};
use ipnet::IpNet;
use rustix::io::Errno;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Pause after `accept` fails, for example when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Shortest time between two log lines about failed accepts: without descriptors five a second
/// fail.
const FAILED_ACCEPTS_INTERVAL: Duration = Duration::from_secs(60);
/// A line before the version string is for people to read
/// ([RFC 4253 §4.2](https://www.rfc-editor.org/rfc/rfc4253#section-4.2)).
const GOODBYE: &[u8] = b"This server takes no connection from you now: try again later.\r\n";
/// For the PROXY header to arrive. A load balancer sends it at once.
const PROXY_TIME: Duration = Duration::from_secs(5);

/// Accepts connections until the server drains.
pub(super) async fn accept_all(listener: TcpListener, shared: &Arc<Shared>) {
    let mut failed = FailedAccepts::default();
    loop {
        let accepted = tokio::select! {
            biased;
            () = shared.drain.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let stream: Box<dyn Stream> = Box::new(stream);
                let serving = admit(stream, peer, shared.clone(), CancellationToken::new());
                shared.connections.spawn(serving);
            }
            Err(error) => {
                failed.note(&error, &shared.events);
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Failed accepts, and which of them the log knows of. The connection stays in the kernel's queue
/// for the next try.
#[derive(Default)]
struct FailedAccepts {
    /// When the last line about them was written.
    logged: Option<Instant>,
    /// How many failed since then.
    unlogged: u64,
}

impl FailedAccepts {
    /// Tells of a failed accept. Logs it unless the last line is less than a minute old.
    fn note(&mut self, error: &io::Error, events: &Teller) {
        let advice = match Errno::from_io_error(error) {
            Some(Errno::MFILE | Errno::NFILE) => {
                events.tell(Event::ConnectionRefused {
                    reason: ConnectionRefusal::Descriptors,
                    error: None,
                });
                "; raise the limit on file descriptors (LimitNOFILE=) or lower --max-sessions"
            }
            _ => "",
        };
        if self
            .logged
            .is_some_and(|logged| logged.elapsed() < FAILED_ACCEPTS_INTERVAL)
        {
            self.unlogged += 1;
            return;
        }
        let unlogged = self.unlogged;
        log::error!(
            "can't accept a connection: {error} ({unlogged} more since the last such line){advice}"
        );
        *self = FailedAccepts {
            logged: Some(Instant::now()),
            unlogged: 0,
        };
    }
}

/// Serves a connection if the limits allow, until it ends or is `closed`. Behind a load balancer
/// the PROXY header names the client.
pub(super) async fn admit(
    mut stream: Box<dyn Stream>,
    peer: SocketAddr,
    shared: Arc<Shared>,
    closed: CancellationToken,
) {
    let peer = show_ipv4(peer);
    let Some(_place) = take_place(&shared) else {
        let events = shared.events.connection(peer);
        return refuse(stream.as_mut(), &events, ConnectionRefusal::Full);
    };
    let client = match find_client(&mut stream, peer, &shared.settings.proxies).await {
        Ok(client) => client,
        // A health check that only connects.
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return,
        Err(error) => {
            let events = shared.events.connection(peer);
            return events.tell(Event::ConnectionRefused {
                reason: ConnectionRefusal::ProxyHeader,
                error: Some(error.to_string()),
            });
        }
    };
    let events = shared.events.connection(client);
    match shared.admission.admit(client, closed.child_token()) {
        Ok(slot) => connection::serve(stream, client, events, shared, slot, closed).await,
        Err(reason) => refuse(stream.as_mut(), &events, reason),
    }
}

/// A place among all connections; `None` if all are taken.
fn take_place(shared: &Shared) -> Option<OwnedSemaphorePermit> {
    shared.places.clone().try_acquire_owned().ok()
}

/// A socket for all addresses, here or at the load balancer, shows an IPv4 client as
/// `::ffff:192.0.2.7`. Log and limits use `192.0.2.7`.
fn show_ipv4(peer: SocketAddr) -> SocketAddr {
    match peer.ip().to_canonical() {
        IpAddr::V4(address) => SocketAddr::from((address, peer.port())),
        // Unchanged, with the interface that it came by.
        IpAddr::V6(_) => peer,
    }
}

/// The client's address: the one in the PROXY header if the connection is a load balancer's.
async fn find_client(
    stream: &mut Box<dyn Stream>,
    peer: SocketAddr,
    proxies: &[IpNet],
) -> io::Result<SocketAddr> {
    let address = peer.ip().to_canonical();
    if !proxies.iter().any(|network| network.contains(&address)) {
        return Ok(peer);
    }
    match timeout(PROXY_TIME, read_proxy_header(stream)).await?? {
        Some(client) => Ok(show_ipv4(client)),
        None => Ok(peer),
    }
}

/// Tells the client to try again later.
fn refuse(stream: &mut dyn Stream, events: &Teller, reason: ConnectionRefusal) {
    events.tell(Event::ConnectionRefused {
        reason,
        error: None,
    });
    stream.try_write(GOODBYE);
}
