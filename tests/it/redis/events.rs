//! Events between replicas: each event reaches every socket of its user once, or the socket is
//! closed with a reason.

use std::sync::Arc;
use std::time::Duration;

use prompt_service::config::{RedisConfig, Secret};
use prompt_service::domain::{Timestamp, UserId};
use prompt_service::realtime::{
    Broker, CloseReason, Hub, Listener, RedisBroker, SubscribeError, Subscription,
};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Replica;
use crate::support::DEADLINE;
use crate::support::redis::{Proxy, RedisServer, config_at};

const ALICE: UserId = UserId(1);
const BOB: UserId = UserId(2);

struct Node {
    replica: Replica,
    hub: Arc<Hub>,
    broker: RedisBroker,
}

impl Node {
    async fn of(server: &RedisServer) -> Self {
        Self::at(&server.config()).await
    }

    async fn at(config: &RedisConfig) -> Self {
        let replica = Replica::at(config).await;
        let hub = Arc::new(Hub::default());
        let broker = RedisBroker::start(
            replica.redis.clone(),
            Arc::clone(&hub),
            Arc::clone(&replica.metrics),
        )
        .await
        .unwrap();
        Self {
            replica,
            hub,
            broker,
        }
    }

    fn try_socket(&self, user: UserId) -> Result<Subscription, SubscribeError> {
        let listener = Listener {
            user_id: user,
            issued_at: Timestamp(0),
            session: None,
        };
        self.broker.subscribe(listener, 100)
    }

    fn socket(&self, user: UserId) -> Subscription {
        self.try_socket(user).unwrap()
    }

    fn publish(&self, user: UserId, event: impl ToString) {
        self.broker.publish(user, event.to_string().into());
    }

    /// A socket, as soon as sockets are accepted again.
    async fn next_socket(&self, user: UserId) -> Subscription {
        eventually!(self.try_socket(user).is_ok());
        self.socket(user)
    }
}

async fn next(socket: &mut Subscription) -> String {
    let event = timeout(DEADLINE, socket.next_event()).await;
    event.expect("an event comes in time").unwrap().to_string()
}

async fn closed(socket: &Subscription) -> CloseReason {
    let closed = timeout(DEADLINE, socket.closed()).await;
    closed.expect("the socket is closed in time")
}

