//! Accounts for the memory that requests in flight hold: request bodies and responses.
//!
//! New work is refused when the budget is used up. Work that was paid for is always let in, and
//! then new work is refused for as long as more is held than the budget allows.
//!
//! An owner who holds much cannot shut out owners who hold little. Three quarters of the budget are
//! for everybody. One user gets half of that at most, and so does one client network for requests
//! without a user. The last quarter is only for owners who hold next to nothing, and half of it for
//! those of one network.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::domain::{ClientNetwork, UserId};

/// An owner who holds no more than this, in bytes, may use the last quarter of the budget: an
/// ordinary request or two.
const LITTLE: usize = 256 << 10;

/// The budget is used up, for everybody or for this owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("requests in flight hold as much memory as they may")]
pub struct Exhausted;

/// The owner of reserved memory. Either part may be unknown: the request has no user yet, or comes
/// through a proxy that hides the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The authenticated user.
    pub user: Option<UserId>,
    /// Where the request comes from.
    pub network: Option<ClientNetwork>,
}

impl Owner {
    /// A user, from any network.
    pub fn user(user: UserId) -> Self {
        Self {
            user: Some(user),
            network: None,
        }
    }
}

/// One part of an owner, for whom bytes are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum OwnerPart {
    User(UserId),
    Network(ClientNetwork),
}

impl Owner {
    fn parts(self) -> [Option<OwnerPart>; 2] {
        [
            self.user.map(OwnerPart::User),
            self.network.map(OwnerPart::Network),
        ]
    }
}

/// Counts the bytes that requests in flight hold.
#[derive(Debug)]
pub struct MemoryBudget {
    most: usize,
    held: Mutex<HeldBytes>,
    /// Notified when bytes are released.
    freed: Notify,
}

#[derive(Debug, Default)]
struct HeldBytes {
    all: usize,
    /// Only of parts that hold something.
    parts: HashMap<OwnerPart, usize>,
}

/// Bytes held in the budget. Dropping this releases them.
#[derive(Debug)]
#[must_use = "a reservation that is dropped at once holds nothing"]
pub struct Reservation {
    budget: Arc<MemoryBudget>,
    owner: Owner,
    bytes: usize,
}

impl MemoryBudget {
    /// A budget of `most` bytes.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            held: Mutex::default(),
            freed: Notify::new(),
        })
    }

    /// Holds `bytes` for `owner`.
    ///
    /// # Errors
    /// [`Exhausted`] if the budget, or the owner's part of it, has no room for them.
    pub fn reserve(self: &Arc<Self>, owner: Owner, bytes: usize) -> Result<Reservation, Exhausted> {
        let mut reservation = self.nothing(owner);
        reservation.try_grow(bytes)?;
        Ok(reservation)
    }

    /// Holds `bytes` for `owner` whether there is room or not: for work that was paid for and must
    /// not be lost.
    pub fn hold(self: &Arc<Self>, owner: Owner, bytes: usize) -> Reservation {
        let mut reservation = self.nothing(owner);
        reservation.grow(bytes);
        reservation
    }

    /// Waits until there is room, then holds `bytes` for `owner`. The caller must hold nothing
    /// else, or two callers may wait for each other. A caller that asks for more than one user may
    /// ever hold waits until that much fits, and then holds all it asked for. Cancel safe.
    pub async fn reserve_when_free(self: &Arc<Self>, owner: Owner, bytes: usize) -> Reservation {
        let bytes_that_fit = bytes.min(self.most_of_user());
        loop {
            // Registered before the attempt, so that no release in between is missed.
            let freed = self.freed.notified();
            if let Ok(mut reservation) = self.reserve(owner, bytes_that_fit) {
                reservation.resize(bytes);
                return reservation;
            }
            freed.await;
        }
    }

    /// Bytes held at the moment.
    pub fn held(&self) -> usize {
        self.held.lock().all
    }

    /// What all owners may hold together, except those who hold little.
    fn most_of_many(&self) -> usize {
        self.most / 4 * 3
    }

    fn most_of_user(&self) -> usize {
        self.most_of_many() / 2
    }

    /// Whether `owner` may hold `more` bytes.
    fn has_room(&self, held: &HeldBytes, owner: Owner, more: usize) -> bool {
        let [of_user, of_network] = owner.parts().map(|part| {
            let held = part.and_then(|part| held.parts.get(&part));
            held.copied().unwrap_or_default() + more
        });
        let is_little = match owner.user {
            Some(_) => of_user <= LITTLE,
            None => owner.network.is_some() && of_network <= LITTLE,
        };
        let (most, most_of_network) = match (is_little, owner.user) {
            (true, _) => (self.most, self.most / 8 * 7),
            (false, Some(_)) => (self.most_of_many(), self.most_of_many()),
            (false, None) => (self.most_of_many(), self.most_of_many() / 2),
        };
        let all = held.all.saturating_add(more);
        all <= most && of_network <= most_of_network && of_user <= self.most_of_user()
    }

    fn nothing(self: &Arc<Self>, owner: Owner) -> Reservation {
        Reservation {
            budget: Arc::clone(self),
            owner,
            bytes: 0,
        }
    }
}

