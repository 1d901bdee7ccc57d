//! What the server offers in SSH: algorithms, buffers and time limits of russh.

use super::HostKey;
use super::builder::Settings;
use super::window;
use crate::events::{AlgorithmKind, NoCommonAlgorithm};
use russh::cipher::{
    AES_128_CTR, AES_128_GCM, AES_192_CTR, AES_256_CTR, AES_256_GCM, CHACHA20_POLY1305,
};
use russh::keys::{Algorithm, PrivateKey};
use russh::{Limits, MethodKind, MethodSet, Preferred, SshId, compression, kex, mac};
use std::borrow::Cow;
use std::str::FromStr;
use std::time::Duration;

/// Longest data of one channel message from the client in bytes. asyncssh fills it, and is twice as
/// fast then; OpenSSH's client sends 32 KiB.
const MAX_PACKET: u32 = 64 * 1024;

/// Most bytes of one direction under the same keys.
const MAX_KEY_BYTES: usize = 64 * 1024 * 1024 * 1024;
/// Keys have no age, as by default in OpenSSH: a year is forever here.
const MAX_KEY_TIME: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Our identification string.
pub const IDENTIFICATION: &str = concat!("SSH-2.0-sftpd_", env!("CARGO_PKG_VERSION"));

/// Which algorithms are offered, of those that russh has and that are not broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Algorithms {
    /// Key exchange with ML-KEM and X25519 only: OpenSSH 9.9 and later, and little else as yet.
    PostQuantum,
    /// X25519 and the NIST curves too, and [`Legacy`](Self::Legacy) to clients that are known to
    /// support nothing better.
    Modern,
    /// Finite-field Diffie-Hellman and encrypt-and-MAC to everyone.
    Legacy,
}

impl Algorithms {
    /// Its name for `--algorithms`.
    pub fn as_str(self) -> &'static str {
        match self {
            Algorithms::PostQuantum => "post-quantum",
            Algorithms::Modern => "modern",
            Algorithms::Legacy => "legacy",
        }
    }
}

impl FromStr for Algorithms {
    type Err = UnknownAlgorithms;

    fn from_str(word: &str) -> Result<Algorithms, UnknownAlgorithms> {
        match word {
            "post-quantum" => Ok(Algorithms::PostQuantum),
            "modern" => Ok(Algorithms::Modern),
            "legacy" => Ok(Algorithms::Legacy),
            other => Err(UnknownAlgorithms(other.to_owned())),
        }
    }
}

/// A word that is not the name of a set of [`Algorithms`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are no algorithms {0:?}: use post-quantum, modern or legacy")]
pub struct UnknownAlgorithms(pub String);

/// Client software, as far as it needs to be told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// Versions in wide use lack encrypt-then-MAC, AES-GCM or X25519: libssh2 before 1.11 (2023;
    /// curl and PHP on Debian 12), JSch 0.1, SSH.NET before 2024 and phpseclib 2.
    Old,
    /// libssh looks for the signature algorithms that EXT_INFO names before its first request, and
    /// finds them only if EXT_INFO arrives together with NEWKEYS.
    Libssh,
    /// paramiko repeats SERVICE_REQUEST before each credential. russh doesn't answer the second
    /// one.
    Paramiko,
    /// Everything else.
    Other,
}

/// The client software by the beginning of its identification string.
const CLIENTS: [(&[u8], Client); 6] = [
    (b"SSH-2.0-libssh2_", Client::Old),
    (b"SSH-2.0-JSCH-", Client::Old),
    (b"SSH-2.0-Renci.SshNet", Client::Old),
    (b"SSH-2.0-phpseclib_2.", Client::Old),
    (b"SSH-2.0-libssh_", Client::Libssh),
    (b"SSH-2.0-paramiko_", Client::Paramiko),
];

impl Client {
    /// Finds the client software in its identification string.
    pub fn identify(identification: &[u8]) -> Client {
        for (start, client) in CLIENTS {
            if identification.starts_with(start) {
                return client;
            }
        }
        Client::Other
    }
}