/// Asserts that the socket is open, receives what is published from here on, and has received
/// nothing before.
async fn assert_next(node: &Node, socket: &mut Subscription, event: &str) {
    node.publish(ALICE, event);
    assert_eq!(next(socket).await, event);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_event_reaches_every_socket_once_while_a_replica_starts_and_stops() {
    const EVENTS: usize = 1000;
    let server = RedisServer::start();
    let (a, b) = (Node::of(&server).await, Node::of(&server).await);
    let mut sockets = vec![a.socket(ALICE), a.socket(ALICE), b.socket(ALICE)];
    let mut others = a.socket(BOB);
    let mut readers = JoinSet::new();
    // A socket's queue holds 64 events, so at most 32 are in flight to each of the three.
    let mut rooms = Vec::new();
    for mut socket in sockets.drain(..) {
        let room = Arc::new(Semaphore::new(32));
        rooms.push(Arc::clone(&room));
        readers.spawn(async move {
            let mut heard = Vec::new();
            while heard.len() < EVENTS {
                heard.push(next(&mut socket).await);
                room.add_permits(1);
            }
            (heard, socket)
        });
    }
    let config = server.config();
    let restarts = async {
        for _ in 0..5 {
            let third = Node::at(&config).await;
            third.replica.manager.close().await;
        }
    };
    let posts = async {
        for n in 0..EVENTS {
            for room in &rooms {
                room.acquire().await.unwrap().forget();
            }
            b.publish(ALICE, n);
        }
    };
    tokio::join!(restarts, posts);
    let expected: Vec<String> = (0..EVENTS).map(|n| n.to_string()).collect();
    for (heard, mut socket) in readers.join_all().await {
        assert_eq!(heard, expected, "in order, none lost, none doubled");
        b.publish(ALICE, "last");
        assert_eq!(next(&mut socket).await, "last");
    }
    b.publish(BOB, "for bob");
    assert_eq!(next(&mut others).await, "for bob");
    let reached = a.replica.metrics.websocket_events.get();
    assert!(reached >= 2 * EVENTS as u64, "{reached}");
}

#[tokio::test]
async fn long_event_arrives_whole_and_too_long_event_closes_the_sockets() {
    let server = RedisServer::start();
    let (a, b) = (Node::of(&server).await, Node::of(&server).await);
    let mut socket = a.socket(ALICE);
    let (own, others) = (b.socket(ALICE), a.socket(BOB));
    let long = "é\n".repeat(1 << 20);
    assert_next(&b, &mut socket, &long).await;
    b.publish(ALICE, "x".repeat((8 << 20) + 1));
    assert_eq!(closed(&own).await, CloseReason::Missed);
    assert_eq!(closed(&socket).await, CloseReason::Missed);
    assert!(timeout(Duration::ZERO, others.closed()).await.is_err());
}

#[tokio::test]
async fn sockets_are_closed_when_redis_stops_and_accepted_when_it_is_back() {
    let mut server = RedisServer::start();
    let (a, b) = (Node::of(&server).await, Node::of(&server).await);
    for _ in 0..2 {
        let (one, two) = (a.next_socket(ALICE).await, b.next_socket(BOB).await);
        server.stop();
        assert_eq!(closed(&one).await, CloseReason::Missed);
        assert_eq!(closed(&two).await, CloseReason::Missed);
        for node in [&a, &b] {
            eventually!(matches!(
                node.try_socket(ALICE),
                Err(SubscribeError::Unavailable)
            ));
            assert_eq!(node.hub.open(), 1, "a socket refused leaves nothing");
        }
        drop((one, two));
        b.replica.is_down().await;
        // No socket can receive this event, and no later socket may receive it.
        b.publish(ALICE, "while away");
        server.restart();
        let mut socket = a.next_socket(ALICE).await;
        b.replica.is_up().await;
        // The message that an event was missed may still be in flight.
        eventually!({
            b.publish(ALICE, "back");
            let heard = timeout(Duration::from_millis(200), socket.next_event()).await;
            if heard.is_err() {
                socket = a.socket(ALICE);
            }
            assert!(!matches!(&heard, Ok(Some(event)) if &**event == "while away"));
            matches!(heard, Ok(Some(event)) if &*event == "back")
        });
    }
}

#[tokio::test]
async fn paused_redis_closes_sockets_rather_than_skipping_events() {
    let server = RedisServer::start();
    let config = server.impatient_config();
    let (a, b) = (Node::at(&config).await, Node::at(&config).await);
    let (on_a, on_b) = (a.socket(ALICE), b.socket(ALICE));
    server.pause();
    b.publish(ALICE, "into the void");
    assert_eq!(closed(&on_b).await, CloseReason::Missed);
    assert_eq!(closed(&on_a).await, CloseReason::Missed);
    server.resume();
    b.replica.is_up().await;
    drop((on_a, on_b));
    a.next_socket(ALICE).await;
}

#[tokio::test]
async fn publisher_that_alone_lost_redis_closes_its_users_sockets_everywhere_on_return() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.addr());
    let (near, far) = (
        Node::of(&server).await,
        Node::at(&config_at(proxy.addr)).await,
    );
    let (alice, mut bob) = (near.socket(ALICE), near.socket(BOB));
    proxy.cut();
    far.replica.is_down().await;
    far.publish(ALICE, "lost");
    proxy.mend();
    assert_eq!(closed(&alice).await, CloseReason::Missed);
    // Other users are not affected.
    far.replica.is_up().await;
    near.publish(BOB, "for bob");
    assert_eq!(next(&mut bob).await, "for bob");
}

#[tokio::test]
async fn subscription_that_redis_ends_counts_as_lost() {
    let server = RedisServer::start();
    let node = Node::of(&server).await;
    let socket = node.socket(ALICE);
    // Redis does the same to a subscription whose reader is too slow.
    server.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    assert_eq!(closed(&socket).await, CloseReason::Missed);
    assert!(node.replica.redis.is_up(), "the other connection is well");
    let mut socket = node.next_socket(ALICE).await;
    assert_next(&node, &mut socket, "again").await;
}

