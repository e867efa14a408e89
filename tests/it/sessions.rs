//! The session cookie: among other cookies, from which pages, for what, and how many.

use std::time::Duration;

use prompt_service::config::{Config, CookieSecure};
use prompt_service::credentials::SessionSecret;
use prompt_service::domain::{Timestamp, UserId};
use prompt_service::store::Session;
use serde_json::json;

use crate::support::{App, DEADLINE, PASSWORD, Request, Response, behind_proxy, spawn_app};

const SOCKET: &str = "/ws/prompts/";
const REFRESH: &str = "/api/auth/refresh/";
const LOGOUT: &str = "/api/auth/logout/";

/// The origin of the service's own pages.
fn own(app: &App) -> String {
    format!("http://{}", app.addr)
}

/// The status of a handshake that carries this `Cookie` header, from a page of the service.
async fn socket(app: &App, cookie: &[u8]) -> u16 {
    let request = app
        .get(SOCKET)
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "AAAAAAAAAAAAAAAAAAAAAA==")
        .header("origin", &own(app))
        .header_bytes("cookie", cookie);
    request.open().await.status
}

/// What a refresh without a body answers to a page of the service.
async fn refresh(app: &App, cookie: &[u8]) -> Response {
    let request = app.post(REFRESH).header("origin", &own(app));
    request.header_bytes("cookie", cookie).send().await
}

fn login(app: &App, name: &str, origin: Option<&str>) -> Request {
    let body = json!({ "username": name, "password": PASSWORD, "session": true });
    let login = app.post("/api/auth/login/").json(&body);
    match origin {
        Some(origin) => login.header("origin", origin),
        None => login,
    }
}

/// Stores a session of the user as if it had been made at `created_at`; returns its cookie's value.
async fn stored_session(app: &App, user_id: i64, created_at: Timestamp) -> String {
    let secret = SessionSecret::random().unwrap();
    let session = Session {
        token_hash: secret.hash(),
        user_id: UserId(user_id),
        created_at,
        expires_at: created_at.plus(Duration::from_secs(86_400)),
    };
    let store = app.folder.store().await;
    store.create_session(session, 100).await.unwrap();
    secret.cookie_value()
}

#[tokio::test]
async fn invalid_cookies_do_not_hide_the_session() {
    let app = spawn_app(|_| ()).await;
    app.user("alice").await;
    let (session, _) = app.login_session("alice").await;
    for (before, after) in [
        (&b"theme=gr\xf6\xdfe; "[..], &b""[..]),
        (b"", b"; theme=gr\xc3\xb6\xc3\x9fe"),
        (b"a=\"; ", b"; b=\""),
        (b"nameless; =; ;;\t", b"\t; c"),
        (b"session=; session=stale; ", b"; session=AAAA"),
        (b"__Host-session=\xff; ", b""),
    ] {
        let cookie = [before, b"session=", session.as_bytes(), after].concat();
        assert_eq!(socket(&app, &cookie).await, 101, "{before:?} {after:?}");
        assert_eq!(refresh(&app, &cookie).await.status, 200, "{before:?}");
    }
    let big = [
        b"a=b; ".repeat(4000).as_slice(),
        b"session=",
        session.as_bytes(),
    ]
    .concat();
    assert_eq!(socket(&app, &big).await, 101);
}

