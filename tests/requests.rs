//! The request table of the documentation, row by row: what each SFTP request does, and exactly
//! which S3 requests it sends.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use russh_sftp::protocol::{FileAttributes, OpenFlags, Packet, StatusCode};
use support::s3::{FakeS3, Fault, When};
use support::*;

struct World {
    s3: FakeS3,
    client: Client,
    // Dropped last, so that the client's connection ends before its server.
    _server: Server,
}

async fn world() -> World {
    let s3 = FakeS3::start().await;
    let server = Server::start(s3_store(&s3)).await;
    let client = server.client().await;
    World {
        s3,
        client,
        _server: server,
    }
}

impl World {
    /// The operations since the last call, by name and number. Nothing may be left half-done.
    fn cost(&self) -> String {
        self.s3.assert_no_uploads();
        self.cost_so_far()
    }

    fn cost_so_far(&self) -> String {
        let mut names: Vec<String> = self
            .s3
            .requests()
            .into_iter()
            .map(|request| request.op)
            .collect();
        // The server's own, at its start: it looks for incomplete uploads.
        names.retain(|name| name != "ListMultipartUploads");
        self.s3.reset();
        names.sort();
        let groups = names
            .chunk_by(|a, b| a == b)
            .map(|group| format!("{} {}", group.len(), group[0]));
        groups.collect::<Vec<_>>().join(", ")
    }

    fn assert_object(&self, key: &str, data: &[u8]) {
        assert!(
            self.s3.object(key).is_some_and(|body| body == data),
            "{key} is not as it should be"
        );
    }
}

#[tokio::test]
async fn put_of_a_small_file_is_one_request() {
    let world = world().await;
    for size in [0, 1, 1000, 5 * MIB - 1, 5 * MIB] {
        let data = noise(size, 1);
        world.client.put("/small", &data).await.unwrap();
        assert_eq!(world.cost(), "1 PutObject", "{size} bytes");
        world.assert_object("alice/small", &data);
    }
}

#[tokio::test]
async fn put_of_a_large_file_is_its_parts_and_two_requests() {
    let world = world().await;
    for (size, parts) in [(5 * MIB + 1, 2), (10 * MIB, 2), (12 * MIB, 3)] {
        let data = noise(size, 2);
        world.client.put("/large", &data).await.unwrap();
        let cost =
            format!("1 CompleteMultipartUpload, 1 CreateMultipartUpload, {parts} UploadPart");
        assert_eq!(world.cost(), cost, "{size} bytes");
        world.assert_object("alice/large", &data);
    }
}

#[tokio::test]
async fn close_fails_if_the_store_refuses() {
    let world = world().await;
    world.s3.put("alice/f", "old");
    world
        .s3
        .fault("PutObject", When::Every, Fault::Status(403, "AccessDenied"));
    world.s3.fault(
        "UploadPart",
        When::Nth(2),
        Fault::Status(403, "AccessDenied"),
    );
    assert_eq!(
        code(world.client.put("/f", b"new").await),
        StatusCode::PermissionDenied
    );
    assert_eq!(world.cost(), "1 PutObject");
    assert_eq!(
        code(world.client.put("/f", &noise(11 * MIB, 1)).await),
        StatusCode::PermissionDenied
    );
    world.s3.assert_no_uploads();
    assert_eq!(world.s3.count("AbortMultipartUpload"), 1);
    world.assert_object("alice/f", b"old");
}

#[tokio::test]
async fn a_disconnect_aborts_the_upload() {
    let world = world().await;
    world.s3.put("alice/f", "old");
    let other = world._server.client().await;
    let handle = other.open("/f", PUT).await.unwrap();
    other.write(&handle, 0, &noise(11 * MIB, 1)).await.unwrap();
    eventually("the upload begins", || world.s3.uploads() == 1).await;
    drop(other);
    eventually("the upload is aborted", || world.s3.uploads() == 0).await;
    world.assert_object("alice/f", b"old");
}

