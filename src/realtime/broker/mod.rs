//! The broker: takes an event on any replica, and puts it into the hub of every replica.

mod outbox;
mod redis_broker;

use std::sync::Arc;

use crate::domain::UserId;
use crate::telemetry::Metrics;

pub use self::redis_broker::RedisBroker;
use super::hub::{Hub, Listener, SubscribeError, Subscription};

/// Carries events to the open sockets of a user.
///
/// An event that is published after [`subscribe`](Self::subscribe) has returned reaches that socket
/// exactly once, or the socket is closed with [`CloseReason::Missed`](super::CloseReason::Missed)
/// or another reason: no event is skipped silently. Events of one user that one replica publishes
/// one after the other arrive in that order.
pub trait Broker: Send + Sync {
    /// Sends `event`, a JSON text, to every open socket of the user. Returns at once, without
    /// knowing whether it arrives.
    fn publish(&self, user: UserId, event: Arc<str>);

    /// Adds a socket of `listener`'s user, unless that user has `limit` already on this replica.
    ///
    /// # Errors
    /// `TooManySockets` at the limit, `Unavailable` while events cannot be received.
    fn subscribe(&self, listener: Listener, limit: usize) -> Result<Subscription, SubscribeError>;
}

/// Sends directly to the hub: there is one replica.
pub struct LocalBroker {
    hub: Arc<Hub>,
    metrics: Arc<Metrics>,
}

impl LocalBroker {
    /// A broker for the sockets of `hub`.
    pub fn new(hub: Arc<Hub>, metrics: Arc<Metrics>) -> Self {
        Self { hub, metrics }
    }
}

impl Broker for LocalBroker {
    fn publish(&self, user: UserId, event: Arc<str>) {
        let reached = self.hub.publish(user, &event);
        self.metrics.websocket_events.inc_by(reached as u64);
    }

    fn subscribe(&self, listener: Listener, limit: usize) -> Result<Subscription, SubscribeError> {
        self.hub.subscribe(listener, limit)
    }
}
