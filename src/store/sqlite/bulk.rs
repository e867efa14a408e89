//! Whole rows in bulk, in SQLite.

use std::sync::Arc;

use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::error::Failure;
use super::prompts::prompt_from_row;
use super::vectors::number_model;
use super::{SqliteStore, sql_limit};
use crate::domain::{
    FailureCode, LastIds, ModelId, PromptId, PromptRecord, PromptStatus, Timestamp, User, UserId,
    VectorRecord,
};
use crate::store::{BulkStore, Error, KeyRecord, Put, RevokedToken, Session, UpstreamDay};

/// The first twelve columns are those that `prompt_from_row` reads.
const RECORDS_AFTER: &str =
    "SELECT p.id, p.user_id, p.created_at, p.status, p.error, p.model, p.prompt, p.response,
            p.llm_duration_ms, p.prompt_tokens, p.completion_tokens, p.finish_reason, m.name, e.embedding
     FROM prompt p
     LEFT JOIN prompt_embedding e ON e.user_id = p.user_id AND e.prompt_id = p.id
     LEFT JOIN embedding_model m ON m.id = e.model_id
     WHERE p.id > ?1 ORDER BY p.id LIMIT ?2";

fn record_from_row(row: &Row<'_>) -> Result<PromptRecord, Failure> {
    let model: Option<String> = row.get(12)?;
    let vector = model
        .map(|name| -> Result<_, Failure> {
            Ok(VectorRecord {
                model: ModelId(Arc::from(name)),
                f16_bytes: row.get(13)?,
            })
        })
        .transpose()?;
    Ok(PromptRecord {
        prompt: prompt_from_row(row)?,
        vector,
    })
}

fn put_user(connection: &Connection, user: &User) -> Result<Put, Failure> {
    let name: Option<String> = connection
        .prepare_cached("SELECT username FROM account WHERE id = ?1")?
        .query_row([user.id.0], |row| row.get(0))
        .optional()?;
    if let Some(name) = name {
        let same = name == user.username;
        return Ok(if same { Put::Present } else { Put::Taken });
    }
    let stored = connection
        .prepare_cached(
            "INSERT INTO account (id, username, email, password_hash, is_active, tokens_valid_from, created_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT (username) DO NOTHING",
        )?
        .execute(params![
            user.id.0,
            user.username,
            user.email,
            user.password_hash,
            user.is_active,
            user.tokens_valid_from.0,
            user.created_at.0
        ])?;
    Ok(if stored > 0 { Put::Stored } else { Put::Taken })
}

fn put_prompt(connection: &Connection, record: &PromptRecord) -> Result<Put, Failure> {
    let new = &record.prompt;
    let same: Option<bool> = connection
        .prepare_cached(
            "SELECT user_id = ?2 AND created_at = ?3 AND prompt = ?4 FROM prompt WHERE id = ?1",
        )?
        .query_row(
            params![new.id.0, new.user_id.0, new.created_at.0, new.prompt],
            |row| row.get(0),
        )
        .optional()?;
    if let Some(same) = same {
        return Ok(if same { Put::Present } else { Put::Taken });
    }
    connection
        .prepare_cached(
            "INSERT INTO prompt (id, user_id, created_at, status, error, llm_duration_ms, prompt_tokens,
             completion_tokens, model, prompt, response, finish_reason)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
        )?
        .execute(params![
            new.id.0,
            new.user_id.0,
            new.created_at.0,
            new.status.as_str(),
            new.error.map(FailureCode::as_str),
            new.call.duration_ms,
            new.call.prompt_tokens,
            new.call.completion_tokens,
            new.model,
            new.prompt,
            new.response,
            new.call.finish_reason,
        ])?;
    if let Some(vector) = &record.vector
        && new.status == PromptStatus::Completed
    {
        let number = number_model(connection, &vector.model, vector.f16_bytes.len() / 2)?;
        connection
            .prepare_cached(
                "INSERT INTO prompt_embedding (user_id, prompt_id, model_id, embedding) VALUES (?1, ?2, ?3, ?4)",
            )?
            .execute(params![new.user_id.0, new.id.0, number, vector.f16_bytes])?;
    }
    Ok(Put::Stored)
}

