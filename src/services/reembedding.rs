//! A change of model: gives every prompt a vector of the model in use, in the background.
//!
//! It can be interrupted at any time, because the store knows which prompts have no vector of this
//! model yet. Searches find only prompts with a vector of this model meanwhile, and say which share
//! of the prompts these are.

use std::collections::HashSet;
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
/// How long to wait before a retry while the store is unavailable.
const PAUSE: Duration = Duration::from_millis(500);
/// How long to wait before another attempt while another server does the work.
const TURN: Duration = Duration::from_secs(5);
/// How often progress is logged.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Whether a change of model is under way.
#[derive(Debug, Default)]
pub struct ReembeddingProgress {
    running: AtomicBool,
    asked: Notify,
}

impl ReembeddingProgress {
    /// Requests the work again: a prompt was stored without a vector.
    pub fn ask(&self) {
        self.running.store(true, Ordering::Release);
        self.asked.notify_one();
    }

    /// Whether some prompts may have no vector of the model in use yet.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }
}

/// Gives prompts their vectors, with its dependencies.
#[derive(Clone)]
pub struct Reembedding {
    /// Where prompts and vectors are kept.
    pub store: Arc<dyn PromptStore>,
    /// Makes the vectors.
    pub embedder: Arc<BackgroundEmbedder>,
    /// The model in use.
    pub model: ModelId,
    /// The index that gets the vectors.
    pub similarity: Arc<dyn Similarity>,
    /// Shows others whether the work is under way.
    pub progress: Arc<ReembeddingProgress>,
    /// Show how much is left.
    pub metrics: Arc<Metrics>,
}

impl Reembedding {
    /// Returns how many prompts are left to do, and makes that known to searches. Call it before
    /// serving.
    ///
    /// # Errors
    /// The errors of the store.
    pub async fn plan(&self) -> Result<u64, Error> {
        let coverage = self.store.coverage(&self.model, None).await?;
        let remaining = coverage.completed.saturating_sub(coverage.embedded);
        let shown = i64::try_from(remaining).unwrap_or(i64::MAX);
        self.metrics.reembedding_remaining.set(shown);
        let running = &self.progress.running;
        running.store(remaining > 0, Ordering::Release);
        Ok(remaining)
    }

    /// Does the work, and again at each request, until `stop` is cancelled. A later start continues
    /// where this one ended.
    pub async fn run(&self, stop: CancellationToken) {
        let work = async {
            loop {
                self.work().await;
                self.progress.asked.notified().await;
            }
        };
        stop.run_until_cancelled(work).await;
    }

    async fn work(&self) {
        loop {
            match self.store.claim_reembedding().await {
                Ok(Some(_claim)) => return self.embed_all().await,
                // Another server does the work.
                Ok(None) => tokio::time::sleep(TURN).await,
                Err(error) => self.wait_for_store(&error).await,
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
                    self.wait_for_store(&error).await;
                    continue;
                }
            };
            let Some(last) = rows.last().map(|row| row.id) else {
                break;
            };
            let users: Vec<UserId> = rows.iter().map(|row| row.user_id).collect();
            let ids: Vec<PromptId> = rows.iter().map(|row| row.id).collect();
            let texts = rows.into_iter().map(|row| row.prompt).collect();
            let made = ids.into_iter().zip(self.embedder.embed(texts).await);
            let (embedded, owners): (Vec<(PromptId, Embedding)>, Vec<UserId>) = made
                .zip(users)
                .filter_map(|((id, made), user)| Some(((id, made?), user)))
                .unzip();
            let stored = self.store.put_embeddings(&self.model, embedded.clone());
            match stored.await {
                Ok(stored) => {
                    done += stored.len() as u64;
                    self.insert(owners, embedded, stored).await;
                    after = Some(last);
                }
                Err(error) => {
                    // They may have been stored nevertheless. Then they will not come again as
                    // prompts without a vector.
                    for user_id in owners.into_iter().collect::<HashSet<UserId>>() {
                        self.similarity.invalidate(user_id);
                    }
                    self.wait_for_store(&error).await;
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
        // Prompts that failed are left for the next start. Until then searches say so.
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

    /// Inserts the vectors into the index. Not on an async thread, because it looks for each id in
    /// its owner's rows, which may be a million.
    async fn insert(
        &self,
        owners: Vec<UserId>,
        embedded: Vec<(PromptId, Embedding)>,
        stored: Vec<PromptId>,
    ) {
        let similarity = Arc::clone(&self.similarity);
        let inserted = tokio::task::spawn_blocking(move || {
            for ((id, embedding), user_id) in embedded.iter().zip(owners) {
                if stored.contains(id) {
                    similarity.inserted(user_id, *id, embedding);
                }
            }
        });
        if let Err(error) = inserted.await {
            tracing::error!(%error, "re-embedded prompts were not all taken into the index");
        }
    }

    async fn wait_for_store(&self, error: &crate::store::Error) {
        tracing::warn!(%error, "embedding of stored prompts waits for the store");
        tokio::time::sleep(PAUSE).await;
    }
}
