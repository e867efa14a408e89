//! Feeds texts to the model: bounded, fair, in batches, never on the async threads.
//!
//! A caller takes a [`Permit`] (`admission`), then awaits [`Embedder::embed`]. Its text waits in the `queue` until a worker
//! thread takes it with others (`worker`); a repeated query may come from the `cache` instead. Nothing is shared across users but
//! the workers' time: not a cached vector, not a computation in flight.

mod admission;
mod cache;
mod queue;
mod worker;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use self::admission::Admission;
pub use self::admission::Permit;
use self::cache::Cache;
use self::queue::{Place, Queue, Waiter};
use crate::domain::{Embedding, UserId};
use crate::telemetry::Metrics;

/// What the text is for. Posts go before searches: a caller of a post waits for its model's answer meanwhile, and has been
/// throttled already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A prompt to be stored.
    Post,
    /// A query, likely to come again.
    Search,
}

/// Why there is no vector.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// As many texts are admitted as may be, in all or of this user or class.
    #[error("too many texts are waiting to be embedded")]
    Overloaded {
        /// When to try again: the time the workers need for what is admitted, 1 to 30 seconds.
        retry_after: Duration,
    },
    /// The pipeline is shutting down.
    #[error("embedding is shutting down")]
    Stopped,
    /// The model failed on this text; a defect. Others are not affected.
    #[error("the text could not be embedded")]
    Failed,
}

/// A tokenizer and a model, as the workers use them. Called from several threads at once.
pub trait Encode: Send + Sync + 'static {
    /// A worker's working memory, made on its thread and kept between batches.
    type Scratch;

    /// Makes working memory.
    fn scratch(&self) -> Self::Scratch;

    /// The ids of a text, cut to what the model takes.
    fn tokenize(&self, text: &str) -> Vec<u32>;

    /// One vector for each of the texts, in their order. A text's vector does not depend on its neighbours.
    fn embed(&self, batch: &[&[u32]], scratch: &mut Self::Scratch) -> Vec<Embedding>;
}

/// How large everything is.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Threads that compute; as many as cores.
    pub workers: usize,
    /// Texts admitted at once, waiting or running; at least 4. One user may have half of them; searches three quarters.
    pub capacity: usize,
    /// Tokens in a batch. A batch is for using the weights often enough per pass over them; what is beyond that only makes
    /// callers wait.
    pub batch_tokens: usize,
    /// Memory for recent queries of all users, in bytes; 0 for none.
    pub cache_bytes: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            // At 10 ms for a long text, the last of them waits about a second on two cores.
            capacity: 256,
            // Four texts of 16 tokens. For int8 weights in a core's reach, 32 tokens are within 3 % of the best rate.
            batch_tokens: 64,
            // About 4,000 queries of a 384-dimensional model.
            cache_bytes: 8 << 20,
        }
    }
}

/// The pipeline. Share it by `Arc`; end it with [`shutdown`](Embedder::shutdown).
pub struct Embedder {
    shared: Arc<Shared>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    batch_tokens: usize,
    admission: Arc<Admission>,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
    /// Signalled for each new job, and for all when stopped. Taken in the order `state`, then the counters of `admission`.
    work: Condvar,
}

struct State {
    queue: Queue,
    cache: Cache,
    stopped: bool,
}

