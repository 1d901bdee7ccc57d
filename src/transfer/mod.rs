//! Transfers: how the bytes of one file move between a session and the store, in both directions.
//!
//! Called by `vfs`, which changes names, and by `sftp`, which opens, writes, reads and closes.
//! Knows keys and bytes, and neither paths nor SFTP. Everything that a transfer holds is counted
//! here: memory in the [`BufferPool`], open files in the [`UserLimits`].

mod download;
mod limits;
mod multipart;
mod name_locks;
mod part_buffer;
mod part_places;
mod pool;
mod read_ahead;
mod read_queue;
mod reaper;
mod upload;
mod upload_task;

pub use download::{Download, DownloadSummary, OpenedObject, ReadSink};
pub use limits::{
    BlockMemory, MAX_USER_HANDLES, MAX_WAITING_READS, NoUploadPlace, SessionLimits, UploadPlace,
    UploadPlaces, UserLimits,
};
pub use multipart::{COPY_PART_SIZE, MultipartUpload};
pub use name_locks::{LockedName, NameLock, NameLocks};
pub use part_buffer::{
    ANSWERED_AHEAD, MAX_EARLY, PartBuffer, PartBufferError, PartSizes, REORDER_WINDOW,
};
pub use pool::{Buffer, BufferPool, Reservation, Share};
pub use read_ahead::{FIRST_BLOCK, ReadAhead};
pub use read_queue::{Read, ReadQueue};
pub use upload::{MAX_HOLES, Progress, Reader, Reply, Target, Upload, UploadError, UploadSummary};

use crate::events::Teller;
use crate::store::{Limits, PatientStore, Store, Timeouts};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Time for requests under way to end once the server has to stop. S3 may have carried out a
/// request that is cancelled, or not.
const LAST_REQUESTS_TIME: Duration = Duration::from_secs(5);

/// The first bytes of a part, for which every open upload has memory of its own, in bytes. The rest
/// of a larger part is taken from the pool.
pub const OWN_BYTES: u64 = 5 * 1024 * 1024;

/// What every transfer needs of the server.
pub struct Transfers {
    /// Where the bytes go. No request to it lasts for ever.
    pub store: Arc<dyn Store>,
    /// What the store demands and allows.
    pub limits: Limits,
    /// The memory promise.
    pub pool: BufferPool,
    /// How large parts are.
    pub sizes: PartSizes,
    /// Names that are being changed.
    pub locks: NameLocks,
    /// Uploads and renames, which the server waits for before it ends.
    pub tasks: TaskTracker,
    /// Cancelled when this work must end soon.
    pub stop: CancellationToken,
    /// Tells what the server does by itself.
    pub events: Teller,
}

impl Transfers {
    /// Nothing is under way yet.
    pub fn new(
        store: Arc<dyn Store>,
        timeouts: Timeouts,
        pool: BufferPool,
        sizes: PartSizes,
    ) -> Transfers {
        let limits = store.limits();
        Transfers {
            store: Arc::new(PatientStore::new(store, timeouts)),
            limits,
            pool,
            sizes: sizes.within(&limits),
            locks: NameLocks::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            events: Teller::default(),
        }
    }

    /// What a part that leaves early is a multiple of, in bytes. Parts of this server are known by
    /// it.
    pub fn short_part_unit(&self) -> u64 {
        OWN_BYTES.max(self.limits.min_part)
    }

    /// Resolves to what the future returns, or to `None` if it has not ended soon after the server
    /// has to stop. For one request to the store: work that has to be undone would be dropped with
    /// what it has begun.
    pub async fn run_until_stopped<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let stopped = async {
            self.stop.cancelled().await;
            sleep(LAST_REQUESTS_TIME).await;
        };
        tokio::select! {
            biased;
            done = work => Some(done),
            () = stopped => None,
        }
    }
}
