use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Instant;

use super::*;
use crate::threads::NICENESS;

const HOME: ClientNetwork = ClientNetwork::V4(1);
const AWAY: ClientNetwork = ClientNetwork::V4(2);

/// Starts a call, which then waits for its turn; fails if it is refused.
async fn enqueued<F: Future>(mut call: Pin<&mut F>) -> bool {
    poll_fn(|context| Poll::Ready(call.as_mut().poll(context).is_pending())).await
}

#[tokio::test]
async fn what_was_hashed_is_verified() {
    let pool = HashPool::start(2, 8).unwrap();
    let stored = pool.hash("secret123".to_owned(), HOME).await.unwrap();
    let another = pool.hash("secret123".to_owned(), HOME).await.unwrap();
    assert_ne!(stored, another, "salts differ");
    let right = pool
        .verify("secret123".to_owned(), Some(stored.clone()), HOME)
        .await
        .unwrap();
    assert!(right.ok && !right.needs_rehash);
    let wrong = pool
        .verify("secret124".to_owned(), Some(stored), HOME)
        .await
        .unwrap();
    assert!(!wrong.ok);
    assert!(
        !pool
            .verify("secret123".to_owned(), None, HOME)
            .await
            .unwrap()
            .ok
    );
}

#[tokio::test]
async fn malformed_hash_is_an_error_and_the_thread_goes_on() {
    let pool = HashPool::start(1, 8).unwrap();
    let outcome = pool
        .verify("secret123".to_owned(), Some("plain".to_owned()), HOME)
        .await;
    assert!(matches!(outcome, Err(Error::MalformedHash(_))));
    assert!(pool.hash("secret123".to_owned(), HOME).await.is_ok());
}

#[tokio::test]
async fn full_queue_refuses_at_once_and_makes_room_when_a_caller_goes_away() {
    let pool = HashPool::without_threads(2);
    let mut first = Box::pin(pool.hash("a".to_owned(), HOME));
    let mut second = Box::pin(pool.verify("b".to_owned(), None, HOME));
    assert!(enqueued(first.as_mut()).await && enqueued(second.as_mut()).await);
    assert_eq!(pool.queue_depth(), 2);
    assert!(matches!(
        pool.hash("c".to_owned(), HOME).await,
        Err(Error::Overloaded)
    ));
    drop(first);
    let mut third = Box::pin(pool.hash("c".to_owned(), HOME));
    assert!(enqueued(third.as_mut()).await);
    assert_eq!(pool.queue_depth(), 2);
}

/// The passwords that wait, in the order in which the threads take them.
fn drained(pool: &HashPool) -> Vec<String> {
    let mut queue = pool.shared.queue.lock();
    let passwords = std::iter::from_fn(|| queue.jobs.pop());
    passwords
        .map(|job| match job {
            Job::Hash { password, .. } | Job::Verify { password, .. } => password,
        })
        .collect()
}

#[tokio::test]
async fn one_call_of_another_site_waits_for_one_of_a_burst() {
    let pool = HashPool::without_threads(8);
    let calls = ["b1", "b2", "b3"].map(|name| (name, HOME));
    let mut waiting = Vec::new();
    for (password, client) in calls.into_iter().chain([("other", AWAY)]) {
        let mut call = Box::pin(pool.verify(password.to_owned(), None, client));
        assert!(enqueued(call.as_mut()).await);
        waiting.push(call);
    }
    assert_eq!(drained(&pool), ["b1", "other", "b2", "b3"]);
}

#[tokio::test]
async fn networks_of_one_ipv6_site_share_one_turn() {
    let pool = HashPool::without_threads(8);
    let mut waiting = Vec::new();
    let neighbours = (0..3).map(|network| ("burst", ClientNetwork::V6(network)));
    for (password, client) in neighbours.chain([("other", ClientNetwork::V6(1 << 16))]) {
        let mut call = Box::pin(pool.verify(password.to_owned(), None, client));
        assert!(enqueued(call.as_mut()).await);
        waiting.push(call);
    }
    assert_eq!(drained(&pool), ["burst", "other", "burst", "burst"]);
}

#[tokio::test]
async fn full_queue_refuses_the_newest_call_of_the_site_that_has_the_most() {
    let pool = HashPool::without_threads(2);
    let mut first = Box::pin(pool.hash("first".to_owned(), HOME));
    let mut second = Box::pin(pool.verify("second".to_owned(), None, HOME));
    assert!(enqueued(first.as_mut()).await && enqueued(second.as_mut()).await);
    let mut other = Box::pin(pool.verify("other".to_owned(), None, AWAY));
    assert!(enqueued(other.as_mut()).await);
    assert!(matches!(second.await, Err(Error::Overloaded)));
    assert!(matches!(
        pool.hash("third".to_owned(), HOME).await,
        Err(Error::Overloaded)
    ));
    assert_eq!(drained(&pool), ["first", "other"]);
}

#[tokio::test]
async fn abandoned_call_is_skipped() {
    let pool = HashPool::without_threads(2);
    let mut gone = Box::pin(pool.hash("gone".to_owned(), HOME));
    let mut waiting = Box::pin(pool.hash("waiting".to_owned(), HOME));
    assert!(enqueued(gone.as_mut()).await && enqueued(waiting.as_mut()).await);
    drop(gone);
    let next = pool.shared.next_job(&mut Workspace::default()).unwrap();
    assert!(matches!(next, Job::Hash { password, .. } if password == "waiting"));
}

#[tokio::test]
async fn stopped_pool_fails_those_that_wait_and_those_that_come() {
    let pool = HashPool::without_threads(2);
    let mut waiting = Box::pin(pool.hash("a".to_owned(), HOME));
    assert!(enqueued(waiting.as_mut()).await);
    pool.stop();
    assert!(matches!(waiting.await, Err(Error::Stopped)));
    assert!(matches!(
        pool.hash("b".to_owned(), HOME).await,
        Err(Error::Stopped)
    ));
}

#[tokio::test]
async fn stop_waits_for_the_threads() {
    let pool = HashPool::start(2, 8).unwrap();
    assert!(pool.hash("secret123".to_owned(), HOME).await.is_ok());
    pool.stop();
    assert_eq!(
        Arc::strong_count(&pool.shared),
        1,
        "threads have let go of the queue"
    );
    assert_eq!(pool.workspace_bytes(), 0);
}

#[tokio::test]
async fn idle_threads_give_their_memory_back() {
    let pool = HashPool::start(1, 8).unwrap();
    assert!(pool.hash("secret123".to_owned(), HOME).await.is_ok());
    let deadline = Instant::now() + Duration::from_secs(30);
    while pool.workspace_bytes() != 0 {
        assert!(
            Instant::now() < deadline,
            "still {} bytes",
            pool.workspace_bytes()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // And take it again.
    assert!(pool.hash("secret123".to_owned(), HOME).await.is_ok());
}

#[cfg(target_os = "linux")]
#[test]
fn only_the_thread_that_asks_becomes_nicer() {
    let nice = || rustix::process::getpriority_process(None).unwrap();
    let before = nice();
    let (hashing, beside) = thread::scope(|scope| {
        let hashing = scope.spawn(|| {
            lower_priority();
            nice()
        });
        (hashing.join().unwrap(), nice())
    });
    assert_eq!(hashing, (before + NICENESS).min(19));
    assert_eq!(beside, before);
}
