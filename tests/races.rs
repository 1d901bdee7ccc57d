//! The promises between clients: two sessions of one server, on a store that honours conditions and
//! on one that ignores them, and two servers on a store that honours them.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use russh_sftp::protocol::{OpenFlags, StatusCode};
use sftpd::store::KeptConditions;
use sftpd::store::s3::S3Store;
use std::sync::Arc;
use std::time::Duration;
use support::s3::{FakeS3, Fault, When};
use support::server::typed_s3_store;
use support::*;
use tokio::sync::Notify;

const EXCL: OpenFlags = PUT.union(OpenFlags::EXCLUDE);
const APPEND: OpenFlags = OpenFlags::WRITE
    .union(OpenFlags::CREATE)
    .union(OpenFlags::APPEND);

/// Two clients, the server or servers between them, and the bucket.
struct World {
    s3: FakeS3,
    one: Arc<Client>,
    two: Arc<Client>,
    _servers: Vec<Server>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Setting {
    OneServer,
    OneServerWithoutConditions,
    TwoServers,
}

const SETTINGS: [Setting; 3] = [
    Setting::OneServer,
    Setting::OneServerWithoutConditions,
    Setting::TwoServers,
];

impl World {
    async fn new(setting: Setting) -> World {
        let s3 = FakeS3::start().await;
        let mut servers = vec![];
        match setting {
            Setting::OneServer => servers.push(Server::start(s3_store(&s3)).await),
            Setting::OneServerWithoutConditions => {
                s3.ignore_conditions();
                let store =
                    typed_s3_store(&s3, |config| config).with_conditions(KeptConditions::NONE);
                servers.push(Server::start(Arc::new(store)).await);
            }
            Setting::TwoServers => {
                servers.push(Server::start(s3_store(&s3)).await);
                servers.push(Server::start(s3_store(&s3)).await);
            }
        }
        let one = Arc::new(servers[0].client().await);
        let two = Arc::new(servers[servers.len() - 1].client().await);
        World {
            s3,
            one,
            two,
            _servers: servers,
        }
    }

