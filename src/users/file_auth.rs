//! The server's view of users.json: read again whenever it has changed.

use super::file::{exposure, open};
use super::password::{hash, is_password};
use super::{Account, Auth, User, UsersFile};
use crate::metrics::USERS_FILE_OK;
use anyhow::Context;
use async_trait::async_trait;
use metrics::gauge;
use ssh_key::PublicKey;
use std::collections::BTreeMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a file that keeps failing in the same way is not logged again.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Age from which the times of a file tell a later change apart. Linux counts them in ticks of up to 10 ms, and two
/// changes within one tick look the same.
const MIN_STAMP_AGE: Duration = Duration::from_millis(100);

/// Lets in the users of users.json, as the file is at that moment.
pub struct FileAuth {
    /// `None` where the users come from no file.
    path: Option<PathBuf>,
    /// A std lock: held while the small file is read, never across an await.
    loaded: Mutex<Loaded>,
}

/// The last good file, and how the attempts to read a newer one went.
#[derive(Default)]
struct Loaded {
    users: UsersFile,
    /// What the file was like when the users were read from it. `None` after a failure and while the stamp could miss a
    /// change, so that the file is read again at the next look.
    stamp: Option<Stamp>,
    failures: FailureLog,
    /// Whether every user of the machine may read the file: told once.
    exposed: bool,
}

/// Differs when the file does: a rename brings another inode, an edit other times. `changed` (ctime) also tells of chmod
/// and chown, and nobody can set it back.
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
        let (Ok(seconds), Ok(nanoseconds)) = (u64::try_from(self.changed.0), u32::try_from(self.changed.1)) else {
            return true;
        };
        let Some(changed) = UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds)) else { return true };
        match now.duration_since(changed) {
            Ok(age) => age >= MIN_STAMP_AGE,
            // The file server's clock is ahead of ours, and waiting would not end.
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
    /// Whether this failure is another than the last one, or the last one was logged long ago.
    fn is_due(&mut self, failure: &str, now: Instant) -> bool {
        let due = match &self.last {
            Some((last, logged)) => last != failure || now.duration_since(*logged) >= FAILURE_LOG_INTERVAL,
            None => true,
        };
        if due {
            self.last = Some((failure.to_owned(), now));
        }
        due
    }

    /// Ends a row of failures. True if there was one.
    fn end(&mut self) -> bool {
        self.last.take().is_some()
    }
}

impl Loaded {
    /// Reads the file again if it may be another than the one read last.
    fn refresh(&mut self, path: &Path) {
        let found = path.metadata().ok();
        let stamp = found.as_ref().map(Stamp::of);
        if stamp.is_some() && stamp == self.stamp {
            return;
        }
        match self.load(path) {
            Ok(()) => {
                gauge!(USERS_FILE_OK).set(1);
                if self.failures.end() {
                    log::info!("{} can be read again", path.display());
                }
            }
            Err(error) => {
                gauge!(USERS_FILE_OK).set(0);
                self.stamp = None;
                let failure = format!("{error:#}");
                if self.failures.is_due(&failure, Instant::now()) {
                    log::error!("the users of the last good file stay in force: {failure}");
                }
            }
        }
    }

    /// Reads the file. On an error the users stay as they are.
    fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        let now = SystemTime::now();
        let file = open(path)?;
        // Of the opened file and before it is read: whatever happens to the name or the content from here on changes
        // the stamp.
        let found = file.metadata().with_context(|| format!("can't read {}", path.display()))?;
        self.users = UsersFile::read_from(file, path)?;
        let stamp = Stamp::of(&found);
        self.stamp = if stamp.is_settled(now) { Some(stamp) } else { None };
        let exposure = exposure(path, &found);
        if let Some(warning) = &exposure
            && !self.exposed
        {
            log::warn!("{warning}");
        }
        self.exposed = exposure.is_some();
        Ok(())
    }
}

impl FileAuth {
    /// Reads the file once, so that the operator learns of a mistake at the start.
    pub fn open(path: PathBuf) -> anyhow::Result<FileAuth> {
        let missing = || format!("no users file at {}: make one with `sftpd users add NAME \"KEY\"`", path.display());
        path.metadata().with_context(missing)?;
        let mut loaded = Loaded::default();
        loaded.load(&path)?;
        gauge!(USERS_FILE_OK).set(1);
        Ok(FileAuth { loaded: Mutex::new(loaded), path: Some(path) })
    }

    /// One user with a password and no file, for `sftpd demo` and tests.
    pub fn single(name: &str, password: &str) -> anyhow::Result<FileAuth> {
        let user = User { password: Some(hash(password)?), ..User::default() };
        let users = UsersFile { users: BTreeMap::from([(name.to_owned(), user)]) };
        Ok(FileAuth { path: None, loaded: Mutex::new(Loaded { users, ..Loaded::default() }) })
    }

    /// The users as the file has them now, or as it last had them.
    fn current(&self) -> MutexGuard<'_, Loaded> {
        let mut loaded = self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(path) = &self.path {
            loaded.refresh(path);
        }
        loaded
    }

    fn user(&self, name: &str) -> Option<User> {
        self.current().users.users.get(name).cloned()
    }
}

#[async_trait]
impl Auth for FileAuth {
    async fn public_key(&self, user: &str, key: &PublicKey) -> Option<Account> {
        let found = self.user(user)?;
        if found.has_key(key) { admit(user, &found) } else { None }
    }

    async fn password(&self, user: &str, password: &str) -> Option<Account> {
        // A user that doesn't exist has no password either.
        let found = self.user(user).unwrap_or_default();
        // Checked for disabled users too, so that they take as long as a wrong password.
        let right = is_password(found.password.clone(), password).await;
        if right { admit(user, &found) } else { None }
    }

    /// Tells the log of a broken file at once, not when someone logs in.
    fn look(&self) {
        drop(self.current());
    }
}

/// The account of a user whose key or password is right, unless the user is disabled.
fn admit(name: &str, user: &User) -> Option<Account> {
    if user.disabled {
        log::info!("user {name} is disabled: `sftpd users enable {name}` ends that");
        return None;
    }
    Some(user.account(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lasting_failure_is_logged_about_every_minute() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut failures = FailureLog::default();
        let logged: Vec<u64> = (0..=130).filter(|second| failures.is_due("can't read it", after(*second))).collect();
        assert_eq!(logged, [0, 60, 120]);
        assert!(failures.is_due("another reason", after(131)), "news are told at once");
        assert!(failures.end() && !failures.end());
        assert!(failures.is_due("another reason", after(132)), "after a good read it is news again");
    }

    #[test]
    fn a_stamp_counts_from_the_time_when_every_change_alters_it() {
        let changed = (1_000, 500_000_000);
        let stamp = Stamp { device: 1, inode: 1, size: 1, modified: changed, changed };
        let at = |milliseconds| UNIX_EPOCH + Duration::from_millis(milliseconds);
        assert!(!stamp.is_settled(at(1_000_500)) && !stamp.is_settled(at(1_000_599)));
        assert!(stamp.is_settled(at(1_000_600)));
        assert!(stamp.is_settled(at(0)), "a clock that is ahead");
    }
}
