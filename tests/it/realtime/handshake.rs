//! The handshake of a socket and its credentials.

use std::time::Duration;

use prompt_service::credentials::TokenType;
use prompt_service::domain::{Timestamp, UserId};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::{PATH, assert_open, open, ticket};
use crate::support::{App, DEADLINE, Response, Socket, spawn_app};

/// The kinds of credentials in the order in which they count.
const KINDS: [&str; 5] = ["ticket", "subprotocol", "header", "query", "cookie"];

/// A handshake that carries one credential of each of these kinds.
async fn connect(app: &App, credentials: &[(&str, &str)]) -> Result<Socket, Response> {
    let (mut query, mut headers) = (Vec::new(), Vec::new());
    for (kind, secret) in credentials {
        match *kind {
            "ticket" => query.push(format!("ticket={secret}")),
            "query" => query.push(format!("token={secret}")),
            "subprotocol" => {
                headers.push(("sec-websocket-protocol", format!("bearer, {secret}")));
            }
            "header" => headers.push(("authorization", format!("Bearer {secret}"))),
            "cookie" => {
                headers.push(("cookie", format!("session={secret}")));
                headers.push(("origin", format!("http://{}", app.addr)));
            }
            other => panic!("{other} is no kind of credential"),
        }
    }
    let headers: Vec<_> = headers
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    app.socket(&format!("{PATH}?{}", query.join("&")), &headers)
        .await
}

fn assert_refused(answer: Result<Socket, Response>, status: u16, what: &str) {
    let Err(answer) = answer else {
        panic!("{what}: let in");
    };
    assert_eq!(answer.status, status, "{what}: {answer:?}");
    assert!(
        answer.json()["detail"].is_string(),
        "{what}: {}",
        answer.text()
    );
    assert_eq!(
        answer.header("www-authenticate").is_some(),
        status == 401,
        "{what}: {answer:?}"
    );
}

#[tokio::test]
async fn every_kind_of_credential_opens_a_socket_whose_first_frame_says_whose_it_is() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let (session, _) = app.login_session("alice").await;
    for kind in KINDS {
        let secret = match kind {
            "ticket" => ticket(&app, &alice.access).await,
            "cookie" => session.clone(),
            _ => alice.access.clone(),
        };
        let mut socket = connect(&app, &[(kind, &secret)]).await.unwrap();
        let hello = socket.next_json().await;
        assert_eq!(
            hello,
            json!({ "message": "WebSocket connected", "user_id": alice.id }),
            "{kind}"
        );
        let selected = socket.headers.get("sec-websocket-protocol");
        let expected = (kind == "subprotocol").then_some("bearer");
        assert_eq!(
            selected.map(|value| value.to_str().unwrap()),
            expected,
            "{kind}"
        );
        assert_open(&mut socket, &alice).await;
    }
    let bearer = format!("Bearer {}", alice.access);
    let without_slash = app
        .socket("/ws/prompts", &[("authorization", &bearer)])
        .await;
    assert!(without_slash.is_ok());
}

#[tokio::test]
async fn a_ticket_opens_one_socket_however_many_race_for_it() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    for _ in 0..5 {
        let path = format!("{PATH}?ticket={}", ticket(&app, &alice.access).await);
        let mut racers = JoinSet::new();
        for _ in 0..12 {
            let (addr, path) = (app.addr, path.clone());
            racers.spawn(async move { Socket::connect(addr, &path, &[]).await });
        }
        let (let_in, refused): (Vec<_>, Vec<_>) =
            racers.join_all().await.into_iter().partition(Result::is_ok);
        assert_eq!(let_in.len(), 1);
        for answer in refused {
            assert_refused(answer, 401, "a used ticket");
        }
    }
}

#[tokio::test]
async fn first_credential_decides_even_if_a_later_one_is_valid() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let (session, _) = app.login_session("alice").await;
    for (first, kind) in KINDS.into_iter().enumerate() {
        let mut good = Vec::new();
        for kind in KINDS {
            good.push(match kind {
                "ticket" => ticket(&app, &alice.access).await,
                "cookie" => session.clone(),
                _ => alice.access.clone(),
            });
        }
        // Of the kinds from `first` on, first only that one is invalid, then only that one is
        // valid.
        let mixed = |first_is_good: bool| -> Vec<(&str, &str)> {
            (first..KINDS.len())
                .map(|i| {
                    let is_good = (i == first) == first_is_good;
                    (KINDS[i], if is_good { good[i].as_str() } else { "bad" })
                })
                .collect()
        };
        assert_refused(connect(&app, &mixed(false)).await, 401, kind);
        assert!(connect(&app, &mixed(true)).await.is_ok(), "{kind}");
    }
}

