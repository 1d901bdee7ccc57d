//! One connection: who it is, and its end.

use super::channel::{self, Login};

use super::Shared;
use super::socket::Socket;
use crate::users::Account;
use russh::keys::ssh_key::{Algorithm, HashAlg};
use russh::server::{Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelOpenFailure, Disconnect, Pty};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// SFTP sessions on one connection, as OpenSSH's MaxSessions.
const MAX_CHANNELS: usize = 10;
/// For a goodbye to reach the client before the connection is cut.
const GOODBYE_TIME: Duration = Duration::from_secs(2);

struct Connection {
    shared: Arc<Shared>,
    peer: SocketAddr,
    account: Option<Account>,
    /// How the login was proved, for the log.
    method: String,
    logged_in: CancellationToken,
    channels: TaskTracker,
    /// Cancelled when the connection is no more.
    gone: CancellationToken,
}

/// Runs the connection until either side ends it.
pub(super) async fn serve(stream: TcpStream, peer: SocketAddr, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    let (cut, gone, logged_in) = (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
    let channels = TaskTracker::new();
    let connection = Connection {
        shared: shared.clone(),
        peer,
        account: None,
        method: String::new(),
        logged_in: logged_in.clone(),
        channels: channels.clone(),
        gone: gone.clone(),
    };
    let socket = Socket::new(stream, cut.clone().cancelled_owned());
    let ssh = russh::server::run_stream(shared.ssh.clone(), socket, connection);
    let deadline = Instant::now() + shared.login_timeout;
    let mut running = match tokio::time::timeout_at(deadline, ssh).await {
        Ok(Ok(running)) => running,
        Ok(Err(error)) => return log::debug!("{peer}: no SSH: {error}"),
        Err(_) => return log::info!("{peer}: no SSH within {:?}", shared.login_timeout),
    };
    let handle = running.handle();
    let reason = tokio::select! {
        ended = &mut running => {
            if let Err(error) = ended {
                log::debug!("{peer}: connection ended: {error}");
            }
            None
        }
        reason = must_end(&shared, &logged_in, deadline, &channels) => Some(reason),
    };
    if let Some(reason) = reason {
        log::info!("{peer}: disconnected: {reason}");
        let goodbye = async {
            let _ = handle.disconnect(Disconnect::ByApplication, reason.to_owned(), String::new()).await;
            let _ = running.await;
        };
        let _ = tokio::time::timeout(GOODBYE_TIME, goodbye).await;
    }
    cut.cancel();
    gone.cancel();
    channels.close();
    channels.wait().await;
}

/// Comes back when the connection has to be ended from this side, and says why.
async fn must_end(
    shared: &Shared,
    logged_in: &CancellationToken,
    deadline: Instant,
    channels: &TaskTracker,
) -> &'static str {
    let (drain, stop) = (&shared.shutdown.drain, &shared.shutdown.stop);
    tokio::select! {
        () = logged_in.cancelled() => {}
        () = tokio::time::sleep_until(deadline) => return "no login in time",
        () = drain.cancelled() => return "the server is shutting down",
    }
    tokio::select! {
        () = drain.cancelled() => {}
        () = stop.cancelled() => {}
    }
    // Only a closed tracker can be waited for; sessions that are open go on.
    channels.close();
    tokio::select! {
        () = channels.wait() => {}
        () = stop.cancelled() => {}
    }
    "the server is shutting down"
}

impl Connection {
    /// The outcome of one attempt. A refusal is logged, except for keys that are only being tried out.
    fn outcome(&mut self, user: &str, account: Option<Account>, method: String) -> Auth {
        match account {
            Some(account) => {
                self.account = Some(account);
                self.method = method;
                Auth::Accept
            }
            None => {
                log::warn!("{}: login failed: user {user:?}, {method}", self.peer);
                Auth::reject()
            }
        }
    }
}

/// SHA-1 is no proof any more; russh would still take it.
fn is_sha1(algorithm: &Algorithm) -> bool {
    matches!(algorithm, Algorithm::Rsa { hash: None })
}

impl Handler for Connection {
    type Error = russh::Error;

    async fn auth_password(&mut self, user: &str, password: &str) -> Result<Auth, Self::Error> {
        let account = self.shared.auth.password(user, password).await;
        Ok(self.outcome(user, account, "password".to_owned()))
    }

    async fn auth_publickey_offered(&mut self, user: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, Self::Error> {
        let known = !is_sha1(offer.algorithm) && self.shared.auth.public_key(user, offer.public_key).await.is_some();
        Ok(if known { Auth::Accept } else { Auth::reject() })
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        let fingerprint = key.public_key.fingerprint(HashAlg::Sha256);
        let account = match is_sha1(key.algorithm) {
            true => None,
            false => self.shared.auth.public_key(user, key.public_key).await,
        };
        Ok(self.outcome(user, account, format!("key {fingerprint}")))
    }

    async fn auth_succeeded(&mut self, _session: &mut Session) -> Result<(), Self::Error> {
        self.logged_in.cancel();
        if let Some(account) = &self.account {
            log::info!("{}@{}: logged in with {}", account.name, self.peer, self.method);
        }
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        let Some(account) = self.account.clone() else { return Ok(()) };
        if self.channels.len() >= MAX_CHANNELS || self.shared.shutdown.drain.is_cancelled() {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        reply.accept().await;
        let login = Login { account, peer: self.peer, gone: self.gone.clone(), shared: self.shared.clone() };
        let stop = self.shared.shutdown.stop.clone();
        self.channels.spawn(async move {
            tokio::select! {
                () = channel::serve(channel, login) => {}
                () = stop.cancelled() => {}
            }
        });
        Ok(())
    }

    async fn subsystem_request(&mut self, id: ChannelId, name: &str, session: &mut Session) -> Result<(), Self::Error> {
        if name == channel::SUBSYSTEM { session.channel_success(id) } else { session.channel_failure(id) }
    }

    async fn exec_request(&mut self, id: ChannelId, _command: &[u8], session: &mut Session) -> Result<(), Self::Error> {
        session.channel_success(id)
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut Session) -> Result<(), Self::Error> {
        session.channel_success(id)
    }

    async fn pty_request(
        &mut self,
        id: ChannelId,
        _term: &str,
        _columns: u32,
        _rows: u32,
        _width: u32,
        _height: u32,
        _modes: &[(Pty, u32)],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }

    async fn env_request(
        &mut self,
        id: ChannelId,
        _name: &str,
        _value: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }
}
