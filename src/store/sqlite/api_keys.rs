//! API keys in SQLite.

use async_trait::async_trait;
use rusqlite::{Connection, params};

use super::statements::{all, execute, one};
use super::{SqliteStore, sql_limit};
use crate::domain::{ApiKey, ApiKeyChange, ApiKeyId, ApiKeyRecord, Timestamp, UserId};
use crate::store::api_keys::{
    CHANGE_KEY, INSERT_KEY, KEY_BY_ID, KEY_OF_USER, KEYS_OF_USER, LIVE_KEYS, NOTE_KEY_USE,
    REVOKE_KEY, REVOKE_LONG_EXPIRED, ROTATE_KEY, models_column, use_noted_every,
};
use crate::store::{ApiKeyStore, Error, NewSecret, rows};

/// Inserts a row by a statement with a parameter for each of its columns, in their order.
pub(super) fn insert(
    connection: &Connection,
    sql: &str,
    record: &ApiKeyRecord,
) -> Result<usize, Error> {
    let key = &record.key;
    execute(
        connection,
        sql,
        params![
            key.id.as_str(),
            key.user_id.0,
            key.name,
            record.key_hash,
            record.previous.map(|previous| previous.key_hash),
            record.previous.map(|previous| previous.until.0),
            key.last_four,
            key.scopes.to_string(),
            models_column(&key.models),
            key.rates.as_ref().map(ToString::to_string),
            key.budget.map(|budget| budget.amount.0),
            key.budget.map(|budget| budget.period.as_str()),
            key.expires_at.map(|at| at.0),
            key.created_at.0,
            record.revoked_at.map(|at| at.0),
            key.last_used_at.map(|at| at.0),
        ],
    )
}

/// Fails unless the user has fewer live keys than that.
fn check_room(
    connection: &Connection,
    user_id: UserId,
    limit: usize,
    now: Timestamp,
) -> Result<(), Error> {
    let arguments = [user_id.0, now.0];
    let live: Option<i64> = one(connection, LIVE_KEYS, arguments, |row| row.read("live"))?;
    if live.unwrap_or_default() < sql_limit(limit) {
        Ok(())
    } else {
        Err(Error::TooManyApiKeys)
    }
}

#[async_trait]
impl ApiKeyStore for SqliteStore {
    async fn create_api_key(
        &self,
        record: ApiKeyRecord,
        limit: usize,
        now: Timestamp,
    ) -> Result<(), Error> {
        self.writer
            .write(move |connection| {
                let user_id = record.key.user_id;
                check_room(connection, user_id, limit, now)?;
                let arguments = [user_id.0, now.0, sql_limit(limit)];
                execute(connection, REVOKE_LONG_EXPIRED, arguments)?;
                insert(connection, INSERT_KEY, &record)?;
                Ok(())
            })
            .await
    }

    async fn api_key(&self, id: ApiKeyId) -> Result<Option<ApiKeyRecord>, Error> {
        self.readers
            .read(move |connection| one(connection, KEY_BY_ID, [id.as_str()], rows::api_key))
            .await
    }

    async fn api_keys(&self, user_id: UserId) -> Result<Vec<ApiKey>, Error> {
        let key = |row: &dyn rows::StoredRow| Ok(rows::api_key(row)?.key);
        self.readers
            .read(move |connection| all(connection, KEYS_OF_USER, [user_id.0], key))
            .await
    }

    async fn change_api_key(
        &self,
        user_id: UserId,
        id: ApiKeyId,
        change: ApiKeyChange,
        limit: usize,
        now: Timestamp,
    ) -> Result<Option<ApiKey>, Error> {
        self.writer
            .write(move |connection| {
                let arguments = params![id.as_str(), user_id.0];
                let Some(before) = one(connection, KEY_OF_USER, arguments, rows::api_key)? else {
                    return Ok(None);
                };
                let was_live = !before.key.has_expired(now);
                let key = change.apply(before.key);
                if !was_live && !key.has_expired(now) {
                    check_room(connection, user_id, limit, now)?;
                }
                let arguments = params![
                    key.name,
                    key.scopes.to_string(),
                    models_column(&key.models),
                    key.rates.as_ref().map(ToString::to_string),
                    key.budget.map(|budget| budget.amount.0),
                    key.budget.map(|budget| budget.period.as_str()),
                    key.expires_at.map(|at| at.0),
                    id.as_str(),
                ];
                let changed = one(connection, CHANGE_KEY, arguments, rows::api_key)?;
                Ok(changed.map(|record| record.key))
            })
            .await
    }

    async fn rotate_api_key(
        &self,
        user_id: UserId,
        id: ApiKeyId,
        secret: NewSecret,
    ) -> Result<Option<ApiKey>, Error> {
        self.writer
            .write_vital(move |connection| {
                let arguments = params![
                    secret.previous_until.map(|until| until.0),
                    secret.key_hash,
                    secret.last_four,
                    id.as_str(),
                    user_id.0,
                ];
                let rotated = one(connection, ROTATE_KEY, arguments, rows::api_key)?;
                Ok(rotated.map(|record| record.key))
            })
            .await
    }

    async fn revoke_api_key(
        &self,
        user_id: UserId,
        id: ApiKeyId,
        now: Timestamp,
    ) -> Result<bool, Error> {
        self.writer
            .write_vital(move |connection| {
                let arguments = params![now.0, id.as_str(), user_id.0];
                Ok(one(connection, REVOKE_KEY, arguments, |_| Ok(()))?.is_some())
            })
            .await
    }

    async fn note_api_key_use(&self, id: ApiKeyId, now: Timestamp) -> Result<bool, Error> {
        self.writer
            .write(move |connection| {
                let arguments = params![now.0, id.as_str(), use_noted_every()];
                Ok(one(connection, NOTE_KEY_USE, arguments, |_| Ok(()))?.is_some())
            })
            .await
    }
}
