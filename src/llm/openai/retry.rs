//! Retries: how long to wait, how many there may be, and what the upstream says about them.

use std::time::{Duration, Instant, SystemTime};

use hyper::HeaderMap;
use hyper::header::RETRY_AFTER;
use parking_lot::Mutex;

/// The longest wait before the first retry. It doubles with each further one, up to
/// [`LONGEST_BACKOFF`].
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const LONGEST_BACKOFF: Duration = Duration::from_secs(8);
/// The longest `Retry-After` that is taken seriously. Longer ones count as this.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(86_400);

/// How long to wait before retry number `retry`, counted from 1. Full jitter: anything up to the
/// bound, by `chance` from 0 to 1, so that calls that failed together are not retried together. If
/// the upstream `requested` a wait, that is the shortest, with up to a tenth on top. Source:
/// Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
pub fn backoff(retry: u32, requested: Option<Duration>, chance: f64) -> Duration {
    let chance = chance.clamp(0.0, 1.0);
    match requested {
        Some(wait) => wait + wait.min(LONGEST_BACKOFF).mul_f64(chance / 10.0),
        None => FIRST_BACKOFF
            .saturating_mul(1 << retry.saturating_sub(1).min(10))
            .min(LONGEST_BACKOFF)
            .mul_f64(chance),
    }
}

/// When to retry, by the headers of an answer: `retry-after-ms` (OpenAI's, finer), otherwise
/// `Retry-After`, in seconds or as a date. `None` if they have nothing that can be read, and if
/// they say "now": after a failure it is better to wait.
pub fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let number = |text: &str| {
        let number: f64 = text.parse().ok()?;
        (number.is_finite() && number >= 0.0).then_some(number)
    };
    let milliseconds = text("retry-after-ms").and_then(number);
    let wait = match milliseconds.filter(|ms| *ms > 0.0) {
        Some(ms) => seconds(ms / 1000.0),
        None => {
            let wait = text(RETRY_AFTER.as_str())?;
            match number(wait) {
                Some(wait) => seconds(wait),
                None => httpdate::parse_http_date(wait)
                    .ok()?
                    .duration_since(now)
                    .ok()?,
            }
        }
    };
    Some(wait.min(MAX_RETRY_AFTER)).filter(|wait| !wait.is_zero())
}

/// Whether a retry makes sense, by the header `x-should-retry` of an answer, whatever its status.
pub fn should_retry(headers: &HeaderMap) -> Option<bool> {
    let said = headers.get("x-should-retry")?.to_str().ok()?.trim();
    said.to_ascii_lowercase().parse().ok()
}

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.min(MAX_RETRY_AFTER.as_secs_f64()))
}

/// How many retries there may be: a tenth of the calls, and another one every ten seconds. So
/// retries cannot multiply the load of an upstream that is down already.
#[derive(Debug)]
pub struct RetryBudget(Mutex<Bucket>);

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    filled_at: Instant,
}

/// Retries that may come at once after a quiet time.
const CAPACITY: f64 = 10.0;
const PER_CALL: f64 = 0.1;
const PER_SECOND: f64 = 0.1;

impl RetryBudget {
    /// A full budget.
    pub fn new(now: Instant) -> Self {
        Self(Mutex::new(Bucket {
            tokens: CAPACITY,
            filled_at: now,
        }))
    }

    /// Notes the first attempt of a call.
    pub fn note_call(&self) {
        let mut bucket = self.0.lock();
        bucket.tokens = (bucket.tokens + PER_CALL).min(CAPACITY);
    }

