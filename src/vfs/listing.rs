//! A directory being read, page by page: what S3 lists, merged with what only this process knows.
//!
//! Invariant: an open directory holds its position only. The rest of a page that was fetched stays
//! in [`ListingPages`], which is bounded; a page that had to go is fetched again. A name is listed
//! once: the overlay is asked before the store, for the same range of names.

use super::overlay::{Names, SessionId};
use super::{Overlay, Path, Result, Stat, Vfs, VfsError};
use crate::path::Key;
use crate::store::{Entry, ListRequest, MAX_PAGE, Page, Store};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Limit on the pages of one user (one home), in bytes: 20 directories with names of 50 bytes that
/// are read at once.
pub const MAX_USER_BYTES: usize = 2 * 1024 * 1024;
/// Limit on the pages of all users, in bytes.
pub const MAX_BYTES: usize = 16 * 1024 * 1024;
/// What an entry of a page takes beside its name, in bytes.
const ENTRY_BYTES: usize = 96;

/// One name in a directory.
#[derive(Clone, Debug)]
pub struct Item {
    /// Without slashes.
    pub name: String,
    /// As [`super::Vfs::stat`] would return it.
    pub stat: Stat,
}

impl Item {
    /// Whether it is the directory itself or the one above.
    pub fn is_dots(&self) -> bool {
        self.name == "." || self.name == ".."
    }

    /// `key_name` may end with a slash.
    fn new(key_name: &str, stat: Stat) -> Item {
        Item {
            name: key_name.trim_end_matches('/').to_owned(),
            stat,
        }
    }
}

/// See the module.
pub struct Listing {
    store: Arc<dyn Store>,
    overlay: Arc<Overlay>,
    /// Whose uploads are listed.
    session: SessionId,
    /// The home of the user who reads.
    owner: Arc<str>,
    prefix: Key,
    /// The number of its page in [`ListingPages`].
    number: u64,
    /// Whether `.` and `..` were listed.
    are_dots_listed: bool,
    /// Where its page begins; `None` at the end of the directory.
    position: Option<Position>,
    /// The last name of its page that was listed.
    last: Option<String>,
}

/// Where a page begins.
#[derive(Clone, Default)]
struct Position {
    /// [`Page::next`] of the store's page before.
    token: Option<String>,
    /// The last name of the pages before, as far as names are in order.
    after: Option<String>,
    /// The first part of the store's page was on the page before.
    is_continued: bool,
}

/// Names that were fetched and not listed yet.
struct NamePage {
    /// Names of directories end with `/`.
    items: BTreeMap<String, Stat>,
    /// Where the page after it begins.
    next: Option<Position>,
}

/// What one list request returned.
struct FetchedPage {
    page: NamePage,
    /// Whether the store had anything, if only the directory's own marker.
    is_in_store: bool,
}

impl Vfs {
    /// One list request; more as the listing is read.
    pub async fn open_directory(&self, path: &Path) -> Result<Listing> {
        let prefix = self.home.directory(path)?;
        let is_known = path.is_root() || self.overlay.is_directory(&prefix);
        let mut listing = Listing {
            store: self.transfers.store.clone(),
            overlay: self.overlay.clone(),
            session: self.session,
            owner: self.home.as_str().into(),
            prefix,
            number: self.overlay.pages.new_number(),
            are_dots_listed: false,
            position: Some(Position::default()),
            last: None,
        };
        let mut fetched = listing.fetch(&Position::default()).await?;
        // S3 may send an empty page and have more.
        while !fetched.is_in_store
            && fetched.page.items.is_empty()
            && let Some(next) = fetched.page.next.take()
        {
            fetched = listing.fetch(&next).await?;
            listing.position = Some(next);
        }
        if !fetched.is_in_store && !is_known {
            return Err(VfsError::NotFound);
        }
        listing.keep(fetched.page);
        Ok(listing)
    }
}

impl Listing {
    /// Takes the next entries, as long as `fits` says yes; none at the end of the directory.
    pub async fn take(&mut self, mut fits: impl FnMut(&Item) -> bool) -> Result<Vec<Item>> {
        let mut taken = Vec::new();
        let mut entries = Vec::new();
        while entries.is_empty()
            && let Some(position) = &self.position
        {
            let mut page = match self.overlay.pages.take(self.number) {
                Some(page) => page,
                None => self.fetch(position).await?.page,
            };
            if !self.are_dots_listed {
                self.are_dots_listed = true;
                for name in [".", ".."] {
                    let dots = Item::new(name, Stat::Directory);
                    if fits(&dots) {
                        taken.push(dots);
                    }
                }
            }
            if let Some(last) = &self.last {
                // A page that was fetched again has the listed names once more.
                page.items = page.items.split_off(last);
                page.items.remove(last);
            }
            while let Some(first) = page.items.first_entry() {
                let item = Item::new(first.key(), first.get().clone());
                if !fits(&item) {
                    break;
                }
                let (name, _) = first.remove_entry();
                self.last = Some(name);
                entries.push(item);
            }
            if page.items.is_empty() {
                self.position = page.next;
                self.last = None;
            } else {
                self.keep(page);
            }
        }
        taken.append(&mut entries);
        Ok(taken)
    }

    /// Fetches a page: one list request.
    async fn fetch(&self, position: &Position) -> Result<FetchedPage> {
        // The overlay first: an upload that ends meanwhile is here, or in the store, or in both.
        let after = position.after.as_deref();
        let known = self
            .overlay
            .names_after(&self.prefix, after, MAX_PAGE, self.session);
        let request = ListRequest {
            prefix: &self.prefix,
            folded: true,
            after: position.token.clone(),
            limit: MAX_PAGE,
        };
        let listed = self.store.list(request).await?;
        let is_in_store = !listed.entries.is_empty();
        let page = merge(&self.prefix, position, listed, known);
        Ok(FetchedPage { page, is_in_store })
    }

