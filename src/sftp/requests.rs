//! One function a request: parse, act, one reply.

use super::wire::{MAX_DATA, MAX_PACKET, Pieces, Request, string};
use super::{Answer, End, Failure, Handle, MAX_HANDLES, Session};
use crate::metrics::{TRANSFERRED_BYTES, TRANSFERS};
use crate::tree::{Item, Path, Stat, TreeError, WriteMode};
use crate::upload::{self, UploadError};
use crate::{caught, download, store::MAX_KEY, users::Access};
use bytes::Bytes;
use metrics::counter;
use russh_sftp::extensions::{EXPAND_PATH, LIMITS, STATVFS};
use russh_sftp::protocol::{self, *};

/// Extensions that work here, with their versions, as
/// [OpenSSH's PROTOCOL](https://github.com/openssh/openssh-portable/blob/master/PROTOCOL) describes them.
const EXTENSIONS: [(&str, &str); 4] = [(LIMITS, "1"), (POSIX_RENAME, "1"), (STATVFS, "2"), (EXPAND_PATH, "1")];
const POSIX_RENAME: &str = "posix-rename@openssh.com";

/// A NAME reply stays below this many bytes: the least that version 3 asks every client to take is 34,000.
const NAMES_LIMIT: usize = 30_000;

/// Flags of OPEN that make or change a file; paramiko's mode `x` has no WRITE among them.
const CHANGES: OpenFlags =
    OpenFlags::WRITE.union(OpenFlags::APPEND).union(OpenFlags::CREATE).union(OpenFlags::TRUNCATE);

impl Session {
    /// Carries out one request. Its reply is queued now, or by the task that was given it.
    pub(super) async fn handle(&mut self, id: u32, request: Request) -> Result<(), End> {
        let answer = match request {
            Request::Init => {
                self.version_settled = true;
                let extensions = EXTENSIONS.map(|(name, version)| (name.to_owned(), version.to_owned())).into();
                Ok(Some(Version { version: VERSION, extensions }.into()))
            }
            _ if !self.version_settled => return Err(End::NoInit),
            Request::Write { handle, offset, data } => self.write(id, &handle, offset, data).await,
            Request::Packet(packet) => {
                let why = |why| Failure(StatusCode::Failure, why);
                caught(self.packet(id, packet)).await.map_err(why).flatten()
            }
            Request::Malformed => Err(Failure(StatusCode::BadMessage, "malformed request".to_owned())),
            Request::Unknown(kind) => Err(Failure(StatusCode::OpUnsupported, format!("version 3 has no type {kind}"))),
        };
        if let Err(Failure(_, why)) = &answer {
            log::debug!("{}: request {id} failed: {why}", self.settings.who);
        }
        self.replies.reply(id, answer);
        if self.replies.are_ignored() { Err(End::Ignored) } else { Ok(()) }
    }

    async fn packet(&mut self, id: u32, packet: Packet) -> Answer {
        self.permit(&packet)?;
        let tree = &self.settings.tree;
        match packet {
            Packet::Open(open) => self.open(open).await,
            Packet::Close(close) => self.close(id, &close.handle).await,
            Packet::Read(read) => self.read(id, &read).await,
            Packet::Lstat(Lstat { path, .. }) | Packet::Stat(protocol::Stat { path, .. }) => {
                let stat = tree.stat(&Path::parse(&path)?).await?;
                Ok(Some(Attrs { id, attrs: self.view.attributes(&stat) }.into()))
            }
            Packet::Fstat(fstat) => self.fstat(id, &fstat.handle),
            // Times, modes and owners have no place in S3: accepted and ignored, or `put -p`, WinSCP and sshfs would fail.
            Packet::SetStat(set) => match set.attrs.size {
                Some(size) => done(id, tree.set_size(&Path::parse(&set.path)?, size).await),
                None => done::<Failure>(id, Ok(())),
            },
            Packet::FSetStat(set) => self.fsetstat(id, &set.handle, set.attrs.size).await,
            Packet::OpenDir(open) => {
                let listing = tree.open_directory(&Path::parse(&open.path)?).await?;
                self.add(id, Handle::Directory(listing))
            }
            Packet::ReadDir(read) => self.readdir(id, &read.handle).await,
            Packet::Remove(remove) => done(id, tree.remove(&Path::parse(&remove.filename)?).await),
            Packet::MkDir(mkdir) => done(id, tree.make_directory(&Path::parse(&mkdir.path)?).await),
            Packet::RmDir(rmdir) => done(id, tree.remove_directory(&Path::parse(&rmdir.path)?).await),
            Packet::Rename(rename) => self.rename(id, &rename.oldpath, &rename.newpath, false).await,
            Packet::RealPath(real) => name(id, &real.path),
            Packet::Extended(extended) => self.extended(id, &extended.request, extended.data.into()).await,
            // READLINK and SYMLINK: no other type gets here.
            _ => Err(TreeError::Unsupported("S3 has no links").into()),
        }
    }

