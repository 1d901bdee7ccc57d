//! A directory being read, page by page: what S3 lists, merged with what only this process knows.

use super::{Result, Stat};
use crate::store::*;
use crate::upload::Progress;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// One name in a directory.
#[derive(Clone, Debug)]
pub struct Item {
    /// Without slashes.
    pub name: String,
    /// As [`super::Tree::stat`] would tell.
    pub stat: Stat,
}

/// See the module. Holds one page (1,000 entries) at a time.
pub struct Listing {
    store: Arc<dyn Store>,
    prefix: Key,
    /// `None` once the last page is in `items`.
    next: Option<Option<String>>,
    items: VecDeque<Item>,
    /// Not seen in S3 so far.
    local: BTreeMap<String, Option<Arc<Progress>>>,
    /// Nothing at all has this prefix, not even a marker.
    void: bool,
}

impl Listing {
    /// Fetches the first page.
    pub(super) async fn open(
        store: Arc<dyn Store>,
        prefix: Key,
        local: BTreeMap<String, Option<Arc<Progress>>>,
    ) -> Result<Listing> {
        let dots = [".", ".."].map(|name| Item { name: name.to_owned(), stat: Stat::Directory });
        let mut listing = Listing { store, prefix, next: Some(None), items: dots.into(), local, void: true };
        listing.fetch().await?;
        Ok(listing)
    }

    /// True when the store has nothing here.
    pub(super) fn is_void(&self) -> bool {
        self.void
    }

    /// Takes the next entries, as long as `fits` says yes; none at the end of the directory.
    pub async fn take(&mut self, mut fits: impl FnMut(&Item) -> bool) -> Result<Vec<Item>> {
        while self.items.is_empty() && self.next.is_some() {
            self.fetch().await?;
        }
        let mut taken = Vec::new();
        while let Some(item) = self.items.pop_front_if(|item| fits(item)) {
            taken.push(item);
        }
        Ok(taken)
    }

    async fn fetch(&mut self) -> Result<()> {
        let Some(after) = self.next.take() else { return Ok(()) };
        let request = ListRequest { prefix: &self.prefix, folded: true, after, limit: MAX_PAGE };
        let page = self.store.list(request).await?;
        self.void &= page.entries.is_empty();
        for entry in page.entries {
            self.add(entry);
        }
        self.next = page.next.map(Some);
        if self.next.is_none() {
            for (name, progress) in std::mem::take(&mut self.local) {
                let stat = progress.as_ref().map_or(Stat::Directory, Stat::from);
                self.items.push_back(Item { name: name.trim_end_matches('/').to_owned(), stat });
            }
        }
        Ok(())
    }

    fn add(&mut self, entry: Entry) {
        let (key, mut stat) = match entry {
            Entry::Object(key, object) => (key, Stat::from(&object)),
            Entry::Prefix(key) => (key, Stat::Directory),
        };
        let Some(listed) = key.strip_prefix(self.prefix.as_str()) else { return };
        if let Some(Some(progress)) = self.local.remove(listed) {
            stat = Stat::from(&progress);
        }
        let name = listed.strip_suffix('/').unwrap_or(listed);
        // The directory's own marker, and keys such as `a//b` that no path leads to.
        if !matches!(name, "" | "." | "..") {
            self.items.push_back(Item { name: name.to_owned(), stat });
        }
    }
}
