//! Accounts: registering, logging in and out, what ends what, and how slowly passwords may be
//! guessed.

use std::time::Duration;

use prompt_service::config::{Config, CookieSecure, Registration, Secret};
use prompt_service::credentials::HashPool;
use prompt_service::domain::{ClientNetwork, Timestamp, UserId};
use prompt_service::store::NewUser;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::{
    App, Folder, PASSWORD, Response, User, behind_proxy, spawn_app, spawn_app_in,
};

/// What a refresh answers.
async fn refresh(app: &App, token: &str) -> Response {
    let body = json!({ "refresh": token });
    app.post("/api/auth/refresh/").json(&body).send().await
}

/// The status that an access token gets.
async fn me(app: &App, access: &str) -> u16 {
    app.get("/api/auth/me/").bearer(access).send().await.status
}

/// Whether the session opens a socket.
async fn opens_socket(app: &App, session: &str) -> bool {
    let (cookie, origin) = (format!("session={session}"), format!("http://{}", app.addr));
    let headers = [("cookie", cookie.as_str()), ("origin", origin.as_str())];
    match app.socket("/ws/prompts/", &headers).await {
        Ok(_) => true,
        Err(answer) => {
            assert_eq!(answer.status, 401, "{answer:?}");
            false
        }
    }
}

#[tokio::test]
async fn an_account_is_made_and_logs_in_and_refreshes() {
    let app = spawn_app(|_| ()).await;
    let made = app.register("alice").await;
    assert_eq!(made.status, 201);
    assert_eq!(
        made.json(),
        json!({ "id": 1, "username": "alice", "email": "alice@example.org" })
    );

    let answer = app.try_login("alice", PASSWORD).await;
    assert_eq!((answer.status, answer.header("set-cookie")), (200, None));
    let pair = answer.json();
    let keys: Vec<&String> = pair.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["access", "refresh"]);

    let answer = refresh(&app, pair["refresh"].as_str().unwrap()).await;
    assert_eq!(answer.status, 200);
    let fresh = answer.json()["access"].as_str().unwrap().to_owned();
    for access in [pair["access"].as_str().unwrap(), &fresh] {
        let answer = app.get("/api/auth/me/").bearer(access).send().await;
        assert_eq!((answer.status, answer.json()), (200, made.json()));
    }
    let answer = refresh(&app, &fresh).await;
    assert_eq!(answer.status, 401, "an access token refreshes nothing");
}

#[tokio::test]
async fn the_published_example_registers() {
    let app = spawn_app(|_| ()).await;
    let body = json!({ "username": "alice", "email": "a@b.c", "password": "secret123" });
    let made = app.post("/api/auth/register/").json(&body).send().await;
    assert_eq!(made.status, 201, "{made:?}");
}

#[tokio::test]
async fn registration_errors_are_reported_by_field() {
    let app = spawn_app(|_| ()).await;
    app.user("taken").await;
    for (body, fields) in [
        (json!({}), &["email", "password", "username"][..]),
        (
            json!({ "username": "taken", "email": "a@b.c", "password": PASSWORD }),
            &["username"],
        ),
        (
            json!({ "username": "a b", "email": "a@b.c", "password": PASSWORD }),
            &["username"],
        ),
        (
            json!({ "username": "bob", "email": "nowhere", "password": PASSWORD }),
            &["email"],
        ),
        (
            json!({ "username": "bob", "email": "a@b.c", "password": "12345678901" }),
            &["password"],
        ),
        (
            json!({ "username": "bob", "email": "a@b.c", "password": "short" }),
            &["password"],
        ),
        (
            json!({ "username": null, "email": 7, "password": [] }),
            &["email", "password", "username"],
        ),
    ] {
        let answer = app.post("/api/auth/register/").json(&body).send().await;
        assert_eq!(answer.status, 400, "{body}: {answer:?}");
        let errors = answer.json();
        let named: Vec<&String> = errors.as_object().unwrap().keys().collect();
        assert_eq!(named, fields, "{body}");
        for messages in errors.as_object().unwrap().values() {
            assert!(
                messages
                    .as_array()
                    .is_some_and(|all| all.iter().all(Value::is_string))
            );
        }
    }
}

