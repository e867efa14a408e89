//! Pages for browsers: the front page, Swagger UI, ReDoc, the schema. The binary contains all of
//! them.

use axum::extract::State;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, VARY,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use bytes::Bytes;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::content_negotiation::{VARY_ACCEPT, quality};
use super::error::{ApiError, ErrorResponse};
use super::extract::{Query, Root};

/// The pages may load only files of this service. Swagger UI and ReDoc style their elements in
/// place, ReDoc builds its search worker from a blob, and both have small images as data URLs.
const PAGE_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; \
     connect-src 'self'; worker-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);
const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");
const SCRIPT: HeaderValue = HeaderValue::from_static("text/javascript; charset=utf-8");
const STYLE: HeaderValue = HeaderValue::from_static("text/css; charset=utf-8");

/// The names under which a browser saves the schema.
const JSON_NAME: HeaderValue =
    HeaderValue::from_static("inline; filename=\"Prompt Service API.json\"");
const YAML_NAME: HeaderValue =
    HeaderValue::from_static("inline; filename=\"Prompt Service API.yaml\"");

/// Declares the vendored files: their name under `/assets/`, type and content.
macro_rules! assets {
    ($(($name:literal, $file:literal, $kind:ident)),+ $(,)?) => {
        static ASSETS: [(&str, HeaderValue, &[u8]); 6] = [
            $(($name, $kind, include_bytes!(concat!("../../assets/web/", $file)))),+
        ];
    };
}

assets! {
    ("docs.js", "docs.js", SCRIPT),
    ("pages.css", "pages.css", STYLE),
    ("redoc.js", "redoc.js", SCRIPT),
    ("redoc.standalone.js", "vendor/redoc.standalone.js", SCRIPT),
    ("swagger-ui-bundle.js", "vendor/swagger-ui-bundle.js", SCRIPT),
    ("swagger-ui.css", "vendor/swagger-ui.css", STYLE),
}

/// The API's description, ready to send.
#[derive(Clone, Debug)]
pub struct Documents {
    /// As JSON, indented, with a newline at the end: byte for byte the committed `openapi.json`.
    pub json: Bytes,
    /// The same for a reader at `/schema/`, from where the relative address of the routes is
    /// another one.
    pub above: Bytes,
}

/// The pages that are part of the API's description.
pub fn router() -> OpenApiRouter<Documents> {
    OpenApiRouter::new()
        .routes(routes!(front_page))
        .routes(routes!(schema))
        .routes(routes!(docs))
        .routes(routes!(redoc))
}

/// The files behind the pages, which are not part of it.
pub fn assets_router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    ASSETS
        .iter()
        .fold(Router::new(), |router, (name, kind, content)| {
            let serve = move || std::future::ready(asset(kind.clone(), content));
            router.route(&format!("/assets/{name}"), axum::routing::get(serve))
        })
}

fn asset(kind: HeaderValue, content: &'static [u8]) -> Response {
    // An hour: long enough for a sitting with the docs, short enough that a new version is seen.
    let cache = HeaderValue::from_static("public, max-age=3600");
    ([(CONTENT_TYPE, kind), (CACHE_CONTROL, cache)], content).into_response()
}

/// A page whose links begin with `{root}`.
fn page(content: &str, root: Root) -> Response {
    (
        [(CONTENT_TYPE, HTML), (CONTENT_SECURITY_POLICY, PAGE_POLICY)],
        content.replace("{root}", root.as_str()),
    )
        .into_response()
}

/// What this is.
#[derive(Serialize, ToSchema)]
pub struct FrontPageResponse {
    #[schema(example = "Prompt Service")]
    name: &'static str,
    version: &'static str,
    #[schema(format = "uri-reference", example = "./docs")]
    docs: String,
    #[schema(format = "uri-reference", example = "./redoc")]
    redoc: String,
    #[schema(format = "uri-reference", example = "./schema")]
    schema: String,
    #[schema(format = "uri-reference", example = "./metrics")]
    metrics: String,
    #[schema(format = "uri-reference", example = "./healthz")]
    health: String,
    #[schema(format = "uri-reference", example = "./readyz")]
    readiness: String,
}

