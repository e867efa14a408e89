//! `/api/keys`: the API keys of the caller.

use std::time::Duration;

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

use super::error::{ApiError, ErrorResponse};
use super::extract::{Body, Fields, Scalar, form};
use super::state::AppState;
use crate::domain::account::{NOT_NULL, REQUIRED};
use crate::domain::api_key::{parse_models, parse_name};
use crate::domain::budget::parse_budget_amount;
use crate::domain::{
    ApiKey, ApiKeyChange, ApiKeyId, Budget, Period, Picodollars, Rates, Scope, Scopes, Timestamp,
};
use crate::error::Error;
use crate::services::accounts::Caller;
use crate::services::api_keys::{DEFAULT_GRACE, IssuedApiKey, NewApiKey};

/// The routes of this resource; all need an access token, and take no API key.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_key, list_keys))
        .routes(routes!(show_key, change_key, delete_key))
        .routes(routes!(rotate_key))
}

/// A field that may be left out, or be null.
type Nullable<T> = Option<Option<T>>;

/// An API key to be made.
#[derive(ToSchema)]
pub struct CreateKeyRequest {
    /// What you call it. Need not be unique. No control characters.
    #[schema(value_type = String, min_length = 1, max_length = 100, pattern = r"\S", example = "nightly report")]
    name: Nullable<String>,
    /// What it may be used for: `chat` asks models, `embeddings` computes embeddings, `read` lists
    /// and searches, `write` changes and deletes.
    #[schema(value_type = Option<Vec<ScopeName>>, min_items = 1, default = json!(["chat", "read"]))]
    scopes: Nullable<Vec<String>>,
    /// The models that it may use: names, or beginnings of names followed by `*`. Empty or null:
    /// all.
    #[schema(value_type = Option<Vec<ModelPattern>>, max_items = 100, example = json!(["gpt-*"]))]
    models: Nullable<Vec<String>>,
    /// How often it may be used, as in `PROMPT_THROTTLE`: `2/s,100/day`. Null or `off`: as often as
    /// you.
    #[schema(value_type = Option<String>, pattern = "^[1-9][0-9]{0,3}/(s|min|h|day)$", example = "100/day")]
    rates: Nullable<String>,
    /// How much it may spend in a period, in US dollars: a number, or a text such as `"20.00"`.
    /// What comes after 12 decimals is cut off. Null: as much as you.
    #[schema(value_type = Option<f64>, minimum = 0.01, maximum = 1_000_000, example = 20.0)]
    budget_usd: Nullable<Scalar>,
    /// The period of the budget, in UTC. Weeks begin on Monday.
    #[schema(value_type = Option<PeriodName>, default = "month")]
    budget_period: Nullable<String>,
    /// When it expires, as RFC 3339. Null: never.
    #[schema(value_type = Option<String>, format = "date-time", example = "2036-11-22T21:08:49Z")]
    expires_at: Nullable<String>,
}

form!(CreateKeyRequest {
    name: nullable_text,
    scopes: nullable_texts,
    models: nullable_texts,
    rates: nullable_text,
    budget_usd: nullable_scalar,
    budget_period: nullable_text,
    expires_at: nullable_text
}, json_only: true);

/// Changes of an API key. What is left out stays as it is; null sets what a new key has by default.
#[derive(ToSchema)]
pub struct ChangeKeyRequest {
    /// What you call it. No control characters.
    #[schema(value_type = String, required = false, min_length = 1, max_length = 100, pattern = r"\S", example = "nightly report")]
    name: Nullable<String>,
    /// What it may be used for.
    #[schema(value_type = Option<Vec<ScopeName>>, min_items = 1)]
    scopes: Nullable<Vec<String>>,
    /// The models that it may use. Empty or null: all.
    #[schema(value_type = Option<Vec<ModelPattern>>, max_items = 100, example = json!(["gpt-*"]))]
    models: Nullable<Vec<String>>,
    /// How often it may be used. Null or `off`: as often as you.
    #[schema(value_type = Option<String>, pattern = "^[1-9][0-9]{0,3}/(s|min|h|day)$", example = "100/day")]
    rates: Nullable<String>,
    /// How much it may spend in a period, in US dollars. Null: as much as you.
    #[schema(value_type = Option<f64>, minimum = 0.01, maximum = 1_000_000, example = 20.0)]
    budget_usd: Nullable<Scalar>,
    /// The period of the budget.
    #[schema(value_type = Option<PeriodName>)]
    budget_period: Nullable<String>,
    /// When it expires, as RFC 3339. Null: never.
    #[schema(value_type = Option<String>, format = "date-time", example = "2036-11-22T21:08:49Z")]
    expires_at: Nullable<String>,
}

