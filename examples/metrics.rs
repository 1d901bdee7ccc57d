//! The metrics of the server in the application's own recorder, here Prometheus', together with one
//! of the application.
//!
//! `cargo run --example metrics`, then `sftp -P 2222 guest@127.0.0.1` with the password `guest`.
//! Ctrl-C ends it, and prints the metrics.

use metrics::counter;
use metrics_exporter_prometheus::PrometheusBuilder;
use sftpd::events::{Event, Events, Who};
use sftpd::server::Server;
use sftpd::store::memory::MemoryStore;
use sftpd::users::{Account, UserList};
use std::sync::Arc;
use tokio::net::TcpListener;

/// Counts files by their ending, which the server does not.
struct CountEndings;

impl Events for CountEndings {
    fn event(&self, _who: &Who, event: &Event) {
        if let Event::Written(written) = event {
            let ending = match written.path.rsplit_once('.') {
                Some((_, "csv")) => "csv",
                Some((_, "xml")) => "xml",
                // The client chooses names: no series for each.
                _ => "other",
            };
            counter!("myapp_files_total", "ending" => ending).increment(1);
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).unwrap_or("127.0.0.1:2222".into());
    // Before the server is built.
    let recorder = PrometheusBuilder::new().install_recorder()?;
    let users = UserList::default().with_password(Account::new("guest"), "guest")?;
    let server = Server::builder(Arc::new(MemoryStore::default()), users)
        .events(CountEndings)
        .build()?;
    let listener = TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    let ctrl_c = async { drop(tokio::signal::ctrl_c().await) };
    server.serve(listener, ctrl_c).await;
    println!("{}", recorder.render());
    Ok(())
}
