//! Exact sliding windows in the memory of this process.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher, Hash};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::{Mutex, MutexGuard};

use super::{RateStatus, Throttle, ThrottleDecision};
use crate::domain::Rates;

/// Keys are spread over this many locks, so that threads on a few dozen cores seldom wait for each
/// other.
const SHARDS: usize = 16;
/// The most idle keys that one request removes: more than the one key it may add, so that idle keys
/// run out, and few enough (some 10 µs) that no request waits long after a crowd has left.
const REMOVED_PER_REQUEST: usize = 32;

/// Nanoseconds since the epoch of the [`SlidingWindows`]. 64 bits last for 584 years.
type Nanos = u64;

/// Remembers, for each key, the instants of its requests within the longest window.
///
/// Memory: one entry for each key that was allowed a request within the longest window, of about
/// 100 bytes and 8 bytes for each request remembered, of which there are never more than the limit
/// of the rate with the longest window. Time of a check: logarithmic in that number, for each rate.
#[derive(Debug)]
pub struct SlidingWindows<K> {
    rates: Rates,
    /// The longest window.
    longest: Nanos,
    epoch: Instant,
    spread: RandomState,
    shards: [Mutex<Shard<K>>; SHARDS],
}

#[derive(Debug)]
struct Shard<K> {
    /// The instants of each key's allowed requests, rising.
    requests: HashMap<K, VecDeque<Nanos>>,
    /// The last instant of every key in `requests`: the keys that are idle for longest come first.
    by_last: BTreeSet<(Nanos, K)>,
}

impl<K: Copy + Ord + Hash> SlidingWindows<K> {
    /// Nothing is counted yet. `epoch`: no later than any `now` to come; earlier ones are taken for
    /// it.
    pub fn new(rates: Rates, epoch: Instant) -> Self {
        Self {
            longest: rates.longest_window().map_or(0, nanos),
            rates,
            epoch,
            spread: RandomState::new(),
            shards: std::array::from_fn(|_| {
                Mutex::new(Shard {
                    requests: HashMap::new(),
                    by_last: BTreeSet::new(),
                })
            }),
        }
    }

    /// Asks for one request of `key`, and counts it if all rates allow it.
    ///
    /// Callers read their clock before they call this, so `now` may be earlier than an instant
    /// already counted for the key. Such a request is counted at the later instant, which is when
    /// it is decided.
    pub fn check(&self, key: K, now: Instant) -> ThrottleDecision {
        if self.rates.as_slice().is_empty() {
            return ThrottleDecision::default();
        }
        let now = self.since_epoch(now);
        let mut shard = self.shard(&key);
        shard.remove_idle(self.longest, now);
        let requests = shard.requests.entry(key).or_default();
        let last = requests.back().copied();
        let now = last.map_or(now, |last| last.max(now));
        remove_older(requests, self.longest, now);
        let mut decision = self.decide(requests, now);
        if decision.is_allowed() {
            requests.push_back(now);
            decision = self.after_request(requests, now);
            if let Some(last) = last {
                shard.by_last.remove(&(last, key));
            }
            shard.by_last.insert((now, key));
        }
        decision
    }

    /// The state of the rates of `key`; counts nothing.
    pub fn peek(&self, key: K, now: Instant) -> ThrottleDecision {
        let now = self.since_epoch(now);
        let shard = self.shard(&key);
        match shard.requests.get(&key) {
            Some(requests) => {
                let now = requests.back().map_or(now, |&last| last.max(now));
                self.decide(requests, now)
            }
            None => self.decide(&VecDeque::new(), now),
        }
    }

    /// Keys remembered at the moment: those active within the longest window, and some that have
    /// not been removed yet.
    pub fn tracked_keys(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| shard.lock().requests.len())
            .sum()
    }

    /// The state of the rates, and how long a request has to wait for those that are used up.
    fn decide(&self, requests: &VecDeque<Nanos>, now: Nanos) -> ThrottleDecision {
        let rates = self.states(requests, now);
        // Requests leave their windows and none is added until the retry. So once the last rate
        // that is used up allows a request, all do. A full window holds exactly `limit` requests,
        // so one is allowed again when the oldest has left.
        let retry_after = rates
            .iter()
            .filter(|state| state.remaining == 0)
            .map(|state| state.reset_after)
            .max();
        ThrottleDecision { retry_after, rates }
    }

    /// The decision on a request that was allowed and is in `requests` now.
    fn after_request(&self, requests: &VecDeque<Nanos>, now: Nanos) -> ThrottleDecision {
        ThrottleDecision {
            retry_after: None,
            rates: self.states(requests, now),
        }
    }

    fn states(&self, requests: &VecDeque<Nanos>, now: Nanos) -> Vec<RateStatus> {
        self.rates
            .as_slice()
            .iter()
            .map(|&rate| {
                let window = nanos(rate.window());
                let gone = requests.partition_point(|&at| now - at >= window);
                let used = u32::try_from(requests.len() - gone).unwrap_or(u32::MAX);
                let oldest = requests.get(gone);
                RateStatus {
                    rate,
                    remaining: rate.limit.saturating_sub(used),
                    reset_after: oldest.map_or(rate.window(), |&at| {
                        Duration::from_nanos(window - (now - at))
                    }),
                }
            })
            .collect()
    }

    fn since_epoch(&self, now: Instant) -> Nanos {
        nanos(now.saturating_duration_since(self.epoch))
    }

    fn shard(&self, key: &K) -> MutexGuard<'_, Shard<K>> {
        self.shards[self.index(key)].lock()
    }

    fn index(&self, key: &K) -> usize {
        usize::try_from(self.spread.hash_one(key) % SHARDS as u64).unwrap_or(0)
    }
}

impl<K: Copy + Ord + Hash> Shard<K> {
    /// Removes keys whose last request has left the longest window.
    fn remove_idle(&mut self, longest: Nanos, now: Nanos) {
        for _ in 0..REMOVED_PER_REQUEST {
            let Some(&(last, key)) = self.by_last.first() else {
                break;
            };
            // A racing request may have been counted at a later instant than `now`.
            if now.saturating_sub(last) < longest {
                break;
            }
            self.by_last.pop_first();
            self.requests.remove(&key);
        }
        if self.requests.capacity() > 64 && self.requests.capacity() / 8 > self.requests.len() {
            self.requests.shrink_to(self.requests.len() * 2);
        }
    }
}

/// Removes the instants that have left the longest window, and frees the memory of a burst.
fn remove_older(requests: &mut VecDeque<Nanos>, longest: Nanos, now: Nanos) {
    let gone = requests.partition_point(|&at| now - at >= longest);
    requests.drain(..gone);
    if requests.capacity() > 64 && requests.capacity() / 8 > requests.len() {
        requests.shrink_to(requests.len() * 2);
    }
}

fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[async_trait]
impl<K: Copy + Ord + Hash + Send + Sync> Throttle<K> for SlidingWindows<K> {
    async fn check(&self, key: K, now: Instant) -> ThrottleDecision {
        self.check(key, now)
    }

    async fn peek(&self, key: K, now: Instant) -> ThrottleDecision {
        self.peek(key, now)
    }
}

#[cfg(test)]
mod tests;
