//! The fault matrix: every S3 operation of a request fails in every way that S3 and the network
//! know, on the first, the last and every call. Each time the client's status and the bucket must
//! agree, nothing half-done may be left, and the server must go on working.
//!
//! `cargo test --test faults -- --nocapture` prints the table.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use aws_sdk_s3::config::retry::{RetryConfig, RetryPartition, TokenBucket};
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{AsyncSleep, Sleep};
use bytes::Bytes;
use russh_sftp::protocol::{FileAttributes, OpenFlags, StatusCode};
use sftpd::store::{Store, Timeouts};
use sftpd::transfer::PartSizes;
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use support::process::Process;
use support::s3::{FakeS3, Fault, When};
use support::*;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

/// Bytes of a part: few, so that a file of several parts takes little time.
const PART: usize = 64 * 1024;
/// How long the store's client waits for an answer; see [`Impatience`].
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the server waits if the body of an answer stops half-way, which only the real clock can
/// detect.
const STALLED: Duration = Duration::from_secs(3);
/// Cells that run at once.
const AT_ONCE: usize = 16;
/// Fewer cells would mean that a request is no longer sent, or no longer struck by its fault.
const MIN_CELLS: usize = 2000;
/// The same of those on a store whose ETags are no MD5.
const MIN_CELLS_OF_CHANCE: usize = 500;

/// What a client does. `InDoubt` and `Refused` fail even without the fault of a cell: there the
/// fault strikes the requests that decide the outcome or clean up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Scenario {
    PutSmall,
    PutExcl,
    PutSmallInDoubt,
    PutLarge,
    PutLargeInDoubt,
    PutLargeRefused,
    PutLargeCutOff,
    AppendSmall,
    AppendLarge,
    Truncate,
    GetSmall,
    GetLarge,
    Stat,
    List,
    MakeDirectory,
    RemoveDirectory,
    Remove,
    Rename,
    Replace,
    RenameOfParts,
    ReplaceByParts,
    RenameInParts,
    ReplaceInParts,
    RenameInPartsRefused,
    RenameDirectory,
    RenameDirectoryRefused,
}

use Scenario::*;

const SCENARIOS: [(Scenario, &str); 26] = [
    (PutSmall, "put small, over an old file"),
    (PutExcl, "put small, EXCL"),
    (PutSmallInDoubt, "put small, its answers lost"),
    (PutLarge, "put large (6 parts), over an old file"),
    (PutLargeInDoubt, "put large, the last answers lost"),
    (PutLargeRefused, "put large, refused at the end"),
    (PutLargeCutOff, "put large, client gone before CLOSE"),
    (AppendSmall, "append to a small file"),
    (AppendLarge, "append to a large file"),
    (Truncate, "truncate"),
    (GetSmall, "get small"),
    (GetLarge, "get large (several ranges)"),
    (Stat, "stat of a file and of a directory"),
    (List, "list of a directory (3 pages)"),
    (MakeDirectory, "mkdir"),
    (RemoveDirectory, "rmdir of a marker"),
    (Remove, "remove"),
    (Rename, "rename of a file"),
    (Replace, "posix-rename over a file"),
    (RenameOfParts, "rename of a file put in parts"),
    (ReplaceByParts, "posix-rename of a file put in parts"),
    (RenameInParts, "rename over the copy limit"),
    (ReplaceInParts, "posix-rename over the copy limit"),
    (RenameInPartsRefused, "rename over the copy limit, refused"),
    (RenameDirectory, "rename of a directory (21 keys)"),
    (
        RenameDirectoryRefused,
        "rename of a directory, last copy refused",
    ),
];

type Objects = BTreeMap<String, Bytes>;

fn small() -> Bytes {
    Bytes::from_static(b"a hundred bytes or so")
}

/// Six parts.
fn large() -> Bytes {
    static LARGE: OnceLock<Bytes> = OnceLock::new();
    LARGE.get_or_init(|| noise(5 * PART + 1000, 1)).clone()
}

