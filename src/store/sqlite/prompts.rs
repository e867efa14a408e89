//! Prompts and their vectors in SQLite.

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::error::{Defect, Failure};
use super::vectors::{StoredVector, model_number, page_of_vectors, put_vector};
use super::{SqliteStore, sql_limit};
use crate::domain::{
    CallDetails, Embedding, FailureCode, ModelId, Prompt, PromptId, PromptStatus, Timestamp, UserId,
};
use crate::store::{
    Access, Claim, Coverage, DeletedPrompt, Error, PromptPage, PromptStore, PromptsRead,
    Unembedded, VectorCursor, VectorPage, prompt_columns,
};

/// Stands for "completed" among the models of `prompt_count`, as the schema says.
const COMPLETED: i64 = 0;

/// Stands for "all users together" in `prompt_count`, as the schema says.
const ALL_USERS: i64 = 0;

const PROMPT_BY_ID: &str = concat!(
    "SELECT ",
    prompt_columns!(),
    " FROM prompt WHERE id = ?1 AND (?2 IS NULL OR user_id = ?2)"
);

const PROMPTS_BEFORE: &str = concat!(
    "SELECT ",
    prompt_columns!(),
    " FROM prompt WHERE user_id = ?1 AND id < ?2 ORDER BY id DESC LIMIT ?3"
);

const TEXT_BYTES_BY_ID: &str =
    "SELECT octet_length(prompt) + coalesce(octet_length(response), 0) FROM prompt
     WHERE id = ?1 AND (?2 IS NULL OR user_id = ?2)";

/// Reads the columns of [`prompt_columns`].
pub(super) fn prompt_from_row(row: &Row<'_>) -> Result<Prompt, Failure> {
    let status = row.get_ref("status")?;
    let error = row.get_ref("error")?;
    let error = error.as_str_or_null().map_err(rusqlite::Error::from)?;
    Ok(Prompt {
        id: PromptId(row.get("id")?),
        user_id: UserId(row.get("user_id")?),
        created_at: Timestamp(row.get("created_at")?),
        status: parse_status(status.as_str().map_err(rusqlite::Error::from)?)?,
        error: error
            .map(|word| FailureCode::parse(word).ok_or(Defect::UnknownWord))
            .transpose()?,
        model: row.get("model")?,
        prompt: row.get("prompt")?,
        response: row.get("response")?,
        call: CallDetails {
            duration_ms: row.get("llm_duration_ms")?,
            prompt_tokens: row.get("prompt_tokens")?,
            completion_tokens: row.get("completion_tokens")?,
            finish_reason: row.get("finish_reason")?,
        },
    })
}

/// The status behind a stored word.
pub(super) fn parse_status(word: &str) -> Result<PromptStatus, Failure> {
    Ok(PromptStatus::parse(word).ok_or(Defect::UnknownWord)?)
}

fn count(connection: &Connection, user_id: i64, model_number: i64) -> rusqlite::Result<u64> {
    let n = connection
        .prepare_cached("SELECT n FROM prompt_count WHERE user_id = ?1 AND model_id = ?2")?
        .query_row([user_id, model_number], |row| row.get::<_, i64>(0))
        .optional()?;
    Ok(n.and_then(|n| u64::try_from(n).ok()).unwrap_or(0))
}

/// The prompt of that id.
pub(super) fn prompt_by_id(
    connection: &Connection,
    id: PromptId,
) -> Result<Option<Prompt>, Failure> {
    connection
        .prepare_cached(PROMPT_BY_ID)?
        .query_and_then(params![id.0, None::<i64>], prompt_from_row)?
        .next()
        .transpose()
}

/// Whether the user keeps fewer prompts than that. Counts in the index by user, at most as far as
/// needed.
fn has_room(connection: &Connection, user_id: UserId, max_prompts: u32) -> rusqlite::Result<bool> {
    connection
        .prepare_cached(
            "SELECT count(*) < ?2 FROM (SELECT 1 FROM prompt WHERE user_id = ?1 LIMIT ?2)",
        )?
        .query_row(params![user_id.0, max_prompts], |row| row.get(0))
}