#[tokio::test]
async fn get_is_ranged_gets_without_a_head() {
    let world = world().await;
    let data = noise(3 * MIB, 3);
    world.s3.put("alice/f", data.clone());
    assert_eq!(world.client.get("/f").await.unwrap(), data);
    assert_eq!(world.s3.count("HeadObject"), 0);
    let ranges: Vec<_> = world
        .s3
        .requests()
        .into_iter()
        .filter_map(|request| request.range)
        .collect();
    assert!(
        ranges.len() < 10 && ranges[0] == "bytes=0-262143",
        "{ranges:?}"
    );
    world.s3.reset();

    world.s3.put("alice/small", "abc");
    assert_eq!(world.client.get("/small").await.unwrap(), b"abc");
    assert_eq!(world.cost(), "1 GetObject");
    world.s3.put("alice/empty", "");
    assert_eq!(world.client.get("/empty").await.unwrap(), b"");
    assert_eq!(
        world.cost(),
        "1 GetObject, 1 HeadObject",
        "an empty object has no range"
    );
    assert!(
        world
            .client
            .open("/nothing", OpenFlags::READ)
            .await
            .is_err()
    );
    assert_eq!(world.cost(), "1 GetObject, 1 ListObjectsV2");
}

#[tokio::test]
async fn a_read_of_a_file_that_has_changed_since_open_fails() {
    let world = world().await;
    world.s3.put("alice/f", noise(20 * MIB, 1));
    let handle = world.client.open("/f", OpenFlags::READ).await.unwrap();
    world.client.sftp.read(&handle, 0, 32768).await.unwrap();
    world.s3.put("alice/f", noise(20 * MIB, 2));
    let read = world.client.sftp.read(&handle, 15 << 20, 32768).await;
    assert_eq!(code(read), StatusCode::Failure);
}

#[tokio::test]
async fn a_random_read_fetches_only_its_range() {
    let world = world().await;
    let data = noise(20 * MIB, 1);
    world.s3.put("alice/f", data.clone());
    let handle = world.client.open("/f", OpenFlags::READ).await.unwrap();
    for at in [7 * MIB, MIB, 19 * MIB] {
        world.s3.reset();
        let read = world
            .client
            .sftp
            .read(&handle, at as u64, 4096)
            .await
            .unwrap();
        assert_eq!(read.data, data[at..at + 4096]);
        let ranges: Vec<_> = world
            .s3
            .requests()
            .into_iter()
            .filter_map(|request| request.range)
            .collect();
        assert_eq!(ranges, [format!("bytes={at}-{}", at + 4095)]);
    }
    world.s3.reset();
    assert_eq!(
        code(world.client.sftp.read(&handle, 20 << 20, 4096).await),
        StatusCode::Eof
    );
    assert_eq!(
        code(world.client.sftp.read(&handle, u64::MAX, 4096).await),
        StatusCode::Eof
    );
    assert_eq!(world.cost(), "", "past the end no request is needed");
}

#[tokio::test]
async fn stat_sends_no_more_requests_than_needed() {
    let world = world().await;
    world.s3.put("alice/f", "abc");
    world.s3.put("alice/d/f", "abc");
    assert_eq!(world.client.size("/f").await, Ok(3));
    assert_eq!(world.cost(), "1 HeadObject");
    assert_eq!(world.client.is_dir("/d").await, Ok(true));
    assert_eq!(world.cost(), "1 HeadObject, 1 ListObjectsV2");
    assert_eq!(
        code(world.client.size("/none").await),
        StatusCode::NoSuchFile
    );
    assert_eq!(world.cost(), "1 HeadObject, 1 ListObjectsV2");
    assert_eq!(world.client.is_dir("/").await, Ok(true));
    world.client.mkdir("/made").await.unwrap();
    world.s3.reset();
    assert_eq!(world.client.is_dir("/made").await, Ok(true));
    let handle = world.client.open("/up", PUT).await.unwrap();
    world.client.write(&handle, 0, b"12345").await.unwrap();
    assert_eq!(world.client.size("/up").await, Ok(5));
    assert_eq!(
        world.client.sftp.fstat(&handle).await.unwrap().attrs.size,
        Some(5)
    );
    assert_eq!(world.cost(), "", "what is known needs no request");
}

