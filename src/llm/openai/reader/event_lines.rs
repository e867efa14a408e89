//! Lines of a stream of server-sent events, and what may stand between objects.

use super::nesting::skip;

/// Removes blanks before anything else.
pub fn trim_blanks(bytes: &[u8]) -> &[u8] {
    skip(bytes, |byte| matches!(byte, b' ' | b'\t'))
}

/// Removes what may come before an object: blanks, the punctuation of a list, and the three bytes
/// of a byte order mark. Neither a field nor an object begins with any of these.
pub fn trim_between(bytes: &[u8]) -> &[u8] {
    skip(bytes, |byte| {
        matches!(byte, b' ' | b'\t' | b'[' | b',' | b']' | 0xef | 0xbb | 0xbf)
    })
}

/// The value of the field of that name, if the line has it.
fn field<'a>(line: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let (start, rest) = line.split_at_checked(name.len())?;
    if !start.eq_ignore_ascii_case(name.as_bytes()) {
        return None;
    }
    match rest {
        [] => Some(rest),
        [b':', value @ ..] => Some(trim_blanks(value)),
        _ => None,
    }
}

/// The value of a line's `data` field. Some proxies write the name of the field twice.
pub fn data_of(line: &[u8]) -> Option<&[u8]> {
    let mut data = field(line, "data")?;
    while let Some(inner) = field(data, "data") {
        data = inner;
    }
    Some(data)
}

/// Whether a line is a comment, or has a field that is not needed.
pub fn is_other_field(line: &[u8]) -> bool {
    line.starts_with(b":")
        || ["event", "id", "retry"]
            .iter()
            .any(|name| field(line, name).is_some())
}

/// Whether it says `[DONE]`, with or without brackets, quotes and capitals.
pub fn is_done(data: &[u8]) -> bool {
    let is_wrapping = |byte: &u8| matches!(byte, b'"' | b'[' | b']' | b' ' | b'\t');
    let start = data.iter().position(|byte| !is_wrapping(byte));
    let end = data.iter().rposition(|byte| !is_wrapping(byte));
    match (start, end) {
        (Some(start), Some(end)) => data[start..=end].eq_ignore_ascii_case(b"done"),
        _ => false,
    }
}
