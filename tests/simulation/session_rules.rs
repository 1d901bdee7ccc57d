//! Rules about what one session may rely on: what it is shown, and what it asks for while a file
//! that it has written is not closed yet. A client that sends CLOSE in the background must see the
//! same as one that waits for it.

use super::checker::{Change, Deed, Rule, Story, Violation, is_at_or_below, paths};
use super::client::{NOTHING_LEFT, TOO_SHORT};
use super::history::{Cause, Found, Outcome};
use super::plan::Action;
use bytes::Bytes;

/// Requests wait this long for a CLOSE at least, in milliseconds.
const WAIT: u64 = 2900;
/// What a listing says of a file may be told for this long, in milliseconds.
const KEEP_TIME: u64 = 3000;
/// How a request is refused because of an upload.
const BUSY: &str = "an upload to it is in progress";

impl Story {
    /// The rules of this module that are about pairs of actions.
    pub(super) fn check_sessions(&mut self) {
        let mut found = Vec::new();
        for later in 0..self.deeds.len() {
            found.extend(self.check_what_is_shown(later));
            found.extend(self.check_busy(later));
            for earlier in self.outstanding_before(later) {
                found.extend(self.check_order(earlier, later));
                found.extend(self.check_wait(earlier, later));
                found.extend(self.check_open_file(earlier, later));
            }
        }
        self.violations.extend(found);
    }

    /// Actions of the same session about the same names that had begun when this one began, and had
    /// not ended.
    fn outstanding_before(&self, later: usize) -> Vec<usize> {
        let deed = &self.deeds[later];
        let is_outstanding = |number: &usize| {
            let earlier = &self.deeds[*number];
            earlier.who == deed.who
                && earlier.began < deed.began
                && deed.began < earlier.ended
                && earlier.left.is_none_or(|left| deed.began < left)
                && share_name(earlier, deed)
        };
        (0..self.deeds.len()).filter(is_outstanding).collect()
    }

    /// Must `later` wait for the end of `earlier`, which is outstanding? For an upload only if its
    /// CLOSE is sent in time for the first request that waits for it: after that the file counts as
    /// kept open on purpose.
    fn comes_before(&self, earlier: usize, later: usize) -> bool {
        let (upload, later) = (&self.deeds[earlier], &self.deeds[later]);
        if !upload.action.is_upload() {
            return true;
        }
        let Some(closing) = upload.closing else {
            return false;
        };
        let overtakes = |other: &&Deed| {
            other.who == upload.who && upload.began < other.began && share_name(upload, other)
        };
        let first = self.deeds.iter().find(overtakes).unwrap_or(later);
        closing.index < later.began || closing.at <= first.began_at + WAIT
    }

    /// The index of the event from which an action must see the bucket: its beginning, or the last
    /// change that an outstanding action of its session makes.
    pub(super) fn sees_from(&self, number: usize) -> usize {
        let action = &self.deeds[number].action;
        let shows_uploads = matches!(action, Action::Look { .. } | Action::List { .. });
        self.comes_after(number, !shows_uploads)
    }

    /// As [`Story::sees_from`]. STAT and lists don't wait for a CLOSE, as they show uploads of the
    /// session.
    fn comes_after(&self, number: usize, waits_for_close: bool) -> usize {
        let deed = &self.deeds[number];
        let mut from = deed.began;
        for earlier in self.outstanding_before(number) {
            let other = &self.deeds[earlier];
            let is_awaited = other.is_done()
                && (waits_for_close || !other.action.is_upload())
                && self.comes_before(earlier, number);
            if is_awaited {
                let last = self.own_changes(earlier).last();
                from = from.max(last.map_or(0, |change| change.at));
            }
        }
        from
    }

    /// The changes that certainly are of this action.
    fn own_changes(&self, number: usize) -> impl DoubleEndedIterator<Item = &Change> {
        self.changes.iter().filter(move |change| {
            change.cause == Cause::Request && change.deeds.iter().eq([&number])
        })
    }

