//! The server on stores that are not S3: one that renames by itself, one that brings nothing but
//! what it must, and one that hangs.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use bytes::Bytes;
use russh::ChannelMsg;
use russh_sftp::protocol::{OpenFlags, StatusCode};
use sftpd::store::memory::MemoryStore;
use sftpd::store::{Attributes, Condition, Key, Limits, Store, StoreError};
use sftpd::users::{Access, Attempt, Login, UserList};
use std::future::pending;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use support::s3::FakeS3;
use support::server::{account, has_password};
use support::stores::{Hooked, NineMethods};
use support::*;

/// A store whose renames fail after this many.
fn store_that_renames(times: usize) -> Hooked {
    let renames = AtomicUsize::new(0);
    Hooked::new(move |method| {
        let is_too_much = method == "rename" && renames.fetch_add(1, Ordering::Relaxed) == times;
        Box::pin(async move {
            match is_too_much {
                true => Err(StoreError::Other("the test wants it".to_owned())),
                false => Ok(()),
            }
        })
    })
}

#[tokio::test]
async fn a_store_that_can_rename_is_asked_to() {
    let store = Hooked::new(|method| {
        assert!(
            !matches!(method, "copy" | "copy_part" | "delete"),
            "{method}"
        );
        Box::pin(async { Ok(()) })
    });
    let server = Server::start(Arc::new(store)).await;
    let client = server.client().await;
    client.put("/old", b"content").await.unwrap();
    client.sftp.rename("/old", "/new").await.unwrap();
    assert_eq!(client.get("/new").await.unwrap(), b"content");
    assert_eq!(code(client.size("/old").await), StatusCode::NoSuchFile);
    client.put("/other", b"replaced").await.unwrap();
    let taken = client.sftp.rename("/new", "/other").await;
    assert_eq!(code(taken), StatusCode::Failure);
    client.posix_rename("/new", "/other").await.unwrap();
    assert_eq!(client.get("/other").await.unwrap(), b"content");
    for name in ["a", "b", "deeper/c"] {
        client
            .put(&format!("/d/{name}"), name.as_bytes())
            .await
            .unwrap();
    }
    client.sftp.rename("/d", "/e").await.unwrap();
    assert_eq!(client.get("/e/deeper/c").await.unwrap(), b"deeper/c");
    assert_eq!(client.list("/e").await.unwrap().len(), 3);
    assert_eq!(code(client.size("/d/a").await), StatusCode::NoSuchFile);
}

#[tokio::test]
async fn files_that_were_moved_are_moved_back_if_their_directory_cannot_be() {
    let server = Server::start(Arc::new(store_that_renames(3))).await;
    let client = server.client().await;
    let names: Vec<String> = (0..5).map(|n| format!("/d/{n}")).collect();
    for name in &names {
        client.put(name, name.as_bytes()).await.unwrap();
    }
    let refused = client.sftp.rename("/d", "/e").await;
    assert_eq!(code(refused), StatusCode::Failure);
    for name in &names {
        assert_eq!(client.get(name).await.unwrap(), name.as_bytes());
    }
    assert_eq!(code(client.list("/e").await), StatusCode::NoSuchFile);
    // Without the failure it works.
    client.sftp.rename("/d", "/e").await.unwrap();
    assert_eq!(client.list("/e").await.unwrap().len(), 5);
}

/// The answers to some renames are lost, and another one fails or none does: all files have their
/// new names, or all their old ones.
#[tokio::test]
async fn a_rename_whose_answer_was_lost_counts_as_done_if_it_was() {
    for fails in [None, Some(12)] {
        let begun = AtomicUsize::new(0);
        let done = AtomicUsize::new(0);
        let store = Hooked::new(move |method| {
            let is_chosen =
                method == "rename" && Some(begun.fetch_add(1, Ordering::Relaxed)) == fails;
            Box::pin(async move {
                match is_chosen {
                    true => Err(StoreError::Other("the test wants it".to_owned())),
                    false => Ok(()),
                }
            })
        });
        let store = store.after_rename(move |_| {
            let is_lost = done.fetch_add(1, Ordering::Relaxed) % 5 == 2;
            Box::pin(async move {
                match is_lost {
                    true => Err(StoreError::Unknown("the answer was lost".to_owned())),
                    false => Ok(()),
                }
            })
        });
        let server = Server::start(Arc::new(store)).await;
        let client = server.client().await;
        for n in 0..20 {
            let name = format!("/d/{n}");
            client.put(&name, name.as_bytes()).await.unwrap();
        }
        let renamed = client.sftp.rename("/d", "/e").await;
        let (expected, there, gone) = match fails {
            None => (StatusCode::Ok, "/e", "/d"),
            Some(_) => (StatusCode::Failure, "/d", "/e"),
        };
        assert_eq!(code(renamed), expected);
        for n in 0..20 {
            let content = client.get(&format!("{there}/{n}")).await.unwrap();
            assert_eq!(content, format!("/d/{n}").as_bytes());
            let gone = client.size(&format!("{gone}/{n}")).await;
            assert_eq!(code(gone), StatusCode::NoSuchFile);
        }
    }
}

