//! Calls of the upstream while they run: leases, idempotency keys, and the day's count.
//!
//! A post that must be known before its answer is there (it is paid for, streams, or carries an
//! idempotency key) is stored first as a `running` prompt under a lease. Its process renews the
//! lease while it works; when the process dies the lease runs out and any other may end the row.
//! Leases and the age of keys are lengths, not instants: each backend measures them by a clock that
//! all processes on the same data share, so that a process whose own clock is wrong neither loses
//! its calls nor takes others'.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::Error;
use crate::domain::{Embedding, FailureCode, ModelId, Prompt, PromptId, Timestamp, UserId};

/// How long a key is kept. No setting: clients rely on the figure.
pub const KEY_LIFETIME: Duration = Duration::from_secs(86_400);

/// Who works on a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Holder {
    /// The process: 16 random bytes made at its start.
    pub replica: [u8; 16],
    /// Tells the process's calls apart; not negative. One that a process takes over from itself has another number.
    pub call: i64,
}

/// An idempotency key as the store knows it: what it was is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyClaim {
    /// SHA-256 of the key. Keys of different users have nothing to do with each other.
    pub key_hash: [u8; 32],
    /// SHA-256 of what the request means: requests that differ in it may not share a key.
    pub fingerprint: [u8; 32],
}

/// A call to be begun.
#[derive(Clone, Debug)]
pub struct NewCall {
    /// Who posted it.
    pub user_id: UserId,
    /// The text: trimmed, without NUL.
    pub prompt: String,
    /// The model that is asked first.
    pub model: String,
    /// When the post was accepted.
    pub created_at: Timestamp,
    /// Whether the user's sockets are to be told of the outcome.
    pub announce: bool,
    /// The key to claim for it, if the request has one.
    pub key: Option<KeyClaim>,
    /// Who works on it.
    pub holder: Holder,
    /// How long it may stay without renewal.
    pub lease: Duration,
    /// The most prompts of any status that the user may keep, this one included; `None` is no
    /// limit.
    pub max_prompts: Option<u32>,
}

/// What became of a call to be begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Begun {
    /// The prompt is stored, `Running`, and the caller holds its lease. Of a key whose earlier call lapsed it is that call's
    /// row, with its id and time.
    Started(Prompt),
    /// The key is another call's, or this one's of an earlier attempt. Nothing was changed.
    Known(KnownKey),
}

/// A key that was claimed before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownKey {
    /// That of the claim.
    pub fingerprint: [u8; 32],
    /// How far its call has come.
    pub state: KeyState,
}

/// How far the call behind a key has come. A failed call is not among these: it released its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyState {
    /// Running under a lease that holds.
    InFlight(PromptId),
    /// Its process died. Beginning again with the same key and fingerprint takes the row over.
    Lapsed(PromptId),
    /// Answered.
    Completed(Prompt),
    /// Its prompt was deleted, completed or not.
    Deleted,
}

/// How a call ended.
#[derive(Clone, Debug)]
pub enum CallOutcome {
    /// The upstream answered.
    Completed {
        /// The answer's text. Shared, because an attempt to store it may have to be made again.
        response: Arc<str>,
        /// The model that answered.
        model: String,
        /// Why the answer ended where it did, in the upstream's word.
        finish_reason: Option<String>,
        /// Tokens of the question as the upstream counted them.
        prompt_tokens: Option<u32>,
        /// Tokens of the answer as the upstream counted them.
        completion_tokens: Option<u32>,
        /// The prompt's vector and the model that made it.
        embedding: Option<(ModelId, Embedding)>,
    },
    /// There is no answer. Releases the key.
    Failed(FailureCode),
}

/// A call whose lease ran out, as it was ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LapsedCall {
    /// Now `Failed` with `Interrupted`.
    pub prompt: Prompt,
    /// Whether the user's sockets were to be told of the outcome.
    pub announce: bool,
}

/// Calls of the upstream. Each method is one transaction, as with the other traits of the store.
#[async_trait]
pub trait CallStore: Send + Sync {
    /// Stores a running prompt under a lease and claims its key, if it has one, all or nothing.
    ///
    /// Of a key claimed before, with the same fingerprint, whose call's lease ran out (whether `lapse_calls` has ended it
    /// yet or not) the row is taken over: `Running` again, of this holder, its error gone, its id, time and text kept; the
    /// former holder can finish it no more. Any other known key is answered as `Known`. Of many that race for one key
    /// exactly one is `Started`. `Internal` if there is no such account.
    ///
    /// `QuotaExceeded` if a row would be added and the user keeps `max_prompts` or more, however
    /// many calls race. A row taken over and a known key need no room.
    async fn begin_call(&self, call: NewCall) -> Result<Begun, Error>;

    /// What is known of a user's key; `None` if it is free, as it is again [`KEY_LIFETIME`] after
    /// it was claimed or last taken over, by the store's clock. A read: it changes nothing.
    async fn known_key(
        &self,
        user_id: UserId,
        key_hash: &[u8; 32],
    ) -> Result<Option<KnownKey>, Error>;

    /// Lets the given prompts' leases run for `lease` from now, of those that `replica` still holds; answers how many. One
    /// that ran out and was not yet ended or taken over is renewed too.
    async fn renew_leases(
        &self,
        replica: [u8; 16],
        ids: &[PromptId],
        lease: Duration,
    ) -> Result<u64, Error>;

    /// Ends a running prompt with its outcome and gives up its lease. `None`, and nothing is changed, if it is not running,
    /// was deleted, or another holds it: of all attempts to end one call exactly one succeeds. `Internal` if the
    /// vector's length is not that of the model's others; nothing is changed then.
    async fn finish_call(
        &self,
        id: PromptId,
        holder: Holder,
        llm_duration_ms: Option<u32>,
        outcome: CallOutcome,
    ) -> Result<Option<Prompt>, Error>;

    /// Ends up to `limit` calls whose lease ran out, except the `spared`: they are `Failed` with
    /// `Interrupted` and keep their key, so that a retry with it takes them over. Each is answered
    /// by one call of one process alone. Calls that somebody else is renewing or ending at the
    /// moment may be left for the next time.
    async fn lapse_calls(
        &self,
        limit: usize,
        spared: &[PromptId],
    ) -> Result<Vec<LapsedCall>, Error>;

    /// Forgets keys that were free again at `horizon`; returns how many. Their prompts stay.
    async fn purge_keys(&self, horizon: Timestamp) -> Result<u64, Error>;

    /// Counts a call on `day`, in days since 1970-01-01 UTC, unless `limit` calls were counted on it already; answers
    /// whether it was. The count is over all processes on the same data.
    async fn count_upstream_call(&self, day: i64, limit: u64) -> Result<bool, Error>;
}
