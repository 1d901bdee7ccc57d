//! `sftpd doctor`: tries everything that `serve` with these settings needs, and says what it found.
//!
//! Called by `cli::run`. Invariant: every object that it puts has a random name and is removed
//! again; if that is refused, the report names the objects that stay.

use super::listen::ListenAddress;
use super::print;
use super::serve::{ServeArgs, StoreUrl, describe_missing};
use super::waiting::with_notices;
use anyhow::ensure;
use bytes::Bytes;
use sftpd::events::{Teller, TextLog};
use sftpd::path::top_key;
use sftpd::server;
use sftpd::store::s3::{Listing, S3Store, StartError};
use sftpd::store::{Attributes, Condition, CopySource, Key, Object, PartSource, Store, StoreError};
use sftpd::transfer::MultipartUpload;
use sftpd::users::{UsersFile, random_password};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// S3 refuses requests if the clock is 15 minutes off
/// ([RequestTimeTooSkewed](https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html));
/// warn well before.
const MAX_SKEW: Duration = Duration::from_secs(60);
/// Content of the small object.
const CONTENT: &[u8] = b"Made by sftpd doctor. It can be removed.\n";
/// The content that replaces it.
const NEWER_CONTENT: &[u8] = b"Made by sftpd doctor, twice. It can be removed.\n";
/// About all actions that an IAM policy can allow.
const ACTIONS_PAGE: &str =
    "https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html";
/// About the lifecycle rule that a bucket should have.
const LIFECYCLE_PAGE: &str = "https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpu-abort-incomplete-mpu-lifecycle-config.html";
/// Words in errors about the newer checksums, in lower case: the names of the headers, and the
/// codes BadDigest, XAmzContentChecksumMismatch, and NotImplemented ("a header you provided implies
/// functionality that is not implemented").
const CHECKSUM_WORDS: [&str; 5] = ["checksum", "crc32", "digest", "trailer", "notimplemented"];

#[derive(Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
enum Grade {
    Ok,
    /// Something does not work for users, or may become a problem.
    Warning,
    /// Serving would fail, or break its promises.
    Failed,
}

#[derive(serde::Serialize)]
struct Finding {
    /// Name of the check, unique in a report.
    check: &'static str,
    grade: Grade,
    text: String,
}

/// Everything that was found.
struct Report {
    /// Findings are not printed as they are made.
    quiet: bool,
    findings: Vec<Finding>,
    /// The first failure to print one.
    printed: anyhow::Result<()>,
}

impl Report {
    fn add(&mut self, check: &'static str, grade: Grade, text: String) {
        let finding = Finding { check, grade, text };
        if !self.quiet {
            let mark = match grade {
                Grade::Ok => "ok     ",
                Grade::Warning => "warning",
                Grade::Failed => "FAILED ",
            };
            let line = format!("{mark}  {check:<18} {}\n", finding.text);
            if self.printed.is_ok() {
                self.printed = print(line.as_bytes());
            }
        }
        self.findings.push(finding);
    }

    fn ok(&mut self, check: &'static str, text: impl Into<String>) {
        self.add(check, Grade::Ok, text.into());
    }

    fn warning(&mut self, check: &'static str, text: impl Into<String>) {
        self.add(check, Grade::Warning, text.into());
    }

    fn failed(&mut self, check: &'static str, text: impl Into<String>) {
        self.add(check, Grade::Failed, text.into());
    }

    /// Adds the outcome of a request, and returns it. `without` says what does not work if only
    /// this request is forbidden; it is then a warning.
    fn add_outcome<T>(
        &mut self,
        check: &'static str,
        result: Result<T, StoreError>,
        good: &str,
        without: Option<&str>,
    ) -> Option<T> {
        match (&result, without) {
            (Ok(_), _) => self.ok(check, good),
            (Err(error @ StoreError::Forbidden(_)), Some(without)) => {
                self.warning(check, format!("{error}: {without}"));
            }
            (Err(error), _) => self.failed(check, format!("{error}: {}", advice(error))),
        }
        result.ok()
    }

    fn count(&self, grade: Grade) -> usize {
        let graded = self
            .findings
            .iter()
            .filter(|finding| finding.grade == grade);
        graded.count()
    }
}

