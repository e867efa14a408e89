//! Running calls, idempotency keys and the day's count in SQLite.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, params};

use super::SqliteStore;
use super::error::Failure;
use super::prompts::{check_quota, prompt_by_id};
use super::vectors::{StoredVector, insert_vector};
use crate::domain::{
    CallDetails, FailureCode, ModelId, Prompt, PromptId, PromptStatus, Timestamp, UserId,
};
use crate::store::{
    Begun, CallOutcome, CallStore, Error, Holder, KEY_LIFETIME, KeyClaim, KeyState, KnownKey,
    LapsedCall, NewCall,
};

/// What a lapsed call failed with.
const LAPSED: FailureCode = FailureCode::Interrupted;

/// Microseconds since the epoch by the clock of the one machine that SQLite's file is used on, to the millisecond.
fn clock(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("SELECT CAST(unixepoch('subsec') * 1000000 AS INTEGER)")?
        .query_row([], |row| row.get(0))
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// A stored key: its fingerprint, its prompt's id, and of that prompt, unless it was deleted, the status and until when its
/// lease runs, if it has one.
type KeyRow = ([u8; 32], i64, Option<String>, Option<i64>);

/// The stored key and the prompt it was claimed for.
fn known_key(
    connection: &Connection,
    user_id: UserId,
    key_hash: &[u8; 32],
) -> Result<Option<KnownKey>, Failure> {
    let newest_free = clock(connection)?.saturating_sub(micros(KEY_LIFETIME));
    let found: Option<KeyRow> = connection
        .prepare_cached(
            "SELECT k.fingerprint, k.prompt_id, p.status, r.lease_until FROM idempotency_key k
             LEFT JOIN prompt p ON p.id = k.prompt_id
             LEFT JOIN running_call r ON r.prompt_id = k.prompt_id
             WHERE k.user_id = ?1 AND k.key_hash = ?2 AND k.claimed_at > ?3",
        )?
        .query_row(params![user_id.0, key_hash, newest_free], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })
        .optional()?;
    let Some((fingerprint, id, status, lease_until)) = found else {
        return Ok(None);
    };
    let id = PromptId(id);
    let state = match status {
        None => KeyState::Deleted,
        Some(status) if status == PromptStatus::Completed.as_str() => {
            prompt_by_id(connection, id)?.map_or(KeyState::Deleted, KeyState::Completed)
        }
        Some(_) => {
            let now = clock(connection)?;
            if lease_until.is_some_and(|until| until > now) {
                KeyState::InFlight(id)
            } else {
                KeyState::Lapsed(id)
            }
        }
    };
    Ok(Some(KnownKey { fingerprint, state }))
}

