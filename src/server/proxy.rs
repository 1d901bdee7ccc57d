//! The client behind a load balancer: the PROXY protocol, versions 1 and 2
//! ([haproxy's specification](https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt)), which puts one header before
//! everything else. Believed only of addresses that the operator named: anyone could write one.

use proxy_header::{Error, ParseConfig, ProxyHeader};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use tokio::{io::AsyncReadExt, net::TcpStream};

/// A header with more than the addresses in it (TLVs) is passed over up to this length in bytes.
const LONGEST: usize = 4096;

/// Reads the header and nothing after it. `None` where the proxy speaks for itself, as for a health check.
pub async fn client(stream: &mut TcpStream) -> io::Result<Option<SocketAddr>> {
    let mut bytes = Vec::new();
    loop {
        match ProxyHeader::parse(&bytes, ParseConfig::default()) {
            Ok((header, _)) => return Ok(header.proxied_address().map(|address| address.source)),
            // Byte by byte, as what follows is SSH's.
            Err(Error::BufferTooShort) if bytes.len() < LONGEST => {
                bytes.push(stream.read_u8().await?)
            }
            Err(_) => {
                return Err(io::Error::new(
                    ErrorKind::InvalidData,
                    "no PROXY header, or a broken one",
                ));
            }
        }
    }
}
