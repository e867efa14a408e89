//! Running calls, idempotency keys and the day's count in PostgreSQL. Leases are measured by the
//! server's clock.

use std::time::Duration;

use async_trait::async_trait;
use pgvector::HalfVector;

use super::pool::{Arguments, Connection, LONG_PATIENCE, PATIENCE};
use super::prompts::check_quota;
use super::usage::{Reserved, UsageColumns, interrupted, metering, reserve};
use super::{PostgresStore, all, first, sql_limit};
use crate::domain::{FailureCode, Picodollars, Prompt, PromptId, Timestamp, UserId, without_nul};
use crate::store::calls::{EXPIRED, micros};
use crate::store::rows::{self, Defect};
use crate::store::{
    Begun, CallOutcome, CallStore, DailyLimit, Error, ExpiredCall, Holder, KEY_LIFETIME, KeyClaim,
    KeyState, NewCall, UsageStore, prompt_columns,
};

/// Microseconds since the epoch by the server's clock, which goes on within a transaction.
macro_rules! clock {
    () => {
        "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
    };
}

/// Makes other transactions with the same key wait until this one ends, also where the key has no
/// row yet that could be locked. `hashtextextended` may give two keys the same number: then they
/// wait for each other, and nothing else happens.
const LOCK_KEY: &str =
    "SELECT pg_advisory_xact_lock(hashtextextended(encode($2, 'hex'), $1::bigint))";

const KEY_STATE: &str = concat!(
    "SELECT k.fingerprint, k.prompt_id, p.status, coalesce(r.lease_until > ",
    clock!(),
    ", false) AS is_leased
     FROM idempotency_key k
     LEFT JOIN prompt p ON p.id = k.prompt_id
     LEFT JOIN running_call r ON r.prompt_id = k.prompt_id
     WHERE k.user_id = $1 AND k.key_hash = $2 AND k.claimed_at > ",
    clock!(),
    " - $3"
);

/// Make other transactions that settle, renew or delete the call wait until this one ends. The
/// prompt is locked before its lease, as everywhere.
const LOCK_PROMPT: &str = "SELECT 1 FROM prompt WHERE id = $1 FOR UPDATE";
const LOCK_LEASE: &str = "SELECT 1 FROM running_call WHERE prompt_id = $1 FOR UPDATE";

/// Adds a row and its lease. `$5` replica, `$6` call, `$7` lease, `$8` announce, `$9` source, `$10`
/// whether it is kept; `$11`, `$12`, `$13` a chat call's labels, messages and request, or NULL;
/// `$14` key, `$15` what is reserved. Without `$16`, which says that budgets were looked at, it
/// adds nothing for a user who has a budget.
const INSERT_RUNNING: &str = concat!(
    "WITH begun AS (
         INSERT INTO prompt (user_id, created_at, status, model, prompt, source)
         SELECT $1::bigint, $2::bigint, 'running', $3::text, $4::text, $9::text
         WHERE $16 OR NOT EXISTS (SELECT FROM user_budget b WHERE b.user_id = $1)
         RETURNING *
     ), leased AS (
         INSERT INTO running_call (prompt_id, replica, call, lease_until, announce, is_kept,
                                   user_id, api_key_id, source, model, begun_at, reserved)
         SELECT id, $5, $6, ",
    clock!(),
    " + $7, $8, $10, user_id, $14, source, model, created_at, $15 FROM begun
     ), chatted AS (
         INSERT INTO chat_call (prompt_id, user_id, metadata, messages, request)
         SELECT id, user_id, $11, $12, $13 FROM begun WHERE $11::text IS NOT NULL
     )
     SELECT ",
    prompt_columns!(),
    " FROM begun"
);

