//! Vectors in PostgreSQL: the numbers of models, sweeps, a change of model, and searches.

use std::collections::{HashMap, HashSet};

use parking_lot::RwLock;
use pgvector::HalfVector;

use super::error::Cause;
use super::pool::{Connection, LONG_PATIENCE, PATIENCE};
use super::{PostgresStore, get, sql_limit};
use crate::domain::{Embedding, ModelId, PromptId, UserId};
use crate::store::{Coverage, Error, Unembedded, VectorCursor, VectorPage};

/// Ids that one statement looks through for prompts without a vector. No statement takes long then,
/// however many prompts have one.
const WINDOW: i64 = 50_000;

/// The models that this process has seen. A number is read once, so inserts need no further round
/// trip.
#[derive(Debug, Default)]
pub(super) struct Models {
    known: RwLock<HashMap<ModelId, (i32, usize)>>,
}

impl Models {
    /// The model's number, which is assigned now if the model is new. All vectors of a model have
    /// the same length.
    pub async fn number(
        &self,
        connection: &mut Connection,
        model: &ModelId,
        vector: &Embedding,
    ) -> Result<i32, Error> {
        self.number_for(connection, model, vector.0.len()).await
    }

    /// The same for a vector of `given` numbers.
    pub async fn number_for(
        &self,
        connection: &mut Connection,
        model: &ModelId,
        given: usize,
    ) -> Result<i32, Error> {
        let known = match self.get(model) {
            Some(known) => Some(known),
            None => self.read(connection, model).await?,
        };
        let (number, expected) = match known {
            Some(known) => known,
            None => {
                let length = i32::try_from(given).map_err(|_| Cause::UnknownValue)?;
                connection
                    .write(
                        "INSERT INTO embedding_model (name, dimension) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING",
                        &[&&*model.0, &length],
                    )
                    .await?;
                // Another server may have been first.
                self.read(connection, model)
                    .await?
                    .ok_or(Cause::UnknownValue)?
            }
        };
        if expected != given {
            return Err(Cause::Dimension { given, expected }.into());
        }
        Ok(number)
    }

    /// The model's number, if it has made any vector.
    pub async fn find(
        &self,
        connection: &mut Connection,
        model: &ModelId,
    ) -> Result<Option<i32>, Error> {
        let known = match self.get(model) {
            Some(known) => Some(known),
            None => self.read(connection, model).await?,
        };
        Ok(known.map(|(number, _)| number))
    }

    fn get(&self, model: &ModelId) -> Option<(i32, usize)> {
        self.known.read().get(model).copied()
    }

    async fn read(
        &self,
        connection: &mut Connection,
        model: &ModelId,
    ) -> Result<Option<(i32, usize)>, Error> {
        let row = connection
            .query_opt(
                "SELECT id, dimension FROM embedding_model WHERE name = $1",
                &[&&*model.0],
            )
            .await?;
        let Some(row) = row else { return Ok(None) };
        let number = get(&row, "id")?;
        let dimension =
            usize::try_from(get::<i32>(&row, "dimension")?).map_err(|_| Cause::UnknownValue)?;
        let known = (number, dimension);
        self.known.write().insert(model.clone(), known);
        Ok(Some(known))
    }
}

