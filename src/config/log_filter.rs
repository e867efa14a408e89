//! `RUST_LOG`: which lines are logged.

use std::str::FromStr;

use tracing_subscriber::filter::{LevelFilter, Targets};

/// The filter of log lines: a level, or pairs of a target and its level.
#[derive(Clone, Debug, PartialEq)]
pub struct LogFilter(pub Targets);

impl FromStr for LogFilter {
    type Err = &'static str;

    /// Reads directives such as `info` or `warn,prompt_service=debug`.
    ///
    /// The crate's own parser reads a misspelled level as a target, and an empty text as `error`.
    /// Both are refused here.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let problem = "must be a level such as info, or target=level pairs";
        let mut targets = Targets::new();
        let mut is_empty = true;
        let directives = text.split(',').map(str::trim);
        for directive in directives.filter(|directive| !directive.is_empty()) {
            is_empty = false;
            targets = match directive.split_once('=') {
                // A bracket would begin a filter by spans, which `Targets` has not.
                Some((target, level)) if !target.trim().is_empty() && !target.contains('[') => {
                    targets.with_target(target.trim(), self::level(level).ok_or(problem)?)
                }
                Some(_) => return Err(problem),
                None => targets.with_default(self::level(directive).ok_or(problem)?),
            };
        }
        if is_empty {
            return Err(problem);
        }
        Ok(Self(targets))
    }
}

fn level(name: &str) -> Option<LevelFilter> {
    let name = name.trim();
    // `LevelFilter` reads the empty text as `error`.
    (!name.is_empty()).then(|| name.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_are_levels_and_targets_with_levels() {
        let info: LogFilter = "info".parse().unwrap();
        for same in ["info,", " info ", ",info,,", "INFO"] {
            assert_eq!(same.parse(), Ok(info.clone()), "{same:?}");
        }
        let LogFilter(mixed) = "hyper=debug, warn".parse().unwrap();
        assert!(mixed.would_enable("hyper::client", &tracing::Level::DEBUG));
        assert!(mixed.would_enable("prompt_service", &tracing::Level::WARN));
        assert!(!mixed.would_enable("prompt_service", &tracing::Level::INFO));
    }

    #[test]
    fn a_directive_that_is_neither_is_refused() {
        for wrong in [
            "",
            ",",
            "inof",
            "loud",
            "=,=",
            "a=",
            "=info",
            "a=loud",
            "info,inof",
            "[span]=info",
        ] {
            assert!(wrong.parse::<LogFilter>().is_err(), "{wrong:?}");
        }
    }
}
