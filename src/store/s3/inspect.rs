//! What `sftpd doctor` wants to know of a bucket, beyond what a [`Store`] does.

use super::*;
use aws_sdk_s3::config::RequestChecksumCalculation;
use aws_sdk_s3::types::ExpirationStatus;

impl S3Store {
    /// The region that requests go to, and the one that the bucket is in, where S3 says so (HeadBucket).
    pub async fn regions(&self) -> (String, Option<String>) {
        let ours = self
            .client
            .config()
            .region()
            .map(|region| region.as_ref().to_owned())
            .unwrap_or_default();
        let theirs = match self.client.head_bucket().bucket(&self.bucket).send().await {
            Ok(bucket) => bucket.bucket_region,
            // Also with the answer that sends us elsewhere.
            Err(error) => error
                .raw_response()
                .and_then(|answer| Some(answer.headers().get("x-amz-bucket-region")?.to_owned())),
        };
        (ours, theirs)
    }

    /// Does the store refuse a GET for another version than the key has (`If-Match`)? Downloads rely on it.
    pub async fn honours_if_match(&self, key: &Key, outdated: &str) -> Result<bool> {
        let request = self
            .client
            .get_object()
            .bucket(&self.bucket)
            .key(key.as_str())
            .if_match(outdated)
            .range("bytes=0-0");
        match request.send().await {
            Ok(_) => Ok(false),
            Err(error) if status(&error) == Some(412) => Ok(true),
            Err(error) => Err(failed(error)),
        }
    }

    /// Does a lifecycle rule remove incomplete multipart uploads (GetBucketLifecycleConfiguration)?
    pub async fn removes_incomplete_uploads(&self) -> Result<bool> {
        let asked = self
            .client
            .get_bucket_lifecycle_configuration()
            .bucket(&self.bucket)
            .send()
            .await
            .map_err(failed);
        let rules = match asked {
            Err(StoreError::NotFound) => return Ok(false),
            answer => answer?.rules.unwrap_or_default(),
        };
        let active = rules
            .iter()
            .filter(|rule| *rule.status() == ExpirationStatus::Enabled);
        Ok(active
            .into_iter()
            .any(|rule| rule.abort_incomplete_multipart_upload().is_some()))
    }

    /// Do requests carry checksums, as with AWS they do unless its settings say otherwise?
    pub fn checksums(&self) -> bool {
        let setting = self.client.config().request_checksum_calculation();
        setting.is_none_or(|setting| *setting == RequestChecksumCalculation::WhenSupported)
    }
}
