//! Digests, times and URLs in the forms that S3 has for them.

use s3s::crypto::{Checksum as _, Md5};
use s3s::dto::Timestamp;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// A CRC-32 as in a header: base64 of its four bytes.
pub fn crc32(bytes: &[u8]) -> String {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
        }
    }
    let bits = u64::from(!crc) << 4;
    let mut text = String::new();
    for digit in 0..6 {
        let index = (bits >> (30 - 6 * digit)) as usize & 63;
        text.push(char::from(BASE64[index]));
    }
    text + "=="
}

/// In hexadecimal.
pub fn md5(bytes: &[u8]) -> String {
    format!("{:032x}", u128::from_be_bytes(Md5::checksum(bytes)))
}

/// The time in whole seconds: S3 keeps no fractions, and a `Last-Modified` header holds none.
pub fn now() -> Timestamp {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = since_1970.expect("a clock set").as_secs();
    (UNIX_EPOCH + Duration::from_secs(seconds)).into()
}

/// The encoding of `encoding-type=url`: a space is a plus sign, slashes stay.
pub fn url_encode(text: &str) -> String {
    urlencoding::encode(text)
        .replace("%20", "+")
        .replace("%2F", "/")
        .replace("%2A", "*")
        .replace('~', "%7E")
}

pub fn url_decode(text: &str) -> String {
    let text = text.replace('+', " ");
    urlencoding::decode(&text).unwrap_or_default().into_owned()
}
