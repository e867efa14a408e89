//! Posting, listing, reading and deleting prompts.

mod call;
pub mod chat;
mod embedding;
mod events;
mod idempotency;
mod leases;
mod settle;
pub mod stream;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use self::call::{Permits, Reply};
use self::chat::{ChatPost, ChatReader};
pub use self::events::{Encode, Event};
use self::stream::{ResponseStream, StreamEnd, StreamOffset, StreamReader};
use crate::config::CallsConfig;
use crate::domain::{
    ApiKey, ApiKeyId, Budget, ChatTexts, ModelId, Prompt, PromptId, PromptSource, PromptStatus,
    Timestamp, UserId,
};
use crate::embed::Embedder;
use crate::error::Error;
use crate::llm::{self, Content, Route};
use crate::memory_budget::{MemoryBudget, Reservation};
use crate::realtime::Broker;
use crate::search::Similarity;
use crate::services::metering::Metering;
use crate::services::reembedding::ReembeddingProgress;
use crate::store::{self, CallStore, ChatStore, Holder, PromptPage, PromptStore};
use crate::telemetry::Metrics;

/// A prompt whose texts have at most this many bytes is read in one step; for a longer one the size
/// is read first. Nearly all prompts are shorter.
pub const READ_BYTES: usize = 64 << 10;

/// A post.
#[derive(Clone, Debug)]
pub struct CreatePrompt {
    /// The user who posts it.
    pub user_id: UserId,
    /// What is posted.
    pub post: Post,
    /// Where it goes.
    pub route: Route,
    /// Whether the outcome is announced to the user's sockets.
    pub announce: bool,
    /// Whether the answer is streamed.
    pub is_streamed: bool,
    /// The request's idempotency key: 1 to 255 characters of visible ASCII.
    pub key: Option<String>,
    /// The key with which it is made, if any.
    pub api_key: Option<KeyInUse>,
    /// When the post was accepted.
    pub now: Timestamp,
}

/// The key with which a post is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyInUse {
    /// Itself.
    pub id: ApiKeyId,
    /// Its budget.
    pub budget: Option<Budget>,
}

impl KeyInUse {
    /// Of that key.
    pub fn of(key: &ApiKey) -> Self {
        Self {
            id: key.id,
            budget: key.budget,
        }
    }
}

/// What is posted, by one of the two front doors.
#[derive(Clone, Debug)]
pub enum Post {
    /// A text: trimmed, not empty, without NUL.
    Prompt(String),
    /// A chat call.
    Chat(Box<ChatPost>),
}

impl Post {
    /// The text that is the prompt, without NUL. A chat call may have none.
    pub fn text(&self) -> &str {
        match self {
            Self::Prompt(text) => text,
            Self::Chat(chat) => &chat.prompt,
        }
    }

    /// The part of the text that is stored.
    fn stored_text(&self) -> &str {
        if self.is_kept() { self.text() } else { "" }
    }

    /// Whether its texts are kept.
    fn is_kept(&self) -> bool {
        match self {
            Self::Prompt(_) => true,
            Self::Chat(chat) => chat.texts.is_some(),
        }
    }

    /// What is kept of a chat call beside its text.
    fn texts(&self) -> Option<&Arc<ChatTexts>> {
        match self {
            Self::Prompt(_) => None,
            Self::Chat(chat) => chat.texts.as_ref(),
        }
    }

    fn source(&self) -> PromptSource {
        match self {
            Self::Prompt(_) => PromptSource::Api,
            Self::Chat(_) => PromptSource::V1,
        }
    }

    /// What the upstream is sent.
    fn content(&self) -> Content<'_> {
        match self {
            Self::Prompt(text) => Content::Prompt(text),
            Self::Chat(chat) => Content::Chat(&chat.request),
        }
    }
}

/// The result of a post.
pub enum Created {
    /// The whole answer.
    Answered {
        /// The completed prompt, which is stored.
        prompt: Arc<Prompt>,
        /// The whole answer to a chat call, as JSON: as the upstream sent it, or as it is stored.
        answer: Option<Bytes>,
        /// How long the upstream took; `None` if it was not asked by this request.
        upstream: Option<Duration>,
        /// Whether it is the stored answer to an earlier request.
        is_replayed: bool,
    },
    /// The streamed answer to a chat call.
    Chunks {
        /// The prompt of the call.
        id: PromptId,
        /// Reads the chunks from the first one on.
        reader: ChatReader,
    },
    /// The streamed answer to a prompt.
    Streaming {
        /// Reads the answer from the beginning.
        reader: StreamReader,
        /// Whether it is the stored answer to an earlier request.
        is_replayed: bool,
    },
}

