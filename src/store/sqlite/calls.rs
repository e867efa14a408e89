//! Running calls, idempotency keys and the day's count in SQLite.

use std::collections::HashSet;
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::{Connection, params};

use super::SqliteStore;
use super::error::Failure;
use super::prompts::{check_quota, parse_status, prompt_by_id, prompt_from_row};
use super::vectors::{StoredVector, insert_vector};
use crate::domain::{FailureCode, Prompt, PromptId, Timestamp, UserId};
use crate::store::calls::{EXPIRED, StoredKey, micros};
use crate::store::{
    Begun, CallOutcome, CallStore, Error, ExpiredCall, Holder, KEY_LIFETIME, KeyClaim, KeyState,
    NewCall, prompt_columns,
};

/// Microseconds since the epoch, to the millisecond, by the clock of the machine. SQLite's file is
/// used on one machine.
fn clock(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("SELECT CAST(unixepoch('subsec') * 1000000 AS INTEGER)")?
        .query_row([], |row| row.get(0))
}

/// The state of a user's key.
fn key_state(
    connection: &Connection,
    user_id: UserId,
    claim: &KeyClaim,
) -> Result<Option<KeyState>, Failure> {
    let now = clock(connection)?;
    let mut statement = connection.prepare_cached(
        "SELECT k.fingerprint, k.prompt_id, p.status, coalesce(r.lease_until > ?3, false) AS is_leased
         FROM idempotency_key k
         LEFT JOIN prompt p ON p.id = k.prompt_id
         LEFT JOIN running_call r ON r.prompt_id = k.prompt_id
         WHERE k.user_id = ?1 AND k.key_hash = ?2 AND k.claimed_at > ?4",
    )?;
    let newest_free = now.saturating_sub(micros(KEY_LIFETIME));
    let arguments = params![user_id.0, claim.key_hash, now, newest_free];
    let mut rows = statement.query_and_then(arguments, |row| -> Result<_, Failure> {
        Ok(StoredKey {
            fingerprint: row.get("fingerprint")?,
            prompt_id: PromptId(row.get("prompt_id")?),
            status: row
                .get_ref("status")?
                .as_str_or_null()
                .map_err(rusqlite::Error::from)?
                .map(parse_status)
                .transpose()?,
            is_leased: row.get("is_leased")?,
        }
        .state(claim))
    })?;
    rows.next().transpose()
}

fn begin(connection: &Connection, call: &NewCall) -> Result<Begun, Failure> {
    let state = match &call.key {
        Some(claim) => key_state(connection, call.user_id, claim)?,
        None => None,
    };
    let now = clock(connection)?;
    let prompt = match state {
        None => insert_running(connection, call)?,
        Some(KeyState::Expired(id)) => take_over(connection, id, &call.model)?,
        Some(state) => return Ok(Begun::Known(state)),
    };
    if let Some(key) = &call.key {
        claim(connection, call.user_id, key, prompt.id, now)?;
    }
    connection
        .prepare_cached(
            "INSERT INTO running_call (prompt_id, replica, call, lease_until, announce)
             VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO UPDATE SET replica = excluded.replica,
             call = excluded.call, lease_until = excluded.lease_until, announce = excluded.announce",
        )?
        .execute(params![
            prompt.id.0,
            call.holder.replica,
            call.holder.call,
            now.saturating_add(micros(call.lease)),
            call.announce,
        ])?;
    Ok(Begun::Started(prompt))
}

fn insert_running(connection: &Connection, call: &NewCall) -> Result<Prompt, Failure> {
    check_quota(connection, call.user_id, call.max_prompts)?;
    one_prompt(
        connection,
        concat!(
            "INSERT INTO prompt (user_id, created_at, status, model, prompt)
             VALUES (?1, ?2, 'running', ?3, ?4) RETURNING ",
            prompt_columns!()
        ),
        params![call.user_id.0, call.created_at.0, call.model, call.prompt],
    )
}

