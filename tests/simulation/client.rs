//! A client: it does the steps of its plan one after the other, with real SFTP packets, and notes
//! how each of them went.

use super::adaptor::{Connection, Gateway};
use super::history::{Found, Journal, Outcome, What};
use super::plan::{Action, ClientPlan, IDLE_TIMEOUT, Step};
use bytes::{Buf, Bytes, BytesMut};
use russh_sftp::protocol::{
    Close, Extended, FSetStat, FileAttributes, Init, MkDir, Open, OpenDir, OpenFlags, Packet, Read,
    ReadDir, Remove, Rename, RmDir, SetStat, StatusCode, VERSION, Write,
};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// A request without an answer for this long, in virtual time, gets none: no fault takes more than
/// seconds. It is less than the idle timeout, which would end the session and hide that.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(IDLE_TIMEOUT / 2);
/// Bytes in one WRITE and READ: several make a part.
const BLOCK: usize = 24;

/// Everything a client needs; each of the plan's clients runs in a task of its own.
pub struct Client {
    pub plan: ClientPlan,
    pub gateway: Arc<Gateway>,
    pub journal: Journal,
    /// The tasks of all sessions that were begun.
    pub sessions: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

/// Why an action ends without OK.
enum Stop {
    Status(StatusCode, String),
    /// The connection has ended.
    Disconnected,
    Hung,
}

type Answer<T> = Result<T, Stop>;

/// An open connection, and how far the action on it is.
struct Session {
    connection: Connection,
    /// Bytes that came and are no whole packet yet.
    received: BytesMut,
    last_id: u32,
    home: String,
    slow: Duration,
    /// Was the request sent after which the action may be carried out?
    is_asked_for: bool,
}

impl Client {
    /// Does all steps. A connection that ended is followed by another one.
    pub async fn run(self) {
        let mut session = None;
        for step in self.plan.steps.clone() {
            sleep(Duration::from_millis(step.pause)).await;
            let open = match session.take() {
                Some(open) => Some(open),
                None => self.connect().await,
            };
            let Some(open) = open else { continue };
            session = self.take_step(open, step).await;
        }
    }

    async fn connect(&self) -> Option<Session> {
        let (connection, task) = self
            .gateway
            .connect(&self.plan.home, Duration::from_millis(IDLE_TIMEOUT));
        self.sessions
            .lock()
            .expect("no panic while it is held")
            .push(task);
        let mut session = Session {
            connection,
            received: BytesMut::new(),
            last_id: 0,
            home: self.plan.home.clone(),
            slow: Duration::ZERO,
            is_asked_for: false,
        };
        let init = Init {
            version: VERSION,
            extensions: Default::default(),
        };
        session.send(init.into()).ok()?;
        session.receive().await.ok()?;
        Some(session)
    }

