//! Finds broken promises in a history. It sees both sides: what clients were told, and every change
//! of an object in the bucket, all in one order. So most of the work is one question: who asked for
//! this change?
//!
//! Contents are mostly unique, so bytes say whose they are. What a session may rely on, beside what
//! others do, is checked in `session_rules`.

use super::history::{Cause, Event, Fault, Found, History, Leftovers, Outcome, What, Who, object};
use super::plan::{Action, BreakKind};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// A promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// Content vanishes only by an action under way that removes it, or moves it to where it is
    /// then; and that was told OK, or has an unclear outcome.
    NothingVanishes,
    /// Content is replaced only by such an action, and only by the content that this action has.
    NothingIsReplaced,
    /// What is appended joins what is there.
    AppendsJoin,
    /// A version 3 rename replaces nothing, and neither does one of a directory.
    RenameReplacesNothing,
    /// So, of several that rename to one name, one wins.
    OneRenameToATarget,
    /// A rename that fails takes back its own copies, and nothing that others have put there.
    FailedRenameTakesBackItsOwn,
    /// What is made with EXCL replaces nothing.
    ExclusiveReplacesNothing,
    /// An action that is clearly refused changes nothing.
    RefusedChangesNothing,
    /// What was told OK happened while it was under way.
    DoneMeansDone,
    /// Of all that make one name with EXCL, each that is told OK has made it.
    OneExclusiveWinner,
    /// Of all that rename one file, each that is told OK has taken it away, unless it had to
    /// replace another file.
    OneRenameOfASource,
    /// A rename that is clearly refused leaves no copy behind.
    RefusedRenameLeavesNothing,
    /// A get returns one version, whole, that was current while it ran.
    GetIsOneVersion,
    /// NO_SUCH_FILE is told of names that were free while the action ran.
    MissingMeansMissing,
    /// A list shows all files that were there from its beginning to its end, and none that were
    /// never there.
    ListIsTrue,
    /// A size that is shown is one that OPEN can start from: of what is stored, or of an upload of
    /// the session itself.
    SizesAreTrue,
    /// The last CLOSE, remove or rename that was told OK is what is shown, whatever older uploads
    /// are open.
    LastChangeIsShown,
    /// A resumed upload that is told OK is what was shown and the rest of its source.
    ResumeIsWhole,
    /// A download of as many bytes as STAT has told is one version, whole.
    DownloadIsWhole,
    /// What a session sends about one name is carried out in the order in which it was sent, though
    /// a CLOSE may be late.
    SessionKeepsOrder,
    /// A session sees what it was told OK for, or will be.
    SessionSeesItsWrites,
    /// A request waits for a CLOSE that its session sends in time, and is refused because of an
    /// upload only if that is still open.
    OvertakingWaits,
    /// What its session still writes is neither read, nor edited, nor moved.
    OpenFilesAreLeftAlone,
    /// REMOVE of a file that its session still writes gives the upload up.
    RemoveGivesUp,
    /// A request that waits for a CLOSE is not carried out once its client is gone.
    WaitingEndsWithTheSession,
    /// Nobody copied anything, so no content is in two places at the end.
    OnePlace,
    /// Every request is answered.
    NothingHangs,
    /// At the end no upload is in progress, no memory is held, and no session or transfer is left.
    QuietIsQuiet,
}

/// A promise, and how it was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub rule: Rule,
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.text)
    }
}

/// All broken promises of a history.
pub fn check(history: &History) -> Vec<Violation> {
    let mut story = Story::of(&history.events);
    story.check_changes();
    story.check_refused_renames();
    story.check_winners();
    for number in 0..story.deeds.len() {
        story.check_number(number);
    }
    story.check_sessions();
    // A request that is sent again may bring back what was moved since.
    if history.count_faults(&[Fault::Repeated]) == 0 {
        story.check_places();
    }
    story.check_end(&history.leftovers);
    story.violations
}

/// When something happened.
#[derive(Clone, Copy)]
pub(super) struct Moment {
    /// Index of the event.
    pub index: usize,
    /// In virtual milliseconds.
    pub at: u64,
}

/// An action, from its beginning to its end.
#[derive(Clone)]
pub(super) struct Deed {
    pub id: usize,
    pub who: Who,
    pub action: Action,
    /// Index of the event.
    pub began: usize,
    /// In virtual milliseconds.
    pub began_at: u64,
    /// When its STAT was answered, and with which size.
    pub shown: Option<(usize, Option<u64>)>,
    /// When its file was open for writing.
    pub opened: Option<usize>,
    /// When its CLOSE was sent.
    pub closing: Option<Moment>,
    /// Index of the event; the last one where the client never learnt how it went.
    pub ended: usize,
    /// Index of the event after which the client waited no longer.
    pub left: Option<usize>,
    /// When the client hung up.
    pub hung_up: Option<Moment>,
    pub outcome: Outcome,
    /// Did every request that the store saw about these names go well? Then a refusal is a clear
    /// one.
    pub is_clear: bool,
}

