//! One connection: the login, the channels, and the end.
//!
//! Called by `server` for every connection that is admitted. A channel is an SFTP session, or is
//! refused with a message to clients that ask for a shell or a command.

use super::admission::PreAuthSlot;
use super::penalties::Penalized;
use super::transport::{Signals, Socket, Stream};
use super::tries::Tries;
use super::window::Window;
use super::{Shared, ssh};
use crate::events::{
    ConnectionEnd, Credential, Event, LoginMethod, LoginRefusal, SessionEnd, Teller, shorten,
};
use crate::path::Home;
use crate::sftp::{self, End, Received, SessionParams, Sink, Source};
use crate::transfer::UserLimits;
use crate::users::{Account, Attempt, Certificate, Login, Proof, PublicKey, Refusal};
use crate::vfs::Vfs;
use crate::{Panicked, catch_panic};
use bytes::Bytes;
use russh::keys::{self, Algorithm};
use russh::server::{
    Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, RunningSession, Session,
    VerifiedPublicKey, run_stream,
};
use russh::{
    Channel, ChannelId, ChannelMsg, ChannelOpenFailure, ChannelReadHalf, ChannelWriteHalf,
};
use russh::{Disconnect, Error, Pty};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, SetOnce};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Limit on SFTP sessions of one connection, as OpenSSH's MaxSessions.
const MAX_CHANNELS: usize = 10;
/// Limit on the channels of one connection that russh remembers: those that are open, and about 3.4
/// KiB of each that the server has closed first. russh forgets only those that the client closes
/// first. With a limit they take no more than the memory of one session, 4 MiB.
const MAX_REMEMBERED_CHANNELS: usize = 1000;
/// A connection without a channel ends after this time, or after the idle timeout if that is
/// shorter: clients that log in open one at once, or are through.
const MAX_UNUSED_TIME: Duration = Duration::from_secs(60);
/// For the last message to reach the client before the channel or the socket is closed, and for a
/// client to end the connection after its last channel. OpenSSH's ssh drops answers that it still
/// holds when a disconnect message arrives together with the end of the channel.
const GOODBYE_TIME: Duration = Duration::from_secs(2);
/// The only subsystem.
const SUBSYSTEM: &str = "sftp";
/// Characters of a refused command that the log shows.
const MAX_SHOWN_COMMAND: usize = 200;
const NO_SHELL: &str = "This server speaks SFTP only: no shell, no commands, no scp -O. Use sftp, or scp without -O.\r\n";
/// Signatures that russh still accepts.
const SHA1_SIGNATURE: &Algorithm = &Algorithm::Rsa { hash: None };
/// Standard error ([RFC 4254 §5.2](https://www.rfc-editor.org/rfc/rfc4254#section-5.2)).
const STDERR: u32 = 1;

/// A cheap clone: russh, [`serve`] and every channel share one connection.
#[derive(Clone)]
struct Connection {
    shared: Arc<Shared>,
    peer: SocketAddr,
    /// Tells what happens before the login.
    events: Teller,
    /// What the client has tried so far.
    // A std lock: never held across an await.
    tries: Arc<Mutex<Tries>>,
    /// Set by the login.
    login: Arc<SetOnce<LoggedIn>>,
    /// Set by the first SFTP session.
    had_session: Arc<SetOnce<()>>,
    /// The tasks of channels.
    channels: TaskTracker,
    /// When the last channel was closed, at first when the connection began.
    // A std lock: never held across an await.
    unused_since: Arc<Mutex<Instant>>,
    client: ssh::Client,
    /// What the socket notices.
    signals: Arc<Signals>,
    /// Set, with the reason, when the connection has to end instead of a login.
    rejected: Arc<SetOnce<ConnectionEnd>>,
    /// Cancelled when the server ends the connection, and with [`closed`](Self::closed): no login
    /// is waited for any more.
    ending: CancellationToken,
    /// How much the client may send before it is allowed more.
    // A std lock: never held across an await.
    window: Arc<Mutex<Window>>,
    /// The channels that russh remembers.
    // A std lock: never held across an await.
    remembered: Arc<Mutex<HashSet<ChannelId>>>,
    /// Cancelled when these are [`MAX_REMEMBERED_CHANNELS`]: the connection ends with its last
    /// channel.
    used_up: CancellationToken,
    /// Cancelled when the connection has ended. Cancelling it closes the socket.
    closed: CancellationToken,
}

