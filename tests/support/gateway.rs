//! The real `sftpd` binary on a bucket of any S3 server, and clients that are commands.
//!
//! The S3 is a [`FakeS3`] of the test's own, or, with `SFTPD_TEST_S3` set to an endpoint (and
//! `SFTPD_TEST_S3_KEY`, `SFTPD_TEST_S3_SECRET`), a new bucket on that server. Tests look into the
//! bucket through the S3 SDK alone, so that both run the same code. These tests are not async: most
//! of what they do is to run commands.

use super::commands::{Ran, are_installed, report_skip};
use super::process::{Process, add_user, sftpd};
use super::s3::{BUCKET, FakeS3, Fault, Request, S3Access, When};
use super::wait::{PATIENCE, POLL};
use super::{MIB, PASSWORD};
use aws_sdk_s3::Client;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Within this time after a client has ended, its uploads have.
const MAX_CLOSE_TIME: Duration = Duration::from_secs(20);
/// Bytes that are read of a [`greeting`].
const MAX_GREETING: u64 = 64 * 1024;
/// The part of the bucket that the server is given.
const PREFIX: &str = "pre";
/// The user most tests log in as: with the key `id_ed25519`, and with [`PASSWORD`].
pub const USER: &str = "alice";
/// What the ssh_config calls the server.
pub const HOST: &str = "sftpd";
/// The size of a file of several parts.
pub const LARGE: usize = 12 * MIB + 345;

/// How S3 servers are known to differ from S3, by a word of their [`greeting`]; tests ask with
/// [`Gateway::has`].
///
/// SeaweedFS keeps objects in a file system, with its rules for names and directories.
const DEVIATIONS: &[(&str, Deviation)] = &[
    ("SeaweedFS", Deviation::NoFileBesideDirectory),
    ("SeaweedFS", Deviation::EmptyPrefixesLinger),
    ("SeaweedFS", Deviation::NoBackslash),
    ("SeaweedFS", Deviation::NoLongNames),
    // moto's.
    ("Werkzeug", Deviation::NoLineFeed),
    // LMDB's, below it.
    ("Garage", Deviation::NoLongKeys),
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
    /// A key has room for less than 511 bytes.
    NoLongKeys,
    /// A key with a line feed is refused.
    NoLineFeed,
}

/// A file's bytes, which a failed assertion does not print by the million.
#[derive(Clone, PartialEq, Eq)]
pub struct Content(pub Bytes);

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
        Content(Bytes::copy_from_slice(bytes.as_ref()))
    }
}

/// Files by their paths below some directory.
pub type Files = BTreeMap<String, Content>;

/// A server, its bucket, and a directory for the test's files.
pub struct Gateway {
    runtime: Runtime,
    /// `None` if another S3 server is tested.
    fake: Option<FakeS3>,
    s3: Client,
    bucket: String,
    /// Of the S3 server.
    access: S3Access,
    /// The [`greeting`] of the S3 server.
    kind: String,
    server: Process,
    /// Where clients connect to: the server, or what stands before it.
    pub port: u16,
    dir: TempDir,
}

impl Gateway {
    /// `None`, with the reason printed, if a client isn't installed: see [`are_installed`].
    pub fn start(clients: &[&str]) -> Option<Gateway> {
        Gateway::start_with(clients, &[])
    }

