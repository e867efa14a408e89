//! Whole rows with their ids, in bulk: how data leave a store and come into another.

use async_trait::async_trait;

use super::{Error, RevokedToken, Session};
use crate::domain::{LastIds, PromptId, PromptRecord, Timestamp, User, UserId};

/// What became of a row that was put into a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It is stored now.
    Stored,
    /// It was there already, and is left as it was.
    Present,
    /// Its id, or its name, belongs to another row. Nothing was changed.
    Taken,
}

/// An idempotency key as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRecord {
    /// Whose it is.
    pub user_id: UserId,
    /// SHA-256 of the key.
    pub key_hash: [u8; 32],
    /// SHA-256 of what its request meant.
    pub fingerprint: [u8; 32],
    /// The prompt behind it, which may be deleted.
    pub prompt_id: PromptId,
    /// When it was claimed, or last taken over.
    pub claimed_at: Timestamp,
}

/// The calls of the upstream that were counted on a day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpstreamDay {
    /// Days since 1970-01-01 UTC.
    pub day: i64,
    /// How many; not negative.
    pub calls: i64,
}

/// Everything a store keeps, read and written by id. For operators' commands, not for requests: pages may be large, and a
/// call takes as long as its rows take.
///
/// Putting is repeatable: rows that are there are left alone, so that work which was cut off is begun again without harm.
/// Ids given out later are above all that were put.
#[async_trait]
pub trait BulkStore: Send + Sync {
    /// The highest ids given out so far, those of deleted rows included.
    async fn last_ids(&self) -> Result<LastIds, Error>;

    /// Gives out no ids up to these any more. Lower ones than the store's own change nothing.
    async fn raise_ids(&self, last: LastIds) -> Result<(), Error>;

    /// Up to `limit` prompts of all users with ids above `after` (all if `None`), by rising id, each with its vector, whatever
    /// model made it.
    async fn prompt_records(
        &self,
        after: Option<PromptId>,
        limit: usize,
    ) -> Result<Vec<PromptRecord>, Error>;

    /// Up to `limit` sessions, expired or not, whose hash is above `after` (all if `None`), by rising hash.
    async fn list_sessions(
        &self,
        after: Option<[u8; 32]>,
        limit: usize,
    ) -> Result<Vec<Session>, Error>;

    /// Up to `limit` revoked tokens whose `jti` is above `after` (all if `None`), by rising bytes of the `jti`.
    async fn list_revoked_tokens(
        &self,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<RevokedToken>, Error>;

    /// Stores accounts as they are, in one transaction: what became of each, in the order given. An account of the same id and
    /// name counts as `Present`, whatever else differs: its password may have changed here. `Taken`: the id is there under
    /// another name, or the name under another id.
    async fn put_users(&self, users: Vec<User>) -> Result<Vec<Put>, Error>;

    /// Stores prompts as they are, with their vectors, in one transaction: what became of each, in the order given. A prompt of
    /// the same id, owner, text and time counts as `Present`. `Taken`: the id is another's. A vector of a prompt that is not
    /// completed is not stored. `Internal` if an owner is missing, or a vector's length is not that of its model's others;
    /// nothing is stored then.
    async fn put_prompts(&self, prompts: Vec<PromptRecord>) -> Result<Vec<Put>, Error>;

    /// Stores sessions in one transaction; those there are left alone. `Internal` if an owner is missing; nothing is stored
    /// then.
    async fn put_sessions(&self, sessions: Vec<Session>) -> Result<(), Error>;

    /// Stores revoked tokens in one transaction; of one that is there the later expiry counts.
    async fn put_revoked_tokens(&self, tokens: Vec<RevokedToken>) -> Result<(), Error>;

    /// Up to `limit` idempotency keys above that of `after` (all if `None`), by rising user and hash.
    async fn list_keys(
        &self,
        after: Option<(UserId, [u8; 32])>,
        limit: usize,
    ) -> Result<Vec<KeyRecord>, Error>;

    /// Stores keys in one transaction; those there are left alone. `Internal` if an owner is missing; nothing is stored then.
    async fn put_keys(&self, keys: Vec<KeyRecord>) -> Result<(), Error>;

    /// Up to `limit` days after `after` (all if `None`) with their counted calls, by rising day.
    async fn list_upstream_days(
        &self,
        after: Option<i64>,
        limit: usize,
    ) -> Result<Vec<UpstreamDay>, Error>;

    /// Stores days' counts in one transaction; of a day that is there the higher count stands.
    async fn put_upstream_days(&self, days: Vec<UpstreamDay>) -> Result<(), Error>;
}
