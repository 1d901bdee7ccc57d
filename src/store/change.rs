//! The one way to change what a key holds: put, complete, copy, delete. Called by `vfs` and
//! `transfer`.
//!
//! Every change says what it expects to find. A store that keeps conditions decides at the moment
//! of the change, also between several gateways. For a store that ignores them the key is checked
//! just before; the callers hold the key's lock ([`crate::transfer`]), so that within this process
//! no other change comes in between.

use super::{
    Attributes, Condition, Copied, CopySource, Key, Object, Part, Result, Store, StoreError,
};
use bytes::Bytes;

/// Puts an object with these attributes.
pub async fn put(
    store: &dyn Store,
    key: &Key,
    body: Bytes,
    attributes: &Attributes,
    condition: &Condition,
) -> Result<Object> {
    let kept = store.limits().conditions;
    check_before(store, key, condition, kept.put_absent, kept.put_unchanged).await?;
    store.put(key, body, attributes, condition).await
}

/// Makes an object of the parts of a multipart upload.
pub async fn complete(
    store: &dyn Store,
    key: &Key,
    upload_id: &str,
    parts: &[Part],
    condition: &Condition,
) -> Result<Object> {
    let kept = store.limits().conditions;
    check_before(
        store,
        key,
        condition,
        kept.complete_absent,
        kept.complete_unchanged,
    )
    .await?;
    store.complete(key, upload_id, parts, condition).await
}

/// Copies this version of an object. Errors: `NotFound` and `Precondition` if the source no longer
/// has this version, or if the target is not as the condition says; `TooLarge`.
pub async fn copy(
    store: &dyn Store,
    from: CopySource<'_>,
    to: &Key,
    condition: &Condition,
) -> Result<Copied> {
    let kept = store.limits().conditions;
    if !kept.copy_source && store.head(from.key).await?.etag != from.version.etag {
        return Err(StoreError::Precondition);
    }
    check_before(store, to, condition, kept.copy_absent, false).await?;
    store.copy(from, to, condition).await
}

/// Deletes the object if it has this ETag. Errors: `NotFound`; `Precondition` if it has another
/// one.
pub async fn delete_version(store: &dyn Store, key: &Key, etag: &str) -> Result<()> {
    let condition = Condition::Unchanged(etag.to_owned());
    let kept = store.limits().conditions;
    if !kept.delete_unchanged && store.head(key).await?.etag != etag {
        return Err(StoreError::Precondition);
    }
    store.delete(key, &condition).await
}

/// Checks a condition that the store would ignore.
async fn check_before(
    store: &dyn Store,
    key: &Key,
    condition: &Condition,
    is_absent_kept: bool,
    is_unchanged_kept: bool,
) -> Result<()> {
    match condition {
        Condition::Absent if !is_absent_kept => match store.head(key).await {
            // Credentials that can only put can't look.
            Err(StoreError::NotFound | StoreError::Forbidden(_)) => Ok(()),
            Ok(_) => Err(StoreError::Precondition),
            Err(error) => Err(error),
        },
        Condition::Unchanged(etag) if !is_unchanged_kept => match store.head(key).await {
            Ok(object) if object.etag == *etag => Ok(()),
            Ok(_) | Err(StoreError::NotFound) => Err(StoreError::Precondition),
            Err(error) => Err(error),
        },
        Condition::None | Condition::Absent | Condition::Unchanged(_) => Ok(()),
    }
}
