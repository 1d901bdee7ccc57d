//! One function a request: parse, act, one reply.

use super::codec::{MAX_DATA, MAX_PACKET, Request, SegmentedBuf, string};
use super::early_renames::Rename as EarlyRename;
use super::failure::{Failure, Outcome, status_words};
use super::inbound::{Incoming, RequestMemory};
use super::reads::QueuedReads;
use super::recent::ListingAge;
use super::request_log::RequestLine;
use super::session::{End, Handle, MAX_HANDLES, OpenHandle, Session, UploadPlace};
use crate::catch_panic;
use crate::metrics::{TRANSFERRED_BYTES, TRANSFERS};
use crate::path::Path;
use crate::transfer::{
    DownloadSummary, MAX_USER_HANDLES, Read as QueuedRead, Reply, UploadError, UploadSummary,
};
use crate::users::Access;
use crate::vfs::{Item, Stat, VfsError, WriteMode};
use bytes::Bytes;
use metrics::counter;
use russh_sftp::extensions::{EXPAND_PATH, LIMITS, STATVFS};
use russh_sftp::protocol::{self, *};
use std::collections::HashMap;
use tokio::sync::OwnedSemaphorePermit;

/// Extensions that work here, with their versions, as
/// [OpenSSH's PROTOCOL](https://github.com/openssh/openssh-portable/blob/master/PROTOCOL) describes them.
const EXTENSIONS: [(&str, &str); 5] = [
    (LIMITS, "1"),
    (POSIX_RENAME, "1"),
    (STATVFS, "2"),
    (FSTATVFS, "2"),
    (EXPAND_PATH, "1"),
];
pub(super) const POSIX_RENAME: &str = "posix-rename@openssh.com";
const FSTATVFS: &str = "fstatvfs@openssh.com";

/// The longest name that `statvfs` tells, in bytes: what every file system says. S3 limits the whole key only.
const LONGEST_NAME: u64 = 255;

/// A NAME reply stays below this many bytes: the least that version 3 asks every client to take is 34,000.
const NAMES_LIMIT: usize = 30_000;

/// Flags of OPEN that make or change a file; paramiko's mode `x` has no WRITE among them.
const CHANGES: OpenFlags = OpenFlags::WRITE
    .union(OpenFlags::APPEND)
    .union(OpenFlags::CREATE)
    .union(OpenFlags::TRUNCATE);

impl Session {
    /// Carries out one request. Its reply is queued now, or by the task that was given it.
    pub(super) async fn handle(&mut self, incoming: Incoming) -> Result<(), End> {
        let Incoming {
            id,
            request,
            memory,
        } = incoming;
        let answer = match request {
            Request::Init => {
                self.initialized = true;
                let extensions = EXTENSIONS
                    .map(|(name, version)| (name.to_owned(), version.to_owned()))
                    .into();
                Ok(Some(
                    Version {
                        version: VERSION,
                        extensions,
                    }
                    .into(),
                ))
            }
            _ if !self.initialized => return Err(End::NoInit),
            Request::Write {
                handle,
                offset,
                data,
            } => self.write(id, &handle, offset, data, memory).await,
            Request::Packet(packet) => {
                let line = RequestLine::of(&packet, |handle| self.directory(handle));
                let answer = match catch_panic(self.packet(id, packet)).await {
                    Ok(answer) => answer,
                    Err(panicked) => Err(panicked.into()),
                };
                line.log(&self.settings.who, &answer);
                answer
            }
            Request::Malformed => Err(Failure::new(StatusCode::BadMessage, "malformed request")),
            Request::Unknown(kind) => Err(Failure::new(
                StatusCode::OpUnsupported,
                format!("version 3 has no type {kind}"),
            )),
        };
        if let Err(failure) = &answer {
            log::debug!(
                "{}: request {id} failed: {}",
                self.settings.who,
                failure.text()
            );
        }
        self.replies.reply(id, answer);
        if self.replies.are_ignored() {
            Err(End::Ignored)
        } else {
            Ok(())
        }
    }

