//! The library inside another program, without S3 and without the binary.

// A panic is how a test fails.
#![allow(clippy::restriction)]

use bytes::Bytes;
use russh::client::{AuthResult, Handle};
use russh::keys::ssh_key::certificate::{Builder, CertType};
use russh::keys::{Algorithm, Certificate, PrivateKey, PrivateKeyWithHashAlg};
use russh_sftp::client::RawSftpSession;
use russh_sftp::client::error::Error as SftpError;
use russh_sftp::protocol::{FileAttributes, OpenFlags, StatusCode};
use sftpd::events::{Event, Events, Who};
use sftpd::server::{BuildError, Server, ServerBuilder};
use sftpd::store::memory::MemoryStore;
use sftpd::store::{
    self, Attributes, Condition, Key, Limits, ListRequest, Object, Page, Part, Store,
};
use sftpd::users::{Access, Account, Attempt, Auth, Login, Proof, PublicKey, UserList};
use std::collections::BTreeMap;
use std::future::pending;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

/// How long a test waits for what should happen at once.
const PATIENCE: Duration = Duration::from_secs(30);
const PASSWORD: &str = "open sesame";
const PUT: OpenFlags = OpenFlags::WRITE
    .union(OpenFlags::CREATE)
    .union(OpenFlags::TRUNCATE);
/// More than one part.
const LARGE: usize = 6 * 1024 * 1024;

