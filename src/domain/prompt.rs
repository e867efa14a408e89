//! Prompts and their outcomes.

use super::{Picodollars, PromptId, Timestamp, UserId};

/// The state of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PromptStatus {
    /// The upstream is still answering.
    Running,
    /// Answered, stored and found by search.
    Completed,
    /// Failed; kept, and never found by search.
    Failed,
}

/// The front door by which a prompt came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PromptSource {
    /// `POST /api/prompts`.
    #[default]
    Api,
    /// The service's own page.
    Page,
    /// `POST /v1/chat/completions`.
    V1,
}

impl PromptSource {
    /// The word used on the wire and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Page => "page",
            Self::V1 => "v1",
        }
    }

    /// The source behind a stored word; `None` for any other word.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Api, Self::Page, Self::V1]
            .into_iter()
            .find(|source| source.as_str() == word)
    }
}

/// Why a prompt failed: the `code` of its error response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailureCode {
    /// The upstream answered with an error or with an unusable response (502).
    UpstreamFailed,
    /// The upstream refuses, its circuit breaker is open, or one of our limits is reached (503).
    UpstreamUnavailable,
    /// The upstream did not answer in time (504).
    UpstreamTimeout,
    /// Its caller disconnected, and such calls are cancelled by setting; or the service stopped.
    Cancelled,
    /// The process of the service that ran the call ended before the answer was stored (502).
    Interrupted,
    /// A defect of the service (500).
    Internal,
}

impl PromptStatus {
    /// The word used on the wire and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }

    /// The status behind a stored word; `None` for any other word.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Running, Self::Completed, Self::Failed]
            .into_iter()
            .find(|status| status.as_str() == word)
    }
}

impl FailureCode {
    /// The word used on the wire and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UpstreamFailed => "upstream_failed",
            Self::UpstreamUnavailable => "upstream_unavailable",
            Self::UpstreamTimeout => "upstream_timeout",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "interrupted",
            Self::Internal => "internal_error",
        }
    }

    /// The message to clients for a failure of which only the code is known.
    pub fn detail(self) -> &'static str {
        match self {
            Self::UpstreamFailed => "The upstream failed to answer.",
            Self::UpstreamUnavailable => "The upstream cannot be asked just now.",
            Self::UpstreamTimeout => "The upstream did not answer in time.",
            Self::Cancelled => "The call was broken off.",
            Self::Interrupted => "The service stopped while the prompt was being answered.",
            Self::Internal => "Internal server error.",
        }
    }

    /// The code behind a stored word; `None` for any other word.
    pub fn parse(word: &str) -> Option<Self> {
        [
            Self::UpstreamFailed,
            Self::UpstreamUnavailable,
            Self::UpstreamTimeout,
            Self::Cancelled,
            Self::Interrupted,
            Self::Internal,
        ]
        .into_iter()
        .find(|code| code.as_str() == word)
    }
}

/// A stored prompt with its outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Identifies the prompt.
    pub id: PromptId,
    /// The user who posted it.
    pub user_id: UserId,
    /// The front door by which it came.
    pub source: PromptSource,
    /// The text, without NUL; trimmed, unless it came in a chat call.
    pub prompt: String,
    /// The model's answer; present exactly when completed.
    pub response: Option<String>,
    /// The model that is asked or has answered, as its upstream names it; `mock` for the built-in
    /// one.
    pub model: String,
    /// Its state.
    pub status: PromptStatus,
    /// Why it failed; present exactly when failed.
    pub error: Option<FailureCode>,
    /// When the post was accepted.
    pub created_at: Timestamp,
    /// Details of the call that answered it.
    pub call: CallDetails,
}

/// Details of the call that answered a prompt. Each part is present only if the upstream reported
/// it, or the service measured it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallDetails {
    /// Why the answer ended, in the upstream's word.
    pub finish_reason: Option<String>,
    /// Tokens of the prompt as the upstream counted them.
    pub prompt_tokens: Option<u32>,
    /// Tokens of the answer as the upstream counted them.
    pub completion_tokens: Option<u32>,
    /// How long the upstream took, in milliseconds.
    pub duration_ms: Option<u32>,
    /// What the call cost; `None` where no price is known.
    pub cost: Option<Picodollars>,
}

impl Prompt {
    /// Bytes of the prompt and its answer together.
    pub fn text_bytes(&self) -> usize {
        self.prompt.len() + self.response.as_ref().map_or(0, String::len)
    }
}

/// What is kept of a chat call beside the texts of its prompt. Each part is JSON, without NUL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTexts {
    /// The request's messages: an array. Of media inside them only type, size and SHA-256.
    pub messages: String,
    /// The request's other members: an object.
    pub request: String,
    /// The labels that the caller gave it and may change: an object of strings.
    pub metadata: String,
    /// The whole answer, as OpenAI's object `chat.completion`, once there is one.
    pub answer: Option<String>,
}

impl ChatTexts {
    /// Bytes of all parts together.
    pub fn text_bytes(&self) -> usize {
        self.messages.len()
            + self.request.len()
            + self.metadata.len()
            + self.answer.as_ref().map_or(0, String::len)
    }
}
