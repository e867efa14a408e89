//! Events between replicas, over one channel in Redis.
//!
//! Every replica subscribes once to the one channel of the service, and ignores events for users
//! without a socket in its process. A message is the user's id, a line feed, and the event. Without
//! an event it means that the user may have missed one. The publisher's own sockets receive an
//! event the same way, so that each gets it once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::Broker;
use super::outbox::{EventBatch, Missed, Outbox};
use crate::domain::UserId;
use crate::realtime::hub::{CloseReason, Hub, Listener, SubscribeError, Subscription};
use crate::redis::{Connection, Error, Script};
use crate::telemetry::Metrics;

/// How often the subscription is pinged, and how long the reply may take. Nothing is lost while
/// Redis is only slow, and sockets are closed when the subscription is dropped, so this timeout is
/// longer than a request's.
const PING_EVERY: Duration = Duration::from_secs(1);
const PING_PATIENCE: Duration = Duration::from_secs(3);
/// Pauses between attempts to subscribe: the first, doubled up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// Publishes messages in their order, all or none. It writes first, because a server that has
/// become a read-only copy refuses that. Such a server would take a plain PUBLISH, reply as usual,
/// and send the message only to its own subscribers.
const PUBLISH: &str = "
redis.call('SET', KEYS[1], '1', 'PX', '1000')
for n = 2, #ARGV do redis.call('PUBLISH', ARGV[1], ARGV[n]) end
return #ARGV - 1";
/// How long publishing the last events may take when the service stops.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

/// Publishes to all replicas, and receives from all replicas for the hub of this one.
pub struct RedisBroker {
    state: Arc<BrokerState>,
}

struct BrokerState {
    redis: Connection,
    channel: String,
    /// The key that a publication writes to.
    probe: String,
    publish: Script,
    hub: Arc<Hub>,
    metrics: Arc<Metrics>,
    /// Whether the subscription is active.
    is_live: AtomicBool,
    outbox: Mutex<Outbox>,
    /// Notified when something was put into the outbox.
    filled: Notify,
}

impl RedisBroker {
    /// Subscribes, and keeps the subscription up until the connection is closed.
    ///
    /// # Errors
    /// Redis does not let this process subscribe now.
    pub async fn start(
        redis: Connection,
        hub: Arc<Hub>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, Error> {
        let state = Arc::new(BrokerState {
            channel: redis.channel("events"),
            probe: redis.key(format_args!("publishing")),
            publish: Script::new(PUBLISH),
            redis: redis.clone(),
            hub,
            metrics,
            is_live: AtomicBool::new(true),
            outbox: Mutex::default(),
            filled: Notify::new(),
        });
        // Read before the subscription is made: if the connection is replaced from here on, the
        // subscription is too.
        let number = redis.connected().await;
        let first = redis.subscribe(&state.channel).await?;
        let listening = Arc::clone(&state);
        redis.spawn(|stop| async move {
            stop.run_until_cancelled(listening.listen(first, number))
                .await;
        });
        let publishing = Arc::clone(&state);
        redis.spawn(|stop| publishing.publish_all(stop));
        Ok(Self { state })
    }
}

impl Broker for RedisBroker {
    fn publish(&self, user: UserId, event: Arc<str>) {
        let state = &self.state;
        // An event that waited for Redis to return would come late, to sockets that have read the
        // list meanwhile.
        let is_waiting = state.redis.is_up() && state.outbox.lock().push(user, event);
        if !is_waiting {
            state.outbox.lock().miss(user);
            state.close(&Missed::Users([user].into()));
        }
        state.filled.notify_one();
    }

    fn subscribe(&self, listener: Listener, limit: usize) -> Result<Subscription, SubscribeError> {
        let subscription = self.state.hub.subscribe(listener, limit)?;
        // Checked after the socket was added: sockets are closed after the flag is cleared, so
        // either they include this one, or the flag is cleared here.
        if self.state.is_live.load(Ordering::SeqCst) {
            Ok(subscription)
        } else {
            Err(SubscribeError::Unavailable)
        }
    }
}

impl BrokerState {
    /// Puts the events that arrive into the hub, and subscribes again when the subscription is
    /// lost. Does not return.
    ///
    /// The subscription is dropped with the connection of that number, which this process publishes
    /// on: a server that was demoted keeps subscriptions open but receives no more events.
    async fn listen(&self, mut subscription: redis::aio::PubSub, mut number: u64) {
        loop {
            tokio::select! {
                () = self.receive(subscription) => {}
                () = self.redis.replaced(number) => {}
            }
            self.is_live.store(false, Ordering::SeqCst);
            // Events published after the last message are not known here.
            self.close(&Missed::Everybody);
            tracing::warn!(
                "the subscription to events was lost: open sockets were closed, and none is let in until it is back"
            );
            (subscription, number) = self.subscribe_again().await;
            self.is_live.store(true, Ordering::SeqCst);
            tracing::info!("the subscription to events is back");
        }
    }

