//! Whole rows in bulk, in SQLite.

use std::sync::Arc;

use async_trait::async_trait;
use rusqlite::{Connection, Params, params};

use super::statements::{all, execute, one};
use super::usage::{PUT_BUDGET, put_usage_day, put_usage_record};
use super::vectors::put_vector;
use super::{SqliteStore, api_keys, sql_limit};
use crate::domain::{
    FailureCode, LastIds, ModelId, PromptRecord, PromptStatus, Record, RecordCursor, UserBudget,
    VectorRecord,
};
use crate::store::api_keys::API_KEYS_AFTER;
use crate::store::bulk::{
    BUDGETS_AFTER, DAYS_AFTER, KEYS_AFTER, PROMPTS_AFTER, SESSIONS_AFTER, USAGE_AFTER,
    USAGE_DAYS_AFTER, USERS_AFTER, usage_days_after,
};
use crate::store::rows::{self, Defect, StoredRow};
use crate::store::{BulkStore, Error, api_key_columns};

/// The table of accounts, whose counter of ids SQLite keeps by this name.
const ACCOUNTS: &str = "account";

const TOKENS_AFTER: &str = "SELECT CAST(jti AS BLOB) AS jti, expires_at FROM revoked_token
     WHERE ?1 IS NULL OR jti > ?1 ORDER BY revoked_token.jti LIMIT ?2";

const PUT_USER: &str = "INSERT INTO account (id, username, email, password_hash, is_active,
                       tokens_valid_from, created_at)
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT DO NOTHING";

const PUT_PROMPT: &str = "INSERT INTO prompt (id, user_id, created_at, status, error,
                         llm_duration_ms, prompt_tokens, completion_tokens, model, prompt,
                         response, finish_reason, source, cost)
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14) ON CONFLICT DO NOTHING";

const PUT_CHAT: &str = "INSERT INTO chat_call (prompt_id, user_id, metadata, messages, request,
                       answer)
     VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO NOTHING";

const PUT_KEY: &str = "INSERT INTO idempotency_key (user_id, key_hash, fingerprint, prompt_id,
                      claimed_at)
     VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING";

const PUT_DAY: &str = "INSERT INTO upstream_day (day, calls) VALUES (?1, ?2)
     ON CONFLICT DO UPDATE SET calls = max(calls, excluded.calls)";

const PUT_SESSION: &str = "INSERT INTO session (token_hash, user_id, created_at, expires_at)
     VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING";

/// Of a token given twice the later expiry counts.
pub(super) const PUT_TOKEN: &str = "INSERT INTO revoked_token (jti, expires_at) VALUES (?1, ?2)
     ON CONFLICT DO UPDATE SET expires_at = max(expires_at, excluded.expires_at)";

const PUT_API_KEY: &str = concat!(
    "INSERT INTO api_key (",
    api_key_columns!(),
    ") VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)
     ON CONFLICT DO NOTHING"
);

fn prompt_record(row: &dyn StoredRow) -> Result<Record, Error> {
    let model: Option<String> = row.read("embedding_model")?;
    let vector = model.map(|name| -> Result<_, Error> {
        Ok(VectorRecord {
            model: ModelId(Arc::from(name)),
            f16_bytes: row.read("embedding")?,
        })
    });
    Ok(Record::Prompt(PromptRecord {
        prompt: rows::prompt(row)?,
        vector: vector.transpose()?,
        chat: rows::chat_texts_if_any(row)?,
    }))
}

/// The bytes of a hash; none, which sort before any hash, where there is no hash.
fn bytes(hash: Option<[u8; 32]>) -> Vec<u8> {
    hash.map_or_else(Vec::new, Vec::from)
}

fn put(connection: &Connection, record: &Record) -> Result<usize, Error> {
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
        Record::ApiKey(record) => api_keys::insert(connection, PUT_API_KEY, record),
        Record::Usage(record) => put_usage_record(connection, record),
        Record::UsageDay(day) => put_usage_day(connection, day),
        Record::UserBudget(UserBudget { user_id, budget }) => execute(
            connection,
            PUT_BUDGET,
            params![user_id.0, budget.amount.0, budget.period.as_str()],
        ),
    }
}

