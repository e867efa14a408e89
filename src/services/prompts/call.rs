//! One post, in four phases: admit, begin, ask, settle.
//!
//! 1. [`Permits::take`] admits the post, or refuses it at once.
//! 2. [`begin`] commits the prompt as `running`, under a lease, and counts the call.
//! 3. [`Call::ask`] asks the upstream, and ends in an [`Outcome`].
//! 4. [`Call::settle`] commits the outcome and reports it to everybody.
//!
//! Nothing is asked, and so nothing is paid for, before the prompt is committed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::sync::oneshot;

use super::chat::{ChunkSender, chunk_queue};
use super::embedding::{PendingEmbedding, embed};
use super::events::{self, Event};
use super::stream::ResponseStream;
use super::{CreatePrompt, Created, Deps, Inner, Post, idempotency};
use crate::config::OnClientDisconnect;
use crate::domain::{Embedding, FailureCode, Prompt, PromptId, Timestamp};
use crate::embed::{Class, Permit};
use crate::error::Error;
use crate::llm::{self, AnswerSink, AttemptLog, Busy, CallPermit, Question};
use crate::memory_budget::{Owner, Reservation};
use crate::store::{self, Begun, DailyLimit, Holder, NewCall};

/// How long a caller waits for its outcome to be stored. After that it gets an error, and the
/// storing goes on without it.
const CALLER_PATIENCE: Duration = Duration::from_secs(30);

/// Where the caller of a post waits for its result.
pub(super) struct Reply {
    sender: Option<oneshot::Sender<Result<Created, Error>>>,
    /// The chunks that the caller of a streamed chat call reads, once it does.
    chunks: Option<ChunkSender>,
}

impl Reply {
    pub fn new(sender: oneshot::Sender<Result<Created, Error>>) -> Self {
        Self {
            sender: Some(sender),
            chunks: None,
        }
    }

    /// Sends the result, unless one was sent before. A caller that left misses it; what was stored
    /// stays. A caller that reads chunks gets only whether the call has succeeded.
    fn send(&mut self, result: Result<Created, Error>) {
        if let Some(sender) = self.sender.take() {
            let _ = sender.send(result);
        } else if let Some(chunks) = &self.chunks {
            chunks.end(result.and_then(|created| match created {
                // The chunks were those of another answer than the stored one.
                Created::Answered {
                    is_replayed: true, ..
                } => Err(Error::unavailable("another process has answered the call")),
                Created::Answered { .. } | Created::Chunks { .. } | Created::Streaming { .. } => {
                    Ok(())
                }
            }));
        }
    }

    /// Lets the caller read chunks from now on.
    fn stream_chunks(&mut self, id: PromptId, memory: Reservation) {
        let (chunks, reader) = chunk_queue(memory);
        self.send(Ok(Created::Chunks { id, reader }));
        self.chunks = Some(chunks);
    }

    /// Waits until the caller leaves. Never returns once the whole reply was sent. Cancel safe.
    async fn abandoned(&mut self) {
        match (&mut self.sender, &self.chunks) {
            (Some(sender), _) => sender.closed().await,
            (None, Some(chunks)) => chunks.abandoned().await,
            (None, None) => std::future::pending().await,
        }
    }
}

impl Drop for Reply {
    /// The caller must not wait for a call whose task has panicked.
    fn drop(&mut self) {
        if self.chunks.is_some() {
            self.send(Err(Error::internal("a call ended without a result")));
        }
    }
}

/// What a post needs before anything is begun for it.
pub(super) struct Permits {
    call: CallPermit,
    /// `None` if the prompt gets no vector.
    text: Option<Permit>,
    memory: Reservation,
}

impl Permits {
    /// Takes a permit for the call and one for the text at once, or none. `memory` holds the
    /// post's body or text.
    ///
    /// # Errors
    /// `Overloaded`.
    pub fn take(deps: &Deps, new: &CreatePrompt, memory: Reservation) -> Result<Self, Error> {
        let admit = || deps.embedder.admit(new.user_id, Class::Post);
        let text = new.post.is_kept().then(admit).transpose()?;
        let call = deps.llm.admit(new.user_id);
        let call = call.map_err(|Busy| Error::overloaded())?;
        Ok(Self { call, text, memory })
    }
}

/// How a call ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The upstream answered. Without a vector if the prompt is not kept, or if the model failed
    /// while the upstream was being asked: an answer that was paid for is kept all the same.
    Answered(llm::Completion, Option<Embedding>),
    /// The upstream failed, or may not be asked today.
    Failed(llm::Failure),
    /// A defect of the service.
    Broken(Error),
    /// The caller left, and such calls are cancelled by setting.
    Cancelled,
    /// The service stops. Nothing is stored: the lease is released, so that a retry takes over.
    Stopped,
}

