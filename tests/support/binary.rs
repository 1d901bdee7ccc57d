//! The real binary on the S3 of the tests, for what only a process has: memory, signals, descriptors, an exit status.

use super::*;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;

/// `sftpd serve` on a bucket of the tests, with a user alice. Dropped, it is killed.
pub struct Process {
    pub child: Child,
    pub server: Server,
    log: Arc<Mutex<Vec<String>>>,
    folder: tempfile::TempDir,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the server's log:\n{}", self.log.lock().unwrap().join("\n"));
        }
    }
}

/// A command of the binary on the bucket of the tests, begun in a folder and after a shell command.
pub fn sftpd(setting: &str, s3: &FakeS3, folder: &std::path::Path, command: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.current_dir(folder).args([
        "-c",
        &format!("{setting} && exec \"$0\" \"$@\""),
        env!("CARGO_BIN_EXE_sftpd"),
    ]);
    shell
        .arg(command)
        .env("SFTPD_STORE", format!("s3://{}", s3::BUCKET));
    shell
        .env("AWS_ENDPOINT_URL", &s3.endpoint)
        .env("AWS_REGION", "us-east-1")
        .env("RUST_LOG", "sftpd=info");
    shell
        .env("AWS_ACCESS_KEY_ID", s3::ACCESS_KEY)
        .env("AWS_SECRET_ACCESS_KEY", s3::SECRET_KEY);
    shell
}

impl Process {
    pub fn start(s3: &FakeS3, args: &[&str]) -> Process {
        Process::start_after(":", s3, args)
    }

    /// The server inherits what the shell command has set, as `ulimit` does.
    pub fn start_after(setting: &str, s3: &FakeS3, args: &[&str]) -> Process {
        let folder = tempfile::tempdir().unwrap();
        let mut add = Command::new(env!("CARGO_BIN_EXE_sftpd"));
        add.current_dir(folder.path())
            .args(["users", "add", "alice", "--password"]);
        let mut add = add
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        add.stdin
            .take()
            .unwrap()
            .write_all(PASSWORD.as_bytes())
            .unwrap();
        assert!(add.wait().unwrap().success());
        let mut serve = sftpd(setting, s3, folder.path(), "serve");
        let mut child = serve
            .args(["--listen", "127.0.0.1:0"])
            .args(args)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap())
            .lines()
            .map_while(Result::ok);
        let mut before = Vec::new();
        let ready = lines.find_map(|line| {
            before.push(line);
            before
                .last()?
                .split_once("listening on ")
                .map(|(_, address)| address.parse().unwrap())
        });
        let ready = ready.unwrap_or_else(|| panic!("it does not serve:\n{}", before.join("\n")));
        let log = Arc::new(Mutex::new(before));
        let shared = log.clone();
        std::thread::spawn(move || lines.for_each(|line| shared.lock().unwrap().push(line)));
        Process {
            child,
            server: Server::elsewhere(ready),
            log,
            folder,
        }
    }

    /// Where its users.json is.
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// What follows `text` in the first line of the log that holds it.
    pub fn said(&self, text: &str) -> Option<String> {
        let log = self.log.lock().unwrap();
        log.iter()
            .find_map(|line| line.split_once(text))
            .map(|(_, rest)| rest.to_owned())
    }

    /// Lines of the log that hold `text`.
    pub fn logged(&self, text: &str) -> usize {
        self.log
            .lock()
            .unwrap()
            .iter()
            .filter(|line| line.contains(text))
            .count()
    }

    /// As of `kill`: `TERM`, `KILL`.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-s", name, &pid])
                .status()
                .unwrap()
                .success()
        );
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

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap()
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
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.trim()
            .trim_end_matches(" kB")
            .parse::<usize>()
            .unwrap()
            / 1024
    }

    /// Processor time so far, in ticks of 10 ms.
    pub fn ticks(&self) -> usize {
        let stat = self.proc("stat");
        // The second field, the name, is in parentheses; utime and stime are the 14th and 15th.
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        fields[11..13]
            .iter()
            .map(|ticks| ticks.parse::<usize>().unwrap())
            .sum()
    }
}
