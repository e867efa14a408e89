//! Similarity by a store that finds near vectors itself.

use std::sync::Arc;

use async_trait::async_trait;

use crate::domain::{Embedding, ModelId, PromptId, UserId};
use crate::search::{Error, Hit, Scope, Similarity, Status};
use crate::store::{self, NearestStore};

/// Asks the store. There is nothing to take in or to drop: the transaction that stored or deleted a prompt has done so, for
/// every server alike.
pub struct StoredSimilarity {
    /// Where the vectors are.
    pub store: Arc<dyn NearestStore>,
    /// The model in use: vectors of others are not comparable.
    pub model: ModelId,
    /// The length of its vectors.
    pub dimension: usize,
}

#[async_trait]
impl Similarity for StoredSimilarity {
    async fn nearest(&self, scope: Scope, query: &Embedding, k: usize) -> Result<Vec<Hit>, Error> {
        let actual = query.0.len();
        if actual != self.dimension {
            let expected = self.dimension;
            return Err(Error::Dimension { expected, actual });
        }
        let owner = match scope {
            Scope::Own(user) => Some(user),
            Scope::Shared => None,
        };
        let found = self.store.nearest(&self.model, owner, query, k).await;
        let rows = found.map_err(|error| match error {
            store::Error::Unavailable(source) => Error::Source(source),
            error @ (store::Error::UsernameTaken
            | store::Error::QuotaExceeded
            | store::Error::Internal(_)) => Error::Failed(Box::new(error)),
        })?;
        let hit = |(id, score)| Hit { id, score };
        Ok(rows.into_iter().map(hit).collect())
    }

    fn inserted(&self, _: UserId, _: PromptId, _: &Embedding) {}

    fn deleted(&self, _: UserId, _: PromptId) {}

    fn doubted(&self, _: UserId) {}

    /// Ready, and nothing in memory.
    fn status(&self) -> Status {
        Status {
            ready: true,
            ..Status::default()
        }
    }
}