fn put_prompt(connection: &Connection, record: &PromptRecord) -> Result<usize, Error> {
    let prompt = &record.prompt;
    let stored = execute(
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
            prompt.source.as_str(),
            prompt.call.cost.map(|cost| cost.0),
        ],
    )?;
    if let Some(chat) = &record.chat
        && stored > 0
    {
        execute(
            connection,
            PUT_CHAT,
            params![
                prompt.id.0,
                prompt.user_id.0,
                chat.metadata,
                chat.messages,
                chat.request,
                chat.answer
            ],
        )?;
    }
    if let Some(vector) = &record.vector
        && stored > 0
        && prompt.status == PromptStatus::Completed
    {
        put_vector(connection, prompt.id, &vector.model, &vector.f16_bytes)?;
    }
    Ok(stored)
}

/// Raises the counter that SQLite keeps for a table with `AUTOINCREMENT`. The counter's row appears
/// with the table's first row only.
fn raise(connection: &Connection, table: &str, last: i64) -> Result<(), Error> {
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
        record: fn(&dyn StoredRow) -> Result<Record, Error>,
    ) -> Result<Vec<Record>, Error> {
        self.readers
            .read(move |connection| all(connection, sql, arguments, record))
            .await
    }
}

#[async_trait]
impl BulkStore for SqliteStore {
    async fn last_ids(&self) -> Result<LastIds, Error> {
        self.readers
            .read(|connection| {
                let last = one(
                    connection,
                    "SELECT coalesce(max(seq) FILTER (WHERE name = ?1), 0) AS user_id,
                            coalesce(max(seq) FILTER (WHERE name = 'prompt'), 0) AS prompt_id
                     FROM sqlite_sequence",
                    [ACCOUNTS],
                    rows::last_ids,
                )?;
                Ok(last.ok_or(Defect::UnknownValue)?)
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
        let most = sql_limit(limit);
        match after {
            RecordCursor::Users(after) => {
                let after = after.map_or(i64::MIN, |id| id.0);
                self.select(USERS_AFTER, (after, most), rows::user_record)
                    .await
            }
            RecordCursor::Prompts(after) => {
                let after = after.map_or(i64::MIN, |id| id.0);
                let arguments = (after, most);
                self.select(PROMPTS_AFTER, arguments, prompt_record).await
            }
            RecordCursor::Keys(after) => {
                let user = after.map_or(i64::MIN, |(user, _)| user.0);
                let arguments = (user, bytes(after.map(|(_, hash)| hash)), most);
                self.select(KEYS_AFTER, arguments, rows::key_record).await
            }
            RecordCursor::UpstreamDays(after) => {
                self.select(DAYS_AFTER, (after, most), rows::day_record)
                    .await
            }
            RecordCursor::Sessions(after) => {
                let arguments = (bytes(after), most);
                self.select(SESSIONS_AFTER, arguments, rows::session_record)
                    .await
            }
            RecordCursor::RevokedTokens(after) => {
                self.select(TOKENS_AFTER, (after, most), rows::token_record)
                    .await
            }
            RecordCursor::ApiKeys(after) => {
                let after = after.map_or_else(String::new, |id| id.to_string());
                self.select(API_KEYS_AFTER, (after, most), rows::api_key_record)
                    .await
            }
            RecordCursor::Usage(after) => {
                let after = after.unwrap_or(i64::MIN);
                self.select(USAGE_AFTER, (after, most), rows::usage_record)
                    .await
            }
            RecordCursor::UsageDays(after) => {
                let (user, day, key, model) = usage_days_after(after);
                let arguments = (user, day, key, model, most);
                self.select(USAGE_DAYS_AFTER, arguments, rows::usage_day_record)
                    .await
            }
            RecordCursor::UserBudgets(after) => {
                let after = after.map_or(i64::MIN, |id| id.0);
                self.select(BUDGETS_AFTER, (after, most), rows::user_budget_record)
                    .await
            }
        }
    }

    async fn put(&self, records: Vec<Record>) -> Result<(), Error> {
        self.writer
            .write(move |connection| {
                records
                    .iter()
                    .try_for_each(|record| put(connection, record).map(drop))
            })
            .await
    }
}
