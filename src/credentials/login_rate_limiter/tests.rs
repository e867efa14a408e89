use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use proptest::prelude::*;
use tokio::task::{JoinSet, yield_now};

use super::*;

const HOME: ClientNetwork = ClientNetwork::V4(1);
const AWAY: ClientNetwork = ClientNetwork::V4(2);

/// A limiter with a clock that the test sets.
struct Setting {
    limiter: Arc<LocalLoginRateLimiter>,
    epoch: Instant,
}

impl Setting {
    fn new() -> Self {
        let epoch = Instant::now();
        Self {
            limiter: LocalLoginRateLimiter::new(epoch),
            epoch,
        }
    }

    fn at(&self, ms: u64) -> Instant {
        self.epoch + Duration::from_millis(ms)
    }

    async fn begin(
        &self,
        client: ClientNetwork,
        name: &str,
        ms: u64,
    ) -> Result<LoginAttempt, LoginRefused> {
        let now = self.at(ms);
        Arc::clone(&self.limiter).begin(client, name, &|| now).await
    }

    async fn fail(&self, client: ClientNetwork, name: &str, ms: u64) -> Result<(), LoginRefused> {
        self.begin(client, name, ms).await?.failed(self.at(ms));
        Ok(())
    }

    fn tracked_sites(&self) -> usize {
        let table = self.limiter.table.lock();
        let only_active = |site: &&ClientSite| !table.failures.contains_key(*site);
        table.failures.len() + table.active.keys().filter(only_active).count()
    }

    fn failures(&self, client: ClientNetwork) -> usize {
        let table = self.limiter.table.lock();
        table.failures.get(&client.site()).map_or(0, VecDeque::len)
    }
}

fn too_many(retry_after_ms: u64) -> Result<(), LoginRefused> {
    Err(LoginRefused::TooMany {
        retry_after: Duration::from_millis(retry_after_ms),
    })
}

#[tokio::test]
async fn eleventh_attempt_for_a_name_is_refused_until_the_first_failure_is_a_minute_old() {
    let setting = Setting::new();
    for second in 0..10 {
        assert_eq!(setting.fail(HOME, "alice", second * 1000).await, Ok(()));
    }
    assert_eq!(setting.fail(HOME, "alice", 10_000).await, too_many(50_000));
    assert_eq!(setting.fail(HOME, "alice", 59_999).await, too_many(1));
    // One place is free again, and only one.
    assert_eq!(setting.fail(HOME, "alice", 60_000).await, Ok(()));
    assert_eq!(setting.fail(HOME, "alice", 60_000).await, too_many(1000));
}

#[tokio::test]
async fn other_names_and_other_clients_are_not_affected() {
    let setting = Setting::new();
    for _ in 0..10 {
        setting.fail(HOME, "alice", 0).await.unwrap();
    }
    assert!(setting.begin(HOME, "alice", 0).await.is_err());
    assert!(setting.begin(HOME, "bob", 0).await.is_ok());
    assert!(setting.begin(AWAY, "alice", 0).await.is_ok());
}

#[tokio::test]
async fn after_a_hundred_failures_of_a_client_every_name_is_refused() {
    let setting = Setting::new();
    for i in 0..100 {
        assert_eq!(
            setting.fail(HOME, &format!("user{}", i / 5), 0).await,
            Ok(())
        );
    }
    assert_eq!(
        setting.fail(HOME, "somebody new", 30_000).await,
        too_many(30_000)
    );
    assert!(setting.begin(AWAY, "somebody new", 30_000).await.is_ok());
    assert_eq!(setting.fail(HOME, "somebody new", 60_000).await, Ok(()));
}

#[tokio::test]
async fn after_three_hundred_failures_of_an_ipv6_site_all_its_networks_are_refused() {
    let setting = Setting::new();
    let network = |n: u64| ClientNetwork::V6(0x2001_0db8_0001_0000 + n);
    for n in 0..300 {
        assert_eq!(setting.fail(network(n), "alice", n).await, Ok(()), "{n}");
    }
    assert_eq!(
        setting.fail(network(300), "bob", 1000).await,
        too_many(59_000)
    );
    let other_site = ClientNetwork::V6(0x2001_0db8_0002_0000);
    assert!(setting.begin(other_site, "alice", 1000).await.is_ok());
    assert!(setting.begin(HOME, "alice", 1000).await.is_ok());
    assert_eq!(setting.fail(network(300), "bob", 60_000).await, Ok(()));
    assert_eq!(setting.fail(network(301), "bob", 60_000).await, too_many(1));
}

#[tokio::test]
async fn attempts_of_a_site_wait_while_those_in_flight_could_all_fail() {
    let setting = Setting::new();
    let mut in_flight = Vec::new();
    for n in 0..300 {
        let attempt = setting.begin(ClientNetwork::V6(n), "alice", 0).await;
        in_flight.push(attempt.unwrap());
    }
    let mut waiting = pin!(setting.begin(ClientNetwork::V6(300), "alice", 0));
    assert!(poll_fn(|context| Poll::Ready(waiting.as_mut().poll(context).is_pending())).await);
    in_flight.pop().unwrap().succeeded();
    assert!(waiting.await.is_ok());
}

#[tokio::test]
async fn successful_and_dropped_attempts_are_not_counted() {
    let setting = Setting::new();
    for _ in 0..9 {
        setting.fail(HOME, "alice", 0).await.unwrap();
    }
    for _ in 0..30 {
        setting.begin(HOME, "alice", 0).await.unwrap().succeeded();
        drop(setting.begin(HOME, "alice", 0).await.unwrap());
    }
    assert_eq!(setting.fail(HOME, "alice", 0).await, Ok(()));
    assert_eq!(setting.fail(HOME, "alice", 0).await, too_many(60_000));
}

