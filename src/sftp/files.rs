//! Requests that concern open files: OPEN, CLOSE, READ, WRITE, FSTAT, FSETSTAT.

use super::codec::{MAX_DATA, SegmentedBuf};
use super::failure::{Answer, Failure, Outcome};
use super::inbound::RequestMemory;
use super::reads::QueuedReads;
use super::replies::{PendingReply, Replies};
use super::session::{Handle, OpenHandle, Session};
use super::table::CHANGES;
use super::transfer_events::{ReadEvent, WriteEvent, tell_opened};
use crate::path::Path;
use crate::transfer::{
    Download, MAX_USER_HANDLES, NoUploadPlace, Read as QueuedRead, Reply, UploadError, UploadPlace,
};
use crate::vfs::{Stat, VfsError, WriteMode};
use bytes::Bytes;
use russh_sftp::protocol::{self, Data, FSetStat, Open, OpenFlags, StatusCode};
use tokio::sync::OwnedSemaphorePermit;

impl Session {
    pub(super) async fn open(&mut self, id: u32, open: Open) -> Outcome {
        self.check_may_open()?;
        let path = match Path::parse(&open.filename) {
            Ok(path) => path,
            Err(error) if open.pflags.contains(OpenFlags::CREATE) => {
                return Err(Failure::of_new_name(error));
            }
            Err(error) => return Err(error.into()),
        };
        let place = self.take_place()?;
        let handle = match open.pflags.intersects(CHANGES) {
            true => self.open_for_writing(path, &open).await?,
            false => self.open_for_reading(&path, &open).await?,
        };
        Ok(self.add_handle(id, handle, place))
    }

    async fn open_for_reading(&mut self, path: &Path, open: &Open) -> Result<Handle, Failure> {
        let vfs = &self.settings.vfs;
        let events = &self.settings.events;
        let file = vfs.open_read(path, &self.limits).await?;
        let event = ReadEvent::new(events, path, &file.key, file.object.object());
        tell_opened(events, path, open);
        let download = Download::open(
            vfs.transfers().clone(),
            file.key,
            file.object,
            self.limits.clone(),
            self.replies.clone(),
            move |summary| event.tell(summary),
        );
        Ok(Handle::Reader(download))
    }

    async fn open_for_writing(&mut self, path: Path, open: &Open) -> Result<Handle, Failure> {
        let flags = open.pflags;
        let mode = WriteMode {
            create: flags.contains(OpenFlags::CREATE),
            truncate: flags.contains(OpenFlags::TRUNCATE),
            exclusive: flags.contains(OpenFlags::CREATE | OpenFlags::EXCLUDE),
        };
        let place = self.take_upload_place()?;
        let vfs = &self.settings.vfs;
        let events = &self.settings.events;
        let file = vfs.open_write(&path, mode).await?;
        let event = WriteEvent::new(events, &path, &vfs.file_key(&path)?, open.attrs.size);
        tell_opened(events, &path, open);
        let upload = file.start(vfs.transfers().clone(), events.clone(), move |summary| {
            event.tell(summary);
        });
        Ok(Handle::Writer {
            upload,
            path,
            append: flags.contains(OpenFlags::APPEND),
            place,
            is_kept_open: false,
            queued_reads: None,
        })
    }

    pub(super) fn add_handle(
        &mut self,
        id: u32,
        handle: Handle,
        place: OwnedSemaphorePermit,
    ) -> Answer {
        self.next_handle += 1;
        let name = format!("{:x}", self.next_handle);
        let open = OpenHandle {
            handle,
            _place: place,
        };
        self.handles.insert(name.clone(), open);
        Answer::now(protocol::Handle { id, handle: name })
    }

    /// A place for a file or directory to be opened.
    pub(super) fn take_place(&self) -> Result<OwnedSemaphorePermit, Failure> {
        match self.settings.limits.open_handle() {
            Some(place) => Ok(place),
            None => {
                let why = format!("{MAX_USER_HANDLES} files of this user are open already");
                Err(Failure::new(StatusCode::Failure, why))
            }
        }
    }

    /// A place for a file to be written.
    fn take_upload_place(&self) -> Result<UploadPlace, Failure> {
        match self.settings.limits.open_upload(&self.settings.uploads) {
            Ok(place) => Ok(place),
            Err(NoUploadPlace::User) => Err(too_many_uploads("this user")),
            Err(NoUploadPlace::Server) => Err(too_many_uploads("the server")),
        }
    }

