//! A server inside another program: one guest, and files in memory.
//!
//! `cargo run --example memory`, then `sftp -P 2222 guest@127.0.0.1` with the password `guest`.

use sftpd::server::Server;
use sftpd::store::memory::MemoryStore;
use sftpd::users::{Account, UserList};
use std::sync::Arc;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let users = UserList::default().with_password(Account::new("guest"), "guest")?;
    let server = Server::builder(Arc::new(MemoryStore::default()), users).build()?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:2222").await?;
    println!("sftp -P 2222 guest@127.0.0.1, password guest");
    server.serve(listener, std::future::pending()).await;
    Ok(())
}
