//! Prompts in PostgreSQL. Each call is one statement where possible, so that it is one round trip
//! and one transaction. In the server, the commits of many connections share one wait for the disk.

use async_trait::async_trait;
use tokio_postgres::Row;

use super::error::Cause;
use super::pool::Connection;
use super::pool::PATIENCE;
use super::{PostgresStore, get, sql_limit, vectors};
use crate::domain::{
    CallDetails, Embedding, FailureCode, ModelId, Prompt, PromptId, PromptStatus, Timestamp, UserId,
};
use crate::store::{
    Access, Claim, Coverage, DeletedPrompt, Error, PromptPage, PromptStore, PromptsRead, Stats,
    Unembedded, VectorCursor, VectorPage, prompt_columns,
};

/// A statement that [`prompt_from_row`] reads.
macro_rules! select_prompt {
    ($rest:literal) => {
        concat!("SELECT ", prompt_columns!(), " FROM prompt ", $rest)
    };
}

/// The size of a text is known without the text; only the texts of the rows that are returned are
/// read.
const PROMPTS_BEFORE: &str = "
    SELECT id, user_id, created_at, status, error, model, CASE WHEN is_in THEN prompt END AS prompt,
           CASE WHEN is_in THEN response END AS response, llm_duration_ms, prompt_tokens, completion_tokens, finish_reason, is_in
    FROM (
        SELECT *, row_number() OVER newest <= $3 AND (row_number() OVER newest = 1
               OR sum(octet_length(prompt) + coalesce(octet_length(response), 0)) OVER newest <= $4) AS is_in
        FROM (SELECT * FROM prompt WHERE user_id = $1 AND id < $2 ORDER BY id DESC LIMIT $5) AS page
        WINDOW newest AS (ORDER BY id DESC)
    ) AS measured
    ORDER BY id DESC";

/// Besides the columns of [`prompt_from_row`]: the bytes of the texts, and whether the texts are
/// included.
const PROMPTS_BY_ID: &str = "
    SELECT id, user_id, created_at, status, error, model,
           CASE WHEN is_whole THEN prompt END AS prompt,
           CASE WHEN is_whole THEN response END AS response,
           llm_duration_ms, prompt_tokens, completion_tokens, finish_reason, text_bytes, is_whole
    FROM (
        SELECT *, sum(text_bytes) OVER (ORDER BY place) <= $3::bigint AS is_whole FROM (
            SELECT prompt.*, place, (octet_length(prompt) + coalesce(octet_length(response), 0))::bigint AS text_bytes
            FROM (SELECT asked, min(number) AS place FROM unnest($1::bigint[]) WITH ORDINALITY AS ids (asked, number)
                  GROUP BY asked) AS wanted
            JOIN prompt ON prompt.id = asked
            WHERE $2::bigint IS NULL OR user_id = $2
        ) AS measured
    ) AS placed
    ORDER BY place";

/// Reads the columns of [`prompt_columns`].
pub(super) fn prompt_from_row(row: &Row) -> Result<Prompt, Error> {
    let error: Option<&str> = get(row, "error")?;
    let number = |column| -> Result<Option<u32>, Error> {
        get::<Option<i64>>(row, column)?
            .map(|number| u32::try_from(number).map_err(|_| Cause::UnknownValue.into()))
            .transpose()
    };
    Ok(Prompt {
        id: PromptId(get(row, "id")?),
        user_id: UserId(get(row, "user_id")?),
        created_at: Timestamp(get(row, "created_at")?),
        status: parse_status(get(row, "status")?)?,
        error: error
            .map(|word| FailureCode::parse(word).ok_or(Cause::UnknownValue))
            .transpose()?,
        model: get(row, "model")?,
        prompt: get(row, "prompt")?,
        response: get(row, "response")?,
        call: CallDetails {
            duration_ms: number("llm_duration_ms")?,
            prompt_tokens: number("prompt_tokens")?,
            completion_tokens: number("completion_tokens")?,
            finish_reason: get(row, "finish_reason")?,
        },
    })
}

