//! Exact sliding windows that several replicas share, in Redis and on its clock.

use std::fmt::Display;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::{
    KeyRates, KeyWindows, RateStatus, RateSubject, SlidingWindows, Throttle, ThrottleDecision,
};
use crate::domain::Rates;
use crate::redis::{Connection, Error, Script, micros, script_with_clock};
use crate::telemetry::Metrics;

/// The script that decides over all rates in one step, and reads their state. It begins where `now`
/// is known.
const WINDOWS: &str = include_str!("redis_throttle.lua");
/// How long reading the state may take. It only fills a header, and must not delay responses
/// because Redis is slow.
const PEEK_PATIENCE: Duration = Duration::from_millis(100);

/// Windows in Redis for one purpose. Each key's requests are one sorted set of about 100 bytes a
/// request, with never more requests than the limit of the rate with the longest window. The set
/// expires with that window.
///
/// While Redis is unavailable, each replica keeps the same limits by itself. Its own windows know
/// what it has allowed before. For one longest window after Redis's return they are asked too: so
/// requests that were allowed meanwhile count, and so do those that a Redis has forgotten which
/// came back empty.
pub struct RedisThrottle<K> {
    redis: Connection,
    limit: &'static str,
    rates: Rates,
    script: Script,
    local: SlidingWindows<K>,
    metrics: Arc<Metrics>,
}

impl<K: Copy + Ord + Hash + Display + Send + Sync> RedisThrottle<K> {
    /// Windows of that name, which is part of their keys and names them in the metrics. `epoch`: no
    /// later than any `now` to come.
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
            script: script_with_clock(WINDOWS),
            local: SlidingWindows::new(rates.clone(), epoch),
            rates,
            metrics,
        }
    }

    /// The same, with the requests of API keys in common with other throttles, also while Redis is
    /// unavailable. In Redis they always are.
    pub fn sharing(self, api_keys: &Arc<KeyWindows>) -> Self {
        let local = self.local.sharing(api_keys);
        Self { local, ..self }
    }

    /// Whether Redis may not know requests that were allowed before its return.
    fn is_recovering(&self, api_key: Option<KeyRates<'_>>, now: Instant) -> bool {
        let of_key = api_key.and_then(|api_key| api_key.rates.longest_window());
        let longest = self.rates.longest_window().max(of_key).unwrap_or_default();
        self.redis
            .last_outage_end()
            .is_some_and(|back| now.saturating_duration_since(back) < longest)
    }

    async fn ask(
        &self,
        key: K,
        api_key: Option<KeyRates<'_>>,
        take: bool,
        patience: Duration,
    ) -> Result<Option<ThrottleDecision>, Error> {
        // Both have the hash tag of the user, so one script may touch both.
        let own = self
            .redis
            .key(format_args!("throttle:{}:{{{key}}}", self.limit));
        let of_key = api_key.map(|api_key| {
            let name = self
                .redis
                .key(format_args!("throttle:api-key:{{{key}}}:{}", api_key.id));
            (RateSubject::ApiKey, name, api_key.rates)
        });
        let subjects: Vec<_> = std::iter::once((RateSubject::Caller, own, &self.rates))
            .chain(of_key)
            .filter(|(_, _, rates)| !rates.as_slice().is_empty())
            .collect();
        let mut call = self.script.prepare_invoke();
        call.arg(u8::from(take));
        for (_, name, rates) in &subjects {
            call.key(name).arg(rates.as_slice().len());
            for rate in rates.as_slice() {
                call.arg(rate.limit).arg(micros(rate.window()));
            }
        }
        let command = if take { "throttle" } else { "throttle_peek" };
        let answer: Vec<u64> = self.redis.run(command, patience, &call).await?;
        let rates = subjects
            .iter()
            .map(|(subject, _, rates)| (*subject, *rates));
        Ok(parse_decision(rates, take, &answer))
    }

    /// The decision of Redis, or `None` if this replica has to decide by itself.
    async fn decide(
        &self,
        key: K,
        api_key: Option<KeyRates<'_>>,
        take: bool,
        patience: Duration,
    ) -> Option<ThrottleDecision> {
        let asked = self.ask(key, api_key, take, patience).await;
        asked.ok().flatten()
    }

    /// Whether no rate holds.
    fn is_off(&self, api_key: Option<KeyRates<'_>>) -> bool {
        let of_key = api_key.is_none_or(|api_key| api_key.rates.as_slice().is_empty());
        of_key && self.rates.as_slice().is_empty()
    }

    fn check_here(&self, key: K, api_key: Option<KeyRates<'_>>, now: Instant) -> ThrottleDecision {
        match api_key {
            Some(api_key) => self.local.check_with(key, api_key, now),
            None => self.local.check(key, now),
        }
    }

    fn peek_here(&self, key: K, api_key: Option<KeyRates<'_>>, now: Instant) -> ThrottleDecision {
        match api_key {
            Some(api_key) => self.local.peek_with(key, api_key, now),
            None => self.local.peek(key, now),
        }
    }

    async fn check_both(
        &self,
        key: K,
        api_key: Option<KeyRates<'_>>,
        now: Instant,
    ) -> ThrottleDecision {
        if self.is_off(api_key) {
            return ThrottleDecision::default();
        }
        if self.is_recovering(api_key, now) {
            let here = self.peek_here(key, api_key, now);
            if !here.is_allowed() {
                self.degraded();
                return here;
            }
        }
        let patience = self.redis.patience();
        match self.decide(key, api_key, true, patience).await {
            Some(decision) => {
                if decision.is_allowed() {
                    // Only recorded, for the case that Redis becomes unavailable.
                    self.check_here(key, api_key, now);
                }
                decision
            }
            // A request whose reply did not arrive may have been counted by Redis. Then it counts
            // twice, there and here.
            None => {
                self.degraded();
                self.check_here(key, api_key, now)
            }
        }
    }

    async fn peek_both(
        &self,
        key: K,
        api_key: Option<KeyRates<'_>>,
        now: Instant,
    ) -> ThrottleDecision {
        if self.is_off(api_key) {
            return ThrottleDecision::default();
        }
        let asked = self.decide(key, api_key, false, PEEK_PATIENCE).await;
        asked.unwrap_or_else(|| self.peek_here(key, api_key, now))
    }

    fn degraded(&self) {
        self.metrics
            .degraded_decisions
            .with_label_values(&[self.limit])
            .inc();
    }
}

