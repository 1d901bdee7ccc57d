//! `sftpd demo`: a server in memory, for one user.

use super::listen::ListenAddress;
use super::logging::LogFormat;
use super::print;
use super::serve::announce;
use super::signals::watch_signals;
use anyhow::Context;
use sftpd::server::{self, Server};
use sftpd::store::memory::MemoryStore;
use sftpd::users::{Account, UserList, random_password};
use std::net::SocketAddr;
use std::sync::Arc;

/// Serves until a signal ends it.
pub async fn run(listen: &ListenAddress, log_format: LogFormat) -> anyhow::Result<()> {
    let password = random_password();
    let auth = UserList::default().with_password(Account::new("demo"), &password)?;
    let server = Server::builder(Arc::new(MemoryStore::default()), auth)
        .host_keys(server::generate()?)
        .listeners(log_format.listeners())
        .build()?;
    let listener = listen.bind("--listen").await?;
    let drain = watch_signals(&server).context("can't catch signals")?;
    let address = announce(&listener, &server, &drain)?;
    let port = address.port();
    let host = match address {
        SocketAddr::V4(ipv4) if !ipv4.ip().is_unspecified() => ipv4.ip().to_string(),
        SocketAddr::V6(ipv6) if !ipv6.ip().is_unspecified() => format!("[{}]", ipv6.ip()),
        _ => "127.0.0.1".to_owned(),
    };
    let invitation = format!(
        "Files live in memory and are gone at the end (Ctrl-C). In another terminal:\n\n  \
         sftp -P {port} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null demo@{host}\n\n\
         Password: {password}\n"
    );
    print(invitation.as_bytes())?;
    server.serve(listener, drain.cancelled_owned()).await;
    Ok(())
}
