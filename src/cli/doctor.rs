//! `sftpd doctor`: tries, with the settings of `serve`, all that serving needs, and says in plain sentences what it found.
//!
//! Every object it makes has a name of its own and is removed again; where that is refused, it says which stay.

use super::listen::ListenAddress;
use super::serve::{ServeArgs, StoreUrl, describe_missing, top_key};
use anyhow::ensure;
use bytes::Bytes;
use sftpd::server;
use sftpd::store::s3::{Listing, S3Store, StartError};
use sftpd::store::{
    Attributes, Condition, CopySource, Key, MIN_PART, Part, PartSource, Store, StoreError, etag_of,
};
use sftpd::users::{UsersFile, random};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// S3 refuses requests whose clock is 15 minutes off
/// ([RequestTimeTooSkewed](https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html)); warn well before.
const MOST_SKEW: Duration = Duration::from_secs(60);
/// Content of the small object.
const CONTENT: &[u8] = b"Made by sftpd doctor. It can be removed.\n";
/// Content that replaces it.
const NEWER_CONTENT: &[u8] = b"Made by sftpd doctor, twice. It can be removed.\n";
/// All actions that an IAM policy can allow.
const ACTIONS_PAGE: &str =
    "https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html";
/// The lifecycle rule to have.
const LIFECYCLE_PAGE: &str = "https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpu-abort-incomplete-mpu-lifecycle-config.html";
/// In lower case, what errors about the newer checksums have in them: the names of the headers, and the codes BadDigest,
/// XAmzContentChecksumMismatch, and NotImplemented ("a header you provided implies functionality that is not
/// implemented").
const CHECKSUM_WORDS: [&str; 5] = ["checksum", "crc32", "digest", "trailer", "notimplemented"];

#[derive(Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
enum Grade {
    Ok,
    /// Something that users will miss, or that may become a problem.
    Warning,
    /// Serving would not work, or not keep its promises.
    Failed,
}

#[derive(serde::Serialize)]
struct Finding {
    /// Its name, which no other finding has.
    check: &'static str,
    grade: Grade,
    text: String,
}

/// Everything that was found, said at once where a person is waiting for it.
struct Report {
    quiet: bool,
    findings: Vec<Finding>,
}

impl Report {
    fn add(&mut self, check: &'static str, grade: Grade, text: impl Into<String>) {
        let finding = Finding {
            check,
            grade,
            text: text.into(),
        };
        if !self.quiet {
            let mark = match grade {
                Grade::Ok => "ok     ",
                Grade::Warning => "warning",
                Grade::Failed => "FAILED ",
            };
            println!("{mark}  {check:<18} {}", finding.text);
        }
        self.findings.push(finding);
    }

    /// Notes how a request went, and hands on what came of it. `without` is what can't be done where it is refused, if
    /// all else can.
    fn tried<T>(
        &mut self,
        check: &'static str,
        result: Result<T, StoreError>,
        good: &str,
        without: Option<&str>,
    ) -> Option<T> {
        match (&result, without) {
            (Ok(_), _) => self.add(check, Grade::Ok, good),
            (Err(error @ StoreError::Forbidden(_)), Some(without)) => {
                self.add(check, Grade::Warning, format!("{error}: {without}"));
            }
            (Err(error), _) => {
                self.add(check, Grade::Failed, format!("{error}: {}", advice(error)))
            }
        }
        result.ok()
    }

    fn count(&self, grade: Grade) -> usize {
        self.findings
            .iter()
            .filter(|finding| finding.grade == grade)
            .count()
    }
}

/// What to do about an error.
fn advice(error: &StoreError) -> String {
    let text = error.to_string();
    match error {
        _ if text.contains("RequestTimeTooSkewed") => "set this machine's clock (NTP)".to_owned(),
        _ if text.contains("InvalidAccessKeyId") || text.contains("ignature") => {
            "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY".to_owned()
        }
        StoreError::Forbidden(_) => format!("allow it in the IAM policy ({ACTIONS_PAGE})"),
        StoreError::NoSuchBucket => "create the bucket, or correct --store".to_owned(),
        _ if speaks_of_checksums(&text) => {
            "for a store that knows no checksums set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
                .to_owned()
        }
        _ => "check the endpoint, the region and the AWS_* settings".to_owned(),
    }
}

