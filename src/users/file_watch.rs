//! users.json as the server sees it: read again whenever it has changed, on threads that may hang.
//!
//! Called by [`FileAuth`](super::FileAuth). Invariants: a login waits for the file system for at
//! most [`MAX_LOGIN_WAIT`], and the rest of the server never does; a read that hangs changes
//! nothing, and its late outcome is dropped.

use super::file::{UsersFileError, exposure, open};
use super::{User, UsersFile};
use crate::metrics::{USERS, USERS_FILE_OK};
use anyhow::{Context, bail};
use metrics::gauge;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use tokio::time::timeout;

/// How often the file is looked at between logins.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Shortest time between two log lines about a file that keeps failing in the same way.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Age from which the times of a file tell a later change apart. Linux counts them in ticks of up
/// to 10 ms, and two changes within one tick look the same.
const MIN_STAMP_AGE: Duration = Duration::from_millis(100);
/// How long a login waits for the file to be read again. A local file takes microseconds, one on a
/// network mount milliseconds.
const MAX_LOGIN_WAIT: Duration = Duration::from_secs(2);
/// How long a read may take. The largest file (32 MiB) comes in 3 s at 100 Mbit/s.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest pause before another read is tried beside those that hang. The first pause is
/// [`READ_TIMEOUT`], each further one twice as long.
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(600);
/// Most reads that hang at once, each with a thread (tens of KiB). With these pauses they take
/// almost two hours to come together; then nothing is read until one of them ends.
const MAX_HUNG_READS: u32 = 16;

/// The users of a file, as it is or last could be read.
pub(super) struct FileWatch {
    path: PathBuf,
    /// A std lock: never held while the file is read, nor across an await.
    state: Mutex<State>,
    /// The number of the newest read that has ended in time.
    last_ended: watch::Sender<u64>,
}

/// The last good file, and how the attempts to read a newer one went.
struct State {
    users: Arc<UsersFile>,
    /// Of the file that the users were read from. `None` after a failure and while the stamp could
    /// miss a change, so that the file is read again next time.
    stamp: Option<Stamp>,
    failures: FailureLog,
    /// Whether every user of the machine may read the file, so that the log says so once.
    exposed: bool,
    running: Option<RunningRead>,
    /// The number of the newest read that was begun.
    last_begun: u64,
    /// Reads that were given up and have not ended yet.
    hung: u32,
    /// From a read that was given up until another one ends in time. Logins don't wait for reads
    /// meanwhile.
    is_unresponsive: bool,
    /// No read begins earlier.
    next_read: Instant,
}

/// A read that has neither ended nor been given up. There is one at a time.
struct RunningRead {
    number: u64,
    began: Instant,
    /// The file was asked for after this read had begun, so another read follows it.
    is_repeated: bool,
}

/// The content of a file that has changed.
struct Snapshot {
    users: UsersFile,
    /// `None` if a later change could leave it as it is.
    stamp: Option<Stamp>,
    /// A sentence for the operator if every user of the machine may read the file.
    exposure: Option<String>,
}

impl FileWatch {
    /// Reads the file once, so that the operator learns of a mistake at the start. Waits for the
    /// file system.
    pub fn open(path: PathBuf) -> anyhow::Result<Arc<FileWatch>> {
        let first = match read(&path) {
            Err(error) if is_missing(&error) => {
                bail!("{error}: make one with `sftpd users add NAME \"KEY\"`, or correct --users")
            }
            read => read?,
        };
        let mut state = State {
            users: Arc::default(),
            stamp: None,
            failures: FailureLog::default(),
            exposed: false,
            running: None,
            last_begun: 0,
            hung: 0,
            is_unresponsive: false,
            next_read: Instant::now(),
        };
        state.take_over(&path, first);
        gauge!(USERS_FILE_OK).set(1);
        let (last_ended, _) = watch::channel(0);
        Ok(Arc::new(FileWatch {
            path,
            state: Mutex::new(state),
            last_ended,
        }))
    }

    /// The user of this name, as the file is now if it can be read in time, or as it last could be
    /// read.
    pub async fn user(self: &Arc<Self>, name: &str) -> Option<User> {
        if let Some(number) = self.request_read() {
            let mut last_ended = self.last_ended.subscribe();
            // After the timeout the last good file is in force.
            let _ = timeout(
                MAX_LOGIN_WAIT,
                last_ended.wait_for(|ended| *ended >= number),
            )
            .await;
        }
        let users = self.state().users.clone();
        users.users.get(name).cloned()
    }

    /// Begins a read, or has one begun after the one that is running, and does not wait for it.
    /// Returns the read's number, or `None` if it is not worth waiting for.
    fn request_read(self: &Arc<Self>) -> Option<u64> {
        let now = Instant::now();
        let mut state = self.state();
        state.give_up_overdue_read(&self.path, now);
        if state.is_unresponsive {
            // Logs it every minute.
            state.note_failure(&self.too_slow().into(), now);
        }
        let may_begin = now >= state.next_read && state.hung < MAX_HUNG_READS;
        let number = match &mut state.running {
            Some(running) => {
                running.is_repeated = true;
                running.number + 1
            }
            None if may_begin => self.begin_read(&mut state, now)?,
            None => return None,
        };
        if state.is_unresponsive {
            None
        } else {
            Some(number)
        }
    }

