//! Writes, parts and objects.

use super::{Chosen, MIB, NOISE, noise, rarely, run};
use arbitrary::Unstructured;
use async_trait::async_trait;
use bytes::Bytes;
use sftpd::events::Teller;
use sftpd::store::s3::doubts::{Doubts, Requests, WRITE_ID};
use sftpd::store::{
    Attributes, Condition, CopySource, KeptConditions, Key, ListRequest, Object, Page, Part,
    PartSource,
};
use sftpd::store::{Limits, Result as Stored, Store, StoreError, Timeouts};
use sftpd::transfer::BufferPool;
use sftpd::transfer::{
    ANSWERED_AHEAD, MAX_HOLES, PartBuffer, PartSizes, REORDER_WINDOW, Reply, Target, Transfers,
    UploadSummary,
};
use sftpd::transfer::{Upload, UploadError};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard};
use std::{ops::Range, time::Duration, time::SystemTime};
use tokio::{sync::oneshot, time::sleep};

/// Of S3, in bytes.
const MIN_PART: u64 = 5 << 20;
/// Of S3.
const MAX_PARTS: u32 = 10_000;

/// A file as a plain file system has it.
#[derive(Default)]
struct Model {
    bytes: Vec<u8>,
    /// Ranges that were never written.
    holes: Vec<Range<u64>>,
}

impl Model {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Where the first hole begins, or the end.
    fn end(&self) -> u64 {
        self.holes
            .iter()
            .map(|hole| hole.start)
            .min()
            .unwrap_or(self.len())
    }

    fn write(&mut self, at: u64, data: &[u8]) {
        let to = at + data.len() as u64;
        if at > self.len() {
            self.holes.push(self.len()..at);
        }
        self.bytes.resize(self.bytes.len().max(to as usize), 0);
        self.bytes[at as usize..to as usize].copy_from_slice(data);
        self.keep(|hole| [hole.start..hole.end.min(at), hole.start.max(to)..hole.end]);
    }

    /// Fills the holes below this offset with zeros.
    fn fill(&mut self, to: u64) {
        self.bytes.resize(self.bytes.len().max(to as usize), 0);
        self.keep(|hole| [hole.start.max(to)..hole.end, 0..0]);
    }

    fn set_size(&mut self, size: u64) {
        if size > self.len() {
            self.holes.push(self.len()..size);
            self.bytes.resize(size as usize, 0);
            return;
        }
        self.bytes.truncate(size as usize);
        self.keep(|hole| [hole.start..hole.end.min(size), 0..0]);
    }

    /// Replaces each hole by what is left of it.
    fn keep(&mut self, rest: impl Fn(Range<u64>) -> [Range<u64>; 2]) {
        let all = std::mem::take(&mut self.holes).into_iter().flat_map(rest);
        self.holes = all.filter(|hole| hole.start < hole.end).collect();
    }

    fn slice(&self, from: u64, len: usize) -> &[u8] {
        let from = from.min(self.len()) as usize;
        &self.bytes[from..self.bytes.len().min(from + len)]
    }
}

/// Part sizes that are small, but follow the same rules as real ones.
fn small_parts(u: &mut Unstructured) -> Chosen<PartSizes> {
    let first = *u.choose(&[1000, 16, 100, 5000])?;
    Ok(PartSizes {
        first,
        cap: first * *u.choose(&[4, 1, 2])?,
        double_every: *u.choose(&[0, 1, 2, 5])?,
        ..PartSizes::default()
    })
}

/// An offset for a write: most often the end, often near it, sometimes anywhere.
fn offset(u: &mut Unstructured, start: u64, end: u64) -> Chosen<u64> {
    Ok(match u.int_in_range(0..=31u8)? {
        0..=13 => end,
        14..=16 => start,
        17..=23 => u.int_in_range(start..=end)?,
        24..=28 => end + u64::from(u.arbitrary::<u8>()?),
        29 => end + u64::from(u.arbitrary::<u16>()?),
        // From about here on the gap is filled with zeros, and what comes later is refused.
        30 => (end + REORDER_WINDOW + 3).saturating_sub(u.int_in_range(0..=6)?),
        _ => *u.choose(&[
            0,
            start.saturating_sub(1),
            u64::MAX,
            u64::MAX - REORDER_WINDOW,
        ])?,
    })
}

