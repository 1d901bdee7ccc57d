//! Fields of requests and answers that several operations share.

use super::super::{Attributes, Condition, Object, Part, Result, StoreError};
use super::errors::uncertain;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::DateTime;
use aws_sdk_s3::types::StorageClass;
use std::collections::HashMap;
use std::time::SystemTime;

/// The header `If-None-Match` of a condition that the store keeps.
pub fn if_none_match(condition: &Condition, kept: bool) -> Option<String> {
    match condition {
        Condition::Absent if kept => Some("*".to_owned()),
        Condition::None | Condition::Absent | Condition::Unchanged(_) => None,
    }
}

/// The header `If-Match` of a condition that the store keeps.
pub fn if_match(condition: &Condition, kept: bool) -> Option<String> {
    match condition {
        Condition::Unchanged(etag) if kept => Some(etag.clone()),
        Condition::None | Condition::Absent | Condition::Unchanged(_) => None,
    }
}

/// As [`uncertain`]. Under `If-Match` 404 says that the object is gone.
pub fn uncertain_under<E>(condition: &Condition, error: SdkError<E>) -> StoreError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    match (condition, error.code()) {
        (Condition::Unchanged(_), Some("NoSuchKey")) => StoreError::Precondition,
        (_, _) => uncertain(error),
    }
}

/// Metadata as the SDK takes it; `None` if there is none.
pub fn metadata(attributes: &Attributes) -> Option<HashMap<String, String>> {
    if attributes.metadata.is_empty() {
        return None;
    }
    Some(attributes.metadata.clone().into_iter().collect())
}

/// The storage class as the SDK takes it.
pub fn storage_class(attributes: &Attributes) -> Option<StorageClass> {
    let class = attributes.storage_class.as_deref()?;
    Some(StorageClass::from(class))
}

/// The error for an answer that lacks a field.
pub fn missing(what: &str) -> StoreError {
    StoreError::Other(format!("the store's answer holds no {what}"))
}

/// A part as the store has confirmed it.
pub fn part(
    number: u32,
    size: u64,
    found: Option<String>,
    checksum: Option<String>,
) -> Result<Part> {
    let Some(etag) = found else {
        return Err(missing("ETag"));
    };
    let mut part = Part::new(number, size, etag);
    part.checksum = checksum;
    Ok(part)
}

/// What an answer says of an object, without its attributes.
pub fn object(
    size: Option<u64>,
    found: Option<String>,
    modified: Option<DateTime>,
    class: Option<StorageClass>,
) -> Result<Object> {
    let Some(size) = size else {
        return Err(missing("size"));
    };
    let storage_class = match class {
        None | Some(StorageClass::Standard) => None,
        Some(class) => Some(class.as_str().to_owned()),
    };
    let mut object = Object::new(size, etag(found)?, time(modified));
    object.storage_class = storage_class;
    Ok(object)
}

/// A size as the SDK has it; `None` if it is missing or negative.
pub fn size(found: Option<i64>) -> Option<u64> {
    u64::try_from(found?).ok()
}

fn time(found: Option<DateTime>) -> SystemTime {
    match found.map(SystemTime::try_from) {
        Some(Ok(time)) => time,
        Some(Err(_)) | None => SystemTime::UNIX_EPOCH,
    }
}

/// The ETag of an answer, with its quotes.
pub fn etag(found: Option<String>) -> Result<String> {
    match found {
        Some(etag) => Ok(quote(&etag)),
        None => Err(missing("ETag")),
    }
}

/// An ETag with its quotes, which some stores leave out in some answers.
pub fn quote(etag: &str) -> String {
    format!("\"{}\"", etag.trim_matches('"'))
}
