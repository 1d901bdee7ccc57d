//! Histories written by hand: the checker finds what is wrong in each, and nothing in their
//! harmless twins.

use super::checker::{Rule, check};
use super::history::{Cause, Event, Fault, Found, History, Leftovers, Outcome, What, Who};
use super::plan::{Action, BreakKind, Look};
use super::remote::{Kind, RequestName};
use bytes::Bytes;

/// A history in the making, and the milliseconds that passed in it without an event.
#[derive(Clone, Default)]
struct Script(History, u64);

impl Script {
    fn note(mut self, what: What) -> Script {
        let at = self.0.events.len() as u64 + self.1;
        self.0.events.push(Event { at, what });
        self
    }

    /// By a client of its own.
    fn begin(self, id: usize, action: Action) -> Script {
        self.begin_in(100 + id, id, action)
    }

    /// In this session.
    fn begin_in(self, session: usize, id: usize, action: Action) -> Script {
        let who = who(session);
        self.note(What::Began { id, who, action })
    }

    /// Its file is open for writing.
    fn open(self, id: usize) -> Script {
        self.note(What::Opened { id })
    }

    /// The client of this session is gone.
    fn hang_up(self, session: usize) -> Script {
        let who = who(session);
        let kind = BreakKind::HangsUp;
        self.note(What::Left { who, kind })
    }

    /// Its CLOSE is sent.
    fn close(self, id: usize) -> Script {
        self.note(What::Closing { id })
    }

    fn show(self, id: usize, size: Option<u64>) -> Script {
        self.note(What::Shown { id, size })
    }

    /// Lets time pass, in milliseconds.
    fn wait(mut self, time: u64) -> Script {
        self.1 += time;
        self
    }

    fn end(self, id: usize, outcome: Outcome) -> Script {
        self.note(What::Ended { id, outcome })
    }

    fn ok(self, id: usize) -> Script {
        self.end(id, Outcome::Done(Found::Nothing))
    }

    fn refuse(self, id: usize) -> Script {
        self.end(id, Outcome::Refused("no".to_owned()))
    }

    fn change(self, key: &str, before: Option<&str>, after: Option<&str>) -> Script {
        self.change_because(Cause::Request, key, before, after)
    }

    fn change_because(
        self,
        cause: Cause,
        key: &str,
        before: Option<&str>,
        after: Option<&str>,
    ) -> Script {
        let [before, after] =
            [before, after].map(|text| text.map(|text| Bytes::from(text.to_owned())));
        self.note(What::Changed {
            key: key.to_owned(),
            before,
            after,
            cause,
        })
    }

    /// A file that is there at the start.
    fn with(self, key: &str, content: &str) -> Script {
        self.change_because(Cause::Setup, key, None, Some(content))
    }

    fn fault(self, key: &str) -> Script {
        let request = RequestName {
            kind: Kind::Put,
            key: key.to_owned(),
            number: 1,
        };
        self.note(What::Fault {
            key: key.to_owned(),
            request,
            fault: Fault::LostAnswer,
        })
    }

    fn leave(mut self, leftovers: Leftovers) -> Script {
        self.0.leftovers = leftovers;
        self
    }

    #[track_caller]
    fn breaks(&self, rules: &[Rule]) {
        let mut found: Vec<Rule> = check(&self.0)
            .into_iter()
            .map(|violation| violation.rule)
            .collect();
        found.sort();
        assert_eq!(found, rules, "\n{}", self.0);
    }

    #[track_caller]
    fn breaks_nothing(&self) {
        self.breaks(&[]);
    }
}

fn who(session: usize) -> Who {
    Who {
        client: session,
        gateway: 1,
        session,
    }
}

fn put(file: &str, content: &str) -> Action {
    Action::Put {
        file: file.to_owned(),
        content: content.to_owned(),
        exclusive: false,
    }
}

fn create(file: &str, content: &str) -> Action {
    Action::Put {
        file: file.to_owned(),
        content: content.to_owned(),
        exclusive: true,
    }
}

fn append(file: &str, content: &str) -> Action {
    Action::Append {
        file: file.to_owned(),
        content: content.to_owned(),
    }
}

fn rename(from: &str, to: &str) -> Action {
    Action::Rename {
        from: from.to_owned(),
        to: to.to_owned(),
        replace: false,
    }
}

fn posix_rename(from: &str, to: &str) -> Action {
    Action::Rename {
        from: from.to_owned(),
        to: to.to_owned(),
        replace: true,
    }
}

