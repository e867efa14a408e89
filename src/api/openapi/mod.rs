//! The API's description: made from the routes themselves, then completed with what they have in common.

mod examples;

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::openapi::{InfoBuilder, LicenseBuilder, OpenApiBuilder};
use utoipa::{OpenApi, ToSchema};

use self::examples::examples;
use super::extract::Root;
use super::yaml::to_yaml;
use super::{accounts, health, oauth, pages, prompts, ws};

/// The description, ready to send.
#[derive(Clone, Debug)]
pub struct Documents {
    /// As JSON, indented, with a newline at the end: the committed `openapi.json` to the byte.
    pub json: Bytes,
    /// As YAML.
    pub yaml: Bytes,
    /// Both for a reader at `/schema/`, to whom the relative address of the routes is another one.
    above: (Bytes, Bytes),
}

/// An error that concerns the request as a whole.
#[derive(Serialize, ToSchema)]
pub struct ErrorResponse {
    /// For humans; may change.
    detail: String,
    /// For programs; stays. Absent where the status says enough.
    code: Option<String>,
}

/// Errors by field: a list of messages each.
#[derive(Serialize, ToSchema)]
pub struct FieldErrorsResponse(std::collections::HashMap<String, Vec<String>>);

#[derive(OpenApi)]
#[openapi(components(schemas(ErrorResponse, FieldErrorsResponse)))]
struct Shared;

impl Documents {
    /// Makes the description.
    ///
    /// # Panics
    /// If a route is described in a form that is no JSON, which a test would have shown.
    pub fn make() -> Self {
        let mut document = document();
        let mut written = |root: Root| {
            document["servers"] = json!([{ "url": root.as_str() }]);
            let mut json = serde_json::to_vec_pretty(&document).expect("a description is JSON");
            json.push(b'\n');
            (Bytes::from(json), Bytes::from(to_yaml(&document)))
        };
        let above = written(Root::Above);
        let (json, yaml) = written(Root::Here);
        Self { json, yaml, above }
    }

    /// JSON and YAML for a reader who sees the service's root there.
    pub fn seen_from(&self, root: Root) -> (&Bytes, &Bytes) {
        match root {
            Root::Here => (&self.json, &self.yaml),
            Root::Above => (&self.above.0, &self.above.1),
        }
    }
}

fn document() -> Value {
    let mut openapi = OpenApiBuilder::new()
        .info(
            InfoBuilder::new()
                .title("Prompt Service API")
                .version(env!("CARGO_PKG_VERSION"))
                .description(Some(
                    "Takes prompts from signed-in users, runs them on an LLM, keeps them, finds similar ones by meaning, and pushes \
                     answers over WebSocket. Every route answers with and without a trailing slash.\n\n\
                     A body is JSON, as described here, or a form with the same fields: `application/x-www-form-urlencoded` or \
                     `multipart/form-data`.\n\n\
                     Any request may carry `X-Request-Id` (up to 64 letters, digits, `.`, `_` and `-`): its answer and the log then \
                     carry it too. A request without it, or with another value, gets a random one.",
                ))
                .license(Some(LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build())),
        )
        .build();
    openapi.merge(Shared::openapi());
    for router in [
        accounts::open_router(),
        accounts::known_router(),
        oauth::router(),
        prompts::router(),
        ws::router(),
        health::health_router(),
        health::metrics_router(),
        pages::router(),
    ] {
        openapi.merge(router.into_openapi());
    }
    let mut document = serde_json::to_value(&openapi).expect("a description is JSON");
    document["openapi"] = json!("3.1.0");
    document["components"]["securitySchemes"] = security_schemes();
    document["components"]["headers"] = headers();
    document["tags"] = json!([
        { "name": "accounts", "description": "Registering, logging in and out, tokens." },
        { "name": "prompts", "description": "Posting, listing, finding and deleting prompts." },
        { "name": "events", "description": "Answers pushed over WebSocket." },
        { "name": "operation", "description": "Health and metrics." },
        { "name": "documentation", "description": "This description and its pages." },
    ]);
    let paths = document["paths"].take();
    document["paths"] = complete(paths);
    document
}

