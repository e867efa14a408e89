//! Calls of the upstream while they run: leases, idempotency keys, and the day's count.
//!
//! Each post is stored first as a `running` prompt under a lease, and the upstream is asked only
//! then. The process that runs the call renews the lease. If the process dies, the lease expires,
//! and any process may end the call. Leases and the age of keys are lengths, not instants: each
//! backend measures them by a clock that all processes on the same data share. So a process whose
//! own clock is wrong neither loses its calls nor takes others'.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::{CallBudgets, Error};
use crate::domain::{
    ApiKeyId, CallDetails, ChatTexts, Embedding, FailureCode, ModelId, Prompt, PromptId,
    PromptSource, PromptStatus, Timestamp, UsageEntry, UserId,
};

/// How long a key is kept. Not a setting: clients rely on the figure.
pub const KEY_LIFETIME: Duration = Duration::from_secs(86_400);

/// The code of a call that expired.
pub(super) const EXPIRED: FailureCode = FailureCode::Interrupted;

/// The process and the call that hold a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Holder {
    /// The process: 16 random bytes made at its start.
    pub replica: [u8; 16],
    /// Number of the call within the process; not negative. A call that a process takes over from
    /// itself gets a new number.
    pub call: i64,
}

/// An idempotency key as the store knows it. The key itself is not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyClaim {
    /// SHA-256 of the key. Keys of different users are independent.
    pub key_hash: [u8; 32],
    /// SHA-256 of the parts of the request that must be the same in each request with this key.
    pub fingerprint: [u8; 32],
}

/// A call to begin.
#[derive(Clone, Debug)]
pub struct NewCall {
    /// The user who posted the prompt.
    pub user_id: UserId,
    /// The front door by which it came.
    pub source: PromptSource,
    /// The text, without NUL.
    pub prompt: String,
    /// What is kept of a chat call besides, still without an answer; `None` for other calls.
    /// Shared, because it may be megabytes.
    pub chat: Option<Arc<ChatTexts>>,
    /// Whether the prompt stays when the call has ended. One that does not stay is in no list while
    /// it runs, and is deleted when the call is settled or has expired.
    pub is_kept: bool,
    /// The model that is asked first.
    pub model: String,
    /// When the post was accepted.
    pub created_at: Timestamp,
    /// Whether the outcome is announced to the user's sockets.
    pub announce: bool,
    /// The key to claim, if the request has one.
    pub key: Option<KeyClaim>,
    /// The holder of the call's lease.
    pub holder: Holder,
    /// How long the lease is valid without renewal.
    pub lease: Duration,
    /// The most prompts of any status that the user may keep, this one included; `None` is no
    /// limit.
    pub max_prompts: Option<u32>,
    /// The key with which the call is made, if any.
    pub api_key_id: Option<ApiKeyId>,
    /// What it may cost, and the budgets that it has to fit into.
    pub budgets: CallBudgets,
    /// The day on which it is counted, if calls are limited.
    pub daily: Option<DailyLimit>,
}

/// How many calls may be made on a day, by all processes on the same data together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DailyLimit {
    /// The day, counted from 1970-01-01 UTC.
    pub day: i64,
    /// The most calls on it.
    pub calls: u64,
}

/// The result of [`CallStore::begin_call`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Begun {
    /// The prompt is stored as `Running`, and the caller holds its lease. If the key belongs to an
    /// expired call, this is that call's row, with its id and time.
    Started(Prompt),
    /// The same, but the day has no call left and this one was not counted. The upstream must not
    /// be asked: the caller settles the call as failed.
    OverLimit(Prompt),
    /// The key was claimed before. Nothing was changed.
    Known(KeyState),
}

/// The state of a key that was claimed before. There is no state for a failed call: a call that
/// fails releases its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyState {
    /// The key was claimed with another fingerprint.
    OtherRequest,
    /// Its call runs under a valid lease.
    InFlight(PromptId),
    /// Its call expired. To begin again with the same key and fingerprint takes the row over.
    Expired(PromptId),
    /// Its prompt is answered.
    Completed(PromptId),
    /// Its prompt was deleted, answered or not.
    Deleted,
}