/// The operator's next step after an error.
fn advice(error: &StoreError) -> String {
    let text = error.to_string();
    match error {
        _ if text.contains("RequestTimeTooSkewed") => "set this machine's clock (NTP)".to_owned(),
        _ if text.contains("InvalidAccessKeyId") || text.contains("ignature") => {
            "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY".to_owned()
        }
        StoreError::Forbidden(_) => format!("allow it in the IAM policy ({ACTIONS_PAGE})"),
        StoreError::NoSuchBucket => "create the bucket, or correct --store".to_owned(),
        _ if text.contains("SlowDown") => "the store is overloaded: try again later".to_owned(),
        _ if text.contains("InternalError") || text.contains("HTTP status 5") => {
            "the store has a fault: try again later, or ask the store's operator".to_owned()
        }
        _ if is_about_checksums(&text) => {
            "for a store without checksums set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
                .to_owned()
        }
        _ => "check the endpoint, the region and the AWS_* settings".to_owned(),
    }
}

fn is_about_checksums(text: &str) -> bool {
    let text = text.to_lowercase();
    CHECKSUM_WORDS.iter().any(|word| text.contains(word))
}

/// Runs all checks. Fails if serving would fail.
pub async fn run(settings: &ServeArgs, json: bool) -> anyhow::Result<()> {
    let store_url = settings.store_url()?;
    settings.check()?;
    let mut report = Report {
        quiet: json,
        findings: Vec::new(),
        printed: Ok(()),
    };
    check_users(&mut report, settings);
    check_host_keys(&mut report, settings);
    check_address(&mut report, "listen address", "--listen", &settings.listen).await;
    if let Some(metrics) = &settings.metrics {
        check_address(&mut report, "metrics address", "--metrics", metrics).await;
    }
    match store_url {
        StoreUrl::Memory => report.warning("store", "files live in memory and are gone at the end"),
        StoreUrl::Bucket(bucket, prefix) => match open_store(bucket).await {
            Err(error) => report.failed(refused_check(&error), error.to_string()),
            Ok(store) => {
                let place = settings.place(&store);
                let checkup = Checkup {
                    report: &mut report,
                    settings,
                    store: Arc::new(store),
                    base: top_key(prefix)?,
                    name: random_password(),
                };
                with_notices(&place, checkup.run()).await;
            }
        },
    }
    let failed = report.count(Grade::Failed);
    let verdict = verdict(failed, report.count(Grade::Warning));
    report.printed?;
    if json {
        let all = serde_json::json!({"healthy": failed == 0, "findings": report.findings});
        print((serde_json::to_string_pretty(&all)? + "\n").as_bytes())?;
    }
    ensure!(failed == 0, "{verdict}");
    match json {
        true => Ok(()),
        false => print((verdict + "\n").as_bytes()),
    }
}

async fn open_store(bucket: &str) -> Result<S3Store, StartError> {
    with_notices("the AWS credentials", S3Store::open(bucket)).await
}

/// What the report comes to.
fn verdict(failed: usize, warnings: usize) -> String {
    let failed = match failed {
        0 => "no check failed".to_owned(),
        1 => "1 check failed".to_owned(),
        failed => format!("{failed} checks failed"),
    };
    let warnings = match warnings {
        0 => "no warnings".to_owned(),
        1 => "1 warning".to_owned(),
        warnings => format!("{warnings} warnings"),
    };
    format!("{failed}, {warnings}")
}

/// The name of the check that fails if the store can't be opened.
fn refused_check(error: &StartError) -> &'static str {
    match error {
        StartError::NoCredentials { .. }
        | StartError::CredentialSettings { .. }
        | StartError::CredentialsUnavailable { .. } => "credentials",
        _ => "settings",
    }
}

fn check_users(report: &mut Report, settings: &ServeArgs) {
    let file = settings.users.display();
    match UsersFile::read(&settings.users) {
        Ok(UsersFile { users, .. }) if users.is_empty() => {
            report.warning(
                "users",
                format!("{file} has no users: run sftpd users add NAME \"KEY\""),
            );
        }
        Ok(UsersFile { users, .. }) => report.ok("users", format!("{} in {file}", users.len())),
        Err(error) => report.failed("users", format!("{error:#}")),
    }
    check_modes(
        report,
        "users file mode",
        vec![settings.users.clone()],
        NOT_EVERYONE,
    );
}

