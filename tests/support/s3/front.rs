//! The HTTP service in front of `s3s`: it logs each request, then hands it to `s3s` or to a fault.
//!
//! hyper closes the connection when a function here returns an error.

use super::faults::Fault;
use super::requests::Request;
use super::state::Store;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use s3s::service::S3Service;
use s3s::{Body, HttpError, HttpRequest, HttpResponse, S3Error, S3ErrorCode, StdError};
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep};

type Answer = Result<HttpResponse, HttpError>;

/// Serves connections until it is aborted, which closes them all.
pub async fn accept(listener: TcpListener, store: Store, s3: S3Service) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.expect("accept");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        let (store, s3) = (store.clone(), s3.clone());
        let service = service_fn(move |request| serve(store.clone(), s3.clone(), request));
        let http = hyper::server::conn::http1::Builder::new();
        connections.spawn(http.serve_connection(TokioIo::new(stream), service));
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(store: Store, s3: S3Service, request: hyper::Request<Incoming>) -> Answer {
    let mut request = request.map(Body::from);
    let fault = {
        let mut state = store.lock();
        state.log.note_headers(&request);
        let identified = Request::identify(&request);
        let fault = state.faults.strike(&identified.op);
        state.log.add(identified);
        fault
    };
    match fault {
        None => call(&s3, request).await,
        Some(Fault::ResetBefore) => Err(HttpError::new("reset by a fault".into())),
        Some(Fault::Hang) => hang(&store).await,
        Some(Fault::ResetMidRequest) => {
            read_half(request.body_mut()).await;
            Err(HttpError::new("reset by a fault in mid-request".into()))
        }
        Some(fault) => {
            // An answer that overtakes its request reaches some clients as a broken connection.
            let body = request.body_mut().store_all_limited(usize::MAX).await;
            body.map_err(HttpError::new)?;
            // A task of its own: S3 carries out what has arrived, even if the client hangs up.
            let failing = tokio::spawn(fail(fault, store, s3, request));
            failing.await.expect("no panic")
        }
    }
}

async fn read_half(body: &mut Body) {
    let half = body.size_hint().exact().unwrap_or_default() / 2;
    let mut got = 0;
    while got < half {
        let frame = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await;
        let Some(Ok(frame)) = frame else {
            return;
        };
        got += frame.data_ref().map_or(0, Bytes::len) as u64;
    }
}

/// The answer of S3.
async fn call(s3: &S3Service, request: HttpRequest) -> Answer {
    Ok(with_request_id(s3.call(request).await?))
}

/// What shows that S3 has answered, and no proxy: the answer to HEAD has nothing else.
fn with_request_id(mut answer: HttpResponse) -> HttpResponse {
    let id = "TESTTESTTESTTEST".parse().expect("a header");
    answer.headers_mut().insert("x-amz-request-id", id);
    answer
}

/// Does what a fault says to a request that has arrived whole.
async fn fail(fault: Fault, store: Store, s3: S3Service, request: HttpRequest) -> Answer {
    match fault {
        Fault::ResetBefore | Fault::ResetMidRequest | Fault::Hang => {
            unreachable!("the request is not read whole")
        }
        Fault::Stall(time) => {
            tokio::time::sleep(time).await;
            call(&s3, request).await
        }
        Fault::Hold(notify) => {
            notify.notified().await;
            call(&s3, request).await
        }
        Fault::LostAnswer => {
            call(&s3, request).await?;
            Err(HttpError::new("answer lost by a fault".into()))
        }
        Fault::HangAfter => {
            call(&s3, request).await?;
            hang(&store).await
        }
        Fault::ResetMidBody => {
            let answer = call(&s3, request).await?;
            answer_half(answer, Then::End).await
        }
        Fault::HangMidBody => {
            let answer = call(&s3, request).await?;
            answer_half(answer, Then::Hang(Some(store))).await
        }
        Fault::PauseMidBody(time) => {
            let answer = call(&s3, request).await?;
            answer_half(answer, Then::Pause(time)).await
        }
        Fault::WithoutEffect => {
            let before = store.lock().objects.clone();
            let answer = call(&s3, request).await?;
            store.lock().objects = before;
            Ok(answer)
        }
        Fault::WithoutETag => without_etag(call(&s3, request).await?).await,
        Fault::TruncatedXml => {
            let mut answer = call(&s3, request).await?;
            let whole = whole_body(&mut answer).await?;
            Ok(with_body(answer, whole.slice(..whole.len() / 2)))
        }
        Fault::Empty => Ok(HttpResponse::new(Body::empty())),
        Fault::Html => Ok(page(200)),
        Fault::HtmlStatus(status) => Ok(page(status)),
        Fault::ErrorBody => error(200, "InternalError"),
        Fault::Status(status, code) => error(status, code),
    }
}

