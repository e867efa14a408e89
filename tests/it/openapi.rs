//! The API's description: it is the committed one, it has every route, and every route asks for the
//! credentials that the table below says.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use hyper::Method;
use prompt_service::api::Documents;
use prompt_service::credentials::{ApiKeyText, TokenType};
use prompt_service::domain::{ApiKey, ApiKeyRecord, Scope, Timestamp, UserId};
use serde_json::{Value, json};

use crate::support::{App, Client, Response, User, spawn_app};

/// The credentials that an operation asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// None: credentials are ignored.
    Open,
    /// None, and API keys are refused: a program that sends one is mistaken.
    NoKeys,
    /// An access token in `Authorization`, or an API key with that scope; with `None` no API key.
    Bearer(Option<Scope>),
    /// An access token or any API key.
    AnyKey,
    /// As `Bearer`, and the object must be the caller's own. Another user's object returns 404.
    Owner(Option<Scope>),
    /// A WebSocket, with a choice of credentials; API keys are none of them.
    Socket,
}

/// Every operation, its credentials, and the status of a request with those credentials and nothing
/// else.
const OPERATIONS: &[(&str, &str, Access, u16)] = &[
    ("delete", "/api/keys/{id}", Access::Owner(None), 204),
    ("delete", "/api/prompts/{id}", WRITES_OWN, 204),
    ("delete", "/v1/chat/completions/{id}", WRITES_OWN, 200),
    ("get", "/", Access::Open, 200),
    ("get", "/api/auth/me/", Access::Bearer(None), 200),
    ("get", "/api/keys", Access::Bearer(None), 200),
    ("get", "/api/keys/{id}", Access::Owner(None), 200),
    ("get", "/api/prompts", READS, 200),
    ("get", "/api/prompts/similar", READS, 400),
    ("get", "/api/prompts/{id}", READS_OWN, 200),
    ("get", "/api/usage", READS, 200),
    ("get", "/docs", Access::Open, 200),
    ("get", "/healthz", Access::Open, 200),
    ("get", "/metrics", Access::Open, 200),
    ("get", "/readyz", Access::Open, 200),
    ("get", "/redoc", Access::Open, 200),
    ("get", "/schema", Access::Open, 200),
    ("get", "/v1/chat/completions", READS, 200),
    ("get", "/v1/chat/completions/{id}", READS_OWN, 200),
    ("get", "/v1/chat/completions/{id}/messages", READS_OWN, 200),
    ("get", "/v1/models", Access::AnyKey, 200),
    ("get", "/v1/models/{model}", Access::AnyKey, 200),
    ("get", "/ws/prompts/", Access::Socket, 101),
    ("patch", "/api/keys/{id}", Access::Owner(None), 200),
    ("post", "/api/auth/login/", Access::Open, 400),
    ("post", "/api/auth/logout/", Access::NoKeys, 204),
    ("post", "/api/auth/refresh/", Access::Open, 400),
    ("post", "/api/auth/register/", Access::Open, 400),
    ("post", "/api/auth/token/", Access::Open, 400),
    ("post", "/api/auth/ws-ticket/", Access::Bearer(None), 201),
    ("post", "/api/keys", Access::Bearer(None), 400),
    ("post", "/api/keys/{id}/rotate", Access::Owner(None), 200),
    (
        "post",
        "/api/prompts",
        Access::Bearer(Some(Scope::Chat)),
        400,
    ),
    (
        "post",
        "/v1/chat/completions",
        Access::Bearer(Some(Scope::Chat)),
        415,
    ),
    (
        "post",
        "/v1/chat/completions/{id}",
        Access::Bearer(Some(Scope::Write)),
        415,
    ),
    (
        "post",
        "/v1/embeddings",
        Access::Bearer(Some(Scope::Embeddings)),
        415,
    ),
];

const READS: Access = Access::Bearer(Some(Scope::Read));
const READS_OWN: Access = Access::Owner(Some(Scope::Read));
const WRITES_OWN: Access = Access::Owner(Some(Scope::Write));

fn document() -> Value {
    serde_json::from_slice(&Documents::make().json).unwrap()
}

/// Method and path of each operation described.
fn described() -> Vec<(String, String)> {
    let document = document();
    let paths = document["paths"].as_object().unwrap();
    paths
        .iter()
        .flat_map(|(path, item)| {
            let methods = item.as_object().unwrap().keys();
            methods.map(|method| (method.clone(), path.clone()))
        })
        .collect()
}

/// Every source file under `folder`.
fn source(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().path())
        .flat_map(|path| {
            if path.is_dir() {
                source(&path)
            } else {
                vec![fs::read_to_string(path).unwrap()]
            }
        })
        .collect()
}

