//! Embeds the texts of a caller, who keeps the vectors: nothing is stored.

use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use crate::domain::{Embedding, ModelId, UserId};
use crate::embed::{Class, Embedded, Embedder, Permit, read_part};
use crate::error::Error;
use crate::telemetry::Metrics;

/// Texts of one request that wait or run at once. Enough that two workers find the next batch when
/// they are done with one, and few beside what the pipeline admits.
const MOST_AT_ONCE: usize = 16;

/// The vectors of some texts.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbeddedTexts {
    /// In the order of the texts.
    pub vectors: Vec<Embedding>,
    /// What the model has read of all texts, in tokens.
    pub tokens: usize,
}

/// Embeds texts for callers.
pub struct Embeddings {
    /// Shared with posts and searches.
    pub embedder: Arc<Embedder>,
    /// The model behind the embedder.
    pub model: ModelId,
    /// How many numbers its vectors have.
    pub dimension: usize,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

impl Embeddings {
    /// The name by which callers ask for the model.
    pub fn model_name(&self) -> &str {
        self.model.folder_name()
    }

    /// The vectors of all texts, each with its first `dimensions` numbers, brought to length 1.
    ///
    /// A caller who is admitted gets all of them: one permit is kept from the first text to the
    /// last. The texts pass through it one after another, and through those that are free beside
    /// it, so that a long list neither fails half way nor takes what others need. Cancel safe:
    /// dropping the future removes the texts that wait.
    ///
    /// # Errors
    /// `Overloaded` at once, before any text; those of the embedder.
    pub async fn embed(
        &self,
        user: UserId,
        texts: &[String],
        dimensions: usize,
    ) -> Result<EmbeddedTexts, Error> {
        let own = self.embedder.admit(user, Class::Bulk)?;
        let mut vectors: Vec<Option<Embedding>> = vec![None; texts.len()];
        let mut tokens = 0;
        let mut left = texts.iter().enumerate();
        let mut running = FuturesUnordered::new();
        let mut is_own_used = false;
        loop {
            while running.len() < MOST_AT_ONCE && left.len() > 0 {
                let permit = match is_own_used {
                    false => Some(own.clone()),
                    true => self.embedder.admit_more(user),
                };
                let Some(permit) = permit else {
                    break;
                };
                let Some((place, text)) = left.next() else {
                    break;
                };
                let is_own = !std::mem::replace(&mut is_own_used, true);
                running.push(async move { (place, is_own, self.one(permit, text).await) });
            }
            let Some((place, is_own, made)) = running.next().await else {
                break;
            };
            is_own_used &= !is_own;
            let made = made?;
            tokens += made.tokens;
            vectors[place] = Some(shortened(made.embedding, dimensions));
        }
        Ok(EmbeddedTexts {
            vectors: vectors.into_iter().flatten().collect(),
            tokens,
        })
    }