    /// The path of an open directory.
    fn directory(&self, handle: &str) -> Option<&str> {
        match self.find(handle) {
            Some(Handle::Directory { path, .. }) => Some(path.as_str()),
            Some(Handle::Reader(_) | Handle::Writer { .. }) | None => None,
        }
    }

    fn find(&self, handle: &str) -> Option<&Handle> {
        self.handles.get(handle).map(|open| &open.handle)
    }

    async fn packet(&mut self, id: u32, packet: Packet) -> Outcome {
        self.permit(&packet)?;
        let tree = &self.settings.vfs;
        match packet {
            Packet::Open(open) => self.open(open).await,
            Packet::Close(close) => self.close(id, &close.handle).await,
            Packet::Read(read) => self.read(id, &read).await,
            Packet::Lstat(Lstat { path, .. }) | Packet::Stat(protocol::Stat { path, .. }) => {
                let path = Path::parse(&path)?;
                let stat = match self.find_recent(&path) {
                    Some(stat) => stat,
                    None => self.settings.vfs.stat(&path).await?,
                };
                Ok(Some(
                    Attrs {
                        id,
                        attrs: self.view.attributes(&stat),
                    }
                    .into(),
                ))
            }
            Packet::Fstat(fstat) => self.fstat(id, &fstat.handle),
            Packet::SetStat(set) => self.setstat(id, &set).await,
            Packet::FSetStat(set) => self.fsetstat(id, &set.handle, set.attrs.size).await,
            Packet::OpenDir(open) => {
                let path = Path::parse(&open.path)?;
                let place = self.take_place()?;
                let age = ListingAge::start(tree.changes());
                let listing = tree.open_directory(&path).await?;
                self.add(id, Handle::Directory { listing, path, age }, place)
            }
            Packet::ReadDir(read) => self.readdir(id, &read.handle).await,
            Packet::Remove(remove) => done(id, tree.remove(&Path::parse(&remove.filename)?).await),
            Packet::MkDir(mkdir) => done(id, tree.make_directory(&Path::parse(&mkdir.path)?).await),
            Packet::RmDir(rmdir) => {
                done(id, tree.remove_directory(&Path::parse(&rmdir.path)?).await)
            }
            Packet::Rename(rename) => {
                self.rename(id, &rename.oldpath, &rename.newpath, false)
                    .await
            }
            Packet::RealPath(real) => name(id, &real.path),
            Packet::Extended(extended) => {
                self.extended(id, &extended.request, extended.data.into())
                    .await
            }
            Packet::ReadLink(_) | Packet::Symlink(_) => {
                Err(VfsError::Unsupported("S3 has no links").into())
            }
            // These the decoder hands over in another form, or not at all.
            Packet::Init(_)
            | Packet::Version(_)
            | Packet::Write(_)
            | Packet::Status(_)
            | Packet::Handle(_)
            | Packet::Data(_)
            | Packet::Name(_)
            | Packet::Attrs(_)
            | Packet::ExtendedReply(_) => Err(VfsError::Unsupported("not a request").into()),
        }
    }

    /// What a listing of this session told of a path a moment ago. An upload that is in progress knows better.
    fn find_recent(&mut self, path: &Path) -> Option<Stat> {
        let tree = &self.settings.vfs;
        let stat = self.recent.find(path, tree.changes())?;
        if tree.is_being_uploaded(path) {
            None
        } else {
            Some(stat)
        }
    }

    /// The one gate: what the user's access does not allow goes no further. READ and WRITE need a handle,
    /// which OPEN gives or refuses.
    fn permit(&self, packet: &Packet) -> Result<(), Failure> {
        let needed = Need::of(packet);
        match (needed, self.settings.access) {
            (Need::Nothing, _) | (_, Access::ReadWrite) => {}
            (Need::Change, Access::ReadOnly) => return Err(denied("this user may only read")),
            (Need::Content, Access::WriteOnly) => return Err(denied(WRITE_ONLY)),
            (Need::Change, Access::WriteOnly) | (Need::Content, Access::ReadOnly) => {}
        }
        let opens = matches!(packet, Packet::Open(_) | Packet::OpenDir(_));
        let count = self.handles.len();
        if opens && self.settings.drain.is_cancelled() {
            return Err(VfsError::Refused("the server is shutting down").into());
        }
        if opens && count >= MAX_HANDLES {
            return Err(Failure::new(
                StatusCode::Failure,
                format!("{count} files are open already"),
            ));
        }
        Ok(())
    }

