//! The API's description: made from the routes themselves, then completed with what they have in
//! common. A fact about one route stands at that route.

mod examples;

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::OpenApi;
use utoipa::openapi::{InfoBuilder, LicenseBuilder, OpenApiBuilder};

use self::examples::{Examples, examples, v1_examples};
use super::content_negotiation::EVENT_STREAM;
use super::error::{ErrorResponse, FieldErrorsResponse, INVALID_CREDENTIALS};
use super::extract::Root;
use super::pages::Documents;
use super::router::{known_routes, open_routes, v1_routes};
use super::v1::OpenAiErrorResponse;
use super::{health, pages, ws};

/// Schemas that the operations below refer to without naming their types.
#[derive(OpenApi)]
#[openapi(components(schemas(ErrorResponse, FieldErrorsResponse, OpenAiErrorResponse)))]
struct CommonSchemas;

impl Documents {
    /// Makes the description.
    ///
    /// # Panics
    /// If a route's description cannot be written as JSON. A test would have shown that.
    pub fn make() -> Self {
        let mut document = document();
        let mut written = |root: Root| {
            document["servers"] = json!([{ "url": root.as_str() }]);
            let mut json = serde_json::to_vec_pretty(&document).expect("a description is JSON");
            json.push(b'\n');
            Bytes::from(json)
        };
        Self {
            json: written(Root::Here),
            above: written(Root::Above),
        }
    }
}

/// The layers around a group of routes, which add responses to those of the routes.
#[derive(Clone, Copy, PartialEq)]
enum Layers {
    /// Content negotiation, then authentication.
    KnownApi,
    /// The same, with errors in the form of OpenAI's protocol.
    V1,
    /// Content negotiation.
    OpenApi,
    /// Nothing.
    Plain,
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
                     `multipart/form-data`. The bodies of API keys are JSON alone: forms have neither lists nor null.\n\n\
                     Any request may carry `X-Request-Id` (up to 64 letters, digits, `.`, `_` and `-`): its answer and the log then \
                     carry it too. A request without it, or with another value, gets a random one.",
                ))
                .license(Some(LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build())),
        )
        .build();
    openapi.merge(CommonSchemas::openapi());
    let mut paths = Map::new();
    for (group, layers) in [
        (known_routes().into_openapi(), Layers::KnownApi),
        (v1_routes().into_openapi(), Layers::V1),
        (open_routes().into_openapi(), Layers::OpenApi),
        (ws::router().into_openapi(), Layers::Plain),
        (health::health_router().into_openapi(), Layers::Plain),
        (health::metrics_router().into_openapi(), Layers::Plain),
        (pages::router().into_openapi(), Layers::Plain),
    ] {
        paths.extend(completed_paths(&group, layers));
        openapi.merge(group);
    }
    let mut document = json_of(&openapi);
    document["openapi"] = json!("3.1.0");
    document["components"]["securitySchemes"] = security_schemes();
    document["components"]["headers"] = headers();
    document["tags"] = json!([
        { "name": "accounts", "description": "Registering, logging in and out, tokens." },
        { "name": "keys", "description": "API keys, for programs." },
        { "name": "prompts", "description": "Posting, listing, finding and deleting prompts." },
        { "name": "v1", "description": "OpenAI's protocol: each call is kept, found by search, and pushed where its `metadata` asks for it." },
        { "name": "events", "description": "Answers pushed over WebSocket." },
        { "name": "operation", "description": "Health and metrics." },
        { "name": "documentation", "description": "This description and its pages." },
    ]);
    document["paths"] = Value::Object(paths);
    document
}

fn json_of(description: &impl Serialize) -> Value {
    serde_json::to_value(description).expect("a description is JSON")
}

