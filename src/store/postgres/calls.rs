//! Running calls, idempotency keys and the day's count in PostgreSQL. Leases are measured by the
//! server's clock.

use std::time::Duration;

use async_trait::async_trait;
use pgvector::HalfVector;

use super::pool::{Arguments, Connection, LONG_PATIENCE, PATIENCE};
use super::prompts::check_quota;
use super::{PostgresStore, all, first, one, sql_limit};
use crate::domain::{FailureCode, Prompt, PromptId, Timestamp, UserId, without_nul};
use crate::store::calls::{EXPIRED, micros};
use crate::store::rows;
use crate::store::{
    Begun, CallOutcome, CallStore, Error, ExpiredCall, Holder, KEY_LIFETIME, KeyClaim, KeyState,
    NewCall, prompt_columns,
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
/// whether it is kept; `$11`, `$12`, `$13` a chat call's labels, messages and request, or NULL.
const INSERT_RUNNING: &str = concat!(
    "WITH begun AS (
         INSERT INTO prompt (user_id, created_at, status, model, prompt, source)
         VALUES ($1, $2, 'running', $3, $4, $9) RETURNING *
     ), leased AS (
         INSERT INTO running_call (prompt_id, replica, call, lease_until, announce, is_kept)
         SELECT id, $5, $6, ",
    clock!(),
    " + $7, $8, $10 FROM begun
     ), chatted AS (
         INSERT INTO chat_call (prompt_id, user_id, metadata, messages, request)
         SELECT id, user_id, $11, $12, $13 FROM begun WHERE $11::text IS NOT NULL
     )
     SELECT ",
    prompt_columns!(),
    " FROM begun"
);

/// Gives the row of an expired call a new lease. `$1` id, `$2` model, `$3` replica, `$4` call,
/// `$5` lease, `$6` announce.
const TAKE_OVER: &str = concat!(
    "WITH begun AS (
         UPDATE prompt SET status = 'running', error = NULL, model = $2
         WHERE id = $1 AND status <> 'completed' RETURNING *
     ), leased AS (
         INSERT INTO running_call (prompt_id, replica, call, lease_until, announce)
         SELECT id, $3, $4, ",
    clock!(),
    " + $5, $6 FROM begun
         ON CONFLICT (prompt_id) DO UPDATE SET replica = excluded.replica, call = excluded.call,
             lease_until = excluded.lease_until, announce = excluded.announce
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
/// NULL; `$14` is the whole answer to a chat call, or NULL.
const SETTLE: &str = concat!(
    "WITH locked AS (
         SELECT id FROM prompt WHERE id = $1 FOR UPDATE
     ), released AS (
         DELETE FROM running_call r USING locked
         WHERE r.prompt_id = locked.id AND r.replica = $2 AND r.call = $3 RETURNING r.prompt_id
     ), settled AS (
         UPDATE prompt p SET status = $4, error = $5, response = $6, model = coalesce($7, p.model),
             finish_reason = $8, llm_duration_ms = $9, prompt_tokens = $10, completion_tokens = $11
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
     )
     SELECT ",
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
         RETURNING r.prompt_id, r.announce, r.is_kept
     ), forgotten AS (
         DELETE FROM prompt p USING released WHERE p.id = released.prompt_id AND NOT released.is_kept
     ), expired AS (
         UPDATE prompt p SET status = 'failed', error = $2 FROM released
         WHERE p.id = released.prompt_id AND released.is_kept RETURNING p.*, released.announce
     )
     SELECT announce, ",
    prompt_columns!(),
    " FROM expired"
);

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

/// Runs inside a transaction if the call has a key or a quota. If this fails, closing the
/// connection rolls the transaction back.
async fn begin(connection: &mut Connection, call: &NewCall) -> Result<Begun, Error> {
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
            let chat = call.chat.as_ref();
            let new: Arguments<'_> = &[
                &user,
                &call.created_at.0,
                &call.model,
                &call.prompt,
                &replica,
                &call.holder.call,
                &lease,
                &call.announce,
                &call.source.as_str(),
                &call.is_kept,
                &chat.map(|chat| chat.metadata.as_str()),
                &chat.map(|chat| chat.messages.as_str()),
                &chat.map(|chat| chat.request.as_str()),
            ];
            connection.write(INSERT_RUNNING, new).await?
        }
        Some(KeyState::Expired(id)) => {
            let taken: Arguments<'_> = &[
                &id.0,
                &call.model,
                &replica,
                &call.holder.call,
                &lease,
                &call.announce,
            ];
            connection.write(TAKE_OVER, taken).await?
        }
        Some(state) => return Ok(Begun::Known(state)),
    };
    let prompt = rows::prompt(&one(begun)?)?;
    if let Some(claim) = &call.key {
        let (hash, fingerprint) = (&claim.key_hash[..], &claim.fingerprint[..]);
        connection
            .write(CLAIM, &[&user, &hash, &fingerprint, &prompt.id.0])
            .await?;
    }
    Ok(Begun::Started(prompt))
}

#[async_trait]
impl CallStore for PostgresStore {
    async fn begin_call(&self, mut call: NewCall) -> Result<Begun, Error> {
        call.model = without_nul(call.model);
        let mut connection = self.pool.connection(PATIENCE).await?;
        if call.key.is_none() && call.max_prompts.is_none() {
            return begin(&mut connection, &call).await;
        }
        connection.begin().await?;
        let begun = begin(&mut connection, &call).await?;
        connection.commit().await?;
        Ok(begun)
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
        all(&rows, rows::expired_call)
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

    async fn count_upstream_call(&self, day: i64, limit: u64) -> Result<bool, Error> {
        if limit == 0 {
            return Ok(false);
        }
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let counted = self
            .pool
            .write(
                "INSERT INTO upstream_day (day, calls) VALUES ($1, 1)
                 ON CONFLICT (day) DO UPDATE SET calls = upstream_day.calls + 1 WHERE upstream_day.calls < $2
                 RETURNING calls",
                &[&day, &limit],
            )
            .await?;
        Ok(!counted.is_empty())
    }
}
