//! What capabilities report of themselves, put into the metrics.

use std::sync::Arc;

use crate::embed::{Event, Observer};
use crate::llm::{self, Asked, BreakerState};
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

/// Counts what the client of the upstream does.
pub struct UpstreamObserver(pub Arc<Metrics>);

/// The one operation that there is, as the OpenTelemetry GenAI conventions name it.
const CHAT: &str = "chat";

impl llm::Observer for UpstreamObserver {
    fn observe(&self, event: llm::Event<'_>) {
        let metrics = &self.0;
        let tokens = |asked: Asked<'_>, kind| {
            metrics.gen_ai_client_token_usage.with_label_values(&[
                CHAT,
                asked.provider,
                asked.model,
                kind,
            ])
        };
        match event {
            // Made before the first observation, so that a dashboard can tell "none yet" from "not measured".
            llm::Event::Announced(asked) => {
                tokens(asked, "input");
                tokens(asked, "output");
            }
            llm::Event::Admitted => metrics.upstream_calls_in_flight.inc(),
            llm::Event::Left => metrics.upstream_calls_in_flight.dec(),
            llm::Event::Refused => metrics.overloaded.inc(),
            llm::Event::FirstToken(asked, after) => metrics
                .gen_ai_client_time_to_first_chunk
                .with_label_values(&[CHAT, asked.provider, asked.model])
                .observe(after.as_secs_f64()),
            llm::Event::Ended {
                asked,
                duration,
                error_type,
                prompt_tokens,
                completion_tokens,
            } => {
                metrics
                    .gen_ai_client_operation_duration
                    .with_label_values(&[
                        CHAT,
                        asked.provider,
                        asked.model,
                        error_type.unwrap_or_default(),
                    ])
                    .observe(duration.as_secs_f64());
                for (kind, count) in [("input", prompt_tokens), ("output", completion_tokens)] {
                    if let Some(count) = count {
                        tokens(asked, kind).observe(f64::from(count));
                    }
                }
            }
            llm::Event::Retried {
                upstream,
                error_type,
            } => metrics
                .upstream_retries
                .with_label_values(&[upstream, error_type])
                .inc(),
            llm::Event::Skipped { upstream, events } => metrics
                .upstream_events_skipped
                .with_label_values(&[upstream])
                .inc_by(events),
            llm::Event::Breaker { upstream, state } => {
                let value = match state {
                    BreakerState::Closed => 0.0,
                    BreakerState::HalfOpen => 1.0,
                    BreakerState::Open => 2.0,
                };
                metrics
                    .upstream_breaker_state
                    .with_label_values(&[upstream])
                    .set(value);
            }
        }
    }
}
