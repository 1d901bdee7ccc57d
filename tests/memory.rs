//! The memory promise of docs/requests.md, measured on the real binary: peak RSS against the
//! formula.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use futures_util::future::join_all;
use russh_sftp::client::RawSftpSession;
use russh_sftp::protocol::OpenFlags;
use sftpd::transfer::MAX_USER_HANDLES;
use sftpd::transfer::REORDER_WINDOW;
use std::collections::HashSet;
use std::time::Duration;
use support::process::Process;
use support::s3::{FakeS3, Fault, When};
use support::*;

#[tokio::test(flavor = "multi_thread")]
async fn many_uploads_stay_inside_the_formula() {
    const UPLOADS: usize = 20;
    let s3 = FakeS3::start().await;
    // A store slow enough that all of the pool is in use.
    s3.fault(
        "UploadPart",
        When::Every,
        Fault::Stall(Duration::from_millis(100)),
    );
    let process = Process::start(&s3, &["--buffer-memory", "32MiB"]);
    let data = noise(11 * MIB, 1);
    let mut puts = tokio::task::JoinSet::new();
    for n in 0..UPLOADS {
        let client = process.client().await;
        let data = data.clone();
        puts.spawn(async move { client.put(&format!("/{n}"), &data).await.unwrap() });
    }
    puts.join_all().await;
    // 20 for the process, 14 for two password checks, the pool, and a share for each upload and
    // session.
    let promise = 34 + 32 + UPLOADS * 21 / 4 + UPLOADS * 4;
    let peak = process.peak();
    assert!(
        (UPLOADS * 5..=promise).contains(&peak),
        "{peak} MiB, of {promise}"
    );
    s3.assert_no_uploads();
}

/// Every upload lacks one block at the end of its first part, and has sent all that is accepted
/// behind it.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_written_out_of_order_stay_inside_the_formula() {
    const UPLOADS: usize = 16;
    const BLOCK: usize = 32 * 1024;
    let s3 = FakeS3::start().await;
    let process = Process::start(&s3, &["--buffer-memory", "32MiB"]);
    let gap = 5 * MIB - BLOCK;
    let data = noise(5 * MIB + REORDER_WINDOW as usize - BLOCK, 1);
    let mut puts = tokio::task::JoinSet::new();
    for n in 0..UPLOADS {
        let client = process.client().await;
        let data = data.clone();
        puts.spawn(async move {
            let handle = client.open(&format!("/{n}"), PUT).await.unwrap();
            client.write(&handle, 0, &data[..gap]).await.unwrap();
            let write = |at: usize| {
                client.sftp.write(
                    &handle,
                    at as u64,
                    data[at..data.len().min(at + BLOCK)].to_vec(),
                )
            };
            // WRITEs far ahead are answered once the gap is closed, or when nothing else arrives.
            let ahead = join_all((gap + BLOCK..data.len()).step_by(BLOCK).map(write)).await;
            ahead.into_iter().for_each(|answer| drop(answer.unwrap()));
            (client, handle)
        });
    }
    let open = puts.join_all().await;
    let peak = process.peak();
    // As above, and what each upload holds out of order.
    let promise = 34 + 32 + UPLOADS * 21 / 4 + UPLOADS * 4 + UPLOADS * 9;
    let held = UPLOADS * (data.len() / MIB);
    assert!(
        (held..=promise).contains(&peak),
        "{peak} MiB, of {promise}; {held} were sent"
    );
    for (client, handle) in open {
        client
            .write(&handle, gap as u64, &data[gap..gap + BLOCK])
            .await
            .unwrap();
        client.close(&handle).await.unwrap();
    }
    (0..UPLOADS).for_each(|n| assert!(s3.object(&format!("alice/{n}")).unwrap() == data, "{n}"));
    s3.assert_no_uploads();
}

