//! The TCP stream under russh, with two things that russh's session loop can't do for itself.
//!
//! It can be cut from outside, whatever the loop is waiting for. And while the loop is busy writing it still
//! reads, up to a bound: the loop does one at a time, so a client that does the same (it sends requests, and would read
//! the answers only then) and the server would otherwise wait for each other for ever, each with full buffers.

use bytes::{BufMut, BytesMut};
use std::io::{ErrorKind, Result};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::sync::WaitForCancellationFutureOwned;

/// Read while a write was stuck, in bytes: the window that a client can fill, and a little more.
const AHEAD_LIMIT: usize = 2560 * 1024;
const AHEAD_STEP: usize = 64 * 1024;

/// Reads of which each is acknowledged at once: those of a login. OpenSSH's client, with Nagle's algorithm still on, holds
/// its next message back until the last one is acknowledged, which the kernel would delay by 40 ms.
pub const QUICK_READS: u32 = 32;

/// See the module.
pub struct Socket {
    pub stream: TcpStream,
    /// See [`QUICK_READS`]; so many are left.
    pub quick_reads: u32,
    /// Ends the stream for both sides.
    pub cut: Pin<Box<WaitForCancellationFutureOwned>>,
    /// What was read while a write was stuck; empty at first.
    pub ahead: BytesMut,
}

impl Socket {
    fn check_cut(&mut self, context: &mut Context<'_>) -> Result<()> {
        if self.cut.as_mut().poll(context).is_ready() { Err(ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }

    /// Takes what has arrived off the socket, so that the client can go on.
    fn read_ahead(&mut self, context: &mut Context<'_>) {
        while self.ahead.len() < AHEAD_LIMIT && self.stream.poll_read_ready(context).is_ready() {
            self.ahead.reserve(AHEAD_STEP);
            match self.stream.try_read_buf(&mut (&mut self.ahead).limit(AHEAD_STEP)) {
                Ok(1..) => {}
                // Not ready after all: the next look waits for it.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // An error or the end will be met again by whoever reads.
                _ => return,
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        self.check_cut(context)?;
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
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        self.check_cut(context)?;
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if written.is_pending() {
            self.read_ahead(context);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
