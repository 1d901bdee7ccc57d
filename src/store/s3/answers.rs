//! Checks that a success was sent by S3. A proxy, a captive portal or a broken gateway in between
//! may also answer 200. If the answer lacks what S3 always sends with a success, the request counts
//! as unanswered: it is tried again, and at last its outcome is unknown.
//!
//! Every client of this store gets these checks from [`S3Store::new`](super::S3Store::new).

use super::http::StoreHttp;
use super::identity::RenewableIdentities;
use super::signs::WatchAnswer;
use super::tries::WatchTries;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::interceptors::AfterDeserializationInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents, StalledStreamProtectionConfig};
use aws_sdk_s3::error::BoxError;
use aws_smithy_runtime_api::client::interceptors::context::InterceptorContext;
use aws_smithy_runtime_api::client::interceptors::dyn_dispatch_hint;
use aws_smithy_runtime_api::client::orchestrator::{HttpResponse, Metadata};
use aws_smithy_runtime_api::client::retries::classifiers::{ClassifyRetry, RetryAction};
use aws_smithy_types::retry::ErrorKind;
use std::borrow::Cow;
use std::time::Duration;

/// Limit on the wait that a server can ask for, as a client waits for its answer meanwhile.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(20);

/// Adds the checks of this module to a client, and signs of life, which replace the SDK's own
/// protection against bodies that pause.
pub fn check_answers(client: &Client) -> Client {
    let identities = RenewableIdentities::new();
    let mut config = client
        .config()
        .to_builder()
        .interceptor(CheckAnswers)
        .interceptor(WatchAnswer)
        .interceptor(WatchTries)
        .identity_cache(identities.clone())
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
    if client.config().http_client().is_none()
        && let Ok(http) = StoreHttp::trusting_system()
    {
        config = config.http_client(http);
    }
    Client::from_conf(
        config
            .retry_classifier(RetryDoubtful { identities })
            .build(),
    )
}

/// A success that S3 did not send.
#[derive(Debug, thiserror::Error)]
#[error(
    "the answer (HTTP status {status}) was not written by S3, it has no {missing}: look for a proxy in between"
)]
pub struct NotFromS3 {
    status: u16,
    missing: &'static str,
}

/// What S3 sends with every success of an operation.
enum Proof {
    /// A status, and headers.
    Headers(u16, &'static [&'static str]),
    /// 200, and a whole XML document with this root, that holds this element.
    Document {
        root: &'static str,
        element: &'static str,
    },
}

/// By operation; `None` for those whose success decides nothing ([S3:
/// actions](https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations_Amazon_Simple_Storage_Service.html)).
fn proof_of(operation: &str) -> Option<Proof> {
    Some(match operation {
        "HeadObject" | "PutObject" | "UploadPart" => Proof::Headers(200, &["etag"]),
        // Never asked for without a range.
        "GetObject" => Proof::Headers(206, &["etag", "content-range"]),
        "DeleteObject" | "AbortMultipartUpload" => Proof::Headers(204, &[]),
        "CopyObject" => Proof::Document {
            root: "CopyObjectResult",
            element: "ETag",
        },
        "UploadPartCopy" => Proof::Document {
            root: "CopyPartResult",
            element: "ETag",
        },
        "CreateMultipartUpload" => Proof::Document {
            root: "InitiateMultipartUploadResult",
            element: "UploadId",
        },
        "CompleteMultipartUpload" => Proof::Document {
            root: "CompleteMultipartUploadResult",
            element: "ETag",
        },
        "ListObjectsV2" => Proof::Document {
            root: "ListBucketResult",
            element: "IsTruncated",
        },
        "ListMultipartUploads" => Proof::Document {
            root: "ListMultipartUploadsResult",
            element: "IsTruncated",
        },
        "ListParts" => Proof::Document {
            root: "ListPartsResult",
            element: "IsTruncated",
        },
        _ => return None,
    })
}

/// Fails if an answer of success lacks its proof. Errors are left to the SDK, also those with
/// status 200.
fn check(operation: &str, response: &HttpResponse) -> Result<(), NotFromS3> {
    let status = response.status();
    if !status.is_success() {
        return Ok(());
    }
    let Some(proof) = proof_of(operation) else {
        return Ok(());
    };
    match find_missing(&proof, response) {
        None => Ok(()),
        Some(missing) => Err(NotFromS3 {
            status: status.as_u16(),
            missing,
        }),
    }
}

/// What an answer lacks of its proof.
fn find_missing(proof: &Proof, response: &HttpResponse) -> Option<&'static str> {
    match *proof {
        Proof::Headers(expected, _) if response.status().as_u16() != expected => {
            Some("status of S3's for this request")
        }
        Proof::Headers(_, names) => {
            for name in names {
                if response.headers().get(*name).is_none() {
                    return Some(name);
                }
            }
            None
        }
        Proof::Document { root, element } => {
            let body = body_text(response);
            let is_answer = holds_document(&body, root) && body.contains(&format!("<{element}"));
            if is_answer || holds_document(&body, "Error") {
                return None;
            }
            Some(root)
        }
    }
}

