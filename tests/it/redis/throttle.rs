//! The throttle that replicas share: exact on Redis's clock, and never without a limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use prompt_service::domain::{ApiKeyId, Rates, UserId};
use prompt_service::redis::{CLOCK, timed};
use prompt_service::throttle::{
    KeyRates, KeyWindows, RateSubject, RedisThrottle, SlidingWindows, Throttle, ThrottleDecision,
};
use proptest::prelude::*;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Replica;
use crate::support::DEADLINE;
use crate::support::redis::{Proxy, RedisServer, config_at, impatient_config_at};

const WINDOWS: &str = include_str!("../../../src/throttle/redis_throttle.lua");
/// The clock of the script under test: an argument of the caller. Everything else is as in the
/// service.
const GIVEN_CLOCK: &str = "local clock = {KEYS[#KEYS - 1], KEYS[#KEYS]}\n";
const ALICE: UserId = UserId(1);

fn rates(text: &str) -> Rates {
    text.parse().unwrap()
}

fn throttle(replica: &Replica, text: &str) -> RedisThrottle<UserId> {
    RedisThrottle::new(
        replica.redis.clone(),
        "prompts",
        rates(text),
        Instant::now(),
        Arc::clone(&replica.metrics),
    )
}

fn key_of<'a>(id: &str, rates: &'a Rates) -> KeyRates<'a> {
    let id = ApiKeyId::parse(id).unwrap();
    KeyRates { id, rates }
}

async fn check(throttle: &RedisThrottle<UserId>) -> ThrottleDecision {
    throttle.check(ALICE, Instant::now()).await
}

/// Asks the script at a given time, in microseconds.
fn ask(server: &RedisServer, key: &str, rates: &Rates, take: bool, now: u64) -> Vec<u64> {
    ask_script(WINDOWS, server, &[(key, rates)], take, now)
}

