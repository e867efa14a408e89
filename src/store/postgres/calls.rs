//! Running calls, idempotency keys and the day's count in PostgreSQL. Leases run by the server's clock.

use std::time::Duration;

use async_trait::async_trait;
use pgvector::HalfVector;
use tokio_postgres::Row;

use super::error::Cause;
use super::pool::{Connection, LONG_PATIENCE, PATIENCE};
use super::prompts::{check_quota, prompt_from_row};
use super::{PostgresStore, get, sql_limit};
use crate::domain::{FailureCode, Prompt, PromptId, PromptStatus, Timestamp, UserId, without_nul};
use crate::store::{
    Begun, CallOutcome, CallStore, Error, Holder, KEY_LIFETIME, KeyClaim, KeyState, KnownKey,
    LapsedCall, NewCall,
};

/// What a lapsed call failed with.
const LAPSED: FailureCode = FailureCode::Interrupted;

/// Microseconds since the epoch by the server's clock, as it goes on within a transaction.
macro_rules! clock {
    () => {
        "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
    };
}

/// Keeps whoever has the same key waiting until the transaction ends, also where the key has no row yet to be locked.
/// `hashtextextended` may give two keys one number: they then wait for each other, which is all.
const LOCK_KEY: &str =
    "SELECT pg_advisory_xact_lock(hashtextextended(encode($2, 'hex'), $1::bigint))";

/// The key and its prompt, and whether the prompt's lease holds.
const KNOWN_KEY: &str = concat!(
    "SELECT p.id, p.user_id, p.created_at, p.status, p.error, p.model, p.prompt, p.response,
            p.llm_duration_ms, p.prompt_tokens, p.completion_tokens, p.finish_reason, k.fingerprint, k.prompt_id,
            r.lease_until > ",
    clock!(),
    " FROM idempotency_key k LEFT JOIN prompt p ON p.id = k.prompt_id LEFT JOIN running_call r ON r.prompt_id = k.prompt_id
     WHERE k.user_id = $1 AND k.key_hash = $2 AND k.claimed_at > ",
    clock!(),
    " - $3"
);

/// Keep whoever would end, renew or delete the call waiting until the transaction ends: first the prompt, then its lease, as
/// everybody does.
const LOCK_PROMPT: &str = "SELECT 1 FROM prompt WHERE id = $1 FOR UPDATE";
const LOCK_LEASE: &str = "SELECT 1 FROM running_call WHERE prompt_id = $1 FOR UPDATE";

/// The row and its lease. `$5` replica, `$6` call, `$7` lease, `$8` announce.
const INSERT_RUNNING: &str = concat!(
    "WITH begun AS (
         INSERT INTO prompt (user_id, created_at, status, model, prompt) VALUES ($1, $2, 'running', $3, $4)
         RETURNING id, user_id, created_at, status, error, model, prompt, response,
             llm_duration_ms, prompt_tokens, completion_tokens, finish_reason
     ), leased AS (
         INSERT INTO running_call (prompt_id, replica, call, lease_until, announce) SELECT id, $5, $6, ",
    clock!(),
    " + $7, $8 FROM begun
     )
     SELECT * FROM begun"
);

/// The lapsed row under a new lease. `$1` id, `$2` model, `$3` replica, `$4` call, `$5` lease, `$6` announce.
const TAKE_OVER: &str = concat!(
    "WITH begun AS (
         UPDATE prompt SET status = 'running', error = NULL, model = $2 WHERE id = $1 AND status <> 'completed'
         RETURNING id, user_id, created_at, status, error, model, prompt, response,
             llm_duration_ms, prompt_tokens, completion_tokens, finish_reason
     ), leased AS (
         INSERT INTO running_call (prompt_id, replica, call, lease_until, announce) SELECT id, $3, $4, ",
    clock!(),
    " + $5, $6 FROM begun
         ON CONFLICT (prompt_id) DO UPDATE SET replica = excluded.replica, call = excluded.call,
             lease_until = excluded.lease_until, announce = excluded.announce
     )
     SELECT * FROM begun"
);

const CLAIM: &str = concat!(
    "INSERT INTO idempotency_key (user_id, key_hash, fingerprint, prompt_id, claimed_at) VALUES ($1, $2, $3, $4, ",
    clock!(),
    ") ON CONFLICT (user_id, key_hash) DO UPDATE SET
        fingerprint = excluded.fingerprint, prompt_id = excluded.prompt_id, claimed_at = excluded.claimed_at"
);

