//! The last phase of a call: its outcome is stored once, however long the store is unavailable, and
//! reported once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::call::{Call, Outcome};
use super::chat::kept_answer;
use super::events::{self, Event};
use super::stream::StreamEnd;
use super::{Created, Deps, count_outcome};
use crate::domain::{
    CallDetails, FailureCode, ModelId, Picodollars, Prompt, PromptStatus, UsageEntry,
};
use crate::error::{Error, FailedPrompt, KeyProblem, Refusal};
use crate::services::metering::CallEnd;
use crate::store::{self, CallOutcome};

/// How long storing an outcome is retried while the store is unavailable. An answer that was paid
/// for is worth a long wait. Bounded, because it takes memory, and because others may end the call
/// once its lease has expired.
const RETRY_FOR: Duration = Duration::from_secs(600);
/// The pause between two attempts, at first and at most.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(4));

/// The result of storing an outcome.
enum Stored {
    /// The prompt with this outcome.
    Ours(Prompt),
    /// Another process ended the call or took it over: the prompt as it is stored, or `None` if it
    /// was deleted.
    Theirs(Option<Prompt>),
}

impl Outcome {
    /// The part of it that is stored; `None` if nothing is.
    async fn to_store(&self, embedding_model: &ModelId, is_kept: bool) -> Option<CallOutcome> {
        let code = match self {
            Self::Answered(completion, embedding) => {
                let answer = match completion.answer.clone().filter(|_| is_kept) {
                    Some(answer) => Some(kept_answer(answer).await.into()),
                    None => None,
                };
                return Some(CallOutcome {
                    is_kept,
                    answer,
                    details: CallDetails {
                        finish_reason: completion.finish_reason.clone(),
                        prompt_tokens: completion.prompt_tokens,
                        completion_tokens: completion.completion_tokens,
                        duration_ms: Some(millis(completion.upstream_duration)),
                        cost: None,
                    },
                    embedding: embedding
                        .clone()
                        .map(|embedding| (embedding_model.clone(), embedding)),
                    ..CallOutcome::completed(completion.text.as_str(), &*completion.model)
                });
            }
            Self::Failed(failure) => failure.code,
            Self::Broken(_) => FailureCode::Internal,
            Self::Cancelled => FailureCode::Cancelled,
            Self::Stopped => return None,
        };
        Some(CallOutcome {
            is_kept,
            ..CallOutcome::failed(code)
        })
    }
}

