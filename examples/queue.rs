//! A job for each file that arrives, in two ways.
//!
//! - Below `later/`: a listener puts the job into a queue after the upload has ended. If the queue
//!   is full, or the process dies before the listener is called, the file is there without a job.
//! - Below `first/`: a store that wraps another has a place in the queue before it stores the file,
//!   and queues the job before it returns, so before CLOSE is answered. If the queue is full, the
//!   client gets an error, and sends the file again.
//!
//! Clients like rclone upload to a name that ends in `.partial`, and rename it. Such names have no
//! jobs, and a file that is renamed has one like a file that is uploaded.
//!
//! `cargo run --example queue`, then `sftp -P 2222 guest@127.0.0.1` with the password `guest`, and
//! `put FILE later/FILE` or `put FILE first/FILE`.

use async_trait::async_trait;
use bytes::Bytes;
use sftpd::events::{Event, Events, TransferResult, Who};
use sftpd::server::Server;
use sftpd::store::memory::MemoryStore;
use sftpd::store::{
    Attributes, Condition, Copied, CopySource, IncompleteUpload, Key, Limits, ListRequest, Object,
    Page, Part, PartSource, Result, Store, StoreError,
};
use sftpd::users::{Account, UserList};
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// Jobs that wait. A queue that outlives the process would be a table, or a message broker.
const QUEUE_LENGTH: usize = 1000;

/// What is to be done with a file.
#[derive(Debug)]
struct Job {
    file: String,
}

/// Whether a name is that of a file which is not complete yet.
fn is_partial(name: &str) -> bool {
    name.ends_with(".partial")
}

/// Queues a job after each upload or rename below `later/`.
struct QueueLater(mpsc::Sender<Job>);

impl Events for QueueLater {
    fn event(&self, _who: &Who, event: &Event) {
        let path = match event {
            Event::Written(written) if written.result == TransferResult::Ok => &written.path,
            // The rename of a directory is one event.
            Event::Renamed { to, .. } => to,
            _ => return,
        };
        if !path.starts_with("/later/") || is_partial(path) {
            return;
        }
        let job = Job { file: path.clone() };
        // A listener must not wait.
        if let Err(full) = self.0.try_send(job) {
            eprintln!("lost: {full}");
        }
    }
}

/// Queues a job before an upload or a rename below `first/` is confirmed.
struct QueueFirst<S> {
    /// May be an `Arc` that others hold too.
    store: S,
    jobs: mpsc::Sender<Job>,
}

impl<S: Store> QueueFirst<S> {
    /// A place in the queue for the job of this key, taken before anything is stored; `None` for
    /// keys without jobs.
    fn reserve(&self, key: &Key) -> Result<Option<mpsc::Permit<'_, Job>>> {
        if !key.as_str().contains("/first/") || is_partial(key.as_str()) {
            return Ok(None);
        }
        match self.jobs.try_reserve() {
            Ok(place) => Ok(Some(place)),
            Err(full) => Err(StoreError::Other(format!("the queue takes no job: {full}"))),
        }
    }
}

/// Fills the place that was reserved.
fn queue(place: Option<mpsc::Permit<'_, Job>>, key: &Key) {
    if let Some(place) = place {
        place.send(Job {
            file: key.to_string(),
        });
    }
}

/// The methods that make an object at a key queue its job. All others are the wrapped store's: each
/// of them, as the trait's defaults don't know what that store can do.
#[async_trait]
impl<S: Store> Store for QueueFirst<S> {
    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<Object> {
        let place = self.reserve(key)?;
        let object = self.store.put(key, body, attributes, condition).await?;
        queue(place, key);
        Ok(object)
    }

    async fn complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Object> {
        let place = self.reserve(key)?;
        let completing = self.store.complete(key, upload_id, parts, condition);
        let object = completing.await?;
        queue(place, key);
        Ok(object)
    }

    /// A rename on a store like S3, which deletes the source afterwards. If that fails, the job is
    /// there and its file may be gone again.
    async fn copy(&self, from: CopySource<'_>, to: &Key, condition: &Condition) -> Result<Copied> {
        let place = self.reserve(to)?;
        let copied = self.store.copy(from, to, condition).await?;
        queue(place, to);
        Ok(copied)
    }

    async fn rename(
        &self,
        from: &Key,
        version: &Object,
        to: &Key,
        condition: &Condition,
    ) -> Result<Object> {
        let place = self.reserve(to)?;
        let moved = self.store.rename(from, version, to, condition).await?;
        queue(place, to);
        Ok(moved)
    }

    fn limits(&self) -> Limits {
        self.store.limits()
    }

    async fn head(&self, key: &Key) -> Result<Object> {
        self.store.head(key).await
    }

    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>> {
        self.store.get(key, range, etag).await
    }

    async fn open(&self, key: &Key, limit: u64) -> Result<(Object, Bytes)> {
        self.store.open(key, limit).await
    }

    async fn list(&self, request: ListRequest<'_>) -> Result<Page> {
        self.store.list(request).await
    }

    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()> {
        self.store.delete(key, condition).await
    }

    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String> {
        self.store.create_upload(key, attributes).await
    }

    async fn upload_part(&self, key: &Key, id: &str, number: u32, body: Bytes) -> Result<Part> {
        self.store.upload_part(key, id, number, body).await
    }

    async fn abort(&self, key: &Key, id: &str) -> Result<()> {
        self.store.abort(key, id).await
    }

    async fn copy_part(
        &self,
        key: &Key,
        id: &str,
        number: u32,
        from: PartSource<'_>,
    ) -> Result<Part> {
        self.store.copy_part(key, id, number, from).await
    }

    async fn incomplete_uploads(
        &self,
        prefix: &Key,
        before: SystemTime,
    ) -> Result<Vec<IncompleteUpload>> {
        self.store.incomplete_uploads(prefix, before).await
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).unwrap_or("127.0.0.1:2222".into());
    let (jobs, mut queue) = mpsc::channel(QUEUE_LENGTH);
    let store = QueueFirst {
        store: MemoryStore::default(),
        jobs: jobs.clone(),
    };
    let users = UserList::default().with_password(Account::new("guest"), "guest")?;
    let server = Server::builder(Arc::new(store), users)
        .events(QueueLater(jobs))
        .build()?;
    tokio::spawn(async move {
        while let Some(Job { file }) = queue.recv().await {
            println!("job: {file}");
        }
    });
    let listener = TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    let ctrl_c = async { drop(tokio::signal::ctrl_c().await) };
    server.serve(listener, ctrl_c).await;
    Ok(())
}
