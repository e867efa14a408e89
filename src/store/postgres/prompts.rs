//! Prompts in PostgreSQL. Each call is one statement where possible, so that it is one round trip
//! and one transaction. In the server, the commits of many connections share one wait for the disk.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;
use pgvector::HalfVector;
use tokio_postgres::types::ToSql;

use super::pool::{Connection, LONG_PATIENCE, PATIENCE};
use super::{PostgresStore, all, first, get, lock, one, sql_limit};
use crate::domain::{Embedding, ModelId, Prompt, PromptId, UserId};
use crate::store::rows::{self, Defect};
use crate::store::{
    Access, Claim, Coverage, DeletedPrompt, Error, PromptPage, PromptStore, PromptsRead, Stats,
    Unembedded, VectorCursor, VectorPage, prompt_columns,
};

/// Ids that one statement looks through for prompts without a vector. No statement takes long then,
/// however many prompts have one.
const WINDOW: i64 = 50_000;

/// A statement that [`rows::prompt`] reads.
macro_rules! select_prompt {
    ($rest:literal) => {
        concat!("SELECT ", prompt_columns!(), " FROM prompt ", $rest)
    };
}

/// The size of a text is known without the text; only the texts of the rows that are returned are
/// read.
const PROMPTS_BEFORE: &str = "
    SELECT id, user_id, created_at, status, error, model, CASE WHEN is_in THEN prompt END AS prompt,
           CASE WHEN is_in THEN response END AS response, llm_duration_ms, prompt_tokens, completion_tokens, finish_reason, source, cost, is_in
    FROM (
        SELECT *, row_number() OVER newest <= $3 AND (row_number() OVER newest = 1
               OR sum(octet_length(prompt) + coalesce(octet_length(response), 0)) OVER newest <= $4) AS is_in
        FROM (SELECT * FROM prompt p WHERE user_id = $1 AND id < $2
              AND (status <> 'running' OR NOT EXISTS (
                  SELECT FROM running_call r WHERE r.prompt_id = p.id AND NOT r.is_kept))
              ORDER BY id DESC LIMIT $5) AS page
        WINDOW newest AS (ORDER BY id DESC)
    ) AS measured
    ORDER BY id DESC";

/// Besides the columns of [`rows::prompt`]: the bytes of the texts, and whether the texts are
/// included.
const PROMPTS_BY_ID: &str = "
    SELECT id, user_id, created_at, status, error, model,
           CASE WHEN is_whole THEN prompt END AS prompt,
           CASE WHEN is_whole THEN response END AS response,
           llm_duration_ms, prompt_tokens, completion_tokens, finish_reason, source, cost, text_bytes, is_whole
    FROM (
        SELECT *, sum(text_bytes) OVER (ORDER BY place) <= $3::bigint AS is_whole FROM (
            SELECT prompt.*, place, (octet_length(prompt) + coalesce(octet_length(response), 0))::bigint AS text_bytes
            FROM (SELECT asked, min(number) AS place FROM unnest($1::bigint[]) WITH ORDINALITY AS ids (asked, number)
                  GROUP BY asked) AS wanted
            JOIN prompt ON prompt.id = asked
            WHERE ($2::bigint IS NULL OR user_id = $2)
              AND (status <> 'running' OR NOT EXISTS (
                  SELECT FROM running_call r WHERE r.prompt_id = prompt.id AND NOT r.is_kept))
        ) AS measured
    ) AS placed
    ORDER BY place";

/// Whether the user keeps fewer prompts than that. Counts in the index by user, at most as far as
/// needed.
async fn has_room(
    connection: &mut Connection,
    user_id: UserId,
    max_prompts: u32,
) -> Result<bool, Error> {
    let rows = connection
        .query(
            "SELECT count(*) < $2 AS has_room FROM (SELECT FROM prompt WHERE user_id = $1 LIMIT $2) kept",
            &[&user_id.0, &i64::from(max_prompts)],
        )
        .await?;
    get(&one(rows)?, "has_room")
}

