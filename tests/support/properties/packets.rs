//! The session loop.

use super::{Chosen, FOREVER, MEMORY, MIB, NOISE, noise, rarely, run};
use arbitrary::Unstructured;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use russh_sftp::protocol::Packet;
use sftpd::sftp::{End, MAX_HANDLES, Received, Sink, Source};
use sftpd::store::{
    Attributes, Condition, Entry, Key, ListRequest, MAX_PAGE, Store, memory::MemoryStore,
};
use sftpd::transfer::{MAX_EARLY, REORDER_WINDOW};
use sftpd::users::Access;
use sftpd::{path::Home, vfs::Vfs};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex};
use std::{ops::Range, time::Duration};
use tokio::time::sleep;

/// Longest packet in bytes, as docs/requests.md says.
const MAX_PACKET: usize = 256 * 1024;
/// Longest message of an SSH channel in bytes: a chunk that the session is given is never longer.
const MAX_MESSAGE: usize = 32 * 1024;
const INIT: [u8; 9] = [0, 0, 0, 5, 1, 0, 0, 0, 3];

/// Any bytes, split anywhere: every whole request is answered once, with its id and a reply of a
/// fitting type; the session ends as it should, within its memory, leaves nothing half-done and
/// changes no other home.
pub fn packets(data: &[u8]) {
    LazyLock::force(&NOISE);
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    let Ok((ending, seen)) = run(session(&mut Unstructured::new(data))) else {
        return;
    };
    let took = MEMORY.peak_usage().saturating_sub(before) as u64;
    let files = seen
        .requests
        .iter()
        .filter(|(kind, _)| *kind == 3)
        .count()
        .min(MAX_HANDLES) as u64;
    // Packets and replies under way; for each upload, what came early; what was stored, and is read
    // again.
    let most = 3 * MIB
        + files * MAX_EARLY
        + if files > 0 {
            2 * seen.sent + 9 * MIB
        } else {
            0
        };
    assert!(
        took <= most,
        "{took} bytes of memory for {} sent and {files} opened",
        seen.sent
    );
    assert_eq!(ending, seen.ending.unwrap_or(Ending::Closed));
    assert_answered(&seen.requests, &seen.replies);
}

/// Runs one session over a store with some files, and checks the store afterwards.
async fn session(u: &mut Unstructured<'_>) -> Chosen<(Ending, Seen)> {
    let store = Arc::new(MemoryStore::default());
    for (key, size) in [
        ("homer", 1),
        ("other/secret", 1),
        ("home/a", 10),
        ("home/d/b", 300_000),
        ("home/d/e/f", 0),
    ] {
        store
            .put(
                &Key::new(key).unwrap(),
                NOISE.slice(..size),
                &Attributes::default(),
                &Condition::None,
            )
            .await
            .unwrap();
    }
    let (mut settings, tasks) = super::session::settings(store.clone(), "home", 8 * MIB);
    settings.access = *u.choose(&[
        Access::ReadWrite,
        Access::ReadWrite,
        Access::ReadOnly,
        Access::WriteOnly,
    ])?;
    settings.idle_timeout = FOREVER / 2;
    let seen = Arc::<Mutex<Seen>>::default();
    let listener = Listener {
        slow: rarely(u, 2)?,
        partial: BytesMut::new(),
        seen: seen.clone(),
    };
    let talker = Talker {
        is_over: false,
        cuts: u.arbitrary()?,
        taken: 0,
        id: u.arbitrary::<u16>()?.into(),
        ready: if rarely(u, 32)? {
            BytesMut::new()
        } else {
            INIT[..].into()
        },
        request: Request::default(),
        series: 0..0,
        choices: u.bytes(u.len())?.to_vec().into(),
        partial: BytesMut::new(),
        seen: seen.clone(),
    };
    let end = sftpd::sftp::serve(talker, listener, settings).await;
    tasks.close();
    tasks.wait().await;
    assert_eq!(store.uploads(), 0, "multipart uploads left");
    let all = ListRequest {
        prefix: &Key::default(),
        folded: false,
        after: None,
        limit: MAX_PAGE,
    };
    let keys = store
        .list(all)
        .await
        .unwrap()
        .entries
        .into_iter()
        .map(|entry| match entry {
            Entry::Object(key, _) | Entry::Prefix(key) => key,
        });
    assert!(
        keys.filter(|key| !key.starts_with("home/"))
            .eq(["homer", "other/secret"]),
        "outside the home"
    );
    let ending = match end {
        End::Closed => Ending::Closed,
        End::Protocol(_) => Ending::Protocol,
        End::NoInit => Ending::NoInit,
        End::Idle(_) | End::Drained | End::Ignored => panic!("the session ends: {end}"),
    };
    Ok((ending, std::mem::take(&mut seen.lock().unwrap())))
}