fn remove(file: &str) -> Action {
    Action::Remove {
        file: file.to_owned(),
    }
}

fn get(file: &str) -> Action {
    Action::Get {
        file: file.to_owned(),
    }
}

fn list(directory: &str) -> Action {
    Action::List {
        directory: directory.to_owned(),
    }
}

fn content(text: &str) -> Outcome {
    Outcome::Done(Found::Content(Bytes::from(text.to_owned())))
}

/// Files of five bytes.
fn names(names: &[&str]) -> Outcome {
    let names = names.iter().map(|name| ((*name).to_owned(), 5));
    Outcome::Done(Found::Names(names.collect()))
}

#[test]
fn a_file_is_put_moved_read_and_removed() {
    let script = Script::default()
        .begin(1, put("d/a", "<001>"))
        .change("d/a", None, Some("<001>"))
        .ok(1)
        .begin(2, rename("d/a", "d/b"))
        .change("d/b", None, Some("<001>"))
        .change("d/a", Some("<001>"), None)
        .ok(2)
        .begin(3, get("d/b"))
        .end(3, content("<001>"))
        .begin(4, remove("d/b"))
        .change("d/b", Some("<001>"), None)
        .ok(4)
        .begin(5, get("d/b"))
        .end(5, Outcome::Missing);
    script.breaks_nothing();
}

#[test]
fn what_nobody_removes_must_stay() {
    let script = Script::default()
        .begin(1, put("a", "<001>"))
        .change("a", None, Some("<001>"))
        .ok(1);
    script
        .clone()
        .change("a", Some("<001>"), None)
        .breaks(&[Rule::NothingVanishes]);
    let removed = script
        .clone()
        .begin(2, remove("a"))
        .change("a", Some("<001>"), None);
    removed.clone().ok(2).breaks_nothing();
    removed.clone().end(2, Outcome::Unanswered).breaks_nothing();
    removed.clone().refuse(2).breaks(&[Rule::NothingVanishes]);
    script
        .begin(2, remove("a"))
        .fault("a")
        .change("a", Some("<001>"), None)
        .refuse(2)
        .breaks_nothing();
}

#[test]
fn a_rename_removes_what_it_has_copied_and_nothing_newer() {
    let copied = Script::default()
        .with("a", "<001>")
        .begin(1, rename("a", "b"))
        .change("b", None, Some("<001>"));
    let replaced = copied
        .begin(2, put("a", "<002>"))
        .change("a", Some("<001>"), Some("<002>"))
        .ok(2);
    replaced
        .clone()
        .change("a", Some("<002>"), None)
        .ok(1)
        .breaks(&[Rule::NothingVanishes]);
    let copied_again = replaced.change("b", Some("<001>"), Some("<002>"));
    copied_again
        .change("a", Some("<002>"), None)
        .ok(1)
        .breaks_nothing();
}

#[test]
fn a_failed_rename_takes_back_its_own_copy_only() {
    let copied = Script::default()
        .with("a", "<001>")
        .begin(1, rename("a", "b"))
        .change("b", None, Some("<001>"));
    copied
        .clone()
        .change("b", Some("<001>"), None)
        .refuse(1)
        .breaks_nothing();
    let foreign = Script::default()
        .with("a", "<001>")
        .begin(1, rename("a", "b"))
        .begin(2, put("b", "<002>"));
    let foreign = foreign
        .change("b", None, Some("<002>"))
        .ok(2)
        .change("b", Some("<002>"), None);
    foreign
        .clone()
        .refuse(1)
        .breaks(&[Rule::FailedRenameTakesBackItsOwn]);
    foreign
        .fault("b")
        .refuse(1)
        .breaks(&[Rule::FailedRenameTakesBackItsOwn]);
    // The source is gone by the rename's own doing: then the copy is all there is.
    let moved = copied.fault("b").change("a", Some("<001>"), None);
    moved
        .change("b", Some("<001>"), None)
        .refuse(1)
        .breaks(&[Rule::FailedRenameTakesBackItsOwn]);
}