    /// The one gate: what the user's access does not allow goes no further. READ and WRITE need a handle,
    /// which OPEN gives or refuses.
    fn permit(&self, packet: &Packet) -> Result<(), Failure> {
        let changes = match packet {
            Packet::Open(open) => open.pflags.intersects(CHANGES),
            Packet::SetStat(set) => set.attrs.size.is_some(),
            Packet::Extended(extended) => extended.request == POSIX_RENAME,
            Packet::Remove(_) | Packet::MkDir(_) | Packet::RmDir(_) | Packet::Rename(_) => true,
            _ => false,
        };
        let (opens, count) = (matches!(packet, Packet::Open(_) | Packet::OpenDir(_)), self.handles.len());
        match self.settings.access {
            Access::ReadOnly if changes => Err(denied("this user may only read")),
            Access::WriteOnly if matches!(packet, Packet::Open(_)) && !changes => Err(denied(WRITE_ONLY)),
            _ if opens && self.settings.drain.is_cancelled() => {
                Err(TreeError::Refused("the server is shutting down").into())
            }
            _ if opens && count >= MAX_HANDLES => {
                Err(Failure(StatusCode::Failure, format!("{count} files are open already")))
            }
            _ => Ok(()),
        }
    }

    fn add(&mut self, id: u32, open: Handle) -> Answer {
        self.next_handle += 1;
        let handle = format!("{:x}", self.next_handle);
        self.handles.insert(handle.clone(), open);
        Ok(Some(protocol::Handle { id, handle }.into()))
    }

    async fn open(&mut self, Open { id, filename, pflags: flags, .. }: Open) -> Answer {
        let (path, changes) = (Path::parse(&filename)?, flags.intersects(CHANGES));
        let transfer = format!("{}: {} {:?}", self.settings.who, if changes { "put" } else { "get" }, path.as_str());
        if !changes {
            let log = move |summary| note_download(&transfer, summary);
            let download = self.settings.tree.open_read(&path, self.replies.clone(), log).await?;
            return self.add(id, Handle::Reader(download));
        }
        let mode = WriteMode {
            create: flags.contains(OpenFlags::CREATE),
            truncate: flags.contains(OpenFlags::TRUNCATE),
            exclusive: flags.contains(OpenFlags::CREATE | OpenFlags::EXCLUDE),
        };
        let log = move |summary| note_upload(&transfer, summary);
        let upload = self.settings.tree.open_write(&path, mode, log).await?;
        self.add(id, Handle::Writer { upload, append: flags.contains(OpenFlags::APPEND) })
    }

    async fn close(&mut self, id: u32, handle: &str) -> Answer {
        let Handle::Writer { upload, .. } = self.handles.remove(handle).ok_or(BAD_HANDLE)? else {
            return done::<Failure>(id, Ok(()));
        };
        // Other requests go on while the store finishes; those that must see the outcome wait for it.
        let place = self.closing.clone().acquire_owned().await;
        upload.close(self.outcome(id, place)).await;
        Ok(None)
    }