form!(ChangeKeyRequest {
    name: nullable_text,
    scopes: nullable_texts,
    models: nullable_texts,
    rates: nullable_text,
    budget_usd: nullable_scalar,
    budget_period: nullable_text,
    expires_at: nullable_text
}, json_only: true);

/// How long the present secret stays valid.
#[derive(ToSchema)]
pub struct RotateKeyRequest {
    /// For how long the present secret may still be used: seconds, or a text such as `24h`; at most
    /// 30 days.
    #[schema(value_type = Option<Grace>, default = "24h", example = "1h")]
    grace: Nullable<Scalar>,
}

form!(RotateKeyRequest { grace: nullable_scalar }, json_only: true);

/// The name of a model, or the beginning of names followed by `*`.
#[derive(Serialize, ToSchema)]
#[schema(
    min_length = 1,
    max_length = 200,
    pattern = r"^[^\s,*\x00-\x1f\x7f-\x9f]*\*?$",
    example = "gpt-*"
)]
pub struct ModelPattern(String);

/// A length of time.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[expect(
    dead_code,
    reason = "only the description needs it: `Fields` reads both forms"
)]
pub enum Grace {
    /// Seconds.
    Seconds(GraceSeconds),
    /// As in settings.
    Text(GraceText),
}

/// Seconds.
#[derive(Serialize, ToSchema)]
#[schema(maximum = 2_592_000)]
pub struct GraceSeconds(u32);

/// A number and its unit.
#[derive(Serialize, ToSchema)]
#[schema(pattern = "^[0-9]{1,2}(s|m|h)$", example = "24h")]
pub struct GraceText(String);

/// What an API key may be used for.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ScopeName {
    /// Asking models.
    Chat,
    /// Computing embeddings.
    Embeddings,
    /// Lists and searches.
    Read,
    /// Changes and deletions.
    Write,
}

/// The period of a budget.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PeriodName {
    /// From midnight UTC.
    Day,
    /// From Monday.
    Week,
    /// From the first of the month.
    Month,
    /// For all time.
    Total,
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
    let request = CreateKeyRequest::read(&mut fields);
    if request.name.is_none() {
        fields.refuse("name", REQUIRED);
    }
    let change = ChangeKeyRequest {
        name: request.name,
        scopes: request.scopes,
        models: request.models,
        rates: request.rates,
        budget_usd: request.budget_usd,
        budget_period: request.budget_period,
        expires_at: request.expires_at,
    };
    let ApiKeyChange {
        name,
        scopes,
        models,
        rates,
        budget,
        budget_period,
        expires_at,
    } = change.parse(&mut fields);
    let budget = budget.flatten().map(|amount| Budget {
        amount,
        period: budget_period.unwrap_or(Budget::DEFAULT_PERIOD),
    });
    if budget_period.is_some() && budget.is_none() {
        fields.refuse("budget_period", "A period needs a budget_usd.");
    }
    fields.check()?;
    let new = NewApiKey {
        name: name.unwrap_or_default(),
        scopes: scopes.unwrap_or_default(),
        models: models.unwrap_or_default(),
        rates: rates.flatten(),
        budget,
        expires_at: expires_at.flatten(),
    };
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
    let change = ChangeKeyRequest::read(&mut fields).parse(&mut fields);
    fields.check()?;
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
    let RotateKeyRequest { grace } = RotateKeyRequest::read(&mut fields);
    let grace = grace.flatten().map(|grace| parse_grace(&grace));
    if grace == Some(None) {
        let message = "Write seconds, or a length of time such as 24h, 90m or 0s.";
        fields.refuse("grace", message);
    }
    fields.check()?;
    let grace = grace.flatten().unwrap_or(DEFAULT_GRACE);
    let keys = &state.accounts.api_keys;
    let rotated = keys.rotate(caller.user_id(), id, grace, Timestamp::now());
    Ok(Json(rotated.await?.into()))
}