/// As clients do that show attributes: a stat for each name that was listed.
#[tokio::test]
async fn stat_of_a_name_just_listed_needs_no_request() {
    let world = world().await;
    (0..20).for_each(|n| world.s3.put(&format!("alice/d/{n}"), "x"));
    world.s3.put("alice/d/e/f", "x");
    world.client.list("/d").await.unwrap();
    world.cost();
    for n in 0..20 {
        assert_eq!(world.client.size(&format!("/d/{n}")).await, Ok(1));
    }
    assert_eq!(world.client.is_dir("/d/e").await, Ok(true));
    assert_eq!(world.cost(), "");
    // After a change through this server, by any client, every stat sends a request again.
    world
        ._server
        .client()
        .await
        .put("/d/7", b"four")
        .await
        .unwrap();
    world.cost();
    assert_eq!(world.client.size("/d/7").await, Ok(4));
    assert_eq!(world.client.size("/d/8").await, Ok(1));
    assert_eq!(world.cost(), "2 HeadObject");
    // The page is older than the removal, although it is read after it.
    let directory = world.client.sftp.opendir("/d").await.unwrap().handle;
    world.client.sftp.remove("/d/9").await.unwrap();
    world.client.sftp.readdir(&directory).await.unwrap();
    assert_eq!(
        code(world.client.size("/d/9").await),
        StatusCode::NoSuchFile
    );
    world.client.list("/d").await.unwrap();
    let handle = world.client.open("/d/8", PUT).await.unwrap();
    world
        .client
        .write(&handle, 0, b"four and more")
        .await
        .unwrap();
    assert_eq!(world.client.size("/d/8").await, Ok(13));
}

#[tokio::test]
async fn an_empty_page_need_not_be_the_last() {
    let world = world().await;
    world.s3.begin_lists_empty();
    world.s3.put("alice/d/f", "x");
    assert_eq!(world.client.list("/d").await.unwrap(), ["f 1"]);
    assert_eq!(world.client.is_dir("/d").await, Ok(true));
    assert_eq!(
        code(world.client.sftp.rmdir("/d").await),
        StatusCode::Failure
    );
    assert_eq!(
        code(world.client.list("/none").await),
        StatusCode::NoSuchFile
    );
    world.client.sftp.rename("/d", "/e").await.unwrap();
    assert_eq!(world.s3.objects(), ["alice/e/f"]);
}

#[tokio::test]
async fn without_getobject_permission_stat_uses_a_list() {
    let world = world().await;
    world.s3.put("alice/f", "abc");
    world.s3.put("alice/f-1", "abcd");
    world.s3.put("alice/g/x", "");
    world.s3.fault(
        "HeadObject",
        When::Every,
        Fault::Status(403, "AccessDenied"),
    );
    assert_eq!(world.client.size("/f").await, Ok(3));
    assert_eq!(world.cost(), "1 HeadObject, 1 ListObjectsV2");
    assert_eq!(world.client.is_dir("/g").await, Ok(true));
    assert_eq!(
        code(world.client.size("/none").await),
        StatusCode::NoSuchFile
    );
}

#[tokio::test]
async fn a_file_and_a_directory_of_one_name_are_both_shown() {
    let world = world().await;
    world.s3.put("alice/a", "file");
    world.s3.put("alice/a/b", "inside");
    assert_eq!(world.client.size("/a").await, Ok(4));
    assert_eq!(world.client.list("/").await.unwrap(), ["a 4", "a/"]);
    assert_eq!(world.client.list("/a").await.unwrap(), ["b 6"]);
    assert_eq!(world.client.get("/a/b").await.unwrap(), b"inside");
}

#[tokio::test]
async fn a_listing_is_one_request_per_thousand_entries() {
    let world = world().await;
    for n in 0..2500 {
        world.s3.put(
            &format!("alice/d/{n:05}-with-a-name-that-fills-the-reply"),
            "x",
        );
    }
    assert_eq!(world.client.list("/d").await.unwrap().len(), 2500);
    assert_eq!(world.cost(), "3 ListObjectsV2");
    assert_eq!(
        code(world.client.list("/none").await),
        StatusCode::NoSuchFile
    );
    assert_eq!(world.cost(), "1 ListObjectsV2");
}

