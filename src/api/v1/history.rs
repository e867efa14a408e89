//! Stored chat completions, under OpenAI's own names.

use std::collections::BTreeMap;

use axum::extract::{FromRequestParts, Path, Request, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::{IntoParams, ToSchema};

use super::errors::OpenAiErrorResponse;
use super::{chat_id, parse_chat_id};
use crate::api::authenticate::{Permitted, ReadScope, WriteScope};
use crate::api::error::ApiError;
use crate::api::extract::{Query, RequestOwner, read_json};
use crate::api::json_response::json_response;
use crate::api::state::AppState;
use crate::domain::PromptId;
use crate::error::Error;
use crate::memory_budget::{Owner, Reservation};
use crate::services::accounts::Caller;
use crate::services::prompts::READ_BYTES;
use crate::services::prompts::chat::{ChatCall, ChatFilter};

/// The most bytes of texts on a page, unless its first call alone has more.
const PAGE_BYTES: usize = 1 << 20;
/// The most bytes of a body with labels: 16 of 576 characters, each written with six bytes.
const LABELS_BYTES: usize = 64 << 10;
/// The members of a request that OpenAI shows beside a stored answer; null where the request has
/// none.
const SHOWN_MEMBERS: [&str; 9] = [
    "tool_choice",
    "seed",
    "top_p",
    "temperature",
    "presence_penalty",
    "frequency_penalty",
    "tools",
    "response_format",
    "user",
];

/// A stored answer, as OpenAI's `chat.completion` with the labels and settings of its request.
#[derive(Serialize, ToSchema)]
pub struct StoredChatCompletion {
    #[schema(example = "chatcmpl-1")]
    id: String,
    /// Always `chat.completion`.
    #[schema(example = "chat.completion")]
    object: String,
    #[schema(value_type = Object)]
    metadata: Value,
    #[schema(value_type = Vec<Object>)]
    choices: Value,
}

/// A page.
#[derive(Serialize, ToSchema)]
pub struct ListResponse {
    /// Always `list`.
    #[schema(example = "list")]
    object: &'static str,
    #[schema(value_type = Vec<Object>)]
    data: Vec<Value>,
    #[schema(required = true, example = "chatcmpl-1")]
    first_id: Option<String>,
    /// What the next page comes `after`.
    #[schema(required = true, example = "chatcmpl-20")]
    last_id: Option<String>,
    has_more: bool,
}

impl ListResponse {
    fn new(data: Vec<Value>, has_more: bool) -> Self {
        let id = |value: Option<&Value>| value?.get("id")?.as_str().map(str::to_owned);
        Self {
            object: "list",
            first_id: id(data.first()),
            last_id: id(data.last()),
            has_more,
            data,
        }
    }
}

/// A deleted chat completion.
#[derive(Serialize, ToSchema)]
pub struct DeletedChatCompletion {
    #[schema(example = "chatcmpl-1")]
    id: String,
    /// Always `chat.completion.deleted`.
    #[schema(example = "chat.completion.deleted")]
    object: &'static str,
    deleted: bool,
}

/// New labels.
#[derive(Deserialize, ToSchema)]
pub struct UpdateChatCompletionRequest {
    /// At most 16, with names of at most 64 characters and values of at most 512. They replace all
    /// that there were; null removes them.
    metadata: Option<BTreeMap<String, String>>,
}

/// Which page.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
struct ListParameters {
    /// The most calls of a page. A page ends earlier, with `has_more`, if its texts would be more
    /// than 1 MiB.
    #[param(value_type = Option<u32>, minimum = 0, maximum = 100, default = 20)]
    limit: usize,
    /// The `last_id` of the page before.
    #[param(value_type = Option<String>, example = "chatcmpl-20")]
    after: Option<PromptId>,
    /// By time: oldest or newest first.
    #[param(value_type = Option<String>, pattern = "^(asc|desc)$", default = "asc")]
    order: Order,
    /// The model that answered.
    model: Option<String>,
    /// Labels, each as `metadata[name]=value`.
    #[param(value_type = Option<Object>, style = DeepObject, explode)]
    metadata: Vec<(String, String)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Order {
    OldestFirst,
    NewestFirst,
}

impl Order {
    fn read(query: &Query) -> Result<Self, Error> {
        match query.get("order") {
            None | Some("asc") => Ok(Self::OldestFirst),
            Some("desc") => Ok(Self::NewestFirst),
            Some(_) => Err(Error::field("order", "Must be asc or desc.")),
        }
    }
}

fn read_limit(query: &Query) -> Result<usize, Error> {
    // OpenAI takes 0, too: a page without calls, which says whether there are any.
    let limit = query.integer("limit", 20, 0..=100);
    limit.map_err(|message| Error::field("limit", message))
}

impl ListParameters {
    fn read(query: &Query) -> Result<Self, Error> {
        let after = query
            .get("after")
            .map(|id| parse_chat_id(id).ok_or_else(|| Error::field("after", "Invalid id.")))
            .transpose()?;
        let label = |name: &str| {
            Some(
                name.strip_prefix("metadata[")?
                    .strip_suffix(']')?
                    .to_owned(),
            )
        };
        let pairs = query.pairs();
        Ok(Self {
            limit: read_limit(query)?,
            after,
            order: Order::read(query)?,
            model: query.get("model").map(str::to_owned),
            metadata: pairs
                .filter_map(|(name, value)| Some((label(name)?, value.to_owned())))
                .collect(),
        })
    }

    fn filter(self) -> ChatFilter {
        ChatFilter {
            model: self.model,
            metadata: self.metadata,
            after: self.after,
            is_newest_first: self.order == Order::NewestFirst,
        }
    }
}

/// The description of every 403.
const LACKS_SCOPE: &str = "The request came with an API key that may not be used for it.";

/// The description of a 404 for the path of one chat completion.
const NO_SUCH_COMPLETION: &str =
    "There is no such chat completion, it has no answer, or it is another user's.";

/// List chat completions
///
/// The caller's answered chat calls. A page may have fewer than `limit` although there are more:
/// only `has_more` says whether there are.
#[utoipa::path(
    get, path = "/v1/chat/completions", tag = "v1", operation_id = "list_chat_completions", security(("bearer" = []), ("api_key" = [])),
    params(ListParameters),
    responses(
        (status = 200, description = "One page.", body = ListResponse),
        (status = 400, description = "A parameter breaks its rules.", body = OpenAiErrorResponse),
        (status = 403, description = LACKS_SCOPE, body = OpenAiErrorResponse),
    ),
)]
pub async fn list_chat_completions(
    State(state): State<AppState>,
    Permitted { caller, .. }: Permitted<ReadScope>,
    RequestOwner(owner): RequestOwner,
    query: Query,
) -> Result<Response, ApiError> {
    let parameters = ListParameters::read(&query)?;
    let limit = parameters.limit;
    let user_id = caller.user_id();
    let (_turn, mut memory) = read_turn(&state, &caller, owner).await?;
    // The texts, and the JSON that is made of them.
    memory.try_resize(2 * PAGE_BYTES).map_err(Error::from)?;
    let page = state
        .prompts
        .chat_calls(user_id, parameters.filter(), limit, PAGE_BYTES)
        .await?;
    let bytes: usize = page.calls.iter().map(ChatCall::text_bytes).sum();
    memory.try_resize(3 * bytes).map_err(Error::from)?;
    let data = page.calls.iter().map(shown).collect();
    let body = ListResponse::new(data, page.has_more);
    Ok(json_response(StatusCode::OK, &body, memory))
}

