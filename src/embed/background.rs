//! Embedding in the background: one thread of lowered priority, apart from the pipeline of
//! requests.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use tokio::sync::oneshot;

use super::Encode;
use crate::domain::Embedding;
use crate::threads::lower_priority;

type BackgroundJob = (Vec<String>, oneshot::Sender<Vec<Option<Embedding>>>);

/// Embeds texts with the time that requests leave of the cores. When it is dropped, its thread ends
/// after the present texts.
#[derive(Debug)]
pub struct BackgroundEmbedder {
    jobs: Sender<BackgroundJob>,
}

impl BackgroundEmbedder {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn start<E: Encode>(encoder: Arc<E>) -> io::Result<Self> {
        let (jobs, queue) = channel();
        thread::Builder::new()
            .name("embed-background".to_owned())
            .spawn(move || {
                lower_priority();
                run(&*encoder, &queue);
            })?;
        Ok(Self { jobs })
    }

    /// The vectors of some texts, in their order; `None` for a text on which the model fails.
    /// Returns no vectors only if the thread has ended.
    pub async fn embed(&self, texts: Vec<String>) -> Vec<Option<Embedding>> {
        let (reply, embeddings) = oneshot::channel();
        let _ = self.jobs.send((texts, reply));
        embeddings.await.unwrap_or_default()
    }
}

fn run<E: Encode>(encoder: &E, queue: &Receiver<BackgroundJob>) {
    let mut scratch = None;
    while let Ok((texts, reply)) = queue.recv() {
        let embeddings = texts.iter().map(|text| {
            // The caller may have left.
            if reply.is_closed() {
                return None;
            }
            let embedded = catch_unwind(AssertUnwindSafe(|| {
                let ids = encoder.tokenize(text);
                encoder
                    .embed(&[&ids], scratch.get_or_insert_with(|| encoder.scratch()))
                    .pop()
            }));
            embedded.unwrap_or_else(|_| {
                scratch = None;
                None
            })
        });
        let embeddings = embeddings.collect();
        let _ = reply.send(embeddings);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives each text its length as a vector, and panics on the word `panic`.
    struct Lengths;

    impl Encode for Lengths {
        type Scratch = ();

        fn scratch(&self) {}

        fn tokenize(&self, text: &str) -> Vec<u32> {
            assert_ne!(text, "panic");
            vec![0; text.len()]
        }

        fn embed(&self, batch: &[&[u32]], (): &mut ()) -> Vec<Embedding> {
            batch
                .iter()
                .map(|ids| Embedding([ids.len() as f32].as_slice().into()))
                .collect()
        }
    }

    #[tokio::test]
    async fn a_text_that_the_model_fails_on_does_not_affect_the_others() {
        let background = BackgroundEmbedder::start(Arc::new(Lengths)).unwrap();
        let texts = ["one", "panic", "three"].map(str::to_owned);
        let embeddings = background.embed(texts.into()).await;
        let lengths: Vec<Option<f32>> = embeddings
            .into_iter()
            .map(|made| made.map(|made| made.0[0]))
            .collect();
        assert_eq!(lengths, [Some(3.0), None, Some(5.0)]);
        assert_eq!(background.embed(vec!["again".to_owned()]).await.len(), 1);
    }
}