#[tokio::test]
async fn first_valid_session_counts_and_logging_out_ends_all() {
    let app = spawn_app(|_| ()).await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let (of_alice, _) = app.login_session("alice").await;
    let (of_bob, _) = app.login_session("bob").await;
    let id_behind = async |cookie: &str| {
        let access = refresh(&app, cookie.as_bytes()).await.json()["access"].clone();
        let me = app.get("/api/auth/me/").bearer(access.as_str().unwrap());
        me.send().await.json()["id"].as_i64().unwrap()
    };
    let both = format!("session=stale; session={of_alice}; session={of_bob}");
    assert_eq!(id_behind(&both).await, alice.id);
    // What only this host can have set goes first.
    let tossed = format!("session={of_alice}; __Host-session={of_bob}");
    assert_eq!(id_behind(&tossed).await, bob.id);

    let request = app
        .post(LOGOUT)
        .header_bytes("cookie", b"theme=gr\xf6\xdfe");
    let answer = request.header("cookie", &tossed).send().await;
    assert_eq!(answer.status, 204);
    let cleared: Vec<&str> = answer
        .headers
        .get_all("set-cookie")
        .iter()
        .map(|line| line.to_str().unwrap())
        .collect();
    assert_eq!(
        cleared,
        [
            "session=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax",
            "__Host-session=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax; Secure",
        ]
    );
    for session in [of_alice, of_bob] {
        for name in ["session", "__Host-session"] {
            let cookie = format!("{name}={session}");
            assert_eq!(socket(&app, cookie.as_bytes()).await, 401);
            assert_eq!(refresh(&app, cookie.as_bytes()).await.status, 401);
        }
    }
}

#[tokio::test]
async fn session_cookie_alone_gets_a_new_access_token() {
    let app = spawn_app(|config| {
        config.server.cors_allowed_origins = vec!["https://app.example".to_owned()];
    })
    .await;
    let alice = app.user("alice").await;
    let (session, _) = app.login_session("alice").await;
    let cookie = format!("session={session}");
    for origin in [&own(&app), "https://app.example"] {
        for body in [None, Some(json!({})), Some(json!({ "other": 1 }))] {
            let mut request = app.post(REFRESH).header("origin", origin);
            if let Some(body) = &body {
                request = request.json(body);
            }
            let answer = request.header("cookie", &cookie).send().await;
            assert_eq!(answer.status, 200, "{origin} {body:?}: {answer:?}");
            let pair = answer.json();
            let keys: Vec<&String> = pair.as_object().unwrap().keys().collect();
            assert_eq!(keys, ["access"]);
            let me = app.get("/api/auth/me/");
            let me = me.bearer(pair["access"].as_str().unwrap()).send().await;
            assert_eq!(me.json()["id"], alice.id);
        }
    }
    let elsewhere = format!("http://{}:1", app.addr.ip());
    for origin in [
        "https://evil.example",
        "null",
        "",
        &elsewhere,
        &own(&app).replace("http", "https"),
    ] {
        let request = app.post(REFRESH).header("origin", origin);
        let answer = request.header("cookie", &cookie).send().await;
        assert_eq!(answer.status, 403, "{origin}");
    }
    let silent = app.post(REFRESH).header("cookie", &cookie).send().await;
    assert_eq!(silent.status, 403, "a page always says where it is from");
}

#[tokio::test]
async fn ended_session_is_refused_like_an_invalid_refresh_token() {
    let app = spawn_app(|_| ()).await;
    let alice = app.user("alice").await;
    let (session, _) = app.login_session("alice").await;
    let cookie = format!("session={session}");
    let logged_out = app.post(LOGOUT).header("cookie", &cookie).send().await;
    assert_eq!(logged_out.status, 204);
    let now = Timestamp::now().0;
    let old = stored_session(&app, alice.id, Timestamp(now - 86_400_000_001)).await;
    let early = stored_session(&app, alice.id, Timestamp(now + 600_000_000)).await;
    let bad = json!({ "detail": "Token is invalid", "code": "token_not_valid" });
    for value in [&session, &old, &early, "", "garbage"] {
        let cookie = format!("session={value}");
        let answer = refresh(&app, cookie.as_bytes()).await;
        assert_eq!(
            (answer.status, answer.json()),
            (401, bad.clone()),
            "{value}"
        );
        assert!(answer.header("www-authenticate").is_some());
        assert_eq!(socket(&app, cookie.as_bytes()).await, 401, "{value}");
    }
}