    /// Begins a read on a thread of its own, which does not delay the end of the process.
    fn begin_read(self: &Arc<Self>, state: &mut State, now: Instant) -> Option<u64> {
        let number = state.begin(now);
        let known = state.stamp;
        let watch = self.clone();
        let spawned = thread::Builder::new()
            .name("users-file".to_owned())
            .spawn(move || watch.run_reads(number, known));
        match spawned {
            Ok(_detached) => Some(number),
            Err(error) => {
                state.running = None;
                state.note_failure(
                    &anyhow::Error::new(error).context("can't start a thread to read it"),
                    now,
                );
                None
            }
        }
    }

    /// Reads the file, and again while it has been asked for meanwhile.
    fn run_reads(&self, mut number: u64, mut known: Option<Stamp>) {
        loop {
            let outcome = read_if_changed(&self.path, known);
            let mut state = self.state();
            let is_repeated = match &state.running {
                Some(running) if running.number == number => running.is_repeated,
                Some(_) | None => {
                    // It was given up. Its outcome may be older than that of another read since.
                    state.hung = state.hung.saturating_sub(1);
                    state.next_read = Instant::now();
                    return;
                }
            };
            state.end_read(&self.path, outcome);
            self.last_ended.send_replace(number);
            if !is_repeated {
                return;
            }
            number = state.begin(Instant::now());
            known = state.stamp;
        }
    }

    fn too_slow(&self) -> UsersFileError {
        UsersFileError::TooSlow {
            path: self.path.clone(),
            limit: READ_TIMEOUT,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks at the file every [`POLL_INTERVAL`] until dropped.
pub(super) struct Poll {
    /// Nothing is ever sent. The thread ends when the other end sees that this one is gone.
    _stop: mpsc::Sender<()>,
}

impl Poll {
    /// Starts the thread that looks. Reads have threads of their own, so it never hangs.
    pub fn start(watch: &Arc<FileWatch>) -> anyhow::Result<Poll> {
        let (stop, stopped) = mpsc::channel();
        let watch = watch.clone();
        let run = move || {
            while stopped.recv_timeout(POLL_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                watch.request_read();
            }
        };
        thread::Builder::new()
            .name("users-poll".to_owned())
            .spawn(run)
            .context("can't start a thread to look at the users file")?;
        Ok(Poll { _stop: stop })
    }
}

impl State {
    /// Counts a read that begins now, and returns its number.
    fn begin(&mut self, now: Instant) -> u64 {
        self.last_begun += 1;
        self.running = Some(RunningRead {
            number: self.last_begun,
            began: now,
            is_repeated: false,
        });
        self.last_begun
    }

    /// Gives up a read that takes too long. Its thread stays until the system call returns.
    fn give_up_overdue_read(&mut self, path: &Path, now: Instant) {
        let is_overdue = match &self.running {
            Some(running) => now.duration_since(running.began) >= READ_TIMEOUT,
            None => false,
        };
        if !is_overdue {
            return;
        }
        self.running = None;
        self.next_read = now + retry_pause(self.hung);
        self.hung += 1;
        self.is_unresponsive = true;
        if self.hung == MAX_HUNG_READS {
            let path = path.display();
            log::error!(
                "{path} is no longer read until one of the reads that hang ends: restart sftpd once it can be read"
            );
        }
    }

    /// Records the outcome of a read that was not given up.
    fn end_read(&mut self, path: &Path, outcome: anyhow::Result<Option<Snapshot>>) {
        self.running = None;
        self.is_unresponsive = false;
        match outcome {
            Ok(snapshot) => {
                if let Some(snapshot) = snapshot {
                    self.take_over(path, snapshot);
                }
                gauge!(USERS_FILE_OK).set(1);
                if self.failures.end() {
                    log::info!("{} can be read again", path.display());
                }
            }
            Err(error) => {
                self.stamp = None;
                self.note_failure(&error, Instant::now());
            }
        }
    }

    /// Puts the users of a file in force.
    fn take_over(&mut self, path: &Path, snapshot: Snapshot) {
        if let Some(warning) = &snapshot.exposure
            && !self.exposed
        {
            log::warn!("{warning}");
        }
        self.exposed = snapshot.exposure.is_some();
        warn_if_all_are_gone(path, &self.users, &snapshot.users);
        gauge!(USERS).set(snapshot.users.users.len() as f64);
        self.users = Arc::new(snapshot.users);
        self.stamp = snapshot.stamp;
    }

    fn note_failure(&mut self, error: &anyhow::Error, now: Instant) {
        gauge!(USERS_FILE_OK).set(0);
        let failure = format!("{error:#}");
        if self.failures.is_due(&failure, now) {
            log::error!("the users of the last good file stay in force: {failure}");
        }
    }
}

fn is_missing(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(UsersFileError::Missing { .. }))
}

/// Warns if the file has none of the users that it had: it was gone for a moment, say, and
/// `sftpd users add` has made another one. Removing them all looks the same, so it is no error.
fn warn_if_all_are_gone(path: &Path, before: &UsersFile, now: &UsersFile) {
    let mut former = before.users.keys();
    if before.users.is_empty() || former.any(|name| now.users.contains_key(name)) {
        return;
    }
    let path = path.display();
    let gone = format!("{path}: all users so far are gone ({})", before.users.len());
    match now.users.len() {
        0 => log::warn!("{gone}, and nobody can log in"),
        new => log::warn!(
            "{gone}, and only new ones ({new}) can log in: if that is a mistake, put the former file back"
        ),
    }
}

/// The pause after a read was given up while this many others hang.
fn retry_pause(hung: u32) -> Duration {
    READ_TIMEOUT
        .saturating_mul(2_u32.saturating_pow(hung))
        .min(MAX_RETRY_PAUSE)
}

/// Reads the file; `None` if it still has this stamp.
fn read_if_changed(path: &Path, known: Option<Stamp>) -> anyhow::Result<Option<Snapshot>> {
    if let Some(known) = known
        && let Ok(found) = path.metadata()
        && Stamp::of(&found) == known
    {
        return Ok(None);
    }
    read(path).map(Some)
}

fn read(path: &Path) -> anyhow::Result<Snapshot> {
    let now = SystemTime::now();
    let file = open(path)?;
    // Of the opened file and before it is read: any change of the name or the content from here on
    // changes the stamp.
    let found = file
        .metadata()
        .with_context(|| format!("can't read {}", path.display()))?;
    let users = UsersFile::read_from(file, path)?;
    let stamp = Stamp::of(&found);
    let stamp = if stamp.is_settled(now) {
        Some(stamp)
    } else {
        None
    };
    Ok(Snapshot {
        users,
        stamp,
        exposure: exposure(path, &found),
    })
}

/// Differs when the file does: a rename brings another inode, an edit other times. `changed`
/// (ctime) also tells of chmod and chown, and can't be set back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds since 1970.
    modified: (i64, i64),
    /// Seconds and nanoseconds since 1970.
    changed: (i64, i64),
}

impl Stamp {
    fn of(found: &Metadata) -> Stamp {
        Stamp {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }

    /// Whether any change after `now` gives the file another stamp.
    fn is_settled(&self, now: SystemTime) -> bool {
        let (seconds, nanoseconds) = self.changed;
        let (Ok(seconds), Ok(nanoseconds)) = (seconds.try_into(), nanoseconds.try_into()) else {
            return true;
        };
        let Some(changed) = UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds)) else {
            return true;
        };
        match now.duration_since(changed) {
            Ok(age) => age >= MIN_STAMP_AGE,
            // The file server's clock is ahead of ours: waiting for it could take forever.
            Err(_) => true,
        }
    }
}