/// What a login has brought.
struct LoggedIn {
    account: Arc<Account>,
    /// Shared with the user's other connections.
    limits: Arc<UserLimits>,
    /// The connection's place among those of the user.
    _place: OwnedSemaphorePermit,
}

/// Runs the connection until either side ends it, or it is `dropped`: that cancels the slot's token
/// too.
pub(super) async fn serve(
    stream: Box<dyn Stream>,
    peer: SocketAddr,
    events: Teller,
    shared: Arc<Shared>,
    slot: PreAuthSlot,
    dropped: CancellationToken,
) {
    let login: Arc<SetOnce<LoggedIn>> = Arc::default();
    let tries: Arc<Mutex<Tries>> = Arc::default();
    let mut open = OpenConnection::new(events.clone(), tries.clone(), login.clone(), dropped);
    let deadline = Instant::now() + shared.settings.login_timeout;
    let closed = slot.evicted.clone();
    let signals: Arc<Signals> = Arc::default();
    let mut socket = Socket::new(stream, closed.clone().cancelled_owned(), signals.clone());
    let identification = match identify_client(&mut socket, peer, deadline, &shared).await {
        Ok(identification) => identification,
        Err(reason) => return open.end(reason, &closed),
    };
    lock(&tries).set_client(&identification);
    let client = ssh::Client::identify(&identification);
    if client == ssh::Client::Libssh {
        socket.hold_newkeys();
    }
    let algorithms = ssh::offer(shared.settings.algorithms, client);
    let config = Arc::new(ssh::config(&shared.settings, algorithms));
    let window = Window::new(shared.windows.clone());
    let connection = Connection {
        shared,
        peer,
        events,
        tries,
        login,
        had_session: Arc::default(),
        channels: TaskTracker::new(),
        unused_since: Arc::new(Mutex::new(Instant::now())),
        client,
        signals,
        rejected: Arc::default(),
        ending: closed.child_token(),
        window: Arc::new(Mutex::new(window)),
        remembered: Arc::default(),
        used_up: CancellationToken::new(),
        closed,
    };
    let start = run_stream(config, socket, connection.clone());
    match timeout_at(deadline, start).await {
        Ok(Ok(running)) => open.run(running, &connection, deadline, slot).await,
        Ok(Err(error)) => {
            log::debug!("{peer}: no SSH: {error}");
            open.end(ConnectionEnd::NoSsh, &connection.closed);
        }
        Err(elapsed) => {
            log::debug!("{peer}: no SSH: {elapsed}");
            open.end(ConnectionEnd::NoSsh, &connection.closed);
        }
    }
}

/// A connection that was admitted. Dropped, it tells that the connection has ended.
struct OpenConnection {
    events: Teller,
    /// See [`Connection::tries`].
    tries: Arc<Mutex<Tries>>,
    /// See [`Connection::login`].
    login: Arc<SetOnce<LoggedIn>>,
    /// Cancelled when the application has dropped the connection.
    dropped: CancellationToken,
    opened: Instant,
    reason: ConnectionEnd,
}

impl OpenConnection {
    fn new(
        events: Teller,
        tries: Arc<Mutex<Tries>>,
        login: Arc<SetOnce<LoggedIn>>,
        dropped: CancellationToken,
    ) -> OpenConnection {
        events.tell(Event::ConnectionOpened);
        OpenConnection {
            events,
            tries,
            login,
            dropped,
            opened: Instant::now(),
            reason: ConnectionEnd::Shutdown,
        }
    }