/// The two ways to an access token in `Authorization`. What the WebSocket and logging out accept
/// besides is no scheme here, because tools would offer it for every route.
fn security_schemes() -> Value {
    json!({
        "bearer": { "type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "An access token, as a login gives it." },
        "login": {
            "type": "oauth2",
            "description": "Name and password: gets an access token and sends it. No client id or secret is needed.",
            "flows": { "password": { "tokenUrl": "api/auth/token/", "scopes": {} } },
        },
    })
}

/// Writes each path as it is published, and adds to each operation what all of its kind answer.
fn complete(paths: Value) -> Value {
    let Value::Object(paths) = paths else {
        return paths;
    };
    let completed = paths.into_iter().map(|(path, mut item)| {
        if let Value::Object(operations) = &mut item {
            for (method, operation) in operations.iter_mut() {
                complete_operation(&path, method, operation);
            }
        }
        (published_path(&path), item)
    });
    Value::Object(completed.collect())
}

/// The form of a path that clients of the old system use; the other one is served too.
fn published_path(path: &str) -> String {
    if path.starts_with("/api/auth/") || path.starts_with("/ws/") {
        format!("{path}/")
    } else {
        path.to_owned()
    }
}

fn complete_operation(path: &str, method: &str, operation: &mut Value) {
    let is_api = path.starts_with("/api/");
    let needs_token = operation["security"]
        .as_array()
        .is_some_and(|all| all.iter().any(|one| one.get("bearer").is_some()));
    let takes_body = operation.get("requestBody").is_some();
    let counts_rates = needs_token && is_api;
    let mut extra: Vec<(&str, &str, Value)> = vec![
        ("405", "The path has no such method.", error_schema()),
        ("500", "A defect.", error_schema()),
    ];
    if (path, method) == ("/api/prompts", "post") {
        extra.push((
            "503",
            "Overloaded, or the store or another part is unavailable; or the upstream cannot be asked: then with the `id` of the prompt, which is kept as failed.",
            json!({ "anyOf": [{ "$ref": "#/components/schemas/FailedPromptResponse" }, error_schema()] }),
        ));
    }
    if is_api {
        extra.push(("406", "The client takes no JSON.", error_schema()));
        extra.push((
            "503",
            "Overloaded, or the store or another part is unavailable.",
            error_schema(),
        ));
    }
    if needs_token {
        // Whoever takes a token takes one from the login form too.
        if let Some(security) = operation["security"].as_array_mut() {
            security.push(json!({ "login": [] }));
        }
    }
    if needs_token || path == "/api/auth/login" || path == "/api/auth/refresh" {
        extra.push(("401", "No valid credentials.", error_schema()));
    }
    if takes_body {
        extra.push((
            "400",
            "Fields or the whole body break the rules.",
            invalid_schema(),
        ));
        extra.push(("408", "The body did not arrive in time.", error_schema()));
        let too_large = match path {
            "/api/prompts" => "The body is larger than 1 MiB.",
            _ => "The body is larger than 16 KiB.",
        };
        extra.push(("413", too_large, error_schema()));
        extra.push(("415", "The body is of no kind taken here.", error_schema()));
        // A body that may be left out comes described as an object or null; null itself is refused.
        let json = operation.pointer_mut("/requestBody/content/application~1json");
        if let Some(json) = json
            && let Some(present) = json.pointer("/schema/oneOf/0").cloned()
        {
            json["schema"] = present;
        }
    } else if matches!(path, "/api/prompts" | "/api/prompts/similar") {
        extra.push(("400", "A parameter breaks its rules.", invalid_schema()));
    }
    if path.ends_with("/{id}") {
        extra.push((
            "404",
            "There is no such prompt, or it is another user's.",
            error_schema(),
        ));
    }
    if path == "/api/auth/register" {
        extra.push(("403", "Registration is closed.", error_schema()));
    }
    if matches!(
        (path, method),
        (
            "/api/auth/register" | "/api/auth/login" | "/api/auth/token" | "/ws/prompts",
            _
        ) | ("/api/prompts", "post")
    ) {
        extra.push((
            "429",
            "Too many. `Retry-After` says when one succeeds.",
            error_schema(),
        ));
    }
    let name = operation["operationId"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let Some(responses) = operation["responses"].as_object_mut() else {
        return;
    };
    for response in responses.values_mut() {
        // OpenAPI 3.1 has no word for a sequence of events, and tools take a schema for that of each: their shapes are said in words.
        if let Some(stream) = response.pointer_mut("/content/text~1event-stream") {
            *stream = json!({});
        }
    }
    for (status, description, schema) in extra {
        responses
            .entry(status)
            .or_insert_with(|| json!({ "description": description, "content": { "application/json": { "schema": schema } } }));
    }
    for (status, response) in responses.iter_mut() {
        let is_known = if path == "/ws/prompts" {
            matches!(status.as_str(), "101" | "429")
        } else {
            counts_rates && status != "401" && status != "406"
        };
        add_headers(status, is_api, is_known, response);
        add_examples(&name, status, response);
    }
    // These come from the HTTP parser, before there is a request to speak of: no body, no headers of ours.
    for (status, description) in [
        ("414", "The address is longer than 64 KiB."),
        ("431", "The headers, or the address, are far too long."),
    ] {
        responses.insert(status.to_owned(), json!({ "description": description }));
    }
}

fn error_schema() -> Value {
    json!({ "$ref": "#/components/schemas/ErrorResponse" })
}

fn invalid_schema() -> Value {
    json!({ "anyOf": [{ "$ref": "#/components/schemas/FieldErrorsResponse" }, { "$ref": "#/components/schemas/ErrorResponse" }] })
}

/// The headers that many answers carry, each described once.
fn headers() -> Value {
    let header = |kind: &str, description: &str| json!({ "description": description, "schema": { "type": kind } });
    json!({
        "Allow": header("string", "The methods that the path has."),
        "RateLimit": header("string", "The rate with the least left, such as `\"minute\";r=9;t=54`."),
        "RateLimit-Policy": header("string", "The rates of `POST /api/prompts`, such as `\"second\";q=1;w=1, \"minute\";q=10;w=60`."),
        "Retry-After": header("integer", "Whole seconds to wait."),
        "Vary": header("string", "`Accept`."),
        "WWW-Authenticate": header("string", "`Bearer realm=\"api\"`."),
        "X-Request-Id": header("string", "The request's id: the caller's `X-Request-Id` if it is usable, else a random one."),
    })
}

/// `is_api`: whether the answer depends on `Accept`; `is_known`: whether it is one to a known user.
fn add_headers(status: &str, is_api: bool, is_known: bool, response: &mut Value) {
    let of_status: &[&str] = match status {
        "401" => &["WWW-Authenticate"],
        "405" => &["Allow"],
        "429" | "503" => &["Retry-After"],
        _ => &[],
    };
    let of_known: &[&str] = if is_known {
        &["RateLimit-Policy", "RateLimit"]
    } else {
        &[]
    };
    let of_api: &[&str] = if is_api { &["Vary"] } else { &[] };
    let mut headers: Map<String, Value> = [&["X-Request-Id"], of_status, of_known, of_api]
        .concat()
        .into_iter()
        .map(|name| {
            let reference = format!("#/components/headers/{name}");
            (name.to_owned(), json!({ "$ref": reference }))
        })
        .collect();
    if let Some(own) = response.get("headers").and_then(Value::as_object) {
        headers.extend(own.clone());
    }
    response["headers"] = Value::Object(headers);
}

/// Shows what an error answer looks like.
fn add_examples(operation: &str, status: &str, response: &mut Value) {
    let examples = examples(operation, status);
    let Some(media_type) = response.pointer_mut("/content/application~1json") else {
        return;
    };
    match examples.as_slice() {
        [] => {}
        [(_, only)] => media_type["example"] = only.clone(),
        several => {
            let named = several
                .iter()
                .map(|(name, value)| ((*name).to_owned(), json!({ "value": value })));
            media_type["examples"] = Value::Object(named.collect());
        }
    }
}
