//! A job for each file that arrives, in two ways.
//!
//! - Below `later/`: a listener puts the job into a queue after the upload has ended. The client may
//!   have its OK before the job is in the queue, and if the process dies in between there is none.
//! - Below `first/`: a store that wraps another queues the job before it returns, so before CLOSE is
//!   answered. If the queue is full, the client gets an error, and sends the file again.
//!
//! `cargo run --example queue`, then `sftp -P 2222 guest@127.0.0.1` with the password `guest`, and
//! `put FILE later/FILE` or `put FILE first/FILE`.

use async_trait::async_trait;
use bytes::Bytes;
use sftpd::events::{Event, Events, TransferResult, Who};
use sftpd::server::Server;
use sftpd::store::memory::MemoryStore;
use sftpd::store::{
    Attributes, Condition, Copied, CopySource, Key, Limits, ListRequest, Object, Page, Part,
    PartSource, Result, Store, StoreError,
};
use sftpd::users::{Account, UserList};
use std::ops::Range;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// Jobs that wait. A queue that outlives the process would be a table, or a message broker.
const QUEUE_LENGTH: usize = 1000;

/// What is to be done.
#[derive(Debug)]
struct Job {
    file: String,
    bytes: u64,
}

/// Queues a job after each upload below `later/`.
struct QueueLater(mpsc::Sender<Job>);

impl Events for QueueLater {
    fn event(&self, _who: &Who, event: &Event) {
        let Event::Written(written) = event else {
            return;
        };
        if written.result != TransferResult::Ok || !written.path.starts_with("/later/") {
            return;
        }
        let job = Job {
            file: written.path.clone(),
            bytes: written.bytes,
        };
        // A listener must not wait.
        if let Err(full) = self.0.try_send(job) {
            eprintln!("lost: {full}");
        }
    }
}

/// Queues a job before an upload below `first/` is confirmed.
struct QueueFirst<S> {
    store: S,
    jobs: mpsc::Sender<Job>,
}

impl<S: Store> QueueFirst<S> {
    /// A place in the queue for the job of this key, taken before anything is stored; `None` for
    /// keys without jobs.
    fn reserve(&self, key: &Key) -> Result<Option<mpsc::Permit<'_, Job>>> {
        if !key.as_str().contains("/first/") {
            return Ok(None);
        }
        match self.jobs.try_reserve() {
            Ok(place) => Ok(Some(place)),
            Err(full) => Err(StoreError::Other(format!("the queue takes no job: {full}"))),
        }
    }
}

/// Fills the place that was reserved.
fn queue(place: Option<mpsc::Permit<'_, Job>>, key: &Key, object: &Object) {
    if let Some(place) = place {
        place.send(Job {
            file: key.to_string(),
            bytes: object.size,
        });
    }
}

/// All but `put` and `complete` is the wrapped store's.
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
        queue(place, key, &object);
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
        queue(place, key, &object);
        Ok(object)
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

    async fn copy(&self, from: CopySource<'_>, to: &Key, condition: &Condition) -> Result<Copied> {
        self.store.copy(from, to, condition).await
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

    async fn rename(
        &self,
        from: &Key,
        version: &Object,
        to: &Key,
        condition: &Condition,
    ) -> Result<Object> {
        self.store.rename(from, version, to, condition).await
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
        while let Some(Job { file, bytes }) = queue.recv().await {
            println!("job: {file}, {bytes} bytes");
        }
    });
    let listener = TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    let ctrl_c = async { drop(tokio::signal::ctrl_c().await) };
    server.serve(listener, ctrl_c).await;
    Ok(())
}
