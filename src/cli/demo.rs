//! `sftpd demo`: a server in memory, for one user.

use super::listen::ListenAddress;
use super::logging::LogFormat;
use super::serve::announce;
use super::signals::watch_signals;
use anyhow::Context;
use sftpd::server::{self, Config, Shutdown};
use sftpd::store::memory::MemoryStore;
use sftpd::users::{Account, UserList, random};
use std::net::SocketAddr;
use std::sync::Arc;

/// Serves until a signal ends it.
pub async fn run(listen: &ListenAddress, log_format: LogFormat) -> anyhow::Result<()> {
    let password = random();
    let store = MemoryStore::default();
    let auth = UserList::default().with_password(Account::new("demo"), &password)?;
    let mut config = Config::new(Arc::new(store), Arc::new(auth), server::generate()?);
    config.events = log_format.listeners();
    let listener = listen.bind().await?;
    let shutdown = Shutdown::default();
    watch_signals(shutdown.clone()).context("can't catch signals")?;
    let address = announce(&listener, &config, &shutdown)?;
    let port = address.port();
    let host = match address {
        SocketAddr::V4(ipv4) if !ipv4.ip().is_unspecified() => ipv4.ip().to_string(),
        SocketAddr::V6(ipv6) if !ipv6.ip().is_unspecified() => format!("[{}]", ipv6.ip()),
        _ => "127.0.0.1".to_owned(),
    };
    println!("Files live in memory and are gone at the end (Ctrl-C). In another terminal:\n");
    println!(
        "  sftp -P {port} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null demo@{host}\n"
    );
    println!("Password: {password}");
    server::run(listener, config, shutdown).await;
    Ok(())
}
