//! Headers that hold a list. The lines of one name are one list, in their order (RFC 9110, section
//! 5.3), and a client may write any bytes between the commas: an item that cannot be read must not
//! hide the others.

use axum::http::{HeaderMap, HeaderName};

/// All items of the header as they were written, without the blanks around them; empty ones too.
pub fn items<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> impl DoubleEndedIterator<Item = &'a [u8]> {
    headers
        .get_all(name)
        .iter()
        .flat_map(|line| line.as_bytes().split(|byte| *byte == b','))
        .map(trim)
}

/// The items that are text, without empty ones.
pub fn words<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> impl DoubleEndedIterator<Item = &'a str> {
    items(headers, name)
        .filter_map(|item| std::str::from_utf8(item).ok())
        .filter(|item| !item.is_empty())
}

/// The bytes without the spaces and tabs at both ends.
pub fn trim(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use axum::http::header::CONNECTION;

    use super::*;

    fn headers(lines: &[&[u8]]) -> HeaderMap {
        let lines = lines.iter().map(|line| HeaderValue::from_bytes(line));
        lines.map(|line| (CONNECTION, line.unwrap())).collect()
    }

    #[test]
    fn lines_of_one_name_are_one_list() {
        let headers = headers(&[b"keep-alive,\tUpgrade ", b"", b" a , ,b"]);
        let items: Vec<&[u8]> = items(&headers, &CONNECTION).collect();
        assert_eq!(
            items,
            [&b"keep-alive"[..], b"Upgrade", b"", b"a", b"", b"b"]
        );
        let words: Vec<&str> = words(&headers, &CONNECTION).rev().collect();
        assert_eq!(words, ["b", "a", "Upgrade", "keep-alive"]);
    }

    #[test]
    fn item_that_is_no_text_does_not_hide_the_others() {
        let headers = headers(&[b"a, gr\xf6\xdfe, b"]);
        assert_eq!(words(&headers, &CONNECTION).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn trimming_blanks_alone_leaves_nothing() {
        assert_eq!(trim(b" \t "), b"");
        assert_eq!(trim(b"\t a b "), b"a b");
    }
}
