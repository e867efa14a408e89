//! Limits how often a user may post prompts: exact sliding windows over any number of rates,
//! decided in one step.

mod redis_throttle;
mod sliding_windows;

use std::time::{Duration, Instant};

use async_trait::async_trait;

use crate::domain::{ApiKeyId, Rate, Rates, UserId};

pub use redis_throttle::RedisThrottle;
pub use sliding_windows::{KeyWindows, SlidingWindows};

/// Counts the requests of each key, usually a user, against a set of
/// [`Rates`].
///
/// Exact: in no window of any rate are more requests allowed than the rate's limit, however many
/// callers race. A window is half-open, so two requests exactly one window apart do not share one.
/// `now` is the caller's monotonic clock; an implementation that shares its state between processes
/// uses the clock of the shared store instead. A throttle never fails: while it cannot reach the
/// shared state, it keeps the same limits by itself.
#[async_trait]
pub trait Throttle<K = UserId>: Send + Sync {
    /// Asks for one request, and counts it if all rates allow it. One atomic step: a request that
    /// one rate refuses uses up none of the others. If the future is dropped before it is done, the
    /// request may or may not have been counted.
    async fn check(&self, key: K, now: Instant) -> ThrottleDecision;

    /// What [`check`](Self::check) would return for the rates now; counts nothing.
    async fn peek(&self, key: K, now: Instant) -> ThrottleDecision;

    /// Does what [`check`](Self::check) does for a request that comes with an API key, whose rates
    /// hold too. All rates of both are one atomic step: a request that one of them refuses uses up
    /// none of the others. Throttles that share the requests of API keys count them together.
    async fn check_with(&self, key: K, api_key: KeyRates<'_>, now: Instant) -> ThrottleDecision;

    /// What [`check_with`](Self::check_with) would return for the rates now; counts nothing.
    async fn peek_with(&self, key: K, api_key: KeyRates<'_>, now: Instant) -> ThrottleDecision;
}

/// The rates of an API key, which hold in addition to those of its user. After a change of the
/// rates, requests count for the new windows as far back as the old ones remembered them.
#[derive(Clone, Copy, Debug)]
pub struct KeyRates<'a> {
    /// The key.
    pub id: ApiKeyId,
    /// Its rates.
    pub rates: &'a Rates,
}

/// Whose requests a rate counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RateSubject {
    /// Those of the throttle's own key: a user, or a client site.
    Caller,
    /// Those of an API key.
    ApiKey,
}

impl RateSubject {
    /// What the names of its rates begin with in the `RateLimit` headers.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Caller => "",
            Self::ApiKey => "key-",
        }
    }
}

/// The state of one rate after a request was counted or refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateStatus {
    /// Whose requests it counts.
    pub subject: RateSubject,
    /// The rate.
    pub rate: Rate,
    /// Requests left in the window that ends now.
    pub remaining: u32,
    /// Until the oldest counted request leaves the window; the whole window if none is in it.
    pub reset_after: Duration,
}

/// Whether a request is allowed, and the state of all rates.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ThrottleDecision {
    /// `None` if the request is allowed; else the time until all rates would allow one.
    pub retry_after: Option<Duration>,
    /// Every rate, by rising window, those of an API key after the others; empty without rates.
    pub rates: Vec<RateStatus>,
}

impl ThrottleDecision {
    /// Whether the request may go on.
    pub fn is_allowed(&self) -> bool {
        self.retry_after.is_none()
    }

    /// Both decisions as one.
    fn and(mut self, other: Self) -> Self {
        self.retry_after = self.retry_after.max(other.retry_after);
        self.rates.extend(other.rates);
        self
    }

    /// The rate with the smallest share of its limit left; if several have the same share, the one
    /// with the longest window. `None` without rates.
    pub fn tightest(&self) -> Option<&RateStatus> {
        self.rates.iter().min_by(|a, b| {
            let share =
                |x: &RateStatus, y: &RateStatus| u64::from(x.remaining) * u64::from(y.rate.limit);
            let shares = share(a, b).cmp(&share(b, a));
            shares.then(b.rate.unit.cmp(&a.rate.unit))
        })
    }