    /// [`Rule::SessionKeepsOrder`].
    fn check_order(&self, earlier: usize, later: usize) -> Option<Violation> {
        if !self.comes_before(earlier, later) {
            return None;
        }
        let last = self.own_changes(earlier).last()?;
        let first = self.own_changes(later).next()?;
        if last.at < first.at {
            return None;
        }
        let (earlier, later) = (&self.deeds[earlier], &self.deeds[later]);
        let how = format!("was carried out before #{}, {}", earlier.id, earlier.action);
        Some(later.violates(Rule::SessionKeepsOrder, &how))
    }

    /// [`Rule::OvertakingWaits`]: what comes before a CLOSE that is in time, and has no other
    /// obstacle, is not refused.
    fn check_wait(&self, earlier: usize, later: usize) -> Option<Violation> {
        let (upload, deed) = (&self.deeds[earlier], &self.deeds[later]);
        let Outcome::Refused(why) = &deed.outcome else {
            return None;
        };
        let is_own_doing = why.contains(NOTHING_LEFT) || why.contains(TOO_SHORT);
        let must_succeed = upload.action.is_upload()
            && upload.is_done()
            && upload.is_clear
            && deed.is_clear
            && !is_own_doing
            && self.comes_before(earlier, later)
            && self.are_alone(earlier, later);
        let may_fail = match &deed.action {
            Action::Rename { from, to, replace } => {
                let is_free = !self.was_ever(to, upload.began, deed.ended, |there| there.is_some());
                from == to || !(*replace || is_free) || !is_file_of(upload, &[from, to])
            }
            Action::Put { exclusive, .. } => *exclusive,
            Action::Append { .. }
            | Action::Resume { .. }
            | Action::Cut { .. }
            | Action::Empty { .. }
            | Action::Remove { .. }
            | Action::Get { .. }
            | Action::Download { .. }
            | Action::Look { .. } => false,
            Action::MakeDirectory { .. }
            | Action::RemoveDirectory { .. }
            | Action::List { .. }
            | Action::Idle => true,
        };
        if !must_succeed || may_fail {
            return None;
        }
        let how = format!(
            "was refused ({why}) and did not wait for the CLOSE of #{}",
            upload.id
        );
        Some(deed.violates(Rule::OvertakingWaits, &how))
    }

    /// [`Rule::OvertakingWaits`]: only an own upload is an obstacle. A rename also makes way for
    /// those of others, and REMOVE for none.
    fn check_busy(&self, number: usize) -> Option<Violation> {
        let deed = &self.deeds[number];
        let is_busy = matches!(&deed.outcome, Outcome::Refused(why) if why.contains(BUSY));
        let has_upload = match &deed.action {
            Action::Rename { .. } | Action::RemoveDirectory { .. } => return None,
            Action::Remove { .. } => false,
            _ => {
                let outstanding = self.outstanding_before(number);
                let mut uploads = outstanding.iter().map(|other| &self.deeds[*other]);
                uploads.any(|other| other.action.is_upload())
            }
        };
        let is_wrong = is_busy && !has_upload;
        is_wrong.then(|| {
            deed.violates(
                Rule::OvertakingWaits,
                "was refused because of an upload that is none of its session's",
            )
        })
    }

