//! Real clients against the real binary over a real S3 wire: what arrives in the bucket, and what
//! clients get back.
//!
//! A test whose client isn't installed is skipped and says so; `SFTPD_TEST_ALL_CLIENTS=1` makes
//! that a failure. `SFTPD_TEST_S3=http://…` (with `SFTPD_TEST_S3_KEY`, `SFTPD_TEST_S3_SECRET`)
//! takes that S3 server instead of the one in `support/s3`. After every test no multipart upload
//! may be in progress.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use bytes::Bytes;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use support::commands::{Running, report_skip};
use support::gateway::{Content, Deviation, Files, Gateway, HOST, LARGE, USER};
use support::wait::wait_until;
use support::{MIB, PASSWORD, noise};

/// A usual tree: an empty file, one of several parts, and directories in directories.
fn a_tree() -> Files {
    let files = [
        ("hello.txt", Bytes::from("hello")),
        ("empty", Bytes::new()),
        ("large.bin", noise(LARGE, 1)),
        ("sub/one", noise(70_000, 2)),
        ("sub/deeper/two", noise(5 * MIB, 3)),
    ];
    files
        .map(|(name, bytes)| (name.to_owned(), Content(bytes)))
        .into()
}

/// Names that shells, URLs and S3 treat specially.
const ODD_NAMES: &str = "two words/ leading/trailing /grüße 日本 🦀/a+b/100%20/%/c#d/q?x=1&y/it's \"quoted\"/[ab]*/~tilde/\
    -dash/semi;colon/a=b/(c)/.hidden/.../$HOME/`x`/<&>/a|b/UPPER/upper/tab\there/e\u{301}/é";

fn odd_files(gateway: &Gateway) -> Files {
    let backslash = (!gateway.has(Deviation::NoBackslash)).then_some("back\\slash");
    let long = "n".repeat(255);
    let names = ODD_NAMES.split('/').chain(backslash).chain([long.as_str()]);
    names
        .map(|name| (name.to_owned(), Content::from(name)))
        .collect()
}

// OpenSSH sftp

/// Runs a batch file, which ends with failure at the first command that fails.
fn sftp(gateway: &Gateway, user: &str, batch: &str) -> Command {
    gateway.write(".batch", batch);
    let mut command = gateway.command("sftp");
    command
        .arg("-F")
        .arg(gateway.ssh_config())
        .args(["-b", ".batch", &format!("{user}@{HOST}")]);
    command
}

#[test]
fn sftp_puts_and_gets() {
    let Some(gateway) = Gateway::start(&["sftp"]) else {
        return;
    };
    for (name, bytes) in [
        ("small", noise(1000, 1)),
        ("empty", Bytes::new()),
        ("big", noise(20_000_000, 2)),
    ] {
        gateway.write(name, &bytes);
        gateway.requests();
        gateway.run(&mut sftp(&gateway, USER, &format!("put {name}")));
        if let Some(requests) = gateway.requests() {
            let ops: Vec<_> = requests.iter().map(|request| request.op.as_str()).collect();
            match name {
                "big" => assert_eq!(ops.len(), 4 + 2, "{ops:?}"),
                _ => assert_eq!(ops, ["PutObject"]),
            }
        }
        gateway.expect_object(name, &bytes);
        gateway.run(&mut sftp(&gateway, USER, &format!("get {name} back")));
        assert_eq!(gateway.read("back"), Content(bytes));
    }
    assert_eq!(gateway.keys(), ["big", "empty", "small"]);
}

#[test]
fn sftp_puts_and_gets_directories() {
    let Some(gateway) = Gateway::start(&["sftp"]) else {
        return;
    };
    let files = a_tree();
    gateway.write_all("tree", &files);
    gateway.run(&mut sftp(&gateway, USER, "put -r tree\nget -r tree back"));
    assert_eq!(gateway.objects("tree/"), files);
    assert_eq!(gateway.read_all("back"), files);
}

#[test]
fn sftp_uses_unusual_names() {
    let Some(gateway) = Gateway::start(&["sftp"]) else {
        return;
    };
    let files = odd_files(&gateway);
    gateway.write_all("odd", &files);
    gateway.run(&mut sftp(&gateway, USER, "put -r odd\nget -r odd back"));
    assert_eq!(gateway.objects("odd/"), files);
    assert_eq!(gateway.read_all("back"), files);
    gateway.run(&mut sftp(
        &gateway,
        USER,
        "rename \"odd/a+b\" \"odd/100%2F\"\nrm \"odd/two words\"",
    ));
    let keys = gateway.keys();
    assert!(
        keys.contains(&"odd/100%2F".to_owned()) && !keys.contains(&"odd/a+b".to_owned()),
        "{keys:?}"
    );
    assert!(!keys.contains(&"odd/two words".to_owned()), "{keys:?}");
    let has_limit = [Deviation::NoLongNames, Deviation::NoLongKeys];
    if !has_limit.into_iter().any(|limit| gateway.has(limit)) {
        let long = "n".repeat(900);
        gateway.write("file", "hello");
        gateway.run(&mut sftp(
            &gateway,
            USER,
            &format!("put file {long}\nget {long} back/file"),
        ));
        gateway.expect_object(&long, "hello");
        assert_eq!(gateway.read("back/file"), "hello".into());
    }
}

