//! What operators see: log lines and metrics. Neither ever holds a prompt, a password or a token.

mod fields;
mod log_lines;
mod logging;
mod metrics;
mod pretty;
mod process;

pub use log_lines::{LineFormat, LogLines};
pub use logging::init as init_logging;
pub use metrics::Metrics;
