//! Errors in the form that OpenAI's clients read, on every path under `/v1`.

use hyper::Method;
use serde_json::{Value, json};

use super::{CHAT, ask, chat, with};
use crate::support::{Response, spawn_app};

/// The error of a response, whose form and headers are checked.
fn error(answer: &Response, status: u16) -> Value {
    assert_eq!(answer.status, status, "{answer:?}");
    let body = answer.json();
    let error = &body["error"];
    assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
    let members: Vec<_> = error.as_object().unwrap().keys().collect();
    assert_eq!(members, ["code", "message", "param", "type"], "{body}");
    assert!(error["message"].is_string() && error["type"].is_string());
    let length = answer.header("content-length").unwrap();
    assert_eq!(length.parse::<usize>().unwrap(), answer.body.len());
    let took = answer.header("openai-processing-ms").unwrap();
    assert!(took.parse::<u64>().is_ok());
    assert!(answer.header("x-request-id").is_some());
    error.clone()
}

#[tokio::test]
async fn every_path_tells_errors_in_openais_form() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    for path in ["/v1", "/v1/", "/v1/nothing", "/v1/chat", "/v1/responses"] {
        let told = error(&user.get(path).send().await, 404);
        assert_eq!(told["type"], "invalid_request_error", "{path}");
        assert_eq!(told["message"], "Not found.", "{path}");
    }
    // Other paths have the service's own form.
    for path in ["/v1x", "/v2/models"] {
        let told = user.get(path).send().await;
        assert_eq!(told.json(), json!({ "detail": "Not found." }), "{path}");
        assert_eq!(told.header("openai-processing-ms"), None, "{path}");
    }
    let put = user.client.request(Method::PUT, CHAT).send().await;
    error(&put, 405);
    assert!(put.header("allow").unwrap().contains("POST"));
    let page = user.get("/v1/models").header("accept", "text/html");
    error(&page.send().await, 406);
    for request in [
        app.get("/v1/models"),
        app.get(CHAT),
        app.post(CHAT).json(&ask("hello")),
        app.get(CHAT).bearer("garbage"),
        app.get(CHAT).bearer("sk-garbage"),
        app.get(CHAT).bearer(&app.expired_token(user.id)),
    ] {
        let answer = request.send().await;
        let told = error(&answer, 401);
        assert_eq!(told["code"], "invalid_api_key");
        assert_eq!(told["type"], "invalid_request_error");
        assert!(answer.header("www-authenticate").is_some());
    }
    let form = user.post(CHAT).body("text/plain", "hello").send().await;
    error(&form, 415);
    let unknown = error(&user.get("/v1/chat/completions/x").send().await, 404);
    assert_eq!(unknown["code"], Value::Null);
}

#[tokio::test]
async fn a_request_that_cannot_be_used_is_told_by_its_member() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let changed = |members: Value| with(ask("hello"), &members).to_string();
    let deep = format!("{}1{}", "[".repeat(200), "]".repeat(200));
    for (body, param) in [
        (String::new(), Value::Null),
        ("{oops".to_owned(), Value::Null),
        ("[]".to_owned(), Value::Null),
        ("null".to_owned(), Value::Null),
        (
            r#"{"messages":[{}],"model":"m","model":"n"}"#.to_owned(),
            Value::Null,
        ),
        (
            changed(json!({ "x": serde_json::from_str::<Value>("1").unwrap() }))
                .replace("\"x\":1", &format!("\"x\":{deep}")),
            Value::Null,
        ),
        (
            r#"{"messages":[{"role":"user","content":"hi"}]}"#.to_owned(),
            json!("model"),
        ),
        (r#"{"model":"m"}"#.to_owned(), json!("messages")),
        (changed(json!({ "model": 7 })), json!("model")),
        (changed(json!({ "model": "" })), json!("model")),
        (changed(json!({ "messages": [] })), json!("messages")),
        (changed(json!({ "messages": "hi" })), json!("messages")),
        (changed(json!({ "messages": ["hi"] })), json!("messages")),
        (changed(json!({ "stream": "yes" })), json!("stream")),
        (
            changed(json!({ "stream_options": 1 })),
            json!("stream_options"),
        ),
        (changed(json!({ "n": 0 })), json!("n")),
        (changed(json!({ "max_tokens": -1 })), json!("max_tokens")),
    ] {
        let answer = user.post(CHAT).body("application/json", body.clone());
        let told = error(&answer.send().await, 400);
        assert_eq!(told["param"], param, "{body}: {told}");
        assert_eq!(told["type"], "invalid_request_error", "{body}");
    }
    let post = chat(&user, &ask("hello")).header("idempotency-key", "two words");
    error(&post.send().await, 400);
    assert!(user.all_prompts().await.is_empty());
}

#[tokio::test]
async fn a_throttled_client_is_told_when_to_come_again() {
    let app = spawn_app(|config| config.v1_throttle = "2/h".parse().unwrap()).await;
    let user = app.user("alice").await;
    for left in ["1", "0"] {
        let answer = chat(&user, &ask("hello")).send().await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.header("x-ratelimit-limit-requests"), Some("2"));
        assert_eq!(answer.header("x-ratelimit-remaining-requests"), Some(left));
        assert!(answer.header("x-ratelimit-reset-requests").is_some());
    }
    let answer = chat(&user, &ask("hello")).send().await;
    let told = error(&answer, 429);
    assert_eq!(told["code"], "rate_limit_exceeded");
    assert_eq!(told["type"], "requests");
    assert_eq!(answer.header("x-ratelimit-remaining-requests"), Some("0"));
    let seconds: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    let millis: u64 = answer.header("retry-after-ms").unwrap().parse().unwrap();
    assert!((3_000_000..=3_600_000).contains(&millis), "{millis}");
    assert_eq!(seconds, millis.div_ceil(1000));
    assert_eq!(answer.header("x-should-retry"), None);
    // Reading is not throttled, and neither is the other front door.
    assert_eq!(user.get(CHAT).send().await.status, 200);
    user.prompt("hello").await;
    let other = app.user("bob").await;
    assert_eq!(chat(&other, &ask("hello")).send().await.status, 200);
}
