//! Whole rows in bulk, in SQLite.

use std::sync::Arc;

use async_trait::async_trait;
use rusqlite::{Connection, Params, Row, params};

use super::error::Failure;
use super::prompts::prompt_from_row;
use super::vectors::number_model;
use super::{SqliteStore, sql_limit};
use crate::domain::{
    FailureCode, KeyRecord, LastIds, ModelId, PromptId, PromptRecord, PromptStatus, Record,
    RecordCursor, RevokedToken, Session, Timestamp, UpstreamDay, UserId, VectorRecord,
};
use crate::store::{AccountStore, BulkStore, Error};

/// The table of accounts, whose counter of ids SQLite keeps by this name.
const ACCOUNTS: &str = "account";

const PROMPTS_AFTER: &str =
    "SELECT p.id, p.user_id, p.created_at, p.status, p.error, p.model, p.prompt, p.response,
            p.llm_duration_ms, p.prompt_tokens, p.completion_tokens, p.finish_reason,
            m.name AS embedding_model, e.embedding
     FROM prompt p
     LEFT JOIN prompt_embedding e ON e.user_id = p.user_id AND e.prompt_id = p.id
     LEFT JOIN embedding_model m ON m.id = e.model_id
     WHERE p.id > ?1 ORDER BY p.id LIMIT ?2";

const KEYS_AFTER: &str =
    "SELECT user_id, key_hash, fingerprint, prompt_id, claimed_at FROM idempotency_key
     WHERE (user_id, key_hash) > (?1, ?2) ORDER BY user_id, key_hash LIMIT ?3";

const DAYS_AFTER: &str =
    "SELECT day, calls FROM upstream_day WHERE ?1 IS NULL OR day > ?1 ORDER BY day LIMIT ?2";

const SESSIONS_AFTER: &str = "SELECT token_hash, user_id, created_at, expires_at FROM session
     WHERE token_hash > ?1 ORDER BY token_hash LIMIT ?2";

const TOKENS_AFTER: &str = "SELECT jti, expires_at FROM revoked_token
     WHERE ?1 IS NULL OR jti > ?1 ORDER BY jti LIMIT ?2";

const PUT_USER: &str = "INSERT INTO account (id, username, email, password_hash, is_active,
                       tokens_valid_from, created_at)
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT DO NOTHING";

const PUT_PROMPT: &str = "INSERT INTO prompt (id, user_id, created_at, status, error,
                         llm_duration_ms, prompt_tokens, completion_tokens, model, prompt,
                         response, finish_reason)
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12) ON CONFLICT DO NOTHING";

const PUT_VECTOR: &str = "INSERT INTO prompt_embedding (user_id, prompt_id, model_id, embedding)
     VALUES (?1, ?2, ?3, ?4)";

const PUT_KEY: &str = "INSERT INTO idempotency_key (user_id, key_hash, fingerprint, prompt_id,
                      claimed_at)
     VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING";

const PUT_DAY: &str = "INSERT INTO upstream_day (day, calls) VALUES (?1, ?2)
     ON CONFLICT DO UPDATE SET calls = max(calls, excluded.calls)";

const PUT_SESSION: &str = "INSERT INTO session (token_hash, user_id, created_at, expires_at)
     VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING";

const PUT_TOKEN: &str = "INSERT INTO revoked_token (jti, expires_at) VALUES (?1, ?2)
     ON CONFLICT DO UPDATE SET expires_at = max(expires_at, excluded.expires_at)";

fn prompt_record(row: &Row<'_>) -> Result<Record, Failure> {
    let model: Option<String> = row.get("embedding_model")?;
    let vector = model.map(|name| -> Result<_, Failure> {
        Ok(VectorRecord {
            model: ModelId(Arc::from(name)),
            f16_bytes: row.get("embedding")?,
        })
    });
    Ok(Record::Prompt(PromptRecord {
        prompt: prompt_from_row(row)?,
        vector: vector.transpose()?,
    }))
}

fn key_record(row: &Row<'_>) -> Result<Record, Failure> {
    Ok(Record::Key(KeyRecord {
        user_id: UserId(row.get("user_id")?),
        key_hash: row.get("key_hash")?,
        fingerprint: row.get("fingerprint")?,
        prompt_id: PromptId(row.get("prompt_id")?),
        claimed_at: Timestamp(row.get("claimed_at")?),
    }))
}

fn day_record(row: &Row<'_>) -> Result<Record, Failure> {
    Ok(Record::UpstreamDay(UpstreamDay {
        day: row.get("day")?,
        calls: row.get("calls")?,
    }))
}

fn session_record(row: &Row<'_>) -> Result<Record, Failure> {
    Ok(Record::Session(Session {
        token_hash: row.get("token_hash")?,
        user_id: UserId(row.get("user_id")?),
        created_at: Timestamp(row.get("created_at")?),
        expires_at: Timestamp(row.get("expires_at")?),
    }))
}

fn token_record(row: &Row<'_>) -> Result<Record, Failure> {
    Ok(Record::RevokedToken(RevokedToken {
        jti: row.get("jti")?,
        expires_at: Timestamp(row.get("expires_at")?),
    }))
}

/// The bytes of a hash; none, which sort before any hash, where there is no hash.
fn bytes(hash: Option<[u8; 32]>) -> Vec<u8> {
    hash.map_or_else(Vec::new, Vec::from)
}

/// Returns whether the row was stored or changed.
fn execute(connection: &Connection, sql: &str, arguments: impl Params) -> Result<bool, Failure> {
    Ok(connection.prepare_cached(sql)?.execute(arguments)? > 0)
}

