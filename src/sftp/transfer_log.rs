//! The line of the log and the metrics for a transfer that has ended, from one summary.

use crate::metrics::{TRANSFERRED_BYTES, TRANSFERS};
use crate::transfer::{DownloadSummary, UploadSummary};
use metrics::counter;

/// `put` says who put what.
pub fn log_upload(put: &str, summary: UploadSummary) {
    let bytes = summary.bytes;
    let parts = summary.parts;
    let seconds = summary.took.as_secs_f64();
    let label = match summary.result {
        Some(Ok(())) => {
            log::info!("{put} {bytes} bytes {parts} parts {seconds:.3} s");
            "ok"
        }
        Some(Err(error)) => {
            log::warn!("{put} failed after {bytes} bytes {seconds:.3} s: {error}");
            "failed"
        }
        None => {
            log::warn!(
                "{put} forced to end after {bytes} bytes {seconds:.3} s: nothing was stored"
            );
            "cut_off"
        }
    };
    count("upload", label, bytes);
}

/// `get` says who gets what. A client that stops reading in mid-file is no failure: `tail` and
/// previews do so.
pub fn log_download(get: &str, summary: DownloadSummary) {
    let bytes = summary.bytes;
    let requests = summary.requests;
    let seconds = summary.took.as_secs_f64();
    let label = match summary.error {
        None => {
            log::info!("{get} {bytes} bytes {requests} requests {seconds:.3} s");
            "ok"
        }
        Some(error) => {
            log::warn!("{get} failed after {bytes} bytes {seconds:.3} s: {error}");
            "failed"
        }
    };
    count("download", label, bytes);
}

fn count(direction: &'static str, result: &'static str, bytes: u64) {
    let labels = [("direction", direction), ("result", result)];
    counter!(TRANSFERS, &labels).increment(1);
    counter!(TRANSFERRED_BYTES, &labels).increment(bytes);
}