/// Fails if the user may not keep another prompt.
pub(super) fn check_quota(
    connection: &Connection,
    user_id: UserId,
    max_prompts: Option<u32>,
) -> Result<(), Failure> {
    match max_prompts {
        Some(most) if !has_room(connection, user_id, most)? => Err(Error::QuotaExceeded.into()),
        Some(_) | None => Ok(()),
    }
}

#[async_trait]
impl PromptStore for SqliteStore {
    async fn has_room(&self, user_id: UserId, max_prompts: u32) -> Result<bool, Error> {
        self.readers
            .read(move |connection| Ok(has_room(connection, user_id, max_prompts)?))
            .await
    }

    async fn prompt(&self, user_id: UserId, id: PromptId) -> Result<Option<Prompt>, Error> {
        let mut read = self.prompts(Some(user_id), &[id], usize::MAX).await?;
        Ok(read.whole.pop())
    }

    async fn list_prompts(
        &self,
        user_id: UserId,
        before: Option<PromptId>,
        limit: usize,
        text_bytes: usize,
    ) -> Result<PromptPage, Error> {
        let before = before.map_or(i64::MAX, |id| id.0);
        self.readers
            .read(move |connection| {
                let mut statement = connection.prepare_cached(PROMPTS_BEFORE)?;
                // One row more than requested shows whether there are older ones.
                let most = sql_limit(limit.saturating_add(1));
                let rows = statement.query_and_then([user_id.0, before, most], prompt_from_row)?;
                let (mut page, mut bytes) = (PromptPage::default(), 0_usize);
                for prompt in rows {
                    let prompt: Prompt = prompt?;
                    bytes = bytes.saturating_add(prompt.text_bytes());
                    let is_first = page.prompts.is_empty();
                    page.has_more =
                        page.prompts.len() >= limit || (bytes > text_bytes && !is_first);
                    if page.has_more {
                        break;
                    }
                    page.prompts.push(prompt);
                }
                Ok(page)
            })
            .await
    }

    async fn prompts(
        &self,
        owner: Option<UserId>,
        ids: &[PromptId],
        text_bytes: usize,
    ) -> Result<PromptsRead, Error> {
        let mut seen = HashSet::new();
        let ids: Vec<_> = ids.iter().copied().filter(|id| seen.insert(*id)).collect();
        self.readers
            .read(move |connection| {
                let transaction = connection.unchecked_transaction()?;
                let mut sizes = transaction.prepare_cached(TEXT_BYTES_BY_ID)?;
                let mut prompts = transaction.prepare_cached(PROMPT_BY_ID)?;
                let owner = owner.map(|owner| owner.0);
                let (mut read, mut room) = (PromptsRead::default(), text_bytes);
                for id in ids {
                    let size = sizes
                        .query_row(params![id.0, owner], |row| row.get::<_, i64>(0))
                        .optional()?;
                    let Some(size) = size.and_then(|size| usize::try_from(size).ok()) else {
                        continue;
                    };
                    if size > room || !read.rest.is_empty() {
                        read.rest.push((id, size));
                        continue;
                    }
                    room -= size;
                    let mut rows = prompts.query_and_then(params![id.0, owner], prompt_from_row)?;
                    read.whole.extend(rows.next().transpose()?);
                }
                Ok(read)
            })
            .await
    }

    async fn delete_prompt(
        &self,
        user_id: UserId,
        id: PromptId,
    ) -> Result<Option<DeletedPrompt>, Error> {
        self.writer
            .write_vital(move |connection| {
                let model: Option<String> = connection
                    .prepare_cached(
                        "SELECT m.name FROM prompt_embedding e JOIN embedding_model m ON m.id = e.model_id
                         WHERE e.user_id = ?1 AND e.prompt_id = ?2",
                    )?
                    .query_row([user_id.0, id.0], |row| row.get(0))
                    .optional()?;
                // The vector goes with it by the schema's cascade.
                let deleted = connection
                    .prepare_cached("DELETE FROM prompt WHERE id = ?2 AND user_id = ?1")?
                    .execute([user_id.0, id.0])?;
                Ok((deleted > 0).then(|| DeletedPrompt {
                    embedding_model: model.map(|name| ModelId(Arc::from(name))),
                }))
            })
            .await
    }

