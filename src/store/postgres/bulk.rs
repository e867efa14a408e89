//! Whole rows in bulk, in PostgreSQL. A page of rows goes in by one statement, as arrays of columns.

use async_trait::async_trait;
use pgvector::HalfVector;
use tokio_postgres::Row;

use super::error::Cause;
use super::pool::LONG_PATIENCE;
use super::prompts::{prompt_from_row, without_nul};
use super::{PostgresStore, bulk_calls, get, sql_limit};
use crate::domain::{
    FailureCode, LastIds, ModelId, PromptId, PromptRecord, PromptStatus, Timestamp, User, UserId,
    VectorRecord,
};
use crate::store::{BulkStore, Error, KeyRecord, Put, RevokedToken, Session, UpstreamDay};

/// The first twelve columns are those that `prompt_from_row` reads.
const RECORDS_AFTER: &str = "
    SELECT p.id, p.user_id, p.created_at, p.status, p.error, p.model, p.prompt, p.response,
           p.llm_duration_ms, p.prompt_tokens, p.completion_tokens, p.finish_reason, m.name, e.embedding
    FROM prompt p
    LEFT JOIN prompt_embedding e ON e.prompt_id = p.id
    LEFT JOIN embedding_model m ON m.id = e.model_id
    WHERE p.id > $1 ORDER BY p.id LIMIT $2";

/// Answers, for each row given and in their order, whether it was stored, and if not whether it is the same as the one there.
const PUT_USERS: &str = "
    WITH given AS (
        SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::boolean[], $6::bigint[], $7::bigint[])
            WITH ORDINALITY AS row (id, username, email, password_hash, is_active, tokens_valid_from, created_at, place)
    ), stored AS (
        INSERT INTO account (id, username, email, password_hash, is_active, tokens_valid_from, created_at)
        OVERRIDING SYSTEM VALUE
        SELECT id, username, email, password_hash, is_active, tokens_valid_from, created_at FROM given
        ON CONFLICT DO NOTHING RETURNING id
    )
    SELECT stored.id IS NOT NULL, coalesce(known.username = given.username COLLATE \"C\", false)
    FROM given LEFT JOIN stored ON stored.id = given.id LEFT JOIN account known ON known.id = given.id
    ORDER BY place";

/// The same for prompts. The vectors come as rows of their own, for those prompts that have one.
const PUT_PROMPTS: &str = "
    WITH given AS (
        SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::bigint[], $7::bigint[],
                             $8::bigint[], $9::text[], $10::text[], $11::text[], $12::text[])
            WITH ORDINALITY AS row (id, user_id, created_at, status, error, llm_duration_ms, prompt_tokens,
                                    completion_tokens, model, prompt, response, finish_reason, place)
    ), stored AS (
        INSERT INTO prompt (id, user_id, created_at, status, error, llm_duration_ms, prompt_tokens, completion_tokens, model,
                            prompt, response, finish_reason)
        OVERRIDING SYSTEM VALUE
        SELECT id, user_id, created_at, status, error, llm_duration_ms, prompt_tokens, completion_tokens, model,
               prompt, response, finish_reason FROM given
        ON CONFLICT DO NOTHING RETURNING id, user_id
    ), embedded AS (
        INSERT INTO prompt_embedding (prompt_id, user_id, model_id, embedding)
        SELECT stored.id, stored.user_id, vector.model_id, vector.embedding
        FROM unnest($13::bigint[], $14::integer[], $15::halfvec[]) AS vector (id, model_id, embedding)
        JOIN stored ON stored.id = vector.id
    )
    SELECT stored.id IS NOT NULL,
           coalesce(known.user_id = given.user_id AND known.created_at = given.created_at AND known.prompt = given.prompt, false)
    FROM given LEFT JOIN stored ON stored.id = given.id LEFT JOIN prompt known ON known.id = given.id
    ORDER BY place";

