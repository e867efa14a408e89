//! The store seen as a source of vectors, for the index.

use std::sync::Arc;

use async_trait::async_trait;

use crate::domain::{ModelId, PromptId, UserId};
use crate::search::{BoxError, Page, VectorSource};
use crate::store::PromptStore;

/// Reads one model's vectors from the store.
pub struct StoredVectors {
    /// Where they are kept.
    pub store: Arc<dyn PromptStore>,
    /// The model in use: vectors of others are not comparable.
    pub model: ModelId,
}

#[async_trait]
impl VectorSource for StoredVectors {
    async fn page(
        &self,
        owner: Option<UserId>,
        after: Option<(UserId, PromptId)>,
        limit: usize,
    ) -> Result<Page, BoxError> {
        let page = self.store.vectors(&self.model, owner, after, limit).await?;
        Ok(Page {
            ids: page.ids,
            f16_bytes: page.f16_bytes,
        })
    }
}
