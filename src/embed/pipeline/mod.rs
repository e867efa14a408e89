//! Feeds texts to the model: bounded, fair, in batches, never on the async threads.
//!
//! A caller takes a [`Permit`] (`admission`), then awaits [`Embedder::embed`]. Its text waits in
//! the `queue` until a worker thread takes it with others (`worker`). The vector of a repeated
//! query may come from the `cache` instead. Users share the workers' time and nothing else: neither
//! a cached vector nor a computation in flight.

mod admission;
mod cache;
mod queue;
mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

pub use self::admission::Permit;
use self::admission::TextAdmission;
use self::cache::QueryCache;
use self::queue::{TextQueue, Waiter, WaiterId};
use super::Encode;
use crate::domain::{Embedding, UserId};
use crate::telemetry::Metrics;
use crate::threads::{JobQueue, QueueClosed, ThreadGroup};

/// What the text is for. Posts go before searches: a post has been throttled already, and its call
/// of the upstream runs meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A prompt to be stored.
    Post,
    /// A query, which is likely to be repeated.
    Search,
    /// One of the texts of a request for embeddings, of which there may be thousands. Takes turns
    /// with searches, and never displaces a query from the cache.
    Bulk,
}

/// The vector of a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedded {
    /// The vector.
    pub embedding: Embedding,
    /// What the model has read of the text, in tokens: with the two that frame it, and without what
    /// is beyond the model's limit.
    pub tokens: usize,
}

/// The most bytes of a text that the model is given: several times what it reads.
const READ_BYTES: usize = 64 << 10;

/// The part of a text that is worth passing to the pipeline. A request may have megabytes, which
/// would be cut up for nothing.
pub fn read_part(text: &str) -> &str {
    &text[..text.floor_char_boundary(READ_BYTES)]
}

/// Why there is no vector.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// No more texts may be admitted: in all, or of this user or class.
    #[error("too many texts are waiting to be embedded")]
    Overloaded {
        /// When to retry: the time that the workers need for the admitted texts, 1 to 30 seconds.
        retry_after: Duration,
    },
    /// The pipeline is shutting down.
    #[error("embedding is shutting down")]
    Stopped,
    /// The model failed on this text, which is a defect. Other texts are not affected.
    #[error("the text could not be embedded")]
    Failed,
}

/// The sizes of a pipeline.
#[derive(Clone, Debug)]
pub struct EmbedderSettings {
    /// Threads that compute: as many as cores.
    pub workers: usize,
    /// Texts admitted at once, waiting or running; at least 4. One user may have half of them, all
    /// searches together three quarters, and of these all requests for embeddings two thirds.
    pub capacity: usize,
    /// Tokens in a batch. Each pass over the weights then serves enough tokens. A larger batch only
    /// makes callers wait.
    pub batch_tokens: usize,
    /// Memory for recent queries of all users, in bytes; 0 for none.
    pub cache_bytes: usize,
}

impl Default for EmbedderSettings {
    fn default() -> Self {
        EmbedderSettings {
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            // At 10 ms for a long text, the last of them waits about a second on two cores.
            capacity: 256,
            // Four texts of 16 tokens. With int8 weights in a core's cache, 32 tokens are within 3
            // % of the best rate.
            batch_tokens: 64,
            // About 4,000 queries of a 384-dimensional model.
            cache_bytes: 8 << 20,
        }
    }
}

/// Embeds texts. Share it by `Arc`, and end it with [`shutdown`](Embedder::shutdown).
pub struct Embedder {
    pipeline: Arc<Pipeline>,
    workers: ThreadGroup,
}

/// What callers and workers share.
struct Pipeline {
    batch_tokens: usize,
    admission: TextAdmission,
    metrics: Arc<Metrics>,
    work: JobQueue<PipelineState>,
}

struct PipelineState {
    queue: TextQueue,
    cache: QueryCache,
}

impl Embedder {
    /// Starts the workers.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn start<E: Encode>(
        encoder: Arc<E>,
        settings: &EmbedderSettings,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<Embedder> {
        let workers = settings.workers.max(1);
        let state = PipelineState {
            queue: TextQueue::new(settings.batch_tokens, workers),
            cache: QueryCache::new(settings.cache_bytes),
        };
        let embedder = Embedder {
            pipeline: Arc::new(Pipeline {
                batch_tokens: settings.batch_tokens,
                admission: TextAdmission::new(settings.capacity, workers),
                metrics,
                work: JobQueue::new(state),
            }),
            workers: ThreadGroup::default(),
        };
        for number in 0..workers {
            let (pipeline, encoder) = (Arc::clone(&embedder.pipeline), Arc::clone(&encoder));
            let work = move || worker::run(&pipeline, &*encoder);
            embedder.workers.spawn(format!("embed-{number}"), work)?;
        }
        Ok(embedder)
    }

