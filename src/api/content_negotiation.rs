//! Content negotiation: the API returns JSON, and 406 to a client that does not accept it.

use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{ACCEPT, VARY};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use utoipa::openapi::path::Operation;
use utoipa::openapi::{OpenApi, RefOr};

use super::error::ApiError;
use super::list_header::words;

/// Server-sent events.
pub const EVENT_STREAM: &str = "text/event-stream";

/// Comma-separated values.
const CSV: &str = "text/csv";

/// The value of `Vary` on responses that depend on `Accept`, spelled as in the replaced system.
pub const VARY_ACCEPT: HeaderValue = HeaderValue::from_static("Accept");

/// The operations that return something else than JSON to a client that asks for it: a stream, or
/// comma-separated values.
#[derive(Clone)]
pub struct Streams(Arc<[(Method, String, &'static str)]>);

impl Streams {
    /// Finds them in the routes' own description: a stream is among their responses.
    pub fn described_in(api: &OpenApi) -> Self {
        let returns = |operation: &Option<Operation>, media_type: &str| {
            let responses = operation
                .iter()
                .flat_map(|one| one.responses.responses.values());
            responses.into_iter().any(|response| match response {
                RefOr::T(response) => response.content.contains_key(media_type),
                RefOr::Ref(_) => false,
            })
        };
        let mut streams = Vec::new();
        for (path, item) in &api.paths.paths {
            for (method, operation) in [(Method::GET, &item.get), (Method::POST, &item.post)] {
                for media_type in [EVENT_STREAM, CSV] {
                    if returns(operation, media_type) {
                        streams.push((method.clone(), path.clone(), media_type));
                    }
                }
            }
        }
        Self(streams.into())
    }

    fn contain(&self, request: &Request, media_type: &str) -> bool {
        let method = match request.method() {
            &Method::HEAD => &Method::GET,
            method => method,
        };
        request
            .extensions()
            .get::<MatchedPath>()
            .is_some_and(|path| {
                let mut streams = self.0.iter();
                streams.any(|(of, described, returned)| {
                    of == method && described == path.as_str() && *returned == media_type
                })
            })
    }
}

/// Refuses requests whose `Accept` rules out what the route returns: JSON, and from some routes
/// streams.
pub async fn require_acceptable(
    State(streams): State<Streams>,
    request: Request,
    next: Next,
) -> Response {
    let headers = request.headers();
    let is_acceptable = accepts(headers, "application/json")
        || (wants_stream(headers) && streams.contain(&request, EVENT_STREAM))
        || (wants_csv(headers) && streams.contain(&request, CSV));
    let mut response = if is_acceptable {
        next.run(request).await
    } else {
        ApiError::plain(
            StatusCode::NOT_ACCEPTABLE,
            "Could not satisfy the request Accept header.",
        )
        .into_response()
    };
    response.headers_mut().append(VARY, VARY_ACCEPT);
    response
}

/// Whether a client asks for a stream: it names the type itself and prefers it to JSON. A client
/// that accepts both equally, or anything, gets JSON: clients from before there were streams do
/// that.
pub fn wants_stream(headers: &HeaderMap) -> bool {
    let is_named = words(headers, &ACCEPT)
        .filter_map(|range| range.split(';').next())
        .any(|name| name.trim().eq_ignore_ascii_case(EVENT_STREAM));
    is_named && quality(headers, EVENT_STREAM) > quality(headers, "application/json")
}

/// Whether a client prefers comma-separated values to JSON.
pub fn wants_csv(headers: &HeaderMap) -> bool {
    quality(headers, CSV) > quality(headers, "application/json")
}

/// Whether a client accepts `media_type` (`type/subtype`). Without an `Accept` header it accepts
/// anything; of several ranges that match, the most specific counts (RFC 9110, section 12.5.1).
pub fn accepts(headers: &HeaderMap, media_type: &str) -> bool {
    quality(headers, media_type) > 0.0
}

/// How much a client prefers `media_type`, from 0 to 1.
pub fn quality(headers: &HeaderMap, media_type: &str) -> f32 {
    let main_type = media_type.split('/').next().unwrap_or_default();
    let mut best: Option<(u8, f32)> = None;
    let mut is_empty = true;
    for range in words(headers, &ACCEPT) {
        let mut parts = range.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        if name.is_empty() {
            continue;
        }
        is_empty = false;
        let specificity = if name.eq_ignore_ascii_case(media_type) {
            3
        } else if name
            .split_once('/')
            .is_some_and(|(kind, sub)| sub == "*" && kind.eq_ignore_ascii_case(main_type))
        {
            2
        } else if name == "*/*" {
            1
        } else {
            continue;
        };
        let quality = parts
            .find_map(|parameter| {
                parameter
                    .strip_prefix("q=")
                    .or_else(|| parameter.strip_prefix("Q="))
            })
            .map_or(1.0, |q| {
                q.parse::<f32>()
                    .ok()
                    .filter(|q| (0.0..=1.0).contains(q))
                    .unwrap_or(1.0)
            });
        if best.is_none_or(|(known, _)| specificity > known) {
            best = Some((specificity, quality));
        }
    }
    // Without a header, or with an empty one, a client accepts anything.
    if is_empty {
        1.0
    } else {
        best.map_or(0.0, |(_, quality)| quality)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn takes_json(accept: &str) -> bool {
        let mut headers = HeaderMap::new();
        let accept = HeaderValue::from_bytes(accept.as_bytes()).unwrap();
        headers.insert(ACCEPT, accept);
        accepts(&headers, "application/json")
    }

    #[test]
    fn json_is_acceptable_by_name_and_by_wildcard() {
        assert!(accepts(&HeaderMap::new(), "application/json"));
        for accept in [
            "*/*",
            "application/*",
            "application/json",
            "Application/JSON; q=0.5",
            "text/html, */*;q=0.1",
            "",
            "application/json;indent=2",
            "text/größe, application/json",
        ] {
            assert!(takes_json(accept), "{accept:?}");
        }
    }

    #[test]
    fn json_that_is_ruled_out_is_not_acceptable() {
        for accept in [
            "application/xml",
            "text/html",
            "text/*",
            "application/json;q=0",
            "*/*, application/json;q=0",
            "nonsense",
        ] {
            assert!(!takes_json(accept), "{accept:?}");
        }
    }

    #[test]
    fn stream_is_asked_for_only_by_name_and_if_preferred_to_json() {
        let wants = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, accept.parse().unwrap());
            wants_stream(&headers)
        };
        for accept in [
            "text/event-stream",
            "Text/Event-Stream;q=0.5",
            "text/event-stream, application/json;q=0.9",
            "text/event-stream, */*;q=0.1",
        ] {
            assert!(wants(accept), "{accept:?}");
        }
        for accept in [
            "",
            "*/*",
            "text/*",
            "text/event-stream;q=0",
            "text/event-stream, */*",
            "application/json, text/event-stream",
            "application/json, text/event-stream;q=0.9",
        ] {
            assert!(!wants(accept), "{accept:?}");
        }
        assert!(!wants_stream(&HeaderMap::new()));
    }

    #[test]
    fn most_specific_range_counts() {
        let mut headers = HeaderMap::new();
        headers.insert(
            ACCEPT,
            "text/*;q=0.3, text/html;q=0.7, */*;q=0.1".parse().unwrap(),
        );
        assert_eq!(quality(&headers, "text/html"), 0.7);
        assert_eq!(quality(&headers, "text/plain"), 0.3);
        assert_eq!(quality(&headers, "application/json"), 0.1);
    }
}
