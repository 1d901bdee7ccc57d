//! The TCP stream under russh, with five things that russh's session loop can't do for itself.
//!
//! It can be cut from outside, whatever the loop is waiting for. And while the loop is busy writing it still
//! reads, up to a bound: the loop does one at a time, so a client that does the same (it sends requests, and would read
//! the answers only then) and the server would otherwise wait for each other for ever, each with full buffers.
//!
//! It exchanges the identification strings before russh does, so that the algorithms in our KEXINIT can depend on the
//! client's. And it can hold our NEWKEYS back until russh sends EXT_INFO, which russh does only after the client's NEWKEYS:
//! OpenSSH's server sends both together, and libssh looks for EXT_INFO only once, when NEWKEYS arrives. And it notices when
//! russh leaves a message of the client unanswered.

use bytes::{BufMut, Bytes, BytesMut};
use std::io::{ErrorKind, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Sleep, sleep};
use tokio_util::sync::WaitForCancellationFutureOwned;

/// Read while a write was stuck, in bytes: the window that a client can fill, and a little more.
const AHEAD_LIMIT: usize = 2560 * 1024;
const AHEAD_STEP: usize = 64 * 1024;

/// Reads of which each is acknowledged at once: those of a login. OpenSSH's client, with Nagle's algorithm still on, holds
/// its next message back until the last one is acknowledged, which the kernel would delay by 40 ms.
const QUICK_READS: u32 = 32;

/// Length of an identification string, with its line end, in bytes
/// ([RFC 4253 §4.2](https://www.rfc-editor.org/rfc/rfc4253#section-4.2)).
const MAX_IDENTIFICATION: usize = 255;

/// The message number of NEWKEYS ([RFC 4253 §12](https://www.rfc-editor.org/rfc/rfc4253#section-12)).
const NEWKEYS: u8 = 21;
/// Length of the shortest packet, such as NEWKEYS, in bytes
/// ([RFC 4253 §6](https://www.rfc-editor.org/rfc/rfc4253#section-6)).
const MIN_PACKET: usize = 16;
/// How long NEWKEYS is held back from a client that sends nothing: longer than a round trip.
const MAX_HOLD: Duration = Duration::from_secs(2);

/// Waits for a message that russh reads and does not answer. Messages of a login are short: one that arrives in pieces would
/// be taken for such a message.
#[derive(Default)]
pub struct Unanswered {
    is_awaited: AtomicBool,
    noticed: Notify,
}

impl Unanswered {
    /// From now on the next message of the client that is not answered is noticed.
    pub fn watch(&self) {
        self.is_awaited.store(true, Ordering::Relaxed);
    }

    /// Resolves once such a message was noticed.
    pub async fn noticed(&self) {
        self.noticed.notified().await;
    }
}

/// See the module.
pub struct Socket {
    stream: TcpStream,
    /// See [`QUICK_READS`]; so many are left.
    quick_reads: u32,
    /// Ends the stream for both sides.
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Read from the stream, but not by russh yet.
    ahead: BytesMut,
    /// Bytes of our identification string that were sent already and that russh is going to write again.
    repeated: usize,
    newkeys: NewKeys,
    unanswered: Arc<Unanswered>,
    /// russh has read something since it wrote, while [`Unanswered`] was awaited.
    is_asked: bool,
    /// Written by russh, but not to the stream yet: only what is written before and with NEWKEYS that are held back.
    outgoing: BytesMut,
}

/// What becomes of our first NEWKEYS.
enum NewKeys {
    /// They are sent like everything else, or were sent.
    Sent,
    /// They are going to be held back. Until then everything that russh writes is cleartext.
    Expected,
    /// They wait for what russh writes next.
    PooledBytes {
        packet: BytesMut,
        /// Bytes that russh has read since.
        answered: usize,
        /// See [`MAX_HOLD`].
        end: Pin<Box<Sleep>>,
    },
}

impl Socket {
    pub fn new(
        stream: TcpStream,
        cut: WaitForCancellationFutureOwned,
        unanswered: Arc<Unanswered>,
    ) -> Socket {
        Socket {
            stream,
            quick_reads: QUICK_READS,
            cut: Box::pin(cut),
            ahead: BytesMut::new(),
            repeated: 0,
            newkeys: NewKeys::Sent,
            unanswered,
            is_asked: false,
            outgoing: BytesMut::new(),
        }
    }