/// How a session may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Closed,
    /// A packet was too long or too short.
    Protocol,
    /// A request came before INIT.
    NoInit,
}

/// What was sent and received.
#[derive(Default)]
struct Seen {
    /// Types and ids of the whole requests that the session could understand.
    requests: Vec<(u8, u32)>,
    /// In bytes.
    sent: u64,
    /// `None` if the client ends the session.
    ending: Option<Ending>,
    /// Types and ids.
    replies: Vec<(u8, u32)>,
    handles: Vec<Bytes>,
}

impl Seen {
    /// Decodes what was sent, in the simplest way.
    fn note_requests(&mut self, partial: &mut BytesMut) {
        while self.ending.is_none() {
            if partial.first_chunk().is_some_and(|length| {
                !(5..=MAX_PACKET).contains(&(u32::from_be_bytes(*length) as usize))
            }) {
                self.ending = Some(Ending::Protocol);
            }
            let Some(packet) = whole_packet(partial).filter(|_| self.ending.is_none()) else {
                return;
            };
            let (kind, id) = head(&packet);
            if self.requests.is_empty() && kind != INIT[4] {
                self.ending = Some(Ending::NoInit);
            } else {
                self.requests.push((kind, id));
            }
        }
    }
}

/// Takes a packet, its length left out.
fn whole_packet(partial: &mut BytesMut) -> Option<Bytes> {
    let length = 4 + u32::from_be_bytes(*partial.first_chunk()?) as usize;
    (length <= partial.len()).then(|| partial.split_to(length).freeze().slice(4..))
}

fn head(mut packet: &[u8]) -> (u8, u32) {
    (packet.get_u8(), packet.get_u32())
}

struct Listener {
    slow: bool,
    partial: BytesMut,
    seen: Arc<Mutex<Seen>>,
}

impl Sink for Listener {
    async fn send(&mut self, bytes: Bytes) -> bool {
        if self.slow {
            sleep(Duration::from_millis(1)).await;
        }
        self.partial.extend_from_slice(&bytes);
        let mut seen = self.seen.lock().unwrap();
        while let Some(mut packet) = whole_packet(&mut self.partial) {
            assert!(
                packet.len() <= MAX_PACKET,
                "a reply of {} bytes",
                packet.len()
            );
            seen.replies.push(head(&packet));
            if let Packet::Handle(handle) =
                Packet::try_from(&mut packet).expect("a reply that can be decoded")
            {
                seen.handles.push(handle.handle.into());
            }
            assert!(packet.is_empty(), "bytes after a reply: {packet:?}");
        }
        true
    }
}

/// Sends requests as clients make them, some of them spoilt, in pieces.
struct Talker {
    /// The end was told.
    is_over: bool,
    /// What the rest is made from.
    choices: Bytes,
    id: u32,
    /// What is sent, and how often it is still to be.
    request: Request,
    series: Range<u64>,
    /// To be sent.
    ready: BytesMut,
    cuts: [u8; 16],
    taken: usize,
    /// Sent, of a packet that is not whole.
    partial: BytesMut,
    seen: Arc<Mutex<Seen>>,
}

impl Source for Talker {
    /// A packet, or some bytes, a few at first; at once, after other tasks have run, or after all
    /// of them wait.
    async fn next(&mut self) -> Received {
        if self.is_over {
            return std::future::pending().await;
        }
        let cut = self.cuts[self.taken % 16];
        match cut / 64 {
            0 => {}
            1 => sleep(Duration::from_millis(5)).await,
            _ => tokio::task::yield_now().await,
        }
        let len = if cut < 128 {
            1
        } else {
            1 << (usize::from(cut % 16) + self.taken / 16).min(15)
        };
        self.taken += 1;
        while self.ready.len() < len && self.more().unwrap_or(false) {}
        let len = if cut < 128 { MAX_MESSAGE } else { len };
        let chunk = self.ready.split_to(len.min(self.ready.len())).freeze();
        let mut seen = self.seen.lock().unwrap();
        seen.sent += chunk.len() as u64;
        self.partial.extend_from_slice(&chunk);
        seen.note_requests(&mut self.partial);
        self.is_over = chunk.is_empty();
        if self.is_over {
            Received::Eof
        } else {
            Received::Data(chunk)
        }
    }
}

