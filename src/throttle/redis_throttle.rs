//! Exact sliding windows that several replicas share, in Redis and on its clock.

use std::fmt::Display;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::{RateState, SlidingWindows, Throttle, Verdict};
use crate::domain::Rates;
use crate::redis::{Error, Link, Script};
use crate::telemetry::Metrics;

/// The one step over all rates, and the look at them. Begins where `now` is known.
const WINDOWS: &str = include_str!("redis_throttle.lua");
/// How long a look may take. It only fills a header, and must not hold up answers because Redis is slow.
const PEEK_PATIENCE: Duration = Duration::from_millis(100);

/// Windows in Redis for one purpose: each key's requests in one sorted set, of about 100 bytes a request and never more of them
/// than the limit of the rate with the longest window, which expires with that window.
///
/// While Redis is away each replica keeps the same limits by itself. Its own windows know what it let through before, and for
/// one longest window after Redis's return they are asked too: what was let through meanwhile counts, and so does what a Redis
/// that came back empty has forgotten.
pub struct RedisThrottle<K> {
    link: Link,
    limit: &'static str,
    rates: Rates,
    script: Script,
    local: SlidingWindows<K>,
    metrics: Arc<Metrics>,
}

impl<K: Copy + Ord + Hash + Display + Send + Sync> RedisThrottle<K> {
    /// Windows of that name, which tells their keys from others' and names them in the metrics. `epoch`: no later than any
    /// `now` to come.
    pub fn new(
        link: Link,
        limit: &'static str,
        rates: Rates,
        epoch: Instant,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            link,
            limit,
            script: Script::with_clock(WINDOWS),
            local: SlidingWindows::new(rates.clone(), epoch),
            rates,
            metrics,
        }
    }

    /// Whether requests let through before Redis's return may be unknown to it.
    fn is_recovering(&self, now: Instant) -> bool {
        let longest = self.rates.longest_window().unwrap_or_default();
        self.link
            .back_at()
            .is_some_and(|back| now.saturating_duration_since(back) < longest)
    }

    async fn ask(&self, key: K, take: bool, patience: Duration) -> Result<Verdict, Error> {
        let name = self
            .link
            .key(format_args!("throttle:{}:{{{key}}}", self.limit));
        let mut call = self.script.on(&name);
        call.arg(u8::from(take));
        for rate in self.rates.as_slice() {
            call.arg(rate.limit).arg(micros(rate.window()));
        }
        let command = if take { "throttle" } else { "throttle_peek" };
        let answer: Vec<u64> = self.link.run(command, patience, &call).await?;
        Ok(verdict(&self.rates, take, &answer))
    }

    fn degraded(&self) {
        self.metrics
            .degraded_decisions
            .with_label_values(&[self.limit])
            .inc();
    }
}

/// Reads the script's answer.
fn verdict(rates: &Rates, take: bool, answer: &[u64]) -> Verdict {
    let (allowed, standings) = match answer {
        [allowed, standings @ ..] => (*allowed == 1, standings),
        [] => (false, [].as_slice()),
    };
    let rates: Vec<RateState> = rates
        .as_slice()
        .iter()
        .zip(standings.chunks_exact(2))
        .map(|(&rate, standing)| RateState {
            rate,
            remaining: rate
                .limit
                .saturating_sub(u32::try_from(standing[0]).unwrap_or(u32::MAX)),
            reset_after: Duration::from_micros(standing[1]),
        })
        .collect();
    // As in the process: when the last rate that is used up allows a request, all do.
    let used_up = rates.iter().filter(|state| state.remaining == 0);
    let retry_after = if take && allowed {
        None
    } else {
        used_up.map(|state| state.reset_after).max()
    };
    Verdict { retry_after, rates }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[async_trait]
impl<K: Copy + Ord + Hash + Display + Send + Sync> Throttle<K> for RedisThrottle<K> {
    async fn check(&self, key: K, now: Instant) -> Verdict {
        if self.rates.as_slice().is_empty() {
            return Verdict::default();
        }
        if self.is_recovering(now) {
            let own = self.local.peek(key, now);
            if !own.is_allowed() {
                self.degraded();
                return own;
            }
        }
        match self.ask(key, true, self.link.patience()).await {
            Ok(verdict) => {
                if verdict.is_allowed() {
                    // Only noted, for the case that Redis goes away.
                    self.local.check(key, now);
                }
                verdict
            }
            // A request whose answer did not come may have been counted there; then it counts twice, here and there.
            Err(_) => {
                self.degraded();
                self.local.check(key, now)
            }
        }
    }

    async fn peek(&self, key: K, now: Instant) -> Verdict {
        if self.rates.as_slice().is_empty() {
            return Verdict::default();
        }
        match self.ask(key, false, PEEK_PATIENCE).await {
            Ok(verdict) => verdict,
            Err(_) => self.local.peek(key, now),
        }
    }
}
