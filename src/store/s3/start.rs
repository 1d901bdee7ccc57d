//! Checks whether a bucket can be served, by one list request before the first client, and says
//! what its outcome means to the operator. Called by the binary. One table says which failures need
//! the operator, and which may pass ([`StartError::needs_operator`]).

use super::answers::NotFromS3;
use super::errors::{find_cause, sentence, status};
use super::{S3Store, client};
use crate::store::Key;
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use std::error::Error;

/// Why a bucket can't be served.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The sentences say it.
#[non_exhaustive]
pub enum StartError {
    #[error(
        "no AWS region is set: set AWS_REGION or the region of profile {profile:?}, \
         or AWS_ENDPOINT_URL for an S3 server other than AWS"
    )]
    NoRegion { profile: String },
    #[error(
        "no AWS credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not both set, profile {profile:?} has \
         none, and no container or instance role was found: set both variables, or AWS_PROFILE"
    )]
    NoCredentials { profile: String },
    #[error("the AWS credentials of profile {profile:?} can't be used: {why}")]
    CredentialSettings { profile: String, why: String },
    #[error(
        "can't load the AWS credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not both set, and profile \
         {profile:?} or the role has none to give ({why}): set both variables, or AWS_PROFILE, or correct that source"
    )]
    CredentialsUnavailable { profile: String, why: String },
    #[error(
        "the endpoint {endpoint:?} is no URL like https://s3.example.com or http://10.0.0.5:9000: correct \
         AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile's endpoint_url"
    )]
    Endpoint { endpoint: String },
    #[error(
        "the CA bundle {file:?} can't be used: {why}: set AWS_CA_BUNDLE to a file of PEM certificates"
    )]
    CaBundle { file: String, why: String },
    #[error(
        "{bucket:?} can't be the name of a bucket (3 to 63 lower-case letters, digits, dots and hyphens): correct --store"
    )]
    BucketName { bucket: String },
    #[error("there is no bucket {bucket:?}: create it, or correct --store")]
    NoSuchBucket { bucket: String },
    #[error("the bucket is not in the region that requests go to ({why}): set AWS_REGION{}", region_value(.region))]
    OtherRegion { region: Option<String>, why: String },
    #[error(
        "the store does not accept the credentials ({why}): correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or \
         the profile"
    )]
    WrongCredentials { why: String },
    #[error(
        "the store does not accept the session token ({why}): renew AWS_SESSION_TOKEN, or log in to the profile again"
    )]
    WrongToken { why: String },
    #[error("this machine's clock is wrong ({why}): set it (NTP)")]
    WrongClock { why: String },
    #[error("the account can't use the store ({why}): ask the store's operator")]
    Account { why: String },
    #[error(
        "the store's certificate is of an unknown issuer ({why}): set AWS_CA_BUNDLE to a PEM file with the certificate \
         of its CA"
    )]
    UnknownIssuer { why: String },
    #[error(
        "the endpoint speaks plain HTTP ({why}): write http:// instead of https://, or give the port of its TLS"
    )]
    PlainHttp { why: String },
    #[error("the store does not answer ({why}): check the network and the endpoint")]
    Unreachable { why: String },
    #[error("{why}, and check the endpoint")]
    NotS3 { why: String },
    #[error("the store is overloaded ({why}): try again later")]
    Overloaded { why: String },
    #[error("the store has a fault ({why}): try again later, or ask the store's operator")]
    Faulty { why: String },
    #[error("the store answers {why}: check the AWS_* settings, the endpoint and the region")]
    Refused { why: String },
}

fn region_value(region: &Option<String>) -> String {
    match region {
        Some(region) => format!("={region}"),
        None => String::new(),
    }
}

impl StartError {
    /// Must the operator change something before another attempt? Otherwise the failure may pass.
    pub fn needs_operator(&self) -> bool {
        match self {
            StartError::NoRegion { .. }
            | StartError::Endpoint { .. }
            | StartError::CaBundle { .. } => true,
            StartError::NoCredentials { .. } | StartError::CredentialSettings { .. } => true,
            StartError::BucketName { .. }
            | StartError::NoSuchBucket { .. }
            | StartError::OtherRegion { .. } => true,
            StartError::WrongCredentials { .. }
            | StartError::WrongToken { .. }
            | StartError::WrongClock { .. } => true,
            StartError::Account { .. }
            | StartError::UnknownIssuer { .. }
            | StartError::PlainHttp { .. } => true,
            StartError::CredentialsUnavailable { .. } | StartError::Unreachable { .. } => false,
            StartError::NotS3 { .. }
            | StartError::Overloaded { .. }
            | StartError::Faulty { .. }
            | StartError::Refused { .. } => false,
        }
    }
}