/// Front page
///
/// The service's name and version, and links to its pages, relative to this address: HTML to a
/// browser, JSON to others.
#[utoipa::path(
    get, path = "/", tag = "documentation", operation_id = "front_page", security(()),
    responses((status = 200, description = "The links.", content((FrontPageResponse = "application/json"), (String = "text/html")))),
)]
async fn front_page(root: Root, headers: HeaderMap) -> Response {
    let wants_html = quality(&headers, "text/html") > quality(&headers, "application/json");
    let mut response = if wants_html {
        let html = include_str!("../../assets/web/index.html");
        page(
            &html.replacen("{version}", env!("CARGO_PKG_VERSION"), 1),
            root,
        )
    } else {
        let link = |name: &str| format!("{}{name}", root.as_str());
        Json(FrontPageResponse {
            name: "Prompt Service",
            version: env!("CARGO_PKG_VERSION"),
            docs: link("docs"),
            redoc: link("redoc"),
            schema: link("schema"),
            metrics: link("metrics"),
            health: link("healthz"),
            readiness: link("readyz"),
        })
        .into_response()
    };
    response.headers_mut().insert(VARY, VARY_ACCEPT);
    response
}

/// Schema
///
/// This description, OpenAPI 3.1: JSON, or YAML by `Accept` or `?format=yaml`.
#[utoipa::path(
    get, path = "/schema", tag = "documentation", operation_id = "schema", security(()),
    params(("format" = Option<String>, Query, description = "`json` or `yaml`, whatever `Accept` says.")),
    responses(
        (
            status = 200, description = "The description.", content((serde_json::Value = "application/json"), (String = "application/yaml")),
            headers(("Content-Disposition" = String, description = "The name under which to save it.")),
        ),
        (status = 404, description = "There is no such format.", body = ErrorResponse),
    ),
)]
async fn schema(
    State(documents): State<Documents>,
    root: Root,
    headers: HeaderMap,
    query: Query,
) -> Response {
    let yaml_types = [
        "application/yaml",
        "application/vnd.oai.openapi",
        "text/yaml",
        "application/x-yaml",
    ];
    let prefers_yaml = || {
        let json = quality(&headers, "application/json");
        yaml_types
            .iter()
            .any(|media_type| quality(&headers, media_type) > json)
    };
    let wants_yaml = match query.get("format") {
        Some("yaml") => true,
        Some("json") => false,
        Some(_) => return ApiError::plain(StatusCode::NOT_FOUND, "Not found.").into_response(),
        None => prefers_yaml(),
    };
    // The YAML is the JSON: each JSON document is one of YAML 1.2, and parsers of YAML 1.1 read
    // these too, since all texts are quoted.
    let text = match root {
        Root::Here => documents.json,
        Root::Above => documents.above,
    };
    let (kind, name) = if wants_yaml {
        ("application/yaml", YAML_NAME)
    } else {
        ("application/json", JSON_NAME)
    };
    let mut response = (
        [
            (CONTENT_TYPE, HeaderValue::from_static(kind)),
            (CONTENT_DISPOSITION, name),
        ],
        text,
    )
        .into_response();
    response.headers_mut().insert(VARY, VARY_ACCEPT);
    response
}

/// Swagger UI
///
/// Try the API in a browser.
#[utoipa::path(
    get, path = "/docs", tag = "documentation", operation_id = "docs", security(()),
    responses((status = 200, description = "The page.", body = String, content_type = "text/html")),
)]
async fn docs(root: Root) -> Response {
    page(include_str!("../../assets/web/docs.html"), root)
}

/// ReDoc
///
/// Read the API's description in a browser.
#[utoipa::path(
    get, path = "/redoc", tag = "documentation", operation_id = "redoc", security(()),
    responses((status = 200, description = "The page.", body = String, content_type = "text/html")),
)]
async fn redoc(root: Root) -> Response {
    page(include_str!("../../assets/web/redoc.html"), root)
}
