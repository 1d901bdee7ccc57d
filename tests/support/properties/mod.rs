//! Properties that hold for every input. Each is a function of bytes: `tests/properties.rs` calls
//! it with random bytes on every run, the targets in `fuzz/` with bytes that libFuzzer finds by the
//! code they reach.
//!
//! The bytes are choices from which an input is made, so that most inputs are valid enough to be
//! processed. When they run out, every choice is the first one.

// A fuzz target uses one of them.
#![allow(dead_code, unused_imports)]
// A panic is how a property fails.
#![allow(clippy::restriction)]

mod packets;
mod paths;
#[path = "../session.rs"]
mod session;
mod uploads;
mod users;

pub use packets::packets;
pub use paths::paths;
pub use uploads::{parts, uploads};
pub use users::users;

use arbitrary::Unstructured;
use bytes::{BufMut, Bytes, BytesMut};
use peak_alloc::PeakAlloc;
use std::{sync::LazyLock, time::Duration};
use tokio::time::timeout;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Something chosen from the bytes.
type Chosen<T> = arbitrary::Result<T>;

const MIB: u64 = 1024 * 1024;
/// Far more than any case takes on a paused clock: what still runs then waits for something that
/// never happens.
const FOREVER: Duration = Duration::from_secs(86_400);

/// Runs to the end on a paused clock and in one thread, so that the same choices do the same.
fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        timeout(FOREVER, work)
            .await
            .expect("everything that was begun ends")
    })
}

/// Bytes without a pattern; slices of them are not copied.
static NOISE: LazyLock<Bytes> = LazyLock::new(|| {
    let mut bytes = BytesMut::new();
    for n in 1..=2 * MIB {
        let word = n.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        bytes.put_u64(word ^ (word >> 29));
    }
    bytes.freeze()
});

fn noise(u: &mut Unstructured, len: u64) -> Chosen<Bytes> {
    let from = usize::from(u.arbitrary::<u16>()?);
    Ok(NOISE.slice(from..from + len as usize))
}

/// True once in `times` times, and never after the bytes have run out.
fn rarely(u: &mut Unstructured, times: u8) -> Chosen<bool> {
    Ok(u.int_in_range(1..=times)? == times)
}
