//! Accounts, sessions and revoked tokens in SQLite.

use std::collections::HashSet;
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::error::Failure;
use super::{SqliteStore, sql_limit};
use crate::domain::{Timestamp, User, UserId};
use crate::store::{AccountStore, Error, NewUser, RevokedToken, Session, account_columns};

/// A statement that [`user_from_row`] reads.
macro_rules! select_user {
    ($rest:literal) => {
        concat!("SELECT ", account_columns!(), " FROM account ", $rest)
    };
}

const USER_BY_ID: &str = select_user!("WHERE id = ?1");

/// `?1` user, `?2` the present, `?3` how many are left.
const DELETE_OLDEST_SESSIONS: &str = "DELETE FROM session WHERE token_hash IN (
         SELECT token_hash FROM session WHERE user_id = ?1 AND expires_at > ?2
         ORDER BY created_at DESC, token_hash DESC LIMIT -1 OFFSET ?3
     )";

fn user_from_row(row: &Row<'_>) -> rusqlite::Result<User> {
    Ok(User {
        id: UserId(row.get("id")?),
        username: row.get("username")?,
        email: row.get("email")?,
        password_hash: row.get("password_hash")?,
        is_active: row.get("is_active")?,
        tokens_valid_from: Timestamp(row.get("tokens_valid_from")?),
        created_at: Timestamp(row.get("created_at")?),
    })
}

fn delete_sessions_of(connection: &Connection, id: UserId) -> rusqlite::Result<()> {
    connection
        .prepare_cached("DELETE FROM session WHERE user_id = ?1")?
        .execute([id.0])?;
    Ok(())
}

#[async_trait]
impl AccountStore for SqliteStore {
    async fn create_user(&self, user: NewUser) -> Result<User, Error> {
        let insert = concat!(
            "INSERT INTO account (username, email, password_hash, is_active, tokens_valid_from, created_at)
             VALUES (?1, ?2, ?3, true, 0, ?4) ON CONFLICT (username) DO NOTHING RETURNING ",
            account_columns!()
        );
        self.writer
            .write(move |connection| {
                connection
                    .prepare_cached(insert)?
                    .query_row(
                        params![
                            user.username,
                            user.email,
                            user.password_hash,
                            user.created_at.0
                        ],
                        user_from_row,
                    )
                    .optional()?
                    .ok_or(Failure::from(Error::UsernameTaken))
            })
            .await
    }

    async fn user(&self, id: UserId) -> Result<Option<User>, Error> {
        self.readers
            .read(move |connection| {
                let mut statement = connection.prepare_cached(USER_BY_ID)?;
                Ok(statement.query_row([id.0], user_from_row).optional()?)
            })
            .await
    }

    async fn user_by_username(&self, username: &str) -> Result<Option<User>, Error> {
        let username = username.to_owned();
        self.readers
            .read(move |connection| {
                let mut statement =
                    connection.prepare_cached(select_user!("WHERE username = ?1"))?;
                Ok(statement.query_row([username], user_from_row).optional()?)
            })
            .await
    }

    async fn users(&self, ids: &[UserId]) -> Result<Vec<User>, Error> {
        let ids: HashSet<UserId> = ids.iter().copied().collect();
        self.readers
            .read(move |connection| {
                let transaction = connection.unchecked_transaction()?;
                let mut statement = transaction.prepare_cached(USER_BY_ID)?;
                let mut users = Vec::with_capacity(ids.len());
                for id in ids {
                    users.extend(statement.query_row([id.0], user_from_row).optional()?);
                }
                Ok(users)
            })
            .await
    }

    async fn list_users(&self, after: Option<UserId>, limit: usize) -> Result<Vec<User>, Error> {
        let after = after.map_or(i64::MIN, |id| id.0);
        self.readers
            .read(move |connection| {
                let mut statement = connection
                    .prepare_cached(select_user!("WHERE id > ?1 ORDER BY id LIMIT ?2"))?;
                let users = statement.query_map([after, sql_limit(limit)], user_from_row)?;
                Ok(users.collect::<Result<_, _>>()?)
            })
            .await
    }

    async fn set_active(&self, id: UserId, active: bool, now: Timestamp) -> Result<bool, Error> {
        self.writer
            .write_vital(move |connection| {
                let found = connection
                    .prepare_cached(
                        "UPDATE account SET is_active = ?2,
                         tokens_valid_from = iif(?2, tokens_valid_from, max(tokens_valid_from, ?3))
                         WHERE id = ?1",
                    )?
                    .execute(params![id.0, active, now.0])?;
                if !active {
                    delete_sessions_of(connection, id)?;
                }
                Ok(found > 0)
            })
            .await
    }

    async fn set_password(
        &self,
        id: UserId,
        password_hash: &str,
        now: Timestamp,
    ) -> Result<bool, Error> {
        let password_hash = password_hash.to_owned();
        self.writer
            .write_vital(move |connection| {
                let found = connection
                    .prepare_cached(
                        "UPDATE account SET password_hash = ?2, tokens_valid_from = max(tokens_valid_from, ?3)
                         WHERE id = ?1",
                    )?
                    .execute(params![id.0, password_hash, now.0])?;
                delete_sessions_of(connection, id)?;
                Ok(found > 0)
            })
            .await
    }

