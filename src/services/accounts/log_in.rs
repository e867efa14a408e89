//! Logging in and out, and refreshing.

use std::sync::Arc;
use std::time::Instant;

use tracing::Instrument;

use super::callers::{date_problem, session_hashes};
use super::{Accounts, refused};
use crate::credentials::login_rate_limiter::LoginRefused;
use crate::credentials::{LoginAttempt, SessionSecret, TokenType};
use crate::domain::account::canonical_username;
use crate::domain::{CLOCK_TOLERANCE, ClientNetwork, RevokedToken, Session, Timestamp, User};
use crate::error::{Error, TokenProblem, Unauthenticated};

/// A login.
pub struct LogIn {
    /// The name as given.
    pub username: String,
    /// The password as given.
    pub password: String,
    /// Whether to open a session too.
    pub wants_session: bool,
    /// The client's network: failed logins are counted by it.
    pub network: ClientNetwork,
}

/// The credentials that a login returns.
pub struct LoggedIn {
    /// The refresh token.
    pub refresh: String,
    /// The access token.
    pub access: String,
    /// The session's secret, if one was opened.
    pub session: Option<String>,
}

impl Accounts {
    /// Checks a name and password, and returns tokens, and a session if asked for.
    ///
    /// Once the attempt is admitted, the password is checked and the attempt counted even if this
    /// future is dropped. A client that disconnects before it is refused could otherwise guess
    /// without limit, and each guess would cost a hash.
    ///
    /// # Errors
    /// `WrongCredentials`, the same for an unknown name, a wrong password and a disabled account;
    /// `RateLimited` after too many failures; `Overloaded` if too many passwords are being hashed.
    pub async fn log_in(self: &Arc<Self>, request: LogIn) -> Result<LoggedIn, Error> {
        // A text that is too long for a name is handled like any other wrong name.
        let name = canonical_username(&request.username).unwrap_or_default();
        let attempt = Arc::clone(&self.login_limiter)
            .begin(request.network, &name, &Instant::now)
            .await
            .inspect_err(|_| self.count_failure("refused"))?;
        // The credentials get the time before the account is read. Hashing may wait in a queue, and
        // if the account is disabled or its password changed meanwhile, that must end them too.
        let asked = Timestamp::now();
        let wants_session = request.wants_session;
        let accounts = Arc::clone(self);
        let checking = async move { accounts.check_password(attempt, name, request).await };
        let user = self
            .tasks
            .spawn(checking.in_current_span())
            .await
            .map_err(Error::internal)??;
        let issued_at = user.token_date(asked);
        let session = if wants_session {
            Some(self.open_session(&user, asked).await?)
        } else {
            None
        };
        Ok(LoggedIn {
            refresh: self.token(TokenType::Refresh, Some(user.id), issued_at)?,
            access: self.token(TokenType::Access, Some(user.id), issued_at)?,
            session,
        })
    }

    /// The account with this name and password. Counts the attempt.
    async fn check_password(
        &self,
        attempt: LoginAttempt,
        name: String,
        request: LogIn,
    ) -> Result<User, Error> {
        let (password, network) = (request.password, request.network);
        let user = self.store.user_by_username(&name).await?;
        let stored = user.as_ref().map(|user| user.password_hash.clone());
        let verified = self
            .hash_pool
            .verify(password.clone(), stored, network)
            .await?;
        let Some(user) = user.filter(|user| verified.ok && user.is_active) else {
            attempt.failed(Instant::now());
            self.count_failure("wrong");
            return Err(Unauthenticated::WrongCredentials.into());
        };
        attempt.succeeded();
        if verified.needs_rehash {
            self.upgrade_hash(&user, password, network).await;
        }
        Ok(user)
    }

    fn count_failure(&self, reason: &str) {
        let failures = &self.metrics.login_failures;
        failures.with_label_values(&[reason]).inc();
    }

