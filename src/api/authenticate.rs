//! Authentication by access token or API key, what each may be used for, and the rate limit headers
//! on each response to a known user.

use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use super::request_log::record_user;
use super::state::AppState;
use crate::domain::{Scope, Timestamp, UserId};
use crate::error::{Error, ScopeProblem, Unauthenticated};
use crate::services::accounts::Caller;
use crate::services::api_keys::is_api_key;
use crate::throttle::{KeyRates, RateSubject, ThrottleDecision};

/// Holds the throttle's verdict on this request, for the headers of its response.
#[derive(Clone, Default)]
struct VerdictSlot(Arc<OnceLock<ThrottleDecision>>);

/// Lets only requests with a valid access token or API key through, and gives their handlers the
/// [`Caller`].
pub async fn authenticate(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Response {
    let caller = match bearer_caller(&state, request.headers()).await {
        Ok(caller) => caller,
        Err(error) => return ApiError::from(error).into_response(),
    };
    let user_id = caller.user_id();
    record_user(user_id);
    let slot = VerdictSlot::default();
    request.extensions_mut().insert(slot.clone());
    request.extensions_mut().insert(caller.clone());
    let throttle = &*state.prompt_throttle;
    let peek = async {
        let now = Instant::now();
        match key_rates(&caller) {
            Some(rates) => throttle.peek_with(user_id, rates, now).await,
            None => throttle.peek(user_id, now).await,
        }
    };
    let (mut response, verdict) = if request.method() == Method::POST {
        let response = next.run(request).await;
        let verdict = match slot.0.get() {
            Some(verdict) => verdict.clone(),
            None => peek.await,
        };
        (response, verdict)
    } else {
        // Only posts are counted, so the state of the throttle can be read while the handler runs.
        tokio::join!(next.run(request), peek)
    };
    let policy = policy_of(state.prompt_policy.as_ref(), &caller);
    apply_headers(response.headers_mut(), policy.as_ref(), &verdict);
    response
}

/// The same on the routes of OpenAI's protocol, whose limits are others and have other headers.
pub async fn authenticate_v1(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Response {
    let caller = match bearer_caller(&state, request.headers()).await {
        Ok(caller) => caller,
        Err(error) => return ApiError::from(error).into_response(),
    };
    record_user(caller.user_id());
    request.extensions_mut().insert(caller);
    next.run(request).await
}

/// The rates of the caller's API key, if it has one with rates.
pub fn key_rates(caller: &Caller) -> Option<KeyRates<'_>> {
    let key = caller.api_key()?;
    let rates = key.rates.as_ref()?;
    Some(KeyRates { id: key.id, rates })
}

/// The rates that hold for a caller, as a header's value: those of all users, and those of its API
/// key.
fn policy_of(of_all: Option<&HeaderValue>, caller: &Caller) -> Option<HeaderValue> {
    let of_key = key_rates(caller)
        .and_then(|key| key.rates.policy_with(RateSubject::ApiKey.prefix()))
        .and_then(|policy| HeaderValue::from_str(&policy).ok());
    match (of_all, of_key) {
        (Some(of_all), Some(of_key)) => {
            let both = [of_all.as_bytes(), b", ", of_key.as_bytes()].concat();
            HeaderValue::from_bytes(&both).ok()
        }
        (Some(one), None) => Some(one.clone()),
        (None, one) => one,
    }
}

/// The caller behind an `Authorization: Bearer` header.
///
/// # Errors
/// `Unauthenticated` as in SimpleJWT: another scheme counts as no token, and the scheme's case
/// matters.
pub async fn bearer_caller(state: &AppState, headers: &HeaderMap) -> Result<Caller, Error> {
    let token = bearer_token(headers)?.ok_or(Unauthenticated::NotProvided)?;
    state
        .accounts
        .authenticate_bearer(token, Timestamp::now())
        .await
}

/// The token of an `Authorization: Bearer` header, or `None` if there is no such header.
///
/// # Errors
/// `MalformedHeader` if `Bearer` is not followed by exactly one word.
pub fn bearer_token(headers: &HeaderMap) -> Result<Option<&str>, Unauthenticated> {
    let Some(value) = headers.get(AUTHORIZATION) else {
        return Ok(None);
    };
    // A header with other bytes than visible ASCII has no token of this service.
    let Ok(value) = value.to_str() else {
        return Ok(None);
    };
    let mut words = value.split_ascii_whitespace();
    if words.next() != Some("Bearer") {
        return Ok(None);
    }
    match (words.next(), words.next()) {
        (Some(token), None) => Ok(Some(token)),
        _ => Err(Unauthenticated::MalformedHeader),
    }
}

/// How much of the prompt rates a user has left, for a response that does not pass through
/// [`authenticate`].
pub struct RateLimitStatus {
    policy: Option<HeaderValue>,
    verdict: ThrottleDecision,
}

impl RateLimitStatus {
    /// The user's status now. This counts no request.
    pub async fn of(state: &AppState, user_id: UserId) -> Self {
        Self {
            policy: state.prompt_policy.clone(),
            verdict: state.prompt_throttle.peek(user_id, Instant::now()).await,
        }
    }

    /// Adds the headers of the rates to the response.
    pub fn apply_headers(self, response: &mut Response) {
        apply_headers(response.headers_mut(), self.policy.as_ref(), &self.verdict);
    }
}

/// Adds what is left of the rates, as in draft-ietf-httpapi-ratelimit-headers.
fn apply_headers(
    headers: &mut HeaderMap,
    policy: Option<&HeaderValue>,
    verdict: &ThrottleDecision,
) {
    if let Some(policy) = policy {
        headers.insert(HeaderName::from_static("ratelimit-policy"), policy.clone());
    }
    if let Some(left) = verdict
        .ratelimit()
        .and_then(|value| HeaderValue::from_str(&value).ok())
    {
        headers.insert(HeaderName::from_static("ratelimit"), left);
    }
}

/// The caller that [`authenticate`] has found.
///
/// # Errors
/// `Unauthenticated` if a route was built without that layer.
fn known_caller(parts: &Parts) -> Result<Caller, Error> {
    let caller = parts.extensions.get::<Caller>().cloned();
    caller.ok_or_else(|| Unauthenticated::NotProvided.into())
}

/// A caller with an access token. API keys are refused: this is for the routes of accounts, keys
/// and tickets. Routes for API keys extract `Permitted`.
impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let caller = known_caller(parts)?;
        match caller.api_key() {
            None => Ok(caller),
            Some(_) => Err(Error::Scope(ScopeProblem::NoKeys).into()),
        }
    }
}