/// Objects that no SFTP client can make, but other users of the bucket can.
#[test]
fn sftp_shows_markers_and_a_file_beside_a_directory_of_its_name() {
    let Some(gateway) = Gateway::start(&["sftp"]) else {
        return;
    };
    gateway.put_object("marker/", "");
    gateway.put_object("marked/", "");
    gateway.put_object("marked/file", "hello");
    gateway.put_object("a", "file");
    let mut names = vec!["a", "marked/", "marker/"];
    if !gateway.has(Deviation::NoFileBesideDirectory) {
        gateway.put_object("a/b", "beside");
        names.insert(1, "a/");
        gateway.run(&mut sftp(&gateway, USER, "get a\nget a/b"));
        assert_eq!(
            (gateway.read("a"), gateway.read("b")),
            ("file".into(), "beside".into())
        );
    }
    let listed = |path: &str| {
        let lines = gateway.run(&mut sftp(&gateway, USER, &format!("@ls -l {path}")));
        let name = |line: &str| {
            let name = line.rsplit(' ').next().unwrap_or_default();
            if line.starts_with('d') {
                format!("{name}/")
            } else {
                name.to_owned()
            }
        };
        let mut names: Vec<_> = lines.lines().map(name).collect();
        names.sort();
        names
    };
    assert_eq!(listed("/"), names);
    assert_eq!(
        (listed("marker"), listed("marked")),
        (vec![], vec!["file".to_owned()])
    );
    gateway.run(&mut sftp(
        &gateway,
        USER,
        "rmdir marker\nrm marked/file\nrmdir marked",
    ));
    assert!(
        gateway.keys().iter().all(|key| key.starts_with('a')),
        "{:?}",
        gateway.keys()
    );
}

#[test]
fn sftp_makes_lists_renames_and_removes_files_and_directories() {
    let Some(gateway) = Gateway::start(&["sftp"]) else {
        return;
    };
    gateway.write("file", "hello there");
    gateway.run(&mut sftp(
        &gateway,
        USER,
        "mkdir d\nput -p file d/one\nput file d/two\nrename d/one d/three\nrm d/two\nmkdir d/empty\nchmod 600 d/three",
    ));
    assert_eq!(
        gateway.objects(""),
        [("d/three".to_owned(), Content::from("hello there"))].into()
    );
    let list = gateway.run(&mut sftp(&gateway, USER, "ls -l d"));
    let of = |name: &str| {
        list.lines()
            .find(|line| line.ends_with(name))
            .unwrap_or_else(|| panic!("{name}: {list}"))
    };
    assert!(
        of(" three").starts_with("-rw") && of(" three").contains(" 11 "),
        "{list}"
    );
    assert!(of(" empty").starts_with("drwx"), "{list}");
    gateway.run(&mut sftp(&gateway, USER, "put file d/four"));
    gateway.refused(&mut sftp(&gateway, USER, "rmdir d"));
    gateway.refused(&mut sftp(&gateway, USER, "rm d/nothing"));
    gateway.refused(&mut sftp(&gateway, USER, "get d/nothing"));
    assert_eq!(gateway.keys(), ["d/four", "d/three"]);
    // OpenSSH renames with posix-rename, which replaces.
    gateway.run(&mut sftp(
        &gateway,
        USER,
        "rename d e\nrename e/four e/three\nrm e/three\nrmdir e/empty\nrmdir e",
    ));
    assert_eq!(gateway.keys(), [""; 0]);
    let df = gateway.run(&mut sftp(&gateway, USER, "df -h"));
    assert!(df.lines().any(|line| line.ends_with("0%")), "{df}");
}

#[test]
fn sftp_resumes_uploads_and_downloads() {
    let Some(gateway) = Gateway::start(&["sftp"]) else {
        return;
    };
    let whole = noise(20_000_000, 4);
    // Loaded into the buffer, copied inside the store, and copied but for a tail that is too short
    // for that.
    for there in [1000, 7_000_000, 10 * 1024 * 1024 + 7] {
        gateway.put_object("up", &whole[..there]);
        gateway.write("up", &whole);
        gateway.run(&mut sftp(&gateway, USER, "reput up"));
        gateway.expect_object("up", &whole);
        gateway.write("down", &whole[..there]);
        gateway.run(&mut sftp(&gateway, USER, "reget up down"));
        assert_eq!(gateway.read("down"), Content::from(&whole));
    }
}

