//! Opens a store: from the AWS settings of the environment to a client of the SDK, and how long
//! each kind of request may take.
//!
//! Called by the binary, once. The endpoint that is found here is handed back to the SDK, so that
//! what follows from it (signed bodies, path-style addresses, checksums) and where requests go
//! can't disagree.

use super::answers::check_answers;
use super::errors::sentence;
use super::http::StoreHttp;
use super::{KeptConditions, S3Store, StartError};
use aws_config::{BehaviorVersion, Region, SdkConfig, retry::RetryConfig, timeout::TimeoutConfig};
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::{RetryPartition, TokenBucket};
use aws_sdk_s3::config::{
    ConfigBag, Credentials, Intercept, ProvideCredentials, RuntimeComponents,
};
use aws_sdk_s3::config::{RequestChecksumCalculation, ResponseChecksumValidation};
use aws_sdk_s3::error::BoxError;
use aws_smithy_runtime_api::client::interceptors::context::BeforeSerializationInterceptorContextRef;
use aws_smithy_runtime_api::client::{interceptors::dyn_dispatch_hint, orchestrator::Metadata};
use aws_types::service_config::ServiceConfigKey;
use hyper::Uri;
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use std::sync::Arc;
use std::time::Duration;

/// The version of the SDK's defaults.
const DEFAULTS: fn() -> BehaviorVersion = BehaviorVersion::v2026_01_12;
/// Limit on the attempts of a request, the first one included. The SDK waits longer each time, and
/// slows down on SlowDown.
pub(super) const ATTEMPTS: u32 = 5;
/// The pause before the second attempt of a request that the SDK does not retry; each further one
/// is twice as long.
const FIRST_RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Limit on the time that a connection takes to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Limit on one attempt of a request that has no body and that S3 answers from its index: HEAD,
/// DELETE, the first byte of a GET. S3 takes tens of milliseconds, and advises another try after 2
/// seconds ([S3: timeouts and
/// retries](https://docs.aws.amazon.com/whitepapers/latest/s3-optimizing-performance-best-practices/timeouts-and-retries-for-latency-sensitive-applications.html));
/// five times as long leaves room for slower stores.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Limit on one attempt of a request for one page of what is left to clean up: stores walk over
/// deleted keys before they find one to list.
pub const LIST_TIMEOUT: Duration = Duration::from_secs(30);
/// The region with which requests to a server without regions are signed.
const NO_REGION: Region = Region::from_static("us-east-1");
/// Lengths of bucket names, in bytes: at most 63 in S3, up to 255 for older buckets and in other
/// stores ([S3: bucket naming
/// rules](https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html)).
const BUCKET_NAME_LENGTH: std::ops::RangeInclusive<usize> = 3..=255;

/// The pause before an attempt, counted from 0, of a request that the SDK does not retry.
pub(super) fn retry_pause(attempt: u32) -> Duration {
    match attempt {
        0 => Duration::ZERO,
        attempt => FIRST_RETRY_PAUSE * (1 << (attempt - 1)),
    }
}

impl S3Store {
    /// Opens a bucket with the AWS settings of the environment. Asks the source of the credentials,
    /// not yet the store. Of S3 itself it relies on all conditions, and of other servers on none
    /// until [`S3Store::find_conditions`] has tried them out.
    pub async fn open(bucket: &str) -> Result<S3Store, StartError> {
        check_bucket_name(bucket)?;
        let settings = load_settings().await?;
        let endpoint = find_endpoint(&settings)?;
        let region = settings
            .region()
            .filter(|region| !region.as_ref().is_empty());
        if endpoint.is_none() && region.is_none() {
            return Err(StartError::NoRegion {
                profile: profile_name(),
            });
        }
        find_credentials(&settings).await?;
        let mut config = aws_sdk_s3::config::Builder::from(&settings);
        config = config
            .interceptor(super::metrics::RecordRequests)
            .interceptor(AnswerTimeouts);
        // The SDK's own token bucket stops all retries of the process once a hundred are under way.
        let tries = RetryPartition::custom("sftpd").token_bucket(TokenBucket::unlimited());
        config.set_retry_partition(Some(tries.build()));
        config.set_endpoint_url(endpoint.as_ref().map(|endpoint| endpoint.url.clone()));
        if endpoint.is_some() {
            // Servers other than AWS rarely have a host name per bucket, and not all know the newer
            // checksums.
            config.set_force_path_style(Some(true));
            config.set_region(Some(region.cloned().unwrap_or(NO_REGION)));
            let unset = |variable, key| find_setting(&settings, variable, key).is_none();
            if unset(
                "AWS_REQUEST_CHECKSUM_CALCULATION",
                "request_checksum_calculation",
            ) {
                config.set_request_checksum_calculation(Some(
                    RequestChecksumCalculation::WhenRequired,
                ));
            }
            if unset(
                "AWS_RESPONSE_CHECKSUM_VALIDATION",
                "response_checksum_validation",
            ) {
                config.set_response_checksum_validation(Some(
                    ResponseChecksumValidation::WhenRequired,
                ));
            }
        }
        let is_aws = endpoint.is_none();
        let url = endpoint.as_ref().map(|endpoint| endpoint.url.clone());
        let unsigned_payload = endpoint.is_none_or(|endpoint| endpoint.over_tls);
        // AWS documents that it keeps them all.
        let conditions = match is_aws {
            true => KeptConditions::ALL,
            false => KeptConditions::NONE,
        };
        Ok(S3Store {
            unsigned_payload,
            is_aws,
            conditions,
            endpoint: url,
            ..S3Store::new(Client::from_conf(config.build()), bucket)
        })
    }