/// The part_buffer: its parts joined are the file, in order and of the right sizes; a refused call
/// changes nothing.
pub fn parts(data: &[u8]) {
    let _ = assemble(&mut Unstructured::new(data));
}

fn assemble(u: &mut Unstructured) -> Chosen<()> {
    let sizes = small_parts(u)?;
    let (mut part_buffer, mut model) =
        (PartBuffer::new(sizes, BufferPool::new(0)), Model::default());
    let (mut start, mut parts) = (0, 0);
    while !u.is_empty() {
        let end = model.end();
        match u.int_in_range(0..=7u8)? {
            0 if start == model.len() && parts < MAX_PARTS => {
                // Bytes that the store copies.
                let size = 1 + u64::from(u.arbitrary::<u16>()?);
                part_buffer.skip_part(size).unwrap();
                model.bytes.resize((end + size) as usize, 0);
                (start, parts) = (start + size, parts + 1);
            }
            0 | 1 => {
                let size = u.int_in_range(start.saturating_sub(2)..=model.len() + 2)?;
                let done = part_buffer.truncate(size);
                assert_eq!(
                    done,
                    (start..=end).contains(&size),
                    "{size} of {start}..{end}"
                );
                if done {
                    model.set_size(size);
                }
            }
            _ => {
                let at = offset(u, start, end)?;
                let len = 1 + u64::from(u.int_in_range(0..=2000u16)?);
                let data = noise(u, len)?;
                match part_buffer.write(at, &data) {
                    Ok(taken) => {
                        assert!(start <= at && at <= end + REORDER_WINDOW && parts < MAX_PARTS);
                        assert!(
                            taken as u64 == len
                                || at <= end && at + taken as u64 == start + sizes.of(parts + 1)
                        );
                        model.write(at, &data[..taken]);
                    }
                    Err(_) => assert!(
                        at < start || at > end + REORDER_WINDOW || parts == MAX_PARTS,
                        "{at}"
                    ),
                }
            }
        }
        while part_buffer.is_full() {
            assert_eq!(part_buffer.number(), Ok(parts + 1));
            let size = part_buffer.part_size();
            assert!(size == sizes.of(parts + 1) && size >= sizes.first);
            assert!(part_buffer.take_part().unwrap() == model.slice(start, size as usize));
            (start, parts) = (start + size, parts + 1);
        }
        assert_eq!(
            (
                part_buffer.start(),
                part_buffer.end(),
                part_buffer.written_end()
            ),
            (start, model.end(), model.len())
        );
        let (from, len) = (
            u.int_in_range(start.saturating_sub(1)..=model.len())?,
            u64::from(u.arbitrary::<u16>()?),
        );
        // What left in parts stays as it is; gaps are zeros.
        let mut expected = model.slice(from, len as usize).to_vec();
        let sent = (start.saturating_sub(from) as usize).min(expected.len());
        expected[..sent].fill(0);
        let mut found = vec![0; expected.len()];
        part_buffer.copy_to(from, &mut found);
        assert!(found == expected, "{len} bytes at {from}");
    }
    let ready = part_buffer.contiguous_len();
    assert_eq!(ready, model.end() - start);
    assert!(part_buffer.take_part().unwrap() == model.slice(start, ready as usize));
    Ok(())
}

/// An upload as a whole: what is stored is the file, or nothing is; no request fails without a
/// reason, all fail after the first, and the store sees only what S3 takes.
pub fn uploads(data: &[u8]) {
    let _ = run(upload(&mut Unstructured::new(data)));
}