/// Runs an admitted post to its end. A streamed one is answered as soon as its prompt is stored.
pub(super) async fn run(inner: &Arc<Inner>, permits: Permits, new: CreatePrompt, mut reply: Reply) {
    let started = Instant::now();
    let deps = &inner.deps;
    let Permits {
        call: permit,
        text,
        memory,
    } = permits;
    let mut embedding = PendingEmbedding::new(embed(deps, text, new.post.text()));
    let holder = inner.next_holder();
    let begun = match embedding.during(begin(deps, &new, holder)).await {
        Ok(begun) => begun,
        Err(error) => {
            count_refusal(deps, &error);
            return reply.send(Err(error.into()));
        }
    };
    let (prompt, over_limit) = match begun {
        Begun::Started(prompt) => (prompt, None),
        Begun::OverLimit(prompt) => (prompt, Some(over_limit(new.now))),
        Begun::Known(state) => {
            return reply.send(idempotency::respond(inner, &new, state).await);
        }
    };
    tracing::Span::current().record("prompt_id", prompt.id.0);
    let call = Call::enter(inner, &new, prompt, holder, memory);
    let outcome = match over_limit {
        Some(failure) => {
            // Nothing is asked or embedded, so other posts may have the permits.
            drop((embedding, permit));
            Outcome::Failed(failure)
        }
        None => {
            match &new.post {
                Post::Chat(_) if new.is_streamed => {
                    let memory = deps.memory.hold(Owner::user(new.user_id), 0);
                    reply.stream_chunks(call.prompt.id, memory);
                }
                Post::Prompt(_) if new.is_streamed => {
                    reply.send(Ok(Created::Streaming {
                        reader: call.stream.read(None),
                        is_replayed: false,
                    }));
                }
                Post::Chat(_) | Post::Prompt(_) => {}
            }
            call.ask(permit, embedding, &mut reply).await
        }
    };
    let result = reply_within(CALLER_PATIENCE, &mut reply, call.settle(outcome)).await;
    if let Ok(Created::Answered {
        upstream: Some(upstream),
        ..
    }) = &result
        && new.is_streamed
    {
        let added = started.elapsed().saturating_sub(*upstream);
        let overhead = &deps.metrics.prompt_overhead;
        overhead
            .with_label_values(&["stream"])
            .observe(added.as_secs_f64());
    }
    reply.send(result);
}

/// Waits until the call is settled. A caller that still waits after `patience` gets an error.
async fn reply_within(
    patience: Duration,
    reply: &mut Reply,
    settling: impl Future<Output = Result<Created, Error>>,
) -> Result<Created, Error> {
    let mut settling = std::pin::pin!(settling);
    if let Ok(result) = tokio::time::timeout(patience, &mut settling).await {
        return result;
    }
    reply.send(Err(Error::unavailable("the outcome waits to be stored")));
    settling.await
}

/// Counts a call that a budget refuses.
fn count_refusal(deps: &Deps, error: &store::Error) {
    let reason = match error {
        store::Error::BudgetExceeded => "exceeded",
        store::Error::PriceUnknown => "price_unknown",
        store::Error::UsernameTaken
        | store::Error::QuotaExceeded
        | store::Error::TooManyApiKeys
        | store::Error::Unavailable(_)
        | store::Error::Internal(_) => return,
    };
    let refusals = &deps.metrics.budget_refusals;
    refusals.with_label_values(&[reason]).inc();
}

/// Stores the prompt as running and counts the call on the day on which it came.
///
/// # Errors
/// Those of the store: nothing was begun or counted.
async fn begin(deps: &Deps, new: &CreatePrompt, holder: Holder) -> Result<Begun, store::Error> {
    let key_budget = new.api_key.and_then(|key| key.budget);
    let budgets = deps
        .metering
        .budgets(&new.route, new.post.content(), key_budget);
    let call = NewCall {
        user_id: new.user_id,
        source: new.post.source(),
        prompt: new.post.stored_text().to_owned(),
        chat: new.post.texts().cloned(),
        is_kept: new.post.is_kept(),
        model: new.route.model().to_owned(),
        created_at: new.now,
        announce: new.announce,
        key: idempotency::claim(new),
        holder,
        lease: deps.calls.lease,
        max_prompts: deps.calls.max_prompts_per_user,
        api_key_id: new.api_key.map(|key| key.id),
        budgets,
        daily: deps.calls.daily_limit.map(|calls| DailyLimit {
            day: new.now.unix_day(),
            calls,
        }),
    };
    deps.call_store.begin_call(call).await
}