pub(super) async fn page(
    store: &PostgresStore,
    model: &ModelId,
    owner: Option<UserId>,
    after: Option<VectorCursor>,
    limit: usize,
) -> Result<VectorPage, Error> {
    let mut connection = store.pool.connection(LONG_PATIENCE).await?;
    let mut page = VectorPage::default();
    let Some(number) = store.models.find(&mut connection, model).await? else {
        return Ok(page);
    };
    let (after_user, after_prompt) =
        after.map_or((i64::MIN, i64::MIN), |(user, prompt)| (user.0, prompt.0));
    let limit = sql_limit(limit);
    let rows = match owner {
        Some(owner) => {
            connection
                .query(
                    "SELECT user_id, prompt_id, embedding FROM prompt_embedding
                     WHERE model_id = $1 AND user_id = $2 AND (user_id, prompt_id) > ($3, $4)
                     ORDER BY prompt_id LIMIT $5",
                    &[&number, &owner.0, &after_user, &after_prompt, &limit],
                )
                .await?
        }
        None => {
            connection
                .query(
                    "SELECT user_id, prompt_id, embedding FROM prompt_embedding
                     WHERE model_id = $1 AND (user_id, prompt_id) > ($2, $3)
                     ORDER BY user_id, prompt_id LIMIT $4",
                    &[&number, &after_user, &after_prompt, &limit],
                )
                .await?
        }
    };
    for row in &rows {
        let vector: HalfVector = get(row, "embedding")?;
        let (user_id, prompt_id) = (get(row, "user_id")?, get(row, "prompt_id")?);
        page.ids.push((UserId(user_id), PromptId(prompt_id)));
        page.f16_bytes
            .extend(vector.as_slice().iter().flat_map(|half| half.to_le_bytes()));
    }
    Ok(page)
}

/// Counted when asked, which is at a start and while a change of model is under way, and never on
/// the way of an insert: a counter kept up to date would make the inserts of one user, or of all,
/// wait for each other's commits.
pub(super) async fn coverage(
    store: &PostgresStore,
    model: &ModelId,
    owner: Option<UserId>,
) -> Result<Coverage, Error> {
    let mut connection = store.pool.connection(LONG_PATIENCE).await?;
    let number = store.models.find(&mut connection, model).await?;
    let row = match owner {
        // One statement, so that both counts are of one moment.
        Some(owner) => {
            connection
                .query_opt(
                    "SELECT (SELECT count(*) FROM prompt_embedding WHERE model_id = $1 AND user_id = $2),
                            (SELECT count(*) FROM prompt WHERE user_id = $2 AND status = 'completed')",
                    &[&number, &owner.0],
                )
                .await?
        }
        None => {
            connection
                .query_opt(
                    "SELECT (SELECT count(*) FROM prompt_embedding WHERE model_id = $1),
                            (SELECT count(*) FROM prompt WHERE status = 'completed')",
                    &[&number],
                )
                .await?
        }
    };
    let row = row.ok_or(Cause::UnknownValue)?;
    let count = |at| {
        get::<i64>(&row, at)
            .and_then(|count| u64::try_from(count).map_err(|_| Cause::UnknownValue.into()))
    };
    Ok(Coverage {
        embedded: count(0)?,
        completed: count(1)?,
    })
}

pub(super) async fn unembedded(
    store: &PostgresStore,
    model: &ModelId,
    after: Option<PromptId>,
    limit: usize,
) -> Result<Vec<Unembedded>, Error> {
    let mut connection = store.pool.connection(LONG_PATIENCE).await?;
    // No row has the number NULL, so every prompt lacks a vector of an unknown model.
    let number = store.models.find(&mut connection, model).await?;
    let ends = connection
        .query_opt("SELECT min(id) AS first, max(id) AS last FROM prompt", &[])
        .await?
        .ok_or(Cause::UnknownValue)?;
    let ends: (Option<i64>, Option<i64>) = (get(&ends, "first")?, get(&ends, "last")?);
    let (Some(first), Some(last)) = ends else {
        return Ok(Vec::new());
    };
    drop(connection);
    let mut after = after.map_or(i64::MIN, |id| id.0).max(first - 1);
    let mut found = Vec::new();
    while after < last && found.len() < limit {
        // Each window has the deadline of a separate call.
        let mut connection = store.pool.connection(LONG_PATIENCE).await?;
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
        for row in &rows {
            found.push(Unembedded {
                id: PromptId(get(row, "id")?),
                user_id: UserId(get(row, "user_id")?),
                prompt: get(row, "prompt")?,
            });
        }
        after = until;
    }
    Ok(found)
}

