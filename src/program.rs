//! The `prompt-service` program: reads the settings, then serves or carries out an operator's
//! command.

use std::io::{Write, stdin};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use futures_util::FutureExt;
use tokio::signal::unix::{SignalKind, signal};

use crate::api::Documents;
use crate::app::{
    App, check, health_check, keys, prices, secret_files, transfer_commands, usage, users,
};
use crate::cli::{Cli, Command, Output, Refusal};
use crate::config::{Config, LogFormat, Secrets, read_env_file};
use crate::telemetry;

/// Runs the program.
///
/// In the library, not in the binary: what an async function does is compiled where it is awaited,
/// so that the binary would otherwise compile most of the service once more.
pub fn main() -> ExitCode {
    // Only that of the working directory: others may be able to write to its parents.
    match read_env_file(Path::new(".env")) {
        Ok(variables) => add_variables(variables),
        Err(error) => return fail(&error.into()),
    }
    let cli = match Cli::read() {
        Ok(cli) => cli,
        Err(Refusal::Setting(problem)) => return fail(&anyhow::Error::msg(problem)),
        Err(Refusal::Usage(error)) => error.exit(),
    };
    let mut out = Output::default();
    match run(cli, &mut out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if out.reader_left() => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// Puts the variables into the process's environment, where the environment has none of that name:
/// from there clap, secrets and libraries read them like any other.
fn add_variables(variables: Vec<(String, String)>) {
    for (name, value) in variables {
        if std::env::var_os(&name).is_none() {
            #[expect(unsafe_code, reason = "there is no safe function for this")]
            // SAFETY: no other thread may read or write the environment meanwhile. This runs first
            // in `main`, before anything has started a thread.
            unsafe {
                std::env::set_var(name, value);
            }
        }
    }
}

/// One line for the operator: the error with its causes.
fn fail(error: &anyhow::Error) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "error: {error:#}");
    ExitCode::FAILURE
}

fn run(cli: Cli, out: &mut Output) -> anyhow::Result<()> {
    let command = cli.command.unwrap_or(Command::Serve);
    if let Command::Openapi = command {
        out.write_all(&Documents::make().json)?;
        return Ok(out.flush()?);
    }
    if let Command::Health { ready } = command {
        return health_check::run(cli.settings.bind_addr, ready);
    }
    if let Command::Secrets { folder, files } = command {
        return secret_files::run(&folder, &files, |name| std::env::var_os(name));
    }
    let (log_format, log_filter) = (cli.settings.log_format, cli.settings.rust_log.clone());
    let variable = |name: &str| std::env::var_os(name);
    let config = Secrets::read(variable).and_then(|mut secrets| {
        let upstream = &cli.settings.upstream;
        if let Some(fallbacks) = &upstream.openai_fallback {
            let names = fallbacks.key_variables();
            secrets.read_upstream_keys("OPENAI_FALLBACK", names, variable)?;
        }
        let list = upstream.upstream_list()?;
        secrets.read_upstream_keys("UPSTREAMS", list.key_variables(), variable)?;
        Config::load(cli.settings, secrets)
    });
    let runtime = tokio::runtime::Runtime::new().context("the runtime cannot be started")?;
    if let Command::Check { upstream } = command {
        return runtime.block_on(check::run(config, upstream, out));
    }
    let config = config?;
    if !matches!(command, Command::Serve) {
        for sentence in &config.misspelt {
            // If standard error is closed, the warnings are lost, which is no reason to fail.
            let _ = writeln!(std::io::stderr(), "warning: {sentence}");
        }
    }
    match command {
        Command::Prices(arguments) => {
            let mut notes = std::io::stderr();
            prices::run(&arguments, &config, &mut stdin().lock(), out, &mut notes)
        }
        Command::Usage(arguments) => runtime.block_on(usage::run(arguments, &config, out)),
        Command::User(command) => runtime.block_on(users::run(command, &config, out)),
        Command::Key(command) => {
            let mut notes = std::io::stderr();
            runtime.block_on(keys::run(command, &config, out, &mut notes))
        }
        Command::Backup { file } => {
            runtime.block_on(transfer_commands::backup(&file, &config, out))
        }
        Command::Export(arguments) => {
            runtime.block_on(transfer_commands::export(arguments, &config, out))
        }
        Command::Move(arguments) => {
            runtime.block_on(transfer_commands::move_store(arguments, &config, out))
        }
        Command::Import(arguments) => {
            runtime.block_on(transfer_commands::import(arguments, &config, out))
        }
        Command::Serve
        | Command::Openapi
        | Command::Health { .. }
        | Command::Secrets { .. }
        | Command::Check { .. } => {
            let log_format = telemetry::init_logging(log_format, &log_filter);
            runtime.block_on(async {
                let (mut terminate, mut interrupt) = (
                    signal(SignalKind::terminate())?,
                    signal(SignalKind::interrupt())?,
                );
                let app = App::build(config).await?;
                if log_format == LogFormat::Pretty {
                    tracing::info!("open {}", app.url()?);
                }
                let shutdown = async move {
                    tokio::select! {
                        _ = terminate.recv() => {}
                        _ = interrupt.recv() => {}
                    }
                };
                app.serve(shutdown.boxed()).await
            })
        }
    }
}
