//! One function a request: parse, act, one reply.

use super::attributes::View;
use super::wire::{Body, MAX_DATA, MAX_PACKET, Request, string};
use super::{End, Failure, Handle, MAX_HANDLES, Session};
use crate::download::{self, Read};
use crate::tree::{Item, Path, Stat, TreeError, WriteMode};
use crate::upload::{self, UploadError};
use crate::users::Access;
use bytes::Bytes;
use russh_sftp::extensions::{LimitsExtension, Statvfs};
use russh_sftp::protocol::*;
use std::collections::HashMap;

/// Extensions that work here, with their versions, as
/// [OpenSSH's PROTOCOL](https://github.com/openssh/openssh-portable/blob/master/PROTOCOL) describes them.
const EXTENSIONS: [(&str, &str); 4] = [(LIMITS, "1"), (POSIX_RENAME, "1"), (STATVFS, "2"), (EXPAND_PATH, "1")];
const LIMITS: &str = "limits@openssh.com";
const POSIX_RENAME: &str = "posix-rename@openssh.com";
const STATVFS: &str = "statvfs@openssh.com";
const EXPAND_PATH: &str = "expand-path@openssh.com";

/// A NAME reply stays below this many bytes: the least that version 3 asks every client to take is 34,000.
const NAMES_LIMIT: usize = 30_000;

/// Flags of OPEN that make or change a file; paramiko's mode `x` has no WRITE among them.
const CHANGES: OpenFlags =
    OpenFlags::WRITE.union(OpenFlags::APPEND).union(OpenFlags::CREATE).union(OpenFlags::TRUNCATE);

type Answer = Result<Option<Packet>, Failure>;

fn denied(why: &str) -> Failure {
    Failure(StatusCode::PermissionDenied, why.to_owned())
}

fn bad_handle() -> Failure {
    Failure(StatusCode::Failure, "no such handle is open".to_owned())
}

fn done(id: u32) -> Answer {
    Ok(Some(Packet::status(id, StatusCode::Ok, "", "en")))
}

impl Session {
    /// Carries out one request. Its reply is queued now, or by the task that was given it.
    pub(super) async fn handle(&mut self, request: Request) -> Result<(), End> {
        let id = request.id;
        if matches!(request.body, Body::Init) {
            self.version_settled = true;
            let extensions = EXTENSIONS.map(|(name, version)| (name.to_owned(), version.to_owned()));
            self.replies.send(Version { version: VERSION, extensions: HashMap::from(extensions) }.into());
            return Ok(());
        }
        if !self.version_settled {
            return Err(End::NoInit);
        }
        let answer = match request.body {
            Body::Write { handle, offset, data } => self.write(id, &handle, offset, data).await,
            Body::Packet(packet) => self.packet(id, packet).await,
            Body::Malformed | Body::Init => Err(Failure(StatusCode::BadMessage, "malformed request".to_owned())),
            Body::Unknown(kind) => {
                Err(Failure(StatusCode::OpUnsupported, format!("request type {kind} is not in version 3")))
            }
        };
        match answer {
            Ok(Some(packet)) => self.replies.send(packet),
            Ok(None) => {}
            Err(Failure(code, message)) => {
                log::debug!("{}: request {id} failed: {message}", self.settings.who);
                self.replies.status(id, code, &message);
            }
        }
        Ok(())
    }

