//! Content for files.

use super::Dice;
use bytes::Bytes;

/// Bytes without a pattern, so that a block in the wrong place is found.
pub fn noise(len: usize, seed: u64) -> Bytes {
    let mut dice = Dice::new(seed);
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend_from_slice(&dice.roll().to_le_bytes());
    }
    out.truncate(len);
    out.into()
}