#[test]
fn the_document_is_the_committed_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.json");
    let committed = fs::read_to_string(path).unwrap_or_default();
    assert!(
        committed.as_bytes() == Documents::make().json,
        "openapi.json is out of date: run `cargo run --release -- openapi > openapi.json`"
    );
}

#[test]
fn every_operation_stands_in_the_authorisation_table() {
    let table: BTreeSet<(String, String)> = OPERATIONS
        .iter()
        .map(|(method, path, ..)| ((*method).to_owned(), (*path).to_owned()))
        .collect();
    assert_eq!(
        table.len(),
        OPERATIONS.len(),
        "no operation stands in it twice"
    );
    assert_eq!(described().into_iter().collect::<BTreeSet<_>>(), table);
}

#[test]
fn the_document_asks_for_the_credentials_that_the_table_says() {
    let document = document();
    for (method, path, access, _) in OPERATIONS {
        let security = &document["paths"][path][method]["security"];
        let schemes: BTreeSet<&str> = security
            .as_array()
            .unwrap_or_else(|| panic!("{method} {path} does not say what it asks for"))
            .iter()
            .flat_map(|one| one.as_object().unwrap().keys().map(String::as_str))
            .collect();
        let expected: &[&str] = match access {
            Access::Open | Access::NoKeys => &[],
            Access::Bearer(Some(_)) | Access::Owner(Some(_)) | Access::AnyKey => {
                &["api_key", "bearer", "login"]
            }
            // A token, or the login form that gets one. Other credentials of a socket are
            // described as its parameters.
            Access::Bearer(None) | Access::Owner(None) | Access::Socket => &["bearer", "login"],
        };
        let expected: BTreeSet<&str> = expected.iter().copied().collect();
        assert_eq!(schemes, expected, "{method} {path}");
    }
}

/// The routers are built by `routes!`, which takes a handler's path and description together, so a
/// handler that is served is described. This test checks that only the files behind the pages are
/// served in another way.
#[test]
fn no_route_is_served_without_being_described() {
    let mut handlers = 0;
    for source in source(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api")) {
        let code: String = source.split_whitespace().collect();
        for list in code.split("routes!(").skip(1) {
            handlers += list
                .split(')')
                .next()
                .unwrap()
                .split(',')
                .filter(|name| !name.is_empty())
                .count();
        }
        for other in [
            ".nest(",
            ".nest_service(",
            ".route_service(",
            "routing::post",
            "routing::any",
        ] {
            assert!(!code.contains(other), "a route is added by {other}");
        }
        if code.contains(".route(") || code.contains("routing::get") {
            let plain = code.matches(".route(").count() + code.matches("routing::get").count();
            assert_eq!(plain, 2, "only the assets are served by a plain route");
            assert!(code.contains(".route(&format!(\"/assets/{name}\"),axum::routing::get("));
        }
    }
    assert_eq!(handlers, described().len());
}

#[tokio::test]
async fn every_described_path_has_the_methods_described_and_no_others() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let paths: BTreeSet<String> = described().into_iter().map(|(_, path)| path).collect();
    for path in paths {
        let mut expected: BTreeSet<String> = described()
            .into_iter()
            .filter(|(_, other)| *other == path)
            .map(|(method, _)| method.to_uppercase())
            .collect();
        if expected.contains("GET") {
            expected.insert("HEAD".to_owned());
        }
        expected.insert("OPTIONS".to_owned());
        let answer = user
            .client
            .request(
                Method::OPTIONS,
                &path.replace("{id}", "1").replace("{model}", "mock"),
            )
            .send()
            .await;
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        let allowed = answer
            .header("allow")
            .unwrap()
            .split(", ")
            .map(str::to_owned)
            .collect();
        assert_eq!(expected, allowed, "{path}");
    }
    let unmatched = app
        .metric("http_requests_total{method=\"OPTIONS\",route=\"unmatched\",status=\"404\"}")
        .await;
    assert_eq!(unmatched, None);
}