    /// Waits for the end of the connection, and of its sessions.
    async fn run(
        &mut self,
        mut running: RunningSession<Connection>,
        connection: &Connection,
        deadline: Instant,
        slot: PreAuthSlot,
    ) {
        let must_end = connection.must_end(deadline, slot);
        let reason = tokio::select! {
            ended = &mut running => {
                log::debug!("{}: connection ended: {ended:?}", connection.peer);
                self.end(connection.explain_end(&ended), &connection.closed);
                None
            }
            reason = must_end => Some(reason),
        };
        if let Some(reason) = reason {
            self.end(reason, &connection.closed);
            connection.ending.cancel();
            let goodbye = disconnect(&mut running, reason);
            let is_over = timeout(GOODBYE_TIME, goodbye).await.is_ok();
            connection.closed.cancel();
            if !is_over {
                // Nothing that russh waits for outlasts the token, except a login that blocks its
                // thread. It could tell of a login after the end of the connection.
                let _ = running.await;
            }
        }
        connection.closed.cancel();
        connection.channels.close();
        connection.channels.wait().await;
    }

    /// Records why it ends. `closed` is cancelled already if it has made room for another one.
    fn end(&mut self, reason: ConnectionEnd, closed: &CancellationToken) {
        self.reason = match (self.dropped.is_cancelled(), closed.is_cancelled()) {
            (true, _) => ConnectionEnd::Dropped,
            (false, true) => ConnectionEnd::Evicted,
            (false, false) => reason,
        };
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        let events = match self.login.get() {
            Some(login) => self.events.logged_in(login.account.clone()),
            None => {
                if let Some(no_login) = lock(&self.tries).no_login(self.reason) {
                    self.events.tell(Event::NoLogin(no_login));
                }
                self.events.clone()
            }
        };
        events.tell(Event::ConnectionEnded {
            reason: self.reason,
            duration: self.opened.elapsed(),
        });
    }
}

/// A std lock: never held across an await.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Exchanges identification strings. Returns the client's, and fails if the connection has to be
/// closed.
async fn identify_client(
    socket: &mut Socket,
    peer: SocketAddr,
    deadline: Instant,
    shared: &Shared,
) -> Result<Bytes, ConnectionEnd> {
    tokio::select! {
        exchanged = socket.exchange_identification(ssh::IDENTIFICATION) => match exchanged {
            Ok(identification) => Ok(identification),
            Err(error) => {
                log::debug!("{peer}: no SSH: {error}");
                Err(ConnectionEnd::NoSsh)
            }
        },
        () = sleep_until(deadline) => Err(ConnectionEnd::LoginTimeout),
        () = shared.drain.cancelled() => Err(ConnectionEnd::Shutdown),
    }
}

/// Sends the client a disconnect message, and waits for the end of the connection.
async fn disconnect(running: &mut RunningSession<Connection>, reason: ConnectionEnd) {
    let code = match reason {
        ConnectionEnd::Rejected | ConnectionEnd::SecondCredential => {
            Disconnect::NoMoreAuthMethodsAvailable
        }
        ConnectionEnd::UserLimit => Disconnect::TooManyConnections,
        ConnectionEnd::Closed
        | ConnectionEnd::NoSession
        | ConnectionEnd::NoSsh
        | ConnectionEnd::NoCommonAlgorithm
        | ConnectionEnd::LoginTimeout
        | ConnectionEnd::Evicted
        | ConnectionEnd::Dropped
        | ConnectionEnd::ManyChannels
        | ConnectionEnd::Unused
        | ConnectionEnd::Shutdown => Disconnect::ByApplication,
    };
    let handle = running.handle();
    let text = reason.to_string();
    let _ = handle.disconnect(code, text, String::new()).await;
    let _ = running.await;
}

