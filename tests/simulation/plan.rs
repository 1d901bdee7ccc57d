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
    /// The client hangs up this many milliseconds after it began, if it is still at it.
    pub hang_up: Option<u64>,
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
    Get {
        file: String,
    },
    /// Nothing, until the session has ended.
    Idle,
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
        let steps = 2 + self.dice.below(6);
        let steps = (0..steps).map(|_| self.draw_step(&home)).collect();
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
        let hang_up = if self.dice.happens(50) {
            Some(self.dice.below(500))
        } else {
            None
        };
        Step {
            id: self.fresh_id(),
            pause,
            action,
            slow,
            hang_up,
        }
    }

    fn draw_action(&mut self, home: &str) -> Action {
        let file = format!("{home}{}", self.draw_file());
        match self.dice.below(100) {
            0..20 => Action::Put {
                file,
                content: self.draw_content(),
                exclusive: false,
            },
            20..30 => Action::Put {
                file,
                content: self.draw_lock(),
                exclusive: true,
            },
            30..42 => Action::Append {
                file,
                content: self.draw_content(),
            },
            42..63 => self.draw_rename(home, file),
            63..68 => self.draw_directory_rename(home),
            68..76 => Action::Remove { file },
            76..79 => Action::Cut {
                file,
                size: self.dice.below(6) as usize,
            },
            79 => Action::Empty { file },
            80..88 => Action::Get { file },
            88..92 => Action::List {
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
