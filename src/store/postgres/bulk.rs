//! Whole rows in bulk, in PostgreSQL. The rows of a kind go in by one statement, as arrays of
//! columns.

use async_trait::async_trait;
use half::f16;
use pgvector::HalfVector;
use tokio_postgres::Row;

use super::pool::{Arguments, Connection, LONG_PATIENCE};
use super::usage::{UsageColumns, add, count, sum};
use super::{PostgresStore, get, one, sql_limit};
use crate::domain::{
    ApiKeyId, ApiKeyRecord, ChatTexts, FailureCode, LastIds, ModelId, Prompt, PromptRecord,
    PromptStatus, Record, RecordCursor, VectorRecord, without_nul,
};
use crate::store::api_keys::{API_KEYS_AFTER, models_column};
use crate::store::bulk::{
    BUDGETS_AFTER, DAYS_AFTER, KEYS_AFTER, PROMPTS_AFTER, SESSIONS_AFTER, USAGE_AFTER,
    USAGE_DAYS_AFTER, USERS_AFTER, usage_days_after,
};
use crate::store::rows;
use crate::store::{BulkStore, Error, api_key_columns};

/// The table of accounts.
const ACCOUNTS: &str = "account";

const TOKENS_AFTER: &str = "
    SELECT jti, expires_at FROM revoked_token
    WHERE $1::bytea IS NULL OR jti > $1 ORDER BY jti LIMIT $2";

const PUT_USERS: &str = "
    INSERT INTO account (id, username, email, password_hash, is_active, tokens_valid_from,
                         created_at)
    OVERRIDING SYSTEM VALUE
    SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::boolean[],
                         $6::bigint[], $7::bigint[])
    ON CONFLICT DO NOTHING";

/// The vectors are separate rows, for the prompts that have one.
const PUT_PROMPTS: &str = "
    WITH stored AS (
        INSERT INTO prompt (id, user_id, created_at, status, error, llm_duration_ms, prompt_tokens,
                            completion_tokens, model, prompt, response, finish_reason, source,
                            cost)
        OVERRIDING SYSTEM VALUE
        SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::text[], $5::text[],
                             $6::bigint[], $7::bigint[], $8::bigint[], $9::text[], $10::text[],
                             $11::text[], $12::text[], $13::text[], $22::bigint[])
        ON CONFLICT DO NOTHING RETURNING id, user_id
    ), chatted AS (
        INSERT INTO chat_call (prompt_id, user_id, metadata, messages, request, answer)
        SELECT stored.id, stored.user_id, chat.metadata, chat.messages, chat.request, chat.answer
        FROM unnest($17::bigint[], $18::text[], $19::text[], $20::text[], $21::text[])
            AS chat (id, metadata, messages, request, answer)
        JOIN stored ON stored.id = chat.id
    )
    INSERT INTO prompt_embedding (prompt_id, user_id, model_id, embedding)
    SELECT stored.id, stored.user_id, vector.model_id, vector.embedding
    FROM unnest($14::bigint[], $15::integer[], $16::halfvec[]) AS vector (id, model_id, embedding)
    JOIN stored ON stored.id = vector.id";

const PUT_KEYS: &str = "
    INSERT INTO idempotency_key (user_id, key_hash, fingerprint, prompt_id, claimed_at)
    SELECT * FROM unnest($1::bigint[], $2::bytea[], $3::bytea[], $4::bigint[], $5::bigint[])
    ON CONFLICT DO NOTHING";

const PUT_DAYS: &str = "
    INSERT INTO upstream_day (day, calls)
    SELECT day, max(calls) FROM unnest($1::bigint[], $2::bigint[]) AS row (day, calls) GROUP BY day
    ON CONFLICT (day) DO UPDATE SET calls = greatest(upstream_day.calls, excluded.calls)";

const PUT_SESSIONS: &str = "
    INSERT INTO session (token_hash, user_id, created_at, expires_at)
    SELECT * FROM unnest($1::bytea[], $2::bigint[], $3::bigint[], $4::bigint[])
    ON CONFLICT DO NOTHING";

const PUT_TOKENS: &str = "
    INSERT INTO revoked_token (jti, expires_at)
    SELECT jti, max(expires_at) FROM unnest($1::bytea[], $2::bigint[]) AS row (jti, expires_at)
    GROUP BY jti
    ON CONFLICT (jti) DO UPDATE
        SET expires_at = greatest(revoked_token.expires_at, excluded.expires_at)";

