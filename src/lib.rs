#![doc = include_str!("../docs/library.md")]
//!
//! # How it is made
//!
//! Data flows one way: socket → [`server`] → `sftp` → `vfs` → `transfer` → [`store`]. The modules
//! that are hidden here are open for this crate's own tests and benchmarks only.

pub mod events;
#[doc(hidden)]
pub mod metrics;
pub mod path;
pub mod server;
#[doc(hidden)]
pub mod sftp;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;
#[doc(hidden)]
pub mod transfer;
pub mod users;
#[doc(hidden)]
pub mod vfs;

use futures_util::FutureExt;
use std::panic::AssertUnwindSafe;

/// What clients read if a request fails because of a bug, here or in a store.
pub(crate) const INTERNAL_ERROR: &str = "internal server error, see the server's log";

/// A future panicked. The panic hook has logged where.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{INTERNAL_ERROR}")]
pub struct Panicked;

/// Resolves to what the future returns, or to an error if it panics: a bug, or one of a store,
/// costs one request. What the future was working on must be thrown away, or be whole at each of
/// its awaits.
pub(crate) async fn catch_panic<T>(future: impl Future<Output = T>) -> Result<T, Panicked> {
    let outcome = AssertUnwindSafe(future).catch_unwind().await;
    outcome.map_err(|_| Panicked)
}