/// The answer to a credential.
enum Answer {
    Accept(Arc<Account>),
    Refuse(LoginRefusal),
    /// The connection ends before there is one, and no login is told any more.
    TooLate,
}

impl Answer {
    fn is_accepted(&self) -> bool {
        matches!(self, Answer::Accept(_))
    }
}

fn password_credential() -> Credential {
    Credential {
        method: LoginMethod::Password,
        fingerprint: None,
        key_id: None,
    }
}

fn key_credential(key: &PublicKey) -> Credential {
    Credential {
        method: LoginMethod::Key,
        fingerprint: Some(key.fingerprint()),
        key_id: None,
    }
}

fn certificate_credential(certificate: &Certificate) -> Credential {
    Credential {
        method: LoginMethod::Certificate,
        fingerprint: Some(certificate.key().fingerprint()),
        key_id: Some(shorten(certificate.key_id())),
    }
}

impl Connection {
    /// Resolves, with the reason, when the server must close the connection. Frees the slot once
    /// the client has logged in.
    async fn must_end(&self, deadline: Instant, slot: PreAuthSlot) -> ConnectionEnd {
        let drain = &self.shared.drain;
        tokio::select! {
            // A login just in time counts.
            biased;
            _login = self.login.wait() => {}
            () = drain.cancelled() => {}
            reason = self.rejected.wait() => return *reason,
            () = self.signals.silent() => return ConnectionEnd::SecondCredential,
            () = sleep_until(deadline) => return ConnectionEnd::LoginTimeout,
        }
        drop(slot);
        let reason = tokio::select! {
            biased;
            () = drain.cancelled() => ConnectionEnd::Shutdown,
            () = self.used_up.cancelled() => ConnectionEnd::ManyChannels,
            () = self.wait_until_unused() => return ConnectionEnd::Unused,
        };
        // A tracker can be waited for once it is closed. Sessions that are open may go on.
        self.channels.close();
        let had_channels = !self.channels.is_empty();
        let end = async {
            self.channels.wait().await;
            if had_channels {
                sleep(GOODBYE_TIME).await;
            }
        };
        self.shared.stop.run_until_cancelled(end).await;
        reason
    }

    /// Resolves when no channel was open for [`Connection::max_unused_time`]. russh's own timeout
    /// takes every answer to a keep-alive for activity.
    async fn wait_until_unused(&self) {
        let max_time = self.max_unused_time();
        loop {
            let unused = self.unused_since().elapsed();
            match self.channels.is_empty() {
                true if unused >= max_time => return,
                true => sleep(max_time - unused).await,
                false => sleep(max_time).await,
            }
        }
    }

    /// How long a client may hold a connection without a session.
    fn max_unused_time(&self) -> Duration {
        self.shared.settings.idle_timeout.min(MAX_UNUSED_TIME)
    }