    async fn packet(&mut self, id: u32, packet: Packet) -> Answer {
        self.permit(&packet)?;
        match packet {
            Packet::Open(open) => self.open(open).await,
            Packet::Close(close) => self.close(id, &close.handle).await,
            Packet::Read(read) => self.read(id, &read).await,
            Packet::Lstat(Lstat { path, .. }) | Packet::Stat(russh_sftp::protocol::Stat { path, .. }) => {
                self.stat(id, &path).await
            }
            Packet::Fstat(fstat) => self.fstat(id, &fstat.handle),
            Packet::SetStat(set) => self.setstat(id, &set.path, &set.attrs).await,
            Packet::FSetStat(set) => self.fsetstat(id, &set.handle, &set.attrs).await,
            Packet::OpenDir(open) => self.opendir(id, &open.path).await,
            Packet::ReadDir(read) => self.readdir(id, &read.handle).await,
            Packet::Remove(remove) => {
                let path = Path::parse(&remove.filename)?;
                self.settings.tree.remove(&path).await?;
                done(id)
            }
            Packet::MkDir(mkdir) => {
                let path = Path::parse(&mkdir.path)?;
                self.settings.tree.make_directory(&path).await?;
                done(id)
            }
            Packet::RmDir(rmdir) => {
                let path = Path::parse(&rmdir.path)?;
                self.settings.tree.remove_directory(&path).await?;
                done(id)
            }
            Packet::Rename(rename) => self.rename(id, &rename.oldpath, &rename.newpath, false).await,
            Packet::RealPath(real) => name(id, Path::parse(&real.path)?),
            Packet::Extended(extended) => self.extended(id, &extended.request, extended.data.into()).await,
            Packet::ReadLink(_) | Packet::Symlink(_) => {
                Err(Failure(StatusCode::OpUnsupported, "S3 has no links".to_owned()))
            }
            Packet::Write(_)
            | Packet::Init(_)
            | Packet::Version(_)
            | Packet::Status(_)
            | Packet::Handle(_)
            | Packet::Data(_)
            | Packet::Name(_)
            | Packet::Attrs(_)
            | Packet::ExtendedReply(_) => Err(Failure(StatusCode::BadMessage, "not a request".to_owned())),
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
        match self.settings.access {
            Access::ReadOnly if changes => Err(denied("this user may only read")),
            Access::WriteOnly if matches!(packet, Packet::Open(_)) && !changes => {
                Err(denied("this user may only write"))
            }
            Access::ReadWrite | Access::ReadOnly | Access::WriteOnly => Ok(()),
        }
    }

    fn view(&self) -> View<'_> {
        View { user: &self.settings.user, access: self.settings.access, started: self.started }
    }

    fn add(&mut self, id: u32, handle: Handle) -> Answer {
        self.next_handle += 1;
        let name = format!("{:x}", self.next_handle);
        self.handles.insert(name.clone(), handle);
        Ok(Some(russh_sftp::protocol::Handle { id, handle: name }.into()))
    }

    fn check_room(&self) -> Result<(), Failure> {
        if self.settings.drain.is_cancelled() {
            return Err(Failure(StatusCode::Failure, "the server is shutting down".to_owned()));
        }
        if self.handles.len() >= MAX_HANDLES {
            return Err(Failure(StatusCode::Failure, format!("{MAX_HANDLES} files are open already")));
        }
        Ok(())
    }

    async fn open(&mut self, open: Open) -> Answer {
        self.check_room()?;
        let path = Path::parse(&open.filename)?;
        let (who, shown, flags) = (self.settings.who.clone(), path.clone(), open.pflags);
        if !flags.intersects(CHANGES) {
            let log = move |summary| log_download(&who, &shown, &summary);
            let download = self.settings.tree.open_read(&path, self.replies.clone(), log).await?;
            return self.add(open.id, Handle::Reader(download));
        }
        let mode = WriteMode {
            create: flags.contains(OpenFlags::CREATE),
            truncate: flags.contains(OpenFlags::TRUNCATE),
            exclusive: flags.contains(OpenFlags::CREATE | OpenFlags::EXCLUDE),
        };
        let log = move |summary| log_upload(&who, &shown, &summary);
        let upload = self.settings.tree.open_write(&path, mode, log).await?;
        self.add(open.id, Handle::Writer { upload, append: flags.contains(OpenFlags::APPEND) })
    }

    async fn close(&mut self, id: u32, handle: &str) -> Answer {
        match self.handles.remove(handle) {
            None => Err(bad_handle()),
            Some(Handle::Directory(_) | Handle::Reader(_)) => done(id),
            Some(Handle::Writer { upload, .. }) => {
                // Other requests go on while the store finishes; those that must see the outcome wait for it.
                let place = self.closing.clone().acquire_owned().await;
                let reply = self.outcome(id);
                let reply = move |result| {
                    reply(result);
                    drop(place);
                };
                upload.close(Box::new(reply)).await;
                Ok(None)
            }
        }
    }

