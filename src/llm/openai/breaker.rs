//! A circuit breaker: an upstream that keeps failing is not asked for a while. Then single calls
//! try it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus::Gauge;

/// Failures in a row that open the breaker, however long they took.
const CONSECUTIVE: u32 = 5;
/// Failures within [`WINDOW`] that open the breaker, if they are at least half of the outcomes
/// there.
const IN_WINDOW: usize = 10;
const WINDOW: Duration = Duration::from_secs(30);
/// Outcomes remembered: more than enough to see whether half of them are failures.
const REMEMBERED: usize = 100;
/// How long the breaker stays open the first time. Each probe that fails doubles the time, up to
/// [`LONGEST_OPEN`].
const FIRST_OPEN: Duration = Duration::from_secs(5);
const LONGEST_OPEN: Duration = Duration::from_secs(60);
/// How long a probe may take before another one is admitted. Most first tokens have come by then. A
/// probe that hangs must not block all calls until its deadline, and one probe in three seconds is
/// no load.
const PROBE_PATIENCE: Duration = Duration::from_secs(3);

/// The breaker of one upstream. Time and randomness come in as arguments.
#[derive(Debug)]
pub struct Breaker {
    /// Shows its state: closed 0, half-open 1, open 2.
    shown: Gauge,
    state: Mutex<BreakerState>,
}

#[derive(Debug, Default)]
struct BreakerState {
    phase: BreakerPhase,
    /// Failures since the last success.
    consecutive: u32,
    /// When calls ended and whether they failed, oldest first.
    recent: VecDeque<(Instant, bool)>,
    /// How often the breaker has opened since the last call that succeeded to its end.
    openings: u32,
    /// How often probing has begun. Outcomes of probes of an earlier round are ignored.
    rounds: u64,
}

#[derive(Clone, Copy, Debug, Default)]
enum BreakerPhase {
    #[default]
    Closed,
    Open {
        until: Instant,
    },
    /// Single calls try the upstream. From `next` on another one may.
    Probing {
        next: Instant,
    },
}

/// What an attempt shows about its upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttemptOutcome {
    /// The upstream works.
    Success,
    /// The upstream is the cause of the failure.
    Failure,
    /// Nothing.
    Unknown,
}

/// The right to make one attempt. If it is dropped without an outcome, as when the caller leaves,
/// the breaker learns nothing.
#[derive(Debug)]
#[must_use]
pub struct AttemptPermit<'a> {
    breaker: &'a Breaker,
    /// The round in which the attempt was admitted.
    round: u64,
    /// Whether the attempt is a probe without an outcome.
    is_probe: bool,
}

impl Breaker {
    /// A closed breaker.
    pub fn new(shown: Gauge) -> Self {
        let state = BreakerState::default();
        shown.set(state.phase.value());
        Self {
            shown,
            state: Mutex::new(state),
        }
    }

    /// Admits an attempt, or returns how long no attempt is admitted.
    pub fn admit(&self, now: Instant) -> Result<AttemptPermit<'_>, Duration> {
        let mut state = self.state.lock();
        if let Some(wait) = state.wait(now) {
            return Err(wait);
        }
        let is_probe = !matches!(state.phase, BreakerPhase::Closed);
        if matches!(state.phase, BreakerPhase::Open { .. }) {
            state.rounds += 1;
        }
        if is_probe {
            let next = now + PROBE_PATIENCE;
            self.enter(&mut state, BreakerPhase::Probing { next });
        }
        Ok(AttemptPermit {
            breaker: self,
            round: state.rounds,
            is_probe,
        })
    }

    /// Whether an attempt would be admitted.
    pub fn would_admit(&self, now: Instant) -> bool {
        self.state.lock().wait(now).is_none()
    }

    /// Changes the phase. The caller holds the lock, so the gauge shows the latest phase.
    fn enter(&self, state: &mut BreakerState, phase: BreakerPhase) {
        state.phase = phase;
        self.shown.set(phase.value());
    }

    fn open(&self, state: &mut BreakerState, now: Instant, chance: f64) {
        let time = FIRST_OPEN
            .saturating_mul(1 << state.openings.min(10))
            .min(LONGEST_OPEN);
        state.openings += 1;
        state.consecutive = 0;
        state.recent.clear();
        let until = now + time.mul_f64(0.8 + 0.4 * chance.clamp(0.0, 1.0));
        self.enter(state, BreakerPhase::Open { until });
    }
}

