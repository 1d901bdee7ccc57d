//! An S3 server in memory for the integration tests: one bucket, path-style addresses, signatures
//! verified. It refuses what Amazon S3 refuses, logs every request, so that a test can say how many
//! of each kind an SFTP session may cost, and fails on command.
//!
//! Logging and faults sit in front of `s3s`, at the HTTP layer: only there can a connection be cut,
//! and only there does a request show that `s3s` itself would turn down.

// Every test binary compiles this file and uses only a part of it.
#![allow(dead_code)]
// A panic is how a test fails.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming};
use hyper_util::rt::TokioIo;
use s3s::access::{S3Access, S3AccessContext};
use s3s::crypto::{Checksum as _, Md5};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, HttpError, HttpRequest, HttpResponse, S3Error, S3ErrorCode, S3Result, StdError};
use s3s::{S3, S3Request, S3Response, auth::SimpleAuth, dto::*, s3_error};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;

pub const BUCKET: &str = "test";
pub const ACCESS_KEY: &str = "AKIAFAKES3FAKES3FAKE";
pub const SECRET_KEY: &str = "not/a+secret";

/// Dropping it closes the port and every connection.
pub struct FakeS3 {
    pub endpoint: String,
    store: Store,
    accept: JoinHandle<()>,
}

/// One request as it arrived, whatever became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The S3 operation: `PutObject`, `ListObjectsV2`, ...
    pub op: String,
    /// The object's key; the prefix, for the lists.
    pub key: String,
    /// The bytes asked for, of the object or of a part's copy source.
    pub range: Option<String>,
}

/// Which requests of an operation a fault strikes, counted from 1 since the fault was set.
#[derive(Clone, Copy, Debug)]
pub enum When {
    Every,
    Nth(usize),
    From(usize),
}

