//! The real `sftpd` binary in front of a real S3 wire, and the commands that clients are.
//!
//! The S3 is a [`FakeS3`] of the test's own, or, with `SFTPD_TEST_S3` set to an endpoint (and
//! `SFTPD_TEST_S3_KEY`, `SFTPD_TEST_S3_SECRET`), a new bucket on that server. Tests look into the
//! bucket through the S3 SDK alone, so that both run the same code.

// Every test binary compiles this file and may use only a part of it.
#![allow(dead_code)]
// A panic is how a test fails.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use crate::s3::{ACCESS_KEY, BUCKET, FakeS3, Fault, Request, SECRET_KEY, When};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Nothing here takes this long unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at something that is about to change.
const POLL: Duration = Duration::from_millis(10);
/// The part of the bucket that the server is given.
const PREFIX: &str = "pre";
/// The user most tests log in as: with the key `id_ed25519`, and with [`PASSWORD`].
pub const USER: &str = "alice";
pub const PASSWORD: &str = "correct horse";
/// What the ssh_config calls the server.
pub const HOST: &str = "sftpd";

/// Where servers are known not to be S3, found by their `Server` header; tests ask with [`Gateway::has`].
///
/// SeaweedFS keeps objects in a file system, with its rules for names and directories.
const DEVIATIONS: &[(&str, Deviation)] = &[
    ("SeaweedFS", Deviation::NoFileBesideDirectory),
    ("SeaweedFS", Deviation::EmptyPrefixesLinger),
    ("SeaweedFS", Deviation::NoBackslash),
    ("SeaweedFS", Deviation::NoLongNames),
    // moto's.
    ("Werkzeug", Deviation::NoLineFeed),
];

/// See [`DEVIATIONS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deviation {
    /// The keys `a` and `a/b` exclude each other.
    NoFileBesideDirectory,
    /// For a while after its last key went, a prefix is still listed.
    EmptyPrefixesLinger,
    /// A backslash is taken for a slash.
    NoBackslash,
    /// Between two slashes of a key there is room for 255 bytes.
    NoLongNames,
    /// A key with a line feed is refused.
    NoLineFeed,
}

/// A file's bytes, which a failed assertion does not print by the million.
#[derive(Clone, PartialEq, Eq)]
pub struct Content(pub Vec<u8>);

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let begin = &self.0[..self.0.len().min(24)];
        let sum = self.0.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        write!(
            f,
            "{} bytes, {:?}…, sum {sum:x}",
            self.0.len(),
            String::from_utf8_lossy(begin)
        )
    }
}

impl<T: AsRef<[u8]>> From<T> for Content {
    fn from(bytes: T) -> Content {
        Content(bytes.as_ref().to_vec())
    }
}

/// Files by their paths below some directory.
pub type Files = BTreeMap<String, Content>;

/// Bytes without a pattern that a misplaced block could hide in.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Looks again and again until there is something to see, and panics when nothing comes.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(
            Instant::now() < deadline,
            "in {PATIENCE:?} this did not happen: {what}"
        );
        std::thread::sleep(POLL);
    }
}

/// A server, its bucket, and a directory for the test's files.
pub struct Gateway {
    runtime: Runtime,
    fake: Option<FakeS3>,
    s3: Client,
    bucket: String,
    /// Of the S3 server: its address, access key and secret key.
    access: [String; 3],
    /// As the S3 server names itself.
    kind: String,
    server: Child,
    log: Arc<Mutex<String>>,
    pub port: u16,
    dir: TempDir,
}

impl Gateway {
    /// `None`, with the reason printed, when a client isn't installed. With `SFTPD_TEST_ALL_CLIENTS=1`
    /// that is a failure.
    ///
    /// A client is a command, the path of a file, `python3:MODULE`, `ruby:LIBRARY`, `node:MODULE`, or `curl:sftp`.
    pub fn start(clients: &[&str]) -> Option<Gateway> {
        Gateway::start_with(clients, &[])
    }

