//! S3 and what speaks like it, through the AWS SDK: the only module that names it.
//!
//! Credentials, region and endpoint are the SDK's own business (`AWS_*` variables, profiles, roles).

mod answers;
mod client;
mod conditions;
mod errors;
mod identity;
mod inspect;
mod meter;
mod start;

pub use client::{ANSWER_TIMEOUT, AnswerTimeouts, LIST_TIMEOUT};
pub use start::{Listing, StartError};

use super::*;
use aws_sdk_s3::Client;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::primitives::DateTime;
use aws_sdk_s3::types::{
    ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart, EncodingType, Initiator,
    MultipartUpload, StorageClass,
};
use bytes::BytesMut;
use client::ATTEMPTS;
use errors::{failed, sentence, status, uncertain};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use std::collections::HashMap;
use std::time::Duration;

/// In bytes: what fills an SSH packet is not worth a copy.
const LARGE_PIECE: usize = 32 * 1024;

/// One bucket, or a prefix in it.
pub struct S3Store {
    client: Client,
    bucket: String,
    /// Over TLS the connection protects the body, so that its SHA-256 need not be in the signature.
    unsigned_payload: bool,
    /// AWS itself: no other endpoint is set.
    is_aws: bool,
    /// Conditions that the store is known to keep; others are not sent.
    conditions: KeptConditions,
}

impl S3Store {
    /// Multipart uploads in progress, whoever began them.
    async fn uploads(&self, prefix: &Key) -> Result<Vec<MultipartUpload>> {
        let (mut all, mut key, mut id) = (Vec::new(), None, None);
        loop {
            let request = self
                .client
                .list_multipart_uploads()
                .bucket(&self.bucket)
                .prefix(prefix.as_str());
            let request = request.encoding_type(EncodingType::Url);
            let page = request
                .set_key_marker(key)
                .set_upload_id_marker(id)
                .send()
                .await
                .map_err(failed)?;
            let names = Names::of(page.encoding_type.as_ref());
            for mut upload in page.uploads.unwrap_or_default() {
                upload.key = upload.key.map(|key| names.decode(key)).transpose()?;
                all.push(upload);
            }
            if page.is_truncated != Some(true) {
                return Ok(all);
            }
            key = page
                .next_key_marker
                .map(|key| names.decode(key))
                .transpose()?;
            id = page.next_upload_id_marker;
        }
    }

    /// Who we are to S3, which can only be learned from an upload of our own: begun, looked up and aborted. Some stores
    /// have no name for it.
    pub async fn initiator(&self, prefix: &Key) -> Result<Option<String>> {
        let probe = probe_key(prefix)?;
        let id = self.create_upload(&probe, &Attributes::default()).await?;
        let found = self.uploads(&probe).await;
        self.abort(&probe, &id).await?;
        let ours = found?
            .into_iter()
            .find(|upload| upload.upload_id() == Some(id.as_str()));
        let initiator = ours
            .as_ref()
            .and_then(MultipartUpload::initiator)
            .map(principal);
        Ok(initiator.filter(|name| !name.is_empty()))
    }

    /// One GetObject of what is missing in `body`.
    async fn get_missing(&self, key: &Key, etag: &str, body: &mut RangeBody) -> Result<Reading> {
        let Range { start, end } = body.missing;
        let request = self
            .client
            .get_object()
            .bucket(&self.bucket)
            .key(key.as_str())
            .if_match(etag);
        let mut out = request
            .range(format!("bytes={start}-{}", end - 1))
            .send()
            .await
            .map_err(failed)?;
        // Not every store keeps If-Match.
        if out.e_tag.as_deref().map(quoted) != Some(quoted(etag)) {
            return Err(StoreError::Precondition);
        }
        match content_range(out.content_range.as_deref()) {
            Some(found) if found.range == (start..end) => {}
            Some(_) | None => {
                return Ok(Reading::BrokenOff(
                    "another range than was asked for".to_owned(),
                ));
            }
        }
        while let Some(chunk) = out.body.next().await {
            match chunk {
                Ok(chunk) if body.missing.start + chunk.len() as u64 <= end => {
                    body.missing.start += chunk.len() as u64;
                    body.pieces.push(chunk);
                }
                Ok(_) => return Err(StoreError::Other("more bytes than asked for".to_owned())),
                Err(error) => return Ok(Reading::BrokenOff(sentence(&error))),
            }
        }
        if body.missing.is_empty() {
            return Ok(Reading::Done);
        }
        Ok(Reading::BrokenOff("the body ended early".to_owned()))
    }

