//! The rules of passwords.

use std::fmt;

use super::username::is_word_character;
use super::{NO_NUL, NOT_BLANK, Username, longer_than, trimmed};

/// The fewest characters of a password.
const MIN_CHARS: usize = 8;
/// The most characters of a password: far more than anybody types, few enough to compare with the
/// name at no cost.
const MAX_CHARS: usize = 1024;

const TOO_LONG: &str = "Ensure this field has no more than 1024 characters.";
const TOO_SIMILAR: &str = "The password is too similar to the username.";
const TOO_SHORT: &str = "This password is too short. It must contain at least 8 characters.";
const TOO_COMMON: &str = "This password is too common.";
const NUMERIC: &str = "This password is entirely numeric.";

/// The most common passwords, one a line, lower-case, sorted. Only a few hundred: a longer list
/// refuses passwords that cannot be guessed within the ten attempts a minute that a login allows.
/// Those of less than 8 characters matter only for the message, so there are few.
const COMMON: &str = include_str!("common_passwords.txt");

/// A password for an account: 8 to 1,024 characters, neither common, nor all digits, nor similar to
/// the name.
#[derive(Clone, PartialEq, Eq)]
pub struct NewPassword(String);

impl NewPassword {
    /// Trims and checks a password for the account of that name. Errors: a sentence for each rule
    /// it breaks.
    pub fn parse(raw: &str, username: &Username) -> Result<Self, Vec<&'static str>> {
        Self::strong(text(raw)?, username)
    }

    /// Checks the strength of a password that [`text`] has accepted.
    pub(super) fn strong(password: &str, username: &Username) -> Result<Self, Vec<&'static str>> {
        let lower = password.to_lowercase();
        let rules = [
            (is_similar(&lower, username), TOO_SIMILAR),
            (!longer_than(password, MIN_CHARS - 1), TOO_SHORT),
            (is_common(&lower), TOO_COMMON),
            (password.chars().all(is_digit), NUMERIC),
        ];
        let messages: Vec<_> = rules
            .into_iter()
            .filter_map(|(broken, message)| broken.then_some(message))
            .collect();
        if messages.is_empty() {
            Ok(Self(password.to_owned()))
        } else {
            Err(messages)
        }
    }

    /// The password itself, to be hashed and nothing else.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for NewPassword {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NewPassword(hidden)")
    }
}

/// The trimmed text of a password field. It must not be blank, too long, or hold NUL.
pub(super) fn text(raw: &str) -> Result<&str, Vec<&'static str>> {
    let password = trimmed(raw);
    if password.is_empty() {
        return Err(vec![NOT_BLANK]);
    }
    if longer_than(password, MAX_CHARS) {
        return Err(vec![TOO_LONG]);
    }
    if password.contains('\0') {
        return Err(vec![NO_NUL]);
    }
    Ok(password)
}

/// Digits and numbers of any script.
fn is_digit(c: char) -> bool {
    c.is_ascii_digit() || (!c.is_ascii() && c.is_numeric())
}

fn is_common(lower: &str) -> bool {
    COMMON.lines().any(|line| line == lower)
}

/// Whether the lower-case password is similar to the name or one of its words. This is Django's
/// rule: the upper bound of the Ratcliff/Obershelp ratio (twice the characters in common, in any
/// order, over all characters) is 0.7 or more.
fn is_similar(lower: &str, username: &Username) -> bool {
    let name = username.as_str().to_lowercase();
    let mut password: Vec<char> = lower.chars().collect();
    password.sort_unstable();
    name.split(|c| !is_word_character(c))
        .chain([name.as_str()])
        .any(|part| is_like(&password, part))
}

/// `password`: its characters, sorted.
fn is_like(password: &[char], part: &str) -> bool {
    let mut part: Vec<char> = part.chars().collect();
    part.sort_unstable();
    let (long, short) = (password.len(), part.len());
    // A word of at most a tenth of the length is not similar (and does not reach a ratio of 0.7
    // either).
    if long >= 10 * short {
        return false;
    }
    20 * common_characters(password, &part) >= 7 * (long + short)
}