/// Moves the counter that SQLite keeps for a table with `AUTOINCREMENT`. Its row appears with the table's first row only.
fn raise(connection: &Connection, table: &str, last: i64) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO sqlite_sequence (name, seq)
             SELECT ?1, 0 WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = ?1)",
        )?
        .execute([table])?;
    connection
        .prepare_cached("UPDATE sqlite_sequence SET seq = ?2 WHERE name = ?1 AND seq < ?2")?
        .execute(params![table, last])?;
    Ok(())
}

#[async_trait]
impl BulkStore for SqliteStore {
    async fn last_ids(&self) -> Result<LastIds, Error> {
        self.readers
            .read(|connection| {
                let mut statement = connection.prepare_cached(
                    "SELECT coalesce(max(seq) FILTER (WHERE name = 'account'), 0),
                            coalesce(max(seq) FILTER (WHERE name = 'prompt'), 0)
                     FROM sqlite_sequence",
                )?;
                let last = statement.query_row([], |row| {
                    Ok(LastIds {
                        user: UserId(row.get(0)?),
                        prompt: PromptId(row.get(1)?),
                    })
                })?;
                Ok(last)
            })
            .await
    }

    async fn raise_ids(&self, last: LastIds) -> Result<(), Error> {
        self.writer
            .write(move |connection| {
                raise(connection, "account", last.user.0)?;
                raise(connection, "prompt", last.prompt.0)?;
                Ok(())
            })
            .await
    }

    async fn prompt_records(
        &self,
        after: Option<PromptId>,
        limit: usize,
    ) -> Result<Vec<PromptRecord>, Error> {
        let after = after.map_or(i64::MIN, |id| id.0);
        self.readers
            .read(move |connection| {
                let mut statement = connection.prepare_cached(RECORDS_AFTER)?;
                let records =
                    statement.query_and_then([after, sql_limit(limit)], record_from_row)?;
                records.collect()
            })
            .await
    }

    async fn list_sessions(
        &self,
        after: Option<[u8; 32]>,
        limit: usize,
    ) -> Result<Vec<Session>, Error> {
        self.readers
            .read(move |connection| {
                // No bytes at all sort before any hash.
                let after: &[u8] = after.as_ref().map_or(&[], <[u8; 32]>::as_slice);
                let mut statement = connection.prepare_cached(
                    "SELECT token_hash, user_id, created_at, expires_at FROM session
                     WHERE token_hash > ?1 ORDER BY token_hash LIMIT ?2",
                )?;
                let sessions = statement.query_map(params![after, sql_limit(limit)], |row| {
                    Ok(Session {
                        token_hash: row.get(0)?,
                        user_id: UserId(row.get(1)?),
                        created_at: Timestamp(row.get(2)?),
                        expires_at: Timestamp(row.get(3)?),
                    })
                })?;
                Ok(sessions.collect::<Result<_, _>>()?)
            })
            .await
    }