pub(super) async fn put(
    store: &PostgresStore,
    model: &ModelId,
    rows: &[(PromptId, Embedding)],
) -> Result<Vec<PromptId>, Error> {
    let Some((_, first)) = rows.first() else {
        return Ok(Vec::new());
    };
    let mut connection = store.pool.connection(LONG_PATIENCE).await?;
    let number = store.models.number(&mut connection, model, first).await?;
    if let Some((_, odd)) = rows.iter().find(|(_, row)| row.0.len() != first.0.len()) {
        let (given, expected) = (odd.0.len(), first.0.len());
        return Err(Cause::Dimension { given, expected }.into());
    }
    // If a prompt is given twice, the last vector counts: one statement may not write a row twice.
    let latest: HashMap<PromptId, &Embedding> =
        rows.iter().map(|(id, vector)| (*id, vector)).collect();
    let ids: Vec<i64> = latest.keys().map(|id| id.0).collect();
    let vectors: Vec<HalfVector> = latest
        .values()
        .map(|vector| HalfVector::from_f32_slice(&vector.0))
        .collect();
    // The lock prevents the deletion of a prompt before its vector refers to it. The order prevents
    // a deadlock of two servers that write the same rows.
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
        .map(|row| get(row, 0).map(PromptId))
        .collect::<Result<_, _>>()?;
    let given = rows.iter().map(|(id, _)| *id);
    Ok(given.filter(|id| stored.contains(id)).collect())
}

impl PostgresStore {
    /// The `k` prompts, of one owner or of all, whose vectors of `model` are nearest to `query` by
    /// cosine, with the cosine in [-1, 1]: nearest first, equal ones by rising id, all if there are
    /// fewer. `query`: unit length. Exact for one owner; among all it may miss some. Sees every
    /// commit made before the call, on whatever server.
    ///
    /// # Errors
    /// `Unavailable`, `Internal`.
    pub async fn nearest(
        &self,
        model: &ModelId,
        owner: Option<UserId>,
        query: &Embedding,
        k: usize,
    ) -> Result<Vec<(PromptId, f32)>, Error> {
        let mut connection = self.pool.connection(PATIENCE).await?;
        let Some(number) = self.models.find(&mut connection, model).await? else {
            return Ok(Vec::new());
        };
        let vector = HalfVector::from_f32_slice(&query.0);
        let limit = sql_limit(k);
        let rows = match owner {
            Some(owner) => {
                connection
                    .query(NEAREST_OWN, &[&vector, &number, &owner.0, &limit])
                    .await?
            }
            None => {
                let settings = self.hnsw.settings(k);
                connection
                    .query_under(&settings, NEAREST_SHARED, &[&vector, &number, &limit])
                    .await?
            }
        };
        rows.iter()
            .map(|row| {
                let score: f64 = get(row, "score")?;
                Ok((
                    PromptId(get(row, "prompt_id")?),
                    score.clamp(-1.0, 1.0) as f32,
                ))
            })
            .collect()
    }
}

/// Exact, over one owner's rows. The order is by an expression, which an approximate index cannot
/// serve (it serves only the operator itself). So no planner can take the index, which loses rows
/// of owners with few rows.
pub(super) const NEAREST_OWN: &str = "
    SELECT prompt_id, -(embedding <#> $1) AS score FROM prompt_embedding
    WHERE model_id = $2 AND user_id = $3 ORDER BY score DESC, prompt_id LIMIT $4";

/// Over everybody's rows: by the approximate index if there is one, exact if there is none (yet).
/// The index may return rows slightly out of order, hence the second sorting.
pub(super) const NEAREST_SHARED: &str = "
    WITH near AS MATERIALIZED (
        SELECT prompt_id, embedding <#> $1 AS distance FROM prompt_embedding
        WHERE model_id = $2 ORDER BY embedding <#> $1 LIMIT $3
    )
    SELECT prompt_id, -distance AS score FROM near ORDER BY distance, prompt_id";
