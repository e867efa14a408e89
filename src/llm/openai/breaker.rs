//! A circuit breaker: an upstream that keeps failing is left alone for a while, then tried by one call at a time.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::llm::BreakerState;

/// Failures in a row that open it, however long they took.
const CONSECUTIVE: u32 = 5;
/// Failures within [`WINDOW`] that open it if they are at least half of what happened there.
const IN_WINDOW: usize = 10;
const WINDOW: Duration = Duration::from_secs(30);
/// Outcomes remembered: more than enough to tell a half.
const REMEMBERED: usize = 100;
/// How long it stays open the first time; doubled with each probe that fails, up to [`LONGEST_OPEN`].
const FIRST_OPEN: Duration = Duration::from_secs(5);
const LONGEST_OPEN: Duration = Duration::from_secs(60);

/// The breaker of one upstream. Time and chance come in as arguments.
#[derive(Debug, Default)]
pub struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    /// Failures since the last success.
    consecutive: u32,
    /// When calls ended, and whether they failed; oldest first.
    recent: VecDeque<(Instant, bool)>,
    /// How often it opened since it was last closed.
    openings: u32,
}

#[derive(Clone, Copy, Debug, Default)]
enum Phase {
    #[default]
    Closed,
    Open {
        until: Instant,
    },
    /// One call is trying the upstream.
    Probing,
}

/// Leave to make one attempt. Dropped without a verdict, as when the caller goes away, it says nothing about the upstream.
#[derive(Debug)]
#[must_use]
pub struct Pass<'a> {
    breaker: &'a Breaker,
    is_probe: bool,
    is_settled: bool,
}

