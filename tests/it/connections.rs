//! Connections that keep others out: silent ones, unfinished requests, and answers that nobody
//! reads.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{App, Client, DEADLINE, Gate, Reply, Upstream, User, spawn_app};

/// A connection that sends nothing.
async fn silent(app: &App) -> TcpStream {
    TcpStream::connect(app.addr).await.unwrap()
}

/// A connection that has sent a request's head and half of its body. The service is reading the
/// body when this returns.
async fn half_sent(app: &App) -> TcpStream {
    let mut stream = silent(app).await;
    let request = "POST /api/auth/register/ HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n\
                   expect: 100-continue\r\ncontent-length: 100\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut go_on = [0; 25];
    stream.read_exact(&mut go_on).await.unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"{\"username\": \"").await.unwrap();
    stream
}

/// Waits for the other side to end the connection.
async fn is_closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let reading = stream.read_to_end(&mut rest);
    // A reset is an end too.
    let _ = tokio::time::timeout(DEADLINE, reading)
        .await
        .expect("the connection is closed");
}

#[tokio::test]
async fn silent_connections_make_room_for_others() {
    let app = spawn_app(|config| config.server.max_connections = 8).await;
    let mut silent_ones = Vec::new();
    for _ in 0..8 {
        silent_ones.push(silent(&app).await);
    }
    let alice = app.user("alice").await;
    assert_eq!(
        Client::new(app.addr).get("/healthz").send().await.status,
        200
    );
    alice.prompt("answered all the same").await;
    is_closed(&mut silent_ones[0]).await;
    let ended = "http_connections_ended_total{reason=\"made_room\"}";
    assert!(app.metric(ended).await >= Some(1.0));
}

#[tokio::test]
async fn network_at_its_bound_makes_room_by_closing_its_own_connections() {
    let app = spawn_app(|config| config.server.max_connections_per_network = 4).await;
    let mut kept = Vec::new();
    for _ in 0..12 {
        kept.push(silent(&app).await);
    }
    for stream in &mut kept[..8] {
        is_closed(stream).await;
    }
    eventually!(app.metric("http_connections").await <= Some(4.0));
}

