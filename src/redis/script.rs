//! Scripts, which are how several steps become one: Redis runs nothing else meanwhile.

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

    /// A script that finds the time, `now`, in microseconds since 1970, on Redis's clock.
    pub fn with_clock(text: &str) -> Self {
        Self::new(&timed(CLOCK, text))
    }

    /// A call of the script on one key. All that one call touches lies under one key, or under keys with one hash tag, so that
    /// a cluster finds it in one place.
    pub fn on(&self, key: &str) -> ScriptInvocation<'_> {
        self.0.key(key)
    }
}

/// The text of a script whose time comes from `clock`: [`CLOCK`], except in tests that bring a time of their own.
pub fn timed(clock: &str, text: &str) -> String {
    // Doubles hold whole microseconds exactly for the next 200 years.
    format!("{clock}local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])\n{text}")
}
