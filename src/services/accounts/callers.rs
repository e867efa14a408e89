//! Authentication: the account that a credential belongs to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::known_users::MAX_AGE;
use super::{Accounts, refused};
use crate::credentials::tickets;
use crate::credentials::{Grant, SessionSecret, TokenType};
use crate::domain::{ApiKey, CredentialState, Scope, Session, Timestamp, User, UserId};
use crate::error::{ApiKeyProblem, Error, TokenProblem, Unauthenticated};
use crate::realtime::Listener;
use crate::services::api_keys::{VerifiedApiKey, is_api_key};

/// How often the account is checked while a long response is sent. With the two seconds for which
/// accounts are cached this stays below the 5 seconds within which a change must take effect.
const CHECK_EVERY: Duration = Duration::from_secs(2);
/// How old an account may be that is behind an API key, and how often a key is checked while a long
/// response is sent. The contract allows 2 s for both together.
const KEY_MAX_AGE: Duration = Duration::from_secs(1);

/// Why a credential is no longer valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CredentialEnd {
    /// It has expired. Its owner may get another.
    Expired,
    /// The account was deleted or disabled, its password changed, or the API key was revoked.
    Revoked,
}

impl CredentialEnd {
    /// What a request with that credential of `caller` is told from now on.
    pub fn problem(self, caller: &Caller) -> Unauthenticated {
        match (self, &caller.key) {
            (Self::Expired, None) => Unauthenticated::AccessToken(TokenProblem::Expired),
            (Self::Revoked, None) => Unauthenticated::AccessToken(TokenProblem::Revoked),
            (Self::Expired, Some(_)) => Unauthenticated::ApiKey(ApiKeyProblem::Expired),
            (Self::Revoked, Some(_)) => Unauthenticated::ApiKey(ApiKeyProblem::Revoked),
        }
    }
}

/// The authenticated caller, and how long its credential is valid.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The account, at most two seconds old.
    pub user: Arc<User>,
    /// When the credential was issued.
    pub issued_at: Timestamp,
    /// When the credential expires.
    pub expires_at: Timestamp,
    /// The session, if the credential is one: SHA-256 of its secret.
    session: Option<[u8; 32]>,
    /// The API key, if the credential is one.
    key: Option<VerifiedApiKey>,
}

impl Caller {
    /// The account's id.
    pub fn user_id(&self) -> UserId {
        self.user.id
    }

    /// The API key by which the caller is authenticated; `None` for an access token, a session or a
    /// ticket.
    pub fn api_key(&self) -> Option<&Arc<ApiKey>> {
        self.key.as_ref().map(|verified| &verified.key)
    }

    /// Whether the credential may be used for this. Only API keys have fewer than all scopes.
    pub fn has_scope(&self, scope: Scope) -> bool {
        self.api_key().is_none_or(|key| key.scopes.contains(scope))
    }

    /// Whether the credential may be used with the model of that name. Only API keys have
    /// restrictions.
    pub fn may_use_model(&self, name: &str) -> bool {
        self.api_key().is_none_or(|key| key.allows_model(name))
    }

    /// The credential of a socket that this caller opens.
    pub fn listener(&self) -> Listener {
        Listener {
            user_id: self.user_id(),
            issued_at: self.issued_at,
            session: self.session,
        }
    }
}

impl Accounts {
    /// The caller with this access token.
    ///
    /// # Errors
    /// `AccessToken`, `NoUserId`, `UserNotFound` or `UserInactive`.
    pub async fn authenticate(&self, token: &str, now: Timestamp) -> Result<Caller, Error> {
        let verified = self.keys.verify(token, TokenType::Access, Some(now));
        let (claims, user_id) = verified
            .and_then(|claims| claims.user().map(|user_id| (claims, user_id)))
            .map_err(|error| refused(error, TokenType::Access))?;
        let issued_at = claims.issued_at.unwrap_or(Timestamp(0));
        let user = self
            .holder(user_id, issued_at, now, Unauthenticated::AccessToken)
            .await?;
        Ok(Caller {
            user,
            issued_at,
            expires_at: claims.expires_at,
            session: None,
            key: None,
        })
    }

