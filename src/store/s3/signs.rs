//! Signs of life of a request: a part that leaves slowly, or an answer that arrives slowly. S3 sends
//! white space while a long CompleteMultipartUpload or CopyObject is at work.

use super::super::patience::SignsOfLife;
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
use tokio::time::Instant;

/// A body is handed to the connection in pieces of at most this size, in bytes: one takes 4 seconds
/// at [`SLOWEST`].
const MAX_PIECE: usize = 64 * 1024;
/// Bytes of a body that have been handed to the connection and may not have left yet: those that
/// hyper and the system hold (see `http.rs`), and as much on the way.
const MAX_UNSENT: u64 = 512 * 1024;
/// How fast the last bytes of a body leave at least, in bytes a second.
const SLOWEST: u64 = 16 * 1024;

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
        watch(context.request_mut().body_mut(), Way::There);
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
        watch(context.response_mut().body_mut(), Way::Back);
        Ok(())
    }
}

/// Which way a body goes.
enum Way {
    /// To the store, so that its end leaves later than it is taken.
    There,
    Back,
}

/// Has a body give signs of life. It is polled by the connection's task, so the signs are taken
/// along.
fn watch(body: &mut SdkBody, way: Way) {
    let len = body.content_length();
    if len == Some(0) {
        return;
    }
    let watched = WatchedBody {
        len,
        body: std::mem::replace(body, SdkBody::taken()),
        rest: Bytes::new(),
        way,
        taken: 0,
        begun: Instant::now(),
        signs: SignsOfLife::current(),
    };
    *body = SdkBody::from_body_1_x(watched);
}

/// A body that gives a sign of life for each piece.
struct WatchedBody {
    /// Bytes of the whole body, if that is known. A body with trailers does not say that its end is
    /// reached before it is asked again.
    len: Option<u64>,
    body: SdkBody,
    /// What is left of a frame.
    rest: Bytes,
    way: Way,
    /// Bytes taken so far.
    taken: u64,
    begun: Instant,
    signs: SignsOfLife,
}

impl WatchedBody {
    fn give_sign(&self) {
        match (&self.way, self.len) {
            (Way::There, Some(len)) if self.taken >= len => {
                let time = time_to_leave(self.taken, self.begun.elapsed());
                self.signs.give_in_advance(time);
            }
            (Way::There | Way::Back, _) => self.signs.give(),
        }
    }
}

/// How long the end of a body may need to leave, whose bytes were taken in this time: twice as long
/// as at the speed so far.
fn time_to_leave(taken: u64, elapsed: Duration) -> Duration {
    let unsent = taken.min(MAX_UNSENT);
    let at_slowest = Duration::from_secs(unsent / SLOWEST);
    match taken - unsent {
        0 => at_slowest,
        sent => at_slowest.min(elapsed.mul_f64(2.0 * unsent as f64 / sent as f64)),
    }
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
        let len = self.rest.len().min(MAX_PIECE);
        let piece = self.rest.split_to(len);
        self.taken += len as u64;
        self.give_sign();
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
    use super::super::super::patience::wait;
    use super::*;
    use std::future::{pending, poll_fn};

    const MIB: u64 = 1024 * 1024;
    /// Of a body that may not have left when it is taken.
    const LEN: u64 = MAX_UNSENT;

    /// A body of one piece that does not know its end, as one with trailers.
    struct Endless(Option<Bytes>);

    impl Body for Endless {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            Poll::Ready(self.0.take().map(|data| Ok(Frame::data(data))))
        }

        fn size_hint(&self) -> SizeHint {
            SizeHint::with_exact(LEN)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_piece_asks_for_time_to_leave() {
        const TIMEOUT: Duration = Duration::from_secs(20);
        let data = Bytes::from(vec![0; LEN as usize]);
        for body in [
            SdkBody::from(data.clone()),
            SdkBody::from_body_1_x(Endless(Some(data))),
        ] {
            let began = Instant::now();
            let send = async {
                let mut body = body;
                watch(&mut body, Way::There);
                let mut body = Pin::new(&mut body);
                let mut taken = 0;
                // hyper takes no more than the length that it was told.
                while taken < LEN {
                    let frame = poll_fn(|context| body.as_mut().poll_frame(context)).await;
                    let data = frame.unwrap().unwrap().into_data().unwrap();
                    taken += data.len() as u64;
                }
                pending::<()>().await;
            };
            assert_eq!(wait(send, TIMEOUT, Duration::ZERO).await, None);
            assert_eq!(began.elapsed().as_secs(), 32 + 20);
        }
    }

    #[test]
    fn the_end_of_a_body_has_time_to_leave() {
        let seconds = |taken, elapsed| {
            let time = time_to_leave(taken, Duration::from_secs(elapsed));
            time.as_secs()
        };
        // Taken at once, so nothing is known of the speed.
        assert_eq!(seconds(0, 0), 0);
        assert_eq!(seconds(16 * 1024, 0), 1);
        assert_eq!(seconds(LEN, 0), 32);
        // Fast, slow, and slower than the slowest.
        assert_eq!(seconds(5 * MIB, 1), 0);
        assert_eq!(seconds(5 * MIB, 90), 20);
        assert_eq!(seconds(5 * MIB, 400), 32);
    }
}
