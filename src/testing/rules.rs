//! The rules, each with its check.

use super::Rule;
use super::fixture::{Checked, Fixture, OrSay, must, must_be, must_be_refused, noise};
use crate::store::{Attributes, Condition, Object, Part, PartSource, StoreError};
use bytes::Bytes;
use std::collections::BTreeSet;
use std::time::Duration;

/// No version has it.
const OTHER_ETAG: &str = "\"00000000000000000000000000000000\"";
/// Clocks may differ by this much.
const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// Checks one rule.
pub async fn check(rule: Rule, fixture: &Fixture) -> Checked<()> {
    match rule {
        Rule::ObjectsAreReadAsWritten => objects_are_read_as_written(fixture).await,
        Rule::WritesReturnTheObject => writes_return_the_object(fixture).await,
        Rule::MissingObjectsAreNotFound => missing_objects_are_not_found(fixture).await,
        Rule::DeletedObjectsAreGone => deleted_objects_are_gone(fixture).await,
        Rule::GetsArePinnedToAVersion => gets_are_pinned_to_a_version(fixture).await,
        Rule::AbsentIsKept => absent_is_kept(fixture).await,
        Rule::UnchangedIsKept => unchanged_is_kept(fixture).await,
        Rule::OnlyOneWriterWins => only_one_writer_wins(fixture).await,
        Rule::AttributesAreKept => attributes_are_kept(fixture).await,
        Rule::CopiesAreWhole => copies_are_whole(fixture).await,
        Rule::ListingsAreComplete => listings_are_complete(fixture).await,
        Rule::PagesAreInOrder => pages_are_in_order(fixture).await,
        Rule::UploadsAppearWhenComplete => uploads_appear_when_complete(fixture).await,
        Rule::MissingPartsAreRefused => missing_parts_are_refused(fixture).await,
        Rule::AbortedUploadsLeaveNothing => aborted_uploads_leave_nothing(fixture).await,
        Rule::PartsCanBeCopied => parts_can_be_copied(fixture).await,
        Rule::RenamesMoveAVersion => renames_move_a_version(fixture).await,
    }
}

async fn objects_are_read_as_written(fixture: &Fixture) -> Checked<()> {
    let names = ["a", "dir/b", "a b+c%20d#e?f&g=h", "ü/☃", "quote'\"<>"];
    for name in names {
        for body in [Bytes::new(), Bytes::from_static(b"abc"), noise(300_000, 1)] {
            fixture.put(name, body.clone()).await?;
            fixture.must_hold(name, &body).await?;
            let object = fixture.head(name).await?;
            if body.len() > 2 {
                let inside = fixture.get(name, 1..3, &object.etag).await?;
                must(
                    Some(&*inside) == body.get(1..3),
                    "get returns another range",
                )?;
            }
            for limit in [1, 1000, 1 << 20] {
                let key = fixture.key(name)?;
                let (opened, first) = fixture.store.open(&key, limit).await.or_say("open fails")?;
                must_be("the ETag of open", &opened.etag, &object.etag)?;
                must_be("the size of open", opened.size, object.size)?;
                let expected = body.slice(..body.len().min(limit as usize));
                must(first == expected, "open returns other bytes than the first")?;
            }
        }
    }
    Ok(())
}

async fn writes_return_the_object(fixture: &Fixture) -> Checked<()> {
    let put = fixture.put("put", "content").await?;
    must_be_shown(fixture, "put", &put).await?;
    let (id, part) = fixture.begin("parts", "content").await?;
    let parts = [part];
    let completed = fixture.complete("parts", &id, &parts, &Condition::None);
    let completed = completed.await.or_say("complete fails")?;
    must_be_shown(fixture, "parts", &completed).await
}

async fn must_be_shown(fixture: &Fixture, name: &str, returned: &Object) -> Checked<()> {
    let shown = fixture.head(name).await?;
    must_be("the ETag that was returned", &returned.etag, &shown.etag)?;
    must_be("the size that was returned", returned.size, shown.size)?;
    must_be("the write id", &returned.write_id, &shown.write_id)?;
    let earlier = shown.modified.duration_since(returned.modified);
    let later = returned.modified.duration_since(shown.modified);
    let apart = earlier.or(later).unwrap_or_default();
    must(apart < CLOCK_SKEW, "the time that was returned is another")
}

async fn missing_objects_are_not_found(fixture: &Fixture) -> Checked<()> {
    fixture.must_be_missing("none").await?;
    let none = fixture.key("none")?;
    let opened = fixture.store.open(&none, 10).await;
    must_be("open", opened, Err(StoreError::NotFound))?;
    let got = fixture.store.get(&none, 0..1, OTHER_ETAG).await;
    must(got.is_err(), "get succeeds")?;
    let nothing = Object::new(3, OTHER_ETAG, std::time::SystemTime::now());
    let copied = fixture.copy("none", &nothing, "x", &Condition::None).await;
    must_be("copy", copied, Err(StoreError::NotFound))
}