#[test]
fn content_is_replaced_by_those_who_may() {
    let script = Script::default()
        .with("a", "<001>")
        .begin(1, put("a", "<002>"));
    script
        .clone()
        .change("a", Some("<001>"), Some("<002>"))
        .ok(1)
        .breaks_nothing();
    let foreign = script.clone().change("a", Some("<001>"), Some("<003>"));
    foreign
        .end(1, Outcome::Unanswered)
        .breaks(&[Rule::NothingIsReplaced]);
    let refused = script
        .clone()
        .change("a", Some("<001>"), Some("<002>"))
        .refuse(1);
    refused.breaks(&[Rule::RefusedChangesNothing]);
    let cut_off = script
        .clone()
        .change("a", Some("<001>"), Some("<002>"))
        .end(1, Outcome::CutOff);
    cut_off.breaks(&[Rule::RefusedChangesNothing]);
    let late =
        script
            .fault("a")
            .refuse(1)
            .change_because(Cause::Late, "a", Some("<001>"), Some("<002>"));
    late.clone().breaks_nothing();
    let unseen = late
        .begin(4, append("a", "<004>"))
        .change("a", Some("<002>"), Some("<001><004>"))
        .ok(4);
    unseen.breaks_nothing();
}

#[test]
fn appends_join_what_is_there() {
    let script = Script::default()
        .with("log", "<001>")
        .begin(1, append("log", "<002>"))
        .begin(2, append("log", "<003>"));
    let first = script
        .change("log", Some("<001>"), Some("<001><002>"))
        .ok(1);
    first
        .clone()
        .change("log", Some("<001><002>"), Some("<001><003>"))
        .ok(2)
        .breaks(&[Rule::AppendsJoin]);
    first
        .clone()
        .change("log", Some("<001><002>"), Some("<001><002><003>"))
        .ok(2)
        .breaks_nothing();
    first.refuse(2).breaks_nothing();
}

#[test]
fn one_rename_to_a_free_name_wins() {
    let script = Script::default().with("a", "<001>").with("b", "<002>");
    let script = script.begin(1, rename("a", "c")).begin(2, rename("b", "c"));
    let first = script
        .change("c", None, Some("<001>"))
        .change("a", Some("<001>"), None)
        .ok(1);
    first.clone().refuse(2).breaks_nothing();
    let second = first
        .change("c", Some("<001>"), Some("<002>"))
        .change("b", Some("<002>"), None)
        .ok(2);
    second.breaks(&[Rule::OneRenameToATarget]);
    let put = Script::default()
        .with("a", "<001>")
        .begin(1, rename("a", "c"))
        .begin(2, put("c", "<002>"));
    let put = put
        .change("c", None, Some("<002>"))
        .ok(2)
        .change("c", Some("<002>"), Some("<001>"));
    put.change("a", Some("<001>"), None)
        .ok(1)
        .breaks(&[Rule::RenameReplacesNothing]);
    let posix = Script::default()
        .with("a", "<001>")
        .with("c", "<002>")
        .begin(1, posix_rename("a", "c"));
    posix
        .change("c", Some("<002>"), Some("<001>"))
        .change("a", Some("<001>"), None)
        .ok(1)
        .breaks_nothing();
}

#[test]
fn one_rename_of_a_source_wins() {
    let script = Script::default()
        .with("a", "<001>")
        .begin(1, rename("a", "b"))
        .begin(2, rename("a", "c"));
    let copied = script
        .change("b", None, Some("<001>"))
        .change("c", None, Some("<001>"));
    let moved = copied.change("a", Some("<001>"), None).ok(1);
    moved
        .clone()
        .ok(2)
        .breaks(&[Rule::OneRenameOfASource, Rule::OnePlace]);
    moved
        .clone()
        .change("c", Some("<001>"), None)
        .end(2, Outcome::Missing)
        .breaks_nothing();
    moved
        .end(2, Outcome::Missing)
        .breaks(&[Rule::RefusedRenameLeavesNothing, Rule::OnePlace]);
    let late = Script::default()
        .with("a", "<001>")
        .begin(1, rename("a", "b"))
        .fault("b")
        .refuse(1);
    let late =
        late.begin(2, rename("a", "b"))
            .change_because(Cause::Late, "b", None, Some("<001>"));
    late.refuse(2).breaks_nothing();
}

#[test]
fn one_of_two_exclusive_creators_wins() {
    let script = Script::default()
        .begin(1, create("lock", ""))
        .begin(2, create("lock", ""))
        .change("lock", None, Some(""));
    script.clone().ok(1).refuse(2).breaks_nothing();
    script
        .clone()
        .ok(1)
        .ok(2)
        .breaks(&[Rule::OneExclusiveWinner]);
    let released = script
        .ok(1)
        .begin(3, remove("lock"))
        .change("lock", Some(""), None)
        .ok(3);
    released
        .change("lock", None, Some(""))
        .ok(2)
        .breaks_nothing();
    let replacing = Script::default()
        .with("a", "<001>")
        .begin(1, create("a", "<002>"));
    let replacing = replacing.change("a", Some("<001>"), Some("<002>")).ok(1);
    replacing.breaks(&[Rule::ExclusiveReplacesNothing]);
}