    /// With more arguments for `sftpd serve`.
    pub fn start_with(clients: &[&str], args: &[&str]) -> Option<Gateway> {
        let missing: Vec<_> = ["ssh-keygen"]
            .iter()
            .chain(clients)
            .filter(|client| !is_installed(client))
            .collect();
        if !missing.is_empty() {
            let needed = std::env::var("SFTPD_TEST_ALL_CLIENTS").is_ok_and(|value| value == "1");
            assert!(!needed, "not installed: {missing:?}");
            eprintln!("skipped: not installed: {missing:?}");
            return None;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let fake = std::env::var_os("SFTPD_TEST_S3")
            .is_none()
            .then(|| runtime.block_on(FakeS3::start()));
        let access = match &fake {
            Some(fake) => [
                fake.endpoint.clone(),
                ACCESS_KEY.to_owned(),
                SECRET_KEY.to_owned(),
            ],
            None => ["SFTPD_TEST_S3", "SFTPD_TEST_S3_KEY", "SFTPD_TEST_S3_SECRET"].map(variable),
        };
        let s3 = client(&access);
        let bucket = match &fake {
            Some(_) => BUCKET.to_owned(),
            None => runtime.block_on(new_bucket(&s3)),
        };
        let kind = if fake.is_some() {
            String::new()
        } else {
            server_header(&access[0])
        };
        let dir = tempfile::tempdir().unwrap();
        for directory in ["work", "server", "home/.ssh"] {
            fs::create_dir_all(dir.path().join(directory)).unwrap();
        }
        make_key(dir.path(), "id_ed25519", &["-t", "ed25519"]);
        add_user(dir.path(), USER, Some("id_ed25519"), Some(PASSWORD), &[]);
        let (server, log, port) = serve(dir.path(), &bucket, &access, args);
        let gateway = Gateway {
            runtime,
            fake,
            s3,
            bucket,
            access,
            kind,
            server,
            log,
            port,
            dir,
        };
        gateway.configure_ssh();
        Some(gateway)
    }

    /// From now on requests of this operation take that long. False where S3 is not the one of the tests.
    pub fn stall(&self, operation: &str, time: Duration) -> bool {
        match &self.fake {
            Some(fake) => {
                fake.fault(operation, When::Every, Fault::Stall(time));
                true
            }
            None => false,
        }
    }

    /// One more server on the same bucket, with the same users and host keys.
    pub fn another(&self, args: &[&str]) -> Another {
        let (server, log, port) = serve(self.dir.path(), &self.bucket, &self.access, args);
        Another { server, log, port }
    }

    /// Is the S3 server known for this?
    pub fn has(&self, deviation: Deviation) -> bool {
        DEVIATIONS
            .iter()
            .any(|(server, known)| self.kind.contains(server) && *known == deviation)
    }

    /// Clients connect to [`Gateway::port`].
    pub fn configure_ssh(&self) {
        // The one first that clients prefer: see `fingerprint`.
        let public = ["ed25519", "ecdsa", "rsa"].map(|kind| {
            let public =
                fs::read_to_string(self.host_keys().join(format!("ssh_host_{kind}_key.pub")))
                    .unwrap();
            format!("[127.0.0.1]:{} {public}", self.port)
        });
        let hosts = public.concat();
        fs::write(self.known_hosts(), hosts).unwrap();
        let config = format!(
            "Host {HOST}\n HostName 127.0.0.1\n Port {}\n User {USER}\n UserKnownHostsFile {}\n IdentityFile {}\n \
             GlobalKnownHostsFile /dev/null\n StrictHostKeyChecking yes\n IdentitiesOnly yes\n BatchMode yes\n \
             LogLevel ERROR\n",
            self.port,
            self.known_hosts().display(),
            self.key().display()
        );
        fs::write(self.ssh_config(), config).unwrap();
    }

    /// For `-F`: host, port, keys, user.
    pub fn ssh_config(&self) -> PathBuf {
        self.dir.path().join("home/.ssh/config")
    }

    pub fn known_hosts(&self) -> PathBuf {
        self.dir.path().join("home/.ssh/known_hosts")
    }

    /// The private key of [`USER`].
    pub fn key(&self) -> PathBuf {
        self.dir.path().join("id_ed25519")
    }

    /// The directory of the server's host keys.
    pub fn host_keys(&self) -> PathBuf {
        self.dir.path().join("server/host_keys")
    }

    /// The ed25519 host key as `SHA256:…`.
    pub fn fingerprint(&self) -> String {
        let line = self.run(
            self.command("ssh-keygen")
                .arg("-lf")
                .arg(self.known_hosts()),
        );
        line.split(' ').nth(1).expect("a fingerprint").to_owned()
    }

    /// Adds a user to the running server, in the home of [`USER`].
    pub fn add_user(&self, name: &str, access: &str) {
        add_user(
            self.dir.path(),
            name,
            Some("id_ed25519"),
            None,
            &["--home", USER, "--access", access],
        );
    }

    /// Makes a key and lets [`USER`] in with it.
    pub fn add_key(&self, name: &str, kind: &[&str]) -> PathBuf {
        make_key(self.dir.path(), name, kind);
        add_user(self.dir.path(), USER, Some(name), None, &[]);
        self.dir.path().join(name)
    }

    /// All that the server has logged.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }
}

/// The test's files, below the directory in which its commands run.
impl Gateway {
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("work").join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    pub fn write_all(&self, directory: &str, files: &Files) {
        for (name, content) in files {
            self.write(&format!("{directory}/{name}"), &content.0);
        }
    }

