//! Waiting for something that must happen, with no assumption about how soon.

use std::time::Duration;

/// Nothing takes this long, on any machine, unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at something that is about to change.
pub const POLL: Duration = Duration::from_millis(10);

/// Waits until something holds, and panics if it does not within [`PATIENCE`].
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..polls() {
        if holds() {
            return;
        }
        tokio::time::sleep(POLL).await;
    }
    panic!("in {PATIENCE:?} this did not happen: {what}");
}

/// [`eventually`] for tests that are not async.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..polls() {
        if holds() {
            return;
        }
        std::thread::sleep(POLL);
    }
    panic!("in {PATIENCE:?} this did not happen: {what}");
}

fn polls() -> u128 {
    PATIENCE.as_millis() / POLL.as_millis()
}

/// The output of a future; panics if it takes longer than [`PATIENCE`].
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("hangs: {what}"))
}
