//! The account of memory that requests in flight hold: bodies on their way in, answers on their way out.
//!
//! What is new is refused when the account is full. What was paid for is always let in, and then new work is refused for
//! as long as the account is over its limit. No user and no client network holds more than half of the account, so that one
//! of them cannot shut the others out.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::domain::{ClientNetwork, UserId};

/// The account is full, for everybody or for the owner that asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("requests in flight hold as much memory as they may")]
pub struct Exhausted;

/// On whose behalf memory is held. Either part may be unknown: nobody has logged in yet, or a proxy stands between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The user who is signed in.
    pub user: Option<UserId>,
    /// Where the request comes from.
    pub network: Option<ClientNetwork>,
}

impl Owner {
    /// A user, wherever the request comes from.
    pub fn user(user: UserId) -> Self {
        Self {
            user: Some(user),
            network: None,
        }
    }
}

/// Counts the bytes that requests in flight hold.
#[derive(Debug)]
pub struct MemoryBudget {
    most: usize,
    most_of_one: usize,
    held: Mutex<Held>,
    /// Rings when bytes are given back.
    freed: Notify,
}

#[derive(Debug, Default)]
struct Held {
    all: usize,
    users: HashMap<UserId, usize>,
    networks: HashMap<ClientNetwork, usize>,
}

/// Bytes held in the account, given back when this is dropped.
#[derive(Debug)]
#[must_use = "what is dropped at once holds nothing"]
pub struct Reservation {
    budget: Arc<MemoryBudget>,
    owner: Owner,
    bytes: usize,
}

