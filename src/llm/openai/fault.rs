//! What can go wrong with one attempt, and what follows from it.

use std::time::Duration;

use crate::domain::FailureCode;
use crate::llm::Failure;

/// What a caller is told to wait where the upstream did not say: long enough for a restart, short enough for a person.
const DEFAULT_WAIT: Duration = Duration::from_secs(5);

/// Why an attempt gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No connection: name, network or TLS.
    Connect,
    /// No connection in time.
    ConnectTimeout,
    /// The connection broke before the answer's head.
    Broken {
        /// Whether it did so too soon for work to have been lost.
        is_early: bool,
    },
    /// A status that is no success.
    Status(u16),
    /// A streamed answer's first token did not come in time.
    FirstTokenTimeout,
    /// An answer that had begun fell silent.
    TokenTimeout,
    /// A whole answer did not come in the time that it has while another upstream can be asked.
    AnswerTimeout,
    /// The time for the whole call is over.
    TotalTimeout,
    /// An answer that had begun broke off.
    Truncated,
    /// Not what the protocol says: no HTTP, no JSON, no choice, no text.
    Malformed,
    /// Compressed, which was not asked for.
    Encoded,
    /// More than the limit of bytes.
    TooLong,
    /// An `error` object in place of an answer, or in the middle of one.
    ErrorObject,
}

/// An attempt's failure, with the upstream's wish for when to come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What happened.
    pub kind: Kind,
    /// What the upstream's `Retry-After` says.
    pub retry_after: Option<Duration>,
    /// What its `x-should-retry` says.
    pub should_retry: Option<bool>,
}

impl From<Kind> for Fault {
    fn from(kind: Kind) -> Self {
        Self {
            kind,
            retry_after: None,
            should_retry: None,
        }
    }
}

impl Kind {
    /// Whether it may have passed by the next attempt.
    fn may_pass(self) -> bool {
        match self {
            Kind::Connect | Kind::ConnectTimeout => true,
            Kind::Broken { is_early } => is_early,
            Kind::Status(501) => false,
            Kind::Status(status) => matches!(status, 408 | 409 | 429 | 500..=599),
            Kind::FirstTokenTimeout
            | Kind::TokenTimeout
            | Kind::AnswerTimeout
            | Kind::TotalTimeout
            | Kind::Truncated
            | Kind::Malformed
            | Kind::Encoded
            | Kind::TooLong
            | Kind::ErrorObject => false,
        }
    }
}

impl Fault {
    /// Whether the same upstream may do better when asked again: it may have been busy or
    /// restarting. What it has begun to answer is not asked for again, nor what it may have worked
    /// on for a while: that was paid for.
    pub fn is_retryable(&self) -> bool {
        self.should_retry.unwrap_or_else(|| self.kind.may_pass())
    }

    /// Whether another upstream may do better: not where the request itself is at fault, or time is over.
    pub fn may_mend_elsewhere(&self) -> bool {
        !matches!(
            self.kind,
            Kind::Status(400 | 413 | 422) | Kind::TotalTimeout | Kind::TooLong
        )
    }

    /// Whether this says that the upstream is ill. A refusal (429 too) shows that it is there and answers.
    pub fn is_outage(&self) -> bool {
        match self.kind {
            Kind::Status(status) => !(400..500).contains(&status) || status == 408,
            Kind::TooLong => false,
            Kind::Connect
            | Kind::ConnectTimeout
            | Kind::Broken { .. }
            | Kind::FirstTokenTimeout
            | Kind::TokenTimeout
            | Kind::AnswerTimeout
            | Kind::TotalTimeout
            | Kind::Truncated
            | Kind::Malformed
            | Kind::Encoded
            | Kind::ErrorObject => true,
        }
    }

    /// Whether the operator has to correct something: the key, the address or the model.
    pub fn is_misconfiguration(&self) -> bool {
        matches!(self.kind, Kind::Status(300..=399 | 401 | 403 | 404))
    }