impl Reservation {
    /// Holds `more` bytes.
    ///
    /// # Errors
    /// [`Exhausted`] if there is no room for them; what was held before is still held.
    pub fn try_grow(&mut self, more: usize) -> Result<(), Exhausted> {
        let mut held = self.budget.held.lock();
        if !self.budget.has_room(&held, self.owner, more) {
            return Err(Exhausted);
        }
        held.add(self.owner, more);
        self.bytes += more;
        Ok(())
    }

    /// Changes the reservation to `bytes`.
    ///
    /// # Errors
    /// [`Exhausted`] if there is no room for more; what was held before is still held.
    pub fn try_resize(&mut self, bytes: usize) -> Result<(), Exhausted> {
        if bytes > self.bytes {
            self.try_grow(bytes - self.bytes)
        } else {
            self.resize(bytes);
            Ok(())
        }
    }

    /// Changes the reservation to `bytes`, even if that is more than one user may ever hold: then
    /// it is enough if there is room for as much as one user may hold. What is stored can be larger
    /// than that, and must not be unreadable for ever.
    ///
    /// # Errors
    /// [`Exhausted`] if there is no room; what was held before is still held.
    pub fn try_resize_any(&mut self, bytes: usize) -> Result<(), Exhausted> {
        let most = self.budget.most_of_user().max(self.bytes);
        self.try_resize(bytes.min(most))?;
        self.resize(bytes);
        Ok(())
    }

    /// Holds `more` bytes whether there is room or not; see [`MemoryBudget::hold`].
    pub fn grow(&mut self, more: usize) {
        self.budget.held.lock().add(self.owner, more);
        self.bytes += more;
    }

