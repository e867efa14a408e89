//! `/api/auth/token/`: the password grant of OAuth 2, for tools that use it to get a token, such as
//! "Authorize" in Swagger UI.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::error::{ApiError, ErrorResponse, THROTTLED};
use super::extract::{Body, ClientAddress, form};
use super::state::AppState;
use crate::domain::ClientNetwork;
use crate::error::{Error, Unauthenticated};
use crate::services::accounts::LogIn;

/// The only supported grant.
const PASSWORD_GRANT: &str = "password";

/// The routes of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(get_token))
}

/// Name and password, as OAuth 2 has them.
#[derive(ToSchema)]
pub struct TokenRequest {
    #[schema(pattern = "^password$", example = "password")]
    grant_type: String,
    #[schema(min_length = 1, pattern = r"^[^\x00]*$", example = "alice")]
    username: String,
    #[schema(
        min_length = 1,
        pattern = r"^[^\x00]*$",
        format = "password",
        example = "secret123"
    )]
    password: String,
}

form!(TokenRequest {
    grant_type: text,
    username: text,
    password: text
});

/// An access token, as OAuth 2 has it.
#[derive(Serialize, ToSchema)]
pub struct TokenResponse {
    /// Authenticates requests until it expires.
    access_token: String,
    #[schema(example = "Bearer")]
    token_type: &'static str,
    /// Seconds until it expires.
    #[schema(example = 300)]
    expires_in: u64,
}

/// An error, as OAuth 2 has it.
#[derive(Serialize, ToSchema)]
pub struct TokenErrorResponse {
    /// For humans; may change.
    detail: String,
    /// `invalid_grant`, `invalid_request` or `unsupported_grant_type`.
    error: Option<String>,
    /// The same as `detail`.
    error_description: Option<String>,
}

/// Log in by OAuth 2
///
/// The password grant (RFC 6749, section 4.3), by which "Authorize" on this page signs in. Gives an
/// access token alone; logins are counted and refused as by `/api/auth/login/`. Client ids, secrets
/// and scopes are ignored.
#[utoipa::path(
    post, path = "/api/auth/token", tag = "accounts", operation_id = "get_token", security(()),
    request_body(content = TokenRequest, content_type = "application/x-www-form-urlencoded"),
    responses(
        (status = 200, description = "The token.", body = TokenResponse),
        (status = 400, description = "Name and password do not match, or the request breaks the rules.", body = TokenErrorResponse),
        (status = 429, description = THROTTLED, body = ErrorResponse),
    ),
)]
async fn get_token(
    State(state): State<AppState>,
    ClientAddress(address): ClientAddress,
    Body { mut fields, .. }: Body<TokenRequest>,
) -> Result<Json<TokenResponse>, ApiError> {
    let request = TokenRequest::read(&mut fields);
    if !["", PASSWORD_GRANT].contains(&request.grant_type.as_str()) {
        let detail = "The only grant_type is password.";
        return Err(ApiError::oauth("unsupported_grant_type", detail));
    }
    fields.check().map_err(invalid_request)?;
    let login = LogIn {
        username: request.username,
        password: request.password,
        wants_session: false,
        network: ClientNetwork::from(address),
    };
    let tokens = state.accounts.log_in(login).await.map_err(refused)?;
    Ok(Json(TokenResponse {
        access_token: tokens.access,
        token_type: "Bearer",
        expires_in: state.accounts.config.access_token_lifetime.as_secs(),
    }))
}

/// Joins the errors of all fields to one text: OAuth 2 has no errors by field.
fn invalid_request(error: Error) -> ApiError {
    let Error::InvalidFields(fields) = error else {
        return error.into();
    };
    let each: Vec<String> = fields
        .iter()
        .map(|(name, messages)| format!("{name}: {}", messages.join(" ")))
        .collect();
    ApiError::oauth("invalid_request", &each.join(" "))
}

/// Where a login returns 401, OAuth 2 requires 400: the body has the reason, and an `Authorization`
/// header would not help.
fn refused(error: Error) -> ApiError {
    let is_wrong = matches!(
        error,
        Error::Unauthenticated(Unauthenticated::WrongCredentials)
    );
    let refusal = ApiError::from(error);
    if is_wrong {
        let detail = refusal.into_body()["detail"].take();
        ApiError::oauth("invalid_grant", detail.as_str().unwrap_or_default())
    } else {
        refusal
    }
}
