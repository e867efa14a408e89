//! Upstreams that misbehave: each fault is reported clearly, the prompt is kept as failed and
//! announced, and the next prompt is answered.

use std::time::Duration;

use futures_util::future::join_all;
use prompt_service::config::UpstreamConfig;
use serde_json::{Value, json};

use super::{MS, outcome, post, service, shown, socket};
use crate::support::{Reply, Response, Upstream, User, chunk, names};

/// What the client gets.
const FAILED: (u16, &str) = (502, "upstream_failed");
const UNAVAILABLE: (u16, &str) = (503, "upstream_unavailable");
const TIMEOUT: (u16, &str) = (504, "upstream_timeout");
const PIECE: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n";
const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n";

type Case = (&'static str, (u16, &'static str), Reply);

/// Posts the name of the fault, checks the form of the response, and returns it.
async fn told(user: &User, is_streamed: bool, name: &str, (status, code): (u16, &str)) -> Value {
    let body = json!({ "prompt": name, "websocket": true });
    let told = if is_streamed {
        let mut stream = post(user, &body).await;
        assert_eq!(stream.status, 200, "{name}");
        let events = stream.rest().await;
        let names: Vec<_> = names(&events)
            .into_iter()
            .filter(|event| *event != "delta")
            .collect();
        assert_eq!(names, ["started", "failed"], "{name}");
        assert_eq!(events[0].data["id"], events.last().unwrap().data["id"]);
        events.last().unwrap().data.clone()
    } else {
        let answer: Response = user.post("/api/prompts").json(&body).send().await;
        assert_eq!(answer.status, status, "{name}: {answer:?}");
        let wait = answer.header("retry-after").map(str::parse::<u64>);
        assert_eq!(wait.is_some(), status == 503, "{name}");
        assert!(wait.is_none_or(|wait| wait.unwrap() >= 1), "{name}");
        answer.json()
    };
    assert_eq!(told["code"], code, "{name}: {told}");
    assert!(told["detail"].is_string() && told["id"].is_i64(), "{told}");
    assert_eq!(told.as_object().unwrap().len(), 3, "{name}: {told}");
    assert!(!told.to_string().contains("upstream-secret-words"));
    told
}

/// Plays each fault to one service, which must still serve after each.
async fn check(is_streamed: bool, adjust: fn(&mut UpstreamConfig), cases: Vec<Case>) {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |config| {
        adjust(config.upstream.as_mut().unwrap());
    })
    .await;
    let mut socket = socket(&app, &user).await;
    let (count, mut failed) = (cases.len(), Vec::new());
    for (name, expected, reply) in cases {
        upstream.plan(reply);
        let told = told(&user, is_streamed, name, expected).await;
        let id = told["id"].as_i64().unwrap();
        let event = outcome(&mut socket).await;
        assert_eq!(event["event"], "prompt_failed", "{name}");
        assert_eq!(event["data"], told, "{name}");
        let shown = shown(&user, id).await;
        assert_eq!(shown["status"], "failed", "{name}");
        assert_eq!(shown["error"], expected.1, "{name}");
        assert_eq!(shown["response"], Value::Null, "{name}");
        assert_eq!(shown["prompt"], name);
        failed.push(id);
        user.prompt("well again").await;
    }
    assert_eq!(user.all_prompts().await.len(), 2 * count);
    let found = user
        .similar("an error in the middle of a stream", 100)
        .await;
    assert_eq!(found.len(), count, "what failed is never found");
    assert!(!found.iter().any(|id| failed.contains(id)));
    eventually!(app.metric("calls_running").await == Some(0.0));
    eventually!(app.metric("upstream_calls_in_flight").await == Some(0.0));
    let series = "prompts_total{status=\"failed\"}";
    assert_eq!(app.metric(series).await, Some(count as f64));
}

fn refusals() -> Vec<Case> {
    let gzip = ["content-encoding: gzip"];
    vec![
        ("401", FAILED, Reply::error(401, &[])),
        ("429", UNAVAILABLE, Reply::error(429, &["retry-after: 7"])),
        ("500", FAILED, Reply::error(500, &[])),
        ("503", UNAVAILABLE, Reply::error(503, &[])),
        ("504", TIMEOUT, Reply::error(504, &[])),
        (
            "a redirect",
            FAILED,
            Reply::error(307, &["location: http://127.0.0.1:1/v1/chat/completions"]),
        ),
        (
            "gzip",
            FAILED,
            Reply::of(200, "application/json", &gzip, "\x1f\x08"),
        ),
        ("closed at once", FAILED, Reply::default().close()),
    ]
}