/// Decides which of many failures in a row are worth a line in the log.
#[derive(Default)]
struct FailureLog {
    /// The last line and its time, until the file can be read again.
    last: Option<(String, Instant)>,
}

impl FailureLog {
    /// Whether this failure differs from the last one, or the last one was logged long ago.
    fn is_due(&mut self, failure: &str, now: Instant) -> bool {
        let due = match &self.last {
            Some((last, logged)) => {
                last != failure || now.duration_since(*logged) >= FAILURE_LOG_INTERVAL
            }
            None => true,
        };
        if due {
            self.last = Some((failure.to_owned(), now));
        }
        due
    }

    /// Ends a row of failures. Returns whether there was one.
    fn end(&mut self) -> bool {
        self.last.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lasting_failure_is_logged_about_every_minute() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut failures = FailureLog::default();
        let logged: Vec<u64> = (0..=130)
            .filter(|second| failures.is_due("can't read it", after(*second)))
            .collect();
        assert_eq!(logged, [0, 60, 120]);
        assert!(
            failures.is_due("another reason", after(131)),
            "news are told at once"
        );
        assert!(failures.end() && !failures.end());
        assert!(
            failures.is_due("another reason", after(132)),
            "after a good read it is news again"
        );
    }

    #[test]
    fn a_stamp_counts_from_the_time_when_every_change_alters_it() {
        let changed = (1_000, 500_000_000);
        let stamp = Stamp {
            device: 1,
            inode: 1,
            size: 1,
            modified: changed,
            changed,
        };
        let at = |milliseconds| UNIX_EPOCH + Duration::from_millis(milliseconds);
        assert!(!stamp.is_settled(at(1_000_500)) && !stamp.is_settled(at(1_000_599)));
        assert!(stamp.is_settled(at(1_000_600)));
        assert!(stamp.is_settled(at(0)), "a clock that is ahead");
    }
}