    async fn upgrade_password_hash(
        &self,
        id: UserId,
        old_hash: &str,
        new_hash: &str,
    ) -> Result<bool, Error> {
        let (old_hash, new_hash) = (old_hash.to_owned(), new_hash.to_owned());
        self.writer
            .write(move |connection| {
                let changed = connection
                    .prepare_cached(
                        "UPDATE account SET password_hash = ?3 WHERE id = ?1 AND password_hash = ?2",
                    )?
                    .execute(params![id.0, old_hash, new_hash])?;
                Ok(changed > 0)
            })
            .await
    }

    async fn create_session(&self, session: Session, limit: usize) -> Result<(), Error> {
        self.writer
            .write(move |connection| {
                let Session {
                    token_hash,
                    user_id,
                    created_at,
                    expires_at,
                } = session;
                connection
                    .prepare_cached(DELETE_OLDEST_SESSIONS)?
                    .execute(params![
                        user_id.0,
                        created_at.0,
                        sql_limit(limit.saturating_sub(1))
                    ])?;
                connection
                    .prepare_cached(
                        "INSERT INTO session (token_hash, user_id, created_at, expires_at)
                         VALUES (?1, ?2, ?3, ?4)",
                    )?
                    .execute(params![token_hash, user_id.0, created_at.0, expires_at.0])?;
                Ok(())
            })
            .await
    }

    async fn sessions(&self, hashes: &[[u8; 32]]) -> Result<Vec<Session>, Error> {
        let hashes: HashSet<[u8; 32]> = hashes.iter().copied().collect();
        self.readers
            .read(move |connection| {
                let transaction = connection.unchecked_transaction()?;
                let mut statement = transaction.prepare_cached(
                    "SELECT user_id, created_at, expires_at FROM session WHERE token_hash = ?1",
                )?;
                let mut sessions = Vec::new();
                for token_hash in hashes {
                    let session = statement.query_row([token_hash], |row| {
                        Ok(Session {
                            token_hash,
                            user_id: UserId(row.get("user_id")?),
                            created_at: Timestamp(row.get("created_at")?),
                            expires_at: Timestamp(row.get("expires_at")?),
                        })
                    });
                    sessions.extend(session.optional()?);
                }
                Ok(sessions)
            })
            .await
    }

    async fn log_out(&self, hashes: &[[u8; 32]], token: Option<RevokedToken>) -> Result<(), Error> {
        let hashes = hashes.to_vec();
        self.writer
            .write_vital(move |connection| {
                let mut end =
                    connection.prepare_cached("DELETE FROM session WHERE token_hash = ?1")?;
                for token_hash in &hashes {
                    end.execute([token_hash])?;
                }
                if let Some(token) = &token {
                    connection
                        .prepare_cached(
                            "INSERT INTO revoked_token (jti, expires_at) VALUES (?1, ?2)
                             ON CONFLICT DO UPDATE SET expires_at = max(expires_at, excluded.expires_at)",
                        )?
                        .execute(params![token.jti, token.expires_at.0])?;
                }
                Ok(())
            })
            .await
    }

    async fn move_purge_horizon(
        &self,
        latest: Timestamp,
        step: Duration,
    ) -> Result<Timestamp, Error> {
        let step = i64::try_from(step.as_micros()).unwrap_or(i64::MAX);
        self.writer
            .write(move |connection| {
                let reached: Option<i64> = connection
                    .prepare_cached("SELECT reached FROM purge_horizon")?
                    .query_row([], |row| row.get(0))
                    .optional()?;
                let furthest = reached.map_or(latest.0, |reached| reached.saturating_add(step));
                let horizon = latest.0.min(furthest);
                connection
                    .prepare_cached(
                        "INSERT INTO purge_horizon (id, reached) VALUES (1, ?1)
                         ON CONFLICT DO UPDATE SET reached = excluded.reached",
                    )?
                    .execute([horizon])?;
                Ok(Timestamp(horizon))
            })
            .await
    }

    async fn is_token_revoked(&self, jti: &str) -> Result<bool, Error> {
        let jti = jti.to_owned();
        self.readers
            .read(move |connection| {
                let mut statement =
                    connection.prepare_cached("SELECT 1 FROM revoked_token WHERE jti = ?1")?;
                Ok(statement.exists([jti])?)
            })
            .await
    }

    async fn purge_expired(&self, horizon: Timestamp) -> Result<u64, Error> {
        self.writer
            .write_vital(move |connection| {
                let sessions = connection
                    .prepare_cached("DELETE FROM session WHERE expires_at <= ?1")?
                    .execute([horizon.0])?;
                let tokens = connection
                    .prepare_cached("DELETE FROM revoked_token WHERE expires_at <= ?1")?
                    .execute([horizon.0])?;
                Ok(u64::try_from(sessions + tokens).unwrap_or(u64::MAX))
            })
            .await
    }
}