/// Reads the script's reply about these subjects' rates. `None` if the reply has another form,
/// which a proxy in between may cause: it must not count as allowed.
fn parse_decision<'a>(
    subjects: impl IntoIterator<Item = (RateSubject, &'a Rates)>,
    take: bool,
    answer: &[u64],
) -> Option<ThrottleDecision> {
    let (allowed, states) = answer.split_first()?;
    let rates: Vec<_> = subjects
        .into_iter()
        .flat_map(|(subject, rates)| rates.as_slice().iter().map(move |rate| (subject, *rate)))
        .collect();
    if states.len() != 2 * rates.len() {
        return None;
    }
    let allowed = *allowed == 1;
    let rates: Vec<RateStatus> = rates
        .into_iter()
        .zip(states.chunks_exact(2))
        .map(|((subject, rate), state)| RateStatus {
            subject,
            rate,
            remaining: rate
                .limit
                .saturating_sub(u32::try_from(state[0]).unwrap_or(u32::MAX)),
            reset_after: Duration::from_micros(state[1]),
        })
        .collect();
    // As in the process: when the last rate that is used up allows a request, all do.
    let used_up = rates.iter().filter(|state| state.remaining == 0);
    let retry_after = if take && allowed {
        None
    } else {
        used_up.map(|state| state.reset_after).max()
    };
    // A refusal without a time to wait would count as allowed.
    (!take || allowed || retry_after.is_some()).then_some(ThrottleDecision { retry_after, rates })
}

#[async_trait]
impl<K: Copy + Ord + Hash + Display + Send + Sync> Throttle<K> for RedisThrottle<K> {
    async fn check(&self, key: K, now: Instant) -> ThrottleDecision {
        self.check_both(key, None, now).await
    }

    async fn peek(&self, key: K, now: Instant) -> ThrottleDecision {
        self.peek_both(key, None, now).await
    }

    async fn check_with(&self, key: K, api_key: KeyRates<'_>, now: Instant) -> ThrottleDecision {
        self.check_both(key, Some(api_key), now).await
    }

    async fn peek_with(&self, key: K, api_key: KeyRates<'_>, now: Instant) -> ThrottleDecision {
        self.peek_both(key, Some(api_key), now).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reply_of_another_form_decides_nothing() {
        let rates: Rates = "1/s,10/min".parse().unwrap();
        let parse = |answer: &[u64]| parse_decision([(RateSubject::Caller, &rates)], true, answer);
        for answer in [
            &[][..],
            &[1],
            &[0],
            &[1, 1, 5],
            &[0, 0, 5, 0, 5],
            &[1, 1, 5, 1, 5, 1],
        ] {
            assert!(parse(answer).is_none(), "{answer:?}");
        }
        let allowed = parse(&[1, 1, 5, 1, 5]).unwrap();
        assert!(allowed.is_allowed());
        let refused = parse(&[0, 1, 5, 1, 9]).unwrap();
        assert_eq!(refused.retry_after, Some(Duration::from_micros(5)));
    }
}
