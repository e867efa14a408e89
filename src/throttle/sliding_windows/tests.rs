//! Compares the sliding windows with a count of every request ever allowed.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use super::windows::{Nanos, nanos};
use super::*;
use crate::domain::UserId;
use crate::throttle::RateStatus;

/// Keeps every allowed request and counts them all at each call.
struct Oracle {
    rates: Rates,
    allowed: HashMap<u8, Vec<Nanos>>,
}

impl Oracle {
    fn used(&self, key: u8, window: Nanos, now: Nanos) -> Vec<Nanos> {
        let all = self.allowed.get(&key).cloned().unwrap_or_default();
        all.into_iter().filter(|&at| at + window > now).collect()
    }

    fn would_allow(&self, key: u8, now: Nanos) -> bool {
        self.rates
            .as_slice()
            .iter()
            .all(|rate| self.used(key, nanos(rate.window()), now).len() < rate.limit as usize)
    }

    fn check(&mut self, key: u8, now: Nanos) -> bool {
        let allowed = self.would_allow(key, now);
        if allowed {
            self.allowed.entry(key).or_default().push(now);
        }
        allowed
    }

    fn states(&self, key: u8, now: Nanos) -> Vec<RateStatus> {
        let state = |&rate: &crate::domain::Rate| {
            let window = nanos(rate.window());
            let used = self.used(key, window, now);
            RateStatus {
                subject: RateSubject::Caller,
                rate,
                remaining: rate.limit - u32::try_from(used.len()).unwrap(),
                reset_after: used
                    .iter()
                    .min()
                    .map_or(rate.window(), |&at| Duration::from_nanos(at + window - now)),
            }
        };
        self.rates.as_slice().iter().map(state).collect()
    }
}

/// Keys that are remembered, idle ones that have not been removed yet included.
fn tracked_keys<K>(windows: &SlidingWindows<K>) -> usize {
    let shards = windows.own.shards.iter();
    shards.map(|shard| shard.lock().requests.len()).sum()
}

fn windows<K: Copy + Ord + Hash>(rates: &str) -> (SlidingWindows<K>, Instant) {
    let epoch = Instant::now();
    (SlidingWindows::new(rates.parse().unwrap(), epoch), epoch)
}

fn any_rates() -> impl Strategy<Value = Rates> {
    prop::collection::vec(
        (1_u32..6, prop::sample::select(vec!["s", "min", "h", "day"])),
        1..5,
    )
    .prop_map(|parts| {
        let parts: Vec<_> = parts
            .iter()
            .map(|(limit, unit)| format!("{limit}/{unit}"))
            .collect();
        parts.join(",").parse().unwrap()
    })
}

/// Pauses between requests: none, short ones, and those that end within two nanoseconds of a
/// window's end.
fn any_pause() -> impl Strategy<Value = Nanos> {
    let window = prop::sample::select(vec![1_u64, 60, 3_600, 86_400]);
    prop_oneof![
        2 => Just(0),
        4 => 0..400_000_000_u64,
        2 => 0..30_000_000_000_u64,
        2 => (window, 0_u64..4).prop_map(|(seconds, off)| seconds * 1_000_000_000 + off - 2),
    ]
}

proptest! {
    #[test]
    fn every_decision_agrees_with_a_full_count(
        rates in any_rates(),
        arrivals in prop::collection::vec((any_pause(), 0_u8..3), 1..120),
    ) {
        let epoch = Instant::now();
        let windows = SlidingWindows::new(rates.clone(), epoch);
        let mut oracle = Oracle { rates, allowed: HashMap::new() };
        let mut now = 0;
        for (pause, key) in arrivals {
            now += pause;
            let at = |offset: Nanos| epoch + Duration::from_nanos(now + offset);
            prop_assert_eq!(windows.peek(key, at(0)).is_allowed(), oracle.would_allow(key, now));
            let allowed = oracle.check(key, now);
            let decision = windows.check(key, at(0));
            prop_assert_eq!(decision.is_allowed(), allowed);
            prop_assert_eq!(&decision.rates, &oracle.states(key, now));
            prop_assert_eq!(windows.peek(key, at(0)).rates, decision.rates);
            if let Some(wait) = decision.retry_after {
                // The wait is the shortest that helps.
                let wait = nanos(wait);
                prop_assert!(oracle.would_allow(key, now + wait));
                prop_assert!(!oracle.would_allow(key, now + wait - 1));
                prop_assert!(windows.peek(key, at(wait)).is_allowed());
                prop_assert!(!windows.peek(key, at(wait - 1)).is_allowed());
            }
        }
    }
}

