//! A directory being read, page by page: what S3 lists, merged with what only this process knows.
//!
//! Invariant: a directory that is open holds its position only. The rest of a page that was fetched stays in
//! [`ListingPages`], which is bounded, and is fetched again if it had to go. A name is listed once: what is known here is
//! looked up before the store is asked, for the same range of names.

use super::{Overlay, Path, Result, Stat, Vfs, VfsError, fail_if};
use crate::store::*;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the pages of one user (one home) may take, in bytes: 20 directories with names of 50 bytes that are read at once.
pub const MAX_USER_BYTES: usize = 2 * 1024 * 1024;
/// What the pages of all users may take, in bytes.
pub const MAX_BYTES: usize = 16 * 1024 * 1024;
/// What an entry of a page takes beside its name, in bytes.
const ENTRY_BYTES: usize = 96;

/// One name in a directory.
#[derive(Clone, Debug)]
pub struct Item {
    /// Without slashes.
    pub name: String,
    /// As [`super::Vfs::stat`] would tell.
    pub stat: Stat,
}

/// See the module.
pub struct Listing {
    store: Arc<dyn Store>,
    overlay: Arc<Overlay>,
    /// The home of the user who reads.
    owner: Arc<str>,
    prefix: Key,
    /// Of its page in [`ListingPages`].
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
    /// [`crate::store::Page::next`] of the store's page before.
    token: Option<String>,
    /// The last name of the pages before, as far as names are in order.
    after: Option<String>,
    /// The first part of the store's page was on the page before.
    is_continued: bool,
}

/// Names that were fetched and not listed yet.
struct NamePage {
    /// With `/` at the end of directories.
    items: BTreeMap<String, Stat>,
    /// Where the page behind it begins.
    next: Option<Position>,
}

impl Vfs {
    /// One list request; more as the listing is read.
    pub async fn open_directory(&self, path: &Path) -> Result<Listing> {
        let prefix = self.home.directory(path)?;
        let known = path.is_root() || self.overlay.is_directory(&prefix);
        let mut listing = Listing {
            store: self.transfers.store.clone(),
            overlay: self.overlay.clone(),
            owner: self.home.as_str().into(),
            prefix,
            number: self.overlay.pages.number(),
            are_dots_listed: false,
            position: Some(Position::default()),
            last: None,
        };
        let (mut page, mut found) = listing.fetch(&Position::default()).await?;
        // S3 may send an empty page and have more.
        while !found
            && page.items.is_empty()
            && let Some(next) = page.next.take()
        {
            (page, found) = listing.fetch(&next).await?;
            listing.position = Some(next);
        }
        fail_if(!found && !known, VfsError::NotFound)?;
        listing.keep(page);
        Ok(listing)
    }
}