const PUT_API_KEYS: &str = concat!(
    "INSERT INTO api_key (",
    api_key_columns!(),
    ") SELECT * FROM unnest($1::text[], $2::bigint[], $3::text[], $4::bytea[], $5::bytea[],
                            $6::bigint[], $7::text[], $8::text[], $9::text[], $10::text[],
                            $11::bigint[], $12::text[], $13::bigint[], $14::bigint[],
                            $15::bigint[], $16::bigint[])
     ON CONFLICT DO NOTHING"
);
const PUT_USAGE: &str = "
    INSERT INTO usage (id, user_id, api_key_id, prompt_id, source, begun_at, day, upstream,
                       model_asked, model, input, cache_read, cache_write, output, reasoning, cost,
                       price_version, outcome, is_estimated)
    OVERRIDING SYSTEM VALUE
    SELECT u.id, u.user_id, u.key, u.prompt_id, u.source, u.begun_at,
           floor(u.begun_at / 86400000000.0)::bigint, u.upstream, u.model_asked, u.model, u.input,
           u.cache_read, u.cache_write, u.output, u.reasoning, u.cost, u.price_version, u.outcome,
           u.is_estimated
    FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[], $5::text[], $6::bigint[],
                $7::text[], $8::text[], $9::text[], $10::bigint[], $11::bigint[], $12::bigint[],
                $13::bigint[], $14::bigint[], $15::bigint[], $16::text[], $17::text[],
                $18::boolean[])
        AS u (id, user_id, key, prompt_id, source, begun_at, upstream, model_asked, model, input,
              cache_read, cache_write, output, reasoning, cost, price_version, outcome,
              is_estimated)
    ON CONFLICT DO NOTHING";

/// With the sums goes what budgets are checked against.
const PUT_USAGE_DAYS: &str = concat!(
    "WITH stored AS (
        INSERT INTO usage_day (user_id, day, api_key_id, model, attempts, input, cache_read,
                               cache_write, output, reasoning, cost, unpriced)
        SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::bigint[],
                             $6::bigint[], $7::bigint[], $8::bigint[], $9::bigint[],
                             $10::bigint[], $11::bigint[], $12::bigint[])
        ON CONFLICT DO NOTHING RETURNING user_id, day, api_key_id, cost
    )
    INSERT INTO spend (kind, subject_id, day, settled, reserved)
    SELECT s.kind, s.id, d.day, ",
    sum!("stored.cost"),
    ", 0
    FROM stored
    CROSS JOIN LATERAL (VALUES (1, 'service', 0, ''),
                               (2, 'user', stored.user_id, stored.user_id::text),
                               (3, 'key', 0, stored.api_key_id)) AS s (place, kind, number, id)
    CROSS JOIN LATERAL (VALUES (-1), (stored.day)) AS d (day)
    WHERE stored.cost <> 0 AND (s.place <> 3 OR s.id <> '')
      AND (s.place > 1 OR EXISTS (SELECT FROM spend t
           WHERE t.kind = 'service' AND t.subject_id = '' AND t.day = -1))
    GROUP BY s.place, s.kind, s.number, s.id, d.day
    ORDER BY s.place, s.number, s.id, d.day
    ON CONFLICT (kind, subject_id, day) DO UPDATE SET ",
    add!("spend", "settled"),
    " RETURNING 1"
);

const PUT_BUDGETS: &str = "
    INSERT INTO user_budget (user_id, amount, period)
    SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[])
    ON CONFLICT DO NOTHING";

const LAST_IDS: &str = "
    SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('account', 'id')::regclass), 0)
               AS user_id,
           coalesce(pg_sequence_last_value(pg_get_serial_sequence('prompt', 'id')::regclass), 0)
               AS prompt_id";

/// Raises a table's counter to an id; never lowers it. A transaction that fails does not undo it.
const RAISE: &str = "
    SELECT setval(pg_get_serial_sequence($1::text, 'id'), $2::bigint)
    WHERE $2 > coalesce(pg_sequence_last_value(pg_get_serial_sequence($1, 'id')::regclass), 0)";