#[test]
fn request_refused_by_one_rate_uses_up_none() {
    let (windows, epoch) = windows::<u8>("1/s,10/min");
    for tenth in 0..100 {
        windows.check(1, epoch + Duration::from_millis(tenth * 100));
    }
    // Ten seconds at ten a second: one each second was allowed, and ninety were refused.
    let decision = windows.peek(1, epoch + Duration::from_millis(9_900));
    assert_eq!(decision.rates[1].remaining, 0);
    assert_eq!(decision.rates[1].reset_after, Duration::from_millis(50_100));
}

#[test]
fn keys_do_not_share_a_limit() {
    let (windows, epoch) = windows::<u8>("1/s");
    assert!(windows.check(1, epoch).is_allowed());
    assert!(windows.check(2, epoch).is_allowed());
    assert!(!windows.check(1, epoch).is_allowed());
}

#[test]
fn without_rates_everything_is_allowed_and_nothing_is_remembered() {
    let (windows, epoch) = windows::<u8>("off");
    for _ in 0..100 {
        assert_eq!(windows.check(1, epoch), ThrottleDecision::default());
    }
    assert_eq!(windows.peek(1, epoch), ThrottleDecision::default());
    assert_eq!(tracked_keys(&windows), 0);
}

#[test]
fn clock_that_is_behind_counts_as_the_latest_seen() {
    let (windows, epoch) = windows::<u8>("2/s");
    assert!(
        windows
            .check(1, epoch + Duration::from_secs(5))
            .is_allowed()
    );
    assert!(
        windows
            .check(1, epoch + Duration::from_secs(3))
            .is_allowed()
    );
    let decision = windows.check(1, epoch);
    assert_eq!(decision.retry_after, Some(Duration::from_secs(1)));
}

#[test]
fn instants_before_the_epoch_and_far_after_it_do_not_panic() {
    let (windows, epoch) = windows::<u8>("1/day");
    if let Some(before) = epoch.checked_sub(Duration::from_secs(1)) {
        assert!(windows.check(1, before).is_allowed());
    }
    let far = epoch + Duration::from_secs(1000 * 365 * 86_400);
    assert!(windows.check(2, far).is_allowed());
    assert!(!windows.check(2, far).is_allowed());
}

#[test]
fn only_keys_of_the_longest_window_are_remembered() {
    let (windows, epoch) = windows::<u32>("5/s,10/min");
    for key in 0..200_000_u32 {
        // 1,000 new keys a second: 60,000 within a minute.
        windows.check(key, epoch + Duration::from_millis(key.into()));
        // A shard removes idle keys when a request comes to it, which depends on chance; the keys
        // of a second are more than chance can leave.
        assert!(key % 1000 != 0 || tracked_keys(&windows) <= 61_000);
    }
    // Idle keys of a crowd that has left are removed as requests come in, without one of them
    // paying for all. There are enough keys that every shard gets a request: a shard without
    // requests keeps its keys.
    let later = epoch + Duration::from_secs(3_600);
    for key in 0..100_000_u32 {
        windows.check(key % 1000, later);
    }
    assert_eq!(tracked_keys(&windows), 1000);
    let room: usize = windows
        .own
        .shards
        .iter()
        .map(|shard| shard.lock().requests.capacity())
        .sum();
    assert!(room < 64 * 1024, "{room} places kept for 1000 keys");
}