#[test]
fn what_is_told_ok_takes_place() {
    Script::default()
        .begin(1, put("a", "<001>"))
        .ok(1)
        .breaks(&[Rule::DoneMeansDone]);
    Script::default()
        .begin(1, append("a", "<001>"))
        .ok(1)
        .breaks(&[Rule::DoneMeansDone]);
    Script::default()
        .with("a", "<001>")
        .begin(1, remove("a"))
        .ok(1)
        .breaks(&[Rule::DoneMeansDone]);
    let cut = Action::Cut {
        file: "a".to_owned(),
        size: 2,
    };
    Script::default()
        .with("a", "<001>")
        .begin(1, cut.clone())
        .ok(1)
        .breaks(&[Rule::DoneMeansDone]);
    let cut =
        Script::default()
            .with("a", "<001>")
            .begin(1, cut)
            .change("a", Some("<001>"), Some("<0"));
    cut.ok(1).breaks_nothing();
    let empty = Action::Empty {
        file: "a".to_owned(),
    };
    Script::default()
        .with("a", "<001>")
        .begin(1, empty.clone())
        .ok(1)
        .breaks(&[Rule::DoneMeansDone]);
    Script::default()
        .with("a", "<001>")
        .begin(1, empty)
        .change("a", Some("<001>"), Some(""))
        .ok(1)
        .breaks_nothing();
    let renamed = Script::default()
        .with("a", "<001>")
        .begin(1, rename("a", "b"))
        .ok(1);
    renamed.breaks(&[Rule::DoneMeansDone, Rule::OneRenameOfASource]);
    let removed = Action::RemoveDirectory {
        directory: "d".to_owned(),
    };
    Script::default()
        .with("d/a", "<001>")
        .begin(1, removed.clone())
        .ok(1)
        .breaks(&[Rule::DoneMeansDone]);
    Script::default().begin(1, removed).ok(1).breaks_nothing();
}

#[test]
fn a_directory_is_renamed_file_by_file() {
    let script = Script::default()
        .with("d/a", "<001>")
        .with("d/b", "<002>")
        .begin(1, rename("d", "e"));
    let copied = script
        .change("e/a", None, Some("<001>"))
        .change("e/b", None, Some("<002>"));
    let moved =
        copied
            .clone()
            .change("d/a", Some("<001>"), None)
            .change("d/b", Some("<002>"), None);
    moved.clone().ok(1).breaks_nothing();
    moved.refuse(1).breaks(&[
        Rule::NothingVanishes,
        Rule::NothingVanishes,
        Rule::RefusedRenameLeavesNothing,
        Rule::RefusedRenameLeavesNothing,
    ]);
    copied
        .clone()
        .change("d/a", Some("<001>"), None)
        .fault("d/b")
        .refuse(1)
        .breaks_nothing();
    let replaced = copied
        .begin(2, put("d/a", "<003>"))
        .change("d/a", Some("<001>"), Some("<003>"))
        .ok(2);
    replaced
        .change("d/a", Some("<003>"), None)
        .ok(1)
        .breaks(&[Rule::NothingVanishes, Rule::OnePlace]);
}

#[test]
fn a_get_is_one_version() {
    let script = Script::default()
        .with("a", "<001>")
        .begin(1, get("a"))
        .begin(2, put("a", "<002>"));
    let script = script.change("a", Some("<001>"), Some("<002>")).ok(2);
    script.clone().end(1, content("<001>")).breaks_nothing();
    script.clone().end(1, content("<002>")).breaks_nothing();
    script
        .clone()
        .end(1, content("<00"))
        .breaks(&[Rule::GetIsOneVersion]);
    script
        .end(1, content("<001<002>"))
        .breaks(&[Rule::GetIsOneVersion]);
    let later = Script::default()
        .begin(2, put("a", "<002>"))
        .change("a", None, Some("<002>"))
        .ok(2);
    later
        .begin(1, get("a"))
        .end(1, content(""))
        .breaks(&[Rule::GetIsOneVersion]);
}