    /// Uses a client that the caller made, with its timeouts and retries. Bodies are signed, and no
    /// condition is relied on until [`S3Store::with_conditions`]: give it
    /// [`KeptConditions::ALL`] for S3 itself, or what [`S3Store::find_conditions`] has found.
    pub fn new(client: Client, bucket: &str) -> S3Store {
        S3Store {
            client: check_answers(&client),
            bucket: bucket.to_owned(),
            unsigned_payload: false,
            is_aws: false,
            conditions: KeptConditions::NONE,
            endpoint: None,
            doubts: Arc::default(),
        }
    }

    /// Do requests carry checksums? With AWS they do unless its settings say otherwise.
    pub fn checksums(&self) -> bool {
        let setting = self.client.config().request_checksum_calculation();
        setting.is_none_or(|setting| *setting == RequestChecksumCalculation::WhenSupported)
    }

    /// The id of the access key that the SDK finds, which is no secret.
    pub async fn access_key() -> Result<String, StartError> {
        let credentials = find_credentials(&load_settings().await?).await?;
        Ok(credentials.access_key_id().to_owned())
    }
}

/// Refuses names that no store allows. S3 itself refuses the rest.
fn check_bucket_name(bucket: &str) -> Result<(), StartError> {
    let allowed =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':');
    if BUCKET_NAME_LENGTH.contains(&bucket.len()) && bucket.bytes().all(allowed) {
        return Ok(());
    }
    Err(StartError::BucketName {
        bucket: bucket.to_owned(),
    })
}

async fn load_settings() -> Result<SdkConfig, StartError> {
    // A body or an answer may take as long as it moves: instead of a timeout, silence is watched
    // (see `signs.rs`).
    let timeouts = TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT);
    let loader = aws_config::defaults(DEFAULTS())
        .retry_config(RetryConfig::standard().with_max_attempts(ATTEMPTS))
        .timeout_config(timeouts.build());
    let loader = match find_ca_bundle().await {
        Some(file) => loader.http_client(trusting_http(&file)?),
        None => loader,
    };
    Ok(loader.load().await)
}

/// A setting from the variable, or else from the profile, as the SDK itself looks for it: first the
/// one for S3 (`AWS_…_S3`, the profile's `services` section), then the one for all services. An
/// empty one counts as unset.
fn find_setting(settings: &SdkConfig, variable: &str, key: &str) -> Option<String> {
    let key = ServiceConfigKey::builder()
        .service_id("S3")
        .env(variable)
        .profile(key)
        .build()
        .ok()?;
    let found = settings.service_config()?.load_config(key)?;
    (!found.is_empty()).then_some(found)
}

/// An S3 server other than AWS.
struct Endpoint {
    url: String,
    over_tls: bool,
}

/// The endpoint that the settings name, if they name one and don't say to ignore it.
fn find_endpoint(settings: &SdkConfig) -> Result<Option<Endpoint>, StartError> {
    let Some(url) = find_setting(settings, "AWS_ENDPOINT_URL", "endpoint_url") else {
        return Ok(None);
    };
    let parsed: Option<Uri> = url.parse().ok();
    match parsed.as_ref().and_then(Uri::scheme_str) {
        Some("http") => Ok(Some(Endpoint {
            url,
            over_tls: false,
        })),
        Some("https") => Ok(Some(Endpoint {
            url,
            over_tls: true,
        })),
        _ => Err(StartError::Endpoint { endpoint: url }),
    }
}