async fn deleted_objects_are_gone(fixture: &Fixture) -> Checked<()> {
    fixture.put("f", "content").await?;
    let key = fixture.key("f")?;
    for _ in 0..2 {
        let deleted = fixture.store.delete(&key, &Condition::None).await;
        deleted.or_say("delete fails")?;
        fixture.must_be_missing("f").await?;
    }
    Ok(())
}

async fn gets_are_pinned_to_a_version(fixture: &Fixture) -> Checked<()> {
    let old = fixture.put("f", "old").await?;
    let new = fixture.put("f", "new").await?;
    must(old.etag != new.etag, "other content has the same ETag")?;
    let key = fixture.key("f")?;
    let got = fixture.store.get(&key, 0..3, &old.etag).await;
    must_be_refused("get of an old version", got)
}

async fn absent_is_kept(fixture: &Fixture) -> Checked<()> {
    let kept = fixture.store.limits().conditions;
    let absent = Condition::Absent;
    let first = fixture.put_if("new", "first", &absent).await;
    let version = first.or_say("put of a new key fails")?;
    if kept.put_absent {
        let second = fixture.put_if("new", "other", &absent).await;
        must_be_refused("put over an object", second)?;
    }
    let (id, part) = fixture.begin("new", "third").await?;
    if kept.complete_absent {
        let completed = fixture.complete("new", &id, &[part], &absent).await;
        must_be_refused("complete over an object", completed)?;
    }
    fixture.abort("new", &id).await?;
    fixture.put("taken", "taken").await?;
    if kept.copy_absent {
        let copied = fixture.copy("new", &version, "taken", &absent).await;
        must_be_refused("copy over an object", copied)?;
    }
    fixture.must_hold("new", b"first").await?;
    fixture.must_hold("taken", b"taken").await
}

async fn unchanged_is_kept(fixture: &Fixture) -> Checked<()> {
    let kept = fixture.store.limits().conditions;
    let old = fixture.put("f", "old").await?;
    let was_old = Condition::Unchanged(old.etag.clone());
    let new = fixture.put_if("f", "new", &was_old).await;
    let new = new.or_say("put over the version that is there fails")?;
    if kept.put_unchanged {
        let late = fixture.put_if("f", "late", &was_old).await;
        must_be_refused("put over another version", late)?;
        let late = fixture.put_if("gone", "late", &was_old).await;
        must_be_refused("put where no object is", late)?;
    }
    let (id, part) = fixture.begin("f", "late").await?;
    if kept.complete_unchanged {
        let late = fixture.complete("f", &id, &[part], &was_old).await;
        must_be_refused("complete over another version", late)?;
    }
    fixture.abort("f", &id).await?;
    if kept.copy_source {
        let copied = fixture.copy("f", &old, "copy", &Condition::None).await;
        must_be_refused("copy of another version", copied)?;
        fixture.must_be_missing("copy").await?;
    }
    let key = fixture.key("f")?;
    if kept.delete_unchanged {
        let deleted = fixture.store.delete(&key, &was_old).await;
        must_be_refused("delete of another version", deleted)?;
        fixture.must_hold("f", b"new").await?;
    }
    let is_new = Condition::Unchanged(new.etag);
    let deleted = fixture.store.delete(&key, &is_new).await;
    deleted.or_say("delete of the version that is there fails")?;
    fixture.must_be_missing("f").await?;
    if kept.delete_unchanged {
        let deleted = fixture.store.delete(&key, &is_new).await;
        let is_refused = matches!(
            deleted,
            Err(StoreError::NotFound | StoreError::Precondition)
        );
        must(is_refused, "delete of a version that is gone succeeds")?;
    }
    Ok(())
}

async fn only_one_writer_wins(fixture: &Fixture) -> Checked<()> {
    if !fixture.store.limits().conditions.put_absent {
        return Ok(());
    }
    for round in 0..8 {
        let name = format!("contested-{round}");
        let (one, other, third) = tokio::join!(
            fixture.put_if(&name, noise(1000, 1), &Condition::Absent),
            fixture.put_if(&name, noise(1000, 2), &Condition::Absent),
            fixture.put_if(&name, noise(1000, 3), &Condition::Absent),
        );
        let mut winners = Vec::new();
        for (seed, result) in (1..).zip([one, other, third]) {
            match result {
                Ok(_) => winners.push(seed),
                lost => must_be_refused("put of one who came later", lost)?,
            }
        }
        match winners.as_slice() {
            [seed] => fixture.must_hold(&name, &noise(1000, *seed)).await?,
            _ => return Err(format!("{} of 3 succeed", winners.len())),
        }
    }
    Ok(())
}