/// Copies go through the server: small ones in one request, large ones in parts.
#[tokio::test]
async fn the_server_copies_for_a_store_that_cannot() {
    let store = Arc::new(NineMethods::<MemoryStore>::default());
    let server = Server::start(store.clone()).await;
    let client = server.client().await;
    for size in [0, 1000, 12 * MIB] {
        let data = noise(size, 1);
        client.put("/old", &data).await.unwrap();
        client.sftp.rename("/old", "/new").await.unwrap();
        assert!(client.get("/new").await.unwrap() == data, "{size}");
        assert_eq!(code(client.size("/old").await), StatusCode::NoSuchFile);
        let append = OpenFlags::WRITE | OpenFlags::APPEND;
        let handle = client.open("/new", append).await.unwrap();
        client.write(&handle, 0, b"the end").await.unwrap();
        client.close(&handle).await.unwrap();
        let longer = [&data[..], b"the end"].concat();
        assert!(client.get("/new").await.unwrap() == longer, "{size}");
        client.sftp.remove("/new").await.unwrap();
        assert_eq!(store.store.uploads(), 0);
    }
}

/// A listing does not have the attributes: they are looked up.
#[tokio::test]
async fn a_directory_whose_files_are_copied_in_parts_keeps_their_attributes() {
    let store = Arc::new(NineMethods::<MemoryStore>::default());
    let mut attributes = Attributes::default();
    attributes.content_type = Some("video/mp4".to_owned());
    attributes
        .metadata
        .insert("owner".to_owned(), "alice".to_owned());
    attributes.storage_class = Some("STANDARD_IA".to_owned());
    let video = Key::new("alice/d/video.mp4").unwrap();
    let data = noise(6 * MIB, 1);
    let put = store
        .put(&video, data.clone(), &attributes, &Condition::None)
        .await;
    put.unwrap();
    let server = Server::start(store.clone()).await;
    let client = server.client().await;
    client.sftp.rename("/d", "/e").await.unwrap();
    assert!(client.get("/e/video.mp4").await.unwrap() == data);
    let moved = Key::new("alice/e/video.mp4").unwrap();
    let moved = store.head(&moved).await.unwrap();
    assert_eq!(moved.attributes.as_deref(), Some(&attributes));

    let s3 = FakeS3::start().await;
    s3.set_copy_limit(MIB as u64);
    s3.put_described("alice/d/f", data, "video/mp4", &[("owner", "alice")]);
    let server = Server::start(s3_store(&s3)).await;
    let client = server.client().await;
    client.sftp.rename("/d", "/e").await.unwrap();
    let (content_type, metadata) = s3.description("alice/e/f");
    assert_eq!(content_type.as_deref(), Some("video/mp4"));
    assert_eq!(metadata.get("owner").map(String::as_str), Some("alice"));
}

