//! Requests that concern names, and the way of every request: gate, dispatch, one reply.

use super::codec::{ExtendedRequest, MAX_DATA, MAX_PACKET, Request};
use super::failure::{Answer, Failure, Outcome};
use super::inbound::{Incoming, RequestMemory};
use super::recent::ListingAge;
use super::request_events::Asked;
use super::session::{End, Handle, MAX_HANDLES, Session};
use super::table::{EXTENSIONS, find_row};
use crate::catch_panic;
use crate::events::{Event, shorten};
use crate::path::Path;
use crate::users::Access;
use crate::vfs::{Item, Stat, VfsError};
use bytes::{BufMut, BytesMut};
use russh_sftp::protocol::{
    Attrs, ExtendedReply, File, Name, SetStat, StatusCode, VERSION, Version,
};
use std::collections::HashMap;

/// Longest name in bytes that `statvfs` reports, as every file system does. S3 limits the whole key
/// only.
const MAX_NAME: u64 = 255;
/// Limit on a NAME reply in bytes: version 3 asks every client to take at least 34,000.
const MAX_NAMES: usize = 30_000;
/// Bytes of a NAME reply that an entry takes beside its name, which it has twice.
const NAME_OVERHEAD: usize = 128;

impl Session {
    /// Carries out one request. Its reply is queued now, or by the task that was given it.
    pub(super) async fn carry_out(&mut self, incoming: Incoming) -> Result<(), End> {
        let Incoming {
            id,
            request,
            memory,
        } = incoming;
        let asked = Asked::of(&request, |handle| self.find_directory(handle));
        let outcome = match catch_panic(self.dispatch(id, request, memory)).await {
            Ok(outcome) => outcome,
            Err(panicked) => Err(panicked.into()),
        };
        self.finish_request(id, asked, outcome);
        if self.replies.are_ignored() {
            return Err(End::Ignored);
        }
        Ok(())
    }

    /// Replies to a request, and tells of its failure.
    pub(super) fn finish_request(&self, id: u32, asked: Option<Asked>, outcome: Outcome) {
        match outcome {
            Ok(Answer::Now(packet)) => self.replies.reply(id, Ok(packet)),
            Ok(Answer::Later) => {}
            Err(failure) => {
                let events = &self.settings.events;
                let who = events.who();
                log::debug!("{who}: request {id} failed: {}", failure.text());
                if let Some(asked) = asked {
                    asked.tell_failure(events, &failure);
                }
                self.replies.reply(id, Err(failure));
            }
        }
    }

    async fn dispatch(&mut self, id: u32, request: Request, memory: RequestMemory) -> Outcome {
        self.check_access(&request)?;
        match request {
            Request::Init => Ok(self.init()),
            Request::Open(open) => self.open(id, open).await,
            Request::Close(close) => self.close(id, &close.handle).await,
            Request::Read(read) => self.read(id, &read).await,
            Request::Write {
                handle,
                offset,
                data,
            } => self.write(id, &handle, offset, data, memory).await,
            Request::Lstat(lstat) => self.stat(id, &lstat.path).await,
            Request::Stat(stat) => self.stat(id, &stat.path).await,
            Request::Fstat(fstat) => self.fstat(id, &fstat.handle),
            Request::SetStat(set_stat) => self.set_stat(id, &set_stat).await,
            Request::FSetStat(set_stat) => self.fset_stat(id, &set_stat).await,
            Request::OpenDir(open_dir) => self.open_dir(id, &open_dir.path).await,
            Request::ReadDir(read_dir) => self.read_dir(id, &read_dir.handle).await,
            Request::Remove(remove) => self.remove(id, &remove.filename).await,
            Request::MkDir(mk_dir) => self.make_dir(id, &mk_dir.path).await,
            Request::RmDir(rm_dir) => self.remove_dir(id, &rm_dir.path).await,
            Request::RealPath(real_path) => reply_with_name(id, &real_path.path),
            Request::Rename(rename) => {
                self.rename(id, &rename.oldpath, &rename.newpath, false)
                    .await
            }
            Request::ReadLink | Request::Symlink => {
                Err(VfsError::Unsupported("S3 has no links").into())
            }
            Request::Extended(request) => self.extended(id, request).await,
            Request::UnknownExtension => {
                Err(VfsError::Unsupported("this extension is not supported").into())
            }
            Request::UnknownType(kind) => {
                let why = format!("version 3 has no type {kind}");
                Err(Failure::new(StatusCode::OpUnsupported, why))
            }
            Request::Malformed => Err(Failure::new(StatusCode::BadMessage, "malformed request")),
        }
    }

    /// The gate: refuses what the user's access does not allow.
    fn check_access(&self, request: &Request) -> Result<(), Failure> {
        let access = self.settings.access;
        if find_row(request).need.is_met_by(access) {
            return Ok(());
        }
        match access {
            Access::ReadOnly => Err(Failure::denied("this user may only read")),
            Access::WriteOnly => Err(Failure::denied("this user may only write")),
            // Allowed everything.
            Access::ReadWrite => Err(Failure::denied("not allowed")),
        }
    }