fn ask_script(
    text: &str,
    server: &RedisServer,
    subjects: &[(&str, &Rates)],
    take: bool,
    now: u64,
) -> Vec<u64> {
    let script = timed(GIVEN_CLOCK, text);
    let keys = subjects.len() + 2;
    let mut words = vec!["EVAL".to_owned(), script, keys.to_string()];
    words.extend(subjects.iter().map(|(key, _)| (*key).to_owned()));
    words.extend([now / 1_000_000, now % 1_000_000].map(|part| part.to_string()));
    words.push(u8::from(take).to_string());
    let mut count = 0;
    for (_, rates) in subjects {
        words.push(rates.as_slice().len().to_string());
        for rate in rates.as_slice() {
            words.push(rate.limit.to_string());
            words.push(rate.window().as_micros().to_string());
            count += 1;
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let answer = server.command(&words);
    let numbers = answer.lines().filter_map(|line| line.strip_prefix(':'));
    let numbers: Vec<u64> = numbers.map(|number| number.parse().unwrap()).collect();
    assert_eq!(numbers.len(), 1 + 2 * count, "{answer}");
    numbers
}

/// What the script returns if the windows in the process decide this.
fn expected(decision: &ThrottleDecision, is_allowed: bool) -> Vec<u64> {
    let standings = decision.rates.iter().flat_map(|state| {
        let used = u64::from(state.rate.limit - state.remaining);
        [used, u64::try_from(state.reset_after.as_micros()).unwrap()]
    });
    std::iter::once(u64::from(is_allowed))
        .chain(standings)
        .collect()
}

fn any_rates() -> impl Strategy<Value = Rates> {
    let rate = (1_u32..6, prop::sample::select(vec!["s", "min", "h", "day"]));
    prop::collection::vec(rate, 1..5).prop_map(|parts| {
        let parts: Vec<_> = parts
            .iter()
            .map(|(limit, unit)| format!("{limit}/{unit}"))
            .collect();
        parts.join(",").parse().unwrap()
    })
}

/// Pauses in microseconds: none, short ones, and those that end within two microseconds of a
/// window's end.
fn any_pause() -> impl Strategy<Value = u64> {
    let window = prop::sample::select(vec![1_u64, 60, 3_600, 86_400]);
    prop_oneof![
        2 => Just(0),
        4 => 0..400_000_u64,
        2 => 0..30_000_000_u64,
        2 => (window, 0_u64..4).prop_map(|(seconds, off)| seconds * 1_000_000 + off - 2),
    ]
}

#[test]
fn script_agrees_with_the_windows_in_the_process_for_any_arrivals() {
    let server = RedisServer::start();
    // Keys expire by Redis's own clock, which may run longer than a second of the given time.
    let lasting = WINDOWS.replace(
        "redis.call('PEXPIRE', key, at(math.ceil(longest / 1000)))",
        "",
    );
    assert_ne!(lasting, WINDOWS);
    // Any time is possible at which doubles still hold microseconds.
    let start = 1_800_000_000_123_456;
    // The third user comes with an API key, whose rates hold too. Two API keys of it take turns.
    let arrivals = prop::collection::vec((any_pause(), 0_i64..4, prop::bool::weighted(0.8)), 1..60);
    let config = ProptestConfig {
        cases: 60,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(rates in any_rates(), of_key in any_rates(), arrivals in arrivals)| {
        server.command(&["FLUSHALL"]);
        let epoch = Instant::now();
        let windows = SlidingWindows::new(rates.clone(), epoch);
        let mut now = 0;
        for (pause, who, take) in arrivals {
            now += pause;
            let at = epoch + Duration::from_micros(now);
            let (key, api_key) = match who {
                2 => (UserId(2), Some(key_of("aaaaaaaa", &of_key))),
                3 => (UserId(2), Some(key_of("bbbbbbbb", &of_key))),
                _ => (UserId(who), None),
            };
            let (name, key_name) = (key.to_string(), api_key.map(|key| key.id.to_string()));
            let mut subjects = vec![(name.as_str(), &rates)];
            subjects.extend(key_name.as_deref().map(|name| (name, &of_key)));
            let ask = |take| ask_script(&lasting, &server, &subjects, take, start + now);
            let looked = match api_key {
                Some(api_key) => windows.peek_with(key, api_key, at),
                None => windows.peek(key, at),
            };
            let answer = ask(false);
            prop_assert_eq!(answer, expected(&looked, looked.is_allowed()));
            if take {
                let decision = match api_key {
                    Some(api_key) => windows.check_with(key, api_key, at),
                    None => windows.check(key, at),
                };
                let answer = ask(true);
                prop_assert_eq!(answer, expected(&decision, decision.is_allowed()));
            }
        }
    });
    assert!(CLOCK.contains("TIME"));
}

#[test]
fn clock_that_is_set_back_neither_allows_more_nor_refuses_for_long() {
    let server = RedisServer::start();
    let rates = rates("2/s,5/min");
    let (second, start) = (1_000_000, 1_800_000_000_000_000);
    let take = |now: u64| ask(&server, "key", &rates, true, now)[0] == 1;
    assert!(take(start) && take(start));
    // By half a minute: the windows do not move until the clock has caught up.
    assert!(!take(start - 30 * second));
    assert!(take(start + second));
    // By an hour: what remains from the other time no longer counts.
    let past = start - 3_600 * second;
    assert!(take(past) && take(past) && !take(past));
    assert!(take(past + second));
    assert!(take(start + second));
}

#[test]
fn largest_rates_keep_their_limit_and_are_fast_enough() {
    let server = RedisServer::start();
    let rates = rates("10000/min");
    let replica_call = |now: u64| ask(&server, "key", &rates, true, now);
    for n in 0..300_u64 {
        replica_call(1_800_000_000_000_000 + n);
    }
    // The rest of ten thousand, all at one instant.
    let fill = "for i = 1, 9700 do redis.call('ZADD', KEYS[1], '1800000000000300', 'x' .. i) end";
    server.command(&["EVAL", fill, "1", "key"]);
    let refused = replica_call(1_800_000_000_000_301);
    assert_eq!(refused[..2], [0, 10_000]);
    assert_eq!(refused[2], 60_000_000 - 301);
    // When the first has left, one more is allowed, and only one.
    assert_eq!(replica_call(1_800_000_060_000_000)[0], 1);
    assert_eq!(replica_call(1_800_000_060_000_000)[0], 0);
    let left = server.command(&["PTTL", "key"]);
    let left: u64 = left[1..].split('\r').next().unwrap().parse().unwrap();
    assert!((1..=60_000).contains(&left), "{left}");
}

#[tokio::test]
async fn decisions_equal_those_of_the_throttle_in_the_process() {
    let server = RedisServer::start();
    let replica = Replica::of(&server).await;
    let throttle = throttle(&replica, "2/min,3/h");
    let asked = Instant::now();
    let unused = throttle.peek(ALICE, Instant::now()).await;
    assert!(unused.is_allowed());
    assert_eq!(unused.rates[0].remaining, 2);
    assert_eq!(unused.rates[0].reset_after, Duration::from_secs(60));
    assert_eq!(check(&throttle).await.rates[0].remaining, 1);
    let last = check(&throttle).await;
    assert!(last.is_allowed());
    assert_eq!((last.rates[0].remaining, last.rates[1].remaining), (0, 1));
    let refused = check(&throttle).await;
    assert_eq!(refused.retry_after, Some(refused.rates[0].reset_after));
    let wait = refused.retry_after.unwrap();
    assert!(wait <= Duration::from_secs(60), "{wait:?}");
    // A minute after the first request, which was made after this test began.
    assert!(wait + asked.elapsed() >= Duration::from_millis(59_999));
    assert_eq!(
        refused.rates[1].remaining, 1,
        "a refused request uses up nothing"
    );
    let peeked = throttle.peek(ALICE, Instant::now()).await;
    assert!(!peeked.is_allowed());
    assert!(throttle.check(UserId(2), Instant::now()).await.is_allowed());
    assert_eq!(
        RedisThrottle::<UserId>::new(
            replica.redis.clone(),
            "off",
            Rates::default(),
            Instant::now(),
            Arc::clone(&replica.metrics)
        )
        .check(ALICE, Instant::now())
        .await,
        ThrottleDecision::default()
    );
}

/// Clients of several replicas race for the requests of five windows. Redis's own record says when
/// each was allowed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_clients_of_several_replicas_get_exactly_what_the_rates_allow() {
    const LIMIT: usize = 20;
    let server = RedisServer::start();
    let mut replicas = Vec::new();
    for _ in 0..3 {
        let replica = Replica::of(&server).await;
        // The window of an hour keeps the record of all.
        let throttle = Arc::new(throttle(&replica, "20/s,10000/h"));
        replicas.push((replica, throttle));
    }
    let allowed = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for n in 0..24 {
        let (throttle, allowed) = (Arc::clone(&replicas[n % 3].1), Arc::clone(&allowed));
        clients.spawn(async move {
            while allowed.load(Ordering::Relaxed) < 5 * LIMIT {
                let is_allowed = check(&throttle).await.is_allowed();
                allowed.fetch_add(usize::from(is_allowed), Ordering::Relaxed);
            }
        });
    }
    // Every request that the rates allow is given to a client.
    timeout(DEADLINE, clients.join_all()).await.unwrap();
    let record = server.command(&["ZRANGE", "test:throttle:prompts:{1}", "0", "-1"]);
    let mut times: Vec<u64> = record
        .lines()
        .filter_map(|line| line.split_once('-')?.0.parse().ok())
        .collect();
    times.sort_unstable();
    assert_eq!(
        times.len(),
        allowed.load(Ordering::Relaxed),
        "each request let through is on record"
    );
    for window in times.windows(LIMIT + 1) {
        assert!(window[LIMIT] - window[0] >= 1_000_000, "{window:?}");
    }
    for (replica, _) in &replicas {
        let degraded = &replica.metrics.degraded_decisions;
        assert_eq!(degraded.with_label_values(&["prompts"]).get(), 0);
    }
}

#[tokio::test]
async fn without_redis_each_replica_keeps_the_limits_and_remembers_what_it_allowed() {
    let mut server = RedisServer::start();
    let replica = Replica::of(&server).await;
    let throttle = throttle(&replica, "3/h");
    assert!(check(&throttle).await.is_allowed());
    server.stop();
    replica.is_down().await;
    // One request was allowed before.
    assert!(check(&throttle).await.is_allowed());
    assert_eq!(
        throttle.peek(ALICE, Instant::now()).await.rates[0].remaining,
        1
    );
    assert!(check(&throttle).await.is_allowed());
    for _ in 0..50 {
        assert!(!check(&throttle).await.is_allowed());
    }
    let degraded = &replica.metrics.degraded_decisions;
    assert!(degraded.with_label_values(&["prompts"]).get() >= 52);
    // Redis returns empty. What this replica has allowed still counts here.
    server.restart();
    replica.is_up().await;
    assert!(!check(&throttle).await.is_allowed());
    assert!(throttle.check(UserId(2), Instant::now()).await.is_allowed());
}

#[tokio::test]
async fn paused_redis_allows_no_request_beyond_the_limit() {
    let server = RedisServer::start();
    let replica = Replica::at(&server.impatient_config()).await;
    let throttle = throttle(&replica, "3/h");
    for _ in 0..3 {
        server.pause();
        // Asked before the outage is known: the reply does not come, and the request may have been
        // counted.
        check(&throttle).await;
        replica.is_down().await;
        server.resume();
        replica.is_up().await;
    }
    assert!(!check(&throttle).await.is_allowed());
    let record = server.command(&["ZCARD", "test:throttle:prompts:{1}"]);
    let counted: u64 = record[1..].split('\r').next().unwrap().parse().unwrap();
    assert!(counted <= 3, "{counted}");
}

#[tokio::test]
async fn slow_redis_delays_a_peek_only_for_a_moment_and_still_decides_on_posts() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.addr());
    let replica = Replica::at(&config_at(proxy.addr)).await;
    let other = Replica::of(&server).await;
    assert!(check(&throttle(&other, "5/h")).await.is_allowed());
    let throttle = throttle(&replica, "5/h");
    check(&throttle).await;
    proxy.delay(Duration::from_secs(2));
    let posted = check(&throttle).await;
    assert!(posted.is_allowed());
    assert_eq!(posted.rates[0].remaining, 2, "Redis knows of all three");
    for _ in 0..5 {
        let looked = throttle.peek(ALICE, Instant::now()).await;
        assert_eq!(
            looked.rates[0].remaining, 3,
            "from this replica's own record"
        );
    }
    assert!(replica.redis.is_up());
    let degraded = &replica.metrics.degraded_decisions;
    assert_eq!(degraded.with_label_values(&["prompts"]).get(), 0);
}