fn speaks_of_checksums(text: &str) -> bool {
    let text = text.to_lowercase();
    CHECKSUM_WORDS.iter().any(|word| text.contains(word))
}

/// Looks at everything. An error when serving would fail.
pub async fn run(settings: &ServeArgs, json: bool) -> anyhow::Result<()> {
    let place = settings.place()?;
    settings.part_sizes()?;
    settings.abandoned_after()?;
    let mut report = Report {
        quiet: json,
        findings: Vec::new(),
    };
    users(&mut report, settings);
    host_keys(&mut report, settings);
    address(&mut report, "listen address", "--listen", &settings.listen).await;
    if let Some(metrics) = &settings.metrics {
        address(&mut report, "metrics address", "--metrics", metrics).await;
    }
    match place {
        StoreUrl::Memory => report.add(
            "store",
            Grade::Warning,
            "files live in memory and are gone at the end",
        ),
        StoreUrl::Bucket(bucket, prefix) => match S3Store::open(bucket).await {
            Err(error) => report.add(refused_check(&error), Grade::Failed, error.to_string()),
            Ok(store) => {
                let base = top_key(prefix)?;
                Checkup {
                    report: &mut report,
                    store: &store,
                    base,
                    name: random(),
                }
                .all(settings.equal_parts)
                .await;
            }
        },
    }
    let (failed, warnings) = (report.count(Grade::Failed), report.count(Grade::Warning));
    if json {
        let all = serde_json::json!({"healthy": failed == 0, "findings": report.findings});
        println!("{}", serde_json::to_string_pretty(&all)?);
    }
    ensure!(failed == 0, "checks failed: {failed}; warnings: {warnings}");
    Ok(())
}

/// The check that finds a store which can't be opened.
fn refused_check(error: &StartError) -> &'static str {
    match error {
        StartError::NoCredentials { .. }
        | StartError::CredentialSettings { .. }
        | StartError::CredentialsUnavailable { .. } => "credentials",
        _ => "settings",
    }
}

fn users(report: &mut Report, settings: &ServeArgs) {
    let file = settings.users.display();
    match UsersFile::read(&settings.users) {
        Ok(UsersFile { users }) if users.is_empty() => {
            report.add(
                "users",
                Grade::Warning,
                format!("{file} holds nobody: sftpd users add NAME \"KEY\""),
            );
        }
        Ok(UsersFile { users }) => {
            report.add("users", Grade::Ok, format!("{} in {file}", users.len()))
        }
        Err(error) => report.add("users", Grade::Failed, format!("{error:#}")),
    }
    modes(
        report,
        "users file mode",
        vec![settings.users.clone()],
        NOT_EVERYONE,
    );
}

fn host_keys(report: &mut Report, settings: &ServeArgs) {
    let folder = &settings.host_keys;
    match server::load(folder) {
        Ok(keys) if keys.is_empty() => {
            report.add(
                "host keys",
                Grade::Ok,
                format!("none in {} yet: serve makes them", folder.display()),
            );
        }
        Ok(keys) => {
            let prints: Vec<_> = keys.iter().map(server::HostKey::to_string).collect();
            report.add("host keys", Grade::Ok, prints.join(", "));
        }
        Err(error) => report.add("host keys", Grade::Failed, format!("{error:#}")),
    }
    let mut private = Vec::new();
    for entry in folder.read_dir().into_iter().flatten().flatten() {
        let file = entry.path();
        if file.extension().is_none_or(|end| end != "pub") {
            private.push(file);
        }
    }
    modes(report, "host key modes", private, OWNER_ONLY);
}

/// Who may read a file, and with which mode.
struct Readers {
    /// Bits that the mode must not have.
    refused: u32,
    words: &'static str,
    advice: &'static str,
}

/// For private keys.
const OWNER_ONLY: Readers = Readers {
    refused: 0o077,
    words: "readable by the owner only",
    advice: "chmod 600",
};
/// For password hashes, which the group of the service may read.
const NOT_EVERYONE: Readers = Readers {
    refused: 0o007,
    words: "not readable by everyone",
    advice: "chmod o-rwx",
};

