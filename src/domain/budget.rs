//! Amounts of money, and budgets: an amount for each period.
//!
//! Amounts are integers of picodollars. A price of a token has up to ten decimals, and sums of
//! binary fractions would drift.

use std::fmt;
use std::str::FromStr;

use super::Timestamp;

/// Picodollars of one US dollar.
const DOLLAR: i64 = 1_000_000_000_000;
/// The decimals of a dollar that an amount keeps.
const DECIMALS: usize = 12;
/// Microseconds of a day.
const DAY_MICROS: i64 = 86_400_000_000;

/// The largest budget: a million US dollars. An `i64` holds nine times as much, so that sums over
/// a budget are in its range.
pub const MAX_BUDGET: Picodollars = Picodollars(1_000_000 * DOLLAR);

/// An amount of money in units of 10⁻¹² US dollars.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Picodollars(pub i64);

/// Why a text is no amount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AmountError {
    /// It is no decimal number without a sign.
    #[error("it is no amount in US dollars: write a number such as 20 or 0.50")]
    Syntax,
    /// It has more decimals than an amount keeps.
    #[error("it has more than {DECIMALS} decimals")]
    TooPrecise,
    /// It is larger than an amount can be.
    #[error("it is out of range")]
    Range,
}

impl FromStr for Picodollars {
    type Err = AmountError;

    /// Parses an amount in US dollars, exactly: decimal digits with at most one point, and an
    /// exponent as JSON writes it: `20`, `0.50`, `1.5e-07`. No sign.
    fn from_str(text: &str) -> Result<Self, AmountError> {
        let decimal = Decimal::parse(text)?;
        if decimal.exponent < 0 {
            return Err(AmountError::TooPrecise);
        }
        decimal.rounded_down()
    }
}

impl Picodollars {
    /// Parses an amount in the same way, and cuts off what comes after its last decimal.
    ///
    /// # Errors
    /// `Syntax` or `Range`.
    pub fn parse_rounded_down(text: &str) -> Result<Self, AmountError> {
        Decimal::parse(text)?.rounded_down()
    }
}

/// A number of picodollars: its digits, without zeros at either end, times ten to the power of
/// `exponent`.
struct Decimal {
    digits: String,
    exponent: i64,
}

impl Decimal {
    fn parse(text: &str) -> Result<Self, AmountError> {
        let (number, exponent) = match text.split_once(['e', 'E']) {
            Some((number, exponent)) => (number, parse_exponent(exponent)?),
            None => (text, 0),
        };
        let (whole, fraction) = match number.split_once('.') {
            Some((_, "")) => return Err(AmountError::Syntax),
            Some(parts) => parts,
            None => (number, ""),
        };
        let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || !is_number(whole) || !is_number(fraction) {
            return Err(AmountError::Syntax);
        }
        let written = format!("{whole}{fraction}");
        let digits = written.trim_end_matches('0');
        let length = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let exponent = length(DECIMALS + written.len() - digits.len())
            .saturating_sub(length(fraction.len()))
            .saturating_add(exponent);
        let digits = digits.trim_start_matches('0').to_owned();
        Ok(Self {
            // Nothing is nothing, times ten however often.
            exponent: if digits.is_empty() { 0 } else { exponent },
            digits,
        })
    }

    fn rounded_down(mut self) -> Result<Picodollars, AmountError> {
        if self.exponent < 0 {
            let dropped = usize::try_from(self.exponent.unsigned_abs()).unwrap_or(usize::MAX);
            self.digits
                .truncate(self.digits.len().saturating_sub(dropped));
            self.exponent = 0;
        }
        if self.digits.is_empty() {
            return Ok(Picodollars(0));
        }
        let value: i64 = self.digits.parse().map_err(|_| AmountError::Range)?;
        u32::try_from(self.exponent)
            .ok()
            .and_then(|exponent| 10_i64.checked_pow(exponent))
            .and_then(|scale| value.checked_mul(scale))
            .map(Picodollars)
            .ok_or(AmountError::Range)
    }
}

/// The exponent of a number. One of very many digits is capped, which leaves any amount too large
/// or too precise.
fn parse_exponent(text: &str) -> Result<i64, AmountError> {
    let (sign, digits) = match text.as_bytes().first() {
        Some(b'-') => (-1, &text[1..]),
        Some(b'+') => (1, &text[1..]),
        _ => (1, text),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(AmountError::Syntax);
    }
    Ok(sign * digits.parse().unwrap_or(i64::MAX / 4).min(i64::MAX / 4))
}

impl fmt::Display for Picodollars {
    /// Shows US dollars exactly, with at least two decimals: `20.00`, `0.000000000001`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.0 < 0 { "-" } else { "" };
        let (whole, fraction) = (
            self.0.unsigned_abs() / DOLLAR.unsigned_abs(),
            self.0.unsigned_abs() % DOLLAR.unsigned_abs(),
        );
        let fraction = format!("{fraction:012}");
        let shown = fraction.trim_end_matches('0');
        write!(f, "{sign}{whole}.{shown:0<2}")
    }
}

