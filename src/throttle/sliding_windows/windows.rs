//! The instants of requests, by key. Which rates they are compared with, each call says.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher, Hash};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use crate::domain::Rates;
use crate::throttle::{RateStatus, RateSubject, ThrottleDecision};

/// Keys are spread over this many locks, so that threads on a few dozen cores seldom wait for each
/// other.
const SHARDS: usize = 16;
/// The most idle keys that one request removes: more than the one key it may add, so that idle keys
/// run out, and few enough (some 10 µs) that no request waits long after a crowd has left.
const REMOVED_PER_REQUEST: usize = 32;

/// Nanoseconds since the epoch of the [`Windows`]. 64 bits last for 584 years.
pub(super) type Nanos = u64;

/// Remembers, for each key, the instants of its allowed requests within the longest window.
#[derive(Debug)]
pub struct Windows<K> {
    subject: RateSubject,
    epoch: Instant,
    spread: RandomState,
    pub(super) shards: [Mutex<Shard<K>>; SHARDS],
}

#[derive(Debug)]
pub(super) struct Shard<K> {
    /// What is remembered of each key.
    pub(super) requests: HashMap<K, Requests>,
    /// When every key in `requests` is idle: those that are idle first come first.
    by_expiry: BTreeSet<(Nanos, K)>,
}

/// The allowed requests of one key.
#[derive(Debug, Default)]
pub(super) struct Requests {
    /// Their instants, rising.
    pub(super) instants: VecDeque<Nanos>,
    /// When the last of them leaves the longest window.
    expires: Nanos,
}

impl<K: Copy + Ord + Hash> Windows<K> {
    /// Nothing is counted yet. `epoch`: no later than any `now` to come; earlier ones are taken for
    /// it.
    pub fn new(subject: RateSubject, epoch: Instant) -> Self {
        Self {
            subject,
            epoch,
            spread: RandomState::new(),
            shards: std::array::from_fn(|_| {
                Mutex::new(Shard {
                    requests: HashMap::new(),
                    by_expiry: BTreeSet::new(),
                })
            }),
        }
    }

    /// Locks the requests of a key, to decide on one of them at `now`.
    ///
    /// Callers read their clock before they call this, so `now` may be earlier than an instant
    /// already counted for the key. Such a request is counted at the later instant, which is when
    /// it is decided.
    pub(super) fn lock<'a>(&'a self, key: K, rates: &'a Rates, now: Instant) -> Locked<'a, K> {
        let now = nanos(now.saturating_duration_since(self.epoch));
        let shard = self.shards[self.index(&key)].lock();
        let requests = shard.requests.get(&key);
        let last = requests.and_then(|requests| requests.instants.back());
        Locked {
            subject: self.subject,
            now: last.map_or(now, |&last| last.max(now)),
            shard,
            key,
            rates,
            longest: rates.longest_window().map_or(0, nanos),
        }
    }

    pub(super) fn index(&self, key: &K) -> usize {
        usize::try_from(self.spread.hash_one(key) % SHARDS as u64).unwrap_or(0)
    }
}

/// The requests of one key, which nobody else reads or changes meanwhile.
pub(super) struct Locked<'a, K> {
    subject: RateSubject,
    shard: MutexGuard<'a, Shard<K>>,
    key: K,
    rates: &'a Rates,
    longest: Nanos,
    now: Nanos,
}

impl<K: Copy + Ord + Hash> Locked<'_, K> {
    /// Forgets requests that have left the longest window, and keys that are idle.
    pub fn tidy(&mut self) {
        self.shard.remove_idle(self.now);
        if let Some(requests) = self.shard.requests.get_mut(&self.key) {
            remove_older(&mut requests.instants, self.longest, self.now);
        }
    }

    /// The state of the rates, and how long a request has to wait for those that are used up.
    pub fn decide(&self) -> ThrottleDecision {
        let rates = self.states();
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

    /// Counts the request.
    pub fn take(&mut self) {
        let (shard, key) = (&mut *self.shard, self.key);
        let requests = shard.requests.entry(key).or_default();
        shard.by_expiry.remove(&(requests.expires, key));
        requests.instants.push_back(self.now);
        requests.expires = self.now.saturating_add(self.longest);
        shard.by_expiry.insert((requests.expires, key));
    }

    /// The state of each rate.
    pub fn states(&self) -> Vec<RateStatus> {
        let none = VecDeque::new();
        let requests = self.shard.requests.get(&self.key);
        let instants = requests.map_or(&none, |requests| &requests.instants);
        self.rates
            .as_slice()
            .iter()
            .map(|&rate| {
                let window = nanos(rate.window());
                let gone = instants.partition_point(|&at| self.now - at >= window);
                let used = u32::try_from(instants.len() - gone).unwrap_or(u32::MAX);
                let oldest = instants.get(gone);
                RateStatus {
                    subject: self.subject,
                    rate,
                    remaining: rate.limit.saturating_sub(used),
                    reset_after: oldest.map_or(rate.window(), |&at| {
                        Duration::from_nanos(window - (self.now - at))
                    }),
                }
            })
            .collect()
    }
}

impl<K: Copy + Ord + Hash> Shard<K> {
    /// Removes keys whose last request has left the longest window.
    fn remove_idle(&mut self, now: Nanos) {
        for _ in 0..REMOVED_PER_REQUEST {
            let Some(&(expires, key)) = self.by_expiry.first() else {
                break;
            };
            // A time at the end of the range was capped, and may be later.
            if now < expires || expires == Nanos::MAX {
                break;
            }
            self.by_expiry.pop_first();
            self.requests.remove(&key);
        }
        if self.requests.capacity() > 64 && self.requests.capacity() / 8 > self.requests.len() {
            self.requests.shrink_to(self.requests.len() * 2);
        }
    }
}

/// Removes the instants that have left the longest window, and frees the memory of a burst.
fn remove_older(instants: &mut VecDeque<Nanos>, longest: Nanos, now: Nanos) {
    let gone = instants.partition_point(|&at| now - at >= longest);
    instants.drain(..gone);
    if instants.capacity() > 64 && instants.capacity() / 8 > instants.len() {
        instants.shrink_to(instants.len() * 2);
    }
}

pub(super) fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
