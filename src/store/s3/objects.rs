//! Whole objects: HEAD, PUT and copy.

use super::super::patience::SignsOfLife;
use super::super::{
    Attributes, Condition, CopySource, Entry, Key, ListRequest, Object, Result, Store, StoreError,
};
use super::S3Store;
use super::doubts::WRITE_ID;
use super::errors::{failed, status, uncertain};
use super::fields::{
    etag, if_match, if_none_match, metadata, object, size, storage_class, uncertain_under,
};
use super::resend::{TRIES, as_doubt, no_answer, send_once};
use super::signs::WatchRequest;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::head_object::{HeadObjectError, HeadObjectOutput};
use aws_sdk_s3::types::{ChecksumMode, ChecksumType, StorageClass};
use bytes::Bytes;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// What S3 calls it.
const PUT: &str = "PutObject";
/// All but RFC 3986's unreserved characters and the slash.
const NOT_IN_A_URL_PATH: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~')
    .remove(b'/');

impl S3Store {
    /// HeadObject.
    pub(super) async fn head_object(&self, key: &Key) -> Result<Object> {
        let request = self.client.head_object();
        let request = request.bucket(&self.bucket).key(key.as_str());
        match request.send().await {
            Ok(out) => describe(out),
            Err(error) if is_explained(&error) => Err(failed(error)),
            Err(_in_doubt) => self.find_in_list(key).await,
        }
    }

    /// Looks an object up by a list of one, if the answer to HEAD is in doubt.
    async fn find_in_list(&self, key: &Key) -> Result<Object> {
        let request = ListRequest {
            prefix: key,
            folded: false,
            after: None,
            limit: 1,
        };
        let page = self.list(request).await?;
        match page.entries.into_iter().next() {
            Some(Entry::Object(found, object)) if found == key.as_str() => Ok(object),
            Some(_) | None => Err(StoreError::NotFound),
        }
    }

