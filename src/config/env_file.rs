//! The `.env` file: one variable a line, its value taken literally.
//!
//! There are no expansions and no escapes, because a secret may hold `$` and `\`: two of three keys
//! that Django makes have a `$`. A line that other programs read in different ways is refused with
//! its number. To read it in another way than its writer meant would silently change a key or an
//! address.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// The mode bits that let others than the owner write to a file.
const OTHERS_MAY_WRITE: u32 = 0o022;
/// The longest file that is read, in bytes: some hundred times the length of all settings.
const MAX_BYTES: u64 = 1 << 20;

/// Why a `.env` file is refused: one line that names the file, the line in it, and the repair.
/// Quotes nothing of the file but names of variables.
#[derive(Debug, thiserror::Error)]
pub enum EnvFileError {
    /// The file is there and cannot be read.
    #[error(".env: cannot be read ({}); make it readable for this user, or remove it", .0.kind())]
    Unreadable(#[from] io::Error),
    /// Others may write to the file, and so may choose the key and the store.
    #[error(
        ".env: others than its owner can write to it (mode {0:03o}); run `chmod go-w .env`, or give the settings in the environment"
    )]
    Writable(u32),
    /// More than 1 MiB.
    #[error(".env: is larger than 1 MiB; a line is NAME=value")]
    TooLong,
    /// A line that cannot be read, or can be read in two ways.
    #[error(".env: line {line}: {problem}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// The problem, and how to fix it.
        problem: String,
    },
}

/// Reads the `.env` file at `path`: names and values in the order of the file, none if there is no
/// file. A folder of that name is none either: a virtual environment, or what a container engine
/// makes of a file that does not exist.
///
/// # Errors
/// Any of [`EnvFileError`].
pub fn read_env_file(path: &Path) -> Result<Vec<(String, String)>, EnvFileError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let found = file.metadata()?;
    if found.is_dir() {
        return Ok(Vec::new());
    }
    let mode = found.permissions().mode() & 0o777;
    // Of a device, such as /dev/null in its place, others may write nothing that is read here.
    if found.is_file() && mode & OTHERS_MAY_WRITE != 0 {
        return Err(EnvFileError::Writable(mode));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(EnvFileError::TooLong);
    }
    parse(&bytes)
}

/// Reads the lines of a file. Each is empty, a comment that begins with `#`, or `NAME=VALUE`, with
/// or without `export` before it. Blanks around the name and the value do not count. A value in
/// single or double quotes is what stands between them, and a comment may follow it.
pub fn parse(bytes: &[u8]) -> Result<Vec<(String, String)>, EnvFileError> {
    // Windows editors write a byte order mark. Before the first line it can be part of no value.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut variables = Vec::new();
    let mut lines_by_name: HashMap<&str, usize> = HashMap::new();
    for (line, number) in bytes.split(|byte| *byte == b'\n').zip(1..) {
        let at_line = |problem: String| EnvFileError::Line {
            line: number,
            problem,
        };
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let text = std::str::from_utf8(line)
            .map_err(|_| at_line("is no UTF-8 text; save the file as UTF-8".to_owned()))?;
        let parsed = parse_line(text).map_err(|problem| at_line(problem.to_owned()))?;
        let Some((name, value)) = parsed else {
            continue;
        };
        if let Some(first) = lines_by_name.insert(name, number) {
            let problem = format!("{name} is set on line {first} already; keep one of the two");
            return Err(at_line(problem));
        }
        variables.push((name.to_owned(), value.to_owned()));
    }
    Ok(variables)
}

/// Only these: other white space at the end of a value, such as a no-break space, is kept, so that
/// the check of the value refuses it.
const BLANKS: [char; 2] = [' ', '\t'];

fn parse_line(line: &str) -> Result<Option<(&str, &str)>, &'static str> {
    let line = line.trim_matches(BLANKS);
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    if line.contains(|c: char| c.is_control() && c != '\t') {
        return Err("has a control character in it; remove it");
    }
    let (name, value) = line
        .split_once('=')
        .ok_or("is not NAME=value; a comment begins with #")?;
    let name = name.trim_end_matches(BLANKS);
    let name = match name.strip_prefix("export") {
        Some(rest) if rest.starts_with(BLANKS) => rest.trim_start_matches(BLANKS),
        Some(_) | None => name,
    };
    if !is_name(name) {
        return Err("is not NAME=value; a name has letters, digits and underscores only");
    }
    Ok(Some((name, parse_value(value)?)))
}

