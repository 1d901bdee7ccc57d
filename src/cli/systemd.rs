//! Notifies systemd of readiness, life (for the watchdog) and the end
//! ([sd_notify(3)](https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html)).

use sd_notify::NotifyState;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// Notifies systemd until the server drains. Does nothing if systemd did not start the process.
pub async fn tell_systemd(drain: CancellationToken) {
    notify_systemd(NotifyState::Ready);
    let stopping = async {
        drain.cancelled().await;
        notify_systemd(NotifyState::Stopping);
    };
    tokio::join!(feed_watchdog(), stopping);
}

async fn feed_watchdog() {
    while let Some(patience) = sd_notify::watchdog_enabled() {
        notify_systemd(NotifyState::Watchdog);
        sleep(patience / 3).await;
    }
}

pub fn notify_systemd(state: NotifyState<'_>) {
    // Fails if systemd does not wait for it.
    let _ = sd_notify::notify(&[state]);
}
