//! Several handles, requests and sessions at one name: who sees an upload before it is stored, and
//! what waits for a CLOSE that the client has yet to send.
//!
//! Each test ends with the objects that must be there, and no multipart upload in progress.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use futures_util::future::join_all;
use russh_sftp::protocol::{FileAttributes, OpenFlags, StatusCode};
use std::pin::{Pin, pin};
use support::s3::FakeS3;
use support::*;

/// As clients open a file to resume it, or to append to it: without TRUNC.
const RESUME: OpenFlags = OpenFlags::WRITE.union(OpenFlags::CREATE);
const APPEND: OpenFlags = OpenFlags::WRITE.union(OpenFlags::APPEND);

async fn world() -> (FakeS3, Server, Client) {
    let s3 = FakeS3::start().await;
    let server = Server::start(s3_store(&s3)).await;
    let client = server.client().await;
    (s3, server, client)
}

fn assert_object(s3: &FakeS3, key: &str, want: &[u8]) {
    s3.assert_no_uploads();
    let body = s3.object(key).expect("the object exists");
    assert!(body == want, "{key}: {} bytes", body.len());
}

fn empty() -> FileAttributes {
    FileAttributes {
        size: Some(0),
        ..Default::default()
    }
}

/// Opens a file, and writes to it in order.
async fn begin(client: &Client, path: &str, data: &[u8]) -> String {
    let handle = client.open(path, PUT).await.unwrap();
    client.write(&handle, 0, data).await.unwrap();
    handle
}

/// As lftp's `put -c` and OpenSSH's `reput`: goes on at the size that is shown.
async fn resume(client: &Client, path: &str, data: &[u8]) -> Result<(), Failed> {
    let size = match client.size(path).await {
        Ok(size) => size,
        Err(Failed(StatusCode::NoSuchFile, _)) => 0,
        Err(failed) => return Err(failed),
    };
    let handle = client.open(path, RESUME).await?;
    client.write(&handle, size, &data[size as usize..]).await?;
    client.close(&handle).await
}

#[tokio::test]
async fn an_upload_that_hangs_is_resumed_from_what_is_stored() {
    let data = noise(8 * MIB, 1);
    for old in [None, Some(&data[..2 * MIB]), Some(&data[..7 * MIB])] {
        let (s3, server, hanging) = world().await;
        if let Some(old) = old {
            s3.put("alice/f", old.to_vec());
        }
        let _handle = begin(&hanging, "/f", &data[..3 * MIB]).await;
        let client = server.client().await;
        let stored = old.map(|old| old.len() as u64);
        assert_eq!(client.size("/f").await.ok(), stored);
        resume(&client, "/f", &data).await.unwrap();
        assert_object(&s3, "alice/f", &data);
        // The upload that hangs is older.
        assert_eq!(hanging.size("/f").await, Ok(data.len() as u64));
    }
}

#[tokio::test]
async fn an_upload_is_seen_by_its_own_session_only() {
    let (s3, server, writer) = world().await;
    s3.put("alice/old", noise(500, 1));
    let other = server.client().await;
    let mut handles = Vec::new();
    for path in ["/old", "/new", "/d/new"] {
        handles.push(begin(&writer, path, &noise(100, 2)).await);
    }
    let seen = ["d/", "new 100", "old 100"];
    assert_eq!(writer.list("/").await.unwrap(), seen);
    assert_eq!(other.list("/").await.unwrap(), ["d/", "old 500"]);
    assert_eq!(other.list("/d").await.unwrap(), [""; 0]);
    assert_eq!(writer.size("/d/new").await, Ok(100));
    assert_eq!(code(other.size("/new").await), StatusCode::NoSuchFile);
    assert_eq!(other.size("/old").await, Ok(500));
    assert_eq!(other.get("/old").await.unwrap(), noise(500, 1));
    // The name is taken all the same.
    let exclusive = OpenFlags::EXCLUDE | PUT;
    assert_eq!(code(other.mkdir("/new").await), StatusCode::Failure);
    assert_eq!(
        code(other.open("/new", exclusive).await),
        StatusCode::Failure
    );
    assert_eq!(code(other.sftp.rmdir("/d").await), StatusCode::Failure);
    let renamed = other.sftp.rename("/old", "/new").await;
    assert_eq!(code(renamed), StatusCode::Failure);
    for handle in &handles {
        writer.close(handle).await.unwrap();
    }
    assert_eq!(other.list("/").await.unwrap(), seen);
    s3.assert_no_uploads();
}