#[test]
fn no_such_file_is_the_truth() {
    let script = Script::default().with("a", "<001>");
    script
        .clone()
        .begin(1, get("a"))
        .end(1, Outcome::Missing)
        .breaks(&[Rule::MissingMeansMissing]);
    script
        .clone()
        .begin(1, rename("a", "b"))
        .end(1, Outcome::Missing)
        .breaks(&[Rule::MissingMeansMissing]);
    script
        .begin(1, get("b"))
        .end(1, Outcome::Missing)
        .breaks_nothing();
}

#[test]
fn a_list_shows_what_is_there() {
    let script = Script::default().with("d/a", "<001>").begin(1, list("d"));
    script.clone().end(1, names(&["a"])).breaks_nothing();
    script
        .clone()
        .end(1, names(&[]))
        .breaks(&[Rule::ListIsTrue]);
    script
        .clone()
        .end(1, names(&["a", "b"]))
        .breaks(&[Rule::ListIsTrue, Rule::SizesAreTrue]);
    script
        .begin(2, put("d/b", "<002>"))
        .end(1, names(&["a", "b"]))
        .refuse(2)
        .breaks(&[Rule::SizesAreTrue]);
}

#[test]
fn content_is_in_one_place() {
    let script = Script::default()
        .with("a", "<001>")
        .begin(1, rename("a", "b"))
        .change("b", None, Some("<001>"));
    script.clone().fault("b").refuse(1).breaks_nothing();
    script.clone().ok(1).breaks(&[
        Rule::DoneMeansDone,
        Rule::OneRenameOfASource,
        Rule::OnePlace,
    ]);
    let twice = Script::default().with("a", "<001>").with("b", "<001>");
    twice.breaks(&[Rule::OnePlace]);
}

#[test]
fn every_request_is_answered() {
    let script = Script::default().begin(1, get("a"));
    script
        .clone()
        .note(What::Hung { id: 1 })
        .breaks(&[Rule::NothingHangs]);
    script.end(1, Outcome::Unanswered).breaks_nothing();
}

#[test]
fn nothing_is_left_at_the_end() {
    let none = Leftovers::default();
    Script::default().leave(none.clone()).breaks_nothing();
    let upload = Leftovers {
        uploads: vec!["a".to_owned()],
        ..none.clone()
    };
    let memory = Leftovers {
        memory: 1024,
        ..none.clone()
    };
    let session = Leftovers {
        sessions: 1,
        ..none.clone()
    };
    let transfer = Leftovers {
        transfers: 1,
        ..none
    };
    for leftovers in [upload, memory, session, transfer] {
        Script::default()
            .leave(leftovers)
            .breaks(&[Rule::QuietIsQuiet]);
    }
}

fn resume(file: &str, content: &str) -> Action {
    Action::Resume {
        file: file.to_owned(),
        content: content.to_owned(),
    }
}

fn download(file: &str) -> Action {
    Action::Download {
        file: file.to_owned(),
    }
}

fn stat(file: &str) -> Action {
    Action::Look {
        file: file.to_owned(),
        request: Look::Stat,
    }
}

fn empty(file: &str) -> Action {
    Action::Empty {
        file: file.to_owned(),
    }
}

fn size(size: u64) -> Outcome {
    Outcome::Done(Found::Size(size))
}

/// A session in which all is written to this file, and CLOSE is not sent.
fn written(file: &str, content: &str) -> Script {
    Script::default().begin_in(1, 1, put(file, content)).open(1)
}

#[test]
fn uploads_are_seen_by_their_own_session() {
    let put = written("a", "<001>");
    let own = put.clone().begin_in(1, 2, stat("a"));
    own.clone().end(2, size(5)).breaks_nothing();
    own.clone().end(2, size(4)).breaks(&[Rule::SizesAreTrue]);
    own.end(2, Outcome::Missing).breaks(&[Rule::SizesAreTrue]);
    let foreign = put.begin_in(2, 2, stat("a"));
    foreign.clone().end(2, Outcome::Missing).breaks_nothing();
    foreign.end(2, size(5)).breaks(&[Rule::SizesAreTrue]);
    let over_old = Script::default()
        .with("a", "<00001>")
        .begin_in(1, 1, append("a", "<2>"));
    let foreign = over_old.clone().open(1).begin_in(2, 2, stat("a"));
    foreign.clone().end(2, size(7)).breaks_nothing();
    foreign.end(2, size(10)).breaks(&[Rule::SizesAreTrue]);
    let own = over_old.open(1).begin_in(1, 2, stat("a"));
    own.clone().end(2, size(10)).breaks_nothing();
    own.end(2, size(7)).breaks(&[Rule::SizesAreTrue]);
}

