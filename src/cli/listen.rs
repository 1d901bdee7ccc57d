//! Addresses to listen on, as people write them.

use anyhow::bail;
use std::fmt::{self, Display};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use tokio::net::TcpListener;

const EXPECTED: &str =
    "use HOST:PORT, like 0.0.0.0:2222, localhost:2222 or [::1]:2222, or :2222 for all addresses";

/// A host and a port to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenAddress {
    /// An address without brackets, or a name. `None` for every address of this machine.
    host: Option<String>,
    port: u16,
}

impl FromStr for ListenAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<ListenAddress, &'static str> {
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        let port = port.parse().map_err(|_| EXPECTED)?;
        let bracketed = host
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let host = match bracketed {
            Some(address) if is_ipv6(address) => Some(address),
            None if host.is_empty() => None,
            // Without brackets an IPv6 address can't be told from its port.
            None if !host.contains(['[', ']', ':']) => Some(host),
            _ => return Err(EXPECTED),
        };
        Ok(ListenAddress {
            host: host.map(str::to_owned),
            port,
        })
    }
}

/// Accepts an address with an interface too: `fe80::1%eth0`.
fn is_ipv6(address: &str) -> bool {
    let (address, _interface) = address.split_once('%').unwrap_or((address, ""));
    address.parse::<Ipv6Addr>().is_ok()
}

impl Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = self.port;
        match &self.host {
            Some(host) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Some(host) => write!(f, "{host}:{port}"),
            None => write!(f, ":{port}"),
        }
    }
}

impl ListenAddress {
    /// As [`ListenAddress::try_bind`], with an error that names the address and the next step.
    /// `flag` is the one that gives the address.
    pub async fn bind(&self, flag: &str) -> anyhow::Result<TcpListener> {
        match self.try_bind().await {
            Ok(listener) => Ok(listener),
            Err(error) => bail!("{}", self.explain(&error, flag)),
        }
    }

    /// A sentence about a failure to listen: the address, the reason and the next step.
    pub fn explain(&self, error: &io::Error, flag: &str) -> String {
        let port = self.port;
        let advice = match error.kind() {
            ErrorKind::AddrInUse => format!(
                "`ss -ltnp 'sport = :{port}'` tells by what; end that, or give {flag} another port"
            ),
            ErrorKind::AddrNotAvailable => format!("give {flag} an address of this machine"),
            ErrorKind::PermissionDenied => {
                format!("ports below 1024 need CAP_NET_BIND_SERVICE, or give {flag} another port")
            }
            _ => format!("correct {flag}"),
        };
        format!("can't listen on {self} ({error}): {advice}")
    }

    /// Listens on the first of the host's addresses that can be bound. Every address of the machine
    /// is `[::]`, which accepts IPv4 too, or `0.0.0.0` on machines without IPv6.
    pub async fn try_bind(&self) -> io::Result<TcpListener> {
        match &self.host {
            Some(host) => TcpListener::bind((host.as_str(), self.port)).await,
            None => {
                let ipv6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, self.port));
                let ipv4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, self.port));
                TcpListener::bind(&[ipv6, ipv4][..]).await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_as_people_write_them() {
        for (text, shown) in [
            ("0.0.0.0:2222", "0.0.0.0:2222"),
            ("localhost:2222", "localhost:2222"),
            (":2222", ":2222"),
            ("2222", ":2222"),
            ("[::1]:22", "[::1]:22"),
            ("[fe80::1%eth0]:0", "[fe80::1%eth0]:0"),
        ] {
            let address: ListenAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), shown, "{text}");
        }
        for text in [
            "",
            ":",
            "localhost",
            "localhost:",
            "1.2.3.4",
            "::1:22",
            "[::1]",
            "[::1:22",
            "[host]:22",
            ":65536",
            "a:b:1",
        ] {
            assert!(text.parse::<ListenAddress>().is_err(), "{text}");
        }
    }
}
