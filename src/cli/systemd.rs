//! What systemd is told: readiness, the watchdog's sign of life, and the end
//! ([sd_notify(3)](https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html)).

use sd_notify::NotifyState;
use sftpd::server::Shutdown;
use tokio::time::sleep;

/// Ready, alive, stopping: nothing where systemd did not start this.
pub async fn tell_systemd(shutdown: Shutdown) {
    notify_systemd(NotifyState::Ready);
    let alive = async {
        while let Some(patience) = sd_notify::watchdog_enabled() {
            notify_systemd(NotifyState::Watchdog);
            sleep(patience / 3).await;
        }
    };
    let stopping = async {
        shutdown.drain.cancelled().await;
        notify_systemd(NotifyState::Stopping);
    };
    tokio::join!(alive, stopping);
}

pub fn notify_systemd(state: NotifyState<'_>) {
    // Without a socket to tell it to, nobody asked.
    let _ = sd_notify::notify(&[state]);
}
