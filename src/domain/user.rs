//! Accounts.

use std::fmt;

use super::{Timestamp, UserId};

/// An account as the store keeps it. Its `Debug` form hides the password's hash.
#[derive(Clone, PartialEq, Eq)]
pub struct User {
    /// Identifies the account.
    pub id: UserId,
    /// Unique, case-sensitive, NFKC-normalised, 1 to 150 characters.
    pub username: String,
    /// As given at registration; need not be unique.
    pub email: String,
    /// A PHC string (`$argon2id$…`) or an imported Django hash (`pbkdf2_sha256$…`). Never leaves the process.
    pub password_hash: String,
    /// A disabled account can neither log in nor use what it was given before.
    pub is_active: bool,
    /// Tokens and sessions issued before this instant are refused: set when the password changes or the account is disabled.
    pub tokens_valid_from: Timestamp,
    /// When the account was made.
    pub created_at: Timestamp,
}

impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("User")
            .field("id", &self.id)
            .field("is_active", &self.is_active)
            .field("tokens_valid_from", &self.tokens_valid_from)
            .finish_non_exhaustive()
    }
}
