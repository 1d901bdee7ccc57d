//! Ranges of objects: GET, continued if the body breaks off.

use super::super::patience::SignsOfLife;
use super::super::{Key, Object, Result, Store, StoreError};
use super::S3Store;
use super::client::{ATTEMPTS, retry_pause};
use super::errors::{failed, sentence, status};
use super::fields::{missing, object, quote};
use super::resend::max_silence;
use aws_sdk_s3::primitives::ByteStream;
use bytes::{Bytes, BytesMut};
use std::ops::Range;
use tokio::time::{sleep, timeout};

/// Pieces of this size, in bytes, fill an SSH packet, and are passed on uncopied.
const LARGE_PIECE: usize = 32 * 1024;

/// The body of a range that is being read.
struct RangeBody {
    pieces: JoinedPieces,
    missing: Range<u64>,
    /// Why the last request broke off.
    last_failure: String,
}

/// How one request for a range ended.
enum Reading {
    Done,
    /// Before its end, for this reason. The rest can be asked for again.
    BrokenOff(String),
}

impl S3Store {
    /// GetObject of a range. The SDK retries a request, not a body that breaks off or falls silent:
    /// the next request asks for what is missing. One that has brought a piece is no failed attempt.
    pub(super) async fn get_range(
        &self,
        key: &Key,
        range: Range<u64>,
        etag: &str,
    ) -> Result<Vec<Bytes>> {
        let mut body = RangeBody {
            pieces: JoinedPieces::default(),
            missing: range,
            last_failure: String::new(),
        };
        let mut attempt = 0;
        while attempt < ATTEMPTS {
            sleep(retry_pause(attempt)).await;
            let start = body.missing.start;
            match self.get_missing(key, etag, &mut body).await? {
                Reading::Done => return Ok(body.pieces.finish()),
                Reading::BrokenOff(why) => body.last_failure = why,
            }
            let brought = body.missing.start - start;
            attempt = match brought >= LARGE_PIECE as u64 {
                true => 1,
                false => attempt + 1,
            };
        }
        Err(StoreError::Other(body.last_failure))
    }

    /// One GetObject of what is missing in `body`.
    async fn get_missing(&self, key: &Key, etag: &str, body: &mut RangeBody) -> Result<Reading> {
        let Range { start, end } = body.missing;
        let request = self.client.get_object();
        let request = request
            .bucket(&self.bucket)
            .key(key.as_str())
            .if_match(etag)
            .range(format!("bytes={start}-{}", end - 1));
        let mut out = request.send().await.map_err(failed)?;
        // Not every store keeps If-Match.
        match &out.e_tag {
            Some(found) if quote(found) == quote(etag) => {}
            Some(_) | None => return Err(StoreError::Precondition),
        }
        match parse_content_range(out.content_range.as_deref()) {
            Some(found) if found.range == (start..end) => {}
            Some(_) | None => {
                let why = "another range than was asked for";
                return Ok(Reading::BrokenOff(why.to_owned()));
            }
        }
        loop {
            match next_chunk(&mut out.body).await {
                Ok(Some(chunk)) if body.missing.start + chunk.len() as u64 <= end => {
                    body.missing.start += chunk.len() as u64;
                    body.pieces.push(chunk);
                }
                Ok(Some(_)) => {
                    return Err(StoreError::Other("more bytes than asked for".to_owned()));
                }
                Ok(None) if body.missing.is_empty() => return Ok(Reading::Done),
                Ok(None) => return Ok(Reading::BrokenOff("the body ended early".to_owned())),
                Err(why) => return Ok(Reading::BrokenOff(why)),
            }
        }
    }

    /// GetObject of the first bytes. See [`Store::open`].
    pub(super) async fn get_beginning(&self, key: &Key, limit: u64) -> Result<(Object, Bytes)> {
        let request = self.client.get_object();
        let request = request
            .bucket(&self.bucket)
            .key(key.as_str())
            .range(format!("bytes=0-{}", limit - 1));
        let mut out = match request.send().await {
            Ok(out) => out,
            // An empty object has no first byte.
            Err(error) if status(&error) == Some(416) => {
                return Ok((self.head(key).await?, Bytes::new()));
            }
            Err(error) => return Err(failed(error)),
        };
        let Some(found) = parse_content_range(out.content_range.as_deref()) else {
            return Err(missing("size"));
        };
        let len = found.size.min(limit);
        if found.range != (0..len) {
            let why = "the store answered another range than was asked for";
            return Err(StoreError::Other(why.to_owned()));
        }
        let class = out.storage_class.take();
        let object = object(Some(found.size), out.e_tag.take(), out.last_modified, class)?;
        let len = len as usize;
        let mut bytes = BytesMut::with_capacity(len);
        // If the body breaks off, what is missing is asked for later, like the rest of the object.
        while bytes.len() < len
            && let Ok(Some(chunk)) = next_chunk(&mut out.body).await
        {
            bytes.extend_from_slice(&chunk);
        }
        bytes.truncate(len);
        Ok((object, bytes.freeze()))
    }
}

/// The next bytes of a body, or `None` at its end. Errors: why it breaks off.
async fn next_chunk(body: &mut ByteStream) -> std::result::Result<Option<Bytes>, String> {
    let silence = max_silence(&SignsOfLife::current());
    match timeout(silence, body.next()).await {
        Ok(Some(Ok(chunk))) => Ok(Some(chunk)),
        Ok(Some(Err(error))) => Err(sentence(&error)),
        Ok(None) => Ok(None),
        Err(_elapsed) => Err("the body stopped".to_owned()),
    }
}

/// The pieces of a body: large ones as they arrived, small ones together, as thousands of them
/// would take more memory than their bytes.
#[derive(Default)]
struct JoinedPieces {
    pieces: Vec<Bytes>,
    small: BytesMut,
}

impl JoinedPieces {
    fn push(&mut self, chunk: Bytes) {
        if self.small.is_empty() && chunk.len() >= LARGE_PIECE {
            self.pieces.push(chunk);
            return;
        }
        self.small.extend_from_slice(&chunk);
        if self.small.len() >= LARGE_PIECE {
            self.pieces.push(self.small.split().freeze());
        }
    }

    fn finish(mut self) -> Vec<Bytes> {
        if !self.small.is_empty() {
            self.pieces.push(self.small.freeze());
        }
        self.pieces
    }
}

/// The header `Content-Range` ([RFC 9110
/// §14.4](https://www.rfc-editor.org/rfc/rfc9110#section-14.4)).
#[derive(Debug, PartialEq, Eq)]
struct ContentRange {
    range: Range<u64>,
    /// Of the whole object, in bytes.
    size: u64,
}

fn parse_content_range(header: Option<&str>) -> Option<ContentRange> {
    let (range, size) = header?.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let end = last.parse::<u64>().ok()?.checked_add(1)?;
    Some(ContentRange {
        range: first.parse().ok()?..end,
        size: size.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_or_refused() {
        let found = parse_content_range(Some("bytes 5-9/20"));
        assert_eq!(
            found,
            Some(ContentRange {
                range: 5..10,
                size: 20
            })
        );
        for odd in [
            "bytes 5-9/*",
            "bytes */20",
            "5-9/20",
            "bytes 5-/20",
            "bytes 0-18446744073709551615/20",
            "",
        ] {
            assert_eq!(parse_content_range(Some(odd)), None, "{odd}");
        }
        assert_eq!(parse_content_range(None), None);
    }
}