    fn content(&self, name: &str) -> Option<String> {
        let bytes = self.s3.object(&format!("alice/{name}"))?;
        Some(String::from_utf8(bytes.to_vec()).unwrap())
    }
}

async fn rename(client: Arc<Client>, from: &'static str, to: &'static str) -> StatusCode {
    code(client.sftp.rename(from, to).await)
}

#[tokio::test]
async fn of_two_renames_to_one_name_one_wins() {
    for setting in SETTINGS {
        for round in 0..10 {
            let world = World::new(setting).await;
            // As close together as possible, or with a store that is slow.
            if round % 2 == 1 {
                world.s3.fault(
                    "CopyObject",
                    When::Every,
                    Fault::Stall(Duration::from_millis(20)),
                );
            }
            world.s3.put("alice/a", "A");
            world.s3.put("alice/b", "B");
            let (a, b) = tokio::join!(
                rename(world.one.clone(), "/a", "/t"),
                rename(world.two.clone(), "/b", "/t")
            );
            let found = (world.content("a"), world.content("b"), world.content("t"));
            let (text_a, text_b) = (Some("A".to_owned()), Some("B".to_owned()));
            match (a, b) {
                (StatusCode::Ok, StatusCode::Failure) => {
                    assert_eq!(found, (None, text_b, text_a), "{setting:?}")
                }
                (StatusCode::Failure, StatusCode::Ok) => {
                    assert_eq!(found, (text_a, None, text_b), "{setting:?}")
                }
                both => panic!("{setting:?}: {both:?} {found:?}"),
            }
        }
    }
}

/// This is how workers claim a job.
#[tokio::test]
async fn of_two_renames_of_one_file_one_wins() {
    for setting in SETTINGS {
        for round in 0..10 {
            let world = World::new(setting).await;
            if round % 2 == 1 {
                world.s3.fault(
                    "CopyObject",
                    When::Every,
                    Fault::Stall(Duration::from_millis(20)),
                );
            }
            world.s3.put("alice/job", "job");
            let (a, b) = tokio::join!(
                rename(world.one.clone(), "/job", "/a"),
                rename(world.two.clone(), "/job", "/b")
            );
            let winner = match (a, b) {
                (StatusCode::Ok, StatusCode::NoSuchFile) => "alice/a",
                (StatusCode::NoSuchFile, StatusCode::Ok) => "alice/b",
                both => panic!("{setting:?}: {both:?}"),
            };
            assert_eq!(world.s3.objects(), [winner], "{setting:?}");
        }
    }
}

#[tokio::test]
async fn a_rename_deletes_no_file_that_is_stored_during_it() {
    for setting in SETTINGS {
        for replace in [false, true] {
            for (source, target, key, copy) in [("/x", "/y", "x", "y"), ("/d", "/e", "d/x", "e/x")]
            {
                let world = World::new(setting).await;
                world.s3.put(&format!("alice/{key}"), "version 1");
                let hold = Arc::new(Notify::new());
                world
                    .s3
                    .fault("DeleteObject", When::Every, Fault::Hold(hold.clone()));
                let one = world.one.clone();
                let renaming = tokio::spawn(async move {
                    match replace {
                        true => code(one.posix_rename(source, target).await),
                        false => code(one.sftp.rename(source, target).await),
                    }
                });
                eventually("the copy is made", || world.s3.count("DeleteObject") == 1).await;
                world.s3.clear_faults();
                let (two, path) = (world.two.clone(), format!("/{key}"));
                let putting = tokio::spawn(async move { code(two.put(&path, b"version 2").await) });
                if setting == Setting::TwoServers {
                    eventually("it is stored", || {
                        world.content(key).as_deref() == Some("version 2")
                    })
                    .await;
                }
                hold.notify_one();
                assert_eq!(
                    within("the rename", renaming).await.unwrap(),
                    StatusCode::Ok,
                    "{setting:?}"
                );
                assert_eq!(
                    within("the put", putting).await.unwrap(),
                    StatusCode::Ok,
                    "{setting:?}"
                );
                let (old, new) = (world.content(key), world.content(copy));
                let found = (old.as_deref(), new.as_deref());
                match setting {
                    // The put waits for the rename.
                    Setting::OneServer | Setting::OneServerWithoutConditions => {
                        assert_eq!(
                            found,
                            (Some("version 2"), Some("version 1")),
                            "{setting:?} {replace} {source}"
                        );
                    }
                    // The put comes first: the rename finds the new file, and moves it.
                    Setting::TwoServers => {
                        assert_eq!(
                            found,
                            (None, Some("version 2")),
                            "{setting:?} {replace} {source}"
                        );
                    }
                }
            }
        }
    }
}

/// The store answers the copy with SlowDown until the rename fails, and meanwhile another client
/// stores a file of the same size.
#[tokio::test]
async fn a_failed_rename_keeps_what_another_client_has_stored() {
    for setting in SETTINGS {
        let world = World::new(setting).await;
        world.s3.put("alice/a", "8 bytes.");
        world
            .s3
            .fault("CopyObject", When::Every, Fault::Status(503, "SlowDown"));
        let renaming = tokio::spawn(rename(world.one.clone(), "/a", "/t"));
        eventually("the copy is tried", || world.s3.count("CopyObject") > 0).await;
        let two = world.two.clone();
        let putting = tokio::spawn(async move { code(two.put("/t", b"8 others").await) });
        assert_eq!(
            within("the rename", renaming).await.unwrap(),
            StatusCode::Failure,
            "{setting:?}"
        );
        assert_eq!(
            within("the put", putting).await.unwrap(),
            StatusCode::Ok,
            "{setting:?}"
        );
        assert_eq!(
            world.content("t").as_deref(),
            Some("8 others"),
            "{setting:?}"
        );
        assert_eq!(
            world.content("a").as_deref(),
            Some("8 bytes."),
            "{setting:?}"
        );
    }
}

/// One of many copies is refused, after another client has replaced one of the others by equal
/// content.
#[tokio::test]
async fn a_failed_rename_of_a_directory_keeps_what_another_client_has_stored() {
    for setting in SETTINGS {
        let world = World::new(setting).await;
        (0..20).for_each(|n| world.s3.put(&format!("alice/d/{n:02}"), ""));
        let hold = Arc::new(Notify::new());
        world
            .s3
            .fault("CopyObject", When::Nth(20), Fault::Hold(hold.clone()));
        let renaming = tokio::spawn(rename(world.one.clone(), "/d", "/e"));
        eventually("all but one are copied", || world.s3.objects().len() == 39).await;
        world.s3.clear_faults();
        let made: Vec<String> = world
            .s3
            .objects()
            .into_iter()
            .filter(|key| key.starts_with("alice/e/"))
            .collect();
        let replaced = made[0].strip_prefix("alice").unwrap().to_owned();
        let missing = (0..20)
            .map(|n| format!("alice/e/{n:02}"))
            .find(|key| !made.contains(key))
            .unwrap();
        let (two, path) = (world.two.clone(), replaced.clone());
        let putting = tokio::spawn(async move { code(two.put(&path, b"").await) });
        if setting == Setting::TwoServers {
            eventually("it is stored", || world.s3.count("PutObject") > 0).await;
            // The last copy finds its name taken.
            world.s3.put(&missing, "theirs");
        } else {
            // The last source is gone before it is copied.
            world.s3.remove(&missing.replace("/e/", "/d/"));
        }
        hold.notify_one();
        assert_ne!(
            within("the rename", renaming).await.unwrap(),
            StatusCode::Ok,
            "{setting:?}"
        );
        assert_eq!(
            within("the put", putting).await.unwrap(),
            StatusCode::Ok,
            "{setting:?}"
        );
        let left = world.s3.object(&format!("alice{replaced}"));
        assert!(left.is_some(), "{setting:?}: what was put is gone");
    }
}

#[tokio::test]
async fn of_two_exclusive_creations_one_wins() {
    for setting in SETTINGS {
        for size in [0, 12, 6 * MIB] {
            for round in 0..3 {
                let world = World::new(setting).await;
                let data = noise(size, 1);
                let create = async |client: Arc<Client>| {
                    let handle = client.open("/lock", EXCL).await?;
                    client.write(&handle, 0, &data).await?;
                    if round == 0 {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    client.close(&handle).await
                };
                let (one, two) = tokio::join!(create(world.one.clone()), create(world.two.clone()));
                let winners = usize::from(one.is_ok()) + usize::from(two.is_ok());
                assert_eq!(winners, 1, "{setting:?}, {size} bytes: {one:?} {two:?}");
                world.s3.assert_no_uploads();
            }
        }
    }
}

/// The first answer to the winner is lost: the file that is there is its own, whatever the ETag is.
#[tokio::test]
async fn an_exclusive_creation_whose_answer_was_lost_succeeds() {
    for (setting, is_encrypted) in SETTINGS
        .into_iter()
        .flat_map(|setting| [(setting, false), (setting, true)])
    {
        for (size, operation) in [
            (0, "PutObject"),
            (12, "PutObject"),
            (6 * MIB, "CompleteMultipartUpload"),
        ] {
            let world = World::new(setting).await;
            if is_encrypted {
                world.s3.encrypt();
            }
            world.s3.fault(operation, When::Nth(1), Fault::LostAnswer);
            let handle = world.one.open("/lock", EXCL).await.unwrap();
            world.one.write(&handle, 0, &noise(size, 1)).await.unwrap();
            assert_eq!(
                code(world.one.close(&handle).await),
                StatusCode::Ok,
                "{setting:?} {size}"
            );
            assert_eq!(
                code(world.two.open("/lock", EXCL).await),
                StatusCode::Failure,
                "{setting:?} {size}"
            );
        }
    }
}

#[tokio::test]
async fn no_append_that_was_answered_ok_gets_lost() {
    for setting in SETTINGS {
        for base in ["base\n".to_owned(), "x".repeat(6 * MIB)] {
            let world = World::new(setting).await;
            world.s3.put("alice/log", base.clone());
            let append = async |client: &Client, line: &[u8]| {
                let handle = client.open("/log", APPEND).await?;
                client.write(&handle, 0, line).await?;
                Ok::<_, Failed>(handle)
            };
            let one = append(&world.one, b"line of one\n").await.unwrap();
            let two = append(&world.two, b"line of two\n").await.unwrap();
            assert_eq!(
                code(world.one.close(&one).await),
                StatusCode::Ok,
                "{setting:?}"
            );
            assert_eq!(
                code(world.two.close(&two).await),
                StatusCode::Failure,
                "{setting:?}"
            );
            assert_eq!(
                world.content("log"),
                Some(format!("{base}line of one\n")),
                "{setting:?}"
            );
            // The client that was refused tries again.
            let two = append(&world.two, b"line of two\n").await.unwrap();
            assert_eq!(
                code(world.two.close(&two).await),
                StatusCode::Ok,
                "{setting:?}"
            );
            assert_eq!(
                world.content("log"),
                Some(format!("{base}line of one\nline of two\n")),
                "{setting:?}"
            );
            world.s3.assert_no_uploads();
        }
    }
}

/// An edit is based on the object at OPEN, not on what another program has stored since.
#[tokio::test]
async fn an_edit_does_not_replace_a_newer_object() {
    for setting in SETTINGS {
        let world = World::new(setting).await;
        world.s3.put("alice/f", "old");
        let handle = world
            .one
            .open("/f", OpenFlags::READ | OpenFlags::WRITE)
            .await
            .unwrap();
        world.one.write(&handle, 0, b"edited").await.unwrap();
        world.s3.put("alice/f", "new");
        assert_eq!(
            code(world.one.close(&handle).await),
            StatusCode::Failure,
            "{setting:?}"
        );
        assert_eq!(world.content("f").as_deref(), Some("new"), "{setting:?}");
    }
}

/// Content-Type and metadata survive appends and a rename.
#[tokio::test]
async fn edits_and_renames_keep_content_type_and_metadata() {
    for setting in SETTINGS {
        let world = World::new(setting).await;
        world
            .s3
            .put_described("alice/f", "old", "text/csv", &[("owner", "alice")]);
        for _ in 0..2 {
            let handle = world.one.open("/f", APPEND).await.unwrap();
            world.one.write(&handle, 0, b" and more").await.unwrap();
            world.one.close(&handle).await.unwrap();
        }
        world.one.sftp.rename("/f", "/g").await.unwrap();
        let (content_type, metadata) = world.s3.description("alice/g");
        assert_eq!(content_type.as_deref(), Some("text/csv"), "{setting:?}");
        assert_eq!(
            metadata.get("owner").map(String::as_str),
            Some("alice"),
            "{setting:?}"
        );
        assert_eq!(world.content("g").as_deref(), Some("old and more and more"));
    }
}

/// Which conditions a store honours is detected, not configured.
#[tokio::test]
async fn the_conditions_that_a_store_honours_are_detected() {
    let s3 = FakeS3::start().await;
    let store: S3Store = typed_s3_store(&s3, |config| config);
    let prefix = sftpd::store::Key::new("in/").unwrap();
    assert_eq!(
        store.find_conditions(&prefix).await,
        Ok(KeptConditions::ALL)
    );
    assert_eq!(s3.objects(), [""; 0]);
    s3.ignore_conditions();
    assert_eq!(
        store.find_conditions(&prefix).await,
        Ok(KeptConditions::NONE)
    );
    assert_eq!(s3.objects(), [""; 0]);
    s3.assert_no_uploads();
}

/// A CLOSE that fails waits for an abort. Requests sent after it wait until then.
#[tokio::test]
async fn a_rename_after_a_failing_close_waits_for_the_abort() {
    let world = World::new(Setting::OneServer).await;
    let hold = Arc::new(Notify::new());
    world.s3.fault(
        "CompleteMultipartUpload",
        When::Every,
        Fault::Status(403, "AccessDenied"),
    );
    world.s3.fault(
        "AbortMultipartUpload",
        When::Every,
        Fault::Hold(hold.clone()),
    );
    let handle = world.one.open("/new", PUT).await.unwrap();
    world
        .one
        .write(&handle, 0, &noise(6 * MIB, 1))
        .await
        .unwrap();
    let (one, two) = (world.one.clone(), world.one.clone());
    let closing = tokio::spawn(async move { one.close(&handle).await });
    eventually("the abort is asked for", || {
        world
            .s3
            .requests()
            .iter()
            .any(|r| r.op == "AbortMultipartUpload")
    })
    .await;
    let mut renaming = tokio::spawn(rename(two, "/new", "/f"));
    let answered = tokio::time::timeout(Duration::from_millis(300), &mut renaming).await;
    assert!(
        answered.is_err(),
        "the rename waits for the CLOSE: {answered:?}"
    );
    hold.notify_one();
    assert_eq!(
        code(within("close", closing).await.unwrap()),
        StatusCode::PermissionDenied
    );
    assert_eq!(
        within("rename", renaming).await.unwrap(),
        StatusCode::NoSuchFile
    );
    world.s3.assert_no_uploads();
}