/// Gives the row of an expired call a new lease. `$1` id, `$2` model, `$3` replica, `$4` call,
/// `$5` lease, `$6` announce, `$7` key, `$8` when it began, `$9` what is reserved. The row has no
/// lease any more: see [`INTERRUPT`].
const TAKE_OVER: &str = concat!(
    "WITH begun AS (
         UPDATE prompt SET status = 'running', error = NULL, model = $2
         WHERE id = $1 AND status <> 'completed' RETURNING *
     ), leased AS (
         INSERT INTO running_call (prompt_id, replica, call, lease_until, announce, is_kept,
                                   user_id, api_key_id, source, model, begun_at, reserved)
         SELECT id, $3, $4, ",
    clock!(),
    " + $5, $6, $10, user_id, $7, source, model, $8, $9 FROM begun
     )
     SELECT ",
    prompt_columns!(),
    " FROM begun"
);

const CLAIM: &str = concat!(
    "INSERT INTO idempotency_key (user_id, key_hash, fingerprint, prompt_id, claimed_at)
     VALUES ($1, $2, $3, $4, ",
    clock!(),
    ") ON CONFLICT (user_id, key_hash) DO UPDATE SET fingerprint = excluded.fingerprint,
         prompt_id = excluded.prompt_id, claimed_at = excluded.claimed_at"
);

/// Writes the outcome, ends the lease, adds the vector and releases the key of a failed call, or
/// does nothing. Of many attempts exactly one deletes the lease. The prompt is locked before its
/// lease, as a deletion does, so the two cannot deadlock. Without a vector, `$12` and `$13` are
/// NULL; `$14` is the whole answer to a chat call, or NULL. `$15` to `$26` are the columns of the
/// rows of usage, which are stored also if the prompt was deleted, and `$27` is the cost of all.
const SETTLE: &str = concat!(
    "WITH locked AS (
         SELECT id FROM prompt WHERE id = $1 FOR UPDATE
     ), released AS (
         DELETE FROM running_call r
         WHERE r.prompt_id = $1 AND r.replica = $2 AND r.call = $3
           AND (SELECT count(*) FROM locked) >= 0 RETURNING r.*
     ), settled AS (
         UPDATE prompt p SET status = $4, error = $5, response = $6, model = coalesce($7, p.model),
             finish_reason = $8, llm_duration_ms = $9, prompt_tokens = $10,
             completion_tokens = $11, cost = $27
         FROM released WHERE p.id = released.prompt_id RETURNING p.*
     ), freed AS (
         DELETE FROM idempotency_key k USING settled
         WHERE k.prompt_id = settled.id AND settled.status = 'failed'
     ), chatted AS (
         UPDATE chat_call c SET answer = $14 FROM settled
         WHERE c.prompt_id = settled.id AND $14::text IS NOT NULL
     ), embedded AS (
         INSERT INTO prompt_embedding (prompt_id, user_id, model_id, embedding)
         SELECT id, user_id, $12, $13 FROM settled WHERE $12::integer IS NOT NULL
     ), entry AS (
         SELECT r.prompt_id, e.* FROM released r CROSS JOIN unnest($15::text[], $16::text[],
             $17::text[], $18::bigint[], $19::bigint[], $20::bigint[], $21::bigint[],
             $22::bigint[], $23::bigint[], $24::text[], $25::text[], $26::boolean[])
             AS e (upstream, model_asked, model, input, cache_read, cache_write, output,
                   reasoning, cost, price_version, outcome, is_estimated)
     )",
    metering!(),
    " SELECT ",
    prompt_columns!(),
    " FROM settled"
);

