//! Rates in Django REST framework's syntax: how often something may be done. Any number of rates
//! can hold at once.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The most requests that a rate may allow in its window. A throttle remembers that many instants
/// for a key, 8 bytes each.
pub const MAX_LIMIT: u32 = 10_000;

/// The length of a rate's window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unit {
    /// 1 s.
    Second,
    /// 60 s.
    Minute,
    /// 3,600 s.
    Hour,
    /// 86,400 s.
    Day,
}

impl Unit {
    /// The name of the rate in the `RateLimit` headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Second => "second",
            Self::Minute => "minute",
            Self::Hour => "hour",
            Self::Day => "day",
        }
    }

    /// The length of the window.
    pub fn window(self) -> Duration {
        Duration::from_secs(match self {
            Self::Second => 1,
            Self::Minute => 60,
            Self::Hour => 3_600,
            Self::Day => 86_400,
        })
    }

    fn parse(word: &str) -> Option<Self> {
        match word {
            "s" | "sec" | "second" => Some(Self::Second),
            "m" | "min" | "minute" => Some(Self::Minute),
            "h" | "hour" => Some(Self::Hour),
            "d" | "day" => Some(Self::Day),
            _ => None,
        }
    }
}

/// At most `limit` in any window of `unit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rate {
    /// 1 to [`MAX_LIMIT`].
    pub limit: u32,
    /// The window.
    pub unit: Unit,
}

impl Rate {
    /// The length of the window.
    pub fn window(self) -> Duration {
        self.unit.window()
    }
}

/// Rates that all hold at once, by rising window, one for each window. Empty means no limit.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Rates(Vec<Rate>);

impl Rates {
    /// The rates by rising window.
    pub fn as_slice(&self) -> &[Rate] {
        &self.0
    }

    /// The longest window; `None` without rates.
    pub fn longest_window(&self) -> Option<Duration> {
        self.0.last().map(|rate| rate.window())
    }

    /// The value of the `RateLimit-Policy` header, such as `"second";q=1;w=1, "minute";q=10;w=60`;
    /// `None` without rates.
    pub fn policy(&self) -> Option<String> {
        self.policy_with("")
    }

    /// The same with `prefix` at the beginning of each name.
    pub fn policy_with(&self, prefix: &str) -> Option<String> {
        let policies: Vec<_> = self
            .0
            .iter()
            .map(|rate| {
                let (name, seconds) = (rate.unit.name(), rate.window().as_secs());
                format!("\"{prefix}{name}\";q={};w={seconds}", rate.limit)
            })
            .collect();
        (!policies.is_empty()).then(|| policies.join(", "))
    }
}

/// Why a list of rates is invalid. Quotes the wrong part, because rates are not secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RateError {
    /// A part is not of the form `number/unit`.
    #[error(
        "`{0}` is no rate: write a number, a slash and `s`, `min`, `h` or `day`, or `off` alone"
    )]
    Syntax(String),
    /// The number is out of its range.
    #[error("`{0}` is out of range: a rate allows 1 to {MAX_LIMIT} requests")]
    Limit(String),
}

impl FromStr for Rates {
    type Err = RateError;

    /// Parses `off`, or rates separated by commas: `1/s,10/min`. Of several rates with the same
    /// window the strictest is kept.
    fn from_str(text: &str) -> Result<Self, RateError> {
        if text.trim() == "off" {
            return Ok(Self::default());
        }
        let mut rates: Vec<Rate> = Vec::new();
        for part in text.split(',').map(str::trim) {
            let rate = parse_rate(part)?;
            match rates.iter_mut().find(|known| known.unit == rate.unit) {
                Some(known) => known.limit = known.limit.min(rate.limit),
                None => rates.push(rate),
            }
        }
        rates.sort_unstable_by_key(|rate| rate.unit);
        Ok(Self(rates))
    }
}

