//! The stream of a connection: the header that a load balancer sends, and the socket below russh.
//!
//! The socket does seven things that russh's session loop can't do for itself.
//!
//! It can be closed from outside, whatever the loop is waiting for. It reads the end of one packet
//! and the beginning of the next with one system call, where russh asks for each in turn. It does not
//! keep the loop waiting in a write while the client sends: the loop does one at a time, so a
//! server and a client that does the same (it sends requests, and reads the answers only then)
//! would otherwise wait for each other forever, each with full buffers. The socket takes such a
//! write over, up to a bound, and the loop goes on reading. How much the client may send does not
//! matter then, because sessions add nothing to what was taken over
//! (see [`Signals::wait_until_sent`]).
//!
//! It exchanges the identification strings before russh does, so that the algorithms in our KEXINIT
//! can depend on the client's. It can hold our NEWKEYS back until russh sends EXT_INFO, which russh
//! does only after the client's NEWKEYS: OpenSSH's server sends both together, and libssh looks for
//! EXT_INFO only once, when NEWKEYS arrives. It notices when russh leaves a message of the client
//! unanswered. And it measures how long russh waits for the client.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use proxy_header::{Error, ParseConfig, ProxyHeader};
use std::any::Any;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::io::poll_read_buf;
use tokio_util::sync::WaitForCancellationFutureOwned;

/// Limit on bytes that are read while a write is stuck. A client that has sent more is taken for
/// one that reads only once it has sent everything.
const MAX_AHEAD: usize = 256 * 1024;
const AHEAD_STEP: usize = 64 * 1024;
/// Bytes beyond those that russh asks for that are read with them: the length of the next packet,
/// or a few small packets.
const SPARE: usize = 4096;
/// Once this many bytes of stuck writes were taken over, russh has to wait: more than it writes at
/// once, and than what sessions have handed to it by then.
const MAX_OUTGOING: usize = 4 * 1024 * 1024;

/// The first reads, those of a login, are acknowledged at once. OpenSSH's client, with Nagle's
/// algorithm still on, holds its next message back until the last one is acknowledged, which the
/// kernel would delay by 40 ms.
const QUICK_READS: u32 = 32;

/// Length of an identification string, with its line end, in bytes
/// ([RFC 4253 §4.2](https://www.rfc-editor.org/rfc/rfc4253#section-4.2)).
const MAX_IDENTIFICATION: usize = 255;

/// The message number of NEWKEYS ([RFC 4253
/// §12](https://www.rfc-editor.org/rfc/rfc4253#section-12)).
const NEWKEYS: u8 = 21;
/// Length of the shortest packet, such as NEWKEYS, in bytes
/// ([RFC 4253 §6](https://www.rfc-editor.org/rfc/rfc4253#section-6)).
const MIN_PACKET: usize = 16;
/// How long NEWKEYS is held back from a client that sends nothing: longer than a round trip.
const MAX_HOLD: Duration = Duration::from_secs(2);

/// Limit on the length of a PROXY header, in bytes. It may hold more than the addresses (TLVs),
/// which is ignored.
const MAX_PROXY_HEADER: usize = 4096;

/// Reads a header of the PROXY protocol, version 1 or 2
/// ([haproxy's specification](https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt)), and
/// nothing after it. Returns the address of the client; `None` if the load balancer speaks for
/// itself, as in a health check.
///
/// Any client could send such a header: the caller reads it only from addresses that the operator
/// named.
pub async fn read_proxy_header(stream: &mut Box<dyn Stream>) -> io::Result<Option<SocketAddr>> {
    let mut bytes = Vec::new();
    loop {
        match ProxyHeader::parse(&bytes, ParseConfig::default()) {
            Ok((header, _)) => return Ok(header.proxied_address().map(|address| address.source)),
            // Byte by byte, as what follows is for russh.
            Err(Error::BufferTooShort) if bytes.len() < MAX_PROXY_HEADER => {
                bytes.push(stream.read_u8().await?);
            }
            Err(_) => {
                let text = "the connection does not begin with one";
                return Err(io::Error::new(ErrorKind::InvalidData, text));
            }
        }
    }
}