#[test]
fn a_listing_may_be_told_for_a_while() {
    let other_gateway = Who {
        client: 9,
        gateway: 2,
        session: 9,
    };
    let listed = Script::default()
        .with("d/a", "<001>")
        .begin_in(1, 1, list("d"))
        .end(1, names(&["a"]));
    let changed = listed
        .note(What::Began {
            id: 2,
            who: other_gateway,
            action: put("d/a", "<00002>"),
        })
        .change("d/a", Some("<001>"), Some("<00002>"))
        .ok(2);
    let soon = changed.clone().begin_in(1, 3, stat("d/a"));
    soon.end(3, size(5)).breaks_nothing();
    let late = changed.clone().wait(3000).begin_in(1, 3, stat("d/a"));
    late.end(3, size(5)).breaks(&[Rule::SizesAreTrue]);
    let another = changed.begin_in(2, 3, stat("d/a"));
    another.end(3, size(5)).breaks(&[Rule::SizesAreTrue]);
}

#[test]
fn the_last_change_is_shown() {
    let newer = written("a", "<001>")
        .begin_in(2, 2, put("a", "<00002>"))
        .open(2)
        .change("a", None, Some("<00002>"))
        .close(2)
        .ok(2);
    for session in [1, 2] {
        let look = newer.clone().begin_in(session, 3, stat("a"));
        look.clone().end(3, size(7)).breaks_nothing();
        look.end(3, size(5)).breaks(&[Rule::LastChangeIsShown]);
    }
    let look = newer
        .begin_in(2, 3, remove("a"))
        .change("a", Some("<00002>"), None)
        .ok(3)
        .begin_in(1, 4, stat("a"));
    look.clone().end(4, Outcome::Missing).breaks_nothing();
    look.end(4, size(5)).breaks(&[Rule::LastChangeIsShown]);
    // One that began later than the upload that was closed is still shown.
    let older = Script::default()
        .begin_in(2, 2, put("a", "<00002>"))
        .begin_in(1, 1, put("a", "<001>"))
        .open(1)
        .change("a", None, Some("<00002>"))
        .ok(2);
    older
        .begin_in(1, 3, stat("a"))
        .end(3, size(5))
        .breaks_nothing();
}

#[test]
fn a_resumed_upload_is_its_source() {
    let broken = written("a", "<001>").end(1, Outcome::CutOff);
    let nothing = broken
        .clone()
        .begin_in(2, 2, resume("a", "<001>"))
        .show(2, None)
        .close(2);
    nothing
        .clone()
        .change("a", None, Some("<001>"))
        .ok(2)
        .breaks_nothing();
    let half = broken
        .begin_in(2, 2, resume("a", "<001>"))
        .show(2, Some(2))
        .close(2);
    half.change("a", None, Some("\0\x0001>"))
        .ok(2)
        .breaks(&[Rule::SizesAreTrue, Rule::ResumeIsWhole]);
    let old = Script::default()
        .with("a", "<0")
        .begin_in(2, 2, resume("a", "<001>"))
        .show(2, Some(2));
    old.clone()
        .change("a", Some("<0"), Some("<001>"))
        .ok(2)
        .breaks_nothing();
    old.clone()
        .change("a", Some("<0"), Some("\0\x0001>"))
        .ok(2)
        .breaks(&[Rule::ResumeIsWhole]);
    old.clone().ok(2).breaks(&[Rule::DoneMeansDone]);
    // Nobody can know better than the look.
    let replaced = old
        .begin(3, put("a", "<00003>"))
        .change("a", Some("<0"), Some("<00003>"))
        .ok(3);
    replaced
        .change("a", Some("<00003>"), Some("<001>3>"))
        .ok(2)
        .breaks_nothing();
    // The bytes are of what was there, and not of what was shown.
    let mixed = Script::default()
        .with("a", "<00003>")
        .begin_in(2, 2, resume("a", "<001>"))
        .show(2, Some(2))
        .change("a", Some("<00003>"), Some("<001>3>"));
    mixed
        .ok(2)
        .breaks(&[Rule::SizesAreTrue, Rule::ResumeIsWhole]);
}