impl MemoryBudget {
    /// An account of `most` bytes.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            most_of_one: most / 2,
            held: Mutex::default(),
            freed: Notify::new(),
        })
    }

    /// Holds `bytes` for `owner`.
    ///
    /// # Errors
    /// [`Exhausted`] if the account, or the owner's half of it, has no room for them.
    pub fn reserve(self: &Arc<Self>, owner: Owner, bytes: usize) -> Result<Reservation, Exhausted> {
        let mut reservation = self.nothing(owner);
        reservation.try_grow(bytes)?;
        Ok(reservation)
    }

    /// Holds `bytes` for `owner` whether there is room or not: for what was paid for and must not be thrown away.
    pub fn hold(self: &Arc<Self>, owner: Owner, bytes: usize) -> Reservation {
        let mut reservation = self.nothing(owner);
        reservation.grow(bytes);
        reservation
    }

    /// Waits until there is room, then holds `bytes` for `owner`. Who waits must hold nothing, or two of them may wait for
    /// each other. More than half of the account is waited for until the owner holds nothing else. Cancel safe.
    pub async fn reserve_when_free(self: &Arc<Self>, owner: Owner, bytes: usize) -> Reservation {
        let bytes_that_fit = bytes.min(self.most_of_one);
        loop {
            // Registered before the look, so that nothing given back in between is missed.
            let freed = self.freed.notified();
            if let Ok(mut reservation) = self.reserve(owner, bytes_that_fit) {
                reservation.resize(bytes);
                return reservation;
            }
            freed.await;
        }
    }

    /// Bytes held just now.
    pub fn held(&self) -> usize {
        self.lock().all
    }

    fn nothing(self: &Arc<Self>, owner: Owner) -> Reservation {
        Reservation {
            budget: Arc::clone(self),
            owner,
            bytes: 0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // Nothing panics between two changes that belong together, so a poisoned lock guards sound counters.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reservation {
    /// Holds `more` bytes.
    ///
    /// # Errors
    /// [`Exhausted`] if there is no room for them; what was held before is held still.
    pub fn try_grow(&mut self, more: usize) -> Result<(), Exhausted> {
        let mut held = self.budget.lock();
        let has_room = |held: usize, most: usize| held.saturating_add(more) <= most;
        let of_one = self.budget.most_of_one;
        if !has_room(held.all, self.budget.most)
            || !has_room(of(&held.users, self.owner.user), of_one)
            || !has_room(of(&held.networks, self.owner.network), of_one)
        {
            return Err(Exhausted);
        }
        held.add(self.owner, more);
        self.bytes += more;
        Ok(())
    }

    /// Holds `more` bytes whether there is room or not; see [`MemoryBudget::hold`].
    pub fn grow(&mut self, more: usize) {
        self.budget.lock().add(self.owner, more);
        self.bytes += more;
    }

    /// Holds `bytes` from now on, fewer or more than before, whether there is room or not.
    pub fn resize(&mut self, bytes: usize) {
        if bytes >= self.bytes {
            self.grow(bytes - self.bytes);
        } else {
            self.budget.lock().remove(self.owner, self.bytes - bytes);
            self.bytes = bytes;
            self.budget.freed.notify_waiters();
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.resize(0);
        }
    }
}

impl Held {
    fn add(&mut self, owner: Owner, bytes: usize) {
        self.all += bytes;
        if let Some(user) = owner.user {
            *self.users.entry(user).or_default() += bytes;
        }
        if let Some(network) = owner.network {
            *self.networks.entry(network).or_default() += bytes;
        }
    }

    fn remove(&mut self, owner: Owner, bytes: usize) {
        self.all -= bytes;
        take(&mut self.users, owner.user, bytes);
        take(&mut self.networks, owner.network, bytes);
    }
}

fn of<K: Eq + Hash>(held: &HashMap<K, usize>, key: Option<K>) -> usize {
    key.and_then(|key| held.get(&key))
        .copied()
        .unwrap_or_default()
}

fn take<K: Eq + Hash>(held: &mut HashMap<K, usize>, key: Option<K>, bytes: usize) {
    let Some(key) = key else {
        return;
    };
    if let Some(of_key) = held.get_mut(&key) {
        *of_key -= bytes;
        if *of_key == 0 {
            held.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::task::Poll;

    use super::*;

    const ALICE: UserId = UserId(1);
    const BOB: UserId = UserId(2);
    const HOME: ClientNetwork = ClientNetwork::V4(1);

    fn from_home(user: UserId) -> Owner {
        Owner {
            user: Some(user),
            network: Some(HOME),
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_what_is_dropped_makes_room() {
        let budget = MemoryBudget::new(100);
        let alice = budget.reserve(Owner::user(ALICE), 50).unwrap();
        let bob = budget.reserve(Owner::user(BOB), 50).unwrap();
        assert_eq!(budget.reserve(Owner::default(), 1).unwrap_err(), Exhausted);
        drop(alice);
        assert_eq!(budget.held(), 50);
        let nobody = budget.reserve(Owner::default(), 50).unwrap();
        drop((bob, nobody));
        assert_eq!(budget.held(), 0);
        assert!(budget.lock().users.is_empty());
    }

    #[test]
    fn no_user_and_no_network_holds_more_than_half() {
        let budget = MemoryBudget::new(100);
        let mut alice = budget.reserve(from_home(ALICE), 40).unwrap();
        assert_eq!(alice.try_grow(11), Err(Exhausted));
        assert_eq!(budget.reserve(from_home(BOB), 11).unwrap_err(), Exhausted);
        alice.try_grow(10).unwrap();
        assert_eq!(
            budget.reserve(from_home(BOB), 1).unwrap_err(),
            Exhausted,
            "another user of the same network"
        );
        assert!(budget.reserve(Owner::user(BOB), 50).is_ok());
    }

    #[test]
    fn what_was_paid_for_is_held_beyond_the_limit_and_keeps_new_work_out() {
        let budget = MemoryBudget::new(100);
        let mut paid = budget.hold(Owner::user(ALICE), 90);
        paid.grow(60);
        assert_eq!(budget.held(), 150);
        assert_eq!(budget.reserve(Owner::user(BOB), 1).unwrap_err(), Exhausted);
        paid.resize(20);
        assert_eq!(budget.held(), 20);
        assert!(budget.reserve(Owner::user(BOB), 50).is_ok());
    }

    #[tokio::test]
    async fn who_waits_is_let_in_when_there_is_room() {
        let budget = MemoryBudget::new(100);
        let first = budget.reserve(Owner::user(ALICE), 50).unwrap();
        let mut waiting = Box::pin(budget.reserve_when_free(Owner::user(ALICE), 30));
        let has_waited =
            poll_fn(|context| Poll::Ready(waiting.as_mut().poll(context).is_pending()));
        assert!(has_waited.await);
        drop(first);
        let reservation = waiting.await;
        assert_eq!(budget.held(), 30);
        drop(reservation);
        let large = budget.reserve_when_free(Owner::user(ALICE), 70).await;
        assert_eq!(budget.held(), 70, "more than half is held by one alone");
        drop(large);
    }
}