    /// [`Rule::OpenFilesAreLeftAlone`] and [`Rule::RemoveGivesUp`]: what may be done with a file of
    /// the session whose CLOSE is not sent before it is done.
    fn check_open_file(&self, earlier: usize, later: usize) -> Option<Violation> {
        let (upload, deed) = (&self.deeds[earlier], &self.deeds[later]);
        let is_open = upload.changes_file()
            && deed.ended < upload.ended
            && upload.left.is_none_or(|left| deed.ended < left)
            && upload
                .closing
                .is_none_or(|closing| deed.ended < closing.index);
        if !is_open || !deed.is_clear || !self.are_alone(earlier, later) {
            return None;
        }
        let rule = match &deed.action {
            Action::Get { .. } | Action::Download { .. } if deed.is_done() => {
                Rule::OpenFilesAreLeftAlone
            }
            Action::Append { .. } | Action::Resume { .. } | Action::Cut { .. }
                if deed.is_done() =>
            {
                Rule::OpenFilesAreLeftAlone
            }
            Action::Rename { from, .. } if deed.is_done() && is_file_of(upload, &[from]) => {
                Rule::OpenFilesAreLeftAlone
            }
            Action::Remove { .. } if !deed.is_done() || upload.is_done() => Rule::RemoveGivesUp,
            _ => return None,
        };
        let (id, action, outcome) = (upload.id, &upload.action, &upload.outcome);
        let how = format!(
            "ended with \"{}\" while #{id}, {action}, was open",
            deed.outcome
        );
        let how = match rule {
            Rule::RemoveGivesUp => format!("{how}, and that ended with \"{outcome}\""),
            _ => how,
        };
        Some(deed.violates(rule, &how))
    }

    /// Is nobody else concerned with the names of these two, from the beginning of the first to the
    /// end of the second?
    fn are_alone(&self, earlier: usize, later: usize) -> bool {
        let (first, second) = (&self.deeds[earlier], &self.deeds[later]);
        let is_another = |number: usize, deed: &Deed| {
            let is_concerned = share_name(deed, first) || share_name(deed, second);
            let is_then = deed.began < second.ended && first.began < deed.lingers();
            number != earlier && number != later && is_concerned && is_then
        };
        let mut all = self.deeds.iter().enumerate();
        !all.any(|(number, deed)| is_another(number, deed))
    }

    /// [`Rule::WaitingEndsWithTheSession`]: does this action still wait for the CLOSE of a file of
    /// its session when this change is made, or is its session over?
    pub(super) fn must_wait(&self, number: usize, change: &Change) -> bool {
        let deed = &self.deeds[number];
        let waits = match &deed.action {
            Action::Rename { from, to, .. } => {
                is_at_or_below(&change.key, from) || is_at_or_below(&change.key, to)
            }
            // In the end these do without the CLOSE.
            Action::Remove { file } | Action::Empty { file } => {
                let gone = deed.hung_up.filter(|gone| gone.at < deed.began_at + WAIT);
                *file == change.key && gone.is_some_and(|gone| gone.index < change.at)
            }
            _ => false,
        };
        if !waits || !deed.is_under_way(change.at) {
            return false;
        }
        let outstanding = self.outstanding_before(number);
        outstanding.into_iter().any(|earlier| {
            let upload = &self.deeds[earlier];
            let is_source = match &deed.action {
                Action::Rename { from, .. } => is_file_of(upload, &[from]),
                _ => true,
            };
            let is_open = upload
                .closing
                .is_none_or(|closing| change.at < closing.index);
            let mut others = (0..self.deeds.len()).filter(|other| {
                let other_deed = &self.deeds[*other];
                *other != earlier
                    && *other != number
                    && share_name(other_deed, upload)
                    && other_deed.began < change.at
                    && upload.began < other_deed.lingers()
            });
            upload.changes_file() && is_source && is_open && others.next().is_none()
        })
    }

    /// A resumed upload adds to what it was shown. Only what has changed since may be another size.
    pub(super) fn resume_asks_for(&self, number: usize, change: &Change) -> bool {
        let deed = &self.deeds[number];
        let Some((_, size)) = deed.shown else {
            return false;
        };
        let there = size.unwrap_or(0) as usize;
        let mut joined = change.before.clone().unwrap_or_default().to_vec();
        let is_as_shown = joined.len() == there;
        joined.resize(joined.len().max(there), 0);
        let end = joined.len().min(there + deed.rest().len());
        joined.splice(there..end, deed.rest().iter().copied());
        let has_changed = self.has_changed(&change.key, self.shown_from(number), change.at)
            || self.was_shown_what_failed(deed);
        change.after.as_deref() == Some(&joined) && (is_as_shown || has_changed)
    }

