//! Calls with `store: false`: answered, announced, and nothing of their texts is kept.

use serde_json::{Value, json};

use super::{
    answered, ask, chat, id_in, id_of, listed, number, open, path, streamed, text_in, with,
};
use crate::support::{App, Reply, Upstream, User};
use crate::upstream::{outcome, service, socket};

fn unkept(text: &str) -> Value {
    let members = json!({ "store": false, "metadata": { "websocket": "true" } });
    with(ask(text), &members)
}

/// Asserts that no trace of a call is shown anywhere.
async fn assert_no_trace(app: &App, user: &User, id: &str) {
    assert!(user.all_prompts().await.is_empty());
    assert!(listed(user, "").await.is_empty());
    assert_eq!(user.get(&path(id)).send().await.status, 404);
    let prompt = format!("/api/prompts/{}", number(id));
    assert_eq!(user.get(&prompt).send().await.status, 404);
    assert!(user.similar("a private matter", 9).await.is_empty());
    eventually!(app.metric("calls_running").await == Some(0.0));
}

#[tokio::test]
async fn a_whole_answer_is_returned_and_announced_and_not_kept() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let mut socket = socket(&app, &user).await;
    let answer = answered(&user, &unkept("a private matter")).await;
    let id = id_of(&answer);
    assert_eq!(
        answer.json()["choices"][0]["message"]["content"],
        "Hello there"
    );
    assert_eq!(upstream.requests()[0].body["store"], json!(false));
    let event = outcome(&mut socket).await;
    assert_eq!(event["event"], "prompt_completed");
    assert_eq!(event["data"]["prompt"], "a private matter");
    assert_eq!(event["data"]["response"], "Hello there");
    assert_eq!(event["data"]["id"], number(&id));
    assert_no_trace(&app, &user, &id).await;
}

#[tokio::test]
async fn a_stream_is_sent_to_its_end_and_announced_and_not_kept() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let mut socket = socket(&app, &user).await;
    let mut stream = open(&user, &streamed(unkept("a private matter"))).await;
    let blocks = stream.rest_blocks().await;
    assert_eq!(text_in(&blocks), "Hello there");
    assert_eq!(blocks.last().unwrap(), super::DONE);
    let event = outcome(&mut socket).await;
    assert_eq!(event["event"], "prompt_completed");
    assert_eq!(event["data"]["response"], "Hello there");
    assert_no_trace(&app, &user, &id_in(&blocks[0])).await;
}

#[tokio::test]
async fn a_failed_call_leaves_nothing_either() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let mut socket = socket(&app, &user).await;
    upstream.plan(Reply::error(500, &[]));
    let failed = chat(&user, &unkept("a private matter")).send().await;
    assert_eq!(failed.status, 502);
    let event = outcome(&mut socket).await;
    assert_eq!(event["event"], "prompt_failed");
    assert!(!event.to_string().contains("private"));
    let id = format!("chatcmpl-{}", event["data"]["id"]);
    assert_no_trace(&app, &user, &id).await;
}
