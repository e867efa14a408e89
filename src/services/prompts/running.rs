//! A post that is known before its answer: a running row under a lease, and an answer that others can read along.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::live::Live;
use super::work::{Admission, Answer, Cut, EmbeddingInFlight, Ended, count, embed};
use super::{CreatePrompt, Created, Inner, announcements, keys};
use crate::config::OnClientDisconnect;
use crate::domain::Prompt;
use crate::error::{Error, KeyProblem};
use crate::llm::CallPermit;
use crate::memory_budget::{Owner, Reservation};
use crate::store::{Begun, Holder, NewCall};

/// How long a caller waits for an outcome to be stored before it is told that the store is away. The storing goes on without it.
const PATIENCE: Duration = Duration::from_secs(30);

type Reply = oneshot::Sender<Result<Created, Error>>;

/// Serves the post and answers it: a streamed one as soon as its prompt is stored.
pub(super) async fn run(inner: &Arc<Inner>, admission: Admission, new: CreatePrompt, reply: Reply) {
    let since = Instant::now();
    let Admission {
        call: permit,
        text,
        memory,
    } = admission;
    let mut embedding = EmbeddingInFlight::new(embed(&inner.parts, text, &new.prompt));
    // Counted first: a call that was counted and not begun spends nothing, one that was begun and not counted might.
    let refusal = match embedding.beside(count(&inner.parts, new.now)).await {
        Ok(refusal) => refusal,
        Err(error) => return send(reply, Err(error)),
    };
    let call = match embedding.beside(begin(inner, &new, memory)).await {
        Ok(Ok(call)) => call,
        Ok(Err(known)) => return send(reply, Ok(known)),
        Err(error) => return send(reply, Err(error)),
    };
    let mut reply = Some(reply);
    let answer = match refusal {
        Some(refusal) => {
            // Nothing is asked or embedded: others may have the places.
            drop((embedding, permit));
            Err(Ended::Failed(refusal))
        }
        None => {
            if new.is_streamed
                && let Some(reply) = reply.take()
            {
                let reader = call.live.read(None);
                send(
                    reply,
                    Ok(Created::Streaming {
                        reader,
                        is_replayed: false,
                    }),
                );
            }
            call.answer(permit, embedding, &new, reply.as_mut()).await
        }
    };
    let outcome = within(PATIENCE, &mut reply, call.conclude(&new, answer)).await;
    if let Ok(Created::Answered {
        upstream: Some(took),
        ..
    }) = &outcome
        && new.is_streamed
    {
        let added = since.elapsed().saturating_sub(*took);
        inner
            .parts
            .metrics
            .prompt_overhead
            .with_label_values(&["stream"])
            .observe(added.as_secs_f64());
    }
    if let Some(reply) = reply {
        send(reply, outcome);
    }
}

fn send(reply: Reply, answer: Result<Created, Error>) {
    // Without a receiver the caller is gone, and what was stored stays.
    let _ = reply.send(answer);
}

/// Waits for the outcome to be stored; a caller that still waits for it after `patience` is answered without it.
async fn within(
    patience: Duration,
    reply: &mut Option<Reply>,
    concluding: impl Future<Output = Result<Created, Error>>,
) -> Result<Created, Error> {
    let mut concluding = pin!(concluding);
    tokio::select! {
        biased;
        outcome = &mut concluding => return outcome,
        () = tokio::time::sleep(patience) => {}
    }
    if let Some(reply) = reply.take() {
        let waits = "the outcome waits to be stored";
        send(reply, Err(Error::unavailable(waits)));
    }
    concluding.await
}

/// Stores the prompt as running, or finds what its key is known for.
async fn begin(
    inner: &Arc<Inner>,
    new: &CreatePrompt,
    memory: Reservation,
) -> Result<Result<RunningCall, Created>, Error> {
    let parts = &inner.parts;
    let (holder, key) = (inner.next_holder(), keys::claim(new));
    let begun = parts
        .call_store
        .begin_call(NewCall {
            user_id: new.user_id,
            prompt: new.prompt.clone(),
            model: parts.llm.model().to_owned(),
            created_at: new.now,
            announce: new.announce,
            key,
            holder,
            lease: parts.calls.lease,
            max_prompts: parts.calls.max_prompts_per_user,
        })
        .await?;
    match (begun, key) {
        (Begun::Started(prompt), _) => Ok(Ok(RunningCall::enter(inner, prompt, holder, memory))),
        (Begun::Known(known), Some(claim)) => {
            let answer = keys::answer(parts, new.is_streamed, &claim, known)?;
            // One that has lapsed was taken over, unless it lapsed in this very moment.
            answer
                .map(Err)
                .ok_or(Error::IdempotencyKey(KeyProblem::InFlight))
        }
        (Begun::Known(_), None) => Err(Error::internal("a key is known that nobody gave")),
    }
}

/// A running prompt that this process answers. While it lives its lease is renewed.
pub(super) struct RunningCall {
    pub(super) inner: Arc<Inner>,
    pub(super) prompt: Prompt,
    pub(super) holder: Holder,
    pub(super) live: Arc<Live>,
    is_deletion_told: AtomicBool,
}

