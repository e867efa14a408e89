//! Finds prompts by similarity.

use std::sync::Arc;
use std::time::Instant;

use crate::config::SimilarScope;
use crate::domain::{Embedding, ModelId, Prompt, PromptId, UserId};
use crate::embed::{Class, Embedder};
use crate::error::Error;
use crate::fair_semaphore::{FairPermit, FairSemaphore};
use crate::memory_budget::{MemoryBudget, Owner, Reservation};
use crate::search::{Hit, Similarity};
use crate::services::reembedding::ReembeddingProgress;
use crate::store::PromptStore;
use crate::telemetry::Metrics;

/// Texts of found prompts that are read together, in bytes: all that an ordinary search finds.
pub const READ_BYTES: usize = 64 << 10;

/// What a search found.
#[derive(Debug)]
pub struct Similar {
    /// Prompts with their cosine similarity, nearest first. Their texts are at most [`READ_BYTES`]
    /// together.
    pub results: Vec<(Prompt, f32)>,
    /// The prompts after them, which are read in groups while the response is written.
    pub rest: Vec<Unread>,
    /// The share of prompts that the search could find, from 0 to 1; `None` means all.
    pub coverage: Option<f64>,
    /// Counts at least the texts of the results.
    pub memory: Reservation,
    /// The caller's turn, kept until the results are written as JSON.
    pub turn: FairPermit<UserId>,
}

/// A prompt that was found and has not been read yet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unread {
    /// Identifies the prompt.
    pub id: PromptId,
    /// Bytes of its texts.
    pub text_bytes: usize,
    /// Its cosine similarity.
    pub score: f32,
}

/// Searches by similarity.
pub struct Searches {
    /// Where prompts are kept.
    pub store: Arc<dyn PromptStore>,
    /// Embeds the query.
    pub embedder: Arc<Embedder>,
    /// The model behind the embedder.
    pub model: ModelId,
    /// Finds the nearest vectors.
    pub similarity: Arc<dyn Similarity>,
    /// Whose prompts a search finds.
    pub scope: SimilarScope,
    /// Permits to read prompts from the store; users take turns.
    pub reads: Arc<FairSemaphore<UserId>>,
    /// The memory of requests in flight.
    pub memory: Arc<MemoryBudget>,
    /// Whether a change of model is under way.
    pub reembedding: Arc<ReembeddingProgress>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

impl Searches {
    /// The `k` stored prompts nearest to `query`, or all if there are fewer. The memory that they
    /// take counts for `owner`.
    ///
    /// # Errors
    /// `Overloaded` at once if too many texts wait, too many searches are running, or there is no
    /// memory for the results; the errors of the store and the index.
    pub async fn similar(
        &self,
        caller: UserId,
        owner: Owner,
        query: String,
        k: usize,
    ) -> Result<Similar, Error> {
        let permit = self.embedder.admit(caller, Class::Search)?;
        // Kept until the rows are read. The steps after the embedding have queues too, for slabs,
        // scans and readers. The permit bounds them, in all and for each user, even if the vector
        // comes from the cache.
        let _kept_until_read = permit.clone();
        let started = Instant::now();
        let embedding = self.embedder.embed(permit, query.into()).await?;
        self.metrics
            .embedding_duration
            .with_label_values(&["search"])
            .observe(started.elapsed().as_secs_f64());

        let scope = match self.scope {
            SimilarScope::Own => "own",
            SimilarScope::Shared => "shared",
        };
        let started = Instant::now();
        let read = self.nearest(caller, owner, &embedding, k);
        let ((results, rest), memory, turn) = read.await?;
        self.metrics
            .search_duration
            .with_label_values(&[scope])
            .observe(started.elapsed().as_secs_f64());
        let coverage = if self.reembedding.is_running() {
            let users = self.scope.owner(caller);
            let coverage = self.store.coverage(&self.model, users).await?;
            (coverage.embedded < coverage.completed)
                .then(|| coverage.embedded as f64 / coverage.completed as f64)
        } else {
            None
        };
        Ok(Similar {
            results,
            rest,
            coverage,
            memory,
            turn,
        })
    }

    /// Reads prompts that a search of the caller's has found. A prompt that has been deleted since
    /// is left out.
    ///
    /// # Errors
    /// The errors of the store; `Overloaded` if too many wait for their turn.
    pub async fn read_rest(
        &self,
        caller: UserId,
        found: &[Unread],
    ) -> Result<(Vec<(Prompt, f32)>, FairPermit<UserId>), Error> {
        let turn = self.reads.acquire(caller).await?;
        let hit = |unread: &Unread| Hit {
            id: unread.id,
            score: unread.score,
        };
        let hits: Vec<Hit> = found.iter().map(hit).collect();
        let (prompts, _) = self.read(caller, &hits, usize::MAX).await?;
        Ok((prompts, turn))
    }

    /// The index can return a prompt whose deletion has committed but is not reported to it yet.
    /// The store has no row for such a hit. So this asks for more hits, until it has `k` rows or
    /// there are no more.
    async fn nearest(
        &self,
        caller: UserId,
        owner: Owner,
        embedding: &Embedding,
        k: usize,
    ) -> Result<(Found, Reservation, FairPermit<UserId>), Error> {
        let mut wanted = k;
        loop {
            let hits = self.similarity.nearest(caller, embedding, wanted).await?;
            let turn = self.reads.acquire(caller).await?;
            let memory = self.memory.reserve(owner, READ_BYTES)?;
            let (mut results, mut rest) = self.read(caller, &hits, READ_BYTES).await?;
            let found = results.len() + rest.len();
            let deleted = hits.len() - found;
            if found >= k || hits.len() < wanted {
                results.truncate(k);
                rest.truncate(k - results.len());
                return Ok(((results, rest), memory, turn));
            }
            // There were more such hits than this round allowed for. The next round allows for
            // twice as many, so the loop ends, at the latest with all hits.
            wanted = k + 2 * deleted;
        }
    }

    async fn read(&self, caller: UserId, hits: &[Hit], text_bytes: usize) -> Result<Found, Error> {
        if hits.is_empty() {
            return Ok(Found::default());
        }
        let ids: Vec<PromptId> = hits.iter().map(|hit| hit.id).collect();
        let users = self.scope.owner(caller);
        let read = self.store.prompts(users, &ids, text_bytes).await?;
        // Both lists are in the order of the hits. Some hits may be missing.
        let mut hits = hits.iter();
        let mut score = |id| hits.find(|hit| hit.id == id).map(|hit| hit.score);
        let whole = read.whole.into_iter().filter_map(|prompt| {
            let score = score(prompt.id)?;
            Some((prompt, score))
        });
        let whole = whole.collect();
        let rest = read.rest.into_iter().filter_map(|(id, text_bytes)| {
            Some(Unread {
                id,
                text_bytes,
                score: score(id)?,
            })
        });
        Ok((whole, rest.collect()))
    }
}

/// Prompts that were read, and the ones after them that were not.
type Found = (Vec<(Prompt, f32)>, Vec<Unread>);
