//! What clients are going to do, and what the store is going to do to them: drawn from a seed, and
//! nothing else.

use super::dice::Dice;
use super::remote::RequestName;
use std::collections::BTreeSet;
use std::fmt;

/// Directories that files lie in. The third has none at first: renames of directories go there.
const DIRECTORIES: [&str; 3] = ["d0", "d1", "d2"];
const FILES: [&str; 3] = ["a", "b", "c"];
/// What the gateways cut parts at, in bytes: small, so that few bytes make a multipart upload.
pub const PART_SIZE: u64 = 64;
/// A session without requests ends after this long, in milliseconds.
pub const IDLE_TIMEOUT: u64 = 600_000;

/// A whole history to come.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Decides how long each request takes and what becomes of it.
    pub fate_seed: u64,
    pub gateways: usize,
    pub store: StoreKind,
    pub faults: Faults,
    /// The pool of each gateway, in bytes.
    pub memory: u64,
    /// Full keys and contents of the files that are there at the start.
    pub setup: Vec<(String, String)>,
    pub clients: Vec<ClientPlan>,
    /// Requests that are spared the fault that the seed has for them; filled by shrinking.
    pub spared: BTreeSet<RequestName>,
}

/// What a store does with conditions, and how it makes ETags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreKind {
    /// False: `If-Match` and `If-None-Match` of writing requests are ignored, as Garage does.
    pub keeps_conditions: bool,
    /// False: ETags are random, as under SSE-KMS.
    pub has_md5_etags: bool,
}

/// How much goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    /// Only delays.
    None,
    /// Failures, lost answers, and repeated attempts that meet their own success.
    Usual,
    /// Requests that take effect after their answer, too.
    Late,
}

/// One client, which is connected to one gateway and does one thing after the other.
#[derive(Clone, Debug)]
pub struct ClientPlan {
    pub number: usize,
    pub gateway: usize,
    /// Ends with a slash.
    pub home: String,
    pub steps: Vec<Step>,
}

/// One thing that a client does.
#[derive(Clone, Debug)]
pub struct Step {
    /// Unique in the plan.
    pub id: usize,
    /// Milliseconds before it.
    pub pause: u64,
    pub action: Action,
    /// Milliseconds between two requests of one action.
    pub slow: u64,
    pub manner: Manner,
    /// How the connection breaks, if the client is still at it then.
    pub line_break: Option<LineBreak>,
}

/// When a client goes on to its next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// When it has its answer.
    Waits,
    /// When its bytes are written: it sends CLOSE this many milliseconds later, as sshfs does.
    ClosesLater(u64),
    /// When its bytes are written: it never sends CLOSE.
    NeverCloses,
    /// When the request is sent.
    Pipelines,
}

/// The end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineBreak {
    /// Milliseconds after the beginning of the step.
    pub after: u64,
    pub kind: BreakKind,
}

/// What the server sees of the end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakKind {
    /// The end.
    HangsUp,
    /// Nothing: the client goes on in another session.
    FallsSilent,
}

/// What is done. Names are full keys, so that clients with different homes can be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Put {
        file: String,
        content: String,
        exclusive: bool,
    },
    Append {
        file: String,
        content: String,
    },
    /// STAT, then what the file lacks of this content.
    Resume {
        file: String,
        content: String,
    },
    /// OPEN without TRUNC, FSETSTAT with a smaller size, CLOSE.
    Cut {
        file: String,
        size: usize,
    },
    /// SETSTAT with size 0.
    Empty {
        file: String,
    },
    Remove {
        file: String,
    },
    /// Of a file or a directory; `replace` is posix-rename.
    Rename {
        from: String,
        to: String,
        replace: bool,
    },
    MakeDirectory {
        directory: String,
    },
    RemoveDirectory {
        directory: String,
    },
    List {
        directory: String,
    },
    /// READs until the end of the file.
    Get {
        file: String,
    },
    /// STAT, then READs of as many bytes as it has told.
    Download {
        file: String,
    },
    /// STAT, or LSTAT.
    Look {
        file: String,
        request: Look,
    },
    /// Nothing, until the session has ended.
    Idle,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    Stat,
    Lstat,
}

