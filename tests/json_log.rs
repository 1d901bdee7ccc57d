//! The log in JSON: every line of a real server is as the tables of docs/events.md say, and every
//! event in them comes.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use russh::{Preferred, kex};
use russh_sftp::protocol::FileAttributes;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use support::commands::{Ran, are_installed};
use support::process::{Process, add_user, sftpd_on};
use support::s3::{FakeS3, Fault, When};
use support::{Client, MIB, PASSWORD, PUT, SshClient, eventually};

/// What a field may hold, in the words of the page: a type, or its only values.
#[derive(Clone, Debug)]
struct Kind(String);

impl Kind {
    fn allows(&self, value: &Value) -> bool {
        match self.0.as_str() {
            "string" => value.is_string(),
            "string or null" => value.is_string() || value.is_null(),
            "array of strings" => value
                .as_array()
                .is_some_and(|values| values.iter().all(Value::is_string)),
            "number" => value.is_number(),
            "number or null" => value.is_number() || value.is_null(),
            "boolean" => value.is_boolean(),
            values if values.starts_with('`') => {
                let text = value.as_str().unwrap_or("a value that is no text");
                values.split(", ").any(|known| known == format!("`{text}`"))
            }
            unknown => panic!("docs/events.md has a field of the type {unknown:?}"),
        }
    }
}

type Fields = BTreeMap<String, Kind>;

/// An event of the page.
#[derive(Debug, Default)]
struct Documented {
    levels: Vec<String>,
    fields: Fields,
}

/// The tables of docs/events.md.
#[derive(Debug)]
struct Page {
    /// Fields of every line, of lines that are no events, and of events.
    common: Vec<Fields>,
    events: BTreeMap<String, Documented>,
}

fn cells(row: &str) -> Vec<&str> {
    let row = row.trim_start_matches('|').trim_end_matches('|');
    row.split('|').map(str::trim).collect()
}

fn name(cell: &str) -> Option<String> {
    let name = cell.strip_prefix('`')?.strip_suffix('`')?;
    Some(name.to_owned())
}

fn read_page(text: &str) -> Page {
    let mut page = Page {
        common: Vec::new(),
        events: BTreeMap::new(),
    };
    let mut event = String::new();
    for row in text.lines().filter(|line| line.starts_with('|')) {
        match cells(row).as_slice() {
            ["field", "type", ""] => page.common.push(Fields::new()),
            [field, kind, _] => {
                if let Some(field) = name(field) {
                    let fields = page.common.last_mut().unwrap();
                    fields.insert(field, Kind((*kind).to_owned()));
                }
            }
            ["", field, kind, _] => {
                let documented = page.events.get_mut(&event).unwrap();
                let kind = Kind((*kind).to_owned());
                documented.fields.insert(name(field).unwrap(), kind);
            }
            [first, "", levels, _] => {
                event = name(first).unwrap();
                let levels = levels.split(", ").map(str::to_owned).collect();
                let documented = Documented {
                    levels,
                    fields: Fields::new(),
                };
                page.events.insert(event.clone(), documented);
            }
            _ => {}
        }
    }
    page
}

impl Page {
    /// Checks a line. Returns its event, or what is wrong.
    fn check(&self, line: &str) -> Result<String, String> {
        let object: Map<String, Value> = match serde_json::from_str(line) {
            Ok(object) => object,
            Err(error) => return Err(format!("no JSON object: {error}")),
        };
        let event = object.get("event").and_then(Value::as_str);
        let event = event.ok_or("no event")?.to_owned();
        let mut expected = self.common[0].clone();
        if event == "log" {
            expected.extend(self.common[1].clone());
        } else {
            let documented = self.events.get(&event);
            let documented = documented.ok_or(format!("unknown event {event}"))?;
            let level = object.get("level").and_then(Value::as_str);
            let level = level.unwrap_or_default().to_owned();
            if !documented.levels.contains(&level) {
                return Err(format!("{event} has the level {level}"));
            }
            expected.extend(self.common[2].clone());
            expected.extend(documented.fields.clone());
        }
        for (field, value) in &object {
            let kind = expected.remove(field);
            let kind = kind.ok_or(format!("{event} has an unknown field {field}"))?;
            if !kind.allows(value) {
                return Err(format!("{event} has {field} = {value}, not {kind:?}"));
            }
        }
        match expected.keys().next() {
            Some(missing) => Err(format!("{event} has no {missing}")),
            None => Ok(event),
        }
    }
}

fn page() -> Page {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/events.md");
    read_page(&fs::read_to_string(path).unwrap())
}

/// A server that logs all events in JSON.
fn start(s3: &FakeS3, folder: &Path, args: &[&str]) -> Process {
    let mut command = sftpd_on(s3, folder);
    command
        .args(["serve", "--listen", "127.0.0.1:0", "--log-format", "json"])
        .args(args)
        .env("RUST_LOG", "sftpd=debug");
    Process::spawn(command)
}

/// Runs OpenSSH's `sftp` with the key in the folder.
fn run_sftp(folder: &Path, server: &Process, batch: &str) {
    let mut sftp = Command::new("sftp");
    sftp.current_dir(folder)
        .args(["-F", "none", "-i", "id", "-P"])
        .arg(server.address.port().to_string())
        .args(["-o", "StrictHostKeyChecking=no", "-o", "BatchMode=yes"])
        .args(["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"])
        .args(["-b", "-", "alice@127.0.0.1"]);
    let ran = Ran::new(&mut sftp, batch);
    assert!(ran.succeeded(), "{ran}");
}