#[tokio::test]
async fn a_wrong_password_an_unknown_name_and_a_disabled_account_look_alike() {
    let app = spawn_app(|_| ()).await;
    app.user("alice").await;
    let disabled = app.user("disabled").await;
    let store = app.folder.store().await;
    store
        .set_active(UserId(disabled.id), false, Timestamp::now())
        .await
        .unwrap();
    let wrong = app.try_login("alice", "not the password").await;
    assert_eq!(wrong.status, 401);
    assert_eq!(
        wrong.json(),
        json!({ "detail": "No active account found with the given credentials" })
    );
    for (name, password) in [("nobody", PASSWORD), ("disabled", PASSWORD)] {
        let answer = app.try_login(name, password).await;
        assert_eq!((answer.status, &answer.body), (401, &wrong.body), "{name}");
    }
}

#[tokio::test]
async fn session_cookie_is_secure_only_if_a_trusted_proxy_reports_tls() {
    let app = spawn_app(|_| ()).await;
    app.register("alice").await;
    let (secret, answer) = app.login_session("alice").await;
    assert!(secret.len() >= 43, "32 bytes take 43 characters at least");
    let cookie = answer.header("set-cookie").unwrap();
    assert_eq!(
        cookie,
        format!("session={secret}; Path=/; Max-Age=86400; HttpOnly; SameSite=Lax")
    );

    let is_secure = async |app: &App, proto: &[&str]| {
        let body = json!({ "username": "alice", "password": PASSWORD, "session": true });
        let mut login = app.post("/api/auth/login/").json(&body);
        for proto in proto {
            login = login.header("x-forwarded-proto", proto);
        }
        let answer = login.send().await;
        answer
            .header("set-cookie")
            .unwrap()
            .ends_with("; SameSite=Lax; Secure")
    };
    assert!(
        !is_secure(&app, &["https"]).await,
        "the peer is not trusted"
    );
    let folder = app.stop().await;
    let app = spawn_app_in(folder, behind_proxy).await;
    assert!(!is_secure(&app, &[]).await);
    assert!(!is_secure(&app, &["http"]).await);
    assert!(is_secure(&app, &["https"]).await);
    assert!(
        !is_secure(&app, &["https", "http"]).await,
        "the nearest proxy's word counts"
    );
    let folder = app.stop().await;
    let app = spawn_app_in(folder, |config| {
        config.server.cookie_secure = CookieSecure::Always;
        config.accounts.refresh_token_lifetime = Duration::from_secs(90);
    })
    .await;
    assert!(is_secure(&app, &[]).await);
    let (_, answer) = app.login_session("alice").await;
    assert!(
        answer
            .header("set-cookie")
            .unwrap()
            .contains("; Max-Age=90;")
    );
    let folder = app.stop().await;
    let app = spawn_app_in(folder, |config| {
        behind_proxy(config);
        config.server.cookie_secure = CookieSecure::Never;
    })
    .await;
    assert!(!is_secure(&app, &["https"]).await);
}

#[tokio::test]
async fn the_session_cookie_authenticates_no_http_route() {
    let app = spawn_app(|_| ()).await;
    app.register("alice").await;
    let (session, _) = app.login_session("alice").await;
    assert!(opens_socket(&app, &session).await);
    for (method, path) in [
        ("GET", "/api/auth/me/"),
        ("POST", "/api/auth/ws-ticket/"),
        ("GET", "/api/prompts/"),
        ("POST", "/api/prompts/"),
        ("GET", "/api/prompts/similar/?q=x"),
        ("GET", "/api/prompts/1/"),
        ("DELETE", "/api/prompts/1/"),
    ] {
        let request = app.client().request(method.parse().unwrap(), path);
        let answer = request
            .header("cookie", &format!("session={session}"))
            .header("origin", &format!("http://{}", app.addr))
            .send()
            .await;
        assert_eq!(answer.status, 401, "{method} {path}");
    }
}

#[tokio::test]
async fn logging_out_ends_the_refresh_token_and_the_session_also_after_a_restart() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let (_, kept_token) = app.login("alice").await;
    let (session, _) = app.login_session("alice").await;
    let (kept_session, _) = app.login_session("alice").await;
    assert!(opens_socket(&app, &session).await);

    let body = json!({ "refresh": user.refresh });
    let answer = app
        .post("/api/auth/logout/")
        .header("cookie", &format!("session={session}"))
        .json(&body)
        .send()
        .await;
    assert_eq!((answer.status, answer.body.len()), (204, 0), "{answer:?}");
    let taken_back = answer.header("set-cookie").unwrap();
    assert!(
        taken_back.starts_with("session=; Path=/; Max-Age=0; HttpOnly"),
        "{taken_back}"
    );

    let check = async |app: &App| {
        let refused = refresh(app, &user.refresh).await;
        assert_eq!(refused.status, 401);
        assert_eq!(refused.json()["code"], "token_not_valid");
        assert!(!opens_socket(app, &session).await);
        assert_eq!(refresh(app, &kept_token).await.status, 200);
        assert!(opens_socket(app, &kept_session).await);
    };
    check(&app).await;
    let app = spawn_app_in(app.kill().await, |_| ()).await;
    check(&app).await;
}