/// Long enough for S3 to copy ranges of it.
fn base() -> Bytes {
    static BASE: OnceLock<Bytes> = OnceLock::new();
    BASE.get_or_init(|| noise(5 * MIB + 1000, 2)).clone()
}

/// More than a part.
fn added() -> Bytes {
    static ADDED: OnceLock<Bytes> = OnceLock::new();
    ADDED.get_or_init(|| noise(PART + 5000, 3)).clone()
}

fn listed() -> Vec<String> {
    (0..2_050).map(|n| format!("{n:04}")).collect()
}

impl Scenario {
    /// Fills the bucket.
    async fn prepare(self, s3: &FakeS3, client: &Client) {
        s3.set_min_part(1);
        s3.put("alice/other", "another client's");
        match self {
            PutExcl | MakeDirectory => {}
            PutSmall | PutSmallInDoubt | PutLarge | PutLargeInDoubt | PutLargeRefused
            | PutLargeCutOff | AppendSmall | Truncate | GetSmall | Remove => {
                s3.put("alice/f", "what was there before")
            }
            AppendLarge => s3.put("alice/f", base()),
            GetLarge => s3.put("alice/f", noise(2 * MIB, 4)),
            Stat => ["alice/f", "alice/d/f"]
                .into_iter()
                .for_each(|key| s3.put(key, small())),
            List => listed()
                .iter()
                .for_each(|name| s3.put(&format!("alice/d/{name}"), name.clone())),
            RemoveDirectory => s3.put("alice/d/", ""),
            Rename | Replace => s3.put("alice/f", small()),
            RenameOfParts | ReplaceByParts => client.put("/f", &large()).await.unwrap(),
            RenameInParts | ReplaceInParts | RenameInPartsRefused => s3.put("alice/f", large()),
            RenameDirectory | RenameDirectoryRefused => {
                (0..20).for_each(|n| s3.put(&format!("alice/f/{n:02}"), format!("file {n}")));
                s3.put("alice/f/deeper/one", "one more");
            }
        }
        if matches!(self, Replace | ReplaceByParts | ReplaceInParts) {
            s3.put("alice/g", "replaced");
        }
        if matches!(self, RenameInParts | ReplaceInParts | RenameInPartsRefused) {
            s3.set_copy_limit(10);
        }
    }

    /// A fault besides that of the cell, so that there is something to decide or to clean up.
    fn trouble(self) -> Option<(&'static str, When, Fault)> {
        let refused = Fault::Status(403, "AccessDenied");
        match self {
            PutSmallInDoubt => Some(("PutObject", When::Every, Fault::LostAnswer)),
            PutLargeInDoubt => Some(("CompleteMultipartUpload", When::Every, Fault::LostAnswer)),
            PutLargeRefused => Some(("CompleteMultipartUpload", When::Every, refused)),
            RenameInPartsRefused => Some(("UploadPartCopy", When::Every, refused)),
            RenameDirectoryRefused => Some(("CopyObject", When::Nth(21), refused)),
            _ => None,
        }
    }

