//! The upstream that answers prompts: any server that speaks OpenAI's chat-completions protocol, or
//! the built-in mock.

mod attempts;
mod chat_request;
mod json_member;
mod measure;
mod mock;
pub(crate) mod openai;
mod route;
mod usage;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prometheus::IntGauge;

pub use attempts::{Attempt, AttemptLog, CANCELLED, COMPLETED};
pub use chat_request::{ChatRequest, ChatRequestProblem};
pub use json_member::{ObjectWriter, Splice, is_usage_chunk, json_text, with_member};
pub use openai::{
    AnswerReading, Error, JsonValue, ListedModel, ModelFinding, UpstreamCheck, read_answer,
    read_chat_answer,
};
pub use route::Route;
pub use usage::TokenUsage;

use self::measure::CallLabels;
use self::openai::Upstreams;
use crate::config::UpstreamConfig;
use crate::domain::{FailureCode, UserId};
use crate::memory_budget::Reservation;
use crate::telemetry::Metrics;
use crate::user_permits::{UserPermit, UserPermits};

/// What is asked, and where.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// Where it goes.
    pub route: &'a Route,
    /// What is sent.
    pub content: Content<'a>,
    /// Gets an entry for each attempt. The completion or failure has the same entries; a call that
    /// is cancelled has neither.
    pub attempts: AttemptLog,
}

/// What an upstream is sent.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// A text, with the system prompt, the bounds and the sampling of the settings.
    Prompt(&'a str),
    /// A request with all its members as they came.
    Chat(&'a ChatRequest),
}

/// Gets an answer while it arrives. It is called on the async thread and must be quick.
pub trait AnswerSink: Send {
    /// Takes the next piece of the text of the answer's first choice.
    fn text(&mut self, piece: &str);

    /// Takes the next JSON object of a streamed answer to a chat request, byte for byte as the
    /// upstream sent it, but that line ends between its members become blanks, so that it is one
    /// line.
    fn chunk(&mut self, json: &[u8]);
}

/// A sink of text alone.
#[derive(Debug)]
pub struct TextSink<F>(pub F);

impl<F: FnMut(&str) + Send> AnswerSink for TextSink<F> {
    fn text(&mut self, piece: &str) {
        (self.0)(piece);
    }

    fn chunk(&mut self, _: &[u8]) {}
}

/// An upstream's answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// The text of the first choice, without NUL; may be empty.
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
    /// The same tokens by their kinds.
    pub usage: Option<TokenUsage>,
    /// The whole answer to a chat request: one `chat.completion`, which is valid JSON. As it came,
    /// or put together from the chunks of a stream. `None` for a prompt.
    pub answer: Option<Bytes>,
    /// The attempts that may have cost money; the last one brought this answer.
    pub attempts: Vec<Attempt>,
    /// From the first request to the upstream until the whole answer was there, including all
    /// attempts and the waits between them.
    pub upstream_duration: Duration,
}

/// Why there is no answer. It contains no text of the upstream's, but for `upstream_error`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Failure {
    /// The code for the client.
    pub code: FailureCode,
    /// A sentence for humans.
    pub detail: &'static str,
    /// When a retry may succeed; always there with `UpstreamUnavailable`.
    pub retry_after: Option<Duration>,
    /// What the upstream says is wrong with a chat request. It is for the caller alone: it may
    /// repeat parts of the request, so it must not be logged.
    pub upstream_error: Option<UpstreamError>,
    /// The attempts that may have cost money.
    pub attempts: Vec<Attempt>,
}

/// An upstream's refusal of a chat request, with the status 400, 404, 413, 415, 422 or 429. Without
/// the operator's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamError {
    /// The status.
    pub status: u16,
    /// The message; one line of at most 2,000 characters.
    pub message: String,
    /// The error's `type`; one line of at most 200 characters, as are those that follow.
    pub error_type: Option<String>,
    /// The member of the request that is wrong.
    pub param: Option<String>,
    /// The error's `code`.
    pub code: Option<String>,
}

impl UpstreamError {
    /// Whether the operator's money at the upstream is spent, which is not the caller's business. A
    /// caller would take it for its own budget.
    fn is_of_operator(&self) -> bool {
        const SPENT: Option<&str> = Some("insufficient_quota");
        self.code.as_deref() == SPENT || self.error_type.as_deref() == SPENT
    }
}

