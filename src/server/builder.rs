//! The settings of a server, their defaults and their checks.

use super::{Algorithms, HostKey, Server, temporary};
use crate::events::{Events, Metrics, TextLog};
use crate::path::{Key, PathError, top_key};
use crate::store::{Store, Timeouts};
use crate::transfer::PartSizes;
use crate::users::Auth;
use ipnet::IpNet;
use std::fmt::{self, Debug, Formatter};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// The pool has room for this many parts at least.
pub(super) const MIN_PARTS_IN_MEMORY: u64 = 4;
/// Longest time of a setting. Far longer ones would exceed the range of the clock.
const MAX_TIME: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
/// A client with 12 kbit/s needs this time for a part of 5 MiB. S3 shows only complete parts, so
/// the upload of a client that is slower, or pauses longer, looks like one of a server that died.
const MIN_ABANDONED_AFTER: Duration = Duration::from_secs(60 * 60);

/// Why a server can't be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// No keys can begin with the prefix.
    #[error("the prefix {prefix:?} can't be used: {source}")]
    #[non_exhaustive]
    Prefix {
        /// The setting.
        prefix: String,
        /// What is wrong with it.
        source: PathError,
    },
    /// The store takes no parts of this size.
    #[error("a part size of {part_size} bytes is not between {min} and {max}")]
    #[non_exhaustive]
    PartSize {
        /// The setting.
        part_size: u64,
        /// The smallest part that the store takes.
        min: u64,
        /// The largest part that the store takes.
        max: u64,
    },
    /// Uploads of several users could not go on side by side.
    #[error(
        "a buffer memory of {buffer_memory} bytes is less than four parts of {part_size} bytes: raise it, or lower the \
         part size"
    )]
    #[non_exhaustive]
    BufferMemory {
        /// The setting.
        buffer_memory: u64,
        /// The size of the first part.
        part_size: u64,
    },
    /// Nothing would be allowed.
    #[error("{setting} is 0: use a number from 1")]
    #[non_exhaustive]
    ZeroLimit {
        /// The setter's name.
        setting: &'static str,
    },
    /// Every session would end, or every request fail, at once.
    #[error("{setting} is 0: use a time like 30 seconds")]
    #[non_exhaustive]
    ZeroTime {
        /// The setter's name.
        setting: &'static str,
    },
    /// The clock has no such times.
    #[error("{setting} is longer than 100 years: use a time like 30 seconds")]
    #[non_exhaustive]
    LongTime {
        /// The setter's name.
        setting: &'static str,
    },
    /// Uploads in progress would be aborted.
    #[error(
        "abandoned_after is {given:?}, below {least:?}: it must exceed the time that a client takes to send one part, or \
         uploads in progress are aborted"
    )]
    #[non_exhaustive]
    AbandonedAfter {
        /// The setting.
        given: Duration,
        /// The smallest that is allowed.
        least: Duration,
    },
    /// Every client could claim any address.
    #[error(
        "the load balancers' network {network} is the whole Internet: name the addresses or networks of the load balancers"
    )]
    #[non_exhaustive]
    EveryProxy {
        /// The setting.
        network: IpNet,
    },
    /// No temporary host key can be made.
    #[error("can't make a host key")]
    #[non_exhaustive]
    HostKey {
        /// The system's error.
        source: anyhow::Error,
    },
}

/// What a server needs besides a store and an [`Auth`].
pub(super) struct Settings {
    /// Prefix of every key: a folder of the bucket, or empty.
    pub prefix: String,
    /// What all keys below the prefix begin with.
    pub top: Key,
    /// At least one.
    pub host_keys: Vec<HostKey>,
    /// Size in bytes of the pool for the part and read-ahead buffers of all sessions.
    pub buffer_memory: u64,
    /// Sizes of the parts of uploads.
    pub part_sizes: PartSizes,
    /// Directories that clients make are stored as empty objects (`dir/`), not only remembered by
    /// this process.
    pub dir_markers: bool,
    /// Limit on connections.
    pub max_sessions: usize,
    /// Limit on files that are open for writing.
    pub max_uploads: usize,
    /// From the connection to the login.
    pub login_timeout: Duration,
    /// A session ends after this time without a request or an answer.
    pub idle_timeout: Duration,
    /// For transfers to finish once the server drains.
    pub drain_timeout: Duration,
    /// Incomplete uploads of earlier servers are aborted when nothing was added to them for this
    /// time.
    pub abandoned_after: Duration,
    /// Which algorithms clients are offered.
    pub algorithms: Algorithms,
    /// Load balancers, whose connections begin with a header of the PROXY protocol.
    pub proxies: Vec<IpNet>,
    /// How long the store may be silent.
    pub timeouts: Timeouts,
    /// Who is told what happens.
    pub listeners: Vec<Arc<dyn Events>>,
}

