//! Signs of life of a request: a part that leaves slowly, or an answer that arrives slowly. S3 sends
//! white space while a long CompleteMultipartUpload or CopyObject is at work.

use super::super::SignsOfLife;
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

/// A body is handed to the connection in pieces of at most this size, in bytes: one takes 9 seconds
/// at 30 kB/s.
const MAX_PIECE: usize = 256 * 1024;

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
