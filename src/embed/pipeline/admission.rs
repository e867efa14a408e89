//! Admission: a bounded number of texts, at most half of them for one user, and a share of them for
//! posts alone, another for posts and searches.
//!
//! A request for embeddings has one permit from its beginning to its end, through which its texts
//! pass one after another, so it never fails half way for want of another. While there is room, it
//! borrows more permits, each for one text.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{Class, Error};
use crate::domain::UserId;
use crate::user_permits::{NoPermit, UserPermit, UserPermits};

/// The shortest and the longest time after which a refused caller is to retry. `Retry-After` has
/// whole seconds, and beyond half a minute the estimate is a guess.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Gives the permits.
pub(super) struct TextAdmission {
    /// For each text.
    texts: Arc<UserPermits>,
    /// For each text of a search besides: three quarters of the number, so that a quarter is left
    /// to posts.
    searches: Arc<UserPermits>,
    /// For each text of a request for embeddings besides: half of the number, so that searches have
    /// room whatever such requests do, which last long.
    bulk: Arc<UserPermits>,
    /// For each such text but one of each request besides: a quarter of the number, so that the
    /// rest is left to requests that begin.
    borrowed: Arc<UserPermits>,
    workers: u32,
    /// Worker time that a text takes: a moving mean, weighted 1/8 to the latest batch.
    time_per_text: Mutex<Duration>,
}

/// The right to have one text embedded. Returned when its text is done, or on drop.
///
/// A clone is the same right, not another one: it is returned with the last of them. A caller that
/// needs more than the vector keeps a clone, so that what follows is admitted too.
#[derive(Clone)]
#[must_use = "a permit that is dropped at once permits nothing"]
pub struct Permit(Arc<AdmittedText>);

struct AdmittedText {
    user: UserId,
    class: Class,
    _text: UserPermit,
    _shares: Vec<UserPermit>,
}

impl TextAdmission {
    pub(super) fn new(capacity: usize, workers: usize) -> Self {
        let texts = capacity.max(4);
        Self {
            texts: UserPermits::new(texts),
            searches: UserPermits::new(texts - texts / 4),
            bulk: UserPermits::new(texts / 2),
            borrowed: UserPermits::new(texts / 4),
            workers: u32::try_from(workers).unwrap_or(u32::MAX).max(1),
            time_per_text: Mutex::default(),
        }
    }

    pub(super) fn admit(&self, user: UserId, class: Class) -> Result<Permit, Error> {
        let shares: &[_] = match class {
            Class::Post => &[],
            Class::Search => &[&self.searches],
            Class::Bulk => &[&self.bulk, &self.searches],
        };
        self.acquire(user, class, shares)
            .map_err(|refused| match refused {
                NoPermit::Full => Error::Overloaded {
                    retry_after: self.retry_after(),
                },
                NoPermit::Closed => Error::Stopped,
            })
    }

    /// One more text of a request for embeddings, if there is room.
    pub(super) fn admit_more(&self, user: UserId) -> Option<Permit> {
        let shares = [&self.borrowed, &self.bulk, &self.searches];
        self.acquire(user, Class::Bulk, &shares).ok()
    }

    fn acquire(
        &self,
        user: UserId,
        class: Class,
        shares: &[&Arc<UserPermits>],
    ) -> Result<Permit, NoPermit> {
        let shares: Result<Vec<_>, _> = shares.iter().map(|share| share.acquire(user)).collect();
        let (shares, text) = (shares?, self.texts.acquire(user)?);
        Ok(Permit(Arc::new(AdmittedText {
            user,
            class,
            _text: text,
            _shares: shares,
        })))
    }

    /// Learns from a batch how long texts take.
    pub(super) fn record(&self, texts: usize, duration: Duration) {
        let texts = u32::try_from(texts).unwrap_or(u32::MAX).max(1);
        let mut time_per_text = self.time_per_text.lock();
        *time_per_text = *time_per_text * 7 / 8 + duration / texts / 8;
    }

    /// Permits in use.
    pub(super) fn in_use(&self) -> usize {
        self.texts.in_use()
    }

    /// Refuses all texts from now on and waits until every permit is returned; false if some are in
    /// use at the deadline.
    pub(super) fn close(&self, deadline: Instant) -> bool {
        self.texts.close(deadline)
    }

    /// How long the workers need for what has been admitted.
    fn retry_after(&self) -> Duration {
        let texts = u32::try_from(self.texts.in_use()).unwrap_or(u32::MAX);
        let needed = self.time_per_text.lock().saturating_mul(texts) / self.workers;
        needed.clamp(RETRY_AFTER.0, RETRY_AFTER.1)
    }
}

impl Permit {
    /// Whose text it is for.
    pub fn user(&self) -> UserId {
        self.0.user
    }

    /// What the text is for.
    pub fn class(&self) -> Class {
        self.0.class
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(capacity: usize) -> TextAdmission {
        TextAdmission::new(capacity, 2)
    }

    /// Takes permits until one is refused.
    fn admit_all(admission: &TextAdmission, user: i64, class: Class) -> Vec<Permit> {
        std::iter::from_fn(|| admission.admit(UserId(user), class).ok()).collect()
    }

    #[test]
    fn searches_leave_a_quarter_to_posts() {
        let admission = admission(64);
        let searches: Vec<_> = (1..10)
            .map(|user| admit_all(&admission, user, Class::Search))
            .collect();
        assert_eq!(searches[0].len(), 24);
        assert_eq!(admission.in_use(), 48);
        assert_eq!(admit_all(&admission, 1, Class::Post).len(), 8);
        assert_eq!(admit_all(&admission, 99, Class::Post).len(), 16);
    }

    #[test]
    fn posts_of_a_user_count_against_its_searches() {
        let admission = admission(64);
        let posts = admit_all(&admission, 1, Class::Post);
        assert_eq!(posts.len(), 32);
        assert_eq!(admit_all(&admission, 1, Class::Search).len(), 0);
        drop(posts);
        assert_eq!(admit_all(&admission, 1, Class::Search).len(), 24);
    }

    #[test]
    fn requests_for_embeddings_leave_room_to_searches_and_to_each_other() {
        let admission = admission(64);
        let borrow_all = |user| -> Vec<Permit> {
            std::iter::from_fn(|| admission.admit_more(UserId(user))).collect()
        };
        let borrowed: Vec<_> = (1..5).map(borrow_all).collect();
        let numbers = borrowed.iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(numbers, [8, 8, 0, 0], "a quarter");
        let begun: Vec<_> = (1..5)
            .map(|user| admit_all(&admission, user, Class::Bulk))
            .collect();
        let numbers = begun.iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(numbers, [8, 8, 0, 0], "half, with what was borrowed");
        assert_eq!(admit_all(&admission, 9, Class::Search).len(), 16);
        drop((borrowed, begun));
        assert_eq!(admission.in_use(), 0);
        assert!(admission.admit_more(UserId(3)).is_some());
    }

    #[test]
    fn a_clone_is_the_same_permit_and_keeps_it_in_use() {
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
        let _posts = admit_all(&admission, 1, Class::Post);
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
    fn a_closed_pipeline_admits_no_text() {
        let admission = admission(4);
        let permit = admission.admit(UserId(1), Class::Post).unwrap();
        assert!(!admission.close(Instant::now()));
        for class in [Class::Post, Class::Search, Class::Bulk] {
            let refused = admission.admit(UserId(2), class);
            assert!(matches!(refused, Err(Error::Stopped)));
        }
        drop(permit);
        assert!(admission.close(Instant::now()));
    }
}
