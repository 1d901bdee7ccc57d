//! What the in-process tests share: a server on a free port, a client, and an S3 to look into.

// Every test binary compiles this file and uses only a part of it.
#![allow(dead_code)]
// A panic is how a test fails.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing
)]

pub mod binary;
pub mod proxy;
pub mod s3;

use async_trait::async_trait;
use aws_sdk_s3::config::{
    BehaviorVersion, Builder, Credentials, Region, RequestChecksumCalculation,
};
use bytes::Bytes;
use russh::client::{AuthResult, Handle};
use russh_sftp::client::RawSftpSession;
use russh_sftp::client::error::Error as SftpError;
use russh_sftp::protocol::{FileAttributes, OpenFlags, Packet, StatusCode};
use s3::FakeS3;
use sftpd::server::{Config, Shutdown};
use sftpd::store::Store;
use sftpd::store::s3::S3Store;
use sftpd::users::{Access, Account, Auth};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

pub const MIB: usize = 1024 * 1024;
pub const PASSWORD: &str = "open sesame";
pub const PUT: OpenFlags = OpenFlags::WRITE
    .union(OpenFlags::CREATE)
    .union(OpenFlags::TRUNCATE);

/// A store on the S3 of the tests.
pub fn s3_store(s3: &FakeS3) -> Arc<dyn Store> {
    s3_store_with(s3, |config| config)
}

/// The same, with other settings of the SDK.
pub fn s3_store_with(s3: &FakeS3, change: impl FnOnce(Builder) -> Builder) -> Arc<dyn Store> {
    Arc::new(s3_client(s3, change))
}

/// The same, as what it is.
pub fn s3_client(s3: &FakeS3, change: impl FnOnce(Builder) -> Builder) -> S3Store {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .endpoint_url(&s3.endpoint)
        .force_path_style(true)
        .region(Region::new("us-east-1"))
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .credentials_provider(Credentials::new(
            s3::ACCESS_KEY,
            s3::SECRET_KEY,
            None,
            None,
            "test",
        ));
    S3Store::new(
        aws_sdk_s3::Client::from_conf(change(config).build()),
        s3::BUCKET,
    )
}

/// Three users of one home, told apart by what they may do.
struct TestAuth;

#[async_trait]
impl Auth for TestAuth {
    async fn public_key(&self, _user: &str, _key: &ssh_key::PublicKey) -> Option<Account> {
        None
    }

    async fn password(&self, user: &str, password: &str) -> Option<Account> {
        let access = match user {
            "alice" => Access::ReadWrite,
            "reader" => Access::ReadOnly,
            "writer" => Access::WriteOnly,
            _ => return None,
        };
        let account = Account {
            name: user.to_owned(),
            home: "alice/".to_owned(),
            access,
        };
        (password == PASSWORD).then_some(account)
    }
}

/// A running server; dropped, it stops.
pub struct Server {
    pub address: SocketAddr,
    pub shutdown: Shutdown,
    pub task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.drain.cancel();
        self.shutdown.stop.cancel();
    }
}

impl Server {
    pub async fn start(store: Arc<dyn Store>) -> Server {
        Server::with(store, |_| {}).await
    }

    pub async fn with(store: Arc<dyn Store>, change: impl FnOnce(&mut Config)) -> Server {
        let host_key = sftpd::server::temporary().unwrap();
        let mut config = Config::new(store, Arc::new(TestAuth), vec![host_key]);
        change(&mut config);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = Shutdown::default();
        let task = tokio::spawn(sftpd::server::run(listener, config, shutdown.clone()));
        Server {
            address,
            shutdown,
            task,
        }
    }

    /// One that runs elsewhere.
    pub fn elsewhere(address: SocketAddr) -> Server {
        Server {
            address,
            shutdown: Shutdown::default(),
            task: tokio::spawn(async {}),
        }
    }

    pub async fn client(&self) -> Client {
        self.client_as("alice").await
    }

    pub async fn client_as(&self, user: &str) -> Client {
        Client::login(self, user, PASSWORD).await.expect("login")
    }
}

struct AnyHost;

