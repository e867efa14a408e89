use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Instant;

use parking_lot::Mutex;

use super::*;

const HOME: ClientNetwork = ClientNetwork::V4(1);
const AWAY: ClientNetwork = ClientNetwork::V4(2);

/// Starts a call, which then waits for its turn; fails if it is refused.
async fn enqueued<F: Future>(mut call: Pin<&mut F>) -> bool {
    poll_fn(|context| Poll::Ready(call.as_mut().poll(context).is_pending())).await
}

#[tokio::test]
async fn hashed_password_is_verified() {
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
async fn malformed_hash_is_an_error_and_the_thread_keeps_running() {
    let pool = HashPool::start(1, 8).unwrap();
    let outcome = pool
        .verify("secret123".to_owned(), Some("plain".to_owned()), HOME)
        .await;
    assert!(matches!(outcome, Err(Error::MalformedHash(_))));
    assert!(pool.hash("secret123".to_owned(), HOME).await.is_ok());
}

#[tokio::test]
async fn full_queue_refuses_at_once_and_has_room_when_a_caller_leaves() {
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

/// A pool without threads, and the names of the calls that were worked on.
struct Order {
    pool: HashPool,
    served: Arc<Mutex<Vec<&'static str>>>,
}

impl Order {
    fn new(queue: usize) -> Self {
        Self {
            pool: HashPool::without_threads(queue),
            served: Arc::default(),
        }
    }

    fn call(
        &self,
        name: &'static str,
        client: ClientNetwork,
    ) -> impl Future<Output = Result<(), Error>> {
        let served = Arc::clone(&self.served);
        let work = move |_: &mut Workspace| {
            served.lock().push(name);
            Ok(())
        };
        self.pool.run(client, work)
    }

    /// Works off all calls; returns their names in the order in which the threads take them.
    fn serve_all(&self) -> Vec<&'static str> {
        while let Some(job) = next_job(&mut self.pool.queue.jobs()) {
            job.finish(Some(&mut Workspace::default()));
        }
        self.served.lock().clone()
    }
}

#[tokio::test]
async fn one_call_of_another_site_waits_for_one_of_a_burst() {
    let order = Order::new(8);
    let calls = ["b1", "b2", "b3"].map(|name| (name, HOME));
    let mut waiting = Vec::new();
    for (name, client) in calls.into_iter().chain([("other", AWAY)]) {
        let mut call = Box::pin(order.call(name, client));
        assert!(enqueued(call.as_mut()).await);
        waiting.push(call);
    }
    assert_eq!(order.serve_all(), ["b1", "other", "b2", "b3"]);
}

#[tokio::test]
async fn networks_of_one_ipv6_site_share_one_turn() {
    let order = Order::new(8);
    let mut waiting = Vec::new();
    let neighbours = (0..3).map(|network| ("burst", ClientNetwork::V6(network)));
    for (name, client) in neighbours.chain([("other", ClientNetwork::V6(1 << 16))]) {
        let mut call = Box::pin(order.call(name, client));
        assert!(enqueued(call.as_mut()).await);
        waiting.push(call);
    }
    assert_eq!(order.serve_all(), ["burst", "other", "burst", "burst"]);
}

#[tokio::test]
async fn full_queue_refuses_the_newest_call_of_the_site_that_has_the_most() {
    let order = Order::new(2);
    let mut first = Box::pin(order.call("first", HOME));
    let mut second = Box::pin(order.call("second", HOME));
    assert!(enqueued(first.as_mut()).await && enqueued(second.as_mut()).await);
    let mut other = Box::pin(order.call("other", AWAY));
    assert!(enqueued(other.as_mut()).await);
    assert!(matches!(second.await, Err(Error::Overloaded)));
    let third = order.call("third", HOME).await;
    assert!(matches!(third, Err(Error::Overloaded)));
    assert_eq!(order.serve_all(), ["first", "other"]);
}

#[tokio::test]
async fn abandoned_call_is_skipped() {
    let order = Order::new(2);
    let mut gone = Box::pin(order.call("gone", HOME));
    let mut waiting = Box::pin(order.call("waiting", HOME));
    assert!(enqueued(gone.as_mut()).await && enqueued(waiting.as_mut()).await);
    drop(gone);
    assert_eq!(order.serve_all(), ["waiting"]);
    assert!(waiting.await.is_ok());
}

#[tokio::test]
async fn stopped_pool_fails_waiting_and_new_calls() {
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
    assert_eq!(Arc::strong_count(&pool.queue), 1, "the threads have ended");
    assert_eq!(pool.workspace_bytes(), 0);
}

#[tokio::test]
async fn idle_threads_free_their_memory() {
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
    // The next hash allocates it again.
    assert!(pool.hash("secret123".to_owned(), HOME).await.is_ok());
}