/// What a connection reads and writes.
pub trait Stream: Any + AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: Any + AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

impl dyn Stream {
    fn as_tcp(&self) -> Option<&TcpStream> {
        let any: &dyn Any = self;
        any.downcast_ref()
    }

    /// Sends small packets at once.
    fn set_nodelay(&self) {
        if let Some(stream) = self.as_tcp() {
            let _ = stream.set_nodelay(true);
        }
    }

    /// Acknowledges at once what arrives, until the kernel changes its mind.
    fn set_quickack(&self) {
        if let Some(stream) = self.as_tcp() {
            let _ = stream.set_quickack(true);
        }
    }

    /// Writes as much as there is room for now. A new stream has room for a line.
    pub fn try_write(&mut self, bytes: &[u8]) {
        let mut context = Context::from_waker(Waker::noop());
        let mut stream = Pin::new(self);
        let _ = stream.as_mut().poll_write(&mut context, bytes);
        let _ = stream.poll_flush(&mut context);
    }

    /// Reads into the first buffer, and of a TCP connection what else there is into the second one.
    /// Returns how many bytes it has read.
    fn poll_read_two(
        &mut self,
        context: &mut Context<'_>,
        first: &mut [u8],
        second: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let Some(tcp) = self.as_tcp() else {
            let mut buffer = ReadBuf::new(first);
            ready!(Pin::new(self).poll_read(context, &mut buffer))?;
            return Poll::Ready(Ok(buffer.filled().len()));
        };
        loop {
            ready!(tcp.poll_read_ready(context))?;
            let mut slices = [IoSliceMut::new(first), IoSliceMut::new(second)];
            match tcp.try_read_vectored(&mut slices) {
                // Not ready after all: `poll_read_ready` then waits.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read),
            }
        }
    }
}

/// What the socket tells the connection.
#[derive(Default)]
pub struct Signals {
    /// See [`Signals::watch_for_silence`].
    is_silence_awaited: AtomicBool,
    silence: Notify,
    /// Nanoseconds that russh has waited for bytes of the client.
    waited: AtomicU64,
    /// Are there stuck writes that the socket has taken over?
    has_outgoing: watch::Sender<bool>,
}

impl Signals {
    /// Begins to wait for a message that russh reads and does not answer. A message that arrives in
    /// pieces would be taken for such a one, but those of a login are short.
    pub fn watch_for_silence(&self) {
        self.is_silence_awaited.store(true, Ordering::Relaxed);
    }

    /// Resolves when such a message was read.
    pub async fn silent(&self) {
        self.silence.notified().await;
    }

    /// How long russh has waited for bytes of the client, all in all.
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited.load(Ordering::Relaxed))
    }

    /// Resolves once everything that the socket has taken over was sent. Sessions call this before
    /// they send anything, so that memory for it is needed only for what was on its way.
    pub async fn wait_until_sent(&self) {
        // The sender is here, so this can't fail.
        let mut has_outgoing = self.has_outgoing.subscribe();
        let _ = has_outgoing.wait_for(|has_outgoing| !has_outgoing).await;
    }

    fn add_wait(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.waited.fetch_add(nanos, Ordering::Relaxed);
    }
}

/// See the module.
pub struct Socket {
    stream: Box<dyn Stream>,
    /// How many of [`QUICK_READS`] are left.
    quick_reads: u32,
    /// Once it resolves, everything fails.
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Read from the stream, but not by russh yet.
    ahead: BytesMut,
    /// Bytes of our identification string, which was sent already, that russh has still to write
    /// again.
    repeated: usize,
    newkeys: NewKeys,
    signals: Arc<Signals>,
    /// russh has read something and not written since, while [`Signals::silent`] is awaited.
    is_asked: bool,
    /// Since when russh waits for bytes of the client.
    waits_since: Option<Instant>,
    /// Written by russh, but not to the stream yet: cleartext up to the end of the hold of NEWKEYS,
    /// and stuck writes of which russh knows nothing.
    outgoing: BytesMut,
}

