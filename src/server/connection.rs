//! One connection: who it is, what its channels want, and its end.
//!
//! A channel is a session with the `sftp` subsystem, or a sentence for whoever expected a shell.

use super::penalties::Unheard;
use super::transport::{Socket, Unanswered};
use super::{Shared, Shutdown, admission::PreAuthSlot, ssh};
use crate::metrics::{CONNECTIONS, GaugeGuard, LOGINS, SESSIONS};
use crate::path::Home;
use crate::sftp::{self, End, Received, SessionParams, Sink, Source};
use crate::users::Account;
use crate::vfs::Vfs;
use bytes::Bytes;
use metrics::counter;
use russh::keys::{Algorithm, HashAlg, PublicKey};
use russh::server::{
    Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey, run_stream,
};
use russh::{
    Channel, ChannelId, ChannelMsg, ChannelOpenFailure, ChannelReadHalf, ChannelWriteHalf,
};
use russh::{Disconnect, Error, Pty};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio::{net::TcpStream, sync::SetOnce};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// SFTP sessions on one connection, as OpenSSH's MaxSessions.
const MAX_CHANNELS: usize = 10;
/// For a goodbye to reach the client before the connection is cut.
const GOODBYE_TIME: Duration = Duration::from_secs(2);
/// The one subsystem there is.
const SUBSYSTEM: &str = "sftp";
/// Characters of a refused command that the log shows.
const SHOWN_COMMAND: usize = 200;
const NO_SHELL: &str = "This server speaks SFTP only: no shell, no commands, no scp -O. Use sftp, or scp without -O.\r\n";
/// Standard error ([RFC 4254 §5.2](https://www.rfc-editor.org/rfc/rfc4254#section-5.2)).
const STDERR: u32 = 1;

/// One for `russh` to ask, one for [`serve`], and one for each channel, of the same connection.
#[derive(Clone)]
struct Connection {
    shared: Arc<Shared>,
    peer: SocketAddr,
    /// Whose it is, once logged in.
    account: Arc<SetOnce<Account>>,
    channels: TaskTracker,
    client: ssh::Client,
    /// Notices the SERVICE_REQUEST before a second credential: see [`Connection::note_refusal`].
    unanswered: Arc<Unanswered>,
    /// How many channels there were so far.
    opened: Arc<AtomicUsize>,
    /// Cancelled when the connection is no more, and to cut it.
    gone: CancellationToken,
}

/// Runs the connection until either side ends it.
pub(super) async fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    shared: Arc<Shared>,
    slot: PreAuthSlot,
) {
    let _open = GaugeGuard::of(CONNECTIONS);
    let _ = stream.set_nodelay(true);
    let deadline = Instant::now() + shared.config.login_timeout;
    let gone = slot.evicted.clone();
    let unanswered: Arc<Unanswered> = Arc::default();
    let mut socket = Socket::new(stream, gone.clone().cancelled_owned(), unanswered.clone());
    let exchange = timeout_at(
        deadline,
        socket.exchange_identification(ssh::IDENTIFICATION),
    );
    let client = match shared.shutdown.drain.run_until_cancelled(exchange).await {
        Some(Ok(Ok(identification))) => ssh::Client::identify(&identification),
        Some(Ok(Err(error))) => return log::debug!("{peer}: no SSH: {error}"),
        Some(Err(_)) => {
            return log::info!(
                "{peer}: disconnected: {}",
                DisconnectReason::LoginTimeout.text()
            );
        }
        None => return,
    };
    if client == ssh::Client::Libssh {
        socket.hold_newkeys();
    }
    let config = Arc::new(ssh::config(
        &shared.config,
        ssh::offer(shared.config.algorithms, client),
    ));
    let connection = Connection {
        shared,
        peer,
        account: Arc::default(),
        channels: TaskTracker::new(),
        client,
        unanswered,
        opened: Arc::default(),
        gone,
    };
    let ssh = run_stream(config, socket, connection.clone());
    let started = timeout_at(deadline, ssh)
        .await
        .map_err(Error::from)
        .flatten();
    let started = started.inspect_err(|error| log::debug!("{peer}: no SSH: {error}"));
    let Ok(mut running) = started else { return };
    tokio::select! {
        ended = &mut running => log::debug!("{peer}: connection ended: {ended:?}"),
        reason = connection.must_end(deadline, slot) => {
            let text = reason.text();
            log::log!(reason.level(), "{peer}: disconnected: {text}");
            let goodbye = async {
                let _ = running.handle().disconnect(reason.code(), text.to_owned(), String::new()).await;
                let _ = running.await;
            };
            let _ = timeout(GOODBYE_TIME, goodbye).await;
        }
    }
    connection.gone.cancel();
    connection.channels.close();
    connection.channels.wait().await;
}

