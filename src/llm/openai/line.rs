//! Texts of an upstream as they are shown in lists and in logs.

/// One line of at most `most` characters: it is shown in lists and in logs.
pub fn one_line(text: &str, most: usize) -> String {
    text.trim()
        .chars()
        .filter(|c| !is_unseen(*c))
        .take(most)
        .collect()
}

/// Whether a character is not seen itself, and may change how those around it are: a control
/// character, or one that turns the direction of a line, or joins and parts words.
pub fn is_unseen(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}
