//! The hub: which sockets are open, and a bounded queue for each.
//!
//! An event is encoded once and shared by all queues. A full queue marks its socket as lagging and
//! takes no more events: the socket is closed with a reason, so that its client knows to read the
//! list again. No event is skipped silently.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use crate::domain::{Timestamp, UserId};

/// Events that may wait for one socket. A client that replies to its pings takes them at once; one
/// that does not is closed before it costs memory. The texts themselves are shared among the
/// sockets of a user.
const QUEUE_EVENTS: usize = 64;
/// Bytes that may wait for one socket, except that a single event may have more. A socket that
/// reads nothing is closed after 90 s; its user may be sent many long answers in that time.
const QUEUE_BYTES: usize = 1 << 20;

/// Why the service closes a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// Its credential is no longer valid: expired, logged out, disabled, password changed.
    CredentialEnded,
    /// Its reader is too slow.
    Lagging,
    /// It may have missed an event, because the broker was unavailable.
    Missed,
    /// The service is stopping.
    GoingAway,
}

impl CloseReason {
    /// The WebSocket close code, and a word for the client's log.
    pub fn code(self) -> (u16, &'static str) {
        match self {
            Self::CredentialEnded => (4401, "credentials ended"),
            Self::Lagging => (1013, "too slow"),
            Self::Missed => (1012, "events may be missing"),
            Self::GoingAway => (1001, "going away"),
        }
    }
}

/// Why a subscription is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubscribeError {
    /// The user has as many sockets as allowed.
    #[error("too many sockets")]
    TooManySockets,
    /// Events cannot reach this replica at the moment, so a socket would be open and receive
    /// nothing.
    #[error("events are unavailable")]
    Unavailable,
}

/// The user and the credential of an open socket, which decide whether it may stay open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// The user.
    pub user_id: UserId,
    /// When the credential was issued: a later `tokens_valid_from` of the account invalidates it.
    pub issued_at: Timestamp,
    /// The session, if a cookie opened the socket: SHA-256 of the secret.
    pub session: Option<[u8; 32]>,
}

struct HubSocket {
    listener: Listener,
    events: mpsc::Sender<Arc<str>>,
    /// Bytes of the events in the queue.
    queued: Arc<AtomicUsize>,
    close: watch::Sender<Option<CloseReason>>,
}

impl HubSocket {
    /// Puts an event into the queue. If there is no room for it, the socket is marked to be closed.
    fn put(&self, event: &Arc<str>) -> bool {
        let before = self.queued.fetch_add(event.len(), Ordering::Relaxed);
        let is_full = before > 0 && before + event.len() > QUEUE_BYTES;
        if !is_full && self.events.try_send(Arc::clone(event)).is_ok() {
            return true;
        }
        self.queued.fetch_sub(event.len(), Ordering::Relaxed);
        // Without a receiver the socket is closed already.
        self.close.send_replace(Some(CloseReason::Lagging));
        false
    }
}

#[derive(Default)]
struct SocketTable {
    next_key: u64,
    by_user: HashMap<UserId, HashMap<u64, HubSocket>>,
}

/// All open sockets of this process.
#[derive(Default)]
pub struct Hub {
    sockets: Mutex<SocketTable>,
}

/// One socket's subscription to the hub. Dropping it removes the socket.
pub struct Subscription {
    hub: Arc<Hub>,
    user_id: UserId,
    key: u64,
    events: mpsc::Receiver<Arc<str>>,
    queued: Arc<AtomicUsize>,
    close: watch::Receiver<Option<CloseReason>>,
}

