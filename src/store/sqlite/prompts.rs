//! Prompts and their vectors in SQLite.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use rusqlite::{Connection, params};

use super::statements::{all, execute, one};
use super::vectors::{model_number, page_of_vectors, put_vector};
use super::{SqliteStore, sql_limit};
use crate::domain::{Embedding, ModelId, Prompt, PromptId, UserId};
use crate::store::{
    Access, Claim, Coverage, DeletedPrompt, Error, PromptPage, PromptStore, PromptsRead, Stats,
    Unembedded, VectorCursor, VectorPage, prompt_columns, rows,
};

/// Stands for "completed" among the models of `prompt_count`, as the schema says.
const COMPLETED: i64 = 0;

/// Stands for "all users together" in `prompt_count`, as the schema says.
const ALL_USERS: i64 = 0;

/// Leaves out the prompt of a running call that does not stay.
macro_rules! and_is_kept {
    () => {
        " AND (status <> 'running' OR NOT EXISTS (
              SELECT 1 FROM running_call r WHERE r.prompt_id = prompt.id AND NOT r.is_kept))"
    };
}

const PROMPT_BY_ID: &str = concat!(
    "SELECT ",
    prompt_columns!(),
    " FROM prompt WHERE id = ?1 AND (?2 IS NULL OR user_id = ?2)"
);

const PROMPTS_BEFORE: &str = concat!(
    "SELECT ",
    prompt_columns!(),
    " FROM prompt WHERE user_id = ?1 AND id < ?2",
    and_is_kept!(),
    " ORDER BY id DESC LIMIT ?3"
);

const TEXT_BYTES_BY_ID: &str = concat!(
    "SELECT octet_length(prompt) + coalesce(octet_length(response), 0) AS text_bytes FROM prompt
     WHERE id = ?1 AND (?2 IS NULL OR user_id = ?2)",
    and_is_kept!()
);

fn count(connection: &Connection, user_id: i64, model_number: i64) -> Result<u64, Error> {
    let sql = "SELECT n FROM prompt_count WHERE user_id = ?1 AND model_id = ?2";
    let n: Option<i64> = one(connection, sql, [user_id, model_number], |row| {
        row.read("n")
    })?;
    Ok(n.and_then(|n| u64::try_from(n).ok()).unwrap_or(0))
}

/// Whether the user keeps fewer prompts than that. Counts in the index by user, at most as far as
/// needed.
pub(super) fn has_room(
    connection: &Connection,
    user_id: UserId,
    max_prompts: u32,
) -> Result<bool, Error> {
    Ok(connection
        .prepare_cached(
            "SELECT count(*) < ?2 FROM (SELECT 1 FROM prompt WHERE user_id = ?1 LIMIT ?2)",
        )?
        .query_row(params![user_id.0, max_prompts], |row| row.get(0))?)
}

#[async_trait]
impl PromptStore for SqliteStore {
    async fn has_room(&self, user_id: UserId, max_prompts: u32) -> Result<bool, Error> {
        self.readers
            .read(move |connection| has_room(connection, user_id, max_prompts))
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
                let arguments = [user_id.0, before, most];
                let prompts = statement.query_and_then(arguments, |row| rows::prompt(row))?;
                let (mut page, mut bytes) = (PromptPage::default(), 0_usize);
                for prompt in prompts {
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
                let owner = owner.map(|owner| owner.0);
                let (mut read, mut room) = (PromptsRead::default(), text_bytes);
                for id in ids {
                    let arguments = params![id.0, owner];
                    let size: Option<i64> =
                        one(&transaction, TEXT_BYTES_BY_ID, arguments, |row| {
                            row.read("text_bytes")
                        })?;
                    let Some(size) = size.and_then(|size| usize::try_from(size).ok()) else {
                        continue;
                    };
                    if size > room || !read.rest.is_empty() {
                        read.rest.push((id, size));
                        continue;
                    }
                    room -= size;
                    let prompt = one(&transaction, PROMPT_BY_ID, arguments, rows::prompt)?;
                    read.whole.extend(prompt);
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
                let key = [user_id.0, id.0];
                let model: Option<String> = one(
                    connection,
                    "SELECT m.name FROM prompt_embedding e JOIN embedding_model m ON m.id = e.model_id
                     WHERE e.user_id = ?1 AND e.prompt_id = ?2",
                    key,
                    |row| row.read("name"),
                )?;
                // The vector goes with it by the schema's cascade.
                let delete = "DELETE FROM prompt WHERE id = ?2 AND user_id = ?1";
                let deleted = execute(connection, delete, key)?;
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
                all(
                    &transaction,
                    "SELECT id, user_id, prompt FROM prompt p
                     WHERE id > ?1 AND status = 'completed' AND NOT EXISTS (
                         SELECT 1 FROM prompt_embedding e
                         WHERE e.user_id = p.user_id AND e.prompt_id = p.id AND e.model_id = ?2)
                     ORDER BY id LIMIT ?3",
                    params![after, model_number, sql_limit(limit)],
                    rows::unembedded,
                )
            })
            .await
    }

    async fn put_embeddings(
        &self,
        model: &ModelId,
        rows: Vec<(PromptId, Embedding)>,
    ) -> Result<Vec<PromptId>, Error> {
        let model = model.clone();
        let rows: Vec<_> = rows
            .iter()
            .map(|(id, embedding)| (*id, embedding.to_f16_bytes()))
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
        Ok(Some(Box::new(())))
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

    fn stats(&self) -> Stats {
        let status = &self.writer.status;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            queued_writes: self.writer.queued(),
            queued_reads: self.readers.queued(),
            committed_batches: load(&status.committed_batches),
            committed_operations: load(&status.committed_operations),
            failed_batches: load(&status.failed_batches),
        }
    }
}