/// Moves a table's counter up to an id, never down.
macro_rules! raise {
    ($table:literal) => {
        concat!(
            "SELECT setval(pg_get_serial_sequence('",
            $table,
            "', 'id'), $1)
             WHERE $1 > coalesce(pg_sequence_last_value(pg_get_serial_sequence('",
            $table,
            "', 'id')::regclass), 0)"
        )
    };
}

fn record_from_row(row: &Row) -> Result<PromptRecord, Error> {
    let model: Option<&str> = get(row, 12)?;
    let vector: Option<HalfVector> = get(row, 13)?;
    Ok(PromptRecord {
        prompt: prompt_from_row(row)?,
        vector: model.zip(vector).map(|(model, vector)| VectorRecord {
            model: ModelId(model.into()),
            f16_bytes: vector
                .as_slice()
                .iter()
                .flat_map(|half| half.to_le_bytes())
                .collect(),
        }),
    })
}

fn put_from_row(row: &Row) -> Result<Put, Error> {
    Ok(match (get(row, 0)?, get(row, 1)?) {
        (true, _) => Put::Stored,
        (false, true) => Put::Present,
        (false, false) => Put::Taken,
    })
}

fn halves(bytes: &[u8]) -> HalfVector {
    let (halves, _) = bytes.as_chunks::<2>();
    HalfVector::from(
        halves
            .iter()
            .copied()
            .map(half::f16::from_le_bytes)
            .collect::<Vec<_>>(),
    )
}

#[async_trait]
impl BulkStore for PostgresStore {
    async fn last_ids(&self) -> Result<LastIds, Error> {
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        let row = connection
            .query_opt(
                "SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('account', 'id')::regclass), 0),
                        coalesce(pg_sequence_last_value(pg_get_serial_sequence('prompt', 'id')::regclass), 0)",
                &[],
            )
            .await?
            .ok_or(Cause::UnknownValue)?;
        Ok(LastIds {
            user: UserId(get(&row, 0)?),
            prompt: PromptId(get(&row, 1)?),
        })
    }

    async fn raise_ids(&self, last: LastIds) -> Result<(), Error> {
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        connection.write(raise!("account"), &[&last.user.0]).await?;
        connection
            .write(raise!("prompt"), &[&last.prompt.0])
            .await?;
        Ok(())
    }

    async fn prompt_records(
        &self,
        after: Option<PromptId>,
        limit: usize,
    ) -> Result<Vec<PromptRecord>, Error> {
        let after = after.map_or(i64::MIN, |id| id.0);
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        let rows = connection
            .query(RECORDS_AFTER, &[&after, &sql_limit(limit)])
            .await?;
        rows.iter().map(record_from_row).collect()
    }

    async fn list_sessions(
        &self,
        after: Option<[u8; 32]>,
        limit: usize,
    ) -> Result<Vec<Session>, Error> {
        // No bytes at all sort before any hash.
        let after: &[u8] = after.as_ref().map_or(&[], <[u8; 32]>::as_slice);
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        let rows = connection
            .query(
                "SELECT token_hash, user_id, created_at, expires_at FROM session
                 WHERE token_hash > $1 ORDER BY token_hash LIMIT $2",
                &[&after, &sql_limit(limit)],
            )
            .await?;
        rows.iter()
            .map(|row| {
                let hash: &[u8] = get(row, 0)?;
                Ok(Session {
                    token_hash: hash.try_into().map_err(|_| Cause::UnknownValue)?,
                    user_id: UserId(get(row, 1)?),
                    created_at: Timestamp(get(row, 2)?),
                    expires_at: Timestamp(get(row, 3)?),
                })
            })
            .collect()
    }

    async fn list_revoked_tokens(
        &self,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<RevokedToken>, Error> {
        let after = after.map(str::as_bytes);
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        let rows = connection
            .query(
                "SELECT jti, expires_at FROM revoked_token
                 WHERE $1::bytea IS NULL OR jti > $1 ORDER BY jti LIMIT $2",
                &[&after, &sql_limit(limit)],
            )
            .await?;
        rows.iter()
            .map(|row| {
                let jti = String::from_utf8(get(row, 0)?).map_err(|_| Cause::UnknownValue)?;
                Ok(RevokedToken {
                    jti,
                    expires_at: Timestamp(get(row, 1)?),
                })
            })
            .collect()
    }

    async fn put_users(&self, users: Vec<User>) -> Result<Vec<Put>, Error> {
        let ids: Vec<i64> = users.iter().map(|user| user.id.0).collect();
        let names: Vec<&str> = users.iter().map(|user| user.username.as_str()).collect();
        let emails: Vec<&str> = users.iter().map(|user| user.email.as_str()).collect();
        let hashes: Vec<&str> = users
            .iter()
            .map(|user| user.password_hash.as_str())
            .collect();
        let active: Vec<bool> = users.iter().map(|user| user.is_active).collect();
        let since: Vec<i64> = users.iter().map(|user| user.tokens_valid_from.0).collect();
        let made: Vec<i64> = users.iter().map(|user| user.created_at.0).collect();
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        // First, because the counter does not go back with a transaction that fails, and must not stay behind one that does not.
        let highest = ids.iter().copied().max().unwrap_or(0);
        connection.write(raise!("account"), &[&highest]).await?;
        let rows = connection
            .write(
                PUT_USERS,
                &[&ids, &names, &emails, &hashes, &active, &since, &made],
            )
            .await?;
        rows.iter().map(put_from_row).collect()
    }

    async fn put_prompts(&self, prompts: Vec<PromptRecord>) -> Result<Vec<Put>, Error> {
        let mut columns = Columns::default();
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        for record in prompts {
            let vector = record.vector.as_ref();
            if let Some(vector) = vector.filter(|_| record.prompt.status == PromptStatus::Completed)
            {
                let length = vector.f16_bytes.len() / 2;
                let number = self
                    .models
                    .number_for(&mut connection, &vector.model, length)
                    .await?;
                columns.embedded.push(record.prompt.id.0);
                columns.models.push(number);
                columns.vectors.push(halves(&vector.f16_bytes));
            }
            columns.push(record);
        }
        let highest = columns.ids.iter().copied().max().unwrap_or(0);
        connection.write(raise!("prompt"), &[&highest]).await?;
        let rows = connection
            .write(
                PUT_PROMPTS,
                &[
                    &columns.ids,
                    &columns.owners,
                    &columns.made,
                    &columns.statuses,
                    &columns.errors,
                    &columns.durations,
                    &columns.asked,
                    &columns.answered,
                    &columns.names,
                    &columns.texts,
                    &columns.responses,
                    &columns.reasons,
                    &columns.embedded,
                    &columns.models,
                    &columns.vectors,
                ],
            )
            .await?;
        rows.iter().map(put_from_row).collect()
    }

    async fn put_sessions(&self, sessions: Vec<Session>) -> Result<(), Error> {
        let hashes: Vec<&[u8]> = sessions
            .iter()
            .map(|session| session.token_hash.as_slice())
            .collect();
        let owners: Vec<i64> = sessions.iter().map(|session| session.user_id.0).collect();
        let made: Vec<i64> = sessions
            .iter()
            .map(|session| session.created_at.0)
            .collect();
        let ends: Vec<i64> = sessions
            .iter()
            .map(|session| session.expires_at.0)
            .collect();
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        connection
            .write(
                "INSERT INTO session (token_hash, user_id, created_at, expires_at)
                 SELECT * FROM unnest($1::bytea[], $2::bigint[], $3::bigint[], $4::bigint[])
                 ON CONFLICT DO NOTHING",
                &[&hashes, &owners, &made, &ends],
            )
            .await?;
        Ok(())
    }

    async fn put_revoked_tokens(&self, tokens: Vec<RevokedToken>) -> Result<(), Error> {
        let ids: Vec<&[u8]> = tokens.iter().map(|token| token.jti.as_bytes()).collect();
        let ends: Vec<i64> = tokens.iter().map(|token| token.expires_at.0).collect();
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        connection
            .write(
                "INSERT INTO revoked_token (jti, expires_at)
                 SELECT jti, max(expires_at) FROM unnest($1::bytea[], $2::bigint[]) AS row (jti, expires_at) GROUP BY jti
                 ON CONFLICT (jti) DO UPDATE SET expires_at = greatest(revoked_token.expires_at, excluded.expires_at)",
                &[&ids, &ends],
            )
            .await?;
        Ok(())
    }

    async fn list_keys(
        &self,
        after: Option<(UserId, [u8; 32])>,
        limit: usize,
    ) -> Result<Vec<KeyRecord>, Error> {
        bulk_calls::list_keys(&self.pool, after, limit).await
    }

    async fn put_keys(&self, keys: Vec<KeyRecord>) -> Result<(), Error> {
        bulk_calls::put_keys(&self.pool, keys).await
    }

    async fn list_upstream_days(
        &self,
        after: Option<i64>,
        limit: usize,
    ) -> Result<Vec<UpstreamDay>, Error> {
        bulk_calls::list_upstream_days(&self.pool, after, limit).await
    }

    async fn put_upstream_days(&self, days: Vec<UpstreamDay>) -> Result<(), Error> {
        bulk_calls::put_upstream_days(&self.pool, days).await
    }
}

/// The columns of the prompts to be put.
#[derive(Default)]
struct Columns {
    ids: Vec<i64>,
    owners: Vec<i64>,
    made: Vec<i64>,
    statuses: Vec<&'static str>,
    errors: Vec<Option<&'static str>>,
    durations: Vec<Option<i64>>,
    asked: Vec<Option<i64>>,
    answered: Vec<Option<i64>>,
    names: Vec<String>,
    texts: Vec<String>,
    responses: Vec<Option<String>>,
    reasons: Vec<Option<String>>,
    /// The prompts that have a vector, and theirs.
    embedded: Vec<i64>,
    models: Vec<i32>,
    vectors: Vec<HalfVector>,
}

impl Columns {
    fn push(&mut self, record: PromptRecord) {
        let prompt = record.prompt;
        self.ids.push(prompt.id.0);
        self.owners.push(prompt.user_id.0);
        self.made.push(prompt.created_at.0);
        self.statuses.push(prompt.status.as_str());
        self.errors.push(prompt.error.map(FailureCode::as_str));
        self.durations.push(prompt.call.duration_ms.map(i64::from));
        self.asked.push(prompt.call.prompt_tokens.map(i64::from));
        self.answered
            .push(prompt.call.completion_tokens.map(i64::from));
        self.names.push(without_nul(prompt.model));
        self.texts.push(prompt.prompt);
        self.responses.push(prompt.response.map(without_nul));
        self.reasons
            .push(prompt.call.finish_reason.map(without_nul));
    }
}
