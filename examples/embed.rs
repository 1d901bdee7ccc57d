//! The server inside another program, with a user check of its own and any store.
//!
//! `cargo run --example embed`, then `sftp -P 2222 guest@127.0.0.1` with the password `guest`.

use async_trait::async_trait;
use sftpd::server::{self, Config, Shutdown};
use sftpd::store::memory::MemoryStore;
use sftpd::users::{Access, Account, Auth};
use std::sync::Arc;

/// Accepts one guest, who may only read.
struct GuestAuth;

#[async_trait]
impl Auth for GuestAuth {
    async fn public_key(&self, _user: &str, _key: &ssh_key::PublicKey) -> Option<Account> {
        None
    }

    async fn password(&self, user: &str, password: &str) -> Option<Account> {
        let account = Account {
            name: user.to_owned(),
            home: "guests/".to_owned(),
            access: Access::ReadOnly,
        };
        (user == "guest" && password == "guest").then_some(account)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = Config::new(
        Arc::new(MemoryStore::default()),
        Arc::new(GuestAuth),
        vec![server::temporary()?],
    );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:2222").await?;
    server::run(listener, config, Shutdown::default()).await;
    Ok(())
}
