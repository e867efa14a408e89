//! Vectors in PostgreSQL: the numbers of models, and searches.

use std::collections::HashMap;

use parking_lot::RwLock;
use pgvector::HalfVector;

use super::hnsw::begin_search;
use super::pool::{Connection, PATIENCE};
use super::{PostgresStore, get, sql_limit};
use crate::domain::{Embedding, ModelId, PromptId, UserId};
use crate::store::Error;
use crate::store::rows::Defect;

/// The models that this process has seen. A number is read once, so inserts need no further round
/// trip.
#[derive(Debug, Default)]
pub(super) struct Models {
    known: RwLock<HashMap<ModelId, (i32, usize)>>,
}

impl Models {
    /// The model's number, which is assigned now if the model is new, for a vector of `given`
    /// numbers. All vectors of a model have the same length.
    pub async fn number(
        &self,
        connection: &mut Connection,
        model: &ModelId,
        given: usize,
    ) -> Result<i32, Error> {
        let known = match self.known(connection, model).await? {
            Some(known) => Some(known),
            None => {
                let length = i32::try_from(given).map_err(|_| Defect::UnknownValue)?;
                connection
                    .write(
                        "INSERT INTO embedding_model (name, dimension) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING",
                        &[&&*model.0, &length],
                    )
                    .await?;
                // Another server may have been first.
                self.known(connection, model).await?
            }
        };
        let (number, expected) = known.ok_or(Defect::UnknownValue)?;
        if expected != given {
            return Err(Defect::Dimension { given, expected }.into());
        }
        Ok(number)
    }

    /// The model's number, if it has made any vector.
    pub async fn find(
        &self,
        connection: &mut Connection,
        model: &ModelId,
    ) -> Result<Option<i32>, Error> {
        let known = self.known(connection, model).await?;
        Ok(known.map(|(number, _)| number))
    }

    /// The model's number and the length of its vectors.
    async fn known(
        &self,
        connection: &mut Connection,
        model: &ModelId,
    ) -> Result<Option<(i32, usize)>, Error> {
        if let Some(known) = self.known.read().get(model) {
            return Ok(Some(*known));
        }
        let sql = "SELECT id, dimension FROM embedding_model WHERE name = $1";
        let rows = connection.query(sql, &[&&*model.0]).await?;
        let Some(row) = rows.first() else {
            return Ok(None);
        };
        let dimension: i32 = get(row, "dimension")?;
        let dimension = usize::try_from(dimension).map_err(|_| Defect::UnknownValue)?;
        let known = (get(row, "id")?, dimension);
        self.known.write().insert(model.clone(), known);
        Ok(Some(known))
    }
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
                let begin = begin_search(self.pgvector, k);
                connection
                    .query_within(&begin, NEAREST_SHARED, &[&vector, &number, &limit])
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
