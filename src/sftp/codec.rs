//! Bytes from the channel become requests: framing and decoding. WRITE is decoded here, because its
//! data must not be copied; the others by `russh_sftp`.
//!
//! SFTP version 3,
//! [draft-ietf-secsh-filexfer-02](https://datatracker.ietf.org/doc/html/draft-ietf-secsh-filexfer-02);
//! sizes as in OpenSSH's `sftp-common.h`.

use super::table::{EXTENSIONS, Extension};
use bytes::{Buf, Bytes, BytesMut};
use russh_sftp::protocol::{
    Close, FSetStat, Fstat, Lstat, MkDir, Open, OpenDir, Packet, Read, ReadDir, RealPath, Remove,
    Rename, RmDir, SetStat, Stat,
};
use std::collections::VecDeque;

/// Longest packet in bytes, its length field not counted.
pub const MAX_PACKET: usize = 256 * 1024;
/// Longest data of one READ or WRITE in bytes: a packet without its header.
pub const MAX_DATA: u32 = (MAX_PACKET - 1024) as u32;

/// Pieces are joined up to this size, in bytes.
const MAX_JOINED: usize = 4 * 1024;
/// Longest part of a WRITE before its data, in bytes: a handle has at most 256.
const WRITE_HEADER: usize = 5 + 4 + 256 + 8 + 4;

const INIT: u8 = 1;
const WRITE: u8 = 6;
const EXTENDED: u8 = 200;

/// One request. All but [`Request::Init`] are answered exactly once, with their id.
#[derive(Debug)]
pub enum Request {
    /// The client's version stands in place of an id.
    Init,
    Open(Open),
    Close(Close),
    Read(Read),
    Write {
        /// Of the file.
        handle: String,
        /// Where the data belongs.
        offset: u64,
        /// As it arrived, uncopied.
        data: SegmentedBuf,
    },
    Lstat(Lstat),
    Fstat(Fstat),
    SetStat(SetStat),
    FSetStat(FSetStat),
    OpenDir(OpenDir),
    ReadDir(ReadDir),
    Remove(Remove),
    MkDir(MkDir),
    RmDir(RmDir),
    RealPath(RealPath),
    Stat(Stat),
    Rename(Rename),
    ReadLink,
    Symlink,
    Extended(ExtendedRequest),
    /// An extension that is not offered.
    UnknownExtension,
    /// A type that version 3 does not have.
    UnknownType(u8),
    /// Not of the form that its type asks for.
    Malformed,
}

/// A request of an extension, see [`Extension`].
#[derive(Debug)]
pub enum ExtendedRequest {
    Limits,
    PosixRename { from: String, to: String },
    Statvfs,
    Fstatvfs { handle: String },
    ExpandPath { path: String },
}

impl ExtendedRequest {
    #[cfg(test)]
    fn extension(&self) -> Extension {
        match self {
            ExtendedRequest::Limits => Extension::Limits,
            ExtendedRequest::PosixRename { .. } => Extension::PosixRename,
            ExtendedRequest::Statvfs => Extension::Statvfs,
            ExtendedRequest::Fstatvfs { .. } => Extension::Fstatvfs,
            ExtendedRequest::ExpandPath { .. } => Extension::ExpandPath,
        }
    }
}

/// The stream can't be followed any further: the session must end.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Fatal {
    /// It may hold anything; its payload must not be taken for requests.
    #[error("a packet of {0} bytes, more than {MAX_PACKET}")]
    TooLong(usize),
    /// There is no id to answer.
    #[error("a packet of {0} bytes, too short for a request")]
    TooShort(usize),
}

/// Bytes in the pieces in which they arrived.
#[derive(Debug, Default)]
pub struct SegmentedBuf {
    pieces: VecDeque<Bytes>,
    /// Of all pieces together, in bytes.
    len: usize,
}

impl SegmentedBuf {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Adds bytes at the end. Small pieces are joined, so that the memory of a client that sends
    /// byte by byte is little more than its bytes.
    fn push(&mut self, piece: Bytes) {
        self.len += piece.len();
        let joins = |last: &mut Bytes| last.len() + piece.len() <= MAX_JOINED;
        match self.pieces.pop_back_if(joins) {
            Some(last) => self.pieces.push_back([last, piece].concat().into()),
            None => self.pieces.push_back(piece),
        }
    }

