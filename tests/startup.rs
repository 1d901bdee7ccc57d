//! How `sftpd serve` starts: how it uses the AWS settings, which mistakes end it with which exit
//! status, and how long it waits for S3.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use aws_sdk_s3::config::{AsyncSleep, Sleep};
use aws_sdk_s3::config::{retry::RetryConfig, timeout::TimeoutConfig};
use sftpd::store::s3::{ANSWER_TIMEOUT, AnswerTimeouts, LIST_TIMEOUT};
use sftpd::store::{
    Attributes, Condition, CopySource, Key, ListRequest, PartSource, PatientStore, Store,
    StoreError, Timeouts,
};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::process::{Exited, Process, sftpd_after, sftpd_on};
use support::s3::{FakeS3, Fault, When};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio_util::task::AbortOnDropHandle;

/// How the start of a server ended, and its log up to then.
#[derive(Debug)]
enum Outcome {
    Serves(String),
    Exits(i32, String),
}

impl Outcome {
    fn exits(self) -> (i32, String) {
        match self {
            Outcome::Exits(status, log) => (status, log),
            Outcome::Serves(log) => panic!("it serves: {log}"),
        }
    }

    fn serves(self) -> String {
        match self {
            Outcome::Serves(log) => log,
            Outcome::Exits(status, log) => panic!("it exits with {status}: {log}"),
        }
    }
}

/// How one start differs from others.
#[derive(Clone, Debug, Default)]
struct Setup {
    variables: Vec<(String, String)>,
    unset: Vec<&'static str>,
    files: Vec<(&'static str, String)>,
    args: Vec<String>,
}

impl Setup {
    fn with(mut self, variable: &str, value: &str) -> Setup {
        self.variables.push((variable.to_owned(), value.to_owned()));
        self
    }

    fn without(mut self, variable: &'static str) -> Setup {
        self.unset.push(variable);
        self
    }

    fn file(mut self, name: &'static str, content: &str) -> Setup {
        self.files.push((name, content.to_owned()));
        self
    }

