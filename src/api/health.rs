//! `/healthz`, `/readyz`, `/metrics`.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::state::AppState;

/// The health routes.
pub fn health_router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(healthz))
        .routes(routes!(readyz))
}

/// The metrics route.
pub fn metrics_router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(metrics))
}

/// Whether the process is alive.
#[derive(Serialize, ToSchema)]
pub struct HealthResponse {
    #[schema(example = "ok")]
    status: &'static str,
}

/// Whether the service can do its work, part by part.
#[derive(Serialize, ToSchema)]
pub struct ReadinessResponse {
    /// `ready`, `starting`, `degraded` or `stopping`.
    #[schema(example = "ready")]
    status: &'static str,
    /// Each part by name: `ok`, `loading` or `down`. The store may be `read_only`: it returns what
    /// it has and cannot take prompts, because its disk is full, for example. That ends by itself.
    parts: BTreeMap<&'static str, &'static str>,
    /// The embedding model in use.
    #[schema(example = "all-MiniLM-L6-v2")]
    model: String,
}

/// Alive
///
/// The process is up. Its dependencies are not checked, so that an orchestrator does not restart it
/// for their outage.
#[utoipa::path(
    get, path = "/healthz", tag = "operation", operation_id = "healthz", security(()),
    responses((status = 200, description = "Alive.", body = HealthResponse)),
)]
async fn healthz() -> Json<HealthResponse> {
    Json(HealthResponse { status: "ok" })
}

/// Ready
///
/// Whether to send requests here: 503 while the service starts, while a part is down that
/// everything needs, while the store cannot take prompts, and from the moment the service begins to
/// stop. Redis is not such a part: a replica without it goes on by itself and only reports `down`.
#[utoipa::path(
    get, path = "/readyz", tag = "operation", operation_id = "readyz", security(()),
    responses(
        (status = 200, description = "Ready.", body = ReadinessResponse),
        (status = 503, description = "Not ready.", body = ReadinessResponse),
    ),
)]
async fn readyz(State(state): State<AppState>) -> Response {
    let readiness = state.health.readiness().await;
    let status = if state.lifecycle.is_draining() {
        "stopping"
    } else {
        readiness.status()
    };
    let code = if status == "ready" {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = ReadinessResponse {
        status,
        parts: readiness.parts(),
        model: readiness.model,
    };
    let mut response = (code, Json(body)).into_response();
    if code == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(RETRY_AFTER, 1.into());
    }
    response
}

/// Metrics
///
/// In Prometheus' text format.
#[utoipa::path(
    get, path = "/metrics", tag = "operation", operation_id = "metrics", security(()),
    responses((status = 200, description = "The metrics.", body = String, content_type = "text/plain")),
)]
async fn metrics(State(state): State<AppState>) -> Response {
    state.health.observe();
    let held = i64::try_from(state.memory.held()).unwrap_or(i64::MAX);
    state.metrics.request_memory.set(held);
    (
        [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        state.metrics.render(),
    )
        .into_response()
}