impl Action {
    /// Can its client go on before it sends CLOSE?
    pub fn is_upload(&self) -> bool {
        match self {
            Action::Put { .. } | Action::Append { .. } | Action::Resume { .. } => true,
            Action::Cut { .. }
            | Action::Empty { .. }
            | Action::Remove { .. }
            | Action::Rename { .. }
            | Action::MakeDirectory { .. }
            | Action::RemoveDirectory { .. }
            | Action::List { .. }
            | Action::Get { .. }
            | Action::Download { .. }
            | Action::Look { .. }
            | Action::Idle => false,
        }
    }

    /// Is it one request?
    pub fn is_one_request(&self) -> bool {
        match self {
            Action::Empty { .. }
            | Action::Remove { .. }
            | Action::Rename { .. }
            | Action::MakeDirectory { .. }
            | Action::RemoveDirectory { .. }
            | Action::Look { .. } => true,
            Action::Put { .. }
            | Action::Append { .. }
            | Action::Resume { .. }
            | Action::Cut { .. }
            | Action::List { .. }
            | Action::Get { .. }
            | Action::Download { .. }
            | Action::Idle => false,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Put {
                file,
                content,
                exclusive: false,
            } => write!(f, "put {file} {}", brief(content)),
            Action::Put {
                file,
                content,
                exclusive: true,
            } => write!(f, "put EXCL {file} {}", brief(content)),
            Action::Append { file, content } => write!(f, "append {file} {}", brief(content)),
            Action::Resume { file, content } => write!(f, "resume {file} {}", brief(content)),
            Action::Cut { file, size } => write!(f, "cut {file} to {size} bytes"),
            Action::Empty { file } => write!(f, "empty {file}"),
            Action::Remove { file } => write!(f, "remove {file}"),
            Action::Rename {
                from,
                to,
                replace: false,
            } => write!(f, "rename {from} to {to}"),
            Action::Rename {
                from,
                to,
                replace: true,
            } => write!(f, "posix-rename {from} to {to}"),
            Action::MakeDirectory { directory } => write!(f, "mkdir {directory}"),
            Action::RemoveDirectory { directory } => write!(f, "rmdir {directory}"),
            Action::List { directory } => write!(f, "list {directory}"),
            Action::Get { file } => write!(f, "get {file}"),
            Action::Download { file } => write!(f, "download {file}"),
            Action::Look {
                file,
                request: Look::Stat,
            } => write!(f, "stat {file}"),
            Action::Look {
                file,
                request: Look::Lstat,
            } => write!(f, "lstat {file}"),
            Action::Idle => write!(f, "idle"),
        }
    }
}

/// A content as people can read it: long ones repeat one short text.
pub fn brief(content: &str) -> String {
    const LONGEST: usize = 40;
    match content.get(..LONGEST) {
        Some(start) => format!("{start:?}… ({} bytes)", content.len()),
        None => format!("{content:?}"),
    }
}

impl Plan {
    /// The plan of a seed.
    pub fn draw(seed: u64) -> Plan {
        let mut dice = Dice::new(seed);
        let keeps_conditions = dice.happens(700);
        let store = StoreKind {
            keeps_conditions,
            has_md5_etags: dice.happens(800),
        };
        let gateways = if keeps_conditions && dice.happens(500) {
            2
        } else {
            1
        };
        let faults = match dice.below(10) {
            0..5 => Faults::None,
            5..9 => Faults::Usual,
            _ => Faults::Late,
        };
        let memory = *dice.pick(&[4 << 10, 4 << 20]);
        let homes: &[&str] = if dice.happens(600) {
            &["team/"]
        } else {
            &["team/", "own/"]
        };
        let files = 2 + dice.below(5) as usize;
        let mut drawing = Drawing {
            dice,
            names: draw_names(files),
            next_id: 0,
            sources: Vec::new(),
        };
        let setup = drawing.draw_setup(homes);
        let clients = 2 + drawing.dice.below(4) as usize;
        let clients = (1..=clients)
            .map(|number| drawing.draw_client(number, gateways, homes))
            .collect();
        Plan {
            fate_seed: seed,
            gateways,
            store,
            faults,
            memory,
            setup,
            clients,
            spared: BTreeSet::new(),
        }
    }