impl Hub {
    /// Adds a socket of `listener`'s user, unless that user has `limit` sockets already.
    ///
    /// # Errors
    /// `TooManySockets` at the limit.
    pub fn subscribe(
        self: &Arc<Self>,
        listener: Listener,
        limit: usize,
    ) -> Result<Subscription, SubscribeError> {
        let (events, event_queue) = mpsc::channel(QUEUE_EVENTS);
        let (close, closed) = watch::channel(None);
        let queued = Arc::new(AtomicUsize::new(0));
        let mut sockets = self.sockets.lock();
        let key = sockets.next_key;
        let of_user = sockets.by_user.entry(listener.user_id).or_default();
        if of_user.len() >= limit {
            return Err(SubscribeError::TooManySockets);
        }
        of_user.insert(
            key,
            HubSocket {
                listener,
                events,
                queued: Arc::clone(&queued),
                close,
            },
        );
        sockets.next_key += 1;
        Ok(Subscription {
            hub: Arc::clone(self),
            user_id: listener.user_id,
            key,
            events: event_queue,
            queued,
            close: closed,
        })
    }

    /// Puts `event`, a JSON text, into the queue of each of the user's sockets. Returns how many
    /// sockets it reached.
    pub fn publish(&self, user_id: UserId, event: &Arc<str>) -> usize {
        let sockets = self.sockets.lock();
        let Some(of_user) = sockets.by_user.get(&user_id) else {
            return 0;
        };
        let mut reached = 0;
        for socket in of_user.values() {
            // A socket that is marked to be closed gets no more events: later events would hide the
            // gap.
            if socket.close.borrow().is_some() {
                continue;
            }
            if socket.put(event) {
                reached += 1;
            }
        }
        reached
    }

    /// Whether the user has a socket in this process.
    pub fn has_sockets(&self, user_id: UserId) -> bool {
        self.sockets.lock().by_user.contains_key(&user_id)
    }

    /// Marks the sockets for which `ends` returns true to be closed with `reason`. An earlier
    /// reason stays.
    pub fn close_where(&self, reason: CloseReason, mut ends: impl FnMut(&Listener) -> bool) {
        let sockets = self.sockets.lock();
        for socket in sockets.by_user.values().flat_map(HashMap::values) {
            if ends(&socket.listener) && socket.close.borrow().is_none() {
                socket.close.send_replace(Some(reason));
            }
        }
    }

    /// The user and the credential of each open socket.
    pub fn listeners(&self) -> Vec<Listener> {
        let sockets = self.sockets.lock();
        sockets
            .by_user
            .values()
            .flat_map(HashMap::values)
            .map(|socket| socket.listener)
            .collect()
    }
}

impl Subscription {
    /// The next event for this socket, in the order of publishing. Does not end while subscribed.
    /// Cancel safe.
    pub async fn next_event(&mut self) -> Option<Arc<str>> {
        let event = self.events.recv().await?;
        self.queued.fetch_sub(event.len(), Ordering::Relaxed);
        Some(event)
    }

    /// Waits until the hub marks the socket to be closed. Cancel safe.
    pub fn closed(&self) -> impl Future<Output = CloseReason> + use<> {
        let mut close = self.close.clone();
        async move {
            // The sender lives in the hub's map for as long as this subscription does.
            let reason = close
                .wait_for(Option::is_some)
                .await
                .ok()
                .and_then(|reason| *reason);
            reason.unwrap_or(CloseReason::GoingAway)
        }
    }