/// What the use cases of prompts depend on.
pub struct Deps {
    /// Stores prompts.
    pub store: Arc<dyn PromptStore>,
    /// Stores running calls and idempotency keys, beside the prompts.
    pub call_store: Arc<dyn CallStore>,
    /// Reads what is kept of chat calls.
    pub chat_store: Arc<dyn ChatStore>,
    /// 16 random bytes that identify this process among all on the same data.
    pub replica: [u8; 16],
    /// Computes the vectors of prompts.
    pub embedder: Arc<Embedder>,
    /// The model behind the embedder.
    pub model: ModelId,
    /// Finds similar prompts.
    pub similarity: Arc<dyn Similarity>,
    /// Computes the vectors of prompts that were stored without one.
    pub reembedding: Arc<ReembeddingProgress>,
    /// Asks the upstream.
    pub llm: Arc<llm::Client>,
    /// How calls are bounded and ended.
    pub calls: CallsConfig,
    /// Prices and budgets.
    pub metering: Arc<Metering>,
    /// Accounts for the memory of requests in flight.
    pub memory: Arc<MemoryBudget>,
    /// Takes events to open sockets.
    pub broker: Arc<dyn Broker>,
    /// Encodes these events.
    pub encode: Encode,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Tasks that shutdown waits for.
    pub tasks: TaskTracker,
}

struct Inner {
    deps: Deps,
    /// Number of this process's next call.
    next_call: AtomicI64,
    /// The calls of this process: their answers by prompt. Nothing panics while it is locked.
    streams: Mutex<HashMap<PromptId, Arc<ResponseStream>>>,
    /// The tasks of the calls. Shutdown waits for them until its deadline.
    calls: TaskTracker,
    /// Cancelled when shutdown stops waiting for `calls`.
    cut: CancellationToken,
}

/// The use cases of prompts.
#[derive(Clone)]
pub struct Prompts(Arc<Inner>);

impl Prompts {
    /// Makes the use cases.
    pub fn new(deps: Deps) -> Self {
        Self(Arc::new(Inner {
            deps,
            next_call: AtomicI64::new(0),
            streams: Mutex::default(),
            calls: TaskTracker::new(),
            cut: CancellationToken::new(),
        }))
    }

    /// Where the calls of a model go; `None` names the default model.
    ///
    /// # Errors
    /// `ModelNotFound` if no upstream serves it.
    pub fn route_of(&self, model: Option<&str>) -> Result<Route, Error> {
        self.0.deps.llm.route(model).ok_or(Error::ModelNotFound)
    }

    /// Answers, embeds, stores and announces a prompt. The upstream is asked only once the prompt
    /// is committed as running. A whole answer is durable and searchable when this returns; a
    /// streamed one when its reader returns `Completed`.
    ///
    /// `memory` accounts for the prompt's text, and later for the answer's.
    ///
    /// The work goes on in a separate task. A caller that leaves, and so drops this future or the
    /// reader, loses nothing, unless such calls are cancelled by setting.
    ///
    /// # Errors
    /// `Overloaded` at once if too many texts or calls wait; nothing was begun then. `Failed` if
    /// there is no answer: the prompt is kept. `QuotaExceeded` if the user may not keep another;
    /// nothing was asked. `IdempotencyKey` if the key belongs to another request. `Deleted` if the
    /// prompt was deleted meanwhile. Otherwise those of the store; where an answer waits for it,
    /// `Unavailable` comes after a while and the answer is stored later.
    pub async fn create(&self, new: CreatePrompt, memory: Reservation) -> Result<Created, Error> {
        self.check_quota(&new).await?;
        let permits = Permits::take(&self.0.deps, &new, memory)?;
        let (reply, result) = oneshot::channel();
        let inner = Arc::clone(&self.0);
        // At the level of errors, as the span of the request, so that no filter separates a line
        // from its ids.
        let span = tracing::error_span!("call", prompt_id = tracing::field::Empty);
        self.0.calls.spawn(
            async move { call::run(&inner, permits, new, Reply::new(reply)).await }
                .instrument(span),
        );
        // A task that ends without a reply has panicked.
        result.await.map_err(Error::internal)?
    }