    fn init(&mut self) -> Answer {
        self.initialized = true;
        let mut extensions = HashMap::new();
        for row in EXTENSIONS {
            extensions.insert(row.name.to_owned(), row.version.to_owned());
        }
        Answer::now(Version {
            version: VERSION,
            extensions,
        })
    }

    /// The path of an open directory.
    fn find_directory(&self, handle: &str) -> Option<&str> {
        match self.find(handle) {
            Some(Handle::Directory { path, .. }) => Some(path.as_str()),
            Some(Handle::Reader(_) | Handle::Writer { .. }) | None => None,
        }
    }

    pub(super) fn find(&self, handle: &str) -> Option<&Handle> {
        self.handles.get(handle).map(|open| &open.handle)
    }

    /// Fails if no file or directory may be opened now.
    pub(super) fn check_may_open(&self) -> Result<(), Failure> {
        if self.settings.drain.is_cancelled() {
            return Err(VfsError::Refused("the server is shutting down").into());
        }
        let count = self.handles.len();
        if count >= MAX_HANDLES {
            let why = format!("{count} files are open already");
            return Err(Failure::new(StatusCode::Failure, why));
        }
        Ok(())
    }

    fn tell(&self, event: Event) {
        self.settings.events.tell(event);
    }

    /// The key of a path whose request was carried out, for its event.
    fn key_of(&self, path: &Path) -> String {
        match self.settings.vfs.file_key(path) {
            Ok(key) => key.to_string(),
            // No request succeeds for such a path.
            Err(_no_key) => String::new(),
        }
    }

    async fn stat(&mut self, id: u32, path: &str) -> Outcome {
        let path = Path::parse(path)?;
        let stat = match self.find_recent(&path) {
            Some(stat) => stat,
            None => self.settings.vfs.stat(&path).await?,
        };
        Ok(self.attrs(id, &stat))
    }

    /// What a listing of this session said of a path a moment ago. Not for an upload in progress,
    /// which knows better.
    fn find_recent(&mut self, path: &Path) -> Option<Stat> {
        let vfs = &self.settings.vfs;
        let stat = self.recent.find(path, vfs.changes())?;
        if vfs.is_being_uploaded(path) {
            return None;
        }
        Some(stat)
    }

    pub(super) fn attrs(&self, id: u32, stat: &Stat) -> Answer {
        let attrs = self.view.attributes(stat);
        Answer::now(Attrs { id, attrs })
    }

    /// SETSTAT. Times, modes and owners have no place in S3: they are accepted and ignored if the
    /// path exists, or `put -p`, WinSCP and sshfs would fail.
    async fn set_stat(&mut self, id: u32, set_stat: &SetStat) -> Outcome {
        let path = Path::parse(&set_stat.path)?;
        let vfs = &self.settings.vfs;
        match set_stat.attrs.size {
            Some(size) => {
                vfs.set_size(&path, size).await?;
                self.tell(Event::SizeSet {
                    key: self.key_of(&path),
                    path: shorten(path.as_str()),
                    size,
                });
            }
            None => {
                vfs.stat(&path).await?;
            }
        }
        Ok(Answer::ok(id))
    }

    async fn open_dir(&mut self, id: u32, path: &str) -> Outcome {
        self.check_may_open()?;
        let path = Path::parse(path)?;
        let place = self.take_place()?;
        let vfs = &self.settings.vfs;
        let age = ListingAge::start(vfs.changes_when_idle());
        let listing = vfs.open_directory(&path).await?;
        let handle = Handle::Directory {
            listing,
            path,
            age,
            entries: Some(0),
        };
        Ok(self.add_handle(id, handle, place))
    }

    async fn read_dir(&mut self, id: u32, handle: &str) -> Outcome {
        let open = self.handles.get_mut(handle).map(|open| &mut open.handle);
        let Some(Handle::Directory {
            listing,
            path,
            age,
            entries,
        }) = open
        else {
            return Err(Failure::bad_handle());
        };
        let mut length = 0;
        let fits = |item: &Item| {
            length += 2 * item.name.len() + NAME_OVERHEAD;
            length <= MAX_NAMES
        };
        let items = listing.take(fits).await?;
        if items.is_empty() {
            if let Some(entries) = entries.take() {
                let path = shorten(path.as_str());
                self.tell(Event::Listed { path, entries });
            }
            return Err(Failure::bare(StatusCode::Eof));
        }
        if let Some(entries) = entries {
            *entries += items.iter().filter(|item| !item.is_dots()).count() as u64;
        }
        let changes = self.settings.vfs.changes();
        self.recent.record(path, &items, *age, changes);
        let mut files = Vec::with_capacity(items.len());
        for item in items {
            files.push(self.view.file(item));
        }
        Ok(Answer::now(Name { id, files }))
    }

