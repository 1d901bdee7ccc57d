//! The HTTP client under the SDK, which makes every request to S3 and to the sources of
//! credentials.
//!
//! It is like the SDK's own (hyper and rustls, the proxies that the environment names), except that
//! little of a body is held between the SDK and the network. So what a connection has taken has
//! left, and a slow upload can be told from a silent store (see `signs.rs`). And it speaks HTTP/1.1
//! only: a request has a connection of its own, which is closed if the request is given up.

use aws_sdk_s3::config::{HttpClient, RuntimeComponents, SharedHttpClient};
use aws_sdk_s3::error::{BoxError, ConnectorError};
use aws_smithy_runtime_api::client::http::{
    HttpConnector as SdkConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_types::body::SdkBody;
use futures_util::future::BoxFuture;
use hyper::header::PROXY_AUTHORIZATION;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::{Request, Response, Uri, body::Incoming};
use hyper_rustls::{ConfigBuilderExt, HttpsConnector};
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{
    CaptureConnection, Connected, Connection, HttpConnector, capture_connection,
};
use hyper_util::client::legacy::{Client, Error};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::client::WantsClientCert;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier};
use std::fmt::{self, Debug, Formatter};
use std::future::pending;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tower_service::Service;

/// How much hyper holds of a request or an answer, in bytes. It takes one more piece of a body
/// while it holds less.
const MAX_BUFFER: usize = 128 * 1024;
/// How much of what was written the system holds before it is sent, in bytes. Otherwise it may hold
/// megabytes, which are minutes on a slow link.
#[cfg(any(target_os = "android", target_os = "linux"))]
const MAX_UNSENT: u32 = 128 * 1024;

/// See the module. Clones share the connections.
#[derive(Clone)]
pub struct StoreHttp {
    client: Client<Connector, SdkBody>,
    proxies: Arc<Matcher>,
}

impl StoreHttp {
    /// Trusts the system's certificates.
    pub fn trusting_system() -> Result<StoreHttp, rustls::Error> {
        let tls = match tls_settings()?.with_native_roots() {
            Ok(settings) => settings,
            Err(error) => {
                // Which is fine without TLS.
                log::debug!("no certificate of the system can be used: {error}");
                tls_settings()?.with_root_certificates(RootCertStore::empty())
            }
        };
        Ok(StoreHttp::with_tls(tls))
    }

    /// Trusts these certificates.
    pub fn trusting(certificates: RootCertStore) -> Result<StoreHttp, rustls::Error> {
        let tls = tls_settings()?.with_root_certificates(certificates);
        Ok(StoreHttp::with_tls(tls))
    }

    fn with_tls(tls: ConfigBuilder<ClientConfig, WantsClientCert>) -> StoreHttp {
        let tls = Arc::new(tls.with_no_client_auth());
        let proxies = Arc::new(Matcher::from_env());
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        let connector = Connector {
            direct: HttpsConnector::from((TcpConnector(tcp), tls.clone())),
            tls,
            proxies: proxies.clone(),
        };
        let mut client = Client::builder(TokioExecutor::new());
        // Without a timer no idle connection is closed.
        client.pool_timer(TokioTimer::new());
        client.http1_max_buf_size(MAX_BUFFER);
        StoreHttp {
            client: client.build(connector),
            proxies,
        }
    }

    /// Sends a request, and returns the beginning of its answer.
    async fn send(
        &self,
        mut request: Request<SdkBody>,
        settings: &HttpConnectorSettings,
    ) -> Result<Response<Incoming>, ConnectorError> {
        self.authorize_to_proxy(&mut request);
        let connection = capture_connection(&mut request);
        let answer = pin!(self.client.request(request));
        tokio::select! {
            biased;
            answer = answer => answer.map_err(failed),
            () = expire_connecting(connection, settings.connect_timeout()) => {
                Err(timed_out("no connection"))
            }
            () = expire(settings.read_timeout()) => Err(timed_out("no answer")),
        }
    }

    /// Adds the password of a proxy that reads requests. One that doesn't gets it from
    /// [`Connector`].
    fn authorize_to_proxy(&self, request: &mut Request<SdkBody>) {
        if is_https(request.uri()) {
            return;
        }
        let proxy = self.proxies.intercept(request.uri());
        if let Some(password) = proxy.as_ref().and_then(Intercept::basic_auth) {
            let headers = request.headers_mut();
            headers.insert(PROXY_AUTHORIZATION, password.clone());
        }
    }
}

impl Debug for StoreHttp {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreHttp").finish_non_exhaustive()
    }
}