/// Show a chat completion
///
/// One of the caller's answered chat calls.
#[utoipa::path(
    get, path = "/v1/chat/completions/{id}", tag = "v1", operation_id = "show_chat_completion", security(("bearer" = []), ("api_key" = [])),
    params(("id" = String, Path, description = "The id of the chat completion, `chatcmpl-` with the prompt's id.", example = "chatcmpl-1")),
    responses(
        (status = 200, description = "The stored answer.", body = StoredChatCompletion),
        (status = 403, description = LACKS_SCOPE, body = OpenAiErrorResponse),
        (status = 404, description = NO_SUCH_COMPLETION, body = OpenAiErrorResponse),
    ),
)]
pub async fn show_chat_completion(
    State(state): State<AppState>,
    Permitted { caller, .. }: Permitted<ReadScope>,
    RequestOwner(owner): RequestOwner,
    ChatId(id): ChatId,
) -> Result<Response, ApiError> {
    let (_turn, mut memory) = read_turn(&state, &caller, owner).await?;
    let call = read_call(&state, &caller, id, &mut memory).await?;
    Ok(json_response(StatusCode::OK, &shown(&call), memory))
}

/// Change a chat completion's labels
///
/// Replaces the `metadata` of one of the caller's answered chat calls.
#[utoipa::path(
    post, path = "/v1/chat/completions/{id}", tag = "v1", operation_id = "update_chat_completion", security(("bearer" = []), ("api_key" = [])),
    params(("id" = String, Path, description = "The id of the chat completion.", example = "chatcmpl-1")),
    request_body(content = UpdateChatCompletionRequest, content_type = "application/json"),
    responses(
        (status = 200, description = "The stored answer with its new labels.", body = StoredChatCompletion),
        (status = 403, description = LACKS_SCOPE, body = OpenAiErrorResponse),
        (status = 404, description = NO_SUCH_COMPLETION, body = OpenAiErrorResponse),
        (status = 413, description = "The body is larger than 64 KiB.", body = OpenAiErrorResponse),
    ),
)]
pub async fn update_chat_completion(
    State(state): State<AppState>,
    Permitted { caller, .. }: Permitted<WriteScope>,
    RequestOwner(owner): RequestOwner,
    ChatId(id): ChatId,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let mut of_body = state.memory.hold(owner, 0);
    let body = read_json(&parts.headers, body, LABELS_BYTES, &mut of_body).await?;
    let request: UpdateChatCompletionRequest = serde_json::from_slice(&body).map_err(|_| {
        let message = "The body must be an object whose metadata is an object of texts, or null.";
        ApiError::invalid_member(message, Some("metadata"))
    })?;
    let labels = request.metadata.unwrap_or_default();
    let user_id = caller.user_id();
    state.prompts.set_chat_labels(user_id, id, labels).await?;
    let (_turn, mut memory) = read_turn(&state, &caller, owner).await?;
    let call = read_call(&state, &caller, id, &mut memory).await?;
    Ok(json_response(StatusCode::OK, &shown(&call), memory))
}

