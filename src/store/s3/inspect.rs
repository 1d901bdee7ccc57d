//! Facts about a bucket for `sftpd doctor`, beyond what a [`Store`](crate::store::Store) does.

use super::super::{Key, Result, StoreError};
use super::S3Store;
use super::errors::{failed, status};
use aws_sdk_s3::types::ExpirationStatus;

impl S3Store {
    /// The URL of the server that the AWS settings name; `None` for S3 itself.
    pub fn endpoint(&self) -> Option<&str> {
        self.endpoint.as_deref()
    }

    /// The region that requests go to, and the one that the bucket is in, if S3 says so
    /// (HeadBucket).
    pub async fn regions(&self) -> (String, Option<String>) {
        let requested = match self.client.config().region() {
            Some(region) => region.as_ref().to_owned(),
            None => String::new(),
        };
        let actual = match self.client.head_bucket().bucket(&self.bucket).send().await {
            Ok(bucket) => bucket.bucket_region,
            // The answer that redirects to another region has it too.
            Err(error) => match error.raw_response() {
                Some(answer) => {
                    let region = answer.headers().get("x-amz-bucket-region");
                    region.map(str::to_owned)
                }
                None => None,
            },
        };
        (requested, actual)
    }

    /// Does the store refuse a GET for a version that the key no longer has (`If-Match`)? Downloads
    /// rely on it.
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
        let request = self.client.get_bucket_lifecycle_configuration();
        let out = match request.bucket(&self.bucket).send().await.map_err(failed) {
            Ok(out) => out,
            Err(StoreError::NotFound) => return Ok(false),
            Err(error) => return Err(error),
        };
        for rule in out.rules() {
            let is_enabled = *rule.status() == ExpirationStatus::Enabled;
            if is_enabled && rule.abort_incomplete_multipart_upload().is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
