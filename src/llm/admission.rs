//! How many calls are in flight, no more than half of them one user's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::domain::UserId;
use crate::telemetry::Metrics;

/// When a refused caller may try again; calls take seconds.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// As many calls are in flight as may be, of everybody's or of the user's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many calls are in flight")]
pub struct Busy {
    /// When to try again.
    pub retry_after: Duration,
}

/// A place among the calls in flight, given back when dropped.
#[derive(Debug)]
#[must_use]
pub struct CallPermit {
    admission: Arc<Admission>,
    user: UserId,
}

/// Counts the calls in flight.
pub(super) struct Admission {
    most: usize,
    most_per_user: usize,
    held: Mutex<Held>,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Held {
    all: usize,
    /// Users that hold at least one place.
    users: HashMap<UserId, usize>,
}

impl std::fmt::Debug for Admission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admission")
            .field("in_flight", &self.lock().all)
            .field("most", &self.most)
            .finish_non_exhaustive()
    }
}

impl Admission {
    pub(super) fn new(most: usize, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            most,
            most_per_user: (most / 2).max(1),
            held: Mutex::default(),
            metrics,
        })
    }

    pub(super) fn admit(self: &Arc<Self>, user: UserId) -> Result<CallPermit, Busy> {
        let mut held = self.lock();
        let own = held.users.get(&user).copied().unwrap_or_default();
        if held.all >= self.most || own >= self.most_per_user {
            drop(held);
            self.metrics.overloaded.inc();
            return Err(Busy {
                retry_after: RETRY_AFTER,
            });
        }
        held.all += 1;
        held.users.insert(user, own + 1);
        drop(held);
        self.metrics.upstream_calls_in_flight.inc();
        let admission = Arc::clone(self);
        Ok(CallPermit { admission, user })
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // Nothing panics between two changes that belong together, so a poisoned lock guards sound counters.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for CallPermit {
    fn drop(&mut self) {
        let mut held = self.admission.lock();
        held.all -= 1;
        if let Some(own) = held.users.get_mut(&self.user) {
            *own -= 1;
            if *own == 0 {
                held.users.remove(&self.user);
            }
        }
        drop(held);
        self.admission.metrics.upstream_calls_in_flight.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes places until one is refused.
    fn take_all(admission: &Arc<Admission>, user: i64) -> Vec<CallPermit> {
        std::iter::from_fn(|| admission.admit(UserId(user)).ok()).collect()
    }

    #[test]
    fn beyond_the_limit_a_call_is_refused_until_one_ends() {
        let admission = Admission::new(2, Arc::default());
        let one = admission.admit(UserId(1)).unwrap();
        let two = admission.admit(UserId(2)).unwrap();
        assert_eq!(
            admission.admit(UserId(3)).unwrap_err(),
            Busy {
                retry_after: RETRY_AFTER
            }
        );
        drop(one);
        let three = admission.admit(UserId(3)).unwrap();
        drop((two, three));
        assert_eq!(admission.lock().all, 0);
        assert!(admission.lock().users.is_empty());
    }

    #[test]
    fn no_user_holds_more_than_half() {
        let admission = Admission::new(9, Arc::default());
        let (one, two) = (take_all(&admission, 1), take_all(&admission, 2));
        assert_eq!((one.len(), two.len()), (4, 4));
        drop(one);
        assert_eq!(take_all(&admission, 3).len(), 4);
    }

    #[test]
    fn where_there_is_one_place_anybody_may_have_it() {
        let admission = Admission::new(1, Arc::default());
        let one = take_all(&admission, 1);
        assert_eq!((one.len(), take_all(&admission, 2).len()), (1, 0));
    }
}