fn prompt_record(row: &Row) -> Result<Record, Error> {
    let model: Option<&str> = get(row, "embedding_model")?;
    let vector: Option<HalfVector> = get(row, "embedding")?;
    let vector = model.zip(vector).map(|(model, vector)| VectorRecord {
        model: ModelId(model.into()),
        f16_bytes: vector
            .as_slice()
            .iter()
            .flat_map(|half| half.to_le_bytes())
            .collect(),
    });
    Ok(Record::Prompt(PromptRecord {
        prompt: rows::prompt(row)?,
        vector,
        chat: rows::chat_texts_if_any(row)?,
    }))
}

fn key_text(id: Option<ApiKeyId>) -> Option<String> {
    id.map(|id| id.to_string())
}

/// The bytes of a hash; none, which sort before any hash, where there is no hash.
fn bytes(hash: Option<&[u8; 32]>) -> &[u8] {
    hash.map_or(&[], <[u8; 32]>::as_slice)
}

fn halves(bytes: &[u8]) -> HalfVector {
    let (halves, _) = bytes.as_chunks::<2>();
    let halves: Vec<f16> = halves.iter().copied().map(f16::from_le_bytes).collect();
    HalfVector::from(halves)
}

/// Writes rows by a statement whose arguments are columns: an array of values for each expression,
/// and then the given columns. Sends nothing if there are no rows.
macro_rules! put {
    ($connection:ident, $sql:ident, $rows:ident, |$row:ident| $($value:expr),+
     $(; and $($column:ident),+)?) => {
        if !$rows.is_empty() {
            let arguments: Arguments<'_> = &[
                $(&$rows.iter().map(|$row| $value).collect::<Vec<_>>(),)+
                $($(&$column,)+)?
            ];
            $connection.write($sql, arguments).await?;
        }
    };
}

/// The vectors of prompts, as columns: the prompts' ids, the models' numbers and the vectors.
type Vectors = (Vec<i64>, Vec<i32>, Vec<HalfVector>);

impl PostgresStore {
    async fn select(
        &self,
        sql: &str,
        arguments: Arguments<'_>,
        record: fn(&Row) -> Result<Record, Error>,
    ) -> Result<Vec<Record>, Error> {
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        let rows = connection.query(sql, arguments).await?;
        rows.iter().map(record).collect()
    }

    async fn vectors_of(
        &self,
        connection: &mut Connection,
        prompts: &[PromptRecord],
    ) -> Result<Vectors, Error> {
        let mut vectors = Vectors::default();
        let completed = prompts
            .iter()
            .filter(|record| record.prompt.status == PromptStatus::Completed);
        for record in completed {
            let Some(vector) = &record.vector else {
                continue;
            };
            let length = vector.f16_bytes.len() / 2;
            let number = self.models.number(connection, &vector.model, length);
            vectors.1.push(number.await?);
            vectors.0.push(record.prompt.id.0);
            vectors.2.push(halves(&vector.f16_bytes));
        }
        Ok(vectors)
    }
}

#[async_trait]
impl BulkStore for PostgresStore {
    async fn last_ids(&self) -> Result<LastIds, Error> {
        rows::last_ids(&one(self.pool.query(LAST_IDS, &[]).await?)?)
    }

    async fn raise_ids(&self, last: LastIds) -> Result<(), Error> {
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        for (table, last) in [(ACCOUNTS, last.user.0), ("prompt", last.prompt.0)] {
            connection.write(RAISE, &[&table, &last]).await?;
        }
        Ok(())
    }