/// The time for which a budget is given, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Period {
    /// From midnight.
    Day,
    /// From Monday.
    Week,
    /// From the first of the month.
    Month,
    /// For all time.
    Total,
}

impl Period {
    /// Every period.
    pub const ALL: [Self; 4] = [Self::Day, Self::Week, Self::Month, Self::Total];

    /// The word that stands for it in requests, settings and stores.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Week => "week",
            Self::Month => "month",
            Self::Total => "total",
        }
    }

    /// The period behind a word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|period| period.as_str() == word)
    }

    /// The first day of the period that holds `at`, in days since 1970-01-01 UTC. For
    /// [`Self::Total`] it is `i64::MIN`.
    pub fn first_day(self, at: Timestamp) -> i64 {
        let day = at.unix_day();
        match self {
            Self::Day => day,
            // 1970-01-01 was a Thursday, the fourth day of its week.
            Self::Week => day - (day + 3).rem_euclid(7),
            Self::Month => day - i64::from(day_of_month(day)) + 1,
            Self::Total => i64::MIN,
        }
    }
}

impl Timestamp {
    /// Days since 1970-01-01 UTC, rounded down.
    pub fn unix_day(self) -> i64 {
        self.0.div_euclid(DAY_MICROS)
    }

    /// Midnight UTC of the given day since 1970-01-01, capped at the ends of the range.
    pub fn from_unix_day(day: i64) -> Self {
        Self(day.saturating_mul(DAY_MICROS))
    }
}

/// The day of the month, from 1, of a day since 1970-01-01 in the proleptic Gregorian calendar.
/// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn day_of_month(day: i64) -> u8 {
    // Days of an era of 400 years, which begins on the first of March.
    let of_era = (day + 719_468).rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    u8::try_from(of_year - (153 * month + 2) / 5 + 1).unwrap_or(1)
}

/// An amount that may be spent in each period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// More than 0, at most [`MAX_BUDGET`].
    pub amount: Picodollars,
    /// How often the amount is given anew.
    pub period: Period,
}

impl Budget {
    /// The period of a budget that names none.
    pub const DEFAULT_PERIOD: Period = Period::Month;
}

/// Why an amount cannot be a budget's.
pub const BUDGET_RANGE: &str = "A budget is more than 0 and at most 1000000 US dollars.";

/// Parses the amount of a budget. What comes after its last decimal is cut off: a program may have
/// computed it, and write 0.30000000000000004.
///
/// # Errors
/// One sentence for the user.
pub fn parse_budget_amount(text: &str) -> Result<Picodollars, String> {
    match Picodollars::parse_rounded_down(text) {
        Ok(amount) if amount > Picodollars(0) && amount <= MAX_BUDGET => Ok(amount),
        Ok(_) | Err(AmountError::Range | AmountError::TooPrecise) => Err(BUDGET_RANGE.to_owned()),
        Err(error @ AmountError::Syntax) => Err(format!("The budget cannot be used: {error}.")),
    }
}

impl FromStr for Budget {
    type Err = String;