/// More names than a page has, alternately in S3 and known only here, some of them both.
#[tokio::test]
async fn a_listing_shows_every_name_once() {
    let world = world().await;
    let mut want = Vec::new();
    for n in 0..1200 {
        world.s3.put(&format!("alice/d/file{n:04}"), "x");
        want.push(format!("file{n:04} 1"));
        let directory = format!("file{n:04}-d");
        world
            .client
            .mkdir(&format!("/d/{directory}"))
            .await
            .unwrap();
        world
            .client
            .mkdir(&format!("/d/{directory}/sub"))
            .await
            .unwrap();
        if n % 3 == 0 {
            world.s3.put(&format!("alice/d/{directory}/in"), "x");
        }
        want.push(format!("{directory}/"));
    }
    let upload = world.client.open("/d/file0500", PUT).await.unwrap();
    want[1000] = "file0500 0".to_owned();
    want.sort();
    assert_eq!(world.client.list("/d").await.unwrap(), want);
    world.client.close(&upload).await.unwrap();
}

/// A user who has more directories open than pages may be kept still reads each to its end.
#[tokio::test]
async fn directories_whose_page_was_dropped_are_read_to_the_end() {
    let world = world().await;
    for n in 0..1500 {
        world.s3.put(&format!("alice/d/{n:0200}"), "x");
    }
    let mut handles = Vec::new();
    for _ in 0..10 {
        handles.push(world.client.sftp.opendir("/d").await.unwrap().handle);
    }
    let mut names = vec![Vec::new(); handles.len()];
    let mut open = handles.len();
    while open > 0 {
        open = 0;
        for (handle, names) in handles.iter().zip(&mut names) {
            if let Ok(page) = world.client.sftp.readdir(handle).await {
                open += 1;
                names.extend(page.files.into_iter().map(|file| file.filename));
            }
        }
    }
    let dots = [".", ".."].map(str::to_owned).into_iter();
    let want: Vec<String> = dots.chain((0..1500).map(|n| format!("{n:0200}"))).collect();
    assert!(names.into_iter().all(|names| names == want));
}

#[tokio::test]
async fn a_listing_shows_markers_virtual_directories_and_uploads() {
    let world = world().await;
    world.s3.put("alice/", "");
    world.s3.put("alice/marked/", "");
    world.s3.put("alice/x//y", "");
    world.s3.put("alice/overwritten", "old");
    world.client.mkdir("/made/deep").await.unwrap();
    let new = world.client.open("/new", PUT).await.unwrap();
    world.client.write(&new, 0, b"12345").await.unwrap();
    let over = world.client.open("/overwritten", PUT).await.unwrap();
    world.client.write(&over, 0, b"1234567").await.unwrap();
    assert_eq!(
        world.client.list("/").await.unwrap(),
        ["made/", "marked/", "new 5", "overwritten 7", "x/"]
    );
    assert_eq!(world.client.list("/made").await.unwrap(), ["deep/"]);
    assert_eq!(world.client.list("/marked").await.unwrap(), [""; 0]);
    assert_eq!(
        world.client.list("/x").await.unwrap(),
        [""; 0],
        "no empty names"
    );
}

#[tokio::test]
async fn mkdir_is_one_list() {
    let world = world().await;
    world.s3.put("alice/f", "");
    world.s3.put("alice/d/x", "");
    let mkdir = async |path: &str| code(world.client.mkdir(path).await);
    assert_eq!(mkdir("/new").await, StatusCode::Ok);
    assert_eq!(world.cost(), "1 ListObjectsV2");
    assert_eq!(mkdir("/no/parent/yet").await, StatusCode::Ok);
    for taken in ["/new", "/f", "/d", "/", "/no"] {
        assert_eq!(mkdir(taken).await, StatusCode::Failure, "{taken}");
    }
    world.s3.reset();
    assert_eq!(
        world.s3.objects(),
        ["alice/d/x", "alice/f"],
        "directories are not stored in S3"
    );
    for n in 0..1001 {
        world.s3.put(&format!("alice/many-{n}"), "");
    }
    world.s3.put("alice/many/x", "");
    assert_eq!(mkdir("/many").await, StatusCode::Failure);
    assert_eq!(world.cost(), "2 ListObjectsV2");
}