/// The status behind a stored word.
pub(super) fn parse_status(word: &str) -> Result<PromptStatus, Error> {
    Ok(PromptStatus::parse(word).ok_or(Cause::UnknownValue)?)
}

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
    get(rows.first().ok_or(Cause::UnknownValue)?, "has_room")
}

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
    connection
        .query(
            "SELECT 1 FROM account WHERE id = $1 FOR NO KEY UPDATE",
            &[&user_id.0],
        )
        .await?;
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
        let mut connection = self.pool.connection(PATIENCE).await?;
        let row = connection
            .query_opt(
                select_prompt!("WHERE id = $1 AND user_id = $2"),
                &[&id.0, &user_id.0],
            )
            .await?;
        row.as_ref().map(prompt_from_row).transpose()
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
        let mut connection = self.pool.connection(PATIENCE).await?;
        let rows = connection
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
                page.prompts.push(prompt_from_row(row)?);
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
        let mut connection = self.pool.connection(PATIENCE).await?;
        let rows = connection
            .query(PROMPTS_BY_ID, &[&ids, &owner, &sql_limit(text_bytes)])
            .await?;
        let mut read = PromptsRead::default();
        for row in &rows {
            let size: i64 = get(row, "text_bytes")?;
            if get(row, "is_whole")? {
                read.whole.push(prompt_from_row(row)?);
            } else {
                let size = usize::try_from(size).map_err(|_| Cause::UnknownValue)?;
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
        let mut connection = self.pool.connection(PATIENCE).await?;
        // The statement still sees the vector that this deletion removes too.
        let rows = connection
            .write(
                "WITH gone AS (DELETE FROM prompt WHERE id = $1 AND user_id = $2 RETURNING id)
                 SELECT m.name FROM gone
                 LEFT JOIN prompt_embedding e ON e.prompt_id = gone.id
                 LEFT JOIN embedding_model m ON m.id = e.model_id",
                &[&id.0, &user_id.0],
            )
            .await?;
        rows.first()
            .map(|row| {
                let model: Option<&str> = get(row, "name")?;
                Ok(DeletedPrompt {
                    embedding_model: model.map(|name| ModelId(name.into())),
                })
            })
            .transpose()
    }

    async fn vectors(
        &self,
        model: &ModelId,
        owner: Option<UserId>,
        after: Option<VectorCursor>,
        limit: usize,
    ) -> Result<VectorPage, Error> {
        vectors::page(self, model, owner, after, limit).await
    }

    async fn coverage(&self, model: &ModelId, owner: Option<UserId>) -> Result<Coverage, Error> {
        vectors::coverage(self, model, owner).await
    }

    async fn unembedded(
        &self,
        model: &ModelId,
        after: Option<PromptId>,
        limit: usize,
    ) -> Result<Vec<Unembedded>, Error> {
        vectors::unembedded(self, model, after, limit).await
    }

    async fn put_embeddings(
        &self,
        model: &ModelId,
        rows: Vec<(PromptId, Embedding)>,
    ) -> Result<Vec<PromptId>, Error> {
        vectors::put(self, model, &rows).await
    }

    async fn claim_reembedding(&self) -> Result<Option<Claim>, Error> {
        self.claim().await
    }

    async fn ping(&self) -> Result<Access, Error> {
        let mut connection = self.pool.connection(PATIENCE).await?;
        // A standby is read-only, and so is what its operator has set to be.
        let row = connection
            .query_opt(
                "SELECT current_setting('transaction_read_only')::boolean AS is_read_only,
                        EXISTS (SELECT FROM embedding_model)",
                &[],
            )
            .await?;
        Ok(match row {
            Some(row) if get(&row, "is_read_only")? => Access::ReadOnly,
            Some(_) | None => Access::ReadWrite,
        })
    }

    fn stats(&self) -> Stats {
        self.pool.stats()
    }
}