fn put(connection: &Connection, record: &Record) -> Result<(), Failure> {
    match record {
        Record::User(user) => execute(
            connection,
            PUT_USER,
            params![
                user.id.0,
                user.username,
                user.email,
                user.password_hash,
                user.is_active,
                user.tokens_valid_from.0,
                user.created_at.0
            ],
        ),
        Record::Prompt(record) => put_prompt(connection, record),
        Record::Key(key) => execute(
            connection,
            PUT_KEY,
            params![
                key.user_id.0,
                key.key_hash,
                key.fingerprint,
                key.prompt_id.0,
                key.claimed_at.0
            ],
        ),
        Record::UpstreamDay(day) => execute(connection, PUT_DAY, params![day.day, day.calls]),
        Record::Session(session) => execute(
            connection,
            PUT_SESSION,
            params![
                session.token_hash,
                session.user_id.0,
                session.created_at.0,
                session.expires_at.0
            ],
        ),
        Record::RevokedToken(token) => execute(
            connection,
            PUT_TOKEN,
            params![token.jti, token.expires_at.0],
        ),
    }
    .map(drop)
}

fn put_prompt(connection: &Connection, record: &PromptRecord) -> Result<bool, Failure> {
    let prompt = &record.prompt;
    let is_stored = execute(
        connection,
        PUT_PROMPT,
        params![
            prompt.id.0,
            prompt.user_id.0,
            prompt.created_at.0,
            prompt.status.as_str(),
            prompt.error.map(FailureCode::as_str),
            prompt.call.duration_ms,
            prompt.call.prompt_tokens,
            prompt.call.completion_tokens,
            prompt.model,
            prompt.prompt,
            prompt.response,
            prompt.call.finish_reason,
        ],
    )?;
    if let Some(vector) = &record.vector
        && is_stored
        && prompt.status == PromptStatus::Completed
    {
        let number = number_model(connection, &vector.model, vector.f16_bytes.len() / 2)?;
        let arguments = params![prompt.user_id.0, prompt.id.0, number, vector.f16_bytes];
        execute(connection, PUT_VECTOR, arguments)?;
    }
    Ok(is_stored)
}

/// Raises the counter that SQLite keeps for a table with `AUTOINCREMENT`. The counter's row appears
/// with the table's first row only.
fn raise(connection: &Connection, table: &str, last: i64) -> Result<(), Failure> {
    const ADD: &str = "INSERT INTO sqlite_sequence (name, seq)
         SELECT ?1, 0 WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = ?1)";
    const RAISE: &str = "UPDATE sqlite_sequence SET seq = ?2 WHERE name = ?1 AND seq < ?2";
    execute(connection, ADD, [table])?;
    execute(connection, RAISE, params![table, last])?;
    Ok(())
}

impl SqliteStore {
    async fn select(
        &self,
        sql: &'static str,
        arguments: impl Params + Send + 'static,
        record: fn(&Row<'_>) -> Result<Record, Failure>,
    ) -> Result<Vec<Record>, Error> {
        self.readers
            .read(move |connection| {
                let mut statement = connection.prepare_cached(sql)?;
                statement.query_and_then(arguments, record)?.collect()
            })
            .await
    }
}

#[async_trait]
impl BulkStore for SqliteStore {
    async fn last_ids(&self) -> Result<LastIds, Error> {
        self.readers
            .read(|connection| {
                let mut statement = connection.prepare_cached(
                    "SELECT coalesce(max(seq) FILTER (WHERE name = ?1), 0) AS user_id,
                            coalesce(max(seq) FILTER (WHERE name = 'prompt'), 0) AS prompt_id
                     FROM sqlite_sequence",
                )?;
                let last = statement.query_row([ACCOUNTS], |row| {
                    Ok(LastIds {
                        user: UserId(row.get("user_id")?),
                        prompt: PromptId(row.get("prompt_id")?),
                    })
                })?;
                Ok(last)
            })
            .await
    }

    async fn raise_ids(&self, last: LastIds) -> Result<(), Error> {
        self.writer
            .write(move |connection| {
                raise(connection, ACCOUNTS, last.user.0)?;
                raise(connection, "prompt", last.prompt.0)
            })
            .await
    }

    async fn records(&self, after: RecordCursor, limit: usize) -> Result<Vec<Record>, Error> {
        let rows = sql_limit(limit);
        match after {
            RecordCursor::Users(after) => {
                let users = self.list_users(after, limit).await?;
                Ok(users.into_iter().map(Record::User).collect())
            }
            RecordCursor::Prompts(after) => {
                let after = after.map_or(i64::MIN, |id| id.0);
                let arguments = (after, rows);
                self.select(PROMPTS_AFTER, arguments, prompt_record).await
            }
            RecordCursor::Keys(after) => {
                let user = after.map_or(i64::MIN, |(user, _)| user.0);
                let arguments = (user, bytes(after.map(|(_, hash)| hash)), rows);
                self.select(KEYS_AFTER, arguments, key_record).await
            }
            RecordCursor::UpstreamDays(after) => {
                self.select(DAYS_AFTER, (after, rows), day_record).await
            }
            RecordCursor::Sessions(after) => {
                let arguments = (bytes(after), rows);
                self.select(SESSIONS_AFTER, arguments, session_record).await
            }
            RecordCursor::RevokedTokens(after) => {
                self.select(TOKENS_AFTER, (after, rows), token_record).await
            }
        }
    }

    async fn put(&self, records: Vec<Record>) -> Result<(), Error> {
        self.writer
            .write(move |connection| {
                records
                    .iter()
                    .try_for_each(|record| put(connection, record))
            })
            .await
    }
}