    /// Takes one retry. Returns false if there is none.
    pub fn take(&self, now: Instant) -> bool {
        let mut bucket = self.0.lock();
        let passed = now.saturating_duration_since(bucket.filled_at);
        bucket.filled_at = bucket.filled_at.max(now);
        bucket.tokens = (bucket.tokens + passed.as_secs_f64() * PER_SECOND).min(CAPACITY);
        let is_allowed = bucket.tokens >= 1.0;
        if is_allowed {
            bucket.tokens -= 1.0;
        }
        is_allowed
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::{HeaderName, HeaderValue};

    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const S: Duration = Duration::from_secs(1);

    #[test]
    fn waits_double_up_to_a_limit_and_are_spread_over_it() {
        assert_eq!(backoff(1, None, 0.0), Duration::ZERO);
        let longest: Vec<_> = (1..=7).map(|retry| backoff(retry, None, 1.0)).collect();
        assert_eq!(
            longest,
            [500, 1000, 2000, 4000, 8000, 8000, 8000].map(|ms| ms * MS)
        );
        assert_eq!(backoff(u32::MAX, None, 1.0), 8 * S);
    }

    #[test]
    fn x_should_retry_is_read_and_other_words_are_ignored() {
        for (said, meaning) in [
            ("true", Some(true)),
            (" False ", Some(false)),
            ("1", None),
            ("", None),
        ] {
            let value = HeaderValue::from_str(said).unwrap();
            let headers =
                HeaderMap::from_iter([(HeaderName::from_static("x-should-retry"), value)]);
            assert_eq!(should_retry(&headers), meaning, "{said:?}");
        }
        assert_eq!(should_retry(&HeaderMap::new()), None);
    }

    #[test]
    fn a_requested_wait_is_never_shortened() {
        assert_eq!(backoff(1, Some(3 * S), 0.0), 3 * S);
        assert_eq!(backoff(1, Some(3 * S), 1.0), 3300 * MS);
    }

    fn requested(headers: &[(&'static str, &str)], now: SystemTime) -> Option<Duration> {
        let headers = headers.iter().map(|(name, value)| {
            let value = HeaderValue::from_str(value).unwrap();
            (HeaderName::from_static(name), value)
        });
        retry_after(&headers.collect(), now)
    }

    #[test]
    fn retry_after_is_read_in_seconds_in_milliseconds_and_as_a_date() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let date = "Sun, 06 Nov 1994 08:49:47 GMT";
        for (headers, expected) in [
            (&[("retry-after", "7")][..], Some(7 * S)),
            (&[("retry-after", " 1.5 ")], Some(1500 * MS)),
            (
                &[("retry-after", "7"), ("retry-after-ms", "250")],
                Some(250 * MS),
            ),
            (
                &[("retry-after", "7"), ("retry-after-ms", "soon")],
                Some(7 * S),
            ),
            (&[("retry-after", date)], Some(10 * S)),
            (&[("retry-after", "Sun, 06 Nov 1994 08:00:00 GMT")], None),
            (&[("retry-after", "0")], None),
            (&[("retry-after", "-0.0"), ("retry-after-ms", "0")], None),
            (&[("retry-after", "1e300")], Some(86_400 * S)),
            (&[("retry-after", "-1")], None),
            (&[("retry-after", "NaN")], None),
            (&[("retry-after", "soon")], None),
            (&[], None),
        ] {
            assert_eq!(requested(headers, now), expected, "{headers:?}");
        }
    }

    #[test]
    fn retries_stay_a_tenth_of_the_calls_once_the_first_ten_are_spent() {
        let now = Instant::now();
        let budget = RetryBudget::new(now);
        let mut retries = 0;
        for _ in 0..1000 {
            budget.note_call();
            retries += u32::from(budget.take(now));
        }
        assert!((100..=111).contains(&retries), "{retries}");
    }

    #[test]
    fn a_quiet_service_gets_a_retry_every_ten_seconds() {
        let now = Instant::now();
        let budget = RetryBudget::new(now);
        while budget.take(now) {}
        assert!(!budget.take(now + 9 * S));
        assert!(budget.take(now + 11 * S));
        assert!(!budget.take(now + 12 * S));
        assert!(!budget.take(now), "time that goes backwards gives nothing");
    }
}
