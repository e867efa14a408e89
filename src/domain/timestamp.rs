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

    /// Reads RFC 3339, with `Z` or an offset: `2026-11-22T21:08:49Z`, `2026-11-22 22:08:49+01:00`.
    /// Digits beyond microseconds are cut off. `None` for any other text, and for times before
    /// 1970.
    pub fn parse_rfc3339(text: &str) -> Option<Self> {
        // The shortest text with an offset has 20 bytes; the parser takes less than a time.
        if !text.is_ascii() || text.len() < 20 {
            return None;
        }
        let text = text.to_ascii_uppercase();
        let (time, offset_minutes) = match text.strip_suffix('Z') {
            Some(time) => (time, 0),
            None => {
                let (time, offset) = text.split_at_checked(text.len().checked_sub(6)?)?;
                (time, parse_offset(offset)?)
            }
        };
        // The standard allows `t`, which this parser does not know.
        let time = humantime::parse_rfc3339_weak(&time.to_ascii_uppercase()).ok()?;
        let since = time.duration_since(UNIX_EPOCH).ok()?;
        let micros = i64::try_from(since.as_micros()).ok()?;
        let micros = micros.checked_sub(offset_minutes * 60_000_000)?;
        (micros >= 0).then_some(Self(micros))
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

/// The minutes of an offset such as `+01:00`.
fn parse_offset(text: &str) -> Option<i64> {
    let (hours, minutes) = text.get(1..)?.split_once(':')?;
    let number = |digits: &str, most| {
        let is_number = digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit());
        let number: Option<i64> = digits.parse().ok();
        number.filter(|number| is_number && *number <= most)
    };
    let minutes = number(hours, 23)? * 60 + number(minutes, 59)?;
    match text.as_bytes().first()? {
        b'+' => Some(minutes),
        b'-' => Some(-minutes),
        _ => None,
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
    fn rfc_3339_is_read_with_any_offset_and_nothing_else() {
        let at = Some(Timestamp(1_795_381_729_297_687));
        for text in [
            "2026-11-22T21:08:49.297687Z",
            "2026-11-22t21:08:49.297687z",
            "2026-11-22 21:08:49.297687000Z",
            "2026-11-22T22:38:49.297687+01:30",
            "2026-11-22T16:08:49.297687-05:00",
        ] {
            assert_eq!(Timestamp::parse_rfc3339(text), at, "{text}");
        }
        for text in [
            "",
            "Z",
            "2026-11-22",
            "2026-11-22Z",
            "2026-11-22T21:08Z",
            "2026-11-22T21:08:49",
            "2026-11-22T21:08:49+0100",
            "2026-11-22T21:08:49+24:00",
            "2026-11-22T21:08:49 01:00",
            "2026-13-22T21:08:49Z",
            "2026-11-22T21:08:49+01:0é",
            "1969-12-31T23:59:59Z",
            "1970-01-01T00:00:00+00:01",
            "12026-11-22T21:08:49Z",
            "soon",
        ] {
            assert_eq!(Timestamp::parse_rfc3339(text), None, "{text}");
        }
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
