//! The activity of a connection, and the deadline of each of its phases.

use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::memory_budget::{Exhausted, Reservation};

/// How long a request's head may take to arrive, counted from its first byte, and how long the
/// first byte of a new connection may take.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);
/// How long a connection may idle between two requests. Balancers keep their connections to a
/// server for a while (nginx for 60 s, the template in `deploy/aws` for 180 s). The server must
/// wait longer than they do, or a request that a balancer sends at the moment of closing is lost.
const IDLE_DEADLINE: Duration = Duration::from_secs(200);
/// The slowest reader that is served, in bytes a second. A slower one keeps a response's memory for
/// minutes.
const SLOWEST_READER: f64 = 16.0 * 1024.0;
/// How long a reader may read nothing, and how far it may fall behind [`SLOWEST_READER`].
const READER_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a head that are not counted as memory in flight: an ordinary request has no more.
const ORDINARY_HEAD_BYTES: usize = 16 << 10;

/// Why the service ended a connection before its client did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was idle and others needed its slot.
    MadeRoom,
    /// It was idle for too long.
    Idle,
    /// A request's head began and was not completed in time.
    SlowHead,
    /// The client reads too slowly.
    SlowReader,
}

impl Ending {
    /// The label of the metric that counts it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MadeRoom => "made_room",
            Self::Idle => "idle",
            Self::SlowHead => "slow_head",
            Self::SlowReader => "slow_reader",
        }
    }
}

/// One connection's activity. Its own task writes it, and the search for idle connections reads it.
#[derive(Debug)]
pub struct Activity {
    state: Mutex<ActivityState>,
    /// Notified when the connection must make room.
    asked_to_leave: Notify,
}

#[derive(Debug)]
struct ActivityState {
    phase: RequestPhase,
    /// Whether a request was served on it.
    has_served: bool,
    /// Since when the client reads nothing of the data that waits to be sent.
    blocked_since: Option<Instant>,
    /// How long the client may still be behind. Each byte that it reads adds to this, up to
    /// [`READER_PATIENCE`].
    patience: Duration,
    /// The reservation for the bytes of a long head.
    head_memory: Option<Reservation>,
}

#[derive(Clone, Copy, Debug)]
enum RequestPhase {
    /// No request has begun.
    Idle { since: Instant },
    /// A head has begun to arrive.
    ReadingHead { since: Instant, bytes: usize },
    /// A request is being served, or the connection has become a WebSocket.
    Serving,
}

impl Activity {
    /// The activity of a connection just accepted.
    pub fn new(now: Instant) -> Self {
        Self {
            state: Mutex::new(ActivityState {
                phase: RequestPhase::Idle { since: now },
                has_served: false,
                blocked_since: None,
                patience: READER_PATIENCE,
                head_memory: None,
            }),
            asked_to_leave: Notify::new(),
        }
    }

    /// Records bytes that were received.
    ///
    /// # Errors
    /// [`Exhausted`] if they belong to a long head and the budget has no memory for it.
    pub fn note_read(
        &self,
        bytes: usize,
        now: Instant,
        reserve: impl FnOnce(usize) -> Result<Reservation, Exhausted>,
    ) -> Result<(), Exhausted> {
        let mut state = self.lock();
        let (since, before) = match state.phase {
            RequestPhase::Serving => return Ok(()),
            RequestPhase::Idle { .. } => (now, 0),
            RequestPhase::ReadingHead { since, bytes } => (since, bytes),
        };
        let all = before + bytes;
        state.phase = RequestPhase::ReadingHead { since, bytes: all };
        if all <= ORDINARY_HEAD_BYTES {
            return Ok(());
        }
        match &mut state.head_memory {
            Some(held) => held.try_grow(bytes),
            none => {
                *none = Some(reserve(all)?);
                Ok(())
            }
        }
    }

    /// Records bytes that the client read.
    pub fn note_written(&self, bytes: usize, now: Instant) {
        let mut state = self.lock();
        if let Some(since) = state.blocked_since.take() {
            state.patience = state
                .patience
                .saturating_sub(now.saturating_duration_since(since));
        }
        let earned = Duration::from_secs_f64(bytes as f64 / SLOWEST_READER);
        state.patience = (state.patience + earned).min(READER_PATIENCE);
    }

    /// Records that the client read nothing of the data that waits to be sent.
    pub fn note_blocked(&self, now: Instant) {
        self.lock().blocked_since.get_or_insert(now);
    }

    /// A head is complete and its request is being served.
    pub fn begin_request(&self) {
        let mut state = self.lock();
        state.phase = RequestPhase::Serving;
        state.head_memory = None;
    }

    /// The last byte of a response was handed over.
    pub fn end_request(&self, now: Instant) {
        let mut state = self.lock();
        state.phase = RequestPhase::Idle { since: now };
        state.has_served = true;
    }