fn take_over(connection: &Connection, id: PromptId, model: &str) -> Result<Prompt, Failure> {
    one_prompt(
        connection,
        concat!(
            "UPDATE prompt SET status = 'running', error = NULL, model = ?2 WHERE id = ?1 RETURNING ",
            prompt_columns!()
        ),
        params![id.0, model],
    )
}

/// The prompt that a statement returns.
fn one_prompt(
    connection: &Connection,
    sql: &str,
    arguments: &[&dyn rusqlite::ToSql],
) -> Result<Prompt, Failure> {
    let mut statement = connection.prepare_cached(sql)?;
    let mut rows = statement.query_and_then(arguments, prompt_from_row)?;
    let prompt = rows.next().ok_or(rusqlite::Error::QueryReturnedNoRows)?;
    // A statement that changes rows is complete only when it is stepped to its end.
    rows.next().transpose()?;
    prompt
}

fn claim(
    connection: &Connection,
    user_id: UserId,
    key: &KeyClaim,
    id: PromptId,
    now: i64,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO idempotency_key (user_id, key_hash, fingerprint, prompt_id, claimed_at)
             VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO UPDATE SET
             fingerprint = excluded.fingerprint, prompt_id = excluded.prompt_id, claimed_at = excluded.claimed_at",
        )?
        .execute(params![
            user_id.0,
            key.key_hash,
            key.fingerprint,
            id.0,
            now
        ])?;
    Ok(())
}

fn settle(
    connection: &Connection,
    id: PromptId,
    holder: Holder,
    outcome: &CallOutcome,
    vector: Option<&StoredVector>,
) -> Result<Option<Prompt>, Failure> {
    let released = connection
        .prepare_cached(
            "DELETE FROM running_call WHERE prompt_id = ?1 AND replica = ?2 AND call = ?3",
        )?
        .execute(params![id.0, holder.replica, holder.call])?;
    if released == 0 {
        return Ok(None);
    }
    let prompt = one_prompt(
        connection,
        concat!(
            "UPDATE prompt SET status = ?2, error = ?3, response = ?4, model = coalesce(?5, model),
             finish_reason = ?6, llm_duration_ms = ?7, prompt_tokens = ?8, completion_tokens = ?9
             WHERE id = ?1 RETURNING ",
            prompt_columns!()
        ),
        params![
            id.0,
            outcome.status().as_str(),
            outcome.error.map(FailureCode::as_str),
            outcome.response,
            outcome.model,
            outcome.details.finish_reason,
            outcome.details.duration_ms,
            outcome.details.prompt_tokens,
            outcome.details.completion_tokens,
        ],
    )?;
    if outcome.error.is_some() {
        connection
            .prepare_cached("DELETE FROM idempotency_key WHERE prompt_id = ?1")?
            .execute([id.0])?;
    }
    if let (Some((model, _)), Some(vector)) = (&outcome.embedding, vector) {
        insert_vector(connection, prompt.user_id, id, model, vector)?;
    }
    Ok(Some(prompt))
}

fn expire(
    connection: &Connection,
    limit: usize,
    spared: &HashSet<PromptId>,
) -> Result<Vec<ExpiredCall>, Failure> {
    let over = connection
        .prepare_cached(
            "SELECT prompt_id, announce FROM running_call WHERE lease_until <= ?1
             ORDER BY lease_until",
        )?
        .query_map([clock(connection)?], |row| {
            Ok((PromptId(row.get("prompt_id")?), row.get("announce")?))
        })?
        .filter(|row| !matches!(row, Ok((id, _)) if spared.contains(id)))
        .take(limit)
        .collect::<rusqlite::Result<Vec<(PromptId, bool)>>>()?;
    let mut expired = Vec::with_capacity(over.len());
    for (id, announce) in over {
        connection
            .prepare_cached("DELETE FROM running_call WHERE prompt_id = ?1")?
            .execute([id.0])?;
        connection
            .prepare_cached("UPDATE prompt SET status = 'failed', error = ?2 WHERE id = ?1")?
            .execute(params![id.0, EXPIRED.as_str()])?;
        let prompt = prompt_by_id(connection, id)?;
        expired.extend(prompt.map(|prompt| ExpiredCall { prompt, announce }));
    }
    Ok(expired)
}