/// SKIP LOCKED, so this cannot deadlock with a transaction that settles or renews a call. The lock
/// reads the lease again, so a lease that was renewed meanwhile stays valid.
const EXPIRE: &str = concat!(
    "WITH over AS (
         SELECT p.id FROM running_call r JOIN prompt p ON p.id = r.prompt_id WHERE r.lease_until <= ",
    clock!(),
    " AND r.prompt_id <> ALL ($3) ORDER BY r.lease_until LIMIT $1 FOR UPDATE OF p, r SKIP LOCKED
     ), released AS (
         DELETE FROM running_call r USING over WHERE r.prompt_id = over.id
         RETURNING r.*
     ), freed AS (
         DELETE FROM idempotency_key k USING released
         WHERE k.prompt_id = released.prompt_id AND NOT released.is_kept
     ), forgotten AS (
         DELETE FROM prompt p USING released WHERE p.id = released.prompt_id AND NOT released.is_kept
     ), expired AS (
         UPDATE prompt p SET status = 'failed', error = $2 FROM released
         WHERE p.id = released.prompt_id AND released.is_kept RETURNING p.*, released.announce
     )",
    interrupted!(),
    metering!(),
    " SELECT announce, ",
    prompt_columns!(),
    " FROM expired"
);

/// The same for calls whose prompt was deleted. `$1` is the limit, `$2` are those that are spared.
const EXPIRE_DELETED: &str = concat!(
    "WITH over AS (
         SELECT r.prompt_id FROM running_call r WHERE r.lease_until <= ",
    clock!(),
    " AND r.prompt_id <> ALL ($2) AND NOT EXISTS (SELECT FROM prompt p WHERE p.id = r.prompt_id)
         ORDER BY r.lease_until LIMIT $1 FOR UPDATE OF r SKIP LOCKED
     ), released AS (
         DELETE FROM running_call r USING over WHERE r.prompt_id = over.prompt_id RETURNING r.*
     )",
    interrupted!(),
    metering!(),
    " SELECT prompt_id FROM released"
);

/// Ends the lease of an expired call, and meters the call.
const INTERRUPT: &str = concat!(
    "WITH released AS (
         DELETE FROM running_call r WHERE r.prompt_id = $1 RETURNING r.*
     )",
    interrupted!(),
    metering!(),
    " SELECT prompt_id FROM released"
);

/// Counts a call on day `$1`, unless `$2` calls are counted on it already.
const COUNT: &str = "
    INSERT INTO upstream_day (day, calls) VALUES ($1, 1)
    ON CONFLICT (day) DO UPDATE SET calls = upstream_day.calls + 1 WHERE upstream_day.calls < $2
    RETURNING calls";

async fn key_state(
    connection: &mut Connection,
    user_id: UserId,
    claim: &KeyClaim,
) -> Result<Option<KeyState>, Error> {
    let hash = &claim.key_hash[..];
    let found = connection
        .query(KEY_STATE, &[&user_id.0, &hash, &micros(KEY_LIFETIME)])
        .await?;
    first(&found, |row| rows::key_state(row, claim))
}

/// Adds a row, unless the user has a budget that was not looked at.
async fn insert(
    connection: &mut Connection,
    call: &NewCall,
    reserved: Option<Picodollars>,
) -> Result<Option<Prompt>, Error> {
    let chat = call.chat.as_ref();
    let new: Arguments<'_> = &[
        &call.user_id.0,
        &call.created_at.0,
        &call.model,
        &call.prompt,
        &&call.holder.replica[..],
        &call.holder.call,
        &micros(call.lease),
        &call.announce,
        &call.source.as_str(),
        &call.is_kept,
        &chat.map(|chat| chat.metadata.as_str()),
        &chat.map(|chat| chat.messages.as_str()),
        &chat.map(|chat| chat.request.as_str()),
        &call.api_key_id.map(|id| id.to_string()),
        &reserved.unwrap_or_default().0,
        &reserved.is_some(),
    ];
    let begun = connection.write(INSERT_RUNNING, new).await?;
    first(&begun, rows::prompt)
}