#[derive(Clone, Debug)]
pub enum Fault {
    /// An error with that HTTP status and S3 code, and nothing is done.
    Status(u16, &'static str),
    /// The connection is closed without an answer, and nothing is done.
    ResetBefore,
    /// The connection is closed half-way through the request's body, and nothing is done.
    ResetMidRequest,
    /// The connection is closed half-way through the answer's body.
    ResetMidBody,
    /// The operation is carried out, then the connection is closed without an answer.
    LostAnswer,
    /// No answer comes, and nothing is done.
    Hang,
    /// The operation is carried out, but no answer comes.
    HangAfter,
    /// The answer stops half-way through its body, and the connection stays open.
    HangMidBody,
    /// HTTP 200 with an error for a body, as `CompleteMultipartUpload` may answer; nothing is done.
    ErrorBody,
    /// HTTP 200 without a body; nothing is done. As all until `WithoutETag`, not S3's answer, but a proxy's.
    Empty,
    /// HTTP 200 with a page for people; nothing is done.
    Html,
    /// That HTTP status with a page for people; nothing is done.
    HtmlStatus(u16),
    /// The operation is carried out and answered, and nothing is changed by it: as with Garage, which drops a copy that
    /// comes in the same millisecond as a put to its target.
    WithoutEffect,
    /// The operation is carried out, and the answer has no ETag.
    WithoutETag,
    /// The operation is carried out, and the answer ends in the middle of its XML, as if that was all.
    TruncatedXml,
    /// The operation waits that long, then goes on.
    Stall(Duration),
    /// The operation waits to be notified, then goes on. `notify_one` may come first.
    Hold(Arc<tokio::sync::Notify>),
}

impl FakeS3 {
    pub async fn start() -> FakeS3 {
        let store = Store(Arc::new(Mutex::new(State {
            min_part: 5 << 20,
            copy_limit: 5 << 30,
            ..State::default()
        })));
        let mut s3 = S3ServiceBuilder::new(store.clone());
        s3.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        s3.set_access(OneBucket);
        let (s3, front) = (s3.build(), store.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let endpoint = format!("http://{}", listener.local_addr().expect("address"));
        let accept = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.expect("accept");
                stream.set_nodelay(true).expect("TCP_NODELAY");
                let (store, s3) = (front.clone(), s3.clone());
                let serve = move |r| serve(store.clone(), s3.clone(), r);
                connections.spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), hyper::service::service_fn(serve)),
                );
                while connections.try_join_next().is_some() {}
            }
        });
        FakeS3 {
            endpoint,
            store,
            accept,
        }
    }

    /// The requests since the start or the last `reset`, in their order of arrival.
    pub fn requests(&self) -> Vec<Request> {
        self.store.lock().log.clone()
    }

    /// Forgets the logged requests, not the objects.
    pub fn reset(&self) {
        self.store.lock().log.clear();
    }

    pub fn count(&self, op: &str) -> usize {
        self.store.lock().log.iter().filter(|r| r.op == op).count()
    }

    /// The keys, sorted.
    pub fn objects(&self) -> Vec<String> {
        self.store.lock().objects.keys().cloned().collect()
    }

    pub fn object(&self, key: &str) -> Option<Bytes> {
        self.store.lock().objects.get(key).map(|o| o.body.clone())
    }

    /// All keys with their bytes.
    pub fn snapshot(&self) -> BTreeMap<String, Bytes> {
        self.store
            .lock()
            .objects
            .iter()
            .map(|(key, o)| (key.clone(), o.body.clone()))
            .collect()
    }

    /// Puts an object in place without a request.
    pub fn put(&self, key: &str, body: impl Into<Bytes>) {
        let object = Object::new(body.into(), About::default());
        self.store.lock().objects.insert(key.into(), object);
    }

    /// As [`FakeS3::put`], with a Content-Type and user metadata.
    pub fn put_described(
        &self,
        key: &str,
        body: impl Into<Bytes>,
        content_type: &str,
        metadata: &[(&str, &str)],
    ) {
        let metadata = metadata
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_string()))
            .collect();
        let about = (Some(content_type.parse().unwrap()), Some(metadata));
        self.store
            .lock()
            .objects
            .insert(key.into(), Object::new(body.into(), about));
    }

    /// An object's Content-Type and user metadata.
    pub fn description(&self, key: &str) -> (Option<String>, Metadata) {
        let (content_type, metadata) = self.store.lock().objects[key].about.clone();
        (
            content_type.map(|kind| kind.to_string()),
            metadata.unwrap_or_default(),
        )
    }

    /// Removes an object without a request.
    pub fn remove(&self, key: &str) {
        self.store.lock().objects.remove(key);
    }

    /// Makes a multipart upload another user's.
    pub fn give_away(&self, upload_id: &str) {
        self.store
            .lock()
            .uploads
            .get_mut(upload_id)
            .expect("an upload")
            .initiator = "them".to_owned();
    }

    /// How many multipart uploads are in progress.
    pub fn uploads(&self) -> usize {
        self.store.lock().uploads.len()
    }

    /// Adds a fault. Of several that would strike one request, the one set first does.
    pub fn fault(&self, op: &str, when: When, fault: Fault) {
        self.store.lock().faults.push((op.into(), when, fault, 0));
    }

    /// How many requests have begun to hang so far.
    pub fn hanging(&self) -> watch::Receiver<usize> {
        self.store.lock().hanging.subscribe()
    }

    /// How many requests of an operation faults have struck so far.
    pub fn struck(&self, op: &str) -> usize {
        self.store.lock().struck.get(op).copied().unwrap_or(0)
    }

    pub fn clear_faults(&self) {
        self.store.lock().faults.clear();
    }

    /// Bodies that came unsigned, since the start.
    pub fn unsigned_bodies(&self) -> usize {
        self.store.lock().unsigned_bodies
    }

    /// Requests that came with a checksum of the newer kind, since the start.
    pub fn checksums(&self) -> usize {
        self.store.lock().checksums
    }

    /// Makes all multipart uploads in progress, and their parts, that old.
    pub fn age_uploads(&self, age: Duration) {
        let then = SystemTime::now() - age;
        for upload in self.store.lock().uploads.values_mut() {
            upload.started = then.into();
            for part in upload.parts.values_mut() {
                part.modified = then.into();
            }
        }
    }

    /// From now on GET sends whatever there is, as rclone's `serve s3` does.
    pub fn ignore_if_match(&self) {
        self.store.lock().ignores_if_match = true;
    }

    /// From now on changes are made whatever `If-Match`, `If-None-Match` and `x-amz-copy-source-if-match` say, as by Garage.
    pub fn ignore_conditions(&self) {
        self.store.lock().ignores_conditions = true;
    }

    /// From now on ETags are no MD5s, as under SSE-KMS.
    pub fn encrypt(&self) {
        self.store.lock().has_random_etags = true;
    }

    /// From now on the first page of every list is empty and says that there is more, as S3 may do.
    pub fn begin_lists_empty(&self) {
        self.store.lock().begins_lists_empty = true;
    }

    /// The largest source that `CopyObject` accepts, 5 GiB unless set.
    pub fn set_copy_limit(&self, bytes: u64) {
        self.store.lock().copy_limit = bytes;
    }

    /// The smallest part but the last that `CompleteMultipartUpload` accepts, 5 MiB unless set.
    pub fn set_min_part(&self, bytes: usize) {
        self.store.lock().min_part = bytes;
    }
}

