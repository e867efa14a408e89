//! Accounts, sessions and revoked tokens in SQLite.

use std::collections::HashSet;
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::params;

use super::statements::{execute, one};
use super::{SqliteStore, sql_limit};
use crate::domain::{Timestamp, User, UserId};
use crate::store::calls::micros;
use crate::store::{
    AccountStore, Error, NewUser, RevokedToken, Session, account_columns, rows, select_user,
};

/// `?1` user, `?2` the present, `?3` how many are left.
const DELETE_OLDEST_SESSIONS: &str = "DELETE FROM session WHERE token_hash IN (
         SELECT token_hash FROM session WHERE user_id = ?1 AND expires_at > ?2
         ORDER BY created_at DESC, token_hash DESC LIMIT -1 OFFSET ?3
     )";

const DELETE_SESSIONS_OF: &str = "DELETE FROM session WHERE user_id = ?1";

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
                let created = params![
                    user.username,
                    user.email,
                    user.password_hash,
                    user.created_at.0
                ];
                one(connection, insert, created, rows::user)?.ok_or(Error::UsernameTaken)
            })
            .await
    }

    async fn user_by_username(&self, username: &str) -> Result<Option<User>, Error> {
        let (sql, username) = (select_user!("WHERE username = ?1"), username.to_owned());
        self.readers
            .read(move |connection| one(connection, sql, [username], rows::user))
            .await
    }

    async fn users(&self, ids: &[UserId]) -> Result<Vec<User>, Error> {
        let ids: HashSet<UserId> = ids.iter().copied().collect();
        self.readers
            .read(move |connection| {
                let transaction = connection.unchecked_transaction()?;
                let mut users = Vec::with_capacity(ids.len());
                for id in ids {
                    let by_id = select_user!("WHERE id = ?1");
                    users.extend(one(&transaction, by_id, [id.0], rows::user)?);
                }
                Ok(users)
            })
            .await
    }

    async fn set_active(&self, id: UserId, active: bool, now: Timestamp) -> Result<bool, Error> {
        self.writer
            .write_vital(move |connection| {
                let found = execute(
                    connection,
                    "UPDATE account SET is_active = ?2,
                     tokens_valid_from = iif(?2, tokens_valid_from, max(tokens_valid_from, ?3))
                     WHERE id = ?1",
                    params![id.0, active, now.0],
                )?;
                if !active {
                    execute(connection, DELETE_SESSIONS_OF, [id.0])?;
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
                let found = execute(
                    connection,
                    "UPDATE account SET password_hash = ?2, tokens_valid_from = max(tokens_valid_from, ?3)
                     WHERE id = ?1",
                    params![id.0, password_hash, now.0],
                )?;
                execute(connection, DELETE_SESSIONS_OF, [id.0])?;
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
        let sql = "UPDATE account SET password_hash = ?3 WHERE id = ?1 AND password_hash = ?2";
        let arguments = (id.0, old_hash.to_owned(), new_hash.to_owned());
        self.writer
            .write(move |connection| Ok(execute(connection, sql, arguments)? > 0))
            .await
    }

    async fn create_session(&self, session: Session, limit: usize) -> Result<(), Error> {
        let rest = sql_limit(limit.saturating_sub(1));
        self.writer
            .write(move |connection| {
                let (user, created_at) = (session.user_id.0, session.created_at.0);
                execute(connection, DELETE_OLDEST_SESSIONS, [user, created_at, rest])?;
                execute(
                    connection,
                    "INSERT INTO session (token_hash, user_id, created_at, expires_at)
                     VALUES (?1, ?2, ?3, ?4)",
                    params![session.token_hash, user, created_at, session.expires_at.0],
                )?;
                Ok(())
            })
            .await
    }

    async fn sessions(&self, hashes: &[[u8; 32]]) -> Result<Vec<Session>, Error> {
        let hashes: HashSet<[u8; 32]> = hashes.iter().copied().collect();
        let sql = "SELECT token_hash, user_id, created_at, expires_at FROM session
                   WHERE token_hash = ?1";
        self.readers
            .read(move |connection| {
                let transaction = connection.unchecked_transaction()?;
                let mut sessions = Vec::new();
                for token_hash in hashes {
                    sessions.extend(one(&transaction, sql, [token_hash], rows::session)?);
                }
                Ok(sessions)
            })
            .await
    }

    async fn log_out(&self, hashes: &[[u8; 32]], token: Option<RevokedToken>) -> Result<(), Error> {
        let hashes = hashes.to_vec();
        self.writer
            .write_vital(move |connection| {
                for token_hash in &hashes {
                    let end = "DELETE FROM session WHERE token_hash = ?1";
                    execute(connection, end, [token_hash])?;
                }
                if let Some(token) = &token {
                    let arguments = params![token.jti, token.expires_at.0];
                    execute(connection, super::bulk::PUT_TOKEN, arguments)?;
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
        self.writer
            .write(move |connection| {
                let sql = "SELECT reached FROM purge_horizon";
                let reached: Option<i64> = one(connection, sql, [], |row| row.read("reached"))?;
                let furthest =
                    reached.map_or(latest.0, |reached| reached.saturating_add(micros(step)));
                let horizon = latest.0.min(furthest);
                execute(
                    connection,
                    "INSERT INTO purge_horizon (id, reached) VALUES (1, ?1)
                     ON CONFLICT DO UPDATE SET reached = excluded.reached",
                    [horizon],
                )?;
                Ok(Timestamp(horizon))
            })
            .await
    }

    async fn is_token_revoked(&self, jti: &str) -> Result<bool, Error> {
        let (sql, jti) = ("SELECT 1 FROM revoked_token WHERE jti = ?1", jti.to_owned());
        self.readers
            .read(move |connection| Ok(connection.prepare_cached(sql)?.exists([jti])?))
            .await
    }

    async fn purge_expired(&self, horizon: Timestamp) -> Result<u64, Error> {
        self.writer
            .write_vital(move |connection| {
                let mut gone = 0;
                for sql in [
                    "DELETE FROM session WHERE expires_at <= ?1",
                    "DELETE FROM revoked_token WHERE expires_at <= ?1",
                ] {
                    gone += execute(connection, sql, [horizon.0])?;
                }
                Ok(gone as u64)
            })
            .await
    }
}
