//! Running calls, idempotency keys and the day's count in SQLite.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::{Connection, params};

use super::SqliteStore;
use super::prompts::has_room;
use super::statements::{all, execute, one};
use super::usage::{meter, reserve};
use super::vectors::put_vector;
use crate::domain::{FailureCode, Prompt, PromptId, Timestamp, UsageEntry, UserId};
use crate::store::calls::{EXPIRED, micros};
use crate::store::rows::{self, Defect, running_call_columns};
use crate::store::{
    Begun, CallOutcome, CallStore, DailyLimit, Error, ExpiredCall, Holder, KEY_LIFETIME, KeyClaim,
    KeyState, NewCall, prompt_columns,
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
) -> Result<Option<KeyState>, Error> {
    let now = clock(connection)?;
    let newest_free = now.saturating_sub(micros(KEY_LIFETIME));
    one(
        connection,
        "SELECT k.fingerprint, k.prompt_id, p.status, coalesce(r.lease_until > ?3, false) AS is_leased
         FROM idempotency_key k
         LEFT JOIN prompt p ON p.id = k.prompt_id
         LEFT JOIN running_call r ON r.prompt_id = k.prompt_id
         WHERE k.user_id = ?1 AND k.key_hash = ?2 AND k.claimed_at > ?4",
        params![user_id.0, claim.key_hash, now, newest_free],
        |row| rows::key_state(row, claim),
    )
}

fn begin(connection: &Connection, call: &NewCall) -> Result<Begun, Error> {
    let state = match &call.key {
        Some(claim) => key_state(connection, call.user_id, claim)?,
        None => None,
    };
    let now = clock(connection)?;
    let reserved;
    let prompt = match state {
        None => {
            if let Some(most) = call.max_prompts
                && !has_room(connection, call.user_id, most)?
            {
                return Err(Error::QuotaExceeded);
            }
            reserved = reserve(connection, call)?;
            one(
                connection,
                concat!(
                    "INSERT INTO prompt (user_id, created_at, status, model, source, prompt)
                     VALUES (?1, ?2, 'running', ?3, ?4, ?5) RETURNING ",
                    prompt_columns!()
                ),
                params![
                    call.user_id.0,
                    call.created_at.0,
                    call.model,
                    call.source.as_str(),
                    call.prompt
                ],
                rows::prompt,
            )?
        }
        Some(KeyState::Expired(id)) => {
            // Unless it was ended before.
            interrupt(connection, id)?;
            reserved = reserve(connection, call)?;
            one(
                connection,
                concat!(
                    "UPDATE prompt SET status = 'running', error = NULL, model = ?2
                     WHERE id = ?1 RETURNING ",
                    prompt_columns!()
                ),
                params![id.0, call.model],
                rows::prompt,
            )?
        }
        Some(state) => return Ok(Begun::Known(state)),
    };
    let prompt = prompt.ok_or(Defect::UnknownValue)?;
    if let Some(chat) = &call.chat {
        // A row that is taken over has the same texts already.
        execute(
            connection,
            "INSERT INTO chat_call (prompt_id, user_id, metadata, messages, request)
             VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING",
            params![
                prompt.id.0,
                prompt.user_id.0,
                chat.metadata,
                chat.messages,
                chat.request
            ],
        )?;
    }
    if let Some(key) = &call.key {
        execute(
            connection,
            "INSERT INTO idempotency_key (user_id, key_hash, fingerprint, prompt_id, claimed_at)
             VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO UPDATE SET
             fingerprint = excluded.fingerprint, prompt_id = excluded.prompt_id, claimed_at = excluded.claimed_at",
            params![call.user_id.0, key.key_hash, key.fingerprint, prompt.id.0, now],
        )?;
    }
    execute(
        connection,
        "INSERT INTO running_call (prompt_id, replica, call, lease_until, announce, is_kept,
                                   user_id, api_key_id, source, model, begun_at, reserved)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
        params![
            prompt.id.0,
            call.holder.replica,
            call.holder.call,
            now.saturating_add(micros(call.lease)),
            call.announce,
            call.is_kept,
            call.user_id.0,
            call.api_key_id.map(|id| id.to_string()),
            call.source.as_str(),
            call.model,
            call.created_at.0,
            reserved.0,
        ],
    )?;
    Ok(Begun::counted(prompt, count(connection, call.daily)?))
}

/// Counts a call on its day, unless the day has no call left. Returns whether it has had one.
fn count(connection: &Connection, daily: Option<DailyLimit>) -> Result<bool, Error> {
    let Some(DailyLimit { day, calls }) = daily else {
        return Ok(true);
    };
    if calls == 0 {
        return Ok(false);
    }
    let most = i64::try_from(calls).unwrap_or(i64::MAX);
    let sql = "INSERT INTO upstream_day (day, calls) VALUES (?1, 1)
               ON CONFLICT DO UPDATE SET calls = calls + 1 WHERE calls < ?2";
    Ok(execute(connection, sql, [day, most])? > 0)
}

/// Lets a repeated post make a call of its own.
fn free_key(connection: &Connection, id: PromptId) -> Result<(), Error> {
    let sql = "DELETE FROM idempotency_key WHERE prompt_id = ?1";
    execute(connection, sql, [id.0])?;
    Ok(())
}

