//! The text of an answer as it comes in, put together again where a server cut through a character.

/// Replaces a character that cannot be read, and NUL, which not every store can keep.
const UNREADABLE: &str = "\u{fffd}";

/// A text that grows piece by piece. A character may be cut anywhere between two pieces.
#[derive(Debug, Default)]
pub struct Text {
    whole: String,
    begun: PartialCharacter,
}

/// The beginning of a character whose end is still to come.
#[derive(Debug, Default)]
enum PartialCharacter {
    #[default]
    Nothing,
    /// The first half of a surrogate pair.
    Surrogate(u16),
    /// The first one to three bytes of its UTF-8.
    Bytes(Vec<u8>),
}

impl Text {
    /// What is there, without a character that has only begun.
    pub fn as_str(&self) -> &str {
        &self.whole
    }

    /// Its length in bytes, plus one if a character has begun. Any added text makes it longer.
    pub fn len(&self) -> usize {
        self.whole.len() + usize::from(!matches!(self.begun, PartialCharacter::Nothing))
    }

    /// The text at its end.
    pub fn finish(mut self) -> String {
        self.break_off();
        self.whole
    }

    /// Adds a JSON string: what is between its quotes, as it is written.
    pub fn push_json(&mut self, mut written: &[u8]) {
        // Plain bytes and simple escapes are collected, and their UTF-8 is checked once.
        let mut plain = Vec::new();
        while let Some(at) = written.iter().position(|byte| *byte == b'\\') {
            let (run, escape) = written.split_at(at);
            plain.extend_from_slice(run);
            written = match escape {
                [_, b'u', rest @ ..] => {
                    self.push_bytes(&plain);
                    plain.clear();
                    self.push_unicode_escape(rest)
                }
                [_, kind, rest @ ..] => {
                    plain.push(unescaped(*kind));
                    rest
                }
                _ => b"",
            };
        }
        if plain.is_empty() {
            self.push_bytes(written);
        } else {
            plain.extend_from_slice(written);
            self.push_bytes(&plain);
        }
    }

    /// Adds bytes of UTF-8.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        match std::mem::take(&mut self.begun) {
            PartialCharacter::Nothing => self.push_utf8(bytes),
            PartialCharacter::Surrogate(_) => {
                self.whole.push_str(UNREADABLE);
                self.push_utf8(bytes);
            }
            PartialCharacter::Bytes(mut begun) => {
                begun.extend_from_slice(bytes);
                self.push_utf8(&begun);
            }
        }
    }

    fn push_utf8(&mut self, bytes: &[u8]) {
        if let Ok(text) = std::str::from_utf8(bytes) {
            self.push_str(text);
            return;
        }
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            self.push_str(chunk.valid());
            let invalid = chunk.invalid();
            let is_begun = chunks.peek().is_none()
                && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
            if is_begun {
                self.begun = PartialCharacter::Bytes(invalid.to_vec());
            } else if !invalid.is_empty() {
                self.whole.push_str(UNREADABLE);
            }
        }
    }

    fn push_str(&mut self, text: &str) {
        if text.contains('\0') {
            self.whole.push_str(&text.replace('\0', UNREADABLE));
        } else {
            self.whole.push_str(text);
        }
    }

    /// Adds the unit that the digits at the start of `written` stand for. Returns the bytes after
    /// them.
    fn push_unicode_escape<'a>(&mut self, written: &'a [u8]) -> &'a [u8] {
        let Some((unit, rest)) = hex(written) else {
            self.break_off();
            self.whole.push_str(UNREADABLE);
            return written;
        };
        self.push_unit(unit);
        rest
    }

    /// Adds a unit of UTF-16.
    fn push_unit(&mut self, unit: u16) {
        if let PartialCharacter::Surrogate(first) = self.begun
            && let Some(Ok(character)) = char::decode_utf16([first, unit]).next()
        {
            self.begun = PartialCharacter::Nothing;
            self.whole.push(character);
            return;
        }
        self.break_off();
        match char::from_u32(u32::from(unit)) {
            Some('\0') => self.whole.push_str(UNREADABLE),
            Some(character) => self.whole.push(character),
            None if unit < 0xdc00 => self.begun = PartialCharacter::Surrogate(unit),
            None => self.whole.push_str(UNREADABLE),
        }
    }

    /// Replaces a character that has only begun.
    fn break_off(&mut self) {
        if !matches!(std::mem::take(&mut self.begun), PartialCharacter::Nothing) {
            self.whole.push_str(UNREADABLE);
        }
    }
}

/// The text of a JSON string: of what is between its quotes, as it is written.
pub fn decoded(written: &[u8]) -> String {
    let mut text = Text::default();
    text.push_json(written);
    text.finish()
}

/// The byte that an escape stands for. Anything that needs no escape stands for itself; it may be
/// the first byte of a character.
fn unescaped(kind: u8) -> u8 {
    match kind {
        b'b' => 0x08,
        b'f' => 0x0c,
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        _ => kind,
    }
}

/// Four hexadecimal digits, and what comes after them.
fn hex(written: &[u8]) -> Option<(u16, &[u8])> {
    let (digits, rest) = written.split_at_checked(4)?;
    let digits = std::str::from_utf8(digits).ok()?;
    // The standard library would take a sign too.
    let is_hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let unit = u16::from_str_radix(digits, 16).ok().filter(|_| is_hex)?;
    Some((unit, rest))
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