    pub(super) async fn close(&mut self, id: u32, handle: &str) -> Outcome {
        let Some(open) = self.handles.remove(handle) else {
            return Err(Failure::bad_handle());
        };
        let (upload, upload_place) = match open.handle {
            Handle::Writer { upload, place, .. } => (upload, place),
            Handle::Reader(_) | Handle::Directory { .. } => return Ok(Answer::ok(id)),
        };
        // Other requests go on while the store finishes; those that must see the outcome wait for
        // it.
        let closing_place = self.closing.clone().acquire_owned().await;
        let reply = self.replies.reply_later(id);
        upload
            .close(Box::new(move |result| {
                reply.send_status(result);
                drop((closing_place, upload_place));
            }))
            .await;
        Ok(Answer::Later)
    }

    /// `memory` is held until the data is part of the upload.
    pub(super) async fn write(
        &mut self,
        id: u32,
        handle: &str,
        offset: u64,
        data: SegmentedBuf,
        memory: RequestMemory,
    ) -> Outcome {
        let open = self.handles.get_mut(handle);
        match open.map(|open| &mut open.handle) {
            Some(Handle::Writer {
                upload,
                append,
                is_kept_open,
                ..
            }) => {
                *is_kept_open = false;
                let data = memory.hold(data.into_iter().collect());
                let offset = match append {
                    true => None,
                    false => Some(offset),
                };
                upload
                    .write(offset, data, status_reply(&self.replies, id))
                    .await;
                Ok(Answer::Later)
            }
            Some(Handle::Reader(_)) => Err(not_for_writing()),
            Some(Handle::Directory { .. }) | None => Err(Failure::bad_handle()),
        }
    }

    pub(super) async fn read(&mut self, id: u32, request: &protocol::Read) -> Outcome {
        let read = QueuedRead {
            id,
            offset: request.offset,
            len: request.len.min(MAX_DATA),
        };
        let handle = self.handles.get_mut(&request.handle);
        let is_queued = match handle.map(|open| &mut open.handle) {
            Some(Handle::Directory { .. }) | None => return Err(Failure::bad_handle()),
            // OpenSSH's server answers no bytes with no bytes, wherever they are asked for: Java's
            // streams ask so, and would take an end of file for the end.
            Some(Handle::Reader(_) | Handle::Writer { .. }) if read.len == 0 => {
                let data = Vec::new();
                return Ok(Answer::now(Data { id, data }));
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
                    let reply = self.replies.reply_later(id);
                    let len = read.len as usize;
                    let send = move |result| send_data(reply, result, room);
                    upload.read(read.offset, len, Box::new(send)).await;
                    true
                }
                None => {
                    let replies = self.replies.clone();
                    let queue = QueuedReads::start(upload, replies, &self.limits);
                    queued_reads.insert(queue).push(read)
                }
            },
        };
        match is_queued {
            true => Ok(Answer::Later),
            false => Err(VfsError::Refused("too many READs at once").into()),
        }
    }

    pub(super) fn fstat(&self, id: u32, handle: &str) -> Outcome {
        let stat = match self.find(handle) {
            Some(Handle::Directory { .. }) => Stat::Directory,
            Some(Handle::Reader(download)) => Stat::from(download.object()),
            Some(Handle::Writer { upload, .. }) => Stat::from(upload.progress()),
            None => return Err(Failure::bad_handle()),
        };
        Ok(self.attrs(id, &stat))
    }

    /// FSETSTAT, as SETSTAT.
    pub(super) async fn fset_stat(&mut self, id: u32, set_stat: &FSetStat) -> Outcome {
        match (self.find(&set_stat.handle), set_stat.attrs.size) {
            (None, _) => Err(Failure::bad_handle()),
            (Some(Handle::Writer { upload, .. }), Some(size)) => {
                upload.truncate(size, status_reply(&self.replies, id)).await;
                Ok(Answer::Later)
            }
            (Some(Handle::Reader(_) | Handle::Directory { .. }), Some(_)) => Err(not_for_writing()),
            (Some(_), None) => Ok(Answer::ok(id)),
        }
    }
}

/// Answers with OK, or with the failure.
fn status_reply(replies: &Replies, id: u32) -> Reply<()> {
    let reply = replies.reply_later(id);
    Box::new(move |result| reply.send_status(result))
}

fn send_data(reply: PendingReply, result: Result<Bytes, UploadError>, room: OwnedSemaphorePermit) {
    match result {
        Ok(data) => reply.send_data(data, room),
        Err(error) => reply.send(Err(error.into())),
    }
}

fn not_for_writing() -> Failure {
    Failure::denied("the file is not open for writing")
}

fn too_many_uploads(whose: &str) -> Failure {
    let why = format!(
        "{whose} has as many files open for writing as it may (--max-uploads): try again later"
    );
    Failure::new(StatusCode::Failure, why)
}
