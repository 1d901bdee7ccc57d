//! The one way to change what a key holds: put, complete, copy, delete. Called by `vfs` and
//! `transfer`.
//!
//! Every change says what it expects to find. A store that keeps conditions decides at the moment
//! of the change, also between several gateways. For a store that ignores them the key is checked
//! just before; the callers hold the key's lock ([`crate::transfer`]), so that within this process
//! no other change comes in between.
//!
//! If an answer was lost, or if a refusal may be the echo of this process's own earlier try, what
//! is there decides: a write carries a random id in its metadata. ETags can't decide it: equal
//! content of another client has the same one, and under SSE-KMS equal content has different ones
//! ([S3: object
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

/// Makes an object of the parts of a multipart upload that was created with this write id. Returns
/// its ETag.
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

/// A copy that [`copy`] made or found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copied {
    /// The ETag of the object at the target.
    pub etag: Box<str>,
    /// The write id of the object at the target; `None` also if it was not looked at.
    pub write_id: Option<Box<str>>,
    /// Whether the store said that this request made it. Otherwise the target is a copy of the same
    /// version, but someone else may have made it.
    pub is_ours: bool,
}

/// Copies this version of an object. Errors: `NotFound` and `Precondition` if the source no longer
/// has this version, or if the target is not as the condition says; `TooLarge`.
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
    let doubt = match store.copy(source, to, condition).await {
        Ok(etag) => {
            return Ok(Copied {
                etag: etag.into(),
                write_id: None,
                is_ours: true,
            });
        }
        Err(doubt @ (StoreError::Unknown(_) | StoreError::Precondition)) => doubt,
        Err(error) => return Err(error),
    };
    match find_copy(store, from, version, to).await {
        Some(copied) => Ok(copied),
        None => Err(doubt),
    }
}

/// The object at `to`, if it is a copy of this version.
async fn find_copy(store: &dyn Store, from: &Key, version: &Object, to: &Key) -> Option<Copied> {
    let found = store.head(to).await.ok()?;
    let is_copy = if version.attributes.is_some() {
        is_copy(&found, version)
    } else {
        // The version is from a listing, which has no write id.
        let now = store.head(from).await.ok()?;
        now.etag == version.etag && is_copy(&found, &now)
    };
    if !is_copy {
        return None;
    }
    let write_id = found.write_id().map(Box::from);
    Some(Copied {
        etag: found.etag.into(),
        write_id,
        is_ours: false,
    })
}

/// Whether an object has the content of this version of another one, as far as can be seen without
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

/// Deletes the object if it has this ETag. Errors: `NotFound`; `Precondition` if it has another
/// one.
pub async fn delete_version(store: &dyn Store, key: &Key, etag: &str) -> Result<()> {
    let condition = Condition::Unchanged(etag.to_owned());
    if !store.conditions().delete_unchanged && store.head(key).await?.etag != etag {
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

/// Decides a write without a clear answer, by the id of the object that is there.
async fn confirm_write(
    store: &dyn Store,
    key: &Key,
    made: Result<String>,
    id: &WriteId,
) -> Result<String> {
    let doubt = match made {
        Ok(etag) => return Ok(etag),
        Err(doubt @ (StoreError::Unknown(_) | StoreError::Precondition)) => doubt,
        Err(error) => return Err(error),
    };
    match store.head(key).await {
        Ok(object) if object.write_id() == Some(id.0.as_str()) => Ok(object.etag),
        Ok(_) | Err(_) => Err(doubt),
    }
}
