//! The only part that names the library: a [`Store`] before the simulated bucket, gateways without
//! sockets, and sessions on them without SSH.

use super::bucket::{
    self, Bucket, Complete, Copy, Expectation, Listed, NewVersion, Refusal, Version,
};
use super::history::Cause;
use super::plan::PART_SIZE;
use super::remote::{Kind, Remote, Trouble};
use async_trait::async_trait;
use bytes::Bytes;
use sftpd::events::Teller;
use sftpd::sftp::{Received, SessionParams, Sink, Source};
use sftpd::store::s3::doubts::{Doubts, Requests, WRITE_ID};
use sftpd::store::{
    Attributes, Condition, Copied, CopySource, Entry, KeptConditions, Key, Limits, ListRequest,
    Object, Page, Part, PartSource, Result, Store, StoreError, Timeouts, slice_pieces,
};
use sftpd::transfer::BufferPool;
use sftpd::transfer::{PartSizes, Transfers};
use sftpd::transfer::{UploadPlaces, UserLimits};
use sftpd::users::Access;
use sftpd::{
    path::Home,
    vfs::{Overlay, Vfs},
};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Files open for writing at once: more than there are clients' operations.
const MAX_UPLOADS: usize = 1000;

/// A store on the simulated bucket, which settles doubts as the one on S3 does.
struct SimulatedStore {
    remote: Remote,
    doubts: Doubts,
}

fn error_of(trouble: Trouble) -> StoreError {
    match trouble {
        Trouble::Refused(Refusal::NotFound) => StoreError::NotFound,
        Trouble::Refused(Refusal::Precondition) => StoreError::Precondition,
        Trouble::Refused(Refusal::NoSuchUpload) => StoreError::Other("NoSuchUpload".to_owned()),
        Trouble::Refused(Refusal::InvalidPart) => StoreError::Other("InvalidPart".to_owned()),
        Trouble::Broken => StoreError::Other("the simulation breaks this request".to_owned()),
        Trouble::Unclear => StoreError::Unknown("the simulation lost the answer".to_owned()),
    }
}

/// As [`error_of`], for requests whose outcome the library does not want to be told as unknown.
fn failure_of(trouble: Trouble) -> StoreError {
    match trouble {
        Trouble::Unclear => StoreError::Other("the simulation lost the answer".to_owned()),
        trouble => error_of(trouble),
    }
}

fn expectation_of(condition: &Condition) -> Expectation {
    match condition {
        Condition::None => Expectation::Anything,
        Condition::Absent => Expectation::Absent,
        Condition::Unchanged(etag) => Expectation::Version(etag.clone()),
    }
}

fn object_of(version: &Version) -> Object {
    let size = version.content.len() as u64;
    let mut attributes = version.attributes.clone();
    let mut object = Object::new(size, version.etag.clone(), SystemTime::UNIX_EPOCH);
    object.write_id = attributes.metadata.remove(WRITE_ID);
    object.attributes = Some(Arc::new(attributes));
    object
}

/// As a list request shows it.
fn listed_object_of(version: &Version) -> Object {
    let size = version.content.len() as u64;
    Object::new(size, version.etag.clone(), SystemTime::UNIX_EPOCH)
}

/// As [`error_of`], of a write under a condition: what must be unchanged is gone.
fn write_error(trouble: Trouble) -> StoreError {
    match trouble {
        Trouble::Refused(Refusal::NotFound) => StoreError::Precondition,
        trouble => error_of(trouble),
    }
}

impl SimulatedStore {
    fn keeps_conditions(&self) -> bool {
        self.remote.bucket().keeps_conditions()
    }
}

impl Requests for SimulatedStore {
    async fn send_head(&self, key: &Key) -> Result<Object> {
        let name = key.to_string();
        let effect = move |bucket: &mut Bucket, _| bucket.head(&name);
        match self.remote.request(Kind::Head, key.as_str(), effect).await {
            Ok(version) => Ok(object_of(&version)),
            Err(trouble) => Err(failure_of(trouble)),
        }
    }

    async fn send_put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<String> {
        let name = key.to_string();
        let version = NewVersion {
            attributes: attributes.clone(),
            ..NewVersion::of(body)
        };
        let expectation = expectation_of(condition);
        let effect = move |bucket: &mut Bucket, cause| {
            bucket.put(&name, version.clone(), &expectation, cause)
        };
        self.remote
            .request(Kind::Put, key.as_str(), effect)
            .await
            .map_err(write_error)
    }

    /// An upload whose id never arrives can't be ended by anybody.
    async fn send_create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String> {
        let name = key.to_string();
        let attributes = attributes.clone();
        let made: Arc<Mutex<Option<String>>> = Arc::default();
        let note = made.clone();
        let effect = move |bucket: &mut Bucket, _| {
            let id = bucket.create_upload(&name, attributes.clone());
            *note.lock().expect("no panic while it is held") = Some(id.clone());
            Ok(id)
        };
        let created = self
            .remote
            .request(Kind::CreateUpload, key.as_str(), effect)
            .await;
        let made = made.lock().expect("no panic while it is held").take();
        if let (Err(_), Some(id)) = (&created, made) {
            self.remote.bucket().abandon(&id);
        }
        created.map_err(failure_of)
    }