#[tokio::test]
async fn what_was_stored_last_is_shown_whatever_hangs() {
    let (s3, server, hanging) = world().await;
    let handle = begin(&hanging, "/f", &noise(5120, 1)).await;
    let client = server.client().await;
    client.put("/f", &noise(100, 2)).await.unwrap();
    for session in [&client, &hanging] {
        assert_eq!(session.size("/f").await, Ok(100));
        assert_eq!(session.list("/").await.unwrap(), ["f 100"]);
        assert_eq!(session.get("/f").await.unwrap(), noise(100, 2));
    }
    client.sftp.remove("/f").await.unwrap();
    for session in [&client, &hanging] {
        assert_eq!(code(session.size("/f").await), StatusCode::NoSuchFile);
    }
    client.put("/g", &noise(200, 3)).await.unwrap();
    client.posix_rename("/g", "/f").await.unwrap();
    assert_eq!(hanging.size("/f").await, Ok(200));
    // Closed, it is the newest.
    hanging.close(&handle).await.unwrap();
    assert_eq!(client.size("/f").await, Ok(5120));
    assert_object(&s3, "alice/f", &noise(5120, 1));
}

#[tokio::test]
async fn a_size_listed_of_an_upload_is_forgotten_with_it() {
    let (s3, _server, client) = world().await;
    s3.put("alice/f", noise(500, 1));
    let handle = client.open("/f", PUT).await.unwrap();
    client.write(&handle, 0, &noise(100, 2)).await.unwrap();
    assert_eq!(client.list("/").await.unwrap(), ["f 100"]);
    // Beyond what may be left out: the upload fails, and ends with its handle.
    let far = client.write(&handle, u64::MAX - 1, b"x").await;
    assert_eq!(code(far), StatusCode::Failure);
    assert_eq!(code(client.close(&handle).await), StatusCode::Failure);
    assert_eq!(client.size("/f").await, Ok(500));
}

#[tokio::test]
async fn an_open_that_overtakes_a_close_sees_the_new_file() {
    for old in [None, Some(noise(500, 1))] {
        let (s3, _server, client) = world().await;
        if let Some(old) = &old {
            s3.put("alice/f", old.clone());
        }
        let data = noise(100, 2);
        let handle = begin(&client, "/f", &data).await;
        let (read, closed) = tokio::join!(client.get("/f"), client.close(&handle));
        closed.unwrap();
        assert_eq!(read.unwrap(), data);

        let handle = begin(&client, "/f", b"one ").await;
        let append = async {
            let handle = client.open("/f", APPEND).await?;
            client.write(&handle, 0, b"two").await?;
            client.close(&handle).await
        };
        let (appended, closed) = tokio::join!(append, client.close(&handle));
        closed.unwrap();
        appended.unwrap();
        assert_object(&s3, "alice/f", b"one two");
    }
}

#[tokio::test]
async fn a_remove_or_a_truncation_that_overtakes_a_close_comes_after_it() {
    for old in [None, Some(noise(500, 1))] {
        let (s3, _server, client) = world().await;
        for name in ["f", "g"] {
            if let Some(old) = &old {
                s3.put(&format!("alice/{name}"), old.clone());
            }
        }
        let handle = begin(&client, "/f", b"new").await;
        let (removed, closed) = tokio::join!(client.sftp.remove("/f"), client.close(&handle));
        removed.unwrap();
        closed.unwrap();
        assert_eq!(code(client.size("/f").await), StatusCode::NoSuchFile);

        let handle = begin(&client, "/g", b"new").await;
        let truncate = client.sftp.setstat("/g", empty());
        let (truncated, closed) = tokio::join!(truncate, client.close(&handle));
        truncated.unwrap();
        closed.unwrap();
        assert_eq!(s3.objects(), ["alice/g"]);
        assert_object(&s3, "alice/g", b"");
    }
}

/// FUSE passes a `close()` to sshfs in the background, so a later RENAME can overtake the CLOSE.
#[tokio::test]
async fn a_rename_that_overtakes_a_close_waits_for_it() {
    for (size, target) in [(10, "/f"), (7 * MIB, "/f"), (10, "/none")] {
        let (s3, _server, client) = world().await;
        s3.put("alice/f", "old");
        let data = noise(size, 3);
        let handle = begin(&client, "/new", &data).await;
        let (renamed, closed) =
            tokio::join!(client.posix_rename("/new", target), client.close(&handle));
        renamed.unwrap();
        closed.unwrap();
        assert_eq!(client.get(target).await.unwrap(), data);
        assert_eq!(code(client.size("/new").await), StatusCode::NoSuchFile);
        s3.assert_no_uploads();
    }
}