    /// [`Gateway::start`] with more arguments for `sftpd serve`.
    pub fn start_with(clients: &[&str], args: &[&str]) -> Option<Gateway> {
        if !are_installed(&[&["ssh-keygen"], clients].concat()) {
            return None;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (fake, access) = match std::env::var("SFTPD_TEST_S3") {
            Ok(endpoint) => (None, S3Access::from_variables(endpoint)),
            Err(_) => {
                let fake = runtime.block_on(FakeS3::start());
                let access = fake.access();
                (Some(fake), access)
            }
        };
        let s3 = Client::from_conf(access.sdk_config().build());
        let (bucket, kind) = match &fake {
            Some(_) => (BUCKET.to_owned(), String::new()),
            None => (
                runtime.block_on(new_bucket(&s3)),
                greeting(&access.endpoint),
            ),
        };
        let dir = tempfile::tempdir().unwrap();
        for directory in ["work", "server", "home/.ssh"] {
            fs::create_dir_all(dir.path().join(directory)).unwrap();
        }
        make_key(dir.path(), "id_ed25519", &["-t", "ed25519"]);
        let key = public_key(dir.path(), "id_ed25519");
        add_user(&server_folder(&dir), USER, &[&key], Some(PASSWORD));
        let server = serve(&server_folder(&dir), &bucket, &access, args);
        let gateway = Gateway {
            runtime,
            fake,
            s3,
            bucket,
            access,
            kind,
            port: server.address.port(),
            server,
            dir,
        };
        gateway.configure_ssh();
        Some(gateway)
    }

    /// Makes requests of this operation take that long from now on. False if S3 is not the one of
    /// the tests.
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
    pub fn another(&self, args: &[&str]) -> Process {
        serve(&server_folder(&self.dir), &self.bucket, &self.access, args)
    }

    /// Whether the S3 server is known for this.
    pub fn has(&self, deviation: Deviation) -> bool {
        DEVIATIONS
            .iter()
            .any(|(server, known)| self.kind.contains(server) && *known == deviation)
    }

    /// Writes the configuration of SSH clients: they connect to [`Gateway::port`].
    pub fn configure_ssh(&self) {
        // The key first that clients prefer: see `fingerprint`.
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

    /// The file for `-F`: host, port, keys, user.
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
        server_folder(&self.dir).join("host_keys")
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
        let key = public_key(self.dir.path(), "id_ed25519");
        let options = [&key, "--home", USER, "--access", access];
        add_user(&server_folder(&self.dir), name, &options, None);
    }

    /// Makes a key that [`USER`] can log in with.
    pub fn add_key(&self, name: &str, kind: &[&str]) -> PathBuf {
        make_key(self.dir.path(), name, kind);
        let key = public_key(self.dir.path(), name);
        add_user(&server_folder(&self.dir), USER, &[&key], None);
        self.dir.path().join(name)
    }

    /// All that the server has logged.
    pub fn log(&self) -> String {
        self.server.log()
    }

    /// What the server has logged behind `text`.
    pub fn said(&self, text: &str) -> Option<String> {
        self.server.said(text)
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
        match fs::read(&path) {
            Ok(bytes) => Content(bytes.into()),
            Err(error) => panic!("{}: {error}", path.display()),
        }
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
                    files.insert(name.to_owned(), Content(fs::read(&path).unwrap().into()));
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
                Ok(object) => {
                    let body = object.body.collect().await.expect("a body");
                    Some(Content(body.into_bytes()))
                }
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

    /// Waits until an object has these bytes: some clients end before the server has answered their
    /// CLOSE.
    pub fn expect_object(&self, path: &str, content: impl Into<Content>) {
        let content = content.into();
        let deadline = Instant::now() + MAX_CLOSE_TIME;
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

    /// Aborts uploads that never got a part, as a lifecycle rule of the bucket does: no server can
    /// tell whose they are.
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
                // Other uploads may have ended meanwhile.
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

    /// Makes multipart uploads in progress that old. False if S3 is not the one of the tests, which
    /// alone can do that.
    pub fn age_uploads(&self, age: Duration) -> bool {
        match &self.fake {
            Some(fake) => fake.age_uploads(age),
            None => report_skip("no server makes uploads older than they are"),
        }
        self.fake.is_some()
    }

    /// The keys of multipart uploads in progress, which a client that vanished must not leave
    /// behind.
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

    /// The S3 requests of the server since the last call. `None` if S3 is not the one of the tests,
    /// which alone logs them.
    pub fn requests(&self) -> Option<Vec<Request>> {
        let fake = self.fake.as_ref()?;
        let requests = fake.requests();
        fake.reset();
        Some(requests)
    }
}

/// Commands: run where the test's files are, with a home directory that knows the server's host
/// key.
impl Gateway {
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.path(""))
            .env("HOME", self.dir.path().join("home"));
        command
    }

    /// lftp with these commands, connected as [`USER`].
    pub fn lftp(&self, commands: &str) -> Command {
        let connect = format!("ssh -a -x -F {}", self.ssh_config().display());
        let script = format!(
            "set cmd:fail-exit yes; set net:max-retries 2; set sftp:connect-program \"{connect}\"; \
             open sftp://{USER}:unused@{HOST}; {commands}"
        );
        let mut command = self.command("lftp");
        command.args(["-c", &script]);
        command
    }

    /// rclone, for which `:sftp:` is the server and the user [`USER`].
    pub fn rclone(&self) -> Command {
        let config = self.dir.path().join("home/rclone.conf");
        fs::write(&config, "").unwrap();
        let mut command = self.command("rclone");
        command
            .env("RCLONE_CONFIG", config)
            .env("RCLONE_SFTP_HOST", "127.0.0.1")
            .env("RCLONE_SFTP_PORT", self.port.to_string())
            .env("RCLONE_SFTP_USER", USER)
            .env("RCLONE_SFTP_KEY_FILE", self.key())
            .env("RCLONE_SFTP_KNOWN_HOSTS_FILE", self.known_hosts());
        command
    }

    /// A script for python3, whose `sys.argv[1:]` are: port, known_hosts, key, and `args`.
    pub fn python(&self, script: &str, args: &[&str]) -> Command {
        // Not `command`: the interpreter may look for its modules in the home directory.
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

    /// [`Gateway::run`] with a standard input.
    pub fn feed(&self, command: &mut Command, input: &str) -> String {
        let ran = Ran::new(command, input);
        assert!(ran.succeeded(), "should have succeeded:\n{ran}");
        ran.stdout
    }

    /// Runs a command that must fail, and not by hanging; all that it said.
    pub fn refused(&self, command: &mut Command) -> String {
        let ran = Ran::new(command, "");
        assert!(ran.failed(), "should have failed:\n{ran}");
        ran.stdout + &ran.stderr
    }
}

impl Drop for Gateway {
    /// Ends every test with this check: the server still runs, and no half-sent file is left.
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let deadline = Instant::now() + MAX_CLOSE_TIME;
        let mut left = self.uploads();
        while !left.is_empty() && Instant::now() < deadline {
            std::thread::sleep(POLL);
            left = self.uploads();
        }
        let died = self.server.child.try_wait().unwrap();
        assert!(died.is_none(), "the server died: {died:?}");
        assert!(left.is_empty(), "multipart uploads in progress: {left:?}");
    }
}

/// Makes a bucket. It is not removed: a test server is thrown away as a whole.
pub async fn new_bucket(s3: &Client) -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let name = format!("sftpd-{}-{}-{number}", now.as_millis(), std::process::id());
    s3.create_bucket()
        .bucket(&name)
        .send()
        .await
        .expect("CreateBucket");
    name
}

