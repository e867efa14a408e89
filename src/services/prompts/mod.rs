//! Posting, listing, reading and deleting prompts.

mod announcements;
mod finish;
mod keys;
pub mod live;
mod one_write;
mod running;
mod upkeep;
mod work;

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::announcements::Encoders;
use self::live::{End, Live, Place, Reader};
use self::work::Admission;
use crate::config::CallsConfig;
use crate::domain::{Embedding, ModelId, Prompt, PromptId, PromptStatus, Timestamp, UserId};
use crate::embed::Embedder;
use crate::error::Error;
use crate::llm;
use crate::memory_budget::{MemoryBudget, Reservation};
use crate::realtime::Broker;
use crate::search::Similarity;
use crate::services::reembedding::Progress;
use crate::store::{self, CallStore, Holder, PromptPage, PromptStore};
use crate::telemetry::Metrics;

/// The texts of a prompt that are read at once, in bytes; of one with longer texts the size is read
/// first. Nearly every prompt has fewer.
pub const READ_BYTES: usize = 64 << 10;

/// A prompt that a user posts.
#[derive(Clone, Debug)]
pub struct CreatePrompt {
    /// Who posts it.
    pub user_id: UserId,
    /// The text: trimmed, not empty, without NUL.
    pub prompt: String,
    /// Whether the user's sockets are told.
    pub announce: bool,
    /// Whether the answer is wanted piece by piece.
    pub is_streamed: bool,
    /// The request's idempotency key, if it has one: 1 to 255 characters of visible ASCII.
    pub key: Option<String>,
    /// When the post was accepted.
    pub now: Timestamp,
}

/// A post that was served.
#[derive(Debug)]
pub enum Created {
    /// The whole answer.
    Answered {
        /// Completed and stored.
        prompt: Arc<Prompt>,
        /// How long the upstream took; `None` if it was not asked.
        upstream: Option<Duration>,
        /// Whether an earlier request with the same key was answered with it before.
        is_replayed: bool,
    },
    /// An answer that is being written, or is read like one.
    Streaming {
        /// Reads it from the beginning.
        reader: Reader,
        /// Whether an earlier request with the same key was answered with it before.
        is_replayed: bool,
    },
}

/// What the use cases of prompts stand on.
pub struct Parts {
    /// Where prompts are kept.
    pub store: Arc<dyn PromptStore>,
    /// Where running calls and idempotency keys are kept: the same data.
    pub call_store: Arc<dyn CallStore>,
    /// 16 random bytes that tell this process from others on the same data.
    pub replica: [u8; 16],
    /// Makes the prompts' vectors.
    pub embedder: Arc<Embedder>,
    /// The model behind the embedder.
    pub model: ModelId,
    /// Finds them again.
    pub similarity: Arc<dyn Similarity>,
    /// Gives vectors to prompts that were stored without one.
    pub reembedding: Arc<Progress>,
    /// Answers them.
    pub llm: Arc<llm::Client>,
    /// How calls are bounded and ended.
    pub calls: CallsConfig,
    /// The account of what requests in flight hold.
    pub memory: Arc<MemoryBudget>,
    /// Takes events to open sockets.
    pub broker: Arc<dyn Broker>,
    /// Writes what they are told.
    pub encoders: Encoders,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Tasks that shutdown waits for.
    pub tasks: TaskTracker,
}

struct Inner {
    parts: Parts,
    /// Tells the calls of this process apart.
    next_call: AtomicI64,
    /// The answers that this process is writing.
    live: Mutex<HashMap<PromptId, Arc<Live>>>,
    /// Calls in progress. Shutdown waits for them for a while.
    calls: TaskTracker,
    /// Cancelled when it does no longer.
    cut: CancellationToken,
}

/// The use cases of prompts.
#[derive(Clone)]
pub struct Prompts(Arc<Inner>);

