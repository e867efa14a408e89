//! The operator's commands on whole stores: `backup`, `check`, `export`, `import` and `move`.

mod backup;
mod chats;
pub mod check;
mod copy;
mod import;
mod line_faults;
mod lines;
mod move_store;

use std::future::poll_fn;
use std::path::PathBuf;
use std::pin::pin;
use std::task::Poll;

use clap::{CommandFactory, FromArgMatches};
use prompt_service::app::transfer_commands;
use prompt_service::cli::{Cli, Command};
use prompt_service::config::Config;
use prompt_service::store::sqlite::{OpenOptions, SqliteStore};

use crate::support::Folder;

/// The embedded store's file in a folder.
pub fn database_file(folder: &Folder) -> PathBuf {
    folder.path().join("prompt-service.sqlite3")
}

/// The embedded store in a folder, whatever the other tests run on.
pub fn embedded_store(folder: &Folder) -> SqliteStore {
    SqliteStore::open(&database_file(folder), OpenOptions::default()).unwrap()
}

/// Does a part of the work and drops the rest of it. `enough` is called before every step, in the
/// same task, and so before the work can end unnoticed.
pub async fn interrupted<T>(work: impl Future<Output = T>, enough: impl Fn() -> bool) {
    let mut work = pin!(work);
    poll_fn(|context| {
        if enough() {
            return Poll::Ready(());
        }
        let is_under_way = work.as_mut().poll(context).is_pending();
        assert!(is_under_way, "the work ended before it was interrupted");
        Poll::Pending
    })
    .await;
}

/// Runs one command line as the program does: what it wrote to standard output, or its error.
pub async fn command(config: &Config, arguments: &[&str]) -> Result<String, String> {
    let line = std::iter::once("prompt-service").chain(arguments.iter().copied());
    // The environment of the test run is not part of the tests.
    let command = Cli::command().mut_args(|arg| arg.env(clap::builder::Resettable::Reset));
    let matches = command.try_get_matches_from(line);
    let matches = matches.map_err(|error| error.to_string())?;
    let cli = Cli::from_arg_matches(&matches).unwrap();
    let mut out = Vec::new();
    let done = match cli.command {
        Some(Command::Backup { file }) => transfer_commands::backup(&file, config, &mut out).await,
        Some(Command::Export(arguments)) => {
            transfer_commands::export(arguments, config, &mut out).await
        }
        Some(Command::Move(arguments)) => {
            transfer_commands::move_store(arguments, config, &mut out).await
        }
        Some(Command::Import(arguments)) => {
            transfer_commands::import(arguments, config, &mut out).await
        }
        other => panic!("{other:?} is not tested here"),
    };
    let out = String::from_utf8(out).unwrap();
    match done {
        Ok(()) => Ok(out),
        Err(error) => Err(format!("{out}error: {error:#}")),
    }
}
