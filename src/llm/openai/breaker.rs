//! A circuit breaker: an upstream that keeps failing is left alone for a while, then tried by one call at a time.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus::Gauge;

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
/// How long a probe may be without a verdict before another one is let through. Most first tokens are there by then; a probe that
/// hangs must not keep everybody out until its deadline, and one in three seconds is no load.
const PROBE_PATIENCE: Duration = Duration::from_secs(3);

/// The breaker of one upstream. Time and chance come in as arguments.
pub struct Breaker {
    /// Shows its state: closed 0, half-open 1, open 2.
    shown: Gauge,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    /// Failures since the last success.
    consecutive: u32,
    /// When calls ended, and whether they failed; oldest first.
    recent: VecDeque<(Instant, bool)>,
    /// How often it opened since a call last went well to its end.
    openings: u32,
    /// How often probing began: outcomes of an earlier time's probes say nothing new.
    rounds: u64,
}

#[derive(Clone, Copy, Debug, Default)]
enum Phase {
    #[default]
    Closed,
    Open {
        until: Instant,
    },
    /// Single calls try the upstream; from `next` on there may be a further one.
    Probing {
        next: Instant,
    },
}

/// What an attempt says of its upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is there and answers.
    Well,
    /// It is to blame for the attempt's failure.
    Ill,
    /// Nothing.
    Unknown,
}

/// Leave to make one attempt. Dropped without a verdict, as when the caller goes away, it says nothing about the upstream.
#[must_use]
pub struct Pass<'a> {
    breaker: &'a Breaker,
    /// The round in which it was admitted: how often the breaker had begun to probe by then.
    admitted: u64,
    /// The round that it probes in, if it is a probe without a verdict.
    probes: Option<u64>,
}

impl std::fmt::Debug for Breaker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Breaker").field(&self.lock().phase).finish()
    }
}

impl std::fmt::Debug for Pass<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Pass").field(&self.probes).finish()
    }
}

impl Breaker {
    /// A closed one.
    pub fn new(shown: Gauge) -> Self {
        let state = State::default();
        shown.set(state.phase.value());
        Self {
            shown,
            state: Mutex::new(state),
        }
    }

