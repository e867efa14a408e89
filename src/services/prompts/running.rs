//! A post that is known before its answer: a running row under a lease, and an answer that others can read along.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::live::{End, Live};
use super::unrecorded::millis;
use super::work::{Admission, Answer, Cut, Ended, count, work};
use super::{CreatePrompt, Created, Inner, announcements, keys};
use crate::config::OnClientDisconnect;
use crate::domain::{Embedding, Prompt, PromptStatus};
use crate::error::{Error, FailedPrompt, KeyProblem};
use crate::store::{self, Begun, CallOutcome, Holder, NewCall};

/// How long an outcome is kept trying to be stored while the store is away: what was paid for is worth a wait.
const STORING: Duration = Duration::from_secs(30);
/// How long to step back between two attempts.
const STEP_BACK: Duration = Duration::from_millis(250);

type Reply = oneshot::Sender<Result<Created, Error>>;

/// Serves the post and answers it: a streamed one as soon as its prompt is stored.
pub(super) async fn run(inner: &Arc<Inner>, admission: Admission, new: CreatePrompt, reply: Reply) {
    let since = Instant::now();
    let call = match begin(inner, &new).await {
        Ok(Ok(call)) => call,
        Ok(Err(known)) => return send(reply, Ok(known)),
        Err(error) => return send(reply, Err(error)),
    };
    if let Err(ended) = count(&inner.parts, new.now).await {
        let outcome = call.fail(&new, ended).await;
        return send(reply, outcome);
    }
    let mut reply = Some(reply);
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
    let outcome = match call.answer(admission, &new, reply.as_mut()).await {
        Ok(answer) => call.complete(&new, answer).await,
        Err(ended) => call.fail(&new, ended).await,
    };
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

/// Stores the prompt as running, or finds what its key is known for.
async fn begin(
    inner: &Arc<Inner>,
    new: &CreatePrompt,
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
        })
        .await?;
    match (begun, key) {
        (Begun::Started(prompt), _) => Ok(Ok(RunningCall::enter(inner, prompt, holder))),
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
struct RunningCall {
    inner: Arc<Inner>,
    prompt: Prompt,
    holder: Holder,
    live: Arc<Live>,
}

impl RunningCall {
    fn enter(inner: &Arc<Inner>, prompt: Prompt, holder: Holder) -> Self {
        let live = Live::new(prompt.user_id, prompt.id);
        inner.live().insert(prompt.id, Arc::clone(&live));
        inner.parts.metrics.calls_running.inc();
        Self {
            inner: Arc::clone(inner),
            prompt,
            holder,
            live,
        }
    }

    async fn answer(
        &self,
        admission: Admission,
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
        let (written, is_written) = oneshot::channel::<()>();
        let working = async {
            let mut push = |piece: &str| self.live.push(piece);
            let on_delta = new
                .is_streamed
                .then_some(&mut push as &mut (dyn FnMut(&str) + Send));
            let outcome = tokio::select! {
                biased;
                outcome = work(parts, admission, &new.prompt, on_delta) => outcome,
                () = deserted => Err(Ended::Cut(Cut::Deserted)),
                () = self.inner.cut.cancelled() => Err(Ended::Cut(Cut::Stopping)),
            };
            drop(written);
            outcome
        };
        let telling = async {
            if new.is_streamed && new.announce {
                let written = async {
                    // Dropped, never sent.
                    let _ = is_written.await;
                };
                announcements::deltas(parts, &self.live, written).await;
            }
        };
        let (outcome, ()) = tokio::join!(working, telling);
        outcome
    }

    async fn complete(&self, new: &CreatePrompt, answer: Answer) -> Result<Created, Error> {
        let parts = &self.inner.parts;
        let Answer {
            completion,
            embedding,
        } = answer;
        let took = completion.upstream_duration;
        let outcome = CallOutcome::Completed {
            response: completion.text.into(),
            model: completion.model,
            finish_reason: completion.finish_reason,
            prompt_tokens: completion.prompt_tokens,
            completion_tokens: completion.completion_tokens,
            embedding: Some((parts.model.clone(), embedding.clone())),
        };
        let prompt = match self.finish(Some(took), outcome).await {
            Ok(Finished::Ours(prompt)) => prompt,
            Ok(Finished::Lost(error)) => return Err(error),
            Err(error) => return self.fail(new, Ended::Broken(error)).await,
        };
        self.publish(new, &prompt, &embedding);
        Ok(Created::Answered {
            prompt,
            upstream: Some(took),
            is_replayed: false,
        })
    }

    fn publish(&self, new: &CreatePrompt, prompt: &Prompt, embedding: &Embedding) {
        let parts = &self.inner.parts;
        parts
            .similarity
            .inserted(prompt.user_id, prompt.id, embedding);
        super::count_outcome(parts, prompt.status);
        if new.announce {
            announcements::completed(parts, prompt);
        }
        self.live.end(End::Completed(Arc::new(prompt.clone())));
    }

    async fn fail(&self, new: &CreatePrompt, ended: Ended) -> Result<Created, Error> {
        let parts = &self.inner.parts;
        if matches!(ended, Ended::Cut(Cut::Stopping)) {
            self.give_up().await;
            return Err(Error::unavailable("the service is stopping"));
        }
        let outcome = CallOutcome::Failed(ended.code());
        let prompt = match self.finish(None, outcome).await? {
            Finished::Ours(prompt) => prompt,
            Finished::Lost(error) => return Err(error),
        };
        super::count_outcome(parts, prompt.status);
        let failed = ended.told(FailedPrompt::of(&prompt));
        if new.announce {
            announcements::failed(parts, prompt.user_id, &failed);
        }
        self.live.end(End::Failed(failed));
        Err(Error::Failed(failed))
    }

    /// Lets the lease run out now rather than when nobody renews it.
    async fn give_up(&self) {
        let calls = &self.inner.parts.call_store;
        let given_up = calls
            .renew_leases(self.holder.replica, &[self.prompt.id], Duration::ZERO)
            .await;
        if let Err(error) = given_up {
            tracing::warn!(%error, "a lease could not be given up; it runs out by itself");
        }
    }

    /// Stores the outcome, for as long as it takes within bounds: only one attempt can succeed, so it may be tried again.
    async fn finish(
        &self,
        took: Option<Duration>,
        outcome: CallOutcome,
    ) -> Result<Finished, Error> {
        let parts = &self.inner.parts;
        let until = Instant::now() + STORING;
        let mut is_in_doubt = false;
        loop {
            let finished = parts
                .call_store
                .finish_call(
                    self.prompt.id,
                    self.holder,
                    took.map(millis),
                    outcome.clone(),
                )
                .await;
            match finished {
                Ok(Some(prompt)) => return Ok(Finished::Ours(prompt)),
                Ok(None) => return self.lost(is_in_doubt).await,
                Err(error @ store::Error::Unavailable(_)) if Instant::now() < until => {
                    tracing::warn!(%error, "an outcome could not be stored yet");
                    is_in_doubt = true;
                }
                Err(error) => return Err(error.into()),
            }
            tokio::select! {
                () = tokio::time::sleep(STEP_BACK) => {}
                () = self.inner.cut.cancelled() => {
                    return Err(Error::unavailable("the service is stopping"));
                }
            }
        }
    }

    /// What became of a prompt that is not ours to finish. After an attempt whose fate is not known it may be that very attempt.
    async fn lost(&self, is_in_doubt: bool) -> Result<Finished, Error> {
        let store = &self.inner.parts.store;
        let stored = store.prompt(self.prompt.user_id, self.prompt.id).await?;
        let Some(prompt) = stored else {
            self.live.end(End::Deleted);
            return Ok(Finished::Lost(Error::Deleted));
        };
        if is_in_doubt && prompt.status != PromptStatus::Running {
            return Ok(Finished::Ours(prompt));
        }
        tracing::warn!("a call's lease ran out before its outcome was stored");
        Ok(Finished::Lost(match prompt.status {
            PromptStatus::Failed => {
                let failed = FailedPrompt::of(&prompt);
                self.live.end(End::Failed(failed));
                Error::Failed(failed)
            }
            // Another took it over.
            PromptStatus::Running | PromptStatus::Completed => {
                Error::IdempotencyKey(KeyProblem::InFlight)
            }
        }))
    }
}

impl Drop for RunningCall {
    fn drop(&mut self) {
        self.inner.parts.metrics.calls_running.dec();
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

enum Finished {
    /// Stored by us.
    Ours(Prompt),
    /// Not ours any more; what to tell the caller.
    Lost(Error),
}
