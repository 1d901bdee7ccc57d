//! Requests that wait for the CLOSE of a file that they concern.
//!
//! Called by the session. FUSE tells sshfs of a `close()` in the background, so what a program does
//! next with the file (open, unlink, truncate, rename) may arrive before its CLOSE. Such a request
//! waits for the CLOSE, and what arrives behind it and concerns one of its names waits too: requests
//! for one name are carried out in the order in which they arrived. The session goes on with other
//! names meanwhile. Invariants: a request waits for [`MAX_WAIT`] at most, counted from its arrival
//! and without the time in which the session carries out others; those that wait are counted as
//! requests of the session; and they end with it.

use super::codec::{ExtendedRequest, Request};
use super::failure::Failure;
use super::inbound::Incoming;
use super::request_events::Asked;
use super::session::{End, Handle, OpenHandle, Session};
use crate::path::Path;
use crate::transfer::Progress;
use crate::vfs::Vfs;
use russh_sftp::protocol::StatusCode;
use std::collections::{BTreeMap, VecDeque};
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// How long a request waits for a CLOSE. A client that keeps the file open on purpose gets its
/// answer then.
const MAX_WAIT: Duration = Duration::from_secs(3);
/// Limit on the requests of one session that wait; with one more the oldest is carried out.
const MAX_WAITING: usize = 64;

/// The names that a request concerns, and whose CLOSE it waits for.
struct Concern {
    names: Vec<Name>,
    waits_for: WaitsFor,
}

/// A name of a request.
struct Name {
    path: Path,
    /// Whether everything below it is included.
    subtree: bool,
}

/// The files for whose CLOSE a request waits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WaitsFor {
    /// None: it waits only for requests that arrived before it.
    NoFile,
    /// Those that other sessions have open for writing: a client may have several. Those of its own
    /// session are shown while they are open.
    ForeignFiles,
    /// Those that any session has open for writing.
    AllFiles,
}

impl Name {
    fn meets(&self, other: &Name) -> bool {
        let contains = self.subtree && other.path.is_inside_or_at(&self.path);
        let is_contained = other.subtree && self.path.is_inside_or_at(&other.path);
        contains || is_contained || self.path == other.path
    }

    fn includes(&self, file: &Path) -> bool {
        match self.subtree {
            true => file.is_inside_or_at(&self.path),
            false => *file == self.path,
        }
    }
}

impl Concern {
    /// What a request concerns. A path that is not allowed has no name: its request fails at once.
    fn of(request: &Request) -> Concern {
        match request {
            Request::Open(open) => Concern::file(&open.filename, WaitsFor::AllFiles),
            Request::Remove(remove) => Concern::file(&remove.filename, WaitsFor::AllFiles),
            Request::SetStat(set_stat) => match set_stat.attrs.size {
                Some(_) => Concern::file(&set_stat.path, WaitsFor::AllFiles),
                None => Concern::file(&set_stat.path, WaitsFor::ForeignFiles),
            },
            Request::Rename(rename) => Concern::rename(&rename.oldpath, &rename.newpath),
            Request::Extended(ExtendedRequest::PosixRename { from, to }) => {
                Concern::rename(from, to)
            }
            Request::Lstat(lstat) => Concern::file(&lstat.path, WaitsFor::ForeignFiles),
            Request::Stat(stat) => Concern::file(&stat.path, WaitsFor::ForeignFiles),
            Request::MkDir(mk_dir) => Concern::subtrees(&[&mk_dir.path], WaitsFor::NoFile),
            Request::RmDir(rm_dir) => Concern::subtrees(&[&rm_dir.path], WaitsFor::NoFile),
            Request::OpenDir(open_dir) => Concern::subtrees(&[&open_dir.path], WaitsFor::NoFile),
            Request::Init
            | Request::Close(_)
            | Request::Read(_)
            | Request::Write { .. }
            | Request::Fstat(_)
            | Request::FSetStat(_)
            | Request::ReadDir(_)
            | Request::RealPath(_)
            | Request::ReadLink
            | Request::Symlink
            | Request::Extended(
                ExtendedRequest::Limits
                | ExtendedRequest::Statvfs
                | ExtendedRequest::Fstatvfs { .. }
                | ExtendedRequest::ExpandPath { .. },
            )
            | Request::UnknownExtension
            | Request::UnknownType(_)
            | Request::Malformed => Concern::subtrees(&[], WaitsFor::NoFile),
        }
    }

    /// One file or directory, without what is in it.
    fn file(path: &str, waits_for: WaitsFor) -> Concern {
        let mut concern = Concern::subtrees(&[path], waits_for);
        for name in &mut concern.names {
            name.subtree = false;
        }
        concern
    }

    fn rename(from: &str, to: &str) -> Concern {
        Concern::subtrees(&[from, to], WaitsFor::AllFiles)
    }

    fn subtrees(paths: &[&str], waits_for: WaitsFor) -> Concern {
        let mut names = Vec::new();
        for path in paths {
            if let Ok(path) = Path::parse(path) {
                let subtree = true;
                names.push(Name { path, subtree });
            }
        }
        Concern { names, waits_for }
    }

    fn meets(&self, other: &Concern) -> bool {
        let meets_other = |name: &Name| other.names.iter().any(|other| name.meets(other));
        self.names.iter().any(meets_other)
    }

    fn includes(&self, file: &Path) -> bool {
        self.names.iter().any(|name| name.includes(file))
    }

    /// Is a file open for whose CLOSE the request waits?
    fn is_blocked(&self, handles: &BTreeMap<String, OpenHandle>, vfs: &Vfs) -> bool {
        match self.waits_for {
            WaitsFor::NoFile => false,
            WaitsFor::ForeignFiles => self.is_open_elsewhere(vfs),
            WaitsFor::AllFiles => {
                handles.values().any(|open| self.awaits(&open.handle))
                    || self.is_open_elsewhere(vfs)
            }
        }
    }

