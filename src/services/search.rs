//! Finding prompts by meaning.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use crate::config::SimilarScope;
use crate::domain::{ModelId, Prompt, PromptId, UserId};
use crate::embed::{Class, Embedder};
use crate::error::Error;
use crate::search::{Hit, Scope, Similarity};
use crate::services::reembedding::Progress;
use crate::store::PromptStore;
use crate::telemetry::Metrics;

/// Searches again after finding rows that were deleted meanwhile. Each retry needs a deletion inside it, so one that
/// needs more than these is watching somebody empty their list; it gets what there is.
const MAX_ATTEMPTS: usize = 4;

/// What a search found.
#[derive(Clone, Debug)]
pub struct Similar {
    /// Prompts with their cosine similarity, nearest first.
    pub results: Vec<(Prompt, f32)>,
    /// The share of prompts that could be found, from 0 to 1; `None` means all.
    pub coverage: Option<f64>,
}

/// The use case of searching.
pub struct Searches {
    /// Where prompts are kept.
    pub store: Arc<dyn PromptStore>,
    /// Makes the query's vector.
    pub embedder: Arc<Embedder>,
    /// The model behind the embedder.
    pub model: ModelId,
    /// Finds the nearest.
    pub similarity: Arc<dyn Similarity>,
    /// Whose prompts are found.
    pub scope: SimilarScope,
    /// How far a change of model has come.
    pub reembedding: Arc<Progress>,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

impl Searches {
    /// The `k` stored prompts nearest to `query`, or all if there are fewer.
    ///
    /// # Errors
    /// `Overloaded` at once if too many texts wait; those of the store and the index.
    pub async fn similar(&self, caller: UserId, query: String, k: usize) -> Result<Similar, Error> {
        let permit = self.embedder.admit(caller, Class::Search)?;
        let started = Instant::now();
        let embedding = self.embedder.embed(permit, query.into()).await?;
        self.metrics
            .embedding_duration
            .with_label_values(&["search"])
            .observe(started.elapsed().as_secs_f64());

        let (scope, owner, label) = match self.scope {
            SimilarScope::Own => (Scope::Own(caller), Some(caller), "own"),
            SimilarScope::Shared => (Scope::Shared, None, "shared"),
        };
        let started = Instant::now();
        let mut results = Vec::new();
        for _ in 0..MAX_ATTEMPTS {
            let hits = self.similarity.nearest(scope, &embedding, k).await?;
            let found = hits.len();
            results = self.read(owner, &hits).await?;
            // A row deleted between the index and the store leaves a hole that the next nearest fills.
            if results.len() == found {
                break;
            }
        }
        self.metrics
            .search_duration
            .with_label_values(&[label])
            .observe(started.elapsed().as_secs_f64());
        let coverage = if self.reembedding.is_running() {
            let coverage = self.store.coverage(&self.model, owner).await?;
            (coverage.embedded < coverage.completed)
                .then(|| coverage.embedded as f64 / coverage.completed as f64)
        } else {
            None
        };
        Ok(Similar { results, coverage })
    }

    async fn read(&self, owner: Option<UserId>, hits: &[Hit]) -> Result<Vec<(Prompt, f32)>, Error> {
        if hits.is_empty() {
            return Ok(Vec::new());
        }
        let ids: Vec<PromptId> = hits.iter().map(|hit| hit.id).collect();
        let rows = self.store.prompts(owner, &ids).await?;
        let mut rows: HashMap<PromptId, Prompt> =
            rows.into_iter().map(|prompt| (prompt.id, prompt)).collect();
        Ok(hits
            .iter()
            .filter_map(|hit| Some((rows.remove(&hit.id)?, hit.score)))
            .collect())
    }
}
