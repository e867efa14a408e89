//! How stored chat calls, and lists of them and of messages, are written: with the bytes of their
//! values.

use axum::http::StatusCode;
use axum::response::Response;
use serde_json::json;

use super::chat_id;
use crate::api::json_response::written_response;
use crate::domain::PromptId;
use crate::memory_budget::Reservation;
use crate::services::prompts::chat::{ChatCall, JsonValue, ObjectWriter, by_length};

/// What is written around the texts of a call or of a list at most, in bytes: ids, names of members
/// and nulls.
pub const AROUND_BYTES: usize = 1 << 10;
/// The members of an answer that a list shows of a call whose texts find no room, and their most
/// bytes.
const SHORT_MEMBERS: [&str; 5] = [
    "created",
    "model",
    "service_tier",
    "system_fingerprint",
    "usage",
];
const SHORT_MEMBER_BYTES: usize = 1 << 10;
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

/// Writes a list item by item.
pub struct ListWriter {
    json: Vec<u8>,
    first_id: Option<String>,
    last_id: Option<String>,
}

impl ListWriter {
    /// A list whose items have together at most so many bytes.
    pub fn new(bytes: usize) -> Self {
        let mut json = Vec::with_capacity(bytes + AROUND_BYTES);
        json.extend_from_slice(b"{\"object\":\"list\",\"data\":[");
        Self {
            json,
            first_id: None,
            last_id: None,
        }
    }

    /// Adds an item, which `write` writes after other bytes.
    pub fn push(&mut self, id: String, write: impl FnOnce(Vec<u8>) -> Vec<u8>) {
        if self.first_id.is_some() {
            self.json.push(b',');
        }
        self.json = write(std::mem::take(&mut self.json));
        self.first_id.get_or_insert_with(|| id.clone());
        self.last_id = Some(id);
    }

    /// The list. `has_more`: whether there are more items after it.
    pub fn finish(mut self, has_more: bool) -> Vec<u8> {
        let (first, last) = (json!(self.first_id), json!(self.last_id));
        let end = format!("],\"first_id\":{first},\"last_id\":{last},\"has_more\":{has_more}}}");
        self.json.extend_from_slice(end.as_bytes());
        self.json
    }
}

/// What OpenAI shows of a stored call: JSON objects.
pub struct ShownCall {
    /// Its prompt.
    pub id: PromptId,
    answer: String,
    /// The settings.
    request: String,
    /// The labels.
    pub metadata: String,
}

impl ShownCall {
    /// Drops the texts that are not shown.
    pub fn of(call: ChatCall) -> Self {
        Self {
            id: call.prompt.id,
            answer: call.texts.answer.unwrap_or_else(|| "{}".to_owned()),
            request: call.texts.request,
            metadata: call.texts.metadata,
        }
    }

    /// The most bytes of its JSON; its texts have no more.
    pub fn bytes(&self) -> usize {
        self.answer.len() + self.request.len() + self.metadata.len() + AROUND_BYTES
    }

    /// Leaves the choices and the settings out.
    pub fn shorten(&mut self) {
        let mut answer = ObjectWriter::default();
        answer.member("choices", b"[]");
        let members = object(&self.answer).object(SHORT_MEMBERS).members;
        for (name, value) in SHORT_MEMBERS.into_iter().zip(members) {
            if let Some(value) = value.filter(|value| value.bytes().len() <= SHORT_MEMBER_BYTES) {
                answer.member(name, value.bytes());
            }
        }
        self.answer = String::from_utf8_lossy(&answer.finish()).into_owned();
        self.request = "{}".to_owned();
    }

    /// Writes it as OpenAI shows it, after other bytes. Its values are written as they came.
    pub fn write(&self, json: Vec<u8>) -> Vec<u8> {
        let (answer, request) = (object(&self.answer), object(&self.request));
        let mut shown = ObjectWriter::after(json);
        shown.member("id", json!(chat_id(self.id)).to_string().as_bytes());
        shown.member("object", b"\"chat.completion\"");
        shown.member("metadata", self.metadata.as_bytes());
        shown.members_without(answer, &["id", "object", "metadata"]);
        let (of_answer, of_request) = (answer.object(SHOWN_MEMBERS), request.object(SHOWN_MEMBERS));
        let settings = of_answer.members.into_iter().zip(of_request.members);
        for (name, (of_answer, of_request)) in SHOWN_MEMBERS.into_iter().zip(settings) {
            // The answer's own members come first.
            if of_answer.is_none() {
                shown.member(name, of_request.map_or(b"null", JsonValue::bytes));
            }
        }
        shown.finish()
    }

    /// The response that shows it. `memory` accounts for it and for its JSON.
    pub async fn respond(self, memory: Reservation) -> Response {
        let bytes = self.bytes();
        let json = by_length(bytes, move || self.write(Vec::with_capacity(bytes)));
        written_response(StatusCode::OK, json.await, memory)
    }
}

/// A stored object.
fn object(json: &str) -> JsonValue<'_> {
    JsonValue::new(json.as_bytes().trim_ascii())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn call() -> ShownCall {
        ShownCall {
            id: PromptId(7),
            answer: r#" {"id":"up","object":"x","created": 1,"choices": ["\ud83d", 1e400],"seed":null} "#
                .to_owned(),
            request: r#"{"seed":1,"temperature":0.50000000000000000000001,"other":2}"#.to_owned(),
            metadata: r#"{"a":"b"}"#.to_owned(),
        }
    }

    #[test]
    fn a_call_is_shown_with_the_bytes_of_its_answer_and_settings() {
        let call = call();
        let json = call.write(Vec::with_capacity(call.bytes()));
        assert_eq!(json.capacity(), call.bytes());
        let expected = concat!(
            r#"{"id":"chatcmpl-7","object":"chat.completion","metadata":{"a":"b"},"created":1,"#,
            r#""choices":["\ud83d", 1e400],"seed":null,"tool_choice":null,"top_p":null,"#,
            r#""temperature":0.50000000000000000000001,"presence_penalty":null,"#,
            r#""frequency_penalty":null,"tools":null,"response_format":null,"user":null}"#,
        );
        assert_eq!(str::from_utf8(&json).unwrap(), expected);
    }

    #[test]
    fn a_shortened_call_has_no_choices_and_settings() {
        let mut call = call();
        call.shorten();
        let shown: Value = serde_json::from_slice(&call.write(Vec::new())).unwrap();
        assert_eq!(shown["choices"], json!([]));
        assert_eq!(shown["created"], 1);
        assert_eq!(shown["metadata"], json!({ "a": "b" }));
        assert_eq!(shown["temperature"], Value::Null);
    }
}
