//! Tenants that are kept apart: each has a prefix, or a bucket of its own, and events say whose they
//! are.
//!
//! `cargo run --example tenants BUCKET`, with the usual AWS settings: `acme` has the bucket, `globex`
//! and `initech` share a store with a prefix each. Then `sftp -P 2222 acme@127.0.0.1`; the password
//! is the name.

use anyhow::Context;
use sftpd::events::{Event, Events, Who};
use sftpd::server::Server;
use sftpd::store::Store;
use sftpd::store::memory::MemoryStore;
use sftpd::store::s3::S3Store;
use sftpd::users::{Account, Attempt, Login, Proof};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::net::TcpListener;

/// What the application knows of a tenant.
#[derive(Clone)]
struct Tenant {
    number: u64,
    /// `None` in the store of all.
    bucket: Option<Arc<dyn Store>>,
}

/// Prints what each tenant does.
struct Usage;

impl Events for Usage {
    fn event(&self, who: &Who, event: &Event) {
        let account = who.account.as_ref();
        let tenant = account.and_then(|account| account.session_as::<Tenant>());
        if let (Some(tenant), Event::Written(written)) = (tenant, event) {
            let path = &written.path;
            println!("tenant {}: {path}, {} bytes", tenant.number, written.bytes);
        }
    }
}

/// A tenant sees its own prefix of the store that it is in.
fn log_in(tenants: &HashMap<String, Tenant>, attempt: &Attempt) -> Login {
    let Some(tenant) = tenants.get(&attempt.user) else {
        return Login::Refuse;
    };
    // See database_auth.rs for passwords that are not the name.
    match &attempt.proof {
        Proof::Password(password) if *password == attempt.user => {}
        _ => return Login::Refuse,
    }
    let account = Account::new(&attempt.user)
        .home(format!("tenants/{}", tenant.number))
        .session(tenant.clone());
    match &tenant.bucket {
        // The same Arc at each login.
        Some(bucket) => Login::Accept(account.store(bucket.clone())),
        None => Login::Accept(account),
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let bucket = arguments.next().context("which bucket?")?;
    let address = arguments.next().unwrap_or("127.0.0.1:2222".to_owned());
    let bucket: Arc<dyn Store> = Arc::new(S3Store::open(&bucket).await?);
    let mut tenants = HashMap::new();
    for (number, name, bucket) in [
        (1, "acme", Some(bucket)),
        (2, "globex", None),
        (3, "initech", None),
    ] {
        tenants.insert(name.to_owned(), Tenant { number, bucket });
    }
    let tenants = Arc::new(tenants);
    let login = move |attempt: Attempt| {
        let tenants = tenants.clone();
        async move { log_in(&tenants, &attempt) }
    };
    let server = Server::builder(Arc::new(MemoryStore::default()), login)
        .events(Usage)
        .build()?;
    let listener = TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    let ctrl_c = async { drop(tokio::signal::ctrl_c().await) };
    server.serve(listener, ctrl_c).await;
    Ok(())
}
