//! Finding prompts by meaning.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use crate::config::SimilarScope;
use crate::domain::{Embedding, ModelId, Prompt, PromptId, UserId};
use crate::embed::{Class, Embedder};
use crate::error::Error;
use crate::search::{Hit, Scope, Similarity};
use crate::services::reembedding::Progress;
use crate::store::PromptStore;
use crate::telemetry::Metrics;

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
    /// `Overloaded` at once if too many texts wait or searches are under way; those of the store and the index.
    pub async fn similar(&self, caller: UserId, query: String, k: usize) -> Result<Similar, Error> {
        let permit = self.embedder.admit(caller, Class::Search)?;
        // Kept until the rows are read. What comes after the vector has queues too, for slabs, scans and readers: this bounds
        // them, in all and for each user, also where the vector comes from the cache at once.
        let _place = permit.clone();
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
        let results = self.nearest(scope, owner, &embedding, k).await?;
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

    /// A row between the commit of its deletion and the report of it is found by the index and not in the store. It leaves a hole
    /// in the answer, and the index cannot be told to pass over it: so as many more are asked for, until there are `k` or no more.
    async fn nearest(
        &self,
        scope: Scope,
        owner: Option<UserId>,
        embedding: &Embedding,
        k: usize,
    ) -> Result<Vec<(Prompt, f32)>, Error> {
        let mut wanted = k;
        loop {
            let hits = self.similarity.nearest(scope, embedding, wanted).await?;
            let mut results = self.read(owner, &hits).await?;
            let holes = hits.len() - results.len();
            if results.len() >= k || hits.len() < wanted {
                results.truncate(k);
                return Ok(results);
            }
            // There are more holes than were allowed for, so this at least doubles the allowance: it ends, if only with
            // everything there is.
            wanted = k + 2 * holes;
        }
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