    /// How many things are done.
    pub fn steps(&self) -> usize {
        self.clients.iter().map(|client| client.steps.len()).sum()
    }
}

/// The first few of the six names, directory by directory in turn.
fn draw_names(count: usize) -> Vec<String> {
    let names = FILES.iter().flat_map(|file| {
        DIRECTORIES[..2]
            .iter()
            .map(move |directory| format!("{directory}/{file}"))
    });
    names.take(count).collect()
}

struct Drawing {
    dice: Dice,
    /// Paths of files that most actions are about.
    names: Vec<String>,
    next_id: usize,
    /// Files and contents of uploads that break off: other clients may have the same source.
    sources: Vec<(String, String)>,
}

impl Drawing {
    fn draw_setup(&mut self, homes: &[&str]) -> Vec<(String, String)> {
        let mut setup = Vec::new();
        for home in homes {
            for name in self.names.clone() {
                if self.dice.happens(500) {
                    let content = self.draw_content();
                    setup.push((format!("{home}{name}"), content));
                }
            }
        }
        setup
    }

    fn draw_client(&mut self, number: usize, gateways: usize, homes: &[&str]) -> ClientPlan {
        let gateway = self.dice.below(gateways as u64) as usize;
        let home = (*self.dice.pick(homes)).to_owned();
        let least = 2 + self.dice.below(5) as usize;
        let mut steps = Vec::new();
        while steps.len() < least {
            match self.dice.below(100) {
                0..68 => steps.push(self.draw_step(&home)),
                68..78 => steps.extend(self.draw_broken_upload(&home)),
                78..96 => steps.extend(self.draw_late_close(&home)),
                _ => steps.extend(self.draw_broken_wait(&home)),
            }
        }
        ClientPlan {
            number,
            gateway,
            home,
            steps,
        }
    }

    fn draw_step(&mut self, home: &str) -> Step {
        let action = self.draw_action(home);
        let pause = if self.dice.happens(800) {
            self.dice.below(40)
        } else {
            self.dice.below(3000)
        };
        // What can only be told apart while it lasts.
        let is_race = matches!(
            action,
            Action::Get { .. }
                | Action::Download { .. }
                | Action::Put {
                    exclusive: true,
                    ..
                }
        );
        let slow = match self.dice.below(100) {
            ..99 if is_race => 1 + self.dice.below(400),
            ..70 => 0,
            70..99 => self.dice.below(400),
            _ => IDLE_TIMEOUT + 1000,
        };
        let mut step = self.step(pause, action);
        step.slow = slow;
        if self.dice.happens(50) {
            let after = self.dice.below(500);
            step.line_break = Some(self.draw_break(after));
        }
        step
    }

    fn step(&mut self, pause: u64, action: Action) -> Step {
        Step {
            id: self.fresh_id(),
            pause,
            action,
            slow: 0,
            manner: Manner::Waits,
            line_break: None,
        }
    }

    fn draw_break(&mut self, after: u64) -> LineBreak {
        let kind = match self.dice.happens(500) {
            true => BreakKind::HangsUp,
            false => BreakKind::FallsSilent,
        };
        LineBreak { after, kind }
    }

