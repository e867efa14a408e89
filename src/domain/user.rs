//! Accounts.

use std::fmt;
use std::time::Duration;

use super::{Timestamp, UserId};

/// How far clocks may differ that date and check credentials: those of replicas, of the machine on
/// which the operator's commands run, and of services that sign with the same key. Clocks that are
/// kept by NTP differ by milliseconds. A credential is refused until its date is no further in the
/// future than this.
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(3);

/// What the date of a credential means for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CredentialState {
    /// The credential is valid.
    Current,
    /// It was issued before a change that ended all earlier ones.
    Ended,
    /// Its date is later than that of any credential that can have been issued by now.
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
    /// A PHC string (`$argon2id$…`) or an imported Django hash (`pbkdf2_sha256$…`). Never leaves
    /// the process.
    pub password_hash: String,
    /// A disabled account can neither log in nor use its earlier credentials.
    pub is_active: bool,
    /// Tokens and sessions issued before this instant are refused: set when the password changes or
    /// the account is disabled.
    pub tokens_valid_from: Timestamp,
    /// When the account was created.
    pub created_at: Timestamp,
}

impl User {
    /// The date for a token of this state of the account, which was read no earlier than `asked`.
    ///
    /// The date is `asked` at the latest, so that a change which the reading missed ends the token.
    /// The exception is a token issued within a second after a change: a token states only the
    /// second of its issue, and must not look older than the change before it.
    pub fn token_date(&self, asked: Timestamp) -> Timestamp {
        asked.max(self.tokens_valid_from.second_from())
    }

    /// The `tokens_valid_from` of a change made at `now`. It ends every token that was issued for
    /// this state of the account, also by a clock that is ahead of `now` by [`CLOCK_TOLERANCE`].
    pub fn end_of_tokens(&self, now: Timestamp) -> Timestamp {
        let latest = self.token_date(now.plus(CLOCK_TOLERANCE));
        latest.plus(Duration::from_micros(1))
    }

    /// Whether a token or session dated `issued_at` is valid at `now`.
    ///
    /// A credential from the future would stay valid after the next change of password. How far
    /// ahead is too far is measured from the date that a token would get now: after a change that
    /// is a few seconds ahead of the clock, and after a change at any time made by a wrong clock.
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
    fn token_issued_right_after_a_change_is_not_older_than_the_change() {
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
    fn change_also_ends_tokens_issued_right_after_the_previous_change() {
        let changed = user(10_400_000);
        let token = changed.token_date(Timestamp(10_500_000));
        assert!(token < changed.end_of_tokens(Timestamp(10_600_000)));
        let ahead = user(90_400_000);
        let token = ahead.token_date(Timestamp(10_500_000));
        assert!(token < ahead.end_of_tokens(Timestamp(10_600_000)));
    }

    #[test]
    fn change_ends_tokens_of_clocks_that_are_a_little_ahead() {
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
    fn token_issued_after_a_change_is_valid_at_once_on_every_clock() {
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
    fn token_from_the_future_is_not_valid_until_it_could_have_been_issued() {
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
    fn change_made_by_a_clock_far_ahead_locks_no_user_out() {
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
