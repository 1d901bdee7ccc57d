//! Bytes from the channel become requests: framing, and the one request whose data must not be copied.
//!
//! SFTP version 3, [draft-ietf-secsh-filexfer-02](https://datatracker.ietf.org/doc/html/draft-ietf-secsh-filexfer-02);
//! sizes as OpenSSH's `sftp-common.h` has them.

use bytes::{Buf, Bytes, BytesMut};
use russh_sftp::protocol::Packet;
use std::collections::VecDeque;

/// Longest packet in bytes, its length field not counted.
pub const MAX_PACKET: usize = 256 * 1024;
/// Most bytes in one READ or WRITE: a packet less its header.
pub const MAX_DATA: u32 = (MAX_PACKET - 1024) as u32;

/// Pieces are joined up to this size, in bytes.
const SMALL: usize = 4 * 1024;
/// All that is in a WRITE but its data, in bytes: a handle has 256 at most.
const WRITE_HEADER: usize = 5 + 4 + 256 + 8 + 4;

const INIT: u8 = 1;
const WRITE: u8 = 6;

/// One request. All but [`Request::Init`] are answered exactly once, with their id.
#[derive(Debug)]
pub enum Request {
    /// The client's version stands where others have an id.
    Init,
    /// WRITE.
    Write {
        /// Of the file.
        handle: String,
        /// Where the data belongs.
        offset: u64,
        /// As it came, uncopied.
        data: SegmentedBuf,
    },
    /// Every other request, decoded.
    Packet(Packet),
    /// Not of the form its type asks for.
    Malformed,
    /// A type that version 3 doesn't have.
    Unknown(u8),
}

/// The stream can't be followed any further: the session must end.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Fatal {
    /// It may hold anything; its payload must not be taken for requests.
    #[error("a packet of {0} bytes, more than {MAX_PACKET}")]
    TooLong(usize),
    /// No id to answer to.
    #[error("a packet of {0} bytes, too short for a request")]
    TooShort(usize),
}

/// Bytes in the pieces in which they came.
#[derive(Debug, Default)]
pub struct SegmentedBuf {
    pieces: VecDeque<Bytes>,
    len: usize,
}

impl SegmentedBuf {
    /// How many bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    fn push(&mut self, mut piece: Bytes) {
        self.len += piece.len();
        // A client that sends byte by byte shall not cost a hundred times that.
        if let Some(last) = self
            .pieces
            .pop_back_if(|last| last.len() + piece.len() <= SMALL)
        {
            piece = [last, piece].concat().into();
        }
        self.pieces.push_back(piece);
    }

    /// The first bytes, that many at most.
    fn start(&self, len: usize) -> BytesMut {
        self.pieces.iter().flatten().take(len).collect()
    }

    /// Splits off the first bytes, that many at most.
    fn take(&mut self, len: usize) -> SegmentedBuf {
        let mut taken = SegmentedBuf {
            pieces: VecDeque::new(),
            len: len.min(self.len),
        };
        self.len -= taken.len;
        let mut left = taken.len;
        while let Some(first) = self.pieces.front_mut().filter(|_| left > 0) {
            let piece = first.split_to(left.min(first.len()));
            left -= piece.len();
            taken.pieces.push_back(piece);
            self.pieces.pop_front_if(|first| first.is_empty());
        }
        taken
    }
}

impl IntoIterator for SegmentedBuf {
    type Item = Bytes;
    type IntoIter = std::collections::vec_deque::IntoIter<Bytes>;
    fn into_iter(self) -> Self::IntoIter {
        self.pieces.into_iter()
    }
}

/// Collects the channel's bytes until a packet is whole. Holds at most one packet and one channel message.
#[derive(Default)]
pub struct PacketDecoder {
    bytes: SegmentedBuf,
}

impl PacketDecoder {
    /// More bytes came.
    pub fn push(&mut self, chunk: Bytes) {
        self.bytes.push(chunk);
    }

    /// The next whole request, if there is one: its id, what it asks for, and its length in bytes.
    pub fn next(&mut self) -> Result<Option<(u32, Request, usize)>, Fatal> {
        let Ok(length) = self.bytes.start(4).try_get_u32() else {
            return Ok(None);
        };
        let length = match length as usize {
            length @ ..5 => return Err(Fatal::TooShort(length)),
            length @ 5..=MAX_PACKET => length,
            length => return Err(Fatal::TooLong(length)),
        };
        if self.bytes.len() < 4 + length {
            return Ok(None);
        }
        self.bytes.take(4);
        let (id, request) = decode(self.bytes.take(length));
        Ok(Some((id, request, length)))
    }
}

