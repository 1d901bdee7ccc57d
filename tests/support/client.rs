//! An SFTP client that sends what a test tells it to.

use super::wait::{PATIENCE, within};
use super::{PASSWORD, PUT};
use russh::client::{AuthResult, DisconnectReason, Handle, Msg};
use russh::keys::{Algorithm, PrivateKey, PrivateKeyWithHashAlg};
use russh_sftp::client::RawSftpSession;
use russh_sftp::client::error::Error as SftpError;
use russh_sftp::protocol::{FileAttributes, OpenFlags, Packet, StatusCode};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::SetOnce;

/// Accepts every host key.
#[derive(Default)]
struct AnyHost {
    /// What the server says at the end of the connection.
    said: Arc<SetOnce<String>>,
}

impl russh::client::Handler for AnyHost {
    type Error = russh::Error;

    async fn check_server_key(
        &mut self,
        _key: &russh::keys::PublicKeyOrCertificate,
    ) -> Result<bool, russh::Error> {
        Ok(true)
    }

    async fn disconnected(
        &mut self,
        reason: DisconnectReason<russh::Error>,
    ) -> Result<(), russh::Error> {
        match reason {
            DisconnectReason::ReceivedDisconnect(info) => {
                let _ = self.said.set(info.message);
                Ok(())
            }
            DisconnectReason::Error(error) => Err(error),
        }
    }
}

/// An SSH connection.
pub struct SshClient(Handle<AnyHost>, Arc<SetOnce<String>>);

impl SshClient {
    pub async fn connect(server: SocketAddr) -> SshClient {
        SshClient::try_connect(server).await.expect("connect")
    }

    /// `None` if the server refuses the connection.
    pub async fn try_connect(server: SocketAddr) -> Option<SshClient> {
        let config = russh::client::Config {
            // As OpenSSH's client.
            nodelay: true,
            ..Default::default()
        };
        SshClient::try_connect_with(server, config).await
    }

    async fn try_connect_with(
        server: SocketAddr,
        config: russh::client::Config,
    ) -> Option<SshClient> {
        let host = AnyHost::default();
        let said = host.said.clone();
        let connected = russh::client::connect(Arc::new(config), server, host).await;
        Some(SshClient(connected.ok()?, said))
    }

    /// On a stream that leads to a server.
    pub async fn over(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        config: russh::client::Config,
    ) -> Result<SshClient, russh::Error> {
        let host = AnyHost::default();
        let said = host.said.clone();
        let handle = russh::client::connect_stream(Arc::new(config), stream, host).await?;
        Ok(SshClient(handle, said))
    }

    /// What the server says when it ends the connection.
    pub async fn last_words(&self) -> &str {
        within("the server's last words", self.1.wait()).await
    }

    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    pub async fn channel(&self) -> Result<russh::Channel<Msg>, russh::Error> {
        self.0.channel_open_session().await
    }

    /// A channel with the SFTP subsystem, on which nothing was sent yet.
    pub async fn sftp_channel(&self) -> russh::Channel<Msg> {
        let channel = self.channel().await.unwrap();
        channel.request_subsystem(true, "sftp").await.unwrap();
        channel
    }

    /// One more SFTP session of the connection.
    pub async fn sftp(&self) -> RawSftpSession {
        let sftp = RawSftpSession::new(self.sftp_channel().await.into_stream());
        sftp.set_timeout(PATIENCE.as_secs());
        sftp.init().await.unwrap();
        sftp
    }

    /// The methods that can continue after a wrong password.
    pub async fn methods_left(&mut self, user: &str, password: &str) -> Vec<russh::MethodKind> {
        match self.0.authenticate_password(user, password).await {
            Ok(AuthResult::Failure {
                remaining_methods, ..
            }) => remaining_methods.iter().copied().collect(),
            other => panic!("{other:?}"),
        }
    }

    /// Whether the password is accepted.
    pub async fn login(&mut self, user: &str, password: &str) -> bool {
        let answered = self.0.authenticate_password(user, password).await;
        matches!(answered, Ok(AuthResult::Success))
    }