/// Why the server ends a connection.
enum DisconnectReason {
    LoginTimeout,
    SecondCredential,
    Unused,
    Shutdown,
}

impl DisconnectReason {
    /// For the client and the log.
    fn text(&self) -> &'static str {
        match self {
            Self::LoginTimeout => "no login in time",
            Self::SecondCredential => {
                "this server checks one credential a connection for paramiko: connect with look_for_keys=False and \
                 allow_agent=False, or only the right key"
            }
            Self::Unused => "no session for too long",
            Self::Shutdown => "the server is shutting down",
        }
    }

    fn code(&self) -> Disconnect {
        match self {
            Self::SecondCredential => Disconnect::NoMoreAuthMethodsAvailable,
            Self::LoginTimeout | Self::Unused | Self::Shutdown => Disconnect::ByApplication,
        }
    }

    fn level(&self) -> log::Level {
        match self {
            Self::SecondCredential => log::Level::Warn,
            Self::LoginTimeout | Self::Unused | Self::Shutdown => log::Level::Info,
        }
    }
}

impl Connection {
    /// Resolves, with the reason, when the server must end the connection.
    async fn must_end(&self, deadline: Instant, slot: PreAuthSlot) -> DisconnectReason {
        let Shutdown { drain, stop } = &self.shared.shutdown;
        let login = async {
            tokio::select! {
                login = timeout_at(deadline, self.account.wait()) => login.err().map(|_| DisconnectReason::LoginTimeout),
                () = self.unanswered.noticed() => Some(DisconnectReason::SecondCredential),
            }
        };
        if let Some(Some(reason)) = drain.run_until_cancelled(login).await {
            return reason;
        }
        drop(slot);
        if drain.run_until_cancelled(self.unused()).await.is_some() {
            return DisconnectReason::Unused;
        }
        // Only a closed tracker can be waited for; sessions that are open go on.
        self.channels.close();
        stop.run_until_cancelled(self.channels.wait()).await;
        DisconnectReason::Shutdown
    }

    /// Comes back once nobody has had or opened a channel for the idle timeout. russh's own clock takes every answer to
    /// a keep-alive for activity.
    async fn unused(&self) {
        loop {
            let before = self.opened.load(Ordering::Relaxed);
            sleep(self.shared.config.idle_timeout).await;
            if self.channels.is_empty() && self.opened.load(Ordering::Relaxed) == before {
                return;
            }
        }
    }

    /// Whose key it is. SHA-1 is no proof any more; russh would still take it.
    async fn key_owner(
        &self,
        user: &str,
        key: &PublicKey,
        algorithm: &Algorithm,
    ) -> Option<Account> {
        let sha1 = matches!(algorithm, Algorithm::Rsa { hash: None });
        if sha1 {
            None
        } else {
            self.shared.config.auth.public_key(user, key).await
        }
    }

    /// A credential was refused. paramiko sends SERVICE_REQUEST before the next one, and would wait in vain for russh's
    /// answer: then the connection ends.
    fn note_refusal(&self) {
        if self.client == ssh::Client::Paramiko {
            self.unanswered.watch();
        }
    }

