//! A directory being read, page by page: what S3 lists, merged with what only this process knows.

use super::{Path, Result, Stat, Tree, TreeError, fail_if};
use crate::store::*;
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
    /// What this process knew at the start: shown first, and instead of what S3 says of these names.
    local: BTreeMap<String, Stat>,
}

impl Tree {
    /// One list request; more as the listing is read.
    pub async fn open_directory(&self, path: &Path) -> Result<Listing> {
        let prefix = self.home.directory(path)?;
        let known = path.is_root() || self.local.is_directory(&prefix);
        let (store, local) = (self.context.store.clone(), self.local.entries(&prefix));
        let dots = [(".", Stat::Directory), ("..", Stat::Directory)].into_iter();
        let items = dots.chain(local.iter().map(|(name, stat)| (name.as_str(), stat.clone()))).map(item).collect();
        let mut listing = Listing { store, prefix, next: Some(None), items, local };
        fail_if(!listing.fetch().await? && !known, TreeError::NotFound)?;
        Ok(listing)
    }
}

impl Listing {
    /// Takes the next entries, as long as `fits` says yes; none at the end of the directory.
    pub async fn take(&mut self, mut fits: impl FnMut(&Item) -> bool) -> Result<Vec<Item>> {
        while self.items.is_empty() && self.next.is_some() {
            self.fetch().await?;
        }
        Ok(std::iter::from_fn(|| self.items.pop_front_if(|item| fits(item))).collect())
    }

    /// Was there anything on the page, be it only the directory's own marker?
    async fn fetch(&mut self) -> Result<bool> {
        let after = self.next.clone().flatten();
        let request = ListRequest { prefix: &self.prefix, folded: true, after, limit: MAX_PAGE };
        let page = self.store.list(request).await?;
        let found = !page.entries.is_empty();
        for entry in page.entries {
            let (key, stat) = match entry {
                Entry::Object(key, object) => (key, Stat::from(&object)),
                Entry::Prefix(key) => (key, Stat::Directory),
            };
            let name = key.strip_prefix(self.prefix.as_str()).unwrap_or_default();
            // Not the directory's own marker, nor keys such as `a//b` that no path leads to.
            if !matches!(name, "" | "/" | "." | "./" | ".." | "../") && !self.local.contains_key(name) {
                self.items.push_back(item((name, stat)));
            }
        }
        self.next = page.next.map(Some);
        Ok(found)
    }
}

fn item((name, stat): (&str, Stat)) -> Item {
    Item { name: name.trim_end_matches('/').to_owned(), stat }
}
