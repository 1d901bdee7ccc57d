//! Says what is waited for while a command waits for the store: to the operator, and to systemd,
//! which would end the start otherwise (`TimeoutStartSec` of the unit).

use super::logging::BINARY_TARGET;
use super::systemd::notify_systemd;
use sd_notify::NotifyState;
use tokio::time::{Duration, Instant, sleep};

/// When the first line is due. A store that is well has answered long before.
const FIRST_NOTICE: Duration = Duration::from_secs(3);
/// The time between two lines.
const NOTICE_INTERVAL: Duration = Duration::from_secs(10);
/// How much longer systemd is to wait, in microseconds: until the next notice has surely come.
const EXTENSION: u32 = 30_000_000;

/// Does the work, and says that it waits for `what` as long as that takes.
pub async fn with_notices<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    let began = Instant::now();
    let mut pause = FIRST_NOTICE;
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            () = sleep(pause) => {}
        }
        let seconds = began.elapsed().as_secs();
        log::warn!(target: BINARY_TARGET, "waiting for {what}, {seconds} s so far");
        notify_systemd(NotifyState::ExtendTimeoutUsec(EXTENSION));
        pause = NOTICE_INTERVAL;
    }
}