#[tokio::test]
async fn refresh_token_in_the_body_takes_precedence_over_the_cookie() {
    let app = spawn_app(|_| ()).await;
    let alice = app.user("alice").await;
    let (session, _) = app.login_session("alice").await;
    let cookie = format!("session={session}");
    let post = async |body: serde_json::Value| {
        let request = app.post(REFRESH).json(&body).header("origin", &own(&app));
        request.header("cookie", &cookie).send().await
    };
    assert_eq!(post(json!({ "refresh": "garbage" })).await.status, 401);
    assert_eq!(post(json!({ "refresh": alice.refresh })).await.status, 200);
    for (body, message) in [
        (json!({ "refresh": "" }), "This field may not be blank."),
        (json!({ "refresh": null }), "This field may not be null."),
    ] {
        let answer = post(body).await;
        assert_eq!(
            (answer.status, answer.json()),
            (400, json!({ "refresh": [message] }))
        );
    }
    // Without a cookie an empty body is what it always was, wherever it comes from.
    for request in [
        app.post(REFRESH),
        app.post(REFRESH).header("origin", &own(&app)),
        app.post(REFRESH).header("cookie", "theme=dark"),
    ] {
        let answer = request.send().await;
        let required = json!({ "refresh": ["This field is required."] });
        assert_eq!((answer.status, answer.json()), (400, required));
    }
}

#[tokio::test]
async fn login_with_session_from_a_foreign_page_is_refused_and_not_counted() {
    let app = spawn_app(|config| {
        config.server.cors_allowed_origins = vec!["https://app.example".to_owned()];
    })
    .await;
    app.register("alice").await;
    let https = own(&app).replace("http", "https");
    let elsewhere = format!("http://{}:1", app.addr.ip());
    for origin in ["https://evil.example", "null", "", &https, &elsewhere] {
        let answer = login(&app, "alice", Some(origin)).send().await;
        assert_eq!(answer.status, 403, "{origin}");
        assert_eq!(answer.header("set-cookie"), None);
        assert!(answer.json()["detail"].is_string());
    }
    // However it is asked for, and however wrong the password is.
    let name = "alice";
    let form = format!("username={name}&password=guess&session=on");
    let part = |field: &str, value: &str| {
        format!("--b\r\nContent-Disposition: form-data; name=\"{field}\"\r\n\r\n{value}\r\n")
    };
    let parts = [
        part("username", name),
        part("password", "guess"),
        part("session", "true"),
    ];
    let multipart = format!("{}--b--\r\n", parts.concat());
    for _ in 0..6 {
        for (kind, body) in [
            ("application/x-www-form-urlencoded", &form),
            ("multipart/form-data; boundary=b", &multipart),
        ] {
            let request = app.post("/api/auth/login/").body(kind, body.clone());
            let answer = request
                .header("origin", "https://evil.example")
                .send()
                .await;
            assert_eq!(answer.status, 403, "{kind}");
        }
    }
    for origin in [
        None,
        Some(own(&app)),
        Some("https://app.example".to_owned()),
    ] {
        let answer = login(&app, "alice", origin.as_deref()).send().await;
        assert_eq!(answer.status, 200, "{origin:?}");
        assert!(answer.header("set-cookie").is_some());
    }
    let body = json!({ "username": name, "password": PASSWORD });
    let request = app.post("/api/auth/login/").json(&body);
    let without_session = request
        .header("origin", "https://evil.example")
        .send()
        .await;
    assert_eq!(without_session.status, 200, "no cookie, no harm");
}

