//! The stores of a server: its own, and those that accounts bring.
//!
//! Called by `server` and by connections when a session begins. Invariant: sessions on the same
//! store, which is the same `Arc`, share its locks of names and its overlay. All stores share the
//! pool, the tasks that the server waits for, and its end.

use super::builder::{MIN_PARTS_IN_MEMORY, Settings};
use crate::events::Teller;
use crate::store::Store;
use crate::transfer::{BufferPool, PartSizes, Transfers};
use crate::vfs::Overlay;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

/// How often incomplete uploads are looked for, the first time at once.
const REAPER_INTERVAL: Duration = Duration::from_secs(3600);

/// A store, and what its sessions share.
#[derive(Clone)]
pub struct Mount {
    /// As the application gave it; transfers have it inside one that limits its time.
    store: Arc<dyn Store>,
    pub transfers: Arc<Transfers>,
    pub overlay: Arc<Overlay>,
}

impl Mount {
    /// Whether neither a session nor the application has the store.
    fn is_unused(&self) -> bool {
        Arc::strong_count(&self.transfers) == 1
            && Arc::strong_count(&self.overlay) == 1
            && Arc::strong_count(&self.store) == 2
    }
}

/// The store of accounts that bring it.
struct OwnMount {
    mount: Mount,
    _reaper: AbortOnDropHandle<Option<()>>,
}

/// Why a store of an account can't be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "it demands parts of {part_size} bytes, and a buffer memory of {buffer_memory} bytes is less \
     than four of them: raise it"
)]
pub struct PartsTooLarge {
    part_size: u64,
    buffer_memory: u64,
}

/// See the module.
pub struct Mounts {
    settings: Arc<Settings>,
    /// Tells what happens without a session.
    events: Teller,
    /// The server's memory.
    pub pool: BufferPool,
    /// Work in all stores that the server waits for before it ends.
    pub tasks: TaskTracker,
    /// Cancelled when this work must end soon.
    pub stop: CancellationToken,
    /// The server's store.
    common: Mount,
    /// Stores of accounts, by address.
    // A std lock: never held across an await, nor while a store is dropped.
    own: Mutex<HashMap<usize, OwnMount>>,
}

impl Mounts {
    pub fn new(store: Arc<dyn Store>, settings: Arc<Settings>, events: Teller) -> Mounts {
        let pool = BufferPool::new(settings.buffer_memory);
        let tasks = TaskTracker::new();
        let stop = CancellationToken::new();
        let transfers = Transfers {
            events: events.clone(),
            tasks: tasks.clone(),
            stop: stop.clone(),
            ..Transfers::new(
                store.clone(),
                settings.timeouts,
                pool.clone(),
                settings.part_sizes,
            )
        };
        Mounts {
            common: Mount {
                store,
                transfers: Arc::new(transfers),
                overlay: Arc::default(),
            },
            settings,
            events,
            pool,
            tasks,
            stop,
            own: Mutex::default(),
        }
    }

    /// The mount of a store that an account brings, or of the server's.
    pub fn find(&self, own: Option<&Arc<dyn Store>>) -> Result<Mount, PartsTooLarge> {
        let store = match own {
            Some(store) if address_of(store) != address_of(&self.common.store) => store,
            Some(_) | None => return Ok(self.common.clone()),
        };
        let part_sizes = self.part_sizes(store.as_ref())?;
        let mut mounts = self.own();
        let entry = mounts.entry(address_of(store));
        let own = entry.or_insert_with(|| self.mount(store.clone(), part_sizes));
        Ok(own.mount.clone())
    }

    /// The sizes of parts that are sent to a store of an account. Those that the server's own store
    /// takes were checked when the server was built.
    fn part_sizes(&self, store: &dyn Store) -> Result<PartSizes, PartsTooLarge> {
        let min_part = store.limits().min_part;
        let buffer_memory = self.settings.buffer_memory;
        if min_part > buffer_memory / MIN_PARTS_IN_MEMORY {
            return Err(PartsTooLarge {
                part_size: min_part,
                buffer_memory,
            });
        }
        Ok(self.settings.part_sizes.raised_to(min_part))
    }

    /// Drops the stores of accounts that are no longer used.
    pub fn drop_unused(&self) {
        let mut unused = Vec::new();
        let mut mounts = self.own();
        for (_, own) in mounts.extract_if(|_, own| own.mount.is_unused()) {
            unused.push(own);
        }
        drop(mounts);
        // Only now, as dropping a store may take long or end in another session.
        drop(unused);
    }

    /// Starts to look for incomplete uploads in the server's store. It ends with the server.
    pub fn start_reaper(&self) {
        self.spawn_reaper(&self.common.transfers);
    }

    fn mount(&self, store: Arc<dyn Store>, part_sizes: PartSizes) -> OwnMount {
        let transfers = Transfers {
            events: self.events.clone(),
            tasks: self.tasks.clone(),
            stop: self.stop.clone(),
            ..Transfers::new(
                store.clone(),
                self.settings.timeouts,
                self.pool.clone(),
                part_sizes,
            )
        };
        let mount = Mount {
            store,
            transfers: Arc::new(transfers),
            overlay: Arc::default(),
        };
        let reaper = self.spawn_reaper(&mount.transfers);
        OwnMount {
            mount,
            _reaper: AbortOnDropHandle::new(reaper),
        }
    }

    fn spawn_reaper(&self, transfers: &Arc<Transfers>) -> JoinHandle<Option<()>> {
        let reaper = reap(Arc::downgrade(transfers), self.settings.clone());
        tokio::spawn(self.stop.clone().run_until_cancelled_owned(reaper))
    }

    fn own(&self) -> MutexGuard<'_, HashMap<usize, OwnMount>> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The same for all clones of an `Arc`, and for no other one that exists at the same time.
fn address_of(store: &Arc<dyn Store>) -> usize {
    Arc::as_ptr(store).addr()
}

/// Periodically aborts the incomplete uploads of earlier servers, while the store is mounted.
async fn reap(transfers: Weak<Transfers>, settings: Arc<Settings>) {
    while let Some(transfers) = transfers.upgrade() {
        transfers
            .abort_incomplete_uploads(&settings.top, settings.abandoned_after)
            .await;
        drop(transfers);
        sleep(REAPER_INTERVAL).await;
    }
}