/// Delete a chat completion
///
/// Removes one of the caller's answered chat calls, as deleting its prompt does; no search finds it
/// any more.
#[utoipa::path(
    delete, path = "/v1/chat/completions/{id}", tag = "v1", operation_id = "delete_chat_completion", security(("bearer" = []), ("api_key" = [])),
    params(("id" = String, Path, description = "The id of the chat completion.", example = "chatcmpl-1")),
    responses(
        (status = 200, description = "It is gone.", body = DeletedChatCompletion),
        (status = 403, description = LACKS_SCOPE, body = OpenAiErrorResponse),
        (status = 404, description = NO_SUCH_COMPLETION, body = OpenAiErrorResponse),
    ),
)]
pub async fn delete_chat_completion(
    State(state): State<AppState>,
    Permitted { caller, .. }: Permitted<WriteScope>,
    RequestOwner(owner): RequestOwner,
    ChatId(id): ChatId,
) -> Result<Response, ApiError> {
    let (turn, mut memory) = read_turn(&state, &caller, owner).await?;
    // A prompt of the other front door is not deleted here.
    read_call(&state, &caller, id, &mut memory).await?;
    drop(turn);
    state.prompts.delete(caller.user_id(), id).await?;
    let body = DeletedChatCompletion {
        id: chat_id(id),
        object: "chat.completion.deleted",
        deleted: true,
    };
    Ok(json_response(StatusCode::OK, &body, memory))
}

/// Which messages.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
struct MessageParameters {
    /// The most messages of a page.
    #[param(value_type = Option<u32>, minimum = 0, maximum = 100, default = 20)]
    limit: usize,
    /// The `last_id` of the page before.
    #[param(example = "chatcmpl-1-19")]
    after: Option<String>,
    /// In the order of the conversation, or the other way round.
    #[param(value_type = Option<String>, pattern = "^(asc|desc)$", default = "asc")]
    order: Order,
}

impl MessageParameters {
    fn read(query: &Query) -> Result<Self, Error> {
        Ok(Self {
            limit: read_limit(query)?,
            after: query.get("after").map(str::to_owned),
            order: Order::read(query)?,
        })
    }
}

