//! Answers of the upstream as server-sent events.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Serialize;
use tracing::Instrument;

use super::CreatedPromptResponse;
use crate::api::content_negotiation::EVENT_STREAM;
use crate::api::error::{ApiError, FailedPromptResponse};
use crate::api::state::{AppState, Lifecycle};
use crate::domain::PromptId;
use crate::error::FailedPrompt;
use crate::memory_budget::Reservation;
use crate::services::accounts::{Accounts, Caller, CredentialEnd};
use crate::services::prompts::stream::{StreamEnd, StreamEvent, StreamOffset, StreamReader};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// The id of a stream's last event.
const DONE: &str = "done";

/// A stream of what `reader` reads. It ends early, without an event, once the token of `caller` is
/// no longer valid.
pub fn respond(state: &AppState, caller: Caller, reader: StreamReader) -> Response {
    let source = Source {
        reader,
        heartbeat: state.server.stream_heartbeat,
        lifecycle: state.lifecycle.clone(),
        credential_end: Box::pin(credential_end(Arc::clone(&state.accounts), caller)),
    };
    let frames = futures_util::stream::unfold(source, Source::next);
    let headers = [
        (CONTENT_TYPE, EVENT_STREAM),
        // Tells a proxy that buffers responses not to buffer this one.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(frames)).into_response()
}

/// The source of a stream's bytes.
struct Source {
    reader: StreamReader,
    heartbeat: Duration,
    lifecycle: Lifecycle,
    credential_end: Pin<Box<dyn Future<Output = CredentialEnd> + Send>>,
}

impl Source {
    /// The next bytes and the source of those after them; `None` at the end.
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        let is_of_another = self.reader.is_of_another();
        let frame = tokio::select! {
            // First, or the end of the token would not be noticed during an answer without pauses.
            biased;
            end = &mut self.credential_end => {
                if end == CredentialEnd::Expired && !is_of_another {
                    self.wait_for_return();
                }
                return None;
            }
            frame = frame(&mut self.reader, self.heartbeat) => frame?,
            // An answer of another process can be read there, or here after the restart, so the
            // stop of this process does not wait for it.
            () = self.lifecycle.closing.cancelled(), if is_of_another => return None,
        };
        Some((Ok(frame), self))
    }

    /// Goes on reading without the client, which may return with a new token: an answer without a
    /// reader may be cancelled.
    fn wait_for_return(mut self) {
        let tasks = self.lifecycle.tasks.clone();
        let reading = async move { while self.reader.next().await.is_some() {} };
        tasks.spawn(reading.in_current_span());
    }
}

async fn credential_end(accounts: Arc<Accounts>, caller: Caller) -> CredentialEnd {
    accounts.credential_end(&caller).await
}

/// Streams a prompt's answer from the offset after the event that the client read last.
pub async fn resume(
    state: &AppState,
    caller: Caller,
    id: PromptId,
    headers: &HeaderMap,
    memory: Reservation,
) -> Result<Response, ApiError> {
    let last = headers.get(LAST_EVENT_ID).map(HeaderValue::as_bytes);
    let is_done = last == Some(DONE.as_bytes());
    let from = last
        .filter(|last| !last.is_empty() && !is_done)
        .map(parse_offset)
        .transpose()?;
    let user_id = caller.user_id();
    let reader = state.prompts.read(user_id, id, from, memory).await?;
    if is_done {
        // 204 tells a browser's EventSource not to reconnect.
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    Ok(respond(state, caller, reader))
}

fn parse_offset(id: &[u8]) -> Result<StreamOffset, ApiError> {
    std::str::from_utf8(id)
        .ok()
        .and_then(|id| id.parse().ok())
        .ok_or_else(|| ApiError::bad_request("The Last-Event-ID is none of this service's."))
}

/// The next bytes of the stream: an event, or a comment when there was none for a while. `None` at
/// its end.
async fn frame(reader: &mut StreamReader, heartbeat: Duration) -> Option<Bytes> {
    let Ok(event) = tokio::time::timeout(heartbeat, reader.next()).await else {
        return Some(Bytes::from_static(b":\n\n"));
    };
    let offset = reader.offset();
    Some(match event? {
        StreamEvent::Started(id) => encode("started", offset, &Started { id: id.0 }),
        StreamEvent::Delta(text) => encode("delta", offset, &Delta { text }),
        StreamEvent::Ended(StreamEnd::Completed(prompt)) => {
            match CreatedPromptResponse::of(&prompt) {
                Some(answer) => encode("completed", DONE, &answer),
                None => encode(
                    "failed",
                    DONE,
                    &FailedPromptResponse::from(&FailedPrompt::of(&prompt)),
                ),
            }
        }
        StreamEvent::Ended(StreamEnd::Failed(failed)) => {
            encode("failed", DONE, &FailedPromptResponse::from(&failed))
        }
        StreamEvent::Ended(StreamEnd::Deleted(id)) => {
            encode("failed", DONE, &FailedPromptResponse::deleted(id))
        }
    })
}

#[derive(Serialize)]
struct Started {
    id: i64,
}

#[derive(Serialize)]
struct Delta {
    text: String,
}

/// One event. JSON holds no bare line ends, so its data are one line.
fn encode(name: &str, id: impl std::fmt::Display, data: &impl Serialize) -> Bytes {
    let data = serde_json::to_string(data).expect("a struct of texts and numbers is JSON");
    format!("event: {name}\nid: {id}\ndata: {data}\n\n").into()
}