/// What the credentials may do with directories.
#[derive(Debug, PartialEq, Eq)]
pub enum Listing {
    /// Clients see them.
    Allowed,
    /// Clients see none, but can put files: a drop box. Holds the store's reason.
    Refused(String),
}

impl S3Store {
    /// Lists one entry below the prefix, to check credentials, region and bucket before clients
    /// connect.
    pub async fn check(&self, prefix: &Key) -> Result<Listing, StartError> {
        let request = self
            .client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(prefix.as_str())
            .max_keys(1);
        match request.send().await {
            Ok(_) => Ok(Listing::Allowed),
            Err(error) => self.judge(&error),
        }
    }

    /// The meaning of a failed list request. The codes are those of S3
    /// ([error responses](https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html)).
    fn judge<E>(&self, error: &SdkError<E>) -> Result<Listing, StartError>
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let Some(status) = status(error) else {
            return Err(unanswered(error));
        };
        if let Some(doubt) = find_cause::<NotFromS3>(error) {
            let why = doubt.to_string();
            return Err(StartError::NotS3 { why });
        }
        let message = error.message().unwrap_or_default();
        let why = match error.code() {
            Some(code) => format!("{code}: {message}"),
            None => format!("HTTP status {status}"),
        };
        let bucket = self.bucket.clone();
        Err(match error.code() {
            Some("AccessDenied") if is_about_credentials(message) => {
                StartError::WrongCredentials { why }
            }
            Some("AccessDenied") => return Ok(Listing::Refused(why)),
            Some(
                "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "NotSignedUp" | "InvalidSecurity",
            ) => StartError::WrongCredentials { why },
            Some("ExpiredToken" | "InvalidToken" | "TokenRefreshRequired") => {
                StartError::WrongToken { why }
            }
            Some("RequestTimeTooSkewed") => StartError::WrongClock { why },
            Some("AccountProblem" | "AllAccessDisabled" | "UserSuspended") => {
                StartError::Account { why }
            }
            Some("NoSuchBucket") => StartError::NoSuchBucket { bucket },
            Some("InvalidBucketName") => StartError::BucketName { bucket },
            Some("PermanentRedirect" | "AuthorizationHeaderMalformed") => StartError::OtherRegion {
                region: bucket_region(error),
                why,
            },
            _ if status == 404 => StartError::NoSuchBucket { bucket },
            _ if status == 301 => StartError::OtherRegion {
                region: bucket_region(error),
                why,
            },
            _ if matches!(status, 429 | 503) => StartError::Overloaded { why },
            _ if status >= 500 => StartError::Faulty { why },
            _ => StartError::Refused { why },
        })
    }
}

/// Garage has no code for wrong credentials, only a message ([its signature
/// check](https://git.deuxfleurs.fr/Deuxfleurs/garage/src/branch/main-v2/src/api/common/signature)).
fn is_about_credentials(message: &str) -> bool {
    message.contains("Invalid signature") || message.contains("No such key")
}

/// The region that the bucket is in, if S3 says so.
fn bucket_region<E>(error: &SdkError<E>) -> Option<String> {
    let answer = error.raw_response()?;
    answer
        .headers()
        .get("x-amz-bucket-region")
        .map(str::to_owned)
}

/// The meaning of a request without an answer.
fn unanswered<E: Error + 'static>(error: &SdkError<E>) -> StartError {
    if let Some(error) = find_cause::<CredentialsError>(error) {
        return client::credentials_error(error);
    }
    let why = sentence(error);
    match find_cause::<rustls::Error>(error) {
        Some(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer)) => {
            StartError::UnknownIssuer { why }
        }
        Some(rustls::Error::InvalidMessage(_)) => StartError::PlainHttp { why },
        _ => StartError::Unreachable { why },
    }
}
