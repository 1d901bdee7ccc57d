//! A client: it does the steps of its plan one after the other, with real SFTP packets, and notes
//! how each of them went. It may go on while a request or the CLOSE of a file is outstanding.

use super::adaptor::Gateway;
use super::history::{Found, Journal, Outcome, What, Who};
use super::line::{Answer, Line, Pending, Stop, unexpected};
use super::plan::{Action, BreakKind, ClientPlan, IDLE_TIMEOUT, Look, Manner, Step};
use bytes::{Bytes, BytesMut};
use russh_sftp::protocol::{
    Close, Extended, FSetStat, FileAttributes, Init, Lstat, MkDir, Open, OpenDir, OpenFlags,
    Packet, Read, ReadDir, Remove, Rename, RmDir, SetStat, Stat, StatusCode, VERSION, Write,
};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

/// Bytes in one WRITE and READ: several make a part.
const BLOCK: usize = 24;
/// Why a client does not send what it was to send.
pub const NOTHING_LEFT: &str = "(by the client) nothing is left to send";
/// A client got less than STAT had told, and says so.
pub const TOO_SHORT: &str = "(by the client) the file is shorter than it was said to be";

/// Everything a client needs; each of the plan's clients runs in a task of its own.
pub struct Client {
    pub plan: ClientPlan,
    pub gateway: Arc<Gateway>,
    pub journal: Journal,
    /// The tasks of all sessions that were begun.
    pub sessions: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

/// An open session. Dropped, it hangs up.
struct Session {
    who: Who,
    line: Arc<Line>,
    _receiving: AbortOnDropHandle<()>,
    /// Actions that the client has not waited for.
    background: Vec<JoinHandle<()>>,
    /// Files whose CLOSE is never sent.
    forgotten: Vec<JoinHandle<()>>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.line.hang_up();
    }
}

impl Session {
    /// Waits for everything that will have an answer, and hangs up.
    async fn finish(mut self, journal: &Journal) {
        for action in std::mem::take(&mut self.background) {
            action.await.expect("a client does not panic");
        }
        self.leave(BreakKind::HangsUp, journal).await;
    }

    /// Breaks the line, and waits until the last action has noted its end.
    async fn leave(&mut self, kind: BreakKind, journal: &Journal) {
        let who = self.who;
        journal.note(What::Left { who, kind });
        match kind {
            BreakKind::HangsUp => self.line.hang_up(),
            BreakKind::FallsSilent => self.line.fall_silent(),
        }
        let all = self.background.drain(..).chain(self.forgotten.drain(..));
        for action in all {
            action.await.expect("a client does not panic");
        }
    }
}

impl Client {
    /// Does all steps. A connection that ended is followed by another one.
    pub async fn run(self) {
        let mut session = None;
        let mut sessions = 0;
        let mut silent = Vec::new();
        for step in self.plan.steps.clone() {
            sleep(Duration::from_millis(step.pause)).await;
            let open = match session.take() {
                Some(open) => Some(open),
                None => {
                    sessions += 1;
                    self.connect(sessions).await
                }
            };
            let Some(mut open) = open else { continue };
            match self.take_step(&mut open, step).await {
                Next::GoesOn => session = Some(open),
                Next::Reconnects => open.leave(BreakKind::HangsUp, &self.journal).await,
                Next::LeavesOpen => {
                    open.leave(BreakKind::FallsSilent, &self.journal).await;
                    silent.push(open);
                }
            }
        }
        if let Some(session) = session {
            session.finish(&self.journal).await;
        }
        if !silent.is_empty() {
            sleep(Duration::from_millis(2 * IDLE_TIMEOUT)).await;
        }
    }

    async fn connect(&self, number: usize) -> Option<Session> {
        let (connection, task) = self
            .gateway
            .connect(&self.plan.home, Duration::from_millis(IDLE_TIMEOUT));
        self.sessions
            .lock()
            .expect("no panic while it is held")
            .push(task);
        let line = Arc::new(Line::new(connection.requests));
        let receiving = tokio::spawn(line.clone().receive(connection.replies));
        let session = Session {
            who: Who {
                client: self.plan.number,
                gateway: self.plan.gateway + 1,
                session: number,
            },
            line,
            _receiving: AbortOnDropHandle::new(receiving),
            background: Vec::new(),
            forgotten: Vec::new(),
        };
        let init = Init {
            version: VERSION,
            extensions: Default::default(),
        };
        session.line.init(init).await.ok()?;
        Some(session)
    }

