//! What each kind of access allows: every type of request, and every extension, by three users.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use support::s3::FakeS3;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// What a request needs of the user's access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Nothing,
    Read,
    Write,
}

const PERMISSION_DENIED: u32 = 3;
const STATUS: u8 = 101;
const EXTENDED: u8 = 200;
const FLAG_READ: u32 = 1;
/// WRITE, APPEND, CREAT, TRUNC, EXCL: each one changes something, and EXCL only with CREAT.
const CHANGING_FLAGS: [u32; 4] = [2, 4, 8, 16];

fn number(number: u32) -> Vec<u8> {
    number.to_be_bytes().to_vec()
}

/// Every request of version 3 but INIT, with what it needs.
fn requests() -> Vec<(String, u8, Vec<u8>, Need)> {
    let path = text("/d/none");
    // No file that OPEN left open: a rename would wait for its CLOSE.
    let other = text("/other");
    let handle = text("none");
    let attrs = number(0);
    let offset = 0_u64.to_be_bytes().to_vec();
    let mut all = Vec::new();
    let mut add = |name: &str, kind: u8, fields: &[&Vec<u8>], need: Need| {
        let rest = fields.iter().flat_map(|field| field.iter().copied());
        all.push((name.to_owned(), kind, rest.collect(), need));
    };
    add(
        "OPEN for reading",
        3,
        &[&path, &number(FLAG_READ), &attrs],
        Need::Read,
    );
    for flags in CHANGING_FLAGS {
        add(
            "OPEN for writing",
            3,
            &[&path, &number(FLAG_READ | flags), &attrs],
            Need::Write,
        );
    }
    add("CLOSE", 4, &[&handle], Need::Nothing);
    add("READ", 5, &[&handle, &offset, &number(1)], Need::Read);
    add("WRITE", 6, &[&handle, &offset, &text("x")], Need::Write);
    add("LSTAT", 7, &[&path], Need::Nothing);
    add("FSTAT", 8, &[&handle], Need::Nothing);
    add("SETSTAT", 9, &[&path, &attrs], Need::Write);
    add("FSETSTAT", 10, &[&handle, &attrs], Need::Write);
    add("OPENDIR", 11, &[&path], Need::Nothing);
    add("READDIR", 12, &[&handle], Need::Nothing);
    add("REMOVE", 13, &[&path], Need::Write);
    add("MKDIR", 14, &[&text("/made"), &attrs], Need::Write);
    add("RMDIR", 15, &[&path], Need::Write);
    add("REALPATH", 16, &[&path], Need::Nothing);
    add("STAT", 17, &[&path], Need::Nothing);
    add("RENAME", 18, &[&other, &text("/e")], Need::Write);
    add("READLINK", 19, &[&path], Need::Nothing);
    add("SYMLINK", 20, &[&path, &path], Need::Write);
    for (name, fields, need) in [
        ("limits@openssh.com", vec![], Need::Nothing),
        (
            "posix-rename@openssh.com",
            vec![&other, &other],
            Need::Write,
        ),
        ("statvfs@openssh.com", vec![&path], Need::Nothing),
        ("fstatvfs@openssh.com", vec![&handle], Need::Nothing),
        ("expand-path@openssh.com", vec![&path], Need::Nothing),
        ("copy-data", vec![], Need::Write),
    ] {
        let extension = text(name);
        let fields: Vec<_> = std::iter::once(&extension).chain(fields).collect();
        add(name, EXTENDED, &fields, need);
    }
    all
}

#[tokio::test]
async fn every_request_is_allowed_to_those_who_have_the_access_it_needs() {
    let s3 = FakeS3::start().await;
    let server = Server::start(s3_store(&s3)).await;
    for user in ["alice", "reader", "writer"] {
        let mut ssh = SshClient::connect(server.address).await;
        assert!(ssh.login(user, PASSWORD).await);
        let channel = ssh.channel().await.unwrap();
        channel.request_subsystem(true, "sftp").await.unwrap();
        let mut stream = channel.into_stream();
        stream
            .write_all(&[0, 0, 0, 5, 1, 0, 0, 0, 3])
            .await
            .unwrap();
        read_reply(&mut stream).await;
        for (name, kind, rest, need) in requests() {
            let request = packet(kind, 7, &[&rest]);
            stream.write_all(&request).await.unwrap();
            let reply = within(&name, read_reply(&mut stream)).await;
            let is_denied = reply[0] == STATUS && reply[5..9] == PERMISSION_DENIED.to_be_bytes();
            let is_allowed = match (need, user) {
                (Need::Nothing, _) | (_, "alice") => true,
                (Need::Read, user) => user == "reader",
                (Need::Write, user) => user == "writer",
            };
            assert_eq!(!is_denied, is_allowed, "{name} by {user}");
        }
    }
    s3.assert_no_uploads();
}

/// The next packet: its type, its id and the rest.
async fn read_reply(stream: &mut (impl AsyncReadExt + Unpin)) -> Vec<u8> {
    let len = stream.read_u32().await.unwrap();
    let mut reply = vec![0; len as usize];
    stream.read_exact(&mut reply).await.unwrap();
    reply
}