    pub fn read(&self, name: &str) -> Content {
        let path = self.path(name);
        Content(fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    pub fn read_all(&self, directory: &str) -> Files {
        let mut files = Files::new();
        let mut pending = vec![self.path(directory)];
        while let Some(directory_path) = pending.pop() {
            let entries = fs::read_dir(&directory_path);
            for entry in
                entries.unwrap_or_else(|error| panic!("{}: {error}", directory_path.display()))
            {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    pending.push(path);
                } else {
                    let name = path
                        .strip_prefix(self.path(directory))
                        .unwrap()
                        .to_str()
                        .expect("UTF-8");
                    files.insert(name.to_owned(), Content(fs::read(&path).unwrap()));
                }
            }
        }
        files
    }
}

/// What is in the bucket, by the paths that [`USER`] sees.
impl Gateway {
    fn full_key(path: &str) -> String {
        format!("{PREFIX}/{USER}/{path}")
    }

    pub fn object(&self, path: &str) -> Option<Content> {
        self.runtime.block_on(async {
            let got = self
                .s3
                .get_object()
                .bucket(&self.bucket)
                .key(Self::full_key(path))
                .send()
                .await;
            match got {
                Ok(object) => Some(Content(
                    object.body.collect().await.expect("a body").to_vec(),
                )),
                Err(error)
                    if error
                        .raw_response()
                        .is_some_and(|answer| answer.status().as_u16() == 404) =>
                {
                    None
                }
                Err(error) => panic!("GET {path}: {error:?}"),
            }
        })
    }

    pub fn put_object(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let put = self
            .s3
            .put_object()
            .bucket(&self.bucket)
            .key(Self::full_key(path));
        self.runtime
            .block_on(put.body(bytes.as_ref().to_vec().into()).send())
            .expect("PUT");
    }

    pub fn remove_object(&self, path: &str) {
        let delete = self
            .s3
            .delete_object()
            .bucket(&self.bucket)
            .key(Self::full_key(path));
        self.runtime.block_on(delete.send()).expect("DELETE");
    }

    /// Every key in the bucket; those outside of the user's home as they are.
    pub fn keys(&self) -> Vec<String> {
        let mut pages = self
            .s3
            .list_objects_v2()
            .bucket(&self.bucket)
            .into_paginator()
            .send();
        let mut keys = Vec::new();
        self.runtime.block_on(async {
            while let Some(page) = pages.next().await {
                keys.extend(
                    page.expect("LIST")
                        .contents
                        .unwrap_or_default()
                        .into_iter()
                        .filter_map(|found| found.key),
                );
            }
        });
        let home = Self::full_key("");
        keys.into_iter()
            .map(|key| key.strip_prefix(&home).unwrap_or(&key).to_owned())
            .collect()
    }

    /// Every object below a path that ends with a slash, or below none.
    pub fn objects(&self, below: &str) -> Files {
        let keys = self.keys().into_iter().filter(|key| key.starts_with(below));
        let get = |key: String| {
            let content = self.object(&key).expect("was listed");
            (key[below.len()..].to_owned(), content)
        };
        keys.map(get).collect()
    }