#[test]
fn sftp_logs_in_with_a_password() {
    let Some(gateway) = Gateway::start(&["sftp"]) else {
        return;
    };
    gateway.write("askpass", format!("#!/bin/sh\necho '{PASSWORD}'\n"));
    gateway.run(gateway.command("chmod").args(["+x", "askpass"]));
    gateway.write("file", "hello");
    let login = || {
        let mut command = gateway.command("sftp");
        // The first value of an option counts, and -b implies BatchMode.
        let options =
            "-oBatchMode=no -oPreferredAuthentications=password -oNumberOfPasswordPrompts=1";
        command.args(options.split(' '));
        command
            .arg("-F")
            .arg(gateway.ssh_config())
            .args(["-b", ".batch", HOST]);
        command
            .env("SSH_ASKPASS", gateway.path("askpass"))
            .env("SSH_ASKPASS_REQUIRE", "force")
            .env("DISPLAY", ":0");
        command
    };
    gateway.write(".batch", "put file");
    gateway.run(&mut login());
    gateway.expect_object("file", "hello");
    gateway.write("askpass", "#!/bin/sh\necho wrong\n");
    gateway.write(".batch", "rm file");
    gateway.refused(&mut login());
    gateway.expect_object("file", "hello");
}

/// Starts an upload that is slow enough (5 MB/s) to be killed in the middle.
fn start_slow_put(gateway: &Gateway) -> Running {
    gateway.write("new", noise(60_000_000, 5));
    gateway.write(".batch", "put new file");
    let mut command = gateway.command("sftp");
    command
        .args(["-l", "40000", "-b", ".batch", "-F"])
        .arg(gateway.ssh_config())
        .arg(HOST);
    Running::spawn_quietly(&mut command)
}

#[test]
fn a_killed_client_leaves_the_old_object_and_nothing_else() {
    let Some(gateway) = Gateway::start(&["sftp"]) else {
        return;
    };
    gateway.put_object("file", "the old one");
    let client = start_slow_put(&gateway);
    wait_until("a multipart upload begins", || {
        !gateway.uploads().is_empty()
    });
    drop(client);
    wait_until("no upload is in progress", || gateway.uploads().is_empty());
    gateway.expect_object("file", "the old one");
    assert_eq!(gateway.keys(), ["file"]);
    wait_until("the log says so", || {
        gateway.log().contains("put \"/file\" forced to end")
    });
}

#[test]
fn a_read_only_user_changes_nothing() {
    let Some(gateway) = Gateway::start(&["sftp"]) else {
        return;
    };
    gateway.add_user("reader", "read-only");
    gateway.put_object("file", "hello");
    gateway.put_object("d/file", "hello");
    gateway.write("new", "new");
    let before = gateway.objects("");
    for refused in [
        "put new",
        "put new file",
        "reput new file",
        "rm file",
        "rename file other",
        "rename d e",
        "mkdir x",
        "rmdir d",
        "put -r .",
    ] {
        gateway.refused(&mut sftp(&gateway, "reader", refused));
        assert_eq!(gateway.objects(""), before, "{refused}");
    }
    gateway.run(&mut sftp(&gateway, "reader", "ls -l\nget file\nget -r d"));
    assert_eq!(
        (gateway.read("file"), gateway.read("d/file")),
        ("hello".into(), "hello".into())
    );
}

#[test]
fn a_write_only_user_reads_nothing() {
    let Some(gateway) = Gateway::start(&["sftp"]) else {
        return;
    };
    gateway.add_user("dropper", "write-only");
    gateway.put_object("secret", "hello");
    gateway.put_object("d/secret", "hello");
    gateway.write("new", noise(LARGE, 6));
    gateway.write("begun", "h");
    let before = gateway.objects("");
    for refused in ["get secret", "get -r d", "reget secret begun"] {
        gateway.refused(&mut sftp(&gateway, "dropper", refused));
        assert_eq!(gateway.objects(""), before, "{refused}");
        assert!(
            !gateway.path("secret").exists() || gateway.read("secret") == "".into(),
            "{refused}"
        );
    }
    assert_eq!(gateway.read("begun"), "h".into());
    gateway.run(&mut sftp(
        &gateway,
        "dropper",
        "put new\nmkdir in\nput new in/new",
    ));
    gateway.expect_object("new", noise(LARGE, 6));
    gateway.expect_object("in/new", noise(LARGE, 6));
}

#[test]
fn ssh_gets_a_message_that_only_sftp_is_served() {
    let Some(gateway) = Gateway::start(&["ssh"]) else {
        return;
    };
    for command in [&["ls"][..], &[]] {
        let said = gateway.refused(
            gateway
                .command("ssh")
                .arg("-TF")
                .arg(gateway.ssh_config())
                .arg(HOST)
                .args(command),
        );
        assert!(said.to_lowercase().contains("sftp"), "{said:?}");
    }
}

// scp

fn scp(gateway: &Gateway) -> Command {
    let mut command = gateway.command("scp");
    command.args(["-s", "-q", "-F"]).arg(gateway.ssh_config());
    command
}