    /// Admits one text of a user, at once or not at all.
    ///
    /// # Errors
    /// `Overloaded`, `Stopped`.
    pub fn admit(&self, user: UserId, class: Class) -> Result<Permit, Error> {
        let admitted = self.pipeline.admission.admit(user, class);
        if matches!(admitted, Err(Error::Overloaded { .. })) {
            self.pipeline.metrics.overloaded.inc();
        }
        admitted
    }

    /// One more text of a request for embeddings, which has a permit already, so that several
    /// workers can serve it. `None` if there is no room, which is no failure: the request goes on
    /// with the permit that it has.
    pub fn admit_more(&self, user: UserId) -> Option<Permit> {
        self.pipeline.admission.admit_more(user)
    }

    /// The vector of a text. Cancel safe: dropping the future removes a text that still waits, and
    /// returns its permit. The permit of a text that is running is returned when it is done.
    ///
    /// # Errors
    /// `Failed`, `Stopped`.
    pub async fn embed(&self, permit: Permit, text: Arc<str>) -> Result<Embedding, Error> {
        if permit.class() == Class::Search
            && let Some(embedding) = self.pipeline.work.jobs().cache.get(permit.user(), &text)
        {
            self.pipeline.count_saved("cached");
            return Ok(embedding);
        }
        Ok(self.compute(permit, text).await?.embedding)
    }

    /// The same, never from the cache, with the number of tokens.
    ///
    /// # Errors
    /// `Failed`, `Stopped`.
    pub async fn compute(&self, permit: Permit, text: Arc<str>) -> Result<Embedded, Error> {
        let (mut waiting, reply) = self.pipeline.submit(permit, text)?;
        let result = reply.await;
        waiting.is_over = true;
        // `stop` drops the replies of jobs that were not run.
        result.unwrap_or(Err(Error::Stopped))
    }

    /// Texts that wait for a worker.
    pub fn queue_depth(&self) -> usize {
        self.pipeline.work.jobs().queue.waiting()
    }

    /// Permits in use.
    pub fn admitted(&self) -> usize {
        self.pipeline.admission.in_use()
    }

    /// Refuses all texts from now on, embeds the admitted ones until the deadline, then ends the
    /// workers and waits for them. Texts that are left get `Stopped`. A batch that is running is
    /// finished first, after the deadline if necessary. Returns true if no text was left. Blocks:
    /// not for an async thread. A second call does nothing.
    pub fn shutdown(&self, deadline: Instant) -> bool {
        let all_served = self.pipeline.admission.close(deadline);
        self.pipeline.stop();
        self.workers.join();
        all_served
    }
}

impl Drop for Embedder {
    /// Ends the workers, without waiting for them.
    fn drop(&mut self) {
        self.pipeline.stop();
    }
}

type Reply = oneshot::Receiver<Result<Embedded, Error>>;

impl Pipeline {
    fn submit(
        self: &Arc<Self>,
        permit: Permit,
        text: Arc<str>,
    ) -> Result<(WaitingText, Reply), Error> {
        let (reply, receiver) = oneshot::channel();
        let submit = |state: &mut PipelineState| state.queue.submit(text, Waiter { permit, reply });
        let waiter = self
            .work
            .add(submit)
            .map_err(|QueueClosed| Error::Stopped)?;
        if waiter.joined {
            self.count_saved("coalesced");
        }
        let waiting = WaitingText {
            pipeline: Arc::clone(self),
            waiter,
            is_over: false,
        };
        Ok((waiting, receiver))
    }

    /// Counts a text that needed no computing.
    fn count_saved(&self, how: &str) {
        self.metrics.embedding_saved.with_label_values(&[how]).inc();
    }

    fn stop(&self) {
        let left = self.work.close(|state| state.queue.clear());
        // Outside the lock, because it wakes the callers.
        drop(left);
    }
}

/// Removes a caller from the queue when its future is dropped.
struct WaitingText {
    pipeline: Arc<Pipeline>,
    waiter: WaiterId,
    /// Whether the caller has its result.
    is_over: bool,
}

impl Drop for WaitingText {
    fn drop(&mut self) {
        if !self.is_over && self.pipeline.work.jobs().queue.leave(self.waiter) {
            self.pipeline.count_saved("caller_left");
        }
    }
}

#[cfg(test)]
mod stress;
#[cfg(test)]
mod tests;
