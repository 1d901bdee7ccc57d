//! The events of files: opened, and read or written as one transfer, from its summary.

use super::table::CHANGES;
use crate::events::{Event, Read, Teller, TransferResult, Written, shorten};
use crate::path::{Key, Path};
use crate::store::Object;
use crate::transfer::{DownloadSummary, UploadSummary};
use russh_sftp::protocol::{Open, OpenFlags};
use std::time::Duration;

/// Tells that a file was opened.
pub fn tell_opened(events: &Teller, path: &Path, open: &Open) {
    let flags = open.pflags;
    events.tell(Event::Opened {
        path: shorten(path.as_str()),
        read: flags.contains(OpenFlags::READ),
        write: flags.intersects(CHANGES),
        append: flags.contains(OpenFlags::APPEND),
        create: flags.contains(OpenFlags::CREATE),
        truncate: flags.contains(OpenFlags::TRUNCATE),
        exclusive: flags.contains(OpenFlags::EXCLUDE),
        declared_size: open.attrs.size,
    });
}

/// A file that is open for reading. A client that stops reading in mid-file is no failure: `tail`
/// and previews do so.
pub struct ReadEvent {
    events: Teller,
    path: String,
    key: Key,
    object: Object,
}

impl ReadEvent {
    pub fn new(events: &Teller, path: &Path, key: &Key, object: &Object) -> ReadEvent {
        ReadEvent {
            events: events.clone(),
            path: shorten(path.as_str()),
            key: key.clone(),
            object: object.clone(),
        }
    }

    /// Tells how it was read.
    pub fn tell(self, summary: DownloadSummary) {
        let result = match &summary.error {
            None => TransferResult::Ok,
            Some(_) => TransferResult::Failed,
        };
        self.events.tell(Event::Read(Read {
            path: self.path,
            key: self.key.to_string(),
            bytes: summary.bytes,
            size: self.object.size,
            requests: summary.requests,
            duration: summary.took,
            result,
            error: summary.error.map(|error| error.to_string()),
            etag: self.object.etag,
        }));
    }
}

/// A file that is open for writing. Dropped with the upload's task, should that panic, it tells
/// that the upload was cut off.
pub struct WriteEvent {
    events: Teller,
    path: String,
    key: Key,
    declared_size: Option<u64>,
    summary: Option<UploadSummary>,
}

impl WriteEvent {
    pub fn new(events: &Teller, path: &Path, key: &Key, declared_size: Option<u64>) -> WriteEvent {
        WriteEvent {
            events: events.clone(),
            path: shorten(path.as_str()),
            key: key.clone(),
            declared_size,
            summary: None,
        }
    }

    /// Tells how it was written.
    pub fn tell(mut self, summary: UploadSummary) {
        self.summary = Some(summary);
    }
}

impl Drop for WriteEvent {
    fn drop(&mut self) {
        let summary = self.summary.take().unwrap_or(UploadSummary {
            bytes: 0,
            parts: 0,
            took: Duration::ZERO,
            result: None,
            etag: None,
        });
        let (result, error) = match summary.result {
            Some(Ok(())) => (TransferResult::Ok, None),
            Some(Err(error)) => (TransferResult::Failed, Some(error.to_string())),
            None => (TransferResult::CutOff, None),
        };
        self.events.tell(Event::Written(Written {
            path: std::mem::take(&mut self.path),
            key: self.key.to_string(),
            bytes: summary.bytes,
            parts: summary.parts,
            duration: summary.took,
            result,
            error,
            etag: summary.etag,
            declared_size: self.declared_size,
        }));
    }
}
