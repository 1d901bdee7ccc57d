//! The log of requests, and what it takes from their headers.

use super::FakeS3;
use super::encoding::url_decode;
use hyper::header::HeaderName;
use s3s::HttpRequest;
use std::collections::BTreeMap;

/// One request as it arrived, whatever the answer was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The S3 operation: `PutObject`, `ListObjectsV2`, ...
    pub op: String,
    /// The object's key; the prefix, for the lists.
    pub key: String,
    /// The bytes asked for, of the object or of a part's copy source.
    pub range: Option<String>,
}

/// What arrived since the start or the last [`FakeS3::reset`].
#[derive(Default)]
pub struct RequestLog {
    requests: Vec<Request>,
    /// Since the start.
    unsigned_bodies: usize,
    /// Since the start.
    checksums: usize,
    /// Of each `PutObject` since the start: the name of its condition's header, or nothing.
    put_conditions: Vec<&'static str>,
}

impl RequestLog {
    pub fn add(&mut self, request: Request) {
        self.requests.push(request);
    }

    pub fn note_headers(&mut self, request: &HttpRequest) {
        let headers = request.headers();
        let payload = headers.get("x-amz-content-sha256");
        let payload = payload.and_then(|value| value.to_str().ok());
        if payload.is_some_and(|payload| payload.contains("UNSIGNED-PAYLOAD")) {
            self.unsigned_bodies += 1;
        }
        if headers.keys().any(is_checksum) {
            self.checksums += 1;
        }
        if Request::identify(request).op == "PutObject" {
            let names = ["if-match", "if-none-match"].into_iter();
            let mut conditions = names.filter(|name| headers.contains_key(*name));
            self.put_conditions
                .push(conditions.next().unwrap_or_default());
        }
    }
}

/// `x-amz-checksum-crc32` and the like. The header that names the algorithm comes without a
/// checksum too.
fn is_checksum(header: &HeaderName) -> bool {
    header.as_str().starts_with("x-amz-checksum-") || header == "x-amz-trailer"
}

impl FakeS3 {
    /// The requests since the start or the last `reset`, in their order of arrival.
    pub fn requests(&self) -> Vec<Request> {
        self.store.lock().log.requests.clone()
    }

    /// The requests of one operation.
    pub fn requests_of(&self, op: &str) -> Vec<Request> {
        let mut requests = self.requests();
        requests.retain(|request| request.op == op);
        requests
    }

    /// The number of requests of one operation.
    pub fn count(&self, op: &str) -> usize {
        self.requests_of(op).len()
    }

    /// Forgets the logged requests, not the objects.
    pub fn reset(&self) {
        self.store.lock().log.requests.clear();
    }

    /// Bodies that came unsigned, since the start.
    pub fn unsigned_bodies(&self) -> usize {
        self.store.lock().log.unsigned_bodies
    }

    /// The condition of each `PutObject`, by the name of its header, since the start.
    pub fn put_conditions(&self) -> Vec<&'static str> {
        self.store.lock().log.put_conditions.clone()
    }

    /// Requests that came with a checksum of the newer kind, since the start.
    pub fn checksums(&self) -> usize {
        self.store.lock().log.checksums
    }
}

impl Request {
    pub fn identify(request: &HttpRequest) -> Request {
        let path = &request.uri().path()[1..];
        let (_, key) = path.split_once('/').unwrap_or_default();
        let query: BTreeMap<&str, &str> = request
            .uri()
            .query()
            .unwrap_or_default()
            .split('&')
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .collect();
        let header = |name| {
            let value = request.headers().get(name)?;
            value.to_str().ok().map(str::to_owned)
        };
        Request {
            op: operation(request, key, &query).to_owned(),
            key: match query.get("prefix") {
                Some(prefix) => url_decode(prefix),
                None => urlencoding::decode(key).unwrap_or_default().into_owned(),
            },
            range: header("range").or_else(|| header("x-amz-copy-source-range")),
        }
    }
}

fn operation(request: &HttpRequest, key: &str, query: &BTreeMap<&str, &str>) -> &'static str {
    let has = |name| query.contains_key(name);
    let copies = request.headers().contains_key("x-amz-copy-source");
    match (request.method().as_str(), key.is_empty()) {
        _ if ["acl", "attributes", "tagging"].into_iter().any(has) => "Other",
        ("HEAD", true) => "HeadBucket",
        ("GET", true) if has("list-type") => "ListObjectsV2",
        ("GET", true) if has("uploads") => "ListMultipartUploads",
        ("GET", true) if has("lifecycle") => "GetBucketLifecycleConfiguration",
        ("POST", true) if has("delete") => "DeleteObjects",
        ("HEAD", false) => "HeadObject",
        ("GET", false) if has("uploadId") => "ListParts",
        ("GET", false) => "GetObject",
        ("PUT", false) if has("partNumber") && copies => "UploadPartCopy",
        ("PUT", false) if has("partNumber") => "UploadPart",
        ("PUT", false) if copies => "CopyObject",
        ("PUT", false) => "PutObject",
        ("POST", false) if has("uploads") => "CreateMultipartUpload",
        ("POST", false) if has("uploadId") => "CompleteMultipartUpload",
        ("DELETE", false) if has("uploadId") => "AbortMultipartUpload",
        ("DELETE", false) => "DeleteObject",
        _ => "Other",
    }
}
