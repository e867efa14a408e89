//! Finding prompts by meaning.

use std::sync::Arc;
use std::time::Instant;

use crate::config::SimilarScope;
use crate::domain::{Embedding, ModelId, Prompt, PromptId, UserId};
use crate::embed::{Class, Embedder};
use crate::error::Error;
use crate::fair_semaphore::{FairPermit, FairSemaphore};
use crate::memory_budget::{MemoryBudget, Owner, Reservation};
use crate::search::{Hit, Scope, Similarity};
use crate::services::reembedding::Progress;
use crate::store::PromptStore;
use crate::telemetry::Metrics;

/// Texts of found prompts that are read together, in bytes: all that an ordinary search finds.
pub const READ_BYTES: usize = 64 << 10;

/// What a search found.
#[derive(Debug)]
pub struct Similar {
    /// Prompts with their cosine similarity, nearest first, as long as their texts are no more than
    /// [`READ_BYTES`].
    pub results: Vec<(Prompt, f32)>,
    /// Those after them, which are read one group after another while the answer is written.
    pub rest: Vec<Unread>,
    /// The share of prompts that could be found, from 0 to 1; `None` means all.
    pub coverage: Option<f64>,
    /// Holds at least the texts of the results.
    pub memory: Reservation,
    /// The caller's turn, kept until the results are written as JSON.
    pub turn: FairPermit<UserId>,
}

/// A prompt that was found and is not read yet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unread {
    /// Which.
    pub id: PromptId,
    /// Bytes of its texts.
    pub text_bytes: usize,
    /// Its cosine similarity.
    pub score: f32,
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
    /// Who reads prompts from the store; users take turns.
    pub reads: Arc<FairSemaphore<UserId>>,
    /// The account of what requests in flight hold.
    pub memory: Arc<MemoryBudget>,
    /// How far a change of model has come.
    pub reembedding: Arc<Progress>,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

impl Searches {
    /// The `k` stored prompts nearest to `query`, or all if there are fewer. What is read is held
    /// for `owner`.
    ///
    /// # Errors
    /// `Overloaded` at once if too many texts wait or searches are under way, or there is no memory
    /// for the results; those of the store and the index.
    pub async fn similar(
        &self,
        caller: UserId,
        owner: Owner,
        query: String,
        k: usize,
    ) -> Result<Similar, Error> {
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

        let (scope, label) = match self.scope {
            SimilarScope::Own => (Scope::Own(caller), "own"),
            SimilarScope::Shared => (Scope::Shared, "shared"),
        };
        let started = Instant::now();
        let read = self.nearest(caller, owner, scope, &embedding, k);
        let ((results, rest), memory, turn) = read.await?;
        self.metrics
            .search_duration
            .with_label_values(&[label])
            .observe(started.elapsed().as_secs_f64());
        let coverage = if self.reembedding.is_running() {
            let users = self.visible(caller);
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

    /// Reads prompts that a search of the caller's has found. One that was deleted since is left
    /// out.
    ///
    /// # Errors
    /// Those of the store; `Overloaded` if too many wait for their turn.
    pub async fn read_rest(
        &self,
        caller: UserId,
        found: &[Unread],
    ) -> Result<(Vec<(Prompt, f32)>, FairPermit<UserId>), Error> {
        let turn = self.reads.acquire(caller).await?;
        let ids: Vec<PromptId> = found.iter().map(|unread| unread.id).collect();
        let users = self.visible(caller);
        let read = self.store.prompts(users, &ids, usize::MAX).await?;
        // In the order given, of which some may be missing.
        let mut found = found.iter();
        let mut score = |id| {
            found
                .find(|unread| unread.id == id)
                .map(|unread| unread.score)
        };
        let prompts = read.whole.into_iter();
        let scored = prompts.filter_map(|prompt| Some((score(prompt.id)?, prompt)));
        Ok((
            scored.map(|(score, prompt)| (prompt, score)).collect(),
            turn,
        ))
    }

    /// Whose prompts the caller may find; `None` is everybody's.
    fn visible(&self, caller: UserId) -> Option<UserId> {
        match self.scope {
            SimilarScope::Own => Some(caller),
            SimilarScope::Shared => None,
        }
    }

    /// A row between the commit of its deletion and the report of it is found by the index and not in the store. It leaves a hole
    /// in the answer, and the index cannot be told to pass over it: so as many more are asked for, until there are `k` or no more.
    async fn nearest(
        &self,
        caller: UserId,
        owner: Owner,
        scope: Scope,
        embedding: &Embedding,
        k: usize,
    ) -> Result<(Found, Reservation, FairPermit<UserId>), Error> {
        let mut wanted = k;
        loop {
            let hits = self.similarity.nearest(scope, embedding, wanted).await?;
            let turn = self.reads.acquire(caller).await?;
            let memory = self.memory.reserve(owner, READ_BYTES)?;
            let (mut results, mut rest) = self.read(caller, &hits).await?;
            let found = results.len() + rest.len();
            let holes = hits.len() - found;
            if found >= k || hits.len() < wanted {
                results.truncate(k);
                rest.truncate(k - results.len());
                return Ok(((results, rest), memory, turn));
            }
            // There are more holes than were allowed for, so this at least doubles the allowance: it ends, if only with
            // everything there is.
            wanted = k + 2 * holes;
        }
    }

    async fn read(&self, caller: UserId, hits: &[Hit]) -> Result<Found, Error> {
        if hits.is_empty() {
            return Ok(Found::default());
        }
        let ids: Vec<PromptId> = hits.iter().map(|hit| hit.id).collect();
        let users = self.visible(caller);
        let read = self.store.prompts(users, &ids, READ_BYTES).await?;
        // Both are in the order of the hits, of which some may be missing.
        let mut hits = hits.iter();
        let mut score = |id| hits.find(|hit| hit.id == id).map(|hit| hit.score);
        let mut found = Found::default();
        for prompt in read.whole {
            if let Some(score) = score(prompt.id) {
                found.0.push((prompt, score));
            }
        }
        for (id, text_bytes) in read.rest {
            if let Some(score) = score(id) {
                found.1.push(Unread {
                    id,
                    text_bytes,
                    score,
                });
            }
        }
        Ok(found)
    }
}

/// Prompts that were read, and those after them that were not.
type Found = (Vec<(Prompt, f32)>, Vec<Unread>);
