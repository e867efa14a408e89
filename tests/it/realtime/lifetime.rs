//! When and why an open socket closes, and when it does not.

use std::time::Duration;

use prompt_service::credentials::TokenType;
use prompt_service::domain::{Timestamp, UserId};
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::{assert_open, close_code, open, open_by_cookie, open_with, ticket};
use crate::support::{App, DEADLINE, Socket, User, spawn_app};

/// The lifetime of credentials that expire in a test: long enough for several handshakes, also on a
/// slow machine.
const SHORT: Duration = Duration::from_secs(20);

/// An access token of this user, made now.
fn token(app: &App, user: &User, lifetime: Duration) -> String {
    app.token(TokenType::Access, user.id, Timestamp::now(), lifetime)
}

/// The reply of the service to a new access token.
async fn renew(socket: &mut Socket, access: &str) -> String {
    let frame = json!({ "type": "auth", "token": access });
    socket.send_text(&frame.to_string()).await;
    let answer = socket.next_json().await;
    assert_eq!(answer["type"], "auth", "{answer}");
    answer["status"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn client_is_pinged_and_stays_while_it_replies() {
    let silence = Duration::from_secs(10);
    let app = spawn_app(|config| {
        config.server.socket_timings.ping_every = Duration::from_millis(250);
        config.server.socket_timings.silence = silence;
    })
    .await;
    let alice = app.user("alice").await;
    let mut socket = open(&app, &alice.access).await;
    // The client library replies to pings while it reads. So many pings take longer than a client
    // may be silent.
    for _ in 0..48 {
        let message = socket.next().await;
        assert!(matches!(message, Some(Message::Ping(_))), "{message:?}");
    }
    assert_open(&mut socket, &alice).await;
}

#[tokio::test]
async fn a_silent_client_is_closed() {
    let app = spawn_app(|config| {
        config.server.socket_timings.ping_every = Duration::from_millis(50);
        config.server.socket_timings.silence = Duration::from_millis(300);
        config.server.socket_timings.closing = DEADLINE;
    })
    .await;
    let alice = app.user("alice").await;
    // A socket that is not read from does not reply to pings.
    let mut silent = open(&app, &alice.access).await;
    let closed = "websockets_closed_total{code=\"1011\"}";
    eventually!(app.metric(closed).await == Some(1.0));
    assert_eq!(close_code(&mut silent).await, 1011);
}

#[tokio::test]
async fn client_that_neither_reads_nor_closes_is_dropped() {
    let app = spawn_app(|config| {
        config.server.socket_timings.silence = Duration::from_millis(300);
        config.server.socket_timings.closing = Duration::from_millis(300);
    })
    .await;
    let alice = app.user("alice").await;
    let mut sockets = Vec::new();
    for _ in 0..10 {
        sockets.push(open(&app, &alice.access).await);
    }
    eventually!(app.metric("websockets_open").await == Some(0.0));
    // The HTTP client keeps a few connections open.
    eventually!(app.metric("http_connections").await.unwrap() < 10.0);
}

#[tokio::test]
async fn a_closing_client_gets_its_close_frame_answered() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let mut socket = open(&app, &alice.access).await;
    let frame = CloseFrame {
        code: CloseCode::Library(4000),
        reason: "done".into(),
    };
    socket.send(Message::Close(Some(frame.clone()))).await;
    assert_eq!(socket.next().await, Some(Message::Close(Some(frame))));
    assert_eq!(socket.next().await, None);
    eventually!(app.metric("websockets_open").await == Some(0.0));
}

#[tokio::test]
async fn socket_closes_when_its_token_expires_and_not_before() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let (issued, lifetime) = (Timestamp::now(), SHORT);
    let access = app.token(TokenType::Access, alice.id, issued, lifetime);
    // Claims count whole seconds.
    let expires = Timestamp::from_unix_seconds(issued.unix_seconds()).plus(lifetime);
    let by_ticket = format!("{}?ticket={}", super::PATH, ticket(&app, &access).await);
    let by_query = format!("{}?token={access}", super::PATH);
    let protocol = format!("bearer, {access}");
    let mut sockets = [
        open(&app, &access).await,
        open_with(&app, &by_ticket, &[]).await,
        open_with(&app, &by_query, &[]).await,
        open_with(&app, super::PATH, &[("sec-websocket-protocol", &protocol)]).await,
    ];
    let mut lasting = open(&app, &alice.access).await;
    for socket in &mut sockets {
        assert_eq!(close_code(socket).await, 4401);
        assert!(Timestamp::now() >= expires);
    }
    assert_open(&mut lasting, &alice).await;
}

#[tokio::test]
async fn socket_closes_when_its_session_ends() {
    let app = spawn_app(|config| {
        config.accounts.refresh_token_lifetime = SHORT;
    })
    .await;
    let alice = app.user("alice").await;
    let (session, _) = app.login_session("alice").await;
    let mut lasting = open(&app, &alice.access).await;
    assert_eq!(
        close_code(&mut open_by_cookie(&app, &session).await).await,
        4401
    );
    assert_open(&mut lasting, &alice).await;
}

