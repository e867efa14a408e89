//! The streamed answer to a chat call: the upstream's chunks as server-sent events.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::json;

use super::chat_id;
use super::errors::OpenAiErrorResponse;
use crate::api::content_negotiation::EVENT_STREAM;
use crate::api::error::ApiError;
use crate::api::json_response::reserved_bytes;
use crate::api::state::AppState;
use crate::domain::PromptId;
use crate::error::{Error, Unauthenticated};
use crate::memory_budget::Reservation;
use crate::services::accounts::Caller;
use crate::services::prompts::chat::{
    ChatEvent, ChatReader, JsonValue, ObjectWriter, by_length, is_usage_chunk, with_member,
};

/// The last event of every stream that ends well.
const DONE: &[u8] = b"data: [DONE]\n\n";

/// How the chunks of one stream are written.
struct Writer {
    /// The id, as JSON.
    id: Vec<u8>,
    wants_usage: bool,
}

impl Writer {
    fn new(id: PromptId, wants_usage: bool) -> Self {
        Self {
            id: json!(chat_id(id)).to_string().into_bytes(),
            wants_usage,
        }
    }

    /// The event of a chunk; `None` if the client has not asked for this one.
    fn chunk(&self, chunk: &[u8]) -> Option<Bytes> {
        if !self.wants_usage && is_usage_chunk(chunk) {
            return None;
        }
        Some(event(&with_member(chunk, "id", &self.id)))
    }
}

/// What ends an event.
const EVENT_END: &[u8] = b"\n\n";

/// One event. JSON in one line is one line of data.
fn event(json: &[u8]) -> Bytes {
    [b"data: ", json, EVENT_END].concat().into()
}

/// The event of an error in the middle of a stream, which clients raise.
fn error_event(error: Error) -> Bytes {
    let (status, body) = ApiError::from(error).into_parts();
    event(
        json!(OpenAiErrorResponse::of(status, &body))
            .to_string()
            .as_bytes(),
    )
}

/// Waits for the beginning of an answer, then responds with its stream. It ends early, with the
/// event of an error, once the credential of `caller` is no longer valid: without one, clients take
/// what they have for the whole answer.
///
/// # Errors
/// The failure of a call that has failed before its first chunk.
pub async fn respond(
    state: &AppState,
    caller: Caller,
    id: PromptId,
    wants_usage: bool,
    mut reader: ChatReader,
) -> Result<Response, ApiError> {
    let first = match reader.next().await {
        Some(ChatEvent::Ended(Err(error))) => return Err(error.into()),
        first => first,
    };
    let accounts = Arc::clone(&state.accounts);
    let source = Source {
        first,
        reader,
        writer: Writer::new(id, wants_usage),
        heartbeat: state.server.stream_heartbeat,
        credential_end: Some(Box::pin(async move {
            accounts.credential_end(&caller).await.problem(&caller)
        })),
    };
    let events = futures_util::stream::unfold(source, Source::next);
    Ok(sse(Body::from_stream(events)))
}

fn sse(body: Body) -> Response {
    let headers = [
        (CONTENT_TYPE, EVENT_STREAM),
        // Tells a proxy that buffers responses not to buffer this one.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (StatusCode::OK, headers, body).into_response()
}

struct Source {
    first: Option<ChatEvent>,
    reader: ChatReader,
    writer: Writer,
    heartbeat: Duration,
    /// Why the credential is no longer valid, once it is not. `None` after that.
    credential_end: Option<Pin<Box<dyn Future<Output = Unauthenticated> + Send>>>,
}

impl Source {
    /// The next bytes and the source of those after them; `None` at the end.
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        loop {
            let credential_end = self.credential_end.as_mut()?;
            let event = match self.first.take() {
                Some(first) => Some(first),
                None => tokio::select! {
                    biased;
                    problem = credential_end => {
                        self.credential_end = None;
                        return Some((Ok(error_event(problem.into())), self));
                    }
                    event = tokio::time::timeout(self.heartbeat, self.reader.next()) => match event {
                        Ok(event) => event,
                        Err(_) => return Some((Ok(Bytes::from_static(b":\n\n")), self)),
                    },
                },
            };
            let bytes = match event? {
                ChatEvent::Chunk(chunk) => match self.writer.chunk(&chunk) {
                    Some(bytes) => bytes,
                    None => continue,
                },
                ChatEvent::Ended(Ok(())) => Bytes::from_static(DONE),
                ChatEvent::Ended(Err(error)) => error_event(error),
            };
            return Some((Ok(bytes), self));
        }
    }
}