fn peer() -> SocketAddr {
    "192.0.2.7:4711".parse().unwrap()
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

/// A client, and its connection in the server.
struct Client {
    ssh: Handle<AnyHost>,
    serving: JoinHandle<()>,
}

impl Client {
    /// Connects through memory.
    async fn connect(server: &Server) -> Client {
        Client::connect_with(server, russh::client::Config::default()).await
    }

    async fn connect_with(server: &Server, config: russh::client::Config) -> Client {
        let (ours, theirs) = duplex(64 * 1024);
        let serving = serve_stream(server, theirs);
        let config = Arc::new(config);
        let connected = russh::client::connect_stream(config, ours, AnyHost).await;
        Client {
            ssh: connected.unwrap(),
            serving,
        }
    }

    async fn login(server: &Server, user: &str) -> Client {
        let mut client = Client::connect(server).await;
        assert!(client.try_password(user, PASSWORD).await, "{user}");
        client
    }

    async fn try_password(&mut self, user: &str, password: &str) -> bool {
        let answered = self.ssh.authenticate_password(user, password).await;
        matches!(answered, Ok(AuthResult::Success))
    }

    async fn try_key(&mut self, user: &str, key: &PrivateKey) -> bool {
        let key = PrivateKeyWithHashAlg::new(Arc::new(key.clone()), None);
        let answered = self.ssh.authenticate_publickey(user, key).await;
        matches!(answered, Ok(AuthResult::Success))
    }

    async fn try_certificate(&mut self, user: &str, key: &PrivateKey, known: Certificate) -> bool {
        let key = Arc::new(key.clone());
        let answered = self.ssh.authenticate_openssh_cert(user, key, known).await;
        matches!(answered, Ok(AuthResult::Success))
    }

    async fn sftp(&self) -> RawSftpSession {
        let channel = self.ssh.channel_open_session().await.unwrap();
        channel.request_subsystem(true, "sftp").await.unwrap();
        let sftp = RawSftpSession::new(channel.into_stream());
        sftp.set_timeout(PATIENCE.as_secs());
        sftp.init().await.unwrap();
        sftp
    }
}

fn serve_stream(server: &Server, stream: DuplexStream) -> JoinHandle<()> {
    let server = server.clone();
    tokio::spawn(async move { server.serve_stream(stream, peer()).await })
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(PATIENCE, future).await {
        Ok(done) => done,
        Err(_) => panic!("{what} takes too long"),
    }
}

async fn eventually(what: &str, is_so: impl Fn() -> bool) {
    within(what, async {
        while !is_so() {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

async fn open(sftp: &RawSftpSession, path: &str) -> String {
    let opened = sftp.open(path, PUT, FileAttributes::empty()).await;
    opened.unwrap().handle
}

async fn write(sftp: &RawSftpSession, handle: &str, data: &[u8]) {
    for (n, block) in data.chunks(32 * 1024).enumerate() {
        let offset = n as u64 * 32 * 1024;
        sftp.write(handle, offset, block.to_vec()).await.unwrap();
    }
}

async fn put(sftp: &RawSftpSession, path: &str, data: &[u8]) {
    let handle = open(sftp, path).await;
    write(sftp, &handle, data).await;
    sftp.close(handle).await.unwrap();
}

async fn get(sftp: &RawSftpSession, path: &str) -> Vec<u8> {
    let opened = sftp
        .open(path, OpenFlags::READ, FileAttributes::empty())
        .await;
    let handle = opened.unwrap().handle;
    let mut all = Vec::new();
    loop {
        match sftp.read(&handle, all.len() as u64, 32 * 1024).await {
            Ok(data) => all.extend(data.data),
            Err(SftpError::Status(status)) if status.status_code == StatusCode::Eof => break,
            Err(error) => panic!("{error}"),
        }
    }
    sftp.close(handle).await.unwrap();
    all
}

/// The events that were told, as in JSON.
#[derive(Clone, Default)]
struct Told(Arc<std::sync::Mutex<Vec<serde_json::Value>>>);

impl Events for Told {
    fn event(&self, _who: &Who, event: &Event) {
        let event = serde_json::to_value(event).unwrap();
        self.0.lock().unwrap().push(event);
    }
}

impl Told {
    fn names(&self) -> Vec<String> {
        let told = self.0.lock().unwrap();
        let names = told.iter().map(|event| event["event"].as_str().unwrap());
        names.map(str::to_owned).collect()
    }

    /// Method and reason of each login that was refused.
    fn refusals(&self) -> Vec<String> {
        let mut refusals = Vec::new();
        for event in self.0.lock().unwrap().iter() {
            if event["event"] == "login_refused" {
                let method = event["method"].as_str().unwrap();
                let reason = event["reason"].as_str().unwrap();
                refusals.push(format!("{method} {reason}"));
            }
        }
        refusals
    }

    /// Why each connection has ended.
    fn ends(&self) -> Vec<String> {
        let mut ends = Vec::new();
        for event in self.0.lock().unwrap().iter() {
            if event["event"] == "connection_ended" {
                ends.push(event["reason"].as_str().unwrap().to_owned());
            }
        }
        ends
    }
}

/// Every user with the right password, in a home of the same name.
async fn any_user(attempt: Attempt) -> Login {
    match attempt.proof {
        Proof::Password(password) if password == PASSWORD => {
            Login::Accept(Account::new(attempt.user))
        }
        _ => Login::Refuse,
    }
}

fn builder() -> ServerBuilder {
    Server::builder(Arc::new(MemoryStore::default()), any_user)
}

fn server() -> Server {
    builder().build().unwrap()
}

fn new_key() -> PrivateKey {
    PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).unwrap()
}

fn public(key: &PrivateKey) -> PublicKey {
    let line = key.public_key().to_openssh().unwrap();
    line.parse().unwrap()
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let long = Duration::MAX;
    let zero = Duration::ZERO;
    let mib = 1024 * 1024;
    let wrong: Vec<(&str, ServerBuilder)> = vec![
        ("prefix \"a/../b\"", builder().prefix("a/../b")),
        ("part size of 1048576", builder().part_size(mib)),
        ("part size of 6442450944", builder().part_size(6144 * mib)),
        ("less than four parts", builder().buffer_memory(19 * mib)),
        ("four parts of 104857600", builder().part_size(100 * mib)),
        ("max_sessions is 0", builder().max_sessions(0)),
        ("max_uploads is 0", builder().max_uploads(0)),
        ("login_timeout is 0", builder().login_timeout(zero)),
        ("idle_timeout is 0", builder().idle_timeout(zero)),
        ("open_timeout is 0", builder().open_timeout(zero)),
        ("close_timeout is 0", builder().close_timeout(zero)),
        ("login_timeout is longer", builder().login_timeout(long)),
        ("idle_timeout is longer", builder().idle_timeout(long)),
        ("drain_timeout is longer", builder().drain_timeout(long)),
        ("abandoned_after is longer", builder().abandoned_after(long)),
        (
            "below 3600s",
            builder().abandoned_after(59 * Duration::from_mins(1)),
        ),
        (
            "0.0.0.0/0",
            builder().proxies(["0.0.0.0/0".parse().unwrap()]),
        ),
        ("::/0", builder().proxies(["::/0".parse().unwrap()])),
    ];
    for (sentence, builder) in wrong {
        let checked = builder.check().unwrap_err().to_string();
        let built = builder.build().err().unwrap().to_string();
        assert!(built.contains(sentence), "{sentence}: {built}");
        assert_eq!(checked, built);
    }
    let refused = builder().buffer_memory(0).build().err().unwrap();
    assert!(matches!(refused, BuildError::BufferMemory { .. }));
}

#[test]
fn a_server_is_built_outside_of_a_runtime_and_without_host_keys() {
    let server = server();
    let [key] = server.host_keys() else {
        panic!("{}", server.host_keys().len());
    };
    assert!(key.to_string().starts_with("ED25519 SHA256:"));
    assert_ne!(
        key.fingerprint(),
        self::server().host_keys()[0].fingerprint()
    );
    drop(server);
}

#[tokio::test]
async fn serve_returns_once_uploads_are_aborted() {
    let store = Arc::new(MemoryStore::default());
    let server = Server::builder(store.clone(), any_user)
        .drain_timeout(Duration::ZERO)
        .build()
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (end, ended) = oneshot::channel::<()>();
    let serving = server.clone();
    let serving = tokio::spawn(async move {
        let shutdown = async { drop(ended.await) };
        serving.serve(listener, shutdown).await;
    });
    let config = Arc::new(russh::client::Config::default());
    let mut ssh = russh::client::connect(config, address, AnyHost)
        .await
        .unwrap();
    let answered = ssh.authenticate_password("alice", PASSWORD).await;
    assert!(matches!(answered, Ok(AuthResult::Success)));
    let channel = ssh.channel_open_session().await.unwrap();
    channel.request_subsystem(true, "sftp").await.unwrap();
    let sftp = RawSftpSession::new(channel.into_stream());
    sftp.init().await.unwrap();
    let handle = open(&sftp, "/f").await;
    write(&sftp, &handle, &vec![1; LARGE]).await;
    eventually("a part is sent", || store.uploads() == 1).await;
    end.send(()).unwrap();
    within("the end", serving).await.unwrap();
    assert_eq!(store.uploads(), 0);
    // It has ended for good.
    let late = TcpListener::bind("127.0.0.1:0").await.unwrap();
    within("a late start", server.serve(late, pending())).await;
    within("a second end", server.shut_down()).await;
    within("a late stream", Client::try_to_connect(&server)).await;
}

/// A memory that takes this long for the abort of an upload.
struct SlowAbort {
    store: MemoryStore,
    time: Duration,
}

#[async_trait::async_trait]
impl Store for SlowAbort {
    async fn abort(&self, key: &Key, id: &str) -> store::Result<()> {
        sleep(self.time).await;
        self.store.abort(key, id).await
    }

    fn limits(&self) -> Limits {
        self.store.limits()
    }

    async fn head(&self, key: &Key) -> store::Result<Object> {
        self.store.head(key).await
    }

    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> store::Result<Vec<Bytes>> {
        self.store.get(key, range, etag).await
    }

    async fn list(&self, request: ListRequest<'_>) -> store::Result<Page> {
        self.store.list(request).await
    }

    async fn delete(&self, key: &Key, condition: &Condition) -> store::Result<()> {
        self.store.delete(key, condition).await
    }

    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> store::Result<Object> {
        self.store.put(key, body, attributes, condition).await
    }

    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> store::Result<String> {
        self.store.create_upload(key, attributes).await
    }

    async fn upload_part(
        &self,
        key: &Key,
        id: &str,
        number: u32,
        body: Bytes,
    ) -> store::Result<Part> {
        self.store.upload_part(key, id, number, body).await
    }

    async fn complete(
        &self,
        key: &Key,
        id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> store::Result<Object> {
        self.store.complete(key, id, parts, condition).await
    }
}

/// Shuts a server down during an upload. Returns what it has told, and for how long it has waited.
async fn shut_down_with_slow_abort(time: Duration) -> (Told, Duration) {
    let store = Arc::new(SlowAbort {
        store: MemoryStore::default(),
        time,
    });
    let told = Told::default();
    let server = Server::builder(store.clone(), any_user)
        .events(told.clone())
        .drain_timeout(Duration::ZERO)
        .build()
        .unwrap();
    let client = Client::login(&server, "alice").await;
    let sftp = client.sftp().await;
    let handle = open(&sftp, "/f").await;
    write(&sftp, &handle, &vec![1; LARGE]).await;
    eventually("a part is sent", || store.store.uploads() == 1).await;
    let begun = Instant::now();
    server.shut_down().await;
    (told, begun.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_server_stops_once_a_slow_store_has_aborted_the_uploads() {
    let (told, took) = shut_down_with_slow_abort(Duration::from_secs(29)).await;
    assert_eq!(took.as_secs(), 29);
    let names = told.names();
    assert!(names.ends_with(&[
        "upload_aborted".into(),
        "written".into(),
        "server_stopped".into()
    ]));
}

#[tokio::test(start_paused = true)]
async fn a_server_stops_without_a_store_that_does_not_abort_uploads() {
    let (told, took) = shut_down_with_slow_abort(Duration::MAX).await;
    assert_eq!(took.as_secs(), 30);
    let names = told.names();
    assert!(names.ends_with(&[
        "upload_left".into(),
        "written".into(),
        "server_stopped".into()
    ]));
}

#[tokio::test]
async fn each_listener_is_told_and_none_after_the_end() {
    let (send, mut told) = mpsc::unbounded_channel();
    let server = builder()
        .listeners(Vec::new())
        .events(move |_: &Who, event: &Event| send.send(event.clone()).unwrap())
        .build()
        .unwrap();
    let mut serving = Vec::new();
    for _ in 0..2 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let here = listener.local_addr().unwrap();
        let clone = server.clone();
        serving.push(tokio::spawn(async move {
            clone.serve(listener, pending()).await
        }));
        match within("the event", told.recv()).await {
            Some(Event::ServerStarted { address, .. }) => assert_eq!(address, Some(here)),
            other => panic!("{other:?}"),
        }
    }
    server.shut_down().await;
    for serving in serving {
        within("the end", serving).await.unwrap();
    }
    let late = TcpListener::bind("127.0.0.1:0").await.unwrap();
    within("a late start", server.serve(late, pending())).await;
    drop(server);
    assert_eq!(told.recv().await, Some(Event::ServerStopped));
    assert_eq!(told.recv().await, None);
}

impl Client {
    /// Whether the server lets a client begin.
    async fn try_to_connect(server: &Server) -> bool {
        let (ours, theirs) = duplex(64 * 1024);
        let _serving = serve_stream(server, theirs);
        let config = Arc::new(russh::client::Config::default());
        russh::client::connect_stream(config, ours, AnyHost)
            .await
            .is_ok()
    }
}

#[tokio::test]
async fn a_stream_that_is_not_tcp_is_served_until_it_ends() {
    let server = server();
    let client = Client::login(&server, "alice").await;
    let sftp = client.sftp().await;
    let data: Vec<u8> = (0..LARGE).map(|n| (n / 3) as u8).collect();
    put(&sftp, "/f", &data).await;
    assert!(get(&sftp, "/f").await == data);
    assert!(!client.serving.is_finished());
    drop((sftp, client.ssh));
    within("the end", client.serving).await.unwrap();
}

#[tokio::test]
async fn a_tcp_stream_that_was_accepted_elsewhere_is_served() {
    let server = server();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap());
    let (client, accepted) = tokio::join!(client, listener.accept());
    let (stream, address) = accepted.unwrap();
    let serving = server.clone();
    tokio::spawn(async move { serving.serve_stream(stream, address).await });
    let config = Arc::new(russh::client::Config::default());
    let mut ssh = russh::client::connect_stream(config, client.unwrap(), AnyHost)
        .await
        .unwrap();
    let answered = ssh.authenticate_password("alice", PASSWORD).await;
    assert!(matches!(answered, Ok(AuthResult::Success)));
}

#[tokio::test]
async fn a_dropped_serve_stream_ends_its_connection_and_aborts_its_uploads() {
    let store = Arc::new(MemoryStore::default());
    let server = Server::builder(store.clone(), any_user).build().unwrap();
    let (kept, dropped) = (
        Client::login(&server, "alice").await,
        Client::login(&server, "bob").await,
    );
    let sftp = dropped.sftp().await;
    let handle = open(&sftp, "/f").await;
    write(&sftp, &handle, &vec![1; LARGE]).await;
    eventually("a part is sent", || store.uploads() == 1).await;
    dropped.serving.abort();
    eventually("the abort", || store.uploads() == 0).await;
    eventually("the end", || dropped.ssh.is_closed()).await;
    put(&kept.sftp().await, "/g", b"untouched").await;
}

#[tokio::test]
async fn the_limit_on_connections_holds_for_streams() {
    let server = builder().max_sessions(1).build().unwrap();
    let first = Client::login(&server, "alice").await;
    let (mut ours, theirs) = duplex(64 * 1024);
    let refused = serve_stream(&server, theirs);
    let mut heard = String::new();
    let read = within("the refusal", ours.read_to_string(&mut heard)).await;
    read.unwrap();
    assert!(heard.contains("try again later"), "{heard}");
    within("the end", refused).await.unwrap();
    drop(first.ssh);
    within("the first one's end", first.serving).await.unwrap();
    Client::login(&server, "alice").await;
}

#[tokio::test]
async fn limits_may_be_as_large_as_numbers_are() {
    let server = builder().max_sessions(usize::MAX).max_uploads(usize::MAX);
    let server = server.build().unwrap();
    let client = Client::login(&server, "alice").await;
    put(&client.sftp().await, "/f", b"x").await;
}

/// The server's answer to a command waits for room in a window that never opens.
#[tokio::test]
async fn a_command_without_a_window_keeps_no_place() {
    let server = builder().max_sessions(1).build().unwrap();
    let config = russh::client::Config {
        window_size: 0,
        ..russh::client::Config::default()
    };
    let mut first = Client::connect_with(&server, config).await;
    assert!(first.try_password("alice", PASSWORD).await);
    let channel = first.ssh.channel_open_session().await.unwrap();
    channel.exec(true, "x").await.unwrap();
    sleep(Duration::from_millis(100)).await;
    drop((channel, first.ssh));
    within("the end", first.serving).await.unwrap();
    Client::login(&server, "alice").await;
}

#[tokio::test]
async fn a_stream_of_a_load_balancer_names_its_client() {
    let mapped = "PROXY TCP6 ::ffff:198.51.100.9 2001:db8::7 1234 22\r\n";
    for header in ["PROXY TCP4 198.51.100.9 192.0.2.7 1234 22\r\n", mapped] {
        check_client_of_load_balancer(header, "198.51.100.9:1234").await;
    }
    let other = "PROXY TCP6 2001:db8::9 2001:db8::7 1234 22\r\n";
    check_client_of_load_balancer(other, "[2001:db8::9]:1234").await;
}

async fn check_client_of_load_balancer(header: &str, client: &str) {
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let peers = seen.clone();
    let auth = move |attempt: Attempt| {
        peers.lock().unwrap().push(attempt.peer);
        async { Login::Refuse }
    };
    let server = Server::builder(Arc::new(MemoryStore::default()), auth)
        .proxies(["192.0.2.0/24".parse().unwrap()])
        .build()
        .unwrap();
    let (mut ours, theirs) = duplex(64 * 1024);
    serve_stream(&server, theirs);
    ours.write_all(header.as_bytes()).await.unwrap();
    let config = Arc::new(russh::client::Config::default());
    let mut ssh = russh::client::connect_stream(config, ours, AnyHost)
        .await
        .unwrap();
    let _ = ssh.authenticate_password("alice", PASSWORD).await;
    let client: SocketAddr = client.parse().unwrap();
    assert_eq!(*seen.lock().unwrap(), [client]);
}

#[tokio::test]
async fn two_servers_in_one_process_do_not_meet() {
    let bob = |attempt: Attempt| async move {
        match attempt.user.as_str() {
            "bob" => any_user(attempt).await,
            _ => Login::Refuse,
        }
    };
    let one = server();
    let other = Server::builder(Arc::new(MemoryStore::default()), bob)
        .max_sessions(1)
        .build()
        .unwrap();
    let (alice, bob) = (
        Client::login(&one, "bob").await,
        Client::login(&other, "bob").await,
    );
    let (sftp, other_sftp) = (alice.sftp().await, bob.sftp().await);
    put(&sftp, "/f", b"one").await;
    put(&other_sftp, "/f", b"other").await;
    sftp.mkdir("/d", FileAttributes::empty()).await.unwrap();
    assert!(other_sftp.stat("/d").await.is_err());
    assert_eq!(get(&sftp, "/f").await, b"one");
    let mut stranger = Client::connect(&one).await;
    assert!(stranger.try_password("alice", PASSWORD).await);
    within("the end of the other one", other.shut_down()).await;
    assert!(bob.ssh.is_closed());
    assert_eq!(get(&sftp, "/f").await, b"one");
}

#[tokio::test]
async fn the_last_clone_of_a_server_ends_its_sessions() {
    let server = server();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = server.clone();
    let serving = tokio::spawn(async move { serving.serve(listener, pending()).await });
    let config = Arc::new(russh::client::Config::default());
    let mut ssh = russh::client::connect(config, address, AnyHost)
        .await
        .unwrap();
    let answered = ssh.authenticate_password("alice", PASSWORD).await;
    assert!(matches!(answered, Ok(AuthResult::Success)));
    serving.abort();
    let _ = serving.await;
    ssh.channel_open_session().await.unwrap();
    drop(server);
    eventually("the end", || ssh.is_closed()).await;
}

#[tokio::test]
async fn a_closure_decides_and_its_account_is_in_force() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    let auth = move |attempt: Attempt| {
        counter.fetch_add(1, Ordering::Relaxed);
        async move {
            assert_eq!(attempt.peer, peer());
            match any_user(attempt).await {
                Login::Accept(account) => {
                    Login::Accept(account.home("shared").access(Access::ReadOnly))
                }
                refused => refused,
            }
        }
    };
    let store = Arc::new(MemoryStore::default());
    let writer = Server::builder(store.clone(), |attempt: Attempt| async move {
        match any_user(attempt).await {
            Login::Accept(account) => Login::Accept(account.home("shared")),
            refused => refused,
        }
    });
    let writer = writer.build().unwrap();
    put(&Client::login(&writer, "w").await.sftp().await, "/f", b"x").await;
    let server = Server::builder(store, auth).build().unwrap();
    let mut client = Client::connect(&server).await;
    assert!(!client.try_password("alice", "guess").await);
    assert!(client.try_password("alice", PASSWORD).await);
    assert_eq!(asked.load(Ordering::Relaxed), 2);
    let sftp = client.sftp().await;
    assert_eq!(get(&sftp, "/f").await, b"x");
    let opened = sftp.open("/g", PUT, FileAttributes::empty()).await;
    assert!(opened.is_err(), "read-only");
}

#[tokio::test]
async fn an_async_closure_is_an_auth() {
    let auth = async |attempt: Attempt| any_user(attempt).await;
    let server = Server::builder(Arc::new(MemoryStore::default()), auth);
    Client::login(&server.build().unwrap(), "alice").await;
}

#[tokio::test]
async fn an_offered_key_only_leads_to_a_signature() {
    let proofs = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = proofs.clone();
    let auth = move |attempt: Attempt| {
        seen.lock().unwrap().push(format!("{:?}", attempt.proof));
        async move {
            match attempt.proof {
                // An Auth that accepts every offer lets nobody in with it.
                Proof::OfferedKey(_) => Login::Accept(Account::new("")),
                _ => Login::Refuse,
            }
        }
    };
    let server = Server::builder(Arc::new(MemoryStore::default()), auth);
    let server = server.build().unwrap();
    let key = new_key();
    let mut client = Client::connect(&server).await;
    assert!(!client.try_key("alice", &key).await);
    assert!(!client.try_password("alice", PASSWORD).await);
    let shown = format!("{:?}", public(&key));
    let expected = [
        format!("OfferedKey({shown})"),
        format!("ProvedKey({shown})"),
        "Password(…)".to_owned(),
    ];
    let seen = proofs.lock().unwrap().clone();
    for proof in &seen {
        assert!(expected.contains(proof), "{proof}");
    }
    assert_eq!(seen.last(), expected.last());
}

#[tokio::test]
async fn listed_users_log_in_with_password_or_key() {
    let key = new_key();
    let users = UserList::default()
        .with_password(Account::new("alice"), PASSWORD)
        .unwrap()
        .with_key(Account::new("bob"), public(&key));
    let server = Server::builder(Arc::new(MemoryStore::default()), users);
    let server = server.build().unwrap();
    Client::login(&server, "alice").await;
    let mut client = Client::connect(&server).await;
    assert!(!client.try_key("alice", &key).await);
    assert!(!client.try_key("bob", &new_key()).await);
    assert!(client.try_key("bob", &key).await);
}

/// A certificate of alice's, valid for a minute around now.
fn certify(authority: &PrivateKey, key: &PrivateKey) -> Certificate {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let now = now.as_secs();
    let nonce = [7; 16];
    let mut builder = Builder::new(nonce, key.public_key(), now - 30, now + 30).unwrap();
    builder.cert_type(CertType::User).unwrap();
    builder.key_id("alice's laptop").unwrap();
    builder.valid_principal("alice").unwrap();
    builder.sign(authority).unwrap()
}

#[tokio::test]
async fn certificates_of_a_known_authority_are_accepted_for_their_principals() {
    let (authority, stranger, key) = (new_key(), new_key(), new_key());
    let authorities = Arc::new([public(&authority)]);
    let auth = move |attempt: Attempt| {
        let authorities = authorities.clone();
        async move {
            match attempt.proof {
                Proof::OfferedKey(_) => Login::Accept(Account::new(attempt.user)),
                Proof::Certificate(certificate)
                    if certificate.is_valid_for(&attempt.user, authorities.as_ref()) =>
                {
                    Login::Accept(Account::new(certificate.key_id()).home(attempt.user))
                }
                _ => Login::Refuse,
            }
        }
    };
    let server = Server::builder(Arc::new(MemoryStore::default()), auth);
    let server = server.build().unwrap();
    let good = certify(&authority, &key);
    let bad = certify(&stranger, &key);
    let mut client = Client::connect(&server).await;
    assert!(!client.try_certificate("alice", &key, bad).await);
    assert!(!client.try_certificate("bob", &key, good.clone()).await);
    assert!(!client.try_key("alice", &key).await);
    assert!(client.try_certificate("alice", &key, good.clone()).await);
    // Whoever has the certificate must have the key too.
    let mut thief = Client::connect(&server).await;
    assert!(!thief.try_certificate("alice", &new_key(), good).await);
}

#[tokio::test]
async fn built_in_logins_refuse_certificates() {
    let (authority, key) = (new_key(), new_key());
    let users = UserList::default().with_key(Account::new("alice"), public(&key));
    let server = Server::builder(Arc::new(MemoryStore::default()), users);
    let server = server.build().unwrap();
    let mut client = Client::connect(&server).await;
    let known = certify(&authority, &key);
    assert!(!client.try_certificate("alice", &key, known).await);
    assert!(client.try_key("alice", &key).await, "the key is listed");
}

#[tokio::test]
async fn disconnect_ends_the_connection_and_is_asked_once() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    let auth = move |_attempt: Attempt| {
        counter.fetch_add(1, Ordering::Relaxed);
        async { Login::Disconnect }
    };
    let server = Server::builder(Arc::new(MemoryStore::default()), auth);
    let server = server.build().unwrap();
    let mut client = Client::connect(&server).await;
    assert!(!client.try_password("alice", PASSWORD).await);
    assert!(!client.try_password("alice", PASSWORD).await);
    within("the end", client.serving).await.unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    let mut client = Client::connect(&server).await;
    assert!(!client.try_key("alice", &new_key()).await);
    within("the end", client.serving).await.unwrap();
}

#[tokio::test]
async fn names_that_the_log_cannot_show_cannot_log_in() {
    let server = server();
    for name in ["a\nb", "\u{1b}[2J", ""] {
        let mut client = Client::connect(&server).await;
        assert!(!client.try_password(name, PASSWORD).await, "{name:?}");
    }
}

/// A user who chooses the own name must not choose a home by it.
#[tokio::test]
async fn names_that_are_no_directory_have_no_home_by_themselves() {
    let told = Told::default();
    let store = Arc::new(MemoryStore::default());
    let server = Server::builder(store.clone(), any_user);
    let server = server.events(told.clone()).build().unwrap();
    let long = "x".repeat(600);
    let refused = [
        "/", "//", ".", "..", "bob/x", "/bob", "bob/", "../bob", "a\0b", &long,
    ];
    for name in refused {
        let mut client = Client::connect(&server).await;
        assert!(!client.try_password(name, PASSWORD).await, "{name:?}");
    }
    let expected = ["password invalid_account"; 10];
    assert_eq!(told.refusals(), expected);
    for name in [
        "bob",
        "...",
        ".bob",
        "a b",
        "DOMAIN\\bob",
        "bob@example.com",
        "Zoë",
    ] {
        let client = Client::login(&server, name).await;
        put(&client.sftp().await, "/f", b"x").await;
        let key = Key::new(format!("{name}/f")).unwrap();
        assert!(store.head(&key).await.is_ok(), "{name:?}");
    }
}

/// With a home of its own, a name is only shown.
#[tokio::test]
async fn a_home_that_is_given_is_used_whatever_the_name() {
    let homes = [
        ("", "f"),
        ("/", "f"),
        ("/a//b/", "a/b/f"),
        ("bob/x", "bob/x/f"),
    ];
    for (home, key) in homes {
        let auth = move |attempt: Attempt| async move {
            match any_user(attempt).await {
                Login::Accept(account) => Login::Accept(account.home(home)),
                refused => refused,
            }
        };
        let store = Arc::new(MemoryStore::default());
        let server = Server::builder(store.clone(), auth).build().unwrap();
        let client = Client::login(&server, "bob/x").await;
        put(&client.sftp().await, "/f", b"x").await;
        let key = Key::new(key).unwrap();
        assert!(store.head(&key).await.is_ok(), "{home:?}");
    }
}

/// A login that panics is refused, and the client may try again.
#[tokio::test]
async fn a_login_that_panics_is_refused() {
    let auth = async |attempt: Attempt| match attempt.user.as_str() {
        "broken" => panic!("a bug of the application"),
        _ => any_user(attempt).await,
    };
    let told = Told::default();
    let server = Server::builder(Arc::new(MemoryStore::default()), auth);
    let server = server.events(told.clone()).build().unwrap();
    let mut client = Client::connect(&server).await;
    assert!(!client.try_password("broken", PASSWORD).await);
    assert!(!client.try_key("broken", &new_key()).await);
    assert!(client.try_password("alice", PASSWORD).await);
    assert_eq!(told.refusals(), ["password panicked"]);
}

/// A login that never ends costs its client the connection, once the login timeout is over.
#[tokio::test]
async fn a_login_that_hangs_ends_at_the_login_timeout() {
    let (asked, hanging) = (Arc::new(()), Arc::new(AtomicUsize::new(0)));
    let (guard, count) = (asked.clone(), hanging.clone());
    let auth = move |_: Attempt| {
        let guard = guard.clone();
        count.fetch_add(1, Ordering::Relaxed);
        async move {
            pending::<()>().await;
            drop(guard);
            Login::Refuse
        }
    };
    let told = Told::default();
    let server = Server::builder(Arc::new(MemoryStore::default()), auth)
        .events(told.clone())
        .login_timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    let mut clients = Vec::new();
    // Further passwords wait for the outcome of the first ones.
    for _ in 0..9 {
        let mut client = Client::connect(&server).await;
        let serving = client.serving;
        clients.push(serving);
        tokio::spawn(async move {
            let password = client.ssh.authenticate_password("alice", PASSWORD);
            password.await.is_ok()
        });
    }
    for serving in clients {
        within("the end", serving).await.unwrap();
    }
    within("the server's end", server.shut_down()).await;
    assert!(hanging.load(Ordering::Relaxed) > 1);
    assert_eq!(Arc::strong_count(&asked), 2, "no login is left");
    for refusal in told.refusals() {
        assert_eq!(refusal, "password user_penalty", "that of one that waited");
    }
    let ends = told.ends();
    assert_eq!(ends.len(), 9);
    assert_eq!(ends[..7], ["login_timeout"; 7]);
}

/// The answer of a login that comes too late lets nobody in.
#[tokio::test]
async fn a_login_that_is_late_is_not_told() {
    let auth = async |attempt: Attempt| {
        sleep(Duration::from_secs(3)).await;
        any_user(attempt).await
    };
    let told = Told::default();
    let server = Server::builder(Arc::new(MemoryStore::default()), auth)
        .events(told.clone())
        .login_timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    let mut client = Client::connect(&server).await;
    assert!(!client.try_password("alice", PASSWORD).await);
    within("the end", client.serving).await.unwrap();
    sleep(Duration::from_secs(4)).await;
    assert_eq!(
        told.names(),
        [
            "server_started",
            "connection_opened",
            "no_login",
            "connection_ended"
        ]
    );
    assert_eq!(told.ends(), ["login_timeout"]);
}

/// A server that shuts down waits for no login.
#[tokio::test]
async fn a_login_that_hangs_does_not_keep_a_server_from_its_end() {
    let auth = async |_: Attempt| pending().await;
    let server = Server::builder(Arc::new(MemoryStore::default()), auth);
    let server = server.build().unwrap();
    let mut client = Client::connect(&server).await;
    tokio::spawn(async move { client.try_password("alice", PASSWORD).await });
    sleep(Duration::from_millis(300)).await;
    let ended = timeout(Duration::from_secs(5), server.shut_down()).await;
    assert!(ended.is_ok(), "it waits for the login");
}

#[tokio::test]
async fn every_login_that_fails_is_told_with_its_reason() {
    let auth = async |attempt: Attempt| match (attempt.user.as_str(), &attempt.proof) {
        // Leads to a signature.
        (_, Proof::OfferedKey(_)) => Login::Accept(Account::new("offered")),
        ("banned", _) => Login::Disconnect,
        ("nameless", _) => Login::Accept(Account::new("")),
        _ => Login::Refuse,
    };
    let told = Told::default();
    let server = Server::builder(Arc::new(MemoryStore::default()), auth);
    let server = server.events(told.clone()).build().unwrap();
    let key = new_key();
    let mut client = Client::connect(&server).await;
    let certificate = certify(&new_key(), &key);
    assert!(!client.try_certificate("alice", &key, certificate).await);
    assert!(!client.try_key("alice", &key).await);
    assert!(!client.try_password("alice", PASSWORD).await);
    assert!(!client.try_password("nameless", PASSWORD).await);
    assert!(!client.try_password("banned", PASSWORD).await);
    within("the end", client.serving).await.unwrap();
    let expected = [
        "certificate wrong",
        "key wrong",
        "password wrong",
        "password invalid_account",
        "password disconnected",
    ];
    assert_eq!(told.refusals(), expected);
}

/// Each tenant has a store, the same home and the same names.
struct Tenants(BTreeMap<&'static str, Arc<MemoryStore>>);

#[async_trait::async_trait]
impl Auth for Tenants {
    async fn login(&self, attempt: Attempt) -> Login {
        let store = self.0.get(attempt.user.as_str()).cloned();
        match (any_user(attempt).await, store) {
            (Login::Accept(account), Some(store)) => {
                Login::Accept(account.home("home").store(store).session(42_u32))
            }
            (login, _) => login,
        }
    }
}

fn tenants() -> (Server, Arc<MemoryStore>, Arc<MemoryStore>) {
    let (red, blue) = (Arc::new(MemoryStore::default()), Arc::default());
    let stores = BTreeMap::from([("red", red.clone()), ("blue", Arc::clone(&blue))]);
    let common = Arc::new(MemoryStore::default());
    let server = Server::builder(common, Tenants(stores)).drain_timeout(Duration::ZERO);
    (server.build().unwrap(), red, blue)
}

#[tokio::test]
async fn accounts_with_stores_of_their_own_see_only_those() {
    let (server, red_store, blue_store) = tenants();
    let red = Client::login(&server, "red").await;
    let (blue, common) = (
        Client::login(&server, "blue").await,
        Client::login(&server, "home").await,
    );
    let (red, blue, common) = (red.sftp().await, blue.sftp().await, common.sftp().await);
    // The same name at once: no upload waits for another one, as the locks are those of a store.
    let handles = [
        open(&red, "/f").await,
        open(&blue, "/f").await,
        open(&common, "/f").await,
    ];
    for (sftp, handle) in [&red, &blue, &common].into_iter().zip(&handles) {
        write(sftp, handle, &vec![7; LARGE]).await;
    }
    assert_eq!((red_store.uploads(), blue_store.uploads()), (1, 1));
    blue.mkdir("/d", FileAttributes::empty()).await.unwrap();
    assert!(red.stat("/d").await.is_err() && common.stat("/d").await.is_err());
    for (sftp, handle) in [&red, &blue, &common].into_iter().zip(handles) {
        sftp.close(handle).await.unwrap();
    }
    put(&red, "/g", b"red").await;
    assert!(blue.stat("/g").await.is_err() && common.stat("/g").await.is_err());
    assert!(get(&blue, "/f").await == [7; LARGE]);
    // Another session of the tenant sees what the first one has made.
    let again = Client::login(&server, "blue").await;
    assert!(again.sftp().await.stat("/d").await.is_ok());
}

#[tokio::test]
async fn uploads_into_an_account_s_store_are_aborted_at_the_end() {
    let (server, red_store, _) = tenants();
    let red = Client::login(&server, "red").await;
    let sftp = red.sftp().await;
    let handle = open(&sftp, "/f").await;
    write(&sftp, &handle, &vec![7; LARGE]).await;
    eventually("a part is sent", || red_store.uploads() == 1).await;
    within("the end", server.shut_down()).await;
    assert_eq!(red_store.uploads(), 0);
}

#[tokio::test]
async fn an_account_s_store_is_dropped_with_its_last_session() {
    let made = Arc::new(std::sync::Mutex::new(Vec::<Weak<dyn Store>>::new()));
    let stores = made.clone();
    let auth = move |attempt: Attempt| {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        stores.lock().unwrap().push(Arc::downgrade(&store));
        async move {
            match any_user(attempt).await {
                Login::Accept(account) => Login::Accept(account.store(store)),
                refused => refused,
            }
        }
    };
    let server = Server::builder(Arc::new(MemoryStore::default()), auth);
    let server = server.build().unwrap();
    let client = Client::login(&server, "alice").await;
    let sftp = client.sftp().await;
    put(&sftp, "/f", b"x").await;
    sleep(Duration::from_millis(1500)).await;
    assert_eq!(get(&sftp, "/f").await, b"x", "it stays for the session");
    drop((sftp, client.ssh));
    within("the end", client.serving).await.unwrap();
    eventually("the store is dropped", || {
        let made = made.lock().unwrap();
        made.iter().all(|store| store.strong_count() == 0)
    })
    .await;
}
