//! OpenAI's protocol, as its clients see it.

mod answers;
mod bodies;
mod errors;
mod events;
mod failures;
mod hang_ups;
mod history;
mod idempotency;
mod models;
mod secrecy;
mod streams;
mod unkept;

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use crate::support::{Request, Response, Stream, User};

/// Where chat calls are posted and listed.
const CHAT: &str = "/v1/chat/completions";
const DONE: &str = "data: [DONE]\n\n";

/// A request with one message.
pub fn ask(text: &str) -> Value {
    json!({ "model": "asked-1", "messages": [{ "role": "user", "content": text }] })
}

/// The request with these members besides.
pub fn with(mut request: Value, members: &Value) -> Value {
    let members = members.as_object().unwrap().clone();
    request.as_object_mut().unwrap().extend(members);
    request
}

/// The request for a streamed answer.
pub fn streamed(request: Value) -> Value {
    with(request, &json!({ "stream": true }))
}

/// A post of a chat call.
pub fn chat(user: &User, request: &Value) -> Request {
    user.post(CHAT).json(request)
}

/// Posts a chat call that must be answered whole.
pub async fn answered(user: &User, request: &Value) -> Response {
    let answer = chat(user, request).send().await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer
}

/// Sends a request in a task. Aborting the task is a client that hangs up.
fn posting(request: Request) -> JoinHandle<Response> {
    TaskTracker::new().spawn(request.send())
}

/// Posts a chat call whose stream must begin.
async fn open(user: &User, request: &Value) -> Stream {
    let stream = chat(user, request).open().await;
    assert_eq!(stream.status, 200);
    assert_eq!(stream.headers["content-type"], "text/event-stream");
    stream
}

/// The id of an answer.
pub fn id_of(answer: &Response) -> String {
    answer.json()["id"].as_str().unwrap().to_owned()
}

/// The path of a chat call.
pub fn path(id: &str) -> String {
    format!("{CHAT}/{id}")
}

/// The prompt's id behind that of a chat call.
fn number(id: &str) -> i64 {
    id.strip_prefix("chatcmpl-").unwrap().parse().unwrap()
}

/// The JSON of one event.
fn object(block: &str) -> Value {
    let data = block.strip_prefix("data: ").unwrap();
    serde_json::from_str(data.trim_end()).unwrap()
}

/// The id in an event.
fn id_in(block: &str) -> String {
    object(block)["id"].as_str().unwrap().to_owned()
}

/// The first choice's text in some events.
fn text_in(blocks: &[String]) -> String {
    let blocks = blocks.iter().filter(|block| *block != DONE);
    let pieces = blocks.map(|block| {
        let text = &object(block)["choices"][0]["delta"]["content"];
        text.as_str().unwrap_or_default().to_owned()
    });
    pieces.collect()
}

/// The ids of a list.
async fn listed(user: &User, query: &str) -> Vec<String> {
    let page = user.get(&format!("{CHAT}{query}")).send().await;
    assert_eq!(page.status, 200, "{page:?}");
    let data = page.json()["data"].as_array().unwrap().clone();
    let id = |call: &Value| call["id"].as_str().unwrap().to_owned();
    data.iter().map(id).collect()
}

/// The message of each choice that a client makes of the events of a stream, as OpenAI's library
/// does it: texts are joined, tool calls by their index, other members are set.
fn joined(blocks: &[String]) -> BTreeMap<u64, Value> {
    assert_eq!(blocks.last().map(String::as_str), Some(DONE));
    let mut choices: BTreeMap<u64, Value> = BTreeMap::new();
    for block in &blocks[..blocks.len() - 1] {
        for choice in object(block)["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap();
            let whole = choices
                .entry(index)
                .or_insert_with(|| json!({ "message": {} }));
            join(&mut whole["message"], &choice["delta"]);
            if choice["finish_reason"].is_string() {
                whole["finish_reason"] = choice["finish_reason"].clone();
            }
        }
    }
    choices
}

fn join(whole: &mut Value, delta: &Value) {
    for (name, value) in delta.as_object().unwrap() {
        match (&mut whole[name], value) {
            (Value::String(text), Value::String(more)) if name != "type" => text.push_str(more),
            (Value::Object(_), Value::Object(_)) => join(&mut whole[name], value),
            (list, Value::Array(items)) => {
                for item in items {
                    let at = item["index"].as_u64().unwrap() as usize;
                    let mut item = item.clone();
                    item.as_object_mut().unwrap().remove("index");
                    if list.is_null() {
                        *list = json!([]);
                    }
                    let places = list.as_array_mut().unwrap();
                    if places.len() == at {
                        places.push(json!({}));
                    }
                    join(&mut places[at], &item);
                }
            }
            (place, value) => *place = value.clone(),
        }
    }
}
