//! Streamed answers to chat requests: each chunk passes at once and byte for byte.

use std::time::Duration;

use bytes::Bytes;
use prompt_service::domain::FailureCode;
use prompt_service::llm::{AnswerSink, AttemptLog, ChatRequest, Content, Question};
use serde_json::json;

use super::{answer_of, ask};
use crate::llm::{MS, USER, Watched, add_fallback, config, memory};
use crate::support::{Reply, Upstream};

const REQUEST: &str =
    r#"{"model":"x","messages":[{"role":"user","content":"Why?"}],"stream":true}"#;
const ROLE: &str =
    r#"{"id":"c", "choices":[ {"index":0,"delta":{"role":"assistant"}} ], "x":1.50}"#;
const CALL: &str = r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"t","function":{"name":"f","arguments":"{}"}}]}}]}"#;
const TEXT: &str =
    r#"{"model":"scripted-2","choices":[{"index":0,"delta":{"content":"Be\u0063ause."}}]}"#;
const STOP: &str = r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;
const USAGE: &str = r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}"#;

#[tokio::test]
async fn chunks_pass_byte_for_byte() {
    let upstream = Upstream::start().await;
    let spread = "{\"choices\":[],\n\"y\":2}";
    let chunks = [ROLE, CALL, TEXT, STOP, USAGE];
    let mut reply = Reply::stream_head().chunk(&format!(
        ": hello\n\ndata: {}\n\n",
        spread.replace('\n', "\ndata: ")
    ));
    for chunk in chunks {
        reply = reply.event(chunk);
    }
    upstream.plan(reply.event("[DONE]").end());
    let client = Watched::new(&config(&upstream));
    let (kept, answer) = ask(&client, REQUEST).await;
    let answer = answer.unwrap();
    assert_eq!(kept.chunks[0], spread.replace('\n', " "));
    assert_eq!(kept.chunks[1..], chunks);
    assert_eq!((&*kept.text, &*answer.text), ("Because.", "Because."));
    let whole = answer_of(&answer);
    assert_eq!(whole["choices"][0]["message"]["content"], "Because.");
    assert_eq!(whole["choices"][0]["message"]["tool_calls"][0]["id"], "t");
    let usage = answer.usage.unwrap();
    assert_eq!((usage.input, usage.output), (3, 5));
    let attempt = &answer.attempts[0];
    assert_eq!(attempt.answering_model.as_deref(), Some("scripted-2"));
    assert_eq!(
        client.count(
            "gen_ai_client_operation_time_to_first_chunk_seconds_count",
            "model=\"*\""
        ),
        1
    );
}

/// Tells of each chunk.
struct Teller(tokio::sync::mpsc::UnboundedSender<String>);

impl AnswerSink for Teller {
    fn text(&mut self, _: &str) {}

    fn chunk(&mut self, json: &[u8]) {
        let _ = self.0.send(String::from_utf8(json.to_vec()).unwrap());
    }
}

#[tokio::test]
async fn a_chunk_passes_before_the_next_one_has_come_and_a_cancelled_call_has_an_attempt() {
    let upstream = Upstream::start().await;
    upstream.plan(Reply::stream_head().event(ROLE).hang());
    let client = Watched::new(&config(&upstream));
    let request = ChatRequest::parse(Bytes::from(REQUEST)).unwrap();
    let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
    let (mut teller, attempts) = (Teller(sender), AttemptLog::default());
    let question = Question {
        route: client.client.default_route(),
        content: Content::Chat(&request),
        attempts: attempts.clone(),
    };
    let permit = client.client.admit(USER).unwrap();
    let call = client
        .client
        .complete(permit, memory(), question, Some(&mut teller));
    tokio::select! {
        chunk = told.recv() => assert_eq!(chunk.unwrap(), ROLE),
        answer = call => panic!("the upstream never ends: {answer:?}"),
    }
    let attempts = attempts.attempts();
    assert_eq!((attempts.len(), attempts[0].outcome), (1, "cancelled"));
    assert_eq!(attempts[0].model, "asked-1");
}