    /// The word under which this is counted and logged; few words, whatever the upstream sends.
    pub fn error_type(&self) -> &'static str {
        match self.kind {
            Kind::Connect => "connect",
            Kind::ConnectTimeout => "connect_timeout",
            Kind::Broken { .. } => "connection_broken",
            Kind::Status(status) => status_word(status),
            Kind::FirstTokenTimeout => "first_token_timeout",
            Kind::TokenTimeout => "token_timeout",
            Kind::AnswerTimeout => "answer_timeout",
            Kind::TotalTimeout => "total_timeout",
            Kind::Truncated => "truncated",
            Kind::Malformed => "malformed",
            Kind::Encoded => "encoded",
            Kind::TooLong => "too_long",
            Kind::ErrorObject => "error_object",
        }
    }

    /// What the caller of the service is told.
    pub fn into_failure(self) -> Failure {
        let (code, detail) = match self.kind {
            Kind::Status(429) => (
                FailureCode::UpstreamUnavailable,
                "The upstream has too many requests.",
            ),
            Kind::Status(503 | 529) => (
                FailureCode::UpstreamUnavailable,
                "The upstream is unavailable.",
            ),
            Kind::ConnectTimeout
            | Kind::FirstTokenTimeout
            | Kind::TokenTimeout
            | Kind::AnswerTimeout
            | Kind::TotalTimeout
            | Kind::Status(504) => (
                FailureCode::UpstreamTimeout,
                "The upstream did not answer in time.",
            ),
            Kind::Connect => (
                FailureCode::UpstreamFailed,
                "The upstream could not be reached.",
            ),
            Kind::Broken { .. } | Kind::Truncated => (
                FailureCode::UpstreamFailed,
                "The upstream's answer broke off.",
            ),
            Kind::Status(_) | Kind::ErrorObject => (
                FailureCode::UpstreamFailed,
                "The upstream answered with an error.",
            ),
            Kind::Malformed | Kind::Encoded => (
                FailureCode::UpstreamFailed,
                "The upstream's answer could not be understood.",
            ),
            Kind::TooLong => (
                FailureCode::UpstreamFailed,
                "The upstream's answer is too long.",
            ),
        };
        let default = (code == FailureCode::UpstreamUnavailable).then_some(DEFAULT_WAIT);
        Failure {
            code,
            detail,
            retry_after: self.retry_after.or(default),
        }
    }
}

/// No upstream may be asked: all breakers are open, the first for `wait` more.
pub fn all_open(wait: Duration) -> Failure {
    Failure {
        code: FailureCode::UpstreamUnavailable,
        detail: "The upstream is unavailable.",
        retry_after: Some(wait),
    }
}

fn status_word(status: u16) -> &'static str {
    match status {
        400 => "400",
        401 => "401",
        403 => "403",
        404 => "404",
        408 => "408",
        409 => "409",
        413 => "413",
        422 => "422",
        429 => "429",
        500 => "500",
        502 => "502",
        503 => "503",
        504 => "504",
        529 => "529",
        _ => match status / 100 {
            3 => "3xx",
            4 => "4xx",
            5 => "5xx",
            _ => "other_status",
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(status: u16) -> Fault {
        Kind::Status(status).into()
    }

    #[test]
    fn only_what_may_pass_is_asked_again() {
        for code in [408, 409, 429, 500, 502, 503, 504, 529] {
            assert!(status(code).is_retryable(), "{code}");
        }
        for code in [301, 400, 401, 403, 404, 413, 422, 451, 501] {
            assert!(!status(code).is_retryable(), "{code}");
        }
        assert!(!Fault::from(Kind::Truncated).is_retryable());
        for is_early in [true, false] {
            let broken = Fault::from(Kind::Broken { is_early });
            assert_eq!(broken.is_retryable(), is_early);
            assert!(broken.may_mend_elsewhere() && broken.is_outage());
        }
        let hung = Fault::from(Kind::AnswerTimeout);
        assert!(!hung.is_retryable() && hung.may_mend_elsewhere() && hung.is_outage());
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
    fn each_failure_has_its_code_and_unavailable_ones_a_wait() {
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
