//! `/api/auth/…`: registering, logging in and out, tokens and tickets.

use std::time::Instant;

use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::authenticate::refuse_api_key;
use super::error::{ApiError, ErrorResponse, INVALID_CREDENTIALS, THROTTLED};
use super::extract::{Body, ClientAddress, form};
use super::page_origin::{PageOrigin, require_allowed_page, wants_secure_cookie};
use super::session_cookie::{self, session_cookies};
use super::state::AppState;
use crate::domain::{ClientNetwork, Timestamp};
use crate::error::Error;
use crate::services::accounts::{Caller, LogIn, Registration, TICKET_LIFETIME};

/// The routes that need no access token.
pub fn open_router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(register))
        .routes(routes!(log_in))
        .routes(routes!(refresh))
        .routes(routes!(log_out))
}

/// The routes that need one.
pub fn known_router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(issue_ticket))
        .routes(routes!(show_me))
}

/// A new account.
#[derive(ToSchema)]
pub struct RegisterRequest {
    /// Letters, digits and @.+-_ only; unique; upper and lower case differ.
    #[schema(
        value_type = String,
        min_length = 1,
        max_length = 150,
        pattern = r"^[\w.@+-]+$",
        example = "alice"
    )]
    username: RawText,
    /// Need not be unique.
    #[schema(value_type = String, max_length = 254, format = "email", example = "a@b.c")]
    email: RawText,
    /// Not all digits, not common, not like the username.
    #[schema(
        value_type = String,
        min_length = 8,
        max_length = 1024,
        pattern = r"^[^\x00]*[^0-9\x00][^\x00]*$",
        format = "password",
        example = "secret123"
    )]
    password: RawText,
}

/// A field as it was received, or the message that says why it is no text. The service checks its
/// other rules.
type RawText = Result<String, &'static str>;

form!(RegisterRequest {
    username: raw_text,
    email: raw_text,
    password: raw_text
});

/// An account.
#[derive(Serialize, ToSchema)]
pub struct UserResponse {
    #[schema(example = 1)]
    id: i64,
    #[schema(example = "alice")]
    username: String,
    #[schema(example = "a@b.c")]
    email: String,
}

/// Name and password.
#[derive(ToSchema)]
pub struct LogInRequest {
    #[schema(min_length = 1, pattern = r"^[^\x00]*$", example = "alice")]
    username: String,
    #[schema(
        min_length = 1,
        pattern = r"^[^\x00]*$",
        format = "password",
        example = "secret123"
    )]
    password: String,
    /// Whether to set the session cookie too, with which a page refreshes and opens WebSockets.
    #[schema(default = false, required = false)]
    session: bool,
}

form!(LogInRequest {
    username: text,
    password: text,
    session: flag
});

/// The tokens of a login.
#[derive(Serialize, ToSchema)]
pub struct TokenPairResponse {
    /// Gives new access tokens until it expires.
    refresh: String,
    /// Authenticates requests until it expires.
    access: String,
}

/// A refresh token.
#[derive(ToSchema)]
pub struct RefreshRequest {
    #[schema(min_length = 1, pattern = r"^[^\x00]*$")]
    refresh: String,
}

form!(RefreshRequest { refresh: text });

/// A new access token.
#[derive(Serialize, ToSchema)]
pub struct AccessTokenResponse {
    access: String,
}

/// The credential to end.
#[derive(ToSchema)]
pub struct LogOutRequest {
    /// The refresh token to end.
    #[schema(pattern = r"^[^\x00]*$")]
    refresh: Option<String>,
}

form!(LogOutRequest {
    refresh: optional_text
});

/// A ticket for one WebSocket.
#[derive(Serialize, ToSchema)]
pub struct TicketResponse {
    /// Used as `?ticket=`, once.
    ticket: String,
    /// Seconds until it expires.
    #[schema(example = 30)]
    expires_in: u64,
}

