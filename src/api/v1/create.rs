//! `POST /v1/chat/completions`.

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use super::errors::OpenAiErrorResponse;
use super::limits::Limits;
use super::{chat_id, stream};
use crate::api::authenticate::{ChatScope, Permitted};
use crate::api::error::ApiError;
use crate::api::extract::{RequestOwner, read_json};
use crate::api::json_response::reserved_bytes;
use crate::api::post::{PostRequest, take_post};
use crate::api::prompts::{IDEMPOTENT_REPLAYED, idempotency_key};
use crate::api::request_log::UpstreamTime;
use crate::api::state::AppState;
use crate::domain::Timestamp;
use crate::error::Error;
use crate::memory_budget::{Owner, Reservation};
use crate::services::accounts::Caller;
use crate::services::prompts::chat::{ChatPost, with_member};
use crate::services::prompts::{CreatePrompt, Created, KeyInUse, Post, READ_BYTES};

/// A chat request. All members are passed to the upstream as they came, those too that are not
/// listed here.
#[derive(Serialize, ToSchema)]
pub struct ChatCompletionRequest {
    /// A model, or an alias of one: see `GET /v1/models`.
    #[schema(example = "gpt-6-luna")]
    model: String,
    /// The conversation so far.
    #[schema(min_items = 1, value_type = Vec<Object>, example = json!([{ "role": "user", "content": "hello world" }]))]
    messages: Vec<serde_json::Value>,
    /// Whether to stream the answer as server-sent events.
    #[schema(default = false, required = false)]
    stream: Option<bool>,
    /// `false`: usage and times are kept of this call, and none of its texts. It is neither listed
    /// nor found.
    #[schema(default = true, required = false)]
    store: Option<bool>,
    /// Labels. With `"websocket": "true"` the outcome is sent to the user's open WebSockets too.
    #[schema(required = false, value_type = Option<Object>, example = json!({ "topic": "demo" }))]
    metadata: Option<serde_json::Value>,
}

/// Create a chat completion
///
/// Passes the request to the upstream that serves its model, keeps the call, and returns the answer
/// as it came, but for its `id`. With `"stream": true` the answer is a stream of server-sent
/// events, one for each chunk of the upstream's, and `[DONE]` when the call is stored. Throttled
/// for each user by `V1_THROTTLE`.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "v1", operation_id = "create_chat_completion", security(("bearer" = []), ("api_key" = [])),
    params((
        "Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$",
        description = "Chosen by the client: repeated with the same body within 24 h, the request is answered as the first time, and nothing is done twice.",
    )),
    request_body(content = ChatCompletionRequest, content_type = "application/json"),
    responses(
        (
            status = 200, description = "The upstream's `chat.completion`, or the stream of its chunks.",
            content((Object = "application/json"), (String = "text/event-stream")),
            headers(("Idempotent-Replayed" = bool, description = "`true` if the answer is that of an earlier request with the same key; absent otherwise.")),
        ),
        (status = 400, description = "The body is no chat request, or the upstream refuses it: then in the upstream's words.", body = OpenAiErrorResponse),
        (status = 403, description = "The key may not do this, or the user keeps as many prompts as allowed.", body = OpenAiErrorResponse),
        (status = 404, description = "No upstream serves the model, or the key may not use it; or a budget is in force and the model has no price, or no limit of tokens.", body = OpenAiErrorResponse),
        (status = 409, description = "The first request with this idempotency key is still being answered.", body = OpenAiErrorResponse),
        (status = 410, description = "The call made with this idempotency key was deleted, or this one while it was being answered.", body = OpenAiErrorResponse),
        (status = 413, description = "The body is larger than `MAX_V1_BODY`.", body = OpenAiErrorResponse),
        (status = 422, description = "The idempotency key was used for another request, or the upstream refuses this one.", body = OpenAiErrorResponse),
        (
            status = 429, body = OpenAiErrorResponse,
            description = "Too many: `Retry-After` and `retry-after-ms` say when one succeeds. Or, with the code `insufficient_quota`, the call may cost more than is left of a budget: then repeating it does not help.",
            headers(("x-should-retry" = bool, description = "`false` if a budget refuses the call; absent otherwise.")),
        ),
        (status = 502, description = "The upstream failed.", body = OpenAiErrorResponse),
        (status = 504, description = "The upstream did not answer in time.", body = OpenAiErrorResponse),
    ),
)]
pub async fn create_chat_completion(
    State(state): State<AppState>,
    Permitted { caller, .. }: Permitted<ChatScope>,
    RequestOwner(owner): RequestOwner,
    limits: Limits,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let mut post = ChatCall {
        state: &state,
        caller: &caller,
        owner,
        headers: &parts.headers,
        limits,
        body,
        form: Form::default(),
    };
    let key = idempotency_key(&parts.headers);
    let created = take_post(&state.prompts, key, &mut post).await?;
    let form = post.form;
    respond(&state, caller, form, created).await
}