/// A file that is replaced between the two requests of the default `open`, once and always.
#[tokio::test]
async fn a_file_that_is_replaced_while_it_is_opened_is_opened_again() {
    let key = Key::new("f").unwrap();
    for times in [2, usize::MAX] {
        let this: Arc<OnceLock<Arc<NineMethods<Hooked>>>> = Arc::default();
        let gets = Arc::new(AtomicUsize::new(0));
        let store = Hooked::new({
            let (this, gets, key) = (this.clone(), gets.clone(), key.clone());
            move |method| {
                let (this, gets, key) = (this.clone(), gets.clone(), key.clone());
                Box::pin(async move {
                    if method == "get" && gets.fetch_add(1, Ordering::Relaxed) < times {
                        let store = &this.get().unwrap().store.store;
                        let plain = Attributes::default();
                        let body = Bytes::from_static(b"another");
                        store.put(&key, body, &plain, &Condition::None).await?;
                    }
                    Ok(())
                })
            }
        });
        let store = this.get_or_init(|| Arc::new(NineMethods::of(store)));
        let missing = store.open(&key, 100).await;
        assert_eq!(missing, Err(StoreError::NotFound));
        let plain = Attributes::default();
        let body = Bytes::from_static(b"one");
        let put = store.put(&key, body, &plain, &Condition::None).await;
        put.unwrap();
        let opened = store.open(&key, 100).await;
        match times {
            2 => assert_eq!(opened.unwrap().1, "another"),
            _ => assert_eq!(opened, Err(StoreError::Precondition)),
        }
        assert_eq!(gets.load(Ordering::Relaxed), 3);
    }
}

/// Each request of the defaults is within the timeout, and all together are not.
#[tokio::test]
async fn defaults_give_signs_of_life_between_their_requests() {
    let store = Hooked::new(|method| {
        let time = match method {
            "head" | "get" | "put" | "upload_part" => Duration::from_millis(400),
            _ => Duration::ZERO,
        };
        Box::pin(async move {
            tokio::time::sleep(time).await;
            Ok(())
        })
    });
    let server = Server::with(Arc::new(NineMethods::of(store)), |server| {
        let timeout = Duration::from_millis(700);
        server.open_timeout(timeout).close_timeout(timeout)
    })
    .await;
    let client = server.client().await;
    for size in [1000, 6 * MIB] {
        let data = noise(size, 1);
        client.put("/old", &data).await.unwrap();
        assert!(client.get("/old").await.unwrap() == data);
        client.sftp.rename("/old", "/new").await.unwrap();
        assert!(client.get("/new").await.unwrap() == data);
        client.sftp.remove("/new").await.unwrap();
    }
}

/// A store whose author ignores conditions and says nothing of them: the server looks before it
/// stores a file.
#[tokio::test]
async fn a_store_that_ignores_conditions_loses_no_file() {
    let mut store = NineMethods::of(MemoryStore::default());
    store.ignores_conditions = true;
    let store = Arc::new(store);
    let server = Server::start(store.clone()).await;
    let client = server.client().await;
    let key = Key::new("alice/f").unwrap();
    for size in [1000, 6 * MIB] {
        let created = client.open("/f", PUT | OpenFlags::EXCLUDE).await.unwrap();
        client.write(&created, 0, &noise(size, 1)).await.unwrap();
        let plain = Attributes::default();
        let body = Bytes::from_static(b"another program's");
        let put = store.put(&key, body, &plain, &Condition::None).await;
        put.unwrap();
        assert_eq!(code(client.close(&created).await), StatusCode::Failure);
        let append = OpenFlags::WRITE | OpenFlags::APPEND;
        let edited = client.open("/f", append).await.unwrap();
        client.write(&edited, 0, &noise(size, 2)).await.unwrap();
        let body = Bytes::from_static(b"a newer version");
        let put = store.put(&key, body, &plain, &Condition::None).await;
        put.unwrap();
        assert_eq!(code(client.close(&edited).await), StatusCode::Failure);
        assert_eq!(client.get("/f").await.unwrap(), b"a newer version");
        client.sftp.remove("/f").await.unwrap();
    }
}

/// A server of accounts that all bring this store.
async fn server_of_accounts_with(store: Arc<dyn Store>) -> Server {
    let auth = move |attempt: Attempt| {
        let account = account(&attempt.user, "home", Access::ReadWrite).store(store.clone());
        async move {
            match has_password(&attempt) {
                true => Login::Accept(account),
                false => Login::Refuse,
            }
        }
    };
    Server::with_auth(Arc::new(MemoryStore::default()), auth).await
}

#[tokio::test]
async fn parts_are_as_large_as_the_store_of_an_account_demands() {
    let mut limits = Limits::default();
    limits.min_part = 8 << 20;
    let store = Arc::new(MemoryStore::with_limits(limits));
    let server = server_of_accounts_with(store.clone()).await;
    let client = server.client().await;
    let data = noise(20 * MIB, 1);
    client.put("/f", &data).await.unwrap();
    assert!(client.get("/f").await.unwrap() == data);
    assert_eq!(store.uploads(), 0);
}

