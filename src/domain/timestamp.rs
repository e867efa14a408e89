//! Points in time as they are stored and displayed.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Microseconds since the Unix epoch, UTC. Shown as RFC 3339 with six decimals and `Z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// The present by the system's clock. Only the outermost layers call this; the others take the
    /// time as an argument.
    pub fn now() -> Self {
        SystemTime::now().into()
    }

    /// Whole seconds since the epoch, rounded down: the unit of token claims.
    pub fn unix_seconds(self) -> i64 {
        self.0.div_euclid(1_000_000)
    }

    /// The start of the given second since the epoch.
    pub fn from_unix_seconds(seconds: i64) -> Self {
        Self(seconds.saturating_mul(1_000_000))
    }

    /// The first whole second that is not before this instant.
    pub fn second_from(self) -> Self {
        Self::from_unix_seconds(self.plus(Duration::from_micros(999_999)).unix_seconds())
    }

    /// This instant moved later by `duration`, capped at the far end of the range.
    pub fn plus(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_add(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)),
        )
    }

    /// This instant moved earlier by `duration`, capped at the near end of the range.
    pub fn minus(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_sub(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)),
        )
    }

    /// How long after `earlier` this is; zero if it is not.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // humantime refuses years past 9999; nothing stores such a time.
        const LAST: u64 = 253_402_300_799_999_999;
        let micros = u64::try_from(self.0).unwrap_or(0).min(LAST);
        humantime::format_rfc3339_micros(UNIX_EPOCH + Duration::from_micros(micros)).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn microseconds_are_displayed_even_if_zero() {
        assert_eq!(
            Timestamp(1_795_381_729_297_687).to_string(),
            "2026-11-22T21:08:49.297687Z"
        );
        assert_eq!(
            Timestamp(1_795_381_729_000_000).to_string(),
            "2026-11-22T21:08:49.000000Z"
        );
    }

    #[test]
    fn next_whole_second_is_not_before_the_instant() {
        assert_eq!(Timestamp(10_000_001).second_from(), Timestamp(11_000_000));
        assert_eq!(Timestamp(10_000_000).second_from(), Timestamp(10_000_000));
        assert_eq!(Timestamp(0).second_from(), Timestamp(0));
    }

    #[test]
    fn extreme_values_do_not_panic() {
        assert_eq!(
            Timestamp(i64::MIN).to_string(),
            "1970-01-01T00:00:00.000000Z"
        );
        assert_eq!(
            Timestamp(i64::MAX).to_string(),
            "9999-12-31T23:59:59.999999Z"
        );
        assert_eq!(Timestamp(i64::MAX).plus(Duration::MAX), Timestamp(i64::MAX));
        assert_eq!(
            Timestamp(i64::MIN).minus(Duration::MAX),
            Timestamp(i64::MIN)
        );
        assert_eq!(Timestamp(0).since(Timestamp(5)), Duration::ZERO);
    }
}
