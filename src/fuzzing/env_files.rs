use std::collections::HashSet;

use crate::config::env_file::{EnvFileError, parse};

/// A `.env` file.
///
/// A file that is written with the values that were read has the same values. Line ends of Windows
/// change nothing. An error is one line that names a line of the file.
pub fn env_files(data: &[u8]) {
    let lines = data.split(|byte| *byte == b'\n').count();
    let variables = match parse(data) {
        Ok(variables) => variables,
        Err(error) => return check(&error, lines),
    };
    let names: HashSet<&str> = variables.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names.len(), variables.len());
    let written = variables.iter().map(|(name, value)| {
        // Only one that had no quotes around it can have both kinds in it.
        let quote = ["'", "\""].into_iter().find(|quote| !value.contains(quote));
        let quote = quote.unwrap_or_default();
        format!("{name}={quote}{value}{quote}\n")
    });
    let written: String = written.collect();
    let again = parse(written.as_bytes()).expect("the file was written by these rules");
    assert_eq!(again, variables);
    let windows = written.replace('\n', "\r\n");
    let again = parse(windows.as_bytes()).expect("line ends of Windows are line ends");
    assert_eq!(again, variables);
}

fn check(error: &EnvFileError, lines: usize) {
    let text = error.to_string();
    assert!(!text.chars().any(char::is_control), "{text:?}");
    if let EnvFileError::Line { line, .. } = error {
        assert!((1..=lines).contains(line), "{text:?}");
    }
}
