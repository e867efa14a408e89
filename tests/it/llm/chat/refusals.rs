//! Refusals of chat requests: the caller is told what is wrong with its request, and nothing about
//! the operator's account.

use prompt_service::domain::FailureCode;
use serde_json::json;

use super::ask;
use crate::llm::{Watched, add_fallback, config};
use crate::support::{Log, Reply, Upstream};

const REQUEST: &str = r#"{"model":"x","messages":[{"role":"user","content":"my caf\u00e9 hunter2"}],"tools":["password9"]}"#;

fn refusal(status: u16, message: &str) -> Reply {
    let error = json!({ "message": message, "type": "invalid_request_error", "param": "tools[0]", "code": "bad_tool" });
    let body = json!({ "error": error }).to_string();
    Reply::of(status, "application/json", &[], &body)
}

#[tokio::test]
async fn a_refusal_of_the_request_is_told_and_asked_once() {
    for status in [400, 404, 413, 415, 422] {
        let upstream = Upstream::start().await;
        upstream.plan_many(6, &refusal(status, "tools[0] is wrong (key sk-primary)"));
        let mut config = config(&upstream);
        config.max_retries = 2;
        let client = Watched::new(&config);
        for _ in 0..6 {
            let failure = ask(&client, REQUEST).await.1.unwrap_err();
            assert_eq!(failure.code, FailureCode::UpstreamFailed);
            let told = failure.upstream_error.unwrap();
            assert_eq!(told.status, status);
            assert_eq!(told.message, "tools[0] is wrong (key sk-…)");
            assert_eq!(told.error_type.as_deref(), Some("invalid_request_error"));
            assert_eq!(told.param.as_deref(), Some("tools[0]"));
            assert_eq!(told.code.as_deref(), Some("bad_tool"));
            assert!(failure.attempts.is_empty());
        }
        assert_eq!(upstream.requests().len(), 6, "{status}");
        assert_eq!(client.breaker(), "closed", "{status}");
    }
}

#[tokio::test]
async fn too_many_requests_are_told_with_the_wait() {
    let upstream = Upstream::start().await;
    let error = json!({ "error": { "message": "Slow down", "code": "rate_limit_exceeded" } });
    let headers = ["retry-after: 7"];
    let reply = Reply::of(429, "application/json", &headers, &error.to_string());
    upstream.plan(reply);
    let client = Watched::new(&config(&upstream));
    let failure = ask(&client, REQUEST).await.1.unwrap_err();
    assert_eq!(failure.code, FailureCode::UpstreamUnavailable);
    assert_eq!(failure.retry_after.unwrap().as_secs(), 7);
    let told = failure.upstream_error.unwrap();
    assert_eq!((told.status, told.message.as_str()), (429, "Slow down"));
}

#[tokio::test]
async fn that_the_operators_money_is_spent_is_not_told() {
    let upstream = Upstream::start().await;
    let error = json!({ "error": { "message": "pay your bill", "code": "insufficient_quota" } });
    upstream.plan(Reply::of(429, "application/json", &[], &error.to_string()));
    let client = Watched::new(&config(&upstream));
    let failure = ask(&client, REQUEST).await.1.unwrap_err();
    assert_eq!(failure.code, FailureCode::UpstreamUnavailable);
    assert_eq!(failure.upstream_error, None);
}

#[tokio::test]
async fn a_refusal_of_the_operator_is_not_told() {
    for status in [401, 402, 403, 500] {
        let upstream = Upstream::start().await;
        upstream.plan(refusal(status, "pay your bill"));
        let failure = ask(&Watched::new(&config(&upstream)), REQUEST)
            .await
            .1
            .unwrap_err();
        assert_eq!(failure.upstream_error, None, "{status}");
    }
}

#[tokio::test]
async fn a_fallback_is_asked_if_it_may_know_the_model_or_take_more() {
    for (status, goes_on) in [
        (400, false),
        (404, true),
        (413, true),
        (415, false),
        (422, false),
    ] {
        let (first, second) = (Upstream::start().await, Upstream::start().await);
        first.plan(refusal(status, "no"));
        let mut config = config(&first);
        add_fallback(&mut config, &second.url(), "other", None);
        let answer = ask(&Watched::new(&config), REQUEST).await.1;
        assert_eq!(answer.is_ok(), goes_on, "{status}");
    }
}

#[tokio::test]
async fn nothing_of_a_chat_request_is_logged() {
    let log = Log::default();
    let _guard = tracing::dispatcher::set_default(&log.dispatch());
    let upstream = Upstream::start().await;
    let client = Watched::new(&config(&upstream));
    upstream.plan(refusal(
        400,
        "Invalid: my café hunter2 and password9 with sk-primary",
    ));
    let long = REQUEST.to_owned() + &" ".repeat(300_000);
    upstream.plan(refusal(400, "Invalid: hunter2"));
    for body in [REQUEST, &long] {
        ask(&client, body).await.1.unwrap_err();
    }
    let text = log.text();
    assert!(text.contains("Invalid"), "{text}");
    for secret in ["café", "hunter2", "password9", "sk-primary", "primary)"] {
        assert!(!text.contains(secret), "{secret}: {text}");
    }
}
