//! The transport-free error: why a use case cannot do what it is asked.
//!
//! Each capability has an error type, which is converted into this one. Only `api` turns these into
//! status codes.

use std::time::Duration;

use crate::domain::{FailureCode, Prompt, PromptId, Scope};
use crate::fair_semaphore::Full;
use crate::memory_budget::Exhausted;

/// Messages by field, in the order in which the fields were checked.
pub type FieldErrors = Vec<(&'static str, Vec<String>)>;

/// A source error of any kind, kept for the log and never sent.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// The caller's situation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such thing, or it is somebody else's.
    #[error("not found")]
    NotFound,
    /// Fields of the request break their rules.
    #[error("invalid fields")]
    InvalidFields(FieldErrors),
    /// The request as a whole cannot be used; the text says why and never quotes the input.
    #[error("invalid request: {0}")]
    InvalidRequest(&'static str),
    /// The caller is not authenticated.
    #[error("unauthenticated")]
    Unauthenticated(Unauthenticated),
    /// The caller is known, or need not be, and may not do this.
    #[error("forbidden: {0}")]
    Forbidden(&'static str),
    /// Too many requests; the wait after which one succeeds.
    #[error("rate limited")]
    RateLimited(Duration),
    /// Too much work is waiting already; when to try again.
    #[error("overloaded")]
    Overloaded(Duration),
    /// The prompt was taken and has no answer; it is kept.
    #[error("the prompt failed: {}", .0.code.as_str())]
    Failed(FailedPrompt),
    /// The upstream refuses a chat request, which its caller can mend.
    #[error("the upstream refuses the request")]
    Refused(Box<Refusal>),
    /// No upstream serves the model.
    #[error("no upstream serves the model")]
    ModelNotFound,
    /// The request cannot be served because of its idempotency key.
    #[error("idempotency key: {0:?}")]
    IdempotencyKey(KeyProblem),
    /// The user keeps as many prompts as the operator allows; deleting some helps.
    #[error("the user keeps as many prompts as allowed")]
    QuotaExceeded,
    /// The user has as many live API keys as allowed; revoking one helps.
    #[error("the user has as many live API keys as allowed")]
    TooManyApiKeys,
    /// The API key may not be used for this.
    #[error("the API key has no permission for this")]
    Scope(ScopeProblem),
    /// The call may cost more than is left of a budget. It helps to wait for the next period, or to
    /// ask for less.
    #[error("the call may cost more than is left of a budget")]
    BudgetExceeded,
    /// A budget is in force, and the price of the model, or the most that the call can cost, is not
    /// known. A price helps.
    #[error("a budget is in force, and the most that the call can cost is not known")]
    PriceUnknown,
    /// The prompt was deleted while it was being answered.
    #[error("deleted meanwhile")]
    Deleted,
    /// A dependency of this service is unavailable; trying again later helps.
    #[error("unavailable")]
    Unavailable(#[source] Source),
    /// A defect.
    #[error("internal error")]
    Internal(#[source] Source),
}

/// A prompt that has no answer, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailedPrompt {
    /// Which.
    pub id: PromptId,
    /// Why, for programs.
    pub code: FailureCode,
    /// Why, for humans.
    pub detail: &'static str,
    /// When trying again makes sense, where that is known.
    pub retry_after: Option<Duration>,
}

impl FailedPrompt {
    /// The failure of a stored prompt.
    pub fn of(prompt: &Prompt) -> Self {
        // Every failed prompt has a code, unless another program has written its row.
        let code = prompt.error.unwrap_or(FailureCode::Internal);
        Self {
            id: prompt.id,
            code,
            detail: code.detail(),
            retry_after: None,
        }
    }
}

/// What an upstream says is wrong with a chat request. It may repeat parts of the request, so it is
/// for the caller alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status, a 4xx.
    pub status: u16,
    /// For humans.
    pub message: String,
    /// The kind of error, in OpenAI's words.
    pub error_type: Option<String>,
    /// The member of the request that is wrong.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<String>,
    /// When trying again makes sense, where that is known.
    pub retry_after: Option<Duration>,
}

/// Why a request with an idempotency key is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyProblem {
    /// The first request with the key is still being answered.
    InFlight,
    /// The key was used for a request of another meaning.
    OtherRequest,
    /// The first request's prompt was deleted.
    Deleted,
}

/// Why an API key may not be used for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScopeProblem {
    /// It lacks this scope.
    Lacks(Scope),
    /// No API key can be used for such a request, whatever its scopes.
    NoKeys,
}

/// Why a caller is not authenticated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unauthenticated {
    /// No credentials, or of a kind that the route does not accept.
    NotProvided,
    /// An `Authorization: Bearer` header that is not two words.
    MalformedHeader,
    /// An invalid access token; why.
    AccessToken(TokenProblem),
    /// An API key that cannot be used; why.
    ApiKey(ApiKeyProblem),
    /// An invalid refresh token; why.
    RefreshToken(TokenProblem),
    /// A valid access token without a usable `user_id`.
    NoUserId,
    /// The token's account was deleted.
    UserNotFound,
    /// The token's account is disabled.
    UserInactive,
    /// The refresh token's account was deleted or disabled.
    RefreshUserInactive,
    /// Wrong name or password, or a disabled account.
    WrongCredentials,
    /// An invalid session cookie or ticket.
    SpentCredential,
}

/// The problem of an API key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApiKeyProblem {
    /// Malformed, or never given out.
    Invalid,
    /// Past its `expires_at`, or replaced by a rotation whose grace is over.
    Expired,
    /// Revoked by its user or by the operator.
    Revoked,
}

/// The problem of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenProblem {
    /// Malformed, of another algorithm, or not signed by a key of this service.
    Invalid,
    /// Past its `exp`.
    Expired,
    /// No `exp` claim.
    NoExpiry,
    /// No `token_type` claim.
    NoType,
    /// Of another type than expected.
    WrongType,
    /// No `jti` claim.
    NoId,
    /// Ended before it expired: logged out, or the password changed.
    Revoked,
}

impl Error {
    /// Wraps a defect.
    pub fn internal(source: impl Into<Source>) -> Self {
        Self::Internal(source.into())
    }

    /// Wraps an outage.
    pub fn unavailable(source: impl Into<Source>) -> Self {
        Self::Unavailable(source.into())
    }

    /// Too much work is waiting. It is done in about a second.
    pub fn overloaded() -> Self {
        Self::Overloaded(Duration::from_secs(1))
    }

    /// One field, one message.
    pub fn field(name: &'static str, message: impl Into<String>) -> Self {
        Self::InvalidFields(vec![(name, vec![message.into()])])
    }
}

impl From<Exhausted> for Error {
    /// Memory becomes free within seconds, when clients have read their responses.
    fn from(_: Exhausted) -> Self {
        Self::overloaded()
    }
}

impl From<Full> for Error {
    fn from(_: Full) -> Self {
        Self::overloaded()
    }
}

impl From<Unauthenticated> for Error {
    fn from(why: Unauthenticated) -> Self {
        Self::Unauthenticated(why)
    }
}