    /// The outcome of one attempt. A refusal is logged, except for keys that are only being tried out.
    fn outcome(
        &self,
        user: &str,
        account: Option<Account>,
        key: Option<&PublicKey>,
    ) -> Result<Auth, Error> {
        let (method, result) = (
            key.map_or("password", |_| "key"),
            account.as_ref().map_or("refused", |_| "accepted"),
        );
        counter!(LOGINS, "method" => method, "result" => result).increment(1);
        let with = key.map_or(method.to_owned(), |key| {
            format!("key {}", key.fingerprint(HashAlg::Sha256))
        });
        let Some(account) = account else {
            log::warn!("{}: login failed: user {user:?}, {with}", self.peer);
            return Ok(self.refuse());
        };
        log::info!("{}@{}: logged in with {with}", account.name, self.peer);
        let _ = self.account.set(account);
        Ok(Auth::Accept)
    }

    /// The answer to a password that is not looked at. To the client it is as wrong as any other.
    fn refuse_unheard(&self, user: &str, why: Unheard) -> Auth {
        counter!(LOGINS, "method" => "password", "result" => "unheard").increment(1);
        log::warn!(
            "{}: login not looked at: user {user:?}, password: {}",
            self.peer,
            why.text()
        );
        self.refuse()
    }

    /// The answer to a credential that does not fit. The client may try again.
    fn refuse(&self) -> Auth {
        self.note_refusal();
        // Otherwise russh drops the method, and one mistyped password ends the login.
        let again = Some(ssh::methods());
        Auth::Reject {
            proceed_with_methods: again,
            partial_success: false,
        }
    }

    /// Waits for what the client wants of the channel, and does it. The requests are answered by the [`Handler`], in
    /// the order in which they come.
    async fn serve_channel(self, channel: Channel<Msg>, account: Account) {
        let (mut read, write) = channel.split();
        let write = Arc::new(write);
        let status = loop {
            match timeout(self.shared.config.idle_timeout, read.wait())
                .await
                .ok()
                .flatten()
            {
                Some(ChannelMsg::RequestSubsystem { name, .. }) if name == SUBSYSTEM => {
                    break self.serve_sftp(read, write.clone(), account).await;
                }
                Some(ChannelMsg::Exec { command, .. }) => {
                    let shown: String = String::from_utf8_lossy(&command)
                        .chars()
                        .take(SHOWN_COMMAND)
                        .collect();
                    log::warn!(
                        "{}@{}: refused the command {shown:?}",
                        account.name,
                        self.peer
                    );
                    let _ = write.extended_data_bytes(STDERR, NO_SHELL).await;
                    break 1;
                }
                Some(ChannelMsg::RequestShell { .. }) => {
                    log::warn!("{}@{}: refused a shell", account.name, self.peer);
                    let _ = write.extended_data_bytes(STDERR, NO_SHELL).await;
                    break 1;
                }
                Some(ChannelMsg::Eof | ChannelMsg::Close) | None => return,
                Some(_) => {}
            }
        };
        // restic and scp look at the status.
        let _ = write.exit_status(status).await;
        let _ = write.eof().await;
        let _ = write.close().await;
    }

    /// The exit status of the session, once it has ended.
    async fn serve_sftp(
        self,
        read: ChannelReadHalf,
        write: Arc<ChannelWriteHalf<Msg>>,
        account: Account,
    ) -> u32 {
        let who: Arc<str> = format!("{}@{}", account.name, self.peer).into();
        let home = Home::new(&self.shared.config.prefix, &account.home).inspect_err(|error| {
            log::error!("{who}: home {:?} can't be used: {error}", account.home)
        });
        let Ok(home) = home else { return 1 };
        let settings = SessionParams {
            pool: self.shared.transfers.pool.clone(),
            limits: self.shared.user_limits(&account.name),
            uploads: self.shared.uploads.clone(),
            vfs: Vfs::new(
                self.shared.transfers.clone(),
                self.shared.overlay.clone(),
                home,
                self.shared.config.dir_markers,
            ),
            access: account.access,
            who: who.clone(),
            user: account.name.into(),
            idle_timeout: self.shared.config.idle_timeout,
            drain: self.shared.shutdown.drain.clone(),
        };
        let _open = GaugeGuard::of(SESSIONS);
        let mut line = SessionLine {
            who,
            opened: Instant::now(),
            end: None,
        };
        let end = line
            .end
            .insert(sftp::serve(read, Outgoing(write, self.gone), settings).await);
        u32::from(!matches!(end, End::Closed | End::Drained))
    }
}

