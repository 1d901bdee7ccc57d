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
    let kept = Kept {
        absent: kept.put_absent,
        unchanged: kept.put_unchanged,
    };
    check_before(store, key, condition, kept).await?;
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
    let kept = Kept {
        absent: kept.complete_absent,
        unchanged: kept.complete_unchanged,
    };
    check_before(store, key, condition, kept).await?;
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
    let kept = Kept {
        absent: kept.copy_absent,
        // No store has it for copies.
        unchanged: false,
    };
    check_before(store, to, condition, kept).await?;
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

/// Which conditions the store keeps for the change at hand.
struct Kept {
    /// [`Condition::Absent`].
    absent: bool,
    /// [`Condition::Unchanged`].
    unchanged: bool,
}

/// Checks a condition that the store would ignore.
async fn check_before(
    store: &dyn Store,
    key: &Key,
    condition: &Condition,
    kept: Kept,
) -> Result<()> {
    match condition {
        Condition::Absent if !kept.absent => match store.head(key).await {
            // Credentials that can only put can't look.
            Err(StoreError::NotFound | StoreError::Forbidden(_)) => Ok(()),
            Ok(_) => Err(StoreError::Precondition),
            Err(error) => Err(error),
        },
        Condition::Unchanged(etag) if !kept.unchanged => match store.head(key).await {
            Ok(object) if object.etag == *etag => Ok(()),
            Ok(_) | Err(StoreError::NotFound) => Err(StoreError::Precondition),
            Err(error) => Err(error),
        },
        Condition::None | Condition::Absent | Condition::Unchanged(_) => Ok(()),
    }
}