/// A whole answer as a stream, for a client that repeats a request and asks for a stream this time.
/// `memory` accounts for it.
pub async fn replayed(
    id: PromptId,
    wants_usage: bool,
    answer: Bytes,
    memory: Reservation,
) -> Response {
    let writer = Writer::new(id, wants_usage);
    let body = by_length(answer.len(), move || {
        let mut body = Vec::new();
        for chunk in chunks_of(&answer) {
            let from = body.len();
            body.extend_from_slice(&writer.chunk(&chunk).unwrap_or_default());
            // Line ends between the members of a stored answer would end the event's line. There
            // are none inside its texts, which are valid JSON.
            let to = body.len().saturating_sub(EVENT_END.len()).max(from);
            for byte in &mut body[from..to] {
                if matches!(byte, b'\n' | b'\r') {
                    *byte = b' ';
                }
            }
        }
        body.extend_from_slice(DONE);
        body
    });
    sse(Body::from(reserved_bytes(body.await, memory)))
}

/// The members of an answer that every chunk has. The others, which may be long, come once.
const COMMON_MEMBERS: [&str; 5] = [
    "id",
    "created",
    "model",
    "service_tier",
    "system_fingerprint",
];

/// A whole answer as chunks: each choice in one, then the reasons for their ends, then the usage.
/// Their values are written as those of the answer are.
fn chunks_of(answer: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let answer = JsonValue::new(answer.trim_ascii());
    let common = answer.object(COMMON_MEMBERS).members;
    let [choices, usage] = answer.object(["choices", "usage"]).members;
    let choices = choices.unwrap_or(JsonValue::new(b"[]"));
    let mut is_first = true;
    let mut chunk = move |choices: &[u8], usage: Option<JsonValue<'_>>| {
        let mut chunk = ObjectWriter::default();
        for (name, value) in COMMON_MEMBERS.into_iter().zip(common) {
            if let Some(value) = value {
                chunk.member(name, value.bytes());
            }
        }
        if std::mem::take(&mut is_first) {
            let [a, b, c, d, e] = COMMON_MEMBERS;
            chunk.members_without(answer, &[a, b, c, d, e, "object", "choices", "usage"]);
        }
        chunk.member("object", b"\"chat.completion.chunk\"");
        chunk.member("choices", choices);
        if let Some(usage) = usage {
            chunk.member("usage", usage.bytes());
        }
        chunk.finish()
    };
    let texts = choices.items().map(choice_text);
    let ends = choices.items().map(choice_end);
    let parts = texts.chain(ends).map(|choice| (choice, None));
    let usage = usage.filter(|usage| usage.is_object());
    let last = usage.map(|usage| (b"[]".to_vec(), Some(usage)));
    parts
        .chain(last)
        .map(move |(choices, usage)| chunk(&choices, usage))
}

/// The list of one choice that has not ended, with its message as the delta.
fn choice_text(choice: JsonValue<'_>) -> Vec<u8> {
    let [message] = choice.object(["message"]).members;
    let delta = message.filter(|message| message.is_object());
    let delta = delta.map_or_else(|| b"{}".to_vec(), numbered_tool_calls);
    let mut text = ObjectWriter::default();
    text.members_without(choice, &["message", "delta", "finish_reason"]);
    text.member("delta", &delta);
    text.member("finish_reason", b"null");
    [b"[", &*text.finish(), b"]"].concat()
}

/// The list of one choice with the reason of its end.
fn choice_end(choice: JsonValue<'_>) -> Vec<u8> {
    let mut end = ObjectWriter::default();
    end.members_without(choice, &["message", "delta", "logprobs"]);
    end.member("delta", b"{}");
    [b"[", &*end.finish(), b"]"].concat()
}