    /// The object once its bytes are these. Some clients end before the server has answered their CLOSE.
    pub fn expect_object(&self, path: &str, content: impl Into<Content>) {
        let (content, deadline) = (content.into(), Instant::now() + Duration::from_secs(20));
        loop {
            let found = self.object(path);
            if found.as_ref() == Some(&content) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{path:?} should be {content:?}, but is {found:?}"
            );
            std::thread::sleep(POLL);
        }
    }

    /// What the bucket's lifecycle rule is for: uploads that never got a part, which no server can tell from others'.
    pub fn expire_empty_uploads(&self) {
        self.runtime.block_on(async {
            let all = self
                .s3
                .list_multipart_uploads()
                .bucket(&self.bucket)
                .send()
                .await
                .expect("ListMultipartUploads");
            for upload in all.uploads() {
                let (key, id) = (upload.key().unwrap(), upload.upload_id().unwrap());
                let parts = self
                    .s3
                    .list_parts()
                    .bucket(&self.bucket)
                    .key(key)
                    .upload_id(id)
                    .send()
                    .await;
                // Another one may have ended meanwhile.
                if parts.is_ok_and(|found| found.parts().is_empty()) {
                    let _ = self
                        .s3
                        .abort_multipart_upload()
                        .bucket(&self.bucket)
                        .key(key)
                        .upload_id(id)
                        .send()
                        .await;
                }
            }
        });
    }

    /// Makes multipart uploads in progress that old, which the fake alone can do; else false.
    pub fn age_uploads(&self, age: Duration) -> bool {
        match &self.fake {
            Some(fake) => fake.age_uploads(age),
            None => eprintln!("skipped: no server makes uploads older than they are"),
        }
        self.fake.is_some()
    }

    /// Keys of multipart uploads in progress: what a client that vanished must not leave behind.
    pub fn uploads(&self) -> Vec<String> {
        let list = self.s3.list_multipart_uploads().bucket(&self.bucket);
        let uploads = self
            .runtime
            .block_on(list.send())
            .expect("ListMultipartUploads")
            .uploads
            .unwrap_or_default();
        uploads
            .into_iter()
            .filter_map(|upload| upload.key)
            .collect()
    }

    /// The S3 requests of the server since the last call. Other servers than the fake keep no log.
    pub fn requests(&self) -> Option<Vec<Request>> {
        let fake = self.fake.as_ref()?;
        let requests = fake.requests();
        fake.reset();
        Some(requests)
    }
}

/// Commands: run where the test's files are, with a home directory that knows the server's host key.
impl Gateway {
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.path(""))
            .env("HOME", self.dir.path().join("home"));
        command
    }

    /// A script for python3, whose `sys.argv[1:]` are: port, known_hosts, key, and `args`.
    pub fn python(&self, script: &str, args: &[&str]) -> Command {
        // Not `command`: the interpreter may be one that looks for itself in the home directory.
        let mut command = Command::new("python3");
        command
            .current_dir(self.path(""))
            .args(["-c", script, &self.port.to_string()]);
        command.arg(self.known_hosts()).arg(self.key()).args(args);
        command
    }

    /// Runs a command that must succeed; its standard output.
    pub fn run(&self, command: &mut Command) -> String {
        self.feed(command, "")
    }

    /// The same with standard input.
    pub fn feed(&self, command: &mut Command, input: &str) -> String {
        let ran = self.try_run(command, input);
        assert!(
            ran.status.is_some_and(|status| status.success()),
            "should have succeeded:\n{ran}"
        );
        ran.stdout
    }

    /// Runs a command that must fail, and not by hanging; all that it said.
    pub fn refused(&self, command: &mut Command) -> String {
        let ran = self.try_run(command, "");
        assert!(
            ran.status.is_some_and(|status| !status.success()),
            "should have failed:\n{ran}"
        );
        ran.stdout + &ran.stderr
    }

    fn try_run(&self, command: &mut Command, input: &str) -> Ran {
        let mut stdin = tempfile::tempfile().unwrap();
        stdin.write_all(input.as_bytes()).unwrap();
        stdin.rewind().unwrap();
        let output = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
        let [stdout, stderr] = output.each_ref().map(|file| file.try_clone().unwrap());
        command.stdin(stdin).stdout(stdout).stderr(stderr);
        let mut running = Running::spawn(command);
        let began = Instant::now();
        let status = loop {
            match running.0.try_wait().unwrap() {
                None if began.elapsed() < PATIENCE => std::thread::sleep(POLL),
                status => break status,
            }
        };
        drop(running);
        let [stdout, stderr] = output.map(|mut file| {
            let mut bytes = Vec::new();
            file.rewind()
                .and_then(|()| file.read_to_end(&mut bytes))
                .unwrap();
            String::from_utf8_lossy(&bytes).into_owned()
        });
        Ran {
            command: shown(command),
            status,
            stdout,
            stderr,
        }
    }
}

