//! Chat calls in SQLite.

use async_trait::async_trait;
use rusqlite::types::Value;
use rusqlite::{params, params_from_iter};

use super::statements::{execute, one};
use super::{SqliteStore, sql_limit};
use crate::domain::{PromptId, UserId};
use crate::store::chats::{chat_columns, chat_prompt_columns, chat_text_bytes};
use crate::store::{ChatCall, ChatFilter, ChatPage, ChatRead, ChatStore, Error, rows};

const CHAT_BYTES: &str = concat!(
    "SELECT ",
    chat_text_bytes!(),
    " AS text_bytes FROM chat_call c JOIN prompt p ON p.id = c.prompt_id
     WHERE c.prompt_id = ?1 AND c.user_id = ?2 AND p.status = 'completed'"
);

const CHAT_BY_ID: &str = concat!(
    "SELECT ",
    chat_prompt_columns!(),
    ", ",
    chat_columns!(),
    " FROM chat_call c JOIN prompt p ON p.id = c.prompt_id WHERE c.prompt_id = ?1"
);

/// The statement of a filtered list, and its values in the order of their places.
fn list_statement(user_id: UserId, filter: ChatFilter, limit: i64) -> (String, Vec<Value>) {
    let (comparison, order) = match filter.is_newest_first {
        true => ("<", "DESC"),
        false => (">", "ASC"),
    };
    let mut sql = format!(
        "SELECT {}, {} FROM chat_call c JOIN prompt p ON p.id = c.prompt_id
         WHERE c.user_id = ? AND p.status = 'completed'",
        chat_prompt_columns!(),
        chat_columns!(),
    );
    let mut values = vec![Value::Integer(user_id.0)];
    if let Some(after) = filter.after {
        sql.push_str(&format!(" AND c.prompt_id {comparison} ?"));
        values.push(Value::Integer(after.0));
    }
    if let Some(model) = filter.model {
        sql.push_str(" AND p.model = ?");
        values.push(Value::Text(model));
    }
    for (name, value) in filter.metadata {
        sql.push_str(
            " AND EXISTS (SELECT 1 FROM json_each(c.metadata) e WHERE e.key = ? AND e.value = ?)",
        );
        values.extend([Value::Text(name), Value::Text(value)]);
    }
    sql.push_str(&format!(" ORDER BY c.prompt_id {order} LIMIT ?"));
    values.push(Value::Integer(limit));
    (sql, values)
}

#[async_trait]
impl ChatStore for SqliteStore {
    async fn chat_call(
        &self,
        user_id: UserId,
        id: PromptId,
        text_bytes: usize,
    ) -> Result<Option<ChatRead>, Error> {
        self.readers
            .read(move |connection| {
                let transaction = connection.unchecked_transaction()?;
                let size: Option<i64> = one(&transaction, CHAT_BYTES, [id.0, user_id.0], |row| {
                    row.read("text_bytes")
                })?;
                let Some(size) = size.and_then(|size| usize::try_from(size).ok()) else {
                    return Ok(None);
                };
                if size > text_bytes {
                    return Ok(Some(ChatRead::Larger(size)));
                }
                let call = one(&transaction, CHAT_BY_ID, [id.0], rows::chat_call)?;
                Ok(call.map(|call| ChatRead::Whole(Box::new(call))))
            })
            .await
    }

    async fn list_chat_calls(
        &self,
        user_id: UserId,
        filter: ChatFilter,
        limit: usize,
        text_bytes: usize,
    ) -> Result<ChatPage, Error> {
        // One row more than requested shows whether there are more.
        let most = sql_limit(limit.saturating_add(1));
        let (sql, values) = list_statement(user_id, filter, most);
        self.readers
            .read(move |connection| {
                let mut statement = connection.prepare_cached(&sql)?;
                let values = params_from_iter(values);
                let calls = statement.query_and_then(values, |row| rows::chat_call(row))?;
                let (mut page, mut bytes) = (ChatPage::default(), 0_usize);
                for call in calls {
                    let call: ChatCall = call?;
                    bytes = bytes.saturating_add(call.text_bytes());
                    let is_first = page.calls.is_empty();
                    page.has_more = page.calls.len() >= limit || (bytes > text_bytes && !is_first);
                    if page.has_more {
                        break;
                    }
                    page.calls.push(call);
                }
                Ok(page)
            })
            .await
    }

    async fn set_chat_metadata(
        &self,
        user_id: UserId,
        id: PromptId,
        metadata: String,
    ) -> Result<bool, Error> {
        self.writer
            .write(move |connection| {
                let sql = "UPDATE chat_call SET metadata = ?3 WHERE prompt_id = ?1 AND user_id = ?2
                           AND EXISTS (SELECT 1 FROM prompt WHERE id = ?1 AND status = 'completed')";
                Ok(execute(connection, sql, params![id.0, user_id.0, metadata])? > 0)
            })
            .await
    }
}