/// Makes other transactions with this statement for the same account wait until this one ends.
pub(super) const LOCK_ACCOUNT: &str = "SELECT 1 FROM account WHERE id = $1 FOR NO KEY UPDATE";

/// Fails if the user may not keep another prompt. Inside a transaction, which is rolled back, by
/// closing its connection, if this fails. Until it ends, others that check for the same user wait,
/// so that they count its row.
pub(super) async fn check_quota(
    connection: &mut Connection,
    user_id: UserId,
    max_prompts: Option<u32>,
) -> Result<(), Error> {
    let Some(most) = max_prompts else {
        return Ok(());
    };
    connection.query(LOCK_ACCOUNT, &[&user_id.0]).await?;
    if has_room(connection, user_id, most).await? {
        Ok(())
    } else {
        Err(Error::QuotaExceeded)
    }
}

#[async_trait]
impl PromptStore for PostgresStore {
    async fn has_room(&self, user_id: UserId, max_prompts: u32) -> Result<bool, Error> {
        let mut connection = self.pool.connection(PATIENCE).await?;
        has_room(&mut connection, user_id, max_prompts).await
    }

    async fn prompt(&self, user_id: UserId, id: PromptId) -> Result<Option<Prompt>, Error> {
        let row = self
            .pool
            .query(
                select_prompt!(
                    "WHERE id = $1 AND user_id = $2
                     AND (status <> 'running' OR NOT EXISTS (
                         SELECT FROM running_call r WHERE r.prompt_id = prompt.id AND NOT r.is_kept))"
                ),
                &[&id.0, &user_id.0],
            )
            .await?;
        first(&row, rows::prompt)
    }

    async fn list_prompts(
        &self,
        user_id: UserId,
        before: Option<PromptId>,
        limit: usize,
        text_bytes: usize,
    ) -> Result<PromptPage, Error> {
        let before = before.map_or(i64::MAX, |id| id.0);
        let (limit, text_bytes) = (sql_limit(limit), sql_limit(text_bytes));
        let rows = self
            .pool
            .query(
                PROMPTS_BEFORE,
                &[
                    &user_id.0,
                    &before,
                    &limit,
                    &text_bytes,
                    &limit.saturating_add(1),
                ],
            )
            .await?;
        let mut page = PromptPage::default();
        for row in &rows {
            // The row after the page shows that there are older ones. Its texts are not sent.
            if get(row, "is_in")? {
                page.prompts.push(rows::prompt(row)?);
            } else {
                page.has_more = true;
            }
        }
        Ok(page)
    }

    async fn prompts(
        &self,
        owner: Option<UserId>,
        ids: &[PromptId],
        text_bytes: usize,
    ) -> Result<PromptsRead, Error> {
        let ids: Vec<i64> = ids.iter().map(|id| id.0).collect();
        let owner = owner.map(|owner| owner.0);
        let rows = self
            .pool
            .query(PROMPTS_BY_ID, &[&ids, &owner, &sql_limit(text_bytes)])
            .await?;
        let mut read = PromptsRead::default();
        for row in &rows {
            let size: i64 = get(row, "text_bytes")?;
            if get(row, "is_whole")? {
                read.whole.push(rows::prompt(row)?);
            } else {
                let size = usize::try_from(size).map_err(|_| Defect::UnknownValue)?;
                read.rest.push((PromptId(get(row, "id")?), size));
            }
        }
        Ok(read)
    }

    async fn delete_prompt(
        &self,
        user_id: UserId,
        id: PromptId,
    ) -> Result<Option<DeletedPrompt>, Error> {
        // The statement still sees the vector that its own deletion takes along.
        let rows = self
            .pool
            .write(
                "WITH gone AS (DELETE FROM prompt WHERE id = $1 AND user_id = $2 RETURNING id)
                 SELECT m.name FROM gone
                 LEFT JOIN prompt_embedding e ON e.prompt_id = gone.id
                 LEFT JOIN embedding_model m ON m.id = e.model_id",
                &[&id.0, &user_id.0],
            )
            .await?;
        first(&rows, |row| {
            let model: Option<String> = row.read("name")?;
            Ok(DeletedPrompt {
                embedding_model: model.map(|name| ModelId(name.into())),
            })
        })
    }

