//! The command line: serving by default, and the operator's commands.

mod command;
mod output;
mod refusal;

use std::convert::Infallible;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, Args, FromArgMatches, Parser, Subcommand};

pub use self::output::Output;
pub use self::refusal::Refusal;
use crate::config::{Given, Secret, Settings};

/// Accounts, an LLM, durable history, semantic search and push in one process.
#[derive(Debug, Parser)]
#[command(name = "prompt-service", bin_name = "prompt-service", version)]
pub struct Cli {
    /// What to do; serve if left out.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The settings.
    #[command(flatten)]
    pub settings: Settings,
}

impl Cli {
    /// Reads the arguments and the environment of this process.
    ///
    /// # Errors
    /// `Usage` is also how help and version come.
    pub fn read() -> Result<Self, Refusal> {
        let mut command = command::command();
        for name in command.get_arguments().filter_map(Arg::get_env) {
            if std::env::var_os(name).is_some_and(|value| value.to_str().is_none()) {
                let name = name.to_string_lossy();
                return Err(Refusal::Setting(format!(
                    "{name}: its value is no UTF-8 text"
                )));
            }
        }
        let matches = command.try_get_matches_from_mut(std::env::args_os())?;
        let mut cli =
            Self::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
        let is_set = |argument: &&Arg| {
            let source = matches.value_source(argument.get_id().as_str());
            matches!(
                source,
                Some(ValueSource::CommandLine | ValueSource::EnvVariable)
            )
        };
        cli.settings.given = Given {
            settings: command
                .get_arguments()
                .filter(is_set)
                .filter_map(|argument| Some(argument.get_env()?.to_str()?.to_owned()))
                .collect(),
            variables: std::env::vars_os()
                .filter(|(_, value)| !value.is_empty())
                .filter_map(|(name, _)| name.into_string().ok())
                .collect(),
        };
        Ok(cli)
    }
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the server (the default)
    Serve,
    /// Make, list, disable and enable accounts, also beside a running server
    #[command(subcommand)]
    User(UserCommand),
    /// Make, list, rotate and revoke API keys, also beside a running server
    #[command(subcommand)]
    Key(KeyCommand),
    /// Check all that a start needs, and change nothing; takes the same settings as the server
    Check {
        /// Fail if an upstream does not take its key or does not have its model, too: asks for its
        /// list of models, free of charge
        #[arg(long)]
        upstream: bool,
    },
    /// Copy the embedded store to a new file, also beside a running server
    Backup {
        /// The file to make
        file: PathBuf,
    },
    /// Write all users and prompts as JSON lines, also beside a running server
    Export(ExportArgs),
    /// Take in users and prompts of a file or of the old system; the server must be stopped
    Import(ImportArgs),
    /// Copy the embedded store to PostgreSQL and compare both; the server must be stopped
    Move(MoveArgs),
    /// Print what all calls used and cost, also beside a running server
    Usage(UsageArgs),
    /// Print the prices of models, and check that those named have one
    Prices(PricesArgs),
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
    /// Ask the server on this machine whether it is alive, as a container's health check does
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
    /// Write password hashes too, so that accounts keep their passwords: whoever has the file can
    /// try to guess them
    #[arg(long)]
    pub with_password_hashes: bool,
    /// Write vectors too, so that an import by the same model need not make them again
    #[arg(long)]
    pub with_embeddings: bool,
}

// Clap wraps texts at the terminal's width, and the usage not: that of some commands is broken by
// hand.

/// What is imported, and how.
#[derive(Args, Debug)]
#[command(override_usage = "prompt-service import [OPTIONS] <FILE>
       prompt-service import [OPTIONS] --from-env <NAME>
       prompt-service import [OPTIONS] --from-file <PATH>
       prompt-service import [OPTIONS] --from <URL>")]
#[command(group = clap::ArgGroup::new("source").required(true))]
pub struct ImportArgs {
    /// A file of JSON lines; - is standard input
    #[arg(group = "source")]
    pub file: Option<PathBuf>,
    /// The old system's database, postgres://…; others on this machine can see it while the command
    /// runs
    #[arg(long, group = "source", value_name = "URL", value_parser = secret)]
    pub from: Option<Secret>,
    /// The variable that holds that address, which hides it
    #[arg(long, group = "source", value_name = "NAME")]
    pub from_env: Option<String>,
    /// The file that holds that address
    #[arg(long, group = "source", value_name = "PATH")]
    pub from_file: Option<PathBuf>,
    /// Only say what would be done, and what stands in the way
    #[arg(long)]
    pub dry_run: bool,
    /// Leave out rows that cannot be imported, in place of importing nothing
    #[arg(long)]
    pub skip_faulty: bool,
    /// What counts as the model of the old system's answers, which it did not keep (its mock's are
    /// known)
    #[arg(long, value_name = "NAME", default_value = "unknown")]
    pub model: String,
}

/// Which usage is summed up, and how.
#[derive(Args, Debug)]
pub struct UsageArgs {
    /// The first day, in UTC [default: 30 days in all]
    #[arg(long, value_name = "DAY")]
    pub from: Option<String>,
    /// The last day, in UTC [default: today]
    #[arg(long, value_name = "DAY")]
    pub to: Option<String>,
    /// By what sums are told apart: day, user, key, model
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "user"
    )]
    pub by: Vec<String>,
}