impl AttemptPermit<'_> {
    /// Notes that the upstream has begun to answer. If the attempt is a probe, this closes the
    /// breaker, because an answer may take minutes. The next failure, even of this attempt, opens
    /// it again, for longer.
    pub fn note_response(&mut self) {
        if !std::mem::take(&mut self.is_probe) {
            return;
        }
        let mut state = self.breaker.state.lock();
        if state.is_probing(self.round) {
            state.consecutive = CONSECUTIVE - 1;
            self.breaker.enter(&mut state, BreakerPhase::Closed);
        }
    }

    /// Notes the outcome of the attempt. `chance`, from 0 to 1, spreads the times at which the
    /// breakers of several processes try again.
    pub fn settle(mut self, outcome: AttemptOutcome, now: Instant, chance: f64) {
        if outcome == AttemptOutcome::Unknown {
            return;
        }
        let failed = outcome == AttemptOutcome::Failure;
        let mut state = self.breaker.state.lock();
        let is_probe = std::mem::take(&mut self.is_probe) && state.is_probing(self.round);
        // Otherwise the call began before the breaker last opened.
        let counts = matches!(state.phase, BreakerPhase::Closed) && self.round == state.rounds;
        if is_probe && !failed {
            (state.consecutive, state.openings) = (0, 0);
            self.breaker.enter(&mut state, BreakerPhase::Closed);
        } else if is_probe || (counts && state.is_too_much_after(failed, now)) {
            self.breaker.open(&mut state, now, chance);
        }
    }
}

impl Drop for AttemptPermit<'_> {
    fn drop(&mut self) {
        if self.is_probe {
            let mut state = self.breaker.state.lock();
            if state.is_probing(self.round) {
                // The next call is a probe.
                let next = Instant::now();
                self.breaker
                    .enter(&mut state, BreakerPhase::Probing { next });
            }
        }
    }
}

impl BreakerPhase {
    /// How a metric shows it.
    fn value(self) -> f64 {
        match self {
            Self::Closed => 0.0,
            Self::Probing { .. } => 1.0,
            Self::Open { .. } => 2.0,
        }
    }
}

impl BreakerState {
    /// How long no attempt is admitted; `None` if one is admitted now.
    fn wait(&self, now: Instant) -> Option<Duration> {
        match self.phase {
            BreakerPhase::Closed => None,
            BreakerPhase::Open { until: at } | BreakerPhase::Probing { next: at } => {
                (at > now).then(|| at - now)
            }
        }
    }

    fn is_probing(&self, round: u64) -> bool {
        matches!(self.phase, BreakerPhase::Probing { .. }) && self.rounds == round
    }

    /// Notes an outcome. Returns whether there are too many failures now.
    fn is_too_much_after(&mut self, failed: bool, now: Instant) -> bool {
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
        let failures = self.recent.iter().filter(|(_, failed)| *failed).count();
        self.consecutive >= CONSECUTIVE
            || (failures >= IN_WINDOW && failures * 2 >= self.recent.len())
    }
}

#[cfg(test)]
mod tests {
    use super::AttemptOutcome::{Failure, Success, Unknown};
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

    /// A breaker that has just opened.
    fn opened(now: Instant) -> Breaker {
        let breaker = new();
        for _ in 0..5 {
            fail(&breaker, now);
        }
        breaker
    }

    fn fail(breaker: &Breaker, now: Instant) {
        breaker.admit(now).unwrap().settle(Failure, now, MIDDLE);
    }

    fn succeed(breaker: &Breaker, now: Instant) {
        breaker.admit(now).unwrap().settle(Success, now, MIDDLE);
    }