impl KeyClaim {
    /// The state of a key that is stored with that fingerprint and prompt, for a request that
    /// claims it. `status`: of the prompt; `None` if the prompt was deleted. `is_leased`: whether
    /// the prompt has a lease that is still valid.
    pub(super) fn state(
        &self,
        fingerprint: [u8; 32],
        id: PromptId,
        status: Option<PromptStatus>,
        is_leased: bool,
    ) -> KeyState {
        match status {
            _ if fingerprint != self.fingerprint => KeyState::OtherRequest,
            None => KeyState::Deleted,
            Some(PromptStatus::Completed) => KeyState::Completed(id),
            Some(PromptStatus::Running | PromptStatus::Failed) if is_leased => {
                KeyState::InFlight(id)
            }
            Some(PromptStatus::Running | PromptStatus::Failed) => KeyState::Expired(id),
        }
    }
}

/// How a call ended: what [`CallStore::settle_call`] writes into the prompt's row.
#[derive(Clone, Debug)]
pub struct CallOutcome {
    /// As in the call's [`NewCall`].
    pub is_kept: bool,
    /// Why there is no answer; `None` if there is one. A failure releases the call's key.
    pub error: Option<FailureCode>,
    /// The answer's text. Shared, because storing it may have to be tried again.
    pub response: Option<Arc<str>>,
    /// The whole answer to a chat call, as JSON.
    pub answer: Option<Arc<str>>,
    /// The model that answered; `None` leaves the model that was asked.
    pub model: Option<String>,
    /// Further details of the call.
    pub details: CallDetails,
    /// The prompt's vector and the model that made it.
    pub embedding: Option<(ModelId, Embedding)>,
    /// What the attempts at upstreams used and cost, as far as they may have cost something.
    pub usage: Vec<UsageEntry>,
}

impl Default for CallOutcome {
    fn default() -> Self {
        Self {
            is_kept: true,
            error: None,
            response: None,
            answer: None,
            model: None,
            details: CallDetails::default(),
            embedding: None,
            usage: Vec::new(),
        }
    }
}

impl CallOutcome {
    /// An answer without details and without a vector.
    pub fn completed(response: impl Into<Arc<str>>, model: impl Into<String>) -> Self {
        Self {
            response: Some(response.into()),
            model: Some(model.into()),
            ..Self::default()
        }
    }

    /// A call that has no answer.
    pub fn failed(code: FailureCode) -> Self {
        Self {
            error: Some(code),
            ..Self::default()
        }
    }

    /// The status that the prompt gets.
    pub fn status(&self) -> PromptStatus {
        match self.error {
            None => PromptStatus::Completed,
            Some(_) => PromptStatus::Failed,
        }
    }
}

/// A call that was ended because its lease expired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpiredCall {
    /// Now `Failed` with `Interrupted`.
    pub prompt: Prompt,
    /// Whether the outcome is announced to the user's sockets.
    pub announce: bool,
}

/// Calls of the upstream. Each method is one transaction, as with the other traits of the store.
#[async_trait]
pub trait CallStore: Send + Sync {
    /// Stores a running prompt under a lease and claims its key, if it has one: all or nothing.
    ///
    /// If the key was claimed before with the same fingerprint and that call's lease expired
    /// (whether [`expire_calls`](Self::expire_calls) has ended it yet or not), the row is taken
    /// over: it is `Running` again under this holder, without its error, and keeps its id, time and
    /// text. The former holder can no longer settle it. For any other key that was claimed before,
    /// returns `Known`. If many calls race for one key, exactly one is `Started`.
    ///
    /// Fails with `Internal` if there is no such account. Fails with `QuotaExceeded` if a row would
    /// be added and the user keeps `max_prompts` or more, however many calls race. A row that is
    /// taken over, or a known key, needs no quota.
    ///
    /// Each call, also one that takes a row over, has to fit into the budgets in force: those in
    /// `budgets` and the user's. Fails with `PriceUnknown` if there is one and the most that the
    /// call can cost is not known, and with `BudgetExceeded` if that is more than is left in a
    /// budget's period, counting what all calls that run may still cost, however many race.
    /// Otherwise that amount is reserved until the call is settled or has expired. The period is
    /// that of `created_at`. A call that costs nothing fits into any budget. Where no budget is in
    /// force, nothing is reserved.
    ///
    /// A call that is begun, also one that takes a row over, is counted on its day in `daily`. If
    /// the day's calls are counted already, however many race, it is begun all the same and
    /// returned as `OverLimit`. A call that is refused, or whose key is known, is not counted.
    async fn begin_call(&self, call: NewCall) -> Result<Begun, Error>;