#[tokio::test]
async fn rmdir_removes_markers_and_refuses_directories_with_files() {
    let world = world().await;
    world.s3.put("alice/full/x", "");
    world.s3.put("alice/marked/", "");
    let rmdir = async |path: &str| code(world.client.sftp.rmdir(path).await);
    assert_eq!(rmdir("/full").await, StatusCode::Failure);
    assert_eq!(world.cost(), "1 ListObjectsV2");
    assert_eq!(rmdir("/marked").await, StatusCode::Ok);
    assert_eq!(world.cost(), "1 DeleteObject, 1 ListObjectsV2");
    assert_eq!(rmdir("/none").await, StatusCode::NoSuchFile);
    world.client.mkdir("/made").await.unwrap();
    world.s3.reset();
    assert_eq!(rmdir("/made").await, StatusCode::Ok);
    assert_eq!(world.cost(), "1 ListObjectsV2");
    assert_eq!(
        code(world.client.is_dir("/made").await),
        StatusCode::NoSuchFile
    );
    let handle = world.client.open("/up/file", PUT).await.unwrap();
    assert_eq!(
        rmdir("/up").await,
        StatusCode::Failure,
        "an upload to it is in progress"
    );
    world.client.close(&handle).await.unwrap();
    assert_eq!(world.s3.objects(), ["alice/full/x", "alice/up/file"]);
}

#[tokio::test]
async fn remove_is_head_and_delete_and_keeps_the_directory() {
    let world = world().await;
    world.s3.put("alice/d/f", "");
    let remove = async |path: &str| code(world.client.sftp.remove(path).await);
    assert_eq!(remove("/d/f").await, StatusCode::Ok);
    assert_eq!(world.cost(), "1 DeleteObject, 1 HeadObject");
    assert_eq!(world.client.list("/").await.unwrap(), ["d/"]);
    assert_eq!(world.client.is_dir("/d").await, Ok(true));
    assert_eq!(remove("/d/f").await, StatusCode::NoSuchFile);
    assert_eq!(remove("/d").await, StatusCode::Failure);
    world.s3.put("alice/d", "a file of that name");
    assert_eq!(
        world.client.is_dir("/d").await,
        Ok(false),
        "a virtual directory hides no file"
    );
}

#[tokio::test]
async fn rename_of_a_file_is_head_copy_head_and_delete() {
    let world = world().await;
    world.s3.put("alice/a", "A");
    world.s3.put("alice/b", "B");
    assert_eq!(
        code(world.client.sftp.rename("/a", "/b").await),
        StatusCode::Failure,
        "version 3 replaces nothing"
    );
    assert_eq!(world.cost(), "1 HeadObject");
    world
        .client
        .sftp
        .rename("/a", "/odd + %20 ü/c")
        .await
        .unwrap();
    assert_eq!(
        world.cost(),
        "1 CopyObject, 1 DeleteObject, 3 HeadObject, 1 ListObjectsV2"
    );
    world
        .client
        .posix_rename("/odd + %20 ü/c", "/b")
        .await
        .unwrap();
    assert_eq!(world.cost(), "1 CopyObject, 1 DeleteObject, 3 HeadObject");
    world.assert_object("alice/b", b"A");
    assert_eq!(world.s3.objects(), ["alice/b"]);
    assert_eq!(
        code(world.client.posix_rename("/none", "/x").await),
        StatusCode::NoSuchFile
    );
    assert_eq!(
        code(world.client.posix_rename("/b", "/b").await),
        StatusCode::Ok
    );
    world.assert_object("alice/b", b"A");
}