#[tokio::test]
async fn over_tls_the_cookie_has_the_host_prefix_and_pages_are_https() {
    let app = spawn_app(behind_proxy).await;
    let alice = app.user("alice").await;
    let https = own(&app).replace("http", "https");
    let answer = login(&app, "alice", Some(&https)).header("x-forwarded-proto", "https");
    let answer = answer.send().await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let cookie = answer.header("set-cookie").unwrap();
    let (name, rest) = cookie.split_once('=').unwrap();
    assert_eq!(name, "__Host-session");
    let (session, attributes) = rest.split_once("; ").unwrap();
    assert_eq!(
        attributes,
        "Path=/; Max-Age=86400; HttpOnly; SameSite=Lax; Secure"
    );

    let cookie = format!("__Host-session={session}");
    for (proto, origin, status) in [
        ("https", &https, 200),
        ("http", &https, 403),
        ("https", &own(&app), 403),
        ("http", &own(&app), 200),
    ] {
        let request = app.post(REFRESH).header("x-forwarded-proto", proto);
        let request = request.header("cookie", &cookie).header("origin", origin);
        assert_eq!(request.send().await.status, status, "{proto} {origin}");
        let headers = [
            ("x-forwarded-proto", proto),
            ("cookie", cookie.as_str()),
            ("origin", origin.as_str()),
        ];
        let opened = app.socket(SOCKET, &headers).await;
        assert_eq!(opened.is_ok(), status == 200, "{proto} {origin}");
    }
    // A cookie from before the move to TLS is still one.
    let old = stored_session(&app, alice.id, Timestamp::now()).await;
    let request = app.post(REFRESH).header("x-forwarded-proto", "https");
    let request = request.header("cookie", &format!("session={old}"));
    assert_eq!(request.header("origin", &https).send().await.status, 200);
}

#[tokio::test]
async fn cookies_that_are_always_secure_belong_to_https_pages() {
    let always = |config: &mut Config| config.server.cookie_secure = CookieSecure::Always;
    let app = spawn_app(always).await;
    app.register("alice").await;
    let https = own(&app).replace("http", "https");
    let answer = login(&app, "alice", Some(&https)).send().await;
    let cookie = answer.header("set-cookie").unwrap();
    assert!(cookie.starts_with("__Host-session="), "{cookie}");
    assert!(cookie.ends_with("; Secure"), "{cookie}");
    let cookie = cookie.split(';').next().unwrap();
    let status = async |origin: &str| {
        let request = app.post(REFRESH).header("cookie", cookie);
        request.header("origin", origin).send().await.status
    };
    assert_eq!(status(&https).await, 200);
    assert_eq!(status(&own(&app)).await, 403);
}

#[tokio::test]
async fn cookies_that_are_never_secure_keep_their_plain_name() {
    let app = spawn_app(|config| {
        behind_proxy(config);
        config.server.cookie_secure = CookieSecure::Never;
    })
    .await;
    app.register("alice").await;
    let https = own(&app).replace("http", "https");
    let request = login(&app, "alice", Some(&https)).header("x-forwarded-proto", "https");
    let answer = request.send().await;
    assert_eq!(
        answer.status, 200,
        "the page's scheme is still what the client used"
    );
    let cookie = answer.header("set-cookie").unwrap();
    assert!(cookie.starts_with("session="), "{cookie}");
    assert!(!cookie.contains("Secure"), "{cookie}");
}

#[tokio::test]
async fn a_session_beyond_the_limit_ends_the_oldest_and_its_sockets() {
    let app = spawn_app(|config| config.accounts.max_sessions_per_user = 2).await;
    app.register("alice").await;
    app.register("bob").await;
    let (of_bob, _) = app.login_session("bob").await;
    let (first, _) = app.login_session("alice").await;
    let (second, _) = app.login_session("alice").await;
    let cookie = format!("session={first}");
    let headers = [("cookie", cookie.as_str()), ("origin", &own(&app))];
    let mut oldest = app.socket(SOCKET, &headers).await.unwrap();
    let (third, _) = app.login_session("alice").await;
    // A socket that stays open is pinged for ever.
    let closed = tokio::time::timeout(DEADLINE, oldest.close_code()).await;
    assert_eq!(closed.unwrap(), 4401);
    for (session, status) in [(&first, 401), (&second, 200), (&third, 200), (&of_bob, 200)] {
        let answer = refresh(&app, format!("session={session}").as_bytes()).await;
        assert_eq!(answer.status, status);
    }
}
