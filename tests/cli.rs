//! What operators type and see: flags and variables, addresses, errors, the log, signals, limits of
//! the process, completions and the manual page. All of it with the real binary.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use support::commands::report_skip;
use support::process::{Process, add_user, sftpd};
use support::s3::FakeS3;
use support::{Client, PASSWORD, PUT, eventually, http_get};

/// A folder with a users.json of one user.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    add_user(folder.path(), "alice", &[], Some(PASSWORD));
    folder
}

/// The exit status and what was printed to standard error.
fn run(command: &mut Command) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = command.output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

/// Runs `serve` with an address that can't be bound: with a good configuration it exits with 1.
fn try_serve(folder: &Path, args: &[&str], variables: &[(&str, &str)]) -> (Option<i32>, String) {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut command = sftpd(folder);
    command
        .args(["serve", "--store", "memory:", "--listen", &address])
        .args(args)
        .envs(variables.iter().copied());
    run(&mut command)
}

/// Whether an SSH server answers at this address and the server's port.
fn greets_at(server: &Process, host: &str) -> bool {
    let mut stream = TcpStream::connect((host, server.address.port())).unwrap();
    let mut banner = [0; 10];
    stream.read_exact(&mut banner).unwrap();
    banner == *b"SSH-2.0-sf"
}

fn healthy() -> (String, String) {
    ("HTTP/1.1 200 OK".to_owned(), "ok\n".to_owned())
}

