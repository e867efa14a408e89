//! The failures of an attempt, and what follows from each.

use std::time::Duration;

use crate::domain::FailureCode;
use crate::llm::Failure;

/// The wait for a client if the upstream has named none: long enough for a restart, short enough
/// for a person.
const DEFAULT_WAIT: Duration = Duration::from_secs(5);

const UNAVAILABLE: &str = "The upstream is unavailable.";

/// Why an attempt gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// No connection: name, network or TLS.
    Connect,
    /// No connection in time.
    ConnectTimeout,
    /// The connection broke before the head of the answer.
    Broken {
        /// Whether it broke too soon for the upstream to have worked.
        is_early: bool,
    },
    /// A status other than success.
    Status(u16),
    /// The first token of a streamed answer did not come in time.
    FirstTokenTimeout,
    /// An answer that had begun stopped coming.
    TokenTimeout,
    /// A whole answer did not come within its time, which is shorter while another upstream can be
    /// asked.
    AnswerTimeout,
    /// The time for the whole call is over.
    TotalTimeout,
    /// An answer that had begun was cut off.
    Truncated,
    /// The answer is not what the protocol says: no HTTP, no JSON, no choice, or no text.
    Malformed,
    /// The answer is compressed, which was not requested.
    Encoded,
    /// The answer has more bytes than the limit.
    TooLong,
    /// An `error` object came in place of an answer, or in the middle of one.
    ErrorObject,
}

/// The failure of an attempt, with what the upstream says about retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What happened.
    pub kind: FaultKind,
    /// The upstream's `Retry-After`.
    pub retry_after: Option<Duration>,
    /// The upstream's `x-should-retry`.
    pub should_retry: Option<bool>,
}

impl From<FaultKind> for Fault {
    fn from(kind: FaultKind) -> Self {
        Self {
            kind,
            retry_after: None,
            should_retry: None,
        }
    }
}

impl Fault {
    /// Whether a retry at the same upstream makes sense: it may have been busy or restarting. There
    /// is no retry if the upstream has begun to answer or may have worked for a while, because that
    /// was paid for.
    pub fn is_retryable(&self) -> bool {
        self.should_retry.unwrap_or(matches!(
            self.kind,
            FaultKind::Connect
                | FaultKind::ConnectTimeout
                | FaultKind::Broken { is_early: true }
                | FaultKind::Status(408 | 409 | 429 | 500 | 502..=599)
        ))
    }

    /// Whether another upstream may succeed. Not if the request itself is wrong, or no time is
    /// left. A chat request may be too large for one upstream and not for another, and no upstream
    /// takes it in another media type; a prompt is sent as the service writes it.
    pub fn may_succeed_elsewhere(&self, is_chat: bool) -> bool {
        match self.kind {
            FaultKind::Status(400 | 422) | FaultKind::TotalTimeout | FaultKind::TooLong => false,
            FaultKind::Status(413) => is_chat,
            FaultKind::Status(415) => !is_chat,
            FaultKind::Connect
            | FaultKind::ConnectTimeout
            | FaultKind::Broken { .. }
            | FaultKind::Status(_)
            | FaultKind::FirstTokenTimeout
            | FaultKind::TokenTimeout
            | FaultKind::AnswerTimeout
            | FaultKind::Truncated
            | FaultKind::Malformed
            | FaultKind::Encoded
            | FaultKind::ErrorObject => true,
        }
    }

