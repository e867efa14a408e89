//! How the reference tokenizer treats single characters.

use std::cmp::Ordering;

use unicode_normalization::char::{canonical_combining_class, decompose_canonical};

use super::character_tables::{DECOMPOSED, DROPPED, MARKS, PUNCTUATION, REORDERED};

/// Removed from the text: control, format and private characters, NUL and the replacement
/// character.
pub(super) fn is_dropped(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_control() && !matches!(c, '\t' | '\n' | '\r');
    }
    is_in(DROPPED, c)
}

/// A nonspacing mark, such as the accent that decomposition parts from its letter.
pub(super) fn is_mark(c: char) -> bool {
    c >= '\u{300}' && is_in(MARKS, c)
}

/// A separate word. All ASCII symbols count, `$` and `~` as well.
pub(super) fn is_punctuation(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_punctuation();
    }
    is_in(PUNCTUATION, c)
}

/// An ideograph of the blocks that the reference knows, each a separate word. The block that begins
/// at U+2B920 begins at U+2B820 in Unicode, but not in the reference.
pub(super) fn is_cjk(c: char) -> bool {
    matches!(c,
        '\u{3400}'..='\u{4dbf}'
        | '\u{4e00}'..='\u{9fff}'
        | '\u{f900}'..='\u{faff}'
        | '\u{20000}'..='\u{2a6df}'
        | '\u{2a700}'..='\u{2b81f}'
        | '\u{2b920}'..='\u{2ceaf}'
        | '\u{2f800}'..='\u{2fa1f}')
}

/// Visits the canonical decomposition of `c` (NFD without its reordering), as far as the reference
/// knows one: for it a character newer than its tables is just a character.
pub(super) fn decompose(c: char, mut visit: impl FnMut(char)) {
    if is_in(DECOMPOSED, c) {
        decompose_canonical(c, visit);
    } else {
        visit(c);
    }
}

/// The class by which canonical reordering sorts a character that is not a mark; 0 if nothing is
/// moved across it.
pub(super) fn combining_class(c: char) -> u8 {
    if is_in(REORDERED, c) {
        canonical_combining_class(c)
    } else {
        0
    }
}

fn is_in(table: &[(u32, u32)], c: char) -> bool {
    let point = u32::from(c);
    table
        .binary_search_by(|&(first, last)| {
            if last < point {
                Ordering::Less
            } else if first > point {
                Ordering::Greater
            } else {
                Ordering::Equal
            }
        })
        .is_ok()
}