#[test]
fn a_download_is_whole() {
    let script = Script::default()
        .with("a", "<00001>")
        .begin(1, put("a", "<2>"))
        .open(1)
        .begin_in(2, 2, download("a"));
    let shown = script.clone().show(2, Some(7));
    shown.clone().end(2, content("<00001>")).breaks_nothing();
    let stored = shown.change("a", Some("<00001>"), Some("<2>")).ok(1);
    stored.refuse(2).breaks_nothing();
    let cut = script.clone().show(2, Some(3)).end(2, content("<00"));
    cut.breaks(&[Rule::SizesAreTrue, Rule::DownloadIsWhole]);
    let replaced = script
        .clone()
        .show(2, Some(7))
        .begin(3, put("a", "<00000003>"))
        .change("a", Some("<00001>"), Some("<00000003>"))
        .ok(3);
    replaced.clone().end(2, content("<000000")).breaks_nothing();
    replaced
        .end(2, content("<00001>03>"))
        .breaks(&[Rule::DownloadIsWhole]);
}

#[test]
fn a_session_keeps_its_order() {
    let overtaken = written("a", "<001>")
        .begin_in(1, 2, put("a", "<002>"))
        .close(1)
        .close(2);
    overtaken
        .clone()
        .change("a", None, Some("<001>"))
        .ok(1)
        .change("a", Some("<001>"), Some("<002>"))
        .ok(2)
        .breaks_nothing();
    overtaken
        .change("a", None, Some("<002>"))
        .ok(2)
        .change("a", Some("<002>"), Some("<001>"))
        .ok(1)
        .breaks(&[Rule::SessionKeepsOrder, Rule::SessionSeesItsWrites]);
    // The CLOSE is too late to be waited for.
    written("a", "<001>")
        .begin_in(1, 2, put("a", "<002>"))
        .close(2)
        .change("a", None, Some("<002>"))
        .ok(2)
        .wait(3000)
        .close(1)
        .change("a", Some("<002>"), Some("<001>"))
        .ok(1)
        .breaks_nothing();
}

#[test]
fn pipelined_renames_keep_their_order() {
    let sent = written("a", "<001>")
        .with("c", "<003>")
        .begin_in(1, 2, posix_rename("a", "b"))
        .begin_in(1, 3, posix_rename("c", "b"))
        .close(1);
    let first = |script: Script, before| {
        script
            .change("b", before, Some("<001>"))
            .change("a", Some("<001>"), None)
            .ok(2)
    };
    let second = |script: Script, before| {
        script
            .change("b", before, Some("<003>"))
            .change("c", Some("<003>"), None)
            .ok(3)
    };
    let stored = sent.clone().change("a", None, Some("<001>")).ok(1);
    second(first(stored, None), Some("<001>")).breaks_nothing();
    let stored = second(sent, None).change("a", None, Some("<001>")).ok(1);
    first(stored, Some("<003>")).breaks(&[Rule::SessionKeepsOrder]);
}

#[test]
fn a_session_sees_its_writes() {
    let script = written("a", "<002>").with("a", "<001>");
    let read = script.clone().begin_in(1, 2, get("a")).close(1);
    let stored = read.clone().change("a", Some("<001>"), Some("<002>")).ok(1);
    stored.clone().end(2, content("<002>")).breaks_nothing();
    stored
        .end(2, content("<001>"))
        .breaks(&[Rule::SessionSeesItsWrites]);
    // What is carried out before CLOSE is undone by it.
    script
        .clone()
        .begin_in(1, 2, remove("a"))
        .change("a", Some("<001>"), None)
        .ok(2)
        .close(1)
        .change("a", None, Some("<002>"))
        .ok(1)
        .breaks(&[
            Rule::SessionKeepsOrder,
            Rule::SessionSeesItsWrites,
            Rule::RemoveGivesUp,
        ]);
    script
        .begin_in(1, 2, remove("a"))
        .close(1)
        .change("a", Some("<001>"), Some("<002>"))
        .ok(1)
        .change("a", Some("<002>"), None)
        .ok(2)
        .breaks_nothing();
}

#[test]
fn what_overtakes_a_close_waits_for_it() {
    for action in [
        get("a"),
        append("a", "<002>"),
        remove("a"),
        empty("a"),
        rename("a", "b"),
        resume("a", "<001><002>"),
    ] {
        let overtaking = written("a", "<001>").begin_in(1, 2, action);
        let in_time = overtaking.clone().wait(2000).close(1);
        in_time
            .change("a", None, Some("<001>"))
            .ok(1)
            .refuse(2)
            .breaks(&[Rule::OvertakingWaits]);
        let late = overtaking.wait(3000).refuse(2).close(1);
        let stored = late.change("a", None, Some("<001>")).ok(1);
        let is_remove = stored.0.events.iter().any(
            |event| matches!(&event.what, What::Began { action, .. } if *action == remove("a")),
        );
        match is_remove {
            true => stored.breaks(&[Rule::RemoveGivesUp]),
            false => stored.breaks_nothing(),
        }
    }
    // Somebody else may be the reason.
    written("a", "<001>")
        .begin_in(1, 2, append("a", "<002>"))
        .begin_in(2, 3, put("a", "<003>"))
        .close(1)
        .change("a", None, Some("<001>"))
        .ok(1)
        .change("a", Some("<001>"), Some("<003>"))
        .ok(3)
        .refuse(2)
        .breaks_nothing();
}