    /// Did an upload of its own session fail, whose size it may have been shown?
    pub(super) fn was_shown_what_failed(&self, deed: &Deed) -> bool {
        let mut all = self.deeds.iter();
        all.any(|upload| {
            upload.who == deed.who
                && upload.began < deed.began
                && deed.began < upload.ended
                && share_name(upload, deed)
                && upload.action.is_upload()
                && !upload.is_done()
        })
    }

    /// Did an object change between two events?
    fn has_changed(&self, key: &str, from: usize, to: usize) -> bool {
        let mut changes = self.changes.iter();
        changes.any(|change| change.key == key && from < change.at && change.at < to)
    }

    /// [`Rule::SizesAreTrue`] and [`Rule::LastChangeIsShown`].
    fn check_what_is_shown(&self, number: usize) -> Vec<Violation> {
        let deed = &self.deeds[number];
        let mut found = Vec::new();
        match (&deed.action, &deed.outcome) {
            (Action::Look { file, .. }, Outcome::Done(Found::Size(size))) => {
                found.extend(self.check_shown(number, file, Some(*size), deed.ended));
            }
            (Action::Look { file, .. }, Outcome::Missing) => {
                found.extend(self.check_shown(number, file, None, deed.ended));
            }
            (Action::List { directory }, Outcome::Done(Found::Names(names))) => {
                for (name, size) in names {
                    let key = format!("{directory}/{name}");
                    found.extend(self.check_shown(number, &key, Some(*size), deed.ended));
                }
            }
            (Action::Resume { file, .. } | Action::Download { file }, _) => {
                if let Some((at, size)) = deed.shown {
                    found.extend(self.check_shown(number, file, size, at));
                }
            }
            _ => {}
        }
        found
    }

    /// From when on what an action was shown may be. What a listing of the session says of a file
    /// is told for a while, if no change is known here.
    fn shown_from(&self, number: usize) -> usize {
        let deed = &self.deeds[number];
        let from = self.comes_after(number, false);
        let has_unknown_changes = self
            .deeds
            .iter()
            .any(|other| other.who.gateway != deed.who.gateway)
            || self
                .changes
                .iter()
                .any(|change| change.cause == Cause::Late);
        if !has_unknown_changes {
            return from;
        }
        let is_recent_list = |list: &&Deed| match &list.action {
            Action::List { directory } => {
                list.who == deed.who
                    && list.began < deed.began
                    && deed.began_at <= list.began_at + KEEP_TIME
                    && paths(&deed.action)
                        .iter()
                        .any(|path| is_at_or_below(path, directory))
            }
            _ => false,
        };
        let first = self.deeds.iter().find(is_recent_list);
        first.map_or(from, |list| list.began.min(from))
    }

    /// What an action was shown of a file (`None`: that there is none) until an event.
    fn check_shown(
        &self,
        number: usize,
        key: &str,
        size: Option<u64>,
        to: usize,
    ) -> Option<Violation> {
        let deed = &self.deeds[number];
        let from = self.shown_from(number);
        let size_of = |there: Option<&Bytes>| there.map(|there| there.len() as u64);
        let is_stored = self.was_ever(key, from, to, |there| size_of(there) == size);
        let uploads = |is_own: bool| {
            self.deeds.iter().filter(move |upload| {
                upload.writes(key)
                    && (upload.who == deed.who) == is_own
                    && upload.id != deed.id
                    && upload.began < to
                    && from < upload.lingers()
            })
        };
        let own: Vec<&Deed> = uploads(true).collect();
        let is_own = |upload: &&Deed| {
            self.sizes(upload, to).contains(&size) && !self.is_overtaken(upload, key, from)
        };
        let shown = match size {
            Some(size) => format!("{key} with {size} bytes"),
            None => format!("no {key}"),
        };
        if let [upload] = own.as_slice()
            && self.is_shown_for_certain(upload, deed, key, to)
            && !is_own(upload)
        {
            let how = format!("was shown {shown}, and not its own upload #{}", upload.id);
            return Some(deed.violates(Rule::SizesAreTrue, &how));
        }
        if is_stored || own.iter().any(is_own) {
            return None;
        }
        let mut all = own.into_iter().chain(uploads(false));
        let rule = match all.any(|upload| self.is_overtaken(upload, key, from)) {
            true => Rule::LastChangeIsShown,
            false => Rule::SizesAreTrue,
        };
        let how = format!("was shown {shown}, which it was not");
        Some(deed.violates(rule, &how))
    }

