//! How calls are bounded, measured and kept secret.

use std::time::Duration;

use serde_json::json;

use super::{MS, held_answer, hello, post, posting, service, shown};
use crate::support::{Gate, Reply, Upstream, text_of, within_a_day};

const LABELS: &str = "gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"openai-compatible\",gen_ai_request_model=\"asked-1\"";

#[tokio::test]
async fn beyond_the_cap_posts_are_refused_at_once_and_nothing_is_kept_of_them() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |config| {
        config.upstream.as_mut().unwrap().max_in_flight = 4;
    })
    .await;
    let gate = Gate::new();
    upstream.plan_many(2, &held_answer(&gate));
    let held = [None, Some("k")].map(|key| posting(&user, key, &hello()));
    eventually!(upstream.requests().len() == 2);
    for body in [hello(), json!({ "prompt": "hello", "stream": true })] {
        let refused = user.post("/api/prompts").json(&body).send().await;
        assert_eq!(refused.status, 503, "{refused:?}");
        assert_eq!(refused.json()["code"], "overloaded");
        assert_eq!(refused.header("retry-after"), Some("1"));
    }
    gate.open();
    for each in held {
        assert_eq!(each.await.unwrap().status, 201);
    }
    eventually!(app.metric("upstream_calls_in_flight").await == Some(0.0));
    user.prompt("there is room again").await;
    assert_eq!(user.all_prompts().await.len(), 3);
    assert_eq!(upstream.requests().len(), 3);
}

#[tokio::test]
async fn beyond_the_days_limit_the_upstream_is_not_asked() {
    within_a_day().await;
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |config| config.calls.daily_limit = Some(1)).await;
    user.prompt("the one").await;
    for body in [hello(), json!({ "prompt": "hello", "stream": true })] {
        let refused = user.post("/api/prompts").json(&body).send().await;
        assert_eq!(refused.status, 503);
        assert_eq!(refused.json()["code"], "upstream_unavailable");
        assert!(refused.header("retry-after").is_some());
        let id = refused.json()["id"].as_i64().unwrap();
        assert_eq!(shown(&user, id).await["status"], "failed");
    }
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn a_post_beyond_the_quota_neither_asks_nor_counts_and_a_failed_prompt_is_kept() {
    within_a_day().await;
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |config| {
        config.calls.daily_limit = Some(2);
        config.calls.max_prompts_per_user = Some(1);
    })
    .await;
    let kept = user.prompt("the one").await;
    for _ in 0..5 {
        let refused = user.try_prompt("more").await;
        assert_eq!(refused.status, 403);
        assert_eq!(refused.json()["code"], "quota_exceeded");
    }
    assert_eq!(upstream.requests().len(), 1);

    // The daily limit has room for one more: refused posts did not count.
    let path = format!("/api/prompts/{kept}");
    assert_eq!(user.delete(&path).send().await.status, 204);
    let kept = user.prompt("the second").await;
    let path = format!("/api/prompts/{kept}");
    assert_eq!(user.delete(&path).send().await.status, 204);
    assert_eq!(user.try_prompt("beyond the day").await.status, 503);
    assert_eq!(user.try_prompt("a failed one is kept").await.status, 403);
}

#[tokio::test]
async fn calls_are_timed_and_the_time_of_the_service_is_shown() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    upstream.plan(Reply::default().pause(300 * MS).and(Reply::answer("slow")));
    let answer = user.try_prompt("hello").await;
    assert_eq!(answer.status, 201);
    let timing = answer.header("server-timing").unwrap();
    let parts: Vec<f64> = timing
        .split(", ")
        .map(|part| part.split_once("dur=").unwrap().1.parse().unwrap())
        .collect();
    assert!(timing.starts_with("upstream;dur="), "{timing}");
    assert!(timing.contains("service;dur="), "{timing}");
    assert!(parts[0] >= 300.0, "{timing}");
    upstream.plan(Reply::stream(&["one ", "two"], 200 * MS));
    let events = post(&user, &hello()).await.rest().await;
    assert_eq!(text_of(&events), "one two");
    upstream.plan(Reply::error(500, &[]));
    assert_eq!(user.try_prompt("hello").await.status, 502);

    let chunk = "gen_ai_client_operation_time_to_first_chunk_seconds";
    let count = format!("{chunk}_count{{{LABELS}}}");
    assert_eq!(app.metric(&count).await, Some(1.0));
    let sum = app
        .metric(&format!("{chunk}_sum{{{LABELS}}}"))
        .await
        .unwrap();
    assert!((0.2..60.0).contains(&sum), "{sum}");
    for (error, expected) in [("", 2.0), ("500", 1.0)] {
        let series = format!(
            "gen_ai_client_operation_duration_seconds_count{{error_type=\"{error}\",{LABELS}}}"
        );
        assert_eq!(app.metric(&series).await, Some(expected), "{series}");
    }
    for (kind, expected) in [("input", 6.0), ("output", 10.0)] {
        let series =
            format!("gen_ai_client_token_usage_sum{{{LABELS},gen_ai_token_type=\"{kind}\"}}");
        assert_eq!(app.metric(&series).await, Some(expected), "{series}");
    }
    for kind in ["answer", "stream"] {
        let series = format!("prompt_overhead_seconds_count{{kind=\"{kind}\"}}");
        eventually!(app.metric(&series).await == Some(1.0));
        let series = format!("prompt_overhead_seconds_sum{{kind=\"{kind}\"}}");
        let added = app.metric(&series).await.unwrap();
        assert!((0.0..60.0).contains(&added), "{added}");
    }
}

#[tokio::test]
async fn neither_key_nor_text_is_in_log_metric_or_error() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |config| {
        config.upstream.as_mut().unwrap().system_prompt = Some("the-system-prompt".to_owned());
    })
    .await;
    upstream.plan(Reply::answer("the-answer"));
    upstream.plan(Reply::stream(&["the-", "answer"], Duration::ZERO));
    upstream.plan(Reply::error(401, &[]));
    upstream.plan(
        Reply::stream_head()
            .delta("the-answer")
            .event(r#"{"error": "upstream-secret-words"}"#),
    );
    let mut told = String::new();
    for _ in 0..2 {
        told.push_str(&user.try_prompt("the-prompt").await.text());
        let events = post(&user, &json!({ "prompt": "the-prompt" })).await;
        told.push_str(&format!("{:?}", { events }.rest().await));
    }
    let metrics = app.get("/metrics").send().await.text();
    let log = app.log.text();
    assert_eq!(upstream.requests().len(), 4);
    assert!(log.contains("upstream"));
    for secret in ["sk-primary", "the-system-prompt", "upstream-secret-words"] {
        assert!(
            !(told.contains(secret) || metrics.contains(secret)),
            "{secret}"
        );
    }
    for secret in [
        "sk-primary",
        "the-system-prompt",
        "the-prompt",
        "the-answer",
    ] {
        assert!(!log.contains(secret), "{secret}");
    }
    // Only the operator sees it.
    assert!(log.contains("upstream-secret-words"));
}
