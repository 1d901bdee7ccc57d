//! The jail: client paths, and the keys that they stand for.
//!
//! Invariant: a [`Key`] made here starts with the user's own prefix, whatever the client sent.
//! Paths are resolved as text only, as S3 has no links that could point elsewhere.

use std::fmt;

/// Maximum length of a key, in bytes of UTF-8
/// ([S3: object keys](https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html)).
pub const MAX_KEY: usize = 1024;

/// Maximum length of prefix and home together, in bytes: half of a key is left for the user's
/// paths.
const MAX_HOME: usize = MAX_KEY / 2;

/// Why a path, a prefix or a home cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PathError {
    /// It holds NUL, or U+FFFD, which the decoder puts in place of bytes that are not UTF-8.
    #[error("the path is not valid UTF-8 or holds a NUL")]
    NotText,
    /// The key would be longer than [`MAX_KEY`] bytes.
    #[error("File name too long: path, home and prefix together have 1,024 bytes at most")]
    TooLong,
    /// It is the home directory itself, which can't be a file.
    #[error("this is the home directory itself")]
    IsHome,
    /// A prefix or home has parts that no path can have.
    #[error("a prefix or home can't hold `.`, `..` or NUL")]
    BadHome,
    /// A prefix and home leave no room for paths.
    #[error("prefix and home together are longer than 512 bytes")]
    LongHome,
}

type Result<T> = std::result::Result<T, PathError>;

/// The key of an object, or the prefix that all keys of a directory share: empty, or with `/` at
/// its end. Only this module makes keys of client input, so that no unchecked string reaches a
/// store.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// `None` if the text holds NUL or is longer than [`MAX_KEY`], the slash of a prefix not
    /// counted.
    pub fn new(text: impl Into<String>) -> Option<Key> {
        let text = text.into();
        let counted = text.strip_suffix('/').unwrap_or(&text);
        if counted.len() > MAX_KEY || text.contains('\0') {
            return None;
        }
        Some(Key(text))
    }

    /// The key as S3 sees it, not URL-encoded.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An absolute, normalised path as the client sees it: `/`, `/a`, `/a/b`. It has no `..` and no
/// trailing slash.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Path(String);

impl Path {
    /// Resolves `.`, `..` and `//`. A relative path starts at the root, and `..` stops there.
    ///
    /// Errors: `NotText` also for U+FFFD, or two names with different bytes that are not UTF-8
    /// could meet in one key; `TooLong`.
    pub fn parse(text: &str) -> Result<Path> {
        if text.contains(['\0', char::REPLACEMENT_CHARACTER]) {
            return Err(PathError::NotText);
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
            return Err(PathError::TooLong);
        }
        Ok(Path(path))
    }

    /// With a leading slash.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Is this path the other one, or below it?
    pub fn is_inside_or_at(&self, other: &Path) -> bool {
        match self.0.strip_prefix(other.0.trim_end_matches('/')) {
            Some(rest) => rest.is_empty() || rest.starts_with('/'),
            None => false,
        }
    }

    /// Is this the root, the home of the user?
    pub fn is_root(&self) -> bool {
        self.0 == "/"
    }

    /// The directory that this path is in; `None` for the root.
    pub fn parent(&self) -> Option<Path> {
        match self.0.rsplit_once('/') {
            Some(("", "")) | None => None,
            Some(("", _)) => Some(Path("/".to_owned())),
            Some((parent, _)) => Some(Path(parent.to_owned())),
        }
    }
}

/// The two keys of a path below the root. A file and a directory of the same name can both exist in
/// S3: the path `/a` of a user with the home `alice` has the keys `alice/a` and `alice/a/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectKeys {
    /// The key of the file.
    pub file: Key,
    /// The prefix of everything inside the directory: the file's key and a slash.
    pub directory: Key,
}

/// The prefix of all keys of one user: the prefix of the store, and the user's home below it.
#[derive(Clone, Debug)]
pub struct Home(String);

/// What all keys below a prefix begin with.
pub fn top_key(prefix: &str) -> Result<Key> {
    Home::new(prefix, "")?.directory(&Path::parse("/")?)
}

impl Home {
    /// `prefix` and `home` may have slashes around them.
    pub fn new(prefix: &str, home: &str) -> Result<Home> {
        let mut all = String::new();
        for part in prefix.split('/').chain(home.split('/')) {
            match part {
                "" => {}
                "." | ".." => return Err(PathError::BadHome),
                name if name.contains('\0') => return Err(PathError::BadHome),
                name => {
                    all.push_str(name);
                    all.push('/');
                }
            }
        }
        if all.len() > MAX_HOME {
            return Err(PathError::LongHome);
        }
        Ok(Home(all))
    }

    /// Empty, or with a slash at its end. Users with the same home see the same files.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The prefix of everything below this path.
    pub fn directory(&self, path: &Path) -> Result<Key> {
        let home = &self.0;
        let below = path.0.trim_start_matches('/');
        let slash = if path.is_root() { "" } else { "/" };
        Key::new(format!("{home}{below}{slash}")).ok_or(PathError::TooLong)
    }

    /// The keys of this path. Fails for the home itself, which no file can replace.
    pub fn keys(&self, path: &Path) -> Result<ObjectKeys> {
        let directory = self.directory(path)?;
        match Key::new(directory.as_str().trim_end_matches('/')) {
            Some(file) if !path.is_root() => Ok(ObjectKeys { file, directory }),
            Some(_) | None => Err(PathError::IsHome),
        }
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
    fn a_path_is_inside_directories_only() {
        let is_inside_or_at = |path, other| {
            Path::parse(path)
                .unwrap()
                .is_inside_or_at(&Path::parse(other).unwrap())
        };
        for (path, other) in [("/a", "/a"), ("/a/b", "/a"), ("/a", "/"), ("/", "/")] {
            assert!(is_inside_or_at(path, other), "{path} {other}");
        }
        for (path, other) in [("/ab", "/a"), ("/a", "/a/b"), ("/", "/a")] {
            assert!(!is_inside_or_at(path, other), "{path} {other}");
        }
    }

    #[test]
    fn a_parent_is_the_directory_that_holds_a_path() {
        for (text, parent) in [("/", None), ("/a", Some("/")), ("/a/b", Some("/a"))] {
            let found = Path::parse(text).unwrap().parent();
            assert_eq!(found.as_ref().map(Path::as_str), parent, "{text}");
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
            let keys = home.keys(&Path::parse(text).unwrap()).unwrap();
            assert_eq!(
                (keys.file.as_str(), keys.directory.as_str()),
                ("in/alice/bob/x", "in/alice/bob/x/")
            );
        }
        assert_eq!(
            home.directory(&Path::parse("/").unwrap()).unwrap().as_str(),
            "in/alice/"
        );
        assert_eq!(
            home.directory(&Path::parse("d").unwrap()).unwrap().as_str(),
            "in/alice/d/"
        );
        assert!(matches!(
            home.keys(&Path::parse("..").unwrap()),
            Err(PathError::IsHome)
        ));
        let long = Path::parse(&"x".repeat(1020)).unwrap();
        assert!(home.keys(&long).is_err() && Home::new("", "").unwrap().keys(&long).is_ok());
        assert!(Home::new("", "../x").is_err());
    }
}
