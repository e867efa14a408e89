//! Push: the open sockets of this process, and the events on their way to them.

mod hub;

pub use hub::{CloseReason, Full, Hub, Listener, Subscription};