    fn args(mut self, args: &[&str]) -> Setup {
        self.args.extend(args.iter().map(|arg| arg.to_string()));
        self
    }
}

fn with(variable: &str, value: &str) -> Setup {
    Setup::default().with(variable, value)
}

/// Runs `sftpd serve` on the S3 of the tests until it listens or ends.
async fn serve(s3: &FakeS3, setup: Setup) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let mut command = sftpd_on(s3, folder.path());
    command
        .args(["serve", "--listen", "127.0.0.1:0"])
        .args(setup.args)
        .envs(setup.variables);
    for name in setup.unset {
        command.env_remove(name);
    }
    std::fs::write(folder.path().join("users.json"), r#"{"users": {}}"#).unwrap();
    for (name, content) in setup.files {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    let run = move || {
        let _folder = folder;
        match Process::try_spawn(command) {
            Ok(process) => Outcome::Serves(process.log()),
            Err(Exited { status, log }) => Outcome::Exits(status.code().unwrap(), log),
        }
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}

/// A server that gives every request the same answer.
struct OneAnswer {
    endpoint: String,
    _accept: AbortOnDropHandle<()>,
}

impl OneAnswer {
    async fn start(status: u16, headers: &str, body: &str) -> OneAnswer {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let length = body.len();
        let answer = format!(
            "HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\nConnection: close\r\n\
             {headers}\r\n{body}"
        );
        let accept = async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n")
                    && stream.read_buf(&mut head).await.is_ok_and(|read| read > 0)
                {}
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        };
        OneAnswer {
            endpoint,
            _accept: AbortOnDropHandle::new(tokio::spawn(accept)),
        }
    }

    /// Gives an error in the words of S3.
    async fn error(status: u16, code: &str, message: &str) -> OneAnswer {
        let body = format!("<Error><Code>{code}</Code><Message>{message}</Message></Error>");
        OneAnswer::start(status, "", &body).await
    }
}

/// Each with the words of the error that say what to correct.
#[tokio::test(flavor = "multi_thread")]
async fn configuration_errors_exit_with_2_and_say_what_to_correct() {
    let unset = Setup::default().without("AWS_SECRET_ACCESS_KEY");
    let cases: [(Setup, &[&str]); 16] = [
        (
            Setup::default()
                .without("AWS_ENDPOINT_URL")
                .without("AWS_REGION"),
            &["AWS_REGION"],
        ),
        (
            unset.clone().without("AWS_ACCESS_KEY_ID"),
            &["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "\"default\""],
        ),
        (
            unset.with("AWS_PROFILE", "sales"),
            &["AWS_SECRET_ACCESS_KEY", "\"sales\""],
        ),
        (
            with("AWS_ENDPOINT_URL", "localhost:9000"),
            &["\"localhost:9000\"", "https://"],
        ),
        (
            with("AWS_ENDPOINT_URL_S3", "s3://x"),
            &["\"s3://x\"", "https://"],
        ),
        (
            with("SFTPD_STORE", "s3://my bucket"),
            &["\"my bucket\"", "--store"],
        ),
        (with("SFTPD_STORE", "s3://ab"), &["\"ab\"", "--store"]),
        (
            with("SFTPD_STORE", "s3://elsewhere"),
            &["\"elsewhere\"", "create it"],
        ),
        (
            with("AWS_SECRET_ACCESS_KEY", "wrong"),
            &["AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"],
        ),
        (with("AWS_ACCESS_KEY_ID", "unknown"), &["AWS_ACCESS_KEY_ID"]),
        (
            with("AWS_CA_BUNDLE", "none.pem"),
            &["\"none.pem\"", "AWS_CA_BUNDLE"],
        ),
        (
            with("AWS_CA_BUNDLE", "empty.pem").file("empty.pem", "text"),
            &["\"empty.pem\"", "no certificate"],
        ),
        (Setup::default().file("users.json", "{"), &["users.json"]),
        (
            Setup::default().args(&["--users", "elsewhere/users.json"]),
            &["elsewhere/users.json"],
        ),
        (
            Setup::default().file("host_keys", "no folder"),
            &["host_keys"],
        ),
        (
            Setup::default().args(&["--abandoned-after", "59m"]),
            &["--abandoned-after 59m", "1h"],
        ),
    ];
    let s3 = FakeS3::start().await;
    for (setup, words) in cases {
        let (status, log) = serve(&s3, setup).await.exits();
        assert_eq!(status, 2, "{words:?}: {log}");
        let sentence = log.lines().last().unwrap();
        assert!(
            sentence.starts_with("sftpd: ") && words.iter().all(|word| sentence.contains(word)),
            "{words:?}: {log}"
        );
    }
    let (status, log) = serve(&s3, with("SFTPD_STORE", "s3://")).await.exits();
    assert!(status == 2 && log.contains("SFTPD_STORE"), "{log}");
}

/// The codes of S3, and the messages of Garage for errors that it has no code for.
#[tokio::test(flavor = "multi_thread")]
async fn refused_credentials_are_not_taken_for_a_write_only_bucket() {
    let refused = [
        (403, "InvalidAccessKeyId", "", "AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "", "AWS_SECRET_ACCESS_KEY"),
        (
            403,
            "AccessDenied",
            "Forbidden: Invalid signature",
            "AWS_SECRET_ACCESS_KEY",
        ),
        (
            403,
            "AccessDenied",
            "Forbidden: No such key: GK1",
            "AWS_ACCESS_KEY_ID",
        ),
        (400, "ExpiredToken", "", "AWS_SESSION_TOKEN"),
        (400, "InvalidToken", "", "AWS_SESSION_TOKEN"),
        (403, "RequestTimeTooSkewed", "", "clock"),
        (403, "AllAccessDisabled", "", "account"),
        (400, "AuthorizationHeaderMalformed", "", "AWS_REGION"),
        (400, "InvalidBucketName", "", "--store"),
        (404, "NoSuchBucket", "", "create it"),
    ];
    let s3 = FakeS3::start().await;
    for (status, code, message, word) in refused {
        let answers = OneAnswer::error(status, code, message).await;
        let (exit, log) = serve(&s3, with("AWS_ENDPOINT_URL", &answers.endpoint))
            .await
            .exits();
        assert_eq!(exit, 2, "{code} {message}: {log}");
        assert!(log.contains(word), "{code} {message}: {log}");
    }
    let body = "<Error><Code>PermanentRedirect</Code></Error>";
    let elsewhere = OneAnswer::start(301, "x-amz-bucket-region: eu-north-1\r\n", body).await;
    let (exit, log) = serve(&s3, with("AWS_ENDPOINT_URL", &elsewhere.endpoint))
        .await
        .exits();
    assert!(
        exit == 2 && log.contains("set AWS_REGION=eu-north-1"),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_without_list_permission_is_served_with_a_warning() {
    let s3 = FakeS3::start().await;
    s3.fault(
        "ListObjectsV2",
        When::Every,
        Fault::Status(403, "AccessDenied"),
    );
    let log = serve(&s3, Setup::default()).await.serves();
    assert!(
        log.contains("WARN") && log.contains("clients will see no directories"),
        "{log}"
    );
}

/// Credentials may be limited to the prefix.
#[tokio::test(flavor = "multi_thread")]
async fn the_check_at_the_start_lists_only_the_prefix() {
    let s3 = FakeS3::start().await;
    let log = serve(&s3, with("SFTPD_STORE", "s3://test/inbox/today"))
        .await
        .serves();
    let lists: Vec<_> = s3
        .requests()
        .into_iter()
        .filter(|request| request.op == "ListObjectsV2")
        .collect();
    assert_eq!(
        lists
            .iter()
            .map(|request| &*request.key)
            .collect::<Vec<_>>(),
        ["inbox/today/"]
    );
    assert!(!log.contains("directories"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_that_may_pass_exit_with_1() {
    let s3 = FakeS3::start().await;
    let failing = FakeS3::start().await;
    failing.fault(
        "ListObjectsV2",
        When::Every,
        Fault::Status(500, "InternalError"),
    );
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    let outcomes = tokio::join!(
        serve(&s3, Setup::default().args(&["--metrics", &address])),
        serve(&failing, Setup::default()),
        serve(&s3, with("AWS_ENDPOINT_URL", &nobody)),
    );
    for (outcome, word) in [
        (outcomes.0, "can't listen"),
        (outcomes.1, "the store has a fault (InternalError"),
        (outcomes.2, "does not answer"),
    ] {
        let (status, log) = outcome.exits();
        assert!(status == 1 && log.contains(word), "{status}: {log}");
    }
}

/// A store that is at fault is no reason to look at the settings, and an answer of something else
/// is no error of S3's.
#[tokio::test(flavor = "multi_thread")]
async fn an_error_says_whose_it_is() {
    let s3 = FakeS3::start().await;
    let busy = OneAnswer::error(503, "SlowDown", "Reduce your request rate.").await;
    let broken = OneAnswer::error(500, "InternalError", "We encountered an error.").await;
    let gateway = OneAnswer::start(502, "", "<html>Bad Gateway</html>").await;
    let portal = OneAnswer::start(200, "", "<html>Log in to the hotel's network</html>").await;
    let json = OneAnswer::start(200, "", "{}").await;
    let plain = s3.endpoint.replace("http://", "https://");
    let cases = [
        (&busy.endpoint, 1, "the store is overloaded (SlowDown"),
        (&broken.endpoint, 1, "the store has a fault (InternalError"),
        (
            &gateway.endpoint,
            1,
            "the store has a fault (HTTP status 502",
        ),
        (&portal.endpoint, 1, "was not written by S3"),
        (&json.endpoint, 1, "was not written by S3"),
        (&plain, 2, "speaks plain HTTP"),
    ];
    for (endpoint, expected, words) in cases {
        let (status, log) = serve(&s3, with("AWS_ENDPOINT_URL", endpoint)).await.exits();
        let sentence = log.lines().last().unwrap();
        assert_eq!(status, expected, "{words}: {log}");
        assert!(sentence.contains(words), "{words}: {log}");
        assert!(sentence.contains(endpoint.as_str()), "{words}: {log}");
        assert!(!sentence.contains("AWS_*"), "{words}: {log}");
    }
}

/// The role is only the last place where the SDK looks, and often not the one that was meant.
#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_fail_to_load_name_every_source() {
    let s3 = FakeS3::start().await;
    let refusing = OneAnswer::start(403, "", "").await;
    let setup = with("AWS_EC2_METADATA_DISABLED", "false")
        .with("AWS_EC2_METADATA_SERVICE_ENDPOINT", &refusing.endpoint)
        .with("AWS_PROFILE", "sales")
        .without("AWS_ACCESS_KEY_ID")
        .without("AWS_SECRET_ACCESS_KEY");
    let (status, log) = serve(&s3, setup).await.exits();
    assert_eq!(status, 1, "it may pass: {log}");
    let sentence = log.lines().last().unwrap();
    for word in ["AWS_ACCESS_KEY_ID", "\"sales\"", "AWS_PROFILE"] {
        assert!(sentence.contains(word), "{word}: {log}");
    }
}

/// A store that accepts connections and never answers a request.
async fn mute_store() -> (String, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let accept = async move {
        let mut open = Vec::new();
        loop {
            open.push(listener.accept().await);
        }
    };
    (endpoint, AbortOnDropHandle::new(tokio::spawn(accept)))
}

/// Systemd gives the start 30 seconds unless it is told that it takes longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_never_answers_is_named_while_it_is_waited_for() {
    let s3 = FakeS3::start().await;
    let (endpoint, _mute) = mute_store().await;
    let folder = tempfile::tempdir().unwrap();
    let notify = folder.path().join("notify");
    let socket = UnixDatagram::bind(&notify).unwrap();
    socket.set_nonblocking(true).unwrap();
    let setup = with("AWS_ENDPOINT_URL", &endpoint)
        .with("NOTIFY_SOCKET", notify.to_str().unwrap())
        .args(&["--open-timeout", "4s"]);
    let (status, log) = serve(&s3, setup).await.exits();
    assert_eq!(status, 1, "{log}");
    assert!(
        log.contains(&format!("waiting for s3://test at {endpoint}")),
        "{log}"
    );
    let sentence = log.lines().last().unwrap();
    assert!(
        sentence.contains("no answer within 4s") && sentence.contains(&endpoint),
        "{log}"
    );
    let mut heard = [0; 100];
    let length = socket.recv(&mut heard).unwrap();
    assert!(heard[..length].starts_with(b"EXTEND_TIMEOUT_USEC="));
    let mut doctor = sftpd_on(&s3, folder.path());
    doctor
        .args(["doctor", "--open-timeout", "4s", "--listen", "127.0.0.1:0"])
        .env("AWS_ENDPOINT_URL", &endpoint);
    let output = tokio::task::spawn_blocking(move || doctor.output().unwrap());
    let output = output.await.unwrap();
    let report = String::from_utf8(output.stdout).unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{report}{said}");
    let list = report.lines().find(|line| line.contains("  list "));
    assert!(
        list.is_some_and(|line| line.contains("FAILED") && line.contains("no answer within 4s")),
        "{report}"
    );
    assert!(
        said.contains(&format!("waiting for s3://test at {endpoint}")),
        "{said}"
    );
}

/// Otherwise the next start would take the keys that there are for all.
#[tokio::test(flavor = "multi_thread")]
async fn host_keys_are_made_all_or_none() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("users.json"), r#"{"users": {}}"#).unwrap();
    let names = || {
        let entries = std::fs::read_dir(folder.path().join("host_keys")).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let serve = |setting: &str| {
        let mut command = sftpd_after(setting, folder.path());
        command.args(["serve", "--store", "memory:", "--listen", "127.0.0.1:0"]);
        Process::try_spawn(command)
    };
    // Room for the ed25519 and the ECDSA key (blocks of 512 bytes), and not for the RSA key.
    let exited = serve("trap '' XFSZ; ulimit -f 2").err().unwrap();
    assert_eq!(exited.status.code(), Some(2), "{}", exited.log);
    assert!(
        exited.log.contains("can't make the host keys in host_keys"),
        "{}",
        exited.log
    );
    assert_eq!(names(), [] as [&str; 0]);
    drop(serve(":").unwrap());
    assert_eq!(
        names(),
        [
            "ssh_host_ecdsa_key",
            "ssh_host_ecdsa_key.pub",
            "ssh_host_ed25519_key",
            "ssh_host_ed25519_key.pub",
            "ssh_host_rsa_key",
            "ssh_host_rsa_key.pub"
        ]
    );
}

/// A part and a small file, with the endpoint configured in each way that the SDK knows: over plain
/// HTTP, bodies are signed and have no checksum unless the settings say so.
#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_signed_over_plain_http_however_the_endpoint_is_configured() {
    let services =
        "[default]\nservices = local\n[services local]\ns3 =\n  endpoint_url = <plain>\n";
    let section = "[default]\nendpoint_url = <plain>\n";
    let checksums =
        "[default]\nendpoint_url = <plain>\nrequest_checksum_calculation = when_supported\n";
    let cases = [
        ("export AWS_ENDPOINT_URL_S3=<plain>", "", false),
        ("export AWS_ENDPOINT_URL=<plain>", "", false),
        (
            "export AWS_ENDPOINT_URL=https://127.0.0.1:1 AWS_ENDPOINT_URL_S3=<plain>",
            "",
            false,
        ),
        (":", services, false),
        (":", section, false),
        (":", checksums, true),
    ];
    for (variables, profile, with_checksums) in cases {
        let s3 = FakeS3::start().await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config");
        std::fs::write(&file, profile.replace("<plain>", &s3.endpoint)).unwrap();
        let variables = variables.replace("<plain>", &s3.endpoint);
        let setting = format!(
            "unset AWS_ENDPOINT_URL AWS_PROFILE && export AWS_CONFIG_FILE='{}' && {variables}",
            file.display()
        );
        let server = Process::start_after(&setting, &s3, &[]);
        let client = server.client().await;
        client.put("/small", &noise(1000, 1)).await.unwrap();
        client.put("/large", &noise(6 * MIB, 2)).await.unwrap();
        assert_eq!(
            s3.objects(),
            ["alice/large", "alice/small"],
            "{setting} {profile}"
        );
        assert_eq!(s3.unsigned_bodies(), 0, "{setting} {profile}");
        assert_eq!(s3.checksums() > 0, with_checksums, "{setting} {profile}");
    }
}

/// A setting turns off endpoints that a profile or a variable names.
#[tokio::test(flavor = "multi_thread")]
async fn an_ignored_endpoint_gets_no_request() {
    let s3 = FakeS3::start().await;
    let ignore = with("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true").without("AWS_REGION");
    let (status, log) = serve(&s3, ignore).await.exits();
    assert!(status == 2 && log.contains("AWS_REGION"), "{log}");
    assert_eq!(s3.requests(), []);
}

/// Puts TLS before an S3 server, with a certificate for 127.0.0.1 that `ca.pem` signed. Returns the
/// endpoint.
async fn terminate_tls(s3: &FakeS3) -> (String, AbortOnDropHandle<()>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/tls");
    let certificate = CertificateDer::from_pem_file(folder.join("server.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(folder.join("server.key")).unwrap();
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("https://{}", listener.local_addr().unwrap());
    let behind = s3.endpoint.trim_start_matches("http://").to_owned();
    let accept = async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, behind) = (acceptor.clone(), behind.clone());
            tokio::spawn(async move {
                let Ok(mut client) = acceptor.accept(stream).await else {
                    return;
                };
                let mut server = TcpStream::connect(behind).await.unwrap();
                let _ = copy_bidirectional(&mut client, &mut server).await;
            });
        }
    };
    (endpoint, AbortOnDropHandle::new(tokio::spawn(accept)))
}

fn certificate(name: &str) -> String {
    format!(
        "{}/tests/support/tls/{name}.pem",
        env!("CARGO_MANIFEST_DIR")
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_ca_is_trusted_if_the_settings_name_it() {
    let s3 = FakeS3::start().await;
    let (endpoint, _tls) = terminate_tls(&s3).await;
    let there = with("AWS_ENDPOINT_URL", &endpoint);
    let untrusted = there
        .clone()
        .with("SSL_CERT_FILE", &certificate("other-ca"));
    let (status, log) = serve(&s3, untrusted.clone()).await.exits();
    assert!(
        status == 2 && log.contains("unknown issuer") && log.contains("AWS_CA_BUNDLE"),
        "{log}"
    );
    serve(&s3, there.with("SSL_CERT_FILE", &certificate("ca")))
        .await
        .serves();
    serve(
        &s3,
        untrusted.clone().with("AWS_CA_BUNDLE", &certificate("ca")),
    )
    .await
    .serves();
    let profile = format!("[profile own]\nca_bundle = {}\n", certificate("ca"));
    let own = untrusted
        .file("config", &profile)
        .with("AWS_CONFIG_FILE", "config")
        .with("AWS_PROFILE", "own");
    serve(&s3, own).await.serves();
}

/// Over TLS, bodies need no signature. Certificates that can't be used are skipped.
#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_not_signed_over_tls() {
    let s3 = FakeS3::start().await;
    let (endpoint, _tls) = terminate_tls(&s3).await;
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("bundle.pem");
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    std::fs::write(
        &bundle,
        format!(
            "{broken}{}",
            std::fs::read_to_string(certificate("ca")).unwrap()
        ),
    )
    .unwrap();
    let setting = format!(
        "export AWS_ENDPOINT_URL={endpoint} AWS_CA_BUNDLE='{}'",
        bundle.display()
    );
    let server = Process::start_after(&setting, &s3, &[]);
    let before = (s3.count("PutObject"), s3.unsigned_bodies());
    server.client().await.put("/small", b"x").await.unwrap();
    assert_eq!(
        (s3.count("PutObject"), s3.unsigned_bodies()),
        (before.0 + 1, before.1 + 1)
    );
    assert_eq!(server.logged("can't be used and is not trusted"), 1);
}

/// A store at an address where nothing listens, with this pause between two tries.
async fn absent_store(s3: &FakeS3, pause: Duration) -> Arc<dyn Store> {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = format!("http://{}", closed.local_addr().unwrap());
    s3_store_with(s3, |config| {
        let retry = RetryConfig::standard()
            .with_max_attempts(3)
            .with_initial_backoff(pause)
            .with_max_backoff(pause);
        config.endpoint_url(nobody).retry_config(retry)
    })
}

/// Nothing was sent, so nothing can have been done. A connection that breaks leaves it open.
#[tokio::test(flavor = "multi_thread")]
async fn only_connections_that_were_all_refused_leave_no_doubt() {
    let s3 = FakeS3::start().await;
    let key = Key::new("f").unwrap();
    let (attributes, condition) = (Attributes::default(), Condition::None);
    let absent = absent_store(&s3, Duration::from_millis(1)).await;
    let put = absent.put(&key, "x".into(), &attributes, &condition).await;
    assert!(
        matches!(&put, Err(StoreError::Other(why)) if why.contains("every connection to the store was refused")),
        "{put:?}"
    );
    let (store, _) = hurried_store(&s3, LONG);
    s3.fault("PutObject", When::Every, Fault::ResetBefore);
    let put = store.put(&key, "x".into(), &attributes, &condition).await;
    assert!(matches!(put, Err(StoreError::Unknown(_))), "{put:?}");
}

/// The SDK is in the pause before its next try, and would keep the reason to itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_given_up_says_why_its_last_try_failed() {
    let s3 = FakeS3::start().await;
    let key = Key::new("f").unwrap();
    let timeouts = Timeouts {
        open: Duration::from_millis(300),
        close: Duration::from_millis(300),
    };
    let absent = absent_store(&s3, Duration::from_secs(3600)).await;
    let absent = PatientStore::new(absent, timeouts);
    for failed in [
        absent.head(&key).await,
        absent
            .put(&key, "x".into(), &Attributes::default(), &Condition::None)
            .await,
    ] {
        let why = failed.unwrap_err().to_string();
        assert!(
            why.contains("the store did not respond for 300ms")
                && why.contains("Connection refused"),
            "{why}"
        );
    }
}

/// The timeout of the SDK's client for requests without one of their own.
const LONG: Duration = Duration::from_secs(15 * 60);

/// The sleep of the SDK: records the timeouts, and ends one as soon as one more request hangs.
#[derive(Clone, Debug)]
struct HurriedSleep {
    hanging: watch::Receiver<usize>,
    asked: Arc<Mutex<Vec<Duration>>>,
}

impl AsyncSleep for HurriedSleep {
    fn sleep(&self, time: Duration) -> Sleep {
        if ![ANSWER_TIMEOUT, LIST_TIMEOUT, LONG].contains(&time) {
            // The pause between two tries, or the check whether a stream has stalled.
            return Sleep::new(tokio::time::sleep(time));
        }
        self.asked.lock().unwrap().push(time);
        let mut hanging = self.hanging.clone();
        let before = *hanging.borrow();
        Sleep::new(async move { drop(hanging.wait_for(|now| *now > before).await) })
    }
}

/// A store that tries twice, with this timeout for requests without one of their own, and the sleep
/// that records timeouts.
fn hurried_store(s3: &FakeS3, others: Duration) -> (Arc<dyn Store>, HurriedSleep) {
    let hurry = HurriedSleep {
        hanging: s3.hanging(),
        asked: Arc::default(),
    };
    let sleep = hurry.clone();
    let pause = Duration::from_millis(1);
    let store = s3_store_with(s3, |config| {
        let retry = RetryConfig::standard()
            .with_max_attempts(2)
            .with_initial_backoff(pause)
            .with_max_backoff(pause);
        let timeouts = TimeoutConfig::builder()
            .operation_attempt_timeout(others)
            .disable_read_timeout()
            .build();
        config
            .retry_config(retry)
            .timeout_config(timeouts)
            .interceptor(AnswerTimeouts)
            .sleep_impl(sleep)
    });
    (store, hurry)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_an_answer_is_retried_after_the_answer_timeout() {
    let s3 = FakeS3::start().await;
    s3.put("f", "content");
    let key = Key::new("f").unwrap();
    let (store, hurry) = hurried_store(&s3, LONG);
    s3.fault("HeadObject", When::Nth(1), Fault::Hang);
    assert_eq!(store.head(&key).await.unwrap().size, 7);
    assert_eq!(s3.count("HeadObject"), 2);
    let asked = hurry.asked.lock().unwrap();
    assert_eq!(
        asked.iter().filter(|time| **time == ANSWER_TIMEOUT).count(),
        2,
        "{asked:?}"
    );
}

/// The longest timeout of each operation.
#[tokio::test(flavor = "multi_thread")]
async fn only_bodies_copies_and_lists_have_the_long_timeout() {
    let s3 = FakeS3::start().await;
    s3.put("f", "content");
    s3.put("large", noise(6 * MIB, 1));
    let (key, large, copy) = (
        Key::new("f").unwrap(),
        Key::new("large").unwrap(),
        Key::new("copy").unwrap(),
    );
    let (store, hurry) = hurried_store(&s3, LONG);
    let longest = || hurry.asked.lock().unwrap().drain(..).max();
    let etag = store.head(&large).await.unwrap().etag;
    assert_eq!(longest(), Some(ANSWER_TIMEOUT));
    store.get(&large, 0..5, &etag).await.unwrap();
    assert_eq!(longest(), Some(ANSWER_TIMEOUT));
    store
        .list(ListRequest {
            prefix: &Key::default(),
            folded: false,
            after: None,
            limit: 1,
        })
        .await
        .unwrap();
    assert_eq!(longest(), Some(LONG));
    store
        .put(
            &key,
            "other".into(),
            &Attributes::default(),
            &Condition::None,
        )
        .await
        .unwrap();
    assert_eq!(longest(), Some(LONG));
    let version = store.head(&key).await.unwrap();
    longest();
    let source = CopySource {
        key: &key,
        version: &version,
    };
    store.copy(source, &copy, &Condition::None).await.unwrap();
    assert_eq!(longest(), Some(LONG));
    store.delete(&copy, &Condition::None).await.unwrap();
    assert_eq!(longest(), Some(ANSWER_TIMEOUT));
    let id = store
        .create_upload(&key, &Attributes::default())
        .await
        .unwrap();
    assert_eq!(longest(), Some(ANSWER_TIMEOUT));
    let part = store
        .upload_part(&key, &id, 1, "part".into())
        .await
        .unwrap();
    assert_eq!(longest(), Some(LONG));
    store
        .copy_part(
            &key,
            &id,
            2,
            PartSource {
                key: &large,
                etag: &etag,
                range: 0..store.limits().min_part,
            },
        )
        .await
        .unwrap();
    assert_eq!(longest(), Some(LONG));
    store
        .complete(&key, &id, &[part], &Condition::None)
        .await
        .unwrap();
    assert_eq!(longest(), Some(LONG));
    let id = store
        .create_upload(&key, &Attributes::default())
        .await
        .unwrap();
    longest();
    store.abort(&key, &id).await.unwrap();
    assert_eq!(longest(), Some(ANSWER_TIMEOUT));
}