    fn add(&mut self, id: u32, handle: Handle, place: OwnedSemaphorePermit) -> Outcome {
        self.next_handle += 1;
        let name = format!("{:x}", self.next_handle);
        self.handles.insert(
            name.clone(),
            OpenHandle {
                handle,
                _place: place,
            },
        );
        Ok(Some(protocol::Handle { id, handle: name }.into()))
    }

    /// A place for what is going to be open.
    fn take_place(&self) -> Result<OwnedSemaphorePermit, Failure> {
        self.settings.limits.open_handle().ok_or_else(|| {
            let why = format!("{MAX_USER_HANDLES} files of this user are open already");
            Failure::new(StatusCode::Failure, why)
        })
    }

    /// A place for a file that is going to be written.
    fn take_upload_place(&self) -> Result<UploadPlace, Failure> {
        let full = |whose| {
            let why = format!(
                "{whose} open for writing as the memory allows (--max-uploads): try again later"
            );
            Failure::new(StatusCode::Failure, why)
        };
        let user = self
            .settings
            .limits
            .open_upload()
            .ok_or_else(|| full("this user has as many files"))?;
        let server = self.settings.uploads.clone().try_acquire_owned();
        let server = server.map_err(|_| full("the server has as many files"))?;
        Ok(UploadPlace {
            _server: server,
            _user: user,
        })
    }

    async fn open(
        &mut self,
        Open {
            id,
            filename,
            pflags: flags,
            ..
        }: Open,
    ) -> Outcome {
        let (path, changes) = (Path::parse(&filename)?, flags.intersects(CHANGES));
        let transfer = format!(
            "{}: {} {:?}",
            self.settings.who,
            if changes { "put" } else { "get" },
            path.as_str()
        );
        let place = self.take_place()?;
        if !changes {
            let limits = self.limits.clone();
            let log = move |summary| note_download(&transfer, summary);
            let download = self
                .settings
                .vfs
                .open_read(&path, limits, self.replies.clone(), log)
                .await?;
            return self.add(id, Handle::Reader(download), place);
        }
        let mode = WriteMode {
            create: flags.contains(OpenFlags::CREATE),
            truncate: flags.contains(OpenFlags::TRUNCATE),
            exclusive: flags.contains(OpenFlags::CREATE | OpenFlags::EXCLUDE),
        };
        let upload_place = self.take_upload_place()?;
        let log = move |summary| note_upload(&transfer, summary);
        let upload = self.settings.vfs.open_write(&path, mode, log).await?;
        let append = flags.contains(OpenFlags::APPEND);
        self.add(
            id,
            Handle::Writer {
                upload,
                path,
                append,
                place: upload_place,
                queued_reads: None,
            },
            place,
        )
    }

    async fn close(&mut self, id: u32, handle: &str) -> Outcome {
        let OpenHandle { handle, .. } = self.handles.remove(handle).ok_or(BAD_HANDLE)?;
        let (upload, upload_place) = match handle {
            Handle::Writer { upload, place, .. } => (upload, place),
            Handle::Reader(_) | Handle::Directory { .. } => return done::<Failure>(id, Ok(())),
        };
        // Other requests go on while the store finishes; those that must see the outcome wait for it.
        let place = self.closing.clone().acquire_owned().await;
        upload.close(self.outcome(id, (place, upload_place))).await;
        // They come after the CLOSE, which has its place in the queue of this name.
        self.finish_early_renames().await;
        Ok(None)
    }

    /// Answers a request with its result, and drops what is held meanwhile.
    fn outcome(&self, id: u32, held: impl Send + 'static) -> Reply<()> {
        let replies = self.replies.clone();
        Box::new(move |result| {
            replies.reply(id, done(id, result));
            drop(held);
        })
    }