/// Register
///
/// Makes an account. Log in next.
#[utoipa::path(
    post, path = "/api/auth/register", tag = "accounts", operation_id = "register", security(()),
    request_body(content = RegisterRequest, content_type = "application/json"),
    responses(
        (status = 201, description = "The account was made.", body = UserResponse),
        (status = 403, description = "Registration is closed.", body = ErrorResponse),
        (status = 429, description = THROTTLED, body = ErrorResponse),
    ),
)]
async fn register(
    State(state): State<AppState>,
    RegisterAdmitted(network): RegisterAdmitted,
    Body { mut fields, .. }: Body<RegisterRequest>,
) -> Result<Response, ApiError> {
    let request = RegisterRequest::read(&mut fields);
    let registration = Registration {
        username: request.username,
        email: request.email,
        password: request.password,
        network,
    };
    let registering = state.accounts.register(registration, Timestamp::now());
    let user = registering.await?;
    let body = UserResponse {
        id: user.id.0,
        username: user.username,
        email: user.email,
    };
    Ok((StatusCode::CREATED, Json(body)).into_response())
}

/// Log in
///
/// Returns a refresh and an access token, and sets the session cookie if asked for. The cookie is
/// called `session`, over TLS `__Host-session`; a page of another origin may not ask for it. After
/// ten failures in a minute for one name from one address, further tries are refused for a while.
#[utoipa::path(
    post, path = "/api/auth/login", tag = "accounts", operation_id = "login", security(()),
    request_body(content = LogInRequest, content_type = "application/json"),
    responses(
        (
            status = 200, description = "The tokens.", body = TokenPairResponse,
            headers((
                "Set-Cookie" = String,
                description = "The session cookie, if it was asked for."
            )),
        ),
        (status = 401, description = INVALID_CREDENTIALS, body = ErrorResponse),
        (
            status = 403, description = "A page of another origin asked for a session.",
            body = ErrorResponse,
        ),
        (status = 429, description = THROTTLED, body = ErrorResponse),
    ),
)]
async fn log_in(
    State(state): State<AppState>,
    ClientAddress(address): ClientAddress,
    parts: Parts,
    Body { mut fields, .. }: Body<LogInRequest>,
) -> Result<Response, ApiError> {
    let request = LogInRequest::read(&mut fields);
    // Another site could otherwise log its visitors in to an account that it controls.
    if request.session && PageOrigin::of(&parts, &state.server) == PageOrigin::Foreign {
        let detail = "A page of this Origin may not ask for a session.";
        return Err(Error::Forbidden(detail).into());
    }
    fields.check()?;
    let login = LogIn {
        username: request.username,
        password: request.password,
        wants_session: request.session,
        network: ClientNetwork::from(address),
    };
    let pair = state.accounts.log_in(login).await?;
    let mut response = Json(TokenPairResponse {
        refresh: pair.refresh,
        access: pair.access,
    })
    .into_response();
    if let Some(session) = pair.session {
        let lifetime = state.accounts.config.refresh_token_lifetime.as_secs();
        let is_secure = wants_secure_cookie(&parts, &state.server);
        session_cookie::set(response.headers_mut(), &session, lifetime, is_secure);
    }
    Ok(response)
}

/// Refresh
///
/// Returns a new access token. The refresh token stays valid. Pages of this service and of allowed
/// origins may leave the body out: the session cookie then takes its place, and the page needs to
/// keep no token where scripts can read it.
#[utoipa::path(
    post, path = "/api/auth/refresh", tag = "accounts", operation_id = "refresh",
    security(()),
    // Described as required, because without the cookie it is: a schema has no words for both.
    request_body(content = RefreshRequest, content_type = "application/json"),
    responses(
        (status = 200, description = "The new access token.", body = AccessTokenResponse),
        (status = 401, description = INVALID_CREDENTIALS, body = ErrorResponse),
        (
            status = 403,
            description = "The session cookie came without `Origin`, or from a page of another origin.",
            body = ErrorResponse,
        ),
    ),
)]
async fn refresh(
    State(state): State<AppState>,
    parts: Parts,
    Body { mut fields, .. }: Body<RefreshRequest>,
) -> Result<Response, ApiError> {
    let (cookies, now) = (session_cookies(&parts.headers), Timestamp::now());
    let access = if cookies.is_empty() || fields.has("refresh") {
        let request = RefreshRequest::read(&mut fields);
        fields.check()?;
        state.accounts.refresh(&request.refresh, now).await?
    } else {
        let access = state.accounts.refresh_by_session(&cookies, now).await?;
        require_allowed_page(&parts, &state.server)?;
        access
    };
    Ok(Json(AccessTokenResponse { access }).into_response())
}