impl HttpClient for StoreHttp {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        _: &RuntimeComponents,
    ) -> SharedHttpConnector {
        SharedHttpConnector::new(Sender {
            http: self.clone(),
            settings: settings.clone(),
        })
    }
}

impl From<StoreHttp> for SharedHttpClient {
    fn from(http: StoreHttp) -> SharedHttpClient {
        SharedHttpClient::new(http)
    }
}

/// A client with the timeouts of an operation.
#[derive(Debug)]
struct Sender {
    http: StoreHttp,
    settings: HttpConnectorSettings,
}

impl SdkConnector for Sender {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let http = self.http.clone();
        let settings = self.settings.clone();
        HttpConnectorFuture::new(async move {
            let request = match request.try_into_http1x() {
                Ok(request) => request,
                Err(error) => return Err(ConnectorError::user(error.into())),
            };
            let answer = http.send(request, &settings).await?;
            let answer = HttpResponse::try_from(answer.map(SdkBody::from_body_1_x));
            answer.map_err(|error| ConnectorError::other(error.into(), None))
        })
    }
}

/// TLS 1.2 and 1.3.
fn tls_settings() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()
}

fn is_https(uri: &Uri) -> bool {
    uri.scheme_str() == Some("https")
}

/// Resolves after this time unless the request has got a connection by then.
async fn expire_connecting(mut connection: CaptureConnection, limit: Option<Duration>) {
    let Some(limit) = limit else {
        return pending().await;
    };
    let is_connected = timeout(limit, async {
        connection.wait_for_connection_metadata().await;
    });
    if is_connected.await.is_ok() {
        pending().await
    }
}

async fn expire(limit: Option<Duration>) {
    match limit {
        Some(limit) => sleep(limit).await,
        None => pending().await,
    }
}

fn timed_out(what: &str) -> ConnectorError {
    let error = io::Error::new(io::ErrorKind::TimedOut, format!("{what} in time"));
    ConnectorError::timeout(error.into())
}

/// What went wrong with a connection may go well on another one.
fn failed(error: Error) -> ConnectorError {
    ConnectorError::io(error.into())
}

/// Opens connections, through the proxies that the environment names.
#[derive(Clone)]
struct Connector {
    direct: HttpsConnector<TcpConnector>,
    tls: Arc<ClientConfig>,
    proxies: Arc<Matcher>,
}

impl Connector {
    async fn connect(mut self, to: Uri) -> Result<StoreConnection, BoxError> {
        let Some(proxy) = self.proxies.intercept(&to) else {
            let io = self.direct.call(to).await?;
            return Ok(StoreConnection::new(io, false));
        };
        if !is_https(&to) {
            let io = self.direct.call(proxy.uri().clone()).await?;
            return Ok(StoreConnection::new(io, true));
        }
        let mut tunnel = Tunnel::new(proxy.uri().clone(), self.direct);
        if let Some(password) = proxy.basic_auth() {
            tunnel = tunnel.with_auth(password.clone());
        }
        let io = HttpsConnector::from((tunnel, self.tls)).call(to).await?;
        Ok(StoreConnection::new(io, false))
    }
}

impl Service<Uri> for Connector {
    type Response = StoreConnection;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<StoreConnection, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        Box::pin(self.clone().connect(to))
    }
}

/// Opens connections whose system buffer holds little.
#[derive(Clone)]
struct TcpConnector(HttpConnector);

impl Service<Uri> for TcpConnector {
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<TokioIo<TcpStream>, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(context).map_err(BoxError::from)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let connecting = self.0.call(to);
        Box::pin(async move {
            let stream = connecting.await?;
            #[cfg(any(target_os = "android", target_os = "linux"))]
            socket2::SockRef::from(stream.inner()).set_tcp_notsent_lowat(MAX_UNSENT)?;
            Ok(stream)
        })
    }
}

/// A stream of bytes, with or without TLS.
trait Io: Read + Write + Connection + Send + Unpin {}

impl<T: Read + Write + Connection + Send + Unpin> Io for T {}

/// A connection to a store, or to a proxy that reads the requests.
struct StoreConnection {
    io: Box<dyn Io>,
    is_read_by_proxy: bool,
}

impl StoreConnection {
    fn new(io: impl Io + 'static, is_read_by_proxy: bool) -> StoreConnection {
        StoreConnection {
            io: Box::new(io),
            is_read_by_proxy,
        }
    }
}

impl Connection for StoreConnection {
    fn connected(&self) -> Connected {
        self.io.connected().proxy(self.is_read_by_proxy)
    }
}

impl Read for StoreConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl Write for StoreConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
