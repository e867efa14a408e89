//! Whole rows with their ids, in bulk: how data leave a store and enter another.

use async_trait::async_trait;

use super::{Error, select_user};
use crate::domain::{ApiKeyId, LastIds, Record, RecordCursor, UserId};

/// Everything a store keeps, read and written by key. For operators' commands, not for requests:
/// pages may be large, and a call takes as long as its rows take.
///
/// Putting is repeatable: rows that are stored already are left as they are, so that work that was
/// interrupted can be started again. Ids given out later are above all that were put.
#[async_trait]
pub trait BulkStore: Send + Sync {
    /// The highest ids given out so far, those of deleted rows included.
    async fn last_ids(&self) -> Result<LastIds, Error>;

    /// Gives out no ids up to these any more. Ids below the store's own change nothing.
    async fn raise_ids(&self, last: LastIds) -> Result<(), Error>;

    /// Up to `limit` rows after the cursor, in the cursor's order, whole: a prompt with its vector,
    /// of whatever model; a session or a token whether it has expired or not.
    async fn records(&self, after: RecordCursor, limit: usize) -> Result<Vec<Record>, Error>;

    /// Stores rows as they are, in one transaction.
    ///
    /// A row whose id or key is stored already is not stored, nor is an account whose name another
    /// one has. Two kinds keep the greater value instead: the later expiry of a revoked token, the
    /// higher count of a day. With the sums of a day's usage goes what budgets are checked against.
    /// A vector is stored with its prompt, and only if that is completed.
    ///
    /// `Internal` if an owner is missing, or a vector's length is not that of its model's others;
    /// nothing is stored then.
    async fn put(&self, records: Vec<Record>) -> Result<(), Error>;
}

// The same texts for both backends. SQLite takes `$1` for a name, and binds names in the order in
// which they first stand in the text.

pub(super) const USERS_AFTER: &str = select_user!("WHERE id > $1 ORDER BY id LIMIT $2");

pub(super) const PROMPTS_AFTER: &str = "
    SELECT p.id, p.user_id, p.created_at, p.status, p.error, p.model, p.prompt, p.response,
           p.llm_duration_ms, p.prompt_tokens, p.completion_tokens, p.finish_reason, p.source, p.cost,
           m.name AS embedding_model, e.embedding, c.messages, c.request, c.metadata, c.answer
    FROM prompt p
    LEFT JOIN prompt_embedding e ON e.user_id = p.user_id AND e.prompt_id = p.id
    LEFT JOIN embedding_model m ON m.id = e.model_id
    LEFT JOIN chat_call c ON c.prompt_id = p.id
    WHERE p.id > $1
      AND NOT EXISTS (SELECT 1 FROM running_call r WHERE r.prompt_id = p.id AND NOT r.is_kept)
    ORDER BY p.id LIMIT $2";

pub(super) const KEYS_AFTER: &str = "
    SELECT user_id, key_hash, fingerprint, prompt_id, claimed_at FROM idempotency_key
    WHERE (user_id, key_hash) > ($1, $2) ORDER BY user_id, key_hash LIMIT $3";

pub(super) const DAYS_AFTER: &str = "
    SELECT day, calls FROM upstream_day
    WHERE CAST($1 AS bigint) IS NULL OR day > $1 ORDER BY day LIMIT $2";

pub(super) const SESSIONS_AFTER: &str = "
    SELECT token_hash, user_id, created_at, expires_at FROM session
    WHERE token_hash > $1 ORDER BY token_hash LIMIT $2";

pub(super) const USAGE_AFTER: &str = "
    SELECT id, user_id, api_key_id, prompt_id, source, begun_at, upstream, model_asked, model,
           input, cache_read, cache_write, output, reasoning, cost, price_version, outcome,
           is_estimated
    FROM usage WHERE id > $1 ORDER BY id LIMIT $2";

pub(super) const USAGE_DAYS_AFTER: &str = "
    SELECT user_id, day, api_key_id, model, attempts, input, cache_read, cache_write, output,
           reasoning, cost, unpriced
    FROM usage_day WHERE (user_id, day, api_key_id, model) > ($1, $2, $3, $4)
    ORDER BY user_id, day, api_key_id, model LIMIT $5";

pub(super) const BUDGETS_AFTER: &str = "
    SELECT user_id, amount, period FROM user_budget WHERE user_id > $1 ORDER BY user_id LIMIT $2";

/// Where sums of usage go on after a cursor, as the arguments of [`USAGE_DAYS_AFTER`].
pub(super) fn usage_days_after(
    after: Option<(UserId, i64, Option<ApiKeyId>, String)>,
) -> (i64, i64, String, String) {
    match after {
        None => (i64::MIN, i64::MIN, String::new(), String::new()),
        Some((user_id, day, key, model)) => {
            let key = key.map(|id| id.to_string()).unwrap_or_default();
            (user_id.0, day, key, model)
        }
    }
}
