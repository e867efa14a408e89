//! A worker thread: it takes a batch, tokenizes it, runs the model, and sends the vectors.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use super::queue::EmbedJob;
use super::{Class, Embedded, Error, Pipeline};
use crate::domain::Embedding;
use crate::embed::Encode;
use crate::threads::Next;

/// A text of a batch as ids, by the number of its job.
type Encoded = (u64, Vec<u32>);

/// Serves batches until the pipeline stops. A panic of the encoder is an error for the caller of
/// the text that causes it. It does not end the thread.
pub(super) fn run<E: Encode>(pipeline: &Pipeline, encoder: &E) {
    let mut worker = EmbedWorker {
        pipeline,
        encoder,
        scratch: None,
    };
    while let Next::Job(batch) = pipeline.work.next(None, |state| state.queue.take()) {
        let mut encoded = Vec::with_capacity(batch.len());
        for (job, text) in batch {
            match catch_unwind(AssertUnwindSafe(|| encoder.tokenize(&text))) {
                Ok(ids) => encoded.push((job, ids)),
                Err(_) => worker.send(job, Err(Error::Failed)),
            }
        }
        // The queue estimates the tokens. The model gets batches by their exact number.
        let mut rest = encoded.as_slice();
        while !rest.is_empty() {
            let (chunk, others) = rest.split_at(within_budget(rest, pipeline.batch_tokens));
            worker.compute(chunk);
            rest = others;
        }
    }
}

/// How many texts, from the first on, fit the budget; at least one.
fn within_budget(texts: &[Encoded], budget: usize) -> usize {
    let mut tokens = 0;
    let fitting = texts.iter().take_while(|(_, ids)| {
        tokens += ids.len();
        tokens <= budget
    });
    fitting.count().max(1)
}

struct EmbedWorker<'a, E: Encode> {
    pipeline: &'a Pipeline,
    encoder: &'a E,
    /// `None` at first, and after a panic, which may have left it in any state.
    scratch: Option<E::Scratch>,
}

impl<E: Encode> EmbedWorker<'_, E> {
    fn compute(&mut self, chunk: &[Encoded]) {
        let started = Instant::now();
        if let Some(embeddings) = self.embed(chunk) {
            let texts = chunk.len();
            self.pipeline.admission.record(texts, started.elapsed());
            let batch_size = &self.pipeline.metrics.embedding_batch_size;
            batch_size.observe(texts as f64);
            for ((job, ids), embedding) in chunk.iter().zip(embeddings) {
                let tokens = ids.len();
                self.send(*job, Ok(Embedded { embedding, tokens }));
            }
        } else if let [(job, _)] = chunk {
            self.send(*job, Err(Error::Failed));
        } else {
            // One text broke the batch. Alone, it breaks nothing else.
            for text in chunk.chunks(1) {
                self.compute(text);
            }
        }
    }

    /// Returns `None` if the encoder panics or does not return one vector for each text.
    fn embed(&mut self, chunk: &[Encoded]) -> Option<Vec<Embedding>> {
        let (encoder, scratch) = (self.encoder, &mut self.scratch);
        let ids: Vec<&[u32]> = chunk.iter().map(|(_, ids)| ids.as_slice()).collect();
        let run = AssertUnwindSafe(|| {
            encoder.embed(&ids, scratch.get_or_insert_with(|| encoder.scratch()))
        });
        match catch_unwind(run) {
            Ok(embeddings) => Some(embeddings).filter(|made| made.len() == chunk.len()),
            Err(_) => {
                self.scratch = None;
                None
            }
        }
    }

    /// Sends the result of a job to all callers that wait for it.
    fn send(&self, job: u64, result: Result<Embedded, Error>) {
        let Some(job) = self.pipeline.finish(job, &result) else {
            return;
        };
        if result.is_err() {
            tracing::error!("the model failed on a text");
        }
        for (_, waiter) in job.waiters {
            // Before the result, so that a caller that has its result can be admitted again.
            drop(waiter.permit);
            // The caller may have left.
            let _ = waiter.reply.send(result.clone());
        }
    }
}

impl Pipeline {
    fn finish(&self, job: u64, result: &Result<Embedded, Error>) -> Option<EmbedJob> {
        let mut state = self.work.jobs();
        let job = state.queue.finish(job)?;
        let mut waiters = job.waiters.iter();
        let is_query = waiters.any(|(_, waiter)| waiter.permit.class() == Class::Search);
        if is_query && let Ok(made) = result {
            let text = Arc::clone(&job.text);
            let embedding = made.embedding.clone();
            state.cache.put(job.user, text, embedding);
        }
        Some(job)
    }
}
