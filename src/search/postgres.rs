//! Similarity in PostgreSQL, where the vectors are.

use std::sync::Arc;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::{Error, Hit, IndexStatus, Similarity, check_dimension};
use crate::config::SimilarScope;
use crate::domain::{Embedding, ModelId, PromptId, UserId};
use crate::store;
use crate::store::postgres::PostgresStore;

/// Asks the database. There is nothing to insert or remove: the transaction that stored or deleted
/// a prompt has done so, for every server alike.
pub struct PostgresSimilarity {
    /// Where the vectors are.
    pub store: Arc<PostgresStore>,
    /// The model in use: vectors of others are not comparable.
    pub model: ModelId,
    /// Numbers in its vectors.
    pub dimension: usize,
    /// Whose prompts a search finds.
    pub scope: SimilarScope,
}

#[async_trait]
impl Similarity for PostgresSimilarity {
    async fn nearest(
        &self,
        caller: UserId,
        query: &Embedding,
        k: usize,
    ) -> Result<Vec<Hit>, Error> {
        check_dimension(self.dimension, query)?;
        let owner = self.scope.owner(caller);
        let found = self.store.nearest(&self.model, owner, query, k).await;
        let rows = found.map_err(|error| match error {
            store::Error::Unavailable(source) => Error::Source(source),
            error @ (store::Error::UsernameTaken
            | store::Error::QuotaExceeded
            | store::Error::BudgetExceeded
            | store::Error::PriceUnknown
            | store::Error::TooManyApiKeys
            | store::Error::Internal(_)) => Error::Failed(Box::new(error)),
        })?;
        let hit = |(id, score)| Hit { id, score };
        Ok(rows.into_iter().map(hit).collect())
    }

    fn inserted(&self, _: UserId, _: PromptId, _: &Embedding) {}

    fn deleted(&self, _: UserId, _: PromptId) {}

    fn invalidate(&self, _: UserId) {}

    /// Ready, with nothing in memory.
    fn status(&self) -> IndexStatus {
        IndexStatus {
            ready: true,
            ..IndexStatus::default()
        }
    }

    /// In shared scope, builds the approximate index.
    async fn prepare(&self, stop: CancellationToken) {
        if self.scope == SimilarScope::Shared {
            self.store.build_hnsw_index(stop).await;
        }
    }
}
