//! Accounts.

use std::fmt;
use std::time::Duration;

use super::{Timestamp, UserId};

/// How far the clocks may differ that credentials are dated and judged by: those of replicas, of
/// the machine on which the operator's commands run, and of services that sign with the same key.
/// Clocks that are kept by NTP differ by milliseconds. A credential is refused until its date is no
/// further ahead than this.
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(3);

/// What the date of a credential says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CredentialState {
    /// The credential counts.
    Current,
    /// It was given before a change that ended all earlier ones.
    Ended,
    /// It is dated later than anything that could have been given by now.
    FromTheFuture,
}

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

    /// The `tokens_valid_from` of a change made at `now`. It ends every token that this state of
    /// the account has given, also by a clock that is ahead of `now` by [`CLOCK_TOLERANCE`].
    pub fn end_of_tokens(&self, now: Timestamp) -> Timestamp {
        let latest = self.token_date(now.plus(CLOCK_TOLERANCE));
        latest.plus(Duration::from_micros(1))
    }

    /// Whether a token or session dated `issued_at` counts at `now`.
    ///
    /// A credential from the future would outlive the next change of password. What is too far
    /// ahead is told by the date that a token would have now: after a change that is a few seconds
    /// ahead of the clock, and after a change made by a wrong clock any time.
    pub fn credential_state(&self, issued_at: Timestamp, now: Timestamp) -> CredentialState {
        if issued_at < self.tokens_valid_from {
            CredentialState::Ended
        } else if issued_at > self.token_date(now).plus(CLOCK_TOLERANCE) {
            CredentialState::FromTheFuture
        } else {
            CredentialState::Current
        }
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
        let ahead = user(90_400_000);
        let token = ahead.token_date(Timestamp(10_500_000));
        assert!(token < ahead.end_of_tokens(Timestamp(10_600_000)));
    }

    #[test]
    fn a_change_ends_the_tokens_of_clocks_that_are_a_little_ahead() {
        let now = Timestamp(20_000_000);
        let before = user(10_400_000);
        let ahead = before.token_date(now.plus(CLOCK_TOLERANCE));
        assert_eq!(
            before.credential_state(ahead, now),
            CredentialState::Current
        );
        let changed = user(before.end_of_tokens(now).0);
        for later in [0, 1, 2, 3, 4, 5, 600] {
            let later = now.plus(Duration::from_secs(later));
            assert_eq!(
                changed.credential_state(ahead, later),
                CredentialState::Ended
            );
        }
    }

    #[test]
    fn what_is_given_after_a_change_counts_at_once_on_every_clock() {
        let now = Timestamp(20_300_000);
        let changed = user(user(0).end_of_tokens(now).0);
        let behind = Timestamp(now.0 - 3_000_000);
        for given_at in [behind, now, now.plus(CLOCK_TOLERANCE)] {
            let token = changed.token_date(given_at).unix_seconds();
            let token = Timestamp::from_unix_seconds(token);
            for asked_at in [behind, now, now.plus(CLOCK_TOLERANCE)] {
                assert_eq!(
                    changed.credential_state(token, asked_at),
                    CredentialState::Current
                );
            }
        }
    }

    #[test]
    fn a_token_from_the_future_does_not_count_until_it_could_have_been_given() {
        let now = Timestamp(20_000_000);
        let account = user(0);
        let in_seconds =
            |seconds| account.credential_state(now.plus(Duration::from_secs(seconds)), now);
        assert_eq!(in_seconds(3), CredentialState::Current);
        for seconds in [4, 600, 86_400, u64::MAX] {
            assert_eq!(in_seconds(seconds), CredentialState::FromTheFuture);
        }
    }

    #[test]
    fn a_change_made_by_a_clock_far_ahead_locks_nobody_out() {
        let now = Timestamp(20_000_000);
        let changed = user(now.plus(Duration::from_secs(172_800)).0);
        let token = changed.token_date(now);
        assert_eq!(
            changed.credential_state(token, now),
            CredentialState::Current
        );
        assert_eq!(changed.credential_state(now, now), CredentialState::Ended);
    }
}
