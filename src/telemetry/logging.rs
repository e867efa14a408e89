//! The log: one line a happening, to standard output.

use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::LogFormat;

/// Installs the process-wide subscriber. `directives` is `RUST_LOG`'s: a level, or target=level pairs, with commas between.
///
/// # Errors
/// One line naming the setting, if the directives cannot be read.
///
/// # Panics
/// If a subscriber is installed already; only `main` calls this.
pub fn init(format: LogFormat, directives: &str) -> Result<(), String> {
    let filter = targets(directives).ok_or_else(|| {
        "RUST_LOG: must be a level such as info, or target=level pairs".to_owned()
    })?;
    let lines = match format {
        LogFormat::Json => fmt::layer()
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .boxed(),
        LogFormat::Pretty => fmt::layer().boxed(),
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .init();
    std::panic::set_hook(Box::new(log_panic));
    Ok(())
}

/// Reads directives: `info`, `warn,prompt_service=debug`. `None` where one is neither a level nor a target with one: the crate's own
/// reader takes a misspelt level for a target, and nothing at all for `error`.
fn targets(directives: &str) -> Option<Targets> {
    let mut found = None;
    let given = directives.split(',').map(str::trim);
    for directive in given.filter(|directive| !directive.is_empty()) {
        let targets = found.take().unwrap_or_else(Targets::new);
        found = Some(match directive.split_once('=') {
            // A bracket would begin a filter by spans, which there are none of.
            Some((target, level)) if !target.trim().is_empty() && !target.contains('[') => {
                targets.with_target(target.trim(), self::level(level)?)
            }
            Some(_) => return None,
            None => targets.with_default(self::level(directive)?),
        });
    }
    found
}

fn level(name: &str) -> Option<LevelFilter> {
    // The empty text would be `error`.
    let name = name.trim();
    (!name.is_empty()).then(|| name.parse().ok()).flatten()
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
    fn directives_are_levels_and_targets_with_levels() {
        let info = targets("info").unwrap();
        for same in ["info,", " info ", ",info,,", "INFO"] {
            assert_eq!(targets(same).as_ref(), Some(&info), "{same:?}");
        }
        let mixed = targets("hyper=debug, warn").unwrap();
        assert!(mixed.would_enable("hyper::client", &tracing::Level::DEBUG));
        assert!(mixed.would_enable("prompt_service", &tracing::Level::WARN));
        assert!(!mixed.would_enable("prompt_service", &tracing::Level::INFO));
    }

    #[test]
    fn what_is_neither_is_refused() {
        for wrong in [
            "",
            ",",
            "inof",
            "=,=",
            "a=",
            "=info",
            "a=loud",
            "info,inof",
            "[span]=info",
        ] {
            assert_eq!(targets(wrong), None, "{wrong:?}");
        }
    }
}