/// A caller with any credential, whatever its scopes.
pub struct AnyCaller(pub Caller);

impl<S: Sync> FromRequestParts<S> for AnyCaller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        Ok(Self(known_caller(parts)?))
    }
}

/// A scope as a type, for [`Permitted`].
pub trait RequiredScope {
    /// The scope.
    const SCOPE: Scope;
}

/// [`Scope::Chat`].
pub struct ChatScope;
/// [`Scope::Embeddings`].
pub struct EmbeddingsScope;
/// [`Scope::Read`].
pub struct ReadScope;
/// [`Scope::Write`].
pub struct WriteScope;

impl RequiredScope for ChatScope {
    const SCOPE: Scope = Scope::Chat;
}

impl RequiredScope for EmbeddingsScope {
    const SCOPE: Scope = Scope::Embeddings;
}

impl RequiredScope for ReadScope {
    const SCOPE: Scope = Scope::Read;
}

impl RequiredScope for WriteScope {
    const SCOPE: Scope = Scope::Write;
}

/// A caller whose credential has the scope `S`: an access token, or an API key with that scope.
pub struct Permitted<S> {
    /// The caller.
    pub caller: Caller,
    scope: PhantomData<fn() -> S>,
}

impl<R: RequiredScope, S: Sync> FromRequestParts<S> for Permitted<R> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let caller = known_caller(parts)?;
        if !caller.has_scope(R::SCOPE) {
            return Err(Error::Scope(ScopeProblem::Lacks(R::SCOPE)).into());
        }
        let scope = PhantomData;
        Ok(Self { caller, scope })
    }
}

/// Refuses API keys on a route that looks at no access token.
///
/// # Errors
/// `Scope` if the request has a bearer token that is meant to be an API key.
pub fn refuse_api_key(headers: &HeaderMap) -> Result<(), Error> {
    match bearer_token(headers) {
        Ok(Some(token)) if is_api_key(token) => Err(Error::Scope(ScopeProblem::NoKeys)),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Proof that the throttle let this request through. Extracting it counts the request, so it comes
/// before the body.
pub struct Admitted;

impl FromRequestParts<AppState> for Admitted {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let caller = known_caller(parts)?;
        let (user_id, now) = (caller.user_id(), Instant::now());
        let throttle = &state.prompt_throttle;
        let verdict = match key_rates(&caller) {
            Some(rates) => throttle.check_with(user_id, rates, now).await,
            None => throttle.check(user_id, now).await,
        };
        let refused = verdict.retry_after;
        if let Some(slot) = parts.extensions.get::<VerdictSlot>() {
            // Set once: a request is counted once.
            let _ = slot.0.set(verdict);
        }
        match refused {
            None => Ok(Self),
            Some(wait) => {
                state
                    .metrics
                    .throttled
                    .with_label_values(&["prompts"])
                    .inc();
                Err(Error::RateLimited(wait).into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(value: &str) -> Result<Option<String>, Unauthenticated> {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, value.parse().unwrap());
        bearer_token(&headers).map(|token| token.map(str::to_owned))
    }

    #[test]
    fn scheme_is_case_sensitive_and_another_scheme_counts_as_no_token() {
        assert_eq!(token("Bearer a.b.c"), Ok(Some("a.b.c".to_owned())));
        assert_eq!(token("Bearer  a.b.c "), Ok(Some("a.b.c".to_owned())));
        for none in ["bearer a.b.c", "Basic YTpi", "", "Bearera"] {
            assert_eq!(token(none), Ok(None), "{none:?}");
        }
        assert_eq!(bearer_token(&HeaderMap::new()), Ok(None));
    }

    #[test]
    fn exactly_one_word_must_follow_the_scheme() {
        for bad in ["Bearer", "Bearer a b"] {
            assert_eq!(token(bad), Err(Unauthenticated::MalformedHeader), "{bad:?}");
        }
    }
}