    /// Sends our identification string and returns the client's line, or as much of it as may be. Called before russh gets
    /// the socket, which then reads the line again and whose own identification string is dropped.
    pub async fn exchange_identification(&mut self, ours: &str) -> Result<Bytes> {
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

    /// Holds our NEWKEYS back until EXT_INFO is written, the client shows that it gets none, or [`MAX_HOLD`] has passed.
    pub fn hold_newkeys(&mut self) {
        self.newkeys = NewKeys::Expected;
    }

    fn check_cut(&mut self, context: &mut Context<'_>) -> Result<()> {
        if self.cut.as_mut().poll(context).is_ready() {
            Err(ErrorKind::ConnectionAborted.into())
        } else {
            Ok(())
        }
    }

    /// Takes what has arrived off the socket, so that the client can go on.
    fn read_ahead(&mut self, context: &mut Context<'_>) {
        while self.ahead.len() < AHEAD_LIMIT && self.stream.poll_read_ready(context).is_ready() {
            self.ahead.reserve(AHEAD_STEP);
            match self
                .stream
                .try_read_buf(&mut (&mut self.ahead).limit(AHEAD_STEP))
            {
                Ok(1..) => {}
                // Not ready after all: the next look waits for it.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // An error or the end will be met again by whoever reads.
                _ => return,
            }
        }
    }

    /// Called when russh waits for the client: what it has read before and not answered, it never will.
    fn notice_unanswered(&mut self) {
        if self.is_asked {
            self.is_asked = false;
            self.unanswered.is_awaited.store(false, Ordering::Relaxed);
            self.unanswered.noticed.notify_one();
        }
    }

    /// What was read ahead, or else what arrives.
    fn poll_read_any(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        if self.ahead.is_empty() {
            let read = Pin::new(&mut self.stream).poll_read(context, buffer);
            if read.is_ready() && self.quick_reads > 0 {
                self.quick_reads -= 1;
                // The kernel forgets it after a while.
                let _ = self.stream.set_quickack(true);
            }
            return read;
        }
        let count = self.ahead.len().min(buffer.remaining());
        buffer.put_slice(&self.ahead.split_to(count));
        if self.ahead.is_empty() {
            self.ahead = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }

    /// Writes to the stream, and reads ahead while that is stuck.
    fn poll_write_now(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if written.is_pending() {
            self.read_ahead(context);
        }
        written
    }

    /// Writes what has to go out before anything else.
    fn poll_write_outgoing(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        while !self.outgoing.is_empty() {
            let outgoing = std::mem::take(&mut self.outgoing);
            let written = self.poll_write_now(context, &outgoing);
            self.outgoing = outgoing;
            match ready!(written)? {
                0 => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
                count => drop(self.outgoing.split_to(count)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Takes whole cleartext packets to be sent, up to NEWKEYS.
    fn take_cleartext(&mut self, bytes: &[u8]) {
        let (before, packet) = split_at_newkeys(bytes);
        self.outgoing.extend_from_slice(before);
        if !packet.is_empty() {
            let end = Box::pin(sleep(MAX_HOLD));
            self.newkeys = NewKeys::PooledBytes {
                packet: packet.into(),
                answered: 0,
                end,
            };
        }
    }

    /// Called when russh waits for the client: sends NEWKEYS that need not or must not wait any longer.
    fn end_hold(&mut self, context: &mut Context<'_>) -> Result<()> {
        if let NewKeys::PooledBytes {
            packet,
            answered,
            end,
        } = &mut self.newkeys
        {
            // russh has read the client's NEWKEYS and wants more, without having written anything: there is no EXT_INFO.
            let unaccompanied = *answered >= MIN_PACKET;
            if unaccompanied || end.as_mut().poll(context).is_ready() {
                self.outgoing.unsplit(packet.split());
                self.newkeys = NewKeys::Sent;
            }
        }
        // What does not go out now wakes whoever reads.
        match self.poll_write_outgoing(context) {
            Poll::Ready(written) => written,
            Poll::Pending => Ok(()),
        }
    }
}

/// Splits whole cleartext packets ([RFC 4253 §6](https://www.rfc-editor.org/rfc/rfc4253#section-6)) before NEWKEYS.
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
    ) -> Poll<Result<()>> {
        self.check_cut(context)?;
        self.end_hold(context)?;
        let before = buffer.filled().len();
        let read = self.poll_read_any(context, buffer);
        let count = buffer.filled().len() - before;
        if let NewKeys::PooledBytes { answered, .. } = &mut self.newkeys {
            *answered += count;
        }
        if read.is_pending() {
            self.notice_unanswered();
        } else if count > 0 && self.unanswered.is_awaited.load(Ordering::Relaxed) {
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
    ) -> Poll<Result<usize>> {
        self.check_cut(context)?;
        self.is_asked = false;
        if self.repeated > 0 {
            let count = self.repeated.min(bytes.len());
            self.repeated -= count;
            return Poll::Ready(Ok(count));
        }
        match &mut self.newkeys {
            NewKeys::Sent => {
                ready!(self.poll_write_outgoing(context))?;
                self.poll_write_now(context, bytes)
            }
            NewKeys::Expected => {
                self.take_cleartext(bytes);
                Poll::Ready(Ok(bytes.len()))
            }
            NewKeys::PooledBytes { packet, .. } => {
                packet.extend_from_slice(bytes);
                let packet = packet.split();
                self.outgoing.unsplit(packet);
                self.newkeys = NewKeys::Sent;
                Poll::Ready(Ok(bytes.len()))
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        ready!(self.poll_write_outgoing(context))?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
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
    async fn connected(unanswered: Arc<Unanswered>) -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        (
            Socket::new(
                stream,
                CancellationToken::new().cancelled_owned(),
                unanswered,
            ),
            client,
        )
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
        let unanswered: Arc<Unanswered> = Arc::default();
        let (mut socket, mut client) = connected(unanswered.clone()).await;
        let mut message = [0; 4];
        for (is_watched, is_answered) in [(false, false), (true, true), (true, false)] {
            if is_watched {
                unanswered.watch();
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
                () = unanswered.noticed() => true,
                () = std::future::ready(()) => false,
            };
            assert_eq!(is_noticed, is_watched && !is_answered);
        }
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