    async fn records(&self, after: RecordCursor, limit: usize) -> Result<Vec<Record>, Error> {
        let most = sql_limit(limit);
        match after {
            RecordCursor::Users(after) => {
                let after = after.map_or(i64::MIN, |id| id.0);
                self.select(USERS_AFTER, &[&after, &most], |row| rows::user_record(row))
                    .await
            }
            RecordCursor::Prompts(after) => {
                let after = after.map_or(i64::MIN, |id| id.0);
                let arguments: Arguments<'_> = &[&after, &most];
                self.select(PROMPTS_AFTER, arguments, prompt_record).await
            }
            RecordCursor::Keys(after) => {
                let user = after.map_or(i64::MIN, |(user, _)| user.0);
                let hash = bytes(after.as_ref().map(|(_, hash)| hash));
                let arguments: Arguments<'_> = &[&user, &hash, &most];
                self.select(KEYS_AFTER, arguments, |row| rows::key_record(row))
                    .await
            }
            RecordCursor::UpstreamDays(after) => {
                self.select(DAYS_AFTER, &[&after, &most], |row| rows::day_record(row))
                    .await
            }
            RecordCursor::Sessions(after) => {
                let arguments: Arguments<'_> = &[&bytes(after.as_ref()), &most];
                self.select(SESSIONS_AFTER, arguments, |row| rows::session_record(row))
                    .await
            }
            RecordCursor::Usage(after) => {
                let after = after.unwrap_or(i64::MIN);
                self.select(USAGE_AFTER, &[&after, &most], |row| rows::usage_record(row))
                    .await
            }
            RecordCursor::UsageDays(after) => {
                let (user, day, key, model) = usage_days_after(after);
                let arguments: Arguments<'_> = &[&user, &day, &key, &model, &most];
                self.select(USAGE_DAYS_AFTER, arguments, |row| {
                    rows::usage_day_record(row)
                })
                .await
            }
            RecordCursor::UserBudgets(after) => {
                let after = after.map_or(i64::MIN, |id| id.0);
                self.select(BUDGETS_AFTER, &[&after, &most], |row| {
                    rows::user_budget_record(row)
                })
                .await
            }
            RecordCursor::RevokedTokens(after) => {
                let after = after.as_ref().map(String::as_bytes);
                self.select(TOKENS_AFTER, &[&after, &most], |row| {
                    rows::token_record(row)
                })
                .await
            }
            RecordCursor::ApiKeys(after) => {
                let after = after.as_ref().map_or("", ApiKeyId::as_str);
                self.select(API_KEYS_AFTER, &[&after, &most], |row| {
                    rows::api_key_record(row)
                })
                .await
            }
        }
    }

