//! The rules of e-mail addresses.

use std::net::IpAddr;

use super::{INVALID_EMAIL, NO_NUL, NOT_BLANK, longer_than, trimmed};

/// Characters that the store keeps.
const MAX_CHARS: usize = 254;
const TOO_LONG: &str = "Ensure this field has no more than 254 characters.";

/// An e-mail address of valid form, at most 254 characters, as it was given. Whether mail arrives
/// there is not checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Email(String);

impl Email {
    /// Trims and checks an address. Errors: a sentence for each rule it breaks.
    pub fn parse(raw: &str) -> Result<Self, Vec<&'static str>> {
        let address = trimmed(raw);
        if address.is_empty() {
            return Err(vec![NOT_BLANK]);
        }
        if longer_than(address, MAX_CHARS) {
            // Its form is not checked, so that a huge address costs nothing.
            return Err(vec![TOO_LONG]);
        }
        let mut messages = Vec::new();
        if address.contains('\0') {
            messages.push(NO_NUL);
        }
        if !is_address(address) {
            messages.push(INVALID_EMAIL);
        }
        if messages.is_empty() {
            Ok(Self(address.to_owned()))
        } else {
            Err(messages)
        }
    }

    /// The address as given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_address(address: &str) -> bool {
    address
        .rsplit_once('@')
        .is_some_and(|(local, domain)| is_local_part(local) && is_domain(domain))
}

/// Words of atom characters with single dots between them, or one string in double quotes (RFC
/// 5322, section 3.4.1).
fn is_local_part(local: &str) -> bool {
    if let Some(quoted) = local
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'))
    {
        return is_quoted_text(quoted);
    }
    local.split('.').all(|word| {
        !word.is_empty()
            && word
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-!#$%&'*+/=?^_`{}|~".contains(&b))
    })
}

/// ASCII without NUL, tab, line ends and spaces; a backslash escapes a quote, a space, a tab or
/// another backslash.
fn is_quoted_text(text: &str) -> bool {
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let is_valid = match byte {
            b'\\' => bytes
                .next()
                .is_some_and(|b| matches!(b, 1..=9 | 11 | 12 | 14..=127)),
            other => matches!(other, 1..=8 | 11 | 12 | 14..=31 | b'!' | b'#'..=b'[' | b']'..=127),
        };
        if !is_valid {
            return false;
        }
    }
    true
}

/// `localhost`, an IP address in brackets, or a name of two labels or more. A top-level domain has
/// no digits, unless it is in Punycode; one of a single letter is accepted because of the published
/// example.
fn is_domain(domain: &str) -> bool {
    if domain == "localhost" {
        return true;
    }
    if let Some(literal) = domain.strip_prefix('[').and_then(|d| d.strip_suffix(']')) {
        return literal.parse::<IpAddr>().is_ok();
    }
    let Some((labels, top)) = domain.rsplit_once('.') else {
        return false;
    };
    labels
        .split('.')
        .all(|label| is_label(label, |c| c.is_ascii_digit()))
        && (is_label(top, |_| false) || is_punycode_label(top))
}

/// 1 to 63 letters (ASCII, or anything from U+00A1 to U+FFFF), inner hyphens and the other allowed
/// characters.
fn is_label(label: &str, also: fn(char) -> bool) -> bool {
    !label.is_empty()
        && !longer_than(label, 63)
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label.chars().all(|c| {
            c.is_ascii_alphabetic() || c == '-' || ('\u{a1}'..='\u{ffff}').contains(&c) || also(c)
        })
}

fn is_punycode_label(label: &str) -> bool {
    label
        .get(..4)
        .is_some_and(|prefix| prefix.eq_ignore_ascii_case("xn--"))
        && (5..=63).contains(&label.len())
        && label.bytes().skip(4).all(|b| b.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepted(address: &str) -> bool {
        Email::parse(address).is_ok()
    }

    #[test]
    fn valid_addresses_are_accepted() {
        for address in [
            "a@b.c",
            "a@example.com",
            "A.b+c_d@Mail.Example.co",
            "a@localhost",
            "a@[127.0.0.1]",
            "a@[::1]",
            "a@bücher.example",
            "a@1.2.example",
            "a@b.xn--p1ai",
            "\"a\\ b\"@example.com",
            "\"\"@example.com",
            "!#$%&'*+/=?^_`{}|~-@b.c",
        ] {
            assert!(accepted(address), "{address}");
        }
    }

    #[test]
    fn invalid_addresses_are_refused() {
        for address in [
            "not-an-email",
            "x",
            "@",
            "a@",
            "@example.com",
            "a b@example.com",
            "a@b",
            "a@b.1",
            "a@b.c1",
            "a@-b.example",
            "a@b-.example",
            "a@b..example",
            "a@.example",
            "a@b.example.",
            ".a@b.example",
            "a.@b.example",
            "a..b@b.example",
            "é@b.example",
            "a@b_c.example",
            "a@[300.0.0.1]",
            "a@[]",
            "a@b.xn--",
            "\"a\"b\"@example.com",
            "\"a\\\"@example.com",
            "\"@example.com",
            "a@🦀.example",
        ] {
            assert_eq!(Email::parse(address), Err(vec![INVALID_EMAIL]), "{address}");
        }
    }

    #[test]
    fn labels_have_at_most_63_characters() {
        let label = "a".repeat(63);
        assert!(accepted(&format!("a@{label}.{label}")));
        assert!(!accepted(&format!("a@{label}a.example")));
        assert!(!accepted(&format!("a@example.{label}a")));
    }

    #[test]
    fn address_has_at_most_254_characters() {
        let local = "a".repeat(242);
        assert!(accepted(&format!("{local}@example.com")));
        assert_eq!(
            Email::parse(&format!("{local}b@example.com")),
            Err(vec![TOO_LONG])
        );
    }

    #[test]
    fn nul_has_a_separate_message() {
        assert_eq!(Email::parse("a\0@b.c"), Err(vec![NO_NUL, INVALID_EMAIL]));
    }
}
