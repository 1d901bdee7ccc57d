//! Raises the limit on file descriptors to what `--max-sessions` needs.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// A session has its own connection and one to S3.
const DESCRIPTORS_PER_SESSION: u64 = 2;
/// For parts in flight, metrics, name resolution and files. A server without sessions has about 15
/// open, and the pool of `--buffer-memory` has room for 51 parts by default.
const DESCRIPTORS_BESIDE_SESSIONS: u64 = 100;

/// Raises the soft limit of this process to what this many sessions need, and warns if the hard
/// limit is lower. Login shells have a soft limit of 1,024, for programs that use select(2).
pub fn provide(max_sessions: usize) {
    let sessions = DESCRIPTORS_PER_SESSION.saturating_mul(max_sessions as u64);
    let needed = sessions.saturating_add(DESCRIPTORS_BESIDE_SESSIONS);
    let limit = getrlimit(Resource::Nofile);
    // `None` is no limit.
    let Some(current) = limit.current else { return };
    if current >= needed {
        return;
    }
    let raised = limit.maximum.unwrap_or(needed).min(needed);
    let new_limit = Rlimit {
        current: Some(raised),
        ..limit
    };
    let available = match setrlimit(Resource::Nofile, new_limit) {
        Ok(()) => raised,
        Err(_) => current,
    };
    if available < needed {
        log::warn!(
            "--max-sessions {max_sessions} may need {needed} file descriptors and this process may have {available}: \
            raise the limit (LimitNOFILE= of the unit, ulimit -n) or lower --max-sessions"
        );
    }
}
