//! Accounts, sessions and revoked tokens in PostgreSQL. Nearly each call is one statement, so that
//! it is one round trip and one transaction.

use std::time::Duration;

use super::pool::{LONG_PATIENCE, PATIENCE};
use super::prompts::LOCK_ACCOUNT;
use super::{PostgresStore, all, first, get, one, sql_limit};
use crate::domain::{Timestamp, User, UserId};
use crate::store::calls::micros;
use crate::store::rows;
use crate::store::{
    AccountStore, Error, NewUser, RevokedToken, Session, account_columns, select_user,
};
use async_trait::async_trait;

#[async_trait]
impl AccountStore for PostgresStore {
    async fn create_user(&self, user: NewUser) -> Result<User, Error> {
        let rows = self
            .pool
            .write(
                concat!(
                    "INSERT INTO account (username, email, password_hash, is_active, tokens_valid_from, created_at)
                     VALUES ($1, $2, $3, true, 0, $4) ON CONFLICT (username) DO NOTHING RETURNING ",
                    account_columns!()
                ),
                &[
                    &user.username,
                    &user.email,
                    &user.password_hash,
                    &user.created_at.0,
                ],
            )
            .await?;
        first(&rows, rows::user)?.ok_or(Error::UsernameTaken)
    }

    async fn user_by_username(&self, username: &str) -> Result<Option<User>, Error> {
        // No stored text has a NUL, and the server takes none as an argument.
        if username.contains('\0') {
            return Ok(None);
        }
        let rows = self
            .pool
            .query(select_user!("WHERE username = $1"), &[&username])
            .await?;
        first(&rows, rows::user)
    }

    async fn users(&self, ids: &[UserId]) -> Result<Vec<User>, Error> {
        let ids: Vec<i64> = ids.iter().map(|id| id.0).collect();
        let rows = self
            .pool
            .query(select_user!("WHERE id = ANY ($1)"), &[&ids])
            .await?;
        all(&rows, rows::user)
    }

    async fn set_active(&self, id: UserId, active: bool, now: Timestamp) -> Result<bool, Error> {
        let rows = self
            .pool
            .write(
                "WITH ended AS (DELETE FROM session WHERE user_id = $1 AND NOT $2)
                 UPDATE account SET is_active = $2, tokens_valid_from =
                     CASE WHEN $2 THEN tokens_valid_from ELSE greatest(tokens_valid_from, $3) END
                 WHERE id = $1 RETURNING 1",
                &[&id.0, &active, &now.0],
            )
            .await?;
        Ok(!rows.is_empty())
    }

    async fn set_password(
        &self,
        id: UserId,
        password_hash: &str,
        now: Timestamp,
    ) -> Result<bool, Error> {
        let rows = self
            .pool
            .write(
                "WITH ended AS (DELETE FROM session WHERE user_id = $1)
                 UPDATE account SET password_hash = $2, tokens_valid_from = greatest(tokens_valid_from, $3)
                 WHERE id = $1 RETURNING 1",
                &[&id.0, &password_hash, &now.0],
            )
            .await?;
        Ok(!rows.is_empty())
    }

    async fn upgrade_password_hash(
        &self,
        id: UserId,
        old_hash: &str,
        new_hash: &str,
    ) -> Result<bool, Error> {
        let rows = self
            .pool
            .write(
                "UPDATE account SET password_hash = $3 WHERE id = $1 AND password_hash = $2 RETURNING 1",
                &[&id.0, &old_hash, &new_hash],
            )
            .await?;
        Ok(!rows.is_empty())
    }

    async fn create_session(&self, session: Session, limit: usize) -> Result<(), Error> {
        let user = session.user_id.0;
        let mut connection = self.pool.connection(PATIENCE).await?;
        connection.begin().await?;
        // Logins of one user take turns: the statement below counts what the one before has stored.
        connection.query(LOCK_ACCOUNT, &[&user]).await?;
        connection
            .write(
                "WITH ended AS (
                     DELETE FROM session WHERE token_hash IN (
                         SELECT token_hash FROM session WHERE user_id = $2 AND expires_at > $3
                         ORDER BY created_at DESC, token_hash DESC OFFSET $5
                     )
                 )
                 INSERT INTO session (token_hash, user_id, created_at, expires_at)
                 VALUES ($1, $2, $3, $4)",
                &[
                    &session.token_hash.as_slice(),
                    &user,
                    &session.created_at.0,
                    &session.expires_at.0,
                    &sql_limit(limit.saturating_sub(1)),
                ],
            )
            .await?;
        connection.commit().await
    }

    async fn sessions(&self, hashes: &[[u8; 32]]) -> Result<Vec<Session>, Error> {
        let hashes: Vec<&[u8]> = hashes.iter().map(<[u8; 32]>::as_slice).collect();
        let rows = self
            .pool
            .query(
                "SELECT token_hash, user_id, created_at, expires_at FROM session
                 WHERE token_hash = ANY ($1)",
                &[&hashes],
            )
            .await?;
        all(&rows, rows::session)
    }

    async fn log_out(&self, hashes: &[[u8; 32]], token: Option<RevokedToken>) -> Result<(), Error> {
        let hashes: Vec<&[u8]> = hashes.iter().map(<[u8; 32]>::as_slice).collect();
        let (jti, expires_at) = match &token {
            Some(token) => (Some(token.jti.as_bytes()), token.expires_at.0),
            None => (None, 0),
        };
        self.pool
            .write(
                "WITH ended AS (DELETE FROM session WHERE token_hash = ANY ($1))
                 INSERT INTO revoked_token (jti, expires_at)
                 SELECT $2::bytea, $3::bigint WHERE $2::bytea IS NOT NULL
                 ON CONFLICT (jti) DO UPDATE
                     SET expires_at = greatest(revoked_token.expires_at, excluded.expires_at)",
                &[&hashes, &jti, &expires_at],
            )
            .await?;
        Ok(())
    }

    async fn move_purge_horizon(
        &self,
        latest: Timestamp,
        step: Duration,
    ) -> Result<Timestamp, Error> {
        let rows = self
            .pool
            .write(
                // The sum may leave the range of bigint.
                "INSERT INTO purge_horizon AS h (id, reached) VALUES (1, $1)
                 ON CONFLICT (id) DO UPDATE SET
                     reached = least(excluded.reached, h.reached::numeric + $2::bigint)::bigint
                 RETURNING reached",
                &[&latest.0, &micros(step)],
            )
            .await?;
        Ok(Timestamp(get(&one(rows)?, "reached")?))
    }

    async fn is_token_revoked(&self, jti: &str) -> Result<bool, Error> {
        let rows = self
            .pool
            .query(
                "SELECT 1 FROM revoked_token WHERE jti = $1",
                &[&jti.as_bytes()],
            )
            .await?;
        Ok(!rows.is_empty())
    }

    async fn purge_expired(&self, horizon: Timestamp) -> Result<u64, Error> {
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        let rows = connection
            .write(
                "WITH sessions AS (DELETE FROM session WHERE expires_at <= $1 RETURNING 1),
                      tokens AS (DELETE FROM revoked_token WHERE expires_at <= $1 RETURNING 1)
                 SELECT (SELECT count(*) FROM sessions) + (SELECT count(*) FROM tokens) AS n",
                &[&horizon.0],
            )
            .await?;
        let forgotten: i64 = get(&one(rows)?, "n")?;
        Ok(u64::try_from(forgotten).unwrap_or(0))
    }
}
