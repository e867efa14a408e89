//! The log: one line a happening, to standard output.

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Installs the process-wide subscriber. `directives` is in `RUST_LOG`'s syntax.
///
/// # Errors
/// One line naming the setting, if the directives cannot be read.
///
/// # Panics
/// If a subscriber is installed already; only `main` calls this.
pub fn init(format: LogFormat, directives: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(directives)
        .map_err(|_| "RUST_LOG: must be a level such as info, or target=level pairs".to_owned())?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    match format {
        LogFormat::Json => builder
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .init(),
        LogFormat::Pretty => builder.init(),
    }
    std::panic::set_hook(Box::new(log_panic));
    Ok(())
}

/// A panic is a line in the log like any other failure. Its message is left out, which may quote what was being worked on, and
/// so is the place, for no line holds a source path; the thread says which part of the service it was.
fn log_panic(_: &std::panic::PanicHookInfo<'_>) {
    let thread = std::thread::current();
    tracing::error!(thread = thread.name(), "a defect: the code panicked");
}