    /// Is this own upload in progress all the time, and does nobody else do anything to its file?
    fn is_shown_for_certain(&self, upload: &Deed, deed: &Deed, key: &str, to: usize) -> bool {
        let others = self.deeds.iter().filter(|other| {
            let is_concerned = paths(&other.action)
                .iter()
                .any(|path| is_at_or_below(key, path) || is_at_or_below(path, key));
            other.id != upload.id
                && other.id != deed.id
                && is_concerned
                && other.began < to
                && upload.began < other.lingers()
        });
        upload.began < deed.began
            && to < upload.ended
            && upload.left.is_none_or(|left| to < left)
            && upload.closing.is_none_or(|closing| to < closing.index)
            && !self.has_changed(key, upload.began, to)
            && others.count() == 0
    }

    /// Sizes that an upload may have, all of whose bytes are written, until an event.
    fn sizes(&self, upload: &Deed, to: usize) -> Vec<Option<u64>> {
        let [file] = paths(&upload.action)[..] else {
            return Vec::new();
        };
        let mut sizes = Vec::new();
        let mut add_to = |there: Option<&Bytes>| {
            let there = there.map_or(0, |there| there.len());
            let size = match &upload.action {
                Action::Put { content, .. } => content.len(),
                Action::Append { content, .. } => there + content.len(),
                Action::Resume { content, .. } => content.len().max(there),
                _ => there,
            };
            sizes.push(Some(size as u64));
        };
        add_to(self.content(file, upload.began));
        for change in &self.changes {
            if change.key == file && upload.began < change.at && change.at < to {
                add_to(change.after.as_ref());
            }
        }
        sizes
    }

    /// Was a CLOSE, rename or remove of this file told OK through the same gateway before this
    /// event, that had begun after the OPEN of the upload?
    fn is_overtaken(&self, upload: &Deed, key: &str, at: usize) -> bool {
        self.deeds.iter().any(|other| {
            let is_change = match &other.action {
                Action::Rename { from, to, .. } => from != to && (from == key || to == key),
                Action::Remove { file } => file == key,
                _ => other.writes(key),
            };
            is_change
                && other.is_done()
                && other.who.gateway == upload.who.gateway
                && upload.opened.is_some_and(|opened| opened < other.began)
                && other.ended < at
        })
    }
}

impl Deed {
    /// Is it an upload after which the file is another one?
    fn changes_file(&self) -> bool {
        match &self.action {
            Action::Put { .. } => true,
            Action::Append { content, .. } => !content.is_empty(),
            Action::Resume { .. } => !self.rest().is_empty(),
            _ => false,
        }
    }
}

/// Does one of them name something at or below a name of the other?
fn share_name(one: &Deed, other: &Deed) -> bool {
    let others = paths(&other.action);
    paths(&one.action).into_iter().any(|path| {
        others
            .iter()
            .any(|other| is_at_or_below(path, other) || is_at_or_below(other, path))
    })
}

/// Is an upload to one of these files?
fn is_file_of(upload: &Deed, files: &[&str]) -> bool {
    matches!(paths(&upload.action)[..], [file] if files.contains(&file))
}