/// A byte is appended to each of many files, whose old bytes all arrive at once.
#[tokio::test(flavor = "multi_thread")]
async fn appends_stay_inside_the_formula() {
    const UPLOADS: usize = 60;
    const SIZE: usize = 5 * MIB - 64 * 1024;
    let s3 = FakeS3::start().await;
    let data = noise(SIZE, 1);
    (0..UPLOADS).for_each(|n| s3.put(&format!("alice/{n}"), data.clone()));
    s3.fault(
        "GetObject",
        When::Every,
        Fault::Stall(Duration::from_millis(100)),
    );
    let process = Process::start(&s3, &["--buffer-memory", "32MiB"]);
    let client = process.client().await;
    let append = OpenFlags::WRITE | OpenFlags::APPEND;
    let mut handles = Vec::new();
    for n in 0..UPLOADS {
        handles.push(client.open(&format!("/{n}"), append).await.unwrap());
    }
    let appends = handles.iter().map(async |handle| {
        client.write(handle, 0, b"x").await.unwrap();
    });
    join_all(appends).await;
    let peak = process.peak();
    // As above, in one session.
    let promise = 34 + 32 + UPLOADS * 21 / 4 + 4;
    assert!(
        (UPLOADS * 4..=promise).contains(&peak),
        "{peak} MiB, of {promise}"
    );
    for handle in &handles {
        client.close(handle).await.unwrap();
    }
    let longer = [&data[..], b"x"].concat();
    (0..UPLOADS).for_each(|n| assert!(s3.object(&format!("alice/{n}")).unwrap() == longer, "{n}"));
    s3.assert_no_uploads();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_transfer_at_default_settings_takes_little_memory() {
    let s3 = FakeS3::start().await;
    let process = Process::start(&s3, &[]);
    let client = process.client().await;
    let data = noise(200 * MIB, 1);
    client.put("/f", &data).await.unwrap();
    assert!(client.get("/f").await.unwrap() == data);
    let peak = process.peak();
    assert!(peak < 120, "{peak} MiB");
}

/// Password checks use one buffer of 7 MiB each, and at most two run at once, whatever their
/// result.
#[tokio::test(flavor = "multi_thread")]
async fn password_checks_stay_inside_the_formula() {
    let s3 = FakeS3::start().await;
    let process = Process::start(&s3, &["--buffer-memory", "20MiB"]);
    let mut resident = vec![process.resident()];
    for n in 0..20 {
        // Wrong ones, each for another name: more of them for one name would not be checked.
        if n % 4 == 0 {
            let guess = async |m| {
                Client::login(process.address, &format!("user{n}{m}"), "guess")
                    .await
                    .is_none()
            };
            assert!(
                join_all((0..3).map(guess))
                    .await
                    .into_iter()
                    .all(|refused| refused)
            );
        }
        let at_once = join_all((0..3).map(|_| process.client())).await;
        drop(at_once);
        resident.push(process.resident());
    }
    // 20 for the process, 7 for each check, and the share of each session.
    let promise = 34 + 3 * 4;
    let peak = process.peak();
    assert!(peak <= promise, "{peak} MiB, after each round {resident:?}");
}

/// Reads a directory to its end; the number of its entries.
async fn count_entries(sftp: &RawSftpSession, handle: &str) -> usize {
    let mut names = HashSet::new();
    let mut count = 0;
    while let Ok(page) = sftp.readdir(handle).await {
        count += page.files.len();
        names.extend(page.files.into_iter().map(|file| file.filename));
    }
    assert_eq!(names.len(), count, "a name twice");
    count
}

/// As many directories as one user may have open, none of which is read to its end.
#[tokio::test(flavor = "multi_thread")]
async fn open_directories_stay_inside_the_formula() {
    const SESSIONS: usize = 5;
    const HANDLES: usize = MAX_USER_HANDLES / (SESSIONS - 1);
    const NAMES: usize = 1000;
    let s3 = FakeS3::start().await;
    let process = Process::start(&s3, &["--store", "memory:", "--buffer-memory", "20MiB"]);
    let client = process.client().await;
    for n in 0..NAMES {
        client.put(&format!("/d/{n:0200}"), b"").await.unwrap();
    }
    let ssh = client.ssh;
    let mut sessions = Vec::new();
    for _ in 0..SESSIONS - 1 {
        sessions.push(ssh.sftp().await);
    }
    let open = sessions.iter().map(async |sftp| {
        let mut handles = Vec::new();
        for _ in 0..HANDLES {
            handles.push(sftp.opendir("/d").await.unwrap().handle);
        }
        handles
    });
    let handles = join_all(open).await;
    let peak = process.peak();
    // As above, without the pool; and the pages of one user.
    let promise = 34 + SESSIONS * 4 + 2;
    assert!(peak <= promise, "{peak} MiB, of {promise}");
    // Pages that were dropped are fetched again.
    assert_eq!(count_entries(&sessions[0], &handles[0][0]).await, NAMES + 2);
    assert_eq!(
        count_entries(&sessions[SESSIONS - 2], &handles[SESSIONS - 2][HANDLES - 1]).await,
        NAMES + 2
    );
}

/// Directories that only this process knows, and listings of them.
#[tokio::test(flavor = "multi_thread")]
async fn virtual_directories_stay_inside_the_formula() {
    const DIRECTORIES: usize = 100_000;
    let s3 = FakeS3::start().await;
    let process = Process::start(&s3, &["--store", "memory:", "--buffer-memory", "20MiB"]);
    let client = process.client().await;
    for at_once in (0..DIRECTORIES).collect::<Vec<_>>().chunks(64) {
        let mkdir = async |n| client.mkdir(&format!("/d/{n:060}")).await;
        for made in join_all(at_once.iter().map(mkdir)).await {
            made.unwrap();
        }
    }
    let before = process.peak();
    let mut handles = Vec::new();
    for _ in 0..20 {
        handles.push(client.sftp.opendir("/d").await.unwrap().handle);
    }
    let mut first = 0;
    for handle in &handles {
        first = client.sftp.readdir(handle).await.unwrap().files.len();
    }
    let peak = process.peak();
    // As above, and the directories and pages of one user.
    let promise = 34 + 4 + 32 + 2;
    assert!(
        peak <= promise,
        "{peak} MiB, of {promise}; {before} before they were listed"
    );
    assert_eq!(
        first + count_entries(&client.sftp, &handles[7]).await,
        DIRECTORIES + 2
    );
}
