//! The only place where an error becomes a status code and a body.

use std::time::Duration;

use axum::http::header::{CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::domain::{FailureCode, PromptId};
use crate::error::{
    ApiKeyProblem, Error, FailedPrompt, FieldErrors, KeyProblem, Refusal, ScopeProblem, Source,
    TokenProblem, Unauthenticated,
};

/// The `Retry-After` of a response that asks to try again when no better time is known.
const LATER: Duration = Duration::from_secs(1);

/// An error on its way to a client.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    body: Value,
    retry_after: Option<Duration>,
    is_final: bool,
    closes: bool,
    source: Option<Source>,
}

/// An error that concerns the request as a whole.
#[derive(Serialize, ToSchema)]
pub struct ErrorResponse {
    /// For humans; may change.
    detail: String,
    /// For programs; stays. Absent where the status says enough.
    code: Option<String>,
}

/// Tells OpenAI's clients whether to repeat the request, whatever the status.
pub const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// The description of every 401.
pub const INVALID_CREDENTIALS: &str = "No valid credentials.";

/// The description of every 429.
pub const THROTTLED: &str = "Too many. `Retry-After` says when one succeeds.";

/// Errors by field: a list of messages each.
#[derive(Serialize, ToSchema)]
pub struct FieldErrorsResponse(std::collections::HashMap<String, Vec<String>>);

/// A prompt that was taken and has no answer. It is kept.
#[derive(Serialize, ToSchema)]
pub struct FailedPromptResponse {
    /// For humans; may change.
    #[schema(example = "The upstream did not answer in time.")]
    detail: &'static str,
    /// For programs; stays.
    #[schema(example = "upstream_timeout")]
    code: &'static str,
    /// The prompt's id.
    #[schema(example = 1)]
    id: i64,
}

impl From<&FailedPrompt> for FailedPromptResponse {
    fn from(failed: &FailedPrompt) -> Self {
        Self {
            detail: failed.detail,
            code: failed.code.as_str(),
            id: failed.id.0,
        }
    }
}

impl FailedPromptResponse {
    /// The same for a prompt that was deleted while the upstream was answering it.
    pub fn deleted(id: PromptId) -> Self {
        Self {
            detail: DELETED.0,
            code: DELETED.1,
            id: id.0,
        }
    }
}

/// The detail and code of a prompt that was deleted before its answer was stored.
const DELETED: (&str, &str) = (
    "The prompt was deleted while it was being answered.",
    "prompt_deleted",
);

/// What an error says, left in the response's extensions for those who say it in another form.
#[derive(Clone, Debug)]
pub struct ErrorFacts {
    /// The body, as JSON.
    pub body: Value,
    /// When the client should try again.
    pub retry_after: Option<Duration>,
}

/// The cause of a 5xx, left in the response's extensions for the one log line about it.
#[derive(Clone, Debug)]
pub struct Cause(pub std::sync::Arc<Source>);

impl ApiError {
    /// A status and a `detail`.
    pub fn plain(status: StatusCode, detail: impl Into<String>) -> Self {
        Self::new(status, json!({ "detail": detail.into() }))
    }

    /// 400 with a `detail`.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::plain(StatusCode::BAD_REQUEST, detail)
    }

    /// 400 about the body as a whole.
    pub fn non_field(message: String) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            json!({ "non_field_errors": [message] }),
        )
    }

    /// The same, with the connection closed after it.
    pub fn closing(mut self) -> Self {
        self.closes = true;
        self
    }

    /// 400 in the form of OAuth 2 (RFC 6749, section 5.2), with the `detail` that every error has.
    pub fn oauth(code: &'static str, detail: &str) -> Self {
        let body = json!({ "detail": detail, "error": code, "error_description": detail });
        Self::new(StatusCode::BAD_REQUEST, body)
    }

    /// The body alone.
    pub fn into_body(self) -> Value {
        self.body
    }

    /// The status and the body.
    pub fn into_parts(self) -> (StatusCode, Value) {
        (self.status, self.body)
    }

    fn new(status: StatusCode, body: Value) -> Self {
        Self {
            status,
            body,
            retry_after: None,
            is_final: false,
            closes: false,
            source: None,
        }
    }

    fn coded(status: StatusCode, detail: &str, code: &str) -> Self {
        Self::new(status, json!({ "detail": detail, "code": code }))
    }

    /// 400 about one member of a request of OpenAI's protocol.
    pub fn invalid_member(message: &str, param: Option<&'static str>) -> Self {
        let error = Self::bad_request(message);
        match param {
            Some(param) => error.about(param),
            None => error,
        }
    }

    /// The same, about that member of the request.
    fn about(mut self, param: &'static str) -> Self {
        self.body["param"] = Value::from(param);
        self
    }

    /// The same, with a header that says to clients which would retry by the status that a retry
    /// fails again.
    fn not_to_be_retried(mut self) -> Self {
        self.is_final = true;
        self
    }

    /// The same, with how long the client should wait.
    pub fn later(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }
}