/// Leaves an upload, of which a part is stored, by closing the connection.
async fn abandon_upload(s3: &FakeS3, server: &Process, path: &str) {
    let client = server.client().await;
    let handle = client.open(path, PUT).await.unwrap();
    client.write(&handle, 0, &vec![1; 6 * MIB]).await.unwrap();
    eventually("the part is stored", || s3.parts() == 1).await;
}

async fn wait_for(server: &Process, event: &str) {
    let text = format!("\"event\":\"{event}\"");
    eventually(event, || server.logged(&text) > 0).await;
}

/// What no `sftp` sends.
async fn do_what_sftp_does_not(server: &Process) {
    let wrong = Client::login(server.address, "alice", "wrong").await;
    assert!(wrong.is_none());
    let old = russh::client::Config {
        preferred: Preferred {
            kex: Cow::Borrowed(&[kex::DH_G14_SHA256]),
            ..Preferred::DEFAULT
        },
        ..russh::client::Config::default()
    };
    let stream = tokio::net::TcpStream::connect(server.address).await;
    let connected = SshClient::over(stream.unwrap(), old).await;
    assert!(connected.is_err());
    let client = server.client().await;
    client.put("/sized", b"12345").await.unwrap();
    let empty = FileAttributes {
        size: Some(0),
        ..FileAttributes::empty()
    };
    client.sftp.setstat("/sized", empty).await.unwrap();
    let channel = client.ssh.channel().await.unwrap();
    channel.exec(true, "scp -t .").await.unwrap();
    wait_for(server, "command_refused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_line_is_as_documented_and_every_event_comes() {
    if !are_installed(&["sftp", "ssh-keygen"]) {
        return;
    }
    let s3 = FakeS3::start().await;
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut keygen = Command::new("ssh-keygen");
    keygen.args(["-q", "-N", "", "-t", "ed25519", "-f", "id"]);
    let made = keygen.current_dir(folder).stdin(Stdio::null()).status();
    assert!(made.unwrap().success());
    let key = fs::read_to_string(folder.join("id.pub")).unwrap();
    add_user(folder, "alice", &[&key], Some(PASSWORD));
    fs::write(folder.join("file"), "hello\n").unwrap();

    let mut first = start(&s3, folder, &[]);
    let batch =
        "mkdir d\nput file d/f\nget d/f back\nls d\nrename d/f g\n-rm none\nrm g\nrmdir d\n";
    run_sftp(folder, &first, batch);
    do_what_sftp_does_not(&first).await;
    abandon_upload(&s3, &first, "/aborted").await;
    wait_for(&first, "upload_aborted").await;
    let refused = Fault::Status(403, "AccessDenied");
    s3.fault("AbortMultipartUpload", When::Every, refused);
    abandon_upload(&s3, &first, "/left").await;
    wait_for(&first, "upload_left").await;
    s3.clear_faults();
    first.signal("TERM");
    assert!(first.ended().await.success());

    s3.age_uploads(Duration::from_secs(2 * 60 * 60));
    let behind_proxy = ["--abandoned-after", "1h", "--proxy-protocol", "127.0.0.1"];
    let second = start(&s3, folder, &behind_proxy);
    wait_for(&second, "abandoned_upload_aborted").await;
    let mut stream = TcpStream::connect(second.address).unwrap();
    stream.write_all(b"no PROXY header\r\n").unwrap();
    wait_for(&second, "connection_refused").await;

    let page = page();
    let mut seen = BTreeSet::new();
    for line in first.lines().into_iter().chain(second.lines()) {
        match page.check(&line) {
            Ok(event) => seen.insert(event),
            Err(wrong) => panic!("{wrong}: {line}"),
        };
    }
    assert!(seen.remove("log"));
    let documented: BTreeSet<String> = page.events.keys().cloned().collect();
    assert_eq!(seen, documented);
}

#[test]
fn what_is_not_documented_is_found() {
    let page = page();
    assert!(page.events.len() > 20 && page.common.len() == 3);
    let line = |change: fn(&mut Value)| {
        let mut line = json!({
            "time": "2026-11-24T08:28:33.180Z", "level": "info", "event": "written", "sequence": 7,
            "connection": 1, "peer": "192.0.2.7:32796", "user": "alice", "path": "/f", "key": "alice/f", "bytes": 5,
            "parts": 0, "duration": 0.008, "result": "ok", "error": null, "etag": "\"e\"",
            "declared_size": null
        });
        change(&mut line);
        page.check(&line.to_string())
    };
    assert_eq!(line(|_| {}), Ok("written".to_owned()));
    type Spoil = fn(&mut Value);
    let wrong: [(Spoil, &str); 7] = [
        (
            |line| line["event"] = json!("writen"),
            "unknown event writen",
        ),
        (
            |line| line["level"] = json!("debug"),
            "written has the level debug",
        ),
        (
            |line| line["more"] = json!(1),
            "written has an unknown field more",
        ),
        (|line| line["bytes"] = json!("5"), "written has bytes"),
        (|line| line["result"] = json!("okay"), "written has result"),
        (|line| line["etag"] = json!(5), "written has etag"),
        (
            |line| drop(line.as_object_mut().unwrap().remove("parts")),
            "written has no parts",
        ),
    ];
    for (change, expected) in wrong {
        let found = line(change).unwrap_err();
        assert!(found.starts_with(expected), "{found}");
    }
    assert!(page.check("[2026-11-24T08:28:05Z INFO] put").is_err());
}