fn settle(
    connection: &Connection,
    id: PromptId,
    holder: Holder,
    outcome: &CallOutcome,
    f16: Option<&[u8]>,
) -> Result<Option<Prompt>, Error> {
    let released = one(
        connection,
        concat!(
            "DELETE FROM running_call WHERE prompt_id = ?1 AND replica = ?2 AND call = ?3 RETURNING ",
            running_call_columns!()
        ),
        params![id.0, holder.replica, holder.call],
        rows::running_call,
    )?;
    let Some(released) = released else {
        return Ok(None);
    };
    // Also if the prompt was deleted meanwhile.
    meter(connection, &released, &outcome.usage)?;
    let prompt = one(
        connection,
        concat!(
            "UPDATE prompt SET status = ?2, error = ?3, response = ?4, model = coalesce(?5, model),
             finish_reason = ?6, llm_duration_ms = ?7, prompt_tokens = ?8, completion_tokens = ?9,
             cost = ?10 WHERE id = ?1 RETURNING ",
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
            outcome.details.cost.map(|cost| cost.0),
        ],
        rows::prompt,
    )?;
    if outcome.error.is_some() {
        free_key(connection, id)?;
    }
    if !outcome.is_kept {
        execute(connection, "DELETE FROM prompt WHERE id = ?1", [id.0])?;
        return Ok(prompt);
    }
    if prompt.is_none() {
        return Ok(None);
    }
    if let Some(answer) = &outcome.answer {
        let sql = "UPDATE chat_call SET answer = ?2 WHERE prompt_id = ?1";
        execute(connection, sql, params![id.0, answer])?;
    }
    if let (Some((model, _)), Some(f16)) = (&outcome.embedding, f16) {
        put_vector(connection, id, model, f16)?;
    }
    Ok(prompt)
}

/// Ends the lease of a call that has expired, and meters the call; does nothing if it has no lease.
fn interrupt(connection: &Connection, id: PromptId) -> Result<(), Error> {
    let released = one(
        connection,
        concat!(
            "DELETE FROM running_call WHERE prompt_id = ?1 RETURNING ",
            running_call_columns!()
        ),
        [id.0],
        rows::running_call,
    )?;
    let Some(released) = released else {
        return Ok(());
    };
    let entry = UsageEntry::interrupted(released.model.as_str());
    meter(connection, &released, &[entry])
}

fn expire(
    connection: &Connection,
    limit: usize,
    spared: &HashSet<PromptId>,
) -> Result<Vec<ExpiredCall>, Error> {
    let over: Vec<(PromptId, bool, bool)> = all(
        connection,
        "SELECT prompt_id, announce, is_kept FROM running_call WHERE lease_until <= ?1
         ORDER BY lease_until",
        [clock(connection)?],
        |row| {
            Ok((
                PromptId(row.read("prompt_id")?),
                row.read("announce")?,
                row.read("is_kept")?,
            ))
        },
    )?;
    let over = over.into_iter().filter(|(id, ..)| !spared.contains(id));
    let mut expired = Vec::new();
    for (id, announce, is_kept) in over.take(limit) {
        interrupt(connection, id)?;
        if !is_kept {
            // Nothing is left that a repeated post could take over.
            free_key(connection, id)?;
            execute(connection, "DELETE FROM prompt WHERE id = ?1", [id.0])?;
            continue;
        }
        let prompt = one(
            connection,
            concat!(
                "UPDATE prompt SET status = 'failed', error = ?2 WHERE id = ?1 RETURNING ",
                prompt_columns!()
            ),
            params![id.0, EXPIRED.as_str()],
            rows::prompt,
        )?;
        expired.extend(prompt.map(|prompt| ExpiredCall { prompt, announce }));
    }
    Ok(expired)
}

#[async_trait]
impl CallStore for SqliteStore {
    async fn begin_call(&self, call: NewCall) -> Result<Begun, Error> {
        let begun = self
            .writer
            .write(move |connection| begin(connection, &call))
            .await?;
        if !matches!(begun, Begun::Known(_)) {
            self.writer
                .status
                .running_calls
                .fetch_add(1, Ordering::Relaxed);
        }
        Ok(begun)
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
                let sql = "UPDATE running_call SET lease_until = ?3 WHERE prompt_id = ?1 AND replica = ?2";
                let mut renewed = 0;
                for id in ids {
                    renewed += execute(connection, sql, params![id.0, replica, until])?;
                }
                Ok(renewed as u64)
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
        let embedding = outcome.embedding.as_ref();
        let f16 = embedding.map(|(_, embedding)| embedding.to_f16_bytes());
        let settled = self
            .writer
            .write(move |connection| settle(connection, id, holder, &outcome, f16.as_deref()))
            .await?;
        self.writer
            .status
            .running_calls
            .fetch_sub(1, Ordering::Relaxed);
        Ok(settled)
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
                let sql = "DELETE FROM idempotency_key WHERE claimed_at <= ?1";
                let gone = execute(connection, sql, [horizon.minus(KEY_LIFETIME).0])?;
                Ok(gone as u64)
            })
            .await
    }
}
