//! The paid part of a post: the upstream's answer and the prompt's vector, side by side.

use std::time::Instant;

use super::Parts;
use crate::domain::{Embedding, FailureCode, Timestamp, UserId};
use crate::embed::{Class, Permit};
use crate::error::{Error, FailedPrompt};
use crate::llm::{self, CallPermit};

const MICROS_A_DAY: i64 = 86_400_000_000;

/// Places among the calls and the texts in flight: nothing is begun without both.
pub(super) struct Admission {
    call: CallPermit,
    text: Permit,
}

impl Admission {
    /// Takes both places at once, or none.
    ///
    /// # Errors
    /// `Overloaded`.
    pub fn take(parts: &Parts, user_id: UserId) -> Result<Self, Error> {
        let text = parts.embedder.admit(user_id, Class::Post)?;
        let call = parts
            .llm
            .admit(user_id)
            .map_err(|busy| Error::Overloaded(busy.retry_after))?;
        Ok(Self { call, text })
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Ended {
    /// A failure that the prompt is kept with.
    Failed(llm::Failure),
    /// Something that is not about this prompt, or a defect; the prompt is kept as failed all the same.
    Broken(Error),
    /// Broken off: its caller is gone, or the service stops.
    Cut(Cut),
}

/// Who broke a call off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// Its caller, by going away.
    Deserted,
    /// The service, which stops.
    Stopping,
}

impl Ended {
    /// What the prompt is kept with.
    pub fn code(&self) -> FailureCode {
        match self {
            Self::Failed(failure) => failure.code,
            Self::Broken(_) => FailureCode::Internal,
            Self::Cut(_) => FailureCode::Cancelled,
        }
    }

    /// What is told of the failed prompt: more than is stored, where more is known. Says a defect in the log.
    pub fn told(self, mut failed: FailedPrompt) -> FailedPrompt {
        match self {
            Self::Failed(failure) => {
                failed.detail = failure.detail;
                failed.retry_after = failure.retry_after;
            }
            Self::Broken(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(%error, source, "a prompt could not be answered");
            }
            Self::Cut(_) => {}
        }
        failed
    }
}

/// What was paid for.
pub(super) struct Answer {
    pub completion: llm::Completion,
    pub embedding: Embedding,
}

/// Counts the call, if calls are counted, asks the upstream and embeds the prompt. What fails first ends the other.
pub(super) async fn work(
    parts: &Parts,
    admission: Admission,
    prompt: &str,
    on_delta: Option<&mut (dyn FnMut(&str) + Send)>,
) -> Result<Answer, Ended> {
    let Admission { call, text } = admission;
    let (completion, embedding) = tokio::try_join!(
        async {
            let answer = parts.llm.complete(call, prompt, on_delta).await;
            answer.map_err(Ended::Failed)
        },
        async {
            embed(parts, text, prompt.to_owned())
                .await
                .map_err(Ended::Broken)
        },
    )?;
    Ok(Answer {
        completion,
        embedding,
    })
}

/// Counts a call on the day of `now`, if calls are counted.
pub(super) async fn count(parts: &Parts, now: Timestamp) -> Result<(), Ended> {
    let Some(limit) = parts.calls.daily_limit else {
        return Ok(());
    };
    let day = now.0.div_euclid(MICROS_A_DAY);
    match parts.call_store.count_upstream_call(day, limit).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(Ended::Failed(llm::Failure {
            code: FailureCode::UpstreamUnavailable,
            detail: "The daily limit of calls is reached.",
            retry_after: Some(Timestamp((day + 1).saturating_mul(MICROS_A_DAY)).since(now)),
        })),
        Err(error) => Err(Ended::Broken(error.into())),
    }
}

async fn embed(parts: &Parts, permit: Permit, text: String) -> Result<Embedding, Error> {
    let started = Instant::now();
    let embedding = parts.embedder.embed(permit, text.into()).await?;
    parts
        .metrics
        .embedding_duration
        .with_label_values(&["post"])
        .observe(started.elapsed().as_secs_f64());
    Ok(embedding)
}