    /// As the real one: a repeated request that finds no upload may have met its own success.
    async fn send_complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<String> {
        let id = upload_id.to_owned();
        let parts = parts
            .iter()
            .map(|part| (part.number, part.etag.clone()))
            .collect();
        let complete = Complete {
            id,
            parts,
            expectation: expectation_of(condition),
        };
        let effect = move |bucket: &mut Bucket, cause| bucket.complete(&complete, PART_SIZE, cause);
        match self
            .remote
            .request(Kind::Complete, key.as_str(), effect)
            .await
        {
            Err(Trouble::Refused(Refusal::NoSuchUpload)) => Err(error_of(Trouble::Unclear)),
            completed => completed.map_err(write_error),
        }
    }

    async fn send_copy(
        &self,
        from: CopySource<'_>,
        to: &Key,
        condition: &Condition,
    ) -> Result<String> {
        let (source, target) = (from.key.to_string(), to.to_string());
        let source_etag = self.keeps_conditions().then(|| from.version.etag.clone());
        let copy = Copy {
            from: source,
            to: target,
            source_etag,
            expectation: expectation_of(condition),
        };
        let effect = move |bucket: &mut Bucket, cause| bucket.copy(&copy, cause);
        self.remote
            .request(Kind::Copy, to.as_str(), effect)
            .await
            .map_err(error_of)
    }

    /// The simulated bucket has none.
    async fn have_equal_checksums(&self, _keys: [&Key; 2], _versions: [&str; 2]) -> bool {
        false
    }
}

#[async_trait]
impl Store for SimulatedStore {
    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        limits.copies_itself = true;
        limits.conditions = match self.keeps_conditions() {
            true => KeptConditions::ALL,
            false => KeptConditions::NONE,
        };
        limits
    }

    async fn head(&self, key: &Key) -> Result<Object> {
        self.send_head(key).await
    }

    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>> {
        let name = key.to_string();
        let etag = etag.to_owned();
        let effect = move |bucket: &mut Bucket, _| bucket.get(&name, &etag);
        match self.remote.request(Kind::Get, key.as_str(), effect).await {
            Ok(version) => Ok(slice_pieces(&[version.content], range)),
            Err(trouble) => Err(failure_of(trouble)),
        }
    }

    async fn open(&self, key: &Key, most: u64) -> Result<(Object, Bytes)> {
        let name = key.to_string();
        let effect = move |bucket: &mut Bucket, _| bucket.head(&name);
        match self.remote.request(Kind::Get, key.as_str(), effect).await {
            Ok(version) => {
                let end = version.content.len().min(most as usize);
                Ok((object_of(&version), version.content.slice(..end)))
            }
            Err(trouble) => Err(failure_of(trouble)),
        }
    }

    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<Object> {
        let doubts = &self.doubts;
        doubts.put(self, key, body, attributes, condition).await
    }

    /// As the real one: a lost answer is decided by a look, and under a condition by a second
    /// request.
    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()> {
        let effect = delete_once(key, condition);
        let deleted = self
            .remote
            .request(Kind::Delete, key.as_str(), effect.clone())
            .await;
        let deleted = match (deleted, condition) {
            (Err(Trouble::Unclear), Condition::Unchanged(_)) => {
                self.remote
                    .request(Kind::Delete, key.as_str(), effect)
                    .await
            }
            (Err(Trouble::Refused(Refusal::NotFound)), Condition::Unchanged(_)) => {
                return Err(StoreError::NotFound);
            }
            (deleted, _) => deleted,
        };
        match deleted {
            Ok(()) | Err(Trouble::Refused(Refusal::NotFound)) => Ok(()),
            Err(Trouble::Unclear) if self.send_head(key).await == Err(StoreError::NotFound) => {
                Ok(())
            }
            Err(trouble) => Err(error_of(trouble)),
        }
    }

    async fn copy(&self, from: CopySource<'_>, to: &Key, condition: &Condition) -> Result<Copied> {
        self.doubts.copy(self, from, to, condition).await
    }

    async fn list(&self, request: ListRequest<'_>) -> Result<Page> {
        let prefix = request.prefix.to_string();
        let (is_folded, after, limit) = (request.folded, request.after, request.limit);
        let effect =
            move |bucket: &mut Bucket, _| Ok(bucket.list(&prefix, is_folded, after.clone(), limit));
        let listed = self
            .remote
            .request(Kind::List, request.prefix.as_str(), effect)
            .await;
        let (listed, next) = listed.map_err(failure_of)?;
        let mut page = Page {
            entries: Vec::new(),
            next,
        };
        for entry in listed {
            page.entries.push(match entry {
                Listed::Object(key, version) => Entry::Object(key, listed_object_of(&version)),
                Listed::Prefix(prefix) => Entry::Prefix(prefix),
            });
        }
        Ok(page)
    }

    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String> {
        self.doubts.create_upload(self, key, attributes).await
    }

    async fn upload_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        body: Bytes,
    ) -> Result<Part> {
        let id = upload_id.to_owned();
        let size = body.len() as u64;
        let effect = move |bucket: &mut Bucket, _| bucket.upload_part(&id, number, body.clone());
        match self
            .remote
            .request(Kind::UploadPart, key.as_str(), effect)
            .await
        {
            Ok(etag) => Ok(Part::new(number, size, etag)),
            Err(trouble) => Err(failure_of(trouble)),
        }
    }

    async fn copy_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        from: PartSource<'_>,
    ) -> Result<Part> {
        let body = self.get(from.key, from.range, from.etag).await?;
        self.upload_part(key, upload_id, number, body.concat().into())
            .await
    }

    async fn complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Object> {
        self.doubts
            .complete(self, key, upload_id, parts, condition)
            .await
    }

    async fn abort(&self, key: &Key, upload_id: &str) -> Result<()> {
        let id = upload_id.to_owned();
        let effect = move |bucket: &mut Bucket, _| {
            bucket.abort(&id);
            Ok(())
        };
        let aborted = self.remote.request(Kind::Abort, key.as_str(), effect).await;
        if aborted.is_err() {
            self.remote.bucket().abandon(upload_id);
        }
        aborted.map_err(failure_of)
    }
}