#[tokio::test]
async fn there_is_no_retry_after_the_first_chunk_and_each_costly_attempt_is_told() {
    let (first, second) = (Upstream::start().await, Upstream::start().await);
    let mut config = config(&first);
    config.max_retries = 1;
    add_fallback(&mut config, &second.url(), "other", None);
    // An error in place of the first chunk: the fallback is asked.
    first.plan(
        Reply::stream_head()
            .event(r#"{"error":{"message":"busy"}}"#)
            .end(),
    );
    let client = Watched::new(&config);
    let (kept, answer) = ask(&client, REQUEST).await;
    let answer = answer.unwrap();
    assert_eq!(answer.text, "Hello there");
    assert!(kept.chunks.iter().all(|chunk| !chunk.contains("busy")));
    let outcomes: Vec<_> = answer
        .attempts
        .iter()
        .map(|attempt| (&*attempt.upstream, &*attempt.model, attempt.outcome))
        .collect();
    assert_eq!(
        outcomes,
        [
            ("primary", "x", "error_object"),
            ("fallback-1", "other", "completed")
        ]
    );
    // A status costs nothing.
    first.plan(Reply::error(500, &["x-should-retry: false"]));
    let (_, answer) = ask(&client, REQUEST).await;
    assert_eq!(answer.unwrap().attempts.len(), 1);
    // After the first chunk nobody else is asked.
    let asked = second.requests().len();
    first.plan(Reply::stream_head().event(TEXT).event(USAGE).reset());
    let (kept, answer) = ask(&client, REQUEST).await;
    let failure = answer.unwrap_err();
    assert_eq!(kept.chunks, [TEXT, USAGE]);
    assert_eq!(failure.code, FailureCode::UpstreamFailed);
    assert_eq!(second.requests().len(), asked);
    let [attempt] = &failure.attempts[..] else {
        panic!("{:?}", failure.attempts);
    };
    assert_eq!(attempt.outcome, "truncated");
    assert_eq!(attempt.usage.unwrap().output, 5);
    assert_eq!(attempt.answering_model.as_deref(), Some("scripted-2"));
}

#[tokio::test]
async fn an_upstream_that_cannot_be_reached_costs_nothing() {
    let upstream = Upstream::start().await;
    let config = config(&upstream);
    upstream.stop().await;
    let (_, answer) = ask(&Watched::new(&config), REQUEST).await;
    assert!(answer.unwrap_err().attempts.is_empty());
}

#[tokio::test]
async fn a_whole_answer_to_a_request_for_a_stream_passes_as_one_chunk() {
    let upstream = Upstream::start().await;
    let call = json!({ "id": "t", "function": { "name": "f" } });
    upstream.plan(Reply::json(&json!({
        "id": "c", "object": "chat.completion",
        "choices": [{ "index": 0, "message": { "content": "Hi", "tool_calls": [call] }, "finish_reason": "stop" }],
    })));
    let client = Watched::new(&config(&upstream));
    let (kept, answer) = ask(&client, REQUEST).await;
    let chunk: serde_json::Value = serde_json::from_str(&kept.chunks[0]).unwrap();
    let call = json!({ "index": 0, "id": "t", "function": { "name": "f" } });
    assert_eq!(
        chunk,
        json!({
            "id": "c", "object": "chat.completion.chunk",
            "choices": [{ "index": 0, "delta": { "content": "Hi", "tool_calls": [call] }, "finish_reason": "stop" }],
        })
    );
    assert_eq!((kept.chunks.len(), &*answer.unwrap().text), (1, "Hi"));
}

#[tokio::test]
async fn a_choice_that_goes_on_for_long_after_the_first_has_ended_is_waited_for() {
    let upstream = Upstream::start().await;
    let other = r#"{"choices":[{"index":1,"delta":{"content":"b"}}]}"#;
    let other_stop = r#"{"choices":[{"index":1,"delta":{},"finish_reason":"stop"}]}"#;
    upstream.plan(
        Reply::stream_head()
            .event(TEXT)
            .event(STOP)
            // Longer than the end of an answer may take.
            .pause(Duration::from_millis(5500))
            .event(other)
            .event(other_stop)
            .event("[DONE]")
            .end(),
    );
    let client = Watched::new(&config(&upstream));
    let (kept, answer) = ask(
        &client,
        &REQUEST.replace("\"stream\"", "\"n\":2,\"stream\""),
    )
    .await;
    assert_eq!(
        answer_of(&answer.unwrap())["choices"][1]["message"]["content"],
        "b"
    );
    assert_eq!(kept.chunks.len(), 4);
}

#[tokio::test]
async fn every_kind_of_chunk_is_a_sign_of_life() {
    let upstream = Upstream::start().await;
    let mut reply = Reply::stream_head();
    for _ in 0..4 {
        reply = reply.pause(150 * MS).event(CALL);
    }
    upstream.plan(reply.event(STOP).end());
    let mut config = config(&upstream);
    config.first_token_timeout = 300 * MS;
    config.token_timeout = 300 * MS;
    ask(&Watched::new(&config), REQUEST).await.1.unwrap();
}
