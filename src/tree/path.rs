//! Client paths and the keys they stand for: the jail.
//!
//! Invariant: a [`Key`] made here starts with the user's own prefix, whatever the client sent. Paths
//! are resolved as text only, as S3 has no links that could point elsewhere.

use super::TreeError;
use crate::store::{Key, MAX_KEY};

/// An absolute, normalised path as the client sees it: `/`, `/a`, `/a/b`. Never `..`, never a trailing slash.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Path(String);

impl Path {
    /// Resolves `.`, `..` and `//`; a relative path starts at the root, and `..` stops there.
    ///
    /// Errors: NUL, U+FFFD (the SFTP decoder puts it where bytes were no UTF-8, so that two names could meet in
    /// one key), or too long for any key (1,024 bytes).
    pub fn parse(text: &str) -> Result<Path, TreeError> {
        if text.contains('\0') || text.contains(char::REPLACEMENT_CHARACTER) {
            return Err(TreeError::BadPath("the path is not valid UTF-8 or holds a NUL"));
        }
        let mut parts: Vec<&str> = Vec::new();
        for part in text.split('/') {
            match part {
                "" | "." => {}
                ".." => drop(parts.pop()),
                name => parts.push(name),
            }
        }
        let path = format!("/{}", parts.join("/"));
        if path.len() > MAX_KEY {
            return Err(TreeError::BadPath("the path is longer than 1,024 bytes"));
        }
        Ok(Path(path))
    }

    /// With a leading slash.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Is this the top of what the user sees?
    pub fn is_root(&self) -> bool {
        self.0 == "/"
    }
}

/// The prefix of every key of one user: the store's prefix and the user's home.
#[derive(Clone, Debug)]
pub struct Home(String);

impl Home {
    /// `prefix` and `home` as configured, with or without slashes around them. Errors say what to correct.
    pub fn new(prefix: &str, home: &str) -> Result<Home, TreeError> {
        let mut all = String::new();
        for part in prefix.split('/').chain(home.split('/')).filter(|part| !part.is_empty()) {
            if part == "." || part == ".." || part.contains('\0') {
                return Err(TreeError::BadPath("a prefix or home can't hold `.`, `..` or NUL"));
            }
            all.push_str(part);
            all.push('/');
        }
        if all.len() > MAX_KEY / 2 {
            return Err(TreeError::BadPath("prefix and home together are longer than 512 bytes"));
        }
        Ok(Home(all))
    }

    /// The key of a file at this path.
    pub fn file(&self, path: &Path) -> Result<Key, TreeError> {
        if path.is_root() {
            return Err(TreeError::IsDirectory);
        }
        self.key(path.as_str().trim_start_matches('/').to_owned())
    }

    /// The prefix of everything below this path.
    pub fn directory(&self, path: &Path) -> Result<Key, TreeError> {
        let below = path.as_str().trim_start_matches('/');
        self.key(if below.is_empty() { String::new() } else { format!("{below}/") })
    }

    fn key(&self, below: String) -> Result<Key, TreeError> {
        Key::new(format!("{}{below}", self.0)).ok_or(TreeError::BadPath("the key would be longer than 1,024 bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> String {
        Path::parse(text).unwrap().0
    }

    #[test]
    fn paths_are_normalised() {
        for (text, want) in [
            ("", "/"),
            (".", "/"),
            ("a//b/./c/", "/a/b/c"),
            ("/a/../b", "/b"),
            ("../../etc/passwd", "/etc/passwd"),
            ("/..", "/"),
            ("/a/b/../../../..", "/"),
            ("a b/ü+%20\\", "/a b/ü+%20\\"),
            ("...", "/..."),
        ] {
            assert_eq!(path(text), want, "{text:?}");
            assert_eq!(path(&path(text)), want, "twice: {text:?}");
        }
    }

    #[test]
    fn bad_paths_are_refused() {
        for text in ["a\0b", "a\u{FFFD}", &"x".repeat(1024)] {
            assert!(Path::parse(text).is_err(), "{text:?}");
        }
        assert!(Path::parse(&"x".repeat(1023)).is_ok());
    }

    #[test]
    fn keys_stay_below_the_home() {
        let home = Home::new("/in//", "alice").unwrap();
        for text in ["../bob/x", "/../../bob/x", "a/../../bob/x"] {
            assert_eq!(home.file(&Path::parse(text).unwrap()).unwrap().as_str(), "in/alice/bob/x");
        }
        assert_eq!(home.directory(&Path::parse("/").unwrap()).unwrap().as_str(), "in/alice/");
        assert_eq!(home.directory(&Path::parse("d").unwrap()).unwrap().as_str(), "in/alice/d/");
        assert!(matches!(home.file(&Path::parse("..").unwrap()), Err(TreeError::IsDirectory)));
        let long = Path::parse(&"x".repeat(1020)).unwrap();
        assert!(home.file(&long).is_err() && Home::new("", "").unwrap().file(&long).is_ok());
        assert!(Home::new("", "../x").is_err());
    }
}
