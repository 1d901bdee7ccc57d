//! One channel of a connection: a session with the `sftp` subsystem, or a sentence for whoever expected a shell.

use super::Shared;
use crate::sftp::{self, End, Settings, Sink, Source};
use crate::users::Account;
use bytes::Bytes;
use russh::server::Msg;
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// The one subsystem there is.
pub(super) const SUBSYSTEM: &str = "sftp";
const NO_SHELL: &str =
    "This server speaks SFTP only: no shell, no commands, no scp -O. Use sftp, or scp without -O.\r\n";
/// Standard error ([RFC 4254 §5.2](https://www.rfc-editor.org/rfc/rfc4254#section-5.2)).
const STDERR: u32 = 1;

/// Whose channel it is.
pub(super) struct Login {
    pub account: Account,
    pub peer: SocketAddr,
    pub gone: CancellationToken,
    pub shared: Arc<Shared>,
}

enum Wanted {
    Sftp,
    Other,
    Nothing,
}

/// Waits for what the client wants of the channel, and does it.
pub(super) async fn serve(channel: Channel<Msg>, login: Login) {
    let (mut read, write) = channel.split();
    let write = Arc::new(write);
    let status = match wanted(&mut read).await {
        Wanted::Nothing => return,
        Wanted::Sftp => sftp(read, write.clone(), login).await,
        Wanted::Other => {
            let _ = write.extended_data_bytes(STDERR, NO_SHELL).await;
            1
        }
    };
    // restic and scp look at the status.
    let _ = write.exit_status(status).await;
    let _ = write.eof().await;
    let _ = write.close().await;
}

/// The requests are answered by the connection, in the order in which they come.
async fn wanted(read: &mut ChannelReadHalf) -> Wanted {
    while let Some(message) = read.wait().await {
        match message {
            ChannelMsg::RequestSubsystem { name, .. } if name == SUBSYSTEM => return Wanted::Sftp,
            ChannelMsg::Exec { .. } | ChannelMsg::RequestShell { .. } => return Wanted::Other,
            ChannelMsg::Eof | ChannelMsg::Close => return Wanted::Nothing,
            _ => {}
        }
    }
    Wanted::Nothing
}

async fn sftp(read: ChannelReadHalf, write: Arc<ChannelWriteHalf<Msg>>, login: Login) -> u32 {
    let Login { account, peer, gone, shared } = login;
    let who: Arc<str> = format!("{}@{peer}", account.name).into();
    let tree = match shared.tree(&account) {
        Ok(tree) => tree,
        Err(error) => {
            log::error!("{who}: home {:?} can't be used: {error}", account.home);
            return 1;
        }
    };
    let settings = Settings {
        tree,
        access: account.access,
        who: who.clone(),
        user: account.name.into(),
        idle_timeout: shared.idle_timeout,
        drain: shared.shutdown.drain.clone(),
    };
    let opened = Instant::now();
    let end = sftp::serve(Incoming(read), Outgoing { write, gone }, settings).await;
    log::info!("{who}: session ended after {:.1} s: {end}", opened.elapsed().as_secs_f64());
    match end {
        End::Closed | End::Drained => 0,
        End::Idle(_) | End::Protocol(_) | End::NoInit | End::Ignored => 1,
    }
}

struct Incoming(ChannelReadHalf);

impl Source for Incoming {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            match self.0.wait().await? {
                ChannelMsg::Data { data } => return Some(data),
                ChannelMsg::Eof | ChannelMsg::Close => return None,
                _ => {}
            }
        }
    }
}

struct Outgoing {
    write: Arc<ChannelWriteHalf<Msg>>,
    gone: CancellationToken,
}

impl Sink for Outgoing {
    async fn send(&mut self, bytes: Bytes) -> bool {
        tokio::select! {
            sent = self.write.data_bytes(bytes) => sent.is_ok(),
            // russh leaves whoever waits for the window waiting when the connection ends.
            () = self.gone.cancelled() => false,
        }
    }
}