impl Prompts {
    /// Puts the use cases on their parts.
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(Inner {
            parts,
            next_call: AtomicI64::new(0),
            live: Mutex::default(),
            calls: TaskTracker::new(),
            cut: CancellationToken::new(),
        }))
    }

    /// What a post is answered whose idempotency key is known already; `None` if it has none, or is to be served as new.
    ///
    /// # Errors
    /// `IdempotencyKey`, and those of the store.
    pub async fn replay(&self, new: &CreatePrompt) -> Result<Option<Created>, Error> {
        keys::known(&self.0, new).await
    }

    /// Answers, embeds, stores and announces a prompt. A whole answer is durable and searchable when this returns; of a streamed one
    /// the prompt is durable as running, and its answer is when the reader says `Completed`. What costs money is begun only once its
    /// prompt is stored as running.
    ///
    /// `memory` holds the prompt's text, and holds the answer's too while the work goes on.
    ///
    /// The work goes on in a task of its own: a caller that goes away, dropping this future or the reader, loses nothing that was
    /// begun, unless the operator wants such calls broken off.
    ///
    /// # Errors
    /// `Overloaded` at once if too many texts or calls wait; nothing was begun then. `Failed` if
    /// there is no answer: the prompt is kept. `QuotaExceeded` if the user may not keep another;
    /// nothing was asked. `IdempotencyKey` if the request's key is another's. `Deleted` if the
    /// prompt was deleted meanwhile. Otherwise those of the store; where an answer waits for it,
    /// `Unavailable` comes after a while and the answer is stored later.
    pub async fn create(&self, new: CreatePrompt, memory: Reservation) -> Result<Created, Error> {
        self.check_quota(&new).await?;
        let admission = Admission::take(&self.0.parts, new.user_id, memory)?;
        let (reply, answer) = oneshot::channel();
        let inner = Arc::clone(&self.0);
        self.0.calls.spawn(async move {
            // What costs money is not begun while it could not be stored.
            let is_paid = !inner.parts.llm.is_mock();
            if is_paid || new.is_streamed || new.key.is_some() {
                running::run(&inner, admission, new, reply).await;
            } else {
                one_write::run(&inner, admission, new, reply).await;
            }
        });
        // A task that ends without a word has panicked.
        answer.await.map_err(Error::internal)?
    }

    /// Refuses a post for which the user has no room, before it is counted and costs anything. The
    /// store checks again when it stores the prompt, which is exact when posts race.
    async fn check_quota(&self, new: &CreatePrompt) -> Result<(), Error> {
        let parts = &self.0.parts;
        let Some(most) = parts.calls.max_prompts_per_user else {
            return Ok(());
        };
        if parts.store.has_room(new.user_id, most).await? {
            return Ok(());
        }
        // A call that is known by its key has its room already.
        let is_known = match keys::claim(new) {
            Some(key) => {
                let known = parts.call_store.known_key(new.user_id, &key.key_hash);
                known.await?.is_some()
            }
            None => false,
        };
        if is_known {
            Ok(())
        } else {
            Err(Error::QuotaExceeded)
        }
    }

    /// Reads the answer to one of the user's prompts, from the beginning or from a place reached before: as it is written if
    /// this process writes it, else once it is whole.
    ///
    /// # Errors
    /// `NotFound` if there is no such prompt, or it is another user's.
    pub async fn read(
        &self,
        user_id: UserId,
        id: PromptId,
        from: Option<Place>,
        mut memory: Reservation,
    ) -> Result<Reader, Error> {
        let live = self.0.live().get(&id).map(Arc::clone);
        if let Some(live) = live.filter(|live| live.user_id == user_id && !live.is_deleted()) {
            return Ok(live.read(from));
        }
        let prompt = self.get(user_id, id, &mut memory).await?;
        let store = Arc::clone(&self.0.parts.store);
        Ok(Reader::stored(prompt, from, store, memory))
    }

    /// The user's prompt of that id. `memory`, which holds [`READ_BYTES`] or more, holds its texts
    /// from now on.
    ///
    /// # Errors
    /// `NotFound` if there is none, or it is another user's; `Overloaded` if there is no memory for
    /// its texts.
    pub async fn get(
        &self,
        user_id: UserId,
        id: PromptId,
        memory: &mut Reservation,
    ) -> Result<Prompt, Error> {
        let store = &self.0.parts.store;
        let read = store.prompts(Some(user_id), &[id], READ_BYTES).await?;
        let prompt = match (read.whole.into_iter().next(), read.rest.first()) {
            (None, Some((_, bytes))) => {
                memory.try_resize(*bytes)?;
                store.prompt(user_id, id).await?
            }
            (read, _) => read,
        };
        let prompt = prompt.ok_or(Error::NotFound)?;
        memory.try_resize(prompt.text_bytes())?;
        Ok(prompt)
    }

    /// Up to `limit` of the user's prompts older than `before`, newest first. Ends before their
    /// texts are more than `text_bytes` together, but holds one prompt at least.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn list(
        &self,
        user_id: UserId,
        before: Option<PromptId>,
        limit: usize,
        text_bytes: usize,
    ) -> Result<PromptPage, Error> {
        let store = &self.0.parts.store;
        Ok(store
            .list_prompts(user_id, before, limit, text_bytes)
            .await?)
    }

    /// Deletes the user's prompt; no search finds it when this returns.
    ///
    /// # Errors
    /// `NotFound` if there is none, or it is another user's.
    pub async fn delete(&self, user_id: UserId, id: PromptId) -> Result<(), Error> {
        let inner = Arc::clone(&self.0);
        // In a task, so that a caller going away cannot come between the store's commit and the index.
        let task = self.0.parts.tasks.spawn(async move {
            let parts = &inner.parts;
            let deleted = parts.store.delete_prompt(user_id, id).await;
            if let Err(store::Error::Unavailable(_)) = deleted {
                // It may be gone all the same.
                parts.similarity.invalidate(user_id);
            }
            let deleted = deleted?.ok_or(Error::NotFound)?;
            if deleted.embedding_model.as_ref() == Some(&parts.model) {
                parts.similarity.deleted(user_id, id);
            }
            // Those who read its answer along have come to the end. The call goes on to its own, for nobody.
            let live = inner.live().get(&id).map(Arc::clone);
            if let Some(live) = live {
                live.end(End::Deleted);
            }
            Ok(())
        });
        task.await.map_err(Error::internal)?
    }

    /// Waits until no call is in progress, at most until `deadline`; those left then are broken off, and their leases given
    /// up, so that a retry with the same key, anywhere, finds them lapsed. Call it once nobody posts any more.
    pub async fn finish_calls(&self, deadline: Instant) {
        let calls = &self.0.calls;
        calls.close();
        if tokio::time::timeout_at(deadline.into(), calls.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                calls = calls.len(),
                "calls in progress were broken off at the end of the grace"
            );
            self.0.cut.cancel();
            calls.wait().await;
        }
    }
}

impl Inner {
    fn next_holder(&self) -> Holder {
        Holder {
            replica: self.parts.replica,
            call: self.next_call.fetch_add(1, Ordering::Relaxed),
        }
    }

    fn live(&self) -> MutexGuard<'_, HashMap<PromptId, Arc<Live>>> {
        // Nothing panics while it holds this lock, and the map is whole between its operations.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets searches find a completed prompt; one without a vector as soon as it has been given one.
fn make_searchable(parts: &Parts, prompt: &Prompt, embedding: Option<&Embedding>) {
    match embedding {
        Some(embedding) => parts
            .similarity
            .inserted(prompt.user_id, prompt.id, embedding),
        None => parts.reembedding.ask(),
    }
}

fn count_outcome(parts: &Parts, status: PromptStatus) {
    parts
        .metrics
        .prompts
        .with_label_values(&[status.as_str()])
        .inc();
}