    #[test]
    fn five_failures_in_a_row_open_the_breaker() {
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
    fn failures_of_half_of_the_calls_open_the_breaker() {
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
            probe.settle(Failure, now, MIDDLE);
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
    fn a_probe_whose_caller_has_left_is_replaced_by_the_next() {
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
    fn a_probe_closes_the_breaker_as_soon_as_the_upstream_begins_to_answer() {
        let start = Instant::now();
        let breaker = opened(start);
        let mut probe = breaker.admit(start + 5 * S).unwrap();
        probe.note_response();
        assert_eq!(state(&breaker), "closed");
        succeed(&breaker, start + 5 * S);
        probe.settle(Success, start + 60 * S, MIDDLE);
        assert_eq!(state(&breaker), "closed");
    }

    #[test]
    fn the_breaker_opens_for_longer_each_time_that_an_answer_begins_and_fails() {
        let start = Instant::now();
        let (breaker, mut now) = (opened(start), start + 5 * S);
        for open in [10 * S, 20 * S, 40 * S] {
            let mut probe = breaker.admit(now).unwrap();
            probe.note_response();
            probe.settle(Failure, now, MIDDLE);
            assert_eq!(breaker.admit(now).unwrap_err(), open);
            now += open;
        }
    }

    #[test]
    fn a_probe_without_an_outcome_is_joined_by_another_after_a_while() {
        let start = Instant::now();
        let (breaker, now) = (opened(start), start + 5 * S);
        let hanging = breaker.admit(now).unwrap();
        assert_eq!(breaker.admit(now + S).unwrap_err(), 2 * S);
        assert!(!breaker.would_admit(now + S) && breaker.would_admit(now + 3 * S));
        let second = breaker.admit(now + 3 * S).unwrap();
        assert!(breaker.admit(now + 4 * S).is_err());
        second.settle(Success, now + 4 * S, MIDDLE);
        assert_eq!(state(&breaker), "closed");
        // The outcome of the first probe is one failure among others now.
        hanging.settle(Failure, now + 60 * S, MIDDLE);
        assert_eq!(state(&breaker), "closed");
    }

    #[test]
    fn calls_that_began_before_the_breaker_opened_are_ignored_after_it_has_closed() {
        let start = Instant::now();
        let breaker = new();
        let old: Vec<_> = (0..5).map(|_| breaker.admit(start).unwrap()).collect();
        for _ in 0..5 {
            fail(&breaker, start);
        }
        let now = start + 5 * S;
        let mut probe = breaker.admit(now).unwrap();
        probe.note_response();
        for call in old {
            call.settle(Failure, now, MIDDLE);
        }
        assert_eq!(state(&breaker), "closed");
        probe.settle(Success, now, MIDDLE);
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
            .settle(Failure, now + 3 * S, MIDDLE);
        let again = breaker.admit(now + 13 * S).unwrap();
        hanging.settle(Failure, now + 13 * S, MIDDLE);
        assert_eq!(state(&breaker), "half-open");
        again.settle(Success, now + 13 * S, MIDDLE);
        assert_eq!(state(&breaker), "closed");
    }

    #[test]
    fn calls_that_began_before_the_breaker_opened_are_ignored_while_it_is_open() {
        let (breaker, now) = (new(), Instant::now());
        let (early, late) = (breaker.admit(now).unwrap(), breaker.admit(now).unwrap());
        for _ in 0..5 {
            fail(&breaker, now);
        }
        early.settle(Success, now, MIDDLE);
        late.settle(Failure, now + S, MIDDLE);
        assert_eq!(breaker.admit(now).unwrap_err(), 5 * S);
    }

    #[test]
    fn chance_spreads_the_reopening_by_a_fifth() {
        for (chance, wait) in [(0.0, 4 * S), (1.0, 6 * S)] {
            let (breaker, now) = (new(), Instant::now());
            for _ in 0..5 {
                breaker.admit(now).unwrap().settle(Failure, now, chance);
            }
            assert_eq!(breaker.admit(now).unwrap_err(), wait);
        }
    }
}
