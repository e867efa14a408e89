//! Whole rows with their ids, in bulk: how data leave a store and enter another.

use async_trait::async_trait;

use super::{Error, select_user};
use crate::domain::{LastIds, Record, RecordCursor};

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
    /// higher count of a day. A vector is stored with its prompt, and only if that is completed.
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
           p.llm_duration_ms, p.prompt_tokens, p.completion_tokens, p.finish_reason, p.source,
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