#[test]
fn key_remembers_no_more_requests_than_the_limit_of_the_longest_window() {
    let (windows, epoch) = windows::<u8>("10000/s,100/min");
    let counted = |windows: &SlidingWindows<u8>| {
        let own = &windows.own;
        own.shards[own.index(&1)].lock().requests[&1].instants.len()
    };
    for i in 0..50_000_u64 {
        windows.check(1, epoch + Duration::from_millis(i * 10));
        assert!(counted(&windows) <= 100);
    }
}

/// Threads race at one instant after another; exactly as many requests are allowed as without a
/// race.
#[test]
fn racing_threads_are_allowed_exactly_what_the_rates_allow() {
    const THREADS: usize = 8;
    const ROUNDS: u64 = 60;
    let (windows, epoch) = windows::<u8>("7/s,40/min");
    let mut oracle = Oracle {
        rates: "7/s,40/min".parse().unwrap(),
        allowed: HashMap::new(),
    };
    let allowed: Vec<AtomicU64> = (0..ROUNDS).map(|_| AtomicU64::new(0)).collect();
    let start = Barrier::new(THREADS);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for (round, allowed) in (0..).zip(&allowed) {
                    start.wait();
                    for _ in 0..10 {
                        let now = epoch + Duration::from_millis(round * 370);
                        allowed.fetch_add(
                            u64::from(windows.check(0, now).is_allowed()),
                            Ordering::Relaxed,
                        );
                    }
                }
            });
        }
    });
    for (round, allowed) in (0..).zip(&allowed) {
        let now = nanos(Duration::from_millis(round * 370));
        let expected = (0..10 * THREADS).filter(|_| oracle.check(0, now)).count();
        assert_eq!(
            allowed.load(Ordering::Relaxed),
            expected as u64,
            "round {round}"
        );
    }
}

/// Threads race with clocks that disagree about the order. Each allowed request was decided between
/// the readings of the clock around it; no window may be proved to hold more of them than the
/// limit.
#[test]
fn racing_threads_with_disordered_clocks_never_exceed_a_window() {
    const LIMIT: usize = 5;
    let (windows, epoch) = windows::<u8>("5/s");
    let clock = AtomicU64::new(0);
    let mut spans: Vec<(Nanos, Nanos)> = thread::scope(|scope| {
        let racers: Vec<_> = (0..8_u64)
            .map(|i| {
                let (windows, clock) = (&windows, &clock);
                scope.spawn(move || {
                    let mut spans = Vec::new();
                    for n in 0..2_000 {
                        let step = 1 + (n * 7_919 + i * 104_729) % 2_000_000;
                        let before = clock.fetch_add(step, Ordering::SeqCst);
                        if windows
                            .check(0, epoch + Duration::from_nanos(before))
                            .is_allowed()
                        {
                            spans.push((before, clock.load(Ordering::SeqCst)));
                        }
                    }
                    spans
                })
            })
            .collect();
        racers
            .into_iter()
            .flat_map(|racer| racer.join().unwrap())
            .collect()
    });
    spans.sort_unstable();
    // About 16 s of clock went by, so about 5 a second must have been allowed.
    assert!(spans.len() > 10 * LIMIT, "{}", spans.len());
    for (i, &(first, _)) in spans.iter().enumerate() {
        let within = spans[i..]
            .iter()
            .filter(|(_, end)| end - first < nanos(Duration::from_secs(1)));
        assert!(within.count() <= LIMIT);
    }
}

