//! A local directory as a store.
//!
//! `cargo run --example folder DIRECTORY`, then `sftp -P 2222 guest@127.0.0.1` with the password
//! `guest`.

mod store;

use anyhow::Context;
use sftpd::server::Server;
use sftpd::users::{Account, UserList};
use std::path::Path;
use std::sync::Arc;
use store::FolderStore;
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().context("which directory?")?;
    let address = arguments.next().unwrap_or("127.0.0.1:2222".to_owned());
    let store = FolderStore::open(Path::new(&directory))?;
    let users = UserList::default().with_password(Account::new("guest"), "guest")?;
    // Directories that clients make are directories.
    let server = Server::builder(Arc::new(store), users)
        .dir_markers(true)
        .build()?;
    let listener = TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    let ctrl_c = async { drop(tokio::signal::ctrl_c().await) };
    server.serve(listener, ctrl_c).await;
    Ok(())
}
