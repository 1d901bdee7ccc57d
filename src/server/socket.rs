//! The TCP stream under russh, with two things that russh's session loop can't do for itself.
//!
//! It can be cut from outside, whatever the loop is waiting for. And while the loop is busy writing it still
//! reads, up to a bound: the loop does one at a time, so a client that does the same (it sends requests, and would read
//! the answers only then) and the server would otherwise wait for each other for ever, each with full buffers.

use bytes::{Buf, BytesMut};
use std::io::{Error, ErrorKind, Result};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::sync::WaitForCancellationFutureOwned;

/// Read while a write was stuck, in bytes: the window that a client can fill, and a little more.
const AHEAD_LIMIT: usize = 2560 * 1024;
const AHEAD_STEP: usize = 64 * 1024;

/// See the module.
pub struct Socket {
    stream: TcpStream,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    ahead: BytesMut,
}

impl Socket {
    /// `cut` ends the stream for both sides.
    pub fn new(stream: TcpStream, cut: WaitForCancellationFutureOwned) -> Socket {
        Socket { stream, cut: Box::pin(cut), ahead: BytesMut::new() }
    }

    fn check_cut(&mut self, context: &mut Context<'_>) -> Result<()> {
        match self.cut.as_mut().poll(context) {
            Poll::Ready(()) => Err(Error::from(ErrorKind::ConnectionAborted)),
            Poll::Pending => Ok(()),
        }
    }

    /// Takes what has arrived off the socket, so that the client can go on.
    fn read_ahead(&mut self, context: &mut Context<'_>) {
        while self.ahead.len() < AHEAD_LIMIT {
            let old = self.ahead.len();
            self.ahead.resize(old + AHEAD_STEP, 0);
            let mut buffer = ReadBuf::new(self.ahead.get_mut(old..).unwrap_or_default());
            let polled = Pin::new(&mut self.stream).poll_read(context, &mut buffer);
            let count = buffer.filled().len();
            self.ahead.truncate(old + count);
            // An error or the end will be met again by whoever reads.
            if !matches!(polled, Poll::Ready(Ok(()))) || count == 0 {
                return;
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        self.check_cut(context)?;
        if self.ahead.is_empty() {
            return Pin::new(&mut self.stream).poll_read(context, buffer);
        }
        let count = self.ahead.len().min(buffer.remaining());
        buffer.put_slice(self.ahead.get(..count).unwrap_or_default());
        self.ahead.advance(count);
        if self.ahead.is_empty() {
            self.ahead = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        self.check_cut(context)?;
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if written.is_pending() {
            self.read_ahead(context);
        }
        Poll::Ready(Ok(ready!(written)?))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