impl Talker {
    /// Makes the next packet, if there is one.
    fn more(&mut self) -> Chosen<bool> {
        let choices = self.choices.clone();
        let u = &mut Unstructured::new(&choices);
        if self.series.is_empty() {
            if u.is_empty() {
                return Ok(false);
            }
            self.request = request(u, &mut self.seen.lock().unwrap().handles)?;
            // Many reach limits: of handles, of READs that wait, of a part.
            let many = (8 * MIB / self.request.packet.len() as u64).min(300);
            self.series = 0..if rarely(u, 64)? { many } else { 1 };
        }
        let n = self.series.next().unwrap_or(0);
        self.id += 1;
        let mut packet = self.request.packet(self.id, n);
        if n == 0 && rarely(u, 8)? {
            spoil(u, &mut packet)?;
        }
        self.ready.extend_from_slice(&packet);
        self.choices.advance(choices.len() - u.len());
        Ok(true)
    }
}

/// Types of requests, the frequent ones more than once.
const KINDS: [u8; 32] = [
    3, 3, 3, 3, 3, 6, 6, 6, 6, 5, 5, 5, 4, 4, 4, 7, 8, 9, 10, 11, 11, 12, 12, 13, 14, 15, 16, 17,
    18, 18, 19, 200,
];
const NAMES: [&str; 16] = [
    "/a",
    "d/b",
    "new",
    "/d/x/.././/b",
    "x/y",
    "d/b",
    "d/../new2",
    "d",
    "/",
    "d/e",
    "d/e/f",
    "../homer",
    "/../../other/secret",
    "",
    "a\0",
    "~",
];
const EXTENSIONS: [&str; 5] = [
    "posix-rename@openssh.com",
    "limits@openssh.com",
    "statvfs@openssh.com",
    "expand-path@openssh.com",
    "unknown@example.com",
];
/// What most clients send: READ, WRITE 2, APPEND 4, CREATE 8, TRUNCATE 16, EXCLUDE 32.
const FLAGS: [u32; 8] = [26, 1, 1, 10, 1, 14, 42, 3];

/// A request whose id is to be filled in.
#[derive(Default)]
struct Request {
    packet: Vec<u8>,
    /// Where in the packet there is an offset into a file.
    offset_at: Option<usize>,
    /// The first one, and how it rises in a series.
    offset: u64,
    step: u64,
}

impl Request {
    /// The n-th of a series.
    fn packet(&self, id: u32, n: u64) -> Vec<u8> {
        let mut packet = self.packet.clone();
        (&mut packet[5..9]).put_u32(id);
        if let Some(at) = self.offset_at {
            (&mut packet[at..]).put_u64(self.offset.wrapping_add(n * self.step));
        }
        packet
    }
}

fn counted(packet: &mut Vec<u8>, text: &[u8]) {
    packet.put_u32(text.len() as u32);
    packet.put_slice(text);
}

/// The length field, which is not counted itself.
fn set_length(packet: &mut [u8]) {
    let length = packet.len() as u32 - 4;
    (&mut packet[..4]).put_u32(length);
}

