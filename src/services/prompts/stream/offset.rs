//! Offsets into an answer's text.

use std::fmt;
use std::str::FromStr;

/// How much of an answer's text a reader has, with a check sum of that part. Because of the check
/// sum, a text that was started again is not taken for the continuation of the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOffset {
    bytes: usize,
    check: u64,
}

impl Default for StreamOffset {
    /// The beginning.
    fn default() -> Self {
        Self {
            bytes: 0,
            check: 0xcbf2_9ce4_8422_2325,
        }
    }
}

impl StreamOffset {
    /// Bytes of text before this offset.
    pub fn bytes(self) -> usize {
        self.bytes
    }

    /// The offset after `piece`, which starts at this one.
    pub(super) fn after(self, piece: &str) -> Self {
        // FNV-1a: fast, and works a byte at a time. A client could make a collision only for its
        // own text, which gains it nothing.
        let check = piece.bytes().fold(self.check, |check, byte| {
            (check ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self {
            bytes: self.bytes + piece.len(),
            check,
        }
    }

    /// Whether `text` begins with the part that was read.
    pub(super) fn is_in(self, text: &str) -> bool {
        text.get(..self.bytes)
            .is_some_and(|read| Self::default().after(read) == self)
    }
}

impl fmt::Display for StreamOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:016x}", self.bytes, self.check)
    }
}

/// The text is not an offset that this service wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidOffset;

impl FromStr for StreamOffset {
    type Err = InvalidOffset;

    fn from_str(text: &str) -> Result<Self, InvalidOffset> {
        let (bytes, check) = text.split_once('-').ok_or(InvalidOffset)?;
        let offset = Self {
            bytes: bytes.parse().map_err(|_| InvalidOffset)?,
            check: u64::from_str_radix(check, 16).map_err(|_| InvalidOffset)?,
        };
        // Accepts only the form that `Display` writes.
        if offset.to_string() == text {
            Ok(offset)
        } else {
            Err(InvalidOffset)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_survives_the_round_trip_and_other_texts_are_refused() {
        let offset = StreamOffset::default().after("Grüße");
        for offset in [StreamOffset::default(), offset] {
            assert_eq!(offset.to_string().parse(), Ok(offset));
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
            assert_eq!(bad.parse::<StreamOffset>(), Err(InvalidOffset), "{bad:?}");
        }
    }

    #[test]
    fn an_offset_fits_only_a_text_with_the_same_beginning() {
        let offset = StreamOffset::default().after("Grü").after("ße");
        assert_eq!(offset, StreamOffset::default().after("Grüße"));
        assert!(offset.is_in("Grüße"));
        assert!(offset.is_in("Grüße aus"));
        for other in ["", "Grüß", "Grusel", "Grüße".to_uppercase().as_str()] {
            assert!(!offset.is_in(other), "{other:?}");
        }
    }
}