/// Which prices are printed, and how.
#[derive(Args, Debug)]
pub struct PricesArgs {
    /// Models, as callers ask for them: at the prices of the upstreams that serve them, or of any
    /// provider if none is configured, where groq/NAME is the model as groq sells it. All of the
    /// table if left out
    #[arg(value_name = "MODEL")]
    pub models: Vec<String>,
    /// Print one JSON object a line, with prices in femtodollars a token
    #[arg(long)]
    pub json: bool,
    /// Read usages from standard input, one JSON object a line, and print what each costs in
    /// picodollars: {"model": "…", "provider": "…", "service_tier": "…", "input": 1,
    /// "cache_read": 1, "cache_write": 1, "output": 1, "reasoning": 1}
    #[arg(long, conflicts_with_all = ["models", "json"])]
    pub compute: bool,
}

/// Where the embedded store goes.
#[derive(Args, Debug)]
#[command(override_usage = "prompt-service move [OPTIONS] --to-env <NAME>
       prompt-service move [OPTIONS] --to-file <PATH>
       prompt-service move [OPTIONS] --to <URL>")]
#[command(group = clap::ArgGroup::new("target").required(true))]
pub struct MoveArgs {
    /// The database to fill, postgres://…; others on this machine can see it while the command runs
    #[arg(long, group = "target", value_name = "URL", value_parser = secret)]
    pub to: Option<Secret>,
    /// The variable that holds that address, which hides it
    #[arg(long, group = "target", value_name = "NAME")]
    pub to_env: Option<String>,
    /// The file that holds that address
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
    Create(CreateUserArgs),
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
    /// Set what an account's calls may cost, in US dollars for each day, week, month or in total,
    /// such as 20.00/month; off takes the budget away. Without an amount, print the budget and what
    /// is spent and reserved of it
    Budget {
        /// The account's name
        username: String,
        /// AMOUNT/PERIOD, or off
        // Not `budget`: that is the name of a setting.
        #[arg(value_name = "AMOUNT/PERIOD")]
        amount: Option<String>,
    },
    /// Give an account another password, read from standard input unless an option says where it
    /// is; what it was given ends within 5 seconds
    SetPassword {
        /// The account's name
        username: String,
        /// Where the password is
        #[command(flatten)]
        secret: SecretPlace,
    },
}

/// What can be done to API keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key; it alone is written to standard output, and never shown again
    Create(CreateKeyArgs),
    /// List keys: id, user, name, scopes, models, rates, budget, end, last use
    List {
        /// The account whose keys are listed; all keys if left out
        username: Option<String>,
    },
    /// Give a key another secret, which alone is written to standard output
    Rotate {
        /// The key's id
        id: String,
        /// For how long the present secret may still be used, up to 30d [default: 24h]
        #[arg(long, value_name = "TIME")]
        grace: Option<String>,
    },
    /// Revoke a key; every server refuses it within 2 seconds
    Revoke {
        /// The key's id
        id: String,
    },
}

/// The API key to make.
#[derive(Args, Debug)]
pub struct CreateKeyArgs {
    /// The account in whose name the key acts
    pub username: String,
    /// What the key is called
    #[arg(long)]
    pub name: String,
    /// What it may be used for, separated by commas: chat, embeddings, read, write [default:
    /// chat,read]
    #[arg(long)]
    pub scopes: Option<String>,
    /// The models that it may use, separated by commas: names, or beginnings of names followed by *
    /// [default: all]
    #[arg(long)]
    pub models: Option<String>,
    /// How often it may be used, such as 2/s,100/day [default: as often as its user]
    #[arg(long)]
    pub rates: Option<String>,
    /// How much it may spend, in US dollars: 20.00/month, or for each day, week, or in total
    /// [default: as much as its user]
    // Not `budget`: that is the name of a setting.
    #[arg(long, value_name = "AMOUNT/PERIOD")]
    pub budget_usd: Option<String>,
    /// When it expires: 90d, or a time such as 2036-11-22T21:08:49Z [default: never]
    #[arg(long, value_name = "TIME")]
    pub expires: Option<String>,
}

/// The account to make.
#[derive(Args, Debug)]
#[command(override_usage = "prompt-service user create <USERNAME> \\
           --email <EMAIL> [OPTIONS]")]
pub struct CreateUserArgs {
    /// The account's name
    pub username: String,
    /// The account's mail address
    #[arg(long)]
    pub email: String,
    /// Take a password hash, made by Django (pbkdf2_sha256$…) or this program ($argon2id$…), in
    /// place of a password
    #[arg(long)]
    pub hashed: bool,
    /// Make the store if there is none, for the first account before any server has run
    #[arg(long)]
    pub init: bool,
    /// Where the password is
    #[command(flatten)]
    pub secret: SecretPlace,
}

/// Where a password, or its hash, is read from: standard input if neither is said.
#[derive(Debug, Default, Args)]
pub struct SecretPlace {
    /// The environment variable that holds the password or its hash
    #[arg(long, value_name = "NAME", conflicts_with = "password_file")]
    pub password_env: Option<String>,
    /// The file whose first line is the password or its hash
    #[arg(long, value_name = "PATH")]
    pub password_file: Option<PathBuf>,
}