    /// Does it. True if the client got exactly what it asked for.
    async fn act(self, store: &Arc<dyn Store>, client: &Client) -> Result<bool, Failed> {
        let create = OpenFlags::WRITE | OpenFlags::CREATE;
        let append = OpenFlags::WRITE | OpenFlags::APPEND;
        match self {
            PutSmall | PutSmallInDoubt => put(client, PUT, 0, &small()).await?,
            PutExcl => put(client, create | OpenFlags::EXCLUDE, 0, &small()).await?,
            PutLarge | PutLargeInDoubt | PutLargeRefused => put(client, PUT, 0, &large()).await?,
            PutLargeCutOff => {
                let mut server = serve(store, Timeouts::default().open).await;
                let client = server.client().await;
                let handle = client.open("/f", PUT).await?;
                // A part that failed may or may not be reported before the client goes.
                let _ = client.write(&handle, 0, &large()).await;
                drop(client);
                server.drain.cancel();
                (&mut server.task).await.unwrap();
            }
            AppendSmall | AppendLarge => put(client, append, 0, &added()).await?,
            Truncate => {
                let empty = FileAttributes {
                    size: Some(0),
                    ..Default::default()
                };
                drop(client.sftp.setstat("/f", empty).await?);
            }
            GetSmall => return Ok(client.get("/f").await? == b"what was there before"),
            GetLarge => return Ok(client.get("/f").await? == noise(2 * MIB, 4)),
            Stat => {
                return Ok(
                    client.size("/f").await? == small().len() as u64 && client.is_dir("/d").await?
                );
            }
            List => {
                return Ok(client.list("/d").await?
                    == listed()
                        .iter()
                        .map(|n| format!("{n} 4"))
                        .collect::<Vec<_>>());
            }
            MakeDirectory => drop(client.mkdir("/d").await?),
            RemoveDirectory => drop(client.sftp.rmdir("/d").await?),
            Remove => drop(client.sftp.remove("/f").await?),
            Replace | ReplaceByParts | ReplaceInParts => client.posix_rename("/f", "/g").await?,
            _ => drop(client.sftp.rename("/f", "/g").await?),
        }
        Ok(true)
    }

    /// The bucket after success.
    fn done(self, before: &Objects) -> Objects {
        let mut after = before.clone();
        let mut set = |body| drop(after.insert("alice/f".to_owned(), body));
        match self {
            PutSmall | PutExcl | PutSmallInDoubt => set(small()),
            PutLarge | PutLargeInDoubt | PutLargeRefused => set(large()),
            AppendSmall | AppendLarge => set([&before["alice/f"][..], &added()].concat().into()),
            Truncate => set(Bytes::new()),
            RemoveDirectory => drop(after.remove("alice/d/")),
            Remove => drop(after.remove("alice/f")),
            PutLargeCutOff | GetSmall | GetLarge | Stat | List | MakeDirectory => {}
            _ => {
                let (moved, mut stays): (Objects, Objects) = before
                    .clone()
                    .into_iter()
                    .partition(|(key, _)| key.starts_with("alice/f"));
                stays.extend(
                    moved
                        .into_iter()
                        .map(|(key, body)| (key.replacen("alice/f", "alice/g", 1), body)),
                );
                after = stays;
            }
        }
        after
    }

    /// Whether the session's view agrees with the status, where the bucket does not tell.
    async fn seen(self, client: &Client, told: bool) -> bool {
        match self {
            MakeDirectory => client.is_dir("/d").await.is_ok() == told,
            RemoveDirectory => client.is_dir("/d").await.is_ok() != told,
            _ => true,
        }
    }

    /// Failures that can't be distinguished from success, or can't be undone: the client gets an
    /// error although something was done. Then every object must be whole, old or new, and nothing
    /// may be lost.
    fn may_end_half_way(self, cell: &Cell) -> bool {
        match (self, cell.op.as_str()) {
            // Without HEAD it is unknown whose object is there.
            (PutSmallInDoubt | PutLargeInDoubt, "HeadObject") => true,
            // Copies are there, sources stay.
            (
                Rename | Replace | RenameOfParts | ReplaceByParts | RenameInParts | ReplaceInParts
                | RenameDirectory,
                "DeleteObject" | "HeadObject",
            ) => true,
            // Every source is there, copies stay.
            (RenameDirectoryRefused, "DeleteObject" | "HeadObject") => true,
            _ => false,
        }
    }
}

async fn put(client: &Client, flags: OpenFlags, at: usize, data: &[u8]) -> Result<(), Failed> {
    let handle = client.open("/f", flags).await?;
    let written = client.write(&handle, at as u64, data).await;
    let closed = client.close(&handle).await;
    assert!(
        written.is_ok() || closed.is_err(),
        "CLOSE says OK after {written:?}"
    );
    closed
}