    /// Parses `20.00/month`. Without a period the budget is for each month.
    fn from_str(text: &str) -> Result<Self, String> {
        let (amount, period) = match text.split_once('/') {
            Some((amount, word)) => {
                let period = Period::parse(word.trim());
                let unknown = "The period of a budget is day, week, month or total.";
                (amount, period.ok_or_else(|| unknown.to_owned())?)
            }
            None => (text, Self::DEFAULT_PERIOD),
        };
        Ok(Self {
            amount: parse_budget_amount(amount.trim())?,
            period,
        })
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.amount, self.period.as_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn amount(text: &str) -> Result<i64, AmountError> {
        text.parse().map(|Picodollars(amount)| amount)
    }

    #[test]
    fn amounts_are_parsed_exactly() {
        for (text, expected) in [
            ("0", 0),
            ("000.000", 0),
            ("20", 20 * DOLLAR),
            ("20.00", 20 * DOLLAR),
            ("0.000000000001", 1),
            ("0.10", DOLLAR / 10),
            ("1.5e-07", 150_000),
            ("1E+3", 1_000 * DOLLAR),
            ("0e999999999999999999999", 0),
            ("9223372.036854775807", i64::MAX),
            ("20.000000000000000000000", 20 * DOLLAR),
        ] {
            assert_eq!(amount(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn other_texts_are_no_amounts() {
        for text in [
            "", ".", "1.", ".5", "-1", "+1", "1,5", "1_000", "$1", "1 ", "1e", "1e+", "e5", "NaN",
            "inf", "٣", "1.2.3", "1e5e5",
        ] {
            assert_eq!(amount(text), Err(AmountError::Syntax), "{text}");
        }
        for text in ["0.0000000000001", "1e-13", "1e-99999999999999999999"] {
            assert_eq!(amount(text), Err(AmountError::TooPrecise), "{text}");
        }
        for text in ["9223372.036854775808", "1e7", "1e99999999999999999999"] {
            assert_eq!(amount(text), Err(AmountError::Range), "{text}");
        }
    }

    #[test]
    fn what_comes_after_the_last_decimal_can_be_cut_off() {
        for (text, expected) in [
            ("0.30000000000000004", 3 * DOLLAR / 10),
            ("0.0000000000019", 1),
            ("9e-13", 0),
            ("1e-99999999999999999999", 0),
            ("456006.155821881661234567890123", 456_006_155_821_881_661),
            ("20.5", 41 * DOLLAR / 2),
        ] {
            let amount = Picodollars::parse_rounded_down(text);
            assert_eq!(amount, Ok(Picodollars(expected)), "{text}");
        }
        let beyond = Picodollars::parse_rounded_down("9223372.0368547758079");
        assert_eq!(beyond, Ok(Picodollars(i64::MAX)));
        let beyond = Picodollars::parse_rounded_down("9223372.036854775808");
        assert_eq!(beyond, Err(AmountError::Range));
    }

    #[test]
    fn amounts_are_displayed_with_two_decimals_at_least() {
        for (amount, shown) in [
            (0, "0.00"),
            (20 * DOLLAR, "20.00"),
            (DOLLAR / 2, "0.50"),
            (1, "0.000000000001"),
            (-DOLLAR, "-1.00"),
            (i64::MIN, "-9223372.036854775808"),
        ] {
            assert_eq!(Picodollars(amount).to_string(), shown);
        }
    }

    fn day(text: &str) -> i64 {
        let time = humantime::parse_rfc3339(&format!("{text}T12:34:56Z")).unwrap();
        Timestamp::from(time).unix_day()
    }

    fn first_day(period: Period, text: &str) -> i64 {
        period.first_day(Timestamp::from_unix_day(day(text)))
    }

    #[test]
    fn periods_begin_at_midnight_on_monday_and_on_the_first() {
        assert_eq!(first_day(Period::Day, "2026-12-01"), day("2026-12-01"));
        for (inside, monday) in [
            ("2026-11-30", "2026-11-30"),
            ("2026-12-06", "2026-11-30"),
            ("2026-12-07", "2026-12-07"),
            ("1970-01-05", "1970-01-05"),
        ] {
            assert_eq!(first_day(Period::Week, inside), day(monday), "{inside}");
        }
        for (inside, first) in [
            ("2026-12-31", "2026-12-01"),
            ("2024-02-29", "2024-02-01"),
            ("2000-02-29", "2000-02-01"),
            ("2100-03-01", "2100-03-01"),
            ("1970-01-31", "1970-01-01"),
        ] {
            assert_eq!(first_day(Period::Month, inside), day(first), "{inside}");
        }
        assert_eq!(first_day(Period::Total, "2026-12-31"), i64::MIN);
    }

    #[test]
    fn a_budget_has_a_period_of_a_month_unless_it_names_another() {
        let budget: Budget = "20.5".parse().unwrap();
        assert_eq!(budget.to_string(), "20.50/month");
        let budget: Budget = "1000000/total".parse().unwrap();
        assert_eq!(budget.amount, MAX_BUDGET);
        for bad in [
            "",
            "0",
            "0.00/day",
            "1000000.01",
            "5/year",
            "5/",
            "-1",
            "x/day",
            "1e30",
        ] {
            assert!(bad.parse::<Budget>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn displayed_amounts_are_parsed_to_the_same_amounts(amount in 0..i64::MAX) {
            let shown = Picodollars(amount).to_string();
            prop_assert_eq!(shown.parse(), Ok(Picodollars(amount)));
        }

        #[test]
        fn any_text_is_an_amount_or_refused_without_a_panic(text: String, near in "[0-9.eE+-]{0,40}") {
            for text in [text, near] {
                if let Ok(amount) = text.parse::<Picodollars>() {
                    prop_assert!(amount.0 >= 0);
                }
            }
        }

        #[test]
        fn each_day_is_in_its_period_and_the_period_before_ends_with_it(
            day in -800_000_i64..3_000_000,
        ) {
            for (period, shortest, longest) in [
                (Period::Day, 1, 1),
                (Period::Week, 7, 7),
                (Period::Month, 28, 31),
            ] {
                let first_day = |day| period.first_day(Timestamp::from_unix_day(day));
                let first = first_day(day);
                prop_assert!(first <= day && day < first + longest);
                prop_assert_eq!(first_day(first), first);
                let length = first - first_day(first - 1);
                prop_assert!((shortest..=longest).contains(&length), "{period:?}: {length}");
            }
        }
    }
}
