//! `ListObjectsV2`.

use super::encoding::{url_decode, url_encode};
use super::state::State;
use s3s::dto::{CommonPrefix, ListObjectsV2Input, ListObjectsV2Output, ObjectStorageClass};
use s3s::{S3Result, s3_error};

/// The most entries of a page.
const MAX_KEYS: i32 = 1000;

/// Where a page begins. The token of the page before names it: `key:` or `under:`, and an encoded
/// key or prefix.
struct Begin {
    after_key: Option<String>,
    /// After all that is under this common prefix.
    after_prefix: Option<String>,
}

impl Begin {
    fn of(input: &ListObjectsV2Input) -> S3Result<Begin> {
        let mut begin = Begin {
            after_key: input.start_after.clone(),
            after_prefix: None,
        };
        let Some(token) = &input.continuation_token else {
            return Ok(begin);
        };
        match token.split_once(':') {
            Some(("key", key)) => begin.after_key = Some(url_decode(key)),
            Some(("under", prefix)) => begin.after_prefix = Some(url_decode(prefix)),
            _ => return Err(s3_error!(InvalidArgument)),
        }
        Ok(begin)
    }

    fn is_after(&self, key: &str) -> bool {
        let by_key = self.after_key.as_deref().is_some_and(|after| key <= after);
        let by_prefix = match self.after_prefix.as_deref() {
            Some(prefix) => key < prefix || key.starts_with(prefix),
            None => false,
        };
        by_key || by_prefix
    }
}

impl State {
    pub fn list(&self, input: ListObjectsV2Input) -> S3Result<ListObjectsV2Output> {
        let mut begin = Begin::of(&input)?;
        let mut max_keys = input.max_keys.unwrap_or(MAX_KEYS).min(MAX_KEYS);
        refuse!(InvalidArgument if max_keys < 0);
        let mut next = None;
        if self.begins_lists_empty && input.continuation_token.is_none() {
            next = Some("key:".to_owned());
            max_keys = 0;
        }
        let url = input.encoding_type.is_some();
        let encode = |text: &str| {
            if url {
                url_encode(text)
            } else {
                text.to_owned()
            }
        };
        let prefix = input.prefix.unwrap_or_default();
        let delimiter = input.delimiter.filter(|delimiter| !delimiter.is_empty());
        let mut contents = Vec::new();
        let mut prefixes = Vec::new();
        let mut count = 0;
        let mut truncated = false;
        let from = self.objects.range(prefix.clone()..);
        for (key, object) in from.take_while(|(key, _)| key.starts_with(&prefix)) {
            if begin.is_after(key) {
                continue;
            }
            if count == max_keys {
                truncated = max_keys > 0 || next.is_some();
                break;
            }
            count += 1;
            if let Some(common) = common_prefix(key, prefix.len(), delimiter.as_deref()) {
                next = Some(format!("under:{}", url_encode(common)));
                begin.after_prefix = Some(common.to_owned());
                prefixes.push(CommonPrefix {
                    prefix: Some(encode(common)),
                });
            } else {
                next = Some(format!("key:{}", url_encode(key)));
                contents.push(dto! { Object:
                    key = encode(key), size = object.body.len() as i64, e_tag = object.e_tag(),
                    last_modified = object.modified.clone(),
                    storage_class = ObjectStorageClass::from_static("STANDARD")
                });
            }
        }
        Ok(dto! { ListObjectsV2Output:
            name = input.bucket, prefix = encode(&prefix), delimiter = delimiter.as_deref().map(encode),
            max_keys = max_keys, key_count = count, contents = contents, common_prefixes = prefixes,
            start_after = input.start_after.as_deref().map(encode), is_truncated = truncated,
            continuation_token = input.continuation_token, encoding_type = input.encoding_type,
            next_continuation_token = next.filter(|_| truncated)
        })
    }
}

/// The key up to the first delimiter behind the prefix of the list.
fn common_prefix<'a>(key: &'a str, prefix_len: usize, delimiter: Option<&str>) -> Option<&'a str> {
    let delimiter = delimiter?;
    let end = key[prefix_len..].find(delimiter)?;
    Some(&key[..prefix_len + end + delimiter.len()])
}
