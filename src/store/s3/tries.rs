//! What became of the tries of a request that the SDK makes by itself: it shows the error of the last
//! one only. If every connection was refused, nothing was sent, and there is nothing to doubt. And a
//! request that is given up in the pause before its next try failed for the reason of the last one.

use super::super::patience::SignsOfLife;
use super::errors::{find_cause, sentence};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::{BoxError, ConnectorError};
use aws_smithy_runtime_api::client::interceptors::context::{
    FinalizerInterceptorContextMut, FinalizerInterceptorContextRef,
};
use aws_smithy_runtime_api::client::interceptors::dyn_dispatch_hint;
use aws_smithy_runtime_api::client::orchestrator::OrchestratorError;
use aws_smithy_types::config_bag::{Storable, StoreReplace};
use std::io::{self, ErrorKind};

/// The error of a request of which no try has reached the store.
#[derive(Debug, thiserror::Error)]
#[error("every connection to the store was refused")]
pub struct NeverSent;

/// In the bag of a request of which a try may have reached the store.
#[derive(Debug)]
struct MaybeSent;

impl Storable for MaybeSent {
    type Storer = StoreReplace<Self>;
}

/// Is called after each try of a request, and at its end.
#[derive(Debug)]
pub struct WatchTries;

#[dyn_dispatch_hint]
impl Intercept for WatchTries {
    fn name(&self) -> &'static str {
        "WatchTries"
    }

    fn read_after_attempt(
        &self,
        context: &FinalizerInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let failure = match context.output_or_error() {
            Some(Err(error)) => error.as_connector_error(),
            Some(Ok(_)) | None => None,
        };
        if let Some(failure) = failure {
            SignsOfLife::current().note_failure(sentence(failure));
        }
        if !failure.is_some_and(is_refused_connection) {
            bag.interceptor_state().store_put(MaybeSent);
        }
        Ok(())
    }

    fn modify_before_completion(
        &self,
        context: &mut FinalizerInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let was_sent = bag.load::<MaybeSent>().is_some();
        if let Some(outcome @ Err(_)) = context.output_or_error_mut()
            && !was_sent
            && let Err(error) = outcome
            && error
                .as_connector_error()
                .is_some_and(is_refused_connection)
        {
            let error = ConnectorError::io(NeverSent.into());
            *outcome = Err(OrchestratorError::connector(error));
        }
        Ok(())
    }
}

fn is_refused_connection(error: &ConnectorError) -> bool {
    let cause = find_cause::<io::Error>(error);
    cause.is_some_and(|cause| cause.kind() == ErrorKind::ConnectionRefused)
}