/// The answer to a request that anybody could send. Its `Server` header tells which S3 server it is,
/// or else its words.
fn greeting(endpoint: &str) -> String {
    let address = endpoint.trim_start_matches("http://").trim_end_matches('/');
    let mut stream = TcpStream::connect(address).expect("SFTPD_TEST_S3 is an address that answers");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = Vec::new();
    // A server may keep the connection in spite of the request.
    let _ = stream.take(MAX_GREETING).read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// The path of a client's source, or of a script.
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/clients")
        .join(name)
}

fn server_folder(dir: &TempDir) -> PathBuf {
    dir.path().join("server")
}

fn make_key(dir: &Path, name: &str, kind: &[&str]) {
    let mut make = Command::new("ssh-keygen");
    make.args(["-q", "-N", "", "-C", name, "-f"])
        .arg(dir.join(name))
        .args(kind)
        .stdin(Stdio::null());
    assert!(make.status().expect("ssh-keygen").success(), "{make:?}");
}

fn public_key(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join(name).with_extension("pub")).unwrap()
}

fn serve(folder: &Path, bucket: &str, access: &S3Access, args: &[&str]) -> Process {
    let store = format!("s3://{bucket}/{PREFIX}");
    let mut command = sftpd(folder);
    command
        .args(["serve", "--listen", "127.0.0.1:0", "--store", &store])
        .args(args)
        .envs(access.variables());
    Process::spawn(command)
}
