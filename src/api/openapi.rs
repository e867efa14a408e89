//! The API's description: made from the routes themselves, then completed with what they have in common.

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::openapi::{InfoBuilder, LicenseBuilder, OpenApiBuilder};
use utoipa::{OpenApi, ToSchema};

use super::session_cookie;
use super::yaml::to_yaml;
use super::{accounts, health, pages, prompts, ws};

/// The description, ready to send.
#[derive(Clone, Debug)]
pub struct Documents {
    /// As JSON, indented, with a newline at the end: the committed `openapi.json` to the byte.
    pub json: Bytes,
    /// As YAML.
    pub yaml: Bytes,
}

/// An error that concerns the request as a whole.
#[derive(Serialize, ToSchema)]
pub struct ErrorResponse {
    /// For humans; may change.
    #[schema(example = "Not found.")]
    detail: String,
    /// For programs; stays.
    #[schema(example = "token_not_valid")]
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
        let document = document();
        let mut json = serde_json::to_vec_pretty(&document).expect("a description is JSON");
        json.push(b'\n');
        let yaml = to_yaml(&document);
        Self {
            json: json.into(),
            yaml: yaml.into(),
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
                     answers over WebSocket. Every route answers with and without a trailing slash.",
                ))
                .license(Some(LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build())),
        )
        .build();
    openapi.merge(Shared::openapi());
    for router in [
        accounts::open_router(),
        accounts::known_router(),
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
    document["servers"] = json!([{ "url": "/" }]);
    document["components"]["securitySchemes"] = security_schemes();
    document["tags"] = json!([
        { "name": "accounts", "description": "Registering, logging in and out, tokens." },
        { "name": "prompts", "description": "Posting, listing, finding and deleting prompts." },
        { "name": "events", "description": "Answers pushed over WebSocket." },
        { "name": "operation", "description": "Health and metrics." },
        { "name": "documentation", "description": "This description and its pages." },
    ]);
    let paths = document["paths"].take();
    document["paths"] = complete(paths, &document["components"]);
    document
}