#[test]
fn uploads_of_others_are_no_obstacle() {
    let busy = Outcome::Refused("Failure: an upload to it is in progress".to_owned());
    for action in [get("a"), empty("a"), append("a", "<002>"), remove("a")] {
        written("a", "<001>")
            .begin_in(2, 2, action)
            .end(2, busy.clone())
            .breaks(&[Rule::OvertakingWaits]);
    }
    written("a", "<001>")
        .begin_in(2, 2, rename("a", "b"))
        .end(2, busy.clone())
        .breaks_nothing();
    written("a", "<001>")
        .begin_in(1, 2, get("a"))
        .end(2, busy)
        .breaks_nothing();
}

#[test]
fn open_files_are_left_alone() {
    let script = written("a", "<002>").with("a", "<001>");
    let read = script.clone().begin_in(1, 2, get("a"));
    read.clone().refuse(2).breaks_nothing();
    read.end(2, content("<001>"))
        .breaks(&[Rule::OpenFilesAreLeftAlone]);
    let edited = script
        .clone()
        .begin_in(1, 2, append("a", "<003>"))
        .change("a", Some("<001>"), Some("<001><003>"))
        .ok(2);
    edited.breaks(&[Rule::OpenFilesAreLeftAlone]);
    let replaced = script
        .begin_in(1, 2, put("a", "<003>"))
        .change("a", Some("<001>"), Some("<003>"))
        .ok(2);
    replaced.breaks_nothing();
}

#[test]
fn remove_gives_an_upload_up() {
    let removed = written("a", "<002>")
        .with("a", "<001>")
        .begin_in(1, 2, remove("a"))
        .change("a", Some("<001>"), None)
        .ok(2);
    removed.clone().wait(1).close(1).refuse(1).breaks_nothing();
    removed
        .wait(3000)
        .close(1)
        .change("a", None, Some("<002>"))
        .ok(1)
        .breaks(&[Rule::RemoveGivesUp]);
    let new = written("a", "<002>").begin_in(1, 2, remove("a"));
    new.clone()
        .ok(2)
        .begin_in(1, 3, stat("a"))
        .end(3, Outcome::Missing)
        .breaks_nothing();
    new.clone()
        .ok(2)
        .begin_in(1, 3, stat("a"))
        .end(3, size(5))
        .breaks(&[Rule::LastChangeIsShown]);
    new.end(2, Outcome::Missing).breaks(&[Rule::RemoveGivesUp]);
}

#[test]
fn what_waits_ends_with_its_session() {
    let renaming = written("a", "<002>")
        .with("a", "<001>")
        .begin_in(1, 2, rename("a", "b"));
    let gone = renaming
        .clone()
        .hang_up(1)
        .end(2, Outcome::Unanswered)
        .end(1, Outcome::CutOff);
    gone.clone().breaks_nothing();
    gone.change("b", None, Some("<001>"))
        .change("a", Some("<001>"), None)
        .breaks(&[
            Rule::WaitingEndsWithTheSession,
            Rule::WaitingEndsWithTheSession,
        ]);
    let closed = renaming
        .close(1)
        .hang_up(1)
        .end(2, Outcome::Unanswered)
        .end(1, Outcome::Unanswered);
    closed
        .change("a", Some("<001>"), Some("<002>"))
        .change("b", None, Some("<002>"))
        .change("a", Some("<002>"), None)
        .breaks_nothing();
    let removing = written("a", "<002>")
        .with("a", "<001>")
        .begin_in(1, 2, remove("a"));
    let gone = |script: Script| {
        script
            .hang_up(1)
            .end(2, Outcome::Unanswered)
            .end(1, Outcome::CutOff)
            .change("a", Some("<001>"), None)
    };
    gone(removing.clone()).breaks(&[Rule::WaitingEndsWithTheSession]);
    // By then it does without the CLOSE.
    gone(removing.wait(3000)).breaks_nothing();
}
