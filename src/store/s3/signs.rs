//! Signs of life of a request: a part that leaves slowly, or an answer that arrives slowly. S3 sends
//! white space while a long CompleteMultipartUpload or CopyObject is at work.

use super::super::Result as Stored;
use super::super::patience::{SignsOfLife, wait};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_smithy_runtime_api::client::interceptors::context::{
    BeforeDeserializationInterceptorContextMut, BeforeTransmitInterceptorContextMut,
};
use aws_smithy_runtime_api::client::interceptors::dyn_dispatch_hint;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// A body is handed to the connection in pieces of at most this size, in bytes: one takes 9 seconds
/// at 30 kB/s.
const MAX_PIECE: usize = 256 * 1024;

/// Limit on the silence of a connection on which a body is sent or an object is made of parts: less
/// than what the server allows by default, so that another connection can be tried.
const MAX_SILENCE: Duration = Duration::from_secs(20);
/// How often a request is sent whose connection falls silent.
const TRIES: u32 = 3;

/// Sends a request again on another connection if its own is silent, as one is that a firewall has
/// forgotten. The request must be one that can be repeated. `in_advance` is what S3 is given before
/// the first sign.
pub async fn send_until_answered<T, F>(in_advance: Duration, send: impl Fn() -> F) -> Stored<T>
where
    F: Future<Output = Stored<T>>,
{
    for _ in 1..TRIES {
        if let Some(answered) = wait(send(), MAX_SILENCE, in_advance).await {
            return answered;
        }
        SignsOfLife::current().give();
    }
    send().await
}

/// Gives signs of life while a body is sent. It must be the last interceptor that sees the request,
/// as the SDK treats a body in memory in another way than the one that this makes of it: so it is
/// one of the operation, and not of the client.
#[derive(Debug)]
pub struct WatchRequest;

#[dyn_dispatch_hint]
impl Intercept for WatchRequest {
    fn name(&self) -> &'static str {
        "WatchRequest"
    }

    fn modify_before_transmit(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        watch(context.request_mut().body_mut());
        Ok(())
    }
}

/// Gives signs of life while an answer arrives.
#[derive(Debug)]
pub struct WatchAnswer;

#[dyn_dispatch_hint]
impl Intercept for WatchAnswer {
    fn name(&self) -> &'static str {
        "WatchAnswer"
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        SignsOfLife::current().give();
        watch(context.response_mut().body_mut());
        Ok(())
    }
}

/// Has a body give signs of life. It is polled by the connection's task, so the signs are taken
/// along.
fn watch(body: &mut SdkBody) {
    if body.content_length() == Some(0) {
        return;
    }
    let watched = WatchedBody {
        body: std::mem::replace(body, SdkBody::taken()),
        rest: Bytes::new(),
        signs: SignsOfLife::current(),
    };
    *body = SdkBody::from_body_1_x(watched);
}

/// A body that gives a sign of life for each piece.
struct WatchedBody {
    body: SdkBody,
    /// What is left of a frame.
    rest: Bytes,
    signs: SignsOfLife,
}

impl Body for WatchedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.rest.is_empty() {
            let next = Pin::new(&mut self.body).poll_frame(context);
            let frame = match ready!(next) {
                Some(Ok(frame)) => frame,
                other => return Poll::Ready(other),
            };
            match frame.into_data() {
                Ok(data) => self.rest = data,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
        self.signs.give();
        let len = self.rest.len().min(MAX_PIECE);
        let piece = self.rest.split_to(len);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match self.body.content_length() {
            Some(left) => SizeHint::with_exact(left + self.rest.len() as u64),
            None => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::StoreError;
    use super::*;
    use std::cell::Cell;
    use std::future::pending;

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_costs_one_try() {
        let sent = Cell::new(0);
        let send = || async {
            sent.set(sent.get() + 1);
            match sent.get() {
                1 => pending().await,
                _ => Ok("answer"),
            }
        };
        // As the server waits: it hears of the second try.
        let limit = MAX_SILENCE + Duration::from_secs(1);
        let answered = wait(
            send_until_answered(Duration::ZERO, send),
            limit,
            Duration::ZERO,
        );
        assert_eq!(answered.await, Some(Ok("answer")));
        assert_eq!(sent.get(), 2);
        let refuse = || async { Err::<(), _>(StoreError::Precondition) };
        let refused = send_until_answered(Duration::ZERO, refuse).await;
        assert_eq!(refused, Err(StoreError::Precondition));
    }
}
