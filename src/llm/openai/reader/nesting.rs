//! Finds where things end in bytes: strings, objects, lines.

/// The position of the first of two bytes. It compares eight bytes at a time, because most of an
/// answer is passed over here.
pub fn find_either(bytes: &[u8], one: u8, other: u8) -> Option<usize> {
    const LOW: u64 = u64::MAX / 255;
    const HIGH: u64 = LOW << 7;
    // Sets the high bit of the first byte that is zero, and of no byte before it.
    let zeros = |eight: u64| eight.wrapping_sub(LOW) & !eight & HIGH;
    let (ones, others) = (LOW * u64::from(one), LOW * u64::from(other));
    let (eights, rest) = bytes.as_chunks::<8>();
    for (at, eight) in eights.iter().enumerate() {
        let eight = u64::from_le_bytes(*eight);
        let found = zeros(eight ^ ones) | zeros(eight ^ others);
        if found != 0 {
            return Some(at * 8 + found.trailing_zeros() as usize / 8);
        }
    }
    let at = rest.iter().position(|byte| *byte == one || *byte == other);
    at.map(|at| bytes.len() - rest.len() + at)
}

/// Whether JSON allows the byte between its parts.
pub fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

/// The bytes from the first on that `is_skipped` is false for.
pub fn skip(bytes: &[u8], is_skipped: impl Fn(u8) -> bool) -> &[u8] {
    let start = bytes.iter().position(|byte| !is_skipped(*byte));
    &bytes[start.unwrap_or(bytes.len())..]
}

/// Finds the end of an object or array whose bytes may come in pieces.
#[derive(Debug, Default)]
pub struct Nesting {
    depth: usize,
    is_in_string: bool,
    /// The last piece ended in a backslash.
    is_escaped: bool,
    /// Whether the outermost object must begin with a key or be empty.
    is_checked: bool,
    /// The outermost bracket was opened, and nothing has come since.
    is_fresh: bool,
    /// Whether the object does not begin as it must. Then it has no end.
    pub is_broken: bool,
}

impl Nesting {
    /// For an object that must begin with a key or be empty. `{oops` has no end to wait for.
    pub fn checked() -> Self {
        Self {
            is_checked: true,
            ..Self::default()
        }
    }

    /// Whether an object or array has begun and not ended.
    pub fn is_open(&self) -> bool {
        self.depth > 0
    }

    /// Takes the next bytes. Returns the position after the closing bracket, if they have it.
    pub fn end(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = usize::from(std::mem::take(&mut self.is_escaped));
        while !self.is_broken {
            let rest = bytes.get(at..).unwrap_or_default();
            if self.is_in_string {
                at += find_either(rest, b'"', b'\\')?;
                if bytes[at] == b'"' {
                    self.is_in_string = false;
                    at += 1;
                } else {
                    at += 2;
                    self.is_escaped = at > bytes.len();
                }
                continue;
            }
            if self.is_fresh {
                let first = rest.iter().find(|byte| !is_blank(**byte))?;
                self.is_fresh = false;
                self.is_broken = !matches!(first, b'"' | b'}');
                continue;
            }
            let is_mark = |byte: &u8| matches!(byte, b'"' | b'{' | b'[' | b'}' | b']');
            at += rest.iter().position(is_mark)? + 1;
            match bytes[at - 1] {
                b'"' => self.is_in_string = true,
                b'{' | b'[' => {
                    self.is_fresh = self.is_checked && self.depth == 0;
                    self.depth += 1;
                }
                _ => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(at);
                    }
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_first_of_two_bytes_is_found(text in "[ab\u{80}-\u{ff}]{0,40}") {
            let bytes = text.as_bytes();
            let expected = bytes.iter().position(|byte| matches!(byte, b'a' | 0xbf));
            prop_assert_eq!(find_either(bytes, b'a', 0xbf), expected);
        }

        #[test]
        fn the_end_does_not_depend_on_the_pieces(
            json in r#"\{ {0,2}("[a\\\\"{\[]{0,9}",|\[|\]|\{|\}|,|7){0,12}"#,
            cut in 0..60usize,
        ) {
            let whole = Nesting::checked().end(json.as_bytes());
            let (one, two) = json.as_bytes().split_at(cut.min(json.len()));
            let mut nesting = Nesting::checked();
            let cut = nesting.end(one).or_else(|| Some(one.len() + nesting.end(two)?));
            prop_assert_eq!(cut, whole);
        }
    }
}