/// Sizes of parts, as they are set.
#[derive(Clone, Copy)]
enum Parts {
    /// Checked, and capped by the pool.
    Checked { part_size: u64, are_equal: bool },
    /// As given, for tests.
    Unchecked(PartSizes),
}

/// Makes a [`Server`]. Every setting has the default of `sftpd serve`, except for
/// [`max_uploads`](Self::max_uploads), which `serve` computes from the machine's memory, and host
/// keys, which it keeps in a directory.
#[must_use]
pub struct ServerBuilder {
    store: Arc<dyn Store>,
    auth: Arc<dyn Auth>,
    prefix: String,
    host_keys: Vec<HostKey>,
    buffer_memory: u64,
    parts: Parts,
    dir_markers: bool,
    max_sessions: usize,
    max_uploads: usize,
    login_timeout: Duration,
    idle_timeout: Duration,
    drain_timeout: Duration,
    abandoned_after: Duration,
    min_abandoned_after: Duration,
    algorithms: Algorithms,
    proxies: Vec<IpNet>,
    timeouts: Timeouts,
    listeners: Vec<Arc<dyn Events>>,
}

/// Shows neither the store, the logins, keys nor listeners.
impl Debug for ServerBuilder {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerBuilder")
            .field("prefix", &self.prefix)
            .field("buffer_memory", &self.buffer_memory)
            .field("part_size", &self.first_part_size())
            .field("equal_parts", &self.has_equal_parts())
            .field("dir_markers", &self.dir_markers)
            .field("max_sessions", &self.max_sessions)
            .field("max_uploads", &self.max_uploads)
            .field("login_timeout", &self.login_timeout)
            .field("idle_timeout", &self.idle_timeout)
            .field("drain_timeout", &self.drain_timeout)
            .field("abandoned_after", &self.abandoned_after)
            .field("algorithms", &self.algorithms)
            .field("proxies", &self.proxies)
            .field("timeouts", &self.timeouts)
            .finish_non_exhaustive()
    }
}

impl ServerBuilder {
    pub(super) fn new(store: Arc<dyn Store>, auth: Arc<dyn Auth>) -> ServerBuilder {
        ServerBuilder {
            store,
            auth,
            prefix: String::new(),
            host_keys: Vec::new(),
            buffer_memory: 256 * 1024 * 1024,
            parts: Parts::Checked {
                part_size: PartSizes::default().first,
                are_equal: false,
            },
            dir_markers: false,
            max_sessions: 1000,
            max_uploads: 256,
            login_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(30 * 60),
            drain_timeout: Duration::from_secs(60),
            abandoned_after: Duration::from_secs(24 * 60 * 60),
            min_abandoned_after: MIN_ABANDONED_AFTER,
            algorithms: Algorithms::Modern,
            proxies: Vec::new(),
            timeouts: Timeouts::default(),
            listeners: vec![Arc::new(TextLog), Arc::new(Metrics)],
        }
    }

    /// Prefix of every key in every store: a folder of the bucket, or empty, as by default.
    pub fn prefix(mut self, prefix: impl Into<String>) -> ServerBuilder {
        self.prefix = prefix.into();
        self
    }

    /// Keys by which clients know the server: see [`load_or_create`](super::load_or_create).
    ///
    /// Without any, [`build`](Self::build) makes a temporary one, which is good for trying out only:
    /// clients see another host after each start.
    pub fn host_keys(mut self, keys: impl IntoIterator<Item = HostKey>) -> ServerBuilder {
        self.host_keys = keys.into_iter().collect();
        self
    }

    /// Size in bytes of the pool for the part and read-ahead buffers of all sessions: 256 MiB by
    /// default, at least four parts.
    ///
    /// The server's memory is bounded by 34 MiB, this, 5.25 MiB for each open upload and 4 MiB for
    /// each session.
    pub fn buffer_memory(mut self, bytes: u64) -> ServerBuilder {
        self.buffer_memory = bytes;
        self
    }

    /// Size in bytes of the first parts of an upload: 5 MiB by default. Doubles every 1,000 parts,
    /// up to 64 MiB or a quarter of the buffer memory.
    pub fn part_size(mut self, bytes: u64) -> ServerBuilder {
        self.parts = Parts::Checked {
            part_size: bytes,
            are_equal: self.has_equal_parts(),
        };
        self
    }