    /// Returns the session if it can go on.
    async fn take_step(&self, mut session: Session, step: Step) -> Option<Session> {
        let who = format!(
            "client {} at gateway {}",
            self.plan.number,
            self.plan.gateway + 1
        );
        let id = step.id;
        self.journal.note(What::Began {
            id,
            who,
            action: step.action.clone(),
        });
        session.slow = Duration::from_millis(step.slow);
        session.is_asked_for = false;
        let patience = step.hang_up.map_or(Duration::MAX, Duration::from_millis);
        let stop = match timeout(patience, session.act(&step.action)).await {
            Ok(Ok(found)) => {
                self.journal.note(What::Ended {
                    id,
                    outcome: Outcome::Done(found),
                });
                return Some(session);
            }
            Ok(Err(stop)) => stop,
            Err(_hangs_up) => Stop::Disconnected,
        };
        match stop {
            Stop::Status(StatusCode::NoSuchFile, _) => {
                self.journal.note(What::Ended {
                    id,
                    outcome: Outcome::Missing,
                });
                Some(session)
            }
            Stop::Status(_, why) => {
                self.journal.note(What::Ended {
                    id,
                    outcome: Outcome::Refused(why),
                });
                Some(session)
            }
            Stop::Disconnected => {
                let outcome = if session.is_asked_for {
                    Outcome::Unanswered
                } else {
                    Outcome::CutOff
                };
                self.journal.note(What::Ended { id, outcome });
                None
            }
            Stop::Hung => {
                self.journal.note(What::Hung { id });
                None
            }
        }
    }
}

impl Session {
    async fn act(&mut self, action: &Action) -> Answer<Found> {
        match action {
            Action::Put {
                file,
                content,
                exclusive,
            } => {
                let exclusive = if *exclusive {
                    OpenFlags::EXCLUDE
                } else {
                    OpenFlags::empty()
                };
                let flags = OpenFlags::WRITE | OpenFlags::CREATE | OpenFlags::TRUNCATE | exclusive;
                self.write_file(file, flags, content).await?;
            }
            Action::Append { file, content } => {
                let flags = OpenFlags::WRITE | OpenFlags::CREATE | OpenFlags::APPEND;
                self.write_file(file, flags, content).await?;
            }
            Action::Cut { file, size } => self.cut(file, *size).await?,
            Action::Empty { file } => {
                let path = self.path(file);
                self.decide(|id| {
                    SetStat {
                        id,
                        path,
                        attrs: size_of(0),
                    }
                    .into()
                })
                .await?;
            }
            Action::Remove { file } => {
                let filename = self.path(file);
                self.decide(|id| Remove { id, filename }.into()).await?;
            }
            Action::Rename { from, to, replace } => self.rename(from, to, *replace).await?,
            Action::MakeDirectory { directory } => {
                let path = self.path(directory);
                self.decide(|id| {
                    MkDir {
                        id,
                        path,
                        attrs: FileAttributes::empty(),
                    }
                    .into()
                })
                .await?;
            }
            Action::RemoveDirectory { directory } => {
                let path = self.path(directory);
                self.decide(|id| RmDir { id, path }.into()).await?;
            }
            Action::List { directory } => return self.list(directory).await,
            Action::Get { file } => return self.get(file).await,
            Action::Idle => {
                sleep(Duration::from_millis(2 * IDLE_TIMEOUT)).await;
                return Err(Stop::Disconnected);
            }
        }
        Ok(Found::Nothing)
    }

    async fn write_file(&mut self, file: &str, flags: OpenFlags, content: &str) -> Answer<()> {
        let handle = self.open(file, flags).await?;
        let mut failed = None;
        for (number, block) in content.as_bytes().chunks(BLOCK).enumerate() {
            self.rest().await;
            let (handle, offset) = (handle.clone(), (number * BLOCK) as u64);
            let data = block.to_vec();
            if let Err(stop) = self
                .ask(|id| {
                    Write {
                        id,
                        handle,
                        offset,
                        data,
                    }
                    .into()
                })
                .await
            {
                failed = Some(stop);
                break;
            }
        }
        self.rest().await;
        if let Some(stop @ (Stop::Disconnected | Stop::Hung)) = failed {
            return Err(stop);
        }
        let closed = self.decide(|id| Close { id, handle }.into()).await;
        match failed {
            // A client that was told of a failure takes the file for lost, whatever CLOSE says.
            Some(stop) => Err(stop),
            None => closed.map(drop),
        }
    }

    /// A CLOSE after a refused FSETSTAT changes nothing, and its answer is of no interest.
    async fn cut(&mut self, file: &str, size: usize) -> Answer<()> {
        let handle = self.open(file, OpenFlags::WRITE).await?;
        self.rest().await;
        let same = handle.clone();
        let is_cut = self
            .ask(|id| {
                FSetStat {
                    id,
                    handle: same,
                    attrs: size_of(size as u64),
                }
                .into()
            })
            .await;
        self.rest().await;
        match is_cut {
            Ok(_) => self
                .decide(|id| Close { id, handle }.into())
                .await
                .map(drop),
            Err(Stop::Status(code, why)) => {
                self.ask(|id| Close { id, handle }.into()).await?;
                Err(Stop::Status(code, why))
            }
            Err(stop) => Err(stop),
        }
    }

    async fn rename(&mut self, from: &str, to: &str, replace: bool) -> Answer<()> {
        let (oldpath, newpath) = (self.path(from), self.path(to));
        if !replace {
            self.decide(|id| {
                Rename {
                    id,
                    oldpath,
                    newpath,
                }
                .into()
            })
            .await?;
            return Ok(());
        }
        let request = "posix-rename@openssh.com".to_owned();
        let mut data = Vec::new();
        for path in [oldpath, newpath] {
            data.extend((path.len() as u32).to_be_bytes());
            data.extend(path.bytes());
        }
        self.decide(|id| Extended { id, request, data }.into())
            .await?;
        Ok(())
    }

