//! Idempotency keys of chat calls.

use serde_json::{Value, json};

use super::{ask, chat, id_in, id_of, joined, path, posting, streamed, with};
use crate::support::{Gate, Reply, Request, Upstream, User};
use crate::upstream::{held_answer, held_stream, service};

fn keyed(user: &User, key: &str, request: &Value) -> Request {
    chat(user, request).header("idempotency-key", key)
}

/// An answer with a tool call, whole.
fn answer() -> Value {
    let call = json!({ "id": "t-1", "type": "function", "function": { "name": "look", "arguments": "{\"at\":1}" } });
    let message = json!({ "role": "assistant", "content": "Hi", "tool_calls": [call, call] });
    json!({ "id": "up-1", "object": "chat.completion", "model": "scripted-1", "created": 7,
            "choices": [{ "index": 0, "finish_reason": "tool_calls", "message": message }],
            "usage": { "prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8 } })
}

#[tokio::test]
async fn a_repeated_request_gets_the_same_answer_whole_or_streamed() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    upstream.plan(Reply::json(&answer()));
    let first = keyed(&user, "k", &ask("hello")).send().await;
    assert_eq!(first.status, 200, "{first:?}");
    assert_eq!(first.header("idempotent-replayed"), None);
    let again = keyed(&user, "k", &ask("hello")).send().await;
    assert_eq!((again.status, &again.body), (200, &first.body));
    assert_eq!(again.header("idempotent-replayed"), Some("true"));

    for wants_usage in [false, true] {
        let options = json!({ "stream_options": { "include_usage": wants_usage } });
        let request = with(streamed(ask("hello")), &options);
        let mut stream = keyed(&user, "k", &request).open().await;
        assert_eq!(stream.status, 200);
        assert_eq!(stream.headers["idempotent-replayed"], "true");
        assert_eq!(stream.headers["content-type"], "text/event-stream");
        let blocks = stream.rest_blocks().await;
        let choice = &joined(&blocks)[&0];
        assert_eq!(choice["message"], answer()["choices"][0]["message"]);
        assert_eq!(choice["finish_reason"], "tool_calls");
        assert_eq!(id_in(&blocks[0]), id_of(&first));
        let usages = blocks.iter().filter(|block| block.contains("\"usage\":{"));
        assert_eq!(usages.count(), usize::from(wants_usage));
    }
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn a_stream_is_repeated_as_a_stream_and_whole() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let request = streamed(ask("hello"));
    let first = keyed(&user, "k", &request).open().await.rest_blocks().await;
    let again = keyed(&user, "k", &request).open().await.rest_blocks().await;
    assert_eq!(id_in(&first[0]), id_in(&again[0]));
    let (first, again) = (joined(&first), joined(&again));
    assert_eq!(first[&0]["finish_reason"], again[&0]["finish_reason"]);
    assert_eq!(again[&0]["message"]["content"], "Hello there");
    assert_eq!(first[&0]["message"]["content"], "Hello there");
    let whole = keyed(&user, "k", &ask("hello")).send().await;
    assert_eq!(whole.header("idempotent-replayed"), Some("true"));
    assert_eq!(whole.json()["object"], "chat.completion");
    assert_eq!(
        whole.json()["choices"][0]["message"]["content"],
        "Hello there"
    );
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn a_key_is_in_use_while_its_call_runs() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let gate = Gate::new();
    upstream.plan(held_answer(&gate)).plan(held_stream(&gate));
    let whole = posting(keyed(&user, "whole", &ask("hello")));
    eventually!(upstream.requests().len() == 1);
    let mut stream = keyed(&user, "stream", &streamed(ask("hello"))).open().await;
    stream.next_block().await.unwrap();
    for key in ["whole", "stream"] {
        for request in [ask("hello"), streamed(ask("hello"))] {
            let refused = keyed(&user, key, &request).send().await;
            assert_eq!(refused.status, 409, "{refused:?}");
            assert_eq!(refused.json()["error"]["code"], "idempotency_key_in_use");
            assert!(refused.header("retry-after-ms").is_some());
        }
    }
    gate.open();
    assert_eq!(whole.await.unwrap().status, 200);
    assert_eq!(stream.rest_blocks().await.last().unwrap(), super::DONE);
    assert_eq!(upstream.requests().len(), 2);
}

#[tokio::test]
async fn a_key_belongs_to_one_request_and_ends_with_its_call() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let first = keyed(&user, "k", &ask("hello")).send().await;
    for other in [
        ask("hello!"),
        with(ask("hello"), &json!({ "temperature": 1 })),
        with(
            ask("hello"),
            &json!({ "metadata": { "websocket": "true" } }),
        ),
    ] {
        let refused = keyed(&user, "k", &other).send().await;
        assert_eq!(refused.status, 422, "{refused:?}");
    }
    let prompt = user.post("/api/prompts").header("idempotency-key", "k");
    let refused = prompt.json(&json!({ "prompt": "hello" })).send().await;
    assert_eq!(refused.status, 422);
    let other = app.user("bob").await;
    let of_other = keyed(&other, "k", &ask("hello")).send().await;
    assert_eq!(of_other.header("idempotent-replayed"), None);
    let gone = user.delete(&path(&id_of(&first))).send().await;
    assert_eq!(gone.status, 200);
    let repeated = keyed(&user, "k", &ask("hello")).send().await;
    assert_eq!(repeated.status, 410, "{repeated:?}");

    // A failed call frees its key.
    upstream.plan(Reply::error(500, &[]));
    let failed = keyed(&user, "f", &ask("hello")).send().await;
    assert_eq!(failed.status, 502);
    let repeated = keyed(&user, "f", &ask("hello")).send().await;
    assert_eq!(repeated.status, 200);
    assert_eq!(repeated.header("idempotent-replayed"), None);
}

#[tokio::test]
async fn a_repeated_request_is_not_throttled() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |config| {
        config.v1_throttle = "1/h".parse().unwrap();
    })
    .await;
    let first = keyed(&user, "k", &ask("hello")).send().await;
    assert_eq!(first.status, 200, "{first:?}");
    let again = keyed(&user, "k", &ask("hello")).send().await;
    assert_eq!((again.status, &again.body), (200, &first.body));
    assert_eq!(keyed(&user, "l", &ask("hello")).send().await.status, 429);
}
