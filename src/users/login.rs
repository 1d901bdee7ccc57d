//! The question whether someone may log in, and its answer.

use super::{Account, Certificate, PublicKey};
use async_trait::async_trait;
use std::fmt::{self, Debug, Formatter};
use std::net::SocketAddr;
use std::sync::Arc;

/// Decides who may log in.
///
/// Every async function and every closure that returns a future is one:
///
/// ```
/// use sftpd::users::{Account, Attempt, Auth, Login, Proof};
///
/// async fn login(attempt: Attempt) -> Login {
///     match attempt.proof {
///         Proof::Password(password) if attempt.user == "guest" && password == "guest" => {
///             Login::Accept(Account::new(attempt.user))
///         }
///         _ => Login::Refuse,
///     }
/// }
///
/// let auth: Box<dyn Auth> = Box::new(login);
/// ```
///
/// The server limits how often it asks about passwords: see docs/security.md. It waits for an
/// answer until the login timeout.
#[async_trait]
pub trait Auth: Send + Sync + 'static {
    /// Whether the user may log in with what the client has proved. A refusal should take as long
    /// for users that don't exist as for others.
    async fn login(&self, attempt: Attempt) -> Login;
}

#[async_trait]
impl<F, R> Auth for F
where
    F: Fn(Attempt) -> R + Send + Sync + 'static,
    R: Future<Output = Login> + Send,
{
    async fn login(&self, attempt: Attempt) -> Login {
        self(attempt).await
    }
}

#[async_trait]
impl<A: Auth + ?Sized> Auth for Arc<A> {
    async fn login(&self, attempt: Attempt) -> Login {
        self.as_ref().login(attempt).await
    }
}

/// A client that wants to log in.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Attempt {
    /// The name that the client gives. It may hold any characters.
    pub user: String,
    /// The client's address, behind a load balancer the one in the PROXY header.
    pub peer: SocketAddr,
    /// What the client has to show.
    pub proof: Proof,
}

impl Attempt {
    /// For tests of an [`Auth`].
    pub fn new(user: impl Into<String>, peer: SocketAddr, proof: Proof) -> Attempt {
        Attempt {
            user: user.into(),
            peer,
            proof,
        }
    }
}

/// What a client shows to log in. `Debug` does not show a password.
#[derive(Clone)]
#[non_exhaustive]
pub enum Proof {
    /// A password.
    Password(String),
    /// A key, whose private half the client has not used yet: it asks whether to sign. Accepted,
    /// it signs, and the server asks again with [`Proof::ProvedKey`] or [`Proof::Certificate`];
    /// nothing else comes of it.
    ///
    /// russh does not say whether it is the key of a certificate: an [`Auth`] that accepts
    /// certificates must accept every key that is only offered.
    OfferedKey(PublicKey),
    /// A key, whose private half the client has.
    ProvedKey(PublicKey),
    /// A certificate for a key, whose private half the client has. Who signed it, and for whom, is
    /// for the [`Auth`] to check: see [`Certificate::is_valid_for`].
    Certificate(Box<Certificate>),
}

impl Debug for Proof {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Proof::Password(_) => f.write_str("Password(…)"),
            Proof::OfferedKey(key) => f.debug_tuple("OfferedKey").field(key).finish(),
            Proof::ProvedKey(key) => f.debug_tuple("ProvedKey").field(key).finish(),
            Proof::Certificate(certificate) => {
                f.debug_tuple("Certificate").field(certificate).finish()
            }
        }
    }
}

/// The answer to an [`Attempt`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Login {
    /// The client may log in, and works with this account. For a [`Proof::OfferedKey`]: it may
    /// sign.
    Accept(Account),
    /// The client may not log in with this, and may try something else.
    Refuse,
    /// As [`Login::Refuse`], with a reason for the log. The client gets the same answer.
    RefuseBecause(Refusal),
    /// The connection ends, for example because the address is banned.
    Disconnect,
}

/// Why a client may not log in, where it is more than a key or a password that the user does not
/// have. For the log, and never told to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// There is no user of this name.
    UnknownUser,
    /// The key or the password is right, and the user is disabled.
    Disabled,
}
