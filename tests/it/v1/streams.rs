//! Streamed answers: each chunk at once and byte for byte, and an end that means stored.

use std::time::Duration;

use serde_json::{Value, json};

use super::{DONE, ask, id_in, joined, number, object, open, path, streamed, text_in, with};
use crate::support::{Gate, Reply, Upstream};
use crate::upstream::{held_stream, service, shown};

const MS: Duration = Duration::from_millis(1);

/// Two choices: a text, and two tool calls in pieces. With unusual spelling.
const CHUNKS: [&str; 9] = [
    r#"{"id":"up-1","object":"chat.completion.chunk","created":7,"model":"scripted-1","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#,
    r#"{"id":"up-1","object":"chat.completion.chunk","created":7,"model":"scripted-1","choices":[{"index":1,"delta":{"role":"assistant","content":null},"finish_reason":null}]}"#,
    r#"{ "id" : "up-1", "created": 7.0, "model":"scripted-1", "choices":[{"index":0,"delta":{"content":"Hi \u00e9"},"logprobs":null,"finish_reason":null}], "obfuscation":"xx" }"#,
    r#"{"id":"up-1","model":"scripted-1","choices":[{"index":1,"delta":{"tool_calls":[{"index":0,"id":"t-1","type":"function","function":{"name":"look","arguments":""}}]},"finish_reason":null}]}"#,
    r#"{"id":"up-1","model":"scripted-1","choices":[{"index":1,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"at\":"}}]}},{"index":0,"delta":{"content":" there"}}]}"#,
    r#"{"id":"up-1","model":"scripted-1","choices":[{"index":1,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"1}"}},{"index":1,"id":"t-2","type":"function","function":{"name":"wait","arguments":"{}"}}]}}]}"#,
    r#"{"id":"up-1","model":"scripted-1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#,
    r#"{"id":"up-1","model":"scripted-1","choices":[{"index":1,"delta":{},"finish_reason":"tool_calls"}]}"#,
    r#"{"id":"up-1","model":"scripted-1","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8}}"#,
];

#[tokio::test]
async fn each_chunk_comes_as_the_upstream_sent_it_but_for_its_id() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    for (wants_usage, chunks) in [(false, &CHUNKS[..8]), (true, &CHUNKS[..])] {
        upstream.plan(Reply::events(&CHUNKS));
        let options = json!({ "n": 2, "stream_options": { "include_usage": wants_usage } });
        let mut stream = open(&user, &with(streamed(ask("hello")), &options)).await;
        assert_eq!(stream.headers["x-accel-buffering"], "no");
        assert!(stream.headers.contains_key("openai-processing-ms"));
        let blocks = stream.rest_blocks().await;
        let id = id_in(&blocks[0]);
        let expected = chunks
            .iter()
            .map(|chunk| format!("data: {}\n\n", chunk.replace("up-1", &id)));
        let expected: Vec<_> = expected.chain([DONE.to_owned()]).collect();
        assert_eq!(blocks, expected);

        // What a client joins is what is stored.
        let stored = user.get(&path(&id)).send().await.json();
        let choices = joined(&blocks);
        assert_eq!(choices.len(), 2);
        assert_eq!(choices[&0]["message"]["content"], "Hi é there");
        assert_eq!(
            choices[&1]["message"]["tool_calls"][0]["function"]["arguments"],
            "{\"at\":1}"
        );
        for (index, choice) in choices {
            let stored = &stored["choices"][index as usize];
            assert_eq!(stored["finish_reason"], choice["finish_reason"]);
            for (member, value) in choice["message"].as_object().unwrap() {
                assert_eq!(stored["message"][member], *value, "{member}");
            }
        }
        assert_eq!(stored["usage"]["total_tokens"], 8);
        let shown = shown(&user, number(&id)).await;
        assert_eq!(shown["response"], "Hi é there");
        assert_eq!(
            shown["usage"],
            json!({ "prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8 })
        );
    }
}

#[tokio::test]
async fn no_chunk_waits_for_another_and_the_call_is_shown_once_it_is_answered() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let gates = [(); 3].map(|()| Gate::new());
    let mut reply = Reply::stream_head();
    for (gate, chunk) in gates.iter().zip(["", "one ", "two"]) {
        reply = reply.delta(chunk).wait(gate);
    }
    upstream.plan(reply.stop().usage().event("[DONE]").end());
    let mut stream = open(&user, &streamed(ask("hello"))).await;
    let mut id = String::new();
    for (gate, text) in gates.iter().zip(["", "one ", "two"]) {
        let block = stream.next_block().await.unwrap();
        assert_eq!(object(&block)["choices"][0]["delta"]["content"], text);
        id = id_in(&block);
        // The upstream has not sent the next one.
        assert_eq!(user.get(&path(&id)).send().await.status, 404);
        assert_eq!(shown(&user, number(&id)).await["status"], "running");
        gate.open();
    }
    while stream.next_block().await.unwrap() != DONE {}
    // At once.
    let stored = user.get(&path(&id)).send().await;
    assert_eq!(stored.json()["choices"][0]["message"]["content"], "one two");
    assert_eq!(user.similar("hello", 1).await, [number(&id)]);
    assert_eq!(stream.next_block().await, None);
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_an_error_and_a_failed_prompt() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |config| {
        config.upstream.as_mut().unwrap().token_timeout = 200 * MS;
    })
    .await;
    let began = || Reply::stream_head().delta("one ");
    let error = r#"{"error": {"message": "upstream-secret-words", "code": "x"}}"#;
    for (name, code, reply) in [
        ("closed", "upstream_failed", began().close()),
        ("reset", "upstream_failed", began().reset()),
        ("an error", "upstream_failed", began().event(error).end()),
        ("no end", "upstream_failed", began().end()),
        ("silence", "upstream_timeout", began().hang()),
    ] {
        upstream.plan(reply);
        let blocks = open(&user, &streamed(ask(name))).await.rest_blocks().await;
        assert_eq!(blocks.len(), 2, "{name}: {blocks:?}");
        assert_eq!(text_in(&blocks[..1]), "one ", "{name}");
        let error = object(&blocks[1]);
        assert_eq!(error.as_object().unwrap().len(), 1, "{name}: {error}");
        assert_eq!(error["error"]["code"], code, "{name}");
        assert_eq!(error["error"]["type"], "server_error", "{name}");
        assert_eq!(error["error"]["param"], Value::Null, "{name}");
        assert!(!blocks[1].contains("upstream-secret-words"), "{name}");
        let id = id_in(&blocks[0]);
        let failed = shown(&user, number(&id)).await;
        assert_eq!(failed["status"], "failed", "{name}");
        assert_eq!(failed["error"], code, "{name}");
        assert_eq!(user.get(&path(&id)).send().await.status, 404, "{name}");
    }
    assert!(user.similar("silence", 9).await.is_empty());
}

