//! Upstreams that misbehave. Each gives a clear failure, and the next call succeeds.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use futures_util::future::join_all;
use prompt_service::config::{Endpoint, UpstreamConfig};
use prompt_service::domain::FailureCode::{
    self, UpstreamFailed, UpstreamTimeout, UpstreamUnavailable,
};
use serde_json::json;

use super::{MS, USER, Watched, config, memory};
use crate::support::{Reply, Upstream, chunk};

/// An event with some text.
const TOKEN: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"xxx\"}}]}\n\n";
const COMMENT: &str = ": ping\n\n";

/// A body that is sent whole and is not an answer.
fn bad_body(kind: &str, body: &str) -> Reply {
    Reply::of(200, kind, &[], body)
}

/// Plays each reply to a separate client, and asks that client again, which must succeed. All at
/// once, because some wait for a deadline.
async fn check(
    is_streamed: bool,
    adjust: impl Fn(&mut UpstreamConfig),
    cases: Vec<(&str, FailureCode, Reply)>,
) {
    join_all(cases.into_iter().map(async |(name, code, reply)| {
        let upstream = Upstream::start().await;
        let mut config = config(&upstream);
        adjust(&mut config);
        let client = Watched::new(&config);
        upstream.plan(reply);
        let failure = client.call(is_streamed).await.expect_err(name);
        assert_eq!(failure.code, code, "{name}: {failure:?}");
        let has_wait = failure.retry_after.is_some();
        assert_eq!(has_wait, code == UpstreamUnavailable, "{name}: {failure:?}");
        assert_eq!(upstream.requests().len(), 1, "{name}: asked once");
        let answer = client.call(is_streamed).await;
        assert_eq!(answer.expect(name).text, "Hello there", "{name}");
        assert_eq!(client.in_flight(), 0, "{name}");
    }))
    .await;
}

fn faults_of_both_kinds() -> Vec<(&'static str, FailureCode, Reply)> {
    let gzip = ["content-encoding: gzip"];
    vec![
        ("401", UpstreamFailed, Reply::error(401, &[])),
        ("404", UpstreamFailed, Reply::error(404, &[])),
        ("429", UpstreamUnavailable, Reply::error(429, &[])),
        ("500", UpstreamFailed, Reply::error(500, &[])),
        ("503", UpstreamUnavailable, Reply::error(503, &[])),
        ("504", UpstreamTimeout, Reply::error(504, &[])),
        (
            "HTML",
            UpstreamFailed,
            bad_body("text/html", "<html>Welcome</html>"),
        ),
        (
            "HTML that says it is JSON",
            UpstreamFailed,
            bad_body("application/json", "<html>"),
        ),
        (
            "half an object",
            UpstreamFailed,
            bad_body("application/json", "{\"choices\": ["),
        ),
        (
            "an empty body",
            UpstreamFailed,
            bad_body("application/json", ""),
        ),
        (
            "an error object",
            UpstreamFailed,
            Reply::json(&json!({ "error": { "message": "no" } })),
        ),
        (
            "no choices",
            UpstreamFailed,
            Reply::json(&json!({ "choices": [] })),
        ),
        (
            "gzip",
            UpstreamFailed,
            Reply::of(200, "application/json", &gzip, "\x1f\x08"),
        ),
        (
            "gzip in a stream",
            UpstreamFailed,
            Reply::of(200, "text/event-stream", &gzip, "\x1f\x08"),
        ),
        (
            "not HTTP",
            UpstreamFailed,
            Reply::raw("SSH-2.0-OpenSSH_9.9\r\n\r\n").close(),
        ),
        ("closed at once", UpstreamFailed, Reply::default().close()),
        ("reset at once", UpstreamFailed, Reply::default().reset()),
        (
            "a head that breaks off",
            UpstreamFailed,
            Reply::raw("HTTP/1.1 200 OK\r\ncont").close(),
        ),
        (
            "a head without end",
            UpstreamFailed,
            Reply::raw("HTTP/1.1 200 OK\r\nx: ").forever(vec![b'x'; 4096], Duration::ZERO),
        ),
    ]
}

#[tokio::test]
async fn whole_answers_that_are_failures() {
    let mut cases = faults_of_both_kinds();
    // With a reason it would be an empty answer.
    let null = json!({ "choices": [{ "message": { "content": null } }] });
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n";
    cases.extend([
        ("null content", UpstreamFailed, Reply::json(&null)),
        (
            "a body that breaks off",
            UpstreamFailed,
            Reply::raw(format!("{head}content-length: 500\r\n\r\n{{\"choices\"")).close(),
        ),
        (
            "a body that is reset",
            UpstreamFailed,
            Reply::raw(format!("{head}content-length: 500\r\n\r\n{{"))
                .pause(50 * MS)
                .reset(),
        ),
        (
            "a body without end",
            UpstreamFailed,
            Reply::raw(format!("{head}\r\n\"")).forever(vec![b'x'; 4096], Duration::ZERO),
        ),
        (
            "a length beyond all limits",
            UpstreamFailed,
            Reply::raw(format!("{head}content-length: 99999999999\r\n\r\n")).hang(),
        ),
        (
            "a text beyond the limit",
            UpstreamFailed,
            Reply::answer(&"x".repeat(5000)),
        ),
    ]);
    check(false, |_| (), cases).await;
}

