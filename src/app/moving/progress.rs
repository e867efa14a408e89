//! Showing how far a command has come: a bar at a terminal, now and then a line elsewhere.

use std::io::{IsTerminal, Write};
use std::pin::pin;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::{MissedTickBehavior, interval};

use crate::services::moving::{Meter, Reading};

/// How often the bar is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(100);
/// How often a line is written where there is no terminal.
const SAY_EVERY: Duration = Duration::from_secs(5);

/// Does the work and shows the meter meanwhile, on standard error.
pub async fn show<T>(meter: &Meter, work: impl Future<Output = T>) -> T {
    let bar = std::io::stderr().is_terminal().then(bar);
    let mut ticks = interval(if bar.is_some() { DRAW_EVERY } else { SAY_EVERY });
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first tick comes at once, when there is nothing to say.
    ticks.tick().await;
    let mut work = pin!(work);
    loop {
        tokio::select! {
            biased;
            done = &mut work => {
                if let Some(bar) = bar {
                    bar.finish_and_clear();
                }
                return done;
            }
            _ = ticks.tick() => match &bar {
                Some(bar) => draw(bar, &meter.read()),
                // Whoever reads no progress gets none.
                None => { let _ = writeln!(std::io::stderr(), "{}", line(&meter.read())); }
            },
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    bar.set_style(
        ProgressStyle::with_template("{prefix} [{bar:30}] {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> "),
    );
    bar
}

fn draw(bar: &ProgressBar, reading: &Reading) {
    bar.set_prefix(reading.phase);
    bar.set_length(reading.total.unwrap_or(0));
    bar.set_message(figures(reading));
    bar.set_position(reading.done);
    bar.tick();
}

fn line(reading: &Reading) -> String {
    format!("{}: {}", reading.phase, figures(reading))
}

/// Such as `1200 of 100000, 640/s, 2m 35s left`.
fn figures(reading: &Reading) -> String {
    let mut figures = reading.done.to_string();
    if let Some(total) = reading.total {
        figures += &format!(" of {total}");
    }
    figures += &format!(", {:.0}/s", reading.rate());
    if let Some(left) = reading.left() {
        figures += &format!(", {} left", humantime::format_duration(left));
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_what_is_done_the_rate_and_the_time_left() {
        let reading = Reading {
            phase: "importing",
            done: 1_000,
            total: Some(91_000),
            elapsed: Duration::from_secs(2),
        };
        assert_eq!(line(&reading), "importing: 1000 of 91000, 500/s, 3m left");
        let unknown = Reading {
            total: None,
            ..reading
        };
        assert_eq!(line(&unknown), "importing: 1000, 500/s");
    }
}
