//! What the server offers in SSH: algorithms, buffers and time limits of russh.

use super::Config;
use russh::cipher::{AES_128_CTR, AES_128_GCM, AES_192_CTR, AES_256_CTR, AES_256_GCM, CHACHA20_POLY1305};
use russh::{MethodKind, MethodSet, Preferred, SshId, compression, keys::Algorithm};
use std::{borrow::Cow, time::Duration};
use tokio::{net::TcpStream, time::timeout};

/// What is offered, of all that russh has and that is not broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Algorithms {
    /// Key exchange with ML-KEM and X25519 only: OpenSSH 9.9 and later, and little else as yet.
    PostQuantum,
    /// X25519 too; and to clients that call themselves one of those that know nothing better, what they know.
    Modern,
    /// Finite-field Diffie-Hellman and encrypt-and-MAC to everyone.
    Legacy,
}

/// Clients, as they call themselves, of which versions in wide use lack encrypt-then-MAC, AES-GCM or X25519: libssh2
/// before 1.11 (2023; curl and PHP on Debian 12), JSch 0.1 and SSH.NET before 2024.
const OLD_CLIENTS: [&[u8]; 3] = [b"SSH-2.0-libssh2_", b"SSH-2.0-JSCH-", b"SSH-2.0-Renci.SshNet"];
/// Clients say who they are in their first packet, unasked. One that waits for us to begin gets the modern list.
const NAME_TIME: Duration = Duration::from_millis(100);

/// What to offer to this client, who has said nothing yet that was read.
pub async fn offer(stream: &TcpStream, choice: Algorithms) -> Algorithms {
    let mut start = [0; 24];
    if choice == Algorithms::Modern
        && let Ok(Ok(_)) = timeout(NAME_TIME, stream.peek(&mut start)).await
        && OLD_CLIENTS.iter().any(|name| start.starts_with(name))
    {
        return Algorithms::Legacy;
    }
    choice
}

/// How one can log in.
pub fn methods() -> MethodSet {
    MethodSet::from(&[MethodKind::PublicKey, MethodKind::Password][..])
}

/// With the algorithms of one kind.
pub fn config(config: &Config, offered: Algorithms) -> russh::server::Config {
    let dropped: &[&str] = match offered {
        Algorithms::PostQuantum => &["diffie-hellman", "curve25519"],
        Algorithms::Modern => &["diffie-hellman"],
        Algorithms::Legacy => &[],
    };
    let (kex, mac) = (Preferred::DEFAULT.kex, Preferred::DEFAULT.mac);
    let kex = kex.iter().filter(|name| !dropped.iter().any(|start| name.as_ref().starts_with(start)));
    let mac = mac.iter().filter(|name| offered == Algorithms::Legacy || name.as_ref().contains("-etm@"));
    russh::server::Config {
        server_id: SshId::Standard(Cow::Borrowed(concat!("SSH-2.0-sftpd_", env!("CARGO_PKG_VERSION")))),
        methods: methods(),
        // Every refusal takes so long, whatever it was that did not fit.
        auth_rejection_time: Duration::from_millis(100),
        // The first "none" request only asks which methods there are.
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: config.host_keys.iter().map(|key| key.0.clone()).collect(),
        // Messages of at most 32 KiB that russh holds for us before it stops reading from the socket.
        channel_buffer_size: 32,
        // Our messages that russh takes before we wait.
        event_buffer_size: 32,
        // russh's own safe list, Ed25519 first, without SHA-1 signatures, with AES-GCM of both sizes in front (half the
        // CPU of the others where the CPU has AES), and without compression, which would let a few bytes become many
        // in memory.
        preferred: Preferred {
            kex: kex.copied().collect(),
            key: Preferred::DEFAULT.key.iter().filter(|key| **key != Algorithm::Rsa { hash: None }).cloned().collect(),
            cipher: Cow::Borrowed(&[
                AES_128_GCM,
                AES_256_GCM,
                CHACHA20_POLY1305,
                AES_128_CTR,
                AES_192_CTR,
                AES_256_CTR,
            ]),
            mac: mac.copied().collect(),
            compression: Cow::Borrowed(&[compression::NONE]),
            ..Preferred::DEFAULT
        },
        // Failed logins on one connection, as OpenSSH's MaxAuthTries.
        max_auth_attempts: 6,
        // Also ends a connection whose client takes nothing off the socket any more.
        inactivity_timeout: Some(config.idle_timeout),
        // Keep-alives every so often, of which so many may go unanswered, find a connection whose other end is gone
        // without a word.
        keepalive_interval: Some(Duration::from_secs(30)),
        keepalive_max: 3,
        ..Default::default()
    }
}