/// What `Authorization` may hold: an access token, which can be got in two ways, or an API key.
/// Other credentials, which the WebSocket and logging out accept, are no schemes here: tools would
/// offer them for every route.
fn security_schemes() -> Value {
    json!({
        "bearer": { "type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "An access token, as a login gives it." },
        "api_key": { "type": "http", "scheme": "bearer", "bearerFormat": "ps_…", "description": "An API key, as `POST /api/keys` gives it. It needs the scope that the route names." },
        "login": {
            "type": "oauth2",
            "description": "Name and password: gets an access token and sends it. No client id or secret is needed.",
            "flows": { "password": { "tokenUrl": "api/auth/token/", "scopes": {} } },
        },
    })
}

/// The paths of a group as they are published, each operation with the responses of its layers.
fn completed_paths(group: &utoipa::openapi::OpenApi, layers: Layers) -> Map<String, Value> {
    let completed = group.paths.paths.iter().map(|(path, item)| {
        let mut item = json_of(item);
        for operation in item.as_object_mut().into_iter().flat_map(Map::values_mut) {
            complete_operation(operation, layers);
        }
        (published_path(path), item)
    });
    completed.collect()
}

/// The form of a path that clients of the old system use; the other one is served too.
fn published_path(path: &str) -> String {
    if path.starts_with("/api/auth/") || path.starts_with("/ws/") {
        format!("{path}/")
    } else {
        path.to_owned()
    }
}

fn complete_operation(operation: &mut Value, layers: Layers) {
    let is_api = layers != Layers::Plain;
    let error = error_schema(layers);
    let invalid = match layers {
        Layers::V1 => error.clone(),
        Layers::KnownApi | Layers::OpenApi | Layers::Plain => invalid_schema(),
    };
    let needs_token = operation["security"]
        .as_array()
        .is_some_and(|all| all.iter().any(|one| one.get("bearer").is_some()));
    let takes_query = operation["parameters"]
        .as_array()
        .is_some_and(|all| all.iter().any(|one| one["in"] == "query"));
    let mut common: Vec<(&str, &str, Value)> = vec![
        ("405", "The path has no such method.", error.clone()),
        ("500", "A defect.", error.clone()),
    ];
    if is_api {
        common.push(("406", "The client takes no JSON.", error.clone()));
        let description = "Overloaded, or the store or another part is unavailable.";
        common.push(("503", description, error.clone()));
    }
    if needs_token {
        // A client that can send a token can also get one with the login form.
        if let Some(security) = operation["security"].as_array_mut() {
            security.push(json!({ "login": [] }));
        }
        common.push(("401", INVALID_CREDENTIALS, error.clone()));
    }
    if layers == Layers::KnownApi {
        let description = "The request came with an API key that may not be used for it.";
        common.push(("403", description, error.clone()));
    }
    if operation.get("requestBody").is_some() {
        let description = "Fields or the whole body break the rules.";
        common.push(("400", description, invalid.clone()));
        common.push(("408", "The body did not arrive in time.", error.clone()));
        // `Form::MAX_BYTES`; a route with another bound says so itself.
        common.push(("413", "The body is larger than 16 KiB.", error.clone()));
        common.push(("415", "The body is of no kind taken here.", error.clone()));
        // An optional body is described as an object or null, but null itself is refused.
        let json = operation.pointer_mut("/requestBody/content/application~1json");
        if let Some(json) = json
            && let Some(present) = json.pointer("/schema/oneOf/0").cloned()
        {
            json["schema"] = present;
        }
    } else if is_api && takes_query {
        common.push(("400", "A parameter breaks its rules.", invalid.clone()));
    }
    let name = operation["operationId"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let Some(responses) = operation["responses"].as_object_mut() else {
        return;
    };
    responses.values_mut().for_each(describe_stream_in_words);
    for (status, description, schema) in common {
        let described = responses
            .entry(status)
            .or_insert_with(|| json!({ "description": description, "content": { "application/json": { "schema": &schema } } }));
        // A 503 also comes from the layers and parts that all routes of the API share, so a route's
        // own body for it is one of two.
        if status == "503"
            && let Some(own) = described.pointer_mut("/content/application~1json/schema")
            && *own != schema
        {
            *own = json!({ "anyOf": [own.take(), schema] });
        }
    }
    for (status, response) in responses.iter_mut() {
        let is_to_known_user = match layers {
            Layers::KnownApi => status != "401" && status != "406",
            Layers::V1 => false,
            // A WebSocket's handshake authenticates last, so only these come after it.
            Layers::OpenApi | Layers::Plain => {
                needs_token && matches!(status.as_str(), "101" | "429")
            }
        };
        add_headers(status, is_api, is_to_known_user, response);
        if layers == Layers::V1 {
            add_v1_headers(status, response);
            add_examples(v1_examples(&name, status), response);
        } else {
            add_examples(examples(&name, status), response);
        }
    }
    // These come from the HTTP parser, before there is a request for the router: they have no body
    // and none of our headers.
    for (status, description) in [
        ("414", "The address is longer than 64 KiB."),
        ("431", "The headers, or the address, are far too long."),
    ] {
        responses.insert(status.to_owned(), json!({ "description": description }));
    }
}

/// OpenAPI 3.1 cannot describe a sequence of events, and tools take a schema for the schema of
/// each: the routes describe their events in words. A response that is nothing but a stream gets no
/// media type: Swagger UI asks for the type of the first 2xx response that has one, and that must
/// be JSON.
fn describe_stream_in_words(response: &mut Value) {
    let Some(response) = response.as_object_mut() else {
        return;
    };
    if let Some(content) = response.get_mut("content").and_then(Value::as_object_mut)
        && let Some(stream) = content.get_mut(EVENT_STREAM)
    {
        *stream = json!({});
        if content.len() == 1 {
            response.remove("content");
        }
    }
}

fn error_schema(layers: Layers) -> Value {
    let name = match layers {
        Layers::V1 => "OpenAiErrorResponse",
        Layers::KnownApi | Layers::OpenApi | Layers::Plain => "ErrorResponse",
    };
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn invalid_schema() -> Value {
    json!({ "anyOf": [{ "$ref": "#/components/schemas/FieldErrorsResponse" }, { "$ref": "#/components/schemas/ErrorResponse" }] })
}

/// The headers that many responses carry, each described once.
fn headers() -> Value {
    let header = |kind: &str, description: &str| json!({ "description": description, "schema": { "type": kind } });
    json!({
        "Allow": header("string", "The methods that the path has."),
        "RateLimit": header("string", "The rate with the least left, such as `\"minute\";r=9;t=54`."),
        "RateLimit-Policy": header("string", "The rates of `POST /api/prompts`, such as `\"second\";q=1;w=1, \"minute\";q=10;w=60`."),
        "Retry-After": header("integer", "Whole seconds to wait."),
        "Vary": header("string", "`Accept`."),
        "WWW-Authenticate": header("string", "`Bearer realm=\"api\"`."),
        "openai-processing-ms": header("integer", "Milliseconds until the response began."),
        "retry-after-ms": header("integer", "Milliseconds to wait."),
        "X-Request-Id": header("string", "The request's id: the caller's `X-Request-Id` if it is usable, else a random one."),
    })
}

/// `is_api`: whether the response depends on `Accept`.
fn add_headers(status: &str, is_api: bool, is_to_known_user: bool, response: &mut Value) {
    let of_status: &[&str] = match status {
        "401" => &["WWW-Authenticate"],
        "405" => &["Allow"],
        "429" | "503" => &["Retry-After"],
        _ => &[],
    };
    let of_known: &[&str] = if is_to_known_user {
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

/// Adds the headers of OpenAI's protocol.
fn add_v1_headers(status: &str, response: &mut Value) {
    let mut names = vec!["openai-processing-ms"];
    if status == "429" {
        names.push("retry-after-ms");
    }
    for name in names {
        response["headers"][name] = json!({ "$ref": format!("#/components/headers/{name}") });
    }
}

/// Adds examples to an error response.
fn add_examples(examples: Examples, response: &mut Value) {
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
