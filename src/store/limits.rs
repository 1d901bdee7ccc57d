//! What a store demands and allows.

const MIB: u64 = 1024 * 1024;
const GIB: u64 = 1024 * MIB;

/// What a store demands of uploads, and what it allows. The default is what S3 says
/// ([S3: multipart limits](https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html)),
/// for a store that copies nothing by itself and keeps no condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Smallest size of a part, except the last one, in bytes: 5 MiB.
    pub min_part: u64,
    /// Largest size of a part in bytes: 5 GiB.
    pub max_part: u64,
    /// Most parts of one upload: 10,000.
    pub max_parts: u32,
    /// Largest object that is copied in one request, and largest range that becomes a part, in
    /// bytes: 5 GiB.
    pub max_copy: u64,
    /// Whether all parts but the last must have the same size, as Cloudflare R2 demands.
    pub equal_parts: bool,
    /// Whether `copy` and `copy_part` take no memory of this process. If not, the server counts the
    /// bytes that are copied as part of `buffer_memory`, and copies large objects part by part. If
    /// so, the store must have both methods, and a store that wraps it must forward them: their
    /// defaults, which take memory, are `Unsupported` then.
    pub copies_itself: bool,
    /// Whether objects have the attributes that they were written with. The server sends them in
    /// any case; `store_conformance` looks for them if this is true.
    pub keeps_attributes: bool,
    /// Which conditions the store keeps: none, so that a store which ignores them loses no file. To
    /// say which are kept saves a HEAD before each change.
    pub conditions: KeptConditions,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            min_part: 5 * MIB,
            max_part: 5 * GIB,
            max_parts: 10_000,
            max_copy: 5 * GIB,
            equal_parts: false,
            copies_itself: false,
            keeps_attributes: true,
            conditions: KeptConditions::NONE,
        }
    }
}

/// The conditions that a store keeps, at the moment of the change. The server checks the others
/// just before a request, which is enough if no one else changes these keys: it locks them itself.
/// A store may ignore a condition that it does not keep. `store_conformance` finds a condition that
/// is named here and ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeptConditions {
    /// [`Condition::Absent`](super::Condition::Absent) on PutObject.
    pub put_absent: bool,
    /// [`Condition::Unchanged`](super::Condition::Unchanged) on PutObject.
    pub put_unchanged: bool,
    /// [`Condition::Absent`](super::Condition::Absent) on CompleteMultipartUpload.
    pub complete_absent: bool,
    /// [`Condition::Unchanged`](super::Condition::Unchanged) on CompleteMultipartUpload.
    pub complete_unchanged: bool,
    /// [`Condition::Absent`](super::Condition::Absent) on CopyObject.
    pub copy_absent: bool,
    /// The version of the source on CopyObject (`x-amz-copy-source-if-match`).
    pub copy_source: bool,
    /// [`Condition::Unchanged`](super::Condition::Unchanged) on DeleteObject.
    pub delete_unchanged: bool,
}

impl KeptConditions {
    /// S3
    /// ([S3: conditional requests](https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html)).
    pub const ALL: KeptConditions = KeptConditions::same(true);
    /// A store that ignores all conditions.
    pub const NONE: KeptConditions = KeptConditions::same(false);

    const fn same(kept: bool) -> KeptConditions {
        KeptConditions {
            put_absent: kept,
            put_unchanged: kept,
            complete_absent: kept,
            complete_unchanged: kept,
            copy_absent: kept,
            copy_source: kept,
            delete_unchanged: kept,
        }
    }
}
