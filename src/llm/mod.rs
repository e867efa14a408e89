//! The upstream that answers prompts: any server that speaks OpenAI's chat-completions protocol, or
//! the built-in mock.

mod measure;
mod mock;
pub(crate) mod openai;

use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus::IntGauge;

pub use openai::{AnswerReading, Error, ModelFinding, UpstreamCheck, read_answer};

use self::measure::CallLabels;
use self::openai::Upstreams;
use crate::config::UpstreamConfig;
use crate::domain::{FailureCode, UserId};
use crate::memory_budget::Reservation;
use crate::telemetry::Metrics;
use crate::user_permits::{UserPermit, UserPermits};

/// An upstream's answer to a prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// The answer's text, without NUL; may be empty.
    pub text: String,
    /// The model, as the upstream names it; one line of at most 200 characters.
    pub model: String,
    /// Why the answer ends, in the upstream's word: `stop`, `length`, …; one line of at most 64
    /// characters.
    pub finish_reason: Option<String>,
    /// Tokens of the prompt, if the upstream counts them.
    pub prompt_tokens: Option<u32>,
    /// Tokens of the answer, if the upstream counts them.
    pub completion_tokens: Option<u32>,
    /// From the first request to the upstream until the whole answer was there, including all
    /// attempts and the waits between them.
    pub upstream_duration: Duration,
}

/// Why there is no answer. It contains no text of the upstream's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Failure {
    /// The code for the client.
    pub code: FailureCode,
    /// A sentence for humans.
    pub detail: &'static str,
    /// When a retry may succeed; always there with `UpstreamUnavailable`.
    pub retry_after: Option<Duration>,
}

/// A client of the configured upstream, or of the mock.
#[derive(Debug)]
pub struct Client {
    /// `None` for the mock.
    upstreams: Option<Upstreams>,
    calls: Arc<UserPermits>,
    metrics: Arc<Metrics>,
}

/// No more calls may be in flight: in all, or of the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many calls are in flight")]
pub struct Busy;

/// The right to one call. Returned when dropped.
#[derive(Debug)]
#[must_use = "a permit that is dropped at once permits nothing"]
pub struct CallPermit {
    _permit: UserPermit,
    in_flight: IntGauge,
}

impl Drop for CallPermit {
    fn drop(&mut self) {
        self.in_flight.dec();
    }
}

/// The labels of the mock's metrics.
const MOCK: CallLabels<'static> = CallLabels {
    provider: mock::NAME,
    model: mock::NAME,
};

impl Client {
    /// The built-in mock, which admits everybody.
    pub fn mock(metrics: Arc<Metrics>) -> Self {
        MOCK.announce(&metrics);
        Self {
            upstreams: None,
            calls: UserPermits::new(usize::MAX),
            metrics,
        }
    }

    /// A client of real upstreams. It does not connect yet.
    ///
    /// # Errors
    /// TLS is needed and cannot be set up.
    pub fn new(config: &UpstreamConfig, metrics: Arc<Metrics>) -> Result<Self, Error> {
        let upstreams = Upstreams::new(config, Arc::clone(&metrics))?;
        Ok(Self {
            upstreams: Some(upstreams),
            calls: UserPermits::new(config.max_in_flight),
            metrics,
        })
    }

    /// The kind of upstream that is asked first, as metrics name it: `mock`, `openai` or
    /// `openai-compatible`.
    pub fn provider(&self) -> &str {
        self.first().provider
    }

    /// Whether this is the built-in mock, whose answers cost nothing.
    pub fn is_mock(&self) -> bool {
        self.upstreams.is_none()
    }

    /// The model that is asked first.
    pub fn model(&self) -> &str {
        self.first().model
    }

    fn first(&self) -> CallLabels<'_> {
        self.upstreams.as_ref().map_or(MOCK, Upstreams::first)
    }

    /// Asks each upstream, in the order of the configuration, which models it has. That costs only
    /// a few requests. The mock is not asked.
    pub async fn check_models(&self) -> Vec<UpstreamCheck> {
        match &self.upstreams {
            Some(upstreams) => upstreams.check_models().await,
            None => Vec::new(),
        }
    }

    /// A permit for a call of the user's.
    ///
    /// # Errors
    /// [`Busy`] at once if all permits are in use, or the user has half of them.
    pub fn admit(&self, user: UserId) -> Result<CallPermit, Busy> {
        let Ok(permit) = self.calls.acquire(user) else {
            self.metrics.overloaded.inc();
            return Err(Busy);
        };
        let in_flight = self.metrics.upstream_calls_in_flight.clone();
        in_flight.inc();
        Ok(CallPermit {
            _permit: permit,
            in_flight,
        })
    }

    /// Answers a prompt.
    ///
    /// With `on_delta` the upstream is asked to stream, and `on_delta` gets each piece of text as
    /// it arrives. It is called on the async thread and must be quick. The completion has the whole
    /// text in either case.
    ///
    /// `memory` counts the bytes of the answer that are held until this returns.
    ///
    /// Dropping the future cancels the call and closes its connection. The upstream may have worked
    /// on the call nevertheless.
    ///
    /// # Errors
    /// [`Failure`] after the last attempt. `on_delta` may have got pieces before.
    pub async fn complete(
        &self,
        permit: CallPermit,
        memory: Reservation,
        prompt: &str,
        on_delta: Option<&mut (dyn FnMut(&str) + Send)>,
    ) -> Result<Completion, Failure> {
        let completion = match &self.upstreams {
            Some(upstreams) => upstreams.complete(memory, prompt, on_delta).await,
            None => {
                let began = Instant::now();
                let completion = mock::complete(prompt, on_delta);
                MOCK.ended(&self.metrics, began.elapsed(), None, [None, None]);
                Ok(completion)
            }
        };
        drop(permit);
        completion
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_budget::{MemoryBudget, Owner};

    fn memory() -> Reservation {
        MemoryBudget::new(1 << 20).hold(Owner::default(), 0)
    }

    #[tokio::test]
    async fn the_mock_repeats_the_prompt() {
        let client = Client::mock(Arc::default());
        let permit = client.admit(UserId(1)).unwrap();
        let completion = client
            .complete(permit, memory(), "hello world", None)
            .await
            .unwrap();
        assert_eq!(completion.text, "[mock] You said: hello world");
        assert_eq!(completion.model, "mock");
    }

    #[tokio::test]
    async fn the_mock_streams_word_by_word() {
        let client = Client::mock(Arc::default());
        let mut pieces = Vec::new();
        let mut keep = |piece: &str| pieces.push(piece.to_owned());
        let permit = client.admit(UserId(1)).unwrap();
        let completion = client
            .complete(permit, memory(), "hello  world", Some(&mut keep))
            .await;
        assert!(pieces.len() > 3);
        assert_eq!(pieces.concat(), completion.unwrap().text);
    }
}