#[tokio::test]
async fn rename_over_the_copy_limit_copies_in_parts() {
    let world = world().await;
    world
        .s3
        .put("alice/a", "A sentence that is too long to copy.");
    world.s3.set_copy_limit(10);
    world.s3.set_min_part(1);
    world.client.posix_rename("/a", "/b").await.unwrap();
    let cost = "1 CompleteMultipartUpload, 1 CopyObject, 1 CreateMultipartUpload, 1 DeleteObject, 3 HeadObject, 1 UploadPartCopy";
    assert_eq!(world.cost(), cost);
    world.assert_object("alice/b", b"A sentence that is too long to copy.");
    world.s3.fault(
        "UploadPartCopy",
        When::Every,
        Fault::Status(403, "AccessDenied"),
    );
    assert_eq!(
        code(world.client.posix_rename("/b", "/c").await),
        StatusCode::PermissionDenied
    );
    world.s3.assert_no_uploads();
    assert_eq!(world.s3.objects(), ["alice/b"]);
}

#[tokio::test]
async fn rename_of_a_directory_moves_all_or_nothing() {
    let world = world().await;
    let keys: Vec<String> = (0..40).map(|n| format!("alice/d/{n:02}")).collect();
    keys.iter().for_each(|key| world.s3.put(key, key.clone()));
    world.client.mkdir("/d/empty").await.unwrap();
    world.s3.put("alice/taken/x", "");
    assert_eq!(
        code(world.client.sftp.rename("/d", "/taken").await),
        StatusCode::Failure
    );
    assert_eq!(
        code(world.client.sftp.rename("/d", "/d/inside").await),
        StatusCode::Failure
    );
    world.s3.fault(
        "CopyObject",
        When::Nth(30),
        Fault::Status(403, "AccessDenied"),
    );
    assert_eq!(
        code(world.client.sftp.rename("/d", "/e").await),
        StatusCode::PermissionDenied
    );
    let before: Vec<String> = keys
        .iter()
        .cloned()
        .chain(["alice/taken/x".to_owned()])
        .collect();
    assert_eq!(
        world.s3.objects(),
        before,
        "every source stays, no copy does"
    );
    world.s3.clear_faults();
    world.client.sftp.rename("/d", "/e").await.unwrap();
    assert_eq!(world.client.list("/e").await.unwrap().len(), 41);
    world.assert_object("alice/e/07", b"alice/d/07");
    assert_eq!(
        code(world.client.is_dir("/d").await),
        StatusCode::NoSuchFile
    );
    world.s3.assert_no_uploads();
}

#[tokio::test]
async fn setstat_is_accepted_for_existing_paths() {
    let world = world().await;
    world.s3.put("alice/f", "abc");
    world.s3.put("alice/d/f", "abc");
    let attrs = FileAttributes {
        permissions: Some(0o600),
        mtime: Some(1),
        atime: Some(1),
        ..Default::default()
    };
    let handle = world.client.open("/g", PUT).await.unwrap();
    world
        .client
        .sftp
        .fsetstat(&handle, attrs.clone())
        .await
        .unwrap();
    world
        .client
        .sftp
        .setstat("/g", attrs.clone())
        .await
        .unwrap();
    assert_eq!(world.cost(), "", "what is known needs no request");
    world
        .client
        .sftp
        .setstat("/f", attrs.clone())
        .await
        .unwrap();
    assert_eq!(world.cost(), "1 HeadObject");
    world
        .client
        .sftp
        .setstat("/d", attrs.clone())
        .await
        .unwrap();
    world.s3.reset();
    assert_eq!(
        code(world.client.sftp.setstat("/none", attrs.clone()).await),
        StatusCode::NoSuchFile
    );
    assert_eq!(world.cost(), "1 HeadObject, 1 ListObjectsV2");
    let reader = world._server.client_as("reader").await;
    assert_eq!(
        code(reader.sftp.setstat("/f", attrs.clone()).await),
        StatusCode::PermissionDenied
    );
    let handle = reader.open("/f", OpenFlags::READ).await.unwrap();
    assert_eq!(
        code(reader.sftp.fsetstat(&handle, attrs).await),
        StatusCode::PermissionDenied
    );
    world.s3.reset();
    let size = |size| FileAttributes {
        size: Some(size),
        ..Default::default()
    };
    assert_eq!(
        code(world.client.sftp.setstat("/f", size(3)).await),
        StatusCode::Ok
    );
    assert_eq!(
        code(world.client.sftp.setstat("/f", size(2)).await),
        StatusCode::OpUnsupported
    );
    world.assert_object("alice/f", b"abc");
    assert_eq!(
        code(world.client.sftp.setstat("/f", size(0)).await),
        StatusCode::Ok
    );
    world.assert_object("alice/f", b"");
}

