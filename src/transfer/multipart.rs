//! The end of multipart uploads that will not be completed.

use crate::catch_panic;
use crate::metrics::ABORTED_UPLOADS;
use crate::store::{Key, Store, StoreError};
use metrics::counter;

/// Size of the parts, in bytes, by which objects over 5 GiB are copied.
pub const COPY_PART_SIZE: u64 = 1024 * 1024 * 1024;

/// Aborts a multipart upload. Returns false if that fails: then it stays in the store, and the log
/// says so.
pub async fn abort(store: &dyn Store, key: &Key, id: &str) -> bool {
    let result = match catch_panic(store.abort(key, id)).await {
        Ok(result) => result,
        Err(panicked) => Err(StoreError::Other(panicked.to_string())),
    };
    let label = match &result {
        Ok(()) => "aborted",
        Err(error) => {
            log::warn!(
                "multipart upload {id} of {:?} could not be aborted and stays: {error}",
                key.as_str()
            );
            "left"
        }
    };
    counter!(ABORTED_UPLOADS, "result" => label).increment(1);
    result.is_ok()
}
