//! What is wrong with a command line, in the words of the settings.

use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue};

use super::Cli;

/// What is wrong with the value of a setting, in one line that begins with the setting's name and leaves the value out;
/// `None` if the error is about anything else.
pub fn setting_problem(error: &clap::Error) -> Option<String> {
    let Some(ContextValue::String(shown)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    // As clap shows it: `--bind-addr <BIND_ADDR>`.
    let flag = shown.split(' ').next()?.strip_prefix("--")?;
    let command = Cli::command();
    let setting = command
        .get_arguments()
        .find(|argument| argument.get_long() == Some(flag))?;
    let name = setting.get_env()?.to_string_lossy();
    if let Some(ContextValue::Strings(choices)) = error.get(ContextKind::ValidValue)
        && !choices.is_empty()
    {
        return Some(format!("{name}: must be one of: {}", choices.join(", ")));
    }
    let reason = std::error::Error::source(error)
        .map_or_else(|| "cannot be used".to_owned(), ToString::to_string);
    let example = setting.get_default_values().first().map_or_else(
        || "the setting's help shows its form".to_owned(),
        |default| format!("a good value is {}", default.to_string_lossy()),
    );
    Some(format!("{name}: {reason} ({example})"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn problem(arguments: &[&str]) -> Option<String> {
        let arguments = std::iter::once("prompt-service").chain(arguments.iter().copied());
        setting_problem(&Cli::try_parse_from(arguments).unwrap_err())
    }

    #[test]
    fn a_bad_value_is_told_by_the_settings_name_in_one_line() {
        for (flag, value, name) in [
            ("--bind-addr", "nonsense", "BIND_ADDR"),
            ("--similar-scope", "mine", "SIMILAR_SCOPE"),
            ("--access-token-lifetime", "soon", "ACCESS_TOKEN_LIFETIME"),
            ("--max-prompt-chars", "0", "MAX_PROMPT_CHARS"),
            ("--search-memory", "9 apples", "SEARCH_MEMORY"),
            ("--trusted-proxies", "nowhere", "TRUSTED_PROXIES"),
            ("--metrics-addr", "9100", "METRICS_ADDR"),
        ] {
            let problem = problem(&[flag, value]).unwrap();
            assert!(problem.starts_with(&format!("{name}: ")), "{problem}");
            assert!(!problem.contains('\n'), "{problem}");
        }
    }

    #[test]
    fn an_example_or_the_choices_are_told() {
        assert!(
            problem(&["--bind-addr", "x"])
                .unwrap()
                .contains("127.0.0.1:8000")
        );
        assert!(
            problem(&["--cookie-secure", "x"])
                .unwrap()
                .contains("auto, always, never")
        );
    }

    #[test]
    fn other_mistakes_keep_claps_words() {
        assert_eq!(problem(&["--no-such-flag"]), None);
        assert_eq!(problem(&["--help"]), None);
        assert_eq!(problem(&["user", "create", "alice"]), None);
    }
}
