//! What the API's description shows: examples that are true, credentials that can be used, nothing
//! said twice.

use std::collections::BTreeSet;

use hyper::Method;
use prompt_service::api::Documents;
use serde_json::{Value, json};

use crate::support::{PASSWORD, Response, spawn_app};

fn document() -> Value {
    serde_json::from_slice(&Documents::make().json).unwrap()
}

/// Each operation: its method, its path and itself.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let paths = document["paths"].as_object().unwrap();
    let each = paths.iter().flat_map(|(path, item)| {
        let methods = item.as_object().unwrap().iter();
        methods.map(|(method, operation)| (method.clone(), path.clone(), operation.clone()))
    });
    each.collect()
}

/// The examples of an answer, whether it has one or several.
fn examples(answer: &Value) -> Vec<Value> {
    let media_type = &answer["content"]["application/json"];
    match (media_type.get("example"), media_type.get("examples")) {
        (Some(example), None) => vec![example.clone()],
        (None, Some(examples)) => {
            let examples = examples.as_object().unwrap().values();
            examples.map(|example| example["value"].clone()).collect()
        }
        (None, None) => Vec::new(),
        (Some(_), Some(_)) => panic!("both example and examples: {media_type}"),
    }
}

/// Text with every number in it replaced: how long to wait, and where in a text the parser stopped,
/// differ from case to case.
fn without_numbers(value: &Value) -> String {
    let text = value.to_string();
    let mut plain = String::new();
    for character in text.chars() {
        if !character.is_ascii_digit() {
            plain.push(character);
        } else if !plain.ends_with('N') {
            plain.push('N');
        }
    }
    plain
}

#[test]
fn every_error_has_examples_of_its_own_and_only_a_401_is_about_tokens() {
    for (method, path, operation) in operations(&document()) {
        for (status, answer) in operation["responses"].as_object().unwrap() {
            let at = format!("{method} {path} {status}");
            let is_error = status.starts_with(['4', '5']);
            let examples = examples(answer);
            if is_error && answer.get("content").is_some() {
                assert!(!examples.is_empty(), "{at} has no example");
            }
            let distinct: BTreeSet<String> = examples.iter().map(Value::to_string).collect();
            assert_eq!(
                distinct.len(),
                examples.len(),
                "{at} shows an example twice"
            );
            let is_about_tokens = answer.to_string().contains("token_not_valid");
            assert!(!is_about_tokens || status == "401", "{at}");
        }
    }
    let schemas = document()["components"]["schemas"].to_string();
    assert!(!schemas.contains("token_not_valid"));
}

#[test]
fn operations_on_one_object_describe_a_404() {
    for (method, path, operation) in operations(&document()) {
        let responses = operation["responses"].as_object().unwrap();
        assert!(
            !path.contains('{') || responses.contains_key("404"),
            "{method} {path}"
        );
    }
}