    /// Leave for an attempt, or how long there is none.
    pub fn admit(&self, now: Instant) -> Result<Pass<'_>, Duration> {
        let mut state = self.lock();
        if let Some(wait) = state.wait(now) {
            return Err(wait);
        }
        let probes = match state.phase {
            Phase::Closed => None,
            Phase::Open { .. } => {
                state.rounds += 1;
                Some(state.rounds)
            }
            Phase::Probing { .. } => Some(state.rounds),
        };
        if probes.is_some() {
            let next = now + PROBE_PATIENCE;
            self.enter(&mut state, Phase::Probing { next });
        }
        Ok(Pass {
            breaker: self,
            admitted: state.rounds,
            probes,
        })
    }

    /// Whether an attempt would be let through.
    pub fn would_admit(&self, now: Instant) -> bool {
        self.lock().wait(now).is_none()
    }

    /// Changes the phase. The caller holds the lock, so the gauge shows the latest phase.
    fn enter(&self, state: &mut State, phase: Phase) {
        state.phase = phase;
        self.shown.set(phase.value());
    }

    fn open(&self, state: &mut State, now: Instant, chance: f64) {
        let time = FIRST_OPEN
            .saturating_mul(1 << state.openings.min(10))
            .min(LONGEST_OPEN);
        state.openings += 1;
        state.consecutive = 0;
        state.recent.clear();
        let until = now + time.mul_f64(0.8 + 0.4 * chance.clamp(0.0, 1.0));
        self.enter(state, Phase::Open { until });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass<'_> {
    /// Tells that the upstream has begun to answer. A probe has done its work with that, and closes the breaker: an answer may
    /// go on for minutes. It closes on trial: the next failure, be it this attempt's own, opens it again, for longer.
    pub fn prove(&mut self) {
        let Some(round) = self.probes.take() else {
            return;
        };
        let mut state = self.breaker.lock();
        if state.is_probing(round) {
            state.consecutive = CONSECUTIVE - 1;
            self.breaker.enter(&mut state, Phase::Closed);
        }
    }

    /// Tells how the attempt went. `chance`, from 0 to 1, spreads the time at which the breakers of several processes try again.
    pub fn settle(mut self, verdict: Verdict, now: Instant, chance: f64) {
        if verdict == Verdict::Unknown {
            return;
        }
        let failed = verdict == Verdict::Ill;
        let mut state = self.breaker.lock();
        match (state.phase, self.probes.take()) {
            (Phase::Probing { .. }, Some(round)) if round == state.rounds => {
                if failed {
                    self.breaker.open(&mut state, now, chance);
                } else {
                    (state.consecutive, state.openings) = (0, 0);
                    self.breaker.enter(&mut state, Phase::Closed);
                }
            }
            (Phase::Closed, _) if self.admitted == state.rounds => {
                state.note(failed, now);
                if state.is_too_much() {
                    self.breaker.open(&mut state, now, chance);
                }
            }
            // A call that had begun before it last opened says nothing new.
            (Phase::Closed | Phase::Open { .. } | Phase::Probing { .. }, _) => {}
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if let Some(round) = self.probes {
            let mut state = self.breaker.lock();
            if state.is_probing(round) {
                // The next call is a probe.
                let next = Instant::now();
                self.breaker.enter(&mut state, Phase::Probing { next });
            }
        }
    }
}

impl Phase {
    /// How a metric shows it.
    fn value(self) -> f64 {
        match self {
            Self::Closed => 0.0,
            Self::Probing { .. } => 1.0,
            Self::Open { .. } => 2.0,
        }
    }
}

impl State {
    /// How long nobody is let through; `None` if somebody is.
    fn wait(&self, now: Instant) -> Option<Duration> {
        match self.phase {
            Phase::Closed => None,
            Phase::Open { until: at } | Phase::Probing { next: at } => (at > now).then(|| at - now),
        }
    }

    fn is_probing(&self, round: u64) -> bool {
        matches!(self.phase, Phase::Probing { .. }) && self.rounds == round
    }

    fn note(&mut self, failed: bool, now: Instant) {
        if failed {
            self.consecutive += 1;
        } else {
            (self.consecutive, self.openings) = (0, 0);
        }
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
}

#[cfg(test)]
mod tests {
    use super::Verdict::{Ill, Unknown, Well};
    use super::*;

    const S: Duration = Duration::from_secs(1);
    /// No spread.
    const MIDDLE: f64 = 0.5;

    fn new() -> Breaker {
        Breaker::new(Gauge::new("breaker", "state").unwrap())
    }

    /// As the metric shows it.
    fn state(breaker: &Breaker) -> &'static str {
        ["closed", "half-open", "open"][breaker.shown.get() as usize]
    }

    /// One that has just opened.
    fn opened(now: Instant) -> Breaker {
        let breaker = new();
        for _ in 0..5 {
            fail(&breaker, now);
        }
        breaker
    }

    fn fail(breaker: &Breaker, now: Instant) {
        breaker.admit(now).unwrap().settle(Ill, now, MIDDLE);
    }

    fn succeed(breaker: &Breaker, now: Instant) {
        breaker.admit(now).unwrap().settle(Well, now, MIDDLE);
    }

    #[test]
    fn five_failures_in_a_row_open_it_and_a_success_between_does_not() {
        let (breaker, now) = (new(), Instant::now());
        for _ in 0..4 {
            fail(&breaker, now);
        }
        succeed(&breaker, now);
        for minute in 0..4 {
            fail(&breaker, now + 60 * minute * S);
        }
        assert_eq!(state(&breaker), "closed");
        fail(&breaker, now + 300 * S);
        assert_eq!(state(&breaker), "open");
        assert_eq!(breaker.admit(now + 302 * S).unwrap_err(), 3 * S);
    }

    #[test]
    fn half_of_the_calls_failing_opens_it() {
        let (breaker, now) = (new(), Instant::now());
        for _ in 0..9 {
            fail(&breaker, now);
            succeed(&breaker, now);
        }
        assert_eq!(state(&breaker), "closed");
        fail(&breaker, now);
        assert_eq!(state(&breaker), "open");
    }

    #[test]
    fn one_call_probes_and_its_outcome_decides() {
        let (breaker, start) = (new(), Instant::now());
        for _ in 0..5 {
            fail(&breaker, start);
        }
        let mut now = start + 5 * S;
        for open in [10 * S, 20 * S, 40 * S, 60 * S, 60 * S] {
            let probe = breaker.admit(now).unwrap();
            assert_eq!(state(&breaker), "half-open");
            assert!(breaker.admit(now).is_err(), "one probe at a time");
            probe.settle(Ill, now, MIDDLE);
            assert_eq!(breaker.admit(now).unwrap_err(), open);
            now += open;
        }
        succeed(&breaker, now);
        assert_eq!(state(&breaker), "closed");
        for _ in 0..5 {
            fail(&breaker, now);
        }
        assert_eq!(breaker.admit(now).unwrap_err(), 5 * S, "starts anew");
    }

    #[test]
    fn a_probe_whose_caller_left_makes_room_for_the_next() {
        let start = Instant::now();
        let later = start + 10 * S;
        let breaker = opened(start);
        drop(breaker.admit(later).unwrap());
        assert_eq!(state(&breaker), "half-open");
        let next = breaker.admit(later).unwrap();
        assert!(breaker.admit(later).is_err());
        next.settle(Unknown, later, MIDDLE);
        succeed(&breaker, later);
        assert_eq!(state(&breaker), "closed");
    }

    #[test]
    fn a_probe_lets_the_others_in_as_soon_as_the_upstream_begins_to_answer() {
        let start = Instant::now();
        let breaker = opened(start);
        let mut probe = breaker.admit(start + 5 * S).unwrap();
        probe.prove();
        assert_eq!(state(&breaker), "closed");
        succeed(&breaker, start + 5 * S);
        probe.settle(Well, start + 60 * S, MIDDLE);
        assert_eq!(state(&breaker), "closed");
    }

    #[test]
    fn an_upstream_that_begins_well_and_ends_badly_is_left_alone_for_longer_each_time() {
        let start = Instant::now();
        let (breaker, mut now) = (opened(start), start + 5 * S);
        for open in [10 * S, 20 * S, 40 * S] {
            let mut probe = breaker.admit(now).unwrap();
            probe.prove();
            probe.settle(Ill, now, MIDDLE);
            assert_eq!(breaker.admit(now).unwrap_err(), open);
            now += open;
        }
    }

    #[test]
    fn a_probe_without_a_verdict_is_joined_by_another_after_a_while() {
        let start = Instant::now();
        let (breaker, now) = (opened(start), start + 5 * S);
        let hanging = breaker.admit(now).unwrap();
        assert_eq!(breaker.admit(now + S).unwrap_err(), 2 * S);
        assert!(!breaker.would_admit(now + S) && breaker.would_admit(now + 3 * S));
        let second = breaker.admit(now + 3 * S).unwrap();
        assert!(breaker.admit(now + 4 * S).is_err());
        second.settle(Well, now + 4 * S, MIDDLE);
        assert_eq!(state(&breaker), "closed");
        // The first one's end is one failure among others now.
        hanging.settle(Ill, now + 60 * S, MIDDLE);
        assert_eq!(state(&breaker), "closed");
    }

    #[test]
    fn calls_from_before_it_opened_say_nothing_once_it_is_closed_again() {
        let start = Instant::now();
        let breaker = new();
        let old: Vec<_> = (0..5).map(|_| breaker.admit(start).unwrap()).collect();
        for _ in 0..5 {
            fail(&breaker, start);
        }
        let now = start + 5 * S;
        let mut probe = breaker.admit(now).unwrap();
        probe.prove();
        for call in old {
            call.settle(Ill, now, MIDDLE);
        }
        assert_eq!(state(&breaker), "closed");
        probe.settle(Well, now, MIDDLE);
        assert_eq!(state(&breaker), "closed");
    }

    #[test]
    fn a_probe_of_an_earlier_round_decides_nothing() {
        let start = Instant::now();
        let (breaker, now) = (opened(start), start + 5 * S);
        let hanging = breaker.admit(now).unwrap();
        breaker
            .admit(now + 3 * S)
            .unwrap()
            .settle(Ill, now + 3 * S, MIDDLE);
        let again = breaker.admit(now + 13 * S).unwrap();
        hanging.settle(Ill, now + 13 * S, MIDDLE);
        assert_eq!(state(&breaker), "half-open");
        again.settle(Well, now + 13 * S, MIDDLE);
        assert_eq!(state(&breaker), "closed");
    }

    #[test]
    fn calls_from_before_it_opened_change_nothing() {
        let (breaker, now) = (new(), Instant::now());
        let (early, late) = (breaker.admit(now).unwrap(), breaker.admit(now).unwrap());
        for _ in 0..5 {
            fail(&breaker, now);
        }
        early.settle(Well, now, MIDDLE);
        late.settle(Ill, now + S, MIDDLE);
        assert_eq!(breaker.admit(now).unwrap_err(), 5 * S);
    }

    #[test]
    fn chance_spreads_the_reopening_by_a_fifth() {
        for (chance, wait) in [(0.0, 4 * S), (1.0, 6 * S)] {
            let (breaker, now) = (new(), Instant::now());
            for _ in 0..5 {
                breaker.admit(now).unwrap().settle(Ill, now, chance);
            }
            assert_eq!(breaker.admit(now).unwrap_err(), wait);
        }
    }
}
