//! Renames that came before the CLOSE of a file they concern.
//!
//! Called by the session. FUSE tells sshfs of a `close()` in the background, so the RENAME of a
//! program that writes a temporary file and moves it into place may overtake its CLOSE. Such a
//! rename is kept until the CLOSE is there; it would be refused, or the CLOSE would replace what it
//! has moved. The session goes on with other requests meanwhile.

use crate::path::Path;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// How long a rename waits for a CLOSE. A client that keeps the file open on purpose gets its
/// refusal then.
const MAX_WAIT: Duration = Duration::from_secs(3);

/// Renames of one session that wait; one more is carried out at once.
const MAX_RENAMES: usize = 16;

/// A RENAME, or its extension that replaces.
pub struct Rename {
    pub id: u32,
    pub from: Path,
    pub to: Path,
    pub replace: bool,
}

impl Rename {
    /// Does it move or replace the file with this path, alone or with its directory?
    pub fn concerns(&self, path: &Path) -> bool {
        path.is_inside_or_at(&self.from) || path.is_inside_or_at(&self.to)
    }
}

/// See the module. The first to come is the first to be due.
#[derive(Default)]
pub struct EarlyRenames(Vec<(Instant, Rename)>);

impl EarlyRenames {
    /// Keeps a rename, or gives it back if there are too many.
    pub fn keep(&mut self, rename: Rename) -> Result<(), Rename> {
        if self.0.len() >= MAX_RENAMES {
            return Err(rename);
        }
        self.0.push((Instant::now() + MAX_WAIT, rename));
        Ok(())
    }

    /// Takes the first rename that has waited long enough, or that none of the files that are still
    /// open concerns.
    pub fn take_due<'a>(&mut self, open: impl Iterator<Item = &'a Path> + Clone) -> Option<Rename> {
        let now = Instant::now();
        let is_due = |(deadline, rename): &(Instant, Rename)| {
            *deadline <= now || !open.clone().any(|path| rename.concerns(path))
        };
        let index = self.0.iter().position(is_due)?;
        let (_, rename) = self.0.remove(index);
        Some(rename)
    }

    /// Waits until the first rename has waited long enough; does not resolve if there is none.
    pub async fn first_deadline(&self) {
        match self.0.first() {
            Some((deadline, _)) => sleep_until(*deadline).await,
            None => std::future::pending().await,
        }
    }
}
