//! Push: the open sockets of this process, and the events that any replica sends to them.

mod broker;
mod hub;

pub use broker::{Broker, LocalBroker, RedisBroker};
pub use hub::{CloseReason, Hub, Listener, SubscribeError, Subscription};