    async fn list(&mut self, directory: &str) -> Answer<Found> {
        let path = self.path(directory);
        let handle = self
            .ask_for_handle(|id| OpenDir { id, path }.into())
            .await?;
        let mut names = Vec::new();
        loop {
            let same = handle.clone();
            match self.ask(|id| ReadDir { id, handle: same }.into()).await {
                Ok(Packet::Name(page)) => {
                    let files = page.files.into_iter().filter(|file| !file.attrs.is_dir());
                    names.extend(files.map(|file| file.filename));
                }
                Err(Stop::Status(StatusCode::Eof, _)) => break,
                other => return Err(unexpected(other)),
            }
        }
        self.ask(|id| Close { id, handle }.into()).await?;
        Ok(Found::Names(names))
    }

    async fn get(&mut self, file: &str) -> Answer<Found> {
        let handle = self.open(file, OpenFlags::READ).await?;
        let mut content = BytesMut::new();
        loop {
            self.rest().await;
            let (same, offset) = (handle.clone(), content.len() as u64);
            match self
                .ask(|id| {
                    Read {
                        id,
                        handle: same,
                        offset,
                        len: BLOCK as u32,
                    }
                    .into()
                })
                .await
            {
                Ok(Packet::Data(data)) => content.extend_from_slice(&data.data),
                Err(Stop::Status(StatusCode::Eof, _)) => break,
                other => {
                    let stop = unexpected(other);
                    if matches!(stop, Stop::Status(..)) {
                        self.ask(|id| Close { id, handle }.into()).await?;
                    }
                    return Err(stop);
                }
            }
        }
        self.ask(|id| Close { id, handle }.into()).await?;
        Ok(Found::Content(content.freeze()))
    }

    async fn open(&mut self, file: &str, pflags: OpenFlags) -> Answer<String> {
        let filename = self.path(file);
        let attrs = FileAttributes::empty();
        self.ask_for_handle(|id| {
            Open {
                id,
                filename,
                pflags,
                attrs,
            }
            .into()
        })
        .await
    }

    async fn ask_for_handle(&mut self, request: impl FnOnce(u32) -> Packet) -> Answer<String> {
        match self.ask(request).await {
            Ok(Packet::Handle(handle)) => Ok(handle.handle),
            other => Err(unexpected(other)),
        }
    }

    /// Asks for the very thing that the action is about.
    async fn decide(&mut self, request: impl FnOnce(u32) -> Packet) -> Answer<Packet> {
        self.is_asked_for = true;
        self.ask(request).await
    }

    /// Sends a request and waits for its answer; a status other than OK is an error.
    async fn ask(&mut self, request: impl FnOnce(u32) -> Packet) -> Answer<Packet> {
        self.last_id += 1;
        self.send(request(self.last_id))?;
        match self.receive().await? {
            Packet::Status(status) if status.status_code != StatusCode::Ok => {
                Err(Stop::Status(status.status_code, status.error_message))
            }
            reply => Ok(reply),
        }
    }

    fn send(&mut self, packet: Packet) -> Answer<()> {
        let bytes = Bytes::try_from(packet).expect("a packet that can be encoded");
        self.connection
            .requests
            .send(bytes)
            .map_err(|_| Stop::Disconnected)
    }

    async fn receive(&mut self) -> Answer<Packet> {
        loop {
            if let Some(packet) = self.take_packet() {
                return Ok(packet);
            }
            match timeout(ANSWER_TIMEOUT, self.connection.replies.recv()).await {
                Ok(Some(bytes)) => self.received.extend_from_slice(&bytes),
                Ok(None) => return Err(Stop::Disconnected),
                Err(_elapsed) => return Err(Stop::Hung),
            }
        }
    }

    fn take_packet(&mut self) -> Option<Packet> {
        let length = self.received.get(..4)?.get_u32() as usize;
        if self.received.len() < 4 + length {
            return None;
        }
        self.received.advance(4);
        let mut packet = self.received.split_to(length).freeze();
        Some(Packet::try_from(&mut packet).expect("a reply that can be decoded"))
    }

    /// The path that the client's user has for a key.
    fn path(&self, key: &str) -> String {
        let path = key
            .strip_prefix(&self.home)
            .expect("clients act in their own homes");
        format!("/{path}")
    }

    async fn rest(&self) {
        if !self.slow.is_zero() {
            sleep(self.slow).await;
        }
    }
}

fn size_of(size: u64) -> FileAttributes {
    FileAttributes {
        size: Some(size),
        ..FileAttributes::empty()
    }
}

fn unexpected(answer: Answer<Packet>) -> Stop {
    match answer {
        Ok(packet) => panic!("an answer to another question: {packet:?}"),
        Err(stop) => stop,
    }
}