#[tokio::test]
async fn refusals_of_whole_answers() {
    check(false, |_| (), refusals()).await;
}

#[tokio::test]
async fn refusals_of_streamed_answers() {
    check(true, |_| (), refusals()).await;
}

#[tokio::test]
async fn nonsense_in_whole_answers() {
    let json = |body| Reply::of(200, "application/json", &[], body);
    let cases = vec![
        ("malformed JSON", FAILED, json("{\"choices\": [")),
        (
            "HTML",
            FAILED,
            Reply::of(200, "text/html", &[], "<html>upstream-secret-words</html>"),
        ),
        (
            "an error object",
            FAILED,
            json(r#"{"error": {"message": "upstream-secret-words"}}"#),
        ),
        (
            "a body that breaks off",
            FAILED,
            Reply::raw(format!("{HEAD}content-length: 500\r\n\r\n{{\"choices\"")).close(),
        ),
        ("a text too long", FAILED, Reply::answer(&"x".repeat(5000))),
        (
            "a body without end",
            FAILED,
            Reply::raw(format!("{HEAD}\r\n\"")).forever(vec![b'x'; 4096], Duration::ZERO),
        ),
    ];
    check(false, |_| (), cases).await;
}

#[tokio::test]
async fn nonsense_in_streams() {
    let head = Reply::stream_head;
    let cases = vec![
        (
            "an event that is no JSON",
            FAILED,
            head().delta("He").event("{\"choices\": [").end(),
        ),
        (
            "HTML in place of a stream",
            FAILED,
            Reply::of(200, "text/html", &[], "<html>upstream-secret-words</html>"),
        ),
        (
            "cut within an event",
            FAILED,
            head().delta("He").then("ff\r\ndata: ").close(),
        ),
        ("cut between events", FAILED, head().delta("He").close()),
        ("reset", FAILED, head().delta("He").pause(50 * MS).reset()),
        ("no [DONE]", FAILED, head().delta("He").end()),
        (
            "an error in mid-stream",
            FAILED,
            head()
                .delta("He")
                .event(r#"{"error": {"message": "upstream-secret-words"}}"#)
                .end(),
        ),
        (
            "a text without end",
            FAILED,
            head().forever(chunk(PIECE), Duration::ZERO),
        ),
    ];
    check(true, |_| (), cases).await;
}

fn impatient(config: &mut UpstreamConfig) {
    config.first_token_timeout = 3000 * MS;
    config.token_timeout = 3000 * MS;
    config.total_timeout = 10_000 * MS;
}

/// Plays each fault to a separate service, all at the same time, because each takes the time of a
/// deadline.
async fn check_each(is_streamed: bool, cases: Vec<Case>) {
    let checks = cases
        .into_iter()
        .map(|case| check(is_streamed, impatient, vec![case]));
    join_all(checks).await;
}

#[tokio::test]
async fn whole_answers_that_never_come() {
    let cases = vec![
        ("silence", TIMEOUT, Reply::default().hang()),
        (
            "a head byte by byte",
            TIMEOUT,
            Reply::raw("HTTP/1.1 200 OK\r\nx: ").forever("x", 20 * MS),
        ),
        (
            "a body byte by byte",
            TIMEOUT,
            Reply::raw(format!("{HEAD}\r\n")).forever(" ", 20 * MS),
        ),
    ];
    check_each(false, cases).await;
}

#[tokio::test]
async fn streamed_answers_that_never_end() {
    let head = Reply::stream_head;
    let cases = vec![
        ("silence", TIMEOUT, Reply::default().hang()),
        (
            "a head byte by byte",
            TIMEOUT,
            Reply::raw("HTTP/1.1 200 OK\r\nx: ").forever("x", 20 * MS),
        ),
        ("silence after a piece", TIMEOUT, head().delta("He").hang()),
        (
            "comments for ever",
            TIMEOUT,
            head().delta("He").forever(chunk(": ping\n\n"), 20 * MS),
        ),
        (
            "a piece now and then for ever",
            TIMEOUT,
            head().forever(chunk(PIECE), 20 * MS),
        ),
    ];
    check_each(true, cases).await;
}
