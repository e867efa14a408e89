//! The opening handshake of RFC 6455, section 4.2.

use axum::body::Body;
use axum::http::header::{
    CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Version};
use axum::response::{IntoResponse, Response};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::api::error::ApiError;
use crate::api::list_header::words;

/// The subprotocol that a client offers before its token, and that the server selects.
const BEARER_PROTOCOL: &str = "bearer";
/// The only version of the protocol.
const PROTOCOL_VERSION: &str = "13";

/// The response that makes the connection a WebSocket, if the request asks for one.
pub fn accept(request: &Parts) -> Option<Response> {
    let headers = &request.headers;
    let asks_for_socket = request.version >= Version::HTTP_11
        && words(headers, &CONNECTION).any(|option| option.eq_ignore_ascii_case("upgrade"))
        && words(headers, &UPGRADE).any(|protocol| protocol.eq_ignore_ascii_case("websocket"))
        && words(headers, &SEC_WEBSOCKET_VERSION).any(|version| version == PROTOCOL_VERSION);
    let key = headers.get(SEC_WEBSOCKET_KEY)?;
    let accepted = HeaderValue::from_str(&derive_accept_key(key.as_bytes())).ok()?;
    if !asks_for_socket || key.is_empty() {
        return None;
    }
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let answer = response.headers_mut();
    answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(UPGRADE, HeaderValue::from_static("websocket"));
    answer.insert(SEC_WEBSOCKET_ACCEPT, accepted);
    if words(headers, &SEC_WEBSOCKET_PROTOCOL).any(|protocol| protocol == BEARER_PROTOCOL) {
        let selected = HeaderValue::from_static(BEARER_PROTOCOL);
        answer.insert(SEC_WEBSOCKET_PROTOCOL, selected);
    }
    Some(response)
}

/// The response to a request that asks for no WebSocket.
pub(super) fn upgrade_required() -> Response {
    let mut response = ApiError::plain(
        StatusCode::UPGRADE_REQUIRED,
        "This address speaks WebSocket.",
    )
    .into_response();
    let headers = response.headers_mut();
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(
        SEC_WEBSOCKET_VERSION,
        HeaderValue::from_static(PROTOCOL_VERSION),
    );
    response
}

/// The token that follows the word `bearer` at the head of the subprotocols; empty if none follows.
pub fn protocol_token(headers: &HeaderMap) -> Option<&str> {
    let mut offered = words(headers, &SEC_WEBSOCKET_PROTOCOL);
    (offered.next()? == BEARER_PROTOCOL).then(|| offered.next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A handshake with these lines in place of the usual ones of the same names.
    fn request(lines: &[(&str, &str)]) -> Parts {
        let usual = [
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        let kept = usual
            .iter()
            .filter(|(name, _)| lines.iter().all(|line| line.0 != *name));
        let mut request = axum::http::Request::builder();
        for (name, value) in kept.chain(lines) {
            request = request.header(*name, value.as_bytes());
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn the_example_of_rfc_6455_is_accepted() {
        let response = accept(&request(&[])).unwrap();
        assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
        assert_eq!(
            response.headers()[SEC_WEBSOCKET_ACCEPT],
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        );
        assert!(!response.headers().contains_key(SEC_WEBSOCKET_PROTOCOL));
    }

    #[test]
    fn lists_may_come_in_any_number_of_lines_with_any_blanks_and_in_any_case() {
        for lines in [
            &[("connection", "keep-alive"), ("connection", "Upgrade")][..],
            &[("connection", "upgrade"), ("connection", "keep-alive")],
            &[("connection", "keep-alive,Upgrade")],
            &[("connection", "keep-alive\t ,\tUPGRADE\t")],
            &[("connection", ", upgrade ,,")],
            &[("connection", "größe, Upgrade")],
            &[("upgrade", "WebSocket")],
            &[("upgrade", "h2c, websocket")],
            &[("upgrade", "h2c"), ("upgrade", "websocket")],
            &[("sec-websocket-version", "8, 13")],
            &[
                ("sec-websocket-version", "8"),
                ("sec-websocket-version", "13"),
            ],
        ] {
            assert!(accept(&request(lines)).is_some(), "{lines:?}");
        }
    }

    #[test]
    fn a_request_that_lacks_a_part_of_the_handshake_asks_for_no_socket() {
        for lines in [
            &[("connection", "keep-alive")][..],
            &[("connection", "upgraded")],
            &[("connection", "keep-alive Upgrade")],
            &[("upgrade", "websocket2")],
            &[("upgrade", "")],
            &[("sec-websocket-version", "8")],
            &[("sec-websocket-version", "130")],
            &[("sec-websocket-key", "")],
        ] {
            assert!(accept(&request(lines)).is_none(), "{lines:?}");
        }
        let mut old = request(&[]);
        old.version = Version::HTTP_10;
        assert!(accept(&old).is_none());
    }

    #[test]
    fn the_token_follows_the_word_bearer_among_the_subprotocols() {
        let name = "sec-websocket-protocol";
        let token = |lines: &[&str]| {
            let lines: Vec<_> = lines.iter().map(|line| (name, *line)).collect();
            protocol_token(&request(&lines).headers).map(str::to_owned)
        };
        assert_eq!(token(&["bearer, a.b.c"]).as_deref(), Some("a.b.c"));
        assert_eq!(token(&["bearer", "a.b.c"]).as_deref(), Some("a.b.c"));
        assert_eq!(
            token(&["\tbearer ,\ta.b.c, other"]).as_deref(),
            Some("a.b.c")
        );
        assert_eq!(token(&["bearer"]).as_deref(), Some(""));
        assert_eq!(token(&["graphql-ws, bearer"]), None);
        assert_eq!(token(&[]), None);
    }

    #[test]
    fn bearer_is_selected_wherever_it_is_offered() {
        for offered in ["bearer, a.b.c", "other, bearer"] {
            let response = accept(&request(&[("sec-websocket-protocol", offered)])).unwrap();
            assert_eq!(response.headers()[SEC_WEBSOCKET_PROTOCOL], "bearer");
        }
    }
}
