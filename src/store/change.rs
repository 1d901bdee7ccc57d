//! The one way to change what a key holds: put, complete, copy, delete. Called by `vfs` and
//! `transfer`.
//!
//! Every change says what it expects to find. A store that keeps conditions decides at the moment
//! of the change, also between several gateways. For one that ignores them the key is looked at
//! just before; the callers hold the key's lock ([`crate::transfer`]), so that within this process
//! nothing comes in between.
//!
//! An answer that was lost, or a refusal that may be the echo of an earlier try of our own, is
//! decided by what is there: a write carries a random id in its metadata. ETags can't decide it:
//! equal contents of others have the same one, and under SSE-KMS the same content has different
//! ones ([S3: object
//! integrity](https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html)).

use super::{
    Attributes, Condition, CopySource, Key, Object, Part, Result, Store, StoreError, WriteId,
};
use bytes::Bytes;

/// Puts an object with these attributes. Returns its ETag.
pub async fn put(
    store: &dyn Store,
    key: &Key,
    body: Bytes,
    attributes: &Attributes,
    condition: &Condition,
) -> Result<String> {
    let kept = store.conditions();
    check_before(store, key, condition, kept.put_absent, kept.put_unchanged).await?;
    let (attributes, id) = attributes.with_new_write_id();
    let made = store.put(key, body, &attributes, condition).await;
    confirm_write(store, key, made, &id).await
}

/// Makes an object from the parts of a multipart upload that was created with this write id.
/// Returns its ETag.
pub async fn complete(
    store: &dyn Store,
    key: &Key,
    upload_id: &str,
    parts: &[Part],
    write_id: &WriteId,
    condition: &Condition,
) -> Result<String> {
    let kept = store.conditions();
    check_before(
        store,
        key,
        condition,
        kept.complete_absent,
        kept.complete_unchanged,
    )
    .await?;
    let made = store.complete(key, upload_id, parts, condition).await;
    confirm_write(store, key, made, write_id).await
}

/// What a copy came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Of the object at the target.
    pub etag: Box<str>,
    /// The write id of the object at the target, as far as it was looked at.
    pub write_id: Option<Box<str>>,
    /// Whether the store said that this request made it. Otherwise it is a copy of the same
    /// version, but it can't be known whose.
    pub is_ours: bool,
}

/// Copies this version of an object. Errors: `NotFound` and `Precondition` for a source that is not
/// there any more in this version, or a target that is not as the condition says; `TooLarge`.
pub async fn copy(
    store: &dyn Store,
    from: &Key,
    version: &Object,
    to: &Key,
    condition: &Condition,
) -> Result<Copied> {
    let kept = store.conditions();
    if !kept.copy_source && store.head(from).await?.etag != version.etag {
        return Err(StoreError::Precondition);
    }
    check_before(store, to, condition, kept.copy_absent, false).await?;
    let source = CopySource {
        key: from,
        etag: &version.etag,
        storage_class: version.storage_class.as_deref(),
    };
    match store.copy(source, to, condition).await {
        Ok(etag) => Ok(Copied {
            etag: etag.into(),
            write_id: None,
            is_ours: true,
        }),
        Err(doubt @ (StoreError::Unknown(_) | StoreError::Precondition)) => {
            find_copy(store, from, version, to).await.ok_or(doubt)
        }
        Err(error) => Err(error),
    }
}

/// The object at `to`, if it is a copy of this version.
async fn find_copy(store: &dyn Store, from: &Key, version: &Object, to: &Key) -> Option<Copied> {
    let found = store.head(to).await.ok()?;
    // A version that came from a listing has no write id yet.
    let version = match version.attributes {
        Some(_) => version.clone(),
        None => store
            .head(from)
            .await
            .ok()
            .filter(|now| now.etag == version.etag)?,
    };
    if !is_copy(&found, &version) {
        return None;
    }
    let write_id = found.write_id().map(Box::from);
    Some(Copied {
        etag: found.etag.into(),
        write_id,
        is_ours: false,
    })
}

/// Whether an object has the content of this version of another one, as far as can be told without
/// reading it.
pub fn is_copy(object: &Object, version: &Object) -> bool {
    if object.size != version.size {
        return false;
    }
    match (object.write_id(), version.write_id()) {
        (Some(id), Some(copied)) => id == copied,
        (Some(_), None) | (None, Some(_)) => false,
        (None, None) => object.etag == version.etag,
    }
}

/// Deletes the object if it has this ETag. Errors: `NotFound`, or `Precondition` if it is another
/// version by now.
pub async fn delete_version(store: &dyn Store, key: &Key, etag: &str) -> Result<()> {
    let condition = Condition::Unchanged(etag.to_owned());
    if !store.conditions().delete_unchanged && store.head(key).await?.etag != etag {
        return Err(StoreError::Precondition);
    }
    store.delete(key, &condition).await
}

/// Looks whether a condition holds that the store would ignore.
async fn check_before(
    store: &dyn Store,
    key: &Key,
    condition: &Condition,
    absent_is_kept: bool,
    unchanged_is_kept: bool,
) -> Result<()> {
    match condition {
        Condition::Absent if !absent_is_kept => match store.head(key).await {
            // Credentials that can only put can't look.
            Err(StoreError::NotFound | StoreError::Forbidden(_)) => Ok(()),
            Ok(_) => Err(StoreError::Precondition),
            Err(error) => Err(error),
        },
        Condition::Unchanged(etag) if !unchanged_is_kept => match store.head(key).await {
            Ok(object) if object.etag == *etag => Ok(()),
            Ok(_) | Err(StoreError::NotFound) => Err(StoreError::Precondition),
            Err(error) => Err(error),
        },
        Condition::None | Condition::Absent | Condition::Unchanged(_) => Ok(()),
    }
}

/// Decides a write without a clear answer by the id of the object that is there.
async fn confirm_write(
    store: &dyn Store,
    key: &Key,
    made: Result<String>,
    id: &WriteId,
) -> Result<String> {
    let doubt = match made {
        Err(doubt @ (StoreError::Unknown(_) | StoreError::Precondition)) => doubt,
        made => return made,
    };
    match store.head(key).await {
        Ok(object) if object.write_id() == Some(id.0.as_str()) => Ok(object.etag),
        Ok(_) | Err(_) => Err(doubt),
    }
}
