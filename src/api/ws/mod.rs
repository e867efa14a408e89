//! `/ws/prompts/`: the socket on which a user's events arrive.
//!
//! A socket is authenticated before the upgrade, then served by one task with one loop over what may happen to it.

mod connection;
mod session;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{HOST, ORIGIN, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::connection::Connection;
use self::session::Session;
use super::authenticate::{Standing, bearer_token, session_secret};
use super::error::ApiError;
use super::extract::Query;
use super::observe::RequestId;
use super::server::Place;
use super::state::AppState;
use crate::domain::Timestamp;
use crate::error::{Error, Unauthenticated};
use crate::realtime::Refused;
use crate::services::accounts::Caller;

/// How long the answer to a handshake may take to leave: its place among the user's sockets is taken already.
const UPGRADE_DEADLINE: Duration = Duration::from_secs(10);
/// What a client with too many sockets should wait. Nobody knows when it closes one; this long after it did, there is room.
const FULL_WAIT: Duration = Duration::from_secs(1);
/// The subprotocol that a client offers before its token, and that the server selects.
const BEARER_PROTOCOL: &str = "bearer";

/// The routes of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(connect))
}

/// WebSocket
///
/// Opens the socket on which the user's events arrive. Credentials, the first of these that is there deciding: `ticket`, the
/// subprotocol `bearer, <access token>`, the `Authorization` header, `token`, the session cookie (which also needs `Origin`).
#[utoipa::path(
    get, path = "/ws/prompts", tag = "events", operation_id = "connect",
    security((), ("bearer" = [])),
    params(
        ("ticket" = Option<String>, Query, description = "A one-use ticket."),
        ("token" = Option<String>, Query, description = "An access token; a ticket is safer, because addresses end up in logs."),
    ),
    responses(
        (status = 101, description = "The socket is open. Its first frame is `{\"message\": …, \"user_id\": N}`."),
        (status = 403, description = "The session cookie came from a page of another origin.", body = super::openapi::ErrorResponse),
        (status = 503, description = "Events cannot reach this replica at the moment.", body = super::openapi::ErrorResponse),
        (status = 426, description = "The request asks for no WebSocket.", body = super::openapi::ErrorResponse),
    ),
)]
async fn connect(
    State(state): State<AppState>,
    mut request: Request,
) -> Result<Response, ApiError> {
    let Ok(answer) = create_response_with_body(&request, Body::empty) else {
        return Ok(upgrade_required());
    };
    // The server puts one into every request that may leave HTTP.
    let Some(on_upgrade) = request.extensions_mut().remove::<OnUpgrade>() else {
        return Ok(upgrade_required());
    };
    if state.lifecycle.stopping.is_cancelled() {
        return Err(Error::overloaded().into());
    }
    let query = Query::parse(request.uri().query().unwrap_or_default());
    let caller = authenticate(&state, &query, request.headers()).await?;
    // Asked before the socket takes its place: a throttle may be asked over the network.
    let standing = Standing::of(&state, caller.user_id()).await;
    let mut response = open(&state, caller, request, on_upgrade, answer)
        .unwrap_or_else(IntoResponse::into_response);
    standing.state_on(&mut response);
    Ok(response)
}

/// Gives the caller a socket: takes its place, and has a task serve it once `answer` is sent.
fn open(
    state: &AppState,
    caller: Caller,
    mut request: Request,
    on_upgrade: OnUpgrade,
    mut answer: Response,
) -> Result<Response, ApiError> {
    let subscription = state
        .broker
        .subscribe(caller.listener(), state.server.max_sockets_per_user)
        .map_err(|refused| match refused {
            Refused::Full => ApiError::plain(
                StatusCode::TOO_MANY_REQUESTS,
                "This user has too many open sockets.",
            )
            .later(FULL_WAIT),
            Refused::Away => Error::unavailable(refused).into(),
        })?;
    if offered_protocols(request.headers()).any(|protocol| protocol == BEARER_PROTOCOL) {
        let selected = HeaderValue::from_static(BEARER_PROTOCOL);
        answer
            .headers_mut()
            .insert(SEC_WEBSOCKET_PROTOCOL, selected);
    }
    let user_id = caller.user_id();
    let request_id = request.extensions_mut().remove::<RequestId>();
    let place = request.extensions_mut().remove::<Place>();
    let state = Arc::clone(state);
    let tasks = state.lifecycle.tasks.clone();
    tasks.spawn(async move {
        let Ok(Ok(upgraded)) = timeout(UPGRADE_DEADLINE, on_upgrade).await else {
            tracing::debug!("a WebSocket handshake was not completed");
            return;
        };
        let session = Session {
            state,
            caller,
            subscription,
        };
        let code = session
            .run(Connection::new(TokioIo::new(upgraded)).await)
            .await;
        let request_id = request_id.as_ref().map(RequestId::as_str);
        tracing::info!(request_id, user_id = user_id.0, code, "socket closed");
        drop(place);
    });
    Ok(answer)
}

