//! SFTP sessions: requests in, replies out, files open in between.
//!
//! Called by `server` with a channel of bytes; the only room that names `russh_sftp`. Requests are
//! carried out in the order in which they arrive, as OpenSSH's server does, with three exceptions:
//! READs are answered by the file's own task, the end of an upload is awaited beside other
//! requests, and requests that arrive before the CLOSE of their file wait for it.
//!
//! The rule that keeps every client moving: the session's loop waits for the store, never for the
//! client. Beside it, one task drains the channel and one sends the replies.

mod attrs;
mod codec;
mod failure;
mod files;
mod inbound;
mod reads;
mod recent;
mod replies;
mod request_events;
mod requests;
mod session;
mod table;
mod transfer_events;
mod waiting;

pub use replies::Sink;
pub use session::{End, MAX_HANDLES, Received, SessionParams, Source, serve};

use failure::{Failure, SmallReply};
use replies::Replies;