fn begin(connection: &Connection, call: NewCall) -> Result<Begun, Failure> {
    let known = match &call.key {
        Some(key) => known_key(connection, call.user_id, &key.key_hash)?,
        None => None,
    };
    let lapsed = match (known, &call.key) {
        (Some(known), Some(key)) => match known.state {
            KeyState::Lapsed(id) if known.fingerprint == key.fingerprint => Some(id),
            KeyState::InFlight(_)
            | KeyState::Lapsed(_)
            | KeyState::Completed(_)
            | KeyState::Deleted => return Ok(Begun::Known(known)),
        },
        _ => None,
    };
    let now = clock(connection)?;
    let prompt = match lapsed {
        Some(id) => take_over(connection, id, &call.model)?,
        None => insert_running(connection, &call)?,
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
    let id = connection
        .prepare_cached(
            "INSERT INTO prompt (user_id, created_at, status, model, prompt) VALUES (?1, ?2, 'running', ?3, ?4)",
        )?
        .insert(params![
            call.user_id.0,
            call.created_at.0,
            call.model,
            call.prompt
        ])?;
    Ok(Prompt {
        id: PromptId(id),
        user_id: call.user_id,
        prompt: call.prompt.clone(),
        response: None,
        model: call.model.clone(),
        status: PromptStatus::Running,
        error: None,
        created_at: call.created_at,
        call: CallDetails::default(),
    })
}

fn take_over(connection: &Connection, id: PromptId, model: &str) -> Result<Prompt, Failure> {
    connection
        .prepare_cached(
            "UPDATE prompt SET status = 'running', error = NULL, model = ?2 WHERE id = ?1",
        )?
        .execute(params![id.0, model])?;
    // Its key was found to be of a prompt that is there, in this same transaction.
    Ok(prompt_by_id(connection, id)?.ok_or(rusqlite::Error::QueryReturnedNoRows)?)
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

/// An outcome whose vector has its stored form already.
struct Ending {
    status: PromptStatus,
    error: Option<FailureCode>,
    response: Option<Arc<str>>,
    model: Option<String>,
    finish_reason: Option<String>,
    prompt_tokens: Option<u32>,
    completion_tokens: Option<u32>,
    vector: Option<(ModelId, StoredVector)>,
}

impl From<CallOutcome> for Ending {
    fn from(outcome: CallOutcome) -> Self {
        match outcome {
            CallOutcome::Completed {
                response,
                model,
                finish_reason,
                prompt_tokens,
                completion_tokens,
                embedding,
            } => Self {
                status: PromptStatus::Completed,
                error: None,
                response: Some(response),
                model: Some(model),
                finish_reason,
                prompt_tokens,
                completion_tokens,
                vector: embedding.map(|(model, vector)| (model, StoredVector::from(&vector))),
            },
            CallOutcome::Failed(code) => Self {
                status: PromptStatus::Failed,
                error: Some(code),
                response: None,
                model: None,
                finish_reason: None,
                prompt_tokens: None,
                completion_tokens: None,
                vector: None,
            },
        }
    }
}

fn finish(
    connection: &Connection,
    id: PromptId,
    holder: Holder,
    llm_duration_ms: Option<u32>,
    ending: &Ending,
) -> Result<Option<Prompt>, Failure> {
    let given_up = connection
        .prepare_cached(
            "DELETE FROM running_call WHERE prompt_id = ?1 AND replica = ?2 AND call = ?3",
        )?
        .execute(params![id.0, holder.replica, holder.call])?;
    if given_up == 0 {
        return Ok(None);
    }
    connection
        .prepare_cached(
            "UPDATE prompt SET status = ?2, error = ?3, response = ?4, model = coalesce(?5, model), finish_reason = ?6,
             llm_duration_ms = ?7, prompt_tokens = ?8, completion_tokens = ?9 WHERE id = ?1",
        )?
        .execute(params![
            id.0,
            ending.status.as_str(),
            ending.error.map(FailureCode::as_str),
            ending.response,
            ending.model,
            ending.finish_reason,
            llm_duration_ms,
            ending.prompt_tokens,
            ending.completion_tokens,
        ])?;
    if ending.status == PromptStatus::Failed {
        connection
            .prepare_cached("DELETE FROM idempotency_key WHERE prompt_id = ?1")?
            .execute([id.0])?;
    }
    let prompt = prompt_by_id(connection, id)?;
    if let (Some(prompt), Some((model, vector))) = (&prompt, &ending.vector) {
        insert_vector(connection, prompt.user_id, id, model, vector)?;
    }
    Ok(prompt)
}

fn lapse(
    connection: &Connection,
    limit: usize,
    spared: &HashSet<PromptId>,
) -> Result<Vec<LapsedCall>, Failure> {
    let over = connection
        .prepare_cached(
            "SELECT prompt_id, announce FROM running_call WHERE lease_until <= ?1 ORDER BY lease_until",
        )?
        .query_map([clock(connection)?], |row| {
            Ok((PromptId(row.get(0)?), row.get(1)?))
        })?
        .filter(|row| !matches!(row, Ok((id, _)) if spared.contains(id)))
        .take(limit)
        .collect::<rusqlite::Result<Vec<(PromptId, bool)>>>()?;
    let mut lapsed = Vec::with_capacity(over.len());
    for (id, announce) in over {
        connection
            .prepare_cached("DELETE FROM running_call WHERE prompt_id = ?1")?
            .execute([id.0])?;
        connection
            .prepare_cached("UPDATE prompt SET status = 'failed', error = ?2 WHERE id = ?1")?
            .execute(params![id.0, LAPSED.as_str()])?;
        let prompt = prompt_by_id(connection, id)?;
        lapsed.extend(prompt.map(|prompt| LapsedCall { prompt, announce }));
    }
    Ok(lapsed)
}

#[async_trait]
impl CallStore for SqliteStore {
    async fn begin_call(&self, call: NewCall) -> Result<Begun, Error> {
        self.writer
            .write(move |connection| begin(connection, call))
            .await
    }

    async fn known_key(
        &self,
        user_id: UserId,
        key_hash: &[u8; 32],
    ) -> Result<Option<KnownKey>, Error> {
        let key_hash = *key_hash;
        self.readers
            .read(move |connection| {
                let transaction = connection.unchecked_transaction()?;
                known_key(&transaction, user_id, &key_hash)
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

    async fn finish_call(
        &self,
        id: PromptId,
        holder: Holder,
        llm_duration_ms: Option<u32>,
        outcome: CallOutcome,
    ) -> Result<Option<Prompt>, Error> {
        let ending = Ending::from(outcome);
        self.writer
            .write(move |connection| finish(connection, id, holder, llm_duration_ms, &ending))
            .await
    }

    async fn lapse_calls(
        &self,
        limit: usize,
        spared: &[PromptId],
    ) -> Result<Vec<LapsedCall>, Error> {
        // Asked every few seconds, mostly for nothing: the writer is left alone then.
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
            .write(move |connection| lapse(connection, limit, &spared))
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