fn modes(report: &mut Report, check: &'static str, files: Vec<PathBuf>, readers: Readers) {
    let mut open = Vec::new();
    let mut found = false;
    for file in files {
        let Ok(metadata) = file.metadata() else {
            continue;
        };
        found = true;
        let mode = metadata.permissions().mode() & 0o777;
        if mode & readers.refused != 0 {
            open.push(format!("{} has mode {mode:o}", file.display()));
        }
    }
    match (found, open.is_empty()) {
        (false, _) => {}
        (true, true) => report.add(check, Grade::Ok, readers.words),
        (true, false) => report.add(
            check,
            Grade::Warning,
            format!("{}: {}", open.join(", "), readers.advice),
        ),
    }
}

/// Listens there for a moment.
async fn address(report: &mut Report, check: &'static str, flag: &str, address: &ListenAddress) {
    let error = match address.try_bind().await {
        Ok(_) => return report.add(check, Grade::Ok, format!("{address} is free")),
        Err(error) => error,
    };
    let (grade, advice) = match error.kind() {
        ErrorKind::AddrInUse => {
            let port = address.port();
            (
                Grade::Warning,
                format!(
                    "fine if sftpd is running; otherwise ss -ltnp 'sport = :{port}' tells by what"
                ),
            )
        }
        ErrorKind::AddrNotAvailable => (
            Grade::Failed,
            format!("give {flag} an address of this machine"),
        ),
        ErrorKind::PermissionDenied => (
            Grade::Failed,
            format!("ports below 1024 need CAP_NET_BIND_SERVICE, or give {flag} another port"),
        ),
        _ => (Grade::Failed, format!("correct {flag}")),
    };
    report.add(
        check,
        grade,
        format!("can't listen on {address} ({error}): {advice}"),
    );
}

/// The bucket, looked at from all sides.
struct Checkup<'a> {
    report: &'a mut Report,
    store: &'a S3Store,
    base: Key,
    /// In the names of the objects that are made.
    name: String,
}

