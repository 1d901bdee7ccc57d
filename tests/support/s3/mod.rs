//! An S3 server in memory for the integration tests: one bucket, path-style addresses, signatures
//! verified. It refuses what Amazon S3 refuses, logs every request, so that a test can say how many
//! of each kind an SFTP session may cost, and fails on command.
//!
//! Logging and faults sit in front of `s3s`, at the HTTP layer: only there can a connection be
//! broken, and only there does a request show that `s3s` itself would refuse.

/// A structure of `s3s` with these fields, all optional there, and the defaults for the others.
macro_rules! dto {
    ($type:ident: $($field:ident = $value:expr),*) => {
        s3s::dto::$type { $($field: Option::from($value),)* ..Default::default() }
    };
}

/// Returns an S3 error if a condition holds.
macro_rules! refuse {
    ($code:ident if $when:expr) => {
        if $when {
            return Err(s3s::s3_error!($code));
        }
    };
}

mod encoding;
mod faults;
mod front;
mod listing;
mod operations;
mod requests;
mod state;

pub use faults::{Fault, When};
pub use requests::Request;

use aws_sdk_s3::config::{
    BehaviorVersion, Builder, Credentials, Region, RequestChecksumCalculation,
};
use bytes::Bytes;
use s3s::auth::SimpleAuth;
use s3s::dto::Metadata;
use s3s::service::S3ServiceBuilder;
use state::{About, Object, Store};
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

pub const BUCKET: &str = "test";
pub const ACCESS_KEY: &str = "AKIAFAKES3FAKES3FAKE";
pub const SECRET_KEY: &str = "not/a+secret";
const REGION: &str = "us-east-1";

/// Where an S3 server is, and the key pair that it accepts.
#[derive(Clone)]
pub struct S3Access {
    pub endpoint: String,
    pub access_key: String,
    pub secret_key: String,
}

impl S3Access {
    /// The server at this endpoint, with the key pair that `SFTPD_TEST_S3_KEY` and
    /// `SFTPD_TEST_S3_SECRET` hold.
    pub fn from_variables(endpoint: String) -> S3Access {
        let variable = |name| {
            std::env::var(name)
                .unwrap_or_else(|_| panic!("{name} is not set, though SFTPD_TEST_S3 is"))
        };
        S3Access {
            endpoint,
            access_key: variable("SFTPD_TEST_S3_KEY"),
            secret_key: variable("SFTPD_TEST_S3_SECRET"),
        }
    }

    /// The variables that give the SDK of another process access.
    pub fn variables(&self) -> [(&'static str, &str); 4] {
        [
            ("AWS_ENDPOINT_URL", &self.endpoint),
            ("AWS_REGION", REGION),
            ("AWS_ACCESS_KEY_ID", &self.access_key),
            ("AWS_SECRET_ACCESS_KEY", &self.secret_key),
        ]
    }

    /// The same for the SDK in this process.
    pub fn sdk_config(&self) -> Builder {
        let credentials = Credentials::new(&self.access_key, &self.secret_key, None, None, "test");
        aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .endpoint_url(&self.endpoint)
            .force_path_style(true)
            .region(Region::from_static(REGION))
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .credentials_provider(credentials)
    }
}

/// Dropped, it closes the port and every connection.
pub struct FakeS3 {
    pub endpoint: String,
    store: Store,
    accept: JoinHandle<()>,
}

impl Drop for FakeS3 {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

impl FakeS3 {
    pub async fn start() -> FakeS3 {
        let store = Store::default();
        let mut s3 = S3ServiceBuilder::new(store.clone());
        s3.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        s3.set_access(operations::OneBucket);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let endpoint = format!("http://{}", listener.local_addr().expect("address"));
        let accept = tokio::spawn(front::accept(listener, store.clone(), s3.build()));
        FakeS3 {
            endpoint,
            store,
            accept,
        }
    }

    pub fn access(&self) -> S3Access {
        S3Access {
            endpoint: self.endpoint.clone(),
            access_key: ACCESS_KEY.to_owned(),
            secret_key: SECRET_KEY.to_owned(),
        }
    }
}

/// What is in the bucket, and changes to it without a request.
impl FakeS3 {
    /// The keys, sorted.
    pub fn objects(&self) -> Vec<String> {
        self.store.lock().objects.keys().cloned().collect()
    }

    pub fn object(&self, key: &str) -> Option<Bytes> {
        let state = self.store.lock();
        let object = state.objects.get(key)?;
        Some(object.body.clone())
    }

    /// All keys with their bytes.
    pub fn snapshot(&self) -> BTreeMap<String, Bytes> {
        let state = self.store.lock();
        let objects = state.objects.iter();
        objects
            .map(|(key, object)| (key.clone(), object.body.clone()))
            .collect()
    }

    pub fn put(&self, key: &str, body: impl Into<Bytes>) {
        self.put_object(key, Object::new(body.into(), About::default()));
    }

    /// [`FakeS3::put`] with a Content-Type and user metadata.
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
        let about = About {
            content_type: Some(content_type.parse().unwrap()),
            metadata: Some(metadata),
        };
        self.put_object(key, Object::new(body.into(), about));
    }

    fn put_object(&self, key: &str, object: Object) {
        self.store.lock().objects.insert(key.to_owned(), object);
    }

    /// An object's Content-Type and user metadata.
    pub fn description(&self, key: &str) -> (Option<String>, Metadata) {
        let about = self.store.lock().objects[key].about.clone();
        let content_type = about.content_type.map(|kind| kind.to_string());
        (content_type, about.metadata.unwrap_or_default())
    }

    pub fn remove(&self, key: &str) {
        self.store.lock().objects.remove(key);
    }

    /// How many multipart uploads are in progress.
    pub fn uploads(&self) -> usize {
        self.store.lock().uploads.len()
    }

    /// How many parts of multipart uploads in progress are stored. [`FakeS3::count`] counts those
    /// that are still arriving too.
    pub fn parts(&self) -> usize {
        let state = self.store.lock();
        state
            .uploads
            .values()
            .map(|upload| upload.parts.len())
            .sum()
    }

    /// Panics if a multipart upload is in progress: nothing half-sent may be left.
    pub fn assert_no_uploads(&self) {
        let left = self.uploads();
        let requests = self.requests();
        assert_eq!(left, 0, "multipart uploads left; requests: {requests:#?}");
    }

    /// Makes another user the initiator of a multipart upload.
    pub fn give_away(&self, upload_id: &str) {
        let mut state = self.store.lock();
        let upload = state.uploads.get_mut(upload_id).expect("an upload");
        upload.initiator = "them".to_owned();
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
}

/// How it differs from Amazon S3, from now on.
impl FakeS3 {
    /// GET sends any version, whatever `If-Match` says, as rclone's `serve s3` does.
    pub fn ignore_if_match(&self) {
        self.store.lock().ignores_if_match = true;
    }

    /// Changes are made whatever `If-Match`, `If-None-Match` and `x-amz-copy-source-if-match` say,
    /// as Garage does.
    pub fn ignore_conditions(&self) {
        self.store.lock().ignores_conditions = true;
    }

    /// ETags are no MD5s, as under SSE-KMS.
    pub fn encrypt(&self) {
        self.store.lock().has_random_etags = true;
    }

    /// The first page of every list is empty and says that there is more, as S3 may do.
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
