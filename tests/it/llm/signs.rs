//! Answers by their time, connection and headers, beside the body.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;

use super::{MS, Watched, config};
use crate::support::{Reply, Upstream, chunk};

const TOKEN_AND_REASON: &str =
    r#"{"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}]}"#;

/// A stream that ends in order after `count` events, with a pause before each.
fn slowly(event: &str, count: usize, pause: Duration) -> Reply {
    let mut reply = Reply::stream_head();
    for _ in 0..count {
        reply = reply.pause(pause).event(event);
    }
    reply.delta("x").stop().event("[DONE]").end()
}

#[tokio::test]
async fn a_reason_in_every_event_does_not_end_the_answer_while_text_comes() {
    let upstream = Upstream::start().await;
    let mut reply = Reply::stream_head();
    // Longer than the wait after a reason.
    for _ in 0..7 {
        reply = reply.event(TOKEN_AND_REASON).pause(1000 * MS);
    }
    upstream.plan(reply.event(TOKEN_AND_REASON).event("[DONE]").end());
    let (pieces, answer) = Watched::new(&config(&upstream)).stream().await;
    assert_eq!(pieces, ["x"; 8]);
    let answer = answer.unwrap();
    assert_eq!(
        (answer.text.as_str(), answer.finish_reason.as_deref()),
        ("xxxxxxxx", Some("stop"))
    );
}

#[tokio::test]
async fn each_readable_event_extends_the_deadline() {
    let events = [
        r#"{"choices":[{"delta":{"reasoning_details":[{"text":"hm"}]}}]}"#,
        r#"{"choices":[{"delta":{"thinking":"hm"}}]}"#,
        r#"{"choices":[{"delta":{"reasoning_text":"hm"},"finish_reason":"stop"}]}"#,
        r#"{"choices":[{"delta":{}}]}"#,
        r#"{"choices":[{"delta":{"content":""}}]}"#,
        r#"{"choices":[]}"#,
        r#"{"type":"ping"}"#,
    ];
    join_all(events.map(async |event| {
        let upstream = Upstream::start().await;
        let mut config = config(&upstream);
        config.first_token_timeout = 1500 * MS;
        config.token_timeout = 1500 * MS;
        upstream.plan(slowly(event, 6, 500 * MS));
        let client = Watched::new(&config);
        let (_, answer) = client.stream().await;
        assert_eq!(answer.expect(event).text, "x", "{event}");
    }))
    .await;
}

#[tokio::test]
async fn comments_and_unreadable_events_do_not_extend_the_deadline() {
    for line in [
        ": ping\n\n",
        "data:\n\n",
        "data: {oops\n\n",
        "event: ping\n\n",
        "\n\n",
    ] {
        let upstream = Upstream::start().await;
        let mut config = config(&upstream);
        config.first_token_timeout = 300 * MS;
        config.token_timeout = 300 * MS;
        upstream.plan(Reply::stream_head().forever(chunk(line), 20 * MS));
        let client = Watched::new(&config);
        client.stream().await.1.unwrap_err();
        assert_eq!(client.ended("\"first_token_timeout\""), 1, "{line:?}");
    }
}

#[tokio::test]
async fn a_first_sign_of_life_does_not_shorten_the_wait_for_the_first_text() {
    let upstream = Upstream::start().await;
    let mut config = config(&upstream);
    config.token_timeout = 300 * MS;
    upstream.plan(
        Reply::stream_head()
            .delta("")
            .pause(1000 * MS)
            .delta("x")
            .stop()
            .end(),
    );
    assert_eq!(Watched::new(&config).stream().await.1.unwrap().text, "x");
}

