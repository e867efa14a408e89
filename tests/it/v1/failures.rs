//! Calls that fail before the first chunk: their status, whether streamed or not.

use std::time::Duration;

use serde_json::{Value, json};

use super::{answered, ask, chat, listed, streamed};
use crate::support::{Reply, Upstream};
use crate::upstream::service;

const MS: Duration = Duration::from_millis(1);

fn refusal(status: u16, headers: &[&str]) -> Reply {
    let error = json!({ "error": {
        "message": "'tools[0].name' is too long", "type": "invalid_request_error",
        "param": "tools[0].name", "code": "string_above_max_length",
    } });
    Reply::of(status, "application/json", headers, &error.to_string())
}

#[tokio::test]
async fn refusals_of_the_request_are_told_in_the_upstreams_words() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    for status in [400, 404, 413, 415, 422] {
        for request in [ask("hello"), streamed(ask("hello"))] {
            upstream.plan(refusal(status, &[]));
            let told = chat(&user, &request).send().await;
            assert_eq!(told.status, status, "{told:?}");
            let error = json!({
                "message": "'tools[0].name' is too long", "type": "invalid_request_error",
                "param": "tools[0].name", "code": "string_above_max_length",
            });
            assert_eq!(told.json(), json!({ "error": error }));
            assert_eq!(told.header("retry-after"), None);
        }
    }
    let prompts = user.all_prompts().await;
    assert_eq!(prompts.len(), 10);
    assert!(prompts.iter().all(|prompt| prompt["status"] == "failed"));
    assert!(listed(&user, "").await.is_empty());
    assert!(user.similar("hello", 9).await.is_empty());
}

#[tokio::test]
async fn other_failures_are_told_without_details() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |config| {
        let upstream = config.upstream.as_mut().unwrap();
        upstream.first_token_timeout = 300 * MS;
        upstream.total_timeout = 300 * MS;
        config.v1_throttle = "off".parse().unwrap();
    })
    .await;
    let json = |body: &str| Reply::of(200, "application/json", &[], body);
    for (reply, status, code) in [
        (Reply::error(401, &[]), 502, "upstream_failed"),
        (Reply::error(403, &[]), 502, "upstream_failed"),
        (Reply::error(500, &[]), 502, "upstream_failed"),
        (Reply::default().close(), 502, "upstream_failed"),
        (json("upstream-secret-words"), 502, "upstream_failed"),
        (
            json(r#"{"error":{"message":"upstream-secret-words"}}"#),
            502,
            "upstream_failed",
        ),
        (Reply::error(504, &[]), 504, "upstream_timeout"),
        (Reply::default().hang(), 504, "upstream_timeout"),
    ] {
        for request in [ask("hello"), streamed(ask("hello"))] {
            let at = format!("{reply:?} {request}");
            upstream.plan(reply.clone());
            let told = chat(&user, &request).send().await;
            assert_eq!(told.status, status, "{at}: {told:?}");
            let error = &told.json()["error"];
            assert_eq!(error["code"], code, "{at}");
            assert_eq!(error["type"], "server_error", "{at}");
            assert_eq!(error["param"], Value::Null, "{at}");
            assert!(!told.text().contains("upstream-secret-words"), "{at}");
            // Several failures in a row would close the way to the upstream.
            answered(&user, &ask("well again")).await;
        }
    }
}

#[tokio::test]
async fn a_wait_is_told_in_seconds_and_milliseconds() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    for status in [429, 503] {
        for request in [ask("hello"), streamed(ask("hello"))] {
            upstream.plan(refusal(status, &["retry-after-ms: 6500"]));
            let told = chat(&user, &request).send().await;
            assert_eq!(told.status, status, "{told:?}");
            assert_eq!(told.header("retry-after"), Some("7"));
            assert_eq!(told.header("retry-after-ms"), Some("6500"));
            let is_told = told.text().contains("is too long");
            assert_eq!(is_told, status == 429, "{told:?}");
        }
    }
}
