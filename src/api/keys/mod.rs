//! `/api/keys`: the API keys of the caller.

mod request;

use axum::Json;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::request::{ChangeKeyRequest, CreateKeyRequest, PeriodName, RotateKeyRequest, ScopeName};
use super::error::{ApiError, ErrorResponse};
use super::extract::Body;
use super::state::AppState;
use crate::domain::{ApiKey, ApiKeyId, Period, Scope, Timestamp};
use crate::error::Error;
use crate::services::accounts::Caller;
use crate::services::api_keys::IssuedApiKey;

/// The routes of this resource; all need an access token, and take no API key.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_key, list_keys))
        .routes(routes!(show_key, change_key, delete_key))
        .routes(routes!(rotate_key))
}

/// An API key without its secret.
#[derive(Serialize, ToSchema)]
pub struct KeyResponse {
    #[schema(example = "4fQz81Lw")]
    id: String,
    #[schema(example = "nightly report")]
    name: String,
    /// The beginning and the end of the secret, by which you tell one key from another.
    #[schema(example = "ps_4fQz81Lw…x2Kd")]
    hint: String,
    scopes: Vec<ScopeName>,
    /// Empty: all.
    models: Vec<String>,
    #[schema(required = true, example = "100/day")]
    rates: Option<String>,
    /// In US dollars, exactly.
    #[schema(required = true, value_type = Option<f64>, example = 20.0)]
    budget_usd: Option<Box<RawValue>>,
    #[schema(required = true)]
    budget_period: Option<PeriodName>,
    #[schema(required = true, format = "date-time")]
    expires_at: Option<String>,
    #[schema(format = "date-time")]
    created_at: String,
    /// To the minute.
    #[schema(required = true, format = "date-time")]
    last_used_at: Option<String>,
}

/// All API keys that were not revoked, the newest first.
#[derive(Serialize, ToSchema)]
pub struct KeyListResponse {
    results: Vec<KeyResponse>,
}

/// An API key with its secret, which is shown this once.
#[derive(Serialize, ToSchema)]
pub struct IssuedKeyResponse {
    /// The secret. Keep it: nobody can show it again.
    #[schema(example = "ps_4fQz81LwVq0c5mB7tRz2Yw8sKd1Xn6Ha9uPe3Gf03l0M8h")]
    key: String,
    /// After a rotation: until when the secret before it may be used.
    #[schema(required = true, format = "date-time")]
    previous_expires_at: Option<String>,
    #[serde(flatten)]
    properties: KeyResponse,
}

/// The description of a 404 for the path of one key.
const NO_SUCH_KEY: &str = "There is no such key, it was revoked, or it is another user's.";

/// Make an API key
///
/// For programs: it acts in your name, within its scopes, until it expires or is revoked. Its
/// secret is in this response and nowhere else. At most 100 live keys a user.
#[utoipa::path(
    post, path = "/api/keys", tag = "keys", operation_id = "create_key", security(("bearer" = [])),
    request_body(content = CreateKeyRequest, content_type = "application/json"),
    responses(
        (status = 201, description = "The key with its secret.", body = IssuedKeyResponse),
        (status = 403, description = "You have 100 live keys, or the request came with an API key.", body = ErrorResponse),
    ),
)]
async fn create_key(
    State(state): State<AppState>,
    caller: Caller,
    Body { mut fields, .. }: Body<CreateKeyRequest>,
) -> Result<Response, ApiError> {
    let new = CreateKeyRequest::new_key(&mut fields)?;
    let keys = &state.accounts.api_keys;
    let issued = keys.create(caller.user_id(), new, Timestamp::now()).await?;
    Ok((StatusCode::CREATED, Json(IssuedKeyResponse::from(issued))).into_response())
}

/// List API keys
///
/// Your keys, expired ones included, the newest first. Revoked keys are not listed.
#[utoipa::path(
    get, path = "/api/keys", tag = "keys", operation_id = "list_keys", security(("bearer" = [])),
    responses((status = 200, description = "The keys.", body = KeyListResponse)),
)]
async fn list_keys(
    State(state): State<AppState>,
    caller: Caller,
) -> Result<Json<KeyListResponse>, ApiError> {
    let keys = state.accounts.api_keys.list(caller.user_id()).await?;
    let results = keys.into_iter().map(KeyResponse::from).collect();
    Ok(Json(KeyListResponse { results }))
}