fn parse_rate(part: &str) -> Result<Rate, RateError> {
    let syntax = || RateError::Syntax(part.to_owned());
    let (number, unit) = part.split_once('/').ok_or_else(syntax)?;
    let (number, unit) = (number.trim(), unit.trim());
    let unit = Unit::parse(unit).ok_or_else(syntax)?;
    if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()) {
        return Err(syntax());
    }
    match number.parse() {
        Ok(limit @ 1..=MAX_LIMIT) => Ok(Rate { limit, unit }),
        _ => Err(RateError::Limit(part.to_owned())),
    }
}

impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("off");
        }
        for (i, rate) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{}/{}", rate.limit, rate.unit.name())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        text.parse::<Rates>().unwrap().to_string()
    }

    #[test]
    fn every_spelling_of_a_unit_is_parsed() {
        for (spellings, name) in [
            (["s", "sec", "second"].as_slice(), "second"),
            (&["m", "min", "minute"], "minute"),
            (&["h", "hour"], "hour"),
            (&["d", "day"], "day"),
        ] {
            for spelling in spellings {
                assert_eq!(shown(&format!("7/{spelling}")), format!("7/{name}"));
            }
        }
    }

    #[test]
    fn rates_are_sorted_and_the_strictest_of_a_window_is_kept() {
        assert_eq!(
            shown(" 10 / min, 1/s ,20/minute,9/m,10000/day"),
            "1/second,9/minute,10000/day"
        );
    }

    #[test]
    fn off_means_no_rates() {
        let rates: Rates = " off ".parse().unwrap();
        assert_eq!(rates, Rates::default());
        assert_eq!((rates.policy(), rates.longest_window()), (None, None));
        assert_eq!(rates.to_string(), "off");
    }

    #[test]
    fn policy_header_lists_every_rate() {
        let rates: Rates = "1/s,10/min".parse().unwrap();
        assert_eq!(
            rates.policy().unwrap(),
            r#""second";q=1;w=1, "minute";q=10;w=60"#
        );
        assert_eq!(rates.longest_window(), Some(Duration::from_secs(60)));
    }

    #[test]
    fn malformed_rate_is_refused_and_quoted() {
        for (text, part) in [
            ("", ""),
            ("10", "10"),
            ("/s", "/s"),
            ("1/", "1/"),
            ("1/fortnight", "1/fortnight"),
            ("1/S", "1/S"),
            ("-1/s", "-1/s"),
            ("+1/s", "+1/s"),
            ("1.5/s", "1.5/s"),
            ("1/s,", ""),
            ("1/s,off", "off"),
            ("1/s/s", "1/s/s"),
            ("٣/s", "٣/s"),
        ] {
            assert_eq!(
                text.parse::<Rates>(),
                Err(RateError::Syntax(part.to_owned())),
                "{text:?}"
            );
        }
        for part in ["0/s", "10001/s", "99999999999999999999/day"] {
            assert_eq!(
                part.parse::<Rates>(),
                Err(RateError::Limit(part.to_owned()))
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_parsed_or_refused_without_a_panic(text: String) {
            if let Ok(rates) = text.parse::<Rates>() {
                proptest::prop_assert_eq!(rates.to_string().parse(), Ok(rates));
            }
        }

        #[test]
        fn displayed_rates_are_parsed_to_the_same_rates(parts in proptest::collection::vec((1..=MAX_LIMIT, "s|min|h|day"), 1..9)) {
            let text = parts.iter().map(|(limit, unit)| format!("{limit}/{unit}")).collect::<Vec<_>>().join(",");
            let rates: Rates = text.parse().unwrap();
            for (limit, unit) in parts {
                let unit = Unit::parse(&unit).unwrap();
                let kept = rates.as_slice().iter().find(|rate| rate.unit == unit).unwrap();
                proptest::prop_assert!(kept.limit <= limit);
            }
            proptest::prop_assert_eq!(rates.to_string().parse(), Ok(rates));
        }
    }
}