/// scp opens without truncation, writes from 0 and sets the size at the end.
#[test]
fn scp_overwrites_exactly() {
    let Some(gateway) = Gateway::start(&["scp"]) else {
        return;
    };
    for (number, len) in [3, LARGE, 3, 0, 1000, LARGE, 6_000_000, LARGE]
        .into_iter()
        .enumerate()
    {
        let bytes = noise(len, number as u64);
        gateway.write("up", &bytes);
        gateway.run(scp(&gateway).args(["up", &format!("{HOST}:file")]));
        gateway.expect_object("file", &bytes);
        gateway.run(scp(&gateway).args([&format!("{HOST}:file"), "down"]));
        assert_eq!(gateway.read("down"), Content(bytes));
    }
    gateway.refused(scp(&gateway).args([&format!("{HOST}:nothing"), "down"]));
}

#[test]
fn scp_copies_directories() {
    let Some(gateway) = Gateway::start(&["scp"]) else {
        return;
    };
    let files = a_tree();
    gateway.write_all("tree", &files);
    gateway.run(scp(&gateway).args(["-r", "-p", "tree", &format!("{HOST}:/")]));
    assert_eq!(gateway.objects("tree/"), files);
    gateway.run(scp(&gateway).args(["-r", &format!("{HOST}:tree"), "back"]));
    assert_eq!(gateway.read_all("back"), files);
}

// sshfs

/// Unmounts when dropped.
struct Mount<'a>(&'a Gateway);

impl Mount<'_> {
    /// `None`, with the reason printed, if this machine can mount nothing.
    fn new(gateway: &Gateway) -> Option<Mount<'_>> {
        if !Path::new("/dev/fuse").exists() {
            report_skip("there is no /dev/fuse");
            return None;
        }
        fs::create_dir(gateway.path("mnt")).unwrap();
        gateway.run(
            gateway
                .command("sshfs")
                .arg(format!("{HOST}:/"))
                .args(["mnt", "-F"])
                .arg(gateway.ssh_config()),
        );
        Some(Mount(gateway))
    }

    /// Runs a shell script in the mounted directory.
    fn shell(&self, script: &str) -> String {
        self.0.run(
            self.0
                .command("sh")
                .args(["-euc", &format!("cd mnt\n{script}")]),
        )
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let mountpoint = self.0.path("mnt");
        for lazily in ["-u", "-uz"] {
            let unmount = self
                .0
                .command("fusermount3")
                .arg(lazily)
                .arg(&mountpoint)
                .stderr(Stdio::null())
                .status();
            if unmount.is_ok_and(|status| status.success()) {
                return;
            }
        }
    }
}

#[test]
fn sshfs_copies_renames_and_removes_trees() {
    let Some(gateway) = Gateway::start(&["sshfs", "fusermount3"]) else {
        return;
    };
    let Some(mount) = Mount::new(&gateway) else {
        return;
    };
    let files = a_tree();
    gateway.write_all("tree", &files);
    mount.shell("cp -r ../tree tree; cp -r tree ../back");
    assert_eq!(gateway.read_all("back"), files);
    for (name, content) in files {
        gateway.expect_object(&format!("tree/{name}"), content.0);
    }
    let listed = mount.shell("ls -l tree");
    assert!(
        listed.contains(&format!(" {LARGE} ")) && listed.contains("drwx"),
        "{listed}"
    );
    mount.shell(
        "mkdir d; mkdir d/e; mv tree/hello.txt d/e/hi; rmdir tree/sub 2>/dev/null && exit 1; rm -r tree; ! ls tree",
    );
    assert_eq!(gateway.keys(), ["d/e/hi"]);
    mount.shell("mv d f; cat f/e/hi; rm f/e/hi");
    assert_eq!(gateway.keys(), [""; 0]);
    if !gateway.has(Deviation::EmptyPrefixesLinger) {
        mount.shell("rmdir f/e; rmdir f; test -z \"$(ls)\"");
    }
}

#[test]
fn sshfs_edits_files_in_place() {
    let Some(gateway) = Gateway::start(&["sshfs", "fusermount3"]) else {
        return;
    };
    let Some(mount) = Mount::new(&gateway) else {
        return;
    };
    let large = noise(LARGE, 7);
    gateway.put_object("large", &large);
    mount.shell("echo one > small; echo two >> small; echo end >> large");
    gateway.expect_object("small", "one\ntwo\n");
    gateway.expect_object("large", [&large[..], b"end\n"].concat());
    mount.shell("sed -i s/two/three/ small; printf O | dd of=small bs=1 conv=notrunc 2>/dev/null");
    gateway.expect_object("small", "One\nthree\n");
    mount.shell("echo other > small; echo more > large; : > empty");
    gateway.expect_object("small", "other\n");
    gateway.expect_object("large", "more\n");
    mount.shell("truncate -s 0 small; test ! -s small");
    gateway.expect_object("small", "");
    assert_eq!(gateway.keys(), ["empty", "large", "small"]);
}