/// List a chat completion's messages
///
/// The messages of the request, each with an `id` and otherwise as it came. Of images, audio and
/// files in them the media type, the size and the SHA-256 are kept.
#[utoipa::path(
    get, path = "/v1/chat/completions/{id}/messages", tag = "v1", operation_id = "list_chat_messages", security(("bearer" = []), ("api_key" = [])),
    params(("id" = String, Path, description = "The id of the chat completion.", example = "chatcmpl-1"), MessageParameters),
    responses(
        (status = 200, description = "One page.", body = ListResponse),
        (status = 400, description = "A parameter breaks its rules.", body = OpenAiErrorResponse),
        (status = 403, description = LACKS_SCOPE, body = OpenAiErrorResponse),
        (status = 404, description = NO_SUCH_COMPLETION, body = OpenAiErrorResponse),
    ),
)]
pub async fn list_chat_messages(
    State(state): State<AppState>,
    Permitted { caller, .. }: Permitted<ReadScope>,
    RequestOwner(owner): RequestOwner,
    ChatId(id): ChatId,
    query: Query,
) -> Result<Response, ApiError> {
    let MessageParameters {
        limit,
        after,
        order,
    } = MessageParameters::read(&query)?;
    let (_turn, mut memory) = read_turn(&state, &caller, owner).await?;
    let call = read_call(&state, &caller, id, &mut memory).await?;
    let messages: Vec<Value> = serde_json::from_str(&call.texts.messages).unwrap_or_default();
    let numbered = messages.into_iter().enumerate().map(|(place, message)| {
        let mut shown = Map::from_iter([("id".to_owned(), json!(message_id(id, place)))]);
        shown.extend(message.as_object().cloned().unwrap_or_default());
        Value::Object(shown)
    });
    let mut data: Vec<Value> = numbered.collect();
    if order == Order::NewestFirst {
        data.reverse();
    }
    if let Some(after) = after {
        let place = data.iter().position(|message| message["id"] == after);
        let place = place.ok_or_else(|| Error::field("after", "Invalid id."))?;
        data.drain(..=place);
    }
    let has_more = data.len() > limit;
    data.truncate(limit);
    let body = ListResponse::new(data, has_more);
    Ok(json_response(StatusCode::OK, &body, memory))
}

/// The id of a message.
fn message_id(id: PromptId, place: usize) -> String {
    format!("{}-{place}", chat_id(id))
}

/// The caller's turn to read, with memory for an ordinary call.
async fn read_turn(
    state: &AppState,
    caller: &Caller,
    owner: Owner,
) -> Result<
    (
        crate::fair_semaphore::FairPermit<crate::domain::UserId>,
        Reservation,
    ),
    Error,
> {
    let turn = state.reads.acquire(caller.user_id()).await?;
    Ok((turn, state.memory.reserve(owner, READ_BYTES)?))
}

/// Reads one call. `memory` accounts for its texts and for the JSON that is made of them.
async fn read_call(
    state: &AppState,
    caller: &Caller,
    id: PromptId,
    memory: &mut Reservation,
) -> Result<ChatCall, Error> {
    let call = state
        .prompts
        .chat_call(caller.user_id(), id, memory)
        .await?;
    memory.try_resize(3 * call.text_bytes())?;
    Ok(call)
}

/// A stored call as OpenAI shows it.
fn shown(call: &ChatCall) -> Value {
    let object =
        |json: &str| -> Map<String, Value> { serde_json::from_str(json).unwrap_or_default() };
    let mut shown = object(call.texts.answer.as_deref().unwrap_or("{}"));
    let mut request = object(&call.texts.request);
    for name in SHOWN_MEMBERS {
        // The answer's own members come first.
        if !shown.contains_key(name) {
            let value = request.remove(name).unwrap_or_default();
            shown.insert(name.to_owned(), value);
        }
    }
    shown.insert("id".to_owned(), json!(chat_id(call.prompt.id)));
    shown.insert("object".to_owned(), json!("chat.completion"));
    shown.insert(
        "metadata".to_owned(),
        Value::Object(object(&call.texts.metadata)),
    );
    Value::Object(shown)
}

/// The `{id}` of a chat completion's path. One that is none is that of no completion.
pub struct ChatId(PromptId);

impl FromRequestParts<AppState> for ChatId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let id = path.ok().and_then(|Path(id)| parse_chat_id(&id));
        id.map(Self).ok_or_else(|| Error::NotFound.into())
    }
}
