//! The metrics of calls, under the names of the OpenTelemetry GenAI conventions.

use std::time::Duration;

use prometheus::Histogram;

use crate::telemetry::Metrics;

/// The only operation of this service, as the conventions name it.
const CHAT: &str = "chat";

/// The labels of a call's metrics. Names come from the configuration, never from an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallLabels<'a> {
    /// The upstream's kind.
    pub provider: &'a str,
    /// The model that was asked for.
    pub model: &'a str,
}

impl CallLabels<'_> {
    /// Creates the series of tokens before the first call, so that a dashboard can distinguish
    /// "none yet" from "not measured".
    pub fn announce(self, metrics: &Metrics) {
        self.tokens(metrics, "input");
        self.tokens(metrics, "output");
    }

    /// Counts the first text of a streamed answer, which came so long after the call began.
    pub fn first_chunk(self, metrics: &Metrics, after: Duration) {
        metrics
            .gen_ai_client_time_to_first_chunk
            .with_label_values(&[CHAT, self.provider, self.model])
            .observe(after.as_secs_f64());
    }

    /// Counts the end of a call. `duration`: from its beginning, with retries and fallbacks.
    /// `error_type`: what went wrong, if it failed; one of a few words. `tokens`: of the prompt and
    /// of the answer, where they are known.
    pub fn ended(
        self,
        metrics: &Metrics,
        duration: Duration,
        error_type: Option<&str>,
        tokens: [Option<u32>; 2],
    ) {
        let error_type = error_type.unwrap_or_default();
        metrics
            .gen_ai_client_operation_duration
            .with_label_values(&[CHAT, self.provider, self.model, error_type])
            .observe(duration.as_secs_f64());
        for (kind, count) in ["input", "output"].into_iter().zip(tokens) {
            if let Some(count) = count {
                self.tokens(metrics, kind).observe(f64::from(count));
            }
        }
    }

    fn tokens(self, metrics: &Metrics, kind: &str) -> Histogram {
        metrics.gen_ai_client_token_usage.with_label_values(&[
            CHAT,
            self.provider,
            self.model,
            kind,
        ])
    }
}