fn body_text(response: &HttpResponse) -> Cow<'_, str> {
    match response.body().bytes() {
        Some(bytes) => String::from_utf8_lossy(bytes),
        None => Cow::Borrowed(""),
    }
}

/// Does this text hold a whole document with this root?
fn holds_document(body: &str, root: &str) -> bool {
    let body = body.trim_end();
    body.contains(&format!("<{root}")) && body.ends_with(&format!("</{root}>"))
}

/// Turns a success without proof into an error.
#[derive(Debug)]
struct CheckAnswers;

#[dyn_dispatch_hint]
impl Intercept for CheckAnswers {
    fn name(&self) -> &'static str {
        "CheckAnswers"
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let operation = bag
            .load::<Metadata>()
            .map_or("", |metadata| metadata.name());
        Ok(check(operation, context.response())?)
    }
}

/// Retries more than the SDK does: answers and refusals that S3 did not send; 429, with which
/// proxies and other stores throttle, where S3 uses 503; and expired credentials, after renewing
/// them.
#[derive(Debug)]
struct RetryDoubtful {
    identities: RenewableIdentities,
}

impl ClassifyRetry for RetryDoubtful {
    fn name(&self) -> &'static str {
        "RetryDoubtful"
    }

    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        let Some(Err(error)) = context.output_or_error() else {
            return RetryAction::NoActionIndicated;
        };
        if error.is_interceptor_error() {
            return RetryAction::transient_error();
        }
        let Some(response) = context.response() else {
            return RetryAction::NoActionIndicated;
        };
        match (response.status().as_u16(), retry_after(response)) {
            (429, Some(delay)) => {
                RetryAction::retryable_error_with_explicit_delay(ErrorKind::ThrottlingError, delay)
            }
            (429, None) => RetryAction::throttling_error(),
            (400, _) if says_expired(response) => {
                self.identities.renew();
                RetryAction::transient_error()
            }
            (300..=499, _) if !is_refusal_of_s3(response) => RetryAction::transient_error(),
            (_, _) => RetryAction::NoActionIndicated,
        }
    }
}

/// Did S3 write this refusal? It explains all but those of HEAD, which have no body.
fn is_refusal_of_s3(response: &HttpResponse) -> bool {
    let body = body_text(response);
    body.is_empty() || holds_document(&body, "Error")
}

fn says_expired(response: &HttpResponse) -> bool {
    let body = body_text(response);
    body.contains("<Code>ExpiredToken</Code>")
}

/// How long the server asks us to wait, where it says so in seconds
/// ([RFC 9110 §10.2.3](https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3)).
fn retry_after(response: &HttpResponse) -> Option<Duration> {
    let seconds = response.headers().get("retry-after")?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_s3::primitives::SdkBody;

    fn answer(
        status: u16,
        headers: &[(&'static str, &'static str)],
        body: &'static str,
    ) -> HttpResponse {
        let mut response = HttpResponse::new(status.try_into().unwrap(), SdkBody::from(body));
        for (name, value) in headers {
            response.headers_mut().insert(*name, *value);
        }
        response
    }

    #[test]
    fn a_success_needs_what_s3_sends_with_it() {
        let html = "<html><body>Please log in</body></html>";
        let etag = ("etag", "\"x\"");
        assert!(check("PutObject", &answer(200, &[etag], "")).is_ok());
        assert!(check("PutObject", &answer(200, &[], "")).is_err());
        assert!(
            check(
                "GetObject",
                &answer(206, &[etag, ("content-range", "bytes 0-1/2")], "ab")
            )
            .is_ok()
        );
        assert!(check("GetObject", &answer(200, &[etag], html)).is_err());
        assert!(check("DeleteObject", &answer(204, &[], "")).is_ok());
        assert!(check("DeleteObject", &answer(200, &[], html)).is_err());
        let copied = "<CopyObjectResult><ETag>x</ETag></CopyObjectResult>\n";
        assert!(check("CopyObject", &answer(200, &[], copied)).is_ok());
        for body in [
            "",
            html,
            "<CopyObjectResult></CopyObjectResult>",
            "<CopyObjectResult><ETag>x</ETag></Copy",
        ] {
            assert!(
                check("CopyObject", &answer(200, &[], body)).is_err(),
                "{body}"
            );
        }
        let error = "<Error><Code>InternalError</Code></Error>";
        assert!(
            check("CopyObject", &answer(200, &[], error)).is_ok(),
            "an error is the SDK's to read"
        );
        assert!(check("PutObject", &answer(503, &[], html)).is_ok());
    }

    #[test]
    fn a_request_to_wait_is_followed_within_reason() {
        assert_eq!(
            retry_after(&answer(429, &[("retry-after", "3")], "")),
            Some(Duration::from_secs(3))
        );
        assert_eq!(
            retry_after(&answer(429, &[("retry-after", "86400")], "")),
            Some(MAX_RETRY_AFTER)
        );
        assert_eq!(
            retry_after(&answer(
                429,
                &[("retry-after", "Tue, 01 Dec 2026 00:00:00 GMT")],
                ""
            )),
            None
        );
    }
}