#[tokio::test]
async fn invalid_token_is_refused_before_the_upgrade() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let gone = app.user("gone").await;
    app.folder
        .store()
        .await
        .set_active(UserId(gone.id), false, Timestamp::now())
        .await
        .unwrap();
    let unknown = app.token(
        TokenType::Access,
        4711,
        Timestamp::now(),
        Duration::from_secs(60),
    );
    let expired = app.expired_token(alice.id);
    for (what, token) in [
        ("empty", ""),
        ("garbage", "garbage"),
        ("expired", &expired),
        ("refresh token", &alice.refresh),
        ("unknown user", &unknown),
    ] {
        for kind in KINDS {
            // Client libraries do not send `Bearer` without a token; the tests of the header have
            // this case.
            if !(token.is_empty() && kind == "header") {
                let what = format!("{what} as {kind}");
                assert_refused(connect(&app, &[(kind, token)]).await, 401, &what);
            }
        }
    }
    // The cached account may be used for a moment longer.
    eventually!(match connect(&app, &[("query", &gone.access)]).await {
        Err(answer) => answer.status == 401,
        Ok(_) => false,
    });
    assert_refused(connect(&app, &[]).await, 401, "nothing");
    // A truncated and a tampered token, one letter off.
    let mut tampered = alice.access.clone().into_bytes();
    let middle = tampered.len() / 2;
    tampered[middle] = if tampered[middle] == b'A' { b'B' } else { b'A' };
    let tampered = String::from_utf8(tampered).unwrap();
    assert_refused(
        connect(&app, &[("query", &tampered)]).await,
        401,
        "tampered",
    );
}

#[tokio::test]
async fn a_cookie_counts_only_from_pages_of_the_same_host_and_of_allowed_origins() {
    let app = spawn_app(|config| {
        config.server.cors_allowed_origins = vec!["https://app.example".to_owned()];
    })
    .await;
    app.user("alice").await;
    let (session, _) = app.login_session("alice").await;
    let cookie = format!("other=1; session={session}");
    let own = format!("http://{}", app.addr);
    for origin in [own.as_str(), "https://app.example"] {
        let headers = [("cookie", cookie.as_str()), ("origin", origin)];
        assert!(app.socket(PATH, &headers).await.is_ok(), "{origin}");
    }
    let other_port = format!("http://{}:1", app.addr.ip());
    for origin in [
        "https://evil.example",
        "null",
        "",
        other_port.as_str(),
        "https://app.example.evil.example",
        "http://app.example",
    ] {
        let headers = [("cookie", cookie.as_str()), ("origin", origin)];
        assert_refused(app.socket(PATH, &headers).await, 403, origin);
    }
    let absent = app.socket(PATH, &[("cookie", &cookie)]).await;
    assert_refused(absent, 403, "no Origin");
    let spent = app
        .socket(PATH, &[("cookie", "session=spent"), ("origin", &own)])
        .await;
    assert_refused(spent, 401, "a cookie that never was");
}

#[tokio::test]
async fn request_that_asks_for_no_socket_gets_426() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let plain = alice.get(PATH).send().await;
    assert_eq!(plain.status, 426, "{plain:?}");
    assert_eq!(plain.header("upgrade"), Some("websocket"));
    assert!(plain.json()["detail"].is_string());
    let old = alice
        .get(PATH)
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-key", "AAAAAAAAAAAAAAAAAAAAAA==")
        .header("sec-websocket-version", "8")
        .send()
        .await;
    assert_eq!(old.status, 426, "{old:?}");
    assert_eq!(old.header("sec-websocket-version"), Some("13"));
    assert_eq!(alice.post(PATH).send().await.status, 405);
}

#[tokio::test]
async fn a_handshake_may_spread_its_lists_over_several_lines() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    for lines in [
        "Connection: keep-alive\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n",
        "Connection: Upgrade\r\nConnection: keep-alive\r\nUpgrade: WebSocket\r\n",
        "Connection:\tkeep-alive\t,\tupgrade\r\nUpgrade: h2c,websocket\r\n",
    ] {
        let mut stream = TcpStream::connect(app.addr).await.unwrap();
        let request = format!(
            "GET {PATH} HTTP/1.1\r\nHost: {}\r\n{lines}Sec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Protocol: bearer\r\nSec-WebSocket-Protocol: {}\r\n\
             Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
            app.addr, alice.access
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut status = [0; 12];
        let read = tokio::time::timeout(DEADLINE, stream.read_exact(&mut status)).await;
        read.unwrap().unwrap();
        assert_eq!(&status, b"HTTP/1.1 101", "{lines:?}");
    }
}

/// Opens a socket as soon as the service has noticed that others are gone.
async fn connect_when_there_is_room(app: &App, access: &str) -> Socket {
    let mut opened = None;
    eventually!(match connect(app, &[("query", access)]).await {
        Ok(mut socket) => {
            socket.next_json().await;
            opened = Some(socket);
            true
        }
        Err(answer) => {
            assert_eq!(answer.status, 429, "{answer:?}");
            false
        }
    });
    opened.unwrap()
}

