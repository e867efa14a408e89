//! Exact sliding windows that several replicas share, in Redis and on its clock.

use std::fmt::Display;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::{RateStatus, SlidingWindows, Throttle, ThrottleDecision};
use crate::domain::Rates;
use crate::redis::{Connection, Error, Script};
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
    redis: Connection,
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
        redis: Connection,
        limit: &'static str,
        rates: Rates,
        epoch: Instant,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            redis,
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
        self.redis
            .last_outage_end()
            .is_some_and(|back| now.saturating_duration_since(back) < longest)
    }

    async fn ask(
        &self,
        key: K,
        take: bool,
        patience: Duration,
    ) -> Result<Option<ThrottleDecision>, Error> {
        let name = self
            .redis
            .key(format_args!("throttle:{}:{{{key}}}", self.limit));
        let mut call = self.script.on(&name);
        call.arg(u8::from(take));
        for rate in self.rates.as_slice() {
            call.arg(rate.limit).arg(micros(rate.window()));
        }
        let command = if take { "throttle" } else { "throttle_peek" };
        let answer: Vec<u64> = self.redis.run(command, patience, &call).await?;
        Ok(decision(&self.rates, take, &answer))
    }

    /// The answer, or `None` where this replica has to decide by itself.
    async fn answer(&self, key: K, take: bool, patience: Duration) -> Option<ThrottleDecision> {
        self.ask(key, take, patience).await.ok().flatten()
    }

    fn degraded(&self) {
        self.metrics
            .degraded_decisions
            .with_label_values(&[self.limit])
            .inc();
    }
}

/// Reads the script's answer; `None` if it is none of its answers, which something in between may make of it: that must not
/// count as allowed.
fn decision(rates: &Rates, take: bool, answer: &[u64]) -> Option<ThrottleDecision> {
    let (allowed, standings) = answer.split_first()?;
    if standings.len() != 2 * rates.as_slice().len() {
        return None;
    }
    let allowed = *allowed == 1;
    let rates: Vec<RateStatus> = rates
        .as_slice()
        .iter()
        .zip(standings.chunks_exact(2))
        .map(|(&rate, standing)| RateStatus {
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
    // A refusal without a time to wait would pass for leave.
    (!take || allowed || retry_after.is_some()).then_some(ThrottleDecision { retry_after, rates })
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[async_trait]
impl<K: Copy + Ord + Hash + Display + Send + Sync> Throttle<K> for RedisThrottle<K> {
    async fn check(&self, key: K, now: Instant) -> ThrottleDecision {
        if self.rates.as_slice().is_empty() {
            return ThrottleDecision::default();
        }
        if self.is_recovering(now) {
            let own = self.local.peek(key, now);
            if !own.is_allowed() {
                self.degraded();
                return own;
            }
        }
        match self.answer(key, true, self.redis.patience()).await {
            Some(decision) => {
                if decision.is_allowed() {
                    // Only noted, for the case that Redis goes away.
                    self.local.check(key, now);
                }
                decision
            }
            // A request whose answer did not come may have been counted there; then it counts twice, here and there.
            None => {
                self.degraded();
                self.local.check(key, now)
            }
        }
    }

    async fn peek(&self, key: K, now: Instant) -> ThrottleDecision {
        if self.rates.as_slice().is_empty() {
            return ThrottleDecision::default();
        }
        match self.answer(key, false, PEEK_PATIENCE).await {
            Some(decision) => decision,
            None => self.local.peek(key, now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_another_shape_decide_nothing() {
        let rates: Rates = "1/s,10/min".parse().unwrap();
        for answer in [
            &[][..],
            &[1],
            &[0],
            &[1, 1, 5],
            &[0, 0, 5, 0, 5],
            &[1, 1, 5, 1, 5, 1],
        ] {
            assert!(decision(&rates, true, answer).is_none(), "{answer:?}");
        }
        let allowed = decision(&rates, true, &[1, 1, 5, 1, 5]).unwrap();
        assert!(allowed.is_allowed());
        let refused = decision(&rates, true, &[0, 1, 5, 1, 9]).unwrap();
        assert_eq!(refused.retry_after, Some(Duration::from_micros(5)));
    }
}