impl Deed {
    /// Can it have changed anything?
    pub(super) fn may_have_acted(&self) -> bool {
        match self.outcome {
            Outcome::Done(_) | Outcome::Unanswered => true,
            Outcome::Missing | Outcome::Refused(_) => !self.is_clear,
            Outcome::CutOff => false,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.outcome, Outcome::Done(_))
    }

    pub(super) fn is_under_way(&self, at: usize) -> bool {
        self.began < at && at < self.ended
    }

    /// Does it store this content, or content that ends so?
    fn stores(&self, content: Option<&[u8]>) -> bool {
        match (&self.action, content) {
            (Action::Put { content: own, .. }, Some(content)) => content == own.as_bytes(),
            (Action::Append { content: own, .. }, Some(content)) => {
                content.ends_with(own.as_bytes()) && content.is_empty() == own.is_empty()
            }
            (Action::Resume { content: own, .. }, Some(content)) => {
                let there = own.len() - self.rest().len()..own.len();
                !self.rest().is_empty() && content.get(there) == Some(self.rest())
            }
            _ => false,
        }
    }

    /// What a resumed upload sends: its source without the bytes that it was shown.
    pub(super) fn rest(&self) -> &[u8] {
        match (&self.action, self.shown) {
            (Action::Resume { content, .. }, Some((_, size))) => {
                let there = size.unwrap_or(0) as usize;
                content.as_bytes().get(there..).unwrap_or_default()
            }
            _ => &[],
        }
    }

    /// Is it a rename with this key among its sources?
    fn moves(&self, key: &str) -> bool {
        matches!(&self.action, Action::Rename { from, .. } if is_at_or_below(key, from))
    }

    pub(super) fn violates(&self, rule: Rule, how: &str) -> Violation {
        Violation {
            rule,
            text: format!("#{}, {}: {how}", self.id, self.action),
        }
    }
}

/// A change of an object.
#[derive(Clone)]
pub(super) struct Change {
    pub at: usize,
    pub key: String,
    pub before: Option<Bytes>,
    pub after: Option<Bytes>,
    pub cause: Cause,
    /// What it takes away was put there late: whoever looked before saw something else, and only a
    /// store that keeps conditions could have stopped it. Nobody was told OK for such content.
    takes_late: bool,
    /// Indexes of the deeds that can have made it.
    pub deeds: BTreeSet<usize>,
}

pub(super) struct Story {
    pub deeds: Vec<Deed>,
    pub changes: Vec<Change>,
    hung: Vec<usize>,
    pub violations: Vec<Violation>,
}