    /// An upload that breaks off, and what its client does in a new session: it goes on, or sends
    /// all of it again and looks.
    fn draw_broken_upload(&mut self, home: &str) -> Vec<Step> {
        let file = format!("{home}{}", self.draw_file());
        let content = self.draw_long_content();
        let exclusive = false;
        let put = Action::Put {
            file: file.clone(),
            content: content.clone(),
            exclusive,
        };
        let pause = self.dice.below(40);
        let mut broken = self.step(pause, put.clone());
        broken.slow = 5 + self.dice.below(60);
        let after = 20 + self.dice.below(500);
        broken.line_break = Some(self.draw_break(after));
        self.sources.push((file.clone(), content.clone()));
        let again = match self.dice.happens(600) {
            true => Action::Resume {
                file: file.clone(),
                content,
            },
            false => put,
        };
        let pause = self.dice.below(100);
        let mut again = self.step(pause, again);
        again.slow = self.dice.below(60);
        let mut steps = vec![broken, again];
        if self.dice.happens(500) {
            let pause = self.dice.below(40);
            let action = self.draw_reading(home, file);
            steps.push(self.step(pause, action));
        }
        steps
    }

    /// An upload whose CLOSE is sent in the background, or never, and what its client does with the
    /// file meanwhile.
    fn draw_late_close(&mut self, home: &str) -> Vec<Step> {
        let file = format!("{home}{}", self.draw_file());
        let content = self.draw_content();
        let upload = match self.dice.below(100) {
            0..75 => Action::Put {
                file: file.clone(),
                content,
                exclusive: false,
            },
            _ => Action::Append {
                file: file.clone(),
                content,
            },
        };
        let pause = self.dice.below(40);
        let mut upload = self.step(pause, upload);
        upload.manner = match self.dice.below(100) {
            0..50 => Manner::ClosesLater(1 + self.dice.below(200)),
            50..75 => Manner::ClosesLater(1 + self.dice.below(2800)),
            75..85 => Manner::ClosesLater(3000 + self.dice.below(3000)),
            _ => Manner::NeverCloses,
        };
        let mut steps = vec![upload];
        for _ in 0..1 + self.dice.below(3) {
            let action = self.draw_overtaking(home, file.clone());
            let pause = self.dice.below(20);
            let mut step = self.step(pause, action);
            if step.action.is_one_request() && self.dice.happens(600) {
                step.manner = Manner::Pipelines;
            }
            steps.push(step);
        }
        steps
    }

    /// A file that is written and moved, by a client that is gone before its CLOSE.
    fn draw_broken_wait(&mut self, home: &str) -> Vec<Step> {
        let file = format!("{home}{}", self.draw_file());
        let content = self.draw_content();
        let exclusive = false;
        let put = Action::Put {
            file: file.clone(),
            content,
            exclusive,
        };
        let pause = self.dice.below(40);
        let mut put = self.step(pause, put);
        put.manner = Manner::NeverCloses;
        let action = match self.dice.below(100) {
            0..80 => self.draw_rename(home, file),
            80..90 => Action::Remove { file },
            _ => Action::Empty { file },
        };
        let pause = self.dice.below(20);
        let mut waiting = self.step(pause, action);
        let after = self.dice.below(2800);
        waiting.line_break = Some(self.draw_break(after));
        vec![put, waiting]
    }

    /// What a client does with a file that it has written and not closed yet.
    fn draw_overtaking(&mut self, home: &str, file: String) -> Action {
        match self.dice.below(100) {
            0..12 => Action::Put {
                file,
                content: self.draw_content(),
                exclusive: false,
            },
            12..22 => Action::Append {
                file,
                content: self.draw_content(),
            },
            22..38 => self.draw_rename(home, file),
            38..50 => Action::Rename {
                from: format!("{home}{}", self.draw_file()),
                to: file,
                replace: self.dice.happens(700),
            },
            50..54 => {
                let from = format!("{home}{}", self.draw_file());
                self.draw_rename(home, from)
            }
            54..66 => Action::Remove { file },
            66..72 => Action::Empty { file },
            _ => self.draw_reading(home, file),
        }
    }