#[tokio::test]
async fn logging_out_without_credentials_is_no_error() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let path = "/api/auth/logout/";
    let garbage = json!({ "refresh": "garbage" });
    let access = json!({ "refresh": user.access });
    for request in [
        app.post(path),
        app.post(path).json(&json!({})),
        app.post(path).json(&garbage),
        app.post(path).json(&access),
        app.post(path).header("cookie", "session=garbage"),
    ] {
        assert_eq!(request.send().await.status, 204);
    }
    assert_eq!(
        me(&app, &user.access).await,
        200,
        "an access token is not logged out"
    );
}

#[tokio::test]
async fn ticket_has_its_lifetime_and_works_once() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let answer = user.post("/api/auth/ws-ticket/").send().await;
    assert_eq!(
        (answer.status, &answer.json()["expires_in"]),
        (201, &json!(30))
    );
    let path = format!(
        "/ws/prompts/?ticket={}",
        answer.json()["ticket"].as_str().unwrap()
    );
    let mut socket = app.socket(&path, &[]).await.unwrap();
    assert_eq!(socket.next_json().await["user_id"], user.id);
    let spent = app.socket(&path, &[]).await.err().unwrap();
    assert_eq!(
        (spent.status, &spent.json()["code"]),
        (401, &json!("credential_not_valid"))
    );
}

/// One account with a refresh token, an access token and a session, and an app that knows them.
async fn user_with_session() -> (App, User, String) {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let (session, _) = app.login_session("alice").await;
    assert_eq!(me(&app, &user.access).await, 200);
    assert_eq!(refresh(&app, &user.refresh).await.status, 200);
    assert!(opens_socket(&app, &session).await);
    (app, user, session)
}

#[tokio::test]
async fn disabling_an_account_ends_all_its_credentials() {
    let (app, user, session) = user_with_session().await;
    let bearer = format!("Bearer {}", user.access);
    let mut socket = app
        .socket("/ws/prompts/", &[("authorization", &bearer)])
        .await
        .unwrap();
    // As the operator's command does it, beside the running service.
    let store = app.folder.store().await;
    store
        .set_active(UserId(user.id), false, Timestamp::now())
        .await
        .unwrap();
    eventually!(me(&app, &user.access).await == 401);
    eventually!(refresh(&app, &user.refresh).await.status == 401);
    assert_eq!(socket.close_code().await, 4401);
    assert!(!opens_socket(&app, &session).await);
    let answer = app.get("/api/auth/me/").bearer(&user.access).send().await;
    assert_eq!(answer.json()["code"], "user_inactive");
    assert_eq!(app.try_login("alice", PASSWORD).await.status, 401);

    store
        .set_active(UserId(user.id), true, Timestamp::now())
        .await
        .unwrap();
    eventually!(app.try_login("alice", PASSWORD).await.status == 200);
    let (access, token) = app.login("alice").await;
    eventually!(me(&app, &access).await == 200);
    assert_eq!(refresh(&app, &token).await.status, 200);
    assert_eq!(
        me(&app, &user.access).await,
        401,
        "what had ended stays ended"
    );
    assert_eq!(refresh(&app, &user.refresh).await.status, 401);
    assert!(!opens_socket(&app, &session).await);
}