    async fn list_revoked_tokens(
        &self,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<RevokedToken>, Error> {
        let after = after.map(str::to_owned);
        self.readers
            .read(move |connection| {
                let mut statement = connection.prepare_cached(
                    "SELECT jti, expires_at FROM revoked_token
                     WHERE ?1 IS NULL OR jti > ?1 ORDER BY jti LIMIT ?2",
                )?;
                let tokens = statement.query_map(params![after, sql_limit(limit)], |row| {
                    Ok(RevokedToken {
                        jti: row.get(0)?,
                        expires_at: Timestamp(row.get(1)?),
                    })
                })?;
                Ok(tokens.collect::<Result<_, _>>()?)
            })
            .await
    }

    async fn put_users(&self, users: Vec<User>) -> Result<Vec<Put>, Error> {
        self.writer
            .write(move |connection| {
                users
                    .iter()
                    .map(|user| put_user(connection, user))
                    .collect()
            })
            .await
    }

    async fn put_prompts(&self, prompts: Vec<PromptRecord>) -> Result<Vec<Put>, Error> {
        self.writer
            .write(move |connection| {
                let put = prompts.iter().map(|record| put_prompt(connection, record));
                put.collect()
            })
            .await
    }

    async fn put_sessions(&self, sessions: Vec<Session>) -> Result<(), Error> {
        self.writer
            .write(move |connection| {
                let mut statement = connection.prepare_cached(
                    "INSERT INTO session (token_hash, user_id, created_at, expires_at)
                     VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING",
                )?;
                for session in sessions {
                    statement.execute(params![
                        session.token_hash,
                        session.user_id.0,
                        session.created_at.0,
                        session.expires_at.0
                    ])?;
                }
                Ok(())
            })
            .await
    }

    async fn put_revoked_tokens(&self, tokens: Vec<RevokedToken>) -> Result<(), Error> {
        self.writer
            .write(move |connection| {
                let mut statement = connection.prepare_cached(
                    "INSERT INTO revoked_token (jti, expires_at) VALUES (?1, ?2)
                     ON CONFLICT DO UPDATE SET expires_at = max(expires_at, excluded.expires_at)",
                )?;
                for token in tokens {
                    statement.execute(params![token.jti, token.expires_at.0])?;
                }
                Ok(())
            })
            .await
    }

    async fn list_keys(
        &self,
        after: Option<(UserId, [u8; 32])>,
        limit: usize,
    ) -> Result<Vec<KeyRecord>, Error> {
        self.readers
            .read(move |connection| {
                let (user, hash) = after.as_ref().map_or((i64::MIN, &[][..]), |(user, hash)| {
                    (user.0, hash.as_slice())
                });
                let mut statement = connection.prepare_cached(
                    "SELECT user_id, key_hash, fingerprint, prompt_id, claimed_at FROM idempotency_key
                     WHERE (user_id, key_hash) > (?1, ?2) ORDER BY user_id, key_hash LIMIT ?3",
                )?;
                let keys = statement.query_map(params![user, hash, sql_limit(limit)], |row| {
                    Ok(KeyRecord {
                        user_id: UserId(row.get(0)?),
                        key_hash: row.get(1)?,
                        fingerprint: row.get(2)?,
                        prompt_id: PromptId(row.get(3)?),
                        claimed_at: Timestamp(row.get(4)?),
                    })
                })?;
                Ok(keys.collect::<Result<_, _>>()?)
            })
            .await
    }

    async fn put_keys(&self, keys: Vec<KeyRecord>) -> Result<(), Error> {
        self.writer
            .write(move |connection| {
                let mut statement = connection.prepare_cached(
                    "INSERT INTO idempotency_key (user_id, key_hash, fingerprint, prompt_id, claimed_at)
                     VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING",
                )?;
                for key in keys {
                    statement.execute(params![
                        key.user_id.0,
                        key.key_hash,
                        key.fingerprint,
                        key.prompt_id.0,
                        key.claimed_at.0
                    ])?;
                }
                Ok(())
            })
            .await
    }

    async fn list_upstream_days(
        &self,
        after: Option<i64>,
        limit: usize,
    ) -> Result<Vec<UpstreamDay>, Error> {
        self.readers
            .read(move |connection| {
                let mut statement = connection.prepare_cached(
                    "SELECT day, calls FROM upstream_day WHERE ?1 IS NULL OR day > ?1 ORDER BY day LIMIT ?2",
                )?;
                let days = statement.query_map(params![after, sql_limit(limit)], |row| {
                    Ok(UpstreamDay {
                        day: row.get(0)?,
                        calls: row.get(1)?,
                    })
                })?;
                Ok(days.collect::<Result<_, _>>()?)
            })
            .await
    }

    async fn put_upstream_days(&self, days: Vec<UpstreamDay>) -> Result<(), Error> {
        self.writer
            .write(move |connection| {
                let mut statement = connection.prepare_cached(
                    "INSERT INTO upstream_day (day, calls) VALUES (?1, ?2)
                     ON CONFLICT DO UPDATE SET calls = max(calls, excluded.calls)",
                )?;
                for day in days {
                    statement.execute(params![day.day, day.calls])?;
                }
                Ok(())
            })
            .await
    }
}
