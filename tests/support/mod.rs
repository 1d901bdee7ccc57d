//! What the integration tests share: an S3 to look into, the server in this process or as the real
//! binary, and clients.

// Every test binary compiles this folder and uses only a part of it.
#![allow(dead_code, unused_imports)]
// A panic is how a test fails.
#![allow(clippy::restriction)]

pub mod client;
pub mod commands;
pub mod dice;
pub mod gateway;
pub mod http;
pub mod link;
pub mod noise;
pub mod process;
pub mod proxy;
pub mod s3;
pub mod server;
pub mod session;
pub mod stores;
pub mod wait;

pub use client::{Client, Failed, SshClient, code};
pub use dice::Dice;
pub use http::http_get;
pub use link::Link;
pub use noise::noise;
pub use server::{Server, s3_store, s3_store_with};
pub use wait::{eventually, within};

use russh_sftp::protocol::OpenFlags;

pub const MIB: usize = 1024 * 1024;
/// The password of every user in the tests.
pub const PASSWORD: &str = "open sesame";
/// As most clients open the target of an upload.
pub const PUT: OpenFlags = OpenFlags::WRITE
    .union(OpenFlags::CREATE)
    .union(OpenFlags::TRUNCATE);

/// An SFTP packet: type, id, and the rest.
pub fn packet(kind: u8, id: u32, rest: &[&[u8]]) -> Vec<u8> {
    let rest = rest.concat();
    let mut out = (5 + rest.len() as u32).to_be_bytes().to_vec();
    out.push(kind);
    out.extend(id.to_be_bytes());
    out.extend(rest);
    out
}

/// A string inside an SFTP packet: its length, then its bytes.
pub fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// The numbers in a message, in their order: what it says apart from how it is worded.
pub fn numbers_in(message: &str) -> Vec<u64> {
    message
        .split(|c: char| !c.is_ascii_digit())
        .filter(|digits| !digits.is_empty())
        .map(|digits| digits.parse().unwrap())
        .collect()
}
