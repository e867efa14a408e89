//! The layers around the handlers, outermost first: unread bodies, the request log, connections
//! beyond the bounds, a missing host, panics, cross-origin rules, then on `/api` content
//! negotiation and, where a token is needed, authentication. An unknown path returns 404 before
//! content negotiation and authentication; a method that the path does not have returns 405 after
//! them.

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::{Method, StatusCode, Version, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::router::OpenApiRouter;

use super::authenticate::{authenticate, authenticate_v1};
use super::content_negotiation::{Streams, require_acceptable};
use super::cross_origin::{CrossOrigin, cross_origin};
use super::drain_body::drain_unread;
use super::error::ApiError;
use super::pages::Documents;
use super::request_log::log_request;
use super::server::Slot;
use super::state::AppState;
use super::{accounts, health, keys, oauth, pages, prompts, usage, v1, ws};
use crate::error::Error;

/// The routes of the API that need an access token or an API key.
pub fn known_routes() -> OpenApiRouter<AppState> {
    accounts::known_router()
        .merge(keys::router())
        .merge(prompts::router())
        .merge(usage::router())
}

/// The routes of OpenAI's protocol, which need an access token or an API key.
pub fn v1_routes() -> OpenApiRouter<AppState> {
    v1::router()
}

/// The routes of the API that need none.
pub fn open_routes() -> OpenApiRouter<AppState> {
    accounts::open_router().merge(oauth::router())
}

/// All routes of the main listener; `/metrics` among them unless it has a separate listener.
pub fn router(state: &AppState, documents: Documents) -> Router {
    let (known, known_description) = known_routes().split_for_parts();
    let (open, description) = open_routes().split_for_parts();
    let (v1, v1_description) = v1_routes().split_for_parts();
    let description = description.merge_from(known_description);
    let streams = Streams::described_in(&description.merge_from(v1_description));
    let known = known
        .method_not_allowed_fallback(method_not_allowed)
        .route_layer(from_fn_with_state(state.clone(), authenticate));
    let v1 = v1
        .method_not_allowed_fallback(method_not_allowed)
        .route_layer(from_fn_with_state(state.clone(), authenticate_v1));
    let api = open
        .method_not_allowed_fallback(method_not_allowed)
        .merge(known)
        .merge(v1)
        .route_layer(from_fn_with_state(streams, require_acceptable));
    let mut rest = Router::from(ws::router().merge(health::health_router()))
        .merge(Router::from(pages::router()).with_state(documents))
        .merge(pages::assets_router());
    if state.server.metrics_addr.is_none() {
        rest = rest.merge(Router::from(health::metrics_router()));
    }
    finish(
        api.merge(rest.method_not_allowed_fallback(method_not_allowed)),
        state,
    )
}

/// The routes of the listener for metrics alone.
pub fn metrics_router(state: &AppState) -> Router {
    let routes = Router::from(health::health_router().merge(health::metrics_router()));
    finish(
        routes.method_not_allowed_fallback(method_not_allowed),
        state,
    )
}

fn finish(routes: Router<AppState>, state: &AppState) -> Router {
    let mut routes = routes.fallback(not_found);
    if let Some(cors) = CrossOrigin::of(&state.server.cors_allowed_origins) {
        routes = routes.layer(from_fn_with_state(cors, cross_origin));
    }
    routes
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn(require_host))
        .layer(from_fn(health_checks_beyond_bounds))
        .layer(from_fn(v1::speak_openai))
        .layer(from_fn_with_state(Arc::clone(&state.metrics), log_request))
        .layer(from_fn(drain_unread))
        .with_state(state.clone())
}

/// Refuses requests on connections beyond the bounds, except health checks and metrics.
async fn health_checks_beyond_bounds(request: Request, next: Next) -> Response {
    let is_beyond = request
        .extensions()
        .get::<Slot>()
        .is_some_and(Slot::is_for_health);
    if is_beyond && !["/healthz", "/readyz", "/metrics"].contains(&request.uri().path()) {
        return ApiError::from(Error::overloaded())
            .closing()
            .into_response();
    }
    next.run(request).await
}

/// Refuses an HTTP/1.1 request without a host: it is malformed (RFC 9112, section 3.2).
async fn require_host(request: Request, next: Next) -> Response {
    if request.version() == Version::HTTP_11 && !request.headers().contains_key(header::HOST) {
        return ApiError::bad_request("The Host header is missing.")
            .closing()
            .into_response();
    }
    next.run(request).await
}

/// Returns 200 for `OPTIONS`, and 405 for the other methods that a path does not have. The router
/// adds `Allow` to both.
async fn method_not_allowed(method: Method) -> Response {
    if method == Method::OPTIONS {
        StatusCode::OK.into_response()
    } else {
        ApiError::plain(StatusCode::METHOD_NOT_ALLOWED, "Method not allowed.").into_response()
    }
}

async fn not_found() -> Response {
    ApiError::plain(StatusCode::NOT_FOUND, "Not found.").into_response()
}

/// The panic itself was logged with its place when it happened (`telemetry`).
fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    ApiError::plain(StatusCode::INTERNAL_SERVER_ERROR, "Internal server error.").into_response()
}