#[tokio::test]
async fn server_that_is_demoted_closes_sockets_and_takes_no_events() {
    let server = RedisServer::start();
    let (a, b) = (Node::of(&server).await, Node::of(&server).await);
    for _ in 0..2 {
        let (one, two) = (a.next_socket(ALICE).await, b.next_socket(BOB).await);
        // A failover as the demoted server does it: it keeps every connection open, subscriptions
        // too.
        server.command(&["REPLICAOF", "127.0.0.1", "1"]);
        b.publish(BOB, "to a server that tells nobody");
        assert_eq!(closed(&one).await, CloseReason::Missed);
        assert_eq!(closed(&two).await, CloseReason::Missed);
        for node in [&a, &b] {
            eventually!(matches!(
                node.try_socket(ALICE),
                Err(SubscribeError::Unavailable)
            ));
        }
        server.command(&["REPLICAOF", "NO", "ONE"]);
        drop((one, two));
        let mut socket = a.next_socket(ALICE).await;
        b.next_socket(BOB).await;
        eventually!({
            b.publish(ALICE, "back");
            let heard = timeout(Duration::from_millis(200), socket.next_event()).await;
            if heard.is_err() {
                socket = a.socket(ALICE);
            }
            matches!(heard, Ok(Some(event)) if &*event == "back")
        });
    }
    let failures = &b.replica.metrics.redis_command_failures;
    let refused = failures.with_label_values(&["publish"]).get();
    assert!(refused >= 1, "the publication was refused, not swallowed");
}

#[tokio::test]
async fn subscription_is_replaced_with_the_connection() {
    let server = RedisServer::start();
    let node = Node::of(&server).await;
    let socket = node.socket(ALICE);
    // Its subscription is not touched.
    server.command(&["CLIENT", "KILL", "TYPE", "normal"]);
    assert_eq!(closed(&socket).await, CloseReason::Missed);
    let mut socket = node.next_socket(ALICE).await;
    node.replica.is_up().await;
    assert_next(&node, &mut socket, "again").await;
}

#[tokio::test]
async fn slow_redis_delays_events_and_loses_none() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.addr());
    let node = Node::at(&config_at(proxy.addr)).await;
    let mut socket = node.socket(ALICE);
    proxy.delay(Duration::from_millis(60));
    for n in 0..40 {
        node.publish(ALICE, n);
    }
    for n in 0..40 {
        assert_eq!(next(&mut socket).await, n.to_string());
    }
}

#[tokio::test]
async fn waiting_events_are_published_before_closing() {
    let server = RedisServer::start();
    let (a, b) = (Node::of(&server).await, Node::of(&server).await);
    let mut socket = a.socket(ALICE);
    for n in 0..50 {
        b.publish(ALICE, n);
    }
    b.replica.manager.close().await;
    for n in 0..50 {
        assert_eq!(next(&mut socket).await, n.to_string());
    }
}

#[tokio::test]
async fn unreadable_message_closes_sockets() {
    let server = RedisServer::start();
    let node = Node::of(&server).await;
    let socket = node.socket(ALICE);
    server.command(&["PUBLISH", "test:0:events", "something else"]);
    assert_eq!(closed(&socket).await, CloseReason::Missed);
    let mut socket = node.socket(ALICE);
    assert_next(&node, &mut socket, "next").await;
}

#[tokio::test]
async fn services_on_other_databases_or_with_other_prefixes_receive_nothing() {
    let server = RedisServer::start();
    let config = server.config();
    let elsewhere = RedisConfig {
        url: Secret::new(format!("{}/1", config.url.expose())),
        ..config.clone()
    };
    let otherwise = RedisConfig {
        prefix: "other:".into(),
        ..config.clone()
    };
    let node = Node::at(&config).await;
    let strangers = [Node::at(&elsewhere).await, Node::at(&otherwise).await];
    let mut socket = node.socket(ALICE);
    let mut others = [strangers[0].socket(ALICE), strangers[1].socket(ALICE)];
    assert_next(&node, &mut socket, "ours").await;
    for (stranger, socket) in strangers.iter().zip(&mut others) {
        assert_next(stranger, socket, "theirs").await;
    }
}