/// How many characters two sorted lists have in common, counting repetitions.
fn common_characters(a: &[char], b: &[char]) -> usize {
    let (mut i, mut j, mut common) = (0, 0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        common += usize::from(x == y);
        i += usize::from(x <= y);
        j += usize::from(y <= x);
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(password: &str, username: &str) -> Result<NewPassword, Vec<&'static str>> {
        NewPassword::parse(password, &Username::parse(username).unwrap())
    }

    fn broken(password: &str, username: &str) -> Vec<&'static str> {
        parsed(password, username).unwrap_err()
    }

    #[test]
    fn strong_passwords_are_accepted() {
        for password in [
            "secret123",
            "Str0ng-enough",
            "ñandúñandú",
            "correct horse",
            "        x-9Zq1!w",
        ] {
            assert!(parsed(password, "alice").is_ok(), "{password}");
        }
    }

    #[test]
    fn every_broken_rule_is_named() {
        assert_eq!(broken("abc", "oracle"), [TOO_SHORT, TOO_COMMON]);
        assert_eq!(
            broken("1234567", "oracle"),
            [TOO_SHORT, TOO_COMMON, NUMERIC]
        );
        assert_eq!(broken("8675309421", "oracle"), [NUMERIC]);
        assert_eq!(broken("٣٣٣٣٣٣٣٣", "oracle"), [NUMERIC]);
        assert_eq!(broken("password123", "oracle"), [TOO_COMMON]);
        assert_eq!(broken("PassWord", "oracle"), [TOO_COMMON]);
        assert_eq!(broken("qz-Kt7!", "oracle"), [TOO_SHORT]);
        assert_eq!(broken("a\0bcdefgh", "oracle"), [NO_NUL]);
    }

    #[test]
    fn password_like_the_name_is_refused() {
        assert_eq!(broken("oracle3d8e325444", "oracle3d8e32544"), [TOO_SIMILAR]);
        assert_eq!(broken("ORACLE-oracle", "oracleoracle"), [TOO_SIMILAR]);
        // A word of the name is compared as well, but not one a tenth as long.
        assert_eq!(broken("montgomery1", "x.montgomery"), [TOO_SIMILAR]);
        assert!(parsed("a-quiet-Morning", "a.b").is_ok());
        // 2·7 common of 20 is the limit itself.
        assert_eq!(broken("abcdefg!?#", "abcdefgxyz"), [TOO_SIMILAR]);
        assert!(parsed("abcdef!?#&", "abcdefgxyz").is_ok());
    }

    #[test]
    fn length_counts_characters() {
        assert!(parsed(&"ñ7".repeat(512), "alice").is_ok());
        assert_eq!(broken(&"ñ7x".repeat(342), "alice"), [TOO_LONG]);
        assert!(parsed("ñ7ñ7ñ7ñ7", "alice").is_ok());
        assert_eq!(broken("ñ7ñ7ñ7ñ", "alice"), [TOO_SHORT]);
    }

    #[test]
    fn list_of_common_passwords_is_sorted_and_lower_case_and_lacks_the_example() {
        let lines: Vec<_> = COMMON.lines().collect();
        assert!(lines.is_sorted_by(|a, b| a < b));
        assert!(lines.iter().all(|line| *line == line.to_lowercase().trim()));
        assert!(lines.len() >= 300, "{}", lines.len());
        assert!(!is_common("secret123"));
    }

    proptest::proptest! {
        #[test]
        fn common_characters_agree_with_counting(a in "[a-d]{0,12}", b in "[a-d]{0,12}") {
            let sorted = |text: &str| { let mut c: Vec<char> = text.chars().collect(); c.sort_unstable(); c };
            let count = |text: &str, c: char| text.chars().filter(|x| *x == c).count();
            let expected: usize = ('a'..='d').map(|c| count(&a, c).min(count(&b, c))).sum();
            proptest::prop_assert_eq!(common_characters(&sorted(&a), &sorted(&b)), expected);
        }
    }
}