#[test]
fn sshfs_reads_at_any_offset() {
    let Some(gateway) = Gateway::start(&["sshfs", "fusermount3"]) else {
        return;
    };
    let Some(mount) = Mount::new(&gateway) else {
        return;
    };
    let large = noise(LARGE, 8);
    gateway.put_object("large", &large);
    for (at, len) in [
        (11_000_000, 4096),
        (5, 10),
        (6_000_001, 70_000),
        (LARGE - 10, 10),
        (1_000_000, 2_000_000),
    ] {
        mount.shell(&format!(
            "dd if=large of=../piece iflag=skip_bytes,count_bytes skip={at} count={len} bs=64K"
        ));
        assert_eq!(
            gateway.read("piece"),
            Content::from(&large[at..at + len]),
            "{len} bytes at {at}"
        );
    }
}

// lftp

#[test]
fn lftp_puts_gets_and_mirrors() {
    let Some(gateway) = Gateway::start(&["lftp"]) else {
        return;
    };
    let lftp = |commands: &str| gateway.run(&mut gateway.lftp(commands));
    let files = a_tree();
    gateway.write_all("tree", &files);
    gateway.write("file", "hello");
    lftp("put file; get file -o back");
    gateway.expect_object("file", "hello");
    assert_eq!(gateway.read("back"), "hello".into());
    lftp("mirror -R tree up; mirror up down; cls -l up");
    assert_eq!(gateway.objects("up/"), files);
    assert_eq!(gateway.read_all("down"), files);
    lftp("pget -n 4 up/large.bin -o pieces; mv up/empty up/moved; rm -r up/sub");
    assert_eq!(gateway.read("pieces"), files["large.bin"]);
    assert_eq!(
        gateway.keys(),
        ["file", "up/hello.txt", "up/large.bin", "up/moved"]
    );
}

// ssh-audit

const CURVE: &str = "[fail] using elliptic curves that are suspected as being backdoored by the U.S. National Security Agency";
const NONCE: &str = "[warn] using weak random number generator could reveal the key";
const QUANTUM: &str = "[warn] does not provide protection against post-quantum attacks";

/// What ssh-audit finds wrong: algorithms, each with all complaints about it.
fn findings(audit: &str) -> Vec<(&str, Vec<&str>)> {
    let mut findings: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in audit.lines() {
        let Some(at) = line.find("[fail]").or(line.find("[warn]")) else {
            continue;
        };
        if line.starts_with('(') {
            findings.push((line.split(' ').nth(1).unwrap(), Vec::new()));
        }
        findings
            .last_mut()
            .expect("an algorithm")
            .1
            .push(&line[at..]);
    }
    findings
}

/// The remaining findings are needed by clients that are older than OpenSSH 9.9, or can't do X25519
/// or ed25519.
#[test]
fn ssh_audit_finds_only_what_old_clients_need() {
    let audit = |gateway: &Gateway, port: u16| {
        let mut command = gateway.command("ssh-audit");
        command.args(["--no-colors", "--level=warn", "--skip-rate-test", "--port"]);
        command.args([&port.to_string(), "127.0.0.1"]);
        command
    };
    let Some(gateway) = Gateway::start(&["ssh-audit"]) else {
        return;
    };
    let all = gateway.refused(&mut audit(&gateway, gateway.port));
    let expected = [
        ("curve25519-sha256", vec![QUANTUM]),
        ("curve25519-sha256@libssh.org", vec![QUANTUM]),
        ("ecdh-sha2-nistp256", vec![CURVE, QUANTUM]),
        ("ecdh-sha2-nistp384", vec![CURVE, QUANTUM]),
        ("ecdh-sha2-nistp521", vec![CURVE, QUANTUM]),
        ("ecdsa-sha2-nistp256", vec![CURVE, NONCE]),
    ];
    assert_eq!(findings(&all), expected, "{all}");
    let strict = ["--algorithms", "post-quantum"];
    let post_quantum = gateway.another(&strict);
    let all = gateway.run(&mut audit(&gateway, post_quantum.address.port()));
    assert_eq!(findings(&all), [], "{all}");
}

// curl

