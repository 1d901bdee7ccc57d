//! The hot parts alone, without a network: `cargo bench --bench micro` compares them with
//! the figures that `-- --save` has saved before.
//!
//! A session is measured without SSH: packets go in, in messages of 32 KiB, and replies come out.
//! One thread does all of it and the best of many runs counts, so that the figures hardly change
//! unless the code does.

// A panic is how this fails.
#![allow(clippy::restriction, missing_docs)]

use bytes::{BufMut, Bytes, BytesMut};
use sftpd::sftp::{self, End, Received, Sink, Source};
use sftpd::store::memory::MemoryStore;
use sftpd::transfer::BufferPool;
use sftpd::transfer::{PartBuffer, PartSizes};
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};
use std::{fs, hint::black_box, sync::Arc};

#[path = "../tests/support/session.rs"]
mod session;

const MIB: usize = 1024 * 1024;
/// Bytes of one transfer.
const FILE: usize = 64 * MIB;
/// Small requests in one run.
const COUNT: usize = 20_000;
const RUNS: usize = 15;
/// Bytes of a channel message, as russh hands them over.
const MESSAGE: usize = 32 * 1024;

const INIT: u8 = 1;
const OPEN: u8 = 3;
const CLOSE: u8 = 4;
const READ: u8 = 5;
const WRITE: u8 = 6;
const OPENDIR: u8 = 11;
const READDIR: u8 = 12;
const REALPATH: u8 = 16;
const STAT: u8 = 17;
/// The first handle that a session hands out.
const HANDLE: &[u8] = b"1";
const TO_READ: u32 = 1;
const TO_WRITE: u32 = 2 | 8 | 16;

/// What a client sends from INIT on.
struct Script(BytesMut);

impl Script {
    fn new() -> Script {
        let mut script = Script(BytesMut::new());
        script.packet(INIT, 3, |_| {});
        script
    }

    fn packet(&mut self, kind: u8, id: u32, rest: impl FnOnce(&mut BytesMut)) {
        let begin = self.0.len();
        self.0.put_u32(0);
        self.0.put_u8(kind);
        self.0.put_u32(id);
        rest(&mut self.0);
        let length = (self.0.len() - begin - 4) as u32;
        self.0[begin..begin + 4].copy_from_slice(&length.to_be_bytes());
    }

    fn open(mut self, flags: u32) -> Script {
        self.packet(OPEN, 1, |out| {
            string(out, b"/file");
            out.put_u32(flags);
            out.put_u32(0);
        });
        self
    }

    fn close(mut self) -> Script {
        self.packet(CLOSE, 2, |out| string(out, HANDLE));
        self
    }

    /// The script as channel messages.
    fn messages(self) -> Vec<Bytes> {
        let all = self.0.freeze();
        (0..all.len())
            .step_by(MESSAGE)
            .map(|at| all.slice(at..all.len().min(at + MESSAGE)))
            .collect()
    }

    fn upload(block: usize) -> Vec<Bytes> {
        let mut script = Script::new().open(TO_WRITE);
        let data = vec![7; block];
        for at in (0..FILE).step_by(block) {
            script.packet(WRITE, 9, |out| {
                string(out, HANDLE);
                out.put_u64(at as u64);
                string(out, &data[..block.min(FILE - at)]);
            });
        }
        script.close().messages()
    }

    fn download(block: usize) -> Vec<Bytes> {
        let mut script = Script::new().open(TO_READ);
        for at in (0..FILE).step_by(block) {
            script.packet(READ, at as u32, |out| {
                string(out, HANDLE);
                out.put_u64(at as u64);
                out.put_u32(block as u32);
            });
        }
        script.messages()
    }

    fn paths(kind: u8, path: &[u8]) -> Vec<Bytes> {
        let mut script = Script::new();
        for id in 0..COUNT {
            script.packet(kind, id as u32, |out| string(out, path));
        }
        script.messages()
    }

    fn empty_files(count: usize) -> Vec<Bytes> {
        let mut script = Script::new();
        for n in 1..=count {
            script.packet(OPEN, 1, |out| {
                string(out, format!("/many/file-{n}").as_bytes());
                out.put_u32(TO_WRITE);
                out.put_u32(0);
            });
            script.packet(CLOSE, 2, |out| string(out, format!("{n:x}").as_bytes()));
        }
        script.messages()
    }

    fn listing(count: usize) -> Vec<Bytes> {
        let mut script = Script::new();
        script.packet(OPENDIR, 1, |out| string(out, b"/many"));
        for id in 0..count / 50 {
            script.packet(READDIR, id as u32, |out| string(out, HANDLE));
        }
        script.messages()
    }
}

fn string(out: &mut BytesMut, text: &[u8]) {
    out.put_u32(text.len() as u32);
    out.put_slice(text);
}