impl Listing {
    /// Takes the next entries, as long as `fits` says yes; none at the end of the directory.
    pub async fn take(&mut self, mut fits: impl FnMut(&Item) -> bool) -> Result<Vec<Item>> {
        let mut taken = Vec::new();
        let mut entries = Vec::new();
        while let (Some(position), true) = (&self.position, entries.is_empty()) {
            let mut page = match self.overlay.pages.take(self.number) {
                Some(page) => page,
                None => self.fetch(position).await?.0,
            };
            if !self.are_dots_listed {
                self.are_dots_listed = true;
                taken = [".", ".."].map(|name| item(name, Stat::Directory)).into();
                taken.retain(&mut fits);
            }
            if let Some(last) = &self.last {
                // A page that was fetched again has these once more.
                page.items = page.items.split_off(last);
                page.items.remove(last);
            }
            while let Some(first) = page.items.first_entry() {
                let entry = item(first.key(), first.get().clone());
                if !fits(&entry) {
                    break;
                }
                let (name, _) = first.remove_entry();
                self.last = Some(name);
                entries.push(entry);
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

    /// Asks for a page. Also tells whether the store had anything, be it only the directory's own marker.
    async fn fetch(&self, position: &Position) -> Result<(NamePage, bool)> {
        // Before the store is asked: an upload that ends meanwhile is known here, or there, or both.
        let known = self
            .overlay
            .names_after(&self.prefix, position.after.as_deref(), MAX_PAGE);
        let request = ListRequest {
            prefix: &self.prefix,
            folded: true,
            after: position.token.clone(),
            limit: MAX_PAGE,
        };
        let listed = self.store.list(request).await?;
        let found = !listed.entries.is_empty();
        let mut items = BTreeMap::new();
        let mut listed_end = position.after.clone();
        for entry in listed.entries {
            let (key, stat) = match entry {
                Entry::Object(key, object) => (key, Stat::from(&object)),
                Entry::Prefix(key) => (key, Stat::Directory),
            };
            let name = key.strip_prefix(self.prefix.as_str()).unwrap_or_default();
            let is_repeated = position.is_continued && Some(name) <= position.after.as_deref();
            if listed_end.as_deref() < Some(name) {
                listed_end = Some(name.to_owned());
            }
            // Not the directory's own marker, nor keys such as `a//b` that no path leads to.
            if !is_repeated && !matches!(name, "" | "/" | "." | "./" | ".." | "../") {
                items.insert(name.to_owned(), stat);
            }
        }
        let known_end = known.entries.keys().next_back().cloned();
        let next = match (listed.next, known_end) {
            // More is known here than fits before the end of the store's page: that page is asked for again.
            (next, Some(end))
                if !known.are_all && (next.is_none() || Some(&end) < listed_end.as_ref()) =>
            {
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
        Ok((NamePage { items, next }, found))
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

fn item(name: &str, stat: Stat) -> Item {
    Item {
        name: name.trim_end_matches('/').to_owned(),
        stat,
    }
}

/// Pages of all directories that are being read. What was not asked for the longest goes first, of the user whose limit is
/// reached, or of the one who has most.
#[derive(Default)]
pub struct ListingPages {
    // A std lock: never held across an await.
    kept: Mutex<KeptPages>,
    last_number: AtomicU64,
}

#[derive(Default)]
struct KeptPages {
    pages: HashMap<u64, KeptPage>,
    /// By home: what their pages take, and these in the order in which they were kept.
    owners: HashMap<Arc<str>, Owner>,
    bytes: usize,
    last_use: u64,
}

#[derive(Default)]
struct Owner {
    bytes: usize,
    /// Numbers of listings, by use.
    order: BTreeMap<u64, u64>,
}

struct KeptPage {
    page: NamePage,
    owner: Arc<str>,
    bytes: usize,
    used: u64,
}

impl ListingPages {
    /// A fresh number for a listing.
    fn number(&self) -> u64 {
        self.last_number.fetch_add(1, Ordering::Relaxed)
    }

    fn kept(&self) -> MutexGuard<'_, KeptPages> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The page of a listing, if it did not have to go.
    fn take(&self, number: u64) -> Option<NamePage> {
        self.kept().remove(number)
    }

    /// Keeps the page of a listing until it is taken, or has to go.
    fn keep(&self, number: u64, owner: &Arc<str>, page: NamePage) {
        let names: usize = page.items.keys().map(|name| name.len() + ENTRY_BYTES).sum();
        let bytes = names + size_of::<KeptPage>();
        let mut kept = self.kept();
        if bytes > MAX_USER_BYTES {
            return;
        }
        while let Some(oldest) = kept.oldest_in_the_way(owner, bytes) {
            kept.remove(oldest);
        }
        kept.last_use += 1;
        let used = kept.last_use;
        kept.bytes += bytes;
        let usage = kept.owners.entry(owner.clone()).or_default();
        usage.bytes += bytes;
        usage.order.insert(used, number);
        kept.pages.insert(
            number,
            KeptPage {
                page,
                owner: owner.clone(),
                bytes,
                used,
            },
        );
    }
}

impl KeptPages {
    /// The listing whose page has to go before this user can have so many bytes more.
    fn oldest_in_the_way(&self, owner: &Arc<str>, more: usize) -> Option<u64> {
        let own = self.owners.get(owner);
        let usage = if own.is_some_and(|usage| usage.bytes + more > MAX_USER_BYTES) {
            own?
        } else if self.bytes + more > MAX_BYTES {
            self.owners.values().max_by_key(|usage| usage.bytes)?
        } else {
            return None;
        };
        usage.order.values().next().copied()
    }

    fn remove(&mut self, number: u64) -> Option<NamePage> {
        let kept = self.pages.remove(&number)?;
        self.bytes = self.bytes.saturating_sub(kept.bytes);
        if let Some(usage) = self.owners.get_mut(&kept.owner) {
            usage.bytes = usage.bytes.saturating_sub(kept.bytes);
            usage.order.remove(&kept.used);
            if usage.order.is_empty() {
                self.owners.remove(&kept.owner);
            }
        }
        Some(kept.page)
    }
}