impl Breaker {
    /// Leave for an attempt, or how long there is none.
    pub fn admit(&self, now: Instant) -> Result<Pass<'_>, Duration> {
        let mut state = self.lock();
        let is_probe = match state.phase {
            Phase::Closed => false,
            Phase::Open { until } if until > now => return Err(until - now),
            Phase::Open { .. } => {
                state.phase = Phase::Probing;
                true
            }
            // The probe ends within seconds, one way or the other.
            Phase::Probing => return Err(Duration::from_secs(1)),
        };
        Ok(Pass {
            breaker: self,
            is_probe,
            is_settled: false,
        })
    }

    /// Where it stands.
    pub fn state(&self) -> BreakerState {
        match self.lock().phase {
            Phase::Closed => BreakerState::Closed,
            Phase::Open { .. } => BreakerState::Open,
            Phase::Probing => BreakerState::HalfOpen,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass<'_> {
    /// Tells how the attempt went: `failed` if the upstream is to blame for it. `chance`, from 0 to 1, spreads the time at which
    /// the breakers of several processes try again.
    pub fn settle(mut self, failed: bool, now: Instant, chance: f64) {
        self.is_settled = true;
        let mut state = self.breaker.lock();
        match (state.phase, self.is_probe) {
            (Phase::Probing, true) if failed => state.open(now, chance),
            (Phase::Probing, true) => *state = State::default(),
            (Phase::Closed, _) => {
                state.note(failed, now);
                if state.is_too_much() {
                    state.open(now, chance);
                }
            }
            // A call that had begun before it opened says nothing new.
            (Phase::Open { .. } | Phase::Probing, _) => {}
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if !self.is_settled && self.is_probe {
            let mut state = self.breaker.lock();
            if let Phase::Probing = state.phase {
                // Open with its time over: the next call is a probe.
                state.phase = Phase::Open {
                    until: Instant::now(),
                };
            }
        }
    }
}

impl State {
    fn note(&mut self, failed: bool, now: Instant) {
        self.consecutive = if failed { self.consecutive + 1 } else { 0 };
        self.recent.push_back((now, failed));
        let is_old = |(at, _): &(Instant, bool)| now.saturating_duration_since(*at) > WINDOW;
        while self.recent.len() > REMEMBERED || self.recent.front().is_some_and(is_old) {
            self.recent.pop_front();
        }
    }

    fn is_too_much(&self) -> bool {
        let failures = self.recent.iter().filter(|(_, failed)| *failed).count();
        self.consecutive >= CONSECUTIVE
            || (failures >= IN_WINDOW && failures * 2 >= self.recent.len())
    }

    fn open(&mut self, now: Instant, chance: f64) {
        let time = FIRST_OPEN
            .saturating_mul(1 << self.openings.min(10))
            .min(LONGEST_OPEN);
        self.openings += 1;
        self.consecutive = 0;
        self.recent.clear();
        self.phase = Phase::Open {
            until: now + time.mul_f64(0.8 + 0.4 * chance.clamp(0.0, 1.0)),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);
    /// No spread.
    const MIDDLE: f64 = 0.5;

    fn fail(breaker: &Breaker, now: Instant) {
        breaker.admit(now).unwrap().settle(true, now, MIDDLE);
    }

    fn succeed(breaker: &Breaker, now: Instant) {
        breaker.admit(now).unwrap().settle(false, now, MIDDLE);
    }

    #[test]
    fn five_failures_in_a_row_open_it_and_a_success_between_does_not() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..4 {
            fail(&breaker, now);
        }
        succeed(&breaker, now);
        for minute in 0..4 {
            fail(&breaker, now + 60 * minute * S);
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
        fail(&breaker, now + 300 * S);
        assert_eq!(breaker.state(), BreakerState::Open);
        assert_eq!(breaker.admit(now + 302 * S).unwrap_err(), 3 * S);
    }

    #[test]
    fn half_of_the_calls_failing_opens_it() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..9 {
            fail(&breaker, now);
            succeed(&breaker, now);
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
        fail(&breaker, now);
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[test]
    fn one_call_probes_and_its_outcome_decides() {
        let (breaker, start) = (Breaker::default(), Instant::now());
        for _ in 0..5 {
            fail(&breaker, start);
        }
        let mut now = start + 5 * S;
        for open in [10 * S, 20 * S, 40 * S, 60 * S, 60 * S] {
            let probe = breaker.admit(now).unwrap();
            assert_eq!(breaker.state(), BreakerState::HalfOpen);
            assert!(breaker.admit(now).is_err(), "one probe at a time");
            probe.settle(true, now, MIDDLE);
            assert_eq!(breaker.admit(now).unwrap_err(), open);
            now += open;
        }
        succeed(&breaker, now);
        assert_eq!(breaker.state(), BreakerState::Closed);
        for _ in 0..5 {
            fail(&breaker, now);
        }
        assert_eq!(breaker.admit(now).unwrap_err(), 5 * S, "starts anew");
    }

    #[test]
    fn a_probe_whose_caller_left_makes_room_for_the_next() {
        let (breaker, start) = (Breaker::default(), Instant::now());
        for _ in 0..5 {
            fail(&breaker, start);
        }
        let later = start + 10 * S;
        drop(breaker.admit(later).unwrap());
        assert!(breaker.admit(later).is_ok());
    }

    #[test]
    fn calls_from_before_it_opened_change_nothing() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        let (early, late) = (breaker.admit(now).unwrap(), breaker.admit(now).unwrap());
        for _ in 0..5 {
            fail(&breaker, now);
        }
        early.settle(false, now, MIDDLE);
        late.settle(true, now + S, MIDDLE);
        assert_eq!(breaker.admit(now).unwrap_err(), 5 * S);
    }

    #[test]
    fn chance_spreads_the_reopening_by_a_fifth() {
        for (chance, wait) in [(0.0, 4 * S), (1.0, 6 * S)] {
            let (breaker, now) = (Breaker::default(), Instant::now());
            for _ in 0..5 {
                breaker.admit(now).unwrap().settle(true, now, chance);
            }
            assert_eq!(breaker.admit(now).unwrap_err(), wait);
        }
    }
}