#[tokio::test]
async fn an_upstream_that_thinks_until_the_deadline_does_not_open_the_breaker() {
    let upstream = Upstream::start().await;
    let mut config = config(&upstream);
    config.total_timeout = 300 * MS;
    let thought = chunk("data: {\"choices\":[{\"delta\":{\"thinking\":\"x\"}}]}\n\n");
    upstream.plan_many(6, &Reply::stream_head().forever(thought, 20 * MS));
    let client = Watched::new(&config);
    for _ in 0..6 {
        client.stream().await.1.unwrap_err();
    }
    assert_eq!(client.breaker(), "closed");
}

#[tokio::test]
async fn usage_may_come_after_done() {
    let upstream = Upstream::start().await;
    upstream.plan(
        Reply::stream_head()
            .delta("x")
            .stop()
            .event("[DONE]")
            .usage()
            .end(),
    );
    let answer = Watched::new(&config(&upstream)).stream().await.1.unwrap();
    assert_eq!(
        (answer.prompt_tokens, answer.completion_tokens),
        (Some(3), Some(5))
    );
}

#[tokio::test]
async fn the_headers_of_an_answer_do_not_matter() {
    let body = json!({ "choices": [{ "message": { "content": "é" }, "finish_reason": "stop" }] });
    let body = body.to_string();
    let of = |status: u16, headers: &[&str]| Reply::of(status, "application/json", headers, &body);
    let raw = |head: &str, body: &str| {
        Reply::raw(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n{body}")).close()
    };
    for is_streamed in [false, true] {
        for (name, reply) in [
            ("201", of(201, &[])),
            ("202", of(202, &[])),
            ("203", of(203, &[])),
            ("encoding none", of(200, &["content-encoding: none"])),
            (
                "encoding identity",
                of(200, &["content-encoding: Identity"]),
            ),
            ("encoding utf-8", of(200, &["content-encoding: UTF-8"])),
            ("an empty encoding", of(200, &["content-encoding: "])),
            (
                "a compression that is none",
                of(200, &["content-encoding: gzip"]),
            ),
            ("no type", raw("x: y", &body)),
            (
                "a length beyond the end",
                raw(&format!("content-length: {}", body.len() + 7), &body),
            ),
            // As one that was counted in characters.
            (
                "a length before the end",
                raw(&format!("content-length: {}", body.len() - 1), &body),
            ),
            (
                "a chunk and a trailer",
                raw(
                    "transfer-encoding: chunked",
                    &format!("{}0\r\nx-y: z\r\n\r\n", chunk(&body)),
                ),
            ),
            (
                "a chunk without the last",
                raw("transfer-encoding: chunked", &chunk(&body)),
            ),
            (
                "an answer of HTTP 1.0",
                Reply::raw(format!("HTTP/1.0 200 OK\r\n\r\n{body}")).close(),
            ),
        ] {
            let upstream = Upstream::start().await;
            upstream.plan(reply);
            let answer = Watched::new(&config(&upstream)).call(is_streamed).await;
            assert_eq!(
                answer.expect(name).text,
                "é",
                "{name}, streamed: {is_streamed}"
            );
        }
    }
}

#[tokio::test]
async fn a_compressed_answer_is_a_separate_failure() {
    let upstream = Upstream::start().await;
    let client = Watched::new(&config(&upstream));
    for (headers, kind) in [
        (&["content-encoding: gzip"][..], "encoded"),
        (&[], "malformed"),
    ] {
        upstream.plan(Reply::of(200, "application/json", headers, "\x1f\x08\0\0"));
        client.ask().await.unwrap_err();
        assert_eq!(client.ended(&format!("{kind:?}")), 1);
    }
}

#[tokio::test]
async fn events_that_were_skipped_are_counted() {
    let upstream = Upstream::start().await;
    upstream.plan(
        Reply::stream_head()
            .event("{oops")
            .delta("x")
            .event("7")
            .stop()
            .end(),
    );
    let client = Watched::new(&config(&upstream));
    assert_eq!(client.stream().await.1.unwrap().text, "x");
    assert_eq!(
        client.count("upstream_events_skipped_total", "\"primary\""),
        2
    );
}