    /// Answers a request with how it went.
    fn outcome(&self, id: u32) -> upload::Reply<()> {
        let replies = self.replies.clone();
        Box::new(move |result| match result.map_err(Failure::from) {
            Ok(()) => replies.status(id, StatusCode::Ok, ""),
            Err(Failure(code, message)) => replies.status(id, code, &message),
        })
    }

    async fn write(&mut self, id: u32, handle: &str, offset: u64, data: Vec<Bytes>) -> Answer {
        match self.handles.get(handle) {
            Some(Handle::Writer { upload, append, .. }) => {
                let offset = if *append { None } else { Some(offset) };
                upload.write(offset, data, self.outcome(id)).await;
                Ok(None)
            }
            Some(Handle::Reader(_)) => Err(denied("the file is not open for writing")),
            Some(Handle::Directory(_)) | None => Err(bad_handle()),
        }
    }

    async fn read(&mut self, id: u32, read: &russh_sftp::protocol::Read) -> Answer {
        let len = read.len.min(MAX_DATA);
        match self.handles.get(&read.handle) {
            Some(Handle::Reader(download)) => match download.read(Read { id, offset: read.offset, len }) {
                true => Ok(None),
                false => Err(Failure(StatusCode::Failure, "too many READs at once".to_owned())),
            },
            Some(Handle::Writer { .. }) if self.settings.access == Access::WriteOnly => {
                Err(denied("this user may only write"))
            }
            Some(Handle::Writer { upload, .. }) => {
                let replies = self.replies.clone();
                let Some(room) = replies.try_room(len) else {
                    return Err(Failure(StatusCode::Failure, "too many READs at once".to_owned()));
                };
                let reply = move |result: Result<Bytes, UploadError>| match result.map_err(Failure::from) {
                    Ok(data) if data.is_empty() => replies.status(id, StatusCode::Eof, "end of file"),
                    Ok(data) => replies.data(id, &data, room),
                    Err(Failure(code, message)) => replies.status(id, code, &message),
                };
                upload.read(read.offset, len as usize, Box::new(reply)).await;
                Ok(None)
            }
            Some(Handle::Directory(_)) | None => Err(bad_handle()),
        }
    }

    async fn stat(&mut self, id: u32, path: &str) -> Answer {
        let path = Path::parse(path)?;
        let stat = self.settings.tree.stat(&path).await?;
        Ok(Some(Attrs { id, attrs: self.view().attributes(&stat) }.into()))
    }

    fn fstat(&self, id: u32, handle: &str) -> Answer {
        let stat = match self.handles.get(handle).ok_or_else(bad_handle)? {
            Handle::Directory(_) => Stat::Directory,
            Handle::Reader(download) => Stat::from(download.object()),
            Handle::Writer { upload, .. } => Stat::from(upload.progress()),
        };
        Ok(Some(Attrs { id, attrs: self.view().attributes(&stat) }.into()))
    }

    /// Times, modes and owners have no place in S3: accepted and ignored, or `put -p`, WinSCP and sshfs would fail.
    async fn setstat(&mut self, id: u32, path: &str, attrs: &FileAttributes) -> Answer {
        if let Some(size) = attrs.size {
            let path = Path::parse(path)?;
            self.settings.tree.set_size(&path, size).await?;
        }
        done(id)
    }

    async fn fsetstat(&mut self, id: u32, handle: &str, attrs: &FileAttributes) -> Answer {
        match (self.handles.get(handle).ok_or_else(bad_handle)?, attrs.size) {
            (Handle::Writer { upload, .. }, Some(size)) => {
                upload.truncate(size, self.outcome(id)).await;
                Ok(None)
            }
            (Handle::Reader(_) | Handle::Directory(_), Some(_)) => Err(denied("the file is not open for writing")),
            (_, None) => done(id),
        }
    }

    async fn opendir(&mut self, id: u32, path: &str) -> Answer {
        self.check_room()?;
        let path = Path::parse(path)?;
        let listing = self.settings.tree.open_directory(&path).await?;
        self.add(id, Handle::Directory(listing))
    }

