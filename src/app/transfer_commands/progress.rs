//! Showing how far a command has come: a bar at a terminal, a line from time to time elsewhere.

use std::io::{IsTerminal, Write, stderr};
use std::pin::pin;
use std::time::Duration;

use terminal_size::terminal_size_of;
use tokio::time::{MissedTickBehavior, interval};

use crate::transfer::{Meter, Reading};

/// How often the bar is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(100);
/// How often a line is written where there is no terminal.
const WRITE_EVERY: Duration = Duration::from_secs(5);
/// The longest bar, in columns, and the shortest that still shows something.
const LONGEST_BAR: usize = 30;
const SHORTEST_BAR: usize = 5;
/// The width of a terminal that reports none.
const USUAL_COLUMNS: usize = 80;
/// Moves to the beginning of the line and clears it. Every kind of terminal but `dumb` knows it.
const CLEAR_LINE: &str = "\r\x1b[2K";

/// Does the work and shows the meter meanwhile, on standard error.
pub async fn show<T>(meter: &Meter, work: impl Future<Output = T>) -> T {
    let has_bar = stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|it| it != "dumb");
    let mut ticks = interval(if has_bar { DRAW_EVERY } else { WRITE_EVERY });
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first tick is immediate, when there is nothing to show.
    ticks.tick().await;
    let mut work = pin!(work);
    loop {
        // Progress that cannot be written is not an error.
        tokio::select! {
            biased;
            done = &mut work => {
                if has_bar {
                    let _ = write!(stderr(), "{CLEAR_LINE}");
                }
                return done;
            }
            _ = ticks.tick() => {
                let reading = meter.read();
                let _ = if has_bar {
                    write!(stderr(), "{CLEAR_LINE}{}", bar(&reading, columns()))
                } else {
                    writeln!(stderr(), "{}", line(&reading))
                };
            }
        }
    }
}

/// The terminal's width, read again each time: it may change meanwhile.
fn columns() -> usize {
    terminal_size_of(stderr()).map_or(USUAL_COLUMNS, |(width, _)| width.0.into())
}

/// A line with a bar that fits the columns, without the bar if there is no room for it.
fn bar(reading: &Reading, columns: usize) -> String {
    // Text in the last column would make some terminals begin the next line.
    let columns = columns.saturating_sub(1);
    let (phase, figures) = (&reading.phase, figures(reading));
    let room = columns.saturating_sub(phase.len() + figures.len() + " [] ".len());
    let Some(total) = reading.total.filter(|_| room >= SHORTEST_BAR) else {
        let mut line = line(reading);
        line.truncate(columns);
        return line;
    };
    let length = room.min(LONGEST_BAR);
    let part = reading.done.min(total) as f64 / total.max(1) as f64;
    let filled = (part * length as f64) as usize;
    let bar = "=".repeat(filled);
    format!("{phase} [{bar:<length$}] {figures}")
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
    use std::borrow::Cow;

    use super::*;

    const READING: Reading = Reading {
        phase: Cow::Borrowed("importing"),
        done: 45_500,
        total: Some(91_000),
        elapsed: Duration::from_secs(91),
    };

    #[test]
    fn line_has_what_is_done_the_rate_and_the_time_left() {
        let reading = Reading {
            done: 1_000,
            elapsed: Duration::from_secs(2),
            ..READING
        };
        assert_eq!(line(&reading), "importing: 1000 of 91000, 500/s, 3m left");
        let unknown = Reading {
            total: None,
            ..reading
        };
        assert_eq!(line(&unknown), "importing: 1000, 500/s");
    }

    #[test]
    fn bar_fits_the_terminal() {
        assert_eq!(
            bar(&READING, 100),
            "importing [===============               ] 45500 of 91000, 500/s, 1m 31s left"
        );
        assert_eq!(
            bar(&READING, 60),
            "importing [======      ] 45500 of 91000, 500/s, 1m 31s left"
        );
        assert_eq!(
            bar(&READING, 50),
            "importing: 45500 of 91000, 500/s, 1m 31s left"
        );
        for columns in 0..200 {
            assert!(bar(&READING, columns).len() < columns.max(1), "{columns}");
        }
        let nothing = Reading {
            done: 0,
            total: Some(0),
            ..READING
        };
        assert!(bar(&nothing, 80).contains("[   "), "{}", bar(&nothing, 80));
    }
}