#[tokio::test]
async fn returned_errors_are_those_of_the_examples() {
    let closed = spawn_app(|config| {
        config.accounts.registration = prompt_service::config::Registration::Closed;
    })
    .await;
    let app = spawn_app(|config| config.prompt_throttle = "3/day".parse().unwrap()).await;
    let user = app.user("alice").await;
    let document = document();
    let seen = async |method: &str, path: &str, status: u16, answer: Response| {
        let at = format!("{method} {path} {status}");
        assert_eq!(answer.status, status, "{at}: {answer:?}");
        let described = &document["paths"][path][method]["responses"][status.to_string()];
        let body = without_numbers(&answer.json());
        let shown: Vec<String> = examples(described).iter().map(without_numbers).collect();
        assert!(shown.contains(&body), "{at}: {body} is none of {shown:#?}");
    };
    let (anyone, known) = (app.client(), &user.client);
    let register = "/api/auth/register/";
    let (login, token) = ("/api/auth/login/", "/api/auth/token/");
    let (prompts, similar) = ("/api/prompts", "/api/prompts/similar");
    let taken = json!({ "username": "alice", "email": "a@b.c", "password": "secret123" });
    let wrong = json!({ "grant_type": "password", "username": "alice", "password": "wrong" });
    let (chat, json) = ("/v1/chat/completions", "application/json");
    let large = vec![b' '; (1 << 20) + 1];
    for (method, path, status, request) in [
        ("post", register, 400, anyone.post(register).json(&taken)),
        (
            "post",
            register,
            400,
            anyone.post(register).body(json, "{oops"),
        ),
        (
            "post",
            register,
            400,
            anyone.post(register).body(json, "[]"),
        ),
        (
            "post",
            register,
            403,
            closed.client().post(register).json(&taken),
        ),
        (
            "post",
            register,
            406,
            anyone.post(register).header("accept", "text/html"),
        ),
        (
            "post",
            register,
            413,
            anyone.post(register).body(json, large),
        ),
        (
            "post",
            register,
            415,
            anyone.post(register).body("text/plain", "x"),
        ),
        ("post", login, 400, anyone.post(login)),
        ("post", login, 401, anyone.post(login).json(&wrong)),
        (
            "post",
            login,
            403,
            anyone
                .post(login)
                .header("origin", "https://evil.example")
                .json(&json!({ "username": "alice", "password": PASSWORD, "session": true })),
        ),
        ("post", token, 400, anyone.post(token).json(&wrong)),
        (
            "post",
            token,
            400,
            anyone.post(token).json(&json!({ "grant_type": "none" })),
        ),
        (
            "post",
            "/api/auth/refresh/",
            400,
            anyone.post("/api/auth/refresh/"),
        ),
        (
            "post",
            "/api/auth/logout/",
            400,
            anyone
                .post("/api/auth/logout/")
                .json(&json!({ "refresh": [] })),
        ),
        ("get", "/api/auth/me/", 401, anyone.get("/api/auth/me/")),
        (
            "get",
            "/api/auth/me/",
            401,
            anyone
                .get("/api/auth/me/")
                .bearer(&app.expired_token(user.id)),
        ),
        (
            "get",
            "/api/auth/me/",
            405,
            known.request(Method::PATCH, "/api/auth/me/"),
        ),
        ("get", prompts, 400, known.get("/api/prompts?limit=x")),
        ("get", prompts, 400, known.get("/api/prompts?cursor=x")),
        ("get", similar, 400, known.get(similar)),
        (
            "get",
            similar,
            400,
            known.get("/api/prompts/similar?q=x&k=101"),
        ),
        (
            "get",
            "/api/prompts/{id}",
            404,
            known.get("/api/prompts/999"),
        ),
        (
            "post",
            prompts,
            400,
            known.post(prompts).json(&json!({ "prompt": " " })),
        ),
        (
            "post",
            prompts,
            400,
            known.post(prompts).header("idempotency-key", "two words"),
        ),
        ("get", chat, 400, known.get("/v1/chat/completions?limit=x")),
        ("get", chat, 400, known.get("/v1/chat/completions?after=x")),
        ("get", chat, 401, anyone.get(chat)),
        ("get", chat, 405, known.request(Method::PATCH, chat)),
        (
            "get",
            chat,
            406,
            known.get(chat).header("accept", "text/html"),
        ),
        ("post", chat, 400, known.post(chat).body(json, "{oops")),
        (
            "post",
            chat,
            400,
            known.post(chat).json(&json!({ "model": "mock" })),
        ),
        ("post", chat, 415, known.post(chat).body("text/plain", "x")),
        (
            "get",
            "/v1/chat/completions/{id}",
            404,
            known.get("/v1/chat/completions/chatcmpl-999"),
        ),
        (
            "post",
            "/v1/chat/completions/{id}",
            400,
            known
                .post("/v1/chat/completions/chatcmpl-999")
                .json(&json!({ "metadata": 1 })),
        ),
        (
            "get",
            "/v1/models/{model}",
            404,
            known.get("/v1/models/none"),
        ),
        ("get", "/ws/prompts/", 426, known.get("/ws/prompts/")),
        ("get", "/schema", 404, anyone.get("/schema?format=xml")),
    ] {
        seen(method, path, status, request.send().await).await;
    }
    let keyed = async |prompt: &str| {
        let request = known.post(prompts).header("idempotency-key", "once");
        request.json(&json!({ "prompt": prompt })).send().await
    };
    let first = keyed("one").await;
    assert_eq!(first.status, 201, "{first:?}");
    seen("post", prompts, 422, keyed("another").await).await;
    let id = first.json()["id"].clone();
    let deleted = known.request(Method::DELETE, &format!("/api/prompts/{id}"));
    assert_eq!(deleted.send().await.status, 204);
    seen("post", prompts, 410, keyed("one").await).await;
    seen("post", prompts, 429, known.post(prompts).send().await).await;
    let (session, _) = app.login_session("alice").await;
    let cookie = format!("session={session}");
    let headers = [
        ("cookie", cookie.as_str()),
        ("origin", "https://evil.example"),
    ];
    let refused = app.socket("/ws/prompts/", &headers).await.err().unwrap();
    seen("get", "/ws/prompts/", 403, refused).await;
    let refresh = "/api/auth/refresh/";
    let mut request = anyone.post(refresh);
    for (name, value) in headers {
        request = request.header(name, value);
    }
    seen("post", refresh, 403, request.send().await).await;
    let refused = app.socket("/ws/prompts/?ticket=none", &[]).await;
    seen("get", "/ws/prompts/", 401, refused.err().unwrap()).await;
}

