//! Registering, logging in and out, and authentication by all kinds of credentials.

mod callers;
mod known_users;
mod log_in;
mod registration;

use std::sync::Arc;

use tokio_util::task::TaskTracker;

use crate::config;
use crate::credentials::{
    HashPool, Keys, LoginRateLimiter, Tickets, TokenError, TokenId, TokenType, hash_pool,
};
use crate::domain::{Timestamp, UserId};
use crate::error::{Error, TokenProblem, Unauthenticated};
use crate::services::api_keys::ApiKeys;
use crate::store::AccountStore;
use crate::telemetry::Metrics;

pub use crate::credentials::tickets::TICKET_LIFETIME;

pub use self::callers::{Caller, CredentialEnd};
pub use self::known_users::KnownUsers;
pub use self::log_in::{LogIn, LoggedIn};
pub use self::registration::Registration;

/// The use cases of accounts.
pub struct Accounts {
    /// Where accounts, sessions and revoked tokens are.
    pub store: Arc<dyn AccountStore>,
    /// Hashes and compares passwords.
    pub hash_pool: HashPool,
    /// Slows guessing down.
    pub login_limiter: Arc<dyn LoginRateLimiter>,
    /// Keeps the tickets.
    pub tickets: Arc<dyn Tickets>,
    /// Sign and verify tokens.
    pub keys: Keys,
    /// Accounts that were read lately.
    pub known: KnownUsers,
    /// API keys, which authenticate their users too.
    pub api_keys: Arc<ApiKeys>,
    /// Lifetimes and limits.
    pub config: config::AccountsConfig,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// Tasks that must finish before the process ends.
    pub tasks: TaskTracker,
}

impl Accounts {
    fn token(
        &self,
        kind: TokenType,
        user_id: Option<UserId>,
        issued_at: Timestamp,
    ) -> Result<String, Error> {
        let lifetime = match kind {
            TokenType::Access => self.config.access_token_lifetime,
            TokenType::Refresh => self.config.refresh_token_lifetime,
        };
        let id = TokenId::random().map_err(Error::internal)?;
        Ok(self.keys.sign(kind, user_id, id, issued_at, lifetime))
    }
}

fn refused(error: TokenError, kind: TokenType) -> Error {
    let problem = match error {
        TokenError::Invalid => TokenProblem::Invalid,
        TokenError::Expired => TokenProblem::Expired,
        TokenError::NoExpiry => TokenProblem::NoExpiry,
        TokenError::NoId => TokenProblem::NoId,
        TokenError::NoType => TokenProblem::NoType,
        TokenError::WrongType => TokenProblem::WrongType,
        TokenError::NoUser => return Unauthenticated::NoUserId.into(),
    };
    match kind {
        TokenType::Access => Unauthenticated::AccessToken(problem).into(),
        TokenType::Refresh => Unauthenticated::RefreshToken(problem).into(),
    }
}

impl From<hash_pool::Error> for Error {
    fn from(error: hash_pool::Error) -> Self {
        match error {
            hash_pool::Error::Overloaded => Self::overloaded(),
            hash_pool::Error::Stopped => Self::unavailable(error),
            hash_pool::Error::MalformedHash(_) | hash_pool::Error::Randomness(_) => {
                Self::internal(error)
            }
        }
    }
}
