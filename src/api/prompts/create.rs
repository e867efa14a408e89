//! `POST /api/prompts`.

use axum::extract::{FromRequest, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use utoipa::ToSchema;

use super::{CreatedPromptResponse, check_length, json_bytes, stream};
use crate::api::authenticate::{Admitted, ChatScope, Permitted};
use crate::api::content_negotiation::wants_stream;
use crate::api::error::{ApiError, ErrorResponse, FailedPromptResponse};
use crate::api::extract::{Body, form};
use crate::api::json_response::json_response;
use crate::api::post::{PostRequest, take_post};
use crate::api::request_log::UpstreamTime;
use crate::api::state::AppState;
use crate::domain::Timestamp;
use crate::error::Error;
use crate::memory_budget::{Owner, Reservation};
use crate::services::accounts::Caller;
use crate::services::prompts::{CreatePrompt, Created, KeyInUse, Post};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Says that a response is that of an earlier request with the same key.
pub const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
/// The most characters of a key.
const MAX_KEY_CHARS: usize = 255;

/// A prompt to be answered.
#[derive(ToSchema)]
pub struct CreatePromptRequest {
    /// The text. White space around it is dropped; NUL is refused.
    #[schema(
        min_length = 1,
        max_length = 32000,
        pattern = r"\S",
        example = "hello world"
    )]
    prompt: String,
    /// Whether to tell the user's open WebSockets too.
    #[schema(default = false, required = false)]
    websocket: bool,
    /// Whether to stream the answer. It wins over `Accept`; left out, `Accept: text/event-stream`
    /// asks for a stream.
    #[schema(value_type = bool, default = false, required = false)]
    stream: Option<bool>,
}

form!(CreatePromptRequest { prompt: text, websocket: flag, stream: optional_flag }, max_bytes: 1 << 20);

/// Post a prompt
///
/// Runs it on the LLM, stores it and makes it searchable, all before the response. Throttled for
/// each user.
///
/// With `"stream": true`, or with `Accept: text/event-stream` and no `stream` in the body, the
/// answer has status 200 and is a stream of server-sent events: `started` (`{"id"}`), `delta`
/// (`{"text"}`) any number of times, and `completed` (the 201 body) or `failed`
/// (`{"detail", "code", "id"}`).
#[utoipa::path(
    post, path = "/api/prompts", tag = "prompts", operation_id = "create_prompt", security(("bearer" = []), ("api_key" = [])),
    params((
        "Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$",
        description = "Chosen by the client: repeated with the same body within 24 h, the request is answered as the first time, and nothing is done twice.",
    )),
    request_body(content = CreatePromptRequest, content_type = "application/json"),
    responses(
        (
            status = 201, description = "The prompt with its answer.", body = CreatedPromptResponse,
            headers(
                ("Idempotent-Replayed" = bool, description = "`true` if the answer is that of an earlier request with the same key; absent otherwise."),
                ("Server-Timing" = String, description = "Milliseconds of the upstream and of the service; absent from a replay."),
            ),
        ),
        (
            status = 200, description = "The stream of the answer, `text/event-stream`, if one was asked for.",
            body = String, content_type = "text/event-stream",
            headers(("Idempotent-Replayed" = bool, description = "`true` if the answer is that of an earlier request with the same key; absent otherwise.")),
        ),
        (status = 403, description = "The user keeps as many prompts as `MAX_PROMPTS_PER_USER` allows, failed ones included. Deleting some helps, repeating does not. Or the API key lacks the scope `chat`. Nothing was asked or stored.", body = ErrorResponse),
        (status = 404, description = "A budget is in force and the model has no price, or no limit of tokens. Or the API key may not use the model. Nothing was asked or stored.", body = ErrorResponse),
        (
            status = 409, description = "The first request with this key is still being answered.", body = ErrorResponse,
            headers(("Retry-After" = u64, description = "Whole seconds to wait.")),
        ),
        (status = 410, description = "The prompt posted with this key was deleted, or this one while it was being answered.", body = ErrorResponse),
        (status = 413, description = "The body is larger than 1 MiB.", body = ErrorResponse),
        (status = 422, description = "The key was used for another request.", body = ErrorResponse),
        (
            status = 429, body = ErrorResponse,
            description = "Too many: `Retry-After` says when one succeeds. Or, with the code `insufficient_quota`, the call may cost more than is left of a budget: then repeating it does not help.",
            headers(("x-should-retry" = bool, description = "`false` if a budget refuses the call; absent otherwise.")),
        ),
        (status = 502, description = "The upstream failed. The prompt is kept as failed.", body = FailedPromptResponse),
        (
            status = 503, body = FailedPromptResponse,
            description = "Overloaded, or the store or another part is unavailable; or the upstream cannot be asked: then with the `id` of the prompt, which is kept as failed.",
        ),
        (status = 504, description = "The upstream did not answer in time. The prompt is kept as failed.", body = FailedPromptResponse),
    ),
)]
pub async fn create_prompt(
    State(state): State<AppState>,
    Permitted { caller, .. }: Permitted<ChatScope>,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let key = idempotency_key(&parts.headers);
    let mut post = PromptPost {
        state: &state,
        caller: &caller,
        parts,
        body,
    };
    let created = take_post(&state.prompts, key, &mut post).await?;
    respond(&state, caller, created)
}

