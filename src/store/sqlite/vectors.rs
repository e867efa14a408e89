//! Vectors of prompts in SQLite, and the numbers of the models that made them.

use rusqlite::{Connection, OptionalExtension, params};

use super::error::{Defect, Failure};
use super::sql_limit;
use crate::domain::{Embedding, ModelId, PromptId, UserId};
use crate::store::{VectorCursor, VectorPage};

/// More room is not set aside for a page of vectors before its rows are seen, whatever the limit.
const RESERVED_ROWS: usize = 1 << 16;

/// A vector in its stored form. The caller's thread makes this form, so that the writer's does not
/// have to.
pub(super) struct StoredVector {
    dimension: usize,
    f16: Vec<u8>,
}

impl From<&Embedding> for StoredVector {
    fn from(embedding: &Embedding) -> Self {
        Self {
            dimension: embedding.0.len(),
            f16: embedding.to_f16_bytes(),
        }
    }
}

/// The model's number, if it has made any vector.
pub(super) fn model_number(
    connection: &Connection,
    model: &ModelId,
) -> rusqlite::Result<Option<i64>> {
    connection
        .prepare_cached("SELECT id FROM embedding_model WHERE name = ?1")?
        .query_row([&model.0], |row| row.get(0))
        .optional()
}

/// The model's number, given now if it is new. All vectors of a model are of one length.
pub(super) fn number_model(
    connection: &Connection,
    model: &ModelId,
    dimension: usize,
) -> Result<i64, Failure> {
    let known: Option<(i64, usize)> = connection
        .prepare_cached("SELECT id, dimension FROM embedding_model WHERE name = ?1")?
        .query_row([&model.0], |row| {
            let dimension: i64 = row.get("dimension")?;
            Ok((row.get("id")?, usize::try_from(dimension).unwrap_or(0)))
        })
        .optional()?;
    match known {
        Some((id, expected)) if expected == dimension => Ok(id),
        Some((_, expected)) => Err(Defect::Dimension {
            given: dimension,
            expected,
        }
        .into()),
        None => Ok(connection
            .prepare_cached("INSERT INTO embedding_model (name, dimension) VALUES (?1, ?2)")?
            .insert(params![model.0, sql_limit(dimension)])?),
    }
}

/// Stores the vector of a prompt.
pub(super) fn insert_vector(
    connection: &Connection,
    user_id: UserId,
    id: PromptId,
    model: &ModelId,
    vector: &StoredVector,
) -> Result<(), Failure> {
    let model_number = number_model(connection, model, vector.dimension)?;
    connection
        .prepare_cached(
            "INSERT INTO prompt_embedding (user_id, prompt_id, model_id, embedding) VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute(params![user_id.0, id.0, model_number, vector.f16])?;
    Ok(())
}

/// Stores the vector of a completed prompt, or replaces it. Returns whether there is such a prompt.
pub(super) fn put_vector(
    connection: &Connection,
    id: PromptId,
    model: &ModelId,
    vector: &StoredVector,
) -> Result<bool, Failure> {
    let model_number = number_model(connection, model, vector.dimension)?;
    let changed = connection
        .prepare_cached(
            "INSERT INTO prompt_embedding (user_id, prompt_id, model_id, embedding)
             SELECT user_id, id, ?2, ?3 FROM prompt WHERE id = ?1 AND status = 'completed'
             ON CONFLICT DO UPDATE SET model_id = excluded.model_id, embedding = excluded.embedding",
        )?
        .execute(params![id.0, model_number, vector.f16])?;
    Ok(changed > 0)
}

/// Up to `limit` vectors of the model and the owner after a place, in the order of their prompts.
pub(super) fn page_of_vectors(
    connection: &Connection,
    model: &ModelId,
    owner: Option<UserId>,
    after: Option<VectorCursor>,
    limit: usize,
) -> Result<VectorPage, Failure> {
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
