//! The command line as it is parsed, and the part of it that the help of each command shows: the
//! command's own options, and the settings that it needs.
//!
//! Every command accepts every setting, at any place of the line, because the server and the
//! operator's commands share one `.env` and one set of flags. The help of a command leaves out the
//! settings that it does not need: forty of them would hide the few options of `user list`.

use std::ffi::OsStr;
use std::io::{IsTerminal, stderr, stdout};

use clap::builder::Resettable;
use clap::{Arg, Command, CommandFactory};

use super::Cli;

/// The settings that the help of a command shows; `serve`, as the help of the program, shows all.
const SHOWN: &[(&str, &[&str])] = &[
    ("user", &["data_dir"]),
    ("key", &["data_dir"]),
    ("check", &[]),
    ("backup", &["data_dir"]),
    ("export", &["data_dir"]),
    (
        "import",
        &["data_dir", "max_prompt_chars", "embedding_model_dir"],
    ),
    ("move", &["data_dir", "embedding_model_dir"]),
    ("usage", &["data_dir"]),
    (
        "prices",
        &[
            "prices_file",
            "openai_base_url",
            "openai_fallback",
            "upstreams",
            "upstreams_file",
        ],
    ),
    ("openapi", &[]),
    ("secrets", &[]),
    ("health", &["bind_addr"]),
];

/// Follows the settings in the help of the server.
const SECRETS: &str = "\
Secrets:
  Secrets have no flag. Each is read from its variable, or from the file that NAME_FILE names.

  SECRET_KEY
          Signs tokens; at least 32 bytes [default: made once and kept in DATA_DIR/secret.key]
  SECRET_KEY_FALLBACKS
          Further keys, separated by commas, that only verify
  DATABASE_URL
          sqlite://PATH or postgres://USER:PASSWORD@HOST/DATABASE [default: a file in DATA_DIR]
  REDIS_URL
          redis://HOST:PORT or rediss://HOST:PORT, shared by several replicas [default: none]
  OPENAI_API_KEY
          Goes to OPENAI_BASE_URL; without it no Authorization is sent
  and the variables that OPENAI_FALLBACK and UPSTREAMS name

A .env file in the working directory is read; a variable of the environment wins over it.";

/// Follows the options of a command that works on the store.
const STORE: &str = "\
The store is the one of --data-dir, or of the variable DATABASE_URL. Further settings are those of \
the server: see prompt-service --help.";

/// The command line that is parsed. An empty variable counts as unset: compose files pass every
/// name through, set or not, and `.env.example` has lines that wait for a value.
pub(super) fn command() -> Command {
    let is_empty = |name: &OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    let root = Cli::command().mut_args(|arg| {
        // The text of a setting is below its name, because names are up to forty columns long.
        let is_setting = arg.is_global_set();
        let arg = arg.next_line_help(is_setting);
        if arg.get_env().is_some_and(is_empty) {
            arg.env(Resettable::Reset)
        } else {
            arg
        }
    });
    let settings = root.get_arguments().filter(|arg| arg.is_global_set());
    let settings: Vec<Arg> = settings.cloned().collect();
    let root = root
        .after_help(SECRETS)
        .mut_subcommand("serve", |serve| serve.after_help(SECRETS));
    let root = SHOWN.iter().fold(root, |root, (name, shown)| {
        let hidden = settings
            .iter()
            .filter(|arg| !shown.contains(&arg.get_id().as_str()));
        // A command's own argument replaces the program's argument of the same name.
        root.mut_subcommand(name, |command| {
            let command = command.args(hidden.map(|arg| arg.clone().hide(true)));
            if shown.contains(&"data_dir") {
                with_store(command)
            } else {
                command
            }
        })
    });
    // The help may be on its way to a terminal through a pager. A program that reads it finds each
    // option's text on one line.
    if stdout().is_terminal() || stderr().is_terminal() {
        root
    } else {
        root.term_width(0)
    }
}

fn with_store(command: Command) -> Command {
    command.after_help(STORE).mut_subcommands(with_store)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_of_every_command_but_the_server_has_its_own_settings() {
        let shown: Vec<_> = SHOWN.iter().map(|(name, _)| *name).collect();
        let commands = Cli::command();
        let names = commands.get_subcommands().map(Command::get_name);
        for name in names.filter(|name| *name != "serve") {
            assert!(shown.contains(&name), "{name}");
        }
    }
}