impl Call<'_> {
    /// Stores how the call ended and reports it: to sockets, to readers of the stream, and to the
    /// caller by the returned value.
    pub(super) async fn settle(&self, outcome: Outcome) -> Result<Created, Error> {
        let deps = &self.inner.deps;
        let is_kept = self.new.post.is_kept();
        let Some(mut to_store) = outcome.to_store(&deps.model, is_kept).await else {
            self.release().await;
            return Err(Error::unavailable("the service is stopping"));
        };
        self.meter(&outcome, &mut to_store);
        match self.store_outcome(&to_store).await {
            Ok(Stored::Ours(prompt)) => {
                count_usage(deps, &to_store.usage);
                self.report(prompt, outcome)
            }
            Ok(Stored::Theirs(prompt)) => {
                if prompt.is_none() {
                    // Deleted meanwhile, and metered all the same.
                    count_usage(deps, &to_store.usage);
                }
                self.report_theirs(prompt)
            }
            Err(error) => self.store_failed(error, outcome).await,
        }
    }

    /// Adds what the attempts of the call have used and cost.
    fn meter(&self, outcome: &Outcome, to_store: &mut CallOutcome) {
        let metering = &self.inner.deps.metering;
        let content = self.new.post.content();
        let answer_bytes = match outcome {
            Outcome::Answered(completion, _) => {
                let whole = completion.answer.as_ref().map(|answer| answer.len());
                Some(whole.unwrap_or(completion.text.len()))
            }
            Outcome::Failed(_) | Outcome::Broken(_) | Outcome::Cancelled | Outcome::Stopped => None,
        };
        let end = CallEnd {
            answer_bytes,
            most_cost: metering.budgets(&self.new.route, content, None).most_cost,
        };
        to_store.usage = metering.entries(&self.attempts.attempts(), content, end);
        // Known only if the cost of each attempt is.
        let mut costs = to_store.usage.iter().map(|entry| entry.cost);
        let sum = costs.try_fold(Picodollars(0), |sum, cost| {
            Some(Picodollars(sum.0.saturating_add(cost?.0)))
        });
        to_store.details.cost = sum.filter(|_| !to_store.usage.is_empty());
    }

    /// Reports an outcome that is stored.
    fn report(&self, mut prompt: Prompt, outcome: Outcome) -> Result<Created, Error> {
        let deps = &self.inner.deps;
        let is_kept = self.new.post.is_kept();
        if !is_kept {
            // What is not kept is told all the same.
            prompt.prompt = self.new.post.text().to_owned();
        }
        count_outcome(deps, prompt.status);
        let mut failed = FailedPrompt::of(&prompt);
        let mut refusal = None;
        match outcome {
            Outcome::Answered(completion, embedding) => {
                let (user_id, id) = (prompt.user_id, prompt.id);
                match embedding {
                    Some(embedding) => deps.similarity.inserted(user_id, id, &embedding),
                    None if is_kept => deps.reembedding.ask(),
                    None => {}
                }
                if self.new.announce {
                    events::publish(deps, prompt.user_id, &Event::Completed(&prompt));
                }
                let prompt = Arc::new(prompt);
                self.stream.end(StreamEnd::Completed(Arc::clone(&prompt)));
                return Ok(Created::Answered {
                    prompt,
                    answer: completion.answer,
                    upstream: Some(completion.upstream_duration),
                    is_replayed: false,
                });
            }
            // The caller learns more than is stored.
            Outcome::Failed(failure) => {
                failed.detail = failure.detail;
                failed.retry_after = failure.retry_after;
                refusal = failure.upstream_error;
            }
            Outcome::Broken(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(%error, source, "a prompt could not be answered");
            }
            Outcome::Cancelled | Outcome::Stopped => {}
        }
        if self.new.announce {
            events::publish(deps, prompt.user_id, &Event::Failed(&failed));
        }
        self.stream.end(StreamEnd::Failed(failed));
        Err(match refusal {
            Some(refusal) => Error::Refused(Box::new(Refusal {
                status: refusal.status,
                message: refusal.message,
                error_type: refusal.error_type,
                param: refusal.param,
                code: refusal.code,
                retry_after: failed.retry_after,
            })),
            None => Error::Failed(failed),
        })
    }

    /// Reports the outcome that another process stored. That process has reported it to the
    /// sockets, unless the prompt was deleted.
    fn report_theirs(&self, prompt: Option<Prompt>) -> Result<Created, Error> {
        let Some(prompt) = prompt else {
            self.stream.end(StreamEnd::Deleted(self.prompt.id));
            self.publish_deletion();
            return Err(Error::Deleted);
        };
        tracing::warn!("a call's lease expired before its outcome was stored");
        match prompt.status {
            PromptStatus::Completed => {
                let prompt = Arc::new(prompt);
                self.stream.end_replaced(Arc::clone(&prompt));
                Ok(Created::Answered {
                    prompt,
                    answer: None,
                    upstream: None,
                    is_replayed: true,
                })
            }
            PromptStatus::Failed => {
                let failed = FailedPrompt::of(&prompt);
                self.stream.end(StreamEnd::Failed(failed));
                Err(Error::Failed(failed))
            }
            PromptStatus::Running => Err(Error::IdempotencyKey(KeyProblem::InFlight)),
        }
    }

    /// Ends a call whose outcome could not be stored.
    async fn store_failed(&self, error: store::Error, outcome: Outcome) -> Result<Created, Error> {
        if let Outcome::Answered(..) = outcome {
            let store::Error::Unavailable(_) = error else {
                // The store works and refuses this answer. That is a defect, and the prompt must
                // not stay running.
                return Box::pin(self.settle(Outcome::Broken(error.into()))).await;
            };
            tracing::error!(%error, "an answer could not be stored and is lost");
            // An attempt may have been committed although its result did not arrive.
            self.inner.deps.similarity.invalidate(self.prompt.user_id);
        }
        if self.inner.cut.is_cancelled() {
            // A stop does not wait for a store that is unavailable.
            self.leave();
        } else {
            self.release().await;
        }
        Err(error.into())
    }

    /// Makes the lease expire now, so that no retry has to wait for its end.
    async fn release(&self) {
        let calls = &self.inner.deps.call_store;
        let released = calls
            .renew_leases(self.holder.replica, &[self.prompt.id], Duration::ZERO)
            .await;
        if let Err(error) = released {
            tracing::warn!(%error, "a lease could not be released; it expires by itself");
        }
        // Only now: once this process no longer lists the call, a repeated post may take it over,
        // and the lease of that call must stand.
        self.leave();
    }

    /// Stores the outcome, with retries: only one attempt can succeed, so it is safe to repeat.
    async fn store_outcome(&self, outcome: &CallOutcome) -> Result<Stored, store::Error> {
        let until = Instant::now() + RETRY_FOR;
        retry(&self.inner.cut, until, |is_in_doubt| {
            self.try_to_store(outcome, is_in_doubt)
        })
        .await
    }

    async fn try_to_store(
        &self,
        outcome: &CallOutcome,
        is_in_doubt: bool,
    ) -> Result<Stored, store::Error> {
        let deps = &self.inner.deps;
        let id = self.prompt.id;
        let settled = deps
            .call_store
            .settle_call(id, self.holder, outcome.clone())
            .await?;
        if let Some(prompt) = settled {
            return Ok(Stored::Ours(prompt));
        }
        let stored = deps.store.prompt(self.prompt.user_id, id).await?;
        Ok(match stored {
            // Whoever else could have ended this call would have left its row or deleted it for the
            // user, who does not see such a call.
            None if is_in_doubt && !outcome.is_kept => Stored::Ours(self.ended_by(outcome)),
            Some(prompt) if is_in_doubt && has_outcome(&prompt, outcome) => Stored::Ours(prompt),
            stored => Stored::Theirs(stored),
        })
    }
}

