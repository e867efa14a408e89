//! `/api/prompts`: posting, listing, finding, reading and deleting prompts.

mod create;
mod events;
mod page;
mod similar;
mod stream;
mod usage;

use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use self::create::{IDEMPOTENT_REPLAYED, idempotency_key};
pub use self::events::encode_event;
use self::usage::Usage;
use super::authenticate::{Permitted, ReadScope, WriteScope};
use super::content_negotiation::wants_stream;
use super::dollars::dollars;
use super::error::{ApiError, ErrorResponse};
use super::extract::{Query, RequestOwner};
use super::json_response::{json_len, json_response};
use super::state::AppState;
use crate::domain::{Prompt, PromptId};
use crate::error::Error;
use crate::services::prompts::READ_BYTES;

/// The routes of this resource; all need an access token or an API key.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create::create_prompt, list_prompts))
        .routes(routes!(find_similar))
        .routes(routes!(show_prompt, delete_prompt))
}

/// An answered prompt.
#[derive(Serialize, ToSchema)]
pub struct CreatedPromptResponse {
    #[schema(example = 1)]
    id: i64,
    #[schema(example = "hello world")]
    prompt: String,
    #[schema(example = "[mock] You said: hello world")]
    response: String,
    #[schema(format = "date-time", example = "2026-11-22T21:08:49.297687Z")]
    created_at: String,
    /// The model that answered; `mock` is the built-in one.
    #[schema(example = "mock")]
    model: String,
}

/// A stored prompt.
#[derive(Serialize, ToSchema)]
pub struct PromptResponse {
    id: i64,
    prompt: String,
    /// The answer, once there is one.
    #[schema(required = true)]
    response: Option<String>,
    #[schema(format = "date-time")]
    created_at: String,
    model: String,
    status: Status,
    /// Why it failed, if it did.
    #[schema(required = true, example = "upstream_timeout")]
    error: Option<&'static str>,
    /// Why the answer ended where it did, in the upstream's word: `stop`, `length`,
    /// `content_filter` and others.
    #[schema(required = true, example = "stop")]
    finish_reason: Option<String>,
    /// What the upstream counted; null if it counted nothing.
    #[schema(required = true)]
    usage: Option<Usage>,
    /// How long the upstream took, with all attempts, in milliseconds.
    #[schema(required = true, example = 1250)]
    duration_ms: Option<u32>,
    /// What it cost in US dollars, exactly; null where no price is known.
    #[schema(required = true, value_type = Option<f64>, example = 0.00029)]
    cost_usd: Option<Box<RawValue>>,
    /// The front door by which it came: `api`, `page` or `v1`.
    #[schema(example = "api")]
    source: &'static str,
}

/// How far a prompt has come.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The upstream is still answering.
    Running,
    /// Answered.
    Completed,
    /// The upstream failed.
    Failed,
}

/// One page of prompts, newest first.
#[derive(Serialize, ToSchema)]
pub struct PromptListResponse {
    results: Vec<PromptResponse>,
    /// The next page's `cursor`; null on the last page.
    #[schema(required = true)]
    next: Option<String>,
}

/// A prompt that a search found.
#[derive(Serialize, ToSchema)]
pub struct SimilarPrompt {
    id: i64,
    prompt: String,
    response: String,
    #[schema(format = "date-time")]
    created_at: String,
    /// Cosine similarity to the query: 1 is the same meaning, 0 is unrelated.
    #[schema(minimum = -1.0, maximum = 1.0, example = 0.87)]
    score: f32,
}

/// What a search found, nearest first.
#[derive(Serialize, ToSchema)]
pub struct SimilarResponse {
    /// The query as it was asked.
    query: String,
    results: Vec<SimilarPrompt>,
}

/// What to look for.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
struct SimilarParameters {
    /// The text to compare with.
    #[param(max_length = 32000, example = "hello")]
    q: Option<String>,
    /// Another name for `q`, used if that is absent.
    #[param(max_length = 32000)]
    prompt: Option<String>,
    /// How many results.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 100, default = 5)]
    k: Result<usize, String>,
}

impl SimilarParameters {
    fn read(query: &Query) -> Self {
        let text = |name| query.get(name).filter(|text| !text.is_empty());
        Self {
            q: text("q").map(str::to_owned),
            prompt: text("prompt").map(str::to_owned),
            k: query.integer("k", 5, 1..=100),
        }
    }
}

/// Which page.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
struct ListParameters {
    /// The most prompts of a page. A page ends earlier, with `next` set, if its texts would be more
    /// than 1 MiB.
    #[param(value_type = Option<u32>, minimum = 1, maximum = 100, default = 20)]
    limit: usize,
    /// The `next` of the page before.
    #[param(value_type = Option<String>)]
    cursor: Option<PromptId>,
}