impl russh::client::Handler for AnyHost {
    type Error = russh::Error;

    async fn check_server_key(
        &mut self,
        _key: &russh::keys::PublicKeyOrCertificate,
    ) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

/// An SFTP client that does one request at a time.
pub struct Client {
    pub sftp: RawSftpSession,
    pub ssh: SshClient,
}

pub struct SshClient(Handle<AnyHost>);

impl SshClient {
    pub async fn connect(server: &Server) -> SshClient {
        SshClient::try_connect(server).await.expect("connect")
    }

    /// `None` where the server takes no connection.
    pub async fn try_connect(server: &Server) -> Option<SshClient> {
        let config = Arc::new(russh::client::Config::default());
        russh::client::connect(config, server.address, AnyHost)
            .await
            .ok()
            .map(SshClient)
    }

    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    pub async fn channel(&self) -> Result<russh::Channel<russh::client::Msg>, russh::Error> {
        self.0.channel_open_session().await
    }

    pub async fn sftp(&self) -> RawSftpSession {
        let channel = self.channel().await.unwrap();
        channel.request_subsystem(true, "sftp").await.unwrap();
        let sftp = RawSftpSession::new(channel.into_stream());
        sftp.set_timeout(60);
        sftp.init().await.unwrap();
        sftp
    }

    /// What else may be tried after a password that does not fit.
    pub async fn methods_left(&mut self, user: &str, password: &str) -> Vec<russh::MethodKind> {
        match self.0.authenticate_password(user, password).await {
            Ok(AuthResult::Failure {
                remaining_methods, ..
            }) => remaining_methods.iter().copied().collect(),
            other => panic!("{other:?}"),
        }
    }

    pub async fn login(&mut self, user: &str, password: &str) -> bool {
        matches!(
            self.0.authenticate_password(user, password).await,
            Ok(AuthResult::Success)
        )
    }

    /// With a key that nobody has seen.
    pub async fn login_with_new_key(&mut self, user: &str) -> bool {
        let key =
            russh::keys::PrivateKey::random(&mut rand::rng(), russh::keys::Algorithm::Ed25519)
                .unwrap();
        let key = russh::keys::PrivateKeyWithHashAlg::new(Arc::new(key), None);
        matches!(
            self.0.authenticate_publickey(user, key).await,
            Ok(AuthResult::Success)
        )
    }
}

impl Client {
    pub async fn login(server: &Server, user: &str, password: &str) -> Option<Client> {
        let mut ssh = SshClient::connect(server).await;
        if !ssh.login(user, password).await {
            return None;
        }
        Some(Client {
            sftp: ssh.sftp().await,
            ssh,
        })
    }

    /// As `login`, for a server that may have no place.
    pub async fn login_or_refused(server: &Server) -> Option<Client> {
        let mut ssh = SshClient::try_connect(server).await?;
        if !ssh.login("alice", PASSWORD).await {
            return None;
        }
        Some(Client {
            sftp: ssh.sftp().await,
            ssh,
        })
    }

    pub async fn open(&self, path: &str, flags: OpenFlags) -> Result<String, Failed> {
        Ok(self
            .sftp
            .open(path, flags, FileAttributes::empty())
            .await?
            .handle)
    }

    /// In order, in blocks of 32 KiB.
    pub async fn write(&self, handle: &str, offset: u64, data: &[u8]) -> Result<(), Failed> {
        for (n, block) in data.chunks(32 * 1024).enumerate() {
            self.sftp
                .write(handle, offset + n as u64 * 32 * 1024, block.to_vec())
                .await?;
        }
        Ok(())
    }

    pub async fn close(&self, handle: &str) -> Result<(), Failed> {
        self.sftp.close(handle).await?;
        Ok(())
    }

    pub async fn put(&self, path: &str, data: &[u8]) -> Result<(), Failed> {
        let handle = self.open(path, PUT).await?;
        self.write(&handle, 0, data).await?;
        self.close(&handle).await
    }

