//! What a user's sockets learn of chat calls that ask for it.

use serde_json::json;

use super::{answered, ask, chat, id_in, id_of, number, open, streamed, with};
use crate::support::{Gate, Reply, Upstream};
use crate::upstream::{held_stream, outcome, service, shown, socket};

fn announced(text: &str) -> serde_json::Value {
    with(ask(text), &json!({ "metadata": { "websocket": "true" } }))
}

#[tokio::test]
async fn only_calls_that_ask_for_it_are_announced() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let mut socket = socket(&app, &user).await;
    answered(&user, &ask("quiet")).await;
    for labels in [
        json!({ "websocket": "false" }),
        json!({ "websocket": true }),
    ] {
        let request = with(ask("quiet"), &json!({ "metadata": labels }));
        answered(&user, &request).await;
        open(&user, &streamed(request)).await.rest_blocks().await;
    }
    let id = number(&id_of(&answered(&user, &announced("loud")).await));
    // The first event of all.
    let event = socket.next_json().await;
    assert_eq!(event["type"], "prompt.message");
    assert_eq!(event["event"], "prompt_completed");
    let shown = shown(&user, id).await;
    let members = ["id", "prompt", "response", "created_at", "model"];
    assert_eq!(event["data"].as_object().unwrap().len(), members.len());
    for member in members {
        assert_eq!(event["data"][member], shown[member], "{member}");
    }
    assert_eq!(event["data"]["prompt"], "loud");
}

#[tokio::test]
async fn the_text_of_a_stream_is_announced_while_it_comes() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let mut socket = socket(&app, &user).await;
    let gate = Gate::new();
    upstream.plan(held_stream(&gate));
    let mut stream = open(&user, &streamed(announced("hello"))).await;
    let id = number(&id_in(&stream.next_block().await.unwrap()));
    let mut text = String::new();
    let mut opened = Some(gate);
    loop {
        let event = socket.next_json().await;
        assert_eq!(event["data"]["id"], id);
        if event["event"] != "prompt.delta" {
            assert_eq!(event["event"], "prompt_completed");
            assert_eq!(event["data"]["response"], "one two three");
            break;
        }
        assert_eq!(event["data"]["offset"], text.len());
        text.push_str(event["data"]["text"].as_str().unwrap());
        if text == "one two " {
            opened.take();
        }
    }
    assert_eq!(text, "one two three");
    assert_eq!(stream.rest_blocks().await.last().unwrap(), super::DONE);
}

#[tokio::test]
async fn a_failure_is_announced() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let mut socket = socket(&app, &user).await;
    for (reply, request) in [
        (Reply::error(400, &[]), announced("hello")),
        (Reply::error(500, &[]), streamed(announced("hello"))),
        (
            Reply::stream_head().delta("one ").close(),
            streamed(announced("hello")),
        ),
    ] {
        upstream.plan(reply);
        chat(&user, &request).send().await;
        let event = outcome(&mut socket).await;
        assert_eq!(event["event"], "prompt_failed");
        assert_eq!(event["data"]["code"], "upstream_failed");
        assert!(!event.to_string().contains("upstream-secret-words"));
        let id = event["data"]["id"].as_i64().unwrap();
        assert_eq!(shown(&user, id).await["status"], "failed");
    }
}
