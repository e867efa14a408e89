//! What a client of an upstream tells of itself. Names come from the configuration, never from an answer.

use std::time::Duration;

/// What an operation ran on, by the words under which it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked<'a> {
    /// The upstream's kind.
    pub provider: &'a str,
    /// The model that was asked for.
    pub model: &'a str,
}

/// Where a circuit breaker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Calls go through.
    Closed,
    /// Its time is over: a call now and then tries whether the upstream is well again.
    HalfOpen,
    /// No call goes through.
    Open,
}

/// Something worth counting.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event<'a> {
    /// An operation is known, though it never ran yet: its series may be made.
    Announced(Asked<'a>),
    /// A call took its place among those in flight.
    Admitted,
    /// A call gave its place back.
    Left,
    /// A call was refused because too many were in flight.
    Refused,
    /// The first text of a streamed answer came, so long after the call began.
    FirstToken(Asked<'a>, Duration),
    /// A call ended.
    Ended {
        /// What was asked last.
        asked: Asked<'a>,
        /// From its beginning, with retries and fallbacks.
        duration: Duration,
        /// What went wrong, if it failed: one of a few words.
        error_type: Option<&'static str>,
        /// Tokens of the question.
        prompt_tokens: Option<u32>,
        /// Tokens of the answer.
        completion_tokens: Option<u32>,
    },
    /// An upstream is asked again.
    Retried {
        /// Which: `primary`, `fallback-1`, …
        upstream: &'a str,
        /// What went wrong: one of a few words.
        error_type: &'static str,
    },
    /// Events of an answer could not be read and were left out.
    Skipped {
        /// Whose: `primary`, `fallback-1`, …
        upstream: &'a str,
        /// How many.
        events: u64,
    },
    /// A breaker's state, at the start and whenever it changes.
    Breaker {
        /// Which: `primary`, `fallback-1`, …
        upstream: &'a str,
        /// Where it stands.
        state: BreakerState,
    },
}

/// Receives events, on the async threads; to be quick about it.
pub trait Observer: Send + Sync + 'static {
    /// Notes one event.
    fn observe(&self, event: Event<'_>);
}

/// Takes no notice.
pub(super) struct Unobserved;

impl Observer for Unobserved {
    fn observe(&self, _: Event<'_>) {}
}