#[async_trait]
impl CallStore for SqliteStore {
    async fn begin_call(&self, call: NewCall) -> Result<Begun, Error> {
        self.writer
            .write(move |connection| begin(connection, &call))
            .await
    }

    async fn key_state(
        &self,
        user_id: UserId,
        claim: &KeyClaim,
    ) -> Result<Option<KeyState>, Error> {
        let claim = *claim;
        self.readers
            .read(move |connection| {
                let transaction = connection.unchecked_transaction()?;
                key_state(&transaction, user_id, &claim)
            })
            .await
    }

    async fn renew_leases(
        &self,
        replica: [u8; 16],
        ids: &[PromptId],
        lease: Duration,
    ) -> Result<u64, Error> {
        let ids: HashSet<PromptId> = ids.iter().copied().collect();
        self.writer
            .write(move |connection| {
                let until = clock(connection)?.saturating_add(micros(lease));
                let mut statement = connection.prepare_cached(
                    "UPDATE running_call SET lease_until = ?3 WHERE prompt_id = ?1 AND replica = ?2",
                )?;
                let mut renewed = 0;
                for id in ids {
                    renewed += statement.execute(params![id.0, replica, until])?;
                }
                Ok(u64::try_from(renewed).unwrap_or(u64::MAX))
            })
            .await
    }

    async fn settle_call(
        &self,
        id: PromptId,
        holder: Holder,
        outcome: CallOutcome,
    ) -> Result<Option<Prompt>, Error> {
        // Converted here rather than on the writer's thread.
        let vector = outcome
            .embedding
            .as_ref()
            .map(|(_, embedding)| StoredVector::from(embedding));
        self.writer
            .write(move |connection| settle(connection, id, holder, &outcome, vector.as_ref()))
            .await
    }

    async fn expire_calls(
        &self,
        limit: usize,
        spared: &[PromptId],
    ) -> Result<Vec<ExpiredCall>, Error> {
        // Called every few seconds, mostly with nothing to end: the writer is not disturbed then.
        let any = self
            .readers
            .read(|connection| {
                let now = clock(connection)?;
                Ok(connection
                    .prepare_cached("SELECT 1 FROM running_call WHERE lease_until <= ?1")?
                    .exists([now])?)
            })
            .await?;
        if !any {
            return Ok(Vec::new());
        }
        let spared: HashSet<PromptId> = spared.iter().copied().collect();
        self.writer
            .write(move |connection| expire(connection, limit, &spared))
            .await
    }

    async fn purge_keys(&self, horizon: Timestamp) -> Result<u64, Error> {
        self.writer
            .write_vital(move |connection| {
                let last = horizon.minus(KEY_LIFETIME).0;
                let gone = connection
                    .prepare_cached("DELETE FROM idempotency_key WHERE claimed_at <= ?1")?
                    .execute([last])?;
                Ok(u64::try_from(gone).unwrap_or(u64::MAX))
            })
            .await
    }

    async fn count_upstream_call(&self, day: i64, limit: u64) -> Result<bool, Error> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.writer
            .write(move |connection| {
                if limit == 0 {
                    return Ok(false);
                }
                let counted = connection
                    .prepare_cached(
                        "INSERT INTO upstream_day (day, calls) VALUES (?1, 1)
                         ON CONFLICT DO UPDATE SET calls = calls + 1 WHERE calls < ?2",
                    )?
                    .execute([day, limit])?;
                Ok(counted > 0)
            })
            .await
    }
}
