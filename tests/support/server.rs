//! The server in the test's own process.

use super::PASSWORD;
use super::client::Client;
use super::s3::{BUCKET, FakeS3};
use async_trait::async_trait;
use aws_sdk_s3::config::Builder;
use sftpd::server::ServerBuilder;
use sftpd::store::s3::S3Store;
use sftpd::store::{KeptConditions, Store};
use sftpd::users::{Access, Account, Attempt, Auth, Login, Proof};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A store on the S3 of the tests.
pub fn s3_store(s3: &FakeS3) -> Arc<dyn Store> {
    s3_store_with(s3, |config| config)
}

/// A store on the S3 of the tests, with other settings of the SDK.
pub fn s3_store_with(s3: &FakeS3, change: impl FnOnce(Builder) -> Builder) -> Arc<dyn Store> {
    Arc::new(typed_s3_store(s3, change))
}

/// [`s3_store_with`], but with its own type.
pub fn typed_s3_store(s3: &FakeS3, change: impl FnOnce(Builder) -> Builder) -> S3Store {
    let config = change(s3.access().sdk_config());
    let client = aws_sdk_s3::Client::from_conf(config.build());
    S3Store::new(client, BUCKET).with_conditions(KeptConditions::ALL)
}

/// An account with the home `HOME/`.
pub fn account(name: &str, home: &str, access: Access) -> Account {
    Account::new(name).home(home).access(access)
}

/// Whether the client shows the password of every user in the tests.
pub fn has_password(attempt: &Attempt) -> bool {
    matches!(&attempt.proof, Proof::Password(password) if password == PASSWORD)
}

/// Three users who share the home `alice/`, each with another access.
struct TestAuth;

#[async_trait]
impl Auth for TestAuth {
    async fn login(&self, attempt: Attempt) -> Login {
        let access = match attempt.user.as_str() {
            "alice" => Access::ReadWrite,
            "reader" => Access::ReadOnly,
            "writer" => Access::WriteOnly,
            _ => return Login::Refuse,
        };
        if has_password(&attempt) {
            Login::Accept(account(&attempt.user, "alice", access))
        } else {
            Login::Refuse
        }
    }
}

/// A running server. Dropped, it stops.
pub struct Server {
    pub address: SocketAddr,
    pub server: sftpd::server::Server,
    /// Cancelled to shut the server down.
    pub drain: CancellationToken,
    pub task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.server.stop();
    }
}

impl Server {
    pub async fn start(store: Arc<dyn Store>) -> Server {
        Server::with(store, |builder| builder).await
    }

    /// Starts a server with other settings.
    pub async fn with(
        store: Arc<dyn Store>,
        change: impl FnOnce(ServerBuilder) -> ServerBuilder,
    ) -> Server {
        let builder = sftpd::server::Server::builder(store, TestAuth);
        Server::run(change(builder)).await
    }

    /// Starts a server with other users.
    pub async fn with_auth(store: Arc<dyn Store>, auth: impl Auth) -> Server {
        Server::run(sftpd::server::Server::builder(store, auth)).await
    }

    pub async fn run(builder: ServerBuilder) -> Server {
        let server = builder.build().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let drain = CancellationToken::new();
        let serving = server.clone();
        let drained = drain.clone().cancelled_owned();
        let task = tokio::spawn(async move { serving.serve(listener, drained).await });
        Server {
            address,
            server,
            drain,
            task,
        }
    }

    pub async fn client(&self) -> Client {
        Client::connect(self.address).await
    }

    pub async fn client_as(&self, user: &str) -> Client {
        let client = Client::login(self.address, user, PASSWORD).await;
        client.expect("login")
    }
}
