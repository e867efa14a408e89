//! How many calls are in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::observer::{Event, Observer};

/// When a refused caller may try again; calls take seconds.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// As many calls are in flight as may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many calls are in flight")]
pub struct Busy {
    /// When to try again.
    pub retry_after: Duration,
}

/// A place among the calls in flight, given back when dropped.
#[derive(Debug)]
#[must_use]
pub struct CallPermit(Arc<Admission>);

/// Counts the calls in flight.
pub(super) struct Admission {
    in_flight: AtomicUsize,
    most: usize,
    observer: Arc<dyn Observer>,
}

impl std::fmt::Debug for Admission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admission")
            .field("in_flight", &self.in_flight)
            .field("most", &self.most)
            .finish_non_exhaustive()
    }
}

impl Admission {
    pub(super) fn new(most: usize, observer: Arc<dyn Observer>) -> Arc<Self> {
        Arc::new(Self {
            in_flight: AtomicUsize::new(0),
            most,
            observer,
        })
    }

    pub(super) fn admit(self: &Arc<Self>) -> Result<CallPermit, Busy> {
        let more = |count: usize| (count < self.most).then_some(count + 1);
        match self
            .in_flight
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
        {
            Ok(_) => {
                self.observer.observe(Event::Admitted);
                Ok(CallPermit(Arc::clone(self)))
            }
            Err(_) => {
                self.observer.observe(Event::Refused);
                Err(Busy {
                    retry_after: RETRY_AFTER,
                })
            }
        }
    }
}

impl Drop for CallPermit {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
        self.0.observer.observe(Event::Left);
    }
}

#[cfg(test)]
mod tests {
    use super::super::observer::Unobserved;
    use super::*;

    #[test]
    fn beyond_the_limit_a_call_is_refused_until_one_ends() {
        let admission = Admission::new(2, Arc::new(Unobserved));
        let (one, two) = (admission.admit().unwrap(), admission.admit().unwrap());
        assert_eq!(
            admission.admit().unwrap_err(),
            Busy {
                retry_after: RETRY_AFTER
            }
        );
        drop(one);
        let three = admission.admit().unwrap();
        drop((two, three));
        assert_eq!(admission.in_flight.load(Ordering::Relaxed), 0);
    }
}