#[tokio::test]
async fn if_all_connections_are_busy_only_health_checks_are_served() {
    let app = spawn_app(|config| config.server.max_connections = 3).await;
    let mut busy = Vec::new();
    for _ in 0..3 {
        busy.push(half_sent(&app).await);
    }
    for path in ["/healthz", "/readyz/", "/metrics"] {
        let answer = Client::new(app.addr).get(path).send().await;
        assert_eq!(answer.status, 200, "{path}");
        assert_eq!(answer.header("connection"), Some("close"), "{path}");
    }
    let refused = Client::new(app.addr).get("/api/auth/me/").send().await;
    assert_eq!(refused.status, 503);
    assert_eq!(refused.json()["code"], "overloaded");
    assert!(refused.header("retry-after").is_some());
    // A request that is finished frees its connection for others.
    let rest = b"x\", \"email\": \"a@b.c\", \"password\": \"correct horse battery\"  ";
    for stream in &mut busy {
        let body_left = 100 - "{\"username\": \"".len();
        let mut padded = rest.to_vec();
        padded.resize(body_left - 1, b' ');
        padded.push(b'}');
        stream.write_all(&padded).await.unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
    }
    let answer = Client::new(app.addr).get("/").send().await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn a_trusted_proxy_is_not_bounded_as_one_network() {
    let app = spawn_app(|config| {
        config.server.max_connections_per_network = 2;
        config.server.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    })
    .await;
    let mut through_proxy = Vec::new();
    for _ in 0..6 {
        through_proxy.push(half_sent(&app).await);
    }
    eventually!(app.metric("http_connections").await >= Some(7.0));
    assert_eq!(app.get("/").send().await.status, 200);
}

#[tokio::test]
async fn head_with_a_long_query_is_read_and_an_endless_one_is_refused() {
    let app = spawn_app(|_| ()).await;
    let alice = app.user("alice").await;
    let query = "x".repeat(30_000);
    let answer = alice
        .get(&format!("/api/prompts/similar/?q={query}"))
        .header("x-filler", &"y".repeat(30_000))
        .send()
        .await;
    assert_eq!(answer.status, 200);
    let refused = alice
        .get("/api/prompts/")
        .header("x-filler", &"y".repeat(200_000))
        .send()
        .await;
    assert_eq!(refused.status, 431);
    assert_eq!(alice.all_prompts().await, Vec::<serde_json::Value>::new());
}

/// Text that takes six times as many bytes as JSON: the longest answers for what is stored.
fn control_characters(count: usize) -> String {
    "\u{1}".repeat(count)
}

/// A user with that many prompts of the greatest length, of control characters.
async fn with_large_prompts(app: &App, name: &str, count: usize) -> User {
    let user = app.user(name).await;
    for n in 0..count {
        user.prompt(&format!("{n} {}", control_characters(31_000)))
            .await;
    }
    user
}

/// A connection that has asked for `path` and reads nothing of the answer.
async fn unread(app: &App, user: &User, path: &str) -> TcpStream {
    let mut stream = silent(app).await;
    let request = format!(
        "GET {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {}\r\n\r\n",
        user.access
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn search_that_finds_long_texts_returns_all_of_them() {
    let app = spawn_app(|_| ()).await;
    let alice = with_large_prompts(&app, "alice", 12).await;
    let found = alice.search("anything", 100).await;
    assert!(found.body.len() > 12 * 31_000 * 2 * 6, "all of it");
    let results = found.json()["results"].clone();
    let results = results.as_array().unwrap();
    assert_eq!(results.len(), 12);
    let scores: Vec<f64> = results
        .iter()
        .map(|r| r["score"].as_f64().unwrap())
        .collect();
    assert!(scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
    let mut ids = found.ids();
    ids.sort_unstable();
    assert_eq!(ids, (1..=12).collect::<Vec<_>>());
    for result in results {
        let shown = alice
            .get(&format!("/api/prompts/{}/", result["id"]))
            .send()
            .await
            .json();
        assert_eq!(result["prompt"], shown["prompt"]);
        assert_eq!(result["response"], shown["response"]);
    }
    eventually!(app.metric("request_memory_bytes").await == Some(0.0));
}

#[tokio::test]
async fn responses_that_are_not_read_leave_memory_for_others() {
    const BUDGET: usize = 16 << 20;
    let app = spawn_app(|config| config.server.request_memory = BUDGET).await;
    let alice = with_large_prompts(&app, "alice", 12).await;
    let bob = app.user("bob").await;
    let mut kept = Vec::new();
    let paths = [
        "/api/prompts/?limit=100",
        "/api/prompts/similar/?q=x&k=100",
        "/api/prompts/1/",
    ];
    let refused = async || alice.get("/api/prompts/1/").send().await;
    eventually!({
        let path = paths[kept.len() % paths.len()];
        kept.push(unread(&app, &alice, path).await);
        refused().await.status == 503
    });
    let refused = refused().await;
    assert_eq!(refused.json()["code"], "overloaded");
    assert!(refused.header("retry-after").is_some());
    assert!(app.metric("request_memory_bytes").await <= Some((BUDGET / 8 * 3) as f64));
    let id = bob.prompt("from somebody else").await;
    assert_eq!(bob.similar("somebody", 1).await, [id]);
    assert_eq!(bob.all_prompts().await.len(), 1);
    drop(kept);
    eventually!(app.metric("request_memory_bytes").await == Some(0.0));
    assert_eq!(alice.all_prompts().await.len(), 12);
}

#[tokio::test]
async fn unfinished_bodies_leave_memory_for_others() {
    const BUDGET: usize = 16 << 20;
    let app = spawn_app(|config| config.server.request_memory = BUDGET).await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let half = vec![b'x'; 500_000];
    let mut kept = Vec::new();
    let mut refused = 0;
    for _ in 0..40 {
        let mut stream = silent(&app).await;
        let head = format!(
            "POST /api/prompts/ HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {}\r\n\
             content-type: application/json\r\ncontent-length: 1000000\r\n\r\n",
            alice.access
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&half).await.unwrap();
        kept.push(stream);
    }
    eventually!(app.metric("request_memory_bytes").await > Some((BUDGET / 4) as f64));
    assert!(app.metric("request_memory_bytes").await <= Some((BUDGET / 8 * 3) as f64));
    bob.prompt("from somebody else").await;
    for mut stream in kept {
        if stream.write_all(&half).await.is_err() {
            continue;
        }
        let mut status = [0; 12];
        if stream.read_exact(&mut status).await.is_ok() && &status == b"HTTP/1.1 503" {
            refused += 1;
        }
    }
    assert!(refused > 0);
    eventually!(app.metric("request_memory_bytes").await == Some(0.0));
}

#[tokio::test]
async fn large_bodies_of_account_routes_and_forms_with_many_fields_are_refused() {
    let app = spawn_app(|_| ()).await;
    let alice = app.user("alice").await;
    let large = format!("{{\"refresh\": \"{}\"}}", "x".repeat(17_000));
    for path in ["register", "login", "refresh", "logout"] {
        let answer = app
            .post(&format!("/api/auth/{path}/"))
            .body("application/json", large.clone())
            .send()
            .await;
        assert_eq!(answer.status, 413, "{path}");
        assert_eq!(
            answer.json()["detail"],
            "The request body is larger than 16 KiB."
        );
    }
    let wide: String = (0..1001).map(|n| format!("f{n}=&")).collect();
    let form = "application/x-www-form-urlencoded";
    let answer = app
        .post("/api/auth/refresh/")
        .body(form, wide.clone())
        .send()
        .await;
    assert_eq!(answer.status, 400);
    assert_eq!(
        answer.json()["detail"],
        "The form has more than 1000 fields."
    );
    let answer = alice.post("/api/prompts/").body(form, wide).send().await;
    assert_eq!(answer.status, 400);
    let parts: String = (0..1001)
        .map(|n| format!("--b\r\ncontent-disposition: form-data; name=\"f{n}\"\r\n\r\n\r\n"))
        .collect();
    let answer = alice
        .post("/api/prompts/")
        .body("multipart/form-data; boundary=b", parts + "--b--\r\n")
        .send()
        .await;
    assert_eq!(
        answer.json()["detail"],
        "The form has more than 1000 fields."
    );
    // Names that nobody asks for are passed over, however many they are.
    let names: String = (0..40_000).map(|n| format!("\"n{n}\": {{}}, ")).collect();
    let body = format!("{{{names}\"prompt\": \"first\", \"\\u0070rompt\": \"last\"}}");
    let answer = alice
        .post("/api/prompts/")
        .body("application/json", body)
        .send()
        .await;
    assert_eq!(answer.status, 201);
    assert_eq!(answer.json()["prompt"], "last");
}

#[tokio::test]
async fn answer_arriving_from_the_upstream_counts_as_memory_in_flight() {
    const PIECE: usize = 100_000;
    let upstream = Upstream::start().await;
    let (begun, gate) = (Gate::new(), Gate::new());
    let streamed = Reply::stream_head()
        .delta(&"x".repeat(PIECE))
        .wait(&begun)
        .delta(&"y".repeat(PIECE))
        .wait(&gate)
        .stop()
        .end();
    upstream.plan(streamed);
    let app = spawn_app(|config| {
        let mut upstream = crate::llm::config(&upstream);
        upstream.max_response_bytes = 1 << 20;
        config.upstream = Some(upstream);
    })
    .await;
    let alice = app.user("alice").await;
    let body = serde_json::json!({ "prompt": "Why?", "stream": true });
    let mut stream = alice.post("/api/prompts/").json(&body).open().await;
    let held = async || app.metric("request_memory_bytes").await.unwrap() as usize;
    // The text is held by the reader of the answer, and for those who read it.
    eventually!(held().await >= 2 * PIECE);
    begun.open();
    eventually!(held().await >= 4 * PIECE);
    gate.open();
    stream.rest().await;
    drop(stream);
    eventually!(held().await == 0);
}
