//! The command line: serving by default, and the operator's commands.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{Secret, Settings};

/// What follows the list of settings in the help.
const SECRETS_HELP: &str = "\
Secrets have no flag; each is read from its variable, or from the file that NAME_FILE names:
  SECRET_KEY            signs tokens, at least 32 bytes [default: made once and kept in DATA_DIR/secret.key]
  SECRET_KEY_FALLBACKS  further keys, separated by commas, that only verify
  DATABASE_URL          sqlite://PATH or postgres://USER:PASSWORD@HOST/DATABASE [default: a file in DATA_DIR]
  REDIS_URL             redis://HOST:PORT or rediss://HOST:PORT, which several replicas share [default: none, one replica]
  OPENAI_API_KEY        goes to OPENAI_BASE_URL; without it no Authorization is sent
and the variables that OPENAI_FALLBACK names.

A .env file in the working directory is read if there is one; the environment goes before it.";

/// Accounts, an LLM, durable history, semantic search and push in one process.
#[derive(Debug, Parser)]
#[command(name = "prompt-service", version, after_help = SECRETS_HELP)]
pub struct Cli {
    /// What to do; serve if left out.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The settings.
    #[command(flatten)]
    pub settings: Settings,
}

impl Cli {
    /// Reads the arguments and the environment of this process. An empty variable counts as unset: compose files pass every name
    /// through, set or not, and `.env.example` has lines that wait for a value.
    ///
    /// # Errors
    /// clap's, which is also how help and version come.
    pub fn read() -> Result<Self, clap::Error> {
        let is_empty = |name: &OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
        let mut command = Self::command().mut_args(|argument| {
            if argument.get_env().is_some_and(is_empty) {
                argument.env(Resettable::Reset)
            } else {
                argument
            }
        });
        let matches = command.try_get_matches_from_mut(std::env::args_os())?;
        Self::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
    }
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve (the default)
    Serve,
    /// Make, list, disable and enable accounts; works beside a running server
    #[command(subcommand)]
    User(UserCommand),
    /// Look at the settings, the data folder, the store, the model and the address, and say what was found; works beside a
    /// running server and changes nothing
    Check,
    /// Copy the embedded store to a new file, checked and whole; works beside a running server
    Backup {
        /// The file to make
        file: PathBuf,
    },
    /// Write all users and prompts as JSON lines; works beside a running server
    Export(ExportArgs),
    /// Take in users and prompts, from JSON lines or from the old system's database; the server must be stopped
    Import(ImportArgs),
    /// Carry the embedded store to a PostgreSQL database, whole, and compare both row by row; every server of either must be
    /// stopped
    Move(MoveArgs),
    /// Print the API's description, OpenAPI 3.1 as JSON
    Openapi,
    /// Write secrets to files, for containers that share them: what the variable of that name says,
    /// else what the file holds already, else a new random one
    Secrets {
        /// The folder of the files
        folder: PathBuf,
        /// A file, named like its variable. With =FORM it holds an address, in which {OTHER} stands
        /// for an earlier file's secret
        #[arg(required = true, value_name = "NAME[=FORM]")]
        files: Vec<String>,
    },
    /// Ask the server that listens on BIND_ADDR on this machine whether it is alive; for a container's health check
    Health {
        /// Ask whether it is ready to take requests
        #[arg(long)]
        ready: bool,
    },
}

/// What an export holds, and where it goes.
#[derive(Args, Debug)]
pub struct ExportArgs {
    /// The file to make; standard output if left out, or -
    pub file: Option<PathBuf>,
    /// Write password hashes too, so that accounts keep their passwords: whoever has the file can try to guess them
    #[arg(long)]
    pub with_password_hashes: bool,
    /// Write vectors too, so that an import by the same model need not make them again
    #[arg(long)]
    pub with_embeddings: bool,
}

