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
use serde_json::{Map, Value, json};

use super::chat_id;
use super::errors::OpenAiErrorResponse;
use crate::api::content_negotiation::EVENT_STREAM;
use crate::api::error::ApiError;
use crate::api::state::AppState;
use crate::domain::PromptId;
use crate::error::{Error, Unauthenticated};
use crate::services::accounts::Caller;
use crate::services::prompts::chat::{ChatEvent, ChatReader, is_usage_chunk, with_member};

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

/// One event. JSON in one line is one line of data.
fn event(json: &[u8]) -> Bytes {
    [b"data: ", json, b"\n\n"].concat().into()
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
pub fn replayed(id: PromptId, wants_usage: bool, answer: &[u8]) -> Response {
    let writer = Writer::new(id, wants_usage);
    let answer: Value = serde_json::from_slice(answer).unwrap_or_default();
    let chunks = chunks_of(&answer);
    let events = chunks
        .iter()
        .filter_map(|chunk| writer.chunk(chunk.to_string().as_bytes()));
    let body: Vec<u8> = events.flatten().chain(DONE.iter().copied()).collect();
    sse(Body::from(body))
}

/// A whole answer as chunks: each choice in one, then the reasons for their ends, then the usage.
fn chunks_of(answer: &Value) -> Vec<Value> {
    let mut common: Map<String, Value> = answer.as_object().cloned().unwrap_or_default();
    let choices = common.remove("choices").unwrap_or_default();
    let usage = common.remove("usage");
    common.insert("object".to_owned(), json!("chat.completion.chunk"));
    let chunk = |choices: Value| {
        let mut chunk = common.clone();
        chunk.insert("choices".to_owned(), choices);
        chunk
    };
    let (mut texts, mut ends) = (Vec::new(), Vec::new());
    for choice in choices.as_array().into_iter().flatten() {
        let mut end = choice.as_object().cloned().unwrap_or_default();
        let mut text = end.clone();
        let mut delta = end.remove("message").unwrap_or_else(|| json!({}));
        number_tool_calls(&mut delta);
        text.remove("message");
        text.insert("delta".to_owned(), delta);
        text.insert("finish_reason".to_owned(), Value::Null);
        end.insert("delta".to_owned(), json!({}));
        end.remove("logprobs");
        texts.push(Value::Object(chunk(json!([text]))));
        ends.push(Value::Object(chunk(json!([end]))));
    }
    let usage = usage.filter(Value::is_object).map(|usage| {
        let mut last = chunk(json!([]));
        last.insert("usage".to_owned(), usage);
        Value::Object(last)
    });
    texts.into_iter().chain(ends).chain(usage).collect()
}

/// In a stream, each tool call has its place in the list.
fn number_tool_calls(delta: &mut Value) {
    let calls = delta.get_mut("tool_calls").and_then(Value::as_array_mut);
    for (place, call) in calls.into_iter().flatten().enumerate() {
        if let Some(call) = call.as_object_mut() {
            call.insert("index".to_owned(), json!(place));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(
            chunks_of(&answer),
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
}
