//! How often a user may ask, and how OpenAI's clients learn of it.

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue};

use crate::api::authenticate::key_rates;
use crate::api::error::ApiError;
use crate::api::state::AppState;
use crate::error::Error;
use crate::services::accounts::Caller;
use crate::throttle::ThrottleDecision;

/// The throttle's decision on a request, once there is one, for the headers of its response.
#[derive(Clone, Default)]
pub struct Limits(Arc<OnceLock<ThrottleDecision>>);

impl<S: Sync> FromRequestParts<S> for Limits {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        // Without the layer around the routes, no headers are written.
        Ok(parts.extensions.get::<Self>().cloned().unwrap_or_default())
    }
}

impl Limits {
    /// Asks the throttle for one request of the caller's: of its user, and of its API key.
    ///
    /// # Errors
    /// 429.
    pub async fn admit(&self, state: &AppState, caller: &Caller) -> Result<(), ApiError> {
        let (user_id, now) = (caller.user_id(), Instant::now());
        let decision = match key_rates(caller) {
            Some(api_key) => state.v1_throttle.check_with(user_id, api_key, now).await,
            None => state.v1_throttle.check(user_id, now).await,
        };
        let refused = decision.retry_after;
        // Set once: a request is counted once.
        let _ = self.0.set(decision);
        match refused {
            None => Ok(()),
            Some(wait) => {
                state.metrics.throttled.with_label_values(&["v1"]).inc();
                Err(Error::RateLimited(wait).into())
            }
        }
    }

    /// Adds what is left of the tightest rate.
    pub fn apply_headers(&self, headers: &mut HeaderMap) {
        let Some(decision) = self.0.get() else {
            return;
        };
        let Some(rate) = decision.tightest() else {
            return;
        };
        let reset = decision.retry_after.unwrap_or(rate.reset_after);
        for (name, value) in [
            (
                "x-ratelimit-limit-requests",
                HeaderValue::from(rate.rate.limit),
            ),
            (
                "x-ratelimit-remaining-requests",
                HeaderValue::from(rate.remaining),
            ),
            ("x-ratelimit-reset-requests", duration(reset)),
        ] {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
}

/// A length of time as OpenAI writes it: `120ms`, `6s`, `1m30s`. Rounded up.
fn duration(length: Duration) -> HeaderValue {
    let millis = length.as_nanos().div_ceil(1_000_000);
    let text = match millis {
        0..1000 => format!("{millis}ms"),
        _ => {
            let seconds = millis.div_ceil(1000);
            let (minutes, seconds) = (seconds / 60, seconds % 60);
            match (minutes, seconds) {
                (0, seconds) => format!("{seconds}s"),
                (minutes, seconds) => format!("{minutes}m{seconds}s"),
            }
        }
    };
    HeaderValue::from_str(&text).expect("digits and letters are a header value")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_are_written_as_openai_writes_them() {
        for (millis, text) in [
            (0, "0ms"),
            (120, "120ms"),
            (999, "999ms"),
            (1_000, "1s"),
            (5_001, "6s"),
            (90_000, "1m30s"),
        ] {
            assert_eq!(duration(Duration::from_millis(millis)), text);
        }
        assert_eq!(duration(Duration::from_micros(1)), "1ms");
    }
}