/// Logs the end of a session when it is dropped: also where the session's task is.
struct SessionLine {
    who: Arc<str>,
    opened: Instant,
    /// `None` until the session has ended by itself.
    end: Option<End>,
}

impl Drop for SessionLine {
    fn drop(&mut self) {
        let SessionLine { who, opened, end } = self;
        let seconds = opened.elapsed().as_secs_f64();
        match end {
            Some(end) => log::info!("{who}: session ended after {seconds:.1} s: {end}"),
            None => log::warn!(
                "{who}: session cut off after {seconds:.1} s: the server is shutting down"
            ),
        }
    }
}

impl Source for ChannelReadHalf {
    async fn next(&mut self) -> Received {
        loop {
            match self.wait().await {
                Some(ChannelMsg::Data { data }) => return Received::Data(data),
                Some(ChannelMsg::Eof) => return Received::Eof,
                Some(ChannelMsg::Close) | None => return Received::Closed,
                Some(_) => {}
            }
        }
    }
}

/// A channel, and the end of its connection.
struct Outgoing(Arc<ChannelWriteHalf<Msg>>, CancellationToken);

impl Sink for Outgoing {
    async fn send(&mut self, bytes: Bytes) -> bool {
        let Outgoing(write, gone) = self;
        // russh leaves whoever waits for the window waiting when the connection ends.
        gone.run_until_cancelled(write.data_bytes(bytes))
            .await
            .is_some_and(|sent| sent.is_ok())
    }
}

impl Handler for Connection {
    type Error = Error;

    async fn auth_password(&mut self, user: &str, password: &str) -> Result<Auth, Error> {
        let attempt = match self.shared.penalties.begin(self.peer.ip(), user).await {
            Ok(attempt) => attempt,
            Err(why) => return Ok(self.refuse_unheard(user, why)),
        };
        let account = self.shared.config.auth.password(user, password).await;
        if account.is_some() {
            attempt.succeed();
        }
        self.outcome(user, account, None)
    }

    async fn auth_publickey_offered(
        &mut self,
        user: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, Error> {
        match self
            .key_owner(user, offer.public_key, offer.algorithm)
            .await
        {
            Some(_) => Ok(Auth::Accept),
            None => {
                // paramiko signs without an offer, and russh asks here first all the same.
                self.note_refusal();
                Ok(Auth::reject())
            }
        }
    }

    async fn auth_publickey(
        &mut self,
        user: &str,
        key: VerifiedPublicKey<'_>,
    ) -> Result<Auth, Error> {
        let account = self.key_owner(user, key.public_key, key.algorithm).await;
        // Nobody guesses keys, and clients try out all that they have: refused ones count for the connection only.
        if account.is_some() {
            self.shared.penalties.forgive(self.peer.ip(), user);
        }
        self.outcome(user, account, Some(key.public_key))
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Error> {
        match self.account.get().cloned() {
            Some(account)
                if self.channels.len() < MAX_CHANNELS
                    && !self.shared.shutdown.drain.is_cancelled() =>
            {
                self.opened.fetch_add(1, Ordering::Relaxed);
                reply.accept().await;
                let session = self.clone().serve_channel(channel, account);
                self.channels.spawn(
                    self.shared
                        .shutdown
                        .stop
                        .clone()
                        .run_until_cancelled_owned(session),
                );
            }
            _ => reply.reject(ChannelOpenFailure::ResourceShortage).await,
        }
        Ok(())
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        name: &str,
        session: &mut Session,
    ) -> Result<(), Error> {
        if name == SUBSYSTEM {
            session.channel_success(id)
        } else {
            session.channel_failure(id)
        }
    }

    async fn exec_request(
        &mut self,
        id: ChannelId,
        _command: &[u8],
        session: &mut Session,
    ) -> Result<(), Error> {
        session.channel_success(id)
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut Session) -> Result<(), Error> {
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
    ) -> Result<(), Error> {
        session.channel_failure(id)
    }

    async fn env_request(
        &mut self,
        id: ChannelId,
        _: &str,
        _: &str,
        session: &mut Session,
    ) -> Result<(), Error> {
        session.channel_failure(id)
    }
}