    /// Refuses a post for which the user has no room, before it takes a permit, a vector and a turn
    /// of the store's writer from others. The store checks again when it stores the prompt, and
    /// exactly so when posts race.
    async fn check_quota(&self, new: &CreatePrompt) -> Result<(), Error> {
        let deps = &self.0.deps;
        let Some(most) = deps.calls.max_prompts_per_user else {
            return Ok(());
        };
        if deps.store.has_room(new.user_id, most).await? {
            return Ok(());
        }
        // A post that repeats a known key adds no prompt.
        if let Some(claim) = idempotency::claim(new) {
            let state = deps.call_store.key_state(new.user_id, &claim).await?;
            if state.is_some() {
                return Ok(());
            }
        }
        Err(Error::QuotaExceeded)
    }

    /// Reads the answer to one of the user's prompts, from `from` or from the beginning: as it
    /// arrives if this process runs the call, else once it is whole.
    ///
    /// # Errors
    /// `NotFound` if there is no such prompt, or it is another user's.
    pub async fn read(
        &self,
        user_id: UserId,
        id: PromptId,
        from: Option<StreamOffset>,
        mut memory: Reservation,
    ) -> Result<StreamReader, Error> {
        let stream = self.0.streams.lock().get(&id).map(Arc::clone);
        let is_readable =
            |stream: &Arc<ResponseStream>| stream.user_id == user_id && !stream.is_deleted();
        if let Some(stream) = stream.filter(is_readable) {
            return Ok(stream.read(from));
        }
        let prompt = self.get(user_id, id, &mut memory).await?;
        let store = Arc::clone(&self.0.deps.store);
        Ok(StreamReader::stored(prompt, from, store, memory))
    }

    /// The user's prompt of that id. `memory` has at least [`READ_BYTES`]; from now on it accounts
    /// for the prompt's texts.
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
        let store = &self.0.deps.store;
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

    /// Up to `limit` of the user's prompts older than `before`, newest first. Stops before their
    /// texts exceed `text_bytes` together, but returns at least one prompt.
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
        let store = &self.0.deps.store;
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
        // In a task, so that a caller that leaves cannot come between the commit and the index.
        let task = self.0.deps.tasks.spawn(async move {
            let deps = &inner.deps;
            let deleted = deps.store.delete_prompt(user_id, id).await;
            if let Err(store::Error::Unavailable(_)) = deleted {
                // It may be deleted although the result did not arrive.
                deps.similarity.invalidate(user_id);
            }
            let deleted = deleted?.ok_or(Error::NotFound)?;
            if deleted.embedding_model.as_ref() == Some(&deps.model) {
                deps.similarity.deleted(user_id, id);
            }
            // Ends its readers. The call goes on, and its outcome is dropped.
            let stream = inner.streams.lock().get(&id).map(Arc::clone);
            if let Some(stream) = stream {
                stream.end(StreamEnd::Deleted(id));
            }
            Ok(())
        });
        task.await.map_err(Error::internal)?
    }

    /// Waits until no call runs, at most until `deadline`. Calls that still run then are stopped,
    /// and their leases released, so that a retry with the same key takes them over, on any
    /// replica. Call it once no more posts can arrive.
    pub async fn finish_calls(&self, deadline: Instant) {
        let calls = &self.0.calls;
        calls.close();
        if tokio::time::timeout_at(deadline.into(), calls.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                calls = calls.len(),
                "calls in progress were stopped at the end of SHUTDOWN_GRACE"
            );
            self.0.cut.cancel();
            calls.wait().await;
        }
    }
}

impl Inner {
    fn next_holder(&self) -> Holder {
        Holder {
            replica: self.deps.replica,
            call: self.next_call.fetch_add(1, Ordering::Relaxed),
        }
    }
}

fn count_outcome(deps: &Deps, status: PromptStatus) {
    deps.metrics
        .prompts
        .with_label_values(&[status.as_str()])
        .inc();
}
