//! Digests, times and URLs in the forms that S3 has for them.

use s3s::crypto::{Checksum as _, Crc64Nvme, Md5};
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
    base64(&(!crc).to_be_bytes())
}

/// A CRC-64/NVME as in a header.
pub fn crc64(bytes: &[u8]) -> String {
    base64(&Crc64Nvme::checksum(bytes))
}

fn base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let mut bits = 0;
        for byte in group {
            bits = bits << 8 | usize::from(*byte);
        }
        bits <<= 8 * (3 - group.len());
        for digit in 0..4 {
            let is_padding = digit > group.len();
            let letter = BASE64[bits >> (18 - 6 * digit) & 63];
            text.push(if is_padding { '=' } else { char::from(letter) });
        }
    }
    text
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