    fn is_open_elsewhere(&self, vfs: &Vfs) -> bool {
        let uploads = self.foreign_uploads(vfs);
        uploads.iter().any(|upload| !upload.is_kept_open())
    }

    fn foreign_uploads(&self, vfs: &Vfs) -> Vec<Arc<Progress>> {
        let mut uploads = Vec::new();
        for name in &self.names {
            uploads.extend(vfs.foreign_uploads(&name.path, name.subtree));
        }
        uploads
    }

    fn awaits(&self, handle: &Handle) -> bool {
        match handle {
            Handle::Writer {
                path, is_kept_open, ..
            } => !is_kept_open && self.includes(path),
            Handle::Reader(_) | Handle::Directory { .. } => false,
        }
    }
}

/// A request that waits.
struct Waiting {
    concern: Concern,
    incoming: Incoming,
    deadline: Instant,
}

/// See the module.
#[derive(Default)]
pub(super) struct WaitingRequests {
    /// In the order in which they arrived.
    requests: VecDeque<Waiting>,
    /// How many uploads had ended when they were last looked at.
    ended_uploads: u64,
}

impl WaitingRequests {
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Resolves when a request may be due; does not resolve if none waits.
    pub async fn wake(&mut self, vfs: &Vfs) {
        let Some(first) = self.requests.front() else {
            return pending().await;
        };
        tokio::select! {
            biased;
            ended = vfs.wait_for_ended_upload(self.ended_uploads) => self.ended_uploads = ended,
            () = sleep_until(first.deadline) => {}
        }
    }

    /// Takes the first request that no earlier one meets, and that is not blocked or has waited
    /// long enough.
    fn take_due(&mut self, is_blocked: impl Fn(&Concern) -> bool) -> Option<Waiting> {
        let now = Instant::now();
        for (index, waiting) in self.requests.iter().enumerate() {
            let mut earlier = self.requests.iter().take(index);
            let is_first = !earlier.any(|earlier| earlier.concern.meets(&waiting.concern));
            if is_first && (waiting.deadline <= now || !is_blocked(&waiting.concern)) {
                return self.requests.remove(index);
            }
        }
        None
    }
}

impl Session {
    /// Carries out a request, or lets it wait for its turn. Its reply is queued now, or by the task
    /// that was given it.
    pub(super) async fn handle(&mut self, incoming: Incoming) -> Result<(), End> {
        if !self.initialized && !matches!(incoming.request, Request::Init) {
            return Err(End::NoInit);
        }
        let concern = Concern::of(&incoming.request);
        if self.must_wait(&concern) {
            return self.let_wait(concern, incoming).await;
        }
        let is_close = matches!(incoming.request, Request::Close(_));
        self.carry_out_untimed(incoming).await?;
        match is_close {
            // What waited for it comes after it, as it has its place in the queue of the name.
            true => self.carry_out_due().await,
            false => Ok(()),
        }
    }

    fn must_wait(&self, concern: &Concern) -> bool {
        let mut waiting = self.waiting.requests.iter();
        waiting.any(|earlier| earlier.concern.meets(concern))
            || concern.is_blocked(&self.handles, &self.settings.vfs)
    }

    async fn let_wait(&mut self, concern: Concern, incoming: Incoming) -> Result<(), End> {
        if self.waiting.requests.len() >= MAX_WAITING
            && let Some(oldest) = self.waiting.requests.pop_front()
        {
            self.carry_out(oldest.incoming).await?;
        }
        self.waiting.requests.push_back(Waiting {
            concern,
            incoming,
            deadline: Instant::now() + MAX_WAIT,
        });
        Ok(())
    }

    /// Carries out the requests that need not wait any longer.
    pub(super) async fn carry_out_due(&mut self) -> Result<(), End> {
        let vfs = self.settings.vfs.clone();
        loop {
            let handles = &self.handles;
            let due = self
                .waiting
                .take_due(|concern| concern.is_blocked(handles, &vfs));
            let Some(due) = due else { return Ok(()) };
            if due.deadline <= Instant::now() {
                self.note_kept_open(&due.concern);
            }
            self.carry_out_untimed(due.incoming).await?;
        }
    }

    /// Carries out a request, and gives those that wait the time that it took: the CLOSE that they
    /// wait for may have arrived meanwhile, and is taken from the queue only now.
    async fn carry_out_untimed(&mut self, incoming: Incoming) -> Result<(), End> {
        let began = Instant::now();
        self.carry_out(incoming).await?;
        let took = began.elapsed();
        for waiting in &mut self.waiting.requests {
            waiting.deadline += took;
        }
        Ok(())
    }

    /// Notes that files are kept open on purpose. Nothing more waits for the CLOSE of a file of this
    /// session until it is written to again, nor for that of another session at all.
    fn note_kept_open(&mut self, concern: &Concern) {
        for open in self.handles.values_mut() {
            if concern.awaits(&open.handle)
                && let Handle::Writer { is_kept_open, .. } = &mut open.handle
            {
                *is_kept_open = true;
            }
        }
        for upload in concern.foreign_uploads(&self.settings.vfs) {
            upload.note_kept_open();
        }
    }

    /// Refuses the requests that still wait at the end of the session.
    pub(super) fn refuse_waiting(&mut self) {
        for Waiting { incoming, .. } in std::mem::take(&mut self.waiting.requests) {
            let asked = Asked::of(&incoming.request, |_| None);
            let why = "the session ended before the CLOSE of the file came";
            let failure = Failure::new(StatusCode::Failure, why);
            self.finish_request(incoming.id, asked, Err(failure));
        }
    }
}