/// A length of time: a number of whole seconds, or a text as settings write it.
fn parse_grace(grace: &Scalar) -> Option<Duration> {
    match grace {
        // JSON has one type of number: some writers add a fraction of zero.
        Scalar::Number(seconds) => seconds
            .parse::<f64>()
            .ok()
            .filter(|seconds| seconds.fract() == 0.0)
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
        // The parser takes a bare 0.
        Scalar::Text(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => None,
        Scalar::Text(text) => humantime::parse_duration(text).ok(),
    }
}

impl ChangeKeyRequest {
    /// Reads the fields' values. Those that break a rule are reported by [`Fields::check`].
    fn parse(self, fields: &mut Fields) -> ApiKeyChange {
        /// Notes the error of a value.
        fn noted<T>(
            fields: &mut Fields,
            name: &'static str,
            value: Result<T, impl Into<String>>,
        ) -> Option<T> {
            value.map_err(|message| fields.refuse(name, message)).ok()
        }
        let name = self.name.and_then(|name| {
            let name = name.ok_or(NOT_NULL).and_then(|name| parse_name(&name));
            noted(fields, "name", name)
        });
        let scopes = self.scopes.and_then(|words| match words {
            None => Some(Scopes::default()),
            Some(words) => {
                let scopes = Scopes::parse(words.iter().map(String::as_str));
                noted(fields, "scopes", scopes)
            }
        });
        let models = self.models.and_then(|patterns| {
            let patterns = patterns.unwrap_or_default();
            let models = parse_models(patterns.iter().map(String::as_str));
            noted(fields, "models", models)
        });
        let rates = nullable(self.rates, |text| {
            let rates: Result<Rates, String> = text.parse().map_err(|_| RATES_RULE.to_owned());
            noted(fields, "rates", rates)
        });
        let budget: Nullable<Picodollars> = nullable(self.budget_usd, |scalar| {
            let (Scalar::Number(text) | Scalar::Text(text)) = scalar;
            noted(fields, "budget_usd", parse_budget_amount(&text))
        });
        let budget_period = self.budget_period.flatten().and_then(|word| {
            let period = Period::parse(&word);
            let rule = "A period is day, week, month or total.";
            noted(fields, "budget_period", period.ok_or(rule))
        });
        let expires_at = nullable(self.expires_at, |text| {
            let time = Timestamp::parse_rfc3339(&text);
            let rule = "Write a time as in RFC 3339, such as 2036-11-22T21:08:49Z.";
            noted(fields, "expires_at", time.ok_or(rule))
        });
        ApiKeyChange {
            name,
            scopes,
            models,
            rates,
            budget,
            budget_period,
            expires_at,
        }
    }
}

/// The rule for rates, which does not quote the value.
const RATES_RULE: &str = "Write rates such as 2/s,100/day: up to 10000 in s, min, h or day.";

/// Reads a value that may be null. What breaks a rule counts as left out.
fn nullable<T, U>(value: Nullable<T>, read: impl FnOnce(T) -> Option<U>) -> Nullable<U> {
    match value? {
        None => Some(None),
        Some(value) => read(value).map(Some),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grace_is_seconds_or_a_length_of_time() {
        let number = |text: &str| parse_grace(&Scalar::Number(text.to_owned()));
        let text = |text: &str| parse_grace(&Scalar::Text(text.to_owned()));
        assert_eq!(number("0"), Some(Duration::ZERO));
        for ninety in ["90", "90.0", "9e1"] {
            assert_eq!(number(ninety), Some(Duration::from_secs(90)));
        }
        assert_eq!(text("0s"), Some(Duration::ZERO));
        assert_eq!(text("24h"), Some(Duration::from_secs(86_400)));
        assert_eq!(text("30d"), Some(Duration::from_secs(2_592_000)));
        for bad in ["-1", "1.5", "1e30", "1e999", "99999999999999999999"] {
            assert_eq!(number(bad), None, "{bad}");
        }
        for bad in ["", "0", "90", "-1s", "soon", "99999999999999999999d"] {
            assert_eq!(text(bad), None, "{bad}");
        }
    }
}
