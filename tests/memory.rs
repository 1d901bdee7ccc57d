//! The memory promise of the README, measured on the real binary: peak RSS against the formula.

// A panic is how a test fails.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod support;

use sftpd::server::Shutdown;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use support::s3::{ACCESS_KEY, BUCKET, FakeS3, Fault, SECRET_KEY, When};
use support::*;

/// `sftpd serve` on a bucket of the tests, with a user alice.
struct Process {
    child: Child,
    server: Server,
    _folder: tempfile::TempDir,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    fn start(s3: &FakeS3, args: &[&str]) -> Process {
        let folder = tempfile::tempdir().unwrap();
        let sftpd = || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_sftpd"));
            command.current_dir(folder.path());
            command
        };
        let mut add = sftpd().args(["users", "add", "alice", "--password"]).stdin(Stdio::piped()).spawn().unwrap();
        add.stdin.take().unwrap().write_all(PASSWORD.as_bytes()).unwrap();
        assert!(add.wait().unwrap().success());
        let mut serve = sftpd();
        serve.args(["serve", "--listen", "127.0.0.1:0", "--store", &format!("s3://{BUCKET}")]).args(args);
        serve.env("AWS_ENDPOINT_URL", &s3.endpoint).env("AWS_REGION", "us-east-1").env("RUST_LOG", "sftpd=info");
        serve.env("AWS_ACCESS_KEY_ID", ACCESS_KEY).env("AWS_SECRET_ACCESS_KEY", SECRET_KEY);
        let mut child = serve.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let ready =
            lines.find_map(|line| line.split_once("listening on ").map(|(_, address)| address.parse().unwrap()));
        // Nobody reads its log any more, but it must not fail to write it.
        std::thread::spawn(move || lines.for_each(drop));
        let server = Server { address: ready.unwrap(), shutdown: Shutdown::default(), task: tokio::spawn(async {}) };
        Process { child, server, _folder: folder }
    }

    /// Peak resident memory in MiB.
    fn peak(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() / 1024
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_uploads_stay_inside_the_formula() {
    const UPLOADS: usize = 20;
    let s3 = FakeS3::start().await;
    // A store slow enough that all of the pool is in use.
    s3.fault("UploadPart", When::Every, Fault::Stall(Duration::from_millis(100)));
    let process = Process::start(&s3, &["--buffer-memory", "32MiB"]);
    let data = noise(11 * MIB, 1);
    let mut puts = tokio::task::JoinSet::new();
    for n in 0..UPLOADS {
        let client = process.server.client().await;
        let data = data.clone();
        puts.spawn(async move { client.put(&format!("/{n}"), &data).await.unwrap() });
    }
    puts.join_all().await;
    // 20 of the process, 14 for two password checks, the pool, and each upload's and session's share.
    let promise = 34 + 32 + UPLOADS * 25 / 4 + UPLOADS * 4;
    let peak = process.peak();
    assert!((UPLOADS * 5..=promise).contains(&peak), "{peak} MiB, of {promise}");
    assert_clean(&s3);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_transfer_at_default_settings_is_small() {
    let s3 = FakeS3::start().await;
    let process = Process::start(&s3, &[]);
    let client = process.server.client().await;
    let data = noise(200 * MIB, 1);
    client.put("/f", &data).await.unwrap();
    assert!(client.get("/f").await.unwrap() == data);
    let peak = process.peak();
    assert!(peak < 120, "{peak} MiB");
}