    async fn vectors(
        &self,
        model: &ModelId,
        owner: Option<UserId>,
        after: Option<VectorCursor>,
        limit: usize,
    ) -> Result<VectorPage, Error> {
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        let mut page = VectorPage::default();
        let Some(number) = self.models.find(&mut connection, model).await? else {
            return Ok(page);
        };
        let (after_user, after_prompt) =
            after.map_or((i64::MIN, i64::MIN), |(user, prompt)| (user.0, prompt.0));
        let limit = sql_limit(limit);
        let mut arguments: Vec<&(dyn ToSql + Sync)> =
            vec![&number, &after_user, &after_prompt, &limit];
        let sql = match &owner {
            Some(owner) => {
                arguments.push(&owner.0);
                "SELECT user_id, prompt_id, embedding FROM prompt_embedding
                 WHERE model_id = $1 AND user_id = $5 AND (user_id, prompt_id) > ($2, $3)
                 ORDER BY prompt_id LIMIT $4"
            }
            None => {
                "SELECT user_id, prompt_id, embedding FROM prompt_embedding
                 WHERE model_id = $1 AND (user_id, prompt_id) > ($2, $3)
                 ORDER BY user_id, prompt_id LIMIT $4"
            }
        };
        let rows = connection.query(sql, &arguments).await?;
        for row in &rows {
            let vector: HalfVector = get(row, "embedding")?;
            let (user_id, prompt_id) = (get(row, "user_id")?, get(row, "prompt_id")?);
            page.ids.push((UserId(user_id), PromptId(prompt_id)));
            page.f16_bytes
                .extend(vector.as_slice().iter().flat_map(|half| half.to_le_bytes()));
        }
        Ok(page)
    }