    /// Returns when the subscription is lost. Redis also ends it when this process takes messages
    /// too slowly.
    async fn receive(&self, subscription: redis::aio::PubSub) {
        let (mut commands, mut messages) = subscription.split();
        let alive = async move {
            loop {
                tokio::time::sleep(PING_EVERY).await;
                let pong = timeout(PING_PATIENCE, commands.ping::<redis::Value>()).await;
                if !matches!(pong, Ok(Ok(_))) {
                    return;
                }
            }
        };
        let received = async {
            while let Some(message) = messages.next().await {
                self.take(message.get_payload_bytes());
            }
        };
        tokio::select! {
            () = received => {}
            () = alive => {}
        }
    }

    async fn subscribe_again(&self) -> (redis::aio::PubSub, u64) {
        let mut pause = FIRST_PAUSE;
        loop {
            let number = self.redis.connected().await;
            match self.redis.subscribe(&self.channel).await {
                Ok(subscription) => return (subscription, number),
                Err(error) => tracing::debug!(%error, "events are still unavailable"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// A message from any replica.
    fn take(&self, message: &[u8]) {
        match decode(message) {
            Some(ChannelMessage::Event(user, event)) => {
                if self.hub.has_sockets(user) {
                    let reached = self.hub.publish(user, &event.into());
                    self.metrics.websocket_events.inc_by(reached as u64);
                }
            }
            Some(ChannelMessage::Missed(missed)) => self.close(&missed),
            // It comes from another version of this service, or from another program. It may have
            // been an event.
            None => {
                tracing::warn!("a message on the channel of events could not be read");
                self.close(&Missed::Everybody);
            }
        }
    }

    /// Publishes what is put into the outbox until stopped, then what is still in it.
    async fn publish_all(self: Arc<Self>, stop: CancellationToken) {
        let mut up = self.redis.watch();
        loop {
            let batch = self.outbox.lock().take();
            if let Some(batch) = batch {
                self.send(batch).await;
            }
            if !self.redis.is_up() {
                let missed = self.outbox.lock().discard();
                self.close(&missed);
                let is_up = stop.run_until_cancelled(up.wait_for(|up| *up)).await;
                if is_up.is_none() {
                    return;
                }
                continue;
            }
            let is_idle = self.outbox.lock().is_empty();
            if is_idle
                && stop
                    .run_until_cancelled(self.filled.notified())
                    .await
                    .is_none()
            {
                break;
            }
        }
        let flushed = timeout(FLUSH_PATIENCE, async {
            loop {
                let batch = self.outbox.lock().take();
                match batch {
                    Some(batch) if self.redis.is_up() => self.send(batch).await,
                    Some(_) | None => return,
                }
            }
        });
        if flushed.await.is_err() {
            tracing::warn!("the last events could not be published");
        }
    }

    /// Sends a batch. After a failure it is unknown whether Redis has published it, and sending it
    /// again could double events. Instead, all its users count as having missed something: here at
    /// once, and on the other replicas with the next batch.
    async fn send(&self, batch: EventBatch) {
        let mut publication = self.publish.key(&self.probe);
        publication.arg(&self.channel);
        match &batch.missed {
            Missed::Users(users) => {
                for user in users {
                    publication.arg(format!("{user}\n"));
                }
            }
            Missed::Everybody => {
                publication.arg("\n");
            }
        }
        for (user, event) in &batch.events {
            publication.arg(format!("{user}\n{event}"));
        }
        let sent: Result<(), _> = self
            .redis
            .run("publish", self.redis.patience(), &publication)
            .await;
        if sent.is_err() {
            let missed = batch.into_missed();
            self.close(&missed);
            self.outbox.lock().miss_all(missed);
            // The connection is probed after a failure. Until it is known to be down, the next
            // batch waits a moment.
            tokio::time::sleep(FIRST_PAUSE).await;
        }
    }

    /// Closes the sockets of users who may have missed an event, on this replica.
    fn close(&self, missed: &Missed) {
        if missed.is_empty() {
            return;
        }
        self.metrics.missed_events.inc();
        self.hub.close_where(CloseReason::Missed, |listener| {
            missed.includes(listener.user_id)
        });
    }
}

enum ChannelMessage<'a> {
    Event(UserId, &'a str),
    Missed(Missed),
}

fn decode(message: &[u8]) -> Option<ChannelMessage<'_>> {
    let (user, event) = std::str::from_utf8(message).ok()?.split_once('\n')?;
    if user.is_empty() && event.is_empty() {
        return Some(ChannelMessage::Missed(Missed::Everybody));
    }
    let user = UserId(user.parse().ok()?);
    Some(if event.is_empty() {
        ChannelMessage::Missed(Missed::Users([user].into()))
    } else {
        ChannelMessage::Event(user, event)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_decoded() {
        let event = decode(b"7\n{\"a\":\"b\\n\"}");
        assert!(matches!(
            event,
            Some(ChannelMessage::Event(UserId(7), "{\"a\":\"b\\n\"}"))
        ));
        let missed = |message: &[u8]| match decode(message) {
            Some(ChannelMessage::Missed(missed)) => Some(missed),
            Some(ChannelMessage::Event(..)) | None => None,
        };
        assert_eq!(missed(b"7\n"), Some(Missed::Users([UserId(7)].into())));
        assert_eq!(missed(b"\n"), Some(Missed::Everybody));
        for bad in [&b""[..], b"7", b"x\n{}", b"\n{}", b"7\n\xff"] {
            assert!(decode(bad).is_none(), "{bad:?}");
        }
    }
}