    async fn take_step(&self, session: &mut Session, step: Step) -> Next {
        self.journal.note(What::Began {
            id: step.id,
            who: session.who,
            action: step.action.clone(),
        });
        let mut deed = Deed {
            id: step.id,
            line: session.line.clone(),
            journal: self.journal.clone(),
            home: self.plan.home.clone(),
            slow: Duration::from_millis(step.slow),
            is_asked_for: false,
        };
        let (patience, at_break) = match step.line_break {
            Some(line_break) => {
                let next = match line_break.kind {
                    BreakKind::HangsUp => Next::Reconnects,
                    BreakKind::FallsSilent => Next::LeavesOpen,
                };
                (Duration::from_millis(line_break.after), next)
            }
            None => (Duration::MAX, Next::Reconnects),
        };
        let began = async {
            let stage = deed.begin(&step.action).await?;
            match (step.manner, stage) {
                (Manner::Waits, stage) => deed.finish(stage).await.map(Stage::Over),
                (_, stage) => Ok(stage),
            }
        };
        let (stage, next) = match timeout(patience, began).await {
            Ok(Ok(stage)) => (stage, Next::GoesOn),
            Ok(Err(stop @ Stop::Status(..))) => return deed.conclude(Err(stop), Next::GoesOn),
            Ok(Err(stop)) => return deed.conclude(Err(stop), Next::Reconnects),
            Err(_broken) => return deed.conclude(Err(Stop::Disconnected), at_break),
        };
        match (stage, step.manner) {
            (Stage::Over(found), _) => deed.conclude(Ok(found), next),
            (Stage::Written(_), Manner::NeverCloses) => {
                session.forgotten.push(tokio::spawn(deed.forget()));
                next
            }
            (stage, Manner::ClosesLater(delay)) => {
                let delay = Duration::from_millis(delay);
                let action = deed.go_on(stage, delay);
                session.background.push(tokio::spawn(action));
                next
            }
            (stage, Manner::Waits | Manner::NeverCloses | Manner::Pipelines) => {
                let action = deed.go_on(stage, Duration::ZERO);
                session.background.push(tokio::spawn(action));
                next
            }
        }
    }
}

/// What a client does after a step.
enum Next {
    GoesOn,
    /// In a new session, after it has hung up.
    Reconnects,
    /// In a new session; the old one stays open.
    LeavesOpen,
}

/// How far an action is.
enum Stage {
    Over(Found),
    /// All is written to this handle. CLOSE is to be sent.
    Written(String),
    /// The one request is sent.
    Sent(Pending),
}

/// An action under way.
struct Deed {
    id: usize,
    line: Arc<Line>,
    journal: Journal,
    home: String,
    slow: Duration,
    /// Was the request sent after which the action may be carried out?
    is_asked_for: bool,
}

impl Deed {
    /// Notes how the action went. Returns what comes next: `next`, unless there was no answer.
    fn conclude(&self, answer: Answer<Found>, next: Next) -> Next {
        let id = self.id;
        let outcome = match answer {
            Ok(found) => Outcome::Done(found),
            Err(Stop::Status(StatusCode::NoSuchFile, _)) => Outcome::Missing,
            Err(Stop::Status(_, why)) => Outcome::Refused(why),
            Err(Stop::Disconnected) if self.is_asked_for => Outcome::Unanswered,
            Err(Stop::Disconnected) => Outcome::CutOff,
            Err(Stop::Hung) => {
                self.journal.note(What::Hung { id });
                return Next::Reconnects;
            }
        };
        self.journal.note(What::Ended { id, outcome });
        next
    }

    /// Goes on in the background.
    async fn go_on(mut self, stage: Stage, delay: Duration) {
        let answer = match self.line.clone().unless_over(sleep(delay)).await {
            Ok(()) => self.finish(stage).await,
            Err(stop) => Err(stop),
        };
        self.conclude(answer, Next::GoesOn);
    }

