//! Records a metric for every HTTP request to S3: its outcome and its duration.

use crate::metrics::S3_REQUESTS;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_smithy_runtime_api::client::interceptors::context::{
    BeforeTransmitInterceptorContextRef, FinalizerInterceptorContextRef,
};
use aws_smithy_runtime_api::client::{interceptors::dyn_dispatch_hint, orchestrator::Metadata};
use aws_smithy_types::config_bag::{Storable, StoreReplace};
use std::time::{Duration, Instant};

/// The result of an attempt without a status.
const NO_ANSWER: &str = "no_answer";

/// Is called before and after each attempt of a request.
#[derive(Debug)]
pub struct RecordRequests;

#[derive(Debug)]
struct Started(Instant);

impl Storable for Started {
    type Storer = StoreReplace<Self>;
}

#[dyn_dispatch_hint]
impl Intercept for RecordRequests {
    fn name(&self) -> &'static str {
        "RecordRequests"
    }

    fn read_before_attempt(
        &self,
        _: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        bag.interceptor_state().store_put(Started(Instant::now()));
        Ok(())
    }

    fn read_after_attempt(
        &self,
        context: &FinalizerInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let operation = bag
            .load::<Metadata>()
            .map_or("", |metadata| metadata.name())
            .to_owned();
        let took = bag
            .load::<Started>()
            .map(|began| began.0.elapsed())
            .unwrap_or_default();
        let failed = context
            .output_or_error()
            .is_none_or(|outcome| outcome.is_err());
        let result = match context
            .response()
            .map(|response| response.status().as_u16())
        {
            None => NO_ANSWER,
            Some(429 | 503) => "throttled",
            Some(400..500) => "refused",
            // S3 may answer 200 with an error as the body.
            Some(500..) => "failed",
            Some(_) if failed => "failed",
            Some(_) => "ok",
        };
        record(operation, result, took);
        Ok(())
    }
}

/// Records an attempt that was given up because it was silent.
pub fn record_no_answer(operation: &'static str, took: Duration) {
    record(operation.to_owned(), NO_ANSWER, took);
}

fn record(operation: String, result: &'static str, took: Duration) {
    metrics::histogram!(S3_REQUESTS, "operation" => operation, "result" => result).record(took);
}
