//! Telling who a credential belongs to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Accounts, refused};
use crate::credentials::tickets::{self, TICKET_LIFETIME};
use crate::credentials::{Grant, SessionSecret, TokenType};
use crate::domain::{Timestamp, User, UserId};
use crate::error::{Error, TokenProblem, Unauthenticated};
use crate::realtime::Listener;

/// A pass for one WebSocket.
pub struct NewTicket {
    /// Shown once, in place of a token.
    pub secret: String,
    /// How long it may be used.
    pub expires_in: Duration,
}

/// Who calls, and how long that may be believed.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The account, as of a moment ago.
    user: Arc<User>,
    /// When the credential was issued.
    pub issued_at: Timestamp,
    /// When it ends.
    pub expires_at: Timestamp,
    /// The session behind it, if it is one: SHA-256 of the secret.
    session: Option<[u8; 32]>,
}

impl Caller {
    /// The account's id.
    pub fn user_id(&self) -> UserId {
        self.user.id
    }

    /// The account's name.
    pub fn username(&self) -> &str {
        &self.user.username
    }

    /// The account's address.
    pub fn email(&self) -> &str {
        &self.user.email
    }

    /// What stands behind a socket that this caller opens.
    pub fn listener(&self) -> Listener {
        Listener {
            user_id: self.user_id(),
            issued_at: self.issued_at,
            session: self.session,
        }
    }
}

impl Accounts {
    /// Who an access token belongs to.
    ///
    /// # Errors
    /// `AccessToken`, `NoUserId`, `UserNotFound` or `UserInactive`.
    pub async fn authenticate(&self, token: &str, now: Timestamp) -> Result<Caller, Error> {
        let claims = self
            .keys
            .verify(token, TokenType::Access, now)
            .map_err(|error| refused(error, TokenType::Access))?;
        let user_id = claims
            .user()
            .map_err(|error| refused(error, TokenType::Access))?;
        let issued_at = claims.issued_at.unwrap_or(Timestamp(0));
        let caller = self
            .caller(user_id, issued_at, claims.expires_at, None)
            .await?;
        caller.ok_or_else(|| Unauthenticated::AccessToken(TokenProblem::Revoked).into())
    }

    /// Who a session cookie belongs to.
    ///
    /// # Errors
    /// `SpentCredential`, `UserNotFound` or `UserInactive`.
    pub async fn authenticate_session(
        &self,
        cookie: &str,
        now: Timestamp,
    ) -> Result<Caller, Error> {
        let spent = || Error::from(Unauthenticated::SpentCredential);
        let hash = SessionSecret::from_cookie(cookie).ok_or_else(spent)?.hash();
        let session = self
            .store
            .session(&hash)
            .await?
            .filter(|session| now < session.expires_at)
            .ok_or_else(spent)?;
        let caller = self
            .caller(
                session.user_id,
                session.created_at,
                session.expires_at,
                Some(hash),
            )
            .await?;
        caller.ok_or_else(spent)
    }

    /// A pass for one WebSocket of `caller`, which ends when the caller's own credential does.
    ///
    /// # Errors
    /// `Unavailable` if the keeper of tickets is away.
    pub async fn issue_ticket(&self, caller: &Caller) -> Result<NewTicket, Error> {
        let grant = Grant {
            user_id: caller.user_id(),
            issued_at: Some(caller.issued_at),
            expires_at: caller.expires_at,
        };
        let secret = self.tickets.issue(grant, Timestamp::now()).await?;
        Ok(NewTicket {
            secret,
            expires_in: TICKET_LIFETIME,
        })
    }

    /// Who a ticket belongs to; it is used up by asking.
    ///
    /// # Errors
    /// `SpentCredential`, `UserNotFound` or `UserInactive`; `Unavailable` if the keeper of tickets is away.
    pub async fn redeem_ticket(&self, ticket: &str, now: Timestamp) -> Result<Caller, Error> {
        let spent = || Error::from(Unauthenticated::SpentCredential);
        let grant = self
            .tickets
            .take(ticket, now)
            .await?
            .filter(|grant| now < grant.expires_at)
            .ok_or_else(spent)?;
        let issued_at = grant.issued_at.unwrap_or(Timestamp(0));
        let caller = self
            .caller(grant.user_id, issued_at, grant.expires_at, None)
            .await?;
        caller.ok_or_else(spent)
    }

    /// The caller behind a credential whose own terms hold; `None` if it was issued before the account's `tokens_valid_from`.
    async fn caller(
        &self,
        user_id: UserId,
        issued_at: Timestamp,
        expires_at: Timestamp,
        session: Option<[u8; 32]>,
    ) -> Result<Option<Caller>, Error> {
        let user = self
            .known
            .get(user_id, &*self.store, Instant::now())
            .await?;
        let user = user.ok_or(Unauthenticated::UserNotFound)?;
        if !user.is_active {
            return Err(Unauthenticated::UserInactive.into());
        }
        Ok((issued_at >= user.tokens_valid_from).then_some(Caller {
            user,
            issued_at,
            expires_at,
            session,
        }))
    }
}

impl From<tickets::Error> for Error {
    fn from(error: tickets::Error) -> Self {
        Self::unavailable(error)
    }
}
