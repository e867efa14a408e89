//! Getting an access token by the password grant of OAuth 2, as "Authorize" in Swagger UI does.

use prompt_service::config::Config;
use prompt_service::domain::{Timestamp, UserId};
use serde_json::json;

use crate::support::{App, PASSWORD, Response, spawn_app};

/// What Swagger UI sends: a form, and an `Authorization` header for a client without id and secret.
async fn ask(app: &App, form: &str) -> Response {
    let request = app
        .post("/api/auth/token/")
        .header("authorization", "Basic Og==")
        .header("accept", "application/json, text/plain, */*");
    request
        .body("application/x-www-form-urlencoded", form.to_owned())
        .send()
        .await
}

fn form(name: &str, password: &str) -> String {
    let password = password.replace(' ', "+");
    format!("grant_type=password&username={name}&password={password}&scope=&client_id=")
}

#[tokio::test]
async fn name_and_password_return_only_an_access_token() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let answer = ask(&app, &form("alice", PASSWORD)).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    assert_eq!(answer.header("set-cookie"), None);
    let token = answer.json();
    assert_eq!(token["token_type"], "Bearer");
    assert_eq!(token["expires_in"], 300);
    let keys: Vec<&String> = token.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["access_token", "expires_in", "token_type"]);
    let access = token["access_token"].as_str().unwrap();
    let me = app.get("/api/auth/me/").bearer(access).send().await;
    assert_eq!((me.status, &me.json()["id"]), (200, &json!(user.id)));
    // The other way to log in stays as it is.
    let login = app.try_login("alice", PASSWORD).await.json();
    let keys: Vec<&String> = login.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["access", "refresh"]);
}

#[tokio::test]
async fn errors_have_the_codes_of_oauth() {
    let app = spawn_app(|_| ()).await;
    app.user("alice").await;
    for (form, code) in [
        (form("alice", "another one"), "invalid_grant"),
        (form("nobody", PASSWORD), "invalid_grant"),
        (
            "grant_type=password&username=alice".to_owned(),
            "invalid_request",
        ),
        (
            "grant_type=password&username=&password=x".to_owned(),
            "invalid_request",
        ),
        ("username=alice&password=x".to_owned(), "invalid_request"),
        (String::new(), "invalid_request"),
        (
            "grant_type=refresh_token&refresh_token=x".to_owned(),
            "unsupported_grant_type",
        ),
        (
            "grant_type=client_credentials".to_owned(),
            "unsupported_grant_type",
        ),
    ] {
        let answer = ask(&app, &form).await;
        assert_eq!(answer.status, 400, "{form}: {answer:?}");
        let body = answer.json();
        assert_eq!(body["error"], code, "{form}: {body}");
        assert_eq!(body["error_description"], body["detail"], "{form}: {body}");
        let detail = body["detail"].as_str().unwrap();
        assert!(!detail.is_empty() && !detail.contains(PASSWORD), "{body}");
    }
    let missing = ask(&app, "grant_type=password&username=alice").await.json();
    assert_eq!(missing["detail"], "password: This field is required.");
    // What is no form at all is refused as everywhere.
    let text = app.post("/api/auth/token/").body("text/plain", "hello");
    assert_eq!(text.send().await.status, 415);
}

#[tokio::test]
async fn guesses_count_together_with_those_of_the_login() {
    let behind_proxy = |config: &mut Config| {
        config.server.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    };
    let app = spawn_app(behind_proxy).await;
    app.user("alice").await;
    let from = |request: crate::support::Request| request.header("x-forwarded-for", "203.0.113.9");
    let ask = async |password: &str| {
        let request = from(app.post("/api/auth/token/"));
        let body = json!({ "grant_type": "password", "username": "alice", "password": password });
        request.json(&body).send().await
    };
    let login = async |password: &str| {
        let body = json!({ "username": "alice", "password": password });
        from(app.post("/api/auth/login/")).json(&body).send().await
    };
    for _ in 0..5 {
        assert_eq!(ask("a guess").await.status, 400);
        assert_eq!(login("a guess").await.status, 401);
    }
    for refused in [ask(PASSWORD).await, login(PASSWORD).await] {
        assert_eq!(refused.status, 429, "{refused:?}");
        assert!(refused.header("retry-after").is_some());
        assert!(refused.json()["detail"].is_string());
    }
}

#[tokio::test]
async fn a_disabled_account_gets_no_token() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let store = app.folder.store().await;
    let disabled = store.set_active(UserId(user.id), false, Timestamp::now());
    assert!(disabled.await.unwrap());
    drop(store);
    let answer = ask(&app, &form("alice", PASSWORD)).await;
    assert_eq!(
        (answer.status, &answer.json()["error"]),
        (400, &json!("invalid_grant"))
    );
}
