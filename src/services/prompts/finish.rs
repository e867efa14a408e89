//! The end of a running call: its outcome is stored once, however long the store is away, and told once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::live::End;
use super::running::RunningCall;
use super::work::{Answer, Cut, Ended};
use super::{CreatePrompt, Created, announcements};
use crate::domain::{Prompt, PromptStatus};
use crate::error::{Error, FailedPrompt, KeyProblem};
use crate::store::{self, CallOutcome};

/// How long an outcome is kept trying to be stored while the store is away: what was paid for is worth a long wait. Bounded, because it
/// takes memory and the lease has run out by then, so that others may have ended the call.
const STORING: Duration = Duration::from_secs(600);
/// How long to step back between two attempts, at first and at most.
const STEP_BACK: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(4));

/// What became of an attempt to store an outcome.
enum Finished {
    /// It is stored.
    Ours(Prompt),
    /// The call was not ours any more; its prompt as it is stored, unless it was deleted.
    Lost(Option<Prompt>),
}

impl RunningCall {
    /// Stores how the call ended, and tells everybody: sockets, readers, and the caller by what this answers.
    pub(super) async fn conclude(
        &self,
        new: &CreatePrompt,
        answer: Result<Answer, Ended>,
    ) -> Result<Created, Error> {
        match answer {
            Ok(answer) => self.complete(new, answer).await,
            Err(Ended::Cut(Cut::Stopping)) => {
                self.give_up().await;
                Err(Error::unavailable("the service is stopping"))
            }
            Err(ended) => self.fail(new, ended).await,
        }
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
            embedding: embedding
                .clone()
                .map(|embedding| (parts.model.clone(), embedding)),
        };
        let prompt = match self.finish(Some(took), outcome).await {
            Ok(Finished::Ours(prompt)) => Arc::new(prompt),
            Ok(Finished::Lost(stored)) => return self.lost(new, stored),
            Err(error @ store::Error::Unavailable(_)) => {
                tracing::error!(%error, "an answer could not be stored and is lost");
                // Or an attempt was carried out without our knowing.
                parts.similarity.invalidate(self.prompt.user_id);
                self.give_up_unless_stopping().await;
                return Err(error.into());
            }
            // The store works and does not take this answer: a defect, which must not leave the prompt running.
            Err(
                error @ (store::Error::Internal(_)
                | store::Error::UsernameTaken
                | store::Error::QuotaExceeded),
            ) => {
                return self.fail(new, Ended::Broken(error.into())).await;
            }
        };
        super::make_searchable(parts, &prompt, embedding.as_ref());
        super::count_outcome(parts, prompt.status);
        if new.announce {
            announcements::completed(parts, &prompt);
        }
        self.live.end(End::Completed(Arc::clone(&prompt)));
        Ok(Created::Answered {
            prompt,
            upstream: Some(took),
            is_replayed: false,
        })
    }

    async fn fail(&self, new: &CreatePrompt, ended: Ended) -> Result<Created, Error> {
        let parts = &self.inner.parts;
        let outcome = CallOutcome::Failed(ended.code());
        let prompt = match self.finish(None, outcome).await {
            Ok(Finished::Ours(prompt)) => prompt,
            Ok(Finished::Lost(stored)) => return self.lost(new, stored),
            Err(error) => {
                self.give_up_unless_stopping().await;
                return Err(error.into());
            }
        };
        super::count_outcome(parts, prompt.status);
        let failed = ended.told(FailedPrompt::of(&prompt));
        if new.announce {
            announcements::failed(parts, prompt.user_id, &failed);
        }
        self.live.end(End::Failed(failed));
        Err(Error::Failed(failed))
    }

    /// The outcome of a call that another process has ended or taken over: what that process has
    /// stored. It has told the sockets, unless the prompt was deleted.
    fn lost(&self, new: &CreatePrompt, stored: Option<Prompt>) -> Result<Created, Error> {
        let Some(prompt) = stored else {
            self.live.end(End::Deleted);
            self.tell_deletion(new);
            return Err(Error::Deleted);
        };
        tracing::warn!("a call's lease ran out before its outcome was stored");
        match prompt.status {
            PromptStatus::Completed => {
                let prompt = Arc::new(prompt);
                self.live.end_replaced(Arc::clone(&prompt));
                Ok(Created::Answered {
                    prompt,
                    upstream: None,
                    is_replayed: true,
                })
            }
            PromptStatus::Failed => {
                let failed = FailedPrompt::of(&prompt);
                self.live.end(End::Failed(failed));
                Err(Error::Failed(failed))
            }
            PromptStatus::Running => Err(Error::IdempotencyKey(KeyProblem::InFlight)),
        }
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
        // Only now: a repetition of the post may take the call over once it is not found here, and that lease must stand.
        self.leave();
    }

    /// The same after an outage, but for a stop, which is not to wait for a store that has just been found away.
    async fn give_up_unless_stopping(&self) {
        if self.inner.cut.is_cancelled() {
            self.leave();
        } else {
            self.give_up().await;
        }
    }

    /// Stores the outcome, for as long as it takes within bounds: only one attempt can succeed, so it may be made again.
    async fn finish(
        &self,
        took: Option<Duration>,
        outcome: CallOutcome,
    ) -> Result<Finished, store::Error> {
        let until = Instant::now() + STORING;
        until_stored(&self.inner.cut, until, |is_in_doubt| {
            self.try_to_finish(took, &outcome, is_in_doubt)
        })
        .await
    }

    async fn try_to_finish(
        &self,
        took: Option<Duration>,
        outcome: &CallOutcome,
        is_in_doubt: bool,
    ) -> Result<Finished, store::Error> {
        let parts = &self.inner.parts;
        let (id, took) = (self.prompt.id, took.map(millis));
        let finished = parts
            .call_store
            .finish_call(id, self.holder, took, outcome.clone())
            .await?;
        if let Some(prompt) = finished {
            return Ok(Finished::Ours(prompt));
        }
        let stored = parts.store.prompt(self.prompt.user_id, id).await?;
        Ok(match stored {
            Some(prompt) if is_in_doubt && is_of(&prompt, outcome) => Finished::Ours(prompt),
            stored => Finished::Lost(stored),
        })
    }
}

