//! The metrics that count events. The others are recorded where they are measured: requests to S3,
//! memory, the users file.

use super::{
    ConnectionEnd, ConnectionRefusal, Credential, Event, Events, LoginRefusal, TransferResult, Who,
};
use crate::metrics::{
    ABORTED_UPLOADS, CONNECTIONS, LOGINS, NO_LOGINS, OPEN_UPLOADS, REFUSED_CONNECTIONS, SESSIONS,
    TRANSFERRED_BYTES, TRANSFERS,
};
use metrics::{counter, gauge};

/// Records events as metrics, through the recorder that the process has installed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Metrics;

impl Events for Metrics {
    fn event(&self, _who: &Who, event: &Event) {
        match event {
            Event::ConnectionOpened => gauge!(CONNECTIONS).increment(1),
            Event::ConnectionRefused { reason, .. } => count_refusal(*reason),
            Event::ConnectionEnded { reason, .. } => {
                gauge!(CONNECTIONS).decrement(1);
                if *reason == ConnectionEnd::Evicted {
                    count_refusal(ConnectionRefusal::Unauthenticated);
                }
            }
            Event::LoginAccepted { credential } => count_login(credential, "accepted"),
            Event::LoginRefused {
                credential, reason, ..
            } => match reason {
                LoginRefusal::Wrong
                | LoginRefusal::UnknownUser
                | LoginRefusal::Disabled
                | LoginRefusal::Sha1Signature
                | LoginRefusal::NothingOffered
                | LoginRefusal::LoginTimeout
                | LoginRefusal::Disconnected
                | LoginRefusal::InvalidAccount
                | LoginRefusal::Panicked => {
                    count_login(credential, "refused");
                }
                LoginRefusal::UserLimit => count_refused_connection("user_limit"),
                LoginRefusal::UserPenalty | LoginRefusal::AddressPenalty => {
                    count_login(credential, "unheard");
                }
            },
            Event::NoLogin(no_login) => count_no_login(no_login.reason.as_str()),
            Event::NoCommonAlgorithm(_) => count_no_login("no_common_algorithm"),
            Event::SessionStarted => gauge!(SESSIONS).increment(1),
            Event::SessionEnded { .. } => gauge!(SESSIONS).decrement(1),
            Event::Opened { write: true, .. } => gauge!(OPEN_UPLOADS).increment(1),
            Event::Read(read) => count_transfer("download", read.result, read.bytes),
            Event::Written(written) => {
                gauge!(OPEN_UPLOADS).decrement(1);
                count_transfer("upload", written.result, written.bytes);
            }
            Event::UploadAborted { .. } | Event::AbandonedUploadAborted { .. } => {
                counter!(ABORTED_UPLOADS, "result" => "aborted").increment(1);
            }
            Event::UploadLeft { .. } => {
                counter!(ABORTED_UPLOADS, "result" => "left").increment(1);
            }
            Event::ServerStarted { .. }
            | Event::ServerStopped
            | Event::CommandRefused { .. }
            | Event::Opened { write: false, .. }
            | Event::Listed { .. }
            | Event::Removed { .. }
            | Event::Renamed { .. }
            | Event::DirectoryMade { .. }
            | Event::DirectoryRemoved { .. }
            | Event::SizeSet { .. }
            | Event::RequestFailed(_) => {}
        }
    }
}

fn count_refusal(reason: ConnectionRefusal) {
    let label = match reason {
        ConnectionRefusal::Full => "full",
        ConnectionRefusal::Unauthenticated => "strangers",
        ConnectionRefusal::Descriptors => "descriptors",
        // The load balancer's mistake, and no limit of the server.
        ConnectionRefusal::ProxyHeader => return,
    };
    count_refused_connection(label);
}

fn count_refused_connection(reason: &'static str) {
    counter!(REFUSED_CONNECTIONS, "reason" => reason).increment(1);
}

fn count_no_login(reason: &'static str) {
    counter!(NO_LOGINS, "reason" => reason).increment(1);
}

fn count_login(credential: &Credential, result: &'static str) {
    let method = credential.method.as_str();
    counter!(LOGINS, "method" => method, "result" => result).increment(1);
}

fn count_transfer(direction: &'static str, result: TransferResult, bytes: u64) {
    let labels = [("direction", direction), ("result", result.as_str())];
    counter!(TRANSFERS, &labels).increment(1);
    counter!(TRANSFERRED_BYTES, &labels).increment(bytes);
}