#[tokio::test]
async fn new_password_ends_all_earlier_credentials() {
    let (app, user, session) = user_with_session().await;
    let hash = HashPool::start(1, 1)
        .unwrap()
        .hash("another password".to_owned(), ClientNetwork::V4(0))
        .await
        .unwrap();
    let store = app.folder.store().await;
    store
        .set_password(UserId(user.id), &hash, Timestamp::now())
        .await
        .unwrap();
    eventually!(me(&app, &user.access).await == 401);
    eventually!(refresh(&app, &user.refresh).await.status == 401);
    eventually!(!opens_socket(&app, &session).await);
    assert_eq!(app.try_login("alice", PASSWORD).await.status, 401);
    let answer = app.try_login("alice", "another password").await.json();
    assert_eq!(me(&app, answer["access"].as_str().unwrap()).await, 200);
    assert_eq!(
        refresh(&app, answer["refresh"].as_str().unwrap())
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn logins_in_flight_during_a_change_of_password_give_no_lasting_credentials() {
    let app = spawn_app(behind_proxy).await;
    let user = app.user("alice").await;
    let store = app.folder.store().await;
    // More logins than there are threads to hash them, each from an address of its own, so that
    // none waits for another's outcome.
    let mut logins = JoinSet::new();
    for n in 0..24 {
        let body = json!({ "username": "alice", "password": PASSWORD, "session": true });
        let login = app.post("/api/auth/login/").json(&body);
        logins.spawn(
            login
                .header("x-forwarded-for", &format!("203.0.113.{n}"))
                .send(),
        );
    }
    let mut answers = vec![logins.join_next().await.unwrap().unwrap()];
    let hash =
        "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHRzYWx0c2FsdA$c29tZXRoaW5nIGVsc2UsIG5vdCBpdA";
    // Twice, as the operator's command does it: a login may read the account between the first
    // one's time and its commit.
    for _ in 0..2 {
        let changed = store.set_password(UserId(user.id), hash, Timestamp::now());
        assert!(changed.await.unwrap());
    }
    while let Some(answer) = logins.join_next().await {
        answers.push(answer.unwrap());
    }
    answers.retain(|answer| answer.status == 200);
    for answer in answers {
        let tokens = answer.json();
        let cookie = answer.header("set-cookie").unwrap();
        let session = cookie.strip_prefix("session=").unwrap();
        let session = session.split(';').next().unwrap();
        assert_eq!(
            refresh(&app, tokens["refresh"].as_str().unwrap())
                .await
                .status,
            401
        );
        eventually!(me(&app, tokens["access"].as_str().unwrap()).await == 401);
        assert!(!opens_socket(&app, session).await);
    }
}

#[tokio::test]
async fn refresh_reads_the_account_from_the_store() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    // From here on the account is remembered for a while.
    assert_eq!(me(&app, &user.access).await, 200);
    let store = app.folder.store().await;
    let changed = store.set_password(UserId(user.id), "$argon2id$", Timestamp::now());
    assert!(changed.await.unwrap());
    assert_eq!(refresh(&app, &user.refresh).await.status, 401);
}

#[tokio::test]
async fn after_ten_failures_of_a_name_from_one_address_even_the_right_password_must_wait() {
    let app = spawn_app(behind_proxy).await;
    for name in ["alice", "bob"] {
        app.register(name).await;
    }
    let login = async |name: &str, password: &str, address: &str| {
        let body = json!({ "username": name, "password": password });
        let login = app.post("/api/auth/login/").json(&body);
        login.header("x-forwarded-for", address).send().await
    };
    let (here, there) = ("198.51.100.1", "198.51.100.2");
    // What is no guess is not counted: fields that break the rules, and refreshing.
    for _ in 0..15 {
        assert_eq!(login("alice", "", here).await.status, 400);
        assert_eq!(refresh(&app, "garbage").await.status, 401);
    }
    for guess in 0..10 {
        let answer = login("alice", &format!("guess {guess}"), here).await;
        assert_eq!(answer.status, 401, "guess {guess}");
    }
    for password in ["guess", PASSWORD] {
        let answer = login("alice", password, here).await;
        assert_eq!(answer.status, 429, "{password}");
        let wait: u64 = answer.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=60).contains(&wait), "{wait}");
        assert!(answer.json()["detail"].is_string());
    }
    assert_eq!(
        login("alice", PASSWORD, there).await.status,
        200,
        "another address"
    );
    assert_eq!(
        login("bob", PASSWORD, here).await.status,
        200,
        "another name"
    );
    // What a client writes in front of what the proxy saw changes nothing.
    let forged = login("alice", PASSWORD, &format!("{there}, {here}")).await;
    assert_eq!(forged.status, 429);
    let failures = app.metric("login_failures_total{reason=\"wrong\"}").await;
    assert_eq!(failures, Some(10.0));
    assert_eq!(
        app.metric("login_failures_total{reason=\"refused\"}").await,
        Some(3.0)
    );
}

#[tokio::test]
async fn forwarded_address_is_ignored_without_a_trusted_proxy() {
    let app = spawn_app(|_| ()).await;
    app.register("alice").await;
    let login = async |password: &str, n: usize| {
        let body = json!({ "username": "alice", "password": password });
        let login = app.post("/api/auth/login/").json(&body);
        login
            .header("x-forwarded-for", &format!("198.51.100.{n}"))
            .send()
            .await
            .status
    };
    for n in 0..10 {
        assert_eq!(login("guess", n).await, 401);
    }
    assert_eq!(
        login(PASSWORD, 99).await,
        429,
        "a new address in each header is one client"
    );
}