/// Whole seconds, rounded up and at least one: a client that waits them succeeds.
pub fn whole_seconds(wait: Duration) -> u64 {
    (wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1)
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        match error {
            Error::NotFound => Self::plain(StatusCode::NOT_FOUND, "Not found."),
            Error::InvalidFields(fields) => {
                Self::new(StatusCode::BAD_REQUEST, field_errors(fields))
            }
            Error::InvalidRequest(detail) => Self::bad_request(detail),
            Error::Unauthenticated(why) => unauthenticated(why),
            Error::Forbidden(detail) => Self::plain(StatusCode::FORBIDDEN, detail),
            Error::RateLimited(wait) => {
                let seconds = whole_seconds(wait);
                let plural = if seconds == 1 { "" } else { "s" };
                let detail = format!(
                    "Request was throttled. Expected available in {seconds} second{plural}."
                );
                Self::plain(StatusCode::TOO_MANY_REQUESTS, detail).later(wait)
            }
            Error::Overloaded(wait) => Self::coded(
                StatusCode::SERVICE_UNAVAILABLE,
                "The service is overloaded. Try again shortly.",
                "overloaded",
            )
            .later(wait),
            Error::Failed(failed) => failed_prompt(&failed),
            Error::Refused(refusal) => refused(*refusal),
            Error::ModelNotFound => Self::coded(
                StatusCode::NOT_FOUND,
                "The model does not exist, or you may not use it.",
                "model_not_found",
            )
            .about("model"),
            Error::IdempotencyKey(problem) => key_problem(problem),
            Error::QuotaExceeded => Self::coded(
                StatusCode::FORBIDDEN,
                "You keep as many prompts as this service allows. Delete some to post again.",
                "quota_exceeded",
            ),
            Error::BudgetExceeded => Self::coded(
                StatusCode::TOO_MANY_REQUESTS,
                "The call may cost more than is left of a budget.",
                "insufficient_quota",
            )
            .not_to_be_retried(),
            Error::PriceUnknown => Self::coded(
                StatusCode::NOT_FOUND,
                "A budget is in force, and the most that the call can cost is not known: the model has no price, or no limit of tokens.",
                "model_price_unknown",
            )
            .about("model"),
            Error::TooManyApiKeys => Self::coded(
                StatusCode::FORBIDDEN,
                "You have 100 API keys, which is as many as allowed. Revoke one to make another.",
                "too_many_keys",
            ),
            Error::Scope(problem) => {
                let detail = match problem {
                    ScopeProblem::NoKeys => {
                        "An API key cannot be used here. Log in, and use the access token."
                            .to_owned()
                    }
                    ScopeProblem::Lacks(scope) => {
                        format!("This API key does not have the scope `{}`.", scope.as_str())
                    }
                };
                Self::coded(StatusCode::FORBIDDEN, &detail, "scope")
            }
            Error::Deleted => Self::coded(StatusCode::GONE, DELETED.0, DELETED.1),
            Error::Unavailable(source) => Self {
                source: Some(source),
                ..Self::coded(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "The service cannot do this just now. Try again shortly.",
                    "unavailable",
                )
                .later(LATER)
            },
            Error::Internal(source) => Self {
                source: Some(source),
                ..Self::plain(StatusCode::INTERNAL_SERVER_ERROR, "Internal server error.")
            },
        }
    }
}

fn failed_prompt(failed: &FailedPrompt) -> ApiError {
    let status = match failed.code {
        FailureCode::UpstreamFailed | FailureCode::Interrupted => StatusCode::BAD_GATEWAY,
        FailureCode::UpstreamTimeout => StatusCode::GATEWAY_TIMEOUT,
        FailureCode::UpstreamUnavailable | FailureCode::Cancelled => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        FailureCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let error = ApiError::new(status, json!(FailedPromptResponse::from(failed)));
    match failed.retry_after {
        Some(wait) => error.later(wait),
        None if status == StatusCode::SERVICE_UNAVAILABLE => error.later(LATER),
        None => error,
    }
}

fn refused(refusal: Refusal) -> ApiError {
    let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::BAD_REQUEST);
    let error = ApiError::new(
        status,
        json!({
            "detail": refusal.message,
            "type": refusal.error_type,
            "param": refusal.param,
            "code": refusal.code,
        }),
    );
    match refusal.retry_after {
        Some(wait) if status == StatusCode::TOO_MANY_REQUESTS => error.later(wait),
        Some(_) | None => error,
    }
}

fn key_problem(problem: KeyProblem) -> ApiError {
    match problem {
        KeyProblem::InFlight => ApiError::coded(
            StatusCode::CONFLICT,
            "The first request with this Idempotency-Key is still being answered.",
            "idempotency_key_in_use",
        )
        .later(LATER),
        KeyProblem::OtherRequest => ApiError::coded(
            StatusCode::UNPROCESSABLE_ENTITY,
            "This Idempotency-Key was used for another request.",
            "idempotency_key_reused",
        ),
        KeyProblem::Deleted => ApiError::coded(
            StatusCode::GONE,
            "The prompt that was posted with this Idempotency-Key was deleted.",
            "prompt_deleted",
        ),
    }
}