async fn upload(u: &mut Unstructured<'_>) -> Chosen<()> {
    let mut sizes = small_parts(u)?;
    if rarely(u, 8)? {
        (sizes.cap, sizes.first) = (sizes.cap / sizes.first * MIN_PART, MIN_PART);
    }
    let old = match u.int_in_range(0..=7u8)? {
        0..=2 => None,
        3..=5 if sizes.first == MIN_PART => Some(*u.choose(&[
            2 * MIN_PART + 7,
            2 * MIN_PART - 1,
            2 * MIN_PART,
            MIN_PART,
            MIN_PART + 1,
        ])?),
        3 => Some(*u.choose(&[MIN_PART + 1, MIN_PART])?),
        _ => Some(u.arbitrary::<u16>()?.into()),
    };
    let old = old.map(|size| NOISE.slice(..size as usize));
    let (over, exclusive, cut_off) = (rarely(u, 4)?, rarely(u, 8)?, rarely(u, 8)?);
    let bucket = Arc::new(Bucket::choose(u, sizes, old.clone())?);
    // Opened without TRUNC, and not EXCL.
    let base = bucket
        .object()
        .filter(|_| !over && !exclusive)
        .map(|(_, object)| object);
    let model = Model {
        bytes: base
            .as_ref()
            .and(old.clone())
            .map_or_else(Vec::new, Vec::from),
        holes: Vec::new(),
    };

    let pool = BufferPool::new(sizes.cap.next_multiple_of(1024) * *u.choose(&[8, 4, 5])?);
    let context = Arc::new(Transfers::new(
        bucket.clone(),
        Timeouts::default(),
        pool,
        sizes,
    ));
    let tasks = context.tasks.clone();
    let summaries = Arc::new(Mutex::new(Vec::new()));
    let told = summaries.clone();
    let on_end = Box::new(move |summary: UploadSummary| {
        told.lock()
            .unwrap()
            .push(summary.result.map(|result| result.is_ok()))
    });
    let condition = match &base {
        _ if exclusive => Condition::Absent,
        Some(base) => Condition::Unchanged(base.etag.clone()),
        None => Condition::None,
    };
    let upload = Upload::open(
        context,
        Target {
            key: Bucket::key(),
            base,
            condition,
            events: Teller::default(),
            on_end,
        },
    );

    let mut writer = Writer {
        upload,
        bucket,
        model,
        failed: None,
    };
    while !u.is_empty() && writer.model.len() < 16 * MIB {
        match u.int_in_range(0..=15u8)? {
            0..=9 => writer.write(u, sizes).await?,
            10..=11 => writer.read(u).await?,
            12..=13 => writer.truncate(u).await?,
            _ => sleep(Duration::from_millis(20)).await,
        }
        if writer.failed.is_none() {
            assert_eq!(writer.upload.progress().size(), writer.model.len());
        }
    }
    let Writer {
        upload,
        bucket,
        model,
        failed,
    } = writer;
    let before = bucket.object();
    let close = async |upload: Upload| {
        if cut_off {
            None
        } else {
            Some(ask(|reply| upload.close(reply)).await)
        }
    };
    let closed = close(upload).await;
    tasks.close();
    tasks.wait().await;
    assert_eq!(
        *summaries.lock().unwrap(),
        [closed.as_ref().map(Result::is_ok)]
    );
    let state = bucket.state();
    assert!(
        state.upload.is_none() && state.in_flight == 0,
        "something half-done is left"
    );
    match closed {
        Some(Ok(())) => {
            assert!(failed.is_none(), "{failed:?}");
            assert!(
                state
                    .object
                    .as_ref()
                    .is_some_and(|(bytes, _)| *bytes == model.bytes),
                "other bytes were stored"
            );
        }
        Some(Err(error)) => {
            let why = error.to_string();
            let full = state.parts_begun == MAX_PARTS;
            assert!(
                state.struck || full || failed.is_some(),
                "no reason for: {why}"
            );
            assert!(failed.is_none_or(|first| first == why));
            // If the store's answers stay lost, the outcome is unknown.
            let in_doubt = bucket.fault.is_some_and(|fault| fault.lasting);
            assert!(
                in_doubt || !state.is_ours,
                "stored, and said to have failed: {why}"
            );
            assert!(
                state.is_ours || state.is_anothers || state.object == before,
                "the old object is gone: {why}"
            );
        }
        None => assert!(state.object == before, "stored without a CLOSE"),
    }
    Ok(())
}