struct PromptPost<'a> {
    state: &'a AppState,
    caller: &'a Caller,
    parts: Parts,
    body: axum::body::Body,
}

impl PostRequest for PromptPost<'_> {
    async fn admit(&mut self) -> Result<(), ApiError> {
        Admitted::from_request_parts(&mut self.parts, self.state).await?;
        Ok(())
    }

    async fn read(&mut self, key: Option<String>) -> Result<(CreatePrompt, Reservation), ApiError> {
        let body = std::mem::take(&mut self.body);
        let request = Request::from_parts(self.parts.clone(), body);
        let body = Body::from_request(request, self.state).await?;
        read(self.state, self.caller, &self.parts.headers, key, body)
    }
}

fn read(
    state: &AppState,
    caller: &Caller,
    headers: &HeaderMap,
    key: Option<String>,
    body: Body<CreatePromptRequest>,
) -> Result<(CreatePrompt, Reservation), ApiError> {
    let Body {
        mut fields, memory, ..
    } = body;
    let request = CreatePromptRequest::read(&mut fields);
    fields.check()?;
    check_length("prompt", &request.prompt, state.max_prompt_chars)?;
    let route = state.prompts.route_of(None)?;
    if !caller.may_use_model(route.model()) {
        return Err(Error::ModelNotFound.into());
    }
    let new = CreatePrompt {
        user_id: caller.user_id(),
        post: Post::Prompt(request.prompt),
        route,
        announce: request.websocket,
        is_streamed: request.stream.unwrap_or_else(|| wants_stream(headers)),
        key,
        api_key: caller.api_key().map(|key| KeyInUse::of(key)),
        now: Timestamp::now(),
    };
    Ok((new, memory))
}

/// The request's key, if it has one.
///
/// # Errors
/// 400 if it is none of 1 to 255 visible ASCII characters, or comes twice.
pub fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let is_usable = values.next().is_none()
        && (1..=MAX_KEY_CHARS).contains(&value.len())
        && value.as_bytes().iter().all(u8::is_ascii_graphic);
    value
        .to_str()
        .ok()
        .filter(|_| is_usable)
        .map(|key| Some(key.to_owned()))
        .ok_or_else(|| {
            ApiError::bad_request("An Idempotency-Key has 1 to 255 visible ASCII characters.")
        })
}

fn respond(state: &AppState, caller: Caller, created: Created) -> Result<Response, ApiError> {
    let (mut response, is_replayed) = match created {
        Created::Answered {
            prompt,
            answer: _,
            upstream,
            is_replayed,
        } => {
            let body = CreatedPromptResponse::of(&prompt)
                .ok_or_else(|| Error::internal("an answered prompt has no answer"))?;
            let (owner, bytes) = (Owner::user(prompt.user_id), json_bytes(&prompt));
            // An answer that was paid for is sent even if the memory budget is exhausted.
            let memory = match is_replayed {
                true => state.memory.reserve(owner, bytes).map_err(Error::from)?,
                false => state.memory.hold(owner, bytes),
            };
            let mut response = json_response(StatusCode::CREATED, &body, memory);
            if let Some(took) = upstream {
                response.extensions_mut().insert(UpstreamTime(took));
            }
            (response, is_replayed)
        }
        Created::Streaming {
            reader,
            is_replayed,
        } => (stream::respond(state, caller, reader), is_replayed),
        Created::Chunks { .. } => {
            return Err(Error::internal("a prompt was answered like a chat call").into());
        }
    };
    if is_replayed {
        response
            .headers_mut()
            .insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(values: &[&str]) -> Result<Option<String>, ApiError> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(
                IDEMPOTENCY_KEY,
                HeaderValue::from_bytes(value.as_bytes()).unwrap(),
            );
        }
        idempotency_key(&headers)
    }

    #[test]
    fn a_key_is_visible_ascii_and_comes_once() {
        assert!(key(&[]).unwrap().is_none());
        for good in ["k", "6f1c-\"quoted\"", &"x".repeat(255)] {
            assert_eq!(key(&[good]).unwrap().as_deref(), Some(good));
        }
        for bad in ["", "two words", "schlüssel", &"x".repeat(256)] {
            assert!(key(&[bad]).is_err(), "{bad:?}");
        }
        assert!(key(&["one", "two"]).is_err());
    }
}
