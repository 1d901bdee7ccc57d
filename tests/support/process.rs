//! The real binary: its commands, and `sftpd serve` for what only a process has: memory, signals,
//! descriptors, an exit status.

use super::PASSWORD;
use super::client::Client;
use super::s3::{BUCKET, FakeS3};
use super::wait::{PATIENCE, eventually};
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_sftpd");

/// The binary, run in a folder, without settings of the machine's own: its variables and AWS
/// profiles.
pub fn sftpd(folder: &Path) -> Command {
    isolated(BINARY, folder)
}

/// [`sftpd`] after a shell command whose effects it inherits, as those of `ulimit`.
pub fn sftpd_after(setting: &str, folder: &Path) -> Command {
    let mut shell = isolated("sh", folder);
    shell.args(["-c", &format!("{setting} && exec \"$0\" \"$@\""), BINARY]);
    shell
}

/// [`sftpd`] with the bucket of the tests as its store.
pub fn sftpd_on(s3: &FakeS3, folder: &Path) -> Command {
    let mut command = sftpd(folder);
    use_bucket(&mut command, s3);
    command
}

fn use_bucket(command: &mut Command, s3: &FakeS3) {
    command
        .envs(s3.access().variables())
        .env("SFTPD_STORE", format!("s3://{BUCKET}"));
}

fn isolated(program: &str, folder: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if is_setting(&name) {
            command.env_remove(name);
        }
    }
    command
        .current_dir(folder)
        .env("HOME", folder)
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .stdin(Stdio::null());
    command
}

fn is_setting(variable: &OsStr) -> bool {
    let name = variable.to_string_lossy();
    name.starts_with("AWS_")
        || name.starts_with("SFTPD_")
        || name == "RUST_LOG"
        || name == "JOURNAL_STREAM"
}

/// Adds a user to the users.json of a folder, with a password if there is one.
pub fn add_user(folder: &Path, name: &str, options: &[&str], password: Option<&str>) {
    let mut command = sftpd(folder);
    command.args(["users", "add", name]).args(options);
    if password.is_some() {
        command.arg("--password");
    }
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    let mut adding = command.spawn().expect("sftpd users add");
    let mut stdin = adding.stdin.take().unwrap();
    stdin
        .write_all(password.unwrap_or_default().as_bytes())
        .unwrap();
    drop(stdin);
    assert!(adding.wait().unwrap().success(), "{command:?}");
}

/// `sftpd serve` or `sftpd demo`, ready for connections. Dropped, it is killed.
pub struct Process {
    pub child: Child,
    /// Where it listens.
    pub address: SocketAddr,
    log: Log,
    folder: PathBuf,
    /// The folder, if it was made for this process.
    _own_folder: Option<TempDir>,
}

/// A server that ended before it was ready.
#[derive(Debug)]
pub struct Exited {
    pub status: ExitStatus,
    pub log: String,
}

/// The lines of a server's log.
type Log = Arc<Mutex<Vec<String>>>;

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the server's log:\n{}", self.log());
        }
    }
}

impl Process {
    /// Serves the bucket of the tests to the user alice.
    pub fn start(s3: &FakeS3, args: &[&str]) -> Process {
        Process::start_after(":", s3, args)
    }

    /// [`Process::start`] after a shell command: see [`sftpd_after`].
    pub fn start_after(setting: &str, s3: &FakeS3, args: &[&str]) -> Process {
        let folder = tempfile::tempdir().unwrap();
        add_user(folder.path(), "alice", &[], Some(PASSWORD));
        let mut command = sftpd_after(setting, folder.path());
        use_bucket(&mut command, s3);
        command
            .args(["serve", "--listen", "127.0.0.1:0"])
            .args(args);
        let mut process = Process::spawn(command);
        process._own_folder = Some(folder);
        process
    }

    /// Runs a server until it says where it listens, and panics if it never does.
    pub fn spawn(command: Command) -> Process {
        match Process::try_spawn(command) {
            Ok(process) => process,
            Err(exited) => panic!("it exits with {}:\n{}", exited.status, exited.log),
        }
    }