/// The file with the certificates to trust, if the settings name one. It is needed before the
/// settings can be loaded, as roles are asked for over TLS too.
async fn find_ca_bundle() -> Option<String> {
    let files = aws_config::defaults(DEFAULTS())
        .region(NO_REGION)
        .no_credentials()
        .load()
        .await;
    find_setting(&files, "AWS_CA_BUNDLE", "ca_bundle")
}

/// The HTTP client that trusts the certificates of this file instead of the system's.
fn trusting_http(file: &str) -> Result<StoreHttp, StartError> {
    let certificates = read_ca_bundle(file)?;
    match StoreHttp::trusting(certificates) {
        Ok(http) => Ok(http),
        Err(error) => Err(unusable_bundle(file, &error)),
    }
}

/// The certificates of the file that can be used.
fn read_ca_bundle(file: &str) -> Result<RootCertStore, StartError> {
    let bytes = std::fs::read(file).map_err(|error| unusable_bundle(file, &error))?;
    let mut usable = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&bytes) {
        let certificate = certificate.map_err(|error| unusable_bundle(file, &error))?;
        if let Err(error) = usable.add(certificate) {
            log::warn!("a certificate in {file} can't be used and is not trusted: {error}");
        }
    }
    match usable.is_empty() {
        true => Err(StartError::CaBundle {
            file: file.to_owned(),
            why: "it holds no certificate".to_owned(),
        }),
        false => Ok(usable),
    }
}

fn unusable_bundle(file: &str, error: &dyn std::error::Error) -> StartError {
    StartError::CaBundle {
        file: file.to_owned(),
        why: error.to_string(),
    }
}

async fn find_credentials(settings: &SdkConfig) -> Result<Credentials, StartError> {
    let Some(provider) = settings.credentials_provider() else {
        return Err(StartError::NoCredentials {
            profile: profile_name(),
        });
    };
    provider
        .provide_credentials()
        .await
        .map_err(|error| credentials_error(&error))
}

/// The error for a failure to get credentials.
pub(super) fn credentials_error(error: &CredentialsError) -> StartError {
    let why = sentence(error);
    match error {
        CredentialsError::CredentialsNotLoaded(_) => StartError::NoCredentials {
            profile: profile_name(),
        },
        CredentialsError::InvalidConfiguration(_) => StartError::CredentialSettings {
            profile: profile_name(),
            why,
        },
        // A role's server, or a command of the profile, which may recover.
        _ => StartError::CredentialsUnavailable {
            profile: profile_name(),
            why,
        },
    }
}

/// The name of the profile that the SDK uses.
pub(super) fn profile_name() -> String {
    match std::env::var("AWS_PROFILE") {
        Ok(name) if !name.is_empty() => name,
        _ => "default".to_owned(),
    }
}

/// Ends an attempt of a request that should have been answered by now, so that the next one is
/// made. Otherwise each would wait as long as the upload of a large part may take. Limits whole
/// attempts only: the SDK keeps a pool of connections for each read timeout.
#[derive(Debug)]
pub struct AnswerTimeouts;

/// The limit on one attempt of an operation; `None` for those that send a body, that answer with a
/// long one, or on which S3 works for minutes: these may not be silent (see `resend.rs`).
fn attempt_timeout(operation: &str) -> Option<Duration> {
    match operation {
        "HeadObject" | "HeadBucket" | "GetObject" | "DeleteObject" => Some(ANSWER_TIMEOUT),
        "CreateMultipartUpload" | "AbortMultipartUpload" => Some(ANSWER_TIMEOUT),
        "GetBucketLifecycleConfiguration" => Some(ANSWER_TIMEOUT),
        "ListMultipartUploads" | "ListParts" => Some(LIST_TIMEOUT),
        // PutObject, UploadPart; CompleteMultipartUpload, CopyObject, UploadPartCopy; ListObjectsV2.
        _ => None,
    }
}

#[dyn_dispatch_hint]
impl Intercept for AnswerTimeouts {
    fn name(&self) -> &'static str {
        "AnswerTimeouts"
    }

    fn read_before_serialization(
        &self,
        _: &BeforeSerializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let timeout = bag
            .load::<Metadata>()
            .and_then(|metadata| attempt_timeout(metadata.name()));
        if let Some(timeout) = timeout {
            let of_client = bag
                .load::<TimeoutConfig>()
                .cloned()
                .unwrap_or_else(TimeoutConfig::disabled);
            let timeouts = of_client
                .into_builder()
                .operation_attempt_timeout(timeout)
                .build();
            bag.interceptor_state().store_put(timeouts);
        }
        Ok(())
    }
}
