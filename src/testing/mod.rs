//! For those who bring their own store: [`store_conformance`] checks the rules of [`Store`].
//!
//! ```
//! # use std::sync::Arc;
//! # use sftpd::store::memory::MemoryStore;
//! # /*
//! #[tokio::test]
//! # */
//! async fn my_store_keeps_all_rules() {
//!     let store = MemoryStore::default();
//!     sftpd::testing::store_conformance(Arc::new(store)).await.unwrap();
//! }
//! # tokio::runtime::Runtime::new().unwrap().block_on(my_store_keeps_all_rules());
//! ```

mod fixture;
mod rules;

use crate::store::Store;
use fixture::Fixture;
use std::fmt::{self, Display, Formatter};
use std::sync::Arc;

/// A rule of [`Store`]. `Display` is a sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rule {
    /// `put`, `head`, `get` and `open`.
    ObjectsAreReadAsWritten,
    /// `put` and `complete`.
    WritesReturnTheObject,
    /// `head`, `open`, `get`, `copy` and `delete`.
    MissingObjectsAreNotFound,
    /// `delete`.
    DeletedObjectsAreGone,
    /// `get`.
    GetsArePinnedToAVersion,
    /// [`Condition::Absent`](crate::store::Condition::Absent), as far as `limits()` says.
    AbsentIsKept,
    /// [`Condition::Unchanged`](crate::store::Condition::Unchanged), as far as `limits()` says.
    UnchangedIsKept,
    /// One of several writers at once under [`Condition::Absent`](crate::store::Condition::Absent).
    OnlyOneWriterWins,
    /// `put`, `create_upload` and `copy`.
    AttributesAreKept,
    /// `copy`.
    CopiesAreWhole,
    /// `list`.
    ListingsAreComplete,
    /// `list`, if it is folded.
    PagesAreInOrder,
    /// `create_upload`, `upload_part` and `complete`.
    UploadsAppearWhenComplete,
    /// `complete`.
    MissingPartsAreRefused,
    /// `abort`.
    AbortedUploadsLeaveNothing,
    /// `copy_part`.
    PartsCanBeCopied,
    /// `rename`, unless it is `Unsupported`.
    RenamesMoveAVersion,
}

impl Rule {
    /// Every rule, in the order in which they are checked: later ones rely on earlier ones.
    pub const ALL: &'static [Rule] = &[
        Rule::ObjectsAreReadAsWritten,
        Rule::WritesReturnTheObject,
        Rule::MissingObjectsAreNotFound,
        Rule::DeletedObjectsAreGone,
        Rule::GetsArePinnedToAVersion,
        Rule::AbsentIsKept,
        Rule::UnchangedIsKept,
        Rule::OnlyOneWriterWins,
        Rule::CopiesAreWhole,
        Rule::AttributesAreKept,
        Rule::ListingsAreComplete,
        Rule::PagesAreInOrder,
        Rule::UploadsAppearWhenComplete,
        Rule::MissingPartsAreRefused,
        Rule::AbortedUploadsLeaveNothing,
        Rule::PartsCanBeCopied,
        Rule::RenamesMoveAVersion,
    ];
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rule::ObjectsAreReadAsWritten => "an object is read as it was written",
            Rule::WritesReturnTheObject => "put and complete return what head shows afterwards",
            Rule::MissingObjectsAreNotFound => "an object that does not exist is NotFound",
            Rule::DeletedObjectsAreGone => {
                "delete removes an object, and is no error if there is none"
            }
            Rule::GetsArePinnedToAVersion => "get returns bytes of the version it is asked for",
            Rule::AbsentIsKept => "Condition::Absent refuses to replace an object",
            Rule::UnchangedIsKept => "Condition::Unchanged refuses any other version",
            Rule::OnlyOneWriterWins => "of several writers under Condition::Absent one succeeds",
            Rule::AttributesAreKept => "an object has the attributes that it was written with",
            Rule::CopiesAreWhole => "a copy has the whole content, and leaves its source",
            Rule::ListingsAreComplete => "a listing has each key once, page by page",
            Rule::PagesAreInOrder => {
                "no page of a folded listing has a name that comes before an earlier page's"
            }
            Rule::UploadsAppearWhenComplete => {
                "an upload in parts appears at once, when it is complete"
            }
            Rule::MissingPartsAreRefused => {
                "an upload is not completed with a part it does not have"
            }
            Rule::AbortedUploadsLeaveNothing => "an aborted upload leaves nothing and is over",
            Rule::PartsCanBeCopied => "a range of an object can become a part",
            Rule::RenamesMoveAVersion => "a rename moves one version, under its condition",
        })
    }
}

/// A rule that a store breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule}: {found}")]
#[non_exhaustive]
pub struct Violation {
    /// The rule.
    pub rule: Rule,
    /// What the store did instead.
    pub found: String,
}

/// Checks every [`Rule`], and returns the first one that the store breaks. It can't see what
/// becomes of a lost answer, of a future that is dropped, or of an error that was not final;
/// whether `limits()` are true, but for the smallest part and the conditions; whether
/// `incomplete_uploads` finds what an earlier process has left; nor signs of life. Takes some
/// seconds, and memory for five times [`Limits::min_part`](crate::store::Limits::min_part). Uses
/// only keys below a random `sftpd-conformance-…/`, and removes what it has made there unless a
/// rule is broken.
pub async fn store_conformance(store: Arc<dyn Store>) -> Result<(), Violation> {
    let fixture = Fixture::new(store);
    for &rule in Rule::ALL {
        let checked = rules::check(rule, &fixture).await;
        checked.map_err(|found| Violation { rule, found })?;
        // The next check finds nothing.
        fixture.clear().await.map_err(|found| Violation {
            rule: Rule::DeletedObjectsAreGone,
            found,
        })?;
    }
    Ok(())
}