/// Log out
///
/// Ends the given refresh token and every session whose cookie is sent; none works from now on.
/// Needs no access token.
#[utoipa::path(
    post, path = "/api/auth/logout", tag = "accounts", operation_id = "logout", security(()),
    request_body(content = Option<LogOutRequest>, content_type = "application/json"),
    responses((
        status = 204, description = "They have ended.",
        headers((
            "Set-Cookie" = String,
            description = "Takes the session cookies of both names back."
        )),
    ), (
        status = 403, description = "An API key came with the request: it cannot log out.",
        body = ErrorResponse,
    )),
)]
async fn log_out(
    State(state): State<AppState>,
    parts: Parts,
    Body { mut fields, .. }: Body<LogOutRequest>,
) -> Result<Response, ApiError> {
    refuse_api_key(&parts.headers)?;
    let request = LogOutRequest::read(&mut fields);
    fields.check()?;
    let cookies = session_cookies(&parts.headers);
    let token = request.refresh.as_deref();
    state.accounts.log_out(token, &cookies).await?;
    let mut response = StatusCode::NO_CONTENT.into_response();
    if !cookies.is_empty() {
        let is_secure = wants_secure_cookie(&parts, &state.server);
        session_cookie::clear(response.headers_mut(), is_secure);
    }
    Ok(response)
}

/// WebSocket ticket
///
/// Returns a ticket for one WebSocket, valid once and for 30 seconds. It keeps the access token out
/// of addresses and logs.
#[utoipa::path(
    post, path = "/api/auth/ws-ticket", tag = "accounts", operation_id = "issue_ticket", security(("bearer" = [])),
    responses((status = 201, description = "The ticket.", body = TicketResponse)),
)]
async fn issue_ticket(State(state): State<AppState>, caller: Caller) -> Result<Response, ApiError> {
    let ticket = state.accounts.issue_ticket(&caller).await?;
    let body = TicketResponse {
        ticket,
        expires_in: TICKET_LIFETIME.as_secs(),
    };
    Ok((StatusCode::CREATED, Json(body)).into_response())
}

/// Who am I
///
/// The account behind the access token.
#[utoipa::path(
    get, path = "/api/auth/me", tag = "accounts", operation_id = "me", security(("bearer" = [])),
    responses((status = 200, description = "The account.", body = UserResponse)),
)]
async fn show_me(caller: Caller) -> Json<UserResponse> {
    Json(UserResponse {
        id: caller.user_id().0,
        username: caller.user.username.clone(),
        email: caller.user.email.clone(),
    })
}

/// Proof that the throttle of registrations let a request of this client through.
struct RegisterAdmitted(ClientNetwork);

impl FromRequestParts<AppState> for RegisterAdmitted {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let Ok(ClientAddress(address)) = ClientAddress::from_request_parts(parts, state).await;
        let network = ClientNetwork::from(address);
        let verdict = state
            .register_throttle
            .check(network.site(), Instant::now())
            .await;
        match verdict.retry_after {
            None => Ok(Self(network)),
            Some(wait) => {
                state
                    .metrics
                    .throttled
                    .with_label_values(&["register"])
                    .inc();
                Err(Error::RateLimited(wait).into())
            }
        }
    }
}