    /// Whether the caller of a chat request is told what the upstream says: the request is wrong,
    /// its model is unknown, or there were too many requests. Other refusals concern the operator.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self.kind,
            FaultKind::Status(400 | 404 | 413 | 415 | 422 | 429)
        )
    }

    /// Whether this is a failure of the upstream as a whole. A refusal (429 too) shows that it
    /// works.
    pub fn is_outage(&self) -> bool {
        !matches!(
            self.kind,
            FaultKind::TooLong | FaultKind::Status(400..=407 | 409..=499)
        )
    }

    /// Whether the attempt may have cost money. Not if there was no connection, if it was dead
    /// already, or if a status says that there is no answer.
    pub fn may_have_cost(&self) -> bool {
        !matches!(
            self.kind,
            FaultKind::Connect
                | FaultKind::ConnectTimeout
                | FaultKind::Broken { is_early: true }
                | FaultKind::Status(_)
        )
    }

    /// Whether the operator has to correct something: the key, the address or the model.
    pub fn is_misconfiguration(&self) -> bool {
        matches!(self.kind, FaultKind::Status(300..=399 | 401 | 403 | 404))
    }

    /// The word under which this is counted and logged: one of a few, whatever the upstream sends.
    pub fn error_type(&self) -> &'static str {
        match self.kind {
            FaultKind::Connect => "connect",
            FaultKind::ConnectTimeout => "connect_timeout",
            FaultKind::Broken { .. } => "connection_broken",
            FaultKind::Status(status) => status_word(status),
            FaultKind::FirstTokenTimeout => "first_token_timeout",
            FaultKind::TokenTimeout => "token_timeout",
            FaultKind::AnswerTimeout => "answer_timeout",
            FaultKind::TotalTimeout => "total_timeout",
            FaultKind::Truncated => "truncated",
            FaultKind::Malformed => "malformed",
            FaultKind::Encoded => "encoded",
            FaultKind::TooLong => "too_long",
            FaultKind::ErrorObject => "error_object",
        }
    }

    /// What the client of this service gets.
    pub fn into_failure(self) -> Failure {
        let unavailable = |detail| (FailureCode::UpstreamUnavailable, detail);
        let failed = |detail| (FailureCode::UpstreamFailed, detail);
        let (code, detail) = match self.kind {
            FaultKind::Status(429) => unavailable("The upstream has too many requests."),
            FaultKind::Status(503 | 529) => unavailable(UNAVAILABLE),
            FaultKind::ConnectTimeout
            | FaultKind::FirstTokenTimeout
            | FaultKind::TokenTimeout
            | FaultKind::AnswerTimeout
            | FaultKind::TotalTimeout
            | FaultKind::Status(504) => (
                FailureCode::UpstreamTimeout,
                "The upstream did not answer in time.",
            ),
            FaultKind::Connect => failed("The upstream could not be reached."),
            FaultKind::Broken { .. } | FaultKind::Truncated => {
                failed("The upstream's answer broke off.")
            }
            FaultKind::Status(_) | FaultKind::ErrorObject => {
                failed("The upstream answered with an error.")
            }
            FaultKind::Malformed | FaultKind::Encoded => {
                failed("The upstream's answer could not be understood.")
            }
            FaultKind::TooLong => failed("The upstream's answer is too long."),
        };
        let default = (code == FailureCode::UpstreamUnavailable).then_some(DEFAULT_WAIT);
        Failure {
            code,
            detail,
            retry_after: self.retry_after.or(default),
            upstream_error: None,
            attempts: Vec::new(),
        }
    }
}

/// No upstream may be asked: all breakers are open. The first one closes after `wait`.
pub fn all_open(wait: Duration) -> Failure {
    Failure {
        code: FailureCode::UpstreamUnavailable,
        detail: UNAVAILABLE,
        retry_after: Some(wait),
        upstream_error: None,
        attempts: Vec::new(),
    }
}

fn status_word(status: u16) -> &'static str {
    const COUNTED_APART: [&str; 14] = [
        "400", "401", "403", "404", "408", "409", "413", "422", "429", "500", "502", "503", "504",
        "529",
    ];
    let mut words = COUNTED_APART.into_iter();
    let word = words.find(|word| word.parse() == Ok(status));
    word.unwrap_or(match status / 100 {
        3 => "3xx",
        4 => "4xx",
        5 => "5xx",
        _ => "other_status",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(status: u16) -> Fault {
        FaultKind::Status(status).into()
    }

    #[test]
    fn only_passing_failures_are_retried() {
        for code in [408, 409, 429, 500, 502, 503, 504, 529] {
            assert!(status(code).is_retryable(), "{code}");
        }
        for code in [301, 400, 401, 403, 404, 413, 422, 451, 501] {
            assert!(!status(code).is_retryable(), "{code}");
        }
        assert!(!Fault::from(FaultKind::Truncated).is_retryable());
        for is_early in [true, false] {
            let broken = Fault::from(FaultKind::Broken { is_early });
            assert_eq!(broken.is_retryable(), is_early);
            assert!(broken.may_succeed_elsewhere(false) && broken.is_outage());
        }
        let hung = Fault::from(FaultKind::AnswerTimeout);
        assert!(!hung.is_retryable() && hung.may_succeed_elsewhere(false) && hung.is_outage());
    }

    #[test]
    fn a_refusal_is_no_outage() {
        for code in [400, 401, 404, 422, 429] {
            assert!(!status(code).is_outage(), "{code}");
        }
        for code in [302, 408, 500, 503] {
            assert!(status(code).is_outage(), "{code}");
        }
    }

    #[test]
    fn each_fault_has_its_code_and_unavailable_ones_a_wait() {
        for (code, expected) in [
            (401, FailureCode::UpstreamFailed),
            (418, FailureCode::UpstreamFailed),
            (500, FailureCode::UpstreamFailed),
            (429, FailureCode::UpstreamUnavailable),
            (503, FailureCode::UpstreamUnavailable),
            (504, FailureCode::UpstreamTimeout),
        ] {
            let failure = status(code).into_failure();
            assert_eq!(failure.code, expected, "{code}");
            let waits = failure.retry_after.is_some();
            assert_eq!(waits, expected == FailureCode::UpstreamUnavailable);
        }
        let wish = Fault {
            retry_after: Some(Duration::from_secs(77)),
            ..status(429)
        };
        assert_eq!(
            wish.into_failure().retry_after,
            Some(Duration::from_secs(77))
        );
    }
}
