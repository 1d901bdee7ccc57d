//! Clients as commands: run to their end, and killed if they hang.

use super::wait::POLL;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, Write, stderr};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// No command takes this long unless it hangs.
const MAX_RUN_TIME: Duration = Duration::from_secs(120);

/// Whether a client is there: a command, the path of a file, `python3:MODULE`, `ruby:LIBRARY`,
/// `node:MODULE`, or `PROGRAM:FEATURE` for a word that its `--version` names.
pub fn is_installed(client: &str) -> bool {
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

fn succeeds(program: &str, args: &[&str]) -> Option<Output> {
    let mut command = Command::new(program);
    let output = command.args(args).stdin(Stdio::null()).output().ok()?;
    if output.status.success() {
        Some(output)
    } else {
        None
    }
}

/// Says on standard error that the running test does less than it could. libtest captures what
/// `eprintln!` prints, and drops it if the test passes.
pub fn report_skip(why: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("?");
    let _ = writeln!(stderr(), "skipped: {test}: {why}");
}

/// Whether each of these is installed. If not, the reason is printed; with
/// `SFTPD_TEST_ALL_CLIENTS=1` it is a failure.
pub fn are_installed(clients: &[&str]) -> bool {
    let missing: Vec<_> = clients
        .iter()
        .filter(|client| !is_installed(client))
        .collect();
    if missing.is_empty() {
        return true;
    }
    let needed = std::env::var("SFTPD_TEST_ALL_CLIENTS").is_ok_and(|value| value == "1");
    assert!(!needed, "not installed: {missing:?}");
    report_skip(&format!("not installed: {missing:?}"));
    false
}

/// A command and its children (`sftp` starts an `ssh`): a process group, killed when dropped before
/// its end.
pub struct Running(pub Child);

impl Running {
    pub fn spawn(command: &mut Command) -> Running {
        let child = command.process_group(0).spawn();
        Running(child.unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    /// [`Running::spawn`] without input and output.
    pub fn spawn_quietly(command: &mut Command) -> Running {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Running::spawn(command)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // What a command leaves running on purpose, as sshfs does, stays.
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

/// How a command ended. `Display` shows all of it, for whoever has to find the mistake.
pub struct Ran {
    command: String,
    /// `None` if it had to be killed.
    status: Option<ExitStatus>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Runs a command to its end, with this standard input.
    pub fn new(command: &mut Command, input: &str) -> Ran {
        let mut stdin = tempfile::tempfile().unwrap();
        stdin.write_all(input.as_bytes()).unwrap();
        stdin.rewind().unwrap();
        let stdout = tempfile::tempfile().unwrap();
        let stderr = tempfile::tempfile().unwrap();
        command
            .stdin(stdin)
            .stdout(stdout.try_clone().unwrap())
            .stderr(stderr.try_clone().unwrap());
        let mut running = Running::spawn(command);
        let began = Instant::now();
        let status = loop {
            match running.0.try_wait().unwrap() {
                None if began.elapsed() < MAX_RUN_TIME => std::thread::sleep(POLL),
                status => break status,
            }
        };
        drop(running);
        Ran {
            command: shown(command),
            status,
            stdout: content(stdout),
            stderr: content(stderr),
        }
    }

    pub fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// It ended by itself, with failure.
    pub fn failed(&self) -> bool {
        self.status.is_some_and(|status| !status.success())
    }
}

fn content(mut file: File) -> String {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// As one would type it, scripts on their own lines.
fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    words.join(" ")
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = match self.status {
            Some(status) => status.to_string(),
            None => format!("killed after {MAX_RUN_TIME:?}"),
        };
        write!(
            f,
            "{}\n{status}\n-- stdout\n{}\n-- stderr\n{}",
            self.command, self.stdout, self.stderr
        )
    }
}