/// How a client wants its answer.
#[derive(Clone, Copy, Default)]
struct Form {
    is_streamed: bool,
    /// Whether a streamed answer ends with the usage.
    wants_usage: bool,
}

/// One request, on its way to becoming a call.
struct ChatCall<'a> {
    state: &'a AppState,
    caller: &'a Caller,
    owner: Owner,
    headers: &'a HeaderMap,
    limits: Limits,
    body: Body,
    /// As the body says, once it is read.
    form: Form,
}

impl PostRequest for ChatCall<'_> {
    async fn admit(&mut self) -> Result<(), ApiError> {
        self.limits.admit(self.state, self.caller).await
    }

    async fn read(&mut self, key: Option<String>) -> Result<(CreatePrompt, Reservation), ApiError> {
        let most = self.state.server.max_v1_body;
        let mut memory = self.state.memory.hold(self.owner, 0);
        let body = std::mem::take(&mut self.body);
        let body = read_json(self.headers, body, most, &mut memory).await?;
        let chat = ChatPost::read(body)
            .await
            .map_err(|problem| ApiError::invalid_member(problem.message, problem.param))?;
        self.form = Form {
            is_streamed: chat.request.is_streamed(),
            wants_usage: chat.request.wants_usage(),
        };
        let model = chat.request.model();
        if !self.caller.may_use_model(model) {
            return Err(Error::ModelNotFound.into());
        }
        let route = self.state.prompts.route_of(Some(model))?;
        // The body was admitted. What is kept of it is no larger.
        let kept = chat.texts.as_ref().map_or(0, |texts| texts.text_bytes());
        memory.grow(chat.prompt.len() + kept);
        let new = CreatePrompt {
            user_id: self.caller.user_id(),
            announce: chat.announce,
            is_streamed: chat.request.is_streamed(),
            route,
            post: Post::Chat(Box::new(chat)),
            key,
            api_key: self.caller.api_key().map(|key| KeyInUse::of(key)),
            now: Timestamp::now(),
        };
        Ok((new, memory))
    }
}

async fn respond(
    state: &AppState,
    caller: Caller,
    form: Form,
    created: Created,
) -> Result<Response, ApiError> {
    let (prompt, answer, upstream, is_replayed) = match created {
        Created::Chunks { id, reader } => {
            return stream::respond(state, caller, id, form.wants_usage, reader).await;
        }
        Created::Answered {
            prompt,
            answer: Some(answer),
            upstream,
            is_replayed,
        } => (prompt, answer, upstream, is_replayed),
        // Another process has answered the call: its answer is stored.
        Created::Answered {
            prompt,
            answer: None,
            ..
        } => {
            let mut memory = state.memory.hold(Owner::user(prompt.user_id), READ_BYTES);
            let call = state
                .prompts
                .chat_call(prompt.user_id, prompt.id, &mut memory)
                .await?;
            let lacks_answer = || Error::internal("an answered chat call has no answer");
            let answer = call.texts.answer.ok_or_else(lacks_answer)?;
            (prompt, answer.into(), None, true)
        }
        Created::Streaming { .. } => {
            return Err(Error::internal("a chat call was answered like a prompt").into());
        }
    };
    // An answer that was paid for is sent even if the memory budget is exhausted.
    let owner = Owner::user(prompt.user_id);
    let memory = state.memory.hold(owner, answer.len());
    let mut response = if form.is_streamed {
        stream::replayed(prompt.id, form.wants_usage, answer, memory).await
    } else {
        let id = json!(chat_id(prompt.id)).to_string();
        let body = with_member(&answer, "id", id.as_bytes());
        let body = Body::from(reserved_bytes(body, memory));
        ([(CONTENT_TYPE, "application/json")], body).into_response()
    };
    if let Some(took) = upstream {
        response.extensions_mut().insert(UpstreamTime(took));
    }
    if is_replayed {
        response
            .headers_mut()
            .insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}