fn field_errors(fields: FieldErrors) -> Value {
    let mut body = Map::new();
    for (name, messages) in fields {
        let list = body.entry(name).or_insert_with(|| json!([]));
        if let Value::Array(list) = list {
            list.extend(messages.into_iter().map(Value::String));
        }
    }
    Value::Object(body)
}

fn unauthenticated(why: Unauthenticated) -> ApiError {
    let status = StatusCode::UNAUTHORIZED;
    match why {
        Unauthenticated::NotProvided => {
            ApiError::plain(status, "Authentication credentials were not provided.")
        }
        Unauthenticated::MalformedHeader => ApiError::coded(
            status,
            "Authorization header must contain two space-delimited values",
            "bad_authorization_header",
        ),
        Unauthenticated::AccessToken(problem) => ApiError::new(
            status,
            json!({
                "detail": "Given token not valid for any token type",
                "code": "token_not_valid",
                "messages": [{ "token_class": "AccessToken", "token_type": "access", "message": token_problem(problem) }],
            }),
        ),
        Unauthenticated::ApiKey(problem) => ApiError::new(
            status,
            json!({
                "detail": "Given token not valid for any token type",
                "code": "token_not_valid",
                "messages": [{ "token_class": "ApiKey", "token_type": "api_key", "message": api_key_problem(problem) }],
            }),
        ),
        Unauthenticated::RefreshToken(problem) => {
            ApiError::coded(status, token_problem(problem), "token_not_valid")
        }
        Unauthenticated::NoUserId => ApiError::coded(
            status,
            "Token contained no recognizable user identification",
            "token_not_valid",
        ),
        Unauthenticated::UserNotFound => {
            ApiError::coded(status, "User not found", "user_not_found")
        }
        Unauthenticated::UserInactive => {
            ApiError::coded(status, "User is inactive", "user_inactive")
        }
        Unauthenticated::RefreshUserInactive => {
            ApiError::plain(status, "No active account found for the given token.")
        }
        Unauthenticated::WrongCredentials => {
            ApiError::plain(status, "No active account found with the given credentials")
        }
        Unauthenticated::SpentCredential => ApiError::coded(
            status,
            "The session or ticket is not valid",
            "credential_not_valid",
        ),
    }
}

fn api_key_problem(problem: ApiKeyProblem) -> &'static str {
    match problem {
        ApiKeyProblem::Invalid => "API key is invalid",
        ApiKeyProblem::Expired => "API key is expired",
        ApiKeyProblem::Revoked => "API key is revoked",
    }
}

fn token_problem(problem: TokenProblem) -> &'static str {
    match problem {
        TokenProblem::Invalid => "Token is invalid",
        TokenProblem::Expired => "Token is expired",
        TokenProblem::NoExpiry => "Token has no 'exp' claim",
        TokenProblem::NoType => "Token has no type",
        TokenProblem::WrongType => "Token has wrong type",
        TokenProblem::NoId => "Token has no id",
        TokenProblem::Revoked => "Token is revoked",
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (
            self.status,
            [(CONTENT_TYPE, "application/json")],
            self.body.to_string(),
        )
            .into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(
                WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"api\""),
            );
        }
        if let Some(wait) = self.retry_after {
            headers.insert(RETRY_AFTER, whole_seconds(wait).into());
        }
        if self.is_final {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if self.closes {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(source) = self.source {
            response
                .extensions_mut()
                .insert(Cause(std::sync::Arc::new(source)));
        }
        response.extensions_mut().insert(ErrorFacts {
            body: self.body,
            retry_after: self.retry_after,
        });
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_rounded_up_to_whole_seconds() {
        assert_eq!(whole_seconds(Duration::ZERO), 1);
        assert_eq!(whole_seconds(Duration::from_millis(1)), 1);
        assert_eq!(whole_seconds(Duration::from_secs(2)), 2);
        assert_eq!(whole_seconds(Duration::from_nanos(2_000_000_001)), 3);
    }

    #[test]
    fn messages_about_one_field_are_one_list() {
        let fields = vec![
            ("username", vec!["a".into()]),
            ("email", vec!["b".into()]),
            ("username", vec!["c".into()]),
        ];
        assert_eq!(
            field_errors(fields),
            json!({ "username": ["a", "c"], "email": ["b"] })
        );
    }

    #[test]
    fn cause_of_an_internal_error_is_kept_for_the_log_and_not_sent() {
        let response = ApiError::from(Error::internal("SELECT secret")).into_response();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert!(response.extensions().get::<Cause>().is_some());
        let body = ApiError::from(Error::internal("SELECT secret")).body;
        assert!(!body.to_string().contains("SELECT"));
    }
}