#[tokio::test]
async fn links_are_unsupported() {
    let world = world().await;
    assert_eq!(
        code(world.client.sftp.symlink("/a", "/b").await),
        StatusCode::OpUnsupported
    );
    assert_eq!(
        code(world.client.sftp.readlink("/a").await),
        StatusCode::OpUnsupported
    );
    assert_eq!(
        code(world.client.sftp.hardlink("/a", "/b").await),
        StatusCode::OpUnsupported
    );
    assert_eq!(world.cost(), "");
}

#[tokio::test]
async fn excl_fails_at_open_for_an_existing_file_and_at_close_after_a_race() {
    let world = world().await;
    world.s3.put("alice/f", "old");
    let excl = OpenFlags::WRITE | OpenFlags::CREATE | OpenFlags::EXCLUDE;
    assert_eq!(
        code(world.client.open("/f", excl).await),
        StatusCode::Failure
    );
    for size in [3, 6 * MIB] {
        let handle = world.client.open("/raced", excl).await.unwrap();
        world
            .client
            .write(&handle, 0, &noise(size, 1))
            .await
            .unwrap();
        world.s3.put("alice/raced", "winner");
        assert_eq!(
            code(world.client.close(&handle).await),
            StatusCode::Failure,
            "{size}"
        );
        world.assert_object("alice/raced", b"winner");
        world.s3.assert_no_uploads();
        world.client.sftp.remove("/raced").await.unwrap();
    }
    let handle = world.client.open("/new", excl).await.unwrap();
    world.client.write(&handle, 0, b"new").await.unwrap();
    world.client.close(&handle).await.unwrap();
    world.assert_object("alice/new", b"new");
}

#[tokio::test]
async fn excl_fails_if_a_directory_has_the_name() {
    let world = world().await;
    world.s3.put("alice/d/f", "");
    let excl = OpenFlags::WRITE | OpenFlags::CREATE | OpenFlags::EXCLUDE;
    assert_eq!(
        code(world.client.open("/d", excl).await),
        StatusCode::Failure
    );
    assert_eq!(world.cost(), "1 HeadObject, 1 ListObjectsV2");
}

#[tokio::test]
async fn rmdir_keeps_a_marker_that_has_content() {
    let world = world().await;
    world.s3.put("alice/d/", "content");
    assert_eq!(
        code(world.client.sftp.rmdir("/d").await),
        StatusCode::Failure
    );
    world.assert_object("alice/d/", b"content");
}

#[tokio::test]
async fn a_rename_whose_copy_is_missing_keeps_its_source() {
    let world = world().await;
    world.s3.put("alice/a", "new");
    world.s3.put("alice/b", "old");
    world
        .s3
        .fault("CopyObject", When::Every, Fault::WithoutEffect);
    assert_eq!(
        code(world.client.posix_rename("/a", "/b").await),
        StatusCode::Failure
    );
    assert_eq!(world.cost(), "2 CopyObject, 4 HeadObject");
    world.assert_object("alice/a", b"new");
    world.assert_object("alice/b", b"old");
    world.s3.clear_faults();
    world
        .s3
        .fault("CopyObject", When::Nth(1), Fault::WithoutEffect);
    world.client.posix_rename("/a", "/b").await.unwrap();
    world.assert_object("alice/b", b"new");
    assert_eq!(world.s3.objects(), ["alice/b"]);
    world.s3.clear_faults();

    for name in ["f", "g"] {
        world.s3.put(&format!("alice/d/{name}"), name);
    }
    world
        .s3
        .fault("CopyObject", When::From(2), Fault::WithoutEffect);
    assert_eq!(
        code(world.client.sftp.rename("/d", "/e").await),
        StatusCode::Failure
    );
    assert_eq!(world.s3.objects(), ["alice/b", "alice/d/f", "alice/d/g"]);
}