impl Checkup<'_> {
    async fn all(mut self, equal_parts: bool) {
        if self.credentials().await && self.lists().await {
            self.objects().await;
            self.uploads(equal_parts).await;
            self.upkeep().await;
        }
    }

    fn key(&self, end: &str) -> Result<Key, StoreError> {
        Key::new(format!("{}.sftpd-doctor-{}{end}", self.base, self.name))
            .ok_or(StoreError::NotFound)
    }

    /// False where going on would only say the same again.
    async fn credentials(&mut self) -> bool {
        let key = S3Store::access_key().await;
        match &key {
            Ok(id) => self
                .report
                .add("credentials", Grade::Ok, format!("access key {id}")),
            Err(error) => self
                .report
                .add("credentials", Grade::Failed, error.to_string()),
        }
        key.is_ok()
    }

    /// As [`Checkup::credentials`].
    async fn lists(&mut self) -> bool {
        match self.store.regions().await {
            (ours, Some(theirs)) if ours != theirs => {
                let text = format!(
                    "requests go to {ours}, the bucket is in {theirs}: set AWS_REGION={theirs}"
                );
                self.report.add("region", Grade::Failed, text);
            }
            (ours, Some(_)) => self.report.add("region", Grade::Ok, ours),
            (ours, None) => self.report.add(
                "region",
                Grade::Ok,
                format!("{ours}; the store does not say its own"),
            ),
        }
        let sent = if self.store.checksums() {
            "sent with every object and part"
        } else {
            "sent where S3 demands them"
        };
        self.report.add("checksums", Grade::Ok, sent);
        let listed = self.store.check(&self.base).await;
        match &listed {
            Ok(Listing::Allowed) => self
                .report
                .add("list", Grade::Ok, "directories can be listed"),
            Ok(Listing::Refused(why)) => {
                self.report.add(
                    "list",
                    Grade::Warning,
                    format!("{why}: clients will see no directories"),
                );
            }
            Err(error) => self.report.add("list", Grade::Failed, error.to_string()),
        }
        listed.is_ok()
    }

    async fn objects(&mut self) {
        let (Ok(key), Ok(copy)) = (self.key(""), self.key("-copy")) else {
            return;
        };
        let (store, before) = (self.store, SystemTime::now());
        let put = store
            .put(
                &key,
                Bytes::from_static(CONTENT),
                &Attributes::default(),
                &Condition::None,
            )
            .await;
        if self
            .report
            .tried("put", put, "small files can be stored", None)
            .is_none()
        {
            return;
        }
        let head = store.head(&key).await;
        let found = self.report.tried(
            "head",
            head,
            "files can be looked up",
            Some("every stat needs a list request"),
        );
        if let Some(object) = found {
            self.clock(before, object.modified);
            let got = store
                .get(&key, 0..CONTENT.len() as u64, &object.etag)
                .await
                .and_then(|bytes| match &bytes.concat()[..] {
                    CONTENT => Ok(()),
                    _ => Err(StoreError::Other(
                        "what came back is not what was stored".into(),
                    )),
                });
            let without = "nobody can download, rename or append; fine for a drop box";
            if self
                .report
                .tried("get", got, "files can be fetched", Some(without))
                .is_some()
            {
                self.conditional_get(&key, &object.etag).await;
            }
        }
        self.conditions().await;
        let etag = match store.head(&key).await {
            Ok(object) => object.etag,
            Err(_) => etag_of(CONTENT),
        };
        let source = CopySource {
            key: &key,
            etag: &etag,
            storage_class: None,
        };
        let copied = store.copy(source, &copy, &Condition::None).await;
        let copied = self.report.tried(
            "copy",
            copied,
            "files can be renamed",
            Some("nobody can rename"),
        );
        let keys = if copied.is_some() {
            vec![key, copy]
        } else {
            vec![key]
        };
        self.remove("delete", keys).await;
    }

    /// What several gateways on one bucket rely on.
    async fn conditions(&mut self) {
        let kept = self.store.try_all_conditions(&self.base).await;
        match kept.map(|kept| describe_missing(&kept)) {
            Ok(None) => self.report.add(
                "conditions",
                Grade::Ok,
                "all kept: several gateways can serve the same files",
            ),
            Ok(Some(missing)) => {
                let text = format!(
                    "the store does not keep {missing}: with one gateway all is right, of several that change the \
                     same files at once one may lose what the other has stored"
                );
                self.report.add("conditions", Grade::Warning, text);
            }
            Err(error) => {
                let text =
                    format!("can't be tried ({error}): serve the bucket from one gateway only");
                self.report.add("conditions", Grade::Warning, text);
            }
        }
    }

    /// Replaces the object, and asks for what it was before.
    async fn conditional_get(&mut self, key: &Key, outdated: &str) {
        let replaced = self
            .store
            .put(
                key,
                Bytes::from_static(NEWER_CONTENT),
                &Attributes::default(),
                &Condition::None,
            )
            .await;
        let kept = match replaced {
            Ok(_) => self.store.honours_if_match(key, outdated).await,
            Err(error) => Err(error),
        };
        match kept {
            Ok(true) => self.report.add("conditional get", Grade::Ok, "If-Match is kept"),
            Ok(false) => self.report.add(
                "conditional get",
                Grade::Warning,
                "the store ignores If-Match: that a file was replaced during a download is only noticed by the ETag of \
                 each answer; the download then fails",
            ),
            Err(error) => {
                self.report.add("conditional get", Grade::Failed, format!("{error}: {}", advice(&error)));
            }
        }
    }

    fn clock(&mut self, before: SystemTime, stored: SystemTime) {
        // Stored within the request, to the second; anything else is skew.
        let early = before.duration_since(stored).unwrap_or_default();
        let late = stored.duration_since(SystemTime::now()).unwrap_or_default();
        let skew = early.max(late);
        match skew < MOST_SKEW {
            true => self
                .report
                .add("clock", Grade::Ok, "this machine and the store agree"),
            false => {
                let text = format!(
                    "{} s apart from the store's: set this machine's clock (NTP)",
                    skew.as_secs()
                );
                self.report.add("clock", Grade::Warning, text);
            }
        }
    }

    async fn remove(&mut self, check: &'static str, keys: Vec<Key>) {
        let mut removed = Ok(());
        for key in &keys {
            removed = removed.and(self.store.delete(key, &Condition::None).await);
        }
        let left: Vec<_> = keys.iter().map(Key::as_str).collect();
        let without = format!(
            "nobody can remove or rename, and these test objects stay: {}",
            left.join(", ")
        );
        self.report
            .tried(check, removed, "files can be removed", Some(&without));
    }

    /// One upload of three parts, and another one that is aborted.
    async fn uploads(&mut self, equal_parts: bool) {
        let Ok(key) = self.key("-parts") else { return };
        let (equal, growing) = ([MIN_PART, MIN_PART, 1], [MIN_PART, MIN_PART + (1 << 20), 1]);
        let made = self
            .upload(&key, if equal_parts { equal } else { growing })
            .await;
        if made.is_err() && !equal_parts && self.upload(&key, equal).await.is_ok() {
            let text =
                "the store demands parts of one size, as Cloudflare R2 does: set --equal-parts";
            self.report.add("multipart", Grade::Failed, text);
            return self.remove("delete of parts", vec![key]).await;
        }
        if self
            .report
            .tried("multipart", made, "large files can be stored", None)
            .is_some()
        {
            self.abort(&key).await;
            self.remove("delete of parts", vec![key]).await;
        }
    }

    async fn upload(&self, key: &Key, sizes: [u64; 3]) -> Result<String, StoreError> {
        let id = self
            .store
            .create_upload(key, &Attributes::default())
            .await?;
        let made = async {
            let mut parts: Vec<Part> = Vec::new();
            for (number, size) in (1..).zip(sizes) {
                let body = Bytes::from(vec![b'.'; size as usize]);
                parts.push(self.store.upload_part(key, &id, number, body).await?);
            }
            self.store
                .complete(key, &id, &parts, &Condition::None)
                .await
        };
        let made = made.await;
        if made.is_err() {
            let _ = self.store.abort(key, &id).await;
        }
        made
    }

    /// Copies a part of what is there into an upload that is given up.
    async fn abort(&mut self, key: &Key) {
        let store = self.store;
        let Ok(id) = store.create_upload(key, &Attributes::default()).await else {
            return;
        };
        if let Ok(object) = store.head(key).await {
            let source = PartSource {
                key,
                etag: &object.etag,
                range: 0..MIN_PART,
            };
            let copied = store.copy_part(key, &id, 1, source).await;
            let without = Some("nobody can append to large files, or rename those over 5 GiB");
            self.report.tried(
                "copy of parts",
                copied,
                "large files can be appended to",
                without,
            );
        }
        let aborted = store.abort(key, &id).await;
        self.report.tried(
            "abort",
            aborted,
            "what is cut off leaves nothing behind",
            None,
        );
    }

    async fn upkeep(&mut self) {
        let without =
            "what a server that was killed leaves behind stays until a lifecycle rule removes it";
        match self.store.initiator(&self.base).await {
            Ok(us) => {
                let (grade, text) = match us {
                    Some(us) => (
                        Grade::Ok,
                        format!("abandoned uploads can be found, to whom this is {us}"),
                    ),
                    None => (
                        Grade::Warning,
                        format!("the store does not say who began an upload: {without}"),
                    ),
                };
                self.report.add("clean-up", grade, text);
            }
            Err(error) => {
                self.report
                    .add("clean-up", Grade::Warning, format!("{error}: {without}"))
            }
        }
        match self.store.removes_incomplete_uploads().await {
            Ok(true) => {
                self.report
                    .add("lifecycle", Grade::Ok, "a rule removes incomplete uploads")
            }
            Ok(false) => {
                let text =
                    format!("no rule removes incomplete uploads: add one ({LIFECYCLE_PAGE})");
                self.report.add("lifecycle", Grade::Warning, text);
            }
            Err(error) => {
                let text = format!(
                    "can't be looked at ({error}): see that a rule removes incomplete uploads"
                );
                self.report.add("lifecycle", Grade::Warning, text);
            }
        }
    }
}