/// The outcomes of 50 parallel attempts of one name: answered, and refused.
async fn storm(right: bool) -> (usize, usize) {
    let setting = Arc::new(Setting::new());
    let mut attempts = JoinSet::new();
    for i in 0..50 {
        let setting = Arc::clone(&setting);
        attempts.spawn(async move {
            let attempt = setting.begin(HOME, "alice", 0).await?;
            for _ in 0..i % 7 {
                yield_now().await;
            }
            if right {
                attempt.succeeded();
            } else {
                attempt.failed(setting.at(0));
            }
            Ok::<_, LoginRefused>(())
        });
    }
    let outcomes = attempts.join_all().await;
    let answered = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    let clients = setting.tracked_sites();
    assert_eq!(clients, usize::from(!right), "only failures are remembered");
    (answered, outcomes.len() - answered)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_fifty_parallel_wrong_passwords_exactly_ten_are_answered() {
    for _ in 0..20 {
        assert_eq!(storm(false).await, (10, 40));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fifty_parallel_right_passwords_are_all_answered() {
    for _ in 0..20 {
        assert_eq!(storm(true).await, (50, 0));
    }
}

#[tokio::test]
async fn attempt_waits_while_those_in_flight_could_all_fail() {
    let setting = Setting::new();
    let mut in_flight = Vec::new();
    for _ in 0..10 {
        in_flight.push(setting.begin(HOME, "alice", 0).await.unwrap());
    }
    let mut waiting = pin!(setting.begin(HOME, "alice", 0));
    assert!(poll_fn(|context| Poll::Ready(waiting.as_mut().poll(context).is_pending())).await);
    in_flight.pop().unwrap().failed(setting.at(0));
    assert!(poll_fn(|context| Poll::Ready(waiting.as_mut().poll(context).is_pending())).await);
    in_flight.pop().unwrap().succeeded();
    assert!(waiting.await.is_ok());
}

#[tokio::test]
async fn waiting_slots_are_bounded_and_freed() {
    let setting = Setting::new();
    let mut in_flight = Vec::new();
    for _ in 0..10 {
        in_flight.push(setting.begin(HOME, "alice", 0).await.unwrap());
    }
    let mut waiting: Vec<_> = (0..MAX_WAITING)
        .map(|_| Box::pin(setting.begin(HOME, "alice", 0)))
        .collect();
    for call in &mut waiting {
        assert!(poll_fn(|context| Poll::Ready(call.as_mut().poll(context).is_pending())).await);
    }
    assert_eq!(
        setting.begin(HOME, "alice", 0).await.err(),
        Some(LoginRefused::Overloaded)
    );
    assert!(setting.begin(HOME, "bob", 0).await.is_ok());
    waiting.clear();
    in_flight.clear();
    assert!(setting.begin(HOME, "alice", 0).await.is_ok());
    assert_eq!(setting.tracked_sites(), 0);
}

#[tokio::test]
async fn table_is_bounded_and_drops_the_least_recent_failures() {
    let setting = Setting::new();
    let clients = u32::try_from(MAX_SITES).unwrap();
    for client in 0..clients + 5 {
        setting
            .fail(ClientNetwork::V4(client), "alice", client.into())
            .await
            .unwrap();
        if client == 100 {
            // The first client fails again, and is no longer the least recent.
            setting
                .fail(ClientNetwork::V4(0), "alice", client.into())
                .await
                .unwrap();
        }
    }
    assert_eq!(setting.tracked_sites(), MAX_SITES);
    assert_eq!(setting.failures(ClientNetwork::V4(0)), 2);
    assert_eq!(setting.failures(ClientNetwork::V4(1)), 0);
    assert_eq!(setting.failures(ClientNetwork::V4(clients)), 1);
    // A minute later all of them are forgotten.
    drop(setting.begin(HOME, "alice", 3_600_000).await.unwrap());
    assert_eq!(setting.tracked_sites(), 0);
    assert!(setting.limiter.table.lock().failures.capacity() < 1024);
}

proptest! {
    /// One attempt after the other, against a count of all failures ever answered.
    #[test]
    fn sequential_answers_agree_with_a_full_count(
        attempts in prop::collection::vec((0_u64..6_000, 0_u32..2, 0_u8..12, prop::bool::weighted(0.9)), 1..300),
    ) {
        let setting = Setting::new();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut failures: Vec<(u64, u32, u8)> = Vec::new();
        let mut now = 0;
        for (pause, client, name, wrong) in attempts {
            now += pause / 12;
            let live: Vec<_> = failures.iter().filter(|f| f.0 + 60_000 > now && f.1 == client).collect();
            let of_name = live.iter().filter(|f| f.2 == name).count();
            let expected = of_name < 10 && live.len() < 100;
            let begun = runtime.block_on(setting.begin(ClientNetwork::V4(client), &name.to_string(), now));
            prop_assert_eq!(begun.is_ok(), expected);
            match begun {
                Ok(attempt) if wrong => {
                    attempt.failed(setting.at(now));
                    failures.push((now, client, name));
                }
                Ok(attempt) => attempt.succeeded(),
                Err(LoginRefused::TooMany { retry_after }) => {
                    let retry = now + u64::try_from(retry_after.as_millis()).unwrap();
                    let allowed = |at: u64| {
                        let live: Vec<_> = failures.iter().filter(|f| f.0 + 60_000 > at && f.1 == client).collect();
                        live.len() < 100 && live.iter().filter(|f| f.2 == name).count() < 10
                    };
                    prop_assert!(allowed(retry) && !allowed(retry - 1));
                }
                Err(LoginRefused::Overloaded) => prop_assert!(false, "nothing runs beside"),
            }
        }
    }
}