async fn serve(store: &Arc<dyn Store>, open_timeout: Duration) -> Server {
    let sizes = PartSizes {
        first: PART as u64,
        cap: PART as u64,
        double_every: 1000,
        ..PartSizes::default()
    };
    Server::with(store.clone(), |builder| {
        builder.part_sizes(sizes).open_timeout(open_timeout)
    })
    .await
}

/// The clock of the SDK: [`PATIENCE`] ends as soon as every request under way hangs, and not
/// before. So no cell waits for a timeout, and even on a slow machine no request times out that
/// would be answered.
#[derive(Clone, Debug, Default)]
struct Impatience(Arc<watch::Sender<UnderWay>>);

#[derive(Debug, Default)]
struct UnderWay {
    requests: usize,
    hanging: usize,
    /// How often all of them have timed out.
    given_up: usize,
}

impl Impatience {
    fn change(&self, change: impl FnOnce(&mut UnderWay)) {
        self.0.send_modify(|state| {
            change(state);
            if state.hanging > 0 && state.hanging >= state.requests {
                (state.hanging, state.given_up) = (0, state.given_up + 1);
            }
        });
    }
}

/// A request under way.
struct Waiting(Impatience);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.change(|state| state.requests -= 1);
    }
}

impl AsyncSleep for Impatience {
    fn sleep(&self, time: Duration) -> Sleep {
        if time != PATIENCE {
            return Sleep::new(tokio::time::sleep(time));
        }
        self.change(|state| state.requests += 1);
        let waiting = Waiting(self.clone());
        let mut changes = self.0.subscribe();
        let before = changes.borrow().given_up;
        Sleep::new(async move {
            drop(changes.wait_for(|state| state.given_up > before).await);
            drop(waiting);
        })
    }
}

trait Kind {
    fn applies_to(&self, op: &str) -> bool;
    fn answer_is_lost(&self) -> bool;
    fn is_transient(&self) -> bool;
}

impl Kind for Fault {
    fn applies_to(&self, op: &str) -> bool {
        let sends_body = ["PutObject", "UploadPart", "CompleteMultipartUpload"].contains(&op);
        let copies = ["CopyObject", "UploadPartCopy"].contains(&op);
        let answers = [
            "GetObject",
            "ListObjectsV2",
            "CreateMultipartUpload",
            "CompleteMultipartUpload",
        ]
        .contains(&op);
        match self {
            Fault::ResetMidRequest => sends_body,
            Fault::ResetMidBody | Fault::HangMidBody => answers || copies,
            Fault::ErrorBody => copies || op == "CompleteMultipartUpload",
            Fault::TruncatedXml => copies || (answers && op != "GetObject"),
            Fault::WithoutETag => sends_body || copies || ["HeadObject", "GetObject"].contains(&op),
            _ => true,
        }
    }

    fn answer_is_lost(&self) -> bool {
        matches!(
            self,
            Fault::LostAnswer
                | Fault::HangAfter
                | Fault::ResetMidBody
                | Fault::HangMidBody
                | Fault::WithoutETag
                | Fault::TruncatedXml
        )
    }

    /// Another try may succeed.
    fn is_transient(&self) -> bool {
        !matches!(self, Fault::Status(403, _) | Fault::HtmlStatus(301 | 404))
    }
}

fn faults() -> [Fault; 18] {
    [
        Fault::Status(500, "InternalError"),
        Fault::Status(503, "SlowDown"),
        Fault::Status(403, "AccessDenied"),
        Fault::ResetBefore,
        Fault::ResetMidRequest,
        Fault::ResetMidBody,
        Fault::LostAnswer,
        Fault::Hang,
        Fault::HangAfter,
        Fault::HangMidBody,
        Fault::ErrorBody,
        Fault::Empty,
        Fault::Html,
        Fault::HtmlStatus(429),
        Fault::HtmlStatus(301),
        Fault::HtmlStatus(404),
        Fault::WithoutETag,
        Fault::TruncatedXml,
    ]
}

