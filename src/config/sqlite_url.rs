//! `DATABASE_URL=sqlite://PATH`: which file that names.

use std::path::PathBuf;

/// The file that the part of the URL behind `sqlite:` names: `//relative/path` or
/// `///absolute/path`. Percent-encoded characters are decoded, as in every URL.
///
/// # Errors
/// The problem and the right form, in words that quote nothing of the URL.
pub(super) fn path(rest: &str) -> Result<PathBuf, &'static str> {
    if rest.ends_with(":memory:") {
        return Err(
            "a database in memory would be lost with the process; name a file, such as sqlite:///srv/prompts.sqlite3",
        );
    }
    let Some(encoded) = rest.strip_prefix("//") else {
        return Err(
            "must be sqlite://relative/path or sqlite:///absolute/path, with two slashes before the path",
        );
    };
    if encoded.contains('?') {
        return Err(
            "sqlite:// takes no parameters: leave out the ? and what follows it; a ? that belongs to the path is written %3F",
        );
    }
    if encoded.contains('#') {
        return Err(
            "sqlite:// takes no fragment: leave out the # and what follows it; a # that belongs to the path is written %23",
        );
    }
    let path = decode(encoded)?;
    if path.is_empty() || path.ends_with('/') {
        return Err("sqlite:// must name a file, such as sqlite:///srv/prompts.sqlite3");
    }
    if path.contains('\0') {
        return Err("no path has a null character (%00) in it");
    }
    Ok(PathBuf::from(path))
}

/// Decodes `%20` and its like. Strict, unlike a browser: a `%` that is left as it is could be meant
/// either way.
fn decode(text: &str) -> Result<String, &'static str> {
    const PROBLEM: &str = "a % in a path is followed by two hex digits, such as %20 for a blank; a % itself is written %25";
    let mut bytes = Vec::with_capacity(text.len());
    let mut pieces = text.split('%');
    bytes.extend(pieces.next().unwrap_or_default().bytes());
    for piece in pieces {
        let digits = piece.get(..2).ok_or(PROBLEM)?;
        // `from_str_radix` alone would take a sign too.
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(PROBLEM);
        }
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| PROBLEM)?);
        bytes.extend(piece[2..].bytes());
    }
    String::from_utf8(bytes).map_err(|_| "the path is no UTF-8 text once its % are decoded")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_relative_or_absolute_and_percent_decoded() {
        for (rest, expected) in [
            ("//prompts.db", "prompts.db"),
            ("//a/b.db", "a/b.db"),
            ("//./b.db", "./b.db"),
            ("///srv/a%20b.db", "/srv/a b.db"),
            ("///srv/a b.db", "/srv/a b.db"),
            ("///srv/%2525%3f%23.db", "/srv/%25?#.db"),
            ("///srv/gr%C3%B6%c3%9fe.db", "/srv/größe.db"),
            ("///srv/größe+1.db", "/srv/größe+1.db"),
            ("////srv/a.db", "//srv/a.db"),
            ("//%2Fsrv/a.db", "/srv/a.db"),
        ] {
            assert_eq!(path(rest), Ok(PathBuf::from(expected)), "{rest}");
        }
    }

    #[test]
    fn url_that_names_no_file_is_refused_with_the_right_form() {
        for (rest, expected) in [
            ("", "sqlite:///absolute/path"),
            ("a.db", "sqlite:///absolute/path"),
            ("/srv/a.db", "sqlite:///absolute/path"),
            ("//", "must name a file"),
            ("///", "must name a file"),
            ("///srv/", "must name a file"),
            ("///srv/%2f", "must name a file"),
            (":memory:", "in memory"),
            ("//:memory:", "in memory"),
            ("///:memory:", "in memory"),
            ("///srv/a.db?mode=rwc", "leave out the ?"),
            ("///srv/a.db?", "leave out the ?"),
            ("///srv/a.db#x", "leave out the #"),
            ("///srv/100%.db", "%25"),
            ("///srv/a%2", "%25"),
            ("///srv/a%zz.db", "%25"),
            ("///srv/a%+1.db", "%25"),
            ("///srv/a%é.db", "%25"),
            ("///srv/a%00.db", "null"),
            ("///srv/a%ff.db", "UTF-8"),
        ] {
            let problem = path(rest).unwrap_err();
            assert!(problem.contains(expected), "{rest}: {problem}");
        }
    }
}