    async fn one(&self, permit: Permit, text: &str) -> Result<Embedded, Error> {
        let started = Instant::now();
        let made = self
            .embedder
            .compute(permit, read_part(text).into())
            .await?;
        self.metrics
            .embedding_duration
            .with_label_values(&["v1"])
            .observe(started.elapsed().as_secs_f64());
        Ok(made)
    }
}

/// The first numbers of a vector, brought to length 1.
fn shortened(vector: Embedding, dimensions: usize) -> Embedding {
    if dimensions >= vector.0.len() {
        return vector;
    }
    let first = &vector.0[..dimensions];
    let squares: f64 = first.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    // A vector of zeros has no direction, and stays.
    let length = if squares > 0.0 { squares.sqrt() } else { 1.0 };
    let scaled = first.iter().map(|&x| (f64::from(x) / length) as f32);
    Embedding(scaled.collect())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::task::{Context, Waker};
    use std::time::Duration;

    use parking_lot::Mutex;

    use super::*;
    use crate::embed::{EmbedderSettings, Encode};

    const ALICE: UserId = UserId(1);
    const BOB: UserId = UserId(2);
    const DEADLINE: Duration = Duration::from_secs(20);

    /// Gives each text its length as a vector, a batch for each message of the test.
    struct Gated(Mutex<mpsc::Receiver<()>>);

    impl Encode for Gated {
        type Scratch = ();

        fn scratch(&self) {}

        fn tokenize(&self, text: &str) -> Vec<u32> {
            vec![0; text.len()]
        }

        fn embed(&self, batch: &[&[u32]], (): &mut ()) -> Vec<Embedding> {
            // A test that is over has dropped the other end.
            let _ = self.0.lock().recv();
            let vector = |ids: &&[u32]| Embedding([ids.len() as f32, 0.0].as_slice().into());
            batch.iter().map(vector).collect()
        }
    }

    fn embeddings(capacity: usize) -> (Embeddings, mpsc::Sender<()>) {
        let (gate, gated) = mpsc::channel();
        let settings = EmbedderSettings {
            workers: 1,
            capacity,
            batch_tokens: 1,
            cache_bytes: 1 << 20,
        };
        let metrics = Arc::<Metrics>::default();
        let encoder = Arc::new(Gated(Mutex::new(gated)));
        let embedder = Embedder::start(encoder, &settings, Arc::clone(&metrics)).unwrap();
        let embeddings = Embeddings {
            embedder: Arc::new(embedder),
            model: ModelId("test/1".into()),
            dimension: 2,
            metrics,
        };
        (embeddings, gate)
    }

    fn texts(number: usize) -> Vec<String> {
        (1..=number).map(|length| "x".repeat(length)).collect()
    }

    fn open(gate: &mpsc::Sender<()>, batches: usize) {
        for _ in 0..batches {
            gate.send(()).unwrap();
        }
    }

    #[tokio::test]
    async fn all_texts_get_their_vectors_in_order_however_few_permits_there_are() {
        // Four texts at once in all: a request has its own permit and seldom another.
        for capacity in [4, 64] {
            let (embeddings, gate) = embeddings(capacity);
            let texts = texts(50);
            open(&gate, texts.len());
            let made = embeddings.embed(ALICE, &texts, 2);
            let made = tokio::time::timeout(DEADLINE, made).await.unwrap().unwrap();
            let lengths: Vec<f32> = made.vectors.iter().map(|vector| vector.0[0]).collect();
            assert_eq!(lengths, (1..=50).map(|n| n as f32).collect::<Vec<_>>());
            assert_eq!(made.tokens, 50 * 51 / 2);
            assert_eq!(embeddings.embedder.admitted(), 0);
        }
    }

    #[tokio::test]
    async fn a_long_list_takes_few_permits_and_a_search_of_another_user_is_next() {
        let (embeddings, gate) = embeddings(256);
        let texts = texts(500);
        let mut bulk = Box::pin(embeddings.embed(ALICE, &texts, 2));
        let mut context = Context::from_waker(Waker::noop());
        assert!(bulk.as_mut().poll(&mut context).is_pending());
        assert_eq!(embeddings.embedder.admitted(), MOST_AT_ONCE);
        let permit = embeddings.embedder.admit(BOB, Class::Search).unwrap();
        let mut search = Box::pin(embeddings.embedder.embed(permit, "yy".into()));
        assert!(search.as_mut().poll(&mut context).is_pending());
        // One batch that may be running, one whose turn it is, and the search.
        open(&gate, 3);
        let found = tokio::time::timeout(DEADLINE, search).await.unwrap();
        assert_eq!(found.unwrap().0[0], 2.0);
    }

    #[tokio::test]
    async fn a_caller_that_leaves_takes_the_texts_that_wait_along() {
        let (embeddings, gate) = embeddings(64);
        let texts = texts(500);
        let mut bulk = Box::pin(embeddings.embed(ALICE, &texts, 2));
        let mut context = Context::from_waker(Waker::noop());
        assert!(bulk.as_mut().poll(&mut context).is_pending());
        drop(bulk);
        assert_eq!(embeddings.embedder.queue_depth(), 0);
        // The text that is running, if one is.
        assert!(embeddings.embedder.admitted() <= 1);
        drop(gate);
    }

    #[tokio::test]
    async fn texts_of_such_requests_are_not_kept_as_queries() {
        let (embeddings, gate) = embeddings(64);
        open(&gate, 1);
        let texts = texts(1);
        let made = embeddings.embed(ALICE, &texts, 2);
        tokio::time::timeout(DEADLINE, made).await.unwrap().unwrap();
        let permit = embeddings.embedder.admit(ALICE, Class::Search).unwrap();
        let mut search = Box::pin(embeddings.embedder.embed(permit, "x".into()));
        let mut context = Context::from_waker(Waker::noop());
        assert!(search.as_mut().poll(&mut context).is_pending());
        drop(gate);
    }

    #[tokio::test]
    async fn without_a_permit_for_the_first_text_nothing_begins() {
        let (embeddings, gate) = embeddings(4);
        let _held = embeddings.embedder.admit(ALICE, Class::Bulk).unwrap();
        let refused = embeddings.embed(ALICE, &texts(1), 2).await;
        assert!(matches!(refused, Err(Error::Overloaded(_))), "{refused:?}");
        assert_eq!(embeddings.metrics.overloaded.get(), 1);
        drop(gate);
    }

    #[test]
    fn a_shortened_vector_has_length_1_again() {
        let vector = Embedding([0.6_f32, 0.0, 0.8].as_slice().into());
        assert_eq!(shortened(vector.clone(), 3), vector);
        assert_eq!(shortened(vector.clone(), 2).0[..], [1.0, 0.0]);
        let none = Embedding([0.0_f32, 1.0].as_slice().into());
        assert_eq!(shortened(none, 1).0[..], [0.0]);
    }
}
