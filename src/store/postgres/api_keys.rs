//! API keys in PostgreSQL.

use async_trait::async_trait;

use super::pool::{Connection, PATIENCE};
use super::prompts::LOCK_ACCOUNT;
use super::{PostgresStore, all, first, get, one, sql_limit};
use crate::domain::{ApiKey, ApiKeyChange, ApiKeyId, ApiKeyRecord, Timestamp, UserId};
use crate::store::api_keys::{
    CHANGE_KEY, INSERT_KEY, KEY_BY_ID, KEY_OF_USER, KEYS_OF_USER, LIVE_KEYS, NOTE_KEY_USE,
    REVOKE_KEY, REVOKE_LONG_EXPIRED, ROTATE_KEY, models_column, use_noted_every,
};
use crate::store::{ApiKeyStore, Error, NewSecret, rows};

/// Fails unless the user has fewer live keys than that.
async fn check_room(
    connection: &mut Connection,
    user_id: UserId,
    limit: usize,
    now: Timestamp,
) -> Result<(), Error> {
    let rows = connection.query(LIVE_KEYS, &[&user_id.0, &now.0]).await?;
    let live: i64 = get(&one(rows)?, "live")?;
    if live < sql_limit(limit) {
        Ok(())
    } else {
        Err(Error::TooManyApiKeys)
    }
}

#[async_trait]
impl ApiKeyStore for PostgresStore {
    async fn create_api_key(
        &self,
        record: ApiKeyRecord,
        limit: usize,
        now: Timestamp,
    ) -> Result<(), Error> {
        let key = &record.key;
        let mut connection = self.pool.connection(PATIENCE).await?;
        connection.begin().await?;
        // Those who make keys for one user take turns: each counts what the one before has stored.
        connection.query(LOCK_ACCOUNT, &[&key.user_id.0]).await?;
        check_room(&mut connection, key.user_id, limit, now).await?;
        connection
            .write(
                REVOKE_LONG_EXPIRED,
                &[&key.user_id.0, &now.0, &sql_limit(limit)],
            )
            .await?;
        connection
            .write(
                INSERT_KEY,
                &[
                    &key.id.as_str(),
                    &key.user_id.0,
                    &key.name,
                    &record.key_hash.as_slice(),
                    &record
                        .previous
                        .as_ref()
                        .map(|previous| previous.key_hash.as_slice()),
                    &record.previous.map(|previous| previous.until.0),
                    &key.last_four,
                    &key.scopes.to_string(),
                    &models_column(&key.models),
                    &key.rates.as_ref().map(ToString::to_string),
                    &key.budget.map(|budget| budget.amount.0),
                    &key.budget.map(|budget| budget.period.as_str()),
                    &key.expires_at.map(|at| at.0),
                    &key.created_at.0,
                    &record.revoked_at.map(|at| at.0),
                    &key.last_used_at.map(|at| at.0),
                ],
            )
            .await?;
        connection.commit().await
    }

    async fn api_key(&self, id: ApiKeyId) -> Result<Option<ApiKeyRecord>, Error> {
        let rows = self.pool.query(KEY_BY_ID, &[&id.as_str()]).await?;
        first(&rows, rows::api_key)
    }

    async fn api_keys(&self, user_id: UserId) -> Result<Vec<ApiKey>, Error> {
        let rows = self.pool.query(KEYS_OF_USER, &[&user_id.0]).await?;
        all(&rows, |row| Ok(rows::api_key(row)?.key))
    }

    async fn change_api_key(
        &self,
        user_id: UserId,
        id: ApiKeyId,
        change: ApiKeyChange,
        limit: usize,
        now: Timestamp,
    ) -> Result<Option<ApiKey>, Error> {
        let mut connection = self.pool.connection(PATIENCE).await?;
        connection.begin().await?;
        // Also keeps a second change of the key from reading it before this one is stored.
        connection.query(LOCK_ACCOUNT, &[&user_id.0]).await?;
        let found = connection
            .query(KEY_OF_USER, &[&id.as_str(), &user_id.0])
            .await?;
        let Some(before) = first(&found, rows::api_key)? else {
            connection.commit().await?;
            return Ok(None);
        };
        let was_live = !before.key.has_expired(now);
        let key = change.apply(before.key);
        if !was_live && !key.has_expired(now) {
            check_room(&mut connection, user_id, limit, now).await?;
        }
        let changed = connection
            .write(
                CHANGE_KEY,
                &[
                    &key.name,
                    &key.scopes.to_string(),
                    &models_column(&key.models),
                    &key.rates.as_ref().map(ToString::to_string),
                    &key.budget.map(|budget| budget.amount.0),
                    &key.budget.map(|budget| budget.period.as_str()),
                    &key.expires_at.map(|at| at.0),
                    &id.as_str(),
                ],
            )
            .await?;
        connection.commit().await?;
        Ok(first(&changed, rows::api_key)?.map(|record| record.key))
    }

    async fn rotate_api_key(
        &self,
        user_id: UserId,
        id: ApiKeyId,
        secret: NewSecret,
    ) -> Result<Option<ApiKey>, Error> {
        let rotated = self
            .pool
            .write(
                ROTATE_KEY,
                &[
                    &secret.previous_until.map(|until| until.0),
                    &secret.key_hash.as_slice(),
                    &secret.last_four,
                    &id.as_str(),
                    &user_id.0,
                ],
            )
            .await?;
        Ok(first(&rotated, rows::api_key)?.map(|record| record.key))
    }

    async fn revoke_api_key(
        &self,
        user_id: UserId,
        id: ApiKeyId,
        now: Timestamp,
    ) -> Result<bool, Error> {
        let arguments: super::pool::Arguments<'_> = &[&now.0, &id.as_str(), &user_id.0];
        Ok(!self.pool.write(REVOKE_KEY, arguments).await?.is_empty())
    }

    async fn note_api_key_use(&self, id: ApiKeyId, now: Timestamp) -> Result<bool, Error> {
        let every = use_noted_every();
        let arguments: super::pool::Arguments<'_> = &[&now.0, &id.as_str(), &every];
        Ok(!self.pool.write(NOTE_KEY_USE, arguments).await?.is_empty())
    }
}