/// The algorithms to offer to this client.
pub fn offer(choice: Algorithms, client: Client) -> Algorithms {
    match (choice, client) {
        (Algorithms::Modern, Client::Old) => Algorithms::Legacy,
        (choice, _) => choice,
    }
}

/// The methods of authentication.
pub fn methods() -> MethodSet {
    MethodSet::from(&[MethodKind::PublicKey, MethodKind::Password][..])
}

/// Key exchanges that every client is offered.
const POST_QUANTUM: [kex::Name; 1] = [kex::MLKEM768X25519_SHA256];
/// Offered after those by [`Algorithms::Modern`] and [`Algorithms::Legacy`].
const ELLIPTIC_CURVES: [kex::Name; 5] = [
    kex::CURVE25519,
    kex::CURVE25519_PRE_RFC_8731,
    kex::ECDH_SHA2_NISTP256,
    kex::ECDH_SHA2_NISTP384,
    kex::ECDH_SHA2_NISTP521,
];
/// Offered last, by [`Algorithms::Legacy`].
const FINITE_FIELDS: [kex::Name; 6] = [
    kex::DH_GEX_SHA256,
    kex::DH_G18_SHA512,
    kex::DH_G17_SHA512,
    kex::DH_G16_SHA512,
    kex::DH_G15_SHA512,
    kex::DH_G14_SHA256,
];
/// EXT_INFO ([RFC 8308](https://www.rfc-editor.org/rfc/rfc8308)) and strict key exchange, announced
/// as key exchanges.
const EXTENSIONS: [kex::Name; 2] = [
    kex::EXTENSION_SUPPORT_AS_SERVER,
    kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
];

/// The names of key exchanges in our KEXINIT.
fn key_exchanges(offered: Algorithms) -> Vec<kex::Name> {
    let (curves, fields) = match offered {
        Algorithms::PostQuantum => (&[][..], &[][..]),
        Algorithms::Modern => (&ELLIPTIC_CURVES[..], &[][..]),
        Algorithms::Legacy => (&ELLIPTIC_CURVES[..], &FINITE_FIELDS[..]),
    };
    [&POST_QUANTUM, curves, fields, &EXTENSIONS].concat()
}

/// russh's own list without SHA-1.
fn signature_algorithms() -> Vec<Algorithm> {
    let mut algorithms = Preferred::DEFAULT.key.to_vec();
    algorithms.retain(|algorithm| *algorithm != Algorithm::Rsa { hash: None });
    algorithms
}

/// The host keys to show. Who wants [`Algorithms::PostQuantum`] distrusts the NIST curves: no ECDSA
/// then, unless there is no other key.
fn host_keys(keys: &[HostKey], offered: Algorithms) -> Vec<PrivateKey> {
    let mut shown: Vec<PrivateKey> = keys.iter().map(|key| key.0.clone()).collect();
    let is_ecdsa = |key: &PrivateKey| key.algorithm().is_ecdsa();
    if offered == Algorithms::PostQuantum && !shown.iter().all(is_ecdsa) {
        shown.retain(|key| !is_ecdsa(key));
    }
    shown
}

/// Limits on the names in an event about a client's offer, and on each of them in characters.
const MAX_NAMES: usize = 20;
const MAX_NAME: usize = 64;

/// The event about a client with which the server has nothing in common.
pub fn tell_no_common(
    client: Option<String>,
    kind: &russh::AlgorithmKind,
    theirs: &[String],
) -> NoCommonAlgorithm {
    let kind = match kind {
        russh::AlgorithmKind::Kex => AlgorithmKind::KeyExchange,
        russh::AlgorithmKind::Key => AlgorithmKind::HostKey,
        russh::AlgorithmKind::Cipher => AlgorithmKind::Cipher,
        russh::AlgorithmKind::Compression => AlgorithmKind::Compression,
        russh::AlgorithmKind::Mac => AlgorithmKind::Mac,
    };
    let names = theirs.iter().filter(|name| !is_extension(name));
    let names = names.take(MAX_NAMES);
    NoCommonAlgorithm {
        kind,
        client,
        offered: names
            .map(|name| name.chars().take(MAX_NAME).collect())
            .collect(),
        algorithms: find_common(kind, theirs).map(|choice| choice.as_str().to_owned()),
    }
}