impl Drop for FakeS3 {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

impl Request {
    fn identify(r: &HttpRequest) -> Request {
        let (_, key) = r.uri().path()[1..].split_once('/').unwrap_or_default();
        let q = r.uri().query().unwrap_or_default();
        let pairs = q.split('&').map(|p| p.split_once('=').unwrap_or((p, "")));
        let query: BTreeMap<_, _> = pairs.collect();
        let has = |name| query.contains_key(name);
        let header = |name| Some(r.headers().get(name)?.to_str().ok()?.to_owned());
        let copy = r.headers().contains_key("x-amz-copy-source");
        let op = match (r.method().as_str(), key.is_empty()) {
            _ if ["acl", "attributes", "tagging"].into_iter().any(has) => "Other",
            ("HEAD", true) => "HeadBucket",
            ("GET", true) if has("list-type") => "ListObjectsV2",
            ("GET", true) if has("uploads") => "ListMultipartUploads",
            ("GET", true) if has("lifecycle") => "GetBucketLifecycleConfiguration",
            ("POST", true) if has("delete") => "DeleteObjects",
            ("HEAD", false) => "HeadObject",
            ("GET", false) if has("uploadId") => "ListParts",
            ("GET", false) => "GetObject",
            ("PUT", false) if has("partNumber") && copy => "UploadPartCopy",
            ("PUT", false) if has("partNumber") => "UploadPart",
            ("PUT", false) if copy => "CopyObject",
            ("PUT", false) => "PutObject",
            ("POST", false) if has("uploads") => "CreateMultipartUpload",
            ("POST", false) if has("uploadId") => "CompleteMultipartUpload",
            ("DELETE", false) if has("uploadId") => "AbortMultipartUpload",
            ("DELETE", false) => "DeleteObject",
            _ => "Other",
        };
        Request {
            op: op.into(),
            key: match query.get("prefix") {
                Some(prefix) => url_decode(prefix),
                None => urlencoding::decode(key).unwrap_or_default().into_owned(),
            },
            range: header("range").or_else(|| header("x-amz-copy-source-range")),
        }
    }
}

/// The HTTP service: logs a request, then hands it to `s3s` or to a fault.
async fn serve(
    store: Store,
    s3: S3Service,
    request: hyper::Request<Incoming>,
) -> Result<HttpResponse, HttpError> {
    let mut request = request.map(Body::from);
    store.lock().look_at_headers(&request);
    let fault = store.lock().arrival(Request::identify(&request));
    match fault {
        None => call(&s3, request).await,
        Some(Fault::ResetBefore) => Err(HttpError::new("reset by a fault".into())),
        Some(Fault::Hang) => hang(&store).await,
        Some(Fault::ResetMidRequest) => {
            let (body, mut got) = (request.body_mut(), 0);
            let half = body.size_hint().exact().unwrap_or_default() / 2;
            while got < half {
                let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await
                else {
                    break;
                };
                got += frame.data_ref().map_or(0, Bytes::len) as u64;
            }
            Err(HttpError::new("reset by a fault in mid-request".into()))
        }
        Some(fault) => {
            // An answer that overtakes its request reaches some clients as a broken connection.
            let body = request.body_mut().store_all_limited(usize::MAX).await;
            body.map_err(HttpError::new)?;
            // A task of its own: S3 carries out what has arrived, even if the client hangs up.
            let failing = tokio::spawn(fail(fault, store, s3, request));
            failing.await.expect("no panic")
        }
    }
}

/// S3's answer, which has the request's id in a header: that of HEAD has nothing else to be known by.
async fn call(s3: &S3Service, request: HttpRequest) -> Result<HttpResponse, HttpError> {
    let mut answer = s3.call(request).await?;
    answer.headers_mut().insert(
        "x-amz-request-id",
        "TESTTESTTESTTEST".parse().expect("a header"),
    );
    Ok(answer)
}

/// A page for people, as proxies and captive portals have them.
fn page(status: u16) -> HttpResponse {
    let body = "<html><head><title>Welcome</title></head><body>Please log in to use this network.</body></html>";
    let mut answer = HttpResponse::new(Body::from(body.to_owned()));
    *answer.status_mut() = status.try_into().expect("HTTP status");
    answer
        .headers_mut()
        .insert("content-type", "text/html".parse().expect("a header"));
    answer
}

/// The same answer with another body.
fn with_body(answer: HttpResponse, body: Bytes) -> HttpResponse {
    let mut answer = answer.map(|_| Body::from(body.clone()));
    answer
        .headers_mut()
        .insert("content-length", body.len().into());
    answer
}

/// hyper closes the connection when this returns an error.
async fn fail(
    fault: Fault,
    store: Store,
    s3: S3Service,
    request: HttpRequest,
) -> Result<HttpResponse, HttpError> {
    let (status, code) = match fault {
        Fault::Stall(time) => {
            sleep(time).await;
            return call(&s3, request).await;
        }
        Fault::Hold(notify) => {
            notify.notified().await;
            return call(&s3, request).await;
        }
        Fault::LostAnswer => {
            call(&s3, request).await?;
            return Err(HttpError::new("answer lost by a fault".into()));
        }
        Fault::HangAfter => {
            call(&s3, request).await?;
            hang(&store).await
        }
        Fault::ResetMidBody | Fault::HangMidBody => {
            let mut answer = call(&s3, request).await?;
            let whole = answer.body_mut().store_all_limited(usize::MAX).await;
            let whole = whole.map_err(HttpError::new)?;
            let headers = answer.headers_mut();
            headers.insert("content-length", whole.len().into());
            let waits_for_ever = matches!(fault, Fault::HangMidBody);
            let half = Half {
                bytes: Some(whole.slice(..whole.len() / 2)),
                waits_for_ever,
                to_tell: Some(store),
            };
            return Ok(answer.map(|_| Body::http_body(half)));
        }
        Fault::ResetBefore | Fault::ResetMidRequest | Fault::Hang => {
            unreachable!("the request is not read whole")
        }
        Fault::ErrorBody => (200, "InternalError"),
        Fault::WithoutEffect => {
            let before = store.lock().objects.clone();
            let answer = call(&s3, request).await?;
            store.lock().objects = before;
            return Ok(answer);
        }
        Fault::Empty => return Ok(HttpResponse::new(Body::empty())),
        Fault::Html => return Ok(page(200)),
        Fault::HtmlStatus(status) => return Ok(page(status)),
        Fault::WithoutETag => {
            let mut answer = call(&s3, request).await?;
            answer.headers_mut().remove("etag");
            let whole = answer
                .body_mut()
                .store_all_limited(usize::MAX)
                .await
                .map_err(HttpError::new)?;
            let text = String::from_utf8_lossy(&whole);
            return Ok(match (text.find("<ETag>"), text.find("</ETag>")) {
                (Some(from), Some(to)) => {
                    let rest = format!("{}{}", &text[..from], &text[to + "</ETag>".len()..]);
                    with_body(answer, rest.into())
                }
                _ => with_body(answer, whole.clone()),
            });
        }
        Fault::TruncatedXml => {
            let mut answer = call(&s3, request).await?;
            let whole = answer
                .body_mut()
                .store_all_limited(usize::MAX)
                .await
                .map_err(HttpError::new)?;
            return Ok(with_body(answer, whole.slice(..whole.len() / 2)));
        }
        Fault::Status(status, code) => (status, code),
    };
    let Ok(code) = code.parse::<S3ErrorCode>();
    let mut error = S3Error::with_message(code, "Set by the test");
    error.set_status_code(status.try_into().expect("HTTP status"));
    let mut answer = error
        .to_http_response()
        .map_err(|e| HttpError::new(e.into()))?;
    answer.headers_mut().insert(
        "x-amz-request-id",
        "TESTTESTTESTTEST".parse().expect("a header"),
    );
    Ok(answer)
}

async fn hang(store: &Store) -> ! {
    store.announce_hanging();
    pending().await
}

/// The first half of an answer. hyper sends it, finds that the Content-Length has promised more, and
/// closes the connection; or waits for the rest for ever.
struct Half {
    bytes: Option<Bytes>,
    waits_for_ever: bool,
    /// `None` once it was told: hyper asks as often as it likes.
    to_tell: Option<Store>,
}

impl HttpBody for Half {
    type Data = Bytes;
    type Error = StdError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StdError>>> {
        match self.bytes.take() {
            None if self.waits_for_ever => {
                if let Some(store) = self.to_tell.take() {
                    store.announce_hanging();
                }
                Poll::Pending
            }
            half => Poll::Ready(half.map(|bytes| Ok(Frame::data(bytes)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_none() && !self.waits_for_ever
    }
}

#[derive(Clone)]
struct Store(Arc<Mutex<State>>);

impl Store {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn announce_hanging(&self) {
        self.lock().hanging.send_modify(|n| *n += 1);
    }
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Object>,
    uploads: BTreeMap<String, Upload>,
    uploads_ever: usize,
    log: Vec<Request>,
    /// By operation, and with the number of its requests seen since.
    faults: Vec<(String, When, Fault, usize)>,
    struck: BTreeMap<String, usize>,
    hanging: watch::Sender<usize>,
    min_part: usize,
    copy_limit: u64,
    ignores_if_match: bool,
    ignores_conditions: bool,
    begins_lists_empty: bool,
    has_random_etags: bool,
    unsigned_bodies: usize,
    checksums: usize,
}

/// An object, or a part of one to be.
#[derive(Clone)]
struct Object {
    body: Bytes,
    etag: String,
    modified: Timestamp,
    about: About,
}

type About = (Option<ContentType>, Option<Metadata>);

struct Upload {
    key: String,
    started: Timestamp,
    about: About,
    parts: BTreeMap<i32, Object>,
    /// The CRC-32 of each part, if the upload was begun to have them.
    checksums: Option<BTreeMap<i32, String>>,
    initiator: String,
}

type In<T> = S3Request<T>;
type Out<T> = S3Result<S3Response<T>>;
type Condition<'a> = Option<&'a ETagCondition>;

/// A structure of `s3s` with these fields, all optional there, and the defaults for the others.
macro_rules! dto {
    ($type:ident: $($field:ident = $value:expr),*) => {
        s3s::dto::$type { $($field: Option::from($value),)* ..Default::default() }
    };
}

macro_rules! refuse {
    ($code:ident if $when:expr) => {
        if $when {
            return Err(s3_error!($code));
        }
    };
}

impl Object {
    fn new(body: Bytes, about: About) -> Object {
        let (etag, modified) = (md5(&body), now());
        Object {
            body,
            etag,
            modified,
            about,
        }
    }

    fn e_tag(&self) -> ETag {
        ETag::Strong(self.etag.clone())
    }

    fn check(&self, like: Condition, unlike: Condition) -> S3Result {
        let is = |c: &ETagCondition| c.as_etag().is_none_or(|e| e.value() == self.etag);
        match (like, unlike) {
            (Some(like), _) if !is(like) => Err(s3_error!(PreconditionFailed)),
            (_, Some(unlike)) if is(unlike) => Err(s3_error!(NotModified)),
            _ => Ok(()),
        }
    }
}

/// `x-amz-checksum-crc32` and the like; what names the algorithm comes without a checksum too.
fn is_checksum(header: &hyper::header::HeaderName) -> bool {
    header.as_str().starts_with("x-amz-checksum-") || header == "x-amz-trailer"
}

impl State {
    fn look_at_headers(&mut self, request: &HttpRequest) {
        let payload = request
            .headers()
            .get("x-amz-content-sha256")
            .and_then(|value| value.to_str().ok());
        self.unsigned_bodies +=
            usize::from(payload.is_some_and(|payload| payload.contains("UNSIGNED-PAYLOAD")));
        self.checksums += usize::from(request.headers().keys().any(is_checksum));
    }

    fn arrival(&mut self, request: Request) -> Option<Fault> {
        let mut struck = None;
        for (op, when, fault, seen) in &mut self.faults {
            if *op == request.op {
                *seen += 1;
                let strikes = match *when {
                    When::Every => true,
                    When::Nth(n) => *seen == n,
                    When::From(n) => *seen >= n,
                };
                struck = struck.or(strikes.then(|| fault.clone()));
            }
        }
        *self.struck.entry(request.op.clone()).or_default() += usize::from(struck.is_some());
        self.log.push(request);
        struck
    }

    fn insert(&mut self, key: String, mut object: Object) -> ETag {
        if self.has_random_etags {
            object.etag = format!("{:032x}", rand::random::<u128>());
        }
        let etag = object.e_tag();
        self.objects.insert(key, object);
        etag
    }

    fn object(&self, key: &str) -> S3Result<&Object> {
        self.objects.get(key).ok_or(s3_error!(NoSuchKey))
    }

    fn upload(&mut self, id: &str, key: &str) -> S3Result<&mut Upload> {
        let upload = self.uploads.get_mut(id).filter(|u| u.key == key);
        upload.ok_or(s3_error!(NoSuchUpload))
    }

    /// The parts of an upload, in which one of that number may be put.
    fn parts(&mut self, id: &str, key: &str, number: i32) -> S3Result<&mut BTreeMap<i32, Object>> {
        refuse!(InvalidArgument if !(1..=10_000).contains(&number));
        Ok(&mut self.upload(id, key)?.parts)
    }

    /// The object that `x-amz-copy-source` names.
    fn source(&self, from: &CopySource, like: Condition) -> S3Result<Object> {
        match from {
            CopySource::Bucket { bucket, key, .. } if **bucket == *BUCKET => {
                let source = self.object(key)?;
                source.check(like.filter(|_| !self.ignores_conditions), None)?;
                Ok(source.clone())
            }
            _ => Err(s3_error!(NoSuchBucket)),
        }
    }

    /// Whether `If-Match` and `If-None-Match` let the key be written.
    fn may_write(&self, key: &str, like: Condition, unlike: Condition) -> S3Result {
        match (like, unlike) {
            _ if self.ignores_conditions => Ok(()),
            (_, Some(ETagCondition::ETag(_))) => Err(s3_error!(NotImplemented)),
            (_, Some(_)) if self.objects.contains_key(key) => Err(s3_error!(PreconditionFailed)),
            (Some(_), _) => self.object(key)?.check(like, None),
            _ => Ok(()),
        }
    }

    fn list(&self, i: ListObjectsV2Input) -> S3Result<ListObjectsV2Output> {
        let max = i.max_keys.unwrap_or(1000).min(1000);
        refuse!(InvalidArgument if max < 0);
        let url = i.encoding_type.is_some();
        let encode = |s: &str| if url { url_encode(s) } else { s.to_owned() };
        let prefix = i.prefix.unwrap_or_default();
        let delimiter = i.delimiter.filter(|d| !d.is_empty());
        // Where the page before ended: at a key, or at a common prefix and all that is under it.
        let (mut after, mut under) = (i.start_after.clone(), None);
        match i.continuation_token.as_deref().map(|t| t.split_once(':')) {
            None => {}
            Some(Some(("key", key))) => after = Some(url_decode(key)),
            Some(Some(("under", prefix))) => under = Some(url_decode(prefix)),
            Some(_) => return Err(s3_error!(InvalidArgument)),
        }
        let (mut contents, mut prefixes) = (Vec::new(), Vec::new());
        let (mut count, mut next, mut truncated) = (0, None, false);
        let max = if self.begins_lists_empty && i.continuation_token.is_none() {
            next = Some("key:".to_owned());
            0
        } else {
            max
        };
        let from = self.objects.range(prefix.clone()..);
        for (key, object) in from.take_while(|(key, _)| key.starts_with(&prefix)) {
            let covers = |p: &String| key < p || key.starts_with(p);
            if under.as_ref().is_some_and(covers) || after.as_ref().is_some_and(|a| key <= a) {
                continue;
            }
            if count == max {
                truncated = max > 0 || next.is_some();
                break;
            }
            count += 1;
            let rest = &key[prefix.len()..];
            let end = |d: &String| Some(rest.find(d)? + d.len());
            if let Some(end) = delimiter.as_ref().and_then(end) {
                let common = &key[..prefix.len() + end];
                next = Some(format!("under:{}", url_encode(common)));
                under = Some(common.to_owned());
                let prefix = Some(encode(common));
                prefixes.push(CommonPrefix { prefix });
            } else {
                next = Some(format!("key:{}", url_encode(key)));
                contents.push(dto! { Object:
                    key = encode(key), size = object.body.len() as i64, e_tag = object.e_tag(),
                    last_modified = object.modified.clone(),
                    storage_class = ObjectStorageClass::from_static("STANDARD")
                });
            }
        }
        Ok(dto! { ListObjectsV2Output:
            name = i.bucket, prefix = encode(&prefix), delimiter = delimiter.as_deref().map(encode),
            max_keys = max, key_count = count, contents = contents, common_prefixes = prefixes,
            start_after = i.start_after.as_deref().map(encode), is_truncated = truncated,
            continuation_token = i.continuation_token, encoding_type = i.encoding_type,
            next_continuation_token = next.filter(|_| truncated)
        })
    }
}

/// Stands in for the default check, that a request is signed at all, and adds the bucket's.
struct OneBucket;

#[async_trait::async_trait]
impl S3Access for OneBucket {
    async fn check(&self, cx: &mut S3AccessContext<'_>) -> S3Result<()> {
        refuse!(AccessDenied if cx.credentials().is_none());
        refuse!(NoSuchBucket if cx.s3_path().get_bucket_name().is_some_and(|b| b != BUCKET));
        Ok(())
    }
}

#[async_trait::async_trait]
impl S3 for Store {
    async fn head_bucket(&self, _: In<HeadBucketInput>) -> Out<HeadBucketOutput> {
        ok(dto! { HeadBucketOutput: bucket_region = "us-east-1".to_owned() })
    }

    async fn list_objects_v2(&self, r: In<ListObjectsV2Input>) -> Out<ListObjectsV2Output> {
        ok(self.lock().list(r.input)?)
    }

    async fn head_object(&self, r: In<HeadObjectInput>) -> Out<HeadObjectOutput> {
        let i = r.input;
        let o = self.lock().object(&i.key)?.clone();
        o.check(i.if_match.as_ref(), i.if_none_match.as_ref())?;
        ok(dto! { HeadObjectOutput:
            content_length = o.body.len() as i64, accept_ranges = "bytes".to_owned(),
            e_tag = o.e_tag(), last_modified = o.modified,
            content_type = o.about.0, metadata = o.about.1
        })
    }

    async fn get_object(&self, r: In<GetObjectInput>) -> Out<GetObjectOutput> {
        let i = r.input;
        let (o, ignores_if_match) = {
            let state = self.lock();
            (state.object(&i.key)?.clone(), state.ignores_if_match)
        };
        let like = i.if_match.as_ref().filter(|_| !ignores_if_match);
        o.check(like, i.if_none_match.as_ref())?;
        let (size, mut body, mut range) = (o.body.len() as u64, o.body.clone(), None);
        if let Some(wanted) = i.range {
            let part = wanted.check(size)?;
            refuse!(InvalidRange if part.is_empty());
            body = body.slice(part.start as usize..part.end as usize);
            range = Some(format!("bytes {}-{}/{size}", part.start, part.end - 1));
        }
        ok(dto! { GetObjectOutput:
            content_length = body.len() as i64, accept_ranges = "bytes".to_owned(),
            content_range = range, body = StreamingBlob::from(Body::from(body)),
            e_tag = o.e_tag(), last_modified = o.modified,
            content_type = o.about.0, metadata = o.about.1
        })
    }

    async fn put_object(&self, r: In<PutObjectInput>) -> Out<PutObjectOutput> {
        let i = r.input;
        let object = Object::new(read(i.body).await?, (i.content_type, i.metadata));
        let mut state = self.lock();
        state.may_write(&i.key, i.if_match.as_ref(), i.if_none_match.as_ref())?;
        let e_tag = state.insert(i.key, object);
        ok(dto! { PutObjectOutput: e_tag = e_tag })
    }

    async fn delete_object(&self, r: In<DeleteObjectInput>) -> Out<DeleteObjectOutput> {
        let (i, mut state) = (r.input, self.lock());
        state.may_write(&i.key, i.if_match.as_ref(), None)?;
        state.objects.remove(&i.key);
        ok(DeleteObjectOutput::default())
    }

    async fn delete_objects(&self, r: In<DeleteObjectsInput>) -> Out<DeleteObjectsOutput> {
        let (Delete { objects, quiet }, mut state) = (r.input.delete, self.lock());
        refuse!(MalformedXML if objects.is_empty() || objects.len() > 1000);
        let mut deleted = Vec::new();
        for object in objects {
            state.objects.remove(&object.key);
            deleted.push(dto! { DeletedObject: key = object.key });
        }
        ok(dto! { DeleteObjectsOutput: deleted = Some(deleted).filter(|_| quiet != Some(true)) })
    }

    async fn copy_object(&self, r: In<CopyObjectInput>) -> Out<CopyObjectOutput> {
        // S3 has had conditions on a copy's target since October 2025, but s3s does not parse them.
        let header = |name| r.headers.get(name)?.to_str().ok()?.parse().ok();
        let conditions: [Option<_>; 2] = ["if-match", "if-none-match"].map(header);
        let i = r.input;
        let (limit, source) = {
            let state = self.lock();
            let like = i.copy_source_if_match.as_ref();
            (state.copy_limit, state.source(&i.copy_source, like)?)
        };
        refuse!(InvalidRequest if source.body.len() as u64 > limit);
        let directive = i.metadata_directive;
        let replace = directive.is_some_and(|d| d.as_str() == "REPLACE");
        let itself = matches!(&i.copy_source, CopySource::Bucket { key, .. } if **key == *i.key);
        refuse!(InvalidRequest if itself && !replace && i.storage_class.is_none());
        let about = match replace {
            true => (i.content_type, i.metadata),
            false => source.about,
        };
        // The ETag of the copy is a plain MD5, even if the source was uploaded in parts.
        let object = Object::new(source.body, about);
        let last_modified = object.modified.clone();
        let mut state = self.lock();
        state.may_write(&i.key, conditions[0].as_ref(), conditions[1].as_ref())?;
        let e_tag = state.insert(i.key, object);
        let result = dto! { CopyObjectResult: e_tag = e_tag, last_modified = last_modified };
        ok(dto! { CopyObjectOutput: copy_object_result = result })
    }

    async fn create_multipart_upload(
        &self,
        r: In<CreateMultipartUploadInput>,
    ) -> Out<CreateMultipartUploadOutput> {
        let (i, mut state) = (r.input, self.lock());
        state.uploads_ever += 1;
        let id = format!("upload-{:06}", state.uploads_ever);
        let about = (i.content_type, i.metadata);
        let (checksums, initiator) = (
            i.checksum_algorithm.map(|_| BTreeMap::new()),
            "us".to_owned(),
        );
        let (key, parts) = (i.key.clone(), BTreeMap::new());
        let upload = Upload {
            key,
            started: now(),
            about,
            parts,
            checksums,
            initiator,
        };
        state.uploads.insert(id.clone(), upload);
        ok(dto! { CreateMultipartUploadOutput: bucket = i.bucket, key = i.key, upload_id = id })
    }

    async fn upload_part(&self, r: In<UploadPartInput>) -> Out<UploadPartOutput> {
        let i = r.input;
        let part = Object::new(read(i.body).await?, About::default());
        let e_tag = part.e_tag();
        let mut state = self.lock();
        let checksums = &mut state.upload(&i.upload_id, &i.key)?.checksums;
        // "Checksum Type mismatch occurred, expected checksum Type: null, actual checksum Type: crc32"
        refuse!(InvalidRequest if checksums.is_some() != i.checksum_crc32.is_some());
        if let Some((checksums, sum)) = checksums.as_mut().zip(i.checksum_crc32.clone()) {
            refuse!(BadDigest if sum != crc32(&part.body));
            checksums.insert(i.part_number, sum);
        }
        let parts = state.parts(&i.upload_id, &i.key, i.part_number)?;
        parts.insert(i.part_number, part);
        ok(dto! { UploadPartOutput: e_tag = e_tag, checksum_crc32 = i.checksum_crc32 })
    }

    async fn upload_part_copy(&self, r: In<UploadPartCopyInput>) -> Out<UploadPartCopyOutput> {
        let (i, mut state) = (r.input, self.lock());
        let source = state.source(&i.copy_source, i.copy_source_if_match.as_ref())?;
        let mut body = source.body;
        if let Some(range) = i.copy_source_range {
            let (first, last) = match Range::parse(&range) {
                Ok(Range::Int { first, last }) => (first, last.unwrap_or(u64::MAX)),
                _ => return Err(s3_error!(InvalidArgument)),
            };
            refuse!(InvalidArgument if last >= body.len() as u64);
            // S3 copies a range only out of an object larger than the smallest part.
            refuse!(InvalidRequest if body.len() <= state.min_part);
            body = body.slice(first as usize..=last as usize);
        }
        let part = Object::new(body, About::default());
        let result = dto! { CopyPartResult:
            e_tag = part.e_tag(), last_modified = part.modified.clone()
        };
        let parts = state.parts(&i.upload_id, &i.key, i.part_number)?;
        parts.insert(i.part_number, part);
        ok(dto! { UploadPartCopyOutput: copy_part_result = result })
    }

    async fn complete_multipart_upload(
        &self,
        r: In<CompleteMultipartUploadInput>,
    ) -> Out<CompleteMultipartUploadOutput> {
        let (i, mut state) = (r.input, self.lock());
        let min_part = state.min_part;
        let upload = state.upload(&i.upload_id, &i.key)?;
        let listed = i.multipart_upload.and_then(|m| m.parts).unwrap_or_default();
        refuse!(MalformedXML if listed.is_empty());
        refuse!(InvalidPartOrder if !listed.is_sorted_by(|a, b| a.part_number < b.part_number));
        let (mut parts, mut digests) = (Vec::new(), Vec::new());
        for l in &listed {
            let part = l.part_number.and_then(|n| upload.parts.get(&n));
            let part = part.filter(|p| l.e_tag.as_ref().is_some_and(|e| e.value() == p.etag));
            let part = part.ok_or(s3_error!(InvalidPart))?;
            // "The complete request must include the checksum for each part."
            let sums = upload.checksums.as_ref().zip(l.part_number);
            refuse!(InvalidRequest if sums.is_some_and(|(sums, n)| sums.get(&n) != l.checksum_crc32.as_ref()));
            parts.push(part.body.clone());
            let digest = u128::from_str_radix(&part.etag, 16).expect("an MD5");
            digests.extend(digest.to_be_bytes());
        }
        refuse!(EntityTooSmall if parts[..parts.len() - 1].iter().any(|p| p.len() < min_part));
        let size: usize = parts.iter().map(Bytes::len).sum();
        refuse!(InvalidRequest if i.mpu_object_size.is_some_and(|told| told != size as i64));
        let about = upload.about.clone();
        state.may_write(&i.key, i.if_match.as_ref(), i.if_none_match.as_ref())?;
        state.uploads.remove(&i.upload_id);
        let mut object = Object::new(Bytes::new(), about);
        object.body = parts.concat().into();
        object.etag = format!("{}-{}", md5(&digests), parts.len());
        let e_tag = state.insert(i.key.clone(), object);
        ok(dto! { CompleteMultipartUploadOutput: bucket = i.bucket, key = i.key, e_tag = e_tag })
    }

    async fn abort_multipart_upload(
        &self,
        r: In<AbortMultipartUploadInput>,
    ) -> Out<AbortMultipartUploadOutput> {
        let (i, mut state) = (r.input, self.lock());
        state.upload(&i.upload_id, &i.key)?;
        state.uploads.remove(&i.upload_id);
        ok(AbortMultipartUploadOutput::default())
    }

    async fn list_multipart_uploads(
        &self,
        r: In<ListMultipartUploadsInput>,
    ) -> Out<ListMultipartUploadsOutput> {
        let (i, state) = (r.input, self.lock());
        let url = i.encoding_type.is_some();
        let (prefix, mut uploads) = (i.prefix.unwrap_or_default(), Vec::new());
        for (id, u) in &state.uploads {
            if u.key.starts_with(&prefix) {
                uploads.push(dto! { MultipartUpload:
                    key = if url { url_encode(&u.key) } else { u.key.clone() },
                    upload_id = id.clone(), initiated = u.started.clone(),
                    initiator = dto! { Initiator: id = u.initiator.clone() }
                });
            }
        }
        uploads.sort_by(|a, b| a.key.cmp(&b.key));
        ok(dto! { ListMultipartUploadsOutput:
            bucket = i.bucket, is_truncated = false, uploads = uploads,
            encoding_type = i.encoding_type
        })
    }

    async fn get_bucket_lifecycle_configuration(
        &self,
        _: In<GetBucketLifecycleConfigurationInput>,
    ) -> Out<GetBucketLifecycleConfigurationOutput> {
        let rule = LifecycleRule {
            abort_incomplete_multipart_upload: Some(AbortIncompleteMultipartUpload {
                days_after_initiation: Some(2),
            }),
            expiration: None,
            filter: None,
            id: None,
            noncurrent_version_expiration: None,
            noncurrent_version_transitions: None,
            prefix: None,
            status: ExpirationStatus::from_static(ExpirationStatus::ENABLED),
            transitions: None,
        };
        ok(dto! { GetBucketLifecycleConfigurationOutput: rules = vec![rule] })
    }

    async fn list_parts(&self, r: In<ListPartsInput>) -> Out<ListPartsOutput> {
        let (i, mut state) = (r.input, self.lock());
        let from = i.part_number_marker.unwrap_or(0) + 1;
        let max = i.max_parts.unwrap_or(1000).clamp(0, 1000);
        let mut rest = state.upload(&i.upload_id, &i.key)?.parts.range(from..);
        let mut parts = Vec::new();
        for (number, part) in rest.by_ref().take(max as usize) {
            parts.push(dto! { Part:
                part_number = *number, size = part.body.len() as i64, e_tag = part.e_tag(),
                last_modified = part.modified.clone()
            });
        }
        ok(dto! { ListPartsOutput:
            bucket = i.bucket, key = i.key, upload_id = i.upload_id, max_parts = max,
            next_part_number_marker = parts.last().and_then(|p| p.part_number),
            is_truncated = rest.next().is_some(), parts = parts
        })
    }
}

/// As in a header: base64 of its four bytes.
fn crc32(bytes: &[u8]) -> String {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        (0..8).for_each(|_| crc = (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()));
    }
    let bits = u64::from(!crc) << 4;
    let digit = |n: u32| {
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
            [(bits >> (30 - 6 * n)) as usize & 63]
    };
    (0..6).map(|n| char::from(digit(n))).collect::<String>() + "=="
}

fn ok<T>(output: T) -> Out<T> {
    Ok(S3Response::new(output))
}

/// The whole of a body, or an error if the client gave up or its signature does not match.
async fn read(body: Option<StreamingBlob>) -> S3Result<Bytes> {
    let mut body = body.map(Body::from).unwrap_or_default();
    let read = body.store_all_limited(usize::MAX).await;
    read.map_err(|e| S3Error::with_source(S3ErrorCode::IncompleteBody, e))
}

fn md5(bytes: &[u8]) -> String {
    format!("{:032x}", u128::from_be_bytes(Md5::checksum(bytes)))
}

/// The time in whole seconds: S3 keeps no more, and a `Last-Modified` header holds no more.
fn now() -> Timestamp {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = since_1970.expect("a clock set").as_secs();
    (UNIX_EPOCH + Duration::from_secs(seconds)).into()
}

/// The encoding of `encoding-type=url`: a space is a plus sign, slashes stay.
fn url_encode(s: &str) -> String {
    let rest = [("%20", "+"), ("%2F", "/"), ("%2A", "*"), ("~", "%7E")];
    let encoded = urlencoding::encode(s).into_owned();
    rest.iter()
        .fold(encoded, |s, (from, to)| s.replace(from, to))
}

fn url_decode(s: &str) -> String {
    let s = s.replace('+', " ");
    urlencoding::decode(&s).unwrap_or_default().into_owned()
}