impl Call<'_> {
    /// The prompt as it would be stored with that outcome.
    fn ended_by(&self, outcome: &CallOutcome) -> Prompt {
        Prompt {
            status: outcome.status(),
            error: outcome.error,
            response: outcome.response.as_deref().map(str::to_owned),
            model: outcome
                .model
                .clone()
                .unwrap_or_else(|| self.prompt.model.clone()),
            call: outcome.details.clone(),
            ..self.prompt.clone()
        }
    }
}

/// Counts what was stored of a call's usage.
fn count_usage(deps: &Deps, entries: &[UsageEntry]) {
    let metrics = &deps.metrics;
    for entry in entries {
        match entry.cost {
            #[expect(
                clippy::cast_precision_loss,
                reason = "a metric need not be exact; the ledger is"
            )]
            Some(cost) => metrics.cost.inc_by(cost.0.max(0) as f64 / 1e12),
            None => metrics.unpriced_attempts.inc(),
        }
        let tokens = entry.tokens.unwrap_or_default();
        for (kind, count) in [
            ("input", tokens.input),
            ("cache_read", tokens.cache_read),
            ("cache_write", tokens.cache_write),
            ("output", tokens.output),
            ("reasoning", tokens.reasoning),
        ] {
            let counter = metrics.metered_tokens.with_label_values(&[kind]);
            counter.inc_by(count);
        }
    }
}

/// Makes attempts until one does not fail with `Unavailable`, or `until`. After `cut` it makes one
/// more at most. Each attempt is passed whether an earlier one may have been committed although its
/// result did not arrive.
async fn retry<T, F>(
    cut: &CancellationToken,
    until: Instant,
    mut attempt: impl FnMut(bool) -> F,
) -> Result<T, store::Error>
where
    F: Future<Output = Result<T, store::Error>>,
{
    let (mut is_in_doubt, mut pause) = (false, RETRY_PAUSE.0);
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
            () = tokio::time::sleep(pause) => {}
            () = cut.cancelled() => {}
        }
        pause = (pause * 2).min(RETRY_PAUSE.1);
    }
}

