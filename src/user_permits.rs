//! A bounded number of permits, at most half of them for one user. They are given at once or not at
//! all.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::domain::UserId;

/// Why there is no permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPermit {
    /// All permits are in use, or the user has half of them.
    Full,
    /// [`UserPermits::close`] was called.
    Closed,
}

/// Gives permits to users.
#[derive(Debug)]
pub struct UserPermits {
    limit: usize,
    limit_per_user: usize,
    in_use: Mutex<InUse>,
    all_returned: Condvar,
}

#[derive(Debug, Default)]
struct InUse {
    is_closed: bool,
    all: usize,
    /// Users that have at least one permit.
    users: HashMap<UserId, usize>,
}

/// One permit, returned when this is dropped.
#[derive(Debug)]
#[must_use = "a permit that is dropped at once permits nothing"]
pub struct UserPermit {
    permits: Arc<UserPermits>,
    user: UserId,
}

impl UserPermits {
    /// `limit` permits for all users together. A user may have half of them, and always one.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            limit_per_user: (limit / 2).max(1),
            in_use: Mutex::default(),
            all_returned: Condvar::new(),
        })
    }

    /// A permit for the user.
    ///
    /// # Errors
    /// [`NoPermit`] at once.
    pub fn acquire(self: &Arc<Self>, user: UserId) -> Result<UserPermit, NoPermit> {
        let mut in_use = self.in_use.lock();
        if in_use.is_closed {
            return Err(NoPermit::Closed);
        }
        let own = in_use.users.get(&user).copied().unwrap_or_default();
        if in_use.all >= self.limit || own >= self.limit_per_user {
            return Err(NoPermit::Full);
        }
        in_use.all += 1;
        in_use.users.insert(user, own + 1);
        drop(in_use);
        let permits = Arc::clone(self);
        Ok(UserPermit { permits, user })
    }

    /// How many permits are in use.
    pub fn in_use(&self) -> usize {
        self.in_use.lock().all
    }

    /// Gives no permit from now on, and waits until all are returned; false if some are in use at
    /// the deadline. Blocks: not for an async thread.
    pub fn close(&self, deadline: Instant) -> bool {
        let mut in_use = self.in_use.lock();
        in_use.is_closed = true;
        let is_any_used = |in_use: &mut InUse| in_use.all > 0;
        self.all_returned
            .wait_while_until(&mut in_use, is_any_used, deadline);
        in_use.all == 0
    }
}

impl Drop for UserPermit {
    fn drop(&mut self) {
        let mut in_use = self.permits.in_use.lock();
        in_use.all -= 1;
        if let Some(own) = in_use.users.get_mut(&self.user) {
            *own -= 1;
            if *own == 0 {
                in_use.users.remove(&self.user);
            }
        }
        if in_use.all == 0 {
            self.permits.all_returned.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes permits until one is refused.
    fn acquire_all(permits: &Arc<UserPermits>, user: i64) -> Vec<UserPermit> {
        std::iter::from_fn(|| permits.acquire(UserId(user)).ok()).collect()
    }

    #[test]
    fn beyond_the_limit_a_permit_is_refused_until_one_is_returned() {
        let permits = UserPermits::new(2);
        let one = permits.acquire(UserId(1)).unwrap();
        let two = permits.acquire(UserId(2)).unwrap();
        assert_eq!(permits.acquire(UserId(3)).unwrap_err(), NoPermit::Full);
        drop(one);
        let three = permits.acquire(UserId(3)).unwrap();
        drop((two, three));
        assert_eq!(permits.in_use(), 0);
        assert!(permits.in_use.lock().users.is_empty());
    }

    #[test]
    fn no_user_has_more_than_half() {
        let permits = UserPermits::new(9);
        let (one, two) = (acquire_all(&permits, 1), acquire_all(&permits, 2));
        assert_eq!((one.len(), two.len()), (4, 4));
        drop(one);
        assert_eq!(acquire_all(&permits, 3).len(), 4);
    }

    #[test]
    fn any_user_may_have_the_only_permit() {
        let permits = UserPermits::new(1);
        let one = acquire_all(&permits, 1);
        assert_eq!((one.len(), acquire_all(&permits, 2).len()), (1, 0));
    }

    #[test]
    fn closing_refuses_everybody_and_waits_for_the_permits_in_use() {
        let permits = UserPermits::new(4);
        let permit = permits.acquire(UserId(1)).unwrap();
        assert!(!permits.close(Instant::now()));
        assert_eq!(permits.acquire(UserId(2)).unwrap_err(), NoPermit::Closed);
        drop(permit);
        assert!(permits.close(Instant::now()));
    }
}