/// Show an API key
///
/// One of your keys.
#[utoipa::path(
    get, path = "/api/keys/{id}", tag = "keys", operation_id = "show_key", security(("bearer" = [])),
    params(("id" = String, Path, description = "The key's id.")),
    responses(
        (status = 200, description = "The key.", body = KeyResponse),
        (status = 404, description = NO_SUCH_KEY, body = ErrorResponse),
    ),
)]
async fn show_key(
    State(state): State<AppState>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<Json<KeyResponse>, ApiError> {
    let key = state.accounts.api_keys.get(caller.user_id(), id).await?;
    Ok(Json(key.into()))
}

/// Change an API key
///
/// What is left out stays as it is. A change takes effect within two seconds.
#[utoipa::path(
    patch, path = "/api/keys/{id}", tag = "keys", operation_id = "change_key", security(("bearer" = [])),
    params(("id" = String, Path, description = "The key's id.")),
    request_body(content = Option<ChangeKeyRequest>, content_type = "application/json"),
    responses(
        (status = 200, description = "The key after the change.", body = KeyResponse),
        (status = 403, description = "The key had expired and you have 100 live keys, or the request came with an API key.", body = ErrorResponse),
        (status = 404, description = NO_SUCH_KEY, body = ErrorResponse),
    ),
)]
async fn change_key(
    State(state): State<AppState>,
    caller: Caller,
    PathId(id): PathId,
    Body { mut fields, .. }: Body<ChangeKeyRequest>,
) -> Result<Json<KeyResponse>, ApiError> {
    let change = ChangeKeyRequest::change(&mut fields)?;
    let keys = &state.accounts.api_keys;
    let changed = keys.change(caller.user_id(), id, change, Timestamp::now());
    Ok(Json(changed.await?.into()))
}

/// Revoke an API key
///
/// It is refused within two seconds, everywhere. Streams that were opened with it end.
#[utoipa::path(
    delete, path = "/api/keys/{id}", tag = "keys", operation_id = "delete_key", security(("bearer" = [])),
    params(("id" = String, Path, description = "The key's id.")),
    responses(
        (status = 204, description = "It is revoked."),
        (status = 404, description = NO_SUCH_KEY, body = ErrorResponse),
    ),
)]
async fn delete_key(
    State(state): State<AppState>,
    caller: Caller,
    PathId(id): PathId,
) -> Result<StatusCode, ApiError> {
    let keys = &state.accounts.api_keys;
    let user_id = caller.user_id();
    keys.revoke(user_id, id, Timestamp::now()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Rotate an API key
///
/// Gives it another secret. The present one works until the grace is over, any earlier one no
/// longer. Everything else of the key stays.
#[utoipa::path(
    post, path = "/api/keys/{id}/rotate", tag = "keys", operation_id = "rotate_key", security(("bearer" = [])),
    params(("id" = String, Path, description = "The key's id.")),
    request_body(content = Option<RotateKeyRequest>, content_type = "application/json"),
    responses(
        (status = 200, description = "The key with its new secret.", body = IssuedKeyResponse),
        (status = 404, description = NO_SUCH_KEY, body = ErrorResponse),
    ),
)]
async fn rotate_key(
    State(state): State<AppState>,
    caller: Caller,
    PathId(id): PathId,
    Body { mut fields, .. }: Body<RotateKeyRequest>,
) -> Result<Json<IssuedKeyResponse>, ApiError> {
    let grace = RotateKeyRequest::grace(&mut fields)?;
    let keys = &state.accounts.api_keys;
    let rotated = keys.rotate(caller.user_id(), id, grace, Timestamp::now());
    Ok(Json(rotated.await?.into()))
}

impl From<ApiKey> for KeyResponse {
    fn from(key: ApiKey) -> Self {
        let amount = key.budget.map(|budget| budget.amount.to_string());
        let scope = |scope| match scope {
            Scope::Chat => ScopeName::Chat,
            Scope::Embeddings => ScopeName::Embeddings,
            Scope::Read => ScopeName::Read,
            Scope::Write => ScopeName::Write,
        };
        Self {
            id: key.id.to_string(),
            hint: key.hint(),
            name: key.name,
            scopes: key.scopes.iter().map(scope).collect(),
            models: key.models,
            rates: key.rates.map(|rates| rates.to_string()),
            // A decimal number is JSON as it stands.
            budget_usd: amount.and_then(|amount| RawValue::from_string(amount).ok()),
            budget_period: key.budget.map(|budget| match budget.period {
                Period::Day => PeriodName::Day,
                Period::Week => PeriodName::Week,
                Period::Month => PeriodName::Month,
                Period::Total => PeriodName::Total,
            }),
            expires_at: key.expires_at.map(|at| at.to_string()),
            created_at: key.created_at.to_string(),
            last_used_at: key.last_used_at.map(|at| at.to_string()),
        }
    }
}

impl From<IssuedApiKey> for IssuedKeyResponse {
    fn from(issued: IssuedApiKey) -> Self {
        Self {
            key: issued.text.expose().to_owned(),
            previous_expires_at: issued.previous_until.map(|until| until.to_string()),
            properties: issued.key.into(),
        }
    }
}

/// The key that the path names.
struct PathId(ApiKeyId);

impl<S: Send + Sync> FromRequestParts<S> for PathId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        // A path that cannot be decoded names no key.
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|_| Error::NotFound)?;
        Ok(Self(ApiKeyId::parse(&text).ok_or(Error::NotFound)?))
    }
}
