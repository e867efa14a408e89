//! Accounts.

use std::fmt;
use std::time::Duration;

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

impl User {
    /// The date of a token that is given by this state of the account, which was read no earlier than `asked`.
    ///
    /// It is no later than `asked`, so that a change which the reading missed ends the token, but for one that follows a change within
    /// a second: a token says only the second it was made in, and must not look older than the change it follows.
    pub fn token_date(&self, asked: Timestamp) -> Timestamp {
        asked.max(self.tokens_valid_from.second_from())
    }

    /// The `tokens_valid_from` of a change made at `now`: it ends every token that this state of the account has given.
    pub fn end_of_tokens(&self, now: Timestamp) -> Timestamp {
        let latest = self.tokens_valid_from.second_from();
        now.max(latest.plus(Duration::from_micros(1)))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn user(tokens_valid_from: i64) -> User {
        User {
            id: UserId(1),
            username: String::new(),
            email: String::new(),
            password_hash: String::new(),
            is_active: true,
            tokens_valid_from: Timestamp(tokens_valid_from),
            created_at: Timestamp(0),
        }
    }

    #[test]
    fn a_token_made_right_after_a_change_is_not_older_than_it() {
        let changed = user(10_400_000);
        assert_eq!(
            changed.token_date(Timestamp(10_500_000)),
            Timestamp(11_000_000)
        );
        assert_eq!(
            changed.token_date(Timestamp(20_000_000)),
            Timestamp(20_000_000)
        );
    }

    #[test]
    fn a_change_ends_also_the_tokens_made_right_after_the_change_before() {
        let changed = user(10_400_000);
        let token = changed.token_date(Timestamp(10_500_000));
        assert!(token < changed.end_of_tokens(Timestamp(10_600_000)));
        assert_eq!(
            changed.end_of_tokens(Timestamp(20_000_000)),
            Timestamp(20_000_000)
        );
    }
}
