//! Programs whose server shuts down in the middle of their upload: they are told the truth about it,
//! and end as usual.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use bytes::Bytes;
use std::process::Command;
use std::thread;
use std::time::Duration;
use support::commands::Ran;
use support::gateway::{Gateway, HOST, LARGE};
use support::noise;
use support::process::Process;
use support::wait::wait_until;

/// How long the store takes for each part, and for the end of an upload.
const STORE_TIME: Duration = Duration::from_secs(1);

/// A gateway to which clients connect, and the server behind it, which a test may end. Its store is
/// slow.
struct Ending {
    gateway: Gateway,
    server: Process,
    bytes: Bytes,
}

impl Ending {
    /// `None` if a client isn't installed, or the store can't be made slow.
    fn start(clients: &[&str]) -> Option<Ending> {
        let mut gateway = Gateway::start(clients)?;
        for operation in ["UploadPart", "CompleteMultipartUpload"] {
            if !gateway.stall(operation, STORE_TIME) {
                eprintln!("skipped: this S3 can't be made slow");
                return None;
            }
        }
        let server = gateway.another(&[]);
        gateway.port = server.address.port();
        gateway.configure_ssh();
        let bytes = noise(LARGE, 1);
        gateway.write("file", &bytes);
        Some(Ending {
            gateway,
            server,
            bytes,
        })
    }

    /// Runs a client, and sends the server SIGTERM once an upload is under way.
    fn run(&mut self, command: &mut Command, input: &str) -> Ran {
        let (gateway, server) = (&self.gateway, &self.server);
        let ran = thread::scope(|scope| {
            let client = scope.spawn(|| Ran::new(command, input));
            wait_until("an upload is under way", || !gateway.uploads().is_empty());
            server.signal("TERM");
            client.join().unwrap()
        });
        wait_until("the server ends", || {
            self.server.child.try_wait().unwrap().is_some()
        });
        ran
    }

    /// [`Ending::run`] with a client that puts `file` as `stored`.
    fn expect_stored(&mut self, command: &mut Command, input: &str, stored: &str) {
        let ran = self.run(command, input);
        assert!(ran.succeeded(), "{ran}\n{}", self.server.log());
        self.gateway.expect_object(stored, &self.bytes);
        assert_eq!(self.gateway.keys(), [stored]);
    }
}

#[test]
fn sftp_is_told_that_its_file_is_stored() {
    let Some(mut ending) = Ending::start(&["sftp"]) else {
        return;
    };
    let mut sftp = ending.gateway.command("sftp");
    sftp.arg("-F").arg(ending.gateway.ssh_config());
    sftp.args(["-b", "-", HOST]);
    // What follows the CLOSE is served too.
    let batch = "put -p file f\nchmod 600 f\nrename f g\n";
    ending.expect_stored(&mut sftp, batch, "g");
}

#[test]
fn scp_is_told_that_its_file_is_stored() {
    let Some(mut ending) = Ending::start(&["scp"]) else {
        return;
    };
    let mut scp = ending.gateway.command("scp");
    scp.arg("-F").arg(ending.gateway.ssh_config());
    scp.args(["-p", "file"]).arg(format!("{HOST}:f"));
    ending.expect_stored(&mut scp, "", "f");
}

/// The file under way is stored, and the others are refused with a sentence.
#[test]
fn scp_of_a_directory_is_told_which_file_is_stored() {
    let Some(mut ending) = Ending::start(&["scp"]) else {
        return;
    };
    for name in ["a", "b", "c"] {
        ending.gateway.write(&format!("d/{name}"), &ending.bytes);
    }
    let mut scp = ending.gateway.command("scp");
    scp.arg("-F").arg(ending.gateway.ssh_config());
    scp.args(["-r", "d"]).arg(format!("{HOST}:e"));
    let ran = ending.run(&mut scp, "");
    assert!(ran.failed(), "{ran}");
    // scp itself shows no more than "Failure".
    let refused = ending.server.logged("Failure: the server is shutting down");
    assert_eq!((ending.gateway.keys().len(), refused), (1, 2), "{ran}");
    assert!(!ran.stderr.contains("closed"), "{ran}");
}

#[test]
fn rclone_is_told_that_its_file_is_stored() {
    let Some(mut ending) = Ending::start(&["rclone"]) else {
        return;
    };
    let mut rclone = ending.gateway.rclone();
    rclone.args(["copyto", "--retries", "1", "file", ":sftp:f"]);
    ending.expect_stored(&mut rclone, "", "f");
}

#[test]
fn lftp_is_told_that_its_file_is_stored() {
    let Some(mut ending) = Ending::start(&["lftp"]) else {
        return;
    };
    let mut lftp = ending.gateway.lftp("put file -o f");
    ending.expect_stored(&mut lftp, "", "f");
}

#[test]
fn curl_is_told_that_its_file_is_stored() {
    let Some(mut ending) = Ending::start(&["curl:sftp"]) else {
        return;
    };
    let mut curl = ending.gateway.command("curl");
    curl.args(["--silent", "--show-error", "--insecure", "--key"])
        .arg(ending.gateway.key())
        .args(["--user", "alice:", "--upload-file", "file"])
        .arg(format!("sftp://127.0.0.1:{}/f", ending.gateway.port));
    ending.expect_stored(&mut curl, "", "f");
}
