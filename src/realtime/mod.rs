//! Push: the open sockets of this process, and the events on their way to them from whatever replica.

mod broker;
mod hub;

pub use broker::{Broker, LocalBroker, RedisBroker, Refused};
pub use hub::{CloseReason, Full, Hub, Listener, Subscription};