/// Credentials that are refused, by name: the value of `Authorization`, further headers, and the
/// `code` of the answer.
struct Bad {
    name: &'static str,
    headers: Vec<(&'static str, String)>,
    code: Value,
    is_key: bool,
}

fn send<'a>(
    client: &Client,
    method: &str,
    path: &str,
    headers: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> impl Future<Output = Response> {
    let method: Method = method.to_uppercase().parse().unwrap();
    let mut request = client.request(method, path);
    for (name, value) in headers {
        request = request.header(name, value);
    }
    request.send()
}

/// The path with an object of this user's in it, made for this call.
async fn path_to_object(owner: &User, template: &str) -> String {
    let template = &template.replace("{model}", "mock");
    if !template.contains("{id}") {
        return template.to_owned();
    }
    let id = if template.starts_with("/api/keys") {
        owner.api_key("an object").await.id
    } else if template.starts_with("/v1/") {
        let body = json!({ "model": "mock", "messages": [{ "role": "user", "content": "hi" }] });
        let answer = owner.post("/v1/chat/completions").json(&body).send().await;
        answer.json()["id"].as_str().unwrap().to_owned()
    } else {
        owner.prompt("a prompt of the owner's").await.to_string()
    };
    template.replace("{id}", &id)
}

#[tokio::test]
async fn every_operation_responds_as_the_authorisation_table_says() {
    let app = spawn_app(|_| ()).await;
    let (owner, stranger) = (app.user("owner").await, app.user("stranger").await);
    let (session, _) = app.login_session("owner").await;
    let bad = bad_credentials(&app, &owner, &session).await;

    for (method, template, access, status) in OPERATIONS {
        let path = path_to_object(&owner, template).await;
        let at = format!("{method} {template}");
        let anonymous = app.client();
        let answers = async |headers: &[(&'static str, String)]| {
            let headers = headers.iter().map(|(name, value)| (*name, value.as_str()));
            send(anonymous, method, &path, headers).await
        };
        match access {
            Access::Open | Access::NoKeys => {
                let plain = answers(&[]).await;
                assert_eq!(plain.status, *status, "{at}: {plain:?}");
                for bad in &bad {
                    let refuses = *access == Access::NoKeys && bad.is_key;
                    let expected = if refuses { 403 } else { *status };
                    // The cookie of a session would end it.
                    if bad.name != "a session cookie" {
                        let answer = answers(&bad.headers).await;
                        assert_eq!(
                            answer.status, expected,
                            "{at} with {}: {answer:?}",
                            bad.name
                        );
                    }
                }
            }
            Access::Bearer(_) | Access::AnyKey | Access::Owner(_) => {
                for bad in &bad {
                    let answer = answers(&bad.headers).await;
                    refused(&answer, &bad.code, &format!("{at} with {}", bad.name));
                }
                if matches!(access, Access::Owner(_)) {
                    let others = send(&stranger.client, method, &path, []).await;
                    let none = template.replace("{id}", "99999999");
                    let none = send(&stranger.client, method, &none, []).await;
                    assert_eq!((others.status, none.status), (404, 404), "{at}");
                    assert_eq!(
                        others.body, none.body,
                        "{at}: another's object looks like none"
                    );
                }
                let answer = send(&owner.client, method, &path, []).await;
                assert_eq!(answer.status, *status, "{at}: {answer:?}");
            }
            Access::Socket => {
                for bad in bad.iter().filter(|bad| bad.name != "a session cookie") {
                    let headers: Vec<(&str, &str)> = bad
                        .headers
                        .iter()
                        .map(|(name, value)| (*name, value.as_str()))
                        .collect();
                    let answer = app.socket(&path, &headers).await.err().unwrap();
                    refused(&answer, &bad.code, &format!("{at} with {}", bad.name));
                }
                let bearer = format!("Bearer {}", owner.access);
                assert!(
                    app.socket(&path, &[("authorization", &bearer)])
                        .await
                        .is_ok()
                );
            }
        }
    }
}

#[tokio::test]
async fn every_operation_takes_an_api_key_of_its_scope_alone() {
    let app = spawn_app(|_| ()).await;
    let (owner, stranger) = (app.user("owner").await, app.user("stranger").await);
    let mut keys = Vec::new();
    for scope in Scope::ALL {
        let body = json!({ "name": scope.as_str(), "scopes": [scope.as_str()] });
        keys.push((scope, owner.api_key_with(&body).await.client));
    }
    for (method, template, access, status) in OPERATIONS {
        for (scope, client) in &keys {
            let path = path_to_object(&owner, template).await;
            let at = format!("{method} {template} with the scope {}", scope.as_str());
            if *access == Access::Socket {
                let bearer = format!("Bearer {}", client.bearer());
                for (path, headers) in [
                    (path.clone(), vec![("authorization", bearer.as_str())]),
                    (format!("{path}?token={}", client.bearer()), vec![]),
                ] {
                    let answer = app.socket(&path, &headers).await.err().unwrap();
                    refused(&answer, &json!("token_not_valid"), &at);
                }
                continue;
            }
            let answer = send(client, method, &path, []).await;
            let expected = match access {
                Access::Open | Access::AnyKey => *status,
                Access::Bearer(needed) | Access::Owner(needed) if *needed == Some(*scope) => {
                    *status
                }
                Access::Bearer(_) | Access::Owner(_) | Access::NoKeys => 403,
                Access::Socket => unreachable!(),
            };
            assert_eq!(answer.status, expected, "{at}: {answer:?}");
            if expected == 403 {
                let body = answer.json();
                let error = body.get("error").unwrap_or(&body);
                assert_eq!(error["code"], "scope", "{at}");
            }
            if matches!(access, Access::Owner(Some(needed)) if needed == scope) {
                let path = path_to_object(&stranger, template).await;
                let answer = send(client, method, &path, []).await;
                assert_eq!(answer.status, 404, "{at}: of a stranger");
            }
        }
    }
}

async fn bad_credentials(app: &App, owner: &User, session: &str) -> Vec<Bad> {
    let bearer = |name, token: &str, code: Value| Bad {
        name,
        headers: vec![("authorization", format!("Bearer {token}"))],
        code,
        is_key: token.starts_with("ps_"),
    };
    let raw = |name, value: &str, code| Bad {
        name,
        headers: vec![("authorization", value.to_owned())],
        code,
        is_key: false,
    };
    let now = Timestamp::now();
    let hour = Duration::from_secs(3600);
    let other_key = spawn_app(|_| ()).await;
    let invalid = || json!("token_not_valid");
    // The same claims with `none` for an algorithm: {"alg":"none","typ":"JWT"}.
    let unsigned = {
        let claims = owner.access.split('.').nth(1).unwrap();
        format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{claims}.")
    };
    let cut = &owner.access[..owner.access.len() - 2];
    let key = owner.api_key("revoked").await;
    let revoked = owner.delete(&format!("/api/keys/{}", key.id)).send().await;
    assert_eq!(revoked.status, 204, "{revoked:?}");
    let unknown = ApiKeyText::random().unwrap();
    let expired = expired_key(app, owner).await;
    vec![
        Bad {
            name: "no credentials",
            headers: Vec::new(),
            code: Value::Null,
            is_key: false,
        },
        raw("another scheme", "Basic b3duZXI6cGFzc3dvcmQ=", Value::Null),
        raw(
            "the scheme in lower case",
            &format!("bearer {}", owner.access),
            Value::Null,
        ),
        raw(
            "a scheme alone",
            "Bearer",
            json!("bad_authorization_header"),
        ),
        raw("two words", "Bearer a b", json!("bad_authorization_header")),
        bearer("garbage", "garbage", invalid()),
        bearer("a token cut short", cut, invalid()),
        bearer("a token without signature", &unsigned, invalid()),
        bearer("an expired token", &app.expired_token(owner.id), invalid()),
        bearer("a refresh token", &owner.refresh, invalid()),
        bearer("a revoked API key", &key.text, invalid()),
        bearer("an API key cut short", &key.text[..48], invalid()),
        bearer("an unknown API key", unknown.expose(), invalid()),
        bearer("an expired API key", expired.expose(), invalid()),
        bearer(
            "a token of another key",
            &other_key.token(TokenType::Access, owner.id, now, hour),
            invalid(),
        ),
        bearer(
            "a token of nobody",
            &app.token(TokenType::Access, 999_999, now, hour),
            json!("user_not_found"),
        ),
        Bad {
            name: "a session cookie",
            headers: vec![
                ("cookie", format!("session={session}")),
                ("origin", format!("http://{}", app.addr)),
            ],
            code: Value::Null,
            is_key: false,
        },
    ]
}

/// A key that expired an hour ago, put into the store as it is.
async fn expired_key(app: &App, owner: &User) -> ApiKeyText {
    let text = ApiKeyText::random().unwrap();
    let now = Timestamp::now();
    let key = ApiKey {
        id: text.id(),
        user_id: UserId(owner.id),
        name: "expired".to_owned(),
        scopes: Scope::ALL.into_iter().collect(),
        models: Vec::new(),
        rates: None,
        budget: None,
        expires_at: Some(now.minus(Duration::from_secs(3600))),
        created_at: now.minus(Duration::from_secs(7200)),
        last_used_at: None,
        last_four: text.last_four().to_owned(),
    };
    let record = ApiKeyRecord {
        key,
        key_hash: text.hash(),
        previous: None,
        revoked_at: None,
    };
    let store = app.folder.store().await;
    store.create_api_key(record, 100, now).await.unwrap();
    text
}

/// Whether the answer is the 401 of that `code`.
fn refused(answer: &Response, code: &Value, at: &str) {
    assert_eq!(answer.status, 401, "{at}: {answer:?}");
    assert_eq!(
        answer.header("www-authenticate"),
        Some("Bearer realm=\"api\""),
        "{at}"
    );
    let body = answer.json();
    match body.get("error") {
        // OpenAI's clients know one code.
        Some(error) => {
            assert_eq!(error["code"], "invalid_api_key", "{at}: {body}");
            assert!(error["message"].is_string(), "{at}: {body}");
        }
        None => {
            assert_eq!(body["code"], *code, "{at}: {body}");
            assert!(body["detail"].is_string(), "{at}: {body}");
        }
    }
    assert_eq!(
        answer.header("ratelimit"),
        None,
        "{at}: nothing is told to a stranger"
    );
}