impl ListParameters {
    fn read(query: &Query) -> Result<Self, Error> {
        let mut errors = Vec::new();
        let limit = query
            .integer("limit", 20, 1..=100)
            .map_err(|message| errors.push(("limit", vec![message])));
        let cursor = query.get("cursor").map(|cursor| {
            decode_cursor(cursor)
                .ok_or_else(|| errors.push(("cursor", vec!["Invalid cursor.".to_owned()])))
        });
        match (limit, cursor.transpose()) {
            (Ok(limit), Ok(cursor)) => Ok(Self { limit, cursor }),
            _ => Err(Error::InvalidFields(errors)),
        }
    }
}

/// The description of a 404 for the path of one prompt.
const NO_SUCH_PROMPT: &str = "There is no such prompt, or it is another user's.";

/// List prompts
///
/// The caller's prompts, newest first. A page may have fewer prompts than `limit` although there
/// are more: only `next` says whether there are.
#[utoipa::path(
    get, path = "/api/prompts", tag = "prompts", operation_id = "list_prompts", security(("bearer" = []), ("api_key" = [])),
    params(ListParameters),
    responses((status = 200, description = "One page.", body = PromptListResponse)),
)]
async fn list_prompts(
    State(state): State<AppState>,
    Permitted { caller, .. }: Permitted<ReadScope>,
    RequestOwner(owner): RequestOwner,
    query: Query,
) -> Result<Response, ApiError> {
    let ListParameters { limit, cursor } = ListParameters::read(&query)?;
    page::answer(&state, caller.user_id(), owner, cursor, limit).await
}

/// Find similar prompts
///
/// The stored prompts nearest in meaning to a text, nearest first. Not throttled; refused at once
/// when the service is overloaded.
#[utoipa::path(
    get, path = "/api/prompts/similar", tag = "prompts", operation_id = "find_similar", security(("bearer" = []), ("api_key" = [])),
    params(SimilarParameters),
    responses((
        status = 200, description = "The nearest prompts.", body = SimilarResponse,
        headers(("X-Search-Coverage" = f64, description = "The share of prompts that could be found, while a change of model is under way.")),
    )),
)]
async fn find_similar(
    State(state): State<AppState>,
    Permitted { caller, .. }: Permitted<ReadScope>,
    RequestOwner(owner): RequestOwner,
    query: Query,
) -> Result<Response, ApiError> {
    let SimilarParameters { q, prompt, k } = SimilarParameters::read(&query);
    let Some(text) = q.or(prompt) else {
        return Err(Error::InvalidRequest("Missing ?q=").into());
    };
    check_length("q", &text, state.max_prompt_chars)?;
    let k = k.map_err(|message| Error::field("k", message))?;
    let (mut response, coverage) =
        similar::answer(&state, caller.user_id(), owner, &text, k).await?;
    if let Some(coverage) = coverage {
        let value = HeaderValue::from_str(&share(coverage)).map_err(Error::internal)?;
        response
            .headers_mut()
            .insert(HeaderName::from_static("x-search-coverage"), value);
    }
    Ok(response)
}

/// Rounded down: coverage that is not complete must not be shown as 1.
fn share(coverage: f64) -> String {
    format!("{:.4}", (coverage * 1e4).floor() / 1e4)
}

/// Show a prompt
///
/// One of the caller's prompts. With `Accept: text/event-stream` its answer is streamed, from the
/// event after `Last-Event-ID` if that is given. The process that runs the call streams it live,
/// any other process once it is complete.
#[utoipa::path(
    get, path = "/api/prompts/{id}", tag = "prompts", operation_id = "show_prompt", security(("bearer" = []), ("api_key" = [])),
    params(
        ("id" = i64, Path, description = "The prompt's id."),
        ("Last-Event-ID" = Option<String>, Header, description = "The `id` of the last event that was read of this prompt's stream."),
    ),
    responses(
        (
            status = 200, description = "The prompt, or the stream of its answer.",
            content((PromptResponse = "application/json"), (String = "text/event-stream")),
        ),
        (status = 204, description = "The stream was read to its end before."),
        (status = 400, description = "`Last-Event-ID` is none of this service's.", body = ErrorResponse),
        (status = 404, description = NO_SUCH_PROMPT, body = ErrorResponse),
    ),
)]
async fn show_prompt(
    State(state): State<AppState>,
    Permitted { caller, .. }: Permitted<ReadScope>,
    RequestOwner(owner): RequestOwner,
    PathId(id): PathId,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let user_id = caller.user_id();
    let read = async {
        let turn = state.reads.acquire(user_id).await?;
        let memory = state.memory.reserve(owner, READ_BYTES)?;
        Ok::<_, Error>((turn, memory))
    };
    let (_turn, mut memory) = read.await?;
    if wants_stream(&headers) {
        return stream::resume(&state, caller, id, &headers, memory).await;
    }
    let prompt = state.prompts.get(user_id, id, &mut memory).await?;
    memory.try_grow(json_bytes(&prompt)).map_err(Error::from)?;
    let body = PromptResponse::from(prompt);
    Ok(json_response(StatusCode::OK, &body, memory))
}

