//! The flags of `sftpd serve` and `sftpd doctor`, and what they come to.

use anyhow::{Context, anyhow, bail, ensure};
use bytesize::ByteSize;
use clap::Args;
use ipnet::IpNet;
use sftpd::server::{self, Algorithms, Config};
use sftpd::store::{MIN_PART, Store, memory::MemoryStore, s3::S3Store};
use sftpd::tree::Home;
use sftpd::upload::PartSizes;
use sftpd::users::{FileAuth, commands::Usage};
use std::net::{IpAddr, SocketAddr};
use std::{path::PathBuf, sync::Arc, time::Duration};

/// What a server needs to know. Every flag has a variable, so that systemd's EnvironmentFile is all there is to edit.
#[derive(Args)]
pub struct Settings {
    /// Where files live: s3://BUCKET, s3://BUCKET/PREFIX, or memory: (lost at the end).
    #[arg(long, env = "SFTPD_STORE", value_name = "URL")]
    pub store: String,
    /// Where to listen; port 0 takes any free one.
    #[arg(long, env = "SFTPD_LISTEN", default_value = "0.0.0.0:2222", value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// Who may log in; see `sftpd users`.
    #[arg(long, env = "SFTPD_USERS", default_value = "users.json", value_name = "FILE")]
    pub users: PathBuf,
    /// Private keys of this host in OpenSSH's format; if there is none, an ed25519, an ECDSA and an RSA key are made.
    #[arg(long, env = "SFTPD_HOST_KEYS", default_value = "host_keys", value_name = "DIR")]
    pub host_keys: PathBuf,
    /// All part and read-ahead buffers together, at least four parts.
    #[arg(long, env = "SFTPD_BUFFER_MEMORY", default_value = "256MiB", value_name = "SIZE")]
    buffer_memory: ByteSize,
    /// First part size: 5MiB to 5GiB. Doubles every 1,000 parts, up to a quarter of the buffer memory.
    #[arg(long, env = "SFTPD_PART_SIZE", default_value = "5MiB", value_name = "SIZE")]
    part_size: ByteSize,
    /// All parts but the last have --part-size, as Cloudflare R2 demands.
    #[arg(long, env = "SFTPD_EQUAL_PARTS")]
    pub equal_parts: bool,
    /// Directories that clients make are stored, as empty objects `dir/`: other gateways and the next start see them.
    #[arg(long, env = "SFTPD_DIR_MARKERS")]
    dir_markers: bool,
    /// Connections at once; more are refused.
    #[arg(long, env = "SFTPD_MAX_SESSIONS", default_value_t = 1000, value_name = "N")]
    max_sessions: usize,
    /// From connect to logged in.
    #[arg(long, env = "SFTPD_LOGIN_TIMEOUT", default_value = "30s", value_parser = humantime::parse_duration, value_name = "TIME")]
    login_timeout: Duration,
    /// A session ends after so long without a request or an answer.
    #[arg(long, env = "SFTPD_IDLE_TIMEOUT", default_value = "30m", value_parser = humantime::parse_duration, value_name = "TIME")]
    idle_timeout: Duration,
    /// Open transfers may finish for so long after SIGTERM; a second signal cuts them.
    #[arg(long, env = "SFTPD_DRAIN_TIMEOUT", default_value = "60s", value_parser = humantime::parse_duration, value_name = "TIME")]
    drain_timeout: Duration,
    /// Multipart uploads that a server which died left in the store are aborted after so long.
    #[arg(long, env = "SFTPD_ABANDONED_AFTER", default_value = "24h", value_parser = humantime::parse_duration, value_name = "TIME")]
    abandoned_after: Duration,
    /// What SSH offers.
    #[arg(long, env = "SFTPD_ALGORITHMS", default_value = "modern", value_name = "KIND")]
    algorithms: Algorithms,
    /// Addresses and networks (10.0.0.0/8) of load balancers, which begin each connection with a PROXY protocol header.
    #[arg(long, env = "SFTPD_PROXY_PROTOCOL", value_delimiter = ',', value_parser = network, value_name = "NET,NET")]
    proxy_protocol: Vec<IpNet>,
    /// Where to serve /metrics (for Prometheus) and /healthz, best on a loopback address: nobody has to log in.
    #[arg(long, env = "SFTPD_METRICS", value_name = "ADDR:PORT")]
    pub metrics: Option<SocketAddr>,
}

/// What `--store` says.
pub enum Place<'a> {
    /// memory:
    Memory,
    /// s3://BUCKET/PREFIX
    Bucket(&'a str, &'a str),
}

impl Settings {
    /// Where files live.
    pub fn place(&self) -> anyhow::Result<Place<'_>> {
        let store = &self.store;
        let place = store.strip_prefix("s3://").unwrap_or_default();
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        Home::new(prefix, "").map_err(|error| Usage(anyhow!("--store {store:?}: {error}")))?;
        match bucket {
            "" if store == "memory:" => Ok(Place::Memory),
            "" => bail!(Usage(anyhow!("--store {store:?} is neither s3://BUCKET, s3://BUCKET/PREFIX nor memory:"))),
            bucket => Ok(Place::Bucket(bucket, prefix)),
        }
    }

    /// How uploads are cut.
    pub fn part_sizes(&self) -> anyhow::Result<PartSizes> {
        let (part_size, memory) = (self.part_size, self.buffer_memory);
        let (first, most) = (part_size.as_u64(), memory.as_u64() / 4);
        ensure!(first >= MIN_PART, Usage(anyhow!("--part-size {part_size} is below S3's minimum of 5MiB")));
        ensure!(first <= most, Usage(anyhow!("--buffer-memory {memory} is less than four parts of {part_size}")));
        let PartSizes { cap, double_every, .. } = PartSizes::default();
        Ok(PartSizes { first, cap: cap.min(most), double_every: if self.equal_parts { 0 } else { double_every } })
    }

    /// All that a server needs; makes the host key, and asks the bucket once.
    pub async fn config(&self) -> anyhow::Result<Config> {
        let auth = FileAuth::open(self.users.clone()).map_err(Usage)?;
        let (place, part_sizes) = (self.place()?, self.part_sizes()?);
        let host_keys = server::load_or_create(&self.host_keys).map_err(Usage)?;
        let (store, prefix): (Arc<dyn Store>, _) = match place {
            Place::Memory => (Arc::new(MemoryStore::default()), ""),
            Place::Bucket(bucket, prefix) => {
                let store = S3Store::open(bucket).await?;
                store.check().await.with_context(|| format!("bucket {bucket} can't be used"))?;
                (Arc::new(store), prefix)
            }
        };
        Ok(Config {
            prefix: prefix.to_owned(),
            buffer_memory: self.buffer_memory.as_u64(),
            part_sizes,
            max_sessions: self.max_sessions,
            login_timeout: self.login_timeout,
            idle_timeout: self.idle_timeout,
            drain_timeout: self.drain_timeout,
            abandoned_after: self.abandoned_after,
            algorithms: self.algorithms,
            dir_markers: self.dir_markers,
            proxies: self.proxy_protocol.clone(),
            ..Config::new(store, Arc::new(auth), host_keys)
        })
    }
}

/// A network, or one address.
fn network(text: &str) -> Result<IpNet, String> {
    let parsed = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    parsed.map_err(|_| "neither an address nor a network like 10.0.0.0/8".to_owned())
}
