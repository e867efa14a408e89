//! Registration of accounts.

use super::Accounts;
use crate::config;
use crate::domain::account::{FieldError, NewAccount, USERNAME_TAKEN};
use crate::domain::{ClientNetwork, Timestamp, User};
use crate::error::Error;
use crate::store::{self, NewUser};

/// The fields of a registration, each a text or the message that says why there is none.
#[derive(Debug)]
pub struct Registration {
    /// The name.
    pub username: Result<String, &'static str>,
    /// The mail address.
    pub email: Result<String, &'static str>,
    /// The password.
    pub password: Result<String, &'static str>,
    /// The client's network: networks take turns in the hashing of passwords.
    pub network: ClientNetwork,
}

impl Accounts {
    /// Makes an account.
    ///
    /// # Errors
    /// `Forbidden` if registration is closed, `InvalidFields`, `Overloaded` if too many passwords
    /// are being hashed.
    pub async fn register(&self, new: Registration, now: Timestamp) -> Result<User, Error> {
        if self.config.registration == config::Registration::Closed {
            return Err(Error::Forbidden("Registration is closed."));
        }
        let [username, email, password] = [&new.username, &new.email, &new.password]
            .map(|field| field.as_deref().map_err(|message| *message));
        let account = NewAccount::parse(username, email, password).map_err(field_errors)?;
        let taken = || Error::field("username", USERNAME_TAKEN);
        // Checked before the password is hashed, because hashing is expensive.
        if self
            .store
            .user_by_username(account.username.as_str())
            .await?
            .is_some()
        {
            return Err(taken());
        }
        let password_hash = self
            .hash_pool
            .hash(account.password.as_str().to_owned(), new.network)
            .await?;
        let user = NewUser {
            username: account.username.as_str().to_owned(),
            email: account.email.as_str().to_owned(),
            password_hash,
            created_at: now,
        };
        match self.store.create_user(user).await {
            Err(store::Error::UsernameTaken) => Err(taken()),
            created => Ok(created?),
        }
    }
}

fn field_errors(errors: Vec<FieldError>) -> Error {
    let owned = |error: FieldError| {
        (
            error.field,
            error.messages.into_iter().map(str::to_owned).collect(),
        )
    };
    Error::InvalidFields(errors.into_iter().map(owned).collect())
}