#[tokio::test]
async fn a_silent_stream_has_heartbeats() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |config| {
        config.server.stream_heartbeat = 20 * MS;
    })
    .await;
    let gate = Gate::new();
    upstream.plan(held_stream(&gate));
    let mut stream = open(&user, &streamed(ask("hello"))).await;
    for text in ["one ", "two "] {
        assert_eq!(text_in(&[stream.next_block().await.unwrap()]), text);
    }
    stream.wait_for_comment().await;
    stream.wait_for_comment().await;
    gate.open();
    let rest = stream.rest_blocks().await;
    assert_eq!(text_in(&rest), "three");
    assert_eq!(rest.last().unwrap(), DONE);
}

#[tokio::test]
async fn an_upstream_that_does_not_stream_gives_a_stream_of_one_chunk() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    upstream.plan(Reply::answer("all at once"));
    let mut stream = open(&user, &streamed(ask("hello"))).await;
    let blocks = stream.rest_blocks().await;
    assert_eq!(text_in(&blocks), "all at once");
    assert_eq!(joined(&blocks)[&0]["finish_reason"], "stop");
    let first = object(&blocks[0]);
    assert_eq!(first["object"], "chat.completion.chunk");
}

#[tokio::test]
async fn a_stream_ends_soon_after_its_key_was_revoked() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let key = user.api_key("a program").await;
    let gate = Gate::new();
    upstream.plan(held_stream(&gate));
    let post = key.client.post(super::CHAT);
    let mut stream = post.json(&streamed(ask("hello"))).open().await;
    assert_eq!(stream.status, 200);
    let id = id_in(&stream.next_block().await.unwrap());
    assert_eq!(user.delete(&key.path()).send().await.status, 204);
    // The upstream is still writing. A client must not take what it has for the whole answer.
    let rest = stream.rest_blocks().await;
    let (last, pieces) = rest.split_last().unwrap();
    assert_eq!(text_in(pieces), "two ");
    assert_eq!(object(last)["error"]["code"], "invalid_api_key");
    gate.open();
    eventually!(user.get(&path(&id)).send().await.status == 200);
}