/// A DELETE that is carried out once, however often it arrives: it is only sent again when the
/// first one's answer did not come, and its own success then counts.
fn delete_once(
    key: &Key,
    condition: &Condition,
) -> impl Fn(&mut Bucket, Cause) -> bucket::Result<()> + Clone + Send + use<> {
    let name = key.to_string();
    let expectation = expectation_of(condition);
    let is_done = Arc::new(AtomicBool::new(false));
    move |bucket: &mut Bucket, cause| {
        if expectation != Expectation::Anything && is_done.load(Ordering::Relaxed) {
            return Ok(());
        }
        bucket.delete(&name, &expectation, cause)?;
        is_done.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// A server without sockets.
pub struct Gateway {
    context: Arc<Transfers>,
    local: Arc<Overlay>,
    limits: Arc<UserLimits>,
    uploads: Arc<UploadPlaces>,
    has_markers: bool,
}

/// The client's end of a session.
pub struct Connection {
    /// Dropped, the client hangs up.
    pub requests: mpsc::UnboundedSender<Bytes>,
    /// Ends when the server hangs up.
    pub replies: mpsc::UnboundedReceiver<Bytes>,
}

impl Gateway {
    /// `memory` is the size of its pool in bytes. With markers, other gateways see its directories.
    pub fn start(remote: Remote, memory: u64, has_markers: bool) -> Gateway {
        let sizes = PartSizes {
            first: PART_SIZE,
            cap: PART_SIZE,
            double_every: 1000,
            ..PartSizes::default()
        };
        let store = SimulatedStore {
            remote,
            doubts: Doubts::default(),
        };
        let context = Transfers::new(
            Arc::new(store),
            Timeouts::default(),
            BufferPool::new(memory),
            sizes,
        );
        let limits = Arc::new(UserLimits::new(1000, &context.pool));
        let uploads = Arc::new(UploadPlaces::new(MAX_UPLOADS));
        Gateway {
            context: Arc::new(context),
            local: Arc::default(),
            limits,
            uploads,
            has_markers,
        }
    }

    /// A session of a user with this home, and the task that serves it.
    pub fn connect(&self, home: &str, idle_timeout: Duration) -> (Connection, JoinHandle<()>) {
        let home = Home::new("", home).expect("a home of the plan");
        let settings = SessionParams {
            pool: self.context.pool.clone(),
            limits: self.limits.clone(),
            uploads: self.uploads.clone(),
            vfs: Vfs::new(
                self.context.clone(),
                self.local.clone(),
                home,
                self.has_markers,
            ),
            access: Access::ReadWrite,
            events: Teller::default(),
            user: "simulated".into(),
            idle_timeout,
            drain: CancellationToken::new(),
        };
        let (requests, source) = mpsc::unbounded_channel();
        let (sink, replies) = mpsc::unbounded_channel();
        let session = tokio::spawn(async move {
            sftpd::sftp::serve(FromClient(source), ToClient(sink), settings).await;
        });
        (Connection { requests, replies }, session)
    }

    /// Bytes of the pool that somebody holds.
    pub fn memory_used(&self) -> u64 {
        self.context.pool.used()
    }

    /// Transfers that have not ended.
    pub fn transfers(&self) -> usize {
        self.context.tasks.len()
    }
}

struct FromClient(mpsc::UnboundedReceiver<Bytes>);

impl Source for FromClient {
    async fn next(&mut self) -> Received {
        match self.0.recv().await {
            Some(bytes) => Received::Data(bytes),
            None => Received::Closed,
        }
    }
}

struct ToClient(mpsc::UnboundedSender<Bytes>);

impl Sink for ToClient {
    async fn send(&mut self, bytes: Bytes) -> bool {
        self.0.send(bytes).is_ok()
    }
}
