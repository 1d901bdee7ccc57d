//! The reaper: aborts incomplete uploads that a killed server left in the store, invisible and
//! billed. Called by `server`, at the start and every hour.
//!
//! S3 keeps no mark on an upload in progress that could be read back. What is aborted lies below
//! our prefix, was begun with our credentials, has received nothing for a long time, and has parts
//! of the sizes that this server sends. In doubt it stays.

use super::multipart::{COPY_PART_SIZE, abort};
use super::{PartSizes, Transfers};
use crate::events::Event;
use crate::path::Key;
use crate::store::{self, IncompleteUpload, Part};
use std::time::{Duration, SystemTime};

impl Transfers {
    /// Looks for incomplete uploads once, and aborts those that have received nothing for this
    /// long.
    pub async fn abort_incomplete_uploads(&self, prefix: &Key, abandoned_after: Duration) {
        let aborting = self.try_abort_incomplete_uploads(prefix, abandoned_after);
        if let Err(error) = aborting.await {
            log::warn!(
                "can't look for incomplete multipart uploads (a lifecycle rule of the bucket can): {error}"
            );
        }
    }

    async fn try_abort_incomplete_uploads(
        &self,
        prefix: &Key,
        abandoned_after: Duration,
    ) -> store::Result<()> {
        let before = SystemTime::now()
            .checked_sub(abandoned_after)
            .unwrap_or(SystemTime::UNIX_EPOCH);
        for upload in self.store.incomplete_uploads(prefix, before).await? {
            let is_ours = store::is_probe(&upload.key)
                || have_sizes(&upload.parts, &self.sizes, self.short_part_unit());
            if is_ours {
                self.abort_incomplete_upload(upload).await;
            }
        }
        Ok(())
    }

    async fn abort_incomplete_upload(&self, upload: IncompleteUpload) {
        let aborted = abort(self.store.as_ref(), &upload.key, &upload.id).await;
        let key = upload.key.to_string();
        match aborted {
            Ok(()) => self.events.tell(Event::AbandonedUploadAborted {
                key,
                upload_id: upload.id,
                parts: upload.parts.len(),
            }),
            Err(error) => self.events.tell(Event::UploadLeft {
                key,
                upload_id: upload.id,
                error: error.to_string(),
            }),
        }
    }
}

/// Do these parts, of which some may never have arrived, have the sizes that this server sends?
fn have_sizes(parts: &[Part], sizes: &PartSizes, short_unit: u64) -> bool {
    let Some(last) = parts.iter().map(|part| part.number).max() else {
        return false;
    };
    parts
        .iter()
        .all(|part| has_size(part, part.number == last, sizes, short_unit))
}

/// A part that left early is a multiple of `short_unit`, the last one may be any shorter, and a
/// rename copies in parts of [`COPY_PART_SIZE`].
fn has_size(part: &Part, is_last: bool, sizes: &PartSizes, short_unit: u64) -> bool {
    let full = sizes.of(part.number);
    if part.size == full || part.size == COPY_PART_SIZE {
        return true;
    }
    let left_early = !sizes.are_equal() && part.size.is_multiple_of(short_unit);
    part.size < full && (is_last || left_early)
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
            ..PartSizes::default()
        };
        let ours = |parts: &[(u32, u64)]| {
            let part = |&(number, size): &(u32, u64)| Part::new(number, size, "");
            have_sizes(&parts.iter().map(part).collect::<Vec<_>>(), &sizes, 5)
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