    /// Counted when asked, which is at a start and while a change of model is under way, and never
    /// on the way of an insert: a counter kept up to date would make the inserts of one user, or of
    /// all, wait for each other's commits.
    async fn coverage(&self, model: &ModelId, owner: Option<UserId>) -> Result<Coverage, Error> {
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        let number = self.models.find(&mut connection, model).await?;
        let mut arguments: Vec<&(dyn ToSql + Sync)> = vec![&number];
        // One statement, so that both counts are of one moment.
        let sql = match &owner {
            Some(owner) => {
                arguments.push(&owner.0);
                "SELECT (SELECT count(*) FROM prompt_embedding
                         WHERE model_id = $1 AND user_id = $2) AS embedded,
                        (SELECT count(*) FROM prompt
                         WHERE user_id = $2 AND status = 'completed') AS completed"
            }
            None => {
                "SELECT (SELECT count(*) FROM prompt_embedding WHERE model_id = $1) AS embedded,
                        (SELECT count(*) FROM prompt WHERE status = 'completed') AS completed"
            }
        };
        let row = one(connection.query(sql, &arguments).await?)?;
        let count = |name| {
            get::<i64>(&row, name)
                .and_then(|count| u64::try_from(count).map_err(|_| Defect::UnknownValue.into()))
        };
        Ok(Coverage {
            embedded: count("embedded")?,
            completed: count("completed")?,
        })
    }

    async fn unembedded(
        &self,
        model: &ModelId,
        after: Option<PromptId>,
        limit: usize,
    ) -> Result<Vec<Unembedded>, Error> {
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        // No row has the number NULL, so every prompt lacks a vector of an unknown model.
        let number = self.models.find(&mut connection, model).await?;
        let ends = connection
            .query("SELECT min(id) AS first, max(id) AS last FROM prompt", &[])
            .await?;
        let ends = one(ends)?;
        let (Some(first), Some(last)): (Option<i64>, Option<i64>) =
            (get(&ends, "first")?, get(&ends, "last")?)
        else {
            return Ok(Vec::new());
        };
        drop(connection);
        let mut after = after.map_or(i64::MIN, |id| id.0).max(first - 1);
        let mut found = Vec::new();
        while after < last && found.len() < limit {
            // Each window has the deadline of a separate call.
            let mut connection = self.pool.connection(LONG_PATIENCE).await?;
            let until = after.saturating_add(WINDOW);
            let rows = connection
                .query(
                    "SELECT id, user_id, prompt FROM prompt p
                     WHERE id > $1 AND id <= $2 AND status = 'completed' AND NOT EXISTS (
                         SELECT 1 FROM prompt_embedding e WHERE e.prompt_id = p.id AND e.model_id = $3)
                     ORDER BY id LIMIT $4",
                    &[&after, &until, &number, &sql_limit(limit - found.len())],
                )
                .await?;
            found.extend(all(&rows, rows::unembedded)?);
            after = until;
        }
        Ok(found)
    }

    async fn put_embeddings(
        &self,
        model: &ModelId,
        rows: Vec<(PromptId, Embedding)>,
    ) -> Result<Vec<PromptId>, Error> {
        let Some((_, first)) = rows.first() else {
            return Ok(Vec::new());
        };
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        let number = self
            .models
            .number(&mut connection, model, first.0.len())
            .await?;
        if let Some((_, odd)) = rows.iter().find(|(_, row)| row.0.len() != first.0.len()) {
            let (given, expected) = (odd.0.len(), first.0.len());
            return Err(Defect::Dimension { given, expected }.into());
        }
        // If a prompt is given twice, the last vector counts: one statement may not write a row
        // twice.
        let latest: HashMap<PromptId, &Embedding> =
            rows.iter().map(|(id, vector)| (*id, vector)).collect();
        let ids: Vec<i64> = latest.keys().map(|id| id.0).collect();
        let vectors: Vec<HalfVector> = latest
            .values()
            .map(|vector| HalfVector::from_f32_slice(&vector.0))
            .collect();
        // The lock prevents the deletion of a prompt before its vector refers to it. The order
        // prevents a deadlock of two servers that write the same rows.
        let stored = connection
            .write(
                "WITH given AS MATERIALIZED (
                     SELECT p.id, p.user_id, g.embedding
                     FROM unnest($2::bigint[], $3::halfvec[]) AS g (id, embedding) JOIN prompt p ON p.id = g.id
                     WHERE p.status = 'completed' ORDER BY p.id FOR KEY SHARE OF p
                 )
                 INSERT INTO prompt_embedding (prompt_id, user_id, model_id, embedding)
                 SELECT id, user_id, $1, embedding FROM given
                 ON CONFLICT (prompt_id) DO UPDATE SET model_id = excluded.model_id, embedding = excluded.embedding
                 RETURNING prompt_id",
                &[&number, &ids, &vectors],
            )
            .await?;
        let stored: HashSet<PromptId> = stored
            .iter()
            .map(|row| get(row, "prompt_id").map(PromptId))
            .collect::<Result<_, _>>()?;
        let given = rows.iter().map(|(id, _)| *id);
        Ok(given.filter(|id| stored.contains(id)).collect())
    }

    async fn claim_reembedding(&self) -> Result<Option<Claim>, Error> {
        let held = lock::attempt(&self.pool.connector, lock::REEMBEDDING, None).await?;
        Ok(held.map(|held| Box::new(held) as Claim))
    }

    async fn ping(&self) -> Result<Access, Error> {
        // A standby is read-only, and so is what its operator has set to be.
        let row = self
            .pool
            .query(
                "SELECT current_setting('transaction_read_only')::boolean AS is_read_only,
                        EXISTS (SELECT FROM embedding_model)",
                &[],
            )
            .await?;
        Ok(if get(&one(row)?, "is_read_only")? {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        })
    }

    fn stats(&self) -> Stats {
        self.pool.stats()
    }
}
