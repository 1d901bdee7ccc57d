//! Multipart uploads: create, parts, complete, abort.

use super::super::{Attributes, Condition, Key, Part, PartSource, Result};
use super::S3Store;
use super::errors::failed;
use super::fields::{
    etag, if_match, if_none_match, metadata, missing, part, storage_class, uncertain_under,
};
use super::signs::WatchRequest;
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;

impl S3Store {
    /// CreateMultipartUpload. Returns the upload id.
    pub(super) async fn create_multipart_upload(
        &self,
        key: &Key,
        attributes: &Attributes,
    ) -> Result<String> {
        // S3 wants to know beforehand that parts will have checksums, and gets them again at the
        // end.
        let checksum_algorithm = match self.checksums() {
            true => Some(ChecksumAlgorithm::Crc32),
            false => None,
        };
        let request = self.client.create_multipart_upload();
        let request = request
            .bucket(&self.bucket)
            .key(key.as_str())
            .set_content_type(attributes.content_type.clone())
            .set_cache_control(attributes.cache_control.clone())
            .set_content_disposition(attributes.content_disposition.clone())
            .set_content_encoding(attributes.content_encoding.clone())
            .set_content_language(attributes.content_language.clone())
            .set_storage_class(storage_class(attributes))
            .set_metadata(metadata(attributes))
            .set_checksum_algorithm(checksum_algorithm);
        let out = request.send().await.map_err(failed)?;
        match out.upload_id {
            Some(upload_id) => Ok(upload_id),
            None => Err(missing("upload id")),
        }
    }

    /// UploadPart.
    pub(super) async fn send_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        body: Bytes,
    ) -> Result<Part> {
        let size = body.len() as u64;
        let request = self.client.upload_part();
        let request = request
            .bucket(&self.bucket)
            .key(key.as_str())
            .upload_id(upload_id)
            .part_number(number as i32)
            .body(body.into())
            .customize()
            .interceptor(WatchRequest);
        let request = match self.unsigned_payload {
            true => request.disable_payload_signing(),
            false => request,
        };
        let out = request.send().await.map_err(failed)?;
        part(number, size, out.e_tag, out.checksum_crc32)
    }

    /// UploadPartCopy.
    pub(super) async fn upload_part_copy(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        from: PartSource<'_>,
    ) -> Result<Part> {
        let size = from.range.end - from.range.start;
        let range = format!("bytes={}-{}", from.range.start, from.range.end - 1);
        let request = self.client.upload_part_copy();
        let request = request
            .bucket(&self.bucket)
            .key(key.as_str())
            .upload_id(upload_id)
            .part_number(number as i32)
            .copy_source(self.copy_source(from.key))
            .copy_source_if_match(from.etag)
            .copy_source_range(range);
        let out = request.send().await.map_err(failed)?;
        match out.copy_part_result {
            Some(copied) => part(number, size, copied.e_tag, copied.checksum_crc32),
            None => Err(missing("result")),
        }
    }

    /// CompleteMultipartUpload. Returns the ETag.
    pub(super) async fn complete_multipart_upload(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<String> {
        let kept = self.conditions;
        let mut list = CompletedMultipartUpload::builder();
        let mut size = 0;
        for part in parts {
            list = list.parts(completed(part));
            size += part.size;
        }
        let request = self.client.complete_multipart_upload();
        let request = request
            .bucket(&self.bucket)
            .key(key.as_str())
            .upload_id(upload_id)
            .multipart_upload(list.build())
            .set_if_none_match(if_none_match(condition, kept.complete_absent))
            .set_if_match(if_match(condition, kept.complete_unchanged))
            // S3 refuses to make an object of any other size.
            .mpu_object_size(size as i64);
        match request.send().await {
            Ok(out) => etag(out.e_tag),
            Err(error) => Err(uncertain_under(condition, error)),
        }
    }

    /// AbortMultipartUpload.
    pub(super) async fn abort_multipart_upload(&self, key: &Key, upload_id: &str) -> Result<()> {
        let request = self.client.abort_multipart_upload();
        let request = request
            .bucket(&self.bucket)
            .key(key.as_str())
            .upload_id(upload_id);
        match request.send().await {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some("NoSuchUpload") => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }
}

fn completed(part: &Part) -> CompletedPart {
    CompletedPart::builder()
        .part_number(part.number as i32)
        .e_tag(part.etag.clone())
        .set_checksum_crc32(part.checksum.clone())
        .build()
}