/// The outcome, the end of the lease, the vector and the key's release, or nothing of it. Of many attempts one deletes the lease.
/// The prompt is locked before its lease, as its deletion does, so that the two never wait for each other.
macro_rules! finish {
    ($embedded:literal) => {
        concat!(
            "WITH locked AS (
                 SELECT id FROM prompt WHERE id = $1 FOR UPDATE
             ), given_up AS (
                 DELETE FROM running_call r USING locked WHERE r.prompt_id = locked.id AND r.replica = $2 AND r.call = $3
                 RETURNING r.prompt_id
             ), ended AS (
                 UPDATE prompt p SET status = $4, error = $5, response = $6, model = coalesce($7, p.model), finish_reason = $8,
                     llm_duration_ms = $9, prompt_tokens = $10, completion_tokens = $11
                 FROM given_up WHERE p.id = given_up.prompt_id
                 RETURNING p.id, p.user_id, p.created_at, p.status, p.error, p.model, p.prompt, p.response,
                     p.llm_duration_ms, p.prompt_tokens, p.completion_tokens, p.finish_reason
             ), released AS (
                 DELETE FROM idempotency_key k USING ended WHERE k.prompt_id = ended.id AND ended.status = 'failed'
             )",
            $embedded,
            " SELECT * FROM ended"
        )
    };
}

const FINISH: &str = finish!("");
const FINISH_WITH_VECTOR: &str = finish!(
    ", embedded AS (
         INSERT INTO prompt_embedding (prompt_id, user_id, model_id, embedding) SELECT id, user_id, $12, $13 FROM ended
     )"
);

/// Rows that somebody else is ending or renewing are left to them: this waits for nobody, so nobody waits for it in a circle. The
/// lock reads the lease anew, so one that was renewed meanwhile holds.
const LAPSE: &str = concat!(
    "WITH lapsed AS (
         SELECT p.id FROM running_call r JOIN prompt p ON p.id = r.prompt_id WHERE r.lease_until <= ",
    clock!(),
    " AND r.prompt_id <> ALL ($3) ORDER BY r.lease_until LIMIT $1 FOR UPDATE OF p, r SKIP LOCKED
     ), given_up AS (
         DELETE FROM running_call r USING lapsed WHERE r.prompt_id = lapsed.id RETURNING r.prompt_id, r.announce
     )
     UPDATE prompt p SET status = 'failed', error = $2 FROM given_up WHERE p.id = given_up.prompt_id
     RETURNING p.id, p.user_id, p.created_at, p.status, p.error, p.model, p.prompt, p.response,
         p.llm_duration_ms, p.prompt_tokens, p.completion_tokens, p.finish_reason, given_up.announce"
);

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

fn known_from_row(row: &Row) -> Result<KnownKey, Error> {
    let fingerprint: &[u8] = get(row, 12)?;
    let fingerprint = fingerprint.try_into().map_err(|_| Cause::UnknownValue)?;
    let id = PromptId(get(row, 13)?);
    let is_there: Option<i64> = get(row, 0)?;
    let holds: Option<bool> = get(row, 14)?;
    let state = if is_there.is_none() {
        KeyState::Deleted
    } else {
        let prompt = prompt_from_row(row)?;
        match (prompt.status, holds) {
            (PromptStatus::Completed, _) => KeyState::Completed(prompt),
            (PromptStatus::Running | PromptStatus::Failed, Some(true)) => KeyState::InFlight(id),
            (PromptStatus::Running | PromptStatus::Failed, _) => KeyState::Lapsed(id),
        }
    };
    Ok(KnownKey { fingerprint, state })
}

async fn known(
    connection: &mut Connection,
    user_id: UserId,
    key_hash: &[u8; 32],
) -> Result<Option<KnownKey>, Error> {
    let row = connection
        .query_opt(
            KNOWN_KEY,
            &[&user_id.0, &&key_hash[..], &micros(KEY_LIFETIME)],
        )
        .await?;
    row.as_ref().map(known_from_row).transpose()
}

/// The only row of a statement that must answer with one.
async fn one_prompt(
    connection: &mut Connection,
    sql: &str,
    arguments: super::pool::Arguments<'_>,
) -> Result<Prompt, Error> {
    let rows = connection.write(sql, arguments).await?;
    prompt_from_row(rows.first().ok_or(Cause::UnknownValue)?)
}

async fn insert_running(connection: &mut Connection, call: &NewCall) -> Result<Prompt, Error> {
    one_prompt(
        connection,
        INSERT_RUNNING,
        &[
            &call.user_id.0,
            &call.created_at.0,
            &call.model,
            &call.prompt,
            &&call.holder.replica[..],
            &call.holder.call,
            &micros(call.lease),
            &call.announce,
        ],
    )
    .await
}

/// Inside a transaction that is rolled back, by closing its connection, if this fails.
async fn begin_with_key(
    connection: &mut Connection,
    call: &NewCall,
    key: &KeyClaim,
) -> Result<Begun, Error> {
    let (user, hash) = (call.user_id.0, &key.key_hash[..]);
    connection.query(LOCK_KEY, &[&user, &hash]).await?;
    let mut found = known(connection, call.user_id, &key.key_hash).await?;
    if let Some(KnownKey {
        state: KeyState::Lapsed(id),
        ..
    }) = found
    {
        // Its holder may be ending it in this very moment. Looked at again under the locks, what is seen stays.
        connection.query(LOCK_PROMPT, &[&id.0]).await?;
        connection.query(LOCK_LEASE, &[&id.0]).await?;
        found = known(connection, call.user_id, &key.key_hash).await?;
    }
    let prompt = match found {
        None => {
            check_quota(connection, call.user_id, call.max_prompts).await?;
            insert_running(connection, call).await?
        }
        Some(KnownKey {
            fingerprint,
            state: KeyState::Lapsed(id),
        }) if fingerprint == key.fingerprint => {
            one_prompt(
                connection,
                TAKE_OVER,
                &[
                    &id.0,
                    &call.model,
                    &&call.holder.replica[..],
                    &call.holder.call,
                    &micros(call.lease),
                    &call.announce,
                ],
            )
            .await?
        }
        Some(known) => return Ok(Begun::Known(known)),
    };
    let fingerprint = &key.fingerprint[..];
    connection
        .write(CLAIM, &[&user, &hash, &fingerprint, &prompt.id.0])
        .await?;
    Ok(Begun::Started(prompt))
}