fn is_open(mut stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let read = stream.read(&mut [0]);
    read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

/// Load balancers give up after a few seconds, long before the timeout of other connections ends.
#[tokio::test(flavor = "multi_thread")]
async fn health_is_answered_while_others_hold_connections() {
    let s3 = FakeS3::start().await;
    let server = Process::start(&s3, &["--metrics", "127.0.0.1:0"]);
    let address = server.said("metrics on ").unwrap();
    // On a machine that is busy for more than a second the others may be closed before the answer;
    // not five times in a row.
    let answered_beside_others = (0..5).any(|_| {
        let others: Vec<_> = (0..20)
            .map(|_| TcpStream::connect(&address).unwrap())
            .collect();
        assert_eq!(http_get(&address, "/healthz"), healthy());
        others.iter().all(is_open)
    });
    assert!(
        answered_beside_others,
        "the answer came after the others were closed"
    );
    // More than the listener accepts at once: they are closed, one after the other.
    let _others: Vec<_> = (0..200)
        .map(|_| TcpStream::connect(&address).unwrap())
        .collect();
    assert_eq!(http_get(&address, "/healthz").1, "ok\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn switches_accept_on_off_yes_no_and_numbers() {
    for (setting, args, on) in [
        ("export SFTPD_DIR_MARKERS=on", &[][..], true),
        ("export SFTPD_DIR_MARKERS=Yes", &[], true),
        ("export SFTPD_DIR_MARKERS=1", &[], true),
        ("export SFTPD_DIR_MARKERS=TRUE", &[], true),
        ("export SFTPD_DIR_MARKERS=off", &[], false),
        ("export SFTPD_DIR_MARKERS=no", &[], false),
        ("export SFTPD_DIR_MARKERS=0", &[], false),
        ("export SFTPD_DIR_MARKERS=False", &[], false),
        ("export SFTPD_DIR_MARKERS=", &[], false),
        (":", &["--dir-markers"], true),
        (":", &["--dir-markers=on"], true),
        ("export SFTPD_DIR_MARKERS=on", &["--dir-markers=off"], false),
        (
            "export SFTPD_EQUAL_PARTS=yes",
            &["--dir-markers", "--equal-parts=no"],
            true,
        ),
    ] {
        let s3 = FakeS3::start().await;
        let server = Process::start_after(setting, &s3, args);
        server.client().await.mkdir("/d").await.unwrap();
        assert_eq!(s3.objects() == ["alice/d/"], on, "{setting} {args:?}");
    }
}

/// Every variable that `--help` names.
fn variables(folder: &Path, command: &str) -> Vec<String> {
    let output = sftpd(folder).args([command, "--help"]).output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    // Without the breaks of its lines.
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let named = help
        .split("[env: ")
        .skip(1)
        .filter_map(|rest| rest.split_once('='));
    named.map(|(name, _)| name.to_owned()).collect()
}

#[test]
fn empty_variables_count_as_unset() {
    let folder = folder();
    let names = variables(folder.path(), "serve");
    assert!(names.len() > 12, "{names:?}");
    let empty: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
    let mut serve = sftpd(folder.path());
    serve
        .args(["serve", "--store", "memory:", "--listen", "127.0.0.1:0"])
        .envs(empty.iter().copied());
    let server = Process::spawn(serve);
    assert!(
        server.line("settings defaults").is_some(),
        "{}",
        server.log()
    );
    assert!(greets_at(&server, "127.0.0.1"));
    // A required one that is empty is missing, and the error names it.
    let (status, said) = run(sftpd(folder.path()).envs(empty).arg("serve"));
    assert_eq!(status, Some(2));
    assert!(
        said.contains("--store <URL>") && said.contains("SFTPD_STORE"),
        "{said}"
    );
}

#[test]
fn an_error_names_the_variable_that_a_value_comes_from() {
    let folder = folder();
    for (variable, value, flag, sentence) in [
        (
            "SFTPD_EQUAL_PARTS",
            "maybe",
            "--equal-parts=maybe",
            "use on or off",
        ),
        (
            "SFTPD_MAX_SESSIONS",
            "many",
            "--max-sessions=many",
            "use a number like 1000",
        ),
        (
            "SFTPD_BUFFER_MEMORY",
            "abc",
            "--buffer-memory=abc",
            "use a size like 256MiB",
        ),
        (
            "SFTPD_PART_SIZE",
            "5 lots",
            "--part-size=5 lots",
            "use a size like 64MiB",
        ),
        (
            "SFTPD_PART_SIZE",
            "6GiB",
            "--part-size=6GiB",
            "maximum of 5GiB",
        ),
        (
            "SFTPD_IDLE_TIMEOUT",
            "soon",
            "--idle-timeout=soon",
            "use a time like 30s",
        ),
        (
            "SFTPD_DRAIN_TIMEOUT",
            "1000y",
            "--drain-timeout=1000y",
            "use a time like 30s",
        ),
        ("SFTPD_METRICS", "off", "--metrics=off", "use HOST:PORT"),
        (
            "SFTPD_METRICS",
            "::1:9464",
            "--metrics=::1:9464",
            "[::1]:2222",
        ),
        (
            "SFTPD_PROXY_PROTOCOL",
            "balancer",
            "--proxy-protocol=balancer",
            "10.0.0.0/8",
        ),
    ] {
        let (status, said) = try_serve(folder.path(), &[], &[(variable, value)]);
        assert_eq!(status, Some(2), "{said}");
        assert!(
            said.contains(&format!("comes from the variable {variable}"))
                && said.contains(sentence),
            "{said}"
        );
        let (status, said) = try_serve(folder.path(), &[flag], &[]);
        assert_eq!(status, Some(2), "{said}");
        assert!(
            !said.contains(variable) && said.contains(sentence),
            "{said}"
        );
        // The flag counts, and what is wrong with it does not come from the variable.
        let (status, said) = try_serve(folder.path(), &[flag], &[(variable, value)]);
        assert_eq!(status, Some(2), "{said}");
        assert!(!said.contains(variable), "{said}");
    }
    let (status, said) = try_serve(folder.path(), &[], &[]);
    assert_eq!(
        status,
        Some(1),
        "the rest of these commands is right: {said}"
    );
}

#[test]
fn senseless_values_are_refused() {
    let folder = folder();
    for (flag, sentence) in [
        ("--max-sessions=0", "nobody could connect"),
        ("--login-timeout=0s", "every session would end at once"),
        ("--idle-timeout=0s", "every session would end at once"),
        (
            "--proxy-protocol=0.0.0.0/0",
            "every client could claim any address",
        ),
        (
            "--proxy-protocol=10.0.0.1,::/0",
            "every client could claim any address",
        ),
        ("--part-size=1MiB", "minimum of 5MiB"),
        ("--buffer-memory=8MiB", "SFTPD_BUFFER_MEMORY"),
    ] {
        let (status, said) = try_serve(folder.path(), &[flag], &[]);
        assert_eq!(status, Some(2), "{flag}: {said}");
        assert!(said.contains(sentence), "{flag}: {said}");
    }
    for flag in [
        "--drain-timeout=0s",
        "--max-sessions=1",
        "--proxy-protocol=10.0.0.0/8,::1",
    ] {
        assert_eq!(try_serve(folder.path(), &[flag], &[]).0, Some(1), "{flag}");
    }
}

#[test]
fn addresses_are_accepted_in_every_usual_form() {
    let folder = folder();
    let has_ipv6 = TcpListener::bind("[::1]:0").is_ok();
    for (address, host) in [
        ("0", "127.0.0.1"),
        (":0", "127.0.0.1"),
        ("127.0.0.1:0", "127.0.0.1"),
        ("localhost:0", "localhost"),
        ("[::1]:0", "::1"),
        (":0", "::1"),
    ] {
        if host == "::1" && !has_ipv6 {
            report_skip(&format!("no IPv6: {address}"));
            continue;
        }
        let mut serve = sftpd(folder.path());
        serve
            .args(["serve", "--store", "memory:", "--metrics", address])
            .env("SFTPD_LISTEN", address);
        let server = Process::spawn(serve);
        assert!(greets_at(&server, host), "{address}");
        let bound = server.said("metrics on ").unwrap();
        let (_, port) = bound.rsplit_once(':').unwrap();
        let metrics = if host.contains(':') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        };
        assert_eq!(http_get(&metrics, "/healthz").1, "ok\n", "{address}");
        let mut demo = sftpd(folder.path());
        demo.args(["demo", "--listen", address])
            .stdout(Stdio::piped());
        let mut demo = Process::spawn(demo);
        assert!(greets_at(&demo, host), "{address}");
        let mut lines = BufReader::new(demo.child.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok);
        let shown = lines.find(|line| line.contains("sftp -P")).unwrap();
        let reachable = shown.rsplit('@').next().unwrap().trim_matches(['[', ']']);
        assert!(greets_at(&demo, reachable), "{shown}");
    }
    let unknown = ["demo", "--listen", "no-such-host.invalid:2222"];
    let (status, said) = run(sftpd(folder.path()).args(unknown));
    assert_eq!(status, Some(1));
    assert!(
        said.contains("can't listen on no-such-host.invalid:2222"),
        "{said}"
    );
}

/// On a socket for IPv6 and IPv4, a client with IPv4 has an address of another form.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_on_a_socket_for_all_addresses_is_logged_with_its_ipv4_address() {
    let folder = folder();
    let mut serve = sftpd(folder.path());
    serve.args(["serve", "--store", "memory:", "--listen", "0"]);
    let server = Process::spawn(serve);
    let address = SocketAddr::from(([127, 0, 0, 1], server.address.port()));
    let _client = Client::connect(address).await;
    eventually("the login is logged", || {
        server.logged(" alice@127.0.0.1:") > 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_drains_unless_it_is_ignored() {
    let s3 = FakeS3::start().await;
    // The tests themselves may run under nohup.
    let mut server = Process::start_after(r#"exec env --default-signal=HUP "$0" "$@""#, &s3, &[]);
    let client = server.client().await;
    let handle = client.open("/f", PUT).await.unwrap();
    server.signal("HUP");
    eventually("it drains", || server.logged("shutting down") > 0).await;
    client.write(&handle, 0, b"in time").await.unwrap();
    client.close(&handle).await.unwrap();
    assert!(server.ended().await.success());
    assert_eq!(s3.object("alice/f").as_deref(), Some(&b"in time"[..]));
    // As nohup starts it.
    let mut server = Process::start_after("trap '' HUP", &s3, &[]);
    server.signal("HUP");
    server.client().await.put("/g", b"x").await.unwrap();
    assert_eq!(server.logged("shutting down"), 0);
    server.signal("TERM");
    assert!(server.ended().await.success());
}

#[test]
fn an_invalid_log_level_is_warned_of_and_does_not_silence_the_log() {
    let folder = folder();
    for (level, warned) in [
        ("bogus", true),
        ("sftpd=bogus", true),
        ("russh=warn", true),
        ("", false),
        ("info", false),
    ] {
        let mut serve = sftpd(folder.path());
        serve
            .args(["serve", "--store", "memory:", "--listen", "127.0.0.1:0"])
            .env("RUST_LOG", level);
        let server = Process::spawn(serve);
        let warning = server.line("RUST_LOG");
        assert_eq!(
            warning
                .as_ref()
                .is_some_and(|line| line.contains("RUST_LOG=sftpd=debug")),
            warned,
            "{level}: {warning:?}"
        );
    }
    let help = sftpd(folder.path()).arg("--help").output().unwrap().stdout;
    assert!(
        String::from_utf8(help)
            .unwrap()
            .contains("RUST_LOG=sftpd=debug")
    );
}

#[test]
fn the_first_log_line_names_all_settings_but_defaults() {
    let folder = folder();
    let mut serve = sftpd(folder.path());
    serve
        .env("SFTPD_MAX_SESSIONS", "40")
        .env("SFTPD_IDLE_TIMEOUT", "30m");
    serve.args([
        "serve",
        "--store",
        "memory:",
        "--listen",
        "127.0.0.1:0",
        "--equal-parts",
    ]);
    serve.args([
        "--proxy-protocol",
        "10.0.0.1,10.1.0.0/16",
        "--metrics",
        "127.0.0.1:0",
    ]);
    serve.env("AWS_SECRET_ACCESS_KEY", "hush");
    let server = Process::spawn(serve);
    let lines = server.lines();
    let first = &lines[0];
    for part in [
        &format!("sftpd {}: ", env!("CARGO_PKG_VERSION")),
        "store memory:",
        "address 127.0.0.1:0",
        "users 1 in users.json",
        "--equal-parts=on",
        "--max-sessions=40",
        "--proxy-protocol=10.0.0.1,10.1.0.0/16",
        "--metrics=127.0.0.1:0",
    ] {
        assert!(first.contains(part), "{part}: {first}");
    }
    assert!(
        !first.contains("idle-timeout") && !first.contains("part-size"),
        "defaults: {first}"
    );
    assert!(lines.iter().all(|line| !line.contains("hush")));
    let ready = server.line("listening on ").unwrap();
    assert!(
        ready.ends_with(&format!(
            "INFO  sftpd::events] listening on {}",
            server.address
        )),
        "{ready}"
    );
}

/// Runs `serve` until it fails because its address is taken. Standard error is a file, and
/// `journal` makes of it what JOURNAL_STREAM says. Returns the content of the file.
fn log_in_file(folder: &Path, args: &[&str], journal: impl FnOnce(&File) -> String) -> String {
    let path = folder.join("journal");
    let file = File::create(&path).unwrap();
    let stream = journal(&file);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut command = sftpd(folder);
    command
        .args(["serve", "--store", "memory:", "--listen", &address])
        .args(args)
        .env("JOURNAL_STREAM", &stream)
        .stderr(file);
    assert!(!command.status().unwrap().success());
    fs::read_to_string(path).unwrap()
}

#[test]
fn log_lines_for_the_journal_have_priorities_and_no_time() {
    let folder = folder();
    let announce = |file: &File| {
        format!(
            "{}:{}",
            file.metadata().unwrap().dev(),
            file.metadata().unwrap().ino()
        )
    };
    let text = log_in_file(folder.path(), &["--max-sessions", "9000000000"], announce);
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with("<6>[INFO  sftpd] sftpd "), "{text}");
    assert!(
        lines
            .iter()
            .any(|line| line.starts_with("<4>[WARN  sftpd::cli::descriptors] ")),
        "{text}"
    );
    assert!(
        lines
            .last()
            .unwrap()
            .starts_with("<3>sftpd: can't listen on "),
        "{text}"
    );
    let text = log_in_file(folder.path(), &["--max-sessions", "0"], announce);
    assert!(
        !text.is_empty() && text.lines().all(|line| line.starts_with("<3>")),
        "{text}"
    );
    // The variable is inherited by programs whose standard error is another file.
    for stream in ["", "1:2", "x"] {
        let text = log_in_file(folder.path(), &[], |_| stream.to_owned());
        assert!(text.starts_with("[20"), "{text}");
        assert!(
            text.lines().last().unwrap().starts_with("sftpd: "),
            "{text}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_on_descriptors_is_raised_for_all_sessions_or_a_warning_is_logged() {
    let s3 = FakeS3::start().await;
    let server = Process::start_after("ulimit -Sn 60", &s3, &["--max-sessions", "200"]);
    assert!(server.max_open_files() >= 400);
    assert_eq!(server.logged("file descriptors"), 0);
    let server = Process::start_after("ulimit -n 60", &s3, &["--max-sessions", "200"]);
    assert_eq!(server.max_open_files(), 60);
    assert_eq!(
        server.logged(
            "--max-sessions 200 may need 500 file descriptors and this process may have 60"
        ),
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn without_descriptors_the_log_is_not_flooded_and_a_metric_counts() {
    const COUNTER: &str = "sftpd_refused_connections_total{reason=\"descriptors\"} ";
    let s3 = FakeS3::start().await;
    let server = Process::start_after("ulimit -n 40", &s3, &["--metrics", "127.0.0.1:0"]);
    let metrics = server.said("metrics on ").unwrap();
    let count = || {
        let text = http_get(&metrics, "/metrics").1;
        text.lines()
            .find_map(|line| line.strip_prefix(COUNTER))
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    assert_eq!(count(), 0);
    let began = Instant::now();
    let crowd: Vec<_> = (0..100)
        .map(|_| TcpStream::connect(server.address).unwrap())
        .collect();
    eventually("no descriptor is left", || {
        server.logged("can't accept a connection") > 0
    })
    .await;
    // Five tries a second go on meanwhile.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let lines = server.logged("can't accept a connection");
    let minutes = began.elapsed().as_secs() / 60;
    assert!(
        lines as u64 <= 1 + minutes,
        "{lines} lines in {:?}",
        began.elapsed()
    );
    drop(crowd);
    eventually("connections are accepted again", || {
        std::panic::catch_unwind(count).is_ok_and(|count| count > 1)
    })
    .await;
}

#[test]
fn help_fits_a_terminal() {
    let folder = folder();
    for args in [
        &["--help"][..],
        &["serve", "--help"],
        &["doctor", "--help"],
        &["users", "add", "--help"],
    ] {
        let output = sftpd(folder.path()).args(args).output().unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        let longest = help.lines().max_by_key(|line| line.chars().count());
        assert!(
            longest.unwrap().chars().count() <= 100,
            "{args:?}: {longest:?}"
        );
    }
}

/// A pipe whose reader has gone, and a full disk.
#[test]
fn a_lost_standard_output_is_an_error_and_no_panic() {
    let folder = folder();
    for args in [
        &["doctor", "--store", "memory:", "--listen", "127.0.0.1:0"][..],
        &[
            "doctor",
            "--json",
            "--store",
            "memory:",
            "--listen",
            "127.0.0.1:0",
        ],
        &["demo", "--listen", "127.0.0.1:0"],
        &["users", "list"],
    ] {
        let (reader, closed) = std::io::pipe().unwrap();
        drop(reader);
        let full = File::options().write(true).open("/dev/full").unwrap();
        for stdout in [Stdio::from(closed), Stdio::from(full)] {
            let (status, said) = run(sftpd(folder.path()).args(args).stdout(stdout));
            assert_eq!(status, Some(1), "{args:?}: {said}");
            assert!(
                said.contains("can't write to standard output") && !said.contains("panicked"),
                "{args:?}: {said}"
            );
        }
    }
}

#[test]
fn a_port_that_is_taken_comes_with_the_next_step() {
    let folder = folder();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let advice = format!("ss -ltnp 'sport = :{}'", address.port());
    let serve = [
        "serve",
        "--store",
        "memory:",
        "--listen",
        &address.to_string(),
    ];
    let (status, said) = run(sftpd(folder.path()).args(serve));
    assert!(
        status == Some(1) && said.contains(&advice) && said.contains("--listen"),
        "{said}"
    );
    let demo = ["demo", "--listen", &address.to_string()];
    let (status, said) = run(sftpd(folder.path()).args(demo));
    assert!(
        status == Some(1) && said.contains(&advice) && said.contains("--listen"),
        "{said}"
    );
}

#[test]
fn completions_and_the_manual_cover_every_command() {
    let folder = folder();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let output = sftpd(folder.path())
            .args(["completions", shell])
            .output()
            .unwrap();
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success());
        assert!(
            ["serve", "doctor", "demo", "users", "buffer-memory"]
                .iter()
                .all(|word| script.contains(word)),
            "{shell}"
        );
    }
    let output = sftpd(folder.path())
        .env("SFTPD_STORE", "s3://not-in-the-manual")
        .arg("man")
        .output()
        .unwrap();
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && page.contains(".TH sftpd 1"),
        "{page}"
    );
    for text in [
        "SFTPD SERVE",
        "SFTPD DOCTOR",
        "SFTPD DEMO",
        "SFTPD USERS ADD",
        "SFTPD USERS REMOVE",
        "SFTPD_STORE",
    ] {
        assert!(page.contains(text), "{text}");
    }
    for name in variables(folder.path(), "serve") {
        assert!(page.contains(&name), "{name}");
    }
    assert!(!page.contains("not-in-the-manual"));
}

/// Needs no build and no server.
#[test]
fn manage_users_prints_help_and_usage_errors() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("manage-users");
    fs::copy(
        concat!(env!("CARGO_MANIFEST_DIR"), "/manage-users"),
        &script,
    )
    .unwrap();
    let manage_users = |args: &[&str]| {
        let output = Command::new(&script)
            .args(args)
            .env("PATH", "/usr/bin:/bin")
            .env_remove("SFTPD")
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8([output.stdout, output.stderr].concat()).unwrap(),
        )
    };
    let (status, said) = manage_users(&["--help"]);
    assert_eq!(status, Some(0), "{said}");
    assert!(
        said.contains("--host") && !said.contains("set -eu"),
        "{said}"
    );
    let (status, said) = manage_users(&["--host"]);
    assert_eq!(status, Some(2), "{said}");
}
