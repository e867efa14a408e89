//! Metrics, health and the log.

use std::collections::BTreeSet;

use hyper::Method;
use serde_json::json;

use crate::support::{Client, PASSWORD, spawn_app};

#[tokio::test]
async fn events_are_counted() {
    let app = spawn_app(|config| config.prompt_throttle = "2/day".parse().unwrap()).await;
    let user = app.user("alice").await;
    user.prompt("counted").await;
    user.search("counted", 5).await;
    user.try_prompt("").await;
    user.try_prompt("refused").await;
    app.try_login("alice", "wrong").await;
    let bearer = format!("Bearer {}", user.access);
    let mut socket = app
        .socket("/ws/prompts/", &[("authorization", &bearer)])
        .await
        .unwrap();
    socket.next_json().await;
    app.get("/readyz").send().await;
    for (series, value) in [
        (
            "http_requests_total{method=\"POST\",route=\"/api/prompts\",status=\"201\"}",
            1.0,
        ),
        (
            "http_requests_total{method=\"POST\",route=\"/api/prompts\",status=\"400\"}",
            1.0,
        ),
        (
            "http_requests_total{method=\"POST\",route=\"/api/prompts\",status=\"429\"}",
            1.0,
        ),
        (
            "http_requests_total{method=\"GET\",route=\"/api/prompts/similar\",status=\"200\"}",
            1.0,
        ),
        (
            "http_request_duration_seconds_count{method=\"POST\",route=\"/api/prompts\"}",
            3.0,
        ),
        ("prompts_total{status=\"completed\"}", 1.0),
        ("throttled_requests_total{throttle=\"prompts\"}", 1.0),
        ("login_failures_total{reason=\"wrong\"}", 1.0),
        ("embedding_duration_seconds_count{purpose=\"post\"}", 1.0),
        ("embedding_duration_seconds_count{purpose=\"search\"}", 1.0),
        ("embedding_queue_depth", 0.0),
        ("search_duration_seconds_count{scope=\"own\"}", 1.0),
        ("search_vectors", 1.0),
        ("search_evicted_users", 0.0),
        ("reembedding_remaining_prompts", 0.0),
        ("backend_up{backend=\"store\"}", 1.0),
    ] {
        assert_eq!(app.metric(series).await, Some(value), "{series}");
    }
    eventually!(app.metric("store_queue_depth").await == Some(0.0));
    eventually!(app.metric("websockets_open").await == Some(1.0));
    socket.close().await;
    eventually!(app.metric("websockets_open").await == Some(0.0));
    let text = app.get("/metrics").send().await.text();
    for family in [
        "gen_ai_client_operation_duration_seconds_count{",
        "embedding_batch_texts_count ",
        "prompt_service_build_info{",
        "startup_duration_seconds ",
        "process_resident_memory_bytes ",
        "process_open_fds ",
        "process_cpu_seconds_total ",
    ] {
        assert!(
            text.lines().any(|line| line.starts_with(family)),
            "{family}"
        );
    }
}

#[tokio::test]
async fn no_label_has_a_value_chosen_by_a_client() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("mallory").await;
    let id = user.prompt("xyzzy").await;
    for (method, path) in [
        ("BREW", "/xyzzy"),
        ("XYZZY", "/api/prompts/"),
        ("PROPFIND", "/healthz"),
        ("GET", "/xyzzy/xyzzy"),
        ("GET", "/api/prompts/xyzzy"),
        ("GET", "/assets/xyzzy.js"),
        ("GET", "/api/prompts/similar?q=xyzzy&xyzzy=1"),
        ("GET", &format!("/api/prompts/{id}")),
    ] {
        let request = user.client.request(method.parse().unwrap(), path);
        request
            .header("x-request-id", "xyzzy")
            .header("user-agent", "xyzzy")
            .send()
            .await;
    }
    let answer = app.get("/metrics").send().await;
    assert_eq!(
        answer.header("content-type"),
        Some("text/plain; version=0.0.4; charset=utf-8")
    );
    let text = answer.text();
    for chosen in ["xyzzy", "XYZZY", "BREW", "PROPFIND", "mallory", "127.0.0.1"] {
        assert!(!text.contains(chosen), "{chosen}");
    }
    for series in [
        "http_requests_total{method=\"other\",route=\"unmatched\",status=\"404\"}",
        "http_requests_total{method=\"other\",route=\"/api/prompts\",status=\"405\"}",
        "http_requests_total{method=\"other\",route=\"/healthz\",status=\"405\"}",
    ] {
        assert_eq!(app.metric(series).await, Some(1.0), "{series}");
    }
    let unmatched = "http_requests_total{method=\"GET\",route=\"unmatched\",status=\"404\"}";
    assert_eq!(app.metric(unmatched).await, Some(2.0));
    let routes: BTreeSet<&str> = text
        .split("route=\"")
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap())
        .collect();
    let known = [
        "/api/auth/login",
        "/api/auth/register",
        "/api/prompts",
        "/api/prompts/similar",
        "/api/prompts/{id}",
        "/healthz",
        "unmatched",
    ];
    assert_eq!(routes, known.into_iter().collect());
}

#[tokio::test]
async fn metrics_may_have_a_separate_listener() {
    let app = spawn_app(|config| config.server.metrics_addr = "127.0.0.1:0".parse().ok()).await;
    let metrics = Client::new(app.metrics_addr.unwrap());
    assert_eq!(app.get("/metrics").send().await.status, 404);
    for path in ["/metrics", "/metrics/", "/healthz", "/readyz/"] {
        assert_eq!(metrics.get(path).send().await.status, 200, "{path}");
    }
    for path in [
        "/",
        "/api/prompts/",
        "/api/auth/me/",
        "/docs",
        "/schema",
        "/ws/prompts/",
    ] {
        assert_eq!(metrics.get(path).send().await.status, 404, "{path}");
    }
    assert_eq!(
        app.get("/healthz").send().await.status,
        200,
        "health is told on both"
    );
    let on_main = "http_requests_total{method=\"GET\",route=\"unmatched\",status=\"404\"}";
    assert_eq!(app.metric(on_main).await, Some(7.0), "one count over both");
}