#[tokio::test]
async fn a_rename_onto_an_open_file_waits_for_its_close() {
    let (s3, _server, client) = world().await;
    client.put("/d/new", b"new").await.unwrap();
    let handle = begin(&client, "/f", b"old").await;
    let (renamed, closed) =
        tokio::join!(client.posix_rename("/d/new", "/f"), client.close(&handle));
    renamed.unwrap();
    closed.unwrap();
    assert_eq!(s3.objects(), ["alice/f"]);
    assert_eq!(client.get("/f").await.unwrap(), b"new");
}

/// Sends a request, and returns once it waits.
async fn send<F: Future<Output: std::fmt::Debug>>(client: &Client, mut request: Pin<&mut F>) {
    // The reply to the second request comes after the first one has arrived.
    tokio::select! {
        biased;
        done = &mut request => panic!("it has not waited: {done:?}"),
        size = client.size("/none") => assert_eq!(code(size), StatusCode::NoSuchFile),
    }
}

/// Clients with several connections close a file on one, and go on on another one (sshfs with
/// `max_conns`, OpenDAL).
#[tokio::test]
async fn requests_wait_for_the_close_of_another_session() {
    for old in [None, Some(noise(500, 1))] {
        let (s3, server, client) = world().await;
        if let Some(old) = &old {
            s3.put("alice/a", old.clone());
        }
        let other = server.client().await;
        let third = server.client().await;
        let handle = begin(&client, "/a", b"new").await;
        let mut size = pin!(other.size("/a"));
        let mut get = pin!(third.get("/a"));
        send(&other, size.as_mut()).await;
        send(&third, get.as_mut()).await;
        client.close(&handle).await.unwrap();
        assert_eq!(size.await, Ok(3));
        assert_eq!(get.await.unwrap(), b"new");

        let handle = begin(&client, "/a", b"newer").await;
        let mut rename = pin!(other.posix_rename("/a", "/b"));
        send(&other, rename.as_mut()).await;
        client.close(&handle).await.unwrap();
        rename.await.unwrap();
        assert_eq!(s3.objects(), ["alice/b"]);
        assert_object(&s3, "alice/b", b"newer");
    }
}

#[tokio::test]
async fn requests_for_one_name_keep_their_order() {
    let (s3, _server, client) = world().await;
    client.put("/c", b"c").await.unwrap();
    let handle = begin(&client, "/a", b"a").await;
    let (first, second, size, closed) = tokio::join!(
        client.posix_rename("/a", "/b"),
        client.posix_rename("/c", "/b"),
        client.size("/b"),
        client.close(&handle),
    );
    first.unwrap();
    second.unwrap();
    closed.unwrap();
    assert_eq!(size, Ok(1));
    assert_eq!(s3.objects(), ["alice/b"]);
    assert_object(&s3, "alice/b", b"c");
}

#[tokio::test]
async fn what_waits_for_a_close_ends_with_its_session() {
    for replace in [true, false] {
        let (s3, server, client) = world().await;
        s3.put("alice/a", "stale");
        let _handle = begin(&client, "/a", b"new").await;
        {
            let rename = async {
                match replace {
                    true => code(client.posix_rename("/a", "/b").await),
                    false => code(client.sftp.rename("/a", "/b").await),
                }
            };
            send(&client, pin!(rename)).await;
        }
        drop(client);
        within("the end of the session", server.server.shut_down()).await;
        assert_eq!(s3.objects(), ["alice/a"]);
        assert_object(&s3, "alice/a", b"stale");
    }
}

#[tokio::test]
async fn requests_that_wait_for_a_close_are_limited_and_end() {
    let (s3, _server, client) = world().await;
    let handle = begin(&client, "/d/f", b"x").await;
    // More than may wait: the file stays open, so all are refused.
    let renames = (0..70).map(|_| client.posix_rename("/d", "/e"));
    for renamed in within("renames", join_all(renames)).await {
        assert_eq!(code(renamed), StatusCode::Failure);
    }
    assert_eq!(client.size("/d/f").await, Ok(1));
    client.close(&handle).await.unwrap();
    client.posix_rename("/d", "/e").await.unwrap();
    assert_eq!(s3.objects(), ["alice/e/f"]);
}