impl Drop for Gateway {
    /// Every test ends with this: nothing half-sent is left.
    fn drop(&mut self) {
        let left = if std::thread::panicking() {
            Vec::new()
        } else {
            let deadline = Instant::now() + Duration::from_secs(20);
            loop {
                let left = self.uploads();
                if left.is_empty() || Instant::now() > deadline {
                    break left;
                }
                std::thread::sleep(POLL);
            }
        };
        let died = self.server.try_wait().unwrap();
        let _ = self.server.kill();
        let _ = self.server.wait();
        if std::thread::panicking() {
            eprintln!("the server's log:\n{}", self.log());
            return;
        }
        assert!(died.is_none(), "the server died: {died:?}\n{}", self.log());
        assert!(
            left.is_empty(),
            "multipart uploads left in progress: {left:?}\n{}",
            self.log()
        );
    }
}

/// See [`Gateway::another`]. Dropped, it is killed.
pub struct Another {
    server: Child,
    log: Arc<Mutex<String>>,
    pub port: u16,
}

impl Another {
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }
}

impl Drop for Another {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        if std::thread::panicking() {
            eprintln!("another server's log:\n{}", self.log());
        }
    }
}

/// As one would type it, scripts on their own lines.
fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    words.join(" ")
}

/// What became of a command: `Display` is the whole situation, for the one who has to find the mistake.
struct Ran {
    command: String,
    /// `None` when it had to be killed.
    status: Option<ExitStatus>,
    stdout: String,
    stderr: String,
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = self.status.map_or_else(
            || format!("killed after {PATIENCE:?}"),
            |status| status.to_string(),
        );
        write!(
            f,
            "{}\n{status}\n-- stdout\n{}\n-- stderr\n{}",
            self.command, self.stdout, self.stderr
        )
    }
}

/// A command and its children (`sftp` starts an `ssh`): a process group, killed when dropped before its end.
pub struct Running(pub Child);

impl Running {
    pub fn spawn(command: &mut Command) -> Running {
        let child = command.process_group(0).spawn();
        Running(child.unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // What a command leaves running on purpose, as sshfs does, is not ours to end.
        if self.0.try_wait().is_ok_and(|status| status.is_some()) {
            return;
        }
        let group = format!("-{}", self.0.id());
        let _ = Command::new("kill")
            .args(["-KILL", "--", &group])
            .stderr(Stdio::null())
            .status();
        let _ = self.0.wait();
    }
}

fn is_installed(client: &str) -> bool {
    let succeeds = |program: &str, args: &[&str]| {
        let output = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .output();
        output.ok().filter(|output| output.status.success())
    };
    match client.split_once(':') {
        Some(("python3", module)) => {
            succeeds("python3", &["-c", &format!("import {module}")]).is_some()
        }
        Some(("node", module)) => succeeds("node", &["-r", module, "-e", ""]).is_some(),
        Some(("ruby", library)) => succeeds("ruby", &["-r", library, "-e", ""]).is_some(),
        Some((program, feature)) => succeeds(program, &["--version"])
            .is_some_and(|output| String::from_utf8_lossy(&output.stdout).contains(feature)),
        None => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&path).any(|directory| directory.join(client).is_file())
        }
    }
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set, though SFTPD_TEST_S3 is"))
}

