//! Log lines for people: a time, a level in colour, a message, and its fields.

use tracing::{Level, Metadata};

use super::fields::{Fields, Value};
use crate::domain::Timestamp;

const RESET: &str = "\x1b[0m";
const DIM: &str = "\x1b[2m";

/// The line of one event: `17:00:00Z  INFO listening addr=127.0.0.1:8000`. The time is UTC. An
/// event of another crate has that crate's module before its message.
pub fn pretty_line(metadata: &Metadata<'_>, fields: &Fields, has_colour: bool) -> String {
    let paint = |colour: &str, text: &str| {
        if has_colour {
            format!("{colour}{text}{RESET}")
        } else {
            text.to_owned()
        }
    };
    let level = *metadata.level();
    // The hours, minutes and seconds.
    let mut line = paint(DIM, &format!("{}Z", &Timestamp::now().to_string()[11..19]));
    line.push(' ');
    line.push_str(&paint(colour(level), &format!("{level:>5}")));
    if !metadata.target().starts_with(env!("CARGO_CRATE_NAME")) {
        line.push(' ');
        line.push_str(&paint(DIM, &format!("{}:", metadata.target())));
    }
    // The message comes first: the macros of `tracing` record it before the other fields.
    for (name, value) in &fields.0 {
        let is_message = *name == "message";
        line.push(' ');
        if !is_message {
            line.push_str(&paint(DIM, &format!("{name}=")));
        }
        line.push_str(&shown(value, is_message));
    }
    line
}

/// A text is in quotes if it could be read as more than one value.
fn shown(value: &Value, is_message: bool) -> String {
    let is_plain = |c: char| !c.is_whitespace() && !c.is_control() && c != '"';
    match value {
        Value::Plain(value) => value.to_string(),
        Value::Text(text) if !is_message && (text.is_empty() || !text.chars().all(is_plain)) => {
            format!("{text:?}")
        }
        Value::Text(text) | Value::Formatted(text) => without_controls(text),
    }
}

fn colour(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\x1b[1;31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        Level::DEBUG => "\x1b[34m",
        Level::TRACE => "\x1b[35m",
    }
}

/// The text with its control characters escaped: input of others must not move the cursor or begin
/// a line.
fn without_controls(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::log_lines::LineFormat;
    use crate::telemetry::log_lines::tests::lines_of;

    /// The lines of what `log` logs, each without its time.
    fn logged(has_colour: bool, log: impl FnOnce()) -> Vec<String> {
        let lines = lines_of(LineFormat::Pretty { has_colour }, log);
        let time = if has_colour {
            9 + DIM.len() + RESET.len()
        } else {
            9
        };
        lines.iter().map(|line| line[time..].to_owned()).collect()
    }

    #[test]
    fn line_has_level_message_and_fields() {
        let lines = logged(false, || {
            tracing::info!(addr = "127.0.0.1:8000", n = 5, ok = true, "listening");
            tracing::warn!(target: "hyper::client", error = %"no route", "trying again");
            tracing::error!(empty = "", words = "two words", code = ?Some(1));
        });
        assert_eq!(
            lines,
            [
                "  INFO listening addr=127.0.0.1:8000 n=5 ok=true",
                "  WARN hyper::client: trying again error=no route",
                " ERROR empty=\"\" words=\"two words\" code=Some(1)",
            ]
        );
    }

    #[test]
    fn line_shows_the_fields_of_the_spans_around_it() {
        let lines = logged(false, || {
            let _span = tracing::error_span!("request", request_id = "r-1").entered();
            tracing::info!(n = 1, "m");
        });
        assert_eq!(lines, ["  INFO m n=1 request_id=r-1"]);
    }

    #[test]
    fn input_of_others_cannot_begin_a_line_or_an_escape_sequence() {
        let lines = logged(false, || {
            tracing::info!(a = "x\ny", b = %"x\ny\x1b[2J", "m\r\nn");
        });
        assert_eq!(lines, [r#"  INFO m\r\nn a="x\ny" b=x\ny\u{1b}[2J"#]);
    }

    #[test]
    fn colours_appear_only_on_terminals_that_show_them() {
        let plain = logged(false, || tracing::info!(n = 1, "m"));
        assert!(!plain[0].contains('\x1b'), "{plain:?}");
        let coloured = logged(true, || tracing::info!(n = 1, "m"));
        assert_eq!(coloured, [" \x1b[32m INFO\x1b[0m m \x1b[2mn=\x1b[0m1"]);
    }
}