    /// A new access token for a valid refresh token, issued at `now`. The account is read from the
    /// store: a cached one from before a change of password would let a refresh token from before
    /// that change give new access tokens.
    ///
    /// # Errors
    /// `RefreshToken`, `NoUserId` or `RefreshUserInactive`.
    pub async fn refresh(&self, token: &str, now: Timestamp) -> Result<String, Error> {
        let claims = self
            .keys
            .verify(token, TokenType::Refresh, Some(now))
            .map_err(|error| refused(error, TokenType::Refresh))?;
        let issued_at = claims.issued_at.unwrap_or(Timestamp(0));
        let Some(user_id) = claims.user_id else {
            if issued_at > now.plus(CLOCK_TOLERANCE) {
                return Err(Unauthenticated::RefreshToken(TokenProblem::Invalid).into());
            }
            // As recorded of the replaced system: such a token is refreshed, and the new access
            // token is refused everywhere.
            return self.token(TokenType::Access, None, now);
        };
        let user = self.store.user(user_id).await?;
        let user = user
            .filter(|user| user.is_active)
            .ok_or(Unauthenticated::RefreshUserInactive)?;
        date_problem(&user, issued_at, now).map_err(Unauthenticated::RefreshToken)?;
        if self.store.is_token_revoked(&claims.jti).await? {
            return Err(Unauthenticated::RefreshToken(TokenProblem::Revoked).into());
        }
        self.token(TokenType::Access, Some(user_id), user.token_date(now))
    }

    /// A new access token for the first valid session among these cookies, issued at `now`.
    ///
    /// # Errors
    /// `RefreshToken` if none is valid, as for an invalid refresh token; `RefreshUserInactive`.
    pub async fn refresh_by_session(
        &self,
        cookies: &[&[u8]],
        now: Timestamp,
    ) -> Result<String, Error> {
        let mut refusal = Unauthenticated::RefreshToken(TokenProblem::Invalid);
        for session in self.live_sessions(cookies, now).await? {
            let user = self.store.user(session.user_id).await?;
            let Some(user) = user.filter(|user| user.is_active) else {
                refusal = Unauthenticated::RefreshUserInactive;
                continue;
            };
            if date_problem(&user, session.created_at, now).is_ok() {
                return self.token(TokenType::Access, Some(user.id), user.token_date(now));
            }
        }
        Err(refusal.into())
    }

    /// Ends a refresh token and the sessions of these cookies. Invalid ones are no error.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn log_out(&self, refresh: Option<&str>, cookies: &[&[u8]]) -> Result<(), Error> {
        let verify = |token| self.keys.verify(token, TokenType::Refresh, None);
        let claims = refresh.and_then(|token| verify(token).ok());
        let token = claims.map(|claims| RevokedToken {
            jti: claims.jti,
            expires_at: claims.expires_at,
        });
        let sessions = session_hashes(cookies);
        if token.is_some() || !sessions.is_empty() {
            self.store.log_out(&sessions, token).await?;
        }
        Ok(())
    }

    /// Opens a session for an account that was read at `asked` or later. The session is dated like
    /// the tokens: see [`User::token_date`].
    async fn open_session(&self, user: &User, asked: Timestamp) -> Result<String, Error> {
        let created_at = asked.max(user.tokens_valid_from);
        let secret = SessionSecret::random().map_err(Error::internal)?;
        let session = Session {
            token_hash: secret.hash(),
            user_id: user.id,
            created_at,
            expires_at: created_at.plus(self.config.refresh_token_lifetime),
        };
        self.store
            .create_session(session, self.config.max_sessions_per_user)
            .await?;
        Ok(secret.cookie_value())
    }

    /// Replaces a hash of an older kind. The login succeeds whether this works or not; the next one
    /// tries again.
    async fn upgrade_hash(&self, user: &User, password: String, network: ClientNetwork) {
        let upgraded: Result<(), Error> = async {
            let hash = self.hash_pool.hash(password, network).await?;
            self.store
                .upgrade_password_hash(user.id, &user.password_hash, &hash)
                .await?;
            Ok(())
        }
        .await;
        if let Err(error) = upgraded {
            tracing::warn!(%error, user_id = user.id.0, "a password hash could not be upgraded");
        }
    }
}

impl From<LoginRefused> for Error {
    fn from(refused: LoginRefused) -> Self {
        match refused {
            LoginRefused::TooMany { retry_after } => Self::RateLimited(retry_after),
            LoginRefused::Overloaded => Self::overloaded(),
        }
    }
}