fn check_host_keys(report: &mut Report, settings: &ServeArgs) {
    let folder = &settings.host_keys;
    match server::load(folder) {
        Ok(keys) if keys.is_empty() => {
            report.ok(
                "host keys",
                format!("none in {} yet: serve makes them", folder.display()),
            );
        }
        Ok(keys) => {
            let prints: Vec<_> = keys.iter().map(server::HostKey::to_string).collect();
            report.ok("host keys", prints.join(", "));
        }
        Err(error) => report.failed("host keys", format!("{error:#}")),
    }
    let mut private = Vec::new();
    for entry in folder.read_dir().into_iter().flatten().flatten() {
        let file = entry.path();
        if file.extension().is_none_or(|end| end != "pub") {
            private.push(file);
        }
    }
    check_modes(report, "host key modes", private, OWNER_ONLY);
}

/// Which users of the machine may read a file.
struct Readers {
    /// Bits that the mode must not have.
    refused: u32,
    /// What a good mode means.
    words: &'static str,
    /// How to get it.
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

/// Checks who may read the files that exist.
fn check_modes(report: &mut Report, check: &'static str, files: Vec<PathBuf>, readers: Readers) {
    let mut exposed = Vec::new();
    let mut is_any_found = false;
    for file in files {
        let Ok(metadata) = file.metadata() else {
            continue;
        };
        is_any_found = true;
        let mode = metadata.permissions().mode() & 0o777;
        if mode & readers.refused != 0 {
            exposed.push(format!("{} has mode {mode:o}", file.display()));
        }
    }
    if !exposed.is_empty() {
        let text = format!("{}: {}", exposed.join(", "), readers.advice);
        report.warning(check, text);
    } else if is_any_found {
        report.ok(check, readers.words);
    }
}

/// Tries to listen there.
async fn check_address(
    report: &mut Report,
    check: &'static str,
    flag: &str,
    address: &ListenAddress,
) {
    let error = match address.try_bind().await {
        Ok(_) => return report.ok(check, format!("{address} is free")),
        Err(error) => error,
    };
    let text = address.explain(&error, flag);
    match error.kind() {
        ErrorKind::AddrInUse => {
            report.warning(check, format!("{text}; fine if sftpd is running"));
        }
        _ => report.failed(check, text),
    }
}

/// The checks of the bucket.
struct Checkup<'a> {
    report: &'a mut Report,
    settings: &'a ServeArgs,
    store: Arc<S3Store>,
    base: Key,
    /// A random part of the names of the objects that are put.
    name: String,
}

