//! Cross-origin rules: what pages of other origins may do, and the responses to the preflight
//! requests of their browsers.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use tower::{Layer, ServiceExt};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

/// How long a browser may cache the response to a preflight request.
const MAX_AGE: Duration = Duration::from_secs(600);

/// The rules for the listed origins. Responses to other origins have none of the headers, so their
/// browsers refuse. Cheap to clone.
#[derive(Clone)]
pub struct CrossOrigin {
    origins: Arc<[HeaderValue]>,
    layer: CorsLayer,
}

impl CrossOrigin {
    /// Rules for these origins; `None` if there are none.
    pub fn of(origins: &[String]) -> Option<Self> {
        let origins: Arc<[HeaderValue]> = origins
            .iter()
            .filter_map(|origin| origin.parse().ok())
            .collect();
        if origins.is_empty() {
            return None;
        }
        let exposed = [
            "x-request-id",
            "ratelimit",
            "ratelimit-policy",
            "x-search-coverage",
            "idempotent-replayed",
            "server-timing",
            "openai-processing-ms",
            "retry-after-ms",
            "x-should-retry",
            "x-ratelimit-limit-requests",
            "x-ratelimit-remaining-requests",
            "x-ratelimit-reset-requests",
        ]
        .map(HeaderName::from_static);
        let layer = CorsLayer::new()
            .allow_origin(AllowOrigin::list(origins.iter().cloned()))
            .allow_methods([Method::GET, Method::POST, Method::PATCH, Method::DELETE])
            // Any: clients of OpenAI send a dozen that describe themselves.
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(
                exposed
                    .into_iter()
                    .chain([header::RETRY_AFTER])
                    .collect::<Vec<_>>(),
            )
            .allow_credentials(true)
            .max_age(MAX_AGE);
        Some(Self { origins, layer })
    }

    /// Whether this is a preflight request for a page of a listed origin (Fetch standard,
    /// CORS-preflight request).
    fn is_preflight(&self, request: &Request) -> bool {
        let headers = request.headers();
        request.method() == Method::OPTIONS
            && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
            && headers
                .get(header::ORIGIN)
                .is_some_and(|origin| self.origins.contains(origin))
    }
}

/// Responds to preflight requests, and adds the headers of the rules to other responses. An
/// `OPTIONS` request that is no preflight of a listed origin is routed like any other request: the
/// layer would return 200 for it on any path, without credentials.
pub async fn cross_origin(
    State(rules): State<CrossOrigin>,
    request: Request,
    next: Next,
) -> Response {
    if request.method() == Method::OPTIONS && !rules.is_preflight(&request) {
        return next.run(request).await;
    }
    match rules.layer.layer(next).oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