    /// Runs a server until it says where it listens, or ends. Its log is kept.
    pub fn try_spawn(mut command: Command) -> Result<Process, Exited> {
        let folder = command.get_current_dir().expect("a folder").to_owned();
        let mut child = command.stderr(Stdio::piped()).spawn().expect("sftpd");
        let log = Log::default();
        let ready = keep_log(child.stderr.take().unwrap(), log.clone());
        match ready.recv_timeout(PATIENCE) {
            Ok(address) => Ok(Process {
                child,
                address,
                log,
                folder,
                _own_folder: None,
            }),
            Err(RecvTimeoutError::Disconnected) => Err(Exited {
                status: child.wait().unwrap(),
                log: log.lock().unwrap().join("\n"),
            }),
            Err(RecvTimeoutError::Timeout) => {
                let _ = child.kill();
                panic!("it is not ready:\n{}", log.lock().unwrap().join("\n"));
            }
        }
    }

    /// A client that is logged in as alice.
    pub async fn client(&self) -> Client {
        Client::connect(self.address).await
    }

    /// The folder in which it runs, and where its users.json is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The lines of its log so far.
    pub fn lines(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        self.lines().join("\n")
    }

    /// The first line of the log that holds `text`.
    pub fn line(&self, text: &str) -> Option<String> {
        self.lines().into_iter().find(|line| line.contains(text))
    }

    /// What follows `text` in the first line of the log that holds it.
    pub fn said(&self, text: &str) -> Option<String> {
        let line = self.line(text)?;
        let (_, rest) = line.split_once(text)?;
        Some(rest.to_owned())
    }

    /// How many lines of the log hold `text`.
    pub fn logged(&self, text: &str) -> usize {
        let lines = self.log.lock().unwrap();
        lines.iter().filter(|line| line.contains(text)).count()
    }

    /// Sends a signal, named as for `kill`: `TERM`, `HUP`.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let killed = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(killed.unwrap().success());
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the process ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }

    /// Peak resident memory in MiB.
    pub fn peak(&self) -> usize {
        self.memory("VmHWM:")
    }

    /// Resident memory now, in MiB.
    pub fn resident(&self) -> usize {
        self.memory("VmRSS:")
    }

    /// A line of `/proc/PID/status`, in MiB.
    fn memory(&self, name: &str) -> usize {
        let status = self.proc("status");
        let value = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = value.unwrap().trim().trim_end_matches(" kB");
        kib.parse::<usize>().unwrap() / 1024
    }

    /// Processor time so far, in ticks of 10 ms.
    pub fn ticks(&self) -> usize {
        let stat = self.proc("stat");
        // The second field, the name, is in parentheses; utime and stime are the 14th and 15th.
        let (_, after_name) = stat.rsplit_once(") ").unwrap();
        let fields: Vec<&str> = after_name.split(' ').collect();
        fields[11..13]
            .iter()
            .map(|ticks| ticks.parse::<usize>().unwrap())
            .sum()
    }

    /// The soft limit on open files.
    pub fn max_open_files(&self) -> u64 {
        let limits = self.proc("limits");
        let name = "Max open files";
        let values = limits.lines().find_map(|line| line.strip_prefix(name));
        let soft = values.unwrap().split_whitespace().next().unwrap();
        soft.parse().unwrap()
    }

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap()
    }
}

/// Reads a log to its end, in a thread of its own: the server must not wait for a reader. Sends the
/// address once the server listens.
fn keep_log(stderr: ChildStderr, log: Log) -> mpsc::Receiver<SocketAddr> {
    let (ready, address) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            let listening = listening_address(&line);
            log.lock().unwrap().push(line);
            if let Some(address) = listening {
                let _ = ready.send(address);
            }
        }
    });
    address
}

/// The address in the line that says where the server listens, in text or in JSON.
fn listening_address(line: &str) -> Option<SocketAddr> {
    if let Ok(json) = serde_json::from_str::<serde_json::Value>(line) {
        return match json["event"].as_str() {
            Some("server_started") => json["address"].as_str()?.parse().ok(),
            _ => None,
        };
    }
    let (_, address) = line.split_once("listening on ")?;
    address.parse().ok()
}