    /// The caller with this bearer token: an access token or an API key.
    ///
    /// # Errors
    /// `AccessToken`, `ApiKey`, `NoUserId`, `UserNotFound` or `UserInactive`.
    pub async fn authenticate_bearer(&self, token: &str, now: Timestamp) -> Result<Caller, Error> {
        if !is_api_key(token) {
            return self.authenticate(token, now).await;
        }
        let verified = self.api_keys.authenticate(token, now).await?;
        let user = self.key_holder(verified.key.user_id).await?;
        self.api_keys.note_use(&verified.key, now);
        Ok(Caller {
            user,
            issued_at: verified.key.created_at,
            expires_at: verified.expires_at,
            session: None,
            key: Some(verified),
        })
    }

    /// The active account behind an API key. A change of its password leaves its keys alone.
    ///
    /// # Errors
    /// `UserNotFound` or `UserInactive`.
    async fn key_holder(&self, id: UserId) -> Result<Arc<User>, Error> {
        self.active_user(id, KEY_MAX_AGE).await
    }

    /// The caller with one of these session cookies. The first valid one counts: another site of
    /// the same domain may have set others.
    ///
    /// # Errors
    /// `SpentCredential` if none is valid, or `UserNotFound` or `UserInactive` if that is the
    /// reason.
    pub async fn authenticate_session(
        &self,
        cookies: &[&[u8]],
        now: Timestamp,
    ) -> Result<Caller, Error> {
        let spent = |_| Unauthenticated::SpentCredential;
        let mut refusal = Unauthenticated::SpentCredential;
        for session in self.live_sessions(cookies, now).await? {
            let holder = self.holder(session.user_id, session.created_at, now, spent);
            match holder.await {
                Ok(user) => {
                    return Ok(Caller {
                        user,
                        issued_at: session.created_at,
                        expires_at: session.expires_at,
                        session: Some(session.token_hash),
                        key: None,
                    });
                }
                Err(Error::Unauthenticated(why)) => refusal = why,
                Err(error) => return Err(error),
            }
        }
        Err(refusal.into())
    }

    /// The sessions of these cookies that are stored and have not expired, in the order of the
    /// cookies.
    pub(super) async fn live_sessions(
        &self,
        cookies: &[&[u8]],
        now: Timestamp,
    ) -> Result<Vec<Session>, Error> {
        let hashes = session_hashes(cookies);
        if hashes.is_empty() {
            return Ok(Vec::new());
        }
        let mut stored = self.store.sessions(&hashes).await?;
        stored.retain(|session| now < session.expires_at);
        stored.sort_by_key(|session| hashes.iter().position(|hash| *hash == session.token_hash));
        Ok(stored)
    }

    /// A ticket for one WebSocket of `caller`. The socket ends when the caller's own credential
    /// expires.
    ///
    /// # Errors
    /// `Unavailable` if the tickets' backend is.
    pub async fn issue_ticket(&self, caller: &Caller) -> Result<String, Error> {
        let grant = Grant {
            user_id: caller.user_id(),
            issued_at: Some(caller.issued_at),
            expires_at: caller.expires_at,
        };
        Ok(self.tickets.issue(grant, Timestamp::now()).await?)
    }

    /// The caller with this ticket. The ticket cannot be used again.
    ///
    /// # Errors
    /// `SpentCredential`, `UserNotFound` or `UserInactive`; `Unavailable` if the tickets' backend
    /// is.
    pub async fn redeem_ticket(&self, ticket: &str, now: Timestamp) -> Result<Caller, Error> {
        let grant = self
            .tickets
            .take(ticket, now)
            .await?
            .filter(|grant| now < grant.expires_at)
            .ok_or(Unauthenticated::SpentCredential)?;
        let issued_at = grant.issued_at.unwrap_or(Timestamp(0));
        let user = self
            .holder(grant.user_id, issued_at, now, |_| {
                Unauthenticated::SpentCredential
            })
            .await?;
        Ok(Caller {
            user,
            issued_at,
            expires_at: grant.expires_at,
            session: None,
            key: None,
        })
    }

