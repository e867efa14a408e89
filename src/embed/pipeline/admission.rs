//! Who may enter: a bounded number of texts, no more than half of them one user's, a share kept for posts.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::{Class, Error};
use crate::domain::UserId;

/// Answers to "when to try again" stay within these: whole seconds are all a `Retry-After` can say, and beyond half a minute
/// the estimate is a guess.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How many permits there may be.
#[derive(Clone, Copy, Debug)]
struct Limits {
    total: usize,
    searches: usize,
    per_user: usize,
    searches_per_user: usize,
}

impl Limits {
    fn new(capacity: usize) -> Limits {
        let total = capacity.max(4);
        let searches = total - total / 4;
        Limits {
            total,
            searches,
            per_user: total / 2,
            searches_per_user: searches / 2,
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    posts: usize,
    searches: usize,
}

impl Count {
    fn of(&mut self, class: Class) -> &mut usize {
        match class {
            Class::Post => &mut self.posts,
            Class::Search => &mut self.searches,
        }
    }

    fn total(self) -> usize {
        self.posts + self.searches
    }
}

#[derive(Default)]
struct Held {
    closed: bool,
    all: Count,
    /// Users that hold at least one permit.
    users: HashMap<UserId, Count>,
    /// Worker time a text takes: a moving mean, weighted 1/8 to the latest batch.
    time_per_text: Duration,
}

/// The counters behind every permit.
pub(super) struct Admission {
    limits: Limits,
    workers: u32,
    held: Mutex<Held>,
    all_returned: Condvar,
}

/// The right to have one text embedded. Returned when its text is done, or on drop.
///
/// A clone is the same right, not another one: it is returned with the last of them. Who needs more than the vector keeps a
/// clone, so that what follows is admitted too.
#[derive(Clone)]
#[must_use = "a permit dropped is a permit returned"]
pub struct Permit {
    seat: Arc<Seat>,
}

/// One place among those admitted.
struct Seat {
    admission: Arc<Admission>,
    user: UserId,
    class: Class,
}

impl Admission {
    pub(super) fn new(capacity: usize, workers: usize) -> Admission {
        Admission {
            limits: Limits::new(capacity),
            workers: u32::try_from(workers).unwrap_or(u32::MAX).max(1),
            held: Mutex::default(),
            all_returned: Condvar::new(),
        }
    }

    pub(super) fn admit(self: &Arc<Self>, user: UserId, class: Class) -> Result<Permit, Error> {
        let mut held = self.lock();
        if held.closed {
            return Err(Error::Stopped);
        }
        let (all, own) = (held.all, held.users.get(&user).copied().unwrap_or_default());
        let limits = self.limits;
        let full = all.total() >= limits.total || own.total() >= limits.per_user;
        let searches_full =
            all.searches >= limits.searches || own.searches >= limits.searches_per_user;
        if full || class == Class::Search && searches_full {
            let retry_after = self.retry_after(&held);
            return Err(Error::Overloaded { retry_after });
        }
        *held.all.of(class) += 1;
        *held.users.entry(user).or_default().of(class) += 1;
        drop(held);
        let admission = Arc::clone(self);
        let seat = Arc::new(Seat {
            admission,
            user,
            class,
        });
        Ok(Permit { seat })
    }

    /// Learns from a batch how long texts take.
    pub(super) fn record(&self, texts: usize, duration: Duration) {
        let texts = u32::try_from(texts).unwrap_or(u32::MAX).max(1);
        let mut held = self.lock();
        held.time_per_text = held.time_per_text * 7 / 8 + duration / texts / 8;
    }

    /// Permits held now.
    pub(super) fn in_use(&self) -> usize {
        self.lock().all.total()
    }

    /// Admits nobody from now on and waits until every permit is back; false if some are out at the deadline.
    pub(super) fn close(&self, deadline: Instant) -> bool {
        let mut held = self.lock();
        held.closed = true;
        while held.all.total() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.all_returned.wait_for(&mut held, left);
        }
        true
    }

    /// How long the workers need for what has been admitted.
    fn retry_after(&self, held: &Held) -> Duration {
        let texts = u32::try_from(held.all.total()).unwrap_or(u32::MAX);
        let drained = held.time_per_text.saturating_mul(texts) / self.workers;
        drained.clamp(RETRY_AFTER.0, RETRY_AFTER.1)
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock()
    }
}

impl Permit {
    /// Whose text it is for.
    pub fn user(&self) -> UserId {
        self.seat.user
    }