    async fn vectors(
        &self,
        model: &ModelId,
        owner: Option<UserId>,
        after: Option<VectorCursor>,
        limit: usize,
    ) -> Result<VectorPage, Error> {
        let model = model.clone();
        self.readers
            .read(move |connection| page_of_vectors(connection, &model, owner, after, limit))
            .await
    }

    async fn coverage(&self, model: &ModelId, owner: Option<UserId>) -> Result<Coverage, Error> {
        let model = model.clone();
        self.readers
            .read(move |connection| {
                let transaction = connection.unchecked_transaction()?;
                let user_id = owner.map_or(ALL_USERS, |owner| owner.0);
                let embedded = match model_number(&transaction, &model)? {
                    Some(model_number) => count(&transaction, user_id, model_number)?,
                    None => 0,
                };
                Ok(Coverage {
                    embedded,
                    completed: count(&transaction, user_id, COMPLETED)?,
                })
            })
            .await
    }

    async fn unembedded(
        &self,
        model: &ModelId,
        after: Option<PromptId>,
        limit: usize,
    ) -> Result<Vec<Unembedded>, Error> {
        let model = model.clone();
        let after = after.map_or(i64::MIN, |id| id.0);
        self.readers
            .read(move |connection| {
                let transaction = connection.unchecked_transaction()?;
                // No row has the number NULL, so of an unknown model every prompt lacks a vector.
                let model_number = model_number(&transaction, &model)?;
                let mut statement = transaction.prepare_cached(
                    "SELECT id, user_id, prompt FROM prompt p
                     WHERE id > ?1 AND status = 'completed' AND NOT EXISTS (
                         SELECT 1 FROM prompt_embedding e
                         WHERE e.user_id = p.user_id AND e.prompt_id = p.id AND e.model_id = ?2)
                     ORDER BY id LIMIT ?3",
                )?;
                let rows =
                    statement.query_map(params![after, model_number, sql_limit(limit)], |row| {
                        Ok(Unembedded {
                            id: PromptId(row.get("id")?),
                            user_id: UserId(row.get("user_id")?),
                            prompt: row.get("prompt")?,
                        })
                    })?;
                Ok(rows.collect::<Result<_, _>>()?)
            })
            .await
    }

    async fn put_embeddings(
        &self,
        model: &ModelId,
        rows: Vec<(PromptId, Embedding)>,
    ) -> Result<Vec<PromptId>, Error> {
        let model = model.clone();
        let rows: Vec<(PromptId, StoredVector)> = rows
            .iter()
            .map(|(id, embedding)| (*id, StoredVector::from(embedding)))
            .collect();
        self.writer
            .write(move |connection| {
                let mut stored = Vec::with_capacity(rows.len());
                for (id, vector) in rows {
                    if put_vector(connection, id, &model, &vector)? {
                        stored.push(id);
                    }
                }
                Ok(stored)
            })
            .await
    }

    /// One server at a time has the file, so the turn is always free.
    async fn claim_reembedding(&self) -> Result<Option<Claim>, Error> {
        Ok(Some(Claim::new(())))
    }

    async fn ping(&self) -> Result<Access, Error> {
        self.readers
            .read(|connection| {
                connection
                    .prepare_cached("SELECT count(*) FROM sqlite_schema")?
                    .query_row([], |_| Ok(()))?;
                Ok(())
            })
            .await?;
        let can_write = self.writer.can_write().await?;
        Ok(if can_write {
            Access::ReadWrite
        } else {
            Access::ReadOnly
        })
    }

    fn stats(&self) -> crate::store::Stats {
        SqliteStore::stats(self)
    }
}