#[tokio::test]
async fn redis_slower_than_the_timeout_counts_as_down() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.addr());
    let replica = Replica::at(&impatient_config_at(proxy.addr)).await;
    let throttle = throttle(&replica, "5/h");
    proxy.delay(DEADLINE);
    assert!(check(&throttle).await.is_allowed());
    replica.is_down().await;
    proxy.delay(Duration::ZERO);
    replica.is_up().await;
}

#[tokio::test]
async fn refusal_by_the_user_or_by_the_key_uses_up_nothing_of_the_other() {
    let server = RedisServer::start();
    let replica = Replica::of(&server).await;
    let throttle = throttle(&replica, "3/h");
    let (tight, wide) = (rates("1/h"), rates("9/h"));
    let check = |id, rates| throttle.check_with(ALICE, key_of(id, rates), Instant::now());
    let left = |decision: &ThrottleDecision| -> Vec<u32> {
        decision.rates.iter().map(|state| state.remaining).collect()
    };
    assert_eq!(left(&check("aaaaaaaa", &tight).await), [2, 0]);
    // Refused by the key: the user keeps its two.
    let refused = check("aaaaaaaa", &tight).await;
    assert!(!refused.is_allowed());
    assert_eq!(left(&refused), [2, 0]);
    assert_eq!(refused.rates[1].subject, RateSubject::ApiKey);
    assert_eq!(left(&check("bbbbbbbb", &wide).await), [1, 8]);
    assert_eq!(left(&check("bbbbbbbb", &wide).await), [0, 7]);
    // Refused by the user: the key keeps its seven.
    let refused = check("bbbbbbbb", &wide).await;
    assert!(!refused.is_allowed());
    assert_eq!(left(&refused), [0, 7]);
    let looked = throttle.peek_with(ALICE, key_of("bbbbbbbb", &wide), Instant::now());
    assert_eq!(left(&looked.await), [0, 7]);
    // Without rates of the user the key's hold all the same.
    let off = RedisThrottle::<UserId>::new(
        replica.redis.clone(),
        "off",
        Rates::default(),
        Instant::now(),
        Arc::clone(&replica.metrics),
    );
    let decision = off.check_with(ALICE, key_of("aaaaaaaa", &tight), Instant::now());
    assert!(!decision.await.is_allowed());
}