impl RunningCall {
    fn enter(inner: &Arc<Inner>, prompt: Prompt, holder: Holder, memory: Reservation) -> Self {
        let live = Live::new(prompt.user_id, prompt.id, memory);
        inner.live().insert(prompt.id, Arc::clone(&live));
        inner.parts.metrics.calls_running.inc();
        Self {
            inner: Arc::clone(inner),
            prompt,
            holder,
            live,
            is_deletion_told: AtomicBool::new(false),
        }
    }

    async fn answer(
        &self,
        permit: CallPermit,
        embedding: EmbeddingInFlight<'_>,
        new: &CreatePrompt,
        reply: Option<&mut Reply>,
    ) -> Result<Answer, Ended> {
        let (written, is_written) = oneshot::channel::<()>();
        let working = async {
            let answer = self.ask(permit, embedding, new, reply).await;
            drop(written);
            answer
        };
        let telling = async {
            if new.is_streamed && new.announce {
                let written = async {
                    // Dropped, never sent.
                    let _ = is_written.await;
                };
                announcements::deltas(&self.inner.parts, &self.live, written).await;
                if self.live.is_deleted() {
                    self.tell_deletion(new);
                }
            }
        };
        let (outcome, ()) = tokio::join!(working, telling);
        outcome
    }

    /// Asks the upstream while the vector is being made.
    async fn ask(
        &self,
        permit: CallPermit,
        embedding: EmbeddingInFlight<'_>,
        new: &CreatePrompt,
        reply: Option<&mut Reply>,
    ) -> Result<Answer, Ended> {
        let parts = &self.inner.parts;
        let deserted = async {
            match (parts.calls.on_client_disconnect, reply) {
                (OnClientDisconnect::Finish, _) => std::future::pending().await,
                (OnClientDisconnect::Cancel, Some(reply)) => reply.closed().await,
                (OnClientDisconnect::Cancel, None) => self.live.deserted().await,
            }
        };
        let mut push = |piece: &str| self.live.push(piece);
        let on_delta = new
            .is_streamed
            .then_some(&mut push as &mut (dyn FnMut(&str) + Send));
        let mut embedding = embedding.unless_broken().map_err(Ended::Broken)?;
        let memory = parts.memory.hold(Owner::user(new.user_id), 0);
        let asking = embedding.beside(parts.llm.complete(permit, memory, &new.prompt, on_delta));
        let completion = tokio::select! {
            biased;
            answered = asking => answered.map_err(Ended::Failed)?,
            () = deserted => return Err(Ended::Cut(Cut::Deserted)),
            () = self.inner.cut.cancelled() => return Err(Ended::Cut(Cut::Stopping)),
        };
        // From here on it is paid for, and nothing may take it away.
        if !new.is_streamed {
            self.live.hold(completion.text.len());
        }
        let made = tokio::select! {
            biased;
            made = embedding.made() => made,
            () = self.inner.cut.cancelled() => Err(Error::unavailable("the service is stopping")),
        };
        let embedding = made.inspect_err(|error| {
            let source = std::error::Error::source(error).map(ToString::to_string);
            tracing::error!(%error, source, "an answered prompt has no vector yet");
        });
        Ok(Answer {
            completion,
            embedding: embedding.ok(),
        })
    }

    /// Tells the user's sockets, once, that the prompt was deleted, if they wait for its outcome.
    pub(super) fn tell_deletion(&self, new: &CreatePrompt) {
        if new.announce && !self.is_deletion_told.swap(true, Ordering::Relaxed) {
            announcements::deleted(&self.inner.parts, self.prompt.user_id, self.prompt.id);
        }
    }

    /// From now on the call is not in this process's hands.
    pub(super) fn leave(&self) {
        let mut live = self.inner.live();
        // A later call of this process may have taken the prompt over.
        if live
            .get(&self.prompt.id)
            .is_some_and(|other| Arc::ptr_eq(other, &self.live))
        {
            live.remove(&self.prompt.id);
        }
    }
}

impl Drop for RunningCall {
    fn drop(&mut self) {
        self.inner.parts.metrics.calls_running.dec();
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{CallDetails, PromptId, PromptStatus, Timestamp, UserId};

    fn answered() -> Result<Created, Error> {
        let prompt = Prompt {
            id: PromptId(7),
            user_id: UserId(1),
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
            upstream: None,
            is_replayed: false,
        })
    }

    #[tokio::test]
    async fn a_caller_waits_for_the_storing_no_longer_than_its_patience_and_the_storing_goes_on() {
        let (sender, told) = oneshot::channel();
        let mut reply = Some(sender);
        let concluding = async {
            // Goes on only once the caller was told.
            let told = told.await.unwrap();
            assert!(matches!(told, Err(Error::Unavailable(_))), "{told:?}");
            answered()
        };
        let outcome = within(Duration::from_millis(1), &mut reply, concluding).await;
        assert!(outcome.is_ok());
        assert!(reply.is_none());
    }

    #[tokio::test]
    async fn a_caller_whose_outcome_is_stored_in_time_gets_it() {
        let (sender, _told) = oneshot::channel();
        let mut reply = Some(sender);
        let outcome = within(PATIENCE, &mut reply, async { answered() }).await;
        assert!(outcome.is_ok());
        assert!(reply.is_some());
    }
}