#[test]
fn curl_uploads_and_downloads() {
    let Some(gateway) = Gateway::start(&["curl:sftp"]) else {
        return;
    };
    let curl = |path: &str, args: &[&str]| {
        let mut command = gateway.command("curl");
        // With a password: libssh2 before 1.11 signs with RSA keys by SHA-1 only.
        command
            .args([
                "--silent",
                "--show-error",
                "--fail",
                "--user",
                &format!("{USER}:{PASSWORD}"),
            ])
            .args(args);
        command.arg(format!("sftp://127.0.0.1:{}/{path}", gateway.port));
        command
    };
    for (name, bytes) in [
        ("small", noise(1000, 1)),
        ("empty", Bytes::new()),
        ("large", noise(LARGE, 2)),
    ] {
        gateway.write(name, &bytes);
        gateway.run(&mut curl(
            &format!("up/{name}"),
            &["--ftp-create-dirs", "--upload-file", name],
        ));
        gateway.expect_object(&format!("up/{name}"), &bytes);
        gateway.run(&mut curl(&format!("up/{name}"), &["--output", "back"]));
        // curl makes no file for no bytes.
        assert!(bytes.is_empty() || gateway.read("back") == Content(bytes));
    }
    gateway.run(&mut curl(
        "up/large",
        &["--range", "6000000-6999999", "--output", "range"],
    ));
    assert_eq!(
        gateway.read("range"),
        Content::from(&noise(LARGE, 2)[6_000_000..7_000_000])
    );
    let list = gateway.run(&mut curl("up/", &[]));
    assert!(
        list.lines()
            .any(|line| line.ends_with(" large") && line.contains(&format!(" {LARGE} "))),
        "{list}"
    );
    gateway.refused(&mut curl("nothing", &[]));
    gateway.write("more", "more");
    gateway.run(&mut curl(
        "up/small",
        &["--append", "--upload-file", "more"],
    ));
    gateway.expect_object("up/small", [&noise(1000, 1)[..], b"more"].concat());
}

// rclone

#[test]
fn rclone_copies_checks_and_purges() {
    let Some(gateway) = Gateway::start(&["rclone"]) else {
        return;
    };
    let rclone = |args: &[&str]| {
        let once = ["--low-level-retries", "1", "--retries", "1"];
        gateway.run(gateway.rclone().args(once).args(args))
    };
    let files = a_tree();
    gateway.write_all("tree", &files);
    rclone(&["copy", "tree", ":sftp:up/tree"]);
    // Newer versions upload to NAME.HASH.partial and rename.
    assert_eq!(gateway.objects("up/tree/"), files);
    rclone(&["check", "--download", "tree", ":sftp:up/tree"]);
    rclone(&["check", "--size-only", "tree", ":sftp:up/tree"]);
    let listed = rclone(&["lsf", "-R", "--files-only", ":sftp:up/tree"]);
    assert_eq!(
        listed.lines().collect::<std::collections::BTreeSet<_>>(),
        files.keys().map(String::as_str).collect()
    );
    // Again, over what is there.
    gateway.write("tree/large.bin", "short now");
    rclone(&["copy", "--ignore-times", "tree", ":sftp:up/tree"]);
    gateway.expect_object("up/tree/large.bin", "short now");
    rclone(&["copy", ":sftp:up/tree", "down"]);
    assert_eq!(gateway.read_all("down"), gateway.read_all("tree"));
    rclone(&["moveto", ":sftp:up/tree/hello.txt", ":sftp:moved/hi"]);
    if gateway.has(Deviation::EmptyPrefixesLinger) {
        return;
    }
    rclone(&["mkdir", ":sftp:up/hollow"]);
    rclone(&["purge", ":sftp:up/tree"]);
    rclone(&["rmdirs", ":sftp:up"]);
    assert_eq!(gateway.keys(), ["moved/hi"]);
    assert_eq!(rclone(&["lsf", ":sftp:"]), "moved/\n");
}

// paramiko

const PARAMIKO: &str = r#"
import sys, paramiko
port, known_hosts, key = sys.argv[1:4]
def connect(key=key):
    client = paramiko.SSHClient()
    client.load_host_keys(known_hosts)
    client.connect("127.0.0.1", int(port), "alice", key_filename=key, look_for_keys=False, allow_agent=False)
    return client
client = connect()
sftp = client.open_sftp()
"#;

fn paramiko(gateway: &Gateway, script: &str, args: &[&str]) -> String {
    gateway.run(&mut gateway.python(&format!("{PARAMIKO}{script}client.close()\n"), args))
}

/// Characters that XML can't carry or that URLs treat specially: stored, listed, fetched, renamed
/// and removed.
#[test]
fn paramiko_uses_every_character_in_names() {
    let Some(gateway) = Gateway::start(&["python3:paramiko"]) else {
        return;
    };
    let script = r#"
left_out = sys.argv[4]
characters = [chr(n) for n in range(1, 32)] + ["\ufffe", "\x7f", "\u0085", "  ", "%", "%41", "+", "&", "<", ">"]
names = ["x" + character + "y" for character in characters if character != left_out]
sftp.mkdir("d")
for name in names:
    with sftp.open("d/" + name, "wb") as file:
        file.write(name.encode())
assert sorted(sftp.listdir("d")) == sorted(names), sorted(sftp.listdir("d"))
sftp.posix_rename("d", "e")
for name in names:
    with sftp.open("e/" + name) as file:
        assert file.read() == name.encode(), name
    sftp.posix_rename("e/" + name, "e/moved " + name)
    sftp.remove("e/moved " + name)
assert sftp.listdir("e") == []
"#;
    let left_out = if gateway.has(Deviation::NoLineFeed) {
        "\n"
    } else {
        ""
    };
    paramiko(&gateway, script, &[left_out]);
    assert_eq!(gateway.keys(), [""; 0]);
}

