//! The log: one line a happening, to standard output.

use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
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
    let filter: Targets = directives
        .parse()
        .map_err(|_| "RUST_LOG: must be a level such as info, or target=level pairs".to_owned())?;
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

/// A panic is a line in the log like any other failure. Its message is left out, which may quote what was being worked on, and
/// so is the place, for no line holds a source path; the thread says which part of the service it was.
fn log_panic(_: &std::panic::PanicHookInfo<'_>) {
    let thread = std::thread::current();
    tracing::error!(thread = thread.name(), "a defect: the code panicked");
}
