//! Tokens and the clock: those dated ahead of it, and those logged out while it is wrong.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use prompt_service::app::users;
use prompt_service::cli::UserCommand;
use prompt_service::credentials::TokenType;
use prompt_service::domain::Timestamp;
use serde_json::{Value, json};

use crate::support::{App, Response, config_in, spawn_app};

const HOUR: Duration = Duration::from_secs(3600);

/// Carries out one of the operator's commands beside the running service.
async fn operator(app: &App, command: UserCommand) {
    let mut config = config_in(app.folder.path());
    config.store = app.folder.store_config().await;
    users::run(command, &config, &mut Vec::new()).await.unwrap();
}

fn in_seconds(seconds: i64) -> Timestamp {
    Timestamp(Timestamp::now().0 + seconds * 1_000_000)
}

async fn me(app: &App, access: &str) -> Response {
    app.get("/api/auth/me/").bearer(access).send().await
}

async fn refresh(app: &App, token: &str) -> Response {
    let body = json!({ "refresh": token });
    app.post("/api/auth/refresh/").json(&body).send().await
}

async fn log_out(app: &App, token: &str) {
    let body = json!({ "refresh": token });
    let answer = app.post("/api/auth/logout/").json(&body).send().await;
    assert_eq!(answer.status, 204);
}

fn message(answer: &Response) -> Value {
    assert_eq!(answer.status, 401, "{answer:?}");
    answer.json()["messages"][0]["message"].clone()
}

/// Whether the token is remembered as logged out.
async fn is_revoked(app: &App, token: &str) -> bool {
    let payload = token.split('.').nth(1).unwrap();
    let payload = URL_SAFE_NO_PAD.decode(payload).unwrap();
    let claims: Value = serde_json::from_slice(&payload).unwrap();
    let store = app.folder.store().await;
    let jti = claims["jti"].as_str().unwrap();
    store.is_token_revoked(jti).await.unwrap()
}

#[tokio::test]
async fn a_token_from_the_future_is_invalid_everywhere() {
    let app = spawn_app(|_| ()).await;
    let alice = app.user("alice").await;
    for seconds in [60, 600, 172_800] {
        let token = |kind| app.token(kind, alice.id, in_seconds(seconds), HOUR);
        let access = token(TokenType::Access);
        assert_eq!(message(&me(&app, &access).await), "Token is invalid");
        let path = format!("/ws/prompts/?token={access}");
        let refused = app.socket(&path, &[]).await.err().unwrap();
        assert_eq!(message(&refused), "Token is invalid");
        let refused = refresh(&app, &token(TokenType::Refresh)).await;
        let invalid = json!({ "detail": "Token is invalid", "code": "token_not_valid" });
        assert_eq!((refused.status, refused.json()), (401, invalid));
    }
}

#[tokio::test]
async fn token_dated_slightly_ahead_is_valid_at_once() {
    let app = spawn_app(|_| ()).await;
    let alice = app.user("alice").await;
    let token = |kind| app.token(kind, alice.id, in_seconds(2), HOUR);
    assert_eq!(me(&app, &token(TokenType::Access)).await.status, 200);
    assert_eq!(refresh(&app, &token(TokenType::Refresh)).await.status, 200);
}

#[tokio::test]
async fn disabling_and_enabling_ends_tokens_dated_slightly_ahead() {
    let app = spawn_app(|_| ()).await;
    let alice = app.user("alice").await;
    let username = || "alice".to_owned();
    let access = app.token(TokenType::Access, alice.id, in_seconds(2), HOUR);
    let token = app.token(TokenType::Refresh, alice.id, in_seconds(2), HOUR);
    assert_eq!(me(&app, &access).await.status, 200);
    operator(
        &app,
        UserCommand::Disable {
            username: username(),
        },
    )
    .await;
    operator(
        &app,
        UserCommand::Enable {
            username: username(),
        },
    )
    .await;
    // What was known of the account is believed for a moment.
    eventually!(me(&app, &access).await.status == 401);
    assert_eq!(message(&me(&app, &access).await), "Token is revoked");
    assert_eq!(
        refresh(&app, &token).await.json()["detail"],
        "Token is revoked"
    );
    // What is given from now on counts at once.
    let (access, token) = app.login("alice").await;
    assert_eq!(me(&app, &access).await.status, 200);
    assert_eq!(refresh(&app, &token).await.status, 200);
    let (session, _) = app.login_session("alice").await;
    let cookie = format!("session={session}");
    let headers = [
        ("cookie", cookie.as_str()),
        ("origin", &format!("http://{}", app.addr)),
    ];
    assert!(app.socket("/ws/prompts/", &headers).await.is_ok());
}

#[tokio::test]
async fn credentials_given_right_after_a_change_are_valid_at_once() {
    let app = spawn_app(|_| ()).await;
    let alice = app.user("alice").await;
    for _ in 0..3 {
        // From here on the account is remembered as it was before the change.
        me(&app, &alice.access).await;
        for command in [
            UserCommand::Disable {
                username: "alice".to_owned(),
            },
            UserCommand::Enable {
                username: "alice".to_owned(),
            },
        ] {
            operator(&app, command).await;
        }
        let (access, token) = app.login("alice").await;
        assert_eq!(me(&app, &access).await.status, 200);
        assert_eq!(refresh(&app, &token).await.status, 200);
        let ticket = app
            .post("/api/auth/ws-ticket/")
            .bearer(&access)
            .send()
            .await;
        assert_eq!(ticket.status, 201);
    }
}

#[tokio::test]
async fn an_account_changed_by_a_clock_far_ahead_can_still_log_in() {
    let app = spawn_app(|_| ()).await;
    let alice = app.user("alice").await;
    let store = app.folder.store().await;
    let id = prompt_service::domain::UserId(alice.id);
    for active in [false, true] {
        let changed = store.set_active(id, active, in_seconds(172_800)).await;
        assert!(changed.unwrap());
    }
    eventually!(me(&app, &alice.access).await.status == 401);
    let (access, token) = app.login("alice").await;
    assert_eq!(me(&app, &access).await.status, 200);
    assert_eq!(refresh(&app, &token).await.status, 200);
}

#[tokio::test]
async fn token_logged_out_while_the_clock_is_wrong_stays_revoked() {
    let app = spawn_app(|_| ()).await;
    let alice = app.user("alice").await;
    // By a clock that is two days ahead a token of today has expired.
    let over = app.token(TokenType::Refresh, alice.id, in_seconds(-172_800), HOUR);
    // By one that is two days behind it is from the future.
    let to_come = app.token(TokenType::Refresh, alice.id, in_seconds(172_800), HOUR);
    for token in [&over, &to_come] {
        log_out(&app, token).await;
        assert!(is_revoked(&app, token).await);
    }
    // An access token cannot be logged out, and what is not ours is not remembered.
    let access = app.token(TokenType::Access, alice.id, in_seconds(0), HOUR);
    log_out(&app, &access).await;
    assert!(!is_revoked(&app, &access).await);
}