#[test]
fn paramiko_puts_and_gets() {
    let Some(gateway) = Gateway::start(&["python3:paramiko"]) else {
        return;
    };
    for (name, bytes) in [
        ("small", noise(1000, 1)),
        ("empty", Bytes::new()),
        ("large", noise(LARGE, 2)),
    ] {
        gateway.write(name, &bytes);
        // `put` asks for the size afterwards and compares.
        paramiko(
            &gateway,
            "name = sys.argv[4]\nsftp.put(name, name)\nsftp.get(name, 'back')\n",
            &[name],
        );
        gateway.expect_object(name, &bytes);
        assert_eq!(gateway.read("back"), Content(bytes));
    }
}

/// 6,400 READs at once: a server that stops reading its socket while its replies wait hangs for
/// ever.
#[test]
fn paramiko_gets_200_megabytes() {
    let Some(gateway) = Gateway::start(&["python3:paramiko"]) else {
        return;
    };
    let bytes = noise(200 * 1024 * 1024, 9);
    gateway.put_object("huge", &bytes);
    paramiko(&gateway, "sftp.get('huge', 'back')\n", &[]);
    assert_eq!(gateway.read("back"), Content(bytes));
}

#[test]
fn paramiko_appends_edits_and_truncates() {
    let Some(gateway) = Gateway::start(&["python3:paramiko"]) else {
        return;
    };
    let large = noise(LARGE, 3);
    gateway.put_object("large", &large);
    let script = r#"
with sftp.open("notes", "w") as f: f.write("one\ntwo\n")
with sftp.open("notes", "a") as f: f.write("three\n")
with sftp.open("large", "a") as f: f.write("end")
with sftp.open("notes", "r+") as f:
    assert f.read(3) == b"one"
    f.seek(4)
    f.write("TWO")
with sftp.open("notes") as f: assert f.read() == b"one\nTWO\nthree\n"
with sftp.open("notes", "r+") as f: f.truncate(0)
assert sftp.stat("notes").st_size == 0
with sftp.open("notes", "r+") as f: f.write("new")
"#;
    paramiko(&gateway, script, &[]);
    gateway.expect_object("notes", "new");
    gateway.expect_object("large", [&large[..], b"end"].concat());
}

#[test]
fn paramiko_makes_renames_and_removes_files_and_directories() {
    let Some(gateway) = Gateway::start(&["python3:paramiko"]) else {
        return;
    };
    let script = r#"
import stat
def fails(error, function, *args):
    try: function(*args)
    except error: return
    raise AssertionError(f"{function.__name__}{args} should have failed")
for name in "a", "b", "c":
    with sftp.open(name, "w") as f: f.write(name)
sftp.mkdir("d")
fails(IOError, sftp.mkdir, "d")
found = {entry.filename: entry for entry in sftp.listdir_attr(".")}
assert {n for n in found if n not in (".", "..")} == {"a", "b", "c", "d"}, found
assert stat.S_ISDIR(found["d"].st_mode) and stat.S_ISREG(found["a"].st_mode) and found["a"].st_size == 1
fails(IOError, sftp.rename, "a", "b")
with sftp.open("b") as f: assert f.read() == b"b"
sftp.posix_rename("a", "b")
with sftp.open("b") as f: assert f.read() == b"a"
sftp.rename("c", "d/c")
for missing in "a", "c", "d/x", "x/y": fails(FileNotFoundError, sftp.stat, missing)
fails(FileNotFoundError, sftp.remove, "a")
fails(FileNotFoundError, sftp.open, "a")
fails(FileNotFoundError, sftp.listdir, "x")
fails(IOError, sftp.open, "b", "wx")
fails(IOError, sftp.open, "b", "x")
fails(IOError, sftp.rmdir, "d")
sftp.utime("b", (1, 1)); sftp.chmod("b", 0o600)
assert sftp.normalize("../../d/./c") == "/d/c"
"#;
    paramiko(&gateway, script, &[]);
    assert_eq!(
        gateway.objects(""),
        [("b".to_owned(), "a".into()), ("d/c".to_owned(), "c".into())].into()
    );
}

#[test]
fn paramiko_logs_in_with_ecdsa_and_rsa_keys() {
    let Some(gateway) = Gateway::start(&["python3:paramiko"]) else {
        return;
    };
    for kind in [
        &["-t", "ecdsa"][..],
        &["-t", "ecdsa", "-b", "521"],
        &["-t", "rsa", "-b", "3072"],
    ] {
        let key = gateway.add_key(&kind.concat(), kind);
        let script = "other = connect(sys.argv[4])\nassert other.open_sftp().listdir('.') == []\nother.close()\n";
        paramiko(&gateway, script, &[key.to_str().unwrap()]);
    }
}

