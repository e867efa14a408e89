//! The service with an upstream that responds well, badly, slowly or not at all: what clients,
//! sockets and the store see of it.

mod calls;
mod details;
mod endings;
mod faults;
mod models;
mod outages;
mod repeats;
mod streams;

use std::time::{Duration, Instant};

use prompt_service::config::Config;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use crate::support::{App, Folder, Reply, Response, Socket, Stream, Upstream, User};
use crate::support::{spawn_app_in, text_of};

const MS: Duration = Duration::from_millis(1);

/// A service whose prompts go to `upstream`, with one user.
pub async fn service(upstream: &Upstream, adjust: impl FnOnce(&mut Config)) -> (App, User) {
    let app = restart(Folder::new(), upstream, adjust).await;
    let user = app.user("alice").await;
    (app, user)
}

/// The same on a folder that an earlier service used. Its users stay as they are.
pub async fn restart(folder: Folder, upstream: &Upstream, adjust: impl FnOnce(&mut Config)) -> App {
    spawn_app_in(folder, |config| {
        config.upstream = Some(crate::llm::config(upstream));
        adjust(config);
    })
    .await
}

/// The same user, at another service on the same data.
pub fn at(app: &App, user: User) -> User {
    User {
        client: app.client().with_bearer(&user.access),
        ..user
    }
}

/// A streamed answer whose last word waits.
pub fn held_stream(gate: &crate::support::Gate) -> Reply {
    let began = Reply::stream_head().delta("one ").delta("two ");
    began
        .wait(gate)
        .delta("three")
        .stop()
        .usage()
        .event("[DONE]")
        .end()
}

/// A whole answer that waits.
pub fn held_answer(gate: &crate::support::Gate) -> Reply {
    Reply::default().wait(gate).and(Reply::answer("at last"))
}

/// Posts a prompt and reads the head of its stream.
async fn post(user: &User, body: &Value) -> Stream {
    let request = user
        .post("/api/prompts")
        .header("accept", "text/event-stream");
    request.json(body).open().await
}

/// Posts a prompt in a task. Aborting the task is a client that hangs up.
fn posting(user: &User, key: Option<&str>, body: &Value) -> JoinHandle<Response> {
    let mut request = user.post("/api/prompts");
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    TaskTracker::new().spawn(request.json(body).send())
}

/// Posts a prompt with a key.
async fn post_with(user: &User, key: &str, body: &Value) -> Response {
    posting(user, Some(key), body).await.unwrap()
}

/// Reads a stream from its start until `text` has come. Returns the prompt's id and the id of the
/// last event.
async fn read_until(stream: &mut Stream, text: &str) -> (i64, String) {
    let started = stream.next().await.unwrap();
    assert_eq!(started.name, "started");
    let (mut events, mut last) = (Vec::new(), started.id);
    while text_of(&events) != text {
        let event = stream.next().await.unwrap();
        assert_eq!(event.name, "delta");
        last.clone_from(&event.id);
        events.push(event);
        assert!(text.starts_with(&text_of(&events)));
    }
    (started.data["id"].as_i64().unwrap(), last)
}

/// A prompt as it is shown.
pub async fn shown(user: &User, id: i64) -> Value {
    let answer = user.get(&format!("/api/prompts/{id}")).send().await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// A socket of the user's, greeted.
pub async fn socket(app: &App, user: &User) -> Socket {
    let bearer = format!("Bearer {}", user.access);
    let mut socket = app
        .socket("/ws/prompts/", &[("authorization", &bearer)])
        .await
        .unwrap();
    socket.next_json().await;
    socket
}

/// The next event of a socket that is not a piece of text.
pub async fn outcome(socket: &mut Socket) -> Value {
    loop {
        let event = socket.next_json().await;
        if event["event"] != "prompt.delta" {
            return event;
        }
    }
}

fn hello() -> Value {
    json!({ "prompt": "hello" })
}

/// Whether now is later than that.
fn passed(since: Instant, length: Duration) -> bool {
    since.elapsed() > length
}
