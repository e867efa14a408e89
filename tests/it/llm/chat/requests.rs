//! What is read of a chat request, and what an upstream gets of it.

use bytes::Bytes;
use prompt_service::config::{ModelPattern, ServedModels};
use prompt_service::llm::{ChatRequest, Client};
use serde_json::json;

use super::{Kept, answer_of, ask, parsed};
use crate::llm::{Watched, config};
use crate::support::{Reply, Upstream};

#[test]
fn the_members_that_the_service_needs_are_read() {
    let request = parsed(
        r#"{"model":"m","messages":[{"role":"user","content":"old"},
            {"role":"user","content":[{"type":"text","text":"one"},{"type":"image_url","image_url":{"url":"data:x"}},{"type":"text","text":"t\u0000wo"}]},
            {"role":"assistant","content":null,"tool_calls":[]},{"role":"tool","content":"7"}],
            "n":2,"stream":true,"stream_options":{"include_usage":true},"max_tokens":5,"max_completion_tokens":7.0,
            "store":false,"metadata":{"a":"b"}}"#,
    );
    assert_eq!(request.model(), "m");
    assert!(request.is_streamed() && request.wants_usage());
    assert_eq!(request.last_user_text(), "one\nt\u{fffd}wo");
    assert_eq!(
        (request.choices(), request.most_output_tokens()),
        (2, Some(7))
    );
    assert_eq!(request.member("store"), Some("false"));
    assert_eq!(request.member("metadata"), Some(r#"{"a":"b"}"#));
    assert_eq!(request.member("none"), None);
    assert!(
        request
            .messages()
            .starts_with(r#"[{"role":"user","content":"old"}"#)
    );
    let names: Vec<&str> = request.members().map(|(name, _)| name).collect();
    assert_eq!(names[..3], ["model", "messages", "n"]);

    let least = parsed(
        r#" {"model":"m","messages":[{}],"n":null,"stream":null,"stream_options":null,"max_tokens":null} "#,
    );
    assert!(!least.is_streamed() && !least.wants_usage());
    assert_eq!((least.choices(), least.most_output_tokens()), (1, None));
    assert_eq!(least.last_user_text(), "");
}

#[test]
fn a_request_that_cannot_be_used_names_its_member() {
    let problem = |body: &[u8]| ChatRequest::parse(Bytes::copy_from_slice(body)).unwrap_err();
    let deep = format!(r#"{{"model":"m","messages":[{{"a":{}"#, "[".repeat(200));
    let many: String = (0..300).map(|at| format!("\"a{at}\":1,")).collect();
    let many = format!(r#"{{{many}"model":"m","messages":[{{}}]}}"#);
    for (body, param) in [
        ("", None),
        ("[]", None),
        (r#"{"model":"m","messages":[{}]"#, None),
        (r#"{"model":"m","messages":[{}],"a":NaN}"#, None),
        (r#"{"model":"m","messages":[{}]} x"#, None),
        (r#"{"model":"m","model":"n","messages":[{}]}"#, None),
        (r#"{"model":"m","messages":[{}],"\u006dodel":"n"}"#, None),
        (deep.as_str(), None),
        (many.as_str(), None),
        (r#"{"messages":[{}]}"#, Some("model")),
        (r#"{"model":7,"messages":[{}]}"#, Some("model")),
        (r#"{"model":"","messages":[{}]}"#, Some("model")),
        (r#"{"model":"a\nb","messages":[{}]}"#, Some("model")),
        (r#"{"model":"m"}"#, Some("messages")),
        (r#"{"model":"m","messages":"x"}"#, Some("messages")),
        (r#"{"model":"m","messages":[]}"#, Some("messages")),
        (r#"{"model":"m","messages":["x"]}"#, Some("messages")),
        (
            r#"{"model":"m","messages":[{}],"stream":1}"#,
            Some("stream"),
        ),
        (
            r#"{"model":"m","messages":[{}],"stream_options":1}"#,
            Some("stream_options"),
        ),
        (
            r#"{"model":"m","messages":[{}],"stream_options":{"include_usage":"x"}}"#,
            Some("stream_options"),
        ),
        (r#"{"model":"m","messages":[{}],"n":0}"#, Some("n")),
        (r#"{"model":"m","messages":[{}],"n":129}"#, Some("n")),
        (r#"{"model":"m","messages":[{}],"n":1.5}"#, Some("n")),
        (
            r#"{"model":"m","messages":[{}],"max_tokens":-1}"#,
            Some("max_tokens"),
        ),
        (
            r#"{"model":"m","messages":[{}],"max_completion_tokens":"5"}"#,
            Some("max_completion_tokens"),
        ),
    ] {
        assert_eq!(problem(body.as_bytes()).param, param, "{body}");
    }
    assert_eq!(
        problem(b"{\"model\":\"\xff\",\"messages\":[{}]}").param,
        None
    );
}

#[tokio::test]
async fn a_request_passes_as_it_came() {
    let upstream = Upstream::start().await;
    let client = Watched::new(&config(&upstream));
    let whole = "{ \"model\" : \"x\", \"temperature\":1.0,\n\"messages\":[{\"role\":\"user\",\"content\":\"caf\\u00e9\"}], \"unknown\":{\"a\":1e3} }";
    ask(&client, whole).await.1.unwrap();
    assert_eq!(upstream.requests()[0].bytes, whole);

    for (sent, passed) in [
        (
            r#"{"model":"x","messages":[{}],"stream":true}"#,
            r#"{"stream_options":{"include_usage":true},"model":"x","messages":[{}],"stream":true}"#,
        ),
        (
            r#"{"model":"x","messages":[{}],"stream":true,"stream_options": {"a": 1, "include_usage":false} }"#,
            r#"{"model":"x","messages":[{}],"stream":true,"stream_options": {"a": 1, "include_usage":true} }"#,
        ),
        (
            r#"{"model":"x","messages":[{}],"stream_options":null,"stream":true}"#,
            r#"{"model":"x","messages":[{}],"stream_options":{"include_usage":true},"stream":true}"#,
        ),
    ] {
        ask(&client, sent).await.1.unwrap();
        assert_eq!(upstream.requests().last().unwrap().bytes, passed);
    }
}

#[tokio::test]
async fn an_alias_is_all_that_changes() {
    let upstream = Upstream::start().await;
    let mut config = config(&upstream);
    config.endpoints[0].models = ServedModels::Matching {
        patterns: vec![ModelPattern::parse("*").unwrap()],
        aliases: [("fast".to_owned(), "gpt-6 \"luna\"".to_owned())].into(),
    };
    ask(
        &Watched::new(&config),
        r#"{"n":1,"model": "fast" ,"messages":[{}]}"#,
    )
    .await
    .1
    .unwrap();
    assert_eq!(
        upstream.requests()[0].bytes,
        r#"{"n":1,"model": "gpt-6 \"luna\"" ,"messages":[{}]}"#
    );
}

#[tokio::test]
async fn a_whole_answer_stays_as_it_came() {
    let upstream = Upstream::start().await;
    let client = Watched::new(&config(&upstream));
    let body = "{ \"id\":\"c-1\", \"object\":\"chat.completion\", \"x\": 1.50,\n \"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":null,\
                \"tool_calls\":[{\"id\":\"t\",\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"{}\"}}]},\"finish_reason\":\"tool_calls\"}],\
                \"usage\":{\"prompt_tokens\":30,\"completion_tokens\":5,\"prompt_tokens_details\":{\"cached_tokens\":10}} }";
    upstream.plan(Reply::of(200, "application/json", &[], body));
    let (kept, answer) = ask(&client, r#"{"model":"x","messages":[{}]}"#).await;
    let answer = answer.unwrap();
    assert!(kept.chunks.is_empty() && kept.text.is_empty());
    assert_eq!(answer.answer.as_deref(), Some(body.as_bytes()));
    assert_eq!(
        (answer.text.as_str(), answer.finish_reason.as_deref()),
        ("", Some("tool_calls"))
    );
    let usage = answer.usage.unwrap();
    assert_eq!((usage.input, usage.cache_read, usage.output), (20, 10, 5));
    assert_eq!(answer.prompt_tokens, Some(30));
    assert_eq!(answer.model, "x");
    let [attempt] = &answer.attempts[..] else {
        panic!("{:?}", answer.attempts);
    };
    assert_eq!(
        (&*attempt.upstream, &*attempt.model, attempt.outcome),
        ("primary", "x", "completed")
    );
    assert_eq!(
        (attempt.usage, &attempt.answering_model),
        (Some(usage), &None)
    );
}

#[tokio::test]
async fn tool_calls_without_a_reason_are_an_answer() {
    let upstream = Upstream::start().await;
    let client = Watched::new(&config(&upstream));
    let call =
        json!({ "id": "t", "type": "function", "function": { "name": "f", "arguments": "{}" } });
    let message = json!({ "role": "assistant", "content": null, "tool_calls": [call] });
    upstream.plan(Reply::json(&json!({ "choices": [{ "message": message }] })));
    let answer = ask(&client, r#"{"model":"x","messages":[{}]}"#)
        .await
        .1
        .unwrap();
    assert_eq!(answer_of(&answer)["choices"][0]["message"], message);
}

#[tokio::test]
async fn the_mock_answers_chat_requests_of_every_model() {
    let client = Watched {
        client: Client::mock(std::sync::Arc::default()),
        metrics: std::sync::Arc::default(),
    };
    let body = r#"{"model":"any","n":2,"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Why so?"}]}"#;
    let answer = ask(&client, body).await.1.unwrap();
    let whole = answer_of(&answer);
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "mock");
    assert_eq!(
        whole["choices"][1]["message"]["content"],
        "[mock] You said: Why so?"
    );
    assert_eq!(
        whole["usage"],
        json!({ "prompt_tokens": 4, "completion_tokens": 10, "total_tokens": 14 })
    );

    let streamed = body.replace("\"n\":2", "\"n\":2,\"stream\":true");
    let (kept, answer) = ask(&client, &streamed).await;
    let Kept { text, chunks } = kept;
    assert_eq!(text, "[mock] You said: Why so?");
    let events: String = chunks
        .iter()
        .map(|chunk| format!("data: {chunk}\n\n"))
        .collect();
    let read = prompt_service::llm::read_chat_answer([events.as_bytes()], 1024, false, 2);
    let mut joined: serde_json::Value =
        serde_json::from_slice(&read.answer.unwrap().answer.unwrap()).unwrap();
    let mut whole = answer_of(&answer.unwrap());
    for answer in [&mut joined, &mut whole] {
        answer["created"] = json!(0);
    }
    assert_eq!(joined, whole);
}
