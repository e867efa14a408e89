//! API keys as stores keep them.

use std::time::Duration;

use async_trait::async_trait;

use super::Error;
use crate::domain::{ApiKey, ApiKeyChange, ApiKeyId, ApiKeyRecord, Timestamp, UserId};

/// How often at most the last use of a key is written.
pub const USE_NOTED_EVERY: Duration = Duration::from_secs(60);

/// The columns of an API key's row, the same in both schemas.
macro_rules! api_key_columns {
    () => {
        "id, user_id, name, key_hash, previous_hash, previous_until, last_four, scopes, models, \
         rates, budget, budget_period, expires_at, created_at, revoked_at, last_used_at"
    };
}
pub(crate) use api_key_columns;

/// The text of a key after a rotation, as the store keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSecret {
    /// SHA-256 of the new text.
    pub key_hash: [u8; 32],
    /// The last four characters of the new text.
    pub last_four: String,
    /// Until when the text before it may be used. `None`: no longer.
    pub previous_until: Option<Timestamp>,
}

/// API keys. A key that was revoked keeps its row for good, because the usage of keys is counted by
/// their ids; to all methods but [`api_key`](Self::api_key) it is absent.
///
/// A key is live if it is neither revoked nor expired.
#[async_trait]
pub trait ApiKeyStore: Send + Sync {
    /// Stores a new key. `TooManyApiKeys` if its user has `limit` live keys at `now`: nothing is
    /// stored then, however many race. Of the user's expired keys only the `limit` that expired
    /// last stay; the others are revoked. `Internal` if there is no such account, or the id is
    /// taken.
    async fn create_api_key(
        &self,
        record: ApiKeyRecord,
        limit: usize,
        now: Timestamp,
    ) -> Result<(), Error>;

    /// The key of that id, whoever has it, also if it was revoked; `None` if there was never one.
    async fn api_key(&self, id: ApiKeyId) -> Result<Option<ApiKeyRecord>, Error>;

    /// The user's keys, expired ones included, the newest first. Of keys made at the same time the
    /// one with the greater id comes first.
    async fn api_keys(&self, user_id: UserId) -> Result<Vec<ApiKey>, Error>;

    /// Changes the user's key and returns it; `None` if there is none or it is another user's.
    /// `TooManyApiKeys`, and nothing is changed, if the change makes an expired key live and its
    /// user has `limit` live keys at `now`.
    async fn change_api_key(
        &self,
        user_id: UserId,
        id: ApiKeyId,
        change: ApiKeyChange,
        limit: usize,
        now: Timestamp,
    ) -> Result<Option<ApiKey>, Error>;

    /// Gives the user's key another text. The text before it may be used until `previous_until`;
    /// any earlier one no longer. Returns the key; `None` if there is none or it is another user's.
    async fn rotate_api_key(
        &self,
        user_id: UserId,
        id: ApiKeyId,
        secret: NewSecret,
    ) -> Result<Option<ApiKey>, Error>;

    /// Revokes the user's key. `false` if there is none or it is another user's.
    async fn revoke_api_key(
        &self,
        user_id: UserId,
        id: ApiKeyId,
        now: Timestamp,
    ) -> Result<bool, Error>;

    /// Notes that a key was used at `now`, unless a use within [`USE_NOTED_EVERY`] of it was noted.
    /// Returns whether it was noted now. `false` for an absent key.
    async fn note_api_key_use(&self, id: ApiKeyId, now: Timestamp) -> Result<bool, Error>;
}

/// The models of a key as one column: no model has a line end.
pub(super) fn models_column(models: &[String]) -> String {
    models.join("\n")
}

/// A length of time in the unit of timestamps.
pub(super) fn use_noted_every() -> i64 {
    super::calls::micros(USE_NOTED_EVERY)
}

// The same texts for both backends: see `bulk`.

pub(super) const KEY_BY_ID: &str =
    concat!("SELECT ", api_key_columns!(), " FROM api_key WHERE id = $1");

pub(super) const KEYS_OF_USER: &str = concat!(
    "SELECT ",
    api_key_columns!(),
    " FROM api_key WHERE user_id = $1 AND revoked_at IS NULL ORDER BY created_at DESC, id DESC"
);

pub(super) const KEY_OF_USER: &str = concat!(
    "SELECT ",
    api_key_columns!(),
    " FROM api_key WHERE id = $1 AND user_id = $2 AND revoked_at IS NULL"
);

pub(super) const LIVE_KEYS: &str = "
    SELECT count(*) AS live FROM api_key
    WHERE user_id = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > $2)";

/// Besides user and present: how many expired keys stay.
pub(super) const REVOKE_LONG_EXPIRED: &str = "
    UPDATE api_key SET revoked_at = expires_at WHERE id IN (
        SELECT id FROM api_key WHERE user_id = $1 AND revoked_at IS NULL AND expires_at <= $2
        ORDER BY expires_at DESC, id DESC LIMIT 1000000 OFFSET $3
    )";

pub(super) const INSERT_KEY: &str = concat!(
    "INSERT INTO api_key (",
    api_key_columns!(),
    ") VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)"
);

pub(super) const CHANGE_KEY: &str = concat!(
    "UPDATE api_key SET name = $1, scopes = $2, models = $3, rates = $4, budget = $5,
     budget_period = $6, expires_at = $7 WHERE id = $8 RETURNING ",
    api_key_columns!()
);

pub(super) const ROTATE_KEY: &str = concat!(
    "UPDATE api_key SET previous_hash = CASE WHEN CAST($1 AS bigint) IS NOT NULL THEN key_hash END,
     previous_until = $1, key_hash = $2, last_four = $3
     WHERE id = $4 AND user_id = $5 AND revoked_at IS NULL RETURNING ",
    api_key_columns!()
);

pub(super) const REVOKE_KEY: &str = "
    UPDATE api_key SET revoked_at = $1
    WHERE id = $2 AND user_id = $3 AND revoked_at IS NULL RETURNING id";

/// A use far in the future was noted by a wrong clock, and does not count.
pub(super) const NOTE_KEY_USE: &str = "
    UPDATE api_key SET last_used_at = $1 WHERE id = $2 AND revoked_at IS NULL
    AND (last_used_at IS NULL OR last_used_at <= $1 - CAST($3 AS bigint)
         OR last_used_at > $1 + CAST($3 AS bigint)) RETURNING id";

pub(super) const API_KEYS_AFTER: &str = concat!(
    "SELECT ",
    api_key_columns!(),
    " FROM api_key WHERE id > $1 ORDER BY id LIMIT $2"
);