#[tokio::test]
async fn files_that_are_removed_while_they_are_open_are_given_up() {
    let s3 = FakeS3::start().await;
    let server = Server::with(s3_store(&s3), |builder| builder.max_uploads(1024)).await;
    let client = server.client().await;
    s3.put("alice/0", "old");
    let mut handles = Vec::new();
    for n in 0..255 {
        handles.push(begin(&client, &format!("/{n}"), b"new").await);
    }
    let paths: Vec<_> = (0..255).map(|n| format!("/{n}")).collect();
    let removals = paths.iter().map(|path| client.sftp.remove(path.as_str()));
    for removed in within("removals", join_all(removals)).await {
        removed.unwrap();
    }
    assert_eq!(client.list("/").await.unwrap(), [""; 0]);
    for (handle, path) in handles.iter().zip(&paths) {
        assert_eq!(code(client.size(path).await), StatusCode::NoSuchFile);
        client.write(handle, 3, b"more").await.unwrap();
        assert_eq!(code(client.close(handle).await), StatusCode::Failure);
    }
    s3.assert_no_uploads();
    assert_eq!(s3.objects(), [""; 0]);
    let missing = client.sftp.remove("/0").await;
    assert_eq!(code(missing), StatusCode::NoSuchFile);
}

/// What is stored is not what the session was shown.
#[tokio::test]
async fn a_changed_file_that_stays_open_is_not_opened_as_it_was_before() {
    let (s3, _server, client) = world().await;
    s3.put("alice/f", noise(500, 1));
    let handle = begin(&client, "/f", &noise(100, 2)).await;
    assert_eq!(client.size("/f").await, Ok(100));
    for flags in [OpenFlags::READ, RESUME, APPEND] {
        let opened = client.open("/f", flags).await;
        assert_eq!(code(opened), StatusCode::Failure, "{flags:?}");
    }
    let second = begin(&client, "/f", &noise(50, 3)).await;
    client.close(&second).await.unwrap();
    assert_object(&s3, "alice/f", &noise(50, 3));
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/f", &noise(100, 2));

    // Nothing was written: both are the same.
    let edit = client.open("/f", OpenFlags::WRITE).await.unwrap();
    assert_eq!(client.get("/f").await.unwrap(), noise(100, 2));
    client.close(&edit).await.unwrap();
}

#[tokio::test]
async fn a_file_can_be_read_behind_what_was_left_out() {
    let (s3, _server, client) = world().await;
    let edit = OpenFlags::READ | PUT;
    let handle = client.open("/f", edit).await.unwrap();
    client.write(&handle, 0, b"head").await.unwrap();
    client.write(&handle, 10, b"tail").await.unwrap();
    let size = FileAttributes {
        size: Some(20),
        ..Default::default()
    };
    client.sftp.fsetstat(&handle, size).await.unwrap();
    let whole = b"head\0\0\0\0\0\0tail\0\0\0\0\0\0";
    for at in 0..whole.len() {
        let read = client.sftp.read(&handle, at as u64, 100).await.unwrap();
        assert_eq!(read.data, whole[at..], "at {at}");
    }
    let end = client.sftp.read(&handle, 20, 100).await;
    assert_eq!(code(end), StatusCode::Eof);
    client.close(&handle).await.unwrap();
    assert_object(&s3, "alice/f", whole);
}

#[tokio::test]
async fn an_emptied_file_keeps_its_attributes() {
    let (s3, server, client) = world().await;
    s3.put_described("alice/f", "old", "text/csv", &[("made-by", "test")]);
    // Another session's upload of 0 bytes says nothing about what is stored.
    let other = server.client().await;
    let _handle = other.open("/f", PUT).await.unwrap();
    client.sftp.setstat("/f", empty()).await.unwrap();
    assert_object(&s3, "alice/f", b"");
    let (content_type, metadata) = s3.description("alice/f");
    assert_eq!(content_type.as_deref(), Some("text/csv"));
    assert_eq!(metadata.get("made-by").map(String::as_str), Some("test"));
}

#[tokio::test]
async fn names_that_are_no_text_are_missing_or_cannot_be_made() {
    let (s3, _server, client) = world().await;
    s3.put("alice/f", "x");
    // The client's library sends U+FFFD where a name was not UTF-8, as the decoder makes it.
    let name = "/\u{fffd}";
    let missing = [
        code(client.size(name).await),
        code(client.open(name, OpenFlags::READ).await),
        code(client.open(name, OpenFlags::WRITE).await),
        code(client.sftp.opendir(name).await),
        code(client.sftp.remove(name).await),
        code(client.sftp.rmdir(name).await),
        code(client.sftp.setstat(name, empty()).await),
        code(client.sftp.rename(name, "/g").await),
    ];
    assert_eq!(missing, [StatusCode::NoSuchFile; 8]);
    let refused = [
        code(client.open(name, PUT).await),
        code(client.mkdir(name).await),
        code(client.sftp.rename("/f", name).await),
        code(client.posix_rename("/f", name).await),
    ];
    assert_eq!(refused, [StatusCode::Failure; 4]);
    assert_eq!(s3.objects(), ["alice/f"]);
}