    /// The object as a list of one tells it, where the answer to HEAD is in doubt.
    async fn look_up(&self, key: &Key) -> Result<Object> {
        let page = self
            .list(ListRequest {
                prefix: key,
                folded: false,
                after: None,
                limit: 1,
            })
            .await?;
        match page.entries.into_iter().next() {
            Some(Entry::Object(found, object)) if found == key.as_str() => Ok(object),
            _ => Err(StoreError::NotFound),
        }
    }

    /// `x-amz-copy-source` is a header: URL-encoded, and without a leading slash.
    fn copy_source(&self, key: &Key) -> String {
        format!(
            "{}/{}",
            self.bucket,
            utf8_percent_encode(key.as_str(), NOT_IN_A_URL_PATH)
        )
    }
}

#[async_trait]
impl Store for S3Store {
    async fn head(&self, key: &Key) -> Result<Object> {
        let error = match self
            .client
            .head_object()
            .bucket(&self.bucket)
            .key(key.as_str())
            .send()
            .await
        {
            Ok(out) => return described(out),
            Err(error) => error,
        };
        // S3 gives no reason for a refused HEAD, so anything in between could have said this.
        let is_explained = match (status(&error), error.raw_response()) {
            (Some(404), Some(answer)) => answer
                .headers()
                .iter()
                .any(|(name, _)| name.starts_with("x-amz-")),
            (Some(400), _) => false,
            (_, _) => true,
        };
        if is_explained {
            Err(failed(error))
        } else {
            self.look_up(key).await
        }
    }

    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>> {
        let mut body = RangeBody {
            pieces: Joined::default(),
            missing: range,
        };
        // The SDK retries a request, not a body that breaks off: go on where it did.
        let mut pauses = (0..ATTEMPTS - 1).map(|attempt| Duration::from_millis(200 << attempt));
        loop {
            match self.get_missing(key, etag, &mut body).await? {
                Reading::Done => return Ok(body.pieces.finish()),
                Reading::BrokenOff(why) => match pauses.next() {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => return Err(StoreError::Other(why)),
                },
            }
        }
    }

    async fn open(&self, key: &Key, most: u64) -> Result<(Object, Bytes)> {
        let request = self
            .client
            .get_object()
            .bucket(&self.bucket)
            .key(key.as_str());
        let mut out = match request.range(format!("bytes=0-{}", most - 1)).send().await {
            // An empty object has no first byte.
            Err(error) if status(&error) == Some(416) => {
                return Ok((self.head(key).await?, Bytes::new()));
            }
            out => out.map_err(failed)?,
        };
        let found = content_range(out.content_range.as_deref()).ok_or_else(|| missing("size"))?;
        let most = found.size.min(most);
        if found.range != (0..most) {
            return Err(StoreError::Other(
                "the store answered another range than was asked for".to_owned(),
            ));
        }
        let class = out.storage_class.take();
        let object = object(
            i64::try_from(found.size).ok(),
            out.e_tag.take(),
            out.last_modified,
            class,
        )?;
        let most = most as usize;
        let mut bytes = BytesMut::with_capacity(most);
        // What a body that breaks off did not bring is asked for again, as the rest of the object is.
        while bytes.len() < most
            && let Some(Ok(chunk)) = out.body.next().await
        {
            bytes.extend_from_slice(&chunk);
        }
        bytes.truncate(most);
        Ok((object, bytes.freeze()))
    }

