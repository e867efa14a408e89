//! The rules of usernames.

use std::fmt;

use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

use super::{NO_NUL, NOT_BLANK, longer_than, trimmed};

/// The most characters of a name.
const MAX_CHARS: usize = 150;
/// The most bytes of a text that is normalised at all. NFKC composes at most four characters of
/// four bytes into one, so every name of [`MAX_CHARS`] has fewer; a longer text is too long in any
/// form.
const MAX_RAW_BYTES: usize = 4096;

const INVALID: &str = "Enter a valid username. This value may contain only letters, numbers, and @/./+/-/_ characters.";
const TOO_LONG: &str = "Ensure this field has no more than 150 characters.";

/// A name for an account: NFKC-normalised, 1 to 150 characters, letters, digits and `@.+-_` only.
/// Case-sensitive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Username(String);

impl Username {
    /// Trims, normalises and checks a name. Errors: a sentence for each rule it breaks.
    pub fn parse(raw: &str) -> Result<Self, Vec<&'static str>> {
        if trimmed(raw).is_empty() {
            return Err(vec![NOT_BLANK]);
        }
        let Some(name) = canonical_username(raw) else {
            return Err(vec![TOO_LONG]);
        };
        let mut messages = Vec::new();
        if !name.chars().all(is_allowed) {
            messages.push(INVALID);
        }
        if longer_than(&name, MAX_CHARS) {
            messages.push(TOO_LONG);
        }
        if name.contains('\0') {
            messages.push(NO_NUL);
        }
        if messages.is_empty() {
            Ok(Self(name))
        } else {
            Err(messages)
        }
    }

    /// The name as it is stored and compared.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Username {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The form in which an account of this name is stored, whether or not the name keeps the rules: a
/// login looks up this form. `None` for texts that are too long for any account.
pub fn canonical_username(raw: &str) -> Option<String> {
    let name = trimmed(raw);
    (name.len() <= MAX_RAW_BYTES).then(|| name.nfkc().collect())
}

/// Letters and digits of any script, as in Python's `\w`, and `@.+-_`. Rust's alphanumerics also
/// include the combining vowel signs, and letters in circles and squares.
fn is_allowed(c: char) -> bool {
    matches!(c, '@' | '.' | '+' | '-') || is_word_character(c)
}

/// Python's `\w`.
pub(super) fn is_word_character(c: char) -> bool {
    c == '_'
        || c.is_ascii_alphanumeric()
        || (!c.is_ascii()
            && c.is_alphanumeric()
            && !is_combining_mark(c)
            && !matches!(c, '\u{24b6}'..='\u{24e9}' | '\u{1f130}'..='\u{1f189}'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(raw: &str) -> Result<String, Vec<&'static str>> {
        Username::parse(raw).map(|name| name.0)
    }

    #[test]
    fn letters_digits_and_five_signs_are_accepted() {
        for name in [
            "alice",
            "ALICE",
            "a",
            "a@b.c+d-e_f",
            "ñandú862673",
            "日本語",
            "Ωmega٣",
        ] {
            assert_eq!(parsed(name), Ok(name.to_owned()));
        }
    }

    #[test]
    fn other_characters_are_refused() {
        for name in [
            "two words",
            "a/b",
            "a!",
            "a\u{200b}b",
            "🦀",
            "क\u{93f}",
            "\u{1f150}",
            "½",
        ] {
            assert_eq!(parsed(name), Err(vec![INVALID]), "{name}");
        }
    }

    #[test]
    fn nul_has_a_separate_message() {
        assert_eq!(parsed("a\0b"), Err(vec![INVALID, NO_NUL]));
    }

    #[test]
    fn compatible_spellings_become_one_name() {
        assert_eq!(parsed("n\u{303}andu\u{301}"), Ok("ñandú".to_owned()));
        assert_eq!(parsed("ａｌｉｃｅ①"), Ok("alice1".to_owned()));
        assert_eq!(canonical_username(" ﬁ ").as_deref(), Some("fi"));
    }

    #[test]
    fn length_counts_characters_after_normalising() {
        for unit in ["a", "ñ", "n\u{303}", "日"] {
            assert!(parsed(&unit.repeat(150)).is_ok(), "{unit}");
            assert_eq!(parsed(&unit.repeat(151)), Err(vec![TOO_LONG]), "{unit}");
        }
        // U+FDFA becomes 18 characters, three of them spaces.
        assert_eq!(parsed(&"\u{fdfa}".repeat(9)), Err(vec![INVALID, TOO_LONG]));
    }

    #[test]
    fn huge_text_is_not_a_name_at_login() {
        assert_eq!(canonical_username(&"a".repeat(1 << 20)), None);
    }
}