/// How a call ends that came at `now`, on a day without a call left.
fn over_limit(now: Timestamp) -> llm::Failure {
    llm::Failure {
        code: FailureCode::UpstreamUnavailable,
        detail: "The daily limit of calls is reached.",
        retry_after: Some(Timestamp::from_unix_day(now.unix_day() + 1).since(now)),
        upstream_error: None,
        attempts: Vec::new(),
    }
}

/// Where an answer goes while it arrives.
struct Sink<'a> {
    stream: &'a ResponseStream,
    chunks: Option<&'a ChunkSender>,
}

impl AnswerSink for Sink<'_> {
    fn text(&mut self, piece: &str) {
        self.stream.push(piece);
    }

    fn chunk(&mut self, json: &[u8]) {
        if let Some(chunks) = self.chunks {
            chunks.push(json);
        }
    }
}

/// A call of this process. While it lives its lease is renewed.
pub(super) struct Call<'a> {
    pub inner: &'a Arc<Inner>,
    pub new: &'a CreatePrompt,
    pub prompt: Prompt,
    pub holder: Holder,
    pub stream: Arc<ResponseStream>,
    /// Those of this call that may have cost something.
    pub attempts: AttemptLog,
    is_deletion_published: AtomicBool,
}

impl<'a> Call<'a> {
    fn enter(
        inner: &'a Arc<Inner>,
        new: &'a CreatePrompt,
        prompt: Prompt,
        holder: Holder,
        memory: Reservation,
    ) -> Self {
        let stream = ResponseStream::new(prompt.user_id, prompt.id, memory);
        inner.streams.lock().insert(prompt.id, Arc::clone(&stream));
        inner.deps.metrics.calls_running.inc();
        Self {
            inner,
            new,
            prompt,
            holder,
            stream,
            attempts: AttemptLog::default(),
            is_deletion_published: AtomicBool::new(false),
        }
    }

    /// Asks the upstream, and passes a streamed answer on to the user's sockets.
    async fn ask(
        &self,
        permit: CallPermit,
        embedding: PendingEmbedding<'_>,
        reply: &mut Reply,
    ) -> Outcome {
        let (end, ended) = oneshot::channel::<()>();
        let asking = async {
            let outcome = self.ask_upstream(permit, embedding, reply).await;
            drop(end);
            outcome
        };
        let publishing = async {
            if self.new.is_streamed && self.new.announce {
                // The sender is dropped and sends nothing.
                events::publish_deltas(&self.inner.deps, &self.stream, ended.map(drop)).await;
                if self.stream.is_deleted() {
                    self.publish_deletion();
                }
            }
        };
        tokio::join!(asking, publishing).0
    }

    /// Asks the upstream while the vector is computed.
    async fn ask_upstream(
        &self,
        permit: CallPermit,
        embedding: PendingEmbedding<'_>,
        reply: &mut Reply,
    ) -> Outcome {
        let (deps, new) = (&self.inner.deps, self.new);
        let mut embedding = match embedding.unless_failed() {
            Ok(embedding) => embedding,
            Err(error) => return Outcome::Broken(error),
        };
        let chunks = reply.chunks.clone();
        let chunks = chunks.as_ref();
        let abandoned = async {
            match deps.calls.on_client_disconnect {
                OnClientDisconnect::Finish => std::future::pending().await,
                OnClientDisconnect::Cancel if chunks.is_none() && new.is_streamed => {
                    self.stream.abandoned().await;
                }
                OnClientDisconnect::Cancel => reply.abandoned().await,
            }
        };
        let mut sink = Sink {
            stream: &self.stream,
            chunks,
        };
        let sink = new.is_streamed.then_some(&mut sink as &mut dyn AnswerSink);
        let memory = deps.memory.hold(Owner::user(new.user_id), 0);
        let question = Question {
            route: &new.route,
            content: new.post.content(),
            attempts: self.attempts.clone(),
        };
        let asking = embedding.during(deps.llm.complete(permit, memory, question, sink));
        let completion = tokio::select! {
            biased;
            completion = asking => match completion {
                Ok(completion) => completion,
                Err(failure) => return Outcome::Failed(failure),
            },
            () = abandoned => return Outcome::Cancelled,
            () = self.inner.cut.cancelled() => return Outcome::Stopped,
        };
        // From here on the answer is paid for, and nothing may lose it.
        let answer_bytes = completion.answer.as_ref().map_or(0, Bytes::len);
        self.stream.hold(match new.is_streamed {
            true => answer_bytes,
            false => answer_bytes + completion.text.len(),
        });
        let embedding = tokio::select! {
            biased;
            embedding = embedding.finish() => embedding,
            () = self.inner.cut.cancelled() => Err(Error::unavailable("the service is stopping")),
        };
        let embedding = embedding.inspect_err(|error| {
            let source = std::error::Error::source(error).map(ToString::to_string);
            tracing::error!(%error, source, "an answered prompt has no vector yet");
        });
        Outcome::Answered(completion, embedding.ok().flatten())
    }

