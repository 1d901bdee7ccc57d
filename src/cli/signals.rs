//! Signals that end the server.

use sftpd::server::Shutdown;
use std::{fs, io};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The first SIGTERM, SIGINT or SIGHUP drains the server, the second stops it. They are caught from
/// here on, so before the server says that it is ready.
pub fn watch_signals(shutdown: Shutdown) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = watch_hangup()?;
    tokio::spawn(async move {
        for token in [shutdown.drain, shutdown.stop] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                Some(_) = receive(&mut hangup) => {}
            }
            token.cancel();
        }
    });
    Ok(())
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