/// Is this key the path, or below it?
pub(super) fn is_at_or_below(key: &str, path: &str) -> bool {
    key.strip_prefix(path)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// A directory's own object, which has no content.
fn is_marker(key: &str) -> bool {
    key.ends_with('/')
}

/// Names that the outcome of an action depends on.
pub(super) fn paths(action: &Action) -> Vec<&str> {
    match action {
        Action::Put { file, .. }
        | Action::Append { file, .. }
        | Action::Cut { file, .. }
        | Action::Empty { file }
        | Action::Remove { file }
        | Action::Resume { file, .. }
        | Action::Download { file }
        | Action::Look { file, .. }
        | Action::Get { file } => vec![file],
        Action::Rename { from, to, .. } => vec![from, to],
        Action::MakeDirectory { directory }
        | Action::RemoveDirectory { directory }
        | Action::List { directory } => {
            vec![directory]
        }
        Action::Idle => Vec::new(),
    }
}

impl Story {
    fn of(events: &[Event]) -> Story {
        let mut story = Story {
            deeds: Vec::new(),
            changes: Vec::new(),
            hung: Vec::new(),
            violations: Vec::new(),
        };
        for (at, event) in events.iter().enumerate() {
            match &event.what {
                What::Began { id, who, action } => story.deeds.push(Deed {
                    id: *id,
                    who: *who,
                    action: action.clone(),
                    began: at,
                    began_at: event.at,
                    shown: None,
                    opened: None,
                    closing: None,
                    ended: usize::MAX,
                    left: None,
                    hung_up: None,
                    outcome: Outcome::Unanswered,
                    is_clear: true,
                }),
                What::Shown { id, size } => story.deed_mut(*id).shown = Some((at, *size)),
                What::Opened { id } => story.deed_mut(*id).opened = Some(at),
                What::Closing { id } => {
                    let (index, at) = (at, event.at);
                    story.deed_mut(*id).closing = Some(Moment { index, at });
                }
                What::Ended { id, outcome } => {
                    let deed = story.deed_mut(*id);
                    deed.outcome = outcome.clone();
                    deed.left = Some(at);
                    // What nobody waits for may still be under way.
                    if *outcome != Outcome::Unanswered {
                        deed.ended = at;
                    }
                }
                What::Left {
                    who,
                    kind: BreakKind::HangsUp,
                } => {
                    let (index, at) = (at, event.at);
                    for deed in story.deeds.iter_mut().filter(|deed| deed.who == *who) {
                        deed.hung_up = Some(Moment { index, at });
                    }
                }
                // The server does not know.
                What::Left {
                    kind: BreakKind::FallsSilent,
                    ..
                } => {}
                What::Hung { id } => story.hung.push(*id),
                What::Changed {
                    key,
                    before,
                    after,
                    cause,
                } => story.changes.push(Change {
                    at,
                    key: key.clone(),
                    before: before.clone(),
                    after: after.clone(),
                    cause: *cause,
                    takes_late: story.is_late(key),
                    deeds: BTreeSet::new(),
                }),
                What::Fault { .. } => {}
            }
        }
        story.note_faults(events);
        story
    }

    /// Is what a key holds there by a late effect?
    fn is_late(&self, key: &str) -> bool {
        let last = self.changes.iter().rfind(|change| change.key == key);
        last.is_some_and(|last| last.cause == Cause::Late)
    }

    fn deed_mut(&mut self, id: usize) -> &mut Deed {
        let mut deeds = self.deeds.iter_mut();
        deeds
            .find(|deed| deed.id == id)
            .expect("what goes on has begun")
    }

    fn note_faults(&mut self, events: &[Event]) {
        for (at, event) in events.iter().enumerate() {
            let What::Fault { key, .. } = &event.what else {
                continue;
            };
            for deed in self.deeds.iter_mut().filter(|deed| deed.is_under_way(at)) {
                if paths(&deed.action)
                    .iter()
                    .any(|path| is_at_or_below(key, path))
                {
                    deed.is_clear = false;
                }
            }
        }
    }

    /// What a key holds just after an event.
    pub(super) fn content(&self, key: &str, at: usize) -> Option<&Bytes> {
        let change = self
            .changes
            .iter()
            .rev()
            .find(|change| change.at <= at && change.key == key);
        change.and_then(|change| change.after.as_ref())
    }

    /// Does a test hold for what a key holds, at any time from one event to another?
    pub(super) fn was_ever(
        &self,
        key: &str,
        from: usize,
        to: usize,
        test: impl Fn(Option<&Bytes>) -> bool,
    ) -> bool {
        let mut later = self
            .changes
            .iter()
            .filter(|change| change.key == key && (from..=to).contains(&change.at));
        test(self.content(key, from)) || later.any(|change| test(change.after.as_ref()))
    }

    fn was_ever_while(
        &self,
        deed: &Deed,
        key: &str,
        test: impl Fn(Option<&Bytes>) -> bool,
    ) -> bool {
        self.was_ever(key, deed.began, deed.ended, test)
    }

    /// Files that a directory holds just after an event.
    fn files_below(&self, directory: &str, at: usize) -> BTreeSet<&str> {
        let mut files = BTreeSet::new();
        for change in self.changes.iter().take_while(|change| change.at <= at) {
            if is_at_or_below(&change.key, directory)
                && change.key != directory
                && !is_marker(&change.key)
            {
                match change.after {
                    Some(_) => files.insert(change.key.as_str()),
                    None => files.remove(change.key.as_str()),
                };
            }
        }
        files
    }

    /// Was there no file in a directory at some time while this went on?
    fn was_ever_empty(&self, deed: &Deed, directory: &str) -> bool {
        let changes = self
            .changes
            .iter()
            .map(|change| change.at)
            .filter(|at| (deed.began..=deed.ended).contains(at));
        std::iter::once(deed.began)
            .chain(changes)
            .any(|at| self.files_below(directory, at).is_empty())
    }

    /// The rules about a change of an object: some action under way asks for it.
    fn check_changes(&mut self) {
        for number in 0..self.changes.len() {
            let change = self.changes[number].clone();
            let deeds = 0..self.deeds.len();
            let askers: BTreeSet<usize> =
                deeds.filter(|deed| self.asks_for(*deed, &change)).collect();
            let is_exempt =
                change.cause != Cause::Request || change.takes_late || is_marker(&change.key);
            if askers.is_empty() && !is_exempt {
                let violation = self.explain_change(&change);
                self.violations.push(violation);
            }
            self.changes[number].deeds = askers;
        }
    }

    /// Which rule a change breaks that nothing asks for, and whose content it takes.
    fn explain_change(&self, change: &Change) -> Violation {
        let numbers = 0..self.deeds.len();
        let mut uploads = numbers
            .clone()
            .filter(|deed| self.deeds[*deed].action.is_upload());
        let mut others = numbers
            .clone()
            .filter(|deed| !self.deeds[*deed].action.is_upload());
        let broken = match numbers.clone().any(|deed| self.must_wait(deed, change)) {
            true => Some(Rule::WaitingEndsWithTheSession),
            false => uploads
                .find_map(|deed| self.rule_broken_by(deed, change))
                .or_else(|| others.find_map(|deed| self.rule_broken_by(deed, change))),
        };
        let rule = match (broken, &change.after) {
            (Some(rule), _) => rule,
            (None, Some(_)) => Rule::NothingIsReplaced,
            (None, None) => Rule::NothingVanishes,
        };
        let (before, after) = (object(&change.before), object(&change.after));
        let mut text = format!(
            "{} was {before} and is {after}, which nothing under way asks for",
            change.key
        );
        let storer = self
            .deeds
            .iter()
            .rfind(|deed| deed.is_done() && deed.stores(change.before.as_deref()));
        if let Some(storer) = storer {
            text.push_str(&format!("; #{}, {}, was told OK", storer.id, storer.action));
        }
        Violation { rule, text }
    }

    /// The rule that this change breaks if this action made it; `None` if it can't have.
    fn rule_broken_by(&self, number: usize, change: &Change) -> Option<Rule> {
        let deed = &self.deeds[number];
        let is_stored_by = |file: &str| file == change.key && deed.stores(change.after.as_deref());
        match &deed.action {
            _ if !deed.is_under_way(change.at) => None,
            Action::Put {
                file, exclusive, ..
            } if is_stored_by(file) => match (deed.may_have_acted(), exclusive) {
                (false, _) => Some(Rule::RefusedChangesNothing),
                (true, true) => Some(Rule::ExclusiveReplacesNothing),
                (true, false) => None,
            },
            Action::Append { file, .. } if is_stored_by(file) => match deed.may_have_acted() {
                false => Some(Rule::RefusedChangesNothing),
                true => Some(Rule::AppendsJoin),
            },
            Action::Resume { file, .. } if is_stored_by(file) => match deed.may_have_acted() {
                false => Some(Rule::RefusedChangesNothing),
                true => Some(Rule::ResumeIsWhole),
            },
            Action::Rename { from, to, replace } => {
                let name = change
                    .key
                    .strip_prefix(to.as_str())
                    .filter(|_| is_at_or_below(&change.key, to))?;
                self.rule_broken_by_rename(number, &format!("{from}{name}"), *replace, change)
            }
            _ => None,
        }
    }

    /// The rule that a change at the target of a rename breaks.
    fn rule_broken_by_rename(
        &self,
        number: usize,
        source: &str,
        replace: bool,
        change: &Change,
    ) -> Option<Rule> {
        let deed = &self.deeds[number];
        let Some(copy) = &change.after else {
            let is_moved = self
                .deeds
                .iter()
                .any(|other| other.is_under_way(change.at) && other.moves(&change.key));
            let takes_back = !deed.is_done() && !is_moved;
            return takes_back.then_some(Rule::FailedRenameTakesBackItsOwn);
        };
        if !self.was_ever(source, deed.began, change.at, |there| there == Some(copy)) {
            return None;
        }
        let is_rename = |other: &usize| {
            *other != number && matches!(self.deeds[*other].action, Action::Rename { .. })
        };
        let mut others = (0..self.deeds.len()).filter(is_rename);
        if replace && !deed.may_have_acted() {
            return Some(Rule::RefusedChangesNothing);
        }
        match others.any(|other| !self.own_changes_before(other, change).is_empty()) {
            true => Some(Rule::OneRenameToATarget),
            false => Some(Rule::RenameReplacesNothing),
        }
    }

    fn asks_for(&self, number: usize, change: &Change) -> bool {
        let deed = &self.deeds[number];
        if !deed.is_under_way(change.at) || self.must_wait(number, change) {
            return false;
        }
        let before = change.before.as_deref();
        let after = change.after.as_deref();
        match &deed.action {
            Action::Rename { .. } => self.rename_asks_for(number, change),
            action if !deed.may_have_acted() || paths(action) != [change.key.as_str()] => false,
            Action::Put {
                content, exclusive, ..
            } => after == Some(content.as_bytes()) && (before.is_none() || !exclusive),
            Action::Append { content, .. } => {
                let joined = [before.unwrap_or_default(), content.as_bytes()].concat();
                after == Some(&joined)
            }
            Action::Resume { .. } => self.resume_asks_for(number, change),
            Action::Cut { size, .. } => {
                // What is missing is zeros.
                let mut cut = before.unwrap_or_default().to_vec();
                cut.resize(*size, 0);
                before.is_some() && after == Some(&cut)
            }
            Action::Empty { .. } => after == Some(b""),
            Action::Remove { .. } => after.is_none(),
            Action::MakeDirectory { .. }
            | Action::RemoveDirectory { .. }
            | Action::List { .. }
            | Action::Get { .. }
            | Action::Download { .. }
            | Action::Look { .. }
            | Action::Idle => false,
        }
    }

    /// A rename makes copies of its sources at their targets, and removes the sources after that.
    /// If it fails, it may take back copies that it has made.
    fn rename_asks_for(&self, number: usize, change: &Change) -> bool {
        let deed = &self.deeds[number];
        let Action::Rename { from, to, replace } = &deed.action else {
            return false;
        };
        if let Some(name) = change
            .key
            .strip_prefix(from.as_str())
            .filter(|_| is_at_or_below(&change.key, from))
        {
            let target = format!("{to}{name}");
            let is_copied = self.was_ever(&target, deed.began, change.at, |there| {
                there == change.before.as_ref()
            });
            return change.after.is_none() && deed.may_have_acted() && is_copied;
        }
        let Some(name) = change
            .key
            .strip_prefix(to.as_str())
            .filter(|_| is_at_or_below(&change.key, to))
        else {
            return false;
        };
        let source = format!("{from}{name}");
        match &change.after {
            None => self.takes_copy_back(number, &source, change),
            Some(copy) => {
                let is_copy =
                    self.was_ever(&source, deed.began, change.at, |there| there == Some(copy));
                let may_replace = *replace && name.is_empty() && deed.may_have_acted();
                // A source that has changed meanwhile may be copied again.
                is_copy
                    && (change.before.is_none()
                        || may_replace
                        || !self.own_changes_before(number, change).is_empty())
            }
        }
    }

    /// Only its own copies at names that were free, and only as long as the source is there or
    /// somebody else has changed it.
    fn takes_copy_back(&self, number: usize, source: &str, change: &Change) -> bool {
        let deed = &self.deeds[number];
        let mut since = self
            .changes
            .iter()
            .filter(|other| (deed.began..change.at).contains(&other.at));
        let is_changed_by_others = |other: &Change| {
            other.key == source
                && (other.cause != Cause::Request || other.deeds.iter().any(|deed| *deed != number))
        };
        let is_there = self.content(source, change.at) == change.before.as_ref();
        let own = self.own_changes_before(number, change);
        let was_free = own.last().is_some_and(|first| first.before.is_none());
        was_free && (is_there || since.any(is_changed_by_others))
    }

    /// The changes of the same object just before this one that the action itself has made, the
    /// newest first.
    fn own_changes_before(&self, number: usize, change: &Change) -> Vec<&Change> {
        let before = self
            .changes
            .iter()
            .rev()
            .filter(|other| other.at < change.at && other.key == change.key);
        before
            .take_while(|other| other.deeds.contains(&number))
            .collect()
    }

    /// [`Rule::RefusedRenameLeavesNothing`].
    fn check_refused_renames(&mut self) {
        let mut found = Vec::new();
        for (number, deed) in self.deeds.iter().enumerate() {
            let is_rename = matches!(deed.action, Action::Rename { .. });
            let is_refused = matches!(deed.outcome, Outcome::Missing | Outcome::Refused(_));
            if !is_rename || !is_refused || !deed.is_clear {
                continue;
            }
            let is_its_alone = |change: &&Change| {
                change.cause == Cause::Request && change.deeds.iter().eq([&number])
            };
            for change in self.changes.iter().filter(is_its_alone) {
                let mut later = self
                    .changes
                    .iter()
                    .filter(|other| change.at < other.at && other.at < deed.ended);
                // Equal content over it is no change.
                let is_copied_again = self.deeds.iter().any(|other| {
                    let is_same = matches!(&other.action, Action::Rename { to, .. } if is_at_or_below(&change.key, to));
                    is_same && other.is_done() && change.at < other.ended && other.began < deed.ended
                });
                let is_left = !is_marker(&change.key)
                    && !is_copied_again
                    && change.after.is_some()
                    && !later.any(|other| other.key == change.key);
                if is_left {
                    let how = format!(
                        "was refused and leaves {} at {}",
                        object(&change.after),
                        change.key
                    );
                    found.push(deed.violates(Rule::RefusedRenameLeavesNothing, &how));
                }
            }
        }
        self.violations.extend(found);
    }

    /// [`Rule::OneExclusiveWinner`] and [`Rule::OneRenameOfASource`]: for every winner there is a
    /// change of its own.
    fn check_winners(&mut self) {
        let mut found = Vec::new();
        let exclusive = |deed: &Deed, change: &Change| match &deed.action {
            Action::Put {
                file,
                content,
                exclusive: true,
            } => {
                deed.is_done()
                    && change.key == *file
                    && change.after.as_deref() == Some(content.as_bytes())
            }
            _ => false,
        };
        let is_exclusive = |deed: &&Deed| {
            matches!(
                deed.action,
                Action::Put {
                    exclusive: true,
                    ..
                }
            ) && deed.is_done()
        };
        for deed in self.without_own_change(self.deeds.iter().filter(is_exclusive), exclusive) {
            found.push(deed.violates(
                Rule::OneExclusiveWinner,
                "was told OK, but somebody else has made this file",
            ));
        }
        let removal = |deed: &Deed, change: &Change| match &deed.action {
            Action::Rename { from, .. } => change.key == *from && change.after.is_none(),
            _ => false,
        };
        let moves_file = |deed: &&Deed| match &deed.action {
            // Without a clear answer to its DELETE, a file that is gone counts as taken away by it.
            Action::Rename { from, to, .. }
                if from != to && deed.is_clear && !self.has_replaced(deed) =>
            {
                deed.is_done() && self.was_ever_while(deed, from, |there| there.is_some())
            }
            _ => false,
        };
        for deed in self.without_own_change(self.deeds.iter().filter(moves_file), removal) {
            found.push(deed.violates(
                Rule::OneRenameOfASource,
                "was told OK, but somebody else has taken the file away",
            ));
        }
        self.violations.extend(found);
    }

    /// Did this posix-rename replace a file that was there? If another gateway moves the same
    /// source meanwhile, the one who is late can't bring that file back: it is told OK too.
    fn has_replaced(&self, deed: &Deed) -> bool {
        let Action::Rename {
            to, replace: true, ..
        } = &deed.action
        else {
            return false;
        };
        let mut meanwhile = self
            .changes
            .iter()
            .filter(|change| deed.is_under_way(change.at));
        // Equal content over it is no change.
        self.content(to, deed.began).is_some()
            || meanwhile.any(|change| {
                let is_others = change
                    .deeds
                    .iter()
                    .any(|other| self.deeds[*other].id != deed.id);
                change.key == *to
                    && change.after.is_some()
                    && (change.before.is_some() || is_others)
            })
    }

    /// Deals the changes out in their order, each to the deed that fits it and ends first. Returns
    /// the deeds that get none.
    fn without_own_change<'a>(
        &self,
        deeds: impl Iterator<Item = &'a Deed>,
        fits: impl Fn(&Deed, &Change) -> bool,
    ) -> Vec<&'a Deed> {
        let mut waiting: Vec<&Deed> = deeds.collect();
        waiting.sort_by_key(|deed| deed.ended);
        for change in &self.changes {
            if let Some(first) = waiting
                .iter()
                .position(|deed| deed.is_under_way(change.at) && fits(deed, change))
            {
                waiting.remove(first);
            }
        }
        waiting
    }

    /// The rules about one action alone. Its session has a right to see what it has asked for before.
    fn check_number(&mut self, number: usize) {
        let deed = self.deeds[number].clone();
        if let Some(violation) = self.check_deed(&deed) {
            self.violations.push(violation);
            return;
        }
        let began = self.sees_from(number);
        let Some(Violation { rule, text }) = self.check_deed(&Deed { began, ..deed }) else {
            return;
        };
        let text = format!("{text}, after what its session had asked for before ({rule:?})");
        let rule = Rule::SessionSeesItsWrites;
        self.violations.push(Violation { rule, text });
    }

    fn check_deed(&self, deed: &Deed) -> Option<Violation> {
        match &deed.outcome {
            Outcome::Done(Found::Nothing) if !self.is_really_done(deed) => {
                Some(deed.violates(Rule::DoneMeansDone, "was told OK, but never took place"))
            }
            Outcome::Done(Found::Content(content)) => self.check_content(deed, content),
            Outcome::Done(Found::Names(names)) => self.check_list(deed, names),
            Outcome::Missing if !self.is_really_missing(deed) => Some(deed.violates(
                Rule::MissingMeansMissing,
                "was told NO_SUCH_FILE, but the file was there all the time",
            )),
            Outcome::Done(Found::Nothing | Found::Size(_)) | Outcome::Missing => None,
            Outcome::Refused(_) | Outcome::Unanswered | Outcome::CutOff => None,
        }
    }

    /// [`Rule::DoneMeansDone`].
    fn is_really_done(&self, deed: &Deed) -> bool {
        match &deed.action {
            Action::Put { file, content, .. } => self.was_ever_while(deed, file, |there| {
                there.is_some_and(|there| there == content.as_bytes())
            }),
            Action::Append { file, content } => self.was_ever_while(deed, file, |there| {
                there.is_some_and(|there| there.ends_with(content.as_bytes()))
            }),
            Action::Cut { file, size } => self.was_ever_while(deed, file, |there| {
                there.is_some_and(|there| there.len() == *size)
            }),
            Action::Resume { file, content } => self.was_ever_while(deed, file, |there| {
                let start = content.len() - deed.rest().len();
                there.and_then(|there| there.get(start..content.len())) == Some(deed.rest())
            }),
            Action::Empty { file } => self.was_ever_while(deed, file, |there| {
                there.is_some_and(|there| there.is_empty())
            }),
            Action::Remove { file } => self.was_ever_while(deed, file, |there| there.is_none()),
            Action::Rename { from, to, .. } => from == to || self.is_really_renamed(deed, from, to),
            // A directory without files is nothing that the bucket shows.
            Action::MakeDirectory { directory } | Action::RemoveDirectory { directory } => {
                self.was_ever_empty(deed, directory)
            }
            Action::List { .. }
            | Action::Get { .. }
            | Action::Download { .. }
            | Action::Look { .. }
            | Action::Idle => true,
        }
    }

    /// Of directories, only that no file was lost can be said: others put into them meanwhile.
    fn is_really_renamed(&self, deed: &Deed, from: &str, to: &str) -> bool {
        let is_file = self.was_ever_while(deed, from, |there| there.is_some());
        let is_gone = self.was_ever_while(deed, from, |there| there.is_none());
        let has_source = |copy: Option<&Bytes>| {
            copy.is_some() && self.was_ever_while(deed, from, |there| there == copy)
        };
        !is_file || (is_gone && self.was_ever_while(deed, to, has_source))
    }

    /// [`Rule::MissingMeansMissing`].
    fn is_really_missing(&self, deed: &Deed) -> bool {
        match &deed.action {
            Action::Rename { from, .. } => {
                // A directory counts as missing, too, if a file in it went away just when it was to
                // be copied.
                let went =
                    |change: &&Change| change.after.is_none() && deed.is_under_way(change.at);
                let has_lost_file = self
                    .changes
                    .iter()
                    .filter(went)
                    .any(|change| is_at_or_below(&change.key, from));
                let is_free = self.was_ever_empty(deed, from) || has_lost_file;
                self.was_ever_while(deed, from, |there| there.is_none()) && is_free
            }
            Action::Put { file, .. }
            | Action::Append { file, .. }
            | Action::Cut { file, .. }
            | Action::Empty { file }
            | Action::Remove { file }
            | Action::Resume { file, .. }
            | Action::Download { file }
            | Action::Look { file, .. }
            | Action::Get { file } => self.was_ever_while(deed, file, |there| there.is_none()),
            Action::MakeDirectory { directory }
            | Action::RemoveDirectory { directory }
            | Action::List { directory } => self.was_ever_empty(deed, directory),
            Action::Idle => true,
        }
    }

    /// [`Rule::GetIsOneVersion`] and [`Rule::DownloadIsWhole`].
    fn check_content(&self, deed: &Deed, content: &Bytes) -> Option<Violation> {
        let (rule, file) = match &deed.action {
            Action::Get { file } => (Rule::GetIsOneVersion, file),
            Action::Download { file } => (Rule::DownloadIsWhole, file),
            _ => return None,
        };
        let was_current = self.was_ever_while(deed, file, |there| there == Some(content))
            || self.is_cut_by_change(deed, file, content);
        let how = format!(
            "returned {}, which was not there",
            object(&Some(content.clone()))
        );
        (!was_current).then(|| deed.violates(rule, &how))
    }

    /// Is it a download of a file that was another one at its STAT, and is longer now? Then its client
    /// can't know better.
    fn is_cut_by_change(&self, deed: &Deed, file: &str, content: &Bytes) -> bool {
        let mut all = self.deeds.iter();
        // From its STAT on, though it may have to see more than was there then.
        let Some(asked) = all.find(|other| other.id == deed.id) else {
            return false;
        };
        let is_change = |change: &&Change| change.key == file && asked.is_under_way(change.at);
        let is_longer =
            |there: Option<&Bytes>| there.is_some_and(|there| there.starts_with(content));
        let was_other = self.changes.iter().any(|change| is_change(&change))
            || self.was_shown_what_failed(asked);
        matches!(deed.action, Action::Download { .. })
            && was_other
            && self.was_ever_while(deed, file, is_longer)
    }

    /// [`Rule::ListIsTrue`]. Whose uploads may be shown is another rule.
    fn check_list(&self, deed: &Deed, names: &[(String, u64)]) -> Option<Violation> {
        let Action::List { directory } = &deed.action else {
            return None;
        };
        for key in self.files_below(directory, deed.began) {
            let stays = !self.was_ever_while(deed, key, |there| there.is_none());
            let is_shown = names
                .iter()
                .any(|(name, _)| key == format!("{directory}/{name}"));
            if stays && !is_shown {
                return Some(deed.violates(
                    Rule::ListIsTrue,
                    &format!("{key} was there all the time and is not listed"),
                ));
            }
        }
        for (name, _) in names {
            let key = format!("{directory}/{name}");
            let was_there = self.was_ever_while(deed, &key, |there| there.is_some());
            if !was_there
                && !self
                    .deeds
                    .iter()
                    .any(|other| other.writes_during(deed, &key))
            {
                return Some(deed.violates(
                    Rule::ListIsTrue,
                    &format!("{key} is listed and was never there"),
                ));
            }
        }
        None
    }

    /// [`Rule::OnePlace`]. A rename whose outcome is unclear may stop between copy and removal.
    fn check_places(&mut self) {
        let is_unclear = |deed: &Deed| {
            matches!(deed.action, Action::Rename { .. }) && deed.may_have_acted() && !deed.is_done()
        };
        let is_late = |change: &Change| change.cause == Cause::Late;
        let has_replaced = |deed: &Deed| self.has_replaced(deed);
        if self.deeds.iter().any(is_unclear)
            || self.deeds.iter().any(has_replaced)
            || self.changes.iter().any(is_late)
        {
            return;
        }
        let mut contents: BTreeMap<&str, &Bytes> = BTreeMap::new();
        for change in self.changes.iter().filter(|change| !is_marker(&change.key)) {
            match &change.after {
                Some(content) => contents.insert(&change.key, content),
                None => contents.remove(change.key.as_str()),
            };
        }
        let mut places: BTreeMap<Vec<u8>, &str> = BTreeMap::new();
        let mut found = Vec::new();
        for (key, content) in contents {
            for token in tokens(content) {
                if self.is_sent_twice(&token) || self.is_joined(&token, content) {
                    continue;
                }
                let other = places.insert(token.clone(), key);
                if let Some(other) = other.filter(|other| *other != key) {
                    let token = String::from_utf8_lossy(&token).into_owned();
                    let text = format!("{token} is in {other} and in {key}");
                    found.push(Violation {
                        rule: Rule::OnePlace,
                        text,
                    });
                }
            }
        }
        self.violations.extend(found);
    }

    /// Is it in the source of several uploads? One of them may have gone on after the other was
    /// stored and moved.
    fn is_sent_twice(&self, token: &[u8]) -> bool {
        let sources = self.deeds.iter().filter(|deed| match &deed.action {
            Action::Put { content, .. }
            | Action::Append { content, .. }
            | Action::Resume { content, .. } => content.as_bytes().starts_with(token),
            _ => false,
        });
        sources.count() > 1
    }

    /// Is it where a resumed upload went on? What lies before may be of another file, and both
    /// together look like a token.
    fn is_joined(&self, token: &[u8], content: &[u8]) -> bool {
        self.deeds
            .iter()
            .any(|deed| match (&deed.action, deed.shown) {
                (Action::Resume { .. }, Some((_, Some(size)))) => {
                    let reach = token.len() - 1;
                    let from = (size as usize).saturating_sub(reach);
                    let to = content.len().min(size as usize + reach);
                    let around = content.get(from..to).unwrap_or_default();
                    around.windows(token.len()).any(|text| text == token)
                }
                _ => false,
            })
    }

    /// [`Rule::NothingHangs`] and [`Rule::QuietIsQuiet`].
    fn check_end(&mut self, leftovers: &Leftovers) {
        for id in self.hung.clone() {
            let text = format!("#{id} was never answered");
            self.violations.push(Violation {
                rule: Rule::NothingHangs,
                text,
            });
        }
        if *leftovers != Leftovers::default() {
            self.violations.push(Violation {
                rule: Rule::QuietIsQuiet,
                text: format!("{leftovers:?}"),
            });
        }
    }
}

impl Deed {
    /// Can a list show this name because of an upload?
    fn writes_during(&self, list: &Deed, key: &str) -> bool {
        self.writes(key) && self.began < list.ended && list.began < self.lingers()
    }

    /// Does it open this file for writing?
    pub(super) fn writes(&self, key: &str) -> bool {
        let opens = self.action.is_upload() || matches!(self.action, Action::Cut { .. });
        opens && paths(&self.action) == [key]
    }

    /// Until when it may be seen: an upload whose client is gone is cleared away a little later, or
    /// much later.
    pub(super) fn lingers(&self) -> usize {
        match self.outcome {
            Outcome::CutOff => usize::MAX,
            _ => self.ended,
        }
    }
}

/// The texts by which contents tell who wrote them: `<`, digits, `>`.
fn tokens(content: &[u8]) -> BTreeSet<Vec<u8>> {
    const LENGTH: usize = 5;
    let texts = content
        .windows(LENGTH)
        .filter(|text| text.starts_with(b"<") && text.ends_with(b">"));
    texts.map(<[u8]>::to_vec).collect()
}