impl Checkup<'_> {
    async fn run(mut self) {
        // Without these, all others would fail for the same reason.
        if !self.check_credentials().await || !self.check_bucket().await {
            return;
        }
        self.check_objects().await;
        self.check_uploads(self.settings.equal_parts).await;
        self.check_clean_up().await;
    }

    /// The key of a test object.
    fn key(&self, end: &str) -> Result<Key, StoreError> {
        Key::new(format!("{}.sftpd-doctor-{}{end}", self.base, self.name))
            .ok_or(StoreError::NotFound)
    }

    /// Returns whether there are any.
    async fn check_credentials(&mut self) -> bool {
        let key = S3Store::access_key().await;
        match &key {
            Ok(id) => self.report.ok("credentials", format!("access key {id}")),
            Err(error) => self.report.failed("credentials", error.to_string()),
        }
        key.is_ok()
    }

    /// Returns whether the bucket can be used.
    async fn check_bucket(&mut self) -> bool {
        let listed = self.settings.try_bucket(&self.store, &self.base).await;
        if let Err(error @ StartError::Unreachable { .. }) = &listed {
            // Any other request would be waited for in vain.
            self.report.failed("list", error.to_string());
            return false;
        }
        match self.store.regions().await {
            (ours, Some(theirs)) if ours != theirs => {
                let text = format!(
                    "requests go to {ours}, the bucket is in {theirs}: set AWS_REGION={theirs}"
                );
                self.report.failed("region", text);
            }
            (ours, Some(_)) => self.report.ok("region", ours),
            (ours, None) => self
                .report
                .ok("region", format!("{ours}; the store does not say its own")),
        }
        let sent = if self.store.checksums() {
            "sent with every object and part"
        } else {
            "sent where S3 demands them"
        };
        self.report.ok("checksums", sent);
        match &listed {
            Ok(Listing::Allowed) => self.report.ok("list", "directories can be listed"),
            Ok(Listing::Refused(why)) => {
                self.report
                    .warning("list", format!("{why}: clients will see no directories"));
            }
            Err(error) => self.report.failed("list", error.to_string()),
        }
        listed.is_ok()
    }

    async fn check_objects(&mut self) {
        let (Ok(key), Ok(copy)) = (self.key(""), self.key("-copy")) else {
            return;
        };
        let before = SystemTime::now();
        let put = self.put(&key, CONTENT).await;
        let put = self
            .report
            .add_outcome("put", put, "small files can be stored", None);
        let Some(version) = put else { return };
        let head = self.store.head(&key).await;
        let without = Some("every stat needs a list request");
        let head = self
            .report
            .add_outcome("head", head, "files can be looked up", without);
        if let Some(object) = head {
            self.check_clock(before, object.modified);
            self.check_get(&key, &object.etag).await;
        }
        self.check_conditions().await;
        let mut keys = vec![key.clone()];
        if self.check_copy(&key, version, &copy).await {
            keys.push(copy);
        }
        self.remove("delete", keys).await;
    }

    async fn put(&self, key: &Key, content: &'static [u8]) -> Result<Object, StoreError> {
        let content = Bytes::from_static(content);
        let attributes = Attributes::default();
        self.store
            .put(key, content, &attributes, &Condition::None)
            .await
    }

    async fn check_get(&mut self, key: &Key, etag: &str) {
        let got = match self.store.get(key, 0..CONTENT.len() as u64, etag).await {
            Ok(bytes) if bytes.concat() == CONTENT => Ok(()),
            Ok(_) => Err(StoreError::Other(
                "the content differs from what was stored".into(),
            )),
            Err(error) => Err(error),
        };
        let without = Some("users can't download, rename or append; fine for a drop box");
        let got = self
            .report
            .add_outcome("get", got, "files can be fetched", without);
        if got.is_some() {
            self.check_conditional_get(key, etag).await;
        }
    }

    /// Returns whether there is a copy now. `put` is the version that was put, unless HEAD says
    /// otherwise.
    async fn check_copy(&mut self, key: &Key, put: Object, copy: &Key) -> bool {
        let version = self.store.head(key).await.unwrap_or(put);
        let source = CopySource {
            key,
            version: &version,
        };
        let copied = self.store.copy(source, copy, &Condition::None).await;
        let without = Some("users can't rename");
        let copied = self
            .report
            .add_outcome("copy", copied, "files can be renamed", without);
        copied.is_some()
    }

    /// Several gateways on one bucket rely on conditional requests.
    async fn check_conditions(&mut self) {
        let (kept, left) = match self.store.try_all_conditions(&self.base).await {
            Ok(tried) => (tried.kept, tried.left),
            Err(error) => (Err(error), Vec::new()),
        };
        let (mut grade, mut text) = match kept.map(|kept| describe_missing(&kept)) {
            Ok(None) => {
                let text = "all kept: several gateways can serve the same files";
                (Grade::Ok, text.to_owned())
            }
            Ok(Some(missing)) => {
                let text = format!(
                    "serve the bucket from one gateway only, as several that change the same file at once could lose \
                     changes: the store does not keep {missing}"
                );
                (Grade::Warning, text)
            }
            Err(error) => {
                let text =
                    format!("can't be tested ({error}): serve the bucket from one gateway only");
                (Grade::Warning, text)
            }
        };
        if !left.is_empty() {
            grade = Grade::Warning;
            text += &format!("; these test objects stay: {}", join_keys(&left));
        }
        self.report.add("conditions", grade, text);
    }

    /// Replaces the object, and gets the version that it was before.
    async fn check_conditional_get(&mut self, key: &Key, outdated: &str) {
        let kept = match self.put(key, NEWER_CONTENT).await {
            Ok(_) => self.store.honours_if_match(key, outdated).await,
            Err(error) => Err(error),
        };
        match kept {
            Ok(true) => self.report.ok("conditional get", "If-Match is kept"),
            Ok(false) => self.report.warning("conditional get", "the store ignores If-Match: only the ETag of each response shows that a file was replaced during a \
                 download, which then fails",
            ),
            Err(error) => {
                self.report.failed("conditional get", format!("{error}: {}", advice(&error)));
            }
        }
    }

    fn check_clock(&mut self, before: SystemTime, stored: SystemTime) {
        // The object was stored during the request; S3's time has whole seconds.
        let early = before.duration_since(stored).unwrap_or_default();
        let late = stored.duration_since(SystemTime::now()).unwrap_or_default();
        let skew = early.max(late);
        match skew < MAX_SKEW {
            true => self.report.ok("clock", "this machine and the store agree"),
            false => {
                let text = format!(
                    "{} s apart from the store's: set this machine's clock (NTP)",
                    skew.as_secs()
                );
                self.report.warning("clock", text);
            }
        }
    }

    async fn remove(&mut self, check: &'static str, keys: Vec<Key>) {
        let mut removed = Ok(());
        for key in &keys {
            removed = removed.and(self.store.delete(key, &Condition::None).await);
        }
        let without = format!(
            "users can't remove or rename, and these test objects stay: {}",
            join_keys(&keys)
        );
        self.report
            .add_outcome(check, removed, "files can be removed", Some(&without));
    }

    /// One upload of three parts, and another one that is aborted.
    async fn check_uploads(&mut self, equal_parts: bool) {
        let Ok(key) = self.key("-parts") else { return };
        let min_part = self.store.limits().min_part;
        let equal = [min_part, min_part, 1];
        let growing = [min_part, min_part + (1 << 20), 1];
        let made = self
            .upload(&key, if equal_parts { equal } else { growing })
            .await;
        if made.is_err() && !equal_parts && self.upload(&key, equal).await.is_ok() {
            let text =
                "the store demands parts of one size, as Cloudflare R2 does: set --equal-parts";
            self.report.failed("multipart", text);
            return self.remove("delete of parts", vec![key]).await;
        }
        if self
            .report
            .add_outcome("multipart", made, "large files can be stored", None)
            .is_some()
        {
            self.check_abort(&key).await;
            self.remove("delete of parts", vec![key]).await;
        }
    }

    /// Uploads parts of these sizes, or aborts.
    async fn upload(&self, key: &Key, sizes: [u64; 3]) -> Result<Object, StoreError> {
        let upload =
            MultipartUpload::create(self.store.clone(), key, &Attributes::default()).await?;
        let completed = upload_parts(&upload, sizes).await;
        if completed.is_err() {
            let events = Teller::new(vec![Arc::new(TextLog)]);
            upload.abort(&events).await;
        }
        completed
    }

    /// Copies a part of the object into another upload, which is aborted.
    async fn check_abort(&mut self, key: &Key) {
        let store = self.store.clone();
        let Ok(id) = store.create_upload(key, &Attributes::default()).await else {
            return;
        };
        if let Ok(object) = store.head(key).await {
            let source = PartSource {
                key,
                etag: &object.etag,
                range: 0..store.limits().min_part,
            };
            let copied = store.copy_part(key, &id, 1, source).await;
            let without = Some("users can't append to large files, or rename those over 5 GiB");
            self.report.add_outcome(
                "copy of parts",
                copied,
                "large files can be appended to",
                without,
            );
        }
        let aborted = store.abort(key, &id).await;
        self.report.add_outcome(
            "abort",
            aborted,
            "interrupted uploads leave nothing behind",
            None,
        );
    }

    async fn check_clean_up(&mut self) {
        let without = "incomplete uploads of a server that was killed stay until a lifecycle rule removes them";
        match self.store.initiator(&self.base).await {
            Ok(us) => {
                let (grade, text) = match us {
                    Some(us) => (
                        Grade::Ok,
                        format!("incomplete uploads can be found; they are begun by {us}"),
                    ),
                    None => (
                        Grade::Warning,
                        format!("the store does not name the initiator of an upload: {without}"),
                    ),
                };
                self.report.add("clean-up", grade, text);
            }
            Err(error) => self
                .report
                .warning("clean-up", format!("{error}: {without}")),
        }
        match self.store.removes_incomplete_uploads().await {
            Ok(true) => self
                .report
                .ok("lifecycle", "a rule removes incomplete uploads"),
            Ok(false) => {
                let text =
                    format!("no rule removes incomplete uploads: add one ({LIFECYCLE_PAGE})");
                self.report.warning("lifecycle", text);
            }
            Err(error) => {
                let text = format!(
                    "can't be looked at ({error}): check that a rule removes incomplete uploads, or allow \
                     s3:GetLifecycleConfiguration"
                );
                self.report.warning("lifecycle", text);
            }
        }
    }
}

fn join_keys(keys: &[Key]) -> String {
    let keys: Vec<&str> = keys.iter().map(Key::as_str).collect();
    keys.join(", ")
}

async fn upload_parts(upload: &MultipartUpload, sizes: [u64; 3]) -> Result<Object, StoreError> {
    let mut parts = Vec::new();
    for (number, size) in (1..).zip(sizes) {
        let body = Bytes::from(vec![b'.'; size as usize]);
        parts.push(upload.upload_part(number, body).await?);
    }
    upload.complete(&parts, &Condition::None).await
}