#[tokio::test]
async fn streamed_answers_that_are_failures() {
    let mut cases = faults_of_both_kinds();
    let head = Reply::stream_head;
    cases.extend([
        (
            "cut within a chunk",
            UpstreamFailed,
            head().delta("He").then("ff\r\ndata: ").close(),
        ),
        (
            "cut between chunks",
            UpstreamFailed,
            head().delta("He").close(),
        ),
        (
            "reset",
            UpstreamFailed,
            head().delta("He").pause(50 * MS).reset(),
        ),
        (
            "neither [DONE] nor a reason",
            UpstreamFailed,
            head().delta("He").end(),
        ),
        (
            "[DONE] and nothing else",
            UpstreamFailed,
            head().event("[DONE]").end(),
        ),
        ("nothing at all", UpstreamFailed, head().end()),
        (
            "an error in the middle",
            UpstreamFailed,
            head()
                .delta("He")
                .event(r#"{"error": {"message": "upstream-secret-words"}}"#)
                .end(),
        ),
        (
            "an error at the start",
            UpstreamFailed,
            head().event(r#"{"error": "no"}"#).end(),
        ),
        (
            "an event that is no JSON, and no end",
            UpstreamFailed,
            head().delta("He").event("<p>").end(),
        ),
        (
            "a line without end",
            UpstreamFailed,
            head().forever(chunk(&"x".repeat(4096)), Duration::ZERO),
        ),
        (
            "a text without end",
            UpstreamFailed,
            head().forever(chunk(TOKEN), Duration::ZERO),
        ),
    ]);
    check(true, |_| (), cases).await;
}

#[tokio::test]
async fn a_whole_answer_that_takes_too_long_ends_at_a_deadline() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n";
    let adjust = |config: &mut UpstreamConfig| {
        config.total_timeout = 10_000 * MS;
        config.token_timeout = 3000 * MS;
    };
    let cases = vec![
        ("silence", UpstreamTimeout, Reply::default().hang()),
        (
            "a head byte by byte",
            UpstreamTimeout,
            Reply::raw("HTTP/1.1 200 OK\r\nx: ").forever("x", 20 * MS),
        ),
        (
            "silence in the body",
            UpstreamTimeout,
            Reply::raw(format!("{head}{{")).hang(),
        ),
        (
            "a body byte by byte",
            UpstreamTimeout,
            Reply::raw(head).forever(" ", 20 * MS),
        ),
    ];
    check(false, adjust, cases).await;
}

#[tokio::test]
async fn a_streamed_answer_that_takes_too_long_ends_at_a_deadline() {
    let adjust = |config: &mut UpstreamConfig| {
        config.first_token_timeout = 3000 * MS;
        config.token_timeout = 3000 * MS;
        config.total_timeout = 10_000 * MS;
    };
    let head = Reply::stream_head;
    let cases = vec![
        ("silence", UpstreamTimeout, Reply::default().hang()),
        (
            "a head byte by byte",
            UpstreamTimeout,
            Reply::raw("HTTP/1.1 200 OK\r\nx: ").forever("x", 20 * MS),
        ),
        (
            "a head and no token",
            UpstreamTimeout,
            head().delta("").hang(),
        ),
        (
            "comments for ever",
            UpstreamTimeout,
            head().forever(chunk(COMMENT), 20 * MS),
        ),
        (
            "silence after a token",
            UpstreamTimeout,
            head().delta("He").hang(),
        ),
        (
            "comments after a token",
            UpstreamTimeout,
            head().delta("He").forever(chunk(COMMENT), 20 * MS),
        ),
        (
            "a token now and then for ever",
            UpstreamTimeout,
            head().forever(chunk(TOKEN), 20 * MS),
        ),
    ];
    check(true, adjust, cases).await;
}

#[tokio::test]
async fn a_refused_connection_is_a_failure_and_a_silent_one_a_timeout() {
    let upstream = Upstream::start().await;
    let mut config = config(&upstream);
    upstream.stop().await;
    let failure = Watched::new(&config).ask().await.unwrap_err();
    assert_eq!(failure.code, UpstreamFailed);

    let silent = Silent::new();
    config.endpoints[0] = silent.endpoint();
    config.connect_timeout = 300 * MS;
    let failure = Watched::new(&config).ask().await.unwrap_err();
    assert_eq!(failure.code, UpstreamTimeout);
}

/// A listener whose queue is full, so the kernel accepts no further connection.
struct Silent {
    addr: SocketAddr,
    _held: (socket2::Socket, Vec<TcpStream>),
}

impl Silent {
    fn new() -> Self {
        let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let full = full.unwrap();
        full.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
            .unwrap();
        full.listen(0).unwrap();
        let addr = full.local_addr().unwrap().as_socket().unwrap();
        let held = (0..4).map_while(|_| TcpStream::connect_timeout(&addr, 200 * MS).ok());
        let held = held.collect();
        Self {
            addr,
            _held: (full, held),
        }
    }

    fn endpoint(&self) -> Endpoint {
        super::primary(&format!("http://{}", self.addr), None)
    }
}

#[tokio::test]
async fn an_attempt_without_a_connection_costs_nothing_however_it_ends() {
    let (upstream, silent) = (Upstream::start().await, Silent::new());
    let mut config = config(&upstream);
    config.endpoints[0] = silent.endpoint();
    let client = Watched::new(&config);
    let question = client.question("the-prompt");
    let attempts = question.attempts.clone();
    let permit = client.client.admit(USER).unwrap();
    let call = client.client.complete(permit, memory(), question, None);
    // The caller leaves.
    assert!(tokio::time::timeout(100 * MS, call).await.is_err());
    assert_eq!(client.ended("\"cancelled\""), 1);
    assert_eq!(attempts.attempts(), []);

    config.total_timeout = 100 * MS;
    let failure = Watched::new(&config).ask().await.unwrap_err();
    assert_eq!((failure.code, failure.attempts), (UpstreamTimeout, vec![]));
}
