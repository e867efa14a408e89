//! Chat calls in PostgreSQL.

use async_trait::async_trait;
use tokio_postgres::types::ToSql;

use super::{PostgresStore, first, get, sql_limit};
use crate::domain::{PromptId, UserId};
use crate::store::chats::{chat_columns, chat_prompt_columns, chat_text_bytes};
use crate::store::rows::{self, Defect};
use crate::store::{ChatCall, ChatFilter, ChatPage, ChatRead, ChatStore, Error};

const CHAT_BYTES: &str = concat!(
    "SELECT (",
    chat_text_bytes!(),
    ")::bigint AS text_bytes FROM chat_call c JOIN prompt p ON p.id = c.prompt_id
     WHERE c.prompt_id = $1 AND c.user_id = $2 AND p.status = 'completed'"
);

const CHAT_BY_ID: &str = concat!(
    "SELECT ",
    chat_prompt_columns!(),
    ", ",
    chat_columns!(),
    " FROM chat_call c JOIN prompt p ON p.id = c.prompt_id
     WHERE c.prompt_id = $1 AND c.user_id = $2 AND p.status = 'completed'"
);

/// The ids of a filtered list with the bytes of their texts. `$1` user, `$2` after or NULL, `$3`
/// model or NULL, `$4` and `$5` names and values of labels, `$6` limit. The order of the ids is in
/// the text.
macro_rules! page_of_ids {
    ($comparison:literal, $order:literal) => {
        concat!(
            "SELECT c.prompt_id, (",
            chat_text_bytes!(),
            ")::bigint AS text_bytes FROM chat_call c JOIN prompt p ON p.id = c.prompt_id
             WHERE c.user_id = $1 AND p.status = 'completed'
               AND ($2::bigint IS NULL OR c.prompt_id ",
            $comparison,
            " $2) AND ($3::text IS NULL OR p.model = $3)
               AND NOT EXISTS (
                   SELECT FROM unnest($4::text[], $5::text[]) AS label (name, value)
                   WHERE c.metadata::json ->> label.name IS DISTINCT FROM label.value)
             ORDER BY c.prompt_id ",
            $order,
            " LIMIT $6"
        )
    };
}

const CHATS_BY_ID: &str = concat!(
    "SELECT ",
    chat_prompt_columns!(),
    ", ",
    chat_columns!(),
    " FROM unnest($1::bigint[]) WITH ORDINALITY AS wanted (id, place)
      JOIN chat_call c ON c.prompt_id = wanted.id JOIN prompt p ON p.id = c.prompt_id
      ORDER BY wanted.place"
);

#[async_trait]
impl ChatStore for PostgresStore {
    async fn chat_call(
        &self,
        user_id: UserId,
        id: PromptId,
        text_bytes: usize,
    ) -> Result<Option<ChatRead>, Error> {
        let key: [&(dyn ToSql + Sync); 2] = [&id.0, &user_id.0];
        let sizes = self.pool.query(CHAT_BYTES, &key).await?;
        let Some(size) = first(&sizes, |row| row.read("text_bytes").map(|n: i64| n))? else {
            return Ok(None);
        };
        let size = usize::try_from(size).map_err(|_| Defect::UnknownValue)?;
        if size > text_bytes {
            return Ok(Some(ChatRead::Larger(size)));
        }
        let rows = self.pool.query(CHAT_BY_ID, &key).await?;
        let call = first(&rows, rows::chat_call)?;
        Ok(call.map(|call| ChatRead::Whole(Box::new(call))))
    }

    async fn list_chat_calls(
        &self,
        user_id: UserId,
        filter: ChatFilter,
        limit: usize,
        text_bytes: usize,
    ) -> Result<ChatPage, Error> {
        let (names, values): (Vec<String>, Vec<String>) = filter.metadata.into_iter().unzip();
        let after = filter.after.map(|id| id.0);
        // One row more than requested shows whether there are more.
        let most = sql_limit(limit.saturating_add(1));
        let sql = match filter.is_newest_first {
            true => page_of_ids!("<", "DESC"),
            false => page_of_ids!(">", "ASC"),
        };
        let arguments: [&(dyn ToSql + Sync); 6] =
            [&user_id.0, &after, &filter.model, &names, &values, &most];
        let sizes = self.pool.query(sql, &arguments).await?;
        let (mut ids, mut bytes): (Vec<i64>, usize) = (Vec::new(), 0);
        for row in sizes.iter().take(limit) {
            let size: i64 = get(row, "text_bytes")?;
            bytes = bytes.saturating_add(usize::try_from(size).map_err(|_| Defect::UnknownValue)?);
            if bytes > text_bytes && !ids.is_empty() {
                break;
            }
            ids.push(get(row, "prompt_id")?);
        }
        let has_more = sizes.len() > ids.len();
        let rows = self.pool.query(CHATS_BY_ID, &[&ids]).await?;
        // A call that was deleted in between is left out.
        let calls: Result<Vec<ChatCall>, Error> = super::all(&rows, rows::chat_call);
        Ok(ChatPage {
            calls: calls?,
            has_more,
        })
    }

    async fn set_chat_metadata(
        &self,
        user_id: UserId,
        id: PromptId,
        metadata: String,
    ) -> Result<bool, Error> {
        let changed = self
            .pool
            .write(
                "UPDATE chat_call c SET metadata = $3 FROM prompt p
                 WHERE c.prompt_id = $1 AND c.user_id = $2 AND p.id = c.prompt_id
                   AND p.status = 'completed' RETURNING c.prompt_id",
                &[&id.0, &user_id.0, &metadata],
            )
            .await?;
        Ok(!changed.is_empty())
    }
}