/// Whether a stored prompt has that outcome. A call that another process ended is stored as
/// `Interrupted`, which is the outcome of no call.
fn has_outcome(prompt: &Prompt, outcome: &CallOutcome) -> bool {
    prompt.status == outcome.status()
        && prompt.error == outcome.error
        && prompt.response.as_deref() == outcome.response.as_deref()
        && outcome
            .model
            .as_ref()
            .is_none_or(|model| prompt.model == *model)
}

/// Whole milliseconds, as they are stored.
fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::domain::{PromptId, PromptSource, Timestamp, UserId};

    fn unavailable() -> store::Error {
        store::Error::Unavailable("unavailable".into())
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(600)
    }

    fn stored(status: PromptStatus, response: Option<&str>, error: Option<FailureCode>) -> Prompt {
        Prompt {
            id: PromptId(7),
            user_id: UserId(1),
            source: PromptSource::Api,
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
    fn a_stored_prompt_has_an_outcome_only_if_it_is_the_same() {
        let answered = CallOutcome::completed("Because.", "answering");
        let timed_out = CallOutcome::failed(FailureCode::UpstreamTimeout);
        let broke_down = CallOutcome::failed(FailureCode::UpstreamFailed);
        let completed = |response| stored(PromptStatus::Completed, Some(response), None);
        let failed = |code| stored(PromptStatus::Failed, None, Some(code));
        assert!(has_outcome(&completed("Because."), &answered));
        assert!(has_outcome(
            &failed(FailureCode::UpstreamTimeout),
            &timed_out
        ));
        for other in [
            failed(FailureCode::Interrupted),
            completed("Well."),
            stored(PromptStatus::Running, None, None),
        ] {
            assert!(!has_outcome(&other, &answered), "{other:?}");
            assert!(!has_outcome(&other, &timed_out), "{other:?}");
            assert!(!has_outcome(&other, &broke_down), "{other:?}");
        }
        assert!(!has_outcome(&completed("Because."), &timed_out));
        let elsewhere = Prompt {
            model: "other".to_owned(),
            ..completed("Because.")
        };
        assert!(!has_outcome(&elsewhere, &answered));
    }

    #[tokio::test]
    async fn storing_is_retried_and_in_doubt_while_the_store_is_unavailable() {
        let doubts = Cell::new(Vec::new());
        let cut = CancellationToken::new();
        let stored = retry(&cut, later(), |is_in_doubt| {
            let mut seen = doubts.take();
            seen.push(is_in_doubt);
            let result = if seen.len() < 3 {
                Err(unavailable())
            } else {
                Ok(7)
            };
            doubts.set(seen);
            std::future::ready(result)
        });
        assert_eq!(stored.await.unwrap(), 7);
        assert_eq!(doubts.take(), [false, true, true]);
    }

    #[tokio::test]
    async fn a_cut_allows_one_more_attempt() {
        let cut = CancellationToken::new();
        let attempts = Cell::new(0);
        let stored = retry(&cut, later(), |_| {
            attempts.set(attempts.get() + 1);
            cut.cancel();
            std::future::ready(Err::<(), _>(unavailable()))
        });
        assert!(matches!(stored.await, Err(store::Error::Unavailable(_))));
        assert_eq!(attempts.get(), 2);
    }

    #[tokio::test]
    async fn a_defect_and_the_end_of_the_time_end_the_retries() {
        let cut = CancellationToken::new();
        let broken = || store::Error::Internal("broken".into());
        let stored = retry(&cut, later(), |_| {
            std::future::ready(Err::<(), _>(broken()))
        });
        assert!(matches!(stored.await, Err(store::Error::Internal(_))));
        let stored = retry(&cut, Instant::now(), |_| {
            std::future::ready(Err::<(), _>(unavailable()))
        });
        assert!(matches!(stored.await, Err(store::Error::Unavailable(_))));
    }
}
