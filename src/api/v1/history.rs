//! Stored chat completions, under OpenAI's own names.

use std::collections::BTreeMap;

use axum::extract::{FromRequestParts, Path, Request, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use super::errors::OpenAiErrorResponse;
use super::stored_call::{AROUND_BYTES, ListWriter, ShownCall};
use super::{chat_id, parse_chat_id};
use crate::api::authenticate::{Permitted, ReadScope, WriteScope};
use crate::api::error::ApiError;
use crate::api::extract::{Query, RequestOwner, read_json};
use crate::api::json_response::{json_response, written_response};
use crate::api::state::AppState;
use crate::domain::PromptId;
use crate::error::Error;
use crate::memory_budget::{Owner, Reservation};
use crate::services::accounts::Caller;
use crate::services::prompts::READ_BYTES;
use crate::services::prompts::chat::{
    ChatCall, ChatFilter, JsonValue, MOST_LABELS, ObjectWriter, by_length,
};

/// The most bytes of texts on a page, unless its first call alone has more.
const PAGE_BYTES: usize = 1 << 20;
/// The most bytes of a body with labels: 16 of 576 characters, each written with six bytes.
const LABELS_BYTES: usize = 64 << 10;
/// What is written around a message at most, in bytes: its id.
const AROUND_MESSAGE_BYTES: usize = 64;

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

/// PostgreSQL takes no text with NUL, and no stored text has one.
fn has_nul(text: &str) -> bool {
    text.contains('\0')
}

const NUL: &str = "Must not have NUL.";

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
        let model = query.get("model").map(str::to_owned);
        if model.as_deref().is_some_and(has_nul) {
            return Err(Error::field("model", NUL));
        }
        let labels = query.pairs().filter_map(|(name, value)| {
            let name = name.strip_prefix("metadata[")?.strip_suffix(']')?;
            Some((name, value))
        });
        let mut metadata = Vec::new();
        for (name, value) in labels {
            if has_nul(name) || has_nul(value) {
                return Err(Error::field("metadata", NUL));
            }
            if metadata.len() == MOST_LABELS {
                return Err(Error::field("metadata", "At most 16 labels."));
            }
            metadata.push((name.to_owned(), value.to_owned()));
        }
        Ok(Self {
            limit: read_limit(query)?,
            after,
            order: Order::read(query)?,
            model,
            metadata,
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
    let mut calls: Vec<ShownCall> = page.calls.into_iter().map(ShownCall::of).collect();
    let needed = |calls: &[ShownCall]| 2 * calls.iter().map(ShownCall::bytes).sum::<usize>();
    if memory.try_resize(needed(&calls)).is_err() {
        // Only a call that is alone on its page can be so large. The list must get past it.
        calls.iter_mut().for_each(ShownCall::shorten);
        memory.resize(needed(&calls));
    }
    let bytes = calls.iter().map(ShownCall::bytes).sum();
    let json = by_length(bytes, move || {
        let mut list = ListWriter::new(bytes);
        for call in calls {
            list.push(chat_id(call.id), |json| call.write(json));
        }
        list.finish(page.has_more)
    });
    Ok(written_response(StatusCode::OK, json.await, memory))
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
    let call = read_shown(&state, &caller, id, &mut memory).await?;
    Ok(call.respond(memory).await)
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
    // A large call finds room only if its user holds nothing else.
    drop((body, of_body));
    // Read first: once the labels are changed, nothing may refuse the response.
    let (_turn, mut memory) = read_turn(&state, &caller, owner).await?;
    let mut call = read_shown(&state, &caller, id, &mut memory).await?;
    let prompts = &state.prompts;
    call.metadata = prompts
        .set_chat_labels(caller.user_id(), id, labels)
        .await?;
    Ok(call.respond(memory).await)
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
    let (turn, memory) = read_turn(&state, &caller, owner).await?;
    let user_id = caller.user_id();
    state.prompts.delete_chat_call(user_id, id).await?;
    drop(turn);
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
/// The messages of the request, each with an `id` of this service and otherwise as it came. Of
/// images, audio and files in them the media type, the size and the SHA-256 are kept.
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
    let parameters = MessageParameters::read(&query)?;
    let (_turn, mut memory) = read_turn(&state, &caller, owner).await?;
    let call = read_call(&state, &caller, id, &mut memory).await?;
    let messages = call.texts.messages;
    drop((call.prompt, call.texts.request, call.texts.answer));
    let bytes = messages.len();
    let most = bytes + AROUND_BYTES + parameters.limit * AROUND_MESSAGE_BYTES;
    memory.try_resize_any(bytes + most).map_err(Error::from)?;
    let json = by_length(bytes, move || parameters.page(id, &messages)).await?;
    Ok(written_response(StatusCode::OK, json, memory))
}

impl MessageParameters {
    /// The page of a call's messages, a list of objects.
    fn page(&self, id: PromptId, messages: &str) -> Result<Vec<u8>, Error> {
        let messages = JsonValue::new(messages.as_bytes().trim_ascii());
        // Not collected: `{},` is much shorter than the place of a value.
        let count = messages.items().count();
        let place = |after: &str| {
            let (_, place) = after.rsplit_once('-')?;
            let place = place.parse().ok().filter(|place| *place < count)?;
            (message_id(id, place) == after).then_some(place)
        };
        let after = match &self.after {
            Some(after) => Some(place(after).ok_or_else(|| Error::field("after", "Invalid id."))?),
            None => None,
        };
        let (places, has_more) = match self.order {
            Order::OldestFirst => {
                let from = after.map_or(0, |place| place + 1);
                let to = count.min(from + self.limit);
                (from..to, to < count)
            }
            Order::NewestFirst => {
                let to = after.unwrap_or(count);
                let from = to.saturating_sub(self.limit);
                (from..to, from > 0)
            }
        };
        let page = messages.items().enumerate();
        let mut page: Vec<_> = page.skip(places.start).take(places.len()).collect();
        if self.order == Order::NewestFirst {
            page.reverse();
        }
        let item_bytes =
            |(_, message): &(usize, JsonValue<'_>)| message.bytes().len() + AROUND_MESSAGE_BYTES;
        let mut list = ListWriter::new(page.iter().map(item_bytes).sum());
        for (place, message) in page {
            let id = message_id(id, place);
            list.push(id.clone(), |json| {
                let mut shown = ObjectWriter::after(json);
                shown.member("id", json!(id).to_string().as_bytes());
                // One of the client's own would be in the way of the next page.
                shown.members_without(message, &["id"]);
                shown.finish()
            });
        }
        Ok(list.finish(has_more))
    }
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

/// Reads one call. `memory` accounts for its texts.
async fn read_call(
    state: &AppState,
    caller: &Caller,
    id: PromptId,
    memory: &mut Reservation,
) -> Result<ChatCall, Error> {
    let user_id = caller.user_id();
    state.prompts.chat_call(user_id, id, memory).await
}

/// Reads what is shown of one call. `memory` accounts for it and for the JSON that is made of it.
async fn read_shown(
    state: &AppState,
    caller: &Caller,
    id: PromptId,
    memory: &mut Reservation,
) -> Result<ShownCall, Error> {
    let call = ShownCall::of(read_call(state, caller, id, memory).await?);
    memory.try_resize_any(2 * call.bytes())?;
    Ok(call)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn page(messages: &str, limit: usize, after: Option<&str>, order: Order) -> Vec<Value> {
        let after = after.map(str::to_owned);
        let parameters = MessageParameters {
            limit,
            after,
            order,
        };
        let json = parameters.page(PromptId(7), messages).unwrap();
        assert!(json.capacity() <= messages.len() + AROUND_BYTES + limit * AROUND_MESSAGE_BYTES);
        let page: Value = serde_json::from_slice(&json).unwrap();
        let data = page["data"].as_array().unwrap().clone();
        assert_eq!(
            page["first_id"],
            data.first()
                .map_or(Value::Null, |first| first["id"].clone())
        );
        assert_eq!(
            page["last_id"],
            data.last().map_or(Value::Null, |last| last["id"].clone())
        );
        data
    }

    #[test]
    fn messages_of_one_id_are_paged_by_place() {
        let messages = r#"[{"id":"a","n":0},{"id":"a","n":1},{"n":2,"\u0069d":"a"}]"#;
        for (order, expected) in [
            (Order::OldestFirst, [0, 1, 2]),
            (Order::NewestFirst, [2, 1, 0]),
        ] {
            let (mut seen, mut after) = (Vec::new(), None);
            loop {
                let data = page(messages, 1, after.as_deref(), order);
                let Some(message) = data.first() else { break };
                assert_eq!(message["id"], format!("chatcmpl-7-{}", message["n"]));
                seen.push(message["n"].as_u64().unwrap());
                after = message["id"].as_str().map(str::to_owned);
            }
            assert_eq!(seen, expected);
        }
        for wrong in ["a", "", "chatcmpl-7-3", "chatcmpl-7-01", "chatcmpl-8-0"] {
            let parameters = MessageParameters {
                limit: 1,
                after: Some(wrong.to_owned()),
                order: Order::OldestFirst,
            };
            assert!(parameters.page(PromptId(7), messages).is_err(), "{wrong}");
        }
    }

    #[test]
    fn values_come_back_as_they_are_written() {
        let messages = r#"[{"content": "a\ud83d", "n": 1e400, "m":0.10000000000000000000001}]"#;
        let parameters = MessageParameters {
            limit: 20,
            after: None,
            order: Order::OldestFirst,
        };
        let json = parameters.page(PromptId(7), messages).unwrap();
        let expected = r#"{"object":"list","data":[{"id":"chatcmpl-7-0","content":"a\ud83d","n":1e400,"m":0.10000000000000000000001}],"first_id":"chatcmpl-7-0","last_id":"chatcmpl-7-0","has_more":false}"#;
        assert_eq!(str::from_utf8(&json).unwrap(), expected);
    }
}