/// Runs inside a transaction. If this fails, closing the connection rolls the transaction back.
/// `None` if the service has a budget and is not tracked yet.
async fn begin(connection: &mut Connection, call: &NewCall) -> Result<Option<Begun>, Error> {
    let (user, replica, lease) = (call.user_id.0, &call.holder.replica[..], micros(call.lease));
    let mut state = None;
    if let Some(claim) = &call.key {
        let hash = &claim.key_hash[..];
        connection.query(LOCK_KEY, &[&user, &hash]).await?;
        state = key_state(connection, call.user_id, claim).await?;
        if let Some(KeyState::Expired(id)) = state {
            // Its holder may be settling it at this moment. Read again under the locks, the state
            // cannot change any more.
            connection.query(LOCK_PROMPT, &[&id.0]).await?;
            connection.query(LOCK_LEASE, &[&id.0]).await?;
            state = key_state(connection, call.user_id, claim).await?;
        }
    }
    let begun = match state {
        None => {
            check_quota(connection, call.user_id, call.max_prompts).await?;
            let Reserved::Amount(reserved) = reserve(connection, call).await? else {
                return Ok(None);
            };
            insert(connection, call, Some(reserved)).await?
        }
        Some(KeyState::Expired(id)) => {
            // Unless it was ended before.
            connection.write(INTERRUPT, &[&id.0]).await?;
            let Reserved::Amount(reserved) = reserve(connection, call).await? else {
                return Ok(None);
            };
            let taken: Arguments<'_> = &[
                &id.0,
                &call.model,
                &replica,
                &call.holder.call,
                &lease,
                &call.announce,
                &call.api_key_id.map(|id| id.to_string()),
                &call.created_at.0,
                &reserved.0,
                &call.is_kept,
            ];
            let taken = connection.write(TAKE_OVER, taken).await?;
            first(&taken, rows::prompt)?
        }
        Some(state) => return Ok(Some(Begun::Known(state))),
    };
    let prompt = begun.ok_or(Defect::UnknownValue)?;
    if let Some(claim) = &call.key {
        let (hash, fingerprint) = (&claim.key_hash[..], &claim.fingerprint[..]);
        connection
            .write(CLAIM, &[&user, &hash, &fingerprint, &prompt.id.0])
            .await?;
    }
    // Last, as everywhere: all calls of the day change this one row, so whoever has it locked must
    // wait for nobody else before the commit.
    let is_within_limit = count(connection, call.daily).await?;
    Ok(Some(Begun::counted(prompt, is_within_limit)))
}

/// Counts a call on its day, unless the day has no call left. Returns whether it has had one.
async fn count(connection: &mut Connection, daily: Option<DailyLimit>) -> Result<bool, Error> {
    let Some(DailyLimit { day, calls }) = daily else {
        return Ok(true);
    };
    if calls == 0 {
        return Ok(false);
    }
    let most = i64::try_from(calls).unwrap_or(i64::MAX);
    let counted = connection.write(COUNT, &[&day, &most]).await?;
    Ok(!counted.is_empty())
}

#[async_trait]
impl CallStore for PostgresStore {
    async fn begin_call(&self, mut call: NewCall) -> Result<Begun, Error> {
        call.model = without_nul(call.model);
        let mut connection = self.pool.connection(PATIENCE).await?;
        let has_budget = call.budgets.key.is_some() || call.budgets.service.is_some();
        // Most calls need one statement, in a transaction of its own.
        if call.key.is_none()
            && call.max_prompts.is_none()
            && call.daily.is_none()
            && !has_budget
            && let Some(prompt) = insert(&mut connection, &call, None).await?
        {
            return Ok(Begun::Started(prompt));
        }
        connection.begin().await?;
        if let Some(begun) = begin(&mut connection, &call).await? {
            connection.commit().await?;
            return Ok(begun);
        }
        drop(connection);
        self.track_service(true).await?;
        let mut connection = self.pool.connection(PATIENCE).await?;
        connection.begin().await?;
        let begun = begin(&mut connection, &call).await?;
        connection.commit().await?;
        Ok(begun.ok_or(Defect::UnknownValue)?)
    }