    /// Records a newer credential of the same user for the socket.
    pub fn renew(&self, issued_at: Timestamp) {
        let mut sockets = self.hub.sockets.lock();
        let socket = sockets
            .by_user
            .get_mut(&self.user_id)
            .and_then(|of_user| of_user.get_mut(&self.key));
        if let Some(socket) = socket {
            socket.listener.issued_at = issued_at;
            socket.listener.session = None;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut sockets = self.hub.sockets.lock();
        if let Some(of_user) = sockets.by_user.get_mut(&self.user_id) {
            of_user.remove(&self.key);
            if of_user.is_empty() {
                sockets.by_user.remove(&self.user_id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: Listener = Listener {
        user_id: UserId(1),
        issued_at: Timestamp(10),
        session: None,
    };
    const BOB: Listener = Listener {
        user_id: UserId(2),
        ..ALICE
    };

    #[tokio::test]
    async fn event_reaches_every_socket_of_its_user_and_no_other() {
        let hub = Arc::new(Hub::default());
        let mut one = hub.subscribe(ALICE, 10).unwrap();
        let mut two = hub.subscribe(ALICE, 10).unwrap();
        let mut other = hub.subscribe(BOB, 10).unwrap();
        let event: Arc<str> = "{}".into();
        assert_eq!(hub.publish(ALICE.user_id, &event), 2);
        assert_eq!(one.next_event().await, Some(Arc::clone(&event)));
        assert_eq!(two.next_event().await, Some(event));
        assert!(other.events.try_recv().is_err());
    }

    #[tokio::test]
    async fn socket_with_a_full_queue_is_closed_and_gets_no_event_after_the_gap() {
        let hub = Arc::new(Hub::default());
        let mut slow = hub.subscribe(ALICE, 10).unwrap();
        let event: Arc<str> = "{}".into();
        for _ in 0..QUEUE_EVENTS {
            assert_eq!(hub.publish(ALICE.user_id, &event), 1);
        }
        assert_eq!(hub.publish(ALICE.user_id, &event), 0);
        assert_eq!(slow.closed().await, CloseReason::Lagging);
        slow.next_event().await;
        assert_eq!(
            hub.publish(ALICE.user_id, &event),
            0,
            "there is room again, but an event is missing"
        );
    }

    #[tokio::test]
    async fn queue_is_bounded_by_bytes_but_takes_one_event_of_any_length() {
        let hub = Arc::new(Hub::default());
        let mut slow = hub.subscribe(ALICE, 10).unwrap();
        let event = |bytes| -> Arc<str> { "x".repeat(bytes).into() };
        assert_eq!(hub.publish(ALICE.user_id, &event(2 * QUEUE_BYTES)), 1);
        slow.next_event().await;
        for _ in 0..4 {
            assert_eq!(hub.publish(ALICE.user_id, &event(QUEUE_BYTES / 4)), 1);
        }
        slow.next_event().await;
        assert_eq!(hub.publish(ALICE.user_id, &event(QUEUE_BYTES / 4)), 1);
        assert_eq!(hub.publish(ALICE.user_id, &event(1)), 0);
        assert_eq!(slow.closed().await, CloseReason::Lagging);
    }

    #[test]
    fn user_has_at_most_its_limit_of_sockets_and_a_dropped_socket_frees_one() {
        let hub = Arc::new(Hub::default());
        let one = hub.subscribe(ALICE, 1).unwrap();
        assert!(hub.subscribe(ALICE, 1).is_err());
        let bob = hub.subscribe(BOB, 1).unwrap();
        assert_eq!(hub.listeners().len(), 2);
        drop(one);
        assert_eq!(hub.listeners().len(), 1);
        let again = hub.subscribe(ALICE, 1).unwrap();
        drop((again, bob));
        assert_eq!(hub.listeners().len(), 0);
        assert!(hub.sockets.lock().by_user.is_empty());
    }

    #[tokio::test]
    async fn sockets_are_closed_by_their_credentials() {
        let hub = Arc::new(Hub::default());
        let kept = hub.subscribe(ALICE, 10).unwrap();
        let ended = hub
            .subscribe(
                Listener {
                    session: Some([7; 32]),
                    ..ALICE
                },
                10,
            )
            .unwrap();
        hub.close_where(CloseReason::CredentialEnded, |listener| {
            listener.session.is_some()
        });
        assert_eq!(ended.closed().await, CloseReason::CredentialEnded);
        assert_eq!(*kept.close.borrow(), None);
        hub.close_where(CloseReason::GoingAway, |_| true);
        assert_eq!(
            ended.closed().await,
            CloseReason::CredentialEnded,
            "the first reason stays"
        );
        assert_eq!(kept.closed().await, CloseReason::GoingAway);
    }

    #[test]
    fn renewed_socket_has_the_new_credential() {
        let hub = Arc::new(Hub::default());
        let socket = hub
            .subscribe(
                Listener {
                    session: Some([7; 32]),
                    ..ALICE
                },
                10,
            )
            .unwrap();
        socket.renew(Timestamp(20));
        assert_eq!(
            hub.listeners(),
            [Listener {
                issued_at: Timestamp(20),
                ..ALICE
            }]
        );
    }
}