    /// Answers a request with how it went, and lets go of what is held meanwhile.
    fn outcome(&self, id: u32, held: impl Send + 'static) -> upload::Reply<()> {
        let replies = self.replies.clone();
        Box::new(move |result| {
            replies.reply(id, done(id, result));
            drop(held);
        })
    }

    async fn write(&mut self, id: u32, handle: &str, offset: u64, data: Pieces) -> Answer {
        match self.handles.get(handle) {
            Some(Handle::Writer { upload, append }) => {
                let data = data.into_iter().collect();
                upload.write((!append).then_some(offset), data, self.outcome(id, ())).await;
                Ok(None)
            }
            Some(Handle::Reader(_)) => Err(denied(NOT_FOR_WRITING)),
            Some(Handle::Directory(_)) | None => Err(BAD_HANDLE.into()),
        }
    }

    async fn read(&mut self, id: u32, read: &Read) -> Answer {
        let (offset, len) = (read.offset, read.len.min(MAX_DATA));
        match self.handles.get(&read.handle) {
            Some(Handle::Reader(download)) if download.read(download::Read { id, offset, len }) => Ok(None),
            Some(Handle::Writer { .. }) if self.settings.access == Access::WriteOnly => Err(denied(WRITE_ONLY)),
            Some(Handle::Writer { upload, .. }) if let Some(room) = self.replies.try_room(len) => {
                let replies = self.replies.clone();
                let reply = move |result: Result<Bytes, UploadError>| match result {
                    Ok(data) => _ = replies.data(id, vec![data], room),
                    Err(error) => replies.reply(id, Err(error.into())),
                };
                upload.read(offset, len as usize, Box::new(reply)).await;
                Ok(None)
            }
            Some(Handle::Reader(_) | Handle::Writer { .. }) => Err(TreeError::Refused("too many READs at once").into()),
            Some(Handle::Directory(_)) | None => Err(BAD_HANDLE.into()),
        }
    }

    fn fstat(&self, id: u32, handle: &str) -> Answer {
        let stat = match self.handles.get(handle).ok_or(BAD_HANDLE)? {
            Handle::Directory(_) => Stat::Directory,
            Handle::Reader(download) => Stat::from(download.object()),
            Handle::Writer { upload, .. } => Stat::from(upload.progress()),
        };
        Ok(Some(Attrs { id, attrs: self.view.attributes(&stat) }.into()))
    }

    async fn fsetstat(&mut self, id: u32, handle: &str, size: Option<u64>) -> Answer {
        match (self.handles.get(handle).ok_or(BAD_HANDLE)?, size) {
            (Handle::Writer { upload, .. }, Some(size)) => {
                upload.truncate(size, self.outcome(id, ())).await;
                Ok(None)
            }
            (_, Some(_)) => Err(denied(NOT_FOR_WRITING)),
            (_, None) => done::<Failure>(id, Ok(())),
        }
    }

    async fn readdir(&mut self, id: u32, handle: &str) -> Answer {
        let Some(Handle::Directory(listing)) = self.handles.get_mut(handle) else { return Err(BAD_HANDLE.into()) };
        let mut length = 0;
        let fits = |item: &Item| {
            // The name twice, once in the long line, and what stands around it.
            length += 2 * item.name.len() + 128;
            length <= NAMES_LIMIT
        };
        let items = listing.take(fits).await?;
        if items.is_empty() {
            return Err(Failure(StatusCode::Eof, "end of directory".to_owned()));
        }
        let files = items.into_iter().map(|item| self.view.file(item)).collect();
        Ok(Some(Name { id, files }.into()))
    }

    async fn rename(&mut self, id: u32, from: &str, to: &str, replace: bool) -> Answer {
        let (from, to) = (Path::parse(from)?, Path::parse(to)?);
        done(id, self.settings.tree.rename(&from, &to, replace).await)
    }