/// Of the default memory, 256 MiB.
#[tokio::test]
async fn a_store_whose_parts_do_not_fit_into_memory_is_refused() {
    let mut limits = Limits::default();
    limits.min_part = 65 << 20;
    let store = Arc::new(MemoryStore::with_limits(limits));
    let server = server_of_accounts_with(store).await;
    let mut client = SshClient::connect(server.address).await;
    assert!(client.login("alice", PASSWORD).await);
    let mut channel = client.sftp_channel().await;
    let status = within("the end of the session", async {
        loop {
            match channel.wait().await {
                Some(ChannelMsg::ExitStatus { exit_status }) => return Some(exit_status),
                Some(_) => {}
                None => return None,
            }
        }
    })
    .await;
    assert_eq!(status, Some(1));
}

/// A store may take empty parts. A file of them would have no end.
#[test]
fn empty_parts_are_refused() {
    let mut limits = Limits::default();
    limits.min_part = 0;
    let store = Arc::new(MemoryStore::with_limits(limits));
    let builder = sftpd::server::Server::builder(store, UserList::default());
    let refused = builder.part_size(0).check().unwrap_err();
    assert!(refused.to_string().starts_with("a part size of 0 bytes"));
}

/// A store that hangs in the method of this name.
fn store_that_hangs(hangs: Arc<Mutex<&'static str>>) -> Hooked {
    Hooked::new(move |method| {
        let hangs = *hangs.lock().unwrap() == method;
        Box::pin(async move {
            match hangs {
                true => pending().await,
                false => Ok(()),
            }
        })
    })
}

/// Writes `/new`, and closes it also if the WRITE fails.
async fn write(client: &Client, data: &[u8]) -> Result<(), Failed> {
    let handle = client.open("/new", PUT).await?;
    let written = client.write(&handle, 0, data).await;
    client.close(&handle).await.and(written)
}

#[tokio::test]
async fn a_store_that_hangs_costs_one_request() {
    let hangs = Arc::new(Mutex::new(""));
    let store = Arc::new(store_that_hangs(hangs.clone()));
    let server = Server::with(store.clone(), |server| {
        let soon = Duration::from_millis(300);
        server.open_timeout(soon).close_timeout(soon)
    })
    .await;
    let client = server.client().await;
    let large = noise(11 * MIB, 1);
    client.put("/old", &large).await.unwrap();
    for method in [
        "open",
        "get",
        "head",
        "list",
        "delete",
        "rename",
        "put",
        "create_upload",
        "upload_part",
        "complete",
    ] {
        *hangs.lock().unwrap() = method;
        let refused = within(method, async {
            match method {
                "open" | "get" => client.get("/old").await.map(drop),
                "head" => client.size("/none").await.map(drop),
                "list" => client.list("/").await.map(drop),
                "delete" => Ok(client.sftp.remove("/old").await.map(drop)?),
                "rename" => client.posix_rename("/old", "/new").await,
                "put" => write(&client, b"small").await,
                _ => write(&client, &large).await,
            }
        })
        .await;
        assert_eq!(code(refused), StatusCode::Failure, "{method}");
        *hangs.lock().unwrap() = "";
        // The session goes on.
        assert!(client.get("/old").await.unwrap() == large, "{method}");
        assert_eq!(code(client.size("/new").await), StatusCode::NoSuchFile);
        eventually("nothing is in progress", || store.store.uploads() == 0).await;
    }
}

/// Longer in all than the server waits for a silent store.
#[tokio::test]
async fn a_store_that_gives_signs_of_life_may_take_long() {
    let store = Hooked::new(|method| {
        let signs_to_give = match method {
            "complete" | "open" => 60,
            _ => 0,
        };
        Box::pin(async move {
            let signs = sftpd::store::SignsOfLife::current();
            for _ in 0..signs_to_give {
                tokio::time::sleep(Duration::from_millis(50)).await;
                signs.give();
            }
            Ok(())
        })
    });
    let server = Server::with(Arc::new(store), |server| {
        let timeout = Duration::from_secs(2);
        server.open_timeout(timeout).close_timeout(timeout)
    })
    .await;
    let client = server.client().await;
    let data = noise(11 * MIB, 2);
    client.put("/f", &data).await.unwrap();
    assert!(client.get("/f").await.unwrap() == data);
}