/// Swagger UI sends, as `Accept`, the media type of the first 2xx answer that names one; its
/// statuses are in ascending order.
#[test]
fn swagger_ui_asks_every_route_of_the_api_for_json() {
    for (method, path, operation) in operations(&document()) {
        let responses = operation["responses"].as_object().unwrap();
        let named = responses.iter().find_map(|(status, answer)| {
            let types = answer.get("content")?.as_object()?;
            status
                .starts_with('2')
                .then(|| types.keys().next().cloned())
        });
        if path.starts_with("/api/")
            && let Some(named) = named
        {
            assert_eq!(
                named.as_deref(),
                Some("application/json"),
                "{method} {path}"
            );
        }
    }
}

#[test]
fn described_credentials_are_a_token_and_a_login_that_returns_one() {
    let document = document();
    let schemes = document["components"]["securitySchemes"]
        .as_object()
        .unwrap();
    let offered: Vec<&String> = schemes.keys().collect();
    assert_eq!(offered, ["api_key", "bearer", "login"]);
    assert_eq!(schemes["api_key"]["scheme"], "bearer");
    assert_eq!(schemes["bearer"]["scheme"], "bearer");
    let flow = &schemes["login"]["flows"]["password"];
    // Relative, like the address of the server that it is resolved against.
    let token_url = flow["tokenUrl"].as_str().unwrap();
    assert!(document["paths"].get(format!("/{token_url}")).is_some());
    for (method, path, operation) in operations(&document) {
        for requirement in operation["security"].as_array().unwrap() {
            for scheme in requirement.as_object().unwrap().keys() {
                assert!(schemes.contains_key(scheme), "{method} {path}: {scheme}");
            }
        }
    }
}

#[test]
fn the_request_id_is_described_once() {
    let document = document();
    assert!(
        document["info"]["description"]
            .as_str()
            .unwrap()
            .contains("X-Request-Id")
    );
    for (method, path, operation) in operations(&document) {
        let parameters = operation.get("parameters").and_then(Value::as_array);
        for parameter in parameters.into_iter().flatten() {
            assert_ne!(parameter["name"], "X-Request-Id", "{method} {path}");
        }
        for (status, answer) in operation["responses"].as_object().unwrap() {
            if let Some(header) = answer.pointer("/headers/X-Request-Id") {
                let expected = json!({ "$ref": "#/components/headers/X-Request-Id" });
                assert_eq!(*header, expected, "{method} {path} {status}");
            }
        }
    }
}
