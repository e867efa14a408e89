//! The upstream that answers prompts: anything that speaks OpenAI's chat-completions protocol, or the built-in mock.

mod admission;
mod measure;
mod mock;
pub(crate) mod openai;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use admission::{Busy, CallPermit};
pub use openai::{Error, Finding, Look, Reading, read_answer};

use self::admission::Admission;
use self::measure::CallLabels;
use self::openai::Upstreams;
use crate::config::UpstreamConfig;
use crate::domain::{FailureCode, UserId};
use crate::memory_budget::Reservation;
use crate::telemetry::Metrics;

/// What the upstream answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The answer's text, without NUL; may be empty.
    pub text: String,
    /// The model that answered, as the upstream names it; one line of at most 200 characters.
    pub model: String,
    /// Why the answer ends, as the upstream says: `stop`, `length`, …; one line of at most 64 characters.
    pub finish_reason: Option<String>,
    /// Tokens of the question, if the upstream counts them.
    pub prompt_tokens: Option<u32>,
    /// Tokens of the answer, if the upstream counts them.
    pub completion_tokens: Option<u32>,
    /// From asking the upstream first until its answer was there whole, with all attempts and the waits between them.
    pub upstream_duration: Duration,
}

/// Why there is no answer. Quotes nothing of the upstream's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Failure {
    /// The client's code.
    pub code: FailureCode,
    /// A sentence for humans.
    pub detail: &'static str,
    /// When it may be worth trying again; always there with `UpstreamUnavailable`.
    pub retry_after: Option<Duration>,
}

/// A client of the configured upstream, or of the mock.
#[derive(Debug)]
pub struct Client {
    backend: Backend,
    admission: Arc<Admission>,
}

enum Backend {
    Mock(Arc<Metrics>),
    OpenAi(Box<Upstreams>),
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mock(_) => f.write_str("Mock"),
            Self::OpenAi(upstreams) => std::fmt::Debug::fmt(upstreams, f),
        }
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
            admission: Admission::new(usize::MAX, Arc::clone(&metrics)),
            backend: Backend::Mock(metrics),
        }
    }

    /// A client of real upstreams. Nothing is connected yet.
    ///
    /// # Errors
    /// If TLS is needed and cannot be set up.
    pub fn new(config: &UpstreamConfig, metrics: Arc<Metrics>) -> Result<Self, Error> {
        Ok(Self {
            admission: Admission::new(config.max_in_flight, Arc::clone(&metrics)),
            backend: Backend::OpenAi(Box::new(Upstreams::new(config, metrics)?)),
        })
    }

    /// The kind of upstream that is asked first, as metrics name it: `mock`, `openai` or `openai-compatible`.
    pub fn provider(&self) -> &str {
        self.first().provider
    }

    /// Whether it is the built-in mock, whose answers cost nothing.
    pub fn is_mock(&self) -> bool {
        matches!(self.backend, Backend::Mock(_))
    }

    /// The model that is asked first.
    pub fn model(&self) -> &str {
        self.first().model
    }

    fn first(&self) -> CallLabels<'_> {
        match &self.backend {
            Backend::Mock(_) => MOCK,
            Backend::OpenAi(upstreams) => upstreams.first(),
        }
    }

    /// Asks each upstream, in the order of the configuration, which models it has. Costs nothing
    /// but a few requests. The mock is not asked.
    pub async fn look(&self) -> Vec<Look> {
        match &self.backend {
            Backend::Mock(_) => Vec::new(),
            Backend::OpenAi(upstreams) => upstreams.look().await,
        }
    }

    /// A place for a call of the user's among those in flight.
    ///
    /// # Errors
    /// [`Busy`] at once if all are taken, or the user holds half of them; nothing was begun then.
    pub fn admit(&self, user: UserId) -> Result<CallPermit, Busy> {
        self.admission.admit(user)
    }

    /// Answers a prompt.
    ///
    /// With `on_delta` the upstream is asked to stream, and each piece of text is handed over as it arrives; it is called on the async
    /// thread and has to be quick. The completion holds the whole text in either case.
    ///
    /// `memory` holds what is read of the upstream's answer until it is returned.
    ///
    /// Dropping the future gives the call up and its connection with it; the upstream may have worked on it all the same.
    ///
    /// # Errors
    /// [`Failure`] after the last attempt; pieces may have been handed over before.
    pub async fn complete(
        &self,
        permit: CallPermit,
        memory: Reservation,
        prompt: &str,
        on_delta: Option<&mut (dyn FnMut(&str) + Send)>,
    ) -> Result<Completion, Failure> {
        let completion = match &self.backend {
            Backend::OpenAi(upstreams) => upstreams.complete(memory, prompt, on_delta).await,
            Backend::Mock(metrics) => {
                let began = Instant::now();
                let completion = mock::complete(prompt, on_delta);
                MOCK.ended(metrics, began.elapsed(), None, [None, None]);
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
    async fn the_mock_repeats_what_it_was_told() {
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