#[test]
fn paramiko_is_refused_with_an_unknown_key() {
    let Some(gateway) = Gateway::start(&["python3:paramiko"]) else {
        return;
    };
    let stranger = gateway.path("stranger");
    gateway.run(
        gateway
            .command("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(&stranger),
    );
    let script = r#"
try: connect(sys.argv[4])
except paramiko.AuthenticationException: pass
else: raise AssertionError("a stranger logged in")
"#;
    paramiko(&gateway, script, &[stranger.to_str().unwrap()]);
}

// asyncssh

const ASYNCSSH: &str = r#"
import asyncio, asyncssh, sys
port, known_hosts, key = sys.argv[1:4]
async def main():
    async with asyncssh.connect("127.0.0.1", int(port), username="alice", client_keys=[key], known_hosts=known_hosts,
                                config=None, agent_path=None) as connection:
        async with connection.start_sftp_client() as sftp:
            await work(connection, sftp)
"#;

#[test]
fn asyncssh_transfers_many_files_at_once() {
    let Some(gateway) = Gateway::start(&["python3:asyncssh"]) else {
        return;
    };
    let files: Files = (0..12)
        .map(|n: usize| (format!("{n}.bin"), Content(noise(n * n * 70_000, n as u64))))
        .collect();
    gateway.write_all("tree", &files);
    let script = r#"
async def work(connection, sftp):
    await sftp.makedirs("up")
    names = [f"{n}.bin" for n in range(12)]
    await asyncio.gather(*(sftp.put(f"tree/{name}", f"up/{name}") for name in names))
    assert sorted(await sftp.glob("up/1*.bin")) == ["up/1.bin", "up/10.bin", "up/11.bin"], await sftp.glob("up/1*.bin")
    sizes = await asyncio.gather(*(sftp.getsize(f"up/{name}") for name in names))
    assert sizes == [n * n * 70_000 for n in range(12)], sizes
    # Several sessions of one connection, and uploads beside downloads.
    async with connection.start_sftp_client() as second:
        import os
        os.mkdir("down")
        await asyncio.gather(*(second.get(f"up/{name}", f"down/{name}") for name in names),
                             *(sftp.put(f"tree/{name}", f"again/{name}") for name in names))
    assert not await sftp.exists("nothing") and await sftp.isdir("up")
asyncio.run(main())
"#;
    gateway.run(&mut gateway.python(&format!("{ASYNCSSH}{script}"), &[]));
    assert_eq!(gateway.objects("up/"), files);
    assert_eq!(gateway.objects("again/"), files);
    assert_eq!(gateway.read_all("down"), files);
}

// PuTTY

#[test]
fn psftp_puts_and_gets() {
    let Some(gateway) = Gateway::start(&["psftp", "puttygen"]) else {
        return;
    };
    gateway.run(
        gateway
            .command("puttygen")
            .arg(gateway.key())
            .args(["-O", "private", "-o", "key.ppk"]),
    );
    let files = a_tree();
    gateway.write_all("tree", &files);
    gateway
        .write("batch", "put tree/large.bin large\nget large back\nput -r tree up\nget -r up down\nmv large moved\nls");
    let mut psftp = gateway.command("psftp");
    psftp.args([
        "-batch",
        "-hostkey",
        &gateway.fingerprint(),
        "-P",
        &gateway.port.to_string(),
        "-i",
        "key.ppk",
    ]);
    gateway.run(psftp.args(["-b", "batch", &format!("{USER}@127.0.0.1")]));
    assert_eq!(gateway.read("back"), files["large.bin"]);
    gateway.expect_object("moved", &files["large.bin"].0);
    assert_eq!(gateway.objects("up/"), files);
    assert_eq!(gateway.read_all("down"), files);
}

// restic

#[test]
fn restic_backs_up_and_restores() {
    let Some(gateway) = Gateway::start(&["restic"]) else {
        return;
    };
    let files = a_tree();
    gateway.write_all("tree", &files);
    let restic = |args: &[&str]| {
        let connect = format!(
            "sftp.command=ssh -F {} {HOST} -s sftp",
            gateway.ssh_config().display()
        );
        let mut command = gateway.command("restic");
        command
            .env("RESTIC_PASSWORD", "secret")
            .args(["--no-cache", "-o", &connect, "-r"]);
        gateway.run(command.arg(format!("sftp:{HOST}:/repository")).args(args))
    };
    restic(&["init"]);
    restic(&["backup", "tree"]);
    gateway.write("tree/hello.txt", "hello again");
    restic(&["backup", "tree"]);
    restic(&["check", "--read-data"]);
    restic(&["restore", "latest", "--target", "restored"]);
    assert_eq!(gateway.read_all("restored/tree"), gateway.read_all("tree"));
    restic(&["forget", "--keep-last", "1", "--prune"]);
    restic(&["check", "--read-data"]);
    assert!(
        gateway
            .keys()
            .iter()
            .all(|key| key.starts_with("repository/") && !key.contains("locks/"))
    );
}