fn upgrade_required() -> Response {
    let mut response = ApiError::plain(
        StatusCode::UPGRADE_REQUIRED,
        "This address speaks WebSocket.",
    )
    .into_response();
    let headers = response.headers_mut();
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    response
}

/// Finds who is connecting. The first credential present decides, good or not: a client that sends a stale one is told so
/// rather than let in by another it may not know it sends.
async fn authenticate(
    state: &AppState,
    query: &Query,
    headers: &HeaderMap,
) -> Result<Caller, Error> {
    let now = Timestamp::now();
    if let Some(ticket) = query.get("ticket") {
        return state.accounts.redeem_ticket(ticket, now).await;
    }
    if let Some(token) = protocol_token(headers) {
        return state.accounts.authenticate(&token, now).await;
    }
    if let Some(token) = bearer_token(headers)? {
        return state.accounts.authenticate(token, now).await;
    }
    if let Some(token) = query.get("token") {
        return state.accounts.authenticate(token, now).await;
    }
    let session = session_secret(headers).ok_or(Unauthenticated::NotProvided)?;
    let caller = state.accounts.authenticate_session(session, now).await?;
    // Browsers send cookies along with whatever page connects, so the page must be ours or an allowed one.
    if is_allowed_origin(headers, &state.server.cors_allowed_origins) {
        Ok(caller)
    } else {
        Err(Error::Forbidden(
            "The Origin of this page may not open sockets with a session cookie.",
        ))
    }
}

/// The subprotocols that the client offers, in its order.
fn offered_protocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

/// The token that follows the word `bearer` at the head of the subprotocols; empty if nothing follows.
fn protocol_token(headers: &HeaderMap) -> Option<String> {
    let mut offered = offered_protocols(headers);
    (offered.next()? == BEARER_PROTOCOL).then(|| offered.next().unwrap_or_default().to_owned())
}

/// Whether `Origin` is the host that was asked, port included, or on the list.
fn is_allowed_origin(headers: &HeaderMap, allowed: &[String]) -> bool {
    let text = |name| {
        headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
    };
    let Some(origin) = text(ORIGIN).map(str::to_ascii_lowercase) else {
        return false;
    };
    if allowed.contains(&origin) {
        return true;
    }
    let Some((scheme, authority)) = origin.split_once("://") else {
        return false;
    };
    let default_port = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => return false,
    };
    text(HOST).is_some_and(|host| {
        let host = host.to_ascii_lowercase();
        let without_default =
            |name: &str| name.strip_suffix(default_port).unwrap_or(name).to_owned();
        !host.is_empty() && without_default(&host) == without_default(authority)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                (
                    axum::http::HeaderName::from_static(name),
                    value.parse().unwrap(),
                )
            })
            .collect()
    }

    #[test]
    fn the_token_follows_the_word_bearer_among_the_subprotocols() {
        let token = |value| protocol_token(&headers(&[("sec-websocket-protocol", value)]));
        assert_eq!(token("bearer, a.b.c").as_deref(), Some("a.b.c"));
        assert_eq!(token("bearer").as_deref(), Some(""));
        assert_eq!(token("graphql-ws, bearer"), None);
        assert_eq!(protocol_token(&HeaderMap::new()), None);
    }

    #[test]
    fn a_page_of_the_same_host_and_port_may_use_its_cookie_and_a_listed_one() {
        let allowed = ["https://app.example".to_owned()];
        let is_allowed = |host, origin| {
            is_allowed_origin(&headers(&[("host", host), ("origin", origin)]), &allowed)
        };
        assert!(is_allowed("chat.example:8000", "http://chat.example:8000"));
        assert!(is_allowed("chat.example", "https://chat.example"));
        assert!(is_allowed("chat.example:443", "https://chat.example"));
        assert!(is_allowed("chat.example", "https://APP.example"));
        assert!(!is_allowed("chat.example", "https://evil.example"));
        assert!(!is_allowed("chat.example:8000", "http://chat.example:9000"));
        assert!(!is_allowed("chat.example", "null"));
        assert!(!is_allowed(
            "chat.example",
            "https://app.example.evil.example"
        ));
        assert!(!is_allowed_origin(
            &headers(&[("host", "chat.example")]),
            &allowed
        ));
    }
}