#[tokio::test]
async fn a_newer_token_of_the_same_user_extends_a_socket() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let short = token(&app, &alice, SHORT);
    let mut extended = open(&app, &short).await;
    let mut other = open(&app, &short).await;
    let long = token(&app, &alice, Duration::from_secs(3600));
    assert_eq!(renew(&mut extended, &long).await, "extended");
    assert_eq!(close_code(&mut other).await, 4401);
    assert_open(&mut extended, &alice).await;
    // A token that expires sooner does not shorten the socket's life.
    let shorter = token(&app, &alice, SHORT - Duration::from_secs(1));
    assert_eq!(renew(&mut extended, &shorter).await, "extended");
    let mut until_shorter_ends = open(&app, &shorter).await;
    assert_eq!(close_code(&mut until_shorter_ends).await, 4401);
    assert_open(&mut extended, &alice).await;
}

#[tokio::test]
async fn no_other_token_extends_a_socket() {
    let app = spawn_app(|_| {}).await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let mut socket = open(&app, &token(&app, &alice, SHORT)).await;
    for refused in [
        bob.access.as_str(),
        &alice.refresh,
        &app.expired_token(alice.id),
        &ticket(&app, &alice.access).await,
        "garbage",
        "",
    ] {
        assert_eq!(renew(&mut socket, refused).await, "refused");
    }
    let mut bobs = open(&app, &bob.access).await;
    // The socket is still Alice's, with the same expiry as before.
    let event = super::announce(&alice, "hers").await;
    super::assert_next(&mut socket, &event).await;
    assert_open(&mut bobs, &bob).await;
    assert_eq!(close_code(&mut socket).await, 4401);
}

#[tokio::test]
async fn logging_out_closes_the_sockets_of_that_session_alone() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let (ended, _) = app.login_session("alice").await;
    let (kept, _) = app.login_session("alice").await;
    let mut by_ended = open_by_cookie(&app, &ended).await;
    let mut renewed = open_by_cookie(&app, &ended).await;
    // A token that expires before the session does not replace it: otherwise a logout would not
    // close this socket.
    assert_eq!(renew(&mut renewed, &alice.access).await, "extended");
    let mut by_kept = open_by_cookie(&app, &kept).await;
    let mut by_token = open(&app, &alice.access).await;
    let logout = app.post("/api/auth/logout/");
    let answer = logout
        .header("cookie", &format!("session={ended}"))
        .send()
        .await;
    assert_eq!(answer.status, 204, "{answer:?}");
    assert_eq!(close_code(&mut by_ended).await, 4401);
    assert_eq!(close_code(&mut renewed).await, 4401);
    let event = super::announce(&alice, "for the others").await;
    super::assert_next(&mut by_kept, &event).await;
    super::assert_next(&mut by_token, &event).await;
}

#[tokio::test]
async fn disabling_a_user_closes_its_sockets() {
    let app = spawn_app(|_| {}).await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let (session, _) = app.login_session("alice").await;
    let mut by_token = open(&app, &alice.access).await;
    let mut by_cookie = open_by_cookie(&app, &session).await;
    let mut bobs = open(&app, &bob.access).await;
    let store = app.folder.store().await;
    let now = Timestamp::now();
    assert!(
        store
            .set_active(UserId(alice.id), false, now)
            .await
            .unwrap()
    );
    assert_eq!(close_code(&mut by_token).await, 4401);
    assert_eq!(close_code(&mut by_cookie).await, 4401);
    assert_open(&mut bobs, &bob).await;
}

#[tokio::test]
async fn a_new_password_closes_the_sockets_opened_before_it() {
    let app = spawn_app(|_| {}).await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let (session, _) = app.login_session("alice").await;
    let mut by_token = open(&app, &alice.access).await;
    let mut by_cookie = open_by_cookie(&app, &session).await;
    let mut bobs = open(&app, &bob.access).await;
    let store = app.folder.store().await;
    let hash = store.user(UserId(alice.id)).await.unwrap().unwrap();
    let now = Timestamp::now();
    store
        .set_password(UserId(alice.id), &hash.password_hash, now)
        .await
        .unwrap();
    assert_eq!(close_code(&mut by_token).await, 4401);
    assert_eq!(close_code(&mut by_cookie).await, 4401);
    assert_open(&mut bobs, &bob).await;
    let (access, _) = app.login("alice").await;
    let mut anew = open(&app, &access).await;
    let again = User {
        client: app.client().with_bearer(&access),
        access,
        ..alice
    };
    assert_open(&mut anew, &again).await;
}

#[tokio::test]
async fn stopping_closes_every_socket_with_a_reason() {
    let mut app = spawn_app(|config| {
        config.server.socket_timings.closing = Duration::from_secs(1);
    })
    .await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let mut sockets = Vec::new();
    for user in [&alice, &bob] {
        for _ in 0..10 {
            sockets.push(open(&app, &user.access).await);
        }
    }
    // This socket is not read from. It must not delay the stop.
    let _stuck = open(&app, &alice.access).await;
    app.begin_stop();
    for socket in &mut sockets {
        assert_eq!(close_code(socket).await, 1001);
    }
    app.stopped().await;
}