async fn attributes_are_kept(fixture: &Fixture) -> Checked<()> {
    if !fixture.store.limits().keeps_attributes {
        return Ok(());
    }
    let attributes = Attributes {
        content_type: Some("text/csv".to_owned()),
        metadata: [("owner".to_owned(), "alice".to_owned())].into(),
        ..Attributes::default()
    };
    let store = &fixture.store;
    let key = fixture.key("put")?;
    let put = store.put(
        &key,
        Bytes::from_static(b"x"),
        &attributes,
        &Condition::None,
    );
    let version = put.await.or_say("put fails")?;
    let parts = fixture.key("parts")?;
    let id = store.create_upload(&parts, &attributes).await;
    let id = id.or_say("create_upload fails")?;
    let part = fixture.send("parts", &id, 1, "x").await?;
    let parts = [part];
    let completed = fixture.complete("parts", &id, &parts, &Condition::None);
    completed.await.or_say("complete fails")?;
    let copied = fixture.copy("put", &version, "copy", &Condition::None);
    copied.await.or_say("copy fails")?;
    for name in ["put", "parts", "copy"] {
        let Some(found) = fixture.head(name).await?.attributes else {
            return Err(format!("head of {name:?} shows no attributes"));
        };
        must_be(
            "the content type",
            &found.content_type,
            &attributes.content_type,
        )?;
        must_be("the metadata", &found.metadata, &attributes.metadata)?;
    }
    Ok(())
}

async fn copies_are_whole(fixture: &Fixture) -> Checked<()> {
    for size in [0, 1, 200_000] {
        let body = noise(size, 1);
        let version = fixture.put("from + ü", body.clone()).await?;
        fixture.put("to", "old").await?;
        let copied = fixture.copy("from + ü", &version, "to", &Condition::None);
        let copied = copied.await.or_say("copy fails")?;
        let shown = fixture.head("to").await?;
        must_be("the ETag of the copy", &copied.etag, &shown.etag)?;
        must(
            copied.is_ours,
            "a copy that was answered is not the request's",
        )?;
        fixture.must_hold("to", &body).await?;
        fixture.must_hold("from + ü", &body).await?;
    }
    Ok(())
}

async fn listings_are_complete(fixture: &Fixture) -> Checked<()> {
    let names = [
        "l/a/x", "l/a/y", "l/a-b", "l/a0", "l/b/c/d", "l/b0", "l/ü", "m",
    ];
    for name in names {
        fixture.put(name, name).await?;
    }
    for limit in [1, 2, 3, 1000] {
        for below in ["l/", "l/a", "l/b/", "none"] {
            let mut found = fixture.list(below, false, limit).await?;
            found.sort_unstable();
            let mut expected = Vec::new();
            for name in names.iter().filter(|name| name.starts_with(below)) {
                expected.push(format!("{name} {}", name.len()));
            }
            expected.sort_unstable();
            let what = format!("the listing of {below:?} in pages of {limit}");
            must_be(&what, found, expected)?;
        }
        let found = fixture.list("l/", true, limit).await?;
        let count = found.len();
        let found: BTreeSet<String> = found.into_iter().collect();
        let expected = ["l/a-b 5", "l/a/", "l/a0 4", "l/b/", "l/b0 4", "l/ü 4"];
        must_be("the number of names", count, expected.len())?;
        let expected = expected.map(str::to_owned).into();
        must_be("the listing with folded names", found, expected)?;
    }
    Ok(())
}

async fn pages_are_in_order(fixture: &Fixture) -> Checked<()> {
    // No name begins with another one: a file system sorts directories without their slash.
    for name in ["p/a/x", "p/b", "p/c/y", "p/d", "p/e", "p/z/z", "p/ü"] {
        fixture.put(name, "").await?;
    }
    for limit in [1, 2, 3] {
        let mut last = String::new();
        for page in fixture.list_pages("p/", true, limit).await? {
            let first = page.iter().min();
            let is_later = first.is_none_or(|first| *first > last);
            must(
                is_later,
                &format!("{page:?} comes after {last:?}, in pages of {limit}"),
            )?;
            if let Some(greatest) = page.into_iter().max() {
                last = greatest;
            }
        }
    }
    Ok(())
}

