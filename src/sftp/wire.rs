//! Bytes from the channel become requests: framing, and the one request whose data must not be copied.
//!
//! SFTP version 3, [draft-ietf-secsh-filexfer-02](https://datatracker.ietf.org/doc/html/draft-ietf-secsh-filexfer-02);
//! sizes as OpenSSH's `sftp-common.h` has them.

use bytes::{Buf, Bytes};
use russh_sftp::protocol::Packet;
use std::collections::VecDeque;

/// Longest packet in bytes, its length field not counted.
pub const MAX_PACKET: usize = 256 * 1024;
/// Most bytes in one READ or WRITE: a packet less its header.
pub const MAX_DATA: u32 = (MAX_PACKET - 1024) as u32;

const INIT: u8 = 1;
const WRITE: u8 = 6;

/// One request. All but [`Body::Init`] are answered exactly once, with their id.
#[derive(Debug)]
pub struct Request {
    /// As the client chose it.
    pub id: u32,
    /// What it wants.
    pub body: Body,
}

/// See [`Request`].
#[derive(Debug)]
pub enum Body {
    /// The client's version stands where others have an id.
    Init,
    /// WRITE, its data in the pieces in which it came.
    Write {
        /// Of the file.
        handle: String,
        /// Where the data belongs.
        offset: u64,
        /// In order.
        data: Vec<Bytes>,
    },
    /// Every other request, decoded.
    Packet(Packet),
    /// Not of the form its type asks for.
    Malformed,
    /// A type that version 3 doesn't have.
    Unknown(u8),
}

/// The stream can't be followed any further: the session must end.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Fatal {
    /// It may hold anything; its payload must not be taken for requests.
    #[error("a packet of {0} bytes, more than {MAX_PACKET}")]
    TooLong(usize),
    /// No id to answer to.
    #[error("a packet of {0} bytes, too short for a request")]
    TooShort(usize),
}

/// Collects the channel's bytes until a packet is whole. Holds at most one packet and one channel message.
#[derive(Default)]
pub struct Inbox {
    bytes: Rope,
}

impl Inbox {
    /// More bytes came.
    pub fn push(&mut self, chunk: Bytes) {
        self.bytes.push(chunk);
    }

    /// The next whole request, if there is one.
    pub fn next(&mut self) -> Result<Option<Request>, Fatal> {
        let mut length = [0; 4];
        if self.bytes.remaining() < length.len() {
            return Ok(None);
        }
        self.bytes.peek(&mut length);
        let length = u32::from_be_bytes(length) as usize;
        if length > MAX_PACKET {
            return Err(Fatal::TooLong(length));
        }
        if length < 5 {
            return Err(Fatal::TooShort(length));
        }
        if self.bytes.remaining() < 4 + length {
            return Ok(None);
        }
        self.bytes.advance(4);
        Ok(Some(decode(self.bytes.split(length))))
    }
}

fn decode(mut packet: Rope) -> Request {
    let mut head = [0; 5];
    packet.peek(&mut head);
    let [kind, id @ ..] = head;
    let id = u32::from_be_bytes(id);
    let body = match kind {
        INIT => Body::Init,
        WRITE => {
            packet.advance(head.len());
            write(packet).unwrap_or(Body::Malformed)
        }
        3..=20 | 200 => match Packet::try_from(&mut packet.copy_to_bytes(packet.remaining())) {
            Ok(packet) => Body::Packet(packet),
            Err(_) => Body::Malformed,
        },
        other => Body::Unknown(other),
    };
    Request { id, body }
}

fn write(mut packet: Rope) -> Option<Body> {
    let handle = string(&mut packet)?;
    let offset = packet.try_get_u64().ok()?;
    let length = packet.try_get_u32().ok()? as usize;
    (length <= packet.remaining()).then(|| Body::Write { handle, offset, data: packet.split(length).chunks.into() })
}

/// A length and so many bytes of UTF-8.
pub fn string(bytes: &mut impl Buf) -> Option<String> {
    let length = bytes.try_get_u32().ok()? as usize;
    (length <= bytes.remaining()).then(|| String::from_utf8(bytes.copy_to_bytes(length).into()).ok())?
}

