//! A change of model: gives every prompt a vector of the model in use, in the background.
//!
//! Resumable by nature: what is left to do is what the store says has no vector of this model.
//! Searches meanwhile see the vectors of this model only, and say what share of the prompts those
//! are.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::domain::{Embedding, ModelId, PromptId, UserId};
use crate::embed::BackgroundEmbedder;
use crate::error::Error;
use crate::search::Similarity;
use crate::store::PromptStore;
use crate::telemetry::Metrics;

/// Prompts read and committed together.
const BATCH: usize = 64;
/// How long to step back when the store is away.
const PAUSE: Duration = Duration::from_millis(500);
/// How long to wait for another server's turn before looking again.
const TURN: Duration = Duration::from_secs(5);
/// How often progress is logged.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Whether a change of model is under way.
#[derive(Debug, Default)]
pub struct Progress {
    running: AtomicBool,
    asked: Notify,
}

impl Progress {
    /// Asks for the work to be done again soon: a prompt was stored without a vector.
    pub fn ask(&self) {
        self.running.store(true, Ordering::Release);
        self.asked.notify_one();
    }

    /// Whether some prompts may have no vector of the model in use yet.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }
}

/// What the work stands on.
#[derive(Clone)]
pub struct Reembedding {
    /// Where prompts and vectors are kept.
    pub store: Arc<dyn PromptStore>,
    /// Makes the vectors.
    pub embedder: Arc<BackgroundEmbedder>,
    /// The model behind it.
    pub model: ModelId,
    /// Takes the vectors in.
    pub similarity: Arc<dyn Similarity>,
    /// Told whether the work is under way.
    pub progress: Arc<Progress>,
    /// Told how much is left.
    pub metrics: Arc<Metrics>,
}

impl Reembedding {
    /// Finds out whether there is anything to do; from then on searches know. Call it before
    /// serving.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn plan(&self) -> Result<u64, Error> {
        let coverage = self.store.coverage(&self.model, None).await?;
        let remaining = coverage.completed.saturating_sub(coverage.embedded);
        self.note(remaining);
        self.progress
            .running
            .store(remaining > 0, Ordering::Release);
        Ok(remaining)
    }

    /// Does what `plan` found, and again whenever it is asked to, until `stop`ped; a later start
    /// goes on where this one ended.
    pub async fn run(&self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = async {
                loop {
                    self.work().await;
                    self.progress.asked.notified().await;
                }
            } => {}
        }
    }

    async fn work(&self) {
        loop {
            match self.store.claim_reembedding().await {
                Ok(Some(_claim)) => return self.embed_all().await,
                // Another server is at it.
                Ok(None) => tokio::time::sleep(TURN).await,
                Err(error) => self.step_back(&error).await,
            }
            if matches!(self.plan().await, Ok(0)) {
                return;
            }
        }
    }

    async fn embed_all(&self) {
        let (begun, mut logged) = (Instant::now(), Instant::now());
        let (mut done, mut after) = (0_u64, None);
        loop {
            let rows = match self.store.unembedded(&self.model, after, BATCH).await {
                Ok(rows) => rows,
                Err(error) => {
                    self.step_back(&error).await;
                    continue;
                }
            };
            let Some(last) = rows.last().map(|row| row.id) else {
                break;
            };
            let owners: Vec<(PromptId, UserId)> =
                rows.iter().map(|row| (row.id, row.user_id)).collect();
            let texts = rows.into_iter().map(|row| row.prompt).collect();
            let made = self.embedder.embed(texts).await;
            let embedded: Vec<(PromptId, Embedding)> = owners
                .iter()
                .zip(made)
                .filter_map(|((id, _), made)| Some((*id, made?)))
                .collect();
            match self
                .store
                .put_embeddings(&self.model, embedded.clone())
                .await
            {
                Ok(stored) => {
                    done += stored.len() as u64;
                    self.take_in(owners, embedded, stored).await;
                    after = Some(last);
                }
                Err(error) => {
                    // They may be stored all the same, and are not found as rows without a vector
                    // then.
                    let users: HashSet<UserId> =
                        owners.iter().map(|(_, user_id)| *user_id).collect();
                    for user_id in users {
                        self.similarity.invalidate(user_id);
                    }
                    self.step_back(&error).await;
                }
            }
            if logged.elapsed() >= LOG_EVERY {
                logged = Instant::now();
                match self.plan().await {
                    Ok(remaining) => tracing::info!(
                        done,
                        remaining,
                        "embedding stored prompts with the model in use"
                    ),
                    Err(error) => tracing::warn!(%error, "the progress of embedding is not known"),
                }
            }
        }
        // What failed on the way is left for the next start, and said until then.
        match self.plan().await {
            Ok(0) if done > 0 => tracing::info!(
                done,
                seconds = begun.elapsed().as_secs(),
                "every prompt has a vector of the model in use"
            ),
            Ok(0) => {}
            Ok(remaining) => tracing::warn!(remaining, "some prompts could not be embedded"),
            Err(error) => tracing::warn!(%error, "the progress of embedding is not known"),
        }
    }

    /// Looks for each id in its owner's rows, which may be a million: not for an async thread.
    async fn take_in(
        &self,
        owners: Vec<(PromptId, UserId)>,
        embedded: Vec<(PromptId, Embedding)>,
        stored: Vec<PromptId>,
    ) {
        let similarity = Arc::clone(&self.similarity);
        let taken_in = tokio::task::spawn_blocking(move || {
            let owners: HashMap<PromptId, UserId> = owners.into_iter().collect();
            for (id, embedding) in embedded.iter().filter(|(id, _)| stored.contains(id)) {
                if let Some(user_id) = owners.get(id) {
                    similarity.inserted(*user_id, *id, embedding);
                }
            }
        });
        if let Err(error) = taken_in.await {
            tracing::error!(%error, "re-embedded prompts were not all taken into the index");
        }
    }

    async fn step_back(&self, error: &crate::store::Error) {
        tracing::warn!(%error, "embedding of stored prompts waits for the store");
        tokio::time::sleep(PAUSE).await;
    }

    fn note(&self, remaining: u64) {
        self.metrics
            .reembedding_remaining
            .set(i64::try_from(remaining).unwrap_or(i64::MAX));
    }
}
