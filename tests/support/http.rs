//! A GET without an HTTP client.

use super::wait::PATIENCE;
use std::io::{Read, Write};
use std::net::TcpStream;

/// The status line and the body of the answer to a GET.
pub fn http_get(address: &str, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: sftpd\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status_line = head.lines().next().unwrap();
    (status_line.to_owned(), body.to_owned())
}