    fn conditions(&self) -> KeptConditions {
        self.conditions
    }

    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<String> {
        let request = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(key.as_str())
            .body(body.into());
        let request = request
            .set_content_type(attributes.content_type.clone())
            .set_cache_control(attributes.cache_control.clone())
            .set_content_disposition(attributes.content_disposition.clone())
            .set_content_encoding(attributes.content_encoding.clone())
            .set_content_language(attributes.content_language.clone())
            .set_storage_class(attributes.storage_class.as_deref().map(StorageClass::from))
            .set_metadata(metadata(attributes));
        let kept = self.conditions;
        let request = request
            .set_if_none_match(if_none_match(condition, kept.put_absent))
            .set_if_match(if_match(condition, kept.put_unchanged))
            .customize();
        let request = if self.unsigned_payload {
            request.disable_payload_signing()
        } else {
            request
        };
        let out = request
            .send()
            .await
            .map_err(|error| uncertain_under(condition, error))?;
        etag(out.e_tag)
    }

    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()> {
        match condition {
            Condition::None => self.delete_any(key).await,
            Condition::Absent => Ok(()),
            Condition::Unchanged(etag) => self.delete_version(key, etag).await,
        }
    }

    async fn copy(&self, from: CopySource<'_>, to: &Key, condition: &Condition) -> Result<String> {
        let kept = self.conditions;
        let request = self
            .client
            .copy_object()
            .bucket(&self.bucket)
            .key(to.as_str());
        let request = request
            .copy_source(self.copy_source(from.key))
            .set_copy_source_if_match(kept.copy_source.then(|| from.etag.to_owned()))
            .set_if_none_match(if_none_match(condition, kept.copy_absent))
            .set_storage_class(from.storage_class.map(StorageClass::from));
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

    async fn list(&self, request: ListRequest<'_>) -> Result<Page> {
        let out = self
            .client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(request.prefix.as_str());
        let out = out
            .set_delimiter(request.folded.then(|| "/".to_owned()))
            .max_keys(request.limit as i32);
        // Keys may hold characters that XML can't carry.
        let out = out.encoding_type(EncodingType::Url);
        let out = out
            .set_continuation_token(request.after)
            .send()
            .await
            .map_err(failed)?;
        let names = Names::of(out.encoding_type.as_ref());
        let mut entries = Vec::with_capacity(out.contents().len() + out.common_prefixes().len());
        for found in out.contents.unwrap_or_default() {
            if let Some(key) = found.key {
                let class = found
                    .storage_class
                    .map(|class| StorageClass::from(class.as_str()));
                let object = object(found.size, found.e_tag, found.last_modified, class)?;
                entries.push(Entry::Object(names.decode(key)?, object));
            }
        }
        for prefix in out
            .common_prefixes
            .unwrap_or_default()
            .into_iter()
            .filter_map(|found| found.prefix)
        {
            entries.push(Entry::Prefix(names.decode(prefix)?));
        }
        let next = out
            .next_continuation_token
            .filter(|_| out.is_truncated == Some(true));
        Ok(Page { entries, next })
    }

    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String> {
        let out = self
            .client
            .create_multipart_upload()
            .bucket(&self.bucket)
            .key(key.as_str());
        let out = out
            .set_content_type(attributes.content_type.clone())
            .set_cache_control(attributes.cache_control.clone())
            .set_content_disposition(attributes.content_disposition.clone())
            .set_content_encoding(attributes.content_encoding.clone())
            .set_content_language(attributes.content_language.clone())
            .set_storage_class(attributes.storage_class.as_deref().map(StorageClass::from))
            .set_metadata(metadata(attributes));
        // S3 wants to know beforehand that parts will come with checksums, and hears them again at the end.
        out.set_checksum_algorithm(self.checksums().then_some(ChecksumAlgorithm::Crc32))
            .send()
            .await
            .map_err(failed)?
            .upload_id
            .ok_or_else(|| missing("upload id"))
    }

    async fn upload_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        body: Bytes,
    ) -> Result<Part> {
        let size = body.len() as u64;
        let request = self
            .client
            .upload_part()
            .bucket(&self.bucket)
            .key(key.as_str())
            .upload_id(upload_id);
        let request = request
            .part_number(number as i32)
            .body(body.into())
            .customize();
        let request = if self.unsigned_payload {
            request.disable_payload_signing()
        } else {
            request
        };
        let out = request.send().await.map_err(failed)?;
        part(number, size, out.e_tag, out.checksum_crc32)
    }

