//! DELETE, which finds out whether it was this request that deleted the object.

use super::super::patience::SignsOfLife;
use super::super::{Key, Result, StoreError};
use super::S3Store;
use super::client::{ATTEMPTS, retry_pause};
use super::errors::{status, uncertain};
use super::resend::{change_until_answered, send_once};
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use std::time::Duration;
use tokio::time::sleep;

/// What S3 calls it.
const DELETE: &str = "DeleteObject";

/// What came of one attempt to delete.
enum Attempt {
    Deleted,
    /// The store has not begun, and says to try later.
    Throttled(String),
    /// It may have been carried out.
    InDoubt(String),
    Refused(StoreError),
}

impl S3Store {
    /// DELETE of any version.
    pub(super) async fn delete_any(&self, key: &Key) -> Result<()> {
        let doubt =
            match change_until_answered(DELETE, Duration::ZERO, || self.delete_object(key)).await {
                Err(doubt @ StoreError::Unknown(_)) => doubt,
                clear => return clear,
            };
        match self.is_gone(key).await {
            true => Ok(()),
            false => Err(doubt),
        }
    }

    /// DELETE of this version. The SDK sends each attempt once, so that it is known whether it was
    /// this request that deleted the object: after an attempt without a clear answer, an object
    /// that is gone counts as deleted by it.
    pub(super) async fn delete_version(&self, key: &Key, etag: &str) -> Result<()> {
        if !self.conditions.delete_unchanged {
            return self.delete_any(key).await;
        }
        let mut in_doubt = false;
        let mut last_failure = String::new();
        for attempt in 0..ATTEMPTS {
            let pause = retry_pause(attempt);
            // It is no silence of the store.
            SignsOfLife::current().give_in_advance(pause);
            sleep(pause).await;
            match self.try_to_delete(key, etag).await {
                Attempt::Deleted => return Ok(()),
                Attempt::Refused(StoreError::NotFound) if in_doubt => return Ok(()),
                Attempt::Refused(refusal) => return Err(refusal),
                Attempt::Throttled(why) => last_failure = why,
                Attempt::InDoubt(why) => {
                    in_doubt = true;
                    last_failure = why;
                }
            }
        }
        if in_doubt && self.is_gone(key).await {
            return Ok(());
        }
        Err(StoreError::Unknown(last_failure))
    }

    async fn delete_object(&self, key: &Key) -> Result<()> {
        let request = self.client.delete_object();
        let request = request.bucket(&self.bucket).key(key.as_str());
        match request.send().await {
            Ok(_) => Ok(()),
            Err(error) => Err(uncertain(error)),
        }
    }

    async fn try_to_delete(&self, key: &Key, etag: &str) -> Attempt {
        let once = aws_sdk_s3::config::Builder::new().retry_config(RetryConfig::disabled());
        let request = self.client.delete_object();
        let request = request
            .bucket(&self.bucket)
            .key(key.as_str())
            .if_match(etag)
            .customize()
            .config_override(once);
        let error = match send_once(DELETE, Duration::ZERO, request.send()).await {
            Some(Ok(_)) => return Attempt::Deleted,
            Some(Err(error)) => error,
            None => return Attempt::InDoubt("the store did not answer".to_owned()),
        };
        let is_throttled = matches!(status(&error), Some(429 | 503));
        match refusal(error) {
            StoreError::Unknown(why) if is_throttled => Attempt::Throttled(why),
            StoreError::Unknown(why) => Attempt::InDoubt(why),
            refusal => Attempt::Refused(refusal),
        }
    }

    /// Whether the object is certainly gone.
    async fn is_gone(&self, key: &Key) -> bool {
        // It has its own time, after that of the request in doubt.
        SignsOfLife::current().give();
        self.head_object(key).await == Err(StoreError::NotFound)
    }
}

/// The error of a DELETE with a condition.
fn refusal<E>(error: SdkError<E>) -> StoreError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    match error.code() {
        Some("NoSuchKey") => StoreError::NotFound,
        Some(_) | None => uncertain(error),
    }
}
