//! The limits on guessing passwords, over several replicas.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prompt_service::credentials::login_rate_limiter::LoginRefused;
use prompt_service::credentials::{LoginAttempt, LoginRateLimiter, RedisLoginRateLimiter};
use prompt_service::domain::ClientNetwork;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Replica;
use crate::support::DEADLINE;
use crate::support::redis::RedisServer;

const HOME: ClientNetwork = ClientNetwork::V4(0x7f00_0001);
const AWAY: ClientNetwork = ClientNetwork::V6(0x2001_0db8_0001_0002);

async fn replicas(
    server: &RedisServer,
    count: usize,
) -> Vec<(Arc<RedisLoginRateLimiter>, Replica)> {
    let mut replicas = Vec::new();
    for _ in 0..count {
        let replica = Replica::of(server).await;
        replicas.push(limiter_of(replica));
    }
    replicas
}

fn limiter_of(replica: Replica) -> (Arc<RedisLoginRateLimiter>, Replica) {
    let metrics = Arc::clone(&replica.metrics);
    let limiter = RedisLoginRateLimiter::new(replica.redis.clone(), Instant::now(), metrics);
    (limiter, replica)
}

async fn begin(
    limiter: &Arc<RedisLoginRateLimiter>,
    client: ClientNetwork,
    name: &str,
) -> Result<LoginAttempt, LoginRefused> {
    Arc::clone(limiter).begin(client, name, &Instant::now).await
}

async fn fail(limiter: &Arc<RedisLoginRateLimiter>, client: ClientNetwork, name: &str) -> bool {
    match begin(limiter, client, name).await {
        Ok(attempt) => {
            attempt.failed(Instant::now());
            true
        }
        Err(LoginRefused::TooMany { retry_after }) => {
            assert!(retry_after > Duration::ZERO && retry_after <= Duration::from_secs(60));
            false
        }
        Err(LoginRefused::Overloaded) => panic!("nothing else is going on"),
    }
}

#[tokio::test]
async fn after_ten_failures_of_a_name_on_any_replicas_it_is_refused_on_all() {
    let server = RedisServer::start();
    let replicas = replicas(&server, 3).await;
    for n in 0..10 {
        assert!(fail(&replicas[n % 3].0, HOME, "alice").await, "failure {n}");
    }
    for (limiter, _kept) in &replicas {
        assert!(!fail(limiter, HOME, "alice").await);
        assert!(begin(limiter, HOME, "bob").await.is_ok());
        assert!(begin(limiter, AWAY, "alice").await.is_ok());
    }
    let left = server.command(&["PTTL", "test:guesses:{127.0.0.1}:failed"]);
    let left: u64 = left[1..].split('\r').next().unwrap().parse().unwrap();
    assert!((1..=60_000).contains(&left), "{left}");
    let keys = server.command(&["KEYS", "*"]);
    assert!(keys.contains("{2001:db8:1::/48}"), "{keys}");
    let members = server.command(&["ZRANGE", "test:guesses:{127.0.0.1}:failed", "0", "-1"]);
    assert!(!members.contains("alice"), "{members}");
}

#[tokio::test]
async fn failures_leave_the_window_by_the_clock_of_redis() {
    let server = RedisServer::start();
    let replicas = replicas(&server, 2).await;
    for _ in 0..10 {
        assert!(fail(&replicas[0].0, HOME, "alice").await);
    }
    eventually!(
        server
            .command(&["ZCARD", "test:guesses:{127.0.0.1}:failed"])
            .starts_with(":10")
    );
    assert!(!fail(&replicas[1].0, HOME, "alice").await);
    // The first failure is moved a minute into the past.
    let key = "test:guesses:{127.0.0.1}:failed";
    let age = "local m = redis.call('ZRANGE', KEYS[1], 0, 0)[1]; redis.call('ZINCRBY', KEYS[1], '-60000000', m)";
    server.command(&["EVAL", age, "1", key]);
    assert!(fail(&replicas[1].0, HOME, "alice").await);
    assert!(!fail(&replicas[1].0, HOME, "alice").await);
}

#[tokio::test]
async fn after_a_hundred_failures_of_a_client_every_name_is_refused() {
    let server = RedisServer::start();
    let replicas = replicas(&server, 2).await;
    for n in 0..100 {
        assert!(
            fail(&replicas[n % 2].0, HOME, &format!("user{}", n / 5)).await,
            "failure {n}"
        );
    }
    for (limiter, _kept) in &replicas {
        assert!(!fail(limiter, HOME, "somebody new").await);
        assert!(begin(limiter, AWAY, "somebody new").await.is_ok());
    }
}

#[tokio::test]
async fn after_three_hundred_failures_of_an_ipv6_site_all_its_networks_are_refused() {
    let server = RedisServer::start();
    let replicas = replicas(&server, 2).await;
    let network = |n: usize| ClientNetwork::V6(0x2001_0db8_0001_0000 + n as u64);
    for n in 0..300 {
        assert!(fail(&replicas[n % 2].0, network(n), "alice").await, "{n}");
    }
    eventually!(
        server
            .command(&["ZCARD", "test:guesses:{2001:db8:1::/48}:failed"])
            .starts_with(":300")
    );
    for (limiter, _kept) in &replicas {
        assert!(!fail(limiter, network(300), "bob").await);
        assert!(begin(limiter, HOME, "alice").await.is_ok());
    }
}

