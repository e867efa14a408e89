//! Places in an answer's text.

use std::fmt;
use std::str::FromStr;

/// A place in an answer's text: how far a reader has come, and a check of what it has read so far, so that a text that
/// was begun anew is not taken for the continuation of the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    bytes: usize,
    check: u64,
}

impl Default for Place {
    /// The beginning.
    fn default() -> Self {
        Self {
            bytes: 0,
            check: 0xcbf2_9ce4_8422_2325,
        }
    }
}

impl Place {
    /// Bytes of text before it.
    pub fn bytes(self) -> usize {
        self.bytes
    }

    /// The place after `piece`, which begins here.
    pub(super) fn after(self, piece: &str) -> Self {
        // FNV-1a: quick, a byte at a time, and nobody gains by a collision in what it tells us about its own text.
        let check = piece.bytes().fold(self.check, |check, byte| {
            (check ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self {
            bytes: self.bytes + piece.len(),
            check,
        }
    }

    /// Whether it is a place in `text`.
    pub(super) fn is_in(self, text: &str) -> bool {
        text.get(..self.bytes)
            .is_some_and(|read| Self::default().after(read) == self)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:016x}", self.bytes, self.check)
    }
}

/// A text that is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoPlace;

impl FromStr for Place {
    type Err = NoPlace;

    fn from_str(text: &str) -> Result<Self, NoPlace> {
        let (bytes, check) = text.split_once('-').ok_or(NoPlace)?;
        let place = Self {
            bytes: bytes.parse().map_err(|_| NoPlace)?,
            check: u64::from_str_radix(check, 16).map_err(|_| NoPlace)?,
        };
        // Only as it is written by us.
        if place.to_string() == text {
            Ok(place)
        } else {
            Err(NoPlace)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_survives_the_round_trip_and_nothing_else_is_one() {
        let place = Place::default().after("Grüße");
        for place in [Place::default(), place] {
            assert_eq!(place.to_string().parse(), Ok(place));
        }
        for bad in [
            "",
            "0",
            "-",
            "7-xyz",
            "+7-00000000000000ff",
            "7-ff",
            "done",
            "7-00000000000000FF",
        ] {
            assert_eq!(bad.parse::<Place>(), Err(NoPlace), "{bad:?}");
        }
    }

    #[test]
    fn a_place_is_found_only_in_a_text_that_begins_as_the_one_it_was_reached_in() {
        let place = Place::default().after("Grü").after("ße");
        assert_eq!(place, Place::default().after("Grüße"));
        assert!(place.is_in("Grüße"));
        assert!(place.is_in("Grüße aus"));
        for other in ["", "Grüß", "Grusel", "Grüße".to_uppercase().as_str()] {
            assert!(!place.is_in(other), "{other:?}");
        }
    }
}
