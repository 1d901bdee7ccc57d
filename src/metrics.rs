//! What a monitoring system can ask: the names of all metrics, and the small HTTP server that hands them out.
//!
//! Figures are noted where the outcome is known, by the macros of the crate `metrics`, which do nothing until
//! [`install`] was called: whoever embeds the server can bring a recorder of their own. Names follow
//! [Prometheus' conventions](https://prometheus.io/docs/practices/naming/).

use anyhow::Context;
use hyper::{
    Request, Response, StatusCode, body::Incoming, header::CONTENT_TYPE, server::conn::http1,
};
use hyper::{header::HeaderValue, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::Semaphore, time::sleep, time::timeout};
use tokio_util::sync::CancellationToken;

// What each one is, [`install`] says; here are its labels.
pub(crate) const BUILD_INFO: &str = "sftpd_build_info"; // version
pub(crate) const CONNECTIONS: &str = "sftpd_connections";
pub(crate) const MAX_SESSIONS: &str = "sftpd_max_sessions";
/// reason: full, strangers, descriptors
pub(crate) const REFUSED_CONNECTIONS: &str = "sftpd_refused_connections_total";
pub(crate) const SESSIONS: &str = "sftpd_sessions";
/// method: key, password; result: accepted, refused, and unheard, of passwords only
pub(crate) const LOGINS: &str = "sftpd_logins_total";
pub(crate) const TRANSFERS: &str = "sftpd_transfers_total"; // direction: upload, download; result: ok, failed, cut_off
pub(crate) const TRANSFERRED_BYTES: &str = "sftpd_transferred_bytes_total"; // as above
/// operation: as S3 calls it; result: ok, refused, throttled, failed, no_answer
pub(crate) const S3_REQUESTS: &str = "sftpd_s3_request_duration_seconds";
pub(crate) const BUFFER_MEMORY: &str = "sftpd_buffer_memory_bytes";
pub(crate) const BUFFER_MEMORY_LIMIT: &str = "sftpd_buffer_memory_limit_bytes";
pub(crate) const OPEN_UPLOADS: &str = "sftpd_open_uploads";
pub(crate) const ABORTED_UPLOADS: &str = "sftpd_aborted_uploads_total"; // result: aborted; left, in the bucket
pub(crate) const USERS_FILE_OK: &str = "sftpd_users_file_ok";

/// Upper bounds in seconds: from a HEAD nearby to a part over a slow line.
const SECONDS: [f64; 13] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0,
];
/// Most connections to the HTTP server at once. Each takes a descriptor that SFTP clients could have.
const MAX_HTTP_CONNECTIONS: usize = 64;
/// For a client to send its request. A balancer's health check waits for the answer for a few seconds at most, also when
/// all places are taken by others that send nothing.
const REQUEST_TIME: Duration = Duration::from_secs(1);
/// For a connection in all, so also for a client to read the answer.
const CONNECTION_TIME: Duration = Duration::from_secs(10);
/// The recorder puts together what was noted, which would otherwise pile up between two scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// One more of what a gauge counts, until dropped.
pub(crate) struct OneMore(&'static str);

impl OneMore {
    pub(crate) fn of(name: &'static str) -> OneMore {
        gauge!(name).increment(1);
        OneMore(name)
    }
}

impl Drop for OneMore {
    fn drop(&mut self) {
        gauge!(self.0).decrement(1);
    }
}

/// From now on figures are kept.
pub fn install() -> anyhow::Result<PrometheusHandle> {
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Full(S3_REQUESTS.to_owned()), &SECONDS);
    let handle = builder
        .and_then(PrometheusBuilder::install_recorder)
        .context("can't keep metrics")?;
    describe_gauge!(BUILD_INFO, "Which sftpd this is; always 1");
    describe_gauge!(CONNECTIONS, "SSH connections open");
    describe_gauge!(MAX_SESSIONS, "Most connections at once (--max-sessions)");
    describe_counter!(REFUSED_CONNECTIONS, "Connections turned away");
    describe_gauge!(SESSIONS, "SFTP sessions open");
    describe_counter!(LOGINS, "Attempts to log in");
    describe_counter!(TRANSFERS, "Files closed or cut off");
    describe_counter!(
        TRANSFERRED_BYTES,
        Unit::Bytes,
        "Their bytes, counted at the end"
    );
    describe_histogram!(
        S3_REQUESTS,
        Unit::Seconds,
        "HTTP requests to S3, retries included, up to the answer's head"
    );
    describe_gauge!(
        BUFFER_MEMORY,
        Unit::Bytes,
        "Taken from the pool of --buffer-memory"
    );
    describe_gauge!(
        BUFFER_MEMORY_LIMIT,
        Unit::Bytes,
        "Size of the pool (--buffer-memory)"
    );
    describe_gauge!(OPEN_UPLOADS, "Files open for writing");
    describe_counter!(ABORTED_UPLOADS, "Multipart uploads given up");
    describe_gauge!(
        USERS_FILE_OK,
        "0 while the users file can't be read and the last good one is in force"
    );
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1);
    begin();
    Ok(handle)
}