    /// PutObject, sent again if it is silent. Returns the ETag.
    ///
    /// The store may carry out a silent try late. So before the next one it is looked what is
    /// there, and only that may be replaced, by this try or by one that is late itself.
    pub(super) async fn put_until_answered(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<String> {
        let request = self.put_object(key, body.clone(), attributes, condition);
        if let Some(answer) = send_once(PUT, Duration::ZERO, request).await {
            return answer;
        }
        for _ in 1..TRIES {
            let now = match self.look_for_put(key, attributes, condition).await {
                AfterSilence::Done { etag } => return Ok(etag),
                AfterSilence::Open(condition) => condition,
            };
            let request = self.put_object(key, body.clone(), attributes, &now);
            match send_once(PUT, Duration::ZERO, request).await {
                Some(Ok(etag)) => return Ok(etag),
                Some(Err(StoreError::Precondition)) if now != *condition => {
                    let why = "the object changed while the store did not answer PutObject";
                    return Err(StoreError::Unknown(why.to_owned()));
                }
                Some(Err(refusal)) => return Err(as_doubt(refusal)),
                None => {}
            }
        }
        Err(StoreError::Unknown(no_answer(PUT)))
    }

    /// Looks what a silent PutObject has done.
    async fn look_for_put(
        &self,
        key: &Key,
        attributes: &Attributes,
        condition: &Condition,
    ) -> AfterSilence {
        // It has its own time, after that of the request in doubt.
        SignsOfLife::current().give();
        let found = self.head_object(key).await;
        let write_id = attributes.metadata.get(WRITE_ID);
        match (found, condition) {
            (Ok(found), _) if write_id.is_some() && found.write_id.as_ref() == write_id => {
                AfterSilence::Done { etag: found.etag }
            }
            (Ok(found), Condition::None) if self.conditions.put_unchanged => {
                AfterSilence::Open(Condition::Unchanged(found.etag))
            }
            (Err(StoreError::NotFound), Condition::None) if self.conditions.put_absent => {
                AfterSilence::Open(Condition::Absent)
            }
            (_, condition) => AfterSilence::Open(condition.clone()),
        }
    }

    /// PutObject. Returns the ETag.
    pub(super) async fn put_object(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<String> {
        let kept = self.conditions;
        let request = self.client.put_object();
        let request = request
            .bucket(&self.bucket)
            .key(key.as_str())
            .body(body.into())
            .set_content_type(attributes.content_type.clone())
            .set_cache_control(attributes.cache_control.clone())
            .set_content_disposition(attributes.content_disposition.clone())
            .set_content_encoding(attributes.content_encoding.clone())
            .set_content_language(attributes.content_language.clone())
            .set_storage_class(storage_class(attributes))
            .set_metadata(metadata(attributes))
            .set_if_none_match(if_none_match(condition, kept.put_absent))
            .set_if_match(if_match(condition, kept.put_unchanged))
            .customize()
            .interceptor(WatchRequest);
        let request = match self.unsigned_payload {
            true => request.disable_payload_signing(),
            false => request,
        };
        match request.send().await {
            Ok(out) => etag(out.e_tag),
            Err(error) => Err(uncertain_under(condition, error)),
        }
    }

    /// CopyObject. Returns the ETag of the copy.
    pub(super) async fn copy_object(
        &self,
        from: CopySource<'_>,
        to: &Key,
        condition: &Condition,
    ) -> Result<String> {
        let kept = self.conditions;
        let source_etag = match kept.copy_source {
            true => Some(from.version.etag.clone()),
            false => None,
        };
        let request = self.client.copy_object();
        let request = request
            .bucket(&self.bucket)
            .key(to.as_str())
            .copy_source(self.copy_source(from.key))
            .set_copy_source_if_match(source_etag)
            .set_if_none_match(if_none_match(condition, kept.copy_absent))
            .set_storage_class(
                from.version
                    .storage_class
                    .as_deref()
                    .map(StorageClass::from),
            );
        match request.send().await {
            Ok(out) => etag(out.copy_object_result.and_then(|copy| copy.e_tag)),
            Err(error) => match error.code() {
                // AWS says InvalidRequest for a source over 5 GiB, others EntityTooLarge.
                Some("InvalidRequest" | "EntityTooLarge") => Err(StoreError::TooLarge),
                Some("NoSuchKey") => Err(StoreError::NotFound),
                Some(_) | None => Err(uncertain(error)),
            },
        }
    }

    /// Whether both objects have these versions, and a checksum of their whole content in common
    /// ([S3: object
    /// integrity](https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html)).
    pub(super) async fn compare_checksums(&self, keys: [&Key; 2], versions: [&str; 2]) -> bool {
        let mut found = Vec::new();
        for (key, version) in keys.into_iter().zip(versions) {
            match self.find_checksums(key, version).await {
                Some(checksums) => found.push(checksums),
                None => return false,
            }
        }
        match found.as_slice() {
            [one, other] => one
                .iter()
                .zip(other)
                .any(|pair| matches!(pair, (Some(one), Some(other)) if one == other)),
            _ => false,
        }
    }

    /// The checksums of a version as a whole, always in the same order.
    async fn find_checksums(&self, key: &Key, version: &str) -> Option<[Option<String>; 5]> {
        let request = self.client.head_object();
        let request = request
            .bucket(&self.bucket)
            .key(key.as_str())
            .checksum_mode(ChecksumMode::Enabled);
        // It has its own time, after that of the request in doubt.
        SignsOfLife::current().give();
        let out = request.send().await.ok()?;
        if etag(out.e_tag).ok()? != version || out.checksum_type == Some(ChecksumType::Composite) {
            return None;
        }
        Some([
            out.checksum_crc64_nvme,
            out.checksum_crc32,
            out.checksum_crc32_c,
            out.checksum_sha256,
            out.checksum_sha1,
        ])
    }

    /// `x-amz-copy-source` is a header: URL-encoded, and without a leading slash.
    pub(super) fn copy_source(&self, key: &Key) -> String {
        let key = utf8_percent_encode(key.as_str(), NOT_IN_A_URL_PATH);
        format!("{}/{key}", self.bucket)
    }
}

/// What a look after a silent PutObject has found.
enum AfterSilence {
    /// It was carried out.
    Done { etag: String },
    /// It was not yet. The next try goes under this condition.
    Open(Condition),
}

/// Whether an answer to HEAD is certainly from S3. S3 gives no reason for a failure of HEAD, so a
/// proxy could have sent it.
fn is_explained(error: &SdkError<HeadObjectError>) -> bool {
    match (status(error), error.raw_response()) {
        (Some(404), Some(answer)) => {
            let mut headers = answer.headers().iter();
            headers.any(|(name, _)| name.starts_with("x-amz-"))
        }
        (Some(400), _) => false,
        (_, _) => true,
    }
}

/// What HEAD says of an object.
fn describe(out: HeadObjectOutput) -> Result<Object> {
    let mut object = object(
        size(out.content_length),
        out.e_tag,
        out.last_modified,
        out.storage_class,
    )?;
    let mut metadata: BTreeMap<_, _> = out.metadata.unwrap_or_default().into_iter().collect();
    object.write_id = metadata.remove(WRITE_ID);
    object.attributes = Some(Arc::new(Attributes {
        content_type: out.content_type,
        cache_control: out.cache_control,
        content_disposition: out.content_disposition,
        content_encoding: out.content_encoding,
        content_language: out.content_language,
        storage_class: object.storage_class.clone(),
        metadata,
    }));
    Ok(object)
}