/// What the store makes ETags of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ETags {
    /// MD5 sums.
    Content,
    /// Chance, as under SSE-KMS and SSE-C: they don't tell whether a request with a lost answer was
    /// carried out.
    Chance,
}

/// One fault in one scenario.
#[derive(Clone, Debug)]
struct Cell {
    op: String,
    fault: Fault,
    when: When,
}

impl Cell {
    /// One call fails, and may succeed when it is tried again.
    fn is_transient(&self) -> bool {
        self.fault.is_transient() && matches!(self.when, When::Nth(_))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    /// The client was told OK, and the result is exact.
    Done,
    /// The client was told of an error, and the old state is unchanged.
    Refused,
    /// See [`Scenario::may_end_half_way`].
    HalfWay,
    /// Must not happen.
    False(String),
}

struct Report {
    outcome: Outcome,
    /// Multipart uploads that are left.
    left: usize,
    /// How many requests of each operation the scenario sent.
    calls: BTreeMap<String, usize>,
    /// Whether the fault struck a request.
    struck: bool,
}

/// Every object is whole, old or new, and the content of every object to be kept or made is
/// somewhere.
fn nothing_lost(before: &Objects, done: &Objects, now: &Objects) -> bool {
    let known = |body| before.values().chain(done.values()).any(|b| b == body);
    let elsewhere = |body| {
        before
            .iter()
            .any(|(key, b)| b == body && now.get(key) == Some(b))
    };
    now.values().all(known)
        && done
            .iter()
            .all(|(key, body)| now.get(key) == Some(body) || elsewhere(body))
}

fn differences(want: &Objects, now: &Objects) -> String {
    let changed = want
        .iter()
        .filter(|(key, body)| now.get(*key) != Some(body))
        .map(|(key, _)| key);
    let more = now.keys().filter(|key| !want.contains_key(*key));
    format!(
        "missing or changed: {:?}, not expected: {:?}",
        changed.collect::<Vec<_>>(),
        more.collect::<Vec<_>>()
    )
}

async fn run(scenario: Scenario, etags: ETags, cell: Option<Cell>) -> Report {
    let s3 = FakeS3::start().await;
    if etags == ETags::Chance {
        s3.encrypt();
    }
    let stalls = |cell: &Cell| cell.op == "GetObject" && matches!(cell.fault, Fault::HangMidBody);
    let by_the_clock = cell.as_ref().is_some_and(stalls);
    let open_timeout = match by_the_clock {
        true => STALLED,
        false => Timeouts::default().open,
    };
    let (impatience, mut hanging) = (Impatience::default(), s3.hanging());
    let told = impatience.clone();
    let telling = async move {
        let mut before = 0;
        while hanging.changed().await.is_ok() {
            let now = *hanging.borrow_and_update();
            told.change(|state| state.hanging += now - before);
            before = now;
        }
    };
    let _telling = (!by_the_clock).then(|| AbortOnDropHandle::new(tokio::spawn(telling)));
    let pause = Duration::from_millis(1);
    let store = s3_store_with(&s3, |config| {
        let retry = RetryConfig::standard()
            .with_max_attempts(3)
            .with_initial_backoff(pause)
            .with_max_backoff(pause);
        let timeouts = TimeoutConfig::builder()
            .operation_attempt_timeout(PATIENCE)
            .disable_read_timeout();
        config
            .retry_config(retry)
            // As the server sets it: else all clients of the process share a number of tries.
            .retry_partition(
                RetryPartition::custom("test")
                    .token_bucket(TokenBucket::unlimited())
                    .build(),
            )
            .timeout_config(timeouts.build())
            .sleep_impl(impatience.clone())
    });
    let mut server = serve(&store, open_timeout).await;
    let client = server.client().await;
    scenario.prepare(&s3, &client).await;
    let before = s3.snapshot();
    let done = scenario.done(&before);
    s3.reset();
    if let Some(Cell { op, fault, when }) = &cell {
        s3.fault(op, *when, fault.clone());
    }
    if let Some((op, when, fault)) = scenario.trouble() {
        s3.fault(op, when, fault);
    }
    let told = scenario.act(&store, &client).await;
    let (now, left, requests) = (s3.snapshot(), s3.uploads(), s3.requests());
    let struck = cell.as_ref().is_some_and(|cell| s3.struck(&cell.op) > 0);
    s3.clear_faults();
    let mut outcome = match &told {
        Ok(true) if now == done => Outcome::Done,
        Ok(true) => Outcome::False(format!(
            "the client was told OK; {}",
            differences(&done, &now)
        )),
        Ok(false) => Outcome::False("the client was told OK and got something else".to_owned()),
        Err(Failed(StatusCode::NoSuchFile, why)) => {
            Outcome::False(format!("said not to be there: {why}"))
        }
        Err(_) if now == before => Outcome::Refused,
        Err(failed)
            if cell
                .as_ref()
                .is_some_and(|cell| !cell.is_transient() && scenario.may_end_half_way(cell)) =>
        {
            match nothing_lost(&before, &done, &now) {
                true => Outcome::HalfWay,
                false => Outcome::False(format!(
                    "{failed:?}, and something is lost; {}",
                    differences(&before, &now)
                )),
            }
        }
        Err(failed) => Outcome::False(format!("{failed:?}, yet {}", differences(&before, &now))),
    };
    let calls = requests
        .into_iter()
        .fold(BTreeMap::new(), |mut calls, request| {
            *calls.entry(request.op).or_default() += 1;
            calls
        });
    if !matches!(outcome, Outcome::False(_)) && !scenario.seen(&client, told.is_ok()).await {
        outcome = Outcome::False(format!("{told:?}, and the session sees something else"));
    }
    // The server must go on working: repeat what failed, or do something else.
    let again = match &outcome {
        Outcome::Done => client
            .put("/other", b"another client's")
            .await
            .map(|()| true),
        Outcome::Refused => scenario.act(&store, &client).await,
        Outcome::HalfWay if matches!(scenario, RenameDirectory | RenameDirectoryRefused) => {
            Ok(true)
        }
        Outcome::HalfWay if done.contains_key("alice/g") => {
            client.posix_rename("/f", "/g").await.map(|()| true)
        }
        Outcome::HalfWay => scenario.act(&store, &client).await,
        Outcome::False(_) => Ok(true),
    };
    drop(client);
    server.drain.cancel();
    (&mut server.task).await.unwrap();
    let last = s3.snapshot();
    match &outcome {
        Outcome::False(_) => {}
        Outcome::HalfWay if scenario == RenameDirectory || scenario == RenameDirectoryRefused => {
            assert!(nothing_lost(&before, &done, &last));
        }
        _ if again != Ok(true) => {
            outcome = Outcome::False(format!("{told:?}; then, without a fault: {again:?}"))
        }
        _ if last != done => {
            outcome = Outcome::False(format!("in the end {}", differences(&done, &last)))
        }
        _ if s3.uploads() != left => {
            outcome = Outcome::False("the next request left an upload".to_owned())
        }
        _ => {}
    }
    Report {
        outcome,
        left,
        calls,
        struck,
    }
}

/// How many uploads may be left because they can't be aborted: the store refused every abort, or
/// never told their ids.
fn may_be_left(cell: &Cell, calls: &BTreeMap<String, usize>) -> usize {
    match cell.op.as_str() {
        "AbortMultipartUpload" if !cell.is_transient() => 1,
        "CreateMultipartUpload" if cell.fault.answer_is_lost() => match cell.when {
            When::Nth(_) => 1,
            _ => calls["CreateMultipartUpload"],
        },
        _ => 0,
    }
}

#[derive(Default)]
struct Row {
    cells: usize,
    absorbed: usize,
    done: usize,
    refused: usize,
    half_way: usize,
    left: usize,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_matrix() {
    let cells = run_matrix(ETags::Content).await;
    assert!(cells >= MIN_CELLS, "only {cells} cells");
}

/// The rows whose answers are lost, on a store whose ETags are no MD5: neither a false OK nor a
/// false failure.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_matrix_with_etags_of_chance() {
    let cells = run_matrix(ETags::Chance).await;
    assert!(cells >= MIN_CELLS_OF_CHANCE, "only {cells} cells");
}

/// Runs every cell. Returns how many there are.
async fn run_matrix(etags: ETags) -> usize {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut cells = JoinSet::new();
    let mut normal = BTreeMap::new();
    for (scenario, name) in SCENARIOS {
        let reference = run(scenario, etags, None).await;
        let trouble = scenario.trouble().map(|(op, ..)| op);
        let wanted = match scenario.trouble() {
            Some((_, _, Fault::Status(..))) => Outcome::Refused,
            _ => Outcome::Done,
        };
        assert_eq!(
            (&reference.outcome, reference.left),
            (&wanted, 0),
            "{name}, without a fault"
        );
        for (op, calls) in reference.calls {
            // Faults before the trouble belong to another scenario.
            let clears =
                ["HeadObject", "AbortMultipartUpload", "DeleteObject"].contains(&op.as_str());
            if trouble.is_some() && !clears {
                continue;
            }
            let last = (calls > 1).then_some(When::Nth(calls));
            for when in [Some(When::Nth(1)), last, Some(When::Every)]
                .into_iter()
                .flatten()
            {
                for fault in faults() {
                    let is_of_interest = etags == ETags::Content || fault.answer_is_lost();
                    if !is_of_interest || !fault.applies_to(&op) {
                        continue;
                    }
                    let cell = Cell {
                        op: op.clone(),
                        fault,
                        when,
                    };
                    let place = places.clone();
                    cells.spawn(async move {
                        let _place = place.acquire_owned().await;
                        let report = tokio::spawn(run(scenario, etags, Some(cell.clone()))).await;
                        (scenario, cell, report)
                    });
                }
            }
        }
        normal.insert(scenario, reference.outcome);
    }
    let (mut rows, mut bad) = (BTreeMap::<Scenario, Row>::new(), Vec::new());
    while let Some(ended) = cells.join_next().await {
        let (scenario, cell, report) = ended.unwrap();
        let row = rows.entry(scenario).or_default();
        let mut note = |what: String| {
            bad.push(format!(
                "{scenario:?}: {} {:?} {:?}: {what}",
                cell.op, cell.fault, cell.when
            ))
        };
        let report = match report {
            Ok(report) if !report.struck => continue,
            Ok(report) => report,
            Err(panic) => {
                row.cells += 1;
                note(panic.to_string());
                continue;
            }
        };
        row.cells += 1;
        row.absorbed += usize::from(cell.is_transient());
        let counted = match &report.outcome {
            Outcome::Done => &mut row.done,
            Outcome::Refused => &mut row.refused,
            Outcome::HalfWay => &mut row.half_way,
            Outcome::False(what) => {
                note(what.clone());
                continue;
            }
        };
        if cell.is_transient() && report.outcome != normal[&scenario] {
            note(format!("not absorbed: {:?}", report.outcome));
        } else if report.left > may_be_left(&cell, &report.calls) {
            note(format!("{} multipart uploads are left", report.left));
        } else {
            *counted += 1;
            row.left += usize::from(report.left > 0);
        }
    }
    println!(
        "| scenario | cells | one passing fault: absorbed | OK and exact | refused, old state intact | error, nothing lost | upload left |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut all = Row::default();
    for (scenario, name) in SCENARIOS {
        let Row {
            cells,
            absorbed,
            done,
            refused,
            half_way,
            left,
        } = rows.remove(&scenario).unwrap_or_default();
        println!("| {name} | {cells} | {absorbed} | {done} | {refused} | {half_way} | {left} |");
        all.cells += cells;
        all.done += done;
        all.refused += refused;
        all.half_way += half_way;
        all.left += left;
    }
    let Row {
        cells,
        done,
        refused,
        half_way,
        left,
        ..
    } = all;
    let kept = format!("{half_way} ended half-way with nothing lost");
    let line = format!(
        "fault matrix, ETags of {etags:?}: {cells} cells: {done} OK and exact, {refused} refused with the old state intact, {kept}, {} false; \
         in {left} of them a multipart upload is left that can't be aborted",
        bad.len()
    );
    // Not `eprintln`, whose output the test harness hides when the test passes.
    std::io::stderr()
        .write_all(format!("{line}\n").as_bytes())
        .unwrap();
    bad.sort();
    assert!(
        bad.is_empty(),
        "{} bad cells:\n{}",
        bad.len(),
        bad.join("\n")
    );
    cells
}

/// A rename that fails removes its own copies, not the files that other clients have put there
/// meanwhile.
#[tokio::test]
async fn a_failed_rename_of_a_directory_removes_only_what_it_made() {
    let s3 = FakeS3::start().await;
    let server = Server::start(s3_store(&s3)).await;
    let client = server.client().await;
    let keys: Vec<String> = (0..40).map(|n| format!("{n:02}")).collect();
    keys.iter()
        .for_each(|key| s3.put(&format!("alice/d/{key}"), key.clone()));
    let hold = Arc::new(Notify::new());
    s3.fault("CopyObject", When::Every, Fault::Hold(hold.clone()));
    let rename = tokio::spawn(async move { code(client.sftp.rename("/d", "/e").await) });
    eventually("the first copies are held", || s3.count("CopyObject") == 16).await;
    let second = Server::start(s3_store(&s3)).await;
    let other = second.client().await;
    // A file that is being copied is removed, and other clients put files where it and a later one
    // would have been copied to.
    other.sftp.remove("/d/00").await.unwrap();
    other.put("/e/00", b"theirs").await.unwrap();
    other.put("/e/39", b"theirs").await.unwrap();
    s3.clear_faults();
    while !rename.is_finished() {
        hold.notify_waiters();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_ne!(rename.await.unwrap(), StatusCode::Ok);
    let mut want: Vec<String> = keys[1..]
        .iter()
        .map(|key| format!("alice/d/{key}"))
        .collect();
    want.extend(["alice/e/00", "alice/e/39"].map(str::to_owned));
    assert_eq!(s3.objects(), want);
    assert_eq!(s3.object("alice/e/39").unwrap(), "theirs");
    s3.assert_no_uploads();
}

/// By default, the SDK stops to retry once a hundred requests of the process retry.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_failures_is_absorbed() {
    let s3 = FakeS3::start().await;
    let sftpd = Process::start(&s3, &[]);
    (1..=160).for_each(|n| s3.fault("PutObject", When::Nth(n), Fault::Status(503, "SlowDown")));
    let mut puts = Vec::new();
    let mut closes = JoinSet::new();
    for session in 0..10 {
        let client = Arc::new(sftpd.client().await);
        for n in 0..16 {
            let handle = client.open(&format!("/{session}-{n}"), PUT).await.unwrap();
            client.write(&handle, 0, b"small").await.unwrap();
            puts.push((client.clone(), handle));
        }
    }
    for (client, handle) in puts {
        closes.spawn(async move { client.close(&handle).await });
    }
    let refused: Vec<Failed> = closes
        .join_all()
        .await
        .into_iter()
        .filter_map(Result::err)
        .collect();
    assert_eq!(refused, []);
    assert_eq!(s3.objects().len(), 160);
}