    /// `memory` is what the data takes, until it is part of the upload.
    async fn write(
        &mut self,
        id: u32,
        handle: &str,
        offset: u64,
        data: SegmentedBuf,
        memory: RequestMemory,
    ) -> Outcome {
        match self.find(handle) {
            Some(Handle::Writer { upload, append, .. }) => {
                let data = memory.hold(data.into_iter().collect());
                upload
                    .write((!append).then_some(offset), data, self.outcome(id, ()))
                    .await;
                Ok(None)
            }
            Some(Handle::Reader(_)) => Err(denied(NOT_FOR_WRITING)),
            Some(Handle::Directory { .. }) | None => Err(BAD_HANDLE.into()),
        }
    }

    async fn read(&mut self, id: u32, request: &Read) -> Outcome {
        let read = QueuedRead {
            id,
            offset: request.offset,
            len: request.len.min(MAX_DATA),
        };
        let is_queued = match self
            .handles
            .get_mut(&request.handle)
            .map(|open| &mut open.handle)
        {
            Some(Handle::Directory { .. }) | None => return Err(BAD_HANDLE.into()),
            Some(Handle::Writer { .. }) if self.settings.access == Access::WriteOnly => {
                return Err(denied(WRITE_ONLY));
            }
            // OpenSSH's server answers no bytes with no bytes, wherever they are asked for: Java's streams do, and would
            // take an end of file for the end.
            Some(_) if read.len == 0 => {
                return Ok(Some(
                    Data {
                        id,
                        data: Vec::new(),
                    }
                    .into(),
                ));
            }
            Some(Handle::Reader(download)) => download.read(read),
            Some(Handle::Writer {
                queued_reads: Some(queue),
                ..
            }) => queue.push(read),
            Some(Handle::Writer {
                upload,
                queued_reads,
                ..
            }) => match self.replies.try_room(read.len) {
                Some(room) => {
                    let replies = self.replies.clone();
                    let reply = move |result: Result<Bytes, UploadError>| match result {
                        Ok(data) => _ = replies.data(id, vec![data], room),
                        Err(error) => replies.reply(id, Err(error.into())),
                    };
                    upload
                        .read(read.offset, read.len as usize, Box::new(reply))
                        .await;
                    true
                }
                None => queued_reads
                    .insert(QueuedReads::start(
                        upload,
                        self.replies.clone(),
                        &self.limits,
                    ))
                    .push(read),
            },
        };
        if is_queued {
            Ok(None)
        } else {
            Err(VfsError::Refused("too many READs at once").into())
        }
    }

    fn fstat(&self, id: u32, handle: &str) -> Outcome {
        let stat = match self.find(handle).ok_or(BAD_HANDLE)? {
            Handle::Directory { .. } => Stat::Directory,
            Handle::Reader(download) => Stat::from(download.object()),
            Handle::Writer { upload, .. } => Stat::from(upload.progress()),
        };
        Ok(Some(
            Attrs {
                id,
                attrs: self.view.attributes(&stat),
            }
            .into(),
        ))
    }

    /// Times, modes and owners have no place in S3: accepted and ignored where the path exists, or `put -p`, WinSCP and
    /// sshfs would fail.
    async fn setstat(&mut self, id: u32, set: &SetStat) -> Outcome {
        let path = Path::parse(&set.path)?;
        let tree = &self.settings.vfs;
        match set.attrs.size {
            Some(size) => done(id, tree.set_size(&path, size).await),
            None => done(id, tree.stat(&path).await.map(drop)),
        }
    }

    async fn fsetstat(&mut self, id: u32, handle: &str, size: Option<u64>) -> Outcome {
        match (self.find(handle).ok_or(BAD_HANDLE)?, size) {
            (Handle::Writer { upload, .. }, Some(size)) => {
                upload.truncate(size, self.outcome(id, ())).await;
                Ok(None)
            }
            (_, Some(_)) => Err(denied(NOT_FOR_WRITING)),
            (_, None) => done::<Failure>(id, Ok(())),
        }
    }