impl Embedder {
    /// Starts the workers. Errors: the system has no threads left.
    pub fn start<E: Encode>(
        encoder: Arc<E>,
        settings: &Settings,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<Embedder> {
        let workers = settings.workers.max(1);
        let state = State {
            queue: Queue::new(settings.batch_tokens, workers),
            cache: Cache::new(settings.cache_bytes),
            stopped: false,
        };
        let embedder = Embedder {
            shared: Arc::new(Shared {
                batch_tokens: settings.batch_tokens,
                admission: Arc::new(Admission::new(settings.capacity, workers)),
                metrics,
                state: Mutex::new(state),
                work: Condvar::new(),
            }),
            workers: Mutex::default(),
        };
        for number in 0..workers {
            let (shared, encoder) = (Arc::clone(&embedder.shared), Arc::clone(&encoder));
            let thread = std::thread::Builder::new()
                .name(format!("embed-{number}"))
                .spawn(move || worker::run(&shared, &*encoder))?;
            embedder.lock_workers().push(thread);
        }
        Ok(embedder)
    }

    /// Admits one text of a user, at once or not at all. Errors: `Overloaded`, `Stopped`.
    pub fn admit(&self, user: UserId, class: Class) -> Result<Permit, Error> {
        let admitted = self.shared.admission.admit(user, class);
        if matches!(admitted, Err(Error::Overloaded { .. })) {
            self.shared.metrics.overloaded.inc();
        }
        admitted
    }

    /// The vector of a text. Cancel safe: dropping the future takes the text out of the queue, if it is not running yet, and
    /// gives the permit back (if it is running, when it is done). Errors: `Failed`, `Stopped`.
    pub async fn embed(&self, permit: Permit, text: Arc<str>) -> Result<Embedding, Error> {
        let (mut waiting, reply) = match self.shared.submit(permit, text)? {
            Submitted::Cached(embedding) => return Ok(embedding),
            Submitted::Waiting(waiting, reply) => (waiting, reply),
        };
        let result = reply.await;
        waiting.answered = true;
        // A reply dropped without an answer belongs to a job that was cleared away at the end.
        result.unwrap_or(Err(Error::Stopped))
    }

    /// Texts that wait for a worker.
    pub fn queue_depth(&self) -> usize {
        self.shared.lock().queue.waiting()
    }

    /// Permits given out and not yet back.
    pub fn admitted(&self) -> usize {
        self.shared.admission.in_use()
    }

    /// Admits nobody further, serves everybody admitted until the deadline, then ends the workers and joins them. What is
    /// left then gets `Stopped`; a batch that is running is finished first, beyond the deadline if need be. True if nothing
    /// was left. Blocks: not for an async thread. A second call finds nothing to do.
    pub fn shutdown(&self, deadline: Instant) -> bool {
        let all_served = self.shared.admission.close(deadline);
        self.shared.stop();
        let workers = std::mem::take(&mut *self.lock_workers());
        for worker in workers {
            // A worker that panicked outside the encoder has no more to tell than the panic's own message.
            let _ended = worker.join();
        }
        all_served
    }

    fn lock_workers(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Embedder {
    /// Tells the workers to end; without `shutdown` before, nobody waits for them.
    fn drop(&mut self) {
        self.shared.stop();
    }
}

enum Submitted {
    Cached(Embedding),
    Waiting(Waiting, oneshot::Receiver<Result<Embedding, Error>>),
}

impl Shared {
    fn submit(self: &Arc<Self>, permit: Permit, text: Arc<str>) -> Result<Submitted, Error> {
        let (reply, receiver) = oneshot::channel();
        let mut state = self.lock();
        if state.stopped {
            return Err(Error::Stopped);
        }
        if permit.class() == Class::Search
            && let Some(embedding) = state.cache.get(permit.user(), &text)
        {
            drop(state);
            self.count_saved("cached");
            return Ok(Submitted::Cached(embedding));
        }
        let place = state.queue.submit(text, Waiter { permit, reply });
        drop(state);
        if place.joined {
            self.count_saved("coalesced");
        } else {
            self.work.notify_one();
        }
        let waiting = Waiting {
            shared: Arc::clone(self),
            place,
            answered: false,
        };
        Ok(Submitted::Waiting(waiting, receiver))
    }

    /// Counts a text that needed no computing.
    fn count_saved(&self, how: &str) {
        self.metrics.embedding_saved.with_label_values(&[how]).inc();
    }

    fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        let left = state.queue.clear();
        drop(state);
        // Outside the lock: it wakes those who wait.
        drop(left);
        self.work.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The encoder, which may panic, never runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a caller out of the queue when its future is dropped.
struct Waiting {
    shared: Arc<Shared>,
    place: Place,
    answered: bool,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if !self.answered && self.shared.lock().queue.leave(self.place) {
            self.shared.count_saved("caller_left");
        }
    }
}

#[cfg(test)]
mod stress;
#[cfg(test)]
mod tests;
