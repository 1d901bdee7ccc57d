//! Signals that end the server.

use sftpd::server::Server;
use std::{fs, io};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Signals that end the server.
struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
    /// `None` if it is ignored.
    hangup: Option<Signal>,
}

impl EndSignals {
    /// Waits for the next signal.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            Some(_) = receive(&mut self.hangup) => {}
        }
    }
}

/// The first SIGTERM, SIGINT or SIGHUP cancels the returned token, the second stops the server.
/// They are caught from here on, so before the server says that it is ready.
pub fn watch_signals(server: &Server) -> io::Result<CancellationToken> {
    let mut signals = EndSignals {
        terminate: signal(SignalKind::terminate())?,
        interrupt: signal(SignalKind::interrupt())?,
        hangup: watch_hangup()?,
    };
    let drain = CancellationToken::new();
    let first = drain.clone();
    let server = server.clone();
    tokio::spawn(async move {
        signals.next().await;
        first.cancel();
        signals.next().await;
        server.stop();
    });
    Ok(drain)
}

/// `None` if SIGHUP is ignored, as in a program that `nohup` starts.
fn watch_hangup() -> io::Result<Option<Signal>> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if ignores_hangup(&status) {
        return Ok(None);
    }
    Ok(Some(signal(SignalKind::hangup())?))
}

/// Reads the mask of ignored signals
/// ([proc(5)](https://man7.org/linux/man-pages/man5/proc_pid_status.5.html)), in which SIGHUP,
/// number 1, is the lowest bit.
fn ignores_hangup(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    match mask.map(|mask| u64::from_str_radix(mask.trim(), 16)) {
        Some(Ok(mask)) => mask & 1 != 0,
        _ => false,
    }
}

/// Resolves to `None` at once if the signal is not watched.
async fn receive(signal: &mut Option<Signal>) -> Option<()> {
    match signal {
        Some(signal) => signal.recv().await,
        None => None,
    }
}