/// Two parts of at least the smallest size, and a short one.
async fn send_three(fixture: &Fixture, id: &str) -> Checked<(Vec<Part>, Vec<u8>)> {
    let limits = fixture.store.limits();
    let second = match limits.equal_parts {
        true => limits.min_part,
        false => limits.min_part + 1000,
    };
    let mut parts = Vec::new();
    let mut whole = Vec::new();
    for (number, size) in (1..).zip([limits.min_part, second, 100]) {
        let body = noise(size, number);
        whole.extend_from_slice(&body);
        parts.push(fixture.send("f", id, number as u32, body).await?);
    }
    Ok((parts, whole))
}

async fn uploads_appear_when_complete(fixture: &Fixture) -> Checked<()> {
    fixture.put("f", "old").await?;
    let plain = Attributes::default();
    let id = fixture
        .store
        .create_upload(&fixture.key("f")?, &plain)
        .await;
    let id = id.or_say("create_upload fails")?;
    let (parts, whole) = send_three(fixture, &id).await?;
    fixture.must_hold("f", b"old").await?;
    let completed = fixture.complete("f", &id, &parts, &Condition::None);
    completed.await.or_say("complete fails")?;
    fixture.must_hold("f", &whole).await?;
    let etag = fixture.head("f").await?.etag;
    let border = fixture.store.limits().min_part;
    let across = fixture.get("f", border - 1..border + 1, &etag).await?;
    let expected = whole.get(border as usize - 1..border as usize + 1);
    must(
        Some(&*across) == expected,
        "get across two parts returns other bytes",
    )
}

async fn missing_parts_are_refused(fixture: &Fixture) -> Checked<()> {
    let (id, part) = fixture.begin("f", "part").await?;
    let never_sent = Part::new(2, 4, OTHER_ETAG);
    let parts = [part, never_sent];
    let completed = fixture.complete("f", &id, &parts, &Condition::None);
    must(completed.await.is_err(), "complete succeeds")?;
    fixture.must_be_missing("f").await?;
    fixture.abort("f", &id).await
}

async fn aborted_uploads_leave_nothing(fixture: &Fixture) -> Checked<()> {
    let (id, part) = fixture.begin("f", "part").await?;
    fixture.abort("f", &id).await?;
    fixture.abort("f", &id).await?;
    fixture.must_be_missing("f").await?;
    let parts = [part];
    let completed = fixture.complete("f", &id, &parts, &Condition::None);
    must(
        completed.await.is_err(),
        "complete succeeds after the abort",
    )?;
    fixture.must_be_missing("f").await
}

async fn parts_can_be_copied(fixture: &Fixture) -> Checked<()> {
    let min_part = fixture.store.limits().min_part;
    let body = noise(min_part + 1000, 1);
    let version = fixture.put("source + ü", body.clone()).await?;
    let plain = Attributes::default();
    let key = fixture.key("f")?;
    let id = fixture.store.create_upload(&key, &plain).await;
    let id = id.or_say("create_upload fails")?;
    let source = fixture.key("source + ü")?;
    let range = 1..min_part + 1;
    let from = PartSource {
        key: &source,
        etag: &version.etag,
        range: range.clone(),
    };
    let copied = fixture.store.copy_part(&key, &id, 1, from).await;
    let copied = copied.or_say("copy_part fails")?;
    let sent = fixture.send("f", &id, 2, "end").await?;
    let parts = [copied, sent];
    let completed = fixture.complete("f", &id, &parts, &Condition::None);
    completed.await.or_say("complete fails")?;
    let middle = body.slice(range.start as usize..range.end as usize);
    fixture
        .must_hold("f", &[&middle[..], b"end"].concat())
        .await
}

async fn renames_move_a_version(fixture: &Fixture) -> Checked<()> {
    let old = fixture.put("from", "old").await?;
    let version = fixture.put("from", "new").await?;
    let from = fixture.key("from")?;
    let to = fixture.key("deeper/to")?;
    let rename = |version, condition| {
        let store = &fixture.store;
        let (from, to) = (&from, &to);
        async move { store.rename(from, version, to, condition).await }
    };
    match rename(&old, &Condition::Absent).await {
        Err(StoreError::Unsupported) => return Ok(()),
        refused => must_be_refused("rename of another version", refused)?,
    }
    fixture.put("deeper/to", "taken").await?;
    let refused = rename(&version, &Condition::Absent).await;
    must_be_refused("rename onto an object", refused)?;
    fixture.must_hold("from", b"new").await?;
    fixture.must_hold("deeper/to", b"taken").await?;
    let moved = rename(&version, &Condition::None)
        .await
        .or_say("rename fails")?;
    fixture.must_be_missing("from").await?;
    fixture.must_hold("deeper/to", b"new").await?;
    must_be_shown(fixture, "deeper/to", &moved).await?;
    let gone = rename(&version, &Condition::None).await;
    must_be(
        "rename of a missing object",
        gone,
        Err(StoreError::NotFound),
    )
}