    /// Publishes, once, that the prompt was deleted, if its outcome is announced.
    pub(super) fn publish_deletion(&self) {
        if self.new.announce && !self.is_deletion_published.swap(true, Ordering::Relaxed) {
            let deps = &self.inner.deps;
            events::publish(deps, self.prompt.user_id, &Event::Deleted(self.prompt.id));
        }
    }

    /// Stops the renewal of the lease, and the reading of the answer from this process.
    pub(super) fn leave(&self) {
        let mut streams = self.inner.streams.lock();
        // A later call of this process may have taken the prompt over.
        if streams
            .get(&self.prompt.id)
            .is_some_and(|stream| Arc::ptr_eq(stream, &self.stream))
        {
            streams.remove(&self.prompt.id);
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.inner.deps.metrics.calls_running.dec();
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::domain::{CallDetails, PromptSource, PromptStatus, UserId};
    use crate::memory_budget::MemoryBudget;
    use crate::services::prompts::chat::ChatEvent;

    fn answered() -> Result<Created, Error> {
        let prompt = Prompt {
            id: PromptId(7),
            user_id: UserId(1),
            source: PromptSource::Api,
            prompt: "Why?".to_owned(),
            response: Some("Because.".to_owned()),
            model: "mock".to_owned(),
            status: PromptStatus::Completed,
            error: None,
            created_at: Timestamp(0),
            call: CallDetails::default(),
        };
        Ok(Created::Answered {
            prompt: prompt.into(),
            answer: None,
            upstream: None,
            is_replayed: false,
        })
    }

    #[tokio::test]
    async fn a_caller_gets_an_error_after_its_patience_while_the_storing_goes_on() {
        let (sender, received) = oneshot::channel();
        let mut reply = Reply::new(sender);
        let settling = async {
            // Goes on only once the caller has its error.
            let received = received.await.unwrap();
            assert!(matches!(received, Err(Error::Unavailable(_))));
            answered()
        };
        let result = reply_within(Duration::from_millis(1), &mut reply, settling).await;
        assert!(result.is_ok());
        assert!(reply.sender.is_none());
    }

    #[tokio::test]
    async fn chunks_of_an_answer_that_is_not_the_stored_one_do_not_end_well() {
        for (replayed, ends_well) in [(false, true), (true, false)] {
            let (sender, received) = oneshot::channel();
            let mut reply = Reply::new(sender);
            let memory = MemoryBudget::new(1 << 20).hold(Owner::default(), 0);
            reply.stream_chunks(PromptId(7), memory);
            let mut result = answered();
            if let Ok(Created::Answered { is_replayed, .. }) = &mut result {
                *is_replayed = replayed;
            }
            reply.send(result);
            let Ok(Ok(Created::Chunks { mut reader, .. })) = received.await else {
                panic!("the reader was not sent");
            };
            let Some(ChatEvent::Ended(end)) = reader.next().await else {
                panic!("there is no end");
            };
            assert_eq!(end.is_ok(), ends_well);
        }
    }

    #[tokio::test]
    async fn a_call_that_panics_while_its_chunks_are_read_ends_their_stream() {
        let (sender, received) = oneshot::channel();
        let mut reply = Reply::new(sender);
        let memory = MemoryBudget::new(1 << 20).hold(Owner::default(), 0);
        let task = TaskTracker::new().spawn(async move {
            reply.stream_chunks(PromptId(7), memory);
            let chunks = reply.chunks.clone();
            chunks.unwrap().push(b"{}");
            std::panic::resume_unwind(Box::new("a defect"));
        });
        assert!(task.await.unwrap_err().is_panic());
        let Ok(Ok(Created::Chunks { mut reader, .. })) = received.await else {
            panic!("the reader was not sent");
        };
        assert!(matches!(reader.next().await, Some(ChatEvent::Chunk(_))));
        let end = reader.next().await;
        assert!(matches!(
            end,
            Some(ChatEvent::Ended(Err(Error::Internal(_))))
        ));
        assert!(reader.next().await.is_none());
    }

    #[tokio::test]
    async fn a_caller_whose_outcome_is_stored_in_time_gets_it() {
        let (sender, _received) = oneshot::channel();
        let mut reply = Reply::new(sender);
        let result = reply_within(CALLER_PATIENCE, &mut reply, async { answered() }).await;
        assert!(result.is_ok());
        assert!(reply.sender.is_some());
    }
}
