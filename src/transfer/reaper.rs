//! Aborts what a server that was killed left in the store: multipart uploads that nobody will complete, invisible and
//! billed. Called by `server`, at the start and every hour.
//!
//! S3 keeps no mark on an upload in progress that could be read back. What is aborted lies below our prefix, was begun
//! with our credentials, got nothing for a long time, and has parts cut as this server cuts them; in doubt it stays.

use super::multipart::COPY_PART_SIZE;
use super::{PartSizes, Transfers};
use crate::store::{self, Key, MIN_PART, Part};
use std::time::{Duration, SystemTime};

impl Transfers {
    /// Looks once.
    pub async fn sweep(&self, prefix: &Key, abandoned_after: Duration) {
        if let Err(error) = self.abort_abandoned(prefix, abandoned_after).await {
            log::warn!(
                "can't look for abandoned multipart uploads (a lifecycle rule of the bucket can): {error}"
            );
        }
    }

    async fn abort_abandoned(&self, prefix: &Key, abandoned_after: Duration) -> store::Result<()> {
        let before = SystemTime::now()
            .checked_sub(abandoned_after)
            .unwrap_or(SystemTime::UNIX_EPOCH);
        for upload in self.store.stale_uploads(prefix, before).await? {
            let (key, id, parts) = (&upload.key, &upload.id, upload.parts.len());
            let is_ours = store::is_probe(key) || cuts(&self.sizes, &upload.parts);
            if is_ours && super::abort(self.store.as_ref(), key, id).await {
                log::info!(
                    "aborted the abandoned multipart upload {id} of {:?}, {parts} parts",
                    key.as_str()
                );
            }
        }
        Ok(())
    }
}

/// Are these parts, of which some may never have arrived, cut in these sizes? Parts that left early are multiples of
/// [`MIN_PART`], and a rename copies in large pieces.
fn cuts(sizes: &PartSizes, parts: &[Part]) -> bool {
    let last = parts.iter().map(|part| part.number).max();
    let fits = |part: &Part| {
        let size = sizes.of(part.number);
        let is_last = Some(part.number) == last;
        let is_short =
            sizes.double_every != 0 && part.size < size && part.size.is_multiple_of(MIN_PART);
        part.size == size
            || part.size == COPY_PART_SIZE
            || is_short
            || (is_last && part.size < size)
    };
    last.is_some() && parts.iter().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_parts_of_our_sizes_are_ours() {
        let sizes = PartSizes {
            first: 10,
            cap: 40,
            double_every: 2,
        };
        let ours = |parts: &[(u32, u64)]| {
            let part = |&(number, size): &(u32, u64)| Part {
                number,
                size,
                etag: String::new(),
                checksum: None,
            };
            cuts(&sizes, &parts.iter().map(part).collect::<Vec<_>>())
        };
        assert!(ours(&[(1, 10)]) && ours(&[(1, 3)]) && ours(&[(1, 10), (3, 20), (4, 7)]));
        assert!(
            !ours(&[])
                && !ours(&[(1, 8), (2, 10)])
                && !ours(&[(1, 11)])
                && !ours(&[(1, 10), (2, 10), (3, 40)])
        );
    }
}
