//! Lists of keys. S3 URL-encodes them, as not every key can stand in XML.

use super::super::{Entry, ListRequest, Page, Result, StoreError};
use super::S3Store;
use super::errors::failed;
use super::fields::{object, size};
use aws_sdk_s3::types::{EncodingType, StorageClass};
use percent_encoding::percent_decode_str;

impl S3Store {
    /// ListObjectsV2.
    pub(super) async fn list_objects(&self, request: ListRequest<'_>) -> Result<Page> {
        let delimiter = match request.folded {
            true => Some("/".to_owned()),
            false => None,
        };
        let list = self.client.list_objects_v2();
        let list = list
            .bucket(&self.bucket)
            .prefix(request.prefix.as_str())
            .set_delimiter(delimiter)
            .max_keys(request.limit as i32)
            .encoding_type(EncodingType::Url)
            .set_continuation_token(request.after);
        let out = list.send().await.map_err(failed)?;
        let names = Names::of(out.encoding_type.as_ref());
        let mut entries = Vec::with_capacity(out.contents().len() + out.common_prefixes().len());
        for found in out.contents.unwrap_or_default() {
            if let Some(key) = found.key {
                let class = found.storage_class.as_ref();
                let class = class.map(|class| StorageClass::from(class.as_str()));
                let object = object(size(found.size), found.e_tag, found.last_modified, class)?;
                entries.push(Entry::Object(names.decode(key)?, object));
            }
        }
        for found in out.common_prefixes.unwrap_or_default() {
            if let Some(prefix) = found.prefix {
                entries.push(Entry::Prefix(names.decode(prefix)?));
            }
        }
        let next = match out.is_truncated {
            Some(true) => out.next_continuation_token,
            Some(false) | None => None,
        };
        Ok(Page { entries, next })
    }
}

/// The encoding of the names in a list.
pub enum Names {
    /// None: the store does not know the encoding.
    Plain,
    /// That of HTML forms, with `+` for a blank.
    UrlEncoded,
}

impl Names {
    pub fn of(encoding: Option<&EncodingType>) -> Names {
        match encoding {
            Some(EncodingType::Url) => Names::UrlEncoded,
            Some(_) | None => Names::Plain,
        }
    }

    pub fn decode(&self, name: String) -> Result<String> {
        match self {
            Names::Plain => Ok(name),
            Names::UrlEncoded => {
                let name = name.replace('+', " ");
                match percent_decode_str(&name).decode_utf8() {
                    Ok(decoded) => Ok(decoded.into()),
                    Err(_) => {
                        let why = "the store lists a name that is not UTF-8";
                        Err(StoreError::Other(why.into()))
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listed_names_are_decoded_where_they_are_encoded() {
        let encoded = Names::of(Some(&EncodingType::Url));
        assert_eq!(
            encoded.decode("a+b%2Bc%01%EF%BF%BE/d%25".to_owned()),
            Ok("a b+c\u{1}\u{FFFE}/d%".to_owned())
        );
        assert!(encoded.decode("%FF".to_owned()).is_err());
        assert_eq!(
            Names::of(None).decode("a+b%20c".to_owned()),
            Ok("a+b%20c".to_owned())
        );
    }
}
