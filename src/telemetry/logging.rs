//! The log: one line a happening, to standard output.

use tracing_subscriber::Layer;
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{LogFilter, LogFormat};

/// Installs the process-wide subscriber.
///
/// # Panics
/// If a subscriber is installed already; only `main` calls this.
pub fn init(format: LogFormat, filter: &LogFilter) {
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
        .with(lines.with_filter(filter.0.clone()))
        .init();
    std::panic::set_hook(Box::new(log_panic));
}

/// A panic is a line in the log like any other failure. Its message is left out, which may quote what was being worked on, and
/// so is the place, for no line holds a source path; the thread says which part of the service it was.
fn log_panic(_: &std::panic::PanicHookInfo<'_>) {
    let thread = std::thread::current();
    tracing::error!(thread = thread.name(), "a defect: the code panicked");
}
