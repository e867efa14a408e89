//! The text of an answer as it comes in, put together again where a server cut through a character.

use crate::domain::without_nul;

/// Replaces a character that cannot be read.
const UNREADABLE: char = '\u{fffd}';

/// A text that grows piece by piece. A character may be cut anywhere between two pieces.
#[derive(Debug, Default)]
pub struct Text {
    whole: String,
    /// The beginning of a character whose end is still to come, as it is written: the escape of the
    /// first half of a surrogate pair, or the first one to three bytes of UTF-8.
    begun: Vec<u8>,
}

impl Text {
    /// What is there, without a character that has only begun.
    pub fn as_str(&self) -> &str {
        &self.whole
    }

    /// Its length in bytes, plus one if a character has begun. Any added text makes it longer.
    pub fn len(&self) -> usize {
        self.whole.len() + usize::from(!self.begun.is_empty())
    }

    /// The text at its end.
    pub fn finish(mut self) -> String {
        self.break_off();
        self.whole
    }

    /// Adds a JSON string: what is between its quotes, as it is written.
    pub fn push_json(&mut self, written: &[u8]) {
        let mut joined = std::mem::take(&mut self.begun);
        let mut rest = written;
        if !joined.is_empty() {
            joined.extend_from_slice(written);
            rest = &joined;
        }
        while let Some(at) = rest.iter().position(|byte| *byte == b'\\') {
            let (run, escape) = rest.split_at(at);
            self.push_utf8(run);
            self.break_off();
            let (character, length) = match escape.get(1) {
                Some(b'u') => match unit(escape) {
                    Some(0xd800..0xdc00) if escape.len() == UNIT_BYTES => {
                        self.begun = escape.to_vec();
                        return;
                    }
                    Some(first) => decoded_unit(first, unit(&escape[UNIT_BYTES..])),
                    None => (UNREADABLE, 2),
                },
                Some(b'b') => ('\u{8}', 2),
                Some(b'f') => ('\u{c}', 2),
                Some(b'n') => ('\n', 2),
                Some(b'r') => ('\r', 2),
                Some(b't') => ('\t', 2),
                Some(b'\\') => ('\\', 2),
                // Anything that needs no escape stands for itself.
                Some(_) | None => {
                    rest = &escape[1..];
                    continue;
                }
            };
            self.whole.push(character);
            rest = &escape[length..];
        }
        self.push_utf8(rest);
    }

    /// Adds text that is decoded already.
    pub fn push_str(&mut self, text: &str) {
        self.break_off();
        self.whole.push_str(&without_nul(text.to_owned()));
    }

    fn push_utf8(&mut self, bytes: &[u8]) {
        // The check of a whole text is several times faster than the division into chunks.
        if let Ok(text) = std::str::from_utf8(bytes) {
            return self.push_str(text);
        }
        for chunk in bytes.utf8_chunks() {
            self.push_str(chunk.valid());
            self.begun.extend_from_slice(chunk.invalid());
        }
        let is_begun = |error: std::str::Utf8Error| error.error_len().is_none();
        if !std::str::from_utf8(&self.begun).is_err_and(is_begun) {
            self.break_off();
        }
    }

    /// Replaces a character that has only begun.
    fn break_off(&mut self) {
        if !self.begun.is_empty() {
            self.begun.clear();
            self.whole.push(UNREADABLE);
        }
    }
}

/// The text of a JSON string: of what is between its quotes, as it is written.
pub fn decoded(written: &[u8]) -> String {
    let mut text = Text::default();
    text.push_json(written);
    text.finish()
}

/// Bytes of an escaped unit of UTF-16, such as `\u00e9`.
const UNIT_BYTES: usize = 6;

/// The unit of UTF-16 whose escape stands at the start of `written`.
fn unit(written: &[u8]) -> Option<u16> {
    let mut digits = written.strip_prefix(br"\u")?.get(..4)?.iter();
    digits.try_fold(0, |unit, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        Some(unit << 4 | digit as u16)
    })
}

/// The character that begins with the unit `first`, and the bytes that it was read from.
fn decoded_unit(first: u16, second: Option<u16>) -> (char, usize) {
    let units = [first].into_iter().chain(second);
    match char::decode_utf16(units).next() {
        Some(Ok(c)) if c != '\0' => (c, UNIT_BYTES * c.len_utf16()),
        _ => (UNREADABLE, UNIT_BYTES),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn joined(pieces: &[&[u8]]) -> String {
        let mut text = Text::default();
        for piece in pieces {
            text.push_json(piece);
        }
        text.finish()
    }

    #[test]
    fn escapes_are_read() {
        assert_eq!(
            decoded(r#"a\"\\\/\b\f\n\r\té\u00e9"#.as_bytes()),
            "a\"\\/\u{8}\u{c}\n\r\té\u{e9}"
        );
        assert_eq!(decoded(br"\ud83d\ude00 \uD83D\uDE00"), "😀 😀");
        assert_eq!(decoded(r"\x41 \é".as_bytes()), "x41 é");
    }

    #[test]
    fn halves_of_a_character_are_joined_and_single_halves_are_replaced() {
        for (pieces, text) in [
            (&[br"ok \ud83d".as_slice(), br"\ude00 end"][..], "ok 😀 end"),
            (&[br"ok \ud83d", b"", br"\ude00"], "ok 😀"),
            (&[br"\ud83d", b" end"], "\u{fffd} end"),
            (&[br"\ud83d\ud83d", br"\ude00"], "\u{fffd}😀"),
            (&[br"\ude00"], "\u{fffd}"),
            (&[br"\ud83d\u0041"], "\u{fffd}A"),
            (&[br"end \ud83d"], "end \u{fffd}"),
            (&[b"\xf0\x9f", b"\x98\x80!"], "😀!"),
            (&[b"\xf0", b"\x9f", b"\x98", b"\x80"], "😀"),
            (&[b"\xf0\x9f", b"x"], "\u{fffd}x"),
            (&[b"\xf0\x9f", br"\u0041"], "\u{fffd}A"),
            (&[b"a\xffb\xc3"], "a\u{fffd}b\u{fffd}"),
            (&[b"\xed\xa0\xbd"], "\u{fffd}\u{fffd}\u{fffd}"),
            (&[b"a\0b", br"\u0000"], "a\u{fffd}b\u{fffd}"),
            (&[br"\uZZZZ \u12"], "\u{fffd}ZZZZ \u{fffd}12"),
            (&[br"\u+123"], "\u{fffd}+123"),
            (&[br"cut \"], "cut "),
        ] {
            assert_eq!(joined(pieces), text, "{pieces:?}");
        }
    }

    proptest! {
        #[test]
        fn every_text_is_read_however_it_is_escaped(text in "[^\0]{0,20}") {
            let units: String = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
            let pieces: Vec<&[u8]> = units.as_bytes().chunks(6).collect();
            prop_assert_eq!(joined(&pieces), text.clone());
            let bytes = text.replace('\\', r"\\");
            let pieces: Vec<&[u8]> = bytes.as_bytes().split_inclusive(|byte| *byte >= 0x80).collect();
            prop_assert_eq!(joined(&pieces), text);
        }

        #[test]
        fn no_bytes_make_it_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..12), 0..6)) {
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            prop_assert!(!joined(&pieces).contains('\0'));
        }
    }
}
