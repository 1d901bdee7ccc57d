//! The Prometheus recorder, and the HTTP server that answers `/metrics` and `/healthz`.

use anyhow::Context;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use sftpd::metrics::*;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Upper bounds of the histogram in seconds: from a HEAD nearby to a part over a slow line.
const SECONDS: [f64; 13] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0,
];
/// Limit on connections to the HTTP server. Each takes a descriptor that an SFTP client could use.
const MAX_HTTP_CONNECTIONS: usize = 64;
/// For a client to send its request. Short, because health checks of load balancers wait for a few
/// seconds only, also behind clients that hold all connections and send nothing.
const REQUEST_TIME: Duration = Duration::from_secs(1);
/// For a whole connection, which includes that the client reads the response.
const CONNECTION_TIME: Duration = Duration::from_secs(10);
/// Pause after `accept` fails, for example when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How often the recorder merges samples, which would otherwise pile up between two scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Installs the Prometheus recorder, with every counter at 0.
pub fn install() -> anyhow::Result<PrometheusHandle> {
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Full(S3_REQUESTS.to_owned()), &SECONDS);
    let handle = builder
        .and_then(PrometheusBuilder::install_recorder)
        .context("can't keep metrics")?;
    describe_gauge!(BUILD_INFO, "Version of this sftpd; always 1");
    describe_gauge!(CONNECTIONS, "SSH connections open");
    describe_gauge!(MAX_SESSIONS, "Limit on connections (--max-sessions)");
    describe_counter!(REFUSED_CONNECTIONS, "Connections refused");
    describe_gauge!(SESSIONS, "SFTP sessions open");
    describe_counter!(LOGINS, "Attempts to log in");
    describe_counter!(TRANSFERS, "Transfers of files that ended");
    describe_counter!(
        TRANSFERRED_BYTES,
        Unit::Bytes,
        "Bytes of those transfers, counted at their end"
    );
    describe_histogram!(
        S3_REQUESTS,
        Unit::Seconds,
        "HTTP requests to S3, retries included, up to the head of the response"
    );
    describe_gauge!(
        BUFFER_MEMORY,
        Unit::Bytes,
        "Bytes in use of the pool (--buffer-memory)"
    );
    describe_gauge!(
        BUFFER_MEMORY_LIMIT,
        Unit::Bytes,
        "Size of the pool (--buffer-memory)"
    );
    describe_counter!(NO_LOGINS, "SSH connections that ended before a login");
    describe_counter!(
        DROPPED_LOG_LINES,
        "Lines of the log that were dropped, as it was not read"
    );
    describe_gauge!(OPEN_UPLOADS, "Files open for writing");
    describe_counter!(ABORTED_UPLOADS, "Multipart uploads that were to be aborted");
    describe_gauge!(USERS, "Users of the users file that is in force");
    describe_gauge!(
        USERS_FILE_OK,
        "0 while the users file can't be read and the last good one is in force"
    );
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1);
    zero_counters();
    Ok(handle)
}

/// Starts counters at 0: `increase()` misses the first event of a series that did not exist before.
fn zero_counters() {
    for name in [CONNECTIONS, SESSIONS, OPEN_UPLOADS] {
        gauge!(name).set(0);
    }
    for reason in ["full", "strangers", "descriptors", "user_limit"] {
        counter!(REFUSED_CONNECTIONS, "reason" => reason).absolute(0);
    }
    for reason in [
        "wrong",
        "unknown_user",
        "disabled",
        "sha1_signature",
        "nothing_offered",
        "login_timeout",
        "user_penalty",
        "address_penalty",
        "no_common_algorithm",
    ] {
        counter!(NO_LOGINS, "reason" => reason).absolute(0);
    }
    counter!(DROPPED_LOG_LINES).absolute(0);
    for result in ["aborted", "left"] {
        counter!(ABORTED_UPLOADS, "result" => result).absolute(0);
    }
    for method in ["key", "password"] {
        for result in ["accepted", "refused"] {
            counter!(LOGINS, "method" => method, "result" => result).absolute(0);
        }
    }
    counter!(LOGINS, "method" => "password", "result" => "unheard").absolute(0);
    for direction in ["upload", "download"] {
        for result in ["ok", "failed", "cut_off"] {
            counter!(TRANSFERS, "direction" => direction, "result" => result).absolute(0);
            counter!(TRANSFERRED_BYTES, "direction" => direction, "result" => result).absolute(0);
        }
    }
}

/// Serves `/metrics` and `/healthz` until the process ends. A server that drains is unhealthy, so
/// that a load balancer sends it no new clients. S3 is not checked: if it failed, a load balancer
/// would take all gateways out at once.
pub async fn serve(listener: TcpListener, handle: PrometheusHandle, drain: CancellationToken) {
    tokio::spawn(run_upkeep(handle.clone()));
    let room = Arc::new(Semaphore::new(MAX_HTTP_CONNECTIONS));
    while let Ok(permit) = room.clone().acquire_owned().await {
        let Ok((stream, _)) = listener.accept().await else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let handle = handle.clone();
        let drain = drain.clone();
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

async fn run_upkeep(handle: PrometheusHandle) {
    loop {
        sleep(UPKEEP_INTERVAL).await;
        handle.run_upkeep();
    }
}

fn answer(
    request: &Request<Incoming>,
    handle: &PrometheusHandle,
    is_draining: bool,
) -> Response<String> {
    let (status, text) = match request.uri().path() {
        "/metrics" => (StatusCode::OK, handle.render()),
        "/healthz" if is_draining => (
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
