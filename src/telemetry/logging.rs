//! The log: one line per event, on standard output.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::panic::PanicHookInfo;

use tracing_subscriber::Layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::log_lines::{LineFormat, LogLines};
use crate::config::{LogFilter, LogFormat};

/// Installs the process-wide subscriber and returns the form of its lines: `format`, or, if that is
/// not set, pretty lines on a terminal and JSON elsewhere.
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
    let lines = LogLines {
        format: match format {
            LogFormat::Json => LineFormat::Json,
            LogFormat::Pretty => LineFormat::Pretty {
                has_colour: is_terminal && shows_colour(|name| std::env::var_os(name)),
            },
        },
        write: |line: &[u8]| {
            // A log whose reader is gone must not stop the service.
            let _ = std::io::stdout().write_all(line);
        },
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(filter.0.clone()))
        .init();
    std::panic::set_hook(Box::new(log_panic));
    format
}

/// Whether a terminal gets colours: only if it has some and its user did not turn them off
/// (<https://no-color.org>, <https://bixense.com/clicolors>).
fn shows_colour(variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let is_set = |name| variable(name).is_some_and(|value| !value.is_empty());
    is_set("TERM")
        && variable("TERM").is_some_and(|terminal| terminal != "dumb")
        && variable("CLICOLOR").is_none_or(|choice| choice != "0")
        && !is_set("NO_COLOR")
}

/// Logs a panic with its place in the source, inside the spans of the thread that panicked. The
/// message is left out: it may quote what the code worked on, such as a prompt.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let location = panic.location().map(tracing::field::display);
    tracing::error!(location, thread = thread.name(), "panicked");
}

#[cfg(test)]
mod tests {
    use std::sync::Once;

    use super::*;
    use crate::telemetry::log_lines::tests::lines_of;

    #[test]
    fn panic_is_logged_with_its_place_and_ids_and_without_its_message() {
        // Beside the hook of the test harness, which other tests need.
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let harness = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                log_panic(panic);
                harness(panic);
            }));
        });
        let lines = lines_of(LineFormat::Json, || {
            let _span = tracing::error_span!("request", request_id = "r-1").entered();
            let panicked = std::panic::catch_unwind(|| panic!("the prompt was: secret"));
            assert!(panicked.is_err());
        });
        let line: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!(line["message"], "panicked");
        assert_eq!(line["request_id"], "r-1");
        let location = line["location"].as_str().unwrap();
        assert!(location.starts_with("src/telemetry/logging.rs:"), "{line}");
        assert!(!lines.concat().contains("secret"), "{line}");
    }

    #[test]
    fn colours_are_shown_unless_the_terminal_or_its_user_refuses() {
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