    async fn copy_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        from: PartSource<'_>,
    ) -> Result<Part> {
        let size = from.range.end - from.range.start;
        let request = self
            .client
            .upload_part_copy()
            .bucket(&self.bucket)
            .key(key.as_str())
            .upload_id(upload_id);
        let request = request
            .part_number(number as i32)
            .copy_source(self.copy_source(from.key));
        let request = request.copy_source_if_match(from.etag);
        let request =
            request.copy_source_range(format!("bytes={}-{}", from.range.start, from.range.end - 1));
        let result = request
            .send()
            .await
            .map_err(failed)?
            .copy_part_result
            .ok_or_else(|| missing("result"))?;
        part(number, size, result.e_tag, result.checksum_crc32)
    }

    async fn complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<String> {
        let sent = |part: &Part| {
            let sent = CompletedPart::builder()
                .part_number(part.number as i32)
                .e_tag(part.etag.clone());
            sent.set_checksum_crc32(part.checksum.clone()).build()
        };
        let (list, size) = (
            parts.iter().map(sent),
            parts.iter().map(|part| part.size).sum::<u64>(),
        );
        let list = CompletedMultipartUpload::builder()
            .set_parts(Some(list.collect()))
            .build();
        let request = self
            .client
            .complete_multipart_upload()
            .bucket(&self.bucket)
            .key(key.as_str());
        let kept = self.conditions;
        let request = request
            .upload_id(upload_id)
            .multipart_upload(list)
            .set_if_none_match(if_none_match(condition, kept.complete_absent))
            .set_if_match(if_match(condition, kept.complete_unchanged))
            // S3 refuses to make an object of any other size.
            .mpu_object_size(size as i64);
        let out = request
            .send()
            .await
            .map_err(|error| uncertain_under(condition, error))?;
        etag(out.e_tag)
    }

    async fn abort(&self, key: &Key, upload_id: &str) -> Result<()> {
        let request = self
            .client
            .abort_multipart_upload()
            .bucket(&self.bucket)
            .key(key.as_str());
        match request.upload_id(upload_id).send().await {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some("NoSuchUpload") => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }

    async fn stale_uploads(&self, prefix: &Key, before: SystemTime) -> Result<Vec<StaleUpload>> {
        let old = |time: Option<&DateTime>| {
            time.is_some_and(|time| SystemTime::try_from(*time).is_ok_and(|t| t < before))
        };
        let mut begun = self.uploads(prefix).await?;
        begun.retain(|upload| old(upload.initiated()));
        let mut stale = Vec::new();
        if begun.is_empty() {
            return Ok(stale);
        }
        // Where uploads have no initiator, those of other programs can't be told apart.
        let Some(us) = self.initiator(prefix).await? else {
            return Ok(stale);
        };
        let is_ours =
            |upload: &&MultipartUpload| upload.initiator().map(principal).as_ref() == Some(&us);
        for upload in begun.iter().filter(is_ours) {
            let Some((key, id)) = upload.key().and_then(Key::new).zip(upload.upload_id()) else {
                continue;
            };
            let parts = self
                .client
                .list_parts()
                .bucket(&self.bucket)
                .key(key.as_str())
                .upload_id(id);
            let parts: std::result::Result<Vec<_>, _> =
                parts.into_paginator().items().send().collect().await;
            let parts = match parts {
                // It has ended meanwhile.
                Err(error) if error.code() == Some("NoSuchUpload") => continue,
                parts => parts.map_err(failed)?,
            };
            if parts.iter().all(|part| old(part.last_modified())) {
                let sent = parts.into_iter().map(|sent| {
                    let (number, size) = (
                        sent.part_number.unwrap_or_default(),
                        sent.size.unwrap_or_default(),
                    );
                    part(number as u32, size as u64, sent.e_tag, sent.checksum_crc32)
                });
                stale.push(StaleUpload {
                    key,
                    id: id.to_owned(),
                    parts: sent.collect::<Result<_>>()?,
                });
            }
        }
        Ok(stale)
    }
}