fn security_schemes() -> Value {
    json!({
        "bearer": { "type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "An access token." },
        "session": { "type": "apiKey", "in": "cookie", "name": session_cookie::PLAIN_NAME, "description": "The cookie that a login sets if asked to; over TLS its name is `__Host-session`. For the WebSocket, refreshing and logging out only." },
        "ticket": { "type": "apiKey", "in": "query", "name": "ticket", "description": "A one-use ticket. For the WebSocket only." },
        "token": { "type": "apiKey", "in": "query", "name": "token", "description": "An access token. For the WebSocket only; a ticket is safer." },
    })
}

/// Writes each path as it is published, and adds to each operation what all of its kind answer.
fn complete(paths: Value, components: &Value) -> Value {
    let Value::Object(paths) = paths else {
        return paths;
    };
    let completed = paths.into_iter().map(|(path, mut item)| {
        if let Value::Object(operations) = &mut item {
            for (method, operation) in operations.iter_mut() {
                complete_operation(&path, method, operation, components);
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

fn complete_operation(path: &str, method: &str, operation: &mut Value, components: &Value) {
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
            "Overloaded, or something it stands on is away; or the upstream cannot be asked: then with the `id` of the prompt, which is kept as failed.",
            json!({ "anyOf": [{ "$ref": "#/components/schemas/FailedPromptResponse" }, error_schema()] }),
        ));
    }
    if is_api {
        add_request_id(operation);
        extra.push(("406", "The client takes no JSON.", error_schema()));
        extra.push((
            "503",
            "Overloaded, or something it stands on is away.",
            error_schema(),
        ));
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
        extra.push(("413", "The body is larger than 1 MiB.", error_schema()));
        extra.push(("415", "The body is of no kind taken here.", error_schema()));
        let content = operation["requestBody"]["content"].as_object_mut();
        if let Some(content) = content {
            let mut schema = content.get("application/json").cloned().unwrap_or_default();
            // A body that may be left out comes described as an object or null; null itself is refused.
            if let Some(present) = schema.pointer("/schema/oneOf/0").cloned() {
                schema["schema"] = present;
                content.insert("application/json".to_owned(), schema.clone());
            }
            let schema = written_out(&schema, components);
            for form in ["application/x-www-form-urlencoded", "multipart/form-data"] {
                content.insert(form.to_owned(), schema.clone());
            }
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
        ("/api/auth/register" | "/api/auth/login" | "/ws/prompts", _) | ("/api/prompts", "post")
    ) {
        extra.push((
            "429",
            "Too many. `Retry-After` says when one succeeds.",
            error_schema(),
        ));
    }
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
    }
    // These come from the HTTP parser, before there is a request to speak of: no body, no headers of ours.
    for (status, description) in [
        ("414", "The address is longer than 64 KiB."),
        ("431", "The headers, or the address, are far too long."),
    ] {
        responses.insert(status.to_owned(), json!({ "description": description }));
    }
}

/// Describes the one header that any request may carry.
fn add_request_id(operation: &mut Value) {
    let parameter = json!({
        "name": "X-Request-Id",
        "in": "header",
        "required": false,
        // Nothing is refused for it, so no pattern is given.
        "schema": { "type": "string" },
        "description": "An id for the answer and the log to carry. Up to 64 letters, digits, `.`, `_` and `-`; another is replaced by a random one.",
    });
    if operation.get("parameters").is_none() {
        operation["parameters"] = json!([]);
    }
    if let Some(parameters) = operation["parameters"].as_array_mut() {
        parameters.push(parameter);
    }
}

/// A media type with its schema in place of a reference to it.
///
/// Generated clients choose the encoding of a body by its type. Were one type named for all three, some would send all three at once.
fn written_out(media_type: &Value, components: &Value) -> Value {
    let mut written_out = media_type.clone();
    let schema = media_type["schema"]["$ref"]
        .as_str()
        .and_then(|reference| reference.strip_prefix("#/components"))
        .and_then(|pointer| components.pointer(pointer));
    if let Some(schema) = schema {
        written_out["schema"] = schema.clone();
    }
    written_out
}

fn error_schema() -> Value {
    json!({ "$ref": "#/components/schemas/ErrorResponse" })
}

fn invalid_schema() -> Value {
    json!({ "anyOf": [{ "$ref": "#/components/schemas/FieldErrorsResponse" }, { "$ref": "#/components/schemas/ErrorResponse" }] })
}

/// `is_api`: whether the answer depends on `Accept`; `is_known`: whether it is one to a known user.
fn add_headers(status: &str, is_api: bool, is_known: bool, response: &mut Value) {
    let mut headers = Map::new();
    let mut add = |name: &str, kind: &str, description: &str| {
        headers.insert(
            name.to_owned(),
            json!({ "description": description, "schema": { "type": kind } }),
        );
    };
    add(
        "X-Request-Id",
        "string",
        "The request's id: the caller's `X-Request-Id` if it is usable, else a random one.",
    );
    match status {
        "401" => add("WWW-Authenticate", "string", "`Bearer realm=\"api\"`."),
        "405" => add("Allow", "string", "The methods that the path has."),
        "429" | "503" => add("Retry-After", "integer", "Whole seconds to wait."),
        _ => {}
    }
    if is_api {
        add("Vary", "string", "`Accept`.");
    }
    if is_known {
        add(
            "RateLimit-Policy",
            "string",
            "The rates of `POST /api/prompts`, such as `\"second\";q=1;w=1, \"minute\";q=10;w=60`.",
        );
        add(
            "RateLimit",
            "string",
            "The rate with the least left, such as `\"minute\";r=9;t=54`.",
        );
    }
    if let Some(known) = response.get("headers").and_then(Value::as_object) {
        headers.extend(known.clone());
    }
    response["headers"] = Value::Object(headers);
}
