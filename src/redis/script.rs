//! Lua scripts. Redis runs nothing else while a script runs, so several steps become one.

use redis::ScriptInvocation;

/// A Lua script. Scripts that need the time begin with a line that reads Redis's own clock, so that no replica's clock matters.
pub struct Script(redis::Script);

/// The line with which such scripts begin: seconds, and microseconds within the second, as texts.
pub const CLOCK: &str = "local clock = redis.call('TIME')\n";

impl Script {
    /// A script of this text.
    pub fn new(text: &str) -> Self {
        Self(redis::Script::new(text))
    }

    /// A script in which `now` is the time on Redis's clock, in microseconds since 1970.
    pub fn with_clock(text: &str) -> Self {
        Self::new(&timed(CLOCK, text))
    }

    /// A call of the script on one key. A call may only touch that key and keys with the same hash
    /// tag, because a cluster keeps those on one server.
    pub fn on(&self, key: &str) -> ScriptInvocation<'_> {
        self.0.key(key)
    }
}

/// The text of a script that takes the time from `clock`: from [`CLOCK`], except in tests that set the time.
pub fn timed(clock: &str, text: &str) -> String {
    // Doubles hold whole microseconds exactly for the next 200 years.
    format!("{clock}local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])\n{text}")
}
