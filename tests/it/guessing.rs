//! Bursts of logins: what clients that disconnect cost, and what they cost others.

use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::{App, PASSWORD, behind_proxy, spawn_app};

/// Posts JSON from an address, and returns the connection without reading the response.
async fn post(app: &App, path: &str, address: &str, body: &serde_json::Value) -> TcpStream {
    let body = body.to_string();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {}\r\nX-Forwarded-For: {address}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        app.addr,
        body.len(),
    );
    let mut stream = TcpStream::connect(app.addr).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

async fn login_status(app: &App, address: &str, name: &str, password: &str) -> u16 {
    let body = json!({ "username": name, "password": password });
    let login = app.post("/api/auth/login/").json(&body);
    login.header("x-forwarded-for", address).send().await.status
}

#[tokio::test]
async fn wrong_logins_of_clients_that_disconnect_are_counted() {
    let app = spawn_app(behind_proxy).await;
    app.register("alice").await;
    let wrong = json!({ "username": "alice", "password": "guess" });
    let mut hung_up = 0;
    // Each connection is closed as soon as its request is sent, so most responses have no receiver.
    eventually!({
        drop(post(&app, "/api/auth/login/", "198.51.100.1", &wrong).await);
        hung_up += 1;
        let refused = app.metric("login_failures_total{reason=\"refused\"}").await;
        refused.is_some_and(|refused| refused > 0.0)
    });
    assert!(hung_up > 10, "ten failures are reported as such");
    let status = login_status(&app, "198.51.100.1", "alice", PASSWORD).await;
    assert_eq!(status, 429);
    let failures = app.metric("login_failures_total{reason=\"wrong\"}").await;
    assert_eq!(failures, Some(10.0));
    let elsewhere = login_status(&app, "198.51.100.2", "alice", PASSWORD).await;
    assert_eq!(elsewhere, 200);
}

#[tokio::test]
async fn right_logins_of_clients_that_disconnect_lock_no_user_out() {
    let app = spawn_app(behind_proxy).await;
    app.register("alice").await;
    let right = json!({ "username": "alice", "password": PASSWORD });
    for _ in 0..15 {
        drop(post(&app, "/api/auth/login/", "198.51.100.1", &right).await);
    }
    let status = login_status(&app, "198.51.100.1", "alice", PASSWORD).await;
    assert_eq!(status, 200);
    let failures = app.metric("login_failures_total{reason=\"wrong\"}").await;
    assert_eq!(failures.unwrap_or_default(), 0.0);
}

#[tokio::test]
async fn registrations_of_clients_that_disconnect_are_counted() {
    let app = spawn_app(|config| {
        behind_proxy(config);
        config.accounts.register_throttle = "3/h".parse().unwrap();
    })
    .await;
    let address = "198.51.100.1";
    let new = |name: &str| json!({ "username": name, "email": "a@b.c", "password": PASSWORD });
    eventually!({
        drop(post(&app, "/api/auth/register/", address, &new("gone")).await);
        let throttled = "throttled_requests_total{throttle=\"register\"}";
        app.metric(throttled).await.is_some_and(|n| n > 0.0)
    });
    let register = app.post("/api/auth/register/").json(&new("bob"));
    let refused = register.header("x-forwarded-for", address).send().await;
    assert_eq!(refused.status, 429);
}

#[tokio::test]
async fn registrations_from_the_networks_of_one_ipv6_site_are_counted_together() {
    let app = spawn_app(|config| {
        behind_proxy(config);
        config.accounts.register_throttle = "2/h".parse().unwrap();
    })
    .await;
    let register = async |address: &str| {
        // Its fields are refused after it was counted, so no password is hashed.
        let register = app.post("/api/auth/register/").json(&json!({}));
        register
            .header("x-forwarded-for", address)
            .send()
            .await
            .status
    };
    assert_eq!(register("2001:db8:1:1::1").await, 400);
    assert_eq!(register("2001:db8:1:2::1").await, 400);
    assert_eq!(register("2001:db8:1:3::1").await, 429);
    assert_eq!(register("2001:db8:2:1::1").await, 400);
}

#[tokio::test]
async fn login_from_another_site_waits_only_for_a_few_of_a_burst() {
    let app = spawn_app(behind_proxy).await;
    app.register("alice").await;
    let mut burst = JoinSet::new();
    for n in 0..24 {
        let body = json!({ "username": format!("name{n}"), "password": "guess" });
        let login = app.post("/api/auth/login/").json(&body);
        let address = format!("198.51.100.{}", n % 3);
        burst.spawn(login.header("x-forwarded-for", &address).send());
    }
    // At the first outcome the others wait for their turn.
    assert_eq!(burst.join_next().await.unwrap().unwrap().status, 401);
    let status = login_status(&app, "203.0.113.1", "alice", PASSWORD).await;
    assert_eq!(status, 200);
    let done = app.metric("login_failures_total{reason=\"wrong\"}").await;
    assert!(done < Some(16.0), "{done:?} of the burst came first");
    while let Some(answer) = burst.join_next().await {
        assert_eq!(answer.unwrap().status, 401);
    }
}