/// Everything that is counted begins at 0: of a counter that appears with its first event nobody sees it rise.
fn begin() {
    [CONNECTIONS, SESSIONS, OPEN_UPLOADS]
        .into_iter()
        .for_each(|name| gauge!(name).set(0));
    ["full", "strangers", "descriptors"]
        .into_iter()
        .for_each(|why| counter!(REFUSED_CONNECTIONS, "reason" => why).absolute(0));
    ["aborted", "left"]
        .into_iter()
        .for_each(|result| counter!(ABORTED_UPLOADS, "result" => result).absolute(0));
    for (method, result) in ["key", "password"]
        .into_iter()
        .flat_map(|m| ["accepted", "refused"].map(|r| (m, r)))
    {
        counter!(LOGINS, "method" => method, "result" => result).absolute(0);
    }
    counter!(LOGINS, "method" => "password", "result" => "unheard").absolute(0);
    for direction in ["upload", "download"] {
        for result in ["ok", "failed", "cut_off"] {
            counter!(TRANSFERS, "direction" => direction, "result" => result).absolute(0);
            counter!(TRANSFERRED_BYTES, "direction" => direction, "result" => result).absolute(0);
        }
    }
}

/// Answers `/metrics` and `/healthz` until the process ends. Unhealthy is a server that drains, so that a load balancer
/// sends it nobody new; whether S3 answers is not asked, as that would take all gateways out at once.
pub async fn serve(listener: TcpListener, handle: PrometheusHandle, drain: CancellationToken) {
    let upkeep = handle.clone();
    tokio::spawn(async move {
        loop {
            sleep(UPKEEP_INTERVAL).await;
            upkeep.run_upkeep();
        }
    });
    let room = Arc::new(Semaphore::new(MAX_HTTP_CONNECTIONS));
    while let Ok(permit) = room.clone().acquire_owned().await {
        let (handle, drain) = (handle.clone(), drain.clone());
        let Ok((stream, _)) = listener.accept().await else {
            sleep(Duration::from_millis(200)).await;
            continue;
        };
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let response = answer(&request, &handle, drain.is_cancelled());
                async { Ok::<_, Infallible>(response) }
            });
            let mut http = http1::Builder::new();
            http.keep_alive(false)
                .timer(TokioTimer::new())
                .header_read_timeout(REQUEST_TIME);
            let _ = timeout(
                CONNECTION_TIME,
                http.serve_connection(TokioIo::new(stream), service),
            )
            .await;
            drop(permit);
        });
    }
}

fn answer(
    request: &Request<Incoming>,
    handle: &PrometheusHandle,
    draining: bool,
) -> Response<String> {
    let (status, text) = match request.uri().path() {
        "/metrics" => (StatusCode::OK, handle.render()),
        "/healthz" if draining => (
            StatusCode::SERVICE_UNAVAILABLE,
            "shutting down\n".to_owned(),
        ),
        "/healthz" => (StatusCode::OK, "ok\n".to_owned()),
        _ => (
            StatusCode::NOT_FOUND,
            "there are /metrics and /healthz\n".to_owned(),
        ),
    };
    let mut response = Response::new(text);
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}
