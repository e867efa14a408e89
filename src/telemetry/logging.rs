//! The log: one line a happening, to standard output.

use std::ffi::OsString;
use std::io::IsTerminal;

use tracing_subscriber::Layer;
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::pretty::Pretty;
use crate::config::{LogFilter, LogFormat};

/// Installs the process-wide subscriber and returns the form of its lines: `format`, or, if that is
/// not set, what suits the reader of standard output: a person at a terminal, or a program.
///
/// # Panics
/// If a subscriber is installed already; only `main` calls this.
pub fn init(format: Option<LogFormat>, filter: &LogFilter) -> LogFormat {
    let is_terminal = std::io::stdout().is_terminal();
    let format = format.unwrap_or(if is_terminal {
        LogFormat::Pretty
    } else {
        LogFormat::Json
    });
    let lines = match format {
        LogFormat::Json => fmt::layer()
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .boxed(),
        LogFormat::Pretty => {
            let has_colour = is_terminal && shows_colour(|name| std::env::var_os(name));
            fmt::layer().event_format(Pretty { has_colour }).boxed()
        }
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(filter.0.clone()))
        .init();
    std::panic::set_hook(Box::new(log_panic));
    format
}

/// Whether a terminal is to be given colours: not where it has none, nor where its user wants none
/// (<https://no-color.org>, <https://bixense.com/clicolors>).
fn shows_colour(variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let is_set = |name| variable(name).is_some_and(|value| !value.is_empty());
    is_set("TERM")
        && variable("TERM").is_some_and(|terminal| terminal != "dumb")
        && variable("CLICOLOR").is_none_or(|wanted| wanted != "0")
        && !is_set("NO_COLOR")
}

/// A panic is a line in the log like any other failure. Its message is left out, which may quote what was being worked on, and
/// so is the place, for no line holds a source path; the thread says which part of the service it was.
fn log_panic(_: &std::panic::PanicHookInfo<'_>) {
    let thread = std::thread::current();
    tracing::error!(thread = thread.name(), "a defect: the code panicked");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_shown_unless_the_terminal_or_its_user_says_no() {
        let shown = |variables: &[(&str, &str)]| {
            shows_colour(|name| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| OsString::from(value))
            })
        };
        let term = ("TERM", "xterm");
        assert!(shown(&[term]));
        assert!(shown(&[term, ("NO_COLOR", ""), ("CLICOLOR", "1")]));
        for variables in [
            &[][..],
            &[("TERM", "dumb")],
            &[("TERM", "")],
            &[term, ("NO_COLOR", "1")],
            &[term, ("NO_COLOR", "0")],
            &[term, ("CLICOLOR", "0")],
        ] {
            assert!(!shown(variables), "{variables:?}");
        }
    }
}
