//! What operators see: `sftpd doctor`, metrics and health, systemd's notifications, load balancers,
//! and directories that survive a restart.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use russh_sftp::protocol::FileAttributes;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use std::os::unix::{fs::PermissionsExt, net::UnixDatagram};
use std::process::{Command, Stdio};
use std::time::Duration;
use support::commands::report_skip;
use support::process::{Process, sftpd_on};
use support::s3::{FakeS3, Fault, When};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB9dG4kjRhQTtWTVzd2t27+t0DEHBPW7iOD23TUiYLio alice@example.com";

/// Runs `sftpd doctor --json`: its exit status, and the grade and text of each check. Each check is
/// there once.
async fn doctor(s3: &FakeS3, args: &[&str]) -> (i32, BTreeMap<String, (String, String)>) {
    let folder = tempfile::tempdir().unwrap();
    let users = serde_json::json!({"users": {"alice": {"keys": [KEY]}}});
    let file = folder.path().join("users.json");
    std::fs::write(&file, users.to_string()).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut command = sftpd_on(s3, folder.path());
    command
        .args(["doctor", "--json", "--listen", "127.0.0.1:0"])
        .args(args);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["healthy"], output.status.success());
    let mut found = BTreeMap::new();
    for finding in report["findings"].as_array().unwrap() {
        let [check, grade, text] =
            ["check", "grade", "text"].map(|field| finding[field].as_str().unwrap().to_owned());
        assert!(!text.contains("README"), "{text}");
        assert!(found.insert(check, (grade, text)).is_none(), "{report}");
    }
    (output.status.code().unwrap(), found)
}

