//! An SFTP server that streams uploads straight into S3, from a few megabytes of RAM.
//!
//! The binary `sftpd` is a thin user of this library. To embed the server, bring a [`store::Store`] and a
//! [`users::Auth`], or use those that are here, and call [`server::run`]; `examples/embed.rs` does.
//!
//! Data flows one way: socket → [`server`] → [`sftp`] → [`tree`] → [`upload`] / [`download`] → [`store`].

pub mod budget;
pub mod download;
pub mod server;
pub mod sftp;
pub mod store;
pub mod tree;
pub mod upload;
pub mod users;
