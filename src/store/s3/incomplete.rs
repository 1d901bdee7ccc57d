//! Incomplete uploads of killed servers: finds the multipart uploads that were begun with the
//! credentials in use.

use super::super::{Attributes, IncompleteUpload, Key, Part, Result, probe_key};
use super::S3Store;
use super::errors::failed;
use super::fields::part;
use super::listing::Names;
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::DateTime;
use aws_sdk_s3::types::{EncodingType, Initiator, MultipartUpload};
use std::time::SystemTime;

impl S3Store {
    /// ListMultipartUploads and ListParts. See [`Store::incomplete_uploads`].
    pub(super) async fn find_incomplete_uploads(
        &self,
        prefix: &Key,
        before: SystemTime,
    ) -> Result<Vec<IncompleteUpload>> {
        let mut begun = self.list_uploads(prefix).await?;
        begun.retain(|upload| is_before(upload.initiated(), before));
        if begun.is_empty() {
            return Ok(Vec::new());
        }
        // Without initiators, the uploads of other programs can't be told from ours.
        let Some(us) = self.initiator(prefix).await? else {
            return Ok(Vec::new());
        };
        let mut incomplete = Vec::new();
        for upload in begun {
            let is_ours = upload.initiator().map(principal).as_ref() == Some(&us);
            let key = upload.key().and_then(Key::new);
            let (true, Some(key), Some(id)) = (is_ours, key, upload.upload_id()) else {
                continue;
            };
            if let Some(parts) = self.list_old_parts(&key, id, before).await? {
                incomplete.push(IncompleteUpload::new(key, id, parts));
            }
        }
        Ok(incomplete)
    }

    /// The parts of an upload; `None` if one of them is not old enough, or the upload has ended
    /// meanwhile.
    async fn list_old_parts(
        &self,
        key: &Key,
        upload_id: &str,
        before: SystemTime,
    ) -> Result<Option<Vec<Part>>> {
        let request = self.client.list_parts();
        let mut pages = request
            .bucket(&self.bucket)
            .key(key.as_str())
            .upload_id(upload_id)
            .into_paginator()
            .items()
            .send();
        let mut parts = Vec::new();
        while let Some(found) = pages.next().await {
            let found = match found {
                Ok(found) => found,
                Err(error) if error.code() == Some("NoSuchUpload") => return Ok(None),
                Err(error) => return Err(failed(error)),
            };
            if !is_before(found.last_modified(), before) {
                return Ok(None);
            }
            let number = found.part_number.unwrap_or_default() as u32;
            let size = found.size.unwrap_or_default() as u64;
            parts.push(part(number, size, found.e_tag, found.checksum_crc32)?);
        }
        Ok(Some(parts))
    }

    /// Multipart uploads in progress, by any initiator.
    async fn list_uploads(&self, prefix: &Key) -> Result<Vec<MultipartUpload>> {
        let mut all = Vec::new();
        let mut key_marker = None;
        let mut id_marker = None;
        loop {
            let request = self.client.list_multipart_uploads();
            let request = request
                .bucket(&self.bucket)
                .prefix(prefix.as_str())
                .encoding_type(EncodingType::Url)
                .set_key_marker(key_marker)
                .set_upload_id_marker(id_marker);
            let page = request.send().await.map_err(failed)?;
            let names = Names::of(page.encoding_type.as_ref());
            for mut upload in page.uploads.unwrap_or_default() {
                if let Some(key) = upload.key.take() {
                    upload.key = Some(names.decode(key)?);
                }
                all.push(upload);
            }
            if page.is_truncated != Some(true) {
                return Ok(all);
            }
            key_marker = match page.next_key_marker {
                Some(key) => Some(names.decode(key)?),
                None => None,
            };
            id_marker = page.next_upload_id_marker;
        }
    }

    /// The name that S3 has for the credentials in use. Only an upload of our own can tell: it is
    /// created, looked up and aborted. `None` if the store has no name for them.
    pub async fn initiator(&self, prefix: &Key) -> Result<Option<String>> {
        let probe = probe_key(prefix)?;
        let id = self
            .create_multipart_upload(&probe, &Attributes::default())
            .await?;
        let found = self.list_uploads(&probe).await;
        self.abort_multipart_upload(&probe, &id).await?;
        for upload in found? {
            if upload.upload_id() == Some(id.as_str()) {
                let name = upload.initiator().map(principal);
                return Ok(name.filter(|name| !name.is_empty()));
            }
        }
        Ok(None)
    }
}

fn is_before(time: Option<&DateTime>, before: SystemTime) -> bool {
    match time.map(|time| SystemTime::try_from(*time)) {
        Some(Ok(time)) => time < before,
        Some(Err(_)) | None => false,
    }
}

/// An IAM user, or a role without the name of its session.
fn principal(initiator: &Initiator) -> String {
    let id = initiator.id().unwrap_or_default();
    match id.rsplit_once('/') {
        Some((role, _session)) if id.contains(":assumed-role/") => role.to_owned(),
        Some(_) | None => id.to_owned(),
    }
}