fn parse_value(text: &str) -> Result<&str, &'static str> {
    let value = text.trim_start_matches(BLANKS);
    if let Some(quote) = value.chars().next().filter(|c| ['\'', '"'].contains(c)) {
        let (value, rest) = value[1..]
            .split_once(quote)
            .ok_or("has a quote that is not closed; a value has one line")?;
        let rest = rest.trim_start_matches(BLANKS);
        if !(rest.is_empty() || rest.starts_with('#')) {
            return Err("has text after the closing quote; use the other kind of quotes");
        }
        return Ok(value);
    }
    if text.contains(" #") || text.contains("\t#") {
        return Err(
            "has # after a blank, which may be a comment or part of the value; put the value in single quotes, or the comment on a line of its own",
        );
    }
    Ok(value)
}

fn is_name(name: &str) -> bool {
    let is_start = |c: char| c.is_ascii_alphabetic() || c == '_';
    name.starts_with(is_start) && name.chars().all(|c| is_start(c) || c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_in_place_of_the_file_is_an_empty_one() {
        assert_eq!(read_env_file(Path::new("/dev/null")).unwrap(), []);
    }

    fn value(line: &str) -> Result<String, String> {
        let parsed = parse(line.as_bytes()).map_err(|error| error.to_string())?;
        let [(_, value)] = &parsed[..] else {
            panic!("{line:?} sets {} variables", parsed.len());
        };
        Ok(value.clone())
    }

    #[test]
    fn values_are_literal() {
        for literal in [
            "django-insecure-4x$ab(9!&*^@-_=+#)",
            "${HOME}",
            "$HOME",
            "$(id)",
            "`id`",
            r"a\nb\\c\$",
            "%24%20",
            "#4f",
            "a=b==",
            "two words",
            "it's \"so\"",
            "a'",
            r#"[{"model": "llama3.2", "base_url": "http://ollama:11434/v1"}]"#,
            "größe",
        ] {
            assert_eq!(value(&format!("A={literal}")).unwrap(), literal);
            if !literal.contains('\'') {
                assert_eq!(value(&format!("A='{literal}'")).unwrap(), literal);
            }
            if !literal.contains('"') {
                assert_eq!(value(&format!("A=\"{literal}\"")).unwrap(), literal);
            }
        }
    }

    #[test]
    fn a_line_may_have_blanks_quotes_an_export_and_windows_ends() {
        for line in [
            "A=1",
            "A = 1 ",
            "\tA=\t1\t",
            "export A=1",
            "export\tA='1'",
            "A='1' # one",
            "A=\"1\"#",
            "A=1\r\n",
            "\u{feff}A=1",
            "# A=2\n\nA=1\n",
            "  # A=2\nA=1",
        ] {
            assert_eq!(value(line).as_deref(), Ok("1"), "{line:?}");
        }
        assert_eq!(value("A=").as_deref(), Ok(""));
        assert_eq!(value("A=' # 1 '").as_deref(), Ok(" # 1 "));
        assert_eq!(value("export=1").as_deref(), Ok("1"));
    }

    #[test]
    fn a_line_that_can_be_read_in_two_ways_is_refused_by_its_number() {
        for (line, expected) in [
            ("hunter2", "NAME=value"),
            ("export hunter2", "NAME=value"),
            ("=hunter2", "NAME=value"),
            ("1A=hunter2", "NAME=value"),
            ("A-B=hunter2", "NAME=value"),
            ("A B=hunter2", "NAME=value"),
            ("A: hunter2", "NAME=value"),
            ("A='hunter2", "not closed"),
            ("A=\"hunter2'", "not closed"),
            ("A='hunter2'3", "after the closing quote"),
            (r#"A="hunter\"2""#, "after the closing quote"),
            ("A=hunter2 # a comment", "# after a blank"),
            ("A=hunter2\t#3", "# after a blank"),
            ("A= #hunter2", "# after a blank"),
            ("A=hunter\0", "control character"),
            ("A=hunter2\r3", "control character"),
            ("A=hunter\u{1b}[2J", "control character"),
        ] {
            let error = value(&format!("B=1\n# two\n{line}\nC=3")).unwrap_err();
            let is_named = error.starts_with(".env: line 3: ") && error.contains(expected);
            assert!(is_named, "{line:?}: {error}");
            assert!(
                !error.contains("hunter") && !error.contains('\n'),
                "{error}"
            );
        }
    }

    #[test]
    fn a_name_that_comes_twice_is_refused() {
        let error = value("KEY=hunter2\n\nKEY=hunter2").unwrap_err();
        assert_eq!(
            error,
            ".env: line 3: KEY is set on line 1 already; keep one of the two"
        );
    }

    #[test]
    fn a_file_that_is_no_utf_8_is_refused_by_its_line() {
        for bytes in [&b"A=1\nB=caf\xe9\n"[..], b"A=1\n\xff\xfeB\0"] {
            let error = parse(bytes).unwrap_err().to_string();
            assert!(error.starts_with(".env: line 2: is no UTF-8"), "{error}");
        }
    }
}