/// Our first NEWKEYS message.
enum NewKeys {
    /// Is sent like everything else, or was sent.
    Sent,
    /// Is going to be held back. Until then everything that russh writes is cleartext.
    Expected,
    /// Is held back until russh writes something else.
    Held {
        packet: BytesMut,
        /// Bytes that russh has read since.
        read_since: usize,
        /// See [`MAX_HOLD`].
        end: Pin<Box<Sleep>>,
    },
}

impl Socket {
    pub fn new(
        stream: Box<dyn Stream>,
        closed: WaitForCancellationFutureOwned,
        signals: Arc<Signals>,
    ) -> Socket {
        stream.set_nodelay();
        Socket {
            stream,
            quick_reads: QUICK_READS,
            closed: Box::pin(closed),
            ahead: BytesMut::new(),
            repeated: 0,
            newkeys: NewKeys::Sent,
            signals,
            is_asked: false,
            waits_since: None,
            outgoing: BytesMut::new(),
        }
    }

    /// Sends our identification string and returns the client's, or as much of it as its limit
    /// allows. Called before russh gets the socket: russh then reads the client's again, and what
    /// it writes of ours is dropped.
    pub async fn exchange_identification(&mut self, ours: &str) -> io::Result<Bytes> {
        let line = format!("{ours}\r\n");
        self.write_all(line.as_bytes()).await?;
        let mut read = BytesMut::new();
        while !read.contains(&b'\n') && read.len() < MAX_IDENTIFICATION {
            let room = MAX_IDENTIFICATION - read.len();
            if self.read_buf(&mut (&mut read).limit(room)).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        let line_end = read
            .iter()
            .position(|byte| *byte == b'\n')
            .unwrap_or(read.len());
        let theirs = Bytes::copy_from_slice(read.get(..line_end).unwrap_or_default());
        read.extend_from_slice(&self.ahead);
        self.ahead = read;
        self.repeated = line.len();
        Ok(theirs)
    }

    /// Holds our NEWKEYS back until russh writes EXT_INFO or turns out not to, at most for
    /// [`MAX_HOLD`].
    pub fn hold_newkeys(&mut self) {
        self.newkeys = NewKeys::Expected;
    }

    fn check_open(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if self.closed.as_mut().poll(context).is_ready() {
            Err(ErrorKind::ConnectionAborted.into())
        } else {
            Ok(())
        }
    }

    /// Reads what has arrived, so that the client can go on.
    fn read_ahead(&mut self, context: &mut Context<'_>) {
        while self.ahead.len() < MAX_AHEAD {
            self.ahead.reserve(AHEAD_STEP);
            let mut room = (&mut self.ahead).limit(AHEAD_STEP);
            match poll_read_buf(Pin::new(&mut self.stream), context, &mut room) {
                Poll::Ready(Ok(1..)) => {}
                // The next read by russh meets the error or the end again.
                Poll::Ready(_) | Poll::Pending => return,
            }
        }
    }

    /// Called when russh waits for the client: it will not answer what it has read before.
    fn notice_unanswered(&mut self) {
        if self.is_asked {
            self.is_asked = false;
            self.signals
                .is_silence_awaited
                .store(false, Ordering::Relaxed);
            self.signals.silence.notify_one();
        }
    }

    /// Reads what was read ahead, or else from the stream.
    fn poll_read_any(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            return self.poll_read_stream(context, buffer);
        }
        let count = self.ahead.len().min(buffer.remaining());
        buffer.put_slice(&self.ahead.split_to(count));
        if self.ahead.is_empty() {
            self.ahead = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }

    /// Reads from the stream into the buffer, and up to [`SPARE`] bytes more ahead.
    fn poll_read_stream(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let wanted = buffer.initialize_unfilled();
        let wanted_len = wanted.len();
        let mut spare = [0; SPARE];
        let read = self.stream.poll_read_two(context, wanted, &mut spare);
        if read.is_pending() {
            self.waits_since.get_or_insert_with(Instant::now);
        }
        let count = ready!(read)?;
        let spare_count = count.saturating_sub(wanted_len);
        buffer.advance(count - spare_count);
        let more = spare.get(..spare_count).unwrap_or_default();
        self.ahead.extend_from_slice(more);
        self.note_read();
        Poll::Ready(Ok(()))
    }

    /// Called when bytes have come from the stream.
    fn note_read(&mut self) {
        if let Some(since) = self.waits_since.take() {
            self.signals.add_wait(since.elapsed());
        }
        if self.quick_reads > 0 {
            self.quick_reads -= 1;
            // Set each time, as the kernel resets it.
            self.stream.set_quickack();
        }
    }

    /// Writes to the stream, after what must be sent before. If that is stuck while the client goes
    /// on sending, takes the bytes over.
    fn poll_write_now(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.poll_write_outgoing(context)?.is_ready()
            && let Poll::Ready(written) = Pin::new(&mut self.stream).poll_write(context, bytes)
        {
            return Poll::Ready(written);
        }
        self.read_ahead(context);
        if self.ahead.len() < MAX_AHEAD || self.outgoing.len() >= MAX_OUTGOING {
            return Poll::Pending;
        }
        self.outgoing.extend_from_slice(bytes);
        self.signals.has_outgoing.send_replace(true);
        Poll::Ready(Ok(bytes.len()))
    }

    /// Writes what must be sent before anything else.
    fn poll_write_outgoing(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.outgoing.is_empty() {
            return Poll::Ready(Ok(()));
        }
        while !self.outgoing.is_empty() {
            let written = Pin::new(&mut self.stream).poll_write(context, &self.outgoing);
            match ready!(written)? {
                0 => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
                count => self.outgoing.advance(count),
            }
        }
        self.outgoing = BytesMut::new();
        self.signals.has_outgoing.send_replace(false);
        Poll::Ready(Ok(()))
    }

    /// Queues whole cleartext packets to be sent, up to NEWKEYS.
    fn take_cleartext(&mut self, bytes: &[u8]) {
        let (before, packet) = split_at_newkeys(bytes);
        self.outgoing.extend_from_slice(before);
        if !packet.is_empty() {
            let end = Box::pin(sleep(MAX_HOLD));
            self.newkeys = NewKeys::Held {
                packet: packet.into(),
                read_since: 0,
                end,
            };
        }
    }

    /// Called when russh waits for the client: sends NEWKEYS if it need not or must not wait
    /// longer.
    fn end_hold(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if let NewKeys::Held {
            packet,
            read_since,
            end,
        } = &mut self.newkeys
        {
            // russh has read the client's NEWKEYS and has written nothing: there is no EXT_INFO.
            let is_alone = *read_since >= MIN_PACKET;
            if is_alone || end.as_mut().poll(context).is_ready() {
                self.outgoing.unsplit(packet.split());
                self.newkeys = NewKeys::Sent;
            }
        }
        // What can't be sent now wakes the reader when it can.
        match self.poll_write_outgoing(context) {
            Poll::Ready(written) => written,
            Poll::Pending => Ok(()),
        }
    }
}

/// Splits whole cleartext packets
/// ([RFC 4253 §6](https://www.rfc-editor.org/rfc/rfc4253#section-6)) before NEWKEYS.
fn split_at_newkeys(packets: &[u8]) -> (&[u8], &[u8]) {
    let mut start = 0;
    while let Some([a, b, c, d, _padding_length, message, ..]) = packets.get(start..) {
        if *message == NEWKEYS {
            return packets.split_at(start);
        }
        start += 4 + u32::from_be_bytes([*a, *b, *c, *d]) as usize;
    }
    (packets, &[])
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_open(context)?;
        self.end_hold(context)?;
        let before = buffer.filled().len();
        let read = self.poll_read_any(context, buffer);
        let count = buffer.filled().len() - before;
        if let NewKeys::Held { read_since, .. } = &mut self.newkeys {
            *read_since += count;
        }
        if read.is_pending() {
            self.notice_unanswered();
        } else if count > 0 && self.signals.is_silence_awaited.load(Ordering::Relaxed) {
            self.is_asked = true;
        }
        read
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check_open(context)?;
        self.is_asked = false;
        if self.repeated > 0 {
            let count = self.repeated.min(bytes.len());
            self.repeated -= count;
            return Poll::Ready(Ok(count));
        }
        match &mut self.newkeys {
            NewKeys::Sent => self.poll_write_now(context, bytes),
            NewKeys::Expected => {
                self.take_cleartext(bytes);
                Poll::Ready(Ok(bytes.len()))
            }
            NewKeys::Held { packet, .. } => {
                packet.extend_from_slice(bytes);
                let packet = packet.split();
                self.outgoing.unsplit(packet);
                self.newkeys = NewKeys::Sent;
                Poll::Ready(Ok(bytes.len()))
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_open(context)?;
        // What is stuck leaves while russh reads: it must not wait for that here.
        let _ = self.poll_write_outgoing(context)?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_open(context)?;
        ready!(self.poll_write_outgoing(context))?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;
    use tokio_util::sync::CancellationToken;

    const KEX_REPLY: &[u8] = &[0, 0, 0, 12, 10, 31, 21, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    const NEWKEYS_PACKET: &[u8] = &[0, 0, 0, 12, 10, 21, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

    /// A socket and its client.
    async fn connected(signals: Arc<Signals>) -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        (
            Socket::new(
                Box::new(stream),
                CancellationToken::new().cancelled_owned(),
                signals,
            ),
            client,
        )
    }

    #[tokio::test]
    async fn a_socket_that_is_closed_waits_for_no_client() {
        let (_client, stream) = tokio::io::duplex(16);
        let closed = CancellationToken::new();
        let waiting = closed.clone().cancelled_owned();
        let mut socket = Socket::new(Box::new(stream), waiting, Arc::default());
        // Taken over, and more than the client has room for.
        socket.hold_newkeys();
        socket.write_all(&[0; 100]).await.unwrap();
        let end = tokio::spawn(async move { socket.shutdown().await });
        tokio::task::yield_now().await;
        assert!(!end.is_finished());
        closed.cancel();
        assert!(end.await.unwrap().is_err());
    }

    /// A socket that holds NEWKEYS back, and its client.
    async fn holding() -> (Socket, TcpStream) {
        let (mut socket, client) = connected(Arc::default()).await;
        socket.hold_newkeys();
        socket
            .write_all(&[KEX_REPLY, NEWKEYS_PACKET].concat())
            .await
            .unwrap();
        socket.flush().await.unwrap();
        (socket, client)
    }

    /// What the client has been sent by now.
    async fn received(client: &mut TcpStream) -> Vec<u8> {
        let mut bytes = vec![0; 1000];
        let count = client.read(&mut bytes).await.unwrap();
        bytes.truncate(count);
        bytes
    }

    #[tokio::test]
    async fn newkeys_arrive_with_what_is_written_next() {
        let (mut socket, mut client) = holding().await;
        assert_eq!(received(&mut client).await, KEX_REPLY);
        socket.write_all(b"EXT_INFO").await.unwrap();
        socket.flush().await.unwrap();
        assert_eq!(
            received(&mut client).await,
            [NEWKEYS_PACKET, b"EXT_INFO"].concat()
        );
        socket.write_all(NEWKEYS_PACKET).await.unwrap();
        assert_eq!(
            received(&mut client).await,
            NEWKEYS_PACKET,
            "held back once"
        );
    }

    #[tokio::test]
    async fn newkeys_are_sent_once_the_client_shows_that_nothing_comes() {
        let (mut socket, mut client) = holding().await;
        assert_eq!(received(&mut client).await, KEX_REPLY);
        client.write_all(NEWKEYS_PACKET).await.unwrap();
        let mut read = [0; 16];
        socket.read_exact(&mut read).await.unwrap();
        let (sent, _) = tokio::join!(received(&mut client), async {
            tokio::select! { _ = socket.read(&mut read) => {}, () = sleep(MAX_HOLD / 4) => {} }
        });
        assert_eq!(sent, NEWKEYS_PACKET);
    }

    #[tokio::test]
    async fn newkeys_are_sent_to_a_client_that_waits_for_them() {
        let (mut socket, mut client) = holding().await;
        assert_eq!(received(&mut client).await, KEX_REPLY);
        let mut read = [0; 16];
        let (sent, count) = tokio::join!(
            async {
                let sent = received(&mut client).await;
                client.shutdown().await.unwrap();
                sent
            },
            socket.read(&mut read)
        );
        assert_eq!((&sent[..], count.unwrap()), (NEWKEYS_PACKET, 0));
    }

    #[tokio::test]
    async fn a_message_is_unanswered_once_more_is_wanted_without_an_answer() {
        let signals: Arc<Signals> = Arc::default();
        let (mut socket, mut client) = connected(signals.clone()).await;
        let mut message = [0; 4];
        for (is_watched, is_answered) in [(false, false), (true, true), (true, false)] {
            if is_watched {
                signals.watch_for_silence();
            }
            // What is written before the message is no answer to it.
            socket.write_all(b"refused").await.unwrap();
            client.write_all(b"next").await.unwrap();
            socket.read_exact(&mut message).await.unwrap();
            if is_answered {
                socket.write_all(b"accepted").await.unwrap();
            }
            let is_noticed = tokio::select! {
                biased;
                _ = socket.read(&mut message) => panic!("there is nothing more to read"),
                () = signals.silent() => true,
                () = std::future::ready(()) => false,
            };
            assert_eq!(is_noticed, is_watched && !is_answered);
        }
    }

    #[tokio::test]
    async fn bytes_are_read_in_their_order_whatever_is_asked_for() {
        let (mut socket, mut client) = connected(Arc::default()).await;
        let sent: Vec<u8> = (0..200_000_u32).flat_map(u32::to_be_bytes).collect();
        let sending = sent.clone();
        let client = tokio::spawn(async move {
            client.write_all(&sending).await.unwrap();
            client
        });
        let mut read = Vec::new();
        for size in [4, 3000, 16, 1, 70_000].into_iter().cycle() {
            let mut piece = vec![0; size.min(sent.len() - read.len())];
            socket.read_exact(&mut piece).await.unwrap();
            read.extend(piece);
            if read.len() == sent.len() {
                break;
            }
        }
        assert!(read == sent);
        drop(client.await.unwrap());
        assert_eq!(socket.read(&mut [0; 10]).await.unwrap(), 0);
    }

    /// More than all buffers on the way take, in both directions: a server that waits for its write
    /// would wait forever.
    #[tokio::test]
    async fn stuck_writes_are_taken_over_while_the_client_sends() {
        const ROUNDS: usize = 128;
        const READ: usize = 128 * 1024;
        const WRITTEN: usize = 48 * 1024;
        let signals: Arc<Signals> = Arc::default();
        let (mut socket, mut client) = connected(signals.clone()).await;
        let client = tokio::spawn(async move {
            client.write_all(&vec![1; ROUNDS * READ]).await.unwrap();
            let mut received = Vec::new();
            client.read_to_end(&mut received).await.unwrap();
            received
        });
        let mut sent = Vec::new();
        let mut were_taken_over = false;
        for round in 0..ROUNDS {
            let bytes = vec![round as u8; WRITTEN];
            socket.write_all(&bytes).await.unwrap();
            socket.flush().await.unwrap();
            socket.read_exact(&mut [0; READ]).await.unwrap();
            were_taken_over |= *signals.has_outgoing.borrow();
            sent.extend(bytes);
        }
        assert!(were_taken_over, "the buffers on the way took everything");
        socket.shutdown().await.unwrap();
        signals.wait_until_sent().await;
        assert!(client.await.unwrap() == sent);
    }

    #[test]
    fn packets_are_split_only_at_newkeys() {
        let packets = [KEX_REPLY, NEWKEYS_PACKET].concat();
        assert_eq!(split_at_newkeys(&packets), (KEX_REPLY, NEWKEYS_PACKET));
        assert_eq!(split_at_newkeys(NEWKEYS_PACKET), (&[][..], NEWKEYS_PACKET));
        for whole in [&[][..], KEX_REPLY, &[0; 3], &[0xFF; 100]] {
            assert_eq!(split_at_newkeys(whole), (whole, &[][..]));
        }
    }
}
