//! A server inside another program: one guest, and files in memory.
//!
//! `cargo run --example memory`, then `sftp -P 2222 guest@127.0.0.1` with the password `guest`.

use sftpd::server::Server;
use sftpd::store::memory::MemoryStore;
use sftpd::users::{Account, UserList};
use std::sync::Arc;
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).unwrap_or("127.0.0.1:2222".into());
    let users = UserList::default().with_password(Account::new("guest"), "guest")?;
    let server = Server::builder(Arc::new(MemoryStore::default()), users).build()?;
    let listener = TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    let ctrl_c = async { drop(tokio::signal::ctrl_c().await) };
    server.serve(listener, ctrl_c).await;
    Ok(())
}
