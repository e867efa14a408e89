//! How far a move has come, for the display of progress.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Counts the rows of one phase after another. The work and the display share it by reference.
#[derive(Debug)]
pub struct Meter(Mutex<(Instant, Reading)>);

/// What a meter shows at one moment.
#[derive(Clone, Debug)]
pub struct Reading {
    /// The present step, in words.
    pub phase: Cow<'static, str>,
    /// Rows done.
    pub done: u64,
    /// Rows in all, where known.
    pub total: Option<u64>,
    /// How long the phase has lasted.
    pub elapsed: Duration,
}

impl Meter {
    /// Nothing is done yet.
    pub fn new(now: Instant) -> Self {
        Self(Mutex::new((now, Reading::begin("starting".into(), None))))
    }

    /// Begins a phase.
    pub fn begin(&self, phase: impl Into<Cow<'static, str>>, total: Option<u64>) {
        *self.0.lock() = (Instant::now(), Reading::begin(phase.into(), total));
    }

    /// Counts rows.
    pub fn advance(&self, rows: u64) {
        self.0.lock().1.done += rows;
    }

    /// Sets the count, where the whole of it is known.
    pub fn reached(&self, rows: u64) {
        self.0.lock().1.done = rows;
    }

    /// What the meter shows now.
    pub fn read(&self) -> Reading {
        let (since, reading) = self.0.lock().clone();
        Reading {
            elapsed: since.elapsed(),
            ..reading
        }
    }
}

impl Reading {
    fn begin(phase: Cow<'static, str>, total: Option<u64>) -> Self {
        Self {
            phase,
            done: 0,
            total,
            elapsed: Duration::ZERO,
        }
    }

    /// Rows per second over the phase; 0 at its beginning.
    pub fn rate(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds < 0.1 {
            0.0
        } else {
            self.done as f64 / seconds
        }
    }

    /// How long the rest takes at the rate so far, where the total is known.
    pub fn left(&self) -> Option<Duration> {
        let rate = self.rate();
        let rest = self.total?.saturating_sub(self.done);
        (rate > 0.0).then(|| Duration::from_secs((rest as f64 / rate).ceil() as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_follows_from_the_rate_so_far() {
        let reading = Reading {
            phase: "importing".into(),
            done: 500,
            total: Some(2_000),
            elapsed: Duration::from_secs(5),
        };
        assert!((reading.rate() - 100.0).abs() < f64::EPSILON);
        assert_eq!(reading.left(), Some(Duration::from_secs(15)));
        let unknown = Reading {
            total: None,
            ..reading.clone()
        };
        assert_eq!(unknown.left(), None);
        let begun = Reading {
            elapsed: Duration::ZERO,
            ..reading
        };
        assert_eq!(begun.left(), None);
    }
}