#[tokio::test]
async fn an_append_to_a_file_wrongly_reported_missing_replaces_nothing() {
    let world = world().await;
    world.s3.put("alice/log", "a year of it");
    for (flags, tail) in [(OpenFlags::APPEND, 4), (OpenFlags::CREATE, 6 * MIB)] {
        world
            .s3
            .fault("HeadObject", When::Nth(1), Fault::Status(404, "NoSuchKey"));
        let handle = world
            .client
            .open("/log", OpenFlags::WRITE | OpenFlags::CREATE | flags)
            .await
            .unwrap();
        world
            .client
            .write(&handle, 0, &noise(tail, 1))
            .await
            .unwrap();
        assert_eq!(code(world.client.close(&handle).await), StatusCode::Failure);
        world.s3.clear_faults();
        world.assert_object("alice/log", b"a year of it");
        world.s3.assert_no_uploads();
    }
}

#[tokio::test]
async fn names_that_xml_cannot_carry_are_listed_and_used() {
    let world = world().await;
    let controls = (1..=0x1F)
        .filter_map(char::from_u32)
        .map(|c| format!("x{c}y"));
    let odd = [
        "\u{FFFE}",
        "\u{7F}",
        "two  blanks",
        " edge ",
        "100%",
        "%41",
        "a+b",
        "+",
        "&amp;",
        "<x>",
    ]
    .map(str::to_owned);
    let names: Vec<String> = controls.chain(odd).collect();
    for name in &names {
        world
            .client
            .put(&format!("/d/{name}"), name.as_bytes())
            .await
            .unwrap();
        assert!(
            world.s3.object(&format!("alice/d/{name}")).is_some(),
            "{name:?}"
        );
    }
    let mut want: Vec<String> = names
        .iter()
        .map(|name| format!("{name} {}", name.len()))
        .collect();
    want.sort();
    assert_eq!(world.client.list("/d").await.unwrap(), want);
    world.client.sftp.rename("/d", "/e\u{1}+ %").await.unwrap();
    assert_eq!(world.client.list("/").await.unwrap(), ["e\u{1}+ %/"]);
    for name in &names {
        let path = format!("/e\u{1}+ %/{name}");
        assert_eq!(
            world.client.get(&path).await.unwrap(),
            name.as_bytes(),
            "{name:?}"
        );
        world.client.posix_rename(&path, "/moved").await.unwrap();
        world.client.sftp.remove("/moved").await.unwrap();
    }
    assert_eq!(world.s3.objects(), [""; 0]);
}

#[tokio::test]
async fn announced_extensions_work() {
    let world = world().await;
    let limits = world.client.sftp.limits().await.unwrap();
    assert_eq!(
        (limits.max_read_len, limits.max_write_len),
        (255 * 1024, 255 * 1024)
    );
    let statvfs = world.client.sftp.statvfs("/").await.unwrap();
    assert!(statvfs.blocks_avail > 1 << 30);
    assert_eq!(statvfs.name_max, 255);
    let handle = world.client.sftp.opendir("/").await.unwrap().handle;
    let fstatvfs = world
        .client
        .sftp
        .extended("fstatvfs@openssh.com", text(&handle))
        .await
        .unwrap();
    assert!(
        matches!(&fstatvfs, Packet::ExtendedReply(reply) if reply.data.len() == 11 * 8),
        "{fstatvfs:?}"
    );
    let closed = world
        .client
        .sftp
        .extended("fstatvfs@openssh.com", text("closed"))
        .await
        .unwrap();
    assert!(
        matches!(&closed, Packet::Status(status) if status.status_code == StatusCode::Failure),
        "{closed:?}"
    );
    world.s3.reset();
    for (path, want) in [
        ("~", "/"),
        ("~/x/../y", "/y"),
        ("/a/./b", "/a/b"),
        ("c", "/c"),
    ] {
        let expanded = world.client.sftp.expand_path(path).await.unwrap();
        assert_eq!(expanded.files[0].filename, want);
    }
    assert_eq!(
        world
            .client
            .sftp
            .realpath("a/../../b//c")
            .await
            .unwrap()
            .files[0]
            .filename,
        "/b/c"
    );
    assert_eq!(world.cost(), "");
}
