//! What an answer is made of: places among those in flight, the day's count, the prompt's vector, and why there may be none.

use std::future::poll_fn;
use std::pin::pin;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, MaybeDone, maybe_done};

use super::Parts;
use crate::domain::{Embedding, FailureCode, Timestamp, UserId};
use crate::embed::{Class, Permit};
use crate::error::{Error, FailedPrompt};
use crate::llm::{self, CallPermit};
use crate::memory_budget::Reservation;

const MICROS_A_DAY: i64 = 86_400_000_000;

/// Places among the calls and the texts in flight, without which nothing is begun, and what the
/// post holds in memory.
pub(super) struct Admission {
    pub call: CallPermit,
    pub text: Permit,
    pub memory: Reservation,
}

impl Admission {
    /// Takes both places at once, or none.
    ///
    /// # Errors
    /// `Overloaded`.
    pub fn take(parts: &Parts, user_id: UserId, memory: Reservation) -> Result<Self, Error> {
        let text = parts.embedder.admit(user_id, Class::Post)?;
        let call = parts
            .llm
            .admit(user_id)
            .map_err(|busy| Error::Overloaded(busy.retry_after))?;
        Ok(Self { call, text, memory })
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

/// What was paid for, and the vector that makes it searchable.
pub(super) struct Answer {
    pub completion: llm::Completion,
    /// None if the model broke once the upstream was being asked: what was paid for is kept all the same.
    pub embedding: Option<Embedding>,
}

/// Counts a call on the day of `now`, if calls are counted; why the upstream is not to be asked, if it is not.
///
/// # Errors
/// Those of the store: nothing was counted, and nothing may be begun.
pub(super) async fn count(parts: &Parts, now: Timestamp) -> Result<Option<llm::Failure>, Error> {
    let Some(limit) = parts.calls.daily_limit else {
        return Ok(None);
    };
    let day = now.0.div_euclid(MICROS_A_DAY);
    if parts.call_store.count_upstream_call(day, limit).await? {
        return Ok(None);
    }
    Ok(Some(llm::Failure {
        code: FailureCode::UpstreamUnavailable,
        detail: "The daily limit of calls is reached.",
        retry_after: Some(Timestamp((day + 1).saturating_mul(MICROS_A_DAY)).since(now)),
    }))
}

/// Makes the vector of a prompt.
pub(super) async fn embed(parts: &Parts, permit: Permit, text: &str) -> Result<Embedding, Error> {
    let started = Instant::now();
    let embedding = parts.embedder.embed(permit, text.into()).await?;
    parts
        .metrics
        .embedding_duration
        .with_label_values(&["post"])
        .observe(started.elapsed().as_secs_f64());
    Ok(embedding)
}

/// A prompt's vector that is being made while its post waits for other things. It costs nothing, so it begins with the first of them.
pub(super) struct EmbeddingInFlight<'a>(MaybeDone<BoxFuture<'a, Result<Embedding, Error>>>);

impl<'a> EmbeddingInFlight<'a> {
    /// One that begins at the first wait beside it.
    pub fn new(embedding: impl Future<Output = Result<Embedding, Error>> + Send + 'a) -> Self {
        Self(maybe_done(embedding.boxed()))
    }

    /// Waits for something else while the vector is being made.
    pub async fn beside<T>(&mut self, other: impl Future<Output = T>) -> T {
        let mut other = pin!(other);
        poll_fn(|context| {
            // Kept until it is asked for.
            let _ = self.0.poll_unpin(context);
            other.as_mut().poll(context)
        })
        .await
    }

    /// The same, unless the model has broken already: while nothing was paid for, the post may fail of it.
    ///
    /// # Errors
    /// What the model broke of.
    pub fn unless_broken(self) -> Result<Self, Error> {
        match self.0 {
            MaybeDone::Done(Err(error)) => Err(error),
            sound @ (MaybeDone::Done(Ok(_)) | MaybeDone::Future(_) | MaybeDone::Gone) => {
                Ok(Self(sound))
            }
        }
    }

    /// Waits for the vector.
    ///
    /// # Errors
    /// What the model broke of.
    pub async fn made(self) -> Result<Embedding, Error> {
        match self.0 {
            MaybeDone::Future(embedding) => embedding.await,
            MaybeDone::Done(embedding) => embedding,
            MaybeDone::Gone => Err(Error::internal("a vector was taken twice")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use tokio::sync::oneshot;

    use super::*;

    fn vector() -> Embedding {
        Embedding([0.5].as_slice().into())
    }

    #[tokio::test]
    async fn a_vector_is_made_while_its_post_waits_for_other_things() {
        let (made, waits) = oneshot::channel();
        let mut embedding = EmbeddingInFlight::new(async {
            made.send(()).unwrap();
            Ok(vector())
        });
        // Comes only if the vector is being made meanwhile.
        embedding.beside(waits).await.unwrap();
        assert_eq!(embedding.beside(ready(1)).await, 1);
        let embedding = embedding.unless_broken().unwrap();
        assert_eq!(embedding.made().await.unwrap(), vector());
    }

    #[tokio::test]
    async fn a_wait_ends_before_the_vector_if_it_comes_first() {
        let mut embedding = EmbeddingInFlight::new(pending());
        assert_eq!(embedding.beside(ready(1)).await, 1);
        assert!(embedding.unless_broken().is_ok());
    }

    #[tokio::test]
    async fn a_model_that_broke_is_told_when_it_is_asked_for_and_ends_nothing() {
        let broken = || EmbeddingInFlight::new(ready(Err(Error::overloaded())));
        let mut embedding = broken();
        assert_eq!(embedding.beside(ready("paid for")).await, "paid for");
        assert!(embedding.made().await.is_err());
        let mut embedding = broken();
        embedding.beside(ready(())).await;
        assert!(embedding.unless_broken().is_err());
    }
}
