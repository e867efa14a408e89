//! Log lines for people: a time, a level in colour, a message, and what belongs to it.

use std::fmt::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

const RESET: &str = "\x1b[0m";
const DIM: &str = "\x1b[2m";

/// One line an event: `17:00:00Z  INFO listening addr=127.0.0.1:8000`. The time is UTC. An event of
/// another crate has that crate's module before its message.
pub struct Pretty {
    /// Whether the terminal shows colours.
    pub has_colour: bool,
}

impl Pretty {
    fn paint(&self, out: &mut dyn Write, colour: &str, text: &str) -> fmt::Result {
        if self.has_colour {
            write!(out, "{colour}{text}{RESET}")
        } else {
            out.write_str(text)
        }
    }
}

impl<S, N> FormatEvent<S, N> for Pretty
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let level = *metadata.level();
        self.paint(&mut out, DIM, &time_of_day(SystemTime::now()))?;
        out.write_char(' ')?;
        self.paint(&mut out, colour(level), &format!("{level:>5}"))?;
        if !metadata.target().starts_with(env!("CARGO_CRATE_NAME")) {
            out.write_char(' ')?;
            self.paint(&mut out, DIM, &format!("{}:", metadata.target()))?;
        }
        let mut line = Line {
            style: self,
            message: String::new(),
            fields: String::new(),
        };
        event.record(&mut line);
        writeln!(out, "{}{}", line.message, line.fields)
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

/// Such as `17:00:00Z`.
fn time_of_day(now: SystemTime) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() % 86_400;
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}Z", seconds % 60)
}

/// An event's message, and its other fields as `name=value`.
struct Line<'a> {
    style: &'a Pretty,
    message: String,
    fields: String,
}

impl Line<'_> {
    fn record(&mut self, field: &Field, value: &str) {
        // Writing to a text does not fail.
        if field.name() == "message" {
            let _ = write!(self.message, " {value}");
        } else {
            self.fields.push(' ');
            let _ = self
                .style
                .paint(&mut self.fields, DIM, &format!("{}=", field.name()));
            self.fields.push_str(value);
        }
    }
}

impl Visit for Line<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        let is_plain = |c: char| !c.is_whitespace() && !c.is_control() && c != '"';
        if field.name() == "message" || (!value.is_empty() && value.chars().all(is_plain)) {
            self.record(field, &without_controls(value));
        } else {
            self.record(field, &format!("{value:?}"));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record(field, &without_controls(&format!("{value:?}")));
    }
}

/// With control characters escaped: what others send must not move the cursor, nor begin a line.
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
    use std::io;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Written {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    /// The lines of what `log` logs, each without its time.
    fn logged(has_colour: bool, log: impl FnOnce()) -> Vec<String> {
        let written = Written::default();
        let subscriber = tracing_subscriber::fmt()
            .event_format(Pretty { has_colour })
            .with_max_level(Level::TRACE)
            .with_writer(written.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        let time = if has_colour {
            9 + DIM.len() + RESET.len()
        } else {
            9
        };
        text.lines().map(|line| line[time..].to_owned()).collect()
    }

    #[test]
    fn a_line_has_a_level_a_message_and_fields() {
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
    fn what_others_send_begins_no_line_and_no_escape_sequence() {
        let lines = logged(false, || {
            tracing::info!(a = "x\ny", b = %"x\ny\x1b[2J", "m\r\nn");
        });
        assert_eq!(lines, [r#"  INFO m\r\nn a="x\ny" b=x\ny\u{1b}[2J"#]);
    }

    #[test]
    fn colours_are_for_terminals_that_show_them() {
        let plain = logged(false, || tracing::info!(n = 1, "m"));
        assert!(!plain[0].contains('\x1b'), "{plain:?}");
        let coloured = logged(true, || tracing::info!(n = 1, "m"));
        assert_eq!(coloured, [" \x1b[32m INFO\x1b[0m m \x1b[2mn=\x1b[0m1"]);
    }

    #[test]
    fn the_time_of_day_is_utc() {
        let at = |seconds| time_of_day(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "00:00:00Z");
        assert_eq!(at(86_400 * 9 + 3600 * 17 + 60 * 4 + 9), "17:04:09Z");
    }
}
