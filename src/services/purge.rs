//! Forgetting what has expired: sessions, revoked tokens, idempotency keys.
//!
//! All of them are judged by the clock when they are asked for, and forgotten for room alone. What
//! is forgotten cannot be brought back, so a clock that is wrong for a while must not decide that.
//! Rows are forgotten up to a horizon, which is kept in the store. It stays a week behind the
//! clock, which is enough for one that is a few days ahead, and moves at most twice as fast as the
//! service runs, which is enough for any clock: one that is ahead by years for three days moves it
//! by six.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::domain::Timestamp;
use crate::error::Error;
use crate::store::{AccountStore, CallStore};

/// How long what has expired is kept at least, by the clock.
const KEPT: Duration = Duration::from_secs(7 * 86_400);
/// How much faster than the service runs the horizon may move. Faster than one, so that it catches
/// up with the clock after the service was stopped.
const SPEED: u32 = 2;

/// Forgets what has expired, one step at a time.
pub struct Purge {
    accounts: Arc<dyn AccountStore>,
    calls: Arc<dyn CallStore>,
    moved_at: Instant,
}

impl Purge {
    /// A purge by a process that runs since `started`.
    pub fn new(
        accounts: Arc<dyn AccountStore>,
        calls: Arc<dyn CallStore>,
        started: Instant,
    ) -> Self {
        Self {
            accounts,
            calls,
            moved_at: started,
        }
    }

    /// Moves the horizon, and forgets what had expired by it. `clock` is the wall clock, which may
    /// be wrong, and `now` the monotonic clock.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn step(&mut self, clock: Timestamp, now: Instant) -> Result<(), Error> {
        let ran = now.saturating_duration_since(self.moved_at);
        let horizon = self
            .accounts
            .move_purge_horizon(clock.minus(KEPT), ran.saturating_mul(SPEED))
            .await?;
        self.moved_at = now;
        let credentials = self.accounts.purge_expired(horizon).await?;
        let keys = self.calls.purge_keys(horizon).await?;
        tracing::debug!(credentials, keys, "what expired long ago was forgotten");
        Ok(())
    }
}
