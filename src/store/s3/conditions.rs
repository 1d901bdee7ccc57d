//! Which conditions of requests the store keeps. Stores differ, and a store that doesn't know a
//! condition ignores its header silently. So the conditions are tried out, on objects made for it.

use super::super::{
    Attributes, Condition, CopySource, KeptConditions, Key, Object, Result, Store, StoreError,
    probe_key,
};
use super::S3Store;
use bytes::Bytes;

const CONTENT: &[u8] = b"sftpd\n";
/// No object has it.
const OTHER_ETAG: &str = "\"00000000000000000000000000000000\"";

/// What came of trying out the conditions.
pub struct TriedConditions {
    /// Those that the store keeps, or why that is not known.
    pub kept: Result<KeptConditions>,
    /// Objects made for it that the store did not remove.
    pub left: Vec<Key>,
}

impl S3Store {
    /// Relies on these conditions of the store from now on.
    pub fn with_conditions(mut self, conditions: KeptConditions) -> S3Store {
        self.conditions = conditions;
        self
    }

    /// Finds out which conditions the store keeps, by about twenty requests below the prefix;
    /// nothing stays there unless DELETE is refused. AWS is not asked: it documents that it keeps
    /// them all.
    pub async fn find_conditions(&self, prefix: &Key) -> Result<KeptConditions> {
        match self.is_aws {
            true => Ok(KeptConditions::ALL),
            false => {
                let tried = self.try_all_conditions(prefix).await?;
                for key in tried.left {
                    log::warn!(
                        "an object made to try out the store may stay as {:?}",
                        key.as_str()
                    );
                }
                tried.kept
            }
        }
    }

    /// Tries each condition in a case where it is not true. Fails if nothing could be tried.
    pub async fn try_all_conditions(&self, prefix: &Key) -> Result<TriedConditions> {
        // All must be sent, whatever the store is known to keep.
        let trying = S3Store {
            client: self.client.clone(),
            bucket: self.bucket.clone(),
            unsigned_payload: self.unsigned_payload,
            is_aws: self.is_aws,
            conditions: KeptConditions::ALL,
            endpoint: self.endpoint.clone(),
            doubts: self.doubts.clone(),
        };
        let key = probe_key(prefix)?;
        let other = probe_key(prefix)?;
        let content = Bytes::from_static(CONTENT);
        // If DELETE is refused, nothing is put that would stay.
        trying.delete(&other, &Condition::None).await?;
        trying
            .put_object(&key, content, &Attributes::default(), &Condition::None)
            .await?;
        let kept = trying.try_conditions(&key, &other).await;
        let mut left = Vec::new();
        for key in [key, other] {
            if trying.delete(&key, &Condition::None).await.is_err() {
                left.push(key);
            }
        }
        Ok(TriedConditions { kept, left })
    }

    /// `key` is an object, `other` is none.
    async fn try_conditions(&self, key: &Key, other: &Key) -> Result<KeptConditions> {
        let attributes = Attributes::default();
        let changed = Condition::Unchanged(OTHER_ETAG.to_owned());
        let content = || Bytes::from_static(CONTENT);
        let put_absent = is_kept(
            self.put_object(key, content(), &attributes, &Condition::Absent)
                .await,
        )?;
        let put_unchanged = is_kept(self.put_object(key, content(), &attributes, &changed).await)?;
        let complete_absent = is_kept(self.try_complete(key, &Condition::Absent).await)?;
        let complete_unchanged = is_kept(self.try_complete(key, &changed).await)?;
        let version = self.head_object(key).await?;
        let source = CopySource {
            key,
            version: &version,
        };
        let no_version = Object::new(version.size, OTHER_ETAG, version.modified);
        let no_source = CopySource {
            key,
            version: &no_version,
        };
        let copy_source = is_kept(self.copy_object(no_source, other, &Condition::None).await)?;
        // From here on `other` is an object too.
        self.copy_object(source, other, &Condition::None).await?;
        let copy_absent = is_kept(self.copy_object(source, other, &Condition::Absent).await)?;
        let delete_unchanged = is_kept(self.delete(other, &changed).await)?;
        Ok(KeptConditions {
            put_absent,
            put_unchanged,
            complete_absent,
            complete_unchanged,
            copy_absent,
            copy_source,
            delete_unchanged,
        })
    }

    /// A multipart upload of one part.
    async fn try_complete(&self, key: &Key, condition: &Condition) -> Result<String> {
        let plain = Attributes::default();
        let content = Bytes::from_static(CONTENT);
        let id = self.create_multipart_upload(key, &plain).await?;
        let completed = match self.send_part(key, &id, 1, content).await {
            Ok(part) => {
                self.complete_multipart_upload(key, &id, &[part], condition)
                    .await
            }
            Err(error) => Err(error),
        };
        if completed.is_err() {
            self.abort_multipart_upload(key, &id).await?;
        }
        completed
    }
}

/// Did the store refuse the change because its condition is not true? A store that refuses the
/// header itself does not keep the condition.
fn is_kept<T>(tried: Result<T>) -> Result<bool> {
    match tried {
        Err(StoreError::Precondition | StoreError::NotFound) => Ok(true),
        Ok(_) | Err(StoreError::Other(_)) => Ok(false),
        Err(error) => Err(error),
    }
}