/// A range of an object on its way.
struct RangeBody {
    pieces: Joined,
    missing: Range<u64>,
}

/// How one request for a range ended.
enum Reading {
    Done,
    /// In the middle, with the reason; the rest can be asked for again.
    BrokenOff(String),
}

/// What an answer's body came in: large pieces as they are, small ones together, as thousands of them would take more
/// memory than they hold.
#[derive(Default)]
struct Joined {
    pieces: Vec<Bytes>,
    small: BytesMut,
}

impl Joined {
    fn push(&mut self, chunk: Bytes) {
        if self.small.is_empty() && chunk.len() >= LARGE_PIECE {
            return self.pieces.push(chunk);
        }
        self.small.extend_from_slice(&chunk);
        if self.small.len() >= LARGE_PIECE {
            self.pieces.push(self.small.split().freeze());
        }
    }

    fn finish(mut self) -> Vec<Bytes> {
        self.pieces
            .extend(Some(self.small.freeze()).filter(|small| !small.is_empty()));
        self.pieces
    }
}

/// All but RFC 3986's unreserved characters and the slash.
const NOT_IN_A_URL_PATH: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~')
    .remove(b'/');

/// The header `If-None-Match` of a condition that the store keeps.
fn if_none_match(condition: &Condition, kept: bool) -> Option<String> {
    match condition {
        Condition::Absent if kept => Some("*".to_owned()),
        Condition::None | Condition::Absent | Condition::Unchanged(_) => None,
    }
}

/// The header `If-Match` of a condition that the store keeps.
fn if_match(condition: &Condition, kept: bool) -> Option<String> {
    match condition {
        Condition::Unchanged(etag) if kept => Some(etag.clone()),
        Condition::None | Condition::Absent | Condition::Unchanged(_) => None,
    }
}

/// As [`uncertain`]. Under `If-Match` 404 says that the object is gone.
fn uncertain_under<E>(condition: &Condition, error: SdkError<E>) -> StoreError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    match (condition, error.code()) {
        (Condition::Unchanged(_), Some("NoSuchKey")) => StoreError::Precondition,
        (_, _) => uncertain(error),
    }
}

fn metadata(attributes: &Attributes) -> Option<HashMap<String, String>> {
    let metadata: HashMap<_, _> = attributes.metadata.clone().into_iter().collect();
    if metadata.is_empty() {
        None
    } else {
        Some(metadata)
    }
}

fn missing(what: &str) -> StoreError {
    StoreError::Other(format!("the store's answer holds no {what}"))
}

/// An IAM user, or a role whatever the name of its session is.
fn principal(initiator: &Initiator) -> String {
    let id = initiator.id().unwrap_or_default();
    id.rsplit_once('/')
        .filter(|_| id.contains(":assumed-role/"))
        .map_or(id, |(role, _)| role)
        .to_owned()
}

fn part(number: u32, size: u64, etag: Option<String>, checksum: Option<String>) -> Result<Part> {
    Ok(Part {
        number,
        size,
        etag: etag.ok_or_else(|| missing("ETag"))?,
        checksum,
    })
}

