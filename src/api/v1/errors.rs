//! Errors in the form of OpenAI's protocol, which is all that its clients read.

use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::limits::Limits;
use crate::api::error::ErrorFacts;

const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");

const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// OpenAI's code for money that is spent: no request succeeds until somebody does something.
const INSUFFICIENT_QUOTA: &str = "insufficient_quota";

/// An error in OpenAI's form.
#[derive(Serialize, ToSchema)]
pub struct OpenAiErrorResponse {
    error: OpenAiError,
}

/// What is wrong.
#[derive(Serialize, ToSchema)]
pub struct OpenAiError {
    /// For humans; may change.
    #[schema(example = "The model does not exist, or you may not use it.")]
    message: String,
    /// The kind of error.
    #[serde(rename = "type")]
    #[schema(example = "invalid_request_error")]
    error_type: String,
    /// The member of the request that is wrong.
    #[schema(required = true, example = "model")]
    param: Option<String>,
    /// For programs; stays.
    #[schema(required = true, example = "model_not_found")]
    code: Option<String>,
}

impl OpenAiErrorResponse {
    /// The same error as `body`, which is in this service's own form.
    pub fn of(status: StatusCode, body: &Value) -> Self {
        let text = |name: &str| body.get(name).and_then(Value::as_str).map(str::to_owned);
        let (param, message) = match text("detail") {
            Some(detail) => (text("param"), detail),
            None => first_field(body),
        };
        Self {
            error: OpenAiError {
                message,
                error_type: text("type")
                    .or_else(|| text("code").filter(|code| code == "insufficient_quota"))
                    .unwrap_or_else(|| kind(status).to_owned()),
                param,
                code: text("code")
                    .filter(|_| status != StatusCode::UNAUTHORIZED)
                    .or_else(|| code(status).map(str::to_owned)),
            },
        }
    }
}

/// The first field with its first message, of errors by field.
fn first_field(body: &Value) -> (Option<String>, String) {
    let fields = body.as_object().into_iter().flatten();
    let messages = fields.filter_map(|(name, list)| Some((name, list.get(0)?.as_str()?)));
    match messages.into_iter().next() {
        Some((name, message)) => (Some(name.clone()), format!("{name}: {message}")),
        None => (None, "The request cannot be used.".to_owned()),
    }
}

/// OpenAI's word for errors of that status.
fn kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        403 => "permission_error",
        429 => "requests",
        500.. => "server_error",
        _ => "invalid_request_error",
    }
}

/// OpenAI's code, where an error of this service has none or another.
fn code(status: StatusCode) -> Option<&'static str> {
    match status.as_u16() {
        401 => Some("invalid_api_key"),
        429 => Some("rate_limit_exceeded"),
        _ => None,
    }
}

/// On the paths of OpenAI's protocol, gives errors its form, and each response the time that it
/// took.
pub async fn speak_openai(mut request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if path != "/v1" && !path.starts_with("/v1/") {
        return next.run(request).await;
    }
    let (began, limits) = (Instant::now(), Limits::default());
    request.extensions_mut().insert(limits.clone());
    let mut response = next.run(request).await;
    limits.apply_headers(response.headers_mut());
    if let Some(ErrorFacts { body, retry_after }) = response.extensions_mut().remove() {
        let error = OpenAiErrorResponse::of(response.status(), &body);
        *response.body_mut() = Body::from(json!(error).to_string());
        let headers = response.headers_mut();
        headers.remove(CONTENT_LENGTH);
        if let Some(wait) = retry_after {
            headers.insert(RETRY_AFTER_MS, whole_millis(wait).into());
        }
        if error.error.code.as_deref() == Some(INSUFFICIENT_QUOTA) {
            // OpenAI's clients repeat other requests with 429.
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
    }
    let took = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    response
        .headers_mut()
        .insert(PROCESSING_MS, HeaderValue::from(took));
    response
}

/// Rounded up and at least one: a client that waits so long succeeds.
fn whole_millis(wait: Duration) -> u64 {
    let millis = wait.as_nanos().div_ceil(1_000_000);
    u64::try_from(millis).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(status: u16, body: &Value) -> Value {
        let status = StatusCode::from_u16(status).unwrap();
        json!(OpenAiErrorResponse::of(status, body))["error"].take()
    }

    #[test]
    fn an_error_has_all_four_members_and_null_where_there_is_nothing() {
        assert_eq!(
            written(404, &json!({ "detail": "Not found." })),
            json!({ "message": "Not found.", "type": "invalid_request_error", "param": null, "code": null })
        );
        assert_eq!(
            written(
                400,
                &json!({ "detail": "No.", "code": "c", "param": "p", "type": "t" })
            ),
            json!({ "message": "No.", "type": "t", "param": "p", "code": "c" })
        );
    }

    #[test]
    fn clients_know_these_codes() {
        let invalid = written(401, &json!({ "detail": "No.", "code": "token_not_valid" }));
        assert_eq!(invalid["code"], "invalid_api_key");
        let throttled = written(429, &json!({ "detail": "No." }));
        assert_eq!(throttled["code"], "rate_limit_exceeded");
        let spent = written(
            429,
            &json!({ "detail": "No.", "code": "insufficient_quota" }),
        );
        assert_eq!(spent["code"], "insufficient_quota");
    }

    #[test]
    fn of_errors_by_field_the_first_is_told() {
        let error = written(400, &json!({ "limit": ["A valid integer is required."] }));
        assert_eq!(error["param"], "limit");
        assert_eq!(error["message"], "limit: A valid integer is required.");
    }
}
