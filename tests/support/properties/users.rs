//! users.json.

use super::paths::{is_name, keys, text};
use super::{Chosen, rarely};
use arbitrary::Unstructured;
use sftpd::path::{Home, Path};
use sftpd::users::{PublicKey, User, UsersFile, check_name};

const KEYS: [&str; 6] = [
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHLc6dIyJewML420LEtQB5muY1E/3oEQ/VMujcgHlFtr alice@example.com",
    "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBLrapYstLI/i+I9ge2JHiFtKv90tcGV5OPUrrgeXkMcTNWqxYXA+HuQS6F4+vMep+BORqLcX0ieYohS5poJ9y5M=",
    "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABgQC+0SMb3ujmtDfyCGYLoSTWW24olazMaXkVokFhAqDgml1FEqAYuCzdPqf5z8SInN5oOqcpOFp0HXnfe0gklne2jVOPlb6HCZJxk/Z+uGjxugm88Wq2misLWvlDe8YiaBVAi07janr+Xy6ywYF56XaGYqFmXSdwgzbvLjEKFDqh7+B9ciUZJv+TSPX7H3pALn2pNVhw4IC9F4AZIL3cdQKCkVrMO7MulV9HdEKmDYnxMK0uOVQCbAijPNW3fzo4fN98tOCT3FDrB53fs+1kgDgvKysJ2DmhpKu0wGw7P4uWJJN8+0DFUfzRSbTcsSxziPi1lMB4ehIlnyehqlmEbwH8FYmxUFByfkbLqaFCAU0LrIdG7bPekarXhLjQSuLjwfZos9806aUkA5t6WAhP3eO9sDxCjaNjpcAanRnhhLvLTlqSDV2sEDqW+zA9yaOF5nhUPu9yhtIi5pREbc9nhvsP47BeaeR8uudv+fpyFhOWL1ivmT5aCI+f7IToYzWadIs= c",
    "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQD2Z96yvodlOXya456aKVtNqWrhbbtlLgCV6EiINpb2N1mcnBy0mCdD1IAWMf7kq2JSZexBqC3Irfu5z2m3d/AR2TyZBi1MKwNDmC9++XkidkKB5O9JPs9SUJv9rzXvti0lD1tY+WcsjfyD3Y2AVSR1lWyjPexBiwHseau5oFmoYw== short",
    "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAAIEFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBAAAABHNzaDo=",
    "",
];
const PASSWORDS: [&str; 3] = [
    "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHRzYWx0$aGFzaGhhc2hoYXNoaGFzaGhhc2hoYXNo",
    "$argon2id$",
    "sesame",
];

/// Any users.json is refused or valid; a valid one is unchanged after it is written and read.
pub fn users(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    let (Ok(file), Ok(name), Ok(line)) = (users_file(u), text(u), text(u)) else {
        return;
    };
    let _ = line.parse::<PublicKey>();
    if check_name(&name).is_ok() {
        Home::new("prefix", &name).expect("a user's name is a home");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("users.json");
    std::fs::write(&path, file).unwrap();
    let Ok(file) = UsersFile::read(&path) else {
        return;
    };
    for (name, user) in &file.users {
        check_name(name).unwrap();
        assert_eq!(user.parsed_keys().count(), user.keys.len());
        assert!(!user.keys.is_empty() || user.password.is_some());
        let home = user.account(name).home_prefix().unwrap();
        Home::new("", &home).unwrap();
        // Together they can be too long, which only a login detects.
        let Ok(home) = Home::new("prefix", &home) else {
            continue;
        };
        let top = home.directory(&Path::parse("/").unwrap()).unwrap();
        assert!(
            top.as_str().starts_with("prefix/") && top.as_str().split_terminator('/').all(is_name),
            "{top}"
        );
        keys(&home, top.as_str(), "../../x").expect("a place in the home");
    }
    UsersFile::change(&path, |_| Ok(())).unwrap();
    assert_eq!(all(&UsersFile::read(&path).unwrap()), all(&file));
}

fn all(file: &UsersFile) -> Vec<impl PartialEq + std::fmt::Debug> {
    let user = |(name, user): (&String, &User)| {
        (
            user.keys.clone(),
            user.password.clone(),
            user.home.clone(),
            user.account(name).home,
            user.access,
        )
    };
    file.users.iter().map(user).collect()
}

/// Mostly valid files: others are refused early.
fn users_file(u: &mut Unstructured) -> Chosen<Vec<u8>> {
    let mut users = serde_json::Map::new();
    for _ in 0..u.int_in_range(0..=3u8)? {
        let mut user = serde_json::Map::new();
        let keys: Chosen<Vec<&str>> = (0..u.int_in_range(0..=2)?)
            .map(|_| mostly(u, &KEYS[..3], &KEYS[3..]))
            .collect();
        user.insert("keys".to_owned(), keys?.into());
        for (field, sound, odd) in [
            ("password", &PASSWORDS[..1], &PASSWORDS[1..]),
            (
                "access",
                &["read-only", "read-write", "write-only"],
                &["none"],
            ),
            (
                "home",
                &["", "alice", "/in//alice/"],
                &["..", "a/./b", "\0"],
            ),
        ] {
            if rarely(u, 2)? {
                user.insert(field.to_owned(), mostly(u, sound, odd)?.into());
            }
        }
        if rarely(u, 16)? {
            user.insert(u.choose(&["home", "acess"])?.to_string(), text(u)?.into());
        }
        let name = if rarely(u, 8)? {
            text(u)?
        } else {
            mostly(u, &["alice", "bob", "Zoë"], &["..", "a/b"])?.to_owned()
        };
        users.insert(name, user.into());
    }
    let mut file = serde_json::json!({ "users": users })
        .to_string()
        .into_bytes();
    if rarely(u, 16)? {
        file = u.bytes(u.len())?.to_vec();
    } else if rarely(u, 4)? {
        let at = u.choose_index(file.len())?;
        file[at] = u.arbitrary()?;
    }
    Ok(file)
}

fn mostly(
    u: &mut Unstructured,
    sound: &[&'static str],
    odd: &[&'static str],
) -> Chosen<&'static str> {
    let odd = rarely(u, 16)?.then_some(odd);
    u.choose(odd.unwrap_or(sound)).copied()
}