    /// Waits until the credential of `caller` is no longer valid. An unavailable store ends none.
    /// Cancel safe.
    pub async fn credential_end(&self, caller: &Caller) -> CredentialEnd {
        let check_every = match caller.key {
            Some(_) => KEY_MAX_AGE,
            None => CHECK_EVERY,
        };
        loop {
            let left = caller.expires_at.since(Timestamp::now());
            if left.is_zero() {
                return CredentialEnd::Expired;
            }
            tokio::time::sleep(left.min(check_every)).await;
            match self.check_again(caller, Timestamp::now()).await {
                Err(Error::Unauthenticated(Unauthenticated::ApiKey(ApiKeyProblem::Expired))) => {
                    return CredentialEnd::Expired;
                }
                Err(Error::Unauthenticated(_)) => return CredentialEnd::Revoked,
                Ok(()) | Err(_) => {}
            }
        }
    }

    /// Checks that the credential of a caller is still valid, apart from its own expiry.
    async fn check_again(&self, caller: &Caller, now: Timestamp) -> Result<(), Error> {
        let holder = match &caller.key {
            Some(VerifiedApiKey { key, key_hash, .. }) => {
                self.api_keys.verify(key.id, *key_hash, now).await?;
                self.key_holder(caller.user_id()).await
            }
            None => {
                let (id, issued_at) = (caller.user_id(), caller.issued_at);
                let refusal = Unauthenticated::AccessToken;
                self.holder(id, issued_at, now, refusal).await
            }
        };
        holder.map(drop)
    }

    /// The account of a credential issued at `issued_at`.
    ///
    /// # Errors
    /// `UserNotFound` or `UserInactive`; what `refusal` makes of an invalid date.
    async fn holder(
        &self,
        id: UserId,
        issued_at: Timestamp,
        now: Timestamp,
        refusal: fn(TokenProblem) -> Unauthenticated,
    ) -> Result<Arc<User>, Error> {
        let mut user = self.active_user(id, MAX_AGE).await?;
        if user.credential_state(issued_at, now) == CredentialState::FromTheFuture {
            // A credential given right after a change of the account is dated ahead of the clock,
            // and the cached account may be from before that change.
            self.known.forget(id);
            user = self.active_user(id, MAX_AGE).await?;
        }
        date_problem(&user, issued_at, now).map_err(refusal)?;
        Ok(user)
    }

    /// The account, no older than that.
    ///
    /// # Errors
    /// `UserNotFound` or `UserInactive`.
    async fn active_user(&self, id: UserId, max_age: Duration) -> Result<Arc<User>, Error> {
        let known = self.known.get(id, max_age, &*self.store, Instant::now());
        let user = known.await?;
        let user = user.ok_or(Unauthenticated::UserNotFound)?;
        if user.is_active {
            Ok(user)
        } else {
            Err(Unauthenticated::UserInactive.into())
        }
    }
}

/// Checks the date of a credential of `user`.
///
/// # Errors
/// `Revoked` or `Invalid`.
pub(super) fn date_problem(
    user: &User,
    issued_at: Timestamp,
    now: Timestamp,
) -> Result<(), TokenProblem> {
    match user.credential_state(issued_at, now) {
        CredentialState::Current => Ok(()),
        CredentialState::Ended => Err(TokenProblem::Revoked),
        CredentialState::FromTheFuture => Err(TokenProblem::Invalid),
    }
}

/// The hashes under which the store has the sessions of these cookies.
pub(super) fn session_hashes(cookies: &[&[u8]]) -> Vec<[u8; 32]> {
    let secrets = cookies
        .iter()
        .filter_map(|cookie| SessionSecret::from_cookie(cookie));
    secrets.map(|secret| secret.hash()).collect()
}

impl From<tickets::Error> for Error {
    fn from(error: tickets::Error) -> Self {
        Self::unavailable(error)
    }
}