    /// The state of a user's key; `None` if it is free. A key is free again [`KEY_LIFETIME`] after
    /// it was claimed or last taken over, by the store's clock. Changes nothing.
    async fn key_state(&self, user_id: UserId, claim: &KeyClaim)
    -> Result<Option<KeyState>, Error>;

    /// Makes the leases of the given prompts that `replica` holds valid for `lease` from now on.
    /// Returns how many. Also renews an expired lease whose call was neither ended nor taken over.
    async fn renew_leases(
        &self,
        replica: [u8; 16],
        ids: &[PromptId],
        lease: Duration,
    ) -> Result<u64, Error>;

    /// Ends a running prompt with its outcome and releases its lease. A prompt that does not stay
    /// is deleted; it is returned as it would have been stored. Returns `None`, and changes
    /// nothing, if the prompt is not running, was deleted, or is held by another holder: of all
    /// attempts to settle one call exactly one succeeds. Fails with `Internal` if the vector's
    /// length is not that of the model's other vectors; nothing is changed then.
    ///
    /// In the same transaction the usage of the outcome is stored and added to the sums of the day
    /// on which the call began, and what the call has reserved is free again. This is so for a
    /// prompt that was deleted meanwhile, too, although `None` is returned for it.
    async fn settle_call(
        &self,
        id: PromptId,
        holder: Holder,
        outcome: CallOutcome,
    ) -> Result<Option<Prompt>, Error>;

    /// Ends up to `limit` calls whose lease expired, except those in `spared`. They become `Failed`
    /// with `Interrupted` and keep their key, so that a retry with the key takes them over. Those
    /// whose prompt does not stay are deleted, and are not returned. Each other expired call is
    /// returned once, to one process. Calls that another transaction is renewing or
    /// settling may be left for the next time.
    ///
    /// For each an `interrupted` row of usage without tokens and cost is stored, and what it has
    /// reserved is free again. So it is with a call whose row is taken over before it is ended
    /// here, and with one whose prompt was deleted.
    async fn expire_calls(
        &self,
        limit: usize,
        spared: &[PromptId],
    ) -> Result<Vec<ExpiredCall>, Error>;

    /// Deletes keys that were free at `horizon`; returns how many. Their prompts stay.
    async fn purge_keys(&self, horizon: Timestamp) -> Result<u64, Error>;
}

impl Begun {
    /// A call that was begun, and counted unless its day had no call left.
    pub(super) fn counted(prompt: Prompt, is_within_limit: bool) -> Self {
        if is_within_limit {
            Self::Started(prompt)
        } else {
            Self::OverLimit(prompt)
        }
    }
}

/// Microseconds, as stores keep times.
pub(super) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_the_state_of_its_prompt_for_the_same_request_only() {
        let claim = |request| KeyClaim {
            key_hash: [1; 32],
            fingerprint: [request; 32],
        };
        let id = PromptId(7);
        let state =
            |status, is_leased, request| claim(request).state([1; 32], id, status, is_leased);
        for status in [PromptStatus::Running, PromptStatus::Failed] {
            assert_eq!(state(Some(status), true, 1), KeyState::InFlight(id));
            assert_eq!(state(Some(status), false, 1), KeyState::Expired(id));
            assert_eq!(state(Some(status), false, 2), KeyState::OtherRequest);
        }
        let completed = Some(PromptStatus::Completed);
        assert_eq!(state(completed, false, 1), KeyState::Completed(id));
        assert_eq!(state(completed, false, 2), KeyState::OtherRequest);
        assert_eq!(state(None, false, 1), KeyState::Deleted);
        assert_eq!(state(None, false, 2), KeyState::OtherRequest);
    }
}