/// The algorithms that would have one in common with what a client offers; `None` if all are as
/// good as those that it was offered, or no choice would help.
fn find_common(kind: AlgorithmKind, theirs: &[String]) -> Option<Algorithms> {
    let choices = [Algorithms::Modern, Algorithms::Legacy];
    choices.into_iter().find(|choice| match kind {
        AlgorithmKind::KeyExchange => have_common(&key_exchanges(*choice), theirs),
        AlgorithmKind::Mac => have_common(&macs(*choice), theirs),
        // The same for all.
        AlgorithmKind::HostKey | AlgorithmKind::Cipher | AlgorithmKind::Compression => false,
    })
}

/// Whether a client announces an extension by this name in its list of key exchanges.
fn is_extension(name: &str) -> bool {
    let announced = [
        kex::EXTENSION_SUPPORT_AS_CLIENT,
        kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
    ];
    announced.iter().any(|known| known.as_ref() == name)
}

fn have_common(ours: &[impl AsRef<str>], theirs: &[String]) -> bool {
    ours.iter()
        .any(|name| theirs.iter().any(|other| other == name.as_ref()))
}

/// russh's own list, only legacy with encrypt-and-MAC.
fn macs(offered: Algorithms) -> Vec<mac::Name> {
    let mut macs = Preferred::DEFAULT.mac.to_vec();
    if offered != Algorithms::Legacy {
        macs.retain(|name| name.as_ref().contains("-etm@"));
    }
    macs
}

/// When russh starts a key exchange. It then ends the connection of a client that has more than
/// twice the first window under way, as a distant one has. So key exchanges are left to clients, as
/// OpenSSH's server leaves them by default (RekeyLimit in sshd_config(5)): its client starts one
/// after 1 GiB of ChaCha20 or 64 GiB of AES. The limit is for those that never do: no packet number
/// comes twice before, as 2^32 SFTP requests have more bytes.
fn rekey_limits() -> Limits {
    Limits {
        rekey_write_limit: MAX_KEY_BYTES,
        rekey_read_limit: MAX_KEY_BYTES,
        rekey_time_limit: MAX_KEY_TIME,
    }
}

/// russh's configuration, with the algorithms to offer.
pub(super) fn config(settings: &Settings, offered: Algorithms) -> russh::server::Config {
    russh::server::Config {
        server_id: SshId::Standard(Cow::Borrowed(IDENTIFICATION)),
        methods: methods(),
        // Every refusal takes this time, whatever was wrong.
        auth_rejection_time: Duration::from_millis(100),
        // The first request, "none", only asks for the methods.
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: host_keys(&settings.host_keys, offered),
        window_size: window::FIRST_SIZE,
        maximum_packet_size: MAX_PACKET,
        // Messages that russh queues for us before it stops reading the socket.
        channel_buffer_size: 16,
        // Messages of ours that russh queues before we wait.
        event_buffer_size: 32,
        // russh's own safe list, Ed25519 first, but without SHA-1 signatures; AES-GCM of both sizes
        // first (half the CPU time of the others on a CPU with AES); and no compression, with which
        // a few bytes could become many in memory.
        preferred: Preferred {
            kex: key_exchanges(offered).into(),
            key: signature_algorithms().into(),
            cipher: Cow::Borrowed(&[
                AES_128_GCM,
                AES_256_GCM,
                CHACHA20_POLY1305,
                AES_128_CTR,
                AES_192_CTR,
                AES_256_CTR,
            ]),
            mac: macs(offered).into(),
            compression: Cow::Borrowed(&[compression::NONE]),
            ..Preferred::DEFAULT
        },
        limits: rekey_limits(),
        // Failed logins on one connection, as OpenSSH's MaxAuthTries.
        max_auth_attempts: 6,
        // Also ends a connection whose client no longer reads.
        inactivity_timeout: Some(settings.idle_timeout),
        // Keep-alives find connections whose other end has vanished.
        keepalive_interval: Some(Duration::from_secs(30)),
        keepalive_max: 3,
        ..Default::default()
    }
}