async fn ask<T: Send + 'static, F: Future<Output = ()>>(
    begin: impl FnOnce(Reply<T>) -> F,
) -> Result<T, UploadError> {
    let (answer, answered) = oneshot::channel();
    begin(Box::new(move |result| drop(answer.send(result)))).await;
    let result = answered.await.expect("an answer");
    // Parts that were begun reach the store.
    tokio::task::yield_now().await;
    result
}

/// An upload, the file that it should be, and the failure that it has to remember.
struct Writer {
    upload: Upload,
    bucket: Arc<Bucket>,
    model: Model,
    failed: Option<String>,
}

impl Writer {
    async fn write(&mut self, u: &mut Unstructured<'_>, sizes: PartSizes) -> Chosen<()> {
        let (sent, end) = (self.bucket.state().sent, self.model.end());
        let append = rarely(u, 8)?;
        let at = if append {
            self.model.len()
        } else {
            offset(u, sent, end)?
        };
        let len = match u.int_in_range(0..=7u8)? {
            0..=3 => u.int_in_range(0..=sizes.first)?,
            4 => u.int_in_range(0..=5 * sizes.first)?,
            5 => sizes.of(1 + self.bucket.state().parts_begun),
            _ => u.arbitrary::<u8>()?.into(),
        };
        // What one WRITE of a client can bring, where it matters.
        let data = noise(
            u,
            if at > end {
                len.min(255 * 1024)
            } else {
                len.min(6 * MIB)
            },
        )?;
        // As a channel may have cut them.
        let mut rest = data.clone();
        let pieces = vec![rest.split_to(rest.len() / 3), rest];
        let result = ask(|reply| self.upload.write((!append).then_some(at), pieces, reply)).await;
        let state = self.bucket.state();
        let filled = if at > end + REORDER_WINDOW {
            at - ANSWERED_AHEAD
        } else {
            0
        };
        let too_far = filled.saturating_sub(end) > MAX_HOLES;
        let reason = at < state.sent_ever || too_far || state.parts_begun == MAX_PARTS;
        drop(state);
        if self.holds(result, reason) && !data.is_empty() {
            self.model.fill(filled);
            self.model.write(at, &data);
        }
        Ok(())
    }

    async fn read(&mut self, u: &mut Unstructured<'_>) -> Chosen<()> {
        let (sent, end) = (self.bucket.state().sent, self.model.end());
        let (at, len) = (
            offset(u, sent, end)?,
            1 + usize::from(u.arbitrary::<u16>()?),
        );
        match ask(|reply| self.upload.read(at, len, reply)).await {
            Err(error) => {
                let first = self
                    .failed
                    .as_ref()
                    .is_some_and(|first| *first == error.to_string());
                assert!(
                    first || at < sent || self.bucket.state().struck,
                    "no reason for: {error}"
                );
            }
            Ok(bytes) => {
                assert!(bytes == self.model.slice(at, len), "{len} bytes at {at}");
            }
        }
        Ok(())
    }