    /// Changes the reservation to `bytes`, whether there is room or not.
    pub fn resize(&mut self, bytes: usize) {
        if bytes >= self.bytes {
            self.grow(bytes - self.bytes);
        } else {
            self.budget
                .held
                .lock()
                .remove(self.owner, self.bytes - bytes);
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

impl HeldBytes {
    fn add(&mut self, owner: Owner, bytes: usize) {
        self.all += bytes;
        for part in owner.parts().into_iter().flatten().filter(|_| bytes > 0) {
            *self.parts.entry(part).or_default() += bytes;
        }
    }

    fn remove(&mut self, owner: Owner, bytes: usize) {
        self.all -= bytes;
        for part in owner.parts().into_iter().flatten() {
            if let Entry::Occupied(mut held) = self.parts.entry(part) {
                *held.get_mut() -= bytes;
                if *held.get() == 0 {
                    held.remove();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::task::Poll;

    use super::*;

    #[test]
    fn more_than_a_user_may_hold_is_let_in_if_the_user_holds_nothing_else() {
        let budget = MemoryBudget::new(8 << 20);
        let owner = Owner::user(UserId(1));
        let most = budget.most_of_user();
        let mut large = budget.reserve(owner, 100).unwrap();
        assert_eq!(large.try_resize(most + 1), Err(Exhausted));
        let other = budget.reserve(owner, 1).unwrap();
        assert_eq!(large.try_resize_any(most + 1), Err(Exhausted));
        assert_eq!(budget.held(), 101);
        drop(other);
        assert_eq!(large.try_resize_any(most + 1), Ok(()));
        assert_eq!(large.try_resize_any(most + 2), Ok(()));
        assert_eq!(budget.held(), most + 2);
        assert_eq!(large.try_resize_any(7), Ok(()));
        assert_eq!(budget.held(), 7);
    }

    const ALICE: UserId = UserId(1);
    const BOB: UserId = UserId(2);
    const HOME: ClientNetwork = ClientNetwork::V4(1);

    fn from_home(user: UserId) -> Owner {
        Owner {
            user: Some(user),
            network: Some(HOME),
        }
    }

    const MIB: usize = 1 << 20;

    fn may_hold(budget: &Arc<MemoryBudget>, owner: Owner, bytes: usize) -> bool {
        budget.reserve(owner, bytes).is_ok()
    }

    #[test]
    fn reservation_that_does_not_fit_is_refused_until_another_is_dropped() {
        let budget = MemoryBudget::new(8 * MIB);
        let alice = budget.reserve(Owner::user(ALICE), 3 * MIB).unwrap();
        let bob = budget.reserve(Owner::user(BOB), 3 * MIB).unwrap();
        assert_eq!(budget.reserve(Owner::default(), 1).unwrap_err(), Exhausted);
        drop(alice);
        assert_eq!(budget.held(), 3 * MIB);
        let nobody = budget.reserve(Owner::default(), 3 * MIB).unwrap();
        drop((bob, nobody));
        assert_eq!(budget.held(), 0);
        assert!(budget.held.lock().parts.is_empty());
    }

    #[test]
    fn one_user_holds_at_most_half_of_what_everybody_may_hold() {
        let budget = MemoryBudget::new(8 * MIB);
        let mut alice = budget.reserve(from_home(ALICE), 2 * MIB).unwrap();
        assert_eq!(alice.try_grow(MIB + 1), Err(Exhausted));
        assert_eq!(budget.held(), 2 * MIB);
        alice.try_grow(MIB).unwrap();
        assert!(!may_hold(&budget, from_home(ALICE), 1));
        assert!(may_hold(&budget, from_home(BOB), 3 * MIB));
    }

    #[test]
    fn small_reservation_fits_when_three_quarters_are_used_up() {
        let budget = MemoryBudget::new(8 * MIB);
        let _alice = budget.reserve(from_home(ALICE), 3 * MIB).unwrap();
        let _bob = budget.reserve(from_home(BOB), 3 * MIB).unwrap();
        let carol = |bytes| may_hold(&budget, from_home(UserId(3)), bytes);
        assert!(carol(LITTLE) && !carol(LITTLE + 1));
        let little = |user| budget.reserve(from_home(UserId(user)), LITTLE);
        let of_home: Vec<_> = (3..99).map_while(|user| little(user).ok()).collect();
        assert_eq!(
            of_home.len(),
            MIB / LITTLE,
            "half of the rest is one network's"
        );
        assert!(!carol(1));
        assert!(may_hold(&budget, Owner::user(UserId(200)), LITTLE));
    }

    #[test]
    fn networks_without_users_leave_room_for_small_reservations_of_others() {
        let budget = MemoryBudget::new(8 * MIB);
        let from = |number| Owner {
            user: None,
            network: Some(ClientNetwork::V4(number)),
        };
        let _all_it_gets = budget.reserve(from(1), 3 * MIB).unwrap();
        assert!(!may_hold(&budget, from(1), 1));
        let _all_the_rest = budget.reserve(from(2), 3 * MIB).unwrap();
        assert!(may_hold(&budget, from(3), LITTLE) && !may_hold(&budget, from(3), LITTLE + 1));
    }

    #[test]
    fn paid_work_is_held_beyond_the_budget_and_keeps_new_work_out() {
        let budget = MemoryBudget::new(8 * MIB);
        let mut paid = budget.hold(Owner::user(ALICE), 7 * MIB);
        paid.grow(2 * MIB);
        assert_eq!(budget.held(), 9 * MIB);
        assert!(!may_hold(&budget, Owner::user(BOB), 1));
        paid.resize(MIB);
        assert_eq!(budget.held(), MIB);
        assert!(may_hold(&budget, Owner::user(BOB), 3 * MIB));
    }

    #[tokio::test]
    async fn waiting_reservation_is_made_when_there_is_room() {
        let budget = MemoryBudget::new(8 * MIB);
        let first = budget.reserve(Owner::user(ALICE), 3 * MIB).unwrap();
        let mut waiting = Box::pin(budget.reserve_when_free(Owner::user(ALICE), MIB));
        let has_waited =
            poll_fn(|context| Poll::Ready(waiting.as_mut().poll(context).is_pending()));
        assert!(has_waited.await);
        drop(first);
        drop(waiting.await);
        let large = budget.reserve_when_free(Owner::user(ALICE), 5 * MIB).await;
        assert_eq!(
            budget.held(),
            5 * MIB,
            "more than ever fits is held by one alone"
        );
        drop(large);
    }
}