/// A client of the configured upstream, or of the mock.
#[derive(Debug)]
pub struct Client {
    /// `None` for the mock.
    upstreams: Option<Upstreams>,
    default_route: Route,
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
            default_route: Route::mock(),
            calls: UserPermits::new(usize::MAX),
            metrics,
        }
    }

    /// A client of real upstreams. It does not connect yet.
    ///
    /// # Errors
    /// TLS is needed and cannot be set up, or no upstream has the default model, which checked
    /// settings exclude.
    pub fn new(config: &UpstreamConfig, metrics: Arc<Metrics>) -> Result<Self, Error> {
        let default_route = Route::find(config, &config.default_model);
        let upstreams = Upstreams::new(config, Arc::clone(&metrics))?;
        Ok(Self {
            upstreams: Some(upstreams),
            default_route: default_route.ok_or(Error::NoDefault)?,
            calls: UserPermits::new(config.max_in_flight),
            metrics,
        })
    }

    /// Where the calls of a model go; `None` names the default model. Returns `None` if no upstream
    /// serves it.
    pub fn route(&self, model: Option<&str>) -> Option<Route> {
        match (&self.upstreams, model) {
            (Some(upstreams), Some(model)) => Route::find(&upstreams.config, model),
            (None, _) | (_, None) => Some(self.default_route.clone()),
        }
    }

    /// Where the calls of the default model go.
    pub fn default_route(&self) -> &Route {
        &self.default_route
    }

    /// The kind of upstream that the default model's calls go to first, as metrics name it: `mock`,
    /// `openai` or `openai-compatible`.
    pub fn provider(&self) -> &str {
        let first = self.default_route.hops().first();
        let upstream = self.upstreams.as_ref().zip(first);
        upstream.map_or(mock::NAME, |(upstreams, hop)| {
            upstreams.labels(hop).provider
        })
    }

    /// Whether this is the built-in mock, whose answers cost nothing.
    pub fn is_mock(&self) -> bool {
        self.upstreams.is_none()
    }

    /// The models of all upstreams, in the order of the configuration. A list that an upstream gave
    /// in the last minutes is used again; an upstream that cannot give one hides only models that
    /// are not named in the configuration.
    pub async fn models(&self) -> Vec<ListedModel> {
        match &self.upstreams {
            Some(upstreams) => upstreams.models().await,
            None => vec![ListedModel::mock()],
        }
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

    /// Answers a question.
    ///
    /// A prompt's answer is streamed if there is a `sink`, a chat request's if the request says so;
    /// `sink` gets each piece as it arrives. The completion has the whole answer in any case.
    ///
    /// `memory` counts the bytes of the answer that are held until this returns.
    ///
    /// Dropping the future cancels the call and closes its connection. The upstream may have worked
    /// on the call nevertheless: see [`Question::attempts`].
    ///
    /// # Errors
    /// [`Failure`] after the last attempt. `sink` may have got pieces before.
    pub async fn complete(
        &self,
        permit: CallPermit,
        memory: Reservation,
        question: Question<'_>,
        sink: Option<&mut dyn AnswerSink>,
    ) -> Result<Completion, Failure> {
        let completion = match &self.upstreams {
            Some(upstreams) => upstreams.complete(memory, question, sink).await,
            None => {
                let began = Instant::now();
                let completion = mock::complete(question.content, sink);
                for attempt in &completion.attempts {
                    question.attempts.push(attempt.clone());
                }
                let tokens = [completion.prompt_tokens, completion.completion_tokens];
                MOCK.ended(&self.metrics, began.elapsed(), None, tokens);
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

    fn question<'a>(client: &'a Client, prompt: &'a str) -> Question<'a> {
        Question {
            route: client.default_route(),
            content: Content::Prompt(prompt),
            attempts: AttemptLog::default(),
        }
    }

    #[tokio::test]
    async fn the_mock_repeats_the_prompt() {
        let client = Client::mock(Arc::default());
        let permit = client.admit(UserId(1)).unwrap();
        let completion = client
            .complete(permit, memory(), question(&client, "hello world"), None)
            .await
            .unwrap();
        assert_eq!(completion.text, "[mock] You said: hello world");
        assert_eq!(completion.model, "mock");
    }

    #[tokio::test]
    async fn the_mock_streams_word_by_word() {
        let client = Client::mock(Arc::default());
        let mut pieces = Vec::new();
        let mut keep = TextSink(|piece: &str| pieces.push(piece.to_owned()));
        let permit = client.admit(UserId(1)).unwrap();
        let completion = client
            .complete(
                permit,
                memory(),
                question(&client, "hello  world"),
                Some(&mut keep),
            )
            .await;
        assert!(pieces.len() > 3);
        assert_eq!(pieces.concat(), completion.unwrap().text);
    }
}