/// The messages of a channel, and whether their end was told.
struct Messages(VecDeque<Bytes>, bool);

impl Source for Messages {
    async fn next(&mut self) -> Received {
        // As a channel does, so that replies get their turn.
        tokio::task::yield_now().await;
        match self.0.pop_front() {
            Some(bytes) => Received::Data(bytes),
            None if std::mem::replace(&mut self.1, true) => std::future::pending().await,
            None => Received::Eof,
        }
    }
}

struct Discard;

impl Sink for Discard {
    async fn send(&mut self, bytes: Bytes) -> bool {
        black_box(bytes);
        true
    }
}

/// Runs a whole session; how long it took.
fn run_session(store: &Arc<MemoryStore>, messages: &[Bytes]) -> Duration {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (settings, _tasks) = session::settings(store.clone(), "home", 256 * MIB as u64);
    let source = Messages(messages.to_vec().into(), false);
    runtime.block_on(async {
        let began = Instant::now();
        let end = sftp::serve(source, Discard, settings).await;
        assert!(matches!(end, End::Closed), "{end}");
        began.elapsed()
    })
}

fn filled(messages: &[Bytes]) -> Arc<MemoryStore> {
    let store = Arc::default();
    run_session(&store, messages);
    store
}

/// Assembles a file in order, or with the blocks of each pair swapped.
fn assemble(block: usize, swapped: bool) -> Duration {
    let data = vec![7; block];
    let mut part_buffer = PartBuffer::new(PartSizes::default(), BufferPool::new(64 << 20));
    let began = Instant::now();
    for n in 0..FILE / block {
        let mut at = ((n ^ usize::from(swapped)) * block) as u64;
        let mut rest = &data[..];
        while !rest.is_empty() {
            if part_buffer.is_full() {
                black_box(part_buffer.take_part().unwrap());
            }
            let taken = part_buffer.write(at, rest).unwrap();
            (at, rest) = (at + taken as u64, &rest[taken..]);
        }
    }
    began.elapsed()
}

/// Compares figures with those saved before, or saves them.
struct Report {
    before: HashMap<String, f64>,
    lines: Vec<String>,
}

impl Report {
    const FILE: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/micro");

    fn load() -> Report {
        let saved = fs::read_to_string(Report::FILE).unwrap_or_default();
        let pairs = saved.lines().filter_map(|line| line.rsplit_once('\t'));
        Report {
            before: pairs
                .filter_map(|(name, time)| Some((name.to_owned(), time.parse().ok()?)))
                .collect(),
            lines: Vec::new(),
        }
    }

    /// Runs something and shows the time for each of `count` things, or MiB a second if they are
    /// bytes.
    fn add(&mut self, name: &str, count: usize, mut run: impl FnMut() -> Duration) {
        let best = (0..RUNS).map(|_| run()).min().unwrap().as_secs_f64();
        let shown = match count {
            FILE => format!("{:>9.0} MiB/s", (FILE / MIB) as f64 / best),
            _ => format!("{:>9.0} ns each", best * 1e9 / count as f64),
        };
        let change = self
            .before
            .get(name)
            .map(|before| format!("{:+.1} % time", (best / before - 1.0) * 100.0));
        println!("{name:44}{shown}   {}", change.unwrap_or_default());
        self.lines.push(format!("{name}\t{best}\n"));
    }
}

fn main() {
    let mut report = Report::load();
    report.add("part_buffer: 32 KiB blocks", FILE, || {
        assemble(32 * 1024, false)
    });
    report.add("part_buffer: 32 KiB blocks, pairs swapped", FILE, || {
        assemble(32 * 1024, true)
    });
    for (name, block) in [
        ("255 KiB", 255 * 1024),
        ("32 KiB", 32 * 1024),
        ("4 KiB", 4096),
    ] {
        let upload = Script::upload(block);
        report.add(&format!("session: upload, WRITEs of {name}"), FILE, || {
            run_session(&Arc::default(), &upload)
        });
    }
    let store = filled(&Script::upload(32 * 1024));
    for (name, block) in [("255 KiB", 255 * 1024), ("32 KiB", 32 * 1024)] {
        let download = Script::download(block);
        report.add(&format!("session: download, READs of {name}"), FILE, || {
            run_session(&store, &download)
        });
    }
    for (name, script) in [
        (
            "session: REALPATH",
            Script::paths(REALPATH, b"/some/./folder/../file"),
        ),
        ("session: STAT", Script::paths(STAT, b"/file")),
    ] {
        report.add(name, COUNT, || run_session(&store, &script));
    }
    let store = filled(&Script::empty_files(10_000));
    let listing = Script::listing(10_000);
    report.add("session: entries of a directory", 10_000, || {
        run_session(&store, &listing)
    });
    if std::env::args().any(|argument| argument == "--save") {
        fs::write(Report::FILE, report.lines.concat()).unwrap();
    }
}
