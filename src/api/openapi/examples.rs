//! Examples of error responses, by operation and status. Most are made by the error map itself, so
//! that they cannot say anything else; a test compares all of them with what the service returns.

use std::time::Duration;

use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::api::error::ApiError;
use crate::api::v1::OpenAiErrorResponse;
use crate::domain::{FailureCode, PromptId, Scope};
use crate::error::{
    ApiKeyProblem, Error, FailedPrompt, FieldErrors, KeyProblem, ScopeProblem, TokenProblem,
    Unauthenticated,
};

/// Bodies of one error response, each with the case that it is an example of.
pub type Examples = Vec<(&'static str, Value)>;

/// The examples of an operation's response with that status; none if the status is no error.
pub fn examples(operation: &str, status: &str) -> Examples {
    match status {
        "400" => invalid(operation),
        "401" => unauthenticated(operation),
        "403" if operation == "login" => one(Error::Forbidden(
            "A page of this Origin may not ask for a session.",
        )),
        "403" if matches!(operation, "connect" | "refresh") => one(Error::Forbidden(
            "A page of this Origin may not use the session cookie.",
        )),
        "403" if operation == "create_prompt" => vec![
            ("too many prompts", body(Error::QuotaExceeded)),
            ("an API key without the scope", lacks(Scope::Chat)),
        ],
        "403" if operation == "register" => one(Error::Forbidden("Registration is closed.")),
        "403" if matches!(operation, "create_key" | "change_key") => vec![
            ("too many keys", body(Error::TooManyApiKeys)),
            ("an API key", body(Error::Scope(ScopeProblem::NoKeys))),
        ],
        "403"
            if matches!(
                operation,
                "list_prompts" | "find_similar" | "show_prompt" | "show_usage"
            ) =>
        {
            vec![("", lacks(Scope::Read))]
        }
        "403" if operation == "delete_prompt" => vec![("", lacks(Scope::Write))],
        "403" => one(Error::Scope(ScopeProblem::NoKeys)),
        "404" if operation == "create_prompt" => vec![
            ("no price", body(Error::PriceUnknown)),
            ("another model", body(Error::ModelNotFound)),
        ],
        "404" => one(Error::NotFound),
        "405" => detail("Method not allowed."),
        "406" => detail("Could not satisfy the request Accept header."),
        "408" => detail("The request body did not arrive in time."),
        "409" => one(Error::IdempotencyKey(KeyProblem::InFlight)),
        "410" => vec![
            (
                "deleted later",
                body(Error::IdempotencyKey(KeyProblem::Deleted)),
            ),
            ("deleted meanwhile", body(Error::Deleted)),
        ],
        "413" if operation == "create_prompt" => detail("The request body is larger than 1 MiB."),
        "413" => detail("The request body is larger than 16 KiB."),
        "415" => detail("Unsupported media type in request."),
        "422" => one(Error::IdempotencyKey(KeyProblem::OtherRequest)),
        "426" => detail("This address speaks WebSocket."),
        "429" if operation == "connect" => detail("This user has too many open sockets."),
        "429" if operation == "create_prompt" => vec![
            (
                "throttled",
                body(Error::RateLimited(Duration::from_secs(7))),
            ),
            ("a budget", body(Error::BudgetExceeded)),
        ],
        "429" => one(Error::RateLimited(Duration::from_secs(7))),
        "500" => one(Error::internal("a defect")),
        "502" => one(failed(FailureCode::UpstreamFailed)),
        "503" => unavailable(operation),
        "504" => one(failed(FailureCode::UpstreamTimeout)),
        _ => Vec::new(),
    }
}

/// The same of an operation of OpenAI's protocol, in its form.
pub fn v1_examples(operation: &str, status: &str) -> Examples {
    let examples = match (operation, status) {
        (_, "400") => v1_invalid(operation),
        (_, "401") => unauthenticated("list_prompts"),
        ("create_chat_completion", "403") => examples("create_prompt", status),
        ("update_chat_completion" | "delete_chat_completion", "403") => {
            examples("delete_prompt", status)
        }
        ("create_embeddings", "403") => vec![("", lacks(Scope::Embeddings))],
        (_, "403") => examples("list_prompts", status),
        ("create_chat_completion", "404" | "429" | "503") => examples("create_prompt", status),
        ("create_embeddings" | "show_model", "404") => one(Error::ModelNotFound),
        ("create_chat_completion" | "create_embeddings", "413") => {
            detail("The request body is larger than 32 MiB.")
        }
        (_, "413") => detail("The request body is larger than 64 KiB."),
        (_, "415") => detail("The body must be JSON: send Content-Type: application/json."),
        _ => examples(operation, status),
    };
    let status = status.parse().unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut told = Examples::new();
    for (name, body) in examples {
        let body = json!(OpenAiErrorResponse::of(status, &body));
        // Errors that differ only in their code are one in this form.
        if told.iter().all(|(_, known)| *known != body) {
            told.push((name, body));
        }
    }
    told
}

fn v1_invalid(operation: &str) -> Examples {
    let of = |param, message: &str| ApiError::invalid_member(message, Some(param)).into_body();
    let field = |name, message: &str| body(Error::field(name, message));
    match operation {
        "create_chat_completion" => vec![
            (
                "a member is missing",
                of("messages", "The member messages is missing."),
            ),
            (
                "no JSON",
                json!({ "detail": "The body is not valid JSON." }),
            ),
        ],
        "create_embeddings" => vec![(
            "a member is missing",
            of("input", "The member input is missing."),
        )],
        "update_chat_completion" => vec![
            (
                "no labels",
                of(
                    "metadata",
                    "The body must be an object whose metadata is an object of texts, or null.",
                ),
            ),
            (
                "too many labels",
                field(
                    "metadata",
                    "At most 16 labels, names of at most 64 characters, values of at most 512.",
                ),
            ),
        ],
        _ => vec![
            (
                "a wrong limit",
                field("limit", "A valid integer is required."),
            ),
            ("a wrong place", field("after", "Invalid id.")),
        ],
    }
}

fn invalid(operation: &str) -> Examples {
    let fields = |errors: &[(&'static str, &str)]| {
        let errors: FieldErrors = errors
            .iter()
            .map(|(name, message)| (*name, vec![(*message).to_owned()]))
            .collect();
        body(Error::InvalidFields(errors))
    };
    let oauth = |code, detail| ApiError::oauth(code, detail).into_body();
    const REQUIRED: &str = "This field is required.";
    let of_fields = match operation {
        "register" => fields(&[("username", "A user with that username already exists.")]),
        "login" => fields(&[("username", REQUIRED), ("password", REQUIRED)]),
        "refresh" => fields(&[("refresh", REQUIRED)]),
        "logout" => fields(&[("refresh", "Not a valid string.")]),
        "create_prompt" => fields(&[("prompt", "This field may not be blank.")]),
        "create_key" => fields(&[("name", REQUIRED)]),
        "change_key" => fields(&[("expires_at", "This time is not in the future.")]),
        "rotate_key" => fields(&[("grace", "The grace is at most 30 days.")]),
        "list_prompts" => {
            return vec![
                ("a wrong cursor", fields(&[("cursor", "Invalid cursor.")])),
                (
                    "a wrong limit",
                    fields(&[("limit", "A valid integer is required.")]),
                ),
            ];
        }
        "find_similar" => {
            return vec![
                ("no query", json!({ "detail": "Missing ?q=" })),
                (
                    "a wrong k",
                    fields(&[("k", "Ensure this value is less than or equal to 100.")]),
                ),
            ];
        }
        "show_usage" => {
            let message = "A day is written as 2026-11-30.";
            return vec![("", fields(&[("from", message)]))];
        }
        "show_prompt" => return detail("The Last-Event-ID is none of this service's."),
        "get_token" => {
            return vec![
                (
                    "wrong name or password",
                    oauth(
                        "invalid_grant",
                        "No active account found with the given credentials",
                    ),
                ),
                (
                    "another grant",
                    oauth("unsupported_grant_type", "The only grant_type is password."),
                ),
            ];
        }
        _ => return Vec::new(),
    };
    let mut examples = vec![
        ("a field", of_fields),
        (
            "no JSON",
            json!({ "detail": "JSON parse error - line 1 column 2" }),
        ),
        (
            "no object",
            json!({ "non_field_errors": ["Invalid data. Expected a dictionary, but got list."] }),
        ),
    ];
    if operation == "create_prompt" {
        let message = "An Idempotency-Key has 1 to 255 visible ASCII characters.";
        examples.push(("a wrong key", json!({ "detail": message })));
    }
    examples
}

fn unauthenticated(operation: &str) -> Examples {
    let why = |why: Unauthenticated| body(why.into());
    match operation {
        "login" => one(Unauthenticated::WrongCredentials.into()),
        "refresh" => vec![
            (
                "expired",
                why(Unauthenticated::RefreshToken(TokenProblem::Expired)),
            ),
            (
                "logged out",
                why(Unauthenticated::RefreshToken(TokenProblem::Revoked)),
            ),
        ],
        _ => {
            let mut examples = vec![
                ("no token", why(Unauthenticated::NotProvided)),
                (
                    "expired",
                    why(Unauthenticated::AccessToken(TokenProblem::Expired)),
                ),
                ("account disabled", why(Unauthenticated::UserInactive)),
            ];
            if takes_keys(operation) {
                let revoked = Unauthenticated::ApiKey(ApiKeyProblem::Revoked);
                examples.push(("API key revoked", why(revoked)));
            }
            if operation == "connect" {
                examples.push(("a used ticket", why(Unauthenticated::SpentCredential)));
            }
            examples
        }
    }
}

fn unavailable(operation: &str) -> Examples {
    if operation == "readyz" {
        let parts = json!({ "model": "ok", "store": "down", "vectors": "ok" });
        let body = json!({ "status": "degraded", "parts": parts, "model": "all-MiniLM-L6-v2" });
        return vec![("", body)];
    }
    let mut examples = vec![
        ("overloaded", body(Error::overloaded())),
        ("unavailable", body(Error::unavailable("the store"))),
    ];
    if operation == "create_prompt" {
        let refused = failed(FailureCode::UpstreamUnavailable);
        examples.push(("upstream unavailable", body(refused)));
    }
    examples
}

/// Whether an operation is for API keys too.
fn takes_keys(operation: &str) -> bool {
    let prompts = [
        "list_prompts",
        "find_similar",
        "show_prompt",
        "delete_prompt",
    ];
    operation == "create_prompt" || prompts.contains(&operation)
}

fn lacks(scope: Scope) -> Value {
    body(Error::Scope(ScopeProblem::Lacks(scope)))
}

fn failed(code: FailureCode) -> Error {
    Error::Failed(FailedPrompt {
        id: PromptId(1),
        code,
        detail: code.detail(),
        retry_after: None,
    })
}

fn detail(text: &str) -> Examples {
    vec![("", json!({ "detail": text }))]
}

fn one(error: Error) -> Examples {
    vec![("", body(error))]
}

fn body(error: Error) -> Value {
    ApiError::from(error).into_body()
}