#[tokio::test]
async fn client_whose_address_is_a_prefix_of_another_is_counted_apart() {
    let server = RedisServer::start();
    let replicas = replicas(&server, 1).await;
    let limiter = &replicas[0].0;
    let network = |n: u64| ClientNetwork::V6(0x2001_0db8_0001_0000 + n);
    for _ in 0..10 {
        assert!(fail(limiter, network(0x12), "alice").await);
    }
    assert!(!fail(limiter, network(0x12), "alice").await);
    assert!(fail(limiter, network(0x1), "alice").await);
}

#[tokio::test]
async fn attempt_that_is_dropped_while_redis_registers_it_is_not_counted() {
    let server = RedisServer::start();
    let replicas = replicas(&server, 1).await;
    let (limiter, replica) = &replicas[0];
    // So that Redis knows the script, and one command is one request.
    drop(begin(limiter, HOME, "bob").await.unwrap());
    server.pause();
    for _ in 0..10 {
        let mut question = std::pin::pin!(begin(limiter, HOME, "alice"));
        let is_asked = std::future::poll_fn(|context| {
            std::task::Poll::Ready(question.as_mut().poll(context).is_pending())
        });
        assert!(is_asked.await);
    }
    server.resume();
    replica.is_up().await;
    eventually!(
        server
            .command(&["ZCARD", "test:guesses:{127.0.0.1}:under_way"])
            .starts_with(":0")
    );
    assert!(begin(limiter, HOME, "alice").await.is_ok());
}

/// The outcomes of parallel attempts of one name on several replicas: answered, and refused.
async fn storm(is_right: bool) -> (usize, usize) {
    let server = RedisServer::start();
    let replicas = replicas(&server, 3).await;
    let mut attempts = JoinSet::new();
    for n in 0..45 {
        let limiter = Arc::clone(&replicas[n % 3].0);
        attempts.spawn(async move {
            let attempt = begin(&limiter, HOME, "alice").await?;
            tokio::time::sleep(Duration::from_millis(n as u64 % 7)).await;
            if is_right {
                attempt.succeeded();
            } else {
                attempt.failed(Instant::now());
            }
            Ok::<_, LoginRefused>(())
        });
    }
    let outcomes = attempts.join_all().await;
    let answered = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    (answered, outcomes.len() - answered)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_parallel_wrong_passwords_on_three_replicas_exactly_ten_are_answered() {
    assert_eq!(storm(false).await, (10, 35));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parallel_right_passwords_on_three_replicas_are_all_answered() {
    assert_eq!(storm(true).await, (45, 0));
}

#[tokio::test]
async fn dropped_attempt_is_no_longer_in_flight() {
    let server = RedisServer::start();
    let replicas = replicas(&server, 2).await;
    let mut under_way = Vec::new();
    for _ in 0..10 {
        under_way.push(begin(&replicas[0].0, HOME, "alice").await.unwrap());
    }
    let waiting = begin(&replicas[1].0, HOME, "alice");
    let drop_one = async {
        eventually!(
            server
                .command(&["ZCARD", "test:guesses:{127.0.0.1}:under_way"])
                .starts_with(":10")
        );
        under_way.pop();
    };
    let (waited, ()) = tokio::join!(waiting, drop_one);
    waited.unwrap().succeeded();
}

#[tokio::test]
async fn without_redis_each_replica_keeps_the_limits_by_itself() {
    let mut server = RedisServer::start();
    let replicas = replicas(&server, 2).await;
    for _ in 0..4 {
        assert!(fail(&replicas[0].0, HOME, "alice").await);
    }
    server.stop();
    for (_, replica) in &replicas {
        replica.is_down().await;
    }
    // Earlier failures on this replica count.
    for _ in 0..6 {
        assert!(fail(&replicas[0].0, HOME, "alice").await);
    }
    assert!(!fail(&replicas[0].0, HOME, "alice").await);
    for _ in 0..10 {
        assert!(fail(&replicas[1].0, HOME, "alice").await);
    }
    assert!(!fail(&replicas[1].0, HOME, "alice").await);
    let degraded = &replicas[0].1.metrics.degraded_decisions;
    assert_eq!(degraded.with_label_values(&["guesses"]).get(), 6);
    // Redis returns empty; the replicas remember.
    server.restart();
    for (limiter, replica) in &replicas {
        replica.is_up().await;
        assert!(!fail(limiter, HOME, "alice").await);
        assert!(fail(limiter, HOME, "bob").await);
    }
}

#[tokio::test]
async fn paused_redis_delays_a_login_only_for_a_moment() {
    let server = RedisServer::start();
    let replica = Replica::at(&server.impatient_config()).await;
    let (limiter, replica) = limiter_of(replica);
    server.pause();
    // Decided although Redis does not reply.
    let decided = timeout(DEADLINE, fail(&limiter, HOME, "alice")).await;
    assert!(decided.unwrap());
    server.resume();
    replica.is_up().await;
    assert!(fail(&limiter, HOME, "alice").await);
}
