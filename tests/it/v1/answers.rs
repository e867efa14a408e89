//! Whole answers: what goes to the upstream and what comes back, byte for byte.

use prompt_service::config::{Config, ServedModels};
use serde_json::{Value, json};

use super::{CHAT, answered, ask, id_of, number, path, with};
use crate::support::{Reply, Upstream};
use crate::upstream::{service, shown};

/// An answer with unusual spelling and unknown members.
const ANSWER: &str = r#"{ "id": "up-1",  "object":"chat.completion", "model":"scripted-1", "created": 1.7e9,
  "x_unknown": {"a": [1, 2.50, "\u00e9"]},
  "choices":[{"index":0,"finish_reason":"stop","logprobs":{"content":[]},"message":{"role":"assistant","content":"Hi \ud83e\udd80","refusal":null,"reasoning":"hm"}}],
  "usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8,"completion_tokens_details":{"reasoning_tokens":2}} }"#;

fn reply(body: &str) -> Reply {
    Reply::of(200, "application/json", &[], body)
}

/// Makes `fast` another name of the upstream's model.
fn with_alias(config: &mut Config) {
    let upstream = config.upstream.as_mut().unwrap();
    let ServedModels::Matching { aliases, .. } = &mut upstream.endpoints[0].models else {
        panic!("the first upstream serves by pattern");
    };
    aliases.insert("fast".to_owned(), "asked-1".to_owned());
}

#[tokio::test]
async fn an_answer_comes_as_the_upstream_sent_it_but_for_its_id() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    upstream.plan(reply(ANSWER));
    let answer = answered(&user, &ask("hello")).await;
    let id = id_of(&answer);
    assert_eq!(answer.text(), ANSWER.replace("up-1", &id));
    assert_eq!(answer.header("idempotent-replayed"), None);
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    let milliseconds = answer.header("openai-processing-ms").unwrap();
    assert!(milliseconds.parse::<u64>().is_ok());
    for header in ["limit", "remaining", "reset"] {
        let header = format!("x-ratelimit-{header}-requests");
        assert!(answer.header(&header).is_some(), "{header}");
    }

    let shown = shown(&user, number(&id)).await;
    for (member, value) in [
        ("prompt", json!("hello")),
        ("response", json!("Hi 🦀")),
        ("status", json!("completed")),
        ("source", json!("v1")),
        ("model", json!("scripted-1")),
        ("finish_reason", json!("stop")),
        (
            "usage",
            json!({ "prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8 }),
        ),
    ] {
        assert_eq!(shown[member], value, "{member}");
    }
    assert_eq!(user.similar("hello", 1).await, [number(&id)]);
    let stored = user.get(&path(&id)).send().await.json();
    for (member, value) in answer.json().as_object().unwrap() {
        assert_eq!(stored[member], *value, "{member}");
    }
}

#[tokio::test]
async fn the_upstream_gets_the_request_as_the_client_sent_it() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, with_alias).await;
    let request = r#"{ "model" : "asked-1", "n": 2, "temperature": 0.70, "x_unknown": {"deep": [null, 1e2]},
      "messages":[{"role":"developer","content":"Be \u0062rief."},{"role":"user","content":[{"type":"text","text":"What is this?"},
      {"type":"image_url","image_url":{"url":"https://example.org/a.png","detail":"low"}}]}],
      "tools":[{"type":"function","function":{"name":"look","parameters":{"type":"object","properties":{}},"strict":true}}],
      "tool_choice":"auto","logprobs":true,"top_logprobs":3,"response_format":{"type":"json_object"},
      "metadata":{"topic":"demo"},"reasoning_effort":"low","stream":false }"#;
    let calls = json!([{ "id": "t-1", "type": "function", "function": { "name": "look", "arguments": "{}" } }]);
    let choice = |index: u64| {
        json!({ "index": index, "finish_reason": "tool_calls",
                "message": { "role": "assistant", "content": null, "tool_calls": calls } })
    };
    let answer = json!({ "id": "up-1", "object": "chat.completion", "model": "scripted-1", "created": 7,
                         "choices": [choice(0), choice(1)] });
    for (name, replaced) in [("asked-1", "asked-1"), ("fast", "asked-1")] {
        upstream.plan(Reply::json(&answer));
        let sent = request.replace("asked-1", name);
        let post = user.post(CHAT).body("application/json", sent.clone());
        let told = post.send().await;
        assert_eq!(told.status, 200, "{told:?}");
        let received = upstream.requests().pop().unwrap();
        assert_eq!(received.bytes, sent.replace(name, replaced));
        assert_eq!(received.line, "POST /v1/chat/completions HTTP/1.1");
        assert_eq!(received.header("authorization"), Some("Bearer sk-primary"));
        let values = received.headers.iter().map(|(_, value)| value);
        assert!(!values.into_iter().any(|value| value.contains(&user.access)));
        assert_eq!(told.json()["choices"], answer["choices"]);

        let shown = shown(&user, number(&id_of(&told))).await;
        assert_eq!(shown["prompt"], "What is this?");
        assert_eq!(shown["response"], "");
        assert_eq!(shown["finish_reason"], "tool_calls");
        assert_eq!(shown["usage"], Value::Null);
    }
}

#[tokio::test]
async fn a_streamed_request_asks_for_the_usage_and_is_otherwise_as_it_came() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, with_alias).await;
    let plain = r#"{"model":"fast", "messages":[{"role":"user","content":"hi"}],"stream":true}"#;
    let renamed = plain.replace("fast", "asked-1");
    let options = r#","stream":true,"stream_options":{"x": 1,"include_usage": false}}"#;
    let with_options = plain.replace(r#","stream":true}"#, options);
    for (sent, received) in [
        (
            plain.to_owned(),
            renamed.replacen('{', r#"{"stream_options":{"include_usage":true},"#, 1),
        ),
        (
            with_options.clone(),
            with_options
                .replace("fast", "asked-1")
                .replace("false", "true"),
        ),
        (
            with_options.replace("false", "true"),
            with_options
                .replace("fast", "asked-1")
                .replace("false", "true"),
        ),
    ] {
        let post = user.post(CHAT).body("application/json", sent).send().await;
        assert_eq!(post.status, 200, "{post:?}");
        assert_eq!(upstream.requests().pop().unwrap().bytes, received);
    }
}

#[tokio::test]
async fn a_call_without_a_text_of_the_user_is_answered_and_listed() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let messages = json!([{ "role": "system", "content": "Say something." }]);
    let request = with(ask(""), &json!({ "messages": messages }));
    let id = id_of(&answered(&user, &request).await);
    assert_eq!(shown(&user, number(&id)).await["prompt"], "");
    let stored = user.get(&format!("{}/messages", path(&id))).send().await;
    assert_eq!(stored.json()["data"][0]["content"], "Say something.");
    let listed = user.all_prompts().await;
    assert_eq!(listed.len(), 1);
}
