//! Lua scripts. Redis runs nothing else while a script runs, so several steps become one. A call
//! may only touch its key and keys with the same hash tag, because a cluster keeps those on one
//! server.

use std::time::Duration;

use redis::Script;

/// The line with which scripts begin that need the time. It reads Redis's own clock, so that no
/// replica's clock matters: seconds, and microseconds within the second, as texts.
pub const CLOCK: &str = "local clock = redis.call('TIME')\n";

/// A script in which `now` is the time on Redis's clock, in microseconds since 1970.
pub fn script_with_clock(text: &str) -> Script {
    Script::new(&timed(CLOCK, text))
}

/// The text of a script that takes the time from `clock`: from [`CLOCK`], except in tests that set
/// the time.
pub fn timed(clock: &str, text: &str) -> String {
    // Doubles hold whole microseconds exactly for the next 200 years.
    format!("{clock}local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])\n{text}")
}

/// A duration as scripts take it: in microseconds.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