#[tokio::test]
async fn metrics_listener_works_while_all_connections_are_taken() {
    let app = spawn_app(|config| {
        config.server.metrics_addr = "127.0.0.1:0".parse().ok();
        config.server.max_connections = 1;
    })
    .await;
    // The client keeps its connection, which is the only one allowed.
    assert_eq!(app.get("/healthz").send().await.status, 200);
    assert!(app.metric("http_connections").await.is_some());
    assert_eq!(app.get("/healthz").send().await.status, 200);
}

#[tokio::test]
async fn health_of_the_store_is_watched_without_requests() {
    let app = spawn_app(|_| ()).await;
    assert_eq!(app.metric("backend_up{backend=\"store\"}").await, Some(1.0));
}

#[tokio::test]
async fn health_names_the_model_and_no_host_or_path() {
    let app = spawn_app(|_| ()).await;
    let alive = app.get("/healthz").send().await;
    assert_eq!(
        (alive.status, alive.json()),
        (200, json!({ "status": "ok" }))
    );
    let ready = app.get("/readyz").send().await;
    assert_eq!(ready.status, 200);
    let body = ready.json();
    assert_eq!(body["status"], "ready");
    assert_eq!(
        body["parts"],
        json!({ "model": "ok", "store": "ok", "vectors": "ok" })
    );
    assert!(
        body["model"]
            .as_str()
            .unwrap()
            .starts_with("all-MiniLM-L6-v2"),
        "{body}"
    );
    let folder = app.folder.path().to_str().unwrap();
    assert!(!ready.text().contains(folder) && !ready.text().contains("127.0.0.1"));
}

#[tokio::test]
async fn a_request_is_one_line_in_the_log() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let traced = |request: crate::support::Request, id: &str| request.header("x-request-id", id);
    traced(user.get("/api/prompts/7/?trace=1"), "one")
        .send()
        .await;
    traced(app.client().request(Method::GET, "/nowhere"), "two")
        .send()
        .await;
    for (id, route, status, user_id) in [
        ("one", "/api/prompts/{id}", 404, json!(user.id)),
        ("two", "unmatched", 404, json!(null)),
    ] {
        eventually!(app.log.request(id).is_some());
        let line = app.log.request(id).unwrap();
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["message"], "request");
        assert_eq!(
            (&line["method"], &line["route"]),
            (&json!("GET"), &json!(route)),
            "{line}"
        );
        assert_eq!(
            (&line["status"], &line["user_id"]),
            (&json!(status), &user_id),
            "{line}"
        );
        assert!(line["duration_ms"].as_f64().unwrap() >= 0.0);
        for key in ["timestamp", "target"] {
            assert!(line[key].is_string(), "{line}");
        }
        let lines = app.log.lines();
        assert_eq!(
            lines.iter().filter(|line| line["request_id"] == id).count(),
            1
        );
    }
}

#[tokio::test]
async fn no_secret_and_no_prompt_is_ever_logged() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let (session, _) = app.login_session("alice").await;
    user.prompt("sesame opens").await;
    user.search("sesame query", 5).await;
    app.try_login("alice", "sesame-password").await;
    let ticket = user.post("/api/auth/ws-ticket/").send().await.json();
    let ticket = ticket["ticket"].as_str().unwrap();
    app.socket(&format!("/ws/prompts/?ticket={ticket}"), &[])
        .await
        .unwrap()
        .close()
        .await;
    app.socket(&format!("/ws/prompts/?token={}", user.access), &[])
        .await
        .unwrap()
        .close()
        .await;
    let protocols = format!("bearer, {}", user.access);
    let headers = [("sec-websocket-protocol", protocols.as_str())];
    app.socket("/ws/prompts/", &headers)
        .await
        .unwrap()
        .close()
        .await;
    let cookie = format!("session={session}");
    for (kind, body) in [
        ("application/json", "{\"prompt\": \"sesame"),
        ("text/sesame", "sesame"),
    ] {
        user.post("/api/prompts/").body(kind, body).send().await;
    }
    user.get("/api/prompts/?cursor=sesame")
        .header("cookie", &cookie)
        .send()
        .await;
    user.get("/sesame/?sesame=1")
        .header("referer", "http://sesame/")
        .send()
        .await;
    let refresh = json!({ "refresh": user.refresh });
    app.post("/api/auth/refresh/").json(&refresh).send().await;
    let last = app
        .post("/api/auth/logout/")
        .header("cookie", &cookie)
        .header("x-request-id", "last");
    last.json(&refresh).send().await;
    eventually!(app.log.request("last").is_some());
    let log = app.log.clone();
    app.stop().await;
    let text = log.text();
    assert!(
        text.contains("socket closed"),
        "the sockets have left their lines"
    );
    let parts: Vec<&str> = user
        .access
        .split('.')
        .chain(user.refresh.split('.'))
        .collect();
    for secret in [
        "sesame",
        PASSWORD,
        "[mock]",
        &session,
        ticket,
        "example.org",
        "$argon2id",
    ]
    .into_iter()
    .chain(parts.into_iter().filter(|part| part.len() > 40))
    {
        assert!(!text.contains(secret), "{secret} is in the log");
    }
}