/// Threads race with two API keys of one user through two throttles that share the keys' requests.
#[test]
fn racing_threads_get_exactly_what_user_and_key_allow() {
    let epoch = Instant::now();
    let shared = Arc::new(KeyWindows::new(RateSubject::ApiKey, epoch));
    let doors = ["25/h", "10000/h"]
        .map(|rates| SlidingWindows::<u8>::new(rates.parse().unwrap(), epoch).sharing(&shared));
    let of_key: Rates = "30/h".parse().unwrap();
    let keys = ["aaaaaaaa", "bbbbbbbb"].map(|id| ApiKeyId::parse(id).unwrap());
    let allowed: Vec<[AtomicU64; 2]> = (0..2).map(|_| Default::default()).collect();
    thread::scope(|scope| {
        for n in 0..8 {
            let (door, key) = (n % 2, n / 2 % 2);
            let (doors, of_key, allowed) = (&doors, &of_key, &allowed);
            scope.spawn(move || {
                for _ in 0..200 {
                    let rates = KeyRates {
                        id: keys[key],
                        rates: of_key,
                    };
                    if doors[door].check_with(1, rates, epoch).is_allowed() {
                        allowed[door][key].fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let count = |door: usize, key: usize| allowed[door][key].load(Ordering::Relaxed);
    for key in 0..2 {
        assert_eq!(count(0, key) + count(1, key), 30);
    }
    assert!(count(0, 0) + count(0, 1) <= 25);
    let left = |door: &SlidingWindows<u8>| door.peek(1, epoch).rates[0].remaining;
    assert_eq!(u64::from(left(&doors[0])), 25 - count(0, 0) - count(0, 1));
    assert_eq!(
        u64::from(left(&doors[1])),
        10_000 - count(1, 0) - count(1, 1)
    );
}

#[test]
fn refusal_by_the_user_or_by_the_key_uses_up_nothing_of_the_other() {
    let (windows, epoch) = windows::<u8>("2/min");
    let of_key: Rates = "1/h".parse().unwrap();
    let check = |id| {
        let id = ApiKeyId::parse(id).unwrap();
        let rates = KeyRates { id, rates: &of_key };
        let decision = windows.check_with(1, rates, epoch);
        let left: Vec<u32> = decision.rates.iter().map(|state| state.remaining).collect();
        (decision.retry_after.map(|wait| wait.as_secs()), left)
    };
    assert_eq!(check("aaaaaaaa"), (None, vec![1, 0]));
    assert_eq!(check("aaaaaaaa"), (Some(3600), vec![1, 0]));
    assert_eq!(check("bbbbbbbb"), (None, vec![0, 0]));
    assert_eq!(check("cccccccc"), (Some(60), vec![0, 1]));
    // The refused key left nothing behind.
    let keys = windows.api_keys.shards.iter();
    let tracked: usize = keys.map(|shard| shard.lock().requests.len()).sum();
    assert_eq!(tracked, 2);
}

#[test]
fn api_keys_that_are_idle_are_forgotten_each_by_its_own_rates() {
    let (windows, epoch) = windows::<u8>("10000/day");
    let (short, long): (Rates, Rates) = ("9/s".parse().unwrap(), "9/day".parse().unwrap());
    let at = |seconds| epoch + Duration::from_secs(seconds);
    let key = |number: u32| ApiKeyId::parse(&format!("{number:08}")).unwrap();
    for number in 0..1000 {
        let rates = if number == 0 { &long } else { &short };
        let id = key(number);
        windows.check_with(1, KeyRates { id, rates }, epoch);
    }
    for number in 1000..3000 {
        let (id, rates) = (key(number), &short);
        windows.check_with(1, KeyRates { id, rates }, at(u64::from(number)));
    }
    let keys = windows.api_keys.shards.iter();
    let tracked: usize = keys.map(|shard| shard.lock().requests.len()).sum();
    assert!(tracked < 40, "{tracked}");
    let (id, rates) = (key(0), &long);
    let first = windows.peek_with(1, KeyRates { id, rates }, at(3000));
    assert_eq!(first.rates[1].remaining, 8);
}

#[test]
fn users_are_throttled_through_the_trait() {
    let (windows, epoch) = windows::<UserId>("1/s");
    let throttle: &dyn Throttle = &windows;
    assert!(at_once(throttle.peek(UserId(1), epoch)).is_allowed());
    assert!(at_once(throttle.check(UserId(1), epoch)).is_allowed());
    assert!(!at_once(throttle.check(UserId(1), epoch)).is_allowed());
    assert!(at_once(throttle.check(UserId(2), epoch)).is_allowed());
}

/// The outcome of a future that never has to wait.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    let mut context = Context::from_waker(Waker::noop());
    match pin!(future).poll(&mut context) {
        Poll::Ready(outcome) => outcome,
        Poll::Pending => panic!("the throttle in the process never waits"),
    }
}