#[async_trait]
impl CallStore for PostgresStore {
    async fn begin_call(&self, mut call: NewCall) -> Result<Begun, Error> {
        call.model = without_nul(call.model);
        let mut connection = self.pool.connection(PATIENCE).await?;
        if call.key.is_none() && call.max_prompts.is_none() {
            return Ok(Begun::Started(
                insert_running(&mut connection, &call).await?,
            ));
        }
        connection.begin().await?;
        let begun = match &call.key {
            Some(key) => begin_with_key(&mut connection, &call, key).await?,
            None => {
                check_quota(&mut connection, call.user_id, call.max_prompts).await?;
                Begun::Started(insert_running(&mut connection, &call).await?)
            }
        };
        connection.commit().await?;
        Ok(begun)
    }

    async fn known_key(
        &self,
        user_id: UserId,
        key_hash: &[u8; 32],
    ) -> Result<Option<KnownKey>, Error> {
        let mut connection = self.pool.connection(PATIENCE).await?;
        known(&mut connection, user_id, key_hash).await
    }

    async fn renew_leases(
        &self,
        replica: [u8; 16],
        ids: &[PromptId],
        lease: Duration,
    ) -> Result<u64, Error> {
        let ids: Vec<i64> = ids.iter().map(|id| id.0).collect();
        let mut connection = self.pool.connection(PATIENCE).await?;
        let renewed = connection
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

    async fn finish_call(
        &self,
        id: PromptId,
        holder: Holder,
        llm_duration_ms: Option<u32>,
        outcome: CallOutcome,
    ) -> Result<Option<Prompt>, Error> {
        let mut connection = self.pool.connection(PATIENCE).await?;
        let number = |value: Option<u32>| value.map(i64::from);
        let duration = number(llm_duration_ms);
        let replica = &holder.replica[..];
        let rows = match outcome {
            CallOutcome::Failed(code) => {
                let (status, code) = (PromptStatus::Failed.as_str(), code.as_str());
                let (text, tokens) = (None::<&str>, None::<i64>);
                connection
                    .write(
                        FINISH,
                        &[
                            &id.0,
                            &replica,
                            &holder.call,
                            &status,
                            &code,
                            &text,
                            &text,
                            &text,
                            &duration,
                            &tokens,
                            &tokens,
                        ],
                    )
                    .await?
            }
            CallOutcome::Completed {
                response,
                model,
                finish_reason,
                prompt_tokens,
                completion_tokens,
                embedding,
            } => {
                let status = PromptStatus::Completed.as_str();
                let code = None::<&str>;
                let (response, model) = (without_nul(response.to_string()), without_nul(model));
                let finish_reason = finish_reason.map(without_nul);
                let (asked, answered) = (number(prompt_tokens), number(completion_tokens));
                let vector = match embedding {
                    Some((id, vector)) => {
                        let number = self.models.number(&mut connection, &id, &vector).await?;
                        Some((number, HalfVector::from_f32_slice(&vector.0)))
                    }
                    None => None,
                };
                let mut arguments: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> = vec![
                    &id.0,
                    &replica,
                    &holder.call,
                    &status,
                    &code,
                    &response,
                    &model,
                    &finish_reason,
                    &duration,
                    &asked,
                    &answered,
                ];
                let sql = match &vector {
                    Some((number, vector)) => {
                        arguments.push(number);
                        arguments.push(vector);
                        FINISH_WITH_VECTOR
                    }
                    None => FINISH,
                };
                connection.write(sql, &arguments).await?
            }
        };
        rows.first().map(prompt_from_row).transpose()
    }

    async fn lapse_calls(
        &self,
        limit: usize,
        spared: &[PromptId],
    ) -> Result<Vec<LapsedCall>, Error> {
        let spared: Vec<i64> = spared.iter().map(|id| id.0).collect();
        let mut connection = self.pool.connection(PATIENCE).await?;
        let rows = connection
            .write(LAPSE, &[&sql_limit(limit), &LAPSED.as_str(), &spared])
            .await?;
        rows.iter()
            .map(|row| {
                Ok(LapsedCall {
                    prompt: prompt_from_row(row)?,
                    announce: get(row, 12)?,
                })
            })
            .collect()
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
        let mut connection = self.pool.connection(PATIENCE).await?;
        let counted = connection
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
