//! Errors of the SDK as [`StoreError`]s.

use super::super::StoreError;
use super::answers::NotFromS3;
use super::tries::NeverSent;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use std::error::Error;

/// An error with its causes, for people: the SDK's own text comes with a dump of its structures.
pub fn sentence(error: &(dyn std::error::Error + 'static)) -> String {
    let mut texts = Vec::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(doubt) = cause.downcast_ref::<NotFromS3>() {
            return doubt.to_string();
        }
        if let Some(refused) = cause.downcast_ref::<NeverSent>() {
            return refused.to_string();
        }
        texts.push(cause.to_string());
        next = cause.source();
    }
    texts.join(": ")
}

/// The first cause of this type. An I/O error holds its cause inside, and its `source` is the
/// source of that cause.
pub fn find_cause<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = match error.downcast_ref::<std::io::Error>() {
            Some(error) => error.get_ref().map(|inner| inner as &(dyn Error + 'static)),
            None => error.source(),
        };
    }
    None
}

/// The HTTP status of the answer, if there is one.
pub fn status<E>(error: &SdkError<E>) -> Option<u16> {
    let answer = error.raw_response()?;
    Some(answer.status().as_u16())
}

/// The error of a request that is safe to repeat: what the store answered, or why it didn't.
pub fn failed<E>(error: SdkError<E>) -> StoreError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    let text = explain(&error);
    match (error.code(), status(&error)) {
        // An answer to HEAD has no body: the SDK makes a code of its status.
        (Some("NoSuchKey" | "NotFound" | "NoSuchLifecycleConfiguration"), _) => {
            StoreError::NotFound
        }
        (Some("NoSuchBucket"), _) => StoreError::NoSuchBucket,
        (Some("ConditionalRequestConflict"), _) | (_, Some(412)) => StoreError::Precondition,
        (_, Some(403)) => StoreError::Forbidden(text),
        (_, _) => StoreError::Other(text),
    }
}

/// The error of a request that makes or removes an object: unless the store clearly refused, it may
/// have done so.
///
/// A repeated request can be refused because the first one succeeded: `NoSuchUpload`, or 412 under
/// `If-None-Match`.
pub fn uncertain<E>(error: SdkError<E>) -> StoreError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    let is_refusal = matches!(status(&error), Some(400 | 403 | 409))
        || error.code() == Some("NoSuchBucket")
        || find_cause::<NeverSent>(&error).is_some();
    let text = explain(&error);
    match failed(error) {
        refusal if is_refusal => refusal,
        StoreError::Precondition => StoreError::Precondition,
        _ => StoreError::Unknown(text),
    }
}

/// The store's own words, or what is known without them.
fn explain<E>(error: &SdkError<E>) -> String
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    match (error.code(), error.message(), status(error)) {
        (Some(code), Some(message), _) => format!("{code}: {message}"),
        (Some(code), None, Some(status)) => format!("{code} (HTTP status {status})"),
        (Some(code), None, None) => code.to_owned(),
        (None, _, Some(200..300)) => sentence(error),
        (None, _, Some(400)) => {
            "HTTP status 400 without a reason, as for credentials that have expired".to_owned()
        }
        (None, _, Some(status @ 300..400)) => {
            format!("HTTP status {status}: the bucket is in another region, or a proxy answered")
        }
        (None, _, Some(status)) => format!("HTTP status {status} without S3's reason"),
        (None, _, None) => sentence(error),
    }
}
