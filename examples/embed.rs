//! The server inside another program, with a user check of its own and any store.
//!
//! `cargo run --example embed`, then `sftp -P 2222 guest@127.0.0.1` with the password `guest`.

use async_trait::async_trait;
use sftpd::server::{self, Config, Shutdown};
use sftpd::store::memory::MemoryStore;
use sftpd::users::{Access, Account, Attempt, Auth, Login, Proof};
use std::sync::Arc;

/// Accepts one guest, who may only read.
struct GuestAuth;

#[async_trait]
impl Auth for GuestAuth {
    async fn login(&self, attempt: Attempt) -> Login {
        match attempt.proof {
            Proof::Password(password) if attempt.user == "guest" && password == "guest" => {
                let account = Account::new("guest").home("guests");
                Login::Accept(account.access(Access::ReadOnly))
            }
            _ => Login::Refuse,
        }
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
