//! `/ws/prompts/`: the socket on which a user's events arrive.
//!
//! A socket is authenticated before the upgrade, and then served by one task with one event loop.

pub(crate) mod connection;
pub(crate) mod handshake;
mod session;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::time::timeout;
use tracing::Instrument;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::connection::Connection;
use self::session::SocketSession;
use super::authenticate::{RateLimitStatus, bearer_token};
use super::error::{ApiError, ErrorResponse, THROTTLED};
use super::extract::Query;
use super::page_origin::require_allowed_page;
use super::request_log::record_user;
use super::server::Slot;
use super::session_cookie::session_cookies;
use super::state::AppState;
use crate::domain::Timestamp;
use crate::error::{Error, Unauthenticated};
use crate::realtime::SubscribeError;
use crate::services::accounts::Caller;

/// How long the handshake may take after its response was made: it counts towards the user's
/// sockets already.
const UPGRADE_DEADLINE: Duration = Duration::from_secs(10);
/// The `Retry-After` for a client with too many sockets. The time at which it closes one is
/// unknown; this long after it did, there is room.
const FULL_WAIT: Duration = Duration::from_secs(1);

/// The routes of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(connect))
}

/// WebSocket
///
/// Opens the socket on which the user's events arrive. The first of these credentials that is
/// present decides: `ticket`, the subprotocol `bearer, <access token>`, the `Authorization` header,
/// `token`, the session cookie (which also needs `Origin`).
#[utoipa::path(
    get, path = "/ws/prompts", tag = "events", operation_id = "connect",
    security((), ("bearer" = [])),
    params(
        ("ticket" = Option<String>, Query, description = "A one-use ticket."),
        ("token" = Option<String>, Query, description = "An access token; a ticket is safer, because addresses end up in logs."),
    ),
    responses(
        (status = 101, description = "The socket is open. Its first frame is `{\"message\": …, \"user_id\": N}`."),
        (status = 403, description = "The session cookie came from a page of another origin.", body = ErrorResponse),
        (status = 503, description = "Events cannot reach this replica at the moment.", body = ErrorResponse),
        (status = 426, description = "The request asks for no WebSocket.", body = ErrorResponse),
        (status = 429, description = THROTTLED, body = ErrorResponse),
    ),
)]
async fn connect(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let (mut parts, _) = request.into_parts();
    let Some(answer) = handshake::accept(&parts) else {
        return Ok(handshake::upgrade_required());
    };
    // The server sets it on every request that may be upgraded.
    let Some(on_upgrade) = parts.extensions.remove::<OnUpgrade>() else {
        return Ok(handshake::upgrade_required());
    };
    if state.lifecycle.stopping.is_cancelled() {
        return Err(Error::overloaded().into());
    }
    let query = Query::parse(parts.uri.query().unwrap_or_default());
    let caller = authenticate(&state, &query, &parts).await?;
    record_user(caller.user_id());
    // Before the subscription is taken: the throttle may be in Redis, and a subscription must not
    // wait for the network.
    let rate_limit = RateLimitStatus::of(&state, caller.user_id()).await;
    let mut response =
        open(&state, caller, parts, on_upgrade, answer).unwrap_or_else(IntoResponse::into_response);
    rate_limit.apply_headers(&mut response);
    Ok(response)
}

/// Opens a socket for the caller: takes a subscription, and starts the task that serves the socket
/// once `answer` is sent.
fn open(
    state: &AppState,
    caller: Caller,
    mut parts: Parts,
    on_upgrade: OnUpgrade,
    answer: Response,
) -> Result<Response, ApiError> {
    let subscription = state
        .broker
        .subscribe(caller.listener(), state.server.max_sockets_per_user)
        .map_err(|refused| match refused {
            SubscribeError::TooManySockets => ApiError::plain(
                StatusCode::TOO_MANY_REQUESTS,
                "This user has too many open sockets.",
            )
            .later(FULL_WAIT),
            SubscribeError::Unavailable => Error::unavailable(refused).into(),
        })?;
    let slot = parts.extensions.remove::<Slot>();
    let state = Arc::clone(state);
    let tasks = state.lifecycle.tasks.clone();
    let serving = async move {
        let Ok(Ok(upgraded)) = timeout(UPGRADE_DEADLINE, on_upgrade).await else {
            tracing::debug!("a WebSocket handshake was not completed");
            return;
        };
        let session = SocketSession {
            state,
            caller,
            subscription,
        };
        let code = session
            .run(Connection::new(TokioIo::new(upgraded)).await)
            .await;
        tracing::info!(code, "socket closed");
        drop(slot);
    };
    // Its lines carry the ids of the request that opened the socket.
    tasks.spawn(serving.in_current_span());
    Ok(answer)
}

/// Authenticates the client. The first credential that is present decides, valid or not: a client
/// that sends an expired one learns this, and is not let in by another that it may send
/// unknowingly.
async fn authenticate(state: &AppState, query: &Query, parts: &Parts) -> Result<Caller, Error> {
    let (headers, now) = (&parts.headers, Timestamp::now());
    if let Some(ticket) = query.get("ticket") {
        return state.accounts.redeem_ticket(ticket, now).await;
    }
    if let Some(token) = handshake::protocol_token(headers) {
        return state.accounts.authenticate(token, now).await;
    }
    if let Some(token) = bearer_token(headers)? {
        return state.accounts.authenticate(token, now).await;
    }
    if let Some(token) = query.get("token") {
        return state.accounts.authenticate(token, now).await;
    }
    let cookies = session_cookies(headers);
    if cookies.is_empty() {
        return Err(Unauthenticated::NotProvided.into());
    }
    let caller = state.accounts.authenticate_session(&cookies, now).await?;
    require_allowed_page(parts, &state.server)?;
    Ok(caller)
}