    fn draw_reading(&mut self, home: &str, file: String) -> Action {
        match self.dice.below(100) {
            0..30 => Action::Get { file },
            30..55 => Action::Download { file },
            55..85 => self.draw_look(file),
            _ => Action::List {
                directory: self.draw_directory(home),
            },
        }
    }

    fn draw_look(&mut self, file: String) -> Action {
        let request = *self.dice.pick(&[Look::Stat, Look::Lstat]);
        Action::Look { file, request }
    }

    /// Of what an upload of this home breaks off with, or of its own.
    fn draw_resume(&mut self, home: &str, file: String) -> Action {
        let sources = self.sources.iter().cloned();
        let known: Vec<_> = sources.filter(|(file, _)| file.starts_with(home)).collect();
        if known.is_empty() || self.dice.happens(300) {
            let content = self.draw_long_content();
            return Action::Resume { file, content };
        }
        let (file, content) = self.dice.pick(&known).clone();
        Action::Resume { file, content }
    }

    fn draw_action(&mut self, home: &str) -> Action {
        let file = format!("{home}{}", self.draw_file());
        match self.dice.below(100) {
            0..18 => Action::Put {
                file,
                content: self.draw_content(),
                exclusive: false,
            },
            18..26 => Action::Put {
                file,
                content: self.draw_lock(),
                exclusive: true,
            },
            26..36 => Action::Append {
                file,
                content: self.draw_content(),
            },
            36..40 => self.draw_resume(home, file),
            40..58 => self.draw_rename(home, file),
            58..63 => self.draw_directory_rename(home),
            63..71 => Action::Remove { file },
            71..74 => Action::Cut {
                file,
                size: self.dice.below(6) as usize,
            },
            74 => Action::Empty { file },
            75..80 => Action::Get { file },
            80..84 => Action::Download { file },
            84..89 => self.draw_look(file),
            89..92 => Action::List {
                directory: self.draw_directory(home),
            },
            92..95 => Action::MakeDirectory {
                directory: self.draw_directory(home),
            },
            95..99 => Action::RemoveDirectory {
                directory: self.draw_directory(home),
            },
            _ => Action::Idle,
        }
    }

    fn draw_rename(&mut self, home: &str, from: String) -> Action {
        let to = format!("{home}{}", self.draw_file());
        Action::Rename {
            from,
            to,
            replace: self.dice.happens(400),
        }
    }

    fn draw_directory_rename(&mut self, home: &str) -> Action {
        let from = self.draw_directory(home);
        let to = self.draw_directory(home);
        Action::Rename {
            from,
            to,
            replace: self.dice.happens(300),
        }
    }

    fn draw_directory(&mut self, home: &str) -> String {
        format!("{home}{}", self.dice.pick(&DIRECTORIES))
    }

    /// Mostly one of the chosen names; sometimes one in the directory that renames make.
    fn draw_file(&mut self) -> String {
        match self.dice.happens(50) {
            true => format!("d2/{}", self.dice.pick(&FILES)),
            false => self.dice.pick(&self.names).clone(),
        }
    }

    /// Most contents are unique and of one size, as records are. Some are of several parts, some
    /// equal, some empty.
    fn draw_content(&mut self) -> String {
        let token = format!("<{:03}>", self.fresh_id());
        match self.dice.below(100) {
            0..65 => token,
            65..82 => token.repeat(13 + self.dice.below(60) as usize),
            82..88 => "equal".to_owned(),
            _ => String::new(),
        }
    }

    /// Several WRITEs.
    fn draw_long_content(&mut self) -> String {
        let token = format!("<{:03}>", self.fresh_id());
        token.repeat(13 + self.dice.below(40) as usize)
    }

    /// What is made with EXCL is a lock file as often as not, and those are empty.
    fn draw_lock(&mut self) -> String {
        if self.dice.happens(500) {
            String::new()
        } else {
            self.draw_content()
        }
    }

    fn fresh_id(&mut self) -> usize {
        self.next_id += 1;
        self.next_id
    }
}