    async fn extended(&mut self, id: u32, request: &str, mut data: Bytes) -> Answer {
        let mut text = || string(&mut data).ok_or(TreeError::BadPath("malformed extended request"));
        match request {
            // The longest packet, READ and WRITE, and the most handles.
            LIMITS => numbers(id, &[MAX_PACKET as u64, MAX_DATA.into(), MAX_DATA.into(), MAX_HANDLES as u64]),
            POSIX_RENAME => self.rename(id, &text()?, &text()?, true).await,
            STATVFS => self.statvfs(id),
            EXPAND_PATH => match text()?.as_str() {
                "~" => name(id, "/"),
                path if path.starts_with('~') && !path.starts_with("~/") => {
                    Err(TreeError::Refused("other users' homes can't be seen").into())
                }
                path => name(id, path.trim_start_matches('~')),
            },
            _ => Err(TreeError::Unsupported("this extension is not supported").into()),
        }
    }

    /// S3 has no end: a figure no client takes for a full disk, in blocks of 1 MiB so that it fits everyone's integers.
    fn statvfs(&self, id: u32) -> Answer {
        const BLOCK: u64 = 1 << 20;
        const MANY: u64 = 1 << 40;
        // SSH_FXE_STATVFS_ST_RDONLY and _NOSUID.
        let flags = u64::from(self.settings.access == Access::ReadOnly) | 2;
        // Sizes of blocks and fragments; blocks and inodes: all, free, available; file system id, flags, longest name.
        numbers(id, &[BLOCK, BLOCK, MANY, MANY, MANY, MANY, MANY, MANY, 0, flags, MAX_KEY as u64])
    }
}

const BAD_HANDLE: TreeError = TreeError::Refused("no such handle is open");
const WRITE_ONLY: &str = "this user may only write";
const NOT_FOR_WRITING: &str = "the file is not open for writing";

fn denied(why: &str) -> Failure {
    Failure(StatusCode::PermissionDenied, why.to_owned())
}

fn done<E: Into<Failure>>(id: u32, result: Result<(), E>) -> Answer {
    result.map_err(E::into)?;
    Ok(Some(Packet::status(id, StatusCode::Ok, "", "en")))
}

fn name(id: u32, path: &str) -> Answer {
    Ok(Some(Name { id, files: vec![File::dummy(Path::parse(path)?.as_str())] }.into()))
}

/// The reply of an extension that consists of numbers.
fn numbers(id: u32, fields: &[u64]) -> Answer {
    let data = fields.iter().flat_map(|field| field.to_be_bytes()).collect();
    Ok(Some(ExtendedReply { id, data }.into()))
}

/// The log's line and the figures, of the same summary.
fn note_upload(put: &str, upload::Summary { bytes, parts, took, result }: upload::Summary) {
    let seconds = took.as_secs_f64();
    let outcome = match result {
        Some(Ok(())) => {
            log::info!("{put} {bytes} bytes {parts} parts {seconds:.3} s");
            "ok"
        }
        Some(Err(error)) => {
            log::warn!("{put} failed after {bytes} bytes {seconds:.3} s: {error}");
            "failed"
        }
        None => {
            log::warn!("{put} forced to end after {bytes} bytes {seconds:.3} s: nothing was stored");
            "cut_off"
        }
    };
    count("upload", outcome, bytes);
}

/// As [`note_upload`]. A client that stops reading in mid-file is no failure: that is how `tail` and previews look.
fn note_download(get: &str, download::Summary { bytes, requests, took, error }: download::Summary) {
    let seconds = took.as_secs_f64();
    match &error {
        None => log::info!("{get} {bytes} bytes {requests} requests {seconds:.3} s"),
        Some(error) => log::warn!("{get} failed after {bytes} bytes {seconds:.3} s: {error}"),
    }
    count("download", if error.is_some() { "failed" } else { "ok" }, bytes);
}

fn count(direction: &'static str, result: &'static str, bytes: u64) {
    let labels = [("direction", direction), ("result", result)];
    counter!(TRANSFERS, &labels).increment(1);
    counter!(TRANSFERRED_BYTES, &labels).increment(bytes);
}