    fn keep(&self, page: NamePage) {
        self.overlay.pages.keep(self.number, &self.owner, page);
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        self.overlay.pages.take(self.number);
    }
}

/// Merges what the store lists and what the overlay knows after a position.
fn merge(prefix: &Key, position: &Position, listed: Page, known: Names) -> NamePage {
    let mut items = BTreeMap::new();
    let mut listed_end = position.after.clone();
    for entry in listed.entries {
        let (key, stat) = match entry {
            Entry::Object(key, object) => (key, Stat::from(&object)),
            Entry::Prefix(key) => (key, Stat::Directory),
        };
        let name = key.strip_prefix(prefix.as_str()).unwrap_or_default();
        let is_repeated = position.is_continued && Some(name) <= position.after.as_deref();
        if listed_end.as_deref() < Some(name) {
            listed_end = Some(name.to_owned());
        }
        // Not the directory's own marker, nor keys such as `a//b` that no path leads to.
        if !is_repeated && !matches!(name, "" | "/" | "." | "./" | ".." | "../") {
            items.insert(name.to_owned(), stat);
        }
    }
    let known_end = match known.entries.last_key_value() {
        Some((name, _)) if !known.are_all => Some(name.clone()),
        Some(_) | None => None,
    };
    let next = match (listed.next, known_end) {
        // The overlay knows more than fits before the end of the store's page: that page is asked
        // for again.
        (next, Some(end)) if next.is_none() || Some(&end) < listed_end.as_ref() => {
            items.retain(|name, _| *name <= end);
            Some(Position {
                token: position.token.clone(),
                after: Some(end),
                is_continued: true,
            })
        }
        (Some(token), _) => Some(Position {
            token: Some(token),
            after: listed_end,
            is_continued: false,
        }),
        (None, _) => None,
    };
    for (name, stat) in known.entries {
        let is_on_next_page = match &next {
            Some(next) => Some(&name) > next.after.as_ref(),
            None => false,
        };
        if !is_on_next_page {
            items.insert(name, stat);
        }
    }
    NamePage { items, next }
}

/// Pages of all directories that are being read. If there is no room for one more, the page that
/// was kept the longest goes: of the user whose limit is reached, or of the user whose pages take
/// most.
#[derive(Default)]
pub struct ListingPages {
    // A std lock: never held across an await.
    kept: Mutex<KeptPages>,
    last_number: AtomicU64,
}

#[derive(Default)]
struct KeptPages {
    pages: HashMap<u64, KeptPage>,
    /// By home.
    owners: HashMap<Arc<str>, Usage>,
    bytes: usize,
    last_age: u64,
}

/// What the pages of a user take.
#[derive(Default)]
struct Usage {
    bytes: usize,
    /// Numbers of listings, by [`KeptPage::age`].
    by_age: BTreeMap<u64, u64>,
}

struct KeptPage {
    page: NamePage,
    owner: Arc<str>,
    bytes: usize,
    /// Grows with each page that is kept.
    age: u64,
}

impl ListingPages {
    /// A number for a listing that no other one has.
    fn new_number(&self) -> u64 {
        self.last_number.fetch_add(1, Ordering::Relaxed)
    }

    fn kept(&self) -> MutexGuard<'_, KeptPages> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the page of a listing, unless it had to go.
    fn take(&self, number: u64) -> Option<NamePage> {
        self.kept().remove(number)
    }

    /// Keeps the page of a listing until it is taken or has to go.
    fn keep(&self, number: u64, owner: &Arc<str>, page: NamePage) {
        let mut bytes = size_of::<KeptPage>();
        for name in page.items.keys() {
            bytes += name.len() + ENTRY_BYTES;
        }
        let mut kept = self.kept();
        if bytes > MAX_USER_BYTES {
            return;
        }
        while let Some(oldest) = kept.oldest_in_the_way(owner, bytes) {
            kept.remove(oldest);
        }
        kept.last_age += 1;
        let age = kept.last_age;
        kept.bytes += bytes;
        let usage = kept.owners.entry(owner.clone()).or_default();
        usage.bytes += bytes;
        usage.by_age.insert(age, number);
        kept.pages.insert(
            number,
            KeptPage {
                page,
                owner: owner.clone(),
                bytes,
                age,
            },
        );
    }
}

impl KeptPages {
    /// The listing whose page must go before this user can have `more` bytes.
    fn oldest_in_the_way(&self, owner: &Arc<str>, more: usize) -> Option<u64> {
        let usage = match self.owners.get(owner) {
            Some(own) if own.bytes + more > MAX_USER_BYTES => own,
            Some(_) | None if self.bytes + more > MAX_BYTES => {
                self.owners.values().max_by_key(|usage| usage.bytes)?
            }
            Some(_) | None => return None,
        };
        let (_, number) = usage.by_age.first_key_value()?;
        Some(*number)
    }

    fn remove(&mut self, number: u64) -> Option<NamePage> {
        let kept = self.pages.remove(&number)?;
        self.bytes = self.bytes.saturating_sub(kept.bytes);
        if let Some(usage) = self.owners.get_mut(&kept.owner) {
            usage.bytes = usage.bytes.saturating_sub(kept.bytes);
            usage.by_age.remove(&kept.age);
            if usage.by_age.is_empty() {
                self.owners.remove(&kept.owner);
            }
        }
        Some(kept.page)
    }
}
