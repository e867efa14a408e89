//! The log: each line of a request carries its ids, and no line carries a prompt.

use crate::support::{DEADLINE, Reply, Upstream, spawn_app};

#[tokio::test]
async fn access_line_carries_the_ids_of_its_request() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let me = user
        .client
        .get("/api/auth/me")
        .header("x-request-id", "me-1");
    assert_eq!(me.send().await.status, 200);
    let anonymous = app.get("/healthz").header("x-request-id", "anonymous-1");
    assert_eq!(anonymous.send().await.status, 200);
    let line = app.log.request("me-1").unwrap();
    assert_eq!(line["user_id"], user.id);
    assert_eq!(line["route"], "/api/auth/me");
    assert_eq!(line["status"], 200);
    let line = app.log.request("anonymous-1").unwrap();
    assert!(line.get("user_id").is_none(), "{line}");
}

#[tokio::test]
async fn lines_of_a_socket_carry_the_ids_of_the_request_that_opened_it() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let bearer = format!("Bearer {}", user.access);
    let headers = [
        ("authorization", bearer.as_str()),
        ("x-request-id", "socket-1"),
    ];
    let socket = app.socket("/ws/prompts/", &headers).await.unwrap();
    drop(socket);
    eventually!(within DEADLINE; {
        let lines = app.log.lines();
        let closed = lines.iter().find(|line| line["message"] == "socket closed");
        closed.is_some_and(|line| line["request_id"] == "socket-1" && line["user_id"] == user.id)
    });
}

#[tokio::test]
async fn no_line_at_any_level_carries_a_prompt_or_a_query() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let id = user.prompt("a secret question").await;
    for path in [
        format!("/api/prompts/{id}"),
        "/api/prompts".to_owned(),
        "/api/prompts/similar?q=a+secret+search".to_owned(),
    ] {
        assert_eq!(user.client.get(&path).send().await.status, 200, "{path}");
    }
    let log = app.log.text();
    assert!(log.contains("\"route\":\"/api/prompts/similar\""));
    assert!(!log.contains("secret question") && !log.contains("secret search"));
    assert!(!log.contains(&user.access));
}

#[tokio::test]
async fn line_of_a_failed_attempt_carries_the_ids_of_request_user_prompt_and_attempt() {
    let upstream = Upstream::start().await;
    for _ in 0..2 {
        upstream.plan(Reply::error(500, &["retry-after-ms: 1"]));
    }
    let app = spawn_app(|config| {
        let mut upstream = crate::llm::config(&upstream);
        upstream.max_retries = 1;
        config.upstream = Some(upstream);
    })
    .await;
    let user = app.user("alice").await;
    let post = user.client.post("/api/prompts/");
    let post = post.header("x-request-id", "post-1");
    let body = serde_json::json!({ "prompt": "Why?" });
    let answer = post.json(&body).send().await;
    assert_eq!(answer.status, 502);
    let mut failed = app.log.lines();
    failed.retain(|line| line["message"] == "upstream failed");
    assert_eq!(failed.len(), 2);
    for (line, attempt) in failed.iter().zip(1..) {
        assert_eq!(line["request_id"], "post-1");
        assert_eq!(line["user_id"], user.id);
        assert_eq!(line["prompt_id"], answer.json()["id"]);
        assert_eq!(line["attempt"], attempt);
        assert_eq!(line["status"], 500);
    }
}