    /// Whether all parts but the last have the same size, as Cloudflare R2 demands. Off by default.
    pub fn equal_parts(mut self, are_equal: bool) -> ServerBuilder {
        self.parts = Parts::Checked {
            part_size: self.first_part_size(),
            are_equal,
        };
        self
    }

    /// Sizes of parts that no S3 would take, so that tests need less memory.
    #[doc(hidden)]
    pub fn part_sizes(mut self, sizes: PartSizes) -> ServerBuilder {
        self.parts = Parts::Unchecked(sizes);
        self
    }

    /// Whether directories that clients make are stored as empty objects (`dir/`), which other
    /// servers and the next start see. Off by default.
    pub fn dir_markers(mut self, are_stored: bool) -> ServerBuilder {
        self.dir_markers = are_stored;
        self
    }

    /// Limit on connections: 1,000 by default. More are refused.
    pub fn max_sessions(mut self, limit: usize) -> ServerBuilder {
        self.max_sessions = limit;
        self
    }

    /// Limit on files that are open for writing: 256 by default. A user who holds as many as are
    /// free gets no more.
    ///
    /// With one upload in each session, `(memory - 34 MiB - buffer_memory) / 9.25 MiB` fit into the
    /// memory of the machine or the container: the default needs 2.6 GiB.
    pub fn max_uploads(mut self, limit: usize) -> ServerBuilder {
        self.max_uploads = limit;
        self
    }

    /// For a client to log in after it has connected: 30 seconds by default.
    pub fn login_timeout(mut self, time: Duration) -> ServerBuilder {
        self.login_timeout = time;
        self
    }

    /// A session ends after this time without a request or an answer: 30 minutes by default.
    pub fn idle_timeout(mut self, time: Duration) -> ServerBuilder {
        self.idle_timeout = time;
        self
    }

    /// For open transfers to finish once the server shuts down: 60 seconds by default.
    pub fn drain_timeout(mut self, time: Duration) -> ServerBuilder {
        self.drain_timeout = time;
        self
    }

    /// Incomplete uploads of a server that died are aborted when nothing was added to them for this
    /// time: 24 hours by default, at least one.
    pub fn abandoned_after(mut self, time: Duration) -> ServerBuilder {
        self.abandoned_after = time;
        self
    }

    /// As [`abandoned_after`](Self::abandoned_after), but any time, for tests.
    #[doc(hidden)]
    pub fn abandoned_after_any(mut self, time: Duration) -> ServerBuilder {
        self.abandoned_after = time;
        self.min_abandoned_after = Duration::ZERO;
        self
    }

    /// Which algorithms clients are offered: [`Algorithms::Modern`] by default.
    pub fn algorithms(mut self, algorithms: Algorithms) -> ServerBuilder {
        self.algorithms = algorithms;
        self
    }

    /// Networks ([`IpNet`]) of load balancers, whose connections begin with a header of the PROXY
    /// protocol: none by default.
    pub fn proxies(mut self, networks: impl IntoIterator<Item = IpNet>) -> ServerBuilder {
        self.proxies = networks.into_iter().collect();
        self
    }

    /// How long the store may be silent over a request that opens, looks, reads, lists or deletes:
    /// 30 seconds by default. Then the client gets an error.
    pub fn open_timeout(mut self, time: Duration) -> ServerBuilder {
        self.timeouts.open = time;
        self
    }

    /// How long the store may be silent over a request that sends or makes content: 30 seconds by
    /// default, counted from its last [sign of life](crate::store::SignsOfLife); with
    /// `S3Store` a second and a third try of the request are some. A
    /// CompleteMultipartUpload gets 20 ms for each part on top, and a copy a second for each 10 MiB.
    /// Then the client gets an error, and the upload is aborted.
    pub fn close_timeout(mut self, time: Duration) -> ServerBuilder {
        self.timeouts.close = time;
        self
    }

    /// Adds a listener to those that are told what happens: at first the log and the metrics.
    pub fn events(mut self, listener: impl Events) -> ServerBuilder {
        self.listeners.push(Arc::new(listener));
        self
    }

    /// Replaces all listeners, those that [`events`](Self::events) has added before too.
    pub fn listeners(mut self, listeners: Vec<Arc<dyn Events>>) -> ServerBuilder {
        self.listeners = listeners;
        self
    }

