//! Amounts of money in JSON.

use serde_json::value::RawValue;

use crate::domain::Picodollars;

/// US dollars as a JSON number with all of its decimals, which no binary fraction could keep.
pub fn dollars(amount: Picodollars) -> Box<RawValue> {
    RawValue::from_string(amount.to_string()).expect("a decimal number is JSON")
}