    /// What the text is for.
    pub fn class(&self) -> Class {
        self.seat.class
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut held = self.admission.lock();
        *held.all.of(self.class) -= 1;
        if let Some(own) = held.users.get_mut(&self.user) {
            *own.of(self.class) -= 1;
            if own.total() == 0 {
                held.users.remove(&self.user);
            }
        }
        if held.all.total() == 0 {
            self.admission.all_returned.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(capacity: usize) -> Arc<Admission> {
        Arc::new(Admission::new(capacity, 2))
    }

    /// Takes permits until one is refused.
    fn take_all(admission: &Arc<Admission>, user: i64, class: Class) -> Vec<Permit> {
        std::iter::from_fn(|| admission.admit(UserId(user), class).ok()).collect()
    }

    #[test]
    fn no_user_holds_more_than_half() {
        let admission = admission(64);
        assert_eq!(take_all(&admission, 1, Class::Post).len(), 32);
        let _first = take_all(&admission, 1, Class::Post);
        assert_eq!(take_all(&admission, 1, Class::Search).len(), 0);
        let _second = take_all(&admission, 2, Class::Post);
        assert_eq!(admission.in_use(), 64);
        assert!(admission.admit(UserId(3), Class::Post).is_err());
    }

    #[test]
    fn searches_leave_a_quarter_to_posts() {
        let admission = admission(64);
        let held: Vec<_> = (1..10)
            .map(|user| take_all(&admission, user, Class::Search))
            .collect();
        assert_eq!(held[0].len(), 24);
        assert_eq!(admission.in_use(), 48);
        assert_eq!(take_all(&admission, 99, Class::Post).len(), 16);
    }

    #[test]
    fn a_dropped_permit_is_free_at_once_and_leaves_no_trace() {
        let admission = admission(4);
        let held = take_all(&admission, 1, Class::Post);
        drop(held);
        assert_eq!(admission.in_use(), 0);
        assert!(admission.lock().users.is_empty());
        assert_eq!(take_all(&admission, 1, Class::Post).len(), 2);
    }

    #[test]
    fn a_clone_is_the_same_place_and_keeps_it() {
        let admission = admission(4);
        let permit = admission.admit(UserId(1), Class::Search).unwrap();
        let kept = permit.clone();
        assert_eq!(admission.in_use(), 1);
        drop(permit);
        assert_eq!(admission.in_use(), 1);
        drop(kept);
        assert_eq!(admission.in_use(), 0);
    }

    #[test]
    fn retry_after_follows_the_time_that_texts_take() {
        let admission = admission(4);
        let _held = take_all(&admission, 1, Class::Post);
        let retry_after = || match admission.admit(UserId(1), Class::Post) {
            Err(Error::Overloaded { retry_after }) => retry_after,
            Err(error) => panic!("{error:?}"),
            Ok(_) => panic!("admitted"),
        };
        assert_eq!(retry_after(), Duration::from_secs(1));
        admission.record(1, Duration::from_secs(80));
        assert_eq!(retry_after(), Duration::from_secs(10));
        admission.record(1, Duration::from_secs(8000));
        assert_eq!(retry_after(), Duration::from_secs(30));
    }

    #[test]
    fn closing_admits_nobody_and_says_whether_all_came_back() {
        let admission = admission(4);
        let permit = admission.admit(UserId(1), Class::Post).unwrap();
        assert!(!admission.close(Instant::now()));
        assert!(matches!(
            admission.admit(UserId(2), Class::Post),
            Err(Error::Stopped)
        ));
        drop(permit);
        assert!(admission.close(Instant::now()));
    }
}