fn decode(packet: SegmentedBuf) -> (u32, Request) {
    let mut start = packet.start(5);
    let (kind, id) = (start.get_u8(), start.get_u32());
    let request = match kind {
        INIT => Some(Request::Init),
        WRITE => write(packet),
        3..=20 | 200 => Packet::try_from(&mut packet.start(MAX_PACKET).freeze())
            .ok()
            .map(Request::Packet),
        other => Some(Request::Unknown(other)),
    };
    (id, request.unwrap_or(Request::Malformed))
}

/// By hand, because the crate would copy the data.
fn write(mut packet: SegmentedBuf) -> Option<Request> {
    let mut header = packet.start(WRITE_HEADER).freeze();
    let length = header.len();
    header.advance(5);
    let (handle, offset) = (string(&mut header)?, header.try_get_u64().ok()?);
    let data = header.try_get_u32().ok()? as usize;
    packet.take(length - header.len());
    (data <= packet.len()).then(|| Request::Write {
        handle,
        offset,
        data: packet.take(data),
    })
}

/// A length and so many bytes.
fn counted(bytes: &mut Bytes) -> Option<Bytes> {
    let length = bytes.try_get_u32().ok()? as usize;
    (length <= bytes.len()).then(|| bytes.split_to(length))
}

/// A length and so many bytes of UTF-8.
pub fn string(bytes: &mut Bytes) -> Option<String> {
    String::from_utf8(counted(bytes)?.into()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BufMut;

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

    fn all(inbox: &mut PacketDecoder) -> Vec<(u32, Request)> {
        std::iter::from_fn(|| inbox.next().unwrap())
            .map(|(id, request, _)| (id, request))
            .collect()
    }

    #[test]
    fn requests_are_found_however_the_bytes_are_cut() {
        let data: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        let stream = [
            write_packet(7, 99, &data),
            packet(99, 8, b"??"),
            packet(4, 9, &[0, 0, 0, 1, b'x']),
        ]
        .concat();
        for cut in [1, 2, 3, 7, 100, stream.len()] {
            let mut inbox = PacketDecoder::default();
            let mut found = Vec::new();
            for chunk in stream.chunks(cut) {
                inbox.push(Bytes::copy_from_slice(chunk));
                found.extend(all(&mut inbox));
            }
            let [first, second, third] = &found[..] else {
                panic!("{found:?}")
            };
            let (
                7,
                Request::Write {
                    handle,
                    offset: 99,
                    data: got,
                },
            ) = first
            else {
                panic!("{first:?}")
            };
            assert_eq!(
                (handle.as_str(), &got.start(MAX_PACKET)[..]),
                ("h1", &data[..])
            );
            assert!(matches!(second, (8, Request::Unknown(99))));
            assert!(matches!(third, (9, Request::Packet(Packet::Close(_)))));
        }
    }

    #[test]
    fn bytes_one_by_one_cost_little_more_than_together() {
        let mut pieces = SegmentedBuf::default();
        (0..100_000u32).for_each(|n| pieces.push(Bytes::copy_from_slice(&[n as u8])));
        assert!(
            pieces.pieces.len() <= 2 + 2 * 100_000 / SMALL,
            "{}",
            pieces.pieces.len()
        );
        assert!(
            (0..100_000u32)
                .map(|n| n as u8)
                .eq(pieces.into_iter().flatten())
        );
    }

    #[test]
    fn malformed_requests_keep_their_id() {
        let mut short = write_packet(3, 0, b"data");
        let end = short.len();
        short[end - 5] = 200;
        for bytes in [short, packet(4, 3, &[0, 0, 1, 0]), packet(11, 3, b"")] {
            let mut inbox = PacketDecoder::default();
            inbox.push(bytes.into());
            assert!(matches!(all(&mut inbox)[..], [(3, Request::Malformed)]));
        }
    }

    #[test]
    fn impossible_lengths_end_the_stream() {
        for (length, error) in [
            (MAX_PACKET + 1, Fatal::TooLong(MAX_PACKET + 1)),
            (4, Fatal::TooShort(4)),
            (0, Fatal::TooShort(0)),
        ] {
            let mut inbox = PacketDecoder::default();
            inbox.push(Bytes::copy_from_slice(&(length as u32).to_be_bytes()));
            assert_eq!(inbox.next().unwrap_err(), error);
        }
    }
}