    fn unused_since(&self) -> MutexGuard<'_, Instant> {
        lock(&self.unused_since)
    }

    /// Why russh has ended the connection. Tells what client and server could not agree on.
    fn explain_end(&self, ended: &Result<(), Error>) -> ConnectionEnd {
        if let Err(Error::NoCommonAlgo { kind, theirs, .. }) = ended {
            let client = lock(&self.tries).client();
            let found = ssh::tell_no_common(client, kind, theirs);
            self.events.tell(Event::NoCommonAlgorithm(found));
            return ConnectionEnd::NoCommonAlgorithm;
        }
        match (self.login.get(), self.had_session.get()) {
            (Some(_), None) => ConnectionEnd::NoSession,
            (Some(_), Some(())) | (None, _) => ConnectionEnd::Closed,
        }
    }

    /// Asks the application whether the client may log in with this.
    async fn ask(&self, user: &str, proof: Proof) -> Answer {
        lock(&self.tries).set_name(user);
        if self.rejected.get().is_some() {
            return Answer::Refuse(LoginRefusal::Disconnected);
        }
        let attempt = Attempt::new(user, self.peer, proof);
        let login = catch_panic(async { self.shared.auth.login(attempt).await });
        let login = match self.ending.run_until_cancelled(login).await {
            Some(Ok(login)) => login,
            Some(Err(Panicked)) => {
                log::error!(
                    "{}: login failed: user {user:?}: the application's login panicked",
                    self.peer
                );
                return Answer::Refuse(LoginRefusal::Panicked);
            }
            None => return Answer::TooLate,
        };
        match login {
            Login::Accept(account) => match self.check_account(&account) {
                Ok(()) => Answer::Accept(Arc::new(account)),
                Err(why) => {
                    log::error!("{}: login failed: user {user:?}: {why}", self.peer);
                    Answer::Refuse(LoginRefusal::InvalidAccount)
                }
            },
            Login::Refuse => Answer::Refuse(LoginRefusal::Wrong),
            Login::RefuseBecause(Refusal::UnknownUser) => Answer::Refuse(LoginRefusal::UnknownUser),
            Login::RefuseBecause(Refusal::Disabled) => Answer::Refuse(LoginRefusal::Disabled),
            Login::Disconnect => {
                let _ = self.rejected.set(ConnectionEnd::Rejected);
                Answer::Refuse(LoginRefusal::Disconnected)
            }
        }
    }

    /// Fails, with the reason, if the application's account can't be used.
    fn check_account(&self, account: &Account) -> Result<(), String> {
        let name = &account.name;
        if !account.has_valid_name() {
            return Err(format!(
                "the account's name {name:?} is empty or holds control characters"
            ));
        }
        self.find_home(account)?;
        Ok(())
    }

    /// Fails, with the reason, if the account has no home that can be used.
    fn find_home(&self, account: &Account) -> Result<Home, String> {
        let Some(home) = account.home_prefix() else {
            return Err(format!(
                "the account's name {:?} can't be a directory: give the account a home",
                account.name
            ));
        };
        match Home::new(&self.shared.settings.prefix, &home) {
            Ok(home) => Ok(home),
            Err(error) => Err(format!(
                "the account's home {home:?} can't be used: {error}"
            )),
        }
    }

    /// Called when a credential was refused. paramiko sends SERVICE_REQUEST before the next one,
    /// and russh does not answer that: the connection ends then, as the client would wait in vain.
    fn note_refusal(&self, user: &str, credential: &Credential, reason: LoginRefusal) {
        lock(&self.tries).add(user, credential, reason);
        if self.client == ssh::Client::Paramiko {
            self.signals.watch_for_silence();
        }
    }

    /// Tells of an attempt to log in, and answers it.
    fn finish_login(&self, user: &str, credential: Credential, answer: Answer) -> Auth {
        match answer {
            Answer::Accept(account) => self.accept_login(user, credential, account),
            Answer::Refuse(reason) => self.refuse_login(user, credential, reason),
            Answer::TooLate => Auth::reject(),
        }
    }

    /// Lets the client in, unless its user has too many connections: that ends this one.
    fn accept_login(&self, user: &str, credential: Credential, account: Arc<Account>) -> Auth {
        let limits = self.shared.user_limits(&account.name);
        let Some(place) = limits.open_connection() else {
            let _ = self.rejected.set(ConnectionEnd::UserLimit);
            return self.refuse_login(user, credential, LoginRefusal::UserLimit);
        };
        let events = self.events.logged_in(account.clone());
        events.tell(Event::LoginAccepted { credential });
        let _ = self.login.set(LoggedIn {
            account,
            limits,
            _place: place,
        });
        Auth::Accept
    }

    /// Answers a password that is not checked as a wrong one.
    fn refuse_unchecked(&self, user: &str, why: Penalized) -> Auth {
        let reason = match why {
            Penalized::User => LoginRefusal::UserPenalty,
            Penalized::Address => LoginRefusal::AddressPenalty,
        };
        self.refuse_login(user, password_credential(), reason)
    }

    /// Tells of a refused login, and the client that it may try again.
    fn refuse_login(&self, user: &str, credential: Credential, reason: LoginRefusal) -> Auth {
        self.note_refusal(user, &credential, reason);
        self.events.tell(Event::LoginRefused {
            name: shorten(user),
            credential,
            reason,
        });
        Auth::Reject {
            // Otherwise russh drops the method, and one mistyped password ends the login.
            proceed_with_methods: Some(ssh::methods()),
            partial_success: false,
        }
    }

    fn window(&self) -> MutexGuard<'_, Window> {
        lock(&self.window)
    }

    fn remembered(&self) -> MutexGuard<'_, HashSet<ChannelId>> {
        lock(&self.remembered)
    }

    /// Counts a channel that was opened and is served.
    fn remember(&self, channel: ChannelId) {
        let mut remembered = self.remembered();
        remembered.insert(channel);
        if remembered.len() >= MAX_REMEMBERED_CHANNELS {
            self.used_up.cancel();
        }
    }

    /// Whether one more channel may be opened.
    fn has_room(&self) -> bool {
        self.channels.len() < MAX_CHANNELS
            && !self.shared.drain.is_cancelled()
            && !self.used_up.is_cancelled()
    }

    /// Serves a channel until nothing more is wanted of it, and closes it.
    async fn serve_channel(self, channel: Channel<Msg>, account: Arc<Account>) {
        let id = channel.id();
        let (read, write) = channel.split();
        let write = Arc::new(write);
        let serving = self
            .clone()
            .serve_first_request(read, write.clone(), account);
        match catch_panic(serving).await {
            Ok(Some(status)) => {
                // restic and scp look at the status.
                let _ = write.exit_status(status).await;
                let _ = write.eof().await;
            }
            Ok(None) => {}
            // The channel ends, and others go on.
            Err(Panicked) => log::error!("{}: a session ended with a panic", self.peer),
        }
        // Has no effect if the client has closed it already. Otherwise russh keeps the channel until
        // the end of the connection.
        let _ = write.close().await;
        self.window().close(id);
        *self.unused_since() = Instant::now();
    }

    /// Waits for what the client wants of the channel, and does it. Returns the exit status; `None`
    /// if the client wants nothing. The [`Handler`] answers the requests themselves, in the order
    /// in which they arrive.
    async fn serve_first_request(
        self,
        mut read: ChannelReadHalf,
        write: Arc<ChannelWriteHalf<Msg>>,
        account: Arc<Account>,
    ) -> Option<u32> {
        let deadline = Instant::now() + self.max_unused_time();
        loop {
            let Ok(Some(message)) = timeout_at(deadline, read.wait()).await else {
                return None;
            };
            match message {
                ChannelMsg::RequestSubsystem { name, .. } if name == SUBSYSTEM => {
                    return Some(self.serve_sftp(read, write, account).await);
                }
                ChannelMsg::Exec { command, .. } => {
                    let command = String::from_utf8_lossy(&command);
                    let shown = command.chars().take(MAX_SHOWN_COMMAND).collect();
                    return Some(self.refuse_program(&write, account, Some(shown)).await);
                }
                ChannelMsg::RequestShell { .. } => {
                    return Some(self.refuse_program(&write, account, None).await);
                }
                ChannelMsg::Eof | ChannelMsg::Close => return None,
                _ => {}
            }
        }
    }

    /// Tells the user why there is neither a shell nor a command. Returns the exit status.
    async fn refuse_program(
        &self,
        write: &ChannelWriteHalf<Msg>,
        account: Arc<Account>,
        command: Option<String>,
    ) -> u32 {
        let events = self.events.logged_in(account);
        events.tell(Event::CommandRefused { command });
        let answer = write.extended_data_bytes(STDERR, NO_SHELL);
        // The client need not open the channel's window, and the end of the connection wakes nothing
        // that waits for it.
        let answer = self.closed.run_until_cancelled(answer);
        let _ = timeout(GOODBYE_TIME, answer).await;
        1
    }

    /// Runs an SFTP session. Returns its exit status.
    async fn serve_sftp(
        self,
        read: ChannelReadHalf,
        write: Arc<ChannelWriteHalf<Msg>>,
        account: Arc<Account>,
    ) -> u32 {
        let events = self.events.logged_in(account.clone());
        let home = match self.find_home(&account) {
            Ok(home) => home,
            // The login has found one.
            Err(error) => {
                log::error!("{}: {error}", events.who());
                return 1;
            }
        };
        let mount = match self.shared.mounts.find(account.store.as_ref()) {
            Ok(mount) => mount,
            Err(error) => {
                let who = events.who();
                log::error!("{who}: the store of the account can't be used: {error}");
                return 1;
            }
        };
        let settings = SessionParams {
            pool: self.shared.mounts.pool.clone(),
            limits: self.shared.user_limits(&account.name),
            uploads: self.shared.uploads.clone(),
            vfs: Vfs::new(
                mount.transfers,
                mount.overlay,
                home,
                self.shared.settings.dir_markers,
            ),
            access: account.access,
            events: events.clone(),
            user: account.name.as_str().into(),
            idle_timeout: self.shared.settings.idle_timeout,
            drain: self.shared.drain.clone(),
        };
        let _ = self.had_session.set(());
        let mut open = OpenSession::new(events);
        let outgoing = Outgoing {
            write,
            signals: self.signals,
            closed: self.closed,
        };
        let end = sftp::serve(read, outgoing, settings).await;
        let status = match end {
            End::Closed | End::Drained => 0,
            _ => 1,
        };
        open.end = Some(end);
        status
    }
}