/// The checks that are not ok, with their grades.
fn troubles(found: &BTreeMap<String, (String, String)>) -> Vec<(&str, &str)> {
    found
        .iter()
        .filter(|(_, (grade, _))| grade != "ok")
        .map(|(check, (grade, _))| (&check[..], &grade[..]))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_finds_nothing_wrong_and_leaves_nothing_behind() {
    let s3 = FakeS3::start().await;
    let (status, found) = doctor(&s3, &[]).await;
    assert_eq!((status, troubles(&found)), (0, vec![]), "{found:?}");
    assert!(found["credentials"].1.contains(s3::ACCESS_KEY), "{found:?}");
    assert!(
        found
            .values()
            .all(|(_, text)| !text.contains(s3::SECRET_KEY))
    );
    assert_eq!((s3.objects(), s3.uploads()), (vec![], 0));
}

/// A policy that lacks an action: the check says what is missing, and doctor leaves nothing that it
/// can remove.
#[tokio::test(flavor = "multi_thread")]
async fn doctor_reports_each_missing_permission() {
    let failed = [
        ("PutObject", "put"),
        ("CreateMultipartUpload", "multipart"),
        ("UploadPart", "multipart"),
        ("CompleteMultipartUpload", "multipart"),
        ("AbortMultipartUpload", "abort"),
    ];
    let warned = [
        ("ListObjectsV2", "list"),
        ("HeadObject", "head"),
        ("GetObject", "get"),
        ("CopyObject", "copy"),
        ("UploadPartCopy", "copy of parts"),
        ("DeleteObject", "delete"),
        ("ListMultipartUploads", "clean-up"),
        ("GetBucketLifecycleConfiguration", "lifecycle"),
    ];
    let failed = failed.map(|(operation, check)| (operation, check, "failed"));
    for (operation, check, grade) in failed
        .into_iter()
        .chain(warned.map(|(op, check)| (op, check, "warning")))
    {
        let s3 = FakeS3::start().await;
        s3.fault(operation, When::Every, Fault::Status(403, "AccessDenied"));
        let (status, found) = doctor(&s3, &[]).await;
        assert_eq!(found[check].0, grade, "{operation}: {found:?}");
        assert!(
            found[check].1.contains("AccessDenied") || found[check].1.contains("403"),
            "{operation}: {found:?}"
        );
        assert_eq!(
            status,
            i32::from(grade == "failed"),
            "{operation}: {found:?}"
        );
        let removable = !matches!(operation, "DeleteObject" | "AbortMultipartUpload");
        assert_eq!(
            (s3.objects().is_empty(), s3.uploads() == 0),
            (
                removable || operation != "DeleteObject",
                removable || operation == "DeleteObject"
            ),
            "{operation}: {:?}",
            s3.objects()
        );
        if operation == "DeleteObject" {
            let said = format!("{} {}", found["delete"].1, found["delete of parts"].1);
            let named = s3.objects().iter().all(|key| said.contains(key));
            assert!(named, "{found:?} {:?}", s3.objects());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_says_what_to_do() {
    let s3 = FakeS3::start().await;
    let (status, found) = doctor(&s3, &["--store", "s3://elsewhere"]).await;
    assert_eq!((status, &*found["list"].0), (1, "failed"));
    assert!(
        found["list"].1.contains("no bucket \"elsewhere\""),
        "{found:?}"
    );
    let (status, found) = doctor(&s3, &["--users", "nobody.json"]).await;
    assert_eq!((status, &*found["users"].0), (1, "failed"), "{found:?}");
    s3.fault(
        "ListObjectsV2",
        When::Every,
        Fault::Status(403, "RequestTimeTooSkewed"),
    );
    let (_, found) = doctor(&s3, &[]).await;
    assert!(found["list"].1.contains("clock is wrong"), "{found:?}");
    s3.clear_faults();
    s3.fault(
        "PutObject",
        When::Every,
        Fault::Status(403, "RequestTimeTooSkewed"),
    );
    let (_, found) = doctor(&s3, &[]).await;
    assert!(
        found["put"].1.contains("set this machine's clock"),
        "{found:?}"
    );
    s3.clear_faults();
    let (status, found) = doctor(&s3, &["--store", "memory:"]).await;
    assert_eq!((status, troubles(&found)), (0, vec![("store", "warning")]));
}

/// The setting that turns checksums off is named only if an error is about checksums.
#[tokio::test(flavor = "multi_thread")]
async fn doctor_names_the_checksum_setting_where_it_can_help() {
    const SETTING: &str = "AWS_REQUEST_CHECKSUM_CALCULATION";
    for (status, code, helps) in [
        (400, "XAmzContentChecksumMismatch", true),
        (501, "NotImplemented", true),
        (400, "EntityTooLarge", false),
    ] {
        let s3 = FakeS3::start().await;
        s3.fault("PutObject", When::Every, Fault::Status(status, code));
        let (exit, found) = doctor(&s3, &[]).await;
        assert_eq!(
            (exit, found["put"].1.contains(SETTING)),
            (1, helps),
            "{found:?}"
        );
        assert!(
            found
                .iter()
                .all(|(check, (_, text))| check == "put" || !text.contains(SETTING)),
            "{found:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_tries_to_listen_on_the_addresses() {
    let s3 = FakeS3::start().await;
    let running = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken = running.local_addr().unwrap().to_string();
    let (status, found) = doctor(&s3, &["--metrics", &taken]).await;
    assert_eq!(
        (status, troubles(&found)),
        (0, vec![("metrics address", "warning")]),
        "{found:?}"
    );
    // TEST-NET-1: no machine has it.
    let (status, found) = doctor(&s3, &["--metrics", "192.0.2.1:0"]).await;
    assert_eq!(
        (status, troubles(&found)),
        (1, vec![("metrics address", "failed")]),
        "{found:?}"
    );
    assert!(
        found["metrics address"].1.contains("--metrics"),
        "{found:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_finds_a_store_that_ignores_if_match() {
    let s3 = FakeS3::start().await;
    s3.ignore_if_match();
    let (status, found) = doctor(&s3, &[]).await;
    assert_eq!(
        (status, troubles(&found)),
        (0, vec![("conditional get", "warning")]),
        "{found:?}"
    );
    assert_eq!(s3.objects(), [] as [&str; 0]);
}

/// The report ends with what it comes to.
#[tokio::test(flavor = "multi_thread")]
async fn doctor_ends_with_a_verdict() {
    let s3 = FakeS3::start().await;
    let folder = tempfile::tempdir().unwrap();
    let report = |args: &[&str]| {
        let mut command = sftpd_on(&s3, folder.path());
        command
            .args(["doctor", "--listen", "127.0.0.1:0"])
            .args(args);
        tokio::task::spawn_blocking(move || {
            let output = command.output().unwrap();
            let report = String::from_utf8(output.stdout).unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            (output.status.code(), report, said)
        })
    };
    let (status, _, said) = report(&[]).await.unwrap();
    assert_eq!(status, Some(1));
    assert!(said.ends_with("1 check failed, no warnings\n"), "{said}");
    let users = folder.path().join("users.json");
    std::fs::write(&users, r#"{"users": {}}"#).unwrap();
    std::fs::set_permissions(&users, std::fs::Permissions::from_mode(0o600)).unwrap();
    let (status, report, _) = report(&[]).await.unwrap();
    assert_eq!(status, Some(0));
    let verdict = report.lines().last().unwrap();
    assert_eq!(verdict, "no check failed, 1 warning");
}

/// Objects made to try out conditions are doctor's too: their names are in its help, and those that
/// stay in its report.
#[tokio::test(flavor = "multi_thread")]
async fn doctor_reports_every_object_that_stays() {
    let s3 = FakeS3::start().await;
    // The first is for an object that isn't there yet: whether DELETE is allowed.
    s3.fault(
        "DeleteObject",
        When::From(2),
        Fault::Status(403, "AccessDenied"),
    );
    let (_, found) = doctor(&s3, &[]).await;
    let help = Command::new(env!("CARGO_BIN_EXE_sftpd"))
        .args(["doctor", "--help"])
        .output()
        .unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    for kind in [".sftpd-doctor-", ".sftpd-probe-"] {
        assert!(help.contains(kind), "{kind}: {help}");
        let left: Vec<String> = s3.objects();
        let mut left = left.iter().filter(|key| key.starts_with(kind)).peekable();
        assert!(left.peek().is_some(), "{kind}");
        for key in left {
            let is_reported = found.values().any(|(_, text)| text.contains(key.as_str()));
            assert!(is_reported, "{key}: {found:?}");
        }
    }
}

/// libtest captures what passing tests print.
#[test]
fn a_skipped_test_says_so_on_the_real_standard_error() {
    let tests = std::env::current_exe().unwrap();
    let output = Command::new(tests)
        .args(["--exact", "alerts_fire_when_they_should"])
        .env("PATH", "/nonexistent")
        .env_remove("SFTPD_TEST_ALL_CLIENTS")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success());
    assert!(
        said.contains("skipped: alerts_fire_when_they_should: not installed: promtool"),
        "{said}"
    );
}

/// A store that can't be opened is reported by its own check.
#[tokio::test(flavor = "multi_thread")]
async fn doctor_reports_settings_that_serve_refuses() {
    let s3 = FakeS3::start().await;
    let (status, found) = doctor(&s3, &["--store", "s3://my bucket"]).await;
    assert_eq!(
        (status, troubles(&found)),
        (1, vec![("settings", "failed")]),
        "{found:?}"
    );
}

/// The samples of a metrics page, by name and labels.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let lines = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.into(), value.parse().unwrap()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_logins_transfers_and_requests() {
    let s3 = FakeS3::start().await;
    let server = Process::start(&s3, &["--metrics", "127.0.0.1:0", "--max-sessions", "40"]);
    let address = server.said("metrics on ").unwrap();
    let client = server.client().await;
    assert!(
        Client::login(server.address, "alice", "wrong")
            .await
            .is_none()
    );
    client.put("/small", &noise(1000, 1)).await.unwrap();
    client.put("/large", &noise(6 * MIB, 2)).await.unwrap();
    client.get("/small").await.unwrap();
    s3.fault("PutObject", When::Every, Fault::Status(403, "AccessDenied"));
    client.put("/refused", b"x").await.unwrap_err();
    s3.clear_faults();
    s3.fault("UploadPart", When::Nth(1), Fault::Status(503, "SlowDown"));
    let open = client.open("/open", PUT).await.unwrap();
    client.write(&open, 0, &noise(100_000, 1)).await.unwrap();
    let cut = server.client().await;
    let handle = cut.open("/cut", PUT).await.unwrap();
    cut.write(&handle, 0, b"0123456789").await.unwrap();
    drop(cut);
    let wanted = [
        ("sftpd_build_info{version=\"0.1.0\"}", 1.0),
        ("sftpd_connections", 1.0),
        ("sftpd_max_sessions", 40.0),
        ("sftpd_sessions", 1.0),
        (
            "sftpd_logins_total{method=\"password\",result=\"accepted\"}",
            2.0,
        ),
        (
            "sftpd_logins_total{method=\"password\",result=\"refused\"}",
            1.0,
        ),
        (
            "sftpd_transfers_total{direction=\"upload\",result=\"ok\"}",
            2.0,
        ),
        (
            "sftpd_transfers_total{direction=\"upload\",result=\"failed\"}",
            1.0,
        ),
        (
            "sftpd_transfers_total{direction=\"upload\",result=\"cut_off\"}",
            1.0,
        ),
        (
            "sftpd_transfers_total{direction=\"download\",result=\"ok\"}",
            1.0,
        ),
        (
            "sftpd_transferred_bytes_total{direction=\"upload\",result=\"ok\"}",
            (1000 + 6 * MIB) as f64,
        ),
        (
            "sftpd_transferred_bytes_total{direction=\"upload\",result=\"cut_off\"}",
            10.0,
        ),
        (
            "sftpd_transferred_bytes_total{direction=\"download\",result=\"ok\"}",
            1000.0,
        ),
        // The second numbers are requests of the start, which finds out which conditions the store
        // keeps.
        (
            "sftpd_s3_request_duration_seconds_count{operation=\"PutObject\",result=\"ok\"}",
            1.0 + 1.0,
        ),
        (
            "sftpd_s3_request_duration_seconds_count{operation=\"PutObject\",result=\"refused\"}",
            2.0 + 1.0,
        ),
        (
            "sftpd_s3_request_duration_seconds_count{operation=\"UploadPart\",result=\"ok\"}",
            2.0 + 2.0,
        ),
        (
            "sftpd_s3_request_duration_seconds_count{operation=\"CompleteMultipartUpload\",result=\"ok\"}",
            1.0,
        ),
        (
            "sftpd_logins_total{method=\"password\",result=\"unheard\"}",
            0.0,
        ),
        ("sftpd_aborted_uploads_total{result=\"left\"}", 0.0),
        ("sftpd_buffer_memory_limit_bytes", (256 * MIB) as f64),
        ("sftpd_open_uploads", 1.0),
        ("sftpd_users_file_ok", 1.0),
    ];
    let mut text = String::new();
    for _ in 0..1000 {
        text = http_get(&address, "/metrics").1;
        let found = samples(&text);
        // The server may not have noticed yet that a client has gone.
        if found["sftpd_transfers_total{direction=\"upload\",result=\"cut_off\"}"] > 0.0
            && found["sftpd_connections"] < 2.0
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let found = samples(&text);
    for (name, value) in wanted {
        assert_eq!(found.get(name), Some(&value), "{name} in\n{text}");
    }
    // The bucket of the histogram that holds all requests.
    assert!(
        text.contains("sftpd_s3_request_duration_seconds_bucket{operation=\"PutObject\",result=\"ok\",le=\"+Inf\"} 2")
    );
    for name in found.keys().map(|name| name.split('{').next().unwrap()) {
        let base = name
            .trim_end_matches("_bucket")
            .trim_end_matches("_sum")
            .trim_end_matches("_count");
        assert!(
            text.contains(&format!("# HELP {base} ")) && text.contains(&format!("# TYPE {base} ")),
            "{name}"
        );
    }
    promtool(&["check", "metrics"], &text);
}

/// Checks something with Prometheus' own tool, if it is installed.
fn promtool(args: &[&str], input: &str) {
    let mut command = Command::new("promtool");
    let command = command
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            assert!(
                std::env::var_os("SFTPD_TEST_ALL_CLIENTS").is_none(),
                "not installed: promtool"
            );
            return report_skip("not installed: promtool");
        }
        child => child.unwrap(),
    };
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{args:?}: {output:?}"
    );
}

/// Each alert fires when it should, and none on a normal day.
#[test]
fn alerts_fire_when_they_should() {
    let contrib = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib");
    promtool(&["check", "rules", &format!("{contrib}/alerts.yml")], "");
    promtool(
        &["test", "rules", &format!("{contrib}/alerts_test.yml")],
        "",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_metrics_show_draining_and_a_broken_users_file() {
    let s3 = FakeS3::start().await;
    let mut server = Process::start(&s3, &["--metrics", "127.0.0.1:0"]);
    let address = server.said("metrics on ").unwrap();
    assert_eq!(
        http_get(&address, "/healthz"),
        ("HTTP/1.1 200 OK".into(), "ok\n".into())
    );
    assert_eq!(http_get(&address, "/").0, "HTTP/1.1 404 Not Found");
    std::fs::write(server.folder().join("users.json"), "{").unwrap();
    // Without a login.
    eventually("the file is found to be broken", || {
        server.logged("the users of the last good file stay in force") > 0
    })
    .await;
    assert_eq!(
        samples(&http_get(&address, "/metrics").1)["sftpd_users_file_ok"],
        0.0
    );
    let client = server.client().await;
    let handle = client.open("/f", PUT).await.unwrap();
    server.signal("TERM");
    eventually("the server is unhealthy", || {
        http_get(&address, "/healthz").0 == "HTTP/1.1 503 Service Unavailable"
    })
    .await;
    client.write(&handle, 0, b"in time").await.unwrap();
    client.close(&handle).await.unwrap();
    assert!(server.ended().await.success());
    assert_eq!(s3.object("alice/f").as_deref(), Some(&b"in time"[..]));
}

/// The metrics that alerts and dashboard name must exist: an alert with a misspelt name never
/// fires.
#[tokio::test(flavor = "multi_thread")]
async fn alerts_and_dashboard_name_existing_metrics() {
    let source = include_str!("../src/metrics.rs");
    let names: Vec<_> = source
        .split('"')
        .filter(|text| text.starts_with("sftpd_"))
        .collect();
    assert!(names.len() > 10);
    for (file, text) in [
        ("alerts.yml", include_str!("../contrib/alerts.yml")),
        ("dashboard.json", include_str!("../contrib/dashboard.json")),
    ] {
        let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
        let asked: Vec<_> = text
            .split(word)
            .filter(|word| word.starts_with("sftpd_"))
            .collect();
        assert!(!asked.is_empty());
        for name in asked {
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| name.strip_suffix(end))
                .unwrap_or(name);
            assert!(
                names.contains(&name) || names.contains(&base),
                "{file}: {name}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_notified_when_the_server_is_ready_alive_and_stopping() {
    let s3 = FakeS3::start().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let heard = || {
        let mut buffer = [0; 100];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).trim().to_owned()
    };
    let setting = format!(
        "export NOTIFY_SOCKET={} WATCHDOG_USEC=300000",
        path.display()
    );
    let mut server = Process::start_after(&setting, &s3, &[]);
    assert_eq!(
        [heard(), heard(), heard()],
        ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]
    );
    server.signal("TERM");
    while heard() != "STOPPING=1" {}
    assert!(server.ended().await.success());
}

/// Connects as a load balancer does, with a header first. Returns the beginning of what the server
/// sends.
async fn connect_with_header(server: &Server, header: &[u8]) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    // The server may have hung up already.
    let _ = stream
        .write_all(&[header, b"SSH-2.0-test\r\n"].concat())
        .await;
    let mut banner = vec![0; 10];
    let length = stream.read(&mut banner).await.unwrap_or(0);
    (
        stream,
        String::from_utf8_lossy(&banner[..length]).into_owned(),
    )
}

/// A header of version 1 that names a client.
fn header_for(client: &str) -> Vec<u8> {
    format!("PROXY TCP4 {client} 127.0.0.1 40000 22\r\n").into_bytes()
}

/// A header of version 2, with a field behind the addresses.
fn binary_header_for(client: SocketAddr) -> Vec<u8> {
    let SocketAddr::V4(client) = client else {
        panic!("not IPv4")
    };
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x10".to_vec();
    header.extend(client.ip().octets());
    header.extend([127, 0, 0, 1]);
    header.extend(client.port().to_be_bytes());
    header.extend([0, 22]);
    header.extend([4, 0, 1, 0]);
    header
}

/// A server that expects load balancers in these networks.
async fn server_behind(networks: &[&str], max_sessions: usize) -> Server {
    let store = std::sync::Arc::new(sftpd::store::memory::MemoryStore::default());
    let proxies = networks.iter().map(|network| network.parse().unwrap());
    Server::with(store, |builder| {
        builder.proxies(proxies).max_sessions(max_sessions)
    })
    .await
}

/// Whether the server has left the connection open. Discards what it has sent.
fn is_open(stream: &TcpStream) -> bool {
    loop {
        match stream.try_read(&mut [0; 4096]) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_apply_to_the_client_that_a_proxy_header_names() {
    let server = server_behind(&["127.0.0.0/8"], 40).await;
    let mut open = Vec::new();
    let mut admitted = 0;
    // One address may have ten connections without a login. The others are refused with a message.
    for n in 0..12 {
        let header = if n % 2 == 0 {
            header_for("192.0.2.1")
        } else {
            binary_header_for("192.0.2.1:40000".parse().unwrap())
        };
        let (stream, banner) = connect_with_header(&server, &header).await;
        match banner.as_str() {
            "SSH-2.0-sf" => admitted += 1,
            refused => assert_eq!(refused, "This serve"),
        }
        open.push(stream);
    }
    // A connection that has waited for long gives way to the next: on a slow machine that may have
    // happened here.
    assert!(admitted >= 10);
    eventually("ten are left", || {
        open.retain(is_open);
        open.len() <= 10
    })
    .await;
    assert_eq!(
        connect_with_header(&server, &header_for("192.0.2.2"))
            .await
            .1,
        "SSH-2.0-sf"
    );
    assert_eq!(
        connect_with_header(&server, b"PROXY UNKNOWN\r\n").await.1,
        "SSH-2.0-sf"
    );
    // The load balancer's own health check.
    assert_eq!(
        connect_with_header(&server, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0")
            .await
            .1,
        "SSH-2.0-sf"
    );
    drop(open);
}

#[tokio::test(flavor = "multi_thread")]
async fn proxy_headers_are_required_from_load_balancers_and_refused_from_others() {
    let server = server_behind(&["127.0.0.1/32"], 40).await;
    let long = [
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff".as_slice(),
        &[0; 5000],
    ]
    .concat();
    for header in [
        &b""[..],
        b"PROXY TCP4 x y 1 2\r\n",
        b"PROXY ",
        &[b'P'; 200],
        b"\r\n\r\n\0\r\nQUIT\n\xff\xff\0\0",
        &long,
    ] {
        assert_eq!(
            connect_with_header(&server, header).await.1,
            "",
            "{:?}",
            String::from_utf8_lossy(header)
        );
    }
    // From any other address a header is not SSH.
    let server = server_behind(&["192.0.2.0/24"], 40).await;
    assert_eq!(connect_with_header(&server, b"").await.1, "SSH-2.0-sf");
    server.client().await.put("/f", b"x").await.unwrap();
    let mut out = Vec::new();
    let (mut stream, _) = connect_with_header(&server, &header_for("192.0.2.1")).await;
    stream.read_to_end(&mut out).await.ok();
    assert!(
        !String::from_utf8_lossy(&out).contains("ssh-ed25519"),
        "no key exchange after a header"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_with_markers_are_seen_by_every_gateway_and_after_a_restart() {
    let s3 = FakeS3::start().await;
    let gateway = || Server::with(s3_store(&s3), |builder| builder.dir_markers(true));
    let (one, two) = (gateway().await, gateway().await);
    let (a, b) = (one.client().await, two.client().await);
    a.mkdir("/d").await.unwrap();
    assert_eq!(s3.snapshot()["alice/d/"], "");
    assert!(b.is_dir("/d").await.unwrap() && b.list("/").await.unwrap().contains(&"d/".to_owned()));
    assert!(b.mkdir("/d").await.is_err(), "a taken name");
    b.put("/d/sub/f", b"x").await.unwrap();
    a.sftp.remove("/d/sub/f").await.unwrap();
    assert!(
        b.is_dir("/d/sub").await.unwrap(),
        "it stays when its last file goes"
    );
    // No marker is made where another file is left.
    b.put("/e/f", b"x").await.unwrap();
    b.put("/e/g", b"x").await.unwrap();
    a.sftp.remove("/e/f").await.unwrap();
    assert_eq!(s3.objects(), ["alice/d/", "alice/d/sub/", "alice/e/g"]);
    a.sftp.rename("/d", "/moved").await.unwrap();
    assert!(b.is_dir("/moved/sub").await.unwrap() && b.is_dir("/d").await.is_err());
    b.sftp.rmdir("/moved/sub").await.unwrap();
    let restarted = gateway().await;
    let after = restarted.client().await;
    assert!(after.is_dir("/moved").await.unwrap() && after.is_dir("/moved/sub").await.is_err());
    after.sftp.rmdir("/moved").await.unwrap();
    assert!(
        a.is_dir("/moved").await.is_err(),
        "the gateway that made it does not remember it either"
    );
    assert_eq!(s3.objects(), ["alice/e/g"]);
}

/// One line for each request that changes something or fails: who, what, and how it ended.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_change_something_or_fail_are_logged_in_one_line() {
    let s3 = FakeS3::start().await;
    let process = Process::start(&s3, &[]);
    let client = process.client().await;
    client.put("/f", b"x").await.unwrap();
    client.mkdir("/d").await.unwrap();
    client.sftp.rename("/f", "/d/g").await.unwrap();
    client.posix_rename("/d/g", "/h").await.unwrap();
    client
        .sftp
        .setstat(
            "/h",
            FileAttributes {
                size: Some(0),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    client.sftp.remove("/h").await.unwrap();
    client.sftp.rmdir("/d").await.unwrap();
    client.size("/none").await.unwrap_err();
    client.get("/none").await.unwrap_err();
    client.list("/none").await.unwrap_err();
    client
        .sftp
        .remove(format!("/{}", "long".repeat(1000)))
        .await
        .unwrap_err();
    (0..1001).for_each(|n| s3.put(&format!("alice/many/{n:04}"), ""));
    s3.fault(
        "ListObjectsV2",
        When::Nth(2),
        Fault::Status(403, "AccessDenied"),
    );
    client.list("/many").await.unwrap_err();
    s3.fault(
        "DeleteObject",
        When::Every,
        Fault::Status(403, "AccessDenied"),
    );
    client.put("/kept", b"x").await.unwrap();
    client.sftp.remove("/kept").await.unwrap_err();
    let channel = client.ssh.channel().await.unwrap();
    channel.exec(true, "scp -t .").await.unwrap();
    eventually("the last line", || {
        process.logged("refused the command \"scp -t .\"") == 1
    })
    .await;
    let lines = [
        ": put \"/f\" 1 bytes",
        ": mkdir \"/d\"",
        ": rename \"/f\" to \"/d/g\"",
        ": rename \"/d/g\" to \"/h\"",
        ": set size 0 of \"/h\"",
        ": remove \"/h\"",
        ": rmdir \"/d\"",
        ": open \"/none\" failed: No such file",
        ": list \"/none\" failed: No such file",
        ": list \"/many\" failed: Permission denied: the store refused access: AccessDenied: Set by the test",
        "\" failed: Failure: File name too long",
        ": remove \"/kept\" failed: Permission denied: the store refused access: AccessDenied: Set by the test",
    ];
    for line in lines {
        assert_eq!(process.logged(line), 1, "{line}");
    }
    assert_eq!(
        process.logged(": stat "),
        0,
        "clients often ask whether a name is free"
    );
}