/// The message. In a stream, each tool call has its place in the list.
fn numbered_tool_calls(message: JsonValue<'_>) -> Vec<u8> {
    let [calls] = message.object(["tool_calls"]).members;
    let Some(calls) = calls.filter(|calls| calls.is_array()) else {
        return message.bytes().to_vec();
    };
    let mut numbered = b"[".to_vec();
    for (place, call) in calls.items().enumerate() {
        if place > 0 {
            numbered.push(b',');
        }
        let place = place.to_string();
        numbered.extend_from_slice(&with_member(call.bytes(), "index", place.as_bytes()));
    }
    numbered.push(b']');
    with_member(message.bytes(), "tool_calls", &numbered)
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use serde_json::Value;

    use super::*;
    use crate::memory_budget::{MemoryBudget, Owner};

    #[test]
    fn a_chunk_keeps_its_bytes_but_for_the_id() {
        let writer = Writer::new(PromptId(7), false);
        let chunk = br#"{"id":"up-1", "n": 1.50,"choices":[{"index":0}]}"#;
        assert_eq!(
            writer.chunk(chunk).unwrap(),
            "data: {\"id\":\"chatcmpl-7\", \"n\": 1.50,\"choices\":[{\"index\":0}]}\n\n"
        );
    }

    #[test]
    fn the_usage_chunk_is_for_those_who_asked() {
        let chunk = br#"{"id":"up-1","choices":[],"usage":{"prompt_tokens":1}}"#;
        assert!(Writer::new(PromptId(7), false).chunk(chunk).is_none());
        assert!(Writer::new(PromptId(7), true).chunk(chunk).is_some());
    }

    #[test]
    fn a_whole_answer_is_streamed_in_chunks_that_clients_can_join() {
        let answer = json!({
            "id": "up-1", "object": "chat.completion", "model": "m", "created": 1,
            "choices": [{
                "index": 0, "finish_reason": "tool_calls",
                "message": { "role": "assistant", "content": null, "tool_calls": [{ "id": "t" }] },
            }],
            "usage": { "prompt_tokens": 1 },
        });
        let common =
            json!({ "id": "up-1", "object": "chat.completion.chunk", "model": "m", "created": 1 });
        let with = |name: &str, value: Value, more: Option<Value>| {
            let mut chunk = common.clone();
            chunk[name] = value;
            if let Some(usage) = more {
                chunk["usage"] = usage;
            }
            chunk
        };
        let delta = json!({ "role": "assistant", "content": null, "tool_calls": [{ "id": "t", "index": 0 }] });
        let answer = answer.to_string();
        let chunks = chunks_of(answer.as_bytes());
        let chunks: Vec<Value> = chunks
            .map(|json| serde_json::from_slice(&json).unwrap())
            .collect();
        assert_eq!(
            chunks,
            [
                with(
                    "choices",
                    json!([{ "index": 0, "finish_reason": null, "delta": delta }]),
                    None
                ),
                with(
                    "choices",
                    json!([{ "index": 0, "finish_reason": "tool_calls", "delta": {} }]),
                    None
                ),
                with("choices", json!([]), Some(json!({ "prompt_tokens": 1 }))),
            ]
        );
    }

    #[tokio::test]
    async fn a_replay_keeps_the_bytes_of_the_values_and_the_lines_of_the_events() {
        let answer = br#"{ "id": "up-1", "x": [1e400],
  "choices": [{"index": 0, "message": {"content": "a\ud83d",
    "tool_calls": [ {"id": "t"} ]}, "finish_reason": "stop"}], "usage": {"n": 0.10000000000000000001}}"#;
        let memory = MemoryBudget::new(1 << 20).hold(Owner::default(), 0);
        let replayed = replayed(PromptId(7), true, Bytes::from_static(answer), memory).await;
        let body = to_bytes(replayed.into_body(), usize::MAX).await.unwrap();
        let events = [
            r#"{"id":"chatcmpl-7","x":[1e400],"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content": "a\ud83d",     "tool_calls": [{"index":0,"id": "t"}]},"finish_reason":null}]}"#,
            r#"{"id":"chatcmpl-7","object":"chat.completion.chunk","choices":[{"index":0,"finish_reason":"stop","delta":{}}]}"#,
            r#"{"id":"chatcmpl-7","object":"chat.completion.chunk","choices":[],"usage":{"n": 0.10000000000000000001}}"#,
            "[DONE]",
        ];
        let expected: String = events
            .iter()
            .map(|json| format!("data: {json}\n\n"))
            .collect();
        assert_eq!(str::from_utf8(&body).unwrap(), expected);
    }
}