    /// To the end of the file, whatever its size is said to be.
    pub async fn get(&self, path: &str) -> Result<Vec<u8>, Failed> {
        let handle = self.open(path, OpenFlags::READ).await?;
        let data = self.read_to_end(&handle).await;
        self.close(&handle).await?;
        data
    }

    pub async fn read_to_end(&self, handle: &str) -> Result<Vec<u8>, Failed> {
        let mut all = Vec::new();
        loop {
            match self
                .sftp
                .read(handle, all.len() as u64, 32 * 1024)
                .await
                .map_err(Failed::from)
            {
                Ok(data) => all.extend(data.data),
                Err(Failed(StatusCode::Eof, _)) => return Ok(all),
                Err(failed) => return Err(failed),
            }
        }
    }

    pub async fn size(&self, path: &str) -> Result<u64, Failed> {
        Ok(self.sftp.stat(path).await?.attrs.size.unwrap())
    }

    pub async fn is_dir(&self, path: &str) -> Result<bool, Failed> {
        Ok(self.sftp.stat(path).await?.attrs.is_dir())
    }

    /// Names with sizes, sorted, without the dots; directories end with a slash.
    pub async fn list(&self, path: &str) -> Result<Vec<String>, Failed> {
        let handle = self.sftp.opendir(path).await?.handle;
        let mut names = Vec::new();
        loop {
            match self.sftp.readdir(&handle).await.map_err(Failed::from) {
                Ok(page) => names.extend(page.files.into_iter().map(
                    |file| match file.attrs.is_dir() {
                        true => format!("{}/", file.filename),
                        false => format!("{} {}", file.filename, file.attrs.size.unwrap()),
                    },
                )),
                Err(Failed(StatusCode::Eof, _)) => break,
                Err(failed) => return Err(failed),
            }
        }
        self.close(&handle).await?;
        names.retain(|name| name != "./" && name != "../");
        names.sort();
        Ok(names)
    }

    pub async fn posix_rename(&self, from: &str, to: &str) -> Result<(), Failed> {
        let mut data = Vec::new();
        for path in [from, to] {
            data.extend((path.len() as u32).to_be_bytes());
            data.extend(path.as_bytes());
        }
        match self.sftp.extended("posix-rename@openssh.com", data).await? {
            Packet::Status(status) if status.status_code == StatusCode::Ok => Ok(()),
            Packet::Status(status) => Err(Failed(status.status_code, status.error_message)),
            other => panic!("{other:?}"),
        }
    }
}

/// A status other than OK.
#[derive(Debug, PartialEq)]
pub struct Failed(pub StatusCode, pub String);

impl From<SftpError> for Failed {
    fn from(error: SftpError) -> Failed {
        match error {
            SftpError::Status(status) => Failed(status.status_code, status.error_message),
            other => panic!("no status: {other:?}"),
        }
    }
}

/// The status of a result, OK included.
pub fn code<T>(result: Result<T, impl Into<Failed>>) -> StatusCode {
    result.map_or_else(|failed| failed.into().0, |_| StatusCode::Ok)
}

/// Bytes that differ everywhere, so that a block in the wrong place shows.
pub fn noise(len: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend(next());
    }
    out.truncate(len);
    out.into()
}

/// Waits for something that must come to be, without a say in how soon.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never came to be: {what}");
}

/// What an idle S3 looks like: nothing half-done.
pub fn assert_clean(s3: &FakeS3) {
    assert_eq!(
        s3.uploads(),
        0,
        "multipart uploads left; requests: {:#?}",
        s3.requests()
    );
}

/// Long enough for any machine; only a server that hangs gets there.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future)
        .await
        .unwrap_or_else(|_| panic!("hangs: {what}"))
}

/// An SFTP packet.
pub fn packet(kind: u8, id: u32, rest: &[&[u8]]) -> Vec<u8> {
    let rest = rest.concat();
    let mut out = (5 + rest.len() as u32).to_be_bytes().to_vec();
    out.push(kind);
    out.extend(id.to_be_bytes());
    out.extend(rest);
    out
}

/// A string inside of one.
pub fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// Numbers below the one asked for, the same in every run.
pub fn dice(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % below
    }
}