    async fn readdir(&mut self, id: u32, handle: &str) -> Outcome {
        let open = self.handles.get_mut(handle).map(|open| &mut open.handle);
        let Some(Handle::Directory { listing, path, age }) = open else {
            return Err(BAD_HANDLE.into());
        };
        let mut length = 0;
        let fits = |item: &Item| {
            // The name twice, once in the long line, and what stands around it.
            length += 2 * item.name.len() + 128;
            length <= NAMES_LIMIT
        };
        let items = listing.take(fits).await?;
        if items.is_empty() {
            return Err(Failure::bare(StatusCode::Eof));
        }
        self.recent
            .note(path, &items, *age, self.settings.vfs.changes());
        let files = items.into_iter().map(|item| self.view.file(item)).collect();
        Ok(Some(Name { id, files }.into()))
    }

    async fn rename(&mut self, id: u32, from: &str, to: &str, replace: bool) -> Outcome {
        let rename = EarlyRename {
            id,
            from: Path::parse(from)?,
            to: Path::parse(to)?,
            replace,
        };
        let rename = match written_paths(&self.handles).any(|path| rename.concerns(path)) {
            true => match self.early_renames.keep(rename) {
                Ok(()) => return Ok(None),
                Err(rename) => rename,
            },
            false => rename,
        };
        let EarlyRename { from, to, .. } = rename;
        done(id, self.settings.vfs.rename(&from, &to, replace).await)
    }

    /// Carries out the renames that wait for no CLOSE any more, and answers them.
    pub(super) async fn finish_early_renames(&mut self) {
        loop {
            let due = self.early_renames.take_due(written_paths(&self.handles));
            let Some(EarlyRename {
                id,
                from,
                to,
                replace,
            }) = due
            else {
                return;
            };
            let answer = match catch_panic(self.settings.vfs.rename(&from, &to, replace)).await {
                Ok(renamed) => done(id, renamed),
                Err(panicked) => Err(panicked.into()),
            };
            RequestLine::of_rename(from.as_str(), to.as_str()).log(&self.settings.who, &answer);
            self.replies.reply(id, answer);
        }
    }

    async fn extended(&mut self, id: u32, request: &str, mut data: Bytes) -> Outcome {
        let mut text = || string(&mut data).ok_or_else(malformed);
        match request {
            // The longest packet, READ and WRITE, and the most handles.
            LIMITS => numbers(
                id,
                &[
                    MAX_PACKET as u64,
                    MAX_DATA.into(),
                    MAX_DATA.into(),
                    MAX_HANDLES as u64,
                ],
            ),
            POSIX_RENAME => self.rename(id, &text()?, &text()?, true).await,
            STATVFS => self.statvfs(id),
            FSTATVFS if self.handles.contains_key(&text()?) => self.statvfs(id),
            FSTATVFS => Err(BAD_HANDLE.into()),
            EXPAND_PATH => match text()?.as_str() {
                "~" => name(id, "/"),
                path if path.starts_with('~') && !path.starts_with("~/") => {
                    Err(VfsError::Refused("other users' homes can't be seen").into())
                }
                path => name(id, path.trim_start_matches('~')),
            },
            _ => Err(VfsError::Unsupported("this extension is not supported").into()),
        }
    }

    /// S3 has no end: a figure no client takes for a full disk, in blocks of 1 MiB so that it fits everyone's integers.
    fn statvfs(&self, id: u32) -> Outcome {
        const BLOCK: u64 = 1 << 20;
        const MANY: u64 = 1 << 40;
        // SSH_FXE_STATVFS_ST_RDONLY and _NOSUID.
        let flags = u64::from(self.settings.access == Access::ReadOnly) | 2;
        // Sizes of blocks and fragments; blocks and inodes: all, free, available; file system id, flags, longest name.
        numbers(
            id,
            &[
                BLOCK,
                BLOCK,
                MANY,
                MANY,
                MANY,
                MANY,
                MANY,
                MANY,
                0,
                flags,
                LONGEST_NAME,
            ],
        )
    }
}

/// The paths of the files that are open for writing.
fn written_paths(handles: &HashMap<String, OpenHandle>) -> impl Iterator<Item = &Path> + Clone {
    handles.values().filter_map(|open| match &open.handle {
        Handle::Writer { path, .. } => Some(path),
        Handle::Reader(_) | Handle::Directory { .. } => None,
    })
}