#[tokio::test]
async fn closed_registration_refuses_everybody_and_logins_go_on() {
    let app = spawn_app(|_| ()).await;
    app.register("alice").await;
    let app = spawn_app_in(app.stop().await, |config| {
        config.accounts.registration = Registration::Closed;
    })
    .await;
    let answer = app.register("bob").await;
    assert_eq!(
        (answer.status, answer.json()["detail"].is_string()),
        (403, true)
    );
    app.login("alice").await;
}

#[tokio::test]
async fn registrations_are_counted_by_address() {
    let app = spawn_app(|config| {
        behind_proxy(config);
        config.accounts.register_throttle = "2/h".parse().unwrap();
    })
    .await;
    let register = async |name: &str, address: &str| {
        let body = json!({ "username": name, "email": "a@b.c", "password": PASSWORD });
        let register = app.post("/api/auth/register/").json(&body);
        register.header("x-forwarded-for", address).send().await
    };
    assert_eq!(register("one", "198.51.100.1").await.status, 201);
    assert_eq!(
        register("a b", "198.51.100.1").await.status,
        400,
        "counted all the same"
    );
    let refused = register("two", "198.51.100.1").await;
    assert_eq!(refused.status, 429);
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=3600).contains(&wait), "{wait}");
    assert_eq!(register("two", "198.51.100.2").await.status, 201);
    let throttled = app
        .metric("throttled_requests_total{throttle=\"register\"}")
        .await;
    assert_eq!(throttled, Some(1.0));
}

#[tokio::test]
async fn fallback_key_verifies_and_does_not_sign() {
    let key = |letter: &str| Secret::new(letter.repeat(32));
    let with = |signing: Secret, fallbacks: Vec<Secret>| {
        move |config: &mut Config| {
            config.accounts.secret_key = Some(signing);
            config.accounts.secret_key_fallbacks = fallbacks;
        }
    };
    let app = spawn_app(with(key("a"), Vec::new())).await;
    let old = app.user("alice").await;

    let app = spawn_app_in(app.stop().await, with(key("b"), vec![key("c"), key("a")])).await;
    assert_eq!(me(&app, &old.access).await, 200);
    assert_eq!(refresh(&app, &old.refresh).await.status, 200);
    let (access, _) = app.login("alice").await;

    let app = spawn_app_in(app.stop().await, with(key("b"), Vec::new())).await;
    assert_eq!(
        me(&app, &access).await,
        200,
        "what was made meanwhile is signed by the new key"
    );
    assert_eq!(me(&app, &old.access).await, 401);
    assert_eq!(refresh(&app, &old.refresh).await.status, 401);
}

#[tokio::test]
async fn tokens_and_sessions_outlive_a_restart_with_the_generated_key() {
    let (app, user, session) = user_with_session().await;
    let app = spawn_app_in(app.stop().await, |_| ()).await;
    assert_eq!(me(&app, &user.access).await, 200);
    assert_eq!(refresh(&app, &user.refresh).await.status, 200);
    assert!(opens_socket(&app, &session).await);
}

/// As Django 4.2 writes it for [`PASSWORD`], with fewer iterations.
const DJANGO_HASH: &str =
    "pbkdf2_sha256$1200$saltsaltsalt$Dx82Y3BLml5fY84Ls2N9wXwolASVfsbjd1ODng3ZN9I=";

#[tokio::test]
async fn imported_password_hash_is_accepted_and_upgraded() {
    let folder = Folder::new();
    let store = folder.store().await;
    let imported = store
        .create_user(NewUser {
            username: "imported".to_owned(),
            email: "a@b.c".to_owned(),
            password_hash: DJANGO_HASH.to_owned(),
            created_at: Timestamp::now(),
        })
        .await
        .unwrap();
    let app = spawn_app_in(folder.clone(), |_| ()).await;
    assert_eq!(app.try_login("imported", "wrong").await.status, 401);
    let hash = async || {
        store
            .user(imported.id)
            .await
            .unwrap()
            .unwrap()
            .password_hash
    };
    assert_eq!(hash().await, DJANGO_HASH, "a failure replaces nothing");
    let (access, token) = app.login("imported").await;
    let upgraded = hash().await;
    assert!(upgraded.starts_with("$argon2id$v=19$m="), "{upgraded}");
    app.login("imported").await;
    assert_eq!(hash().await, upgraded);
    assert_eq!(
        me(&app, &access).await,
        200,
        "the same password: nothing ends"
    );
    assert_eq!(refresh(&app, &token).await.status, 200);
}
