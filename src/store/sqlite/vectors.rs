//! Vectors of prompts in SQLite, and the numbers of the models that made them.

use rusqlite::{Connection, params};

use super::sql_limit;
use super::statements::{execute, one};
use crate::domain::{ModelId, PromptId, UserId};
use crate::store::rows::Defect;
use crate::store::{Error, VectorCursor, VectorPage};

/// More room is not set aside for a page of vectors before its rows are seen, whatever the limit.
const RESERVED_ROWS: usize = 1 << 16;

/// The model's number and the length of its vectors, if it has made any vector.
fn known_model(connection: &Connection, model: &ModelId) -> Result<Option<(i64, i64)>, Error> {
    let sql = "SELECT id, dimension FROM embedding_model WHERE name = ?1";
    one(connection, sql, [&model.0], |row| {
        Ok((row.read("id")?, row.read("dimension")?))
    })
}

/// The model's number, if it has made any vector.
pub(super) fn model_number(connection: &Connection, model: &ModelId) -> Result<Option<i64>, Error> {
    Ok(known_model(connection, model)?.map(|(number, _)| number))
}

/// The model's number, given now if it is new. All vectors of a model are of one length.
pub(super) fn number_model(
    connection: &Connection,
    model: &ModelId,
    given: usize,
) -> Result<i64, Error> {
    let Some((number, expected)) = known_model(connection, model)? else {
        return Ok(connection
            .prepare_cached("INSERT INTO embedding_model (name, dimension) VALUES (?1, ?2)")?
            .insert(params![model.0, sql_limit(given)])?);
    };
    let expected = usize::try_from(expected).unwrap_or(0);
    if expected != given {
        return Err(Defect::Dimension { given, expected }.into());
    }
    Ok(number)
}

/// Stores the vector of a completed prompt, or replaces it. Returns whether there is such a prompt.
/// The caller converts the vector to `f16`, and not the writer's thread.
pub(super) fn put_vector(
    connection: &Connection,
    id: PromptId,
    model: &ModelId,
    f16: &[u8],
) -> Result<bool, Error> {
    let model_number = number_model(connection, model, f16.len() / 2)?;
    let changed = execute(
        connection,
        "INSERT INTO prompt_embedding (user_id, prompt_id, model_id, embedding)
         SELECT user_id, id, ?2, ?3 FROM prompt WHERE id = ?1 AND status = 'completed'
         ON CONFLICT DO UPDATE SET model_id = excluded.model_id, embedding = excluded.embedding",
        params![id.0, model_number, f16],
    )?;
    Ok(changed > 0)
}

/// Up to `limit` vectors of the model and the owner after a place, in the order of their prompts.
pub(super) fn page_of_vectors(
    connection: &Connection,
    model: &ModelId,
    owner: Option<UserId>,
    after: Option<VectorCursor>,
    limit: usize,
) -> Result<VectorPage, Error> {
    let transaction = connection.unchecked_transaction()?;
    let mut page = VectorPage::default();
    let Some(model_number) = model_number(&transaction, model)? else {
        return Ok(page);
    };
    let (after_user, after_prompt) =
        after.map_or((i64::MIN, i64::MIN), |(user, prompt)| (user.0, prompt.0));
    let mut one_owner;
    let mut all;
    // Two statements, because the planner takes the key's range into account only if it is written
    // plainly.
    let mut rows = if let Some(owner) = owner {
        // A cursor in another owner's rows is before or after all of this one's.
        let after_prompt = match after_user.cmp(&owner.0) {
            std::cmp::Ordering::Less => i64::MIN,
            std::cmp::Ordering::Equal => after_prompt,
            std::cmp::Ordering::Greater => i64::MAX,
        };
        one_owner = transaction.prepare_cached(
            "SELECT user_id, prompt_id, embedding FROM prompt_embedding
             WHERE user_id = ?1 AND prompt_id > ?2 AND model_id = ?3 ORDER BY user_id, prompt_id LIMIT ?4",
        )?;
        one_owner.query([owner.0, after_prompt, model_number, sql_limit(limit)])?
    } else {
        all = transaction.prepare_cached(
            "SELECT user_id, prompt_id, embedding FROM prompt_embedding
             WHERE (user_id, prompt_id) > (?1, ?2) AND model_id = ?3 ORDER BY user_id, prompt_id LIMIT ?4",
        )?;
        all.query([after_user, after_prompt, model_number, sql_limit(limit)])?
    };
    while let Some(row) = rows.next()? {
        let bytes = row
            .get_ref("embedding")?
            .as_blob()
            .map_err(rusqlite::Error::from)?;
        if page.ids.is_empty() {
            let rows = limit.min(RESERVED_ROWS);
            page.ids.reserve(rows);
            page.f16_bytes.reserve(rows.saturating_mul(bytes.len()));
        }
        let (user_id, prompt_id) = (row.get("user_id")?, row.get("prompt_id")?);
        page.ids.push((UserId(user_id), PromptId(prompt_id)));
        page.f16_bytes.extend_from_slice(bytes);
    }
    Ok(page)
}