async fn hang(store: &Store) -> ! {
    store.lock().faults.announce_hanging();
    pending().await
}

/// An error in the words of S3.
fn error(status: u16, code: &str) -> Answer {
    let Ok(code) = code.parse::<S3ErrorCode>();
    let mut error = S3Error::with_message(code, "Set by the test");
    error.set_status_code(status.try_into().expect("HTTP status"));
    match error.to_http_response() {
        Ok(answer) => Ok(with_request_id(answer)),
        Err(error) => Err(HttpError::new(error.into())),
    }
}

/// A page for people, as proxies and captive portals send it.
fn page(status: u16) -> HttpResponse {
    let body = "<html><head><title>Welcome</title></head><body>Please log in to use this network.</body></html>";
    let mut answer = HttpResponse::new(Body::from(body.to_owned()));
    *answer.status_mut() = status.try_into().expect("HTTP status");
    let html = "text/html".parse().expect("a header");
    answer.headers_mut().insert("content-type", html);
    answer
}

async fn whole_body(answer: &mut HttpResponse) -> Result<Bytes, HttpError> {
    let whole = answer.body_mut().store_all_limited(usize::MAX).await;
    whole.map_err(HttpError::new)
}

/// The same answer with another body.
fn with_body(answer: HttpResponse, body: Bytes) -> HttpResponse {
    let length = body.len();
    let mut answer = answer.map(|_| Body::from(body));
    answer.headers_mut().insert("content-length", length.into());
    answer
}

async fn without_etag(mut answer: HttpResponse) -> Answer {
    answer.headers_mut().remove("etag");
    let whole = whole_body(&mut answer).await?;
    let text = String::from_utf8_lossy(&whole);
    let element = (text.find("<ETag>"), text.find("</ETag>"));
    let rest = match element {
        (Some(from), Some(to)) => {
            format!("{}{}", &text[..from], &text[to + "</ETag>".len()..]).into()
        }
        _ => whole.clone(),
    };
    Ok(with_body(answer, rest))
}

async fn answer_half(mut answer: HttpResponse, then: Then) -> Answer {
    let whole = whole_body(&mut answer).await?;
    let headers = answer.headers_mut();
    headers.insert("content-length", whole.len().into());
    let half = Half {
        first: Some(whole.slice(..whole.len() / 2)),
        second: Some(whole.slice(whole.len() / 2..)),
        then,
        pause: None,
    };
    Ok(answer.map(|_| Body::http_body(half)))
}

/// What follows the first half of an answer.
enum Then {
    /// hyper finds that the Content-Length has promised more, and closes the connection.
    End,
    /// Nothing, for ever. `None` once the store was told: hyper may poll more than once.
    Hang(Option<Store>),
    /// The second half, later.
    Pause(Duration),
}

/// The first half of an answer, and what follows.
struct Half {
    first: Option<Bytes>,
    second: Option<Bytes>,
    then: Then,
    pause: Option<Pin<Box<Sleep>>>,
}

impl HttpBody for Half {
    type Data = Bytes;
    type Error = StdError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StdError>>> {
        if let Some(half) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(half))));
        }
        match &mut self.then {
            Then::End => Poll::Ready(None),
            Then::Hang(to_tell) => {
                if let Some(store) = to_tell.take() {
                    store.lock().faults.announce_hanging();
                }
                Poll::Pending
            }
            Then::Pause(time) => {
                let time = *time;
                let pause = self.pause.get_or_insert_with(|| Box::pin(sleep(time)));
                ready!(pause.as_mut().poll(context));
                Poll::Ready(self.second.take().map(|half| Ok(Frame::data(half))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self.then {
            Then::End => self.first.is_none(),
            Then::Hang(_) => false,
            Then::Pause(_) => self.second.is_none(),
        }
    }
}
