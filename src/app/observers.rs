//! What capabilities report of themselves, put into the metrics.

use std::sync::Arc;

use crate::embed::{Event, Observer};
use crate::telemetry::Metrics;

/// Counts what the embedding pipeline does.
pub struct EmbeddingObserver(pub Arc<Metrics>);

impl Observer for EmbeddingObserver {
    fn observe(&self, event: Event) {
        let metrics = &self.0;
        let saved = |how| metrics.embedding_saved.with_label_values(&[how]).inc();
        match event {
            Event::Batch { texts, .. } => metrics.embedding_batch_size.observe(texts as f64),
            Event::Refused { .. } => metrics.overloaded.inc(),
            Event::CacheHit => saved("cached"),
            Event::Coalesced => saved("coalesced"),
            Event::Dropped => saved("caller_left"),
            // Answers are timed by the use cases, which know what they are for.
            Event::Answered { .. } => {}
            Event::Failed => tracing::error!("the model failed on a text"),
        }
    }
}
