//! The vector of a post, computed while the post waits for other things.

use std::future::poll_fn;
use std::pin::pin;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, MaybeDone, maybe_done};

use super::Deps;
use crate::domain::Embedding;
use crate::embed::{Permit, read_part};
use crate::error::Error;

/// Computes the vector of a prompt; `None` if it has no permit for that.
pub(super) async fn embed(
    deps: &Deps,
    permit: Option<Permit>,
    text: &str,
) -> Result<Option<Embedding>, Error> {
    let Some(permit) = permit else {
        return Ok(None);
    };
    let started = Instant::now();
    let embedding = deps.embedder.embed(permit, read_part(text).into()).await?;
    deps.metrics
        .embedding_duration
        .with_label_values(&["post"])
        .observe(started.elapsed().as_secs_f64());
    Ok(Some(embedding))
}

/// A vector that is computed while its post waits for other things. Nothing is paid for it, so it
/// starts with the first of these waits.
pub(super) struct PendingEmbedding<'a>(MaybeDone<BoxFuture<'a, Embedded>>);

/// The vector of a prompt; `None` if it gets none.
type Embedded = Result<Option<Embedding>, Error>;

impl<'a> PendingEmbedding<'a> {
    /// Starts at the first call of [`during`](Self::during).
    pub fn new(embedding: impl Future<Output = Embedded> + Send + 'a) -> Self {
        Self(maybe_done(embedding.boxed()))
    }

    /// Waits for `other` while the vector is computed. Returns as soon as `other` is ready.
    pub async fn during<T>(&mut self, other: impl Future<Output = T>) -> T {
        let mut other = pin!(other);
        poll_fn(|context| {
            // The other one first: the thread that computes the vector may take this thread's
            // processor as soon as it is woken, and the other one would wait until it is done.
            let polled = other.as_mut().poll(context);
            // The result is kept until `finish` takes it.
            let _ = self.0.poll_unpin(context);
            polled
        })
        .await
    }

    /// Returns itself, or the error if computing the vector has failed already: as long as nothing
    /// was paid for, the post may fail because of it.
    ///
    /// # Errors
    /// That of the embedder.
    pub fn unless_failed(self) -> Result<Self, Error> {
        match self.0 {
            MaybeDone::Done(Err(error)) => Err(error),
            other @ (MaybeDone::Done(Ok(_)) | MaybeDone::Future(_) | MaybeDone::Gone) => {
                Ok(Self(other))
            }
        }
    }

    /// Waits for the vector.
    ///
    /// # Errors
    /// That of the embedder.
    pub async fn finish(self) -> Embedded {
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

    fn vector() -> Option<Embedding> {
        Some(Embedding([0.5].as_slice().into()))
    }

    #[tokio::test]
    async fn a_vector_is_computed_while_its_post_waits_for_other_things() {
        let (computed, waits) = oneshot::channel();
        let mut embedding = PendingEmbedding::new(async {
            computed.send(()).unwrap();
            Ok(vector())
        });
        // Ready only if the vector is computed meanwhile.
        embedding.during(waits).await.unwrap();
        assert_eq!(embedding.during(ready(1)).await, 1);
        let embedding = embedding.unless_failed().unwrap();
        assert_eq!(embedding.finish().await.unwrap(), vector());
    }

    #[tokio::test]
    async fn a_wait_that_ends_first_does_not_wait_for_the_vector() {
        let mut embedding = PendingEmbedding::new(pending());
        assert_eq!(embedding.during(ready(1)).await, 1);
        assert!(embedding.unless_failed().is_ok());
    }

    #[tokio::test]
    async fn a_failed_vector_is_reported_when_it_is_taken_and_ends_no_wait() {
        let failed = || PendingEmbedding::new(ready(Err(Error::overloaded())));
        let mut embedding = failed();
        assert_eq!(embedding.during(ready("paid for")).await, "paid for");
        assert!(embedding.finish().await.is_err());
        let mut embedding = failed();
        embedding.during(ready(())).await;
        assert!(embedding.unless_failed().is_err());
    }
}
