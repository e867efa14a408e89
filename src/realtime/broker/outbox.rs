//! Events that this replica has yet to publish, in order and bounded; and users who may have missed
//! events that were not published.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use crate::domain::UserId;

/// Memory for events that wait, in bytes. Redis takes them within milliseconds, so this much means
/// that Redis is not keeping up.
const MAX_WAITING_BYTES: usize = 32 << 20;
/// The longest event that is sent, in bytes: several times the limit of a request's body, since
/// escapes lengthen it.
const MAX_EVENT_BYTES: usize = 8 << 20;
/// Events sent together, and about how many bytes of them.
const BATCH_EVENTS: usize = 256;
const BATCH_BYTES: usize = 1 << 20;
/// Users who are listed one by one as having missed an event; beyond it everybody counts as having
/// missed one.
const MAX_MISSED: usize = 10_000;

/// What waits to be published.
#[derive(Debug, Default)]
pub struct Outbox {
    events: VecDeque<(UserId, Arc<str>)>,
    bytes: usize,
    missed: Missed,
}

/// The users who may have missed an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missed {
    /// These users.
    Users(HashSet<UserId>),
    /// Too many to count.
    Everybody,
}

impl Default for Missed {
    fn default() -> Self {
        Self::Users(HashSet::new())
    }
}

impl Missed {
    /// Whether no event was missed.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Users(users) => users.is_empty(),
            Self::Everybody => false,
        }
    }

    /// Whether this user may have missed something.
    pub fn includes(&self, user: UserId) -> bool {
        match self {
            Self::Users(users) => users.contains(&user),
            Self::Everybody => true,
        }
    }

    fn add(&mut self, user: UserId) {
        if let Self::Users(users) = self {
            users.insert(user);
            if users.len() > MAX_MISSED {
                *self = Self::Everybody;
            }
        }
    }
}

/// A batch that is sent together: first the users who missed an event, then events in their order.
#[derive(Debug, Default)]
pub struct EventBatch {
    /// The users who may have missed an event.
    pub missed: Missed,
    /// Events, in the order of publishing.
    pub events: Vec<(UserId, Arc<str>)>,
}

impl EventBatch {
    /// All users who may have missed an event if the batch was not published.
    pub fn into_missed(self) -> Missed {
        let mut missed = self.missed;
        for (user, _) in self.events {
            missed.add(user);
        }
        missed
    }
}

impl Outbox {
    /// Adds an event. If there is no room for it, its user counts as having missed it, and this
    /// returns `false`.
    pub fn push(&mut self, user: UserId, event: Arc<str>) -> bool {
        let bytes = self.bytes + event.len();
        if event.len() > MAX_EVENT_BYTES || bytes > MAX_WAITING_BYTES {
            self.miss(user);
            return false;
        }
        // The sockets of a user who missed an event are closed anyway, so later events are of no
        // use to them.
        if self.missed.includes(user) {
            return false;
        }
        self.bytes = bytes;
        self.events.push_back((user, event));
        true
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty() && self.missed.is_empty()
    }

    /// Records that the user missed an event.
    pub fn miss(&mut self, user: UserId) {
        self.missed.add(user);
    }

    /// Records that all of these users missed events.
    pub fn miss_all(&mut self, missed: Missed) {
        match missed {
            Missed::Users(users) => users.into_iter().for_each(|user| self.miss(user)),
            Missed::Everybody => self.missed = Missed::Everybody,
        }
    }

    /// Discards all events: their users count as having missed them. Returns who may have missed an
    /// event.
    pub fn discard(&mut self) -> Missed {
        for (user, _) in std::mem::take(&mut self.events) {
            self.missed.add(user);
        }
        self.bytes = 0;
        self.missed.clone()
    }

    /// Takes the next batch; `None` if nothing waits.
    pub fn take(&mut self) -> Option<EventBatch> {
        let mut batch = EventBatch {
            missed: std::mem::take(&mut self.missed),
            events: Vec::new(),
        };
        let mut bytes = 0;
        while batch.events.len() < BATCH_EVENTS
            && bytes < BATCH_BYTES
            && let Some((user, event)) = self.events.pop_front()
        {
            bytes += event.len();
            batch.events.push((user, event));
        }
        self.bytes -= bytes;
        (!batch.missed.is_empty() || !batch.events.is_empty()).then_some(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: UserId = UserId(1);
    const BOB: UserId = UserId(2);

    #[test]
    fn events_are_taken_in_their_order_and_in_bounded_batches() {
        let mut outbox = Outbox::default();
        for n in 0..600 {
            assert!(outbox.push(ALICE, n.to_string().into()));
        }
        let mut left = Vec::new();
        while let Some(batch) = outbox.take() {
            assert!(batch.events.len() <= BATCH_EVENTS);
            left.extend(batch.events.into_iter().map(|(_, event)| event.to_string()));
        }
        assert_eq!(left, (0..600).map(|n| n.to_string()).collect::<Vec<_>>());
        assert_eq!(outbox.bytes, 0);
    }

    #[test]
    fn event_without_room_is_missed_and_none_follows_the_gap() {
        let mut outbox = Outbox::default();
        let long: Arc<str> = "x".repeat(MAX_EVENT_BYTES).into();
        let room = MAX_WAITING_BYTES / MAX_EVENT_BYTES;
        for _ in 0..room {
            assert!(outbox.push(ALICE, Arc::clone(&long)));
        }
        assert!(!outbox.push(BOB, "no room".into()));
        let first = outbox.take().unwrap();
        assert!(first.missed.includes(BOB) && !first.missed.includes(ALICE));
        // They are in the batch as having missed an event, so later events are sent again.
        assert!(outbox.push(BOB, "room again".into()));
        assert!(!outbox.push(BOB, "x".repeat(MAX_EVENT_BYTES + 1).into()));
        assert!(!outbox.push(BOB, "after the gap".into()));
    }

    #[test]
    fn too_many_users_who_missed_an_event_count_as_everybody() {
        let mut outbox = Outbox::default();
        for user in 0..=MAX_MISSED as i64 {
            outbox.push(UserId(user), "x".into());
        }
        assert_eq!(outbox.discard(), Missed::Everybody);
        let batch = outbox.take().unwrap();
        assert_eq!(batch.missed, Missed::Everybody);
        assert!(outbox.take().is_none());
    }

    #[test]
    fn users_of_a_failed_batch_count_as_having_missed_its_events() {
        let mut outbox = Outbox::default();
        outbox.miss(ALICE);
        outbox.push(BOB, "x".into());
        outbox.push(ALICE, "skipped".into());
        let missed = outbox.take().unwrap().into_missed();
        assert_eq!(missed, Missed::Users(HashSet::from([ALICE, BOB])));
        outbox.miss_all(missed);
        assert!(outbox.take().unwrap().events.is_empty());
    }
}
