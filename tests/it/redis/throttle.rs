//! The throttle that replicas share: exact on Redis's clock, and never without a limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use prompt_service::domain::{Rates, UserId};
use prompt_service::redis::{CLOCK, timed};
use prompt_service::throttle::{RedisThrottle, SlidingWindows, Throttle, ThrottleDecision};
use proptest::prelude::*;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Replica;
use crate::support::DEADLINE;
use crate::support::redis::{Proxy, RedisServer, config_at, impatient_config_at};

const WINDOWS: &str = include_str!("../../../src/throttle/redis_throttle.lua");
/// The clock of the script under test: an argument of the caller. Everything else is as in the
/// service.
const GIVEN_CLOCK: &str = "local clock = {KEYS[2], KEYS[3]}\n";
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

async fn check(throttle: &RedisThrottle<UserId>) -> ThrottleDecision {
    throttle.check(ALICE, Instant::now()).await
}

/// Asks the script at a given time, in microseconds.
fn ask(server: &RedisServer, key: &str, rates: &Rates, take: bool, now: u64) -> Vec<u64> {
    ask_script(WINDOWS, server, key, rates, take, now)
}

fn ask_script(
    text: &str,
    server: &RedisServer,
    key: &str,
    rates: &Rates,
    take: bool,
    now: u64,
) -> Vec<u64> {
    let script = timed(GIVEN_CLOCK, text);
    let (seconds, rest) = ((now / 1_000_000).to_string(), (now % 1_000_000).to_string());
    let mut words: Vec<String> = ["EVAL", &script, "3", key, &seconds, &rest]
        .map(str::to_owned)
        .into();
    words.push(u8::from(take).to_string());
    for rate in rates.as_slice() {
        words.push(rate.limit.to_string());
        words.push(rate.window().as_micros().to_string());
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let answer = server.command(&words);
    let numbers = answer.lines().filter_map(|line| line.strip_prefix(':'));
    let numbers: Vec<u64> = numbers.map(|number| number.parse().unwrap()).collect();
    assert_eq!(numbers.len(), 1 + 2 * rates.as_slice().len(), "{answer}");
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
    let arrivals = prop::collection::vec((any_pause(), 0_u8..3, prop::bool::weighted(0.8)), 1..60);
    let config = ProptestConfig {
        cases: 60,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(rates in any_rates(), arrivals in arrivals)| {
        server.command(&["FLUSHALL"]);
        let epoch = Instant::now();
        let windows = SlidingWindows::new(rates.clone(), epoch);
        let mut now = 0;
        for (pause, key, take) in arrivals {
            now += pause;
            let at = epoch + Duration::from_micros(now);
            let looked = windows.peek(key, at);
            let ask = |take| ask_script(&lasting, &server, &key.to_string(), &rates, take, start + now);
            let answer = ask(false);
            prop_assert_eq!(answer, expected(&looked, looked.is_allowed()));
            if take {
                let decision = windows.check(key, at);
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
    let wait = refused.retry_after_seconds().unwrap();
    assert!(wait <= 60, "{wait}");
    // A minute after the first request, which was made after this test began.
    assert!(Duration::from_secs(wait) + asked.elapsed() >= Duration::from_secs(60));
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