    /// Whether a key is accepted that was made just now.
    pub async fn login_with_new_key(&mut self, user: &str) -> bool {
        let key = PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).unwrap();
        let key = PrivateKeyWithHashAlg::new(Arc::new(key), None);
        let answered = self.0.authenticate_publickey(user, key).await;
        matches!(answered, Ok(AuthResult::Success))
    }
}

/// An SFTP session on a connection of its own.
pub struct Client {
    pub sftp: RawSftpSession,
    pub ssh: SshClient,
}

impl Client {
    /// Logs in as alice.
    pub async fn connect(server: SocketAddr) -> Client {
        let client = Client::login(server, "alice", PASSWORD).await;
        client.expect("login")
    }

    /// Logs in as alice, and allows the server to send this many bytes at once.
    pub async fn connect_with_window(server: SocketAddr, window_size: u32) -> Client {
        let config = russh::client::Config {
            window_size,
            ..Default::default()
        };
        let ssh = SshClient::try_connect_with(server, config).await;
        let client = Client::login_on(ssh.expect("connect"), "alice", PASSWORD).await;
        client.expect("login")
    }

    /// `None` if the login is refused.
    pub async fn login(server: SocketAddr, user: &str, password: &str) -> Option<Client> {
        let ssh = SshClient::connect(server).await;
        Client::login_on(ssh, user, password).await
    }

    /// Logs in as alice. `None` if the connection or the login is refused.
    pub async fn try_connect(server: SocketAddr) -> Option<Client> {
        let ssh = SshClient::try_connect(server).await?;
        Client::login_on(ssh, "alice", PASSWORD).await
    }

    async fn login_on(mut ssh: SshClient, user: &str, password: &str) -> Option<Client> {
        if !ssh.login(user, password).await {
            return None;
        }
        let sftp = ssh.sftp().await;
        Some(Client { sftp, ssh })
    }

    /// Opens a file; its handle.
    pub async fn open(&self, path: &str, flags: OpenFlags) -> Result<String, Failed> {
        let attributes = FileAttributes::empty();
        let opened = self.sftp.open(path, flags, attributes).await?;
        Ok(opened.handle)
    }

    /// Writes in order, in blocks of 32 KiB, each after the answer to the one before.
    pub async fn write(&self, handle: &str, offset: u64, data: &[u8]) -> Result<(), Failed> {
        let mut at = offset;
        for block in data.chunks(32 * 1024) {
            self.sftp.write(handle, at, block.to_vec()).await?;
            at += block.len() as u64;
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

    /// Reads a file up to the status EOF, whatever its size is said to be.
    pub async fn get(&self, path: &str) -> Result<Vec<u8>, Failed> {
        let handle = self.open(path, OpenFlags::READ).await?;
        let data = self.read_to_end(&handle).await;
        self.close(&handle).await?;
        data
    }

    pub async fn read_to_end(&self, handle: &str) -> Result<Vec<u8>, Failed> {
        let mut all = Vec::new();
        loop {
            let read = self.sftp.read(handle, all.len() as u64, 32 * 1024).await;
            match read.map_err(Failed::from) {
                Ok(data) => all.extend(data.data),
                Err(Failed(StatusCode::Eof, _)) => return Ok(all),
                Err(failed) => return Err(failed),
            }
        }
    }

    pub async fn mkdir(&self, path: &str) -> Result<(), Failed> {
        self.sftp.mkdir(path, FileAttributes::empty()).await?;
        Ok(())
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
            let page = match self.sftp.readdir(&handle).await.map_err(Failed::from) {
                Ok(page) => page,
                Err(Failed(StatusCode::Eof, _)) => break,
                Err(failed) => return Err(failed),
            };
            for file in page.files {
                names.push(match file.attrs.is_dir() {
                    true => format!("{}/", file.filename),
                    false => format!("{} {}", file.filename, file.attrs.size.unwrap()),
                });
            }
        }
        self.close(&handle).await?;
        names.retain(|name| name != "./" && name != "../");
        names.sort();
        Ok(names)
    }

    pub async fn posix_rename(&self, from: &str, to: &str) -> Result<(), Failed> {
        let data = [super::text(from), super::text(to)].concat();
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
    match result {
        Ok(_) => StatusCode::Ok,
        Err(failed) => failed.into().0,
    }
}