    /// A copy of the first bytes, at most `len`.
    fn peek(&self, len: usize) -> BytesMut {
        let mut copy = BytesMut::new();
        for piece in &self.pieces {
            let missing = len - copy.len();
            if piece.len() >= missing {
                copy.extend_from_slice(piece.get(..missing).unwrap_or_default());
                break;
            }
            copy.extend_from_slice(piece);
        }
        copy
    }

    /// Splits off the first bytes, at most `len`.
    fn split_to(&mut self, len: usize) -> SegmentedBuf {
        let mut taken = SegmentedBuf::default();
        while taken.len < len
            && let Some(mut first) = self.pieces.pop_front()
        {
            let piece = first.split_to(first.len().min(len - taken.len));
            taken.len += piece.len();
            taken.pieces.push_back(piece);
            if !first.is_empty() {
                self.pieces.push_front(first);
            }
        }
        self.len -= taken.len;
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

/// A request as it was framed.
#[derive(Debug)]
pub struct Framed {
    pub id: u32,
    pub request: Request,
    /// Length of the packet in bytes.
    pub len: usize,
}

/// Collects the channel's bytes until a packet is whole. Holds at most one packet and one channel
/// message.
#[derive(Default)]
pub struct PacketDecoder {
    bytes: SegmentedBuf,
}

impl PacketDecoder {
    /// Adds bytes from the channel.
    pub fn push(&mut self, chunk: Bytes) {
        self.bytes.push(chunk);
    }

    /// The next whole request, if there is one.
    pub fn next(&mut self) -> Result<Option<Framed>, Fatal> {
        let Ok(length) = self.bytes.peek(4).try_get_u32() else {
            return Ok(None);
        };
        let len = match length as usize {
            len @ ..5 => return Err(Fatal::TooShort(len)),
            len @ 5..=MAX_PACKET => len,
            len => return Err(Fatal::TooLong(len)),
        };
        if self.bytes.len() < 4 + len {
            return Ok(None);
        }
        self.bytes.split_to(4);
        let packet = self.bytes.split_to(len);
        let mut start = packet.peek(5);
        let kind = start.get_u8();
        let id = start.get_u32();
        let request = decode(kind, packet);
        Ok(Some(Framed { id, request, len }))
    }
}

fn decode(kind: u8, packet: SegmentedBuf) -> Request {
    let decoded = match kind {
        INIT => Some(Request::Init),
        WRITE => decode_write(packet),
        3..=20 | EXTENDED => decode_packet(&packet),
        other => Some(Request::UnknownType(other)),
    };
    match decoded {
        Some(request) => request,
        None => Request::Malformed,
    }
}

/// Decodes WRITE here, because `russh_sftp` would copy the data.
fn decode_write(mut packet: SegmentedBuf) -> Option<Request> {
    let mut header = packet.peek(WRITE_HEADER).freeze();
    let peeked = header.len();
    header.advance(5);
    let handle = decode_string(&mut header)?;
    let offset = header.try_get_u64().ok()?;
    let data_len = header.try_get_u32().ok()? as usize;
    packet.split_to(peeked - header.len());
    if data_len > packet.len() {
        return None;
    }
    Some(Request::Write {
        handle,
        offset,
        data: packet.split_to(data_len),
    })
}

/// Decodes every other request; `None` if it is malformed, or no request but a reply.
fn decode_packet(packet: &SegmentedBuf) -> Option<Request> {
    let mut bytes = packet.peek(MAX_PACKET).freeze();
    match Packet::try_from(&mut bytes).ok()? {
        Packet::Open(open) => Some(Request::Open(open)),
        Packet::Close(close) => Some(Request::Close(close)),
        Packet::Read(read) => Some(Request::Read(read)),
        Packet::Lstat(lstat) => Some(Request::Lstat(lstat)),
        Packet::Fstat(fstat) => Some(Request::Fstat(fstat)),
        Packet::SetStat(set_stat) => Some(Request::SetStat(set_stat)),
        Packet::FSetStat(set_stat) => Some(Request::FSetStat(set_stat)),
        Packet::OpenDir(open_dir) => Some(Request::OpenDir(open_dir)),
        Packet::ReadDir(read_dir) => Some(Request::ReadDir(read_dir)),
        Packet::Remove(remove) => Some(Request::Remove(remove)),
        Packet::MkDir(mk_dir) => Some(Request::MkDir(mk_dir)),
        Packet::RmDir(rm_dir) => Some(Request::RmDir(rm_dir)),
        Packet::RealPath(real_path) => Some(Request::RealPath(real_path)),
        Packet::Stat(stat) => Some(Request::Stat(stat)),
        Packet::Rename(rename) => Some(Request::Rename(rename)),
        Packet::ReadLink(_) => Some(Request::ReadLink),
        Packet::Symlink(_) => Some(Request::Symlink),
        Packet::Extended(extended) => decode_extended(&extended.request, extended.data.into()),
        Packet::Init(_)
        | Packet::Write(_)
        | Packet::Version(_)
        | Packet::Status(_)
        | Packet::Handle(_)
        | Packet::Data(_)
        | Packet::Name(_)
        | Packet::Attrs(_)
        | Packet::ExtendedReply(_) => None,
    }
}

fn decode_extended(name: &str, mut data: Bytes) -> Option<Request> {
    let Some(row) = EXTENSIONS.iter().find(|row| row.name == name) else {
        return Some(Request::UnknownExtension);
    };
    let request = match row.extension {
        Extension::Limits => ExtendedRequest::Limits,
        Extension::PosixRename => ExtendedRequest::PosixRename {
            from: decode_string(&mut data)?,
            to: decode_string(&mut data)?,
        },
        Extension::Statvfs => ExtendedRequest::Statvfs,
        Extension::Fstatvfs => ExtendedRequest::Fstatvfs {
            handle: decode_string(&mut data)?,
        },
        Extension::ExpandPath => ExtendedRequest::ExpandPath {
            path: decode_string(&mut data)?,
        },
    };
    Some(Request::Extended(request))
}

/// Decodes a length and that many bytes of UTF-8.
fn decode_string(bytes: &mut Bytes) -> Option<String> {
    let len = bytes.try_get_u32().ok()? as usize;
    if len > bytes.len() {
        return None;
    }
    String::from_utf8(bytes.split_to(len).into()).ok()
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

    fn all(decoder: &mut PacketDecoder) -> Vec<(u32, Request)> {
        std::iter::from_fn(|| decoder.next().unwrap())
            .map(|framed| (framed.id, framed.request))
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
            let mut decoder = PacketDecoder::default();
            let mut found = Vec::new();
            for chunk in stream.chunks(cut) {
                decoder.push(Bytes::copy_from_slice(chunk));
                found.extend(all(&mut decoder));
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
                (handle.as_str(), &got.peek(MAX_PACKET)[..]),
                ("h1", &data[..])
            );
            assert!(matches!(second, (8, Request::UnknownType(99))));
            assert!(matches!(third, (9, Request::Close(_))));
        }
    }

    #[test]
    fn extensions_are_known_by_their_names() {
        for row in EXTENSIONS {
            let mut rest = BytesMut::new();
            for text in [row.name, "/a", "/b"] {
                rest.put_u32(text.len() as u32);
                rest.put_slice(text.as_bytes());
            }
            let mut decoder = PacketDecoder::default();
            decoder.push(packet(EXTENDED, 1, &rest).into());
            let found = all(&mut decoder);
            let [(1, Request::Extended(request))] = &found[..] else {
                panic!("{found:?}")
            };
            assert_eq!(request.extension(), row.extension);
        }
    }

    #[test]
    fn bytes_one_by_one_cost_little_more_than_together() {
        let mut pieces = SegmentedBuf::default();
        (0..100_000u32).for_each(|n| pieces.push(Bytes::copy_from_slice(&[n as u8])));
        assert!(
            pieces.pieces.len() <= 2 + 2 * 100_000 / MAX_JOINED,
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
            let mut decoder = PacketDecoder::default();
            decoder.push(bytes.into());
            assert!(matches!(all(&mut decoder)[..], [(3, Request::Malformed)]));
        }
    }

    #[test]
    fn impossible_lengths_end_the_stream() {
        for (length, error) in [
            (MAX_PACKET + 1, Fatal::TooLong(MAX_PACKET + 1)),
            (4, Fatal::TooShort(4)),
            (0, Fatal::TooShort(0)),
        ] {
            let mut decoder = PacketDecoder::default();
            decoder.push(Bytes::copy_from_slice(&(length as u32).to_be_bytes()));
            assert_eq!(decoder.next().unwrap_err(), error);
        }
    }
}