    /// REMOVE. Uploads of the session to this path are given up: as on a file system, they have no
    /// name any more.
    async fn remove(&mut self, id: u32, path: &str) -> Outcome {
        let path = Path::parse(path)?;
        let has_given_up = self.discard_uploads(&path).await;
        match self.settings.vfs.remove(&path).await {
            Ok(()) => {}
            Err(VfsError::NotFound) if has_given_up => {}
            Err(error) => return Err(error.into()),
        }
        self.tell(Event::Removed {
            key: self.key_of(&path),
            path: shorten(path.as_str()),
        });
        Ok(Answer::ok(id))
    }

    /// Gives up the files of this path that are open for writing. Returns whether there are any.
    async fn discard_uploads(&self, path: &Path) -> bool {
        let mut has_given_up = false;
        for open in self.handles.values() {
            if let Handle::Writer {
                upload,
                path: written,
                ..
            } = &open.handle
                && written == path
            {
                upload.discard().await;
                has_given_up = true;
            }
        }
        if has_given_up {
            self.settings.vfs.drop_uploads(path);
        }
        has_given_up
    }

    async fn make_dir(&mut self, id: u32, path: &str) -> Outcome {
        let path = Path::parse(path).map_err(Failure::of_new_name)?;
        self.settings.vfs.make_directory(&path).await?;
        let path = shorten(path.as_str());
        self.tell(Event::DirectoryMade { path });
        Ok(Answer::ok(id))
    }

    async fn remove_dir(&mut self, id: u32, path: &str) -> Outcome {
        let path = Path::parse(path)?;
        self.settings.vfs.remove_directory(&path).await?;
        let path = shorten(path.as_str());
        self.tell(Event::DirectoryRemoved { path });
        Ok(Answer::ok(id))
    }

    async fn rename(&mut self, id: u32, from: &str, to: &str, replace: bool) -> Outcome {
        let from = Path::parse(from)?;
        let to = Path::parse(to).map_err(Failure::of_new_name)?;
        let replaced = self.settings.vfs.rename(&from, &to, replace).await?;
        self.tell(Event::Renamed {
            from: shorten(from.as_str()),
            to: shorten(to.as_str()),
            from_key: self.key_of(&from),
            to_key: self.key_of(&to),
            replaced,
        });
        Ok(Answer::ok(id))
    }

    async fn extended(&mut self, id: u32, request: ExtendedRequest) -> Outcome {
        match request {
            ExtendedRequest::Limits => {
                // The longest packet, READ and WRITE, and the most handles.
                let max_data = MAX_DATA.into();
                let numbers = [MAX_PACKET as u64, max_data, max_data, MAX_HANDLES as u64];
                Ok(reply_with_numbers(id, &numbers))
            }
            ExtendedRequest::PosixRename { from, to } => self.rename(id, &from, &to, true).await,
            ExtendedRequest::Statvfs => Ok(self.statvfs(id)),
            ExtendedRequest::Fstatvfs { handle } => match self.find(&handle) {
                Some(_) => Ok(self.statvfs(id)),
                None => Err(Failure::bad_handle()),
            },
            ExtendedRequest::ExpandPath { path } => expand_path(id, &path),
        }
    }

    /// Reports a size that no client takes for a full disk, as S3 has no end; in blocks of 1 MiB,
    /// so that it fits everyone's integers.
    fn statvfs(&self, id: u32) -> Answer {
        const BLOCK: u64 = 1 << 20;
        const MANY: u64 = 1 << 40;
        const READ_ONLY: u64 = 1;
        const NO_SETUID: u64 = 2;
        let flags = match self.settings.access {
            Access::ReadOnly => READ_ONLY | NO_SETUID,
            Access::ReadWrite | Access::WriteOnly => NO_SETUID,
        };
        // Sizes of blocks and fragments; blocks and inodes: all, free, available; file system id,
        // flags, longest name.
        let numbers = [
            BLOCK, BLOCK, MANY, MANY, MANY, MANY, MANY, MANY, 0, flags, MAX_NAME,
        ];
        reply_with_numbers(id, &numbers)
    }
}

/// `~` is the user's home, which is the root.
fn expand_path(id: u32, path: &str) -> Outcome {
    let below_home = match path.strip_prefix('~') {
        None => path,
        Some(rest) if rest.is_empty() || rest.starts_with('/') => rest,
        Some(_) => return Err(VfsError::Refused("other users' homes can't be seen").into()),
    };
    reply_with_name(id, below_home)
}

fn reply_with_name(id: u32, path: &str) -> Outcome {
    let path = Path::parse(path)?;
    let files = vec![File::dummy(path.as_str())];
    Ok(Answer::now(Name { id, files }))
}

/// The reply of an extension that consists of numbers.
fn reply_with_numbers(id: u32, numbers: &[u64]) -> Answer {
    let mut data = BytesMut::new();
    for number in numbers {
        data.put_u64(*number);
    }
    let data = data.to_vec();
    Answer::now(ExtendedReply { id, data })
}