/// A valid request, on the handles that were returned last most often.
fn request(u: &mut Unstructured, handles: &mut Vec<Bytes>) -> Chosen<Request> {
    let mut kind = *u.choose(&KINDS)?;
    if handles.is_empty() && matches!(kind, 4..=6 | 8 | 10 | 12) && !rarely(u, 8)? {
        kind = 3;
    }
    // A path, flags, attributes, a handle, an offset, a length, data, an extension's name.
    let fields = match kind {
        3 => "pfa",
        4 | 8 | 12 => "h",
        5 => "hol",
        6 => "hod",
        9 | 14 => "pa",
        10 => "ha",
        18 => "pp",
        200 => "epp",
        _ => "p",
    };
    let mut packet = vec![0, 0, 0, 0, kind, 0, 0, 0, 0];
    let (mut offset_at, mut offset, mut step) = (None, 0, 0);
    for field in fields.chars() {
        match field {
            'p' => counted(&mut packet, u.choose(&NAMES)?.as_bytes()),
            'h' if handles.is_empty() || rarely(u, 16)? => counted(&mut packet, b"1"),
            'h' => {
                let one = handles.len() - u.int_in_range(1..=handles.len().min(4))?;
                counted(&mut packet, &handles[one]);
                if kind == 4 && !rarely(u, 8)? {
                    handles.remove(one);
                }
            }
            'e' => counted(&mut packet, u.choose(&EXTENSIONS)?.as_bytes()),
            'f' => packet.put_u32(if rarely(u, 16)? {
                u.arbitrary()?
            } else {
                *u.choose(&FLAGS)?
            }),
            'a' if rarely(u, 2)? => packet.put_u32(0),
            'a' => {
                packet.put_u32(1);
                packet.put_u64(*u.choose(&[0, 1, 10, 1000, 300_000, u64::MAX])?);
            }
            'o' => {
                let edges = [REORDER_WINDOW, REORDER_WINDOW + 1, 5 * MIB, u64::MAX];
                (offset_at, offset) = (
                    Some(packet.len()),
                    *u.choose(&[0, 0, 0, 1, 10, 1000, 300_000])?,
                );
                if rarely(u, 4)? {
                    offset = *u.choose(&edges)?;
                }
                packet.put_u64(offset);
            }
            _ => {
                step = *u.choose(&[10, 0, 1, 100, 1000, 32_768, 100_000, 261_120])?;
                match field {
                    'l' => packet.put_u32(if rarely(u, 16)? {
                        u32::MAX
                    } else {
                        step as u32
                    }),
                    _ => counted(&mut packet, &noise(u, step)?),
                }
            }
        }
    }
    set_length(&mut packet);
    Ok(Request {
        packet,
        offset_at,
        offset,
        step,
    })
}

/// Spoils a packet. A wrong length can end the session.
fn spoil(u: &mut Unstructured, packet: &mut Vec<u8>) -> Chosen<()> {
    let at = u.choose_index(packet.len().min(48))?;
    match u.int_in_range(0..=31u8)? {
        0..=14 => {
            for byte in packet[at.max(5)..].iter_mut().take(4) {
                *byte = u.arbitrary()?;
            }
        }
        15..=19 => packet.truncate(at.max(9)),
        20..=24 => packet.resize(
            packet.len() + *u.choose(&[1, 4, 1000, MAX_PACKET - 4 - 9])?,
            1,
        ),
        25..=29 => packet[4] = u.arbitrary()?,
        30 => {
            let lengths = [
                0,
                4,
                5,
                9,
                MAX_PACKET as u32,
                MAX_PACKET as u32 + 1,
                u32::MAX,
            ];
            (&mut packet[..4]).put_u32(*u.choose(&lengths)?);
            return Ok(());
        }
        _ => {
            packet[u.int_in_range(0..=3)?] = u.arbitrary()?;
            return Ok(());
        }
    }
    set_length(packet);
    Ok(())
}

/// Every request has one reply, which fits it. Which reply belongs to which is known if the id was
/// used once.
fn assert_answered(requests: &[(u8, u32)], replies: &[(u8, u32)]) {
    let by_id = |all: &[(u8, u32)], named: u8| {
        let mut types: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
        let ids = all.iter().filter(|(kind, _)| *kind != named);
        ids.for_each(|(kind, id)| types.entry(*id).or_default().push(*kind));
        (types, all.iter().filter(|(kind, _)| *kind == named).count())
    };
    // INIT and VERSION have the version in the place of the id.
    let ((asked, inits), (answered, versions)) = (by_id(requests, INIT[4]), by_id(replies, 2));
    assert_eq!(versions, inits, "VERSION replies");
    assert!(
        answered.keys().all(|id| asked.contains_key(id)),
        "an id that no request had"
    );
    for (id, asked) in asked {
        let answered = answered.get(&id).map_or(&[][..], Vec::as_slice);
        assert_eq!(
            answered.len(),
            asked.len(),
            "replies {answered:?} to requests {asked:?} with the id {id}"
        );
        if let ([asked], [answered]) = (&asked[..], answered) {
            let suits = match asked {
                3 | 11 => *answered == 102,
                5 => *answered == 103,
                7 | 8 | 17 => *answered == 105,
                12 | 16 => *answered == 104,
                200 => matches!(answered, 104 | 201),
                _ => false,
            };
            assert!(
                suits || *answered == 101,
                "reply {answered} to request {asked}"
            );
        }
    }
}