fn client([endpoint, access_key, secret_key]: &[String; 3]) -> Client {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .endpoint_url(endpoint)
        .region(Region::from_static("us-east-1"))
        .credentials_provider(Credentials::new(access_key, secret_key, None, None, "test"))
        .force_path_style(true)
        .build();
    Client::from_conf(config)
}

/// Stays behind: a test server is thrown away as a whole.
async fn new_bucket(s3: &Client) -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let (number, now) = (
        NUMBER.fetch_add(1, Ordering::Relaxed),
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap(),
    );
    let name = format!("sftpd-{}-{}-{number}", now.as_millis(), std::process::id());
    s3.create_bucket()
        .bucket(&name)
        .send()
        .await
        .expect("CreateBucket");
    name
}

/// The `Server` header: the only word on which S3 server it is.
fn server_header(endpoint: &str) -> String {
    let address = endpoint.trim_start_matches("http://").trim_end_matches('/');
    let mut stream = TcpStream::connect(address).expect("SFTPD_TEST_S3 is an address that answers");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    let found = lines
        .take_while(|line| !line.is_empty())
        .find(|line| line.to_lowercase().starts_with("server:"));
    found.unwrap_or_default()
}

fn sftpd(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sftpd"));
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("AWS_") || name.starts_with("SFTPD_"))
        {
            command.env_remove(name);
        }
    }
    // An operator's own AWS profile must not get in.
    command
        .current_dir(dir.join("server"))
        .env("HOME", dir.join("home"))
        .env_remove("RUST_LOG");
    command
}

fn users_file(dir: &Path) -> PathBuf {
    dir.join("server/users.json")
}

fn make_key(dir: &Path, name: &str, kind: &[&str]) {
    let mut make = Command::new("ssh-keygen");
    make.args(["-q", "-N", "", "-C", name, "-f"])
        .arg(dir.join(name))
        .args(kind)
        .stdin(Stdio::null());
    assert!(make.status().expect("ssh-keygen").success(), "{make:?}");
}

fn add_user(dir: &Path, name: &str, key: Option<&str>, password: Option<&str>, options: &[&str]) {
    let mut command = sftpd(dir);
    command
        .args(["users", "add", name])
        .arg("--users")
        .arg(users_file(dir))
        .args(options);
    if let Some(key) = key {
        command.arg(fs::read_to_string(dir.join(key).with_extension("pub")).unwrap());
    }
    if password.is_some() {
        command.arg("--password");
    }
    let mut adding = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("sftpd users add");
    let mut stdin = adding.stdin.take().unwrap();
    if let Some(password) = password {
        writeln!(stdin, "{password}").unwrap();
    }
    drop(stdin);
    assert!(adding.wait().unwrap().success(), "{command:?}");
}

/// Starts a server and waits until it says where it listens. Its log is kept.
fn serve(
    dir: &Path,
    bucket: &str,
    access: &[String; 3],
    args: &[&str],
) -> (Child, Arc<Mutex<String>>, u16) {
    let mut command = sftpd(dir);
    command.args([
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--store",
        &format!("s3://{bucket}/{PREFIX}"),
    ]);
    command
        .arg("--users")
        .arg(users_file(dir))
        .arg("--host-keys")
        .arg(dir.join("server/host_keys"))
        .args(args);
    command
        .env("AWS_ENDPOINT_URL", &access[0])
        .env("AWS_REGION", "us-east-1");
    command
        .env("AWS_ACCESS_KEY_ID", &access[1])
        .env("AWS_SECRET_ACCESS_KEY", &access[2]);
    let mut server = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("sftpd serve");
    let (log, stderr) = (
        Arc::new(Mutex::new(String::new())),
        server.stderr.take().unwrap(),
    );
    let (ready, port) = mpsc::channel();
    let shared = log.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            if let Some((_, port)) = line.split_once("listening on 127.0.0.1:") {
                let _ = ready.send(port.trim().parse().expect("a port"));
            }
            let mut log = shared.lock().unwrap();
            log.push_str(&line);
            log.push('\n');
        }
    });
    match port.recv_timeout(PATIENCE) {
        Ok(port) => (server, log, port),
        Err(error) => {
            let _ = server.kill();
            panic!(
                "sftpd is not ready: {error}; its log:\n{}",
                log.lock().unwrap()
            )
        }
    }
}
