//! Paths and keys.

use super::Chosen;
use arbitrary::Unstructured;
use sftpd::path::{Home, Path};
use sftpd::store::{Key, MAX_KEY};

/// A path never leaves the home, is its own normal form, and has keys that no other path has.
pub fn paths(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    let (Ok(one), Ok(other), Ok(prefix), Ok(below)) = (text(u), text(u), text(u), text(u)) else {
        return;
    };
    let Ok(home) = Home::new(&prefix, &below) else {
        return;
    };
    let top = home
        .directory(&Path::parse("/").unwrap())
        .unwrap()
        .to_string();
    assert!(
        top.is_empty() || (top.ends_with('/') && !top.starts_with('/')),
        "{top:?}"
    );
    assert!(top.split_terminator('/').all(is_name), "{top:?}");
    let parts = [&prefix, &below].map(|text| text.split('/').filter(|part| !part.is_empty()));
    assert!(
        top.split_terminator('/').eq(parts.into_iter().flatten()),
        "{top:?}"
    );
    let (one, other) = (keys(&home, &top, &one), keys(&home, &top, &other));
    if let (Some((one, keys)), Some((other, others))) = (one, other) {
        assert_eq!(
            one == other,
            keys.iter().any(|key| others.contains(key)),
            "{one:?} {other:?}"
        );
    }
}

/// A path in its normal form, and its keys.
pub fn keys(home: &Home, top: &str, text: &str) -> Option<(Path, Vec<Key>)> {
    let path = Path::parse(text).ok()?;
    let rest = path.as_str().strip_prefix('/').expect("absolute");
    assert!(path.is_root() || rest.split('/').all(is_name), "{path:?}");
    assert!(path.as_str().len() <= MAX_KEY);
    for same in [
        path.as_str().to_owned(),
        format!("/{text}"),
        format!("{text}/"),
        format!("./{text}/x/y/../..//."),
    ] {
        assert_eq!(Path::parse(&same).as_ref().ok(), Some(&path), "{same:?}");
    }
    let directory = home.directory(&path).ok()?;
    assert_eq!(
        directory
            .as_str()
            .strip_prefix(top)
            .map(|below| below.trim_end_matches('/')),
        Some(rest)
    );
    let Ok(place) = home.keys(&path) else {
        assert!(path.is_root());
        return Some((path, vec![directory]));
    };
    assert!(!path.is_root() && place.directory == directory);
    assert_eq!(format!("{}/", place.file), directory.as_str());
    assert!(place.file.as_str().len() <= MAX_KEY);
    Some((path, vec![place.file, directory]))
}

pub fn is_name(part: &str) -> bool {
    !matches!(part, "" | "." | "..") && !part.contains(['\0', '/'])
}

pub fn text(u: &mut Unstructured) -> Chosen<String> {
    let mut text = String::new();
    for _ in 0..u.int_in_range(0..=9u8)? {
        match u.int_in_range(0..=15u8)? {
            0..=3 => text.push('/'),
            4 | 5 => text.push('.'),
            6 | 7 => text.push_str(".."),
            8 => text.push('a'),
            9 => text.push_str("/.."),
            10 => text.push_str("//a"),
            // Up to the limits, and a little more.
            11 => {
                let limit = *u.choose(&[64, 512, 1024])?;
                let (one, len) = (*u.choose(&['x', 'é'])?, limit + 4 - u.int_in_range(0..=12)?);
                text.extend(std::iter::repeat_n(one, len / one.len_utf8()));
            }
            12 => text.push(*u.choose(&[
                '\0', '\u{FFFD}', '\\', '%', '~', '\u{202E}', '\u{FF0F}', '\u{2024}',
            ])?),
            13 => text.push(u.arbitrary()?),
            _ => text.push(u.int_in_range(b' '..=b'z')?.into()),
        }
    }
    Ok(text)
}