    /// Leaves the file open as long as the session lasts.
    async fn forget(self) {
        self.line.over().await;
        self.conclude(Err(Stop::Disconnected), Next::GoesOn);
    }

    /// Up to CLOSE, or to the answer of the only request.
    async fn begin(&mut self, action: &Action) -> Answer<Stage> {
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
                self.write_file(file, flags, 0, content.as_bytes()).await
            }
            Action::Append { file, content } => {
                let flags = OpenFlags::WRITE | OpenFlags::CREATE | OpenFlags::APPEND;
                self.write_file(file, flags, 0, content.as_bytes()).await
            }
            Action::Resume { file, content } => self.resume(file, content.as_bytes()).await,
            Action::Cut { file, size } => self.cut(file, *size).await,
            Action::Empty { file } => {
                let path = self.path(file);
                let attrs = size_of(0);
                self.decide(|id| SetStat { id, path, attrs }.into())
            }
            Action::Remove { file } => {
                let filename = self.path(file);
                self.decide(|id| Remove { id, filename }.into())
            }
            Action::Rename { from, to, replace } => self.rename(from, to, *replace),
            Action::MakeDirectory { directory } => {
                let path = self.path(directory);
                let attrs = FileAttributes::empty();
                self.decide(|id| MkDir { id, path, attrs }.into())
            }
            Action::RemoveDirectory { directory } => {
                let path = self.path(directory);
                self.decide(|id| RmDir { id, path }.into())
            }
            Action::List { directory } => self.list(directory).await.map(Stage::Over),
            Action::Get { file } => self.get(file).await.map(Stage::Over),
            Action::Download { file } => self.download(file).await.map(Stage::Over),
            Action::Look { file, request } => {
                let path = self.path(file);
                self.decide(|id| match request {
                    Look::Stat => Stat { id, path }.into(),
                    Look::Lstat => Lstat { id, path }.into(),
                })
            }
            Action::Idle => {
                sleep(Duration::from_millis(2 * IDLE_TIMEOUT)).await;
                Err(Stop::Disconnected)
            }
        }
    }

    async fn finish(&mut self, stage: Stage) -> Answer<Found> {
        match stage {
            Stage::Over(found) => Ok(found),
            Stage::Written(handle) => {
                self.rest().await;
                self.is_asked_for = true;
                let pending = self.line.send(|id| Close { id, handle }.into())?;
                self.journal.note(What::Closing { id: self.id });
                pending.answer().await?;
                Ok(Found::Nothing)
            }
            Stage::Sent(pending) => match pending.answer().await? {
                Packet::Attrs(stat) => Ok(Found::Size(stat.attrs.size.unwrap_or_default())),
                _ok => Ok(Found::Nothing),
            },
        }
    }

    /// OPEN, and WRITEs from this offset on.
    async fn write_file(
        &mut self,
        file: &str,
        flags: OpenFlags,
        start: usize,
        content: &[u8],
    ) -> Answer<Stage> {
        let handle = self.open(file, flags).await?;
        self.journal.note(What::Opened { id: self.id });
        for (number, block) in content.chunks(BLOCK).enumerate() {
            self.rest().await;
            let (same, offset) = (handle.clone(), (start + number * BLOCK) as u64);
            let data = block.to_vec();
            let written = self.ask(|id| {
                Write {
                    id,
                    handle: same,
                    offset,
                    data,
                }
                .into()
            });
            match written.await {
                Ok(_) => {}
                // A client that was told of a failure takes the file for lost, whatever CLOSE says.
                Err(stop @ Stop::Status(..)) => {
                    self.rest().await;
                    self.is_asked_for = true;
                    match self.ask(|id| Close { id, handle }.into()).await {
                        Ok(_) | Err(Stop::Status(..)) => return Err(stop),
                        Err(end) => return Err(end),
                    }
                }
                Err(stop) => return Err(stop),
            }
        }
        Ok(Stage::Written(handle))
    }

    /// As `reput` of OpenSSH and `put -c` of lftp.
    async fn resume(&mut self, file: &str, content: &[u8]) -> Answer<Stage> {
        let there = self.look(file).await?.unwrap_or(0) as usize;
        match content.get(there..) {
            None | Some([]) => Err(Stop::Status(StatusCode::Failure, NOTHING_LEFT.to_owned())),
            Some(rest) => {
                self.rest().await;
                let flags = OpenFlags::WRITE | OpenFlags::CREATE;
                self.write_file(file, flags, there, rest).await
            }
        }
    }

    /// STAT.
    async fn look(&mut self, file: &str) -> Answer<Option<u64>> {
        let path = self.path(file);
        let size = match self.ask(|id| Stat { id, path }.into()).await {
            Ok(Packet::Attrs(stat)) => stat.attrs.size,
            Err(Stop::Status(StatusCode::NoSuchFile, _)) => None,
            other => return Err(unexpected(other)),
        };
        self.journal.note(What::Shown { id: self.id, size });
        Ok(size)
    }

    /// A CLOSE after a refused FSETSTAT changes nothing, and its answer is of no interest.
    async fn cut(&mut self, file: &str, size: usize) -> Answer<Stage> {
        let handle = self.open(file, OpenFlags::WRITE).await?;
        self.rest().await;
        let same = handle.clone();
        let attrs = size_of(size as u64);
        let is_cut = self.ask(|id| {
            FSetStat {
                id,
                handle: same,
                attrs,
            }
            .into()
        });
        match is_cut.await {
            Ok(_) => Ok(Stage::Written(handle)),
            Err(Stop::Status(code, why)) => {
                self.rest().await;
                self.ask(|id| Close { id, handle }.into()).await?;
                Err(Stop::Status(code, why))
            }
            Err(stop) => Err(stop),
        }
    }

    fn rename(&mut self, from: &str, to: &str, replace: bool) -> Answer<Stage> {
        let (oldpath, newpath) = (self.path(from), self.path(to));
        if !replace {
            return self.decide(|id| {
                Rename {
                    id,
                    oldpath,
                    newpath,
                }
                .into()
            });
        }
        let request = "posix-rename@openssh.com".to_owned();
        let mut data = Vec::new();
        for path in [oldpath, newpath] {
            data.extend((path.len() as u32).to_be_bytes());
            data.extend(path.bytes());
        }
        self.decide(|id| Extended { id, request, data }.into())
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
                    names.extend(
                        files.map(|file| (file.filename, file.attrs.size.unwrap_or_default())),
                    );
                }
                Err(Stop::Status(StatusCode::Eof, _)) => break,
                other => return Err(unexpected(other)),
            }
        }
        self.ask(|id| Close { id, handle }.into()).await?;
        Ok(Found::Names(names))
    }

    async fn get(&mut self, file: &str) -> Answer<Found> {
        let content = self.read_file(file, usize::MAX).await?;
        Ok(Found::Content(content))
    }

    async fn download(&mut self, file: &str) -> Answer<Found> {
        let Some(size) = self.look(file).await? else {
            let why = "shown by STAT".to_owned();
            return Err(Stop::Status(StatusCode::NoSuchFile, why));
        };
        self.rest().await;
        let content = self.read_file(file, size as usize).await?;
        if content.len() < size as usize {
            return Err(Stop::Status(StatusCode::Failure, TOO_SHORT.to_owned()));
        }
        Ok(Found::Content(content))
    }

    /// At most this many bytes of a file.
    async fn read_file(&mut self, file: &str, size: usize) -> Answer<Bytes> {
        let handle = self.open(file, OpenFlags::READ).await?;
        let mut content = BytesMut::new();
        while content.len() < size {
            self.rest().await;
            let (same, offset) = (handle.clone(), content.len() as u64);
            let len = BLOCK.min(size - content.len()) as u32;
            let read = self.ask(|id| {
                Read {
                    id,
                    handle: same,
                    offset,
                    len,
                }
                .into()
            });
            match read.await {
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
        Ok(content.freeze())
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

    /// Sends the only request of an action.
    fn decide(&mut self, request: impl FnOnce(u32) -> Packet) -> Answer<Stage> {
        self.is_asked_for = true;
        let pending = self.line.send(request)?;
        Ok(Stage::Sent(pending))
    }

    /// Sends a request and waits for its answer; a status other than OK is an error.
    async fn ask(&mut self, request: impl FnOnce(u32) -> Packet) -> Answer<Packet> {
        self.line.send(request)?.answer().await
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