    /// The order in which connections make room: first those that never carried a request, then the
    /// longest idle. `None` if this one is not idle.
    pub fn readiness_to_leave(&self) -> Option<(bool, Instant)> {
        let state = self.lock();
        match state.phase {
            RequestPhase::Idle { since } | RequestPhase::ReadingHead { since, .. }
                if state.blocked_since.is_none() =>
            {
                Some((state.has_served, since))
            }
            RequestPhase::Idle { .. }
            | RequestPhase::ReadingHead { .. }
            | RequestPhase::Serving => None,
        }
    }

    /// Asks the connection to make room.
    pub fn ask_to_leave(&self) {
        self.asked_to_leave.notify_one();
    }

    /// Waits until the connection is asked to make room. Cancel safe.
    pub async fn asked_to_leave(&self) {
        self.asked_to_leave.notified().await;
    }

    /// The deadline of the present phase, and the ending if it is missed; `None` if there is none.
    pub fn deadline(&self) -> Option<(Instant, Ending)> {
        let state = self.lock();
        let of_phase = match state.phase {
            RequestPhase::Idle { since } if state.has_served => {
                Some((since + IDLE_DEADLINE, Ending::Idle))
            }
            RequestPhase::Idle { since } => Some((since + HEAD_DEADLINE, Ending::Idle)),
            RequestPhase::ReadingHead { since, .. } => {
                Some((since + HEAD_DEADLINE, Ending::SlowHead))
            }
            RequestPhase::Serving => None,
        };
        let of_reader = state
            .blocked_since
            .map(|since| (since + state.patience, Ending::SlowReader));
        [of_phase, of_reader]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| *at)
    }

    fn lock(&self) -> MutexGuard<'_, ActivityState> {
        self.state.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_budget::{MemoryBudget, Owner};

    const S: Duration = Duration::from_secs(1);

    fn no_memory(_: usize) -> Result<Reservation, Exhausted> {
        Err(Exhausted)
    }

    #[test]
    fn deadline_of_a_head_counts_from_its_first_byte() {
        let start = Instant::now();
        let activity = Activity::new(start);
        assert_eq!(activity.deadline(), Some((start + 30 * S, Ending::Idle)));
        for second in [10, 20, 39] {
            activity
                .note_read(1, start + second * S, no_memory)
                .unwrap();
            assert_eq!(
                activity.deadline(),
                Some((start + 40 * S, Ending::SlowHead))
            );
        }
    }

    #[test]
    fn connection_may_idle_for_longer_than_a_balancer_keeps_it() {
        let start = Instant::now();
        let activity = Activity::new(start);
        activity.note_read(100, start, no_memory).unwrap();
        activity.begin_request();
        assert_eq!(activity.deadline(), None);
        assert_eq!(activity.readiness_to_leave(), None);
        activity.end_request(start + S);
        assert_eq!(activity.deadline(), Some((start + 201 * S, Ending::Idle)));
        assert!(activity.readiness_to_leave().is_some());
    }

    #[test]
    fn reader_may_pause_but_not_stay_below_the_slowest_rate() {
        let start = Instant::now();
        let activity = Activity::new(start);
        activity.begin_request();
        activity.note_blocked(start);
        assert_eq!(
            activity.deadline(),
            Some((start + 30 * S, Ending::SlowReader))
        );
        // 6 kB/s, in a gulp every ten seconds.
        let mut now = start;
        let lasted = loop {
            now += 10 * S;
            match activity.deadline() {
                Some((at, _)) if at <= now => break at - start,
                _ => {
                    activity.note_written(60_000, now);
                    activity.note_blocked(now);
                }
            }
        };
        assert!((30 * S..60 * S).contains(&lasted), "{lasted:?}");
        // 20 kB/s, in a gulp every twenty-five seconds, goes on for ever.
        let activity = Activity::new(start);
        activity.begin_request();
        for gulp in 0..100 {
            let now = start + 25 * gulp * S;
            assert!(activity.deadline().is_none_or(|(at, _)| at > now));
            activity.note_written(500_000, now);
            activity.note_blocked(now);
        }
    }

    #[test]
    fn connection_with_unsent_data_is_not_idle() {
        let now = Instant::now();
        let activity = Activity::new(now);
        activity.begin_request();
        activity.note_blocked(now);
        activity.end_request(now);
        assert_eq!(activity.readiness_to_leave(), None);
        activity.note_written(1, now);
        assert!(activity.readiness_to_leave().is_some());
    }

    #[test]
    fn long_head_reserves_memory_until_its_request_begins() {
        let now = Instant::now();
        let budget = MemoryBudget::new(200_000);
        let reserve = |bytes| budget.reserve(Owner::default(), bytes);
        let activity = Activity::new(now);
        activity.note_read(16_000, now, reserve).unwrap();
        assert_eq!(budget.held(), 0);
        activity.note_read(16_000, now, reserve).unwrap();
        activity.note_read(16_000, now, reserve).unwrap();
        assert_eq!(budget.held(), 48_000);
        activity.begin_request();
        assert_eq!(budget.held(), 0);
        activity.end_request(now);
        assert_eq!(activity.note_read(17_000, now, no_memory), Err(Exhausted));
    }
}