#[tokio::test]
async fn failed_handshakes_leave_nothing_behind() {
    let app = spawn_app(|config| config.server.max_sockets_per_user = 2).await;
    let alice = app.user("alice").await;
    let (session, _) = app.login_session("alice").await;
    for _ in 0..5 {
        assert_refused(connect(&app, &[("query", "bad")]).await, 401, "bad");
        let cookie = format!("session={session}");
        let headers = [("cookie", cookie.as_str()), ("origin", "null")];
        assert_refused(app.socket(PATH, &headers).await, 403, "other origin");
        // Valid credentials from a client that disconnects before the response.
        let mut stream = TcpStream::connect(app.addr).await.unwrap();
        let request = format!(
            "GET {PATH}?token={} HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
            alice.access, app.addr
        );
        stream.write_all(request.as_bytes()).await.unwrap();
    }
    let mut first = connect_when_there_is_room(&app, &alice.access).await;
    let second = connect_when_there_is_room(&app, &alice.access).await;
    assert_eq!(app.metric("websockets_open").await, Some(2.0));

    assert_refused(
        connect(&app, &[("query", &alice.access)]).await,
        429,
        "a third",
    );
    let bob = app.user("bob").await;
    let bobs = open(&app, &bob.access).await;
    second.close().await;
    let mut again = connect_when_there_is_room(&app, &alice.access).await;
    let event = super::announce(&alice, "for both").await;
    super::assert_next(&mut first, &event).await;
    super::assert_next(&mut again, &event).await;
    // Clients that disconnect without a close frame.
    drop((first, again, bobs));
    eventually!(app.metric("websockets_open").await == Some(0.0));
}

#[tokio::test]
async fn handshake_of_a_known_user_has_the_headers_of_its_rates() {
    let app = spawn_app(|config| {
        config.server.max_sockets_per_user = 1;
        config.prompt_throttle = "1/s,10/min".parse().unwrap();
    })
    .await;
    let alice = app.user("alice").await;
    let socket = connect(&app, &[("query", &alice.access)]).await;
    let socket = socket.ok().unwrap();
    let refused = connect(&app, &[("query", &alice.access)]).await.err();
    let refused = refused.unwrap();
    assert_eq!(refused.status, 429);
    assert_eq!(refused.header("retry-after"), Some("1"));
    for headers in [&socket.headers, &refused.headers] {
        assert_eq!(
            headers["ratelimit-policy"],
            "\"second\";q=1;w=1, \"minute\";q=10;w=60"
        );
        let left = headers["ratelimit"].to_str().unwrap();
        assert!(left.starts_with("\"minute\";r=10;t="), "{left}");
    }
    let stranger = connect(&app, &[("query", "garbage")]).await.err().unwrap();
    assert_eq!(stranger.header("ratelimit"), None);
}

#[tokio::test]
async fn compression_is_not_negotiated() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let bearer = format!("Bearer {}", alice.access);
    let headers = [
        ("authorization", bearer.as_str()),
        (
            "sec-websocket-extensions",
            "permessage-deflate; client_max_window_bits",
        ),
    ];
    let mut socket = super::open_with(&app, PATH, &headers).await;
    assert!(!socket.headers.contains_key("sec-websocket-extensions"));
    assert_open(&mut socket, &alice).await;
}

#[tokio::test]
async fn open_sockets_count_among_the_connections() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let mut sockets = Vec::new();
    for _ in 0..10 {
        sockets.push(open(&app, &alice.access).await);
    }
    let open = app.metric("http_connections").await.unwrap();
    assert!(open > 10.0, "{open}");
    drop(sockets);
    // The HTTP client keeps a few connections open.
    eventually!(app.metric("http_connections").await.unwrap() < 10.0);
}

#[tokio::test]
async fn no_secret_of_a_handshake_is_in_the_log() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let (session, _) = app.login_session("alice").await;
    let ticket = ticket(&app, &alice.access).await;
    let wrong = format!("{}x", alice.access);
    let mut opened = 0;
    for (kind, secret) in [
        ("ticket", &ticket),
        ("ticket", &ticket),
        ("subprotocol", &alice.access),
        ("header", &alice.access),
        ("query", &alice.access),
        ("query", &wrong),
        ("cookie", &session),
    ] {
        if let Ok(mut socket) = connect(&app, &[(kind, secret)]).await {
            socket.next_json().await;
            let renewal = json!({ "type": "auth", "token": alice.access });
            socket.send_text(&renewal.to_string()).await;
            socket.next_json().await;
            socket.close().await;
            opened += 1;
        }
    }
    assert_eq!(opened, 5);
    eventually!(app.log.text().matches("socket closed").count() == opened);
    let log = app.log.text();
    let signature = alice.access.rsplit('.').next().unwrap();
    for secret in [ticket.as_str(), &session, signature] {
        assert!(!log.contains(secret), "a secret is in the log");
    }
}
