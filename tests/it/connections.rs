//! Connections that keep others out: silent ones, unfinished requests, and answers that nobody reads.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{App, Client, DEADLINE, spawn_app};

/// A connection that sends nothing.
async fn silent(app: &App) -> TcpStream {
    TcpStream::connect(app.addr).await.unwrap()
}

/// A connection that has sent a request's head and half of its body. The service is reading the body when this returns.
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
async fn a_network_at_its_bound_makes_room_among_its_own_connections() {
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
async fn where_all_connections_are_busy_health_is_answered_and_everything_else_refused() {
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
async fn a_head_with_a_long_query_is_read_and_one_without_end_refused() {
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
