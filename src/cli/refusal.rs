//! Errors of the command line, in terms of the settings.

use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::Cli;
use crate::config::secret_meant;

/// Why no command is run.
#[derive(Debug)]
pub enum Refusal {
    /// A setting cannot be used: one line that names it and quotes nothing of its value.
    Setting(String),
    /// Help, the version, or an invalid command line. Clap's own text is used for each.
    Usage(clap::Error),
}

impl From<clap::Error> for Refusal {
    fn from(error: clap::Error) -> Self {
        match setting_problem(&error) {
            Some(problem) => Self::Setting(problem),
            None => Self::Usage(error),
        }
    }
}

/// The problem with a setting, in one line that begins with its name and leaves its value out;
/// `None` if the error is about anything else.
fn setting_problem(error: &clap::Error) -> Option<String> {
    let Some(ContextValue::String(shown)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    // As clap shows it: `--bind-addr <ADDR>`.
    let flag = shown.split([' ', '=']).next()?.strip_prefix("--")?;
    if error.kind() == ErrorKind::UnknownArgument {
        let name = secret_meant(&flag.replace('-', "_").to_ascii_uppercase())?;
        return Some(format!(
            "{name}: a secret has no flag, because others on this machine can see a command line; set the variable {name}, or {name}_FILE to a file that holds it"
        ));
    }
    let command = Cli::command();
    let setting = command
        .get_arguments()
        .find(|argument| argument.get_long() == Some(flag))?;
    let name = setting.get_env()?.to_string_lossy();
    let problem = match (std::error::Error::source(error), choices(error)) {
        (_, Some(choices)) => return Some(format!("{name}: must be one of: {choices}")),
        (Some(reason), None) => reason.to_string(),
        (None, None) if error.kind() == ErrorKind::InvalidValue => {
            format!("--{flag} needs a value")
        }
        (None, None) if error.kind() == ErrorKind::ArgumentConflict => {
            return Some(format!("{name}: --{flag} is given twice"));
        }
        (None, None) => "cannot be used".to_owned(),
    };
    let example = setting.get_default_values().first().map_or_else(
        || "prompt-service --help shows its form".to_owned(),
        |default| format!("a good value is {}", default.to_string_lossy()),
    );
    Some(format!("{name}: {problem} ({example})"))
}

fn choices(error: &clap::Error) -> Option<String> {
    match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(choices)) if !choices.is_empty() => Some(choices.join(", ")),
        _ => None,
    }
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
    fn invalid_value_is_reported_in_one_line_with_the_name_of_the_setting() {
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
    fn error_shows_an_example_or_the_choices() {
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
    fn a_secret_given_as_a_flag_is_named_with_its_variable_and_not_quoted() {
        for (flag, name) in [
            ("--openai-api-key", "OPENAI_API_KEY"),
            ("--openai-api-key=hunter2", "OPENAI_API_KEY"),
            ("--openai-api-key-file", "OPENAI_API_KEY"),
            ("--openai_api_key", "OPENAI_API_KEY"),
            ("--openai-key", "OPENAI_API_KEY"),
            ("--openai-api-key-env", "OPENAI_API_KEY"),
            ("--api-key", "OPENAI_API_KEY"),
            ("--db-url", "DATABASE_URL"),
            ("--redis", "REDIS_URL"),
            ("--secret-key", "SECRET_KEY"),
            ("--secret-key-fallbacks", "SECRET_KEY_FALLBACKS"),
            ("--database-url", "DATABASE_URL"),
            ("--redis-url", "REDIS_URL"),
        ] {
            for line in [
                &[flag, "hunter2"][..],
                &["serve", flag],
                &["user", "list", flag],
            ] {
                let problem = problem(line).unwrap();
                let says = format!("{name}: a secret has no flag");
                assert!(problem.starts_with(&says), "{line:?}: {problem}");
                assert!(problem.contains(&format!("{name}_FILE")), "{problem}");
                assert!(!problem.contains("hunter2"), "{problem}");
            }
        }
    }

    #[test]
    fn a_setting_without_a_value_is_named() {
        let problem = problem(&["--data-dir"]).unwrap();
        assert_eq!(
            problem,
            "DATA_DIR: --data-dir needs a value (a good value is ./data)"
        );
    }

    #[test]
    fn a_setting_that_is_given_twice_is_named() {
        let problem = problem(&["--data-dir", "a", "--data-dir", "b"]).unwrap();
        assert_eq!(problem, "DATA_DIR: --data-dir is given twice");
    }

    #[test]
    fn other_errors_keep_the_text_of_clap() {
        assert_eq!(problem(&["--no-such-flag"]), None);
        assert_eq!(problem(&["--help"]), None);
        assert_eq!(problem(&["user", "create", "alice"]), None);
    }
}