/// Delete a prompt
///
/// Removes one of the caller's prompts; no search finds it any more.
#[utoipa::path(
    delete, path = "/api/prompts/{id}", tag = "prompts", operation_id = "delete_prompt", security(("bearer" = []), ("api_key" = [])),
    params(("id" = i64, Path, description = "The prompt's id.")),
    responses(
        (status = 204, description = "It is gone."),
        (status = 404, description = NO_SUCH_PROMPT, body = ErrorResponse),
    ),
)]
async fn delete_prompt(
    State(state): State<AppState>,
    Permitted { caller, .. }: Permitted<WriteScope>,
    PathId(id): PathId,
) -> Result<StatusCode, ApiError> {
    state.prompts.delete(caller.user_id(), id).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl CreatedPromptResponse {
    /// The response for a completed prompt; `None` for any other, which has no answer.
    fn of(prompt: &Prompt) -> Option<Self> {
        Some(Self {
            id: prompt.id.0,
            prompt: prompt.prompt.clone(),
            response: prompt.response.clone()?,
            created_at: prompt.created_at.to_string(),
            model: prompt.model.clone(),
        })
    }
}

impl From<Prompt> for PromptResponse {
    fn from(prompt: Prompt) -> Self {
        use crate::domain::PromptStatus;
        Self {
            id: prompt.id.0,
            prompt: prompt.prompt,
            response: prompt.response,
            created_at: prompt.created_at.to_string(),
            model: prompt.model,
            status: match prompt.status {
                PromptStatus::Running => Status::Running,
                PromptStatus::Completed => Status::Completed,
                PromptStatus::Failed => Status::Failed,
            },
            error: prompt.error.map(|code| code.as_str()),
            usage: Usage::of(&prompt.call),
            finish_reason: prompt.call.finish_reason,
            duration_ms: prompt.call.duration_ms,
            cost_usd: prompt.call.cost.map(dollars),
            source: prompt.source.as_str(),
        }
    }
}

impl From<(Prompt, f32)> for SimilarPrompt {
    fn from((prompt, score): (Prompt, f32)) -> Self {
        Self {
            id: prompt.id.0,
            prompt: prompt.prompt,
            response: prompt.response.unwrap_or_default(),
            created_at: prompt.created_at.to_string(),
            score,
        }
    }
}

/// The most bytes that a prompt takes as JSON, in any response.
fn json_bytes(prompt: &Prompt) -> usize {
    /// Room for the names, numbers and the time, in bytes.
    const AROUND: usize = 512;
    let response = prompt.response.as_deref().map_or(0, json_len);
    json_len(&prompt.prompt) + response + json_len(&prompt.model) + AROUND
}

fn check_length(field: &'static str, text: &str, limit: usize) -> Result<(), Error> {
    // A character takes at least one byte, so most texts need no counting.
    if text.len() > limit && text.chars().nth(limit).is_some() {
        return Err(Error::field(
            field,
            format!("Ensure this field has no more than {limit} characters."),
        ));
    }
    Ok(())
}

/// The prompt that the path names.
struct PathId(PromptId);

impl<S: Send + Sync> FromRequestParts<S> for PathId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        // A path that cannot be decoded names no prompt.
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|_| Error::NotFound)?;
        Ok(Self(parse_id(&text)?))
    }
}

/// An id as the service writes it; anything else names no prompt.
fn parse_id(text: &str) -> Result<PromptId, Error> {
    let is_plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|_| is_plain)
        .map(PromptId)
        .ok_or(Error::NotFound)
}

/// The start of the next page, as text that is opaque to clients.
pub(crate) fn encode_cursor(id: PromptId) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(id.0.to_be_bytes())
}

pub(crate) fn decode_cursor(cursor: &str) -> Option<PromptId> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(cursor).ok()?;
    Some(PromptId(i64::from_be_bytes(bytes.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coverage_that_is_not_complete_is_not_shown_as_complete() {
        assert_eq!(share(999_999.0 / 1_000_000.0), "0.9999");
        assert_eq!(share(0.5), "0.5000");
        assert_eq!(share(0.0), "0.0000");
    }

    #[test]
    fn cursor_survives_the_round_trip_and_other_texts_are_refused() {
        for id in [1, 4711, i64::MAX] {
            assert_eq!(
                decode_cursor(&encode_cursor(PromptId(id))),
                Some(PromptId(id))
            );
        }
        for bad in ["", "7", "not a cursor", "AAAA", "%00", "AAAAAAAAAAAAAAAA"] {
            assert_eq!(decode_cursor(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn only_plain_numbers_are_ids() {
        assert_eq!(parse_id("42").unwrap(), PromptId(42));
        for bad in ["", "+42", "-1", "4 2", "x", "99999999999999999999"] {
            assert!(parse_id(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn length_is_counted_in_characters() {
        assert!(check_length("q", "äöü", 3).is_ok());
        assert!(check_length("q", "äöüx", 3).is_err());
    }
}
