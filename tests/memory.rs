//! The memory promise of the README, measured on the real binary: peak RSS against the formula.

// A panic is how a test fails.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod support;

use std::time::Duration;
use support::binary::Process;
use support::s3::{FakeS3, Fault, When};
use support::*;

#[tokio::test(flavor = "multi_thread")]
async fn many_uploads_stay_inside_the_formula() {
    const UPLOADS: usize = 20;
    let s3 = FakeS3::start().await;
    // A store slow enough that all of the pool is in use.
    s3.fault("UploadPart", When::Every, Fault::Stall(Duration::from_millis(100)));
    let process = Process::start(&s3, &["--buffer-memory", "32MiB"]);
    let data = noise(11 * MIB, 1);
    let mut puts = tokio::task::JoinSet::new();
    for n in 0..UPLOADS {
        let client = process.server.client().await;
        let data = data.clone();
        puts.spawn(async move { client.put(&format!("/{n}"), &data).await.unwrap() });
    }
    puts.join_all().await;
    // 20 of the process, 14 for two password checks, the pool, and each upload's and session's share.
    let promise = 34 + 32 + UPLOADS * 25 / 4 + UPLOADS * 4;
    let peak = process.peak();
    assert!((UPLOADS * 5..=promise).contains(&peak), "{peak} MiB, of {promise}");
    assert_clean(&s3);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_transfer_at_default_settings_is_small() {
    let s3 = FakeS3::start().await;
    let process = Process::start(&s3, &[]);
    let client = process.server.client().await;
    let data = noise(200 * MIB, 1);
    client.put("/f", &data).await.unwrap();
    assert!(client.get("/f").await.unwrap() == data);
    let peak = process.peak();
    assert!(peak < 120, "{peak} MiB");
}