/// A session that has begun. Dropped, it tells that the session has ended, so also when the
/// session's task is dropped.
struct OpenSession {
    events: Teller,
    opened: Instant,
    /// `None` until the session has ended by itself.
    end: Option<End>,
}

impl OpenSession {
    fn new(events: Teller) -> OpenSession {
        events.tell(Event::SessionStarted);
        OpenSession {
            events,
            opened: Instant::now(),
            end: None,
        }
    }
}

impl Drop for OpenSession {
    fn drop(&mut self) {
        let (reason, text) = match &self.end {
            Some(end) => (end.reason(), end.to_string()),
            None => (SessionEnd::CutOff, End::Drained.to_string()),
        };
        self.events.tell(Event::SessionEnded {
            reason,
            text,
            duration: self.opened.elapsed(),
        });
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

/// Sends to a channel.
struct Outgoing {
    write: Arc<ChannelWriteHalf<Msg>>,
    signals: Arc<Signals>,
    /// See [`Connection::closed`].
    closed: CancellationToken,
}

impl Outgoing {
    async fn send_once_unstuck(&mut self, bytes: Bytes) -> Result<(), Error> {
        self.signals.wait_until_sent().await;
        self.write.data_bytes(bytes).await
    }
}

impl Sink for Outgoing {
    async fn send(&mut self, bytes: Bytes) -> bool {
        let closed = self.closed.clone();
        tokio::select! {
            biased;
            // Without this, a send that waits for the channel's window outlives the connection.
            () = closed.cancelled() => false,
            sent = self.send_once_unstuck(bytes) => sent.is_ok(),
        }
    }
}

impl Handler for Connection {
    type Error = Error;

    async fn auth_none(&mut self, user: &str) -> Result<Auth, Error> {
        lock(&self.tries).set_name(user);
        Ok(Auth::reject())
    }

    async fn auth_password(&mut self, user: &str, password: &str) -> Result<Auth, Error> {
        let attempt = self.shared.penalties.begin(self.peer.ip(), user);
        let attempt = match self.ending.run_until_cancelled(attempt).await {
            Some(Ok(attempt)) => attempt,
            Some(Err(why)) => return Ok(self.refuse_unchecked(user, why)),
            None => return Ok(Auth::reject()),
        };
        let proof = Proof::Password(password.to_owned());
        let answer = self.ask(user, proof).await;
        if answer.is_accepted() {
            attempt.succeed();
        }
        Ok(self.finish_login(user, password_credential(), answer))
    }

    async fn auth_publickey_offered(
        &mut self,
        user: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, Error> {
        let key = PublicKey::from_client(offer.public_key.clone());
        let answer = match offer.algorithm {
            SHA1_SIGNATURE => Answer::Refuse(LoginRefusal::Sha1Signature),
            _ => self.ask(user, Proof::OfferedKey(key.clone())).await,
        };
        match answer {
            Answer::Accept(_) => Ok(Auth::Accept),
            // Told only if no login follows: clients offer every key that they have.
            Answer::Refuse(reason) => {
                // paramiko signs without an offer, and russh calls this first all the same.
                self.note_refusal(user, &key_credential(&key), reason);
                Ok(Auth::reject())
            }
            Answer::TooLate => Ok(Auth::reject()),
        }
    }

    async fn auth_publickey(
        &mut self,
        user: &str,
        key: VerifiedPublicKey<'_>,
    ) -> Result<Auth, Error> {
        let algorithm = key.algorithm;
        let key = PublicKey::from_client(key.public_key.clone());
        let answer = match algorithm {
            SHA1_SIGNATURE => Answer::Refuse(LoginRefusal::Sha1Signature),
            _ => self.ask(user, Proof::ProvedKey(key.clone())).await,
        };
        // Keys can't be guessed, and clients try all that they have: no penalty for refused ones.
        if answer.is_accepted() {
            self.shared.penalties.forgive(self.peer.ip(), user);
        }
        Ok(self.finish_login(user, key_credential(&key), answer))
    }

    async fn auth_openssh_certificate(
        &mut self,
        user: &str,
        certificate: &keys::Certificate,
    ) -> Result<Auth, Error> {
        // Signed with SHA-1 it was refused when it was offered: russh asks about that before.
        let certificate = Certificate::from_client(certificate.clone());
        let proof = Proof::Certificate(Box::new(certificate.clone()));
        let answer = self.ask(user, proof).await;
        // As for keys, no penalty. Until now the client knew only that the key may be used, and it
        // tries the key without the certificate next.
        if answer.is_accepted() {
            self.shared.penalties.forgive(self.peer.ip(), user);
        }
        Ok(self.finish_login(user, certificate_credential(&certificate), answer))
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Error> {
        match self.login.get() {
            Some(login) if self.has_room() => {
                let id = channel.id();
                self.window().open(id, login.limits.clone());
                reply.accept().await;
                let session = self.clone().serve_channel(channel, login.account.clone());
                let stop = self.shared.stop.clone();
                self.channels.spawn(stop.run_until_cancelled_owned(session));
                self.remember(id);
            }
            Some(_) | None => reply.reject(ChannelOpenFailure::ResourceShortage).await,
        }
        Ok(())
    }

    /// Called only if the client closes the channel first.
    async fn channel_close(
        &mut self,
        channel: ChannelId,
        _session: &mut Session,
    ) -> Result<(), Error> {
        self.remembered().remove(&channel);
        Ok(())
    }

    async fn data(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        _session: &mut Session,
    ) -> Result<(), Error> {
        let waited = self.signals.waited();
        let grown = self.window().record(channel, data.len(), waited);
        if let Some(size) = grown {
            log::debug!("{}: the SSH window grows to {size} bytes", self.peer);
        }
        Ok(())
    }

    fn adjust_window(&mut self, channel: ChannelId, current: u32) -> u32 {
        self.window().adjust(channel, current)
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