    async fn key_state(
        &self,
        user_id: UserId,
        claim: &KeyClaim,
    ) -> Result<Option<KeyState>, Error> {
        let mut connection = self.pool.connection(PATIENCE).await?;
        key_state(&mut connection, user_id, claim).await
    }

    async fn renew_leases(
        &self,
        replica: [u8; 16],
        ids: &[PromptId],
        lease: Duration,
    ) -> Result<u64, Error> {
        let ids: Vec<i64> = ids.iter().map(|id| id.0).collect();
        let renewed = self
            .pool
            .write(
                concat!(
                    "UPDATE running_call SET lease_until = ",
                    clock!(),
                    " + $3 WHERE prompt_id = ANY ($1) AND replica = $2 RETURNING prompt_id"
                ),
                &[&ids, &&replica[..], &micros(lease)],
            )
            .await?;
        Ok(renewed.len() as u64)
    }

    async fn settle_call(
        &self,
        id: PromptId,
        holder: Holder,
        outcome: CallOutcome,
    ) -> Result<Option<Prompt>, Error> {
        let (status, code) = (outcome.status(), outcome.error.map(FailureCode::as_str));
        let response = outcome.response.map(|text| without_nul(text.to_string()));
        let details = outcome.details;
        let number = |value: Option<u32>| value.map(i64::from);
        let mut connection = self.pool.connection(PATIENCE).await?;
        let (model_number, vector) = match &outcome.embedding {
            Some((model, vector)) => (
                Some(
                    self.models
                        .number(&mut connection, model, vector.0.len())
                        .await?,
                ),
                Some(HalfVector::from_f32_slice(&vector.0)),
            ),
            None => (None, None),
        };
        let is_kept = outcome.is_kept;
        let usage = UsageColumns::of(outcome.usage);
        if !is_kept {
            connection.begin().await?;
        }
        let rows = connection
            .write(
                SETTLE,
                &[
                    &id.0,
                    &&holder.replica[..],
                    &holder.call,
                    &status.as_str(),
                    &code,
                    &response,
                    &outcome.model.map(without_nul),
                    &details.finish_reason.map(without_nul),
                    &number(details.duration_ms),
                    &number(details.prompt_tokens),
                    &number(details.completion_tokens),
                    &model_number,
                    &vector,
                    &outcome.answer.as_deref(),
                    &usage.upstream,
                    &usage.model_asked,
                    &usage.model,
                    &usage.input,
                    &usage.cache_read,
                    &usage.cache_write,
                    &usage.output,
                    &usage.reasoning,
                    &usage.cost,
                    &usage.price_version,
                    &usage.outcome,
                    &usage.is_estimated,
                    &details.cost.map(|cost| cost.0),
                ],
            )
            .await?;
        if !is_kept {
            let forget = "DELETE FROM prompt WHERE id = ANY ($1)";
            let settled: Vec<i64> = rows.iter().map(|_| id.0).collect();
            connection.write(forget, &[&settled]).await?;
            connection.commit().await?;
        }
        first(&rows, rows::prompt)
    }

    async fn expire_calls(
        &self,
        limit: usize,
        spared: &[PromptId],
    ) -> Result<Vec<ExpiredCall>, Error> {
        let spared: Vec<i64> = spared.iter().map(|id| id.0).collect();
        let rows = self
            .pool
            .write(EXPIRE, &[&sql_limit(limit), &EXPIRED.as_str(), &spared])
            .await?;
        let expired = all(&rows, rows::expired_call)?;
        self.pool
            .write(EXPIRE_DELETED, &[&sql_limit(limit), &spared])
            .await?;
        Ok(expired)
    }

    async fn purge_keys(&self, horizon: Timestamp) -> Result<u64, Error> {
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        let gone = connection
            .write(
                "DELETE FROM idempotency_key WHERE claimed_at <= $1 RETURNING prompt_id",
                &[&horizon.minus(KEY_LIFETIME).0],
            )
            .await?;
        Ok(gone.len() as u64)
    }
}