/// What an answer tells of an object, without its attributes.
fn object(
    size: Option<i64>,
    e_tag: Option<String>,
    modified: Option<DateTime>,
    class: Option<StorageClass>,
) -> Result<Object> {
    let size = size
        .and_then(|size| u64::try_from(size).ok())
        .ok_or_else(|| missing("size"))?;
    let modified = modified
        .and_then(|time| SystemTime::try_from(time).ok())
        .unwrap_or(SystemTime::UNIX_EPOCH);
    let storage_class = match class {
        None | Some(StorageClass::Standard) => None,
        Some(class) => Some(class.as_str().to_owned()),
    };
    Ok(Object {
        size,
        etag: etag(e_tag)?,
        modified,
        storage_class,
        attributes: None,
    })
}

/// What HEAD tells of an object.
fn described(out: HeadObjectOutput) -> Result<Object> {
    let mut object = object(
        out.content_length,
        out.e_tag,
        out.last_modified,
        out.storage_class,
    )?;
    object.attributes = Some(Arc::new(Attributes {
        content_type: out.content_type,
        cache_control: out.cache_control,
        content_disposition: out.content_disposition,
        content_encoding: out.content_encoding,
        content_language: out.content_language,
        storage_class: object.storage_class.clone(),
        metadata: out.metadata.unwrap_or_default().into_iter().collect(),
    }));
    Ok(object)
}

fn etag(found: Option<String>) -> Result<String> {
    Ok(quoted(&found.ok_or_else(|| missing("ETag"))?))
}

/// An ETag with its quotes, which some stores leave out in some answers.
fn quoted(etag: &str) -> String {
    format!("\"{}\"", etag.trim_matches('"'))
}

/// The header `Content-Range` ([RFC 9110 §14.4](https://www.rfc-editor.org/rfc/rfc9110#section-14.4)).
#[derive(Debug, PartialEq, Eq)]
struct ContentRange {
    range: Range<u64>,
    /// Of the whole object, in bytes.
    size: u64,
}

fn content_range(header: Option<&str>) -> Option<ContentRange> {
    let (range, size) = header?.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let end = last.parse::<u64>().ok()?.checked_add(1)?;
    Some(ContentRange {
        range: first.parse().ok()?..end,
        size: size.parse().ok()?,
    })
}

/// How names stand in a list.
enum Names {
    /// As they are: a store that does not know the encoding.
    Plain,
    /// As in a form, `+` for a blank.
    UrlEncoded,
}

impl Names {
    fn of(encoding: Option<&EncodingType>) -> Names {
        if encoding == Some(&EncodingType::Url) {
            Names::UrlEncoded
        } else {
            Names::Plain
        }
    }

    fn decode(&self, name: String) -> Result<String> {
        match self {
            Names::Plain => Ok(name),
            Names::UrlEncoded => {
                let name = name.replace('+', " ");
                let decoded = percent_decode_str(&name).decode_utf8();
                decoded.map(Into::into).map_err(|_| {
                    StoreError::Other("the store lists a name that is not UTF-8".into())
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_or_refused() {
        let found = content_range(Some("bytes 5-9/20"));
        assert_eq!(
            found,
            Some(ContentRange {
                range: 5..10,
                size: 20
            })
        );
        for odd in [
            "bytes 5-9/*",
            "bytes */20",
            "5-9/20",
            "bytes 5-/20",
            "bytes 0-18446744073709551615/20",
            "",
        ] {
            assert_eq!(content_range(Some(odd)), None, "{odd}");
        }
        assert_eq!(content_range(None), None);
    }

    #[test]
    fn listed_names_are_decoded_where_they_are_encoded() {
        let encoded = Names::of(Some(&EncodingType::Url));
        assert_eq!(
            encoded.decode("a+b%2Bc%01%EF%BF%BE/d%25".to_owned()),
            Ok("a b+c\u{1}\u{FFFE}/d%".to_owned())
        );
        assert!(encoded.decode("%FF".to_owned()).is_err());
        assert_eq!(
            Names::of(None).decode("a+b%20c".to_owned()),
            Ok("a+b%20c".to_owned())
        );
    }
}
