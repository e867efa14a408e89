//! Push: the open sockets of this process, and the events on their way to them from whatever replica.

mod broker;
mod hub;

pub use broker::{Broker, LocalBroker, RedisBroker, SubscribeError};
pub use hub::{CloseReason, Hub, Listener, Subscription, TooManySockets};