    /// Fails as [`build`](Self::build) would because of a setting, but builds nothing.
    pub fn check(&self) -> Result<(), BuildError> {
        self.check_prefix()?;
        self.check_part_sizes()?;
        for (setting, limit) in [
            ("max_sessions", self.max_sessions),
            ("max_uploads", self.max_uploads),
        ] {
            if limit == 0 {
                return Err(BuildError::ZeroLimit { setting });
            }
        }
        self.check_times()?;
        for network in &self.proxies {
            if network.prefix_len() == 0 {
                return Err(BuildError::EveryProxy { network: *network });
            }
        }
        Ok(())
    }

    /// Makes the server. It serves nothing yet.
    pub fn build(self) -> Result<Server, BuildError> {
        self.check()?;
        let top = self.check_prefix()?;
        let part_sizes = self.check_part_sizes()?;
        let mut host_keys = self.host_keys;
        if host_keys.is_empty() {
            match temporary() {
                Ok(key) => {
                    log::warn!(
                        "made a temporary host key ({key}): after the next start clients see another host"
                    );
                    host_keys.push(key);
                }
                Err(source) => return Err(BuildError::HostKey { source }),
            }
        }
        let settings = Settings {
            prefix: self.prefix,
            top,
            host_keys,
            buffer_memory: self.buffer_memory,
            part_sizes,
            dir_markers: self.dir_markers,
            max_sessions: self.max_sessions.min(Semaphore::MAX_PERMITS),
            max_uploads: self.max_uploads.min(Semaphore::MAX_PERMITS),
            login_timeout: self.login_timeout,
            idle_timeout: self.idle_timeout,
            drain_timeout: self.drain_timeout,
            abandoned_after: self.abandoned_after,
            algorithms: self.algorithms,
            proxies: self.proxies,
            timeouts: self.timeouts,
            listeners: self.listeners,
        };
        Ok(Server::new(self.store, self.auth, settings))
    }

    fn has_equal_parts(&self) -> bool {
        match self.parts {
            Parts::Checked { are_equal, .. } => are_equal,
            Parts::Unchecked(sizes) => sizes.are_equal(),
        }
    }

    fn first_part_size(&self) -> u64 {
        match self.parts {
            Parts::Checked { part_size, .. } => part_size,
            Parts::Unchecked(sizes) => sizes.first,
        }
    }

    fn check_prefix(&self) -> Result<Key, BuildError> {
        match top_key(&self.prefix) {
            Ok(top) => Ok(top),
            Err(source) => Err(BuildError::Prefix {
                prefix: self.prefix.clone(),
                source,
            }),
        }
    }

    fn check_part_sizes(&self) -> Result<PartSizes, BuildError> {
        let (part_size, are_equal) = match self.parts {
            Parts::Unchecked(sizes) => return Ok(sizes),
            Parts::Checked {
                part_size,
                are_equal,
            } => (part_size, are_equal),
        };
        let limits = self.store.limits();
        // A store may take empty parts, but no file is made of them.
        let min = limits.min_part.max(1);
        if !(min..=limits.max_part).contains(&part_size) {
            return Err(BuildError::PartSize {
                part_size,
                min,
                max: limits.max_part,
            });
        }
        let most = self.buffer_memory / MIN_PARTS_IN_MEMORY;
        if part_size > most {
            return Err(BuildError::BufferMemory {
                buffer_memory: self.buffer_memory,
                part_size,
            });
        }
        let default = PartSizes::default();
        let double_every = match are_equal {
            true => 0,
            false => default.double_every,
        };
        Ok(PartSizes {
            first: part_size,
            cap: default.cap.min(most),
            double_every,
            ..default
        })
    }

    fn check_times(&self) -> Result<(), BuildError> {
        let above_zero = [
            ("login_timeout", self.login_timeout),
            ("idle_timeout", self.idle_timeout),
            ("open_timeout", self.timeouts.open),
            ("close_timeout", self.timeouts.close),
        ];
        for (setting, time) in above_zero {
            if time.is_zero() {
                return Err(BuildError::ZeroTime { setting });
            }
            check_long_time(setting, time)?;
        }
        check_long_time("drain_timeout", self.drain_timeout)?;
        check_long_time("abandoned_after", self.abandoned_after)?;
        if self.abandoned_after < self.min_abandoned_after {
            return Err(BuildError::AbandonedAfter {
                given: self.abandoned_after,
                least: self.min_abandoned_after,
            });
        }
        Ok(())
    }
}

fn check_long_time(setting: &'static str, time: Duration) -> Result<(), BuildError> {
    if time > MAX_TIME {
        return Err(BuildError::LongTime { setting });
    }
    Ok(())
}
