//! Exact sliding windows in the memory of this process.

mod windows;

use std::hash::Hash;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;

use self::windows::Windows;
use super::{KeyRates, RateSubject, Throttle, ThrottleDecision};
use crate::domain::{ApiKeyId, Rates};

/// The requests of API keys. The throttles of several front doors share one of these, so that a
/// key's rates hold over all of them together.
pub type KeyWindows = Windows<ApiKeyId>;

/// Remembers, for each key, the instants of its requests within the longest window.
///
/// Memory: one entry for each key that was allowed a request within the longest window, of about
/// 100 bytes and 8 bytes for each request remembered, of which there are never more than the limit
/// of the rate with the longest window. Time of a check: logarithmic in that number, for each rate.
#[derive(Debug)]
pub struct SlidingWindows<K> {
    rates: Rates,
    own: Windows<K>,
    api_keys: Arc<KeyWindows>,
}

impl<K: Copy + Ord + Hash> SlidingWindows<K> {
    /// Nothing is counted yet. `epoch`: no later than any `now` to come; earlier ones are taken for
    /// it.
    pub fn new(rates: Rates, epoch: Instant) -> Self {
        let api_keys = Arc::new(KeyWindows::new(RateSubject::ApiKey, epoch));
        Self {
            rates,
            own: Windows::new(RateSubject::Caller, epoch),
            api_keys,
        }
    }

    /// The same, with the requests of API keys in common with other throttles.
    pub fn sharing(self, api_keys: &Arc<KeyWindows>) -> Self {
        let api_keys = Arc::clone(api_keys);
        Self { api_keys, ..self }
    }

    /// Asks for one request of `key`, and counts it if all rates allow it.
    pub fn check(&self, key: K, now: Instant) -> ThrottleDecision {
        if self.rates.as_slice().is_empty() {
            return ThrottleDecision::default();
        }
        let mut own = self.own.lock(key, &self.rates, now);
        own.tidy();
        let mut decision = own.decide();
        if decision.is_allowed() {
            own.take();
            decision.rates = own.states();
        }
        decision
    }

    /// The state of the rates of `key`; counts nothing.
    pub fn peek(&self, key: K, now: Instant) -> ThrottleDecision {
        self.own.lock(key, &self.rates, now).decide()
    }

    /// Asks for one request of `key` with an API key, and counts it with both if all rates allow
    /// it.
    pub fn check_with(&self, key: K, api_key: KeyRates<'_>, now: Instant) -> ThrottleDecision {
        if api_key.rates.as_slice().is_empty() {
            return self.check(key, now);
        }
        // Always in this order, so that no two threads wait for each other.
        let mut own = self.own.lock(key, &self.rates, now);
        let mut of_key = self.api_keys.lock(api_key.id, api_key.rates, now);
        own.tidy();
        of_key.tidy();
        let mut decision = own.decide().and(of_key.decide());
        if decision.is_allowed() {
            if !self.rates.as_slice().is_empty() {
                own.take();
            }
            of_key.take();
            decision.rates = own.states();
            decision.rates.extend(of_key.states());
        }
        decision
    }

    /// The state of the rates of `key` and of an API key; counts nothing.
    pub fn peek_with(&self, key: K, api_key: KeyRates<'_>, now: Instant) -> ThrottleDecision {
        let own = self.peek(key, now);
        let of_key = self.api_keys.lock(api_key.id, api_key.rates, now).decide();
        own.and(of_key)
    }
}

#[async_trait]
impl<K: Copy + Ord + Hash + Send + Sync> Throttle<K> for SlidingWindows<K> {
    async fn check(&self, key: K, now: Instant) -> ThrottleDecision {
        self.check(key, now)
    }

    async fn peek(&self, key: K, now: Instant) -> ThrottleDecision {
        self.peek(key, now)
    }

    async fn check_with(&self, key: K, api_key: KeyRates<'_>, now: Instant) -> ThrottleDecision {
        self.check_with(key, api_key, now)
    }

    async fn peek_with(&self, key: K, api_key: KeyRates<'_>, now: Instant) -> ThrottleDecision {
        self.peek_with(key, api_key, now)
    }
}

#[cfg(test)]
mod tests;
