//! The outermost layer: gives each request its id and a span, each response its headers, a log line
//! and its place in the metrics.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, HeaderName};
use axum::http::{HeaderMap, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::Body as _;
use tracing::field::Empty;
use tracing::{Instrument, Span};

use super::error::Cause;
use crate::domain::UserId;
use crate::telemetry::Metrics;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
/// In a browser, an API response may load nothing.
const API_POLICY: HeaderValue =
    HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");

/// The request's span, left in the extensions of a response whose body is written while the client
/// reads it: what is logged then belongs to the request too.
#[derive(Clone, Debug)]
pub struct RequestSpan(pub Span);

/// The part of a response's time that the upstream took, left in the response's extensions.
#[derive(Clone, Copy, Debug)]
pub struct UpstreamTime(pub Duration);

const SECURITY_HEADERS: [(&str, &str); 4] = [
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
];

/// Wraps a request as described above.
pub async fn log_request(
    State(metrics): State<Arc<Metrics>>,
    request: Request,
    next: Next,
) -> Response {
    let request_id = request_id(request.headers());
    // At the level of errors: a `RUST_LOG` that lets any line through then lets its ids through.
    let span = tracing::error_span!(
        "request",
        request_id = request_id.to_str().unwrap_or_default(),
        user_id = Empty
    );
    respond(&metrics, request_id, request, next)
        .instrument(span)
        .await
}

/// Adds the caller to the request's span, once it is known.
pub fn record_user(user_id: UserId) {
    Span::current().record("user_id", user_id.0);
}

async fn respond(
    metrics: &Metrics,
    request_id: HeaderValue,
    request: Request,
    next: Next,
) -> Response {
    let started = Instant::now();
    let method = method_label(request.method());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut response = next.run(request).await;

    let cause = response.extensions_mut().remove::<Cause>();
    let took = started.elapsed();
    if let Some(UpstreamTime(upstream)) = response.extensions_mut().remove() {
        let added = took.saturating_sub(upstream);
        metrics
            .prompt_overhead
            .with_label_values(&["answer"])
            .observe(added.as_secs_f64());
        response
            .headers_mut()
            .insert(SERVER_TIMING, server_timing(upstream, added));
    }
    if response.body().size_hint().exact().is_none() {
        let span = RequestSpan(Span::current());
        response.extensions_mut().insert(span);
    }
    let headers = response.headers_mut();
    for (name, value) in SECURITY_HEADERS {
        headers.insert(
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        );
    }
    headers.entry(CONTENT_SECURITY_POLICY).or_insert(API_POLICY);
    headers
        .entry(CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
    headers.insert(X_REQUEST_ID, request_id);

    let route = route.as_ref().map_or("unmatched", MatchedPath::as_str);
    let status = response.status();
    metrics
        .http_requests
        .with_label_values(&[route, method, status.as_str()])
        .inc();
    metrics
        .http_request_duration
        .with_label_values(&[route, method])
        .observe(took.as_secs_f64());
    // Whole microseconds: more digits would be noise.
    let duration_ms = took.as_micros() as f64 / 1000.0;
    if status.is_server_error() {
        let error = cause.map(|cause| chain(&**cause.0));
        tracing::error!(
            method,
            route,
            status = status.as_u16(),
            duration_ms,
            error,
            "request failed"
        );
    } else {
        tracing::info!(
            method,
            route,
            status = status.as_u16(),
            duration_ms,
            "request"
        );
    }
    response
}

/// How the response's time is divided, for a browser's tools: in milliseconds, to the microsecond.
fn server_timing(upstream: Duration, added: Duration) -> HeaderValue {
    let millis = |duration: Duration| duration.as_micros() as f64 / 1000.0;
    let text = format!(
        "upstream;dur={:.3}, service;dur={:.3}",
        millis(upstream),
        millis(added)
    );
    HeaderValue::from_str(&text).expect("digits and names are a header value")
}

/// The id that the client sent, if it is usable, so that a trace crosses services; a random one
/// otherwise.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let is_usable = |value: &&HeaderValue| {
        (1..=64).contains(&value.len())
            && value
                .as_bytes()
                .iter()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte))
    };
    headers
        .get(X_REQUEST_ID)
        .filter(is_usable)
        .cloned()
        .unwrap_or_else(|| {
            let mut bytes = [0; 16];
            // A repeated id costs a reader of logs a moment. A failing source of randomness must
            // not cost a response.
            let _ = getrandom::fill(&mut bytes);
            let id = u128::from_le_bytes(bytes);
            HeaderValue::from_str(&format!("{id:032x}")).expect("hex digits are a header value")
        })
}

/// The method as a metric's label. Clients may send any method, and labels must be few.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// An error with its sources, in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usable_request_id_is_kept_and_any_other_is_replaced() {
        let id = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(X_REQUEST_ID, value.parse().unwrap());
            request_id(&headers).to_str().unwrap().to_owned()
        };
        assert_eq!(id("Trace-1.2_3"), "Trace-1.2_3");
        for bad in ["", "two words", "x\ty", &"a".repeat(65), "a,b"] {
            let made = id(bad);
            assert_eq!(made.len(), 32, "{bad:?}");
            assert_ne!(made, id(bad));
        }
    }
}