/// What a request needs the user's access for.
#[derive(Clone, Copy)]
enum Need {
    /// Names, sizes, and handles that are open already.
    Nothing,
    /// What is in a file.
    Content,
    /// A change of a file, a directory or a name.
    Change,
}

impl Need {
    /// An extension that is not known here needs the most.
    fn of(packet: &Packet) -> Need {
        match packet {
            Packet::Open(open) if open.pflags.intersects(CHANGES) => Need::Change,
            Packet::Open(_) => Need::Content,
            Packet::SetStat(_)
            | Packet::FSetStat(_)
            | Packet::Remove(_)
            | Packet::MkDir(_)
            | Packet::RmDir(_)
            | Packet::Rename(_)
            | Packet::Symlink(_) => Need::Change,
            Packet::Extended(extended) => match extended.request.as_str() {
                LIMITS | STATVFS | FSTATVFS | EXPAND_PATH => Need::Nothing,
                _ => Need::Change,
            },
            Packet::Close(_)
            | Packet::Read(_)
            | Packet::Lstat(_)
            | Packet::Fstat(_)
            | Packet::OpenDir(_)
            | Packet::ReadDir(_)
            | Packet::RealPath(_)
            | Packet::Stat(_)
            | Packet::ReadLink(_) => Need::Nothing,
            Packet::Write(_)
            | Packet::Init(_)
            | Packet::Version(_)
            | Packet::Status(_)
            | Packet::Handle(_)
            | Packet::Data(_)
            | Packet::Name(_)
            | Packet::Attrs(_)
            | Packet::ExtendedReply(_) => Need::Change,
        }
    }
}

fn malformed() -> Failure {
    Failure::new(StatusCode::BadMessage, "malformed extended request")
}

const BAD_HANDLE: VfsError = VfsError::Refused("no such handle is open");
const WRITE_ONLY: &str = "this user may only write";
const NOT_FOR_WRITING: &str = "the file is not open for writing";

fn denied(why: &str) -> Failure {
    Failure::new(StatusCode::PermissionDenied, why)
}

fn done<E: Into<Failure>>(id: u32, result: Result<(), E>) -> Outcome {
    result.map_err(E::into)?;
    Ok(Some(Packet::status(
        id,
        StatusCode::Ok,
        status_words(StatusCode::Ok),
        "en",
    )))
}

fn name(id: u32, path: &str) -> Outcome {
    Ok(Some(
        Name {
            id,
            files: vec![File::dummy(Path::parse(path)?.as_str())],
        }
        .into(),
    ))
}

/// The reply of an extension that consists of numbers.
fn numbers(id: u32, fields: &[u64]) -> Outcome {
    let data = fields
        .iter()
        .flat_map(|field| field.to_be_bytes())
        .collect();
    Ok(Some(ExtendedReply { id, data }.into()))
}

/// The log's line and the figures, of the same summary.
fn note_upload(
    put: &str,
    UploadSummary {
        bytes,
        parts,
        took,
        result,
    }: UploadSummary,
) {
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
            log::warn!(
                "{put} forced to end after {bytes} bytes {seconds:.3} s: nothing was stored"
            );
            "cut_off"
        }
    };
    count("upload", outcome, bytes);
}

/// As [`note_upload`]. A client that stops reading in mid-file is no failure: that is how `tail` and previews look.
fn note_download(
    get: &str,
    DownloadSummary {
        bytes,
        requests,
        took,
        error,
    }: DownloadSummary,
) {
    let seconds = took.as_secs_f64();
    match &error {
        None => log::info!("{get} {bytes} bytes {requests} requests {seconds:.3} s"),
        Some(error) => log::warn!("{get} failed after {bytes} bytes {seconds:.3} s: {error}"),
    }
    count(
        "download",
        if error.is_some() { "failed" } else { "ok" },
        bytes,
    );
}

fn count(direction: &'static str, result: &'static str, bytes: u64) {
    let labels = [("direction", direction), ("result", result)];
    counter!(TRANSFERS, &labels).increment(1);
    counter!(TRANSFERRED_BYTES, &labels).increment(bytes);
}