    /// The value of the `RateLimit` header for the tightest rate, such as `"minute";r=9;t=54`;
    /// `None` without rates. `t` is `Retry-After` for a refused request, else the whole seconds
    /// until the oldest counted request leaves the window.
    pub fn ratelimit(&self) -> Option<String> {
        let state = self.tightest()?;
        let t = seconds_rounded_up(self.retry_after.unwrap_or(state.reset_after));
        let (prefix, name) = (state.subject.prefix(), state.rate.unit.name());
        Some(format!("\"{prefix}{name}\";r={};t={t}", state.remaining))
    }
}

fn seconds_rounded_up(duration: Duration) -> u64 {
    duration
        .as_secs()
        .saturating_add(u64::from(duration.subsec_nanos() > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(
        rates: &str,
        states: &[(u32, u64)],
        retry_after_ms: Option<u64>,
    ) -> ThrottleDecision {
        let rates: Rates = rates.parse().unwrap();
        ThrottleDecision {
            retry_after: retry_after_ms.map(Duration::from_millis),
            rates: rates
                .as_slice()
                .iter()
                .zip(states)
                .map(|(&rate, &(remaining, reset_ms))| RateStatus {
                    subject: RateSubject::Caller,
                    rate,
                    remaining,
                    reset_after: Duration::from_millis(reset_ms),
                })
                .collect(),
        }
    }

    #[test]
    fn header_names_the_rate_with_the_least_share_left() {
        let idle = decision("2/s,10/min", &[(2, 1000), (9, 53_001)], None);
        assert_eq!(idle.ratelimit().unwrap(), r#""minute";r=9;t=54"#);
        let busy = decision("2/s,10/min", &[(1, 1000), (9, 53_001)], None);
        assert_eq!(busy.ratelimit().unwrap(), r#""second";r=1;t=1"#);
    }

    #[test]
    fn header_of_equals_names_the_longer_window() {
        let unused = decision("1/s,10/min", &[(1, 1000), (10, 60_000)], None);
        assert_eq!(unused.ratelimit().unwrap(), r#""minute";r=10;t=60"#);
        let used_up = decision(
            "1/s,10/min,100/h",
            &[(0, 1000), (0, 7_000), (90, 9_000)],
            None,
        );
        assert_eq!(used_up.ratelimit().unwrap(), r#""minute";r=0;t=7"#);
    }

    #[test]
    fn header_names_the_rate_of_an_api_key_if_that_is_the_tightest() {
        let of_key = |rates: &str, states: &[(u32, u64)]| {
            let mut decision = decision(rates, states, None);
            for state in &mut decision.rates {
                state.subject = RateSubject::ApiKey;
            }
            decision
        };
        let user = decision("10/min", &[(5, 9_000)], None);
        let both = user.clone().and(of_key("4/min", &[(1, 7_000)]));
        assert_eq!(both.ratelimit().unwrap(), r#""key-minute";r=1;t=7"#);
        let both = user.clone().and(of_key("4/s", &[(3, 900)]));
        assert_eq!(both.ratelimit().unwrap(), r#""minute";r=5;t=9"#);
        // Of equals the longer window counts, whosever it is.
        let both = user.and(of_key("100/day", &[(50, 3_600_000)]));
        assert_eq!(both.ratelimit().unwrap(), r#""key-day";r=50;t=3600"#);
    }

    #[test]
    fn header_of_a_refused_request_says_when_to_retry() {
        let refused = decision("1/s,10/min", &[(0, 300), (0, 41_100)], Some(41_100));
        assert!(!refused.is_allowed());
        assert_eq!(refused.ratelimit().unwrap(), r#""minute";r=0;t=42"#);
    }

    #[test]
    fn whole_seconds_are_not_rounded_up() {
        for (retry_after_ms, seconds) in [(1, 1), (999, 1), (1000, 1), (1001, 2)] {
            let refused = decision("1/s", &[(0, 1000)], Some(retry_after_ms));
            let header = format!("\"second\";r=0;t={seconds}");
            assert_eq!(refused.ratelimit().unwrap(), header);
        }
    }

    #[test]
    fn no_rates_give_no_headers() {
        assert!(ThrottleDecision::default().is_allowed());
        assert_eq!(ThrottleDecision::default().ratelimit(), None);
    }
}