/// Clients of several replicas race through two front doors, with two API keys of one user. Each
/// allowed request is counted by the user's rates of its front door and by its key's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_clients_get_exactly_what_user_and_key_allow_over_two_front_doors() {
    let server = RedisServer::start();
    let of_key = rates("30/h");
    let mut doors = Vec::new();
    let mut replicas = Vec::new();
    for _ in 0..3 {
        let replica = Replica::of(&server).await;
        let shared = Arc::new(KeyWindows::new(RateSubject::ApiKey, Instant::now()));
        for (name, of_user) in [("prompts", "40/h"), ("v1", "10000/h")] {
            let throttle = RedisThrottle::<UserId>::new(
                replica.redis.clone(),
                name,
                rates(of_user),
                Instant::now(),
                Arc::clone(&replica.metrics),
            );
            doors.push(Arc::new(throttle.sharing(&shared)));
        }
        replicas.push(replica);
    }
    let mut clients = JoinSet::new();
    for n in 0..24 {
        let (door, of_key) = (Arc::clone(&doors[n % 6]), of_key.clone());
        clients.spawn(async move {
            let key = if n % 4 < 2 { "aaaaaaaa" } else { "bbbbbbbb" };
            let mut allowed = 0;
            for _ in 0..20 {
                let asked = door.check_with(ALICE, key_of(key, &of_key), Instant::now());
                allowed += usize::from(asked.await.is_allowed());
            }
            (key, n % 2, allowed)
        });
    }
    let outcomes = timeout(DEADLINE, clients.join_all()).await.unwrap();
    let sum = |of: &dyn Fn(&str, usize) -> bool| -> usize {
        let counted = outcomes.iter().filter(|(key, door, _)| of(key, *door));
        counted.map(|(_, _, allowed)| allowed).sum()
    };
    // 480 requests asked for what each key allows 30 of, whichever door they came through.
    assert_eq!(sum(&|key, _| key == "aaaaaaaa"), 30);
    assert_eq!(sum(&|key, _| key == "bbbbbbbb"), 30);
    let through_prompts = sum(&|_, door| door == 0);
    assert!(through_prompts <= 40);
    let recorded = |name: &str| -> usize {
        let count = server.command(&["ZCARD", name]);
        count[1..].split('\r').next().unwrap().parse().unwrap()
    };
    assert_eq!(recorded("test:throttle:prompts:{1}"), through_prompts);
    assert_eq!(recorded("test:throttle:v1:{1}"), 60 - through_prompts);
    assert_eq!(recorded("test:throttle:api-key:{1}:aaaaaaaa"), 30);
}

#[tokio::test]
async fn without_redis_the_rates_of_a_key_hold_over_the_front_doors_of_a_replica() {
    let mut server = RedisServer::start();
    let replica = Replica::of(&server).await;
    let shared = Arc::new(KeyWindows::new(RateSubject::ApiKey, Instant::now()));
    let prompts = throttle(&replica, "10000/h").sharing(&shared);
    let other = throttle(&replica, "10000/h").sharing(&shared);
    let of_key = rates("3/h");
    let check = async |door: &RedisThrottle<UserId>| {
        let asked = door.check_with(ALICE, key_of("aaaaaaaa", &of_key), Instant::now());
        asked.await.is_allowed()
    };
    assert!(check(&prompts).await);
    server.stop();
    replica.is_down().await;
    assert!(check(&other).await);
    assert!(check(&prompts).await);
    for door in [&prompts, &other] {
        assert!(!check(door).await);
    }
    // Redis returns empty. What this replica has allowed still counts here.
    server.restart();
    replica.is_up().await;
    assert!(!check(&other).await);
}
