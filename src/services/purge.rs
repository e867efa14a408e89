//! Deletes what has expired: sessions, revoked tokens, idempotency keys.
//!
//! The clock decides whether they are valid each time they are used. They are deleted only to save
//! space. A deleted row cannot be restored, so a clock that is wrong for a while must not delete
//! it. Rows are deleted up to a horizon, which is kept in the store. The horizon stays a week
//! behind the clock, which is enough for a clock that is a few days ahead. It moves at most twice
//! as fast as the service runs, which is enough for any clock: one that is years ahead for three
//! days moves it by six days.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::domain::Timestamp;
use crate::error::Error;
use crate::store::{AccountStore, CallStore};

/// How long expired rows are kept at least, by the clock.
const KEPT: Duration = Duration::from_secs(7 * 86_400);
/// How many times faster than the service runs the horizon may move. More than one, so that it
/// catches up with the clock after the service was stopped.
const SPEED: u32 = 2;

/// Deletes what has expired, one step at a time.
pub struct Purge {
    accounts: Arc<dyn AccountStore>,
    calls: Arc<dyn CallStore>,
    moved_at: Instant,
}

impl Purge {
    /// The purge of a process that was started at `started`.
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

    /// Moves the horizon, and deletes what had expired by it. `clock` is the wall clock, which may
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
        tracing::debug!(
            credentials,
            keys,
            "expired credentials and keys were deleted"
        );
        Ok(())
    }
}