/// What is imported, and how.
#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("source").required(true))]
pub struct ImportArgs {
    /// A file of JSON lines
    #[arg(group = "source")]
    pub file: Option<PathBuf>,
    /// The old system's database: postgres://USER:PASSWORD@HOST/DATABASE. Others on this machine can see it while the command
    /// runs; the next two ways hide it
    #[arg(long, group = "source", value_name = "URL", value_parser = secret)]
    pub from: Option<Secret>,
    /// The variable that holds the old system's address
    #[arg(long, group = "source", value_name = "NAME")]
    pub from_env: Option<String>,
    /// The file that holds the old system's address
    #[arg(long, group = "source", value_name = "PATH")]
    pub from_file: Option<PathBuf>,
    /// Only say what would be done, and what stands in the way
    #[arg(long)]
    pub dry_run: bool,
    /// Leave out rows that cannot be imported, in place of importing nothing
    #[arg(long)]
    pub skip_faulty: bool,
    /// What to keep as the model of the old system's answers, which it did not write down (those of its mock are known as such)
    #[arg(long, value_name = "NAME", default_value = "unknown")]
    pub model: String,
}

/// Where the embedded store goes.
#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("target").required(true))]
pub struct MoveArgs {
    /// The database to fill: postgres://USER:PASSWORD@HOST/DATABASE. Others on this machine can see it while the command runs;
    /// the next two ways hide it
    #[arg(long, group = "target", value_name = "URL", value_parser = secret)]
    pub to: Option<Secret>,
    /// The variable that holds the database's address
    #[arg(long, group = "target", value_name = "NAME")]
    pub to_env: Option<String>,
    /// The file that holds the database's address
    #[arg(long, group = "target", value_name = "PATH")]
    pub to_file: Option<PathBuf>,
}

impl MoveArgs {
    /// The target's address.
    pub fn target(&self) -> SecretUrl<'_> {
        SecretUrl {
            flag: "--to",
            url: self.to.as_ref(),
            variable: self.to_env.as_deref(),
            file: self.to_file.as_deref(),
        }
    }
}

/// An address that is a secret, and the ways in which it may be given; at most one is.
#[derive(Clone, Copy, Debug)]
pub struct SecretUrl<'a> {
    /// The flag, for errors.
    pub flag: &'static str,
    /// Itself.
    pub url: Option<&'a Secret>,
    /// The variable that holds it.
    pub variable: Option<&'a str>,
    /// The file that holds it.
    pub file: Option<&'a Path>,
}

impl ImportArgs {
    /// The old system's address, if it is the source.
    pub fn old_system(&self) -> SecretUrl<'_> {
        SecretUrl {
            flag: "--from",
            url: self.from.as_ref(),
            variable: self.from_env.as_deref(),
            file: self.from_file.as_deref(),
        }
    }
}

fn secret(text: &str) -> Result<Secret, Infallible> {
    Ok(Secret::new(text))
}

/// What can be done to accounts.
#[derive(Debug, Subcommand)]
pub enum UserCommand {
    /// Make an account; the password is read from standard input unless an option says where it is
    Create {
        /// The account's name
        username: String,
        /// Its address
        #[arg(long)]
        email: String,
        /// Read a password hash made by Django (pbkdf2_sha256$…) or this program ($argon2id$…) in place of a password
        #[arg(long)]
        hashed: bool,
        /// Where the password is
        #[command(flatten)]
        secret: SecretPlace,
    },
    /// List all accounts: id, name, address, state
    List,
    /// Disable an account: what it was given ends within 5 seconds
    Disable {
        /// The account's name
        username: String,
    },
    /// Enable a disabled account; it logs in anew
    Enable {
        /// The account's name
        username: String,
    },
    /// Give an account another password, read from standard input unless an option says where it is; what it was given ends
    /// within 5 seconds
    SetPassword {
        /// The account's name
        username: String,
        /// Where the password is
        #[command(flatten)]
        secret: SecretPlace,
    },
}

/// Where a password, or its hash, is read from: standard input if neither is said.
#[derive(Debug, Default, Args)]
pub struct SecretPlace {
    /// The environment variable that holds it
    #[arg(long, value_name = "NAME", conflicts_with = "password_file")]
    pub password_env: Option<String>,
    /// The file whose first line it is
    #[arg(long, value_name = "PATH")]
    pub password_file: Option<PathBuf>,
}

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