    async fn readdir(&mut self, id: u32, handle: &str) -> Answer {
        let Some(Handle::Directory(listing)) = self.handles.get_mut(handle) else { return Err(bad_handle()) };
        let mut room = NAMES_LIMIT;
        // The name twice, once in the long line, and what stands around it.
        let fits = |item: &Item| match room.checked_sub(2 * item.name.len() + 128) {
            Some(rest) => {
                room = rest;
                true
            }
            None => false,
        };
        let items = listing.take(fits).await?;
        if items.is_empty() {
            return Err(Failure(StatusCode::Eof, "end of directory".to_owned()));
        }
        let view = self.view();
        let files = items.into_iter().map(|item| view.file(item)).collect();
        Ok(Some(Name { id, files }.into()))
    }

    async fn rename(&mut self, id: u32, from: &str, to: &str, replace: bool) -> Answer {
        let (from, to) = (Path::parse(from)?, Path::parse(to)?);
        self.settings.tree.rename(&from, &to, replace).await?;
        done(id)
    }

    async fn extended(&mut self, id: u32, request: &str, mut data: Bytes) -> Answer {
        let mut text = || string(&mut data).ok_or(TreeError::BadPath("malformed extended request"));
        match request {
            LIMITS => extended_reply(
                id,
                &LimitsExtension {
                    max_packet_len: MAX_PACKET as u64,
                    max_read_len: MAX_DATA.into(),
                    max_write_len: MAX_DATA.into(),
                    max_open_handles: MAX_HANDLES as u64,
                },
            ),
            POSIX_RENAME => {
                let (from, to) = (text()?, text()?);
                self.rename(id, &from, &to, true).await
            }
            STATVFS => extended_reply(id, &endless(self.settings.access)),
            EXPAND_PATH => {
                let path = text()?;
                match path.strip_prefix('~').unwrap_or(&path) {
                    rest if rest.is_empty() || rest.starts_with('/') || rest == path => name(id, Path::parse(rest)?),
                    _ => Err(Failure(StatusCode::Failure, "other users' homes can't be seen".to_owned())),
                }
            }
            _ => Err(Failure(StatusCode::OpUnsupported, "this extension is not supported".to_owned())),
        }
    }
}

fn name(id: u32, path: Path) -> Answer {
    Ok(Some(Name { id, files: vec![File::dummy(path.as_str())] }.into()))
}

fn extended_reply(id: u32, fields: &impl serde::Serialize) -> Answer {
    let data = russh_sftp::ser::to_bytes(fields).map_err(|error| Failure(StatusCode::Failure, error.to_string()))?;
    Ok(Some(ExtendedReply { id, data: data.into() }.into()))
}

/// S3 has no end: a figure no client takes for a full disk, in blocks of 1 MiB so that it fits everyone's integers.
fn endless(access: Access) -> Statvfs {
    const BLOCKS: u64 = 1 << 40;
    let read_only = u64::from(access == Access::ReadOnly);
    Statvfs {
        block_size: 1 << 20,
        fragment_size: 1 << 20,
        blocks: BLOCKS,
        blocks_free: BLOCKS,
        blocks_avail: BLOCKS,
        inodes: BLOCKS,
        inodes_free: BLOCKS,
        inodes_avail: BLOCKS,
        fs_id: 0,
        // SSH_FXE_STATVFS_ST_RDONLY and _NOSUID.
        flags: read_only | 2,
        name_max: crate::store::MAX_KEY as u64,
    }
}

fn log_upload(who: &str, path: &Path, summary: &upload::Summary) {
    let upload::Summary { bytes, parts, took, result } = summary;
    let seconds = took.as_secs_f64();
    match result {
        Some(Ok(())) => log::info!("{who}: put {:?} {bytes} bytes {parts} parts {seconds:.3} s", path.as_str()),
        Some(Err(error)) => {
            log::warn!("{who}: put {:?} failed after {bytes} bytes {seconds:.3} s: {error}", path.as_str());
        }
        None => log::warn!(
            "{who}: put {:?} forced to end after {bytes} bytes {seconds:.3} s: nothing was stored",
            path.as_str()
        ),
    }
}

fn log_download(who: &str, path: &Path, summary: &download::Summary) {
    let download::Summary { bytes, requests, took, error } = summary;
    let seconds = took.as_secs_f64();
    match error {
        None => log::info!("{who}: get {:?} {bytes} bytes {requests} requests {seconds:.3} s", path.as_str()),
        Some(error) => log::warn!("{who}: get {:?} failed after {bytes} bytes {seconds:.3} s: {error}", path.as_str()),
    }
}