    async fn truncate(&mut self, u: &mut Unstructured<'_>) -> Chosen<()> {
        let (sent, len) = (self.bucket.state().sent, self.model.len());
        let size = if rarely(u, 4)? {
            0
        } else {
            u.int_in_range(sent.saturating_sub(2)..=len + 1)?
        };
        let must = size == 0 || size >= len || size >= sent && self.model.holes.is_empty();
        match ask(|reply| self.upload.truncate(size, reply)).await {
            Err(why @ (UploadError::SizeTooSmall { .. } | UploadError::SizeTooLarge)) => {
                assert!(!must && self.failed.is_none(), "{why}")
            }
            result if self.holds(result.clone(), false) => {
                assert!(size == 0 || size >= sent, "{size} of {sent} to {len}");
                self.model.set_size(size);
                if size == 0 {
                    self.bucket.state().sent_ever = 0;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Was it done? If not, there must be a reason, and nothing may be left in the store.
    fn holds(&mut self, result: Result<(), UploadError>, reason: bool) -> bool {
        let state = self.bucket.state();
        match (result, &self.failed) {
            (Ok(()), failed) => assert!(failed.is_none(), "done after a failure: {failed:?}"),
            (Err(error), Some(first)) => assert_eq!(error.to_string(), *first),
            (Err(error), None) => {
                assert!(reason || state.struck, "no reason for: {error}");
                assert!(
                    state.upload.is_none() && state.in_flight == 0,
                    "something half-done is left"
                );
                self.failed = Some(error.to_string());
            }
        }
        self.failed.is_none()
    }
}

/// S3 for one key: slow, strict about its requests, and now and then failing. Aborts always
/// succeed, as failing ones would test nothing more.
struct Bucket {
    sizes: PartSizes,
    /// How long each request takes in turn, in milliseconds.
    delays: [u8; 16],
    fault: Option<Fault>,
    state: Mutex<State>,
    doubts: Doubts,
}

#[derive(Clone, Copy)]
struct Fault {
    /// Strikes this request, counted from 1, or, if 0, the one that makes the object, …
    at: usize,
    /// … and all later ones.
    lasting: bool,
    /// The object is made all the same; otherwise another client makes one at that moment.
    carried_out: bool,
    /// The error then: the answer was lost, or the object exists already (for a request that was
    /// retried inside).
    error: fn(String) -> StoreError,
}

#[derive(Default)]
struct State {
    object: Option<(Bytes, Object)>,
    upload: Option<BTreeMap<u32, Bytes>>,
    /// Of the open upload.
    attributes: Attributes,
    requests: usize,
    /// Parts under way.
    in_flight: usize,
    /// Bytes and parts of the open upload, those under way included; and what they were before its
    /// abort.
    sent: u64,
    sent_ever: u64,
    parts_begun: u32,
    /// Whether a request was made to fail.
    struck: bool,
    /// Whether the stored object came from the upload, or from another client meanwhile.
    is_ours: bool,
    is_anothers: bool,
}

/// Equal content has the same.
fn etag_of(body: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    format!("\"{:016x}\"", hasher.finish())
}

fn object(bytes: Bytes, etag: String, attributes: &Attributes) -> (Bytes, Object) {
    let mut object = Object::new(bytes.len() as u64, etag, SystemTime::UNIX_EPOCH);
    object.write_id = attributes.metadata.get(WRITE_ID).cloned();
    object.attributes = Some(Arc::new(attributes.clone()));
    (bytes, object)
}

impl Bucket {
    fn choose(u: &mut Unstructured, sizes: PartSizes, old: Option<Bytes>) -> Chosen<Bucket> {
        let errors: [fn(String) -> StoreError; 3] =
            [StoreError::Other, StoreError::Unknown, |_| {
                StoreError::Precondition
            }];
        let which = u.choose_index(errors.len())?;
        let fault = Fault {
            at: u.int_in_range(0..=15u8)?.saturating_sub(5).into(),
            lasting: rarely(u, 3)?,
            // The first request fails without an effect.
            carried_out: which > 0 && rarely(u, 2)?,
            error: errors[which],
        };
        let object = old.map(|old| object(old.clone(), etag_of(&old), &Attributes::default()));
        let state = Mutex::new(State {
            object,
            ..State::default()
        });
        Ok(Bucket {
            sizes,
            fault: if rarely(u, 2)? { Some(fault) } else { None },
            delays: u.arbitrary()?,
            state,
            doubts: Doubts::default(),
        })
    }

    fn key() -> Key {
        Key::new("home/file").unwrap()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn object(&self) -> Option<(Bytes, Object)> {
        self.state().object.clone()
    }

    /// Waits for the time of a request, which fails if it is its turn.
    async fn request(&self, makes_object: bool) -> Option<Fault> {
        let number = self.state().requests + 1;
        self.state().requests = number;
        sleep(Duration::from_millis(self.delays[number % 16].into())).await;
        let mut state = self.state();
        let again = |fault: &Fault| fault.lasting && state.struck;
        let strikes =
            |fault: &Fault| number == fault.at || fault.at == 0 && makes_object || again(fault);
        let fault = self.fault.filter(strikes);
        state.struck |= fault.is_some();
        fault
    }

    async fn simple(&self) -> Stored<()> {
        self.request(false)
            .await
            .map_or(Ok(()), |fault| Err((fault.error)("fault".to_owned())))
    }

    fn read(&self, range: Range<u64>, etag: &str) -> Stored<Bytes> {
        let (bytes, object) = self.object().ok_or(StoreError::NotFound)?;
        assert!(
            range.start < range.end && range.end <= object.size && etag == object.etag,
            "{range:?}"
        );
        Ok(bytes.slice(range.start as usize..range.end as usize))
    }

    fn begin(&self, size: u64) {
        let mut state = self.state();
        (state.in_flight, state.parts_begun) = (state.in_flight + 1, state.parts_begun + 1);
        state.sent += size;
        state.sent_ever = state.sent;
    }

    async fn part(&self, number: u32, body: Bytes) -> Stored<Part> {
        let size = body.len() as u64;
        assert!((1..=MAX_PARTS).contains(&number) && size > 0);
        self.begin(size);
        let result = self.simple().await;
        self.state().in_flight -= 1;
        result?;
        let etag = etag_of(&body);
        let again = self
            .state()
            .upload
            .as_mut()
            .expect("a part of an upload that is over")
            .insert(number, body);
        assert!(again.is_none(), "part {number} twice");
        Ok(Part::new(number, size, etag))
    }

    /// The part that put and complete share.
    async fn store(
        &self,
        bytes: Bytes,
        etag: String,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Stored<String> {
        let answer = etag.clone();
        let fault = self.request(true).await;
        let mut state = self.state();
        let there = state.object.as_ref().map(|(_, object)| &object.etag);
        let holds = match condition {
            Condition::None => true,
            Condition::Absent => there.is_none(),
            Condition::Unchanged(etag) => there == Some(etag),
        };
        if !holds {
            state.struck = true;
            return Err(StoreError::Precondition);
        }
        if fault.is_none_or(|fault| fault.carried_out) {
            (state.object, state.upload, state.is_ours) =
                (Some(object(bytes, etag, attributes)), None, true);
        } else if fault
            .is_some_and(|fault| !matches!((fault.error)(String::new()), StoreError::Other(_)))
        {
            let other = Bytes::from(vec![0xFF; bytes.len()]);
            (state.object, state.is_anothers) = (
                Some(object(
                    other.clone(),
                    etag_of(&other),
                    &Attributes::default(),
                )),
                true,
            );
        }
        fault.map_or(Ok(answer), |fault| Err((fault.error)("fault".to_owned())))
    }
}

impl Requests for Bucket {
    async fn send_head(&self, _key: &Key) -> Stored<Object> {
        self.simple().await?;
        self.object()
            .map(|(_, object)| object)
            .ok_or(StoreError::NotFound)
    }

    async fn send_put(
        &self,
        _key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Stored<String> {
        let etag = etag_of(&body);
        self.store(body, etag, attributes, condition).await
    }

    async fn send_create_upload(&self, _key: &Key, attributes: &Attributes) -> Stored<String> {
        self.simple().await?;
        let mut state = self.state();
        state.attributes = attributes.clone();
        assert!(
            state.upload.replace(BTreeMap::new()).is_none(),
            "two uploads for one file"
        );
        (state.sent, state.parts_begun) = (0, 0);
        Ok("id".to_owned())
    }

    async fn send_complete(
        &self,
        _key: &Key,
        _id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Stored<String> {
        let sent = self.state().upload.clone().expect("an open upload");
        assert_eq!(
            self.state().in_flight,
            0,
            "completed before the last part was there"
        );
        assert!(
            parts
                .iter()
                .map(|part| part.number)
                .eq(1..=sent.len() as u32),
            "{parts:?}"
        );
        for (part, body) in parts.iter().zip(sent.values()) {
            let last = part.number == sent.len() as u32;
            assert_eq!(part.etag, etag_of(body));
            assert!(
                last || part.size >= self.sizes.first,
                "a part of {}",
                part.size
            );
            assert!(
                last || self.sizes.double_every > 0 || part.size == self.sizes.first,
                "unequal parts"
            );
        }
        let bodies: Vec<Bytes> = sent.into_values().collect();
        let attributes = self.state().attributes.clone();
        // No MD5 of the whole, as with S3.
        let etag = format!(
            "\"{}-{}\"",
            etag_of(&bodies.concat()).trim_matches('"'),
            parts.len()
        );
        self.store(bodies.concat().into(), etag, &attributes, condition)
            .await
    }

    async fn send_copy(
        &self,
        _from: CopySource<'_>,
        _to: &Key,
        _condition: &Condition,
    ) -> Stored<String> {
        unreachable!("uploads copy parts only")
    }

    async fn have_equal_checksums(&self, _keys: [&Key; 2], _versions: [&str; 2]) -> bool {
        unreachable!("uploads copy parts only")
    }
}

#[async_trait]
impl Store for Bucket {
    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        limits.copies_itself = true;
        limits.conditions = KeptConditions::ALL;
        limits
    }

    async fn head(&self, key: &Key) -> Stored<Object> {
        self.send_head(key).await
    }

    async fn get(&self, _key: &Key, range: Range<u64>, etag: &str) -> Stored<Vec<Bytes>> {
        self.simple().await?;
        Ok(vec![self.read(range, etag)?])
    }

    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Stored<Object> {
        let doubts = &self.doubts;
        doubts.put(self, key, body, attributes, condition).await
    }

    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> Stored<String> {
        self.doubts.create_upload(self, key, attributes).await
    }

    async fn upload_part(&self, _key: &Key, _id: &str, number: u32, body: Bytes) -> Stored<Part> {
        self.part(number, body).await
    }

    async fn copy_part(
        &self,
        _key: &Key,
        _id: &str,
        number: u32,
        from: PartSource<'_>,
    ) -> Stored<Part> {
        assert!(
            self.object()
                .is_some_and(|(_, object)| object.size > MIN_PART),
            "S3 copies no part of a small object"
        );
        let body = self.read(from.range, from.etag)?;
        self.part(number, body).await
    }

    async fn complete(
        &self,
        key: &Key,
        id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Stored<Object> {
        self.doubts.complete(self, key, id, parts, condition).await
    }

    async fn abort(&self, _key: &Key, _id: &str) -> Stored<()> {
        let mut state = self.state();
        assert_eq!(
            state.in_flight, 0,
            "a part that arrives after the abort stays for ever"
        );
        (state.upload, state.sent) = (None, 0);
        Ok(())
    }

    async fn delete(&self, _key: &Key, _condition: &Condition) -> Stored<()> {
        unreachable!("uploads delete nothing")
    }

    async fn list(&self, _request: ListRequest<'_>) -> Stored<Page> {
        unreachable!("uploads list nothing")
    }
}
