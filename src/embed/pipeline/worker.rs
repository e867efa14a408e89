//! What a worker thread does: take a batch, turn it into ids, run the model, answer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::queue::{Batch, Job};
use super::{Class, Encode, Error, Shared};
use crate::domain::Embedding;

/// A text of a batch as ids, by the number of its job.
type Encoded = (u64, Vec<u32>);

/// Serves batches until there will be no more. A panic of the encoder ends with an error for the caller of the text that
/// causes it, never with the thread.
pub(super) fn run<E: Encode>(shared: &Shared, encoder: &E) {
    let mut worker = Worker {
        shared,
        encoder,
        scratch: None,
    };
    while let Some(batch) = shared.next_batch() {
        let mut encoded = Vec::with_capacity(batch.len());
        for (job, text) in batch {
            match catch_unwind(AssertUnwindSafe(|| encoder.tokenize(&text))) {
                Ok(ids) => encoded.push((job, ids)),
                Err(_) => worker.answer(job, Err(Error::Failed)),
            }
        }
        // The batch was put together by estimates; the model gets what the count says.
        let mut rest = encoded.as_slice();
        while !rest.is_empty() {
            let (chunk, others) = rest.split_at(within_budget(rest, shared.batch_tokens));
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

struct Worker<'a, E: Encode> {
    shared: &'a Shared,
    encoder: &'a E,
    /// `None` at first and after a panic, which may have left it in any state.
    scratch: Option<E::Scratch>,
}

impl<E: Encode> Worker<'_, E> {
    fn compute(&mut self, chunk: &[Encoded]) {
        let started = Instant::now();
        if let Some(embeddings) = self.embed(chunk) {
            let texts = chunk.len();
            self.shared.admission.record(texts, started.elapsed());
            let batch_size = &self.shared.metrics.embedding_batch_size;
            batch_size.observe(texts as f64);
            for ((job, _), embedding) in chunk.iter().zip(embeddings) {
                self.answer(*job, Ok(embedding));
            }
        } else if let [(job, _)] = chunk {
            self.answer(*job, Err(Error::Failed));
        } else {
            // One text spoilt the batch. Alone, it spoils only its own answer.
            for text in chunk.chunks(1) {
                self.compute(text);
            }
        }
    }

    /// `None` if the encoder panics or does not give one vector a text.
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

    /// Gives everybody who waits for the job its result.
    fn answer(&self, job: u64, result: Result<Embedding, Error>) {
        let Some(job) = self.shared.finish(job, &result) else {
            return;
        };
        if result.is_err() {
            tracing::error!("the model failed on a text");
        }
        for (_, waiter) in job.waiters {
            // Before the answer, so that who has the answer can be admitted again.
            drop(waiter.permit);
            // The caller may have left.
            let _ = waiter.reply.send(result.clone());
        }
    }
}

impl Shared {
    /// Waits for work and takes it; `None` once the workers are to stop.
    fn next_batch(&self) -> Option<Batch> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return None;
            }
            if let Some(batch) = state.queue.take() {
                return Some(batch);
            }
            state = self
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn finish(&self, job: u64, result: &Result<Embedding, Error>) -> Option<Job> {
        let mut state = self.lock();
        let job = state.queue.finish(job)?;
        let mut waiters = job.waiters.iter();
        let is_query = waiters.any(|(_, waiter)| waiter.permit.class() == Class::Search);
        if is_query && let Ok(embedding) = result {
            let text = Arc::clone(&job.text);
            state.cache.put(job.user, text, embedding.clone());
        }
        Some(job)
    }
}
