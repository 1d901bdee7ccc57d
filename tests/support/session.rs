//! The settings of a session without a connection around it, also for the properties and for
//! `bench/micro.rs`.

use sftpd::events::Teller;
use sftpd::sftp::SessionParams;
use sftpd::store::{Store, Timeouts};
use sftpd::transfer::BufferPool;
use sftpd::transfer::{PartSizes, Transfers};
use sftpd::transfer::{UploadPlaces, UserLimits};
use sftpd::users::Access;
use sftpd::{path::Home, vfs::Vfs};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A session of the user alice, whose home is given without its last slash, and the tasks of its
/// transfers.
pub fn settings(
    store: Arc<dyn Store>,
    home: &str,
    buffer_memory: u64,
) -> (SessionParams, TaskTracker) {
    let pool = BufferPool::new(buffer_memory);
    let context = Arc::new(Transfers::new(
        store,
        Timeouts::default(),
        pool,
        PartSizes::default(),
    ));
    let tasks = context.tasks.clone();
    let settings = SessionParams {
        pool: context.pool.clone(),
        limits: Arc::new(UserLimits::new(1000, &context.pool)),
        uploads: Arc::new(UploadPlaces::new(256)),
        vfs: Vfs::new(context, Arc::default(), Home::new("", home).unwrap(), false),
        access: Access::ReadWrite,
        events: Teller::default(),
        user: "alice".into(),
        idle_timeout: Duration::from_secs(60),
        drain: CancellationToken::new(),
    };
    (settings, tasks)
}