/// Bytes in pieces.
#[derive(Default)]
struct Rope {
    chunks: VecDeque<Bytes>,
    length: usize,
}

impl Rope {
    fn push(&mut self, chunk: Bytes) {
        if !chunk.is_empty() {
            self.length += chunk.len();
            self.chunks.push_back(chunk);
        }
    }

    /// Copies the first bytes, leaving them here.
    fn peek(&self, to: &mut [u8]) {
        let bytes = self.chunks.iter().flatten();
        to.iter_mut().zip(bytes).for_each(|(to, byte)| *to = *byte);
    }

    /// Takes off the first `length` bytes, without copying them.
    fn split(&mut self, length: usize) -> Rope {
        let mut front = Rope::default();
        while front.length < length
            && let Some(mut chunk) = self.chunks.pop_front()
        {
            self.length -= chunk.len();
            let rest = chunk.split_off(chunk.len().min(length - front.length));
            front.push(chunk);
            if !rest.is_empty() {
                self.length += rest.len();
                self.chunks.push_front(rest);
            }
        }
        front
    }
}

impl Buf for Rope {
    fn remaining(&self) -> usize {
        self.length
    }

    fn chunk(&self) -> &[u8] {
        self.chunks.front().map_or(&[], |chunk| chunk)
    }

    fn advance(&mut self, count: usize) {
        drop(self.split(count));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::{BufMut, BytesMut};

    fn packet(kind: u8, id: u32, rest: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_u32(5 + rest.len() as u32);
        out.put_u8(kind);
        out.put_u32(id);
        out.put_slice(rest);
        out
    }

    fn write_packet(id: u32, offset: u64, data: &[u8]) -> Vec<u8> {
        let mut rest = BytesMut::new();
        rest.put_u32(2);
        rest.put_slice(b"h1");
        rest.put_u64(offset);
        rest.put_u32(data.len() as u32);
        rest.put_slice(data);
        packet(WRITE, id, &rest)
    }

    fn all(inbox: &mut Inbox) -> Vec<Request> {
        std::iter::from_fn(|| inbox.next().unwrap()).collect()
    }

    #[test]
    fn requests_are_found_however_the_bytes_are_cut() {
        let data: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        let stream = [write_packet(7, 99, &data), packet(99, 8, b"??"), packet(4, 9, &[0, 0, 0, 1, b'x'])].concat();
        for cut in [1, 2, 3, 7, 100, stream.len()] {
            let mut inbox = Inbox::default();
            let mut found = Vec::new();
            for chunk in stream.chunks(cut) {
                inbox.push(Bytes::copy_from_slice(chunk));
                found.extend(all(&mut inbox));
            }
            let [first, second, third] = &found[..] else { panic!("{found:?}") };
            let Body::Write { handle, offset: 99, data: pieces } = &first.body else { panic!("{first:?}") };
            assert_eq!((first.id, handle.as_str(), pieces.concat()), (7, "h1", data.clone()));
            assert!(matches!(second, Request { id: 8, body: Body::Unknown(99) }));
            assert!(matches!(third, Request { id: 9, body: Body::Packet(Packet::Close(_)) }));
        }
    }

    #[test]
    fn malformed_requests_keep_their_id() {
        let mut short = write_packet(3, 0, b"data");
        let end = short.len();
        short[end - 5] = 200;
        for bytes in [short, packet(4, 3, &[0, 0, 1, 0]), packet(11, 3, b"")] {
            let mut inbox = Inbox::default();
            inbox.push(bytes.into());
            assert!(matches!(all(&mut inbox)[..], [Request { id: 3, body: Body::Malformed }]));
        }
    }

    #[test]
    fn impossible_lengths_end_the_stream() {
        for (length, error) in
            [(MAX_PACKET + 1, Fatal::TooLong(MAX_PACKET + 1)), (4, Fatal::TooShort(4)), (0, Fatal::TooShort(0))]
        {
            let mut inbox = Inbox::default();
            inbox.push(Bytes::copy_from_slice(&(length as u32).to_be_bytes()));
            assert_eq!(inbox.next().unwrap_err(), error);
        }
    }
}