/// Makes attempts until one has an answer, the time is over, or a cut allows only one more. Each is told whether an earlier one
/// may have happened without our knowing.
async fn until_stored<T, F>(
    cut: &CancellationToken,
    until: Instant,
    mut attempt: impl FnMut(bool) -> F,
) -> Result<T, store::Error>
where
    F: Future<Output = Result<T, store::Error>>,
{
    let (mut is_in_doubt, mut step_back) = (false, STEP_BACK.0);
    loop {
        let is_last = cut.is_cancelled() || Instant::now() >= until;
        match attempt(is_in_doubt).await {
            Err(error @ store::Error::Unavailable(_)) if !is_last => {
                tracing::warn!(%error, "an outcome could not be stored yet");
                is_in_doubt = true;
            }
            settled => return settled,
        }
        tokio::select! {
            () = tokio::time::sleep(step_back) => {}
            () = cut.cancelled() => {}
        }
        step_back = (step_back * 2).min(STEP_BACK.1);
    }
}

/// Whether a stored prompt ended with that outcome. A call that another process ended is stored as
/// `Interrupted`, which no outcome of a call is.
fn is_of(prompt: &Prompt, outcome: &CallOutcome) -> bool {
    match outcome {
        CallOutcome::Completed {
            response, model, ..
        } => {
            prompt.status == PromptStatus::Completed
                && prompt.response.as_deref() == Some(response)
                && prompt.model == *model
        }
        CallOutcome::Failed(code) => {
            prompt.status == PromptStatus::Failed && prompt.error == Some(*code)
        }
    }
}

/// Whole milliseconds, as they are stored.
pub(super) fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::domain::{CallDetails, FailureCode, PromptId, Timestamp, UserId};

    fn away() -> store::Error {
        store::Error::Unavailable("away".into())
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(600)
    }

    fn stored(status: PromptStatus, response: Option<&str>, error: Option<FailureCode>) -> Prompt {
        Prompt {
            id: PromptId(7),
            user_id: UserId(1),
            prompt: "Why?".to_owned(),
            response: response.map(str::to_owned),
            model: "answering".to_owned(),
            status,
            error,
            created_at: Timestamp(0),
            call: CallDetails::default(),
        }
    }

    #[test]
    fn a_stored_prompt_is_of_an_outcome_only_if_it_is_the_same() {
        let answered = CallOutcome::Completed {
            response: "Because.".into(),
            model: "answering".to_owned(),
            finish_reason: None,
            prompt_tokens: None,
            completion_tokens: None,
            embedding: None,
        };
        let timed_out = CallOutcome::Failed(FailureCode::UpstreamTimeout);
        let broke_down = CallOutcome::Failed(FailureCode::UpstreamFailed);
        let completed = |response| stored(PromptStatus::Completed, Some(response), None);
        let failed = |code| stored(PromptStatus::Failed, None, Some(code));
        assert!(is_of(&completed("Because."), &answered));
        assert!(is_of(&failed(FailureCode::UpstreamTimeout), &timed_out));
        let lapsed = failed(FailureCode::Interrupted);
        for other in [
            lapsed.clone(),
            completed("Well."),
            stored(PromptStatus::Running, None, None),
        ] {
            assert!(!is_of(&other, &answered), "{other:?}");
            assert!(!is_of(&other, &timed_out), "{other:?}");
            assert!(!is_of(&other, &broke_down), "{other:?}");
        }
        assert!(!is_of(&completed("Because."), &timed_out));
        let elsewhere = Prompt {
            model: "other".to_owned(),
            ..completed("Because.")
        };
        assert!(!is_of(&elsewhere, &answered));
    }

    #[tokio::test]
    async fn an_outcome_is_tried_again_and_in_doubt_while_the_store_is_away() {
        let doubts = Cell::new(Vec::new());
        let cut = CancellationToken::new();
        let stored = until_stored(&cut, later(), |is_in_doubt| {
            let mut seen = doubts.take();
            seen.push(is_in_doubt);
            let outcome = if seen.len() < 3 { Err(away()) } else { Ok(7) };
            doubts.set(seen);
            std::future::ready(outcome)
        });
        assert_eq!(stored.await.unwrap(), 7);
        assert_eq!(doubts.take(), [false, true, true]);
    }

    #[tokio::test]
    async fn a_cut_allows_one_more_attempt() {
        let cut = CancellationToken::new();
        let attempts = Cell::new(0);
        let stored = until_stored(&cut, later(), |_| {
            attempts.set(attempts.get() + 1);
            cut.cancel();
            std::future::ready(Err::<(), _>(away()))
        });
        assert!(matches!(stored.await, Err(store::Error::Unavailable(_))));
        assert_eq!(attempts.get(), 2);
    }

    #[tokio::test]
    async fn a_defect_and_the_end_of_the_time_end_the_attempts() {
        let cut = CancellationToken::new();
        let broken = || store::Error::Internal("broken".into());
        let stored = until_stored(&cut, later(), |_| {
            std::future::ready(Err::<(), _>(broken()))
        });
        assert!(matches!(stored.await, Err(store::Error::Internal(_))));
        let stored = until_stored(&cut, Instant::now(), |_| {
            std::future::ready(Err::<(), _>(away()))
        });
        assert!(matches!(stored.await, Err(store::Error::Unavailable(_))));
    }
}
