//! The log on its way to standard error: a queue, and the thread that empties it.
//!
//! A full pipe blocks who writes to it, so a log that is not read would stop the whole server. Here
//! only the thread waits. Lines that find the queue full are dropped, counted, and told of once the
//! log is read again.

use metrics::counter;
use sftpd::metrics::DROPPED_LOG_LINES;
use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Limit on the lines in the queue, in bytes. As much again may be on its way to the pipe.
const MAX_QUEUED: usize = 1024 * 1024;
/// For the last lines to be read before the process exits.
const EXIT_TIME: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Default)]
pub struct LogQueue {
    state: Mutex<State>,
    /// Notified when the state changes.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What is to be written next.
    lines: Vec<u8>,
    /// Lines that found no room since.
    dropped: u64,
    is_writing: bool,
}

impl LogQueue {
    /// Starts the thread. It writes to `out`, and says with `describe` how many lines were dropped.
    pub fn start(
        mut out: impl Write + Send + 'static,
        describe: impl Fn(u64) -> Vec<u8> + Send + 'static,
    ) -> io::Result<Arc<LogQueue>> {
        let queue = Arc::new(LogQueue::default());
        let emptied = queue.clone();
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || {
                loop {
                    let (lines, dropped) = emptied.take();
                    // Nobody is left to be told of an error.
                    let _ = out.write_all(&lines);
                    if dropped > 0 {
                        let _ = out.write_all(&describe(dropped));
                    }
                    emptied.end_write();
                }
            })?;
        Ok(queue)
    }

    /// Queues a line, or drops it.
    pub fn push(&self, line: &[u8]) {
        let mut state = self.state();
        if state.lines.len() + line.len() > MAX_QUEUED {
            state.dropped += 1;
            drop(state);
            counter!(DROPPED_LOG_LINES).increment(1);
        } else {
            state.lines.extend_from_slice(line);
            self.changed.notify_all();
        }
    }

    /// Waits until all is written, at most for [`EXIT_TIME`].
    pub fn flush(&self) {
        let is_busy = |state: &mut State| state.is_writing || !state.lines.is_empty();
        let waited = self
            .changed
            .wait_timeout_while(self.state(), EXIT_TIME, is_busy);
        drop(waited);
    }

    /// Waits for lines, and takes all of them. Lines are dropped only while there are some.
    fn take(&self) -> (Vec<u8>, u64) {
        let mut state = self.state();
        while state.lines.is_empty() {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.is_writing = true;
        (mem::take(&mut state.lines), mem::take(&mut state.dropped))
    }

    fn end_write(&self) {
        self.state().is_writing = false;
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes to the queue: a line at a time.
pub struct QueueWriter(pub Arc<LogQueue>);

impl Write for QueueWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    /// A pipe for one write, which waits until that is read.
    struct Pipe(SyncSender<Vec<u8>>);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn start() -> (Arc<LogQueue>, Receiver<Vec<u8>>) {
        let (pipe, read) = sync_channel(0);
        let describe = |dropped| format!("{dropped} dropped\n").into_bytes();
        (LogQueue::start(Pipe(pipe), describe).unwrap(), read)
    }

    #[test]
    fn what_is_not_read_is_bounded_and_told_later() {
        let (queue, read) = start();
        let line = [b'x'; 1000];
        // As much as the queue takes is on its way at most, and as much again waits.
        let pushed = 5 * MAX_QUEUED / line.len();
        for _ in 0..pushed {
            queue.push(&line);
        }
        let dropped = loop {
            let text = String::from_utf8(read.recv().unwrap()).unwrap();
            if let Some(count) = text.strip_suffix(" dropped\n") {
                break count.parse::<usize>().unwrap();
            }
        };
        assert!(dropped >= pushed - 2 * MAX_QUEUED / line.len(), "{dropped}");
        queue.push(b"goes on\n");
        while read.recv().unwrap() != b"goes on\n" {}
        queue.flush();
    }
}
