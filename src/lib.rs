//! An SFTP server that streams uploads straight into S3, from a few megabytes of RAM.
//!
//! The binary `sftpd` is a thin user of this library. To embed the server, bring a [`store::Store`] and a
//! [`users::Auth`], or use those that are here, and call [`server::run`]; `examples/embed.rs` does.
//!
//! Data flows one way: socket → [`server`] → [`sftp`] → [`tree`] → [`upload`] / [`download`] → [`store`].

pub mod budget;
pub mod download;
pub mod limits;
pub mod locks;
pub mod metrics;
pub mod server;
pub mod sftp;
pub mod store;
pub mod tree;
pub mod upload;
pub mod users;

use futures_util::FutureExt;
use std::panic::AssertUnwindSafe;

/// What the future comes to, or, if it panics, what to tell the client. So a bug, or a store's, costs one request:
/// what the future was working on must be thrown away, or be whole at each of its awaits.
pub(crate) async fn caught<T>(future: impl Future<Output = T>) -> Result<T, String> {
    let outcome = AssertUnwindSafe(future).catch_unwind().await;
    outcome.map_err(|_| "the server broke down over this: its log says where".to_owned())
}