    async fn put(&self, records: Vec<Record>) -> Result<(), Error> {
        let (mut users, mut prompts, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        let (mut days, mut sessions, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        let mut api_keys: Vec<ApiKeyRecord> = Vec::new();
        let (mut usage, mut usage_days, mut budgets) = (Vec::new(), Vec::new(), Vec::new());
        for record in records {
            match record {
                Record::User(user) => users.push(user),
                Record::Prompt(record) => prompts.push(record),
                Record::Key(key) => keys.push(key),
                Record::UpstreamDay(day) => days.push(day),
                Record::Session(session) => sessions.push(session),
                Record::RevokedToken(token) => tokens.push(token),
                Record::ApiKey(record) => api_keys.push(record),
                Record::Usage(record) => usage.push(record),
                Record::UsageDay(day) => usage_days.push(day),
                Record::UserBudget(budget) => budgets.push(budget),
            }
        }
        prompts.iter_mut().for_each(PromptRecord::replace_nul);
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        // Before the transaction: a new model's number is remembered, so it must not be undone.
        let (embedded, models, vectors) = self.vectors_of(&mut connection, &prompts).await?;
        let (chatted, chats): (Vec<i64>, Vec<&ChatTexts>) = prompts
            .iter()
            .filter_map(|record| Some((record.prompt.id.0, record.chat.as_ref()?)))
            .unzip();
        let part = |part: fn(&ChatTexts) -> &str| -> Vec<&str> {
            chats.iter().map(|chat| part(chat)).collect()
        };
        let metadata = part(|chat| &chat.metadata);
        let (messages, requests) = (part(|chat| &chat.messages), part(|chat| &chat.request));
        let answers: Vec<_> = chats.iter().map(|chat| chat.answer.as_deref()).collect();
        let prompts: Vec<&Prompt> = prompts.iter().map(|record| &record.prompt).collect();

        connection.begin().await?;
        if let Some(highest) = users.iter().map(|user| user.id.0).max() {
            connection.write(RAISE, &[&ACCOUNTS, &highest]).await?;
        }
        if let Some(highest) = prompts.iter().map(|prompt| prompt.id.0).max() {
            connection.write(RAISE, &[&"prompt", &highest]).await?;
        }
        put!(
            connection,
            PUT_USERS,
            users,
            |user| user.id.0,
            user.username.as_str(),
            user.email.as_str(),
            user.password_hash.as_str(),
            user.is_active,
            user.tokens_valid_from.0,
            user.created_at.0
        );
        let cost = |prompt: &&Prompt| prompt.call.cost.map(|cost| cost.0);
        let costs: Vec<Option<i64>> = prompts.iter().map(cost).collect();
        put!(
            connection, PUT_PROMPTS, prompts, |prompt|
            prompt.id.0,
            prompt.user_id.0,
            prompt.created_at.0,
            prompt.status.as_str(),
            prompt.error.map(FailureCode::as_str),
            prompt.call.duration_ms.map(i64::from),
            prompt.call.prompt_tokens.map(i64::from),
            prompt.call.completion_tokens.map(i64::from),
            prompt.model.as_str(),
            prompt.prompt.as_str(),
            prompt.response.as_deref(),
            prompt.call.finish_reason.as_deref(),
            prompt.source.as_str();
            and embedded, models, vectors, chatted, metadata, messages, requests, answers, costs
        );
        put!(
            connection,
            PUT_KEYS,
            keys,
            |key| key.user_id.0,
            key.key_hash.as_slice(),
            key.fingerprint.as_slice(),
            key.prompt_id.0,
            key.claimed_at.0
        );
        put!(
            connection,
            PUT_SESSIONS,
            sessions,
            |session| session.token_hash.as_slice(),
            session.user_id.0,
            session.created_at.0,
            session.expires_at.0
        );
        put!(
            connection,
            PUT_TOKENS,
            tokens,
            |token| token.jti.as_bytes(),
            token.expires_at.0
        );
        put!(
            connection,
            PUT_API_KEYS,
            api_keys,
            |row| row.key.id.as_str(),
            row.key.user_id.0,
            row.key.name.as_str(),
            row.key_hash.as_slice(),
            row.previous
                .as_ref()
                .map(|previous| previous.key_hash.as_slice()),
            row.previous.map(|previous| previous.until.0),
            row.key.last_four.as_str(),
            row.key.scopes.to_string(),
            models_column(&row.key.models),
            row.key.rates.as_ref().map(ToString::to_string),
            row.key.budget.map(|budget| budget.amount.0),
            row.key.budget.map(|budget| budget.period.as_str()),
            row.key.expires_at.map(|at| at.0),
            row.key.created_at.0,
            row.revoked_at.map(|at| at.0),
            row.key.last_used_at.map(|at| at.0)
        );
        if let Some(highest) = usage.iter().map(|record| record.id).max() {
            connection.write(RAISE, &[&"usage", &highest]).await?;
            let id: Vec<i64> = usage.iter().map(|record| record.id).collect();
            let user: Vec<i64> = usage.iter().map(|record| record.user_id.0).collect();
            let prompt: Vec<i64> = usage.iter().map(|record| record.prompt_id.0).collect();
            let source: Vec<&str> = usage.iter().map(|record| record.source.as_str()).collect();
            let begun: Vec<i64> = usage.iter().map(|record| record.begun_at.0).collect();
            let key = usage.iter().map(|record| key_text(record.api_key_id));
            let key: Vec<Option<String>> = key.collect();
            let columns = UsageColumns::of(usage.into_iter().map(|record| record.entry));
            let arguments: Arguments<'_> = &[
                &id,
                &user,
                &key,
                &prompt,
                &source,
                &begun,
                &columns.upstream,
                &columns.model_asked,
                &columns.model,
                &columns.input,
                &columns.cache_read,
                &columns.cache_write,
                &columns.output,
                &columns.reasoning,
                &columns.cost,
                &columns.price_version,
                &columns.outcome,
                &columns.is_estimated,
            ];
            connection.write(PUT_USAGE, arguments).await?;
        }
        put!(
            connection,
            PUT_USAGE_DAYS,
            usage_days,
            |day| day.user_id.0,
            day.day,
            key_text(day.api_key_id).unwrap_or_default(),
            without_nul(day.model.clone()),
            count(day.totals.attempts),
            count(day.totals.tokens.input),
            count(day.totals.tokens.cache_read),
            count(day.totals.tokens.cache_write),
            count(day.totals.tokens.output),
            count(day.totals.tokens.reasoning),
            day.totals.cost.0,
            count(day.totals.unpriced)
        );
        put!(
            connection,
            PUT_BUDGETS,
            budgets,
            |budget| budget.user_id.0,
            budget.budget.amount.0,
            budget.budget.period.as_str()
        );
        // Last, as in the transactions that begin calls.
        put!(connection, PUT_DAYS, days, |day| day.day, day.calls);
        connection.commit().await
    }
}
